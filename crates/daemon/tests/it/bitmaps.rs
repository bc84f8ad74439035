//! Dirty bitmaps from the outside: kept in images that QEMU reads and writes as well, shown to NBD clients, and as what a
//! mirror copies.

use crate::common::{Client, Daemon, Dir};
use crate::disk::{tool, until};
use crate::wire::compare;
use serde_json::{Value, json};

const DISK: &str = "nbd+unix:///disk?socket=nbd.sock";

#[test]
fn histories_exchanged_with_qemu() {
    let seed = std::env::var("LIVEBLK_SEED").unwrap_or_else(|_| std::process::id().to_string());
    compare("bitmaps.py", &["--count".to_owned(), "12".to_owned(), "--seed".to_owned(), seed]);
}

/// `src` is served as `disk`, with a persistent bitmap `b`; `dst` is an empty image of the same size.
fn started(dir: &Dir, granularity: u32) -> (Daemon, Client) {
    tool(dir, "qemu-img|create|-q|-f|qcow2|src.qcow2|8M");
    tool(dir, "qemu-io|-f|qcow2|-c|write -P 1 0 8M|src.qcow2");
    tool(dir, "qemu-img|convert|-f|qcow2|-O|qcow2|src.qcow2|full.qcow2");
    tool(dir, "qemu-img|create|-q|-f|qcow2|-b|full.qcow2|-F|qcow2|dst.qcow2");
    let daemon = Daemon::start(
        dir,
        &[
            "--nbd-server",
            "addr.type=unix,addr.path=nbd.sock",
            "--blockdev",
            &node("src"),
            "--blockdev",
            &node("dst"),
        ],
    );
    let mut c = daemon.client();
    let bitmap = json!({"node": "src", "name": "b", "granularity": granularity, "persistent": true});
    c.command("block-dirty-bitmap-add", bitmap).unwrap();
    let export = json!({"type": "nbd", "id": "e", "node-name": "src", "name": "disk", "writable": true});
    c.command("block-export-add", export).unwrap();
    (daemon, c)
}

fn node(name: &str) -> String {
    format!("driver=qcow2,node-name={name},file.driver=file,file.filename={name}.qcow2")
}

fn write(dir: &Dir, what: &str) {
    tool(dir, &format!("qemu-io|-f|raw|-c|{what}|{DISK}"));
}

fn bitmap(c: &mut Client) -> Value {
    let all = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
    let src = all.as_array().unwrap().iter().find(|n| n["node-name"] == "src").unwrap().clone();
    src["dirty-bitmaps"].as_array().unwrap().iter().find(|b| b["name"] == "b").unwrap().clone()
}

fn mirror(c: &mut Client, more: &Value) -> Result<Value, String> {
    let mut a =
        json!({"job-id": "m", "device": "src", "target": "dst", "sync": "incremental", "bitmap": "b"});
    for (k, v) in more.as_object().unwrap() {
        a[k] = v.clone();
    }
    c.command("blockdev-mirror", a)
}

#[test]
fn exported_bitmaps_are_seen_by_clients_and_busy() {
    let dir = Dir::new();
    let (_daemon, mut c) = started(&dir, 65536);
    write(&dir, "write -P 2 1M 100k");
    let mut export = json!({"type": "nbd", "id": "x", "node-name": "src", "name": "x", "bitmaps": ["b"],
        "allocation-depth": true});
    let e = c.command("block-export-add", export.clone()).unwrap_err();
    assert_eq!(e, "Enabled bitmap 'b' incompatible with readonly export");
    export["bitmaps"] = json!([{"node": "dst", "name": "b"}]);
    assert_eq!(c.command("block-export-add", export.clone()).unwrap_err(), "Dirty bitmap 'b' not found");
    c.command("block-dirty-bitmap-disable", json!({"node": "src", "name": "b"})).unwrap();
    export["bitmaps"] = json!(["b"]);
    c.command("block-export-add", export).unwrap();
    let all = tool(&dir, "nbdinfo|nbd+unix:///x?socket=nbd.sock");
    assert!(all.contains("qemu:dirty-bitmap:b") && all.contains("qemu:allocation-depth"), "{all}");
    let map = tool(&dir, "nbdinfo|--map=qemu:dirty-bitmap:b|nbd+unix:///x?socket=nbd.sock");
    let rows: Vec<Vec<&str>> = map.lines().map(|l| l.split_whitespace().take(3).collect()).collect();
    assert_eq!(
        rows,
        [["0", "1048576", "0"], ["1048576", "131072", "1"], ["1179648", "7208960", "0"]],
        "{map}"
    );
    let e = c.command("block-dirty-bitmap-remove", json!({"node": "src", "name": "b"})).unwrap_err();
    assert_eq!(e, "Bitmap 'b' is currently in use by another operation and cannot be used");
    c.command("block-export-del", json!({"id": "x"})).unwrap();
    c.command("block-dirty-bitmap-remove", json!({"node": "src", "name": "b"})).unwrap();
}

#[test]
fn an_incremental_mirror_brings_what_has_changed() {
    for (mode, granularity) in [("background", 65536), ("write-blocking", 512)] {
        let dir = Dir::new();
        let (mut daemon, mut c) = started(&dir, granularity);
        write(&dir, "write -P 2 1M 100k");
        assert!(bitmap(&mut c)["count"].as_u64().unwrap() >= 100 << 10);
        mirror(&mut c, &json!({"copy-mode": mode})).unwrap();
        until(&mut c, "m", "BLOCK_JOB_READY");
        assert_eq!(bitmap(&mut c)["busy"], true);
        write(&dir, "write -P 3 3M 10k");
        c.command("job-complete", json!({"id": "m"})).unwrap();
        until(&mut c, "m", "null");
        let b = bitmap(&mut c);
        assert_eq!((&b["count"], &b["busy"]), (&json!(0), &json!(false)), "{b}");
        write(&dir, "write -P 4 5M 10k");
        assert_eq!(bitmap(&mut c)["count"], 0, "the client is on the target");
        c.command("quit", json!({})).unwrap();
        assert!(daemon.wait().success());
        tool(&dir, "qemu-io|-f|qcow2|-c|write -P 4 5M 10k|src.qcow2");
        tool(&dir, "qemu-img|compare|-f|qcow2|-F|qcow2|src.qcow2|dst.qcow2");
        let map = tool(&dir, "qemu-img|map|--output=json|dst.qcow2");
        let map: Value = serde_json::from_str(&map).unwrap();
        let own = map.as_array().unwrap().iter().filter(|e| e["depth"] == 0);
        let own: u64 = own.map(|e| e["length"].as_u64().unwrap()).sum();
        assert_eq!(own, 4 << 16, "only what changed was copied: {map}");
        assert!(tool(&dir, "qemu-img|info|src.qcow2").contains("name: b"));
        tool(&dir, "qemu-img|check|-q|src.qcow2");
    }
}

#[test]
fn a_bitmap_ends_as_its_mode_says() {
    // (sync, mode, how the job ends, bytes marked then): 128 KiB were marked at the start, 64 KiB written meanwhile,
    // 64 KiB after the end.
    let cases = [
        ("bitmap", "never", "soft", 256),
        ("bitmap", "on-success", "soft", 64),
        ("bitmap", "always", "soft", 64),
        ("full", "on-success", "soft", 64),
        ("none", "on-success", "soft", 192),
        ("bitmap", "on-success", "hard", 256),
        ("bitmap", "always", "hard", 64),
        ("bitmap", "never", "hard", 256),
    ];
    for (sync, mode, end, marked) in cases {
        let dir = Dir::new();
        let (_daemon, mut c) = started(&dir, 65536);
        write(&dir, "write -P 2 1M 128k");
        mirror(&mut c, &json!({"sync": sync, "bitmap-mode": mode})).unwrap();
        until(&mut c, "m", "BLOCK_JOB_READY");
        write(&dir, "write -P 3 3M 64k");
        if end == "hard" {
            // What was written is on the target before it is given up, so that the outcome is certain.
            while c.command("query-block-jobs", json!({})).unwrap()[0]["remaining"] != 0 {}
        }
        c.command("block-job-cancel", json!({"device": "m", "force": end == "hard"})).unwrap();
        until(&mut c, "m", "null");
        write(&dir, "write -P 4 5M 64k");
        let b = bitmap(&mut c);
        assert_eq!(
            (&b["count"], &b["busy"]),
            (&json!(marked << 10), &json!(false)),
            "{sync} {mode} {end}: {b}"
        );
    }
}

#[test]
fn a_mirror_that_was_lost_is_resumed() {
    let dir = Dir::new();
    let (mut daemon, mut c) = started(&dir, 65536);
    write(&dir, "write -P 2 0 4M");
    let always = json!({"sync": "bitmap", "bitmap-mode": "always", "speed": 1 << 20});
    mirror(&mut c, &always).unwrap();
    while c.command("query-block-jobs", json!({})).unwrap()[0]["offset"] == 0 {}
    write(&dir, "write -P 3 6M 64k");
    c.command("block-job-cancel", json!({"device": "m", "force": true})).unwrap();
    until(&mut c, "m", "null");
    let left = bitmap(&mut c)["count"].as_u64().unwrap();
    // Of the 4 MiB and what the client wrote, at least a block was copied.
    assert!(left > 0 && left <= 4 << 20, "{left}");
    write(&dir, "write -P 4 7M 64k");
    mirror(&mut c, &json!({})).unwrap();
    until(&mut c, "m", "BLOCK_JOB_READY");
    c.command("block-job-cancel", json!({"device": "m"})).unwrap();
    until(&mut c, "m", "null");
    assert_eq!(bitmap(&mut c)["count"], 0);
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
    tool(&dir, "qemu-img|compare|-f|qcow2|-F|qcow2|src.qcow2|dst.qcow2");
}

#[test]
fn wrong_use_of_bitmaps_in_mirrors() {
    let dir = Dir::new();
    let (_daemon, mut c) = started(&dir, 65536);
    for (more, why) in [
        (json!({"bitmap": "x"}), "Dirty bitmap 'x' not found"),
        (json!({"sync": "bitmap"}), "Bitmap sync mode must be given when providing a bitmap"),
        (json!({"granularity": 65536}), "Granularity and bitmap cannot both be set"),
        (
            json!({"bitmap-mode": "always"}),
            "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
        ),
    ] {
        assert_eq!(mirror(&mut c, &more).unwrap_err(), why);
    }
    let bare = json!({"job-id": "m", "device": "src", "target": "dst", "sync": "bitmap"});
    let e = c.command("blockdev-mirror", bare).unwrap_err();
    assert_eq!(e, "Must provide a valid bitmap name for 'bitmap' sync mode");
    assert_eq!(bitmap(&mut c)["busy"], false);
}
