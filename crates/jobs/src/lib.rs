#![forbid(unsafe_code)]
//! Jobs: states, registry, control, mirror, create.
