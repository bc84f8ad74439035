//! Continuous replication between real daemons: two or more of the built program, real sockets, QEMU's tools as guests.

mod checkpoints;
mod fenced;
mod first;
mod refused;
mod resize;
mod turns;

use crate::common::{Client, Daemon, Dir, until};
use crate::disk::tool;
use serde_json::{Value, json};
use std::process::{Child, Command, Stdio};

/// A host: a raw disk of 16 MiB in a directory of its own, in group `g`, its front exported as `disk`.
struct Host {
    dir: Dir,
    daemon: Daemon,
    c: Client,
}

/// A directory with so many disks.
fn with_disks(disks: usize) -> Dir {
    let dir = Dir::new();
    (0..disks).for_each(|n| drop(tool(&dir, &format!("qemu-img|create|-q|-f|raw|disk{n}.raw|16M"))));
    dir
}

fn unix(path: &str) -> Value {
    json!({"type": "unix", "path": path})
}

impl Host {
    fn new(engine: &str, disks: usize) -> Host {
        Host::keeping(engine, disks, 0)
    }

    /// One that keeps so many checkpoints beside the newest.
    fn keeping(engine: &str, disks: usize, retain: u64) -> Host {
        Host::start(with_disks(disks), engine, disks, retain)
    }

    fn start(dir: Dir, engine: &str, disks: usize, retain: u64) -> Host {
        Host::begin(dir, engine, disks, retain, &[])
    }

    fn begin(dir: Dir, engine: &str, disks: usize, retain: u64, more: &[&str]) -> Host {
        Host::begin_with(dir, engine, disks, retain, more, &json!({}))
    }

    /// With more arguments for the daemon and for the group.
    fn begin_with(dir: Dir, engine: &str, disks: usize, retain: u64, more: &[&str], group: &Value) -> Host {
        let nbd = format!("addr.type=unix,addr.path={}", dir.path("nbd.sock"));
        let daemon = Daemon::start(&dir, &[&["--nbd-server", &nbd], more].concat());
        let mut c = daemon.client();
        let mut volumes = Vec::new();
        for n in 0..disks {
            let file = dir.path(&format!("disk{n}.raw"));
            c.command(
                "blockdev-add",
                json!({"driver": "file", "node-name": format!("d{n}"), "filename": file}),
            )
            .unwrap();
            volumes.push(json!({"node-name": format!("d{n}"), "front": format!("f{n}")}));
        }
        let store = json!({"path": dir.path("store"), "size": 32 << 20});
        let mut all =
            json!({"id": "g", "volumes": volumes, "store": store, "engine": engine, "retain": retain});
        group.as_object().unwrap().iter().for_each(|(k, v)| all[k] = v.clone());
        c.command("replication-group-add", all).unwrap();
        for n in 0..disks {
            let export = json!({"type": "nbd", "id": format!("e{n}"), "node-name": format!("f{n}"), "name": format!("disk{n}"), "writable": true});
            c.command("block-export-add", export).unwrap();
        }
        Host { dir, daemon, c }
    }

    /// One that records what it is.
    fn recorded(engine: &str) -> Host {
        Host::begin(with_disks(1), engine, 1, 0, &["--state-dir", "state"])
    }

    /// Killed, and started again with nothing but what it recorded.
    fn back(mut self) -> Host {
        self.daemon.signal("KILL");
        self.daemon.wait();
        self.started_again()
    }

    /// With nothing but what it recorded, after its end.
    fn started_again(mut self) -> Host {
        let dir = std::mem::replace(&mut self.dir, Dir::new());
        let _ = std::fs::remove_file(dir.path("qmp.sock"));
        let daemon = Daemon::start(&dir, &["--state-dir", "state"]);
        let c = daemon.client();
        Host { dir, daemon, c }
    }

    fn restart(self, engine: &str, disks: usize) -> Host {
        self.restart_keeping(engine, disks, 0)
    }

    fn restart_keeping(mut self, engine: &str, disks: usize, retain: u64) -> Host {
        self.daemon.signal("KILL");
        self.daemon.wait();
        let dir = std::mem::replace(&mut self.dir, Dir::new());
        let _ = std::fs::remove_file(dir.path("nbd.sock"));
        let _ = std::fs::remove_file(dir.path("qmp.sock"));
        Host::start(dir, engine, disks, retain)
    }

    /// Its manager dies, and another comes.
    fn reconnect(&mut self) {
        self.c.stream.shutdown(std::net::Shutdown::Both).unwrap();
        self.c = self.daemon.client();
    }

    fn secondary(&mut self) {
        let listen = unix(&self.dir.path("repl.sock"));
        let start = json!({"group": "g", "role": "secondary", "listen": listen});
        self.c.command("replication-start", start).unwrap();
    }

    fn primary(&mut self, peers: &[&Host], more: &Value) {
        for (n, p) in peers.iter().enumerate() {
            let addr = unix(&p.dir.path("repl.sock"));
            self.c
                .command("replication-peer-add", json!({"group": "g", "peer": format!("p{n}"), "addr": addr}))
                .unwrap();
        }
        let mut arguments = json!({"group": "g", "role": "primary"});
        more.as_object().unwrap().iter().for_each(|(k, v)| arguments[k] = v.clone());
        self.c.command("replication-start", arguments).unwrap();
    }

    fn io(&self, disk: usize, command: &str) -> Result<String, String> {
        ended(self.begins(disk, command))
    }

    /// A request that is begun now; [`ended`] waits for it.
    fn begins(&self, disk: usize, command: &str) -> Child {
        let url = format!("nbd+unix:///disk{disk}?socket={}", self.dir.path("nbd.sock"));
        qemu_io(&["-f", "raw", "-c", command, &url])
    }

    /// Makes its first peer the primary, and listens at `back.sock` afterwards.
    fn switch_over(&mut self) -> Result<Value, String> {
        let listen = unix(&self.dir.path("back.sock"));
        self.c.command("replication-switchover", json!({"group": "g", "to": "p0", "listen": listen}))
    }

    fn info(&mut self) -> Value {
        self.c.command("query-replication", json!({"group": "g"})).unwrap()[0].clone()
    }

    /// Waits until the primary counts so many secondaries as copies. Who was handed the group over is told so before it acts as
    /// the primary: until then it names no peers.
    fn until_running(&mut self, count: usize) {
        until(|| {
            let info = self.info();
            let peers = info["peers"].as_array().into_iter().flatten();
            peers.filter(|p| p["state"] == "running").count() == count
        });
    }

    fn checkpoint(&mut self) -> u64 {
        self.c.command("replication-checkpoint", json!({"group": "g"})).unwrap()["epoch"].as_u64().unwrap()
    }

    fn until_merged(&mut self) {
        until(|| self.info()["stage"] == "done");
    }

    fn raw(&self, disk: usize) -> Vec<u8> {
        std::fs::read(self.dir.path(&format!("disk{disk}.raw"))).unwrap()
    }
}

fn qemu_io(arguments: &[&str]) -> Child {
    let mut io = Command::new("qemu-io");
    io.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    io.spawn().unwrap()
}

/// What a request said, and whether it was done.
fn ended(io: Child) -> Result<String, String> {
    let out = io.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    if out.status.success() && !text.contains("failed") { Ok(text) } else { Err(text) }
}

/// Two hosts with a disk each: a primary, told `more` at its start, and its secondary, in sync.
fn pair(engine: &str, more: &Value) -> (Host, Host) {
    let (mut p, mut s) = (Host::new(engine, 1), Host::new(engine, 1));
    s.secondary();
    p.primary(&[&s], more);
    p.until_running(1);
    (p, s)
}

/// The whole way: a pair is set up, written to, brought to a checkpoint, written to again; the primary is killed; the secondary
/// has the checkpoint, on two disks, and goes on.
#[test]
fn the_primary_is_killed_and_the_secondary_has_the_checkpoint() {
    for engine in ["redo", "undo"] {
        let (mut p, mut s) = (Host::new(engine, 2), Host::new(engine, 2));
        p.io(0, "write -P 1 0 1M").unwrap();
        s.secondary();
        assert!(s.io(0, "read 0 4k").is_err(), "nothing has ever been synchronized");
        p.primary(&[&s], &json!({"flush-level": "remote-durable"}));
        p.until_running(1);
        p.io(0, "write -P 2 512k 1M").unwrap();
        p.io(1, "write -P 3 4M 64k").unwrap();
        let epoch = p.checkpoint();
        s.io(0, "read -P 1 0 512k").unwrap();
        s.io(0, "read -P 2 512k 1M").unwrap();
        s.io(1, "read -P 3 4M 64k").unwrap();
        // after the checkpoint: the primary's writes are not seen, own writes are
        p.io(0, "write -P 4 0 2M").unwrap();
        p.io(1, "write -z 4M 32k").unwrap();
        s.io(0, "write -P 9 100k 7k").unwrap();
        s.io(0, "read -P 1 0 100k").unwrap();
        s.io(0, "read -P 9 100k 7k").unwrap();
        s.io(1, "read -P 3 4M 64k").unwrap();
        p.daemon.signal("KILL");
        p.daemon.wait();
        let done = s.c.command("replication-failover", json!({"group": "g"})).unwrap();
        assert_eq!(done["epoch"], epoch, "{done}");
        let again = s.c.command("replication-failover", json!({"group": "g"})).unwrap();
        assert_eq!((&again["epoch"], &again["generation"]), (&done["epoch"], &done["generation"]), "X7");
        s.io(0, "read -P 1 0 100k").unwrap();
        s.io(0, "read -P 9 100k 7k").unwrap();
        s.io(0, "read -P 2 512k 1M").unwrap();
        s.io(0, "write -P 5 3M 64k").unwrap();
        s.until_merged();
        // I3: now the disks alone are the image
        let (d0, d1) = (s.raw(0), s.raw(1));
        assert!(d0[..100 << 10].iter().all(|b| *b == 1) && d0[100 << 10..107 << 10].iter().all(|b| *b == 9));
        assert!(d0[512 << 10..1536 << 10].iter().all(|b| *b == 2), "{engine}");
        assert!(
            d0[1536 << 10..2 << 20].iter().all(|b| *b == 0)
                && d0[3 << 20..(3 << 20) + 65536].iter().all(|b| *b == 5)
        );
        assert!(d1[4 << 20..(4 << 20) + 65536].iter().all(|b| *b == 3));
    }
}

/// F2: the old primary does not know that another was promoted. Not one byte of it lands, and it serves nobody any more.
#[test]
fn a_primary_that_was_left_behind_is_fenced() {
    let (mut p, mut s) = pair("undo", &json!({}));
    p.io(0, "write -P 1 0 64k").unwrap();
    p.checkpoint();
    s.c.command("replication-failover", json!({"group": "g"})).unwrap();
    s.until_merged();
    // it learns of it from its own connection
    p.c.event("REPLICATION_FENCED");
    assert!(p.io(0, "write -P 6 0 64k").is_err());
    assert!(p.io(0, "read 0 4k").is_err());
    s.io(0, "read -P 1 0 64k").unwrap();
    assert!(s.raw(0)[..65536].iter().all(|b| *b == 1), "nothing of the old primary landed");
    assert_eq!(p.info()["state"], "fenced");
}

/// F5: the secondary is killed in the middle of an epoch. It comes back at its checkpoint, catches up, and commits.
#[test]
fn a_killed_secondary_comes_back_at_its_checkpoint_and_catches_up() {
    for engine in ["redo", "undo"] {
        let (mut p, s) = pair(engine, &json!({"write-level": "remote-durable"}));
        p.io(0, "write -P 1 0 1M").unwrap();
        p.checkpoint();
        p.io(0, "write -P 2 256k 1M").unwrap();
        p.c.events.clear();
        let mut s = s.restart(engine, 1);
        p.c.event("REPLICATION_DEGRADED");
        // the guest goes on, alone, and everybody was told
        p.io(0, "write -P 3 2M 64k").unwrap();
        assert_eq!(p.info()["state"], "degraded");
        s.secondary();
        p.c.event("REPLICATION_RESTORED");
        p.until_running(1);
        s.io(0, "read -P 1 0 256k").unwrap();
        s.io(0, "read -P 2 256k 1M").unwrap();
        s.io(0, "read -P 3 2M 64k").unwrap();
    }
}

/// F7: a frozen secondary. The guest waits no longer than the time-out; commands are answered meanwhile.
#[test]
fn a_frozen_secondary_does_not_freeze_the_guest() {
    let (mut p, s) = pair("redo", &json!({"write-level": "remote-durable", "timeout-ms": 400}));
    s.daemon.signal("STOP");
    p.io(0, "write -P 1 0 64k").unwrap();
    p.c.event("REPLICATION_DEGRADED");
    assert_eq!(p.info()["state"], "degraded");
    s.daemon.signal("CONT");
    p.until_running(1);
    s.io(0, "read -P 1 0 64k").unwrap();
}

/// F8: overlapping writes of several clients end as the same image on both sides.
#[test]
fn overlapping_writes_end_alike_on_both_sides() {
    let (mut p, s) = pair("undo", &json!({"write-level": "queued"}));
    for round in 0..4u32 {
        std::thread::scope(|scope| {
            for client in 0..4u32 {
                let p = &p;
                scope.spawn(move || {
                    let aio: Vec<String> = (0..40u32)
                        .map(|i| {
                            format!(
                                "aio_write -q -P {} {}k 256k",
                                1 + (client * 50 + i + round * 7) % 250,
                                (i * 37 + client * 64) % 1024
                            )
                        })
                        .collect();
                    let url = format!("nbd+unix:///disk0?socket={}", p.dir.path("nbd.sock"));
                    let mut command = Command::new("qemu-io");
                    command.args(["-f", "raw"]);
                    for a in &aio {
                        command.args(["-c", a]);
                    }
                    assert!(command.args(["-c", "aio_flush", &url]).output().unwrap().status.success());
                });
            }
        });
        p.checkpoint();
        assert!(p.raw(0) == s.raw(0), "round {round}");
    }
}

/// The primary is killed and comes back as itself: what it wrote shortly before is not forgotten (I8, the record of activity).
#[test]
fn a_killed_primary_comes_back_and_nothing_is_forgotten() {
    let (mut p, s) = pair("redo", &json!({}));
    p.checkpoint();
    p.io(0, "write -P 1 0 64k").unwrap();
    // killed before a checkpoint has it
    let mut p = p.restart("redo", 1);
    p.primary(&[&s], &json!({}));
    p.until_running(1);
    s.io(0, "read -P 1 0 64k").unwrap();
    let rest = s.io(0, "read -P 0 64k 15M");
    assert!(rest.is_ok(), "{rest:?}");
}

/// Two secondaries, both have to have it; one goes, and the policy says what happens.
#[test]
fn with_two_secondaries_any_one_may_go_and_not_both() {
    let (mut p, mut a, mut b) = (Host::new("redo", 1), Host::new("redo", 1), Host::new("undo", 1));
    a.secondary();
    b.secondary();
    p.primary(
        &[&a, &b],
        &json!({"write-level": "remote-received", "min-acks": 1, "on-link-loss": "io-error"}),
    );
    p.until_running(2);
    p.io(0, "write -P 1 0 64k").unwrap();
    p.checkpoint();
    a.io(0, "read -P 1 0 64k").unwrap();
    b.io(0, "read -P 1 0 64k").unwrap();
    a.daemon.signal("KILL");
    a.daemon.wait();
    p.until_running(1);
    p.io(0, "write -P 2 0 64k").unwrap();
    b.daemon.signal("KILL");
    b.daemon.wait();
    p.until_running(0);
    assert!(p.io(0, "write -P 3 0 64k").is_err(), "the policy is io-error");
}

/// What is written to a promoted disk before it is a primary is not forgotten: a second secondary that was at the same checkpoint
/// gets it. (Its history alone says that it is "behind, by nothing".)
#[test]
fn what_was_written_between_a_failover_and_the_next_primary_reaches_the_other_secondary() {
    for restart in [false, true] {
        let (mut p, mut a, mut b) = (Host::new("redo", 1), Host::new("redo", 1), Host::new("redo", 1));
        a.secondary();
        b.secondary();
        p.primary(&[&a, &b], &json!({}));
        p.until_running(2);
        p.io(0, "write -P 1 0 64k").unwrap();
        p.checkpoint();
        a.io(0, "write -P 2 1M 64k").unwrap();
        p.daemon.signal("KILL");
        p.daemon.wait();
        a.c.command("replication-failover", json!({"group": "g"})).unwrap();
        a.io(0, "write -P 3 2M 64k").unwrap();
        a.until_merged();
        a.io(0, "write -P 4 9M 64k").unwrap();
        if restart {
            a = a.restart("redo", 1);
        }
        a.primary(&[&b], &json!({}));
        a.until_running(1);
        for (pattern, at) in [(1, "0"), (2, "1M"), (3, "2M"), (4, "9M")] {
            b.io(0, &format!("read -P {pattern} {at} 64k")).unwrap();
        }
        // and not by copying everything
        let copied = a.info()["peers"][0]["resync-bytes"].as_u64().unwrap();
        assert!(copied <= 12 << 20, "restart {restart}: {copied} of 16 MiB were copied");
    }
}

/// A disk that is given up for a secondary's has an old store beside it: nothing of that comes back after a crash.
#[test]
fn a_store_made_over_an_old_one_has_nothing_of_it() {
    let (mut p, mut s) = pair("redo", &json!({}));
    for n in 1..9 {
        p.io(0, &format!("write -P {n} 0 1M")).unwrap();
        p.checkpoint();
    }
    s.c.command("replication-failover", json!({"group": "g"})).unwrap();
    s.until_merged();
    s.c.command("replication-stop", json!({"group": "g"})).unwrap();
    let listen = unix(&s.dir.path("repl.sock"));
    let start = json!({"group": "g", "role": "secondary", "listen": listen, "demote": true});
    s.c.command("replication-start", start).unwrap();
    // killed before anything is in the new store
    let mut s = s.restart("redo", 1);
    s.secondary();
    let info = s.info();
    assert_eq!((&info["committed-epoch"], &info["open-bytes"]), (&json!(0), &json!(0)), "{info}");
    // a note of its own, perhaps
    assert!(info["buffer"]["used"].as_u64() < Some(4096), "{info}");
    assert!(s.io(0, "read 0 4k").is_err(), "nothing has ever been synchronized");
}

/// Settings change while it runs; a secondary that was removed is waited for by nobody.
#[test]
fn settings_change_and_secondaries_go_while_it_runs() {
    let (mut p, mut a, b) = (Host::new("redo", 1), Host::new("redo", 1), Host::new("redo", 1));
    a.secondary();
    p.primary(&[&a, &b], &json!({"on-link-loss": "io-error", "min-acks": 2}));
    p.until_running(1);
    assert!(p.io(0, "write -P 1 0 64k").is_err(), "two are asked for, one is there");
    let done =
        p.c.command("replication-set", json!({"group": "g", "min-acks": 1, "checkpoint-interval-ms": 20}));
    assert!(done.unwrap()["seq"].as_u64().unwrap() > 0);
    p.io(0, "write -P 2 0 64k").unwrap();
    // by the clock
    until(|| a.io(0, "read -P 2 0 64k").is_ok());
    let e = p.c.command("replication-set", json!({"group": "g", "checkpoint-interval-ms": 5})).unwrap_err();
    assert!(e.contains("expects 0, or 10"), "{e}");
    // what the absent one lacks is remembered for it, until it is removed
    p.c.command("replication-peer-remove", json!({"group": "g", "peer": "p1"})).unwrap();
    let e = p.c.command("replication-peer-remove", json!({"group": "g", "peer": "p1"})).unwrap_err();
    assert!(e.contains("no peer 'p1'"), "{e}");
    let peers = p.info()["peers"].as_array().unwrap().clone();
    assert!(peers.len() == 1 && peers[0]["name"] == "p0", "{peers:?}");
    p.c.command("replication-peer-remove", json!({"group": "g", "peer": "p0"})).unwrap();
    p.io(0, "write -P 3 0 64k").unwrap();
    assert_eq!(p.info()["peers"], json!([]));
    // and comes back under the same name
    let addr = unix(&a.dir.path("repl.sock"));
    p.c.command("replication-peer-add", json!({"group": "g", "peer": "p0", "addr": addr})).unwrap();
    p.until_running(1);
    a.io(0, "read -P 3 0 64k").unwrap();
}

/// The secondary's disk rots. A verification finds it while guests write, says where, and repairs it; it never takes a write under way
/// for a difference.
#[test]
fn a_verification_finds_what_differs_and_nothing_else() {
    for engine in ["redo", "undo"] {
        let (mut p, mut s) = (Host::new(engine, 2), Host::new(engine, 2));
        p.io(1, "write -P 7 0 3M").unwrap();
        s.secondary();
        p.primary(&[&s], &json!({"checkpoint-interval-ms": 20}));
        p.until_running(1);
        for (repair, rot, verdict, mismatched) in [
            ("none", false, "identical", 0),
            ("none", true, "different", 262_144),
            ("resync", false, "repaired", 262_144),
            ("none", false, "identical", 0),
        ] {
            if rot {
                // nothing of the disk is in the log any more
                p.checkpoint();
                until(|| s.info()["buffer"]["pending"] == 0);
                use std::os::unix::fs::FileExt;
                let file = std::fs::OpenOptions::new().write(true).open(s.dir.path("disk1.raw")).unwrap();
                file.write_all_at(b"rot", 1_000_000).unwrap();
            }
            p.c.events.clear();
            let url = format!("nbd+unix:///disk0?socket={}", p.dir.path("nbd.sock"));
            let writes: Vec<String> = (0..200u32)
                .flat_map(|i| {
                    ["-c".to_owned(), format!("write -q -P {} {}k 64k", i % 250 + 1, i * 77 % 8000)]
                })
                .collect();
            let mut guest =
                Command::new("qemu-io").args(["-f", "raw"]).args(writes).arg(url).spawn().unwrap();
            p.c.command("replication-verify", json!({"group": "g", "peer": "p0", "repair": repair})).unwrap();
            let told = p.c.event("REPLICATION_VERIFY");
            guest.wait().unwrap();
            assert_eq!(
                (&told["verdict"], &told["mismatched"]),
                (&json!(verdict), &json!(mismatched)),
                "{engine}: {told}"
            );
            let last = p.info()["last-verify"].clone();
            assert_eq!(last["done"], 32 << 20, "{last}");
            if mismatched > 0 {
                assert_eq!(
                    (&last["volume"], &last["offset"]),
                    (&json!(1), &json!(1_000_000 / 262_144 * 262_144))
                );
            }
        }
        p.checkpoint();
        s.io(1, "read -P 7 0 3M").unwrap();
    }
}

/// L9: two secondaries are promoted. Neither takes the other for its own, neither is stopped by the other; a command says whose writes go.
#[test]
fn a_split_brain_is_refused_and_resolved_by_command() {
    let (mut p, mut a, mut b) = (Host::new("redo", 1), Host::new("redo", 1), Host::new("redo", 1));
    a.secondary();
    b.secondary();
    p.primary(&[&a, &b], &json!({}));
    p.until_running(2);
    p.io(0, "write -P 1 0 1M").unwrap();
    p.checkpoint();
    p.daemon.signal("KILL");
    p.daemon.wait();
    for (host, pattern) in [(&mut a, 2), (&mut b, 3)] {
        host.c.command("replication-failover", json!({"group": "g"})).unwrap();
        host.until_merged();
        host.io(0, &format!("write -P {pattern} 64k 64k")).unwrap();
    }
    a.primary(&[&b], &json!({}));
    a.c.event("REPLICATION_SPLIT_BRAIN");
    // both go on, and neither has anything of the other
    for (host, pattern) in [(&a, 2), (&b, 3)] {
        host.io(0, &format!("read -P {pattern} 64k 64k")).unwrap();
        host.io(0, &format!("write -P {pattern} 128k 64k")).unwrap();
    }
    assert_eq!(a.info()["peers"][0]["state"], "refused");
    let listen = unix(&b.dir.path("repl2.sock"));
    let e = b.c.command("replication-resolve", json!({"group": "g", "victim": "local"})).unwrap_err();
    assert!(e.contains("'listen' is missing"), "{e}");
    b.c.command("replication-resolve", json!({"group": "g", "victim": "local", "listen": listen})).unwrap();
    a.c.command("replication-peer-remove", json!({"group": "g", "peer": "p0"})).unwrap();
    a.c.command("replication-peer-add", json!({"group": "g", "peer": "p0", "addr": listen})).unwrap();
    a.until_running(1);
    b.io(0, "read -P 2 64k 128k").unwrap();
    let e = a.c.command("replication-resolve", json!({"group": "g", "victim": "p0"})).unwrap_err();
    assert!(e.contains("has refused"), "{e}");
}

/// Fencing by hand: a promotion wants somebody's word.
#[test]
fn a_group_fenced_by_hand_is_promoted_only_on_somebodys_word() {
    let (mut p, mut s) = (Host::new("redo", 1), Host::new("redo", 1));
    s.c.command("block-export-del", json!({"id": "e0"})).unwrap();
    s.c.event("BLOCK_EXPORT_DELETED");
    s.c.command("replication-group-remove", json!({"id": "g"})).unwrap();
    let group = json!({"id": "g", "volumes": [{"node-name": "d0", "front": "f0"}], "store": {"path": s.dir.path("store")},
        "fencing": {"type": "manual"}});
    s.c.command("replication-group-add", group).unwrap();
    s.secondary();
    p.primary(&[&s], &json!({}));
    p.until_running(1);
    p.checkpoint();
    let e = s.c.command("replication-failover", json!({"group": "g"})).unwrap_err();
    assert!(e.contains("fenced by hand"), "{e}");
    assert_eq!(s.info()["role"], "secondary");
    s.c.command("replication-failover", json!({"group": "g", "fenced": true})).unwrap();
    s.until_merged();
    // it may be repeated without
    s.c.command("replication-failover", json!({"group": "g"})).unwrap();
}

/// What makes no sense is refused with a sentence.
#[test]
fn commands_out_of_place_are_refused() {
    let mut h = Host::new("redo", 1);
    for (command, arguments, says) in [
        ("replication-checkpoint", json!({"group": "g"}), "is not a primary"),
        ("replication-failover", json!({"group": "g"}), "is not a secondary"),
        ("replication-stop", json!({"group": "g"}), "does not replicate"),
        ("replication-start", json!({"group": "x", "role": "primary"}), "not found"),
        ("replication-start", json!({"group": "g", "role": "secondary"}), "'listen' is missing"),
        (
            "replication-group-add",
            json!({"id": "g", "volumes": [], "store": {"path": "x"}}),
            "already exists",
        ),
        ("replication-group-add", json!({"id": "h", "volumes": [], "store": {"path": "x"}}), "1 to 1024"),
        (
            "replication-group-add",
            json!({"id": "h", "volumes": [{"node-name": "no"}], "store": {"path": "x"}}),
            "node-name='no'",
        ),
    ] {
        let e = h.c.command(command, arguments).unwrap_err();
        assert!(e.contains(says), "{command}: {e}");
    }
    h.primary(&[], &json!({}));
    let e = h.c.command("replication-checkpoint", json!({"group": "g"})).unwrap_err();
    assert!(e.contains("no secondary is connected"), "{e}");
    h.io(0, "write -P 1 0 64k").unwrap();
    h.c.command("replication-stop", json!({"group": "g"})).unwrap();
    h.c.command("block-export-del", json!({"id": "e0"})).unwrap();
    h.c.event("BLOCK_EXPORT_DELETED");
    let e = h.c.command("blockdev-del", json!({"node-name": "f0"})).unwrap_err();
    assert!(e.contains("in use by replication group 'g'"), "{e}");
    h.c.command("replication-group-remove", json!({"id": "g"})).unwrap();
    assert_eq!(h.c.command("query-replication", json!({})).unwrap(), json!([]));
}

/// The former owner comes back as a secondary. What is sent to it is what either side has written since they parted, whether the former
/// primary lives or was killed, and whoever owned the disks meanwhile.
#[test]
fn a_former_primary_is_sent_only_what_differs() {
    for (engine, kill) in [("redo", false), ("redo", true), ("undo", false), ("undo", true)] {
        let (mut p, mut s) = (Host::new(engine, 2), Host::new(engine, 2));
        s.secondary();
        p.io(0, "write -P 1 0 16M").unwrap();
        p.primary(&[&s], &json!({}));
        p.until_running(1);
        p.io(1, "write -P 2 3M 64k").unwrap();
        p.checkpoint();
        // never replicated, as it turns out
        s.daemon.signal("STOP");
        p.c.command("replication-set", json!({"group": "g", "write-level": "local", "flush-level": "local"}))
            .unwrap();
        p.io(0, "write -P 7 9M 64k").unwrap();
        p.io(1, "write -P 7 0 4k").unwrap();
        if kill {
            p = p.restart(engine, 2);
            s.daemon.signal("CONT");
            s.c.command("replication-failover", json!({"group": "g"})).unwrap();
        } else {
            s.daemon.signal("CONT");
            s.c.command("replication-failover", json!({"group": "g"})).unwrap();
            p.c.event("REPLICATION_FENCED");
        }
        s.until_merged();
        s.io(0, "write -P 4 1M 64k").unwrap();
        s.io(1, "write -P 5 3M 4k").unwrap();
        let listen = unix(&p.dir.path("repl.sock"));
        let start = json!({"group": "g", "role": "secondary", "listen": listen});
        let e = p.c.command("replication-start", start.clone()).unwrap_err();
        assert!(e.contains("demote") || e.contains("primary already"), "{e}");
        let mut demote = start;
        demote["demote"] = json!(true);
        p.c.command("replication-start", demote).unwrap();
        assert!(p.io(0, "read 0 4k").is_err(), "what it holds is no checkpoint");
        s.primary(&[&p], &json!({}));
        s.until_running(1);
        for (disk, read) in [
            (0, "read -P 1 0 1M"),
            (0, "read -P 4 1M 64k"),
            (0, "read -P 1 9M 7M"),
            (1, "read -P 0 0 64k"),
            (1, "read -P 5 3M 4k"),
            (1, "read -P 2 3076k 60k"),
        ] {
            p.io(disk, read).unwrap();
        }
        let copied = s.info()["peers"][0]["resync-bytes"].as_u64().unwrap();
        // extents of 4 MiB of who had its record only: three, or two and what the other remembers exactly
        let most = if kill { 12 << 20 } else { 9 << 20 };
        assert!(copied > 0 && copied <= most, "{engine}, killed: {kill}: {copied} of 32 MiB were copied");
        // and back again, by way of the other: both have been owners now
        s.daemon.signal("KILL");
        s.daemon.wait();
        p.c.command("replication-failover", json!({"group": "g"})).unwrap();
        p.until_merged();
        p.io(0, "read -P 1 9M 7M").unwrap();
        assert_eq!(p.raw(0)[9 << 20], 1);
    }
}

/// Two secondaries; the first that is promoted knows nothing of what its primary wrote to the other's disk after the checkpoint (undo
/// engine: at once). None of it may stay there.
#[test]
fn what_a_dead_primary_left_on_a_disk_does_not_stay() {
    for engine in ["undo", "redo"] {
        let (mut p, mut a, mut b) = (Host::new("redo", 1), Host::new("redo", 1), Host::new(engine, 1));
        a.secondary();
        b.secondary();
        p.primary(&[&a, &b], &json!({"write-level": "remote-received", "min-acks": 2}));
        p.until_running(2);
        p.io(0, "write -P 1 0 1M").unwrap();
        p.checkpoint();
        p.io(0, "write -P 9 512k 64k").unwrap();
        p.daemon.signal("KILL");
        p.daemon.wait();
        if engine == "undo" {
            assert_eq!(b.raw(0)[512 << 10], 9, "it is there");
        }
        a.c.command("replication-failover", json!({"group": "g"})).unwrap();
        a.until_merged();
        a.io(0, "write -P 2 0 4k").unwrap();
        a.primary(&[&b], &json!({}));
        a.until_running(1);
        b.io(0, "read -P 2 0 4k").unwrap();
        b.io(0, "read -P 1 4k 1020k").unwrap();
        let copied = a.info()["peers"][0]["resync-bytes"].as_u64().unwrap();
        assert!(copied <= 8 << 20, "{engine}: {copied} of 16 MiB were copied");
    }
}

/// `--state-dir`: both sides are killed, and each comes back by itself as what it was.
#[test]
fn a_pair_comes_back_by_itself() {
    for engine in ["redo", "undo"] {
        let (mut p, mut s) = (Host::recorded(engine), Host::recorded(engine));
        s.secondary();
        p.io(0, "write -P 1 0 16M").unwrap();
        p.primary(
            &[&s],
            &json!({"write-level": "remote-durable", "timeout-ms": 900, "on-link-loss": "suspend"}),
        );
        p.until_running(1);
        p.io(0, "write -P 2 1M 64k").unwrap();
        let epoch = p.checkpoint();
        p.io(0, "write -P 3 2M 64k").unwrap();
        s.io(0, "write -P 8 3M 64k").unwrap();
        let mut s = s.back();
        let info = s.info();
        assert_eq!(info["role"], "secondary", "{info}");
        // the primary, too, is fast: it may have brought it up to date already, with a checkpoint
        assert!(info["committed-epoch"].as_u64() >= Some(epoch), "{info}");
        p.until_running(1);
        s.io(0, "read -P 3 2M 64k").unwrap();
        p.io(0, "write -P 4 5M 64k").unwrap();
        let mut p = p.back();
        assert_eq!(p.info()["role"], "primary");
        p.until_running(1);
        p.io(0, "read -P 4 5M 64k").unwrap();
        s.io(0, "read -P 4 5M 64k").unwrap();
        let copied = p.info()["peers"][0]["resync-bytes"].as_u64().unwrap();
        assert!(copied <= 8 << 20, "{engine}: {copied} of 16 MiB were copied");
        // settings and all
        p.c.command("replication-peer-remove", json!({"group": "g", "peer": "p0"})).unwrap();
        let mut p = p.back();
        assert_eq!(p.info()["peers"], json!([]));
        // one that has taken over comes back as that; the other, fenced, as that
        p.c.command(
            "replication-peer-add",
            json!({"group": "g", "peer": "p0", "addr": unix(&s.dir.path("repl.sock"))}),
        )
        .unwrap();
        p.until_running(1);
        s.c.command("replication-failover", json!({"group": "g"})).unwrap();
        p.c.event("REPLICATION_FENCED");
        s.until_merged();
        s.io(0, "write -P 6 0 64k").unwrap();
        let mut s = s.back();
        assert_eq!(s.info()["stage"], "done");
        s.io(0, "read -P 6 0 64k").unwrap();
        let mut p = p.back();
        assert_eq!(p.info()["state"], "fenced");
        assert!(p.io(0, "read 0 4k").is_err());
    }
}

/// A group that cannot have its role again serves nothing: its disk alone is no checkpoint.
#[test]
fn a_group_that_does_not_come_back_serves_nothing() {
    let (mut p, mut s) = (Host::recorded("undo"), Host::recorded("undo"));
    s.secondary();
    p.primary(&[&s], &json!({}));
    p.until_running(1);
    p.io(0, "write -P 1 0 64k").unwrap();
    p.checkpoint();
    p.io(0, "write -P 2 0 64k").unwrap();
    std::fs::rename(s.dir.path("store"), s.dir.path("elsewhere")).unwrap();
    let mut s = s.back();
    let info = s.info();
    assert_eq!(info["state"], "closed", "{info}");
    assert!(s.io(0, "read 0 4k").is_err() && s.io(0, "write 0 4k").is_err());
    let state = s.c.command("query-state", json!({})).unwrap();
    assert_eq!(state["broken"][0]["kind"], "replication group", "{state}");
    // mended
    std::fs::rename(s.dir.path("elsewhere"), s.dir.path("store")).unwrap();
    s.c.command("state-retry", json!({})).unwrap();
    p.until_running(1);
    s.io(0, "read -P 2 0 64k").unwrap();
}

/// A pair under TLS: whoever has not the right certificate is not let in, on neither side, and does not disturb the others; the sides can
/// be changed, and come back after a restart.
#[test]
fn a_pair_proves_who_it_is() {
    let dir = Dir::new();
    let pki = crate::tls::pki(&dir);
    let secured = |mut h: Host, authority: &str, tls: &Value| {
        h.c.command("block-export-del", json!({"id": "e0"})).unwrap();
        h.c.event("BLOCK_EXPORT_DELETED");
        h.c.command("replication-group-remove", json!({"id": "g"})).unwrap();
        for (id, endpoint) in [("in", "server"), ("out", "client")] {
            let creds = json!({"qom-type": "tls-creds-x509", "id": id, "dir": format!("{pki}/{authority}"), "endpoint": endpoint,
                "verify-peer": true});
            h.c.command("object-add", creds).unwrap();
        }
        let group = json!({"id": "g", "volumes": [{"node-name": "d0", "front": "f0"}], "store": {"path": h.dir.path("store"), "size": 32 << 20},
            "tls": tls});
        h.c.command("replication-group-add", group).unwrap();
        let export = json!({"type": "nbd", "id": "e0", "node-name": "f0", "name": "disk0", "writable": true});
        h.c.command("block-export-add", export).unwrap();
        h
    };
    let both = json!({"connect": "out", "listen": "in"});
    let mut s = secured(Host::recorded("redo"), "ours", &both);
    s.secondary();
    // in the clear, and with the certificate of another authority
    let mut clear = Host::new("redo", 1);
    clear.primary(&[&s], &json!({}));
    let mut other = secured(Host::new("redo", 1), "other", &both);
    other.primary(&[&s], &json!({}));
    let mut p = secured(
        Host::new("redo", 1),
        "ours",
        &json!({"connect": "out", "listen": "in", "hostname": "localhost"}),
    );
    p.primary(&[&s], &json!({}));
    p.until_running(1);
    for h in [&mut clear, &mut other] {
        let info = h.info();
        assert!(info["state"] == "degraded" && info["last-error"].is_string(), "{info}");
    }
    assert_eq!((&p.info()["tls"], &clear.info()["tls"]), (&json!(true), &json!(false)));
    p.io(0, "write -P 1 0 1M").unwrap();
    p.checkpoint();
    s.io(0, "read -P 1 0 1M").unwrap();
    // one that expects TLS does not talk to one that does not
    let mut bare = Host::new("redo", 1);
    bare.secondary();
    let addr = unix(&bare.dir.path("repl.sock"));
    p.c.command("replication-peer-add", json!({"group": "g", "peer": "bare", "addr": addr})).unwrap();
    let mut s = s.back();
    p.until_running(1);
    assert!(bare.io(0, "read 0 4k").is_err(), "nothing has come");
    p.c.command("replication-peer-remove", json!({"group": "g", "peer": "bare"})).unwrap();
    p.switch_over().unwrap();
    s.until_running(1);
    s.io(0, "write -P 2 0 64k").unwrap();
    s.checkpoint();
    p.io(0, "read -P 2 0 64k").unwrap();
    let wrong = json!({"id": "h", "volumes": [], "store": {"path": "x"}, "tls": {"connect": "in"}});
    let e = p.c.command("replication-group-add", wrong).unwrap_err();
    assert!(e.contains("client endpoint"), "{e}");
}
