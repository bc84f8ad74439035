//! Replication as QEMU composes it, of all `replication` nodes of a daemon together: start, checkpoint, stop, failover.
//!
//! On a secondary three disks lie over one another: *active* (own writes), *hidden* (old content of what the primary has
//! overwritten since the last checkpoint), *secondary* (what the primary writes, over NBD). While replication runs a
//! copy-before-write filter stands in front of the secondary disk, and the exports of that disk lead to the filter.
//!
//! What must stay true:
//! * What is read through the active disk is own write, else the disk as of the last checkpoint, at every instant.
//! * A checkpoint is taken of all disks or of none: own writes are dropped first, which nobody misses if it ends there; then
//!   the moment comes from which on nothing can fail, whatever the hidden disks do ([`checkpoint`]).
//! * A write that was refused is followed by refusals, and by the refusal of the checkpoint.
//! * After a failover nobody who came through an export that was there before reaches the disk any more.
//! * A start that fails leaves nothing started.

mod checkpoint;
mod failover;
mod start;

use crate::{JobError, NoSink, Registry};
use block::{BlockError, ErrorKind};
use copy::PointInTime;
use drivers::filters::copy_before_write::CopyBeforeWrite;
use drivers::filters::replication::{Replication, Side, Stage};
use env::Env;
use env::sync::Semaphore;
use graph::{Blocker, Edge, Graph, NodeCell};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

type Outcome<T = ()> = std::result::Result<T, JobError>;

/// Why a request that comes from a former owner of the disk fails.
const FENCED: &str = "the disk has another owner since a failover";

/// A `replication` node in its place.
#[derive(Clone)]
struct Site {
    cell: Rc<NodeCell>,
}

impl Site {
    fn node(&self) -> Option<&Replication> {
        self.cell.node().as_any().downcast_ref()
    }
}

/// What runs on a secondary.
struct Running {
    active: Rc<NodeCell>,
    hidden: Rc<NodeCell>,
    secondary: Rc<NodeCell>,
    filter: Rc<NodeCell>,
    cbw: Rc<CopyBeforeWrite>,
    point: Rc<PointInTime>,
    /// Keeps the filter, also when no export uses it.
    main: RefCell<Option<Rc<Edge>>>,
    /// To the hidden and to the secondary disk; also the node's own.
    to_hidden: RefCell<Option<Rc<Edge>>>,
    to_secondary: RefCell<Option<Rc<Edge>>>,
    _blockers: Vec<Blocker>,
}

impl Running {
    /// The node leaves the disks below alone, but for where it reads because an overlay could not be emptied.
    fn let_go(&self, node: &Replication) {
        node.set_below(node.bypassed().into_iter().collect());
        self.to_hidden.take();
        self.to_secondary.take();
    }
}

/// All replication of a daemon.
pub struct Colo {
    env: Env,
    graph: Rc<Graph>,
    /// Merges after a failover; nobody else sees them.
    merges: Rc<Registry>,
    running: RefCell<BTreeMap<u64, Rc<Running>>>,
    /// One command after another.
    turn: Semaphore,
}

/// How replication fares, as `query-xen-replication-status` tells it: `None`, or what is wrong.
pub type Trouble = Option<String>;

impl Colo {
    /// Nothing is replicated.
    pub fn new(env: &Env, graph: &Rc<Graph>) -> Rc<Colo> {
        Rc::new(Colo {
            env: env.clone(),
            graph: graph.clone(),
            merges: Registry::new(env, Rc::new(NoSink)),
            running: RefCell::default(),
            turn: Semaphore::new(1),
        })
    }

    /// All replication nodes, oldest first.
    fn sites(&self) -> Vec<Site> {
        let all = self.graph.nodes().into_iter().map(|cell| Site { cell });
        all.filter(|s| s.node().is_some()).collect()
    }

    fn running(&self, site: &Site) -> Option<Rc<Running>> {
        self.running.borrow().get(&site.cell.id()).cloned()
    }

    /// Ends merges; before the nodes are closed.
    pub async fn shut_down(&self) {
        self.merges.cancel_all().await;
        self.running.borrow_mut().clear();
    }

    /// Which sides are replicating now: (primary, secondary).
    pub fn sides(&self) -> (bool, bool) {
        let running = |side| {
            self.sites().iter().filter_map(Site::node).any(|n| {
                n.options().side == side && matches!(n.stage(), Stage::Running | Stage::FailoverFailed)
            })
        };
        (running(Side::Primary), running(Side::Secondary))
    }

    /// What is wrong with the first disk that something is wrong with.
    pub fn trouble(&self) -> Trouble {
        self.sites().iter().find_map(|site| {
            let node = site.node()?;
            if node.stage() == Stage::None {
                return Some("Block replication is not running".to_owned());
            }
            if let Some(e) = node.error() {
                // the sentence that managers know, where it is theirs
                return Some(match node.options().side {
                    Side::Primary => "I/O error occurred".to_owned(),
                    Side::Secondary => format!("I/O error occurred: {e}"),
                });
            }
            let why = self.running(site)?.point.refusing()?;
            Some(format!("I/O error occurred: {why}"))
        })
    }

    /// Starts all nodes, which must all be of this side. On an error none is left started.
    pub async fn start(self: &Rc<Self>, side: Side) -> Outcome {
        let _turn = self.turn.acquire(1).await;
        let mut started: Vec<Site> = Vec::new();
        for site in self.sites() {
            match self.start_one(&site, side).await {
                Ok(true) => started.push(site),
                Ok(false) => {}
                Err(e) => {
                    for site in started {
                        self.take_back(&site).await;
                    }
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    /// Ends replication. A secondary takes over with `failover`; without, it drops what the own user wrote.
    pub async fn stop(self: &Rc<Self>, failover: bool) -> Outcome {
        let _turn = self.turn.acquire(1).await;
        for site in &self.sites() {
            let Some(node) = site.node() else { continue };
            let retry = failover && node.options().side == Side::Secondary;
            match node.stage() {
                Stage::None if retry && node.options().durable => {}
                Stage::Running => {}
                Stage::FailoverFailed if retry => {}
                Stage::Failover | Stage::Done => continue,
                Stage::None | Stage::FailoverFailed => {
                    return Err(JobError::refused("Block replication is not running"));
                }
            }
            match node.options().side {
                Side::Primary => {
                    node.set_stage(Stage::Done, "stopped");
                    node.clear_error();
                }
                Side::Secondary if failover => self.fail_over(site).await?,
                Side::Secondary => self.stop_plainly(site).await?,
            }
        }
        Ok(())
    }
}

/// An error of a command, about a node.
fn about(cell: &NodeCell, what: &str, why: &BlockError) -> JobError {
    BlockError::new(ErrorKind::Io, format!("Node '{}': {what}: {why}", cell.name())).into()
}
