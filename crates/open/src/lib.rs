#![forbid(unsafe_code)]
//! From options to nodes: which driver opens what, implicit opens, image creation.
