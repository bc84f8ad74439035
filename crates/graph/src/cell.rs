//! A node in its place: name, options that every driver has, parents, dirty bitmaps, blockers.

use crate::Node;
use block::{Data, ReqFlags, Result, Span};
use std::rc::Rc;

/// A node with all that the graph knows of it.
pub struct NodeCell {
    name: String,
    node: Rc<dyn Node>,
}

impl NodeCell {
    /// A node that is in no graph: for tools that work on one image, and for tests.
    pub fn loose(name: &str, node: Rc<dyn Node>) -> Rc<NodeCell> {
        Rc::new(NodeCell { name: name.to_owned(), node })
    }
    /// Node name, unique in the graph (`#blockNNN` where the daemon invented it).
    pub fn name(&self) -> &str {
        &self.name
    }
    /// The driver.
    pub fn node(&self) -> &Rc<dyn Node> {
        &self.node
    }
    pub(crate) async fn read(&self, at: Span) -> Result<Data> {
        self.node.read(at).await
    }
    pub(crate) async fn write(&self, offset: u64, data: Data, flags: ReqFlags) -> Result<()> {
        self.node.write(Span::new(offset, data.len() as u64), data, flags).await
    }
    pub(crate) async fn zero(&self, at: Span, flags: ReqFlags) -> Result<()> {
        self.node.zero(at, flags).await
    }
    pub(crate) async fn discard(&self, at: Span) -> Result<()> {
        self.node.discard(at).await
    }
    pub(crate) async fn flush(&self) -> Result<()> {
        self.node.flush().await
    }
}
