//! Filters: nodes that stand in front of one other and change how requests reach it.

mod basics;
pub mod commit_top;
pub mod compress;
pub mod copy_before_write;
pub mod copy_on_read;
pub mod mirror_top;
pub mod preallocate;
pub mod quorum;
pub mod replication;
pub mod snapshot_access;
pub mod throttle;
pub mod throttle_limits;

pub use basics::Given;
pub(crate) use basics::{description, filter_basics, filter_passes, inside, read_past_end};
pub(crate) use quorum::all;
