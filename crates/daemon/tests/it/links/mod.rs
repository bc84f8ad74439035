//! Copies over a link whose peer vanishes, freezes, comes back, or comes back as something else: real peers killed with -9 and
//! restarted, and a proxy in between, under a client that knows what its disk must contain.

mod proxy;

use crate::common::{Client, Daemon, Dir};
use crate::disk::{tool, until};
use crate::mirrors::{DISK, Server, Writer, image, model, pause, serve};
use proxy::{Mood, Proxy};
use serde_json::{Value, json};

/// The export of qemu-nbd at `peer.sock`, over several connections at once.
const QEMU: &str = "qemu-nbd|-t|-e|8|-f|raw|--discard=unmap|--cache=writeback|-k|peer.sock|dst.raw";

fn at_socket() -> Value {
    json!({"driver": "nbd", "discard": "unmap", "server": {"type": "unix", "path": "peer.sock"}})
}

fn at_port(port: u16) -> Value {
    let server = json!({"type": "inet", "host": "127.0.0.1", "port": port.to_string()});
    json!({"driver": "nbd", "discard": "unmap", "server": server})
}

/// Model, source and an empty target.
fn disks(dir: &Dir) {
    model(dir);
    tool(dir, "cp|model.raw|src.raw");
    tool(dir, "truncate|-s|8M|dst.raw");
}

fn peer(dir: &Dir, line: &str) -> Server {
    let _from_the_last = std::fs::remove_file(dir.path("peer.sock"));
    Server::start(dir, &line.replace("peer.sock", &dir.path("peer.sock")), "peer.sock")
}

fn mirror(c: &mut Client, more: &Value) -> Result<Value, String> {
    let mut a = json!({"job-id": "m", "device": "src", "target": "dst", "sync": "full",
        "on-link-loss": {"wait": 60, "no-progress": 2}});
    for (k, v) in more.as_object().unwrap() {
        a[k] = v.clone();
    }
    c.command("blockdev-mirror", a)
}

fn job(c: &mut Client) -> Value {
    c.command("query-block-jobs", json!({})).unwrap()[0].clone()
}

/// The job goes on until it is ready, is completed, and the target has what the client wrote until then.
fn ends_equal(dir: &Dir, mut daemon: Daemon, c: &mut Client, writer: Writer, peer: Server) {
    pause(100);
    writer.stop();
    c.command("job-complete", json!({"id": "m"})).unwrap();
    until(c, "m", "null");
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
    drop(peer);
    tool(dir, "qemu-img|compare|-f|raw|-F|raw|model.raw|dst.raw");
}

/// Waits for the event and gives its data; other events before it are kept for [`until`].
fn told(c: &mut Client, name: &str) -> Value {
    loop {
        if let Some(at) = c.events.iter().position(|e| e["event"] == name) {
            return c.events.remove(at)["data"].clone();
        }
        let m = c.read().expect("an event");
        assert!(m.get("event").is_some(), "{m}");
        c.events.push(m);
    }
}

/// The peer is killed while the job copies and again when it is ready, and restarted each time.
fn killed(mode: &str, line: &str) {
    let dir = Dir::new();
    disks(&dir);
    let first = peer(&dir, line);
    let (daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &at_socket());
    let writer = Writer::start(&dir, DISK, &["4", "300"]);
    mirror(&mut c, &json!({"copy-mode": mode, "speed": 4 << 20})).unwrap();
    pause(300);
    drop(first);
    let lost = told(&mut c, "BLOCK_JOB_LINK_LOST");
    assert_eq!((&lost["side"], &lost["wait"], &lost["then"]), (&json!("target"), &json!(60), &json!("stop")));
    let j = job(&mut c);
    assert_eq!((&j["status"], &j["link-loss"]["waiting"]), (&json!("running"), &json!(true)), "{j}");
    assert!(j["link-loss"]["gives-up-ms"].as_u64().unwrap() <= 60_000, "{j}");
    pause(200); // the client goes on
    let second = peer(&dir, line);
    let back = told(&mut c, "BLOCK_JOB_LINK_RESTORED");
    assert_eq!(back["side"], "target");
    assert_eq!(job(&mut c).get("link-loss"), None);
    c.command("block-job-set-speed", json!({"device": "m", "speed": 0})).unwrap();
    until(&mut c, "m", "BLOCK_JOB_READY");
    drop(second);
    told(&mut c, "BLOCK_JOB_LINK_LOST");
    assert_eq!(job(&mut c)["actively-synced"], false);
    // completion is an order: it is carried out when the peer is back, and nobody is held until then
    c.command("job-complete", json!({"id": "m"})).unwrap();
    pause(100);
    let third = peer(&dir, line);
    told(&mut c, "BLOCK_JOB_LINK_RESTORED");
    pause(100);
    writer.stop();
    until(&mut c, "m", "null");
    let mut daemon = daemon;
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
    drop(third);
    tool(&dir, "qemu-img|compare|-f|raw|-F|raw|model.raw|dst.raw");
}

#[test]
fn qemu_nbd_is_killed_in_the_background() {
    killed("background", QEMU);
}

#[test]
fn qemu_nbd_is_killed_while_writes_are_synchronous() {
    killed("write-blocking", QEMU);
}

#[test]
fn nbdkit_is_killed() {
    killed("write-blocking", "nbdkit|-f|-U|peer.sock|file|dst.raw");
}

#[test]
fn liveblkd_is_killed() {
    let line = format!(
        "{}|--blockdev|driver=file,node-name=d,filename=dst.raw,discard=unmap|--nbd-server|addr.type=unix,addr.path=peer.sock|--export|nbd,id=e,node-name=d,name=,writable=on",
        env!("CARGO_BIN_EXE_liveblkd")
    );
    killed("read-write-blocking", &line);
}

/// Dropped connections, swallowed bytes and slowness, one after the other, in every mode.
#[test]
fn the_link_is_bad() {
    for mode in ["background", "write-blocking"] {
        let dir = Dir::new();
        disks(&dir);
        let server = peer(&dir, QEMU);
        let proxy = Proxy::start(&dir.0.join("peer.sock"));
        let (daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &at_port(proxy.port));
        let writer = Writer::start(&dir, DISK, &["4", "300"]);
        mirror(&mut c, &json!({"copy-mode": mode, "speed": 4 << 20})).unwrap();
        for mood in [Mood::Drop, Mood::Freeze] {
            pause(200);
            proxy.set(mood);
            told(&mut c, "BLOCK_JOB_LINK_LOST");
            pause(200);
            proxy.set(Mood::Pass);
            told(&mut c, "BLOCK_JOB_LINK_RESTORED");
        }
        proxy.set(Mood::Delay);
        pause(300);
        proxy.set(Mood::Pass);
        c.command("block-job-set-speed", json!({"device": "m", "speed": 0})).unwrap();
        until(&mut c, "m", "BLOCK_JOB_READY");
        proxy.set(Mood::Drop);
        told(&mut c, "BLOCK_JOB_LINK_LOST");
        proxy.set(Mood::Pass);
        told(&mut c, "BLOCK_JOB_LINK_RESTORED");
        assert_eq!(job(&mut c)["link-losses"], 3);
        ends_equal(&dir, daemon, &mut c, writer, server);
    }
}

/// The peer does not come back in time: the job stops, tells why, and goes on when told to; the client never waits.
#[test]
fn waiting_ends() {
    let dir = Dir::new();
    disks(&dir);
    let first = peer(&dir, QEMU);
    let (daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &at_socket());
    let writer = Writer::start(&dir, DISK, &["4", "300"]);
    mirror(&mut c, &json!({"copy-mode": "write-blocking", "on-link-loss": {"wait": 1}})).unwrap();
    until(&mut c, "m", "BLOCK_JOB_READY");
    drop(first);
    let failed = told(&mut c, "BLOCK_JOB_ERROR");
    assert_eq!(failed, json!({"device": "m", "operation": "write", "action": "stop"}));
    until(&mut c, "m", "standby");
    let j = job(&mut c);
    assert_eq!((&j["io-status"], &j["link-loss"]["waiting"]), (&json!("failed"), &json!(false)), "{j}");
    let why = j["link-loss"]["reason"].as_str().unwrap();
    assert!(
        why.starts_with("the target did not come back within 1 s: Connection to NBD server lost"),
        "{why}"
    );
    pause(100);
    let second = peer(&dir, QEMU);
    c.command("job-resume", json!({"id": "m"})).unwrap();
    until(&mut c, "m", "ready");
    ends_equal(&dir, daemon, &mut c, writer, second);
}

#[test]
fn waiting_ends_in_failure_if_asked_for() {
    let dir = Dir::new();
    disks(&dir);
    let first = peer(&dir, QEMU);
    let (_daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &at_socket());
    mirror(&mut c, &json!({"on-link-loss": {"wait": 0, "then": "report"}})).unwrap();
    until(&mut c, "m", "BLOCK_JOB_READY");
    drop(first);
    let error = told(&mut c, "BLOCK_JOB_COMPLETED")["error"].as_str().unwrap().to_owned();
    assert!(error.starts_with("the target did not come back within 0 s"), "{error}");
    until(&mut c, "m", "null");
}

/// What came back is no longer the disk that was copied to: it is not written.
fn another(line: &str, change: impl Fn(&Dir), want: &str) {
    let dir = Dir::new();
    disks(&dir);
    let first = peer(&dir, line);
    let (_daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &at_socket());
    mirror(&mut c, &json!({})).unwrap();
    until(&mut c, "m", "BLOCK_JOB_READY");
    drop(first);
    told(&mut c, "BLOCK_JOB_LINK_LOST");
    change(&dir);
    let _second = peer(&dir, line);
    assert_eq!(told(&mut c, "BLOCK_JOB_ERROR")["action"], "stop");
    until(&mut c, "m", "standby");
    let why = job(&mut c)["link-loss"]["reason"].as_str().unwrap().to_owned();
    assert!(why.contains(want), "{why}");
}

#[test]
fn a_peer_that_comes_back_smaller_is_refused() {
    another(
        QEMU,
        |dir| drop(tool(dir, "truncate|-s|4M|dst.raw")),
        "another export: 4194304 bytes instead of 8388608",
    );
}

#[test]
fn a_peer_that_comes_back_empty_is_refused() {
    another("nbdkit|-f|-U|peer.sock|memory|8M", |_| {}, "does not hold what was written and flushed");
}

#[test]
fn what_cannot_be_bridged_is_refused() {
    let dir = Dir::new();
    disks(&dir);
    tool(&dir, "qemu-img|create|-q|-f|qcow2|dst.raw|8M");
    let _server = peer(&dir, QEMU);
    let dst = json!({"driver": "qcow2", "file": at_socket()});
    let (_daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &dst);
    let refused = mirror(&mut c, &json!({})).unwrap_err();
    assert!(refused.starts_with("'on-link-loss' is not possible with format 'qcow2'"), "{refused}");
    let refused = mirror(&mut c, &json!({"on-link-loss": {"wait": -1}})).unwrap_err();
    assert!(refused.starts_with("Parameter 'wait' expects"), "{refused}");
    mirror(&mut c, &json!({"on-link-loss": Value::Null})).unwrap_err();
}

/// Cut at nine tenths of a disk that is much larger than what may be in doubt.
#[test]
fn little_is_copied_again() {
    let dir = Dir::new();
    let mib = 1 << 20_u64;
    let len = 512 * mib;
    let piece: Vec<u8> = (0..mib).map(|i| (i / 512 % 251 + i % 7) as u8).collect();
    std::fs::write(dir.path("src.raw"), piece.repeat(512)).unwrap();
    tool(&dir, "truncate|-s|512M|dst.raw");
    let first = peer(&dir, QEMU);
    let (mut daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &at_socket());
    mirror(&mut c, &json!({"speed": 400 * mib})).unwrap();
    while job(&mut c)["offset"].as_u64().unwrap() < len / 10 * 9 {
        pause(5);
    }
    drop(first);
    told(&mut c, "BLOCK_JOB_LINK_LOST");
    let second = peer(&dir, QEMU);
    let back = told(&mut c, "BLOCK_JOB_LINK_RESTORED");
    until(&mut c, "m", "BLOCK_JOB_READY");
    let copied = job(&mut c)["offset"].as_u64().unwrap();
    // two flushes' worth and a window
    assert!(copied <= len + 144 * mib, "{copied} bytes for {len}; {back}");
    c.command("job-complete", json!({"id": "m"})).unwrap();
    until(&mut c, "m", "null");
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
    drop(second);
    tool(&dir, "cmp|src.raw|dst.raw");
}

/// By hand: a bitmap knows what is left of a mirror whose peer was killed, and the next mirror copies that.
#[test]
fn the_rest_is_copied_by_hand() {
    let dir = Dir::new();
    disks(&dir);
    std::fs::write(dir.path("src.raw"), vec![7; 8 << 20]).unwrap();
    std::fs::write(dir.path("model.raw"), vec![7; 8 << 20]).unwrap();
    let first = peer(&dir, QEMU);
    let (daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &at_socket());
    let rest = json!({"node": "src", "name": "rest", "granularity": 65536, "all-dirty": true});
    c.command("block-dirty-bitmap-add", rest).unwrap();
    let start = |c: &mut Client, sync: &str, speed: u64, wait: u64| {
        let a = json!({"job-id": "m", "device": "src", "target": "dst", "sync": sync, "bitmap": "rest", "bitmap-mode": "always",
            "speed": speed, "on-link-loss": {"wait": wait, "then": "report"}});
        c.command("blockdev-mirror", a).unwrap();
    };
    start(&mut c, "full", 2 << 20, 0);
    while job(&mut c)["offset"].as_u64().unwrap() < 4 << 20 {
        pause(20);
    }
    drop(first);
    assert!(told(&mut c, "BLOCK_JOB_COMPLETED").get("error").is_some());
    until(&mut c, "m", "null");
    let left = |c: &mut Client| {
        let nodes = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
        let src = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "src").unwrap().clone();
        src["dirty-bitmaps"][0]["count"].as_u64().unwrap()
    };
    // nothing was flushed of a disk as small as this: all of it is in doubt
    assert_eq!(left(&mut c), 8 << 20);
    let second = peer(&dir, QEMU);
    start(&mut c, "bitmap", 0, 60);
    until(&mut c, "m", "BLOCK_JOB_READY");
    // ready: flushed; a hard cancel leaves what came since
    tool(&dir, &format!("qemu-io|-f|raw|-c|write -P 9 1M 64k|{DISK}"));
    tool(&dir, "qemu-io|-f|raw|-c|write -P 9 1M 64k|model.raw");
    drop(second);
    tool(&dir, &format!("qemu-io|-f|raw|-c|write -P 8 2M 64k|{DISK}"));
    tool(&dir, "qemu-io|-f|raw|-c|write -P 8 2M 64k|model.raw");
    c.command("block-job-cancel", json!({"device": "m", "force": true})).unwrap();
    until(&mut c, "m", "null");
    let rest = left(&mut c);
    assert!((65536..=262_144).contains(&rest), "{rest}: what came since it was ready");
    let third = peer(&dir, QEMU);
    start(&mut c, "bitmap", 0, 60);
    until(&mut c, "m", "BLOCK_JOB_READY");
    assert!(job(&mut c)["offset"].as_u64().unwrap() <= rest, "only the rest");
    let mut daemon = daemon;
    c.command("job-complete", json!({"id": "m"})).unwrap();
    until(&mut c, "m", "null");
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
    drop(third);
    tool(&dir, "qemu-img|compare|-f|raw|-F|raw|model.raw|dst.raw");
}
