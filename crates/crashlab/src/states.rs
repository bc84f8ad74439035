//! Every disk that a crash can leave, and what must be true of each.
//!
//! The model (reference/reliability.md 7.3): everything before the last completed barrier is on disk, of the rest any subset,
//! in order for each sector, one change possibly torn at 512 bytes. A killed process leaves the in-order prefix. Of each
//! state: it opens; the check finds no corruption (refcounts may be stale only if the dirty mark says so, and then a repair
//! makes them right); each sector holds something legal; leaks can be given back without a change of the guest's disk.

use crate::history::Legal;
use crate::image::{Flat, Guest, Undo};
use crate::run::{BITMAP, Files, Recording, Setup};
use qcow2::check::{Fix, Report, check};
use qcow2::storage::{Memory, now};
use sim::{Rng, Value, value_of};
use std::process::Command;

/// Numbers of one lab.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Crash states checked.
    pub states: u64,
    /// Of these, in-order prefixes: what a killed process leaves.
    pub kills: u64,
    /// Of these, with a torn write.
    pub torn: u64,
    /// Of these, with leaks.
    pub leaky: u64,
    /// Clusters leaked, in all.
    pub leaked: u64,
    /// Of these, marked dirty and repaired.
    pub dirty: u64,
    /// Leaks repaired and looked at again.
    pub repaired: u64,
    /// States on which `qemu-img check` agreed.
    pub agreed: u64,
    /// Runs of the driver.
    pub runs: u64,
    /// Runs that began with a crash state.
    pub continued: u64,
    /// Barriers issued.
    pub barriers: u64,
    /// States of version 2 images with COPIED flags that disagree with counts, endangering nothing.
    pub idle: u64,
    /// Guest flushes.
    pub flushes: u64,
    /// States with a bitmap that is said to be complete, and was.
    pub bitmaps: u64,
    /// Sectors looked at.
    pub sectors: u64,
}

impl Stats {
    /// Adds another lab's numbers.
    pub fn add(&mut self, o: &Stats) {
        let pairs = [
            (&mut self.states, o.states),
            (&mut self.kills, o.kills),
            (&mut self.torn, o.torn),
            (&mut self.leaky, o.leaky),
            (&mut self.leaked, o.leaked),
            (&mut self.dirty, o.dirty),
            (&mut self.repaired, o.repaired),
            (&mut self.agreed, o.agreed),
            (&mut self.runs, o.runs),
            (&mut self.continued, o.continued),
            (&mut self.barriers, o.barriers),
            (&mut self.idle, o.idle),
            (&mut self.flushes, o.flushes),
            (&mut self.bitmaps, o.bitmaps),
            (&mut self.sectors, o.sectors),
        ];
        pairs.into_iter().for_each(|(a, b)| *a += b);
    }
}

/// What went wrong.
#[derive(Clone, Debug)]
pub struct Failure {
    /// `corrupt` or `lost` or `driver`.
    pub kind: &'static str,
    /// The whole story.
    pub text: String,
}

/// How states are chosen.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// Up to so many pending changes, all subsets are tried.
    pub exhaustive: usize,
    /// Else so many at random at each crash point.
    pub sample: usize,
    /// So many with a torn write at each crash point.
    pub torn: usize,
    /// Chance of showing a state to `qemu-img check`.
    pub qemu: f64,
}

/// Checks states.
pub struct Lab {
    /// Numbers so far.
    pub stats: Stats,
    /// Draws.
    pub rng: Rng,
    /// How states are chosen.
    pub choice: Choice,
    /// Where states are put for `qemu-img`.
    pub scratch: std::path::PathBuf,
}

/// One state on its way to be checked.
struct State<'a> {
    setup: &'a Setup,
    image: &'a [u8],
    data: &'a [u8],
    backing: &'a [u8],
    sectors: &'a [u64],
    legal: &'a Legal,
}

impl Lab {
    /// Checks what a crash at each point of `rec` can leave; gives some of the states, to go on from.
    ///
    /// # Errors
    /// The first state that must not be.
    pub fn explore(&mut self, setup: &Setup, rec: &Recording, keep: usize) -> Result<Vec<Files>, Failure> {
        let backing = setup.backing_bytes();
        let sectors = rec.history.interesting();
        let mut flats = [Flat(rec.base.image.clone()), Flat(rec.base.data.clone())];
        let mut durable = vec![false; rec.entries.len()];
        let mut kept = Vec::new();
        for at in 0..=rec.entries.len() {
            let barrier = at > 0 && rec.entries[at - 1].effect.is_none();
            if barrier {
                let b = &rec.entries[at - 1];
                for (i, e) in rec.entries.iter().enumerate().take(b.issued_at) {
                    if e.file == b.file && !durable[i] {
                        durable[i] = true;
                        if let Some(effect) = &e.effect {
                            flats[e.file].apply(effect);
                        }
                    }
                }
            }
            let pending: Vec<usize> = (0..rec.entries.len())
                .filter(|i| rec.entries[*i].effect.is_some() && !durable[*i])
                .filter(|i| *i < at || rec.entries[*i].issued_at <= at)
                .collect();
            let legal = rec.history.legal_at(at, &sectors);
            let subsets = self.subsets(&pending, at, barrier || at == 0);
            let torn_from = subsets.len().saturating_sub(self.choice.torn.min(subsets.len()));
            for (n, subset) in subsets.iter().enumerate() {
                let tear = n >= torn_from && n > 0;
                let undos = self.build(rec, &mut flats, subset, tear);
                let state = State {
                    setup,
                    image: &flats[0].0,
                    data: &flats[1].0,
                    backing: &backing,
                    sectors: &sectors,
                    legal: &legal,
                };
                let landed = subset.iter().copied().eq(pending.iter().copied().filter(|i| *i < at));
                self.stats.kills += u64::from(landed && !tear);
                let verdict = self.verify(&state);
                if verdict.is_ok() && keep > 0 && self.rng.chance(0.05) {
                    let files = Files { image: flats[0].0.clone(), data: flats[1].0.clone() };
                    if kept.len() < keep {
                        kept.push(files);
                    } else {
                        let i = self.rng.index(keep);
                        kept[i] = files;
                    }
                }
                if let Err(mut f) = verdict {
                    let path = std::env::temp_dir().join("liveblk-crash-failure.qcow2");
                    let saved = std::fs::write(&path, &flats[0].0).is_ok();
                    f.text = self.tell(setup, rec, at, &pending, subset, tear, &f.text);
                    if saved {
                        f.text.push_str(&format!("  the image is kept in {}\n", path.display()));
                    }
                    return Err(f);
                }
                for (file, undo) in undos.iter().rev() {
                    flats[*file].undo(undo);
                }
            }
        }
        Ok(kept)
    }

    /// Which of the pending changes are on disk, in several states. After a change only states with that change are new.
    fn subsets(&mut self, pending: &[usize], at: usize, all: bool) -> Vec<Vec<usize>> {
        let n = pending.len();
        let newest = pending.iter().position(|i| *i + 1 == at).filter(|_| !all);
        let mut out = Vec::new();
        if n <= self.choice.exhaustive {
            for bits in 0u64..1 << n {
                if newest.is_none_or(|k| bits >> k & 1 == 1) {
                    out.push((0..n).filter(|k| bits >> k & 1 == 1).map(|k| pending[k]).collect());
                }
            }
        } else {
            // Both ends and the in-order prefix are the likeliest in real life.
            out.push(pending.to_vec());
            out.push(newest.map(|k| vec![pending[k]]).unwrap_or_default());
            out.push(pending.iter().copied().filter(|i| *i < at).collect());
            for _ in 0..self.choice.sample {
                let p = *self.rng.choose(&[0.1, 0.5, 0.5, 0.9]);
                out.push(pending.iter().copied().filter(|_| self.rng.chance(p)).collect());
            }
        }
        for _ in 0..if n > 0 { self.choice.torn } else { 0 } {
            out.push(pending.iter().copied().filter(|_| self.rng.chance(0.5)).collect());
        }
        out
    }

    /// Puts a subset on disk, with one change torn if `tear`.
    fn build(
        &mut self,
        rec: &Recording,
        flats: &mut [Flat; 2],
        subset: &[usize],
        tear: bool,
    ) -> Vec<(usize, Undo)> {
        let torn = if tear && !subset.is_empty() { Some(*self.rng.choose(subset)) } else { None };
        let mut undos = Vec::new();
        for i in subset {
            let e = &rec.entries[*i];
            let Some(effect) = &e.effect else { continue };
            if torn == Some(*i) && effect.sectors() > 1 {
                self.stats.torn += 1;
                let bits = self.rng.draw();
                let cut = self.rng.below(effect.sectors() + 1);
                let how = self.rng.below(3);
                let parts = effect.torn(|s| match how {
                    0 => s < cut,
                    1 => s >= cut,
                    _ => bits >> (s % 64) & 1 == 1,
                });
                undos.extend(parts.iter().map(|p| (e.file, flats[e.file].apply(p))));
            } else {
                undos.push((e.file, flats[e.file].apply(effect)));
            }
        }
        undos
    }

    fn verify(&mut self, s: &State<'_>) -> Result<(), Failure> {
        self.stats.states += 1;
        let corrupt = |text: String| Failure { kind: "corrupt", text };
        let report =
            now(check(&s.image, Fix::Nothing)).map_err(|e| corrupt(format!("does not open: {e}")))?;
        let guest =
            Guest::open(s.image, s.data, s.backing).map_err(|e| corrupt(format!("does not open: {e}")))?;
        self.guest_is_legal(&guest, s)?;
        let dirty = guest.is_dirty();
        let idle =
            report.idle_flags > 0 && report.corruptions == report.idle_flags && report.check_errors == 0;
        if dirty {
            self.stats.dirty += 1;
            self.repair(s, Fix::All)?;
        } else if s.setup.create.version < 3 && idle {
            // There is no mark in such an image that would tell of it.
            self.stats.idle += 1;
            self.repair(s, Fix::All)?;
        } else if report.corruptions + report.check_errors > 0 {
            return Err(corrupt(report.messages.join("\n  ")));
        } else if report.leaks > 0 {
            self.stats.leaky += 1;
            self.stats.leaked += report.leaks;
            if self.rng.chance(0.1) {
                self.stats.repaired += 1;
                self.repair(s, Fix::Leaks)?;
            }
        }
        if self.rng.chance(self.choice.qemu) {
            self.ask_qemu(s, &report, dirty)?;
        }
        Ok(())
    }

    fn guest_is_legal(&mut self, guest: &Guest<'_>, s: &State<'_>) -> Result<(), Failure> {
        if !s.legal.sizes.contains(&(guest.size() / 512)) {
            let text = format!("the disk has {} sectors; possible: {:?}", guest.size() / 512, s.legal.sizes);
            return Err(Failure { kind: "lost", text });
        }
        let marks = guest.bitmap(BITMAP.0).map_err(|e| Failure { kind: "corrupt", text: e.to_string() })?;
        let fresh = s.setup.fresh_value();
        self.stats.bitmaps += u64::from(marks.is_some());
        let (mut wrong, mut unmarked) = (None, None);
        let mut i = 0;
        let read = guest.sectors(s.sectors, |sector, bytes| {
            while s.sectors[i] != sector {
                i += 1;
            }
            let found = value_of(bytes, sector);
            if let Some((bits, granularity)) = &marks
                && found != fresh
                && !bits.get((sector * 512 / granularity) as usize).is_some_and(|b| *b)
            {
                unmarked.get_or_insert((sector, found));
            }
            if wrong.is_none() && !s.legal.values[i].contains(&found) {
                wrong = Some((sector, found, s.legal.values[i].clone()));
            }
        });
        self.stats.sectors += s.sectors.len() as u64;
        snapshots_are_right(guest, s)?;
        read.map_err(|e| Failure { kind: "corrupt", text: e.to_string() })?;
        if let Some((sector, found)) = unmarked {
            let text = format!(
                "the bitmap is said to be complete, but sector {sector} holds {found:?} and is not marked"
            );
            return Err(Failure { kind: "lost", text });
        }
        match wrong {
            None => Ok(()),
            Some((sector, found, legal)) => {
                let text = format!("sector {sector} holds {found:?}; possible: {legal:?}");
                Err(Failure { kind: "lost", text })
            }
        }
    }

    /// Repairs a copy; it must be clean then, and the guest's disk as before.
    fn repair(&mut self, s: &State<'_>, fix: Fix) -> Result<(), Failure> {
        let copy = Memory::new(s.image.to_vec());
        let corrupt = |text: String| Failure { kind: "corrupt", text };
        let report = now(check(&copy, fix)).map_err(|e| corrupt(format!("repair ({fix:?}): {e}")))?;
        if !report.is_clean() {
            return Err(corrupt(format!("repair ({fix:?}) leaves:\n  {}", report.messages.join("\n  "))));
        }
        let bytes = copy.into_bytes();
        let guest = Guest::open(&bytes, s.data, s.backing).map_err(|e| corrupt(e.to_string()))?;
        self.guest_is_legal(&guest, s)
    }

    /// The reference says the same of this state.
    fn ask_qemu(&mut self, s: &State<'_>, ours: &Report, dirty: bool) -> Result<(), Failure> {
        let path = self.scratch.join("state.qcow2");
        let fail = |text: String| Failure { kind: "driver", text };
        std::fs::write(&path, s.image).map_err(|e| fail(format!("{}: {e}", path.display())))?;
        // A name of a data file or backing file in the header is not looked up.
        let mut command = Command::new("qemu-img");
        command.args(["check", "-f", "qcow2"]).arg(&path);
        if s.setup.create.data_file.is_some() {
            let data = self.scratch.join("data.raw");
            std::fs::write(&data, s.data).map_err(|e| fail(format!("{}: {e}", data.display())))?;
        }
        let out = command.current_dir(&self.scratch).output().map_err(|e| fail(format!("qemu-img: {e}")))?;
        let theirs = out.status.code().unwrap_or(-1);
        let expected: &[i32] = match (dirty, ours.leaks > 0) {
            _ if !dirty && ours.idle_flags > 0 => &[2],
            (true, _) => &[0, 2, 3],
            (false, true) => &[3],
            (false, false) => &[0],
        };
        if !expected.contains(&theirs) {
            let text = format!(
                "qemu-img check says {theirs}, expected {expected:?}: {}",
                String::from_utf8_lossy(&out.stderr)
            );
            return Err(Failure { kind: "corrupt", text });
        }
        self.stats.agreed += 1;
        Ok(())
    }

    #[allow(clippy::too_many_arguments)] // one place, and a struct for it would say nothing
    fn tell(
        &self,
        setup: &Setup,
        rec: &Recording,
        at: usize,
        pending: &[usize],
        subset: &[usize],
        tear: bool,
        what: &str,
    ) -> String {
        let mut t = format!("{what}\n  image: {setup:?}\n  crash behind entry {at} of {}", rec.entries.len());
        t.push_str(if tear { ", one of the changes torn\n" } else { "\n" });
        for (i, e) in rec.entries.iter().enumerate().take(pending.last().map_or(at, |l| l + 1)) {
            let effect = match &e.effect {
                None => format!("barrier, covers {}", e.issued_at),
                Some(sim::Effect::Write { offset, data }) => format!("write {offset:#x}+{:#x}", data.len()),
                Some(other) => format!("{other:?}"),
            };
            let mark = match (pending.contains(&i), subset.contains(&i)) {
                (false, _) => ' ',
                (true, true) => '+',
                (true, false) => '-',
            };
            t.push_str(&format!("  {mark} {i:3} file {} {effect}\n", e.file));
        }
        t.push_str(&rec.history.describe());
        t
    }
}

/// Every snapshot shows what the disk held when it was taken, and those are there that must be.
fn snapshots_are_right(guest: &Guest<'_>, s: &State<'_>) -> Result<(), Failure> {
    let lost = |text: String| Failure { kind: "lost", text };
    let found = guest.snapshots();
    for (taken, must) in &s.legal.snapshots {
        if *must && !found.iter().any(|(name, _)| *name == taken.name) {
            return Err(lost(format!("snapshot '{}' is not there", taken.name)));
        }
    }
    for (name, then) in &found {
        let known = s.legal.snapshots.iter().find(|(t, _)| t.name == *name);
        let Some((taken, _)) = known else { return Err(lost(format!("nobody took a snapshot '{name}'"))) };
        let mut wrong = None;
        let read = then.sectors(s.sectors, |sector, bytes| {
            let (holds, held) = (value_of(bytes, sector), taken.values[sector as usize]);
            if holds != held {
                wrong.get_or_insert((sector, holds, held));
            }
        });
        read.map_err(|e| Failure { kind: "corrupt", text: format!("snapshot '{name}': {e}") })?;
        if let Some((sector, holds, held)) = wrong {
            return Err(lost(format!(
                "snapshot '{name}': sector {sector} holds {holds:?}, it held {held:?}"
            )));
        }
    }
    Ok(())
}

/// What every sector of a state's disk holds.
///
/// # Errors
/// If it cannot be read.
pub fn values(setup: &Setup, files: &Files) -> block::Result<Vec<Value>> {
    let backing = setup.backing_bytes();
    let guest = Guest::open(&files.image, &files.data, &backing)?;
    let all: Vec<u64> = (0..guest.size() / 512).collect();
    let mut out = Vec::with_capacity(all.len());
    guest.sectors(&all, |sector, bytes| out.push(value_of(bytes, sector)))?;
    Ok(out)
}
