//! All nodes of a home thread, and the one place where edges change.
//!
//! What can happen: nodes come and go, parents attach and detach, plans move edges, while requests run on all of them.
//! What must stay true: changes happen one after another; each is checked on its result before anything is touched, and
//! everything that can fail (locks on the host, turning an image read-write) happens before the first swap; a swap
//! happens only with nobody inside the touched edges. Gates are closed from the top down, so that a request inside an
//! upper edge can still pass the lower ones and finish. A node that lost its last parent and is nobody's is closed.

use crate::cell::{NodeCell, NodeOptions};
use crate::edge::{Edge, Parent, Role};
use crate::gate::Closed;
use crate::node::Node;
use crate::perm::{Demand, Perms};
use crate::plan::{Plan, Step};
use crate::shape::{Resolved, Shape, ShapeEdge, ShapeNode, WRITING};
use crate::watch::Watcher;
use block::{BlockError, ErrorKind, Prealloc, Result};
use env::Env;
use env::bugs::planted;
use env::sync::{Notify, Semaphore};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};

/// Longest node name in bytes (QSD's limit).
pub const MAX_NODE_NAME: usize = 31;

/// Nodes that lost a parent and may have to go.
pub(crate) struct Reaper {
    look: RefCell<BTreeSet<u64>>,
    called: Notify,
}

impl Reaper {
    pub(crate) fn look_at(&self, id: u64) {
        self.look.borrow_mut().insert(id);
        self.called.notify_all();
    }
}

/// The graph of one home thread.
pub struct Graph {
    env: Env,
    nodes: RefCell<BTreeMap<u64, Rc<NodeCell>>>,
    next_id: Cell<u64>,
    next_edge: Cell<u64>,
    next_auto: Cell<u64>,
    changing: Semaphore,
    reaper: Rc<Reaper>,
    keeper: RefCell<Option<Rc<dyn Keeper>>>,
    pub(crate) watcher: Watcher,
}

/// Writes down what the graph is, for a later life of the process.
pub trait Keeper {
    /// Makes durable what the graph is now. Called after a plan has changed it and before any request finds it changed:
    /// no request goes to a place of which a later life would not know.
    ///
    /// # Errors
    /// It cannot be written down. The plan is taken back if it can be; else it stands, and the keeper has to see to it that
    /// somebody hears of it.
    fn keep(&self, can_go_back: bool) -> block::Io<'_>;
}

/// A graph as data, with the way back to its nodes and edges.
struct Snapshot {
    shape: Shape,
    cells: Vec<Rc<NodeCell>>,
    edges: Vec<Rc<Edge>>,
}

/// What a step calls at the instant of the swap.
type Call = Rc<dyn Fn()>;

/// What a plan changes, step by step.
#[derive(Default)]
struct Changes {
    /// Edge id: its new child.
    child: BTreeMap<u64, (Rc<Edge>, Rc<NodeCell>)>,
    demand: BTreeMap<u64, (Rc<Edge>, Demand)>,
    writable: BTreeMap<u64, (Rc<NodeCell>, bool)>,
    active: BTreeMap<u64, (Rc<NodeCell>, bool)>,
    backing: BTreeMap<u64, (Rc<NodeCell>, Option<Rc<Edge>>)>,
    children: BTreeMap<u64, (Rc<NodeCell>, Vec<Rc<Edge>>)>,
    options: BTreeMap<u64, (Rc<NodeCell>, NodeOptions)>,
    cover: Vec<(Rc<NodeCell>, Option<Rc<NodeCell>>)>,
    at: Vec<(Call, Option<Call>)>,
}

impl Changes {
    /// Whether all of it can be taken back after the swap.
    fn can_go_back(&self) -> bool {
        self.active.is_empty()
            && self.writable.values().all(|(_, on)| *on)
            && self.at.iter().all(|(_, u)| u.is_some())
    }

    /// The changes that lead back from these, as long as these have not been made.
    fn back(&self) -> Changes {
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

    fn is_active(&self, cell: &NodeCell) -> bool {
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
    /// An empty graph. Starts a task that closes nodes nobody uses any more.
    pub fn new(env: &Env) -> Rc<Graph> {
        let graph = Rc::new(Graph {
            env: env.clone(),
            nodes: RefCell::default(),
            next_id: Cell::new(1),
            next_edge: Cell::new(1),
            next_auto: Cell::new(1),
            changing: Semaphore::new(1),
            reaper: Rc::new(Reaper { look: RefCell::default(), called: Notify::new() }),
            keeper: RefCell::default(),
            watcher: Watcher::default(),
        });
        let (weak, reaper) = (Rc::downgrade(&graph), graph.reaper.clone());
        env.spawn("reaper", async move {
            loop {
                if reaper.look.borrow().is_empty() {
                    reaper.called.wait().await;
                }
                let Some(graph) = weak.upgrade() else { return };
                let turn = graph.changing.acquire(1).await;
                graph.reap().await;
                drop(turn);
            }
        });
        graph
    }

    /// The door to the outside.
    pub fn env(&self) -> &Env {
        &self.env
    }

    /// From now on `keeper` writes down what plans make of the graph.
    pub fn set_keeper(&self, keeper: Rc<dyn Keeper>) {
        *self.keeper.borrow_mut() = Some(keeper);
    }

    /// Has what the graph is now written down, after plans that were [`Plan::kept_later`].
    ///
    /// # Errors
    /// It cannot be written down: the caller takes the plans back.
    pub async fn keep(&self) -> Result<()> {
        let keeper = self.keeper.borrow().clone();
        match keeper {
            Some(keeper) => keeper.keep(true).await,
            None => Ok(()),
        }
    }

    /// The node of this name.
    pub fn find(&self, name: &str) -> Option<Rc<NodeCell>> {
        self.nodes.borrow().values().find(|c| c.name() == name).cloned()
    }

    /// All nodes, oldest first.
    pub fn nodes(&self) -> Vec<Rc<NodeCell>> {
        self.nodes.borrow().values().cloned().collect()
    }

    /// Whether a new node may have this name: a letter, then letters, digits, `-`, `.`, `_`; at most 31; not in use.
    pub fn check_name(&self, name: &str) -> Result<()> {
        let letters = name.starts_with(|c: char| c.is_ascii_alphabetic());
        let rest = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
        if !letters || !rest {
            return Err(BlockError::invalid(format!("Invalid node-name: '{name}'")));
        }
        if name.len() > MAX_NODE_NAME {
            return Err(BlockError::invalid("Node name too long"));
        }
        if self.find(name).is_some() {
            let message = format!("Duplicate nodes with node-name='{name}'");
            return Err(BlockError::new(ErrorKind::Busy, message));
        }
        Ok(())
    }

    /// Whether a node of an earlier life may have its name again; names that are invented from now on are others.
    ///
    /// # Errors
    /// As [`Graph::check_name`], which invented names do not pass.
    pub fn check_old_name(&self, name: &str) -> Result<()> {
        let Some(n) = name.strip_prefix("#block").and_then(|n| n.parse::<u64>().ok()) else {
            return self.check_name(name);
        };
        if self.find(name).is_some() {
            let message = format!("Duplicate nodes with node-name='{name}'");
            return Err(BlockError::new(ErrorKind::Busy, message));
        }
        self.next_auto.set(self.next_auto.get().max(n.saturating_add(1)));
        Ok(())
    }

    /// A name for a node that was given none: `#blockNNN`.
    pub fn invent_name(&self) -> String {
        let n = self.next_auto.get();
        self.next_auto.set(n + 1);
        format!("#block{n:03}")
    }

    /// Puts a node into the graph. Its edges were made by [`Graph::attach`] before; their demands become what the node
    /// wants now. On an error nothing has changed, and the node is the caller's to close.
    pub async fn add(&self, mut options: NodeOptions, node: Rc<dyn Node>) -> Result<Rc<NodeCell>> {
        let _turn = self.changing.acquire(1).await;
        let name = match options.name.take() {
            Some(n) => n,
            None => self.invent_name(),
        };
        if !name.starts_with('#') {
            self.check_name(&name)?;
        }
        options.name = Some(name.clone());
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        for edge in node.edges() {
            if let Parent::Node(parent) = edge.parent() {
                *parent.borrow_mut() = Some(name.clone());
            }
        }
        let cell = Rc::new(NodeCell::new(id, name, node, options, Rc::downgrade(&self.reaper)));
        self.nodes.borrow_mut().insert(id, cell.clone());
        match self.settle_demands(&Changes::default()).await {
            Ok(()) => Ok(cell),
            Err(e) => {
                self.nodes.borrow_mut().remove(&id);
                Err(e)
            }
        }
    }

    /// Makes `parent` a user of `child`, or of the job's filter in front of it, if there is one: whoever comes while a job
    /// runs must not pass the job by.
    pub async fn attach(
        &self,
        child: &Rc<NodeCell>,
        name: &str,
        role: Role,
        parent: Parent,
        demand: Demand,
    ) -> Result<Rc<Edge>> {
        // Looked up in turn: a plan that is under way may be about to cover the node.
        let _turn = self.changing.acquire(1).await;
        self.attach_now(&outermost(child), name, role, parent, demand).await
    }

    /// As [`Graph::attach`] for a user of its own that allows that the node is inactive: what it asks for counts while the node is
    /// active.
    pub async fn attach_sleeping(
        &self,
        child: &Rc<NodeCell>,
        parent: Parent,
        demand: Demand,
    ) -> Result<Rc<Edge>> {
        let _turn = self.changing.acquire(1).await;
        let edge = self.new_edge(&outermost(child), "root", Role::Root, parent, Demand::NOTHING)?;
        edge.set_awake(demand);
        self.settle_demands(&Changes::default()).await?;
        Ok(edge)
    }

    /// Makes `parent` a user of exactly `child`. Dropping the edge ends that.
    pub async fn attach_exact(
        &self,
        child: &Rc<NodeCell>,
        name: &str,
        role: Role,
        parent: Parent,
        demand: Demand,
    ) -> Result<Rc<Edge>> {
        let _turn = self.changing.acquire(1).await;
        self.attach_now(child, name, role, parent, demand).await
    }

    async fn attach_now(
        &self,
        child: &Rc<NodeCell>,
        name: &str,
        role: Role,
        parent: Parent,
        demand: Demand,
    ) -> Result<Rc<Edge>> {
        let edge = self.new_edge(child, name, role, parent, demand)?;
        self.settle_demands(&Changes::default()).await?;
        Ok(edge)
    }

    fn new_edge(
        &self,
        child: &Rc<NodeCell>,
        name: &str,
        role: Role,
        parent: Parent,
        demand: Demand,
    ) -> Result<Rc<Edge>> {
        self.check_present(child)?;
        let id = self.next_edge.get();
        self.next_edge.set(id + 1);
        let edge = Edge::new(id, child.clone(), name, role, parent, demand);
        child.parents.borrow_mut().push(Rc::downgrade(&edge));
        Ok(edge)
    }

    /// Changes what an edge that is held by no node asks for.
    pub async fn ask(&self, edge: &Rc<Edge>, demand: Demand) -> Result<()> {
        self.apply(Plan::new().then(Step::Ask { edge: edge.clone(), demand })).await
    }

    /// Closes and removes a node that nobody uses, and the nodes that only it used.
    ///
    /// # Errors
    /// It is in use, or gone already: nothing changed. Or what closing it met: then it is removed all the same.
    pub async fn remove(&self, cell: &Rc<NodeCell>) -> Result<()> {
        self.remove_if::<BlockError>(cell, |_| Ok(())).await?
    }

    /// [`Graph::remove`] if `check` agrees, which is asked when no other change can come between; whoever owned the node
    /// gives it up only then. The inner result is what closing met; the node is removed whatever that is.
    ///
    /// # Errors
    /// The outer result: an error of `check`, or that the node is in use. Nothing changed.
    pub async fn remove_if<E: From<BlockError>>(
        &self,
        cell: &Rc<NodeCell>,
        check: impl FnOnce(&Rc<NodeCell>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Result<()>, E> {
        let _turn = self.changing.acquire(1).await;
        self.check_present(cell)?;
        check(cell)?;
        if !cell.parents().is_empty() {
            let message = format!("Node {} is in use", cell.name());
            return Err(BlockError::new(ErrorKind::Busy, message).into());
        }
        cell.set_monitor_owned(false);
        let closed = self.close(cell).await;
        self.reap().await;
        Ok(closed)
    }

    /// Changes the length of a node if `check` agrees and its parents share that. No request runs meanwhile, and whoever
    /// wants to attach waits.
    pub async fn resize<E: From<BlockError>>(
        &self,
        cell: &Rc<NodeCell>,
        len: u64,
        prealloc: Prealloc,
        check: impl FnOnce(&Rc<NodeCell>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let _turn = self.changing.acquire(1).await;
        self.check_present(cell)?;
        check(cell)?;
        let demand = Demand { needs: Perms::RESIZE, shares: Perms::ALL };
        let parent = Parent::Backend("resize".to_owned());
        let attached = self.attach_now(cell, "root", Role::Root, parent, demand).await;
        let resized = match &attached {
            Ok(edge) => {
                let _quiet = self.quiesce(cell, std::slice::from_ref(edge)).await;
                edge.resize(len, prealloc).await
            }
            Err(e) => Err(e.clone()),
        };
        drop(attached);
        self.watcher.tell();
        self.reap().await;
        Ok(resized?)
    }

    /// That nobody removed the node while the caller waited for its turn.
    fn check_present(&self, cell: &NodeCell) -> Result<()> {
        if self.nodes.borrow().contains_key(&cell.id()) {
            return Ok(());
        }
        let message = format!("node '{}' is not in the graph any more", cell.name());
        Err(BlockError::new(ErrorKind::NotFound, message))
    }

    /// Waits until nodes that nobody uses any more are closed.
    pub async fn settle(&self) {
        let _turn = self.changing.acquire(1).await;
        self.reap().await;
    }

    /// Closes every node, parents first. Nobody may hold edges any more but nodes. The first error is given, all are
    /// closed.
    pub async fn close_all(&self) -> Result<()> {
        let _turn = self.changing.acquire(1).await;
        let mut outcome = Ok(());
        loop {
            let next = self.nodes.borrow().values().rev().find(|c| c.parents().is_empty()).cloned();
            let Some(cell) = next else { break };
            if let Err(e) = self.close(&cell).await {
                outcome = outcome.and(Err(e));
            }
        }
        outcome
    }

    async fn close(&self, cell: &Rc<NodeCell>) -> Result<()> {
        self.nodes.borrow_mut().remove(&cell.id());
        let mut closed = cell.node().close().await;
        if let Some(log) = cell.write_ahead()
            && closed.is_ok()
        {
            // What the image keeps by itself is in it, so nothing is in doubt any more.
            closed = log.close().await;
        }
        // Somebody may hold the cell for a while yet; its hold on its children ends now.
        for edge in cell.node().edges() {
            let child = edge.child();
            child.parents.borrow_mut().retain(|p| p.upgrade().is_none_or(|e| e.id() != edge.id()));
            child.lost_parent();
        }
        cell.node().release(Demand::NOTHING).await?;
        closed
    }

    /// Closes nodes that lost their last parent, and lets others give back what nobody needs any more.
    async fn reap(&self) {
        loop {
            let looked_at = std::mem::take(&mut *self.reaper.look.borrow_mut());
            if looked_at.is_empty() {
                return;
            }
            for id in looked_at {
                let cell = self.nodes.borrow().get(&id).cloned();
                if let Some(cell) = cell.filter(|c| c.parents().is_empty() && !c.is_monitor_owned()) {
                    // Nobody is left to be told of an error; what was flushed is safe, the rest nobody asked for.
                    let _ = self.close(&cell).await;
                }
            }
            // Demands only shrink when parents go, so this cannot fail.
            let _ = self.settle_demands(&Changes::default()).await;
        }
    }

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
    async fn settle_demands(&self, changes: &Changes) -> Result<()> {
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

    fn expand(&self, plan: Plan) -> Changes {
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

    fn snapshot(&self, changes: &Changes) -> Result<Snapshot> {
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

    /// How far down the edges that nodes hold are now: each has a higher number than every edge above it.
    fn places(&self) -> Result<BTreeMap<u64, usize>> {
        let Snapshot { shape, edges, .. } = self.snapshot(&Changes::default())?;
        let mut place = vec![0; shape.nodes.len()];
        shape.order()?.into_iter().enumerate().for_each(|(at, n)| place[n] = at + 1);
        Ok(edges.iter().zip(&shape.edges).filter_map(|(e, s)| Some((e.id(), place[s.parent?]))).collect())
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

    /// Keeps the requests of everybody above `cells` out, through whatever layers they come, and waits until those under way
    /// have ended; they go on when the value is dropped. Until then the contents of all of `cells` stand still together, and
    /// the graph may still be changed. Who attaches meanwhile is not kept out: the caller sees to it that nobody does.
    pub async fn freeze(&self, cells: &[Rc<NodeCell>]) -> Quiesced {
        let _turn = self.changing.acquire(1).await;
        let (mut seen, mut edges) = (BTreeSet::new(), Vec::new());
        cells.iter().for_each(|c| self.collect_above(c, &mut seen, &mut edges));
        let mut gates = Vec::with_capacity(edges.len());
        for edge in edges {
            gates.push(Closed::close(edge).await);
        }
        Quiesced { gates }
    }

    /// All edges above `cell` that are not in yet, those of a node always before those of what is below it.
    fn collect_above(&self, cell: &Rc<NodeCell>, seen: &mut BTreeSet<u64>, edges: &mut Vec<Rc<Edge>>) {
        if !seen.insert(cell.id()) {
            return;
        }
        let parents = cell.parents();
        for above in parents.iter().filter_map(|e| e.parent_node()).filter_map(|name| self.find(&name)) {
            self.collect_above(&above, seen, edges);
        }
        edges.extend(parents);
    }

    /// Keeps all requests of `cell`'s parents out and waits until those inside have ended; they go on when the value is
    /// dropped. Parents that attach meanwhile are not kept out: attach to a covered node instead.
    pub async fn quiesce(&self, cell: &Rc<NodeCell>, except: &[Rc<Edge>]) -> Quiesced {
        let mut gates = Vec::new();
        for edge in cell.parents() {
            if !except.iter().any(|e| e.id() == edge.id()) {
                gates.push(Closed::close(edge).await);
            }
        }
        Quiesced { gates }
    }
}

/// Closed gates; see [`Graph::quiesce`].
pub struct Quiesced {
    gates: Vec<Closed<Edge>>,
}

impl Quiesced {
    /// How many edges are kept quiet.
    pub fn edges(&self) -> usize {
        self.gates.len()
    }
}

/// What stands in front of a node for whoever attaches to it now.
fn outermost(cell: &Rc<NodeCell>) -> Rc<NodeCell> {
    let mut cell = cell.clone();
    while let Some(filter) = cell.cover() {
        cell = filter;
    }
    cell
}

fn resolve(mut snapshot: Snapshot) -> Result<(Snapshot, Resolved)> {
    let edges = snapshot.edges.clone();
    let cells = snapshot.cells.clone();
    let holders: Vec<Option<usize>> = snapshot.shape.edges.iter().map(|e| e.parent).collect();
    let resolved = snapshot.shape.resolve(|e, above, writable| match holders[e] {
        Some(parent) => cells[parent].node().wants(&edges[e], above, writable),
        None => edges[e].demand(),
    })?;
    Ok((snapshot, resolved))
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

fn label(edge: &Edge) -> String {
    match edge.parent() {
        Parent::Node(name) => format!("node '{}'", name.borrow().as_deref().unwrap_or_default()),
        Parent::Job(id) => format!("block job '{id}'"),
        Parent::Backend(_) => "an unnamed block device".to_owned(),
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // The reaper's task ends at its next look.
        self.reaper.called.notify_all();
    }
}

/// A weak handle, for hooks that must not keep the graph alive.
pub type WeakGraph = Weak<Graph>;
