//! What survives the process: a small transactional store in a directory of the daemon's own.
//!
//! [`Store`] keeps tables of named records (`--state-dir DIR`). What is in it, and what a new process makes of it, is the
//! business of those who write there (`control::state` for the graph, exports and jobs). What must stay true: what a commit
//! has answered is there after any crash, whole; a damaged store is an error that names the file, never an empty store.
#![forbid(unsafe_code)]

mod batch;
mod image;
mod store;

pub use batch::{Batch, Changes, Tables};
pub use store::{FORMAT_FILE, STORE_FILE, Store};
