//! Failing and hanging storage on either side, under each policy.

use super::{DISK, MODES, SIZE, Server, Writer, compare, image, job, mirror, model, pause, serve, verb};
use crate::common::{Client, Daemon, Dir};
use crate::disk::{tool, until};
use serde_json::{Value, json};

/// nbdkit fails every `call` with `error` while the file `fail` exists.
fn failing(dir: &Dir, call: &str, error: &str, file: &str) -> Server {
    let (socket, fail) = (dir.path("peer.sock"), dir.path("fail"));
    let line = format!(
        "nbdkit|-f|-U|{socket}|--filter=error|file|{file}|error-{call}={error}|error-{call}-rate=100%|error-{call}-file={fail}"
    );
    Server::start(dir, &line, "peer.sock")
}

fn peer() -> Value {
    json!({"driver": "nbd", "server": {"type": "unix", "path": "peer.sock"}})
}

fn event(c: &mut Client, name: &str) -> Value {
    until(c, "m", name);
    Value::Null
}

/// The next BLOCK_JOB_ERROR, which must be as described.
fn error(c: &mut Client, operation: &str, action: &str) {
    let seen = |e: &Value| {
        e["event"] == "BLOCK_JOB_ERROR"
            && e["data"]["operation"] == operation
            && e["data"]["action"] == action
    };
    loop {
        if let Some(at) = c.events.iter().position(&seen) {
            c.events.remove(at);
            return;
        }
        let m = c.read().expect("an event");
        assert!(m.get("event").is_some(), "{m}");
        c.events.push(m);
    }
}

/// The job's end. A write that failed before the peer was mended may be heard of only now: the job stops once more, and goes on.
fn ended(c: &mut Client) {
    loop {
        let m = if c.events.is_empty() { c.read().expect("an event") } else { c.events.remove(0) };
        match m["data"]["status"].as_str() {
            Some("null") if m["data"]["id"] == "m" => return,
            Some("standby") => drop(verb(c, "job-resume", "id")),
            _ => {}
        }
    }
}

/// A mirror with its target (or source) on the failing peer, failing from the start.
fn broken(target: bool, errno: &str, policy: &str, mode: &str) -> (Dir, Server, Daemon, Client) {
    let dir = Dir::new();
    model(&dir);
    tool(&dir, "cp|model.raw|src.raw");
    tool(&dir, "truncate|-s|8M|dst.raw");
    let (call, file) = if target { ("pwrite", "dst.raw") } else { ("pread", "src.raw") };
    let server = failing(&dir, call, errno, &dir.path(file));
    let (daemon, mut c) = if target {
        serve(&dir, &image("raw", "src.raw"), &peer())
    } else {
        serve(&dir, &peer(), &image("raw", "dst.raw"))
    };
    std::fs::write(dir.path("fail"), "").unwrap();
    let side = if target { "on-target-error" } else { "on-source-error" };
    mirror(&mut c, &json!({side: policy, "copy-mode": mode})).unwrap();
    (dir, server, daemon, c)
}

#[test]
fn reported() {
    for target in [true, false] {
        for (errno, policy) in [("EIO", "report"), ("ENOSPC", "report"), ("EIO", "enospc"), ("EIO", "auto")] {
            let (dir, _server, mut daemon, mut c) = broken(target, errno, policy, "background");
            error(&mut c, if target { "write" } else { "read" }, "report");
            loop {
                let completed = c.events.iter().find(|e| e["event"] == "BLOCK_JOB_COMPLETED").cloned();
                if let Some(e) = completed {
                    let why = e["data"]["error"].as_str().unwrap_or_default();
                    let want = if errno == "EIO" { "Input/output error" } else { "No space left on device" };
                    assert!(why.contains(want), "{why}");
                    break;
                }
                let m = c.read().unwrap();
                c.events.push(m);
            }
            event(&mut c, "null");
            std::fs::remove_file(dir.path("fail")).unwrap();
            Writer::start(&dir, DISK, &[]).stop(); // the client is served as before
            compare(&dir, &mut daemon, &mut c, "raw", "src.raw");
        }
    }
}

#[test]
fn stopped_and_resumed() {
    for target in [true, false] {
        for (errno, policy, status) in
            [("EIO", "stop", "failed"), ("ENOSPC", "stop", "nospace"), ("ENOSPC", "enospc", "nospace")]
        {
            let (dir, _server, mut daemon, mut c) = broken(target, errno, policy, "background");
            error(&mut c, if target { "write" } else { "read" }, "stop");
            event(&mut c, "paused");
            assert_eq!(job(&mut c)["io-status"], status);
            verb(&mut c, "job-resume", "id").unwrap(); // still failing: the same again
            error(&mut c, if target { "write" } else { "read" }, "stop");
            event(&mut c, "paused");
            std::fs::remove_file(dir.path("fail")).unwrap();
            verb(&mut c, "job-resume", "id").unwrap();
            event(&mut c, "BLOCK_JOB_READY");
            assert_eq!(job(&mut c)["io-status"], "ok");
            let writer = Writer::start(&dir, DISK, &[]);
            verb(&mut c, "job-complete", "id").unwrap();
            event(&mut c, "null");
            writer.stop();
            compare(&dir, &mut daemon, &mut c, "raw", "dst.raw");
        }
    }
}

#[test]
fn ignored_until_it_works() {
    for target in [true, false] {
        let (dir, _server, mut daemon, mut c) = broken(target, "EIO", "ignore", "background");
        error(&mut c, if target { "write" } else { "read" }, "ignore");
        pause(100);
        assert_eq!(job(&mut c)["status"], "running");
        std::fs::remove_file(dir.path("fail")).unwrap();
        event(&mut c, "BLOCK_JOB_READY");
        verb(&mut c, "job-complete", "id").unwrap();
        event(&mut c, "null");
        compare(&dir, &mut daemon, &mut c, "raw", "dst.raw");
    }
}

/// Once ready, a failing target never fails the client's writes: the job stops or ends instead.
#[test]
fn a_client_never_sees_the_targets_errors() {
    for mode in MODES {
        for policy in ["stop", "report"] {
            let dir = Dir::new();
            model(&dir);
            tool(&dir, "cp|model.raw|src.raw");
            tool(&dir, "truncate|-s|8M|dst.raw");
            let _server = failing(&dir, "pwrite", "EIO", &dir.path("dst.raw"));
            let (mut daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &peer());
            mirror(&mut c, &json!({"on-target-error": policy, "copy-mode": mode})).unwrap();
            event(&mut c, "BLOCK_JOB_READY");
            let writer = Writer::start(&dir, DISK, &[]);
            std::fs::write(dir.path("fail"), "").unwrap();
            error(&mut c, "write", policy);
            let file = if policy == "stop" {
                event(&mut c, "standby");
                std::fs::remove_file(dir.path("fail")).unwrap();
                verb(&mut c, "job-resume", "id").unwrap();
                event(&mut c, "ready");
                verb(&mut c, "job-complete", "id").unwrap();
                "dst.raw"
            } else {
                "src.raw"
            };
            ended(&mut c);
            pause(50);
            writer.stop();
            compare(&dir, &mut daemon, &mut c, "raw", file);
        }
    }
}

/// A target that stops answering: a forced cancel ends at once, and the client goes on.
#[test]
fn a_hanging_target_is_left() {
    for mode in MODES {
        let dir = Dir::new();
        model(&dir);
        tool(&dir, "cp|model.raw|src.raw");
        tool(&dir, "truncate|-s|8M|dst.raw");
        let server = failing(&dir, "pwrite", "EIO", &dir.path("dst.raw"));
        let (mut daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &peer());
        let writer = Writer::start(&dir, DISK, &[]);
        mirror(&mut c, &json!({"copy-mode": mode})).unwrap();
        event(&mut c, "BLOCK_JOB_READY");
        server.signal("STOP");
        pause(300);
        let begin = std::time::Instant::now();
        c.command("block-job-cancel", json!({"device": "m", "force": true})).unwrap();
        event(&mut c, "BLOCK_JOB_CANCELLED");
        event(&mut c, "null");
        assert!(begin.elapsed().as_secs() < 5, "{mode}: {:?}", begin.elapsed());
        pause(100);
        writer.stop();
        server.signal("CONT");
        compare(&dir, &mut daemon, &mut c, "raw", "src.raw");
    }
}

/// A file system that is full, and then is not.
#[test]
fn a_full_file_system() {
    let dir = Dir::new();
    model(&dir);
    tool(&dir, "cp|model.raw|src.raw");
    std::fs::create_dir(dir.path("small")).unwrap();
    let small = dir.path("small");
    tool(&dir, &format!("mount|-t|tmpfs|-o|size=3m|none|{small}"));
    struct Mounted(String);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount").args(["-l", &self.0]).status();
        }
    }
    let mounted = Mounted(small.clone());
    tool(&dir, "truncate|-s|8M|small/dst.raw");
    let (mut daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &image("raw", "small/dst.raw"));
    mirror(&mut c, &json!({"on-target-error": "enospc"})).unwrap();
    error(&mut c, "write", "stop");
    event(&mut c, "paused");
    assert_eq!(job(&mut c)["io-status"], "nospace");
    let writer = Writer::start(&dir, DISK, &[]);
    tool(&dir, &format!("mount|-o|remount,size=20m|{small}"));
    verb(&mut c, "job-resume", "id").unwrap();
    event(&mut c, "BLOCK_JOB_READY");
    verb(&mut c, "job-complete", "id").unwrap();
    event(&mut c, "null");
    writer.stop();
    compare(&dir, &mut daemon, &mut c, "raw", "small/dst.raw");
    assert_eq!(std::fs::metadata(dir.path("small/dst.raw")).unwrap().len(), SIZE as u64);
    drop(mounted);
}
