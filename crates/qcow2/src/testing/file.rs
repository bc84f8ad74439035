//! A minimal protocol node over an open file.

use block::{Data, Extent, Io, Prealloc, ReqFlags, Result, Span};
use env::{File, Punch};
use graph::{Demand, Edge, Graph, Node, NodeDetails, NodeOptions, Parent, Perms, Role};
use std::rc::Rc;

/// A file as a node.
pub struct FileNode {
    file: Rc<dyn File>,
}

impl FileNode {
    /// Over an open file.
    pub fn new(file: Rc<dyn File>) -> Rc<FileNode> {
        Rc::new(FileNode { file })
    }

    /// Opens a file and gives an edge onto its node.
    ///
    /// # Errors
    /// The host's.
    pub async fn edge(env: &env::Env, path: &std::path::Path, write: bool, role: Role) -> Result<Rc<Edge>> {
        let mode = env::OpenMode { write, ..Default::default() };
        let file = env.open(path, mode).await?;
        edge_onto(env, FileNode::new(file), write, role).await
    }
}

/// An edge with every permission onto a node that is alone in a graph.
///
/// # Errors
/// None that a test expects.
pub async fn edge_onto(env: &env::Env, node: Rc<dyn Node>, write: bool, role: Role) -> Result<Rc<Edge>> {
    let graph = Graph::new(env);
    let options =
        NodeOptions { name: Some("disk".into()), read_only: !write, discard: true, ..NodeOptions::default() };
    let cell = graph.add(options, node).await?;
    let needs = if write { Perms::ALL } else { Perms::CONSISTENT_READ };
    let demand = Demand { needs, shares: Perms::ALL };
    graph.attach(&cell, "file", role, Parent::Backend("test".into()), demand).await
}

impl Node for FileNode {
    fn driver(&self) -> &'static str {
        "file"
    }
    fn len(&self) -> u64 {
        self.file.len_hint()
    }
    fn limits(&self) -> block::Limits {
        block::Limits::default()
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        Vec::new()
    }
    fn wants(&self, _edge: &Edge, above: Demand, _writable: bool) -> Demand {
        above
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        assert!(at.end() <= self.len(), "read past the end: {at}");
        self.file.read(at)
    }
    fn write(&self, at: Span, data: Data, _flags: ReqFlags) -> Io<'_> {
        assert!(at.end() <= self.len(), "write past the end: {at}");
        self.file.write(at.start, data)
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            let how = if flags.may_unmap { Punch::Release } else { Punch::Keep };
            match self.file.zero(at, how).await {
                Err(e) if e.kind() == block::ErrorKind::Unsupported => {
                    self.file.write(at.start, Data::zeroes(at.len as usize)).await
                }
                r => r,
            }
        })
    }
    fn discard(&self, at: Span) -> Io<'_> {
        self.file.discard(at)
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        self.file.extents(at)
    }
    fn flush(&self) -> Io<'_> {
        self.file.barrier()
    }
    fn resize(&self, len: u64, _prealloc: Prealloc) -> Io<'_> {
        self.file.set_len(len)
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
