//! Bad images and bad places, by `blockdev-add`: a clear error, soon, and a daemon that goes on.

use crate::common::{Daemon, Dir};
use crate::disk::tool;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn add(driver: &str, file: &str) -> Value {
    json!({"driver": driver, "node-name": "bad", "file": {"driver": "file", "filename": file}})
}

/// A good image with `bytes` at `offset` of its header.
fn damaged(dir: &Dir, offset: usize, bytes: &[u8]) {
    let mut image = std::fs::read(dir.path("good.qcow2")).unwrap();
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
    std::fs::write(dir.path("bad.qcow2"), image).unwrap();
}

#[test]
fn damaged_headers() {
    let dir = Dir::new();
    tool(&dir, "qemu-img|create|-q|-f|qcow2|good.qcow2|64M");
    let mut daemon = Daemon::start(&dir, &[]);
    let mut c = daemon.client();
    let cases: [(usize, &[u8], &str); 12] = [
        (0, b"nope", "not in qcow2 format"),
        (4, &[0, 0, 0, 9], "ersion"),
        (20, &[0, 0, 0, 63], "luster"),
        (20, &[0, 0, 0, 1], "luster"),
        (24, &[0xff; 8], "too big"),
        (36, &[0xff; 4], "L1"),
        (40, &[0xff; 8], "L1"),
        (40, &[0, 0, 0, 0, 0, 0, 0, 1], "L1"),
        (48, &[0xff; 8], "efcount"),
        (56, &[0xff; 4], "efcount"),
        (72, &[0x80, 0, 0, 0, 0, 0, 0, 0], "feature"),
        (96, &[0, 0, 0, 9], "efcount"),
    ];
    for (offset, bytes, want) in cases {
        damaged(&dir, offset, bytes);
        let begin = Instant::now();
        let got = c.command("blockdev-add", add("qcow2", "bad.qcow2"));
        assert!(begin.elapsed() < Duration::from_secs(2), "offset {offset}");
        let got = got.expect_err(&format!("{bytes:x?} at {offset} is accepted"));
        assert!(got.contains(want), "{bytes:x?} at {offset}: {got}");
    }
    let whole = std::fs::read(dir.path("good.qcow2")).unwrap();
    for length in [0, 3, 71, 103] {
        std::fs::write(dir.path("bad.qcow2"), &whole[..length]).unwrap();
        assert!(c.command("blockdev-add", add("qcow2", "bad.qcow2")).is_err(), "{length} bytes");
    }
    c.command("blockdev-add", add("qcow2", "good.qcow2")).unwrap();
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
}

#[test]
fn chains_that_loop_or_do_not_exist() {
    let dir = Dir::new();
    for (name, backing) in [("a", "b"), ("b", "a"), ("gone", "nowhere")] {
        tool(&dir, &format!("qemu-img|create|-q|-u|-f|qcow2|-b|{backing}|-F|qcow2|{name}|1M"));
    }
    tool(&dir, "qemu-img|create|-q|-f|qcow2|self|1M");
    tool(&dir, "qemu-img|rebase|-u|-b|self|-F|qcow2|self");
    let mut daemon = Daemon::start(&dir, &[]);
    let mut c = daemon.client();
    for (name, want) in [("a", "loop"), ("self", "loop"), ("gone", "nowhere")] {
        let begin = Instant::now();
        let got = c.command("blockdev-add", add("qcow2", name)).unwrap_err();
        assert!(got.contains(want), "{name}: {got}");
        assert!(begin.elapsed() < Duration::from_secs(1), "{name}");
    }
    assert_eq!(c.command("query-named-block-nodes", json!({})).unwrap(), json!([]));
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
}

#[test]
fn places_that_cannot_be_opened() {
    let dir = Dir::new();
    tool(&dir, "truncate|-s|1M|plain.raw");
    std::fs::create_dir(dir.path("folder")).unwrap();
    let mut daemon = Daemon::start(&dir, &[]);
    let mut c = daemon.client();
    let file = |name: &str| json!({"driver": "file", "node-name": "bad", "filename": name});
    for (name, want) in [
        ("nowhere", "Could not open 'nowhere': No such file or directory"),
        ("folder", "folder"),
        ("plain.raw/x", "Could not open 'plain.raw/x': Not a directory"),
        // nobody may write this, not even root
        ("/proc/sys/kernel/ostype", "Could not open '/proc/sys/kernel/ostype': Permission denied"),
    ] {
        let got = c.command("blockdev-add", file(name)).expect_err(name);
        assert!(got.contains(want), "{name}: {got}");
    }
    let create = json!({"driver": "file", "filename": "/proc/nope", "size": 1 << 20});
    c.command("blockdev-create", json!({"job-id": "c", "options": create})).unwrap();
    crate::disk::until(&mut c, "c", "concluded");
    let jobs = c.command("query-jobs", json!({})).unwrap();
    assert!(jobs[0]["error"].as_str().unwrap().contains("/proc/nope"), "{jobs}");
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
}
