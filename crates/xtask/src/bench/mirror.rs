//! Mirrors: time to READY for each pair, and what a client feels meanwhile in each mode.

use super::daemon::Daemon;
use super::limit;
use super::nbd::{Load, finish, make_image, number, order, serving, socket};
use super::table::{Better, Figures};
use super::{Options, Side};
use crate::shell::{self, Outcome, fail};
use qmpclient::Client;
use serde_json::{Value, json};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A job that is not ready after this is reported as such.
const READY_LIMIT: Duration = Duration::from_secs(60);

pub(super) fn measure(options: &Options) -> Outcome {
    options.report.heading(
        "Mirror, full, nobody writing (time from start to READY; beside it a loop of plain calls from file to file)",
    );
    for (name, source, target) in [
        ("mirror raw to raw", "raw", "raw"),
        ("mirror qcow2 to raw", "qcow2", "raw"),
        ("mirror qcow2 with backing to qcow2", "overlay", "qcow2"),
        ("mirror raw to raw that is allocated", "raw", "allocated"),
        ("mirror raw to NBD", "raw", "nbd"),
        ("mirror raw to NBD that does nothing", "raw", "nothing"),
    ] {
        if options.wants(name) {
            throughput(options, name, source, target)?;
        }
    }
    for format in ["raw", "qcow2"] {
        let name = format!("mirror sparse {format}, 1 TiB");
        if options.wants(&name) {
            sparse(options, &name, format)?;
        }
    }
    options.report.heading("A client at full speed, depth 16, while a mirror runs");
    for (op, mode) in [
        ("randwrite", "background"),
        ("randwrite", "write-blocking"),
        ("randwrite", "read-write-blocking"),
        ("randrw", "read-write-blocking"),
    ] {
        let name = format!("mirror {mode}, client {op}");
        if options.wants(&name) {
            latency(options, &name, op, mode)?;
        }
    }
    Ok(())
}

fn source(options: &Options, side: Side, kind: &str) -> Outcome<(String, String)> {
    let name = format!("source-{side:?}");
    if kind != "overlay" {
        return Ok((kind.to_owned(), make_image(options, kind, &name, true)?));
    }
    let base = make_image(options, "qcow2", &format!("base-{side:?}"), true)?;
    let file = options.path(&name);
    let _ = std::fs::remove_file(&file);
    shell::output(
        Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &file]),
    )?;
    let half = options.image_mib / 2;
    shell::output(Command::new("qemu-io").args([
        "-f",
        "qcow2",
        "-c",
        &format!("write -q -P 0x77 0 {half}M"),
        &file,
    ]))?;
    Ok(("qcow2".to_owned(), file))
}

/// A target that the daemon under test opens as node `t`; for NBD, with the server that serves it.
///
/// `allocated` has its space already, as a block device or a preallocated image has, and keeps it. `nothing` is the server
/// that throws away what it gets, so that the mirror is measured and not qemu-nbd, which has one thread.
fn target(options: &Options, side: Side, kind: &str, client: &mut Client) -> Outcome<Option<Child>> {
    let format = if kind == "qcow2" { "qcow2" } else { "raw" };
    let file = make_image(options, format, &format!("target-{side:?}"), kind == "allocated")?;
    let discard = if kind == "allocated" { "ignore" } else { "unmap" };
    let file_node = json!({"driver": "file", "filename": file, "discard": discard});
    let node = json!({"driver": format, "node-name": "t", "discard": discard, "file": file_node});
    if !matches!(kind, "nbd" | "nothing") {
        client.execute("blockdev-add", &node)?;
        return Ok(None);
    }
    let socket = options.path(&format!("peer-{side:?}.sock"));
    let _ = std::fs::remove_file(&socket);
    let mut server = if kind == "nbd" {
        let mut qemu = Command::new("qemu-nbd");
        qemu.args(["-t", "-f", "raw", "-e", "8", "-x", "t", "-k", &socket, &file]);
        qemu
    } else {
        Daemon::ideal(&socket, options.image_mib << 20)
    };
    let mut child =
        server.stdin(Stdio::null()).spawn().map_err(|e| format!("cannot start {server:?}: {e}"))?;
    qmpclient::until_listening(&mut child, std::path::Path::new(&socket))
        .map_err(|e| format!("the server of the target: {e}"))?;
    let server = json!({"type": "unix", "path": socket});
    client.execute(
        "blockdev-add",
        &json!({"driver": "nbd", "node-name": "t", "server": server, "export": "t"}),
    )?;
    Ok(Some(child))
}

/// Starts a mirror and waits until it is ready; seconds.
fn until_ready(client: &mut Client, extra: &Value) -> Outcome<Option<f64>> {
    let mut job = json!({"job-id": "m", "device": "d", "target": "t", "sync": "full"});
    if let (Some(job), Some(extra)) = (job.as_object_mut(), extra.as_object()) {
        job.extend(extra.clone());
    }
    let begin = Instant::now();
    client.execute("blockdev-mirror", &job)?;
    while begin.elapsed() < READY_LIMIT {
        let Some(event) = client.event(Duration::from_millis(500))? else { continue };
        match event["event"].as_str() {
            Some("BLOCK_JOB_READY") => return Ok(Some(begin.elapsed().as_secs_f64())),
            Some("BLOCK_JOB_COMPLETED") => return fail(format!("the mirror failed: {}", event["data"])),
            _ => {}
        }
    }
    Ok(None)
}

fn throughput(options: &Options, name: &str, from: &str, to: &str) -> Outcome {
    let (mut rate, mut cpu) = <(Figures, Figures)>::default();
    for round in 0..options.rounds {
        for side in order(round) {
            let (format, file) = source(options, side, from)?;
            let (daemon, mut client) =
                Daemon::with_client(side, &options.dir, &serving(options, side, &format, &file))?;
            let peer = target(options, side, to, &mut client)?;
            limit::warm(options.image_mib);
            let before = daemon.cpu();
            let seconds = until_ready(&mut client, &json!({}))?;
            let used = daemon.cpu() - before;
            client.execute("job-cancel", &json!({"id": "m"}))?;
            if let Some(s) = seconds {
                rate.add(side, options.image_mib as f64 / s);
                cpu.add(side, used * 1024.0 / options.image_mib as f64);
            }
            drop((client, daemon));
            end(peer);
        }
        let from = make_image(options, "raw", "source-plain", true)?;
        limit::warm(options.image_mib);
        rate.add(Side::Nothing, limit::copy(&from, &options.path("target-plain"))?);
    }
    options.report.row(name, "MiB/s", Better::Higher, &rate);
    options.report.row("", "CPU s/GiB", Better::Lower, &cpu);
    Ok(())
}

/// An almost empty disk: the time is to be that of its data, not of its size.
fn sparse(options: &Options, name: &str, format: &str) -> Outcome {
    const PIECES: u64 = 16;
    let mut ready = Figures::default();
    for round in 0..options.rounds {
        for side in order(round) {
            let (file, copy) =
                (options.path(&format!("sparse-{side:?}")), options.path(&format!("sparse-target-{side:?}")));
            for image in [&file, &copy] {
                let _ = std::fs::remove_file(image);
                shell::output(Command::new("qemu-img").args(["create", "-q", "-f", format, image, "1T"]))?;
            }
            let mut write = Command::new("qemu-io");
            write.args(["-f", format]);
            for i in 0..PIECES {
                let (at, len) = (i * (1024 / PIECES), options.image_mib / PIECES);
                write.args(["-c", &format!("write -q -P 0x5a {at}G {len}M")]);
            }
            shell::output(write.arg(&file))?;
            let (daemon, mut client) =
                Daemon::with_client(side, &options.dir, &serving(options, side, format, &file))?;
            let below = json!({"driver": "file", "filename": copy, "discard": "unmap"});
            client.execute(
                "blockdev-add",
                &json!({"driver": format, "node-name": "t", "discard": "unmap", "file": below}),
            )?;
            limit::warm(options.image_mib);
            if let Some(s) = until_ready(&mut client, &json!({}))? {
                ready.add(side, s);
            }
            client.execute("job-cancel", &json!({"id": "m"}))?;
            drop((client, daemon));
            let _ = (std::fs::remove_file(&file), std::fs::remove_file(&copy));
        }
    }
    options.report.row(name, "READY s", Better::Lower, &ready);
    Ok(())
}

fn end(peer: Option<Child>) {
    if let Some(mut p) = peer {
        let _ = p.kill();
        let _ = p.wait();
    }
}

/// Client figures while a mirror runs. The load outlives READY, so they are of copying and following together.
fn latency(options: &Options, name: &str, op: &'static str, mode: &str) -> Outcome {
    // the reference has no such mode: then only ours is shown
    let both = mode != "read-write-blocking";
    let (mut ready, mut iops, mut p99, mut missed) = <(Figures, Figures, Figures, u32)>::default();
    for round in 0..options.rounds {
        for side in order(round).into_iter().filter(|s| both || *s == Side::Liveblk) {
            let (format, file) = source(options, side, "qcow2")?;
            let (_daemon, mut client) =
                Daemon::with_client(side, &options.dir, &serving(options, side, &format, &file))?;
            target(options, side, "qcow2", &mut client)?;
            let load = Load { op, block: 4096, depth: 16, connections: 1, seconds: 3.0 };
            let running = load.start(&socket(options, side))?;
            std::thread::sleep(Duration::from_millis(300));
            match until_ready(&mut client, &json!({"copy-mode": mode}))? {
                Some(s) => ready.add(side, s),
                None => missed += 1,
            }
            let result = finish(running)?;
            iops.add(side, number(&result, "iops"));
            p99.add(side, number(&result, "p99_us"));
        }
    }
    options.report.row(name, "READY s", Better::Lower, &ready);
    options.report.row("", "client IOPS", Better::Higher, &iops);
    options.report.row("", "client p99", Better::Lower, &p99);
    if missed > 0 {
        println!("{:<46} {missed} runs were not ready within {} s", "", READY_LIMIT.as_secs());
    }
    Ok(())
}
