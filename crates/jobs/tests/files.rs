//! Mirrors between real files, compared by QEMU's own tool.
#![allow(missing_docs, clippy::unwrap_used)]

use block::{Data, ReqFlags};
use env::Env;
use graph::{Demand, Edge, Graph, Parent, Perms, Role};
use jobs::{CopyMode, MirrorArgs, NoSink, Registry, State, mirror};
use open::{NodeSpec, Opener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

fn scratch(name: &str) -> PathBuf {
    let base = if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
    let dir = base.join(format!("liveblk-jobs-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {args:?}: {text}");
    text
}

/// A raw file with data in the first `data` bytes of `len`, the rest a hole.
fn raw(path: &Path, len: u64, data: u64) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(len).unwrap();
    let block: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 | 1).collect();
    for i in 0..data >> 20 {
        std::os::unix::fs::FileExt::write_all_at(&file, &block, i << 20).unwrap();
    }
}

async fn client(graph: &Graph, node: &str) -> Rc<Edge> {
    let needs = Perms::CONSISTENT_READ.with(Perms::WRITE);
    let shares = needs.with(Perms::WRITE_UNCHANGED);
    let cell = graph.find(node).unwrap();
    graph
        .attach(&cell, "root", Role::Root, Parent::Backend("e".into()), Demand { needs, shares })
        .await
        .unwrap()
}

fn mirrored(src: NodeSpec, dst: NodeSpec, mode: CopyMode, guest: bool) -> Duration {
    let executor = env::os::start(env::os::OsConfig::default());
    let env: Env = executor.env();
    executor.run(async move {
        let graph = Graph::new(&env);
        let opener = Opener::new(&graph);
        let s = opener.open(&src.named("src")).await.unwrap();
        let d = opener.open(&dst.named("dst")).await.unwrap();
        s.set_monitor_owned(true);
        d.set_monitor_owned(true);
        let edge = client(&graph, "src").await;
        let registry = Registry::new(&env, Rc::new(NoSink));
        let writer = edge.clone();
        let len = edge.len();
        let writes = Rc::new(std::cell::RefCell::new(Vec::new()));
        let (log, e) = (writes.clone(), env.clone());
        let task = guest.then(|| {
            env.spawn("guest", async move {
                let mut x: u64 = 99;
                loop {
                    x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let at = (x >> 20) % (len / 4096) * 4096;
                    let begun = Instant::now();
                    writer.write(at, Data::from(vec![(x >> 50) as u8; 4096]), ReqFlags::NONE).await.unwrap();
                    log.borrow_mut().push((at, (x >> 50) as u8, begun.elapsed()));
                    e.sleep(Duration::from_micros(100)).await;
                }
            })
        });
        let mut args = MirrorArgs::new("m0", "src", "dst");
        args.copy_mode = mode;
        let begun = Instant::now();
        let job = mirror::start(&registry, &graph, args).await.unwrap();
        job.reached(State::Ready).await;
        assert_eq!(job.state(), State::Ready, "{:?}", job.error());
        let took = begun.elapsed();
        if guest {
            env.sleep(Duration::from_millis(200)).await;
        }
        registry.complete(&job).unwrap();
        job.concluded().await;
        assert!(job.error().is_none(), "{:?}", job.error());
        if let Some(task) = task {
            env.sleep(Duration::from_millis(50)).await;
            task.cancel();
        }
        assert_eq!(edge.child().name(), "dst");
        // all that the guest wrote, before and after the pivot, is on the target
        let all = writes.borrow().clone();
        let last: std::collections::BTreeMap<u64, u8> = all.iter().map(|w| (w.0, w.1)).collect();
        for (at, fill) in last.iter().take(2000) {
            let got = edge.read(block::Span::new(*at, 4096)).await.unwrap();
            assert!(got == Data::from(vec![*fill; 4096]), "at {at}");
        }
        let mut times: Vec<Duration> = all.iter().map(|w| w.2).collect();
        times.sort();
        if let (Some(mid), Some(late)) = (times.get(times.len() / 2), times.get(times.len() * 99 / 100)) {
            println!(
                "guest {mode:?}: {} writes, p50 {mid:?} p99 {late:?} max {:?}",
                times.len(),
                times[times.len() - 1]
            );
        }
        drop((edge, job));
        registry.cancel_all().await;
        graph.close_all().await.unwrap();
        took
    })
}

#[test]
fn raw_to_raw_is_equal_sparse_and_measured() {
    let dir = scratch("raw");
    let (s, d) = (dir.join("s.raw"), dir.join("d.raw"));
    let data = std::env::var("MIB").ok().and_then(|m| m.parse().ok()).unwrap_or(64u64) << 20;
    raw(&s, 8 << 30, data);
    raw(&d, 8 << 30, 0);
    let spec = |p: &Path| NodeSpec::file(p.to_str().unwrap()).raw();
    let took = mirrored(spec(&s), spec(&d), CopyMode::Background, false);
    println!(
        "raw to raw {} MiB of data in 8 GiB: {took:?}, {:.0} MB/s",
        data >> 20,
        data as f64 / took.as_secs_f64() / 1e6
    );
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", s.to_str().unwrap(), d.to_str().unwrap()]);
    let blocks = |p: &Path| std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(p).unwrap());
    assert!(blocks(&d) <= blocks(&s) + 64, "holes stay holes");
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn every_mode_under_a_writing_client() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking, CopyMode::ReadWriteBlocking] {
        let dir = scratch(&format!("modes-{}", mode.name()));
        let (s, d) = (dir.join("s.raw"), dir.join("d.qcow2"));
        raw(&s, 256 << 20, 128 << 20);
        run("qemu-img", &["create", "-q", "-f", "qcow2", d.to_str().unwrap(), "256M"]);
        let took = mirrored(
            NodeSpec::file(s.to_str().unwrap()).raw(),
            NodeSpec::file(d.to_str().unwrap()).qcow2(),
            mode,
            true,
        );
        println!("raw to qcow2 {mode:?}: ready after {took:?}");
        run("qemu-img", &["check", "-q", d.to_str().unwrap()]);
        std::fs::remove_dir_all(dir).unwrap();
    }
}

/// A raw file in which each 512 bytes say where they are.
fn stamped(path: &Path, len: u64) {
    let bytes: Vec<u8> = (0..len / 8).flat_map(|i| ((i / 64) << 8 | 1).to_le_bytes()).collect();
    std::fs::write(path, bytes).unwrap();
}

/// A chain of three layers with plain, packed and zero clusters, longer than its backing files and of an odd length.
fn layered(dir: &Path) -> PathBuf {
    let (plain, base, middle, top) =
        (dir.join("plain"), dir.join("base"), dir.join("middle"), dir.join("top.qcow2"));
    stamped(&plain, 20 << 20);
    let s = |p: &Path| p.to_str().unwrap().to_owned();
    run("qemu-img", &["convert", "-q", "-f", "raw", "-O", "qcow2", &s(&plain), &s(&base)]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &s(&base), "-F", "qcow2", &s(&middle), "24M"]);
    let writes =
        ["write -q -P 7 3M 2M", "write -q -c -P 9 6M 64k", "write -q -z 8M 1M", "write -q -P 11 21M 1M"];
    writes.iter().for_each(|w| drop(run("qemu-io", &["-f", "qcow2", "-c", w, &s(&middle)])));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &s(&middle), "-F", "qcow2", &s(&top), "31461888"]);
    let writes =
        ["write -q -P 13 12M 3M", "write -q -P 15 4100k 4k", "write -q -P 17 30M 4608", "discard -q 13M 64k"];
    writes.iter().for_each(|w| drop(run("qemu-io", &["-f", "qcow2", "-c", w, &s(&top)])));
    top
}

#[test]
fn layered_disks_are_copied_from_file_to_file() {
    let dir = scratch("layers");
    let top = layered(&dir);
    let (from, len) = (top.to_str().unwrap().to_owned(), "31461888");
    for (n, options) in
        ["", "cluster_size=512", "cluster_size=2M", "extended_l2=on", "data_file"].iter().enumerate()
    {
        let to = dir.join(format!("to{n}.qcow2")).to_str().unwrap().to_owned();
        let mut create = vec!["create", "-q", "-f", "qcow2"];
        let outside = format!("data_file={to}.data");
        match *options {
            "" => {}
            "data_file" => create.extend(["-o", &outside]),
            o => create.extend(["-o", o]),
        }
        create.extend([to.as_str(), len]);
        run("qemu-img", &create);
        mirrored(NodeSpec::file(&from).qcow2(), NodeSpec::file(&to).qcow2(), CopyMode::Background, false);
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", &from, &to]);
        run("qemu-img", &["check", "-q", &to]);
    }
    let to = dir.join("to.raw").to_str().unwrap().to_owned();
    run("qemu-img", &["create", "-q", "-f", "raw", &to, len]);
    mirrored(NodeSpec::file(&from).qcow2(), NodeSpec::file(&to).raw(), CopyMode::Background, false);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &from, &to]);
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_qcow2_disk_hands_on_where_its_bytes_lie() {
    let dir = scratch("hand-on");
    let (top, to) = (layered(&dir), dir.join("to.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", to.to_str().unwrap(), "31461888"]);
    let executor = env::os::start(env::os::OsConfig::default());
    let env: Env = executor.env();
    let (from, onto) = (top.to_str().unwrap().to_owned(), to.to_str().unwrap().to_owned());
    executor.run(async move {
        let graph = Graph::new(&env);
        let opener = Opener::new(&graph);
        for (path, name) in [(&from, "src"), (&onto, "dst")] {
            let node = opener.open(&NodeSpec::file(path).qcow2().named(name)).await.unwrap();
            node.set_monitor_owned(true);
        }
        let (a, b) = (client(&graph, "src").await, client(&graph, "dst").await);
        let mib = |start: u64, len: u64| block::Span::new(start << 20, len << 20);
        // (where, what can be handed on from there): the lowest layer, the middle one, the top; zeroes, packed, nothing
        for (at, expected) in [
            (mib(0, 1), 1 << 20),
            (mib(3, 1), 1 << 20),
            (mib(4, 1), 0),
            (mib(12, 1), 1 << 20),
            (mib(11, 4), 1 << 20),
            (mib(8, 1), 0),
            (block::Span::new(6 << 20, 64 << 10), 0),
            (mib(26, 1), 0),
        ] {
            let copied = a.copy_to(at, &b, at.start).await.unwrap();
            assert_eq!(copied, expected, "{at}");
            let done = block::Span::new(at.start, copied);
            assert!(a.read(done).await.unwrap() == b.read(done).await.unwrap(), "{at}");
        }
        drop((a, b));
        graph.close_all().await.unwrap();
    });
    run("qemu-img", &["check", "-q", to.to_str().unwrap()]);
    std::fs::remove_dir_all(dir).unwrap();
}
