//! `liveblk convert SRC DST`: one image becomes another, of another format perhaps, compressed perhaps. Nobody may be using either.
//!
//! The work is a full backup of the source by a daemon of our own: the one copy engine. What reads as zero stays sparse.
//!
//! What must stay true: DST is complete and on stable storage when this ends well; after a failure it says that DST is not.

use crate::Outcome;
use crate::daemon::OwnDaemon;
use crate::mirror::{Format, Verify, add_image, look, make_image, name, proof, size_of};
use crate::watch::{View, jobs, text, wait};
use clap::Args;
use qmpclient::Client;
use serde_json::{Value, json};
use std::path::Path;

const SOURCE: &str = "liveblk-source";
const TARGET: &str = "liveblk-target";
const JOB: &str = "liveblk-convert";

#[derive(Args)]
pub(crate) struct ConvertArgs {
    /// The image to read
    source: String,
    /// The image to write: made anew, unless it exists and --existing is given
    target: String,
    /// Format of the source (default: looked at)
    #[arg(short = 'f', long, value_enum)]
    format: Option<Format>,
    /// Format of the target
    #[arg(short = 'O', long, value_enum, default_value = "qcow2")]
    target_format: Format,
    /// Store the target compressed (qcow2)
    #[arg(short = 'c', long)]
    compress: bool,
    /// An option of the new image, as in blockdev-create: cluster-size=131072, compression-type=zstd, backing-file=…
    #[arg(short = 'o', value_name = "NAME=VALUE")]
    options: Vec<String>,
    /// Write into the image that is there
    #[arg(short = 'n', long)]
    existing: bool,
    /// At most so many bytes a second (0: no limit)
    #[arg(long, default_value_t = 0)]
    speed: u64,
    /// Read the new image again and compare it with what was copied: a share of it, or all
    #[arg(long, value_enum, default_value = "full")]
    verify: Verify,
}

/// `cluster-size=65536` as a member of the creation options: numbers and switches as such, all else as text.
fn option(word: &str) -> Outcome<(String, Value)> {
    let (key, value) = word
        .split_once('=')
        .ok_or_else(|| format!("-o {word}: expected NAME=VALUE, as in cluster-size=65536"))?;
    let value = match value {
        "on" | "true" => json!(true),
        "off" | "false" => json!(false),
        v => v.parse::<u64>().map_or_else(|_| json!(v), |n| json!(n)),
    };
    Ok((key.replace('_', "-"), value))
}

pub(crate) fn run(args: &ConvertArgs) -> Outcome {
    if args.compress && args.target_format == Format::Raw {
        return Err("a raw image cannot be compressed\n  Use -O qcow2, or leave -c out".to_owned());
    }
    let format = match args.format {
        Some(f) => f,
        None => look(Path::new(&args.source))?,
    };
    let there = Path::new(&args.target).exists();
    if there && !args.existing && same_file(&args.source, &args.target) {
        return Err(format!("{} is the source itself", args.target));
    }
    let options: Vec<(String, Value)> = args.options.iter().map(|w| option(w)).collect::<Outcome<_>>()?;
    let daemon = OwnDaemon::start()?;
    let mut client = daemon.client()?;
    add_image(&mut client, SOURCE, format, &args.source, true)?;
    if !args.existing {
        let size = size_of(&mut client, SOURCE)?;
        make_image(&mut client, &args.target, args.target_format, size, &options)?;
    }
    add_image(&mut client, TARGET, args.target_format, &args.target, false)?;
    let copied = copy(args, &mut client);
    // closing writes back what the target's format keeps in memory
    let closed = client.execute("blockdev-del", &json!({"node-name": TARGET})).map(drop);
    let proof = copied
        .and_then(|proof| closed.map(|()| proof))
        .map_err(|e| format!("{e}\n  {} is incomplete.", args.target))?;
    daemon.quit(&mut client)?;
    println!("{} is {} as {}{proof}", args.target, args.source, name(args.target_format));
    Ok(())
}

fn same_file(a: &str, b: &str) -> bool {
    let real = |p: &str| std::fs::canonicalize(p).ok();
    real(a).is_some() && real(a) == real(b)
}

/// What is to be said of its proof.
fn copy(args: &ConvertArgs, client: &mut Client) -> Outcome<String> {
    let mut job = json!({
        "job-id": JOB, "device": SOURCE, "target": TARGET, "sync": "full", "compress": args.compress,
        "speed": args.speed, "auto-dismiss": false,
    });
    if args.verify != Verify::Off {
        job["verify"] = json!(name(args.verify));
    }
    client.execute("blockdev-backup", &job)?;
    let mut view = View::new();
    loop {
        let all = jobs(client)?;
        let Some(mine) = all.iter().find(|j| j["id"] == JOB) else {
            return Err("the copy was dismissed by somebody else".to_owned());
        };
        view.update(&[mine]);
        if mine["status"] == "concluded" {
            view.finish();
            let error = mine.get("error").map(text);
            client.execute("job-dismiss", &json!({"id": JOB}))?;
            return error.map_or(Ok(proof(mine)), |e| Err(format!("the copy failed: {e}")));
        }
        wait(client)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_numbers_switches_or_text() {
        let of = |w| option(w).expect("an option");
        assert_eq!(of("cluster_size=4096"), ("cluster-size".to_owned(), json!(4096)));
        assert_eq!(of("lazy-refcounts=on"), ("lazy-refcounts".to_owned(), json!(true)));
        assert_eq!(of("compression-type=zstd"), ("compression-type".to_owned(), json!("zstd")));
        assert!(option("cluster-size").is_err());
    }
}
