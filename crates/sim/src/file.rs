//! A simulated file as one process has it open: each request takes its time, may fail, and lands when it ends.
//!
//! What must stay true: nothing happens before the first poll; after it, a change lands even if its future is dropped;
//! requests complete in an order drawn from the seed; a dead process's requests never complete.

use crate::faults::{Fault, Op};
use crate::host::ProcessState;
use crate::image::Effect;
use crate::inode::Inode;
use block::{BlockError, Data, Extent, Io, Result, Span};
use env::sync::{Notify, oneshot};
use env::{File, FileInfo, FileKind, LockRange, OpenMode, Punch};
use std::cell::Cell;
use std::future::pending;
use std::rc::Rc;
use std::time::Duration;

/// Alignment of direct I/O on simulated disks.
const DIRECT_ALIGNMENT: u64 = 512;

/// See [`env::File`].
pub(crate) struct SimFile {
    process: Rc<ProcessState>,
    inode: Rc<Inode>,
    path: String,
    handle: Rc<Handle>,
    mode: OpenMode,
    len: Cell<u64>,
}

/// What the host knows as open: there until the [`SimFile`] is gone and the last of its requests has ended, as a descriptor
/// is that the kernel still works on.
struct Handle {
    process: Rc<ProcessState>,
    inode: Rc<Inode>,
    number: u64,
    /// Requests under way whose futures were dropped.
    orphans: Cell<usize>,
    /// Those of them that change the file.
    changing: Cell<usize>,
    ended: Notify,
}

impl Drop for Handle {
    fn drop(&mut self) {
        // A dead process's locks are gone already.
        if !self.process.is_dead() {
            self.process.handles.borrow_mut().remove(&self.number);
            self.inode.unlock_all(self.number);
        }
    }
}

/// A request under way. The host has one half until the request has ended, the future that waits has the other.
struct UnderWay {
    handle: Rc<Handle>,
    changes: bool,
    ended: Cell<bool>,
    orphan: Cell<bool>,
}

impl UnderWay {
    /// One orphan more, or one less.
    fn count(&self, one: impl Fn(usize) -> usize) {
        let h = &self.handle;
        h.orphans.set(one(h.orphans.get()));
        if self.changes {
            h.changing.set(one(h.changing.get()));
        }
    }
}

/// The half of the host.
struct Carried(Rc<UnderWay>);
/// The half of the future.
struct Awaited(Rc<UnderWay>);

fn under_way(handle: &Rc<Handle>, changes: bool) -> (Carried, Awaited) {
    let handle = handle.clone();
    let both = Rc::new(UnderWay { handle, changes, ended: Cell::new(false), orphan: Cell::new(false) });
    (Carried(both.clone()), Awaited(both))
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.0.ended.set(true);
        if self.0.orphan.get() {
            self.0.count(|n| n - 1);
            self.0.handle.ended.notify_all();
        }
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        if !self.0.ended.get() {
            self.0.orphan.set(true);
            self.0.count(|n| n + 1);
        }
    }
}

/// What was drawn for one request.
struct Draw {
    delay: Duration,
    inline: bool,
    fault: Option<Fault>,
}

fn draw(process: &ProcessState, path: &str, op: Op) -> Draw {
    let host = &process.host;
    host.count_request();
    let by_rule = host.check_rules(path, op);
    let machine = &host.0.machine;
    let profile = host.0.profile.borrow();
    let now = machine.now();
    let mut d = machine.draw(|r| Draw {
        delay: profile.draw_latency(r),
        // a barrier is never free
        inline: op != Op::Barrier && r.chance(profile.inline),
        fault: profile.draw_fault(r, op, now),
    });
    d.fault = by_rule.or(d.fault);
    if let Some(f) = d.fault {
        host.count_fault();
        machine.say(|| format!("fault {f:?} for {op:?} of {path}"));
    }
    match d.fault {
        Some(Fault::Delay(more)) => {
            d.delay += more;
            d.inline = false;
            d.fault = None;
        }
        Some(Fault::Hang) => d.inline = false,
        _ => {}
    }
    d
}

/// Lets a request without effect of its own take its time and its faults.
pub(crate) async fn pass(process: &Rc<ProcessState>, path: &str, op: Op) -> Result<()> {
    run(process, None, path, op, |_| Ok(())).await
}

/// Carries out a request that changes nothing: `at_end` is evaluated when it completes, and told whether a wrong bit is
/// due.
async fn run<T: 'static>(
    process: &Rc<ProcessState>,
    handle: Option<&Rc<Handle>>,
    path: &str,
    op: Op,
    at_end: impl FnOnce(bool) -> Result<T> + 'static,
) -> Result<T> {
    if process.is_dead() {
        return pending().await;
    }
    let machine = process.host.0.machine.clone();
    let d = draw(process, path, op);
    let finish = move || match d.fault {
        Some(Fault::Errno(n) | Fault::Torn(n)) => Err(BlockError::from_errno(n)),
        fault => at_end(fault == Some(Fault::Rot)),
    };
    if d.inline {
        return finish();
    }
    let (sender, receiver) = oneshot();
    let (carried, _awaited) = handle.map(|h| under_way(h, false)).unzip();
    let end = move || {
        sender.send(finish());
        drop(carried);
    };
    if d.fault == Some(Fault::Hang) {
        process.host.hang(end);
    } else {
        machine.at(machine.now() + d.delay, end);
    }
    match receiver.await {
        Some(r) if !process.is_dead() => r,
        _ => pending().await,
    }
}

impl SimFile {
    pub(crate) fn new(
        process: Rc<ProcessState>,
        inode: Rc<Inode>,
        path: String,
        handle: u64,
        mode: OpenMode,
    ) -> SimFile {
        let len = Cell::new(inode.with_cache(crate::Image::len));
        let handle = Rc::new(Handle {
            process: process.clone(),
            inode: inode.clone(),
            number: handle,
            orphans: Cell::new(0),
            changing: Cell::new(0),
            ended: Notify::new(),
        });
        SimFile { process, inode, path, handle, mode, len }
    }

    fn note(&self, what: &'static str, at: Span) {
        let machine = &self.process.host.0.machine;
        machine.note(what, self.inode.number << 48 ^ at.start, at.len);
        machine.say(|| format!("{what} {} {at:?}", self.path));
    }

    /// A change: issued now, landed later.
    async fn change(&self, op: Op, effect: Effect) -> Result<()> {
        let process = &self.process;
        if process.is_dead() {
            return pending().await;
        }
        if !self.mode.write {
            return Err(BlockError::from_errno(BlockError::EBADF));
        }
        let machine = process.host.0.machine.clone();
        let d = draw(process, &self.path, op);
        let split = {
            let p = process.host.0.profile.borrow();
            !d.inline && d.fault.is_none() && effect.sectors() > 1 && machine.draw(|r| r.chance(p.split))
        };
        let id = self.inode.issue(process.id, effect);
        let (inode, m) = (self.inode.clone(), machine.clone());
        let finish = move || {
            let (existed, result) = match d.fault {
                Some(Fault::Errno(n)) => (m.draw(|r| inode.fail(id, false, r)), Err(n)),
                Some(Fault::Torn(n)) => (m.draw(|r| inode.fail(id, true, r)), Err(n)),
                _ => (inode.land(id), Ok(())),
            };
            m.note("landed", id, u64::from(existed));
            result.map_err(BlockError::from_errno)
        };
        if d.inline {
            let r = finish();
            self.len.set(self.inode.with_cache(crate::Image::len));
            return r;
        }
        let (sender, receiver) = oneshot();
        let (carried, _awaited) = under_way(&self.handle, true);
        let end = move || {
            sender.send(finish());
            drop(carried);
        };
        if d.fault == Some(Fault::Hang) {
            process.host.hang(end);
        } else {
            if split {
                let (inode, m) = (self.inode.clone(), machine.clone());
                machine.at(machine.now() + d.delay / 2, move || m.draw(|r| inode.land_part(id, r)));
            }
            machine.at(machine.now() + d.delay, end);
        }
        match receiver.await {
            Some(r) if !process.is_dead() => {
                self.len.set(self.inode.with_cache(crate::Image::len));
                r
            }
            _ => pending().await,
        }
    }

    /// [`run`] for this file.
    async fn ask<T: 'static>(&self, op: Op, at_end: impl FnOnce(bool) -> Result<T> + 'static) -> Result<T> {
        run(&self.process, Some(&self.handle), &self.path, op, at_end).await
    }

    fn past_device(&self, end: u64) -> bool {
        self.inode.kind == FileKind::BlockDevice && end > self.inode.with_cache(crate::Image::len)
    }
}

impl File for SimFile {
    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move {
            self.note("read", at);
            let (inode, m) = (self.inode.clone(), self.process.host.0.machine.clone());
            self.ask(Op::Read, move |rotten| {
                let mut bytes = inode.with_cache(|c| c.read(at));
                if rotten && !bytes.is_empty() {
                    let (byte, bit) = m.draw(|r| (r.index(bytes.len()), r.below(8)));
                    bytes[byte] ^= 1 << bit;
                }
                Ok(Data::from(bytes))
            })
            .await
        })
    }

    fn write(&self, offset: u64, data: Data) -> Io<'_> {
        Box::pin(async move {
            let at = Span::new(offset, data.len() as u64);
            self.note("write", at);
            if self.past_device(at.end()) {
                return Err(BlockError::from_errno(BlockError::ENOSPC));
            }
            if at.is_empty() {
                return Ok(());
            }
            self.change(Op::Write, Effect::Write { offset, data }).await
        })
    }

    fn barrier(&self) -> Io<'_> {
        Box::pin(async move {
            self.note("barrier", Span::default());
            let point = self.inode.barrier_point();
            let inode = self.inode.clone();
            let host = self.process.host.clone();
            self.ask(Op::Barrier, move |_| {
                host.0.machine.note("durable", inode.number, 0);
                inode.make_durable(point);
                host.names_are_durable(|_, i| i.number == inode.number);
                Ok(())
            })
            .await
        })
    }

    fn may_still_change(&self) -> bool {
        self.handle.changing.get() > 0
    }

    fn settle(&self) -> Io<'_> {
        Box::pin(async move {
            while self.handle.orphans.get() > 0 {
                self.handle.ended.wait().await;
            }
            Ok(())
        })
    }

    fn zero(&self, at: Span, how: Punch) -> Io<'_> {
        Box::pin(async move {
            self.note("zero", at);
            if !self.process.host.0.profile.borrow().can_zero {
                return Err(BlockError::from_errno(BlockError::ENOTSUP));
            }
            self.change(Op::Zero, Effect::Zero { at, keep: how == Punch::Keep }).await
        })
    }

    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(async move {
            self.note("discard", at);
            if !self.process.host.0.profile.borrow().can_discard {
                return Err(BlockError::from_errno(BlockError::ENOTSUP));
            }
            self.change(Op::Discard, Effect::Zero { at, keep: false }).await
        })
    }

    fn allocate(&self, at: Span) -> Io<'_> {
        Box::pin(async move {
            self.note("allocate", at);
            if self.inode.kind == FileKind::BlockDevice {
                return Err(BlockError::from_errno(BlockError::ENOTSUP));
            }
            self.change(Op::Allocate, Effect::Allocate(at)).await
        })
    }

    fn set_len(&self, len: u64) -> Io<'_> {
        Box::pin(async move {
            self.note("set_len", Span::new(0, len));
            if self.inode.kind == FileKind::BlockDevice {
                return Err(BlockError::from_errno(BlockError::ENOTSUP));
            }
            self.change(Op::SetLen, Effect::SetLen(len)).await
        })
    }

    fn info(&self) -> Io<'_, FileInfo> {
        Box::pin(async move {
            let (len, allocated) = self.inode.with_cache(|c| (c.len(), c.allocated()));
            self.len.set(len);
            Ok(FileInfo {
                kind: self.inode.kind,
                device: 1,
                inode: self.inode.number,
                len,
                allocated,
                alignment: if self.mode.direct { DIRECT_ALIGNMENT } else { 1 },
                writable: self.mode.write,
                modified: 0,
                born: 0,
            })
        })
    }

    fn len_hint(&self) -> u64 {
        self.len.get()
    }

    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move {
            self.note("extents", at);
            let inode = self.inode.clone();
            self.ask(Op::Extents, move |_| Ok(inode.with_cache(|c| c.extents(at)))).await
        })
    }

    fn copy_to<'a>(&'a self, at: Span, to: &'a Rc<dyn File>, to_offset: u64) -> Io<'a, u64> {
        Box::pin(async move {
            self.note("copy", at);
            let target = to.as_any().downcast_ref::<SimFile>();
            let can = self.process.host.0.profile.borrow().can_copy;
            let Some(target) = target.filter(|t| can && Rc::ptr_eq(&t.process, &self.process)) else {
                return Err(BlockError::from_errno(BlockError::ENOTSUP));
            };
            let at = at.intersect(&Span::new(0, self.inode.with_cache(crate::Image::len)));
            // the host may do less than it was asked
            let len = self
                .process
                .host
                .0
                .machine
                .draw(|r| if r.chance(0.2) { r.between(1, at.len.max(1)) } else { at.len });
            let at = Span::new(at.start, len.min(at.len));
            if at.is_empty() {
                return Ok(0);
            }
            let inode = self.inode.clone();
            let data = self.ask(Op::Copy, move |_| Ok(inode.with_cache(|c| c.read(at)))).await?;
            let effect = Effect::Write { offset: to_offset, data: Data::from(data) };
            target.change(Op::Write, effect).await?;
            Ok(at.len)
        })
    }

    fn lock(&self, range: LockRange) -> Io<'_> {
        Box::pin(async move {
            if self.process.is_dead() {
                return pending().await;
            }
            if self.inode.lock(self.handle.number, range) {
                Ok(())
            } else {
                Err(BlockError::new(block::ErrorKind::Busy, "Resource temporarily unavailable")
                    .with_errno(BlockError::EAGAIN))
            }
        })
    }

    fn unlock(&self, start: u64, len: u64) -> Io<'_> {
        Box::pin(async move {
            self.inode.unlock(self.handle.number, start, len);
            Ok(())
        })
    }

    fn can_lock(&self, range: LockRange) -> Io<'_, bool> {
        Box::pin(async move { Ok(self.inode.lock_is_free(self.handle.number, range)) })
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
