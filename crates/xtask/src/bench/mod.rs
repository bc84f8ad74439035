//! liveblkd against qemu-storage-daemon, side by side in one run.
//!
//! What must stay true: both get the same command line, the same images and the same load; they take turns within a round,
//! and who goes first alternates; every load stamps its blocks and checks what it reads (`nbdload --verify`); what is
//! printed is medians with spread, and ratios; memory that is needed was in use just before (see `limit`). A do-nothing server (`nbdideal`) shows what the load client could see.
//! Machines differ and are noisy: ratios are the result, not absolute numbers. The tables are printed, and drawn into an SVG file.

mod awake;
mod chain;
mod daemon;
mod dirty;
mod jobs;
mod limit;
mod mirror;
mod nbd;
mod plot;
mod replication;
mod table;
mod verify;
mod vhost;

use crate::setup;
use crate::shell::{self, Outcome, fail};
use std::path::PathBuf;
use std::rc::Rc;
use table::Report;

/// What is measured against what.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Side {
    /// The reference.
    Qsd,
    /// Ours.
    Liveblk,
    /// A server that does nothing (`nbdideal`): the most that the load client can see.
    Nothing,
}

/// The two that are compared.
pub(super) const SIDES: [Side; 2] = [Side::Qsd, Side::Liveblk];

impl Side {
    fn program(self) -> PathBuf {
        match self {
            Side::Qsd => PathBuf::from("qemu-storage-daemon"),
            Side::Liveblk => shell::target().join("release/liveblkd"),
            Side::Nothing => shell::target().join("release/nbdideal"),
        }
    }
}

/// How much to do, and what came of it.
#[derive(Clone)]
pub(super) struct Options {
    pub(super) rounds: usize,
    /// Seconds of one load.
    pub(super) seconds: f64,
    /// MiB in an image.
    pub(super) image_mib: u64,
    /// Only cases whose name has this word.
    pub(super) only: Option<String>,
    /// The daemons get the processor before all other sessions (root only): for machines that do other work meanwhile.
    pub(super) priority: bool,
    /// No processor goes to sleep meanwhile.
    awake: bool,
    /// Where images lie; tmpfs unless told otherwise, so that the daemons and not the disk are measured.
    pub(super) dir: PathBuf,
    /// Where the plots go.
    svg: PathBuf,
    /// What was measured.
    report: Rc<Report>,
}

impl Options {
    fn parse(args: &[String]) -> Outcome<Options> {
        let mut o = Options {
            rounds: 5,
            seconds: 1.0,
            image_mib: 256,
            only: None,
            priority: false,
            awake: false,
            dir: PathBuf::from(format!("/dev/shm/liveblk-bench-{}", std::process::id())),
            svg: shell::target().join("bench.svg"),
            report: Rc::default(),
        };
        let mut args = args.iter();
        while let Some(a) = args.next() {
            let mut value = || args.next().ok_or(format!("{a} needs a value"));
            match a.as_str() {
                "--quick" => (o.rounds, o.seconds) = (3, 0.5),
                "--rounds" => o.rounds = value()?.parse().map_err(|e| format!("--rounds: {e}"))?,
                "--seconds" => o.seconds = value()?.parse().map_err(|e| format!("--seconds: {e}"))?,
                "--mib" => o.image_mib = value()?.parse().map_err(|e| format!("--mib: {e}"))?,
                "--priority" => o.priority = true,
                "--awake" => o.awake = true,
                "--only" => o.only = Some(value()?.clone()),
                "--dir" => o.dir = PathBuf::from(value()?).join("liveblk-bench"),
                "--svg" => o.svg = PathBuf::from(value()?),
                other => {
                    return fail(format!(
                        "no such option: {other} (--quick, --rounds N, --seconds S, --mib N, --priority, --awake, \
                         --only WORD, --dir D, --svg FILE)"
                    ));
                }
            }
        }
        Ok(o)
    }

    pub(super) fn wants(&self, case: &str) -> bool {
        self.only.as_ref().is_none_or(|w| case.contains(w.as_str()))
    }

    pub(super) fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }
}

pub(crate) fn run(args: &[String]) -> Outcome {
    if awake::was_task(args) {
        return Ok(());
    }
    let options = Options::parse(args)?;
    setup::ready()?;
    shell::cargo(&["build", "--quiet", "--release", "--package", "daemon", "--package", "nbdload"])?;
    std::fs::create_dir_all(&options.dir)
        .map_err(|e| format!("cannot make {}: {e}", options.dir.display()))?;
    if options.priority {
        priority(-20)?;
    }
    let awake = options.awake.then(awake::Processors::keep).transpose()?;
    let outcome = measure(&options);
    drop(awake);
    if options.priority {
        priority(0)?;
    }
    let _ = std::fs::remove_dir_all(&options.dir);
    outcome
}

/// The weight of this session against others (`sched_autogroup`; `nice` counts only among processes of one session).
fn priority(nice: i32) -> Outcome {
    std::fs::write("/proc/self/autogroup", nice.to_string()).map_err(|e| format!("--priority: {e}"))
}

fn measure(options: &Options) -> Outcome {
    let about = format!(
        "liveblkd against {} on {} ({} rounds of {} s, images of {} MiB in {}{}{})",
        shell::output(std::process::Command::new("qemu-storage-daemon").arg("--version"))?
            .lines()
            .next()
            .unwrap_or_default(),
        shell::output(std::process::Command::new("uname").arg("-sr"))?.trim(),
        options.rounds,
        options.seconds,
        options.image_mib,
        options.dir.display(),
        if options.priority { ", with priority" } else { "" },
        if options.awake { ", processors kept awake" } else { "" },
    );
    println!("{about}");
    let outcome = measure_all(options);
    // also of a run that failed half way
    let picture = plot::svg(&about, &options.report.sections());
    std::fs::write(&options.svg, picture).map_err(|e| format!("{}: {e}", options.svg.display()))?;
    println!("\nas plots: {}", options.svg.display());
    outcome
}

fn measure_all(options: &Options) -> Outcome {
    nbd::measure(options)?;
    vhost::measure(options)?;
    dirty::measure(options)?;
    mirror::measure(options)?;
    jobs::measure(options)?;
    verify::measure(options)?;
    replication::measure(options)
}
