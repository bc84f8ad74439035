//! Progress of jobs, live: phase, bytes, rates, and whether and why a job will not get ready.

use crate::{Outcome, SocketArgs};
use clap::Args;
use indicatif::{HumanBytes, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};
use qmpclient::Client;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// How often figures are asked for.
const EVERY: Duration = Duration::from_millis(250);

#[derive(Args)]
pub(crate) struct WatchArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// Only this job
    job: Option<String>,
    /// End as soon as the job is ready (mirror, active commit)
    #[arg(long)]
    until_ready: bool,
}

pub(crate) fn run(args: &WatchArgs) -> Outcome {
    let mut client = Client::connect(&args.socket.socket)?;
    let mut view = View::new();
    let mut seen = false;
    loop {
        let jobs = jobs(&mut client)?;
        let shown: Vec<&Value> =
            jobs.iter().filter(|j| args.job.as_deref().is_none_or(|id| j["id"] == id)).collect();
        if shown.is_empty() {
            if let (false, Some(id)) = (seen, &args.job) {
                return Err(format!("there is no job {id}\n  `liveblk status` lists the jobs"));
            }
            if !seen {
                println!("no jobs");
            }
            view.finish();
            return Ok(());
        }
        seen = true;
        view.update(&shown);
        if args.until_ready && shown.iter().all(|j| j["status"] == "ready") {
            view.finish();
            return Ok(());
        }
        if shown.iter().all(|j| j["status"] == "concluded") {
            view.finish();
            return match shown.iter().find(|j| j.get("error").is_some()) {
                Some(failed) => {
                    Err(format!("job {} failed: {}", text(&failed["id"]), text(&failed["error"])))
                }
                None => Ok(()),
            };
        }
        wait(&mut client)?;
    }
}

/// Sleeps for a moment, emptying the event queue meanwhile.
pub(crate) fn wait(client: &mut Client) -> Outcome {
    client.event(EVERY).map(drop)
}

/// The jobs, with the facts of `query-block-jobs` (rates and the like) joined to those of `query-jobs`.
pub(crate) fn jobs(client: &mut Client) -> Outcome<Vec<Value>> {
    let Value::Array(mut jobs) = client.execute("query-jobs", &json!({}))? else { return Ok(Vec::new()) };
    let Value::Array(block_jobs) = client.execute("query-block-jobs", &json!({}))? else { return Ok(jobs) };
    for job in &mut jobs {
        let facts = block_jobs.iter().find(|b| b["device"] == job["id"]).and_then(Value::as_object);
        if let (Some(facts), Some(job)) = (facts, job.as_object_mut()) {
            for (k, v) in facts {
                job.entry(k.as_str()).or_insert_with(|| v.clone());
            }
        }
    }
    Ok(jobs)
}

/// Progress bars, one a job; without a terminal a line when a job's phase changes, and one a second.
pub(crate) struct View {
    all: MultiProgress,
    bars: BTreeMap<String, ProgressBar>,
    plain: bool,
    told: BTreeMap<String, (String, Instant)>,
}

impl View {
    pub(crate) fn new() -> View {
        let plain = !std::io::stderr().is_terminal();
        View { all: MultiProgress::new(), bars: BTreeMap::new(), plain, told: BTreeMap::new() }
    }

    fn tell(&mut self, job: &Value) {
        let (id, phase, now) = (text(&job["id"]), phase(job).to_owned(), Instant::now());
        let due = match self.told.get(&id) {
            Some((before, when)) => *before != phase || now.duration_since(*when) >= Duration::from_secs(1),
            None => true,
        };
        if due {
            println!("{id:>12} {}", facts(job));
            self.told.insert(id, (phase, now));
        }
    }

    pub(crate) fn update(&mut self, jobs: &[&Value]) {
        for job in jobs {
            if self.plain {
                self.tell(job);
                continue;
            }
            let id = text(&job["id"]);
            let bar = self.bars.entry(id.clone()).or_insert_with(|| {
                let style = ProgressStyle::with_template("{prefix:>12} [{bar:32}] {percent:>3}% {msg}")
                    .unwrap_or_else(|_| ProgressStyle::default_bar())
                    .progress_chars("=> ");
                self.all.add(ProgressBar::new(0).with_style(style).with_prefix(id))
            });
            let (at, total) = (number(&job["current-progress"]), number(&job["total-progress"]));
            bar.set_length(total.max(1));
            bar.set_position(if total == 0 { 1 } else { at });
            bar.set_message(facts(job));
        }
        let gone: Vec<String> =
            self.bars.keys().filter(|id| !jobs.iter().any(|j| j["id"] == id.as_str())).cloned().collect();
        for id in gone {
            if let Some(bar) = self.bars.remove(&id) {
                bar.finish_with_message("ended");
            }
        }
    }

    pub(crate) fn finish(&mut self) {
        for bar in self.bars.values() {
            bar.abandon();
        }
    }
}

/// `running, 3.1 MiB of 8 MiB, copying 210 MiB/s, dirtied 40 MiB/s, in sync in 2 seconds`.
pub(crate) fn facts(job: &Value) -> String {
    let mut parts = vec![phase(job).to_owned()];
    parts.push(format!(
        "{} of {}",
        HumanBytes(number(&job["current-progress"])),
        HumanBytes(number(&job["total-progress"]))
    ));
    let rate = |name: &str| job.get(name).and_then(Value::as_u64);
    if let Some(r) = rate("copy-rate") {
        parts.push(format!("copying {}/s", HumanBytes(r)));
    }
    if let Some(r) = rate("dirty-rate").filter(|r| *r > 0) {
        parts.push(format!("dirtied {}/s", HumanBytes(r)));
    }
    if let Some(ms) = rate("time-to-sync").filter(|_| job["status"] == "running") {
        parts.push(format!("in sync in {}", HumanDuration(Duration::from_millis(ms))));
    }
    if let Some(why) = job.get("not-converging").and_then(Value::as_str) {
        parts.push(format!("will not get ready: {why}"));
    }
    if let Some(loss) = job.get("link-loss") {
        parts.push(outage(loss));
    }
    if let Some(n) = rate("link-losses").filter(|n| *n > 0 && job.get("link-loss").is_none()) {
        parts.push(format!("link lost {n} times so far"));
    }
    if let Some(e) = job.get("error").and_then(Value::as_str) {
        parts.push(e.to_owned());
    }
    parts.join(", ")
}

/// `waiting for the target since 12 seconds, next try in 5 seconds, gives up in 9 minutes: Connection to NBD server lost`.
fn outage(loss: &Value) -> String {
    let (side, reason) = (text(&loss["side"]), text(&loss["reason"]));
    if loss["waiting"] != true {
        return format!("the {side} did not come back, resume when it is there: {reason}");
    }
    let time = |name: &str| {
        loss.get(name).and_then(Value::as_u64).map(|ms| HumanDuration(Duration::from_millis(ms)))
    };
    let mut line = format!("waiting for the {side}");
    if let Some(down) = time("down-ms") {
        line += &format!(" since {down}");
    }
    line += &match time("next-try-ms") {
        Some(next) => format!(", next try in {next}"),
        None => ", trying now".to_owned(),
    };
    if let Some(end) = time("gives-up-ms") {
        line += &format!(", gives up in {end}");
    }
    format!("{line}: {reason}")
}

fn phase(job: &Value) -> &str {
    if job["link-loss"]["waiting"] == true {
        return "parked";
    }
    if job["actively-synced"] == true {
        return "in sync, every write goes to both";
    }
    match job["status"].as_str() {
        Some("paused" | "standby") if job["io-status"] == "nospace" => "stopped: target is full",
        Some("paused" | "standby") if job["io-status"] == "failed" => "stopped by an error",
        Some(s) => s,
        None => "unknown",
    }
}

pub(crate) fn text(v: &Value) -> String {
    v.as_str().map_or_else(|| v.to_string(), str::to_owned)
}

pub(crate) fn number(v: &Value) -> u64 {
    v.as_u64().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jobs_line_names_phase_rates_and_reason() {
        let job = json!({"id": "m", "status": "running", "current-progress": 1024, "total-progress": 4096,
            "copy-rate": 2048, "dirty-rate": 4096, "not-converging": "dirty rate is above copy rate"});
        let line = facts(&job);
        assert_eq!(
            line,
            "running, 1.00 KiB of 4.00 KiB, copying 2.00 KiB/s, dirtied 4.00 KiB/s, will not get ready: dirty rate is above copy rate"
        );
        let parked = json!({"status": "ready", "actively-synced": false, "link-losses": 2, "link-loss":
            {"side": "target", "waiting": true, "reason": "gone", "down-ms": 12_000, "next-try-ms": 5000, "gives-up-ms": 540_000}});
        assert_eq!(
            facts(&parked),
            "parked, 0 B of 0 B, waiting for the target since 12 seconds, next try in 5 seconds, gives up in 9 minutes: gone"
        );
        let stopped = json!({"status": "paused", "io-status": "nospace"});
        assert!(facts(&stopped).starts_with("stopped: target is full"));
    }
}
