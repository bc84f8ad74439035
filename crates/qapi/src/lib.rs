#![forbid(unsafe_code)]
//! Types of commands, events and options; JSON and key=value input; introspection.
