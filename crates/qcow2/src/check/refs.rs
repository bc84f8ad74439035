//! Reference counts as the checker finds them: sparse, four bytes a cluster.

use std::collections::BTreeMap;

/// Clusters in one chunk of counters. Memory is taken for chunks with references only, so a sparse hostile file costs
/// what its metadata costs.
pub(super) const CHUNK: u64 = 1024;

/// What a cluster is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Use {
    Header = 1,
    L1 = 2,
    L2 = 4,
    RefcountTable = 8,
    RefcountBlock = 16,
    Snapshots = 32,
    Bitmaps = 64,
    Data = 128,
}

/// One cluster's counter.
#[derive(Clone, Copy, Default)]
pub(super) struct Cell {
    /// References found; stays at the maximum once there (the rest is in `Refs::spill`).
    refs: u16,
    /// Set of [`Use`].
    uses: u8,
    /// [`SEEN_COPIED`], [`SEEN_SHARED`], [`DISK_ONE`], [`OVERLAP`].
    flags: u8,
}

/// An active entry with COPIED pointed here.
pub(super) const SEEN_COPIED: u8 = 1;
/// An active entry without COPIED pointed here.
pub(super) const SEEN_SHARED: u8 = 2;
/// Metadata lies on something else.
pub(super) const OVERLAP: u8 = 4;
/// The refcount in the image is exactly 1.
pub(super) const DISK_ONE: u8 = 8;

impl Cell {
    pub(super) fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
    pub(super) fn used_for(self, what: Use) -> bool {
        self.uses & what as u8 != 0
    }
}

/// The counters of an image.
#[derive(Default)]
pub(super) struct Refs {
    chunks: BTreeMap<u64, Box<[Cell; CHUNK as usize]>>,
    spill: BTreeMap<u64, u64>,
    highest: u64,
}

impl Refs {
    fn cell_mut(&mut self, cluster: u64) -> &mut Cell {
        let chunk =
            self.chunks.entry(cluster / CHUNK).or_insert_with(|| Box::new([Cell::default(); CHUNK as usize]));
        &mut chunk[(cluster % CHUNK) as usize]
    }

    /// Counts `times` references to a cluster for one purpose.
    pub(super) fn add(&mut self, cluster: u64, times: u64, what: Use) {
        self.highest = self.highest.max(cluster);
        let cell = self.cell_mut(cluster);
        // Metadata may share a cluster with nothing but itself counted several times at once (shared L2 tables). Bitmaps
        // and snapshot tables are runs of clusters, each its own.
        let other = cell.uses & !(what as u8);
        if what == Use::Data {
            if other != 0 {
                cell.flags |= OVERLAP;
            }
        } else if cell.uses != 0 {
            cell.flags |= OVERLAP;
        }
        cell.uses |= what as u8;
        let sum = u64::from(cell.refs) + times;
        if let Ok(n) = u16::try_from(sum)
            && n < u16::MAX
        {
            cell.refs = n;
            return;
        }
        let before = if cell.refs == u16::MAX { 0 } else { u64::from(cell.refs) };
        cell.refs = u16::MAX;
        *self.spill.entry(cluster).or_insert(0) += before + times;
    }

    /// References counted.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        match self.cell(cluster).refs {
            u16::MAX => self.spill.get(&cluster).copied().unwrap_or(0),
            n => u64::from(n),
        }
    }

    pub(super) fn cell(&self, cluster: u64) -> Cell {
        self.chunks.get(&(cluster / CHUNK)).map_or(Cell::default(), |c| c[(cluster % CHUNK) as usize])
    }

    /// The counters of a chunk, to scan them quickly.
    pub(super) fn flag(&mut self, cluster: u64, flag: u8) {
        self.cell_mut(cluster).flags |= flag;
    }

    /// Numbers of the chunks that exist, in order.
    pub(super) fn chunk_numbers(&self) -> impl Iterator<Item = u64> + '_ {
        self.chunks.keys().copied()
    }

    /// The highest cluster referenced.
    pub(super) fn highest(&self) -> u64 {
        self.highest
    }

    /// Whether any reference falls into `[from, to)`; may say yes for a neighbour in the same chunk.
    pub(super) fn any_near(&self, from: u64, to: u64) -> bool {
        to > from && self.chunks.range(from / CHUNK..=(to - 1) / CHUNK).next().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_past_sixteen_bits() {
        let mut r = Refs::default();
        r.add(5, 65_534, Use::Data);
        assert_eq!(r.get(5), 65_534);
        r.add(5, 1, Use::Data);
        assert_eq!(r.get(5), 65_535);
        r.add(5, 100_000, Use::Data);
        assert_eq!(r.get(5), 165_535);
        assert_eq!((r.get(6), r.get(1 << 40)), (0, 0));
    }

    #[test]
    fn metadata_shares_with_nothing() {
        let mut r = Refs::default();
        r.add(1, 1, Use::L2);
        r.add(1, 1, Use::Data);
        r.add(2, 1, Use::Data);
        r.add(2, 1, Use::Data);
        r.add(3, 2, Use::L1);
        r.add(3, 1, Use::L1);
        assert!(r.cell(1).has(OVERLAP) && !r.cell(2).has(OVERLAP) && r.cell(3).has(OVERLAP));
    }
}
