//! `--state-dir`: the daemon comes back after it was killed, between any two commands, as it was.

mod going_on;
mod instants;
mod jobs;
mod kills;
mod leaving;

use crate::common::{Client, Daemon, Dir, run, until};
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::process::{Command, Stdio};

fn tool(dir: &Dir, program: &str, arguments: &[&str]) -> String {
    let out =
        Command::new(program).args(arguments).current_dir(&dir.0).stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// A chain of three images, and some raw ones.
fn images(dir: &Dir) {
    tool(dir, "qemu-img", &["create", "-q", "-f", "raw", "raw.img", "4M"]);
    tool(dir, "qemu-img", &["create", "-q", "-f", "raw", "other.img", "4M"]);
    tool(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "base.qcow2", "4M"]);
    tool(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2"]);
    tool(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"]);
    tool(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "overlay.qcow2", "4M"]);
}

/// Without what grows by itself, and with file names as seen from the directory: relative ones are absolute in a later life.
fn plain(dir: &Dir, value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.remove("actual-size");
            map.values_mut().for_each(|v| plain(dir, v));
        }
        Value::Array(all) => all.iter_mut().for_each(|v| plain(dir, v)),
        Value::String(text) => *text = text.replace(&format!("{}/", dir.0.display()), ""),
        _ => {}
    }
}

/// Fails with the places where the two differ.
fn same(before: &Value, now: &Value, after: &str) {
    fn differences(at: &str, a: &Value, b: &Value, out: &mut Vec<String>) {
        match (a, b) {
            (Value::Object(x), Value::Object(y)) => {
                for key in x.keys().chain(y.keys().filter(|k| !x.contains_key(*k))) {
                    differences(&format!("{at}.{key}"), &a[key], &b[key], out);
                }
            }
            (Value::Array(x), Value::Array(y)) if x.len() == y.len() => {
                x.iter()
                    .zip(y)
                    .enumerate()
                    .for_each(|(i, (a, b))| differences(&format!("{at}.{i}"), a, b, out));
            }
            _ if a != b => out.push(format!("{at}: {a} became {b}")),
            _ => {}
        }
    }
    let mut out = Vec::new();
    differences("", before, now, &mut out);
    assert!(out.is_empty(), "after {after}:\n{}", out.join("\n"));
}

/// All that a manager sees of the daemon, but numbers that grow by themselves.
fn seen(dir: &Dir, mut c: Client) -> Value {
    let c = &mut c;
    let mut nodes = c.command("query-named-block-nodes", json!({})).unwrap();
    plain(dir, &mut nodes);
    let mut by_name = Map::new();
    for node in nodes.as_array().unwrap() {
        by_name.insert(node["node-name"].as_str().unwrap().to_owned(), node.clone());
    }
    by_name.sort_keys();
    let mut objects = Map::new();
    for o in c.command("qom-list", json!({"path": "/objects"})).unwrap().as_array().unwrap() {
        let name = o["name"].as_str().unwrap();
        if o["type"] == "child<throttle-group>" {
            let path = format!("/objects/{name}");
            let limits = c.command("qom-get", json!({"path": path, "property": "limits"})).unwrap();
            objects.insert(name.to_owned(), limits);
        } else {
            objects.insert(name.to_owned(), o["type"].clone());
        }
    }
    json!({
        "nodes": by_name,
        "exports": c.command("query-block-exports", json!({})).unwrap(),
        "objects": objects,
        "edges": edges(c),
    })
}

/// Who uses whom, by name.
fn edges(c: &mut Client) -> Vec<String> {
    let graph = c.command("x-debug-query-block-graph", json!({})).unwrap();
    let name = |id: &Value| {
        let all = graph["nodes"].as_array().unwrap();
        let node = all.iter().find(|n| n["id"] == *id).unwrap();
        node["name"].as_str().unwrap().to_owned()
    };
    let mut out: Vec<String> = graph["edges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            format!(
                "{} -{}-> {} {} {}",
                name(&e["parent"]),
                e["name"],
                name(&e["child"]),
                e["perm"],
                e["shared-perm"]
            )
        })
        .collect();
    out.sort();
    out
}

fn start_saying(dir: &Dir, extra: &[&str], stderr: Stdio) -> Daemon {
    // one that was killed may listen for an instant longer than it lives
    let _ = std::fs::remove_file(dir.path("qmp.sock"));
    let mut all = vec!["--state-dir", "state"];
    all.extend(extra);
    Daemon::start_saying(dir, &all, stderr)
}

fn start(dir: &Dir, extra: &[&str]) -> Daemon {
    start_saying(dir, extra, Stdio::inherit())
}

/// Kills the daemon and starts it again: everything is as it was.
fn again(dir: &Dir, daemon: Daemon, extra: &[&str], after: &str) -> Daemon {
    let before = seen(dir, daemon.client());
    drop(daemon);
    let daemon = start(dir, extra);
    let now = seen(dir, daemon.client());
    same(&before, &now, after);
    let state = daemon.client().command("query-state", json!({})).unwrap();
    assert_eq!(state["broken"], json!([]), "after {after}");
    daemon
}

/// Commands that between them change everything that is recorded.
fn script() -> Vec<(&'static str, Value)> {
    let unix = |path: &str| json!({"type": "unix", "data": {"path": path}});
    vec![
        ("object-add", json!({"qom-type": "iothread", "id": "thread"})),
        ("object-add", json!({"qom-type": "throttle-group", "id": "group", "x-iops-total": 100_000})),
        ("object-add", json!({"qom-type": "secret", "id": "sec", "data": "c2VjcmV0", "format": "base64"})),
        (
            "blockdev-add",
            json!({"driver": "file", "node-name": "rawfile", "filename": "raw.img", "discard": "unmap"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "raw", "file": "rawfile", "offset": 65536, "size": 1 << 20}),
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "top", "discard": "unmap", "detect-zeroes": "unmap",
            "l2-cache-size": 1 << 20, "file": {"driver": "file", "filename": "top.qcow2"}}),
        ),
        ("nbd-server-start", json!({"addr": unix("nbd.sock"), "max-connections": 7})),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "disk", "node-name": "top", "writable": true, "name": "d"}),
        ),
        ("nbd-server-add", json!({"device": "raw"})),
        (
            "block-export-add",
            json!({"type": "vhost-user-blk", "id": "guest", "node-name": "rawfile",
            "addr": {"type": "unix", "path": "vhost.sock"}, "writable": false}),
        ),
        (
            "blockdev-add",
            json!({"driver": "throttle", "node-name": "slow", "throttle-group": "group", "read-only": true,
            "file": {"driver": "null-co", "node-name": "null", "size": 1 << 20, "read-zeroes": true}}),
        ),
        (
            "qom-set",
            json!({"path": "/objects/group", "property": "limits", "value": {"iops-total": 5000, "bps-read": 0}}),
        ),
        ("block-set-write-threshold", json!({"node-name": "rawfile", "write-threshold": 1 << 20})),
        (
            "blockdev-snapshot-sync",
            json!({"node-name": "top", "snapshot-file": "snap.qcow2", "snapshot-node-name": "snap"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "overlay", "backing": null,
            "file": {"driver": "file", "node-name": "overlayfile", "filename": "overlay.qcow2"}}),
        ),
        ("blockdev-snapshot", json!({"node": "snap", "overlay": "overlay"})),
        (
            "blockdev-add",
            json!({"driver": "quorum", "node-name": "quorum", "vote-threshold": 1, "children": [
            {"driver": "null-co", "node-name": "q0", "size": 1 << 20, "read-zeroes": true},
            {"driver": "null-co", "node-name": "q1", "size": 1 << 20, "read-zeroes": true}]}),
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "q2", "size": 1 << 20, "read-zeroes": true}),
        ),
        ("x-blockdev-change", json!({"parent": "quorum", "node": "q2"})),
        ("x-blockdev-change", json!({"parent": "quorum", "child": "children.2"})),
        ("blockdev-add", json!({"driver": "file", "node-name": "otherfile", "filename": "other.img"})),
        ("blockdev-add", json!({"driver": "raw", "node-name": "other", "file": "otherfile"})),
        (
            "blockdev-reopen",
            json!({"options": [{"driver": "raw", "node-name": "other", "file": "otherfile", "read-only": true}]}),
        ),
        ("blockdev-set-active", json!({"node-name": "other", "active": false})),
        ("block_resize", json!({"node-name": "q2", "size": 1 << 20})),
        ("blockdev-set-active", json!({"node-name": "other", "active": true})),
        (
            "change-backing-file",
            json!({"device": "overlay", "image-node-name": "snap", "backing-file": "top.qcow2"}),
        ),
        ("block-export-del", json!({"id": "raw"})),
        ("blockdev-del", json!({"node-name": "raw"})),
        ("object-del", json!({"id": "sec"})),
        ("block-export-del", json!({"id": "disk"})),
        ("nbd-server-stop", json!({})),
    ]
}

#[test]
fn killed_after_any_command_it_comes_back_as_it_was() {
    let dir = Dir::new();
    images(&dir);
    let mut daemon = start(&dir, &[]);
    for (command, arguments) in script() {
        let mut c = daemon.client();
        if command == "block_resize" {
            // what cannot be done changes nothing
            let _ = c.command(command, arguments.clone());
        } else {
            c.command(command, arguments.clone()).unwrap_or_else(|e| panic!("{command} {arguments}: {e}"));
        }
        drop(c);
        daemon = again(&dir, daemon, &[], &format!("{command} {arguments}"));
    }
    // an end in order is an end like any other
    let before = seen(&dir, daemon.client());
    daemon.signal("TERM");
    assert!(daemon.wait().success());
    let daemon = start(&dir, &[]);
    same(&before, &seen(&dir, daemon.client()), "an end in order");
}

#[test]
fn options_that_took_effect_are_not_applied_again() {
    let dir = Dir::new();
    images(&dir);
    let first = [
        "--object",
        "throttle-group,id=g,x-iops-total=100",
        "--blockdev",
        "file,node-name=f,filename=top.qcow2",
        "--blockdev",
        "qcow2,node-name=top,file=f",
        "--nbd-server",
        "addr.type=unix,addr.path=nbd.sock",
        "--export",
        "nbd,id=e,node-name=top,name=disk,writable=on",
    ];
    let daemon = start(&dir, &first);
    let mut c = daemon.client();
    let snapshot = json!({"node-name": "top", "snapshot-file": "snap.qcow2", "snapshot-node-name": "snap"});
    c.command("blockdev-snapshot-sync", snapshot).unwrap();
    c.command("object-del", json!({"id": "g"})).unwrap();
    drop(c);
    let daemon = again(&dir, daemon, &first, "a snapshot");
    let exports = daemon.client().command("query-block-exports", json!({})).unwrap();
    assert_eq!(exports[0]["node-name"], "snap");
    // one more option, and the address of the server is another
    let mut second = first.to_vec();
    second[7] = "addr.type=unix,addr.path=moved.sock";
    second.extend(["--blockdev", "null-co,node-name=new"]);
    let before = seen(&dir, daemon.client());
    drop(daemon);
    let daemon = start(&dir, &second);
    let mut now = seen(&dir, daemon.client());
    assert!(now["nodes"].as_object_mut().unwrap().remove("new").is_some());
    same(&before, &now, "other options");
    let listed = tool(&dir, "qemu-img", &["info", "--output=json", "nbd+unix:///disk?socket=moved.sock"]);
    assert!(listed.contains("virtual-size"));
}

#[test]
fn what_cannot_be_made_again_is_kept_and_told() {
    let dir = Dir::new();
    images(&dir);
    let daemon = start(&dir, &[]);
    let mut c = daemon.client();
    let add =
        json!({"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "top.qcow2"}});
    c.command("blockdev-add", add).unwrap();
    c.command("blockdev-add", json!({"driver": "null-co", "node-name": "null"})).unwrap();
    c.command("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "nbd.sock"}}})).unwrap();
    for node in ["top", "null"] {
        c.command("block-export-add", json!({"type": "nbd", "id": node, "node-name": node})).unwrap();
    }
    drop(c);
    let mut before = seen(&dir, daemon.client());
    drop(daemon);
    std::fs::rename(dir.path("mid.qcow2"), dir.path("away.qcow2")).unwrap();
    for _ in 0..2 {
        let mut daemon = start_saying(&dir, &[], Stdio::piped());
        let mut c = daemon.client();
        let state = c.command("query-state", json!({})).unwrap();
        let broken: Vec<String> = state["broken"]
            .as_array()
            .unwrap()
            .iter()
            .map(|b| format!("{} {}", b["kind"].as_str().unwrap(), b["name"].as_str().unwrap()))
            .collect();
        assert!(
            broken.contains(&"node top".to_owned()) && broken.contains(&"export top".to_owned()),
            "{state}"
        );
        assert!(state["broken"].to_string().contains("mid.qcow2"), "{state}");
        assert_eq!(c.command("query-block-exports", json!({})).unwrap().as_array().unwrap().len(), 1);
        daemon.child.kill().unwrap();
        let mut text = String::new();
        std::io::Read::read_to_string(daemon.child.stderr.as_mut().unwrap(), &mut text).unwrap();
        assert!(text.contains("export 'top' could not be restored"), "{text}");
    }
    let daemon = start(&dir, &[]);
    let mut c = daemon.client();
    std::fs::rename(dir.path("away.qcow2"), dir.path("mid.qcow2")).unwrap();
    assert_eq!(c.command("state-retry", json!({})).unwrap()["broken"], json!([]));
    drop(c);
    let mut after = seen(&dir, daemon.client());
    // newest first, and it is the newest now
    after["exports"].as_array_mut().unwrap().sort_by_key(|e| e["id"].to_string());
    before["exports"].as_array_mut().unwrap().sort_by_key(|e| e["id"].to_string());
    same(&before, &after, "a retry");
    drop(again(&dir, daemon, &[], "a retry"));
    // what is not there can be given up
    std::fs::remove_file(dir.path("mid.qcow2")).unwrap();
    let daemon = start_saying(&dir, &[], Stdio::null());
    let mut c = daemon.client();
    c.command("block-export-del", json!({"id": "top"})).unwrap();
    c.command("block-export-del", json!({"id": "top"})).unwrap_err();
    let broken = c.command("query-state", json!({})).unwrap()["broken"].to_string();
    assert!(!broken.contains("export") && broken.contains("top"), "{broken}");
}

#[test]
fn a_directory_that_cannot_be_used_is_refused() {
    let dir = Dir::new();
    let daemon = start(&dir, &[]);
    drop(daemon.client());
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(dir.path("state")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
    let second = run(&dir, &["--state-dir", "state"]);
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && said.contains("another daemon uses the state directory"), "{said}");
    drop(daemon);
    std::fs::write(dir.path("state/state.redb"), vec![0x55; 100_000]).unwrap();
    let damaged = run(&dir, &["--state-dir", "state"]);
    let said = String::from_utf8_lossy(&damaged.stderr).into_owned();
    assert!(
        !damaged.status.success() && said.contains("state/state.redb") && said.contains("damaged"),
        "{said}"
    );
    std::fs::write(dir.path("file"), "").unwrap();
    let file = run(&dir, &["--state-dir", "file"]);
    assert!(String::from_utf8_lossy(&file.stderr).contains("Not a directory"), "{file:?}");
}

/// A limit on the size of files stands for a disk that is full.
#[test]
fn what_cannot_be_recorded_is_refused_and_no_more() {
    let dir = Dir::new();
    let line = "ulimit -S -f 4096; exec $0 --state-dir state --chardev socket,id=c0,path=qmp.sock,server=on,wait=off --monitor c0";
    let child = Command::new("bash")
        .args(["-c", line, env!("CARGO_BIN_EXE_liveblkd")])
        .current_dir(&dir.0)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let daemon = Daemon { child, socket: dir.0.join("qmp.sock") };
    let mut c = daemon.client();
    c.command("blockdev-add", json!({"driver": "null-co", "node-name": "first"})).unwrap();
    let secret = |id: &str| json!({"qom-type": "secret", "id": id, "data": "x".repeat(300_000)});
    let refused =
        (0..100).find_map(|i| c.command("object-add", secret(&format!("s{i}"))).err().map(|e| (i, e)));
    let (kept, e) = refused.expect("the store has a limit");
    assert!(e.contains("cannot be recorded") && e.contains("state.redb"), "{e}");
    let listed = c.command("qom-list", json!({"path": "/objects"})).unwrap().to_string();
    assert!(!listed.contains(&format!("s{kept}")), "what failed is not there: {listed}");
    // once there is room again all goes on
    tool(&dir, "prlimit", &["--pid", &daemon.child.id().to_string(), "--fsize=unlimited"]);
    c.command("object-del", json!({"id": "s0"})).unwrap();
    drop(c);
    let before = seen(&dir, daemon.client());
    drop(daemon);
    let daemon = start(&dir, &[]);
    same(&before, &seen(&dir, daemon.client()), "a full disk");
}

#[test]
fn without_it_nothing_is_kept() {
    let dir = Dir::new();
    let daemon = Daemon::start(&dir, &["--blockdev", "null-co,node-name=n"]);
    let mut c = daemon.client();
    assert_eq!(c.command("query-state", json!({})).unwrap(), json!({"enabled": false, "broken": []}));
    drop(c);
    until(|| dir.0.join("qmp.sock").exists());
    let names: Vec<_> =
        std::fs::read_dir(&dir.0).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names, ["qmp.sock"]);
}

/// Nobody could get rid of it in a later life, which may not even find its file.
#[test]
fn what_is_still_being_opened_is_not_recorded() {
    let dir = Dir::new();
    images(&dir);
    let second = ["--chardev", "socket,id=m2,path=second.sock,server=on,wait=off", "--monitor", "m2"];
    let daemon = start(&dir, &second);
    let mut first = daemon.client();
    let nowhere = json!({"type": "unix", "path": dir.path("nowhere.sock")});
    let add = json!({"driver": "qcow2", "node-name": "slow", "file": {"driver": "file", "filename": dir.path("overlay.qcow2")},
        "backing": {"driver": "nbd", "server": nowhere, "open-timeout": 600}});
    let command = json!({"execute": "blockdev-add", "arguments": add});
    first.send(format!("{command}\n").as_bytes());
    let mut c = Client::connect(dir.path("second.sock").as_ref());
    c.command("qmp_capabilities", json!({})).unwrap();
    let opened = |c: &mut Client| {
        let nodes = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
        nodes.as_array().unwrap().iter().any(|n| n["file"].as_str().unwrap().ends_with("overlay.qcow2"))
    };
    let c = RefCell::new(c);
    until(|| opened(&mut c.borrow_mut()));
    c.borrow_mut().command("object-add", json!({"qom-type": "iothread", "id": "recorded"})).unwrap();
    drop(daemon);
    std::fs::remove_file(dir.path("overlay.qcow2")).unwrap();
    let _ = std::fs::remove_file(dir.path("second.sock"));
    let daemon = start(&dir, &second);
    let mut c = daemon.client();
    assert_eq!(c.command("query-state", json!({})).unwrap()["broken"], json!([]));
    assert_eq!(c.command("query-named-block-nodes", json!({})).unwrap(), json!([]));
}
