//! What tests of this crate, of the simulator and of xtask share: a node over an open file, and random histories that are
//! compared with a byte array and judged by `qemu-img`. Uses the standard library freely; never part of the daemon.

pub mod file;
pub mod history;

pub use file::FileNode;
