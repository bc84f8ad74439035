//! liveblk: the human's command. It speaks QMP to a running liveblkd (`--socket`), or starts one of its own for work on
//! files that nobody serves.
//!
//! What can happen: no daemon at the socket, a job that fails or never gets ready, the terminal closed in the middle.
//! What must stay true: every error says what to do next; an interrupted command leaves a running daemon's jobs alone,
//! and its own daemon ended.
#![forbid(unsafe_code)]

mod convert;
mod daemon;
mod digest;
mod failover;
mod log;
mod mirror;
mod pair;
mod replicate;
mod status;
mod switchover;
mod verify;
mod watch;

use clap::{Args, Parser, Subcommand};
use qmpclient::{Client, Outcome};
use std::path::PathBuf;
use std::process::ExitCode;

/// Works on the disks of running machines.
#[derive(Parser)]
#[command(name = "liveblk", version, about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Copy a disk while it is in use, or two files that nobody uses
    Mirror(mirror::MirrorArgs),
    /// Write an image anew: in another format, compressed, with other options
    Convert(convert::ConvertArgs),
    /// Say whether two disks are equal, and where they differ
    Verify(verify::VerifyArgs),
    /// Print the digest of a disk, by which copies of it can be known
    Digest(digest::DigestArgs),
    /// Keep a copy of a disk on another host, at checkpoints; typed once on each side
    Replicate(replicate::ReplicateArgs),
    /// Let the secondary of a pair take over, at the last checkpoint
    Failover(failover::FailoverArgs),
    /// Change the sides of a pair without losing anything (typed on the primary)
    Switchover(switchover::SwitchoverArgs),
    /// Show disks, exports, pairs and jobs of a running daemon
    Status(SocketArgs),
    /// Show the progress of jobs until they end
    Watch(watch::WatchArgs),
    /// Show jobs that are over, or events, also those that nobody was there to see
    Log(log::LogArgs),
    /// Complete a ready job and wait for its end: its target takes the place of its source
    Complete(JobArgs),
    /// End a job and wait for its end; a ready mirror leaves its target as a point-in-time copy (unless --force)
    Cancel(CancelArgs),
}

#[derive(Args)]
struct SocketArgs {
    /// The daemon's QMP socket
    #[arg(long, env = "LIVEBLK_SOCKET", value_name = "PATH")]
    socket: PathBuf,
}

#[derive(Args)]
struct JobArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// The job's id
    job: String,
}

#[derive(Args)]
struct CancelArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Do not wait for a consistent point
    #[arg(long)]
    force: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("liveblk: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Outcome {
    match command {
        Command::Mirror(args) => mirror::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Digest(args) => digest::run(&args),
        Command::Replicate(args) => replicate::run(&args),
        Command::Switchover(args) => switchover::run(&args),
        Command::Failover(args) => failover::run(&args),
        Command::Status(args) => status::run(&mut Client::connect(&args.socket)?),
        Command::Watch(args) => watch::run(&args),
        Command::Log(args) => log::run(&args),
        Command::Complete(args) => {
            let mut client = Client::connect(&args.socket.socket)?;
            client.execute("job-complete", &serde_json::json!({"id": args.job}))?;
            let proof = mirror::wait_for_end(&mut client, &args.job)?;
            if !proof.is_empty() {
                println!("{}", proof.trim_start());
            }
            Ok(())
        }
        Command::Cancel(args) => {
            let mut client = Client::connect(&args.job.socket.socket)?;
            let (job, force) = (&args.job.job, args.force);
            client.execute("block-job-cancel", &serde_json::json!({"device": job, "force": force}))?;
            mirror::wait_for_end(&mut client, job).map(drop)
        }
    }
}
