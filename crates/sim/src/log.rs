//! What was written to one file, in order, and every disk that a crash could have left.
//!
//! The model (reference/reliability.md 7.3): a crash comes after some entry. All that a completed barrier covers is on
//! disk, that is, every change that had landed when the barrier was *issued*. Of the later changes, and of those that were
//! in flight, any subset is on disk, each possibly torn at 512 bytes. Changes of one sector that survive do so in order
//! (a cache holds one version of a sector). A process kill is the in-order prefix.

use crate::Rng;
use crate::image::{Effect, Image};

/// Up to so many pending changes, all subsets are tried.
pub const EXHAUSTIVE: usize = 10;

/// One entry of a [`Log`], in order of completion.
#[derive(Clone, Debug)]
pub enum Entry {
    /// A change that landed.
    Change {
        /// How many entries the log had when the change was issued: from then on it may be on disk.
        issued_at: usize,
        /// The change.
        effect: Effect,
    },
    /// A barrier that succeeded: the first `covers` entries are on disk.
    Barrier {
        /// Length of the log when the barrier was issued.
        covers: usize,
    },
}

/// A recorded file.
#[derive(Clone, Default)]
pub struct Log {
    /// The file when the recording began; all of it is durable.
    pub base: Image,
    /// What happened since.
    pub entries: Vec<Entry>,
}

impl Log {
    /// The in-order prefix: what a killed process leaves after `entries[..at]`.
    pub fn prefix(&self, at: usize) -> Image {
        let mut image = self.base.clone();
        for e in &self.entries[..at] {
            if let Entry::Change { effect, .. } = e {
                image.apply(effect);
            }
        }
        image
    }

    /// A cursor over the crash points, from the beginning.
    pub fn crash_points(&self) -> CrashPoints<'_> {
        CrashPoints { log: self, at: 0, covered: 0, durable: self.base.clone() }
    }
}

/// Goes through the crash points of a [`Log`]; see [`CrashPoints::advance`].
pub struct CrashPoints<'a> {
    log: &'a Log,
    at: usize,
    covered: usize,
    durable: Image,
}

impl CrashPoints<'_> {
    /// The crash comes after this many entries.
    pub fn at(&self) -> usize {
        self.at
    }

    /// How many entries are certainly on disk here.
    pub fn covered(&self) -> usize {
        self.covered
    }

    /// Moves the crash one entry later; false at the end.
    pub fn advance(&mut self) -> bool {
        let Some(entry) = self.log.entries.get(self.at) else { return false };
        self.at += 1;
        if let Entry::Barrier { covers } = entry {
            while self.covered < *covers {
                if let Entry::Change { effect, .. } = &self.log.entries[self.covered] {
                    self.durable.apply(effect);
                }
                self.covered += 1;
            }
        }
        true
    }

    /// The changes that may or may not be on disk here: landed and not covered, or in flight.
    pub fn pending(&self) -> Vec<&Effect> {
        let entries = self.log.entries.iter().enumerate().skip(self.covered);
        entries
            .filter_map(|(i, e)| match e {
                Entry::Change { issued_at, effect } if i < self.at || *issued_at <= self.at => Some(effect),
                _ => None,
            })
            .collect()
    }

    /// Calls `each` with the disks that a crash here can leave: all subsets of the pending changes if there are at most
    /// [`EXHAUSTIVE`] (and no more than `most` states), else a sample of `most`; then `torn` more in which one change is
    /// torn. Stops when `each` says false.
    pub fn states(&self, most: usize, torn: usize, rng: &mut Rng, mut each: impl FnMut(&Image) -> bool) {
        let pending = self.pending();
        let n = pending.len();
        let exhaustive = n <= EXHAUSTIVE && (1usize << n) <= most;
        let count = if exhaustive { 1 << n } else { most };
        for i in 0..count {
            let mut image = self.durable.clone();
            for (k, effect) in pending.iter().enumerate() {
                let kept = match i {
                    _ if exhaustive => (i >> k) & 1 == 1,
                    // the two ends are the likeliest in real life: all of it, none of it
                    0 => true,
                    1 => false,
                    _ => rng.chance(0.5),
                };
                if kept {
                    image.apply(effect);
                }
            }
            if !each(&image) {
                return;
            }
        }
        let tearable: Vec<usize> = (0..n).filter(|k| pending[*k].sectors() > 1).collect();
        for _ in 0..if tearable.is_empty() { 0 } else { torn } {
            let which = *rng.choose(&tearable);
            let mut image = self.durable.clone();
            for (k, effect) in pending.iter().enumerate() {
                if k == which {
                    apply_torn(&mut image, effect, rng);
                } else if rng.chance(0.5) {
                    image.apply(effect);
                }
            }
            if !each(&image) {
                return;
            }
        }
    }
}

/// Applies a drawn subset of the sectors of `effect`: a prefix, a suffix, or any.
fn apply_torn(image: &mut Image, effect: &Effect, rng: &mut Rng) {
    for part in tear(effect, rng).0 {
        image.apply(&part);
    }
}

/// A drawn subset of the sectors of `effect`, and the rest.
pub(crate) fn tear(effect: &Effect, rng: &mut Rng) -> (Vec<Effect>, Vec<Effect>) {
    let sectors = effect.sectors().max(1);
    let (cut, kind, bits) = (rng.below(sectors + 1), rng.below(3), rng.draw());
    let kept = |i: u64| match kind {
        0 => i < cut,
        1 => i >= cut,
        _ => (bits >> (i % 64)) & 1 == 1,
    };
    (effect.torn(kept), effect.torn(|i| !kept(i)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::{Data, Span};
    use std::collections::BTreeSet;

    fn write(offset: u64, byte: u8, issued_at: usize) -> Entry {
        Entry::Change { issued_at, effect: Effect::Write { offset, data: Data::from(vec![byte; 512]) } }
    }

    #[test]
    fn barriers_cover_what_had_landed_when_they_were_issued() {
        let log = Log {
            base: Image::from_bytes(&[0; 2048]),
            entries: vec![
                write(0, 1, 0),
                // issued after the first write, before the second landed
                write(512, 2, 1),
                Entry::Barrier { covers: 1 },
                write(1024, 3, 2),
            ],
        };
        let mut points = log.crash_points();
        let mut seen = Vec::new();
        loop {
            let mut states = BTreeSet::new();
            points.states(1000, 0, &mut Rng::new(1), |i| {
                let b = i.read(Span::new(0, 2048));
                states.insert([b[0], b[512], b[1024]]);
                true
            });
            seen.push(states);
            if !points.advance() {
                break;
            }
        }
        assert_eq!(seen[0].len(), 2, "only the first write is in flight at the start");
        assert!(seen[1].contains(&[0, 2, 0]), "any subset, also of what is in flight");
        assert_eq!(seen[2].len(), 8, "the third was issued here");
        assert!(seen[3].iter().all(|s| s[0] == 1), "covered");
        assert!(seen[3].contains(&[1, 0, 0]), "landed but not covered");
        assert!(seen[4].contains(&[1, 0, 3]));
        assert_eq!(log.prefix(2).read(Span::new(0, 1024))[512], 2);
    }
}
