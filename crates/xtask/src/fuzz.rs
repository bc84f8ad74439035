//! Coverage-guided fuzzing of the targets in `fuzz/`, under AddressSanitizer, the canary first.
//!
//! What must stay true: a run in which the canary lives counts as failed, since it would not have found anything else either. What is
//! found stays in `fuzz/artifacts/`; what leads far is kept under the target folder, and only what people choose goes to `fuzz/corpus/`.

use crate::shell::{self, Outcome, fail};
use std::process::Command;

/// Seconds for each target unless told otherwise: a smoke test.
const SECONDS: u32 = 20;
/// Seconds within which the canary dies; it takes one or two.
const CANARY: u32 = 120;
/// The target that has to fail.
const CANARY_NAME: &str = "canary";
/// libFuzzer's limits: seconds for one input, MiB of memory.
const LIMITS: [&str; 3] = ["-timeout=60", "-rss_limit_mb=3000", "-len_control=0"];

fn fuzz(verb: &str, target: &str) -> Command {
    let mut c = Command::new("cargo");
    // the instruments are a compiler's unstable options; the rest of the language stays stable
    c.args(["fuzz", verb]).env("RUSTC_BOOTSTRAP", "1").current_dir(shell::root());
    if !target.is_empty() {
        c.arg(target);
    }
    c
}

fn targets() -> Outcome<Vec<String>> {
    let all = shell::output(&mut fuzz("list", ""))?;
    Ok(all.lines().map(str::to_owned).filter(|t| t != CANARY_NAME).collect())
}

fn run_target(target: &str, seconds: u32) -> Outcome {
    let grown = shell::target().join("fuzz-corpus").join(target);
    std::fs::create_dir_all(&grown).map_err(|e| format!("{}: {e}", grown.display()))?;
    let committed = shell::root().join("fuzz/corpus").join(target);
    let mut c = fuzz("run", target);
    c.arg(grown).arg(committed).arg("--").args(LIMITS).arg(format!("-max_total_time={seconds}"));
    shell::run(&mut c)
}

/// `[--seconds N] [TARGET ...]`
pub(crate) fn run(args: &[String]) -> Outcome {
    let (mut seconds, mut chosen, mut rest) = (SECONDS, Vec::new(), args.iter());
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "--seconds" => {
                let n = rest.next().and_then(|n| n.parse().ok());
                seconds = n.ok_or("--seconds wants a number of seconds for each target")?;
            }
            target => chosen.push(target.to_owned()),
        }
    }
    let installed = fuzz("--version", "").output().is_ok_and(|o| o.status.success());
    if !installed {
        shell::cargo(&["install", "cargo-fuzz", "--locked"])?;
    }
    let all = targets()?;
    if let Some(unknown) = chosen.iter().find(|t| !all.contains(t)) {
        return fail(format!("no target '{unknown}'; there are: {}", all.join(", ")));
    }
    let chosen = if chosen.is_empty() { all } else { chosen };
    if run_target(CANARY_NAME, CANARY).is_ok() {
        return fail("the canary lives: this fuzzer finds nothing");
    }
    println!("the canary is dead, as it has to be");
    let failed: Vec<&String> = chosen.iter().filter(|t| run_target(t, seconds).is_err()).collect();
    if failed.is_empty() {
        println!("{} targets, {seconds} s each: nothing found", chosen.len());
        return Ok(());
    }
    fail(format!("found in {failed:?}: the inputs are in fuzz/artifacts"))
}
