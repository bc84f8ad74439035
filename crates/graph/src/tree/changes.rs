//! What a plan makes of the graph, as data: worked out before anything is touched.

use super::Graph;
use crate::cell::{NodeCell, NodeOptions};
use crate::edge::{Edge, Parent, Role};
use crate::perm::Demand;
use crate::plan::{Plan, Step};
use crate::shape::{Resolved, Shape, ShapeEdge, ShapeNode};
use block::{BlockError, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// A graph as data, with the way back to its nodes and edges.
pub(super) struct Snapshot {
    pub(super) shape: Shape,
    pub(super) cells: Vec<Rc<NodeCell>>,
    pub(super) edges: Vec<Rc<Edge>>,
}

/// What a step calls at the instant of the swap.
type Call = Rc<dyn Fn()>;

/// What a plan changes, step by step.
#[derive(Default)]
pub(super) struct Changes {
    /// Edge id: its new child.
    pub(super) child: BTreeMap<u64, (Rc<Edge>, Rc<NodeCell>)>,
    pub(super) demand: BTreeMap<u64, (Rc<Edge>, Demand)>,
    pub(super) writable: BTreeMap<u64, (Rc<NodeCell>, bool)>,
    pub(super) active: BTreeMap<u64, (Rc<NodeCell>, bool)>,
    pub(super) backing: BTreeMap<u64, (Rc<NodeCell>, Option<Rc<Edge>>)>,
    pub(super) children: BTreeMap<u64, (Rc<NodeCell>, Vec<Rc<Edge>>)>,
    pub(super) options: BTreeMap<u64, (Rc<NodeCell>, NodeOptions)>,
    pub(super) cover: Vec<(Rc<NodeCell>, Option<Rc<NodeCell>>)>,
    pub(super) at: Vec<(Call, Option<Call>)>,
}

impl Changes {
    /// Whether all of it can be taken back after the swap.
    pub(super) fn can_go_back(&self) -> bool {
        self.active.is_empty()
            && self.writable.values().all(|(_, on)| *on)
            && self.at.iter().all(|(_, u)| u.is_some())
    }

    /// The changes that lead back from these, as long as these have not been made.
    pub(super) fn back(&self) -> Changes {
        let held =
            |role: Role, cell: &Rc<NodeCell>| cell.node().edges().into_iter().find(|e| e.role() == role);
        Changes {
            child: self.child.iter().map(|(id, (e, _))| (*id, (e.clone(), e.child()))).collect(),
            backing: self
                .backing
                .iter()
                .map(|(id, (c, _))| (*id, (c.clone(), held(Role::Backing, c))))
                .collect(),
            children: self.children.iter().map(|(id, (c, _))| (*id, (c.clone(), c.node().edges()))).collect(),
            options: self.options.iter().map(|(id, (c, _))| (*id, (c.clone(), c.options()))).collect(),
            cover: self.cover.iter().map(|(c, _)| (c.clone(), c.cover())).collect(),
            demand: self
                .demand
                .iter()
                .filter_map(|(id, (e, _))| Some((*id, (e.clone(), e.awake()?))))
                .collect(),
            at: self.at.iter().filter_map(|(_, undo)| Some((undo.clone()?, None))).collect(),
            ..Changes::default()
        }
    }

    pub(super) fn is_active(&self, cell: &NodeCell) -> bool {
        self.active.get(&cell.id()).map_or(cell.is_active(), |(_, on)| *on)
    }

    fn child_of(&self, edge: &Rc<Edge>) -> Rc<NodeCell> {
        self.child.get(&edge.id()).map_or_else(|| edge.child(), |(_, c)| c.clone())
    }

    fn edges_of(&self, cell: &Rc<NodeCell>) -> Vec<Rc<Edge>> {
        if let Some((_, children)) = self.children.get(&cell.id()) {
            return children.clone();
        }
        let mut edges = cell.node().edges();
        if let Some((_, backing)) = self.backing.get(&cell.id()) {
            edges.retain(|e| e.role() != Role::Backing);
            edges.extend(backing.clone());
        }
        edges
    }
}

impl Graph {
    pub(super) fn expand(&self, plan: Plan) -> Changes {
        let mut c = Changes::default();
        for step in plan.steps {
            match step {
                Step::Point { edge, to } => {
                    c.child.insert(edge.id(), (edge, to));
                }
                Step::MoveParents { from, to, except } => {
                    let below = self.reachable(&c, &to);
                    let moving: Vec<Rc<Edge>> = self
                        .all_edges()
                        .into_iter()
                        .filter(|e| c.child_of(e).id() == from.id())
                        .filter(|e| !except.iter().any(|x| x.id() == e.id()))
                        .filter(|e| !below.contains(&e.id()))
                        .collect();
                    c.child.extend(moving.into_iter().map(|e| (e.id(), (e, to.clone()))));
                }
                Step::SetBacking { node, edge } => {
                    c.backing.insert(node.id(), (node, edge));
                }
                Step::SetChildren { node, edges } => {
                    c.children.insert(node.id(), (node, edges));
                }
                Step::Writable { node, on } => {
                    c.writable.insert(node.id(), (node, on));
                }
                Step::Active { node, on } => {
                    c.active.insert(node.id(), (node, on));
                }
                Step::Options { node, options } => {
                    c.options.insert(node.id(), (node, options));
                }
                Step::Ask { edge, demand } => {
                    c.demand.insert(edge.id(), (edge, demand));
                }
                Step::Cover { node, filter } => c.cover.push((node, filter)),
                Step::At { what, undo } => c.at.push((what, undo)),
            }
        }
        c
    }

    /// Ids of all edges of `cell` and of nodes below it.
    fn reachable(&self, changes: &Changes, cell: &Rc<NodeCell>) -> BTreeSet<u64> {
        let (mut found, mut todo) = (BTreeSet::new(), vec![cell.clone()]);
        while let Some(cell) = todo.pop() {
            for edge in changes.edges_of(&cell) {
                if found.insert(edge.id()) {
                    todo.push(changes.child_of(&edge));
                }
            }
        }
        found
    }

    fn all_edges(&self) -> Vec<Rc<Edge>> {
        let mut edges: Vec<Rc<Edge>> = self.nodes.borrow().values().flat_map(|c| c.parents()).collect();
        edges.sort_by_key(|e| e.id());
        edges
    }

    pub(super) fn snapshot(&self, changes: &Changes) -> Result<Snapshot> {
        let cells = self.nodes();
        let index: BTreeMap<u64, usize> = cells.iter().enumerate().map(|(i, c)| (c.id(), i)).collect();
        let mut edges = self.all_edges();
        let backing = changes.backing.values().flat_map(|(_, new)| new);
        for new in backing.chain(changes.children.values().flat_map(|(_, new)| new)) {
            if !edges.iter().any(|e| e.id() == new.id()) {
                edges.push(new.clone());
            }
        }
        let mut holder = BTreeMap::new();
        let mut dropped = BTreeSet::new();
        for (i, cell) in cells.iter().enumerate() {
            let after = changes.edges_of(cell);
            after.iter().for_each(|e| {
                holder.insert(e.id(), i);
            });
            dropped.extend(
                cell.node().edges().iter().map(|e| e.id()).filter(|id| !after.iter().any(|e| e.id() == *id)),
            );
        }
        edges.retain(|e| !dropped.contains(&e.id()));
        let nodes = cells
            .iter()
            .map(|c| ShapeNode {
                name: c.name().to_owned(),
                writable: changes.writable.get(&c.id()).map_or(c.is_writable(), |(_, on)| *on),
                was_writable: c.is_writable(),
                may_turn: changes.options.get(&c.id()).map_or(c.may_turn(), |(_, o)| o.may_turn),
                active: changes.is_active(c),
                force_share: changes
                    .options
                    .get(&c.id())
                    .map_or(c.options().force_share, |(_, o)| o.force_share),
            })
            .collect();
        let mut shape = Shape { nodes, edges: Vec::with_capacity(edges.len()) };
        for edge in &edges {
            let child = changes.child_of(edge);
            let Some(&at) = index.get(&child.id()) else {
                return Err(BlockError::invalid(format!(
                    "node '{}' is not in the graph any more",
                    child.name()
                )));
            };
            let now = || edge.awake().unwrap_or_else(|| edge.demand());
            let demand = changes.demand.get(&edge.id()).map_or_else(now, |(_, d)| *d);
            shape.edges.push(ShapeEdge {
                name: edge.name().to_owned(),
                parent: holder.get(&edge.id()).copied(),
                label: label(edge),
                above: edge.parent_node(),
                sleeps: edge.awake().is_some(),
                child: at,
                demand,
            });
        }
        Ok(Snapshot { shape, cells, edges })
    }

    /// How far down the edges that nodes hold are now: each has a higher number than every edge above it.
    pub(super) fn places(&self) -> Result<BTreeMap<u64, usize>> {
        let Snapshot { shape, edges, .. } = self.snapshot(&Changes::default())?;
        let mut place = vec![0; shape.nodes.len()];
        shape.order()?.into_iter().enumerate().for_each(|(at, n)| place[n] = at + 1);
        Ok(edges.iter().zip(&shape.edges).filter_map(|(e, s)| Some((e.id(), place[s.parent?]))).collect())
    }
}

pub(super) fn resolve(mut snapshot: Snapshot) -> Result<(Snapshot, Resolved)> {
    let edges = snapshot.edges.clone();
    let cells = snapshot.cells.clone();
    let holders: Vec<Option<usize>> = snapshot.shape.edges.iter().map(|e| e.parent).collect();
    let resolved = snapshot.shape.resolve(|e, above, writable| match holders[e] {
        Some(parent) => cells[parent].node().wants(&edges[e], above, writable),
        None => edges[e].demand(),
    })?;
    Ok((snapshot, resolved))
}

fn label(edge: &Edge) -> String {
    match edge.parent() {
        Parent::Node(name) => format!("node '{}'", name.borrow().as_deref().unwrap_or_default()),
        Parent::Job { kind, id } => format!("{kind} job '{id}'"),
        Parent::Backend(_) => "an unnamed block device".to_owned(),
    }
}
