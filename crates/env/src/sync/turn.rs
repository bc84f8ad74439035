//! A waiter's turn: given to one waiter by whoever lets it go on, before that waiter runs again.
//!
//! What must stay true: a turn once given is never taken back, so nobody can overtake between the wake-up and the run.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Not given when made.
#[derive(Default)]
pub struct Turn {
    given: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Turn {
    /// Lets the waiter go on.
    pub fn give(&self) {
        self.given.set(true);
        let waker = self.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether the waiter may go on.
    pub fn is_given(&self) -> bool {
        self.given.get()
    }

    /// Waits until it is given.
    pub async fn wait(&self) {
        poll_fn(|cx| {
            if self.given.get() {
                return Poll::Ready(());
            }
            let mut waker = self.waker.borrow_mut();
            if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}
