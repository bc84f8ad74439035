//! The border between a parent and a node: every request crosses it, and it is checked here.

use crate::cell::NodeCell;
use crate::perm::Demand;
use block::{Data, Extent, Limits, ReqFlags, Result, Span};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// What an edge is for; decides walks and messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// A format's or filter's main child, holding metadata (and data).
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
    /// Not yet known (the node above is still being opened) or a node: its name once it is in the graph.
    Node(RefCell<Option<String>>),
    /// A job, by id (messages: "block job 'ID'"; QMP graph type `block-job`).
    Job(String),
    /// An export or another user without a name (messages: "an unnamed block device").
    Backend(String),
}

/// A parent's hold on a node.
pub struct Edge {
    /// Name in the graph (`file`, `backing`, `root`, `main node`, `source`, `target`).
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Who holds it.
    pub parent: Parent,
    pub(crate) child: RefCell<Rc<NodeCell>>,
    pub(crate) demand: Cell<Demand>,
}

impl Edge {
    /// An edge onto a node that is in no graph, with no demand: for tools that work on one image, and for tests.
    pub fn loose(name: &str, role: Role, parent: Parent, child: Rc<NodeCell>) -> Rc<Edge> {
        let demand = Cell::new(Demand::NOTHING);
        Rc::new(Edge { name: name.to_owned(), role, parent, child: RefCell::new(child), demand })
    }
    /// The node at the lower end, now. It may change whenever the caller waits without being inside a request.
    pub fn child(&self) -> Rc<NodeCell> {
        self.child.borrow().clone()
    }
    /// What this edge asks for now.
    pub fn demand(&self) -> Demand {
        self.demand.get()
    }
    /// Virtual length of the child in bytes.
    pub fn len(&self) -> u64 {
        self.child.borrow().node().len()
    }
    /// Whether the child has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Limits of the child as the parent sees them: requests of any alignment are taken (read-modify-write is done
    /// here), so `request_alignment` is only a hint.
    pub fn limits(&self) -> Limits {
        self.child.borrow().node().limits()
    }
    /// Reads exactly `at`; bytes past the end of the node are an error (`OutOfRange`).
    pub async fn read(&self, at: Span) -> Result<Data> {
        self.child().read(at).await
    }
    /// Writes `data` at `offset`.
    pub async fn write(&self, offset: u64, data: Data, flags: ReqFlags) -> Result<()> {
        self.child().write(offset, data, flags).await
    }
    /// Makes `at` read as zero.
    pub async fn zero(&self, at: Span, flags: ReqFlags) -> Result<()> {
        self.child().zero(at, flags).await
    }
    /// The bytes are not needed any more.
    pub async fn discard(&self, at: Span) -> Result<()> {
        self.child().discard(at).await
    }
    /// What the child layer says of `at`: non-empty for a non-empty span, starting at its start, perhaps not to its end.
    pub async fn extents(&self, at: Span) -> Result<Vec<Extent>> {
        self.child().node().extents(at).await
    }
    /// Everything completed before is on stable storage after.
    pub async fn flush(&self) -> Result<()> {
        self.child().flush().await
    }
}
