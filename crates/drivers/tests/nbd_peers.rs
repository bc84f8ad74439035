//! The `nbd` driver against the servers of others: qemu-nbd, qemu-storage-daemon, nbdkit.

#![allow(clippy::unwrap_used)]

mod storm;

use block::{BlockError, Data, ErrorKind, Kind, ReqFlags, Span};
use drivers::nbd_client::{NbdClient, NbdOptions};
use env::{Address, Env};
use graph::{HostBytes, Node};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use storm::{Random, seed, storm};

const SIZE: usize = 8 << 20;

struct Dir(PathBuf);
impl Dir {
    fn new() -> Dir {
        static N: AtomicU32 = AtomicU32::new(0);
        let name = format!("liveblk-nbdc-{}-{}", std::process::id(), N.fetch_add(1, Ordering::Relaxed));
        let d = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&d).unwrap();
        Dir(d)
    }
    fn text(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
    fn address(&self) -> Address {
        Address::Unix(self.0.join("s"))
    }
    fn image(&self, seed: u64) -> Vec<u8> {
        self.image_named("disk", seed)
    }
    fn image_named(&self, name: &str, seed: u64) -> Vec<u8> {
        let mut r = Random(seed | 1);
        let v: Vec<u8> = (0..SIZE / 8).flat_map(|_| r.next().to_le_bytes()).collect();
        std::fs::write(self.0.join(name), &v).unwrap();
        v
    }
    fn disk(&self) -> Vec<u8> {
        std::fs::read(self.0.join("disk")).unwrap()
    }
}
impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A server process that ends with its holder.
struct Peer(Child);
impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn peer(dir: &Dir, program: &str, args: &[String]) -> Peer {
    let mut c = Command::new(program);
    let child = c.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let child = child.unwrap_or_else(|e| panic!("{program}: {e}"));
    let end = Instant::now() + Duration::from_secs(10);
    while std::os::unix::net::UnixStream::connect(dir.0.join("s")).is_err() {
        assert!(Instant::now() < end, "{program} {args:?} does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    Peer(child)
}

fn args(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

fn qemu_nbd(dir: &Dir, more: &[&str]) -> Peer {
    let (socket, disk) = (dir.text("s"), dir.text("disk"));
    let first = ["-t", "-e", "16", "-f", "raw", "-x", "d", "-k", &socket];
    peer(dir, "qemu-nbd", &args(&[&first[..], more, &[&disk]].concat()))
}

fn qsd(dir: &Dir) -> Peer {
    let list = [
        "--blockdev",
        &format!("driver=file,node-name=d,discard=unmap,filename={}", dir.text("disk")),
        "--nbd-server",
        &format!("addr.type=unix,addr.path={}", dir.text("s")),
        "--export",
        "type=nbd,id=e,node-name=d,name=d,writable=on",
    ];
    peer(dir, "qemu-storage-daemon", &args(&list))
}

fn nbdkit(dir: &Dir, filters: &[&str], parameters: &[&str]) -> Peer {
    let (socket, disk) = (dir.text("s"), dir.text("disk"));
    let mut list = vec!["-f", "-U", &socket];
    filters.iter().for_each(|f| list.extend(["--filter", f]));
    list.extend(["file", &disk]);
    list.extend(parameters);
    peer(dir, "nbdkit", &args(&list))
}

fn with<T: 'static, F: Future<Output = T> + 'static>(f: impl FnOnce(Env) -> F) -> T {
    let e = env::os::start(env::os::OsConfig::default());
    let env = e.env();
    let limit = env.clone();
    let work = Box::pin(f(env));
    e.run(async move { limit.timeout(Duration::from_secs(60), work).await.expect("hangs") })
}

fn options(dir: &Dir) -> NbdOptions {
    NbdOptions::new(dir.address(), "d")
}

fn storm_against(start: impl FnOnce(&Dir) -> Peer, connections: u32) {
    let dir = Dir::new();
    let before = dir.image(3);
    let server = start(&dir);
    let mut o = options(&dir);
    o.connections = connections;
    let after = with(move |env| async move {
        let c = NbdClient::open(&env, o).await.unwrap();
        let after = storm(c.clone(), before, seed(), 3000).await;
        c.flush().await.unwrap();
        c.close().await.unwrap();
        after
    });
    drop(server);
    assert!(dir.disk() == after);
}

#[test]
fn random_requests_against_qemu_nbd() {
    storm_against(|d| qemu_nbd(d, &[]), 4);
}
#[test]
fn random_requests_against_qsd() {
    storm_against(qsd, 1);
}
#[test]
fn random_requests_against_nbdkit() {
    storm_against(|d| nbdkit(d, &[], &[]), 4);
}
#[test]
fn random_requests_against_a_server_with_nothing_but_reads_and_writes() {
    storm_against(|d| nbdkit(d, &["nozero"], &["zeromode=none"]), 2);
}
#[test]
fn random_requests_against_a_delaying_server() {
    storm_against(|d| nbdkit(d, &["delay"], &["rdelay=2ms", "wdelay=1ms"]), 4);
}

/// Writes whose bytes lie in a file of the host, among others, over several links.
fn writes_from_a_file_against(start: impl FnOnce(&Dir) -> Peer) {
    let dir = Dir::new();
    let mut want = dir.image(3);
    let source = dir.image_named("source", 4);
    let path = dir.0.join("source");
    let server = start(&dir);
    let mut o = options(&dir);
    o.connections = 2;
    let piece = (want.len() / 8) as u64;
    for i in [0, 2, 5, 7] {
        let at = (i * piece) as usize..((i + 1) * piece) as usize;
        want[at.clone()].copy_from_slice(&source[at]);
    }
    want[piece as usize..][..4096].fill(7);
    with(move |env| async move {
        let file = env.open(&path, env::OpenMode::default()).await.unwrap();
        let unreadable = env.open("/proc/self/mem".as_ref(), env::OpenMode::default()).await.unwrap();
        let c = NbdClient::open(&env, o).await.unwrap();
        let nothing = HostBytes { file: unreadable, at: Span::new(0, 4096) };
        // what could not be read is refused, and nothing else is; the server gets something, here what is written again
        c.write_from(2 * piece, nothing).await.unwrap_err();
        let mut tasks = Vec::new();
        for i in [0, 2, 5, 7] {
            let (writer, c) = (c.clone(), c.clone());
            let from = HostBytes { file: file.clone(), at: Span::new(i * piece, piece) };
            tasks.push(env.spawn("file", async move { writer.write_from(i * piece, from).await.unwrap() }));
            tasks.push(env.spawn("plain", async move {
                let at = Span::new(piece, 4096);
                c.write(at, Data::copy_from(&[7; 4096]), ReqFlags::NONE).await.unwrap();
                assert!(c.read(at).await.unwrap().to_vec() == [7; 4096]);
            }));
        }
        for task in tasks {
            task.join().await;
        }
        c.flush().await.unwrap();
        c.close().await.unwrap();
    });
    drop(server);
    assert!(dir.disk() == want);
}

#[test]
fn writes_from_a_file_against_qemu_nbd() {
    writes_from_a_file_against(|d| qemu_nbd(d, &[]));
}
#[test]
fn writes_from_a_file_against_nbdkit() {
    writes_from_a_file_against(|d| nbdkit(d, &[], &[]));
}

#[test]
fn holes_and_facts_are_seen() {
    let dir = Dir::new();
    std::fs::File::create(dir.0.join("disk")).unwrap().set_len(SIZE as u64).unwrap();
    let _server = qemu_nbd(&dir, &["--discard=unmap"]);
    let name = format!("nbd+unix:///d?socket={}", dir.text("s"));
    let o = options(&dir);
    with(|env| async move {
        let c = NbdClient::open(&env, o).await.unwrap();
        assert_eq!(c.len(), SIZE as u64);
        assert_eq!(c.details().await.unwrap().filename, name);
        assert_eq!(c.limits().max_transfer, 32 << 20);
        assert!(c.limits().efficient_zero);
        c.write(Span::new(1 << 20, 65536), vec![1; 65536].into(), ReqFlags::NONE).await.unwrap();
        let all = Span::new(0, SIZE as u64);
        let kinds: Vec<_> = c.extents(all).await.unwrap().into_iter().map(|e| (e.kind, e.span.len)).collect();
        assert_eq!(kinds, [(Kind::Zero, 1 << 20), (Kind::Data, 65536), (Kind::Zero, (7 << 20) - 65536)]);
        c.discard(Span::new(1 << 20, 65536)).await.unwrap();
        let kinds: Vec<_> = c.extents(all).await.unwrap().into_iter().map(|e| e.kind).collect();
        assert_eq!(kinds, [Kind::Zero]);
        let fast = ReqFlags { no_fallback: true, may_unmap: true, ..ReqFlags::NONE };
        c.zero(Span::new(0, 65536), fast).await.unwrap();
    });
}

#[test]
fn what_cannot_be_opened_says_why() {
    let dir = Dir::new();
    dir.image(1);
    let _server = qemu_nbd(&dir, &["-r"]);
    let o = options(&dir);
    let socket = dir.text("none");
    let garbage = dir.0.join("garbage");
    let listener = std::os::unix::net::UnixListener::bind(&garbage).unwrap();
    let liar = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut a, _) = listener.accept().unwrap();
        a.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
        let _ = a.read(&mut [0; 10]);
        drop(listener.accept().unwrap());
    });
    with(|env| async move {
        let open = async |change: &dyn Fn(&mut NbdOptions)| {
            let mut o = o.clone();
            change(&mut o);
            NbdClient::open(&env, o).await.map(|c| c.is_read_only()).map_err(|e| e.message().to_owned())
        };
        let e = open(&|o| o.server = Address::Unix(socket.clone().into())).await.unwrap_err();
        assert_eq!(e, format!("Failed to connect to '{socket}': No such file or directory"));
        let e = open(&|o| o.server = Address::tcp("127.0.0.1", 1)).await.unwrap_err();
        assert_eq!(e, "Failed to connect to '127.0.0.1:1': Connection refused");
        let e = open(&|o| o.export = "zz".into()).await.unwrap_err();
        assert_eq!(e, "Requested export not available");
        let e = open(&|o| o.export = "x".repeat(4097)).await.unwrap_err();
        assert_eq!(e, "export name too long to send to server");
        assert_eq!(open(&|_| {}).await.unwrap_err(), "Could not open image: Permission denied");
        assert_eq!(open(&|o| o.read_only = true).await, Ok(true));
        assert_eq!(open(&|o| o.auto_read_only = true).await, Ok(true));
        let bitmap = |o: &mut NbdOptions| {
            o.read_only = true;
            o.x_dirty_bitmap = Some("qemu:dirty-bitmap:b".into());
        };
        assert!(open(&bitmap).await.unwrap_err().contains("qemu:dirty-bitmap:b"));
        let e = open(&|o| o.server = Address::Unix(garbage.clone())).await.unwrap_err();
        assert_eq!(e, "Bad initial magic received: 0x5353482d322e302d");
        let e = open(&|o| o.server = Address::Unix(garbage.clone())).await.unwrap_err();
        assert_eq!(e, "Failed to read initial magic: Unexpected end-of-file before all data were read");
    });
    liar.join().unwrap();
}

#[test]
fn errors_of_the_server_arrive() {
    let dir = Dir::new();
    dir.image(1);
    let flag = dir.text("fail");
    let _server =
        nbdkit(&dir, &["error"], &["error=ENOSPC", "error-pwrite-rate=100%", &format!("error-file={flag}")]);
    let o = options(&dir);
    with(|env| async move {
        let c = NbdClient::open(&env, o).await.unwrap();
        let at = Span::new(0, 4096);
        c.write(at, Data::zeroes(4096), ReqFlags::NONE).await.unwrap();
        std::fs::write(&flag, b"").unwrap();
        let e = c.write(at, Data::zeroes(4096), ReqFlags::NONE).await.unwrap_err();
        assert_eq!((e.kind(), e.errno()), (ErrorKind::NoSpace, BlockError::ENOSPC));
        c.read(at).await.unwrap();
        std::fs::remove_file(&flag).unwrap();
        c.write(at, Data::zeroes(4096), ReqFlags::NONE).await.unwrap();
    });
}

#[test]
fn a_server_that_goes_away_fails_requests_at_once_or_after_the_delay() {
    for delay in [0u32, 1] {
        let dir = Dir::new();
        dir.image(1);
        let mut server = qemu_nbd(&dir, &[]);
        let mut o = options(&dir);
        o.reconnect_delay = delay;
        with(move |env| async move {
            let c = NbdClient::open(&env, o).await.unwrap();
            let at = Span::new(0, 4096);
            c.read(at).await.unwrap();
            server.0.kill().unwrap();
            server.0.wait().unwrap();
            let begin = env.now();
            let e = c.read(at).await.unwrap_err();
            assert_eq!(e.errno(), BlockError::EIO, "{e}");
            let took = env.now() - begin;
            let (least, most) = (
                Duration::from_millis(u64::from(delay) * 900),
                Duration::from_millis(u64::from(delay) * 1000 + 900),
            );
            assert!(took >= least && took < most, "delay {delay}: {took:?}");
        });
    }
}

#[test]
fn requests_survive_a_restart_of_the_server() {
    let dir = Dir::new();
    let before = dir.image(9);
    let server = qemu_nbd(&dir, &[]);
    let mut o = options(&dir);
    o.reconnect_delay = 20;
    let again = Dir(dir.0.clone());
    let restarts = std::thread::spawn(move || {
        let mut server = server;
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(120));
            server.0.kill().unwrap();
            server.0.wait().unwrap();
            let _ = std::fs::remove_file(again.0.join("s"));
            std::thread::sleep(Duration::from_millis(60));
            server = qemu_nbd(&again, &[]);
        }
        std::mem::forget(again);
        server
    });
    let after = with(move |env| async move {
        let c = NbdClient::open(&env, o).await.unwrap();
        let begin = env.now();
        let (mut disk, mut rounds) = (before, 0);
        // on a busy machine a round takes as long
        while rounds < 2 || env.now() - begin < Duration::from_millis(800) {
            rounds += 1;
            disk = storm(c.clone(), disk, seed() + rounds, 300).await;
        }
        disk
    });
    let server = restarts.join().unwrap();
    drop(server);
    assert!(dir.disk() == after, "every acknowledged write is there after kills of the server process");
}

#[test]
fn open_timeout_waits_for_the_server() {
    let dir = Dir::new();
    dir.image(1);
    let mut o = options(&dir);
    o.open_timeout = 10;
    let later = Dir(dir.0.clone());
    let starter = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        let p = qemu_nbd(&later, &[]);
        std::mem::forget(later);
        p
    });
    with(|env| async move {
        NbdClient::open(&env, o).await.unwrap().read(Span::new(0, 512)).await.unwrap();
    });
    drop(starter.join().unwrap());
}

#[test]
fn oldstyle_servers_work() {
    let dir = Dir::new();
    let content = dir.image(2);
    let _server = peer(&dir, "nbdkit", &args(&["-f", "-o", "-U", &dir.text("s"), "file", &dir.text("disk")]));
    let mut o = options(&dir);
    o.export = String::new();
    let got = with(|env| async move {
        let c = NbdClient::open(&env, o).await.unwrap();
        c.read(Span::new(4096, 65536)).await.unwrap().to_vec()
    });
    assert!(got == content[4096..4096 + 65536]);
}
