//! The crash lab: runs the production qcow2 driver over a simulated disk, enumerates every disk that a crash at any point
//! could have left, and checks all of it: metadata, guest data, repair, and going on from there.
//!
//! | to change | open |
//! |---|---|
//! | what is recorded | `record.rs` |
//! | which states a crash can leave, what must be true of them | `states.rs` |
//! | what the guest may find | `history.rs`, `image.rs` |
//! | what is done to the images | `workload.rs` |
//! | how a run goes | `run.rs`, `proto.rs` |
//! | hostile images | `hostile.rs` |
//! | the log of changes, which is not qcow2's | `dirty/` |
#![forbid(unsafe_code)]

pub mod dirty;
pub mod history;
pub mod hostile;
pub mod image;
pub mod proto;
pub mod record;
pub mod run;
pub mod states;
pub mod workload;

use crate::history::History;
use crate::run::{FIRST_STAMP, Files, Recording, Setup, Step, run};
use crate::states::{Choice, Failure, Lab, Stats};
use sim::{Rng, Value};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Crash states to check at least.
    pub states: u64,
    /// Everything is drawn from this.
    pub seed: u64,
    /// Threads.
    pub threads: usize,
    /// Only kinds of image whose name contains this.
    pub only: String,
    /// States shown to `qemu-img check`, about.
    pub qemu: u64,
}

impl Default for Plan {
    fn default() -> Plan {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8);
        Plan { states: 100_000, seed: 1, threads, only: String::new(), qemu: 1000 }
    }
}

/// Defects of the driver, planted in builds with the feature `planted-bugs`, that this lab must find.
#[cfg(feature = "planted-bugs")]
pub const PLANTED: [&str; 4] = [
    "qcow2: freed cluster reused early",
    "qcow2: mapping before refcounts",
    "qcow2: no barrier before the mapping",
    "qcow2: flush without its barrier",
];

/// Plants each defect in turn and looks until it is found: (defect, states until then).
///
/// # Errors
/// The defect that was not found within `plan.states` states.
#[cfg(feature = "planted-bugs")]
pub fn planted(plan: &Plan) -> Result<Vec<(&'static str, u64, &'static str)>, String> {
    let setups: Vec<Setup> = workload::setups().into_iter().filter(|s| s.name.contains(&plan.only)).collect();
    let mut found = Vec::new();
    for bug in PLANTED {
        env::bugs::plant(Some(bug));
        let choice = Choice { exhaustive: 5, sample: 12, torn: 2, qemu: 0.0 };
        let mut lab = Lab { stats: Stats::default(), rng: Rng::new(plan.seed), choice, scratch: scratch() };
        let mut number = 0;
        let hit = loop {
            match work_item(&mut lab, &setups, plan.seed, number) {
                Err(f) => break Some(f.kind),
                Ok(()) if lab.stats.states > plan.states => break None,
                Ok(()) => number += 1,
            }
        };
        env::bugs::plant(None);
        let _ = std::fs::remove_dir_all(&lab.scratch);
        match hit {
            Some(kind) => found.push((bug, lab.stats.states, kind)),
            None => return Err(format!("'{bug}' was not found in {} states", lab.stats.states)),
        }
    }
    Ok(found)
}

/// Runs and crashes go on from a crash state this often in a row.
const DEPTH: usize = 3;

/// A chain of runs: a workload on a fresh image, crash, go on from one of the states, crash again.
fn chain(lab: &mut Lab, setup: &Setup, first: Option<Vec<Step>>, seed: u64) -> Result<(), Failure> {
    let mut rng = Rng::new(seed);
    let driver = |text: String| Failure { kind: "driver", text };
    let (mut files, mut values) = setup.fresh().map_err(|e| driver(e.to_string()))?;
    let mut stamp = FIRST_STAMP;
    let mut first = first;
    let short = first.is_some();
    let mut taken = Vec::new();
    for depth in 0..DEPTH {
        let steps = first.take().unwrap_or_else(|| {
            let n = rng.between(5, if depth == 0 { 60 } else { 25 }) as usize;
            workload::random(setup, &mut rng, values.len() as u64, n)
        });
        let history = History::new(std::mem::take(&mut values), stamp);
        history.know(std::mem::take(&mut taken));
        let close = rng.chance(0.4);
        let rec = run(setup, files, history, steps, close, rng.draw())
            .map_err(|t| driver(format!("{t}\n  {setup:?}")))?;
        lab.stats.runs += 1;
        lab.stats.continued += u64::from(depth > 0);
        lab.stats.barriers += rec.barriers;
        lab.stats.flushes += rec.flushes + u64::from(close);
        stamp = rec.history.next_stamp();
        taken = rec.history.taken();
        let mut kept = lab.explore(setup, &rec, 1)?;
        // Short histories are many; a few of them are gone on from.
        if short && !rng.chance(0.1) {
            return Ok(());
        }
        let Some(next) = kept.pop() else { return Ok(()) };
        values = states::values(setup, &next).map_err(|e| driver(e.to_string()))?;
        files = next;
    }
    Ok(())
}

/// Checks at least `plan.states` crash states; short histories first, in an order drawn from the seed, then random ones.
///
/// # Errors
/// The first state that must not be, and how to see it again.
pub fn explore(plan: &Plan) -> Result<Stats, Failure> {
    let setups: Vec<Setup> = workload::setups().into_iter().filter(|s| s.name.contains(&plan.only)).collect();
    if setups.is_empty() {
        return Err(Failure { kind: "driver", text: format!("no kind of image is called '{}'", plan.only) });
    }
    let done = AtomicU64::new(0);
    let next = AtomicU64::new(0);
    let failed = Mutex::new(None);
    let total = Mutex::new(Stats::default());
    let worker = |thread: usize| {
        let scratch = scratch();
        let choice =
            Choice { exhaustive: 5, sample: 12, torn: 2, qemu: plan.qemu as f64 / plan.states as f64 };
        let mut lab =
            Lab { stats: Stats::default(), rng: Rng::new(plan.seed ^ thread as u64), choice, scratch };
        while done.load(Ordering::Relaxed) < plan.states {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let before = lab.stats.states;
            if let Err(f) = work_item(&mut lab, &setups, plan.seed, number) {
                let again = format!("  again: cargo xtask crash --seed {} --item {number}\n", plan.seed);
                let mut slot = failed.lock().unwrap_or_else(|e| e.into_inner());
                slot.get_or_insert(Failure { kind: f.kind, text: f.text + &again });
                done.store(u64::MAX, Ordering::Relaxed);
                break;
            }
            done.fetch_add(lab.stats.states - before, Ordering::Relaxed);
        }
        total.lock().unwrap_or_else(|e| e.into_inner()).add(&lab.stats);
        let _ = std::fs::remove_dir_all(&lab.scratch);
    };
    std::thread::scope(|s| {
        for thread in 0..plan.threads.max(1) {
            let worker = &worker;
            s.spawn(move || worker(thread));
        }
    });
    match failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(f) => Err(f),
        None => Ok(total.into_inner().unwrap_or_else(|e| e.into_inner())),
    }
}

/// Item `number` of the work that `seed` stands for: even ones short histories, odd ones random.
fn work_item(lab: &mut Lab, setups: &[Setup], seed: u64, number: u64) -> Result<(), Failure> {
    let mut rng = Rng::new(seed.wrapping_mul(0x9e37_79b9).wrapping_add(number));
    lab.rng = rng.fork("states");
    let setup = rng.choose(setups).clone();
    let first =
        if number.is_multiple_of(2) { workload::short(&setup, rng.index(workload::SHORT)) } else { None };
    lab.choice.exhaustive = if first.is_some() { 10 } else { 5 };
    chain(lab, &setup, first, rng.draw())
}

fn scratch() -> std::path::PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let base = std::path::Path::new("/dev/shm");
    let base = if base.is_dir() { base.to_owned() } else { std::env::temp_dir() };
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let dir = base.join(format!("liveblk-crashlab-{}-{number}", std::process::id()));
    let _ = std::fs::create_dir_all(&dir);
    dir
}

/// A run of one history on one kind of image, every crash state checked; for tests.
///
/// # Errors
/// The first state that must not be.
pub fn once(setup: &Setup, steps: Vec<Step>, seed: u64) -> Result<Stats, Failure> {
    let scratch = scratch();
    let choice = Choice { exhaustive: 10, sample: 24, torn: 4, qemu: 0.0 };
    let mut lab = Lab { stats: Stats::default(), rng: Rng::new(seed), choice, scratch };
    let r = chain(&mut lab, setup, Some(steps), seed);
    let _ = std::fs::remove_dir_all(&lab.scratch);
    r.map(|()| lab.stats)
}

const HELP: &str = "\
crashlab [--states N] [--seed S] [--threads N] [--only NAME] [--qemu N] [--item N] [--hostile N] [--dirty]

Enumerates what crashes can leave of qcow2 images and checks each state: no corruption, no flushed byte lost, leaks
repairable, and writing goes on from there. --item runs one item of a seed again; --only takes one kind of image.
--dirty checks what a crash leaves of the log of changes instead (bitmaps of users and jobs: never short). --hostile tries so
many images with random fields instead; --planted (as the last option, in a build with the feature
planted-bugs) looks for defects put into the driver on purpose.";

/// The command `crashlab`: gives what it printed as its last line, or an error.
///
/// # Errors
/// A sentence, or the story of the failed state.
pub fn main(args: &[String]) -> Result<(), String> {
    let mut plan = Plan::default();
    let mut item = None;
    let mut hostile = None;
    let mut dirty = false;
    let mut it = args.iter();
    while let Some(a) = it.next() {
        let mut value = || it.next().ok_or_else(|| format!("{a} wants a value\n\n{HELP}"));
        let number = |v: &String| v.parse::<u64>().map_err(|e| format!("{a} {v}: {e}"));
        match a.as_str() {
            "--states" => plan.states = number(value()?)?.max(1),
            "--seed" => plan.seed = number(value()?)?,
            "--threads" => plan.threads = number(value()?)? as usize,
            "--only" => plan.only = value()?.clone(),
            "--qemu" => plan.qemu = number(value()?)?,
            "--dirty" => dirty = true,
            "--hostile" => hostile = Some(number(value()?)?),
            "--item" => item = Some(number(value()?)?),
            #[cfg(feature = "planted-bugs")]
            "--planted" => {
                for (bug, states, kind) in planted(&plan)? {
                    println!("found after {states} states ({kind}): {bug}");
                }
                for (bug, states, _) in dirty::planted(plan.states, plan.seed)? {
                    println!("found after {states} states: {bug}");
                }
                return Ok(());
            }
            "--help" | "-h" => {
                println!("{HELP}");
                return Ok(());
            }
            other => return Err(format!("unknown option {other}\n\n{HELP}")),
        }
    }
    let start = Instant::now();
    if let Some(count) = hostile {
        let [parsed, clean, repaired, opened] = hostile::many(count, plan.seed)?;
        println!(
            "{count} hostile images in {:.1} s: {parsed} with an acceptable header, {clean} found clean, {repaired} clean \
             after repair, {opened} opened for writing; no panic, no hang",
            start.elapsed().as_secs_f64()
        );
        return Ok(());
    }
    if dirty {
        let s = dirty::explore(plan.states, plan.seed)?;
        println!(
            "{} crash states of {} runs with the log of changes ({} of them went on from a crash state, {} ended cleanly) in \
             {:.1} s, seed {}: {} with a torn write; {} bitmaps, {} of them a job's, none short, none longer than what is \
             in doubt",
            s.states,
            s.runs,
            s.continued,
            s.closed,
            start.elapsed().as_secs_f64(),
            plan.seed,
            s.torn,
            s.bitmaps,
            s.sets
        );
        return Ok(());
    }
    let result = match item {
        None => explore(&plan),
        Some(number) => one_item(&plan, number),
    };
    let stats = result.map_err(|f| format!("seed {}: {}: {}", plan.seed, f.kind, f.text))?;
    report(&plan, &stats, start.elapsed().as_secs_f64());
    Ok(())
}

fn one_item(plan: &Plan, number: u64) -> Result<Stats, Failure> {
    let setups: Vec<Setup> = workload::setups().into_iter().filter(|s| s.name.contains(&plan.only)).collect();
    let choice = Choice { exhaustive: 6, sample: 24, torn: 4, qemu: 0.0 };
    let mut lab = Lab { stats: Stats::default(), rng: Rng::new(plan.seed), choice, scratch: scratch() };
    let r = work_item(&mut lab, &setups, plan.seed, number);
    let _ = std::fs::remove_dir_all(&lab.scratch);
    r.map(|()| lab.stats)
}

fn report(plan: &Plan, s: &Stats, seconds: f64) {
    println!(
        "{} crash states of {} runs ({} of them went on from a crash state) in {seconds:.1} s, {:.0} states/s: \
         0 corrupt, 0 lost",
        s.states,
        s.runs,
        s.continued,
        s.states as f64 / seconds
    );
    println!(
        "  {} as a killed process leaves them, {} with a torn write, {} marked dirty and repaired, {} guest sectors read",
        s.kills, s.torn, s.dirty, s.sectors
    );
    println!(
        "  {} with leaks ({:.2} clusters each), {} of them repaired; {} of version 2 with idle flags repaired; {} with a complete bitmap; {} agreed by qemu-img check",
        s.leaky,
        s.leaked as f64 / s.leaky.max(1) as f64,
        s.repaired,
        s.idle,
        s.bitmaps,
        s.agreed
    );
    println!(
        "  {} barriers for {} guest flushes: {:.2} each (QEMU 10.0.2: 2.4); seed {}",
        s.barriers,
        s.flushes,
        s.barriers as f64 / s.flushes.max(1) as f64,
        plan.seed
    );
}

/// What `Value` the layer below shows; re-exported for tests.
pub const BELOW: Value = Value::Write(run::BACKING_STAMP);

/// A recording by itself, for tests of the lab.
///
/// # Errors
/// As [`run::run`].
pub fn record(setup: &Setup, steps: Vec<Step>, seed: u64) -> Result<(Files, Recording), String> {
    let (files, values) = setup.fresh().map_err(|e| e.to_string())?;
    let rec = run(setup, files.clone(), History::new(values, FIRST_STAMP), steps, false, seed)?;
    Ok((files, rec))
}
