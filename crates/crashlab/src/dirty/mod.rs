//! The same for the log of changes (crate `dirtylog`): random histories of guests' writes, of what users do with bitmaps and of a
//! job with its set of marks, over a recorded disk, log and target; then every state a crash could have left of the three.
//!
//! | to change | open |
//! |---|---|
//! | what is done, what is remembered of it | `run.rs` |
//! | which states a crash can leave, what must be true of each | `check.rs` |

pub mod check;
pub mod run;

use check::{Files, Stats};
use sim::Rng;

/// Runs and crashes go on from a crash state this often in a row.
const DEPTH: usize = 3;

/// Checks crash states until there were `states`, drawn from `seed`.
///
/// # Errors
/// The first state that must not be, with the seed that shows it again.
pub fn explore(states: u64, seed: u64) -> Result<Stats, String> {
    let mut stats = Stats::default();
    let mut number = 0;
    while stats.states < states {
        let seed = seed.wrapping_mul(1_000_003).wrapping_add(number);
        chain(&mut stats, seed).map_err(|e| format!("dirty log, seed {seed}: {e}"))?;
        number += 1;
    }
    Ok(stats)
}

/// One chain of runs.
///
/// # Errors
/// The first state that must not be.
pub fn chain(stats: &mut Stats, seed: u64) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let mut files = Files::fresh();
    for depth in 0..DEPTH {
        let run = run::run(&files, &mut rng)?;
        stats.runs += 1;
        stats.continued += u64::from(depth > 0);
        match check::explore(stats, &run, &mut rng)? {
            Some(next) => files = next,
            None => return Ok(()),
        }
    }
    Ok(())
}

/// Plants each defect of the log in turn and looks until it is found: (defect, states until then, what was seen).
///
/// # Errors
/// The defect that was not found within `states` states.
#[cfg(feature = "planted-bugs")]
pub fn planted(states: u64, seed: u64) -> Result<Vec<(&'static str, u64, String)>, String> {
    let mut found = Vec::new();
    for bug in dirtylog::PLANTED {
        env::bugs::plant(Some(bug));
        let (mut stats, mut number) = (Stats::default(), 0);
        let hit = loop {
            match chain(&mut stats, seed.wrapping_mul(1_000_003).wrapping_add(number)) {
                Err(e) => break Some(e),
                Ok(()) if stats.states > states => break None,
                Ok(()) => number += 1,
            }
        };
        env::bugs::plant(None);
        match hit {
            Some(e) => found.push((bug, stats.states, e)),
            None => return Err(format!("'{bug}' was not found in {} states", stats.states)),
        }
    }
    Ok(found)
}
