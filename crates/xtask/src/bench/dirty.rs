//! What it costs that bitmaps survive a crash: small random writes to a disk with a bitmap, kept with the log of regions or in
//! memory only. The load begins with a clean bitmap, so that the regions that become hot and the granules that are marked for the first
//! time are in the figure.

use super::daemon::Daemon;
use super::nbd::{Load, make_image, number, serving, socket};
use super::table::{Better, Figures};
use super::{Options, Side};
use crate::shell::Outcome;
use serde_json::{Value, json};
use std::path::Path;

pub(super) fn measure(options: &Options) -> Outcome {
    let cases: Vec<_> = ["raw", "qcow2"].map(|f| (f, format!("{f} randwrite 4 KiB, bitmap"))).into();
    options.report.heading_with(
        "Bitmaps that survive a crash, 4 KiB random writes, depth 16 x 1",
        ["in memory", "kept", "QSD, in memory"],
    );
    for (format, name) in cases.into_iter().filter(|(_, name)| options.wants(name)) {
        compare(options, format, &name)?;
    }
    Ok(())
}

fn compare(options: &Options, format: &str, name: &str) -> Outcome {
    let (mut iops, mut cpu, mut p99) = <(Figures, Figures, Figures)>::default();
    let load = Load { op: "randwrite", block: 4096, depth: 16, connections: 1, seconds: options.seconds };
    // Columns as in `table`: without, with, and the third one.
    let columns = [
        (Side::Qsd, Side::Liveblk, false),
        (Side::Liveblk, Side::Liveblk, true),
        (Side::Nothing, Side::Qsd, false),
    ];
    for round in 0..options.rounds {
        for i in 0..columns.len() {
            let (column, side, kept) = columns[(i + round) % columns.len()];
            let file = make_image(options, format, "image-dirty", true)?;
            let (result, used) = once(options, side, kept, format, &file, &load)?;
            iops.add(column, number(&result, "iops"));
            cpu.add(column, used * 1e6 / number(&result, "requests").max(1.0));
            p99.add(column, number(&result, "p99_us"));
        }
    }
    options.report.row(name, "IOPS", Better::Higher, &iops);
    options.report.row("", "CPU us/req", Better::Lower, &cpu);
    options.report.row("", "p99 us", Better::Lower, &p99);
    Ok(())
}

fn once(
    options: &Options,
    side: Side,
    kept: bool,
    format: &str,
    file: &str,
    load: &Load,
) -> Outcome<(Value, f64)> {
    let mut arguments = serving(options, side, format, file);
    if kept {
        let state = options.path("state");
        if Path::new(&state).exists() {
            std::fs::remove_dir_all(&state).map_err(|e| format!("{state}: {e}"))?;
        }
        arguments.extend(["--state-dir".to_owned(), state]);
    }
    let (daemon, mut client) = Daemon::with_client(side, &options.dir, &arguments)?;
    client.execute("block-dirty-bitmap-add", &json!({"node": "d", "name": "b", "persistent": kept}))?;
    let before = daemon.cpu();
    let result = load.run(&socket(options, side))?;
    Ok((result, daemon.cpu() - before))
}
