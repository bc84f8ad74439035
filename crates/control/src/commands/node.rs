//! Nodes: add, remove, resize, give up and take back.

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::blockdev;
use crate::error::{QmpError, Reply};
use block::Prealloc;
use graph::{NodeCell, Parent, bitmaps};
use qapi::{Map, Value, json};
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] =
    &[entry::<BlockdevAdd>(), entry::<BlockdevDel>(), entry::<BlockdevSetActive>(), entry::<BlockResize>()];

/// Opens a node, with all the nodes that are described inside its description.
#[derive(Deserialize)]
#[serde(transparent)]
struct BlockdevAdd {
    options: Map<String, Value>,
}

impl Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        if !self.options.contains_key("node-name") {
            return Err(QmpError::generic("'node-name' must be specified for the root node"));
        }
        daemon.opener().open(&blockdev::spec(&self.options)?).await?;
        Ok(json!({}))
    }
}

/// Removes a node that the monitor added.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockdevDel {
    node_name: String,
}

impl Command for BlockdevDel {
    const NAME: &'static str = "blockdev-del";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let name = &self.node_name;
        let Some(cell) = daemon.graph().find(name) else {
            return Err(QmpError::generic(format!("Failed to find node with node-name='{name}'")));
        };
        if let Some((id, group)) = daemon.group_shown_by(&cell) {
            check_removable(&cell)?;
            daemon.check_may_end(&id, &group).await?;
        }
        // An error is answered only if the node stays: a command that says no has changed nothing. What was flushed before
        // is safe; what closing could not write back nobody was promised, but somebody should know.
        if let Err(e) = daemon.graph().remove_if(&cell, check_removable).await? {
            daemon.tell_trouble(&format!(
                "node '{name}' is deleted, but something failed while closing it: {e}"
            ));
        }
        Ok(json!({}))
    }
}

/// Gives images up to somebody else, or takes them back.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockdevSetActive {
    node_name: Option<String>,
    active: bool,
}

impl Command for BlockdevSetActive {
    const NAME: &'static str = "blockdev-set-active";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let graph = daemon.graph();
        let Some(name) = &self.node_name else {
            match self.active {
                true => graph.activate_all().await?,
                false => graph.inactivate_all().await?,
            }
            return Ok(json!({}));
        };
        let Some(cell) = graph.find(name) else {
            return Err(QmpError::generic(format!("Failed to find node with node-name='{name}'")));
        };
        match self.active {
            true => graph.activate(&cell).await?,
            false => graph.inactivate(&cell).await?,
        }
        Ok(json!({}))
    }
}

/// The conditions of `blockdev-del`, in QSD's order.
fn check_removable(cell: &Rc<NodeCell>) -> Result<(), QmpError> {
    let (name, parents) = (cell.name(), cell.parents());
    let fail = |desc: String| Err(QmpError::generic(desc));
    if parents.iter().any(|e| matches!(e.parent(), Parent::Backend(_))) {
        return fail(format!("Node {name} is in use"));
    }
    check_free(cell)?;
    if parents.iter().any(|e| !matches!(e.parent(), Parent::Node(_))) {
        return fail(format!("Node {name} is in use"));
    }
    if !cell.is_monitor_owned() {
        return fail(format!("Node {name} is not owned by the monitor"));
    }
    if !parents.is_empty() {
        return fail(format!("Block device {name} is in use"));
    }
    Ok(())
}

/// That no job and no overlay keeps the node as it is.
fn check_free(cell: &NodeCell) -> Result<(), QmpError> {
    cell.check_not_blocked()?;
    Ok(jobs::snapshot::check_not_backing(cell)?)
}

/// Changes the length of a node.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockResize {
    device: Option<String>,
    node_name: Option<String>,
    size: i64,
}

/// That nobody needs the node's length, and that its bitmaps are known well enough to be given another.
fn check_resizable(cell: &Rc<NodeCell>) -> Result<(), QmpError> {
    check_free(cell)?;
    Ok(cell.bitmaps().iter().try_for_each(|b| bitmaps::check_consistent(b))?)
}

/// The node through which a disk of a replication group is used, if `name` is one, and the group: all its sides have its length.
fn replicated(daemon: &Daemon, name: &str) -> Option<(String, Rc<NodeCell>)> {
    let groups = daemon.replication().borrow();
    groups.iter().find_map(|(id, g)| Some((id.clone(), g.front_of(name)?)))
}

impl Command for BlockResize {
    const NAME: &'static str = "block_resize";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        // `device` is the name of a guest's device alone, and there is none
        let node = self.node_name.as_deref();
        let Some(cell) = node.and_then(|name| daemon.graph().find(name)) else {
            let (device, node) = (self.device.as_deref().unwrap_or_default(), node.unwrap_or_default());
            return Err(QmpError::generic(format!("Cannot find device='{device}' nor node-name='{node}'")));
        };
        let Ok(size) = u64::try_from(self.size) else {
            return Err(QmpError::generic("Parameter 'size' expects a >0 size"));
        };
        let name = node.unwrap_or_default();
        if let Some((id, front)) = replicated(&daemon, name) {
            let resized = daemon.graph().resize(&front, size, Prealloc::Off, check_resizable).await;
            let told = |e: QmpError| {
                let why = format!("Node '{name}' is a disk of replication group '{id}': {}", e.desc);
                QmpError { desc: why, ..e }
            };
            return resized.map(|()| json!({})).map_err(told);
        }
        daemon.graph().resize(&cell, size, Prealloc::Off, check_resizable).await?;
        Ok(json!({}))
    }
}
