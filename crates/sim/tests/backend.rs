//! The simulated backend as production code sees it: files, crashes, sockets, time, and repeatability from the seed.
#![allow(clippy::unwrap_used)] // a test says by panicking

use block::{Data, ErrorKind, ReqFlags, Span};
use drivers::file::{FileNode, FileOptions};
use env::{Address, Env, Executor, Existing, LockRange, OpenMode, Punch};
use graph::Node;
use sim::{Fault, Host, Image, Machine, Net, NetProfile, Op, Process, Profile, Rng, Rule};
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

struct Bench {
    machine: Machine,
    net: Net,
    host: Host,
    executor: Executor,
}

fn bench(seed: u64, profile: Profile) -> Bench {
    let machine = Machine::new(seed);
    machine.limit_steps(1_000_000);
    let net = Net::new(&machine, NetProfile::calm());
    let host = Host::new("a", &machine, &net, profile);
    let executor = Executor::new(sim::SimBackend::root(&host));
    Bench { machine, net, host, executor }
}

impl Bench {
    fn start(&self) -> (Env, Process) {
        self.host.start(&self.executor)
    }
}

fn rw() -> OpenMode {
    OpenMode { write: true, ..OpenMode::default() }
}

fn full(byte: u8, n: usize) -> Data {
    Data::from(vec![byte; n])
}

#[test]
fn time_jumps_to_the_next_timer_and_an_idle_run_is_stuck() {
    let b = bench(1, Profile::calm());
    let (env, _p) = b.start();
    let e = env.clone();
    let before = env.now();
    b.executor.run(async move {
        assert!(e.timeout(Duration::from_secs(5), std::future::pending::<()>()).await.is_none());
        e.sleep(Duration::from_secs(3600)).await;
    });
    let took = b.machine.now() - before;
    assert!(took >= Duration::from_secs(3605) && took < Duration::from_secs(3606), "{took:?}");
    let stuck = b.executor.try_run(std::future::pending::<()>()).unwrap_err();
    assert_eq!(stuck.waiting, ["main"]);
}

#[test]
fn reads_see_what_landed_and_writes_land_in_any_order() {
    let mut first_wins = 0;
    for seed in 0..40 {
        let b = bench(seed, Profile::calm());
        b.host.install("/d", Image::from_bytes(&[0; 4096]));
        let (env, _p) = b.start();
        let byte = b.executor.run(async move {
            let f = env.open(Path::new("/d"), rw()).await.unwrap();
            let (a, c) = futures_join(f.write(0, full(1, 512)), f.write(0, full(2, 512))).await;
            a.unwrap();
            c.unwrap();
            f.read(Span::new(0, 512)).await.unwrap().to_vec()[0]
        });
        assert!(byte == 1 || byte == 2);
        first_wins += usize::from(byte == 1);
    }
    assert!((1..40).contains(&first_wins), "{first_wins} of 40");
}

async fn futures_join<A: Future, B: Future>(a: A, b: B) -> (A::Output, B::Output) {
    let (mut a, mut b) = (Box::pin(a), Box::pin(b));
    let (mut x, mut y) = (None, None);
    std::future::poll_fn(|cx| {
        if x.is_none()
            && let std::task::Poll::Ready(v) = a.as_mut().poll(cx)
        {
            x = Some(v);
        }
        if y.is_none()
            && let std::task::Poll::Ready(v) = b.as_mut().poll(cx)
        {
            y = Some(v);
        }
        if x.is_some() && y.is_some() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    (x.unwrap(), y.unwrap())
}

#[test]
fn a_dropped_write_still_lands_and_settle_waits_for_it() {
    let b = bench(3, Profile::calm());
    b.host.install("/d", Image::from_bytes(&[0; 4096]));
    let (env, _p) = b.start();
    b.executor.run(async move {
        let f = env.open(Path::new("/d"), rw()).await.unwrap();
        {
            let mut w = f.write(0, full(9, 512));
            std::future::poll_fn(|cx| {
                assert!(w.as_mut().poll(cx).is_pending());
                std::task::Poll::Ready(())
            })
            .await;
        }
        let unpolled = f.write(512, full(9, 512));
        drop(unpolled);
        f.settle().await.unwrap();
        let bytes = f.read(Span::new(0, 1024)).await.unwrap().to_vec();
        assert_eq!((bytes[0], bytes[512]), (9, 0), "issued at the first poll, not before");
    });
}

#[test]
fn a_dropped_read_keeps_its_file_open_and_settle_waits_for_it() {
    let b = bench(3, Profile::calm());
    b.host.install("/d", Image::from_bytes(&[0; 4096]));
    let (env, p) = b.start();
    b.executor.run(async move {
        for settle in [false, true] {
            let f = env.open(Path::new("/d"), rw()).await.unwrap();
            let mut read = f.read(Span::new(0, 512));
            std::future::poll_fn(|cx| {
                assert!(read.as_mut().poll(cx).is_pending());
                std::task::Poll::Ready(())
            })
            .await;
            drop(read);
            if settle {
                f.settle().await.unwrap();
            }
            drop(f);
            assert_eq!(p.open_files(), usize::from(!settle));
            env.sleep(Duration::from_secs(1)).await;
            assert_eq!(p.open_files(), 0);
        }
    });
}

#[test]
fn power_loss_keeps_what_a_barrier_covered_and_any_part_of_the_rest() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..1500 {
        let b = bench(seed, Profile::calm());
        b.host.install("/d", Image::from_bytes(&[0; 8192]));
        let (env, p) = b.start();
        b.executor.run(async move {
            let f = env.open(Path::new("/d"), rw()).await.unwrap();
            f.write(0, full(1, 512)).await.unwrap();
            f.barrier().await.unwrap();
            f.write(0, full(2, 512)).await.unwrap();
            f.write(1024, full(3, 1024)).await.unwrap();
        });
        b.host.power_loss(&[&p]);
        let i = b.host.image("/d").unwrap().to_vec();
        assert!(i[0] == 1 || i[0] == 2, "the flushed write is there or overwritten");
        seen.insert((i[0], i[1024], i[1536]));
    }
    assert_eq!(seen.len(), 8, "every subset, and the second write torn both ways: {seen:?}");
}

#[test]
fn a_killed_process_does_nothing_more_and_gives_its_locks_back() {
    let b = bench(5, Profile::calm());
    b.host.install("/d", Image::from_bytes(&[0; 4096]));
    let (env, p) = b.start();
    let progress = Rc::new(RefCell::new(0));
    let count = progress.clone();
    let in_task = env.clone();
    env.spawn("writer", async move {
        let f = in_task.open(Path::new("/d"), rw()).await.unwrap();
        f.lock(LockRange { start: 100, len: 1, exclusive: true }).await.unwrap();
        loop {
            f.write(0, full(1, 512)).await.unwrap();
            *count.borrow_mut() += 1;
        }
    });
    let (other, _p2) = b.start();
    let host = b.host.clone();
    b.executor.run(async move {
        other.sleep(Duration::from_millis(50)).await;
        let f = other.open(Path::new("/d"), rw()).await.unwrap();
        let range = LockRange { start: 100, len: 1, exclusive: false };
        assert_eq!(f.lock(range).await.unwrap_err().kind(), ErrorKind::Busy);
        assert!(!f.can_lock(range).await.unwrap());
        p.kill();
        let before = *progress.borrow();
        assert!(before > 0);
        f.lock(range).await.unwrap();
        other.sleep(Duration::from_secs(1)).await;
        assert_eq!(*progress.borrow(), before);
        assert_eq!(host.locks_held("/d"), 1);
        drop(f);
        assert_eq!(host.locks_held("/d"), 0);
        assert!(p.waiting().is_empty());
    });
}

/// A job's write was under way when it was cancelled, and a guest writes there afterwards.
#[test]
fn what_was_called_off_does_not_land_over_what_came_later() {
    let b = bench(7, Profile::calm());
    b.host.install("/d", Image::from_bytes(&[0; 8192]));
    b.host.fault(Rule::once("/d", Op::Write, Fault::Delay(Duration::from_millis(50))));
    let (env, _p) = b.start();
    b.executor.run(async move {
        let options = FileOptions { filename: "/d".to_owned(), ..FileOptions::default() };
        let (node, _) = FileNode::open(&env, &options).await.unwrap();
        let at = Span::new(0, 512);
        let late = node.write(at, full(1, 512), ReqFlags::NONE);
        assert!(env.timeout(Duration::from_millis(1), late).await.is_none());
        node.write(at, full(2, 512), ReqFlags::NONE).await.unwrap();
        env.sleep(Duration::from_millis(100)).await;
        assert_eq!(node.read(at).await.unwrap().to_vec(), [2; 512]);
    });
}

#[test]
fn rules_hit_the_request_they_name() {
    let b = bench(6, Profile::calm());
    b.host.install("/d", Image::from_bytes(&[0; 8192]));
    b.host.fault(Rule { skip: 1, ..Rule::once("/d", Op::Write, Fault::Errno(28)) });
    b.host.fault(Rule::once("/d", Op::Barrier, Fault::Errno(5)));
    b.host.fault(Rule::once("/d", Op::Read, Fault::Rot));
    b.host.fault(Rule::once("/d", Op::Extents, Fault::Hang));
    let (env, _p) = b.start();
    let host = b.host.clone();
    b.executor.run(async move {
        let f = env.open(Path::new("/d"), rw()).await.unwrap();
        f.write(0, full(0, 512)).await.unwrap();
        let e = f.write(0, full(1, 512)).await.unwrap_err();
        assert_eq!((e.kind(), e.errno()), (ErrorKind::NoSpace, 28));
        assert_eq!(f.barrier().await.unwrap_err().errno(), 5);
        f.barrier().await.unwrap();
        let bits: u32 =
            f.read(Span::new(0, 512)).await.unwrap().to_vec().iter().map(|b| b.count_ones()).sum();
        assert_eq!(bits, 1, "one wrong bit");
        let e2 = env.clone();
        let f2 = f.clone();
        let hung = env.spawn("extents", async move {
            f2.extents(Span::new(0, 8192)).await.unwrap();
            e2.yield_now().await;
        });
        env.sleep(Duration::from_secs(100)).await;
        assert!(!hung.is_done());
        assert_eq!(host.hung(), 1);
        host.release_hung();
        hung.join().await;
    });
}

#[test]
fn names_lengths_and_holes() {
    let b = bench(7, Profile::calm());
    let (env, p) = b.start();
    b.executor.run(async move {
        let path = Path::new("/new");
        assert_eq!(env.open(path, rw()).await.err().unwrap().kind(), ErrorKind::NotFound);
        let create = OpenMode { existing: Existing::CreateNew, ..rw() };
        let f = env.open(path, create).await.unwrap();
        assert_eq!(env.open(path, create).await.err().unwrap().errno(), 17);
        f.set_len(1 << 20).await.unwrap();
        f.write(65536, full(1, 4096)).await.unwrap();
        let e = f.extents(Span::new(0, 2 << 20)).await.unwrap();
        assert_eq!(e.len(), 3);
        assert_eq!(e[1].span, Span::new(65536, 4096));
        f.zero(Span::new(65536, 4096), Punch::Release).await.unwrap();
        assert_eq!(f.info().await.unwrap().allocated, 0);
        f.zero(Span::new(0, 4096), Punch::Keep).await.unwrap();
        assert_eq!(f.info().await.unwrap().allocated, 4096);
        f.allocate(Span::new(1 << 20, 4096)).await.unwrap();
        assert_eq!(f.len_hint(), (1 << 20) + 4096);
        let ro = env.open(path, OpenMode::default()).await.unwrap();
        assert!(ro.write(0, full(1, 512)).await.is_err());
        env.remove(path).await.unwrap();
        assert!(env.remove(path).await.is_err());
        assert_eq!(p.open_files(), 2);
    });
}

/// An echo over a stream with small segments and buffers gives every byte back, in order.
async fn echo(env: Env, at: Address, bytes: usize) -> block::Result<usize> {
    let s = env.connect(&at).await?;
    let sent: Vec<u8> = (0..bytes).map(|i| (i * 7) as u8).collect();
    let (out, data) = (s.clone(), Data::from(sent.clone()));
    env.spawn("sender", async move {
        // the reader sees what becomes of it
        let _ = out.send(data).await;
    });
    let mut got = 0;
    while got < bytes {
        let part = s.recv(1000).await?;
        if part.is_empty() {
            break;
        }
        assert_eq!(part[..], sent[got..got + part.len()], "in order and unchanged");
        got += part.len();
    }
    Ok(got)
}

fn echo_server(env: &Env, at: Address) {
    let e = env.clone();
    env.spawn("listener", async move {
        let l = e.listen(&at).await.unwrap();
        while let Ok(s) = l.accept().await {
            e.spawn("echo", async move {
                while let Ok(part) = s.recv(65536).await {
                    if part.is_empty() || s.send(Data::from(part)).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
}

#[test]
fn streams_keep_order_through_small_segments_and_full_buffers() {
    for seed in 0..30 {
        let b = bench(seed, Profile::calm());
        let drawn = NetProfile::drawn_calm(&mut Rng::new(seed));
        b.net.set_profile(NetProfile { segment: drawn.segment.min(3000), buffer: 4096, ..drawn });
        let (server, p) = b.start();
        let (client, _p) = b.start();
        let at = Address::Unix(PathBuf::from("/sock"));
        echo_server(&server, at.clone());
        let net = b.net.clone();
        b.executor.run(async move {
            client.sleep(Duration::from_millis(1)).await;
            assert_eq!(echo(client.clone(), at.clone(), 20_000).await.unwrap(), 20_000);
            p.kill();
            let e = client.connect(&at).await.err().unwrap();
            assert_eq!(e.errno(), 111);
            client.sleep(Duration::from_secs(1)).await;
            assert_eq!(net.open_connections(), 0);
        });
    }
}

#[test]
fn connections_are_cut_refused_or_go_silent() {
    let mut outcomes = std::collections::BTreeMap::<&str, usize>::new();
    for seed in 0..200 {
        let b = bench(seed, Profile::calm());
        b.net.set_profile(NetProfile {
            cut: 0.4,
            cut_within: 8000,
            half_open: 0.5,
            refuse: 0.2,
            ..NetProfile::calm()
        });
        let (server, _p) = b.start();
        let (client, _p2) = b.start();
        let at = Address::tcp("localhost", 10809);
        echo_server(&server, at.clone());
        let outcome = b.executor.run(async move {
            client.sleep(Duration::from_millis(1)).await;
            let run = echo(client.clone(), at, 8000);
            match client.timeout(Duration::from_secs(60), run).await {
                None => "silent",
                Some(Ok(8000)) => "whole",
                Some(Ok(_)) => "short",
                Some(Err(e)) if e.errno() == 111 => "refused",
                Some(Err(_)) => "reset",
            }
        });
        *outcomes.entry(outcome).or_default() += 1;
    }
    for expected in ["silent", "whole", "refused", "reset"] {
        assert!(outcomes.get(expected).is_some_and(|n| *n >= 10), "{outcomes:?}");
    }
}

/// A link that is cut is cut for who is just connecting, too: else somebody who was cut off is reached after it.
#[test]
fn a_connect_that_is_under_way_does_not_get_past_a_cut() {
    let b = bench(1, Profile::calm());
    let slow = Duration::from_millis(20);
    b.net.set_profile(NetProfile { latency: (slow, slow), ..NetProfile::calm() });
    let (server, _p) = b.start();
    let (client, _p2) = b.start();
    let at = Address::tcp("localhost", 10809);
    echo_server(&server, at.clone());
    let net = b.net.clone();
    b.executor.run(async move {
        client.sleep(Duration::from_millis(1)).await;
        for (what, reached) in [(" 10809", false), (" 7000", true)] {
            let cut = async {
                client.sleep(slow / 2).await;
                net.cut(what);
            };
            let (dial, ()) = futures_join(client.connect(&at), cut).await;
            assert_eq!(dial.is_ok(), reached, "{what}");
        }
    });
}

#[test]
fn a_seed_repeats_its_run_and_another_seed_does_not() {
    let run = |seed: u64| {
        let b = bench(seed, Profile::drawn(&mut Rng::new(seed)));
        b.host.adjust(|p| p.hang = 0.0);
        b.host.install("/d", Image::from_bytes(&[0; 65536]));
        let (env, _p) = b.start();
        for k in 0..4u64 {
            let e = env.clone();
            env.spawn("worker", async move {
                let Ok(f) = e.open(Path::new("/d"), rw()).await else { return };
                for i in 0..20 {
                    let _ = f.write((i * 4 + k) * 512, full(k as u8, 512)).await;
                    let _ = f.read(Span::new(0, 4096)).await;
                }
            });
        }
        b.executor.run(async move { env.sleep(Duration::from_secs(200)).await });
        b.machine.hash()
    };
    let hashes: std::collections::BTreeSet<u64> = (0..20).map(run).collect();
    // two seeds whose disks answer at once may well do the same
    assert!(hashes.len() > 15, "{}", hashes.len());
    assert!((0..20).all(|s| run(s) == run(s)));
}
