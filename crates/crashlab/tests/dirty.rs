//! A share of what `cargo xtask crash --dirty` does. LIVEBLK_SEED draws another one.
#![allow(clippy::unwrap_used)]

fn seed() -> u64 {
    std::env::var("LIVEBLK_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}

#[test]
fn no_crash_makes_a_bitmap_short() {
    let stats = crashlab::dirty::explore(10_000, seed()).unwrap_or_else(|e| panic!("{e}"));
    println!("{stats:?}");
    assert!(stats.torn > 200 && stats.bitmaps > 2_000 && stats.sets > 500, "{stats:?}");
    assert!(stats.over > 100 && stats.continued > 0, "{stats:?}");
}

#[cfg(feature = "planted-bugs")]
#[test]
fn planted_defects_of_the_log_are_found() {
    let found = crashlab::dirty::planted(20_000, seed()).unwrap();
    found.iter().for_each(|(bug, states, e)| println!("{bug}: after {states} states: {e}"));
    assert_eq!(found.len(), dirtylog::PLANTED.len());
}
