//! Backups from a bitmap: what is copied, and what the bitmap says afterwards, by the table of `jobs::backup_bitmap`.

use super::{DISK, backup, hurry, image, model, quit, serve, until};
use crate::common::{Client, Dir};
use crate::disk::tool;
use serde_json::{Value, json};

const K64: u64 = 65536;

fn write(dir: &Dir, at: &str) {
    tool(dir, &format!("qemu-io|-f|raw|-c|write -P 77 {at} 64k|{DISK}"));
    tool(dir, &format!("qemu-io|-f|raw|-c|write -P 77 {at} 64k|model.raw"));
}

/// Bytes marked in bitmap "map" of `src`, and whether it is busy.
fn marked(c: &mut Client) -> (u64, bool) {
    let nodes = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
    let node = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "src").unwrap();
    let map = node["dirty-bitmaps"].as_array().unwrap().iter().find(|b| b["name"] == "map").unwrap().clone();
    (map["count"].as_u64().unwrap(), map["busy"].as_bool().unwrap())
}

/// Where "map" is marked, as another client sees it: after the job the bitmap is free to be exported.
fn where_marked(dir: &Dir, c: &mut Client) -> Vec<u64> {
    let export = json!({"type": "nbd", "id": "m", "node-name": "src", "name": "m", "bitmaps": ["map"]});
    if c.command("block-export-add", export).is_err() {
        return Vec::new(); // exports of bitmaps come separately; the counts are compared in any case
    }
    let script = "import nbd; h=nbd.NBD(); h.add_meta_context('qemu:dirty-bitmap:map'); h.connect_uri('nbd+unix:///m?socket=nbd.sock')\n\
                  out=[]; at=0\n\
                  def f(m,o,e,err):\n    global at\n    for i in range(0,len(e),2):\n        if e[i+1]&1: out.extend(range(at//65536,(at+e[i])//65536))\n        at+=e[i]\n    return 0\n\
                  while at<h.get_size(): h.block_status(h.get_size()-at, at, f)\n\
                  print(' '.join(map(str,out)))";
    let said = tool(dir, &format!("/usr/bin/python3|-c|{script}"));
    c.command("block-export-del", json!({"id": "m", "mode": "hard"})).unwrap();
    until(c, "m", "BLOCK_EXPORT_DELETED");
    said.split_whitespace().map(|w| w.parse().unwrap()).collect()
}

/// One row of the table: B = clusters 1, 2 and 100 of a disk with data, N = cluster 5 and 100.
fn row(sync: &str, mode: &str, end: &str) -> u64 {
    let dir = Dir::new();
    model(&dir);
    tool(&dir, "cp|model.raw|src.raw");
    tool(&dir, "cp|model.raw|old.raw");
    tool(&dir, "qemu-img|create|-q|-f|qcow2|-b|old.raw|-F|raw|dst.qcow2");
    let dst = json!({"driver": "qcow2", "file": {"driver": "file", "filename": "dst.qcow2"}});
    let (mut daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &dst);
    c.command("block-dirty-bitmap-add", json!({"node": "src", "name": "map"})).unwrap();
    ["64k", "128k", "6400k"].iter().for_each(|at| write(&dir, at));
    tool(&dir, "cp|model.raw|then.raw");
    let slow = json!({"sync": sync, "bitmap": "map", "bitmap-mode": mode, "speed": 4096, "auto-finalize": false,
        "x-perf": {"max-workers": 1, "max-chunk": 65536}});
    backup(&mut c, &slow).unwrap();
    write(&dir, "320k");
    write(&dir, "6400k");
    assert_eq!(marked(&mut c), (3 * K64, true));
    let busy = c.command("block-dirty-bitmap-clear", json!({"node": "src", "name": "map"})).unwrap_err();
    assert_eq!(busy, "Bitmap 'map' is currently in use by another operation and cannot be used");
    if end == "success" {
        hurry(&mut c);
        until(&mut c, "b", "BLOCK_JOB_PENDING");
        assert_eq!(marked(&mut c), (3 * K64, true), "the exchange is at the end");
        c.command("job-finalize", json!({"id": "b"})).unwrap();
    } else {
        c.command("job-cancel", json!({"id": "b"})).unwrap();
    }
    until(&mut c, "b", "null");
    let (count, busy) = marked(&mut c);
    assert!(!busy);
    let places = where_marked(&dir, &mut c);
    assert!(places.is_empty() || places.len() as u64 * K64 == count, "{places:?} {count}");
    quit(&dir, &mut daemon, &mut c, ("raw", "src.raw"));
    if end == "success" {
        // with what was backed up before below it
        tool(&dir, "qemu-img|compare|-f|raw|-F|qcow2|then.raw|dst.qcow2");
    }
    count / K64
}

#[test]
fn every_row_of_the_table() {
    // of B = {1, 2, 100}, N = {5, 100}; 100 was copied before the client overwrote it, and of the rest at most one by the job
    assert_eq!(row("bitmap", "on-success", "success"), 2);
    assert_eq!(row("bitmap", "on-success", "cancel"), 4);
    assert_eq!(row("bitmap", "never", "success"), 4);
    assert_eq!(row("bitmap", "never", "cancel"), 4);
    assert_eq!(row("bitmap", "always", "success"), 2);
    let left = row("bitmap", "always", "cancel");
    assert!((2..=4).contains(&left), "what was not copied, and N: {left}");
    assert_eq!(row("full", "on-success", "success"), 2);
    assert_eq!(row("full", "always", "success"), 2);
    assert_eq!(row("full", "on-success", "cancel"), 4);
    assert!(row("full", "always", "cancel") > 100, "everything that was not copied");
}

/// A bitmap that does not record stays as it is but for what was copied.
#[test]
fn a_disabled_bitmap() {
    let dir = Dir::new();
    let (mut daemon, mut c) = super::raw_pair(&dir);
    c.command("block-dirty-bitmap-add", json!({"node": "src", "name": "map"})).unwrap();
    write(&dir, "1M");
    c.command("block-dirty-bitmap-disable", json!({"node": "src", "name": "map"})).unwrap();
    backup(&mut c, &json!({"sync": "incremental", "bitmap": "map", "auto-finalize": false})).unwrap();
    write(&dir, "2M");
    until(&mut c, "b", "BLOCK_JOB_PENDING");
    c.command("job-finalize", json!({"id": "b"})).unwrap();
    until(&mut c, "b", "null");
    assert_eq!(marked(&mut c), (0, false));
    quit(&dir, &mut daemon, &mut c, ("raw", "src.raw"));
}

/// Two disks at one instant, ending together: a client that writes the same number to both sees the same number in both
/// copies; the failure of one takes the other's success away, and both bitmaps keep their bits.
#[test]
fn grouped_in_a_transaction() {
    for fails in [false, true] {
        let dir = Dir::new();
        let (mut daemon, mut c) = super::raw_pair(&dir);
        tool(&dir, "truncate|-s|8M|src2.raw");
        tool(&dir, "truncate|-s|8M|dst2.raw");
        let rule = json!({"event": "none", "iotype": "write", "errno": 5, "sector": 2048});
        let bad = json!({"driver": "raw", "node-name": "dst2", "file": {"driver": "blkdebug",
            "inject-error": if fails { json!([rule]) } else { json!([]) }, "image": {"driver": "file", "filename": "dst2.raw"}}});
        let mut src2 = image("raw", "src2.raw");
        src2["node-name"] = json!("src2");
        c.command("blockdev-add", src2).unwrap();
        c.command("blockdev-add", bad).unwrap();
        for node in ["src", "src2"] {
            c.command("block-dirty-bitmap-add", json!({"node": node, "name": "map"})).unwrap();
        }
        let export =
            json!({"type": "nbd", "id": "e2", "node-name": "src2", "name": "disk2", "writable": true});
        c.command("block-export-add", export).unwrap();
        let both = "import nbd,struct,sys\na=nbd.NBD(); a.connect_uri('nbd+unix:///disk?socket=nbd.sock')\nb=nbd.NBD(); b.connect_uri('nbd+unix:///disk2?socket=nbd.sock')\n\
                    n=0\nb.pwrite(b'x'*65536,1<<20); a.pwrite(bytes(512),4096); b.pwrite(bytes(512),4096)\nprint('go',flush=True)\nimport select\nwhile not select.select([sys.stdin],[],[],0)[0]:\n    n+=1\n    d=struct.pack('<Q',n)*64\n    a.pwrite(d,4096); b.pwrite(d,4096)";
        let mut client = std::process::Command::new("/usr/bin/python3")
            .args(["-c", both])
            .current_dir(&dir.0)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(client.stdout.take().unwrap()), &mut line)
            .unwrap();
        let action = |id: &str, from: &str, to: &str| {
            json!({"type": "blockdev-backup", "data": {"job-id": id, "device": from, "target": to, "sync": "full",
                "bitmap": "map", "bitmap-mode": "on-success", "auto-dismiss": false}})
        };
        let actions = json!({"actions": [action("b", "src", "dst"), action("b2", "src2", "dst2")],
            "properties": {"completion-mode": "grouped"}});
        c.command("transaction", actions).unwrap();
        // in which order they conclude is nobody's business
        let over = |jobs: &Value| jobs.as_array().unwrap().iter().all(|j| j["status"] == "concluded");
        while !over(&c.command("query-jobs", json!({})).unwrap()) {
            super::pause(5);
        }
        drop(client.stdin.take());
        assert!(client.wait().unwrap().success());
        let jobs = c.command("query-jobs", json!({})).unwrap();
        let errors: Vec<Value> = jobs.as_array().unwrap().iter().map(|j| j["error"].clone()).collect();
        if fails {
            assert_eq!(errors, [json!("Input/output error"), json!("Operation canceled")]);
            assert!(marked(&mut c).0 >= K64, "kept");
        } else {
            assert!(errors.iter().all(Value::is_null), "{errors:?}");
        }
        c.command("quit", json!({})).unwrap();
        assert!(daemon.wait().success());
        if !fails {
            let number = |file: &str| {
                let bytes = std::fs::read(dir.path(file)).unwrap();
                u64::from_le_bytes(bytes[4096..4104].try_into().unwrap())
            };
            let (a, b) = (number("dst.raw"), number("dst2.raw"));
            assert!(a == b || a == b + 1, "{a} and {b}: the client writes to the first disk first");
        }
    }
}
