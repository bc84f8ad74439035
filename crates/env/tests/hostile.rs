//! What goes wrong, and what callers do not wait for: dropped futures, more operations than the ring holds, devices that refuse.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;
use block::{BlockError, Data, ErrorKind, Span};
use common::{Dir, MODES, each, pattern, run_in};
use env::os::{OsConfig, start};
use env::{Address, Env, Existing, File, OpenMode};
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

const CREATE: OpenMode =
    OpenMode { write: true, direct: false, existing: Existing::CreateTruncate, threads: false };
/// Larger than what is done at once: goes to the ring or a helper thread.
const LARGE: usize = 3 << 20;

fn poll_once<T>(f: &mut Pin<Box<dyn Future<Output = T> + '_>>) -> Poll<T> {
    f.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn writes_whose_futures_were_dropped_have_landed_after_settle() {
    each(|env, dir| async move {
        let f = env.open(&dir.path("f"), CREATE).await.unwrap();
        let data = Data::from(pattern(1, LARGE));
        for i in 0..8u64 {
            let mut write = f.write(i * LARGE as u64, data.clone());
            assert!(poll_once(&mut write).is_pending(), "too fast to be dropped");
        }
        drop(f.write(0, Data::zeroes(10))); // never polled: never made
        f.settle().await.unwrap();
        for i in 0..8u64 {
            assert!(f.read(Span::new(i * LARGE as u64, LARGE as u64)).await.unwrap() == data, "write {i}");
        }
        let mut zero = f.zero(Span::new(0, 8 * LARGE as u64), env::Punch::Release);
        assert!(poll_once(&mut zero).is_pending());
        drop(zero);
        f.settle().await.unwrap();
        assert!(f.read(Span::new(5, LARGE as u64)).await.unwrap().is_zero());
    });
}

/// Descriptors of this process that lead to `path`.
fn open_descriptors(path: &Path) -> usize {
    let all = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    all.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == path)).count()
}

#[test]
fn nothing_keeps_a_file_open_after_settle() {
    each(|env, dir| async move {
        for round in 0..10u64 {
            let (from, to) = (dir.path("from"), dir.path("to"));
            let f = env.open(&from, OpenMode { direct: true, ..CREATE }).await.unwrap();
            let t = env.open(&to, CREATE).await.unwrap();
            f.write(0, Data::from(pattern(round, LARGE))).await.unwrap();
            // each once the first of its kind is under way: both ends of a copy are in use
            let mut reads: Vec<_> = (0..8).map(|_| f.read(Span::new(0, LARGE as u64))).collect();
            reads.iter_mut().for_each(|r| assert!(poll_once(r).is_pending()));
            let mut barrier = f.barrier();
            let mut copy = f.copy_to(Span::new(0, LARGE as u64), &t, 0);
            let mut extents = f.extents(Span::new(0, LARGE as u64));
            let _ended_or_not =
                (poll_once(&mut barrier), poll_once(&mut copy).is_pending(), poll_once(&mut extents));
            drop((reads, barrier, copy, extents));
            f.settle().await.unwrap();
            t.settle().await.unwrap();
            drop((f, t));
            assert_eq!((open_descriptors(&from), open_descriptors(&to)), (0, 0), "round {round}");
        }
    });
}

#[test]
fn a_dropped_read_does_not_write_to_memory_of_others() {
    each(|env, dir| async move {
        let other = env.open(&dir.path("other"), CREATE).await.unwrap();
        other.write(0, Data::from(vec![0x11; LARGE])).await.unwrap();
        // direct, so that even what is in the page cache is not read at once
        let f = env.open(&dir.path("f"), OpenMode { direct: true, ..CREATE }).await.unwrap();
        f.write(0, Data::from(vec![0xee; LARGE])).await.unwrap();
        for _ in 0..30 {
            let mut reads: Vec<_> = (0..4).map(|_| f.read(Span::new(0, LARGE as u64))).collect();
            reads.iter_mut().for_each(|r| assert!(poll_once(r).is_pending()));
            drop(reads);
            // memory of the same size class: must not be what the kernel is filling
            let mut ours = Vec::new();
            for _ in 0..4 {
                ours.push(other.read(Span::new(0, LARGE as u64)).await.unwrap());
            }
            env.sleep(Duration::from_micros(300)).await;
            assert!(ours.iter().all(|d| d.parts()[0].iter().all(|b| *b == 0x11)));
        }
    });
}

#[test]
fn operations_under_way_keep_their_file_open() {
    each(|env, dir| async move {
        let f = env.open(&dir.path("f"), CREATE).await.unwrap();
        let mut write = f.write(0, Data::from(pattern(3, LARGE)));
        assert!(poll_once(&mut write).is_pending());
        drop(write);
        drop(f);
        // would reuse the descriptor's number if it were closed already
        let others: Vec<_> =
            (0..5).map(|i| std::fs::File::create(dir.path(&format!("o{i}"))).unwrap()).collect();
        let g = env.open(&dir.path("f"), OpenMode::default()).await.unwrap();
        let until = env.now() + Duration::from_secs(5);
        while g.read(Span::new(LARGE as u64 - 8, 8)).await.unwrap().to_vec()
            != pattern(3 + LARGE as u64 - 8, 8)
        {
            assert!(env.now() < until);
            env.sleep(Duration::from_millis(1)).await;
        }
        assert!(others.iter().all(|o| o.metadata().unwrap().len() == 0));
    });
}

#[test]
fn an_executor_dropped_with_operations_under_way_waits_for_them() {
    for io in MODES {
        let dir = Dir::new("/dev/shm");
        let path = dir.path("f");
        let executor = start(OsConfig { io, ..OsConfig::default() });
        let env = executor.env();
        executor.run(async move {
            let f = env.open(&path, CREATE).await.unwrap();
            let env2 = env.clone();
            env.spawn("writes", async move {
                f.write(0, Data::from(pattern(0, 4 * LARGE))).await.unwrap();
                env2.sleep(Duration::from_secs(1000)).await;
            });
            env.yield_now().await;
        });
        drop(executor);
        assert_eq!(std::fs::read(dir.path("f")).unwrap(), pattern(0, 4 * LARGE));
    }
}

#[test]
fn thousands_of_operations_on_a_ring_of_eight() {
    for io in MODES {
        let dir = Rc::new(Dir::new("/var/tmp"));
        // the completion queue has room for 32: it overflows
        run_in(OsConfig { io, ring_entries: 8, ..OsConfig::default() }, |env| parallel(env, dir));
    }
}

async fn parallel(env: Env, dir: Rc<Dir>) {
    let f = env.open(&dir.path("f"), CREATE).await.unwrap();
    let whole = Data::from(pattern(0, 4 << 20));
    f.write(0, whole.clone()).await.unwrap();
    f.barrier().await.unwrap();
    let direct = OpenMode { write: true, direct: true, ..OpenMode::default() };
    let d = env.open(&dir.path("f"), direct).await.unwrap();
    let tasks: Vec<_> = (0..4000u64)
        .map(|i| {
            let (d, whole) = (d.clone(), whole.clone());
            env.spawn("io", async move {
                let at = i % 1024 * 4096;
                let expect = whole.slice(at as usize, 4096);
                if i % 5 == 0 {
                    d.write(at, expect).await.unwrap();
                } else {
                    assert_eq!(d.read(Span::new(at, 4096)).await.unwrap(), expect);
                }
            })
        })
        .collect();
    // some are called off half-way
    let waits = (0..500).map(|_| env.spawn("gone", env.sleep(Duration::from_secs(100)))).collect::<Vec<_>>();
    for t in tasks {
        t.join().await;
    }
    waits.iter().for_each(env::TaskHandle::cancel);
    assert_eq!(f.read(Span::new(0, 4 << 20)).await.unwrap(), whole);
}

#[test]
fn thousands_of_waiting_receives_are_called_off() {
    for io in MODES {
        let dir = Dir::new("/dev/shm");
        run_in(OsConfig { io, ring_entries: 8, ..OsConfig::default() }, |env| async move {
            let listener = env.listen(&Address::Unix(dir.path("s"))).await.unwrap();
            let mut ends = Vec::new();
            let mut tasks = Vec::new();
            for _ in 0..500 {
                let c = env.connect(&listener.address()).await.unwrap();
                let s = listener.accept().await.unwrap();
                tasks.push(env.spawn("recv", async move {
                    assert!(c.recv(10).await.unwrap().is_empty());
                }));
                ends.push(s);
            }
            env.sleep(Duration::from_millis(5)).await;
            tasks.iter().take(250).for_each(env::TaskHandle::cancel);
            ends.clear();
            for t in tasks {
                t.join().await;
            }
        });
    }
}

#[test]
fn devices_answer_as_devices_do() {
    for io in MODES {
        run_in(OsConfig { io, ..OsConfig::default() }, |env| async move {
            let open = async |name: &str| -> Rc<dyn File> {
                let mode = OpenMode { write: true, ..OpenMode::default() };
                env.open(Path::new(name), mode).await.unwrap()
            };
            let full = open("/dev/full").await;
            let e = full.write(0, Data::zeroes(10)).await.unwrap_err();
            assert_eq!((e.kind(), e.errno()), (ErrorKind::NoSpace, BlockError::ENOSPC));
            assert!(full.read(Span::new(0, 100)).await.unwrap().is_zero());
            let null = open("/dev/null").await;
            null.write(1 << 30, Data::zeroes(1 << 20)).await.unwrap();
            null.barrier().await.unwrap();
            assert_eq!(null.info().await.unwrap().kind, env::FileKind::CharDevice);
            assert_eq!(null.set_len(0).await.unwrap_err().kind(), ErrorKind::Unsupported);
            let e = null.zero(Span::new(0, 4096), env::Punch::Release).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Unsupported);
        });
    }
}

#[test]
fn a_fifo_is_refused_without_hanging() {
    each(|env, dir| async move {
        let made = std::process::Command::new("mkfifo").arg(dir.path("fifo")).status().unwrap();
        assert!(made.success());
        let e = env.open(&dir.path("fifo"), OpenMode::default()).await.err().unwrap();
        assert_eq!(e.kind(), ErrorKind::Invalid);
        let e = env.open(&dir.path("a\0b"), CREATE).await.err().unwrap();
        assert_eq!(e.kind(), ErrorKind::Invalid);
    });
}

#[test]
fn offsets_beyond_what_a_file_can_have_are_errors() {
    each(|env, dir| async move {
        let f = env.open(&dir.path("f"), CREATE).await.unwrap();
        let far = i64::MAX as u64 - 10;
        assert!(f.write(far, Data::zeroes(100)).await.is_err());
        assert!(f.read(Span::new(far, 100)).await.is_err());
        assert!(f.zero(Span::new(far, 100), env::Punch::Release).await.is_err());
        assert!(f.allocate(Span::new(far, 100)).await.is_err());
        assert!(f.set_len(u64::MAX).await.is_err());
        let e = f.extents(Span::new(u64::MAX - 10, 10)).await.unwrap();
        assert_eq!((e.len(), e[0].kind), (1, block::Kind::Zero));
        assert!(f.lock(env::LockRange { start: u64::MAX, len: 1, exclusive: false }).await.is_err());
        assert_eq!(f.info().await.unwrap().len, 0);
    });
}
