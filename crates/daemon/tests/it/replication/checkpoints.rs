//! Checkpoints that a manager decides about, that are kept to go back to, and that are looked at on a clone.

use super::*;

/// An external manager owns the decision: nothing is committed without its word, what it gives up loses nothing, and one that dies
/// blocks nobody for ever.
#[test]
fn a_manager_decides_about_checkpoints() {
    let (mut p, mut s) = (Host::new("redo", 1), Host::new("redo", 1));
    s.secondary();
    p.io(0, "write -P 1 0 1M").unwrap();
    p.primary(&[&s], &json!({"decision": "external", "checkpoint-interval-ms": 20}));
    // not even the catch-up is committed by itself
    p.c.event("REPLICATION_CHECKPOINT_WANTED");
    let e = p.c.command("replication-checkpoint", json!({"group": "g"})).unwrap_err();
    assert!(e.contains("decided from outside"), "{e}");
    let prepare = json!({"group": "g"});
    let first = p.c.command("replication-prepare-checkpoint", prepare.clone()).unwrap();
    assert_eq!(p.c.event("REPLICATION_PREPARED")["epoch"], first["epoch"]);
    assert!(s.io(0, "read 0 4k").is_err(), "prepared is not committed");
    assert_eq!(s.info()["undecided"], json!([first["epoch"]]));
    let commit = |epoch: &Value| json!({"group": "g", "epoch": epoch});
    let done = p.c.command("replication-commit", commit(&first["epoch"])).unwrap();
    assert_eq!(done["epoch"], first["epoch"]);
    s.io(0, "read -P 1 0 1M").unwrap();
    // it may be repeated; what was never prepared cannot be
    p.c.command("replication-commit", commit(&first["epoch"])).unwrap();
    let e = p.c.command("replication-commit", commit(&json!(99))).unwrap_err();
    assert!(e.contains("no checkpoint 99 waits"), "{e}");

    // two under way: in order; what is given up goes on in the next
    p.io(0, "write -P 2 0 64k").unwrap();
    let second = p.c.command("replication-prepare-checkpoint", prepare.clone()).unwrap()["epoch"].clone();
    p.io(0, "write -P 3 64k 64k").unwrap();
    let third = p.c.command("replication-prepare-checkpoint", prepare).unwrap()["epoch"].clone();
    assert_eq!(p.info()["undecided"], json!([second, third]));
    let e = p.c.command("replication-commit", commit(&third)).unwrap_err();
    assert!(e.contains("before it is not decided"), "{e}");
    p.c.events.clear();
    p.c.command("replication-abort", commit(&second)).unwrap();
    assert_eq!(p.c.event("REPLICATION_CHECKPOINT_VETO")["reason"], "aborted by the manager");
    s.io(0, "read -P 1 0 1M").unwrap();
    p.c.command("replication-commit", commit(&third)).unwrap();
    s.io(0, "read -P 2 0 64k").unwrap();
    s.io(0, "read -P 3 64k 64k").unwrap();

    // the manager dies
    p.io(0, "write -P 4 0 64k").unwrap();
    p.c.events.clear();
    p.c.command("replication-prepare-checkpoint", json!({"group": "g", "decide-within-ms": 50})).unwrap();
    let veto = p.c.event("REPLICATION_CHECKPOINT_VETO");
    assert!(veto["reason"].as_str().unwrap().contains("nobody decided"), "{veto}");
    s.io(0, "read -P 2 0 64k").unwrap();
    p.c.command("replication-set", json!({"group": "g", "decision": "auto"})).unwrap();
    p.checkpoint();
    s.io(0, "read -P 4 0 64k").unwrap();
}

/// Prepared, and the primary dies: the secondary holds the epoch also when it is killed, guesses nothing, and commits it when the
/// manager says so there. While the primary lives, it follows such a decision.
#[test]
fn a_manager_decides_at_the_secondary() {
    for engine in ["redo", "undo"] {
        let (mut p, mut s) = pair(engine, &json!({}));
        p.io(0, "write -P 1 0 64k").unwrap();
        let first = p.c.command("replication-prepare-checkpoint", json!({"group": "g"})).unwrap();
        s.c.command("replication-commit", json!({"group": "g", "epoch": first["epoch"]})).unwrap();
        s.io(0, "read -P 1 0 64k").unwrap();
        let told = p.c.event("REPLICATION_CHECKPOINT");
        until(|| {
            let info = p.info();
            info["committed-epoch"] == first["epoch"] && info["undecided"] == json!([])
        });
        drop(told);
        p.io(0, "write -P 2 0 64k").unwrap();
        let second = p.c.command("replication-prepare-checkpoint", json!({"group": "g"})).unwrap();
        p.io(0, "write -P 3 0 64k").unwrap();
        p.daemon.signal("KILL");
        p.daemon.wait();
        let mut s = s.restart(engine, 1);
        s.secondary();
        s.io(0, "read -P 1 0 64k").unwrap();
        assert_eq!(s.info()["undecided"], json!([second["epoch"]]), "{engine}");
        let e = s.c.command("replication-commit", json!({"group": "g", "epoch": 77})).unwrap_err();
        assert!(e.contains("checkpoint 77 is not prepared here"), "{e}");
        s.c.command("replication-commit", json!({"group": "g", "epoch": second["epoch"]})).unwrap();
        s.io(0, "read -P 2 0 64k").unwrap();
        let done = s.c.command("replication-failover", json!({"group": "g"})).unwrap();
        assert_eq!(done["epoch"], second["epoch"]);
        s.io(0, "read -P 2 0 64k").unwrap();
    }
}

/// 1.14, the manager is down: it dies between prepare and commit. The pair goes on, checkpoints of later epochs can be prepared, and nothing
/// is committed. It comes back, asks what waits for it, and decides in order; or it never does, and what it prepared goes on in the
/// next epoch. If the primary dies as well meanwhile, nobody guesses: who is there says what it knows.
#[test]
fn a_manager_that_dies_comes_back_and_asks_again() {
    for engine in ["redo", "undo"] {
        let (mut p, s) = pair(engine, &json!({}));
        p.io(0, "write -P 1 0 64k").unwrap();
        p.checkpoint();
        p.c.command("replication-set", json!({"group": "g", "decision": "external"})).unwrap();
        p.io(0, "write -P 2 0 64k").unwrap();
        let prepare = json!({"group": "g"});
        let first = p.c.command("replication-prepare-checkpoint", prepare.clone()).unwrap()["epoch"].clone();
        // it dies, and its connection goes with it: all it knows is what it asks for afterwards
        p.reconnect();
        p.io(0, "write -P 3 64k 64k").unwrap();
        s.io(0, "read -P 1 0 64k").unwrap();
        let info = p.info();
        assert_eq!((&info["undecided"], &info["state"]), (&json!([first]), &json!("running")), "{info}");
        let second = p.c.command("replication-prepare-checkpoint", prepare).unwrap()["epoch"].clone();
        for epoch in [&first, &second] {
            p.c.command("replication-commit", json!({"group": "g", "epoch": epoch})).unwrap();
        }
        s.io(0, "read -P 2 0 64k").unwrap();
        s.io(0, "read -P 3 64k 64k").unwrap();

        // it never comes back: what it prepared is given up, and is in the next
        p.io(0, "write -P 4 0 64k").unwrap();
        let left = json!({"group": "g", "decide-within-ms": 50});
        let third = p.c.command("replication-prepare-checkpoint", left).unwrap()["epoch"].clone();
        p.reconnect();
        until(|| p.info()["undecided"] == json!([]));
        s.io(0, "read -P 2 0 64k").unwrap();
        let late = json!({"group": "g", "epoch": third});
        let e = p.c.command("replication-commit", late).unwrap_err();
        assert!(e.contains("waits for a decision"), "{e}");

        // the primary dies as well while one is undecided: it has forgotten it, and makes it again
        let fourth =
            p.c.command("replication-prepare-checkpoint", json!({"group": "g"})).unwrap()["epoch"].clone();
        let mut p = p.restart(engine, 1);
        p.primary(&[&s], &json!({"decision": "external"}));
        let e = p.c.command("replication-commit", json!({"group": "g", "epoch": fourth})).unwrap_err();
        assert!(e.contains("waits for a decision"), "{e}");
        p.c.event("REPLICATION_CHECKPOINT_WANTED");
        let again =
            p.c.command("replication-prepare-checkpoint", json!({"group": "g"})).unwrap()["epoch"].clone();
        assert!(again.as_u64() > fourth.as_u64(), "{again} after {fourth}");
        s.io(0, "read -P 2 0 64k").unwrap();
        p.c.command("replication-commit", json!({"group": "g", "epoch": again})).unwrap();
        s.io(0, "read -P 4 0 64k").unwrap();
    }
}

/// X8: checkpoints that are kept survive a kill of the secondary; a failover goes to the one that is wanted.
#[test]
fn a_failover_goes_back_to_an_older_checkpoint() {
    for engine in ["redo", "undo"] {
        let (mut p, mut s) = (Host::new(engine, 2), Host::keeping(engine, 2, 3));
        s.secondary();
        p.primary(&[&s], &json!({}));
        p.until_running(1);
        let mut epochs = Vec::new();
        for n in 1..=5 {
            p.io(0, &format!("write -P {n} 0 1M")).unwrap();
            p.io(1, &format!("write -P {n} {n}M 64k")).unwrap();
            epochs.push(p.checkpoint());
        }
        assert_eq!(s.info()["checkpoints"], json!(epochs[1..]));
        s.io(0, "write -P 9 2M 64k").unwrap();
        let mut s = s.restart_keeping(engine, 2, 3);
        p.daemon.signal("KILL");
        p.daemon.wait();
        s.secondary();
        assert_eq!(s.info()["checkpoints"], json!(epochs[1..]), "{engine}");
        s.io(0, "read -P 5 0 1M").unwrap();
        let failover = |epoch: u64, own: &str| json!({"group": "g", "epoch": epoch, "own-writes": own});
        let e = s.c.command("replication-failover", failover(epochs[0], "discard")).unwrap_err();
        assert!(
            e.contains(&format!("checkpoint {} is not kept here; there are: {}", epochs[0], epochs[1])),
            "{e}"
        );
        let e = s.c.command("replication-failover", failover(epochs[2], "keep")).unwrap_err();
        assert!(e.contains("cannot be kept with an older one"), "{e}");
        let done = s.c.command("replication-failover", json!({"group": "g", "epoch": epochs[2]})).unwrap();
        assert_eq!(done["epoch"], epochs[2]);
        s.io(0, "read -P 3 0 1M").unwrap();
        s.io(0, "read -P 0 2M 64k").unwrap();
        s.io(1, "read -P 3 3M 64k").unwrap();
        s.io(1, "read -P 0 4M 2M").unwrap();
        let e = s.c.command("replication-failover", failover(epochs[3], "discard")).unwrap_err();
        assert!(e.contains("already"), "{e}");
        s.until_merged();
        let d0 = s.raw(0);
        assert!(d0[..1 << 20].iter().all(|b| *b == 3) && d0[2 << 20..].iter().all(|b| *b == 0), "{engine}");
        assert!(s.raw(1)[4 << 20..].iter().all(|b| *b == 0), "{engine}");
    }
}

/// Another secondary, which had the newest, goes back as well: it is sent what was written since, not everything, and offers nothing any more
/// of what was given up.
#[test]
fn others_go_back_with_a_failover_to_an_older_checkpoint() {
    for (engine, kept) in [("redo", 0), ("redo", 5), ("undo", 0), ("undo", 5)] {
        let mut p = Host::new(engine, 1);
        let (mut a, mut b) = (Host::keeping(engine, 1, 5), Host::keeping(engine, 1, kept));
        a.secondary();
        b.secondary();
        p.io(0, "write -P 1 0 16M").unwrap();
        p.primary(&[&a, &b], &json!({}));
        p.until_running(2);
        let mut epochs = vec![p.checkpoint()];
        for n in 2..=4 {
            p.io(0, &format!("write -P {n} {n}M 64k")).unwrap();
            epochs.push(p.checkpoint());
        }
        p.daemon.signal("KILL");
        p.daemon.wait();
        b.io(0, "read -P 4 4M 64k").unwrap();
        a.c.command("replication-failover", json!({"group": "g", "epoch": epochs[1]})).unwrap();
        a.until_merged();
        a.io(0, "write -P 5 5M 64k").unwrap();
        a.primary(&[&b], &json!({}));
        a.until_running(1);
        let copied = a.info()["peers"][0]["resync-bytes"].as_u64().unwrap();
        // where it has written since it took over, it knows extents of 4 MiB
        assert!((192 << 10..=5 << 20).contains(&copied), "{engine}, {kept}: {copied} bytes were copied");
        for read in ["1M 1M", "3M 64k", "4M 64k", "6M 10M"] {
            b.io(0, &format!("read -P 1 {read}")).unwrap();
        }
        b.io(0, "read -P 2 2M 64k").unwrap();
        b.io(0, "read -P 5 5M 64k").unwrap();
        let there = b.info()["checkpoints"].clone();
        assert!(!there.as_array().unwrap().contains(&json!(epochs[3])), "{engine}: {there}");
    }
}

/// A failover is tried without one: a clone of the checkpoint is written to while replication goes on, and leaves nothing behind.
#[test]
fn a_failover_is_tried_on_a_clone() {
    for engine in ["redo", "undo"] {
        let (mut p, mut s) = pair(engine, &json!({}));
        p.io(0, "write -P 1 0 1M").unwrap();
        let epoch = p.checkpoint();
        let before = std::fs::read_dir(&s.dir.0).unwrap().count();
        let begun =
            s.c.command("replication-test-failover", json!({"group": "g", "node-name": "try"})).unwrap();
        assert_eq!(begun, json!({"epoch": epoch, "nodes": ["try"]}));
        assert_eq!(std::fs::read_dir(&s.dir.0).unwrap().count(), before, "its scratch file has no name");
        s.c.command(
            "block-export-add",
            json!({"type": "nbd", "id": "t", "node-name": "try", "name": "disk7", "writable": true}),
        )
        .unwrap();
        s.io(7, "read -P 1 0 1M").unwrap();
        s.io(7, "write -P 8 100k 100k").unwrap();
        s.io(7, "write -z 300k 50k").unwrap();
        // replication goes on, several checkpoints far, and is brought to the disk
        for n in 2..6 {
            p.io(0, &format!("write -P {n} 0 2M")).unwrap();
            p.checkpoint();
            s.io(0, &format!("read -P {n} 0 2M")).unwrap();
        }
        s.io(7, "read -P 1 0 100k").unwrap();
        s.io(7, "read -P 8 100k 100k").unwrap();
        s.io(7, "read -P 0 300k 50k").unwrap();
        s.io(7, "read -P 1 350k 674k").unwrap();
        s.io(7, "read -P 0 1M 1M").unwrap();
        assert_eq!(s.info()["tests"], json!([{"node-name": "try", "epoch": epoch}]));
        // a second one, of now, with an end
        s.c.command("replication-test-failover", json!({"group": "g", "node-name": "two", "ttl": 1}))
            .unwrap();
        s.c.command(
            "block-export-add",
            json!({"type": "nbd", "id": "u", "node-name": "two", "name": "disk8", "writable": true}),
        )
        .unwrap();
        s.io(8, "read -P 5 0 2M").unwrap();
        assert_eq!(s.c.event("REPLICATION_TEST_ENDED")["node-name"], "two");
        assert!(s.io(8, "read 0 4k").is_err());
        s.c.command("block-export-del", json!({"id": "t"})).unwrap();
        s.c.event("BLOCK_EXPORT_DELETED");
        s.c.command("blockdev-del", json!({"node-name": "try"})).unwrap();
        assert_eq!(s.info()["tests"], json!([]));
        s.io(0, "read -P 5 0 2M").unwrap();
        // what was held for it is given back
        until(|| s.info()["buffer"]["pending"] == 0);
        assert!(s.raw(0)[..2 << 20].iter().all(|b| *b == 5), "{engine}");
    }
}
