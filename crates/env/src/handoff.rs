//! What any thread hands to the home thread: a queue that costs the home thread one load while it is empty, and the state of
//! the bell that says when the home thread has to be woken for it.
//!
//! What must stay true: nothing that was put is left lying while the home thread sleeps. Whoever puts makes it visible first (the
//! queue, its flag) and rings then, if the queue was empty; the home thread takes note of the ring before it looks at the queue, and
//! moves RUNNING to SLEEPING after. So either its exchange sees NOTIFIED and it does not sleep, or the ringer's swap sees SLEEPING
//! and wakes it; who puts behind others relies on the first of them. `tests/loom.rs` tries every order of it.

// the test puts the types of its model checker here
use super::threads::{AtomicBool, AtomicU8, Mutex, MutexGuard, Ordering};

const RUNNING: u8 = 0;
const SLEEPING: u8 = 1;
const NOTIFIED: u8 = 2;

/// A lock that is taken also where another thread panicked while it had it.
pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// How something was put.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Put {
    /// The home thread may not know: ring.
    First,
    /// Behind others, for whom somebody has rung or is about to.
    Behind,
    /// The home thread is gone; it was dropped.
    Closed,
}

/// The queue.
pub(crate) struct Handoff<T> {
    queue: Mutex<Queue<T>>,
    /// Whether the queue may hold something: saves taking the lock.
    any: AtomicBool,
}

struct Queue<T> {
    items: Vec<T>,
    closed: bool,
}

impl<T> Handoff<T> {
    pub(crate) fn new() -> Handoff<T> {
        Handoff { queue: Mutex::new(Queue { items: Vec::new(), closed: false }), any: AtomicBool::new(false) }
    }

    /// Any thread.
    pub(crate) fn put(&self, item: T) -> Put {
        let mut q = lock(&self.queue);
        if q.closed {
            drop(q);
            return Put::Closed;
        }
        q.items.push(item);
        self.any.store(true, Ordering::Release);
        if q.items.len() == 1 { Put::First } else { Put::Behind }
    }

    /// The home thread: whether there may be something.
    pub(crate) fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// The home thread: everything, in the order in which it was put.
    pub(crate) fn take(&self, out: &mut impl Extend<T>) {
        if !self.any() {
            return;
        }
        let mut q = lock(&self.queue);
        self.any.store(false, Ordering::Release);
        // its room stays, for the next
        out.extend(q.items.drain(..));
    }

    /// Nothing is taken any more, and what is put from now on is dropped. Gives what is left.
    pub(crate) fn close(&self) -> Vec<T> {
        let mut q = lock(&self.queue);
        q.closed = true;
        std::mem::take(&mut q.items)
    }
}

/// Whether the home thread sleeps, or must not.
pub(crate) struct Alarm(AtomicU8);

impl Alarm {
    pub(crate) fn new() -> Alarm {
        Alarm(AtomicU8::new(RUNNING))
    }

    /// Any thread, after it has put something. Whether the home thread sleeps and has to be woken.
    #[must_use]
    pub(crate) fn ring(&self) -> bool {
        self.0.swap(NOTIFIED, Ordering::SeqCst) == SLEEPING
    }

    /// Before the home thread sleeps: `false` if somebody rang since it last woke.
    pub(crate) fn may_sleep(&self) -> bool {
        self.0.compare_exchange(RUNNING, SLEEPING, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// After the home thread slept, and *before* it looks at what the ringers made visible: a ring between the look and
    /// this would be forgotten. Whether somebody rang.
    pub(crate) fn awake(&self) -> bool {
        self.0.swap(RUNNING, Ordering::SeqCst) == NOTIFIED
    }
}
