//! Streams: of the whole chain, of a part of it, into an image inside it.

use super::{compare, header, images, job, serve};
use crate::common::{Client, Dir};
use crate::disk::{tool, until};
use crate::mirrors::{DISK, Writer};
use serde_json::{Value, json};

fn stream(c: &mut Client, more: &Value) -> Result<Value, String> {
    let mut a = json!({"job-id": "j", "device": "n3"});
    for (k, v) in more.as_object().unwrap() {
        a[k] = v.clone();
    }
    c.command("block-stream", a)
}

/// Everything comes up under a writing client; the image stands alone afterwards.
#[test]
fn flat_under_a_client() {
    let dir = Dir::new();
    images(&dir, 4);
    let (mut daemon, mut c) = serve(&dir, 4);
    let writer = Writer::start(&dir, DISK, &["4", "400"]);
    stream(&mut c, &json!({"speed": 1 << 20, "filter-node-name": "cor"})).unwrap();
    assert_eq!(job(&mut c)["len"], 8 << 20);
    c.command("job-pause", json!({"id": "j"})).unwrap();
    until(&mut c, "j", "paused");
    c.command("job-resume", json!({"id": "j"})).unwrap();
    c.command("block-job-set-speed", json!({"device": "j", "speed": 0})).unwrap();
    until(&mut c, "j", "null");
    writer.stop();
    for node in ["n2", "n1", "n0"] {
        c.command("blockdev-del", json!({"node-name": node})).unwrap();
    }
    assert_eq!(header(&dir, "3.qcow2"), (Value::Null, Value::Null));
    compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2"]);
}

/// Down to a base, which stays the backing file, by any of the three ways to say so.
#[test]
fn above_a_base() {
    for (name, value) in [("base-node", "n0"), ("bottom", "n1"), ("base", "0.qcow2")] {
        let dir = Dir::new();
        images(&dir, 4);
        let (mut daemon, mut c) = serve(&dir, 4);
        let writer = Writer::start(&dir, DISK, &["4", "400"]);
        stream(&mut c, &json!({name: value, "speed": 4 << 20})).unwrap();
        until(&mut c, "j", "null");
        writer.stop();
        assert_eq!(header(&dir, "3.qcow2"), (json!("0.qcow2"), json!("qcow2")), "{name}");
        compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "0.qcow2"]);
    }
}

/// Into a read-only image inside the chain: opened for it, and read-only again.
#[test]
fn into_the_middle() {
    let dir = Dir::new();
    images(&dir, 4);
    let (mut daemon, mut c) = serve(&dir, 4);
    let writer = Writer::start(&dir, DISK, &["4", "400"]);
    stream(&mut c, &json!({"device": "n2", "base-node": "n0"})).unwrap();
    until(&mut c, "j", "null");
    writer.stop();
    assert_eq!(header(&dir, "2.qcow2"), (json!("0.qcow2"), json!("qcow2")));
    assert_eq!(header(&dir, "3.qcow2"), (json!("2.qcow2"), json!("qcow2")));
    compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "2.qcow2", "0.qcow2"]);
}

/// Cancelled, then begun again: what is there already is not fetched again.
#[test]
fn cancelled_and_repeated() {
    let dir = Dir::new();
    images(&dir, 4);
    let (mut daemon, mut c) = serve(&dir, 4);
    let writer = Writer::start(&dir, DISK, &["4", "400"]);
    stream(&mut c, &json!({"speed": 2 << 20})).unwrap();
    while job(&mut c)["offset"].as_u64().unwrap() < 1 << 20 {}
    c.command("job-cancel", json!({"id": "j"})).unwrap();
    until(&mut c, "j", "null");
    assert_eq!(header(&dir, "3.qcow2"), (json!("2.qcow2"), json!("qcow2")));
    stream(&mut c, &json!({})).unwrap();
    until(&mut c, "j", "null");
    writer.stop();
    assert_eq!(header(&dir, "3.qcow2"), (Value::Null, Value::Null));
    compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2"]);
}

/// Nothing to do is done at once.
#[test]
fn nothing_to_stream() {
    let dir = Dir::new();
    images(&dir, 2);
    let (mut daemon, mut c) = serve(&dir, 2);
    let a = json!({"job-id": "j", "device": "n1", "bottom": "n1", "auto-dismiss": false});
    c.command("block-stream", a).unwrap();
    until(&mut c, "j", "concluded");
    let j = job(&mut c);
    assert_eq!((&j["len"], &j["offset"], j.get("error")), (&json!(0), &json!(0), None));
    c.command("job-dismiss", json!({"id": "j"})).unwrap();
    assert_eq!(header(&dir, "1.qcow2"), (json!("0.qcow2"), json!("qcow2")));
    tool(&dir, "qemu-img|compare|-U|-f|raw|-F|qcow2|model.raw|1.qcow2");
    compare(&dir, &mut daemon, &mut c, "1.qcow2", &["1.qcow2"]);
}

/// Streamed and committed with verification, under a client: what was copied is read again and is what it was.
#[test]
fn proven_to_show_what_it_showed() {
    for (command, arguments) in [
        ("block-stream", json!({"job-id": "j", "device": "n3", "base-node": "n0", "verify": "full"})),
        (
            "block-commit",
            json!({"job-id": "j", "device": "n3", "top-node": "n2", "base-node": "n0", "verify": "full"}),
        ),
    ] {
        let dir = Dir::new();
        images(&dir, 4);
        let (mut daemon, mut c) = serve(&dir, 4);
        let writer = Writer::start(&dir, DISK, &["4", "400"]);
        c.command(command, arguments).unwrap();
        let done = crate::mirrors::proofs::event(&mut c, "BLOCK_JOB_COMPLETED");
        assert_eq!(done.get("error"), None, "{command}: {done}");
        let proof = &done["verify"];
        assert_eq!((&proof["mismatches"], &proof["remaining-bytes"]), (&json!(0), &json!(0)), "{done}");
        assert!(proof["verified-bytes"].as_u64() > Some(0), "{done}");
        assert_eq!(proof.get("digest").is_some(), command == "block-commit", "{done}");
        until(&mut c, "j", "null");
        writer.stop();
        compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "0.qcow2"]);
    }
}
