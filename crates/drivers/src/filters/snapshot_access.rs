//! `snapshot-access`: shows what a `copy-before-write` filter keeps, read-only, to whoever reads the instant (fleecing).
//!
//! What can happen: the filter goes away, or its instant is lost, while it is read: then reads fail, they never give
//! newer bytes. A discard tells the filter that the bytes need not be kept any more.

use super::copy_before_write::{CopyBeforeWrite, Keeper};
use super::filter_passes;
use block::{BlockError, Data, Extent, Io, ReqFlags, Result, Span};
use graph::{Demand, Edge, Node, NodeDetails, Perms};
use std::any::Any;
use std::rc::Rc;

/// The node.
pub struct SnapshotAccess {
    file: Rc<Edge>,
}

impl SnapshotAccess {
    /// Shows what the child of `file` keeps. (Any child is taken; one that keeps nothing cannot be read, as in QSD.)
    pub fn new(file: Rc<Edge>) -> Rc<SnapshotAccess> {
        Rc::new(SnapshotAccess { file })
    }

    fn keeper(&self) -> Result<Rc<dyn Keeper>> {
        let child = self.file.child();
        let filter = child.node().as_any().downcast_ref::<CopyBeforeWrite>();
        filter.and_then(CopyBeforeWrite::keeper).ok_or_else(|| {
            BlockError::unsupported(format!("node '{}' keeps no snapshot that could be read", child.name()))
        })
    }
}

fn read_only<'a>() -> Io<'a> {
    Box::pin(async { Err(BlockError::unsupported("a snapshot cannot be written")) })
}

impl Node for SnapshotAccess {
    filter_passes!(file: limits, close);

    fn driver(&self) -> &'static str {
        "snapshot-access"
    }
    fn len(&self) -> u64 {
        self.file.len()
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        vec![self.file.clone()]
    }
    fn wants(&self, _: &Edge, above: Demand, _: bool) -> Demand {
        // what is written here goes nowhere, so only reading is passed on
        Demand { needs: above.needs.common(Perms::CONSISTENT_READ), shares: Perms::ALL }
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move {
            let _pass = self.file.enter().await;
            self.keeper()?.read(at).await
        })
    }
    fn write(&self, _: Span, _: Data, _: ReqFlags) -> Io<'_> {
        read_only()
    }
    fn zero(&self, _: Span, _: ReqFlags) -> Io<'_> {
        read_only()
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(async move {
            let _pass = self.file.enter().await;
            self.keeper()?.release(at).await
        })
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move {
            let _pass = self.file.enter().await;
            self.keeper()?.extents(at).await
        })
    }
    fn flush(&self) -> Io<'_> {
        // nothing was written
        Box::pin(async { Ok(()) })
    }
    fn set_writable(&self, _: bool) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move {
            let details = self.file.child().node().details().await?;
            Ok(NodeDetails { records: Vec::new(), specific: Vec::new(), dirty_flag: None, ..details })
        })
    }
    fn primary(&self) -> Option<Rc<Edge>> {
        Some(self.file.clone())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}
