//! Which nodes give their images up together, and take them back.
//!
//! What can happen: somebody outside is to use an image that is open here (a disk moves to another process and back). What must
//! stay true: an active node is never above an inactive one; nobody here writes to what is inactive; of several nodes all turn
//! or none does.

use crate::shape::{WRITING, inactive_child};
use crate::{Graph, NodeCell, Plan, Step, bitmaps};
use block::{BlockError, ErrorKind, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

impl Graph {
    /// Makes `cell` and all below it active.
    ///
    /// # Errors
    /// Somebody else uses an image, or it cannot be read any more. All is as before then.
    pub async fn activate(&self, cell: &Rc<NodeCell>) -> Result<()> {
        self.turn_on(vec![cell.clone()]).await
    }

    /// As [`Graph::activate`], of all nodes that the monitor added.
    pub async fn activate_all(&self) -> Result<()> {
        self.turn_on(self.nodes().into_iter().filter(|c| c.is_monitor_owned()).collect()).await
    }

    /// Makes `cell` inactive, and all below it that nobody else uses who is active.
    ///
    /// # Errors
    /// An active node is above it, somebody writes to it, or what is cached cannot be written back. All is as before then.
    pub async fn inactivate(&self, cell: &Rc<NodeCell>) -> Result<()> {
        if self.parents_of(cell).iter().any(|p| p.is_active()) {
            return Err(BlockError::new(ErrorKind::Busy, "Node has active parent node"));
        }
        self.turn_off(vec![cell.clone()]).await.map_err(|e| e.context("Failed to inactivate node"))
    }

    /// As [`Graph::inactivate`], of all nodes that the monitor added and that are below no other node. What is below a job's
    /// filter stays active, as in QSD.
    pub async fn inactivate_all(&self) -> Result<()> {
        let tops = self.nodes().into_iter();
        let tops = tops.filter(|c| c.is_monitor_owned() && self.parents_of(c).is_empty()).collect();
        self.turn_off(tops).await.map_err(|e| e.context("Failed to inactivate all nodes"))
    }

    /// That `cell` is active, so that a node that is yet to come (called `above`, or invented) can have it as its child `edge`.
    pub fn check_active(&self, cell: &NodeCell, edge: &str, above: Option<&str>) -> Result<()> {
        if cell.is_active() {
            return Ok(());
        }
        let above = above.map_or_else(|| self.invent_name(), str::to_owned);
        Err(inactive_child(cell.name(), edge, &above))
    }

    fn parents_of(&self, cell: &Rc<NodeCell>) -> Vec<Rc<NodeCell>> {
        cell.parents().iter().filter_map(|e| e.parent_node()).filter_map(|name| self.find(&name)).collect()
    }

    async fn turn_on(&self, tops: Vec<Rc<NodeCell>>) -> Result<()> {
        let (mut plan, mut seen, mut todo) = (Plan::new(), BTreeSet::new(), tops);
        while let Some(cell) = todo.pop() {
            if seen.insert(cell.id()) {
                todo.extend(cell.node().edges().iter().map(|e| e.child()));
                if !cell.is_active() {
                    plan.steps.push(Step::Active { node: cell, on: true });
                }
            }
        }
        if plan.steps.is_empty() { Ok(()) } else { self.apply(plan).await }
    }

    async fn turn_off(&self, tops: Vec<Rc<NodeCell>>) -> Result<()> {
        let mut off: BTreeMap<u64, Rc<NodeCell>> = BTreeMap::new();
        let mut todo = tops;
        while let Some(cell) = todo.pop() {
            // below one that is inactive already all stay as they are
            if !cell.is_active() {
                continue;
            }
            // looked at again for each parent: the last one decides
            let quiet = |p: &Rc<NodeCell>| !p.is_active() || off.contains_key(&p.id());
            if self.parents_of(&cell).iter().all(quiet) && !off.contains_key(&cell.id()) {
                todo.extend(cell.node().edges().iter().map(|e| e.child()));
                off.insert(cell.id(), cell);
            }
        }
        let mut plan = Plan::new();
        for cell in off.into_values() {
            check_unchanged(&cell)?;
            plan.steps.push(Step::Active { node: cell, on: false });
        }
        if plan.steps.is_empty() { Ok(()) } else { self.apply(plan).await }
    }
}

/// That nobody but nodes, and those that allow that it is inactive, changes the node, and nobody uses the bitmaps that go with
/// the image.
fn check_unchanged(cell: &NodeCell) -> Result<()> {
    let writes = |e: &Rc<crate::Edge>| {
        e.parent_node().is_none() && e.awake().is_none() && !e.demand().needs.common(WRITING).is_empty()
    };
    if cell.parents().iter().any(writes) {
        return Err(
            BlockError::new(ErrorKind::Permission, "Operation not permitted").with_errno(BlockError::EPERM)
        );
    }
    cell.bitmaps().iter().filter(|b| b.persistent()).try_for_each(|b| bitmaps::check_not_busy(b))
}
