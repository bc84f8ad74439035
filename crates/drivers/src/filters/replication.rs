//! `replication`: one side of a disk that is replicated to another host, as QEMU composes it.
//!
//! On the primary the node stands, beside the local disk, below a quorum; what is written through it goes to the secondary's
//! disk (an NBD client). On the secondary it stands in front of an overlay (the *active* disk) over an overlay (the *hidden*
//! disk) over the disk that the primary writes to; who reads it sees the own writes, else the last checkpoint.
//! The node decides nothing: whoever starts and ends replication (the crate `jobs`) tells it the [`Stage`].
//!
//! What must stay true:
//! * Primary: a request that could not be forwarded, or not in time, never fails or holds the client; it is told (an event and a
//!   lasting error) before the client is answered, and nothing is forwarded after it: the secondary holds a prefix.
//! * Secondary: what is read while replication runs is own write, else last checkpoint, also where a checkpoint broke off
//!   half-way ([`Replication::bypass`]).
//! * Nobody is inside while the gate is closed: whoever closes it may exchange what is below.

use super::{Given, filter_passes};
use block::{BlockError, Data, ErrorKind, Extent, Io, Kind, Prealloc, ReqFlags, Result, Span};
use env::Env;
use graph::gate::{Gate, Gated};
use graph::{Demand, Edge, Node, NodeDetails, Perms};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

/// Which side a node is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Sends writes.
    Primary,
    /// Receives them.
    Secondary,
}

/// How far replication is, of this node or of a group of the crate `replication`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Not started: all requests fail.
    None,
    /// Started.
    Running,
    /// The secondary has taken over; its overlays go down into the disk behind its back.
    Failover,
    /// That failed; the overlays go on serving, and it can be tried again.
    FailoverFailed,
    /// Ended.
    Done,
}

impl Stage {
    /// As QMP says it.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::None => "none",
            Stage::Running => "running",
            Stage::Failover => "failover",
            Stage::FailoverFailed => "failover-failed",
            Stage::Done => "done",
        }
    }
}

/// Options of `replication`.
#[derive(Clone, Debug)]
pub struct ReplicationOptions {
    /// Which side.
    pub side: Side,
    /// The node that the secondary's users use.
    pub top: Option<String>,
    /// How long a request to the secondary may take before it counts as lost; zero: as long as it likes.
    pub timeout: Duration,
    /// Old bytes are on stable storage before they are overwritten: the secondary survives a crash.
    pub durable: bool,
    /// As the client said it.
    pub given: Given,
}

/// How long a request to the secondary may take if nobody says otherwise: well above what a busy disk or a reconnecting
/// link takes, well below what a guest's driver waits (30 s) before it resets its disk.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

impl ReplicationOptions {
    /// Fails if the options contradict each other.
    pub fn check(&self) -> Result<()> {
        match (self.side, &self.top) {
            (Side::Primary, Some(_)) => {
                Err(BlockError::invalid("The primary side does not support option top-id"))
            }
            (Side::Secondary, None) => Err(BlockError::invalid("Missing the option top-id")),
            _ => Ok(()),
        }
    }
}

/// What a replication node reports.
#[derive(Clone, Debug)]
pub enum ReplicationEvent {
    /// It is in another stage.
    Stage {
        /// Before.
        old: Stage,
        /// Now.
        new: Stage,
        /// Why.
        reason: String,
    },
    /// Something could not be done; replication is not what it was any more.
    Error {
        /// What.
        operation: &'static str,
        /// Where; empty: everywhere.
        at: Span,
        /// Why.
        error: BlockError,
    },
    /// A checkpoint was refused; the last one stays.
    Veto {
        /// Why.
        reason: String,
    },
    /// How far a failover is: `started`, `serving`, `completed`, `failed`.
    Failover {
        /// Which step.
        phase: &'static str,
        /// Why, if it failed.
        error: Option<BlockError>,
    },
}

/// Told of events, with the node's name.
pub type ReplicationHook = Rc<dyn Fn(&str, ReplicationEvent)>;

/// The node.
pub struct Replication {
    name: String,
    env: Env,
    file: Rc<Edge>,
    options: ReplicationOptions,
    hook: ReplicationHook,
    stage: Cell<Stage>,
    error: RefCell<Option<BlockError>>,
    gate: Gate,
    /// Edges that are there while replication runs: to the hidden and to the secondary disk.
    below: RefCell<Vec<Rc<Edge>>>,
    bypass: RefCell<Option<Rc<Edge>>>,
}

impl Gated for Replication {
    fn gate(&self) -> &Gate {
        &self.gate
    }
}

impl Replication {
    /// A node called `name` above the child of `file` (role `Primary`).
    pub fn open(
        env: &Env,
        name: &str,
        file: Rc<Edge>,
        options: ReplicationOptions,
        hook: ReplicationHook,
    ) -> Result<Rc<Replication>> {
        options.check()?;
        Ok(Rc::new(Replication {
            name: name.to_owned(),
            env: env.clone(),
            file,
            options,
            hook,
            stage: Cell::new(Stage::None),
            error: RefCell::new(None),
            gate: Gate::new(),
            below: RefCell::default(),
            bypass: RefCell::new(None),
        }))
    }

    /// Its options.
    pub fn options(&self) -> &ReplicationOptions {
        &self.options
    }

    /// The edge to what it is in front of.
    pub fn file(&self) -> &Rc<Edge> {
        &self.file
    }

    /// How far replication is.
    pub fn stage(&self) -> Stage {
        self.stage.get()
    }

    /// Another stage; told by an event.
    pub fn set_stage(&self, new: Stage, reason: &str) {
        let old = self.stage.replace(new);
        if old != new {
            self.tell(ReplicationEvent::Stage { old, new, reason: reason.to_owned() });
        }
    }

    /// What went wrong since replication began.
    pub fn error(&self) -> Option<BlockError> {
        self.error.borrow().clone()
    }

    /// Forgets what went wrong.
    pub fn clear_error(&self) {
        self.error.take();
    }

    /// Remembers what went wrong (the first counts) and tells it.
    pub fn fail(&self, operation: &'static str, at: Span, error: BlockError) {
        if self.error.borrow().is_some() {
            return;
        }
        *self.error.borrow_mut() = Some(error.clone());
        self.tell(ReplicationEvent::Error { operation, at, error });
    }

    /// Tells an event.
    pub fn tell(&self, event: ReplicationEvent) {
        (self.hook)(&self.name, event);
    }

    /// The edges to the hidden and the secondary disk, which are the node's own from the next change of the graph on.
    pub fn set_below(&self, edges: Vec<Rc<Edge>>) {
        let old = self.below.replace(edges);
        drop(old);
    }

    /// From now on reads come from behind `edge` and writes are refused: an overlay above that could not be emptied, and what is
    /// in it means nothing. `None`: everything goes the usual way again.
    pub fn bypass(&self, edge: Option<Rc<Edge>>) {
        let old = self.bypass.replace(edge);
        drop(old);
    }

    /// Where reads come from instead of the active disk, if so.
    pub fn bypassed(&self) -> Option<Rc<Edge>> {
        self.bypass.borrow().clone()
    }

    fn refused() -> BlockError {
        BlockError::new(ErrorKind::Io, "replication is not running")
    }

    /// Carries out a request as side and stage say.
    async fn change(
        &self,
        operation: &'static str,
        at: Span,
        doing: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        match (self.options.side, self.stage.get()) {
            (Side::Primary, Stage::Running) => {
                self.forward(operation, at, doing).await;
                Ok(())
            }
            (Side::Secondary, Stage::None) | (Side::Primary, _) => Err(Replication::refused()),
            (Side::Secondary, _) => {
                let _pass = self.gate.enter().await;
                if self.bypass.borrow().is_some() {
                    let why = "the active disk could not be emptied for a checkpoint";
                    return Err(BlockError::new(ErrorKind::Io, why));
                }
                doing.await
            }
        }
    }

    /// Sends a request to the secondary, unless one before did not get there.
    async fn forward(&self, operation: &'static str, at: Span, doing: impl Future<Output = Result<()>>) {
        if self.error.borrow().is_some() {
            return;
        }
        let done = if self.options.timeout.is_zero() {
            doing.await
        } else {
            let late = || {
                Err(BlockError::from_errno(BlockError::ETIMEDOUT).context("the secondary does not answer"))
            };
            self.env.timeout(self.options.timeout, doing).await.unwrap_or_else(late)
        };
        if let Err(error) = done {
            self.fail(operation, at, error);
        }
    }

    async fn read_now(&self, at: Span) -> Result<Data> {
        match (self.options.side, self.stage.get()) {
            (_, Stage::None) | (Side::Primary, Stage::Failover | Stage::FailoverFailed | Stage::Done) => {
                Err(Replication::refused())
            }
            (Side::Primary, Stage::Running) => self.file.read(at).await,
            (Side::Secondary, _) => {
                let _pass = self.gate.enter().await;
                match self.bypassed() {
                    Some(edge) => edge.read(at).await,
                    None => self.file.read(at).await,
                }
            }
        }
    }
}

impl Node for Replication {
    filter_passes!(file: limits);

    fn driver(&self) -> &'static str {
        "replication"
    }
    fn len(&self) -> u64 {
        self.file.len()
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        let mut edges = vec![self.file.clone()];
        edges.extend(self.below.borrow().iter().cloned());
        edges
    }
    fn wants(&self, edge: &Edge, _: Demand, writable: bool) -> Demand {
        let shares = Perms::CONSISTENT_READ.with(Perms::WRITE).with(Perms::WRITE_UNCHANGED);
        let writing = if writable { Perms::WRITE } else { Perms::NONE };
        if edge.id() == self.file.id() {
            return Demand { needs: Perms::CONSISTENT_READ.with(writing), shares };
        }
        // Read past an overlay that could not be emptied; whoever writes there goes through other edges.
        Demand { needs: Perms::CONSISTENT_READ, shares }
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(self.read_now(at))
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        Box::pin(self.change("write", at, self.file.write(at.start, data, flags)))
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        // not to be given back below: what is allocated there hides what the primary writes
        let flags = ReqFlags { may_unmap: false, ..flags };
        Box::pin(self.change("write", at, self.file.zero(at, flags)))
    }
    fn discard(&self, _: Span) -> Io<'_> {
        // On both sides or on none, so on none: what is discarded reads as before everywhere.
        Box::pin(async { Ok(()) })
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move {
            if matches!(self.stage.get(), Stage::Done) && self.options.side == Side::Secondary {
                let found = self.file.status(at).await?;
                return Ok(found
                    .iter()
                    .map(|e| Extent::new(e.span, if e.reads_zero() { Kind::Zero } else { Kind::Data }))
                    .collect());
            }
            // What is below changes while it is asked; only a read is kept apart from that.
            Ok(vec![Extent::new(at, Kind::Data)])
        })
    }
    fn flush(&self) -> Io<'_> {
        let whole = Span::new(0, 0);
        match (self.options.side, self.stage.get()) {
            (Side::Primary, Stage::Running) => Box::pin(async move {
                self.forward("flush", whole, self.file.flush()).await;
                Ok(())
            }),
            _ => Box::pin(self.file.flush()),
        }
    }
    fn resize(&self, _: u64, _: Prealloc) -> Io<'_> {
        Box::pin(async { Err(BlockError::new(ErrorKind::Busy, "a replicated disk cannot be resized")) })
    }
    fn set_writable(&self, _: bool) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> Io<'_> {
        self.bypass(None);
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move { self.options.given.details(self.driver(), &self.file).await })
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
