//! Filters in a graph, where the order of things matters: who waits in a throttle, and what comes up while a guest writes.
//!
//! The throttles here allow so little that a request which really waits for its time does not end before the test does.

use block::{Data, Prealloc, ReqFlags, Span};
use drivers::filters::copy_on_read::CopyOnRead;
use drivers::filters::preallocate::{Preallocate, PreallocateOptions};
use drivers::filters::throttle::{Throttle, ThrottleGroup};
use drivers::filters::throttle_limits::Config;
use drivers::null::{NullNode, NullOptions};
use env::Env;
use env::os::{OsConfig, start};
use graph::gate::{Closed, Gated};
use graph::{Demand, Edge, Graph, Node, NodeCell, NodeOptions, Parent, Perms, Role};
use std::cell::RefCell;
use std::rc::Rc;

const MIB: u64 = 1 << 20;
const USER: Demand = Demand {
    needs: Perms::CONSISTENT_READ.with(Perms::WRITE).with(Perms::RESIZE),
    shares: Perms::CONSISTENT_READ.with(Perms::WRITE_UNCHANGED),
};

fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Env) -> F) {
    let executor = start(OsConfig::default());
    executor.run(test(executor.env()));
}

async fn add(graph: &Rc<Graph>, name: &str, node: Rc<dyn Node>) -> Rc<NodeCell> {
    let options = NodeOptions {
        name: Some(name.to_owned()),
        monitor_owned: true,
        discard: true,
        ..NodeOptions::default()
    };
    graph.add(options, node).await.expect("a node")
}

async fn null(graph: &Rc<Graph>, name: &str, size: u64) -> Rc<NodeCell> {
    let options = NullOptions { size, ..NullOptions::default() };
    add(graph, name, NullNode::open(graph.env(), options)).await
}

async fn below(graph: &Rc<Graph>, child: &Rc<NodeCell>) -> Rc<Edge> {
    graph.attach(child, "file", Role::Filtered, Parent::opening(), Demand::NOTHING).await.expect("an edge")
}

async fn user(graph: &Rc<Graph>, of: &Rc<NodeCell>) -> Rc<Edge> {
    graph.attach(of, "root", Role::Root, Parent::Backend("test".to_owned()), USER).await.expect("a user")
}

/// A disk behind a throttle of this group, and a user of it.
async fn throttled(graph: &Rc<Graph>, name: &str, group: &Rc<ThrottleGroup>) -> Rc<Edge> {
    let file = null(graph, &format!("{name}-file"), 64 * MIB).await;
    let node = Throttle::new(below(graph, &file).await, "g", group.clone());
    user(graph, &add(graph, name, node).await).await
}

fn slow(bps: i64) -> Config {
    let mut config = Config::default();
    config.limits[0].avg = bps;
    config
}

async fn settle(env: &Env) {
    for _ in 0..20 {
        env.yield_now().await;
    }
}

/// Starts a read of 1 MiB, which pushes `name` to `done` when it ends.
fn reader(
    env: &Env,
    edge: &Rc<Edge>,
    name: &'static str,
    done: &Rc<RefCell<Vec<&'static str>>>,
) -> env::TaskHandle {
    let (edge, done) = (edge.clone(), done.clone());
    env.spawn("reader", async move {
        edge.read(Span::new(0, MIB)).await.expect("a read");
        done.borrow_mut().push(name);
    })
}

#[test]
fn members_take_turns_and_a_changed_limit_lets_go_who_waits() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let group = ThrottleGroup::new(&env, slow(1));
        let (a, b) = (throttled(&graph, "a", &group).await, throttled(&graph, "b", &group).await);
        a.read(Span::new(0, MIB)).await.expect("the first goes at once");
        let done = Rc::new(RefCell::new(Vec::new()));
        let tasks = [("a1", &a), ("a2", &a), ("a3", &a), ("b1", &b), ("b2", &b)]
            .map(|(n, e)| reader(&env, e, n, &done));
        settle(&env).await;
        assert!(done.borrow().is_empty(), "{done:?} went");
        group.configure(Config::default());
        for t in &tasks {
            t.join().await;
        }
        // a went last, so it is b's turn
        assert_eq!(*done.borrow(), ["b1", "a1", "b2", "a2", "a3"]);
    });
}

#[test]
fn who_closes_a_gate_does_not_wait_for_the_throttle_and_a_dropped_request_leaves_no_trace() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let group = ThrottleGroup::new(&env, slow(1));
        let (a, b) = (throttled(&graph, "a", &group).await, throttled(&graph, "b", &group).await);
        a.read(Span::new(0, MIB)).await.expect("the first goes at once");
        let done = Rc::new(RefCell::new(Vec::new()));
        let gone = reader(&env, &a, "gone", &done);
        let drained = reader(&env, &a, "drained", &done);
        let waits = reader(&env, &b, "waits", &done);
        settle(&env).await;
        gone.cancel();
        assert!(!a.gate().is_closed() && a.in_flight() > 0);
        let closed = Closed::close(a.clone()).await;
        drained.join().await;
        settle(&env).await;
        assert_eq!(*done.borrow(), ["drained"], "the other member is not drained");
        drop(closed);
        assert_eq!(group.members(), 2);
        waits.cancel();
        settle(&env).await;
        assert_eq!(b.in_flight(), 0);
    });
}

#[test]
fn what_is_set_aside_is_not_seen_and_given_back() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let file = null(&graph, "file", MIB).await;
        let options = PreallocateOptions { align: MIB, size: 8 * MIB };
        let node = Preallocate::open(below(&graph, &file).await, options).expect("good options");
        let top = add(&graph, "p", node).await;
        let user = user(&graph, &top).await;
        user.resize(2 * MIB + 512, Prealloc::Off).await.expect("grown");
        assert_eq!((user.len(), file.node().len()), (2 * MIB + 512, 11 * MIB));
        user.resize(3 * MIB, Prealloc::Off).await.expect("grown into what is there");
        assert_eq!((user.len(), file.node().len()), (3 * MIB, 11 * MIB));
        user.read(Span::new(3 * MIB, 1)).await.expect_err("beyond the end");
        drop(user);
        graph.remove(&top).await.expect("closed");
        assert_eq!(file.node().len(), 3 * MIB);
    });
}

#[test]
fn copy_on_read_keeps_others_from_writing_past_it() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let file = null(&graph, "file", MIB).await;
        let top = add(&graph, "c", CopyOnRead::new(below(&graph, &file).await, None)).await;
        let through = user(&graph, &top).await;
        graph.ask(&through, Demand { shares: Perms::ALL, ..USER }).await.expect("it shares all");
        through.write(0, Data::zeroes(512), ReqFlags::NONE).await.expect("through the filter");
        let past = Demand { shares: Perms::ALL, ..USER };
        let past = graph.attach(&file, "root", Role::Root, Parent::Backend("past".to_owned()), past).await;
        assert!(past.expect_err("it could be overwritten").message().contains("Permission conflict"));
        assert_eq!(file.parents().len(), 1);
    });
}
