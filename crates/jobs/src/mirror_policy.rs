//! What makes a mirror a mirror: which writes are synchronous, when a pass is over, and the user's convergence policy.

use crate::chain;
use crate::job::Job;
use crate::mirror_args::{Convergence, CopyMode};
use crate::proving::{PATIENCE, Rest};
use block::{Extent, Io, Kind, Span};
use copy::bugs::{Bug, planted};
use copy::{Fate, Links, Next, Obstacle, OnWrite, Policy, Standing, Work};
use env::Env;
use graph::{Edge, NodeCell};
use std::cell::Cell;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// Bytes left at which the client is held for completion although some are still dirty: what a window holds, so a pause
/// of milliseconds.
const HOLD_AT: u64 = 1 << 20;
/// Share of the copy rate that the throttling policy leaves to the client.
const GUEST_SHARE: f64 = 0.5;

/// See the phases in [`crate::mirror`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    Preparing,
    Copying,
    Proving,
    Following,
    Finishing,
    Over,
}

/// What the user asked of a ready mirror.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wish {
    Follow,
    Pivot,
    /// End as a copy of one instant.
    Stop,
}

pub(crate) struct MirrorPolicy {
    env: Env,
    work: Rc<Work>,
    phase: Cell<Phase>,
    mode: Cell<CopyMode>,
    wish: Cell<Wish>,
    asked_at: Cell<Duration>,
    /// What is left to be compared by then.
    rest: Rest,
    convergence: Convergence,
    converge_after: Duration,
    started: Duration,
    /// The target, where it is an image below the source.
    base: Option<Rc<NodeCell>>,
    /// Whose losses are bridged.
    links: Option<Rc<Links>>,
    job: Weak<Job>,
}

impl MirrorPolicy {
    pub(crate) fn new(
        work: Rc<Work>,
        mode: CopyMode,
        convergence: Convergence,
        converge_after: Duration,
        base: Option<Rc<NodeCell>>,
        links: Option<Rc<Links>>,
        job: &Rc<Job>,
    ) -> MirrorPolicy {
        let env = job.shared.env.clone();
        let started = env.now();
        let rest = Rest::new(env.clone(), work.clone());
        MirrorPolicy {
            env,
            work,
            phase: Cell::new(Phase::Preparing),
            mode: Cell::new(mode),
            wish: Cell::new(Wish::Follow),
            asked_at: Cell::new(Duration::ZERO),
            rest,
            convergence,
            converge_after,
            started,
            base,
            links,
            job: Rc::downgrade(job),
        }
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.set(phase);
    }

    pub(crate) fn is_following(&self) -> bool {
        self.phase.get() == Phase::Following
    }

    /// Whether the link to the target is lost and waited for: then all writes of clients are marked dirty, and nothing more.
    pub(crate) fn is_cut_off(&self) -> bool {
        self.links.as_ref().is_some_and(|l| l.target_is_down())
    }

    /// The target is about to be its clients' disk.
    pub(crate) fn release_links(&self) {
        self.links.iter().for_each(|l| l.release());
    }

    pub(crate) fn mode(&self) -> CopyMode {
        self.mode.get()
    }

    pub(crate) fn set_mode(&self, mode: CopyMode) {
        self.mode.set(mode);
    }

    pub(crate) fn wish(&self) -> Wish {
        self.wish.get()
    }

    /// The first wish counts: a completion under way is not turned into a cancellation, nor the other way round.
    pub(crate) fn ask(&self, wish: Wish) {
        if self.wish.get() == Wish::Follow {
            self.wish.set(wish);
            self.asked_at.set(self.env.now());
            self.rest.begin();
        }
    }

    /// The job whose policy this is.
    pub(crate) fn job(&self) -> Option<Rc<Job>> {
        self.job.upgrade()
    }

    /// What the user chose to have done when the copy does not get there by itself.
    fn converge(&self) {
        if self.convergence == Convergence::None
            || self.phase.get() != Phase::Copying
            || self.env.now().saturating_sub(self.started) < self.converge_after
        {
            return;
        }
        let Some(job) = self.job.upgrade() else { return };
        let now = self.env.now();
        let outlook = self.work.meter().outlook(now, self.work.remaining(), job.speed(), job.is_paused());
        let stuck = matches!(outlook.obstacle, Some(Obstacle::DirtyRate | Obstacle::SpeedLimit));
        match self.convergence {
            Convergence::SwitchCopyMode if stuck && self.mode.get() == CopyMode::Background => {
                self.mode.set(CopyMode::WriteBlocking);
            }
            Convergence::ThrottleGuest if stuck => {
                let limit = (outlook.copy_rate as f64 * GUEST_SHARE) as u64;
                self.work.limit_guest(limit.max(self.work.granularity()));
            }
            _ => {}
        }
    }
}

impl Policy for MirrorPolicy {
    fn guest_write(&self, _: Span) -> OnWrite {
        match (self.phase.get(), self.mode.get()) {
            (Phase::Preparing, _) => OnWrite::MarkDirty,
            (Phase::Over, _) => OnWrite::Pass,
            // the client does not wait for a peer that is gone
            _ if self.is_cut_off() => OnWrite::MarkDirty,
            // whoever attached while the client is held: the target must stay equal
            (Phase::Finishing, _) => OnWrite::WriteBoth,
            (_, CopyMode::Background) => OnWrite::MarkDirty,
            _ => OnWrite::WriteBoth,
        }
    }

    fn copy_reads(&self) -> bool {
        !self.is_cut_off()
            && self.mode.get() == CopyMode::ReadWriteBlocking
            && matches!(self.phase.get(), Phase::Copying | Phase::Proving | Phase::Following)
    }

    fn hurries(&self) -> bool {
        self.mode.get() != CopyMode::Background && !self.is_cut_off()
    }

    fn look<'a>(&'a self, source: &'a Edge, at: Span) -> Option<Io<'a, Vec<Extent>>> {
        let base = self.base.as_ref()?;
        Some(Box::pin(chain::held_above(source, at, base)))
    }

    fn fate(&self, extent: &Extent) -> Fate {
        match extent.kind {
            Kind::Data => Fate::Copy,
            // what nobody has above the base is there already
            Kind::Unallocated => Fate::Skip,
            Kind::Zero => Fate::Zero,
        }
    }

    fn compares(&self) -> bool {
        match self.phase.get() {
            Phase::Proving | Phase::Finishing => true,
            Phase::Following => self.wish.get() != Wish::Follow,
            Phase::Preparing | Phase::Copying | Phase::Over => false,
        }
    }

    fn pass_over(&self, s: Standing) -> Next {
        self.converge();
        let proof = self.work.proof();
        let failed = proof.as_ref().is_some_and(|p| p.has_failed());
        let done = match self.phase.get() {
            Phase::Copying => s.clean,
            // all differences are named before the job fails for them
            Phase::Proving => s.clean && proof.is_none_or(|p| p.fresh_bytes() == 0 && p.checks() == 0),
            Phase::Finishing => failed || (s.clean && (s.proven || planted(Bug::UnprovenEnd))),
            Phase::Following if failed => true,
            Phase::Following => {
                let asked = self.wish.get() != Wish::Follow;
                let near = s.dirty + s.copying <= HOLD_AT;
                let patient = self.env.now().saturating_sub(self.asked_at.get()) <= PATIENCE;
                asked && self.rest.is_short(s.stale) && (near || !patient)
            }
            Phase::Preparing | Phase::Over => true,
        };
        if done { Next::Done } else { Next::Again }
    }
}
