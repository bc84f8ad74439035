//! The qcow2 image format.
#![forbid(unsafe_code)]

pub mod check;
pub mod create;
pub mod header;
pub mod storage;
pub mod types;
