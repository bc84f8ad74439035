//! What of the daemon a later life of it has to know, and that it is written down in time (`--state-dir`).
//!
//! After each command, at each change of the graph and before each end of a job the whole of what is to be known is described
//! anew ([`describe`]) and the difference from what is in the store is committed; nothing has to be told what changed. What
//! must stay true:
//! * A command's success, and an event that tells an end, are said after they are durable.
//! * No request of a guest goes where the store does not know of it: [`Recorder::keep`] is awaited between the swap of a plan
//!   and the opening of its gates.
//! * Without a store nothing here runs.
//! * The end of the daemon is no change: what it takes down then comes back.

mod describe;
mod groups;
mod history;
mod job;
mod leaving;
mod restore;

use crate::Daemon;
use crate::error::QmpError;
use ::state::{Batch, Store, Tables};
use block::{BlockError, Result};
use env::sync::Semaphore;
use graph::Keeper;
use history::History;
use jobs::JobKeeper;
use qapi::{Map, Value};
pub use restore::StartOption;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::{Rc, Weak};

/// The tables, in the order in which they are restored.
const TABLES: [&str; 8] = ["objects", "nodes", "groups", "server", "exports", "jobs", "leaving", "options"];

/// A command that was carried out, by which a later life makes the same again.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    pub(crate) command: String,
    pub(crate) arguments: Map<String, Value>,
}

/// Something of an earlier life that could not be made again.
#[derive(Clone, Debug)]
pub(crate) struct Broken {
    pub(crate) table: &'static str,
    pub(crate) key: String,
    /// As it was recorded: it stays so.
    record: Vec<u8>,
    pub(crate) why: String,
}

impl Broken {
    /// What it is, for people.
    pub(crate) fn kind(&self) -> &'static str {
        match self.table {
            "objects" => "object",
            "nodes" => "node",
            "groups" => "replication group",
            "server" => "server",
            "exports" => "export",
            "leaving" => "deletion of image",
            _ => "job",
        }
    }
}

/// Writes down what the daemon is.
pub(crate) struct Recorder {
    store: Rc<Store>,
    daemon: Weak<Daemon>,
    /// What the store holds.
    recorded: RefCell<Tables>,
    /// An error left open what it holds.
    doubt: Cell<bool>,
    /// One at a time: the next finds what the one before it wrote.
    turn: Semaphore,
    /// The daemon ends, or is not set up yet.
    resting: Cell<bool>,
    server: RefCell<Option<Said>>,
    exports: RefCell<BTreeMap<String, Said>>,
    jobs: RefCell<BTreeMap<String, job::JobRecord>>,
    /// Options of command lines that have taken effect, and whether the last one had them.
    options: RefCell<BTreeMap<String, bool>>,
    broken: RefCell<Vec<Broken>>,
    /// Writes down what has happened.
    history: RefCell<Option<Rc<History>>>,
}

impl Recorder {
    fn new(daemon: &Rc<Daemon>, store: Rc<Store>, recorded: Tables) -> Rc<Recorder> {
        Rc::new(Recorder {
            store,
            daemon: Rc::downgrade(daemon),
            recorded: RefCell::new(recorded),
            doubt: Cell::new(false),
            turn: Semaphore::new(1),
            resting: Cell::new(true),
            server: RefCell::default(),
            exports: RefCell::default(),
            jobs: RefCell::default(),
            options: RefCell::default(),
            broken: RefCell::default(),
            history: RefCell::default(),
        })
    }

    pub(crate) fn store(&self) -> &Rc<Store> {
        &self.store
    }

    pub(crate) fn history(&self) -> Option<Rc<History>> {
        self.history.borrow().clone()
    }

    pub(crate) fn broken(&self) -> Vec<Broken> {
        self.broken.borrow().clone()
    }

    /// From now on nothing is written: the daemon takes itself down.
    pub(crate) fn rest(&self) {
        self.resting.set(true);
    }

    pub(crate) fn is_resting(&self) -> bool {
        self.resting.get()
    }

    /// Makes durable what the daemon is now. Without a difference from what was recorded nothing is done.
    pub(crate) async fn record(&self) -> Result<()> {
        let _turn = self.turn.acquire(1).await;
        if self.resting.get() {
            return Ok(());
        }
        let Some(daemon) = self.daemon.upgrade() else { return Ok(()) };
        let failed = |e: BlockError| e.context("the change cannot be recorded in the state directory");
        if self.doubt.get() {
            // an empty commit lets the store find out what it holds
            self.store.commit(Batch::new()).await.map_err(failed)?;
            *self.recorded.borrow_mut() = self.store.read(&TABLES).map_err(failed)?;
            self.doubt.set(false);
        }
        let now = self.describe(&daemon);
        let batch = Batch::between(&self.recorded.borrow(), &now, &TABLES);
        if batch.is_empty() {
            return Ok(());
        }
        let outcome = self.store.commit(batch).await;
        self.doubt.set(outcome.is_err());
        if outcome.is_ok() {
            *self.recorded.borrow_mut() = now;
        }
        outcome.map_err(failed)
    }

    /// Takes note of a command that was carried out.
    pub(crate) fn note(&self, daemon: &Daemon, command: &str, arguments: &Map<String, Value>) {
        let said = || {
            let mut arguments = arguments.clone();
            describe::make_absolute(daemon, &mut arguments);
            Said { command: command.to_owned(), arguments }
        };
        let text = |key: &str| arguments.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        match command {
            "nbd-server-start" => *self.server.borrow_mut() = Some(said()),
            "nbd-server-stop" => *self.server.borrow_mut() = None,
            "block-export-add" => {
                self.exports.borrow_mut().insert(text("id"), said());
            }
            "nbd-server-add" => {
                let name = if arguments.contains_key("name") { text("name") } else { text("device") };
                self.exports.borrow_mut().insert(name, said());
            }
            _ => self.note_job(command, arguments),
        }
    }

    /// Whether `command` is about something of an earlier life that could not be made again; then that is forgotten. Adding
    /// something of its name is as well.
    pub(crate) fn forget(&self, command: &str, arguments: &Map<String, Value>) -> bool {
        let (table, key, deletes) = match command {
            "blockdev-del" => ("nodes", "node-name", true),
            "object-del" => ("objects", "id", true),
            "block-export-del" => ("exports", "id", true),
            "nbd-server-remove" => ("exports", "name", true),
            "nbd-server-stop" => ("server", "", true),
            // where it came as far as its nodes, the command removes those
            "replication-group-remove" => ("groups", "id", !self.has_group(arguments)),
            "job-dismiss" | "block-job-dismiss" | "job-cancel" => ("jobs", "id", true),
            "block-job-cancel" => ("jobs", "device", true),
            _ => return false,
        };
        let name = arguments.get(key).and_then(Value::as_str).unwrap_or_default();
        let mut broken = self.broken.borrow_mut();
        let before = broken.len();
        broken.retain(|b| b.table != table || (!key.is_empty() && b.key != name));
        deletes && broken.len() < before
    }
}

impl Recorder {
    fn has_group(&self, arguments: &Map<String, Value>) -> bool {
        let id = arguments.get("id").and_then(Value::as_str).unwrap_or_default();
        self.daemon.upgrade().is_some_and(|d| d.replication().borrow().contains_key(id))
    }
}

impl Keeper for Recorder {
    fn keep(&self, can_go_back: bool) -> block::Io<'_> {
        Box::pin(async move {
            let outcome = self.record().await;
            if let (Err(e), false, Some(daemon)) = (&outcome, can_go_back, self.daemon.upgrade()) {
                daemon
                    .tell_trouble(&format!("the graph has changed and {e}; a restart would not know of it"));
            }
            outcome
        })
    }
}

impl JobKeeper for Recorder {
    fn keep_running(&self) -> block::Io<'_> {
        Box::pin(self.record())
    }

    fn keep(&self) -> Pin<Box<dyn Future<Output = ()> + '_>> {
        Box::pin(async move {
            if let (Err(e), Some(daemon)) = (self.record().await, self.daemon.upgrade()) {
                daemon.tell_trouble(&format!("a job has ended and {e}; a restart would start it again"));
            }
        })
    }
}

/// Whether a command only asks.
pub(crate) fn only_asks(command: &str) -> bool {
    command.starts_with("query-")
        || command.starts_with("qom-list")
        || matches!(command, "qom-get" | "qmp_capabilities" | "quit")
}

impl Daemon {
    /// The directory in which this daemon keeps its state, if it does.
    pub fn state_dir(&self) -> Option<PathBuf> {
        self.recorder().map(|r| r.store.directory().to_owned())
    }

    /// The store in that directory.
    pub fn store(&self) -> Option<Rc<Store>> {
        self.recorder().map(|r| r.store.clone())
    }

    /// After a command that did what it was asked: has it recorded. Where that fails, what was made is taken away again, and
    /// the command has failed; what cannot be taken back stands, which the error says.
    pub(crate) async fn record_command(
        &self,
        recorder: &Recorder,
        command: &str,
        arguments: &Map<String, Value>,
    ) -> std::result::Result<(), QmpError> {
        recorder.note(self, command, arguments);
        let Err(e) = recorder.record().await else { return Ok(()) };
        let text = |key: &str| arguments.get(key).and_then(Value::as_str).unwrap_or_default();
        let taken_back = match command {
            "blockdev-add" => match self.graph().find(text("node-name")) {
                Some(cell) => self.graph().remove(&cell).await.is_ok(),
                None => true,
            },
            "object-add" => self.objects().remove(text("id")).is_ok(),
            "block-export-add" => self.exports().delete(text("id"), exports::DeleteMode::Hard).is_ok(),
            "nbd-server-start" => self.exports().stop_server().await.is_ok(),
            _ => match self.jobs().find(text("job-id")) {
                Ok(job) if job::starts_job(command) => self.jobs().cancel(&job).await.is_ok(),
                _ => false,
            },
        };
        if command == "nbd-server-start" {
            *recorder.server.borrow_mut() = None;
        }
        if taken_back {
            return Err(e.into());
        }
        self.tell_trouble(&format!("{command}: {e}"));
        let what = format!(
            "{e} ({command} was carried out all the same; it is recorded with the next change that can be)"
        );
        Err(QmpError::generic(what))
    }
}
