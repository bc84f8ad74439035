//! Driver `blkcolo` and the address form `blkcolo:host:port:/path`: replicated disks as nodes, between real daemons.

use crate::common::{Client, Daemon, Dir, until};
use crate::disk::tool;
use serde_json::{Value, json};
use std::net::TcpListener;
use std::process::Command;

/// A daemon with a raw disk of 16 MiB, `disk.raw`, in a directory of its own.
struct Host {
    dir: Dir,
    daemon: Daemon,
    c: Client,
}

/// A port that nobody listens at.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Host {
    fn new() -> Host {
        let dir = Dir::new();
        drop(tool(&dir, "qemu-img|create|-q|-f|raw|disk.raw|16M"));
        Host::start(dir, &[])
    }

    fn start(dir: Dir, more: &[&str]) -> Host {
        let nbd = format!("addr.type=unix,addr.path={}", dir.path("nbd.sock"));
        let daemon = Daemon::start(&dir, &[&["--nbd-server", &nbd], more].concat());
        let c = daemon.client();
        Host { dir, daemon, c }
    }

    /// Killed, and started again.
    fn again(mut self, more: &[&str]) -> Host {
        self.daemon.signal("KILL");
        self.daemon.wait();
        let dir = std::mem::replace(&mut self.dir, Dir::new());
        ["nbd.sock", "qmp.sock"].iter().for_each(|s| drop(std::fs::remove_file(dir.path(s))));
        Host::start(dir, more)
    }

    /// The node `disk`, of the disk, in this mode.
    fn add(&mut self, mode: &str, port: u16, more: &Value) -> Result<Value, String> {
        let file = json!({"driver": "file", "filename": self.dir.path("disk.raw")});
        let mut node = json!({"driver": "blkcolo", "node-name": "disk", "file": file, "mode": mode,
            "host": "127.0.0.1", "port": port.to_string(), "store": {"size": 32 << 20}});
        more.as_object().unwrap().iter().for_each(|(k, v)| node[k] = v.clone());
        self.c.command("blockdev-add", node)
    }

    fn export(&mut self) {
        let export = json!({"type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": true});
        self.c.command("block-export-add", export).unwrap();
    }

    fn io(&self, command: &str) -> Result<String, String> {
        let url = format!("nbd+unix:///disk?socket={}", self.dir.path("nbd.sock"));
        let out = Command::new("qemu-io").args(["-f", "raw", "-c", command, &url]).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        if out.status.success() && !text.contains("failed") { Ok(text) } else { Err(text) }
    }

    fn groups(&mut self) -> Vec<Value> {
        self.c.command("query-replication", json!({})).unwrap().as_array().unwrap().clone()
    }

    fn role(&mut self) -> String {
        let groups = self.groups();
        assert_eq!(groups.len(), 1, "{groups:?}");
        groups[0]["role"].as_str().unwrap().to_owned()
    }

    fn nodes(&mut self) -> Vec<String> {
        let nodes = self.c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
        nodes.as_array().unwrap().iter().map(|n| n["node-name"].as_str().unwrap().to_owned()).collect()
    }

    fn until_running(&mut self) {
        until(|| self.groups()[0]["peers"][0]["state"] == "running");
    }

    fn until_merged(&mut self) {
        until(|| self.groups()[0]["stage"] == "done");
    }

    fn checkpoint(&mut self, group: &str) {
        self.c.command("replication-checkpoint", json!({"group": group})).unwrap();
    }

    fn del(&mut self, node: &str) -> Result<Value, String> {
        self.c.command("blockdev-del", json!({"node-name": node}))
    }

    fn raw(&self) -> Vec<u8> {
        std::fs::read(self.dir.path("disk.raw")).unwrap()
    }
}

/// Two hosts with `disk` exported, in sync.
fn pair() -> (Host, Host, u16) {
    let (mut p, mut s, port) = (Host::new(), Host::new(), port());
    s.add("secondary", port, &json!({})).unwrap();
    p.add("primary", port, &json!({})).unwrap();
    p.export();
    s.export();
    p.until_running();
    (p, s, port)
}

/// The whole way, one side by command, the other by its command line: written to, brought to a checkpoint, written to again; the
/// primary is killed, the secondary takes over at the checkpoint.
#[test]
fn a_pair_by_command_and_by_command_line_fails_over() {
    let port = port();
    let dir = Dir::new();
    drop(tool(&dir, "qemu-img|create|-q|-f|raw|disk.raw|16M"));
    let node = format!(
        "driver=blkcolo,node-name=disk,mode=secondary,host=127.0.0.1,port={port},engine=undo,file.driver=file,file.filename=disk.raw"
    );
    let export = "type=nbd,id=e,node-name=disk,name=disk,writable=on";
    let mut s = Host::start(dir, &["--blockdev", &node, "--export", export]);
    assert!(s.io("read 0 4k").is_err(), "nothing has ever been synchronized");
    assert!(std::path::Path::new(&s.dir.path("disk.raw.replica")).exists(), "the store is beside the image");
    let mut p = Host::new();
    p.add("primary", port, &json!({"flush-level": "remote-durable"})).unwrap();
    p.export();
    p.until_running();
    p.io("write -P 1 0 1M").unwrap();
    p.checkpoint("disk");
    p.io("write -P 2 0 2M").unwrap();
    s.io("read -P 1 0 1M").unwrap();
    s.io("read -P 0 1M 1M").unwrap();
    assert_eq!((p.role(), s.role()), ("primary".into(), "secondary".into()));
    assert_eq!(s.groups()[0]["engine"], "undo");
    p.daemon.signal("KILL");
    p.daemon.wait();
    s.c.command("replication-failover", json!({"group": "disk"})).unwrap();
    s.io("write -P 3 3M 64k").unwrap();
    s.until_merged();
    let raw = s.raw();
    assert!(raw[..1 << 20].iter().all(|b| *b == 1) && raw[1 << 20..3 << 20].iter().all(|b| *b == 0));
    assert!(raw[3 << 20..(3 << 20) + 65536].iter().all(|b| *b == 3));
}

/// The same address on both sides and nothing else: the host that has it is the secondary (T9), and their group is called by it.
#[test]
fn an_address_says_all() {
    let (mut p, mut s, port) = (Host::new(), Host::new(), port());
    let named = |h: &Host| format!("blkcolo:127.0.0.1:{port}:{}", h.dir.path("disk.raw"));
    let group = format!("127.0.0.1:{port}");
    let add = |h: &Host, mode: &str| json!({"driver": "blkcolo", "node-name": "disk", "group": group, "filename": named(h), "mode": mode});
    let there = add(&s, "auto");
    s.c.command("blockdev-add", there).unwrap();
    assert_eq!(s.role(), "secondary");
    // it is this host's, and taken: it is not for us to say who we are
    let there = add(&p, "auto");
    let e = p.c.command("blockdev-add", there).unwrap_err();
    assert!(e.contains("cannot be found out") && e.contains("in use") && e.contains(&group), "{e}");
    assert_eq!((p.groups().len(), p.nodes().len()), (0, 0));
    let there = add(&p, "primary");
    p.c.command("blockdev-add", there).unwrap();
    p.export();
    s.export();
    p.until_running();
    p.io("write -P 1 0 64k").unwrap();
    p.checkpoint(&group);
    s.io("read -P 1 0 64k").unwrap();
}

/// An address of another host makes a primary; what the disk's files remember goes before what the address says.
#[test]
fn auto_is_what_the_disk_was_before() {
    let mut p = Host::new();
    let elsewhere = json!({"host": "192.0.2.1"});
    p.add("auto", 9, &elsewhere).unwrap();
    assert_eq!(p.role(), "primary");
    assert_eq!(p.groups()[0]["peers"][0]["addr"], "192.0.2.1:9");
    let port = port();
    let mut p = p.again(&[]);
    p.add("auto", port, &json!({})).unwrap();
    assert_eq!(p.role(), "primary", "it was one, so its disk is not given up because the address is ours");
    assert_eq!(p.groups()[0]["peers"], json!([]));
    // a secondary is one again, and after it has taken over it is none
    let (p, s, port) = pair();
    drop(p);
    let mut s = s.again(&[]);
    s.add("auto", port, &json!({})).unwrap();
    assert_eq!(s.role(), "secondary");
    s.c.command("replication-failover", json!({"group": "disk"})).unwrap();
    s.until_merged();
    let mut s = s.again(&[]);
    let e = s.add("secondary", port, &json!({})).unwrap_err();
    assert!(e.contains("overwritten") && e.contains("'mode': 'auto'"), "{e}");
    assert_eq!((s.groups().len(), s.nodes().len()), (0, 0));
    s.add("auto", port, &json!({})).unwrap();
    assert_eq!(s.role(), "primary");
    let listen = json!({"type": "inet", "host": "127.0.0.1", "port": port.to_string()});
    let demote = json!({"group": "disk", "role": "secondary", "listen": listen, "demote": true});
    s.c.command("replication-start", demote).unwrap();
    assert_eq!(s.role(), "secondary");
}

/// With a state directory both come back as they were, from what was recorded alone, and so does what the command line says.
#[test]
fn both_come_back_after_a_kill() {
    let port = port();
    let begin = |mode: &str| {
        let dir = Dir::new();
        drop(tool(&dir, "qemu-img|create|-q|-f|raw|disk.raw|16M"));
        let node = format!(
            "driver=blkcolo,node-name=disk,mode={mode},host=127.0.0.1,port={port},file.driver=file,file.filename=disk.raw"
        );
        let export = "type=nbd,id=e,node-name=disk,name=disk,writable=on";
        let options = ["--state-dir", "state", "--blockdev", &node, "--export", export].map(str::to_owned);
        let words: Vec<&str> = options.iter().map(String::as_str).collect();
        (Host::start(dir, &words), options)
    };
    let ((s, options), (mut p, _)) = (begin("secondary"), begin("primary"));
    p.until_running();
    p.io("write -P 1 0 64k").unwrap();
    p.checkpoint("disk");
    p.io("write -P 2 64k 64k").unwrap();
    let words: Vec<&str> = options.iter().map(String::as_str).collect();
    let (mut s, mut p) = (s.again(&words), p.again(&["--state-dir", "state"]));
    assert_eq!((p.role(), s.role()), ("primary".into(), "secondary".into()));
    p.until_running();
    p.checkpoint("disk");
    s.io("read -P 1 0 64k").unwrap();
    s.io("read -P 2 64k 64k").unwrap();
    // they are still nodes that end with their group, and stay away after that
    for mut h in [p, s] {
        h.c.command("block-export-del", json!({"id": "e", "mode": "hard"})).unwrap();
        h.c.event("BLOCK_EXPORT_DELETED");
        h.del("disk").unwrap();
        assert_eq!((h.groups().len(), h.nodes().len()), (0, 0));
        let mut h = h.again(&["--state-dir", "state"]);
        assert_eq!((h.groups().len(), h.nodes().len()), (0, 0));
    }
}

/// `blockdev-del` ends the replication; added again it goes on where it was, without a copy of everything.
#[test]
fn a_deleted_node_goes_on_when_it_is_added_again() {
    let (mut p, mut s, port) = pair();
    p.io("write -P 1 0 8M").unwrap();
    p.checkpoint("disk");
    for h in [&mut p, &mut s] {
        assert_eq!(h.del("disk").unwrap_err(), "Node disk is in use");
        assert_eq!(h.groups().len(), 1, "a command that says no has changed nothing");
    }
    p.io("write -P 2 1M 64k").unwrap();
    for h in [&mut s, &mut p] {
        h.c.command("block-export-del", json!({"id": "e", "mode": "hard"})).unwrap();
        h.c.event("BLOCK_EXPORT_DELETED");
        h.del("disk").unwrap();
        assert_eq!((h.groups().len(), h.nodes().len()), (0, 0));
    }
    s.add("secondary", port, &json!({})).unwrap();
    p.add("primary", port, &json!({})).unwrap();
    s.export();
    s.io("read -P 1 2M 6M").unwrap();
    p.until_running();
    let copied = p.groups()[0]["peers"][0]["resync-bytes"].as_u64().unwrap();
    assert!(copied < 8 << 20, "{copied} bytes");
    p.checkpoint("disk");
    s.io("read -P 2 1M 64k").unwrap();
}

/// A disk that others may use after the node has gone: a primary's memory ends with the node, a secondary's node does not go before
/// it has taken over.
#[test]
fn a_disk_that_stays_is_no_part_of_the_replication() {
    let (mut p, mut s, port) = (Host::new(), Host::new(), port());
    for h in [&mut p, &mut s] {
        let file = json!({"driver": "file", "node-name": "d", "filename": h.dir.path("disk.raw")});
        h.c.command("blockdev-add", file).unwrap();
    }
    s.add("secondary", port, &json!({"file": "d"})).unwrap();
    p.add("primary", port, &json!({"file": "d"})).unwrap();
    p.until_running();
    p.checkpoint("disk");
    p.del("disk").unwrap();
    assert_eq!(p.nodes(), ["d"]);
    assert!(!std::path::Path::new(&p.dir.path("disk.raw.replica.primary")).exists());
    assert!(s.del("disk").unwrap_err().contains("fail over first"));
    s.c.command("replication-failover", json!({"group": "disk"})).unwrap();
    s.until_merged();
    s.del("disk").unwrap();
    assert_eq!((s.groups().len(), s.nodes()), (0, vec!["d".to_owned()]));
}

/// Inside another node, and as the name of an image that a command opens: it goes when what is above it goes.
#[test]
fn it_is_a_node_below_others() {
    let mut p = Host::new();
    // with room for all that may be written: what is replicated does not grow by itself
    drop(tool(&p.dir, "qemu-img|create|-q|-f|qcow2|disk.raw|16M"));
    let image = std::fs::OpenOptions::new().write(true).open(p.dir.path("disk.raw")).unwrap();
    image.set_len(32 << 20).unwrap();
    let below =
        json!({"driver": "blkcolo", "filename": format!("blkcolo:192.0.2.1:9:{}", p.dir.path("disk.raw"))});
    p.c.command("blockdev-add", json!({"driver": "qcow2", "node-name": "disk", "file": below})).unwrap();
    assert_eq!((p.role(), p.groups()[0]["id"].as_str()), ("primary".into(), Some("192.0.2.1:9")));
    p.export();
    p.io("write -P 1 0 64k").unwrap();
    let dirty = p.groups()[0]["peers"][0]["dirty-bytes"].as_u64().unwrap();
    assert!(dirty >= 64 << 10, "the image is what is replicated: {dirty}");
    p.c.command("block-export-del", json!({"id": "e", "mode": "hard"})).unwrap();
    p.c.event("BLOCK_EXPORT_DELETED");
    p.del("disk").unwrap();
    until(|| p.groups().is_empty() && p.nodes().is_empty());
    // an overlay that a command opens
    let base = json!({"driver": "file", "node-name": "base", "filename": p.dir.path("base")});
    std::fs::write(p.dir.path("base"), vec![7; 16 << 20]).unwrap();
    p.c.command("blockdev-add", base).unwrap();
    let export = json!({"type": "nbd", "id": "e", "node-name": "base", "name": "disk", "writable": true});
    p.c.command("block-export-add", export).unwrap();
    let name = format!("blkcolo:192.0.2.1:9:{}", p.dir.path("disk.raw"));
    let snapshot = json!({"node-name": "base", "snapshot-node-name": "disk", "snapshot-file": name, "format": "qcow2", "mode": "existing"});
    p.c.command("blockdev-snapshot-sync", snapshot).unwrap();
    assert_eq!(p.role(), "primary");
    p.io("read -P 1 0 64k").unwrap();
    p.io("read -P 7 64k 64k").unwrap();
    p.io("write -P 2 0 64k").unwrap();
    assert!(p.groups()[0]["peers"][0]["dirty-bytes"].as_u64().unwrap() >= 64 << 10);
}

/// Each is told what is wrong, and leaves nothing.
#[test]
fn what_is_wrong_is_told_and_leaves_nothing() {
    let (mut h, port) = (Host::new(), port());
    let file = json!({"driver": "file", "filename": h.dir.path("disk.raw")});
    let good =
        json!({"driver": "blkcolo", "node-name": "disk", "file": file, "host": "127.0.0.1", "port": "9"});
    let told = |h: &mut Host, key: &str, value: Value, want: &str| {
        let mut bad = good.clone();
        match value {
            Value::Null => drop(bad.as_object_mut().unwrap().remove(key)),
            value => bad[key] = value,
        }
        let e = h.c.command("blockdev-add", bad).unwrap_err();
        assert!(e.contains(want), "{key}: {e}");
        assert_eq!((h.groups().len(), h.nodes().len()), (0, 0), "{key}");
    };
    told(&mut h, "host", Value::Null, "Parameter 'host' is missing");
    told(&mut h, "port", Value::Null, "Parameter 'port' is missing");
    told(&mut h, "file", Value::Null, "Parameter 'file' is missing");
    told(&mut h, "port", json!("0"), "'port' expects a number from 1 to 65535, not '0'");
    told(&mut h, "port", json!("http"), "'port' expects a number");
    told(&mut h, "host", json!(""), "Parameter 'host' is empty");
    told(&mut h, "mode", json!("third"), "mode");
    told(&mut h, "filename", json!("blkcolo:h:1:/x"), "'filename' says what 'file' says");
    told(&mut h, "read-only", json!(true), "read-only: it cannot be replicated");
    told(&mut h, "detect-zeroes", json!("on"), "give them to its 'file'");
    told(&mut h, "store", json!({"size": 4096}), "a replication store has at least");
    told(&mut h, "file", json!({"driver": "null-co"}), "not in a file");
    let name = json!({"driver": "blkcolo", "node-name": "disk", "filename": "blkcolo:::1:9:/x"});
    assert!(h.c.command("blockdev-add", name).unwrap_err().contains("an IPv6 address goes in brackets"));
    // an address that is somebody else's
    let taken = TcpListener::bind(("127.0.0.1", port)).unwrap();
    assert!(h.add("secondary", port, &json!({})).unwrap_err().contains("in use"));
    assert_eq!((h.groups().len(), h.nodes().len()), (0, 0));
    drop(taken);
    // an image does not have a port opened here
    drop(tool(&h.dir, "qemu-img|create|-q|-f|qcow2|-u|-b|blkcolo:127.0.0.1:9:/x|-F|raw|top.qcow2|16M"));
    let top = json!({"driver": "file", "filename": h.dir.path("top.qcow2")});
    let e =
        h.c.command("blockdev-add", json!({"driver": "qcow2", "node-name": "t", "file": top})).unwrap_err();
    assert!(e.contains("not replicated because an image says so"), "{e}");
    // T5: without a role there is nothing to be prepared or done
    h.add("primary", port, &json!({})).unwrap();
    h.c.command("replication-stop", json!({"group": "disk"})).unwrap();
    assert_eq!(h.role(), "unprotected");
    for command in ["replication-prepare-checkpoint", "replication-checkpoint", "replication-stop"] {
        h.c.command(command, json!({"group": "disk"})).unwrap_err();
    }
    h.del("disk").unwrap();
    // and a secondary's disk is no primary's
    h.add("secondary", port, &json!({})).unwrap();
    h.del("disk").unwrap();
    assert!(h.add("primary", port, &json!({})).unwrap_err().contains("fail over first"));
    assert_eq!((h.groups().len(), h.nodes().len()), (0, 0));
}
