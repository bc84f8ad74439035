//! What differs between the users of the engine, and what the engine asks of whoever runs it.

use crate::outage::Links;
use crate::proof::Mismatch;
use block::{BlockError, Extent, Io, Kind, Span};
use env::sync::Notify;
use graph::Edge;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

/// What is done about a guest's write (zero request, discard) before the guest is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnWrite {
    /// Nothing: the copy does not care.
    Pass,
    /// It is done when the source has it; the range is to be copied again.
    MarkDirty,
    /// It is done when source and target have it.
    WriteBoth,
    /// It is done when the source has it, and no copy of the same bytes runs meanwhile. For a copy into the source itself.
    Exclude,
    /// It is done when the source has it; nothing is copied, and what was compared is to be compared again.
    Compare,
}

/// What becomes of an extent of the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// Its bytes are copied.
    Copy,
    /// The target is made to read as zero there, giving the space back where it can.
    Zero,
    /// Nothing is done.
    Skip,
}

/// What the engine does when it has looked for work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// Go on: copy what is dirty, wait for more.
    Again,
    /// Let what is in flight end, and return to the caller.
    Done,
}

/// Where the engine stands, for [`Policy::pass_over`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    /// Bytes marked dirty.
    pub dirty: u64,
    /// Bytes being copied now.
    pub copying: u64,
    /// Nothing dirty, nothing in flight, no debt to the rate limit.
    pub clean: bool,
    /// Bytes that are to be compared; 0 where nothing is.
    pub stale: u64,
    /// All has been compared since it last changed (or nothing is to be), and nothing is being compared.
    pub proven: bool,
}

/// What makes a job that job. The first question, what is dirty at the start, is answered by the caller with the
/// helpers of [`first`](crate::first); the fifth, what the graph is afterwards, by the job's plan.
pub trait Policy {
    /// What to do with a guest's write of `at`.
    fn guest_write(&self, at: Span) -> OnWrite;
    /// Whether what a guest reads is written to the target as well, where that is still dirty.
    fn copy_reads(&self) -> bool {
        false
    }
    /// What becomes of this piece of the source.
    fn fate(&self, extent: &Extent) -> Fate {
        if extent.kind == Kind::Data { Fate::Copy } else { Fate::Zero }
    }
    /// What the source holds of `at`, all of it, where that is not simply what its reader sees: asked when the range is locked,
    /// before it is read.
    fn look<'a>(&'a self, source: &'a Edge, at: Span) -> Option<Io<'a, Vec<Extent>>> {
        let _ = (source, at);
        None
    }
    /// Whether what is written is what the target's reader sees there already (a copy between layers of one disk).
    fn unchanged(&self) -> bool {
        false
    }
    /// Under [`Action::Ignore`]: whether the range is left as it is from now on, instead of being tried again.
    fn leaves_out(&self, at: Span, error: &BlockError) -> bool {
        let _ = (at, error);
        false
    }
    /// Whether the target stores what is copied compressed.
    fn compressed(&self) -> bool {
        false
    }
    /// Whether the source is told that it need not keep what has been copied.
    fn discard_source(&self) -> bool {
        false
    }
    /// Whether guests pay for each request until all is copied (they write to both sides), and so are better served by a copy that is done
    /// soon: beside what is copied in turn with their requests, the host copies some by itself.
    fn hurries(&self) -> bool {
        false
    }
    /// Whether source and target are compared now, where there is something to compare.
    fn compares(&self) -> bool {
        true
    }
    /// Whether to go on.
    fn pass_over(&self, standing: Standing) -> Next;
}

/// On which side a request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Reading.
    Source,
    /// Writing.
    Target,
}

impl Side {
    /// As users know it.
    pub const fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Target => "target",
        }
    }
}

/// What to do about a failed request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// End with this error.
    Report,
    /// Try again (after a while).
    Ignore,
    /// Rest until told to go on, then try again.
    Stop,
}

/// What a user chose to do about errors of one side (QMP: BlockdevOnError; `auto` is `Enospc`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnError {
    /// The job fails.
    #[default]
    Report,
    /// Retry until it works.
    Ignore,
    /// Rest on a full disk, fail otherwise.
    Enospc,
    /// Rest.
    Stop,
}

impl OnError {
    /// What that means for `error`.
    pub fn action(self, error: &BlockError) -> Action {
        match self {
            OnError::Report => Action::Report,
            OnError::Ignore => Action::Ignore,
            OnError::Stop => Action::Stop,
            OnError::Enospc if error.errno() == BlockError::ENOSPC => Action::Stop,
            OnError::Enospc => Action::Report,
        }
    }
}

/// How whoever runs the engine steers it. One implementation: a job.
pub trait Control {
    /// Whether the engine should rest.
    fn pause_wanted(&self) -> bool;
    /// Rests: nothing is in flight; ends when it may go on.
    fn park(&self) -> Pin<Box<dyn Future<Output = ()> + '_>>;
    /// Limit of background copying in bytes per second; 0 for none.
    fn speed(&self) -> u64;
    /// A request failed: announces it and says what to do. Called once per failed request. What is nothing but the loss of
    /// a link of [`Control::links`] is to be answered with [`Action::Ignore`].
    fn failed(&self, side: Side, error: &BlockError) -> Action;
    /// Source and target were found to differ.
    fn mismatch(&self, found: &Mismatch) {
        let _ = found;
    }
    /// The links whose loss is bridged.
    fn links(&self) -> Option<Rc<Links>> {
        None
    }
    /// A link is lost, and waited for.
    fn link_lost(&self, side: Side, why: &BlockError) {
        let _ = (side, why);
    }
    /// It is back after `down`; `again` bytes that the target had taken are copied again.
    fn link_back(&self, side: Side, down: Duration, again: u64) {
        let _ = (side, down, again);
    }
    /// It did not come back in time, or not as it was: announces it and says what to do ([`Action::Ignore`]: wait again).
    fn link_given_up(&self, side: Side, why: &BlockError) -> Action {
        let _ = (side, why);
        Action::Report
    }
    /// Notified when any of the answers above may have changed.
    fn changed(&self) -> &Notify;
    /// Tells whether the engine is waiting with nothing in flight (so that a pause takes effect at once).
    fn set_idle(&self, idle: bool);
}
