//! Jobs: work on disks that runs for long, is steered by a client, and ends with a change of the graph or without.
#![forbid(unsafe_code)]

pub mod state;

pub use state::{State, Verb};
