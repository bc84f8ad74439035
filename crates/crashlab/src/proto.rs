//! The layer below the image under test.

use block::{BlockError, Data, Extent, Io, Kind, Limits, ReqFlags, Span};
use graph::{Demand, Edge, Node, NodeDetails};
use std::rc::Rc;

/// A read-only layer below.
pub struct Backing(pub Data);

impl Backing {
    fn refuse(&self) -> Io<'_> {
        Box::pin(async { Err(BlockError::from_errno(BlockError::EROFS)) })
    }
}

impl Node for Backing {
    fn driver(&self) -> &'static str {
        "raw"
    }
    fn len(&self) -> u64 {
        self.0.len() as u64
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        Vec::new()
    }
    fn wants(&self, _edge: &Edge, above: Demand, _writable: bool) -> Demand {
        above
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move { Ok(self.0.slice(at.start as usize, at.len as usize)) })
    }
    fn write(&self, _at: Span, _data: Data, _flags: ReqFlags) -> Io<'_> {
        self.refuse()
    }
    fn zero(&self, _at: Span, _flags: ReqFlags) -> Io<'_> {
        self.refuse()
    }
    fn discard(&self, _at: Span) -> Io<'_> {
        self.refuse()
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move { Ok(vec![Extent::new(at, Kind::Data)]) })
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn set_writable(&self, _writable: bool) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async { Ok(NodeDetails::default()) })
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
