//! Changes of nodes that are there: other options and children, and what is told of their writes.

use super::{Command, Entry, entry};
use crate::error::{QmpError, Reply};
use crate::{Daemon, blockdev};
use qapi::{Map, Value, json};
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[entry::<BlockdevReopen>(), entry::<BlockSetWriteThreshold>()];

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
