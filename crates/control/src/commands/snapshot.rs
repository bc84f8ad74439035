//! `blockdev-snapshot`, `blockdev-snapshot-sync`, `blockdev-snapshot-internal-sync`: a transaction with one action each. And the
//! deletion of internal snapshots, which can be part of none.

use super::transaction::{Act, carry_out};
use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::{QmpError, Reply};
use crate::info;
use jobs::Group;
use jobs::internal::{self, InternalSnapshot};
use jobs::snapshot::{NewImage, Overlay, Snapshot};
use jobs::txn::Action;
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[
    entry::<BlockdevSnapshot>(),
    entry::<BlockdevSnapshotSync>(),
    entry::<InternalSync>(),
    entry::<DeleteInternalSync>(),
];

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

/// Takes a snapshot inside an image.
#[derive(Deserialize)]
pub(super) struct InternalSync {
    device: String,
    name: String,
}

impl Act for InternalSync {
    fn action(self, daemon: &Rc<Daemon>, _: Option<Rc<Group>>) -> Result<Rc<dyn Action>, QmpError> {
        Ok(InternalSnapshot::new(daemon.graph(), self.device, self.name))
    }
}

impl Command for InternalSync {
    const NAME: &'static str = "blockdev-snapshot-internal-sync";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        carry_out(&daemon, self).await
    }
}

/// Deletes a snapshot inside an image.
#[derive(Deserialize)]
struct DeleteInternalSync {
    device: String,
    id: Option<String>,
    name: Option<String>,
}

impl Command for DeleteInternalSync {
    const NAME: &'static str = "blockdev-snapshot-delete-internal-sync";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let (id, name) = (self.id.as_deref(), self.name.as_deref());
        let gone = internal::delete(daemon.graph(), &self.device, id, name).await?;
        Ok(info::snapshot(&gone))
    }
}
