//! A disk as of one instant, under random clients, readers, releases, checkpoints, failures and a copy of it all. Whatever
//! is read of the instant is what the disk held then; everything ends (a deadlock stops the simulated clock, which is an
//! error). Each run is a function of its seed: `SEED=n cargo test -p copy --test instant` repeats one.
#![allow(missing_docs, clippy::unwrap_used)]

mod world;

use block::{BlockError, Data, ReqFlags, Span};
use copy::{Engine, KeepRules, Next, OnError, OnSaveError, OnWrite, PointInTime, Policy, Standing, Work};
use drivers::filters::copy_before_write::{CopyBeforeWrite, Keeper};
use env::Env;
use graph::{Graph, Node};
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;
use world::{Desk, Mem, Rng, edge, simulate};

struct World {
    _graph: Rc<Graph>,
    env: Env,
    source: Rc<Mem>,
    target: Rc<Mem>,
    node: Rc<CopyBeforeWrite>,
    point: Rc<PointInTime>,
    work: Rc<Work>,
    /// What the disk held at the instant.
    then: RefCell<Vec<u8>>,
    clients: Cell<u32>,
    good_reads: Cell<u32>,
}

struct All;

impl Policy for All {
    fn guest_write(&self, _: Span) -> OnWrite {
        OnWrite::Pass
    }
    fn pass_over(&self, standing: Standing) -> Next {
        if standing.clean { Next::Done } else { Next::Again }
    }
}

async fn world(env: &Env, rng: &mut Rng, rules: KeepRules) -> Rc<World> {
    let graph = Graph::new(env);
    let len = rng.between(4, 160) * 4096 + *rng.choose(&[0, 512, 1000]);
    let granularity = *rng.choose(&[4096, 16384, 65536]);
    let (source, target) = (Mem::new(env, len), Mem::new(env, len));
    for b in 0..len / 4096 {
        if rng.chance(0.7) {
            source.put(b * 4096, &[(b % 251 + 1) as u8; 4096], true);
        }
        target.put(b * 4096, &[0xee; 4096], true);
    }
    let (file, kept) =
        (edge(&graph, "source", source.clone()).await, edge(&graph, "target", target.clone()).await);
    let work = Work::new(env.clone(), len, granularity).unwrap();
    let node = CopyBeforeWrite::new(file.clone(), kept.clone());
    let rules = KeepRules { most: rules.most * granularity, ..rules };
    let point = PointInTime::new(work.clone(), file, kept, rules);
    point.begin_all();
    node.set_keeper(Some(point.clone()));
    let then = RefCell::new(source.bytes.borrow().clone());
    let (clients, good_reads) = (Cell::new(0), Cell::new(0));
    Rc::new(World {
        _graph: graph,
        env: env.clone(),
        source,
        target,
        node,
        point,
        work,
        then,
        clients,
        good_reads,
    })
}

fn somewhere(rng: &mut Rng, len: u64) -> Span {
    let start = rng.below(len);
    let most = *rng.choose(&[512, 4096, 20_000, 150_000]);
    Span::new(start, rng.between(1, most).min(len - start))
}

/// A client of the disk.
async fn client(w: Rc<World>, mut rng: Rng, requests: u32) {
    for _ in 0..requests {
        let at = somewhere(&mut rng, w.source.len());
        let _ = match rng.below(6) {
            0 => w.node.zero(at, ReqFlags { may_unmap: true, ..ReqFlags::NONE }).await,
            1 => w.node.discard(at).await,
            2 => w.node.read(at).await.map(|_| ()),
            _ => {
                let fill = rng.draw() as u8;
                w.node.write(at, Data::from(vec![fill; at.len as usize]), ReqFlags::NONE).await
            }
        };
        if rng.chance(0.2) {
            w.env.sleep(Duration::from_micros(rng.below(800))).await;
        }
    }
    w.clients.set(w.clients.get() - 1);
}

/// A reader of the instant. What it is given is what was there then.
async fn reader(w: Rc<World>, mut rng: Rng) {
    while w.clients.get() > 0 {
        let at = somewhere(&mut rng, w.source.len());
        if let Ok(data) = w.point.read(at).await {
            let then = &w.then.borrow()[at.start as usize..at.end() as usize];
            assert!(data.to_vec() == then, "read {at} of the instant: not what was there");
            w.good_reads.set(w.good_reads.get() + 1);
        }
        if let Ok(extents) = w.point.extents(at).await {
            let zero = extents.iter().filter(|e| e.kind != block::Kind::Data);
            for span in zero.map(|e| e.span) {
                let then = &w.then.borrow()[span.start as usize..span.end() as usize];
                assert!(block::is_zero(then), "{span} of the instant is not zero");
            }
        }
        w.env.sleep(Duration::from_micros(rng.below(300))).await;
    }
}

/// Somebody who wants parts of the instant no longer, or a new one.
async fn manager(w: Rc<World>, mut rng: Rng, checkpoints: bool) {
    while w.clients.get() > 0 {
        w.env.sleep(Duration::from_micros(rng.below(1500))).await;
        if checkpoints && rng.chance(0.3) {
            let now = w.clone();
            w.point.checkpoint(move || *now.then.borrow_mut() = now.source.bytes.borrow().clone()).await;
        } else {
            let _ = w.point.release(somewhere(&mut rng, w.source.len()).align_out(65536)).await;
        }
    }
    // those who wait for space would wait for ever
    let _ = w.point.release(Span::new(0, w.source.len())).await;
}

async fn history(env: Env, mut rng: Rng) {
    let rules = KeepRules {
        on_error: *rng.choose(&[OnSaveError::FailChange, OnSaveError::LoseInstant]),
        wait_when_full: rng.chance(0.5),
        most: *rng.choose(&[0, 0, 40, 80]),
        timeout: rng.chance(0.2).then(|| Duration::from_millis(2)),
        ..KeepRules::default()
    };
    let w = world(&env, &mut rng, rules).await;
    if rng.chance(0.3) {
        w.target.fail_writes.set((rng.between(5, 60), BlockError::EIO));
    }
    let copies = !rules.wait_when_full && rules.most == 0 && rng.chance(0.5);
    let count = rng.between(1, 5) as u32;
    w.clients.set(count);
    let mut tasks = Vec::new();
    for _ in 0..count {
        tasks.push(env.spawn("client", client(w.clone(), rng.fork("client"), 40)));
    }
    for _ in 0..2 {
        tasks.push(env.spawn("reader", reader(w.clone(), rng.fork("reader"))));
    }
    if copies {
        let desk = Desk::new();
        desk.on_target.set(OnError::Ignore);
        let (file, kept) = (w.node.file().clone(), w.node.target().clone());
        let mut engine = Engine::new(w.work.clone(), file, kept, Rc::new(All), desk, 1 << 20);
        engine.run().await.unwrap();
        if w.point.lost().is_none() {
            assert!(
                *w.target.bytes.borrow() == *w.then.borrow(),
                "the copy is not the disk as of the instant"
            );
        }
    } else {
        let checkpoints = rng.chance(0.5);
        tasks.push(env.spawn("manager", manager(w.clone(), rng.fork("manager"), checkpoints)));
    }
    while tasks.iter().any(|t| !t.is_done()) {
        env.sleep(Duration::from_millis(1)).await;
    }
    w.point.end();
    assert!(w.point.read(Span::new(0, 1)).await.is_err(), "an instant that is over");
}

#[test]
fn random_histories() {
    let one: Option<u64> = std::env::var("SEED").ok().and_then(|s| s.parse().ok());
    let seeds = one.map_or(1..601, |s| s..s + 1);
    for seed in seeds {
        let run = catch_unwind(AssertUnwindSafe(|| simulate(seed, history)));
        assert!(run.is_ok(), "SEED={seed}");
    }
}
