//! Commits of an image below the active one that somebody writes to: its writer goes on with the base, and the images over it with him.

use super::{compare, header, images, is_open_for_writing, job, served, shorter_in_the_middle};
use crate::common::{Client, Daemon, Dir};
use crate::disk::{tool, until};
use crate::mirrors::{DISK, Writer};
use serde_json::{Value, json};

fn file(name: &str, read_only: bool) -> Value {
    json!({"driver": "file", "filename": name, "read-only": read_only, "auto-read-only": true})
}

/// Images `0.qcow2` to `2.qcow2` as nodes `n0` to `n2`. The middle one is served as "disk", the others are read-only; the file of the top one
/// is `above`.
fn serve(dir: &Dir, above: &Value) -> (Daemon, Client) {
    let nodes = [
        json!({"driver": "qcow2", "node-name": "n0", "read-only": true, "file": file("0.qcow2", true), "backing": null}),
        json!({"driver": "qcow2", "node-name": "n1", "file": file("1.qcow2", false), "backing": "n0"}),
    ];
    let (daemon, mut c) = served(dir, &nodes);
    let top =
        json!({"driver": "qcow2", "node-name": "n2", "read-only": true, "file": above, "backing": "n1"});
    c.command("blockdev-add", top).unwrap();
    let export = json!({"type": "nbd", "id": "e1", "node-name": "n2", "name": "above"});
    c.command("block-export-add", export).unwrap();
    (daemon, c)
}

fn commit(c: &mut Client, more: &Value) -> Result<Value, String> {
    let mut a =
        json!({"job-id": "j", "device": "n2", "top-node": "n1", "base-node": "n0", "auto-dismiss": false});
    for (k, v) in more.as_object().unwrap() {
        a[k] = v.clone();
    }
    c.command("block-commit", a)
}

/// Whose disk the client's is.
fn served_by(c: &mut Client) -> Value {
    let exports = c.command("query-block-exports", json!({})).unwrap();
    exports.as_array().unwrap().iter().find(|e| e["id"] == "e0").unwrap()["node-name"].clone()
}

/// Under a client, in each copy mode, with all compared; what is above is read-only, and is so again.
#[test]
fn its_writer_goes_on_with_the_base() {
    for mode in ["background", "write-blocking"] {
        let dir = Dir::new();
        images(&dir, 2);
        tool(&dir, "qemu-img|create|-q|-f|qcow2|-b|1.qcow2|-F|qcow2|2.qcow2|8M");
        let (mut daemon, mut c) = serve(&dir, &file("2.qcow2", true));
        let writer = Writer::start(&dir, DISK, &["4", "400"]);
        let why = commit(&mut c, &json!({"backing-file": "x"})).unwrap_err();
        assert!(why.contains("'backing-file' specified, but 'top' has a writer on it"), "{why}");
        commit(&mut c, &json!({"copy-mode": mode, "verify": "full"})).unwrap();
        until(&mut c, "j", "BLOCK_JOB_READY");
        assert_eq!(job(&mut c)["type"], "commit");
        c.command("job-complete", json!({"id": "j"})).unwrap();
        until(&mut c, "j", "concluded");
        assert_eq!(job(&mut c).get("error"), None);
        assert_eq!(served_by(&mut c), "n0");
        assert!(is_open_for_writing(&mut c, "n0") && !is_open_for_writing(&mut c, "n2"), "{mode}");
        assert_eq!(header(&dir, "2.qcow2"), (json!("0.qcow2"), json!("qcow2")));
        writer.stop();
        compare(&dir, &mut daemon, &mut c, "2.qcow2", &["2.qcow2", "0.qcow2"]);
        tool(&dir, "qemu-img|compare|-f|raw|-F|qcow2|model.raw|0.qcow2");
    }
}

/// Called off, or with a header that cannot be written: everybody stays, and another attempt succeeds.
#[test]
fn or_stays_where_he_was() {
    let dir = Dir::new();
    images(&dir, 2);
    tool(&dir, "qemu-img|create|-q|-f|qcow2|-b|1.qcow2|-F|qcow2|2.qcow2|8M");
    let debug = json!({"driver": "blkdebug", "node-name": "debug", "image": file("2.qcow2", false),
        "inject-error": [{"event": "none", "iotype": "write", "sector": 0, "errno": 5}]});
    let (mut daemon, mut c) = serve(&dir, &debug);
    let writer = Writer::start(&dir, DISK, &["4", "400"]);
    for complete in [false, true] {
        commit(&mut c, &json!({})).unwrap();
        until(&mut c, "j", "BLOCK_JOB_READY");
        let end = if complete { "job-complete" } else { "job-cancel" };
        c.command(end, json!({"id": "j"})).unwrap();
        until(&mut c, "j", "concluded");
        let error = job(&mut c)["error"].as_str().unwrap_or_default().to_owned();
        assert!(!complete || error.contains("Input/output error"), "{error}");
        c.command("job-dismiss", json!({"id": "j"})).unwrap();
        assert_eq!(served_by(&mut c), "n1");
        assert!(!is_open_for_writing(&mut c, "n0") && !is_open_for_writing(&mut c, "n2"));
        assert_eq!(header(&dir, "2.qcow2"), (json!("1.qcow2"), json!("qcow2")));
    }
    writer.stop();
    compare(&dir, &mut daemon, &mut c, "2.qcow2", &["2.qcow2", "1.qcow2", "0.qcow2"]);
    let (mut daemon, mut c) = serve(&dir, &file("2.qcow2", true));
    commit(&mut c, &json!({})).unwrap();
    until(&mut c, "j", "BLOCK_JOB_READY");
    c.command("job-complete", json!({"id": "j"})).unwrap();
    until(&mut c, "j", "concluded");
    assert_eq!(header(&dir, "2.qcow2"), (json!("0.qcow2"), json!("qcow2")));
    compare(&dir, &mut daemon, &mut c, "2.qcow2", &["2.qcow2", "0.qcow2"]);
}

/// Of two images above one cannot be opened for writing: neither header is touched.
#[test]
fn one_header_of_two_that_cannot_be_written() {
    let dir = Dir::new();
    images(&dir, 2);
    for n in [2, 3] {
        tool(&dir, &format!("qemu-img|create|-q|-f|qcow2|-b|1.qcow2|-F|qcow2|{n}.qcow2|8M"));
    }
    let (mut daemon, mut c) = serve(&dir, &file("2.qcow2", true));
    let closed = json!({"driver": "file", "filename": "3.qcow2", "read-only": true});
    let other =
        json!({"driver": "qcow2", "node-name": "n3", "read-only": true, "file": closed, "backing": "n1"});
    c.command("blockdev-add", other).unwrap();
    let writer = Writer::start(&dir, DISK, &["4", "400"]);
    commit(&mut c, &json!({})).unwrap();
    until(&mut c, "j", "BLOCK_JOB_READY");
    c.command("job-complete", json!({"id": "j"})).unwrap();
    until(&mut c, "j", "concluded");
    assert!(job(&mut c)["error"].as_str().unwrap().contains("read-only"));
    assert_eq!(served_by(&mut c), "n1");
    for image in ["2.qcow2", "3.qcow2"] {
        assert_eq!(header(&dir, image), (json!("1.qcow2"), json!("qcow2")));
    }
    writer.stop();
    compare(&dir, &mut daemon, &mut c, "2.qcow2", &["3.qcow2", "2.qcow2", "1.qcow2"]);
}

/// A daemon that is killed when it has named the base in the header above, and has not moved the writer yet: what is written afterwards is in
/// the image alone, and the header names that again.
#[test]
fn killed_between_the_header_and_the_change() {
    let dir = Dir::new();
    images(&dir, 2);
    tool(&dir, "qemu-img|create|-q|-f|qcow2|-b|1.qcow2|-F|qcow2|2.qcow2|8M");
    let start = || Daemon::start(&dir, &["--state-dir", "state"]);
    let daemon = start();
    let mut c = daemon.client();
    let chain = [
        json!({"driver": "qcow2", "node-name": "n0", "read-only": true, "file": file("0.qcow2", true), "backing": null}),
        json!({"driver": "qcow2", "node-name": "n1", "file": file("1.qcow2", false), "backing": "n0"}),
        json!({"driver": "qcow2", "node-name": "n2", "read-only": true, "file": file("2.qcow2", true), "backing": "n1"}),
    ];
    for node in chain {
        c.command("blockdev-add", node).unwrap();
    }
    let server = json!({"addr": {"type": "unix", "data": {"path": "nbd.sock"}}});
    c.command("nbd-server-start", server).unwrap();
    let export = json!({"type": "nbd", "id": "e0", "node-name": "n1", "name": "disk", "writable": true});
    c.command("block-export-add", export).unwrap();
    commit(&mut c, &json!({})).unwrap();
    until(&mut c, "j", "BLOCK_JOB_READY");
    drop(daemon);
    tool(&dir, "qemu-img|rebase|-u|-f|qcow2|-b|0.qcow2|-F|qcow2|2.qcow2");
    let mut daemon = start();
    let mut c = daemon.client();
    let names = |image: &str| header(&dir, "2.qcow2").0.as_str().unwrap().ends_with(image);
    assert!(names("/1.qcow2"));
    let writer = Writer::start(&dir, DISK, &["4", "400"]);
    // ready again
    while job(&mut c)["ready"] != true {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    c.command("job-complete", json!({"id": "j"})).unwrap();
    while job(&mut c)["status"] != "concluded" {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(served_by(&mut c), "n0");
    assert!(names("/0.qcow2"));
    writer.stop();
    compare(&dir, &mut daemon, &mut c, "2.qcow2", &["2.qcow2", "0.qcow2"]);
}

/// What a longer base has behind the end of the image was hidden from those above, and stays so.
#[test]
fn a_longer_base_shows_no_more_than_before() {
    let dir = Dir::new();
    shorter_in_the_middle(&dir);
    let (mut daemon, mut c) = serve(&dir, &file("2.qcow2", true));
    commit(&mut c, &json!({})).unwrap();
    until(&mut c, "j", "BLOCK_JOB_READY");
    c.command("job-complete", json!({"id": "j"})).unwrap();
    until(&mut c, "j", "concluded");
    assert_eq!(job(&mut c).get("error"), None);
    compare(&dir, &mut daemon, &mut c, "2.qcow2", &["2.qcow2", "0.qcow2"]);
}
