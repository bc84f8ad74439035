//! `compress`: what is written is stored compressed.
//!
//! Formats compress whole clusters, so the filter's alignment is the cluster: the common part of a node fills up what is
//! shorter.

use super::{filter_basics, filter_passes, inside, read_past_end};
use block::{BlockError, Data, Io, Limits, ReqFlags, Result, Span};
use graph::{Edge, Node, walk};
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
}

impl Node for Compress {
    filter_basics!(file);
    filter_passes!(file: wants, extents, flush, resize, close, details);

    fn driver(&self) -> &'static str {
        "compress"
    }
    fn limits(&self) -> Limits {
        let below = self.file.limits();
        Limits { request_alignment: below.cluster_size.max(below.request_alignment), ..below }
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(read_past_end(&self.file, at))
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            let there = inside(&self.file, at);
            let data = data.slice(0, there.len as usize);
            self.file.write(there.start, data, ReqFlags { compressed: true, ..flags }).await
        })
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(self.file.zero(inside(&self.file, at), flags))
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(self.file.discard(inside(&self.file, at)))
    }
}
