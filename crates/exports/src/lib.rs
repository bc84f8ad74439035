#![forbid(unsafe_code)]
//! Exports: the NBD server.
