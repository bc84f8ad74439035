//! `cargo xtask sim`: many seeds of the whole daemon, or one of them line by line.
//!
//! What must stay true: a failing seed is printed when it fails, with what was wrong and how to repeat it, and kept under
//! `crates/sim/regressions/`, where the tests replay it for ever.
#![forbid(unsafe_code)]

use sim::runner::{Options, Scenario, run, run_one, run_watched};
use sim::scenario::{SCENARIOS, find, steps};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

const HELP: &str = "\
cargo xtask sim [--seeds N] [--start S] [--jobs J] [--scenario NAME]   many seeds
cargo xtask sim --seed S [-v] [--scenario NAME]                        one seed; -v prints all that happens
cargo xtask crash --steps [--seeds N]                                  all crash points of commit, stream, snapshot and pivot (or N of them)
cargo xtask sim --planted [--bug TEXT] [--scenario NAME]               each planted bug (whose name has TEXT in it), and the seed that finds it
";

struct Arguments {
    seeds: u64,
    /// How many were asked for.
    asked: Option<u64>,
    start: u64,
    jobs: usize,
    seed: Option<u64>,
    verbose: bool,
    planted: bool,
    steps: bool,
    bug: String,
    scenario: Option<String>,
    keep: bool,
}

fn arguments() -> Result<Arguments, String> {
    let mut a = Arguments {
        seeds: 1000,
        asked: None,
        start: 0,
        jobs: std::thread::available_parallelism().map_or(1, usize::from),
        seed: None,
        verbose: false,
        planted: false,
        steps: false,
        bug: String::new(),
        scenario: None,
        keep: true,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = |what: &str| -> Result<u64, String> {
            let text = args.next().ok_or_else(|| format!("{what} needs a number"))?;
            text.parse().map_err(|_| format!("{what}: '{text}' is not a number"))
        };
        match arg.as_str() {
            "--seeds" => {
                a.seeds = number("--seeds")?;
                a.asked = Some(a.seeds);
            }
            "--steps" => a.steps = true,
            "--start" => a.start = number("--start")?,
            "--jobs" => a.jobs = number("--jobs")?.clamp(1, 1024) as usize,
            "--seed" => a.seed = Some(number("--seed")?),
            "-v" | "--verbose" => a.verbose = true,
            "--planted" => a.planted = true,
            "--bug" => a.bug = args.next().ok_or("--bug needs a name")?,
            "--no-keep" => a.keep = false,
            "--scenario" => a.scenario = Some(args.next().ok_or("--scenario needs a name")?),
            "--help" | "-h" => return Err(HELP.to_owned()),
            other => return Err(format!("unknown argument '{other}'\n\n{HELP}")),
        }
    }
    Ok(a)
}

fn main() -> ExitCode {
    let a = match arguments() {
        Ok(a) => a,
        Err(e) => {
            eprint!("{e}");
            return ExitCode::FAILURE;
        }
    };
    let chosen: Vec<(&str, Scenario)> = match &a.scenario {
        None => SCENARIOS.to_vec(),
        Some(name) => match find(name) {
            Some(s) => vec![s],
            None => {
                eprintln!("no scenario '{name}'; there are: {:?}", SCENARIOS.map(|s| s.0));
                return ExitCode::FAILURE;
            }
        },
    };
    // a panic is reported with its seed
    std::panic::set_hook(Box::new(|_| {}));
    let good = if a.planted {
        planted(&a)
    } else if a.steps {
        crash_points(&a)
    } else if let Some(seed) = a.seed {
        chosen.iter().all(|(name, s)| one(name, *s, seed, a.verbose))
    } else {
        chosen.iter().all(|(name, s)| many(name, *s, &a))
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn one(name: &str, scenario: Scenario, seed: u64, verbose: bool) -> bool {
    let outcome = run_one(scenario, seed, verbose);
    for line in &outcome.trace {
        println!("{line}");
    }
    println!("{name}, seed {seed}: {} simulated seconds, {:?}", outcome.simulated.as_secs(), outcome.counts);
    match &outcome.violation {
        Some(v) => {
            println!("VIOLATION: {v}");
            false
        }
        None => true,
    }
}

/// All crash points of all operations, or a fair share of them.
fn crash_points(a: &Arguments) -> bool {
    let all = steps::cases();
    for (name, cases) in steps::table() {
        println!("{cases:>6} crashes: {name}");
    }
    let options = Options { jobs: a.jobs, ..Options::default() };
    let report = match a.asked {
        None => run(steps::case, 0..all, &options),
        Some(n) => {
            run(|s, v| steps::case(s * steps::STRIDE, v), 0..n.min(all.div_ceil(steps::STRIDE)), &options)
        }
    };
    print!("steps: {report}");
    let stride = if a.asked.is_some() { steps::STRIDE } else { 1 };
    for (case, violation) in &report.failures {
        println!("VIOLATION: {violation}");
        println!("  repeat: cargo xtask sim --scenario steps --seed {} -v", case * stride);
    }
    report.failures.is_empty()
}

fn many(name: &str, scenario: Scenario, a: &Arguments) -> bool {
    if name == "nth" {
        println!("nth: {} cases in all", sim::scenario::nth::cases());
    }
    let options = Options { jobs: a.jobs, ..Options::default() };
    let minutes = AtomicU64::new(0);
    let report =
        run_watched(scenario, a.start..a.start.saturating_add(a.seeds), &options, |so_far, failed| {
            if let Some(seed) = failed {
                let violation = &so_far.failures[&seed];
                println!("VIOLATION, seed {seed}: {violation}");
                println!("  repeat: cargo xtask sim --scenario {name} --seed {seed} -v");
                if a.keep {
                    keep(name, seed, violation);
                }
            }
            let minute = so_far.took.as_secs() / 60;
            if minutes.swap(minute, Ordering::Relaxed) != minute {
                eprintln!("{name}: {} of {} seeds after {minute} minutes", so_far.seeds, a.seeds);
            }
        });
    print!("{name}: {report}");
    report.failures.is_empty()
}

/// Keeps a failing seed where the tests replay it.
fn keep(name: &str, seed: u64, violation: &str) {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("regressions");
    let path = dir.join(format!("{name}-{seed}"));
    let text = format!("{violation}\n");
    if let Err(e) = std::fs::create_dir_all(&dir).and_then(|()| std::fs::write(&path, text)) {
        eprintln!("  cannot keep {}: {e}", path.display());
    }
}

#[cfg(feature = "planted-bugs")]
fn planted(a: &Arguments) -> bool {
    let seeds = a.start..a.start.saturating_add(a.seeds);
    let scenario = a.scenario.as_deref().and_then(find).map(|s| s.1);
    let found = sim::planted::hunt(&a.bug, scenario, seeds, a.jobs, |found| match found.seed {
        Some(seed) => println!("{:<40} seed {seed:>5}: {}", found.bug, found.violation),
        None => println!("{:<40} NOT FOUND in {} seeds", found.bug, a.seeds),
    });
    found.iter().all(|f| f.seed.is_some())
}

#[cfg(not(feature = "planted-bugs"))]
fn planted(_: &Arguments) -> bool {
    eprintln!(
        "this build has no planted bugs; run: cargo run --release -p sim --features planted-bugs --bin simulate -- --planted"
    );
    false
}
