//! Whether two disks are equal, byte by byte, looking only at what either holds.

use crate::status::status;
use block::{Kind, Result, Span};
use env::Env;
use graph::Edge;

/// Bytes compared at once.
const STEP: u64 = 1 << 20;

/// What a comparison found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Verdict {
    /// Offset of the first byte that differs (a longer disk's rest counts as different unless it is zero).
    pub first_difference: Option<u64>,
    /// Bytes read and compared.
    pub compared: u64,
    /// Bytes that both say are zero, not read.
    pub both_zero: u64,
}

/// Compares `a` with `b` up to the first difference. `progress` is told the offset reached. Both should be quiet: what
/// changes meanwhile may or may not be seen.
pub async fn verify(env: &Env, a: &Edge, b: &Edge, mut progress: impl FnMut(u64)) -> Result<Verdict> {
    let mut verdict = Verdict::default();
    let common = a.len().min(b.len());
    let mut at = 0;
    while at < common {
        let rest = Span::between(at, common);
        let (in_a, in_b) = (first_run(a, rest).await?, first_run(b, rest).await?);
        let run = Span::new(at, in_a.1.min(in_b.1));
        if in_a.0 && in_b.0 {
            verdict.both_zero += run.len;
            at = run.end();
        } else {
            let (step, _) = run.split_at(STEP);
            let left = a.read(step).await?;
            let right = b.read(step).await?;
            verdict.compared += step.len;
            if left != right {
                let (x, y) = (left.to_vec(), right.to_vec());
                let off = x.iter().zip(&y).position(|(p, q)| p != q).unwrap_or(0);
                verdict.first_difference = Some(step.start + off as u64);
                return Ok(verdict);
            }
            at = step.end();
        }
        progress(at);
        env.yield_now().await;
    }
    let longer = if a.len() > common { a } else { b };
    while at < longer.len() {
        let (zero, len) = first_run(longer, Span::between(at, longer.len())).await?;
        let (step, _) = Span::new(at, len).split_at(if zero { len } else { STEP });
        if !zero && !longer.read(step).await?.is_zero() {
            verdict.first_difference = Some(at);
            return Ok(verdict);
        }
        at = step.end();
        env.yield_now().await;
    }
    Ok(verdict)
}

/// Whether `at` begins with zeroes, and how far that goes.
async fn first_run(edge: &Edge, at: Span) -> Result<(bool, u64)> {
    let found = status(edge, at).await?;
    let run = found.first().map(|e| (e.kind != Kind::Data, e.span.intersect(&at).len));
    Ok(run.filter(|r| r.1 > 0).unwrap_or((false, at.len)))
}
