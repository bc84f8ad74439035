//! Which regions are hot, who is writing where, and which regions leave. Pure.
//!
//! What must stay true: a region with writes under way stays hot; a region leaves only if its marks are durable; what a crash puts in
//! doubt has a bound: the base of the geometry, and as much again as the bitmaps have marked durably already. (So that a
//! workload that writes all over a disk has most of it hot soon, and a crash makes no bitmap more than twice as large, and the
//! base.)
//!
//! Nearly every request only looks a region up and notes that it is under way. So the hot set is a sorted list with an index to
//! look numbers up, and writes under way are a list of places: who is busy where is found out when somebody has to leave.

use block::Span;
use std::collections::BTreeSet;

/// Smallest region: a barrier for every MiB of a sequential write is dear enough.
const MIN_REGION: u64 = 1 << 20;
/// Largest region.
const MAX_REGION: u64 = 16 << 20;
/// A disk has about so many regions, if their size has no bound in the way.
const REGIONS: u64 = 2560;
/// One part in so many of the disk may be hot: 160 MiB of 10 GiB.
const SHARE: u64 = 64;
/// So much may be hot of every disk: nobody minds copying it once more.
const FLOOR: u64 = 128 << 20;
/// Fewest hot regions: as many as the depth of a busy queue.
const LEAST: u64 = 32;
/// Most hot regions whatever is marked: 4 GiB of the largest disks.
const MOST: u64 = 256;
/// Regions that become hot with one whose predecessor is hot: one record for so many of a sequential write.
const RUN: usize = 8;
/// Slots of the index, at least twice as many as there are hot regions. A power of two.
const SLOTS: usize = 1024;

/// How a disk is cut into regions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes of a region, a power of two.
    pub region: u64,
    /// Regions that may be hot whatever is marked.
    pub most: usize,
    /// Regions that may be hot if enough is marked.
    pub limit: usize,
}

/// The geometry for a disk of `len` bytes: about 1.6 % of it may be in doubt, at least 128 MiB, at most 4 GiB, beside what the
/// bitmaps themselves allow.
pub fn geometry_for(len: u64) -> Geometry {
    let region = len.div_ceil(REGIONS).clamp(MIN_REGION, MAX_REGION).next_power_of_two();
    let most = ((len / SHARE).max(FLOOR) / region).clamp(LEAST, MOST);
    Geometry { region, most: most as usize, limit: crate::layout::MAX_HOT }
}

struct Hot {
    number: u64,
    /// The turn in which it was last made hot or written to.
    used: u64,
}

/// Why a write may go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Nothing,
    Hot,
    Marks,
}

/// A write under way.
struct Flight {
    at: Span,
    by: By,
}

/// What the durable marks of all bitmaps say of a place.
pub(crate) trait Marks {
    /// All marks there are durable.
    fn clean(&self, at: Span) -> bool;
    /// Bytes that some bitmap which records has not durably marked.
    fn open(&self, at: Span) -> u64;
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
    /// By number.
    hot: Vec<Hot>,
    /// Places in `hot` plus one, at the hash of the number or behind it; 0 is an empty slot.
    index: Vec<u16>,
    flights: Vec<Flight>,
    /// Unused places of `flights`.
    free: Vec<u32>,
    turn: u64,
    /// Writes begun, to notice that there are any.
    begun: u64,
}

fn slot_of(number: u64) -> usize {
    // Fibonacci hashing: the upper bits of the product differ for neighbours
    (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SLOTS.trailing_zeros())) as usize
}

impl Regions {
    pub(crate) fn new(geo: Geometry) -> Regions {
        let limit = geo.limit.max(geo.most).min(crate::layout::MAX_HOT);
        let geo = Geometry { limit, ..geo };
        let (hot, flights, free) = (Vec::new(), Vec::new(), Vec::new());
        Regions { geo, hot, index: vec![0; SLOTS], flights, free, turn: 0, begun: 0 }
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

    /// Where in `hot` the region is.
    fn find(&self, number: u64) -> Option<usize> {
        let mut slot = slot_of(number);
        loop {
            let i = usize::from(*self.index.get(slot)?).checked_sub(1)?;
            if self.hot.get(i)?.number == number {
                return Some(i);
            }
            slot = (slot + 1) % SLOTS;
        }
    }

    fn is_hot(&self, number: u64) -> bool {
        self.find(number).is_some()
    }

    fn reindex(&mut self) {
        self.index.fill(0);
        for (i, h) in self.hot.iter().enumerate() {
            let mut slot = slot_of(h.number);
            // There are more slots than regions (`SLOTS`, `layout::MAX_HOT`).
            while self.index[slot] != 0 {
                slot = (slot + 1) % SLOTS;
            }
            self.index[slot] = i as u16 + 1;
        }
    }

    fn fly(&mut self, at: Span, by: By) -> u32 {
        match self.free.pop() {
            Some(i) => {
                self.flights[i as usize] = Flight { at, by };
                i
            }
            None => {
                self.flights.push(Flight { at, by });
                (self.flights.len() - 1) as u32
            }
        }
    }

    /// Begins a write if all its regions are hot; its number is to be given back with [`Regions::land`].
    pub(crate) fn enter_hot(&mut self, at: Span) -> Option<u32> {
        self.begun = self.begun.wrapping_add(1);
        let numbers = self.numbers(at);
        if numbers.end - numbers.start == 1 {
            // nearly every request
            let i = self.find(numbers.start)?;
            self.hot[i].used = self.turn;
            return Some(self.fly(at, By::Hot));
        }
        if self.is_wide(at) || !numbers.clone().all(|n| self.is_hot(n)) {
            return None;
        }
        for n in numbers {
            if let Some(i) = self.find(n) {
                self.hot[i].used = self.turn;
            }
        }
        Some(self.fly(at, By::Hot))
    }

    /// Grows with each write.
    pub(crate) fn begun(&self) -> u64 {
        self.begun
    }

    /// A write begins whose marks are durable.
    pub(crate) fn enter_marked(&mut self, at: Span) -> u32 {
        self.fly(at, By::Marks)
    }

    /// A write has ended.
    pub(crate) fn land(&mut self, number: u32) {
        if let Some(f) = self.flights.get_mut(number as usize).filter(|f| f.by != By::Nothing) {
            f.by = By::Nothing;
            self.free.push(number);
        }
    }

    /// Writes under way that no hot region covers.
    pub(crate) fn marked(&self) -> Vec<Span> {
        self.flights.iter().filter(|f| f.by == By::Marks).map(|f| f.at).collect()
    }

    /// Numbers of the hot regions.
    pub(crate) fn hot(&self) -> impl Iterator<Item = u64> + '_ {
        self.hot.iter().map(|h| h.number)
    }

    /// How many are hot.
    pub(crate) fn count(&self) -> usize {
        self.hot.len()
    }

    /// Idle regions: those that are marked throughout first (nobody needs them hot), then the one that was used longest ago.
    fn idle(&self, marks: &impl Marks) -> Vec<u64> {
        let flights = self.flights.iter().filter(|f| f.by == By::Hot);
        let busy: BTreeSet<u64> = flights.flat_map(|f| self.numbers(f.at)).collect();
        let idle = self.hot.iter().filter(|h| !busy.contains(&h.number));
        let mut idle: Vec<_> =
            idle.map(|h| (marks.open(self.span(h.number)) > 0, h.used, h.number)).collect();
        idle.sort_unstable();
        idle.into_iter().map(|(_, _, n)| n).collect()
    }

    /// Idle regions whose marks are durable.
    pub(crate) fn spare(&self, marks: &impl Marks) -> BTreeSet<u64> {
        self.idle(marks).into_iter().filter(|n| marks.clean(self.span(*n))).collect()
    }

    /// Idle regions whose marks are durable and that have to leave so that no more than `extra` bytes beside the base are in doubt.
    pub(crate) fn surplus(&self, marks: &impl Marks, extra: u64) -> BTreeSet<u64> {
        let mut room = Room::new(self, marks, extra);
        let mut leave = BTreeSet::new();
        if room.is_over() {
            for n in self.idle(marks).into_iter().filter(|n| marks.clean(self.span(*n))) {
                leave.insert(n);
                room.take(n);
                if !room.is_over() {
                    break;
                }
            }
        }
        leave
    }

    /// Who of those who wait can go next, and what has to change for that. `extra` bytes may be in doubt beside the base.
    pub(crate) fn choose(
        &self,
        waiting: impl Iterator<Item = Span>,
        marks: &impl Marks,
        extra: u64,
    ) -> Choice {
        let mut c = Choice::default();
        let mut room = Room::new(self, marks, extra);
        let mut pinned = BTreeSet::new();
        let mut idle = None;
        for at in waiting {
            // What one of those before wanted, or was to leave for one of those, is not hot twice.
            let wanted = self.numbers(at);
            let back: Vec<u64> = wanted.clone().filter(|n| c.leave.remove(n)).collect();
            let more: Vec<u64> = wanted.clone().filter(|n| !self.is_hot(*n) && c.join.insert(*n)).collect();
            back.iter().chain(&more).for_each(|n| room.put(*n));
            pinned.extend(wanted);
            let mut left = Vec::new();
            while room.is_over() {
                let idle = idle.get_or_insert_with(|| self.idle(marks).into_iter());
                let Some(next) = idle.next() else {
                    // This one has to wait, and what was for it alone is not done.
                    more.iter().for_each(|n| {
                        c.join.remove(n);
                    });
                    left.iter().for_each(|n| {
                        c.leave.remove(n);
                    });
                    c.leave.extend(back);
                    return c;
                };
                if pinned.contains(&next) {
                    continue;
                }
                if marks.clean(self.span(next)) {
                    c.leave.insert(next);
                    left.push(next);
                    room.take(next);
                } else {
                    c.wash = true;
                }
            }
            c.granted += 1;
        }
        self.run_ahead(&mut c, room);
        c
    }

    /// Lets the next regions of sequential writes become hot as well, as far as there is room.
    fn run_ahead<M: Marks>(&self, c: &mut Choice, mut room: Room<'_, M>) {
        let runs: Vec<u64> =
            c.join.iter().copied().filter(|n| n.checked_sub(1).is_some_and(|p| self.is_hot(p))).collect();
        for first in runs {
            for next in (first + 1..).take((self.geo.most / RUN).min(RUN)) {
                // what is marked throughout, or beyond the end, need not be hot
                if self.is_hot(next) || c.join.contains(&next) || room.marks.open(self.span(next)) == 0 {
                    break;
                }
                room.put(next);
                if room.is_over() {
                    return;
                }
                c.join.insert(next);
            }
        }
    }

    /// These leave: from now on nobody writes there as to a hot region.
    pub(crate) fn retire(&mut self, leave: &BTreeSet<u64>) {
        if !leave.is_empty() {
            self.hot.retain(|h| !leave.contains(&h.number));
            self.reindex();
        }
    }

    /// These are hot from now on.
    pub(crate) fn join(&mut self, join: &BTreeSet<u64>) {
        self.turn += 1;
        let new = join.iter().filter(|n| !self.is_hot(**n)).map(|n| Hot { number: *n, used: self.turn });
        let new: Vec<Hot> = new.collect();
        if !new.is_empty() {
            self.hot.extend(new);
            self.hot.sort_unstable_by_key(|h| h.number);
            self.reindex();
        }
    }
}

/// How much room the hot set has left.
struct Room<'a, M> {
    regions: &'a Regions,
    marks: &'a M,
    count: usize,
    /// Bytes in doubt; counted only once there are more than the base.
    open: Option<u64>,
    changed: Vec<(u64, bool)>,
    extra: u64,
}

impl<'a, M: Marks> Room<'a, M> {
    fn new(regions: &'a Regions, marks: &'a M, extra: u64) -> Room<'a, M> {
        Room { regions, marks, count: regions.hot.len(), open: None, changed: Vec::new(), extra }
    }

    fn open_of(&self, number: u64) -> u64 {
        self.marks.open(self.regions.span(number))
    }

    fn put(&mut self, number: u64) {
        self.change(number, true);
    }

    fn take(&mut self, number: u64) {
        self.change(number, false);
    }

    fn change(&mut self, number: u64, more: bool) {
        self.count = if more { self.count + 1 } else { self.count.saturating_sub(1) };
        match self.open {
            None => self.changed.push((number, more)),
            Some(open) => {
                let here = self.open_of(number);
                self.open = Some(if more { open + here } else { open.saturating_sub(here) });
            }
        }
    }

    fn is_over(&mut self) -> bool {
        let geo = self.regions.geo;
        if self.count <= geo.most {
            return false;
        }
        if self.count > geo.limit || self.extra == 0 {
            return true;
        }
        let open = match self.open {
            Some(open) => open,
            None => {
                let (more, less): (Vec<_>, Vec<_>) = self.changed.iter().partition(|(_, more)| *more);
                let sum = |all: &mut dyn Iterator<Item = u64>| all.map(|n| self.open_of(n)).sum::<u64>();
                let there = sum(&mut self.regions.hot()) + sum(&mut more.iter().map(|(n, _)| *n));
                there.saturating_sub(sum(&mut less.iter().map(|(n, _)| *n)))
            }
        };
        self.open = Some(open);
        open > (geo.most as u64).saturating_mul(geo.region).saturating_add(self.extra)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;

    /// All is open, and durable but one region.
    struct But(Option<u64>);
    impl Marks for But {
        fn clean(&self, at: Span) -> bool {
            self.0.is_none_or(|n| at.start != n * M)
        }
        fn open(&self, at: Span) -> u64 {
            at.len
        }
    }

    struct Nothing;
    impl Marks for Nothing {
        fn clean(&self, _: Span) -> bool {
            false
        }
        fn open(&self, at: Span) -> u64 {
            at.len
        }
    }

    fn geometry(most: usize, limit: usize) -> Geometry {
        Geometry { region: M, most, limit }
    }

    #[test]
    fn what_is_in_doubt_is_bounded_by_the_disk_s_length() {
        for (len, region, doubt) in [
            (64 * M, M, 128 * M),
            (10 << 30, 4 * M, 160 * M),
            (100 << 30, 16 * M, 1600 * M),
            (64 << 40, 16 * M, 4096 * M),
        ] {
            let g = geometry_for(len);
            assert_eq!((g.region, g.region * g.most as u64), (region, doubt), "{len}");
            assert!(g.most <= g.limit && g.limit <= crate::layout::MAX_HOT && 2 * g.limit <= SLOTS);
        }
        let _no_panic = (geometry_for(0), geometry_for(u64::MAX));
    }

    #[test]
    fn the_least_recently_written_idle_region_leaves_first_and_only_if_its_marks_are_durable() {
        let mut r = Regions::new(geometry(4, 4));
        let at = |n: u64| Span::new(n * M, 4096);
        r.join(&BTreeSet::from([0, 1, 2, 3]));
        let (zero, two) = (r.enter_hot(at(0)), r.enter_hot(at(2)));
        assert!(zero.is_some() && r.enter_hot(at(4)).is_none());
        r.land(two.expect("hot"));
        r.join(&BTreeSet::new());
        let one = r.enter_hot(at(1)).expect("hot");
        r.land(one);
        // 0 is being written to; 3 was never used, 2 before 1
        let c = r.choose([at(7), at(8)].into_iter(), &But(None), 0);
        assert_eq!((c.granted, c.leave), (2, BTreeSet::from([2, 3])));
        let c = r.choose([at(7), at(8)].into_iter(), &But(Some(2)), 0);
        assert_eq!((c.granted, c.leave, c.wash), (2, BTreeSet::from([1, 3]), true));
        let c = r.choose([at(7)].into_iter(), &Nothing, 0);
        assert!(c.granted == 0 && c.wash && c.join.is_empty() && c.leave.is_empty());
        // What a later one waits for does not leave for an earlier one.
        let c = r.choose([at(7), at(3)].into_iter(), &But(None), 0);
        assert!(!c.leave.contains(&3) && c.granted == 2, "{c:?}");
        // As many wait as there is room for.
        let c = r.choose((10..20).map(at), &But(None), 0);
        assert_eq!((c.granted, c.join.len(), c.leave.len()), (3, 3, 3));
    }

    #[test]
    fn a_wide_write_does_not_sweep_the_hot_set() {
        let mut r = Regions::new(geometry(32, 32));
        assert!(!r.is_wide(Span::new(0, 8 * M)) && r.is_wide(Span::new(0, 8 * M + 1)));
        r.join(&(0..32).collect());
        let flight = r.enter_hot(Span::new(M / 2, 2 * M)).expect("hot");
        assert!(r.enter_hot(Span::new(0, 20 * M)).is_none());
        assert_eq!(r.spare(&But(None)).len(), 29);
        r.land(flight);
        // one that has ended does not end again
        r.land(flight);
        assert_eq!((r.spare(&But(None)).len(), r.free.len()), (32, 1));
    }

    #[test]
    fn as_much_again_as_is_marked_may_be_hot_and_leaves_when_the_marks_do() {
        let mut r = Regions::new(geometry(4, 16));
        r.join(&(0..4).collect());
        let at = |n: u64| Span::new(n * M, 4096);
        let c = r.choose((4..20).map(at), &But(None), 3 * M);
        // 0 to 3 leave only for those who come after
        assert_eq!(c.join, (4..=10).collect(), "{c:?}");
        assert_eq!(c.leave, (0..4).collect());
        let c = r.choose((4..30).map(at), &But(None), 1000 * M);
        assert_eq!((c.granted, c.join.len(), c.leave.len()), (16, 16, 4), "the limit");
        r.join(&(4..16).collect());
        assert_eq!(r.surplus(&But(None), 12 * M).len(), 0);
        assert_eq!(r.surplus(&But(None), 5 * M).len(), 7);
        assert_eq!(r.surplus(&But(None), 0).len(), 12);
        let flights: Vec<_> = (0..16).filter_map(|n| r.enter_hot(at(n))).collect();
        assert_eq!((r.surplus(&But(None), 0).len(), flights.len()), (0, 16), "all are busy");
    }

    #[test]
    fn a_sequential_write_makes_the_next_regions_hot_with_one_record() {
        let mut r = Regions::new(geometry(64, 64));
        let at = |n: u64| Span::new(n * M, 4096);
        r.join(&BTreeSet::from([5]));
        let c = r.choose([at(20), at(6)].into_iter(), &But(None), 0);
        assert_eq!(c.join, (6..15).chain([20]).collect());
    }

    #[test]
    fn the_index_finds_what_is_hot_and_nothing_else() {
        let mut r = Regions::new(geometry(256, 448));
        let far = |n: u64| n * n * 7919 % (1 << 40);
        let all: BTreeSet<u64> = (0..448).map(far).collect();
        r.join(&all);
        let odd: BTreeSet<u64> = all.iter().copied().filter(|n| n % 3 == 1).collect();
        r.retire(&odd);
        for n in all.iter().flat_map(|n| [*n, n + 1, n ^ 1]) {
            assert_eq!(r.is_hot(n), all.contains(&n) && !odd.contains(&n), "{n}");
        }
    }
}
