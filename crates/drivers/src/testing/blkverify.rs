//! `blkverify`: one disk kept twice, in a driver under test and in one that is trusted; what is read is compared.
//!
//! What can happen: the two differ, or one fails where the other does not. What must stay true: every read asks both, every
//! write goes to both, nobody compares while a write to the same bytes is between them, and a difference fails the request
//! that finds it, with its place.

use crate::filters::{all, description, filter_basics, filter_passes};
use block::{BlockError, Data, ErrorKind, Io, Limits, Prealloc, ReqFlags, Result, Span};
use env::sync::RangeLocks;
use graph::{Demand, Edge, Node, NodeDetails, Perms};
use std::rc::Rc;

/// The node.
pub struct Blkverify {
    raw: Rc<Edge>,
    test: Rc<Edge>,
    ranges: RangeLocks,
}

impl Blkverify {
    /// A node over the trusted child behind `raw` (an edge of role `Filtered`) and the one under test behind `test` (`Other`).
    pub fn new(raw: Rc<Edge>, test: Rc<Edge>) -> Rc<Blkverify> {
        Rc::new(Blkverify { raw, test, ranges: RangeLocks::new() })
    }

    /// Runs `what` on both children; fails if they do not agree on whether it worked.
    async fn both<T>(
        &self,
        at: Span,
        verb: &str,
        what: impl for<'c> Fn(&'c Rc<Edge>) -> Io<'c, T>,
    ) -> Result<(T, T)> {
        let mut answers = all(vec![what(&self.raw), what(&self.test)]).await;
        match (answers.pop(), answers.pop()) {
            (Some(Ok(test)), Some(Ok(raw))) => Ok((raw, test)),
            (Some(Err(_)), Some(Err(raw))) => Err(raw),
            (Some(Err(e)), _) => Err(differs(&format!("{verb} at {at} fails in 'test' alone: {e}"))),
            (_, Some(Err(e))) => Err(differs(&format!("{verb} at {at} fails in 'raw' alone: {e}"))),
            _ => Err(BlockError::from_errno(BlockError::EIO)),
        }
    }
}

fn differs(what: &str) -> BlockError {
    BlockError::new(ErrorKind::Io, format!("blkverify: {what}"))
}

/// Where the first byte is that differs.
fn first_difference(a: &Data, b: &Data) -> u64 {
    let (a, b) = (a.to_vec(), b.to_vec());
    a.iter().zip(&b).take_while(|(x, y)| x == y).count() as u64
}

impl Node for Blkverify {
    filter_basics!(test, [raw, test], raw);
    filter_passes!(raw: extents, close);

    fn driver(&self) -> &'static str {
        "blkverify"
    }
    fn limits(&self) -> Limits {
        let (a, b) = (self.raw.limits(), self.test.limits());
        let max_transfer = [a.max_transfer, b.max_transfer].into_iter().filter(|m| *m > 0).min();
        Limits {
            request_alignment: a.request_alignment.max(b.request_alignment),
            memory_alignment: a.memory_alignment.max(b.memory_alignment),
            cluster_size: 0,
            max_transfer: max_transfer.unwrap_or(0),
            efficient_zero: false,
        }
    }
    fn wants(&self, edge: &Edge, above: Demand, _: bool) -> Demand {
        if edge.id() == self.raw.id() {
            return above;
        }
        // The child under test may be a format's file, which grows.
        let writes = above.needs.has(Perms::WRITE);
        let needs = if writes { above.needs.with(Perms::RESIZE) } else { above.needs };
        Demand { needs, shares: above.shares.without(Perms::RESIZE) }
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move {
            let _lock = self.ranges.lock(at, false).await;
            let (raw, test) = self.both(at, "a read", |c| Box::pin(c.read(at))).await?;
            if raw == test {
                return Ok(test);
            }
            let place = at.start + first_difference(&raw, &test);
            Err(differs(&format!("contents mismatch at offset {place}, in a read of {at}")))
        })
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            let _lock = self.ranges.lock(at, true).await;
            self.both(at, "a write", |c| Box::pin(c.write(at.start, data.clone(), flags))).await?;
            Ok(())
        })
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            let _lock = self.ranges.lock(at, true).await;
            // Both must read as zero, so space is given back only where that follows.
            self.both(at, "a write of zeroes", |c| Box::pin(c.zero(at, flags))).await?;
            Ok(())
        })
    }
    fn discard(&self, _: Span) -> Io<'_> {
        // What discarded bytes read as may differ.
        Box::pin(async { Ok(()) })
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            self.both(Span::new(0, 0), "a flush", |c| Box::pin(c.flush())).await?;
            Ok(())
        })
    }
    fn resize(&self, len: u64, prealloc: Prealloc) -> Io<'_> {
        Box::pin(async move {
            let at = Span::new(0, len);
            self.both(at, "a resize", |c| Box::pin(c.resize(len, prealloc))).await?;
            Ok(())
        })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move {
            let name = |edge: &Rc<Edge>| edge.child();
            let (raw, test) = (name(&self.raw), name(&self.test));
            let names = (raw.node().details().await?.filename, test.node().details().await?.filename);
            let filename = if names.0.starts_with("json:") || names.1.starts_with("json:") {
                let (raw, test) = (description(&raw).await?, description(&test).await?);
                format!("json:{{\"driver\": \"blkverify\", \"raw\": {raw}, \"test\": {test}}}")
            } else {
                format!("blkverify:{}:{}", names.0, names.1)
            };
            Ok(NodeDetails { filename, ..NodeDetails::default() })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found() {
        let of = |b: &[u8]| Data::copy_from(b);
        assert_eq!(first_difference(&of(b"abcd"), &of(b"abxd")), 2);
        assert_eq!(first_difference(&of(b"abcd"), &of(b"xbxd")), 0);
    }
}
