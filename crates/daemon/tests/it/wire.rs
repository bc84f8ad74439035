//! The control connection of the built daemon: recorded conversations, monitors, slow and vanishing clients, the end.

use crate::common::{Client, Daemon, Dir, program, run};
use serde_json::json;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Python with the modules that `cargo xtask setup` installs, or the system's, which may have them.
pub(crate) fn python() -> Command {
    let home = std::env::var("HOME").unwrap_or_default();
    let own = Path::new(&home).join(".cache/liveblk/python/bin/python");
    Command::new(if own.exists() { own } else { "python3".into() })
}

/// Runs a script of tests/compat. It ends what does not answer; should it hang itself, it is told to say where, and killed.
pub(crate) fn compare(script: &str, more: &[String]) {
    let compat = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/compat");
    let out = Command::new("timeout")
        .args(["--signal=ABRT", "--kill-after=10", HANGS])
        .arg(python().get_program())
        .args(["-X", "faulthandler"])
        .arg(compat.join(script))
        .args(["--daemon", env!("CARGO_BIN_EXE_liveblkd")])
        .args(more)
        .current_dir(compat.join("transcripts"))
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

/// Seconds, many times what the longest script takes, after which one hangs.
const HANGS: &str = "1200";

/// Replays transcripts of qemu-storage-daemon 10.0.2 (tests/compat/replay.py says what is compared).
fn replay(names: &[&str]) {
    let files: Vec<_> = names.iter().map(|n| format!("{n}.jsonl")).collect();
    compare("replay.py", &files);
}

/// Commands, right and wrong, sent to QSD and to us: the same answers (tests/compat/twin.py lists what may differ).
#[test]
fn the_same_answers_as_the_reference() {
    compare("twin.py", &[]);
}

/// Filters and drivers for tests beside QSD's: the same options, the same requests by the same clients, the same outcome
/// (the scenes in tests/compat/twins say what may differ).
#[test]
fn filters_do_what_the_reference_does() {
    let scenes = [
        "blkdebug",
        "blklogwrites",
        "blkverify",
        "copy-on-read",
        "qcow2-events",
        "quorum",
        "quorum-children",
        "reopen",
        "throttle",
        "throttle-reopen",
    ];
    compare("twins.py", &scenes.map(|s| format!("../twins/{s}.txt")));
}

/// Bitmaps beside jobs and exports; exports that end softly, hard and with clients; the NBD server.
#[test]
fn bitmaps_and_exports_as_the_reference() {
    compare("twins.py", &["bitmaps", "exports"].map(|s| format!("../twins/{s}.txt")));
}

/// Inactive nodes: what they are, who may use them, what another process does to their images in between.
#[test]
fn inactive_nodes_as_the_reference() {
    compare("twins.py", &["../twins/active.txt".to_owned()]);
}

/// Every option of `blockdev-create`, right and wrong: what the job says, and what the image is.
#[test]
fn images_are_created_as_the_reference_creates_them() {
    compare("twins.py", &["../twins/create.txt".to_owned()]);
}

/// Two processes and one image: every pair of ways to use it, each held by QSD or by us and opened by either: the same answers and
/// the same locks on the host (tests/compat/locks.py).
#[test]
fn images_are_locked_as_the_reference_locks_them() {
    compare("locks.py", &[]);
}

/// Every verb in every state of every kind of job; every member of a transaction beside one that fails; groups of jobs.
#[test]
fn jobs_and_transactions_as_the_reference() {
    compare("twins.py", &["job-verbs", "transactions", "commit-writer"].map(|s| format!("../twins/{s}.txt")));
}

/// Scenes that are in no recorded conversation: names, types and numbers at the edges, odd orders, nodes that are busy, bitmaps in
/// every state, transactions that fail at each place, objects, chardevs, and lines that are no commands.
#[test]
fn scenes_that_nobody_recorded() {
    compare("twins.py", &["nodes", "jobs", "bitmaps", "rest"].map(|s| format!("../twins/hunt-{s}.txt")));
    compare("twins.py", &["../twins/wandered.txt".to_owned()]);
}

/// Lines that are almost commands: what the parser and the checks of arguments say, byte by byte. The seeds repeat.
#[test]
fn random_lines() {
    compare(
        "wander.py",
        &["--kind", "wire", "--seed", "5000", "--rounds", "20", "--no-shrink"].map(str::to_owned),
    );
}

/// Random command lines: exit status and message (tests/compat/cmdline.py lists what may differ).
#[test]
fn random_command_lines() {
    compare("cmdline.py", &["--seed", "1", "--rounds", "150"].map(str::to_owned));
}

/// Every command of QSD's schema with every member odd: the same answers (tests/compat/odd.py lists what may differ).
#[test]
fn every_argument_odd() {
    compare("odd.py", &[]);
}

/// What was recorded of replication: with QSD, and with `qemu-system`, whose commands we have.
#[test]
fn recorded_replication() {
    replay(&["replication-qsd"]);
    let files = ["system-replication", "system-replication-stop", "system-replication-errors"];
    compare("system.py", &files.map(|f| format!("{f}.jsonl")));
}

/// Every row of the catalogue of QSD's errors is provoked, or has a reason why not (tests/compat/catalogue.py).
#[test]
fn every_error_of_the_catalogue() {
    compare("catalogue.py", &[]);
}

/// What kills QSD gets a clean answer (tests/compat/crashers.py).
#[test]
fn what_crashes_the_reference() {
    compare("crashers.py", &[]);
}

/// The introspection answer has all that QSD's has, but for what is listed as missing (tests/compat/schema.py).
#[test]
fn the_schema_has_what_the_references_has() {
    compare("schema.py", &[]);
}

#[test]
fn recorded_protocol() {
    replay(&["proto-negotiation", "proto-oob", "query-misc"]);
}

#[test]
fn recorded_nodes_and_exports() {
    replay(&[
        "blockdev-add-del",
        "blockdev-create",
        "del-ownership",
        "export-other-types",
        "image-corrupted-event",
        "nbd-connection-limits",
        "pidfile-and-cmdline",
        "resize-threshold-active",
    ]);
}

#[test]
fn recorded_bitmaps() {
    replay(&["bitmap-basic", "bitmap-persistent", "export-bitmap", "mirror-bitmaps", "resize-and-bitmaps"]);
}

#[test]
fn recorded_mirrors() {
    replay(&[
        "mirror-success",
        "mirror-sync-modes",
        "mirror-complete-replaces-users",
        "mirror-export-added-later",
        "mirror-to-nbd",
        "null-co-mirror-many",
        "defaults-granularity",
    ]);
}

#[test]
fn recorded_errors() {
    replay(&["mirror-error-source", "mirror-error-flush-and-ready", "export-error-events", "quorum-events"]);
}

#[test]
fn recorded_copy_modes() {
    replay(&["mirror-copy-mode-switch", "mirror-write-blocking"]);
}

#[test]
fn recorded_ends_of_mirrors() {
    replay(&["mirror-cancel-before-ready", "mirror-cancel-while-pending", "mirror-throttled-cancel"]);
}

#[test]
fn recorded_commits() {
    replay(&[
        "commit-intermediate",
        "commit-intermediate-backing-file",
        "commit-cancel-pause-speed",
        "commit-active",
        "commit-readonly-base",
        "commit-errors",
        "pending-and-guest-io",
    ]);
}

#[test]
fn recorded_streams() {
    replay(&[
        "stream-full",
        "stream-base-bottom",
        "stream-cancel-pause",
        "concluded-job-holds-nodes",
        "block-job-cancel-plain",
        "change-backing-file-cmd",
    ]);
}

#[test]
fn recorded_backups() {
    replay(&[
        "backup-cancel-conflicts",
        "backup-error-io",
        "backup-export-added-later",
        "backup-full",
        "backup-incremental",
        "backup-point-in-time",
        "backup-sync-top-none",
        "transaction-grouped-backups",
    ]);
}

#[test]
fn recorded_snapshots_and_transactions() {
    replay(&[
        "snapshot-internal",
        "snapshot-commit-chain",
        "snapshot-sync-and-drive-cmds",
        "transaction-rollback",
        "amend-and-misc",
    ]);
}

#[test]
fn qemus_own_client_library() {
    let dir = Dir::new();
    let daemon = Daemon::start(&dir, &["--object", "iothread,id=i0"]);
    let script = r#"
import asyncio, sys
from qemu.qmp import QMPClient, ExecuteError
async def main():
    qmp = QMPClient('test')
    await qmp.connect(sys.argv[1])
    assert qmp.greeting.QMP.version['qemu'] == {'major': 10, 'minor': 0, 'micro': 2}
    names = [c['name'] for c in await qmp.execute('query-commands')]
    assert 'quit' in names and 'human-monitor-command' not in names, names
    schema = await qmp.execute('query-qmp-schema')
    assert sorted(e['name'] for e in schema if e['meta-type'] == 'command') == sorted(names)
    assert await qmp.execute('qom-list', {'path': '/objects'}) == [
        {'name': 'type', 'type': 'string'}, {'name': 'i0', 'type': 'child<iothread>'}]
    try:
        await qmp.execute('object-del', {'id': 'nope'})
        raise AssertionError('no error')
    except ExecuteError as e:
        assert e.error_class == 'GenericError' and str(e) == "object 'nope' not found", e
    await qmp.execute('quit')
    try:
        await qmp.disconnect()
    except EOFError:
        pass  # the library says so when the daemon ends first, as it shall
asyncio.run(main())
"#;
    let connect = Client::connect(&daemon.socket);
    drop(connect);
    let out = python().args(["-c", script]).arg(&daemon.socket).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let mut daemon = daemon;
    assert!(daemon.wait().success());
}

#[test]
fn clients_come_one_after_another_and_negotiate_anew() {
    let dir = Dir::new();
    let daemon = Daemon::start(&dir, &[]);
    let mut first = daemon.client();
    let waiting = std::os::unix::net::UnixStream::connect(&daemon.socket).unwrap();
    assert!(first.command("query-version", json!({})).is_ok());
    drop(first);
    // the one that waited is served now: it hears the greeting, then nothing else before it negotiates
    drop(waiting);
    let mut second = Client::connect(&daemon.socket);
    assert_eq!(second.greeting["QMP"]["capabilities"], json!(["oob"]));
    assert!(second.command("query-version", json!({})).unwrap_err().starts_with("Expecting capabilities"));
}

#[test]
fn replies_keep_the_order_of_commands_in_one_write() {
    let dir = Dir::new();
    let daemon = Daemon::start(&dir, &[]);
    let mut c = daemon.client();
    let all: String = (0..500).map(|i| format!("{{'execute':'query-version','id':{i}}}")).collect();
    c.send(all.as_bytes());
    for i in 0..500 {
        assert_eq!(c.reply()["id"], json!(i));
    }
}

/// A client that sends and never reads is stopped by its own unread replies; others are served.
#[test]
fn a_client_that_does_not_read_harms_nobody() {
    let dir = Dir::new();
    let chardev = format!("socket,id=c1,path={},server=on,wait=off", dir.path("other.sock"));
    let daemon = Daemon::start(&dir, &["--chardev", &chardev, "--monitor", "c1"]);
    let mut deaf = daemon.client();
    deaf.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let ask = "{'execute':'query-qmp-schema'}".repeat(1000);
    let stopped = (0..200).any(|_| std::io::Write::write_all(&mut deaf.stream, ask.as_bytes()).is_err());
    assert!(stopped, "200,000 unread schemas were accepted");
    let mut other = Client::connect(&dir.0.join("other.sock"));
    other.command("qmp_capabilities", json!({})).unwrap();
    assert!(other.command("query-version", json!({})).is_ok());
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
    let peak = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    let kib: u64 = peak.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 200 << 10, "{peak}");
}

#[test]
fn a_signal_ends_it_like_quit() {
    for signal in ["TERM", "INT", "HUP"] {
        let dir = Dir::new();
        let mut daemon = Daemon::start(&dir, &["--pidfile", &dir.path("pid")]);
        let mut c = daemon.client();
        let begin = std::time::Instant::now();
        while std::fs::read_to_string(dir.path("pid")).ok() != Some(format!("{}\n", daemon.child.id())) {
            assert!(begin.elapsed() < Duration::from_secs(10));
        }
        daemon.signal(signal);
        assert_eq!(c.read(), None, "{signal}");
        assert!(daemon.wait().success(), "{signal}");
        assert!(!Path::new(&dir.path("pid")).exists());
        assert!(!daemon.socket.exists());
    }
}

#[test]
fn quit_answers_before_the_connection_ends() {
    let dir = Dir::new();
    let mut daemon = Daemon::start(&dir, &[]);
    let mut c = daemon.client();
    c.send(b"{'execute':'quit','id':1}{'execute':'query-version'}");
    assert_eq!(c.read(), Some(json!({"return": {}, "id": 1})));
    assert_eq!(c.read(), None);
    assert!(daemon.wait().success());
    assert!(!daemon.socket.exists());
}

#[test]
fn into_the_background_and_out_again() {
    let dir = Dir::new();
    let (pid_file, socket) = (dir.path("pid"), dir.path("q.sock"));
    let out = run(
        &dir,
        &[
            "--chardev",
            "socket,id=c,path=q.sock,server=on,wait=off",
            "--monitor",
            "c",
            "--pidfile",
            "pid",
            "--daemonize",
        ],
    );
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    // the parent returned only once all was set up
    assert!(std::fs::read_to_string(&pid_file).unwrap().trim().parse::<u32>().is_ok());
    let mut c = Client::connect(Path::new(&socket));
    c.command("qmp_capabilities", json!({})).unwrap();
    c.command("quit", json!({})).unwrap();
    assert_eq!(c.read(), None);
    let begin = std::time::Instant::now();
    while Path::new(&pid_file).exists() || Path::new(&socket).exists() {
        assert!(begin.elapsed() < Duration::from_secs(10), "files are left behind");
    }
}

#[test]
fn on_standard_input_and_output() {
    let dir = Dir::new();
    let mut child = program()
        .args(["--chardev", "stdio,id=c", "--monitor", "c,pretty=on"])
        .current_dir(&dir.0)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let input = b"{'execute':'qmp_capabilities'}{'execute':'quit','id':[]}";
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), input).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success());
    let text = String::from_utf8(out.stdout).unwrap();
    let end = "{\n    \"return\": {\n    }\n}\r\n{\n    \"return\": {\n    },\n    \"id\": [\n    ]\n}\r\n";
    assert!(text.starts_with("{\n    \"QMP\": {\n        \"version\": {\n"), "{text}");
    assert!(text.ends_with(end), "{text}");
}
