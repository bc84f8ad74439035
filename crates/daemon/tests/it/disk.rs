//! A disk from the command line to its end: served, written, mirrored, moved, compared; with QEMU's own tools as clients.

use crate::common::{Client, Daemon, Dir};
use serde_json::{Value, json};
use std::process::Command;

pub(crate) fn tool(dir: &Dir, line: &str) -> String {
    let mut words = line.split('|').map(str::trim);
    let mut command = Command::new(words.next().unwrap());
    let out = command.args(words).current_dir(&dir.0).output().unwrap();
    assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Waits for an event about `id`: `name`, or a status.
pub(crate) fn until(c: &mut Client, id: &str, what: &str) {
    let fits = |e: &Value| {
        let d = &e["data"];
        (d["id"] == id || d["device"] == id) && (e["event"] == what || d["status"] == what)
    };
    loop {
        if let Some(at) = c.events.iter().position(&fits) {
            c.events.drain(..=at);
            return;
        }
        let m = c.read().expect("an event");
        assert!(m.get("event").is_some(), "{m}");
        c.events.push(m);
    }
}

fn started(dir: &Dir) -> (Daemon, Client) {
    tool(dir, "qemu-img|create|-q|-f|qcow2|src.qcow2|64M");
    tool(dir, "qemu-io|-f|qcow2|-c|write -P 1 0 8M|src.qcow2");
    tool(dir, "qemu-img|create|-q|-f|qcow2|dst.qcow2|64M");
    let daemon = Daemon::start(
        dir,
        &[
            "--blockdev",
            "driver=qcow2,node-name=src,discard=unmap,file.driver=file,file.filename=src.qcow2",
            "--blockdev",
            r#"{"driver":"qcow2","node-name":"dst","discard":"unmap","file":{"driver":"file","filename":"dst.qcow2"}}"#,
            "--nbd-server",
            "addr.type=unix,addr.path=nbd.sock",
            "--export",
            "nbd,id=e0,node-name=src,name=disk,writable=on",
        ],
    );
    let client = daemon.client();
    (daemon, client)
}

const DISK: &str = "nbd+unix:///disk?socket=nbd.sock";

#[test]
fn mirrored_under_writes_and_moved() {
    for mode in ["background", "write-blocking", "read-write-blocking"] {
        let dir = Dir::new();
        let (mut daemon, mut c) = started(&dir);
        let mirror = json!({"job-id": "m", "device": "src", "target": "dst", "sync": "full", "copy-mode": mode,
            "convergence": "none", "converge-after": 5});
        c.command("blockdev-mirror", mirror).unwrap();
        tool(&dir, &format!("qemu-io|-f|raw|-c|write -P 2 4M 8M|-c|write -z 1M 1M|-c|discard 2M 1M|{DISK}"));
        until(&mut c, "m", "BLOCK_JOB_READY");
        tool(&dir, &format!("qemu-io|-f|raw|-c|write -P 3 20M 1000k|{DISK}"));
        let job = c.command("query-block-jobs", json!({})).unwrap()[0].clone();
        assert!(
            job["remaining"].is_u64() && job["copy-rate"].is_u64() && job["dirty-rate"].is_u64(),
            "{job}"
        );
        c.command("job-complete", json!({"id": "m"})).unwrap();
        until(&mut c, "m", "null");
        assert_eq!(c.command("query-block-exports", json!({})).unwrap()[0]["node-name"], "dst");
        tool(
            &dir,
            &format!("qemu-io|-f|raw|-c|read -P 3 20M 1000k|-c|read -P 2 4M 8M|-c|read -P 0 1M 1M|{DISK}"),
        );
        c.command("quit", json!({})).unwrap();
        assert!(daemon.wait().success());
        tool(&dir, "qemu-img|compare|-f|qcow2|-F|qcow2|src.qcow2|dst.qcow2");
        tool(&dir, "qemu-img|check|-q|dst.qcow2");
        tool(&dir, "qemu-img|check|-q|src.qcow2");
    }
}

/// The order of the end: exports, jobs, then the answer, then the end of the stream.
#[test]
fn quit_with_export_and_job() {
    let dir = Dir::new();
    let (mut daemon, mut c) = started(&dir);
    let mirror = json!({"job-id": "m", "device": "src", "target": "dst", "sync": "full", "speed": 1 << 16, "buf-size": 65536});
    c.command("blockdev-mirror", mirror).unwrap();
    until(&mut c, "m", "running");
    c.events.clear();
    c.command("quit", json!({})).unwrap();
    let told: Vec<String> = c
        .events
        .iter()
        .map(|e| e["data"]["status"].as_str().or(e["event"].as_str()).unwrap().to_owned())
        .collect();
    assert_eq!(told, ["BLOCK_EXPORT_DELETED", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
    assert_eq!(c.read(), None);
    assert!(daemon.wait().success());
    tool(&dir, "qemu-img|check|-q|src.qcow2");
}

/// An image created by us, in us, is one for QEMU.
#[test]
fn created_here_read_there() {
    let dir = Dir::new();
    let mut daemon = Daemon::start(&dir, &[]);
    let mut c = daemon.client();
    let create = |c: &mut Client, options: Value| {
        c.command("blockdev-create", json!({"job-id": "c", "options": options})).unwrap();
        until(c, "c", "concluded");
        assert_eq!(c.command("query-jobs", json!({})).unwrap()[0].get("error"), None);
        c.command("job-dismiss", json!({"id": "c"})).unwrap();
    };
    create(&mut c, json!({"driver": "file", "filename": "n.qcow2", "size": 0}));
    let file = json!({"driver": "file", "filename": "n.qcow2"});
    create(
        &mut c,
        json!({"driver": "qcow2", "file": file, "size": 1 << 30, "cluster-size": 1 << 17,
        "extended-l2": true, "compression-type": "zstd"}),
    );
    assert_eq!(c.command("query-named-block-nodes", json!({})).unwrap(), json!([]));
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
    let info: Value = serde_json::from_str(&tool(&dir, "qemu-img|info|--output=json|n.qcow2")).unwrap();
    let data = &info["format-specific"]["data"];
    assert_eq!((&info["virtual-size"], &info["cluster-size"]), (&json!(1 << 30), &json!(1 << 17)));
    assert_eq!((&data["extended-l2"], &data["compression-type"]), (&json!(true), &json!("zstd")));
}

/// What closing cannot write back does not keep a node: the command says that it is gone, as QSD does, and stderr the rest.
#[test]
fn a_node_goes_although_closing_it_fails() {
    let dir = Dir::new();
    tool(&dir, "qemu-img|create|-q|-f|qcow2|n.qcow2|1M");
    let said = dir.path("said");
    let mut daemon = Daemon::start_saying(&dir, &[], std::fs::File::create(&said).unwrap().into());
    let mut c = daemon.client();
    let broken = json!({
        "driver": "blkdebug", "image": {"driver": "file", "filename": "n.qcow2"},
        "inject-error": [{"event": "none", "iotype": "write", "errno": 5, "once": false}],
    });
    c.command("blockdev-add", json!({"driver": "qcow2", "node-name": "n", "file": broken})).unwrap();
    // is written when the node closes
    c.command("block-dirty-bitmap-add", json!({"node": "n", "name": "b", "persistent": true})).unwrap();
    c.command("blockdev-del", json!({"node-name": "n"})).unwrap();
    let again = c.command("blockdev-del", json!({"node-name": "n"}));
    assert_eq!(again, Err("Failed to find node with node-name='n'".to_owned()));
    let said = std::fs::read_to_string(said).unwrap();
    assert!(
        said.starts_with("liveblkd: node 'n' is deleted, but something failed while closing it: "),
        "{said}"
    );
    assert!(said.trim_end().ends_with("Input/output error"), "{said}");
    // another may have the image now
    tool(&dir, "qemu-img|check|-q|n.qcow2");
    tool(&dir, "qemu-io|-f|qcow2|-c|write 0 64k|n.qcow2");
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
}
