//! Waking a thread that sleeps in the kernel, from any other thread: an eventfd that is written only when needed.
//!
//! What must stay true, and why no wake-up is lost: [`Alarm`].

use super::sys::{self, check};
use crate::handoff::Alarm;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// The bell of one home thread.
pub(super) struct Bell {
    alarm: Alarm,
    event: OwnedFd,
}

impl Bell {
    pub(super) fn new() -> Result<Bell, i32> {
        Ok(Bell { alarm: Alarm::new(), event: sys::eventfd()? })
    }

    /// What becomes readable (each time anew: wait for it edge-triggered) when somebody rings while the home sleeps.
    pub(super) fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Ends the home thread's sleep, or prevents the next one.
    pub(super) fn ring(&self) {
        if self.alarm.ring() {
            let one = 1u64.to_ne_bytes();
            // SAFETY: the buffer is valid for its 8 bytes. The counter is never read; it cannot reach 2^64.
            let _ = check(unsafe { libc::write(self.fd(), one.as_ptr().cast(), one.len()) } as i64);
        }
    }

    /// As [`Alarm::may_sleep`].
    pub(super) fn may_sleep(&self) -> bool {
        self.alarm.may_sleep()
    }

    /// As [`Alarm::awake`].
    pub(super) fn awake(&self) -> bool {
        self.alarm.awake()
    }
}
