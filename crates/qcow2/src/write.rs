//! Guest writes.
//!
//! A write is cut into *steps*, each a run of clusters that are treated alike and lie side by side in the file:
//!
//! * *in place*: the clusters are mapped and nobody shares them. The bytes are written; no metadata changes.
//! * *allocating*: the clusters get new space (or space they have but do not use yet). What the write does not cover is filled
//!   from what the guest reads there now; data and filling go out as one request; only when it has ended is the mapping changed.
//!
//! What must stay true: an allocating step holds its guest clusters in the in-flight list from looking them up until the
//! mapping is changed; a step never waits for another request's clusters while steps of its own request, which hold
//! clusters, have not been run; until the mapping changes nothing of it is visible, and a step that fails or is
//! dropped gives its space back.

use crate::alloc::{HostRun, Landing};
use crate::cache::SlotId;
use crate::core::Core;
use crate::inflight::Busy;
use crate::l1l2::Slice;
use crate::payload::Payload;
use crate::types::{GuestOffset, HostOffset, L2Entry, SUBCLUSTERS, Subcluster, SubclusterBitmap};
use block::{Data, Io, Result, Span};
use env::sync::Notify;
use graph::DebugEvent;
use std::cell::Cell;
use std::rc::Rc;

/// Steps of one request that are kept back before they are run together: bounds memory and what one request has in flight.
const STEPS_AT_ONCE: usize = 32;

/// How a guest cluster (or the part of it that is written) is treated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    /// Write there; nothing else changes.
    InPlace(HostOffset),
    /// The cluster has space of its own that is not (all) used; where it starts.
    Reuse(HostOffset),
    /// It needs new space.
    New,
}

/// A run of clusters treated alike.
struct Run {
    class: Class,
    span: Span,
    /// Taken clusters, unless in place.
    busy: Option<Busy>,
}

/// Why there is no next step yet.
enum Wait {
    For(Rc<Notify>),
    Load(u64, HostOffset),
}

/// Space for an allocating step.
struct Target {
    /// First byte of the first cluster.
    host: HostOffset,
    /// To be given back if the step does not come to its end.
    taken: Option<HostRun>,
    virgin: bool,
}

impl Core {
    /// Writes `data` at `at`, which is inside the disk.
    pub(crate) async fn write(self: &Rc<Self>, at: Span, data: Data) -> Result<()> {
        self.write_payload(at, Payload::Bytes(data)).await
    }

    /// As [`Core::write`]; the bytes may lie in a file.
    pub(crate) async fn write_payload(self: &Rc<Self>, at: Span, data: Payload) -> Result<()> {
        self.check_writable()?;
        let _ticket = self.epochs.enter();
        let mut steps: Vec<Io<'_>> = Vec::new();
        let mut pos = at.start;
        let mut result = Ok(());
        while pos < at.end() && result.is_ok() {
            let rest = Span::between(pos, at.end());
            let run = match self.next_run(rest) {
                Ok(Ok(run)) => run,
                Ok(Err(Wait::For(other))) => {
                    // Whoever has these clusters may be waiting for ours: let ours go first.
                    result = run_all(&mut steps).await;
                    // The other may have ended while ours ran: look whether it is still the one in the way.
                    let c = pos >> self.geo.cluster_bits();
                    if self.inflight.conflict(c, c + 1).is_some_and(|now| Rc::ptr_eq(&now, &other)) {
                        other.wait().await;
                    }
                    continue;
                }
                Ok(Err(Wait::Load(c, from))) => {
                    result = self.load_slice(c, from).await;
                    continue;
                }
                Err(e) => {
                    result = Err(e);
                    break;
                }
            };
            let span = run.span;
            let single = span == rest && steps.is_empty();
            match self.step(run, at.start, &data).await {
                Ok((done, step)) => {
                    pos = done;
                    if single && pos == at.end() {
                        return step.run(self).await;
                    }
                    steps.push(Box::pin(step.run(self)));
                    if steps.len() >= STEPS_AT_ONCE {
                        result = run_all(&mut steps).await;
                    }
                }
                Err(e) => result = Err(e),
            }
        }
        let last = run_all(&mut steps).await;
        result.and(last)
    }

    /// The next run of `at`, from its start, and its clusters taken, without waiting.
    fn next_run(self: &Rc<Self>, at: Span) -> Result<std::result::Result<Run, Wait>> {
        let bits = self.geo.cluster_bits();
        let first = at.start >> bits;
        let slot = match self.slice(first)? {
            Slice::NoTable => None,
            Slice::Here(slot) => Some(slot),
            Slice::Load(from) => return Ok(Err(Wait::Load(first, from))),
        };
        let stop = self.slice_end(first).min(((at.end() - 1) >> bits) + 1);
        let class = self.classify(slot, first, at)?;
        let mut n = 1;
        while first + n < stop {
            let c = first + n;
            let next = self.classify(slot, c, at)?;
            let goes_on = match (class, next) {
                (Class::New, Class::New) => true,
                (Class::Reuse(a), Class::Reuse(b)) => b.0 == a.0 + (n << bits),
                (Class::InPlace(a), Class::InPlace(b)) => b.0 == a.0 + (self.guest_start(c) - at.start),
                _ => false,
            };
            if !goes_on {
                break;
            }
            n += 1;
        }
        let span = Span::between(at.start, at.end().min(self.guest_start(first + n)));
        let mut run = Run { class, span, busy: None };
        if matches!(class, Class::InPlace(_)) {
            return Ok(Ok(run));
        }
        match self.inflight.conflict(first, first + 1) {
            Some(other) => Ok(Err(Wait::For(other))),
            None => {
                // A cluster further on may be taken: then the run ends before it.
                let mut end = first + 1;
                while end < first + n && self.inflight.conflict(end, end + 1).is_none() {
                    end += 1;
                }
                run.span = Span::between(at.start, at.end().min(self.guest_start(end)));
                run.busy = Some(self.inflight.begin(first, end));
                Ok(Ok(run))
            }
        }
    }

    /// How the part of `at` in guest cluster `c` is treated.
    fn classify(self: &Rc<Self>, slot: Option<SlotId>, c: u64, at: Span) -> Result<Class> {
        let Some(slot) = slot else { return Ok(Class::New) };
        let part = at.intersect(&Span::new(self.guest_start(c), self.geo.cluster_size()));
        let inside = self.geo.in_cluster(part.start);
        Ok(match self.entry(slot, c)? {
            L2Entry::Data { host, copied: true } => Class::InPlace(HostOffset(host.0 + inside)),
            L2Entry::Zero { host: Some(host), copied: true } => Class::Reuse(host),
            L2Entry::Subclusters { host: Some(host), copied: true, bits } => {
                let from = self.geo.subcluster_index(GuestOffset(part.start));
                let to = self.geo.subcluster_index(GuestOffset(part.end() - 1)) + 1;
                if (from..to).all(|i| bits.get(i) == Subcluster::Allocated) {
                    Class::InPlace(HostOffset(host.0 + inside))
                } else {
                    Class::Reuse(host)
                }
            }
            _ => Class::New,
        })
    }

    /// Prepares a run: finds space for it. Gives the end of what the step will do, and the step.
    async fn step(self: &Rc<Self>, mut run: Run, base: u64, data: &Payload) -> Result<(u64, Step)> {
        let piece = |span: Span| data.slice(span.start - base, span.len);
        let bits = self.geo.cluster_bits();
        let first = run.span.start >> bits;
        let target = match run.class {
            Class::InPlace(host) => {
                if self.data_file.is_none() {
                    self.check_overlap(host, run.span.len)?;
                }
                return Ok((run.span.end(), Step::InPlace { host, data: piece(run.span) }));
            }
            Class::Reuse(host) => {
                let n = ((run.span.end() - 1) >> bits) + 1 - first;
                if self.data_file.is_none() {
                    self.check_overlap(host, n << bits)?;
                }
                if self.writable_slice_now(first)?.is_none() {
                    self.writable_slice(first).await?;
                }
                Target { host, taken: None, virgin: false }
            }
            Class::New => {
                if self.writable_slice_now(first)?.is_none() {
                    self.writable_slice(first).await?;
                }
                if self.data_file.is_some() {
                    // The data file has each cluster where the guest has it.
                    Target { host: HostOffset(first << bits), taken: None, virgin: false }
                } else {
                    let want = ((run.span.end() - 1) >> bits) + 1 - first;
                    let got = self.alloc_clusters(want).await?;
                    if got.n < want {
                        run.span = Span::between(run.span.start, self.guest_start(first + got.n));
                        if let Some(b) = &run.busy {
                            b.shrink(first + got.n);
                        }
                    }
                    Target { host: self.host_start(got.first)?, taken: Some(got), virgin: got.virgin }
                }
            }
        };
        let data = piece(run.span);
        Ok((
            run.span.end(),
            Step::Allocating {
                run,
                target: Taken { core: self.clone(), target, kept: Cell::new(false) },
                data,
            },
        ))
    }

    /// Writes to the guest's data file, remembering that it may land late if this is dropped.
    pub(crate) fn landing(&self, at: HostOffset, len: u64) -> Landing<'_> {
        Landing::new(&self.space, Span::new(at.0, len))
    }

    async fn write_host(self: &Rc<Self>, at: HostOffset, data: Payload) -> Result<()> {
        let landing = self.landing(at, data.len());
        self.file.tell(DebugEvent::WriteAio);
        let r = match data {
            Payload::Bytes(data) => self.data().write(at.0, data).await,
            Payload::Host(from) => self.data().write_from(at.0, from).await,
        };
        landing.landed();
        r
    }

    /// What the guest reads at `at`, or `None` if nothing need be written there: it is zero, and `virgin` space is zero already.
    async fn filling(self: &Rc<Self>, at: Span, virgin: bool) -> Result<Option<Data>> {
        if at.is_empty() {
            return Ok(None);
        }
        // Behind the end of the disk there is nothing to keep.
        let there = at.intersect(&Span::new(0, self.size.get()));
        if self.is_mapped_zero(there).await? {
            return Ok((!virgin).then(|| Data::zeroes(at.len as usize)));
        }
        self.file.tell(DebugEvent::CowRead);
        let mut data = self.read(there).await?;
        data.append(Data::zeroes((at.len - there.len) as usize));
        Ok((!virgin || !data.is_zero()).then_some(data))
    }

    /// An allocating step: filling, data, then the mapping.
    async fn write_allocating(self: &Rc<Self>, run: &Run, target: &Taken, data: Payload) -> Result<()> {
        let window = self.window(run).await?;
        let (head, tail) =
            (Span::between(window.start, run.span.start), Span::between(run.span.end(), window.end()));
        let virgin = target.target.virgin;
        let (before, after) = if head.is_empty() && tail.is_empty() {
            (None, None)
        } else {
            let (a, b) =
                futures_util::future::join(self.filling(head, virgin), self.filling(tail, virgin)).await;
            (a?, b?)
        };
        let mut start = run.span.start;
        let all = if before.is_none() && after.is_none() {
            data
        } else {
            let mut all = Data::empty();
            if let Some(d) = before {
                start = window.start;
                all.append(d);
            }
            all.append(data.bytes().await?);
            if let Some(d) = after {
                all.append(d);
            }
            Payload::Bytes(all)
        };
        let first = self.guest_start(run.span.start >> self.geo.cluster_bits());
        self.write_host(HostOffset(target.target.host.0 + (start - first)), all).await?;
        self.link(run, window, target).await
    }

    /// The part of the clusters that a step fills: whole clusters, or the subclusters that the write touches.
    async fn window(self: &Rc<Self>, run: &Run) -> Result<Span> {
        let cluster = self.geo.cluster_size();
        if !self.geo.extended_l2() {
            return Ok(run.span.align_out(cluster));
        }
        let mut out = run.span.align_out(self.geo.subcluster_size());
        let bits = self.geo.cluster_bits();
        let (first, last) = (run.span.start >> bits, (run.span.end() - 1) >> bits);
        for c in [first, last] {
            let Some(slot) = self.loaded_slice(c).await? else { continue };
            match self.entry(slot, c)? {
                // What is allocated is not filled: the write goes into it.
                L2Entry::Subclusters { host: Some(_), copied: true, bits } => {
                    if c == first
                        && bits.get(self.geo.subcluster_index(GuestOffset(run.span.start)))
                            == Subcluster::Allocated
                    {
                        out = Span::between(run.span.start, out.end());
                    }
                    let end = run.span.end() - 1;
                    if c == last
                        && bits.get(self.geo.subcluster_index(GuestOffset(end))) == Subcluster::Allocated
                    {
                        out = Span::between(out.start, run.span.end());
                    }
                }
                L2Entry::Unallocated | L2Entry::Subclusters { host: None, .. } => (),
                // The old cluster goes: all that it holds moves.
                _ => {
                    if c == first {
                        out = Span::between(self.guest_start(c), out.end());
                    }
                    if c == last {
                        out = Span::between(out.start, self.guest_start(c) + cluster);
                    }
                }
            }
        }
        Ok(out)
    }

    /// Makes an allocating step visible. What the entries pointed to before is freed.
    async fn link(self: &Rc<Self>, run: &Run, window: Span, target: &Taken) -> Result<()> {
        let bits = self.geo.cluster_bits();
        let (first, last) = (run.span.start >> bits, (run.span.end() - 1) >> bits);
        let slot = match self.writable_slice_now(first)? {
            Some(slot) => slot,
            None => self.writable_slice(first).await?,
        };
        for c in first..=last {
            let old = self.entry(slot, c)?;
            let host = HostOffset(target.target.host.0 + ((c - first) << bits));
            let new = if self.geo.extended_l2() {
                let kept = match old {
                    L2Entry::Subclusters { bits, .. } => bits,
                    _ => SubclusterBitmap::default(),
                };
                let part = window.intersect(&Span::new(self.guest_start(c), self.geo.cluster_size()));
                let from = self.geo.subcluster_index(GuestOffset(part.start));
                let to = self.geo.subcluster_index(GuestOffset(part.end() - 1)) + 1;
                debug_assert!(to <= SUBCLUSTERS);
                let bits = kept.with(from, to, Subcluster::Allocated);
                L2Entry::Subclusters { host: Some(host), copied: true, bits }
            } else {
                L2Entry::Data { host, copied: true }
            };
            self.set_entry(slot, c, new);
            if old.host() != Some(host) || !old.copied() {
                self.free_entry(old, false);
            }
        }
        target.keep();
        self.order.data_before_mapping();
        self.order.crowded_check(self);
        Ok(())
    }

    /// What `old` points to has one reference less.
    pub(crate) fn free_entry(self: &Rc<Self>, old: L2Entry, discard: bool) {
        if self.data_file.is_some() {
            return;
        }
        match old {
            L2Entry::Compressed(c) => self.free_packed(c, discard),
            other => {
                if let Some(h) = other.host() {
                    self.free_clusters(self.geo.host_cluster(h).0, 1, discard);
                }
            }
        }
    }
}

async fn run_all(steps: &mut Vec<Io<'_>>) -> Result<()> {
    let mut result = Ok(());
    for r in futures_util::future::join_all(steps.drain(..)).await {
        result = result.and(r);
    }
    result
}

/// Space that is given back unless the step comes to its end.
struct Taken {
    core: Rc<Core>,
    target: Target,
    kept: Cell<bool>,
}

impl Taken {
    /// The mapping points there now.
    fn keep(&self) {
        self.kept.set(true);
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let (false, Some(run)) = (self.kept.get(), self.target.taken) {
            self.core.give_back(run.first, run.n);
        }
    }
}

/// Something ready to run.
enum Step {
    InPlace { host: HostOffset, data: Payload },
    Allocating { run: Run, target: Taken, data: Payload },
}

impl Step {
    async fn run(self, core: &Rc<Core>) -> Result<()> {
        match self {
            Step::InPlace { host, data } => core.write_host(host, data).await,
            // New space is nobody else's: if this is dropped, the late write hits nothing. In space that the cluster has
            // already, a late write of filling could hit what another request wrote since: that must not be dropped.
            Step::Allocating { run, target, data } if target.target.taken.is_none() => {
                let owner = core.clone();
                let data = Payload::Bytes(data.bytes().await?);
                core.detached("qcow2-reuse", async move { owner.write_allocating(&run, &target, data).await })
                    .await
            }
            Step::Allocating { run, target, data } => core.write_allocating(&run, &target, data).await,
        }
    }
}
