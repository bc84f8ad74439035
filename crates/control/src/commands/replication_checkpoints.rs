//! Checkpoints of replication groups that others than the primary have a say in: an external manager's decisions, and looking at
//! one without failing over to it.

use super::replication::{acting_primary, group, micros};
use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::{QmpError, Reply};
use exports::DeleteMode;
use graph::NodeCell;
use qapi::json;
use replication::Epoch;
use replication::session::{Acting, CloneNode};
use serde::Deserialize;
use std::rc::Rc;
use std::time::Duration;

pub(super) const COMMANDS: &[Entry] =
    &[entry::<Prepare>(), entry::<Commit>(), entry::<Abort>(), entry::<TestFailover>()];

/// How long the secondaries may take, and how long a manager may take to decide, where nothing else is said.
const PATIENCE_MS: u64 = 60_000;
/// Longest of these: a day.
const MAX_MS: u64 = 86_400_000;
/// How long what a test was used by may take to let go of it, and how often that is looked at.
const LET_GO: (Duration, Duration) = (Duration::from_secs(60), Duration::from_millis(50));

fn time(name: &str, ms: Option<u64>) -> Result<Duration, QmpError> {
    match ms.unwrap_or(PATIENCE_MS) {
        ms @ 1..=MAX_MS => Ok(Duration::from_millis(ms)),
        _ => Err(QmpError::generic(format!("Parameter '{name}' expects 1 to {MAX_MS} (one day)"))),
    }
}

/// Ends an epoch; the decision about it is the caller's.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Prepare {
    group: String,
    timeout_ms: Option<u64>,
    decide_within_ms: Option<u64>,
}

impl Command for Prepare {
    const NAME: &'static str = "replication-prepare-checkpoint";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let (timeout, decide) =
            (time("timeout-ms", self.timeout_ms)?, time("decide-within-ms", self.decide_within_ms)?);
        let primary = acting_primary(&daemon, &self.group)?;
        let prepared = primary.prepare(timeout, decide).await?;
        Ok(json!({
            "epoch": prepared.epoch.0,
            "received-seq": prepared.seq.0,
            "bytes": prepared.bytes,
            "duration-us": micros(prepared.duration),
        }))
    }
}

/// Commits a prepared epoch; on the primary, or on a secondary for itself.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Commit {
    group: String,
    epoch: u64,
    timeout_ms: Option<u64>,
}

impl Command for Commit {
    const NAME: &'static str = "replication-commit";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let timeout = time("timeout-ms", self.timeout_ms)?;
        match group(&daemon, &self.group)?.acting() {
            Acting::Primary(primary) => {
                let done = primary.commit(Epoch(self.epoch), timeout).await?;
                Ok(json!({
                    "epoch": done.epoch.0,
                    "digest": done.digest.to_string(),
                    "bytes": done.digest.bytes,
                    "duration-us": micros(done.duration),
                }))
            }
            Acting::Secondary(secondary) => {
                secondary.decide(Epoch(self.epoch)).await?;
                Ok(json!({"epoch": self.epoch}))
            }
            Acting::Unprotected => {
                Err(QmpError::generic(format!("Replication group '{}' does not replicate", self.group)))
            }
        }
    }
}

/// Lets a prepared epoch go on in the next.
#[derive(Deserialize)]
struct Abort {
    group: String,
    epoch: u64,
}

impl Command for Abort {
    const NAME: &'static str = "replication-abort";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        acting_primary(&daemon, &self.group)?.abort(Epoch(self.epoch))?;
        Ok(json!({}))
    }
}

/// Shows a secondary's disks as of a checkpoint, to write to them, while replication goes on.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct TestFailover {
    group: String,
    node_name: String,
    epoch: Option<u64>,
    ttl: Option<u64>,
}

impl Command for TestFailover {
    const NAME: &'static str = "replication-test-failover";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let ttl = match self.ttl {
            None => None,
            Some(s) if (1..=MAX_MS / 1000).contains(&s) => Some(Duration::from_secs(s)),
            Some(_) => return Err(QmpError::generic("Parameter 'ttl' expects 1 to 86400 (one day)")),
        };
        let group = group(&daemon, &self.group)?;
        let test = group.test_failover(&self.node_name, self.epoch.map(Epoch)).await?;
        let names: Vec<&str> = test.cells.iter().map(|c| c.name()).collect();
        let reply = json!({"epoch": test.epoch.0, "nodes": names});
        if let Some(ttl) = ttl {
            let (over, id) = (daemon.clone(), self.group);
            daemon.env().spawn("replication test", async move {
                over.env().sleep(ttl).await;
                for cell in test.cells {
                    over.end_test(&id, &cell).await;
                }
            });
        }
        Ok(reply)
    }
}

impl Daemon {
    /// The time of a test is up: its exports and its node go, whoever uses them.
    async fn end_test(self: &Rc<Self>, group: &str, cell: &Rc<NodeCell>) {
        let here = |cell: &Rc<NodeCell>| {
            self.graph().find(cell.name()).is_some_and(|now| Rc::ptr_eq(&now, cell)) && !self.has_ended()
        };
        if !here(cell) {
            return;
        }
        if let Some(clone) = cell.node().as_any().downcast_ref::<CloneNode>() {
            clone.end();
        }
        for export in self.exports().query() {
            if export.node_name == cell.name() {
                // one that is being deleted already goes by itself
                let _ = self.exports().delete(&export.id, DeleteMode::Hard);
            }
        }
        let until = self.env().now() + LET_GO.0;
        while here(cell) && self.env().now() < until {
            if cell.parents().is_empty() {
                // closing it meets nothing: it is empty
                let _ = self.graph().remove(cell).await;
            } else {
                self.env().sleep(LET_GO.1).await;
            }
        }
        if here(cell) {
            self.tell_trouble(&format!("node '{}' of a test that is over is in use still", cell.name()));
        }
        self.events().emit("REPLICATION_TEST_ENDED", json!({"group": group, "node-name": cell.name()}));
    }
}
