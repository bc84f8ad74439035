//! Walks over long and fragmented chains: what they say, and how often they ask.

use block::{BlockError, Data, ErrorKind, Extent, Io, Kind, Limits, ReqFlags, Span};
use env::Env;
use env::os::{OsConfig, start};
use graph::exclusion::Exclusion;
use graph::{Demand, Edge, Graph, Node, NodeCell, NodeDetails, NodeOptions, Parent, Role, walk};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

const LEN: u64 = 1 << 20;
const BLOCK: u64 = 512;

/// Holds every `every`th block, and nothing else; 0 is nothing at all.
struct Layer {
    every: u64,
    below: Option<Rc<Edge>>,
    asked: Rc<Cell<usize>>,
}

impl Node for Layer {
    fn driver(&self) -> &'static str {
        "layer"
    }
    fn len(&self) -> u64 {
        LEN
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        self.below.iter().cloned().collect()
    }
    fn backing(&self) -> Option<Rc<Edge>> {
        self.below.clone()
    }
    fn wants(&self, _: &Edge, _: Demand, _: bool) -> Demand {
        Demand::NOTHING
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move { Ok(Data::zeroes(at.len as usize)) })
    }
    fn write(&self, _: Span, _: Data, _: ReqFlags) -> Io<'_> {
        Box::pin(async { Err(BlockError::unsupported("nothing is written here")) })
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        self.write(at, Data::empty(), flags)
    }
    fn discard(&self, _: Span) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        self.asked.set(self.asked.get() + 1);
        let mut found: Vec<Extent> = Vec::new();
        let mut start = at.start;
        while start < at.end() {
            let block = start / BLOCK;
            let end = ((block + 1) * BLOCK).min(at.end());
            let held = self.every > 0 && block.is_multiple_of(self.every);
            let kind = if held { Kind::Data } else { Kind::Unallocated };
            match found.last_mut() {
                Some(last) if last.kind == kind => last.span.len += end - start,
                _ => found.push(Extent::new(Span::between(start, end), kind)),
            }
            start = end;
        }
        Box::pin(async move { Ok(found) })
    }
    fn copy_to<'a>(&'a self, at: Span, _: &'a NodeCell, _: u64) -> Io<'a, u64> {
        Box::pin(async move { Ok(at.len) })
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

/// A chain out of these layers, bottom first, and what counts the questions.
async fn chain(graph: &Graph, layers: &[u64]) -> (Rc<NodeCell>, Rc<Cell<usize>>) {
    let asked = Rc::new(Cell::new(0));
    let mut top: Option<Rc<NodeCell>> = None;
    for &every in layers {
        let below = match &top {
            Some(cell) => {
                let edge = graph.attach(cell, "backing", Role::Backing, Parent::opening(), Demand::NOTHING);
                Some(edge.await.expect("asks for nothing"))
            }
            None => None,
        };
        let node = Rc::new(Layer { every, below, asked: asked.clone() });
        let options = NodeOptions { monitor_owned: true, ..NodeOptions::default() };
        top = Some(graph.add(options, node).await.expect("added"));
    }
    (top.expect("a layer"), asked)
}

/// Walks to the end, as callers do.
async fn all(top: &Rc<NodeCell>) -> Vec<walk::ChainExtent> {
    let (mut found, mut at) = (Vec::new(), 0);
    while at < LEN {
        let part = walk::status(top, Span::between(at, LEN), None).await.expect("asked");
        at = part.last().expect("never nothing").span.end();
        found.extend(part);
    }
    found
}

#[test]
fn a_fragmented_overlay_is_asked_once_for_each_answer() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let (top, asked) = chain(&graph, &[1, 2]).await;
        let blocks = LEN / BLOCK;
        let found = all(&top).await;
        assert_eq!(found.len() as u64, blocks);
        for (i, e) in found.iter().enumerate() {
            let want = if i % 2 == 0 { 1 } else { 2 };
            assert_eq!((e.span, e.depth), (Span::new(i as u64 * BLOCK, BLOCK), want));
        }
        // Each hole asks the base once; the overlay is asked once for each stop of the walk.
        let limit = blocks as usize / 2 + 8;
        assert!(asked.get() <= limit, "{} questions for {blocks} blocks", asked.get());
    });
}

#[test]
fn a_chain_of_256_layers_asks_each_layer_once() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let mut layers = vec![0u64; 256];
        layers[0] = 1;
        let (top, asked) = chain(&graph, &layers).await;
        let found = all(&top).await;
        assert_eq!(found, [walk::ChainExtent { span: Span::new(0, LEN), kind: Kind::Data, depth: 256 }]);
        assert_eq!(asked.get(), 256);
    });
}

/// Old bytes that are being saved into an overlay: who asks where bytes lie waits, and is told of both layers as they were
/// at one time; nothing is copied behind the exclusion's back.
#[test]
fn a_walk_through_an_overlay_keeps_copies_of_old_bytes_away() {
    run(|env| async move {
        let graph = Graph::new(&env);
        let (top, asked) = chain(&graph, &[1, 0]).await;
        let readers = Exclusion::new(4096);
        top.exclude_copies(Some(readers.clone()));
        let saving = readers.begin_copy(Span::new(4096, 4096)).await;
        let walked = top.clone();
        let walking = env.spawn("walk", async move {
            let found = walk::status(&walked, Span::new(0, 8192), None).await.expect("asked");
            assert_eq!(
                found.iter().map(|e| (e.span, e.depth)).collect::<Vec<_>>(),
                [(Span::new(0, 8192), 2)]
            );
        });
        env.sleep(Duration::from_millis(5)).await;
        assert!(!walking.is_done() && asked.get() == 0);
        drop(saving);
        walking.join().await;
        assert_eq!((asked.get(), readers.claims()), (2, 0));

        let reader = graph.attach(&top, "reader", Role::Backing, Parent::opening(), Demand::NOTHING);
        let reader = reader.await.expect("asks for nothing");
        let copied = || reader.copy_onto(Span::new(0, 4096), &top, 0);
        assert_eq!(copied().await.expect_err("saved old bytes are read").kind(), ErrorKind::Unsupported);
        top.exclude_copies(None);
        assert_eq!(copied().await.expect("copied"), 4096);
    });
}
