//! Measures the real backend alone: tasks, 4 KiB random file I/O, and an echo over a unix socket.
//!
//!     cargo run --release -p env --example iobench -- [tasks|files|sockets] [uring|threads]
//!
//! `cpu` is processor time of the whole process (with the kernel's workers) per operation. The lines to compare with:
//! `fio --ioengine=io_uring --rw=randread --bs=4k --iodepth=N --size=256m --runtime=1 --time_based --filename=...`.
#![allow(clippy::unwrap_used, reason = "a measuring program may end at any error")]

use block::{Data, Span};
use env::os::{IoMode, OsConfig, start};
use env::{Address, Env, Existing, File, OpenMode};
use std::cell::Cell;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

const FILE: u64 = 256 << 20;
const BLOCK: u64 = 4096;
const TIME: Duration = Duration::from_millis(700);
const REPLY: usize = 4112;
const REQUEST: usize = 28;

fn cpu() -> Duration {
    // user and system time of the process: fields 14 and 15 of proc(5) stat, in ticks of 10 ms
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after = stat.rsplit(')').next().unwrap();
    let ticks: u64 = after.split_whitespace().skip(11).take(2).map(|n| n.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}

struct Meter {
    wall: Instant,
    cpu: Duration,
}

impl Meter {
    fn start() -> Meter {
        Meter { wall: Instant::now(), cpu: cpu() }
    }

    fn report(&self, what: &str, n: u64) {
        let (wall, cpu) = (self.wall.elapsed(), cpu().saturating_sub(self.cpu));
        let rate = n as f64 / wall.as_secs_f64();
        let per = cpu.as_secs_f64() * 1e6 / n.max(1) as f64;
        println!("{what:<44} {rate:>10.0}/s {:>8.2} us wall {per:>8.2} us cpu", 1e6 / rate);
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let io = if args.iter().any(|a| a == "threads") { IoMode::Threads } else { IoMode::Uring };
    let all = !args.iter().any(|a| ["tasks", "files", "sockets"].contains(&a.as_str()));
    let has = |w: &str| all || args.iter().any(|a| a == w);
    let executor = start(OsConfig { io, ..OsConfig::default() });
    let env = executor.env();
    if has("tasks") {
        executor.run(tasks(env.clone()));
    }
    if has("files") {
        executor.run(files(env.clone()));
    }
    if has("sockets") {
        executor.run(sockets(env));
    }
}

async fn tasks(env: Env) {
    const N: u64 = 1_000_000;
    let m = Meter::start();
    for _ in 0..N {
        env.spawn("t", async {}).join().await;
    }
    m.report("spawn and join", N);
    let m = Meter::start();
    for _ in 0..N {
        env.yield_now().await;
    }
    m.report("wake itself", N);
    let (a, b) = (Rc::new(env::sync::Notify::new()), Rc::new(env::sync::Notify::new()));
    let (ping, pong) = (a.clone(), b.clone());
    let other = env.spawn("pong", async move {
        loop {
            ping.wait().await;
            pong.notify_one();
        }
    });
    env.yield_now().await;
    let m = Meter::start();
    for _ in 0..N / 2 {
        let back = b.wait();
        a.notify_one();
        back.await;
    }
    m.report("wake another task (one way)", N);
    other.cancel();
    let m = Meter::start();
    for _ in 0..20_000 {
        env.offload(|| ()).await.unwrap();
    }
    m.report("offload to a helper thread and back", 20_000);
    let m = Meter::start();
    for _ in 0..2000 {
        env.sleep(Duration::from_micros(1)).await;
    }
    m.report("sleep 1 us", 2000);
}

async fn files(env: Env) {
    for (dir, direct) in [("/dev/shm", false), ("/var/tmp", false), ("/var/tmp", true)] {
        let path = PathBuf::from(dir).join(format!("iobench-{}", std::process::id()));
        prepare(&env, &path).await;
        let mode = OpenMode { write: true, direct, ..OpenMode::default() };
        let file = env.open(&path, mode).await.unwrap();
        for write in [false, true] {
            for depth in [1, 16, 64] {
                random(&env, &file, write, depth, dir, direct).await;
            }
        }
        for size in [64 << 10, 1 << 20] {
            sequential(&env, &file, size, dir, direct).await;
        }
        env.remove(&path).await.unwrap();
    }
}

async fn prepare(env: &Env, path: &Path) {
    let mode = OpenMode { write: true, existing: Existing::CreateTruncate, ..OpenMode::default() };
    let file = env.open(path, mode).await.unwrap();
    let data: Data = Data::from((0..1 << 20).map(|i| (i % 251) as u8).collect::<Vec<u8>>());
    for at in (0..FILE).step_by(1 << 20) {
        file.write(at, data.clone()).await.unwrap();
    }
    file.barrier().await.unwrap();
}

async fn random(env: &Env, file: &Rc<dyn File>, write: bool, depth: usize, dir: &str, direct: bool) {
    let done = Rc::new(Cell::new(0u64));
    let m = Meter::start();
    let end = Instant::now() + TIME;
    let data = file.read(Span::new(0, BLOCK)).await.unwrap();
    let workers: Vec<_> = (0..depth)
        .map(|_| {
            let (env2, file, done, data) = (env.clone(), file.clone(), done.clone(), data.clone());
            env.spawn("worker", async move {
                while Instant::now() < end {
                    let at = env2.random() % (FILE / BLOCK) * BLOCK;
                    if write {
                        file.write(at, data.clone()).await.unwrap();
                    } else {
                        assert_eq!(file.read(Span::new(at, BLOCK)).await.unwrap().len() as u64, BLOCK);
                    }
                    done.set(done.get() + 1);
                }
            })
        })
        .collect();
    for w in workers {
        w.join().await;
    }
    let (kind, how) = (if write { "write" } else { "read" }, if direct { "direct" } else { "buffered" });
    m.report(&format!("{dir} {how} 4K random {kind}, depth {depth}"), done.get());
}

async fn sequential(env: &Env, file: &Rc<dyn File>, size: u64, dir: &str, direct: bool) {
    for write in [false, true] {
        for depth in [1usize, 4] {
            let next = Rc::new(Cell::new(0u64));
            let m = Meter::start();
            let end = Instant::now() + TIME;
            let data = file.read(Span::new(0, size)).await.unwrap();
            let workers: Vec<_> = (0..depth)
                .map(|_| {
                    let (file, next, data) = (file.clone(), next.clone(), data.clone());
                    env.spawn("worker", async move {
                        while Instant::now() < end {
                            let n = next.replace(next.get() + 1);
                            let at = n * size % FILE;
                            if write {
                                file.write(at, data.clone()).await.unwrap();
                            } else {
                                file.read(Span::new(at, size)).await.unwrap();
                            }
                        }
                    })
                })
                .collect();
            for w in workers {
                w.join().await;
            }
            let (kind, how) =
                (if write { "write" } else { "read" }, if direct { "direct" } else { "buffered" });
            m.report(&format!("{dir} {how} {}K seq {kind}, depth {depth}", size >> 10), next.get());
        }
    }
}

/// A server of 28-byte requests and 4112-byte replies: all requests of a receive are answered by one send.
async fn sockets(env: Env) {
    let path = PathBuf::from(format!("/dev/shm/iobench-{}.sock", std::process::id()));
    let listener = env.listen(&Address::Unix(path.clone())).await.unwrap();
    let reply = bytes::Bytes::from(vec![7u8; REPLY]);
    for depth in [1usize, 16, 64] {
        let to = path.clone();
        let client = std::thread::spawn(move || client(&to, depth));
        let s = listener.accept().await.unwrap();
        let m = Meter::start();
        let (mut n, mut pending) = (0u64, 0usize);
        loop {
            // a client that ends with unread replies resets the connection
            let Ok(got) = s.recv(1 << 20).await else { break };
            if got.is_empty() {
                break;
            }
            pending += got.len();
            let mut out = Data::empty();
            while pending >= REQUEST {
                pending -= REQUEST;
                n += 1;
                out.push(reply.clone());
            }
            if s.send(out).await.is_err() {
                break;
            }
        }
        m.report(&format!("echo {REQUEST} -> {REPLY}, depth {depth} (cpu with client)"), n);
        client.join().unwrap();
    }
    bulk(&env, &listener, &path).await;
    env.remove(&path).await.unwrap();
}

/// Keeps `depth` requests under way, blocking.
fn client(to: &Path, depth: usize) {
    let mut s = std::os::unix::net::UnixStream::connect(to).unwrap();
    let mut buf = vec![0u8; 256 << 10];
    let requests = vec![1u8; REQUEST * depth];
    s.write_all(&requests).unwrap();
    let end = Instant::now() + TIME;
    let mut have = 0;
    while Instant::now() < end {
        have += s.read(&mut buf).unwrap();
        let n = have / REPLY;
        have %= REPLY;
        s.write_all(&requests[..n * REQUEST]).unwrap();
    }
}

/// One side sends 1 MiB pieces, the other receives.
async fn bulk(env: &Env, listener: &Rc<dyn env::Listener>, path: &Path) {
    const PIECE: usize = 1 << 20;
    for from_us in [true, false] {
        let to = path.to_owned();
        let peer = std::thread::spawn(move || {
            let mut s = std::os::unix::net::UnixStream::connect(to).unwrap();
            let mut buf = vec![0u8; PIECE];
            let end = Instant::now() + TIME;
            while Instant::now() < end {
                let n = if from_us { s.read(&mut buf) } else { s.write_all(&buf).map(|()| 1) };
                if !matches!(n, Ok(1..)) {
                    break;
                }
            }
        });
        let s = listener.accept().await.unwrap();
        let data = Data::from(vec![1u8; PIECE]);
        let m = Meter::start();
        let mut bytes = 0usize;
        // as a server does whose writes are under way
        let mut held = std::collections::VecDeque::new();
        loop {
            if from_us {
                if s.send(data.clone()).await.is_err() {
                    break;
                }
                bytes += PIECE;
            } else {
                let Ok(got) = s.recv(PIECE).await else { break };
                if got.is_empty() {
                    break;
                }
                bytes += got.len();
                held.push_back(got);
                if held.len() > 16 {
                    held.pop_front();
                }
            }
        }
        let what = if from_us { "send" } else { "receive" };
        m.report(&format!("bulk {what}, MiB (cpu with peer)"), (bytes >> 20) as u64);
        peer.join().unwrap();
    }
    let _ = env;
}
