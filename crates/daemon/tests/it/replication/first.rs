//! The first synchronization: a disk full of data, far larger than what the secondary's store takes.

use super::*;

const LEN: usize = 64 << 20;

/// With either engine, over a secondary's disk full of other data. While it comes the guest writes on.
#[test]
fn a_full_disk_larger_than_the_store_gets_in_sync() {
    for engine in ["redo", "undo"] {
        let full = |fill: u8| {
            let dir = Dir::new();
            std::fs::write(dir.path("disk0.raw"), vec![fill; LEN]).unwrap();
            // the store takes 32 MiB, a quarter of them for own writes
            Host::start(dir, engine, 1, 0)
        };
        let (mut p, mut s) = (full(0x5a), full(0x11));
        s.secondary();
        p.primary(&[&s], &json!({}));
        for n in 0..20 {
            p.io(0, &format!("write -P {n} {n}M 4k")).unwrap();
        }
        p.until_running(1);
        s.io(0, "read -P 90 40M 8M").unwrap();
        p.io(0, "write -P 7 63M 1M").unwrap();
        s.io(0, "read -P 90 63M 1M").unwrap();
        p.checkpoint();
        until(|| s.info()["buffer"]["pending"] == 0);
        let (here, there) = (p.raw(0), s.raw(0));
        assert!(
            here == there,
            "{engine}: they differ at {:?}",
            here.iter().zip(&there).position(|(a, b)| a != b)
        );
    }
}

/// What was missed at a checkpoint and does not fit beside it: the secondary stays at its checkpoint, it is told, and no guest waits.
#[test]
fn what_does_not_fit_beside_a_checkpoint_is_told_and_nobody_waits_for_it() {
    let dir = Dir::new();
    std::fs::write(dir.path("disk0.raw"), vec![0; LEN]).unwrap();
    let mut p = Host::start(dir, "redo", 1, 0);
    let dir = Dir::new();
    std::fs::write(dir.path("disk0.raw"), vec![0; LEN]).unwrap();
    let mut s = Host::start(dir, "redo", 1, 0);
    s.secondary();
    p.primary(&[&s], &json!({"timeout-ms": 500}));
    p.until_running(1);
    let epoch = p.checkpoint();
    // it comes back without a role, and misses all of this
    let mut s = s.restart("redo", 1);
    p.io(0, "write -P 3 0 64M").unwrap();
    s.secondary();
    p.c.events.clear();
    let told = p.c.event("REPLICATION_ERROR");
    assert_eq!((&told["operation"], &told["peer"]), (&json!("catch-up"), &json!("p0")), "{told}");
    assert!(told["reason"].as_str().unwrap().contains("store"), "{told}");
    // more than may wait for a peer
    for n in 0..3 {
        p.io(0, &format!("write -P {} 0 32M", n + 4)).unwrap();
    }
    assert_eq!(s.info()["committed-epoch"], epoch);
    s.io(0, "read -P 0 0 64M").unwrap();
}
