//! Waiting in line: gates and range locks under cancellation, with futures polled by hand, so that each order is exact.

use block::Span;
use env::sync::{RangeLock, RangeLocks};
use graph::gate::{Closed, Gate, Gated, Pass};
use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

struct Door(Gate);
impl Gated for Door {
    fn gate(&self) -> &Gate {
        &self.0
    }
}

struct Woken(AtomicUsize);
impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A future with a waker that counts.
struct Task<'a, T> {
    future: Pin<Box<dyn Future<Output = T> + 'a>>,
    woken: Arc<Woken>,
}

impl<'a, T> Task<'a, T> {
    fn new(future: impl Future<Output = T> + 'a) -> Task<'a, T> {
        Task { future: Box::pin(future), woken: Arc::new(Woken(AtomicUsize::new(0))) }
    }
    fn poll(&mut self) -> Option<T> {
        let waker = Waker::from(self.woken.clone());
        match self.future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(v) => Some(v),
            Poll::Pending => None,
        }
    }
    fn woken(&self) -> usize {
        self.woken.0.load(Ordering::Relaxed)
    }
}

fn seed() -> u64 {
    let seed = std::env::var("LIVEBLK_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    println!("LIVEBLK_SEED={seed}");
    seed
}

/// xorshift; good enough to choose steps.
struct Dice(Cell<u64>);
impl Dice {
    fn below(&self, n: usize) -> usize {
        let mut x = self.0.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.0.set(x);
        (x % n as u64) as usize
    }
}

#[test]
fn who_waited_is_inside_before_the_next_closer_has_its_way() {
    let door = Rc::new(Door(Gate::new()));
    let first = Task::new(Closed::close(door.clone())).poll().expect("nobody is inside");
    let mut waiter = Task::new(door.0.enter());
    assert!(waiter.poll().is_none());
    drop(first);
    // Before the waiter runs again, somebody closes again and somebody else wants in.
    let mut second = Task::new(Closed::close(door.clone()));
    assert!(second.poll().is_none(), "the one that waited longer is still to come");
    let mut late = Task::new(door.0.enter());
    assert!(late.poll().is_none());
    let pass = waiter.poll().expect("it had its turn");
    assert!(second.poll().is_none());
    drop(pass);
    let second = second.poll().expect("nobody is inside");
    assert!(late.poll().is_none());
    drop(second);
    assert!(late.poll().is_some());
    assert_eq!(door.0.inside(), 0);
}

#[test]
fn a_gate_survives_any_order_of_steps_and_cancellations() {
    let dice = Dice(Cell::new(seed()));
    for _ in 0..3000 {
        let door = Rc::new(Door(Gate::new()));
        let mut entering: Vec<Task<'_, Pass<'_>>> = Vec::new();
        let mut closing: Vec<Task<'_, Closed<Door>>> = Vec::new();
        let (mut passes, mut closed) = (Vec::new(), Vec::new());
        for _ in 0..40 {
            match dice.below(7) {
                0 => entering.push(Task::new(door.0.enter())),
                1 => closing.push(Task::new(Closed::close(door.clone()))),
                2 if !entering.is_empty() => drop(entering.swap_remove(dice.below(entering.len()))),
                3 if !closing.is_empty() => drop(closing.swap_remove(dice.below(closing.len()))),
                4 if !passes.is_empty() => drop(passes.swap_remove(dice.below(passes.len()))),
                5 if !closed.is_empty() => drop(closed.swap_remove(dice.below(closed.len()))),
                _ => {}
            }
            let mut i = 0;
            while i < entering.len() {
                match if dice.below(2) == 0 { entering[i].poll() } else { None } {
                    Some(pass) => {
                        assert!(closed.is_empty(), "somebody came in though it is closed and was empty");
                        passes.push(pass);
                        drop(entering.swap_remove(i));
                    }
                    None => i += 1,
                }
            }
            i = 0;
            while i < closing.len() {
                match if dice.below(2) == 0 { closing[i].poll() } else { None } {
                    Some(c) => {
                        assert!(passes.is_empty(), "closed with somebody inside");
                        closed.push(c);
                        drop(closing.swap_remove(i));
                    }
                    None => i += 1,
                }
            }
        }
        drop((passes, closing, closed));
        for waiting in &mut entering {
            assert!(waiting.poll().is_some(), "nobody closes it any more");
        }
        drop(entering);
        assert_eq!((door.0.inside(), door.0.is_closed()), (0, false));
    }
}

#[test]
fn a_release_wakes_only_who_can_go_on() {
    let locks = RangeLocks::new();
    let everything = Task::new(locks.lock(Span::new(0, 1000), true)).poll().expect("free");
    let mut low: Vec<_> = (0..50).map(|_| Task::new(locks.lock(Span::new(0, 10), true))).collect();
    assert!(low.iter_mut().all(|t| t.poll().is_none()));
    let mut high = Task::new(locks.lock(Span::new(500, 10), true));
    assert!(high.poll().is_none());
    drop(everything);
    assert_eq!(high.woken(), 1);
    let woken: Vec<_> = low.iter().map(Task::woken).collect();
    assert_eq!((woken[0], woken.iter().sum::<usize>()), (1, 1), "one, and the one that waited longest");
    // Each in turn; a waiter in the middle that gives up is not missed.
    drop(low.remove(7));
    for (i, task) in low.iter_mut().enumerate() {
        drop(task.poll().unwrap_or_else(|| panic!("waiter {i} has its turn")));
    }
    drop(high);
    drop(low);
    assert_eq!(locks.claims(), 0);
}

#[test]
fn range_locks_survive_any_order_of_steps_and_cancellations() {
    let dice = Dice(Cell::new(seed()));
    for _ in 0..2000 {
        let locks = RangeLocks::new();
        // In order of arrival: what it asks, and the task or the lock.
        type Entry<'a> = (Span, bool, Option<Task<'a, RangeLock<'a>>>, Option<RangeLock<'a>>);
        let mut all: Vec<Entry<'_>> = Vec::new();
        for _ in 0..40 {
            if all.len() < 12 && dice.below(2) == 0 {
                let span = Span::new(dice.below(16) as u64, 1 + dice.below(6) as u64);
                let exclusive = dice.below(2) == 0;
                let mut task = Task::new(locks.lock(span, exclusive));
                let lock = task.poll();
                all.push((span, exclusive, lock.is_none().then_some(task), lock));
            } else if !all.is_empty() {
                drop(all.remove(dice.below(all.len())));
            }
            for i in 0..all.len() {
                let (span, exclusive) = (all[i].0, all[i].1);
                let free = !all[..i].iter().any(|e| (exclusive || e.1) && e.0.overlaps(&span));
                if let Some(mut task) = all[i].2.take() {
                    all[i].3 = task.poll();
                    assert!(all[i].3.is_none() || task.woken() > 0, "nobody woke it");
                    all[i].2 = all[i].3.is_none().then_some(task);
                }
                assert_eq!(all[i].3.is_some(), free, "claim {i} {span:?}");
            }
        }
        drop(all);
        assert_eq!(locks.claims(), 0);
    }
}
