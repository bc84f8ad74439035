//! Arguments of a stream, and what is wrong with them. Wording: reference/error-catalogue.tsv, since clients show it.

use crate::JobError;
use crate::chain;
use crate::commit_args::ChainEnd;
use crate::job::{Options, rate_limit};
use crate::verify_args::Verify;
use block::{BlockError, Result};
use copy::OnError;
use graph::{Graph, NodeCell, walk};
use std::rc::Rc;

/// Arguments of `block-stream`, as the client gave them.
#[derive(Clone, Debug)]
pub struct StreamArgs {
    /// Job id.
    pub job_id: String,
    /// The node that gets everything.
    pub device: String,
    /// The image that becomes the backing file; none if nothing is said.
    pub base: ChainEnd,
    /// The lowest image that is taken in, instead of a base.
    pub bottom: Option<String>,
    /// What the header is to say instead of the base's name.
    pub backing_file: Option<String>,
    /// Calls a base that is a protocol node `raw` in the header.
    pub backing_mask_protocol: bool,
    /// Bytes per second, 0: no limit.
    pub speed: i64,
    /// Bytes in flight, 0: default.
    pub buf_size: u64,
    /// On failing requests.
    pub on_error: OnError,
    /// Delete the files of the images that leave the chain.
    pub delete_images: bool,
    /// Name of the filter node.
    pub filter_node_name: Option<String>,
    /// See [`Options`].
    pub auto_finalize: bool,
    /// See [`Options`].
    pub auto_dismiss: bool,
    /// How it is proven that the disk shows what it showed.
    pub verify: Verify,
}

impl StreamArgs {
    /// The whole chain, with all defaults.
    pub fn new(job_id: &str, device: &str) -> StreamArgs {
        StreamArgs {
            job_id: job_id.to_owned(),
            device: device.to_owned(),
            base: ChainEnd::default(),
            bottom: None,
            backing_file: None,
            backing_mask_protocol: false,
            speed: 0,
            buf_size: 0,
            on_error: OnError::Report,
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
            on_source_error: self.on_error,
            on_target_error: self.on_error,
        }
    }

    pub(crate) fn check_speed(&self) -> Result<()> {
        rate_limit(self.speed).map(drop)
    }

    pub(crate) fn buffer(&self) -> u64 {
        if self.buf_size == 0 { chain::DEFAULT_BUFFER } else { self.buf_size }
    }

    fn check_exclusive(&self) -> Result<()> {
        let given = [
            ("base", self.base.file.is_some()),
            ("bottom", self.bottom.is_some()),
            ("base-node", self.base.node.is_some()),
        ];
        for (i, (a, there)) in given.iter().enumerate() {
            for (b, also) in &given[i + 1..] {
                if *there && *also {
                    return Err(BlockError::invalid(format!(
                        "'{a}' and '{b}' cannot be specified at the same time"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Looks up the nodes and checks everything that can be checked before the job exists.
    pub(crate) async fn check(&self, graph: &Graph) -> std::result::Result<Checked, JobError> {
        self.check_exclusive()?;
        self.verify.check()?;
        let device = chain::find_device(graph, &self.device)?;
        let below = |node: &Rc<NodeCell>| node.id() != device.id() && walk::contains(&device, node);
        let mut base = match (&self.base.node, &self.base.file) {
            (Some(name), _) => {
                let node = chain::find_node(graph, name)?;
                if !below(&node) {
                    return Err(JobError::refused(format!(
                        "Node '{name}' is not a backing image of '{}'",
                        device.name()
                    )));
                }
                Some(node)
            }
            (None, Some(file)) => Some(chain::find_file(&device, file, false).await?),
            (None, None) => None,
        };
        if base.is_none() && self.backing_file.is_some() {
            return Err(JobError::refused("backing file specified, but streaming the entire chain"));
        }
        if let Some(name) = &self.bottom {
            let bottom = graph
                .find(name)
                .ok_or_else(|| JobError::refused(format!("Cannot find device='' nor node-name='{name}'")))?;
            if bottom.node().filtered().is_some() {
                return Err(JobError::refused(format!(
                    "Node '{name}' is a filter, use a non-filter node as 'bottom'"
                )));
            }
            if !walk::contains(&device, &bottom) {
                return Err(JobError::refused(format!(
                    "Node '{name}' is not in a chain starting from '{}'",
                    device.name()
                )));
            }
            base = bottom.below();
        }
        let image = walk::skip_filters(&device);
        if let Some(base) = base.as_ref().filter(|b| b.id() == image.id() || !walk::contains(&image, b)) {
            let (base, device) = (base.name(), device.name());
            return Err(JobError::refused(format!("'{base}' is not in the backing chain of '{device}'")));
        }
        let taken = chain::above(&device, base.as_ref());
        chain::check_free(&taken)?;
        chain::closed_to_writing(&image)?;
        if let Some(name) = &self.filter_node_name {
            graph.check_name(name).map_err(|e| e.context("Could not create node"))?;
        }
        let named = self.filter_node_name.as_deref();
        graph.check_active(&device, "file", named).map_err(|e| e.context("Could not create node"))?;
        let from = taken.iter().position(|n| n.id() == image.id()).map_or(0, |i| i + 1);
        let between = taken.get(from..).unwrap_or_default().to_vec();
        Ok(Checked { device, image, between, base })
    }
}

/// Arguments that have been looked up.
pub(crate) struct Checked {
    pub(crate) device: Rc<NodeCell>,
    /// The device itself behind its filters: the one whose header and backing node change.
    pub(crate) image: Rc<NodeCell>,
    /// What leaves the chain, from the top down.
    pub(crate) between: Vec<Rc<NodeCell>>,
    /// What is below in the end.
    pub(crate) base: Option<Rc<NodeCell>>,
}
