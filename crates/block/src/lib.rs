//! Nouns of the block layer: what a piece of a disk, its content and an error about it are.
//!
//! Nothing here does I/O or waits. What must stay true: a [`Span`] never wraps around `u64`, a [`Data`] is
//! immutable once made (so that several holders may read it while a kernel or a peer does), and every
//! [`BlockError`] carries the errno an NBD client or a guest will be shown.
#![forbid(unsafe_code)]

mod data;
mod error;
mod limits;
mod span;

pub use data::{Data, ZERO_PART, is_zero};
pub use error::{BlockError, Kind as ErrorKind, Result, strerror};
pub use limits::{Limits, Prealloc, ReqFlags};
pub use span::{Extent, Kind, Span};

use std::future::Future;
use std::pin::Pin;

/// A boxed future of a block operation. Not `Send`: a disk lives on one home thread.
pub type Io<'a, T = ()> = Pin<Box<dyn Future<Output = Result<T>> + 'a>>;

/// Bytes in a sector, the smallest unit in which a disk may tear a write.
pub const SECTOR: u64 = 512;
