//! The order in which changes reach the file: the one place that decides it. docs/durability.md is its description and
//! proof; a change here changes that, too.
//!
//! A *commit* takes everything that is dirty in one instant and brings it to the file in steps:
//!
//! 0. new refcount blocks were written whole when they were made: barrier, then the refcount table's sectors;
//! 1. refcounts that went up; barrier. This barrier also covers guest data, copied data and new L2 tables, all of which
//!    were written before the mapping changed in memory;
//! 2. L2 entries and L1 entries; barrier. The guest's flush is done;
//! 3. what those entries no longer point to is given back: host discard, then refcounts go down; no barrier (if lost, space
//!    leaks).
//!
//! So a guest flush costs two barriers if something was allocated, one if only mapped clusters were overwritten or
//! only mappings removed, none if nothing was written; the first one after opening costs one at least, since a process that was killed
//! may have written. Without a power cut the same order of writes holds by
//! itself, since each step begins when the writes of the one before have completed.
//!
//! What must stay true: one commit runs at a time, as a task of its own that no request can drop half done; a step that fails
//! leaves everything it took dirty again; nobody waits for a commit while holding what a commit needs.

use crate::cache::Taken;
use crate::core::Core;
use crate::header::INCOMPAT_DIRTY;
use block::{BlockError, Data, ErrorKind, Result};
use env::bugs::planted;
use env::sync::{OneshotSender, oneshot};
use graph::DebugEvent;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

/// Who waits for commits, and what the next one must do.
#[derive(Default)]
pub(crate) struct Order {
    waiting: RefCell<Vec<OneshotSender<Result<()>>>>,
    running: Cell<bool>,
    /// Something was written that must be durable before a mapping that now is dirty (or refcounts were written without a
    /// barrier since).
    before_mapping: Cell<bool>,
    /// Refcounts need not be written (the image is marked dirty): only when the cache is crowded, or on closing.
    lazy: Cell<bool>,
}

/// A sector of the L1 or refcount table as it was when it was taken. As it was: an entry that is set later points to
/// something that no barrier of this commit covers.
struct Sector {
    number: usize,
    at: u64,
    bytes: Vec<u8>,
}

/// What a commit took.
struct Batch {
    table_sectors: Vec<Sector>,
    counts: Vec<Taken>,
    mappings: Vec<Taken>,
    l1_sectors: Vec<Sector>,
    barrier_before_mapping: bool,
    frees: usize,
}

impl Sector {
    fn of(number: usize, (at, bytes): (u64, Vec<u8>)) -> Sector {
        Sector { number, at, bytes }
    }
}

impl Order {
    /// Guest data, copied data or a table was written that a dirty mapping points to.
    pub(crate) fn data_before_mapping(&self) {
        self.before_mapping.set(true);
    }

    pub(crate) fn set_lazy(&self, lazy: bool) {
        self.lazy.set(lazy);
    }

    /// Begins a commit in the background if much is dirty.
    pub(crate) fn crowded_check(&self, core: &Rc<Core>) {
        if !self.running.get()
            && (core.l2.borrow().is_crowded() || core.rb.borrow().is_crowded() || core.space.has_many_frees())
        {
            core.start_commits(true);
        }
    }
}

impl Core {
    /// Whether a commit would write or wait for anything.
    fn needs_commit(&self) -> bool {
        self.order.running.get()
            || self.file.is_dirty()
            || self.data_file.as_ref().is_some_and(|d| d.is_dirty())
            || self.l2.borrow().is_dirty()
            || !self.l1.borrow().dirty.is_empty()
            || !self.rt.borrow().dirty.is_empty()
            || !self.order.lazy.get() && self.rb.borrow().is_dirty()
    }

    /// Everything that completed before is durable after, and every cached change is in the file.
    pub(crate) async fn commit(self: &Rc<Self>) -> Result<()> {
        let (tx, rx) = oneshot();
        self.order.waiting.borrow_mut().push(tx);
        self.start_commits(false);
        match rx.await {
            Some(r) => r,
            None => Err(BlockError::new(ErrorKind::Cancelled, "the flush was called off")),
        }
    }

    /// A guest's flush.
    pub(crate) async fn flush(self: &Rc<Self>) -> Result<()> {
        if !self.needs_commit() && !self.corrupt.get() {
            return Ok(());
        }
        self.commit().await
    }

    fn start_commits(self: &Rc<Self>, even_if_nobody_waits: bool) {
        if self.order.running.replace(true) {
            return;
        }
        let core = self.clone();
        self.in_background("qcow2-commit", async move {
            let mut once = even_if_nobody_waits;
            loop {
                let waiting = std::mem::take(&mut *core.order.waiting.borrow_mut());
                if waiting.is_empty() && !std::mem::take(&mut once) {
                    break;
                }
                core.commit_once(waiting).await;
            }
            core.order.running.set(false);
        });
    }

    async fn commit_once(self: &Rc<Self>, waiting: Vec<OneshotSender<Result<()>>>) {
        if self.corrupt.get() {
            let e = BlockError::new(
                ErrorKind::Corrupt,
                format!("image '{}' is corrupt; cached changes are not written", self.name()),
            );
            waiting.into_iter().for_each(|w| w.send(Err(e.clone())));
            return;
        }
        let marked = self.mark_dirty_if_lazy().await;
        let batch = self.take_batch();
        let frees = batch.frees;
        let done = match marked {
            Ok(()) => self.bring(&batch).await,
            Err(e) => Err(e),
        };
        self.put_back(&batch, done.is_ok());
        let well = done.is_ok();
        waiting.into_iter().for_each(|w| w.send(done.clone()));
        if well && frees > 0 && self.release(frees, false).await.is_ok() && !self.order.lazy.get() {
            let counts = self.rb.borrow_mut().take_dirty();
            let r = self.write_counts(&counts).await;
            // Written without a barrier: the next mapping that relies on these refcounts needs one before it.
            self.order.before_mapping.set(true);
            counts.iter().for_each(|t| self.rb.borrow_mut().written(t.slot, r.is_ok()));
        }
    }

    /// With lazy refcounts: before the first mapping whose refcounts are not written, the image says that they are stale.
    async fn mark_dirty_if_lazy(self: &Rc<Self>) -> Result<()> {
        if !self.order.lazy.get() || !self.rb.borrow().is_dirty() || self.header.borrow().is_dirty() {
            return Ok(());
        }
        self.header.borrow_mut().incompatible |= INCOMPAT_DIRTY;
        let r = self.write_features().await;
        if r.is_err() {
            self.header.borrow_mut().incompatible &= !INCOMPAT_DIRTY;
        }
        r
    }

    /// Brings the feature words of the header to the file, durably.
    pub(crate) async fn write_features(&self) -> Result<()> {
        let _turn = self.heading.turn(0).await;
        let (at, bytes) = self.header.borrow().patch_features();
        self.file.write(at, Data::copy_from(&bytes)).await?;
        self.file.barrier().await
    }

    /// Everything cached is in the file, nothing is left to give back, refcounts are right. No request is running.
    pub(crate) async fn settle_all(self: &Rc<Self>) -> Result<()> {
        // What dropped requests left behind: tables being made, a file growing, the corrupt mark being written.
        self.background.idle().await;
        if self.corrupt.get() || !self.writable.get() {
            return Ok(());
        }
        let done = self.settle_metadata().await;
        // A commit goes on after its answer.
        self.background.idle().await;
        done
    }

    pub(crate) async fn settle_metadata(self: &Rc<Self>) -> Result<()> {
        self.commit().await?;
        let frees = self.frees_until_now();
        self.release(frees, true).await?;
        self.set_due_flags().await?;
        self.order.set_lazy(false);
        self.commit().await?;
        self.file.trim(self.space.end() << self.geo.cluster_bits()).await?;
        if self.header.borrow().is_dirty() {
            self.header.borrow_mut().incompatible &= !INCOMPAT_DIRTY;
            self.write_features().await?;
        }
        self.barriers().await
    }

    fn take_batch(&self) -> Batch {
        let with_counts = !self.order.lazy.get() || self.rb.borrow().is_crowded();
        let take = |dirty: &mut BTreeSet<usize>| std::mem::take(dirty);
        let table_sectors = {
            let mut rt = self.rt.borrow_mut();
            let numbers = take(&mut rt.dirty);
            numbers.into_iter().map(|n| Sector::of(n, rt.sector(n))).collect()
        };
        let l1_sectors = {
            let mut l1 = self.l1.borrow_mut();
            let numbers = take(&mut l1.dirty);
            numbers.into_iter().map(|n| Sector::of(n, l1.sector(n))).collect()
        };
        Batch {
            frees: self.frees_until_now(),
            table_sectors,
            counts: if with_counts { self.rb.borrow_mut().take_dirty() } else { Vec::new() },
            mappings: self.l2.borrow_mut().take_dirty(),
            l1_sectors,
            barrier_before_mapping: self.order.before_mapping.take(),
        }
    }

    /// Ends the writing of a batch; if it failed, all of it is dirty again.
    fn put_back(&self, batch: &Batch, well: bool) {
        batch.counts.iter().for_each(|t| self.rb.borrow_mut().written(t.slot, well));
        batch.mappings.iter().for_each(|t| self.l2.borrow_mut().written(t.slot, well));
        if !well {
            self.rt.borrow_mut().dirty.extend(batch.table_sectors.iter().map(|s| s.number));
            self.l1.borrow_mut().dirty.extend(batch.l1_sectors.iter().map(|s| s.number));
            self.order.before_mapping.set(true);
        }
    }

    async fn bring(self: &Rc<Self>, b: &Batch) -> Result<()> {
        if !b.table_sectors.is_empty() {
            self.barriers().await?;
            self.write_sectors(&b.table_sectors, DebugEvent::RefblockAllocHookup).await?;
        }
        if planted("qcow2: mapping before refcounts") {
            self.write_slices(&b.mappings, DebugEvent::L2Update, |key| self.slice_target(key)).await?;
            self.write_sectors(&b.l1_sectors, DebugEvent::L1Update).await?;
            self.barriers().await?;
        }
        self.write_counts(&b.counts).await?;
        if !b.mappings.is_empty() || !b.l1_sectors.is_empty() {
            let wanted = b.barrier_before_mapping || !b.counts.is_empty() || !b.table_sectors.is_empty();
            if wanted && !planted("qcow2: no barrier before the mapping") {
                self.barriers().await?;
            }
            self.write_slices(&b.mappings, DebugEvent::L2Update, |key| self.slice_target(key)).await?;
            self.write_sectors(&b.l1_sectors, DebugEvent::L1Update).await?;
        }
        if planted("qcow2: flush without its barrier") {
            return Ok(());
        }
        self.barriers().await
    }

    /// Barriers on both files, side by side, where something was written.
    pub(crate) async fn barriers(&self) -> Result<()> {
        let Some(data) = self.data_file.as_ref().filter(|d| d.is_dirty()) else {
            return self.file.barrier().await;
        };
        let (a, b) = futures_util::future::join(self.file.barrier(), data.barrier()).await;
        a.and(b)
    }

    /// Lets the header point at another table, durably. If that fails, `old` is put back, and nothing has changed; if that fails
    /// as well, nobody knows which of the two tables the file has, so nothing may be written to either: the image counts as
    /// corrupt.
    pub(crate) async fn point_header(
        self: &Rc<Self>,
        new: (u64, [u8; 12]),
        old: (u64, [u8; 12]),
    ) -> Result<()> {
        let _turn = self.heading.turn(0).await;
        let Err(e) = self.write_header(new).await else { return Ok(()) };
        match self.write_header(old).await {
            Ok(()) => Err(e.context(format_args!("image '{}': writing the header", self.name()))),
            Err(_) => {
                Err(self.found_corrupt(format!("the header could not be written: {e}"), Some(0), Some(512)))
            }
        }
    }

    async fn write_header(&self, (at, bytes): (u64, [u8; 12])) -> Result<()> {
        self.file.write(at, Data::copy_from(&bytes)).await?;
        self.file.barrier().await
    }

    async fn write_sectors(&self, sectors: &[Sector], event: DebugEvent) -> Result<()> {
        for s in sectors {
            self.file.tell(event);
            self.file.write(s.at, Data::copy_from(&s.bytes)).await?;
        }
        Ok(())
    }

    async fn write_counts(&self, counts: &[Taken]) -> Result<()> {
        self.write_slices(counts, DebugEvent::RefblockUpdatePart, |key| self.rb_target(key)).await
    }

    /// Writes slices, neighbours in one request.
    async fn write_slices(
        &self,
        slices: &[Taken],
        event: DebugEvent,
        target: impl Fn(u64) -> Option<crate::types::HostOffset>,
    ) -> Result<()> {
        let mut pending: Option<(u64, Data)> = None;
        for t in slices {
            let Some(at) = target(t.key) else {
                return Err(BlockError::corrupt(format!("a dirty slice ({:#x}) has no table", t.key)));
            };
            let data = Data::copy_from(&t.bytes);
            self.file.tell(event);
            match &mut pending {
                Some((start, d)) if *start + d.len() as u64 == at.0 => d.append(data),
                _ => {
                    if let Some((start, d)) = pending.replace((at.0, data)) {
                        self.file.write(start, d).await?;
                    }
                }
            }
        }
        match pending {
            Some((start, d)) => self.file.write(start, d).await,
            None => Ok(()),
        }
    }
}
