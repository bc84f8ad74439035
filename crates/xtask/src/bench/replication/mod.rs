//! Continuous replication: a pair of liveblkd, with either engine, beside a pair of QEMU with its replication driver.
//!
//! What must stay true: all pairs have the same disk, full of data, and the same load; bytes are those of the secondary's system calls, and
//! our secondary then does all file I/O by system calls, so that the kernel counts what it does; what a client waits for during a
//! checkpoint is measured beside the same client's longest wait in the same time without one, as that is what the machine itself does.

mod pair;
mod wire;

use super::Options;
use super::nbd::{Load, finish, number};
use super::table::{Better, Figures};
use crate::shell::Outcome;
use pair::{KINDS, Kind, Make, Pair};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use wire::{Disk, Watch, longest, random, scattered};

/// MiB of the disks where nothing else is said.
const DISK: u64 = 256;
/// MiB of the disks whose secondary's bytes are counted: as large as the one of the reference's figures.
const COUNTED: u64 = 64;
/// Pieces that a large buffer is filled with: few enough for the index of the store.
const PIECE: u64 = 64 << 10;
/// How long clients are watched before and after a checkpoint.
const WINDOW: Duration = Duration::from_millis(300);
/// Free space and memory that is left alone where a large buffer is made.
const SPARE: u64 = 8 << 30;

/// A name to choose it by, and what measures it.
type Part = (&'static str, fn(&Options) -> Outcome);

pub(super) fn measure(options: &Options) -> Outcome {
    let parts: [Part; 4] = [
        ("replication: bytes of the secondary", amplification),
        ("replication: levels of acknowledgement", levels),
        ("replication: hold during a checkpoint", holds),
        ("replication: failover", failover),
    ];
    for (name, part) in parts.into_iter().filter(|p| options.wants(p.0)) {
        options.report.heading_with(name, ["QEMU pair", "liveblk redo", "liveblk undo"]);
        part(options)?;
    }
    Ok(())
}

/// The longest waits of clients during a checkpoint, in milliseconds, by what is buffered.
fn holds(options: &Options) -> Outcome {
    hold(options, 0, None)?.print(options);
    hold(options, 1024, None)?.print(options);
    if options.only.is_none() {
        // it takes a disk, and minutes
        return Ok(());
    }
    // in memory it is the checkpoint that clients wait for, on a disk also what the kernel writes to it
    for dir in [&options.dir, Path::new("/var/tmp")] {
        match [10, 4].into_iter().find(|gib| has_room(dir, gib << 30)) {
            Some(gib) => hold(options, gib * 1024, Some(dir))?.print(options),
            None => println!("10 GiB buffered: not measured, {} has not the room", dir.display()),
        }
    }
    Ok(())
}

fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// 1,000 random writes of 4 KiB (4.1 MB): what the secondary writes and reads for them, in MB, and again with the checkpoint after them.
fn amplification(options: &Options) -> Outcome {
    let mut figures: [Figures; 4] = Default::default();
    for round in 0..options.rounds {
        for i in 0..KINDS.len() {
            let kind = KINDS[(i + round) % KINDS.len()];
            let mut pair = Pair::start(options, &Make { counted: true, ..Make::new(kind, COUNTED) })?;
            pair.settle()?;
            let mut disk = Disk::open(&pair.primary.socket(), "d")?;
            let before = pair.secondary.io();
            disk.fill(random(1000, 4096, COUNTED << 20), &[7; 4096])?;
            disk.flush()?;
            let open = pair.secondary.io();
            pair.checkpoint()?;
            pair.settle()?;
            let after = pair.secondary.io();
            let column = kind.column();
            for (f, (to, from)) in figures.iter_mut().zip([
                (open.0, before.0),
                (open.1, before.1),
                (after.0, before.0),
                (after.1, before.1),
            ]) {
                f.add(column, mb(to - from));
            }
        }
    }
    options.report.row("until the flush", "written", Better::Lower, &figures[0]);
    options.report.row("", "read", Better::Lower, &figures[1]);
    options.report.row("with the checkpoint, applied", "written", Better::Lower, &figures[2]);
    options.report.row("", "read", Better::Lower, &figures[3]);
    Ok(())
}

const LEVELS: [&str; 7] = [
    "local",
    "queued",
    "remote-received",
    "remote-written",
    "remote-durable",
    "remote-applied",
    "checkpoint",
];

/// Random 4 KiB writes at each level; QEMU has one, which is the level `remote-written`.
fn levels(options: &Options) -> Outcome {
    for depth in [1, 16] {
        for level in LEVELS {
            let (mut iops, mut p50, mut p99) = <(Figures, Figures, Figures)>::default();
            for round in 0..options.rounds {
                for i in 0..KINDS.len() {
                    let kind = KINDS[(i + round) % KINDS.len()];
                    if kind == Kind::Qemu && level != "remote-written" {
                        continue;
                    }
                    let mut make = Make::new(kind, COUNTED);
                    make.more = json!({"write-level": level, "checkpoint-interval-ms": 100});
                    let pair = Pair::start(options, &make)?;
                    let load = Load {
                        op: "randwrite",
                        block: 4096,
                        depth,
                        connections: 1,
                        seconds: options.seconds,
                    };
                    let result = finish(load.start(&pair.primary.socket())?)?;
                    iops.add(kind.column(), number(&result, "iops"));
                    p50.add(kind.column(), number(&result, "p50_us"));
                    p99.add(kind.column(), number(&result, "p99_us"));
                }
            }
            options.report.row(&format!("{level}, depth {depth}"), "IOPS", Better::Higher, &iops);
            options.report.row("", "p50 us", Better::Lower, &p50);
            options.report.row("", "p99 us", Better::Lower, &p99);
        }
    }
    Ok(())
}

/// Whether a buffer of so many bytes fits into a directory, and into the machine where the directory is in memory.
fn has_room(dir: &Path, bytes: u64) -> bool {
    let needed = bytes + SPARE;
    match free(dir) {
        Some((kind, free)) if kind == "tmpfs" => free > needed && memory().is_some_and(|m| m > needed),
        Some((_, free)) => free > needed,
        None => false,
    }
}

/// Kind and free bytes of the file system that holds a directory.
fn free(dir: &Path) -> Option<(String, u64)> {
    let mut df = std::process::Command::new("df");
    let text = crate::shell::output(df.args(["--output=fstype,avail", "-B1"]).arg(dir)).ok()?;
    let (kind, free) = text.lines().nth(1)?.trim().split_once(' ')?;
    Some((kind.to_owned(), free.trim().parse().ok()?))
}

/// Bytes of memory that may be used.
fn memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// What clients of both sides waited for at most.
#[derive(Default)]
struct Hold {
    name: String,
    /// Of a client that reads on the secondary.
    view: Waits,
    /// Of a client that writes on the primary.
    guest: Waits,
    whole: Figures,
}

/// The longest waits of one client, in milliseconds.
#[derive(Default)]
struct Waits {
    /// While the command ran: what a checkpoint holds.
    during: Figures,
    /// In as much time just before: what it would have waited for anyway.
    before: Figures,
    /// Afterwards, when what was buffered is brought to the disk.
    after: Figures,
}

impl Waits {
    fn add(&mut self, column: super::Side, calls: &[(Instant, Duration)], begin: Instant, took: Duration) {
        self.during.add(column, longest(calls, begin, begin + took));
        self.before.add(column, longest(calls, begin - took.min(WINDOW), begin));
        self.after.add(column, longest(calls, begin + took, begin + took + WINDOW));
    }

    fn print(&self, options: &Options, client: &str) {
        options.report.row("", client, Better::Lower, &self.during);
        options.report.row("", "  just before", Better::Lower, &self.before);
        options.report.row("", "  0.3 s after", Better::Lower, &self.after);
    }
}

impl Hold {
    fn print(&self, options: &Options) {
        options.report.row(&self.name, "the command", Better::Lower, &self.whole);
        self.view.print(options, "secondary");
        self.guest.print(options, "primary");
    }
}

/// A checkpoint with `mib` buffered, under a client that reads on the secondary and one that writes on the primary.
/// With a place for it the log is there, and the disks are `null-co`.
fn hold(options: &Options, mib: u64, hollow: Option<&Path>) -> Outcome<Hold> {
    let name = format!("{} GiB buffered", mib / 1024);
    let name = match hollow.and_then(free) {
        Some((kind, _)) => format!("{name}, log on {kind}"),
        None => name,
    };
    let mut hold = Hold { name, ..Hold::default() };
    for round in 0..options.rounds {
        for i in 0..KINDS.len() {
            let kind = KINDS[(i + round) % KINDS.len()];
            if hollow.is_some() && kind != Kind::Redo {
                continue;
            }
            let place = hollow.map(|d| d.join(format!("liveblk-bench-{}", std::process::id())));
            if let Some(dir) = &place {
                std::fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
            }
            let measured = one_hold(options, kind, mib, place.as_ref(), &mut hold);
            if let Some(dir) = &place {
                let _ = std::fs::remove_dir_all(dir);
            }
            measured?;
        }
    }
    Ok(hold)
}

fn one_hold(options: &Options, kind: Kind, mib: u64, place: Option<&PathBuf>, hold: &mut Hold) -> Outcome {
    let mut make = Make::new(kind, if mib == 0 { DISK } else { mib * 5 / 4 });
    make.full = place.is_none();
    make.hollow = place.is_some();
    // a full disk is brought over in one epoch at first
    make.store = ((mib << 20) * 3 / 2 + (512 << 20)) * if kind == Kind::Undo { 2 } else { 1 };
    make.store_dir = place.cloned();
    let mut pair = Pair::start(options, &make)?;
    let mut filler = Disk::open(&pair.primary.socket(), "d")?;
    filler.fill(scattered((mib << 20) / PIECE, PIECE, make.mib << 20), &vec![7; PIECE as usize])?;
    filler.flush()?;
    let size = make.mib << 20;
    let client = |socket: String| Disk::open(&socket, "d");
    let (mut reader, mut writer) = (client(pair.secondary.socket())?, client(pair.primary.socket())?);
    let (mut a, mut b) = (0u64, 0u64);
    let reads = Watch::start(move || {
        a += 1;
        reader.read(a.wrapping_mul(0x9e37_79b1) % (size / 4096) * 4096, 4096).map(drop)
    });
    let writes = Watch::start(move || {
        b += 1;
        writer.write(b % 64 * 4096, &[9; 4096])
    });
    std::thread::sleep(WINDOW);
    let begin = Instant::now();
    pair.checkpoint()?;
    let took = begin.elapsed();
    std::thread::sleep(WINDOW);
    let column = kind.column();
    hold.view.add(column, &reads.end()?, begin, took);
    hold.guest.add(column, &writes.end()?, begin, took);
    hold.whole.add(column, took.as_secs_f64() * 1e3);
    Ok(())
}

/// Milliseconds from the command to the first write and read served, by a client that was connected before.
fn failover(options: &Options) -> Outcome {
    let (mut first, mut command) = <(Figures, Figures)>::default();
    for round in 0..options.rounds {
        for i in 0..KINDS.len() {
            let kind = KINDS[(i + round) % KINDS.len()];
            let mut pair = Pair::start(options, &Make::new(kind, DISK))?;
            let mut disk = Disk::open(&pair.primary.socket(), "d")?;
            disk.fill(scattered(512, PIECE, DISK << 20), &vec![7; PIECE as usize])?;
            pair.checkpoint()?;
            disk.fill(scattered(1000, 4096, DISK << 20), &[8; 4096])?;
            let mut own = Disk::open(&pair.secondary.socket(), "d")?;
            own.fill(scattered(100, 4096, DISK << 20), &[9; 4096])?;
            let begin = Instant::now();
            pair.fail_over()?;
            command.add(kind.column(), begin.elapsed().as_secs_f64() * 1e3);
            own.write(0, &[1; 4096])?;
            own.read(4096, 4096)?;
            first.add(kind.column(), begin.elapsed().as_secs_f64() * 1e3);
        }
    }
    options.report.row("4 MiB open, 32 MiB behind", "the command", Better::Lower, &command);
    options.report.row("", "first service", Better::Lower, &first);
    Ok(())
}
