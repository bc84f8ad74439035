//! `block-verify`, and `verify` with what belongs to it: arguments of all commands that copy.

use super::mirror::ErrorPolicy;
use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::Reply;
use copy::OnError;
use jobs::VerifyMode;
use jobs::verify::{self, VerifyArgs};
use qapi::json;
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[entry::<BlockVerify>()];

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    Off,
    Sampled,
    Full,
}

impl From<Mode> for VerifyMode {
    fn from(mode: Mode) -> VerifyMode {
        match mode {
            Mode::Off => VerifyMode::Off,
            Mode::Sampled => VerifyMode::Sampled,
            Mode::Full => VerifyMode::Full,
        }
    }
}

/// How it is proven that the copy equals what it is a copy of. Not in QSD.
#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Verify {
    verify: Option<Mode>,
    verify_share: Option<i64>,
    verify_seed: Option<i64>,
    verify_repair: Option<bool>,
}

impl From<Verify> for jobs::Verify {
    fn from(v: Verify) -> jobs::Verify {
        jobs::Verify {
            mode: v.verify.map_or(VerifyMode::Off, VerifyMode::from),
            share: v.verify_share,
            seed: v.verify_seed,
            repair: v.verify_repair.unwrap_or(false),
        }
    }
}

#[derive(Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum Repair {
    None,
    Target,
}

/// Compares two disks while clients write to the first, and repairs the second if asked. Not in QSD.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockVerify {
    job_id: String,
    device: String,
    target: String,
    mode: Option<Mode>,
    share: Option<i64>,
    seed: Option<i64>,
    repair: Option<Repair>,
    speed: Option<i64>,
    on_source_error: Option<ErrorPolicy>,
    on_target_error: Option<ErrorPolicy>,
    filter_node_name: Option<String>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
}

impl Command for BlockVerify {
    const NAME: &'static str = "block-verify";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let default = VerifyArgs::new(&self.job_id, &self.device, &self.target);
        let args = VerifyArgs {
            verify: jobs::Verify {
                mode: self.mode.map_or(default.verify.mode, VerifyMode::from),
                share: self.share,
                seed: self.seed,
                repair: self.repair == Some(Repair::Target),
            },
            speed: self.speed.unwrap_or(default.speed),
            on_source_error: self.on_source_error.map_or(default.on_source_error, OnError::from),
            on_target_error: self.on_target_error.map_or(default.on_target_error, OnError::from),
            filter_node_name: self.filter_node_name,
            auto_finalize: self.auto_finalize.unwrap_or(default.auto_finalize),
            auto_dismiss: self.auto_dismiss.unwrap_or(default.auto_dismiss),
            ..default
        };
        verify::start(daemon.jobs(), daemon.graph(), args).await?;
        Ok(json!({}))
    }
}
