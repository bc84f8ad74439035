//! Detaching, pid files, signals, standard input and output, io_uring forbidden. No test harness: it starts threads, and
//! `daemonize` must come before any.
//!
//! Without arguments (or as the test runners call it) it runs itself as `daemon DIR` and so on and looks from outside.
#![allow(clippy::unwrap_used, reason = "tests")]

use block::{Data, ErrorKind, Span};
use env::os::process::{PidFile, daemonize, read_file};
use env::os::{IoMode, OsConfig, SIGHUP, SIGTERM, SIGUSR1, signals, start, try_start};
use env::{Address, Existing, OpenMode};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
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
        [verb, io] if verb == "echo" => echo(io),
        [verb, dir] if verb == "full" => full(Path::new(dir)),
        [verb] if verb == "forbidden" => without_ring(),
        [verb] if verb == "which" => println!("{}", which()),
        _ => {
            for io in ["uring", "threads"] {
                outside(io);
                stdio(io);
            }
            fallback();
            full_file_system();
            refuses_with_threads();
            println!("process ... ok");
        }
    }
}

fn daemon(dir: &Path, io: &str) {
    let detached = daemonize().unwrap();
    let pid_file = PidFile::create(&dir.join("pid")).unwrap();
    let executor = start(config(io));
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

fn config(io: &str) -> OsConfig {
    let io = if io == "uring" { IoMode::Uring } else { IoMode::Threads };
    OsConfig { io, ..OsConfig::default() }
}

/// Copies standard input to standard output, line ends and all, until it ends or says "quit".
fn echo(io: &str) {
    let executor = start(config(io));
    let env = executor.env();
    executor.run(async move {
        let s = env.connect(&Address::Stdio).await.unwrap();
        assert_eq!(s.peer(), None);
        loop {
            let got = s.recv(1000).await.unwrap();
            if got.is_empty() || &got[..] == b"quit" {
                s.shutdown();
                assert!(s.recv(1).await.unwrap().is_empty());
                return;
            }
            s.send(Data::from(got)).await.unwrap();
        }
    });
}

fn stdio(io: &str) {
    let me = || {
        let mut c = Command::new(std::env::current_exe().unwrap());
        c.args(["echo", io]);
        c
    };
    // pipes, more than one holds
    let mut child = me().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut to, mut from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let sent: Vec<u8> = (0..300_000u32).map(|i| (i * 7) as u8).collect();
    let all = sent.clone();
    let writer = std::thread::spawn(move || to.write_all(&all).unwrap());
    let mut got = Vec::new();
    from.read_to_end(&mut got).unwrap();
    writer.join().unwrap();
    assert!(got == sent && child.wait().unwrap().success());
    // files and devices, which poll knows nothing about
    let path = format!("/dev/shm/liveblk-stdio-{}", std::process::id());
    std::fs::write(&path, &sent).unwrap();
    let out = me().stdin(File::open(&path).unwrap()).output().unwrap();
    assert!(out.status.success() && out.stdout == sent);
    let to_file = File::create(format!("{path}.out")).unwrap();
    assert!(me().stdin(File::open(&path).unwrap()).stdout(to_file).status().unwrap().success());
    assert_eq!(std::fs::read(format!("{path}.out")).unwrap(), sent);
    assert!(me().stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap().success());
    // ends by itself while the other side holds the pipe open
    let mut child = me().stdin(Stdio::piped()).spawn().unwrap();
    let mut to = child.stdin.take().unwrap();
    to.write_all(b"quit").unwrap();
    assert!(child.wait().unwrap().success());
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(format!("{path}.out")).unwrap();
}

/// Which mode "auto" has chosen: only a ring has a descriptor of that kind.
fn which() -> &'static str {
    let executor = start(OsConfig::default());
    let env = executor.env();
    executor.run(async move {
        let dir = PathBuf::from("/dev/shm");
        let path = dir.join(format!("liveblk-which-{}", std::process::id()));
        let create = OpenMode { write: true, existing: Existing::CreateTruncate, ..OpenMode::default() };
        let f = env.open(&path, create).await.unwrap();
        f.write(0, Data::from(vec![5; 3 << 20])).await.unwrap();
        assert_eq!(f.read(Span::new(3 << 20 >> 1, 2)).await.unwrap().to_vec(), [5, 5]);
        env.remove(&path).await.unwrap();
    });
    let ring = std::fs::read_dir("/proc/self/fd").unwrap().any(|e| {
        let to = std::fs::read_link(e.unwrap().path()).unwrap_or_default();
        to.to_string_lossy().contains("io_uring")
    });
    if ring { "uring" } else { "threads" }
}

fn fallback() {
    let me = std::env::current_exe().unwrap();
    let run = |verb: &str, var: Option<&str>| {
        let mut c = Command::new(&me);
        c.arg(verb).env_remove("LIVEBLK_IO").envs(var.map(|v| ("LIVEBLK_IO", v)));
        let out = c.output().unwrap();
        assert!(out.status.success(), "{verb}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(run("which", None), "uring");
    assert_eq!(run("which", Some("threads")), "threads");
    assert_eq!(run("which", Some("uring")), "uring");
    assert_eq!(run("forbidden", None), "threads");
}

/// As in a container: a system-call filter answers io_uring_setup with EPERM.
fn without_ring() {
    const LOAD_NUMBER: libc::sock_filter = libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
    let program = [
        LOAD_NUMBER,
        libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: libc::SYS_io_uring_setup as u32 },
        libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ERRNO | libc::EPERM as u32 },
        libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW },
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the filter is valid for the call; both calls change only this process.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter), 0);
    }
    let refused = try_start(config("uring")).err().unwrap();
    assert_eq!(refused.errno(), libc::EPERM);
    println!("{}", which());
}

/// Runs `full` on a tmpfs of 1 MiB in a name space of its own: as root in one of mounts, else with one of users around it.
/// Where the host allows neither (containers; a chroot knows only the first), the device that is always full has to do.
fn full_file_system() {
    let allowed = |flags: &&str| Command::new("unshare").args([flags, "true"]).status().unwrap().success();
    let Some(flags) = ["-m", "-rm"].into_iter().find(allowed) else {
        println!("no name space for a small file system: only /dev/full is tried");
        return ["uring", "threads"].into_iter().for_each(full_device);
    };
    let dir = format!("/dev/shm/liveblk-full-{}", std::process::id());
    std::fs::create_dir(&dir).unwrap();
    let script = format!("mount -t tmpfs -o size=1m none {dir} && exec \"$0\" full {dir}");
    let me = std::env::current_exe().unwrap();
    let status = Command::new("unshare").args([flags, "sh", "-c", &script]).arg(me).status().unwrap();
    assert!(status.success());
    std::fs::remove_dir(&dir).unwrap();
}

fn full_device(io: &str) {
    let executor = start(config(io));
    let env = executor.env();
    executor.run(async move {
        let mode = OpenMode { write: true, ..OpenMode::default() };
        let f = env.open(Path::new("/dev/full"), mode).await.unwrap();
        let e = f.write(0, Data::from(vec![1; 4 << 10])).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NoSpace);
    });
}

fn full(dir: &Path) {
    for io in ["uring", "threads"] {
        let path = dir.join(io);
        let executor = start(config(io));
        let env = executor.env();
        executor.run(async move {
            let create = OpenMode { write: true, existing: Existing::CreateTruncate, ..OpenMode::default() };
            let f = env.open(&path, create).await.unwrap();
            for len in [1000 << 10, 3 << 20] {
                f.write(0, Data::from(vec![1; 900 << 10])).await.unwrap();
                // a part fits
                let e = f.write(900 << 10, Data::from(vec![2; len])).await.unwrap_err();
                assert_eq!(e.kind(), ErrorKind::NoSpace);
                assert_eq!(f.read(Span::new(900 << 10, 4)).await.unwrap().to_vec(), [2; 4]);
                let e = f.allocate(Span::new(0, 8 << 20)).await.unwrap_err();
                assert_eq!(e.kind(), ErrorKind::NoSpace);
                // room again: it goes on
                f.zero(Span::new(0, 900 << 10), env::Punch::Release).await.unwrap();
                f.write(0, Data::from(vec![3; 800 << 10])).await.unwrap();
                assert_eq!(f.read(Span::new(799 << 10, 4)).await.unwrap().to_vec(), [3; 4]);
                f.set_len(0).await.unwrap();
            }
        });
        std::fs::remove_file(dir.join(io)).unwrap();
    }
}
