//! Memory shared with another process: a guest's memory, and single mappings such as a log.
//!
//! What can happen: the other process changes any byte at any time, cuts the file short (then the memory reads as zero and
//! [`GuestMemory::is_broken`] tells), or gives regions that overlap, are misaligned or longer than their file (refused). What
//! must stay true: nothing outside the regions is touched, whatever addresses a guest writes down; bytes are copied out
//! before anybody looks at them, so that nothing changes between check and use; a mapping lives as long as somebody uses it.

use super::buffers::Buf;
use super::fault::Watch;
use super::sys;
use block::{BlockError, Data, Result};
use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
pub use vm_memory;
use vm_memory::{
    AtomicAccess, Bytes, FileOffset, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestRegionMmap,
    MmapRegion, Permissions, VolatileMemory, VolatileSlice,
};

/// Where a piece of guest memory lies.
#[derive(Debug)]
pub struct Region {
    /// First guest-physical address.
    pub guest: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Where the machine monitor has mapped it itself: ring addresses are given that way.
    pub user: u64,
    /// Offset in the file.
    pub offset: u64,
    /// The file.
    pub file: OwnedFd,
}

/// A guest-physical range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// First address.
    pub at: u64,
    /// Length in bytes.
    pub len: u32,
}

#[derive(Clone, Debug)]
struct Mapped {
    // before the mapping: it is watched no longer than it is there
    watch: Rc<Watch>,
    region: Arc<GuestRegionMmap>,
    guest: u64,
    len: u64,
    user: u64,
}

/// A guest's memory, mapped. Immutable: a change of the regions makes a new one, and who uses the old one keeps it.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Mapped>,
    map: GuestMemoryMmap,
}

fn refuse(what: &str, r: &Region) -> BlockError {
    let Region { guest, len, offset, .. } = r;
    BlockError::invalid(format!(
        "guest memory region at {guest:#x}, {len:#x} bytes from offset {offset:#x}: {what}"
    ))
}

/// Maps `len` bytes of `file`, which must have them.
fn map_file(file: OwnedFd, offset: u64, len: u64) -> Result<MmapRegion> {
    let st = sys::fstat(file.as_raw_fd()).map_err(BlockError::from_errno)?;
    let end = offset.checked_add(len);
    if end.is_none_or(|e| e > st.st_size.max(0) as u64) {
        return Err(BlockError::invalid("longer than its file"));
    }
    let len = usize::try_from(len).map_err(|_| BlockError::invalid("too long"))?;
    MmapRegion::from_file(FileOffset::new(File::from(file), offset), len)
        .map_err(|e| BlockError::invalid(format!("cannot be mapped: {e}")))
}

impl Mapped {
    fn new(r: Region) -> Result<Mapped> {
        let Region { guest, len, user, offset, .. } = r;
        if len == 0 || guest.checked_add(len).is_none() || user.checked_add(len).is_none() {
            return Err(refuse("bad length", &r));
        }
        let named = |e: BlockError| {
            BlockError::invalid(format!(
                "guest memory region at {guest:#x}, {len:#x} bytes from offset {offset:#x}: {e}"
            ))
        };
        let mapping = map_file(r.file, offset, len).map_err(named)?;
        let watch = Rc::new(Watch::new(mapping.as_ptr(), mapping.size())?);
        let region = GuestRegionMmap::new(mapping, GuestAddress(guest))
            .ok_or_else(|| BlockError::invalid("guest memory region past the end of the address space"))?;
        Ok(Mapped { watch, region: Arc::new(region), guest, len, user })
    }
}

impl GuestMemory {
    /// Maps the regions; they must not overlap.
    pub fn map(regions: Vec<Region>) -> Result<GuestMemory> {
        let regions = regions.into_iter().map(Mapped::new).collect::<Result<Vec<_>>>()?;
        GuestMemory::of(regions)
    }

    fn of(mut regions: Vec<Mapped>) -> Result<GuestMemory> {
        regions.sort_by_key(|r| r.guest);
        let map = if regions.is_empty() {
            GuestMemoryMmap::new()
        } else {
            GuestMemoryMmap::from_arc_regions(regions.iter().map(|r| r.region.clone()).collect())
                .map_err(|e| BlockError::invalid(format!("guest memory regions: {e}")))?
        };
        Ok(GuestMemory { regions, map })
    }

    /// The same with one more region.
    pub fn with(&self, region: Region) -> Result<GuestMemory> {
        let mut regions = self.regions.clone();
        regions.push(Mapped::new(region)?);
        GuestMemory::of(regions)
    }

    /// The same without the region that has this place and length.
    pub fn without(&self, guest: u64, user: u64, len: u64) -> Result<GuestMemory> {
        let same = |r: &Mapped| r.guest == guest && r.user == user && r.len == len;
        let mut regions = self.regions.clone();
        regions.retain(|r| !same(r));
        if regions.len() == self.regions.len() {
            return Err(BlockError::invalid(format!("there is no guest memory region at {guest:#x}")));
        }
        GuestMemory::of(regions)
    }

    /// How many regions there are.
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// The guest-physical address of one that the machine monitor uses itself.
    pub fn guest_address(&self, user: u64) -> Option<u64> {
        let r = self.regions.iter().find(|r| user >= r.user && user - r.user < r.len)?;
        Some(r.guest + (user - r.user))
    }

    /// Whether a part of it was taken away. It reads as zero then, and the guest sees nothing that is written there.
    pub fn is_broken(&self) -> bool {
        self.regions.iter().any(|r| r.watch.hit())
    }

    /// The memory as the rust-vmm crates want it.
    pub fn space(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// Whether all of `piece` is memory.
    pub fn has(&self, piece: Piece) -> bool {
        self.map.check_range(GuestAddress(piece.at), piece.len as usize, Permissions::ReadWrite)
    }

    /// A copy of the pieces, one after the other, from byte `from` on: `len` bytes in one page-aligned buffer.
    pub fn gather(&self, pieces: &[Piece], from: u64, len: usize) -> Result<Data> {
        let mut buf = Buf::take(len)?;
        each(pieces, from, len, |at, _, n| {
            for slice in
                self.map.get_slices(GuestAddress(at), n, Permissions::Read).map_err(|e| outside(&e))?
            {
                let slice = slice.map_err(|e| outside(&e))?;
                let guard = slice.ptr_guard();
                let have = buf.len();
                debug_assert!(have + guard.len() <= len);
                // SAFETY: the source is mapped for the length of the guard; the target is inside the buffer, since the slices
                // of all pieces together are `len` bytes long. The guest may change the source meanwhile: the copy is then
                // any mixture of bytes, all of which are valid.
                unsafe {
                    std::ptr::copy_nonoverlapping(guard.as_ptr(), buf.as_mut_ptr().add(have), guard.len());
                    buf.advance(guard.len());
                }
            }
            Ok(())
        })?;
        Ok(Data::from(buf.into_bytes()))
    }

    /// Copies `data` to the pieces, from byte `from` of them on.
    pub fn scatter(&self, pieces: &[Piece], from: u64, data: &Data) -> Result<()> {
        let mut parts = data.parts().iter();
        let mut part: &[u8] = &[];
        each(pieces, from, data.len(), |at, _, n| {
            let mut done = 0;
            while done < n {
                if part.is_empty() {
                    part = parts.next().ok_or_else(|| BlockError::invalid("rope shorter than its length"))?;
                    continue;
                }
                let now = part.len().min(n - done);
                self.map
                    .write_slice(&part[..now], GuestAddress(at + done as u64))
                    .map_err(|e| outside(&e))?;
                part = &part[now..];
                done += now;
            }
            Ok(())
        })
    }
}

fn outside(e: &vm_memory::GuestMemoryError) -> BlockError {
    BlockError::invalid(format!("guest memory: {e}"))
}

/// Calls `f(address, position, length)` for what of `pieces` lies in the `len` bytes from `from` on.
fn each(
    pieces: &[Piece],
    from: u64,
    len: usize,
    mut f: impl FnMut(u64, usize, usize) -> Result<()>,
) -> Result<()> {
    let (mut skip, mut done) = (from, 0);
    for p in pieces {
        if done == len {
            break;
        }
        if skip >= u64::from(p.len) {
            skip -= u64::from(p.len);
            continue;
        }
        let n = (p.len as usize - skip as usize).min(len - done);
        f(p.at + skip, done, n)?;
        skip = 0;
        done += n;
    }
    if done < len { Err(BlockError::invalid("more bytes than guest memory was given for")) } else { Ok(()) }
}

/// One mapping of a file that another process has too.
#[derive(Debug)]
pub struct SharedMap {
    // before the mapping: it is watched no longer than it is there
    watch: Watch,
    map: MmapRegion,
}

impl SharedMap {
    /// Maps `len` bytes of `file` from `offset` on.
    pub fn new(file: OwnedFd, offset: u64, len: u64) -> Result<SharedMap> {
        let map = map_file(file, offset, len)?;
        Ok(SharedMap { watch: Watch::new(map.as_ptr(), map.size())?, map })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.map.size()
    }

    /// Whether it has no bytes (never).
    pub fn is_empty(&self) -> bool {
        self.map.size() == 0
    }

    /// Whether it was taken away.
    pub fn is_broken(&self) -> bool {
        self.watch.hit()
    }

    fn all(&self) -> VolatileSlice<'_> {
        self.map.as_volatile_slice()
    }

    /// The number at `offset`, which must be aligned and inside.
    pub fn load<T: AtomicAccess>(&self, offset: usize, order: Ordering) -> Result<T> {
        self.all().load(offset, order).map_err(|e| BlockError::invalid(format!("shared memory: {e}")))
    }

    /// Stores a number at `offset`, which must be aligned and inside.
    pub fn store<T: AtomicAccess>(&self, offset: usize, value: T, order: Ordering) -> Result<()> {
        self.all().store(value, offset, order).map_err(|e| BlockError::invalid(format!("shared memory: {e}")))
    }
}

/// Bytes of guest memory that one bit of a [`WriteLog`] stands for.
const LOG_PAGE: u64 = 4096;

/// Which pages of a guest's memory were written to: a bit for each, in memory that the machine monitor reads and clears while
/// the guest moves to another host.
///
/// A page is marked after it was written: marked before, it could be copied and its bit cleared in between, and the write would
/// be lost on the way. Layout: vhost-user specification, "Migration".
#[derive(Debug)]
pub struct WriteLog {
    map: SharedMap,
    /// Something was written that the log has no bit for.
    short: Cell<bool>,
}

impl WriteLog {
    /// Over `len` bytes of `file` from `offset` on.
    pub fn new(file: OwnedFd, offset: u64, len: u64) -> Result<WriteLog> {
        Ok(WriteLog { map: SharedMap::new(file, offset, len)?, short: Cell::new(false) })
    }

    /// Marks all pages of the `len` bytes at guest address `at`.
    pub fn mark(&self, at: u64, len: u64) {
        if len == 0 {
            return;
        }
        for page in at / LOG_PAGE..=at.saturating_add(len - 1) / LOG_PAGE {
            let byte = usize::try_from(page / 8).unwrap_or(usize::MAX);
            match self.map.all().get_atomic_ref::<AtomicU8>(byte) {
                Ok(bits) => drop(bits.fetch_or(1 << (page % 8), Ordering::SeqCst)),
                Err(_) => self.short.set(true),
            }
        }
    }

    /// Whether it lacks something: it is too short, or was taken away.
    pub fn is_broken(&self) -> bool {
        self.short.get() || self.map.is_broken()
    }
}

/// A new file of zeroes that exists only as long as somebody has it open, and that cannot be cut short.
pub fn anonymous_file(name: &str, len: u64) -> Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let errno = |e: rustix::io::Errno| BlockError::from_errno(e.raw_os_error());
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create(name, flags).map_err(errno)?;
    rustix::fs::ftruncate(&file, len).map_err(errno)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(errno)?;
    Ok(file)
}

/// Another descriptor of the same file.
pub fn duplicate(file: BorrowedFd<'_>) -> Result<OwnedFd> {
    Ok(file.try_clone_to_owned()?)
}

/// The same, of one that is owned.
pub fn again(file: &OwnedFd) -> Result<OwnedFd> {
    duplicate(file.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_of_what_was_written_is_marked() {
        let file = anonymous_file("log", 4096).unwrap();
        let log = WriteLog::new(again(&file).unwrap(), 0, 4).unwrap();
        let seen = SharedMap::new(file, 0, 4).unwrap();
        let bytes = || (0..4).map(|i| seen.load::<u8>(i, Ordering::Relaxed).unwrap()).collect::<Vec<_>>();
        log.mark(0, 0);
        assert_eq!(bytes(), [0; 4]);
        log.mark(4095, 2);
        log.mark(9 * 4096, 1);
        log.mark(9 * 4096 + 4095, 1);
        assert_eq!(bytes(), [0b11, 0b10, 0, 0]);
        log.mark(23 * 4096, 2 * 4096);
        assert_eq!(bytes(), [0b11, 0b10, 0b1000_0000, 1]);
        assert!(!log.is_broken());
        log.mark(31 * 4096, 4097);
        assert_eq!(bytes()[3], 0b1000_0001);
        assert!(log.is_broken(), "there is no bit for page 32");
        let far = WriteLog::new(anonymous_file("log", 4096).unwrap(), 0, 4).unwrap();
        far.mark(u64::MAX, 9);
        assert!(far.is_broken());
    }
}
