//! The test of the tests: defects switched on one at a time, each of which the simulation must find.
//!
//! What must stay true: with no defect switched on the same seeds are clean (the tests run those); a defect is searched for
//! in the scenario that plays its part of the daemon, in the same seeds as any other.

use crate::runner::{Scenario, run_one};
use crate::scenario::again::{again, instants};
use crate::scenario::chain::{chain, elsewhere, slow};
use crate::scenario::live::{link, whole_daemon};
use crate::scenario::replica::{replica, turns};
use crate::scenario::steps;
use copy::bugs::Bug;
use replication::bugs::Bug as Rule;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Defects outside the copy engine, by the names under which they stand in the code.
pub const NAMED: &[&str] = &[
    "graph: nobody waits for the gate",
    "nbd: reply to the wrong request",
    "nbd: flush answered before older writes",
    "nbd: overlapping writes side by side",
    "qcow2: mapping before refcounts",
    "qcow2: no barrier before the mapping",
    "qcow2: flush without its barrier",
    "qcow2: freed cluster reused early",
];

/// Those that only jobs on a chain show.
pub const CHAINED: &[&str] = &["stream: users write where it copies"];

/// Those that only jobs on a chain show that is called off while its disk is slow.
pub const SLOW: &[&str] = &["file: what was called off lands over what came later"];

/// Those that only jobs on a chain show whose base an NBD server of somebody else has.
pub const ELSEWHERE: &[&str] = &["nbd: what was called off lands over what came later"];

/// Those that only a daemon shows that comes back with its state.
pub const RETURNING: &[&str] = &[
    "graph: guests go on before it is written down",
    "copy: the target before the record",
    "mirror: what is not to be copied counts as flushed",
    "mirror: the source is not flushed before work is forgotten",
    "mirror: what is being copied counts as copied",
    "dirtylog: writes go before the record",
    "dirtylog: a region leaves too early",
    "dirtylog: cleared before the target's flush",
    "qcow2: what a killed process wrote is not flushed",
    "mirror: the pivot goes before the target is flushed",
];

/// Those that only hosts that replicate show.
pub const REPLICATED: &[&str] = &[
    "replication: a store half made is refused",
    "replication: the primary's disk grows first",
    "replication: what was left behind the end is shown",
];

/// Those that only hosts show that change sides.
pub const TURNING: &[&str] = &[
    "replication: two call one peer",
    "replication: nobody is at the door",
    "replication: owners do not compare their paths",
    "replication: who comes back serves at once",
    "replication: forgotten without a flush here",
    "replication: what is under way counts as written",
    "replication: guests wait for a store that is full",
    "replication: guests wait for a disk that hangs",
    "replication: a full store keeps the group from being handed over",
    "replication: who handed over never writes again",
    "replication: histories are not compared",
    "replication: a disk is shown before its first checkpoint",
    "replication: committed without the manager's word",
    "replication: a clone shows the newest",
    "replication: a verification finds nothing",
];

/// Rules of the state machines and the store that, removed one at a time, hosts show that change sides. The others have two guards, or need
/// frames that no connection delivers: they are removed in `replication/tests/core.rs` and `store.rs`.
const RULES: &[Rule] = &[
    Rule::DirtyClearedOnSend,
    Rule::RefusalForgotten,
    Rule::DoubtForgotten,
    Rule::HandOverResumes,
    Rule::PreimageNotDurable,
    Rule::DataNotFlushedBeforeCommit,
    Rule::DataNotFlushedBeforeTrim,
    Rule::MergeNotFlushed,
    Rule::EmptiedOnRestart,
    Rule::NoRecheck,
];

/// Those that a crash at one certain moment of an operation shows.
pub const MOMENTARY: &[&str] = &[
    "leavers: deleted before the new copy is durable",
    "commit: the header goes before the base is flushed",
    "stream: the header goes before the disk is flushed",
];

/// Those that only backups show whose daemon dies.
pub const INSTANT: &[&str] = &[
    "backup: what was written since its copy is let go",
    "backup: what was written in an earlier life is let go",
    "backup: what was copied ahead is certain",
];

/// One defect.
#[derive(Clone, Copy, Debug)]
enum Defect {
    Copy(Bug),
    Momentary(&'static str),
    /// Any other, and the scenario that shows it.
    Named(&'static str, Scenario),
    Rule(Rule),
}

impl Defect {
    fn name(self) -> String {
        match self {
            Defect::Copy(bug) => format!("copy: {bug:?}"),
            Defect::Rule(rule) => format!("replication: {rule:?}"),
            Defect::Named(name, _) | Defect::Momentary(name) => name.to_owned(),
        }
    }
}

/// What became of the search for one defect.
#[derive(Clone, Debug)]
pub struct Found {
    /// Which.
    pub bug: String,
    /// The first seed that shows it.
    pub seed: Option<u64>,
    /// How.
    pub violation: String,
}

fn plant(defect: Option<Defect>) {
    let (copy, named) = match defect {
        Some(Defect::Copy(bug)) => (Some(bug), None),
        Some(Defect::Named(name, _) | Defect::Momentary(name)) => (None, Some(name)),
        Some(Defect::Rule(_)) | None => (None, None),
    };
    let rule = match defect {
        Some(Defect::Rule(rule)) => Some(rule),
        _ => None,
    };
    replication::bugs::plant(rule);
    copy::bugs::plant(copy);
    env::bugs::plant(named);
}

fn search(defect: Defect, scenario: Option<Scenario>, seeds: Range<u64>) -> Found {
    let bug = defect.name();
    plant(Some(defect));
    let usual: Scenario = match defect {
        Defect::Named(_, scenario) => scenario,
        Defect::Momentary(_) => steps::case,
        Defect::Rule(_) => turns,
        Defect::Copy(Bug::DoubtForgotten) => link,
        Defect::Copy(_) => whole_daemon,
    };
    // cases of one script that follow each other are much the same
    let stride = if matches!(defect, Defect::Momentary(_)) { steps::STRIDE } else { 1 };
    let hit = seeds
        .into_iter()
        .map(|s| s * stride)
        .find_map(|s| run_one(scenario.unwrap_or(usual), s, false).violation.map(|v| (s, v)));
    plant(None);
    let (seed, violation) = hit.map_or((None, String::new()), |(s, v)| (Some(s), v));
    Found { bug, seed, violation }
}

/// Searches for every defect whose name contains `only`, `jobs` at a time, in this scenario or the usual one of each, and calls `tell`
/// as each search ends.
pub fn hunt(
    only: &str,
    scenario: Option<Scenario>,
    seeds: Range<u64>,
    jobs: usize,
    tell: impl Fn(&Found) + Sync,
) -> Vec<Found> {
    let named: [(&[&str], Scenario); 8] = [
        (NAMED, whole_daemon),
        (CHAINED, chain),
        (SLOW, slow),
        (ELSEWHERE, elsewhere),
        (RETURNING, again),
        (INSTANT, instants),
        (REPLICATED, replica),
        (TURNING, turns),
    ];
    let named = named.into_iter().flat_map(|(names, s)| names.iter().map(move |n| Defect::Named(n, s)));
    let all = named.chain(Bug::ALL.into_iter().map(Defect::Copy));
    let all = all.chain(MOMENTARY.iter().map(|n| Defect::Momentary(n)));
    let all = all.chain(RULES.iter().map(|rule| Defect::Rule(*rule)));
    let all: Vec<Defect> = all.filter(|d| d.name().contains(only)).collect();
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let worker = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(defect) = all.get(i) else { return };
            let f = search(*defect, scenario, seeds.clone());
            tell(&f);
            found.lock().unwrap_or_else(|e| e.into_inner()).push((i, f));
        }
    };
    std::thread::scope(|s| {
        for _ in 1..jobs {
            s.spawn(worker);
        }
        worker();
    });
    let mut found = found.into_inner().unwrap_or_else(|e| e.into_inner());
    found.sort_by_key(|f| f.0);
    found.into_iter().map(|f| f.1).collect()
}
