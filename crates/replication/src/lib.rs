//! Continuous replication with checkpoints: a primary forwards its writes, a secondary is always at a checkpoint.
//!
//! The specification is reference/replication.md; invariants I1-I10 and the rules cited as O2, C4, X3, ... are its. Nothing here
//! knows QMP. From below to above:
//!
//! * pure, no I/O: [`types`], [`history`] (where images come from), [`ack`] (what an acknowledgement means), [`digest`],
//!   [`wire`] (bytes in, bytes out), [`dirty`] (what is owed to whom), the state machines [`primary`] and [`secondary`];
//! * over files and disks: [`store`], where a secondary keeps what is not yet decided; [`session`]: connections, the guest's requests;
//!   [`lease`]: who owns a group, by an arbiter's word.
//!
//! What must stay true above all: a secondary's image is, at every instant and after every crash, a committed checkpoint with
//! its own writes over it; and no byte of an older generation reaches a medium.
#![forbid(unsafe_code)]

pub mod ack;
pub mod bugs;
mod counts;
pub mod digest;
pub mod dirty;
pub mod history;
pub mod lease;
pub mod primary;
pub mod secondary;
pub mod session;
pub mod store;
pub mod types;
pub mod wire;

pub use types::{Epoch, Generation, GroupId, Op, Seq};
