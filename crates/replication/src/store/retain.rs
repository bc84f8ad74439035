//! Older checkpoints: kept to fail over to, and held while somebody looks at one.
//!
//! *Redo*: the layers behind a checkpoint stay in the log, and the disks are not brought further than it. *Undo*: what the epochs behind
//! it overwrote stays in the log. What can happen: the log fills up, a crash while older layers are brought to the disk. What must stay
//! true:
//! * A checkpoint that is offered can be had, byte for byte, also after a crash at any point: before the disks leave one behind for good,
//!   the slot says durably which is the oldest that is left.
//! * Replication goes before memory of the past: when half of what changes may take of the log is used, no checkpoint is kept but the newest;
//!   when three quarters are, also those that somebody looks at are given up, and whoever does is told by errors, never by wrong bytes.

use super::map::{Place, resolve};
use super::{Engine, Layer, MAX_RANGES, Role, State, Store, View};
use crate::bugs::{Bug, planted};
use crate::history::History;
use crate::types::{Epoch, GroupId};
use block::{BlockError, Data, ErrorKind, Result, Span};
use std::collections::VecDeque;
use std::rc::Rc;

/// Most checkpoints that are kept beside the newest. Each is a layer that reads look through.
pub const MAX_RETAIN: u64 = 64;

/// A checkpoint that stays readable until this is dropped, if there is room for it.
pub struct Hold {
    store: Rc<Store>,
    epoch: Epoch,
}

impl Hold {
    /// Which.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Of which group.
    pub fn group(&self) -> GroupId {
        self.store.group()
    }

    /// Lengths of the volumes.
    pub fn lens(&self) -> Vec<u64> {
        self.store.lens_at(self.epoch)
    }

    /// What the checkpoint has there.
    ///
    /// # Errors
    /// It had to be given up; of the log or a disk.
    pub async fn read(&self, volume: u16, at: Span) -> Result<Data> {
        self.store.still_held(View::At(self.epoch))?;
        let view = match env::bugs::planted("replication: a clone shows the newest") {
            true => View::Owner,
            false => View::At(self.epoch),
        };
        self.store.read_as(volume, at, view).await
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut held = self.store.held.borrow_mut();
        if let Some(n) = held.get_mut(&self.epoch) {
            *n -= 1;
            if *n == 0 {
                held.remove(&self.epoch);
            }
        }
        self.store.work.notify_all();
    }
}

pub(super) fn sealed_at(l: &Layer) -> Option<Epoch> {
    l.sealed.as_ref().map(|s| s.0)
}

/// How many of `layers` belong to checkpoints up to `epoch`. What was given up without a decision belongs to the next.
pub(super) fn through<'a>(
    layers: impl DoubleEndedIterator<Item = &'a Layer> + ExactSizeIterator,
    epoch: Epoch,
) -> usize {
    let upto = |l: &Layer| sealed_at(l).is_some_and(|e| e <= epoch);
    layers.enumerate().rfind(|(_, l)| upto(l)).map_or(0, |(i, _)| i + 1)
}

impl State {
    /// The committed layers that are in the index, oldest first.
    pub(super) fn kept(
        &self,
        engine: Engine,
    ) -> impl DoubleEndedIterator<Item = &Layer> + ExactSizeIterator + Clone {
        let (layers, count) = match engine {
            Engine::Redo => (&self.layers, self.layers.iter().take_while(|l| l.committed).count()),
            Engine::Undo => (&self.retained, self.retained.len()),
        };
        layers.range(..count)
    }

    /// The checkpoints that can be had, oldest first; the newest is the last.
    fn reachable(&self, engine: Engine) -> Vec<Epoch> {
        // one of a path that was left has a number that this path may have as well, or never had
        let on_path = |h: &History| planted(Bug::OtherPathOffered) || *h == self.history.rewound(h.epoch());
        let base = self.base.now().filter(|_| on_path(&self.base)).map(|n| n.1);
        let sealed =
            self.kept(engine).filter_map(|l| l.sealed.as_ref()).filter(|x| on_path(&x.2)).map(|x| x.0);
        let mut all: Vec<Epoch> = base.into_iter().chain(sealed).collect();
        all.dedup();
        if engine == Engine::Redo {
            all.retain(|e| *e >= self.oldest);
        }
        all
    }

    /// Committed layers up to checkpoint `epoch` are what it is made of (redo), or those behind it lead back to it (undo).
    pub(super) fn resolve_at(
        &self,
        engine: Engine,
        volume: usize,
        at: Span,
        epoch: Epoch,
    ) -> Vec<(Span, Place)> {
        match engine {
            Engine::Redo => {
                let count = through(self.kept(engine), epoch);
                resolve(self.layers.range(..count).rev().filter_map(|l| l.maps.get(volume)), at)
            }
            Engine::Undo => {
                let from = through(self.retained.iter(), epoch);
                let back = self.retained.range(from..).chain(&self.layers);
                resolve(back.filter_map(|l| l.maps.get(volume)), at)
            }
        }
    }

    /// The layers that lead from the oldest checkpoint that there is to `epoch`.
    pub(super) fn committed_through(&self, engine: Engine, epoch: Epoch) -> impl Iterator<Item = &Layer> {
        self.kept(engine).take(through(self.kept(engine), epoch))
    }

    /// Goes back to checkpoint `epoch`: what was committed behind it is not, any more.
    pub(super) fn rewind(&mut self, engine: Engine, epoch: Epoch) {
        self.lens = self.lens_after(self.committed_through(engine, epoch));
        let gone: VecDeque<Layer> = match engine {
            Engine::Redo => {
                let count = through(self.kept(engine), epoch);
                let open = self.layers.pop_back(); // nothing is in it: the undecided was given up
                let gone = self.layers.split_off(count.min(self.layers.len()));
                self.layers.extend(open);
                gone
            }
            Engine::Undo => {
                let mut behind = self.retained.split_off(through(self.retained.iter(), epoch));
                behind.append(&mut self.layers);
                self.layers = behind;
                std::mem::take(&mut self.retained)
            }
        };
        self.garbage.extend(gone.into_iter().flat_map(|l| l.maps));
        self.history = self.history.rewound(epoch);
    }

    /// Undo: what leads back beyond checkpoint `keep` is forgotten.
    pub(super) fn forget_before(&mut self, keep: Epoch) {
        for _ in 0..through(self.retained.iter(), keep) {
            let Some(l) = self.retained.pop_front() else { return };
            self.base_lens = self.lens_after([&l]);
            if let Some((_, _, history)) = l.sealed {
                self.base = history.clone();
                self.needless = Some((l.end, history, self.base_lens.clone()));
            }
            self.garbage.extend(l.maps);
        }
    }
}

impl Store {
    /// The checkpoints that can be failed over to or looked at, oldest first; the newest is the last.
    pub fn checkpoints(&self) -> Vec<Epoch> {
        let s = self.state.borrow();
        let mut all = s.reachable(self.engine);
        let most = usize::try_from(s.retain).unwrap_or(usize::MAX).saturating_add(1);
        all.drain(..all.len().saturating_sub(most));
        all
    }

    /// So many checkpoints are kept beside the newest from now on.
    ///
    /// # Errors
    /// Of the log.
    pub async fn set_retain(&self, retain: u64) -> Result<()> {
        let _one = self.applying.acquire(1).await;
        let retain = retain.min(MAX_RETAIN);
        let (before, newest) = {
            let s = self.state.borrow();
            (s.retain, s.history.epoch())
        };
        if before == retain {
            return Ok(());
        }
        // While none was kept, nobody wrote down how far the disks were brought: of those before the newest nothing is known.
        let oldest = |was: Epoch| if before == 0 { was.max(newest) } else { was };
        self.log.write_anchor(|a| (a.retain, a.oldest) = (retain, oldest(a.oldest))).await?;
        {
            let mut s = self.state.borrow_mut();
            (s.retain, s.oldest) = (retain, oldest(s.oldest));
        }
        self.work.notify_all();
        Ok(())
    }

    /// Holds a checkpoint, the newest if none is named, so that it can be read while replication goes on.
    ///
    /// # Errors
    /// There is no such checkpoint here; this side has taken over.
    pub fn hold(self: &Rc<Store>, epoch: Option<Epoch>) -> Result<Hold> {
        if self.role() != Role::Secondary {
            return Err(BlockError::new(ErrorKind::Busy, "this side has taken over"));
        }
        let epoch = self.choose(epoch)?;
        *self.held.borrow_mut().entry(epoch).or_default() += 1;
        Ok(Hold { store: self.clone(), epoch })
    }

    /// That checkpoint, or the newest.
    ///
    /// # Errors
    /// It cannot be had.
    pub(crate) fn choose(&self, epoch: Option<Epoch>) -> Result<Epoch> {
        let all = self.checkpoints();
        let Some(newest) = all.last().copied() else {
            let why = "the disks have never been synchronized with a primary";
            return Err(BlockError::new(ErrorKind::Invalid, why));
        };
        let epoch = epoch.unwrap_or(newest);
        if all.contains(&epoch) {
            return Ok(epoch);
        }
        let there: Vec<String> = all.iter().map(Epoch::to_string).collect();
        let why = format!("checkpoint {epoch} is not kept here; there are: {}", there.join(", "));
        Err(BlockError::new(ErrorKind::NotFound, why))
    }

    /// Where the image comes from at that checkpoint.
    pub fn history_at(&self, epoch: Epoch) -> History {
        self.state.borrow().history.rewound(epoch)
    }

    /// Nobody reads what is held any more: it is going to be overwritten.
    pub(super) fn give_up_holds(&self, before: Epoch) {
        if self.held.borrow().keys().next().is_some_and(|e| *e < before) {
            self.given_up.set(self.given_up.get().max(Some(before)));
        }
    }

    pub(super) fn still_held(&self, view: View) -> Result<()> {
        match (view, self.given_up.get()) {
            (View::At(e), Some(before)) if e < before => Err(BlockError::new(
                ErrorKind::Io,
                format!("checkpoint {e} had to be given up: its space in the replication store was needed"),
            )),
            _ => Ok(()),
        }
    }

    /// Whether the log has less room than the past may take.
    pub(super) fn is_tight(&self) -> bool {
        let s = self.state.borrow();
        let past = !s.retained.is_empty() || s.layers.front().is_some_and(|l| l.committed);
        drop(s);
        past && (self.log.used() > self.for_changes() / 2 || self.ranges() > MAX_RANGES / 2)
    }

    /// The oldest checkpoint that is to be kept now.
    pub(super) fn keep_from(&self) -> Epoch {
        let newest = self.history().epoch();
        if self.is_tight() {
            if self.log.used() > self.for_changes() / 4 * 3 || self.ranges() > MAX_RANGES / 4 * 3 {
                return newest;
            }
            return self.held_from().map_or(newest, |e| e.min(newest));
        }
        let wanted = self.checkpoints().first().copied().unwrap_or(newest);
        self.held_from().map_or(wanted, |e| e.min(wanted))
    }

    /// The oldest checkpoint that is held and was not given up.
    fn held_from(&self) -> Option<Epoch> {
        let lost = self.given_up.get().unwrap_or_default();
        self.held.borrow().range(lost..).next().map(|(e, _)| *e)
    }
}
