//! Dirty bitmaps that survive crashes: a file beside the disk, with a write-ahead log of the regions that are being written.
//!
//! One [`DirtyLog`] keeps all bitmaps of one disk that are to survive: those that users called persistent, and what jobs have
//! still to do ([`JobSet`]). Before a guest's write goes to a *region* (1 to 16 MiB) that is not *hot*, a record that names the
//! region is made durable; writes to hot regions wait for nothing. Nor do writes to granules that every bitmap has durably marked
//! already: they can add nothing. A region leaves the hot set when its writes have ended and its marks are durable. So after a
//! crash each bitmap is what the file has, and all of the hot regions: never short, and too much by no more than those.
//!
//! What can happen: the process is killed or the power fails at any moment, sectors of a write reach the medium or not in any
//! combination, the file is damaged, its disk is full. What must stay true:
//! * After each crash a bitmap contains every change that reached the disk since it was created, enabled or cleared.
//! * Creating, removing, clearing, merging, enabling and disabling are all or nothing, also several at once ([`DirtyLog::sync`]).
//! * A job's mark goes durably only once what was copied is durable on the target.
//! * Damage makes a bitmap say too much, with the reason, or nobody believe it; never too little.
//!
//! | to change | open |
//! |---|---|
//! | how the file looks | `layout.rs`; the order of writes: docs/durability.md |
//! | which regions are hot, who waits, who leaves | `regions.rs` |
//! | one bitmap: what of it is durable, which sectors are to be written | `kept.rs` |
//! | turns: what is written when | `turn.rs`; changes by users: `sync.rs` |
//! | what a crash or damage leaves | `recover.rs` |
//! | how a job keeps what it has to do | `job_set.rs` |
#![forbid(unsafe_code)]

mod job_set;
mod kept;
mod layout;
mod log;
mod recover;
mod regions;
mod sync;
mod turn;

pub use job_set::JobSet;
pub use layout::{MAX_IDENTITY, MAX_KEPT};
pub use log::{DirtyLog, Figures, Pass, Settings};
pub use recover::{Found, FoundBitmap, is_unused, read};
pub use regions::{Geometry, geometry_for};
pub use turn::BEAT;

/// Defects that tests plant ([`env::bugs`]), each of which the crash enumeration must find.
#[cfg(feature = "planted-bugs")]
pub const PLANTED: [&str; 4] = [
    "dirtylog: writes go before the record",
    "dirtylog: a region leaves too early",
    "dirtylog: cleared before the target's flush",
    "dirtylog: header before the bits",
];
