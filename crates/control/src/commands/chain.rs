//! `block-commit`, `block-stream`: images leave a chain, into one below or above them. `change-backing-file`: what an image says
//! of the one below it.

use super::mirror::{ConvergencePolicy, ErrorPolicy, LinkLossPolicy, Mode};
use super::verify::Verify;
use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::Reply;
use copy::OnError;
use jobs::{ChainEnd, CommitArgs, Convergence, CopyMode, StreamArgs, commit, stream};
use qapi::json;
use serde::Deserialize;
use std::rc::Rc;
use std::time::Duration;

pub(super) const COMMANDS: &[Entry] =
    &[entry::<BlockCommit>(), entry::<BlockStream>(), entry::<ChangeBackingFile>()];

/// Brings what images hold down into one below them, and takes them out of the chain. `on-source-error`, `on-target-error`,
/// `buf-size`, `delete-images`, `copy-mode`, `convergence`, `converge-after`, `on-link-loss` and `verify*` are not in QSD.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockCommit {
    job_id: Option<String>,
    device: String,
    base_node: Option<String>,
    base: Option<String>,
    top_node: Option<String>,
    top: Option<String>,
    backing_file: Option<String>,
    backing_mask_protocol: Option<bool>,
    speed: Option<i64>,
    buf_size: Option<u32>,
    delete_images: Option<bool>,
    on_error: Option<ErrorPolicy>,
    on_source_error: Option<ErrorPolicy>,
    on_target_error: Option<ErrorPolicy>,
    copy_mode: Option<Mode>,
    convergence: Option<ConvergencePolicy>,
    converge_after: Option<u32>,
    on_link_loss: Option<LinkLossPolicy>,
    filter_node_name: Option<String>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
    #[serde(flatten)]
    verify: Verify,
}

impl Command for BlockCommit {
    const NAME: &'static str = "block-commit";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let default = CommitArgs::new(&self.job_id.unwrap_or_default(), &self.device);
        let both = self.on_error.map_or(OnError::Report, OnError::from);
        let args = CommitArgs {
            top: ChainEnd { node: self.top_node, file: self.top },
            base: ChainEnd { node: self.base_node, file: self.base },
            backing_file: self.backing_file,
            backing_mask_protocol: self.backing_mask_protocol.unwrap_or(false),
            speed: self.speed.unwrap_or(0),
            buf_size: self.buf_size.map_or(0, u64::from),
            delete_images: self.delete_images.unwrap_or(false),
            on_source_error: self.on_source_error.map_or(both, OnError::from),
            on_target_error: self.on_target_error.map_or(both, OnError::from),
            copy_mode: self.copy_mode.map_or(default.copy_mode, CopyMode::from),
            convergence: self.convergence.map_or(default.convergence, Convergence::from),
            converge_after: self
                .converge_after
                .map_or(default.converge_after, |s| Duration::from_secs(u64::from(s))),
            on_link_loss: LinkLossPolicy::rule(self.on_link_loss)?,
            filter_node_name: self.filter_node_name,
            auto_finalize: self.auto_finalize.unwrap_or(true),
            auto_dismiss: self.auto_dismiss.unwrap_or(true),
            verify: self.verify.into(),
            ..default
        };
        commit::start(daemon.jobs(), daemon.graph(), args).await?;
        Ok(json!({}))
    }
}

/// Brings what the images below one hold up into it, and takes them out of the chain. `buf-size` and
/// `delete-images` and `verify*` are not in QSD.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockStream {
    job_id: Option<String>,
    device: String,
    base: Option<String>,
    base_node: Option<String>,
    bottom: Option<String>,
    backing_file: Option<String>,
    backing_mask_protocol: Option<bool>,
    speed: Option<i64>,
    buf_size: Option<u32>,
    delete_images: Option<bool>,
    on_error: Option<ErrorPolicy>,
    filter_node_name: Option<String>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
    #[serde(flatten)]
    verify: Verify,
}

impl Command for BlockStream {
    const NAME: &'static str = "block-stream";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let default = StreamArgs::new(&self.job_id.unwrap_or_default(), &self.device);
        let args = StreamArgs {
            base: ChainEnd { node: self.base_node, file: self.base },
            bottom: self.bottom,
            backing_file: self.backing_file,
            backing_mask_protocol: self.backing_mask_protocol.unwrap_or(false),
            speed: self.speed.unwrap_or(0),
            buf_size: self.buf_size.map_or(0, u64::from),
            delete_images: self.delete_images.unwrap_or(false),
            on_error: self.on_error.map_or(OnError::Report, OnError::from),
            filter_node_name: self.filter_node_name,
            auto_finalize: self.auto_finalize.unwrap_or(true),
            auto_dismiss: self.auto_dismiss.unwrap_or(true),
            verify: self.verify.into(),
            ..default
        };
        stream::start(daemon.jobs(), daemon.graph(), args).await?;
        Ok(json!({}))
    }
}

/// Changes what the header of an image says of its backing file.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ChangeBackingFile {
    device: String,
    image_node_name: String,
    backing_file: String,
}

impl Command for ChangeBackingFile {
    const NAME: &'static str = "change-backing-file";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let graph = daemon.graph();
        jobs::change_backing_file(graph, &self.device, &self.image_node_name, &self.backing_file).await?;
        Ok(json!({}))
    }
}
