//! The node whose users see a replicated disk: passes through, forwards as a primary, or shows a secondary's view.

use super::primary::PrimaryGroup;
use super::secondary::SecondaryGroup;
use crate::lease::Lease;
use block::{BlockError, Data, Extent, Io, Kind, Limits, Prealloc, ReqFlags, Result, Span};
use graph::{Demand, Edge, Node, NodeDetails, Perms};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// What is done with the users' requests.
#[derive(Clone)]
pub enum Mode {
    /// They go to the disk.
    Unprotected,
    /// They go to the disk and to the secondaries.
    Primary(Rc<PrimaryGroup>),
    /// They see the checkpoint with their own writes over it.
    Secondary(Rc<SecondaryGroup>),
}

/// The node above a disk of a group.
pub struct Front {
    disk: Rc<Edge>,
    volume: u16,
    mode: RefCell<Mode>,
    /// Whether nobody else may write to the disk even while nobody uses this node.
    pinned: Cell<bool>,
    /// Something was written that nobody remembers.
    untracked: Cell<bool>,
    /// Why nothing is served, if so.
    closed: RefCell<Option<String>>,
    /// By whose word an owner serves, if by anybody's.
    lease: Option<Rc<Lease>>,
    /// Called when the node goes.
    when_closed: RefCell<Option<Rc<dyn Fn()>>>,
}

impl Front {
    /// Above the child of `disk` (an edge of role `Filtered`), which is number `volume` of its group.
    pub fn new(disk: Rc<Edge>, volume: u16, lease: Option<Rc<Lease>>) -> Rc<Front> {
        Rc::new(Front {
            disk,
            volume,
            mode: RefCell::new(Mode::Unprotected),
            pinned: Cell::new(false),
            untracked: Cell::new(false),
            closed: RefCell::default(),
            lease,
            when_closed: RefCell::default(),
        })
    }

    /// Whether something was written to the disk here while the group had no role.
    pub fn is_untracked(&self) -> bool {
        self.untracked.get()
    }

    /// From now on what is written is remembered.
    pub fn begin_tracking(&self) {
        self.untracked.set(false);
    }

    /// While it has no role nothing is served, for this reason; or all is.
    pub fn close_with(&self, why: Option<String>) {
        *self.closed.borrow_mut() = why;
    }

    /// `told` is called when this node goes.
    pub fn when_closed(&self, told: Rc<dyn Fn()>) {
        *self.when_closed.borrow_mut() = Some(told);
    }

    /// `request` to the disk below, unless the disk is closed; what writes is remembered as untracked.
    fn unprotected<'a, T: 'a>(
        &'a self,
        writes: bool,
        request: impl Future<Output = Result<T>> + 'a,
    ) -> Io<'a, T> {
        if let Some(why) = &*self.closed.borrow() {
            let e = BlockError::new(block::ErrorKind::Io, why.clone());
            return Box::pin(async { Err(e) });
        }
        if writes {
            self.untracked.set(true);
        }
        Box::pin(request)
    }

    /// The edge to the disk.
    pub fn disk(&self) -> &Rc<Edge> {
        &self.disk
    }

    /// The disk is this node's alone, or no longer. Takes effect with the next change of the graph.
    pub fn pin(&self, on: bool) {
        self.pinned.set(on);
    }

    /// From now on requests are handled so. Those under way end as they began.
    pub fn set_mode(&self, mode: Mode) {
        let old = self.mode.replace(mode);
        drop(old);
    }

    fn mode(&self) -> Mode {
        self.mode.borrow().clone()
    }

    /// `request`, which begins and is answered while this side may serve.
    fn owned<'a, T: 'a>(&'a self, request: Io<'a, T>) -> Io<'a, T> {
        let Some(lease) = &self.lease else { return request };
        Box::pin(async move {
            lease.held().await?;
            let answer = request.await;
            lease.held().await?;
            answer
        })
    }
}

impl Node for Front {
    fn driver(&self) -> &'static str {
        "replicated"
    }
    fn len(&self) -> u64 {
        match &*self.mode.borrow() {
            // that of the checkpoint; the disk may be longer
            Mode::Secondary(s) => s.len(self.volume),
            Mode::Primary(_) | Mode::Unprotected => self.disk.len(),
        }
    }
    fn limits(&self) -> Limits {
        self.disk.limits()
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        vec![self.disk.clone()]
    }
    /// Nobody else may write to the disk, resize it, or trust what it reads as.
    fn wants(&self, _: &Edge, above: Demand, writable: bool) -> Demand {
        if above == Demand::NOTHING && !self.pinned.get() {
            return above;
        }
        // a secondary's disk follows its primary's length
        let writes = Perms::WRITE.with(Perms::RESIZE);
        let needs = Perms::CONSISTENT_READ.with(if writable { writes } else { Perms::NONE });
        Demand { needs, shares: Perms::CONSISTENT_READ }
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        match self.mode() {
            Mode::Secondary(s) => self.owned(Box::pin(async move { s.read(self.volume, at).await })),
            Mode::Primary(p) => self.owned(Box::pin(async move { p.read(self.volume, at).await })),
            Mode::Unprotected => self.unprotected(false, self.disk.read(at)),
        }
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        match self.mode() {
            Mode::Secondary(s) => {
                self.owned(Box::pin(async move { s.write(self.volume, at, data, flags.fua).await }))
            }
            Mode::Primary(p) => {
                self.owned(Box::pin(async move { p.write(self.volume, at, Some(data), flags).await }))
            }
            Mode::Unprotected => self.unprotected(true, self.disk.write(at.start, data, flags)),
        }
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        match self.mode() {
            Mode::Secondary(s) => {
                self.owned(Box::pin(async move { s.write(self.volume, at, Data::empty(), flags.fua).await }))
            }
            Mode::Primary(p) => {
                // a fast-or-fail request may not become a slow write on this side
                self.owned(Box::pin(async move { p.write(self.volume, at, None, flags).await }))
            }
            Mode::Unprotected => self.unprotected(true, self.disk.zero(at, flags)),
        }
    }
    /// Rule D2: all replicas or none. A discard of a replicated disk does nothing, on both sides.
    fn discard(&self, at: Span) -> Io<'_> {
        match self.mode() {
            Mode::Unprotected => self.unprotected(true, self.disk.discard(at)),
            _ => Box::pin(async { Ok(()) }),
        }
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        let kind = match self.mode() {
            // what the layer below says is not what is read here
            Mode::Secondary(_) => Kind::Data,
            _ => Kind::Unallocated,
        };
        Box::pin(async move { Ok(vec![Extent::new(at, kind)]) })
    }
    fn flush(&self) -> Io<'_> {
        match self.mode() {
            Mode::Secondary(s) => self.owned(Box::pin(async move { s.flush().await })),
            Mode::Primary(p) => self.owned(Box::pin(async move { p.flush(self.volume).await })),
            Mode::Unprotected => Box::pin(self.disk.flush()),
        }
    }
    fn resize(&self, len: u64, _: Prealloc) -> Io<'_> {
        let why = match self.mode() {
            Mode::Primary(p) => return self.owned(Box::pin(async move { p.resize(self.volume, len).await })),
            Mode::Secondary(_) => "its length is that of its primary's disk",
            Mode::Unprotected => "the group has no role: its other sides would not follow",
        };
        Box::pin(async move { Err(BlockError::new(block::ErrorKind::Busy, why)) })
    }
    fn set_writable(&self, _: bool) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> Io<'_> {
        self.set_mode(Mode::Unprotected);
        if let Some(told) = self.when_closed.take() {
            told();
        }
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move { self.disk.child().node().details().await })
    }
    fn filtered(&self) -> Option<Rc<Edge>> {
        Some(self.disk.clone())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}
