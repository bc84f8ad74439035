//! One piece of a comparison: read both sides at one instant, compare and hash what was read on a helper thread.
//!
//! The range lock is held until what was found is noted, so that of two comparisons of the same bytes the later one is noted last. A
//! client's synchronous write waits for two reads of one piece and its hash at the most (a short piece while clients are active), and
//! any other client's write not at all.

use crate::bugs::{Bug, planted};
use crate::digest::{Hash, LEAF, node_hash, unit_hash};
use crate::piece::{Ended, Outcome, Shared};
use crate::policy::Side;
use crate::proof::Proof;
use crate::ranges::RangeTicket;
use crate::status::status_all;
use crate::window::MAX_PIECE;
use crate::work::Work;
use block::{BlockError, Data, Kind, Result, Span};
use env::sync::Queue;
use graph::Edge;
use std::rc::Rc;

/// Most that is compared as one piece where both sides are zero, which needs no reading.
pub(crate) const MAX_ZERO_CHECK: u64 = 1 << 30;
/// Differing bytes no farther apart count as one place: the smallest thing that a disk writes.
const GAP: u64 = 512;
/// Most places told of one unit; what is behind the last but one is told as one.
const MAX_PLACES: usize = 16;

/// A comparison about to run. Counts as under way from its making on.
pub(crate) struct CheckTask {
    shared: Rc<Shared>,
    proof: Rc<Proof>,
    at: Span,
    lock: RangeTicket,
    outcomes: Rc<Queue<Ended>>,
    slot: Slot,
}

/// Counts a comparison until it is dropped.
struct Slot(Rc<Work>, Rc<Proof>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.1.checks.set(self.1.checks.get() - 1);
        if self.1.checks.get() == 0 {
            self.0.wake.notify_all();
        }
    }
}

/// A range taken out of what is stale; it is stale again when this is dropped, but for what was found out.
struct Unproven<'a> {
    proof: &'a Proof,
    at: Span,
    settled: bool,
}

impl<'a> Unproven<'a> {
    fn new(proof: &'a Proof, at: Span) -> Unproven<'a> {
        proof.checking.set(proof.checking.get() + at.len);
        proof.stale.borrow_mut().clear(at);
        Unproven { proof, at, settled: false }
    }
}

impl Drop for Unproven<'_> {
    fn drop(&mut self) {
        self.proof.checking.set(self.proof.checking.get() - self.at.len);
        if !self.settled {
            self.proof.unsettle(self.at);
        }
    }
}

/// What the comparison of a run of units gave.
struct Compared {
    hashes: Vec<Hash>,
    /// Units that differ, and where.
    differ: Vec<(Span, Vec<Span>)>,
}

impl Compared {
    /// What of it, made of `all`, is about `run`.
    fn within(&self, unit: u64, all: Span, run: Span) -> Compared {
        let from = ((run.start - all.start) / unit) as usize;
        let to = from + run.len.div_ceil(unit) as usize;
        let hashes = self.hashes.get(from..to).unwrap_or_default().to_vec();
        let differ = self.differ.iter().filter(|(u, _)| run.contains(u)).cloned().collect();
        Compared { hashes, differ }
    }
}

impl CheckTask {
    pub(crate) fn new(
        shared: Rc<Shared>,
        proof: Rc<Proof>,
        at: Span,
        lock: RangeTicket,
        outcomes: Rc<Queue<Ended>>,
    ) -> CheckTask {
        proof.checks.set(proof.checks.get() + 1);
        let slot = Slot(shared.work.clone(), proof.clone());
        CheckTask { shared, proof, at, lock, outcomes, slot }
    }

    /// Runs it; the outcome goes to the queue.
    pub(crate) async fn run(self) {
        let CheckTask { shared, proof, at, mut lock, outcomes, slot } = self;
        // what is recorded does not change, and who waits for such a lock is a client
        if !planted(Bug::UnlockedCheck) && !proof.is_recording() {
            lock.held().await;
        }
        shared.turns.enter(&shared.work, at.len.min(MAX_PIECE)).await;
        let begun = shared.work.env.now();
        let outcome = if shared.resting.get() {
            Outcome::GaveWay
        } else if proof.is_recording() {
            drop(lock);
            match shared.check_recorded(&proof, at).await {
                Ok(()) => Outcome::Copied,
                Err((side, error)) => Outcome::Failed(side, error, at),
            }
        } else {
            match shared.check(&proof, at, lock).await {
                Ok(true) => Outcome::Copied,
                Ok(false) => Outcome::Unclear,
                Err((side, error)) => Outcome::Failed(side, error, at),
            }
        };
        let took = shared.work.env.now().saturating_sub(begun);
        outcomes.push(Ended { outcome, took });
        drop(slot);
    }
}

impl Shared {
    /// Compares `at`, whose lock is held. Whether anything could be said: all of it may have been about to change.
    async fn check(
        &self,
        proof: &Proof,
        at: Span,
        lock: RangeTicket,
    ) -> std::result::Result<bool, (Side, BlockError)> {
        let mut open = Unproven::new(proof, at);
        if at.len > MAX_PIECE {
            let (zeroes, rest) = self.both_zero(proof, at).await?;
            for run in self.quiet(proof, &zeroes) {
                proof.equal_zero(run);
            }
            // Said to be zero when it was asked ahead, and not now: taken up again in pieces of the usual size.
            open.settled = true;
            drop(open);
            rest.iter().for_each(|r| {
                proof.touch(*r);
            });
            return Ok(!zeroes.is_empty());
        }
        if let Some((source, leaves)) = self.hashed(at).await? {
            let quiet = self.quiet(proof, &[at]);
            let differ = self.differing(proof, at, &source, &leaves).await?;
            open.settled = true;
            for run in &quiet {
                let found = differ.within(proof.unit(), at, *run);
                self.take_in(proof, *run, &found);
            }
            proof.note_by_hash();
            return Ok(!quiet.is_empty());
        }
        let (source, target) = both(self.source.read(at), self.target.read(at)).await;
        let source = source.map_err(|e| (Side::Source, e))?;
        let target = target.map_err(|e| (Side::Target, e))?;
        let quiet = self.quiet(proof, &[at]);
        open.settled = true;
        for run in &quiet {
            let run = *run;
            let from = (run.start - at.start) as usize;
            let (a, b) = (source.slice(from, run.len as usize), target.slice(from, run.len as usize));
            let (unit, hashes) = (proof.unit(), proof.wants_hashes());
            let found = if run.len <= LEAF {
                compare(unit, run, &a, &b, hashes)
            } else {
                let compared = self.work.env.offload(move || compare(unit, run, &a, &b, hashes)).await;
                compared.inspect_err(|_| open.settled = false).map_err(|e| (Side::Source, e))?
            };
            self.take_in(proof, run, &found);
        }
        // not before: what is compared next of the same bytes must not be noted first (found by the simulator, seed 13)
        drop(lock);
        Ok(!quiet.is_empty())
    }

    /// What the source holds of `at`, and the hashes of what the target does, if it tells those.
    async fn hashed(&self, at: Span) -> std::result::Result<Option<(Data, Vec<Hash>)>, (Side, BlockError)> {
        if !self.tells_hashes.get() {
            return Ok(None);
        }
        // the other side reads and hashes meanwhile
        let (source, leaves) = both(self.source.read(at), self.target.leaf_hashes(at)).await;
        let source = source.map_err(|e| (Side::Source, e))?;
        match leaves.map_err(|e| (Side::Target, e))? {
            Some(leaves) => Ok(Some((source, leaves))),
            None => {
                // the last piece may not consist of leaves: the others do
                if at.is_aligned(LEAF) {
                    self.tells_hashes.set(false);
                }
                Ok(None)
            }
        }
    }

    /// Compares by hash; of what differs the target is read, which says where. The lock is held.
    async fn differing(
        &self,
        proof: &Proof,
        at: Span,
        source: &Data,
        leaves: &[Hash],
    ) -> std::result::Result<Compared, (Side, BlockError)> {
        let unit = proof.unit();
        let own = self.hash(source, |d| units(d, LEAF)).await?;
        let mut compared = Compared { hashes: Vec::new(), differ: Vec::new() };
        for span in at.pieces(unit) {
            let from = ((span.start - at.start) / LEAF) as usize;
            let to = from + span.len.div_ceil(LEAF) as usize;
            let (Some(mine), Some(other)) = (own.get(from..to), leaves.get(from..to)) else {
                return Err((Side::Target, BlockError::corrupt("target told too few hashes")));
            };
            if mine != other {
                let start = (span.start - at.start) as usize;
                let target = self.target.read(span).await.map_err(|e| (Side::Target, e))?;
                let here = source.slice(start, span.len as usize);
                let runs = places(span.start, &here.contiguous(), &target.contiguous());
                // its bytes are right and its hash is not: that is no proof
                compared.differ.push((span, if runs.is_empty() { vec![span] } else { runs }));
            }
            compared.hashes.push(if unit == LEAF { mine[0] } else { node_hash(mine) });
        }
        Ok(compared)
    }

    /// Compares `at` of the target with what was recorded of the source.
    async fn check_recorded(&self, proof: &Proof, at: Span) -> std::result::Result<(), (Side, BlockError)> {
        let mut open = Unproven::new(proof, at);
        let unit = proof.unit();
        if at.len > MAX_PIECE {
            // said to be zero when it was asked ahead; the rest is taken up again in pieces of the usual size
            let found = status_all(&self.target, at).await.map_err(|e| (Side::Target, e))?;
            open.settled = true;
            proof.unsettle(at);
            for run in common_zeroes(&found, &found, unit, self.work.len()) {
                if proof.expects_zero(run) {
                    proof.stale.borrow_mut().clear(run);
                    proof.equal(run, &[]);
                }
            }
            return Ok(());
        }
        let told = if self.tells_hashes.get() {
            let told = self.target.leaf_hashes(at).await.map_err(|e| (Side::Target, e))?;
            self.tells_hashes.set(told.is_some() || !at.is_aligned(LEAF));
            told
        } else {
            None
        };
        let hashes: Vec<Hash> = match told {
            Some(leaves) => {
                proof.note_by_hash();
                let per = (unit / LEAF) as usize;
                leaves.chunks(per).map(|c| if per == 1 { c[0] } else { node_hash(c) }).collect()
            }
            None => {
                let target = self.target.read(at).await.map_err(|e| (Side::Target, e))?;
                self.hash(&target, move |d| units(d, unit)).await?
            }
        };
        open.settled = true;
        for (span, hash) in at.pieces(unit).zip(hashes) {
            let Some(expected) = proof.expected(span.start) else { continue };
            if hash == expected {
                proof.equal(span, &[]);
                continue;
            }
            if !proof.is_recorded(span.start) {
                continue; // a client changed it meanwhile
            }
            // What the source holds now, if that is still what it held then: it says where, and can mend it.
            let source = self.source.read(span).await.ok();
            let held = match &source {
                Some(data) => self.hash(data, move |d| units(d, unit)).await?.first() == Some(&expected),
                None => false,
            };
            let source = source.filter(|_| held);
            let runs = match &source {
                Some(data) => {
                    let target = self.target.read(span).await.map_err(|e| (Side::Target, e))?;
                    let runs = places(span.start, &data.contiguous(), &target.contiguous());
                    if runs.is_empty() { vec![span] } else { runs }
                }
                None => vec![span],
            };
            let (told, repair) = proof.differs(span, &runs, source.is_some());
            told.iter().for_each(|m| self.control.mismatch(m));
            if let (true, Some(data)) = (repair, source) {
                let flags = block::ReqFlags::NONE;
                self.target.write(span.start, data, flags).await.map_err(|e| (Side::Target, e))?;
                proof.unsettle(span);
            }
        }
        Ok(())
    }

    /// `of(data)`, on a helper thread if that is worth it.
    async fn hash(
        &self,
        data: &Data,
        of: impl FnOnce(&Data) -> Vec<Hash> + Send + 'static,
    ) -> std::result::Result<Vec<Hash>, (Side, BlockError)> {
        hash_aside(&self.work, data, of).await.map_err(|e| (Side::Source, e))
    }

    fn take_in(&self, proof: &Proof, run: Span, found: &Compared) {
        if found.differ.is_empty() {
            proof.equal(run, &found.hashes);
            return;
        }
        for (i, unit) in run.pieces(proof.unit()).enumerate() {
            match found.differ.iter().find(|(u, _)| *u == unit) {
                None => proof.equal(unit, found.hashes.get(i..=i).unwrap_or_default()),
                Some((_, runs)) => {
                    let (told, repair) = proof.differs(unit, runs, true);
                    told.iter().for_each(|m| self.control.mismatch(m));
                    if repair {
                        self.work.mark(unit);
                    }
                }
            }
        }
    }

    /// The units of `runs` that nothing changed since they were taken out of what is stale, as runs; the others are stale.
    fn quiet(&self, proof: &Proof, runs: &[Span]) -> Vec<Span> {
        let mut quiet: Vec<Span> = Vec::new();
        let calm = proof.is_calm() && self.work.dirty.borrow().is_empty();
        for run in runs {
            if calm && proof.stale.borrow().next_area(*run, 0).is_none() {
                quiet.push(*run);
                continue;
            }
            for unit in run.pieces(proof.unit()) {
                let changed = proof.stale.borrow().get(unit.start)
                    || self.work.dirty.borrow().next_area(unit, 0).is_some()
                    || (proof.loose_overlaps(&unit) && !planted(Bug::LooseUnseen));
                match quiet.last_mut() {
                    _ if changed => {
                        proof.touch(unit);
                    }
                    Some(last) if last.end() == unit.start => last.len += unit.len,
                    _ => quiet.push(unit),
                }
            }
        }
        quiet
    }

    /// What of `at` both sides say is zero, in whole units, and the rest.
    async fn both_zero(
        &self,
        proof: &Proof,
        at: Span,
    ) -> std::result::Result<(Vec<Span>, Vec<Span>), (Side, BlockError)> {
        let (source, target) = both(status_all(&self.source, at), status_all(&self.target, at)).await;
        let source = source.map_err(|e| (Side::Source, e))?;
        let target = target.map_err(|e| (Side::Target, e))?;
        let (mut zeroes, mut rest, mut from) = (Vec::new(), Vec::new(), at.start);
        for run in common_zeroes(&source, &target, proof.unit(), self.work.len()) {
            rest.extend(Some(Span::between(from, run.start)).filter(|r| !r.is_empty()));
            zeroes.push(run);
            from = run.end();
        }
        rest.extend(Some(Span::between(from, at.end())).filter(|r| !r.is_empty()));
        Ok((zeroes, rest))
    }
}

/// Where both say that they are zero, in whole units (or up to `len`, the end of the disk).
pub(crate) fn common_zeroes(
    source: &[block::Extent],
    target: &[block::Extent],
    unit: u64,
    len: u64,
) -> Vec<Span> {
    let zero = |list: &[block::Extent]| -> Vec<Span> {
        list.iter().filter(|e| e.kind != Kind::Data).map(|e| e.span).collect()
    };
    let (a, b) = (zero(source), zero(target));
    let (mut i, mut j, mut found) = (0, 0, Vec::new());
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let run = x.intersect(y);
        let end = if run.end() >= len { len } else { run.end() & !(unit - 1) };
        let start = run.start.next_multiple_of(unit);
        if !run.is_empty() && start < end {
            found.push(Span::between(start, end));
        }
        if x.end() <= y.end() { i += 1 } else { j += 1 }
    }
    found
}

/// Asks both sides what they hold from `at` on: where both are zero.
pub(crate) async fn zeroes_ahead(source: &Edge, target: &Edge, at: Span, unit: u64, len: u64) -> Vec<Span> {
    let (a, b) = both(status_all(source, at), status_all(target, at)).await;
    match (a, b) {
        (Ok(a), Ok(b)) => common_zeroes(&a, &b, unit, len),
        // nobody knows: all is read, and a real failure shows itself there
        _ => Vec::new(),
    }
}

/// `of(data)`, on a helper thread if that is worth it.
async fn hash_aside(
    work: &Work,
    data: &Data,
    of: impl FnOnce(&Data) -> Vec<Hash> + Send + 'static,
) -> Result<Vec<Hash>> {
    if data.len() as u64 <= LEAF {
        return Ok(of(data));
    }
    let data = data.clone();
    work.env.offload(move || of(&data)).await
}

/// Hashes of the units of `data`.
fn units(data: &Data, unit: u64) -> Vec<Hash> {
    let pieces = Span::new(0, data.len() as u64).pieces(unit);
    pieces.map(|s| unit_hash(&data.slice(s.start as usize, s.len as usize), unit)).collect()
}

/// Records what was read of `at` of the source to be copied, where that is asked for.
pub(crate) async fn record(work: &Work, at: Span, data: &Data) -> Result<()> {
    let Some(proof) = work.proof().filter(|p| p.is_recording()) else { return Ok(()) };
    let hashes = hash_aside(work, data, |d| units(d, LEAF)).await?;
    proof.recorded(at, &hashes);
    Ok(())
}

/// Records what `view` shows of the leaves that `at` touches, before what it shows is copied into itself.
pub(crate) async fn record_view(work: &Work, view: &Edge, at: Span) -> Result<()> {
    let whole = at.align_out(LEAF).intersect(&Span::new(0, work.len()));
    for piece in whole.pieces(MAX_PIECE) {
        record(work, piece, &view.read(piece).await?).await?;
    }
    Ok(())
}

/// Both results; the two run at the same time.
async fn both<A, B>(a: impl Future<Output = A>, b: impl Future<Output = B>) -> (A, B) {
    let (mut a, mut b) = (std::pin::pin!(a), std::pin::pin!(b));
    let (mut left, mut right) = (None, None);
    std::future::poll_fn(move |cx| {
        use std::task::Poll::{Pending, Ready};
        if left.is_none()
            && let Ready(r) = a.as_mut().poll(cx)
        {
            left = Some(r);
        }
        if right.is_none()
            && let Ready(r) = b.as_mut().poll(cx)
        {
            right = Some(r);
        }
        match (left.take(), right.take()) {
            (Some(l), Some(r)) => Ready((l, r)),
            (l, r) => {
                (left, right) = (l, r);
                Pending
            }
        }
    })
    .await
}

/// Compares the units of `at`, and hashes what `source` holds of each.
fn compare(unit: u64, at: Span, source: &Data, target: &Data, hashes: bool) -> Compared {
    let mut compared = Compared { hashes: Vec::new(), differ: Vec::new() };
    let equal = same(source, target);
    for span in at.pieces(unit) {
        let (from, len) = ((span.start - at.start) as usize, span.len as usize);
        let piece = source.slice(from, len);
        if hashes {
            compared.hashes.push(unit_hash(&piece, unit));
        }
        if !equal {
            let other = target.slice(from, len);
            if !same(&piece, &other) {
                compared.differ.push((span, places(span.start, &piece.contiguous(), &other.contiguous())));
            }
        }
    }
    compared
}

/// Whether two ropes of one length are equal, part by part.
fn same(a: &Data, b: &Data) -> bool {
    let (mut left, mut right) = (a.parts().iter(), b.parts().iter());
    let (mut x, mut y): (&[u8], &[u8]) = (&[], &[]);
    loop {
        if x.is_empty() {
            match left.next() {
                Some(part) => x = part,
                None => return y.is_empty() && right.next().is_none(),
            }
        }
        if y.is_empty() {
            match right.next() {
                Some(part) => y = part,
                None => return false,
            }
        }
        let n = x.len().min(y.len());
        if x[..n] != y[..n] {
            return false;
        }
        (x, y) = (&x[n..], &y[n..]);
    }
}

/// Where `a` and `b`, which begin at `offset`, differ: from the first to the last differing byte of each place.
fn places(offset: u64, a: &[u8], b: &[u8]) -> Vec<Span> {
    let mut found: Vec<Span> = Vec::new();
    for (i, _) in a.iter().zip(b).enumerate().filter(|(_, (x, y))| x != y) {
        let at = offset + i as u64;
        let full = found.len() == MAX_PLACES;
        match found.last_mut() {
            Some(last) if full || at - last.end() < GAP => last.len = at + 1 - last.start,
            _ => found.push(Span::new(at, 1)),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::Extent;

    #[test]
    fn one_flipped_byte_is_named() {
        let (a, mut b) = (vec![3; 200_000], vec![3; 200_000]);
        for at in [0, 511, 65_535, 65_536, 131_072, 199_999] {
            b[at] = 4;
            let found =
                compare(65536, Span::new(1 << 20, 200_000), &Data::from(a.clone()), &b.clone().into(), true);
            assert_eq!(found.hashes.len(), 4);
            let unit = (at / 65536) as u64 * 65536;
            let span = Span::new((1 << 20) + unit, 65536.min(200_000 - unit));
            assert_eq!(found.differ, [(span, vec![Span::new((1 << 20) + at as u64, 1)])]);
            b[at] = 3;
        }
        assert!(compare(65536, Span::new(0, 200_000), &a.into(), &b.into(), false).differ.is_empty());
    }

    #[test]
    fn places_are_merged_when_near_and_bounded() {
        let a = vec![0; 65536];
        let mut b = a.clone();
        (b[10], b[500], b[2000]) = (1, 1, 1);
        assert_eq!(places(0, &a, &b), [Span::between(10, 501), Span::new(2000, 1)]);
        (0..64).for_each(|i| b[i * 1024] = 1);
        let all = places(0, &a, &b);
        assert_eq!((all.len(), all[MAX_PLACES - 1].end()), (MAX_PLACES, 63 * 1024 + 1));
    }

    #[test]
    fn ropes_are_compared_across_parts() {
        let mut rope = Data::copy_from(b"abc");
        rope.append(Data::copy_from(b"defgh"));
        assert!(same(&rope, &Data::copy_from(b"abcdefgh")));
        assert!(!same(&rope, &Data::copy_from(b"abcdefgx")));
        assert!(!same(&rope, &Data::copy_from(b"abcdefg")));
    }

    #[test]
    fn zeroes_of_both_are_whole_units() {
        let e = |start: u64, end: u64, kind| Extent::new(Span::between(start, end), kind);
        let a = [e(0, 100, Kind::Data), e(100, 1000, Kind::Zero)];
        let b = [e(0, 300, Kind::Zero), e(300, 310, Kind::Data), e(310, 1000, Kind::Zero)];
        let zeroes = common_zeroes(&a, &b, 64, 1000);
        assert_eq!(zeroes, [Span::between(128, 256), Span::between(320, 1000)]);
    }
}
