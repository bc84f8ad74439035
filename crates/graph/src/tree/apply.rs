//! Carrying out a plan under requests: locks on the host and turning read-write first, then the gates, then the swap.
//!
//! What can happen: any of it fails, or the change cannot be written down. What must stay true: then all is as it was; nobody
//! is inside an edge that is swapped; between the first and the last swap nothing can fail or wait.

use super::Graph;
use super::changes::{Changes, Snapshot, resolve};
use crate::cell::NodeCell;
use crate::edge::{Edge, Parent};
use crate::gate::Closed;
use crate::perm::Demand;
use crate::plan::Plan;
use crate::shape::{Resolved, WRITING};
use block::{BlockError, Result};
use env::bugs::planted;
use std::collections::BTreeMap;
use std::rc::Rc;

impl Graph {
    /// Carries out a plan, or leaves everything as it was.
    pub async fn apply(&self, plan: Plan) -> Result<()> {
        let _turn = self.changing.acquire(1).await;
        let kept_later = plan.kept_later;
        let changes = self.expand(plan);
        // Whoever is inside goes down the edges as they are now; after the change a filter that leaves may lie anywhere.
        let places = self.places()?;
        let snapshot = self.snapshot(&changes)?;
        let (snapshot, resolved) = resolve(snapshot)?;
        self.acquire(&snapshot, &resolved).await?;
        let (turned, before) = self.turn_up(&changes, &snapshot, &resolved).await?;
        let gates = self.close_gates(&changes, &places).await;
        let done = match turn_active(&changes, &snapshot, &resolved).await {
            Ok(()) => self.turn_writable(&changes, false).await.map(|_| ()),
            Err(e) => Err(e),
        };
        if let Err(e) = done {
            drop(gates);
            let e = self.undo(&snapshot, &turned, before, e).await;
            self.turn_back(&snapshot.cells).await;
            return Err(e);
        }
        if let Err(e) = self.swap_and_keep(&changes, kept_later).await {
            drop(gates);
            let e = self.undo(&snapshot, &turned, before, e).await;
            self.turn_back(&snapshot.cells).await;
            self.reap().await;
            return Err(e);
        }
        commit(&snapshot);
        drop(gates);
        self.watcher.tell();
        self.turn_back(&snapshot.cells).await;
        self.release(&snapshot, &resolved).await?;
        drop((snapshot, changes));
        self.reap().await;
        Ok(())
    }

    /// Computes all demands anew, checks them, and brings nodes and edges in line.
    pub(super) async fn settle_demands(&self, changes: &Changes) -> Result<()> {
        let (snapshot, resolved) = resolve(self.snapshot(changes)?)?;
        self.acquire(&snapshot, &resolved).await?;
        self.turn_up(changes, &snapshot, &resolved).await?;
        commit(&snapshot);
        self.turn_back(&snapshot.cells).await;
        self.release(&snapshot, &resolved).await
    }

    /// Turns those read-write that are to be written to. On an error all is as before. What is returned: those that the plan
    /// turned, and what edges asked for before (a format writes to its file as it turns, so its edges have what it will ask
    /// for from then on).
    async fn turn_up(
        &self,
        changes: &Changes,
        snapshot: &Snapshot,
        resolved: &Resolved,
    ) -> Result<(Vec<Rc<NodeCell>>, Vec<(Rc<Edge>, Demand)>)> {
        let before = widen(changes, snapshot, resolved);
        // Those that turn by themselves are below those that the plan turns: formats turn after their files.
        let done = match self.turn_by_themselves(snapshot, resolved).await {
            Ok(()) => self.turn_writable(changes, true).await,
            Err(e) => Err(e),
        };
        match done {
            Ok(turned) => Ok((turned, before)),
            Err(e) => {
                let e = self.undo(snapshot, &[], before, e).await;
                self.turn_back(&snapshot.cells).await;
                Err(e)
            }
        }
    }

    /// Turns those read-write that may turn by themselves and are to be written to.
    async fn turn_by_themselves(&self, snapshot: &Snapshot, resolved: &Resolved) -> Result<()> {
        // Children first: a format may write as it turns.
        for cell in resolved.turning.iter().rev().map(|n| &snapshot.cells[*n]) {
            cell.node().set_writable(true).await?;
            cell.set_writable(true);
            cell.set_turned(true);
        }
        Ok(())
    }

    /// Those that turned by themselves, and that nobody writes to any more, are read-only again.
    async fn turn_back(&self, cells: &[Rc<NodeCell>]) {
        for cell in cells.iter().rev().filter(|c| c.has_turned()) {
            let written = cell.parents().iter().any(|e| !e.demand().needs.common(WRITING).is_empty());
            // What cannot turn back stays as it is: it is asked again when the graph changes next.
            if !written && cell.node().set_writable(false).await.is_ok() {
                cell.set_writable(false);
                cell.set_turned(false);
            }
        }
    }

    /// Lets every node take what its new demands need of the host.
    async fn acquire(&self, snapshot: &Snapshot, resolved: &Resolved) -> Result<()> {
        for (i, cell) in snapshot.cells.iter().enumerate() {
            if let Err(e) = cell.node().acquire(resolved.above[i]).await {
                self.release_present(&snapshot.cells[..=i]).await;
                return Err(e);
            }
        }
        Ok(())
    }

    async fn release(&self, snapshot: &Snapshot, resolved: &Resolved) -> Result<()> {
        for (i, cell) in snapshot.cells.iter().enumerate() {
            cell.node().release(resolved.above[i]).await?;
        }
        Ok(())
    }

    /// Back to what the edges ask for now.
    async fn release_present(&self, cells: &[Rc<NodeCell>]) {
        for cell in cells {
            let above = cell.parents().iter().fold(Demand::NOTHING, |all, e| all.and(e.demand()));
            // Giving back is best effort: what stays locked is given back when the file is closed.
            let _ = cell.node().release(above).await;
        }
    }

    async fn undo(
        &self,
        snapshot: &Snapshot,
        turned: &[Rc<NodeCell>],
        before: Vec<(Rc<Edge>, Demand)>,
        why: BlockError,
    ) -> BlockError {
        for cell in turned {
            if cell.node().set_writable(false).await.is_ok() {
                cell.set_writable(false);
            }
        }
        restore(before);
        self.release_present(&snapshot.cells).await;
        why
    }

    async fn turn_writable(&self, changes: &Changes, on: bool) -> Result<Vec<Rc<NodeCell>>> {
        let mut turned: Vec<Rc<NodeCell>> = Vec::new();
        let wanted = changes.writable.values().filter(|(c, want)| *want == on && c.is_writable() != on);
        let mut order: Vec<Rc<NodeCell>> = wanted.map(|(c, _)| c.clone()).collect();
        // A format writes when it turns, either way, so its file turns first on the way up and last on the way down; what
        // is below was opened before.
        if !on {
            order.reverse();
        }
        for cell in &order {
            if let Err(e) = cell.node().set_writable(on).await {
                for done in &turned {
                    if done.node().set_writable(!on).await.is_ok() {
                        done.set_writable(!on);
                    }
                }
                return Err(e);
            }
            cell.set_writable(on);
            turned.push(cell.clone());
        }
        Ok(turned)
    }

    /// Closes, from the top down, the gates of all edges that move or lie directly above a node whose backing changes or
    /// that turns read-only.
    async fn close_gates(&self, changes: &Changes, places: &BTreeMap<u64, usize>) -> Vec<Closed<Edge>> {
        let mut touched: BTreeMap<u64, Rc<Edge>> =
            changes.child.iter().map(|(id, (e, _))| (*id, e.clone())).collect();
        let quiet = changes.backing.values().map(|(c, _)| c);
        let quiet = quiet.chain(changes.children.values().map(|(c, _)| c));
        let read_only = changes.writable.values().filter(|(_, on)| !on).map(|(c, _)| c);
        let active = changes.active.values().map(|(c, _)| c);
        for cell in quiet.chain(read_only).chain(active) {
            touched.extend(cell.parents().into_iter().map(|e| (e.id(), e)));
        }
        // A format that turns read-only or inactive writes back to its file then, which may turn in the same plan; one that turns
        // active reads it anew. Nobody is inside the
        // format by that time, so nobody else uses that way.
        let writes_back = |e: &Rc<Edge>| {
            e.parent_node().and_then(|n| self.find(&n)).is_some_and(|parent| {
                changes.writable.get(&parent.id()).is_some_and(|(c, on)| !on && c.is_writable())
                    || changes.active.contains_key(&parent.id())
            })
        };
        touched.retain(|id, e| changes.child.contains_key(id) || !writes_back(e));
        let rank = |edge: &Rc<Edge>| places.get(&edge.id()).copied().unwrap_or(0);
        let mut ordered: Vec<(usize, Rc<Edge>)> = touched.into_values().map(|e| (rank(&e), e)).collect();
        ordered.sort_by_key(|(r, e)| (*r, e.id()));
        let mut closed = Vec::with_capacity(ordered.len());
        for (_, edge) in ordered {
            closed.push(Closed::close(edge).await);
        }
        closed
    }

    /// Swaps, and has it written down before anybody finds out. On an error nothing is swapped.
    async fn swap_and_keep(&self, changes: &Changes, kept_later: bool) -> Result<()> {
        let keeper = self.keeper.borrow().clone().filter(|_| !kept_later);
        let Some(keeper) = keeper else {
            self.swap(changes);
            return Ok(());
        };
        if planted("graph: guests go on before it is written down") {
            self.swap(changes);
            self.env.spawn("late keeper", async move {
                let _ = keeper.keep(false).await;
            });
            return Ok(());
        }
        let back = changes.can_go_back().then(|| changes.back());
        self.swap(changes);
        match (keeper.keep(back.is_some()).await, back) {
            (Err(e), Some(back)) => {
                self.swap(&back);
                Err(e)
            }
            _ => Ok(()),
        }
    }

    /// Nothing here can fail or wait.
    fn swap(&self, changes: &Changes) {
        for (edge, to) in changes.child.values() {
            let from = edge.child();
            if from.id() == to.id() {
                continue;
            }
            from.parents.borrow_mut().retain(|p| p.upgrade().is_none_or(|e| e.id() != edge.id()));
            to.parents.borrow_mut().push(Rc::downgrade(edge));
            edge.point_at(to.clone());
            from.lost_parent();
        }
        for (cell, backing) in changes.backing.values() {
            if let Some(edge) = backing
                && let Parent::Node(name) = edge.parent()
            {
                *name.borrow_mut() = Some(cell.name().to_owned());
            }
            cell.node().set_backing(backing.clone());
        }
        for (cell, edges) in changes.children.values() {
            cell.node().set_children(edges.clone());
        }
        for (cell, options) in changes.options.values() {
            cell.set_options(options);
        }
        for (cell, filter) in &changes.cover {
            cell.set_cover(filter.as_ref());
        }
        changes.demand.values().filter(|(e, _)| e.awake().is_some()).for_each(|(e, d)| e.set_awake(*d));
        changes.at.iter().for_each(|(what, _)| what());
    }
}

fn commit(snapshot: &Snapshot) {
    snapshot.edges.iter().zip(&snapshot.shape.edges).for_each(|(e, s)| e.set_demand(s.demand));
}

/// Lets nodes give their images up (parents first, so that what they write back goes through) and take them back (children first).
/// On an error those are back where they were, as far as they can.
async fn turn_active(changes: &Changes, snapshot: &Snapshot, resolved: &Resolved) -> Result<()> {
    let turns = |n: &usize| snapshot.cells[*n].is_active() != changes.is_active(&snapshot.cells[*n]);
    let (up, down): (Vec<usize>, Vec<usize>) =
        resolved.order.iter().copied().filter(turns).partition(|n| changes.is_active(&snapshot.cells[*n]));
    let mut done: Vec<&Rc<NodeCell>> = Vec::new();
    for cell in down.iter().chain(up.iter().rev()).map(|n| &snapshot.cells[*n]) {
        let on = !cell.is_active();
        if let Err(e) = cell.set_active(on).await {
            for cell in done.into_iter().rev() {
                // The first error is the one that matters.
                let _ = cell.set_active(!cell.is_active()).await;
            }
            return Err(e);
        }
        done.push(cell);
    }
    Ok(())
}

/// Gives the edges of nodes that are about to turn read-write or active what these will ask for, beside what they ask for now (which is
/// returned).
fn widen(changes: &Changes, snapshot: &Snapshot, resolved: &Resolved) -> Vec<(Rc<Edge>, Demand)> {
    let turns = |n: usize| {
        let cell = &snapshot.cells[n];
        let planned = changes.writable.get(&cell.id()).is_some_and(|(_, on)| *on);
        let wakes = !cell.is_active() && changes.is_active(cell);
        wakes || !cell.is_writable() && (planned || resolved.turning.contains(&n))
    };
    let edges = snapshot.edges.iter().zip(&snapshot.shape.edges);
    let wider = edges.filter(|(_, s)| s.parent.is_some_and(turns));
    let wider = wider.map(|(e, s)| {
        let now = e.demand();
        e.set_demand(now.and(s.demand));
        (e.clone(), now)
    });
    wider.collect()
}

/// Takes [`widen`] back.
fn restore(before: Vec<(Rc<Edge>, Demand)>) {
    before.into_iter().for_each(|(edge, demand)| edge.set_demand(demand));
}
