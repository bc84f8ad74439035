//! What happens to a guest's request while its disk is being copied.
//!
//! See [`Work`](crate::Work) for what must stay true. Three ways through:
//! * *loose*: source only, then the range is marked dirty. Background mode; and in the synchronous modes, before the
//!   copy is in sync, where a large copy of the same bytes is in flight: waiting for it would cost the client
//!   milliseconds and gain nothing, since the disk is not in sync anyway.
//! * *both*: under the range lock, source and target at the same time, once a crash would leave the range marked: else the target
//!   could have what the source has not, and nobody would know. Granules that are dirty and only partly
//!   written stay dirty and are left to the copy; granules wholly written become clean before the target is touched.
//! * *give up*: the copy was called off while this request waited for the target; it ends as soon as the source has it.
//!
//! A failing target never fails a guest's request: the range becomes dirty again and the engine is told.

use crate::bugs::{Bug, planted};
use crate::policy::{Action, Control, OnWrite, Policy, Side};
use crate::proof::{LooseWrite, Proof};
use crate::ranges::Owner;
use crate::work::Work;
use block::{BlockError, Data, Io, Kind, ReqFlags, Result, Span};
use drivers::filters::mirror_top::Tap;
use env::sync::race;
use graph::{CopyRecord, Edge};
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

/// Longest that a guest write is held back at once by the throttling policy, so that a wrong estimate cannot hang a
/// guest.
const MAX_THROTTLE: Duration = Duration::from_millis(500);

/// The tap of one copy.
pub struct CopyTap {
    work: Rc<Work>,
    target: Rc<Edge>,
    policy: Rc<dyn Policy>,
    control: Rc<dyn Control>,
}

/// What a guest asks for, other than reading.
enum Change {
    Write(Data, ReqFlags),
    Zero(ReqFlags),
    Discard,
}

/// Marks a range dirty (or, where nothing is copied, to be compared) when dropped: after the source has the write, whether it
/// worked, failed or was called off.
struct Loose<'a> {
    work: &'a Work,
    at: Span,
    copied: bool,
    /// Until then the range is not compared.
    seen: Option<(Rc<Proof>, LooseWrite)>,
}

impl<'a> Loose<'a> {
    fn new(work: &'a Work, at: Span, copied: bool) -> Loose<'a> {
        work.loose.set(work.loose.get() + 1);
        if planted(Bug::MarkBeforeWrite) {
            work.mark_guest(at);
        }
        let seen = work.proof().map(|p| {
            let write = p.loose_begins(at);
            (p, write)
        });
        Loose { work, at, copied, seen }
    }
}

impl Drop for Loose<'_> {
    fn drop(&mut self) {
        if !self.copied {
            self.work.touch_guest(self.at, false);
        } else if !planted(Bug::MarkBeforeWrite) {
            self.work.mark_guest(self.at);
        }
        if let Some((proof, write)) = &self.seen {
            proof.loose_ended(write);
        }
        self.work.loose.set(self.work.loose.get() - 1);
        if self.work.loose.get() == 0 {
            self.work.wake.notify_all();
        }
    }
}

/// A range that a guest's request brings to the target. Its whole granules are clean in the bitmap meanwhile; it
/// becomes dirty when this is dropped, unless the target is known to have it.
struct Unsure<'a> {
    work: &'a Work,
    at: Span,
    healing: bool,
    settled: bool,
}

impl<'a> Unsure<'a> {
    /// `waits` says that there is an await between this and the clearing of the bits.
    fn new(work: &'a Work, at: Span, waits: bool) -> Unsure<'a> {
        let healing = waits || work.dirty.borrow().next_area(at, 0).is_some();
        if healing {
            work.healing.set(work.healing.get() + 1);
        }
        Unsure { work, at, healing, settled: false }
    }
}

impl Drop for Unsure<'_> {
    fn drop(&mut self) {
        if !self.settled && !planted(Bug::ActiveFailureForgotten) {
            self.work.mark_guest(self.at);
        }
        if self.healing {
            self.work.healing.set(self.work.healing.get() - 1);
            if self.work.healing.get() == 0 {
                self.work.wake.notify_all();
            }
        }
    }
}

/// A client's change of what is copied into itself.
struct Changing<'a>(&'a Work, Span);

impl<'a> Changing<'a> {
    fn new(work: &'a Work, at: Span) -> Changing<'a> {
        work.forget(at);
        Changing(work, at)
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.forget(self.1);
    }
}

impl CopyTap {
    /// A tap that keeps `target` in step as `policy` says, and tells `control` of failures.
    pub fn new(
        work: Rc<Work>,
        target: Rc<Edge>,
        policy: Rc<dyn Policy>,
        control: Rc<dyn Control>,
    ) -> Rc<CopyTap> {
        Rc::new(CopyTap { work, target, policy, control })
    }

    async fn change(&self, source: &Edge, at: Span, change: Change) -> Result<()> {
        if at.is_empty() {
            return apply(source, at, change).await;
        }
        if matches!(change, Change::Discard) && !source.child().options().discard {
            return Ok(()); // ignored by the source: nothing changes
        }
        if !matches!(change, Change::Write(..)) {
            self.work.zeroed.set(self.work.zeroed.get() + 1);
        }
        self.work.guest_seen(1);
        self.throttle().await;
        match self.policy.guest_write(at) {
            OnWrite::Pass => apply(source, at, change).await,
            OnWrite::MarkDirty => self.loose(source, at, change, true).await,
            OnWrite::Compare => self.loose(source, at, change, false).await,
            OnWrite::Exclude => {
                let mut lock = self.work.locks.request(at, Owner::Guest);
                // called off: no copy is running any more
                let _ = self.or_let_go(lock.held()).await;
                // before, and after: what is recorded meanwhile may be either
                let _changing = Changing::new(&self.work, at);
                apply(source, at, change).await
            }
            OnWrite::WriteBoth if self.work.let_go.get() => self.loose(source, at, change, true).await,
            OnWrite::WriteBoth => {
                // a large copy in flight means not in sync: do not wait for it
                if self.work.locks.bulk_copy_overlaps(&at) {
                    self.loose(source, at, change, true).await
                } else {
                    self.both(source, at, change).await
                }
            }
        }
    }

    async fn loose(&self, source: &Edge, at: Span, change: Change, copied: bool) -> Result<()> {
        let _mark = Loose::new(&self.work, at, copied);
        apply(source, at, change).await
    }

    async fn both(&self, source: &Edge, at: Span, change: Change) -> Result<()> {
        let mut lock = self.work.locks.request(at, Owner::Guest);
        if self.or_let_go(lock.held()).await.is_none() {
            drop(lock);
            return self.loose(source, at, change, true).await;
        }
        if !env::bugs::planted("copy: the target before the record") {
            source.expect_change(at).await?;
        }
        let mut unsure = Unsure::new(&self.work, at, matches!(change, Change::Discard));
        self.work.touch_guest(at, true);
        if let Change::Discard = change {
            source.discard(at).await?;
            unsure.settled = self.follow_discard(source, at).await;
            return Ok(());
        }
        let sent = self.sent_to_target(at);
        let cleaned =
            if planted(Bug::PartialGranuleClean) { at.align_out(self.work.granularity()) } else { at };
        {
            let mut dirty = self.work.dirty.borrow_mut();
            dirty.clear(cleaned);
            // what the target does not get now comes with the copy of its granule
            for left_out in [Span::between(at.start, sent.start), Span::between(sent.end(), at.end())] {
                if !left_out.is_empty() && !planted(Bug::PartLeftOut) {
                    dirty.set_changed(left_out);
                }
            }
        }
        let to_target = async {
            if sent.is_empty() {
                return Ok(true);
            }
            let begun = self.work.moment();
            self.work.target_written(sent);
            let piece = match &change {
                Change::Write(data, flags) => {
                    let from = usize::try_from(sent.start - at.start).unwrap_or(usize::MAX);
                    let len = usize::try_from(sent.len).unwrap_or(usize::MAX);
                    Change::Write(data.slice(from, len), *flags)
                }
                Change::Zero(flags) => Change::Zero(ReqFlags { no_fallback: false, ..*flags }),
                Change::Discard => Change::Discard,
            };
            apply(&self.target, sent, piece).await?;
            Ok(self.work.taken(begun, sent))
        };
        let to_source = apply(source, at, change.share());
        let (on_source, on_target) = self.join(to_source, to_target).await;
        match on_target {
            Some(Ok(counts)) => {
                // A failed source write leaves unknown bytes there: then nobody knows whether they are equal.
                unsure.settled = on_source.is_ok() && counts;
                if let Some(proof) = self.work.proof() {
                    proof.wrote_source(at, true);
                }
                self.work.done.set(self.work.done.get() + sent.len);
                self.work.meter.copied(sent.len);
            }
            Some(Err(e)) => self.target_failed(e),
            None => {}
        }
        on_source
    }

    /// What of `at` the target gets now: all but the parts of dirty granules that `at` covers only partly. Empty, and at the end
    /// of `at`, if that is nothing.
    fn sent_to_target(&self, at: Span) -> Span {
        let dirty = self.work.dirty.borrow();
        let edge = |offset: u64| {
            let granule = dirty.granules_around(Span::new(offset, 1));
            let partial = !at.contains(&granule) && !planted(Bug::PartialGranuleClean);
            (partial && dirty.get(offset)).then_some(granule)
        };
        let mut left = at;
        if let Some(head) = edge(at.start) {
            left = Span::between(head.end(), left.end());
        }
        if !left.is_empty()
            && let Some(tail) = edge(at.end() - 1)
        {
            left = Span::between(left.start, tail.start.max(left.start));
        }
        if left.is_empty() { Span::new(at.end(), 0) } else { left }
    }

    /// The guest no longer needs `at`. What the source reads as now may have changed (zeroes) or not (the discard was
    /// ignored): the target follows where it reads as zero, the rest is compared by copying. Whether all is done.
    async fn follow_discard(&self, source: &Edge, at: Span) -> bool {
        // before the look: what another write marks meanwhile must stay marked
        self.work.dirty.borrow_mut().clear(at);
        let Ok(extents) = crate::status::status_all(source, at).await else { return false };
        for e in &extents {
            if e.kind == Kind::Data {
                self.work.mark_guest(e.span);
                continue;
            }
            let flags = ReqFlags { may_unmap: true, ..ReqFlags::NONE };
            self.work.target_written(e.span);
            let begun = self.work.moment();
            match self.or_let_go(self.target.zero(e.span, flags)).await {
                Some(Ok(())) if self.work.taken(begun, e.span) => self.work.target_zeroed(e.span),
                Some(Ok(())) => return false,
                Some(Err(error)) => {
                    self.target_failed(error);
                    return false;
                }
                None => return false,
            }
        }
        true
    }

    async fn read(&self, source: &Edge, at: Span) -> Result<Data> {
        self.work.guest_seen(1);
        if !self.policy.copy_reads() || !self.dirty_inside(at) || self.work.let_go.get() {
            return source.read(at).await;
        }
        let mut lock = self.work.locks.request(at, Owner::Guest);
        if self.or_let_go(lock.held()).await.is_none() {
            drop(lock);
            return source.read(at).await;
        }
        // The bit is cleared before the read, so that a write that comes meanwhile is not lost.
        let areas = self.whole_dirty_areas(at);
        let mut unsure: Vec<Unsure<'_>> = areas
            .iter()
            .map(|a| {
                let unsure = Unsure::new(&self.work, *a, false);
                self.work.dirty.borrow_mut().clear(*a);
                unsure
            })
            .collect();
        let data = source.read(at).await?;
        for (area, unsure) in areas.iter().zip(&mut unsure) {
            let from = usize::try_from(area.start - at.start).unwrap_or(usize::MAX);
            let piece = data.slice(from, usize::try_from(area.len).unwrap_or(usize::MAX));
            self.work.target_written(*area);
            let begun = self.work.moment();
            match self.or_let_go(self.target.write(area.start, piece, ReqFlags::NONE)).await {
                Some(Ok(())) => {
                    unsure.settled = self.work.taken(begun, *area);
                    self.work.done.set(self.work.done.get() + area.len);
                    self.work.meter.copied(area.len);
                }
                Some(Err(e)) => {
                    self.target_failed(e);
                    break;
                }
                None => break,
            }
        }
        drop(unsure);
        Ok(data)
    }

    fn dirty_inside(&self, at: Span) -> bool {
        self.work.dirty.borrow().next_area(at, 0).is_some()
    }

    /// Dirty granules wholly inside `at`, as runs.
    fn whole_dirty_areas(&self, at: Span) -> Vec<Span> {
        let dirty = self.work.dirty.borrow();
        dirty.areas(dirty.granules_within(at), 0).collect()
    }

    fn target_failed(&self, error: BlockError) {
        if self.control.failed(Side::Target, &error) == Action::Report {
            self.work.fail(error);
        }
    }

    /// `fut`'s result, or `None` once the copy is called off.
    async fn or_let_go<T>(&self, fut: impl Future<Output = T>) -> Option<T> {
        let gone = self.work.let_go_wake.wait();
        if self.work.let_go.get() {
            return None;
        }
        race(fut, gone).await
    }

    /// Both at the same time; waiting for the target ends when the copy is called off.
    async fn join<T>(
        &self,
        source: impl Future<Output = Result<()>>,
        target: impl Future<Output = Result<T>>,
    ) -> (Result<()>, Option<Result<T>>) {
        let (mut source, mut target) = (pin!(source), pin!(self.or_let_go(target)));
        let (mut s, mut t) = (None, None);
        std::future::poll_fn(move |cx| {
            if s.is_none()
                && let Poll::Ready(r) = source.as_mut().poll(cx)
            {
                s = Some(r);
            }
            if t.is_none()
                && let Poll::Ready(r) = target.as_mut().poll(cx)
            {
                t = Some(r);
            }
            match (s.take(), t.take()) {
                (Some(a), Some(b)) => Poll::Ready((a, b)),
                (a, b) => {
                    (s, t) = (a, b);
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Holds a guest write back if the user chose to slow the guest below the speed of the copy: until what guests
    /// dirtied before has had its time. What is owed is counted where it becomes dirty (`Work::mark_guest`), in whole
    /// granules: counted in bytes of requests, small scattered writes would make more work than they pay for.
    async fn throttle(&self) {
        if self.work.guest_limit.get() == 0 {
            return;
        }
        let now = self.work.env.now();
        let owed = self.work.guest_owes_until.get().saturating_sub(now);
        if !owed.is_zero() {
            self.work.env.sleep(owed.min(MAX_THROTTLE)).await;
        }
    }
}

impl Change {
    /// The same change for another receiver; bytes are shared, not copied.
    fn share(&self) -> Change {
        match self {
            Change::Write(d, f) => Change::Write(d.clone(), *f),
            Change::Zero(f) => Change::Zero(*f),
            Change::Discard => Change::Discard,
        }
    }
}

async fn apply(edge: &Edge, at: Span, change: Change) -> Result<()> {
    match change {
        Change::Write(data, flags) => edge.write(at.start, data, flags).await,
        Change::Zero(flags) => edge.zero(at, flags).await,
        Change::Discard => edge.discard(at).await,
    }
}

impl Tap for CopyTap {
    fn read<'a>(&'a self, source: &'a Edge, at: Span) -> Io<'a, Data> {
        Box::pin(self.read(source, at))
    }
    fn write<'a>(&'a self, source: &'a Edge, at: Span, data: Data, flags: ReqFlags) -> Io<'a> {
        Box::pin(self.change(source, at, Change::Write(data, flags)))
    }
    fn zero<'a>(&'a self, source: &'a Edge, at: Span, flags: ReqFlags) -> Io<'a> {
        Box::pin(self.change(source, at, Change::Zero(flags)))
    }
    fn discard<'a>(&'a self, source: &'a Edge, at: Span) -> Io<'a> {
        Box::pin(self.change(source, at, Change::Discard))
    }
    fn record(&self) -> CopyRecord {
        CopyRecord { granularity: self.work.granularity(), dirty: self.work.dirty_bytes() }
    }
}
