//! Project chores: setup, layers, tidy, sim, crash, bench.
#![forbid(unsafe_code)]
fn main() {}
