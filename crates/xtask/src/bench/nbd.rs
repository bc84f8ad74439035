//! Loads over NBD: small random and large sequential requests, at several depths and numbers of connections.

use super::daemon::Daemon;
use super::table::{Better, Figures};
use super::{Options, SIDES, Side};
use crate::shell::{self, Outcome};
use serde_json::Value;
use std::process::{Command, Stdio};
use std::time::Duration;

/// One load.
#[derive(Clone)]
pub(super) struct Load {
    pub(super) op: &'static str,
    pub(super) block: u64,
    pub(super) depth: u32,
    pub(super) connections: u32,
    pub(super) seconds: f64,
}

impl Load {
    fn name(&self, image: &str) -> String {
        format!("{image} {} {} KiB, depth {} x {}", self.op, self.block / 1024, self.depth, self.connections)
    }

    /// What starts the load against a unix socket.
    pub(super) fn command(&self, socket: &str) -> Command {
        let mut command = Command::new(shell::target().join("release/nbdload"));
        command
            .args(["--socket", socket, "--export", "d", "--op", self.op, "--verify"])
            .args(["--bs", &self.block.to_string(), "--depth", &self.depth.to_string()])
            .args(["--conns", &self.connections.to_string(), "--seconds", &self.seconds.to_string()])
            .stdout(Stdio::piped());
        command
    }

    /// Starts the load against a unix socket.
    pub(super) fn start(&self, socket: &str) -> Outcome<std::process::Child> {
        self.command(socket).spawn().map_err(|e| format!("cannot start nbdload: {e}"))
    }

    pub(super) fn run(&self, socket: &str) -> Outcome<Value> {
        finish(self.start(socket)?)
    }
}

/// The JSON figures of a load (of NBD or of vhost-user) that has ended.
pub(super) fn finish(child: std::process::Child) -> Outcome<Value> {
    let output = child.wait_with_output().map_err(|e| format!("the load client: {e}"))?;
    if !output.status.success() {
        return Err(format!(
            "the load client ended with {}: a request failed or data was wrong",
            output.status
        ));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| format!("the load client printed no JSON: {e}"))
}

pub(super) fn number(v: &Value, name: &str) -> f64 {
    v[name].as_f64().unwrap_or(0.0)
}

/// The command line that serves one image as export `d`.
pub(super) fn serving(options: &Options, side: Side, format: &str, file: &str) -> Vec<String> {
    let socket = socket(options, side);
    let _ = std::fs::remove_file(&socket);
    [
        "--blockdev",
        &format!("driver={format},node-name=d,discard=unmap,file.driver=file,file.node-name=f,file.filename={file},file.discard=unmap"),
        "--nbd-server",
        &format!("addr.type=unix,addr.path={socket}"),
        "--export",
        "type=nbd,id=e,node-name=d,name=d,writable=on",
    ]
    .map(str::to_owned)
    .to_vec()
}

pub(super) fn socket(options: &Options, side: Side) -> String {
    options.path(&format!("nbd-{side:?}.sock"))
}

/// The same load against the server that does nothing.
fn limit(options: &Options, load: &Load) -> Outcome<(Value, f64)> {
    let socket = options.path("nbd-ideal.sock");
    let daemon = Daemon::start_ideal(&socket, options.image_mib << 20)?;
    let before = daemon.cpu();
    let result = load.run(&socket)?;
    Ok((result, daemon.cpu() - before))
}

/// Which side goes first in a round.
pub(super) fn order(round: usize) -> [Side; 2] {
    if round.is_multiple_of(2) { SIDES } else { [SIDES[1], SIDES[0]] }
}

pub(super) fn make_image(options: &Options, format: &str, name: &str, full: bool) -> Outcome<String> {
    let file = options.path(name);
    image_at(format, &file, options.image_mib, full)?;
    Ok(file)
}

/// A new image of `mib` MiB at `file`, full of data or empty.
pub(super) fn image_at(format: &str, file: &str, mib: u64, full: bool) -> Outcome {
    let size = format!("{mib}M");
    let _ = std::fs::remove_file(file);
    shell::output(Command::new("qemu-img").args(["create", "-q", "-f", format, file, &size]))?;
    if full {
        let fill = format!("write -q -P 0x5a 0 {size}");
        shell::output(Command::new("qemu-io").args(["-f", format, "-c", &fill, file]))?;
    }
    Ok(())
}

/// What is loaded how.
struct Case {
    format: &'static str,
    /// The image is full of data.
    full: bool,
    load: Load,
    io: Io,
}

/// How the daemons reach the image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Io {
    /// As they do if nothing is said: liveblkd with io_uring.
    Usual,
    /// On threads: liveblkd as where io_uring is forbidden.
    Threads,
    /// With an image on a disk, past the page cache; both with io_uring.
    Direct,
    /// The same on threads.
    ThreadsDirect,
}

impl Io {
    fn on_threads(self) -> bool {
        matches!(self, Io::Threads | Io::ThreadsDirect)
    }

    fn on_disk(self) -> bool {
        matches!(self, Io::Direct | Io::ThreadsDirect)
    }
}

impl Case {
    fn name(&self) -> String {
        let io = match self.io {
            Io::Usual => "",
            Io::Threads => "threads: ",
            Io::Direct => "direct: ",
            Io::ThreadsDirect => "threads, direct: ",
        };
        io.to_owned() + &self.load.name(if self.full { self.format } else { "qcow2, empty:" })
    }
}

pub(super) fn measure(options: &Options) -> Outcome {
    options.report.heading("NBD (images in memory, stamped and checked)");
    let small =
        |op, depth, connections| Load { op, block: 4096, depth, connections, seconds: options.seconds };
    let usual = |format, full, load| Case { format, full, load, io: Io::Usual };
    let mut cases = Vec::new();
    for format in ["raw", "qcow2"] {
        for (depth, connections) in [(1, 1), (1, 4), (16, 1), (16, 4), (64, 1), (64, 4)] {
            cases.push(usual(format, true, small("randread", depth, connections)));
            cases.push(usual(format, true, small("randwrite", depth, connections)));
        }
        for op in ["seqread", "seqwrite"] {
            cases.push(usual(format, true, Load { block: 1 << 20, ..small(op, 4, 1) }));
        }
    }
    cases.push(usual("qcow2", false, small("randwrite", 1, 1)));
    cases.push(usual("qcow2", false, small("randwrite", 16, 1)));
    for io in [Io::Direct, Io::Threads, Io::ThreadsDirect] {
        for depth in [1, 16] {
            for op in ["randread", "randwrite"] {
                cases.push(Case { io, ..usual("raw", true, small(op, depth, 1)) });
            }
        }
    }
    for case in cases.iter().filter(|c| options.wants(&c.name())) {
        compare(options, case)?;
    }
    Ok(())
}

/// The image of a case, and the command line that serves it.
fn served(options: &Options, side: Side, case: &Case) -> Outcome<(String, Vec<String>)> {
    let name = format!("image-{side:?}");
    if !case.io.on_disk() {
        let file = make_image(options, case.format, &name, case.full)?;
        return Ok((file.clone(), serving(options, side, case.format, &file)));
    }
    let file = format!("/var/tmp/liveblk-bench-{}-{name}", std::process::id());
    image_at(case.format, &file, options.image_mib, case.full)?;
    let mut arguments = serving(options, side, case.format, &file);
    let aio = if case.io.on_threads() { "threads" } else { "io_uring" };
    arguments[1] += &format!(",file.cache.direct=on,file.aio={aio}");
    Ok((file, arguments))
}

fn compare(options: &Options, case: &Case) -> Outcome {
    let load = &case.load;
    let (mut iops, mut rate, mut cpu, mut p50, mut p99) =
        <(Figures, Figures, Figures, Figures, Figures)>::default();
    let mut add = |side, result: &Value, used: f64| {
        iops.add(side, number(result, "iops"));
        rate.add(side, number(result, "mib_per_s"));
        cpu.add(side, used * 1e6 / number(result, "requests").max(1.0));
        p50.add(side, number(result, "p50_us"));
        p99.add(side, number(result, "p99_us"));
    };
    for round in 0..options.rounds {
        for side in order(round) {
            let (file, arguments) = served(options, side, case)?;
            let daemon = Daemon::start_with(side, &options.dir, &arguments, case.io.on_threads())?;
            // Nobody is charged for start-up.
            std::thread::sleep(Duration::from_millis(50));
            let before = daemon.cpu();
            let result = load.run(&socket(options, side));
            let used = daemon.cpu() - before;
            drop(daemon);
            if case.io.on_disk() {
                let _ = std::fs::remove_file(file);
            }
            add(side, &result?, used);
        }
        let (result, used) = limit(options, load)?;
        add(Side::Nothing, &result, used);
    }
    let (name, report) = (case.name(), &options.report);
    if load.block > 65536 {
        report.row(&name, "MiB/s", Better::Higher, &rate);
        report.row("", "CPU us/req", Better::Lower, &cpu);
    } else {
        report.row(&name, "IOPS", Better::Higher, &iops);
        report.row("", "CPU us/req", Better::Lower, &cpu);
        report.row("", "p50 us", Better::Lower, &p50);
        report.row("", "p99 us", Better::Lower, &p99);
    }
    Ok(())
}
