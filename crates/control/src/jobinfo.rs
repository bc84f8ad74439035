//! Jobs as QMP shows them: events, `JobInfo`, `BlockJobInfo`.

use crate::events::Events;
use copy::{Action, Coverage, Report, Side};
use jobs::backup::Backup;
use jobs::mirror::Mirror;
use jobs::{Event, IoStatus, Job, Kind, Progress, Sink, State};
use qapi::{Map, Value, json};
use std::rc::Rc;

/// Turns what jobs tell into QMP events.
pub(crate) struct JobEvents(pub(crate) Rc<Events>);

impl Sink for JobEvents {
    fn event(&self, event: Event) {
        if let Some((name, data)) = as_qmp(event) {
            self.0.emit(name, data);
        }
    }
}

/// `None` for what QMP has no event for.
fn as_qmp(event: Event) -> Option<(&'static str, Value)> {
    let about = |kind: Kind, id: String, p: Progress, speed: u64| json!({"type": kind.name(), "device": id, "len": p.total, "offset": p.current, "speed": speed});
    Some(match event {
        Event::Status { id, state } => ("JOB_STATUS_CHANGE", json!({"status": state.name(), "id": id})),
        Event::Ready { id, kind, progress, speed } => ("BLOCK_JOB_READY", about(kind, id, progress, speed)),
        Event::Pending { id, kind } => ("BLOCK_JOB_PENDING", json!({"type": kind.name(), "id": id})),
        Event::Cancelled { id, kind, progress, speed } => {
            ("BLOCK_JOB_CANCELLED", about(kind, id, progress, speed))
        }
        Event::Completed { id, kind, progress, speed, error, verified } => {
            let mut data = about(kind, id, progress, speed);
            if let Some(report) = verified {
                data["verify"] = verify(&report);
            }
            if let Some(e) = error {
                data["error"] = json!(e);
            }
            ("BLOCK_JOB_COMPLETED", data)
        }
        Event::Mismatch { id, found } => {
            let (at, last) = (found.at, found.last.name());
            let data = json!({"device": id, "offset": at.start, "length": at.len, "changed-last": last, "repair": found.repair});
            ("BLOCK_JOB_MISMATCH", data)
        }
        Event::Image { id, node, filename, error } => {
            let mut data =
                json!({"device": id, "node-name": node, "filename": filename, "deleted": error.is_none()});
            if let Some(e) = error {
                data["reason"] = json!(e);
            }
            ("BLOCK_JOB_IMAGE_DELETED", data)
        }
        Event::Error { id, side, action } => {
            let operation = match side {
                Side::Source => "read",
                Side::Target => "write",
            };
            let action = match action {
                Action::Ignore => "ignore",
                Action::Report => "report",
                Action::Stop => "stop",
            };
            ("BLOCK_JOB_ERROR", json!({"device": id, "operation": operation, "action": action}))
        }
        _ => return None,
    })
}

/// What a comparison has come to.
fn verify(report: &Report) -> Value {
    let mut out = Map::new();
    match report.rules.coverage {
        Coverage::Full => {
            out.insert("mode".into(), json!("full"));
        }
        Coverage::Sampled { one_of, seed } => {
            out.insert("mode".into(), json!("sampled"));
            out.insert("share".into(), json!(100 / one_of));
            out.insert("seed".into(), json!(seed.cast_signed()));
        }
    }
    out.insert("repair".into(), json!(report.rules.repair));
    out.insert("verified-bytes".into(), json!(report.verified));
    out.insert("remaining-bytes".into(), json!(report.remaining));
    out.insert("mismatches".into(), json!(report.mismatches));
    out.insert("mismatched-bytes".into(), json!(report.mismatched));
    out.insert("repaired".into(), json!(report.repaired));
    out.insert("target-read".into(), json!(if report.by_hash { "hashes" } else { "bytes" }));
    if let Some(digest) = report.digest {
        out.insert("digest".into(), json!(digest.to_string()));
    }
    Value::Object(out)
}

/// One element of `query-jobs`.
pub(crate) fn job(job: &Rc<Job>) -> Value {
    let progress = job.progress();
    let mut out = Map::new();
    out.insert("current-progress".into(), json!(progress.current));
    out.insert("status".into(), json!(job.state().name()));
    out.insert("total-progress".into(), json!(progress.total));
    out.insert("type".into(), json!(job.kind().name()));
    out.insert("id".into(), json!(job.id()));
    more(job, &mut out);
    Value::Object(out)
}

/// One element of `query-block-jobs`.
pub(crate) fn block_job(job: &Rc<Job>) -> Value {
    let progress = job.progress();
    let io_status = match job.io_status() {
        IoStatus::Ok => "ok",
        IoStatus::Failed => "failed",
        IoStatus::NoSpace => "nospace",
    };
    let mut out = Map::new();
    out.insert("auto-finalize".into(), json!(job.options().auto_finalize));
    out.insert("io-status".into(), json!(io_status));
    out.insert("device".into(), json!(job.id()));
    out.insert("auto-dismiss".into(), json!(job.options().auto_dismiss));
    out.insert("busy".into(), json!(job.is_busy()));
    out.insert("len".into(), json!(progress.total));
    out.insert("offset".into(), json!(progress.current));
    out.insert("status".into(), json!(job.state().name()));
    out.insert("paused".into(), json!(job.is_paused()));
    out.insert("speed".into(), json!(job.speed()));
    out.insert("ready".into(), json!(matches!(job.state(), State::Ready | State::Standby)));
    out.insert("type".into(), json!(job.kind().name()));
    let body = job.body();
    let mirror = body.as_ref().and_then(|b| b.as_any().downcast_ref::<Mirror>());
    // from completion to finalize the client is held, which clients know as a pause
    let frozen = mirror.is_some_and(Mirror::is_frozen);
    out.insert("paused".into(), json!(job.is_paused() || frozen));
    if job.kind() == Kind::Mirror {
        out.insert("actively-synced".into(), json!(mirror.is_some_and(Mirror::actively_synced)));
    }
    more(job, &mut out);
    Value::Object(out)
}

/// What a failed job and a mirror show in either answer: error, rates, time to sync or the reason why not.
fn more(job: &Rc<Job>, out: &mut Map<String, Value>) {
    if job.state() == State::Concluded
        && let Some(e) = job.error()
    {
        out.insert("error".into(), json!(e.message()));
    }
    if let Some(report) = job.verified() {
        out.insert("verify".into(), verify(&report));
    }
    let Some(body) = job.body() else { return };
    if let Some(backup) = body.as_any().downcast_ref::<Backup>()
        && let Some(bytes) = backup.buffered()
    {
        out.insert("buffered".into(), json!(bytes));
    }
    let Some(mirror) = body.as_any().downcast_ref::<Mirror>() else { return };
    let outlook = mirror.outlook(job);
    out.insert("copy-rate".into(), json!(outlook.copy_rate));
    out.insert("dirty-rate".into(), json!(outlook.dirty_rate));
    out.insert("remaining".into(), json!(outlook.remaining));
    if let Some(time) = outlook.time_to_sync {
        out.insert("time-to-sync".into(), json!(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)));
    }
    if let Some(obstacle) = outlook.obstacle {
        out.insert("not-converging".into(), json!(obstacle.text()));
    }
}
