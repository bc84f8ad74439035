//! What a manager that was not there reads afterwards: events by number, jobs that are over; also across restarts.

use crate::common::{Client, Daemon, Dir};
use crate::disk::{tool, until};
use serde_json::{Value, json};

/// A mirror from start to end.
fn work(c: &mut Client, id: &str) {
    let a = json!({"job-id": id, "device": "src", "target": "dst", "sync": "full"});
    c.command("blockdev-mirror", a).unwrap();
    until(c, id, "BLOCK_JOB_READY");
    c.command("block-job-cancel", json!({"device": id})).unwrap();
    until(c, id, "null");
}

fn started(dir: &Dir, more: &[&str]) -> Daemon {
    for name in ["src.raw", "dst.raw"] {
        tool(dir, &format!("truncate|-s|1M|{name}"));
    }
    let node = |name: &str| format!("driver=file,node-name={name},filename={name}.raw");
    let (src, dst) = (node("src"), node("dst"));
    Daemon::start(dir, &[more, &["--blockdev", &src, "--blockdev", &dst]].concat())
}

fn events(c: &mut Client, arguments: Value) -> Value {
    c.command("query-events", arguments).unwrap()
}

#[test]
fn events_are_read_again_by_number() {
    let dir = Dir::new();
    let daemon = started(&dir, &[]);
    let mut c = daemon.client();
    let begun = events(&mut c, json!({"max": 0}))["newest"].as_u64().unwrap();
    work(&mut c, "a");
    drop(c);
    // nobody was there for this one's end
    let mut c = daemon.client();
    let a = json!({"job-id": "b", "device": "src", "target": "dst", "sync": "full", "speed": 1});
    c.command("blockdev-mirror", a).unwrap();
    c.send(b"{\"execute\":\"job-cancel\",\"arguments\":{\"id\":\"b\"}}");
    drop(c);
    let mut c = daemon.client();
    let all = loop {
        let all = events(&mut c, json!({"since": begun}));
        if all["events"].as_array().unwrap().iter().any(|e| e["data"] == json!({"status": "null", "id": "b"}))
        {
            break all;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    assert_eq!((&all["missed"], &all["oldest"]), (&json!(0), &json!(1)));
    let list = all["events"].as_array().unwrap();
    for (e, n) in list.iter().zip(begun + 1..) {
        assert_eq!(e["seq"], n);
        assert!(e["timestamp"]["seconds"].as_u64().unwrap() > 1_700_000_000, "{e}");
    }
    assert!(list.iter().any(|e| e["event"] == "BLOCK_JOB_CANCELLED" && e["data"]["device"] == "b"));
    drop(c);
    // the numbers come with the events for those who want them, and to nobody else
    let mut numbered = Client::connect(&daemon.socket);
    assert_eq!(numbered.greeting["QMP"]["capabilities"], json!(["oob"]), "as QSD's");
    numbered.command("qmp_capabilities", json!({"enable": ["event-seq"]})).unwrap();
    work(&mut numbered, "c");
    let newest = events(&mut numbered, json!({"max": 0}))["newest"].clone();
    assert!(newest.as_u64() > list.last().unwrap()["seq"].as_u64());
    numbered.command("job-cancel", json!({"id": "nobody"})).unwrap_err();
    let resize = json!({"job-id": "d", "device": "src", "target": "dst", "sync": "none"});
    numbered.command("blockdev-mirror", resize).unwrap();
    let last = numbered.events.last().unwrap().clone();
    assert!(last["seq"].as_u64() > newest.as_u64() && last["event"] == "JOB_STATUS_CHANGE", "{last}");
    drop(numbered);
    let mut c = daemon.client();
    c.command("job-cancel", json!({"id": "d"})).unwrap();
    until(&mut c, "d", "BLOCK_JOB_CANCELLED");
    until(&mut c, "d", "null");
    let a = json!({"job-id": "e", "device": "src", "target": "dst", "sync": "none"});
    c.events.clear();
    c.command("blockdev-mirror", a).unwrap();
    assert!(!c.events.is_empty() && c.events.iter().all(|e| e.get("seq").is_none()), "not asked for");
    let future = c.command("query-events", json!({"since": 100_000})).unwrap_err();
    assert!(future.starts_with("There is no number 100000 yet"), "{future}");
}

#[test]
fn finished_jobs_can_be_asked_for() {
    let dir = Dir::new();
    let daemon = started(&dir, &[]);
    let mut c = daemon.client();
    work(&mut c, "a");
    work(&mut c, "b");
    let log = c.command("query-job-log", json!({})).unwrap();
    let jobs = log["jobs"].as_array().unwrap();
    assert_eq!((&log["newest"], jobs.len()), (&json!(2), 2));
    let a = &jobs[0];
    assert_eq!((&a["id"], &a["type"], &a["outcome"]), (&json!("a"), &json!("mirror"), &json!("completed")));
    assert_eq!(a["nodes"][1], json!({"role": "target", "node-name": "dst"}));
    assert!(a["ended"]["seconds"].as_u64() >= a["began"]["seconds"].as_u64() && a["copied"].is_u64(), "{a}");
    assert_eq!((&a["len"], a.get("error"), a.get("link-losses")), (&a["offset"], None, None), "{a}");
    let b = c.command("query-job-log", json!({"id": "b"})).unwrap();
    assert_eq!(b["jobs"].as_array().unwrap().len(), 1);
    assert_eq!(c.command("query-job-log", json!({"since": 2})).unwrap()["jobs"], json!([]));
    let create = json!({"job-id": "x", "options": {"driver": "file", "filename": "/nowhere/x", "size": 1}});
    c.command("blockdev-create", create).unwrap();
    until(&mut c, "x", "concluded");
    let x = c.command("query-job-log", json!({"since": 2})).unwrap()["jobs"][0].clone();
    assert_eq!((&x["outcome"], &x["seq"]), (&json!("failed"), &json!(3)));
    assert!(x["error"].as_str().unwrap().contains("No such file"), "{x}");
}

#[test]
fn the_record_survives_restarts() {
    let dir = Dir::new();
    let state = dir.path("state");
    let options = ["--state-dir", state.as_str()];
    let mut daemon = started(&dir, &options);
    let mut c = daemon.client();
    work(&mut c, "a");
    let before = events(&mut c, json!({}));
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
    // in order: not a number is lost
    let mut daemon = started(&dir, &options);
    let mut c = daemon.client();
    let after = events(&mut c, json!({}));
    assert_eq!(before["record"], after["record"]);
    let (was, is) = (before["events"].as_array().unwrap(), after["events"].as_array().unwrap());
    assert_eq!(was[..], is[..was.len()]);
    let seen: Vec<u64> = is.iter().map(|e| e["seq"].as_u64().unwrap()).collect();
    assert_eq!(seen, (1..=seen.len() as u64).collect::<Vec<_>>());
    assert_eq!(c.command("query-job-log", json!({})).unwrap()["jobs"][0]["id"], "a");
    work(&mut c, "b");
    let newest = events(&mut c, json!({"max": 0}))["newest"].as_u64().unwrap();
    daemon.signal("KILL");
    daemon.child.wait().unwrap();
    // killed: what was written shortly before may be gone, but its numbers are not given again
    let daemon = started(&dir, &options);
    let mut c = daemon.client();
    work(&mut c, "c");
    let later = events(&mut c, json!({"since": newest}));
    assert!(later["events"][0]["seq"].as_u64().unwrap() > newest, "{later}");
    assert_eq!(later["record"], before["record"]);
    let ids: Vec<Value> = {
        let log = c.command("query-job-log", json!({})).unwrap();
        log["jobs"].as_array().unwrap().iter().map(|j| j["id"].clone()).collect()
    };
    assert!(ids.first() == Some(&json!("a")) && ids.last() == Some(&json!("c")), "{ids:?}");
}
