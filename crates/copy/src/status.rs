//! What a disk holds, through all its layers: data or zeroes.

use block::{Extent, Kind, Result, Span};
use graph::Edge;

/// The extents of `at` as a reader of `edge` sees them: each `Data` or `Zero`, covering `at` from its start, perhaps not
/// to its end.
pub async fn status(edge: &Edge, at: Span) -> Result<Vec<Extent>> {
    let mut list = Vec::new();
    for e in edge.status(at).await? {
        let kind = if e.reads_zero() { Kind::Zero } else { Kind::Data };
        Extent::push_merged(&mut list, Extent::new(e.span.intersect(&at), kind));
    }
    Ok(list)
}

/// As [`status`], but never nothing: where a driver says nothing everything may be data.
pub(crate) async fn status_some(edge: &Edge, at: Span) -> Result<Vec<Extent>> {
    let some = status(edge, at).await?;
    let nothing = some.last().is_none_or(|e| e.span.end() <= at.start);
    Ok(if nothing { vec![Extent::new(at, Kind::Data)] } else { some })
}

/// As [`status`], but covering `at` to its end.
pub async fn status_all(edge: &Edge, at: Span) -> Result<Vec<Extent>> {
    let mut list = Vec::new();
    let mut left = at;
    while !left.is_empty() {
        let some = status_some(edge, left).await?;
        let covered = some.last().map_or(left.end(), |e| e.span.end());
        some.into_iter().for_each(|e| Extent::push_merged(&mut list, e));
        left = Span::between(covered, left.end());
    }
    Ok(list)
}

/// What the topmost layer that is not a filter allocates: `Data` or `Zero`, and `Unallocated` for what is below. From
/// the start of `at`, perhaps not to its end.
pub async fn top_layer(edge: &Edge, at: Span) -> Result<Vec<Extent>> {
    let mut list = Vec::new();
    for e in edge.status(at).await? {
        let kind = if e.depth == 1 { e.kind } else { Kind::Unallocated };
        Extent::push_merged(&mut list, Extent::new(e.span.intersect(&at), kind));
    }
    Ok(list)
}
