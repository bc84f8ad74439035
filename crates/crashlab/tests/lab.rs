//! A share of what `cargo xtask crash` does, small enough for every test run.
#![allow(clippy::unwrap_used)]

use crashlab::{Plan, explore, hostile};

#[test]
fn no_crash_corrupts_an_image_or_loses_what_was_flushed() {
    let plan = Plan { states: 12_000, seed: 11, threads: 2, qemu: 100, ..Plan::default() };
    let stats = explore(&plan).unwrap_or_else(|f| panic!("{}: {}", f.kind, f.text));
    assert!(stats.states >= 12_000 && stats.kills > 300 && stats.torn > 300, "{stats:?}");
    assert!(stats.continued > 5 && stats.leaky > 0 && stats.repaired > 0, "{stats:?}");
    assert!(stats.agreed > 10, "the reference was asked: {stats:?}");
    // The reference needs 19 barriers for 8 flushes.
    assert!(
        stats.barriers * 8 <= stats.flushes * 19,
        "{} barriers for {} flushes",
        stats.barriers,
        stats.flushes
    );
}

#[test]
fn stale_refcounts_are_counted_anew() {
    let plan = Plan { states: 800, seed: 5, threads: 1, qemu: 10, only: "lazy".into() };
    let stats = explore(&plan).unwrap_or_else(|f| panic!("{}: {}", f.kind, f.text));
    assert!(stats.dirty > 50, "{stats:?}");
}

#[test]
fn hostile_images_are_survived() {
    let [parsed, clean, repaired, opened] = hostile::many(1500, 3).unwrap();
    // The generator makes images that get past the header, and not only sound ones.
    assert!(
        parsed > 500 && clean > 50 && repaired > 400 && opened > 400,
        "{parsed} {clean} {repaired} {opened}"
    );
}

#[cfg(feature = "planted-bugs")]
#[test]
fn planted_defects_are_found() {
    let found = crashlab::planted(&Plan { states: 20_000, ..Plan::default() }).unwrap();
    assert_eq!(found.len(), crashlab::PLANTED.len());
}
