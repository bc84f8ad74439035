//! Sides that change roles again and again, and what must not be left over from the role before. The simulator's scenario `turns` found
//! what is tried here.

use super::*;

/// A primary hands over, and takes over again when the other dies: its users write at once, also while it merges.
#[test]
fn who_handed_over_writes_again_after_a_failover() {
    for engine in ["redo", "undo"] {
        let (mut p, mut s) = (Host::new(engine, 1), Host::new(engine, 1));
        s.secondary();
        p.primary(&[&s], &json!({}));
        p.until_running(1);
        p.io(0, "write -P 1 0 1M").unwrap();
        let over = json!({"group": "g", "to": "p0", "listen": unix(&p.dir.path("back.sock"))});
        p.c.command("replication-switchover", over).unwrap();
        assert!(p.io(0, "write -P 2 0 64k").is_err(), "it was handed over");
        s.until_running(1);
        s.io(0, "write -P 3 1M 64k").unwrap();
        s.checkpoint();
        s.daemon.signal("KILL");
        s.daemon.wait();
        p.c.command("replication-failover", json!({"group": "g"})).unwrap();
        p.io(0, "write -P 4 2M 64k").unwrap();
        p.until_merged();
        for read in ["read -P 1 0 1M", "read -P 3 1M 64k", "read -P 4 2M 64k"] {
            p.io(0, read).unwrap();
        }
    }
}

/// L1: a store that is full, and the manager who owns the decision makes no checkpoint: the guest waits for the time-out, not for ever. What was given up follows again.
#[test]
fn no_guest_waits_for_a_store_that_nobody_empties() {
    for engine in ["redo", "undo"] {
        let (mut p, mut s) = (Host::new(engine, 1), Host::new(engine, 1));
        s.secondary();
        p.primary(&[&s], &json!({"write-level": "remote-durable", "timeout-ms": 500}));
        p.until_running(1);
        p.checkpoint();
        p.c.command("replication-set", json!({"group": "g", "decision": "external"})).unwrap();
        p.c.events.clear();
        // more than the store takes under the engine redo; undo preserves each place once
        for n in 0..4 {
            p.io(0, &format!("write -P {} 0 16M", n + 2)).unwrap();
        }
        if engine == "redo" {
            let told = p.c.event("REPLICATION_ERROR");
            assert_eq!((&told["operation"], &told["peer"]), (&json!("forward"), &json!("p0")), "{told}");
        }
        p.c.command("replication-set", json!({"group": "g", "decision": "auto"})).unwrap();
        let c = std::cell::RefCell::new(&mut p.c);
        until(|| c.borrow_mut().command("replication-checkpoint", json!({"group": "g"})).is_ok());
        s.io(0, "read -P 5 0 16M").unwrap();
    }
}

/// After a split brain whoever was refused is tried again by one caller, not by two that end each other's sessions for ever.
#[test]
fn who_is_tried_again_at_once_stays_connected() {
    let (mut p, mut a, mut b) = (Host::new("redo", 1), Host::new("redo", 1), Host::new("redo", 1));
    a.secondary();
    b.secondary();
    p.primary(&[&a, &b], &json!({}));
    p.until_running(2);
    p.checkpoint();
    p.daemon.signal("KILL");
    p.daemon.wait();
    for host in [&mut a, &mut b] {
        host.c.command("replication-failover", json!({"group": "g"})).unwrap();
        host.until_merged();
    }
    a.primary(&[&b], &json!({}));
    a.c.event("REPLICATION_SPLIT_BRAIN");
    // before the one that was refused has gone
    let listen = unix(&b.dir.path("repl.sock"));
    b.c.command("replication-resolve", json!({"group": "g", "victim": "local", "listen": listen})).unwrap();
    a.c.command("replication-resolve", json!({"group": "g", "victim": "p0"})).unwrap();
    a.until_running(1);
    for n in 1..30 {
        a.io(0, &format!("write -P {n} 0 64k")).unwrap();
        a.checkpoint();
    }
    assert_eq!(a.info()["peers"][0]["state"], "running");
    b.io(0, "read -P 29 0 64k").unwrap();
}
