#![forbid(unsafe_code)]
//! The NBD protocol sans I/O: bytes in, bytes out, both roles.
