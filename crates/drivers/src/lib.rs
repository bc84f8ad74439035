#![forbid(unsafe_code)]
//! Protocol, format and filter drivers other than qcow2.

pub mod filters;
