//! The verbs of jobs, and what jobs show of themselves. Each verb exists twice: `job-…` for all jobs, and the older
//! `block-job-…` for those that work on disks, with an error class of its own for unknown ids.

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::Reply;
use crate::jobinfo;
use jobs::Job;
use qapi::{Value, json};
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[
    entry::<JobPause>(),
    entry::<JobResume>(),
    entry::<JobComplete>(),
    entry::<JobCancel>(),
    entry::<JobFinalize>(),
    entry::<JobDismiss>(),
    entry::<BlockJobPause>(),
    entry::<BlockJobResume>(),
    entry::<BlockJobComplete>(),
    entry::<BlockJobCancel>(),
    entry::<BlockJobFinalize>(),
    entry::<BlockJobDismiss>(),
    entry::<BlockJobSetSpeed>(),
    entry::<QueryJobs>(),
    entry::<QueryBlockJobs>(),
];

/// Tells a job to rest at its next opportunity.
#[derive(Deserialize)]
struct JobPause {
    id: String,
}

impl Command for JobPause {
    const NAME: &'static str = "job-pause";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find(&self.id)?;
        daemon.jobs().pause(&job)?;
        Ok(json!({}))
    }
}

/// Ends a rest, also one after an error.
#[derive(Deserialize)]
struct JobResume {
    id: String,
}

impl Command for JobResume {
    const NAME: &'static str = "job-resume";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find(&self.id)?;
        daemon.jobs().resume(&job)?;
        Ok(json!({}))
    }
}

/// Lets a ready job end: its users move to the target.
#[derive(Deserialize)]
struct JobComplete {
    id: String,
}

impl Command for JobComplete {
    const NAME: &'static str = "job-complete";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find(&self.id)?;
        daemon.jobs().complete(&job)?;
        Ok(json!({}))
    }
}

/// Ends a job without success.
#[derive(Deserialize)]
struct JobCancel {
    id: String,
}

impl Command for JobCancel {
    const NAME: &'static str = "job-cancel";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find(&self.id)?;
        daemon.jobs().cancel(&job).await?;
        Ok(json!({}))
    }
}

/// Lets a pending job change the graph.
#[derive(Deserialize)]
struct JobFinalize {
    id: String,
}

impl Command for JobFinalize {
    const NAME: &'static str = "job-finalize";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find(&self.id)?;
        daemon.jobs().finalize(&job).await?;
        Ok(json!({}))
    }
}

/// Forgets a concluded job.
#[derive(Deserialize)]
struct JobDismiss {
    id: String,
}

impl Command for JobDismiss {
    const NAME: &'static str = "job-dismiss";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find(&self.id)?;
        daemon.jobs().dismiss(&job)?;
        Ok(json!({}))
    }
}

/// `job-pause` for block jobs.
#[derive(Deserialize)]
struct BlockJobPause {
    device: String,
}

impl Command for BlockJobPause {
    const NAME: &'static str = "block-job-pause";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find_block_job(&self.device)?;
        daemon.jobs().pause(&job)?;
        Ok(json!({}))
    }
}

/// `job-resume` for block jobs.
#[derive(Deserialize)]
struct BlockJobResume {
    device: String,
}

impl Command for BlockJobResume {
    const NAME: &'static str = "block-job-resume";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find_block_job(&self.device)?;
        daemon.jobs().resume(&job)?;
        Ok(json!({}))
    }
}

/// `job-complete` for block jobs.
#[derive(Deserialize)]
struct BlockJobComplete {
    device: String,
}

impl Command for BlockJobComplete {
    const NAME: &'static str = "block-job-complete";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find_block_job(&self.device)?;
        daemon.jobs().complete(&job)?;
        Ok(json!({}))
    }
}

/// Ends a block job. Without `force` a ready mirror ends as a success that leaves its users where they are.
#[derive(Deserialize)]
struct BlockJobCancel {
    device: String,
    #[serde(default)]
    force: bool,
}

impl Command for BlockJobCancel {
    const NAME: &'static str = "block-job-cancel";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find_block_job(&self.device)?;
        if self.force {
            daemon.jobs().cancel(&job).await?;
        } else {
            daemon.jobs().cancel_softly(&job).await?;
        }
        Ok(json!({}))
    }
}

/// `job-finalize` for block jobs.
#[derive(Deserialize)]
struct BlockJobFinalize {
    id: String,
}

impl Command for BlockJobFinalize {
    const NAME: &'static str = "block-job-finalize";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find_block_job(&self.id)?;
        daemon.jobs().finalize(&job).await?;
        Ok(json!({}))
    }
}

/// `job-dismiss` for block jobs.
#[derive(Deserialize)]
struct BlockJobDismiss {
    id: String,
}

impl Command for BlockJobDismiss {
    const NAME: &'static str = "block-job-dismiss";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find_block_job(&self.id)?;
        daemon.jobs().dismiss(&job)?;
        Ok(json!({}))
    }
}

/// Another rate limit, in bytes per second.
#[derive(Deserialize)]
struct BlockJobSetSpeed {
    device: String,
    speed: i64,
}

impl Command for BlockJobSetSpeed {
    const NAME: &'static str = "block-job-set-speed";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let job = daemon.jobs().find_block_job(&self.device)?;
        daemon.jobs().set_speed(&job, self.speed)?;
        Ok(json!({}))
    }
}

/// With how it was started again in this life of the daemon, if it was.
fn resumed(job: &Job, mut shown: Value) -> Value {
    if let Some(how) = job.resumed() {
        shown["resumed"] = json!(how);
    }
    shown
}

/// All jobs, newest first.
#[derive(Deserialize)]
struct QueryJobs {}

impl Command for QueryJobs {
    const NAME: &'static str = "query-jobs";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let now = daemon.env().now();
        let shown = |j: &Rc<_>| resumed(j, jobinfo::job(j, now));
        Ok(daemon.jobs().list().iter().map(shown).collect::<Value>())
    }
}

/// All block jobs, newest first, with more about each.
#[derive(Deserialize)]
struct QueryBlockJobs {}

impl Command for QueryBlockJobs {
    const NAME: &'static str = "query-block-jobs";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let all = daemon.jobs().list();
        let all = all.iter().filter(|j| j.kind().is_block_job());
        let now = daemon.env().now();
        Ok(all.map(|j| resumed(j, jobinfo::block_job(j, now))).collect::<Value>())
    }
}
