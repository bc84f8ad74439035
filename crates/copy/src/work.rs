//! What the engine and the guest's requests share: which bytes are dirty, which are locked, what is in flight.
//!
//! What must stay true (the whole correctness of a mirror is in these lines):
//! * A dirty bit is cleared *before* the source is read for it, and set again before the range lock is given back if
//!   the copy fails or is called off.
//! * A guest write that does not reach the target marks its range dirty *after* the source has it and before the guest
//!   is answered, also when it fails or is called off (it may have changed something). A part of a synchronous write that is left
//!   to the copy of its granule is marked before: its lock keeps that copy away until the source has it.
//! * A guest write that does reach the target holds the range lock from before the source is touched until both have
//!   it, so no copy of older bytes can land after it.
//! * What the target has taken over a link is dirty again if the link is lost before it was flushed: see [`crate::doubt`].
//! * A range counts as synchronous only while nothing is dirty, no copy and no unsynchronous write is in flight, and no
//!   guest request is bringing what was dirty to the target.

use crate::RangeLocks;
use crate::bugs::{Bug, planted};
use crate::dirty::Dirty;
use crate::doubt::{Doubt, Flushed, Moment};
use crate::outage::Links;
use crate::proof::Proof;
use crate::stats::Meter;
use bitmap::Bitmap;
use block::{BlockError, Result, Span};
use env::Env;
use env::sync::{Notify, Wait};
use graph::{Edge, Link};
use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// How long after a guest's last request the guest still counts as active: then copies are kept short.
const GUEST_RECENT: Duration = Duration::from_millis(20);

/// Most that slowed guests can owe, so that a burst, or a limit that was too low for a while, is forgotten soon.
const MAX_DEBT: Duration = Duration::from_secs(2);

/// Shared between one engine and the tap in front of its source.
pub struct Work {
    pub(crate) env: Env,
    pub(crate) dirty: RefCell<Dirty>,
    pub(crate) locks: Rc<RangeLocks>,
    /// Which granules of the target are known to read as zero, if that is known of any.
    pub(crate) target_zero: RefCell<Option<Bitmap>>,
    /// Bytes that guests made to be copied so far; see [`Dirty::set_changed`].
    pub(crate) churned: Cell<u64>,
    /// Bytes taken out of `dirty` and not yet on the target.
    pub(crate) copying: Cell<u64>,
    /// Copies in flight.
    pub(crate) copies: Cell<u32>,
    /// Guest writes in flight that will mark their range dirty.
    pub(crate) loose: Cell<u32>,
    /// Guest requests in flight that bring dirty granules to the target: clean in the bitmap, not yet on the target.
    pub(crate) healing: Cell<u32>,
    /// Guest requests in flight that wait for old bytes to be copied.
    pub(crate) saving: Cell<u32>,
    /// How often a guest zeroed or discarded something.
    pub(crate) zeroed: Cell<u64>,
    /// All that was dirty at the start is data, as long as [`Work::zeroed`] has this value.
    pub(crate) data_of: Cell<Option<u64>>,
    /// Bytes brought to the target.
    pub(crate) done: Cell<u64>,
    /// So many may be, see [`Work::set_ceiling`].
    ceiling: Cell<u64>,
    held_up: Notify,
    /// How far the first pass over the disk has come.
    pub(crate) frontier: Cell<u64>,
    pub(crate) wake: Notify,
    /// Failed synchronous writes, for the engine to act on.
    pub(crate) failure: RefCell<Option<BlockError>>,
    /// Where a client waits for the copy to get to.
    pub(crate) urgent: Cell<Option<u64>>,
    /// A client waits until what was copied is released.
    pub(crate) urged: Cell<bool>,
    /// Ends waits for the target in guest requests: the copy is being called off.
    pub(crate) let_go: Cell<bool>,
    pub(crate) let_go_wake: Notify,
    /// Bytes per second that guest writes are slowed to (0: not).
    pub(crate) guest_limit: Cell<u64>,
    pub(crate) guest_owes_until: Cell<Duration>,
    last_guest: Cell<Duration>,
    /// Requests of guests so far.
    pub(crate) guest_requests: Cell<u64>,
    /// What is known of the equality of the two, where that is asked for.
    proof: RefCell<Option<Rc<Proof>>>,
    /// What the target may lose again, if it is over links.
    doubt: OnceCell<Doubt>,
    /// Whose losses are bridged: told what is written to the target.
    bridged: OnceCell<Rc<Links>>,
    /// Bytes that had to be copied again since links were lost.
    again: Cell<u64>,
    /// Where the copy cannot be completed any more: the target may have lost what the source no longer has.
    gone: Cell<Option<u64>>,
    /// Rates.
    pub(crate) meter: Meter,
}

impl Work {
    /// Alignment in bytes of what is copied where only parts of granules are; see [`Work::keep_parts`].
    pub const PART: u64 = crate::dirty::PART;

    /// For a disk of `len` bytes; nothing is dirty.
    pub fn new(env: Env, len: u64, granularity: u64) -> Result<Rc<Work>> {
        let now = env.now();
        Ok(Rc::new(Work {
            dirty: RefCell::new(Dirty::new(Bitmap::new(len, granularity)?)),
            churned: Cell::new(0),
            env,
            locks: RangeLocks::new(),
            target_zero: RefCell::new(None),
            copying: Cell::new(0),
            copies: Cell::new(0),
            loose: Cell::new(0),
            healing: Cell::new(0),
            saving: Cell::new(0),
            zeroed: Cell::new(0),
            data_of: Cell::new(None),
            done: Cell::new(0),
            ceiling: Cell::new(u64::MAX),
            held_up: Notify::new(),
            frontier: Cell::new(0),
            wake: Notify::new(),
            failure: RefCell::new(None),
            urgent: Cell::new(None),
            urged: Cell::new(false),
            let_go: Cell::new(false),
            let_go_wake: Notify::new(),
            guest_limit: Cell::new(0),
            guest_owes_until: Cell::new(Duration::ZERO),
            last_guest: Cell::new(Duration::ZERO),
            guest_requests: Cell::new(0),
            proof: RefCell::new(None),
            doubt: OnceCell::new(),
            bridged: OnceCell::new(),
            again: Cell::new(0),
            gone: Cell::new(None),
            meter: Meter::new(now),
        }))
    }

    /// Bytes of the disk.
    pub fn len(&self) -> u64 {
        self.dirty.borrow().len()
    }

    /// Whether the disk has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes per dirty bit.
    pub fn granularity(&self) -> u64 {
        self.dirty.borrow().granularity()
    }

    /// From now on what changes is noted in `proof`, and the engine compares what is stale there. Call it before a tap or an
    /// engine runs.
    pub fn set_proof(&self, proof: Rc<Proof>) {
        *self.proof.borrow_mut() = Some(proof);
    }

    /// What is known of the equality of source and target, if that is asked for.
    pub fn proof(&self) -> Option<Rc<Proof>> {
        self.proof.borrow().clone()
    }

    /// `at` changed or may have changed: it is to be compared (again).
    pub(crate) fn touch(&self, at: Span) {
        if let Some(proof) = &*self.proof.borrow() {
            proof.touch(at);
        }
    }

    /// A client changes `at` of what is copied into itself.
    pub(crate) fn forget(&self, at: Span) {
        if let Some(proof) = &*self.proof.borrow() {
            proof.forget(at);
        }
    }

    /// A client changed `at` of the source, or of both.
    pub(crate) fn touch_guest(&self, at: Span, both: bool) {
        let more = self.touched(at, both);
        if more > 0 {
            self.owe(more);
            self.wake.notify_all();
        }
    }

    /// Notes that; bytes that were not stale before.
    fn touched(&self, at: Span, both: bool) -> u64 {
        let Some(proof) = self.proof() else { return 0 };
        if both && planted(Bug::ChangeNotCompared) {
            return 0;
        }
        proof.wrote_source(at, both);
        proof.touch(at)
    }

    /// From now on only what guests changed of a granule is copied once the rest of it is on the target. For a target of
    /// which any part can be written by itself, whatever it holds there. Not where bytes are recorded as they are copied.
    pub fn keep_parts(&self) {
        if !self.proof().is_some_and(|p| p.is_recording()) {
            self.dirty.borrow_mut().keep_parts();
        }
    }

    /// Marks `at` as to be copied.
    pub fn mark(&self, at: Span) {
        self.mark_with(at, |dirty| dirty.set(at));
    }

    fn mark_with<R>(&self, at: Span, set: impl FnOnce(&mut Dirty) -> R) -> R {
        self.touch(at);
        let (clean_before, result) = {
            let mut d = self.dirty.borrow_mut();
            let was = d.is_empty();
            let result = set(&mut d);
            (was && !d.is_empty(), result)
        };
        if clean_before {
            self.wake.notify_all();
        }
        result
    }

    /// Marks what a guest changed; counted for the dirty rate and, where guests are slowed, for what they owe.
    pub(crate) fn mark_guest(&self, at: Span) {
        let before = self.dirty.borrow().count();
        let stale = self.touched(at, false);
        let bytes = self.mark_with(at, |dirty| dirty.set_changed(at));
        self.churned.set(self.churned.get() + bytes);
        let more = self.dirty.borrow().count() - before;
        self.meter.dirtied(more);
        self.owe(more.max(stale));
    }

    /// What a client made to be copied or compared costs it time, where clients are slowed.
    fn owe(&self, more: u64) {
        let limit = self.guest_limit.get();
        if limit != 0 {
            let now = self.env.now();
            let cost = Duration::from_secs_f64(more as f64 / limit as f64);
            let owed = self.guest_owes_until.get().max(now) + cost;
            self.guest_owes_until.set(owed.min(now + MAX_DEBT));
        }
    }

    /// Bytes still to be copied, with what is being copied.
    pub fn remaining(&self) -> u64 {
        self.dirty.borrow().dirty_bytes() + self.copying.get()
    }

    /// Bytes marked dirty now.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.borrow().dirty_bytes()
    }

    /// How much of the disk is behind the copy: all up to where its first pass has come, without what is being copied or
    /// has failed there. Counts what needed no copying.
    pub fn passed(&self) -> u64 {
        let frontier = self.frontier.get();
        let left: u64 = self.dirty.borrow().areas(Span::new(0, frontier), 0).map(|a| a.len).sum();
        frontier.saturating_sub(left + self.copying.get())
    }

    /// Nothing was left to copy behind the last piece.
    pub fn pass_all(&self) {
        self.frontier.set(self.len());
    }

    /// Bytes brought to the target so far.
    pub fn done(&self) -> u64 {
        self.done.get()
    }

    /// Nothing more is copied once [`Work::done`] and what is in flight come to `done` bytes, until this is raised: for whoever has to
    /// make what was copied durable, and must not be left behind. Clients' writes go on.
    pub fn set_ceiling(&self, done: u64) {
        self.ceiling.set(done);
        self.wake.notify_all();
    }

    /// Ends when the copy waits for a higher ceiling.
    pub fn held_up(&self) -> Wait<'_> {
        self.held_up.wait()
    }

    /// Whether the copy has to wait for a higher ceiling; tells so.
    pub(crate) fn is_held_up(&self) -> bool {
        let held = self.done.get().saturating_add(self.copying.get()) >= self.ceiling.get();
        if held {
            self.held_up.notify_all();
        }
        held
    }

    /// Whether source and target are equal but for requests that have not been answered: nothing dirty, nothing being
    /// copied, no guest write under way that will be marked later.
    pub fn in_sync(&self) -> bool {
        let settled = self.loose.get() == 0 && self.healing.get() == 0;
        let idle = self.copies.get() == 0 && self.copying.get() == 0;
        let certain = !self.doubt.get().is_some_and(Doubt::unseen) || planted(Bug::DoubtForgotten);
        self.dirty.borrow().is_empty() && idle && certain && (settled || planted(Bug::SyncedTooEarly))
    }

    /// The target is behind `links`: from now on what it takes is remembered until it is flushed. Only the first call counts.
    pub fn depend_on(&self, links: Vec<Rc<dyn Link>>) -> Result<()> {
        if !links.is_empty() {
            let _only_once = self.doubt.set(Doubt::new(links, self.len(), self.granularity())?);
        }
        Ok(())
    }

    /// Losses of these links are bridged.
    pub fn bridge(&self, links: &Rc<Links>) {
        let _only_once = self.bridged.set(links.clone());
    }

    pub(crate) fn doubt(&self) -> Option<&Doubt> {
        self.doubt.get()
    }

    /// A write to the target begins now.
    pub(crate) fn moment(&self) -> Option<Moment> {
        self.doubt.get().map(Doubt::moment)
    }

    /// The target has answered a write of `at` that began at `begun`. `false`: it does not count, and whoever made it sees
    /// to it that it is dirty again.
    pub(crate) fn taken(&self, begun: Option<Moment>, at: Span) -> bool {
        match (self.doubt.get(), begun) {
            (Some(doubt), Some(begun)) => doubt.taken(begun, at),
            _ => true,
        }
    }

    /// Takes lost links into account: what the target may have lost is dirty again. Bytes that had been clean.
    pub fn notice_losses(&self) -> u64 {
        let Some(doubt) = self.doubt.get().and_then(|d| d.notice(&self.dirty)) else { return 0 };
        // zeroes are in doubt like anything else
        if let Some(z) = self.target_zero.borrow_mut().as_mut() {
            let dirty = self.dirty.borrow();
            dirty.areas(Span::new(0, dirty.len()), 0).for_each(|a| z.clear(a));
        }
        if doubt.gone.is_some() {
            self.gone.set(doubt.gone);
        }
        self.again.set(self.again.get() + doubt.bytes);
        self.wake.notify_all();
        doubt.bytes
    }

    /// How often links to the target have been lost: a flush between whose beginning and answer one was has settled nothing.
    pub fn losses(&self) -> u64 {
        self.doubt.get().map_or(0, Doubt::losses)
    }

    /// Bytes that had to be copied again because links were lost.
    pub fn copied_again(&self) -> u64 {
        self.again.get()
    }

    /// Where the target may have lost what the source no longer has as it was.
    pub fn gone(&self) -> Option<u64> {
        self.gone.get()
    }

    /// The end without a last flush: what is in doubt counts as not copied.
    pub fn doubt_all(&self) {
        if let Some(doubt) = self.doubt.get() {
            doubt.add_to(&mut self.dirty.borrow_mut());
        }
    }

    /// Flushes `target`. One at a time.
    pub(crate) async fn flush(&self, target: &Edge) -> Result<Flushed> {
        let Some(doubt) = self.doubt.get() else {
            target.flush().await?;
            return Ok(Flushed::Certain(None));
        };
        let flush = doubt.flush();
        target.flush().await?;
        Ok(flush.done().map_or(Flushed::LinkLost, |settled| Flushed::Certain(Some(settled))))
    }

    /// Background copies in flight.
    pub fn copies_in_flight(&self) -> u32 {
        self.copies.get()
    }

    /// Rates and totals.
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Makes guest requests that wait for the target stop waiting: from now on the target is given up. Not undone.
    pub fn give_up_target(&self) {
        self.let_go.set(true);
        self.let_go_wake.notify_all();
    }

    /// Slows guest writes to `bytes_per_second` (0: not at all).
    pub fn limit_guest(&self, bytes_per_second: u64) {
        self.guest_limit.set(bytes_per_second);
    }

    /// The limit set by [`Work::limit_guest`].
    pub fn guest_limit(&self) -> u64 {
        self.guest_limit.get()
    }

    /// All of the target is known to read as zero.
    pub fn assume_target_zero(&self) -> Result<()> {
        let mut zero = Bitmap::new(self.len(), self.granularity())?;
        zero.set_all();
        *self.target_zero.borrow_mut() = Some(zero);
        Ok(())
    }

    /// Whether what is dirty is known to be data: it was looked for, and no guest has made zeroes since.
    pub(crate) fn dirty_is_data(&self) -> bool {
        self.data_of.get() == Some(self.zeroed.get())
    }

    pub(crate) fn target_is_zero(&self, at: Span) -> bool {
        let zero = self.target_zero.borrow();
        zero.as_ref().is_some_and(|z| {
            at.end() <= z.len() && z.get(at.start) && z.next_clean(at.start).is_none_or(|c| c >= at.end())
        })
    }

    /// Something other than zeroes may be in `at` of the target from now on.
    pub(crate) fn target_written(&self, at: Span) {
        if let Some(proof) = &*self.proof.borrow() {
            proof.wrote_target(at);
        }
        if let Some(links) = self.bridged.get() {
            links.forget(at);
        }
        if let Some(z) = self.target_zero.borrow_mut().as_mut() {
            let whole = at.align_out(z.granularity());
            z.clear(whole);
        }
    }

    /// `at` of the target has been made zero.
    pub(crate) fn target_zeroed(&self, at: Span) {
        if let Some(proof) = &*self.proof.borrow() {
            proof.wrote_target(at);
        }
        if let Some(z) = self.target_zero.borrow_mut().as_mut() {
            let whole = z.granules_within(at);
            z.set(whole);
        }
    }

    /// From now on `bits` are to be copied, and nothing else.
    pub fn begin(&self, bits: &Bitmap) {
        {
            let mut dirty = self.dirty.borrow_mut();
            dirty.clear_all();
            dirty.merge(bits);
        }
        self.wake.notify_all();
    }

    /// What the target may lack at this instant: what is dirty, and what is being brought to it.
    pub fn unfinished(&self) -> Bitmap {
        let mut all = Bitmap::clone(&self.dirty.borrow());
        self.locks.each_held(|at, _| all.set(at));
        all
    }

    /// A set of marks like that of what is dirty, with all of the disk in it.
    pub fn everything(&self) -> Bitmap {
        let mut all = Bitmap::clone(&self.dirty.borrow());
        all.set_all();
        all
    }

    /// Looks at what is dirty now.
    pub fn with_dirty<R>(&self, look: impl FnOnce(&Bitmap) -> R) -> R {
        look(&self.dirty.borrow())
    }

    /// Ends when something changed that a policy may care about.
    pub fn woken(&self) -> Wait<'_> {
        self.wake.wait()
    }

    /// Pieces being compared.
    pub(crate) fn checks(&self) -> u32 {
        self.proof.borrow().as_ref().map_or(0, |p| p.checks.get())
    }

    /// Waits until no copy and no comparison is in flight: what those that were called off did not copy is dirty again.
    pub async fn settled(&self) {
        while self.copies.get() > 0 || self.checks() > 0 {
            self.wake.wait().await;
        }
    }

    /// A client waits until `at` is copied: it is taken next.
    pub(crate) fn urge(&self, at: Span) {
        self.urgent.set(Some(at.start));
        self.urged.set(true);
        self.wake.notify_all();
    }

    /// Guests made so many requests just now.
    pub(crate) fn guest_seen(&self, requests: u64) {
        self.guest_requests.set(self.guest_requests.get() + requests);
        self.last_guest.set(self.env.now());
    }

    /// Whether a guest made a request just now.
    pub(crate) fn guest_active(&self) -> bool {
        let last = self.last_guest.get();
        last > Duration::ZERO && self.env.now().saturating_sub(last) < GUEST_RECENT
    }

    pub(crate) fn fail(&self, error: BlockError) {
        self.failure.borrow_mut().get_or_insert(error);
        self.wake.notify_all();
    }
}
