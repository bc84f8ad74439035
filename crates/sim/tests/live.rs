//! A share of the whole-daemon seeds, and every seed that ever failed.
#![allow(clippy::unwrap_used)] // a test says by panicking

use sim::runner::{Options, Report, Scenario, run, run_one};
use sim::scenario::{again, chain, find, live, nth, replica, steps};

/// Seeds of each scenario in the tests; `cargo xtask sim` runs more.
const SHARE: u64 = 150;

fn clean(report: &Report) {
    println!("{report}");
    let lines: Vec<String> = report.failures.iter().map(|(s, v)| format!("seed {s}: {v}")).collect();
    assert!(lines.is_empty(), "{}", lines.join("\n"));
    assert_eq!(report.counts.get(sim::HELD), None, "memory that is not given back");
}

/// So many seeds of a scenario, some of them twice.
fn share(scenario: Scenario, seeds: u64) -> Report {
    let start = start();
    let report =
        run(scenario, start..start + seeds, &Options { jobs: 2, twice_every: 10, ..Options::default() });
    clean(&report);
    report
}

fn start() -> u64 {
    let start = std::env::var("SIM_START").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    println!("SIM_START={start}");
    start
}

#[test]
fn a_disk_served_survives_kills_and_power_losses() {
    let report = share(live::served, SHARE);
    for what in ["kills", "power losses", "images checked"] {
        assert!(report.counts.get(what).is_some_and(|n| *n > 5), "{what}: a run without them proves little");
    }
}

#[test]
fn a_mirror_is_never_wrong() {
    let report = share(live::whole_daemon, SHARE);
    for what in ["completed", "cancelled softly", "ready", "kills", "power losses", "synced writes checked"] {
        assert!(report.counts.get(what).is_some_and(|n| *n > 2), "{what}: a run without them proves little");
    }
}

#[test]
fn a_daemon_with_a_state_directory_comes_back_from_any_death() {
    let report = share(again::again, SHARE / 3);
    let all =
        ["kills", "power losses", "quits", "pivots", "copies checked", "snapshots", "mirrors that go on"];
    for what in all.into_iter().chain(["jobs begun anew", "disks checked", "links cut", "far power losses"]) {
        assert!(report.counts.get(what).is_some_and(|n| *n > 2), "{what}: a run without them proves little");
    }
}

/// Crash points that are tried in the tests, of all operations; `cargo xtask crash --steps` tries all.
const CRASHES: u64 = 300;

#[test]
fn wherever_an_operation_on_a_chain_crashes_it_is_finished_or_was_never_begun() {
    let all = steps::cases().div_ceil(steps::STRIDE);
    let start = start() % (all - CRASHES);
    let report = run(
        |s, v| steps::case(s * steps::STRIDE, v),
        start..start + CRASHES,
        &Options { jobs: 2, ..Options::default() },
    );
    clean(&report);
    for what in ["kills", "power losses", "jobs that are there again", "done in the end", "never begun"] {
        assert!(report.counts.get(what).is_some_and(|n| *n > 5), "{what}: a run without them proves little");
    }
}

#[test]
fn two_and_three_hosts_that_replicate_are_at_a_checkpoint_whatever_happens() {
    let report = share(replica::replica, SHARE);
    let wanted =
        ["checkpoints", "views checked", "failovers", "crashes while merging", "old primaries fenced"];
    let wanted = wanted.into_iter().chain(["disks that grew", "growths refused"]);
    for what in wanted.chain(["third hosts that follow", "kills of the primary", "disks compared"]) {
        assert!(report.counts.get(what).is_some_and(|n| *n > 2), "{what}: a run without them proves little");
    }
}

#[test]
fn hosts_that_change_sides_lose_nothing_and_copy_only_what_differs() {
    let report = share(replica::turns, SHARE);
    let wanted = ["switchovers", "switchovers disturbed", "switchovers that did not happen", "failovers"];
    let wanted = wanted.into_iter().chain(["failovers to kept checkpoints", "former owners that follow"]);
    let wanted = wanted.chain(["split brains", "clones checked", "verifications", "disks that rotted"]);
    let wanted = wanted.chain(["former primaries that come back as primary", "quiet before a power loss"]);
    for what in wanted.chain(["managers that died", "managers that came back", "views checked"]) {
        assert!(report.counts.get(what).is_some_and(|n| *n > 2), "{what}: a run without them proves little");
    }
}

#[test]
fn hosts_that_replicate_for_a_moment_are_at_a_checkpoint_whatever_happens() {
    let report = share(replica::brief, 2 * SHARE);
    let wanted = ["views checked", "failovers", "ends in peace", "switchovers", "disks compared"];
    for what in wanted.into_iter().chain(["kills", "power losses", "checkpoints", "turns"]) {
        assert!(report.counts.get(what).is_some_and(|n| *n > 2), "{what}: a run without them proves little");
    }
}

#[test]
fn a_mirror_over_a_bad_link_is_never_wrong() {
    let report = share(live::link, SHARE);
    for what in ["completed", "links cut", "far power losses", "completed after far power losses", "restarts"]
    {
        assert!(report.counts.get(what).is_some_and(|n| *n > 5), "{what}: a run without them proves little");
    }
}

#[test]
fn no_job_on_a_chain_changes_what_the_guest_reads() {
    let report = share(chain::chain, SHARE);
    let wanted = ["snapshots", "commits below", "commits of the active image", "streams", "full backups"];
    for what in wanted.into_iter().chain(["incremental backups", "cancelled", "kills", "power losses"]) {
        assert!(report.counts.get(what).is_some_and(|n| *n > 2), "{what}: a run without them proves little");
    }
}

#[test]
fn a_backup_over_a_link_that_is_cut_is_the_disk_at_one_instant() {
    let report = share(chain::remote, SHARE / 2);
    for what in ["links cut", "full backups", "incremental backups", "kills", "power losses"] {
        assert!(report.counts.get(what).is_some_and(|n| *n > 2), "{what}: a run without them proves little");
    }
}

#[test]
fn what_a_slow_disk_does_late_changes_nothing_that_came_after() {
    for (scenario, seeds) in [(chain::slow as Scenario, SHARE / 2), (chain::elsewhere, SHARE)] {
        let report = share(scenario, seeds);
        for what in ["commits of the active image", "cancelled", "kills", "power losses"] {
            assert!(
                report.counts.get(what).is_some_and(|n| *n > 2),
                "{what}: a run without them proves little"
            );
        }
    }
}

/// One case of so many is tried in the tests; prime, so that scripts, I/Os and kinds of failure all take turns.
const STRIDE: u64 = 151;

#[test]
fn whatever_io_fails_nothing_is_lost_and_a_repeat_succeeds() {
    let cases = nth::cases().div_ceil(STRIDE);
    let report = run(|s, v| nth::case(s * STRIDE, v), 0..cases, &Options { jobs: 2, ..Options::default() });
    clean(&report);
    for what in ["EIO", "ENOSPC", "short", "hang", "failed, and done again"] {
        assert!(report.counts.get(what).is_some_and(|n| *n > 5), "{what}: a run without them proves little");
    }
}

#[test]
fn what_failed_once_is_replayed_for_ever() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .map(|entries| entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    names.sort();
    for name in names {
        let Some((scenario, seed)) = name.rsplit_once('-') else { continue };
        let (_, scenario) = find(scenario).unwrap();
        let outcome = run_one(scenario, seed.parse().unwrap(), false);
        assert_eq!(outcome.violation, None, "{name}");
    }
}
