//! `copy-on-read`: what is read from the layers below comes up into the disk's own image, so that it need not be fetched again.
//!
//! What can happen: guests write while old data comes up. What must stay true: what comes up never overwrites what a guest
//! wrote (whoever copies has the range for himself, and asks under the lock what the image has); what the disk shows
//! never changes by it, so it is written as `unchanged`.
//!
//! With `bottom`, only what the layers from the top down to that node hold is copied; without, whatever the top does not
//! hold, so that zeroes are stored, too.

use super::{filter_basics, filter_passes};
use block::{Data, Io, ReqFlags, Result, Span};
use env::sync::RangeLocks;
use graph::walk::{self, ChainExtent};
use graph::{DebugEvent, Demand, Edge, Node, NodeCell, Perms};
use std::rc::{Rc, Weak};

/// Bytes copied at once: bounds memory, and is long enough to be fast.
const PIECE: u64 = 1 << 20;

/// The filter.
pub struct CopyOnRead {
    file: Rc<Edge>,
    bottom: Option<Weak<NodeCell>>,
    ranges: RangeLocks,
}

impl CopyOnRead {
    /// A filter in front of the child of `file` (an edge of role `Filtered`, named `file`).
    pub fn new(file: Rc<Edge>, bottom: Option<&Rc<NodeCell>>) -> Rc<CopyOnRead> {
        Rc::new(CopyOnRead { file, bottom: bottom.map(Rc::downgrade), ranges: RangeLocks::new() })
    }

    /// Where the walk ends: below the bottom. A bottom that left the chain bounds nothing any more.
    fn base(&self, top: &Rc<NodeCell>) -> (bool, Option<Rc<NodeCell>>) {
        match self.bottom.as_ref().and_then(Weak::upgrade).filter(|b| walk::contains(top, b)) {
            Some(bottom) => (true, bottom.below()),
            None => (false, None),
        }
    }

    /// What is known of the beginning of `at`, and whether a run is to be copied.
    async fn runs(&self, at: Span) -> Result<Vec<(ChainExtent, bool)>> {
        let top = self.file.child();
        let (bounded, base) = self.base(&top);
        let runs = walk::status(&top, at, base.as_ref()).await?;
        Ok(runs.into_iter().map(|r| (r, r.depth > 1 || (r.depth == 0 && !bounded))).collect())
    }

    /// Whether anything of `at` is to be copied.
    async fn is_missing(&self, at: Span) -> Result<bool> {
        let mut left = at;
        while !left.is_empty() {
            let runs = self.runs(left).await?;
            if runs.iter().any(|(_, copy)| *copy) {
                return Ok(true);
            }
            let Some((last, _)) = runs.last() else { return Ok(false) };
            left = Span::between(last.span.end(), left.end());
        }
        Ok(false)
    }

    /// Brings up what is missing of `at`. The caller has the range.
    async fn bring_up(&self, at: Span) -> Result<()> {
        let mut left = at;
        while !left.is_empty() {
            let runs = self.runs(left).await?;
            let Some((last, _)) = runs.last() else { return Ok(()) };
            left = Span::between(last.span.end(), left.end());
            for (run, _) in runs.iter().filter(|(_, copy)| *copy) {
                self.copy(run.span).await?;
            }
        }
        Ok(())
    }

    async fn copy(&self, run: Span) -> Result<()> {
        let flags = ReqFlags { unchanged: true, ..ReqFlags::NONE };
        for now in run.pieces(PIECE) {
            let data = self.file.read(now).await?;
            self.file.announce(DebugEvent::CorWrite);
            if data.is_zero() {
                self.file.zero(now, flags).await?;
            } else {
                self.file.write(now.start, data, flags).await?;
            }
        }
        Ok(())
    }

    async fn read_and_copy(&self, at: Span) -> Result<Data> {
        if self.is_missing(at).await? {
            let unit = self.file.limits().cluster_size.max(1);
            let whole = at.align_out(unit).intersect(&Span::new(0, self.file.len()));
            let _lock = self.ranges.lock(whole, true).await;
            self.bring_up(whole).await?;
            return self.file.read(at).await;
        }
        self.file.read(at).await
    }
}

impl Node for CopyOnRead {
    filter_basics!(file);
    filter_passes!(file: limits, extents, flush, resize, close, details);

    fn driver(&self) -> &'static str {
        "copy-on-read"
    }
    fn wants(&self, _: &Edge, above: Demand, _: bool) -> Demand {
        // Who writes past us is not kept from what we are copying, so nobody may.
        Demand {
            needs: above.needs.with(Perms::WRITE_UNCHANGED),
            shares: above.shares.with(Perms::WRITE_UNCHANGED).without(Perms::WRITE),
        }
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(self.read_and_copy(at))
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            let _lock = self.ranges.lock(at, false).await;
            self.file.write(at.start, data, flags).await
        })
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            let _lock = self.ranges.lock(at, false).await;
            self.file.zero(at, flags).await
        })
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(async move {
            let _lock = self.ranges.lock(at, false).await;
            self.file.discard(at).await
        })
    }
}
