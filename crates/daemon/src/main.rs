//! liveblkd: the storage daemon.
//!
//! What can happen: an option fails (a sentence on stderr that names the option, exit status 1, what earlier options made
//! is closed in order); a signal or `quit` ends the daemon at any time, also while it starts. What must stay true: options
//! take effect in the order given; the end is the same for all causes; the process detaches before it has threads.
#![forbid(unsafe_code)]

mod help;
mod options;
mod startup;

use control::{Daemon, QmpError};
use env::os::process::{self, Detached, PidFile};
use env::os::{self, OsConfig};
use env::sync::race;
use options::{Given, Name};
use startup::Done;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    match start(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("liveblkd: {message}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &[String]) -> Result<(), String> {
    let (given, read) = options::read(arguments);
    for g in &given {
        match g.name {
            Name::Help => {
                print!("{}", help::USAGE);
                return Ok(());
            }
            Name::Version => {
                println!("{}", help::version());
                return Ok(());
            }
            _ => {}
        }
    }
    read?;
    // as many files and clients as the host allows; where it refuses, the old limit stands
    let _ = process::raise_descriptor_limit();
    let detached = match given.iter().any(|g| g.name == Name::Daemonize) {
        true => Some(process::daemonize().map_err(|e| e.to_string())?),
        false => None,
    };
    let executor = os::try_start(OsConfig::default()).map_err(|e| format!("cannot start: {e}"))?;
    let env = executor.env();
    let signals = os::signals(&env, &[os::SIGTERM, os::SIGINT, os::SIGHUP]).map_err(|e| e.to_string())?;
    executor.run(async move {
        let daemon = Daemon::new(&env, concat!("liveblk ", env!("CARGO_PKG_VERSION")));
        daemon.on_trouble(|what| eprintln!("liveblkd: {what}"));
        let ending = daemon.clone();
        env.spawn("signals", async move {
            // a second signal finds the end under way
            while signals.next().await.is_ok() {
                let daemon = ending.clone();
                ending.env().spawn("end by signal", async move { daemon.shut_down().await });
            }
        });
        run(&daemon, &given, detached).await
    })
}

/// Applies the options, and stays until the end.
async fn run(daemon: &Rc<Daemon>, given: &[Given], detached: Option<Detached>) -> Result<(), String> {
    // a signal that comes while an option waits (for a client, for a server) ends it
    let pid_file = match race(set_up(daemon, given), daemon.has_shut_down()).await {
        Some(Ok(Some(pid_file))) => pid_file,
        Some(Ok(None)) => return Ok(()),
        Some(Err(e)) => {
            daemon.shut_down().await;
            say(daemon.ended().await);
            return Err(e);
        }
        None => None,
    };
    if let Some(d) = detached {
        d.ready().map_err(|e| format!("cannot go into the background: {e}"))?;
    }
    daemon.open_monitors();
    say(daemon.ended().await);
    drop(pid_file);
    Ok(())
}

/// What went wrong at the very end has nobody else to tell it to.
fn say(end: Result<(), QmpError>) {
    if let Err(e) = end {
        eprintln!("liveblkd: while closing: {e}");
    }
}

/// Applies the options. The outer `None`: an option asked for a text, and the process is done.
async fn set_up(daemon: &Rc<Daemon>, given: &[Given]) -> Result<Option<Option<PidFile>>, String> {
    let state = given.iter().rev().find(|g| g.name == Name::StateDir);
    let done = startup::restore(daemon, given).await;
    let background = given.iter().any(|g| g.name == Name::Daemonize);
    let done = done.map_err(|e| format!("{}: {e}", state.map_or("--state-dir", |g| g.shown.as_str())))?;
    for (g, _) in given.iter().zip(done).filter(|(_, done)| !done) {
        match startup::apply(daemon, g, background).await {
            Ok(Done::Applied) => {}
            Ok(Done::Text(text)) => {
                print!("{text}");
                return Ok(None);
            }
            Err(e) => return Err(format!("{}: {e}", g.shown)),
        }
    }
    let Some(path) = given.iter().rev().find(|g| g.name == Name::Pidfile) else { return Ok(Some(None)) };
    let created = PidFile::create(Path::new(&path.value));
    let created =
        created.map_err(|e| format!("cannot create PID file: Could not create '{}': {e}", path.value))?;
    Ok(Some(Some(created)))
}
