//! liveblk: the human's command.
#![forbid(unsafe_code)]
fn main() {}
