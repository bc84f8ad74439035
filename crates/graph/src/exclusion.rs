//! Readers of an overlay, and the copy of old bytes into that overlay, keep out of each other's way.
//!
//! What can happen: somebody reads a disk through an overlay and finds that the overlay has nothing there, so the bytes are
//! to come from the disk; before they do, a change of the disk has its old bytes copied into the overlay and overwrites them;
//! the reader gets new bytes in place of old ones. What must stay true:
//! * A read of the overlay is inside ([`Exclusion::begin_read`]) from before it looks until it has its bytes; a copy is alone
//!   with its granules ([`Exclusion::begin_copy`]) from before it reads the disk until the overlay has the bytes. The change
//!   itself comes after the copy and needs no lock: whoever looks from then on finds the bytes in the overlay.
//! * Whoever is inside waits for nobody who waits here: readers wait for the disk below alone, copies for disk and overlay
//!   alone (reading the disk directly, not through the overlay). Waiting is in order of arrival, so nobody starves.

use block::Span;
use env::sync::{RangeLock, RangeLocks};
use std::rc::Rc;

/// See the top of this file. Ranges are widened to granules: a copy of one byte is a copy of its granule.
pub struct Exclusion {
    granule: u64,
    locks: RangeLocks,
}

impl Exclusion {
    /// Nobody is inside. `granule` (a power of two) is what a copy takes at least.
    pub fn new(granule: u64) -> Rc<Exclusion> {
        Rc::new(Exclusion { granule, locks: RangeLocks::new() })
    }

    /// Waits for overlapping copies that came before, then a read begins; it ends when the value is dropped.
    pub async fn begin_read(&self, at: Span) -> RangeLock<'_> {
        self.locks.lock(at.align_out(self.granule), false).await
    }

    /// Waits for overlapping reads and copies that came before, then a copy begins; it ends when the value is dropped.
    pub async fn begin_copy(&self, at: Span) -> RangeLock<'_> {
        self.locks.lock(at.align_out(self.granule), true).await
    }

    /// Waits until whoever overlaps `at` and came before has ended.
    pub async fn wait(&self, at: Span) {
        drop(self.begin_copy(at).await);
    }

    /// How many are inside or wait.
    pub fn claims(&self) -> usize {
        self.locks.claims()
    }
}
