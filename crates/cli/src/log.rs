//! What has happened on a daemon: jobs that are over, and events, also those that nobody was there to see.

use crate::watch::{number, text};
use crate::{Outcome, SocketArgs};
use clap::Args;
use indicatif::{HumanBytes, HumanDuration};
use qmpclient::Client;
use serde_json::{Value, json};
use std::time::Duration;

/// How often a followed record is asked for.
const EVERY: Duration = Duration::from_millis(500);

#[derive(Args)]
pub(crate) struct LogArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// Events instead of finished jobs
    #[arg(long)]
    events: bool,
    /// Only what came after this number
    #[arg(long, value_name = "NUMBER")]
    since: Option<u64>,
    /// Go on showing what comes, until interrupted
    #[arg(long)]
    follow: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &LogArgs) -> Outcome {
    let mut client = Client::connect(&args.socket.socket)?;
    let (command, list) = if args.events { ("query-events", "events") } else { ("query-job-log", "jobs") };
    let mut since = args.since;
    loop {
        let arguments = since.map_or(json!({}), |n| json!({"since": n}));
        let answer = client.execute(command, &arguments)?;
        let missed = number(&answer["missed"]);
        if missed > 0 {
            eprintln!("liveblk: {missed} older entries are no longer kept");
        }
        let entries = answer[list].as_array().cloned().unwrap_or_default();
        for e in &entries {
            let line = match (args.json, args.events) {
                (true, _) => e.to_string(),
                (false, true) => event(e),
                (false, false) => job(e),
            };
            println!("{line}");
            since = Some(number(&e["seq"]));
        }
        if since.is_none_or(|n| n >= number(&answer["newest"])) {
            if !args.follow {
                return Ok(());
            }
            client.event(EVERY).map(drop)?;
            since = since.or(Some(number(&answer["newest"])));
        }
    }
}

/// `12 2026-11-21 18:03:11 BLOCK_JOB_READY {…}`.
fn event(e: &Value) -> String {
    let data = e.get("data").map(|d| format!(" {d}")).unwrap_or_default();
    format!("{:>6} {} {}{data}", number(&e["seq"]), date(&e["timestamp"]), text(&e["event"]))
}

/// `3 2026-11-21 18:03:11 m mirror completed in 4 seconds, 8 GiB copied at 2 GiB/s, source to target`.
fn job(j: &Value) -> String {
    let took = HumanDuration(Duration::from_millis(number(&j["duration-ms"])));
    let mut parts = vec![format!("{} in {took}", text(&j["outcome"]))];
    if let Some(bytes) = j.get("copied").and_then(Value::as_u64) {
        parts.push(format!("{} copied at {}/s", HumanBytes(bytes), HumanBytes(number(&j["copy-rate"]))));
    }
    if number(&j["link-losses"]) > 0 {
        let again = HumanBytes(number(&j["copied-again"]));
        parts.push(format!("link lost {} times, {again} copied again", number(&j["link-losses"])));
    }
    if let Some(digest) = j["verify"].get("digest").and_then(Value::as_str) {
        parts.push(format!("proven equal, digest {digest}"));
    }
    let nodes = j["nodes"].as_array().into_iter().flatten();
    let nodes: Vec<String> =
        nodes.map(|n| format!("{} {}", text(&n["role"]), text(&n["node-name"]))).collect();
    if !nodes.is_empty() {
        parts.push(nodes.join(", "));
    }
    if let Some(e) = j.get("error").and_then(Value::as_str) {
        parts.push(e.to_owned());
    }
    let (seq, ended, id) = (number(&j["seq"]), date(&j["ended"]), text(&j["id"]));
    format!("{seq:>6} {ended} {id} {} {}", text(&j["type"]), parts.join(", "))
}

/// UTC, to the second (Howard Hinnant's civil-from-days).
fn date(t: &Value) -> String {
    let seconds = number(&t["seconds"]);
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_name_what_matters() {
        assert_eq!(date(&json!({"seconds": 951_782_400})), "2000-02-29 00:00:00");
        assert_eq!(date(&json!({"seconds": 1_795_284_191})), "2026-11-21 18:03:11");
        let j = json!({"seq": 3, "id": "m", "type": "mirror", "outcome": "failed", "error": "no", "duration-ms": 4000,
            "ended": {"seconds": 0}, "copied": 1024, "copy-rate": 256, "link-losses": 2, "copied-again": 512,
            "nodes": [{"role": "source", "node-name": "a"}]});
        assert_eq!(
            job(&j),
            "     3 1970-01-01 00:00:00 m mirror failed in 4 seconds, 1.00 KiB copied at 256 B/s, link lost 2 times, 512 B copied again, source a, no"
        );
    }
}
