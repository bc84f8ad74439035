//! How a mirror ends other than by completion, and what a client sees of the phases between.

use super::{DISK, MODES, SIZE, Writer, compare, job, mirror, pause, raw_pair, verb};
use crate::common::Dir;
use crate::disk::{tool, until};
use serde_json::json;
use std::process::{Command, Stdio};

const BLOCK: usize = 4096;

/// A client writes numbered blocks one after another; the target of a soft cancel holds all numbers up to one, and none
/// after it.
#[test]
fn a_soft_cancel_leaves_one_instant() {
    for mode in MODES {
        let dir = Dir::new();
        let (mut daemon, mut c) = raw_pair(&dir);
        mirror(&mut c, &json!({"copy-mode": mode})).unwrap();
        until(&mut c, "m", "BLOCK_JOB_READY");
        let writer = Writer::start(&dir, DISK, &["1", "0", "sequence"]);
        pause(300);
        verb(&mut c, "block-job-cancel", "device").unwrap();
        until(&mut c, "m", "BLOCK_JOB_COMPLETED");
        until(&mut c, "m", "null");
        let exports = c.command("query-block-exports", json!({})).unwrap();
        assert_eq!(exports[0]["node-name"], "src");
        pause(100); // the client goes on with the source
        let original = std::fs::read(dir.path("model.raw")).unwrap();
        let total = writer.stop()["ops"].as_u64().unwrap();
        let target = std::fs::read(dir.path("dst.raw")).unwrap();
        let number = |i: usize| u64::from_le_bytes(target[i * BLOCK..i * BLOCK + 8].try_into().unwrap());
        let blocks = SIZE / BLOCK;
        let written =
            |i: usize| (number(i) <= total && number(i) % blocks as u64 == i as u64).then(|| number(i));
        let last = (0..blocks).filter_map(written).max().unwrap();
        assert!(last > 0 && last < total, "{mode}: the instant {last} of {total} is no test");
        for i in 0..blocks {
            let (n, count) = (i as u64, blocks as u64);
            // the newest number up to `last` that belongs to block i
            let newest = if last >= n { Some(n + (last - n) / count * count) } else { None };
            let want = match newest {
                Some(k) if k > 0 => k.to_le_bytes().repeat(BLOCK / 8),
                _ => original[i * BLOCK..(i + 1) * BLOCK].to_vec(),
            };
            assert!(target[i * BLOCK..(i + 1) * BLOCK] == want, "{mode}: block {i} is not of instant {last}");
        }
        compare(&dir, &mut daemon, &mut c, "raw", "src.raw");
    }
}

/// Forced, and by `job-cancel`, in every state that takes it: the client stays on the source and sees nothing.
#[test]
fn a_hard_cancel_in_every_state() {
    for state in ["running", "paused", "ready", "standby", "pending"] {
        let dir = Dir::new();
        let (mut daemon, mut c) = raw_pair(&dir);
        let writer = Writer::start(&dir, DISK, &["4", "500"]);
        let slow = matches!(state, "running" | "paused");
        let speed = if slow { 256 << 10 } else { 0 };
        mirror(&mut c, &json!({"speed": speed, "buf-size": 65536, "auto-finalize": false})).unwrap();
        until(&mut c, "m", if slow { "running" } else { "BLOCK_JOB_READY" });
        match state {
            "paused" | "standby" => {
                verb(&mut c, "job-pause", "id").unwrap();
                until(&mut c, "m", state);
                let refused = verb(&mut c, "block-job-cancel", "device").unwrap_err();
                assert_eq!(refused, "The block job for device 'm' is currently paused");
            }
            "pending" => {
                verb(&mut c, "job-complete", "id").unwrap();
                until(&mut c, "m", "BLOCK_JOB_PENDING");
            }
            _ => {}
        }
        assert_eq!(job(&mut c)["status"], state);
        if state == "ready" {
            verb(&mut c, "job-cancel", "id").unwrap();
        } else {
            c.command("block-job-cancel", json!({"device": "m", "force": true})).unwrap();
        }
        until(&mut c, "m", "BLOCK_JOB_CANCELLED");
        until(&mut c, "m", "null");
        pause(50);
        writer.stop();
        let nodes = c.command("query-named-block-nodes", json!({})).unwrap();
        assert!(!nodes.to_string().contains("mirror_top"), "{state}: the filter stays");
        compare(&dir, &mut daemon, &mut c, "raw", "src.raw");
    }
}

/// From completion to finalize the client's requests wait; then they go to the target.
#[test]
fn pending_holds_the_client() {
    let dir = Dir::new();
    let (mut daemon, mut c) = raw_pair(&dir);
    mirror(&mut c, &json!({"auto-finalize": false, "auto-dismiss": false})).unwrap();
    until(&mut c, "m", "BLOCK_JOB_READY");
    verb(&mut c, "job-complete", "id").unwrap();
    until(&mut c, "m", "BLOCK_JOB_PENDING");
    let mut write = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write -P 9 1M 64k", DISK])
        .current_dir(&dir.0)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    pause(400);
    assert!(write.try_wait().unwrap().is_none(), "a write went through while the job was pending");
    let refused = verb(&mut c, "job-dismiss", "id").unwrap_err();
    assert_eq!(refused, "Job 'm' in state 'pending' cannot accept command verb 'dismiss'");
    verb(&mut c, "job-finalize", "id").unwrap();
    until(&mut c, "m", "concluded");
    assert!(write.wait().unwrap().success());
    assert_eq!(c.command("query-jobs", json!({})).unwrap()[0]["status"], "concluded");
    verb(&mut c, "job-dismiss", "id").unwrap();
    until(&mut c, "m", "null");
    assert_eq!(c.command("query-jobs", json!({})).unwrap(), json!([]));
    tool(&dir, "qemu-io|-r|-U|-f|raw|-c|read -P 9 1M 64k|dst.raw");
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
    let source = std::fs::read(dir.path("src.raw")).unwrap();
    assert_ne!(source[1 << 20], 9, "the held write went to the source");
}

/// Copy modes change in every direction under a client; what is written in each reaches the target.
#[test]
fn copy_modes_switch_in_every_direction() {
    let dir = Dir::new();
    let (mut daemon, mut c) = raw_pair(&dir);
    let writer = Writer::start(&dir, DISK, &[]);
    mirror(&mut c, &json!({"speed": 4 << 20, "buf-size": 262_144})).unwrap();
    until(&mut c, "m", "running");
    let change = |c: &mut crate::common::Client, mode: &str| {
        c.command("block-job-change", json!({"id": "m", "type": "mirror", "copy-mode": mode})).unwrap();
        pause(60);
    };
    let tour = [1, 2, 1, 0, 2, 0, 1];
    for m in tour {
        change(&mut c, MODES[m]);
    }
    c.command("block-job-set-speed", json!({"device": "m", "speed": 0})).unwrap();
    until(&mut c, "m", "BLOCK_JOB_READY");
    for m in tour {
        change(&mut c, MODES[m]);
    }
    verb(&mut c, "job-complete", "id").unwrap();
    until(&mut c, "m", "null");
    writer.stop();
    compare(&dir, &mut daemon, &mut c, "raw", "dst.raw");
}

/// QSD loses the writes of an export that is added on the source while the mirror runs.
#[test]
fn an_export_added_during_the_job_is_mirrored() {
    for mode in MODES {
        let dir = Dir::new();
        let (mut daemon, mut c) = raw_pair(&dir);
        mirror(&mut c, &json!({"copy-mode": mode})).unwrap();
        until(&mut c, "m", "BLOCK_JOB_READY");
        let late = json!({"type": "nbd", "id": "late", "node-name": "src", "name": "late", "writable": true});
        c.command("block-export-add", late).unwrap();
        let writer = Writer::start(&dir, "nbd+unix:///late?socket=nbd.sock", &[]);
        pause(100);
        verb(&mut c, "job-complete", "id").unwrap();
        until(&mut c, "m", "null");
        for export in c.command("query-block-exports", json!({})).unwrap().as_array().unwrap() {
            assert_eq!(export["node-name"], "dst");
        }
        writer.stop();
        compare(&dir, &mut daemon, &mut c, "raw", "dst.raw");
    }
}
