//! What waits to be sent to one client: bounded, in order.
//!
//! What can happen: the client reads slowly, or not at all. What must stay true: a reply waits until there is room (so a
//! client that floods us with commands is slowed down by its own unread answers); an event cannot wait, so a client that
//! has let [`LIMIT`] bytes pile up is cut off rather than shown a history with holes.

use block::Data;
use env::Stream;
use env::sync::Notify;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// Bytes that may wait for one client. More than the largest usual reply (query-qmp-schema, 200 KiB) by far; events are
/// about 150 bytes each.
pub(crate) const LIMIT: usize = 16 << 20;

/// Messages for one client.
#[derive(Default)]
pub(crate) struct Outbox {
    waiting: RefCell<VecDeque<Vec<u8>>>,
    bytes: Cell<usize>,
    closed: Cell<bool>,
    changed: Notify,
}

impl Outbox {
    /// Adds a reply once there is room. `false`: nobody will read it.
    pub(crate) async fn reply(&self, message: Vec<u8>) -> bool {
        while self.bytes.get() >= LIMIT && !self.closed.get() {
            self.changed.wait().await;
        }
        self.put(message)
    }

    /// Adds an event. `false`: there is no room, or nobody will read it.
    pub(crate) fn event(&self, message: Vec<u8>) -> bool {
        self.bytes.get() < LIMIT && self.put(message)
    }

    fn put(&self, message: Vec<u8>) -> bool {
        if self.closed.get() {
            return false;
        }
        self.bytes.set(self.bytes.get() + message.len());
        self.waiting.borrow_mut().push_back(message);
        self.changed.notify_all();
        true
    }

    /// What is in it may be sent, nothing more comes.
    pub(crate) fn close(&self) {
        self.closed.set(true);
        self.changed.notify_all();
    }

    /// Sends everything, until closed and empty or the client is gone.
    pub(crate) async fn send_all(&self, stream: &dyn Stream) {
        loop {
            let batch: Data = self.waiting.borrow_mut().drain(..).map(Data::from).collect();
            if batch.is_empty() {
                if self.closed.get() {
                    return;
                }
                self.changed.wait().await;
                continue;
            }
            let sent = batch.len();
            let result = stream.send(batch).await;
            self.bytes.set(self.bytes.get() - sent);
            if result.is_err() {
                self.close();
                self.waiting.borrow_mut().clear();
                return;
            }
            self.changed.notify_all();
        }
    }
}
