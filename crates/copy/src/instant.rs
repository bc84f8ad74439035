//! A disk as of one instant, kept by copying old bytes to a target before they are overwritten for the first time.
//!
//! Each cluster is in one of three states: *only in the source* (its bit in the dirty bitmap of [`Work`] is set), *on the
//! target* (readable, not dirty), or *released* (nobody will read it). What must stay true:
//! * A cluster leaves the first state only under its range lock, and a change of it reaches the source only after it has
//!   left that state.
//! * A reader of the instant who reads the source holds the range lock meanwhile, so that it never sees newer bytes; what
//!   is on the target does not change, so it is read without a lock.
//! * A lock is held only while the source is read and the target is written (and, where the target is an overlay through which
//!   the source is read, until those who read there before have their bytes; they wait for nobody here). Nobody waits for space, for another lock or
//!   at a gate while holding one, so those who wait never wait for one another.
//! * Emptying the record (a checkpoint) happens when no change and no reader is inside the gate and no range is locked.
//! * Once the instant is lost, reading it fails, also where the read began before.

use crate::check::record;
use crate::ranges::{Owner, RangeTicket};
use crate::status::{status, top_layer};
use crate::work::Work;
use bitmap::Bitmap;
use block::{BlockError, Data, ErrorKind, Extent, Io, Kind, ReqFlags, Result, Span};
use drivers::filters::copy_before_write::Keeper;
use env::sync::{Notify, race};
use graph::exclusion::Exclusion;
use graph::gate::{Closed, Gate, Gated};
use graph::{CopyRecord, Edge};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Most that is copied for a change, or read of the source for a reader, under one lock.
const MAX_STEP: u64 = 1 << 20;

/// What becomes of a client's request whose old bytes cannot be copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnSaveError {
    /// It fails (`break-guest-write`).
    #[default]
    FailChange,
    /// It is done, and the instant is lost (`break-snapshot`).
    LoseInstant,
    /// It fails, and so does every later change: what has reached the disk stays a prefix of what
    /// was sent, and the instant stays whole. A checkpoint ends that.
    RefuseAll,
}

/// Writes down what of an instant is on its target, so that it outlives the daemon.
pub trait Ledger {
    /// Whether it is written down that all of `at`, whole clusters, is on the target or not wanted any more (or nothing is
    /// written down any more).
    fn has(&self, at: Span) -> bool;
    /// Writes it down. It is so, and stays so.
    fn note(&self, at: Span) -> Io<'_>;
    /// The instant is lost: what is written down counts no more.
    fn give_up(&self, why: &BlockError) -> Io<'_>;
}

/// How old bytes are kept.
#[derive(Clone, Copy, Debug, Default)]
pub struct KeepRules {
    /// On failure.
    pub on_error: OnSaveError,
    /// A full target is waited for: clients' changes wait until something is released.
    pub wait_when_full: bool,
    /// Most bytes kept on the target, 0: no limit. Beyond it the target counts as full.
    pub most: u64,
    /// Copying for one change may take so long, then it has failed.
    pub timeout: Option<Duration>,
    /// The target stores them compressed.
    pub compressed: bool,
    /// What has been copied is discarded in the source.
    pub discard_source: bool,
    /// A change waits until what was copied for it is on stable storage: the instant survives a crash.
    pub durable: bool,
}

/// See the top of this file.
pub struct PointInTime {
    work: Rc<Work>,
    source: Rc<Edge>,
    target: Rc<Edge>,
    /// What may be read: kept, or still in the source.
    readable: RefCell<Bitmap>,
    rules: KeepRules,
    gate: Gate,
    /// Only what the top layer of the source holds is wanted; the rest is released as soon as it is met.
    top_only: Cell<bool>,
    lost: RefCell<Option<BlockError>>,
    /// Why no change is let through any more ([`OnSaveError::RefuseAll`]).
    refusing: RefCell<Option<BlockError>>,
    over: Cell<bool>,
    /// Those who read the instant through an overlay that the target is.
    readers: RefCell<Option<Rc<Exclusion>>>,
    /// The target has taken something since the instant began.
    took: Cell<bool>,
    released: Notify,
    /// Who empties the target, and is told where a client waits.
    drain: RefCell<Option<Rc<Work>>>,
    ledger: RefCell<Option<Rc<dyn Ledger>>>,
}

/// Counts a guest's request in [`Work::saving`] until it is dropped.
struct Saving<'a>(&'a Work);

impl Saving<'_> {
    fn new(work: &Work) -> Saving<'_> {
        work.saving.set(work.saving.get() + 1);
        Saving(work)
    }
}

impl Drop for Saving<'_> {
    fn drop(&mut self) {
        self.0.saving.set(self.0.saving.get() - 1);
        if self.0.saving.get() == 0 {
            self.0.wake.notify_all();
        }
    }
}

impl Gated for PointInTime {
    fn gate(&self) -> &Gate {
        &self.gate
    }
}

impl PointInTime {
    /// Keeps what is dirty in `work` (which may change until the first request comes) of `source` on `target`.
    pub fn new(work: Rc<Work>, source: Rc<Edge>, target: Rc<Edge>, rules: KeepRules) -> Rc<PointInTime> {
        let readable = RefCell::new(Bitmap::clone(&work.dirty.borrow()));
        Rc::new(PointInTime {
            work,
            source,
            target,
            readable,
            rules,
            gate: Gate::new(),
            top_only: Cell::new(false),
            lost: RefCell::new(None),
            refusing: RefCell::new(None),
            readers: RefCell::new(None),
            took: Cell::new(false),
            over: Cell::new(false),
            released: Notify::new(),
            drain: RefCell::new(None),
            ledger: RefCell::new(None),
        })
    }

    /// What is only in the source, and the locks.
    pub fn work(&self) -> &Rc<Work> {
        &self.work
    }

    /// From now on the instant consists of `bits`, none of which is on the target. Call it when no request is inside.
    pub fn begin(&self, bits: &Bitmap) {
        self.work.begin(bits);
        let mut readable = self.readable.borrow_mut();
        readable.clear_all();
        readable.merge(bits);
    }

    /// From now on the instant is the whole disk. Call it when no request is inside.
    pub fn begin_all(&self) {
        self.work.dirty.borrow_mut().set_all();
        self.readable.borrow_mut().set_all();
    }

    /// From now on the instant is one that an earlier life began: the whole disk, of which the target lacks `left`. Call it
    /// when no request is inside.
    pub fn go_on(&self, left: &Bitmap) {
        self.begin_all();
        let mut dirty = self.work.dirty.borrow_mut();
        dirty.clear_all();
        dirty.merge(left);
    }

    /// From now on changes wait until `ledger` says that their old bytes are kept.
    pub fn written_down_by(&self, ledger: Rc<dyn Ledger>) {
        *self.ledger.borrow_mut() = Some(ledger);
    }

    /// What may be read now.
    pub fn wanted(&self) -> Bitmap {
        self.readable.borrow().clone()
    }

    /// Only what the top layer of the source holds is wanted: what is met from now on and is not in it is released.
    pub fn top_only(&self) {
        self.top_only.set(true);
    }

    /// Releases what the top layer of the source does not hold. Before, [`PointInTime::top_only`] has to be called.
    pub async fn release_lower_layers(&self) -> Result<()> {
        let mut left = Span::new(0, self.work.len());
        while !left.is_empty() {
            let end = self.skip_lower(left).await?;
            left = Span::between(end, left.end());
            self.work.env.yield_now().await;
        }
        Ok(())
    }

    /// Releases clusters of `at` that the top layer says nothing of; how far that is known.
    async fn skip_lower(&self, at: Span) -> Result<u64> {
        let found = top_layer(&self.source, at).await?;
        let end = found.last().map_or(at.start, |e| e.span.end());
        if end <= at.start {
            return Err(BlockError::invalid(format!("no block status of {at}")));
        }
        for e in found.iter().filter(|e| e.kind == Kind::Unallocated) {
            self.work.dirty.borrow_mut().clear(e.span);
            self.readable.borrow_mut().clear(e.span);
        }
        Ok(end)
    }

    /// Names the copy that empties the target: where a client waits because it is full, that copies first.
    pub fn drained_by(&self, drain: &Rc<Work>) {
        *self.drain.borrow_mut() = Some(drain.clone());
    }

    /// The target is an overlay through which `readers` read the source: they and copies keep out of each other's way.
    pub fn exclude(&self, readers: Option<Rc<Exclusion>>) {
        *self.readers.borrow_mut() = readers;
    }

    /// Why changes are refused, if they are.
    pub fn refusing(&self) -> Option<BlockError> {
        self.refusing.borrow().clone()
    }

    /// From now on every change is refused for this reason (the first reason counts).
    pub fn refuse(&self, why: BlockError) {
        self.refusing.borrow_mut().get_or_insert(why);
        self.released.notify_all();
    }

    /// Why the instant is lost, if it is.
    pub fn lost(&self) -> Option<BlockError> {
        self.lost.borrow().clone()
    }

    /// The instant is lost from now on (the first reason counts).
    pub fn lose(&self, why: BlockError) {
        self.lost.borrow_mut().get_or_insert(why);
        self.released.notify_all();
        self.work.wake.notify_all();
        if let Some(drain) = &*self.drain.borrow() {
            drain.wake.notify_all();
        }
    }

    /// Nobody wants the instant any more: changes pass, whoever waits for the target stops waiting, readers fail.
    pub fn end(&self) {
        self.over.set(true);
        self.work.give_up_target();
        self.released.notify_all();
    }

    /// The instant is to outlive the daemon: no change is let through any more, and nobody waits for the target.
    pub fn rest(&self) {
        self.refuse(BlockError::new(ErrorKind::Cancelled, "the daemon is ending"));
        self.work.give_up_target();
    }

    /// Bytes on the target.
    pub fn held(&self) -> u64 {
        let readable = self.readable.borrow().dirty_bytes();
        readable.saturating_sub(self.work.dirty_bytes())
    }

    /// Empties the record: the instant is now, the target holds nothing of it. At that moment no change is on its way and no
    /// reader reads. `empty` is called then; it may not wait (emptying the target itself comes before or after: what is
    /// on it means nothing from then on).
    pub async fn checkpoint(self: &Rc<Self>, empty: impl FnOnce()) {
        let still = self.still().await;
        still.begin_anew();
        empty();
    }

    /// Waits until no change is on its way and no reader reads; none begins before the returned value is dropped.
    pub async fn still(self: &Rc<Self>) -> Still {
        let closed = Closed::close(self.clone()).await;
        let whole = Span::new(0, self.work.len());
        let mut all = self.work.locks.request(whole, Owner::Guest);
        all.held().await;
        Still { of: closed.of().clone(), _closed: closed, _all: all }
    }

    /// The clusters that `at` touches.
    fn clusters(&self, at: Span) -> Span {
        self.work.dirty.borrow().granules_around(at)
    }

    fn step(&self, at: Span) -> Span {
        let g = self.work.granularity();
        let most = MAX_STEP.max(g);
        // ends at a cluster's end, so that no cluster is locked twice
        let cut = (at.start & !(g - 1)) + most;
        Span::between(at.start, at.end().min(cut))
    }

    async fn save_all(&self, at: Span) -> Result<()> {
        self.work.guest_seen(1);
        let mut left = self.clusters(at);
        while !left.is_empty() {
            let now = self.step(left);
            self.save_step(now).await?;
            left = Span::between(now.end(), left.end());
        }
        Ok(())
    }

    /// Keeps trying as the rules say; holds nothing while it waits for space.
    async fn save_step(&self, at: Span) -> Result<()> {
        loop {
            let released = self.released.wait();
            if let Some(why) = self.refusing().filter(|_| !self.over.get()) {
                return Err(why);
            }
            if self.is_settled(at) {
                self.write_down(at).await?;
                self.overwrite(at);
                return Ok(());
            }
            let Err(error) = self.save_in_time(at).await else {
                if self.is_settled(at) {
                    self.write_down(at).await?;
                }
                self.overwrite(at);
                return Ok(());
            };
            if error.kind() == ErrorKind::NoSpace && self.rules.wait_when_full {
                if let Some(drain) = &*self.drain.borrow() {
                    drain.urge(at);
                }
                released.await;
                continue;
            }
            match self.rules.on_error {
                OnSaveError::FailChange => return Err(error.context("copying old data before a write")),
                OnSaveError::RefuseAll => {
                    let error = error.context("copying old data before a write");
                    self.refuse(error.clone());
                    return Err(error);
                }
                OnSaveError::LoseInstant => {
                    self.lose(error);
                    return self.write_down(at).await;
                }
            }
        }
    }

    fn is_written_down(&self, at: Span) -> bool {
        self.ledger.borrow().as_ref().is_none_or(|l| l.has(self.clusters(at)))
    }

    /// Before a change of `at`, whose old bytes are kept or wanted no more, goes on.
    async fn write_down(&self, at: Span) -> Result<()> {
        let ledger = self.ledger.borrow().clone();
        let Some(ledger) = ledger.filter(|_| !self.over.get()) else { return Ok(()) };
        match self.lost() {
            Some(why) => ledger.give_up(&why).await,
            None if self.is_written_down(at) => Ok(()),
            None => ledger.note(self.clusters(at)).await,
        }
    }

    /// The change of `at` goes on: what the target may lose of it the source will not have.
    fn overwrite(&self, at: Span) {
        if let Some(doubt) = self.work.doubt() {
            doubt.overwrite(self.clusters(at));
        }
    }

    async fn save_in_time(&self, at: Span) -> Result<()> {
        let gone = self.work.let_go_wake.wait();
        if self.over.get() {
            return Ok(());
        }
        let saved = race(self.save_locked(at), gone);
        let saved = match self.rules.timeout {
            None => saved.await,
            Some(limit) => {
                let late = self.work.env.sleep(limit);
                race(saved, late)
                    .await
                    .unwrap_or_else(|| Some(Err(BlockError::from_errno(BlockError::ETIMEDOUT))))
            }
        };
        // called off: the old bytes are wanted no more
        saved.unwrap_or(Ok(()))
    }

    async fn save_locked(&self, at: Span) -> Result<()> {
        let mut lock = self.work.locks.request(at, Owner::Guest);
        lock.held().await;
        if self.top_only.get() {
            let mut left = at;
            while !left.is_empty() && !self.is_settled(left) {
                let end = self.skip_lower(left).await?;
                left = Span::between(end, left.end());
            }
        }
        let readers = self.readers.borrow().clone();
        let _alone = match &readers {
            None => None,
            Some(readers) => Some(readers.begin_copy(at).await),
        };
        let areas: Vec<Span> = self.work.dirty.borrow().areas(at, 0).collect();
        let _saving = Saving::new(&self.work);
        for area in &areas {
            self.save_area(*area).await?;
        }
        // the first of an instant in any case: after a crash the target shows that there was one
        if !areas.is_empty() && (self.rules.durable || (!self.took.get() && readers.is_some())) {
            self.keep_durably(&areas).await?;
            self.took.set(true);
        }
        Ok(())
    }

    /// What was copied from `areas` counts as kept only once it is on stable storage.
    async fn keep_durably(&self, areas: &[Span]) -> Result<()> {
        let flushed = self.target.flush().await;
        if flushed.is_err() {
            areas.iter().for_each(|a| self.work.dirty.borrow_mut().set(*a));
        }
        flushed
    }

    async fn save_area(&self, area: Span) -> Result<()> {
        if self.rules.most > 0 && self.held() + area.len > self.rules.most {
            return Err(BlockError::new(ErrorKind::NoSpace, "the buffer is full"));
        }
        let data = self.source.read(area).await?;
        record(&self.work, area, &data).await?;
        let begun = self.work.moment();
        let zero = data.is_zero();
        if zero && self.work.target_is_zero(area) {
            // nothing to do
        } else if zero {
            self.work.target_written(area);
            self.target.zero(area, ReqFlags { may_unmap: true, ..ReqFlags::NONE }).await?;
        } else {
            self.work.target_written(area);
            let flags = ReqFlags { compressed: self.rules.compressed, ..ReqFlags::NONE };
            self.target.write(area.start, data, flags).await?;
        }
        if !self.work.taken(begun, area) {
            return Err(BlockError::new(ErrorKind::Disconnected, "the link to the target was lost"));
        }
        if zero {
            self.work.target_zeroed(area);
        }
        self.work.dirty.borrow_mut().clear(area);
        self.work.done.set(self.work.done.get() + area.len);
        self.work.meter.copied(area.len);
        if self.work.dirty.borrow().is_empty() {
            self.work.wake.notify_all();
        }
        if self.rules.discard_source {
            // the change that waits overwrites it anyway; a failure costs space, nothing else
            let _ = self.source.discard(area).await;
        }
        Ok(())
    }

    fn is_settled(&self, at: Span) -> bool {
        let at = self.clusters(at);
        self.over.get()
            || self.lost.borrow().is_some()
            || (self.work.dirty.borrow().next_area(at, 0).is_none() && !self.work.locks.copy_overlaps(&at))
    }

    /// Whether `at` can be read.
    fn check(&self, at: Span) -> Result<()> {
        let refused = |why: String| Err(BlockError::new(ErrorKind::Permission, why));
        if let Some(e) = &*self.lost.borrow() {
            return refused(format!("the snapshot is lost: {e}"));
        }
        if self.over.get() {
            return refused("the snapshot is gone".to_owned());
        }
        match self.readable.borrow().next_clean(at.start) {
            Some(clean) if clean < at.end() => {
                refused(format!("the snapshot has nothing at {clean} (any more)"))
            }
            _ => Ok(()),
        }
    }

    /// The first bytes of `at` that are in one place, and whether that is the source.
    fn run(&self, at: Span) -> (Span, bool) {
        let dirty = self.work.dirty.borrow();
        let in_source = dirty.get(at.start);
        let end = if in_source { dirty.next_clean(at.start) } else { dirty.next_dirty(at.start) };
        (Span::between(at.start, end.map_or(at.end(), |e| e.min(at.end()))), in_source)
    }

    async fn read_some(&self, at: Span) -> Result<Data> {
        let at = self.step(at);
        let mut lock = None;
        if !self.is_settled(at) {
            let mut ticket = self.work.locks.request(self.clusters(at), Owner::Guest);
            ticket.held().await;
            lock = Some(ticket);
        }
        let (run, in_source) = self.run(at);
        let data = if in_source {
            self.source.read(run).await?
        } else {
            drop(lock.take());
            self.target.read(run).await?
        };
        // Asked now, for all that may have happened meanwhile. While the lock was held nothing was released; and a change
        // may have passed without a lock only if the instant was lost.
        self.check(run)?;
        drop(lock);
        Ok(data)
    }

    async fn read_all(&self, at: Span) -> Result<Data> {
        let _pass = self.gate.enter().await;
        self.check(at)?;
        let mut data = Data::empty();
        let mut left = at;
        while !left.is_empty() {
            let some = self.read_some(left).await?;
            left = Span::between(left.start + some.len() as u64, left.end());
            data.append(some);
        }
        Ok(data)
    }

    async fn status(&self, at: Span) -> Result<Vec<Extent>> {
        let _pass = self.gate.enter().await;
        self.check(Span::new(at.start, 1))?;
        let mut lock = None;
        if !self.is_settled(self.step(at)) {
            let mut ticket = self.work.locks.request(self.clusters(self.step(at)), Owner::Guest);
            ticket.held().await;
            lock = Some(ticket);
        }
        let readable = self.readable.borrow().next_clean(at.start).unwrap_or(at.end());
        let at = Span::between(at.start, at.end().min(readable));
        let at = if lock.is_some() { self.step(at) } else { at };
        let (run, in_source) = self.run(at);
        let found = status(if in_source { &self.source } else { &self.target }, run).await?;
        // what was released meanwhile may have been found to be zero
        self.check(run)?;
        drop(lock);
        Ok(found)
    }

    async fn release_all(&self, at: Span) -> Result<()> {
        let _pass = self.gate.enter().await;
        let inner = self.work.dirty.borrow().granules_within(at);
        if inner.is_empty() {
            return Ok(());
        }
        let mut lock = self.work.locks.request(inner, Owner::Guest);
        lock.held().await;
        let held: Vec<Span> = {
            let (readable, dirty) = (self.readable.borrow(), self.work.dirty.borrow());
            let mut held = Vec::new();
            for area in readable.areas(inner, 0) {
                let mut left = area;
                while !left.is_empty() {
                    let end = dirty.next_dirty(left.start).map_or(left.end(), |d| d.min(left.end()));
                    held.extend(Some(Span::between(left.start, end)).filter(|s| !s.is_empty()));
                    let next = dirty.next_clean(end).map_or(left.end(), |c| c.min(left.end()));
                    left = Span::between(next.max(end), left.end());
                }
            }
            held
        };
        self.readable.borrow_mut().clear(inner);
        self.work.dirty.borrow_mut().clear(inner);
        for span in held {
            self.target.discard(span).await?;
        }
        drop(lock);
        self.released.notify_all();
        Ok(())
    }
}

/// No change is on its way and no reader reads, as long as this value is there.
pub struct Still {
    of: Rc<PointInTime>,
    _closed: Closed<PointInTime>,
    _all: RangeTicket,
}

impl Still {
    /// Empties the record: the instant is now, the target holds nothing of it, and changes are let through again. What is on
    /// the target means nothing from now on.
    pub fn begin_anew(&self) {
        let of = &self.of;
        of.readable.borrow_mut().set_all();
        of.work.dirty.borrow_mut().set_all();
        of.lost.take();
        of.refusing.take();
        of.took.set(false);
        of.released.notify_all();
    }
}

impl Keeper for PointInTime {
    fn gate(&self) -> &Gate {
        &self.gate
    }
    fn is_kept(&self, at: Span) -> bool {
        // of what was copied ahead of clients, too, the source loses what the target may lose yet
        let lost_twice = || {
            let doubt =
                self.work.doubt().filter(|_| !env::bugs::planted("backup: what was copied ahead is certain"));
            doubt.is_some_and(|d| d.has_news_of(self.clusters(at)))
        };
        self.over.get()
            || (self.refusing.borrow().is_none()
                && self.is_settled(at)
                && self.is_written_down(at)
                && !lost_twice())
    }
    fn save(&self, at: Span) -> Io<'_> {
        Box::pin(self.save_all(at))
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(self.read_all(at))
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(self.status(at))
    }
    fn release(&self, at: Span) -> Io<'_> {
        Box::pin(self.release_all(at))
    }
    fn records(&self) -> Vec<CopyRecord> {
        let granularity = self.work.granularity();
        let readable = self.readable.borrow().count();
        let dirty = self.work.dirty.borrow().count();
        let held = readable.saturating_sub(dirty);
        [readable, held, dirty].map(|dirty| CopyRecord { granularity, dirty }).into()
    }
}
