//! Snapshots and transactions of the built daemon, with clients that write meanwhile and QEMU's own tools to look at the images.

mod rollback;
mod together;

use crate::common::{Client, Daemon, Dir};
use crate::disk::tool;
use crate::mirrors::{DISK, Writer};
use serde_json::{Value, json};

/// Adds a qcow2 image as a node without a layer below.
fn add(c: &mut Client, name: &str) {
    let node = json!({"driver": "qcow2", "node-name": name, "backing": null, "discard": "unmap",
        "file": {"driver": "file", "filename": format!("{name}.qcow2"), "discard": "unmap"}});
    c.command("blockdev-add", node).unwrap();
}

/// A daemon that serves images `NAMES.qcow2`, made here, each under its name.
fn served(dir: &Dir, names: &[&str]) -> (Daemon, Client) {
    let daemon = Daemon::start(dir, &["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
    let mut c = daemon.client();
    for name in names {
        tool(dir, &format!("qemu-img|create|-q|-f|qcow2|{name}.qcow2|8M"));
        add(&mut c, name);
        let export = json!({"type": "nbd", "id": format!("e-{name}"), "node-name": name, "name": name, "writable": true});
        c.command("block-export-add", export).unwrap();
    }
    (daemon, c)
}

/// What the graph is: the edges as (parent, name, child), and which node the exports are on.
fn graph(c: &mut Client) -> (Vec<(String, String, String)>, Vec<Value>) {
    let g = c.command("x-debug-query-block-graph", json!({})).unwrap();
    let nodes = g["nodes"].as_array().unwrap();
    let name = |id: &Value| {
        let node = nodes.iter().find(|n| n["id"] == *id).unwrap();
        format!("{} {}", node["type"].as_str().unwrap(), node["name"].as_str().unwrap())
    };
    let mut edges: Vec<_> = g["edges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (name(&e["parent"]), format!("{} {}", e["name"], e["perm"]), name(&e["child"])))
        .collect();
    edges.sort();
    let exports = c.command("query-block-exports", json!({})).unwrap();
    (edges, exports.as_array().unwrap().clone())
}

fn end(daemon: &mut Daemon, c: &mut Client) {
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
}

/// Layer after layer goes on top under a writing client: some of nodes, some made by the command. Nothing is lost, what lies below
/// is never written again, and the headers of those that were made name it.
#[test]
fn layer_after_layer_under_a_writer() {
    let dir = Dir::new();
    let (mut daemon, mut c) = served(&dir, &["disk"]);
    tool(&dir, "qemu-img|create|-q|-f|raw|model.raw|8M");
    let writer = Writer::start(&dir, DISK, &["8", "2000"]);
    let mut top = "disk".to_owned();
    let mut sums: Vec<(String, String)> = Vec::new();
    for i in 0..6 {
        let next = format!("l{i}");
        if i % 2 == 0 {
            // A layer whose header does not name what is below would be named with its backing file later (`json:`).
            let below = format!("-u|-b|{top}.qcow2|-F|qcow2");
            tool(&dir, &format!("qemu-img|create|-q|-f|qcow2|{below}|{next}.qcow2|8M"));
            add(&mut c, &next);
            c.command("blockdev-snapshot", json!({"node": top, "overlay": next})).unwrap();
        } else {
            let a = json!({"node-name": top, "snapshot-file": format!("{next}.qcow2"), "snapshot-node-name": next});
            c.command("blockdev-snapshot-sync", a).unwrap();
            let info = tool(&dir, &format!("qemu-img|info|-U|--output=json|{next}.qcow2"));
            let info: Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["backing-filename"], format!("{top}.qcow2"));
            assert_eq!(info["backing-filename-format"], "qcow2");
        }
        let exports = c.command("query-block-exports", json!({})).unwrap();
        assert_eq!(exports[0]["node-name"], next);
        sums.push((top.clone(), tool(&dir, &format!("sha256sum|{top}.qcow2"))));
        top = next;
    }
    writer.stop();
    // from the top down as the daemon has it: not all headers name what is below
    let shown = tool(&dir, &format!("qemu-img|compare|-f|raw|-F|raw|model.raw|{DISK}"));
    assert!(shown.contains("identical"), "{shown}");
    for (name, sum) in sums {
        assert_eq!(
            sum,
            tool(&dir, &format!("sha256sum|{name}.qcow2")),
            "{name} was written after its snapshot"
        );
        tool(&dir, &format!("qemu-img|check|-q|-U|{name}.qcow2"));
    }
    end(&mut daemon, &mut c);
}

/// What is refused, in the words that clients know, and that it changes nothing.
#[test]
fn refusals() {
    let dir = Dir::new();
    let (mut daemon, mut c) = served(&dir, &["disk", "other"]);
    tool(&dir, "qemu-img|create|-q|-f|raw|r.raw|8M");
    c.command(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "r.raw"}}),
    )
    .unwrap();
    for name in ["o", "p"] {
        tool(&dir, &format!("qemu-img|create|-q|-f|qcow2|{name}.qcow2|8M"));
        add(&mut c, name);
    }
    let before = graph(&mut c);
    let sync = |more: Value| {
        let mut a = json!({"node-name": "disk", "snapshot-file": "s.qcow2", "snapshot-node-name": "s"});
        a.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ("blockdev-snapshot-sync", a)
    };
    let plain = |node: &str, overlay: &str| ("blockdev-snapshot", json!({"node": node, "overlay": overlay}));
    for ((command, arguments), want) in [
        (plain("nope", "o"), "Cannot find device='nope' nor node-name='nope'"),
        (plain("disk", "nope"), "Cannot find device='nope' nor node-name='nope'"),
        (plain("disk", "other"), "The overlay is already in use"),
        (plain("o", "o"), "Making 'o' a backing child of 'o' would create a cycle"),
        (plain("disk", "r"), "The overlay does not support backing images"),
        (sync(json!({"snapshot-node-name": "o"})), "New overlay node-name already in use"),
        (
            sync(json!({"snapshot-file": "no/s.qcow2"})),
            "Could not create 'no/s.qcow2': No such file or directory",
        ),
        (sync(json!({"mode": "existing"})), "Could not open 's.qcow2': No such file or directory"),
        (sync(json!({"snapshot-file": "disk.qcow2"})), "Failed to get \"write\" lock"),
        (sync(json!({"format": "raw"})), "Backing file not supported for file format 'raw'"),
        (sync(json!({"format": "nope"})), "Unknown file format 'nope'"),
    ] {
        assert_eq!(c.command(command, arguments.clone()).unwrap_err(), want, "{arguments}");
        assert_eq!(graph(&mut c), before, "{arguments}");
    }
    c.command("blockdev-snapshot", json!({"node": "disk", "overlay": "o"})).unwrap();
    let e = c.command("blockdev-snapshot", json!({"node": "disk", "overlay": "p"})).unwrap_err();
    assert_eq!(e, "Node 'disk' is busy: node is used as backing hd of 'o'");
    // nobody uses it: the new layer goes again at once
    let unused = json!({"node-name": "p", "snapshot-file": "t.qcow2", "snapshot-node-name": "t"});
    c.command("blockdev-snapshot-sync", unused).unwrap();
    let nodes = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
    assert!(!nodes.as_array().unwrap().iter().any(|n| n["node-name"] == "t"));
    end(&mut daemon, &mut c);
}
