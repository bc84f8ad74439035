#![forbid(unsafe_code)]
//! The qcow2 image format.
