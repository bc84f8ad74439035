//! `liveblk replicate` and `liveblk failover` as a new user would: two sides, one command each, a disk under load, the primary killed.

#![allow(clippy::unwrap_used)] // a test helper that fails fails the test

mod common;
#[path = "../../daemon/tests/it/etcd.rs"]
mod etcd;

use common::daemon;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const LEDGER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/replication/ledger.py");

/// `kill -9`, by the shell's own command: the program of that name is not on every machine. Whether there was such a process.
fn kill_now(pid: &str) -> bool {
    let shell = Command::new("sh").args(["-c", "kill -9 $0", pid]).stderr(Stdio::null()).status();
    shell.unwrap().success()
}

/// A directory, and the daemons that were started in it: they end with it.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let path = std::env::temp_dir().join(format!("liveblk-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        daemon();
        Dir(path)
    }

    fn liveblk(&self, line: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_liveblk"))
            .args(line.split(' '))
            .current_dir(&self.0)
            .output()
            .unwrap()
    }

    /// What it says; it must succeed.
    fn ok(&self, line: &str) -> String {
        let out = self.liveblk(line);
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{line}: {said}{}", String::from_utf8_lossy(&out.stderr));
        said
    }

    /// What it complains of; it must fail.
    fn refused(&self, line: &str) -> String {
        let out = self.liveblk(line);
        assert!(!out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stdout));
        String::from_utf8_lossy(&out.stderr).into_owned()
    }

    fn kill(&self, side: &str) {
        let pid = std::fs::read_to_string(self.0.join(format!("{side}.qmp.pid"))).unwrap();
        assert!(kill_now(pid.trim()));
        // gone when its sockets refuse
        until(|| std::os::unix::net::UnixStream::connect(self.0.join(format!("{side}.qmp"))).is_err());
    }

    /// The application: writes until the disk is gone, then says how many entries were acknowledged.
    fn ledger(&self, side: &str) -> (Child, BufReader<std::process::ChildStdout>) {
        let mut child = Command::new("python3")
            .args([LEDGER, "write", &format!("{side}.nbd")])
            .current_dir(&self.0)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        let mut begun = String::new();
        said.read_line(&mut begun).unwrap();
        assert!(begun.contains("going on"), "{begun}");
        (child, said)
    }

    /// The newest entry of a ledger that must be whole.
    fn whole(&self, side: &str) -> u64 {
        let out = Command::new("python3")
            .args([LEDGER, "check", &format!("{side}.nbd")])
            .current_dir(&self.0)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stderr));
        number_after(&said, "entry ")
    }

    /// The checkpoint of a side, by `liveblk status`.
    fn checkpoint(&self, side: &str) -> u64 {
        let said = self.ok(&format!("status --socket {side}.qmp"));
        if said.contains("checkpoint ") { number_after(&said, "checkpoint ") } else { 0 }
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(&self.0).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|e| e == "pid") {
                let pid = std::fs::read_to_string(entry.path()).unwrap_or_default();
                kill_now(pid.trim());
            }
        }
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn number_after(text: &str, word: &str) -> u64 {
    let rest = &text[text.find(word).unwrap_or_else(|| panic!("no {word:?} in {text}")) + word.len()..];
    rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

fn until(is: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < Duration::from_secs(30), "it does not come about");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A pair of sides `a` (primary) and `b` in a directory.
fn a_pair(name: &str) -> Dir {
    let dir = Dir::new(name);
    let said = dir.ok("replicate b.raw --size 64M --listen ./b.repl --socket b.qmp --serve ./b.nbd");
    assert!(said.contains("secondary, WAITING") && said.contains("nothing received yet"), "{said}");
    let said = dir.ok("replicate a.raw --size 64M --to ./b.repl --socket a.qmp --serve ./a.nbd --every 50ms");
    assert!(said.contains("primary, in sync") && said.contains("every 50 ms"), "{said}");
    dir
}

#[test]
fn the_primary_is_killed_under_load_and_the_ledger_is_whole_at_the_checkpoint() {
    let dir = a_pair("replicate");
    let before = dir.checkpoint("b");
    let (mut writer, mut said) = dir.ledger("a");
    // checkpoints come by the clock, while the application writes
    until(|| dir.checkpoint("b") >= before + 3);
    assert!(dir.refused("failover --socket b.qmp").contains("alive and connected"));
    dir.kill("a");
    writer.wait().unwrap();
    let mut last = String::new();
    said.read_line(&mut last).unwrap();
    let acknowledged = number_after(&last, "; ");
    until(|| dir.ok("status --socket b.qmp").contains("WAITING"));
    let at = dir.checkpoint("b");
    let said = dir.ok("failover --socket b.qmp");
    assert!(said.contains(&format!("serves checkpoint {at}")), "{said}");
    let kept = dir.whole("b");
    // one instant, not long before the end; never more than was written
    assert!(kept > 0 && kept <= acknowledged + 1, "{kept} of {acknowledged}");
    // again changes nothing
    assert!(dir.ok("failover --socket b.qmp").contains(&format!("serves checkpoint {at}")));
    assert_eq!(dir.whole("b"), kept);

    // the old primary comes back: it may not write over the new one, and follows it when told to
    let lines = "replicate a.raw --socket a.qmp --serve ./a.nbd";
    let why = dir.refused(&format!("{lines} --listen ./a.repl"));
    assert!(why.contains("--overwrite"), "{why}");
    dir.ok(&format!("{lines} --listen ./a.repl --overwrite"));
    let said = dir.ok("replicate b.raw --to ./a.repl --socket b.qmp --serve ./b.nbd --every 50ms");
    assert!(said.contains("primary, in sync"), "{said}");
    assert_eq!(dir.whole("a"), kept);
}

/// With an arbiter the other side takes over when the lease of the killed one is over, and a human need not know when that is.
#[test]
fn an_arbiter_is_asked_and_its_lease_waited_for() {
    let dir = Dir::new("arbiter");
    let server = etcd::Server::start(&dir.0, &format!("http://{}:2379", etcd::own_address()), &[]);
    server.asks_who("host", "it's me");
    std::fs::write(dir.0.join("password"), "it's me").unwrap();
    let arbiter =
        format!("--arbiter {} --arbiter-user host --arbiter-password-file password --group g", server.url);
    dir.ok(&format!("replicate b.raw --size 64M --listen ./b.repl --socket b.qmp --serve ./b.nbd {arbiter}"));
    let said = dir.ok(&format!(
        "replicate a.raw --size 64M --to ./b.repl --socket a.qmp --serve ./a.nbd --every 50ms {arbiter}"
    ));
    assert!(said.contains("primary, in sync"), "{said}");
    let (mut writer, _said) = dir.ledger("a");
    let before = dir.checkpoint("b");
    until(|| dir.checkpoint("b") >= before + 3);
    dir.kill("a");
    writer.wait().unwrap();
    until(|| dir.ok("status --socket b.qmp").contains("WAITING"));
    let said = dir.ok("failover g --socket b.qmp");
    assert!(said.contains("waiting for the lease of ") && said.contains("serves checkpoint"), "{said}");
    assert!(dir.whole("b") > 0);
}

/// X9: the sides change while an application writes. Everything acknowledged is on the other side; the former primary follows from
/// where it was, without a copy of the disk; and the same way back.
#[test]
fn sides_are_changed_under_load_without_loss_and_without_a_copy() {
    let dir = a_pair("switchover");
    let mut last = 0;
    for (from, to) in [("a", "b"), ("b", "a"), ("a", "b")] {
        let (mut writer, mut said) = dir.ledger(from);
        let before = dir.checkpoint(to);
        until(|| dir.checkpoint(to) > before + 1);
        let told = dir.ok(&format!("switchover --socket {from}.qmp --listen ./{from}.repl"));
        assert!(told.contains("nothing was lost"), "{told}");
        // the application is told: its write was not taken
        writer.wait().unwrap();
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        let acknowledged = number_after(&line, "; ");
        assert!(line.contains("failed") && acknowledged > last, "{line}");
        assert_eq!(dir.whole(to), acknowledged, "from {from} to {to}");
        last = acknowledged;
        until(|| dir.ok(&format!("status --socket {to}.qmp")).contains("primary, in sync"));
        // what was sent to the former primary is a small part of the 64 MiB
        let (mut writer, _said) = dir.ledger(to);
        let before = dir.checkpoint(from);
        until(|| dir.checkpoint(from) > before + 1);
        writer.kill().unwrap();
        writer.wait().unwrap();
        let mut c = qmpclient::Client::connect(&dir.0.join(format!("{to}.qmp"))).unwrap();
        let facts = c.execute("query-replication", &serde_json::json!({})).unwrap();
        let copied = facts[0]["peers"][0]["resync-bytes"].as_u64().unwrap();
        drop(c);
        assert!(copied <= 4 << 20, "{copied} bytes were copied");
        last = last.max(dir.whole(to));
    }
    // neither the new primary's daemon nor the former one's says anything else
    assert!(dir.refused("switchover --socket a.qmp --listen ./x.repl").contains("type this on the primary"));
    let why = dir.refused("switchover --socket b.qmp --listen ./x.repl --to ./nowhere");
    assert!(why.contains("has no peer"), "{why}");
    // refused before anything was given up: still the primary
    assert!(dir.ok("status --socket b.qmp").contains("primary, in sync"));
}

/// A running daemon whose disk is written to all the time: the pair is set up beneath the client.
#[test]
fn a_served_disk_becomes_a_primary_under_load() {
    let dir = Dir::new("replicate-live");
    for side in ["a", "b"] {
        std::fs::File::create(dir.0.join(format!("{side}.raw"))).unwrap().set_len(64 << 20).unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_liveblk")).with_file_name("liveblkd");
        let started = Command::new(program)
            .args([
                "--blockdev",
                &format!(
                    "driver=file,node-name=disk,filename={}",
                    dir.0.join(format!("{side}.raw")).display()
                ),
            ])
            .args([
                "--nbd-server",
                &format!("addr.type=unix,addr.path={}", dir.0.join(format!("{side}.nbd")).display()),
            ])
            .args(["--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"])
            .args([
                "--chardev",
                &format!("socket,id=c,path={}/{side}.qmp,server=on,wait=off", dir.0.display()),
            ])
            .args([
                "--monitor",
                "chardev=c",
                "--daemonize",
                "--pidfile",
                &format!("{}/{side}.qmp.pid", dir.0.display()),
            ])
            .current_dir(&dir.0)
            .status();
        assert!(started.unwrap().success());
    }
    let (mut writer, mut said) = dir.ledger("a");
    dir.ok("replicate disk --listen ./b.repl --socket b.qmp");
    dir.ok("replicate disk --to ./b.repl --socket a.qmp --every 0");
    // typed again: no harm
    assert!(dir.ok("replicate disk --to ./b.repl --socket a.qmp").contains("in sync"));
    let at = dir.checkpoint("b");
    let kept = dir.whole("b");
    dir.kill("a");
    writer.wait().unwrap();
    let mut last = String::new();
    said.read_line(&mut last).unwrap();
    assert!(number_after(&last, "; ") >= kept, "{last}");
    until(|| dir.ok("status --socket b.qmp").contains("WAITING"));
    assert!(dir.ok("failover --socket b.qmp").contains(&format!("serves checkpoint {at}")));
    assert_eq!(dir.whole("b"), kept);
}

#[test]
fn what_cannot_be_done_is_said() {
    let dir = a_pair("replicate-not");
    for (line, want) in [
        ("replicate disk --socket a.qmp", "--to <ADDR>"),
        ("replicate disk --socket a.qmp --to nowhere", "expected HOST:PORT"),
        ("replicate none --socket a.qmp --to ./x.repl --group other", "has no disk named none"),
        ("replicate none.raw --socket c.qmp --serve ./c.nbd --to ./x.repl", "there is no"),
        ("replicate disk --socket b.qmp --to ./x.repl", "this side is a secondary"),
        ("replicate disk --socket a.qmp --listen ./x.repl", "--overwrite"),
        ("replicate disk --socket a.qmp --to ./x.repl --arbiter etcd1", "--group NAME"),
        (
            "replicate disk --socket a.qmp --to ./x.repl --arbiter etcd1 --arbiter-user u --group other",
            "--arbiter-password-file",
        ),
        ("replicate disk --socket a.qmp --to ./x.repl --arbiter ftp://etcd1 --group other", "only http"),
        ("failover --socket a.qmp", "only a secondary takes over"),
        ("failover other --socket b.qmp", "no pair named other"),
    ] {
        let said = dir.refused(line);
        assert!(said.contains(want), "{line}: {said}");
    }
}
