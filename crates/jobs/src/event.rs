//! What jobs tell the world. `control` makes QMP events of it.

use crate::outcome::Finished;
use crate::state::State;
use copy::{Action, Mismatch, Report, Side};
use std::time::Duration;

/// What a job does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// `blockdev-mirror`.
    Mirror,
    /// `block-commit`.
    Commit,
    /// `block-stream`.
    Stream,
    /// `blockdev-backup`.
    Backup,
    /// `blockdev-create`.
    Create,
    /// `x-blockdev-amend`.
    Amend,
    /// `block-verify`.
    Verify,
}

impl Kind {
    /// The QMP name (JobType).
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Mirror => "mirror",
            Kind::Commit => "commit",
            Kind::Stream => "stream",
            Kind::Backup => "backup",
            Kind::Create => "create",
            Kind::Amend => "amend",
            Kind::Verify => "verify",
        }
    }

    /// The kind of this name.
    pub fn of_name(name: &str) -> Option<Kind> {
        let all =
            [Kind::Mirror, Kind::Commit, Kind::Stream, Kind::Backup, Kind::Create, Kind::Amend, Kind::Verify];
        all.into_iter().find(|k| k.name() == name)
    }

    /// Whether the `block-job-*` commands and `BLOCK_JOB_*` events know this kind.
    pub const fn is_block_job(self) -> bool {
        !matches!(self, Kind::Create | Kind::Amend)
    }
}

/// How far a job is: what BLOCK_JOB_* events carry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// All there is to do (`len`, `total-progress`).
    pub total: u64,
    /// What is done (`offset`, `current-progress`).
    pub current: u64,
}

/// Something that happened to a job.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// JOB_STATUS_CHANGE.
    Status {
        /// Job id.
        id: String,
        /// Its new state.
        state: State,
    },
    /// BLOCK_JOB_READY.
    Ready {
        /// Job id.
        id: String,
        /// Kind of job.
        kind: Kind,
        /// How far it is.
        progress: Progress,
        /// Rate limit.
        speed: u64,
    },
    /// BLOCK_JOB_PENDING.
    Pending {
        /// Job id.
        id: String,
        /// Kind of job.
        kind: Kind,
    },
    /// BLOCK_JOB_COMPLETED.
    Completed {
        /// Job id.
        id: String,
        /// Kind of job.
        kind: Kind,
        /// How far it is.
        progress: Progress,
        /// Rate limit.
        speed: u64,
        /// What failed, if it failed.
        error: Option<String>,
        /// What the comparison of source and target came to, if one was asked for.
        verified: Option<Report>,
    },
    /// BLOCK_JOB_MISMATCH: source and target were found to differ.
    Mismatch {
        /// Job id.
        id: String,
        /// Where, and what is done about it.
        found: Mismatch,
    },
    /// BLOCK_JOB_CANCELLED.
    Cancelled {
        /// Job id.
        id: String,
        /// Kind of job.
        kind: Kind,
        /// How far it is.
        progress: Progress,
        /// Rate limit.
        speed: u64,
    },
    /// BLOCK_JOB_IMAGE_DELETED: an image left a chain, and its file was to be deleted.
    Image {
        /// Job id.
        id: String,
        /// The node that the image was.
        node: String,
        /// Its file; empty if it has none.
        filename: String,
        /// Why the file is still there, if it is.
        error: Option<String>,
    },
    /// BLOCK_JOB_LINK_LOST: the connection to one side is lost, and waited for.
    LinkLost {
        /// Job id.
        id: String,
        /// Which side.
        side: Side,
        /// Why, as far as is known.
        reason: String,
        /// How long it is waited for.
        wait: Duration,
        /// What is done then.
        then: Action,
    },
    /// BLOCK_JOB_LINK_RESTORED: it is back.
    LinkBack {
        /// Job id.
        id: String,
        /// Which side.
        side: Side,
        /// After how long.
        down: Duration,
        /// Bytes that the target had taken and may have lost: they are copied again.
        again: u64,
    },
    /// BLOCK_JOB_ERROR: a request failed.
    Error {
        /// Job id.
        id: String,
        /// `Source`: read, `Target`: write.
        side: Side,
        /// What is done about it.
        action: Action,
    },
}

/// Where events go. Called at the moment of the change; must not wait or call back.
pub trait Sink {
    /// Something happened.
    fn event(&self, event: Event);
    /// A job is over: for those who ask later.
    fn finished(&self, job: Finished) {
        let _ = job;
    }
}

/// A sink that drops everything.
pub struct NoSink;

impl Sink for NoSink {
    fn event(&self, _: Event) {}
}
