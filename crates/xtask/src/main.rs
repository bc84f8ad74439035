//! Project chores, one subcommand a file. `cargo xtask help` lists them.
//!
//! What must stay true: each chore sets up what it needs on a fresh machine, says what it runs, and fails with the exit
//! status of what failed. This crate depends on nothing but `serde_json`, so that the first command a newcomer types
//! prints within seconds; whatever needs the workspace's own crates is built and run as a child process.
#![forbid(unsafe_code)]

mod bench;
mod ci;
mod demo;
mod fuzz;
mod layers;
mod setup;
mod shell;
mod tidy;

use shell::{Outcome, fail};

const HELP: &str = "\
cargo xtask COMMAND

  demo      the main job: a disk served, written, mirrored live, pivoted and proven equal (what README shows first)
  ci        all tests, as CI runs them
  setup     install what the tests need (apt-get as root; otherwise prints the line to type)
  layers    which crate may import which (DESIGN section 2)
  tidy      house rules that no compiler knows
  sim       the whole daemon in a simulated world: --seeds N [--start S] | --seed S | --planted
  crash     enumerated crash states of qcow2: --states N [--seed S]; of the log of changes: --dirty;
            of commit, stream, snapshot and pivot with --state-dir, each at every moment: --steps
  histories random qcow2 histories exchanged with QEMU: --count N [--seed S]
  fuzz      coverage-guided fuzzing under AddressSanitizer: [--seconds N] [TARGET ...]
  interleave jobs in real processes, steered and failing at random: [--rounds N] [--seed S] [--job commit|active|stream|mirror|backup]
  bitmaps   random histories of persistent bitmaps exchanged with QEMU: --count N [--seed S]
  wander    random scenes of commands, jobs and clients with QSD and liveblkd: what differs, cut down: [--kind KIND] [--rounds N] [--seed S]
  dirty     bitmaps under kill -9, beside what really changed, and a mirror killed at 90 %: [--rounds N] [--seed S]
  resume    a mirror of 10 GiB cut at 90 % in three ways, and how much more it copies: [--mib N] [--dir DIR] [--only killed|link|target]
  vast      seconds of jobs on a disk of 16 TiB with 1 GiB in it: [--format qcow2|raw] [--mib N] [JOB ...]
  share     copies on a file system that shares blocks (as root, with mkfs.xfs): equal, shared, how fast: [--mib N] [--seed S]
  scale     disks of 64 TiB, 256 layers, 1,000 nodes, 64 exports, large bitmaps: are they as cheap as small ones? [--reference QSD] [--rounds N]
  guest     a Linux guest boots from a vhost-user-blk disk during jobs and kills of the daemon, or moves: [--rounds N] [--move] [--packed]
  kills     kill -9 at random instants under five verifying clients and jobs: [--kills N] [--seed S]
  replication  the same random histories on pairs of QEMU, of liveblkd, and mixed, against one oracle: [--ops N] [--seed S] [--pair NAME]
  bench     liveblkd against qemu-storage-daemon, in one run: [--quick] [--only WORD] [--priority] [--awake]
";

fn main() {
    let mut args = std::env::args().skip(1);
    let command = args.next().unwrap_or_else(|| "help".to_owned());
    let rest: Vec<String> = args.collect();
    let outcome = match command.as_str() {
        "demo" => demo::run(&rest),
        "ci" => ci::run(&rest),
        "setup" => setup::run(&rest),
        "layers" => layers::run(),
        "tidy" => tidy::run(),
        // defects to find are compiled in only when they are to be found
        "sim" if rest.iter().any(|a| a == "--planted") => {
            run_tool_with("sim", "simulate", &["--features", "planted-bugs"], &rest)
        }
        "sim" => run_tool("sim", "simulate", &rest),
        "crash" if rest.iter().any(|a| a == "--steps") => run_tool("sim", "simulate", &rest),
        "crash" => run_tool("crashlab", "crashlab", &rest),
        "histories" => run_tool("crashlab", "histories", &rest),
        "fuzz" => fuzz::run(&rest),
        "interleave" => interleave(&rest),
        "bitmaps" => script("compat/bitmaps.py", &rest),
        "wander" => script("compat/wander.py", &rest),
        "dirty" => script("compat/dirty.py", &rest),
        "resume" => script("resume.py", &rest),
        "vast" => script("vast.py", &rest),
        "share" => script("share.py", &rest),
        "scale" => scale(&rest),
        "guest" => script("vhost/guest.py", &rest),
        "kills" => script("kills.py", &rest),
        "replication" => script("replication/differential.py", &rest),
        "bench" => bench::run(&rest),
        "help" | "--help" | "-h" => {
            print!("{HELP}");
            Ok(())
        }
        other => fail(format!("no such command: {other}\n\n{HELP}")),
    };
    if let Err(message) = outcome {
        eprintln!("xtask {command}: {message}");
        std::process::exit(1);
    }
}

/// Builds the daemon in release and runs a program under tests/ with it.
fn script(name: &str, args: &[String]) -> Outcome {
    shell::cargo(&["build", "--quiet", "--release", "--package", "daemon"])?;
    let daemon = shell::target().join("release/liveblkd");
    let script = shell::root().join("tests").join(name);
    shell::run(std::process::Command::new(setup::python()).arg(script).arg("--daemon").arg(daemon).args(args))
}

/// Builds daemon and load client in release, and measures large against small.
fn scale(args: &[String]) -> Outcome {
    shell::cargo(&["build", "--quiet", "--release", "--package", "nbdload"])?;
    let load = shell::target().join("release/nbdload");
    let mut all = vec!["--load".to_owned(), load.display().to_string()];
    all.extend_from_slice(args);
    script("scale.py", &all)
}

/// Builds a tool of the workspace in release and runs it with the terminal as its own.
fn run_tool(package: &str, bin: &str, args: &[String]) -> Outcome {
    run_tool_with(package, bin, &[], args)
}

fn run_tool_with(package: &str, bin: &str, options: &[&str], args: &[String]) -> Outcome {
    let mut line = vec!["run", "--quiet", "--release", "--package", package, "--bin", bin];
    line.extend(options);
    line.push("--");
    line.extend(args.iter().map(String::as_str));
    shell::cargo(&line)
}

/// The random rounds of the daemon's tests, many of them.
fn interleave(args: &[String]) -> Outcome {
    let value = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1));
    let rounds = value("--rounds").map_or("1000", String::as_str);
    let mut command = std::process::Command::new("cargo");
    command.args([
        "test",
        "--package",
        "daemon",
        "--test",
        "it",
        "--",
        "chains::interleavings",
        "--nocapture",
    ]);
    command.env("LIVEBLK_ROUNDS", rounds);
    if let Some(seed) = value("--seed") {
        command.env("LIVEBLK_SEED", seed);
    }
    if let Some(job) = value("--job") {
        command.env("LIVEBLK_JOB", job);
    }
    shell::run(&mut command)
}
