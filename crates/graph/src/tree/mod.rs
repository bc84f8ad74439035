//! All nodes of a home thread, and the one place where edges change.
//!
//! What can happen: nodes come and go, parents attach and detach, plans move edges, while requests run on all of them.
//! What must stay true: changes happen one after another; each is checked on its result before anything is touched, and
//! everything that can fail (locks on the host, turning an image read-write) happens before the first swap; a swap
//! happens only with nobody inside the touched edges. Gates are closed from the top down, so that a request inside an
//! upper edge can still pass the lower ones and finish. A node that lost its last parent and is nobody's is closed.

mod apply;
mod changes;
mod quiet;

pub use quiet::Quiesced;

use crate::cell::{NodeCell, NodeOptions};
use crate::edge::{Edge, Parent, Role};
use crate::node::Node;
use crate::perm::{Demand, Perms};
use crate::plan::{Plan, Step};
use crate::watch::Watcher;
use block::{BlockError, ErrorKind, Prealloc, Result};
use changes::Changes;
use env::Env;
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

    /// Takes apart what holds itself, for a process that ends without closing its nodes: the simulator kills many. Nothing runs
    /// any more.
    pub fn dissolve(&self) {
        self.keeper.take();
        self.reaper.look.take();
        self.nodes.take();
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

    /// A node shows another length by itself, without [`Graph::resize`].
    pub fn length_changed(&self, cell: &Rc<NodeCell>) {
        let followed = cell.clone();
        self.env.spawn("node's length", async move {
            // bitmaps that cannot follow are too short: nothing is marked behind their end
            let _ = followed.follow_length().await;
        });
        self.watcher.tell();
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
}

/// What stands in front of a node for whoever attaches to it now.
fn outermost(cell: &Rc<NodeCell>) -> Rc<NodeCell> {
    let mut cell = cell.clone();
    while let Some(filter) = cell.cover() {
        cell = filter;
    }
    cell
}

impl Drop for Graph {
    fn drop(&mut self) {
        // The reaper's task ends at its next look.
        self.reaper.called.notify_all();
    }
}

/// A weak handle, for hooks that must not keep the graph alive.
pub type WeakGraph = Weak<Graph>;
