//! Sides that change roles again and again, and what must not be left over from the role before. The simulator's scenario `turns` found
//! what is tried here.

use super::*;

/// A primary hands over, and takes over again when the other dies: its users write at once, also while it merges.
#[test]
fn who_handed_over_writes_again_after_a_failover() {
    for engine in ["redo", "undo"] {
        let (mut p, mut s) = pair(engine, &json!({}));
        p.io(0, "write -P 1 0 1M").unwrap();
        p.switch_over().unwrap();
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
        let (mut p, s) = pair(engine, &json!({"write-level": "remote-durable", "timeout-ms": 500}));
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
        until(|| p.c.command("replication-checkpoint", json!({"group": "g"})).is_ok());
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

/// I7: a primary that was succeeded while it was down is started as primary again, by somebody who does not know it. Its successor, a primary
/// too by now, is found where it listened as a secondary, or finds the old one; nothing is served that could have been asked about.
#[test]
fn who_was_succeeded_while_it_was_down_is_fenced() {
    for knows in [true, false] {
        let (mut p, mut s) = pair("redo", &json!({}));
        p.io(0, "write -P 1 0 1M").unwrap();
        p.checkpoint();
        p.daemon.signal("STOP");
        s.c.command("replication-failover", json!({"group": "g"})).unwrap();
        s.until_merged();
        let place = unix(&p.dir.path("door.sock"));
        s.c.command("replication-peer-add", json!({"group": "g", "peer": "old", "addr": place})).unwrap();
        s.primary(&[], &json!({}));
        assert_eq!(s.info()["listen"], s.dir.path("repl.sock").as_str());
        s.io(0, "write -P 2 0 64k").unwrap();
        let mut p = p.restart("redo", 1);
        if knows {
            p.primary(&[&s], &json!({"listen": place}));
            assert!(p.io(0, "write -P 3 0 64k").is_err(), "it could ask");
        } else {
            // it can ask nobody, and is called
            p.primary(&[], &json!({"listen": place}));
        }
        p.c.event("REPLICATION_FENCED");
        assert_eq!(p.info()["state"], "fenced");
        assert!(p.io(0, "read 0 4k").is_err() && p.io(0, "write 0 4k").is_err());
        // for ever, also where nobody can be asked
        s.daemon.signal("STOP");
        let mut p = p.restart("redo", 1);
        p.primary(&[], &json!({}));
        assert_eq!(p.info()["state"], "fenced");
        assert!(p.io(0, "read 0 4k").is_err());
        // the successor comes back, and is found where it was
        let mut s = s.restart("redo", 1);
        s.primary(&[], &json!({}));
        assert_eq!(s.info()["listen"], s.dir.path("repl.sock").as_str());
        s.io(0, "read -P 2 0 64k").unwrap();
        let start = json!({"group": "g", "role": "secondary", "listen": place, "demote": true});
        p.c.command("replication-start", start).unwrap();
        s.c.command("replication-peer-add", json!({"group": "g", "peer": "old", "addr": place})).unwrap();
        s.until_running(1);
        p.io(0, "read -P 2 0 64k").unwrap();
        p.io(0, "read -P 1 64k 960k").unwrap();
    }
}

/// L1, L2: a primary that comes back, and whose secondary cannot be asked, serves as its policy says, after the time-out at the latest.
#[test]
fn who_comes_back_alone_serves() {
    let (p, mut s) = pair("redo", &json!({}));
    p.io(0, "write -P 1 0 64k").unwrap();
    s.daemon.signal("KILL");
    s.daemon.wait();
    let mut p = p.restart("redo", 1);
    p.primary(&[&s], &json!({}));
    p.io(0, "write -P 2 0 64k").unwrap();
    assert_eq!(p.info()["state"], "degraded");
    // somebody is there who says nothing
    let mut p = p.restart("redo", 1);
    let path = p.dir.path("silent.sock");
    let _silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
    p.c.command("replication-peer-add", json!({"group": "g", "peer": "silent", "addr": unix(&path)}))
        .unwrap();
    p.primary(&[], &json!({"timeout-ms": 1500}));
    assert_eq!(p.info()["state"], "connecting");
    p.io(0, "read -P 2 0 64k").unwrap();
    p.io(0, "write -P 3 0 64k").unwrap();
    assert_eq!(p.info()["state"], "degraded");
}
