//! Mirrors of the built daemon under clients that are not ours and know what their disk must contain (`writer.py`, libnbd).
//!
//! The writer starts from a model of the disk, writes, zeroes, trims and reads throughout, and leaves the model as what the
//! disk must hold; `qemu-img compare` then says whether the target does. Seeds are printed; LIVEBLK_SEED sets one.

mod ends;
mod errors;
mod pairs;
pub(crate) mod proofs;
mod rules;

use crate::common::{Client, Daemon, Dir};
use crate::disk::tool;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes of most disks here.
const SIZE: usize = 8 << 20;
const MODES: [&str; 3] = ["background", "write-blocking", "read-write-blocking"];

pub(crate) fn seed() -> String {
    let seed = std::env::var("LIVEBLK_SEED").unwrap_or_else(|_| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.subsec_nanos().to_string()
    });
    println!("LIVEBLK_SEED={seed}");
    seed
}

/// What the disk contains at the start: data, with a hole in the middle.
pub(crate) fn model(dir: &Dir) {
    let bytes: Vec<u8> = (0..SIZE)
        .map(|i| if (SIZE / 4..SIZE / 2).contains(&i) { 0 } else { (i / 512 % 251 + i % 7) as u8 })
        .collect();
    std::fs::write(dir.path("model.raw"), bytes).unwrap();
}

/// The writer, running.
pub(crate) struct Writer {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Writer {
    /// Starts it on `uri` with `depth`, rate and kinds as `writer.py` takes them, and waits until it writes.
    pub(crate) fn start(dir: &Dir, uri: &str, more: &[&str]) -> Writer {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/mirrors/writer.py");
        let mut child = Command::new("/usr/bin/python3") // which libnbd's package belongs to
            .args([script, uri, "model.raw", &seed()])
            .args(more)
            .current_dir(&dir.0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        if more.last() != Some(&"sequence") {
            let mut line = String::new();
            stdout.read_line(&mut line).unwrap();
            assert_eq!(line, "writing\n");
        }
        Writer { child, stdin, stdout }
    }

    /// Lets it end, and gives what it says of itself.
    pub(crate) fn stop(mut self) -> Value {
        self.stdin.take();
        let mut text = String::new();
        self.stdout.read_to_string(&mut text).unwrap();
        assert!(self.child.wait().unwrap().success(), "the writer found a difference");
        serde_json::from_str(text.lines().last().unwrap()).unwrap()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Another server, killed at the end.
pub(crate) struct Server(Child);

impl Server {
    /// Starts it and waits for its socket.
    pub(crate) fn start(dir: &Dir, line: &str, socket: &str) -> Server {
        let mut words = line.split('|');
        let mut command = Command::new(words.next().unwrap());
        command.args(words).current_dir(&dir.0).stdin(Stdio::null()).stdout(Stdio::null());
        let server = Server(command.spawn().unwrap());
        let begin = Instant::now();
        while std::os::unix::net::UnixStream::connect(dir.0.join(socket)).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(10), "{line} does not listen");
            pause(5);
        }
        server
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.0.id().to_string();
        assert!(Command::new("sh").args(["-c", "kill -s $0 $1", name, &pid]).status().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn pause(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}

pub(crate) const DISK: &str = "nbd+unix:///disk?socket=nbd.sock";

/// A daemon that serves node `src` as "disk", with `src` and `dst` as given.
pub(crate) fn serve(dir: &Dir, src: &Value, dst: &Value) -> (Daemon, Client) {
    let with = |v: &Value, name: &str| {
        let mut v = v.clone();
        v["node-name"] = json!(name);
        v.to_string()
    };
    let (src, dst) = (with(src, "src"), with(dst, "dst"));
    let server = "addr.type=unix,addr.path=nbd.sock";
    let export = "nbd,id=e0,node-name=src,name=disk,writable=on";
    let daemon = Daemon::start(
        dir,
        &["--blockdev", &src, "--blockdev", &dst, "--nbd-server", server, "--export", export],
    );
    let client = daemon.client();
    (daemon, client)
}

pub(crate) fn image(format: &str, file: &str) -> Value {
    json!({"driver": format, "discard": "unmap", "file": {"driver": "file", "filename": file, "discard": "unmap"}})
}

/// Raw images `src.raw` (with the model's content) and `dst.raw`, served.
fn raw_pair(dir: &Dir) -> (Daemon, Client) {
    model(dir);
    tool(dir, "cp|model.raw|src.raw");
    tool(dir, "truncate|-s|8M|dst.raw");
    serve(dir, &image("raw", "src.raw"), &image("raw", "dst.raw"))
}

/// Starts job "m" from `src` to `dst`; `more` are further arguments.
fn mirror(c: &mut Client, more: &Value) -> Result<Value, String> {
    let mut a = json!({"job-id": "m", "device": "src", "target": "dst", "sync": "full"});
    for (k, v) in more.as_object().unwrap() {
        a[k] = v.clone();
    }
    c.command("blockdev-mirror", a)
}

/// The job, as `query-block-jobs` shows it.
fn job(c: &mut Client) -> Value {
    c.command("query-block-jobs", json!({})).unwrap()[0].clone()
}

fn verb(c: &mut Client, command: &str, id: &str) -> Result<Value, String> {
    c.command(command, json!({id: "m"}))
}

/// Ends the daemon and says whether `file` has what the client wrote.
fn compare(dir: &Dir, daemon: &mut Daemon, c: &mut Client, format: &str, file: &str) {
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
    tool(dir, &format!("qemu-img|compare|-f|raw|-F|{format}|model.raw|{file}"));
    if format == "qcow2" {
        tool(dir, &format!("qemu-img|check|-q|{file}"));
    }
}
