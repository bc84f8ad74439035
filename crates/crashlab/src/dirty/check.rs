//! Every state a crash can leave of disk, log and target, and what must be true of each.
//!
//! * The log can be read and nothing counts as damaged; no more is in doubt than the geometry allows.
//! * Each bitmap is as its last durable change left it, or as one did that was under way. It has every change of the disk since, and
//!   beyond those only what is in doubt.
//! * Where the job's set has no mark, disk and target are equal.
//! * After a clean end nothing is in doubt.

use super::run::{GEOMETRY, LEN, NAMES, Run, SET, Version};
use crate::image::Flat;
use bitmap::Bitmap;
use block::{Data, Extent, Io, Span};
use dirtylog::Found;
use env::{File, FileInfo, LockRange, Punch};
use qcow2::storage::now;
use sim::{Rng, Value, value_of};
use std::cell::RefCell;
use std::rc::Rc;

const SECTOR: u64 = 512;
/// Up to so many pending changes, all subsets are tried; else a sample of so many.
const EXHAUSTIVE: usize = 3;
const SAMPLE: usize = 6;
/// States with a torn change at each crash point.
const TORN: usize = 2;

/// The bytes of disk, log and target.
#[derive(Clone)]
pub struct Files {
    /// Disk, log, target.
    pub bytes: [Vec<u8>; 3],
    /// Next number of a write.
    pub next_stamp: u32,
}

impl Files {
    /// Nothing has been written yet.
    pub fn fresh() -> Files {
        let zero = || vec![0; LEN as usize];
        Files { bytes: [zero(), Vec::new(), zero()], next_stamp: 1 }
    }
}

/// Numbers.
#[derive(Clone, Copy, Default, Debug)]
pub struct Stats {
    /// Crash states checked.
    pub states: u64,
    /// Of these, with a torn write.
    pub torn: u64,
    /// Bitmaps looked at.
    pub bitmaps: u64,
    /// Of these, of a job.
    pub sets: u64,
    /// Of these, with more marks than changes.
    pub over: u64,
    /// Runs.
    pub runs: u64,
    /// Runs that began with a crash state.
    pub continued: u64,
    /// Runs that ended cleanly.
    pub closed: u64,
}

/// Checks all states of `run`, or a sample; gives one to go on from.
///
/// # Errors
/// The first state that must not be.
pub fn explore(stats: &mut Stats, run: &Run, rng: &mut Rng) -> Result<Option<Files>, String> {
    let flats: [Rc<RefCell<Flat>>; 3] =
        std::array::from_fn(|i| Rc::new(RefCell::new(Flat(run.base.bytes[i].clone()))));
    let mut durable = vec![false; run.entries.len()];
    let mut kept = None;
    for at in 0..=run.entries.len() {
        let barrier = at > 0 && run.entries[at - 1].effect.is_none();
        if barrier {
            let b = &run.entries[at - 1];
            for (i, e) in run.entries.iter().enumerate().take(b.issued_at) {
                if e.file == b.file && !durable[i] {
                    durable[i] = true;
                    e.effect.iter().for_each(|effect| drop(flats[e.file].borrow_mut().apply(effect)));
                }
            }
        }
        let pending: Vec<usize> = (0..run.entries.len())
            .filter(|i| run.entries[*i].effect.is_some() && !durable[*i])
            .filter(|i| *i < at || run.entries[*i].issued_at <= at)
            .collect();
        for (subset, tear) in subsets(&pending, at, rng) {
            let undos = build(stats, run, &flats, &subset, tear, rng);
            let told = |e| {
                format!(
                    "crash after entry {at} of {}, on disk of {} pending: {subset:?}{}\n  {e}",
                    run.entries.len(),
                    pending.len(),
                    if tear { ", one torn" } else { "" }
                )
            };
            verify(stats, run, at, &flats).map_err(told)?;
            if rng.chance(0.02) {
                let bytes = std::array::from_fn(|i| flats[i].borrow().0.clone());
                kept = Some(Files { bytes, next_stamp: run.first_stamp + run.writes.len() as u32 });
            }
            for (file, undo) in undos.iter().rev() {
                flats[*file].borrow_mut().undo(undo);
            }
        }
    }
    stats.closed += u64::from(run.closed.is_some());
    Ok(kept)
}

fn subsets(pending: &[usize], at: usize, rng: &mut Rng) -> Vec<(Vec<usize>, bool)> {
    let n = pending.len();
    let mut out = Vec::new();
    if n <= EXHAUSTIVE {
        for bits in 0u64..1 << n {
            out.push(((0..n).filter(|k| bits >> k & 1 == 1).map(|k| pending[k]).collect(), false));
        }
    } else {
        out.push((pending.to_vec(), false));
        out.push((Vec::new(), false));
        out.push((pending.iter().copied().filter(|i| *i < at).collect(), false));
        for _ in 0..SAMPLE {
            let p = *rng.choose(&[0.1, 0.5, 0.5, 0.9]);
            out.push((pending.iter().copied().filter(|_| rng.chance(p)).collect(), false));
        }
    }
    for _ in 0..if n > 0 { TORN } else { 0 } {
        out.push((pending.iter().copied().filter(|_| rng.chance(0.6)).collect(), true));
    }
    out
}

fn build(
    stats: &mut Stats,
    run: &Run,
    flats: &[Rc<RefCell<Flat>>; 3],
    subset: &[usize],
    tear: bool,
    rng: &mut Rng,
) -> Vec<(usize, crate::image::Undo)> {
    let torn = if tear && !subset.is_empty() { Some(*rng.choose(subset)) } else { None };
    let mut undos = Vec::new();
    for i in subset {
        let e = &run.entries[*i];
        let Some(effect) = &e.effect else { continue };
        let mut flat = flats[e.file].borrow_mut();
        if torn == Some(*i) && effect.sectors() > 1 {
            stats.torn += 1;
            let (bits, cut, how) = (rng.draw(), rng.below(effect.sectors() + 1), rng.below(3));
            let parts = effect.torn(|s| match how {
                0 => s < cut,
                1 => s >= cut,
                _ => bits >> (s % 64) & 1 == 1,
            });
            undos.extend(parts.iter().map(|p| (e.file, flat.apply(p))));
        } else {
            undos.push((e.file, flat.apply(effect)));
        }
    }
    undos
}

fn verify(stats: &mut Stats, run: &Run, at: usize, flats: &[Rc<RefCell<Flat>>; 3]) -> Result<(), String> {
    stats.states += 1;
    let view: Rc<dyn File> = Rc::new(View(flats[1].clone()));
    let found = now(dirtylog::read(&view)).map_err(|e| format!("the log cannot be read: {e}"))?;
    let begun = !run.base.bytes[1].is_empty();
    let Some(found) = found else {
        let any = run.versions.iter().any(|v| legal(v, at).all(|v| v.content.is_some()));
        return if begun || any { Err("the log has no whole header".to_owned()) } else { Ok(()) };
    };
    if !found.damage.is_empty() {
        return Err(format!("nothing was damaged, but: {:?}", found.damage));
    }
    // how many of them may be hot depends on what is marked: `regions.rs` has tests of that
    let bound = GEOMETRY.region * GEOMETRY.limit as u64;
    if found.doubt() > bound {
        return Err(format!("{} bytes are in doubt, more than {bound}", found.doubt()));
    }
    if run.closed.is_some_and(|c| at >= c) && !(found.clean && found.in_doubt.is_empty()) {
        return Err("it was closed, and something is in doubt".to_owned());
    }
    let disk = flats[0].borrow();
    for (name, versions) in NAMES.iter().chain(&[SET]).zip(&run.versions) {
        let there = found.bitmaps.iter().find(|b| b.name == *name);
        let mut why = Vec::new();
        let matches = legal(versions, at).any(|v| {
            let wrong = match (&v.content, there) {
                (None, None) => None,
                (None, Some(_)) => Some("it should not be there".to_owned()),
                (Some(_), None) => Some("it is missing".to_owned()),
                (Some((content, enabled)), Some(b)) if b.job => {
                    set_is_right(content, *enabled, &b.bits, &flats[0].borrow().0, &flats[2].borrow().0).err()
                }
                (Some((content, enabled)), Some(b)) if b.enabled != *enabled || b.inconsistent.is_some() => {
                    Some(format!("enabled: {}, should be {enabled}; {} bytes", b.enabled, content.count()))
                }
                (Some((content, enabled)), Some(b)) => {
                    is_right(run, at, v, (content, *enabled), &b.bits, &found, &disk.0).err()
                }
            };
            why.extend(wrong.clone());
            wrong.is_none()
        });
        if !matches {
            return Err(format!("bitmap '{name}': {}", why.join("; or: ")));
        }
        if let Some(b) = there {
            stats.bitmaps += 1;
            stats.sets += u64::from(b.job);
            stats.over += u64::from(found.in_doubt.iter().any(|s| b.bits.next_dirty(s.start).is_some()));
        }
    }
    Ok(())
}

/// The versions that a crash after entry `at` may leave.
fn legal(versions: &[Version], at: usize) -> impl Iterator<Item = &Version> {
    let last = versions.iter().rposition(|v| v.ended <= at).unwrap_or(0);
    versions[last..].iter().filter(move |v| v.began <= at)
}

fn is_right(
    run: &Run,
    at: usize,
    v: &Version,
    (content, enabled): (&Bitmap, bool),
    bits: &Bitmap,
    found: &Found,
    disk: &[u8],
) -> Result<(), String> {
    let whole = Span::new(0, LEN);
    let lacks = |want: &Bitmap| {
        let mut missing =
            want.areas(whole, 0).filter(|a| bits.next_clean(a.start).is_some_and(|c| c < a.end()));
        missing.next()
    };
    if let Some(a) = lacks(content) {
        return Err(format!("it lacks {a:?}, which it had at its last change"));
    }
    let mut most = content.clone();
    if enabled {
        found.in_doubt.iter().for_each(|s| most.set(*s));
        for w in run.writes.iter().filter(|w| w.done > v.moment && w.asked <= at) {
            most.set(w.at);
            for sector in w.at.start / SECTOR..w.at.end() / SECTOR {
                let place = (sector * SECTOR) as usize;
                if !bits.get(sector * SECTOR)
                    && value_of(&disk[place..place + SECTOR as usize], sector) == Value::Write(w.stamp)
                {
                    return Err(format!("it lacks sector {sector}, which write {} reached", w.stamp));
                }
            }
        }
    }
    let extra = bits.areas(whole, 0).find(|a| most.next_clean(a.start).is_some_and(|c| c < a.end()));
    match extra {
        Some(a) => Err(format!("it has {a:?}, where nothing was written and nothing is in doubt")),
        None => Ok(()),
    }
}

fn set_is_right(
    _content: &Bitmap,
    _enabled: bool,
    bits: &Bitmap,
    disk: &[u8],
    target: &[u8],
) -> Result<(), String> {
    for s in Span::new(0, LEN).pieces(bits.granularity()) {
        let range = s.start as usize..s.end() as usize;
        if !bits.get(s.start) && disk[range.clone()] != target[range] {
            return Err(format!("{s:?} is not marked, and the target lacks it"));
        }
    }
    Ok(())
}

/// A crash state as a file to be read.
struct View(Rc<RefCell<Flat>>);

fn no<T: 'static>() -> Io<'static, T> {
    Box::pin(async { Err(block::BlockError::from_errno(block::BlockError::ENOTSUP)) })
}

impl File for View {
    fn read(&self, at: Span) -> Io<'_, Data> {
        let all = self.0.borrow();
        let end = (at.end() as usize).min(all.0.len());
        let mut bytes = all.0.get(at.start as usize..end).unwrap_or_default().to_vec();
        bytes.resize(at.len as usize, 0);
        Box::pin(async { Ok(Data::from(bytes)) })
    }
    fn write(&self, _: u64, _: Data) -> Io<'_> {
        no()
    }
    fn barrier(&self) -> Io<'_> {
        no()
    }
    fn settle(&self) -> Io<'_> {
        no()
    }
    fn zero(&self, _: Span, _: Punch) -> Io<'_> {
        no()
    }
    fn discard(&self, _: Span) -> Io<'_> {
        no()
    }
    fn allocate(&self, _: Span) -> Io<'_> {
        no()
    }
    fn set_len(&self, _: u64) -> Io<'_> {
        no()
    }
    fn info(&self) -> Io<'_, FileInfo> {
        no()
    }
    fn len_hint(&self) -> u64 {
        self.0.borrow().0.len() as u64
    }
    fn extents(&self, _: Span) -> Io<'_, Vec<Extent>> {
        no()
    }
    fn copy_to<'a>(&'a self, _: Span, _: &'a Rc<dyn File>, _: u64) -> Io<'a, u64> {
        no()
    }
    fn lock(&self, _: LockRange) -> Io<'_> {
        no()
    }
    fn unlock(&self, _: u64, _: u64) -> Io<'_> {
        no()
    }
    fn can_lock(&self, _: LockRange) -> Io<'_, bool> {
        no()
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
