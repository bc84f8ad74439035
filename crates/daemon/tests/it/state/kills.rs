//! kill -9 in the middle of jobs and snapshots, under a client that reconnects and checks everything it reads. The client is QEMU's
//! (`reconnect-delay`), what it is told to write and read comes from `writer.py`; the export is `writethrough`, so that what was
//! acknowledged has to survive. `KILLS` is how many, `LIVEBLK_SEED` the seed.

use super::{start, tool};
use crate::common::{Daemon, Dir};
use crate::mirrors::{Server, Writer, model, pause, seed};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

/// A monitor's client that may lose the daemon at any time.
struct Brave {
    stream: UnixStream,
    input: BufReader<UnixStream>,
}

impl Brave {
    fn new(dir: &Dir, daemon: &mut Daemon) -> Option<Brave> {
        let begin = Instant::now();
        loop {
            assert!(begin.elapsed() < Duration::from_secs(20), "the daemon does not come back");
            if daemon.child.try_wait().unwrap().is_some() {
                return None;
            }
            let Ok(stream) = UnixStream::connect(dir.path("qmp.sock")) else {
                pause(5);
                continue;
            };
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let input = BufReader::new(stream.try_clone().unwrap());
            let mut brave = Brave { stream, input };
            if brave.message().is_some() && brave.command("qmp_capabilities", &json!({})).is_some() {
                return Some(brave);
            }
        }
    }

    fn message(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.input.read_line(&mut line).ok().filter(|n| *n > 0)?;
        serde_json::from_str(&line).ok()
    }

    /// `None` if the daemon is gone.
    fn command(&mut self, name: &str, arguments: &Value) -> Option<Result<Value, String>> {
        let line = json!({"execute": name, "arguments": arguments}).to_string();
        self.stream.write_all(line.as_bytes()).ok()?;
        loop {
            let m = self.message()?;
            if let Some(v) = m.get("return") {
                return Some(Ok(v.clone()));
            }
            if let Some(e) = m.get("error") {
                return Some(Err(e["desc"].as_str().unwrap().to_owned()));
            }
        }
    }
}

/// What is done again and again, with what its name must be afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Work {
    Snapshot,
    Mirror,
    Stream,
    Commit,
}

struct Lab {
    dir: Dir,
    n: u32,
}

impl Lab {
    fn exported(c: &mut Brave) -> Option<String> {
        let exports = c.command("query-block-exports", &json!({}))?.unwrap();
        assert_eq!(exports.as_array().unwrap().len(), 1, "the export is there: {exports}");
        Some(exports[0]["node-name"].as_str().unwrap().to_owned())
    }

    /// Begins `work` on what is exported. The name of the node to which clients go, if they go to one.
    fn begin(&mut self, c: &mut Brave, work: Work) -> Option<()> {
        self.n += 1;
        let (device, new) = (Lab::exported(c)?, format!("n{}", self.n));
        let done = match work {
            Work::Snapshot => {
                let file = self.dir.path(&format!("{new}.qcow2"));
                let a = json!({"node-name": device, "snapshot-file": file, "snapshot-node-name": new});
                c.command("blockdev-snapshot-sync", &a)?
            }
            Work::Mirror => {
                tool(&self.dir, "qemu-img", &["create", "-q", "-f", "qcow2", &format!("{new}.qcow2"), "8M"]);
                let add = json!({"driver": "qcow2", "node-name": new, "discard": "unmap",
                    "file": {"driver": "file", "filename": self.dir.path(&format!("{new}.qcow2"))}});
                c.command("blockdev-add", &add)?.unwrap();
                let a = json!({"job-id": "j", "device": device, "target": new, "sync": "full", "speed": 40 << 20});
                c.command("blockdev-mirror", &a)?
            }
            Work::Stream => {
                c.command("block-stream", &json!({"job-id": "j", "device": device, "speed": 40 << 20}))?
            }
            Work::Commit => {
                c.command("block-commit", &json!({"job-id": "j", "device": device, "speed": 40 << 20}))?
            }
        };
        // a chain of one image has nothing to commit
        assert!(done.is_ok() || work == Work::Commit, "{work:?}: {done:?}");
        Some(())
    }

    /// Brings what was begun to its end.
    fn end(c: &mut Brave) -> Option<()> {
        let begin = Instant::now();
        loop {
            assert!(begin.elapsed() < Duration::from_secs(20), "a job does not end");
            let jobs = c.command("query-jobs", &json!({}))?.unwrap();
            let Some(job) = jobs.as_array().unwrap().first() else { return Some(()) };
            assert_eq!(job.get("error"), None, "{job}");
            if job["status"] == "ready" {
                // an error: it is completing already
                let _ = c.command("job-complete", &json!({"id": "j"}))?;
            }
            pause(2);
        }
    }
}

/// Kills the daemon after a while, whatever it does then.
fn kill_later(daemon: &Daemon, after: Duration) -> std::thread::JoinHandle<()> {
    let pid = daemon.child.id().to_string();
    std::thread::spawn(move || {
        std::thread::sleep(after);
        assert!(Command::new("sh").args(["-c", "kill -s KILL $0", &pid]).status().unwrap().success());
    })
}

#[test]
fn a_client_goes_on_through_kills_in_the_middle_of_jobs() {
    let mut rng: u64 = seed().parse().unwrap();
    let mut draw = |n: u64| {
        rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (rng >> 33) % n
    };
    let kills: u32 = std::env::var("KILLS").ok().and_then(|s| s.parse().ok()).unwrap_or(12);
    let dir = Dir::new();
    model(&dir);
    tool(&dir, "qemu-img", &["convert", "-O", "qcow2", "model.raw", "n0.qcow2"]);
    let node = json!({"driver": "qcow2", "node-name": "n0", "discard": "unmap",
        "file": {"driver": "file", "filename": dir.path("n0.qcow2")}})
    .to_string();
    let options = [
        "--blockdev",
        &node,
        "--nbd-server",
        "addr.type=unix,addr.path=nbd.sock",
        "--export",
        "nbd,id=e,node-name=n0,name=disk,writable=on,writethrough=on",
    ];
    let mut daemon = start(&dir, &options);
    drop(daemon.client());
    let server = "qemu-storage-daemon|--blockdev|nbd,node-name=r,server.type=unix,server.path=nbd.sock,export=disk,reconnect-delay=60|\
        --nbd-server|addr.type=unix,addr.path=proxy.sock|--export|nbd,id=e,node-name=r,name=disk,writable=on";
    let _proxy = Server::start(&dir, server, "proxy.sock");
    let writer = Writer::start(&dir, "nbd+unix:///disk?socket=proxy.sock", &["4", "300"]);
    let mut lab = Lab { dir, n: 0 };
    let all = [Work::Snapshot, Work::Mirror, Work::Snapshot, Work::Stream, Work::Snapshot, Work::Commit];
    for i in 0..kills {
        let work = all[i as usize % all.len()];
        let after = Duration::from_millis(draw(300));
        println!("{work:?}, killed after {after:?}");
        let killer = kill_later(&daemon, after);
        // a kill may come before it has come up; anything ends when the daemon is gone, at the latest
        if let Some(mut c) = Brave::new(&lab.dir, &mut daemon)
            && lab.begin(&mut c, work).is_some()
            && Lab::end(&mut c).is_some()
        {
            while c.command("query-version", &json!({})).is_some() {
                pause(1);
            }
        }
        killer.join().unwrap();
        daemon.wait();
        daemon = start(&lab.dir, &options);
        let mut c = Brave::new(&lab.dir, &mut daemon).expect("nobody kills it now");
        let state = c.command("query-state", &json!({})).unwrap().unwrap();
        assert_eq!(state["broken"], json!([]), "after {work:?}");
        Lab::end(&mut c).expect("nobody kills it now");
    }
    writer.stop();
    let mut c = Brave::new(&lab.dir, &mut daemon).unwrap();
    let name = Lab::exported(&mut c).unwrap();
    c.command("quit", &json!({}));
    assert!(daemon.wait().success());
    let image = format!("{name}.qcow2");
    tool(&lab.dir, "qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "model.raw", &image]);
    for i in 0..=lab.n {
        let image = format!("n{i}.qcow2");
        let there = std::fs::read(lab.dir.0.join(&image));
        // The daemon was killed while it made the file: nobody uses that, or the comparison had failed.
        if there.is_ok_and(|bytes| bytes.starts_with(b"QFI\xfb")) {
            // leaked clusters are allowed
            let checked = Command::new("qemu-img")
                .args(["check", "-q", &image])
                .current_dir(&lab.dir.0)
                .status()
                .unwrap();
            assert!(matches!(checked.code(), Some(0 | 3)), "{image}: {checked}");
        }
    }
}
