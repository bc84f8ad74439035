//! Jobs on a chain in use, steered at random, with requests that fail at random: whatever happens, the disk shows what its client
//! wrote, the images are sound, and nothing is left of the job.
//!
//! LIVEBLK_SEED sets the first seed, LIVEBLK_ROUNDS how many there are (`cargo xtask interleave` runs 1,000), LIVEBLK_JOB one of
//! [`KINDS`] if not all are to be played.

use super::{images, served};
use crate::common::{Client, Daemon, Dir};
use crate::disk::tool;
use crate::mirrors::{DISK, Writer, seed};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Rounds in the ordinary tests.
const ROUNDS: u64 = 6;
/// The jobs.
const KINDS: [&str; 5] = ["commit", "active", "stream", "mirror", "backup"];
/// A job that has not ended by then hangs.
const LIMIT: Duration = Duration::from_secs(30);

struct Rng(u64);

impl Rng {
    /// Neighbouring seeds shall have nothing in common (the finalizer of SplitMix64).
    fn new(seed: u64) -> Rng {
        let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Rng(z ^ (z >> 31))
    }
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize].clone()
    }
}

/// `file` with one or two writes to it that fail, somewhere in the eight clusters of 64 KiB from `from` on. Only writes: what
/// cannot be read the client could not read either.
fn faulty(rng: &mut Rng, mut file: Value, from: u64) -> Value {
    let rule = |rng: &mut Rng| {
        let sector = (from + 65536 * rng.below(8)) / 512;
        let errno = rng.pick(&[5, 28]);
        json!({"event": "none", "iotype": "write", "sector": sector, "errno": errno, "once": true})
    };
    let rules: Vec<Value> = (0..=rng.below(2)).map(|_| rule(rng)).collect();
    file["read-only"] = json!(false);
    json!({"driver": "blkdebug", "image": file, "inject-error": rules, "read-only": false})
}

/// The chain as nodes `n0` to `n3`, served; with `faults` a request here and there fails.
fn serve(dir: &Dir, rng: &mut Rng, faults: bool) -> (Daemon, Client) {
    let mut nodes = Vec::new();
    for i in 0..4 {
        let backing = if i > 0 { json!(format!("n{}", i - 1)) } else { Value::Null };
        let mut file = json!({"driver": "file", "filename": format!("{i}.qcow2"), "auto-read-only": true,
            "discard": "unmap"});
        if i < 3 && faults && rng.below(2) == 0 {
            file = faulty(rng, file, 0x15_0000);
        }
        let mut node = json!({"driver": "qcow2", "node-name": format!("n{i}"), "backing": backing, "file": file,
            "discard": "unmap", "read-only": i < 3});
        node["auto-read-only"] = json!(true);
        nodes.push(node);
    }
    served(dir, &nodes)
}

/// What is played in a round.
struct Play {
    kind: &'static str,
    command: &'static str,
    arguments: Value,
    /// Whether requests fail.
    faults: bool,
}

impl Play {
    /// A job that suits the kind.
    fn new(rng: &mut Rng, kind: &'static str) -> Play {
        // into what becomes the client's own disk, a fault would in the end be the client's
        let mut faults = kind != "active";
        let (command, mut arguments) = match kind {
            "commit" => {
                let top = rng.pick(&["n2", "n1"]);
                ("block-commit", json!({"device": "n3", "top-node": top, "base-node": "n0"}))
            }
            "active" => (
                "block-commit",
                json!({"device": "n3", "base-node": rng.pick(&["n0", "n1", "n2"]),
                    "copy-mode": rng.pick(&["background", "write-blocking"])}),
            ),
            "stream" if rng.below(2) == 0 => ("block-stream", json!({"device": "n3"})),
            "stream" => ("block-stream", json!({"device": rng.pick(&["n3", "n2"]), "base-node": "n0"})),
            "mirror" => {
                faults = rng.below(2) == 0;
                let mode = rng.pick(&["background", "write-blocking", "read-write-blocking"]);
                let sync = rng.pick(&["full", "top"]);
                ("blockdev-mirror", json!({"device": "n3", "target": "t", "sync": sync, "copy-mode": mode}))
            }
            _ => {
                faults = rng.below(2) == 0;
                let sync = rng.pick(&["full", "top"]);
                // a fault shall be the job's, not the client's
                let given_up =
                    json!({"device": "n3", "target": "t", "sync": sync, "on-cbw-error": "break-snapshot"});
                ("blockdev-backup", given_up)
            }
        };
        arguments["job-id"] = json!("j");
        arguments["auto-dismiss"] = json!(false);
        arguments["auto-finalize"] = json!(rng.below(2) == 0);
        arguments["speed"] = json!(rng.pick(&[0, 1 << 20, 4 << 20]));
        let policy = json!(rng.pick(&["report", "stop", "ignore", "enospc"]));
        if arguments.get("target").is_some() {
            arguments["on-target-error"] = policy;
        } else {
            arguments["on-error"] = policy;
        }
        Play { kind, command, arguments, faults }
    }

    /// Creates and opens the target, if there is to be one.
    fn open_target(&self, dir: &Dir, rng: &mut Rng, c: &mut Client) {
        let Some(sync) = self.arguments.get("sync") else { return };
        let below = if sync == "top" { "|-b|2.qcow2|-F|qcow2" } else { "" };
        let cluster = rng.pick(&["4k", "64k"]);
        tool(dir, &format!("qemu-img|create|-q|-f|qcow2|-o|cluster_size={cluster}{below}|t.qcow2|8M"));
        let mut file = json!({"driver": "file", "filename": "t.qcow2", "discard": "unmap"});
        if self.faults {
            let from = 65536 * rng.below(32);
            file = faulty(rng, file, from);
        }
        let backing = if sync == "top" { json!("n2") } else { Value::Null };
        let node = json!({"driver": "qcow2", "node-name": "t", "backing": backing, "file": file, "discard": "unmap"});
        c.command("blockdev-add", node).unwrap();
    }

    /// Whether the client may be moved to where the job has copied.
    fn may_complete(&self) -> bool {
        self.kind != "mirror" || !self.faults
    }

    /// Steers the job for a while, then to its end; whether it succeeded.
    fn steer(&self, c: &mut Client, rng: &mut Rng) -> bool {
        for _ in 0..rng.below(12) {
            let id = json!({"id": "j"});
            let device = json!({"device": "j"});
            // any of these may come too late or too early: that is an answer, too
            let _ = match rng.below(10) {
                0 | 1 => c.command("job-pause", id),
                2 | 3 => c.command("job-resume", id),
                4 => c.command(
                    "block-job-set-speed",
                    json!({"device": "j", "speed": rng.pick(&[0, 1 << 20, 64 << 20])}),
                ),
                5 if self.may_complete() => c.command("job-complete", id),
                6 if rng.below(3) == 0 => {
                    c.command("block-job-cancel", json!({"device": "j", "force": rng.below(2) == 0}))
                }
                7 => c.command("job-finalize", id),
                8 => {
                    let mode = rng.pick(&["background", "write-blocking"]);
                    c.command("block-job-change", json!({"id": "j", "type": "mirror", "copy-mode": mode}))
                }
                _ => c.command("block-job-resume", device),
            };
            std::thread::sleep(Duration::from_millis(rng.below(8)));
        }
        let begun = Instant::now();
        let give_up = rng.below(4) == 0 || !self.may_complete();
        loop {
            assert!(begun.elapsed() < LIMIT, "{}", c.command("query-block-jobs", json!({})).unwrap());
            let Some(status) = status(c) else { return false };
            let _ = match status.as_str() {
                "concluded" => break,
                "paused" | "standby" => c.command("job-resume", json!({"id": "j"})),
                "ready" if give_up => c.command("block-job-cancel", json!({"device": "j"})),
                "ready" => c.command("job-complete", json!({"id": "j"})),
                "pending" if give_up => c.command("job-cancel", json!({"id": "j"})),
                "pending" => c.command("job-finalize", json!({"id": "j"})),
                _ => c.command("block-job-set-speed", json!({"device": "j", "speed": 0})),
            };
            std::thread::sleep(Duration::from_millis(2));
        }
        let jobs = c.command("query-jobs", json!({})).unwrap();
        c.command("job-dismiss", json!({"id": "j"})).unwrap();
        jobs[0].get("error").is_none()
    }
}

fn status(c: &mut Client) -> Option<String> {
    let jobs = c.command("query-jobs", json!({})).unwrap();
    Some(jobs.get(0)?["status"].as_str()?.to_owned())
}

/// Nothing is left of the job: no filter, and no image open for writing but the one that the client uses.
fn nothing_left(c: &mut Client, active: &str) {
    let graph = c.command("x-debug-query-block-graph", json!({})).unwrap();
    let nodes = graph["nodes"].as_array().unwrap();
    let edges = graph["edges"].as_array().unwrap();
    for n in nodes {
        let name = n["name"].as_str().unwrap_or_default();
        assert!(n["type"] != "block-job", "{graph}");
        if ["n0", "n1", "n2"].contains(&name) && name != active {
            let file = edges.iter().find(|e| e["parent"] == n["id"] && e["name"] == "file").unwrap();
            assert!(!file["perm"].as_array().unwrap().contains(&json!("write")), "{name}: {graph}");
        }
    }
    for n in c.command("query-named-block-nodes", json!({"flat": true})).unwrap().as_array().unwrap() {
        let filters = ["commit_top", "mirror_top", "copy-on-read", "copy-before-write"];
        assert!(!filters.contains(&n["drv"].as_str().unwrap()), "{n}");
    }
}

fn round(seed: u64, kinds: &[&'static str], pristine: &Dir) {
    println!("LIVEBLK_SEED={seed}");
    let (dir, mut rng) = (Dir::new(), Rng::new(seed));
    for f in ["0.qcow2", "1.qcow2", "2.qcow2", "3.qcow2", "model.raw"] {
        std::fs::copy(pristine.0.join(f), dir.0.join(f)).unwrap();
    }
    let kind = rng.pick(kinds);
    let play = Play::new(&mut rng, kind);
    let (mut daemon, mut c) = serve(&dir, &mut rng, play.faults && play.arguments.get("target").is_none());
    play.open_target(&dir, &mut rng, &mut c);
    println!("{} {} faults: {}", play.command, play.arguments, play.faults);
    // a backup is of the instant when it starts, and what the disk contained then is known if nobody has written yet
    let start = || Writer::start(&dir, DISK, &["4", "600"]);
    let early = (kind != "backup").then(start);
    c.command(play.command, play.arguments.clone()).unwrap();
    let writer = early.unwrap_or_else(start);
    let succeeded = play.steer(&mut c, &mut rng);
    let active =
        c.command("query-block-exports", json!({})).unwrap()[0]["node-name"].as_str().unwrap().to_owned();
    nothing_left(&mut c, &active);
    writer.stop();
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
    let file = format!("{}.qcow2", active.trim_start_matches('n'));
    tool(&dir, &format!("qemu-img|compare|-f|raw|-F|qcow2|model.raw|{file}"));
    if kind == "backup" && succeeded {
        let then = pristine.path("model.raw");
        tool(&dir, &format!("qemu-img|compare|-f|raw|-F|qcow2|{then}|t.qcow2"));
    }
    (0..4).for_each(|n| drop(tool(&dir, &format!("qemu-img|check|-q|{n}.qcow2"))));
    if play.arguments.get("target").is_some() {
        // a fault that nobody has met is met when the target is closed: then space may be lost, but no more than that
        let most = if play.faults { 3 } else { 0 };
        tool(&dir, &format!("sh|-c|qemu-img check -q t.qcow2; c=$?; test $c = 0 -o $c = {most}"));
    }
}

#[test]
fn at_random() {
    let first: u64 = seed().parse().unwrap();
    let rounds = std::env::var("LIVEBLK_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(ROUNDS);
    let kinds: Vec<&str> = match std::env::var("LIVEBLK_JOB") {
        Ok(kind) => vec![*KINDS.iter().find(|k| **k == kind).expect("LIVEBLK_JOB: one of KINDS")],
        Err(_) => KINDS.to_vec(),
    };
    let pristine = Dir::new();
    images(&pristine, 4);
    for i in 0..rounds {
        round(first.wrapping_add(i), &kinds, &pristine);
    }
}
