//! Jobs as records, and what is made of them in a later life.
//!
//! A job is recorded by the command that started it and by what it was told since: its speed, a pause, its copy mode, that
//! it is to complete. A later life starts it again under its id, tells it the same, and says so (`resumed` in `query-jobs`).
//! What must stay true: what a job that is started again copies contains all that may differ; a job that has changed the graph is
//! not started again; a concluded one that nobody dismissed stays to be seen.

use super::Recorder;
use crate::Daemon;
use crate::error::QmpError;
use block::BlockError;
use jobs::backup::Backup;
use jobs::mirror::Mirror;
use jobs::{CopyMode, Job, Kind, Options, Progress, State};
use qapi::{Map, Value, json};
use std::collections::BTreeMap;
use std::rc::Rc;

/// A job, by the command that started it.
#[derive(Clone, Debug)]
pub(crate) struct JobRecord {
    command: String,
    arguments: Map<String, Value>,
}

/// Commands that start a job which a later life starts again.
const STARTING: [&str; 8] = [
    "blockdev-mirror",
    "blockdev-backup",
    "block-commit",
    "block-stream",
    "blockdev-create",
    "drive-mirror",
    "drive-backup",
    "block-verify",
];

/// What is told of a backup whose instant could not be kept.
const MOVED: &str = "started again after a restart: it is the disk as of the restart";
/// The same, of one whose target has most of it.
const MOVED_ON: &str = "started again after a restart: it is the disk as of the restart, for which what the target may lack is copied, and nothing else";

/// Why a backup with `discard-source` is not started again: copied once more, what is no longer in the source would be lost on the
/// target, too.
const DISCARDED: &str = "the daemon was restarted: with discard-source, what had been copied is no longer in the source, and was not copied again";

pub(super) fn starts_job(command: &str) -> bool {
    STARTING.contains(&command)
}

impl Recorder {
    /// Takes note of a command that started jobs, or that told one something which it does not know itself.
    pub(super) fn note_job(&self, command: &str, arguments: &Map<String, Value>) {
        if command == "transaction" {
            for action in arguments.get("actions").and_then(Value::as_array).into_iter().flatten() {
                if let (Some(kind), Some(data)) = (action["type"].as_str(), action["data"].as_object()) {
                    self.note_job(kind, data);
                }
            }
        }
        if !starts_job(command) {
            return;
        }
        // the default is the name of the device, which for a stream and a commit may be one
        let id = arguments.get("job-id").or_else(|| arguments.get("device")).and_then(Value::as_str);
        if let Some(id) = id {
            let record = JobRecord { command: command.to_owned(), arguments: arguments.clone() };
            self.jobs.borrow_mut().insert(id.to_owned(), record);
        }
    }

    pub(super) fn describe_jobs(&self, daemon: &Daemon) -> BTreeMap<String, Vec<u8>> {
        let all = daemon.jobs().list();
        let mut noted = self.jobs.borrow_mut();
        noted.retain(|id, _| all.iter().any(|j| j.id() == id));
        let mut rows = BTreeMap::new();
        for (order, job) in all.iter().rev().enumerate() {
            let value = match noted.get(job.id()) {
                _ if job.is_over() && job.options().auto_dismiss => continue,
                _ if job.is_over() => concluded(job, order),
                Some(record) => running(record, job, order),
                None => continue,
            };
            rows.insert(job.id().to_owned(), value.to_string().into_bytes());
        }
        rows
    }
}

fn concluded(job: &Job, order: usize) -> Value {
    let progress = job.progress();
    let error = job.error().map(|e| json!({"message": e.message(), "errno": e.errno()}));
    json!({"order": order, "concluded": {
        "type": job.kind().name(),
        "len": progress.total,
        "offset": progress.current,
        "speed": job.speed(),
        "auto-finalize": job.options().auto_finalize,
        "error": error,
    }})
}

fn running(record: &JobRecord, job: &Job, order: usize) -> Value {
    let JobRecord { mut command, mut arguments, .. } = record.clone();
    if job.kind() != Kind::Create {
        arguments.insert("speed".into(), json!(job.speed()));
    }
    let body = job.body();
    let body = body.as_ref().map(|b| b.as_any());
    if let Some(mirror) = body.and_then(|b| b.downcast_ref::<Mirror>()) {
        if mirror.copy_mode() != CopyMode::Background || arguments.contains_key("copy-mode") {
            arguments.insert("copy-mode".into(), json!(mirror.copy_mode().name()));
        }
        existing(&mut command, &mut arguments, "drive-mirror", "blockdev-mirror", &mirror.args().target);
    }
    if let Some(backup) = body.and_then(|b| b.downcast_ref::<Backup>()) {
        existing(&mut command, &mut arguments, "drive-backup", "blockdev-backup", backup.target());
    }
    let completing = job.body().is_some_and(|b| b.is_completing());
    json!({"order": order, "command": command, "arguments": arguments, "paused": job.is_paused(),
        "completing": completing})
}

/// A job of a `drive-*` command goes on as one with a node that is there: its image has been made.
fn existing(
    command: &mut String,
    arguments: &mut Map<String, Value>,
    drive: &str,
    blockdev: &str,
    target: &str,
) {
    if command == drive {
        *command = blockdev.to_owned();
        for key in ["format", "mode", "node-name", "unmap"] {
            arguments.shift_remove(key);
        }
        arguments.insert("target".into(), json!(target));
    }
}

/// The arguments with which a job is started again, of which nobody knows how far it had come; and what to tell of it.
fn in_doubt(command: &str, arguments: &Map<String, Value>) -> (Map<String, Value>, &'static str) {
    let mut out = arguments.clone();
    let told = match command {
        "blockdev-mirror" => {
            // it has been written to
            out.shift_remove("target-is-zero");
            "started again after a restart: everything is copied again"
        }
        "blockdev-backup" => MOVED,
        "block-verify" => "started again after a restart: everything is compared again",
        _ => "started again after a restart: what was copied is found by what is allocated",
    };
    (out, told)
}

impl Daemon {
    pub(super) async fn restore_job(
        self: &Rc<Self>,
        recorder: &Recorder,
        id: &str,
        record: &Value,
    ) -> Result<(), QmpError> {
        if let Some(end) = record.get("concluded") {
            return self.remember_job(id, end);
        }
        let command = record["command"].as_str().unwrap_or_default();
        let arguments = record["arguments"].as_object().cloned().unwrap_or_default();
        if !starts_job(command) {
            return Err(QmpError::generic(format!("'{command}' starts no job")));
        }
        if command == "blockdev-backup" && arguments.get("discard-source") == Some(&json!(true)) {
            self.tell_trouble(&format!("job '{id}' is not started again: {DISCARDED}"));
            let error = json!({"message": DISCARDED, "errno": BlockError::EIO});
            return self.remember_job(id, &json!({"type": Kind::Backup.name(), "error": error}));
        }
        let (again, told) = in_doubt(command, &arguments);
        let mut started = self.patiently(command, &again).await;
        if started.is_err() && again.contains_key("bitmap") {
            // without the bitmap, which did not outlive the restart, all may differ
            let mut whole = again.clone();
            whole.shift_remove("bitmap");
            whole.shift_remove("bitmap-mode");
            whole.insert("sync".into(), json!("full"));
            started = self.patiently(command, &whole).await;
        }
        started?;
        let job = self.jobs().find(id)?;
        let goes_on = |is: Option<bool>| is == Some(true);
        let told = if goes_on(jobs::mirror::with(&job, Mirror::is_resumed)) {
            "goes on after a restart: what the target may lack is copied, and nothing else"
        } else if goes_on(jobs::backup::with(&job, Backup::is_resumed)) {
            "goes on after a restart: it is the disk as of its start, as before"
        } else if goes_on(jobs::backup::with(&job, Backup::has_moved)) {
            MOVED_ON
        } else {
            told
        };
        // unless it has found out more by itself meanwhile
        let told = job.resumed().unwrap_or(told);
        job.note_resumed(told);
        if [MOVED, MOVED_ON].contains(&told) {
            self.tell_trouble(&format!("job '{id}' was {told}"));
        }
        let said = JobRecord { command: command.to_owned(), arguments };
        recorder.jobs.borrow_mut().insert(id.to_owned(), said);
        if record["paused"] == json!(true) {
            self.jobs().pause(&job)?;
        }
        if record["completing"] == json!(true) {
            let daemon = self.clone();
            self.env().spawn("job completes again", async move {
                job.reached(State::Ready).await;
                if job.state() == State::Ready {
                    // refused only if somebody ended it meanwhile
                    let _ = daemon.jobs().complete(&job);
                }
            });
        }
        Ok(())
    }

    fn remember_job(&self, id: &str, end: &Value) -> Result<(), QmpError> {
        let number = |key: &str| end[key].as_u64().unwrap_or(0);
        let kind = end["type"].as_str().and_then(Kind::of_name);
        let kind = kind.ok_or_else(|| QmpError::generic("its kind is not known"))?;
        let error = end["error"]["message"].as_str().map(|m| {
            let errno = end["error"]["errno"].as_i64().and_then(|n| i32::try_from(n).ok());
            BlockError::from_errno(errno.unwrap_or(BlockError::EIO)).with_message(m)
        });
        let options = Options {
            auto_dismiss: false,
            auto_finalize: end["auto-finalize"] != json!(false),
            speed: number("speed"),
            ..Options::default()
        };
        let progress = Progress { total: number("len"), current: number("offset") };
        self.jobs().remember(id, kind, options, progress, error)?;
        Ok(())
    }
}
