//! `liveblk replicate DISK --to ADDR` and `liveblk replicate DISK --listen ADDR`: a pair, with one command on each side.
//!
//! What can happen: the command is typed again (after a crash, or to look), the other side is not there yet, this side's disk
//! holds something, the roles are the other way round since a failover. What must stay true: a disk's content is given up only
//! where `--overwrite` says so; nothing is served to clients before the group has its role; typing it twice does no harm.

use crate::mirror::{Format, look, name};
use crate::watch::text;
use crate::{Outcome, pair};
use clap::{Args, ValueEnum};
use qmpclient::Client;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Node and export of a disk that `--serve` serves.
const SERVED: &str = "disk";
/// Between looks at a pair.
const EVERY: Duration = Duration::from_millis(200);

#[derive(Args)]
pub(crate) struct ReplicateArgs {
    /// The disk: a node of the running daemon, or with --serve a file
    disk: String,
    /// The daemon's QMP socket
    #[arg(long, env = "LIVEBLK_SOCKET", value_name = "PATH")]
    socket: PathBuf,
    /// Be the primary: send what is written to the secondary at HOST:PORT (or the path of a unix socket)
    #[arg(long, value_name = "ADDR", required_unless_present = "listen")]
    to: Option<String>,
    /// Be the secondary: let the primary connect to HOST:PORT (or a path)
    #[arg(long, value_name = "ADDR", conflicts_with = "to")]
    listen: Option<String>,
    /// The pair's name, the same on both sides; no other pair's at the same arbiter
    #[arg(long, default_value = pair::NAMELESS)]
    group: String,
    /// Time between checkpoints (500ms, 2s; 0: on command only); what a failover may lose at most
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = milliseconds)]
    every: u64,
    /// Where the secondary's buffer is (default: beside the disk, with .replica at the end)
    #[arg(long, value_name = "PATH")]
    buffer: Option<String>,
    /// Size of the secondary's buffer
    #[arg(long, value_name = "BYTES", default_value = "1G", value_parser = bytes)]
    buffer_size: u64,
    /// So many checkpoints are kept beside the newest, to fail over to (up to 64, as far as the buffer has room)
    #[arg(long, value_name = "NUMBER", default_value = "0")]
    keep: u64,
    /// How the secondary keeps what is not decided yet
    #[arg(long, value_enum, default_value = "redo")]
    engine: Engine,
    /// What writes do when the secondary is gone
    #[arg(long, value_enum, default_value = "degrade")]
    on_link_loss: LinkLoss,
    /// Let the etcd at these places (HOST:PORT, several with commas) grant the pair to one side at a time, by the pair's name: nobody takes over who
    /// lacks something, and who was succeeded answers nothing
    #[arg(long, value_name = "PLACES", value_delimiter = ',')]
    arbiter: Vec<String>,
    /// Who asks, where that etcd knows users
    #[arg(long, value_name = "NAME", requires_all = ["arbiter", "arbiter_password_file"])]
    arbiter_user: Option<String>,
    /// A file with that user's password and nothing else
    #[arg(long, value_name = "PATH", requires = "arbiter_user")]
    arbiter_password_file: Option<String>,
    /// Give up what the disk holds (a former primary becomes a secondary)
    #[arg(long, requires = "listen")]
    overwrite: bool,
    /// Start a daemon at --socket unless one is there, and serve the file as NBD export "disk" at this HOST:PORT or path
    #[arg(long, value_name = "ADDR")]
    serve: Option<String>,
    /// Make the file with this size if it is missing
    #[arg(long, value_name = "BYTES", value_parser = bytes, requires = "serve")]
    size: Option<u64>,
    /// Return at once, do not wait until the pair is in sync
    #[arg(long)]
    no_wait: bool,
    /// Go on showing lag and health, a line a second, until interrupted
    #[arg(long)]
    watch: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Engine {
    Redo,
    Undo,
}

#[derive(Clone, Copy, ValueEnum)]
enum LinkLoss {
    /// They go on, on this side alone
    Degrade,
    /// They wait
    Suspend,
    /// They fail
    IoError,
}

fn milliseconds(word: &str) -> Outcome<u64> {
    let digits = word.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match word.get(digits.len()..) {
        Some("ms") => 1,
        Some("s") => 1000,
        Some("min") => 60_000,
        Some("") if digits == "0" => 0,
        _ => return Err("a time is a number with ms, s or min, as in 500ms".to_owned()),
    };
    digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).ok_or_else(|| "not a number".to_owned())
}

fn bytes(word: &str) -> Outcome<u64> {
    let digits = word.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match word.get(digits.len()..).unwrap_or_default().to_ascii_uppercase().as_str() {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        _ => return Err("a size is a number with K, M, G or T, as in 64M".to_owned()),
    };
    digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).ok_or_else(|| "not a number".to_owned())
}

/// `HOST:PORT`, or a path if there is a slash in it.
pub(crate) fn address(word: &str) -> Outcome<Value> {
    if word.contains('/') {
        return Ok(json!({"type": "unix", "path": absolute(word)?}));
    }
    match word.rsplit_once(':') {
        Some((host, port)) if port.parse::<u16>().is_ok() => {
            let host = host.trim_start_matches('[').trim_end_matches(']');
            Ok(json!({"type": "inet", "host": host, "port": port}))
        }
        _ => Err(format!("{word}: expected HOST:PORT, or a path with a / in it")),
    }
}

/// The daemon may have another working directory.
pub(crate) fn absolute(path: &str) -> Outcome<String> {
    let path = std::path::absolute(path).map_err(|e| format!("{path}: {e}"))?;
    path.to_str().map(str::to_owned).ok_or_else(|| format!("{}: not UTF-8", path.display()))
}

pub(crate) fn run(args: &ReplicateArgs) -> Outcome {
    // a typing error is found before anything is touched
    let peer = args.to.as_deref().or(args.listen.as_deref()).unwrap_or_default();
    let peer_address = address(peer)?;
    let serve = args.serve.as_deref().map(address).transpose()?;
    if !args.arbiter.is_empty() && args.group == pair::NAMELESS {
        return Err(
            "an arbiter knows the pair by its name\n  Give it one that no other pair has there: --group NAME"
                .to_owned(),
        );
    }
    let mut client = match &serve {
        Some(_) => daemon(args)?,
        None => Client::connect(&args.socket)?,
    };
    let node = if serve.is_some() { SERVED } else { args.disk.as_str() };
    group(args, &mut client, node)?;
    if args.to.is_some() {
        primary(args, &mut client, peer, &peer_address)?;
    } else {
        secondary(args, &mut client, peer, &peer_address)?;
    }
    if let Some(at) = serve {
        export(&mut client, &at)?;
    }
    if args.no_wait {
        return Ok(());
    }
    follow(args, client)
}

/// Connects to the daemon at the socket, or starts one there, and gives it the disk.
fn daemon(args: &ReplicateArgs) -> Outcome<Client> {
    let (file, socket) = (absolute(&args.disk)?, &args.socket);
    let path = Path::new(&file);
    if let (false, Some(size)) = (path.exists(), args.size) {
        let made = std::fs::File::create_new(path).and_then(|f| f.set_len(size));
        made.map_err(|e| format!("cannot make {file}: {e}"))?;
    }
    if !path.exists() {
        return Err(format!("there is no {file}\n  --size makes it, as in --size 10G"));
    }
    let mut client = match Client::connect(socket) {
        Ok(client) => client,
        Err(_) => start(socket)?,
    };
    let nodes = client.execute("query-named-block-nodes", &json!({"flat": true}))?;
    let there = nodes.as_array().is_some_and(|all| all.iter().any(|n| n["node-name"] == SERVED));
    if !there {
        let host = json!({"driver": "file", "filename": file, "discard": "unmap"});
        let disk = match look(path)? {
            Format::Raw => {
                let mut raw = host;
                raw["node-name"] = json!(SERVED);
                raw
            }
            format => json!({"driver": name(format), "node-name": SERVED, "file": host, "discard": "unmap"}),
        };
        client.execute("blockdev-add", &disk)?;
    }
    Ok(client)
}

/// Starts a daemon that stays when this command has ended; its process number is beside the socket, in a file ending in `.pid`.
fn start(socket: &Path) -> Outcome<Client> {
    let socket = absolute(&socket.display().to_string())?;
    if std::os::unix::net::UnixStream::connect(&socket).is_err() {
        // what a killed daemon left
        let _ = std::fs::remove_file(&socket);
    }
    let program = crate::daemon::program();
    let status = Command::new(&program)
        .arg("--chardev")
        .arg(format!("socket,id=cli,path={},server=on,wait=off", socket.replace(',', ",,")))
        .args(["--monitor", "chardev=cli", "--daemonize", "--pidfile", &format!("{socket}.pid")])
        .stdin(Stdio::null())
        .status()
        .map_err(|e| format!("cannot start {}: {e}", program.display()))?;
    if !status.success() {
        return Err(format!("{} ended ({status})", program.display()));
    }
    Client::connect(Path::new(&socket))
}

/// Has the daemon read the password of the pair's user at the arbiter; the id of that secret.
fn secret(client: &mut Client, group: &str, file: &str) -> Outcome<String> {
    let password = std::fs::read(file).map_err(|e| format!("cannot read {file}: {e}"))?;
    if password.ends_with(b"\n") {
        return Err(format!(
            "the password in {file} would end with a new line\n  Write it without one: printf %s PASSWORD > {file}"
        ));
    }
    let id = format!("arbiter-{group}");
    // one of an earlier attempt is read anew
    let _ = client.execute("object-del", &json!({"id": id}));
    client.execute("object-add", &json!({"qom-type": "secret", "id": id, "file": file})).map(|_| id)
}

/// Makes the group, unless it is there.
fn group(args: &ReplicateArgs, client: &mut Client, node: &str) -> Outcome {
    if pair::find(client, &args.group)?.is_some() {
        return Ok(());
    }
    let nodes = client.execute("query-named-block-nodes", &json!({"flat": true}))?;
    let found = nodes.as_array().and_then(|all| all.iter().find(|n| n["node-name"] == node));
    let Some(found) = found else {
        return Err(format!("the daemon has no disk named {node}\n  `liveblk status` lists them"));
    };
    let buffer = match (&args.buffer, found["image"]["filename"].as_str()) {
        (Some(path), _) => absolute(path)?,
        (None, Some(file)) if !file.contains(':') => format!("{file}.replica"),
        _ => return Err(format!("{node} is not in a file\n  Say where its buffer may be: --buffer PATH")),
    };
    let mut new = json!({
        "id": args.group, "volumes": [{"node-name": node}], "engine": name(args.engine),
        "store": {"path": buffer, "size": args.buffer_size}, "retain": args.keep,
    });
    if !args.arbiter.is_empty() {
        new["fencing"] = json!({"type": "etcd", "endpoints": args.arbiter});
    }
    if let (Some(user), Some(file)) = (&args.arbiter_user, &args.arbiter_password_file) {
        let id = secret(client, &args.group, &absolute(file)?)?;
        new["fencing"]["username"] = json!(user);
        new["fencing"]["password-secret"] = json!(id);
    }
    client.execute("replication-group-add", &new).map(drop)
}

fn state(client: &mut Client, group: &str) -> Outcome<Value> {
    pair::find(client, group)?.ok_or_else(|| format!("the pair {group} vanished"))
}

fn primary(args: &ReplicateArgs, client: &mut Client, peer: &str, at: &Value) -> Outcome {
    let now = state(client, &args.group)?;
    match (now["role"].as_str(), now["stage"].as_str()) {
        (Some("primary"), _) if now["state"] == "fenced" => {
            return Err(format!(
                "the other side has taken over, and this disk is out of date\n  To follow it, giving up what only this disk has: \
                 liveblk replicate {} --listen ADDR --overwrite …, and there: liveblk replicate … --to ADDR",
                args.disk
            ));
        }
        (Some("secondary"), Some("done")) => {}
        (Some("secondary"), _) => {
            return Err(format!("this side is a secondary\n  To take over: liveblk failover {}", args.group));
        }
        _ => {}
    }
    let known = pair::peers(&now).iter().any(|p| p["name"] == peer);
    if !known {
        let new = json!({"group": args.group, "peer": peer, "addr": at});
        match client.execute("replication-peer-add", &new) {
            Err(e) if e.contains("already") => {}
            other => drop(other?),
        }
    }
    if now["role"] == "primary" {
        return Ok(());
    }
    let role = json!({
        "group": args.group, "role": "primary", "on-link-loss": name(args.on_link_loss),
        "checkpoint-interval-ms": args.every,
    });
    client.execute("replication-start", &role).map(drop)
}

fn secondary(args: &ReplicateArgs, client: &mut Client, place: &str, at: &Value) -> Outcome {
    let now = state(client, &args.group)?;
    match now["role"].as_str() {
        Some("secondary") if now["stage"] == "running" => return Ok(()),
        Some("unprotected") => {}
        // a former primary, or one that took over: not everything is copied then
        _ if args.overwrite => {}
        _ => {
            return Err(format!(
                "this disk is in use as {}\n  To give up what it holds and follow another: --overwrite",
                text(&now["role"])
            ));
        }
    }
    let role = json!({"group": args.group, "role": "secondary", "listen": at, "demote": args.overwrite});
    let begun = client.execute("replication-start", &role).map_err(|e| {
        let hint = "\n  To give up what the disk holds and follow another: --overwrite";
        if e.contains("demote") { format!("{e}{hint}") } else { e }
    })?;
    println!("secondary of {} at {}", args.group, begun["address"].as_str().unwrap_or(place));
    Ok(())
}

/// Serves the disk, unless it is served.
fn export(client: &mut Client, at: &Value) -> Outcome {
    let exports = client.execute("query-block-exports", &json!({}))?;
    if exports.as_array().is_some_and(|all| all.iter().any(|e| e["id"] == SERVED)) {
        return Ok(());
    }
    let mut data = at.clone();
    let kind = data.as_object_mut().and_then(|o| o.remove("type"));
    let server = json!({"addr": {"type": kind, "data": data}, "max-connections": 100});
    client.execute("nbd-server-start", &server)?;
    let export = json!({"type": "nbd", "id": SERVED, "node-name": SERVED, "name": SERVED, "writable": true});
    client.execute("block-export-add", &export).map(drop)
}

/// Shows the pair until it is in sync (a secondary: until it listens), or with `--watch` for ever. The monitor is free for
/// others between two looks.
fn follow(args: &ReplicateArgs, client: Client) -> Outcome {
    drop(client);
    let mut shown = (String::new(), std::time::Instant::now());
    loop {
        let mut client = Client::connect(&args.socket)?;
        let now = state(&mut client, &args.group)?;
        drop(client);
        let ready = now["role"] == "secondary" || pair::in_sync(&now);
        let (head, due) = (head(&now), shown.1.elapsed() >= Duration::from_secs(1));
        if shown.0 != head || due || (ready && !args.watch) {
            pair::lines(&now).iter().for_each(|l| println!("{l}"));
            shown = (head, std::time::Instant::now());
        }
        if pair::peers(&now).iter().any(|p| p["state"] == "refused") {
            let why = now.get("last-error").map(text).unwrap_or_default();
            return Err(format!("the secondary refuses: {why}"));
        }
        if ready && !args.watch {
            return Ok(());
        }
        std::thread::sleep(EVERY);
    }
}

/// What makes another line worth showing at once.
fn head(group: &Value) -> String {
    let states: Vec<String> = pair::peers(group).iter().map(|p| text(&p["state"])).collect();
    format!("{} {} {}", group["role"], group["state"], states.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_times_sizes_and_places() {
        assert_eq!(
            [milliseconds("500ms"), milliseconds("2s"), milliseconds("0")],
            [Ok(500), Ok(2000), Ok(0)]
        );
        assert!(milliseconds("5").is_err() && milliseconds("5h").is_err() && milliseconds("").is_err());
        assert_eq!([bytes("64M"), bytes("512"), bytes("1g")], [Ok(64 << 20), Ok(512), Ok(1 << 30)]);
        assert!(bytes("1X").is_err() && bytes("99999999999T").is_err());
        assert_eq!(address("b:7000"), Ok(json!({"type": "inet", "host": "b", "port": "7000"})));
        assert_eq!(address("[::1]:7000"), Ok(json!({"type": "inet", "host": "::1", "port": "7000"})));
        assert_eq!(address("/run/x"), Ok(json!({"type": "unix", "path": "/run/x"})));
        assert!(address("b").is_err() && address("b:x").is_err());
    }
}
