//! Helper threads for what would block a home thread: file operations without io_uring, slow calls, compression.
//!
//! What can happen: a burst of jobs starts threads up to the limit; a thread without work for a while ends. Results
//! travel back in batches, with one ring of the bell however many are waiting. What must stay true: each job reports exactly
//! once, also one that panics; threads never exceed the limit.

use super::op::Request;
use super::wake::Bell;
use crate::handoff::{Handoff, Put, lock};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Threads for blocking calls, in the whole process: enough to keep a disk's queue busy, few enough that a burst on one
/// inode (whose writes the kernel serialises) does not become a crowd.
const IO_THREADS: usize = 16;
/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(5);

/// Finished jobs on their way home.
pub(super) struct Returns {
    done: Handoff<(usize, i32)>,
    bell: Arc<Bell>,
}

impl Returns {
    pub(super) fn new(bell: Arc<Bell>) -> Returns {
        Returns { done: Handoff::new(), bell }
    }

    fn put(&self, key: usize, result: i32) {
        if self.done.put((key, result)) == Put::First {
            self.bell.ring();
        }
    }

    /// Everything that came back, moved to `out`.
    pub(super) fn collect(&self, out: &mut Vec<(usize, i32)>) {
        self.done.take(out);
    }
}

/// What a helper thread does.
pub(super) enum Work {
    /// A system call; its result is a completion's.
    Request(Request),
    /// Any code; the result is 0.
    Call(Box<dyn FnOnce() + Send>),
}

struct Job {
    key: usize,
    work: Work,
    home: Arc<Returns>,
}

struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// A bounded set of threads with one queue.
pub(super) struct Pool {
    name: &'static str,
    state: Mutex<State>,
    more: Condvar,
}

static IO: Pool = Pool::new("liveblk-io");
static CPU: Pool = Pool::new("liveblk-cpu");

impl Pool {
    const fn new(name: &'static str) -> Pool {
        let state = State { jobs: VecDeque::new(), threads: 0, idle: 0 };
        Pool { name, state: Mutex::new(state), more: Condvar::new() }
    }

    /// Threads for calls that block.
    pub(super) fn io() -> &'static Pool {
        &IO
    }

    /// Threads for work that keeps a processor busy; as many as there are processors.
    pub(super) fn cpu() -> &'static Pool {
        &CPU
    }

    fn limit(&self) -> usize {
        if std::ptr::eq(self, &raw const IO) {
            IO_THREADS
        } else {
            std::thread::available_parallelism().map_or(2, usize::from)
        }
    }

    /// Queues a job. Its result comes back to `home` under `key`.
    pub(super) fn submit(&'static self, key: usize, work: Work, home: &Arc<Returns>) {
        let mut s = lock(&self.state);
        s.jobs.push_back(Job { key, work, home: home.clone() });
        if s.idle >= s.jobs.len() {
            drop(s);
            self.more.notify_one();
            return;
        }
        if s.threads >= self.limit() {
            return;
        }
        s.threads += 1;
        drop(s);
        let started = std::thread::Builder::new().name(self.name.to_owned()).spawn(move || self.serve());
        if started.is_err() {
            let stranded = {
                let mut s = lock(&self.state);
                s.threads -= 1;
                // With no thread at all nobody would ever serve the queue.
                if s.threads == 0 { std::mem::take(&mut s.jobs) } else { VecDeque::new() }
            };
            stranded.into_iter().for_each(|j| j.home.put(j.key, -libc::EAGAIN));
        }
    }

    fn serve(&self) {
        let mut s = lock(&self.state);
        loop {
            if let Some(job) = s.jobs.pop_front() {
                drop(s);
                let work = job.work;
                let result = catch_unwind(AssertUnwindSafe(|| match work {
                    Work::Request(r) => r.run(),
                    Work::Call(f) => {
                        f();
                        0
                    }
                }));
                job.home.put(job.key, result.unwrap_or(-libc::ECANCELED));
                s = lock(&self.state);
                continue;
            }
            s.idle += 1;
            let (guard, waited) = self.more.wait_timeout(s, IDLE).unwrap_or_else(PoisonError::into_inner);
            s = guard;
            s.idle -= 1;
            if waited.timed_out() && s.jobs.is_empty() {
                s.threads -= 1;
                return;
            }
        }
    }
}
