//! One piece of the copy: take its dirty bits, look at the source, bring it to the target.

use crate::bugs::{Bug, planted};
use crate::check::{record, record_view};
use crate::dirty::ToCopy;
use crate::doubt::{Flushed, Moment};
use crate::outage::{Links, SAMPLE, SAMPLES_PER_FLUSH};
use crate::policy::{Control, Fate, Policy, Side};
use crate::ranges::RangeTicket;
use crate::status::status_some;
use crate::window::{MAX_PIECE, MAX_PIECE_GUEST, OFFLOAD_LEAST};
use crate::work::Work;
use bitmap::Bitmap;
use block::{BlockError, ErrorKind, Extent, Kind, ReqFlags, Span};
use drivers::file::FileNode;
use env::sync::{Queue, Semaphore};
use futures_util::future::join_all;
use graph::{Edge, NodeCell};
use smallvec::SmallVec;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

/// Bytes that may be copied for each request of a guest: copying them takes about as long as the request did.
const SHARE: u64 = 8 << 10;
/// Most for all of them.
const MAX_SHARE: u64 = 256 << 10;
/// If the last turn began longer ago than this, copies waited for something else meanwhile (a link that was lost, a slow target, or
/// there was nothing to copy): what guests did in all that time says nothing of how much this turn must bring over.
const LONG_TURN: Duration = Duration::from_millis(100);

/// What all pieces of an engine need.
pub(crate) struct Shared {
    pub(crate) work: Rc<Work>,
    pub(crate) source: Rc<Edge>,
    pub(crate) target: Rc<Edge>,
    pub(crate) policy: Rc<dyn Policy>,
    pub(crate) control: Rc<dyn Control>,
    /// Whether the host may be able to copy between the two by itself; false once it said that it cannot.
    pub(crate) offload: Cell<bool>,
    /// Copies in flight that are left to the host although a guest is active.
    pub(crate) beside: Cell<u32>,
    /// Whether the target may tell hashes of what it holds; false once it did not.
    pub(crate) tells_hashes: Cell<bool>,
    pub(crate) turns: Turns,
    /// Copies whose turn has not come give way: the job is to rest, or has failed.
    pub(crate) resting: Cell<bool>,
    /// A flush is under way while copies go on.
    pub(crate) flushing: Cell<bool>,
    /// Whose losses are bridged.
    pub(crate) links: Option<Rc<Links>>,
}

/// How much is copied between two looks at what has come from outside: a copy in memory takes the thread as long as dozens of
/// a guest's requests, and many in a row would keep those waiting. One piece; but twice what guests changed since the
/// last turn, or a guest that writes as fast as it can would never be caught up with; and something for each request since then, or
/// guests that ask for much in each turn would leave the copy little of the thread's time.
pub(crate) struct Turns {
    line: Semaphore,
    /// When this turn began.
    begun: Cell<Duration>,
    /// Bytes that may still begin in this turn.
    left: Cell<u64>,
    /// What guests had changed in all at its beginning.
    churned: Cell<u64>,
    /// Their requests so far, likewise.
    requests: Cell<u64>,
}

impl Turns {
    pub(crate) fn new() -> Turns {
        Turns {
            line: Semaphore::new(1),
            begun: Cell::default(),
            left: Cell::new(0),
            churned: Cell::new(0),
            requests: Cell::new(0),
        }
    }

    /// Waits until a copy of `bytes` may begin.
    pub(crate) async fn enter(&self, work: &Work, bytes: u64) {
        let _first = self.line.acquire(1).await;
        if self.left.get() == 0 {
            work.env.next_turn().await;
            let (now, churned, requests) = (work.env.now(), work.churned.get(), work.guest_requests.get());
            let took = now.saturating_sub(self.begun.replace(now));
            let since = churned - self.churned.replace(churned);
            let asked = requests - self.requests.replace(requests);
            self.left.set(room_after(took, since, asked));
        }
        self.left.set(self.left.get().saturating_sub(bytes));
    }
}

/// Bytes that may be copied in a turn after one that took so long, in which guests changed so many bytes in so many requests.
fn room_after(took: Duration, changed: u64, requests: u64) -> u64 {
    if took >= LONG_TURN {
        return MAX_PIECE_GUEST;
    }
    let share = requests.saturating_mul(SHARE).min(MAX_SHARE);
    changed.saturating_mul(2).max(share).max(MAX_PIECE_GUEST)
}

/// How a task of the engine ended.
pub(crate) enum Outcome {
    /// All that was dirty in the piece is on the target.
    Copied,
    /// Nothing was tried: the engine rests. All that was dirty is.
    GaveWay,
    /// Nothing could be said of a piece to be compared: clients were changing it.
    Unclear,
    /// Where both sides are zero in the span that was asked about.
    Zeroes(Span, Vec<Span>),
    /// What had been copied was flushed in passing, or could not be.
    Flushed(Result<(), BlockError>),
    /// A request failed; what was not copied is dirty again.
    Failed(Side, BlockError, Span),
    /// What the source holds in the span that was asked about, from its start.
    Hint(Span, Vec<Extent>),
}

/// An outcome, and how long it took.
pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    pub(crate) took: Duration,
}

/// A copy about to run. Counts as in flight from its making on.
pub(crate) struct PieceTask {
    slot: Slot,
    /// It is one of those that are left to the host beside a guest.
    beside: Option<Beside>,
    at: Span,
    /// The source was found to hold data throughout: no need to ask again.
    data: bool,
    lock: RangeTicket,
    outcomes: Rc<Queue<Ended>>,
}

/// A slot of the window; given back on drop.
struct Slot {
    shared: Rc<Shared>,
    counted: bool,
}

/// Counts in [`Shared::beside`]; no longer on drop.
pub(crate) struct Beside(Rc<Shared>);

impl Beside {
    pub(crate) fn new(shared: &Rc<Shared>) -> Beside {
        shared.beside.set(shared.beside.get() + 1);
        Beside(shared.clone())
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.0.beside.set(self.0.beside.get() - 1);
    }
}

/// A flush of the target while copies go on. Counts as one of them.
pub(crate) struct FlushTask {
    slot: Slot,
    outcomes: Rc<Queue<Ended>>,
}

impl FlushTask {
    /// One that is about to run.
    pub(crate) fn new(shared: Rc<Shared>, outcomes: Rc<Queue<Ended>>) -> FlushTask {
        shared.work.copies.set(shared.work.copies.get() + 1);
        shared.flushing.set(true);
        FlushTask { slot: Slot { shared, counted: true }, outcomes }
    }

    /// Runs it; the outcome goes to the queue.
    pub(crate) async fn run(self) {
        let FlushTask { slot, outcomes } = self;
        let flushed = slot.shared.flush().await;
        slot.shared.flushing.set(false);
        outcomes.push(Ended { outcome: Outcome::Flushed(flushed.map(|_| ())), took: Duration::ZERO });
        drop(slot);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let work = &self.shared.work;
        if self.counted {
            work.copies.set(work.copies.get() - 1);
        }
        if work.copies.get() == 0 {
            work.wake.notify_all();
        }
    }
}

/// A range taken out of the dirty bitmap; what is left of it becomes dirty again on drop.
struct Unfinished<'a> {
    work: &'a Work,
    left: Span,
}

impl<'a> Unfinished<'a> {
    fn new(work: &'a Work, at: Span) -> Unfinished<'a> {
        work.copying.set(work.copying.get() + at.len);
        Unfinished { work, left: at }
    }

    /// The first `bytes` are done.
    fn advance(&mut self, bytes: u64) {
        let work = self.work;
        let (done, left) = self.left.split_at(bytes);
        work.copying.set(work.copying.get() - done.len);
        work.done.set(work.done.get() + done.len);
        work.meter.copied(done.len);
        self.left = left;
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if !self.left.is_empty() {
            self.work.copying.set(self.work.copying.get() - self.left.len);
            if !planted(Bug::FailureForgotten) {
                self.work.mark(self.left);
            }
        }
    }
}

impl PieceTask {
    /// A copy of what is dirty in `at`, once `lock` is held.
    pub(crate) fn new(
        shared: Rc<Shared>,
        at: Span,
        data: bool,
        beside: Option<Beside>,
        lock: RangeTicket,
        outcomes: Rc<Queue<Ended>>,
    ) -> PieceTask {
        let counted = !planted(Bug::SlotCountedLate);
        if counted {
            shared.work.copies.set(shared.work.copies.get() + 1);
        }
        PieceTask { slot: Slot { shared, counted }, beside, at, data, lock, outcomes }
    }

    /// Runs it; the outcome goes to the queue.
    pub(crate) async fn run(self) {
        let PieceTask { mut slot, beside, at, data, mut lock, outcomes } = self;
        let shared = slot.shared.clone();
        lock.held().await;
        if !slot.counted {
            shared.work.copies.set(shared.work.copies.get() + 1);
            slot.counted = true;
        }
        if !(data && shared.offload.get()) {
            let bytes = shared.work.dirty.borrow().to_copy(at).iter().map(ToCopy::bytes).sum();
            shared.turns.enter(&shared.work, bytes).await;
        }
        let begun = shared.work.env.now();
        let outcome = if shared.resting.get() {
            Outcome::GaveWay
        } else {
            match shared.copy_dirty(at, data).await {
                Ok(()) => Outcome::Copied,
                Err((side, error)) => Outcome::Failed(side, error, at),
            }
        };
        drop((lock, beside));
        let took = shared.work.env.now().saturating_sub(begun);
        // the outcome first, then the slot: whoever sees no copies in flight has all their outcomes
        outcomes.push(Ended { outcome, took });
        drop(slot);
    }
}

type Failure = (Side, BlockError);

/// The file that what `node` stores lies in, if it is one of the host's and not one beside it.
fn file_of(mut node: Rc<NodeCell>) -> Option<Rc<dyn env::File>> {
    loop {
        if let Some(file) = node.node().as_any().downcast_ref::<FileNode>() {
            return Some(file.file());
        }
        let below = node.node().primary()?.child();
        node = below;
    }
}

impl Shared {
    /// Whether a copy that is left to the host only shares blocks: nothing that a guest would have to wait for.
    pub(crate) fn shares(&self) -> bool {
        let files = || Some((file_of(self.source.child())?, file_of(self.target.child())?));
        self.offload.get() && files().is_some_and(|(source, target)| source.shares_with(&target))
    }

    async fn copy_dirty(&self, at: Span, data: bool) -> Result<(), Failure> {
        // Another piece or the guest may have cleaned some of it while this one waited for its lock.
        let list = self.work.dirty.borrow().to_copy(at);
        let mut taken: SmallVec<[Unfinished<'_>; 1]> = list
            .iter()
            .map(|granules| {
                if !planted(Bug::ClearAfterRead) {
                    self.work.dirty.borrow_mut().clear(granules.at);
                }
                Unfinished::new(&self.work, granules.at)
            })
            .collect();
        for (unfinished, granules) in taken.iter_mut().zip(&list) {
            if granules.parts.is_empty() {
                self.copy_area(unfinished, data).await?;
                continue;
            }
            // all of them end, also if one fails: none may land after the granule's lock was given back
            let copied = join_all(granules.parts.iter().map(|part| self.copy(*part, false))).await;
            copied.into_iter().collect::<Result<(), Failure>>()?;
            unfinished.advance(granules.at.len);
        }
        Ok(())
    }

    /// Asking a file where its data ends costs time in proportion to that data on some file systems (tmpfs), so it is
    /// asked about large pieces only; of a small one the bytes themselves tell whether they are zero.
    async fn copy_area(&self, unfinished: &mut Unfinished<'_>, data: bool) -> Result<(), Failure> {
        let area = unfinished.left;
        if self.policy.unchanged() && self.work.proof().is_some() {
            record_view(&self.work, &self.source, area).await.map_err(|e| (Side::Source, e))?;
        }
        let look = self.policy.look(&self.source, area);
        // a look at a chain is at its tables; what they hold may be left to the host as what was found ahead may
        let known = match look {
            Some(_) => area.len >= OFFLOAD_LEAST && (!self.work.guest_active() || self.shares()),
            None => data || area.len > MAX_PIECE,
        };
        if let Some(look) = look {
            let extents = look.await.map_err(|e| (Side::Source, e))?;
            return self.copy_extents(unfinished, area, extents, known).await;
        }
        if data || area.len <= MAX_PIECE {
            return self.copy_extents(unfinished, area, vec![Extent::new(area, Kind::Data)], known).await;
        }
        // by one answer at a time: of a vast piece that turned out to be in bits all answers together would not be bounded
        while !unfinished.left.is_empty() {
            let extents = status_some(&self.source, unfinished.left).await.map_err(|e| (Side::Source, e))?;
            self.copy_extents(unfinished, area, extents, known).await?;
        }
        Ok(())
    }

    /// Brings `extents` of `area`, which begin where `unfinished` does, to the target.
    async fn copy_extents(
        &self,
        unfinished: &mut Unfinished<'_>,
        area: Span,
        extents: Vec<Extent>,
        known: bool,
    ) -> Result<(), Failure> {
        for e in extents {
            let mut left = e.span.intersect(&area);
            while !left.is_empty() {
                let fate = self.policy.fate(&e);
                let (step, rest) = left.split_at(if fate == Fate::Copy { MAX_PIECE } else { left.len });
                match fate {
                    Fate::Copy => {
                        if step.start > area.start && !(known && self.offload.get()) {
                            self.turns.enter(&self.work, step.len).await;
                        }
                        self.copy(step, known).await?;
                    }
                    Fate::Zero => self.zero(step).await?,
                    Fate::Skip => {}
                }
                // where the target may lose it again, only once it is flushed
                if self.policy.discard_source() && self.work.doubt().is_none() {
                    // it is on the target: that it may stay on the source costs space, nothing else
                    let _ = self.source.discard(step).await;
                }
                unfinished.advance(step.len);
                left = rest;
            }
        }
        Ok(())
    }

    /// Flushes the target, and does what was waiting for that. Whether all that was copied before is on stable storage;
    /// `false`: a link was lost meanwhile.
    pub(crate) async fn flush(&self) -> Result<bool, BlockError> {
        let Flushed::Certain(settled) = self.work.flush(&self.target).await? else { return Ok(false) };
        let Some(settled) = settled else { return Ok(true) };
        let whole = Span::new(0, settled.len());
        if self.policy.discard_source() {
            for at in settled.areas(whole, 0) {
                // it is on the target: that it may stay on the source costs space, nothing else
                let _ = self.source.discard(at).await;
            }
        }
        if let Some(links) = &self.links {
            links.remember(&self.target, &self.places(&settled)).await;
        }
        Ok(true)
    }

    /// Some places of what has just been flushed that nobody is writing.
    fn places(&self, settled: &Bitmap) -> Vec<u64> {
        let len = settled.len() / SAMPLE * SAMPLE;
        let free = |at: u64| {
            let sample = Span::new(at, SAMPLE).align_out(settled.granularity());
            self.work.locks.conflict(&sample.intersect(&Span::new(0, settled.len()))).is_none()
        };
        let mut places = Vec::new();
        for _ in 0..SAMPLES_PER_FLUSH {
            let from = self.work.env.random() % len.max(1);
            let found = settled.next_dirty(from).or_else(|| settled.next_dirty(0));
            let found = found.map(|at| at / SAMPLE * SAMPLE);
            places.extend(found.filter(|at| at + SAMPLE <= len && free(*at) && !places.contains(at)));
        }
        places
    }

    /// `at` has been written to the target since `begun`: if that does not count, it is dirty again. Whether it does.
    fn taken(&self, begun: Option<Moment>, at: Span) -> bool {
        let counts = self.work.taken(begun, at);
        if !counts {
            self.work.mark(at);
        }
        counts
    }

    /// `known` says that the source holds data there.
    async fn copy(&self, at: Span, known: bool) -> Result<(), Failure> {
        let at = if known && self.offload.get() {
            let (begun, left) = (self.work.moment(), self.offloaded(at).await);
            self.taken(begun, Span::between(at.start, left.start));
            left
        } else {
            at
        };
        if at.is_empty() {
            return Ok(());
        }
        let data = self.source.read(at).await.map_err(|e| (Side::Source, e))?;
        if planted(Bug::ClearAfterRead) {
            self.work.dirty.borrow_mut().clear(at);
        }
        if !self.policy.unchanged() {
            record(&self.work, at, &data).await.map_err(|e| (Side::Source, e))?;
        }
        if !known && data.is_zero() {
            return self.write_zeroes(at).await;
        }
        // one turn for guests between the two halves
        self.work.env.yield_now().await;
        self.work.target_written(at);
        let begun = self.work.moment();
        self.target.write(at.start, data, self.flags()).await.map_err(|e| (Side::Target, e))?;
        self.taken(begun, at);
        Ok(())
    }

    fn flags(&self) -> ReqFlags {
        let (unchanged, compressed) = (self.policy.unchanged(), self.policy.compressed());
        ReqFlags { unchanged, compressed, ..ReqFlags::NONE }
    }

    /// Has the host copy what it can of `at`, from its start; what is left.
    async fn offloaded(&self, at: Span) -> Span {
        self.work.target_written(at);
        let mut left = at;
        while !left.is_empty() {
            match self.source.copy_to(left, &self.target, left.start).await {
                Ok(0) => break,
                Ok(copied) => left = left.split_at(copied).1,
                Err(e) => {
                    // a real failure shows itself again when the bytes pass through here, and then on which side
                    if e.kind() == ErrorKind::Unsupported {
                        self.offload.set(false);
                    }
                    break;
                }
            }
        }
        left
    }

    async fn zero(&self, at: Span) -> Result<(), Failure> {
        let recording = self.work.proof().filter(|p| p.is_recording() && !self.policy.unchanged());
        if let Some(proof) = recording {
            proof.recorded_zero(at);
        }
        self.write_zeroes(at).await
    }

    async fn write_zeroes(&self, at: Span) -> Result<(), Failure> {
        if planted(Bug::ClearAfterRead) {
            self.work.dirty.borrow_mut().clear(at);
        }
        if planted(Bug::ZeroTailSkipped) && at.end() == self.work.len() {
            return Ok(());
        }
        if self.work.target_is_zero(at) {
            return Ok(());
        }
        let flags = ReqFlags { may_unmap: true, compressed: false, ..self.flags() };
        let begun = self.work.moment();
        self.work.target_written(at);
        self.target.zero(at, flags).await.map_err(|e| (Side::Target, e))?;
        if self.taken(begun, at) {
            self.work.target_zeroed(at);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_has_room_for_what_guests_did_in_the_last_one_and_not_in_a_long_wait() {
        let ms = Duration::from_millis;
        assert_eq!(room_after(ms(1), 0, 1), MAX_PIECE_GUEST);
        assert_eq!(room_after(ms(1), 0, 16), 16 * SHARE);
        assert_eq!(room_after(ms(1), 0, u64::MAX), MAX_SHARE, "reads alone do not open it");
        assert_eq!(room_after(ms(1), 1 << 20, 16), 2 << 20, "a guest that writes fast is caught up with");
        assert_eq!(room_after(LONG_TURN, 1 << 40, 1 << 20), MAX_PIECE_GUEST);
    }
}
