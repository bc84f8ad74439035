//! What is dirty at the start: all, what is allocated somewhere, what the top layer holds, nothing.
//!
//! The guest writes meanwhile; its writes are marked dirty by the tap, which must be in place before. Scanning only ever
//! *adds* dirty bits, and what is prepared on the target (zeroes) is prepared before any copy, while no guest write
//! goes to the target.

use crate::status::{status, top_layer};
use crate::work::Work;
use block::{Kind, ReqFlags, Result, Span};
use graph::Edge;

/// Bytes looked at, or zeroed, in one step; between steps other tasks run and the job can be paused or cancelled.
const STEP: u64 = 1 << 30;

/// Marks all that the source's layers hold as data. For a target that reads as zero where nothing is copied.
pub async fn mark_data(work: &Work, source: &Edge) -> Result<()> {
    scan(work, source, false).await
}

/// Marks all that the top layer of the source holds (data and zeroes).
pub async fn mark_top(work: &Work, source: &Edge) -> Result<()> {
    scan(work, source, true).await
}

async fn scan(work: &Work, source: &Edge, top: bool) -> Result<()> {
    let mut left = Span::new(0, work.len());
    while !left.is_empty() {
        let (step, _) = left.split_at(STEP);
        let found = if top { top_layer(source, step).await? } else { status(source, step).await? };
        let mut end = left.start;
        for e in found {
            if e.kind == Kind::Data || (top && e.kind == Kind::Zero) {
                work.mark(e.span);
            }
            end = e.span.end();
        }
        if end <= left.start {
            work.mark(step);
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
        let (step, _) = left.split_at(STEP);
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

/// Makes the whole target read as zero, giving its space back; in steps.
pub async fn zero_target(work: &Work, target: &Edge) -> Result<()> {
    let mut left = Span::new(0, work.len());
    while !left.is_empty() {
        let (step, rest) = left.split_at(STEP);
        target.zero(step, ReqFlags { may_unmap: true, ..ReqFlags::NONE }).await?;
        left = rest;
        work.env.yield_now().await;
    }
    Ok(())
}
