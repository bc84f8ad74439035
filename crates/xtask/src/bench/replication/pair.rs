//! A pair of daemons that replicate one disk: QEMU's, or ours with either engine. The disk is export `d` on both sides.

use super::super::daemon::Daemon;
use super::super::nbd::image_at;
use super::super::{Options, Side};
use crate::shell::Outcome;
use qmpclient::Client;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Which pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// qemu-system on both sides.
    Qemu,
    /// liveblkd with the engine `redo`.
    Redo,
    /// liveblkd with the engine `undo`.
    Undo,
}

pub(super) const KINDS: [Kind; 3] = [Kind::Qemu, Kind::Redo, Kind::Undo];

impl Kind {
    /// The column of a table for it.
    pub(super) fn column(self) -> Side {
        match self {
            Kind::Qemu => Side::Qsd,
            Kind::Redo => Side::Liveblk,
            Kind::Undo => Side::Nothing,
        }
    }
}

/// What a pair is made of.
#[derive(Clone)]
pub(super) struct Make {
    pub(super) kind: Kind,
    pub(super) mib: u64,
    /// Both disks hold data before.
    pub(super) full: bool,
    /// The disks take everything and hold nothing: for amounts that do not fit here.
    pub(super) hollow: bool,
    /// Bytes of our secondary's store.
    pub(super) store: u64,
    /// Where the store is, if not beside the disk.
    pub(super) store_dir: Option<PathBuf>,
    /// More for `replication-start` of a primary.
    pub(super) more: Value,
    /// The secondary's file I/O by plain system calls, which the kernel counts.
    pub(super) counted: bool,
}

impl Make {
    pub(super) fn new(kind: Kind, mib: u64) -> Make {
        let store = 512 << 20;
        Make { kind, mib, full: true, hollow: false, store, store_dir: None, more: json!({}), counted: false }
    }
}

/// A directory of images, which goes when the daemon that has them open is gone: the next pair needs the memory.
struct Images(PathBuf);

impl Drop for Images {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(super) struct Process {
    daemon: Daemon,
    pub(super) client: Client,
    images: Images,
}

impl Process {
    fn start(kind: Kind, dir: PathBuf, counted: bool) -> Outcome<Process> {
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        let qmp = dir.join("qmp.sock");
        let mut command;
        if kind == Kind::Qemu {
            command = Command::new("qemu-system-x86_64");
            // it tells of every end
            command.stderr(Stdio::null());
            command.args(["-M", "none", "-nodefaults", "-display", "none", "-S"]);
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())]);
        } else {
            command = Command::new(Side::Liveblk.program());
            command.args(["--chardev", &format!("socket,id=q,path={},server=on,wait=off", qmp.display())]);
            command.args(["--monitor", "chardev=q"]);
            if counted {
                command.env("LIVEBLK_IO", "threads");
            }
        }
        let daemon =
            Daemon::run(if kind == Kind::Qemu { Side::Qsd } else { Side::Liveblk }, command, qmp.clone())?;
        let client = Client::connect(&qmp)?;
        let mut process = Process { daemon, client, images: Images(dir) };
        process.client.execute(
            "nbd-server-start",
            &json!({"addr": {"type": "unix", "data": {"path": process.socket()}}, "max-connections": 16}),
        )?;
        Ok(process)
    }

    pub(super) fn path(&self, name: &str) -> String {
        self.images.0.join(name).display().to_string()
    }

    pub(super) fn socket(&self) -> String {
        self.path("nbd.sock")
    }

    fn export(&mut self, node: &str, name: &str) -> Outcome {
        let export = json!({"type": "nbd", "id": name, "node-name": node, "name": name, "writable": true});
        self.client.execute("block-export-add", &export).map(drop)
    }

    fn add(&mut self, node: &Value) -> Outcome {
        self.client.execute("blockdev-add", node).map(drop)
    }

    /// The raw disk of a side as a node description.
    fn disk(&self, make: &Make, node: &str) -> Outcome<Value> {
        let size = make.mib << 20;
        if make.hollow {
            return Ok(json!({"driver": "null-co", "node-name": node, "size": size, "read-zeroes": true}));
        }
        let file = self.path("disk.raw");
        image_at("raw", &file, make.mib, make.full)?;
        Ok(json!({"driver": "raw", "node-name": node, "file": {"driver": "file", "filename": file}}))
    }

    /// Bytes written and read by system calls so far.
    pub(super) fn io(&self) -> (u64, u64) {
        let text = std::fs::read_to_string(format!("/proc/{}/io", self.daemon.id())).unwrap_or_default();
        let of = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name));
            line.and_then(|l| l.trim().parse().ok()).unwrap_or(0)
        };
        (of("wchar:"), of("rchar:"))
    }
}

pub(super) struct Pair {
    pub(super) kind: Kind,
    pub(super) primary: Process,
    pub(super) secondary: Process,
}

impl Pair {
    pub(super) fn start(options: &Options, make: &Make) -> Outcome<Pair> {
        let dir = |name: &str| options.dir.join(name);
        let mut secondary = Process::start(make.kind, dir("secondary"), make.counted)?;
        let mut primary = Process::start(make.kind, dir("primary"), false)?;
        if make.kind == Kind::Qemu {
            qemu(&mut primary, &mut secondary, make)?;
        } else {
            native(&mut primary, &mut secondary, make)?;
        }
        Ok(Pair { kind: make.kind, primary, secondary })
    }

    /// Makes a checkpoint; returns when it is made.
    pub(super) fn checkpoint(&mut self) -> Outcome {
        if self.kind == Kind::Qemu {
            self.primary.client.execute("xen-colo-do-checkpoint", &json!({}))?;
            return self.secondary.client.execute("xen-colo-do-checkpoint", &json!({})).map(drop);
        }
        self.primary.client.execute("replication-checkpoint", &json!({"group": "g"})).map(drop)
    }

    pub(super) fn fail_over(&mut self) -> Outcome {
        let c = &mut self.secondary.client;
        if self.kind == Kind::Qemu {
            let how = json!({"enable": false, "primary": false, "failover": true});
            return c.execute("xen-set-replication", &how).map(drop);
        }
        c.execute("replication-failover", &json!({"group": "g"})).map(drop)
    }

    /// Waits until nothing committed waits to be brought to the disk.
    pub(super) fn settle(&mut self) -> Outcome {
        if self.kind == Kind::Qemu {
            return Ok(());
        }
        until("the end of the apply", || {
            let info = self.secondary.client.execute("query-replication", &json!({"group": "g"}))?;
            Ok(info[0]["buffer"]["pending"] == 0)
        })
    }
}

fn until(what: &str, mut is: impl FnMut() -> Outcome<bool>) -> Outcome {
    let begin = Instant::now();
    while !is()? {
        if begin.elapsed() > Duration::from_secs(600) {
            return Err(format!("{what} does not come about"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn qemu(primary: &mut Process, secondary: &mut Process, make: &Make) -> Outcome {
    for name in ["active", "hidden"] {
        image_at("qcow2", &secondary.path(&format!("{name}.qcow2")), make.mib, false)?;
    }
    let s = secondary.disk(make, "s")?;
    secondary.add(&s)?;
    let file =
        |s: &Process, name: &str| json!({"driver": "file", "filename": s.path(&format!("{name}.qcow2"))});
    let (active, hidden) = (file(secondary, "active"), file(secondary, "hidden"));
    secondary.add(
        &json!({"driver": "replication", "mode": "secondary", "node-name": "rep", "top-id": "top",
        "file": {"driver": "qcow2", "node-name": "active", "file": active,
            "backing": {"driver": "qcow2", "node-name": "hidden", "file": hidden, "backing": "s"}}}),
    )?;
    let quorum = |children: &[&str]| json!({"driver": "quorum", "node-name": "top", "read-pattern": "fifo", "vote-threshold": 1, "children": children});
    secondary.add(&quorum(&["rep"]))?;
    secondary.export("s", "s")?;
    secondary.export("top", "d")?;
    secondary.client.execute("xen-set-replication", &json!({"enable": true, "primary": false}))?;
    let p = primary.disk(make, "p")?;
    primary.add(&p)?;
    let server = json!({"type": "unix", "path": secondary.socket()});
    primary.add(&json!({"driver": "replication", "mode": "primary", "node-name": "rep",
        "file": {"driver": "nbd", "node-name": "link", "server": server, "export": "s"}}))?;
    primary.add(&quorum(&["p", "rep"]))?;
    primary.export("top", "d")?;
    primary.client.execute("xen-set-replication", &json!({"enable": true, "primary": true})).map(drop)
}

fn native(primary: &mut Process, secondary: &mut Process, make: &Make) -> Outcome {
    let engine = if make.kind == Kind::Undo { "undo" } else { "redo" };
    let large = make.store_dir.as_deref();
    for (side, place) in [(&mut *secondary, large), (&mut *primary, None)] {
        let disk = side.disk(make, "n")?;
        side.add(&disk)?;
        let place = place.map_or_else(|| side.images.0.clone(), Path::to_path_buf);
        let store = json!({"path": place.join("store").display().to_string(), "size": make.store});
        side.client.execute(
            "replication-group-add",
            &json!({"id": "g", "volumes": [{"node-name": "n", "front": "top"}], "engine": engine, "store": store}),
        )?;
        side.export("top", "d")?;
    }
    let address = json!({"type": "unix", "path": secondary.path("repl.sock")});
    secondary
        .client
        .execute("replication-start", &json!({"group": "g", "role": "secondary", "listen": address}))?;
    primary.client.execute("replication-peer-add", &json!({"group": "g", "peer": "s", "addr": address}))?;
    let mut start = json!({"group": "g", "role": "primary"});
    if let Some(more) = make.more.as_object() {
        more.iter().for_each(|(k, v)| start[k] = v.clone());
    }
    primary.client.execute("replication-start", &start)?;
    until("the first synchronization", || {
        let info = primary.client.execute("query-replication", &json!({"group": "g"}))?;
        Ok(info[0]["peers"][0]["state"] == "running")
    })
}
