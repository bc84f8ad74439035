//! Jobs as QMP shows them: events, `JobInfo`, `BlockJobInfo`.

use crate::events::Events;
use crate::record::Which;
use copy::{Action, Coverage, Report, Side};
use jobs::backup::Backup;
use jobs::mirror::Mirror;
use jobs::{Event, Finished, IoStatus, Job, Kind, Progress, Sink, State};
use qapi::{Map, Value, json};
use std::rc::Rc;
use std::time::Duration;

/// Turns what jobs tell into QMP events.
pub(crate) struct JobEvents(pub(crate) Rc<Events>);

impl Sink for JobEvents {
    fn event(&self, event: Event) {
        if let Some((name, data)) = as_qmp(event) {
            self.0.emit(name, data);
        }
    }

    fn finished(&self, job: Finished) {
        self.0.record().add(Which::Jobs, finished(job));
    }
}

/// One element of `query-job-log`, without its number.
fn finished(job: Finished) -> Value {
    let date = |at: Duration| json!({"seconds": at.as_secs(), "microseconds": at.subsec_micros()});
    let nodes: Vec<Value> =
        job.figures.nodes.iter().map(|(role, name)| json!({"role": role, "node-name": name})).collect();
    let mut out = Map::new();
    out.insert("id".into(), json!(job.id));
    out.insert("type".into(), json!(job.kind.name()));
    out.insert("outcome".into(), json!(job.outcome.name()));
    out.extend(job.error.map(|e| ("error".to_owned(), json!(e))));
    out.extend(job.resumed.map(|how| ("resumed".to_owned(), json!(how))));
    out.insert("began".into(), date(job.began));
    out.insert("ended".into(), date(job.ended));
    out.insert("duration-ms".into(), json!(millis(job.took)));
    out.insert("nodes".into(), json!(nodes));
    out.insert("len".into(), json!(job.progress.total));
    out.insert("offset".into(), json!(job.progress.current));
    let mut number = |name: &str, n: Option<u64>| out.extend(n.map(|n| (name.to_owned(), json!(n))));
    number("copied", job.figures.copied);
    number("dirtied", job.figures.dirtied);
    let seconds = job.took.as_secs_f64();
    let rate = job.figures.copied.filter(|_| seconds > 0.0).map(|c| (c as f64 / seconds) as u64);
    number("copy-rate", rate);
    number("link-losses", job.link_losses);
    number("copied-again", job.figures.copied_again.filter(|_| job.link_losses.is_some()));
    out.extend(job.verified.map(|report| ("verify".to_owned(), verify(&report))));
    Value::Object(out)
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
        Event::LinkLost { id, side, reason, wait, then } => {
            let data = json!({"device": id, "side": side.name(), "reason": reason, "wait": wait.as_secs(), "then": action_name(then)});
            ("BLOCK_JOB_LINK_LOST", data)
        }
        Event::LinkBack { id, side, down, again } => {
            let data =
                json!({"device": id, "side": side.name(), "down-ms": millis(down), "copied-again": again});
            ("BLOCK_JOB_LINK_RESTORED", data)
        }
        Event::Error { id, side, action } => {
            let operation = match side {
                Side::Source => "read",
                Side::Target => "write",
            };
            let data = json!({"device": id, "operation": operation, "action": action_name(action)});
            ("BLOCK_JOB_ERROR", data)
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

fn action_name(action: Action) -> &'static str {
    match action {
        Action::Ignore => "ignore",
        Action::Report => "report",
        Action::Stop => "stop",
    }
}

/// As QMP tells times.
pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// One element of `query-jobs`.
pub(crate) fn job(job: &Rc<Job>, now: Duration) -> Value {
    let progress = job.progress();
    let mut out = Map::new();
    out.insert("current-progress".into(), json!(progress.current));
    out.insert("status".into(), json!(job.state().name()));
    out.insert("total-progress".into(), json!(progress.total));
    out.insert("type".into(), json!(job.kind().name()));
    out.insert("id".into(), json!(job.id()));
    more(job, now, &mut out);
    Value::Object(out)
}

/// One element of `query-block-jobs`.
pub(crate) fn block_job(job: &Rc<Job>, now: Duration) -> Value {
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
    let body = job.body();
    let mirror = body.as_ref().and_then(|b| b.as_any().downcast_ref::<Mirror>());
    // from completion to finalize the client is held, which clients know as a pause
    let frozen = mirror.is_some_and(Mirror::is_frozen);
    out.insert("paused".into(), json!(job.is_paused() || frozen));
    out.insert("speed".into(), json!(job.speed()));
    out.insert("ready".into(), json!(matches!(job.state(), State::Ready | State::Standby)));
    out.insert("type".into(), json!(job.kind().name()));
    if job.kind() == Kind::Mirror {
        out.insert("actively-synced".into(), json!(mirror.is_some_and(Mirror::actively_synced)));
    }
    more(job, now, &mut out);
    Value::Object(out)
}

/// The link that a job waits for, or waited for in vain.
fn link_loss(job: &Job, now: Duration) -> Option<Value> {
    if let Some((side, why)) = job.given_up() {
        return Some(json!({"side": side.name(), "reason": why.message(), "waiting": false}));
    }
    let outage = job.outage()?;
    let mut data = json!({
        "side": outage.side.name(),
        "reason": outage.why.message(),
        "waiting": true,
        "down-ms": millis(now.saturating_sub(outage.since)),
        "gives-up-ms": millis(outage.until.saturating_sub(now)),
    });
    if let Some(next) = outage.next_try {
        data["next-try-ms"] = json!(millis(next.saturating_sub(now)));
    }
    Some(data)
}

/// What a failed job and a mirror show in either answer: error, rates, time to sync or the reason why not.
fn more(job: &Rc<Job>, now: Duration, out: &mut Map<String, Value>) {
    if job.state() == State::Concluded
        && let Some(e) = job.error()
    {
        out.insert("error".into(), json!(e.message()));
    }
    if let Some(report) = job.verified() {
        out.insert("verify".into(), verify(&report));
    }
    if let Some(outages) = job.outages() {
        out.insert("link-losses".into(), json!(outages));
    }
    out.extend(link_loss(job, now).map(|l| ("link-loss".to_owned(), l)));
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
        out.insert("time-to-sync".into(), json!(millis(time)));
    }
    if let Some(obstacle) = outlook.obstacle {
        out.insert("not-converging".into(), json!(obstacle.text()));
    }
}
