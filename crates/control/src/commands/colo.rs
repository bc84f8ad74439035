//! Replication as QEMU's system emulator offers it (its storage daemon has the nodes but not the commands), and the way out of
//! a link that hangs.

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::{Class, QmpError, Reply};
use drivers::filters::replication::Side;
use drivers::nbd_client::NbdClient;
use graph::NodeCell;
use qapi::{Map, Value, json};
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[
    entry::<XenSetReplication>(),
    entry::<XenColoDoCheckpoint>(),
    entry::<QueryXenReplicationStatus>(),
    entry::<XColoLostHeartbeat>(),
    entry::<QueryColoStatus>(),
    entry::<Yank>(),
    entry::<QueryYank>(),
];

/// Starts or ends replication of all disks.
#[derive(Deserialize)]
struct XenSetReplication {
    enable: bool,
    primary: bool,
    failover: Option<bool>,
}

impl Command for XenSetReplication {
    const NAME: &'static str = "xen-set-replication";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        if !self.enable {
            daemon.colo().stop(self.failover.unwrap_or(false)).await?;
            return Ok(json!({}));
        }
        if self.failover == Some(true) {
            return Err(QmpError::generic("Parameter 'failover' is only for stopping replication"));
        }
        let side = if self.primary { Side::Primary } else { Side::Secondary };
        daemon.colo().start(side).await?;
        Ok(json!({}))
    }
}

/// Takes a checkpoint of all disks.
#[derive(Deserialize)]
struct XenColoDoCheckpoint {}

impl Command for XenColoDoCheckpoint {
    const NAME: &'static str = "xen-colo-do-checkpoint";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.colo().checkpoint().await?;
        Ok(json!({}))
    }
}

/// Tells whether something went wrong.
#[derive(Deserialize)]
struct QueryXenReplicationStatus {}

impl Command for QueryXenReplicationStatus {
    const NAME: &'static str = "query-xen-replication-status";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        Ok(match daemon.colo().trouble() {
            Some(desc) => json!({"error": true, "desc": desc}),
            None => json!({"error": false}),
        })
    }
}

/// The other side is lost: a secondary takes over, a primary goes on alone.
#[derive(Deserialize)]
struct XColoLostHeartbeat {}

impl Command for XColoLostHeartbeat {
    const NAME: &'static str = "x-colo-lost-heartbeat";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let mode = match daemon.colo().sides() {
            (false, false) => return Err(QmpError::generic("VM is not in COLO mode")),
            (true, _) => "primary",
            (false, true) => "secondary",
        };
        daemon.colo().stop(mode == "secondary").await?;
        daemon.exited(mode);
        daemon.events().emit("COLO_EXIT", json!({"mode": mode, "reason": "request"}));
        Ok(json!({}))
    }
}

/// Tells which side this is, and which it was.
#[derive(Deserialize)]
struct QueryColoStatus {}

impl Command for QueryColoStatus {
    const NAME: &'static str = "query-colo-status";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let mode = match daemon.colo().sides() {
            (true, _) => "primary",
            (false, true) => "secondary",
            (false, false) => "none",
        };
        let last = daemon.last_side();
        let reason = if last == "none" { "none" } else { "request" };
        Ok(json!({"mode": mode, "last-mode": last, "reason": reason}))
    }
}

/// Hangs up links that may hang.
#[derive(Deserialize)]
struct Yank {
    instances: Vec<Map<String, Value>>,
}

/// The NBD client that a node is.
fn link(cell: &NodeCell) -> Option<&NbdClient> {
    cell.node().as_any().downcast_ref()
}

impl Command for Yank {
    const NAME: &'static str = "yank";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let mut found = Vec::new();
        for instance in &self.instances {
            let name = instance.get("node-name").and_then(Value::as_str);
            let cell = name.and_then(|n| daemon.graph().find(n)).filter(|c| link(c).is_some());
            found.push(cell.ok_or_else(|| QmpError::of(Class::DeviceNotFound, "Instance not found"))?);
        }
        found.iter().filter_map(|c| link(c)).for_each(NbdClient::hang_up);
        Ok(json!({}))
    }
}

/// Lists links that can be hung up.
#[derive(Deserialize)]
struct QueryYank {}

impl Command for QueryYank {
    const NAME: &'static str = "query-yank";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let nodes = daemon.graph().nodes();
        let links = nodes.iter().filter(|c| link(c).is_some());
        Ok(links.map(|c| json!({"type": "block-node", "node-name": c.name()})).collect())
    }
}
