//! Commits of images below the active one.

use super::{compare, header, images, job, serve};
use crate::common::{Client, Dir};
use crate::disk::{tool, until};
use crate::mirrors::{DISK, Writer};
use serde_json::{Value, json};

fn commit(c: &mut Client, more: &Value) -> Result<Value, String> {
    let mut a = json!({"job-id": "j", "device": "n3", "top-node": "n2", "base-node": "n0"});
    for (k, v) in more.as_object().unwrap() {
        a[k] = v.clone();
    }
    c.command("block-commit", a)
}

/// Two images go down under a writing client, slowly at first; the chain is shorter, the header says so, the base is read-only.
#[test]
fn in_the_middle_of_a_chain_in_use() {
    let dir = Dir::new();
    images(&dir, 4);
    let (mut daemon, mut c) = serve(&dir, 4);
    let writer = Writer::start(&dir, DISK, &["4", "400"]);
    commit(&mut c, &json!({"speed": 1 << 20})).unwrap();
    assert_eq!(job(&mut c)["len"], 8 << 20);
    c.command("job-pause", json!({"id": "j"})).unwrap();
    until(&mut c, "j", "paused");
    c.command("job-resume", json!({"id": "j"})).unwrap();
    c.command("block-job-set-speed", json!({"device": "j", "speed": 0})).unwrap();
    until(&mut c, "j", "null");
    writer.stop();
    assert_eq!(header(&dir, "3.qcow2"), (json!("0.qcow2"), json!("qcow2")));
    let nodes = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
    assert!(!nodes.as_array().unwrap().iter().any(|n| n["drv"] == "commit_top"));
    for node in ["n2", "n1"] {
        c.command("blockdev-del", json!({"node-name": node})).unwrap();
    }
    // nobody may write to the base any more
    let error = c.command("block_resize", json!({"node-name": "n0", "size": 16 << 20})).unwrap_err();
    assert!(error.contains("backing hd of 'n3'"), "{error}");
    compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "0.qcow2"]);
}

/// Cancelled half-way: the chain is what it was, in the graph and in the headers.
#[test]
fn cancelled_changes_nothing_to_be_seen() {
    let dir = Dir::new();
    images(&dir, 4);
    let (mut daemon, mut c) = serve(&dir, 4);
    let writer = Writer::start(&dir, DISK, &["4", "400"]);
    commit(&mut c, &json!({"speed": 1 << 20})).unwrap();
    assert!(job(&mut c)["offset"].as_u64().unwrap() < 8 << 20);
    c.command("job-cancel", json!({"id": "j"})).unwrap();
    until(&mut c, "j", "null");
    writer.stop();
    assert_eq!(header(&dir, "3.qcow2"), (json!("2.qcow2"), json!("qcow2")));
    tool(&dir, "qemu-img|compare|-U|-f|raw|-F|qcow2|model.raw|3.qcow2");
    compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "2.qcow2", "1.qcow2", "0.qcow2"]);
}
