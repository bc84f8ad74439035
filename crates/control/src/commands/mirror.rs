//! `blockdev-mirror` and what can be changed of a running one.

use super::backup::BitmapSyncMode;
use super::verify::Verify;
use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::{QmpError, Reply};
use copy::{Action, OnError, OnLinkLoss};
use jobs::{BitmapMode, Convergence, CopyMode, MirrorArgs, Sync, mirror};
use qapi::json;
use serde::Deserialize;
use std::rc::Rc;
use std::time::Duration;

pub(super) const COMMANDS: &[Entry] = &[entry::<BlockdevMirror>(), entry::<BlockJobChange>()];

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum SyncMode {
    Top,
    Full,
    None,
    Incremental,
    Bitmap,
}

impl From<SyncMode> for Sync {
    fn from(mode: SyncMode) -> Sync {
        match mode {
            SyncMode::Top => Sync::Top,
            SyncMode::Full => Sync::Full,
            SyncMode::None => Sync::None,
            SyncMode::Incremental => Sync::Incremental,
            SyncMode::Bitmap => Sync::Bitmap,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ErrorPolicy {
    Report,
    Ignore,
    Enospc,
    Stop,
    Auto,
}

impl From<ErrorPolicy> for OnError {
    fn from(p: ErrorPolicy) -> OnError {
        match p {
            ErrorPolicy::Report => OnError::Report,
            ErrorPolicy::Ignore => OnError::Ignore,
            ErrorPolicy::Enospc | ErrorPolicy::Auto => OnError::Enospc,
            ErrorPolicy::Stop => OnError::Stop,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Mode {
    Background,
    WriteBlocking,
    ReadWriteBlocking,
}

impl From<Mode> for CopyMode {
    fn from(m: Mode) -> CopyMode {
        match m {
            Mode::Background => CopyMode::Background,
            Mode::WriteBlocking => CopyMode::WriteBlocking,
            Mode::ReadWriteBlocking => CopyMode::ReadWriteBlocking,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ConvergencePolicy {
    None,
    SwitchCopyMode,
    ThrottleGuest,
}

impl From<ConvergencePolicy> for Convergence {
    fn from(p: ConvergencePolicy) -> Convergence {
        match p {
            ConvergencePolicy::None => Convergence::None,
            ConvergencePolicy::SwitchCopyMode => Convergence::SwitchCopyMode,
            ConvergencePolicy::ThrottleGuest => Convergence::ThrottleGuest,
        }
    }
}

/// `on-link-loss`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct LinkLossPolicy {
    wait: Option<i64>,
    then: Option<LinkLossAction>,
    no_progress: Option<i64>,
}

/// What is done when a lost link was waited for in vain.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum LinkLossAction {
    Stop,
    Report,
}

impl LinkLossPolicy {
    /// What the engine does of it.
    pub(super) fn rule(policy: Option<LinkLossPolicy>) -> Result<Option<OnLinkLoss>, QmpError> {
        let Some(policy) = policy else { return Ok(None) };
        let default = OnLinkLoss::default();
        let seconds = |name: &str, value: Option<i64>, default: Duration| match value.map(u32::try_from) {
            None => Ok(default),
            Some(Ok(s)) => Ok(Duration::from_secs(u64::from(s))),
            Some(Err(_)) => Err(QmpError::generic(format!(
                "Parameter '{name}' expects a number of seconds from 0 to {}",
                u32::MAX
            ))),
        };
        let never = default.no_progress.unwrap_or_default();
        let no_progress = seconds("no-progress", policy.no_progress, never)?;
        Ok(Some(OnLinkLoss {
            wait: seconds("wait", policy.wait, default.wait)?,
            then: match policy.then {
                None => default.then,
                Some(LinkLossAction::Stop) => Action::Stop,
                Some(LinkLossAction::Report) => Action::Report,
            },
            no_progress: Some(no_progress).filter(|t| !t.is_zero()),
        }))
    }
}

/// Copies a disk to a target while clients write to it. `on-link-loss`, `bitmap`, `bitmap-mode`, `convergence`, `converge-after`,
/// `target-is-zero`, `verify*` and the copy mode `read-write-blocking` are not in QSD 10.0.2.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockdevMirror {
    job_id: Option<String>,
    device: String,
    target: String,
    replaces: Option<String>,
    sync: SyncMode,
    speed: Option<i64>,
    granularity: Option<u32>,
    buf_size: Option<i64>,
    on_source_error: Option<ErrorPolicy>,
    on_target_error: Option<ErrorPolicy>,
    filter_node_name: Option<String>,
    copy_mode: Option<Mode>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
    target_is_zero: Option<bool>,
    convergence: Option<ConvergencePolicy>,
    converge_after: Option<u32>,
    bitmap: Option<String>,
    bitmap_mode: Option<BitmapSyncMode>,
    #[serde(flatten)]
    verify: Verify,
    on_link_loss: Option<LinkLossPolicy>,
}

impl Command for BlockdevMirror {
    const NAME: &'static str = "blockdev-mirror";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        // the default id is the device's name, which no node has
        let default = MirrorArgs::new(&self.job_id.unwrap_or_default(), &self.device, &self.target);
        let args = MirrorArgs {
            replaces: self.replaces,
            sync: self.sync.into(),
            speed: self.speed.unwrap_or(0),
            granularity: self.granularity.map_or(0, u64::from),
            buf_size: self.buf_size.unwrap_or(0),
            on_source_error: self.on_source_error.map_or(default.on_source_error, OnError::from),
            on_target_error: self.on_target_error.map_or(default.on_target_error, OnError::from),
            filter_node_name: self.filter_node_name,
            copy_mode: self.copy_mode.map_or(default.copy_mode, CopyMode::from),
            auto_finalize: self.auto_finalize.unwrap_or(true),
            auto_dismiss: self.auto_dismiss.unwrap_or(true),
            target_is_zero: self.target_is_zero.unwrap_or(false),
            convergence: self.convergence.map_or(default.convergence, Convergence::from),
            converge_after: self
                .converge_after
                .map_or(default.converge_after, |s| Duration::from_secs(u64::from(s))),
            bitmap: self.bitmap,
            bitmap_mode: self.bitmap_mode.map(BitmapMode::from),
            verify: self.verify.into(),
            on_link_loss: LinkLossPolicy::rule(self.on_link_loss)?,
            ..default
        };
        mirror::start(daemon.jobs(), daemon.graph(), args).await?;
        Ok(json!({}))
    }
}

/// Changes a running job: the copy mode of a mirror, in any direction (QSD: background to write-blocking only).
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockJobChange {
    id: String,
    #[serde(rename = "type")]
    kind: String,
    copy_mode: Option<Mode>,
}

impl Command for BlockJobChange {
    const NAME: &'static str = "block-job-change";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find_block_job(&self.id)?;
        let Some(mode) = self.copy_mode else {
            return Err(match self.kind == job.kind().name() {
                true => QmpError::generic("Job type does not support change"),
                false => QmpError::generic(format!(
                    "Job '{}' is of type '{}', not '{}'",
                    self.id,
                    job.kind().name(),
                    self.kind
                )),
            });
        };
        mirror::change(&job, mode.into())?;
        Ok(json!({}))
    }
}
