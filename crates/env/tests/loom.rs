//! Every order in which threads can hand something to a home thread that goes to sleep: nothing is left lying (`handoff.rs`, compiled here
//! with the types of loom, a model checker).
#![allow(missing_docs, clippy::unwrap_used)]

/// What `handoff.rs` is made of here.
mod threads {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU8, Ordering};
    pub(crate) use loom::sync::{Mutex, MutexGuard};
}

#[path = "../src/handoff.rs"]
#[allow(dead_code, unreachable_pub)]
mod handoff;

use handoff::{Alarm, Handoff, Put};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// Orders with more changes of thread against their will than this are not tried: they have never shown anything new.
const PREEMPTIONS: usize = 3;

/// A home thread's queue, its bell, and what stands for the kernel: the eventfd's counter, and who sleeps on it.
struct Home {
    queue: Handoff<u32>,
    alarm: Alarm,
    event: Mutex<bool>,
    written: Condvar,
}

impl Home {
    fn new() -> Home {
        Home { queue: Handoff::new(), alarm: Alarm::new(), event: Mutex::new(false), written: Condvar::new() }
    }

    fn put(&self, item: u32) -> Put {
        let put = self.queue.put(item);
        if put == Put::First && self.alarm.ring() {
            *self.event.lock().unwrap() = true;
            self.written.notify_one();
        }
        put
    }

    /// As `Core::turn` and the executor's loop have it: takes until there are `wanted`. A lost wake-up sleeps for ever, which loom
    /// tells as a deadlock.
    fn take(&self, wanted: usize) -> Vec<u32> {
        let mut all = Vec::new();
        loop {
            self.queue.take(&mut all);
            if all.len() >= wanted {
                return all;
            }
            if self.queue.any() {
                continue;
            }
            if self.alarm.may_sleep() {
                let mut event = self.event.lock().unwrap();
                while !*event {
                    event = self.written.wait(event).unwrap();
                }
                *event = false;
            }
            self.alarm.awake();
        }
    }
}

fn every_order(body: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(PREEMPTIONS);
    model.check(body);
}

fn hands(home: &Arc<Home>, items: &'static [u32]) -> thread::JoinHandle<()> {
    let home = home.clone();
    thread::spawn(move || items.iter().for_each(|i| assert_ne!(home.put(*i), Put::Closed)))
}

#[test]
fn nothing_is_left_lying_while_home_sleeps() {
    every_order(|| {
        let home = Arc::new(Home::new());
        let other = hands(&home, &[1, 2]);
        assert_eq!(home.take(2), [1, 2], "in order");
        other.join().unwrap();
    });
}

#[test]
fn two_threads_hand_at_once() {
    every_order(|| {
        let home = Arc::new(Home::new());
        let others = [hands(&home, &[1]), hands(&home, &[2])];
        let mut all = home.take(2);
        all.sort_unstable();
        assert_eq!(all, [1, 2]);
        others.into_iter().for_each(|t| t.join().unwrap());
    });
}

#[test]
fn what_comes_after_the_end_is_dropped_or_given_back_once() {
    every_order(|| {
        let home = Arc::new(Home::new());
        let other = {
            let home = home.clone();
            thread::spawn(move || home.put(1) != Put::Closed)
        };
        let left = home.queue.close();
        assert_eq!(other.join().unwrap(), left == [1], "taken means given back");
    });
}
