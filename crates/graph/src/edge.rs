//! The border between a parent and a node: every request crosses it, and it is checked here.

use crate::DebugEvent;
use crate::cell::NodeCell;
use crate::gate::{Crowd, Gate, Gated, Pass};
use crate::node::HostBytes;
use crate::perm::{Demand, Perms};
use block::{BlockError, Data, ErrorKind, Extent, Limits, ReqFlags, Result, Span};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

/// What an edge is for; decides walks and messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// A format's main child, holding metadata (and data).
    Primary,
    /// Data of a format with an external data file.
    Data,
    /// The layer below of a copy-on-write format.
    Backing,
    /// The child a filter is in front of.
    Filtered,
    /// A further child (target of copy-before-write, quorum children).
    Other,
    /// Held by something that is no node: export, job, monitor.
    Root,
}

/// Who is at the upper end of an edge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Parent {
    /// A node: its name once it is in the graph, nothing while it is being opened.
    Node(RefCell<Option<String>>),
    /// A job (QMP graph type `block-job`).
    Job {
        /// What sort of job, as QMP calls it.
        kind: &'static str,
        /// Its id.
        id: String,
    },
    /// An export or another user without a name of its own (QMP graph type `block-backend`).
    Backend(String),
}

impl Parent {
    /// A node that is being opened.
    pub const fn opening() -> Parent {
        Parent::Node(RefCell::new(None))
    }
}

/// A parent's hold on a node. Dropping the last `Rc` lets go of the node.
pub struct Edge {
    name: String,
    role: Role,
    parent: Parent,
    id: u64,
    child: RefCell<Rc<NodeCell>>,
    demand: Cell<Demand>,
    /// What it asks for while the child is active, if it allows that the child is not.
    awake: Cell<Option<Demand>>,
    gate: Gate,
}

impl Gated for Edge {
    fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Requests wait in nodes below, at any depth.
    fn hurry(&self) -> Vec<Box<dyn Any>> {
        let (mut seen, mut todo, mut hurried) = (BTreeSet::new(), vec![self.child()], Vec::new());
        while let Some(cell) = todo.pop() {
            if seen.insert(cell.id()) {
                hurried.extend(cell.node().hurry());
                todo.extend(cell.node().edges().iter().map(|e| e.child()));
            }
        }
        hurried
    }
}

impl Edge {
    pub(crate) fn new(
        id: u64,
        child: Rc<NodeCell>,
        name: &str,
        role: Role,
        parent: Parent,
        demand: Demand,
    ) -> Rc<Edge> {
        Rc::new(Edge {
            name: name.to_owned(),
            role,
            parent,
            id,
            child: RefCell::new(child),
            demand: Cell::new(demand),
            awake: Cell::new(None),
            gate: Gate::new(),
        })
    }

    /// Name in the graph (`file`, `backing`, `root`, `main node`, `source`, `target`).
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is for.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Who holds it.
    pub fn parent(&self) -> &Parent {
        &self.parent
    }

    /// A number that no other edge of the graph has or had.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The name of the parent node, if the parent is a node in the graph.
    pub fn parent_node(&self) -> Option<String> {
        match &self.parent {
            Parent::Node(name) => name.borrow().clone(),
            _ => None,
        }
    }

    /// The node at the lower end, now. It may change whenever the caller waits without being inside a request.
    pub fn child(&self) -> Rc<NodeCell> {
        self.child.borrow().clone()
    }

    pub(crate) fn point_at(&self, child: Rc<NodeCell>) {
        let old = self.child.replace(child);
        drop(old);
    }

    /// What this edge asks for now.
    pub fn demand(&self) -> Demand {
        self.demand.get()
    }

    pub(crate) fn set_demand(&self, demand: Demand) {
        self.demand.set(demand);
    }

    /// What it asks for while the child is active; nothing if it does not allow that the child is not.
    pub(crate) fn awake(&self) -> Option<Demand> {
        self.awake.get()
    }

    pub(crate) fn set_awake(&self, demand: Demand) {
        self.awake.set(Some(demand));
    }

    /// Whether somebody keeps its gate closed.
    pub(crate) fn is_shut(&self) -> bool {
        self.gate.is_closed()
    }

    /// See [`Gate::carry`].
    pub(crate) fn carry(&self, crowd: &Rc<Crowd>, depth: usize) {
        self.gate.carry(crowd, depth);
    }

    /// See [`Gate::disperse`].
    pub(crate) fn disperse(&self) {
        self.gate.disperse();
    }

    /// Requests inside.
    pub fn in_flight(&self) -> usize {
        self.gate.inside()
    }

    /// Virtual length of the child in bytes.
    pub fn len(&self) -> u64 {
        self.child.borrow().node().len()
    }

    /// Whether the child has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Limits of the child. Requests of any alignment and length are taken (read-modify-write and splitting are done
    /// below this edge), so they are hints for speed.
    pub fn limits(&self) -> Limits {
        self.child.borrow().node().limits()
    }

    /// Enters for a request that is not one of the disk's own (reading what a filter keeps). The child stays the same, and
    /// no change of the graph touches it, until the pass is dropped.
    pub async fn enter(&self) -> Pass<'_> {
        self.gate.enter().await
    }

    /// Reads exactly `at`; bytes past the end of the node are an error (`OutOfRange`).
    pub async fn read(&self, at: Span) -> Result<Data> {
        let _pass = self.gate.enter().await;
        let child = self.child();
        self.check(&child, at, "read")?;
        let data = child.read(at).await?;
        debug_assert_eq!(data.len() as u64, at.len, "node {} gave another length", child.name());
        Ok(data)
    }

    /// As [`Edge::read`]; what lies behind the end of the node (as it is once the gate is open) reads as zeroes.
    pub async fn read_filled(&self, at: Span) -> Result<Data> {
        let _pass = self.gate.enter().await;
        self.child().read_filled(at).await
    }

    /// Writes `data` at `offset`.
    pub async fn write(&self, offset: u64, data: Data, flags: ReqFlags) -> Result<()> {
        let _pass = self.gate.enter().await;
        let child = self.child();
        self.check(&child, Span::new(offset, data.len() as u64), "write")?;
        self.check_write(&child, flags)?;
        child.write(offset, data, flags).await
    }

    /// See [`NodeCell::expect_change`].
    pub async fn expect_change(&self, at: Span) -> Result<()> {
        let _pass = self.gate.enter().await;
        self.child().expect_change(at).await
    }

    /// Makes `at` read as zero.
    pub async fn zero(&self, at: Span, flags: ReqFlags) -> Result<()> {
        let _pass = self.gate.enter().await;
        let child = self.child();
        self.check(&child, at, "write zeroes")?;
        self.check_write(&child, flags)?;
        child.zero(at, flags).await
    }

    /// The bytes are not needed any more. Does nothing where the node's option `discard` is `ignore`.
    pub async fn discard(&self, at: Span) -> Result<()> {
        let _pass = self.gate.enter().await;
        let child = self.child();
        self.check(&child, at, "discard")?;
        self.check_write(&child, ReqFlags::NONE)?;
        child.discard(at).await
    }

    /// What the child layer alone says of `at`: non-empty for a non-empty span, from its start, perhaps not to its end.
    pub async fn extents(&self, at: Span) -> Result<Vec<Extent>> {
        let _pass = self.gate.enter().await;
        let child = self.child();
        self.check(&child, at, "block status")?;
        child.extents(at).await
    }

    /// What the whole chain says of `at`; see [`crate::walk::status`].
    pub async fn status(&self, at: Span) -> Result<Vec<crate::walk::ChainExtent>> {
        self.status_above(at, None).await
    }

    /// What the chain above `base` says of `at`; see [`crate::walk::status`].
    pub async fn status_above(
        &self,
        at: Span,
        base: Option<&Rc<NodeCell>>,
    ) -> Result<Vec<crate::walk::ChainExtent>> {
        let _pass = self.gate.enter().await;
        let child = self.child();
        self.check(&child, at, "block status")?;
        crate::walk::status(&child, at, base).await
    }

    /// The hashes of the leaves of `at`, as [`crate::Node::leaf_hashes`] says.
    pub async fn leaf_hashes(&self, at: Span) -> Result<Option<Vec<[u8; 32]>>> {
        let _pass = self.gate.enter().await;
        let child = self.child();
        self.check(&child, at, "read")?;
        child.node().leaf_hashes(at).await
    }

    /// Everything completed before is on stable storage after.
    pub async fn flush(&self) -> Result<()> {
        let _pass = self.gate.enter().await;
        self.child().flush().await
    }

    /// Tells the child that its parent is about to take the step `event`.
    pub fn announce(&self, event: DebugEvent) {
        self.child.borrow().node().debug_event(event);
    }

    /// Changes the length of the child. The edge needs the permission `resize`.
    pub async fn resize(&self, len: u64, prealloc: block::Prealloc) -> Result<()> {
        let _pass = self.gate.enter().await;
        let child = self.child();
        if !self.demand.get().needs.has(Perms::RESIZE) {
            return Err(self.lacks(&child, "resize"));
        }
        child.resize(len, prealloc).await
    }

    /// Copies from this edge's node to that of `to` without the bytes passing through here, as [`crate::Node::copy_to`] says.
    /// Both spans must be inside.
    pub async fn copy_to(&self, at: Span, to: &Edge, to_offset: u64) -> Result<u64> {
        let _other = to.gate.enter().await;
        let onto = to.child();
        to.check(&onto, Span::new(to_offset, at.len), "write")?;
        to.check_write(&onto, ReqFlags::NONE)?;
        self.copy_onto(at, &onto, to_offset).await
    }

    /// As [`Edge::copy_to`], for nodes on the way down: the caller is inside the edge to `onto`.
    pub async fn copy_onto(&self, at: Span, onto: &NodeCell, to_offset: u64) -> Result<u64> {
        let _pass = self.gate.enter().await;
        let from = self.child();
        self.check(&from, at, "read")?;
        from.copy_to(at, onto, to_offset).await
    }

    /// Writes bytes that lie in a file of the host, as [`crate::Node::write_from`] says.
    pub async fn write_from(&self, offset: u64, from: HostBytes) -> Result<()> {
        let _pass = self.gate.enter().await;
        let child = self.child();
        self.check(&child, Span::new(offset, from.at.len), "write")?;
        self.check_write(&child, ReqFlags::NONE)?;
        child.write_from(offset, from).await
    }

    fn check(&self, child: &NodeCell, at: Span, what: &str) -> Result<()> {
        let len = child.node().len();
        if at.end() <= len {
            return Ok(());
        }
        let errno = if what.starts_with("write") { BlockError::ENOSPC } else { BlockError::EINVAL };
        let message = format!("{what} at {at} is outside node '{}' of {len} bytes", child.name());
        Err(BlockError::new(ErrorKind::OutOfRange, message).with_errno(errno))
    }

    /// Fails while the child is inactive: somebody else may be changing its image.
    pub fn check_active(&self) -> Result<()> {
        let child = self.child.borrow();
        if child.is_active() {
            return Ok(());
        }
        let message = format!("node '{}' is inactive", child.name());
        Err(BlockError::new(ErrorKind::Permission, message).with_errno(BlockError::EPERM))
    }

    fn check_write(&self, child: &NodeCell, flags: ReqFlags) -> Result<()> {
        let needs = self.demand.get().needs;
        if needs.has(Perms::WRITE) || (flags.unchanged && needs.has(Perms::WRITE_UNCHANGED)) {
            return Ok(());
        }
        Err(self.lacks(child, "write"))
    }

    fn lacks(&self, child: &NodeCell, what: &str) -> BlockError {
        BlockError::new(
            ErrorKind::ReadOnly,
            format!("the user of node '{}' as '{}' has no {what} permission", child.name(), self.name),
        )
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.child.borrow().lost_parent();
    }
}

impl std::fmt::Debug for Edge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "edge {}#{} onto {:?}", self.name, self.id, self.child.borrow())
    }
}
