//! `commit_top`: stands between an overlay and the image that is being committed into what is below it.
//!
//! What must stay true: readers see what they saw before (the images below keep showing it, whatever the base gets); nobody
//! below has to promise its users anything for that, since the base alone is inconsistent meanwhile.

use super::{filter_basics, filter_passes};
use block::{BlockError, Data, ErrorKind, Io, Prealloc, ReqFlags, Span};
use graph::{Demand, Edge, Node, NodeDetails};
use std::rc::Rc;

/// The filter.
pub struct CommitTop {
    below: Rc<Edge>,
}

impl CommitTop {
    /// A filter above the child of `below` (an edge of role `Filtered`, named `backing`).
    pub fn new(below: Rc<Edge>) -> Rc<CommitTop> {
        Rc::new(CommitTop { below })
    }
}

fn read_only(what: &str) -> BlockError {
    BlockError::new(ErrorKind::ReadOnly, format!("an image that is being committed takes no {what}"))
}

impl Node for CommitTop {
    filter_basics!(below);
    filter_passes!(below: limits, read, extents, flush, close);

    fn driver(&self) -> &'static str {
        "commit_top"
    }
    fn wants(&self, _: &Edge, _: Demand, _: bool) -> Demand {
        Demand::NOTHING
    }
    fn write(&self, _: Span, _: Data, _: ReqFlags) -> Io<'_> {
        Box::pin(async { Err(read_only("writes")) })
    }
    fn zero(&self, _: Span, _: ReqFlags) -> Io<'_> {
        Box::pin(async { Err(read_only("writes")) })
    }
    fn discard(&self, _: Span) -> Io<'_> {
        Box::pin(async { Err(read_only("discards")) })
    }
    fn resize(&self, _: u64, _: Prealloc) -> Io<'_> {
        Box::pin(async { Err(read_only("other length")) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move { self.below.child().node().details().await })
    }
}
