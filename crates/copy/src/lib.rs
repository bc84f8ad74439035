#![forbid(unsafe_code)]
//! The one copy engine.
