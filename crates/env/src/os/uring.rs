//! The ring of one thread: entries gathered during a loop turn go to the kernel in one call, and completions come back in one batch.
//!
//! What can happen: more entries than the submission queue holds (it is flushed in between), more completions than the
//! completion queue holds (the kernel keeps them and the next call fetches them), a kernel too old for some flags
//! (fewer flags are tried), io_uring forbidden (an error, and the caller uses threads).

use super::wake::Bell;
use io_uring::{IoUring, opcode, squeue, types};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::Duration;

/// Marks completions of the bell's poll.
const BELL: u64 = u64::MAX;
/// Marks completions that nobody waits for.
const NOBODY: u64 = u64::MAX - 1;

/// One thread's io_uring.
pub(super) struct Ring {
    ring: RefCell<IoUring>,
    /// Entries that the kernel did not take because its queues are full.
    backlog: RefCell<VecDeque<squeue::Entry>>,
    bell: i32,
    bell_armed: Cell<bool>,
}

impl Ring {
    /// Sets a ring up, with the best flags that the kernel takes.
    pub(super) fn new(entries: u32, bell: &Bell) -> std::io::Result<Ring> {
        let build = |level: u8| {
            let mut b = IoUring::builder();
            b.dontfork().setup_clamp().setup_cqsize(entries.saturating_mul(4));
            match level {
                0 => b.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all(),
                1 => b.setup_coop_taskrun().setup_taskrun_flag(),
                _ => &mut b,
            };
            b.build(entries)
        };
        let ring = build(0).or_else(|_| build(1)).or_else(|_| build(2))?;
        let p = ring.params();
        if !(p.is_feature_ext_arg() && p.is_feature_nodrop() && p.is_feature_submit_stable()) {
            return Err(std::io::Error::from_raw_os_error(libc::ENOSYS));
        }
        Ok(Ring {
            ring: RefCell::new(ring),
            backlog: RefCell::new(VecDeque::new()),
            bell: bell.fd(),
            bell_armed: Cell::new(false),
        })
    }

    /// Queues an entry. Its completion comes back under `key`.
    pub(super) fn push(&self, entry: squeue::Entry, key: usize) {
        self.push_raw(entry.user_data(key as u64));
    }

    /// Asks the kernel to call an operation off.
    pub(super) fn cancel(&self, key: usize) {
        self.push_raw(opcode::AsyncCancel::new(key as u64).build().user_data(NOBODY));
    }

    fn push_raw(&self, entry: squeue::Entry) {
        let mut backlog = self.backlog.borrow_mut();
        if backlog.is_empty() {
            let mut ring = self.ring.borrow_mut();
            if try_push(&mut ring, &entry) || (ring.submit().is_ok() && try_push(&mut ring, &entry)) {
                return;
            }
        }
        backlog.push_back(entry);
    }

    fn flush_backlog(&self) {
        let mut backlog = self.backlog.borrow_mut();
        let mut ring = self.ring.borrow_mut();
        while let Some(entry) = backlog.front() {
            if !(try_push(&mut ring, entry) || (ring.submit().is_ok() && try_push(&mut ring, entry))) {
                return;
            }
            backlog.pop_front();
        }
    }

    /// Submits what is queued and appends what has completed to `out`. `wait`: `None` only looks, otherwise sleeps until
    /// something completes or the time is over (`Some(None)`: without end).
    pub(super) fn turn(&self, wait: Option<Option<Duration>>, out: &mut Vec<(usize, i32)>) {
        if !self.backlog.borrow().is_empty() {
            self.flush_backlog();
        }
        if !self.bell_armed.get() && wait.is_some() {
            self.bell_armed.set(true);
            let poll = opcode::PollAdd::new(types::Fd(self.bell), libc::POLLIN as u32).multi(true);
            self.push_raw(poll.build().user_data(BELL));
        }
        let mut ring = self.ring.borrow_mut();
        let stuck = !self.backlog.borrow().is_empty();
        let ready = !ring.completion().is_empty();
        // Errors here: EINTR, ETIME (the time is over), EBUSY and EAGAIN (reap first, then again). All are dealt with by
        // going on; the entries stay queued.
        let _ = match wait {
            Some(limit) if !stuck && !ready => {
                let mut args = types::SubmitArgs::new();
                let time;
                if let Some(d) = limit {
                    time = types::Timespec::new().sec(d.as_secs()).nsec(d.subsec_nanos());
                    args = args.timespec(&time);
                    ring.submitter().submit_with_args(1, &args)
                } else {
                    ring.submit_and_wait(1)
                }
            }
            _ => {
                let sq = ring.submission();
                let needed = !sq.is_empty() || sq.taskrun() || sq.cq_overflow();
                drop(sq);
                if needed { ring.submit() } else { Ok(0) }
            }
        };
        for c in ring.completion() {
            match c.user_data() {
                NOBODY => {}
                BELL => {
                    if !io_uring::cqueue::more(c.flags()) {
                        self.bell_armed.set(false);
                    }
                }
                key => out.push((key as usize, c.result())),
            }
        }
    }
}

fn try_push(ring: &mut IoUring, entry: &squeue::Entry) -> bool {
    // SAFETY: entries come from `Request::entry`, whose memory and descriptor the operation's slot keeps valid until the
    // completion has been seen, or refer to no memory at all.
    unsafe { ring.submission().push(entry) }.is_ok()
}
