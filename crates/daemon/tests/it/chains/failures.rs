//! What cannot be written or read: headers, bases, images that are committed; under each policy.

use super::{compare, header, images, job, served};
use crate::common::{Client, Daemon, Dir};
use crate::disk::until;
use crate::mirrors::{DISK, Writer};
use serde_json::{Value, json};

/// Four images as nodes `n0` to `n3`, with `rules` of blkdebug in front of the file of image `n`.
fn serve(dir: &Dir, n: usize, rules: &Value) -> (Daemon, Client) {
    images(dir, 4);
    let mut nodes = Vec::new();
    for i in 0..4 {
        let backing = if i > 0 { json!(format!("n{}", i - 1)) } else { Value::Null };
        let mut file = json!({"driver": "file", "filename": format!("{i}.qcow2"), "auto-read-only": true});
        if i == n {
            file["node-name"] = json!("plain");
            file["read-only"] = json!(false);
            file = json!({"driver": "blkdebug", "node-name": "debug", "image": file, "inject-error": rules});
            file["read-only"] = json!(false);
        }
        let mut node =
            json!({"driver": "qcow2", "node-name": format!("n{i}"), "backing": backing, "file": file});
        node["read-only"] = json!(i < 3);
        nodes.push(node);
    }
    served(dir, &nodes)
}

/// The error that the job ended with.
fn failed(c: &mut Client) -> String {
    until(c, "j", "concluded");
    let error = job(c)["error"].as_str().expect("it failed").to_owned();
    c.command("job-dismiss", json!({"id": "j"})).unwrap();
    error
}

fn backing_of(c: &mut Client, node: &str) -> Vec<String> {
    let graph = c.command("x-debug-query-block-graph", json!({})).unwrap();
    let nodes = graph["nodes"].as_array().unwrap().clone();
    let id = &nodes.iter().find(|n| n["name"] == node).unwrap()["id"];
    let edges = graph["edges"].as_array().unwrap();
    let below = edges.iter().filter(|e| &e["parent"] == id && e["name"] == "backing");
    below
        .map(|e| nodes.iter().find(|n| n["id"] == e["child"]).unwrap()["name"].as_str().unwrap().to_owned())
        .collect()
}

/// The overlay's header cannot be rewritten (QSD crashes after a commit, and after a stream cuts the chain): the job fails, and
/// everything is as it was; another attempt without the fault succeeds.
#[test]
fn headers_that_cannot_be_written() {
    let commit =
        json!({"job-id": "j", "device": "n3", "top-node": "n2", "base-node": "n0", "auto-dismiss": false});
    let stream = json!({"job-id": "j", "device": "n3", "base-node": "n0", "auto-dismiss": false});
    for (command, arguments) in [("block-commit", commit), ("block-stream", stream)] {
        let dir = Dir::new();
        let rules = json!([{"event": "none", "iotype": "write", "sector": 0, "errno": 5}]);
        let (mut daemon, mut c) = serve(&dir, 3, &rules);
        let writer = Writer::start(&dir, DISK, &["4", "400"]);
        c.command(command, arguments.clone()).unwrap();
        let error = failed(&mut c);
        assert!(error.contains("Input/output error"), "{command}: {error}");
        assert_eq!(backing_of(&mut c, "n3"), ["n2"], "{command}");
        assert_eq!(header(&dir, "3.qcow2"), (json!("2.qcow2"), json!("qcow2")), "{command}");
        let nodes = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
        let filters = ["commit_top", "copy-on-read"];
        assert!(!nodes.as_array().unwrap().iter().any(|n| filters.contains(&n["drv"].as_str().unwrap())));
        writer.stop();
        compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "2.qcow2", "1.qcow2", "0.qcow2"]);

        let (mut daemon, mut c) = super::serve(&dir, 4);
        c.command(command, arguments).unwrap();
        until(&mut c, "j", "concluded");
        assert_eq!(job(&mut c).get("error"), None);
        c.command("job-dismiss", json!({"id": "j"})).unwrap();
        assert_eq!(header(&dir, "3.qcow2"), (json!("0.qcow2"), json!("qcow2")));
        compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "0.qcow2"]);
    }
}

#[test]
fn change_backing_file_that_cannot_be_written() {
    let dir = Dir::new();
    let rules = json!([{"event": "none", "iotype": "write", "sector": 0, "errno": 5}]);
    let (mut daemon, mut c) = serve(&dir, 3, &rules);
    let a = json!({"device": "n3", "image-node-name": "n3", "backing-file": "zz"});
    let error = c.command("change-backing-file", a).unwrap_err();
    assert!(error.starts_with("Could not change backing file to 'zz': "), "{error}");
    assert_eq!(header(&dir, "3.qcow2"), (json!("2.qcow2"), json!("qcow2")));
    compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2"]);
}

/// One event of a failed request: what failed, and what is done about it.
fn error_event(c: &mut Client) -> (String, String) {
    loop {
        if let Some(at) = c.events.iter().position(|e| e["event"] == "BLOCK_JOB_ERROR") {
            let data = c.events.remove(at)["data"].clone();
            let text = |k: &str| data[k].as_str().unwrap().to_owned();
            return (text("operation"), text("action"));
        }
        let m = c.read().expect("an event");
        assert!(m.get("event").is_some(), "{m}");
        c.events.push(m);
    }
}

/// Which of the images fails, how, and the job that meets it.
const CASES: [(&str, usize, &str, &str); 3] = [
    ("block-commit", 2, "read", "read"),
    ("block-commit", 0, "write", "write"),
    // whatever fails: to the user of a stream it is a failure to read
    ("block-stream", 3, "write", "read"),
];

fn start(c: &mut Client, command: &str, policy: &Value) {
    let mut a = json!({"job-id": "j", "device": "n3", "base-node": "n0", "backing-file": "0.qcow2",
        "auto-dismiss": false});
    if command == "block-commit" {
        a["top-node"] = json!("n2");
    }
    for (k, v) in policy.as_object().unwrap() {
        a[k] = v.clone();
    }
    c.command(command, a).unwrap();
}

/// Where the first data of each image is in its file, and where the next cluster will be.
const FIRST: u64 = 0x5_0000;
const NEXT: u64 = 0x15_0000;

/// Fails one request of the job.
fn rules(kind: &str) -> Value {
    let sector = if kind == "read" { FIRST } else { NEXT } / 512;
    json!([{"event": "none", "iotype": kind, "sector": sector, "errno": 5, "once": true}])
}

#[test]
fn reported() {
    for (command, image, kind, operation) in CASES {
        let dir = Dir::new();
        let (mut daemon, mut c) = serve(&dir, image, &rules(kind));
        start(&mut c, command, &json!({}));
        assert_eq!(error_event(&mut c), (operation.to_owned(), "report".to_owned()), "{command} {kind}");
        assert!(failed(&mut c).contains("Input/output error"));
        assert_eq!(header(&dir, "3.qcow2").0, "2.qcow2");
        // again, without the fault
        start(&mut c, command, &json!({}));
        until(&mut c, "j", "concluded");
        assert_eq!(job(&mut c).get("error"), None, "{command} {kind}");
        compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "0.qcow2"]);
    }
}

#[test]
fn stopped_and_resumed() {
    for (command, image, kind, operation) in CASES {
        let dir = Dir::new();
        let (mut daemon, mut c) = serve(&dir, image, &rules(kind));
        start(&mut c, command, &json!({"on-error": "stop", "buf-size": 65536}));
        assert_eq!(error_event(&mut c), (operation.to_owned(), "stop".to_owned()), "{command} {kind}");
        until(&mut c, "j", "paused");
        assert_eq!(job(&mut c)["io-status"], "failed");
        let refused = c.command("block-job-cancel", json!({"device": "j"})).unwrap_err();
        assert_eq!(refused, "The block job for device 'j' is currently paused");
        c.command("job-resume", json!({"id": "j"})).unwrap();
        until(&mut c, "j", "concluded");
        let j = job(&mut c);
        assert_eq!((j.get("error"), &j["offset"]), (None, &j["len"]), "{command} {kind}");
        compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "0.qcow2"]);
    }
}

/// A commit tries again until it works; a stream leaves out what failed, goes to the end, and fails.
#[test]
fn ignored() {
    for (command, image, kind, operation) in CASES {
        let dir = Dir::new();
        let (mut daemon, mut c) = serve(&dir, image, &rules(kind));
        start(&mut c, command, &json!({"on-error": "ignore"}));
        assert_eq!(error_event(&mut c), (operation.to_owned(), "ignore".to_owned()), "{command} {kind}");
        until(&mut c, "j", "concluded");
        let j = job(&mut c);
        assert_eq!(j["offset"], j["len"]);
        let backing = if command == "block-commit" {
            assert_eq!(j.get("error"), None);
            "0.qcow2"
        } else {
            assert!(j["error"].as_str().unwrap().contains("Input/output error"));
            "2.qcow2"
        };
        assert_eq!(header(&dir, "3.qcow2").0, backing);
        compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "0.qcow2"]);
    }
}

/// The two sides of a commit under policies of their own.
#[test]
fn sides_apart() {
    for (image, kind, policy) in [(2, "read", "on-source-error"), (0, "write", "on-target-error")] {
        let dir = Dir::new();
        let (mut daemon, mut c) = serve(&dir, image, &rules(kind));
        start(&mut c, "block-commit", &json!({"on-error": "report", policy: "stop"}));
        assert_eq!(error_event(&mut c), (kind.to_owned(), "stop".to_owned()));
        until(&mut c, "j", "paused");
        c.command("job-resume", json!({"id": "j"})).unwrap();
        until(&mut c, "j", "concluded");
        assert_eq!(job(&mut c).get("error"), None);
        compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "0.qcow2"]);
    }
}
