//! Range locks: a background copy and a synchronous guest write of the same bytes exclude one another; what does not
//! overlap runs in parallel.
//!
//! What must stay true: held ranges never overlap; whoever waits is served in order of arrival among those that
//! overlap, so neither the copy nor the guest starves; a lock or a place in the queue is given back on drop.

use crate::bugs::{Bug, planted};
use block::Span;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// On whose behalf a range is locked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// A client's request.
    Guest,
    /// A background copy; `bulk` when it is a large one far from being in sync.
    Copy {
        /// Many granules at once.
        bulk: bool,
    },
}

struct Waiter {
    id: u64,
    at: Span,
    owner: Owner,
    waker: Option<Waker>,
}

#[derive(Default)]
struct Inner {
    next_id: u64,
    /// By start; never overlapping.
    held: BTreeMap<u64, (Span, u64, Owner)>,
    queue: VecDeque<Waiter>,
}

impl Inner {
    fn held_overlap(&self, at: &Span) -> Option<(Span, Owner)> {
        let before = self.held.range(..at.start).next_back().filter(|(_, h)| h.0.overlaps(at));
        before
            .or_else(|| self.held.range(at.start..at.end()).next())
            .map(|(_, (span, _, owner))| (*span, *owner))
    }

    /// Gives waiters what has become free, in order.
    fn grant(&mut self) -> Vec<Waker> {
        let mut woken = Vec::new();
        let mut i = 0;
        while i < self.queue.len() {
            let at = self.queue[i].at;
            let earlier = self.queue.iter().take(i).any(|w| w.at.overlaps(&at));
            if earlier || self.held_overlap(&at).is_some() {
                i += 1;
                continue;
            }
            if let Some(w) = self.queue.remove(i) {
                self.held.insert(at.start, (at, w.id, w.owner));
                woken.extend(w.waker);
            }
        }
        woken
    }
}

/// The locks of one source and target pair.
#[derive(Default)]
pub struct RangeLocks {
    inner: RefCell<Inner>,
}

impl RangeLocks {
    /// Nothing locked.
    pub fn new() -> Rc<RangeLocks> {
        Rc::default()
    }

    /// Asks for `at`. The place in line is taken now; the result is a future that ends once the range is held (at
    /// once if nothing overlaps).
    pub fn request(self: &Rc<RangeLocks>, at: Span, owner: Owner) -> RangeTicket {
        let mut inner = self.inner.borrow_mut();
        let id = inner.next_id;
        inner.next_id += 1;
        if !at.is_empty() && !planted(Bug::NoRangeLock) {
            let wait = inner.held_overlap(&at).is_some() || inner.queue.iter().any(|w| w.at.overlaps(&at));
            if wait {
                inner.queue.push_back(Waiter { id, at, owner, waker: None });
            } else {
                inner.held.insert(at.start, (at, id, owner));
            }
        }
        drop(inner);
        RangeTicket { locks: self.clone(), id, at }
    }

    /// The first range, held or waited for, that overlaps `at`, and whose it is.
    pub fn conflict(&self, at: &Span) -> Option<(Span, Owner)> {
        let inner = self.inner.borrow();
        let queued = inner.queue.iter().filter(|w| w.at.overlaps(at)).map(|w| (w.at, w.owner));
        queued.chain(inner.held_overlap(at)).min_by_key(|(span, _)| span.start)
    }

    /// Whether a large background copy holds, or waits for, some of `at`.
    pub fn bulk_copy_overlaps(&self, at: &Span) -> bool {
        self.overlaps(at, |o| o == Owner::Copy { bulk: true })
    }

    /// Whether a background copy holds, or waits for, some of `at`.
    pub fn copy_overlaps(&self, at: &Span) -> bool {
        self.overlaps(at, |o| matches!(o, Owner::Copy { .. }))
    }

    fn overlaps(&self, at: &Span, whose: impl Fn(Owner) -> bool) -> bool {
        let inner = self.inner.borrow();
        let before = inner.held.range(..at.start).next_back().filter(|(_, h)| h.0.overlaps(at));
        before.into_iter().chain(inner.held.range(at.start..at.end())).any(|(_, h)| whose(h.2))
            || inner.queue.iter().any(|w| whose(w.owner) && w.at.overlaps(at))
    }

    /// Calls `each` with every range that is held, and whose it is.
    pub fn each_held(&self, mut each: impl FnMut(Span, Owner)) {
        self.inner.borrow().held.values().for_each(|h| each(h.0, h.2));
    }

    /// Ranges held and requests waiting.
    pub fn counts(&self) -> (usize, usize) {
        let inner = self.inner.borrow();
        (inner.held.len(), inner.queue.len())
    }
}

/// A place in line, and once awaited, the lock itself: dropping it gives the range to the next.
pub struct RangeTicket {
    locks: Rc<RangeLocks>,
    id: u64,
    at: Span,
}

impl RangeTicket {
    /// Ends when the range is held.
    pub fn held(&mut self) -> impl Future<Output = ()> + '_ {
        Held(self)
    }
}

struct Held<'a>(&'a mut RangeTicket);

impl Future for Held<'_> {
    type Output = ();
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.0.locks.inner.borrow_mut();
        match inner.queue.iter_mut().find(|w| w.id == self.0.id) {
            Some(w) => {
                w.waker = Some(cx.waker().clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }
}

impl Drop for RangeTicket {
    fn drop(&mut self) {
        let woken = {
            let mut inner = self.locks.inner.borrow_mut();
            if inner.held.get(&self.at.start).is_some_and(|h| h.1 == self.id) {
                inner.held.remove(&self.at.start);
            } else {
                inner.queue.retain(|w| w.id != self.id);
            }
            if inner.queue.is_empty() { Vec::new() } else { inner.grant() }
        };
        woken.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn granted(t: &mut RangeTicket) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        std::pin::pin!(t.held()).poll(&mut cx).is_ready()
    }

    #[test]
    fn overlap_waits_in_order_and_the_rest_runs() {
        let l = RangeLocks::new();
        let mut a = l.request(Span::new(0, 100), Owner::Guest);
        let mut b = l.request(Span::new(50, 100), Owner::Copy { bulk: true });
        let mut c = l.request(Span::new(120, 10), Owner::Guest); // overlaps only b, which waits
        let mut d = l.request(Span::new(150, 10), Owner::Guest);
        assert!(granted(&mut a) && granted(&mut d));
        assert!(!granted(&mut b) && !granted(&mut c));
        assert_eq!(l.conflict(&Span::new(60, 1)).map(|c| c.0), Some(Span::new(0, 100)));
        drop(a);
        assert!(granted(&mut b) && !granted(&mut c));
        drop(b);
        assert!(granted(&mut c));
        drop((c, d));
        assert_eq!(l.counts(), (0, 0));
    }

    #[test]
    fn a_waiter_that_leaves_lets_the_next_in() {
        let l = RangeLocks::new();
        let a = l.request(Span::new(0, 10), Owner::Guest);
        let b = l.request(Span::new(5, 20), Owner::Guest);
        let mut c = l.request(Span::new(15, 5), Owner::Guest);
        assert!(!granted(&mut c));
        drop(b);
        assert!(granted(&mut c));
        drop((a, c));
        assert_eq!(l.counts(), (0, 0));
    }

    #[test]
    fn random_histories_never_hold_overlapping_ranges() {
        let mut x: u64 = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7);
        println!("SEED={x}");
        let l = RangeLocks::new();
        let mut live: Vec<RangeTicket> = Vec::new();
        for _ in 0..20_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let r = (x >> 33) as usize;
            if live.len() > 12 || (r.is_multiple_of(3) && !live.is_empty()) {
                live.remove(r % live.len());
            } else {
                live.push(l.request(Span::new((r % 97) as u64, (r / 97 % 31) as u64), Owner::Guest));
            }
            let held: Vec<Span> = l.inner.borrow().held.values().map(|h| h.0).collect();
            assert!(held.windows(2).all(|w| w[0].end() <= w[1].start));
            // nobody waits without a reason
            let inner = l.inner.borrow();
            for (i, w) in inner.queue.iter().enumerate() {
                let earlier = inner.queue.iter().take(i).any(|e| e.at.overlaps(&w.at));
                assert!(earlier || held.iter().any(|h| h.overlaps(&w.at)));
            }
        }
        live.clear();
        assert_eq!(l.counts(), (0, 0));
    }
}
