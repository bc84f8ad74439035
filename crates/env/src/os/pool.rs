//! Helper threads for what would block a home thread: file operations without io_uring, slow calls, compression.
//!
//! What can happen: a burst of jobs starts threads up to the limit; a thread without work for a while ends; jobs of one lane
//! stand behind each other. Results travel back in batches, with one ring of the bell however many are waiting. What must stay
//! true: each job reports exactly once, also one that panics; threads never exceed the limit, nor jobs that run of a lane its own.

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
    lane: Option<Arc<Lane>>,
}

impl Job {
    /// Does it and reports.
    fn run(self) {
        let work = self.work;
        let result = catch_unwind(AssertUnwindSafe(|| match work {
            Work::Request(r) => r.run(),
            Work::Call(f) => {
                f();
                0
            }
        }));
        self.home.put(self.key, result.unwrap_or(-libc::ECANCELED));
    }
}

/// Jobs of which only so many run at once, whatever the number of threads. When one has ended the next one follows on the same
/// thread: what it needs is in that processor's cache, and nobody has to be woken.
pub(super) struct Lane {
    most: usize,
    state: Mutex<Standing>,
}

#[derive(Default)]
struct Standing {
    running: usize,
    waiting: VecDeque<Job>,
}

impl Lane {
    /// At most so many at once.
    pub(super) fn new(most: usize) -> Arc<Lane> {
        Arc::new(Lane { most, state: Mutex::default() })
    }

    /// The job, if it may run now; else it waits for its turn.
    fn begin(&self, job: Job) -> Option<Job> {
        let mut s = lock(&self.state);
        if s.running == self.most {
            s.waiting.push_back(job);
            return None;
        }
        s.running += 1;
        Some(job)
    }

    /// One has ended: the next one, which runs now.
    fn next(&self) -> Option<Job> {
        let mut s = lock(&self.state);
        let next = s.waiting.pop_front();
        s.running -= usize::from(next.is_none());
        next
    }
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

    /// Queues a job, in `lane` if it has one. Its result comes back to `home` under `key`.
    pub(super) fn submit(
        &'static self,
        key: usize,
        work: Work,
        home: &Arc<Returns>,
        lane: Option<&Arc<Lane>>,
    ) {
        let job = Job { key, work, home: home.clone(), lane: lane.cloned() };
        let begun = match lane {
            Some(lane) => lane.begin(job),
            None => Some(job),
        };
        let Some(job) = begun else { return };
        let mut s = lock(&self.state);
        s.jobs.push_back(job);
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
            for job in stranded {
                let lane = job.lane.clone();
                let behind = std::iter::from_fn(|| lane.as_ref().and_then(|l| l.next()));
                std::iter::once(job).chain(behind).for_each(|j| j.home.put(j.key, -libc::EAGAIN));
            }
        }
    }

    fn serve(&self) {
        let mut s = lock(&self.state);
        loop {
            if let Some(job) = s.jobs.pop_front() {
                drop(s);
                let lane = job.lane.clone();
                job.run();
                let next = lane.and_then(|l| l.next());
                s = lock(&self.state);
                // behind what others wait for
                s.jobs.extend(next);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    /// Many jobs of one lane among others: no more than two run at once, all report, and what panics takes nobody's turn away.
    #[test]
    fn no_more_jobs_of_a_lane_run_than_it_has_room_for() {
        let home = Arc::new(Returns::new(Arc::new(Bell::new().expect("a bell"))));
        let lane = Lane::new(2);
        let (now, most) = <(Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
        for key in 0..60 {
            let (now, most) = (now.clone(), most.clone());
            let in_lane = key % 3 > 0;
            let work = Work::Call(Box::new(move || {
                if !in_lane {
                    return;
                }
                most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                std::thread::sleep(Duration::from_millis(1));
                now.fetch_sub(1, SeqCst);
                assert!(key % 7 > 0, "a job that panics");
            }));
            Pool::io().submit(key, work, &home, in_lane.then_some(&lane));
        }
        let mut done = Vec::new();
        while done.len() < 60 || lock(&lane.state).running > 0 {
            home.collect(&mut done);
            std::thread::sleep(Duration::from_millis(1));
        }
        done.sort_unstable();
        assert_eq!(done.iter().map(|d| d.0).collect::<Vec<_>>(), (0..60).collect::<Vec<_>>());
        assert!(done.iter().all(|(key, result)| (*result == 0) == (key % 3 == 0 || key % 7 > 0)), "{done:?}");
        assert_eq!(most.load(SeqCst), 2);
    }
}
