//! The disk as of one instant, read by another client while the first one writes.

use super::{DISK, Writer, backup, image, model, pause, quit, serve, tool};
use crate::common::{Client, Dir};
use serde_json::json;

const THEN: &str = "nbd+unix:///then?socket=nbd.sock";

fn show(c: &mut Client, filter: &str) {
    let node = json!({"driver": "snapshot-access", "node-name": "view", "file": filter, "discard": "unmap"});
    c.command("blockdev-add", node).unwrap();
    let export = json!({"type": "nbd", "id": "v", "node-name": "view", "name": "then", "writable": true});
    c.command("block-export-add", export).unwrap();
}

/// A backup of mode `none` keeps what is overwritten; readers see the instant again and again.
#[test]
fn of_a_backup_that_only_keeps() {
    let dir = Dir::new();
    let (mut daemon, mut c) = super::raw_pair(&dir);
    backup(&mut c, &json!({"sync": "none", "filter-node-name": "keep"})).unwrap();
    show(&mut c, "keep");
    let writer = Writer::start(&dir, DISK, &[]);
    for _ in 0..3 {
        tool(&dir, &format!("qemu-img|compare|-f|raw|-F|raw|then.raw|{THEN}"));
        pause(50);
    }
    tool(&dir, &format!("nbdcopy|{THEN}|copy.raw"));
    writer.stop();
    tool(&dir, "cmp|then.raw|copy.raw");
    // what is released is gone, the rest is there
    let script = "import nbd; h=nbd.NBD(); h.connect_uri('nbd+unix:///then?socket=nbd.sock'); h.trim(1<<20,0)\n\
                  try:\n    h.pread(512,0); raise SystemExit(1)\nexcept nbd.Error: pass\n\
                  assert h.pread(4096,1<<20)==open('then.raw','rb').read()[1<<20:(1<<20)+4096]";
    tool(&dir, &format!("/usr/bin/python3|-c|{script}"));
    c.command("block-export-del", json!({"id": "v", "mode": "hard"})).unwrap();
    c.command("job-cancel", json!({"id": "b"})).unwrap();
    crate::disk::until(&mut c, "b", "null");
    quit(&dir, &mut daemon, &mut c, ("raw", "src.raw"));
}

/// The same with a filter that the user added, through which the client writes.
#[test]
fn of_a_filter() {
    let dir = Dir::new();
    model(&dir);
    tool(&dir, "cp|model.raw|src.raw");
    tool(&dir, "cp|model.raw|then.raw");
    tool(&dir, "qemu-img|create|-q|-f|qcow2|-o|cluster_size=128k|dst.qcow2|8M");
    let (mut daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &image("qcow2", "dst.qcow2"));
    c.command("block-export-del", json!({"id": "e0"})).unwrap();
    crate::disk::until(&mut c, "e0", "BLOCK_EXPORT_DELETED");
    let filter = json!({"driver": "copy-before-write", "node-name": "keep", "file": "src", "target": "dst"});
    c.command("blockdev-add", filter).unwrap();
    let export = json!({"type": "nbd", "id": "e1", "node-name": "keep", "name": "disk", "writable": true});
    c.command("block-export-add", export).unwrap();
    show(&mut c, "keep");
    let refused = c.command(
        "block-export-add",
        json!({"type": "nbd", "id": "e2", "node-name": "src", "writable": true}),
    );
    assert!(
        refused.unwrap_err().contains("Permission conflict on node 'src'"),
        "nobody writes past the filter"
    );
    let writer = Writer::start(&dir, DISK, &[]);
    for _ in 0..3 {
        tool(&dir, &format!("qemu-img|compare|-f|raw|-F|raw|then.raw|{THEN}"));
        pause(50);
    }
    writer.stop();
    tool(&dir, &format!("qemu-img|compare|-f|raw|-F|raw|then.raw|{THEN}"));
    quit(&dir, &mut daemon, &mut c, ("raw", "src.raw"));
}
