//! Jobs: work on disks that runs for long, is steered by a client, and ends with a change of the graph or without.
//!
//! [`Registry`] has all jobs and the verbs; [`Job`] is one of them; [`state`] says what may happen when; [`mirror`],
//! [`commit`], [`stream`] and [`create`] are what jobs do. Events go to a [`Sink`]. No JSON and no QMP types here: `control` makes those.
#![forbid(unsafe_code)]

pub mod backup;
mod backup_args;
mod backup_bitmap;
mod chain;
pub mod colo;
pub mod commit;
mod commit_args;
pub mod create;
pub mod drive;
mod error;
mod event;
pub mod internal;
mod job;
mod kept_work;
mod leavers;
pub mod mirror;
mod mirror_args;
mod mirror_bitmap;
mod mirror_policy;
mod new_image;
mod outcome;
mod proving;
mod registry;
pub mod snapshot;
pub mod state;
pub mod stream;
mod stream_args;
pub mod txn;
pub mod verify;
mod verify_args;

pub use backup_args::{BackupArgs, BitmapMode, OnBufferFull};
pub use chain::change_backing_file;
pub use commit_args::{ChainEnd, CommitArgs};
pub use error::JobError;
pub use event::{Event, Kind, NoSink, Progress, Sink};
pub use job::{Body, IoStatus, Job, Options};
pub use leavers::Leaving;
pub use mirror_args::{Convergence, CopyMode, MirrorArgs, Sync};
pub use outcome::{Figures, Finished, Outcome};
pub use registry::{Group, JobKeeper, MAX_JOBS, Registry};
pub use state::{State, Verb};
pub use stream_args::StreamArgs;
pub use verify_args::{Verify, VerifyMode};
