//! One bitmap that is kept: its marks in memory, what of them is durable, and which sectors are to be written.
//!
//! What must stay true: `durable` never has a mark that the file could lack after a crash.

use crate::layout::{Entry, GRANULES, Kind, SECTOR, SECTOR_BITS, encode_sector, sectors_for};
use bitmap::{Bitmap, DirtyBitmap};
use block::{Result, Span};
use std::collections::BTreeSet;
use std::rc::Rc;

/// See above.
pub(crate) struct Kept {
    pub(crate) bitmap: Rc<DirtyBitmap>,
    pub(crate) entry: Entry,
    /// What the file has, whatever happens.
    pub(crate) durable: Bitmap,
    /// [`DirtyBitmap::edits`] at the last sync.
    pub(crate) edits: u64,
    /// Sectors from which marks of a job are to go.
    pub(crate) lossy: BTreeSet<u64>,
}

/// A sector on its way to the file.
pub(crate) struct Write {
    pub(crate) id: u32,
    pub(crate) index: u64,
    pub(crate) at: u64,
    pub(crate) bits: Vec<u8>,
    pub(crate) bytes: Vec<u8>,
}

fn or_into(all: &mut [u8], more: &[u8]) {
    all.iter_mut().zip(more).for_each(|(a, b)| *a |= b);
}

impl Kept {
    /// Marks in memory: the bitmap's, and its successor's while that records in its place.
    pub(crate) fn current(&self) -> Bitmap {
        let mut all = self.bitmap.bits().clone();
        if let Some(s) = self.bitmap.successor() {
            all.merge(&s.bits());
        }
        all
    }

    fn sector_of(&self, offset: u64) -> u64 {
        (offset >> self.durable.granularity().trailing_zeros()) / GRANULES
    }

    fn sector_span(&self, index: u64) -> Span {
        let bytes = GRANULES.saturating_mul(self.durable.granularity());
        Span::new(index.saturating_mul(bytes), bytes)
    }

    /// Calls `each` with the sectors in which a mark of `within` is not durable, until it says false.
    fn stale(&self, within: Span, mut each: impl FnMut(u64) -> bool) {
        let successor = self.bitmap.successor();
        let theirs = successor.as_ref().map(|s| s.bits());
        for bits in std::iter::once(&*self.bitmap.bits()).chain(theirs.as_deref()) {
            let mut left = within;
            while let Some(at) = bits.next_beyond(&self.durable, left) {
                // a bitmap that has grown and is not stored in its new length yet
                let grown = at >= self.durable.len();
                let sector = self.sector_of(at);
                if !each(if grown { u64::MAX } else { sector }) || grown {
                    return;
                }
                left = Span::between(self.sector_span(sector).end().min(within.end()), within.end());
            }
        }
    }

    /// Whether all marks in `within` are durable.
    pub(crate) fn is_clean(&self, within: Span) -> bool {
        let mut clean = true;
        self.stale(within, |_| {
            clean = false;
            false
        });
        clean
    }

    /// Adds the sectors to `out` in which a mark of `within` is not durable.
    pub(crate) fn stale_sectors(&self, within: Span, out: &mut BTreeSet<u64>) {
        self.stale(within, |s| {
            if s != u64::MAX {
                out.insert(s);
            }
            true
        });
    }

    /// Whether a write to `at` can add no mark that is not durable.
    pub(crate) fn covers(&self, at: Span) -> bool {
        !self.bitmap.enabled()
            || at.end() <= self.durable.len()
                && self.durable.next_clean(at.start).is_none_or(|c| c >= at.end())
    }

    /// Bytes of `at` that it would be said of after a crash that they may have changed, if they were hot, and else not.
    pub(crate) fn open(&self, at: Span) -> u64 {
        if !self.bitmap.enabled() {
            return 0;
        }
        let at = at.intersect(&Span::new(0, self.durable.len()));
        at.len - self.durable.count_in(at)
    }

    /// Sector `index` as it is to be written now; `inflight` are the writes that rely on durable marks. Marks that go with it are
    /// not relied on from now on.
    pub(crate) fn write(&mut self, index: u64, inflight: &[Span]) -> Option<Write> {
        let place = self.entry.place(self.durable.len(), self.entry.second);
        let at = place.start.checked_add(index.checked_mul(SECTOR)?)?;
        if at >= place.end() {
            return None;
        }
        let first = index * SECTOR_BITS;
        let mut bits = vec![0; SECTOR_BITS as usize];
        let mut more = vec![0; SECTOR_BITS as usize];
        self.bitmap.bits().export_bits(first, &mut bits);
        if let Some(s) = self.bitmap.successor() {
            s.bits().export_bits(first, &mut more);
            or_into(&mut bits, &more);
        }
        self.durable.export_bits(first, &mut more);
        if self.entry.kind == Kind::Job && self.lossy.remove(&index) {
            let span = self.sector_span(index);
            let mut relied = Bitmap::new(self.durable.len(), self.durable.granularity()).ok()?;
            for at in inflight.iter().map(|s| s.intersect(&span)) {
                self.durable.areas(at, 0).for_each(|a| relied.set(a));
            }
            let mut stays = vec![0; SECTOR_BITS as usize];
            relied.export_bits(first, &mut stays);
            or_into(&mut bits, &stays);
            more.iter_mut().zip(&bits).for_each(|(d, b)| *d &= b);
            self.durable.clear(span);
            self.durable.import_bits(first, &more);
        } else {
            or_into(&mut bits, &more);
        }
        let bytes = encode_sector(self.entry.id, self.entry.generation, index, &bits);
        Some(Write { id: self.entry.id, index, at, bits, bytes })
    }

    /// A write of [`Kept::write`] is durable.
    pub(crate) fn written(&mut self, write: &Write) {
        self.durable.import_bits(write.index * SECTOR_BITS, &write.bits);
    }

    /// The write was not carried out, or nobody knows: it is to be tried again.
    pub(crate) fn failed(&mut self, write: &Write) {
        if self.entry.kind == Kind::Job {
            self.lossy.insert(write.index);
        }
    }

    /// Marks of a job in `at` have gone from memory; they are to go from the file.
    pub(crate) fn lost(&mut self, at: Span) {
        if !at.is_empty() {
            self.lossy.extend(self.sector_of(at.start)..=self.sector_of(at.end() - 1));
        }
    }
}

/// The sectors of a whole area that holds `bits` under `entry`: those with marks only, or all.
pub(crate) fn area_sectors(
    entry: &Entry,
    bits: &Bitmap,
    second: bool,
    all: bool,
) -> Result<Vec<(u64, Vec<u8>)>> {
    let place = entry.place(bits.len(), second);
    let mut out = Vec::new();
    let mut buffer = vec![0; SECTOR_BITS as usize];
    let shift = bits.granularity().trailing_zeros();
    let mut index = 0;
    let count = sectors_for(bits.len(), bits.granularity());
    while index < count {
        if !all {
            let Some(next) = bits.next_dirty((index * GRANULES) << shift) else { break };
            index = (next >> shift) / GRANULES;
        }
        bits.export_bits(index * SECTOR_BITS, &mut buffer);
        let bytes = encode_sector(entry.id, entry.generation, index, &buffer);
        out.push((place.start + index * SECTOR, bytes));
        index += 1;
    }
    Ok(out)
}
