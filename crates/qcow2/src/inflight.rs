//! Who is at work on what: allocating requests by guest cluster, and epochs by which freed space is held back.
//!
//! * Two requests that change the mapping of one guest cluster run one after the other; all others run side by side. An
//!   overwrite in place changes no mapping and waits for nobody.
//! * A freed cluster may still be read or written by requests that looked the mapping up before. Each request enters the
//!   current *epoch*; what is freed carries the epoch it was freed in and is given back only when every request of that epoch
//!   and of those before has left.
//! * Both are guards: a request that ends in any way, also by being dropped, leaves no trace.

use env::sync::Notify;
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

struct Entry {
    start: u64,
    end: u64,
    ended: Option<Rc<Notify>>,
}

/// Guest clusters whose mapping is being changed.
#[derive(Default)]
pub(crate) struct InFlight {
    list: RefCell<Slab<Entry>>,
}

impl InFlight {
    /// What to wait for if any of the clusters `start..end` is taken; look again after.
    pub(crate) fn conflict(&self, start: u64, end: u64) -> Option<Rc<Notify>> {
        let mut list = self.list.borrow_mut();
        if list.is_empty() {
            return None;
        }
        let (_, e) = list.iter_mut().find(|(_, e)| e.start < end && start < e.end)?;
        Some(e.ended.get_or_insert_with(Default::default).clone())
    }

    /// Takes the clusters `start..end`, which nobody has.
    pub(crate) fn begin(self: &Rc<Self>, start: u64, end: u64) -> Busy {
        debug_assert!(self.conflict(start, end).is_none());
        let id = self.list.borrow_mut().insert(Entry { start, end, ended: None });
        Busy { of: self.clone(), id }
    }

    /// Waits until none of the clusters `start..end` is taken.
    pub(crate) async fn wait(&self, start: u64, end: u64) {
        while let Some(n) = self.conflict(start, end) {
            n.wait().await;
        }
    }
}

/// Clusters taken; given back when dropped.
pub(crate) struct Busy {
    of: Rc<InFlight>,
    id: usize,
}

impl Busy {
    /// Gives the clusters from `end` on back.
    pub(crate) fn shrink(&self, end: u64) {
        let mut list = self.of.list.borrow_mut();
        let e = &mut list[self.id];
        if end < e.end {
            e.end = end;
            if let Some(n) = e.ended.take() {
                drop(list);
                n.notify_all();
            }
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let e = self.of.list.borrow_mut().remove(self.id);
        if let Some(n) = e.ended {
            n.notify_all();
        }
    }
}

/// See the module.
pub(crate) struct Epochs {
    /// Number of the epoch in front.
    first: Cell<u64>,
    /// Requests inside, per epoch; the last is the current one.
    counts: RefCell<VecDeque<u32>>,
}

impl Default for Epochs {
    fn default() -> Epochs {
        Epochs { first: Cell::new(0), counts: RefCell::new(VecDeque::from([0])) }
    }
}

impl Epochs {
    /// A request begins.
    pub(crate) fn enter(&self) -> Ticket<'_> {
        let mut c = self.counts.borrow_mut();
        let epoch = self.first.get() + c.len() as u64 - 1;
        if let Some(n) = c.back_mut() {
            *n += 1;
        }
        Ticket { of: self, epoch }
    }

    /// The current epoch: what is freed now carries it.
    pub(crate) fn current(&self) -> u64 {
        self.first.get() + self.counts.borrow().len() as u64 - 1
    }

    /// Begins a new epoch.
    pub(crate) fn advance(&self) {
        let mut c = self.counts.borrow_mut();
        c.push_back(0);
        self.trim(&mut c);
    }

    /// Whether every request of `epoch` and before has left.
    pub(crate) fn settled(&self, epoch: u64) -> bool {
        epoch < self.first.get() || self.counts.borrow().iter().all(|n| *n == 0)
    }

    fn trim(&self, c: &mut VecDeque<u32>) {
        while c.len() > 1 && c[0] == 0 {
            c.pop_front();
            self.first.set(self.first.get() + 1);
        }
    }
}

/// A request inside an epoch; leaves when dropped.
pub(crate) struct Ticket<'a> {
    of: &'a Epochs,
    epoch: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut c = self.of.counts.borrow_mut();
        let i = (self.epoch - self.of.first.get()) as usize;
        c[i] -= 1;
        if i == 0 {
            self.of.trim(&mut c);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_settles_when_its_requests_and_earlier_ones_left() {
        let e = Epochs::default();
        assert!(e.settled(e.current()));
        let old = e.enter();
        let freed = e.current();
        e.advance();
        let newer = e.enter();
        assert!(!e.settled(freed));
        let freed_later = e.current();
        e.advance();
        drop(newer);
        assert!(!e.settled(freed_later), "an older request may use it, too");
        drop(old);
        assert!(e.settled(freed) && e.settled(freed_later));
    }

    #[test]
    fn overlapping_clusters_conflict_until_dropped() {
        let f = Rc::new(InFlight::default());
        let a = f.begin(4, 8);
        assert!(f.conflict(0, 4).is_none() && f.conflict(8, 9).is_none());
        assert!(f.conflict(7, 9).is_some());
        a.shrink(6);
        assert!(f.conflict(6, 9).is_none() && f.conflict(5, 6).is_some());
        drop(a);
        assert!(f.conflict(0, 99).is_none());
    }
}
