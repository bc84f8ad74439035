//! A liveblkd of our own in a directory of its own, and a QMP client.

use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Nothing that the daemon does takes so long, also where builds fill processors and disks.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// A directory that goes when the value goes.
pub(crate) struct Dir(pub(crate) PathBuf);

impl Dir {
    pub(crate) fn new() -> Dir {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("liveblkd-test-{}-{n}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Dir(path)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_liveblkd"))
}

/// Runs liveblkd to its end.
pub(crate) fn run(dir: &Dir, arguments: &[&str]) -> Output {
    program().args(arguments).current_dir(&dir.0).stdin(Stdio::null()).output().unwrap()
}

/// A running liveblkd with one monitor at `qmp.sock`.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    pub(crate) socket: PathBuf,
}

impl Daemon {
    pub(crate) fn start(dir: &Dir, extra: &[&str]) -> Daemon {
        Daemon::start_saying(dir, extra, Stdio::inherit())
    }

    /// What it says to people goes to `stderr`.
    pub(crate) fn start_saying(dir: &Dir, extra: &[&str], stderr: Stdio) -> Daemon {
        let socket = dir.0.join("qmp.sock");
        let chardev = format!("socket,id=c0,path={},server=on,wait=off", socket.display());
        let child = program()
            .args(["--chardev", &chardev, "--monitor", "c0"])
            .args(extra)
            .current_dir(&dir.0)
            .stderr(stderr)
            .spawn()
            .unwrap();
        Daemon { child, socket }
    }

    pub(crate) fn client(&self) -> Client {
        let mut c = Client::connect(&self.socket);
        c.command("qmp_capabilities", json!({})).unwrap();
        c
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < PATIENCE, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn signal(&self, name: &str) {
        signal(&self.child, name);
    }
}

/// By the shell, which has this built in: a small installation has no program named `kill`.
pub(crate) fn signal(process: &Child, name: &str) {
    let pid = process.id().to_string();
    assert!(Command::new("sh").args(["-c", "kill -s $0 $1", name, &pid]).status().unwrap().success());
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A QMP connection, not yet negotiated.
pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    buffer: Vec<u8>,
    pub(crate) greeting: Value,
    pub(crate) events: Vec<Value>,
}

impl Client {
    pub(crate) fn connect(path: &Path) -> Client {
        let begin = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(s) => break s,
                Err(e) => assert!(begin.elapsed() < PATIENCE, "{}: {e}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut c = Client { stream, buffer: Vec::new(), greeting: Value::Null, events: Vec::new() };
        c.greeting = c.read().expect("a greeting");
        c
    }

    /// The next message; `None` at the end of the stream.
    pub(crate) fn read(&mut self) -> Option<Value> {
        loop {
            if let Some(at) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=at).collect();
                assert!(line.ends_with(b"\r\n"));
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let mut piece = [0; 65536];
            match self.stream.read(&mut piece) {
                Ok(0) => return None,
                Ok(n) => self.buffer.extend_from_slice(&piece[..n]),
                // whoever stops and continues a process interrupts its waits
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => panic!("an answer within {} s: {e}", PATIENCE.as_secs()),
            }
        }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next reply; events before it are kept.
    pub(crate) fn reply(&mut self) -> Value {
        loop {
            let m = self.read().expect("a reply");
            if m.get("event").is_none() {
                return m;
            }
            self.events.push(m);
        }
    }

    /// The return value, or the error's sentence.
    #[allow(clippy::needless_pass_by_value)] // called with what json! makes
    pub(crate) fn command(&mut self, name: &str, arguments: Value) -> Result<Value, String> {
        self.send(json!({"execute": name, "arguments": arguments}).to_string().as_bytes());
        let reply = self.reply();
        match reply.get("error") {
            None => Ok(reply["return"].clone()),
            Some(e) => Err(e["desc"].as_str().unwrap().to_owned()),
        }
    }
    /// The next event of that name, be it one that has come already; those before it go.
    pub(crate) fn event(&mut self, name: &str) -> Value {
        loop {
            let e =
                if self.events.is_empty() { self.read().expect("an event") } else { self.events.remove(0) };
            if e["event"] == name {
                return e["data"].clone();
            }
        }
    }
}

/// Waits until something is so.
pub(crate) fn until(mut is: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < PATIENCE, "it does not come about");
        std::thread::sleep(Duration::from_millis(5));
    }
}
