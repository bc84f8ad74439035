//! `blockdev-snapshot`, `blockdev-snapshot-sync`: a transaction with one action each.

use super::transaction::{Act, carry_out};
use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::{QmpError, Reply};
use jobs::Group;
use jobs::snapshot::{NewImage, Overlay, Snapshot};
use jobs::txn::Action;
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[entry::<BlockdevSnapshot>(), entry::<BlockdevSnapshotSync>()];

/// Puts a node on top of another: its users go on there.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BlockdevSnapshot {
    node: String,
    overlay: String,
}

impl Act for BlockdevSnapshot {
    fn action(self, daemon: &Rc<Daemon>, _: Option<Rc<Group>>) -> Result<Rc<dyn Action>, QmpError> {
        let overlay = Overlay::Node(self.overlay);
        Ok(Snapshot::new(daemon.opener(), Some(self.node.clone()), Some(self.node), overlay))
    }
}

impl Command for BlockdevSnapshot {
    const NAME: &'static str = "blockdev-snapshot";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        carry_out(&daemon, self).await
    }
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    Existing,
    AbsolutePaths,
}

/// Makes an image and puts it on top of a node.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BlockdevSnapshotSync {
    device: Option<String>,
    node_name: Option<String>,
    snapshot_file: String,
    snapshot_node_name: Option<String>,
    format: Option<String>,
    mode: Option<Mode>,
}

impl Act for BlockdevSnapshotSync {
    fn action(self, daemon: &Rc<Daemon>, _: Option<Rc<Group>>) -> Result<Rc<dyn Action>, QmpError> {
        let image = NewImage {
            file: self.snapshot_file,
            format: self.format.unwrap_or_else(|| "qcow2".to_owned()),
            existing: self.mode == Some(Mode::Existing),
            node_name: self.snapshot_node_name,
        };
        Ok(Snapshot::new(daemon.opener(), self.device, self.node_name, Overlay::Image(image)))
    }
}

impl Command for BlockdevSnapshotSync {
    const NAME: &'static str = "blockdev-snapshot-sync";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        carry_out(&daemon, self).await
    }
}
