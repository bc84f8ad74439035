//! A transaction that fails at whatever place leaves everything as it was.

use super::{add, end, graph, served};
use crate::common::{Client, Dir};
use crate::disk::{tool, until};
use crate::mirrors::{DISK, Writer};
use serde_json::{Value, json};

/// Everything that a transaction could have changed.
fn state(c: &mut Client) -> Value {
    let nodes = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
    let nodes: Vec<Value> = nodes
        .as_array()
        .unwrap()
        .iter()
        .map(|n| {
            json!([
                n["node-name"],
                n["ro"],
                n["drv"],
                n["backing_file_depth"],
                n["image"]["snapshots"],
                bitmaps(n)
            ])
        })
        .collect();
    json!([nodes, format!("{:?}", graph(c)), c.command("query-jobs", json!({})).unwrap()])
}

/// Names and states of a node's bitmaps; their counts where nobody writes.
fn bitmaps(node: &Value) -> Vec<Value> {
    let all = node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    let still = node["node-name"] == "third";
    all.iter()
        .map(|b| json!([b["name"], b["recording"], b["busy"], still.then(|| b["count"].clone())]))
        .collect()
}

/// Actions of every kind that build on one another.
fn actions() -> Vec<Value> {
    let action = |kind: &str, data: Value| json!({"type": kind, "data": data});
    vec![
        action("block-dirty-bitmap-add", json!({"node": "disk", "name": "fresh"})),
        action("block-dirty-bitmap-merge", json!({"node": "disk", "target": "fresh", "bitmaps": ["old"]})),
        action("block-dirty-bitmap-clear", json!({"node": "disk", "name": "old"})),
        action("block-dirty-bitmap-disable", json!({"node": "disk", "name": "old"})),
        action("blockdev-snapshot", json!({"node": "disk", "overlay": "o"})),
        action("block-dirty-bitmap-add", json!({"node": "o", "name": "next"})),
        action("block-dirty-bitmap-remove", json!({"node": "third", "name": "third"})),
        action("block-dirty-bitmap-enable", json!({"node": "disk", "name": "old"})),
        action(
            "blockdev-snapshot-sync",
            json!({"node-name": "o", "snapshot-file": "s.qcow2", "snapshot-node-name": "s"}),
        ),
        action(
            "blockdev-snapshot-sync",
            json!({"node-name": "third", "snapshot-file": "t.qcow2", "snapshot-node-name": "t"}),
        ),
        action("blockdev-snapshot-internal-sync", json!({"device": "s", "name": "inside"})),
        action(
            "blockdev-backup",
            json!({"job-id": "j", "device": "other", "target": "into", "sync": "full"}),
        ),
        action("blockdev-snapshot", json!({"node": "s", "overlay": "p"})),
    ]
}

#[test]
fn at_every_place() {
    let dir = Dir::new();
    let (mut daemon, mut c) = served(&dir, &["disk", "other", "third"]);
    for name in ["o", "p", "into"] {
        tool(&dir, &format!("qemu-img|create|-q|-f|qcow2|{name}.qcow2|8M"));
        add(&mut c, name);
    }
    tool(&dir, "qemu-img|create|-q|-f|raw|model.raw|8M");
    for (node, name) in [("disk", "old"), ("third", "third")] {
        c.command("block-dirty-bitmap-add", json!({"node": node, "name": name})).unwrap();
    }
    tool(&dir, "qemu-io|-f|raw|-c|write -P 5 1M 300k|nbd+unix:///third?socket=nbd.sock");
    let writer = Writer::start(&dir, DISK, &["8", "2000"]);
    let before = state(&mut c);
    let all = actions();
    let abort = json!({"type": "abort", "data": {}});
    for place in 0..=all.len() {
        let mut some = all.clone();
        some.insert(place, abort.clone());
        let error = c.command("transaction", json!({"actions": some})).unwrap_err();
        assert_eq!(error, "Transaction aborted using Abort action");
        assert_eq!(state(&mut c), before, "failed at {place}");
        // the same once more where the action itself fails: what it names is not there
        if let Some(failing) = all.get(place) {
            let mut bad = failing.clone();
            let data = bad["data"].as_object_mut().unwrap();
            let key = ["node", "node-name", "device"].into_iter().find(|k| data.contains_key(*k)).unwrap();
            data.insert(key.to_owned(), json!("nope"));
            let mut some = all.clone();
            some[place] = bad;
            c.command("transaction", json!({"actions": some})).unwrap_err();
            assert_eq!(state(&mut c), before, "failed in {place}");
        }
    }
    c.events.clear();
    c.command("transaction", json!({"actions": all})).unwrap();
    until(&mut c, "j", "null");
    assert_ne!(state(&mut c), before);
    let exports = c.command("query-block-exports", json!({})).unwrap();
    let on: Vec<&Value> = exports.as_array().unwrap().iter().map(|e| &e["node-name"]).collect();
    assert!(on.contains(&&json!("p")) && on.contains(&&json!("t")), "{on:?}");
    writer.stop();
    let shown = tool(&dir, &format!("qemu-img|compare|-f|raw|-F|raw|model.raw|{DISK}"));
    assert!(shown.contains("identical"), "{shown}");
    end(&mut daemon, &mut c);
    for name in ["disk", "other", "third", "into", "o", "s", "t", "p"] {
        tool(&dir, &format!("qemu-img|check|-q|{name}.qcow2"));
    }
}
