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
