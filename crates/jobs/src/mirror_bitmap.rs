//! What a mirror does with the user's bitmap.
//!
//! The bitmap says at the job's first instant which part of the disk the target lacks; of what the sync mode says, only that is
//! copied at the start. It goes on recording while the job runs. With B the bits at that instant, W the part of them that the job
//! set out to copy, D what is not on the target at the end, A what was written after the end:
//!
//! | mode | success | failure, hard cancel |
//! |---|---|---|
//! | never | untouched | untouched |
//! | on-success | (B - W) + A | untouched |
//! | always | (B - W) + A | (B - W) + D + A |
//!
//! What must stay true: a granule that the target lacks is marked, whatever mode, end and moment; the end of a success is
//! the instant at which source and target are equal and no client's request runs.

use crate::backup_args::BitmapMode;
use bitmap::{Bitmap, DirtyBitmap};
use block::{Result, Span};
use copy::Work;
use graph::NodeCell;
use std::cell::RefCell;
use std::rc::Rc;

/// A bitmap in use by a mirror.
pub(crate) struct MirrorBitmap {
    source: Rc<NodeCell>,
    bitmap: Rc<DirtyBitmap>,
    mode: BitmapMode,
    /// B, then B - W.
    rest: RefCell<Option<Bitmap>>,
    /// What it held when it was cleared at the instant of success.
    cleared: RefCell<Option<Bitmap>>,
    /// Records what is written after a failure's end.
    since: RefCell<Option<Rc<DirtyBitmap>>>,
}

impl MirrorBitmap {
    /// Takes `bitmap` of `source` into use; nobody else may change it meanwhile, if its mode changes it.
    pub(crate) fn new(source: &Rc<NodeCell>, bitmap: Rc<DirtyBitmap>, mode: BitmapMode) -> Rc<MirrorBitmap> {
        let it = MirrorBitmap {
            source: source.clone(),
            bitmap,
            mode,
            rest: RefCell::default(),
            cleared: RefCell::default(),
            since: RefCell::default(),
        };
        if it.changes() {
            it.bitmap.set_busy(true);
        }
        Rc::new(it)
    }

    fn changes(&self) -> bool {
        self.mode != BitmapMode::Never
    }

    /// The first instant: from now on every write is marked in the job's own record.
    pub(crate) fn begin(&self) {
        *self.rest.borrow_mut() = Some(self.bitmap.bits().clone());
    }

    /// Bytes per bit.
    pub(crate) fn granularity(&self) -> u64 {
        self.bitmap.bits().granularity()
    }

    /// What the bitmap marked at the first instant and the job has not set out to copy.
    pub(crate) fn rest(&self) -> Option<Bitmap> {
        self.rest.borrow().clone()
    }

    /// The job sets out to copy `at`.
    pub(crate) fn takes(&self, at: Span) {
        if let Some(rest) = self.rest.borrow_mut().as_mut() {
            rest.clear(at);
        }
    }

    /// Source and target are equal now, and nobody writes.
    pub(crate) fn equal(&self) {
        if self.changes()
            && let Some(rest) = self.rest.borrow().as_ref()
        {
            let mut bits = self.bitmap.bits_mut();
            self.cleared.borrow_mut().get_or_insert_with(|| bits.clone());
            bits.clear_all();
            bits.merge(rest);
        }
    }

    /// The job has failed: what is written from now on may not be in its own record.
    pub(crate) fn failing(&self) -> Result<()> {
        if self.mode == BitmapMode::Always && self.cleared.borrow().is_none() && self.bitmap.enabled() {
            let (len, granularity) = (self.source.node().len(), self.bitmap.bits().granularity());
            let since = Rc::new(DirtyBitmap::new(None, len, granularity)?);
            self.source.add_bitmap(since.clone());
            *self.since.borrow_mut() = Some(since);
        }
        Ok(())
    }

    /// The end. After a failure no request is inside the job's filter any more, and `work` has all that the target lacks.
    pub(crate) fn end(&self, success: bool, work: &Work) {
        let since = self.since.take();
        let rest = self.rest.take();
        if !success {
            let mut bits = self.bitmap.bits_mut();
            match (self.mode, self.cleared.take(), rest) {
                (BitmapMode::OnSuccess, Some(before), _) => bits.merge(&before),
                // The target got all until the instant at which the bitmap was cleared.
                (BitmapMode::Always, None, Some(rest)) if since.is_some() || !self.bitmap.enabled() => {
                    bits.clear_all();
                    bits.merge(&rest);
                    work.with_dirty(|dirty| bits.merge(dirty));
                    since.iter().for_each(|s| bits.merge(&s.bits()));
                }
                _ => {}
            }
        }
        since.iter().for_each(|s| self.source.remove_bitmap(s));
        self.give_back();
    }

    /// Others may use the bitmap again.
    pub(crate) fn give_back(&self) {
        if self.changes() {
            self.bitmap.set_busy(false);
        }
    }
}
