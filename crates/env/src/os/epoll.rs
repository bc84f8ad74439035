//! Readiness of sockets by epoll, for where io_uring is forbidden.
//!
//! What can happen: a reader and a writer wait for the same descriptor; a descriptor was closed and its number used again
//! (the kernel forgot the old one, so changing fails with ENOENT and it is added anew); a descriptor that cannot be waited
//! for (a regular file) is always ready. What must stay true: every armed key completes once, or is disarmed.

use super::sys::{again, check, owned};
use super::wake::Bell;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// Events fetched by one call.
const BATCH: usize = 128;

struct Waiting {
    key: usize,
    events: u32,
}

/// The descriptors that one thread waits for.
pub(super) struct Poller {
    epoll: OwnedFd,
    fds: RefCell<BTreeMap<RawFd, Vec<Waiting>>>,
    bell: RawFd,
}

impl Poller {
    pub(super) fn new(bell: &Bell) -> Result<Poller, i32> {
        // SAFETY: no pointers.
        let epoll = check(i64::from(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })).map(owned)?;
        let p = Poller { epoll, fds: RefCell::new(BTreeMap::new()), bell: bell.fd() };
        p.control(libc::EPOLL_CTL_ADD, p.bell, libc::EPOLLIN as u32 | libc::EPOLLET as u32)?;
        Ok(p)
    }

    fn control(&self, action: i32, fd: RawFd, events: u32) -> Result<i64, i32> {
        let mut event = libc::epoll_event { events, u64: fd as u64 };
        // SAFETY: the pointer is valid for the call.
        check(i64::from(unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), action, fd, &raw mut event) }))
    }

    fn set(&self, fd: RawFd, events: u32) -> Result<i64, i32> {
        let events = events | libc::EPOLLONESHOT as u32;
        match self.control(libc::EPOLL_CTL_MOD, fd, events) {
            Err(libc::ENOENT) => self.control(libc::EPOLL_CTL_ADD, fd, events),
            other => other,
        }
    }

    /// Waits for `events` on `fd`, to complete under `key`. `Some`: the result is known at once.
    pub(super) fn arm(&self, fd: RawFd, events: u32, key: usize) -> Option<i32> {
        let mut fds = self.fds.borrow_mut();
        let list = fds.entry(fd).or_default();
        let all = list.iter().fold(events, |all, w| all | w.events);
        match self.set(fd, all) {
            Ok(_) => {
                list.push(Waiting { key, events });
                None
            }
            Err(errno) => {
                if list.is_empty() {
                    fds.remove(&fd);
                }
                // EPERM: a file that is always ready
                Some(if errno == libc::EPERM { events as i32 } else { -errno })
            }
        }
    }

    /// Stops waiting under `key`; whether it was.
    pub(super) fn disarm(&self, key: usize) -> bool {
        let mut fds = self.fds.borrow_mut();
        let found = fds.iter().find_map(|(fd, l)| Some((*fd, l.iter().position(|w| w.key == key)?)));
        let Some((fd, at)) = found else { return false };
        if let Some(list) = fds.get_mut(&fd) {
            list.swap_remove(at);
            // the kernel may still report it once: nobody waits then
            if list.is_empty() {
                fds.remove(&fd);
            }
        }
        true
    }

    /// Appends what has become ready to `out`; `wait` as in the ring's turn.
    pub(super) fn turn(&self, wait: Option<Option<Duration>>, out: &mut Vec<(usize, i32)>) {
        let mut events = [const { libc::epoll_event { events: 0, u64: 0 } }; BATCH];
        let n = self.sleep(wait, &mut events);
        let mut fds = self.fds.borrow_mut();
        for e in &events[..n] {
            let fd = e.u64 as RawFd;
            let Some(list) = fds.get_mut(&fd) else { continue };
            let happened = e.events;
            let trouble = happened & (libc::EPOLLERR | libc::EPOLLHUP) as u32 != 0;
            list.retain(|w| {
                let ready = trouble || w.events & happened != 0;
                if ready {
                    out.push((w.key, happened as i32));
                }
                !ready
            });
            if list.is_empty() {
                fds.remove(&fd);
            } else {
                let left = list.iter().fold(0, |all, w| all | w.events);
                if let Err(errno) = self.set(fd, left) {
                    out.extend(list.drain(..).map(|w| (w.key, -errno)));
                    fds.remove(&fd);
                }
            }
        }
    }

    fn sleep(&self, wait: Option<Option<Duration>>, events: &mut [libc::epoll_event; BATCH]) -> usize {
        let fd = self.epoll.as_raw_fd();
        let limit = wait.map_or(Some(Duration::ZERO), |w| w);
        let time = limit.map(|d| libc::timespec {
            tv_sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(d.subsec_nanos()),
        });
        let time_ptr = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let list = events.as_mut_ptr();
        // SAFETY: the list has BATCH elements, the time is valid or null, the signal mask is null.
        let precise = check(i64::from(unsafe {
            libc::epoll_pwait2(fd, list, BATCH as i32, time_ptr, std::ptr::null())
        }));
        match precise {
            Ok(n) => n as usize,
            Err(libc::ENOSYS | libc::EPERM) => {
                let ms =
                    limit.map_or(-1, |d| i32::try_from(d.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX));
                // SAFETY: as above.
                again(|| i64::from(unsafe { libc::epoll_wait(fd, list, BATCH as i32, ms) })).unwrap_or(0)
                    as usize
            }
            Err(_) => 0,
        }
    }
}
