#![forbid(unsafe_code)]
//! Dirty bitmaps, pure.
