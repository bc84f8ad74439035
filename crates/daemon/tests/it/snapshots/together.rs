//! One instant: what a transaction does to several disks, it does between the same two writes of their clients.

use super::{add, end, served};
use crate::common::{Client, Dir};
use crate::disk::{tool, until};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};

/// A running `pair.py`.
struct Pair(Child);

impl Pair {
    fn start(dir: &Dir, disks: &[&str]) -> Pair {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/snapshots/pair.py");
        let uris = disks.iter().map(|d| format!("nbd+unix:///{d}?socket=nbd.sock"));
        let mut child = crate::wire::python()
            .arg(script)
            .args(uris)
            .current_dir(&dir.0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::with_capacity(1, child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "writing\n");
        Pair(child)
    }

    /// The last number.
    fn stop(mut self) -> u64 {
        drop(self.0.stdin.take());
        let mut out = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        assert!(self.0.wait().unwrap().success());
        out.trim().parse().unwrap()
    }
}

/// The number at the start of an image.
fn number(dir: &Dir, image: &Value) -> u64 {
    let to = format!("{}.number", image["file.filename"].as_str().unwrap());
    let spec = format!("json:{image}");
    tool(dir, &format!("qemu-img|dd|-U|-O|raw|bs=512|count=1|if={spec}|of={to}"));
    u64::from_le_bytes(std::fs::read(dir.0.join(to)).unwrap()[..8].try_into().unwrap())
}

/// Numbers that one client wrote to disks in turn, as they are at one instant.
fn check_instant(numbers: &[u64]) {
    assert!(numbers.iter().all(|n| *n > 0), "{numbers:?}");
    let falls = numbers.windows(2).all(|w| w[0] >= w[1]);
    assert!(falls && numbers[0] - numbers[numbers.len() - 1] <= 1, "not of one instant: {numbers:?}");
}

fn transaction(c: &mut Client, actions: &[Value]) {
    c.command("transaction", json!({"actions": actions})).unwrap();
}

#[test]
fn snapshots_of_four_disks() {
    let dir = Dir::new();
    let disks = ["a", "b", "c", "d"];
    let (mut daemon, mut c) = served(&dir, &disks);
    let pair = Pair::start(&dir, &disks);
    const ROUNDS: usize = 12;
    for round in 0..ROUNDS {
        let below = |d: &str| if round == 0 { d.to_owned() } else { format!("{d}{}", round - 1) };
        let mut actions = Vec::new();
        // in an order that is not that of the writes
        for d in ["c", "a", "d", "b"] {
            let top = format!("{d}{round}");
            if round % 2 == 0 {
                tool(&dir, &format!("qemu-img|create|-q|-f|qcow2|{top}.qcow2|8M"));
                add(&mut c, &top);
                actions
                    .push(json!({"type": "blockdev-snapshot", "data": {"node": below(d), "overlay": top}}));
            } else {
                actions.push(json!({"type": "blockdev-snapshot-sync", "data": {"node-name": below(d),
                    "snapshot-file": format!("{top}.qcow2"), "snapshot-node-name": top}}));
            }
        }
        transaction(&mut c, &actions);
    }
    let last = pair.stop();
    end(&mut daemon, &mut c);
    // the layers below the last, each with those below it
    let mut before = 0;
    for round in 0..=ROUNDS {
        let of = |d: &str| {
            let mut spec = json!({"driver": "qcow2", "file.driver": "file", "file.filename": format!("{d}.qcow2"), "backing": null});
            for r in 0..round {
                let file = format!("{d}{r}.qcow2");
                spec =
                    json!({"driver": "qcow2", "file.driver": "file", "file.filename": file, "backing": spec});
            }
            number(&dir, &spec)
        };
        let numbers: Vec<u64> = disks.iter().map(|d| of(d)).collect();
        check_instant(&numbers);
        assert!(numbers[0] >= before, "{numbers:?} after {before}");
        before = numbers[0];
    }
    assert_eq!(before, last);
}

#[test]
fn internal_snapshots_of_three_disks() {
    let dir = Dir::new();
    let disks = ["a", "b", "c"];
    let (mut daemon, mut c) = served(&dir, &disks);
    let pair = Pair::start(&dir, &disks);
    const ROUNDS: usize = 8;
    for round in 0..ROUNDS {
        let take = |d| json!({"type": "blockdev-snapshot-internal-sync", "data": {"device": d, "name": format!("s{round}")}});
        transaction(&mut c, &["b", "a", "c"].map(take));
        if round % 3 == 2 {
            let gone = json!({"device": "b", "name": format!("s{}", round - 1), "id": round.to_string()});
            let record = c.command("blockdev-snapshot-delete-internal-sync", gone).unwrap();
            assert_eq!((&record["id"], &record["vm-state-size"]), (&json!(round.to_string()), &json!(0)));
        }
    }
    let nodes = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
    let a = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "a").unwrap();
    assert_eq!(a["image"]["snapshots"].as_array().unwrap().len(), ROUNDS);
    pair.stop();
    end(&mut daemon, &mut c);
    for d in disks {
        tool(&dir, &format!("qemu-img|check|-q|{d}.qcow2"));
    }
    let mut before = 0;
    for round in (0..ROUNDS).filter(|r| !matches!(r, 1 | 4)) {
        let numbers = disks.map(|d| {
            tool(
                &dir,
                &format!("qemu-img|convert|-f|qcow2|-l|snapshot.name=s{round}|-O|raw|{d}.qcow2|{d}.out"),
            );
            u64::from_le_bytes(
                std::fs::read(dir.0.join(format!("{d}.out"))).unwrap()[..8].try_into().unwrap(),
            )
        });
        check_instant(&numbers);
        assert!(numbers[0] >= before, "{numbers:?} after {before}");
        before = numbers[0];
    }
}

/// Backups of all disks share one instant, with a snapshot of one of them; grouped they end together.
#[test]
fn backups_of_three_disks_and_a_snapshot() {
    let dir = Dir::new();
    let disks = ["a", "b", "c"];
    let (mut daemon, mut c) = served(&dir, &disks);
    let pair = Pair::start(&dir, &disks);
    const ROUNDS: usize = 6;
    for round in 0..ROUNDS {
        let backup = |d: &str| {
            let target = format!("{d}-{round}");
            tool(&dir, &format!("qemu-img|create|-q|-f|qcow2|{target}.qcow2|8M"));
            (target, d.to_owned())
        };
        let mut actions = Vec::new();
        for (target, d) in ["c", "a", "b"].map(backup) {
            add(&mut c, &target);
            actions.push(json!({"type": "blockdev-backup", "data":
                {"job-id": format!("j{d}"), "device": d, "target": target, "sync": "full", "auto-dismiss": false}}));
        }
        let grouped = round % 2 == 0;
        let mut arguments = json!({"actions": actions});
        if grouped {
            arguments["properties"] = json!({"completion-mode": "grouped"});
        } else {
            let inside = json!({"device": "b", "name": format!("s{round}")});
            arguments["actions"]
                .as_array_mut()
                .unwrap()
                .insert(1, json!({"type": "blockdev-snapshot-internal-sync", "data": inside}));
        }
        c.command("transaction", arguments).unwrap();
        while c
            .command("query-jobs", json!({}))
            .unwrap()
            .as_array()
            .unwrap()
            .iter()
            .any(|j| j["status"] != "concluded")
        {
            c.event("JOB_STATUS_CHANGE");
        }
        for d in disks {
            let id = format!("j{d}");
            c.command("job-dismiss", json!({"id": id})).unwrap();
            c.command("blockdev-del", json!({"node-name": format!("{d}-{round}")})).unwrap();
        }
        let mut numbers = disks
            .map(|d| {
                let file = format!("{d}-{round}.qcow2");
                number(&dir, &json!({"driver": "qcow2", "file.driver": "file", "file.filename": file}))
            })
            .to_vec();
        check_instant(&numbers);
        if !grouped {
            tool(
                &dir,
                &format!("qemu-img|convert|-U|-f|qcow2|-l|snapshot.name=s{round}|-O|raw|b.qcow2|b.out"),
            );
            numbers[1] =
                u64::from_le_bytes(std::fs::read(dir.0.join("b.out")).unwrap()[..8].try_into().unwrap());
            check_instant(&numbers);
        }
    }
    pair.stop();
    end(&mut daemon, &mut c);
    disks.iter().for_each(|d| drop(tool(&dir, &format!("qemu-img|check|-q|{d}.qcow2"))));
}

/// One of a group is cancelled: so are the others, and none of them has taken effect.
#[test]
fn a_group_is_cancelled_as_one() {
    let dir = Dir::new();
    let disks = ["a", "b"];
    let (mut daemon, mut c) = served(&dir, &disks);
    let mut actions = Vec::new();
    for d in disks {
        tool(&dir, &format!("qemu-img|create|-q|-f|qcow2|{d}-to.qcow2|8M"));
        add(&mut c, &format!("{d}-to"));
        actions.push(json!({"type": "blockdev-backup", "data":
            {"job-id": format!("j{d}"), "device": d, "target": format!("{d}-to"), "sync": "full", "auto-finalize": false}}));
    }
    let grouped = json!({"completion-mode": "grouped"});
    c.command("transaction", json!({"actions": actions, "properties": grouped})).unwrap();
    until(&mut c, "jb", "pending");
    c.command("job-cancel", json!({"id": "ja"})).unwrap();
    let mut ended = [0, 1].map(|_| c.event("BLOCK_JOB_CANCELLED")["device"].clone());
    ended.sort_by_key(Value::to_string);
    assert_eq!(ended, [json!("ja"), json!("jb")]);
    assert_eq!(c.command("query-jobs", json!({})).unwrap(), json!([]));
    let mixed = json!({"type": "blockdev-snapshot-internal-sync", "data": {"device": "a", "name": "s"}});
    actions.push(mixed);
    let error = c.command("transaction", json!({"actions": actions, "properties": grouped})).unwrap_err();
    let kind = "blockdev-snapshot-internal-sync";
    assert_eq!(
        error,
        format!("Action '{kind}' does not support transaction property completion-mode = grouped")
    );
    end(&mut daemon, &mut c);
}
