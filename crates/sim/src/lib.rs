#![forbid(unsafe_code)]
//! The simulated world: disk, network, clock, faults, oracles.
