//! A disk moves to another host with little to copy at the end (the recipe of incremental mirrors): a bitmap, a full backup over NBD,
//! incremental ones into overlays on it, an image that has the last as its backing file, an incremental mirror into that, the pivot, and
//! there a stream that makes it stand alone. A client writes and verifies throughout, and in the end the image is what it wrote.

use crate::common::{Client, Daemon, Dir};
use crate::disk::{tool, until};
use crate::mirrors::{DISK, Writer, image};
use serde_json::{Value, json};
use std::process::Command;

/// Backups between the full one and the mirror.
const INCREMENTALS: usize = 3;

/// The host that the disk moves to: some daemon with an NBD server, in a directory of its own.
struct There {
    dir: Dir,
    daemon: Daemon,
    client: Client,
}

impl There {
    fn start(program: &str) -> There {
        let dir = Dir::new();
        let socket = dir.0.join("qmp.sock");
        let chardev = format!("socket,id=c0,path={},server=on,wait=off", socket.display());
        let server = "addr.type=unix,addr.path=nbd.sock";
        let mut command = Command::new(program);
        command.args(["--chardev", &chardev, "--monitor", "chardev=c0", "--nbd-server", server]);
        let daemon = Daemon { child: command.current_dir(&dir.0).spawn().unwrap(), socket };
        let client = daemon.client();
        There { dir, daemon, client }
    }

    /// Creates image `name` of 64 MiB, above `backing`, and serves it under its name.
    fn serve(&mut self, name: &str, backing: Option<&str>) {
        let below = backing.map_or_else(String::new, |b| format!("|-b|{b}|-F|qcow2"));
        tool(&self.dir, &format!("qemu-img|create|-q|-f|qcow2{below}|{name}|64M"));
        let mut node = image("qcow2", name);
        node["node-name"] = json!(name);
        self.client.command("blockdev-add", node).unwrap();
        let export = json!({"type": "nbd", "id": name, "node-name": name, "name": name, "writable": true});
        self.client.command("block-export-add", export).unwrap();
    }

    fn close(&mut self, name: &str) {
        self.client.command("block-export-del", json!({"id": name})).unwrap();
        until(&mut self.client, name, "BLOCK_EXPORT_DELETED");
        self.client.command("blockdev-del", json!({"node-name": name})).unwrap();
    }
}

/// Node `name` for the export of that name over there.
fn connect(c: &mut Client, there: &There, name: &str) {
    let server = json!({"type": "unix", "path": there.dir.path("nbd.sock")});
    let node =
        json!({"driver": "nbd", "node-name": name, "export": name, "server": server, "discard": "unmap"});
    c.command("blockdev-add", node).unwrap();
}

/// Waits for the end of job `id`, which must be a good one.
fn ended(c: &mut Client, id: &str) {
    until(c, id, "concluded");
    let jobs = c.command("query-jobs", json!({})).unwrap();
    assert_eq!(jobs[0].get("error"), None, "{jobs}");
    c.command("job-dismiss", json!({"id": id})).unwrap();
}

fn bitmap(c: &mut Client) -> Value {
    let all = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
    all.as_array().unwrap().iter().find(|n| n["node-name"] == "src").unwrap()["dirty-bitmaps"][0].clone()
}

/// The recipe, with the last step's mirror as `mirror` says.
fn move_to(program: &str, mirror: &Value) {
    let dir = Dir::new();
    let bytes: Vec<u8> = (0..64u32 << 20).map(|i| ((i >> 9) % 251 + i % 7) as u8).collect();
    std::fs::write(dir.path("model.raw"), bytes).unwrap();
    tool(&dir, "qemu-img|convert|-f|raw|-O|qcow2|model.raw|src.qcow2");
    let mut src = image("qcow2", "src.qcow2");
    src["node-name"] = json!("src");
    let (server, export) =
        ("addr.type=unix,addr.path=nbd.sock", "nbd,id=e0,node-name=src,name=disk,writable=on");
    let words = ["--blockdev", &src.to_string(), "--nbd-server", server, "--export", export];
    let mut daemon = Daemon::start(&dir, &words);
    let mut c = daemon.client();
    let mut there = There::start(program);
    let writer = Writer::start(&dir, DISK, &["4", "400"]);

    there.serve("full", None);
    connect(&mut c, &there, "full");
    let backup = |name: &str, sync: &str| json!({"job-id": "j", "device": "src", "target": name, "sync": sync, "auto-dismiss": false});
    let add =
        json!({"type": "block-dirty-bitmap-add", "data": {"node": "src", "name": "b", "persistent": true}});
    let first = json!({"type": "blockdev-backup", "data": backup("full", "full")});
    c.command("transaction", json!({"actions": [add, first]})).unwrap();
    ended(&mut c, "j");
    c.command("blockdev-del", json!({"node-name": "full"})).unwrap();
    there.close("full");

    let mut below = "full".to_owned();
    for n in 1..=INCREMENTALS {
        let name = format!("inc{n}");
        there.serve(&name, Some(&below));
        connect(&mut c, &there, &name);
        let mut arguments = backup(&name, "incremental");
        arguments["bitmap"] = json!("b");
        c.command("blockdev-backup", arguments).unwrap();
        ended(&mut c, "j");
        c.command("blockdev-del", json!({"node-name": name})).unwrap();
        there.close(&name);
        below = name;
    }

    there.serve("new", Some(&below));
    connect(&mut c, &there, "new");
    let mut arguments =
        json!({"job-id": "j", "device": "src", "target": "new", "bitmap": "b", "auto-dismiss": false});
    mirror.as_object().unwrap().iter().for_each(|(k, v)| arguments[k] = v.clone());
    c.command("blockdev-mirror", arguments).unwrap();
    until(&mut c, "j", "BLOCK_JOB_READY");
    c.command("job-complete", json!({"id": "j"})).unwrap();
    ended(&mut c, "j");
    assert_eq!(c.command("query-block-exports", json!({})).unwrap()[0]["node-name"], "new");
    let b = bitmap(&mut c);
    assert_eq!((&b["count"], &b["busy"]), (&json!(0), &json!(false)), "{b}");
    // the old image and its daemon's part in it are done with
    c.command("blockdev-del", json!({"node-name": "src"})).unwrap();

    let stream = json!({"job-id": "s", "device": "new", "auto-dismiss": false});
    there.client.command("block-stream", stream).unwrap();
    ended(&mut there.client, "s");
    let said = writer.stop();
    assert!(said["ops"].as_u64().unwrap() > 100, "{said}");
    for (client, daemon) in [(&mut c, &mut daemon), (&mut there.client, &mut there.daemon)] {
        client.command("quit", json!({})).unwrap();
        assert!(daemon.wait().success());
    }
    let info: Value = serde_json::from_str(&tool(&there.dir, "qemu-img|info|--output=json|new")).unwrap();
    assert_eq!(info.get("backing-filename"), None, "{info}");
    for name in ["inc1", "inc2", "inc3", "new"] {
        tool(&there.dir, &format!("qemu-img|check|-q|{name}"));
    }
    tool(&dir, "qemu-img|check|-q|src.qcow2");
    // it stands alone
    std::fs::remove_file(there.dir.path("full")).unwrap();
    let new = there.dir.path("new");
    tool(&dir, &format!("qemu-img|compare|-f|raw|-F|qcow2|model.raw|{new}"));
}

#[test]
fn to_another_liveblkd() {
    move_to(env!("CARGO_BIN_EXE_liveblkd"), &json!({"sync": "incremental"}));
}

#[test]
fn to_qemus_daemon() {
    let synchronous = json!({"sync": "bitmap", "bitmap-mode": "on-success", "copy-mode": "write-blocking"});
    move_to("qemu-storage-daemon", &synchronous);
}
