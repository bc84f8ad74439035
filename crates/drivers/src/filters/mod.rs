//! Filters: nodes in front of another node, of the same length.

pub mod commit_top;
pub mod mirror_top;
