//! `mirror_top`: sits above the source of a copy and lets whoever copies see each request of the guest.
//!
//! The node itself decides nothing: a [`Tap`] does (from the crate `copy`; this layer does not know it). Without a tap,
//! before a job begins and after it let go, requests go straight to the source. What must stay true: a request is
//! handled by the tap that was there when it came, to its end.

use block::{BlockError, Data, Extent, Io, Kind, Limits, Prealloc, ReqFlags, Span};
use graph::{CopyRecord, Demand, Edge, Node, NodeDetails};
use std::any::Any;
use std::cell::RefCell;
use std::rc::Rc;

/// Carries out the requests of a guest on the source (and, as the copy needs it, elsewhere).
pub trait Tap {
    /// Reads from `source`.
    fn read<'a>(&'a self, source: &'a Edge, at: Span) -> Io<'a, Data>;
    /// Writes to `source`.
    fn write<'a>(&'a self, source: &'a Edge, at: Span, data: Data, flags: ReqFlags) -> Io<'a>;
    /// Zeroes in `source`.
    fn zero<'a>(&'a self, source: &'a Edge, at: Span, flags: ReqFlags) -> Io<'a>;
    /// Discards in `source`.
    fn discard<'a>(&'a self, source: &'a Edge, at: Span) -> Io<'a>;
    /// What is marked for copying now.
    fn record(&self) -> CopyRecord;
}

/// The filter.
pub struct MirrorTop {
    source: Rc<Edge>,
    tap: RefCell<Option<Rc<dyn Tap>>>,
}

impl MirrorTop {
    /// A filter above the child of `source` (an edge of role `Filtered`, named `backing`), without a tap.
    pub fn new(source: Rc<Edge>) -> Rc<MirrorTop> {
        Rc::new(MirrorTop { source, tap: RefCell::new(None) })
    }

    /// Lets `tap` carry out the requests that come from now on; `None` lets them pass.
    pub fn set_tap(&self, tap: Option<Rc<dyn Tap>>) {
        let old = self.tap.replace(tap);
        drop(old);
    }

    fn tap(&self) -> Option<Rc<dyn Tap>> {
        self.tap.borrow().clone()
    }
}

impl Node for MirrorTop {
    fn driver(&self) -> &'static str {
        "mirror_top"
    }
    fn len(&self) -> u64 {
        self.source.len()
    }
    fn limits(&self) -> Limits {
        self.source.limits()
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        vec![self.source.clone()]
    }
    fn wants(&self, _: &Edge, above: Demand, _: bool) -> Demand {
        above
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        match self.tap() {
            None => Box::pin(self.source.read(at)),
            Some(tap) => Box::pin(async move { tap.read(&self.source, at).await }),
        }
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        match self.tap() {
            None => Box::pin(self.source.write(at.start, data, flags)),
            Some(tap) => Box::pin(async move { tap.write(&self.source, at, data, flags).await }),
        }
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        match self.tap() {
            None => Box::pin(self.source.zero(at, flags)),
            Some(tap) => Box::pin(async move { tap.zero(&self.source, at, flags).await }),
        }
    }
    fn discard(&self, at: Span) -> Io<'_> {
        match self.tap() {
            None => Box::pin(self.source.discard(at)),
            Some(tap) => Box::pin(async move { tap.discard(&self.source, at).await }),
        }
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move { Ok(vec![Extent::new(at, Kind::Unallocated)]) })
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(self.source.flush())
    }
    fn resize(&self, _: u64, _: Prealloc) -> Io<'_> {
        Box::pin(async {
            Err(BlockError::new(block::ErrorKind::Busy, "a disk cannot be resized while it is mirrored"))
        })
    }
    fn set_writable(&self, _: bool) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> Io<'_> {
        self.set_tap(None);
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move {
            let details = self.source.child().node().details().await?;
            Ok(NodeDetails { record: self.tap().map(|tap| tap.record()), ..details })
        })
    }
    fn filtered(&self) -> Option<Rc<Edge>> {
        Some(self.source.clone())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}
