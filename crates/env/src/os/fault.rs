//! Memory that others may take away: mappings of files whose owner can cut them short.
//!
//! What can happen: a machine monitor gives us a file as a guest's memory and truncates it later; the next touch of a page
//! that is gone raises SIGBUS, which would end the process and with it every other disk. What must stay true: a fault
//! inside a watched range replaces that whole range by private zeroes (its owner sees nothing of it any more) and marks it,
//! so that the code that touched it goes on and the user of the range finds out; any other fault ends the process as before.
//!
//! The handler does only what a signal handler may: it reads atomics and makes one system call.

use super::sys::check;
use block::{BlockError, ErrorKind, Result};
use std::ptr::null_mut;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Ranges watched at a time in the process: 64 exports with 8 regions each. Each fault looks through all of them.
const MAX_WATCHED: usize = 512;

struct Entry {
    /// 0: free.
    start: AtomicUsize,
    /// 0 while the entry is being filled in or free.
    end: AtomicUsize,
    hit: AtomicBool,
}

static WATCHED: [Entry; MAX_WATCHED] =
    [const { Entry { start: AtomicUsize::new(0), end: AtomicUsize::new(0), hit: AtomicBool::new(false) } };
        MAX_WATCHED];

static INSTALL: Once = Once::new();

/// A range of addresses under watch, until this is dropped. Drop it before the range is unmapped.
#[derive(Debug)]
pub(super) struct Watch(usize);

impl Watch {
    /// Watches the mapping of `len` bytes at `start`, which must be whole pages of a mapping that the caller owns.
    pub(super) fn new(start: *mut u8, len: usize) -> Result<Watch> {
        INSTALL.call_once(install);
        let start = start as usize;
        let end = start.checked_add(len).filter(|_| start != 0 && len != 0);
        let end = end.ok_or_else(|| BlockError::invalid("empty mapping"))?;
        for (i, e) in WATCHED.iter().enumerate() {
            if e.start.compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                e.hit.store(false, Ordering::Relaxed);
                e.end.store(end, Ordering::Release);
                return Ok(Watch(i));
            }
        }
        Err(BlockError::new(ErrorKind::Busy, "too many memory regions are mapped from clients"))
    }

    /// Whether a page of it turned out to be gone.
    pub(super) fn hit(&self) -> bool {
        WATCHED[self.0].hit.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let e = &WATCHED[self.0];
        e.end.store(0, Ordering::Release);
        e.start.store(0, Ordering::Release);
    }
}

fn install() {
    // SAFETY: sigaction is plain data for which all zeroes is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_fault as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the pointer is valid; the mask is all zeroes: no other signal is blocked meanwhile. The handler keeps to what
    // signal-safety(7) allows. A refusal leaves the default, which is to end the process.
    let _ = check(i64::from(unsafe { libc::sigaction(libc::SIGBUS, &raw const action, null_mut()) }));
}

extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid pointer with SA_SIGINFO; for SIGBUS the address is meaningful if the code is positive.
    let (at, code) = unsafe { ((*info).si_addr() as usize, (*info).si_code) };
    // SAFETY: the location of this thread's errno is always valid.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; what the interrupted code has there must not change.
    let kept = unsafe { *errno };
    let healed = code > 0 && replace(at);
    // SAFETY: as above.
    unsafe { *errno = kept };
    if !healed {
        // SAFETY: no pointers: the default action, as if there were no handler.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
}

/// Puts zeroes in the place of the watched range that `at` lies in, if there is one.
fn replace(at: usize) -> bool {
    for e in &WATCHED {
        let (start, end) = (e.start.load(Ordering::Acquire), e.end.load(Ordering::Acquire));
        if start == 0 || at < start || at >= end {
            continue;
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range is a whole mapping of ours (the contract of `Watch::new`), so nothing else is replaced; raw
        // pointers and atomics into it stay valid, since there is memory at the same addresses.
        let got = unsafe { libc::mmap(start as *mut libc::c_void, end - start, protection, flags, -1, 0) };
        if got == libc::MAP_FAILED {
            return false;
        }
        e.hit.store(true, Ordering::Relaxed);
        return true;
    }
    false
}
