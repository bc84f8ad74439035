//! What a client learns of an export beside its bytes: block sizes and metadata contexts.

use super::session::Session;
use crate::export::Export;
use block::{Kind, Limits, Result, Span};
use graph::Edge;
use nbd::StatusExtent;
use nbd::proto::{MAX_PAYLOAD, MAX_STATUS_EXTENTS, PREFERRED_BLOCK, state};
use std::rc::Rc;

/// Id of `base:allocation`: always offered.
const ALLOCATION: u32 = 0;

/// Names of the contexts of an export; the index is the id.
pub(super) fn contexts(export: &Export) -> Vec<String> {
    let mut v = vec!["base:allocation".to_owned()];
    if export.options().allocation_depth {
        v.push("qemu:allocation-depth".to_owned());
    }
    v
}

/// Smallest, preferred and largest request.
pub(super) fn block_sizes(l: &Limits) -> (u32, u32, u32) {
    let min = l.request_alignment.clamp(1, u64::from(PREFERRED_BLOCK)) as u32;
    let max = if l.max_transfer == 0 { MAX_PAYLOAD } else { l.max_transfer.min(MAX_PAYLOAD) };
    (min, PREFERRED_BLOCK.max(min), (max as u32 & !(min - 1)).max(min))
}

/// The extents of `span` in each of `contexts`; one extent each if `one`.
pub(super) async fn query(
    s: &Session,
    span: Span,
    contexts: &[u32],
    one: bool,
) -> Result<Vec<(u32, Vec<StatusExtent>)>> {
    let limit = if one { 1 } else { MAX_STATUS_EXTENTS };
    let mut lists: Vec<(u32, Extents)> = contexts.iter().map(|id| (*id, Extents::new(limit))).collect();
    let mut left = span;
    while !left.is_empty() && lists.iter().any(|(_, l)| !l.full) {
        let runs = layers(s.export().edge(), left).await?;
        for run in runs {
            for (id, list) in &mut lists {
                list.push(run.len, if *id == ALLOCATION { run.state() } else { run.depth });
            }
            left = left.split_at(run.len).1;
        }
    }
    Ok(lists.into_iter().map(|(id, l)| (id, l.list)).collect())
}

/// A list that joins equal neighbours and takes no more once it is full.
struct Extents {
    list: Vec<StatusExtent>,
    limit: usize,
    full: bool,
}

impl Extents {
    fn new(limit: usize) -> Extents {
        Extents { list: Vec::new(), limit, full: false }
    }
    fn push(&mut self, len: u64, flags: u64) {
        if self.full {
            return;
        }
        let count = self.list.len();
        match self.list.last_mut() {
            Some(last) if last.flags == flags => last.len += len,
            _ if count == self.limit => self.full = true,
            _ => self.list.push(StatusExtent { len, flags }),
        }
    }
}

/// A run of a chain: which layer says what.
#[derive(Clone, Copy)]
struct Run {
    len: u64,
    kind: Kind,
    /// 1 for the top layer; 0 if no layer says anything.
    depth: u64,
}

impl Run {
    fn state(&self) -> u64 {
        match self.kind {
            Kind::Data => 0,
            Kind::Zero | Kind::Unallocated => state::HOLE | state::ZERO,
        }
    }
}

/// The runs of `span` through the chain below `edge`, from its start on, perhaps not to its end.
async fn layers(edge: &Rc<Edge>, span: Span) -> Result<Vec<Run>> {
    let (mut edge, mut depth) = (edge.clone(), 1);
    let mut span = span;
    loop {
        let node = edge.child().node().clone();
        if let Some(below) = node.filtered() {
            edge = below;
            continue;
        }
        if span.start >= node.len() {
            return Ok(vec![Run { len: span.len, kind: Kind::Zero, depth: 0 }]);
        }
        span = Span::between(span.start, span.end().min(node.len()));
        let extents = edge.extents(span).await?;
        let mut runs = Vec::with_capacity(extents.len());
        for e in &extents {
            if e.kind == Kind::Unallocated && node.backing().is_some() {
                break;
            }
            let d = if e.kind == Kind::Unallocated { 0 } else { depth };
            runs.push(Run { len: e.span.len, kind: e.kind, depth: d });
        }
        if !runs.is_empty() || extents.is_empty() {
            return Ok(runs);
        }
        span = extents[0].span;
        match node.backing() {
            Some(below) => edge = below,
            None => return Ok(runs),
        }
        depth += 1;
    }
}
