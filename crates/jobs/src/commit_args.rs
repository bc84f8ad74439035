//! Arguments of a commit, and what is wrong with them. Wording: reference/error-catalogue.tsv, since clients show it.

use crate::JobError;
use crate::chain;
use crate::job::{Options, rate_limit};
use crate::mirror_args::{Convergence, CopyMode, MirrorArgs, Sync};
use crate::verify_args::Verify;
use block::{ErrorKind, Result};
use copy::{OnError, OnLinkLoss};
use graph::{Graph, NodeCell, Perms, walk};
use std::rc::Rc;
use std::time::Duration;

/// One end of what is committed, as the client names it.
#[derive(Clone, Debug, Default)]
pub struct ChainEnd {
    /// Node name.
    pub node: Option<String>,
    /// Name of the image file, as in the chain.
    pub file: Option<String>,
}

/// Arguments of `block-commit`, as the client gave them.
#[derive(Clone, Debug)]
pub struct CommitArgs {
    /// Job id.
    pub job_id: String,
    /// The top of the chain: a root node.
    pub device: String,
    /// The highest image that goes down; the active one if nothing is said.
    pub top: ChainEnd,
    /// The image that gets everything; the lowest one if nothing is said.
    pub base: ChainEnd,
    /// What the overlay's header is to say instead of the base's name.
    pub backing_file: Option<String>,
    /// Calls a base that is a protocol node `raw` in the header.
    pub backing_mask_protocol: bool,
    /// Bytes per second, 0: no limit.
    pub speed: i64,
    /// Bytes in flight, 0: default.
    pub buf_size: u64,
    /// On failing reads.
    pub on_source_error: OnError,
    /// On failing writes.
    pub on_target_error: OnError,
    /// How writes of clients reach the base, if the active image goes down.
    pub copy_mode: CopyMode,
    /// What to do when that does not converge.
    pub convergence: Convergence,
    /// How long to wait before that.
    pub converge_after: Duration,
    /// The loss of a link to the base or the images above is bridged so, if the active image goes down.
    pub on_link_loss: Option<OnLinkLoss>,
    /// Delete the files of the images that leave the chain.
    pub delete_images: bool,
    /// Name of the filter node.
    pub filter_node_name: Option<String>,
    /// See [`Options`].
    pub auto_finalize: bool,
    /// See [`Options`].
    pub auto_dismiss: bool,
    /// How it is proven that the base holds what the images above it showed.
    pub verify: Verify,
}

impl CommitArgs {
    /// The active image into the lowest one, with all defaults.
    pub fn new(job_id: &str, device: &str) -> CommitArgs {
        CommitArgs {
            job_id: job_id.to_owned(),
            device: device.to_owned(),
            top: ChainEnd::default(),
            base: ChainEnd::default(),
            backing_file: None,
            backing_mask_protocol: false,
            speed: 0,
            buf_size: 0,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            copy_mode: CopyMode::Background,
            convergence: Convergence::None,
            converge_after: Duration::from_secs(30),
            on_link_loss: None,
            delete_images: false,
            filter_node_name: None,
            auto_finalize: true,
            auto_dismiss: true,
            verify: Verify::default(),
        }
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

    pub(crate) fn buffer(&self) -> u64 {
        if self.buf_size == 0 { chain::DEFAULT_BUFFER } else { self.buf_size }
    }

    /// Looks up the nodes and checks everything that can be checked before the job exists.
    pub(crate) async fn check(&self, graph: &Graph) -> std::result::Result<Checked, JobError> {
        let device = graph.find(&self.device).ok_or_else(|| JobError::NoDevice(self.device.clone()))?;
        chain::check_root(&device)?;
        device.check_not_blocked()?;
        self.verify.check()?;
        let active = walk::skip_filters(&device);
        let top = match self.top.find(graph, "top", &device, true).await? {
            Some(top) if walk::contains(&device, &top) => top,
            Some(other) => return Err(not_in_chain(&other)),
            None => active.clone(),
        };
        let base = match self.base.find(graph, "base", &top, false).await? {
            Some(base) if walk::contains(&top, &base) => base,
            Some(other) if other.id() == device.id() => return Err(into_itself()),
            Some(other) => return Err(not_in_chain(&other)),
            None => lowest(&top),
        };
        let between = chain::above(&top, Some(&base));
        chain::check_free(&between)?;
        base.check_not_blocked()?;
        let is_active = top.id() == device.id() || top.id() == active.id();
        // somebody writes to it directly, and goes on with the base
        let written = !is_active && top.parents().iter().any(|e| e.demand().needs.has(Perms::WRITE));
        let source = match (is_active, written) {
            (true, _) => Some(device.clone()),
            (_, true) => Some(top.clone()),
            _ => None,
        };
        if top.id() == base.id() {
            // with filters above it QSD has come further
            let mirrored = is_active && base.id() != device.id();
            return Err(if mirrored {
                JobError::refused("Can't mirror node into itself")
            } else {
                into_itself()
            });
        }
        if source.is_none() && walk::skip_filters(&top).id() == walk::skip_filters(&base).id() {
            return Err(JobError::refused("Invalid files for merge: top and base are the same"));
        }
        if is_active && self.backing_file.is_some() {
            return Err(JobError::refused("'backing-file' specified, but 'top' is the active layer"));
        }
        if written && walk::skip_filters(&top).id() == walk::skip_filters(&base).id() {
            return Err(JobError::refused("Can't mirror node into itself"));
        }
        if written && self.backing_file.is_some() {
            return Err(JobError::refused("'backing-file' specified, but 'top' has a writer on it"));
        }
        let between = match &source {
            // with the filters in front, without the disk itself
            Some(source) => chain::above(source, Some(&base)).split_off(1),
            None => between,
        };
        graph.check_active(&device, "backing", self.filter_node_name.as_deref())?;
        Ok(Checked { device, top, base, between, source })
    }

    /// The commit of what is written to as the mirror that it is.
    pub(crate) fn as_mirror(&self, source: &Rc<NodeCell>, base: &Rc<NodeCell>) -> MirrorArgs {
        MirrorArgs {
            sync: Sync::Top,
            speed: self.speed,
            buf_size: i64::try_from(self.buffer()).unwrap_or(i64::MAX),
            on_source_error: self.on_source_error,
            on_target_error: self.on_target_error,
            copy_mode: self.copy_mode,
            filter_node_name: self.filter_node_name.clone(),
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            convergence: self.convergence,
            converge_after: self.converge_after,
            verify: self.verify,
            on_link_loss: self.on_link_loss,
            backing_mask_protocol: self.backing_mask_protocol,
            ..MirrorArgs::new(&self.job_id, source.name(), base.name())
        }
    }
}

impl ChainEnd {
    /// The node that is meant, somewhere in the graph; files are looked for in the chain from `from`.
    async fn find(
        &self,
        graph: &Graph,
        what: &str,
        from: &Rc<NodeCell>,
        with_from: bool,
    ) -> std::result::Result<Option<Rc<NodeCell>>, JobError> {
        match (&self.node, &self.file) {
            (Some(_), Some(_)) => {
                Err(JobError::refused(format!("'{what}-node' and '{what}' are mutually exclusive")))
            }
            (Some(node), None) => Ok(Some(chain::find_node(graph, node)?)),
            (None, Some(file)) => match chain::find_file(from, file, with_from).await {
                Err(e) if what == "top" && e.kind() == ErrorKind::NotFound => {
                    Err(JobError::refused(format!("Top image file {file} not found")))
                }
                found => Ok(Some(found?)),
            },
            (None, None) => Ok(None),
        }
    }
}

fn into_itself() -> JobError {
    JobError::refused("cannot commit an image into itself")
}

fn not_in_chain(node: &NodeCell) -> JobError {
    JobError::refused(format!("'{}' is not in this backing file chain", node.name()))
}

/// The lowest image below `top`; `top` itself if there is none.
fn lowest(top: &Rc<NodeCell>) -> Rc<NodeCell> {
    let mut at = top.clone();
    while let Some(below) = at.below() {
        at = below;
    }
    at
}

/// Arguments that have been looked up.
pub(crate) struct Checked {
    pub(crate) device: Rc<NodeCell>,
    pub(crate) top: Rc<NodeCell>,
    pub(crate) base: Rc<NodeCell>,
    /// From `top` down to what is above `base`; if `source` goes down, from what is below it.
    pub(crate) between: Vec<Rc<NodeCell>>,
    /// What goes down while somebody writes to it: the disk, or an image below it that has a writer of its own.
    pub(crate) source: Option<Rc<NodeCell>>,
}
