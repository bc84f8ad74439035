//! What a disk holds, through all its layers: data or zeroes.

use block::{Extent, Io, Kind, Result, Span};
use graph::Edge;
use std::rc::Rc;

/// Layers walked before giving up: more than any chain that can be opened, so that a loop ends.
const MAX_DEPTH: u32 = 4096;

/// The extents of `at` as a reader of `edge` sees them: each `Data` or `Zero`, covering `at` from its start, perhaps not
/// to its end.
pub async fn status(edge: &Edge, at: Span) -> Result<Vec<Extent>> {
    walk(edge, at, 0).await
}

/// As [`status`], but covering `at` to its end.
pub async fn status_all(edge: &Edge, at: Span) -> Result<Vec<Extent>> {
    let mut list = Vec::new();
    let mut left = at;
    while !left.is_empty() {
        let some = status(edge, left).await?;
        let covered = some.last().map_or(left.start, |e| e.span.end());
        if covered <= left.start {
            // a driver that says nothing: everything may be data
            Extent::push_merged(&mut list, Extent::new(left, Kind::Data));
            break;
        }
        some.into_iter().for_each(|e| Extent::push_merged(&mut list, plain(e.span, e.kind)));
        left = Span::between(covered, left.end());
    }
    Ok(list)
}

/// What the topmost layer that is not a filter allocates: `Data` or `Zero`, and `Unallocated` for what is below. From
/// the start of `at`, perhaps not to its end.
pub async fn top_layer(edge: &Edge, at: Span) -> Result<Vec<Extent>> {
    match edge.child().node().filtered() {
        Some(below) => Box::pin(top_layer(&below, at)).await,
        None => edge.extents(at).await,
    }
}

fn plain(span: Span, kind: Kind) -> Extent {
    Extent::new(span, if kind == Kind::Data { Kind::Data } else { Kind::Zero })
}

fn walk(edge: &Edge, at: Span, depth: u32) -> Io<'_, Vec<Extent>> {
    Box::pin(async move {
        let below = {
            let cell = edge.child();
            cell.node().filtered().or_else(|| cell.node().backing())
        };
        let mut list = Vec::new();
        for e in edge.extents(at).await? {
            let e = Extent { span: e.span.intersect(&at), ..e };
            if e.kind != Kind::Unallocated || depth >= MAX_DEPTH {
                let kind = if depth >= MAX_DEPTH { Kind::Data } else { e.kind };
                Extent::push_merged(&mut list, plain(e.span, kind));
            } else if !deeper(&mut list, below.as_ref(), e.span, depth).await? {
                break; // a lower layer stopped early
            }
        }
        Ok(list)
    })
}

/// Appends what the layers below say of `at`; whether they covered all of it.
async fn deeper(list: &mut Vec<Extent>, below: Option<&Rc<Edge>>, at: Span, depth: u32) -> Result<bool> {
    let len = below.map_or(0, |b| b.len());
    let inside = at.intersect(&Span::new(0, len));
    let mut end = at.start;
    if let Some(b) = below
        && !inside.is_empty()
    {
        for x in walk(b, inside, depth + 1).await? {
            end = x.span.end();
            Extent::push_merged(list, x);
        }
        if end < inside.end() {
            return Ok(false);
        }
    }
    // past the end of a shorter layer: zeroes
    Extent::push_merged(list, Extent::new(Span::between(end, at.end()), Kind::Zero));
    Ok(true)
}
