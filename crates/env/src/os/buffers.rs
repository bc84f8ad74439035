//! Page-aligned memory for reads, taken from and given back to a cache of the current thread.
//!
//! What can happen: a buffer is taken on the home thread, filled by the kernel, turned into [`Bytes`], and dropped
//! anywhere, also on another thread: it then joins that thread's cache, or is freed when that is full. What must stay
//! true: only bytes that were written to are ever readable; the cache never holds more than [`CACHE_BYTES`] a thread.

use block::{BlockError, Result};
use bytes::Bytes;
use std::alloc::{Layout, alloc, dealloc};
use std::cell::RefCell;
use std::ptr::NonNull;

/// Alignment of every buffer: the page, which also satisfies direct I/O on all devices in use.
pub(super) const ALIGN: usize = 4096;
/// Size classes are 4 KiB << 0..CLASSES: up to 4 MiB, the largest piece that the copy engine asks for. Larger ones are
/// mapped and unmapped by the allocator each time, which is small beside filling them.
const CLASSES: usize = 11;
/// Memory that the cache of one thread may keep: 64 requests of 512 KiB, or 8 of 4 MiB.
const CACHE_BYTES: usize = 32 << 20;

struct Cache {
    free: [Vec<NonNull<u8>>; CLASSES],
    bytes: usize,
}

impl Drop for Cache {
    fn drop(&mut self) {
        for (class, list) in self.free.iter().enumerate() {
            // SAFETY: every pointer in the list was allocated with this class's layout and is owned by the list.
            list.iter().for_each(|p| unsafe { dealloc(p.as_ptr(), layout(ALIGN << class)) });
        }
    }
}

thread_local! {
    static CACHE: RefCell<Cache> = const { RefCell::new(Cache { free: [const { Vec::new() }; CLASSES], bytes: 0 }) };
}

fn layout(capacity: usize) -> Layout {
    // SAFETY: ALIGN is a power of two, and capacity is a multiple of it that `Buf::take` checked against isize::MAX.
    unsafe { Layout::from_size_align_unchecked(capacity, ALIGN) }
}

fn class_of(capacity: usize) -> Option<usize> {
    let class = (capacity / ALIGN).trailing_zeros() as usize;
    (capacity == ALIGN << class && class < CLASSES).then_some(class)
}

/// Owned memory of a fixed capacity, of which the first `len` bytes are initialised.
pub(super) struct Buf {
    ptr: NonNull<u8>,
    capacity: usize,
    len: usize,
}

// SAFETY: the memory is owned and has no thread affinity; shared access only reads.
unsafe impl Send for Buf {}
// SAFETY: as above.
unsafe impl Sync for Buf {}

impl Buf {
    /// Memory for `len` bytes, nothing of it initialised.
    pub(super) fn take(len: usize) -> Result<Buf> {
        let capacity = if len <= ALIGN << (CLASSES - 1) {
            len.max(1).next_power_of_two().max(ALIGN)
        } else {
            len.checked_next_multiple_of(ALIGN).unwrap_or(usize::MAX)
        };
        if capacity > isize::MAX as usize - ALIGN {
            return Err(BlockError::from_errno(BlockError::ENOMEM));
        }
        let cached = class_of(capacity).and_then(|class| {
            CACHE
                .try_with(|c| {
                    let mut c = c.borrow_mut();
                    let p = c.free[class].pop();
                    if p.is_some() {
                        c.bytes -= capacity;
                    }
                    p
                })
                .ok()
                .flatten()
        });
        let ptr = match cached {
            Some(p) => p,
            // SAFETY: the layout's size is not zero.
            None => NonNull::new(unsafe { alloc(layout(capacity)) })
                .ok_or_else(|| BlockError::from_errno(BlockError::ENOMEM))?,
        };
        Ok(Buf { ptr, capacity, len: 0 })
    }

    /// Start of the memory.
    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Bytes initialised so far.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Notes that `n` more bytes were written behind the initialised ones.
    ///
    /// # Safety
    /// They were: by the kernel, or through [`Buf::as_mut_ptr`].
    pub(super) unsafe fn advance(&mut self, n: usize) {
        debug_assert!(self.len + n <= self.capacity);
        self.len += n;
    }

    /// Forgets what is there.
    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    /// Appends zeroes until `len` bytes are initialised.
    pub(super) fn zero_to(&mut self, len: usize) {
        assert!(len <= self.capacity);
        if len > self.len {
            // SAFETY: the range lies inside the owned memory (checked above).
            unsafe { self.ptr.as_ptr().add(self.len).write_bytes(0, len - self.len) };
            self.len = len;
        }
    }

    /// Appends a copy of `bytes`, which must fit.
    pub(super) fn append(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.capacity - self.len);
        // SAFETY: it fits (checked above), and a slice from elsewhere cannot overlap memory owned here.
        unsafe { self.ptr.as_ptr().add(self.len).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        self.len += bytes.len();
    }

    /// The initialised bytes as [`Bytes`]; the memory returns to a cache when the last part of them is dropped.
    pub(super) fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buf {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `len` bytes are initialised, and nobody writes while a shared borrow exists.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        let kept = class_of(self.capacity).is_some_and(|class| {
            CACHE
                .try_with(|c| {
                    let mut c = c.borrow_mut();
                    if c.bytes + self.capacity > CACHE_BYTES {
                        return false;
                    }
                    c.bytes += self.capacity;
                    c.free[class].push(self.ptr);
                    true
                })
                .unwrap_or(false)
        });
        if !kept {
            // SAFETY: allocated in `take` with this layout, owned here, and not given to the cache.
            unsafe { dealloc(self.ptr.as_ptr(), layout(self.capacity)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cached() -> usize {
        CACHE.with(|c| c.borrow().bytes)
    }

    #[test]
    fn memory_is_aligned_reused_and_bounded() {
        let mut b = Buf::take(5000).unwrap();
        assert_eq!(b.capacity, 8192);
        assert_eq!(b.as_mut_ptr() as usize % ALIGN, 0);
        b.append(b"hello");
        b.zero_to(5000);
        let at = b.as_ref().as_ptr();
        let bytes = b.into_bytes();
        assert_eq!(&bytes[..6], b"hello\0");
        let part = bytes.slice(2..4);
        drop(bytes);
        assert_eq!(cached(), 0, "a part still holds the memory");
        drop(part);
        assert_eq!(cached(), 8192);
        let again = Buf::take(8000).unwrap();
        assert_eq!(again.ptr.as_ptr().cast_const(), at);
        assert_eq!(again.len(), 0);
        let many: Vec<Buf> = (0..20).map(|_| Buf::take(4 << 20).unwrap()).collect();
        drop(many);
        assert_eq!(cached(), CACHE_BYTES);
        let large = Buf::take((4 << 20) + 1).unwrap();
        assert_eq!(large.capacity, (4 << 20) + ALIGN);
        assert!(Buf::take(usize::MAX).is_err());
    }

    #[test]
    fn memory_dropped_elsewhere_stays_there() {
        let b = Buf::take(4096).unwrap();
        std::thread::spawn(move || {
            drop(b);
            assert_eq!(cached(), 4096);
        })
        .join()
        .unwrap();
        assert_eq!(cached(), 0);
    }
}
