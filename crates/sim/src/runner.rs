//! Runs a scenario over many seeds: in parallel, each twice now and then, and says which failed and how to repeat it.
//!
//! What must stay true: a panic anywhere in a run is a violation of that seed and of no other; what a seed does never depends
//! on the seeds before it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What became of one seed.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// What was wrong, if anything.
    pub violation: Option<String>,
    /// Hash of all that happened.
    pub hash: u64,
    /// Virtual time that passed.
    pub simulated: Duration,
    /// Things worth counting, by name (jobs completed, faults hit, …): a run in which nothing happens proves nothing.
    pub counts: BTreeMap<&'static str, u64>,
    /// What happened, line by line, if it was asked for.
    pub trace: Vec<String>,
}

impl Outcome {
    /// Of a run that ended before it could count anything.
    pub(crate) fn bad(violation: String) -> Outcome {
        Outcome { violation: Some(violation), ..Outcome::default() }
    }
}

/// A scenario: a function of the seed. With `verbose` it keeps a trace.
pub type Scenario = fn(seed: u64, verbose: bool) -> Outcome;

/// How to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads.
    pub jobs: usize,
    /// One seed in so many is run twice and compared; 0: none.
    pub twice_every: u64,
    /// Stop after so many failing seeds.
    pub most_failures: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { jobs: 1, twice_every: 100, most_failures: 20 }
    }
}

/// What came out.
#[derive(Debug, Default)]
pub struct Report {
    /// Seeds run.
    pub seeds: u64,
    /// Failing seeds with their violations, in order of seed.
    pub failures: BTreeMap<u64, String>,
    /// Virtual time of all runs together.
    pub simulated: Duration,
    /// Real time.
    pub took: Duration,
    /// Sums of [`Outcome::counts`].
    pub counts: BTreeMap<&'static str, u64>,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rate = self.seeds as f64 / self.took.as_secs_f64().max(1e-9);
        writeln!(
            f,
            "{} seeds in {:.1} s ({rate:.0} a second), {:.1} simulated hours, {} violations",
            self.seeds,
            self.took.as_secs_f64(),
            self.simulated.as_secs_f64() / 3600.0,
            self.failures.len()
        )?;
        for (name, n) in &self.counts {
            writeln!(f, "  {n:>10} {name}")?;
        }
        Ok(())
    }
}

/// Runs one seed; a panic becomes its violation.
pub fn run_one(scenario: Scenario, seed: u64, verbose: bool) -> Outcome {
    match catch_unwind(AssertUnwindSafe(|| scenario(seed, verbose))) {
        Ok(outcome) => outcome,
        Err(payload) => {
            let text = payload
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                .unwrap_or_else(|| "a panic without text".to_owned());
            Outcome::bad(format!("panic: {text}"))
        }
    }
}

/// Runs all `seeds`.
pub fn run(scenario: Scenario, seeds: Range<u64>, options: &Options) -> Report {
    run_watched(scenario, seeds, options, |_, _| {})
}

/// Runs all `seeds`; `watch` is called after each one with the report so far, and with the seed if it failed: what takes hours
/// says what it found when it finds it.
pub fn run_watched(
    scenario: Scenario,
    seeds: Range<u64>,
    options: &Options,
    watch: impl Fn(&Report, Option<u64>) + Sync,
) -> Report {
    let began = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let report = Mutex::new(Report::default());
    let worker = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let mut outcome = run_one(scenario, seed, false);
            if outcome.violation.is_none()
                && options.twice_every > 0
                && seed.is_multiple_of(options.twice_every)
            {
                let again = run_one(scenario, seed, false);
                if again.hash != outcome.hash {
                    outcome.violation =
                        Some("two runs of this seed differ: hidden nondeterminism".to_owned());
                }
            }
            let mut r = report.lock().unwrap_or_else(|e| e.into_inner());
            r.seeds += 1;
            r.simulated += outcome.simulated;
            for (name, n) in outcome.counts {
                *r.counts.entry(name).or_default() += n;
            }
            r.took = began.elapsed();
            let failed = outcome.violation.map(|v| {
                r.failures.insert(seed, v);
                if r.failures.len() >= options.most_failures {
                    next.store(seeds.end, Ordering::Relaxed);
                }
                seed
            });
            watch(&r, failed);
        }
    };
    std::thread::scope(|s| {
        for _ in 1..options.jobs {
            s.spawn(worker);
        }
        worker();
    });
    let mut report = report.into_inner().unwrap_or_else(|e| e.into_inner());
    report.took = began.elapsed();
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails_at_seven(seed: u64, _: bool) -> Outcome {
        assert!(seed != 9, "nine");
        Outcome {
            violation: (seed == 7).then(|| "seven".to_owned()),
            counts: [("runs", 1)].into(),
            ..Outcome::default()
        }
    }

    #[test]
    fn failing_seeds_are_found_and_panics_are_theirs_alone() {
        let told = Mutex::new(Vec::new());
        let r = run_watched(
            fails_at_seven,
            0..20,
            &Options { jobs: 2, ..Options::default() },
            |so_far, failed| {
                told.lock().unwrap().push((so_far.seeds, failed));
            },
        );
        let told = told.into_inner().unwrap();
        assert!(told.iter().map(|t| t.0).eq(1..=20), "told of each seed as it ends");
        let mut failed: Vec<u64> = told.iter().filter_map(|t| t.1).collect();
        failed.sort_unstable();
        assert_eq!(failed, [7, 9]);
        assert_eq!(r.seeds, 20);
        assert_eq!(r.failures[&7], "seven");
        assert_eq!(r.failures[&9], "panic: nine");
        assert_eq!(r.failures.len(), 2);
        assert_eq!(r.counts["runs"], 19);
    }

    #[test]
    fn a_run_that_differs_is_nondeterminism() {
        static N: AtomicU64 = AtomicU64::new(0);
        fn differs(_: u64, _: bool) -> Outcome {
            Outcome { hash: N.fetch_add(1, Ordering::Relaxed), ..Outcome::default() }
        }
        let r = run(differs, 0..10, &Options { twice_every: 5, ..Options::default() });
        assert_eq!(r.failures.keys().copied().collect::<Vec<_>>(), [0, 5]);
    }
}
