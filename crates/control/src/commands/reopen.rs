//! Changes of nodes that are there: other options and children, and what is told of their writes.

use super::{Command, Entry, entry};
use crate::error::{QmpError, Reply};
use crate::{Daemon, blockdev};
use graph::Parent;
use qapi::{Map, Value, json};
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[
    entry::<BlockdevReopen>(),
    entry::<BlockdevChange>(),
    entry::<SetIothread>(),
    entry::<BlockSetWriteThreshold>(),
];

/// Gives nodes other options, all at one instant.
#[derive(Deserialize)]
struct BlockdevReopen {
    options: Vec<Map<String, Value>>,
}

impl Command for BlockdevReopen {
    const NAME: &'static str = "blockdev-reopen";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let specs = self.options.iter().map(blockdev::spec).collect::<Result<Vec<_>, _>>()?;
        daemon.opener().reopen(&specs).await?;
        Ok(json!({}))
    }
}

/// Gives a quorum one more child, or takes one away.
#[derive(Deserialize)]
struct BlockdevChange {
    parent: String,
    child: Option<String>,
    node: Option<String>,
}

impl Command for BlockdevChange {
    const NAME: &'static str = "x-blockdev-change";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let find = |name: &str| daemon.graph().find(name);
        let Some(parent) = find(&self.parent) else {
            let name = &self.parent;
            return Err(QmpError::generic(format!("Cannot find device='{name}' nor node-name='{name}'")));
        };
        match (&self.child, &self.node) {
            (None, None) => return Err(QmpError::generic("Either child or node must be specified")),
            (Some(_), Some(_)) => {
                return Err(QmpError::generic("The parameters child and node are in conflict"));
            }
            (Some(child), None) => daemon.opener().remove_child(&parent, child).await?,
            (None, Some(name)) => {
                let child =
                    find(name).ok_or_else(|| QmpError::generic(format!("Node '{name}' not found")))?;
                daemon.opener().add_child(&parent, &child).await?;
            }
        }
        Ok(json!({}))
    }
}

/// Says which thread a node's requests run on. Ours run on the disk's home thread whatever is said (docs/decisions/0003), so
/// what is right is accepted and changes nothing.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SetIothread {
    node_name: String,
    iothread: Option<String>,
    #[serde(default)]
    force: bool,
}

impl Command for SetIothread {
    const NAME: &'static str = "x-blockdev-set-iothread";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let name = &self.node_name;
        let Some(cell) = daemon.graph().find(name) else {
            return Err(QmpError::generic(format!("Failed to find node with node-name='{name}'")));
        };
        if !self.force && cell.parents().iter().any(|e| matches!(e.parent(), Parent::Backend(_))) {
            return Err(QmpError::generic(format!(
                "Node {name} is associated with a BlockBackend and could be in use (use force=true to override this check)"
            )));
        }
        match &self.iothread {
            Some(id) if daemon.objects().find(id) != Some("iothread") => {
                Err(QmpError::generic(format!("Cannot find iothread {id}")))
            }
            _ => Ok(json!({})),
        }
    }
}

/// Lets the first write beyond an offset be told by an event.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockSetWriteThreshold {
    node_name: String,
    write_threshold: u64,
}

impl Command for BlockSetWriteThreshold {
    const NAME: &'static str = "block-set-write-threshold";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let Some(cell) = daemon.graph().find(&self.node_name) else {
            return Err(QmpError::generic(format!("Device '{}' not found", self.node_name)));
        };
        let (events, node) = (daemon.events().clone(), self.node_name);
        cell.set_write_threshold(self.write_threshold, move |beyond, threshold| {
            let data = json!({"node-name": node, "amount-exceeded": beyond, "write-threshold": threshold});
            events.emit("BLOCK_WRITE_THRESHOLD", data);
        });
        Ok(json!({}))
    }
}
