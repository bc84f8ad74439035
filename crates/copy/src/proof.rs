//! What is known of the equality of source and target: which units have been compared since they last changed, which
//! differed, and their hashes.
//!
//! The discipline is that of the dirty bitmap ([`Work`](crate::Work)), one level up. What must stay true:
//! * A unit counts as compared only if what was compared is what both sides held at one instant at which no copy and no
//!   client's write of it was under way, and nothing has changed it since. Its bit in `stale` is cleared *before* it is read, and set
//!   again if the comparison does not come to an end.
//! * Every change that a client makes sets the bit: a write to both sides while it holds the range lock, any other when the
//!   source has it and before the client is answered. That a write reached both sides proves nothing about what the target
//!   holds: it is compared again like all else.
//! * While a client's write that takes no range lock is under way, what it touches is not compared.
//! * Where the source goes on without the target (a copy of one instant), what was read of it is *recorded* by its hash when it is
//!   copied, and the target is compared with that: then no change of a client counts.
//! * When nothing is stale, no comparison is under way and source and target are in sync while no client's request is
//!   inside, then the two were equal at that instant but for what is listed as differing, and the hashes are those of it.

use crate::digest::{DiskDigest, FAN, Hash, LEAF, Leaves, leaf_hash, node_hash, unit_for};
use bitmap::Bitmap;
use block::{BlockError, Data, ErrorKind, Result, Span};
use env::Env;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

/// Differences that are told one by one; of the others the sums alone (a target that is another disk differs everywhere).
const MAX_TOLD: u64 = 256;

/// How much is compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Coverage {
    /// Everything.
    #[default]
    Full,
    /// Of each run of so many units one, chosen by the seed, and the last.
    Sampled {
        /// Units of which one is compared.
        one_of: u64,
        /// What chooses it.
        seed: u64,
    },
}

/// How a comparison is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ProofRules {
    /// How much.
    pub coverage: Coverage,
    /// What differs is copied again, and compared again.
    pub repair: bool,
}

/// Which side changed last where the two differ, as far as whoever compares has seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LastChange {
    /// A client wrote the source.
    Source,
    /// The target was written with what the source held.
    Target,
    /// A client's write went to both.
    Both,
    /// Neither, since this began.
    Unknown,
}

impl LastChange {
    /// The name in events.
    pub const fn name(self) -> &'static str {
        match self {
            LastChange::Source => "source",
            LastChange::Target => "target",
            LastChange::Both => "both",
            LastChange::Unknown => "unknown",
        }
    }
}

/// A place where source and target differ.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mismatch {
    /// From the first to the last byte that differs.
    pub at: Span,
    /// Who wrote there last.
    pub last: LastChange,
    /// It is copied again.
    pub repair: bool,
}

/// What a comparison has come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// How it is done.
    pub rules: ProofRules,
    /// Bytes compared at least once and not changed since.
    pub verified: u64,
    /// Bytes that are to be compared (again).
    pub remaining: u64,
    /// Differences found.
    pub mismatches: u64,
    /// Bytes from the first to the last differing one of each.
    pub mismatched: u64,
    /// Where the first of the disk is.
    pub first: Option<Span>,
    /// Units that differed, were copied again and found equal.
    pub repaired: u64,
    /// The target told its hashes; its bytes were not read.
    pub by_hash: bool,
    /// The digest of both, once they were equal at one instant.
    pub digest: Option<DiskDigest>,
}

/// See the top of this file.
pub struct Proof {
    rules: ProofRules,
    unit: u64,
    /// To be compared.
    pub(crate) stale: RefCell<Bitmap>,
    /// Never compared yet.
    fresh: RefCell<Bitmap>,
    /// All that counts: what is not sampled is never compared.
    chosen: Cell<u64>,
    /// Compared is with what was recorded, not with the source.
    record: Option<Record>,
    sample: Option<Bitmap>,
    /// Copied again after a difference, and not compared since.
    mended: RefCell<Bitmap>,
    /// Differed and is not to be mended, or differed again.
    bad: RefCell<Bitmap>,
    by_source: RefCell<Bitmap>,
    by_target: RefCell<Bitmap>,
    /// Writes of clients under way without a range lock.
    loose: RefCell<Vec<(u64, Span)>>,
    next_loose: Cell<u64>,
    /// Comparisons in hand, and their bytes.
    pub(crate) checks: Cell<u32>,
    pub(crate) checking: Cell<u64>,
    /// Bytes compared in all.
    compared: Cell<u64>,
    leaves: RefCell<Option<Leaves>>,
    found: RefCell<Report>,
    /// A unit differed again after it had been copied again.
    beyond_repair: Cell<bool>,
}

/// What of the source has been recorded.
struct Record {
    whole: RefCell<Bitmap>,
    /// Leaves of units of which others are still missing.
    parts: RefCell<BTreeMap<u64, [Option<Hash>; FAN]>>,
}

/// A client's write under way that takes no range lock.
pub(crate) struct LooseWrite(u64);

/// The finalizer of splitmix64 (Steele, Lea, Flood 2014): spreads the choice of samples.
const fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Proof {
    /// For disks of `len` bytes of which nothing has been compared.
    pub fn new(len: u64, rules: ProofRules) -> Result<Proof> {
        let unit = unit_for(len);
        let none = || Bitmap::new(len, unit).map(RefCell::new);
        let mut stale = Bitmap::new(len, unit)?;
        match rules.coverage {
            Coverage::Full => stale.set_all(),
            Coverage::Sampled { one_of, seed } => sample(&mut stale, one_of.max(1), seed),
        }
        let full = rules.coverage == Coverage::Full;
        Ok(Proof {
            rules,
            unit,
            chosen: Cell::new(stale.dirty_bytes()),
            record: None,
            fresh: RefCell::new(stale.clone()),
            sample: (!full).then(|| stale.clone()),
            stale: RefCell::new(stale),
            mended: none()?,
            bad: none()?,
            by_source: none()?,
            by_target: none()?,
            loose: RefCell::default(),
            next_loose: Cell::new(0),
            checks: Cell::new(0),
            checking: Cell::new(0),
            compared: Cell::new(0),
            leaves: RefCell::new(full.then(|| Leaves::new(len))),
            found: RefCell::new(Report { rules, ..Report::default() }),
            beyond_repair: Cell::new(false),
        })
    }

    /// The same, where what is copied is recorded, and the target compared with that: nothing is to be compared at first.
    pub fn recording(len: u64, rules: ProofRules) -> Result<Proof> {
        let mut proof = Proof::new(len, rules)?;
        let none = Bitmap::new(len, proof.unit)?;
        proof.record = Some(Record { whole: RefCell::new(none.clone()), parts: RefCell::default() });
        proof.sample = Some(proof.stale.replace(none.clone()));
        proof.fresh = RefCell::new(none);
        proof.chosen.set(0);
        proof.leaves = RefCell::new(Some(Leaves::new(len)));
        Ok(proof)
    }

    /// Whether what is copied is recorded.
    pub(crate) fn is_recording(&self) -> bool {
        self.record.is_some()
    }

    /// The hashes of the leaves of `at` (whole ones, or up to the disk's end), which was read of the source to be copied.
    pub(crate) fn recorded(&self, at: Span, leaves: &[Hash]) {
        let (Some(record), Some(sample)) = (&self.record, &self.sample) else { return };
        let len = sample.len();
        for (leaf, hash) in at.pieces(LEAF).zip(leaves) {
            let unit = Span::new(leaf.start, 1).align_out(self.unit).intersect(&Span::new(0, len));
            if !sample.get(unit.start) {
                continue;
            }
            let hash = if self.unit == LEAF {
                *hash
            } else {
                let mut parts = record.parts.borrow_mut();
                let known = parts.entry(unit.start).or_default();
                known[((leaf.start - unit.start) / LEAF) as usize] = Some(*hash);
                let all: Vec<Hash> = known.iter().map_while(|h| *h).collect();
                if all.len() as u64 != unit.len.div_ceil(LEAF) {
                    continue;
                }
                parts.remove(&unit.start);
                node_hash(&all)
            };
            if let Some(leaves) = self.leaves.borrow_mut().as_mut() {
                leaves.set(unit.start, hash);
            }
            let before = record.whole.borrow().count();
            record.whole.borrow_mut().set(unit);
            self.chosen.set(self.chosen.get() + record.whole.borrow().count() - before);
            self.stale.borrow_mut().set(unit);
            self.fresh.borrow_mut().set(unit);
        }
    }

    /// `at` of the source was zero when it was copied.
    pub(crate) fn recorded_zero(&self, at: Span) {
        let (Some(record), Some(sample)) = (&self.record, &self.sample) else { return };
        let end = if at.end() >= sample.len() { sample.len() } else { at.end() & !(self.unit - 1) };
        let inner = Span::between(at.start.next_multiple_of(self.unit).min(end), end);
        for part in [
            Span::between(at.start, inner.start.min(at.end())),
            Span::between(inner.end().max(at.start), at.end()),
        ] {
            let leaves: Vec<Hash> =
                part.pieces(LEAF).map(|l| leaf_hash(&Data::zeroes(l.len as usize))).collect();
            self.recorded(part, &leaves);
        }
        for area in sample.areas(inner, 0) {
            if let Some(leaves) = self.leaves.borrow_mut().as_mut() {
                leaves.set_zero(area);
            }
            let before = record.whole.borrow().count();
            record.whole.borrow_mut().set(area);
            self.chosen.set(self.chosen.get() + record.whole.borrow().count() - before);
            self.stale.borrow_mut().set(area);
            self.fresh.borrow_mut().set(area);
        }
    }

    /// A client changes `at`: what was recorded of it says nothing any more.
    pub(crate) fn forget(&self, at: Span) {
        let Some(record) = &self.record else { return };
        let at = at.align_out(self.unit);
        let before = record.whole.borrow().count();
        for map in [&record.whole, &self.stale, &self.fresh] {
            map.borrow_mut().clear(at);
        }
        self.chosen.set(self.chosen.get() + record.whole.borrow().count() - before);
        record.parts.borrow_mut().retain(|start, _| !at.contains_offset(*start));
    }

    /// Whether the unit that begins at `at` is recorded.
    pub(crate) fn is_recorded(&self, at: u64) -> bool {
        self.record.as_ref().is_some_and(|r| r.whole.borrow().get(at))
    }

    /// Whether all of `at` was recorded as zeroes.
    pub(crate) fn expects_zero(&self, at: Span) -> bool {
        self.leaves.borrow().as_ref().is_some_and(|l| l.is_zero(at))
    }

    /// The hash recorded of the unit that begins at `at`.
    pub(crate) fn expected(&self, at: u64) -> Option<Hash> {
        self.leaves.borrow().as_ref().map(|l| l.get(at))
    }

    /// Bytes of the unit in which it is compared.
    pub fn unit(&self) -> u64 {
        self.unit
    }

    /// How it is done.
    pub fn rules(&self) -> &ProofRules {
        &self.rules
    }

    /// Whether a digest of the whole will come of it.
    pub(crate) fn wants_hashes(&self) -> bool {
        self.leaves.borrow().is_some()
    }

    /// `at` has changed, or may have; what is not in the sample is left out. Bytes that were not stale before.
    pub(crate) fn touch(&self, at: Span) -> u64 {
        if self.record.is_some() { 0 } else { self.unsettle(at) }
    }

    /// `at` is to be compared (again).
    pub(crate) fn unsettle(&self, at: Span) -> u64 {
        if let Some(record) = &self.record {
            // what was forgotten meanwhile stays so
            record.whole.borrow().areas(at, 0).for_each(|a| self.stale.borrow_mut().set(a));
            return 0;
        }
        let mut stale = self.stale.borrow_mut();
        let before = stale.count();
        match &self.sample {
            None => stale.set(at),
            Some(sample) => sample.areas(at.align_out(self.unit), 0).for_each(|a| stale.set(a)),
        }
        stale.count() - before
    }

    /// A client wrote the source, or source and target.
    pub(crate) fn wrote_source(&self, at: Span, and_target: bool) {
        self.by_source.borrow_mut().set(at);
        if and_target {
            self.by_target.borrow_mut().set(at);
        } else {
            self.by_target.borrow_mut().clear(at.align_out(self.unit));
        }
    }

    /// What the source holds was written to the target.
    pub(crate) fn wrote_target(&self, at: Span) {
        self.by_target.borrow_mut().set(at);
        self.by_source.borrow_mut().clear(at.align_out(self.unit));
    }

    fn last_change(&self, at: u64) -> LastChange {
        match (self.by_source.borrow().get(at), self.by_target.borrow().get(at)) {
            (true, true) => LastChange::Both,
            (true, false) => LastChange::Source,
            (false, true) => LastChange::Target,
            (false, false) => LastChange::Unknown,
        }
    }

    /// A client's write begins that takes no range lock.
    pub(crate) fn loose_begins(&self, at: Span) -> LooseWrite {
        let id = self.next_loose.get();
        self.next_loose.set(id + 1);
        self.loose.borrow_mut().push((id, at));
        LooseWrite(id)
    }

    /// It has ended, and what it changed is marked.
    pub(crate) fn loose_ended(&self, write: &LooseWrite) {
        self.loose.borrow_mut().retain(|(id, _)| *id != write.0);
    }

    /// Whether no such write is under way anywhere.
    pub(crate) fn is_calm(&self) -> bool {
        self.loose.borrow().is_empty()
    }

    pub(crate) fn loose_overlaps(&self, at: &Span) -> bool {
        self.loose.borrow().iter().any(|(_, l)| l.overlaps(at))
    }

    /// Bytes to be compared.
    pub fn stale_bytes(&self) -> u64 {
        self.stale.borrow().dirty_bytes()
    }

    /// Bytes never compared.
    pub fn fresh_bytes(&self) -> u64 {
        self.fresh.borrow().dirty_bytes()
    }

    /// Bytes that were compared at least once.
    pub fn passed(&self) -> u64 {
        self.chosen.get() - self.fresh_bytes()
    }

    /// Bytes compared in all, again and again.
    pub fn compared(&self) -> u64 {
        self.compared.get()
    }

    /// Comparisons under way.
    pub fn checks(&self) -> u32 {
        self.checks.get()
    }

    /// Nothing is stale and no comparison under way.
    pub fn is_settled(&self) -> bool {
        self.stale.borrow().is_empty() && self.checks.get() == 0
    }

    /// Whether something differs that will not be mended.
    pub fn has_failed(&self) -> bool {
        !self.bad.borrow().is_empty()
    }

    /// `at` was compared at an instant; `hashes` are those of its units, if they are wanted.
    pub(crate) fn equal(&self, at: Span, hashes: &[Hash]) {
        self.compared.set(self.compared.get() + at.len);
        self.fresh.borrow_mut().clear(at);
        let mended = {
            let mut mended = self.mended.borrow_mut();
            let count = mended.areas(at, 0).map(|a| a.len.div_ceil(self.unit)).sum::<u64>();
            mended.clear(at);
            count
        };
        self.found.borrow_mut().repaired += mended;
        if self.is_recording() {
            return;
        }
        if let Some(leaves) = self.leaves.borrow_mut().as_mut() {
            for (i, hash) in hashes.iter().enumerate() {
                leaves.set(at.start + i as u64 * self.unit, *hash);
            }
        }
    }

    /// Both were zero in all of `at`.
    pub(crate) fn equal_zero(&self, at: Span) {
        self.equal(at, &[]);
        if let Some(leaves) = self.leaves.borrow_mut().as_mut() {
            leaves.set_zero(at);
        }
    }

    /// The unit `unit` was compared and differs in `runs`; `can` says whether it can be mended. What is to be told, and whether it
    /// is to be copied again.
    pub(crate) fn differs(&self, unit: Span, runs: &[Span], can: bool) -> (Vec<Mismatch>, bool) {
        self.compared.set(self.compared.get() + unit.len);
        self.fresh.borrow_mut().clear(unit);
        let again = self.mended.borrow().get(unit.start);
        let repair = self.rules.repair && can && !again;
        if again && self.rules.repair {
            self.beyond_repair.set(true);
        }
        if repair {
            self.mended.borrow_mut().set(unit);
        } else {
            self.bad.borrow_mut().set(unit);
        }
        let last = self.last_change(unit.start);
        let mut found = self.found.borrow_mut();
        let mut told = Vec::new();
        for at in runs {
            found.mismatches += 1;
            found.mismatched += at.len;
            if found.first.is_none_or(|f| at.start < f.start) {
                found.first = Some(*at);
            }
            if found.mismatches <= MAX_TOLD {
                told.push(Mismatch { at: *at, last, repair });
            }
        }
        (told, repair)
    }

    /// Fails if something differs that is not mended.
    pub fn verdict(&self) -> Result<()> {
        if !self.has_failed() {
            return Ok(());
        }
        let found = self.found.borrow();
        let first = found.first.unwrap_or_else(|| Span::new(0, 0));
        let places = if found.mismatches == 1 { "place" } else { "places" };
        let again = if self.beyond_repair.get() { " again after copying it again" } else { "" };
        let message = format!(
            "target differs from source{again}: {} {places}, the first at offset {} ({} bytes)",
            found.mismatches, first.start, first.len
        );
        Err(BlockError::new(ErrorKind::Io, message))
    }

    /// What is known now.
    pub fn report(&self) -> Report {
        let remaining = self.stale_bytes() + self.checking.get();
        let bad = self.bad.borrow().dirty_bytes();
        Report {
            remaining,
            verified: self.chosen.get().saturating_sub(remaining + bad),
            ..*self.found.borrow()
        }
    }

    /// The target told its hashes.
    pub(crate) fn note_by_hash(&self) {
        self.found.borrow_mut().by_hash = true;
    }

    /// The digest of what has been compared, for a full comparison that is settled and found no difference that was not mended; it is
    /// in the report from then on. On a helper thread. The hashes are used up by it.
    pub async fn seal(&self, env: &Env) -> Result<()> {
        let whole = self.rules.coverage == Coverage::Full
            && self.record.as_ref().is_none_or(|r| r.whole.borrow().next_clean(0).is_none());
        if !self.is_settled() || self.has_failed() || !whole {
            return Ok(());
        }
        let Some(leaves) = self.leaves.take() else { return Ok(()) };
        let digest = env.offload(move || leaves.digest()).await?;
        self.found.borrow_mut().digest = Some(digest);
        Ok(())
    }
}

/// One unit of each run of `one_of`, and the last of the disk: what a truncated copy lacks.
fn sample(chosen: &mut Bitmap, one_of: u64, seed: u64) {
    let (len, unit) = (chosen.len(), chosen.granularity());
    let units = len.div_ceil(unit);
    for run in 0..units.div_ceil(one_of) {
        let begin = run * one_of;
        let of = one_of.min(units - begin);
        chosen.set(Span::new((begin + mix(seed ^ mix(run)) % of) * unit, 1));
    }
    if len > 0 {
        chosen.set(Span::new(len - 1, 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(units: u64) -> Proof {
        Proof::new(units << 16, ProofRules::default()).expect("a size")
    }

    #[test]
    fn a_change_makes_a_unit_stale_and_what_is_stale_is_no_proof() {
        let p = full(4);
        assert_eq!((p.stale_bytes(), p.fresh_bytes()), (4 << 16, 4 << 16));
        p.stale.borrow_mut().clear_all();
        p.equal(Span::new(0, 4 << 16), &[[1; 32]; 4]);
        assert!(p.is_settled() && p.fresh_bytes() == 0);
        assert_eq!(p.touch(Span::new(65_000, 1000)), 2 << 16);
        assert_eq!(p.touch(Span::new(65_000, 10)), 0);
        assert!(!p.is_settled() && p.fresh_bytes() == 0);
        assert_eq!(p.report().verified, 2 << 16);
    }

    #[test]
    fn what_differs_is_named_once_mended_once_and_then_given_up() {
        let p = Proof::new(2 << 16, ProofRules { repair: true, ..ProofRules::default() }).expect("a size");
        p.wrote_target(Span::new(0, 1));
        let unit = Span::new(0, 1 << 16);
        let (told, repair) = p.differs(unit, &[Span::new(5, 1)], true);
        assert_eq!(told, [Mismatch { at: Span::new(5, 1), last: LastChange::Target, repair: true }]);
        assert!(repair && p.verdict().is_ok());
        p.equal(unit, &[[0; 32]]);
        assert_eq!(p.report().repaired, 1);
        assert!(p.differs(unit, &[Span::new(5, 1)], true).1);
        assert!(!p.differs(unit, &[Span::new(5, 1)], true).1);
        let why = p.verdict().expect_err("it differs").message().to_owned();
        assert!(why.contains("again after copying it again") && why.contains("offset 5"), "{why}");
    }

    #[test]
    fn samples_are_spread_and_repeatable() {
        let of = |seed| {
            let rules = ProofRules { coverage: Coverage::Sampled { one_of: 20, seed }, repair: false };
            let p = Proof::new(1000 << 16, rules).expect("a size");
            let chosen: Vec<u64> = (0..1000).filter(|u| p.stale.borrow().get(u << 16)).collect();
            chosen
        };
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
        assert!((50..=51).contains(&of(1).len()) && of(1).contains(&999));
        assert!(of(1).windows(2).all(|w| w[1] - w[0] < 40));
    }
}
