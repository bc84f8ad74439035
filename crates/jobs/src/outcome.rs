//! What is left of a job when it is over: who it was, what it worked on, how it ended, and how much it did.

use crate::event::{Kind, Progress};
use crate::job::Job;
use copy::{Report, Work};
use std::time::Duration;

/// How a job ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It did what it was to do.
    Completed,
    /// It failed.
    Failed,
    /// It was cancelled.
    Cancelled,
}

impl Outcome {
    /// As users read it.
    pub const fn name(self) -> &'static str {
        match self {
            Outcome::Completed => "completed",
            Outcome::Failed => "failed",
            Outcome::Cancelled => "cancelled",
        }
    }
}

/// Figures that only some kinds of job have.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Nodes it worked on, and as what (`source`, `target`, `base`).
    pub nodes: Vec<(&'static str, String)>,
    /// Bytes brought to the target, with what was copied again.
    pub copied: Option<u64>,
    /// Bytes that clients made dirty meanwhile.
    pub dirtied: Option<u64>,
    /// Bytes copied again because a link was lost.
    pub copied_again: Option<u64>,
}

impl Figures {
    /// Those of a copy.
    pub(crate) fn of(work: &Work) -> Figures {
        Figures {
            nodes: Vec::new(),
            copied: Some(work.done()),
            dirtied: Some(work.meter().dirtied_so_far()),
            copied_again: Some(work.copied_again()),
        }
    }
}

/// A job that is over.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Its id.
    pub id: String,
    /// What it did.
    pub kind: Kind,
    /// When it was created, as time since 1970.
    pub began: Duration,
    /// When it was over.
    pub ended: Duration,
    /// How long that took, by a clock that is never set.
    pub took: Duration,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it failed.
    pub error: Option<String>,
    /// How far it was.
    pub progress: Progress,
    /// How often links were lost and waited for, where that was bridged.
    pub link_losses: Option<u64>,
    /// What the comparison of source and target came to, if one was asked for.
    pub verified: Option<Report>,
    /// How it went on after a restart of the daemon.
    pub resumed: Option<&'static str>,
    /// More.
    pub figures: Figures,
}

impl Job {
    /// What is left of it, at its end.
    pub(crate) fn finished(&self, progress: Progress) -> Finished {
        let env = &self.shared.env;
        let error = self.error();
        let (began, begun_at) = self.created_at;
        let outcome = match &error {
            _ if self.cancelled.get() => Outcome::Cancelled,
            Some(_) => Outcome::Failed,
            None => Outcome::Completed,
        };
        Finished {
            id: self.id().to_owned(),
            kind: self.kind(),
            began,
            ended: env.wall(),
            took: env.now().saturating_sub(begun_at),
            outcome,
            error: error.filter(|_| outcome == Outcome::Failed).map(|e| e.message().to_owned()),
            progress,
            link_losses: self.outages(),
            verified: self.verified(),
            resumed: self.resumed.get(),
            figures: self.body().map(|b| b.figures()).unwrap_or_default(),
        }
    }
}
