//! Commits of the active image: a mirror into an image below.

use super::{compare, images, is_open_for_writing, job, serve, shorter_in_the_middle};
use crate::common::{Client, Dir};
use crate::disk::{tool, until};
use crate::mirrors::{DISK, Writer};
use serde_json::{Value, json};

fn commit(c: &mut Client, more: &Value) -> Result<Value, String> {
    let mut a = json!({"job-id": "j", "device": "n2", "base-node": "n0"});
    for (k, v) in more.as_object().unwrap() {
        a[k] = v.clone();
    }
    c.command("block-commit", a)
}

#[test]
fn completed_in_every_copy_mode() {
    for mode in ["background", "write-blocking", "read-write-blocking"] {
        let dir = Dir::new();
        images(&dir, 3);
        let (mut daemon, mut c) = serve(&dir, 3);
        let writer = Writer::start(&dir, DISK, &["4", "400"]);
        commit(&mut c, &json!({"copy-mode": mode, "speed": 4 << 20, "buf-size": 1 << 20})).unwrap();
        assert_eq!(job(&mut c)["type"], "commit");
        c.command("block-job-set-speed", json!({"device": "j", "speed": 0})).unwrap();
        until(&mut c, "j", "BLOCK_JOB_READY");
        assert!(job(&mut c)["remaining"].is_u64());
        c.command("job-complete", json!({"id": "j"})).unwrap();
        until(&mut c, "j", "null");
        assert_eq!(c.command("query-block-exports", json!({})).unwrap()[0]["node-name"], "n0");
        assert!(is_open_for_writing(&mut c, "n0"));
        writer.stop();
        for node in ["n2", "n1"] {
            c.command("blockdev-del", json!({"node-name": node})).unwrap();
        }
        compare(&dir, &mut daemon, &mut c, "0.qcow2", &["0.qcow2"]);
    }
}

/// However it is called off: the client stays where it was, and the base is read-only again. A copy mode that was switched
/// meanwhile changes nothing about that.
#[test]
fn called_off() {
    for force in [true, false] {
        let dir = Dir::new();
        images(&dir, 3);
        let (mut daemon, mut c) = serve(&dir, 3);
        let writer = Writer::start(&dir, DISK, &["4", "400"]);
        commit(&mut c, &json!({})).unwrap();
        until(&mut c, "j", "BLOCK_JOB_READY");
        assert!(is_open_for_writing(&mut c, "n0"));
        let change = json!({"id": "j", "type": "mirror", "copy-mode": "write-blocking"});
        c.command("block-job-change", change).unwrap();
        c.command("block-job-cancel", json!({"device": "j", "force": force})).unwrap();
        until(&mut c, "j", if force { "BLOCK_JOB_CANCELLED" } else { "BLOCK_JOB_COMPLETED" });
        until(&mut c, "j", "null");
        assert_eq!(c.command("query-block-exports", json!({})).unwrap()[0]["node-name"], "n2");
        assert!(!is_open_for_writing(&mut c, "n0"));
        writer.stop();
        compare(&dir, &mut daemon, &mut c, "2.qcow2", &["2.qcow2", "1.qcow2", "0.qcow2"]);
    }
}

/// A base that is shorter than what goes into it becomes as long.
#[test]
fn into_a_shorter_base() {
    for active in [true, false] {
        let dir = Dir::new();
        tool(&dir, "qemu-img|create|-q|-f|qcow2|0.qcow2|2M");
        tool(&dir, "qemu-io|-f|qcow2|-c|write -P 1 0 2M|0.qcow2");
        tool(&dir, "qemu-img|create|-q|-f|qcow2|-b|0.qcow2|-F|qcow2|1.qcow2|8M");
        tool(&dir, "qemu-io|-f|qcow2|-c|write -P 2 1M 4M|1.qcow2");
        tool(&dir, "qemu-img|create|-q|-f|qcow2|-b|1.qcow2|-F|qcow2|2.qcow2|8M");
        tool(&dir, "qemu-img|convert|-O|raw|2.qcow2|model.raw");
        let (mut daemon, mut c) = serve(&dir, 3);
        let writer = Writer::start(&dir, DISK, &["4", "400"]);
        let result = if active {
            commit(&mut c, &json!({})).unwrap();
            until(&mut c, "j", "BLOCK_JOB_READY");
            c.command("job-complete", json!({"id": "j"})).unwrap();
            "0.qcow2"
        } else {
            commit(&mut c, &json!({"top-node": "n1"})).unwrap();
            "2.qcow2"
        };
        until(&mut c, "j", "null");
        writer.stop();
        compare(&dir, &mut daemon, &mut c, result, &["2.qcow2", "0.qcow2"]);
    }
}

/// A base that is longer than what goes into it: what it has behind that end was hidden, and stays so.
#[test]
fn into_a_longer_base() {
    let dir = Dir::new();
    shorter_in_the_middle(&dir);
    let (mut daemon, mut c) = serve(&dir, 3);
    commit(&mut c, &json!({"top-node": "n1"})).unwrap();
    until(&mut c, "j", "null");
    compare(&dir, &mut daemon, &mut c, "2.qcow2", &["2.qcow2", "0.qcow2"]);
}
