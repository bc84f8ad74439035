//! Range locks: requests that must not overlap wait for one another, others run in parallel.
//!
//! Used where a request is more than it seems: an unaligned write is read-modify-write of whole blocks, so it excludes
//! every other write to these blocks; a write to the page cache on another thread can be seen half done. What must stay true: overlapping requests are served in the order they came (no
//! starvation either way); a request that does not overlap never waits; a dropped waiter or holder leaves no trace; a
//! release looks at each claim once and wakes only who can go on.

use super::Turn;
use block::Span;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

struct Claim {
    ticket: u64,
    span: Span,
    exclusive: bool,
    /// Earlier claims that it has to wait for.
    before: usize,
    /// Where it waits; nothing for claims that never had to.
    turn: Option<Rc<Turn>>,
}

impl Claim {
    fn excludes(&self, span: &Span, exclusive: bool) -> bool {
        (exclusive || self.exclusive) && self.span.overlaps(span)
    }
}

/// Locks over ranges of one thing: a node, an export, a file.
#[derive(Default)]
pub struct RangeLocks {
    /// Holders and waiters, in no order.
    claims: RefCell<Vec<Claim>>,
    next: Cell<u64>,
}

impl RangeLocks {
    /// No range is locked.
    pub const fn new() -> RangeLocks {
        RangeLocks { claims: RefCell::new(Vec::new()), next: Cell::new(0) }
    }

    /// Locks `span`: shared with other shared locks, or exclusively. Waits for every overlapping earlier claim.
    pub async fn lock(&self, span: Span, exclusive: bool) -> RangeLock<'_> {
        let (lock, turn) = self.claim(span, exclusive);
        if let Some(turn) = turn {
            turn.wait().await;
        }
        lock
    }

    fn claim(&self, span: Span, exclusive: bool) -> (RangeLock<'_>, Option<Rc<Turn>>) {
        let ticket = self.next.get();
        self.next.set(ticket + 1);
        let mut claims = self.claims.borrow_mut();
        let before = claims.iter().filter(|c| c.excludes(&span, exclusive)).count();
        let turn = (before > 0).then(Rc::<Turn>::default);
        claims.push(Claim { ticket, span, exclusive, before, turn: turn.clone() });
        (RangeLock { of: self, ticket }, turn)
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
        let Some(at) = claims.iter().position(|c| c.ticket == self.ticket) else { return };
        let gone = claims.swap_remove(at);
        for claim in claims.iter_mut().filter(|c| c.ticket > gone.ticket && c.before > 0) {
            if !claim.excludes(&gone.span, gone.exclusive) {
                continue;
            }
            claim.before -= 1;
            if claim.before == 0
                && let Some(turn) = &claim.turn
            {
                turn.give();
            }
        }
    }
}
