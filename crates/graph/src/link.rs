//! Links: what stands between a node and bytes that a peer holds.
//!
//! What can happen: the peer vanishes (killed, powered off, cut off), freezes, or comes back as another disk. What must stay
//! true: a loss is counted before any request that it took with it fails, and before any later request succeeds; so whoever
//! finds the count unchanged knows that all answers since came from a peer that was there all the time. What a peer had
//! answered and not flushed when its link was lost is in doubt.

use crate::{NodeCell, Role};
use block::BlockError;
use env::sync::Wait;
use std::any::Any;
use std::rc::Rc;
use std::time::Duration;

/// Where a link stands.
#[derive(Clone, Debug)]
pub enum LinkState {
    /// Requests can be made.
    Up,
    /// The peer is gone, and looked for.
    Down {
        /// Why, as far as is known.
        why: BlockError,
        /// When the next attempt to connect begins; `None`: one is under way.
        next_try: Option<Duration>,
    },
    /// The peer came back as something else. Attempts go on.
    Refused(BlockError),
    /// It was hung up for good.
    Closed,
}

/// A connection (or several to the same peer) that a node's bytes come over.
pub trait Link {
    /// Connections lost since the node was opened.
    fn losses(&self) -> u64;
    /// Whether requests can be made.
    fn is_up(&self) -> bool;
    /// Where it stands.
    fn state(&self) -> LinkState;
    /// Ends when the link comes up, is lost, or is closed.
    fn changed(&self) -> Wait<'_>;
    /// Until the returned value is dropped somebody above bridges losses: a request fails at once where there is no
    /// connection, and a peer that leaves requests unanswered for `no_progress` (a multiple of that, if all it has to do is flush)
    /// without a byte counts as gone.
    fn attend(self: Rc<Self>, no_progress: Option<Duration>) -> Box<dyn Any>;
}

/// The links that the bytes of `top` come over, its own and those below; with those of layers below copy-on-write images only
/// if `backing` says so (what is written does not go there).
pub fn links_below(top: &Rc<NodeCell>, backing: bool) -> Vec<Rc<dyn Link>> {
    let (mut found, mut todo) = (Vec::new(), vec![top.clone()]);
    while let Some(cell) = todo.pop() {
        let node = cell.node();
        found.extend(node.link());
        let edges = node.edges().into_iter().filter(|e| backing || e.role() != Role::Backing);
        todo.extend(edges.map(|e| e.child()));
    }
    found
}

/// The first node from `top` down that keeps records of its own behind a link: what such records refer to may be in doubt
/// together with them.
pub fn format_over_link(top: &Rc<NodeCell>) -> Option<Rc<NodeCell>> {
    let mut todo = vec![top.clone()];
    while let Some(cell) = todo.pop() {
        let node = cell.node();
        if node.supports_backing() && !links_below(&cell, false).is_empty() {
            return Some(cell);
        }
        todo.extend(node.edges().into_iter().filter(|e| e.role() != Role::Backing).map(|e| e.child()));
    }
    None
}
