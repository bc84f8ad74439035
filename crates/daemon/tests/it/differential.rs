//! A share of `cargo xtask replication`: the same random history on pairs of QEMU, of liveblkd, and mixed, against one oracle, and the failures F2 to
//! F8 of the specification over the own wire (over QEMU's they are in `colo.rs`). tests/replication/ says what is checked.

use crate::wire::compare;

fn run(pairs: &[&str], more: &[&str]) {
    let seed = std::env::var("LIVEBLK_SEED").unwrap_or_else(|_| std::process::id().to_string());
    let mut arguments = vec!["--seed", &seed];
    pairs.iter().for_each(|p| arguments.extend(["--pair", p]));
    arguments.extend(more);
    let arguments: Vec<String> = arguments.into_iter().map(str::to_owned).collect();
    compare("../replication/differential.py", &arguments);
}

const NATIVE: [&str; 2] = ["native-redo", "native-undo"];

#[test]
fn a_random_history_on_two_of_qemu_has_only_the_failures_that_are_known() {
    run(&["qemu"], &["--ops", "300", "--no-scenes"]);
}

#[test]
fn a_random_history_from_ours_to_qemu() {
    run(&["ours-qemu"], &["--ops", "600", "--no-scenes"]);
}

#[test]
fn a_random_history_from_qemu_to_ours() {
    run(&["qemu-ours"], &["--ops", "600", "--no-scenes"]);
}

#[test]
fn a_random_history_over_nbd() {
    run(&["nbd"], &["--ops", "1000", "--no-scenes"]);
}

/// F2 as well: each history ends with a failover and an old primary that writes on.
#[test]
fn a_random_history_over_the_own_wire() {
    run(&NATIVE, &["--ops", "1000", "--no-scenes"]);
}

#[test]
fn f3_a_full_disk_below_the_secondary_vetoes_the_checkpoint() {
    run(&NATIVE, &["--only", "f3"]);
}

#[test]
fn f4_a_checkpoint_of_two_disks_is_of_both_or_of_none() {
    run(&NATIVE, &["--only", "f4"]);
}

#[test]
fn f5_a_secondary_that_is_killed_comes_back_at_its_checkpoint() {
    run(&NATIVE, &["--only", "f5"]);
}

#[test]
fn f6_a_merge_that_fails_is_told_and_can_be_tried_again() {
    run(&NATIVE, &["--only", "f6"]);
}

#[test]
fn f7_a_frozen_secondary_freezes_nobody() {
    run(&NATIVE, &["--only", "f7"]);
}

/// With a store that holds a small part of what is written: checkpoints come by themselves, and nobody waits for ever.
#[test]
fn f8_overlapping_writes_end_alike() {
    run(&NATIVE, &["--only", "f8"]);
}
