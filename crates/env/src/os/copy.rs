//! Copying between two files on a helper thread.
//!
//! File systems that can share blocks between files do so, in no time, if they are asked for exactly that. `copy_file_range`
//! is for those that have a server copy: where neither is possible the kernel moves bytes page by page through a pipe for it,
//! which is slower than reading and writing with a buffer that stays in the processor's cache. What must stay true: an error
//! after some bytes is not told, the bytes are; the next call, from where this one stopped, meets it again.

use super::buffers::Buf;
use super::sys::again;
use std::os::fd::RawFd;

/// Bytes read and then written in one go. Small enough for the second-level cache of a processor, large enough that the file
/// system allocates in large units.
const STEP: usize = 1 << 20;

/// How to copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// The two files have the same blocks from then on, until one is written to (`FICLONERANGE`): all of it or an error.
    Share,
    /// `copy_file_range`.
    Host,
    /// Read and write. With `write_back` the kernel is asked to begin storing what was written: who copies a disk
    /// will want it stored soon, and the device would be idle until then.
    Bytes { write_back: bool },
}

/// A copy between two open files.
#[derive(Clone, Copy)]
pub(super) struct Copy {
    pub(super) from: RawFd,
    pub(super) from_offset: u64,
    pub(super) to: RawFd,
    pub(super) to_offset: u64,
    pub(super) len: u32,
    pub(super) way: Way,
}

impl Copy {
    /// Copies, waiting as long as it takes; the number of bytes, fewer where the source ends.
    pub(super) fn run(self) -> Result<i64, i32> {
        match self.way {
            Way::Share => self.share(),
            Way::Host => self.host(),
            Way::Bytes { write_back } => self.bytes(write_back),
        }
    }

    fn share(self) -> Result<i64, i32> {
        let range = libc::file_clone_range {
            src_fd: self.from.into(),
            src_offset: self.from_offset,
            src_length: self.len.into(),
            dest_offset: self.to_offset,
        };
        // SAFETY: the structure is valid for the call, which only reads it.
        again(|| i64::from(unsafe { libc::ioctl(self.to, libc::FICLONERANGE, &raw const range) }))?;
        Ok(self.len.into())
    }

    fn host(self) -> Result<i64, i32> {
        again(|| {
            let (mut a, mut b) = (self.from_offset as i64, self.to_offset as i64);
            // SAFETY: the two offsets are valid for the call.
            unsafe {
                libc::copy_file_range(self.from, &raw mut a, self.to, &raw mut b, self.len as usize, 0) as i64
            }
        })
    }

    fn bytes(self, write_back: bool) -> Result<i64, i32> {
        let mut buf = Buf::take(STEP.min(self.len as usize)).map_err(|e| e.errno())?;
        let memory = buf.as_mut_ptr();
        let mut done = 0;
        while done < self.len {
            let want = STEP.min((self.len - done) as usize);
            let (read_at, write_at) =
                ((self.from_offset + u64::from(done)) as i64, (self.to_offset + u64::from(done)) as i64);
            // SAFETY: the buffer has room for `want` bytes.
            let got = again(|| unsafe { libc::pread(self.from, memory.cast(), want, read_at) } as i64);
            // SAFETY: the kernel has just written that many bytes there.
            let put = got.and_then(|n| match n {
                0 => Ok(0),
                // SAFETY: as above.
                n => again(|| unsafe { libc::pwrite(self.to, memory.cast(), n as usize, write_at) } as i64),
            });
            match put {
                Ok(0) => break,
                Ok(n) => done += n as u32,
                Err(e) if done == 0 => return Err(e),
                Err(_) => break,
            }
        }
        if write_back && done > 0 {
            // SAFETY: no pointers. A hint: what fails here fails again at the barrier.
            unsafe {
                libc::sync_file_range(
                    self.to,
                    self.to_offset as i64,
                    i64::from(done),
                    libc::SYNC_FILE_RANGE_WRITE,
                )
            };
        }
        Ok(i64::from(done))
    }
}
