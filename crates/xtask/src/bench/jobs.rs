//! Commit, stream and backup: how long each takes while nobody writes, and what a client feels while each runs.
//!
//! What must stay true: after each quiet run the result is compared with what it must be, by qemu-img; each client reads
//! back all that it wrote, after the job. The client's figures are of the time in which the job ran, nothing else.

use super::chain::{Disk, Layout, check, overlay};
use super::daemon::Daemon;
use super::limit;
use super::nbd::{Load, finish, make_image, number, order, socket};
use super::table::{Better, Figures};
use super::{Options, Side};
use crate::shell::{self, Outcome, fail};
use qmpclient::Client;
use serde_json::{Value, json};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A quiet job that has not ended after this is an error.
const LIMIT: Duration = Duration::from_secs(60);
/// A job beside a client is left alone after this; then it is one that does not end.
const BESIDE_LIMIT: Duration = Duration::from_secs(8);
/// Bytes a second of the slow target: so slow that every old byte copied for a client's write is felt.
const SLOW: u64 = 20 << 20;
/// Bytes a second of the target that only a buffer makes bearable.
const VERY_SLOW: u64 = 1 << 20;

/// Where a job's bytes go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    /// Into the disk's own chain.
    Own,
    /// A new image of this format.
    New(&'static str),
    /// A new qcow2 image on top of the disk's bottom image (or of what the disk contained at first).
    Overlay,
    /// A new raw image that takes so many bytes a second.
    Slow(u64),
    /// The same, with a fast buffer before it.
    Buffered(u64),
}

/// One job.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    layout: Layout,
    target: Target,
    command: &'static str,
    /// Arguments beside `job-id`, `device` and `target`.
    arguments: fn() -> Value,
    /// Of an image's size, what is copied, in quarters.
    quarters: u64,
    /// Which file of the disk is the result, where there is no target.
    result: usize,
    /// It has changed since its bitmap began.
    incremental: bool,
}

const CHAIN: Layout = Layout::Chain { active: false };

const CASES: [Case; 7] = [
    Case {
        name: "commit intermediate, qcow2 into qcow2",
        layout: CHAIN,
        target: Target::Own,
        command: "block-commit",
        arguments: || json!({"top-node": "m", "base-node": "b"}),
        quarters: 4,
        result: 0,
        incremental: false,
    },
    Case {
        name: "commit active, two layers into qcow2",
        layout: Layout::Chain { active: true },
        target: Target::Own,
        command: "block-commit",
        arguments: || json!({"base-node": "b"}),
        quarters: 4,
        result: 2,
        incremental: false,
    },
    Case {
        name: "stream, two layers below",
        layout: CHAIN,
        target: Target::Own,
        command: "block-stream",
        arguments: || json!({}),
        quarters: 4,
        result: 0,
        incremental: false,
    },
    Case {
        name: "backup full, raw to raw",
        layout: Layout::Plain("raw"),
        target: Target::New("raw"),
        command: "blockdev-backup",
        arguments: || json!({"sync": "full"}),
        quarters: 4,
        result: 0,
        incremental: false,
    },
    Case {
        name: "backup full, qcow2 to qcow2",
        layout: Layout::Plain("qcow2"),
        target: Target::New("qcow2"),
        command: "blockdev-backup",
        arguments: || json!({"sync": "full"}),
        quarters: 4,
        result: 0,
        incremental: false,
    },
    Case {
        name: "backup top, qcow2 to qcow2",
        layout: Layout::Chain { active: true },
        target: Target::Overlay,
        command: "blockdev-backup",
        arguments: || json!({"sync": "top"}),
        quarters: 2,
        result: 0,
        incremental: false,
    },
    Case {
        name: "backup incremental, half of each MiB",
        layout: Layout::Plain("qcow2"),
        target: Target::Overlay,
        command: "blockdev-backup",
        arguments: || json!({"sync": "incremental", "bitmap": "b0"}),
        quarters: 2,
        result: 0,
        incremental: true,
    },
];

pub(super) fn measure(options: &Options) -> Outcome {
    options.report.heading(
        "Jobs, nobody writing (time from command to end, or to READY; beside it a loop of plain calls)",
    );
    for case in CASES {
        if options.wants(case.name) {
            quiet(options, &case)?;
        }
    }
    options
        .report
        .heading("A client at full speed, 4 KiB random writes, depth 16, for as long as a job runs");
    if options.wants("client alone") {
        alone(options)?;
    }
    for case in CASES.iter().filter(|c| !c.incremental && c.target != Target::Overlay) {
        let name = format!("client, {}", case.name);
        if options.wants(&name) {
            beside(options, &name, case, true)?;
        }
    }
    let full = |target| Case { target, ..CASES[3] };
    let (slow, very) = (full(Target::Slow(SLOW)), full(Target::Slow(VERY_SLOW)));
    for (name, case, both) in [
        ("client, backup full, target of 20 MiB/s", slow, true),
        ("client, backup full, target of 1 MiB/s", very, true),
        ("client, buffered backup, target of 1 MiB/s", full(Target::Buffered(VERY_SLOW)), false),
    ] {
        if options.wants(name) {
            beside(options, name, &case, both)?;
        }
    }
    Ok(())
}

fn image(driver: &str, name: &str, file: &str) -> Value {
    let file = json!({"driver": "file", "filename": file, "discard": "unmap"});
    json!({"driver": driver, "node-name": name, "discard": "unmap", "file": file})
}

/// A disk that is served, with whatever the job needs; what must be in its result, and where that is.
struct Scene {
    daemon: Daemon,
    client: Client,
    arguments: Value,
    expected: String,
    result: String,
}

impl Scene {
    fn set(options: &Options, side: Side, case: &Case) -> Outcome<Scene> {
        let disk = case.layout.make(options, side)?;
        let expected = disk.flat(options)?;
        let (daemon, mut client) = Daemon::with_client(side, &options.dir, &disk.serving(options, side))?;
        if case.incremental {
            let bitmap = json!({"node": "d", "name": "b0", "granularity": 65536});
            client.execute("block-dirty-bitmap-add", &bitmap)?;
            // the overlay's backing file is what the disk contained before
            let before = options.path(&format!("before-{side:?}"));
            std::fs::copy(&expected, &before).map_err(|e| format!("{before}: {e}"))?;
            change(options, side, &expected)?;
        }
        let mut arguments = json!({"job-id": "j", "device": "d"});
        let mut add = |more: Value| {
            if let (Some(all), Value::Object(more)) = (arguments.as_object_mut(), more) {
                all.extend(more);
            }
        };
        add((case.arguments)());
        let result = target(options, side, case, &disk, &mut client)?;
        if case.target != Target::Own {
            add(json!({"target": "t"}));
        }
        if let Target::Buffered(_) = case.target {
            add(json!({"buffer": "buffer"}));
        }
        limit::warm(options.image_mib);
        Ok(Scene { daemon, client, arguments, expected, result })
    }

    fn begin(&mut self, case: &Case) -> Outcome {
        self.client.execute(case.command, &self.arguments).map(|_| ())
    }

    /// Until the job has ended or is ready, or it takes too long; seconds.
    fn until_done(&mut self, limit: Duration) -> Outcome<Option<f64>> {
        let begin = Instant::now();
        while begin.elapsed() < limit {
            let Some(event) = self.client.event(Duration::from_millis(500))? else { continue };
            match event["event"].as_str() {
                Some("BLOCK_JOB_COMPLETED") if event["data"].get("error").is_some() => {
                    return fail(format!("the job failed: {}", event["data"]));
                }
                Some("BLOCK_JOB_READY" | "BLOCK_JOB_COMPLETED") => {
                    return Ok(Some(begin.elapsed().as_secs_f64()));
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// Ends the job if it still runs, and the daemon; compares the result.
    fn verify(mut self, options: &Options, case: &Case) -> Outcome {
        if case.name.starts_with("commit active") {
            self.client.execute("block-job-complete", &json!({"device": "j"}))?;
            self.until_done(LIMIT)?;
        }
        drop((self.client, self.daemon));
        let checked = check(&self.expected, &self.result);
        let _ = (std::fs::remove_file(&self.expected), std::fs::remove_file(options.path("before")));
        checked
    }
}

/// The node `t`; the file in which the result will be.
fn target(options: &Options, side: Side, case: &Case, disk: &Disk, client: &mut Client) -> Outcome<String> {
    let name = format!("t-{side:?}");
    match case.target {
        Target::Own => Ok(disk.files[case.result].clone()),
        Target::New(format) => {
            let file = make_image(options, format, &name, false)?;
            client.execute("blockdev-add", &image(format, "t", &file))?;
            Ok(file)
        }
        Target::Overlay => {
            let below = if case.incremental {
                options.path(&format!("before-{side:?}"))
            } else {
                disk.files.get(1).unwrap_or(&disk.files[0]).clone()
            };
            let file = overlay(options, &below, &name, None)?;
            let mut node = image("qcow2", "t", &file);
            node["backing"] = Value::Null;
            client.execute("blockdev-add", &node)?;
            Ok(file)
        }
        Target::Slow(speed) | Target::Buffered(speed) => {
            let file = make_image(options, "raw", &name, false)?;
            let limits = json!({"bps-write": speed});
            client.execute(
                "object-add",
                &json!({"qom-type": "throttle-group", "id": "slow", "limits": limits}),
            )?;
            let mut below = image("raw", "below", &file);
            if let Some(below) = below.as_object_mut() {
                below.remove("node-name");
            }
            client.execute(
                "blockdev-add",
                &json!({"driver": "throttle", "node-name": "t", "throttle-group": "slow", "file": below}),
            )?;
            if let Target::Buffered(_) = case.target {
                let buffer = make_image(options, "qcow2", &format!("buffer-{side:?}"), false)?;
                client.execute("blockdev-add", &image("qcow2", "buffer", &buffer))?;
            }
            Ok(file)
        }
    }
}

/// Writes the first half of each MiB through the export, and into the raw image `expected`.
fn change(options: &Options, side: Side, expected: &str) -> Outcome {
    let uri = format!("nbd+unix:///d?socket={}", socket(options, side));
    for to in [uri.as_str(), expected] {
        let mut write = Command::new("qemu-io");
        write.args(["-f", "raw"]);
        for mib in 0..options.image_mib {
            write.args(["-c", &format!("write -q -P 0x33 {mib}M 512k")]);
        }
        shell::output(write.arg(to))?;
    }
    Ok(())
}

fn quiet(options: &Options, case: &Case) -> Outcome {
    let (mut rate, mut cpu) = <(Figures, Figures)>::default();
    let mib = options.image_mib * case.quarters / 4;
    for round in 0..options.rounds {
        for side in order(round) {
            let mut scene = Scene::set(options, side, case)?;
            let before = scene.daemon.cpu();
            let begin = Instant::now();
            scene.begin(case)?;
            let done = scene.until_done(LIMIT)?;
            let seconds = begin.elapsed().as_secs_f64();
            if done.is_none() {
                return fail(format!("{}: {side:?} did not end within {} s", case.name, LIMIT.as_secs()));
            }
            let used = scene.daemon.cpu() - before;
            rate.add(side, mib as f64 / seconds);
            cpu.add(side, used * 1024.0 / mib as f64);
            scene.verify(options, case)?;
        }
        let small = Options { image_mib: mib, only: None, ..options.clone() };
        let from = make_image(&small, "raw", "source-plain", true)?;
        limit::warm(mib);
        rate.add(Side::Nothing, limit::copy(&from, &options.path("target-plain"))?);
        let _ = std::fs::remove_file(&from);
    }
    options.report.row(case.name, "MiB/s", Better::Higher, &rate);
    options.report.row("", "CPU s/GiB", Better::Lower, &cpu);
    Ok(())
}

const CLIENT: Load = Load { op: "randwrite", block: 4096, depth: 16, connections: 1, seconds: 60.0 };

/// Figures of a client.
#[derive(Default)]
struct Felt {
    iops: Figures,
    p50: Figures,
    p99: Figures,
}

impl Felt {
    fn add(&mut self, side: Side, result: &Value) {
        self.iops.add(side, number(result, "iops"));
        self.p50.add(side, number(result, "p50_us"));
        self.p99.add(side, number(result, "p99_us"));
    }

    fn print(&self, options: &Options) {
        options.report.row("", "client IOPS", Better::Higher, &self.iops);
        self.waits(options);
    }

    fn waits(&self, options: &Options) {
        options.report.row("", "client p50 us", Better::Lower, &self.p50);
        options.report.row("", "client p99 us", Better::Lower, &self.p99);
    }
}

fn alone(options: &Options) -> Outcome {
    let mut felt = Felt::default();
    for round in 0..options.rounds {
        for side in order(round) {
            let disk = Layout::Plain("raw").make(options, side)?;
            let _daemon = Daemon::start(side, &options.dir, &disk.serving(options, side))?;
            felt.add(side, &Load { seconds: options.seconds, ..CLIENT }.run(&socket(options, side))?);
        }
    }
    options.report.row("client alone, raw", "client IOPS", Better::Higher, &felt.iops);
    felt.waits(options);
    Ok(())
}

/// The load begins and ends with the job, and reads back what it wrote after that.
fn beside(options: &Options, name: &str, case: &Case, both: bool) -> Outcome {
    let (mut took, mut felt, mut missed) = (Figures::default(), Felt::default(), [0; 2]);
    for round in 0..options.rounds {
        for side in order(round).into_iter().filter(|s| both || *s == Side::Liveblk) {
            let mut scene = Scene::set(options, side, case)?;
            let mut load = CLIENT.command(&socket(options, side));
            let mut load = load
                .args(["--steered", "--reread"])
                .stdin(Stdio::piped())
                .spawn()
                .map_err(|e| format!("cannot start nbdload: {e}"))?;
            let mut steering = load.stdin.take().ok_or("nbdload has no stdin")?;
            // connected by then; if not, its figures begin a little late, no more
            std::thread::sleep(Duration::from_millis(100));
            std::io::Write::write_all(&mut steering, b"count\n").map_err(|e| e.to_string())?;
            let begin = Instant::now();
            scene.begin(case)?;
            let done = scene.until_done(BESIDE_LIMIT)?;
            match done {
                Some(_) => took.add(side, begin.elapsed().as_secs_f64()),
                None => missed[usize::from(side == Side::Liveblk)] += 1,
            }
            drop(steering);
            if done.is_none() {
                // a client that waits for the job's slow target is answered, and the rest not waited for
                let cancel = json!({"device": "j", "force": true});
                if let Err(e) = scene.client.execute("block-job-cancel", &cancel) {
                    // seen: the reference ends with a segmentation fault when an active commit is cancelled under load
                    println!("{name}: {side:?} did not survive the cancel: {e}");
                    let _ = (load.kill(), load.wait());
                    continue;
                }
            }
            felt.add(side, &finish(load)?);
        }
    }
    options.report.row(name, "seconds", Better::Lower, &took);
    felt.print(options);
    if missed != [0, 0] {
        let [qsd, ours] = missed;
        println!("  did not end within {} s: QSD {qsd} times, liveblkd {ours} times", BESIDE_LIMIT.as_secs());
    }
    Ok(())
}
