//! The simulated world: disks, network, clock, faults, crashes, and the oracles that watch a run.
//!
//! The production code of the daemon runs here unchanged over another [`env::Backend`]: everything it sees of the outside
//! comes from a [`Machine`] (time, chance, what happens when), a [`Host`] (a disk that survives its processes) and a [`Net`]. A
//! run is a function of its seed. What must stay true: nothing here reads a real clock, an address or a hash order; a
//! fault model promises nothing that real disks and sockets do not (reference/reliability.md 7.1).
//!
//! | to change | open |
//! |---|---|
//! | what a disk keeps in a crash | `inode.rs`, `image.rs` |
//! | what goes wrong, how often | `faults.rs`, `net.rs` |
//! | time, order of tasks, the trace | `machine.rs` |
//! | crash states from a log | `log.rs` |
//! | what guests do | `guest.rs`, `nbd_disk.rs` |
//! | running many seeds | `runner.rs`, `bin/simulate.rs` |
//! | what a guest may see | `history.rs`, `stamp.rs` |
#![forbid(unsafe_code)]

mod boot;
mod elsewhere;
mod faults;
mod file;
mod guest;
mod history;
mod host;
mod image;
mod inode;
mod log;
mod machine;
mod manager;
mod nbd_disk;
mod net;
#[cfg(feature = "planted-bugs")]
pub mod planted;
mod rng;
pub mod runner;
pub mod scenario;
mod stamp;
mod verdict;
mod world;

pub use boot::Booted;
pub use faults::{Fault, OPS, Op, Profile, Rule};
pub use guest::{Dial, Disk, Guest, Habits, read_all};
pub use history::{Crash, History, Moment, Record, What};
pub use host::{Host, Keep, Process, SimBackend};
pub use image::{BLOCK, Effect, Image, MAX_EXTENTS};
pub use log::{CrashPoints, EXHAUSTIVE, Entry, Log};
pub use machine::Machine;
pub use manager::{JobSeen, Manager, Refusal};
pub use nbd_disk::NbdDisk;
pub use net::{Net, NetProfile};
pub use rng::Rng;
pub use stamp::{Value, stamped, value_of, values_of};
pub use verdict::Verdict;
pub use world::{HELD, World};
