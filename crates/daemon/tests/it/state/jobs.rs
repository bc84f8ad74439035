//! Jobs of a daemon that is killed: they are there again, in the state they had, and come to their end.

use super::{start, tool};
use crate::common::{Client, Daemon, Dir};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A raw disk with content, a target of its size, and a daemon that serves the disk.
pub(super) fn served(dir: &Dir) -> Daemon {
    tool(dir, "qemu-img", &["create", "-q", "-f", "raw", "src.raw", "8M"]);
    tool(dir, "qemu-io", &["-f", "raw", "-c", "write -P 7 0 6M", "src.raw"]);
    tool(dir, "qemu-img", &["create", "-q", "-f", "raw", "dst.raw", "8M"]);
    let daemon = start(dir, &[]);
    let mut c = daemon.client();
    for name in ["src", "dst"] {
        let file = dir.path(&format!("{name}.raw"));
        let add = json!({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": file}});
        c.command("blockdev-add", add).unwrap();
    }
    c.command("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": dir.path("nbd.sock")}}}))
        .unwrap();
    let export = json!({"type": "nbd", "id": "e", "node-name": "src", "name": "disk", "writable": true});
    c.command("block-export-add", export).unwrap();
    daemon
}

pub(super) fn killed(dir: &Dir, daemon: Daemon) -> Daemon {
    drop(daemon);
    start(dir, &[])
}

fn job(c: &mut Client) -> Value {
    c.command("query-block-jobs", json!({})).unwrap()[0].clone()
}

/// Waits until the one job is in this state; `""`: until there is none.
pub(super) fn reaches(c: &mut Client, status: &str) -> Value {
    let begin = Instant::now();
    loop {
        let jobs = c.command("query-jobs", json!({})).unwrap();
        let now = jobs.as_array().unwrap().first().cloned().unwrap_or(json!({"status": ""}));
        if now["status"] == status {
            return now;
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "the job is {now}, not {status}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const MIRROR: &str = r#"{"job-id": "j", "device": "src", "target": "dst", "sync": "full"}"#;

fn with(base: &str, more: &Value) -> Value {
    let mut out: Value = serde_json::from_str(base).unwrap();
    out.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    out
}

#[test]
fn a_mirror_goes_on_as_it_was() {
    let dir = Dir::new();
    let mut daemon = served(&dir);
    let mut c = daemon.client();
    c.command("blockdev-mirror", with(MIRROR, &json!({"speed": 1 << 20, "buf-size": 1 << 16}))).unwrap();
    c.command("block-job-set-speed", json!({"device": "j", "speed": 12345})).unwrap();
    c.command("block-job-change", json!({"id": "j", "type": "mirror", "copy-mode": "write-blocking"}))
        .unwrap();
    c.command("job-pause", json!({"id": "j"})).unwrap();
    reaches(&mut c, "paused");
    for _ in 0..2 {
        drop(c);
        daemon = killed(&dir, daemon);
        c = daemon.client();
        let now = reaches(&mut c, "paused");
        assert!(now["resumed"].as_str().unwrap().contains("goes on after a restart"), "{now}");
        assert_eq!(job(&mut c)["speed"], 12345);
    }
    c.command("block-job-set-speed", json!({"device": "j", "speed": 0})).unwrap();
    c.command("job-resume", json!({"id": "j"})).unwrap();
    reaches(&mut c, "ready");
    // what is written now goes to both at once, as it was told
    let uri = "nbd+unix:///disk?socket=nbd.sock";
    tool(&dir, "qemu-io", &["-f", "raw", "-c", "write -P 9 1M 64k", uri]);
    assert_eq!(job(&mut c)["actively-synced"], true);
    drop(c);
    daemon = killed(&dir, daemon);
    c = daemon.client();
    reaches(&mut c, "ready");
    c.command("job-complete", json!({"id": "j"})).unwrap();
    reaches(&mut c, "");
    drop(c);
    let daemon = killed(&dir, daemon);
    let mut c = daemon.client();
    assert_eq!(c.command("query-jobs", json!({})).unwrap(), json!([]));
    assert_eq!(c.command("query-block-exports", json!({})).unwrap()[0]["node-name"], "dst");
    tool(&dir, "qemu-io", &["-f", "raw", "-c", "read -P 9 1M 64k", "-c", "read -P 7 2M 4M", uri]);
}

#[test]
fn a_job_waits_for_its_manager_as_before() {
    let dir = Dir::new();
    let daemon = served(&dir);
    let mut c = daemon.client();
    let manual = json!({"auto-finalize": false, "auto-dismiss": false});
    c.command("blockdev-backup", with(MIRROR, &manual)).unwrap();
    reaches(&mut c, "pending");
    drop(c);
    super::instants::until_kept(&dir);
    let daemon = killed(&dir, daemon);
    let mut c = daemon.client();
    let now = reaches(&mut c, "pending");
    assert!(now["resumed"].as_str().unwrap().contains("as of its start"), "{now}");
    c.command("job-finalize", json!({"id": "j"})).unwrap();
    let before = reaches(&mut c, "concluded");
    drop(c);
    let daemon = killed(&dir, daemon);
    let mut c = daemon.client();
    let after = reaches(&mut c, "concluded");
    assert_eq!(before["total-progress"], after["total-progress"]);
    assert_eq!(after.get("error"), None);
    c.command("job-dismiss", json!({"id": "j"})).unwrap();
    drop(c);
    let daemon = killed(&dir, daemon);
    assert_eq!(daemon.client().command("query-jobs", json!({})).unwrap(), json!([]));
    tool(&dir, "qemu-img", &["compare", "-U", "-f", "raw", "-F", "raw", "src.raw", "dst.raw"]);
}

#[test]
fn a_failure_is_not_forgotten_and_a_stopped_job_stays_stopped() {
    let dir = Dir::new();
    let daemon = served(&dir);
    let mut c = daemon.client();
    let broken = json!({"driver": "blkdebug", "node-name": "bad", "image": "dst",
        "inject-error": [{"event": "none", "iotype": "write", "errno": 5, "once": false}]});
    c.command("blockdev-add", broken).unwrap();
    let more = json!({"target": "bad", "auto-dismiss": false});
    c.command("blockdev-mirror", with(MIRROR, &more)).unwrap();
    let error = reaches(&mut c, "concluded")["error"].clone();
    assert!(error.is_string());
    drop(c);
    let daemon = killed(&dir, daemon);
    let mut c = daemon.client();
    assert_eq!(reaches(&mut c, "concluded")["error"], error);
    c.command("job-dismiss", json!({"id": "j"})).unwrap();
    c.command("blockdev-mirror", with(MIRROR, &json!({"target": "bad", "on-target-error": "stop"}))).unwrap();
    c.event("BLOCK_JOB_ERROR");
    reaches(&mut c, "paused");
    drop(c);
    let daemon = killed(&dir, daemon);
    let mut c = daemon.client();
    reaches(&mut c, "paused");
    c.command("block-job-cancel", json!({"device": "j", "force": true})).unwrap();
    reaches(&mut c, "");
    drop(c);
    let daemon = killed(&dir, daemon);
    assert_eq!(daemon.client().command("query-jobs", json!({})).unwrap(), json!([]));
}

#[test]
fn jobs_that_made_their_images_and_those_of_transactions_are_there_again() {
    let dir = Dir::new();
    let daemon = served(&dir);
    let mut c = daemon.client();
    let drive = json!({"job-id": "j", "device": "src", "target": dir.path("made.qcow2"), "format": "qcow2", "sync": "full",
        "speed": 1 << 20});
    c.command("drive-mirror", drive).unwrap();
    drop(c);
    let daemon = killed(&dir, daemon);
    let mut c = daemon.client();
    assert_eq!(job(&mut c)["device"], "j");
    c.command("block-job-set-speed", json!({"device": "j", "speed": 0})).unwrap();
    reaches(&mut c, "ready");
    c.command("block-job-cancel", json!({"device": "j"})).unwrap();
    reaches(&mut c, "");
    tool(&dir, "qemu-img", &["compare", "-U", "-f", "raw", "-F", "qcow2", "src.raw", "made.qcow2"]);
    let action = with(MIRROR, &json!({"speed": 1 << 18}));
    let actions = json!([{"type": "blockdev-backup", "data": action}]);
    c.command("transaction", json!({"actions": actions})).unwrap();
    drop(c);
    let daemon = killed(&dir, daemon);
    let mut c = daemon.client();
    assert_eq!((&job(&mut c)["type"], &job(&mut c)["speed"]), (&json!("backup"), &json!(1 << 18)));
    c.command("block-job-set-speed", json!({"device": "j", "speed": 0})).unwrap();
    reaches(&mut c, "");
    tool(&dir, "qemu-img", &["compare", "-U", "-f", "raw", "-F", "raw", "src.raw", "dst.raw"]);
    assert_eq!(c.command("query-state", json!({})).unwrap()["broken"], json!([]));
}
