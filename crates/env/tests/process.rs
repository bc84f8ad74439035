//! Detaching, pid files and signals. No test harness: it starts threads, and `daemonize` must come before any.
//!
//! Without arguments (or as the test runners call it) it runs itself as `daemon DIR` and looks from outside.
#![allow(clippy::unwrap_used, reason = "tests")]

use env::os::process::{PidFile, daemonize, read_file};
use env::os::{IoMode, OsConfig, SIGHUP, SIGTERM, SIGUSR1, signals, start};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|a| a == "--list") {
        if !args.iter().any(|a| a == "--ignored") {
            println!("process: test");
        }
        return;
    }
    match args.as_slice() {
        [verb, dir, io] if verb == "daemon" => daemon(Path::new(dir), io),
        [verb] if verb == "fails" => {
            let _detached = daemonize().unwrap();
            std::process::exit(3);
        }
        _ => {
            for io in ["uring", "threads"] {
                outside(io);
            }
            refuses_with_threads();
            println!("process ... ok");
        }
    }
}

fn daemon(dir: &Path, io: &str) {
    let detached = daemonize().unwrap();
    let pid_file = PidFile::create(&dir.join("pid")).unwrap();
    let io = if io == "uring" { IoMode::Uring } else { IoMode::Threads };
    let executor = start(OsConfig { io, ..OsConfig::default() });
    let env = executor.env();
    let signals = signals(&env, &[SIGTERM, SIGHUP, SIGUSR1]).unwrap();
    detached.ready().unwrap();
    let log = dir.join("log");
    executor.run(async move {
        let mut seen = Vec::new();
        loop {
            let s = signals.next().await.unwrap();
            seen.push(s.to_string());
            std::fs::write(&log, seen.join(" ")).unwrap();
            if s == SIGTERM {
                return;
            }
        }
    });
    drop(pid_file);
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn outside(io: &str) {
    let dir = PathBuf::from(format!("/dev/shm/liveblk-process-{}-{io}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let me = std::env::current_exe().unwrap();
    let run = |args: &[&str]| Command::new(&me).args(args).status().unwrap();
    assert!(run(&["daemon", dir.to_str().unwrap(), io]).success());
    // when the first process has ended, the daemon is ready
    let text = read_file(&dir.join("pid"), 100).unwrap();
    let pid: i32 = String::from_utf8(text).unwrap().trim().parse().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session: i32 = stat.rsplit(')').next().unwrap().split_whitespace().nth(3).unwrap().parse().unwrap();
    // SAFETY: no pointers.
    assert_ne!(session, unsafe { libc::getsid(0) });
    assert_ne!(session, pid, "no session leader: cannot get a terminal again");
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/"));
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/fd/1")).unwrap(), Path::new("/dev/null"));
    let busy = PidFile::create(&dir.join("pid")).err().unwrap();
    assert_eq!(busy.errno(), libc::EAGAIN);
    let log = || std::fs::read_to_string(dir.join("log")).unwrap_or_default();
    // SAFETY: no pointers; it is our daemon.
    let kill = |s| assert_eq!(unsafe { libc::kill(pid, s) }, 0);
    kill(SIGHUP);
    wait_for("SIGHUP", || log() == SIGHUP.to_string());
    kill(SIGUSR1);
    wait_for("SIGUSR1", || log() == format!("{SIGHUP} {SIGUSR1}"));
    kill(SIGTERM);
    wait_for("the pid file goes", || !dir.join("pid").exists());
    wait_for("the process ends", || !Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(run(&["fails"]).code(), Some(1), "a daemon that ends before it is ready");
    // a file left by a process that was killed is taken over
    std::fs::write(dir.join("pid"), "999999\n").unwrap();
    let mine = PidFile::create(&dir.join("pid")).unwrap();
    assert_eq!(read_file(&dir.join("pid"), 100).unwrap(), format!("{}\n", std::process::id()).as_bytes());
    assert!(read_file(&dir.join("pid"), 2).is_err());
    drop(mine);
    assert!(!dir.join("pid").exists());
    std::fs::remove_dir_all(&dir).unwrap();
}

fn refuses_with_threads() {
    let (tx, rx) = std::sync::mpsc::channel::<()>();
    let t = std::thread::spawn(move || rx.recv());
    assert_eq!(daemonize().err().unwrap().errno(), libc::EBUSY);
    drop(tx);
    let _ = t.join();
    let limit = env::os::process::raise_descriptor_limit().unwrap();
    assert!(limit >= 1024);
    let old = env::os::process::umask(0o077);
    assert_eq!(env::os::process::umask(old), 0o077);
}
