//! A daemon made again from the records of an earlier life.
//!
//! Order: objects, nodes (children first), the NBD server, exports, jobs, deletions. What can happen: a file is gone, a socket cannot be
//! listened at, a process that was killed a moment ago still holds the lock of an image (it is waited for). What must stay
//! true: whatever cannot be made again stays recorded, is told and shown; the rest comes back all the same.

use super::describe::make_absolute;
use super::groups;
use super::history::{self, History};
use super::{Broken, Recorder, Said, TABLES};
use crate::error::{QmpError, Reply};
use crate::{Daemon, blockdev};
use ::state::{Store, Tables};
use graph::NodeCell;
use open::Inherits;
use qapi::{Map, Value, json};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

/// How long the locks and addresses of a process that was killed may outlive it, and some more.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often one is tried meanwhile.
const STEP: Duration = Duration::from_millis(25);

/// An option of the command line that stands for a command.
#[derive(Clone, Debug)]
pub struct StartOption {
    /// The command.
    pub command: &'static str,
    /// Its checked arguments.
    pub arguments: Map<String, Value>,
}

impl StartOption {
    /// What identifies it: the same option in the next life has the same.
    fn key(&self) -> String {
        let mut sorted = Value::Object(self.arguments.clone());
        sorted.sort_all_objects();
        format!("{} {sorted}", self.command)
    }

    /// The table and key of the record of what it makes.
    fn makes(&self) -> (&'static str, Cow<'_, str>) {
        let text = |key: &str| self.arguments.get(key).and_then(Value::as_str).unwrap_or_default().into();
        match self.command {
            "blockdev-add" if self.arguments.get("driver").is_some_and(|d| d == "blkcolo") => {
                let node = self.arguments.get("node-name").and_then(Value::as_str);
                ("groups", crate::blkcolo::group_id(&self.arguments, node).into())
            }
            "blockdev-add" => ("nodes", text("node-name")),
            "object-add" => ("objects", text("id")),
            "nbd-server-start" => ("server", "nbd".into()),
            _ => ("exports", text("id")),
        }
    }
}

/// A record as it was read.
pub(super) struct Record {
    table: &'static str,
    key: String,
    bytes: Vec<u8>,
    value: Value,
}

impl Record {
    pub(super) fn key(&self) -> &str {
        &self.key
    }

    pub(super) fn value(&self) -> &Value {
        &self.value
    }

    fn order(&self) -> u64 {
        self.value.get("order").and_then(Value::as_u64).unwrap_or(0)
    }

    fn object(&self, key: &str) -> Map<String, Value> {
        self.value.get(key).and_then(Value::as_object).cloned().unwrap_or_default()
    }

    fn text(&self, key: &str) -> &str {
        self.value.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    /// Names of the children of a node.
    fn children(&self) -> Vec<String> {
        let mut out = Vec::new();
        for value in self.object("children").values() {
            match value {
                Value::String(name) => out.push(name.clone()),
                Value::Array(names) => out.extend(names.iter().filter_map(|n| n.as_str().map(str::to_owned))),
                _ => {}
            }
        }
        out
    }
}

fn records(tables: &Tables, table: &'static str) -> Vec<Record> {
    let rows = tables.get(table).into_iter().flatten();
    let read = |(key, bytes): (&String, &Vec<u8>)| Record {
        table,
        key: key.clone(),
        bytes: bytes.clone(),
        value: std::str::from_utf8(bytes)
            .ok()
            .and_then(|t| qapi::json::parse_one(t).ok())
            .unwrap_or_default(),
    };
    let mut out: Vec<Record> = rows.map(read).collect();
    out.sort_by_key(Record::order);
    out
}

impl Daemon {
    /// Makes again what the store holds, and records from now on. To be called before any option takes effect; `options` are
    /// those that will. What an option says of an object, the server or an export goes before what is recorded of it. The
    /// answer says which options need not take effect any more, since they did in an earlier life.
    ///
    /// # Errors
    /// The store cannot be read or written. What cannot be made again is no error; see `query-state`.
    pub async fn use_state(
        self: &Rc<Self>,
        store: Rc<Store>,
        options: &[StartOption],
    ) -> Result<Vec<bool>, QmpError> {
        let tables = store.read(&TABLES)?;
        let history =
            History::begin(self.env(), self.events().record(), &store, &store.read(&history::TABLES)?);
        history.write().await?;
        let recorder = Recorder::new(self, store, tables.clone());
        *recorder.history.borrow_mut() = Some(history);
        self.set_recorder(recorder.clone());
        let earlier: Vec<(String, bool)> = records(&tables, "options")
            .into_iter()
            .map(|r| (r.key.clone(), r.value["last"] == json!(true)))
            .collect();
        let known = |o: &StartOption| earlier.iter().find(|(key, _)| *key == o.key()).map(|(_, last)| *last);
        let recorded = |o: &StartOption| {
            let (table, key) = o.makes();
            tables.get(table).is_some_and(|rows| rows.contains_key(&*key))
        };
        let mut skip: Vec<bool> =
            options.iter().map(|o| known(o).is_some_and(|last| last || recorded(o))).collect();
        // changed since: they take the place of what is recorded
        let mut instead = Vec::new();
        for (option, skip) in options.iter().zip(&mut skip) {
            if !*skip && option.command != "blockdev-add" && recorded(option) {
                instead.push(option);
                *skip = true;
            }
        }
        let all = TABLES.iter().flat_map(|t| records(&tables, t)).collect();
        self.restore(&recorder, all, &instead).await;
        *recorder.options.borrow_mut() = earlier.into_iter().map(|(key, _)| (key, false)).collect();
        for (option, _) in options.iter().zip(&skip).filter(|(_, skip)| **skip) {
            recorder.options.borrow_mut().insert(option.key(), true);
        }
        recorder.resting.set(false);
        self.graph().set_keeper(recorder.clone());
        self.jobs().set_keeper(recorder.clone());
        recorder.record().await?;
        Ok(skip)
    }

    /// Makes again what is recorded, but what `instead` says otherwise of.
    async fn restore(
        self: &Rc<Self>,
        recorder: &Rc<Recorder>,
        mut all: Vec<Record>,
        instead: &[&StartOption],
    ) {
        let home = self.opener().bitmap_home();
        home.iter().for_each(|h| h.set_resuming(true));
        self.exports().hold_clients(true);
        self.restore_held(recorder, &mut all, instead).await;
        self.exports().hold_clients(false);
        home.iter().for_each(|h| h.set_resuming(false));
    }

    async fn restore_held(
        self: &Rc<Self>,
        recorder: &Rc<Recorder>,
        all: &mut Vec<Record>,
        instead: &[&StartOption],
    ) {
        let replaced = |r: &Record| instead.iter().find(|o| o.makes() == (r.table, r.key.as_str().into()));
        for record in all.extract_if(.., |r| r.table == "objects") {
            let outcome = match replaced(&record) {
                Some(option) => self.unrecorded(option.command, option.arguments.clone()).await.map(|_| ()),
                None => self.restore_object(&record).await,
            };
            recorder.see(self, record, outcome);
        }
        let nodes = all.extract_if(.., |r| r.table == "nodes").collect();
        let opened = self.restore_nodes(recorder, nodes).await;
        // disks of groups that are not there
        let mut unguarded: BTreeSet<String> = BTreeSet::new();
        for record in all.drain(..) {
            let serves = record.object("arguments");
            let serves = ["node-name", "device"].iter().find_map(|k| serves.get(*k).and_then(Value::as_str));
            let outcome = match (record.table, replaced(&record)) {
                ("groups", _) => {
                    let outcome = Box::pin(self.restore_group(&record)).await;
                    if outcome.is_err() && !self.replication().borrow().contains_key(&record.key) {
                        unguarded.extend(groups::disks(record.value.as_object().unwrap_or(&Map::new())));
                    }
                    outcome
                }
                ("exports" | "jobs", _) if serves.is_some_and(|n| unguarded.contains(n)) => {
                    Err(QmpError::generic("the replication group of its disk is not there"))
                }
                ("server" | "exports", Some(o)) => {
                    let said = Said { command: o.command.to_owned(), arguments: o.arguments.clone() };
                    self.restore_said(recorder, &said).await
                }
                ("server" | "exports", None) => {
                    let command = record.text("command").to_owned();
                    self.restore_said(recorder, &Said { command, arguments: record.object("arguments") })
                        .await
                }
                ("jobs", _) => self.restore_job(recorder, &record.key, &record.value).await,
                ("leaving", _) => self.restore_leaving(recorder, &record).await,
                _ => Ok(()),
            };
            recorder.see(self, record, outcome);
        }
        for cell in opened {
            // what those used that are not there themselves stays the monitor's until somebody uses it again
            cell.set_monitor_owned(cell.parents().is_empty());
        }
    }

    /// Tries once more to make what could not be made again.
    pub(crate) async fn retry_state(self: &Rc<Self>) {
        let Some(recorder) = self.recorder() else { return };
        let mut tables = Tables::new();
        for broken in recorder.broken.take() {
            tables.entry(broken.table.to_owned()).or_default().insert(broken.key, broken.record);
        }
        let all = TABLES.iter().flat_map(|t| records(&tables, t)).collect();
        self.restore(&recorder, all, &[]).await;
    }

    /// Carries out an option of the command line.
    ///
    /// # Errors
    /// Those of its command.
    pub async fn run_option(self: &Rc<Self>, option: &StartOption) -> Reply {
        let recorder = self.recorder();
        if let Some(r) = &recorder {
            // in the same commit as what it does
            r.options.borrow_mut().insert(option.key(), true);
        }
        let reply = self.run(option.command, option.arguments.clone()).await;
        if let (Err(_), Some(r)) = (&reply, recorder) {
            r.options.borrow_mut().remove(&option.key());
        }
        reply
    }

    async fn restore_object(self: &Rc<Self>, record: &Record) -> Result<(), QmpError> {
        let kind = record.text("qom-type");
        self.objects().add(self.env(), kind, &record.key, record.object("properties")).await
    }

    /// Those that are given were opened for other nodes. They are the monitor's for now: an attempt of a parent to open that
    /// fails must not close them.
    async fn restore_nodes(
        self: &Rc<Self>,
        recorder: &Rc<Recorder>,
        mut left: Vec<Record>,
    ) -> Vec<Rc<NodeCell>> {
        let mut opened = Vec::new();
        let mut lost: BTreeSet<String> = BTreeSet::new();
        loop {
            let waiting: BTreeSet<String> = left.iter().map(|r| r.key.clone()).collect();
            let Some(at) = left.iter().position(|r| !r.children().iter().any(|c| waiting.contains(c))) else {
                break;
            };
            let record = left.remove(at);
            let gone = record.children().into_iter().find(|c| lost.contains(c));
            let outcome = match gone {
                Some(child) => Err(QmpError::generic(format!("its child '{child}' is not there"))),
                None => self.restore_node(&record).await,
            };
            let outcome = match outcome {
                Ok(cell) if cell.is_monitor_owned() => Ok(()),
                Ok(cell) => {
                    cell.set_monitor_owned(true);
                    opened.push(cell);
                    Ok(())
                }
                Err(e) => {
                    lost.insert(record.key.clone());
                    Err(e)
                }
            };
            recorder.see(self, record, outcome);
        }
        for record in left {
            recorder.see(self, record, Err(QmpError::generic("its children are a circle")));
        }
        opened
    }

    async fn restore_node(self: &Rc<Self>, record: &Record) -> Result<Rc<NodeCell>, QmpError> {
        let mut options = record.object("options");
        options.extend(record.object("children"));
        let spec = blockdev::spec(&options)?;
        let inherits = record.object("inherits");
        let flag = |key: &str| inherits.get(key) == Some(&json!(true));
        let inherits = Inherits {
            read_only: flag("read-only"),
            auto_read_only: flag("auto-read-only"),
            direct: flag("cache.direct"),
            no_flush: flag("cache.no-flush"),
            discard: flag("discard"),
            force_share: flag("force-share"),
            monitor_owned: record.value["owned"] == json!(true),
        };
        let until = self.env().now() + PATIENCE;
        let cell = loop {
            match self.opener().again(&spec, inherits).await {
                Ok(cell) => break cell,
                Err(e) if is_held(e.message()) && self.env().now() < until => self.env().sleep(STEP).await,
                Err(e) => return Err(e.into()),
            }
        };
        if let Some(bytes) = record.value["write-threshold"].as_u64() {
            let arguments = json!({"node-name": record.key, "write-threshold": bytes});
            self.unrecorded("block-set-write-threshold", arguments.as_object().cloned().unwrap_or_default())
                .await?;
        }
        Ok(cell)
    }

    async fn restore_said(self: &Rc<Self>, recorder: &Recorder, said: &Said) -> Result<(), QmpError> {
        self.patiently(&said.command, &said.arguments).await?;
        let mut arguments = said.arguments.clone();
        make_absolute(self, &mut arguments);
        recorder.note(self, &said.command, &arguments);
        Ok(())
    }

    /// Runs a command again and again as long as what it needs is held by a process that was killed.
    pub(super) async fn patiently(self: &Rc<Self>, command: &str, arguments: &Map<String, Value>) -> Reply {
        self.while_held(async || self.unrecorded(command, arguments.clone()).await).await
    }

    /// Tries something again and again as long as what it needs is held by a process that was killed.
    pub(super) async fn while_held<T>(
        &self,
        what: impl AsyncFn() -> Result<T, QmpError>,
    ) -> Result<T, QmpError> {
        let until = self.env().now() + PATIENCE;
        loop {
            match what().await {
                Err(e) if is_held(&e.desc) && self.env().now() < until => self.env().sleep(STEP).await,
                outcome => return outcome,
            }
        }
    }
}

/// Whether an error says that another process holds something.
fn is_held(message: &str) -> bool {
    message.contains("Failed to get ") || message.contains("already in use")
}

impl Recorder {
    /// What became of a record. What could not be made again is kept, and told.
    fn see(&self, daemon: &Daemon, record: Record, outcome: Result<(), QmpError>) {
        let Err(e) = outcome else { return };
        let Record { table, key, bytes, .. } = record;
        let broken = Broken { table, key, record: bytes, why: e.desc };
        let (kind, name, why) = (broken.kind(), &broken.key, &broken.why);
        daemon.tell_trouble(&format!("{kind} '{name}' could not be restored: {why}"));
        self.broken.borrow_mut().push(broken);
    }
}
