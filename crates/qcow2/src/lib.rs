//! The qcow2 image format.
#![forbid(unsafe_code)]

pub mod header;
pub mod types;
