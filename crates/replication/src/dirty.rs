//! What a primary has written since when: one set of granules per epoch, shared by all peers.
//!
//! What must stay true (I8): a granule in which the primary's image differs from checkpoint c is in [`Dirty::since`]`(c)`, for every c
//! not older than [`Dirty::floor`]. So a granule is marked before it is written, and a set is dropped only when every peer has said
//! that it committed its epoch. A peer's dirty set is the union of the sets after its checkpoint: no peer has bits of its own.

use crate::bugs::{Bug, planted};
use crate::types::Epoch;
use bitmap::Bitmap;
use block::{Result, Span};
use std::collections::BTreeMap;

/// Bytes that one bit stands for.
pub const GRANULE: u64 = 4096;
/// Sets kept apart. The two oldest become one beyond that, under the newer number: a superset for whoever needs the older.
pub const MAX_SETS: usize = 16;

/// See above.
pub struct Dirty {
    granule: u64,
    lens: Vec<u64>,
    sets: BTreeMap<Epoch, Vec<Bitmap>>,
    floor: Epoch,
}

impl Dirty {
    /// Nothing was written since checkpoint `floor` of volumes of these lengths.
    pub fn new(lens: Vec<u64>, floor: Epoch) -> Dirty {
        Dirty::by(GRANULE, lens, floor)
    }

    /// The same, with a bit for that many bytes.
    pub(crate) fn by(granule: u64, lens: Vec<u64>, floor: Epoch) -> Dirty {
        Dirty { granule, lens, sets: BTreeMap::new(), floor }
    }

    /// A volume has another length from `epoch` on. What is new there reads as zeroes everywhere, so no place is owed to anybody; the epoch is.
    ///
    /// # Errors
    /// A volume that is too long for a bitmap.
    pub fn resize(&mut self, epoch: Epoch, volume: u16, len: u64) -> Result<()> {
        let i = usize::from(volume);
        Bitmap::new(len, self.granule)?;
        if let Some(l) = self.lens.get_mut(i) {
            *l = len;
        }
        self.sets.values_mut().filter_map(|s| s.get_mut(i)).try_for_each(|b| b.resize(len))?;
        self.mark(epoch, volume, Span::default())
    }

    /// Checkpoints before this one are not covered.
    pub fn floor(&self) -> Epoch {
        self.floor
    }

    fn empty(&self) -> Result<Vec<Bitmap>> {
        self.lens.iter().map(|len| Bitmap::new(*len, self.granule)).collect()
    }

    /// `at` of `volume` is going to be written in `epoch`.
    ///
    /// # Errors
    /// A volume that is too long for a bitmap.
    pub fn mark(&mut self, epoch: Epoch, volume: u16, at: Span) -> Result<()> {
        if !self.sets.contains_key(&epoch) {
            let empty = self.empty()?;
            self.sets.insert(epoch, empty);
            self.limit();
        }
        if let Some(bits) = self.sets.get_mut(&epoch).and_then(|s| s.get_mut(usize::from(volume))) {
            bits.set(at);
        }
        Ok(())
    }

    fn limit(&mut self) {
        while self.sets.len() > MAX_SETS {
            let Some((_, oldest)) = self.sets.pop_first() else { return };
            let Some(mut next) = self.sets.first_entry() else { return };
            next.get_mut().iter_mut().zip(&oldest).for_each(|(to, from)| to.merge(from));
        }
    }

    /// Every peer has committed `epoch`.
    pub fn drop_through(&mut self, epoch: Epoch) {
        self.sets = self.sets.split_off(&epoch.next());
        if !planted(Bug::DirtyClearedOnSend) {
            self.floor = self.floor.max(epoch);
        }
    }

    /// Everything written since checkpoint `c`, for each volume; `None` if that is not known.
    ///
    /// # Errors
    /// A volume that is too long for a bitmap.
    pub fn since(&self, c: Epoch) -> Result<Option<Vec<Bitmap>>> {
        if c < self.floor {
            return Ok(None);
        }
        let mut all = self.empty()?;
        for set in self.sets.range(c.next()..).map(|(_, s)| s) {
            all.iter_mut().zip(set).for_each(|(to, from)| to.merge(from));
        }
        Ok(Some(all))
    }

    /// Whether anything is in [`Dirty::since`]`(c)`. Cheap: a set is made by the first change of its epoch.
    pub fn any_since(&self, c: Epoch) -> bool {
        c < self.floor || self.sets.range(c.next()..).next().is_some()
    }

    /// Bytes in [`Dirty::since`]`(c)`; all of the volumes if that is not known.
    pub fn bytes_since(&self, c: Epoch) -> u64 {
        match self.since(c) {
            Ok(Some(all)) => all.iter().map(Bitmap::dirty_bytes).sum(),
            _ => self.lens.iter().sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_gets_what_was_written_after_its_checkpoint_and_more_only_beyond_the_limit() {
        let mut d = Dirty::new(vec![1 << 20], Epoch(0));
        for e in 1..=4 {
            d.mark(Epoch(e), 0, Span::new(e * GRANULE, 1)).unwrap_or_default();
        }
        assert_eq!((d.bytes_since(Epoch(0)), d.bytes_since(Epoch(3))), (4 * GRANULE, GRANULE));
        d.drop_through(Epoch(2));
        assert_eq!(d.bytes_since(Epoch(2)), 2 * GRANULE);
        assert_eq!(d.bytes_since(Epoch(1)), 1 << 20, "not covered: everything");
        for e in 5..5 + MAX_SETS as u64 {
            d.mark(Epoch(e), 0, Span::new(e * GRANULE, 1)).unwrap_or_default();
        }
        assert_eq!(d.sets.len(), MAX_SETS);
        assert_eq!(
            d.bytes_since(Epoch(2)),
            (2 + MAX_SETS as u64) * GRANULE,
            "nothing is lost by joining sets"
        );
    }
}
