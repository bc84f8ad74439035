//! `blockdev-backup`.

use super::mirror::{ErrorPolicy, LinkLossPolicy, SyncMode};
use super::transaction::{Act, Read, carry_out};
use super::verify::Verify;
use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::{QmpError, Reply};
use copy::OnSaveError;
use jobs::drive::BackupAction;
use jobs::{BackupArgs, BitmapMode, Group, OnBufferFull};
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[entry::<BlockdevBackup>()];

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum BitmapSyncMode {
    OnSuccess,
    Never,
    Always,
}

impl From<BitmapSyncMode> for BitmapMode {
    fn from(mode: BitmapSyncMode) -> BitmapMode {
        match mode {
            BitmapSyncMode::OnSuccess => BitmapMode::OnSuccess,
            BitmapSyncMode::Never => BitmapMode::Never,
            BitmapSyncMode::Always => BitmapMode::Always,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum OnCbwError {
    BreakGuestWrite,
    BreakSnapshot,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum BufferFull {
    Wait,
    BreakBackup,
    BreakGuestWrite,
}

/// What tunes a backup.
#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Perf {
    /// The host copies by itself wherever it can, whether or not this asks for it.
    #[serde(rename = "use-copy-range")]
    _use_copy_range: Option<bool>,
    max_workers: Option<i64>,
    max_chunk: Option<i64>,
    min_cluster_size: Option<u64>,
}

/// What `blockdev-backup` and `drive-backup` have in common.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Common {
    pub(super) job_id: Option<String>,
    pub(super) device: String,
    pub(super) target: String,
    pub(super) sync: SyncMode,
    speed: Option<i64>,
    bitmap: Option<String>,
    bitmap_mode: Option<BitmapSyncMode>,
    compress: Option<bool>,
    on_source_error: Option<ErrorPolicy>,
    on_target_error: Option<ErrorPolicy>,
    on_cbw_error: Option<OnCbwError>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
    filter_node_name: Option<String>,
    discard_source: Option<bool>,
    x_perf: Option<Perf>,
    #[serde(flatten)]
    verify: Verify,
    on_link_loss: Option<LinkLossPolicy>,
}

impl Common {
    /// The arguments, for `target` (a node).
    pub(super) fn args(self, target: &str) -> Result<BackupArgs, QmpError> {
        // the default id is the device's name, which no node has
        let default = BackupArgs::new(&self.job_id.unwrap_or_default(), &self.device, target);
        let perf = self.x_perf.unwrap_or_default();
        Ok(BackupArgs {
            sync: self.sync.into(),
            bitmap: self.bitmap,
            bitmap_mode: self.bitmap_mode.map(BitmapMode::from),
            compress: self.compress.unwrap_or(default.compress),
            speed: self.speed.unwrap_or(default.speed),
            on_source_error: self.on_source_error.map_or(default.on_source_error, Into::into),
            on_target_error: self.on_target_error.map_or(default.on_target_error, Into::into),
            on_cbw_error: match self.on_cbw_error {
                Some(OnCbwError::BreakSnapshot) => OnSaveError::LoseInstant,
                Some(OnCbwError::BreakGuestWrite) | None => OnSaveError::FailChange,
            },
            auto_finalize: self.auto_finalize.unwrap_or(default.auto_finalize),
            auto_dismiss: self.auto_dismiss.unwrap_or(default.auto_dismiss),
            filter_node_name: self.filter_node_name,
            discard_source: self.discard_source.unwrap_or(default.discard_source),
            max_workers: perf.max_workers.unwrap_or(default.max_workers),
            max_chunk: perf.max_chunk.unwrap_or(default.max_chunk),
            min_cluster_size: perf.min_cluster_size.unwrap_or(default.min_cluster_size),
            verify: self.verify.into(),
            on_link_loss: LinkLossPolicy::rule(self.on_link_loss)?,
            ..default
        })
    }
}

/// Copies a disk as of now to another while clients write. `on-cbw-error`, `on-link-loss`, `buffer`, `on-buffer-full`,
/// `buffer-size` and `verify*` are not in QSD 10.0.2.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BlockdevBackup {
    #[serde(flatten)]
    common: Common,
    buffer: Option<String>,
    on_buffer_full: Option<BufferFull>,
    buffer_size: Option<i64>,
}

impl BlockdevBackup {
    fn args(self) -> Result<BackupArgs, QmpError> {
        let size = self.buffer_size.unwrap_or(0);
        let size = u64::try_from(size)
            .map_err(|_| QmpError::generic("Parameter 'buffer-size' expects a non-negative value"))?;
        if self.buffer.is_none() && (self.on_buffer_full.is_some() || self.buffer_size.is_some()) {
            return Err(QmpError::generic("'on-buffer-full' and 'buffer-size' need a 'buffer'"));
        }
        let target = self.common.target.clone();
        Ok(BackupArgs {
            buffer: self.buffer,
            on_buffer_full: match self.on_buffer_full {
                Some(BufferFull::BreakBackup) => OnBufferFull::BreakBackup,
                Some(BufferFull::BreakGuestWrite) => OnBufferFull::BreakGuestWrite,
                Some(BufferFull::Wait) | None => OnBufferFull::Wait,
            },
            buffer_size: size,
            ..self.common.args(&target)?
        })
    }
}

impl Act for BlockdevBackup {
    const MAKES_JOB: bool = true;
    fn action(self, daemon: &Rc<Daemon>, group: Option<Rc<Group>>) -> Read {
        Ok(BackupAction::new(daemon.jobs(), daemon.opener(), self.args()?, None, group))
    }
}

impl Command for BlockdevBackup {
    const NAME: &'static str = "blockdev-backup";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        carry_out(&daemon, self).await
    }
}
