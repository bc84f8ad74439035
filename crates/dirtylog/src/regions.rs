//! Which regions are hot, who is writing where, and which regions leave. Pure.
//!
//! What must stay true: a region with writes under way stays hot; a region leaves only if its marks are durable; never are there more
//! hot regions than the geometry allows, so that what a crash puts in doubt has a bound.

use block::Span;
use std::collections::{BTreeMap, BTreeSet};

/// Smallest region: a barrier for every MiB of a sequential write is dear enough.
const MIN_REGION: u64 = 1 << 20;
/// Largest region.
const MAX_REGION: u64 = 16 << 20;
/// A disk has about so many regions, if their size has no bound in the way.
const REGIONS: u64 = 2560;
/// One part in so many of the disk may be hot: 160 MiB of 10 GiB.
const SHARE: u64 = 64;
/// Fewest hot regions: as many as the depth of a busy queue.
const LEAST: u64 = 32;
/// Most hot regions: 4 GiB of the largest disks. A record has room for more (`layout::MAX_HOT`).
const MOST: u64 = 256;

/// How a disk is cut into regions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes of a region, a power of two.
    pub region: u64,
    /// Most regions that are hot at once.
    pub most: usize,
}

/// The geometry for a disk of `len` bytes: about 1.6 % of it may be in doubt, at least 32 MiB, at most 4 GiB.
pub fn geometry_for(len: u64) -> Geometry {
    let region = len.div_ceil(REGIONS).clamp(MIN_REGION, MAX_REGION).next_power_of_two();
    Geometry { region, most: (len / SHARE / region).clamp(LEAST, MOST) as usize }
}

struct Hot {
    users: u32,
    /// The turn in which it was last made hot or written to.
    used: u64,
}

/// What a turn does to the hot set.
#[derive(Default, Debug)]
pub(crate) struct Choice {
    /// So many of those who wait, from the first, can go when this is durable.
    pub(crate) granted: usize,
    /// Regions that become hot.
    pub(crate) join: BTreeSet<u64>,
    /// Regions that leave.
    pub(crate) leave: BTreeSet<u64>,
    /// More could go if marks of idle regions were durable.
    pub(crate) wash: bool,
}

/// See above.
pub(crate) struct Regions {
    geo: Geometry,
    hot: BTreeMap<u64, Hot>,
    /// Writes under way on the strength of marks that are durable already, or too wide for the hot set.
    marked: Vec<Span>,
    turn: u64,
    /// Writes begun, to notice that there are any.
    begun: u64,
}

impl Regions {
    pub(crate) fn new(geo: Geometry) -> Regions {
        Regions { geo, hot: BTreeMap::new(), marked: Vec::new(), turn: 0, begun: 0 }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geo
    }

    /// Numbers of the regions that `at` touches.
    fn numbers(&self, at: Span) -> std::ops::Range<u64> {
        let shift = self.geo.region.trailing_zeros();
        at.start >> shift..if at.is_empty() { at.start >> shift } else { ((at.end() - 1) >> shift) + 1 }
    }

    /// The bytes of a region.
    pub(crate) fn span(&self, number: u64) -> Span {
        Span::new(number.saturating_mul(self.geo.region), self.geo.region)
    }

    /// Whether `at` is too wide to be made hot.
    pub(crate) fn is_wide(&self, at: Span) -> bool {
        let n = self.numbers(at);
        n.end - n.start > (self.geo.most / 4).max(1) as u64
    }

    /// Begins a write if all its regions are hot.
    pub(crate) fn enter_hot(&mut self, at: Span) -> bool {
        self.begun = self.begun.wrapping_add(1);
        let numbers = self.numbers(at);
        if numbers.end - numbers.start == 1 {
            // nearly every request
            let Some(h) = self.hot.get_mut(&numbers.start) else { return false };
            h.users += 1;
            h.used = self.turn;
            return true;
        }
        if self.is_wide(at) || !numbers.clone().all(|n| self.hot.contains_key(&n)) {
            return false;
        }
        for n in numbers {
            if let Some(h) = self.hot.get_mut(&n) {
                h.users += 1;
                h.used = self.turn;
            }
        }
        true
    }

    /// Grows with each write.
    pub(crate) fn begun(&self) -> u64 {
        self.begun
    }

    /// A write that [`Regions::enter_hot`] began has ended.
    pub(crate) fn leave_hot(&mut self, at: Span) {
        for n in self.numbers(at) {
            if let Some(h) = self.hot.get_mut(&n) {
                h.users = h.users.saturating_sub(1);
            }
        }
    }

    /// A write begins whose marks are durable.
    pub(crate) fn enter_marked(&mut self, at: Span) {
        self.marked.push(at);
    }

    /// It has ended.
    pub(crate) fn leave_marked(&mut self, at: Span) {
        if let Some(i) = self.marked.iter().rposition(|s| *s == at) {
            self.marked.swap_remove(i);
        }
    }

    /// Writes under way that no hot region covers.
    pub(crate) fn marked(&self) -> &[Span] {
        &self.marked
    }

    /// Numbers of the hot regions.
    pub(crate) fn hot(&self) -> impl Iterator<Item = u64> + '_ {
        self.hot.keys().copied()
    }

    /// How many are hot.
    pub(crate) fn count(&self) -> usize {
        self.hot.len()
    }

    /// Idle regions, the one that was used longest ago first.
    fn idle(&self) -> Vec<u64> {
        let mut idle: Vec<_> =
            self.hot.iter().filter(|(_, h)| h.users == 0).map(|(n, h)| (h.used, *n)).collect();
        idle.sort_unstable();
        idle.into_iter().map(|(_, n)| n).collect()
    }

    /// Idle regions whose marks are durable.
    pub(crate) fn spare(&self, clean: impl Fn(Span) -> bool) -> BTreeSet<u64> {
        self.idle().into_iter().filter(|n| clean(self.span(*n))).collect()
    }

    /// Who of those who wait can go next, and what has to change for that; `clean` says whether all marks in a region are
    /// durable.
    pub(crate) fn choose(&self, waiting: impl Iterator<Item = Span>, clean: impl Fn(Span) -> bool) -> Choice {
        let mut c = Choice::default();
        let mut pinned = BTreeSet::new();
        let mut idle = None;
        for at in waiting {
            let mut join = c.join.clone();
            let mut leave = c.leave.clone();
            for n in self.numbers(at) {
                leave.remove(&n);
                if !self.hot.contains_key(&n) {
                    join.insert(n);
                }
            }
            pinned.extend(self.numbers(at));
            while self.hot.len() - leave.len() + join.len() > self.geo.most {
                let idle = idle.get_or_insert_with(|| self.idle().into_iter());
                let Some(next) = idle.next() else { return c };
                if pinned.contains(&next) {
                    continue;
                }
                if clean(self.span(next)) {
                    leave.insert(next);
                } else {
                    c.wash = true;
                }
            }
            c.join = join;
            c.leave = leave;
            c.granted += 1;
        }
        c
    }

    /// These leave: from now on nobody writes there as to a hot region.
    pub(crate) fn retire(&mut self, leave: &BTreeSet<u64>) {
        leave.iter().for_each(|n| {
            self.hot.remove(n);
        });
    }

    /// These are hot from now on.
    pub(crate) fn join(&mut self, join: &BTreeSet<u64>) {
        self.turn += 1;
        for n in join {
            self.hot.insert(*n, Hot { users: 0, used: self.turn });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;

    #[test]
    fn what_is_in_doubt_is_bounded_by_the_disk_s_length() {
        for (len, region, doubt) in [
            (64 * M, M, 32 * M),
            (10 << 30, 4 * M, 160 * M),
            (100 << 30, 16 * M, 1600 * M),
            (64 << 40, 16 * M, 4096 * M),
        ] {
            let g = geometry_for(len);
            assert_eq!((g.region, g.region * g.most as u64), (region, doubt), "{len}");
            assert!(g.most <= crate::layout::MAX_HOT);
        }
        let _no_panic = (geometry_for(0), geometry_for(u64::MAX));
    }

    #[test]
    fn the_least_recently_written_idle_region_leaves_first_and_only_if_its_marks_are_durable() {
        let mut r = Regions::new(Geometry { region: M, most: 4 });
        let at = |n: u64| Span::new(n * M, 4096);
        r.join(&BTreeSet::from([0, 1, 2, 3]));
        assert!(r.enter_hot(at(0)) && r.enter_hot(at(2)) && !r.enter_hot(at(4)));
        r.leave_hot(at(2));
        r.join(&BTreeSet::new());
        assert!(r.enter_hot(at(1)));
        r.leave_hot(at(1));
        // 0 is being written to; 3 was never used, 2 before 1
        let c = r.choose([at(7), at(8)].into_iter(), |_| true);
        assert_eq!((c.granted, c.leave), (2, BTreeSet::from([2, 3])));
        let c = r.choose([at(7), at(8)].into_iter(), |s| s.start != 2 * M);
        assert_eq!((c.granted, c.leave, c.wash), (2, BTreeSet::from([1, 3]), true));
        let c = r.choose([at(7)].into_iter(), |_| false);
        assert!(c.granted == 0 && c.wash);
        // What a later one waits for does not leave for an earlier one.
        let c = r.choose([at(7), at(3)].into_iter(), |_| true);
        assert!(!c.leave.contains(&3) && c.granted == 2, "{c:?}");
        // As many wait as there is room for.
        let c = r.choose((10..20).map(at), |_| true);
        assert_eq!((c.granted, c.join.len(), c.leave.len()), (3, 3, 3));
    }

    #[test]
    fn a_wide_write_does_not_sweep_the_hot_set() {
        let mut r = Regions::new(Geometry { region: M, most: 32 });
        assert!(!r.is_wide(Span::new(0, 8 * M)) && r.is_wide(Span::new(0, 8 * M + 1)));
        r.join(&(0..32).collect());
        assert!(r.enter_hot(Span::new(M / 2, 2 * M)) && !r.enter_hot(Span::new(0, 20 * M)));
        assert_eq!(r.spare(|_| true).len(), 29);
        r.leave_hot(Span::new(M / 2, 2 * M));
        assert_eq!(r.spare(|_| true).len(), 32);
    }
}
