//! An open file: what can be done without waiting is done at once, the rest goes to the ring or a helper thread.
//!
//! What can happen: fewer bytes than asked (the rest is asked for again; at the end of the file the rest reads as zero), a file
//! system without RWF_NOWAIT (learned once), a cache that misses (the next tries are skipped for a while), a future that is
//! dropped while the kernel works (see `op`), a file system that makes writers wait (see [`Patience`]). What must stay true: a
//! read and a change that have bytes in common do not run at once on two threads, because ext4 and tmpfs let a reader see a page
//! that is half written.

use super::buffers::Buf;
use super::op::{Handle, Memory, OnDrop, Request};
use super::pool::Lane;
use super::sys::{self, again, check};
use super::{Ask, Core, Helpers};
use crate::sync::{RangeLock, RangeLocks, Semaphore};
use crate::{File, FileInfo, FileKind, LockRange, Punch};
use block::{BlockError, Data, ErrorKind, Extent, Io, Result, Span};
use smallvec::SmallVec;
use std::any::Any;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Largest read or write in one request. Nothing above asks for more than a few MiB; a bound keeps a defect there from
/// asking for all memory.
pub(super) const MAX_TRANSFER: u64 = 1 << 30;
/// Pieces that one gathered call may have (the kernel's UIO_MAXIOV).
const IOV_MAX: usize = 1024;
/// Bytes that are copied from or to memory at once on this thread. More would hold up the other requests of the thread for
/// longer than the hop to a worker costs (some 12 µs; a memory copy of 1 MiB takes about 100 µs).
const INLINE_MAX: usize = 1 << 20;
/// Longest pause in trying RWF_NOWAIT after it missed again and again.
const MAX_PAUSE: u32 = 64;
/// Writes up to this go to the page cache of ext4 on this thread; more is worth a worker, which can copy meanwhile.
const WRITE_BACK_MAX: usize = 64 << 10;

/// What was found out about a file when it was opened.
#[derive(Clone, Copy)]
pub(super) struct Facts {
    pub(super) kind: FileKind,
    pub(super) writable: bool,
    pub(super) direct: bool,
    pub(super) alignment: u64,
    pub(super) memory_alignment: usize,
    /// Data is always in memory (tmpfs), so plain reads and writes never wait.
    pub(super) in_memory: bool,
    pub(super) threads: bool,
    /// A buffered regular file of ext2/3/4: writes go to memory, but there is no RWF_NOWAIT for them.
    pub(super) write_back: bool,
    /// The device that its file system lies on, if that may be one that shares blocks between files.
    pub(super) sharing_on: Option<u64>,
    /// Whether its file system is a server's, which may copy by itself.
    pub(super) served: bool,
}

/// Whether to write to the page cache on this thread where the file system cannot promise not to wait.
///
/// Such a write is a memory copy (some 5 µs for 4 KiB, against 9 µs through a worker) until the kernel makes it wait: too much
/// is dirty already, or the journal is full. So each one is timed. A slow one raises doubt: it waited, or another process
/// had the processor meanwhile. In doubt it is also looked at whether the thread gave the processor up by itself; a slow
/// one that did stops them for a while, and the workers, who may wait, take over.
/// docs/decisions/0004-inline-buffered-writes.md has the measurements.
#[derive(Default)]
struct Patience {
    until: Cell<Duration>,
    pause: Cell<Duration>,
    quick: Cell<u32>,
    doubt: Cell<bool>,
}

impl Patience {
    /// What no write to memory of [`WRITE_BACK_MAX`] takes.
    const SLOW: Duration = Duration::from_micros(500);
    const FIRST_PAUSE: Duration = Duration::from_millis(100);
    const LONGEST_PAUSE: Duration = Duration::from_secs(10);
    /// So many quick writes in a row end the doubt.
    const TRUSTED: u32 = 1000;

    fn try_at(&self, now: Duration) -> bool {
        now >= self.until.get()
    }

    /// After a write. `waited` tells whether the thread waited in it; `None` if that was not looked at.
    fn note(&self, began: Duration, ended: Duration, waited: impl FnOnce() -> Option<bool>) {
        if ended.saturating_sub(began) < Self::SLOW {
            self.quick.set(self.quick.get().saturating_add(1));
            if self.quick.get() == Self::TRUSTED {
                self.pause.set(Duration::ZERO);
                self.doubt.set(false);
            }
            return;
        }
        self.quick.set(0);
        self.doubt.set(true);
        if waited() == Some(true) {
            let pause = (self.pause.get() * 2).clamp(Self::FIRST_PAUSE, Self::LONGEST_PAUSE);
            self.pause.set(pause);
            self.until.set(ended + pause);
        }
    }
}

/// Whether trying without waiting is worth it.
#[derive(Default)]
struct Luck {
    never: Cell<bool>,
    misses: Cell<u32>,
    pause: Cell<u32>,
}

impl Luck {
    fn try_now(&self) -> bool {
        if self.never.get() {
            return false;
        }
        if self.pause.get() > 0 {
            self.pause.set(self.pause.get() - 1);
            return false;
        }
        true
    }

    fn note(&self, result: Result<i64, i32>) {
        match result {
            Ok(_) => self.misses.set(0),
            Err(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS) => self.never.set(true),
            Err(_) => {
                let misses = self.misses.get().saturating_add(1);
                self.misses.set(misses);
                // the first few misses in a row may be chance
                self.pause.set(if misses < 4 { 0 } else { (misses - 3).min(MAX_PAUSE) });
            }
        }
    }
}

/// An open file.
pub(super) struct OsFile {
    pub(super) core: Rc<Core>,
    pub(super) handle: Rc<Handle>,
    pub(super) facts: Facts,
    len: Cell<u64>,
    read_luck: Luck,
    write_luck: Luck,
    patience: Patience,
    /// What reads and changes have in hand.
    in_hand: RangeLocks,
    /// Room for copies inside the host into this file, and those of them that run.
    pub(super) copies: Semaphore,
    pub(super) lane: Arc<Lane>,
    /// The file system has no FALLOC_FL_ZERO_RANGE.
    pub(super) no_zero_range: Cell<bool>,
    /// The host has said that this file cannot have another's blocks.
    pub(super) no_sharing: Cell<bool>,
}

impl OsFile {
    pub(super) fn new(core: Rc<Core>, handle: Rc<Handle>, facts: Facts, len: u64) -> OsFile {
        OsFile {
            core,
            handle,
            facts,
            len: Cell::new(len),
            read_luck: Luck::default(),
            write_luck: Luck::default(),
            patience: Patience::default(),
            in_hand: RangeLocks::new(),
            copies: Semaphore::new(super::range::COPIES_BEGUN),
            lane: Lane::new(super::range::COPIES_AT_ONCE),
            no_zero_range: Cell::new(false),
            no_sharing: Cell::new(false),
        }
    }

    pub(super) fn grown_to(&self, end: u64) {
        if self.facts.kind == FileKind::Regular && end > self.len.get() {
            self.len.set(end);
        }
    }

    pub(super) fn set_len_hint(&self, len: u64) {
        self.len.set(len);
    }

    /// Waits for reads of `at`, and for all that changes it.
    pub(super) async fn to_change(&self, at: Span) -> Option<RangeLock<'_>> {
        self.take(at, true).await
    }

    /// Nothing where bytes do not pass through the page cache, as a device has whole sectors, or where nothing changes them.
    async fn take(&self, at: Span, exclusive: bool) -> Option<RangeLock<'_>> {
        let alone = self.facts.direct || !self.facts.writable;
        if alone { None } else { Some(self.in_hand.lock(at, exclusive).await) }
    }

    /// Starts an operation and waits for its result.
    pub(super) async fn ask(&self, request: Request, memory: Memory) -> (i32, Memory) {
        let helpers = if self.facts.threads { Helpers::Always } else { Helpers::IfNeeded };
        let ask =
            Ask { request, memory, handle: &self.handle, other: None, on_drop: OnDrop::Finish, helpers };
        self.core.submit(ask).await
    }

    /// Runs a request that needs no memory; on this thread if `inline`.
    pub(super) async fn simple(&self, request: Request, inline: bool) -> Result<u64> {
        let result = if inline { request.run() } else { self.ask(request, Memory::None).await.0 };
        if result < 0 { Err(BlockError::from_errno(-result)) } else { Ok(result as u64) }
    }

    fn readable_len(&self, at: Span) -> Result<usize> {
        if at.len > MAX_TRANSFER || at.end() > i64::MAX as u64 {
            return Err(BlockError::invalid(format!("read of {at} is too large")));
        }
        Ok(at.len as usize)
    }

    /// Reads at once what needs no waiting, behind what is in `buf`. `true`: the end of the file was seen.
    fn read_inline(&self, buf: &mut Buf, want: usize, offset: u64) -> Result<bool> {
        let f = &self.facts;
        let flags = match () {
            () if f.direct && !f.in_memory => return Ok(false),
            () if f.in_memory && want <= INLINE_MAX => 0,
            () if !f.in_memory && self.read_luck.try_now() => libc::RWF_NOWAIT,
            () => return Ok(false),
        };
        while buf.len() < want {
            let done = buf.len();
            let piece =
                // SAFETY: `done < want <= capacity`, so the pointer stays inside the buffer.
                libc::iovec { iov_base: unsafe { buf.as_mut_ptr().add(done) }.cast(), iov_len: want - done };
            let at = (offset + done as u64) as i64;
            // SAFETY: the piece is memory of `buf`, which nobody else uses.
            let n = check(unsafe { libc::preadv2(self.handle.fd(), &raw const piece, 1, at, flags) } as i64);
            if flags != 0 {
                self.read_luck.note(n);
            }
            match n {
                Ok(0) => return Ok(true),
                // SAFETY: the kernel has written that many bytes there.
                Ok(n) => unsafe { buf.advance(n as usize) },
                Err(libc::EINTR) => {}
                Err(_) if flags != 0 => return Ok(false),
                Err(e) => return Err(BlockError::from_errno(e)),
            }
        }
        Ok(true)
    }

    async fn read_all(&self, at: Span) -> Result<Data> {
        let want = self.readable_len(at)?;
        if want == 0 {
            return Ok(Data::empty());
        }
        let _in_hand = self.take(at, false).await;
        let mut buf = Buf::take(want)?;
        let mut end = self.read_inline(&mut buf, want, at.start)?;
        while !end && buf.len() < want {
            let done = buf.len();
            let request = Request::Read {
                fd: self.handle.fd(),
                // SAFETY: `done < want <= capacity`, so the pointer stays inside the buffer.
                ptr: unsafe { buf.as_mut_ptr().add(done) },
                len: (want - done) as u32,
                offset: at.start + done as u64,
            };
            let (result, memory) = self.ask(request, Memory::Buf(buf)).await;
            let Memory::Buf(back) = memory else { return Err(BlockError::from_errno(-result)) };
            buf = back;
            match result {
                0 => end = true,
                n if n > 0 => {
                    // SAFETY: the kernel has written that many bytes there.
                    unsafe { buf.advance(n as usize) };
                    // a direct read that ends off the grid has met the end of the file, and cannot go on from there
                    end = self.facts.direct && !(buf.len() as u64).is_multiple_of(self.facts.alignment);
                }
                e if -e == libc::EINTR || -e == libc::EAGAIN => {}
                e => return Err(BlockError::from_errno(-e)),
            }
        }
        buf.zero_to(want);
        Ok(Data::from(buf.into_bytes()))
    }

    /// Writes at once what needs no waiting; how many bytes.
    fn write_inline(&self, offset: u64, data: &Data) -> Result<usize> {
        let f = &self.facts;
        let flags = match () {
            () if f.direct && !f.in_memory => return Ok(0),
            () if f.in_memory && data.len() <= INLINE_MAX => 0,
            () if f.in_memory => return Ok(0),
            () if f.write_back && data.len() <= WRITE_BACK_MAX => {
                if !self.patience.try_at(self.core.timers.now()) {
                    return Ok(0);
                }
                let waits = self.patience.doubt.get().then(sys::waits);
                let began = sys::clock(libc::CLOCK_MONOTONIC);
                let result = self.write_now(offset, data, 0);
                let ended = sys::clock(libc::CLOCK_MONOTONIC);
                self.patience.note(began, ended, || waits.map(|before| sys::waits() != before));
                return result;
            }
            () if !f.write_back && self.write_luck.try_now() => libc::RWF_NOWAIT,
            () => return Ok(0),
        };
        self.write_now(offset, data, flags)
    }

    /// Writes on this thread; how many bytes. With RWF_NOWAIT in `flags` it may stop early.
    fn write_now(&self, offset: u64, data: &Data, flags: i32) -> Result<usize> {
        let mut done = 0;
        while done < data.len() {
            let mut list: SmallVec<[libc::iovec; 8]> = SmallVec::new();
            pieces(data, done, |p| list.push(p));
            let at = (offset + done as u64) as i64;
            let (fd, count) = (self.handle.fd(), list.len() as i32);
            // SAFETY: the pieces are memory of `data`, which nobody writes to.
            let n = check(unsafe { libc::pwritev2(fd, list.as_ptr(), count, at, flags) } as i64);
            if flags != 0 {
                self.write_luck.note(n);
            }
            match n {
                Ok(0) => return Err(BlockError::from_errno(BlockError::EIO)),
                Ok(n) => done += n as usize,
                Err(libc::EINTR) => {}
                Err(_) if flags != 0 => return Ok(done),
                Err(e) => return Err(BlockError::from_errno(e)),
            }
        }
        Ok(done)
    }

    async fn write_all(&self, offset: u64, data: Data) -> Result<()> {
        let len = data.len();
        let end = offset.checked_add(len as u64).filter(|e| *e <= i64::MAX as u64);
        let Some(end) = end.filter(|_| len as u64 <= MAX_TRANSFER) else {
            return Err(BlockError::invalid(format!("write of offset {offset} length {len} is too large")));
        };
        if !self.facts.writable {
            return Err(BlockError::from_errno(libc::EBADF));
        }
        let mut data = data;
        if self.facts.direct && !self.usable_directly(&data) {
            let mut bounce = Buf::take(len)?;
            data.parts().iter().for_each(|p| bounce.append(p));
            data = Data::from(bounce.into_bytes());
        }
        let _in_hand = self.to_change(Span::between(offset, end)).await;
        let mut done = self.write_inline(offset, &data)?;
        while done < len {
            let at = offset + done as u64;
            let (request, list) = self.write_request(&data, done, at);
            let (result, memory) = self.ask(request, Memory::Rope(data, list)).await;
            let Memory::Rope(back, _) = memory else { return Err(BlockError::from_errno(-result)) };
            data = back;
            match result {
                0 => return Err(BlockError::from_errno(BlockError::EIO)),
                n if n > 0 => done += n as usize,
                e if -e == libc::EINTR || -e == libc::EAGAIN => {}
                e => return Err(BlockError::from_errno(-e)),
            }
        }
        self.grown_to(end);
        Ok(())
    }

    fn write_request(&self, data: &Data, done: usize, offset: u64) -> (Request, Vec<libc::iovec>) {
        let fd = self.handle.fd();
        if let [one] = data.parts() {
            let rest = &one[done..];
            return (Request::Write { fd, ptr: rest.as_ptr(), len: rest.len() as u32, offset }, Vec::new());
        }
        let mut list = Vec::with_capacity(data.parts().len().min(IOV_MAX));
        pieces(data, done, |p| list.push(p));
        (Request::WriteV { fd, list: list.as_ptr(), count: list.len() as u32, offset }, list)
    }

    fn usable_directly(&self, data: &Data) -> bool {
        let (memory, unit) = (self.facts.memory_alignment, self.facts.alignment as usize);
        data.parts().len() <= IOV_MAX
            && (data.parts().iter())
                .all(|p| (p.as_ptr() as usize).is_multiple_of(memory) && p.len().is_multiple_of(unit))
    }
}

/// The pieces of `data` from byte `from` on, as many as one call may have.
pub(super) fn pieces(data: &Data, from: usize, mut take: impl FnMut(libc::iovec)) {
    let mut skip = from;
    let mut count = 0;
    for p in data.parts() {
        if skip >= p.len() {
            skip -= p.len();
            continue;
        }
        let rest = &p[skip..];
        skip = 0;
        take(libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() });
        count += 1;
        if count == IOV_MAX {
            return;
        }
    }
}

impl File for OsFile {
    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(self.read_all(at))
    }

    fn write(&self, offset: u64, data: Data) -> Io<'_> {
        Box::pin(self.write_all(offset, data))
    }

    fn barrier(&self) -> Io<'_> {
        Box::pin(async move {
            let request = Request::Sync { fd: self.handle.fd() };
            match self.simple(request, self.facts.in_memory).await {
                // a file that cannot be synced (a character device, /dev/null) has nothing volatile
                Err(e) if e.errno() == libc::EINVAL && self.facts.kind == FileKind::CharDevice => Ok(()),
                other => other.map(|_| ()),
            }
        })
    }

    fn may_drop_unflushed(&self) -> bool {
        !self.facts.direct
    }

    fn settle(&self) -> Io<'_> {
        Box::pin(async move {
            self.handle.settle().await;
            Ok(())
        })
    }

    fn may_still_change(&self) -> bool {
        self.handle.may_still_change()
    }

    fn zero(&self, at: Span, how: Punch) -> Io<'_> {
        Box::pin(self.zero_range(at, how))
    }

    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(self.discard_range(at))
    }

    fn allocate(&self, at: Span) -> Io<'_> {
        Box::pin(self.allocate_range(at))
    }

    fn set_len(&self, len: u64) -> Io<'_> {
        Box::pin(self.change_len(len))
    }

    fn info(&self) -> Io<'_, FileInfo> {
        Box::pin(async move {
            let fd = self.handle.fd();
            let st = sys::fstat(fd).map_err(BlockError::from_errno)?;
            let device = self.facts.kind == FileKind::BlockDevice;
            let len = if device {
                sys::device_len(fd).map_err(BlockError::from_errno)?
            } else {
                st.st_size.max(0) as u64
            };
            self.len.set(len);
            Ok(FileInfo {
                kind: self.facts.kind,
                device: if device { st.st_rdev } else { st.st_dev },
                inode: st.st_ino,
                len,
                allocated: if device { len } else { (st.st_blocks.max(0) as u64).saturating_mul(512) },
                alignment: self.facts.alignment,
                writable: self.facts.writable,
                modified: match device {
                    true => 0,
                    false => (st.st_mtime.max(0) as u64)
                        .saturating_mul(1_000_000_000)
                        .saturating_add(st.st_mtime_nsec.max(0) as u64),
                },
                born: if device { 0 } else { sys::born(fd) },
            })
        })
    }

    fn len_hint(&self) -> u64 {
        self.len.get()
    }

    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(self.data_extents(at))
    }

    fn copy_to<'a>(&'a self, at: Span, to: &'a Rc<dyn File>, to_offset: u64) -> Io<'a, u64> {
        Box::pin(self.copy_range(at, to, to_offset))
    }

    fn shares_with(&self, to: &Rc<dyn File>) -> bool {
        to.as_any().downcast_ref::<OsFile>().is_some_and(|to| self.may_share(to))
    }

    fn lock(&self, range: LockRange) -> Io<'_> {
        let kind = if range.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
        Box::pin(async move { self.ofd_lock(libc::F_OFD_SETLK, kind, range.start, range.len).map(|_| ()) })
    }

    fn unlock(&self, start: u64, len: u64) -> Io<'_> {
        Box::pin(async move { self.ofd_lock(libc::F_OFD_SETLK, libc::F_UNLCK, start, len).map(|_| ()) })
    }

    fn can_lock(&self, range: LockRange) -> Io<'_, bool> {
        let kind = if range.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
        Box::pin(async move {
            let found = self.ofd_lock(libc::F_OFD_GETLK, kind, range.start, range.len)?;
            Ok(found == libc::F_UNLCK as i16)
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl OsFile {
    /// One lock call; never waits, so it is made on this thread. The kind of lock found (for GETLK).
    fn ofd_lock(&self, command: i32, kind: i32, start: u64, len: u64) -> Result<i16> {
        let bad = |_| BlockError::invalid("lock range is too large");
        if len == 0 {
            // zero would mean "to the end of the file" to the kernel
            return Ok(libc::F_UNLCK as i16);
        }
        let mut lock = libc::flock {
            l_type: kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: i64::try_from(start).map_err(bad)?,
            l_len: i64::try_from(len).map_err(bad)?,
            l_pid: 0,
        };
        // SAFETY: the pointer is valid for the call.
        match again(|| i64::from(unsafe { libc::fcntl(self.handle.fd(), command, &raw mut lock) })) {
            Ok(_) => Ok(lock.l_type),
            Err(libc::EAGAIN | libc::EACCES) => {
                Err(BlockError::new(ErrorKind::Busy, "locked by another").with_errno(libc::EAGAIN))
            }
            Err(e) => Err(BlockError::from_errno(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_write_stops_writing_here_for_a_while() {
        let (ms, us) = (Duration::from_millis, Duration::from_micros);
        let p = Patience::default();
        let (waited, preempted) = (|| Some(true), || Some(false));
        assert!(p.try_at(ms(0)));
        p.note(ms(10), ms(10) + us(50), || None);
        assert!(p.try_at(ms(11)) && !p.doubt.get());
        p.note(ms(20), ms(25), || None);
        assert!(p.try_at(ms(26)) && p.doubt.get(), "once may be chance");
        p.note(ms(27), ms(28), preempted);
        assert!(p.try_at(ms(28)));
        p.note(ms(30), ms(35), waited);
        assert!(!p.try_at(ms(134)) && p.try_at(ms(135)));
        p.note(ms(200), ms(210), waited);
        assert!(!p.try_at(ms(409)) && p.try_at(ms(410)), "twice as long");
        (0..Patience::TRUSTED).for_each(|_| p.note(ms(500), ms(500), waited));
        assert!(!p.doubt.get());
        p.note(ms(600), ms(601), waited);
        assert!(p.try_at(ms(701)), "trusted again: a short pause");
        (0..20).for_each(|_| p.note(ms(1000), ms(1001), waited));
        assert!(p.try_at(ms(1001) + Patience::LONGEST_PAUSE));
    }

    #[test]
    fn waiting_is_told_from_working() {
        let before = sys::waits();
        std::thread::sleep(Duration::from_millis(1));
        assert!(sys::waits() > before);
    }

    #[test]
    fn a_cold_cache_is_tried_less_and_less() {
        let luck = Luck::default();
        let mut tried = 0;
        for _ in 0..2000 {
            if luck.try_now() {
                tried += 1;
                luck.note(Err(libc::EAGAIN));
            }
        }
        assert!((20..120).contains(&tried), "{tried}");
        luck.note(Ok(1));
        luck.pause.set(0);
        assert!(luck.try_now());
        luck.note(Err(libc::EOPNOTSUPP));
        assert!(!luck.try_now());
    }
}
