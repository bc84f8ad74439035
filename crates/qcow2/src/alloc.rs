//! Space in the image file: finding it, and giving it back.
//!
//! What must stay true:
//! * A cluster is taken by setting its refcount in memory, in the same step as it is found, so two requests never get the
//!   same one.
//! * A freed cluster keeps its refcount until (1) the change that freed it is behind a barrier, (2) every request that
//!   may have looked its mapping up before has ended, (3) a host discard of it has ended. Only then can it be found again. A
//!   write whose request was dropped may land at any time: clusters it may hit are held back until the image is closed.
//! * A cluster behind everything the file ever held is *virgin*: it reads as zeroes and needs no zeroing.

use crate::cache::SlotId;
use crate::core::Core;
use crate::refcount::Counts;
use crate::types::{Compressed, HostOffset};
use block::{Result, Span};
use env::bugs::planted;
use graph::DebugEvent;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Pending frees (runs of clusters) beyond which writing back begins by itself, so that the list and the file stay bounded
/// under discards without flushes.
const MANY_FREES: usize = 1024;
/// Ranges of dropped writes that are remembered. Beyond that nothing is given back any more until the image is closed.
const MAX_UNSETTLED: usize = 1024;

/// Clusters that were just taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct HostRun {
    /// First cluster.
    pub(crate) first: u64,
    /// How many.
    pub(crate) n: u64,
    /// They read as zeroes.
    pub(crate) virgin: bool,
}

/// Something to give back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Free {
    epoch: u64,
    first: u64,
    n: u64,
    discard: bool,
}

/// The allocator's memory.
#[derive(Default)]
pub(crate) struct Space {
    /// No free cluster is known below this one.
    hint: Cell<u64>,
    /// Clusters from here on were never written.
    virgin_from: Cell<u64>,
    /// Cluster that is being filled with compressed data, and bytes used in it.
    packed: Cell<Option<(u64, u64)>>,
    frees: RefCell<Vec<Free>>,
    unsettled: RefCell<Vec<Span>>,
}

impl Space {
    pub(crate) fn new(file_clusters: u64) -> Space {
        Space { virgin_from: Cell::new(file_clusters), ..Space::default() }
    }

    /// No more compressed data goes into the cluster that has room for some.
    pub(crate) fn close_packed_data(&self) {
        self.packed.set(None);
    }

    /// Clusters were taken by hand.
    pub(crate) fn took(&self, first: u64, n: u64) {
        self.virgin_from.set(self.virgin_from.get().max(first + n));
        if self.hint.get() == first {
            self.hint.set(first + n);
        }
    }

    /// Clusters below `end` may have been written.
    pub(crate) fn touched(&self, end: u64) {
        self.virgin_from.set(self.virgin_from.get().max(end));
    }

    /// End of everything that was ever taken, in clusters.
    pub(crate) fn end(&self) -> u64 {
        self.virgin_from.get()
    }

    /// Looks for free clusters from the start of the file again, and trusts nothing behind `file_clusters` to be zero
    /// before that.
    pub(crate) fn reset(&self, file_clusters: u64) {
        self.hint.set(0);
        self.packed.set(None);
        self.virgin_from.set(file_clusters);
    }

    pub(crate) fn has_many_frees(&self) -> bool {
        self.frees.borrow().len() > MANY_FREES
    }

    fn may_be_hit(&self, at: Span) -> bool {
        let list = self.unsettled.borrow();
        list.len() >= MAX_UNSETTLED || list.iter().any(|s| s.overlaps(&at))
    }
}

/// A write to the file is on its way; if this is dropped before [`Landing::landed`], it may land at any time.
pub(crate) struct Landing<'a> {
    space: &'a Space,
    at: Span,
}

impl<'a> Landing<'a> {
    pub(crate) fn new(space: &'a Space, at: Span) -> Landing<'a> {
        Landing { space, at }
    }
    /// It has ended, well or not.
    pub(crate) fn landed(mut self) {
        self.at.len = 0;
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        if self.at.len > 0 {
            let mut list = self.space.unsettled.borrow_mut();
            if list.len() < MAX_UNSETTLED {
                list.push(self.at);
            }
        }
    }
}

impl Core {
    /// Takes up to `want` adjoining clusters: at least one, perhaps fewer than asked.
    pub(crate) async fn alloc_clusters(self: &Rc<Self>, want: u64) -> Result<HostRun> {
        self.file.tell(DebugEvent::ClusterAlloc);
        loop {
            let c = self.space.hint.get();
            match self.counts(c)? {
                Counts::Here(slot) => match self.free_run(slot, c, want) {
                    Some((first, n)) => return self.take(slot, first, n),
                    None => self.space.hint.set(self.rb_end(c)),
                },
                Counts::Load => self.load_counts(c, false).await?,
                Counts::NoBlock => self.make_block(c).await?,
            }
        }
    }

    fn take(self: &Rc<Self>, slot: SlotId, first: u64, n: u64) -> Result<HostRun> {
        let virgin_from = self.space.virgin_from.get();
        let virgin = first >= virgin_from;
        let n = if virgin { n } else { n.min(virgin_from - first) };
        let at = self.host_start(first)?;
        self.host_start(first + n)?;
        self.check_overlap(at, n << self.geo.cluster_bits())?;
        for c in first..first + n {
            self.set_refcount(slot, c, 1);
        }
        self.space.hint.set(first + n);
        self.space.virgin_from.set(virgin_from.max(first + n));
        self.order.crowded_check(self);
        Ok(HostRun { first, n, virgin })
    }

    /// Takes `len` bytes (at most a cluster) for compressed data.
    pub(crate) async fn alloc_packed(self: &Rc<Self>, len: u64) -> Result<HostOffset> {
        self.file.tell(DebugEvent::ClusterAllocBytes);
        let cluster = self.geo.cluster_size();
        loop {
            let open = self.space.packed.get();
            if let Some((c, used)) = open
                && used < cluster
                && self.share_packed(c, used, len).await?
            {
                return Ok(HostOffset((c << self.geo.cluster_bits()) + used));
            }
            if self.space.packed.get() != open {
                continue;
            }
            // A new cluster. If it adjoins the open one, the data begins there and goes on here.
            let run = self.alloc_clusters(1).await?;
            if let Some((c, used)) = self.space.packed.get()
                && c + 1 == run.first
                && used < cluster
                && used + len > cluster
                && let Counts::Here(slot) = self.counts(c)?
                && self.add_reference(slot, c)
            {
                self.space.packed.set(Some((run.first, used + len - cluster)));
                return Ok(HostOffset((c << self.geo.cluster_bits()) + used));
            }
            self.space.packed.set(Some((run.first, len)));
            return Ok(HostOffset(run.first << self.geo.cluster_bits()));
        }
    }

    /// Puts `len` more bytes into the open cluster `c`, if they fit and its refcount does.
    async fn share_packed(self: &Rc<Self>, c: u64, used: u64, len: u64) -> Result<bool> {
        if used + len > self.geo.cluster_size() {
            return Ok(false);
        }
        loop {
            if self.space.packed.get() != Some((c, used)) {
                return Ok(false);
            }
            match self.counts(c)? {
                Counts::Here(slot) => {
                    let shared = self.add_reference(slot, c);
                    self.space.packed.set(shared.then_some((c, used + len)));
                    return Ok(shared);
                }
                Counts::Load => self.load_counts(c, false).await?,
                Counts::NoBlock => {
                    self.space.packed.set(None);
                    return Ok(false);
                }
            }
        }
    }

    /// One reference more to a cluster in use; `false` if the refcount has no room for it.
    fn add_reference(&self, slot: SlotId, c: u64) -> bool {
        let n = self.refcount(slot, c);
        n > 0 && n < self.geo.refcount_max() && self.set_refcount(slot, c, n + 1)
    }

    /// Gives back clusters that were taken but never became visible. No request uses them but the caller, who is done.
    pub(crate) fn give_back(self: &Rc<Self>, first: u64, n: u64) {
        self.free_clusters(first, n, false);
    }

    /// `n` clusters from `first` on have one reference less, as soon as that is safe. `discard`: the guest discarded them.
    pub(crate) fn free_clusters(self: &Rc<Self>, first: u64, n: u64, discard: bool) {
        self.file.tell(DebugEvent::ClusterFree);
        if n == 0 {
            return;
        }
        let epoch = self.epochs.current();
        let mut frees = self.space.frees.borrow_mut();
        match frees.last_mut() {
            Some(f) if f.epoch == epoch && f.discard == discard && f.first + f.n == first => f.n += n,
            _ => frees.push(Free { epoch, first, n, discard }),
        }
        drop(frees);
        if planted("qcow2: freed cluster reused early") {
            let core = self.clone();
            self.in_background("early release", async move { drop(core.release(usize::MAX, true).await) });
        }
        self.order.crowded_check(self);
    }

    /// The compressed data `at` has one reference less.
    pub(crate) fn free_packed(self: &Rc<Self>, at: Compressed, discard: bool) {
        let bits = self.geo.cluster_bits();
        let (first, last) = (at.at.0 >> bits, (at.at.0 + at.len - 1) >> bits);
        self.free_clusters(first, last - first + 1, discard);
    }

    /// What may be given back once the next barrier is passed: freed before now.
    pub(crate) fn frees_until_now(&self) -> usize {
        self.epochs.advance();
        self.space.frees.borrow().len()
    }

    /// Gives back the first `n` of the list, whose change is now behind a barrier, as far as their requests have ended. With
    /// `closing` no request is left and no write is under way.
    pub(crate) async fn release(self: &Rc<Self>, n: usize, closing: bool) -> Result<()> {
        let bits = self.geo.cluster_bits();
        let ready: Vec<Free> = {
            let mut frees = self.space.frees.borrow_mut();
            let mut i = 0;
            let mut ready = Vec::new();
            frees.retain(|f| {
                let span = Span::new(f.first << bits, f.n << bits);
                let keep =
                    i >= n || !closing && (!self.epochs.settled(f.epoch) || self.space.may_be_hit(span));
                i += 1;
                if !keep {
                    ready.push(*f);
                }
                keep
            });
            ready
        };
        for f in ready {
            self.release_one(f).await?;
        }
        Ok(())
    }

    async fn release_one(self: &Rc<Self>, f: Free) -> Result<()> {
        let bits = self.geo.cluster_bits();
        let pass = {
            let o = self.opts.borrow();
            if f.discard { o.pass_discard_request } else { o.pass_discard_other }
        };
        let mut gone: Option<Span> = None;
        for c in f.first..f.first + f.n {
            let slot = self.loaded_counts(c).await?;
            let Some((slot, n)) = slot.map(|s| (s, self.refcount(s, c))).filter(|(_, n)| *n > 0) else {
                let text = format!("refcount of a cluster in use was 0 (cluster {c:#x})");
                return Err(self.found_corrupt(text, Some(c << bits), Some(1 << bits)));
            };
            if n > 1 || !pass {
                self.drop_reference(slot, c, n);
                continue;
            }
            // The host must have forgotten the bytes before anybody can write there again.
            self.close_packed(c);
            match &mut gone {
                Some(s) if s.end() == c << bits => s.len += 1 << bits,
                _ => {
                    self.discard_then_drop(gone.take()).await?;
                    gone = Some(Span::new(c << bits, 1 << bits));
                }
            }
        }
        self.discard_then_drop(gone).await
    }

    async fn discard_then_drop(self: &Rc<Self>, gone: Option<Span>) -> Result<()> {
        let Some(span) = gone else { return Ok(()) };
        // A host that cannot discard keeps the space; that is all.
        let _kept_on_error = self.file.discard(span).await;
        let bits = self.geo.cluster_bits();
        for c in span.start >> bits..span.end() >> bits {
            if let Some(slot) = self.loaded_counts(c).await? {
                let n = self.refcount(slot, c);
                if n > 0 {
                    self.drop_reference(slot, c, n);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn drop_reference(&self, slot: SlotId, c: u64, n: u64) {
        self.set_refcount(slot, c, n - 1);
        if n == 1 {
            self.space.hint.set(self.space.hint.get().min(c));
            self.close_packed(c);
        }
    }

    /// No more compressed data goes into cluster `c`.
    fn close_packed(&self, c: u64) {
        if self.space.packed.get().is_some_and(|(p, _)| p == c) {
            self.space.packed.set(None);
        }
    }

    pub(crate) async fn loaded_counts(self: &Rc<Self>, c: u64) -> Result<Option<SlotId>> {
        loop {
            match self.counts(c)? {
                Counts::Here(slot) => return Ok(Some(slot)),
                Counts::Load => self.load_counts(c, true).await?,
                Counts::NoBlock => return Ok(None),
            }
        }
    }
}
