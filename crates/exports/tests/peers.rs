//! The server against the clients of others: libnbd's tools, QEMU's, fio.

#![allow(clippy::unwrap_used)]

mod support;

use env::Address;
use exports::ServerOptions;
use std::process::{Command, Stdio};
use support::{Dir, Server, options};

const SIZE: usize = 8 << 20;

fn serve(dir: &Dir) -> (Server, Vec<u8>) {
    let content = dir.image("disk", SIZE, 42);
    let o = ServerOptions::at(Address::Unix(dir.path("s")));
    (Server::start(&dir.path("disk"), o, options("e", "d")), content)
}

/// A program that has a minute. The system's directories come first: nbdsh needs the Python that has libnbd.
fn command(program: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut c = Command::new("timeout");
    c.env("PATH", format!("/usr/bin:/bin:{path}")).args(["60", program]);
    c
}

/// Output of a program that must succeed within a minute.
fn run(program: &str, args: &[&str]) -> String {
    let out = command(program).args(args).stdin(Stdio::null()).output().unwrap();
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(
        out.status.success(),
        "{program} {args:?}: {}\n{}{}",
        out.status,
        text(&out.stdout),
        text(&out.stderr)
    );
    text(&out.stdout)
}

fn uri(dir: &Dir) -> String {
    format!("nbd+unix:///d?socket={}", dir.text("s"))
}

#[test]
fn nbdinfo_sees_what_qsd_shows() {
    let dir = Dir::new();
    let (_s, _) = serve(&dir);
    let info = run("nbdinfo", &["--json", &uri(&dir)]);
    for (key, value) in [
        ("export-size", "8388608"),
        ("is_read_only", "false"),
        ("can_cache", "true"),
        ("can_df", "true"),
        ("can_fast_zero", "true"),
        ("can_flush", "true"),
        ("can_fua", "true"),
        ("can_multi_conn", "true"),
        ("can_trim", "true"),
        ("can_zero", "true"),
        ("block_size_minimum", "1"),
        ("block_size_preferred", "4096"),
        ("block_size_maximum", "33554432"),
    ] {
        assert!(info.contains(&format!("\"{key}\": {value}")), "{key} is not {value} in {info}");
    }
    assert!(info.contains("base:allocation"));
    assert!(run("nbdinfo", &["--list", &uri(&dir)]).contains("export=\"d\""));
}

#[test]
fn nbdcopy_copies_out_and_in() {
    let dir = Dir::new();
    let (s, content) = serve(&dir);
    run("nbdcopy", &[&uri(&dir), &dir.text("out")]);
    assert!(std::fs::read(dir.path("out")).unwrap() == content);
    let other = dir.image("in", SIZE, 77);
    run("nbdcopy", &["--flush", &dir.text("in"), &uri(&dir)]);
    drop(s);
    assert!(std::fs::read(dir.path("disk")).unwrap() == other);
}

#[test]
fn qemu_img_and_qemu_io_work_unchanged() {
    let dir = Dir::new();
    let (_s, _) = serve(&dir);
    run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 7 64k 128k",
            "-c",
            "write -z -u 1M 1M",
            "-c",
            "discard 3M 64k",
            &uri(&dir),
        ],
    );
    run(
        "qemu-io",
        &["-f", "raw", "-c", "read -P 7 64k 128k", "-c", "read -P 0 1M 1M", "-c", "flush", &uri(&dir)],
    );
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri(&dir), &dir.text("disk")]);
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &uri(&dir)]);
    assert!(map.contains("\"start\": 1048576, \"length\": 1048576, \"depth\": 0, \"present\": true, \"zero\": true, \"data\": false"), "{map}");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri(&dir), &dir.text("q.qcow2")]);
    run("qemu-img", &["compare", &dir.text("q.qcow2"), &dir.text("disk")]);
}

#[test]
fn fio_verifies() {
    let dir = Dir::new();
    let (_s, _) = serve(&dir);
    let target = format!("--uri={}", uri(&dir));
    run(
        "fio",
        &[
            "--name=v",
            "--ioengine=nbd",
            &target,
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=32",
            "--size=8M",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
            "--randrepeat=1",
        ],
    );
}

/// Random requests of every kind, up to 64 in flight and never two overlapping, against a byte array.
const ORACLE: &str = r#"
import os, random
seed = int(os.environ["SEED"])
r = random.Random(seed)
SIZE = h.get_size()
disk = bytearray(open(os.environ["IMAGE"], "rb").read())
busy = []   # (start, end, finish, cookie)
def reap(everything=False):
    while busy and (everything or len(busy) >= 64):
        h.poll(-1)
        for b in list(busy):
            if h.aio_command_completed(b[3]):
                busy.remove(b)
                b[2]()
for i in range(6000):
    n = r.choice([1, 512, 4096, 5000, 65536, 200000])
    a = r.randrange(0, SIZE - n)
    if any(s < a + n and a < e for s, e, _, _ in busy):
        continue
    k = r.randrange(10)
    nothing = lambda: None
    if k < 4:
        buf = nbd.Buffer(n)
        def check(a=a, n=n, buf=buf):
            assert buf.to_bytearray() == disk[a:a+n], "seed %d: read %d+%d differs" % (seed, a, n)
        busy.append((a, a + n, check, h.aio_pread(buf, a)))
    elif k < 8:
        data = r.randbytes(n) if r.randrange(8) else bytes(n)
        disk[a:a+n] = data
        busy.append((a, a + n, nothing, h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), a, flags=r.choice([0, 0, nbd.CMD_FLAG_FUA]))))
    elif k == 8:
        disk[a:a+n] = bytes(n)
        busy.append((a, a + n, nothing, h.aio_zero(n, a, flags=r.choice([0, nbd.CMD_FLAG_NO_HOLE]))))
    else:
        busy.append((0, 0, nothing, h.aio_flush()))
    reap()
reap(True)
assert h.pread(SIZE // 2, 0) + h.pread(SIZE - SIZE // 2, SIZE // 2) == disk
"#;

#[test]
fn random_requests_64_deep_match_a_byte_array() {
    let seed = std::env::var("LIVEBLK_SEED").unwrap_or_else(|_| "20261121".into());
    println!("LIVEBLK_SEED={seed}");
    for mode in ["h.set_request_structured_replies(False)", "pass"] {
        let dir = Dir::new();
        let (_s, _) = serve(&dir);
        let out = command("nbdsh")
            .args(["-c", mode, "-c", &format!("h.connect_uri({:?})", uri(&dir)), "-c"])
            .arg(ORACLE)
            .env("SEED", &seed)
            .env("IMAGE", dir.path("disk"))
            .output()
            .unwrap();
        assert!(out.status.success(), "seed {seed}: {}", String::from_utf8_lossy(&out.stderr));
    }
}

#[test]
fn errors_have_their_numbers() {
    let dir = Dir::new();
    let (s, _) = serve(&dir);
    let script = r#"
import errno
def fails(want, f, *a, **k):
    try:
        f(*a, **k)
    except nbd.Error as e:
        assert e.errnum == want, (want, e)
    else:
        raise Exception("did not fail")
h.set_strict_mode(0)
SIZE = h.get_size()
fails(errno.EINVAL, h.pread, 512, SIZE)
fails(errno.EINVAL, h.pread, 512, SIZE - 511)
fails(errno.ENOSPC, h.pwrite, b"x" * 512, SIZE - 511)
fails(errno.ENOSPC, h.zero, 512, SIZE)
fails(errno.EINVAL, h.trim, 512, SIZE)
fails(errno.EINVAL, h.cache, 512, SIZE)
fails(errno.EINVAL, h.pwrite, b"x", 0, flags=nbd.CMD_FLAG_NO_HOLE)
h.pwrite(b"hello", 3)
assert h.pread(5, 3) == b"hello"
"#;
    let at = format!("h.connect_uri({:?})", uri(&dir));
    run("nbdsh", &["-c", &at, "-c", script]);
    for (errno, name) in [(5, "EIO"), (28, "ENOSPC"), (122, "ENOSPC"), (1, "EPERM"), (110, "EIO")] {
        s.call(move |s| async move { s.node.fail.set(errno) });
        let script = format!(
            "import errno\ntry:\n  h.pread(512, 0)\n  raise Exception('no error')\nexcept nbd.Error as e:\n  assert e.errnum == errno.{name}, e"
        );
        run("nbdsh", &["-c", &at, "-c", &script]);
    }
}

#[test]
fn tcp_works_too() {
    let dir = Dir::new();
    let content = dir.image("disk", SIZE, 42);
    let o = ServerOptions::at(Address::tcp("127.0.0.1", 0));
    let s = Server::start(&dir.path("disk"), o, options("e", "d"));
    let Some(Address::Tcp { port, .. }) = s.call(|s| async move { s.registry.server_address() }) else {
        panic!("no address");
    };
    run("nbdcopy", &[&format!("nbd://127.0.0.1:{port}/d"), &dir.text("out")]);
    assert!(std::fs::read(dir.path("out")).unwrap() == content);
}
