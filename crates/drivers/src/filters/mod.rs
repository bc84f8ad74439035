//! Filters: nodes that stand in front of one other and change how requests reach it.

mod basics;
pub mod commit_top;
pub mod copy_before_write;
pub mod mirror_top;
pub mod snapshot_access;

pub use basics::Given;
pub(crate) use basics::description;
pub(crate) use basics::filter_basics;
