//! Opening files and finding out what they can do.

use super::file::{Facts, OsFile};
use super::op::Handle;
use super::{Core, sys};
use crate::{Existing, File, FileKind, OpenMode};
use block::{BlockError, ErrorKind, Result};
use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

/// `f_type` of tmpfs, where data is always in memory (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// `f_type` of ext2, ext3 and ext4.
const EXT_MAGIC: i64 = 0xef53;
/// `f_type` of ramfs.
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// `f_type` of file systems whose server may copy by itself: NFS, SMB (three of its lives), Ceph, and what FUSE hides.
const SERVED_MAGIC: [i64; 6] = [0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42, 0x00c3_6400, 0x6573_5546];

/// Opens `path` on a helper thread (names may be on slow file systems).
pub(super) async fn open(core: &Rc<Core>, path: &Path, mode: OpenMode) -> Result<Rc<dyn File>> {
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| BlockError::invalid(format!("'{}' has a zero byte in it", path.display())))?;
    let (fd, facts, len) =
        core.blocking(None, move || open_now(&name, mode)).await?.map_err(BlockError::from_errno)?;
    let Some(facts) = facts else {
        return Err(BlockError::new(ErrorKind::Invalid, "not a file or block device"));
    };
    Ok(Rc::new(OsFile::new(core.clone(), Handle::new(fd), facts, len)))
}

fn open_now(name: &CString, mode: OpenMode) -> Result<(OwnedFd, Option<Facts>, u64), i32> {
    let access = if mode.write { libc::O_RDWR } else { libc::O_RDONLY };
    let creation = match mode.existing {
        Existing::Open => 0,
        Existing::CreateTruncate => libc::O_CREAT | libc::O_TRUNC,
        Existing::CreateNew => libc::O_CREAT | libc::O_EXCL,
    };
    let direct = if mode.direct { libc::O_DIRECT } else { 0 };
    // O_NONBLOCK: opening a FIFO by mistake must not hang; it means nothing for files and block devices
    let flags = access | creation | direct | libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NONBLOCK;
    // SAFETY: the name is a valid C string.
    let fd = sys::again(|| i64::from(unsafe { libc::open(name.as_ptr(), flags, 0o644) })).map(sys::owned)?;
    let raw = fd.as_raw_fd();
    // io_uring takes O_NONBLOCK as "fail rather than wait", also for files
    // SAFETY: no pointers.
    sys::check(i64::from(unsafe { libc::fcntl(raw, libc::F_SETFL, access | direct) }))?;
    let st = sys::fstat(raw)?;
    let kind = match st.st_mode & libc::S_IFMT {
        libc::S_IFREG => FileKind::Regular,
        libc::S_IFBLK => FileKind::BlockDevice,
        libc::S_IFCHR => FileKind::CharDevice,
        libc::S_IFDIR => return Err(libc::EISDIR),
        _ => return Ok((fd, None, 0)),
    };
    let len = if kind == FileKind::BlockDevice { sys::device_len(raw)? } else { st.st_size.max(0) as u64 };
    let magic = if kind == FileKind::Regular { file_system(raw) } else { 0 };
    let (alignment, memory) = if mode.direct { direct_alignment(raw, kind)? } else { (1, 1) };
    let in_memory = magic == TMPFS_MAGIC || magic == RAMFS_MAGIC;
    let facts = Facts {
        kind,
        writable: mode.write,
        direct: mode.direct,
        alignment,
        memory_alignment: memory,
        in_memory,
        threads: mode.threads,
        write_back: magic == EXT_MAGIC && !mode.direct,
        sharing_on: (kind == FileKind::Regular && !in_memory && magic != EXT_MAGIC).then_some(st.st_dev),
        served: SERVED_MAGIC.contains(&magic),
    };
    Ok((fd, Some(facts), len))
}

/// The kind of file system; 0 if unknown.
fn file_system(fd: RawFd) -> i64 {
    // SAFETY: statfs is plain data for which all zeroes is valid.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid for the call.
    let ok = unsafe { libc::fstatfs(fd, &raw mut fs) } == 0;
    if ok { fs.f_type } else { 0 }
}

/// Alignment that direct I/O needs of offsets and lengths, and of memory: from `statx` where the file system tells, from
/// the sector size of devices, and by trying on others.
fn direct_alignment(fd: RawFd, kind: FileKind) -> Result<(u64, usize), i32> {
    // SAFETY: statx is plain data for which all zeroes is valid.
    let mut st: libc::statx = unsafe { std::mem::zeroed() };
    let empty = c"".as_ptr();
    // SAFETY: both pointers are valid for the call.
    let told = unsafe { libc::statx(fd, empty, libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut st) } == 0;
    if told && st.stx_mask & libc::STATX_DIOALIGN != 0 && st.stx_dio_offset_align != 0 {
        return Ok((u64::from(st.stx_dio_offset_align), st.stx_dio_mem_align.max(1) as usize));
    }
    if kind == FileKind::BlockDevice {
        let sector = sys::sector_size(fd)?;
        return Ok((u64::from(sector), sector as usize));
    }
    let mut buf = super::buffers::Buf::take(4096).map_err(|e| e.errno())?;
    for size in [512usize, 1024, 2048] {
        // SAFETY: the buffer has room for `size` bytes.
        if sys::again(|| unsafe { libc::pread(fd, buf.as_mut_ptr().cast(), size, 0) } as i64).is_ok() {
            return Ok((size as u64, size));
        }
    }
    Ok((4096, 4096))
}
