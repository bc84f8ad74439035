//! What a backup does with the user's bitmap.
//!
//! At the instant the bitmap stops and another without name, its successor, records what is written from then on; nobody
//! else may use the bitmap meanwhile. At the end, with B the bits at the instant, N the writes since, F what was not copied:
//!
//! | mode | success | failure, cancel |
//! |---|---|---|
//! | on-success | N | B + N |
//! | never | B + N | B + N |
//! | always | N | F + N |
//!
//! What must stay true: every write is in B or in N; however the job ends there is one bitmap again, and it is free.

use crate::backup_args::BitmapMode;
use bitmap::{Bitmap, DirtyBitmap};
use block::Result;
use copy::Work;
use graph::NodeCell;
use std::cell::Cell;
use std::rc::Rc;

/// A bitmap in use by a backup.
#[derive(Clone)]
pub(crate) struct BitmapUse {
    node: Rc<NodeCell>,
    bitmap: Rc<DirtyBitmap>,
    successor: Rc<DirtyBitmap>,
    mode: BitmapMode,
    begun: Rc<Cell<bool>>,
}

impl BitmapUse {
    /// Takes `bitmap` of `node` into use.
    pub(crate) fn new(node: &Rc<NodeCell>, bitmap: Rc<DirtyBitmap>, mode: BitmapMode) -> Result<BitmapUse> {
        let (len, granularity) = (node.node().len(), bitmap.bits().granularity());
        let successor = Rc::new(DirtyBitmap::new(None, len, granularity)?);
        successor.set_enabled(bitmap.enabled());
        bitmap.set_busy(true);
        Ok(BitmapUse { node: node.clone(), bitmap, successor, mode, begun: Rc::default() })
    }

    /// The instant: from now on the successor records. What the bitmap holds now.
    pub(crate) fn begin(&self) -> Bitmap {
        self.begun.set(true);
        self.bitmap.freeze(self.successor.clone());
        self.node.add_bitmap(self.successor.clone());
        self.bitmap.bits().clone()
    }

    /// The end; `left` says what was not copied.
    pub(crate) fn end(&self, success: bool, left: &Work) {
        if self.begun.replace(false) {
            self.node.remove_bitmap(&self.successor);
            let mut bits = self.bitmap.bits_mut();
            match (self.mode, success) {
                (BitmapMode::OnSuccess | BitmapMode::Always, true) => bits.clear_all(),
                (BitmapMode::Always, false) => {
                    bits.clear_all();
                    left.with_dirty(|dirty| bits.merge(dirty));
                }
                (BitmapMode::OnSuccess, false) | (BitmapMode::Never, _) => {}
            }
            bits.merge(&self.successor.bits());
        }
        self.give_back();
    }

    /// Others may use the bitmap again.
    pub(crate) fn give_back(&self) {
        self.bitmap.thaw();
        self.bitmap.set_busy(false);
    }
}
