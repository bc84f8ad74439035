//! liveblkd: the storage daemon.
#![forbid(unsafe_code)]
fn main() {}
