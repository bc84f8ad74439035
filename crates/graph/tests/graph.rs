//! The graph in one process: gates, range locks, permissions over real nodes, plans under load, reshaped requests.
//!
//! Nodes are the real null and file drivers, and one in-memory node of its own that is slow and picky about alignment.

use block::{Data, ErrorKind, Extent, Io, Kind, Limits, ReqFlags, Result, Span};
use drivers::null::{NullNode, NullOptions};
use env::Env;
use env::os::{OsConfig, start};
use env::sync::RangeLocks;
use graph::gate::{Closed, Gate, Gated};
use graph::{
    Demand, Edge, Graph, Node, NodeCell, NodeDetails, NodeOptions, Parent, Perms, Plan, Role, Step, walk,
};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Bytes in memory, with an alignment, and a pause in each request so that requests overlap.
struct Memory {
    env: Env,
    bytes: RefCell<Vec<u8>>,
    align: u64,
    max: u64,
    busy: Cell<usize>,
    busiest: Cell<usize>,
}

impl Memory {
    fn new(env: &Env, len: usize, align: u64, max: u64) -> Rc<Memory> {
        Rc::new(Memory {
            env: env.clone(),
            bytes: RefCell::new(vec![0; len]),
            align,
            max,
            busy: Cell::new(0),
            busiest: Cell::new(0),
        })
    }
    async fn pause(&self) {
        self.busy.set(self.busy.get() + 1);
        self.busiest.set(self.busiest.get().max(self.busy.get()));
        for _ in 0..self.env.random() % 4 {
            self.env.yield_now().await;
        }
        self.busy.set(self.busy.get() - 1);
    }
    fn check(&self, at: Span) {
        assert!(at.is_aligned(self.align), "{at:?} is not aligned");
        assert!(self.max == 0 || at.len <= self.max, "{at:?} is too long");
    }
}

impl Node for Memory {
    fn driver(&self) -> &'static str {
        "memory"
    }
    fn len(&self) -> u64 {
        self.bytes.borrow().len() as u64
    }
    fn limits(&self) -> Limits {
        Limits { request_alignment: self.align, max_transfer: self.max, ..Limits::default() }
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        Vec::new()
    }
    fn wants(&self, _: &Edge, _: Demand, _: bool) -> Demand {
        Demand::NOTHING
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        self.check(at);
        Box::pin(async move {
            self.pause().await;
            Ok(Data::copy_from(&self.bytes.borrow()[at.start as usize..at.end() as usize]))
        })
    }
    fn write(&self, at: Span, data: Data, _: ReqFlags) -> Io<'_> {
        self.check(at);
        Box::pin(async move {
            self.pause().await;
            data.copy_to(&mut self.bytes.borrow_mut()[at.start as usize..at.end() as usize]);
            Ok(())
        })
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        self.write(at, Data::zeroes(at.len as usize), flags)
    }
    fn discard(&self, at: Span) -> Io<'_> {
        self.check(at);
        Box::pin(async { Ok(()) })
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move { Ok(vec![Extent::new(at, Kind::Data)]) })
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn set_writable(&self, _: bool) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async { Ok(NodeDetails::default()) })
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Env) -> F) {
    let executor = start(OsConfig::default());
    executor.run(test(executor.env()));
}

const CR: Perms = Perms::CONSISTENT_READ;
const RW: Demand = Demand { needs: CR.with(Perms::WRITE), shares: Perms::ALL };

async fn add(graph: &Graph, name: &str, node: Rc<dyn Node>) -> Rc<NodeCell> {
    let options = NodeOptions { name: Some(name.into()), monitor_owned: true, ..NodeOptions::default() };
    graph.add(options, node).await.expect("a good name")
}

async fn root(graph: &Graph, cell: &Rc<NodeCell>, demand: Demand) -> Result<Rc<Edge>> {
    graph.attach(cell, "root", Role::Root, Parent::Backend("test".into()), demand).await
}

#[test]
fn a_gate_lets_those_inside_finish_and_keeps_others_out() {
    struct Door(Gate);
    impl Gated for Door {
        fn gate(&self) -> &Gate {
            &self.0
        }
    }
    run(|env| async move {
        let door = Rc::new(Door(Gate::new()));
        let order = Rc::new(RefCell::new(Vec::new()));
        let inside = door.0.enter().await;
        let (d, o) = (door.clone(), order.clone());
        let closing = env.spawn("close", async move {
            let closed = Closed::close(d).await;
            o.borrow_mut().push("closed");
            drop(closed);
        });
        env.yield_now().await;
        let (d, o) = (door.clone(), order.clone());
        let late = env.spawn("late", async move {
            let _pass = d.0.enter().await;
            o.borrow_mut().push("late");
        });
        env.yield_now().await;
        assert!(order.borrow().is_empty());
        drop(inside);
        closing.join().await;
        late.join().await;
        assert_eq!(*order.borrow(), ["closed", "late"]);
        // a closer that gives up half way leaves the gate open
        let held = door.0.enter().await;
        let (d, e) = (door.clone(), env.clone());
        assert!(e.timeout(Duration::from_millis(1), Closed::close(d)).await.is_none());
        assert!(!door.0.is_closed());
        drop(held);
    });
}

#[test]
fn overlapping_exclusive_ranges_never_run_together_and_others_do() {
    run(|env| async move {
        let locks = Rc::new(RangeLocks::new());
        let held: Rc<RefCell<Vec<(Span, bool)>>> = Rc::default();
        let together = Rc::new(Cell::new(0));
        let mut tasks = Vec::new();
        for i in 0..300u64 {
            let (locks, held, env2, together) = (locks.clone(), held.clone(), env.clone(), together.clone());
            let (span, exclusive) =
                (Span::new(env.random() % 64, 1 + env.random() % 16), env.random() % 2 == 0);
            let gives_up = i % 7 == 0;
            tasks.push(env.spawn("locker", async move {
                let taking = locks.lock(span, exclusive);
                if gives_up {
                    let _ = env2.timeout(Duration::ZERO, taking).await;
                    return;
                }
                let lock = taking.await;
                for (other, other_exclusive) in held.borrow().iter() {
                    assert!(
                        !(other.overlaps(&span) && (exclusive || *other_exclusive)),
                        "{span:?} with {other:?}"
                    );
                }
                held.borrow_mut().push((span, exclusive));
                together.set(together.get().max(held.borrow().len()));
                env2.yield_now().await;
                held.borrow_mut().retain(|h| *h != (span, exclusive));
                drop(lock);
            }));
        }
        for t in &tasks {
            t.join().await;
        }
        assert_eq!(locks.claims(), 0);
        assert!(together.get() > 2, "nothing ran in parallel");
    });
}

#[test]
fn unaligned_requests_are_reshaped_and_do_not_tear_each_other() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let memory = Memory::new(&env, 64 * 512, 512, 1024);
        let cell = add(&graph, "m", memory.clone()).await;
        let edge = root(&graph, &cell, RW).await.expect("nobody else");
        // 400 writers, each with bytes of its own: neighbours in one sector must not undo each other.
        let mut tasks = Vec::new();
        for i in 0..400u64 {
            let edge = edge.clone();
            tasks.push(env.spawn("writer", async move {
                let data = Data::copy_from(&[(i % 251 + 1) as u8; 80]);
                edge.write(i * 80, data, ReqFlags::NONE).await.expect("inside");
            }));
        }
        for t in &tasks {
            t.join().await;
        }
        assert!(memory.busiest.get() > 1, "writes to other sectors run in parallel");
        for i in 0..400u64 {
            let read = edge.read(Span::new(i * 80, 80)).await.expect("inside").to_vec();
            assert_eq!(read, [(i % 251 + 1) as u8; 80], "writer {i}");
        }
        edge.zero(Span::new(100, 1000), ReqFlags::NONE).await.expect("inside");
        assert!(edge.read(Span::new(100, 1000)).await.expect("inside").is_zero());
        assert_eq!(edge.read(Span::new(99, 1)).await.expect("inside").to_vec(), [2]);
        let e = edge.read(Span::new(64 * 512 - 1, 2)).await.expect_err("past the end");
        assert_eq!(e.kind(), ErrorKind::OutOfRange);
        let e = edge.write(64 * 512, Data::zeroes(1), ReqFlags::NONE).await.expect_err("past the end");
        assert_eq!(e.errno(), block::BlockError::ENOSPC);
    });
}

#[test]
fn bitmaps_have_every_change_before_it_is_acknowledged() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let options = NodeOptions { name: Some("m".into()), discard: true, ..NodeOptions::default() };
        let cell = graph.add(options, Memory::new(&env, 1 << 20, 1, 0)).await.expect("a good name");
        let ignoring = add(&graph, "i", Memory::new(&env, 1 << 20, 1, 0)).await;
        let edge = root(&graph, &cell, RW).await.expect("nobody else");
        let new = || Rc::new(bitmap::DirtyBitmap::new(None, 1 << 20, 65536).expect("a good granularity"));
        let (bitmap, none) = (new(), new());
        cell.add_bitmap(bitmap.clone());
        ignoring.add_bitmap(none.clone());
        edge.write(70000, Data::copy_from(b"x"), ReqFlags::NONE).await.expect("inside");
        edge.discard(Span::new(200_000, 1)).await.expect("inside");
        let other = root(&graph, &ignoring, RW).await.expect("nobody else");
        other.discard(Span::new(200_000, 100_000)).await.expect("inside");
        assert_eq!(none.bits().dirty_bytes(), 0, "a discard that is ignored changes nothing");
        assert_eq!(bitmap.bits().next_dirty(0), Some(65536));
        assert_eq!(bitmap.bits().dirty_bytes(), 2 * 65536);
        // a write whose future is dropped may land all the same
        drop(env.timeout(Duration::ZERO, edge.write(500_000, Data::zeroes(1), ReqFlags::NONE)).await);
        assert!(bitmap.bits().get(500_000));
    });
}

#[test]
fn permissions_are_those_of_the_result_and_come_back_when_a_parent_goes() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let cell = add(&graph, "d", NullNode::open(&env, NullOptions::default())).await;
        let alone = root(&graph, &cell, Demand { needs: CR, shares: CR }).await.expect("nobody else");
        let e = root(&graph, &cell, RW).await.expect_err("the first does not share writes");
        assert!(
            e.message().starts_with("Permission conflict on node 'd': permissions 'write' are both required"),
            "{e}"
        );
        let denied = alone.write(0, Data::zeroes(1), ReqFlags::NONE).await.expect_err("it only reads");
        assert_eq!(denied.kind(), ErrorKind::ReadOnly);
        drop(alone);
        root(&graph, &cell, RW).await.expect("nobody is left");
        assert_eq!(graph.remove(&cell).await.map_err(|e| e.kind()), Ok(()));
        assert!(graph.find("d").is_none());
    });
}

#[test]
fn names_are_checked_as_qsd_does() {
    run(|env| async move {
        let graph = Graph::new(&env);
        add(&graph, "a", NullNode::open(&env, NullOptions::default())).await;
        let text = |name: &str| graph.check_name(name).expect_err(name).message().to_owned();
        assert_eq!(text("a"), "Duplicate nodes with node-name='a'");
        assert_eq!(text("9bad"), "Invalid node-name: '9bad'");
        assert_eq!(text(""), "Invalid node-name: ''");
        assert_eq!(text(&"x".repeat(32)), "Node name too long");
        graph.check_name(&"x".repeat(31)).expect("31 is the limit");
    });
}

#[test]
fn a_plan_moves_a_client_under_load_without_losing_a_write() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let (a, b) = (Memory::new(&env, 4096, 1, 0), Memory::new(&env, 4096, 1, 0));
        let (ca, cb) = (add(&graph, "a", a.clone()).await, add(&graph, "b", b.clone()).await);
        let edge = root(&graph, &ca, RW).await.expect("nobody else");
        let done = Rc::new(Cell::new(false));
        let mut tasks = Vec::new();
        for i in 0..8u64 {
            let (edge, done, env2) = (edge.clone(), done.clone(), env.clone());
            tasks.push(env.spawn("client", async move {
                while !done.get() {
                    edge.write(i * 512, Data::copy_from(&[7; 512]), ReqFlags::NONE).await.expect("inside");
                    env2.yield_now().await;
                }
            }));
        }
        for round in 0..20 {
            let (from, to) = if round % 2 == 0 { (&ca, &cb) } else { (&cb, &ca) };
            let busy = if round % 2 == 0 { &a } else { &b };
            let step = Step::MoveParents { from: from.clone(), to: to.clone(), except: Vec::new() };
            graph.apply(Plan::new().then(step)).await.expect("nothing is in the way");
            assert_eq!(busy.busy.get(), 0, "a request was still inside the node that was left");
            assert_eq!(edge.child().name(), to.name());
            env.sleep(Duration::from_micros(200)).await;
        }
        done.set(true);
        for t in &tasks {
            t.join().await;
        }
    });
}

#[test]
fn whoever_attaches_to_a_covered_node_gets_the_filter() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let source = add(&graph, "src", Memory::new(&env, 4096, 1, 0)).await;
        let early = root(&graph, &source, RW).await.expect("nobody else");
        let parent = Parent::Node(RefCell::new(Some("top".into())));
        let below = graph
            .attach_exact(&source, "backing", Role::Filtered, parent, Demand::NOTHING)
            .await
            .expect("nothing asked");
        let filter = add(&graph, "top", drivers::filters::mirror_top::MirrorTop::new(below)).await;
        let plan = Plan::new()
            .then(Step::MoveParents { from: source.clone(), to: filter.clone(), except: Vec::new() })
            .then(Step::Cover { node: source.clone(), filter: Some(filter.clone()) });
        graph.apply(plan).await.expect("nothing is in the way");
        assert_eq!(early.child().name(), "top");
        let late = root(&graph, &source, RW).await.expect("nothing is in the way");
        assert_eq!(late.child().name(), "top");
        assert_eq!(walk::skip_filters(&late.child()).name(), "src");
        assert_eq!(walk::chain(&filter).len(), 2);
        assert!(!walk::is_root(&source) && walk::is_root(&filter));
        let back = Plan::new()
            .then(Step::MoveParents { from: filter.clone(), to: source.clone(), except: Vec::new() })
            .then(Step::Cover { node: source.clone(), filter: None });
        graph.apply(back).await.expect("nothing is in the way");
        assert_eq!(late.child().name(), "src");
    });
}

#[test]
fn a_refused_plan_changes_nothing() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let a = add(&graph, "a", NullNode::open(&env, NullOptions::default())).await;
        let b = add(&graph, "b", NullNode::open(&env, NullOptions::default())).await;
        let writer = root(&graph, &a, RW).await.expect("nobody else");
        let _reader = root(&graph, &b, Demand { needs: CR, shares: CR }).await.expect("nobody else");
        let step = Step::MoveParents { from: a.clone(), to: b.clone(), except: Vec::new() };
        graph.apply(Plan::new().then(step)).await.expect_err("b's reader does not share writes");
        assert_eq!(writer.child().name(), "a");
        assert_eq!(a.parents().len(), 1);
        writer.write(0, Data::zeroes(1), ReqFlags::NONE).await.expect("as before");
    });
}

#[test]
fn whoever_waits_to_attach_while_a_filter_comes_gets_the_filter() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let slow = NullOptions { latency: Duration::from_millis(400), ..NullOptions::default() };
        let source = add(&graph, "src", NullNode::open(&env, slow)).await;
        let early = root(&graph, &source, RW).await.expect("nobody else");
        let parent = Parent::Node(RefCell::new(Some("top".into())));
        let below = graph
            .attach_exact(&source, "backing", Role::Filtered, parent, Demand::NOTHING)
            .await
            .expect("nothing asked");
        let filter = add(&graph, "top", drivers::filters::mirror_top::MirrorTop::new(below)).await;
        let plan = Plan::new()
            .then(Step::MoveParents { from: source.clone(), to: filter.clone(), except: Vec::new() })
            .then(Step::Cover { node: source.clone(), filter: Some(filter.clone()) });
        // A request inside keeps the plan waiting, and the plan keeps the newcomer waiting.
        let client = early.clone();
        let write = env.spawn("client", async move {
            client.write(0, Data::zeroes(512), ReqFlags::NONE).await.expect("inside");
        });
        env.sleep(Duration::from_millis(1)).await;
        let changing = graph.clone();
        let change = env.spawn("plan", async move {
            changing.apply(plan).await.expect("nothing is in the way");
        });
        env.sleep(Duration::from_millis(1)).await;
        assert_eq!(early.in_flight(), 1, "the plan is still waiting");
        let late = root(&graph, &source, RW).await.expect("nothing is in the way");
        assert_eq!(late.child().name(), "top", "its writes would pass the job by");
        write.join().await;
        change.join().await;
    });
}

#[test]
fn a_removed_node_takes_no_parents_and_is_not_closed_again() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let a = add(&graph, "a", Memory::new(&env, 4096, 1, 0)).await;
        graph.remove(&a).await.expect("nobody uses it");
        let e = root(&graph, &a, RW).await.expect_err("it is closed");
        assert_eq!((e.kind(), e.message()), (ErrorKind::NotFound, "node 'a' is not in the graph any more"));
        assert_eq!(graph.remove(&a).await.expect_err("it is closed").kind(), ErrorKind::NotFound);
    });
}

#[test]
fn a_refused_removal_leaves_the_node_to_its_owner() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let a = add(&graph, "a", Memory::new(&env, 4096, 1, 0)).await;
        let user = root(&graph, &a, RW).await.expect("nobody else");
        let e = graph.remove(&a).await.expect_err("it is used by now");
        assert_eq!(e.message(), "Node a is in use");
        assert!(a.is_monitor_owned(), "its owner lost it");
        let refused = graph.remove_if(&a, |_| Err(block::BlockError::invalid("no"))).await;
        assert_eq!(refused.expect_err("refused").message(), "no");
        assert!(a.is_monitor_owned() && graph.find("a").is_some());
        drop(user);
        graph.remove(&a).await.expect("nobody uses it");
    });
}

#[test]
fn whoever_attaches_during_a_resize_waits_for_its_end() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let slow = NullOptions { latency: Duration::from_millis(400), ..NullOptions::default() };
        let cell = add(&graph, "n", NullNode::open(&env, slow)).await;
        let client = root(&graph, &cell, RW).await.expect("nobody else");
        let write = env.spawn("client", async move {
            client.write(0, Data::zeroes(512), ReqFlags::NONE).await.expect("inside");
        });
        env.sleep(Duration::from_millis(1)).await;
        let (g, c) = (graph.clone(), cell.clone());
        let ended = Rc::new(Cell::new(false));
        let e = ended.clone();
        let resizing = env.spawn("resize", async move {
            let r = g.resize(&c, 0, block::Prealloc::Off, |_| Ok::<_, block::BlockError>(())).await;
            e.set(true);
            r.expect("shared");
        });
        env.sleep(Duration::from_millis(1)).await;
        assert!(!ended.get(), "a request is still inside");
        root(&graph, &cell, RW).await.expect("shared");
        assert!(ended.get(), "the newcomer came in while the length was being changed");
        write.join().await;
        resizing.join().await;
        let alone = Demand { needs: CR, shares: Perms::ALL.without(Perms::RESIZE) };
        let _export = root(&graph, &cell, alone).await.expect("nobody else");
        let e = graph.resize(&cell, 0, block::Prealloc::Off, |_| Ok::<_, block::BlockError>(())).await;
        assert!(e.expect_err("unshared").message().contains("permissions 'resize' are both required"));
    });
}
