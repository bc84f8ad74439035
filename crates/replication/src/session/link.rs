//! What is to be sent to a peer: changes as far as it takes them, and what must not wait behind them.
//!
//! What can happen: the peer's store is full, and what would make room is a decision about an epoch that it holds. What must stay true: that
//! decision does not wait behind changes of later epochs; decisions keep their order, and none overtakes its epoch's mark.

use crate::types::Epoch;
use crate::wire::{Body, Frame};
use block::Data;
use env::sync::Notify;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// Bytes that may wait for a peer before the guest waits as well: a second of a fast network.
pub(super) const MAX_QUEUED: u64 = 64 << 20;
/// Bytes handed to the socket at once.
const BATCH: u64 = 1 << 20;

/// What may leave before what.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// As far as the peer takes changes.
    Change,
    /// The end of an epoch.
    Mark(Epoch),
    /// What becomes of one.
    Decision(Epoch),
    Other,
}

impl Kind {
    fn of(frame: &Frame) -> Kind {
        match &frame.body {
            body if body.is_change() => Kind::Change,
            Body::Mark { .. } => Kind::Mark(frame.epoch),
            Body::Commit | Body::Abort => Kind::Decision(frame.epoch),
            _ => Kind::Other,
        }
    }
}

struct Item {
    bytes: Data,
    kind: Kind,
}

/// The queue of one session.
#[derive(Default)]
pub(super) struct Outgoing {
    items: RefCell<VecDeque<Item>>,
    urgent: RefCell<VecDeque<Data>>,
    queued: Cell<u64>,
    /// Decisions among them.
    decisions: Cell<usize>,
    /// Bytes of changes handed to the socket.
    used: Cell<u64>,
    closing: Cell<bool>,
    /// Why it was ended from here.
    given_up: RefCell<Option<String>>,
    pub(super) wake: Notify,
    pub(super) drained: Notify,
}

impl Outgoing {
    pub(super) fn push(&self, frame: &Frame) {
        let bytes = frame.encode();
        self.queued.set(self.queued.get() + bytes.len() as u64);
        let kind = Kind::of(frame);
        if matches!(kind, Kind::Decision(_)) {
            self.decisions.set(self.decisions.get() + 1);
        }
        self.items.borrow_mut().push_back(Item { bytes, kind });
        self.wake.notify_all();
    }

    /// Before everything else.
    pub(super) fn push_urgent(&self, frame: &Frame) {
        self.urgent.borrow_mut().push_back(frame.encode());
        self.wake.notify_all();
    }

    pub(super) fn queued(&self) -> u64 {
        self.queued.get()
    }

    /// No more will be pushed; the session ends when everything that may be sent is.
    pub(super) fn close(&self) {
        self.closing.set(true);
        self.wake.notify_all();
    }

    /// It ends now, for this reason.
    pub(super) fn give_up(&self, why: String) {
        *self.given_up.borrow_mut() = Some(why);
        self.close();
    }

    /// Why it was given up, if it was.
    pub(super) fn given_up(&self) -> Option<String> {
        self.given_up.borrow().clone()
    }

    /// Bytes of changes handed to the socket so far.
    pub(super) fn sent(&self) -> u64 {
        self.used.get()
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.get()
    }

    /// What may be sent now, of changes up to `limit` bytes since the session's start; empty if nothing.
    pub(super) fn take(&self, limit: u64) -> Data {
        let mut out: Data = self.urgent.borrow_mut().drain(..).collect();
        let mut items = self.items.borrow_mut();
        let mut taken = 0;
        while taken < BATCH
            && let Some(next) = items.front()
        {
            let len = next.bytes.len() as u64;
            match next.kind {
                Kind::Change if self.used.get() + len > limit => {
                    taken += self.decisions_behind(&mut items, &mut out);
                    break;
                }
                Kind::Change => self.used.set(self.used.get() + len),
                Kind::Decision(_) => self.decisions.set(self.decisions.get() - 1),
                Kind::Mark(_) | Kind::Other => {}
            }
            taken += len;
            if let Some(item) = items.pop_front() {
                out.append(item.bytes);
            }
        }
        self.queued.set(self.queued.get() - taken);
        if taken > 0 {
            self.drained.notify_all();
        }
        out
    }

    /// Whether what is next is a change that the peer does not take, with `limit`.
    pub(super) fn is_held_up(&self, limit: u64) -> bool {
        let items = self.items.borrow();
        items
            .front()
            .is_some_and(|i| i.kind == Kind::Change && self.used.get() + i.bytes.len() as u64 > limit)
    }

    /// Takes out the decisions that wait behind changes, as far as their marks do not; their bytes.
    fn decisions_behind(&self, items: &mut VecDeque<Item>, out: &mut Data) -> u64 {
        let (mut taken, mut at) = (0, 0);
        let mut marks: Vec<Epoch> = Vec::new();
        while self.decisions.get() > 0
            && let Some(item) = items.get(at)
        {
            match item.kind {
                Kind::Decision(epoch) if marks.contains(&epoch) => break,
                Kind::Decision(_) => {
                    if let Some(item) = items.remove(at) {
                        taken += item.bytes.len() as u64;
                        out.append(item.bytes);
                    }
                    self.decisions.set(self.decisions.get() - 1);
                    continue;
                }
                Kind::Mark(epoch) => marks.push(epoch),
                Kind::Change | Kind::Other => {}
            }
            at += 1;
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::types::{Generation, Seq};
    use block::Span;

    fn frame(epoch: u64, body: Body) -> Frame {
        Frame { generation: Generation(1), seq: Seq(0), epoch: Epoch(epoch), body }
    }

    fn kinds(data: &Data) -> Vec<(u64, &'static str)> {
        let mut decoder = crate::wire::Decoder::new();
        decoder.push(data.contiguous());
        let mut out = Vec::new();
        while let Some(f) = decoder.next_frame().unwrap() {
            let name = match f.body {
                Body::Mark { .. } => "mark",
                Body::Commit => "commit",
                Body::Abort => "abort",
                b if b.is_change() => "change",
                _ => "other",
            };
            out.push((f.epoch.0, name));
        }
        out
    }

    /// The peer's store is full of an epoch that it holds: the decision about it is what makes room.
    #[test]
    fn a_decision_does_not_wait_behind_changes_that_nobody_takes() {
        let q = Outgoing::default();
        let change =
            |e| frame(e, Body::Zero { volume: 0, at: Span::new(0, 512), unmap: true, catch_up: false });
        let mark = |e| frame(e, Body::Mark { digest: Digest::default() });
        let all = [
            change(1),
            mark(1),
            change(2),
            frame(1, Body::Commit),
            frame(0, Body::Flush),
            mark(2),
            change(3),
            frame(2, Body::Abort),
            frame(3, Body::Commit),
        ];
        all.iter().for_each(|f| q.push(f));
        let one = change(1).encode().len() as u64;
        // as much as the first change
        assert_eq!(kinds(&q.take(one)), [(1, "change"), (1, "mark"), (1, "commit")]);
        // the second epoch's mark has not left: neither that decision nor what is behind it may
        assert!(q.is_held_up(one));
        assert!(q.take(one).is_empty());
        assert_eq!(
            kinds(&q.take(2 * one)),
            [(2, "change"), (0, "other"), (2, "mark"), (2, "abort"), (3, "commit")]
        );
        assert_eq!(kinds(&q.take(3 * one)), [(3, "change")]);
        assert_eq!((q.queued(), q.decisions.get()), (0, 0));
    }
}
