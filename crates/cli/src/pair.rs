//! Pairs of hosts that replicate, in words: role, health, lag.
//!
//! What must stay true: whoever reads a line knows what a failover would lose now, and whether this side stands alone.

use crate::Outcome;
use crate::watch::{number, text};
use indicatif::HumanBytes;
use qmpclient::Client;
use serde_json::{Value, json};
use std::time::Duration;

/// A pair that was given no name.
pub(crate) const NAMELESS: &str = "pair";

/// The group's facts, or nothing.
pub(crate) fn find(client: &mut Client, group: &str) -> Outcome<Option<Value>> {
    Ok(all(client)?.into_iter().find(|g| g["id"] == group))
}

/// All groups.
pub(crate) fn all(client: &mut Client) -> Outcome<Vec<Value>> {
    match client.execute("query-replication", &json!({}))? {
        Value::Array(groups) => Ok(groups),
        _ => Ok(Vec::new()),
    }
}

/// Peers of a primary.
pub(crate) fn peers(group: &Value) -> &[Value] {
    group["peers"].as_array().map_or(&[], Vec::as_slice)
}

/// Whether every secondary is a copy.
pub(crate) fn in_sync(group: &Value) -> bool {
    !peers(group).is_empty() && peers(group).iter().all(|p| p["state"] == "running")
}

/// `0.4 s`, `3 min`: for humans.
pub(crate) fn time(ms: u64) -> String {
    let d = Duration::from_millis(ms);
    match d.as_secs() {
        0 => format!("{ms} ms"),
        1..10 => format!("{}.{} s", d.as_secs(), d.subsec_millis() / 100),
        10..120 => format!("{} s", d.as_secs()),
        120..7200 => format!("{} min", d.as_secs() / 60),
        s => format!("{} h", s / 3600),
    }
}

/// Microseconds, as milliseconds and tenths.
pub(crate) fn tenths_of_ms(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

/// One line about the group, and one for each secondary.
pub(crate) fn lines(group: &Value) -> Vec<String> {
    let mut out = vec![format!("{:<16} {}", text(&group["id"]), summary(group))];
    out.extend(peers(group).iter().map(|p| format!("  to {:<24} {}", text(&p["addr"]), peer(p))));
    if let (false, Some(e)) = (healthy(group), group.get("last-error")) {
        out.push(format!("  last error: {}", text(e)));
    }
    out
}

fn healthy(group: &Value) -> bool {
    match group["role"].as_str() {
        Some("primary") => in_sync(group) && group["state"] == "running",
        Some("secondary") => matches!(group["state"].as_str(), Some("running" | "done")),
        _ => false,
    }
}

fn summary(group: &Value) -> String {
    let epoch = number(&group["committed-epoch"]);
    match group["role"].as_str() {
        Some("primary") => {
            let every = match number(&group["checkpoint-interval-ms"]) {
                0 => "checkpoints on command".to_owned(),
                ms => format!("a checkpoint every {}", time(ms)),
            };
            let state = match group["state"].as_str() {
                Some("fenced") => "FENCED: the other side has taken over; this one serves nobody".to_owned(),
                Some("connecting") => {
                    "ASKING the other side whether it has taken over; requests wait".to_owned()
                }
                Some("degraded") if peers(group).is_empty() => "no secondary was named".to_owned(),
                Some("degraded") => "ALONE: what is written now is on this side only".to_owned(),
                Some("suspended") => "STOPPED: writes wait for the secondary, or fail".to_owned(),
                _ if in_sync(group) => "in sync".to_owned(),
                _ => "not yet in sync".to_owned(),
            };
            format!("primary, {state}, checkpoint {epoch}, {every}")
        }
        Some("secondary") => {
            let (buffer, place) = (&group["buffer"], text(&group["listen"]));
            let full = number(&buffer["used"]) * 100 / number(&buffer["size"]).max(1);
            let state = match group["state"].as_str() {
                Some("running") => "following".to_owned(),
                Some("detached") => "WAITING for its primary".to_owned(),
                Some("failover") => "has taken over, still merging".to_owned(),
                Some("failover-failed") => {
                    "has taken over; the merge FAILED, `liveblk failover` tries it again".to_owned()
                }
                Some("done") => return format!("has taken over at checkpoint {epoch}, unprotected"),
                other => other.unwrap_or("unknown").to_owned(),
            };
            let age = match group.get("checkpoint-age-ms").and_then(Value::as_u64) {
                Some(ms) => format!("checkpoint {epoch} ({} old)", time(ms)),
                None if epoch > 0 => format!("checkpoint {epoch}"),
                None => "nothing received yet".to_owned(),
            };
            format!("secondary, {state}, {age}, buffer {full} % full, at {place}")
        }
        _ => "set up, replicates nothing".to_owned(),
    }
}

fn peer(p: &Value) -> String {
    let mut parts = vec![text(&p["state"])];
    match (number(&p["rpo-bytes"]), number(&p["rpo-ms"])) {
        _ if number(&p["committed-epoch"]) == 0 && p["state"] != "running" => {}
        (0, _) => parts.push("nothing to lose".to_owned()),
        (bytes, ms) => parts.push(format!("a failover now would lose {} of {}", HumanBytes(bytes), time(ms))),
    }
    if let Some(us) = p.get("last-rtt-us").and_then(Value::as_u64) {
        parts.push(format!("{} away", tenths_of_ms(us)));
    }
    parts.push(format!("its buffer {} % full", number(&p["buffer-fill"])));
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_says_what_would_be_lost_and_whether_it_stands_alone() {
        let peer = json!({"name": "b", "addr": "b:7000", "state": "running", "rpo-bytes": 2048, "rpo-ms": 400,
            "last-rtt-us": 350, "buffer-fill": 3});
        let mut g = json!({"id": "pair", "role": "primary", "state": "running", "committed-epoch": 7,
            "checkpoint-interval-ms": 1000, "peers": [peer], "last-error": "old"});
        let lines_of = |g: &Value| lines(g).join("\n");
        assert!(
            lines_of(&g).contains("primary, in sync, checkpoint 7, a checkpoint every 1.0 s\n"),
            "{}",
            lines_of(&g)
        );
        assert!(
            lines_of(&g).ends_with(
                "running, a failover now would lose 2.00 KiB of 400 ms, 0.3 ms away, its buffer 3 % full"
            ),
            "{}",
            lines_of(&g)
        );
        g["state"] = json!("degraded");
        assert!(
            lines_of(&g).contains("ALONE") && lines_of(&g).ends_with("last error: old"),
            "{}",
            lines_of(&g)
        );
    }

    #[test]
    fn times_are_for_humans() {
        assert_eq!(
            [450, 9_999, 59_000, 180_000, 9_000_000].map(time),
            ["450 ms", "9.9 s", "59 s", "3 min", "2 h"]
        );
    }
}
