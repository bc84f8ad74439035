//! What is to be sent to a peer: changes as far as it takes them, and what must not wait behind them.

use crate::wire::Frame;
use block::Data;
use env::sync::Notify;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// Bytes that may wait for a peer before the guest waits as well: a second of a fast network.
pub(super) const MAX_QUEUED: u64 = 64 << 20;
/// Bytes handed to the socket at once.
const BATCH: u64 = 1 << 20;

struct Item {
    bytes: Data,
    change: bool,
}

/// The queue of one session.
#[derive(Default)]
pub(super) struct Outgoing {
    items: RefCell<VecDeque<Item>>,
    urgent: RefCell<VecDeque<Data>>,
    queued: Cell<u64>,
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
        self.items.borrow_mut().push_back(Item { bytes, change: frame.body.is_change() });
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
            if next.change && self.used.get() + len > limit {
                break;
            }
            if next.change {
                self.used.set(self.used.get() + len);
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
}
