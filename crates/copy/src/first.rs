//! What is dirty at the start: all, what is allocated somewhere, what the top layer holds, nothing.
//!
//! The guest writes meanwhile; its writes are marked dirty by the tap, which must be in place before. Scanning only ever
//! *adds* dirty bits, and what is prepared on the target (zeroes) is prepared before any copy, while no guest write
//! goes to the target.

use crate::status::{status, top_layer};
use crate::work::Work;
use block::{BlockError, ErrorKind, Kind, ReqFlags, Result, Span};
use graph::{Edge, NodeCell, walk};
use std::rc::Rc;

/// Bytes zeroed in one step; between steps other tasks run and the job can be paused or cancelled.
const STEP: u64 = 1 << 30;
/// Bytes asked about in one step. What nobody allocated costs nothing however much it is; an answer has a bounded number of extents,
/// and making it gives others their turn by itself.
pub(crate) const ASK: u64 = 1 << 36;

/// Marks all that the source's layers hold as data. For a target that reads as zero where nothing is copied.
pub async fn mark_data(work: &Work, source: &Edge) -> Result<()> {
    let zeroed = work.zeroed.get();
    scan(work, source, false).await?;
    work.data_of.set(Some(zeroed));
    Ok(())
}

/// Marks all that the top layer of the source holds (data and zeroes).
pub async fn mark_top(work: &Work, source: &Edge) -> Result<()> {
    scan(work, source, true).await
}

async fn scan(work: &Work, source: &Edge, top: bool) -> Result<()> {
    each(work, source, Span::new(0, work.len()), top, |at| work.mark(at)).await
}

/// Calls `take` for all that the top layer of the source holds (data and zeroes) in `at`.
pub async fn each_of_top(work: &Work, source: &Edge, at: Span, take: impl FnMut(Span)) -> Result<()> {
    each(work, source, at, true, take).await
}

async fn each(work: &Work, source: &Edge, at: Span, top: bool, mut take: impl FnMut(Span)) -> Result<()> {
    let mut left = at;
    while !left.is_empty() {
        let (step, _) = left.split_at(ASK);
        let found = if top { top_layer(source, step).await? } else { status(source, step).await? };
        let mut end = left.start;
        for e in found {
            if e.kind == Kind::Data || (top && e.kind == Kind::Zero) {
                take(e.span);
            }
            end = e.span.end();
        }
        if end <= left.start {
            take(step);
            end = step.end();
        }
        left = Span::between(end, left.end());
        work.env.yield_now().await;
    }
    Ok(())
}

/// Whether the target certainly reads as zero throughout. Stops at the first data.
pub async fn reads_as_zero(work: &Work, target: &Edge) -> Result<bool> {
    let mut left = Span::new(0, work.len());
    while !left.is_empty() {
        let (step, _) = left.split_at(ASK);
        let found = status(target, step).await?;
        let end = found.last().map_or(left.start, |e| e.span.end());
        if end <= left.start || found.iter().any(|e| e.kind == Kind::Data) {
            return Ok(false);
        }
        left = Span::between(end, left.end());
        work.env.yield_now().await;
    }
    Ok(true)
}

/// Makes the whole target read as zero, giving its space back; in steps. Behind links it is so for certain: flushed.
pub async fn zero_target(work: &Work, target: &Edge) -> Result<()> {
    let begun = work.moment();
    for step in Span::new(0, work.len()).pieces(STEP) {
        target.zero(step, ReqFlags { may_unmap: true, ..ReqFlags::NONE }).await?;
        work.env.yield_now().await;
    }
    if begun.is_some() {
        target.flush().await?;
    }
    if begun != work.moment() {
        return Err(BlockError::new(ErrorKind::Disconnected, "the link to the target was lost"));
    }
    Ok(())
}

/// Marks what the layers of the source above `base` (all layers if there is none) hold and a copy down to `base`, or up into the
/// top layer, has to bring there: data, and zeroes where `base` does not read as zero. With `below_top` the top layer does
/// not count.
pub async fn mark_above(
    work: &Work,
    source: &Edge,
    base: Option<&Rc<NodeCell>>,
    below_top: bool,
) -> Result<()> {
    let mut left = Span::new(0, work.len().min(source.len()));
    while !left.is_empty() {
        let (step, _) = left.split_at(ASK);
        let found = source.status_above(step, base).await?;
        let mut end = left.start;
        for e in found {
            end = e.span.end();
            match e.kind {
                _ if e.depth <= u32::from(below_top) => {}
                Kind::Data => work.mark(e.span),
                Kind::Zero => mark_unless_zero(work, e.span, base).await?,
                Kind::Unallocated => {}
            }
        }
        if end <= left.start {
            return Err(BlockError::invalid(format!("no block status of {step}")));
        }
        left = Span::between(end, left.end());
        work.env.yield_now().await;
    }
    Ok(())
}

/// Marks `at` where `base` does not read as zero; without a base nothing is there, which reads as zero.
pub async fn mark_unless_zero(work: &Work, at: Span, base: Option<&Rc<NodeCell>>) -> Result<()> {
    let Some(base) = base else { return Ok(()) };
    let mut left = at.intersect(&Span::new(0, base.node().len()));
    while !left.is_empty() {
        let found = walk::status(base, left, None).await?;
        let end = found.last().map_or(left.start, |e| e.span.end());
        if end <= left.start {
            work.mark(left);
            break;
        }
        found.iter().filter(|e| !e.reads_zero()).for_each(|e| work.mark(e.span));
        left = Span::between(end, left.end());
    }
    Ok(())
}
