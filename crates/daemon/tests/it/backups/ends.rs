//! How backups end: errors of either side, cancel, pause, a peer that hangs or is full, several at once.

use super::{DISK, Writer, backup, image, job, model, pause, quit, raw_pair, serve, until};
use crate::common::{Client, Daemon, Dir};
use crate::disk::tool;
use crate::mirrors::Server;
use serde_json::{Value, json};

fn failing(kind: &str, file: &str, errno: u64, once: bool) -> Value {
    let rule = json!({"event": "none", "iotype": kind, "errno": errno, "once": once, "sector": 12288});
    json!({"driver": "raw", "file": {"driver": "blkdebug", "inject-error": [rule],
        "image": {"driver": "file", "filename": file}}})
}

fn pair(dir: &Dir, src: &Value, dst: &Value) -> (Daemon, Client) {
    model(dir);
    tool(dir, "cp|model.raw|src.raw");
    tool(dir, "cp|model.raw|then.raw");
    std::fs::write(dir.path("dst.raw"), vec![0xee; 8 << 20]).unwrap();
    serve(dir, src, dst)
}

#[test]
fn an_error_ends_the_job_or_stops_it() {
    for (kind, operation) in [("read", "read"), ("write", "write")] {
        for policy in ["report", "stop", "ignore"] {
            let dir = Dir::new();
            let (src, dst) = match kind {
                "read" => (failing(kind, "src.raw", 5, true), image("raw", "dst.raw")),
                _ => (image("raw", "src.raw"), failing(kind, "dst.raw", 28, true)),
            };
            let (mut daemon, mut c) = pair(&dir, &src, &dst);
            let more = json!({"on-source-error": policy, "on-target-error": policy, "auto-dismiss": false});
            backup(&mut c, &more).unwrap();
            until(&mut c, "b", "BLOCK_JOB_ERROR");
            match policy {
                "report" => {
                    until(&mut c, "b", "concluded");
                    assert!(job(&mut c)["error"].as_str().is_some());
                }
                "stop" => {
                    until(&mut c, "b", "paused");
                    let status = if kind == "read" { "failed" } else { "nospace" };
                    assert_eq!(job(&mut c)["io-status"], status);
                    c.command("job-resume", json!({"id": "b"})).unwrap();
                    until(&mut c, "b", "concluded");
                }
                _ => until(&mut c, "b", "concluded"),
            }
            let left = job(&mut c);
            assert_eq!(left["error"].is_null(), policy != "report", "{operation} {policy}: {left}");
            c.command("quit", json!({})).unwrap();
            assert!(daemon.wait().success());
            if policy != "report" {
                tool(&dir, "cmp|then.raw|dst.raw");
            }
        }
    }
}

/// The client's write that would overwrite what cannot be kept fails, or the backup does, as asked.
#[test]
fn old_bytes_that_cannot_be_kept() {
    for breaks in ["break-guest-write", "break-snapshot"] {
        let dir = Dir::new();
        let (mut daemon, mut c) =
            pair(&dir, &image("raw", "src.raw"), &failing("write", "dst.raw", 5, false));
        backup(&mut c, &json!({"sync": "none", "on-cbw-error": breaks})).unwrap();
        let write = |at: &str| {
            let line = format!("write -P 9 {at} 4k");
            let mut command = std::process::Command::new("qemu-io");
            let text = command.args(["-f", "raw", "-c", &line, DISK]).current_dir(&dir.0).output().unwrap();
            String::from_utf8_lossy(&[text.stdout, text.stderr].concat()).into_owned()
        };
        assert!(write("1M").contains("wrote 4096/4096"));
        let said = write("6M");
        if breaks == "break-guest-write" {
            assert!(said.contains("write failed: Input/output error"), "{said}");
            assert_eq!(job(&mut c)["status"], "running");
            c.command("job-cancel", json!({"id": "b"})).unwrap();
            until(&mut c, "b", "BLOCK_JOB_CANCELLED");
        } else {
            assert!(said.contains("wrote 4096/4096"), "{said}");
            until(&mut c, "b", "BLOCK_JOB_COMPLETED");
        }
        until(&mut c, "b", "null");
        assert!(write("6M").contains("wrote 4096/4096"), "afterwards nobody minds");
        c.command("quit", json!({})).unwrap();
        assert!(daemon.wait().success());
    }
}

/// Cancelled and paused under load; a target over the network that hangs does not hold the client after the cancel.
#[test]
fn cancel_and_pause_under_load() {
    let dir = Dir::new();
    model(&dir);
    tool(&dir, "cp|model.raw|src.raw");
    tool(&dir, "truncate|-s|8M|dst.raw");
    let line = format!("qemu-nbd|-f|raw|-k|{}|-t|-e|4|dst.raw", dir.path("dst.sock"));
    let server = Server::start(&dir, &line, "dst.sock");
    let remote = json!({"driver": "nbd", "server": {"type": "unix", "path": "dst.sock"}});
    let (mut daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &remote);
    backup(&mut c, &json!({"speed": 1 << 20, "auto-dismiss": false})).unwrap();
    let writer = Writer::start(&dir, DISK, &[]);
    c.command("job-pause", json!({"id": "b"})).unwrap();
    until(&mut c, "b", "paused");
    pause(50);
    c.command("job-resume", json!({"id": "b"})).unwrap();
    until(&mut c, "b", "running");
    server.signal("STOP");
    pause(100);
    c.command("job-cancel", json!({"id": "b"})).unwrap();
    until(&mut c, "b", "BLOCK_JOB_CANCELLED");
    until(&mut c, "b", "concluded");
    pause(100);
    server.signal("CONT");
    writer.stop();
    let left = job(&mut c);
    assert_eq!(left["error"], "Operation canceled");
    quit(&dir, &mut daemon, &mut c, ("raw", "src.raw"));
}

/// Two instants of one disk at once; each target has its own.
#[test]
fn two_at_once_end_in_either_order() {
    for first in ["b", "b2"] {
        let dir = Dir::new();
        let (mut daemon, mut c) = raw_pair(&dir);
        tool(&dir, "truncate|-s|8M|dst2.raw");
        let mut node = image("raw", "dst2.raw");
        node["node-name"] = json!("dst2");
        c.command("blockdev-add", node).unwrap();
        backup(&mut c, &json!({"speed": 1 << 20})).unwrap();
        tool(&dir, &format!("qemu-io|-f|raw|-c|write -P 33 3M 1M|{DISK}"));
        tool(&dir, "cp|then.raw|then2.raw");
        tool(&dir, "qemu-io|-f|raw|-c|write -P 33 3M 1M|then2.raw");
        tool(&dir, "cp|then2.raw|model.raw");
        let two =
            json!({"job-id": "b2", "device": "src", "target": "dst2", "sync": "full", "speed": 1 << 20});
        c.command("blockdev-backup", two).unwrap();
        let writer = Writer::start(&dir, DISK, &[]);
        for id in [first, if first == "b" { "b2" } else { "b" }] {
            c.command("block-job-set-speed", json!({"device": id, "speed": 0})).unwrap();
            until(&mut c, id, "BLOCK_JOB_COMPLETED");
            until(&mut c, id, "null");
        }
        writer.stop();
        assert_eq!(c.command("query-block-exports", json!({})).unwrap()[0]["node-name"], "src");
        quit(&dir, &mut daemon, &mut c, ("raw", "src.raw"));
        tool(&dir, "cmp|then.raw|dst.raw");
        tool(&dir, "cmp|then2.raw|dst2.raw");
    }
}

/// A buffer that is full and may not hold the client up: the backup ends, the client goes on.
#[test]
fn full_buffer_breaks_the_backup() {
    let dir = Dir::new();
    let (mut daemon, mut c) = raw_pair(&dir);
    tool(&dir, "truncate|-s|8M|buf.raw");
    let mut node = image("raw", "buf.raw");
    node["node-name"] = json!("buf");
    c.command("blockdev-add", node).unwrap();
    let more =
        json!({"buffer": "buf", "on-buffer-full": "break-backup", "buffer-size": 262_144, "speed": 65536});
    backup(&mut c, &more).unwrap();
    let writer = Writer::start(&dir, DISK, &[]);
    until(&mut c, "b", "BLOCK_JOB_COMPLETED");
    until(&mut c, "b", "null");
    writer.stop();
    let gone = c.command("block-job-set-speed", json!({"device": "b", "speed": 0})).unwrap_err();
    assert!(gone.contains("not found"), "{gone}");
    quit(&dir, &mut daemon, &mut c, ("raw", "src.raw"));
}
