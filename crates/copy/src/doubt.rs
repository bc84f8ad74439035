//! What the target has taken and may yet lose.
//!
//! A peer that vanishes may come back without what it had answered and not flushed: a killed server keeps it (it is in its
//! host's page cache), a host that lost power does not, and nobody can tell the two apart. So all that was written to the
//! target since its last flush is *in doubt*, and becomes dirty again when the link to it was lost. What must stay true:
//! * A write counts as taken only if no link was lost between its beginning and its answer; otherwise it is dirty again.
//! * A flush settles what was taken before it began, and only if no link was lost until its answer.
//! * Nobody is told that source and target are equal while a loss has not been taken into account.

use crate::bugs::{Bug, planted};
use crate::dirty::Dirty;
use bitmap::Bitmap;
use block::{Result, Span};
use graph::Link;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// The record of one target, over links.
pub(crate) struct Doubt {
    links: Vec<Rc<dyn Link>>,
    /// Losses that have been taken into account.
    seen: Cell<u64>,
    /// Taken since the last flush began.
    since: RefCell<Bitmap>,
    /// Taken before the flush that is under way began.
    flushing: RefCell<Bitmap>,
    /// What the source no longer has as it was when it was taken.
    overwritten: RefCell<Bitmap>,
}

/// The links as they were when a request began.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Moment(u64);

/// What a flush has brought.
pub(crate) enum Flushed {
    /// All that the target had taken before is on stable storage; of what is remembered, this.
    Certain(Option<Bitmap>),
    /// Nothing: a link was lost meanwhile.
    LinkLost,
}

/// What a loss has put in doubt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct InDoubt {
    /// Bytes to be copied again.
    pub(crate) bytes: u64,
    /// The first place of those that cannot be copied again, since the source has other bytes there by now.
    pub(crate) gone: Option<u64>,
}

impl Doubt {
    /// Nothing is in doubt of a disk of `len` bytes behind `links`.
    pub(crate) fn new(links: Vec<Rc<dyn Link>>, len: u64, granularity: u64) -> Result<Doubt> {
        let map = || Bitmap::new(len, granularity).map(RefCell::new);
        let seen = Cell::new(links.iter().map(|l| l.losses()).sum());
        Ok(Doubt { links, seen, since: map()?, flushing: map()?, overwritten: map()? })
    }

    /// Now.
    pub(crate) fn moment(&self) -> Moment {
        Moment(self.links.iter().map(|l| l.losses()).sum())
    }

    /// How often the links have been lost.
    pub(crate) fn losses(&self) -> u64 {
        self.moment().0
    }

    /// Whether a loss that has not been taken into account has put something in doubt.
    pub(crate) fn unseen(&self) -> bool {
        let certain = self.since.borrow().is_empty() && self.flushing.borrow().is_empty();
        !certain && self.moment() != Moment(self.seen.get())
    }

    /// The target has answered a write of `at` that began at `begun`. Whether it counts.
    pub(crate) fn taken(&self, begun: Moment, at: Span) -> bool {
        let counts = self.moment() == begun;
        if counts && !planted(Bug::DoubtForgotten) {
            self.since.borrow_mut().set(at);
        }
        counts
    }

    /// The source is about to change in `at`, for a copy of what it was before.
    pub(crate) fn overwrite(&self, at: Span) {
        for map in [&self.since, &self.flushing] {
            let map = map.borrow();
            let mut overwritten = self.overwritten.borrow_mut();
            map.areas(at, 0).for_each(|area| overwritten.set(area));
        }
    }

    /// Whether [`Doubt::overwrite`] would tell something new of `at`.
    pub(crate) fn has_news_of(&self, at: Span) -> bool {
        let overwritten = self.overwritten.borrow();
        [&self.since, &self.flushing].into_iter().any(|map| {
            let map = map.borrow();
            map.areas(at, 0).any(|area| overwritten.next_clean(area.start).is_some_and(|c| c < area.end()))
        })
    }

    /// Bytes taken since the last flush began.
    pub(crate) fn unflushed(&self) -> u64 {
        self.since.borrow().dirty_bytes()
    }

    /// All that is in doubt, added to `dirty`.
    pub(crate) fn add_to(&self, dirty: &mut Dirty) {
        dirty.merge(&self.since.borrow());
        dirty.merge(&self.flushing.borrow());
    }

    /// Takes losses into account: what was in doubt goes to `dirty`.
    pub(crate) fn notice(&self, dirty: &RefCell<Dirty>) -> Option<InDoubt> {
        let now = self.moment();
        if now == Moment(self.seen.get()) {
            return None;
        }
        self.seen.set(now.0);
        let mut dirty = dirty.borrow_mut();
        let before = dirty.dirty_bytes();
        self.add_to(&mut dirty);
        self.since.borrow_mut().clear_all();
        self.flushing.borrow_mut().clear_all();
        let gone = self.overwritten.borrow().next_dirty(0);
        self.overwritten.borrow_mut().clear_all();
        Some(InDoubt { bytes: dirty.dirty_bytes() - before, gone })
    }

    /// A flush begins. One at a time.
    pub(crate) fn flush(&self) -> Flush<'_> {
        let taken = self.since.borrow_mut().take();
        self.flushing.borrow_mut().merge(&taken);
        Flush { of: self, begun: self.moment() }
    }
}

/// A flush under way. Dropped without success it has settled nothing.
pub(crate) struct Flush<'a> {
    of: &'a Doubt,
    begun: Moment,
}

impl Flush<'_> {
    /// The target has answered that it is done. What is settled by that; `None`: nothing, a link was lost meanwhile.
    pub(crate) fn done(self) -> Option<Bitmap> {
        let doubt = self.of;
        if doubt.moment() != self.begun || doubt.moment() != Moment(doubt.seen.get()) {
            return None;
        }
        let settled = doubt.flushing.borrow_mut().take();
        let mut overwritten = doubt.overwritten.borrow_mut();
        settled.areas(Span::new(0, settled.len()), 0).for_each(|area| overwritten.clear(area));
        Some(settled)
    }
}

impl Drop for Flush<'_> {
    fn drop(&mut self) {
        let left = self.of.flushing.borrow_mut().take();
        self.of.since.borrow_mut().merge(&left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use env::sync::{Notify, Wait};
    use graph::LinkState;
    use std::any::Any;
    use std::time::Duration;

    #[derive(Default)]
    struct Wire {
        losses: Cell<u64>,
        changed: Notify,
    }

    impl Link for Wire {
        fn losses(&self) -> u64 {
            self.losses.get()
        }
        fn is_up(&self) -> bool {
            true
        }
        fn state(&self) -> LinkState {
            LinkState::Up
        }
        fn changed(&self) -> Wait<'_> {
            self.changed.wait()
        }
        fn attend(self: Rc<Self>, _: Option<Duration>) -> Box<dyn Any> {
            Box::new(())
        }
    }

    const G: u64 = 4096;

    fn made() -> (Rc<Wire>, Doubt, RefCell<Dirty>) {
        let wire = Rc::new(Wire::default());
        let doubt = Doubt::new(vec![wire.clone()], 64 * G, G).unwrap();
        (wire, doubt, RefCell::new(Dirty::new(Bitmap::new(64 * G, G).unwrap())))
    }

    fn lose(wire: &Wire) {
        wire.losses.set(wire.losses.get() + 1);
    }

    fn at(granule: u64) -> Span {
        Span::new(granule * G, G)
    }

    #[test]
    fn what_was_flushed_is_certain_and_the_rest_is_not() {
        let (wire, doubt, dirty) = made();
        assert!(doubt.taken(doubt.moment(), at(1)));
        let flush = doubt.flush();
        assert!(doubt.taken(doubt.moment(), at(2)), "after the flush began");
        assert_eq!(flush.done().unwrap().dirty_bytes(), G);
        assert_eq!(doubt.notice(&dirty), None);
        lose(&wire);
        assert!(doubt.unseen());
        assert_eq!(doubt.notice(&dirty), Some(InDoubt { bytes: G, gone: None }));
        assert!(!dirty.borrow().get(G) && dirty.borrow().get(2 * G));
        assert_eq!(doubt.notice(&dirty), None, "once");
    }

    #[test]
    fn a_loss_takes_writes_and_flushes_under_way_with_it() {
        let (wire, doubt, dirty) = made();
        let begun = doubt.moment();
        doubt.taken(begun, at(1));
        let flush = doubt.flush();
        lose(&wire);
        assert!(flush.done().is_none(), "answered by whom?");
        assert!(!doubt.taken(begun, at(3)), "its writer marks it");
        assert_eq!(doubt.notice(&dirty), Some(InDoubt { bytes: G, gone: None }));
        // a flush that began before the loss and whose loss was noticed meanwhile
        doubt.taken(doubt.moment(), at(5));
        let flush = doubt.flush();
        lose(&wire);
        doubt.notice(&dirty);
        assert!(flush.done().is_none());
        assert!(dirty.borrow().get(5 * G));
    }

    #[test]
    fn a_loss_with_nothing_in_doubt_is_none() {
        let (wire, doubt, dirty) = made();
        doubt.taken(doubt.moment(), at(1));
        assert!(doubt.flush().done().is_some());
        lose(&wire);
        assert!(!doubt.unseen());
        assert!(doubt.flush().done().is_none(), "but who knows by whom that was answered");
        assert_eq!(doubt.notice(&dirty), Some(InDoubt { bytes: 0, gone: None }));
    }

    #[test]
    fn a_failed_flush_settles_nothing() {
        let (wire, doubt, dirty) = made();
        doubt.taken(doubt.moment(), at(1));
        drop(doubt.flush());
        assert_eq!(doubt.unflushed(), G);
        lose(&wire);
        assert_eq!(doubt.notice(&dirty), Some(InDoubt { bytes: G, gone: None }));
    }

    #[test]
    fn what_the_source_has_lost_is_told() {
        let (wire, doubt, dirty) = made();
        doubt.taken(doubt.moment(), at(1));
        assert!(!doubt.has_news_of(at(0)) && doubt.has_news_of(at(1)));
        doubt.overwrite(at(0));
        doubt.overwrite(at(1));
        assert!(!doubt.has_news_of(at(1)));
        assert!(doubt.flush().done().is_some());
        doubt.taken(doubt.moment(), at(2));
        lose(&wire);
        assert_eq!(doubt.notice(&dirty).unwrap().gone, None, "the flush came first");
        doubt.taken(doubt.moment(), at(3));
        let flush = doubt.flush();
        doubt.overwrite(at(3));
        lose(&wire);
        assert!(flush.done().is_none());
        assert_eq!(doubt.notice(&dirty).unwrap().gone, Some(3 * G));
    }
}
