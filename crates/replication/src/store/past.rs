//! Where the image was changed since earlier checkpoints: a secondary that has more than the one that took over goes back to what both had, and
//! is sent those places instead of everything (several secondaries: reference/replication.md, section 2.4, "rewind").
//!
//! What can happen: the changes have left the index, their epochs were joined, a volume got another length, the process is not the one that kept
//! them. What must stay true: for every checkpoint on the image's path, a place where the image differs from it is among
//! [`Store::changed_since`] that checkpoint, or nothing is said. So what leaves the index is noted before it does.

use super::apply::GATHER_AT_ONCE;
use super::retain::{sealed_at, through};
use super::{Role, State, Store, kept_by};
use crate::bugs::{Bug, planted};
use crate::dirty::Dirty;
use crate::session::ranges;
use crate::types::Epoch;
use block::{Result, Span};

/// Bytes that one mark stands for.
const EXTENT: u64 = 64 << 10;

impl State {
    fn past(&mut self, first: Epoch) -> &mut Dirty {
        let floor = self.base.now().map_or(first, |n| n.1);
        let lens = &self.base_lens;
        self.past.get_or_insert_with(|| Dirty::by(EXTENT, lens.clone(), floor))
    }
}

impl Store {
    /// Where the image may differ from what it was at checkpoint `epoch` of its path: (volume, range). `None`: that is not known.
    pub fn changed_since(&self, epoch: Epoch) -> Option<Vec<(u16, Span)>> {
        let s = self.state.borrow();
        if s.role != Role::Secondary {
            return None;
        }
        let first = || s.base.now().map(|n| n.1).or_else(|| s.kept(self.engine).find_map(sealed_at));
        let known = s.past.as_ref().map(Dirty::floor).or_else(first)?;
        let behind = s.kept(self.engine).skip(through(s.kept(self.engine), epoch));
        if epoch < known || behind.clone().any(|l| !l.lens.is_empty()) {
            return None;
        }
        let mut places = kept_by(behind);
        if let Some(past) = &s.past {
            places.extend(ranges(&past.since(epoch).ok()??));
        }
        Some(places)
    }

    /// Before the `count` oldest committed layers leave the index: where they changed the image is noted. Whether that is done: a promotion
    /// does not wait for it, and they stay then.
    ///
    /// # Errors
    /// A volume that is too long for a bitmap.
    pub(super) async fn note(&self, count: usize) -> Result<bool> {
        for number in 0..count {
            let (epoch, lens) = {
                let s = self.state.borrow();
                let behind = || s.kept(self.engine).skip(number);
                // what was given up belongs to the next
                let epoch = behind().find_map(sealed_at).unwrap_or_default();
                let resized = behind().next().is_some_and(|l| !l.lens.is_empty());
                (epoch, resized.then(|| s.lens_after(s.kept(self.engine).take(number + 1))))
            };
            if let Some(lens) = lens {
                // nobody goes back behind that
                self.state.borrow_mut().past = Some(Dirty::by(EXTENT, lens, epoch));
            }
            for volume in 0..self.volumes.len() {
                let mut from = 0;
                while let Some(next) = self.note_some(number, epoch, volume, from)? {
                    if self.stopping.get() {
                        return Ok(false);
                    }
                    from = next;
                    self.env.next_turn().await;
                }
            }
        }
        Ok(true)
    }

    /// Some of a layer's ranges of a volume from `from` on; where the next begin.
    fn note_some(&self, number: usize, epoch: Epoch, volume: usize, from: u64) -> Result<Option<u64>> {
        let mut s = self.state.borrow_mut();
        let map = s.kept(self.engine).nth(number).and_then(|l| l.maps.get(volume));
        let some = map.map_or_else(Vec::new, |m| m.some_from(from, GATHER_AT_ONCE));
        if planted(Bug::PastForgotten) {
            return Ok(None);
        }
        let past = s.past(epoch);
        for (at, _) in &some {
            past.mark(epoch, u16::try_from(volume).unwrap_or(u16::MAX), *at)?;
        }
        Ok(some.last().map(|l| l.0.end()))
    }
}
