//! `liveblk verify A B`: whether two disks are equal. Images that nobody uses, exports of other servers, or nodes of a running daemon,
//! whose clients go on writing meanwhile.
//!
//! What must stay true: it ends well only if all that was asked for was compared and is equal; places that differ are
//! named as they are found.

use crate::Outcome;
use crate::daemon::OwnDaemon;
use crate::mirror::{Format, add_image, look};
use crate::watch::{View, jobs, number, text};
use clap::Args;
use qmpclient::Client;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

const FIRST: &str = "liveblk-first";
const SECOND: &str = "liveblk-second";
/// How often figures are asked for.
const EVERY: Duration = Duration::from_millis(250);
/// Wait for an event that has been sent if there is one: the shortest that a socket takes.
const AT_ONCE: Duration = Duration::from_millis(1);

#[derive(Args)]
pub(crate) struct VerifyArgs {
    /// One disk: a file, an nbd:// or nbd+unix:// address, or with --socket a node of the running daemon
    first: String,
    /// The other one, likewise; it is this one that --repair changes
    second: String,
    /// QMP socket of the running daemon; without it a daemon is started for this alone
    #[arg(long, env = "LIVEBLK_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Format of the first (default: looked at)
    #[arg(short = 'f', long, value_enum)]
    format: Option<Format>,
    /// Format of the other (default: looked at)
    #[arg(short = 'F', long, value_enum)]
    second_format: Option<Format>,
    /// Compare so many percent, spread over the disk, instead of all
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    sample: Option<u8>,
    /// Chooses the sample
    #[arg(long, requires = "sample")]
    seed: Option<i64>,
    /// Copy what differs from the first to the other, and compare it again
    #[arg(long)]
    repair: bool,
    /// At most so many bytes a second (0: no limit)
    #[arg(long, default_value_t = 0)]
    speed: u64,
    /// The job's id in a running daemon
    #[arg(long, default_value = "liveblk-verify")]
    job: String,
}

pub(crate) fn run(args: &VerifyArgs) -> Outcome {
    if let Some(socket) = &args.socket {
        return compare(args, &mut Client::connect(socket)?, &args.first, &args.second);
    }
    let daemon = OwnDaemon::start()?;
    let mut client = daemon.client()?;
    add_image(&mut client, FIRST, format(args.format, &args.first)?, &args.first, true)?;
    let second = format(args.second_format, &args.second)?;
    add_image(&mut client, SECOND, second, &args.second, !args.repair)?;
    let compared = compare(args, &mut client, FIRST, SECOND);
    let closed = client.execute("blockdev-del", &json!({"node-name": SECOND})).map(drop);
    compared.and(closed)?;
    daemon.quit(&mut client)
}

/// The format that was given, or the one that the disk shows.
pub(crate) fn format(given: Option<Format>, place: &str) -> Outcome<Format> {
    match given {
        Some(f) => Ok(f),
        // what another server exports is a disk, whatever it is stored as
        None if place.starts_with("nbd") && place.contains("://") => Ok(Format::Raw),
        None => look(Path::new(place)),
    }
}

fn compare(args: &VerifyArgs, client: &mut Client, first: &str, second: &str) -> Outcome {
    let mut job = json!({
        "job-id": args.job, "device": first, "target": second, "speed": args.speed, "auto-dismiss": false,
        "repair": if args.repair { "target" } else { "none" },
    });
    if let Some(share) = args.sample {
        job["mode"] = json!("sampled");
        job["share"] = json!(share);
    }
    if let Some(seed) = args.seed {
        job["seed"] = json!(seed);
    }
    client.execute("block-verify", &job)?;
    let ended = concluded(client, &args.job, |event| tell(args, event))?;
    verdict(args, &ended)
}

/// Waits for the end of a comparison, telling `each` of events meanwhile; what is known of it.
pub(crate) fn concluded(client: &mut Client, job: &str, each: impl Fn(&Value)) -> Outcome<Value> {
    let mut view = View::new();
    loop {
        let all = jobs(client)?;
        let Some(mine) = all.iter().find(|j| j["id"] == job) else {
            return Err(format!("job {job} was dismissed by somebody else"));
        };
        view.update(&[mine]);
        if mine["status"] == "concluded" {
            view.finish();
            while let Some(event) = client.event(AT_ONCE)? {
                each(&event);
            }
            client.execute("job-dismiss", &json!({"id": job}))?;
            return Ok(mine.clone());
        }
        if let Some(event) = client.event(EVERY)? {
            each(&event);
        }
    }
}

/// A difference, as it is found.
fn tell(args: &VerifyArgs, event: &Value) {
    let data = &event["data"];
    if event["event"] != "BLOCK_JOB_MISMATCH" || data["device"] != args.job.as_str() {
        return;
    }
    let (at, len) = (number(&data["offset"]), number(&data["length"]));
    let last = match data["changed-last"].as_str() {
        Some("source") => format!(", {} was written last", args.first),
        Some("target") => format!(", {} was written last", args.second),
        _ => String::new(),
    };
    println!("differ at offset {at}, {len} bytes{last}");
}

fn verdict(args: &VerifyArgs, job: &Value) -> Outcome {
    let proof = &job["verify"];
    if let Some(why) = job.get("error") {
        let places = number(&proof["mismatches"]);
        return Err(match places {
            0 => format!("cannot say whether {} and {} are equal: {}", args.first, args.second, text(why)),
            _ => format!(
                "{} and {} differ: {places} places, {} bytes",
                args.first,
                args.second,
                number(&proof["mismatched-bytes"])
            ),
        });
    }
    let repaired = match number(&proof["repaired"]) {
        0 => String::new(),
        n => format!(" ({n} regions of 64 KiB repaired)"),
    };
    match proof["digest"].as_str() {
        Some(digest) => println!("equal{repaired}, digest {digest}"),
        None if args.sample.is_some() => println!(
            "equal in the sample: {} bytes, share {} %, seed {}{repaired}",
            number(&proof["verified-bytes"]),
            proof["share"],
            proof["seed"]
        ),
        None => println!("equal, but one is longer and reads as zero there{repaired}"),
    }
    Ok(())
}
