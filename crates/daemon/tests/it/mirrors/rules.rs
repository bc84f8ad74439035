//! Arguments, sparse disks, and disks that change faster than they are copied.

use super::{DISK, Writer, compare, image, job, mirror, pause, raw_pair, serve, verb};
use crate::common::Dir;
use crate::disk::{tool, until};
use serde_json::json;
use std::os::unix::fs::MetadataExt;

#[test]
fn arguments_that_are_refused() {
    let dir = Dir::new();
    let (mut daemon, mut c) = raw_pair(&dir);
    for (more, want) in [
        (json!({"replaces": "nope"}), "Failed to find node with node-name='nope'"),
        (json!({"replaces": "dst"}), "Cannot replace 'dst' by a node mirrored from 'src', because"),
        (json!({"granularity": 256}), "Parameter 'granularity' expects a value in range [512B, 64MB]"),
        (json!({"granularity": 5000}), "Parameter 'granularity' expects a power of 2"),
        (json!({"buf-size": -1}), "Invalid parameter 'buf-size'"),
        (json!({"speed": -1}), "Parameter 'speed' expects a non-negative value"),
        (json!({"target": "src"}), "Can't mirror node into itself"),
        (json!({"target": "nope"}), "Cannot find device='nope' nor node-name='nope'"),
        (json!({"filter-node-name": "dst"}), "Duplicate nodes with node-name='dst'"),
        (json!({"sync": "incremental"}), "Must provide a valid bitmap name for 'incremental' sync mode"),
        (json!({"job-id": "1m"}), "Invalid job ID '1m'"),
    ] {
        let got = mirror(&mut c, &more).unwrap_err();
        assert!(got.contains(want), "{more}: {got}");
    }
    assert_eq!(c.command("query-jobs", json!({})).unwrap(), json!([]));
    // nothing of those is left in the way
    mirror(&mut c, &json!({"filter-node-name": "top"})).unwrap();
    until(&mut c, "m", "BLOCK_JOB_READY");
    verb(&mut c, "job-complete", "id").unwrap();
    until(&mut c, "m", "null");
    compare(&dir, &mut daemon, &mut c, "raw", "dst.raw");
}

#[test]
fn a_disk_without_a_byte_and_disks_of_two_sizes() {
    let dir = Dir::new();
    tool(&dir, "truncate|-s|0|src.raw");
    tool(&dir, "truncate|-s|0|dst.raw");
    tool(&dir, "truncate|-s|1M|other.raw");
    let (mut daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &image("raw", "dst.raw"));
    for mode in super::MODES {
        mirror(&mut c, &json!({"copy-mode": mode})).unwrap();
        until(&mut c, "m", "BLOCK_JOB_READY");
        verb(&mut c, "block-job-cancel", "device").unwrap();
        until(&mut c, "m", "null");
    }
    let mut other = image("raw", "other.raw");
    other["node-name"] = json!("other");
    c.command("blockdev-add", other).unwrap();
    mirror(&mut c, &json!({"target": "other", "auto-dismiss": false})).unwrap();
    until(&mut c, "m", "concluded");
    let jobs = c.command("query-jobs", json!({})).unwrap();
    assert_eq!(jobs[0]["error"], "Source and target image have different sizes");
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
}

/// The unit of copying: one byte written at the client becomes one unit of work, as long as the target's clusters.
#[test]
fn granularity_follows_the_target() {
    for (cluster, want) in [("512", 4096), ("16k", 16384), ("2M", 65536)] {
        let dir = Dir::new();
        tool(&dir, "truncate|-s|8M|src.raw");
        tool(&dir, &format!("qemu-img|create|-q|-f|qcow2|-o|cluster_size={cluster}|dst.qcow2|8M"));
        let (mut daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &image("qcow2", "dst.qcow2"));
        mirror(&mut c, &json!({"sync": "none"})).unwrap();
        until(&mut c, "m", "BLOCK_JOB_READY");
        tool(&dir, &format!("qemu-io|-f|raw|-c|write 0 512|{DISK}"));
        assert_eq!(job(&mut c)["len"], want, "clusters of {cluster}");
        c.command("quit", json!({})).unwrap();
        assert!(daemon.wait().success());
    }
}

/// 1 GiB with 1 MiB of data, then trimmed all over: the target stays as small, and nothing near the whole is copied.
#[test]
fn sparse_stays_sparse_and_a_trim_is_no_copy() {
    let dir = Dir::new();
    tool(&dir, "truncate|-s|1G|src.raw");
    tool(&dir, "truncate|-s|1G|dst.raw");
    tool(&dir, "qemu-io|-f|raw|-c|write -P 5 512M 1M|src.raw");
    let (mut daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &image("raw", "dst.raw"));
    mirror(&mut c, &json!({})).unwrap();
    until(&mut c, "m", "BLOCK_JOB_READY");
    let blocks = || std::fs::metadata(dir.path("dst.raw")).unwrap().blocks() * 512;
    assert!((1 << 20..4 << 20).contains(&blocks()), "{} bytes", blocks());
    tool(&dir, &format!("qemu-io|-f|raw|-c|discard 0 512M|-c|discard 513M 511M|{DISK}"));
    verb(&mut c, "job-complete", "id").unwrap();
    until(&mut c, "m", "null");
    assert!((1 << 20..4 << 20).contains(&blocks()), "{} bytes after the trim", blocks());
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
    tool(&dir, "qemu-img|compare|-f|raw|-F|raw|src.raw|dst.raw");
}

/// A client dirties faster than a slow job copies. What the policy does, if any, gets the mirror ready.
fn under_a_fast_client(policy: &str) {
    let dir = Dir::new();
    let (mut daemon, mut c) = raw_pair(&dir);
    let writer = Writer::start(&dir, DISK, &[]);
    let slow = json!({"speed": 4 << 20, "buf-size": 262_144, "convergence": policy, "converge-after": 1});
    mirror(&mut c, &slow).unwrap();
    if policy == "none" {
        // when all of the disk is dirty the client cannot dirty more than is copied: the rates then meet, now and then
        let told = (0..150).any(|_| {
            pause(100);
            let j = job(&mut c);
            assert_eq!(j["status"], "running", "{j}");
            j["not-converging"].is_string()
        });
        assert!(told, "never told why: {}", job(&mut c));
        c.command("block-job-change", json!({"id": "m", "type": "mirror", "copy-mode": "write-blocking"}))
            .unwrap();
    }
    until(&mut c, "m", "BLOCK_JOB_READY");
    c.command("block-job-set-speed", json!({"device": "m", "speed": 0})).unwrap();
    verb(&mut c, "job-complete", "id").unwrap();
    until(&mut c, "m", "null");
    writer.stop();
    compare(&dir, &mut daemon, &mut c, "raw", "dst.raw");
}

#[test]
fn without_a_policy_it_says_why_it_is_not_ready() {
    under_a_fast_client("none");
}

#[test]
fn switching_the_copy_mode_converges() {
    under_a_fast_client("switch-copy-mode");
}

#[test]
fn throttling_the_client_converges() {
    under_a_fast_client("throttle-guest");
}
