//! `liveblk digest DISK`: the digest of what a disk holds (docs/digest.md), whatever it is stored as. An image that nobody uses, an export
//! of another server, or a node of a running daemon, whose clients go on writing meanwhile.
//!
//! It is told by the job that compares disks, which knows one only where all of both was found equal: the disk is compared with
//! itself, seen through a second node. So what is told was read at one instant, whoever writes. What must stay true: nothing is
//! printed but a digest of the whole disk; the second node goes again.

use crate::Outcome;
use crate::daemon::OwnDaemon;
use crate::mirror::{Format, add_image};
use crate::verify::{concluded, format};
use crate::watch::text;
use clap::Args;
use qmpclient::Client;
use serde_json::json;
use std::path::PathBuf;

const DISK: &str = "liveblk-disk";
const AGAIN: &str = "liveblk-disk-again";

#[derive(Args)]
pub(crate) struct DigestArgs {
    /// The disk: a file, an nbd:// or nbd+unix:// address, or with --socket a node of the running daemon
    disk: String,
    /// QMP socket of the running daemon; without it a daemon is started for this alone
    #[arg(long, env = "LIVEBLK_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Format of the disk (default: looked at)
    #[arg(short = 'f', long, value_enum)]
    format: Option<Format>,
    /// At most so many bytes a second (0: no limit)
    #[arg(long, default_value_t = 0)]
    speed: u64,
    /// The job's id in a running daemon
    #[arg(long, default_value = "liveblk-digest")]
    job: String,
}

pub(crate) fn run(args: &DigestArgs) -> Outcome {
    let digest = match &args.socket {
        Some(socket) => digest(args, &mut Client::connect(socket)?, &args.disk)?,
        None => {
            let daemon = OwnDaemon::start()?;
            let mut client = daemon.client()?;
            add_image(&mut client, DISK, format(args.format, &args.disk)?, &args.disk, true)?;
            let digest = digest(args, &mut client, DISK)?;
            daemon.quit(&mut client)?;
            digest
        }
    };
    println!("{digest}  {}", args.disk);
    Ok(())
}

fn digest(args: &DigestArgs, client: &mut Client, node: &str) -> Outcome<String> {
    let again = json!({"driver": "raw", "node-name": AGAIN, "read-only": true, "file": node});
    client.execute("blockdev-add", &again)?;
    let found = compare(args, client, node);
    let removed = client.execute("blockdev-del", &json!({"node-name": AGAIN})).map(drop);
    found.and_then(|digest| removed.map(|()| digest))
}

fn compare(args: &DigestArgs, client: &mut Client, node: &str) -> Outcome<String> {
    let job = json!({
        "job-id": args.job, "device": node, "target": AGAIN, "speed": args.speed, "auto-dismiss": false,
    });
    client.execute("block-verify", &job)?;
    let ended = concluded(client, &args.job, |_| {})?;
    match (ended.get("error"), ended["verify"]["digest"].as_str()) {
        (None, Some(digest)) => Ok(digest.to_owned()),
        (Some(why), _) => Err(format!("no digest of {}: {}", args.disk, text(why))),
        (None, None) => Err(format!("no digest of {}: it changed its length meanwhile", args.disk)),
    }
}
