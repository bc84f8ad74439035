//! Arguments of a backup, and what is wrong with them. Wording: reference/error-catalogue.tsv, since clients show it.

use crate::job::{Options, rate_limit};
use crate::mirror_args::{Sync, check_link_loss};
use crate::verify_args::{Verify, VerifyMode};
use bitmap::DirtyBitmap;
use block::{BlockError, ErrorKind, Result};
use copy::{OnError, OnLinkLoss, OnSaveError, check_min_cluster, cluster_size};
use graph::bitmaps::check_usable;
use graph::{Graph, NodeCell, walk};
use std::rc::Rc;

/// What becomes of the bitmap at the end (QMP: BitmapSyncMode).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BitmapMode {
    /// It is cleared of what was there at the start, if the job succeeds.
    OnSuccess,
    /// It keeps all.
    Never,
    /// It keeps what was not copied, however the job ends.
    Always,
}

impl BitmapMode {
    /// The QMP name.
    pub const fn name(self) -> &'static str {
        match self {
            BitmapMode::OnSuccess => "on-success",
            BitmapMode::Never => "never",
            BitmapMode::Always => "always",
        }
    }
}

/// What happens to clients' writes when the buffer of a buffered backup is full.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnBufferFull {
    /// They wait until the buffer has drained a little: the client is slowed to what the target takes.
    #[default]
    Wait,
    /// They are done, and the backup fails.
    BreakBackup,
    /// They fail.
    BreakGuestWrite,
}

/// Arguments of `blockdev-backup`, as the client gave them (numbers may be negative).
#[derive(Clone, Debug)]
pub struct BackupArgs {
    /// Job id.
    pub job_id: String,
    /// Node to copy.
    pub device: String,
    /// Node to copy to.
    pub target: String,
    /// What is copied.
    pub sync: Sync,
    /// Name of a bitmap of `device`.
    pub bitmap: Option<String>,
    /// What becomes of it.
    pub bitmap_mode: Option<BitmapMode>,
    /// The target stores compressed clusters.
    pub compress: bool,
    /// Bytes per second, 0: no limit.
    pub speed: i64,
    /// On failing reads.
    pub on_source_error: OnError,
    /// On failing writes.
    pub on_target_error: OnError,
    /// When old bytes cannot be copied before a client's write.
    pub on_cbw_error: OnSaveError,
    /// Name of the filter node.
    pub filter_node_name: Option<String>,
    /// What has been copied is discarded in the source.
    pub discard_source: bool,
    /// Most copies in flight.
    pub max_workers: i64,
    /// Largest piece, 0: default.
    pub max_chunk: i64,
    /// Smallest unit of copying, 0: default.
    pub min_cluster_size: u64,
    /// See [`Options`].
    pub auto_finalize: bool,
    /// See [`Options`].
    pub auto_dismiss: bool,
    /// How it is proven that the target holds what the source held at the instant.
    pub verify: Verify,
    /// A node that old bytes go to first, so that a slow target does not slow the client.
    pub buffer: Option<String>,
    /// When that is full.
    pub on_buffer_full: OnBufferFull,
    /// Most bytes kept there, 0: as it has space.
    pub buffer_size: u64,
    /// The loss of a link to the target or the source is bridged so.
    pub on_link_loss: Option<OnLinkLoss>,
}

/// Arguments that have been looked up.
pub(crate) struct Checked {
    pub(crate) source: Rc<NodeCell>,
    pub(crate) target: Rc<NodeCell>,
    pub(crate) buffer: Option<Rc<NodeCell>>,
    pub(crate) bitmap: Option<(Rc<DirtyBitmap>, BitmapMode)>,
    pub(crate) sync: Sync,
    pub(crate) cluster: u64,
    pub(crate) chunk: u64,
    pub(crate) workers: u32,
}

impl BackupArgs {
    /// A full backup with all defaults.
    pub fn new(job_id: &str, device: &str, target: &str) -> BackupArgs {
        BackupArgs {
            job_id: job_id.to_owned(),
            device: device.to_owned(),
            target: target.to_owned(),
            sync: Sync::Full,
            bitmap: None,
            bitmap_mode: None,
            compress: false,
            speed: 0,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            on_cbw_error: OnSaveError::FailChange,
            filter_node_name: None,
            discard_source: false,
            max_workers: 64,
            max_chunk: 0,
            min_cluster_size: 0,
            auto_finalize: true,
            auto_dismiss: true,
            verify: Verify::default(),
            buffer: None,
            on_buffer_full: OnBufferFull::Wait,
            buffer_size: 0,
            on_link_loss: None,
        }
    }

    /// Whether a later life of the daemon can go on with its instant: with a bitmap what it had to copy is not known any more; with a
    /// buffer part of it is in the buffer only; what was recorded of it for a comparison is gone.
    pub(crate) fn keeps_instant(&self, sync: Sync) -> bool {
        let plain = self.bitmap.is_none() && self.buffer.is_none() && self.verify.mode == VerifyMode::Off;
        plain && matches!(sync, Sync::Full | Sync::None) && !self.discard_source
    }

    pub(crate) fn job_options(&self) -> Options {
        Options {
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            speed: u64::try_from(self.speed).unwrap_or(0),
            on_source_error: self.on_source_error,
            on_target_error: self.on_target_error,
        }
    }

    pub(crate) fn check_speed(&self) -> Result<()> {
        rate_limit(self.speed).map(drop)
    }

    /// Looks up the nodes and checks everything that can be checked before anything is changed.
    pub(crate) async fn check(&self, graph: &Graph) -> Result<Checked> {
        let source = find(graph, &self.device)?;
        let target = find(graph, &self.target)?;
        let bitmap = self.check_bitmap(&source)?;
        if source.id() == target.id() {
            return Err(BlockError::invalid("Source and target cannot be the same"));
        }
        if self.compress && !can_compress(&target) {
            // the name that QSD ends this sentence with is that of a guest device, which is never there
            return Err(BlockError::invalid("Compression is not supported for this drive "));
        }
        self.verify.check()?;
        if self.sync == Sync::None && self.verify.mode != VerifyMode::Off {
            return Err(BlockError::invalid("sync mode 'none' copies nothing that could be verified"));
        }
        source.check_not_blocked()?;
        target.check_not_blocked()?;
        check_link_loss(self.on_link_loss, &target)?;
        let workers = u32::try_from(self.max_workers)
            .ok()
            .filter(|n| (1..=i32::MAX.unsigned_abs()).contains(n))
            .ok_or_else(|| BlockError::invalid("max-workers must be between 1 and 2147483647"))?;
        let chunk = u64::try_from(self.max_chunk)
            .map_err(|_| BlockError::invalid("max-chunk must be zero (which means no limit) or positive"))?;
        if source.node().len() != target.node().len() {
            return Err(BlockError::invalid("Source and target image have different sizes"));
        }
        if let Some(name) = &self.filter_node_name {
            graph.check_name(name).map_err(|e| e.context("Could not create node"))?;
        }
        for (cell, edge) in [(&source, "file"), (&target, "target")] {
            let active = graph.check_active(cell, edge, self.filter_node_name.as_deref());
            active.map_err(|e| e.context("Could not create node"))?;
        }
        let buffer = self.check_buffer(graph, &source, &target)?;
        check_min_cluster(self.min_cluster_size)?;
        let made = |e: BlockError| e.context("Could not create node");
        if !target.is_writable() && !target.may_turn() {
            return Err(made(BlockError::new(ErrorKind::ReadOnly, "Block node is read-only")));
        }
        let mut cluster = cluster_size(&target, self.min_cluster_size).await.map_err(made)?;
        if let Some(buffer) = &buffer {
            cluster = cluster.max(cluster_size(buffer, self.min_cluster_size).await?);
        }
        if chunk > 0 && chunk < cluster {
            let why = format!("Required max-chunk ({chunk}) is less than backup cluster size ({cluster})");
            return Err(BlockError::invalid(why));
        }
        let sync = if self.sync == Sync::Incremental { Sync::Bitmap } else { self.sync };
        Ok(Checked { source, target, buffer, bitmap, sync, cluster, chunk, workers })
    }

    fn check_bitmap(&self, source: &Rc<NodeCell>) -> Result<Option<(Rc<DirtyBitmap>, BitmapMode)>> {
        let (sync, refused) = (sync_name(self.sync), |why: String| Err(BlockError::invalid(why)));
        let Some(name) = &self.bitmap else {
            return match (self.sync, self.bitmap_mode) {
                (Sync::Incremental | Sync::Bitmap, _) => {
                    refused(format!("must provide a valid bitmap name for '{sync}' sync mode"))
                }
                (_, Some(_)) => refused("Cannot specify bitmap sync mode without a bitmap".to_owned()),
                _ => Ok(None),
            };
        };
        let mode = match (self.sync, self.bitmap_mode) {
            (Sync::Incremental, None | Some(BitmapMode::OnSuccess)) => Some(BitmapMode::OnSuccess),
            (Sync::Incremental, Some(_)) => {
                let why = "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'";
                return refused(why.to_owned());
            }
            (_, mode) => mode,
        };
        let Some(bitmap) = source.find_bitmap(name) else {
            let why = format!("Bitmap '{name}' could not be found");
            return Err(BlockError::new(ErrorKind::NotFound, why));
        };
        let Some(mode) = mode else {
            return refused("Bitmap sync mode must be given when providing a bitmap".to_owned());
        };
        check_usable(&bitmap)?;
        if self.sync == Sync::None {
            return refused(format!("sync mode '{sync}' does not produce meaningful bitmap outputs"));
        }
        if mode == BitmapMode::Never && !matches!(self.sync, Sync::Bitmap | Sync::Incremental) {
            return refused(format!(
                "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{sync}'"
            ));
        }
        Ok(Some((bitmap, mode)))
    }

    fn check_buffer(
        &self,
        graph: &Graph,
        source: &Rc<NodeCell>,
        target: &Rc<NodeCell>,
    ) -> Result<Option<Rc<NodeCell>>> {
        let Some(name) = &self.buffer else { return Ok(None) };
        let buffer = find(graph, name)?;
        let refused = |why: &str| Err(BlockError::invalid(format!("buffer '{name}': {why}")));
        if self.sync == Sync::None {
            return refused("sync mode 'none' has nothing to drain it to");
        }
        if buffer.id() == source.id() || buffer.id() == target.id() {
            return refused("it must be neither the source nor the target");
        }
        buffer.check_not_blocked()?;
        if buffer.node().len() < source.node().len() {
            return refused("it is smaller than the source");
        }
        if !buffer.options().discard {
            return refused("it must be opened with discard=unmap, or it would not shrink as it drains");
        }
        Ok(Some(buffer))
    }
}

fn find(graph: &Graph, name: &str) -> Result<Rc<NodeCell>> {
    graph.find(name).ok_or_else(|| {
        let message = format!("Cannot find device='{name}' nor node-name='{name}'");
        BlockError::new(ErrorKind::NotFound, message)
    })
}

fn sync_name(sync: Sync) -> &'static str {
    match sync {
        Sync::Full => "full",
        Sync::Top => "top",
        Sync::None => "none",
        Sync::Incremental => "incremental",
        Sync::Bitmap => "bitmap",
    }
}

fn can_compress(target: &Rc<NodeCell>) -> bool {
    walk::skip_filters(target).node().driver() == "qcow2"
}
