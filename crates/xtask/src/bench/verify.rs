//! Full verification of two equal images that nobody uses, beside reading both with plain calls, and beside `qemu-img compare`
//! (in the column of QSD, which cannot do this).

use super::daemon::Daemon;
use super::limit;
use super::nbd::make_image;
use super::table::{Better, Figures};
use super::{Options, Side};
use crate::shell::{self, Outcome, fail};
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

/// Bytes read at a time.
const STEP: u64 = 1 << 20;
/// A comparison that has not ended after this is reported as such.
const LIMIT: Duration = Duration::from_secs(60);

pub(super) fn measure(options: &Options) -> Outcome {
    options.report.heading(
        "Verification of an idle pair (MiB of both images a second; beside it reading both, one after the other)",
    );
    for format in ["raw", "qcow2"] {
        let name = format!("verify {format} against {format}");
        if options.wants(&name) {
            pair(options, &name, format)?;
        }
    }
    Ok(())
}

fn pair(options: &Options, name: &str, format: &str) -> Outcome {
    let mut rate = Figures::default();
    let a = make_image(options, format, "verify-a", true)?;
    let b = make_image(options, format, "verify-b", true)?;
    let mib = (2 * options.image_mib) as f64;
    for _ in 0..options.rounds {
        limit::warm(options.image_mib);
        let begin = Instant::now();
        read(&a)?;
        read(&b)?;
        rate.add(Side::Nothing, mib / begin.elapsed().as_secs_f64());
        let begin = Instant::now();
        shell::output(Command::new("qemu-img").args(["compare", "-q", "-f", format, "-F", format, &a, &b]))?;
        rate.add(Side::Qsd, mib / begin.elapsed().as_secs_f64());
        rate.add(Side::Liveblk, mib / verify(options, format, &a, &b)?);
    }
    options.report.row(name, "MiB/s", Better::Higher, &rate);
    [&a, &b].into_iter().for_each(|f| drop(std::fs::remove_file(f)));
    Ok(())
}

/// Reads a file to its end.
fn read(file: &str) -> Outcome {
    let failed = |e: std::io::Error| format!("reading {file}: {e}");
    let f = File::open(file).map_err(failed)?;
    let len = f.metadata().map_err(failed)?.len();
    let mut buf = vec![0; STEP as usize];
    let mut at = 0;
    while at < len {
        let part = &mut buf[..STEP.min(len - at) as usize];
        f.read_exact_at(part, at).map_err(failed)?;
        std::hint::black_box(&*part);
        at += part.len() as u64;
    }
    Ok(())
}

/// Seconds that it takes.
fn verify(options: &Options, format: &str, a: &str, b: &str) -> Outcome<f64> {
    let node = |name: &str, file: &str| {
        json!({"driver": format, "node-name": name, "read-only": true,
            "file": {"driver": "file", "filename": file, "read-only": true}})
        .to_string()
    };
    let words = ["--blockdev".to_owned(), node("a", a), "--blockdev".to_owned(), node("b", b)];
    let (daemon, mut client) = Daemon::with_client(Side::Liveblk, &options.dir, &words)?;
    let begin = Instant::now();
    client.execute("block-verify", &json!({"job-id": "v", "device": "a", "target": "b"}))?;
    let done = loop {
        match client.event(LIMIT)? {
            Some(e) if e["event"] == "BLOCK_JOB_COMPLETED" => break e,
            Some(_) => {}
            None => return fail(format!("the comparison did not end within {} s", LIMIT.as_secs())),
        }
    };
    let seconds = begin.elapsed().as_secs_f64();
    drop(daemon);
    match &done["data"]["verify"]["digest"] {
        Value::String(_) => Ok(seconds),
        _ => fail(format!("two equal images were not found equal: {done}")),
    }
}
