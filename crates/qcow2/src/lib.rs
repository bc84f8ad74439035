//! The qcow2 image format.
//!
//! Two halves. The *running driver* ([`Qcow2`]) serves an open image: it says where guest bytes are, finds space for new
//! ones, and brings metadata to the file in an order that no crash can turn into corruption (`order.rs`,
//! docs/durability.md). The *tools* ([`create`], [`check`]) work on images nobody is using.
#![forbid(unsafe_code)]

mod alloc;
mod bitmap_store;
mod bitmaps;
mod cache;
pub mod check;
mod child;
mod compress;
mod core;
pub mod create;
pub mod header;
mod inflight;
mod l1l2;
mod map;
mod node;
mod open;
mod options;
mod order;
mod overlap;
mod payload;
mod refcount;
mod resize;
pub mod rewrite;
mod snapshot;
pub mod storage;
#[cfg(feature = "testing")]
pub mod testing;
pub mod types;
mod write;
mod zero;

pub use crate::core::OnCorruption;
pub use node::Qcow2;
pub use options::{Keeper, L2_CACHE_MAX, L2_SLICE, Options, OverlapCheck};
pub use overlap::Corruption;
pub use snapshot::{MAX_NAME as MAX_SNAPSHOT_NAME, Snapshot};
