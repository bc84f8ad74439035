//! Operations under way: what is asked of the kernel, the memory it uses meanwhile, and who waits.
//!
//! What can happen: an operation completes while its future waits; its future is dropped first, and then the slot keeps memory
//! and descriptor until the kernel (or the helper thread) has done with them. What must stay true: memory that a request
//! points to is owned by the request's slot from before it is submitted until after it has completed; a slot number is not
//! used again before that.

use super::Core;
use super::buffers::Buf;
use super::copy::Copy;
use super::sys::{self, again, as_completion};
use crate::sync::Notify;
use block::Data;
use bytes::BytesMut;
use io_uring::{opcode, squeue, types};
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// An open descriptor, shared by the object that uses it and the operations under way. Closed when the last is gone.
pub(super) struct Handle {
    fd: OwnedFd,
    orphans: Cell<usize>,
    /// Those of the orphans that change the file.
    changing: Cell<usize>,
    landed: Notify,
}

impl Handle {
    pub(super) fn new(fd: OwnedFd) -> Rc<Handle> {
        Rc::new(Handle { fd, orphans: Cell::new(0), changing: Cell::new(0), landed: Notify::new() })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether an operation is under way that changes the file and whose future was dropped.
    pub(super) fn may_still_change(&self) -> bool {
        self.changing.get() > 0
    }

    /// Waits until no operation is under way whose future was dropped.
    pub(super) async fn settle(&self) {
        while self.orphans.get() > 0 {
            self.landed.wait().await;
        }
    }
}

/// Memory that a request uses.
pub(super) enum Memory {
    /// None.
    None,
    /// Filled by the kernel.
    Buf(Buf),
    /// Read by the kernel: a rope, and the list of its pieces if there is more than one.
    Rope(Data, #[allow(dead_code, reason = "the kernel reads it")] Vec<libc::iovec>),
    /// Filled by the kernel, behind what is there.
    Chunk(BytesMut),
}

/// What the kernel or a helper thread is asked. Pointers lead into the slot's [`Memory`].
#[derive(Clone, Copy)]
pub(super) enum Request {
    Read { fd: RawFd, ptr: *mut u8, len: u32, offset: u64 },
    Write { fd: RawFd, ptr: *const u8, len: u32, offset: u64 },
    WriteV { fd: RawFd, list: *const libc::iovec, count: u32, offset: u64 },
    Sync { fd: RawFd },
    Fallocate { fd: RawFd, mode: i32, start: u64, len: u64 },
    SetLen { fd: RawFd, len: u64 },
    Copy(Copy),
    Device { fd: RawFd, zero: bool, start: u64, len: u64 },
    SendFile { from: RawFd, offset: u64, len: u32, to: RawFd },
    Receive { fd: RawFd, ptr: *mut u8, len: u32 },
    Poll { fd: RawFd, events: u32 },
}

// SAFETY: the pointers lead to memory that the operation's slot owns until the operation has completed, and only the thread
// that carries the request out uses them meanwhile.
unsafe impl Send for Request {}

impl Request {
    /// As an entry for the ring; `None` if the ring has no such operation.
    pub(super) fn entry(&self) -> Option<squeue::Entry> {
        Some(match *self {
            Request::Read { fd, ptr, len, offset } => {
                opcode::Read::new(types::Fd(fd), ptr, len).offset(offset).build()
            }
            Request::Write { fd, ptr, len, offset } => {
                opcode::Write::new(types::Fd(fd), ptr, len).offset(offset).build()
            }
            Request::WriteV { fd, list, count, offset } => {
                opcode::Writev::new(types::Fd(fd), list, count).offset(offset).build()
            }
            Request::Sync { fd } => {
                opcode::Fsync::new(types::Fd(fd)).flags(types::FsyncFlags::DATASYNC).build()
            }
            Request::Fallocate { fd, mode, start, len } => {
                opcode::Fallocate::new(types::Fd(fd), len).offset(start).mode(mode).build()
            }
            Request::Receive { fd, ptr, len } => opcode::Recv::new(types::Fd(fd), ptr, len).build(),
            Request::Poll { fd, events } => opcode::PollAdd::new(types::Fd(fd), events).build(),
            // newer than the kernels we want to run on, or not there at all
            Request::SetLen { .. } | Request::Copy(_) | Request::Device { .. } | Request::SendFile { .. } => {
                return None;
            }
        })
    }

    /// Whether the file behind the first descriptor changes.
    pub(super) fn changes(&self) -> bool {
        !matches!(
            self,
            Request::Read { .. } | Request::Sync { .. } | Request::Receive { .. } | Request::Poll { .. }
        )
    }

    /// Carries the request out on this thread, waiting as long as it takes.
    pub(super) fn run(self) -> i32 {
        // SAFETY (all calls below): pointers lead to memory that the operation's slot owns until this has returned, with
        // at least the given length; descriptors are kept open by the same slot.
        as_completion(match self {
            Request::Read { fd, ptr, len, offset } => {
                // SAFETY: see above.
                again(|| unsafe { libc::pread(fd, ptr.cast(), len as usize, offset as i64) } as i64)
            }
            Request::Write { fd, ptr, len, offset } => {
                // SAFETY: see above.
                again(|| unsafe { libc::pwrite(fd, ptr.cast(), len as usize, offset as i64) } as i64)
            }
            Request::WriteV { fd, list, count, offset } => {
                // SAFETY: see above.
                again(|| unsafe { libc::pwritev(fd, list, count as i32, offset as i64) } as i64)
            }
            // SAFETY: no pointers.
            Request::Sync { fd } => again(|| i64::from(unsafe { libc::fdatasync(fd) })),
            Request::Fallocate { fd, mode, start, len } => {
                // SAFETY: no pointers.
                again(|| i64::from(unsafe { libc::fallocate(fd, mode, start as i64, len as i64) }))
            }
            // SAFETY: no pointers.
            Request::SetLen { fd, len } => again(|| i64::from(unsafe { libc::ftruncate(fd, len as i64) })),
            Request::Copy(copy) => copy.run(),
            Request::Device { fd, zero, start, len } => sys::device_range(fd, zero, start, len),
            Request::SendFile { from, offset, len, to } => {
                let mut at = offset as i64;
                // SAFETY: `at` is valid for the call.
                again(|| unsafe { libc::sendfile(to, from, &raw mut at, len as usize) } as i64)
            }
            Request::Receive { .. } | Request::Poll { .. } => Err(libc::EINVAL),
        })
    }
}

enum Stage {
    Waiting(Option<Waker>),
    Done(i32),
    /// The future is gone; [`Handle::settle`] waits for the operation.
    Orphan,
}

struct Slot {
    stage: Stage,
    memory: Memory,
    handle: Option<Rc<Handle>>,
    /// A second descriptor in use (the source of a copy).
    other: Option<Rc<Handle>>,
    /// The file behind `handle` changes.
    changes: bool,
}

impl Slot {
    fn handles(&self) -> impl Iterator<Item = &Rc<Handle>> {
        self.handle.iter().chain(&self.other)
    }

    fn changed(&self) -> Option<&Rc<Handle>> {
        self.handle.as_ref().filter(|_| self.changes)
    }
}

/// All operations under way on one thread.
#[derive(Default)]
pub(super) struct Slots {
    table: RefCell<Slab<Slot>>,
}

impl Slots {
    pub(super) fn insert(
        &self,
        memory: Memory,
        handle: Option<Rc<Handle>>,
        other: Option<Rc<Handle>>,
        changes: bool,
    ) -> usize {
        let stage = Stage::Waiting(None);
        self.table.borrow_mut().insert(Slot { stage, memory, handle, other, changes })
    }

    pub(super) fn len(&self) -> usize {
        self.table.borrow().len()
    }

    /// Notes an operation's result.
    pub(super) fn complete(&self, key: usize, result: i32) {
        let (waker, dead) = {
            let mut table = self.table.borrow_mut();
            let Some(slot) = table.get_mut(key) else { return };
            match &mut slot.stage {
                Stage::Waiting(w) => {
                    let w = w.take();
                    slot.stage = Stage::Done(result);
                    (w, None)
                }
                Stage::Done(_) => (None, None),
                Stage::Orphan => (None, Some(table.remove(key))),
            }
        };
        if let Some(w) = waker {
            w.wake();
        }
        dead.iter().filter_map(Slot::changed).for_each(|h| h.changing.set(h.changing.get() - 1));
        for h in dead.iter().flat_map(Slot::handles) {
            h.orphans.set(h.orphans.get() - 1);
            if h.orphans.get() == 0 {
                h.landed.notify_all();
            }
        }
    }

    fn poll(&self, key: usize, cx: &mut Context<'_>) -> Poll<(i32, Memory)> {
        let mut table = self.table.borrow_mut();
        match table.get_mut(key).map(|s| &mut s.stage) {
            Some(Stage::Done(result)) => {
                let result = *result;
                let slot = table.remove(key);
                drop(table);
                Poll::Ready((result, slot.memory))
            }
            Some(Stage::Waiting(waker)) => {
                match waker {
                    Some(w) if w.will_wake(cx.waker()) => {}
                    _ => *waker = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
            // polled after it was ready: a defect of the caller, answered as a cancelled operation
            _ => Poll::Ready((-libc::ECANCELED, Memory::None)),
        }
    }

    /// The future is gone. Whether the operation is still under way.
    fn abandon(&self, key: usize) -> bool {
        let mut table = self.table.borrow_mut();
        let Some(slot) = table.get_mut(key) else { return false };
        if let Stage::Done(_) = slot.stage {
            let slot = table.remove(key);
            drop(table);
            drop(slot);
            return false;
        }
        slot.handles().for_each(|h| h.orphans.set(h.orphans.get() + 1));
        slot.changed().iter().for_each(|h| h.changing.set(h.changing.get() + 1));
        let old = std::mem::replace(&mut slot.stage, Stage::Orphan);
        drop(table);
        drop(old);
        true
    }

    /// For shutting down: forgets everything without freeing memory that the kernel may still use.
    pub(super) fn leak(&self) {
        std::mem::forget(std::mem::take(&mut *self.table.borrow_mut()));
    }
}

/// What happens to an operation whose future is dropped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum OnDrop {
    /// It runs to its end; `settle` waits for that.
    Finish,
    /// It is called off.
    Cancel,
}

/// An operation under way: its result (a negative errno on failure) and its memory.
pub(super) struct Op {
    pub(super) core: Rc<Core>,
    pub(super) key: usize,
    pub(super) on_drop: OnDrop,
    pub(super) ended: bool,
}

impl Future for Op {
    type Output = (i32, Memory);
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<(i32, Memory)> {
        let result = self.core.slots.poll(self.key, cx);
        if result.is_ready() {
            self.ended = true;
        }
        result
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let running = self.core.slots.abandon(self.key);
        if running && self.on_drop == OnDrop::Cancel {
            self.core.cancel(self.key);
        }
    }
}
