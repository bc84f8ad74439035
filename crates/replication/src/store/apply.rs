//! Behind the reader's back: committed changes to the disk, space given back, and the merge after a promotion.

use super::map::{Place, RangeMap};
use super::record::{Kind, Record};
use super::recover::role_number;
use super::retain::through;
use super::{Engine, Layer, PIECE, Role, Store};
use crate::bugs::{Bug, planted};
use crate::types::{Epoch, Generation};
use block::{BlockError, ErrorKind, Result, Span};
use std::rc::Rc;

/// A merge holds new writes for its last pass once no more than this is left to bring over.
const LAST_PASS: u64 = 1 << 20;
/// Ranges freed at a time.
const FREE_AT_ONCE: usize = 256;
/// Ranges gathered at a time: some 50 µs.
pub(super) const GATHER_AT_ONCE: usize = 256;
/// Bytes brought to a disk between two looks at what has come from outside: where disk and log are in memory nothing else gives the
/// requests of the view, and the answers to the primary, their turn.
const TURN: u64 = 256 << 10;

/// While there is one, what is being brought to the disk stops.
struct Stopping<'a>(&'a Store);

impl<'a> Stopping<'a> {
    fn new(store: &'a Store) -> Stopping<'a> {
        store.stopping.set(true);
        Stopping(store)
    }
}

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.stopping.set(false);
        // should the promotion fail, it goes on
        self.0.work.notify_all();
    }
}

impl Store {
    /// Does what there is to do, until nothing is left: frees, applies, moves the tail.
    ///
    /// # Errors
    /// Of the log or a disk. The views are right nevertheless, and it may be called again.
    pub async fn tidy(&self) -> Result<()> {
        let _one = self.applying.acquire(1).await;
        while self.state.borrow_mut().free_some(FREE_AT_ONCE) {
            self.env.next_turn().await;
        }
        if self.role() != Role::Secondary {
            return Ok(());
        }
        match self.engine {
            Engine::Redo => self.apply_committed().await,
            Engine::Undo => {
                let keep = match planted(Bug::RetainedForgotten) {
                    true => self.history().epoch(),
                    false => self.keep_from(),
                };
                self.give_up_holds(keep);
                let count = self.kept_through(keep);
                if !self.note(count).await? {
                    return Ok(());
                }
                let needless = {
                    let mut s = self.state.borrow_mut();
                    s.forget_before(keep);
                    s.needless.take()
                };
                if let Some((end, history, lens)) = needless {
                    // a new session may have moved the tail further meanwhile
                    let further = |a: &mut super::log::Anchor| {
                        if a.tail < end {
                            (a.tail, a.history, a.lens) = (end, history, lens);
                        }
                    };
                    self.log.write_anchor(further).await?;
                }
                Ok(())
            }
        }
    }

    /// How many of the committed layers in the index belong to checkpoints up to `epoch`.
    fn kept_through(&self, epoch: Epoch) -> usize {
        through(self.state.borrow().kept(self.engine), epoch)
    }

    /// Redo: the layers that are committed now and need not wait, each byte once.
    async fn apply_committed(&self) -> Result<()> {
        let keep = self.keep_from();
        let count = self.kept_through(keep);
        let last = self.state.borrow().layers.range(..count).next_back().map(|l| (l.end, l.sealed.clone()));
        let Some((end, Some((reached, _, history)))) = last else { return Ok(()) };
        self.give_up_holds(reached);
        let kept = {
            let mut s = self.state.borrow_mut();
            s.oldest = s.oldest.max(reached);
            s.retain > 0
        };
        if kept && !planted(Bug::OldestNotDurable) {
            // from here on the disks are no older checkpoint than this one
            self.log.write_anchor(|a| a.oldest = a.oldest.max(reached)).await?;
        }
        let Some(merged) = self.gathered(0..count).await else { return Ok(()) };
        let brought = self.bring(&merged).await;
        self.state.borrow_mut().garbage.extend(merged);
        if !brought? {
            return Ok(());
        }
        if !planted(Bug::DataNotFlushedBeforeTrim) {
            self.flush_volumes().await?;
        }
        // while their bytes stand in the log still
        if !self.note(count).await? {
            return Ok(());
        }
        // What stands in the log after `end` is not older than this checkpoint: see docs/durability.md.
        let lens = {
            let s = self.state.borrow();
            s.lens_after(s.layers.range(..count))
        };
        self.log.write_anchor(|a| (a.tail, a.history, a.lens) = (end, history.clone(), lens.clone())).await?;
        let mut s = self.state.borrow_mut();
        (s.base, s.base_lens) = (history, lens);
        for _ in 0..count {
            if let Some(l) = s.layers.pop_front() {
                s.garbage.extend(l.maps);
            }
        }
        s.switches += 1;
        Ok(())
    }

    /// One map for each volume: the first of `layers` that has a byte decides.
    #[allow(clippy::needless_pass_by_value)] // an iterator, cloned for each volume
    fn merged<'a>(&self, layers: impl Iterator<Item = &'a Layer> + Clone) -> Vec<RangeMap> {
        let one = |volume: usize| {
            let mut out = RangeMap::default();
            let mut oldest_last: Vec<&RangeMap> = layers.clone().filter_map(|l| l.maps.get(volume)).collect();
            while let Some(map) = oldest_last.pop() {
                map.iter().for_each(|(span, place)| out.insert(span, place));
            }
            out
        };
        (0..self.volumes.len()).map(one).collect()
    }

    /// As [`Store::merged`] of layers that change no more, in this order, what is later decides; a piece at a time, so that nobody
    /// waits for it. Nothing if it was stopped.
    async fn gathered(&self, layers: impl Iterator<Item = usize>) -> Option<Vec<RangeMap>> {
        let mut out: Vec<RangeMap> = self.volumes.iter().map(|_| RangeMap::default()).collect();
        for layer in layers {
            for (volume, into) in out.iter_mut().enumerate() {
                let mut from = 0;
                loop {
                    let some = {
                        let s = self.state.borrow();
                        let map = s.layers.get(layer).and_then(|l| l.maps.get(volume));
                        map.map_or_else(Vec::new, |m| m.some_from(from, GATHER_AT_ONCE))
                    };
                    if self.stopping.get() {
                        return None;
                    }
                    let Some((last, _)) = some.last() else { break };
                    from = last.end();
                    some.iter().for_each(|(span, place)| into.insert(*span, *place));
                    self.env.next_turn().await;
                }
            }
        }
        Some(out)
    }

    /// Whether all was brought, and not stopped before.
    async fn bring(&self, maps: &[RangeMap]) -> Result<bool> {
        let mut left = TURN;
        for (map, v) in maps.iter().zip(&self.volumes) {
            for (span, place) in map.iter() {
                let Place::Log(from) = place else {
                    v.zero(span).await?;
                    continue;
                };
                for p in span.pieces(PIECE) {
                    if self.stopping.get() {
                        return Ok(false);
                    }
                    let data = self.log.read(Span::new(from + (p.start - span.start), p.len)).await?;
                    v.write(p.start, data).await?;
                    left = left.saturating_sub(p.len);
                    if left == 0 {
                        left = TURN;
                        self.env.next_turn().await;
                    }
                }
            }
        }
        Ok(true)
    }

    pub(super) async fn flush_volumes(&self) -> Result<()> {
        for v in &self.volumes {
            v.flush().await?;
        }
        Ok(())
    }

    /// This side takes over at its checkpoint: see [`Store::promote_at`].
    ///
    /// # Errors
    /// As there.
    pub async fn promote(&self, generation: Generation, keep_own: bool) -> Result<()> {
        self.promote_at(generation, keep_own, None).await
    }

    /// This side takes over (X3), at its checkpoint or an older one that is kept: durable when done. From then on nothing of an older
    /// generation is kept, and the owner's writes stay, unless the checkpoint is an older one. Repeating it changes nothing.
    ///
    /// # Errors
    /// A generation that is not newer than all seen; a checkpoint that is not kept; of the log.
    pub async fn promote_at(&self, generation: Generation, keep_own: bool, at: Option<Epoch>) -> Result<()> {
        let _intake = self.intake.acquire(1).await;
        if self.role() != Role::Secondary {
            return Ok(());
        }
        // What is being brought to the disk stops where it is (X2): the merge begins again, and reads find it in the log until then.
        let stopping = Stopping::new(self);
        let _one = self.applying.acquire(1).await;
        drop(stopping);
        let turn = self.log.turn().await;
        if generation <= self.highest() {
            return Err(BlockError::new(
                ErrorKind::Invalid,
                format!("generation {generation} is not newer than {}", self.highest()),
            ));
        }
        if self.history().now().is_none() {
            return Err(BlockError::new(
                ErrorKind::Invalid,
                "the disks have never been synchronized with a primary",
            ));
        }
        let at = self.choose(at)?;
        let keep_own = keep_own && at == self.history().epoch();
        let mut payload = vec![u8::from(keep_own)];
        payload.extend_from_slice(&at.0.to_le_bytes());
        self.log.append(&turn, &[Record::control(Kind::Intent, generation.0, payload)], 0).await?;
        if !planted(Bug::IntentNotDurable) {
            self.log.barrier().await?;
        }
        self.give_up_holds(Epoch(u64::MAX));
        self.state.borrow_mut().promote(generation, keep_own, at, self.engine, self.volumes.len());
        Ok(())
    }

    /// After a promotion: everything to the disk. The owner is served meanwhile; its writes join in. May be repeated after an
    /// error, and by another process after a crash.
    ///
    /// # Errors
    /// Of the log or a disk; the views stay right.
    pub async fn merge(self: &Rc<Store>) -> Result<()> {
        let _one = self.applying.acquire(1).await;
        if self.role() != Role::Promoted {
            return Ok(());
        }
        // Committed layers (redo) or the way back to the checkpoint (undo): they do not change any more.
        let (committed, all) = {
            let s = self.state.borrow();
            (s.kept(Engine::Redo).len(), s.layers.len())
        };
        let base = match self.engine {
            Engine::Redo => self.gathered(0..committed).await,
            Engine::Undo => self.gathered((0..all).rev()).await,
        };
        // only a promotion stops anything, and that has been
        let base = base.unwrap_or_default();
        let brought = self.bring(&base).await;
        self.state.borrow_mut().garbage.extend(base);
        brought?;
        loop {
            let last = self.usage().own <= LAST_PASS;
            let turn = self.log.turn().await;
            let end = self.log.head();
            let merged = {
                let mut s = self.state.borrow_mut();
                let volumes = self.volumes.len();
                let own = std::mem::replace(&mut s.own, Layer::new(volumes));
                // a pass that failed before left its part behind: what is newer wins
                let old = s.merging.take().unwrap_or_else(|| Layer::new(volumes));
                let maps = self.merged([&own, &old].into_iter());
                s.merging = Some(Layer { maps, bytes: own.bytes + old.bytes, ..Layer::default() });
                self.merged(s.merging.iter())
            };
            // On the last pass new writes wait; else they go to the log and to the next pass.
            let held = if last { Some(turn) } else { None };
            self.bring(&merged).await?;
            if last {
                self.cut_disks().await?;
            }
            if !planted(Bug::MergeNotFlushed) {
                self.flush_volumes().await?;
            }
            let (history, highest, lens) = (self.history(), self.highest(), self.lens());
            let role = if last { Role::Done } else { Role::Promoted };
            self.log
                .cut_at(end, |a| {
                    (a.role, a.history, a.highest, a.lens) = (role_number(role), history, highest, lens);
                })
                .await?;
            {
                let mut s = self.state.borrow_mut();
                let gone: Vec<Layer> =
                    s.merging.take().into_iter().chain(std::mem::take(&mut s.layers)).collect();
                gone.into_iter().for_each(|l| s.garbage.extend(l.maps));
                (s.base, s.base_lens) = (s.history.clone(), s.lens.clone());
                let volumes = self.volumes.len();
                s.layers.push_back(Layer::new(volumes));
                s.role = role;
                s.switches += 1;
            }
            if last {
                self.direct.set(true);
            }
            drop(held);
            if last {
                return Ok(());
            }
        }
    }

    /// Waits until there may be something for [`Store::tidy`].
    pub async fn until_work(&self) {
        self.work.wait().await;
    }
}
