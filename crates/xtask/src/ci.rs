//! The one command that passes the tests; `.ci/run` calls nothing else. Ends well under 60 minutes on two cores.

use crate::shell::{self, Outcome};
use crate::{layers, setup, tidy};
use std::process::Command;
use std::time::Instant;

/// A name and what to do.
type Step = (&'static str, fn() -> Outcome);

/// In the order in which a defect shows soonest.
const STEPS: &[Step] = &[
    ("set-up", setup::ready),
    ("format", || shell::cargo(&["fmt", "--all", "--check"])),
    ("layers", layers::run),
    ("tidy", tidy::run),
    ("lints", || {
        shell::cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"])
    }),
    ("daemon", || shell::cargo(&["build", "--quiet", "--workspace", "--bins"])),
    ("tests", tests),
    ("guest", || {
        let mut guest = Command::new("python3");
        guest.arg(shell::root().join("tests/vhost/guest.py"));
        shell::run(guest.arg("--daemon").arg(shell::target().join("debug/liveblkd")))
    }),
    ("resume", || {
        let mut resume = Command::new(setup::python());
        resume.arg(shell::root().join("tests/resume.py")).args(["--mib", "512"]);
        shell::run(resume.arg("--daemon").arg(shell::target().join("debug/liveblkd")))
    }),
    ("kills", || {
        let mut kills = Command::new(setup::python());
        kills.arg(shell::root().join("tests/kills.py")).args(["--kills", "50"]);
        shell::run(kills.arg("--daemon").arg(shell::target().join("debug/liveblkd")))
    }),
    ("simulation", simulation),
    ("documentation", || shell::cargo(&["doc", "--workspace", "--no-deps", "--quiet"])),
];

/// Seeds of whole daemons in CI: those that come back from any death, with mirrors and with backups; replicating hosts, hosts that change
/// sides, and briefly.
const SHARES: &[(&str, &str)] =
    &[("again", "10000"), ("instants", "2000"), ("replica", "2500"), ("turns", "2500"), ("brief", "5000")];

/// The built scenarios run in release, in which a seed takes a third of the time; the tests have a few of each as well.
fn simulation() -> Outcome {
    for (scenario, seeds) in SHARES {
        let args = ["--scenario", scenario, "--seeds", seeds, "--no-keep"].map(str::to_owned);
        crate::run_tool("sim", "simulate", &args)?;
    }
    Ok(())
}

fn tests() -> Outcome {
    // No nextest: one tool less on a fresh machine, and CI reads cargo test's closing lines.
    shell::cargo(&["test", "--workspace", "--quiet"])
}

pub(crate) fn run(_args: &[String]) -> Outcome {
    let begin = Instant::now();
    for (name, step) in STEPS {
        let started = Instant::now();
        eprintln!("== {name}");
        step().map_err(|e| format!("{name}: {e}"))?;
        eprintln!("== {name}: {:.0} s", started.elapsed().as_secs_f64());
    }
    println!("all {} steps passed in {:.1} minutes", STEPS.len(), begin.elapsed().as_secs_f64() / 60.0);
    Ok(())
}
