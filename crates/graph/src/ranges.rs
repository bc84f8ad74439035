//! Range locks of a node: requests that must not overlap wait for one another, others run in parallel.
//!
//! Used where a request is more than it seems: an unaligned write is read-modify-write of whole blocks, so it excludes
//! every other write to these blocks. What must stay true: overlapping requests are served in the order they came (no
//! starvation either way); a request that does not overlap never waits; a dropped waiter or holder leaves no trace.

use block::Span;
use env::sync::Notify;
use std::cell::{Cell, RefCell};

#[derive(Clone, Copy)]
struct Claim {
    ticket: u64,
    span: Span,
    exclusive: bool,
}

/// Locks over ranges of one node.
#[derive(Default)]
pub struct RangeLocks {
    /// Holders and waiters, in order of arrival.
    claims: RefCell<Vec<Claim>>,
    next: Cell<u64>,
    released: Notify,
}

impl RangeLocks {
    /// No range is locked.
    pub const fn new() -> RangeLocks {
        RangeLocks { claims: RefCell::new(Vec::new()), next: Cell::new(0), released: Notify::new() }
    }

    /// Locks `span`: shared with other shared locks, or exclusively. Waits for every overlapping earlier claim.
    pub async fn lock(&self, span: Span, exclusive: bool) -> RangeLock<'_> {
        let ticket = self.next.get();
        self.next.set(ticket + 1);
        self.claims.borrow_mut().push(Claim { ticket, span, exclusive });
        let lock = RangeLock { of: self, ticket };
        while self.must_wait(ticket, &span, exclusive) {
            self.released.wait().await;
        }
        lock
    }

    fn must_wait(&self, ticket: u64, span: &Span, exclusive: bool) -> bool {
        let claims = self.claims.borrow();
        claims.iter().any(|c| c.ticket < ticket && (exclusive || c.exclusive) && c.span.overlaps(span))
    }

    /// Claims held or waiting.
    pub fn claims(&self) -> usize {
        self.claims.borrow().len()
    }
}

/// A held (or awaited) lock; dropping it gives the range back.
pub struct RangeLock<'a> {
    of: &'a RangeLocks,
    ticket: u64,
}

impl Drop for RangeLock<'_> {
    fn drop(&mut self) {
        let mut claims = self.of.claims.borrow_mut();
        if let Some(at) = claims.iter().position(|c| c.ticket == self.ticket) {
            claims.swap_remove(at);
        }
        drop(claims);
        self.of.released.notify_all();
    }
}
