//! Changes that were called off: their requests are with the server, or will be in a moment, and nobody waits for them.
//!
//! What can happen: the future of a write is dropped (a job is cancelled, a client goes away) while the server is slow. What
//! was sent cannot be taken back, and NBD gives requests in flight no order, neither on one connection nor among several. What
//! must stay true: the next change begins when all of them have been answered, so that none lands over what came later.
//! A connection that is lost takes its own out of the count: no answer will come, and no protocol tells what became of
//! them (docs/durability.md says what that means).

use env::bugs::planted;
use env::sync::Notify;
use std::cell::Cell;

/// Those of all links of one node.
#[derive(Default)]
pub(super) struct Adrift {
    count: Cell<usize>,
    none: Notify,
}

impl Adrift {
    /// One more was called off.
    pub(super) fn add(&self) {
        self.count.set(self.count.get() + 1);
    }

    /// One of them was answered, or its link is lost.
    pub(super) fn remove(&self) {
        self.count.set(self.count.get() - 1);
        if self.count.get() == 0 {
            self.none.notify_all();
        }
    }

    /// Waits until there is none: before the next change. Reads need not wait, for what they see is as if that came later.
    pub(super) async fn landed(&self) {
        if planted("nbd: what was called off lands over what came later") {
            return;
        }
        while self.count.get() > 0 {
            self.none.wait().await;
        }
    }
}
