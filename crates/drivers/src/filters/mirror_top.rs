//! `mirror_top`: sits above the source of a copy and lets whoever copies see each request of the guest. A stream, which copies
//! into the very disk its users write to, needs the same and shows it as `copy-on-read`, as QSD does.
//!
//! The node itself decides nothing: a [`Tap`] does (from the crate `copy`; this layer does not know it). Without a tap,
//! before a job begins and after it let go, requests go straight to the source. What must stay true: a request is
//! handled by the tap that was there when it came, to its end.

use super::{filter_basics, filter_passes};
use block::{BlockError, Data, Io, Prealloc, ReqFlags, Span};
use graph::{CopyRecord, Demand, Edge, Node, NodeDetails, Perms};
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

/// For which kind of job the filter is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// A copy to a disk of its own.
    Mirror,
    /// A copy into an image below, which is inconsistent meanwhile and so is promised to nobody.
    Commit,
    /// A copy from images below.
    Stream,
}

/// The filter.
pub struct MirrorTop {
    source: Rc<Edge>,
    purpose: Purpose,
    tap: RefCell<Option<Rc<dyn Tap>>>,
}

impl MirrorTop {
    /// A filter above the child of `source` (an edge of role `Filtered`, named `backing`, for a stream `file`), without a
    /// tap.
    pub fn with(source: Rc<Edge>, purpose: Purpose) -> Rc<MirrorTop> {
        Rc::new(MirrorTop { source, purpose, tap: RefCell::new(None) })
    }

    /// A filter for a mirror.
    pub fn new(source: Rc<Edge>) -> Rc<MirrorTop> {
        MirrorTop::with(source, Purpose::Mirror)
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
    filter_basics!(source);
    filter_passes!(source: limits, extents, flush);

    fn driver(&self) -> &'static str {
        match self.purpose {
            Purpose::Mirror | Purpose::Commit => "mirror_top",
            Purpose::Stream => "copy-on-read",
        }
    }
    fn wants(&self, _: &Edge, above: Demand, _: bool) -> Demand {
        let needs = match self.purpose {
            Purpose::Mirror => above.needs,
            Purpose::Commit => above.needs.without(Perms::CONSISTENT_READ),
            Purpose::Stream => above.needs.with(Perms::CONSISTENT_READ).with(Perms::WRITE_UNCHANGED),
        };
        Demand { needs, ..above }
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
    fn resize(&self, _: u64, _: Prealloc) -> Io<'_> {
        Box::pin(async {
            Err(BlockError::new(block::ErrorKind::Busy, "a disk cannot be resized while a job copies it"))
        })
    }
    fn close(&self) -> Io<'_> {
        self.set_tap(None);
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move {
            let details = self.source.child().node().details().await?;
            let tap = self.tap().filter(|_| self.purpose != Purpose::Stream);
            Ok(NodeDetails { records: tap.map(|tap| tap.record()).into_iter().collect(), ..details })
        })
    }
}
