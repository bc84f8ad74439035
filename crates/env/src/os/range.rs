//! What the host can do with a range without moving bytes through us: zero, discard, allocate, truncate, find data, copy.
//!
//! All of these may take long (a large hole, a slow device), so they run in the ring's workers or on helper threads, but
//! for small ones on tmpfs. What must stay true: zeroing never changes the length of a file.

use super::copy::{Copy, Way};
use super::file::OsFile;
use super::op::{Memory, OnDrop, Request};
use super::{Ask, Helpers, sys};
use crate::{File, FileKind, Punch};
use block::{BlockError, Extent, Kind, Result, Span};
use std::os::fd::RawFd;
use std::rc::Rc;

/// On tmpfs, ranges up to this are punched on this thread: some 256 pages to free, a few tens of microseconds.
const INLINE_RANGE: u64 = 1 << 20;
/// On tmpfs, data is looked for in up to this on this thread: the search is a walk over 4096 pages, some 300 µs.
const INLINE_SCAN: u64 = 16 << 20;
/// Bytes that one copy inside the host moves: long enough to be worth the hop, short enough to be called off.
const MAX_COPY: u64 = 16 << 20;
/// Copies inside the host that go on at once into one file. The kernel writes to a file one request at a time; a second has
/// its source looked up meanwhile, more would only wait, each holding a helper thread, and get in the way of each other.
pub(super) const COPIES_AT_ONCE: usize = 2;
/// Copies that are begun, so that behind each one that ends there is another; few, as one that is begun is carried out.
pub(super) const COPIES_BEGUN: usize = 2 * COPIES_AT_ONCE;
/// Extents that one query returns at the most, so that it ends in reasonable time on a file in a million pieces.
const MAX_EXTENTS: usize = 1024;

impl OsFile {
    fn check_range(&self, at: Span) -> Result<()> {
        if at.end() > i64::MAX as u64 {
            return Err(BlockError::invalid(format!("{at} is too large for a file")));
        }
        if !self.facts.writable {
            return Err(BlockError::from_errno(libc::EBADF));
        }
        Ok(())
    }

    async fn fallocate(&self, mode: i32, at: Span) -> Result<()> {
        let request = Request::Fallocate { fd: self.handle.fd(), mode, start: at.start, len: at.len };
        let inline = self.facts.in_memory && at.len <= INLINE_RANGE;
        match self.simple(request, inline).await {
            Ok(_) => Ok(()),
            Err(e) if matches!(e.errno(), libc::ENOTTY | libc::ENODEV) => {
                Err(BlockError::from_errno(libc::EOPNOTSUPP))
            }
            Err(e) => Err(e),
        }
    }

    async fn device_range(&self, zero: bool, at: Span) -> Result<()> {
        let request = Request::Device { fd: self.handle.fd(), zero, start: at.start, len: at.len };
        match self.simple(request, false).await {
            Ok(_) => Ok(()),
            Err(e) if e.errno() == libc::ENOTTY => Err(BlockError::from_errno(libc::EOPNOTSUPP)),
            Err(e) => Err(e),
        }
    }

    pub(super) async fn zero_range(&self, at: Span, how: Punch) -> Result<()> {
        self.check_range(at)?;
        if at.is_empty() {
            return Ok(());
        }
        let _in_hand = self.to_change(at).await;
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let keep = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        let unsupported = |r: &Result<()>| r.as_ref().is_err_and(|e| e.errno() == libc::EOPNOTSUPP);
        match how {
            // block devices know both modes as well, and zero reliably, unlike BLKDISCARD
            Punch::Release => self.fallocate(punch, at).await,
            Punch::Keep => {
                if !self.no_zero_range.get() {
                    let done = self.fallocate(keep, at).await;
                    if !unsupported(&done) {
                        return done;
                    }
                    self.no_zero_range.set(true);
                }
                if self.facts.kind == FileKind::BlockDevice {
                    return self.device_range(true, at).await;
                }
                // tmpfs: release, then allocate anew
                self.fallocate(punch, at).await?;
                self.fallocate(libc::FALLOC_FL_KEEP_SIZE, at).await
            }
        }
    }

    pub(super) async fn discard_range(&self, at: Span) -> Result<()> {
        self.check_range(at)?;
        if at.is_empty() {
            return Ok(());
        }
        let _in_hand = self.to_change(at).await;
        if self.facts.kind == FileKind::BlockDevice {
            return self.device_range(false, at).await;
        }
        self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, at).await
    }

    pub(super) async fn allocate_range(&self, at: Span) -> Result<()> {
        self.check_range(at)?;
        if at.is_empty() {
            return Ok(());
        }
        self.fallocate(0, at).await?;
        self.grown_to(at.end());
        Ok(())
    }

    pub(super) async fn change_len(&self, len: u64) -> Result<()> {
        self.check_range(Span::new(len, 0))?;
        if self.facts.kind != FileKind::Regular {
            return Err(BlockError::unsupported("only regular files can be resized"));
        }
        // growing only changes the inode; shrinking frees pages
        let inline =
            self.facts.in_memory && (len >= self.len_hint() || self.len_hint() - len <= INLINE_RANGE);
        self.simple(Request::SetLen { fd: self.handle.fd(), len }, inline).await?;
        self.set_len_hint(len);
        Ok(())
    }

    pub(super) async fn data_extents(&self, at: Span) -> Result<Vec<Extent>> {
        if at.is_empty() {
            return Ok(Vec::new());
        }
        if at.start > i64::MAX as u64 {
            return Ok(vec![Extent::new(at, Kind::Zero)]);
        }
        if self.facts.kind != FileKind::Regular {
            let (data, past) = at.split_at(self.len_hint().saturating_sub(at.start));
            let mut list = Vec::new();
            Extent::push_merged(&mut list, Extent::new(data, Kind::Data));
            Extent::push_merged(&mut list, Extent::new(past, Kind::Zero));
            return Ok(list);
        }
        let fd = self.handle.fd();
        if self.facts.in_memory && at.len <= INLINE_SCAN {
            return Ok(scan(fd, at, 64));
        }
        self.core.blocking(Some(&self.handle), move || scan(fd, at, MAX_EXTENTS)).await
    }

    /// How bytes get from this file to `to` without passing through the home thread, where blocks cannot be shared.
    fn way_to(&self, to: &OsFile) -> Result<Way> {
        let regular = self.facts.kind == FileKind::Regular && to.facts.kind == FileKind::Regular;
        let direct = self.facts.direct || to.facts.direct;
        match () {
            // what goes past the page cache is better kept in flight in numbers, by the ring
            () if !regular || direct => {
                Err(BlockError::unsupported("no copies inside the host for these files"))
            }
            () if self.facts.served && to.facts.served => Ok(Way::Host),
            () => Ok(Way::Bytes { write_back: to.facts.write_back }),
        }
    }

    /// Whether `to` may have the same blocks as this file, as far as is known.
    pub(super) fn may_share(&self, to: &OsFile) -> bool {
        self.facts.sharing_on.is_some()
            && self.facts.sharing_on == to.facts.sharing_on
            && !to.no_sharing.get()
    }

    pub(super) async fn copy_range(&self, at: Span, to: &Rc<dyn File>, to_offset: u64) -> Result<u64> {
        let Some(to) = to.as_any().downcast_ref::<OsFile>() else {
            return Err(BlockError::unsupported("the two files are not on the same host"));
        };
        let len = at.len.min(MAX_COPY);
        if at.is_empty() {
            return Ok(0);
        }
        to.check_range(Span::new(to_offset, len))?;
        let way = self.way_to(to);
        let shares = self.may_share(to);
        if !shares && way.is_err() {
            return way.map(|_| 0);
        }
        let _turn = to.copies.acquire(1).await;
        let _in_hand = to.to_change(Span::new(to_offset, len)).await;
        let at = Span::new(at.start, len);
        if shares {
            match self.copy_by(Way::Share, at, to, to_offset).await {
                // these bytes do not lie as blocks do, or reach past the end; others may
                Err(e) if e.errno() == libc::EINVAL && way.is_err() => return Err(e),
                Err(e) if e.errno() == libc::EINVAL => {}
                Err(e) if e.errno() == libc::EOPNOTSUPP => to.no_sharing.set(true),
                done => return done,
            }
        }
        match self.copy_by(way?, at, to, to_offset).await {
            // not regular files, or overlapping ranges of one
            Err(e) if e.errno() == libc::EINVAL => Err(BlockError::from_errno(libc::EOPNOTSUPP)),
            done => done,
        }
    }

    /// Copies in this way. What the file system has no way for is EOPNOTSUPP, whatever it calls that.
    async fn copy_by(&self, way: Way, at: Span, to: &OsFile, to_offset: u64) -> Result<u64> {
        let request = Request::Copy(Copy {
            from: self.handle.fd(),
            from_offset: at.start,
            to: to.handle.fd(),
            to_offset,
            len: at.len as u32,
            way,
        });
        let (result, _) = self
            .core
            .submit(Ask {
                request,
                memory: Memory::None,
                handle: &to.handle,
                other: Some(&self.handle),
                on_drop: OnDrop::Finish,
                helpers: Helpers::In(&to.lane),
            })
            .await;
        match -result {
            libc::EXDEV | libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOTTY | libc::EPERM | libc::ETXTBSY => {
                Err(BlockError::from_errno(libc::EOPNOTSUPP))
            }
            e if e > 0 => Err(BlockError::from_errno(e)),
            n => {
                let n = n.unsigned_abs().into();
                to.grown_to(to_offset.saturating_add(n));
                Ok(n)
            }
        }
    }
}

/// Data and holes of `at`, at most `max` pieces. What the file system cannot tell is data.
fn scan(fd: RawFd, at: Span, max: usize) -> Vec<Extent> {
    let mut list = Vec::new();
    let end = at.end();
    let mut pos = at.start;
    // SAFETY: no pointers. The file's own offset moves, but nobody uses it.
    let seek = |from: u64, what| sys::check(unsafe { libc::lseek(fd, from as i64, what) });
    while pos < end && list.len() < max {
        let data = match seek(pos, libc::SEEK_DATA) {
            Ok(d) => (d as u64).clamp(pos, end),
            // nothing but a hole, or past the end of the file
            Err(libc::ENXIO) => end,
            Err(_) => {
                Extent::push_merged(&mut list, Extent::new(Span::between(pos, end), Kind::Data));
                return list;
            }
        };
        Extent::push_merged(&mut list, Extent::new(Span::between(pos, data), Kind::Zero));
        if data >= end {
            break;
        }
        // an error here: the file shrank meanwhile, and the next SEEK_DATA will say so
        let hole = seek(data, libc::SEEK_HOLE).map_or(end, |h| (h as u64).min(end));
        if hole <= data {
            Extent::push_merged(&mut list, Extent::new(Span::between(data, end), Kind::Data));
            return list;
        }
        Extent::push_merged(&mut list, Extent::new(Span::between(data, hole), Kind::Data));
        pos = hole;
    }
    list
}
