//! Replication as QEMU composes it, between real processes: pairs of liveblkd and QEMU in both roles, and the failures that QEMU's
//! own pair answers with silence, divergence or a hang (F2 to F8 of the specification), each with the right outcome.

use crate::common::{Client, Daemon, Dir};
use crate::disk::tool;
use serde_json::{Value, json};
use std::process::{Child, Command, Stdio};

/// A disk of a pair, small enough to compare often.
const SIZE: &str = "8M";

/// One side: a process with a QMP socket in a directory of its own.
enum Process {
    Ours(Daemon),
    Qemu(Child),
}

struct Side {
    dir: Dir,
    process: Process,
    qmp: Client,
    /// Whether replication nodes are made with `durable`.
    durable: bool,
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Process::Qemu(child) = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Side {
    fn start(qemu: bool) -> Side {
        let dir = Dir::new();
        if !qemu {
            let daemon = Daemon::start(&dir, &[]);
            let qmp = daemon.client();
            return Side { dir, process: Process::Ours(daemon), qmp, durable: false };
        }
        let socket = dir.0.join("qmp.sock");
        let qmp = format!("unix:{},server=on,wait=off", socket.display());
        let child = Command::new("qemu-system-x86_64")
            .args(["-M", "none", "-nodefaults", "-display", "none", "-S", "-qmp", &qmp])
            .current_dir(&dir.0)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let process = Process::Qemu(child);
        let mut qmp = Client::connect(&socket);
        qmp.command("qmp_capabilities", json!({})).unwrap();
        Side { dir, process, qmp, durable: false }
    }

    fn secondary(qemu: bool, disks: &[&str]) -> Side {
        let mut side = Side::start(qemu);
        side.serve();
        for n in disks {
            side.images(n);
            let hidden = json!({"driver": "file", "filename": side.dir.path(&format!("h{n}.qcow2"))});
            side.secondary_disk(
                n,
                &hidden,
                &json!({"driver": "file", "filename": side.dir.path(&format!("a{n}.qcow2"))}),
            );
        }
        side
    }

    fn images(&self, n: &str) {
        tool(&self.dir, &format!("qemu-img|create|-q|-f|raw|s{n}.raw|{SIZE}"));
        for image in ["a", "h"] {
            tool(&self.dir, &format!("qemu-img|create|-q|-f|qcow2|{image}{n}.qcow2|{SIZE}"));
        }
    }

    fn secondary_disk(&mut self, n: &str, hidden: &Value, active: &Value) {
        let file = json!({"driver": "file", "filename": self.dir.path(&format!("s{n}.raw"))});
        self.secondary_disk_on(n, &file, hidden, active);
    }

    fn secondary_disk_on(&mut self, n: &str, file: &Value, hidden: &Value, active: &Value) {
        self.add(json!({"driver": "raw", "node-name": format!("s{n}"), "file": file}));
        let mut rep = json!({"driver": "replication", "mode": "secondary", "node-name": format!("rep{n}"),
            "top-id": format!("top{n}"),
            "file": {"driver": "qcow2", "node-name": format!("active{n}"), "file": active,
                "backing": {"driver": "qcow2", "node-name": format!("hidden{n}"), "file": hidden,
                    "backing": format!("s{n}")}}});
        if self.durable {
            rep["durable"] = json!(true);
        }
        self.add(rep);
        self.add(json!({"driver": "quorum", "node-name": format!("top{n}"), "read-pattern": "fifo",
            "vote-threshold": 1, "children": [format!("rep{n}")]}));
        self.export(&format!("s{n}"));
        self.export(&format!("top{n}"));
    }

    fn primary(qemu: bool, of: &Side, timeout: Option<u64>) -> Side {
        let mut side = Side::start(qemu);
        tool(&side.dir, &format!("qemu-img|create|-q|-f|raw|p.raw|{SIZE}"));
        let file = json!({"driver": "file", "filename": side.dir.path("p.raw")});
        side.add(json!({"driver": "raw", "node-name": "p", "file": file}));
        let server = json!({"type": "unix", "path": of.dir.path("nbd.sock")});
        let mut rep = json!({"driver": "replication", "mode": "primary", "node-name": "rep",
            "file": {"driver": "nbd", "node-name": "link", "server": server, "export": "s"}});
        if let Some(seconds) = timeout {
            rep["forward-timeout"] = json!(seconds);
        }
        side.add(rep);
        side.add(json!({"driver": "quorum", "node-name": "top", "read-pattern": "fifo", "vote-threshold": 1,
            "children": ["p", "rep"]}));
        side.serve();
        side.export("top");
        side
    }

    fn add(&mut self, node: Value) {
        self.qmp.command("blockdev-add", node).unwrap();
    }

    fn serve(&mut self) {
        let path = self.dir.path("nbd.sock");
        let addr = json!({"type": "unix", "data": {"path": path}});
        self.qmp.command("nbd-server-start", json!({"addr": addr})).unwrap();
    }

    fn export(&mut self, node: &str) {
        let export = json!({"type": "nbd", "id": format!("x-{node}"), "node-name": node, "name": node, "writable": true});
        self.qmp.command("block-export-add", export).unwrap();
    }

    fn replicate(&mut self, primary: bool) {
        let how = json!({"enable": true, "primary": primary});
        self.qmp.command("xen-set-replication", how).unwrap();
    }

    fn checkpoint(&mut self) -> Result<Value, String> {
        self.qmp.command("xen-colo-do-checkpoint", json!({}))
    }

    fn fail_over(&mut self) {
        let how = json!({"enable": false, "primary": false, "failover": true});
        self.qmp.command("xen-set-replication", how).unwrap();
    }

    fn trouble(&mut self) -> bool {
        self.qmp.command("query-xen-replication-status", json!({})).unwrap()["error"] == true
    }

    /// Runs commands of qemu-io on an export; whether all succeeded.
    fn io(&self, export: &str, commands: &[&str]) -> bool {
        let uri = format!("nbd+unix:///{export}?socket={}", self.dir.path("nbd.sock"));
        // a request that hangs shall fail the test, not hang it
        let mut io = Command::new("timeout");
        io.args(["20", "qemu-io", "-f", "raw"]);
        commands.iter().for_each(|c| {
            io.args(["-c", c]);
        });
        let out = io.arg(uri).output().unwrap();
        // qemu-io tells patterns that differ in words alone
        out.status.success() && !String::from_utf8_lossy(&out.stdout).contains("verification failed")
    }

    fn sees(&self, export: &str, pattern: u8, at: &str) -> bool {
        self.io(export, &[&format!("read -P {pattern} {at}")])
    }

    fn writes(&self, export: &str, pattern: u8, at: &str) -> bool {
        self.io(export, &[&format!("write -P {pattern} {at}")])
    }

    /// Waits until the overlays have left the front.
    fn merged(&mut self) {
        for _ in 0..2000 {
            let nodes = self.qmp.command("query-named-block-nodes", json!({"flat": true})).unwrap();
            if !nodes.as_array().unwrap().iter().any(|n| n["node-name"] == "active") {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("the overlays do not go");
    }
}

/// A running pair.
fn pair(primary_is_qemu: bool, secondary_is_qemu: bool) -> (Side, Side) {
    let mut secondary = Side::secondary(secondary_is_qemu, &[""]);
    secondary.replicate(false);
    let mut primary = Side::primary(primary_is_qemu, &secondary, None);
    primary.replicate(true);
    (primary, secondary)
}

/// A life: writes on both sides, a checkpoint, more writes, a failover.
fn life(primary_is_qemu: bool, secondary_is_qemu: bool) -> (Side, Side) {
    let (mut primary, mut secondary) = pair(primary_is_qemu, secondary_is_qemu);
    assert!(primary.writes("top", 1, "1M 64k"));
    assert!(secondary.sees("top", 0, "1M 64k"), "the primary's write is not to be seen before a checkpoint");
    assert!(secondary.sees("s", 1, "1M 64k"), "it is on the secondary's disk");
    assert!(secondary.writes("top", 2, "2097664 512"));
    assert!(primary.writes("top", 3, "2M 64k"));
    assert!(
        secondary.sees("top", 2, "2097664 512") && secondary.sees("top", 0, "2M 512"),
        "own, beside it old"
    );
    primary.checkpoint().unwrap();
    secondary.checkpoint().unwrap();
    assert!(secondary.sees("top", 1, "1M 64k") && secondary.sees("top", 3, "2M 64k"));
    assert!(primary.writes("top", 4, "1M 4k") && primary.writes("top", 5, "3M 64k"));
    assert!(secondary.writes("top", 6, "4M 64k"));
    secondary.fail_over();
    assert!(secondary.sees("top", 6, "4M 64k"), "it serves at once");
    secondary.merged();
    for (pattern, at) in [(1, "1M 64k"), (0, "3M 64k"), (6, "4M 64k"), (3, "2M 64k")] {
        assert!(secondary.sees("top", pattern, at), "{pattern} at {at}");
    }
    assert!(!secondary.trouble());
    (primary, secondary)
}

#[test]
fn f2_an_old_primary_does_not_reach_the_disk_after_a_failover() {
    let (mut primary, mut secondary) = life(false, false);
    assert!(primary.writes("top", 9, "0 64k"), "the primary's own disk has it");
    assert!(primary.trouble(), "the primary is told");
    assert!(!secondary.writes("s", 9, "0 64k"), "nobody comes by the export from before");
    assert!(secondary.sees("top", 0, "0 64k"));
    secondary.qmp.command("block-export-del", json!({"id": "x-s", "mode": "hard"})).unwrap();
}

#[test]
fn a_qemu_primary_replicates_to_ours() {
    let (mut primary, secondary) = life(true, false);
    assert!(primary.writes("top", 9, "0 64k"));
    assert!(primary.trouble());
    assert!(secondary.sees("top", 0, "0 64k"));
}

#[test]
fn ours_replicates_to_a_qemu_secondary() {
    life(false, true);
}

/// `file` with a driver in front that fails requests by rules.
fn failing(file: &Value, rules: &Value) -> Value {
    json!({"driver": "blkdebug", "image": file, "inject-error": rules})
}

#[test]
fn f3_a_full_buffer_refuses_all_later_writes_and_the_checkpoint() {
    let mut secondary = Side::secondary(false, &[]);
    secondary.images("");
    tool(&secondary.dir, "qemu-io|-f|raw|-c|write -P 1 0 8M|s.raw");
    let file = |name: &str| json!({"driver": "file", "filename": secondary.dir.path(name)});
    let (hidden, active) = (file("h.qcow2"), file("a.qcow2"));
    // the first cluster that the hidden disk's image takes finds no room, once
    let full = failing(
        &hidden,
        &json!([{"event": "none", "iotype": "write", "errno": 28, "sector": 640, "once": true}]),
    );
    secondary.secondary_disk("", &full, &active);
    secondary.replicate(false);
    let mut primary = Side::primary(false, &secondary, None);
    primary.replicate(true);
    assert!(!secondary.writes("s", 7, "1M 64k"), "the first write to be kept is refused");
    assert!(!secondary.writes("s", 7, "2M 64k"), "and those after it, though there would be room now");
    assert!(secondary.trouble(), "the secondary says so itself");
    let refused = secondary.checkpoint().unwrap_err();
    assert!(refused.contains("checkpoint refused"), "{refused}");
    secondary.qmp.event("REPLICATION_CHECKPOINT_VETO");
    assert!(secondary.sees("top", 1, "0 8M"), "the last checkpoint stays readable");
    assert!(primary.writes("top", 7, "1M 64k") && primary.trouble());
    assert!(primary.checkpoint().unwrap_err().contains("refused"));
}

#[test]
fn f4_a_checkpoint_is_of_all_disks_or_of_none() {
    let mut secondary = Side::secondary(false, &["0"]);
    secondary.images("1");
    let file = |name: &str| json!({"driver": "file", "filename": secondary.dir.path(name)});
    let active = failing(&file("a1.qcow2"), &json!([{"event": "cluster_free", "errno": 5}]));
    let hidden = file("h1.qcow2");
    secondary.secondary_disk("1", &hidden, &active);
    secondary.replicate(false);
    for n in ["0", "1"] {
        assert!(secondary.writes(&format!("s{n}"), 5, "1M 64k"));
        assert!(secondary.writes(&format!("top{n}"), 6, "2M 64k"));
    }
    let failed = secondary.checkpoint().unwrap_err();
    assert!(failed.contains("rep1"), "says which disk: {failed}");
    for n in ["0", "1"] {
        assert!(secondary.sees(&format!("top{n}"), 0, "1M 64k"), "disk {n} is at the last checkpoint");
    }
    assert!(secondary.trouble());
}

/// A secondary that is killed in the middle of an epoch, and what comes up with its images.
fn killed(durable: bool) -> Side {
    let mut secondary = Side::start(false);
    secondary.serve();
    secondary.images("");
    secondary.durable = durable;
    let file = |name: &str| json!({"driver": "file", "filename": secondary.dir.path(name)});
    let (hidden, active) = (file("h.qcow2"), file("a.qcow2"));
    secondary.secondary_disk("", &hidden, &active);
    secondary.replicate(false);
    assert!(secondary.writes("s", 1, "1M 64k"));
    secondary.checkpoint().unwrap();
    assert!(secondary.writes("s", 5, "1M 4k") && secondary.writes("s", 5, "3M 64k"));
    if let Process::Ours(daemon) = &mut secondary.process {
        daemon.child.kill().unwrap();
        daemon.wait();
    }
    let mut again = Side::start(false);
    again.serve();
    for name in ["s.raw", "a.qcow2", "h.qcow2"] {
        tool(&again.dir, &format!("cp|{}|{name}", secondary.dir.path(name)));
    }
    again.durable = durable;
    let file = |name: &str| json!({"driver": "file", "filename": again.dir.path(name)});
    let (hidden, active) = (file("h.qcow2"), file("a.qcow2"));
    again.secondary_disk("", &hidden, &active);
    again
}

#[test]
fn f5_what_a_killed_secondary_leaves_is_not_taken_for_a_checkpoint() {
    let mut again = killed(false);
    let start = json!({"enable": true, "primary": false});
    let refused = again.qmp.command("xen-set-replication", start).unwrap_err();
    assert!(refused.contains("between two checkpoints"), "{refused}");
    assert!(!again.sees("top", 0, "0 64k"), "and the front stays closed");
}

#[test]
fn f5_a_durable_secondary_that_was_killed_takes_over_from_its_last_checkpoint() {
    let mut again = killed(true);
    again.fail_over();
    again.merged();
    assert!(again.sees("top", 1, "1M 64k") && again.sees("top", 0, "3M 64k"));
}

#[test]
fn a_start_that_fails_at_one_disk_starts_none() {
    let mut secondary = Side::secondary(false, &["0", "1"]);
    secondary.qmp.command("block-export-del", json!({"id": "x-s1"})).unwrap();
    secondary.qmp.event("BLOCK_EXPORT_DELETED");
    let start = json!({"enable": true, "primary": false});
    let refused = secondary.qmp.command("xen-set-replication", start).unwrap_err();
    assert_eq!(refused, "The secondary disk doesn't have block backend");
    assert!(!secondary.sees("top0", 0, "0 64k"), "the other is not started");
    secondary.export("s1");
    secondary.replicate(false);
    assert!(secondary.sees("top0", 0, "0 64k") && secondary.sees("top1", 0, "0 64k"));
}

#[test]
fn f6_a_merge_that_fails_is_told_and_can_be_tried_again() {
    let mut secondary = Side::secondary(false, &[]);
    secondary.images("");
    let file = |name: &str| json!({"driver": "file", "filename": secondary.dir.path(name)});
    // where the own write is to go, once
    let rules = json!([{"event": "none", "iotype": "write", "errno": 5, "sector": 8192, "once": true}]);
    let (disk, hidden, active) = (failing(&file("s.raw"), &rules), file("h.qcow2"), file("a.qcow2"));
    secondary.secondary_disk_on("", &disk, &hidden, &active);
    secondary.replicate(false);
    assert!(secondary.writes("s", 5, "1M 64k") && secondary.writes("top", 6, "4M 64k"));
    secondary.fail_over();
    loop {
        let told = secondary.qmp.event("REPLICATION_FAILOVER");
        assert_ne!(told["phase"], "completed", "the merge met the failing sector");
        if told["phase"] == "failed" {
            break;
        }
    }
    assert!(secondary.trouble());
    assert!(
        secondary.sees("top", 6, "4M 64k") && secondary.sees("top", 0, "1M 64k"),
        "the overlays go on serving"
    );
    assert!(secondary.writes("top", 7, "5M 64k"));
    secondary.fail_over();
    secondary.merged();
    assert!(!secondary.trouble());
    for (pattern, at) in [(6, "4M 64k"), (0, "1M 64k"), (7, "5M 64k")] {
        assert!(secondary.sees("top", pattern, at), "{pattern} at {at}");
    }
}

#[test]
fn f7_a_frozen_secondary_holds_nobody() {
    let mut secondary = Side::secondary(false, &[""]);
    secondary.replicate(false);
    let mut primary = Side::primary(false, &secondary, Some(1));
    primary.replicate(true);
    if let Process::Ours(daemon) = &secondary.process {
        daemon.signal("STOP");
        assert!(primary.writes("top", 5, "1M 64k"), "the client goes on");
        assert!(primary.trouble());
        primary.qmp.event("REPLICATION_DEGRADED");
        let links = primary.qmp.command("query-yank", json!({})).unwrap();
        assert_eq!(links, json!([{"type": "block-node", "node-name": "link"}]));
        primary.qmp.command("yank", json!({"instances": links})).unwrap();
        daemon.signal("CONT");
    }
    let unknown = json!({"instances": [{"type": "block-node", "node-name": "nobody"}]});
    assert_eq!(primary.qmp.command("yank", unknown).unwrap_err(), "Instance not found");
}

#[test]
fn f8_overlapping_writes_leave_both_disks_alike() {
    let (primary, secondary) = pair(false, false);
    std::thread::scope(|scope| {
        for client in 1..=4u8 {
            let primary = &primary;
            scope.spawn(move || {
                let writes: Vec<String> = (0..60u64)
                    .map(|i| {
                        let at = (i * 7 + u64::from(client) * 3) % 16 * (64 << 10);
                        let len = (256 << 10) * (1 + (i + u64::from(client)) % 4);
                        format!("write -q -P {} {at} {len}", u64::from(client - 1) * 60 + i + 1)
                    })
                    .collect();
                let words: Vec<&str> = writes.iter().map(String::as_str).collect();
                assert!(primary.io("top", &words));
            });
        }
    });
    let (p, s) = (primary.dir.path("p.raw"), secondary.dir.path("s.raw"));
    tool(&primary.dir, &format!("cmp|{p}|{s}"));
}

#[test]
fn the_commands_answer_as_qemus() {
    let mut side = Side::start(false);
    let mut refused = |name: &str, arguments: Value| side.qmp.command(name, arguments).unwrap_err();
    let both = json!({"enable": true, "primary": false, "failover": true});
    assert_eq!(refused("xen-set-replication", both), "Parameter 'failover' is only for stopping replication");
    assert_eq!(refused("x-colo-lost-heartbeat", json!({})), "VM is not in COLO mode");
    let status = side.qmp.command("query-colo-status", json!({})).unwrap();
    assert_eq!(status, json!({"mode": "none", "last-mode": "none", "reason": "none"}));
    let mut secondary = Side::secondary(false, &[""]);
    assert_eq!(secondary.checkpoint().unwrap_err(), "Backup job was cancelled unexpectedly");
    let stop = json!({"enable": false, "primary": false});
    let early = secondary.qmp.command("xen-set-replication", stop.clone()).unwrap_err();
    assert_eq!(early, "Block replication is not running");
    let wrong =
        secondary.qmp.command("xen-set-replication", json!({"enable": true, "primary": true})).unwrap_err();
    assert_eq!(wrong, "The parameter mode's value is invalid, needs 1, but got 0");
    secondary.replicate(false);
    let twice =
        secondary.qmp.command("xen-set-replication", json!({"enable": true, "primary": false})).unwrap_err();
    assert_eq!(twice, "Block replication is running or done");
    assert!(secondary.writes("s", 5, "1M 64k") && secondary.writes("top", 6, "2M 64k"));
    secondary.qmp.command("xen-set-replication", stop).unwrap();
    assert!(
        secondary.sees("top", 5, "1M 64k") && secondary.sees("top", 0, "2M 64k"),
        "own writes are dropped"
    );
    secondary.replicate(false);
}

#[test]
fn a_lost_heartbeat_is_a_failover() {
    let (_primary, mut secondary) = pair(false, false);
    assert!(secondary.writes("top", 6, "2M 64k"));
    secondary.qmp.command("x-colo-lost-heartbeat", json!({})).unwrap();
    assert_eq!(secondary.qmp.event("COLO_EXIT"), json!({"mode": "secondary", "reason": "request"}));
    secondary.merged();
    assert!(secondary.sees("top", 6, "2M 64k"));
    assert_eq!(secondary.qmp.command("query-colo-status", json!({})).unwrap()["last-mode"], "secondary");
}
