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

/// In front of a [`FileNode`]: each operation takes a random number of turns, so that requests overtake each other, and goes on
/// when its future is dropped, as a kernel's does.
pub struct LateNode {
    inner: Rc<FileNode>,
    env: env::Env,
    rng: std::cell::RefCell<super::history::Rng>,
    under_way: Rc<std::cell::Cell<usize>>,
    /// Reads that come while this is set wait until it is not.
    pub hold_reads: Rc<std::cell::Cell<bool>>,
}

impl LateNode {
    /// Over an open file; `under_way` counts operations that have not ended.
    pub fn new(
        env: &env::Env,
        file: Rc<dyn File>,
        seed: u64,
        under_way: &Rc<std::cell::Cell<usize>>,
    ) -> Rc<LateNode> {
        Rc::new(LateNode {
            inner: FileNode::new(file),
            env: env.clone(),
            rng: std::cell::RefCell::new(super::history::Rng(seed)),
            under_way: under_way.clone(),
            hold_reads: Rc::default(),
        })
    }

    fn late<T: 'static>(
        &self,
        work: impl std::future::Future<Output = Result<T>> + 'static,
    ) -> Io<'static, T> {
        let turns = self.rng.borrow_mut().below(6);
        let (tx, rx) = env::sync::oneshot();
        let (env, under_way) = (self.env.clone(), self.under_way.clone());
        under_way.set(under_way.get() + 1);
        self.env.spawn("late", async move {
            for _ in 0..turns {
                env.yield_now().await;
            }
            let r = work.await;
            under_way.set(under_way.get() - 1);
            tx.send(r);
        });
        Box::pin(async move {
            match rx.await {
                Some(r) => r,
                None => Err(block::BlockError::new(block::ErrorKind::Cancelled, "late node")),
            }
        })
    }
}

impl Node for LateNode {
    fn driver(&self) -> &'static str {
        "late"
    }
    fn len(&self) -> u64 {
        self.inner.len()
    }
    fn limits(&self) -> block::Limits {
        self.inner.limits()
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        Vec::new()
    }
    fn wants(&self, _edge: &Edge, above: Demand, _writable: bool) -> Demand {
        above
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        let (n, env, hold) = (self.inner.clone(), self.env.clone(), self.hold_reads.clone());
        self.late(async move {
            while hold.get() {
                env.yield_now().await;
            }
            n.read(at).await
        })
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        let n = self.inner.clone();
        self.late(async move { n.write(at, data, flags).await })
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        let n = self.inner.clone();
        self.late(async move { n.zero(at, flags).await })
    }
    fn discard(&self, at: Span) -> Io<'_> {
        let n = self.inner.clone();
        self.late(async move { n.discard(at).await })
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        self.inner.extents(at)
    }
    fn flush(&self) -> Io<'_> {
        let n = self.inner.clone();
        self.late(async move { n.flush().await })
    }
    fn resize(&self, len: u64, prealloc: Prealloc) -> Io<'_> {
        let n = self.inner.clone();
        self.late(async move { n.resize(len, prealloc).await })
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
