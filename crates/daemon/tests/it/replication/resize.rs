//! Disks that grow while they are replicated (D5): on all sides, or on none; the secondary's users see it with the checkpoint.

use super::*;

const MIB: u64 = 1 << 20;

impl Host {
    /// As in QSD, no NBD server may have it meanwhile: its clients would not be told.
    fn resize(&mut self, node: &str, size: u64) -> Result<Value, String> {
        self.c.command("block-export-del", json!({"id": "e0", "mode": "hard"})).unwrap();
        self.c.event("BLOCK_EXPORT_DELETED");
        let resized = self.c.command("block_resize", json!({"node-name": node, "size": size}));
        let export = json!({"type": "nbd", "id": "e0", "node-name": "f0", "name": "disk0", "writable": true});
        self.c.command("block-export-add", export).unwrap();
        self.c.events.clear();
        resized
    }

    /// The disk's length as an NBD client sees it that comes now.
    fn shown(&self, disk: usize) -> u64 {
        let url = format!("nbd+unix:///disk{disk}?socket={}", self.dir.path("nbd.sock"));
        let out =
            Command::new("qemu-img").args(["info", "-f", "raw", "--output=json", &url]).output().unwrap();
        let info: Value = serde_json::from_slice(&out.stdout).unwrap();
        info["virtual-size"].as_u64().unwrap()
    }
}

/// The whole way, with both engines: the primary's users have the room at once, the secondary's with the checkpoint; then the failover,
/// after which the disk alone is the image.
#[test]
fn a_replicated_disk_grows_on_both_sides() {
    for engine in ["redo", "undo"] {
        let (mut p, s) = pair(engine, &json!({}));
        p.io(0, "write -P 1 15M 1M").unwrap();
        p.checkpoint();
        // by either name
        p.resize("d0", 24 * MIB).unwrap();
        p.resize("f0", 32 * MIB).unwrap();
        assert_eq!((p.shown(0), s.shown(0), s.raw(0).len() as u64), (32 * MIB, 16 * MIB, 32 * MIB));
        p.io(0, "write -P 2 20M 1M").unwrap();
        assert!(s.io(0, "read 20M 4k").is_err(), "its view is the checkpoint's");
        let epoch = p.checkpoint();
        assert_eq!(s.shown(0), 32 * MIB);
        for read in ["read -P 1 15M 1M", "read -P 0 16M 4M", "read -P 2 20M 1M", "read -P 0 21M 11M"] {
            s.io(0, read).unwrap();
        }
        s.io(0, "write -P 9 31M 64k").unwrap();
        // a secondary that was killed, and a primary, know it afterwards
        let mut s = s.restart(engine, 1);
        s.secondary();
        assert_eq!(s.shown(0), 32 * MIB);
        let mut p = p.restart(engine, 1);
        p.primary(&[&s], &json!({}));
        p.until_running(1);
        p.io(0, "write -P 3 31M 64k").unwrap();
        assert!(p.checkpoint() > epoch);
        s.io(0, "read -P 3 31M 64k").unwrap();
        p.daemon.signal("KILL");
        p.daemon.wait();
        s.c.command("replication-failover", json!({"group": "g"})).unwrap();
        s.until_merged();
        let raw = s.raw(0);
        assert_eq!(raw.len() as u64, 32 * MIB);
        assert!(raw[20 << 20..21 << 20].iter().all(|b| *b == 2) && raw[31 << 20] == 3);
    }
}

/// A failover to before the checkpoint with the new length: the disk has the old one again, and the former primary follows with its longer disk.
#[test]
fn a_failover_before_the_checkpoint_goes_back_to_the_old_length() {
    for engine in ["redo", "undo"] {
        let (mut p, mut s) = pair(engine, &json!({}));
        p.io(0, "write -P 1 0 1M").unwrap();
        p.checkpoint();
        p.resize("f0", 20 * MIB).unwrap();
        p.io(0, "write -P 2 15M 5M").unwrap();
        p.daemon.signal("STOP");
        s.c.command("replication-failover", json!({"group": "g"})).unwrap();
        assert_eq!(s.shown(0), 16 * MIB);
        s.until_merged();
        assert_eq!(s.raw(0).len() as u64, 16 * MIB);
        s.io(0, "read -P 0 15M 1M").unwrap();
        s.io(0, "write -P 3 0 64k").unwrap();
        let mut p = p.restart(engine, 1);
        let listen = unix(&p.dir.path("repl.sock"));
        let start = json!({"group": "g", "role": "secondary", "listen": listen, "demote": true});
        p.c.command("replication-start", start).unwrap();
        s.primary(&[&p], &json!({}));
        s.until_running(1);
        assert_eq!(p.shown(0), 16 * MIB);
        p.io(0, "read -P 3 0 64k").unwrap();
        p.io(0, "read -P 0 15M 1M").unwrap();
        // and grows again: nothing of what it once had there is seen
        s.resize("f0", 20 * MIB).unwrap();
        s.checkpoint();
        assert_eq!(p.shown(0), 20 * MIB);
        p.io(0, "read -P 0 15M 5M").unwrap();
    }
}

/// What cannot be done on all sides is done on none, and said by the group's name.
#[test]
fn what_does_not_grow_everywhere_grows_nowhere() {
    let (mut p, mut s) = pair("redo", &json!({"timeout-ms": 1000}));
    for (on_primary, node, size, says) in [
        (true, "f0", 8 * MIB, "is not made shorter"),
        (false, "f0", 32 * MIB, "its primary's disk"),
        (false, "d0", 8 * MIB, "its primary's disk"),
    ] {
        let host = if on_primary { &mut p } else { &mut s };
        let e = host.resize(node, size).unwrap_err();
        assert!(e.contains("disk of replication group 'g'") && e.contains(says), "{e}");
    }
    // more than a file can have there
    let e = p.resize("f0", (1 << 60) + 512).unwrap_err();
    assert!(e.contains("'p0' does not follow") || e.contains("bitmap"), "{e}");
    p.until_running(1);
    s.daemon.signal("KILL");
    s.daemon.wait();
    p.until_running(0);
    let e = p.resize("f0", 32 * MIB).unwrap_err();
    assert!(e.contains("secondary 'p0' is not connected"), "{e}");
    assert_eq!((p.shown(0), p.raw(0).len() as u64, s.raw(0).len() as u64), (16 * MIB, 16 * MIB, 16 * MIB));
    p.io(0, "write -P 1 15M 1M").unwrap();
    // nobody is left to follow
    p.c.command("replication-peer-remove", json!({"group": "g", "peer": "p0"})).unwrap();
    p.resize("f0", 32 * MIB).unwrap();
    p.io(0, "write -P 2 31M 1M").unwrap();
    p.c.command("replication-stop", json!({"group": "g"})).unwrap();
    let e = p.resize("f0", 64 * MIB).unwrap_err();
    assert!(e.contains("has no role"), "{e}");
}
