//! Waiting between tasks of one thread: no atomics, no locks, first come first served.
//!
//! What must stay true: a waiter that is dropped leaves no trace; a wake-up given to a waiter that was dropped before it
//! ran is passed on (a permit is never lost).

mod ranges;
mod turn;

pub use ranges::{RangeLock, RangeLocks};
pub use turn::Turn;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// `first`'s result, or `None` if `other` ends before it. `first` is polled first.
pub async fn race<T>(first: impl Future<Output = T>, other: impl Future<Output = ()>) -> Option<T> {
    let (mut first, mut other) = (pin!(first), pin!(other));
    poll_fn(|cx| {
        if let Poll::Ready(v) = first.as_mut().poll(cx) {
            return Poll::Ready(Some(v));
        }
        other.as_mut().poll(cx).map(|()| None)
    })
    .await
}

/// Lets other ready tasks run once.
pub fn yield_now() -> impl Future<Output = ()> + 'static {
    let mut yielded = false;
    poll_fn(move |cx| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
}

struct Waiter {
    waker: RefCell<Option<Waker>>,
    fired: Cell<bool>,
}

/// Wakes waiters. A wait begins when the future is *created*, so no wake-up between check and wait is missed.
#[derive(Default)]
pub struct Notify {
    waiters: RefCell<VecDeque<Rc<Waiter>>>,
}

impl Notify {
    /// Nobody waits yet.
    pub const fn new() -> Notify {
        Notify { waiters: RefCell::new(VecDeque::new()) }
    }

    /// Completes at the next [`Notify::notify_all`], or when its turn comes at [`Notify::notify_one`].
    pub fn wait(&self) -> Wait<'_> {
        let waiter = Rc::new(Waiter { waker: RefCell::new(None), fired: Cell::new(false) });
        self.waiters.borrow_mut().push_back(waiter.clone());
        Wait { notify: self, waiter, done: false }
    }

    /// Wakes the waiter that has waited longest; `false` if nobody waits.
    pub fn notify_one(&self) -> bool {
        let Some(w) = self.waiters.borrow_mut().pop_front() else { return false };
        fire(&w);
        true
    }

    /// Wakes all who wait now.
    pub fn notify_all(&self) {
        let all = std::mem::take(&mut *self.waiters.borrow_mut());
        all.iter().for_each(fire);
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.waiters.borrow().len()
    }
}

fn fire(w: &Rc<Waiter>) {
    w.fired.set(true);
    let waker = w.waker.borrow_mut().take();
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// See [`Notify::wait`].
pub struct Wait<'a> {
    notify: &'a Notify,
    waiter: Rc<Waiter>,
    done: bool,
}

impl Future for Wait<'_> {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.waiter.fired.get() {
            self.done = true;
            return Poll::Ready(());
        }
        let mut waker = self.waiter.waker.borrow_mut();
        match &mut *waker {
            Some(w) if w.will_wake(cx.waker()) => {}
            _ => *waker = Some(cx.waker().clone()),
        }
        drop(waker);
        Poll::Pending
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if self.waiter.fired.get() {
            // The wake-up was ours but nobody saw it: it is the next one's.
            self.notify.notify_one();
        } else {
            self.notify.waiters.borrow_mut().retain(|w| !Rc::ptr_eq(w, &self.waiter));
        }
    }
}

/// Counts slots. Waiters get them in order: a release hands slots to the one that waits longest, so that neither a
/// newcomer nor a smaller request overtakes it.
pub struct Semaphore {
    free: Cell<usize>,
    queue: RefCell<VecDeque<Rc<Claim>>>,
}

struct Claim {
    n: usize,
    granted: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Semaphore {
    /// `free` slots.
    pub const fn new(free: usize) -> Semaphore {
        Semaphore { free: Cell::new(free), queue: RefCell::new(VecDeque::new()) }
    }

    /// Slots free now.
    pub fn available(&self) -> usize {
        self.free.get()
    }

    /// Takes `n` slots, waiting in line. The permit gives them back when dropped. More than there ever are: waits for ever.
    pub async fn acquire(&self, n: usize) -> Permit<'_> {
        if let Some(permit) = self.try_acquire(n) {
            return permit;
        }
        let claim = Rc::new(Claim { n, granted: Cell::new(false), waker: RefCell::new(None) });
        self.queue.borrow_mut().push_back(claim.clone());
        let mut waiting = InLine { semaphore: self, claim, taken: false };
        poll_fn(|cx| {
            if waiting.claim.granted.get() {
                return Poll::Ready(());
            }
            *waiting.claim.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
        waiting.taken = true;
        Permit { semaphore: self, n }
    }

    /// Takes `n` slots if they are free and nobody waits.
    pub fn try_acquire(&self, n: usize) -> Option<Permit<'_>> {
        if !self.queue.borrow().is_empty() || self.free.get() < n {
            return None;
        }
        self.free.set(self.free.get() - n);
        Some(Permit { semaphore: self, n })
    }

    /// Adds slots.
    pub fn release(&self, n: usize) {
        self.free.set(self.free.get() + n);
        self.hand_out();
    }

    fn hand_out(&self) {
        loop {
            let claim = {
                let mut queue = self.queue.borrow_mut();
                match queue.front() {
                    Some(c) if c.n <= self.free.get() => queue.pop_front(),
                    _ => return,
                }
            };
            let Some(claim) = claim else { return };
            self.free.set(self.free.get() - claim.n);
            claim.granted.set(true);
            let waker = claim.waker.borrow_mut().take();
            if let Some(w) = waker {
                w.wake();
            }
        }
    }
}

/// A place in the line of a [`Semaphore`].
struct InLine<'a> {
    semaphore: &'a Semaphore,
    claim: Rc<Claim>,
    taken: bool,
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        if self.claim.granted.get() {
            self.semaphore.release(self.claim.n);
        } else {
            self.semaphore.queue.borrow_mut().retain(|c| !Rc::ptr_eq(c, &self.claim));
            // whoever stood behind may fit now
            self.semaphore.hand_out();
        }
    }
}

/// Slots of a [`Semaphore`].
pub struct Permit<'a> {
    semaphore: &'a Semaphore,
    n: usize,
}

impl Permit<'_> {
    /// Keeps the slots taken; the caller gives them back with [`Semaphore::release`].
    pub fn forget(mut self) {
        self.n = 0;
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if self.n > 0 {
            self.semaphore.release(self.n);
        }
    }
}

struct OneshotState<T> {
    value: Option<T>,
    waker: Option<Waker>,
    sender_gone: bool,
}

/// The sending end of [`oneshot`].
pub struct OneshotSender<T>(Rc<RefCell<OneshotState<T>>>);

/// The receiving end of [`oneshot`]: a future, `None` if the sender was dropped.
pub struct Oneshot<T>(Rc<RefCell<OneshotState<T>>>);

/// One value from one task to another.
pub fn oneshot<T>() -> (OneshotSender<T>, Oneshot<T>) {
    let s = Rc::new(RefCell::new(OneshotState { value: None, waker: None, sender_gone: false }));
    (OneshotSender(s.clone()), Oneshot(s))
}

impl<T> OneshotSender<T> {
    /// Hands the value over.
    pub fn send(self, value: T) {
        self.0.borrow_mut().value = Some(value);
    }
}

impl<T> Drop for OneshotSender<T> {
    fn drop(&mut self) {
        let waker = {
            let mut s = self.0.borrow_mut();
            s.sender_gone = true;
            s.waker.take()
        };
        if let Some(w) = waker {
            w.wake();
        }
    }
}

impl<T> Future for Oneshot<T> {
    type Output = Option<T>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut s = self.0.borrow_mut();
        if let Some(v) = s.value.take() {
            return Poll::Ready(Some(v));
        }
        if s.sender_gone {
            return Poll::Ready(None);
        }
        s.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// A first-in-first-out queue between tasks, unbounded: whoever pushes has a bound of its own.
pub struct Queue<T> {
    items: RefCell<VecDeque<T>>,
    arrived: Notify,
    closed: Cell<bool>,
}

impl<T> Default for Queue<T> {
    fn default() -> Queue<T> {
        Queue { items: RefCell::new(VecDeque::new()), arrived: Notify::new(), closed: Cell::new(false) }
    }
}

impl<T> Queue<T> {
    /// An empty queue.
    pub fn new() -> Queue<T> {
        Queue::default()
    }

    /// Adds at the end.
    pub fn push(&self, item: T) {
        self.items.borrow_mut().push_back(item);
        self.arrived.notify_one();
    }

    /// Takes from the front, waiting for an item; `None` once closed and empty.
    pub async fn pop(&self) -> Option<T> {
        loop {
            if let Some(item) = self.try_pop() {
                return Some(item);
            }
            if self.closed.get() {
                return None;
            }
            self.arrived.wait().await;
        }
    }

    /// Takes from the front if there is something.
    pub fn try_pop(&self) -> Option<T> {
        self.items.borrow_mut().pop_front()
    }

    /// No more items will come.
    pub fn close(&self) {
        self.closed.set(true);
        self.arrived.notify_all();
    }

    /// Items in the queue.
    pub fn len(&self) -> usize {
        self.items.borrow().len()
    }

    /// Whether the queue is empty.
    pub fn is_empty(&self) -> bool {
        self.items.borrow().is_empty()
    }
}
