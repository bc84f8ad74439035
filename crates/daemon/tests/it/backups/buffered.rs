//! A buffered backup to a target that is far slower than the client: the client is not held up by it. Nothing here is about
//! time: what counts is how little has reached the target when the client has been answered everything.

use super::{backup, image, job, quit, raw_pair};
use crate::common::Dir;
use crate::disk::{tool, until};
use crate::mirrors::DISK;
use serde_json::json;

/// Bytes of the disk.
const SIZE: u64 = 8 << 20;
/// Bytes a second that the target takes: all of it would take two minutes.
const SPEED: u64 = 64 << 10;

#[test]
fn slow_target_does_not_hold_the_client_up() {
    let dir = Dir::new();
    let (mut daemon, mut c) = raw_pair(&dir);
    let group = json!({"qom-type": "throttle-group", "id": "slow", "limits": {"bps-write": SPEED}});
    c.command("object-add", group).unwrap();
    let slow = json!({"driver": "throttle", "node-name": "slow", "throttle-group": "slow", "file": "dst"});
    c.command("blockdev-add", slow).unwrap();
    tool(&dir, "qemu-img|create|-q|-f|qcow2|buf.qcow2|8M");
    let mut buffer = image("qcow2", "buf.qcow2");
    buffer["node-name"] = json!("buf");
    c.command("blockdev-add", buffer).unwrap();
    backup(&mut c, &json!({"target": "slow", "buffer": "buf"})).unwrap();

    // a part of every cluster, so that all old bytes have to be kept
    let writes: String = (0..SIZE >> 16).map(|i| format!("|-c|write -q -P 0x5b {}k 4k", i * 64)).collect();
    tool(&dir, &format!("qemu-io|-f|raw{writes}|{DISK}"));
    let now = job(&mut c);
    let (copied, kept) = (now["offset"].as_u64().unwrap(), now["buffered"].as_u64().unwrap());
    assert!(copied < SIZE / 2, "the client was answered when {copied} bytes had been copied");
    assert!(kept >= SIZE / 4, "{now}");

    tool(&dir, &format!("qemu-io|-f|raw{writes}|model.raw"));
    let free = json!({"path": "/objects/slow", "property": "limits", "value": {"bps-write": 0}});
    c.command("qom-set", free).unwrap();
    until(&mut c, "b", "BLOCK_JOB_COMPLETED");
    until(&mut c, "b", "null");
    quit(&dir, &mut daemon, &mut c, ("raw", "src.raw"));
    tool(&dir, "cmp|then.raw|dst.raw");
}
