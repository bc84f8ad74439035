//! Timers of one thread, in order of their time.
//!
//! What must stay true: a timer fires at or after its time, in order of time and then of creation; one whose future was
//! dropped leaves no trace.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

type Key = (Duration, u64);

/// All timers of a thread.
#[derive(Default)]
pub(super) struct Timers {
    waiting: RefCell<BTreeMap<Key, Waker>>,
    next: Cell<u64>,
    now: Cell<Duration>,
}

impl Timers {
    /// The time last told.
    pub(super) fn now(&self) -> Duration {
        self.now.get()
    }

    /// When the first timer is due.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.waiting.borrow().first_key_value().map(|(k, _)| k.0)
    }

    /// Tells the time and wakes what is due; whether anything was.
    pub(super) fn advance(&self, now: Duration) -> bool {
        self.now.set(now);
        let mut any = false;
        loop {
            let due = {
                let mut waiting = self.waiting.borrow_mut();
                match waiting.first_entry() {
                    Some(e) if e.key().0 <= now => e.remove(),
                    _ => return any,
                }
            };
            any = true;
            due.wake();
        }
    }

    /// Completes when the time told has reached `at`.
    pub(super) fn sleep_until(self: &Rc<Self>, at: Duration) -> Sleep {
        let id = self.next.get();
        self.next.set(id + 1);
        Sleep { timers: self.clone(), key: (at, id), set: false }
    }
}

/// See [`Timers::sleep_until`].
pub(super) struct Sleep {
    timers: Rc<Timers>,
    key: Key,
    set: bool,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.timers.now.get() >= self.key.0 {
            return Poll::Ready(());
        }
        self.set = true;
        self.timers.waiting.borrow_mut().insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if self.set {
            self.timers.waiting.borrow_mut().remove(&self.key);
        }
    }
}
