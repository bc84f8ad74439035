//! `liveblk mirror SRC DST`: against a running daemon (SRC and DST are node names, or DST a file), or on two files.

use crate::watch::{View, jobs, text, wait};
use crate::{Outcome, daemon::OwnDaemon};
use clap::{Args, ValueEnum};
use qmpclient::Client;
use serde_json::{Value, json};
use std::io::Read;
use std::path::{Path, PathBuf};

/// A node that this command makes in the daemon.
const TARGET: &str = "liveblk-target";
const SOURCE: &str = "liveblk-source";

#[derive(Args)]
pub(crate) struct MirrorArgs {
    /// What to copy: a file, or with --socket a node of the running daemon
    source: String,
    /// Where to: a file (made if missing), an nbd:// or nbd+unix:// address, or with --socket also a node
    target: String,
    /// QMP socket of the running daemon; without it a daemon is started for this copy alone
    #[arg(long, env = "LIVEBLK_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Format of the source file (default: looked at)
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Format of the target file (default: that of the source when it is made, else looked at)
    #[arg(long, value_enum)]
    target_format: Option<Format>,
    /// How the client's writes reach the target while the copy runs
    #[arg(long, value_enum, default_value = "background")]
    copy_mode: CopyMode,
    /// At most so many bytes a second (0: no limit)
    #[arg(long, default_value_t = 0)]
    speed: u64,
    /// The job's id in a running daemon
    #[arg(long, default_value = "liveblk-mirror")]
    job: String,
    /// When the copy is in sync: make the target the disk that is served (pivot), leave it as a copy, or leave the job
    /// running
    #[arg(long, value_enum)]
    then: Option<Then>,
    /// What to do when the client writes faster than the target takes it
    #[arg(long, value_enum, default_value = "none")]
    convergence: Convergence,
    /// Read source and target again and compare them before the copy counts as one: a share of them, or all
    #[arg(long, value_enum, default_value = "full")]
    verify: Verify,
    /// When the link to another server is lost, wait for it and go on; if it does not come back, let the job wait for
    /// `job-resume` (stop), or end (report). Without this the copy fails at once
    #[arg(long, value_enum, value_name = "THEN")]
    on_link_loss: Option<LinkLossEnd>,
    /// Wait so many seconds for a lost link (default: 600)
    #[arg(long, requires = "on_link_loss", value_name = "SECONDS")]
    link_wait: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LinkLossEnd {
    Stop,
    Report,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Verify {
    Off,
    Sampled,
    Full,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Raw,
    Qcow2,
}

#[derive(Clone, Copy, ValueEnum)]
enum CopyMode {
    Background,
    WriteBlocking,
    ReadWriteBlocking,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Then {
    Pivot,
    Copy,
    Stay,
}

#[derive(Clone, Copy, ValueEnum)]
enum Convergence {
    None,
    SwitchCopyMode,
    ThrottleGuest,
}

pub(crate) fn name<T: ValueEnum + Copy>(v: T) -> String {
    v.to_possible_value().map(|p| p.get_name().to_owned()).unwrap_or_default()
}

pub(crate) fn run(args: &MirrorArgs) -> Outcome {
    match &args.socket {
        Some(socket) => live(args, &mut Client::connect(socket)?),
        None => offline(args),
    }
}

/// Copies one file to another with a daemon of our own.
fn offline(args: &MirrorArgs) -> Outcome {
    if args.on_link_loss == Some(LinkLossEnd::Stop) {
        return Err(
            "--on-link-loss stop needs --socket: nobody else can tell this copy to go on; use report"
                .to_owned(),
        );
    }
    let source = Path::new(&args.source);
    let format = match args.format {
        Some(f) => f,
        None => look(source)?,
    };
    let daemon = OwnDaemon::start()?;
    let mut client = daemon.client()?;
    add_image(&mut client, SOURCE, format, &args.source, true)?;
    make_target(args, &mut client, SOURCE, format)?;
    start(args, &mut client, SOURCE, TARGET)?;
    follow(&mut client, &args.job)?;
    let proof = finish(&mut client, &args.job, Then::Copy)?;
    client.execute("blockdev-del", &json!({"node-name": TARGET}))?;
    daemon.quit(&mut client)?;
    println!("{} is a copy of {}{proof}", args.target, args.source);
    Ok(())
}

/// Mirrors a node of a running daemon.
fn live(args: &MirrorArgs, client: &mut Client) -> Outcome {
    let nodes = client.execute("query-named-block-nodes", &json!({"flat": true}))?;
    let node = |name: &str| nodes.as_array().and_then(|a| a.iter().find(|n| n["node-name"] == name));
    let Some(source) = node(&args.source) else {
        return Err(format!("the daemon has no disk named {}\n  `liveblk status` lists them", args.source));
    };
    let target = if node(&args.target).is_some() {
        args.target.clone()
    } else {
        let format = if source["drv"] == "qcow2" { Format::Qcow2 } else { Format::Raw };
        make_target(args, client, &args.source, format)?;
        TARGET.to_owned()
    };
    start(args, client, &args.source, &target)?;
    follow(client, &args.job)?;
    let then = args.then.unwrap_or(Then::Stay);
    let proof = finish(client, &args.job, then)?;
    match then {
        Then::Pivot => println!("clients of {} are now served from {}{proof}", args.source, args.target),
        Then::Copy => println!("{} is a copy of {} at this instant{proof}", args.target, args.source),
        Then::Stay => println!(
            "{} is in sync and stays so; next: liveblk complete {} (pivot) or liveblk cancel {} (keep the copy)",
            args.target, args.job, args.job
        ),
    }
    Ok(())
}

/// qcow2 by its magic, else raw.
pub(crate) fn look(file: &Path) -> Outcome<Format> {
    let mut magic = [0u8; 4];
    let mut f = std::fs::File::open(file).map_err(|e| format!("cannot open {}: {e}", file.display()))?;
    let qcow2 = f.read_exact(&mut magic).is_ok() && &magic == b"QFI\xfb";
    Ok(if qcow2 { Format::Qcow2 } else { Format::Raw })
}

fn protocol(place: &str) -> Outcome<Value> {
    if let Some(rest) = place.strip_prefix("nbd+unix://") {
        let (export, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = query.split('&').find_map(|p| p.strip_prefix("socket="));
        let path =
            path.ok_or_else(|| format!("{place}: the socket is missing (nbd+unix:///EXPORT?socket=PATH)"))?;
        let server = json!({"type": "unix", "path": path});
        return Ok(json!({"driver": "nbd", "server": server, "export": export.trim_start_matches('/')}));
    }
    if let Some(rest) = place.strip_prefix("nbd://") {
        let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = host.rsplit_once(':').unwrap_or((host, "10809"));
        let server = json!({"type": "inet", "host": host, "port": port});
        return Ok(json!({"driver": "nbd", "server": server, "export": export}));
    }
    Ok(json!({"driver": "file", "filename": place, "discard": "unmap"}))
}

pub(crate) fn add_image(
    client: &mut Client,
    node: &str,
    format: Format,
    place: &str,
    read_only: bool,
) -> Outcome {
    let mut file = protocol(place)?;
    file["read-only"] = json!(read_only);
    let options = json!({"driver": name(format), "node-name": node, "read-only": read_only, "discard": "unmap", "file": file});
    client.execute("blockdev-add", &options).map(drop)
}

/// Opens the target, making the file first if there is none.
fn make_target(args: &MirrorArgs, client: &mut Client, source: &str, source_format: Format) -> Outcome {
    let place = args.target.as_str();
    let file = Path::new(place);
    let is_file = protocol(place)?["driver"] == "file";
    let format = match args.target_format {
        Some(f) => f,
        None if is_file && file.exists() => look(file)?,
        None if is_file => source_format,
        None => Format::Raw,
    };
    if is_file && !file.exists() {
        let size = size_of(client, source)?;
        make_image(client, place, format, size, &[])?;
    }
    add_image(client, TARGET, format, place, false)
}

/// Makes an image file; `options` are further options of its format.
pub(crate) fn make_image(
    client: &mut Client,
    place: &str,
    format: Format,
    size: u64,
    options: &[(String, Value)],
) -> Outcome {
    if format == Format::Raw {
        let mut file = json!({"driver": "file", "filename": place, "size": size});
        options.iter().for_each(|(key, value)| file[key] = value.clone());
        return create(client, "liveblk-create", &file);
    }
    create(client, "liveblk-create", &json!({"driver": "file", "filename": place, "size": 0}))?;
    let node = json!({"driver": "file", "node-name": "liveblk-new", "filename": place});
    client.execute("blockdev-add", &node)?;
    let mut image = json!({"driver": "qcow2", "file": "liveblk-new", "size": size});
    options.iter().for_each(|(key, value)| image[key] = value.clone());
    let made = create(client, "liveblk-format", &image);
    client.execute("blockdev-del", &json!({"node-name": "liveblk-new"}))?;
    made
}

pub(crate) fn size_of(client: &mut Client, node: &str) -> Outcome<u64> {
    let nodes = client.execute("query-named-block-nodes", &json!({"flat": true}))?;
    let found = nodes.as_array().and_then(|a| a.iter().find(|n| n["node-name"] == node));
    found
        .and_then(|n| n["image"]["virtual-size"].as_u64())
        .ok_or_else(|| format!("the daemon does not know {node}"))
}

fn create(client: &mut Client, job: &str, options: &Value) -> Outcome {
    client.execute("blockdev-create", &json!({"job-id": job, "options": options}))?;
    loop {
        let all = jobs(client)?;
        let Some(mine) = all.iter().find(|j| j["id"] == job) else {
            return Err(format!("the job that makes {} vanished", text(&options["filename"])));
        };
        if mine["status"] == "concluded" {
            client.execute("job-dismiss", &json!({"id": job}))?;
            return match mine.get("error") {
                None => Ok(()),
                Some(e) => Err(format!("cannot make the target: {}", text(e))),
            };
        }
        wait(client)?;
    }
}

fn start(args: &MirrorArgs, client: &mut Client, source: &str, target: &str) -> Outcome {
    let mut job = json!({
        "job-id": args.job, "device": source, "target": target, "sync": "full", "copy-mode": name(args.copy_mode),
        "speed": args.speed, "auto-dismiss": false,
    });
    if args.verify != Verify::Off {
        job["verify"] = json!(name(args.verify));
    }
    if !matches!(args.convergence, Convergence::None) {
        job["convergence"] = json!(name(args.convergence));
    }
    if let Some(then) = args.on_link_loss {
        job["on-link-loss"] = json!({"then": name(then)});
        if let Some(wait) = args.link_wait {
            job["on-link-loss"]["wait"] = json!(wait);
        }
    }
    client.execute("blockdev-mirror", &job).map(drop)
}

/// Shows progress until the job is ready.
fn follow(client: &mut Client, job: &str) -> Outcome {
    let mut view = View::new();
    loop {
        let all = jobs(client)?;
        let Some(mine) = all.iter().find(|j| j["id"] == job) else {
            return Err(format!("job {job} was dismissed by somebody else"));
        };
        view.update(&[mine]);
        match mine["status"].as_str() {
            Some("ready") => {
                view.finish();
                return Ok(());
            }
            Some("concluded") => {
                view.finish();
                let why = mine.get("error").map_or_else(|| "it was ended by somebody else".to_owned(), text);
                client.execute("job-dismiss", &json!({"id": job}))?;
                return Err(format!(
                    "the copy failed: {why}\n  The source is as it was. The target is incomplete."
                ));
            }
            _ => wait(client)?,
        }
    }
}

/// Ends a ready job as asked and waits for its end. What is to be said of its proof.
fn finish(client: &mut Client, job: &str, then: Then) -> Outcome<String> {
    match then {
        Then::Stay => return Ok(String::new()),
        Then::Pivot => client.execute("job-complete", &json!({"id": job}))?,
        Then::Copy => client.execute("block-job-cancel", &json!({"device": job}))?,
    };
    wait_for_end(client, job)
}

/// What is to be said of an ended job's proof, behind what it did.
pub(crate) fn proof(job: &Value) -> String {
    let digest = job["verify"]["digest"].as_str();
    digest.map_or_else(String::new, |d| format!("\nproven equal, digest {d}"))
}

/// Waits until a job has ended, and dismisses it if it is kept. A job that was called off is no failure here. What is to be said
/// of its proof.
pub(crate) fn wait_for_end(client: &mut Client, job: &str) -> Outcome<String> {
    loop {
        let all = jobs(client)?;
        let Some(mine) = all.iter().find(|j| j["id"] == job) else { return Ok(String::new()) };
        if mine["status"] == "concluded" {
            let error = mine.get("error").map(text).filter(|e| e != "Operation canceled");
            client.execute("job-dismiss", &json!({"id": job}))?;
            return error.map_or(Ok(proof(mine)), |e| {
                Err(format!("the job failed at its end: {e}\n  The source is still served."))
            });
        }
        wait(client)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_become_protocol_nodes() {
        assert_eq!(protocol("a/b.img").map(|v| v["filename"].clone()), Ok(json!("a/b.img")));
        let unix = protocol("nbd+unix:///disk?socket=/run/x.sock").expect("a good address");
        assert_eq!(
            unix,
            json!({"driver": "nbd", "server": {"type": "unix", "path": "/run/x.sock"}, "export": "disk"})
        );
        let tcp = protocol("nbd://h:10/e").expect("a good address");
        assert_eq!(
            tcp,
            json!({"driver": "nbd", "server": {"type": "inet", "host": "h", "port": "10"}, "export": "e"})
        );
        assert!(protocol("nbd+unix:///disk").is_err());
    }
}
