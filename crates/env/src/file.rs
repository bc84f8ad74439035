//! Files and block devices.

use block::{Data, Extent, Io, Span};
use std::rc::Rc;

/// What to do about a file that exists or does not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Existing {
    /// It must exist.
    #[default]
    Open,
    /// Create it if missing, truncate it if there.
    CreateTruncate,
    /// Create it; fail with `Busy` (EEXIST) if there.
    CreateNew,
}

/// How to open a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenMode {
    /// For writing too.
    pub write: bool,
    /// Bypass the page cache (O_DIRECT). Memory and offsets must then be aligned; the file bounces what is not.
    pub direct: bool,
    /// Creation.
    pub existing: Existing,
    /// What would wait is done by pool threads even where io_uring works (`aio=threads`). What would not is done at once
    /// in both cases.
    pub threads: bool,
}

/// What kind of thing was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
    /// A character device.
    CharDevice,
}

/// Facts about an open file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileInfo {
    /// What it is.
    pub kind: FileKind,
    /// Device number of the file system (or of the device itself).
    pub device: u64,
    /// Inode number: with `device` it identifies the file, whatever its names.
    pub inode: u64,
    /// Current length in bytes.
    pub len: u64,
    /// Bytes allocated on the host.
    pub allocated: u64,
    /// Alignment for direct I/O in bytes (1 when not opened direct).
    pub alignment: u64,
    /// Opened for writing.
    pub writable: bool,
    /// When its content was last changed, in nanoseconds since 1970; 0 where the host does not say (devices, the simulator).
    pub modified: u64,
    /// When it was made, likewise; 0 where the file system does not say.
    pub born: u64,
}

/// What a zeroing request wants of the space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Punch {
    /// Give it back (FALLOC_FL_PUNCH_HOLE, BLKDISCARD with zeroes guaranteed). Reads as zero afterwards.
    Release,
    /// Keep it allocated (FALLOC_FL_ZERO_RANGE, BLKZEROOUT).
    Keep,
}

/// A byte range to lock, and how (OFD locks, so that they belong to the open file and not to the process).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LockRange {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub len: u64,
    /// Exclusive instead of shared.
    pub exclusive: bool,
}

/// An open file or block device. Dropping the last `Rc` closes it: at once if nothing is under way, else when the last of its
/// operations has ended. Whoever has to know that the host has the file closed calls [`File::settle`] first.
pub trait File: 'static {
    /// Reads exactly `at`. Bytes past the end of the file read as zero. A sector (512 bytes) that is being changed through this
    /// `File` meanwhile reads as it was or as it will be, never as a mixture, unless the future of the change was dropped.
    fn read(&self, at: Span) -> Io<'_, Data>;
    /// Writes all of `data` at `offset`, growing a regular file as needed.
    fn write(&self, offset: u64, data: Data) -> Io<'_>;
    /// fdatasync: everything completed before is on stable storage after. The only ordering primitive there is.
    fn barrier(&self) -> Io<'_>;
    /// Whether a barrier that failed may have dropped what was written before, so that the next one succeeds without it: a page cache
    /// takes for written what it could not write.
    fn may_drop_unflushed(&self) -> bool {
        false
    }
    /// Every operation whose future was dropped has ended: changes have landed or failed, and nothing but this `File` keeps
    /// the file open. (Reads count as well: until it has ended, a read holds the file and its locks.) Takes as long as the
    /// slowest of them.
    fn settle(&self) -> Io<'_>;
    /// Whether a change is under way whose future was dropped: it may land at any time, over what is written until
    /// [`File::settle`] has ended.
    fn may_still_change(&self) -> bool {
        false
    }
    /// Makes the range read as zero without writing zeroes. `Unsupported` if the file system or device cannot. The
    /// file does not shrink or grow.
    fn zero(&self, at: Span, how: Punch) -> Io<'_>;
    /// Tells the host that the bytes are not needed. What they read as is undefined for devices, zero for files.
    fn discard(&self, at: Span) -> Io<'_>;
    /// Reserves space and grows the file to the end of the range if it is shorter (fallocate mode 0).
    fn allocate(&self, at: Span) -> Io<'_>;
    /// Sets the length (regular files).
    fn set_len(&self, len: u64) -> Io<'_>;
    /// Facts, asked of the host now.
    fn info(&self) -> Io<'_, FileInfo>;
    /// The length as last seen or set by this handle; no system call.
    fn len_hint(&self) -> u64;
    /// Which parts hold data (SEEK_DATA/SEEK_HOLE); everything is data where the host cannot say. Covers exactly `at`
    /// (past the end: zero). May stop early after a bounded number of extents, but never returns nothing for a
    /// non-empty span.
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>>;
    /// Copies inside the host, by sharing blocks where the file system does that; the number of bytes copied, possibly fewer.
    /// `Unsupported` where the file systems cannot, also when `to` belongs to another backend; another error: not these bytes.
    fn copy_to<'a>(&'a self, at: Span, to: &'a Rc<dyn File>, to_offset: u64) -> Io<'a, u64>;
    /// Whether copies to `to` are a matter of bookkeeping, because the file system shares blocks between the two, as far as is
    /// known: one copy that cannot be made so ends that.
    fn shares_with(&self, to: &Rc<dyn File>) -> bool {
        let _ = to;
        false
    }
    /// Takes or converts a byte-range lock without waiting. On conflict `Busy` (errno EAGAIN).
    fn lock(&self, range: LockRange) -> Io<'_>;
    /// Gives byte-range locks back.
    fn unlock(&self, start: u64, len: u64) -> Io<'_>;
    /// Whether [`File::lock`] with this range would succeed (F_OFD_GETLK).
    fn can_lock(&self, range: LockRange) -> Io<'_, bool>;
    /// For the backend's own use in [`File::copy_to`].
    fn as_any(&self) -> &dyn std::any::Any;
}
