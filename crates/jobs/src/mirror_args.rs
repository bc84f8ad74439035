//! Arguments of a mirror, and what is wrong with them. Wording: reference/error-catalogue.tsv, since clients show it.

use crate::backup_args::BitmapMode;
use crate::chain::{self, check_root, find_device};
use crate::job::{Options, rate_limit};
use crate::snapshot::check_not_backing;
use crate::verify_args::Verify;
use bitmap::DirtyBitmap;
use block::{BlockError, ErrorKind, Result};
use copy::{OnError, OnLinkLoss};
use graph::{Graph, NodeCell, bitmaps, walk};
use std::rc::Rc;
use std::time::Duration;

/// Largest granularity.
const MAX_GRANULARITY: u64 = 64 << 20;
/// Default buffer: as QSD.
const DEFAULT_BUFFER: u64 = 16 << 20;
/// Granularity where the target has no clusters.
const DEFAULT_GRANULARITY: u64 = 64 << 10;

/// What is copied at the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Sync {
    /// All layers.
    #[default]
    Full,
    /// What the top layer holds.
    Top,
    /// Nothing: only what is written from now on.
    None,
    /// What a bitmap marks, with [`BitmapMode::OnSuccess`].
    Incremental,
    /// What a bitmap marks.
    Bitmap,
}

/// How client requests reach the target.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum CopyMode {
    /// By the background copy, later.
    #[default]
    Background,
    /// A write is done when source and target have it.
    WriteBlocking,
    /// The same, and what is read is written to the target where that is behind.
    ReadWriteBlocking,
}

impl CopyMode {
    /// The QMP name.
    pub const fn name(self) -> &'static str {
        match self {
            CopyMode::Background => "background",
            CopyMode::WriteBlocking => "write-blocking",
            CopyMode::ReadWriteBlocking => "read-write-blocking",
        }
    }
}

/// What is done when the client dirties the disk faster than it is copied. Nothing, unless the user chose otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Convergence {
    /// Nothing.
    #[default]
    None,
    /// Client writes become synchronous.
    SwitchCopyMode,
    /// Client writes are slowed to below the copy rate.
    ThrottleGuest,
}

/// Arguments of `blockdev-mirror`, as the client gave them (numbers may be negative).
#[derive(Clone, Debug)]
pub struct MirrorArgs {
    /// Job id.
    pub job_id: String,
    /// Node to copy: a root node.
    pub device: String,
    /// Node to copy to.
    pub target: String,
    /// Node to replace on completion instead of `device`.
    pub replaces: Option<String>,
    /// What is copied at the start.
    pub sync: Sync,
    /// Bytes per second, 0: no limit.
    pub speed: i64,
    /// Bytes per dirty bit, 0: default.
    pub granularity: u64,
    /// Bytes in flight, 0: default.
    pub buf_size: i64,
    /// On failing reads.
    pub on_source_error: OnError,
    /// On failing writes.
    pub on_target_error: OnError,
    /// How client requests reach the target.
    pub copy_mode: CopyMode,
    /// Name of the filter node.
    pub filter_node_name: Option<String>,
    /// See [`Options`].
    pub auto_finalize: bool,
    /// See [`Options`].
    pub auto_dismiss: bool,
    /// The user asserts that the target reads as zero.
    pub target_is_zero: bool,
    /// At completion the source becomes the layer below the target, which then holds only what was written since the start.
    pub source_below: bool,
    /// Of a commit: images over the source are to call a base that is a protocol node `raw` in their headers.
    pub backing_mask_protocol: bool,
    /// What to do when it does not converge.
    pub convergence: Convergence,
    /// How long to wait before that.
    pub converge_after: Duration,
    /// A bitmap of the source: of what `sync` says only what it marks is copied at the start.
    pub bitmap: Option<String>,
    /// What becomes of it at the end.
    pub bitmap_mode: Option<BitmapMode>,
    /// How it is proven that the target equals the source.
    pub verify: Verify,
    /// The loss of a link to the target or the source is bridged so.
    pub on_link_loss: Option<OnLinkLoss>,
}

impl MirrorArgs {
    /// A full mirror with all defaults.
    pub fn new(job_id: &str, device: &str, target: &str) -> MirrorArgs {
        MirrorArgs {
            job_id: job_id.to_owned(),
            device: device.to_owned(),
            target: target.to_owned(),
            replaces: None,
            sync: Sync::Full,
            speed: 0,
            granularity: 0,
            buf_size: 0,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            copy_mode: CopyMode::Background,
            filter_node_name: None,
            auto_finalize: true,
            auto_dismiss: true,
            target_is_zero: false,
            source_below: false,
            backing_mask_protocol: false,
            convergence: Convergence::None,
            converge_after: Duration::from_secs(30),
            bitmap: None,
            bitmap_mode: None,
            verify: Verify::default(),
            on_link_loss: None,
        }
    }

    pub(crate) fn job_options(&self) -> Result<Options> {
        Ok(Options {
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            speed: rate_limit(self.speed)?,
            on_source_error: self.on_source_error,
            on_target_error: self.on_target_error,
        })
    }

    /// Looks up the nodes and checks everything that can be checked before the job exists.
    pub(crate) async fn check(&self, graph: &Graph) -> Result<Checked> {
        let source = find_device(graph, &self.device)?;
        check_root(&source)?;
        let target = find_device(graph, &self.target)?;
        let bitmap = self.check_bitmap(&source)?;
        self.verify.check()?;
        if self.granularity != 0 && !(512..=MAX_GRANULARITY).contains(&self.granularity) {
            return Err(BlockError::invalid("Parameter 'granularity' expects a value in range [512B, 64MB]"));
        }
        if self.granularity != 0 && !self.granularity.is_power_of_two() {
            return Err(BlockError::invalid("Parameter 'granularity' expects a power of 2"));
        }
        let buffer =
            u64::try_from(self.buf_size).map_err(|_| BlockError::invalid("Invalid parameter 'buf-size'"))?;
        if source.id() == target.id() {
            return Err(BlockError::invalid("Can't mirror node into itself"));
        }
        let replaces =
            self.replaces.as_deref().map(|name| find_replaced(graph, name, &source)).transpose()?;
        if let Some(name) = &self.filter_node_name {
            graph.check_name(name)?;
        }
        source.check_not_blocked()?;
        target.check_not_blocked()?;
        check_not_backing(&target)?;
        graph.check_active(&source, "backing", self.filter_node_name.as_deref())?;
        if walk::contains(&walk::skip_filters(&source), &target) && source_filters(&source, &target) {
            return Err(BlockError::invalid("Can't mirror node into itself"));
        }
        check_link_loss(self.on_link_loss, &target)?;
        let granularity = match (self.granularity, &bitmap) {
            (0, None) => default_granularity(&target).await,
            (0, Some((bitmap, _))) => {
                // Whole clusters of the target: what a piece leaves of one would be made up where there is no backing.
                let clusters = walk::skip_filters(&target).node().limits().cluster_size;
                bitmap.bits().granularity().max(clusters).min(MAX_GRANULARITY)
            }
            (g, _) => g,
        };
        let buffer = if buffer == 0 { DEFAULT_BUFFER } else { buffer };
        let buffer = buffer.div_ceil(granularity).saturating_mul(granularity);
        Ok(Checked { source, target, replaces, granularity, buffer, bitmap, below: None })
    }

    fn check_bitmap(&self, source: &Rc<NodeCell>) -> Result<Option<(Rc<DirtyBitmap>, BitmapMode)>> {
        let refused = |why: String| Err(BlockError::invalid(why));
        let sync = match self.sync {
            Sync::Incremental => "incremental",
            _ => "bitmap",
        };
        let Some(name) = &self.bitmap else {
            return match (self.sync, self.bitmap_mode) {
                (Sync::Incremental | Sync::Bitmap, _) => {
                    refused(format!("Must provide a valid bitmap name for '{sync}' sync mode"))
                }
                (_, Some(_)) => refused("Cannot specify bitmap sync mode without a bitmap".to_owned()),
                (_, None) => Ok(None),
            };
        };
        let Some(bitmap) = source.find_bitmap(name) else {
            return Err(BlockError::new(ErrorKind::NotFound, format!("Dirty bitmap '{name}' not found")));
        };
        let mode = match (self.sync, self.bitmap_mode) {
            (Sync::Incremental, None | Some(BitmapMode::OnSuccess)) => BitmapMode::OnSuccess,
            (Sync::Incremental, Some(_)) => {
                let why = "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'";
                return refused(why.to_owned());
            }
            (_, Some(mode)) => mode,
            (_, None) => return refused("Bitmap sync mode must be given when providing a bitmap".to_owned()),
        };
        if self.granularity != 0 {
            return refused("Granularity and bitmap cannot both be set".to_owned());
        }
        match mode {
            BitmapMode::Never => bitmaps::check_consistent(&bitmap)?,
            BitmapMode::OnSuccess | BitmapMode::Always => bitmaps::check_changeable(&bitmap)?,
        }
        Ok(Some((bitmap, mode)))
    }

    /// The same for a commit of the active image, whose nodes have been looked up.
    pub(crate) async fn check_commit(
        &self,
        graph: &Graph,
        source: Rc<NodeCell>,
        target: Rc<NodeCell>,
        between: Vec<Rc<NodeCell>>,
    ) -> Result<Checked> {
        if let Some(name) = &self.filter_node_name {
            graph.check_name(name)?;
        }
        self.verify.check()?;
        check_link_loss(self.on_link_loss, &target)?;
        let closed = chain::closed_to_writing(&target)?;
        let granularity = default_granularity(&target).await;
        let buffer = u64::try_from(self.buf_size).unwrap_or(0).max(1);
        let buffer = buffer.div_ceil(granularity).saturating_mul(granularity);
        let below = Some(Below { between, closed });
        Ok(Checked { source, target, replaces: None, granularity, buffer, bitmap: None, below })
    }
}

/// Arguments that have been looked up.
pub(crate) struct Checked {
    pub(crate) source: Rc<NodeCell>,
    pub(crate) target: Rc<NodeCell>,
    pub(crate) replaces: Option<Rc<NodeCell>>,
    pub(crate) granularity: u64,
    pub(crate) buffer: u64,
    pub(crate) bitmap: Option<(Rc<DirtyBitmap>, BitmapMode)>,
    pub(crate) below: Option<Below>,
}

/// The target is an image below the source: a commit of the active image.
pub(crate) struct Below {
    /// The images between source and target, without both.
    pub(crate) between: Vec<Rc<NodeCell>>,
    /// What has to turn read-write for the target to take writes.
    pub(crate) closed: Vec<Rc<NodeCell>>,
}

/// A format that keeps its records behind a link takes for written what a peer may have lost: such a loss cannot be bridged.
pub(crate) fn check_link_loss(rule: Option<OnLinkLoss>, target: &Rc<NodeCell>) -> Result<()> {
    match rule.and_then(|_| graph::format_over_link(target)) {
        None => Ok(()),
        Some(format) => Err(BlockError::invalid(format!(
            "'on-link-loss' is not possible with format '{}' of node '{}' over a link: have the peer export what is in the image",
            format.node().driver(),
            format.name()
        ))),
    }
}

/// The target may not be what the source's own filters show.
fn source_filters(source: &Rc<NodeCell>, target: &Rc<NodeCell>) -> bool {
    walk::skip_filters(source).id() == target.id()
}

/// The node to be replaced must show the same bytes as the source: reachable through filters and quorum only, from the
/// source down.
fn find_replaced(graph: &Graph, name: &str, source: &Rc<NodeCell>) -> Result<Rc<NodeCell>> {
    let replaced = graph.find(name).ok_or_else(|| {
        BlockError::new(ErrorKind::NotFound, format!("Failed to find node with node-name='{name}'"))
    })?;
    check_not_backing(&replaced)?;
    let mut todo = vec![source.clone()];
    while let Some(cell) = todo.pop() {
        if cell.id() == replaced.id() {
            return Ok(replaced);
        }
        let node = cell.node();
        match node.filtered() {
            Some(edge) => todo.push(edge.child()),
            None if node.driver() == "quorum" => todo.extend(node.edges().iter().map(|e| e.child())),
            None => {}
        }
    }
    Err(BlockError::invalid(format!(
        "Cannot replace '{name}' by a node mirrored from '{}', because it cannot be guaranteed that doing so would not lead to an abrupt change of visible data",
        source.name()
    )))
}

/// The target's cluster size, within 4 to 64 KiB.
async fn default_granularity(target: &Rc<NodeCell>) -> u64 {
    let clusters = walk::skip_filters(target).node().limits().cluster_size;
    let clusters = match clusters {
        0 => target.node().details().await.ok().and_then(|d| d.cluster_size).unwrap_or(0),
        c => c,
    };
    if clusters == 0 { DEFAULT_GRANULARITY } else { clusters.clamp(4096, DEFAULT_GRANULARITY) }
}
