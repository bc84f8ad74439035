//! The one copy engine: mirror, commit, stream, backup, conversion and resync are this loop with a [`Policy`] each.
//!
//! It knows edges, dirty bits and ranges; no job names, no states, no JSON. [`Engine`] copies in the background,
//! [`CopyTap`] sees the guest's requests, [`Work`] is what the two share (and says what must stay true), [`first`]
//! finds out what is dirty at the start, [`verify()`] compares two disks.
#![forbid(unsafe_code)]

pub mod bugs;
mod check;
mod cluster;
pub mod digest;
mod dirty;
mod doubt;
mod engine;
pub mod first;
mod instant;
mod outage;
mod piece;
mod policy;
mod proof;
mod ranges;
mod stats;
mod status;
mod tap;
mod verify;
mod window;
mod work;

pub use cluster::{check_min_cluster, cluster_size};
pub use engine::Engine;
pub use instant::{KeepRules, Ledger, OnSaveError, PointInTime, Still};
pub use outage::{Links, OnLinkLoss, Outage, SETTLE};
pub use policy::{Action, Control, Fate, Next, OnError, OnWrite, Policy, Side, Standing};
pub use proof::{Coverage, LastChange, Mismatch, Proof, ProofRules, Report};
pub use ranges::{Owner, RangeLocks, RangeTicket};
pub use stats::{Meter, Obstacle, Outlook};
pub use status::{status, status_all, top_layer};
pub use tap::CopyTap;
pub use verify::{Verdict, verify};
pub use window::{MAX_IN_FLIGHT, MAX_PIECE, MAX_PIECE_GUEST};
pub use work::Work;
