//! Small random requests over vhost-user-blk, by a driver that does what Linux's does (`vhostload`).
//!
//! What counts is the processor time that a back end spends on a request: it has the rest of a core for others. Beside it
//! the *bare* limit: a loop that reads or writes the same file directly, one system call a request, and nothing else.

use super::daemon::Daemon;
use super::nbd::{finish, make_image, number, order};
use super::table::{Better, Figures};
use super::{Options, Side};
use crate::shell::{self, Outcome};
use serde_json::Value;
use std::process::{Command, Stdio};
use std::time::Duration;

struct Load {
    op: &'static str,
    depth: u32,
}

impl Load {
    fn run(&self, options: &Options, target: [&str; 2], verify: bool) -> Outcome<Value> {
        let mut command = Command::new(shell::target().join("release/vhostload"));
        command
            .args(target)
            .args(["--op", self.op, "--depth", &self.depth.to_string()])
            .args(["--seconds", &options.seconds.to_string()])
            .args(verify.then_some("--verify"))
            .stdout(Stdio::piped());
        finish(command.spawn().map_err(|e| format!("cannot start vhostload: {e}"))?)
    }
}

pub(super) fn measure(options: &Options) -> Outcome {
    options.report.heading(
        "vhost-user-blk (images in memory, stamped and checked; the last column: plain calls on the file)",
    );
    for format in ["raw", "qcow2"] {
        for depth in [1, 16, 64] {
            for op in ["randread", "randwrite"] {
                let load = Load { op, depth };
                let name = format!("vhost {format} {op} 4 KiB, depth {depth}");
                if options.wants(&name) {
                    compare(options, &name, format, &load)?;
                }
            }
        }
    }
    Ok(())
}

fn compare(options: &Options, name: &str, format: &str, load: &Load) -> Outcome {
    let (mut iops, mut core, mut cpu, mut p50, mut p99) =
        <(Figures, Figures, Figures, Figures, Figures)>::default();
    let mut add = |side, result: &Value, used: f64| {
        let requests = number(result, "requests").max(1.0);
        iops.add(side, number(result, "iops"));
        core.add(side, requests / used.max(1e-6));
        cpu.add(side, used * 1e6 / requests);
        p50.add(side, number(result, "p50_us"));
        p99.add(side, number(result, "p99_us"));
    };
    for round in 0..options.rounds {
        for side in order(round) {
            let file = make_image(options, format, &format!("image-{side:?}"), true)?;
            let socket = options.path(&format!("vhost-{side:?}.sock"));
            let mut daemon = Daemon::start(side, &options.dir, &serving(format, &file, &socket))?;
            daemon.until_listening(&socket).map_err(|e| format!("{side:?}: {e}"))?;
            // nobody is charged for start-up
            std::thread::sleep(Duration::from_millis(50));
            let before = daemon.cpu();
            let result = load.run(options, ["--socket", &socket], true)?;
            add(side, &result, daemon.cpu() - before);
        }
        let file = make_image(options, "raw", "image-bare", true)?;
        let result = load.run(options, ["--file", &file], false)?;
        add(Side::Nothing, &result, number(&result, "cpu_seconds"));
    }
    options.report.row(name, "IOPS", Better::Higher, &iops);
    options.report.row("", "IOPS/core", Better::Higher, &core);
    options.report.row("", "CPU us/req", Better::Lower, &cpu);
    options.report.row("", "p50 us", Better::Lower, &p50);
    options.report.row("", "p99 us", Better::Lower, &p99);
    Ok(())
}

/// The command line that exports one image.
fn serving(format: &str, file: &str, socket: &str) -> Vec<String> {
    let _ = std::fs::remove_file(socket);
    [
        "--blockdev",
        &format!("driver={format},node-name=d,file.driver=file,file.node-name=f,file.filename={file}"),
        "--export",
        &format!("type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},writable=on"),
    ]
    .map(str::to_owned)
    .to_vec()
}
