//! `drive-mirror` and `drive-backup`: mirror and backup to an image that the command makes and opens.

use super::backup::Common;
use super::mirror::{ErrorPolicy, LinkLossPolicy, Mode, SyncMode};
use super::transaction::{Act, Read, carry_out};
use super::verify::Verify;
use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::Reply;
use jobs::drive::{self, BackupAction, Target};
use jobs::{Group, MirrorArgs};
use qapi::json;
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[entry::<DriveMirror>(), entry::<DriveBackup>()];

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum NewImageMode {
    Existing,
    AbsolutePaths,
}

/// Copies a disk to an image while clients write to it, and moves them there if asked.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct DriveMirror {
    job_id: Option<String>,
    device: String,
    target: String,
    format: Option<String>,
    node_name: Option<String>,
    replaces: Option<String>,
    sync: SyncMode,
    mode: Option<NewImageMode>,
    speed: Option<i64>,
    granularity: Option<u32>,
    buf_size: Option<i64>,
    on_source_error: Option<ErrorPolicy>,
    on_target_error: Option<ErrorPolicy>,
    unmap: Option<bool>,
    copy_mode: Option<Mode>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
    #[serde(flatten)]
    verify: Verify,
    on_link_loss: Option<LinkLossPolicy>,
}

impl Command for DriveMirror {
    const NAME: &'static str = "drive-mirror";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let default = MirrorArgs::new(&self.job_id.unwrap_or_default(), &self.device, "");
        let args = MirrorArgs {
            replaces: self.replaces,
            sync: self.sync.into(),
            speed: self.speed.unwrap_or(default.speed),
            granularity: self.granularity.map_or(default.granularity, u64::from),
            buf_size: self.buf_size.unwrap_or(default.buf_size),
            on_source_error: self.on_source_error.map_or(default.on_source_error, Into::into),
            on_target_error: self.on_target_error.map_or(default.on_target_error, Into::into),
            copy_mode: self.copy_mode.map_or(default.copy_mode, Into::into),
            auto_finalize: self.auto_finalize.unwrap_or(default.auto_finalize),
            auto_dismiss: self.auto_dismiss.unwrap_or(default.auto_dismiss),
            verify: self.verify.into(),
            on_link_loss: LinkLossPolicy::rule(self.on_link_loss)?,
            ..default
        };
        let target = Target {
            file: self.target,
            format: self.format,
            existing: self.mode == Some(NewImageMode::Existing),
            node_name: self.node_name,
            unmap: self.unmap.unwrap_or(true),
        };
        drive::mirror(daemon.jobs(), daemon.opener(), args, &target).await?;
        Ok(json!({}))
    }
}

/// Copies a disk as of now to an image while clients write.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct DriveBackup {
    #[serde(flatten)]
    common: Common,
    format: Option<String>,
    mode: Option<NewImageMode>,
}

impl Act for DriveBackup {
    const MAKES_JOB: bool = true;
    fn action(self, daemon: &Rc<Daemon>, group: Option<Rc<Group>>) -> Read {
        let target = Target {
            file: self.common.target.clone(),
            format: self.format,
            existing: self.mode == Some(NewImageMode::Existing),
            node_name: None,
            unmap: true,
        };
        let args = self.common.args("")?;
        Ok(BackupAction::new(daemon.jobs(), daemon.opener(), args, Some(target), group))
    }
}

impl Command for DriveBackup {
    const NAME: &'static str = "drive-backup";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        carry_out(&daemon, self).await
    }
}
