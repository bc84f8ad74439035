//! Thin, safe-to-read wrappers around the system calls used here: results as `Result<_, errno>`, interrupted ones repeated.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// The errno of the last failed call on this thread.
pub(super) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// A call's result, or its errno where it says -1.
pub(super) fn check(result: i64) -> Result<i64, i32> {
    if result < 0 { Err(errno()) } else { Ok(result) }
}

/// Makes the call again while a signal interrupts it.
pub(super) fn again(mut call: impl FnMut() -> i64) -> Result<i64, i32> {
    loop {
        match check(call()) {
            Err(libc::EINTR) => {}
            other => return other,
        }
    }
}

/// The result as a completion queue has it: a negative errno on failure.
pub(super) fn as_completion(result: Result<i64, i32>) -> i32 {
    match result {
        Ok(n) => i32::try_from(n).unwrap_or(i32::MAX),
        Err(e) => -e,
    }
}

/// Takes ownership of a descriptor that a call has just returned.
pub(super) fn owned(fd: i64) -> OwnedFd {
    // SAFETY: the caller got the number from a successful call that opens a descriptor, and nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
}

pub(super) fn eventfd() -> Result<OwnedFd, i32> {
    // SAFETY: no pointers.
    check(i64::from(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })).map(owned)
}

/// A clock's time.
pub(super) fn clock(which: libc::clockid_t) -> Duration {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid; the clocks asked for always exist.
    unsafe { libc::clock_gettime(which, &raw mut ts) };
    Duration::new(ts.tv_sec.max(0) as u64, ts.tv_nsec as u32)
}

/// How often this thread has waited for something: it gave the processor up by itself, and was not merely made to.
pub(super) fn waits() -> i64 {
    // SAFETY: rusage is plain data for which all zeroes is valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid for the call.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_nvcsw
}

/// A seed from the kernel.
pub(super) fn seed() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is valid for its length.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if n == 8 {
        u64::from_ne_bytes(bytes)
    } else {
        // before the kernel's pool is ready (never after boot): the clock will do, as this is not for secrets
        clock(libc::CLOCK_REALTIME).as_nanos() as u64
    }
}

/// What `fstat` says.
pub(super) fn fstat(fd: RawFd) -> Result<libc::stat, i32> {
    // SAFETY: stat is plain data for which all zeroes is valid.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid for the call.
    check(i64::from(unsafe { libc::fstat(fd, &raw mut st) })).map(|_| st)
}

/// When a file was made, in nanoseconds since 1970; 0 where the host does not say.
pub(super) fn born(fd: RawFd) -> u64 {
    // SAFETY: statx is plain data for which all zeroes is valid.
    let mut st: libc::statx = unsafe { std::mem::zeroed() };
    let (flags, mask) = (libc::AT_EMPTY_PATH, libc::STATX_BTIME);
    // SAFETY: the path is an empty string, and the pointer is valid for the call.
    let done = unsafe { libc::statx(fd, c"".as_ptr(), flags, mask, &raw mut st) };
    if done != 0 || st.stx_mask & mask == 0 {
        return 0;
    }
    let seconds = st.stx_btime.tv_sec.max(0) as u64;
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::from(st.stx_btime.tv_nsec))
}

/// The size of a block device in bytes.
pub(super) fn device_len(fd: RawFd) -> Result<u64, i32> {
    const BLKGETSIZE64: libc::c_ulong = 0x8008_1272; // _IOR(0x12, 114, size_t), linux/fs.h
    let mut len = 0u64;
    // SAFETY: the ioctl writes 8 bytes to the pointer.
    check(i64::from(unsafe { libc::ioctl(fd, BLKGETSIZE64, &raw mut len) })).map(|_| len)
}

/// The logical sector size of a block device.
pub(super) fn sector_size(fd: RawFd) -> Result<u32, i32> {
    const BLKSSZGET: libc::c_ulong = 0x1268; // _IO(0x12, 104), linux/fs.h
    let mut size = 0i32;
    // SAFETY: the ioctl writes an int to the pointer.
    check(i64::from(unsafe { libc::ioctl(fd, BLKSSZGET, &raw mut size) })).map(|_| size.max(512) as u32)
}

/// BLKDISCARD or BLKZEROOUT of a range.
pub(super) fn device_range(fd: RawFd, zero: bool, start: u64, len: u64) -> Result<i64, i32> {
    const BLKDISCARD: libc::c_ulong = 0x1277; // _IO(0x12, 119), linux/fs.h
    const BLKZEROOUT: libc::c_ulong = 0x127f; // _IO(0x12, 127), linux/fs.h
    let range = [start, len];
    let request = if zero { BLKZEROOUT } else { BLKDISCARD };
    // SAFETY: both ioctls read two u64 from the pointer.
    again(|| i64::from(unsafe { libc::ioctl(fd, request, range.as_ptr()) }))
}
