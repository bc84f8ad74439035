//! What is played in a simulated world, and watched.

pub mod storage;
