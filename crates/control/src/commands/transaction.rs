//! `transaction`: the table of what can be part of one. What happens when is said in [`jobs::txn`].

use super::backup::BlockdevBackup;
use super::bitmap::{BitmapAdd, BitmapClear, BitmapDisable, BitmapEnable, BitmapMerge, BitmapRemove};
use super::drive::DriveBackup;
use super::snapshot::{BlockdevSnapshot, BlockdevSnapshotSync, InternalSync};
use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::{QmpError, Reply};
use jobs::Group;
use jobs::txn::{self, Abort, Action};
use qapi::{Value, json};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[entry::<Transaction>()];

/// A command that can be part of a transaction.
pub(super) trait Act: DeserializeOwned {
    /// Whether it makes a job, so that transactions can let it end together with others (`completion-mode`).
    const MAKES_JOB: bool = false;
    /// What it does there. A job that it makes belongs to `group`, if there is one.
    fn action(self, daemon: &Rc<Daemon>, group: Option<Rc<Group>>) -> Read;
}

/// A transaction of this one command.
pub(super) async fn carry_out(daemon: &Rc<Daemon>, command: impl Act) -> Reply {
    let action = command.action(daemon, None)?;
    txn::run(daemon.graph(), &[action]).await?;
    Ok(json!({}))
}

/// An action as it was read.
pub(super) type Read = Result<Rc<dyn Action>, QmpError>;

/// A row of the table of actions.
struct Row {
    name: &'static str,
    makes_job: bool,
    read: fn(Value, &Rc<Daemon>, Option<Rc<Group>>) -> Read,
}

const fn row<A: Act>(name: &'static str) -> Row {
    Row {
        name,
        makes_job: A::MAKES_JOB,
        read: |data, daemon, group| {
            let command: A = qapi::from_value(data).map_err(|e| QmpError::generic(e.to_string()))?;
            command.action(daemon, group)
        },
    }
}

/// What can be part of a transaction.
const ACTIONS: &[Row] = &[
    row::<AbortNow>("abort"),
    row::<BitmapAdd>("block-dirty-bitmap-add"),
    row::<BitmapRemove>("block-dirty-bitmap-remove"),
    row::<BitmapClear>("block-dirty-bitmap-clear"),
    row::<BitmapEnable>("block-dirty-bitmap-enable"),
    row::<BitmapDisable>("block-dirty-bitmap-disable"),
    row::<BitmapMerge>("block-dirty-bitmap-merge"),
    row::<BlockdevBackup>("blockdev-backup"),
    row::<DriveBackup>("drive-backup"),
    row::<BlockdevSnapshot>("blockdev-snapshot"),
    row::<BlockdevSnapshotSync>("blockdev-snapshot-sync"),
    row::<InternalSync>("blockdev-snapshot-internal-sync"),
];

#[derive(Deserialize)]
struct AbortNow {}

impl Act for AbortNow {
    fn action(self, _: &Rc<Daemon>, _: Option<Rc<Group>>) -> Read {
        Ok(Rc::new(Abort))
    }
}

#[derive(Deserialize)]
struct TypedAction {
    #[serde(rename = "type")]
    kind: String,
    data: Value,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum CompletionMode {
    Individual,
    Grouped,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Properties {
    completion_mode: Option<CompletionMode>,
}

/// Several changes together or not at all.
#[derive(Deserialize)]
struct Transaction {
    actions: Vec<TypedAction>,
    properties: Option<Properties>,
}

impl Command for Transaction {
    const NAME: &'static str = "transaction";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let grouped = self.properties.and_then(|p| p.completion_mode) == Some(CompletionMode::Grouped);
        let group = grouped.then(Group::new);
        let mut actions = Vec::with_capacity(self.actions.len().min(txn::MAX_ACTIONS));
        for action in self.actions {
            let kind = action.kind;
            let Some(row) = ACTIONS.iter().find(|r| r.name == kind) else {
                return Err(QmpError::generic(format!("Action '{kind}' is not supported by liveblkd")));
            };
            if grouped && !row.makes_job {
                let desc = format!(
                    "Action '{kind}' does not support transaction property completion-mode = grouped"
                );
                return Err(QmpError::generic(desc));
            }
            actions.push((row.read)(action.data, &daemon, group.clone())?);
        }
        txn::run(daemon.graph(), &actions).await?;
        Ok(json!({}))
    }
}
