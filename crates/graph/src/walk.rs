//! Walks over chains: filters and copy-on-write layers from the top down.
//!
//! What must stay true: a walk holds nothing while it waits but its place inside an overlay's [`crate::exclusion`], from before
//! it asks the overlay until it has asked the disk below (else old bytes saved in between would be missed); lengths differ between layers, and what lies past the
//! end of a lower layer reads as zero; every walk is bounded by the number of layers times the extents it is given.

use crate::Parent;
use crate::cell::NodeCell;
use block::{Extent, Kind, Result, Span};
use std::rc::Rc;

/// One run of equal status over a chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChainExtent {
    /// Where, in guest coordinates.
    pub span: Span,
    /// [`Kind::Data`], [`Kind::Zero`], or [`Kind::Unallocated`]: no layer of the walk says anything (it reads as zero if
    /// the walk went to the bottom).
    pub kind: Kind,
    /// The layer that decided: 1 is the top (filters do not count); 0 where none did.
    pub depth: u32,
}

impl ChainExtent {
    /// Whether the run reads as zero, for a walk that went to the bottom.
    pub fn reads_zero(&self) -> bool {
        self.kind != Kind::Data
    }

    fn push(list: &mut Vec<ChainExtent>, next: ChainExtent) {
        if next.span.is_empty() {
            return;
        }
        match list.last_mut() {
            Some(last)
                if last.kind == next.kind
                    && last.depth == next.depth
                    && last.span.end() == next.span.start =>
            {
                last.span.len += next.span.len;
            }
            _ => list.push(next),
        }
    }
}

/// The nodes from `top` down: `top` itself, what it filters or has as backing, and so on.
pub fn chain(top: &Rc<NodeCell>) -> Vec<Rc<NodeCell>> {
    let mut all = vec![top.clone()];
    let mut at = top.below();
    while let Some(cell) = at {
        at = cell.below();
        all.push(cell);
    }
    all
}

/// `cell`, or what lies behind the filters in front.
pub fn skip_filters(cell: &Rc<NodeCell>) -> Rc<NodeCell> {
    let mut at = cell.clone();
    while let Some(edge) = at.node().filtered() {
        at = edge.child();
    }
    at
}

/// Whether `node` is `top` or in the chain below it.
pub fn contains(top: &Rc<NodeCell>, node: &Rc<NodeCell>) -> bool {
    chain(top).iter().any(|c| c.id() == node.id())
}

/// Whether neither a node nor a job uses `cell` (exports may): QSD's "root block node".
pub fn is_root(cell: &NodeCell) -> bool {
    cell.parents().iter().all(|e| matches!(e.parent(), Parent::Backend(_)))
}

/// What the chain from `top` down to, not including, `base` says of `at`, from its start and perhaps not to its end, but
/// never nothing.
pub async fn status(top: &Rc<NodeCell>, at: Span, base: Option<&Rc<NodeCell>>) -> Result<Vec<ChainExtent>> {
    walk_down(Todo::Ask(top.clone(), at, 1), base, None).await
}

/// `inside`: an overlay whose readers keep copies of old bytes away, and whose exclusion the caller is in.
async fn walk_down(
    first: Todo,
    base: Option<&Rc<NodeCell>>,
    inside: Option<u64>,
) -> Result<Vec<ChainExtent>> {
    let mut out = Vec::new();
    // Runs that still have to be looked up, nearest last; bounded: each look splits one run into finitely many.
    let mut todo = vec![first];
    let mut asked = 0u32;
    while let Some(next) = todo.pop() {
        let (cell, span, depth) = match next {
            Todo::Ask(cell, span, depth) => (cell, span, depth),
            Todo::Known(known) => {
                ChainExtent::push(&mut out, known);
                if out.len() >= MAX_RUNS {
                    break;
                }
                continue;
            }
        };
        if span.is_empty() {
            continue;
        }
        if base.is_some_and(|b| b.id() == cell.id()) {
            ChainExtent::push(&mut out, ChainExtent { span, kind: Kind::Unallocated, depth: 0 });
            continue;
        }
        if inside != Some(cell.id())
            && let Some(readers) = cell.readers()
        {
            let _inside = readers.begin_read(span).await;
            let ask = Todo::Ask(cell.clone(), span, depth);
            let found = Box::pin(walk_down(ask, base, Some(cell.id()))).await?;
            let covered = found.last().map_or(span.start, |e| e.span.end());
            todo.push(Todo::Ask(cell, Span::between(covered, span.end()), depth));
            todo.extend(found.into_iter().rev().map(Todo::Known));
            continue;
        }
        if let Some(edge) = cell.node().filtered() {
            // It says nothing, but a filter for tests may fail.
            cell.extents(span).await?;
            todo.push(Todo::Ask(edge.child(), span, depth));
            continue;
        }
        let len = cell.node().len();
        if span.start >= len {
            ChainExtent::push(&mut out, ChainExtent { span, kind: Kind::Zero, depth });
            continue;
        }
        let inside = span.intersect(&Span::between(0, len));
        asked += 1;
        if asked.is_multiple_of(ASKS_AT_ONCE) {
            env::sync::yield_now().await;
        }
        let found = cell.extents(inside).await?;
        let covered = found.last().map_or(inside.start, |e| e.span.end());
        if covered < inside.end() {
            // The layer stopped early; the remainder is asked for after what it said is decided.
            todo.push(Todo::Ask(cell.clone(), Span::between(covered, span.end()), depth));
        } else if span.end() > len {
            todo.push(Todo::Ask(cell.clone(), Span::between(len, span.end()), depth));
        }
        push_found(&cell, &found, depth, &mut todo);
        if out.len() >= MAX_RUNS {
            // What is out is complete from the start of `at`; the caller asks again from its end.
            break;
        }
    }
    Ok(out)
}

/// Layers asked before others get their turn: a long chain that has its tables in memory answers without ever waiting.
const ASKS_AT_ONCE: u32 = 64;

/// Runs after which a walk stops; the caller asks again for the rest.
const MAX_RUNS: usize = 1024;

/// What a walk has still to do.
enum Todo {
    /// Ask this node, at this depth, about a run.
    Ask(Rc<NodeCell>, Span, u32),
    /// A run that a layer decided, behind one that is not decided yet.
    Known(ChainExtent),
}

/// Stacks what a layer said, nearest last. Each answer is kept, so that no layer is asked twice about one run.
fn push_found(cell: &Rc<NodeCell>, found: &[Extent], depth: u32, todo: &mut Vec<Todo>) {
    let below = cell.below();
    for e in found.iter().rev() {
        todo.push(match &below {
            Some(below) if e.kind == Kind::Unallocated => Todo::Ask(below.clone(), e.span, depth + 1),
            _ => {
                let depth = if e.kind == Kind::Unallocated { 0 } else { depth };
                Todo::Known(ChainExtent { span: e.span, kind: e.kind, depth })
            }
        });
    }
}
