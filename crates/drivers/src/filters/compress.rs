//! `compress`: what is written is stored compressed.
//!
//! Formats compress whole clusters, so the filter's alignment is the cluster: the common part of a node fills up what is
//! shorter.

use super::{Given, filter_basics};
use block::{BlockError, Data, Extent, Io, Kind, Limits, Prealloc, ReqFlags, Result, Span};
use graph::{Demand, Edge, Node, NodeDetails, walk};
use std::rc::Rc;

/// The filter.
pub struct Compress {
    file: Rc<Edge>,
}

impl Compress {
    /// A filter in front of the child of `file` (an edge of role `Filtered`, named `file`), which must be able to compress.
    pub fn open(file: Rc<Edge>) -> Result<Rc<Compress>> {
        let format = walk::skip_filters(&file.child()).node().driver();
        if format != "qcow2" {
            return Err(BlockError::unsupported(format!(
                "Compression is not supported for underlying format: {format}"
            )));
        }
        Ok(Rc::new(Compress { file }))
    }

    /// The part of an aligned request that the disk has.
    fn inside(&self, at: Span) -> Span {
        at.intersect(&Span::new(0, self.file.len()))
    }
}

impl Node for Compress {
    filter_basics!(file);

    fn driver(&self) -> &'static str {
        "compress"
    }
    fn limits(&self) -> Limits {
        let below = self.file.limits();
        Limits { request_alignment: below.cluster_size.max(below.request_alignment), ..below }
    }
    fn wants(&self, _: &Edge, above: Demand, _: bool) -> Demand {
        above
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move {
            let there = self.inside(at);
            let mut data = self.file.read(there).await?;
            data.append(Data::zeroes((at.len - there.len) as usize));
            Ok(data)
        })
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            let there = self.inside(at);
            let data = data.slice(0, there.len as usize);
            self.file.write(there.start, data, ReqFlags { compressed: true, ..flags }).await
        })
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(self.file.zero(self.inside(at), flags))
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(self.file.discard(self.inside(at)))
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move { Ok(vec![Extent::new(at, Kind::Unallocated)]) })
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(self.file.flush())
    }
    fn resize(&self, len: u64, prealloc: Prealloc) -> Io<'_> {
        Box::pin(self.file.resize(len, prealloc))
    }
    fn close(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move { Given::default().details(self.driver(), &self.file).await })
    }
}
