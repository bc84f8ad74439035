//! Waking a thread that sleeps in the kernel, from any other thread: an eventfd that is written only when needed.
//!
//! What must stay true: a wake-up is never lost. The waker first makes its work visible (a queue behind a mutex), then
//! swaps the state to NOTIFIED; the home thread looks at that queue, then moves RUNNING to SLEEPING. Either the home
//! thread's exchange sees NOTIFIED and does not sleep, or the waker's swap sees SLEEPING and writes.

use super::sys::{self, check};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};

const RUNNING: u8 = 0;
const SLEEPING: u8 = 1;
const NOTIFIED: u8 = 2;

/// The bell of one home thread.
pub(super) struct Bell {
    state: AtomicU8,
    event: OwnedFd,
}

impl Bell {
    pub(super) fn new() -> Result<Bell, i32> {
        Ok(Bell { state: AtomicU8::new(RUNNING), event: sys::eventfd()? })
    }

    /// What becomes readable (each time anew: wait for it edge-triggered) when somebody rings while the home sleeps.
    pub(super) fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Ends the home thread's sleep, or prevents the next one.
    pub(super) fn ring(&self) {
        if self.state.swap(NOTIFIED, Ordering::SeqCst) == SLEEPING {
            let one = 1u64.to_ne_bytes();
            // SAFETY: the buffer is valid for its 8 bytes. The counter is never read; it cannot reach 2^64.
            let _ = check(unsafe { libc::write(self.fd(), one.as_ptr().cast(), one.len()) } as i64);
        }
    }

    /// Before the home thread sleeps: `false` if somebody rang since it last woke.
    pub(super) fn may_sleep(&self) -> bool {
        self.state.compare_exchange(RUNNING, SLEEPING, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// After the home thread slept, and *before* it looks at what the wakers made visible: a bell that rings between the
    /// look and this would be forgotten. Whether somebody rang.
    pub(super) fn awake(&self) -> bool {
        self.state.swap(RUNNING, Ordering::SeqCst) == NOTIFIED
    }
}
