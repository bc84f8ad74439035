//! What tests of this crate, of the simulator and of xtask share: a node over an open file, and random histories that are
//! compared with a byte array and judged by `qemu-img`. Uses the standard library freely; never part of the daemon.

pub mod file;
pub mod history;

pub use file::FileNode;

use crate::header::Compression;

/// Unpacks one cluster of `len` bytes.
///
/// # Errors
/// What is wrong with the packed bytes.
pub fn unpack(how: Compression, packed: &[u8], len: usize) -> Result<Vec<u8>, String> {
    crate::compress::unpack(how, packed, len)
}

/// Packs one cluster; `None` if it does not get smaller.
///
/// # Errors
/// The library's.
pub fn pack(how: Compression, plain: &[u8]) -> Result<Option<Vec<u8>>, String> {
    crate::compress::pack(how, plain)
}
