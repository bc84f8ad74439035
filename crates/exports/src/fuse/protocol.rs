//! The kernel's FUSE protocol, as far as one file needs it: numbers, requests taken apart, answers put together.
//!
//! What must stay true: an answer has the length that its header says; a request that is too short for its kind is an error,
//! not a guess. Layout: Linux `include/uapi/linux/fuse.h`, protocol 7.31 and later.

use block::{BlockError, Result};
use env::os::fuse::{FUSE_HEAD, FuseRequest};
use std::time::Duration;

/// The only file's number.
pub(super) const ROOT: u64 = 1;
/// The major version that this is; the other side goes down to it.
pub(super) const MAJOR: u32 = 7;
/// The oldest minor version that has all that is used here (Linux 5.2; `max_pages` came in 7.28).
pub(super) const OLDEST_MINOR: u32 = 31;
/// What we know of the newest.
const MINOR: u32 = 38;

/// Kinds of requests.
pub(super) mod op {
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const LSEEK: u32 = 46;
}

/// Which attributes a SETATTR has.
pub(super) mod attr {
    pub(crate) const MODE: u32 = 1;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
}

/// What is asked of the kernel at the start: several reads at a time, also direct ones; O_TRUNC comes with the open (and is
/// ignored, as by a block device: else `cp` onto a disk would begin by cutting it to nothing); writes longer than a page;
/// so many pages in a request.
const INIT_FLAGS: u32 = 1 | 1 << 3 | 1 << 5 | 1 << 15 | 1 << 22;
/// There is a second word of flags.
const INIT_MORE: u32 = 1 << 30;
/// In that: files past the page cache can be mapped.
const INIT_DIRECT_MAP: u32 = 1 << 4;
/// Background requests (read-ahead, asynchronous direct I/O) at a time, and from how many on writers are slowed down.
const BACKGROUND: [u16; 2] = [64, 48];

/// An open file goes past the page cache: others may change the disk; and several writes at a time.
const OPEN_DIRECT: u32 = 1 | 1 << 6;

/// Bytes of the header of a request, of an answer.
const HEADER: usize = 40;
const OUT_HEADER: usize = 16;

/// A request.
pub(super) struct Request(FuseRequest);

impl Request {
    /// Takes one apart that the kernel wrote; `None` if it has not even a header.
    pub(super) fn new(r: FuseRequest) -> Option<Request> {
        r.bytes::<1>(HEADER - 1).map(|_| Request(r))
    }

    fn word(&self, at: usize) -> Result<u32> {
        let bytes = self.0.bytes(at).ok_or_else(|| BlockError::from_errno(BlockError::EINVAL))?;
        Ok(u32::from_ne_bytes(bytes))
    }

    /// A number among the arguments, at byte `at` of them.
    pub(super) fn u32(&self, at: usize) -> Result<u32> {
        self.word(HEADER + at)
    }

    /// The same, of eight bytes.
    pub(super) fn u64(&self, at: usize) -> Result<u64> {
        let bytes = self.0.bytes(HEADER + at).ok_or_else(|| BlockError::from_errno(BlockError::EINVAL))?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// What is asked.
    pub(super) fn kind(&self) -> u32 {
        self.word(4).unwrap_or_default()
    }

    /// What the answer must name.
    pub(super) fn unique(&self) -> u64 {
        self.0.bytes(8).map(u64::from_ne_bytes).unwrap_or_default()
    }

    /// The file it is about.
    pub(super) fn node(&self) -> u64 {
        self.0.bytes(16).map(u64::from_ne_bytes).unwrap_or_default()
    }

    /// The bytes to write.
    pub(super) fn payload(&self) -> block::Data {
        const { assert!(FUSE_HEAD == HEADER + 40) };
        block::Data::from(self.0.rest().clone())
    }

    /// Bytes of memory that it holds and will hold.
    pub(super) fn cost(&self) -> u64 {
        let read = if self.kind() == op::READ { self.u32(16).unwrap_or_default() } else { 0 };
        self.0.rest().len() as u64 + u64::from(read)
    }
}

/// The first bytes of an answer; `behind` more bytes follow those of `body`.
pub(super) fn answer(unique: u64, error: i32, body: &[u8], behind: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(OUT_HEADER + body.len());
    out.extend(((OUT_HEADER + body.len() + behind) as u32).to_ne_bytes());
    out.extend((-error).to_ne_bytes());
    out.extend(unique.to_ne_bytes());
    out.extend(body);
    out
}

fn words(list: &[u32]) -> impl Iterator<Item = u8> + '_ {
    list.iter().flat_map(|w| w.to_ne_bytes())
}

/// The answer to INIT; the error: this kernel is too old.
pub(super) fn init(r: &Request, max_transfer: u32) -> Result<Vec<u8>> {
    let (major, minor, read_ahead, flags) = (r.u32(0)?, r.u32(4)?, r.u32(8)?, r.u32(12)?);
    if major > MAJOR {
        // it asks once more, with a version that we know
        let mut out = words(&[MAJOR, MINOR]).collect::<Vec<u8>>();
        out.resize(64, 0);
        return Ok(out);
    }
    if major < MAJOR || minor < OLDEST_MINOR {
        return Err(BlockError::from_errno(BlockError::EPROTO));
    }
    let more = if flags & INIT_MORE != 0 { r.u32(16)? & INIT_DIRECT_MAP } else { 0 };
    let mut out: Vec<u8> = words(&[MAJOR, MINOR, read_ahead, flags & (INIT_FLAGS | INIT_MORE)]).collect();
    out.extend(BACKGROUND.iter().flat_map(|n| n.to_ne_bytes()));
    out.extend(words(&[max_transfer, 1])); // and times to the nanosecond
    out.extend(((max_transfer / 4096) as u16).to_ne_bytes());
    out.extend([0; 2]);
    out.extend(more.to_ne_bytes());
    out.resize(64, 0);
    Ok(out)
}

/// What `stat` shows.
#[derive(Clone, Copy)]
pub(super) struct Attributes {
    pub(super) len: u64,
    /// Bytes of storage that it takes.
    pub(super) allocated: u64,
    pub(super) accessed: Duration,
    pub(super) modified: Duration,
    pub(super) changed: Duration,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) block: u32,
}

impl Attributes {
    /// As the answer to GETATTR and SETATTR. They are valid for no time: the disk may be resized by others.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; 16];
        let times = [self.accessed, self.modified, self.changed];
        let longs = [ROOT, self.len, self.allocated.div_ceil(512)];
        out.extend(longs.iter().flat_map(|n| n.to_ne_bytes()));
        out.extend(times.iter().flat_map(|t| t.as_secs().to_ne_bytes()));
        out.extend(times.iter().flat_map(|t| t.subsec_nanos().to_ne_bytes()));
        out.extend(words(&[self.mode, 1, self.uid, self.gid, 0, self.block, 0]));
        out
    }
}

/// The answer to OPEN.
pub(super) fn opened() -> Vec<u8> {
    let mut out = vec![0; 8];
    out.extend(words(&[OPEN_DIRECT, 0]));
    out
}

/// The answer to STATFS: a file system that this file fills.
pub(super) fn statfs(len: u64) -> Vec<u8> {
    const BLOCK: u64 = 512;
    let mut out = Vec::with_capacity(80);
    out.extend([len.div_ceil(BLOCK), 0, 0, 1, 0].iter().flat_map(|n| n.to_ne_bytes()));
    out.extend(words(&[BLOCK as u32, 255, BLOCK as u32, 0]));
    out.resize(80, 0);
    out
}
