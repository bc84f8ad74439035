//! Reads past layers that have nothing: what they give, what they wait for, and that they are taken. `LIVEBLK_SEED` sets the first
//! seed of the random chains, `LIVEBLK_HISTORIES` how many.

#![allow(clippy::unwrap_used)] // a test helper that fails fails the test

mod disk;
mod peer;

use block::{Kind, Prealloc, ReqFlags, Span};
use disk::run;
use env::Env;
use futures_util::future::{join, join_all};
use graph::exclusion::Exclusion;
use graph::{Demand, Edge, Graph, NodeCell, NodeOptions, Parent, Perms, Plan, Role, Step};
use peer::TempDir;
use qcow2::testing::file::LateNode;
use qcow2::testing::history::Rng;
use qcow2::{Options, Qcow2};
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

const SECTOR: u64 = 512;
const ALL: Demand = Demand { needs: Perms::ALL, shares: Perms::ALL };

/// A layer: the image, and somebody who may do anything with it.
struct Layer {
    cell: Rc<NodeCell>,
    user: Rc<Edge>,
    /// Reads of its file wait while this is set.
    hold: Rc<Cell<bool>>,
}

async fn layer(env: &Env, graph: &Rc<Graph>, path: &str, name: &str, seed: u64) -> Layer {
    let file = env.open(Path::new(path), env::OpenMode { write: true, ..Default::default() }).await.unwrap();
    let late = LateNode::new(env, file, seed, &Rc::default());
    let hold = late.hold_reads.clone();
    let below = NodeOptions { name: Some(format!("f{name}")), discard: true, ..NodeOptions::default() };
    let below = graph.add(below, late).await.unwrap();
    let file = graph.attach(&below, "file", Role::Primary, Parent::opening(), ALL).await.unwrap();
    let image = Qcow2::open(env.clone(), file, None, Options::default()).await.unwrap();
    let options = NodeOptions {
        name: Some(name.to_owned()),
        monitor_owned: true,
        discard: true,
        ..NodeOptions::default()
    };
    let cell = graph.add(options, image).await.unwrap();
    let user = graph.attach(&cell, "root", Role::Root, Parent::Backend("test".into()), ALL).await.unwrap();
    Layer { cell, user, hold }
}

/// Puts `below` (or nothing) below `above`.
async fn set_below(graph: &Rc<Graph>, above: &Rc<NodeCell>, below: Option<&Rc<NodeCell>>) {
    let edge = match below {
        None => None,
        Some(below) => {
            let demand = Demand { needs: Perms::NONE, shares: Perms::ALL };
            let parent = Parent::opening();
            Some(graph.attach_exact(below, "backing", Role::Backing, parent, demand).await.unwrap())
        }
    };
    graph.apply(Plan::new().then(Step::SetBacking { node: above.clone(), edge })).await.unwrap();
}

/// What each layer holds by itself, sector by sector, and what is below it.
#[derive(Clone)]
struct Model {
    own: Vec<Vec<Option<u8>>>,
    below: Vec<Option<usize>>,
}

impl Model {
    fn get(&self, layer: usize, sector: usize) -> u8 {
        let mut at = Some(layer);
        while let Some(n) = at {
            match self.own[n].get(sector) {
                None => return 0,
                Some(Some(v)) => return *v,
                Some(None) => at = self.below[n],
            }
        }
        0
    }
    fn len(&self, layer: usize) -> u64 {
        self.own[layer].len() as u64
    }
}

struct World {
    graph: Rc<Graph>,
    layers: Vec<Layer>,
    model: RefCell<Model>,
    rng: RefCell<Rng>,
}

impl World {
    fn below(&self, n: u64) -> u64 {
        self.rng.borrow_mut().below(n)
    }

    /// Some sectors of a disk of `len`.
    fn some(&self, len: u64) -> (u64, u64) {
        let start = self.below(len);
        let most = [1, 8, 100, 600][self.below(4) as usize];
        (start, 1 + self.below(most.min(len - start)))
    }

    /// A layer that is not above `n`, directly or further up.
    fn not_above(&self, n: usize) -> Option<usize> {
        (n + 1 < self.layers.len()).then(|| n + 1 + self.below((self.layers.len() - n - 1) as u64) as usize)
    }

    /// One change, made to the model, and to the images by the future.
    fn change(&self, value: u8) -> std::pin::Pin<Box<dyn Future<Output = ()> + '_>> {
        let n = self.below(self.layers.len() as u64) as usize;
        let layer = &self.layers[n];
        let len = self.model.borrow().len(n);
        match self.below(16) {
            0..=7 => {
                let (start, count) = self.some(len);
                let value = if self.below(4) == 0 { 0 } else { value };
                self.model.borrow_mut().own[n][start as usize..(start + count) as usize].fill(Some(value));
                let at = Span::new(start * SECTOR, count * SECTOR);
                Box::pin(async move {
                    let flags = ReqFlags { may_unmap: true, ..ReqFlags::NONE };
                    match value {
                        0 => layer.user.zero(at, flags).await.unwrap(),
                        v => {
                            layer.user.write(at.start, vec![v; at.len as usize].into(), flags).await.unwrap()
                        }
                    }
                })
            }
            8 => {
                self.model.borrow_mut().own[n].fill(None);
                Box::pin(async move { layer.cell.node().make_empty().await.unwrap() })
            }
            9..=12 => {
                let to = if self.below(4) == 0 { None } else { self.not_above(n) };
                self.model.borrow_mut().below[n] = to;
                Box::pin(async move {
                    set_below(&self.graph, &layer.cell, to.map(|to| &self.layers[to].cell)).await;
                })
            }
            13 => {
                let readers = (self.below(2) == 0).then(|| Exclusion::new(65536));
                Box::pin(async move { layer.cell.exclude_copies(readers) })
            }
            _ => {
                // Longer than before it reads as zeroes there, and shorter it forgets.
                let new = 1 + self.below(len * 2).min(3000);
                self.model.borrow_mut().own[n].resize(new as usize, Some(0));
                let direct = self.below(2) == 0;
                Box::pin(async move {
                    let len = new * SECTOR;
                    if direct {
                        layer.user.resize(len, Prealloc::Off).await.unwrap();
                    } else {
                        let ok = |_: &Rc<NodeCell>| Ok::<(), block::BlockError>(());
                        self.graph.resize(&layer.cell, len, Prealloc::Off, ok).await.unwrap();
                    }
                })
            }
        }
    }

    /// Reads something that is there before and after a change: each sector is as it was or as it is to be.
    async fn read(&self, before: &Model, after: &Model) {
        let n = self.below(3).min(self.layers.len() as u64 - 1) as usize;
        let (start, count) = self.some(before.len(n).min(after.len(n)));
        let got = self.layers[n].user.read(Span::new(start * SECTOR, count * SECTOR)).await.unwrap().to_vec();
        for (i, sector) in got.chunks(SECTOR as usize).enumerate() {
            let at = start as usize + i;
            let (a, b) = (before.get(n, at), after.get(n, at));
            assert!(
                sector.iter().all(|v| *v == sector[0]) && [a, b].contains(&sector[0]),
                "layer {n}, sector {at}: {} is neither {a} nor {b}",
                sector[0]
            );
        }
    }

    /// Takes over what layers say of themselves: a cluster is filled with what was below, a layer that grew has nothing where
    /// nothing is below. What is read stays the same.
    async fn look_again(&self) {
        let known = self.model.borrow().clone();
        for (n, layer) in self.layers.iter().enumerate() {
            let len = known.len(n) * SECTOR;
            let mut pos = 0;
            while pos < len {
                for e in layer.user.extents(Span::between(pos, len)).await.unwrap() {
                    for at in (e.span.start / SECTOR) as usize..(e.span.end() / SECTOR) as usize {
                        let seen = known.get(n, at);
                        let own = (e.kind != Kind::Unallocated).then_some(seen);
                        self.model.borrow_mut().own[n][at] = own;
                        let now = self.model.borrow().get(n, at);
                        assert_eq!(now, seen, "layer {n}, sector {at} was lost");
                    }
                    pos = e.span.end();
                }
            }
        }
    }
}

fn history(what: &str, seed: u64, steps: u64) {
    let mut rng = Rng(seed);
    let dir = TempDir::new(&format!("shortcuts-{what}-{seed}"));
    let layers = 3 + rng.below(6) as usize;
    let mut files = Vec::new();
    for n in 0..layers {
        let options = rng.of(&[
            "cluster_size=64k",
            "cluster_size=4k",
            "cluster_size=512",
            "cluster_size=16k,extended_l2=on",
        ]);
        let sectors = if rng.one_in(3) { 1 + rng.below(3000) } else { 3000 };
        files.push((dir.create(&n.to_string(), options, &(sectors * SECTOR).to_string()), sectors as usize));
    }
    run(|env| async move {
        let graph = Graph::new(&env);
        let mut all = Vec::new();
        for (n, (path, _)) in files.iter().enumerate() {
            all.push(layer(&env, &graph, path, &format!("n{n}"), seed + n as u64).await);
        }
        for n in 1..layers {
            set_below(&graph, &all[n - 1].cell, Some(&all[n].cell)).await;
        }
        let own = files.iter().map(|(_, sectors)| vec![None; *sectors]).collect();
        let below = (0..layers).map(|n| Some(n + 1).filter(|n| *n < layers)).collect();
        let w =
            World { graph, layers: all, model: RefCell::new(Model { own, below }), rng: RefCell::new(rng) };
        for step in 0..steps {
            let before = w.model.borrow().clone();
            let changing = w.change((1 + step % 250) as u8);
            let after = w.model.borrow().clone();
            let reads = (0..w.below(6)).map(|_| w.read(&before, &after));
            join(changing, join_all(reads)).await;
            w.look_again().await;
            let now = w.model.borrow().clone();
            join_all((0..4).map(|_| w.read(&now, &now))).await;
        }
        for layer in &w.layers {
            layer.cell.exclude_copies(None);
        }
    });
}

/// The first seed that fails, and why.
fn hunt(what: &str, seeds: std::ops::Range<u64>, steps: u64) -> Option<(u64, String)> {
    seeds.into_iter().find_map(|seed| {
        let e = catch_unwind(AssertUnwindSafe(|| history(what, seed, steps))).err()?;
        let text = e.downcast_ref::<String>().cloned();
        Some((seed, text.or(e.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or_default()))
    })
}

#[test]
fn chains_that_change_read_as_the_model() {
    let number =
        |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let (first, n) = (number("LIVEBLK_SEED", 1), number("LIVEBLK_HISTORIES", 20));
    if let Some((seed, why)) = hunt("model", first..first + n, 60) {
        panic!("LIVEBLK_SEED={seed}: {why}");
    }
}

#[test]
fn what_is_not_told_is_found_out() {
    for bug in [
        "qcow2: shortcuts are not told of a mapping",
        "qcow2: shortcuts are not told of a new length",
        "graph: shortcuts pass closed gates",
    ] {
        env::bugs::plant(Some(bug));
        let found = hunt("planted", 1..60, 60);
        env::bugs::plant(None);
        let (seed, why) = found.unwrap_or_else(|| panic!("not found: {bug}"));
        assert!(why.contains("neither") || why.contains("was lost"), "{bug}: seed {seed}: {why}");
    }
}

/// A chain of `n` equal layers of 1 MiB of which the lowest but one holds 1 and the lowest 2 (in the second half).
async fn chain(env: &Env, graph: &Rc<Graph>, dir: &TempDir, n: usize) -> Vec<Layer> {
    let mut layers = Vec::new();
    for i in 0..n {
        let path = dir.create(&i.to_string(), "cluster_size=64k", "1M");
        layers.push(layer(env, graph, &path, &format!("n{i}"), 1).await);
    }
    for i in 1..n {
        set_below(graph, &layers[i - 1].cell, Some(&layers[i].cell)).await;
    }
    for (i, at, v) in [(n - 2, 0, 1u8), (n - 1, 512 << 10, 2)] {
        layers[i].user.write(at, vec![v; 512 << 10].into(), ReqFlags::NONE).await.unwrap();
    }
    layers
}

async fn byte(edge: &Edge, at: u64) -> u8 {
    let data = edge.read(Span::new(at, 4096)).await.unwrap().to_vec();
    assert!(data.iter().all(|b| *b == data[0]));
    data[0]
}

#[test]
fn layers_that_have_nothing_are_asked_once() {
    let dir = TempDir::new("shortcut-once");
    run(|env| async move {
        let graph = Graph::new(&env);
        let layers = chain(&env, &graph, &dir, 8).await;
        let reads = || layers.iter().map(|l| l.cell.counters().reads).collect::<Vec<_>>();
        assert_eq!((byte(&layers[0].user, 0).await, byte(&layers[0].user, 768 << 10).await), (1, 2));
        let before = reads();
        for _ in 0..10 {
            assert_eq!((byte(&layers[0].user, 4096).await, byte(&layers[0].user, 768 << 10).await), (1, 2));
        }
        let more: Vec<u64> = reads().iter().zip(&before).map(|(a, b)| a - b).collect();
        assert_eq!(more, [20, 0, 0, 0, 0, 0, 10, 10]);
        // of a read that several layers answer each gives its part
        let whole = layers[0].user.read(Span::new(0, 1 << 20)).await.unwrap().to_vec();
        assert!(whole[..512 << 10].iter().all(|b| *b == 1) && whole[512 << 10..].iter().all(|b| *b == 2));
        assert_eq!(reads()[1], before[1]);
        // and what a layer gets is seen
        layers[3].user.write(4096, vec![9; 100].into(), ReqFlags::NONE).await.unwrap();
        assert_eq!(layers[0].user.read(Span::new(4000, 200)).await.unwrap().to_vec()[95..197], {
            let mut want = [1u8; 102];
            want[1..101].fill(9);
            want
        });
    });
}

/// Whether `work` ends within many turns of everybody else.
async fn ends(env: &Env, mut work: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
    for _ in 0..200 {
        let done = poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx).is_ready())).await;
        if done {
            return true;
        }
        env.yield_now().await;
    }
    false
}

#[test]
fn a_gate_waits_for_reads_on_shortcuts_below_it_and_for_no_others() {
    let dir = TempDir::new("shortcut-gate");
    run(|env| async move {
        let graph = Graph::new(&env);
        let layers = chain(&env, &graph, &dir, 8).await;
        let top = layers[0].user.clone();
        for round in 0..2 {
            assert_eq!(byte(&top, 0).await, 1);
            layers[6].hold.set(true);
            let mut read = pin!(async { assert_eq!(byte(&top, 0).await, 1) });
            assert!(!ends(&env, read.as_mut()).await, "the file holds it");
            // between the layer that the read is in and the lowest: nobody is inside
            let mut below = pin!(set_below(&graph, &layers[6].cell, None));
            if round == 0 {
                let mut lowest = pin!(async { drop(graph.quiesce(&layers[7].cell, &[]).await) });
                assert!(ends(&env, lowest.as_mut()).await, "nobody is in the lowest layer");
                let mut between = pin!(async { drop(graph.quiesce(&layers[3].cell, &[]).await) });
                assert!(!ends(&env, between.as_mut()).await, "the read is inside the edge onto n3");
                // nobody else is kept waiting longer than that
                layers[6].hold.set(false);
                read.await;
                between.await;
                continue;
            }
            assert!(!ends(&env, below.as_mut()).await, "the read is inside the edge onto n6");
            layers[6].hold.set(false);
            read.await;
            below.await;
        }
        assert_eq!((byte(&top, 0).await, byte(&top, 768 << 10).await), (1, 0));
        // a layer that left the chain is not kept
        let id = layers[3].cell.id();
        let weak = Rc::downgrade(&layers[3].cell);
        set_below(&graph, &layers[2].cell, Some(&layers[4].cell)).await;
        let mut layers = layers;
        let gone = layers.remove(3);
        drop(gone.user);
        graph.remove(&gone.cell).await.unwrap();
        drop(gone.cell);
        assert!(weak.upgrade().is_none(), "somebody holds node {id}");
        assert_eq!(byte(&top, 0).await, 1);
    });
}
