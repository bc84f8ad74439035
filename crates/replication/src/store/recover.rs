//! What each record means for the state, while it is written and again when the log is read after a crash: one place for both.

use super::log::{Anchor, Log, RING_START};
use super::map::{Place, RangeMap};
use super::record::{self, Kind, Record};
use super::{Engine, Layer, MIN_SIZE, NewStore, Role, State, Store, Volume};
use crate::bugs::{Bug, planted};
use crate::digest::Digest;
use crate::history::History;
use crate::types::{Epoch, Generation, GroupId};
use block::{BlockError, Result};
use env::Env;
use env::sync::{Notify, Semaphore};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

impl Layer {
    pub(super) fn add(&mut self, r: &Record, place: u64) {
        let place = if r.payload.is_empty() { Place::Zero } else { Place::Log(place) };
        if let Some(map) = self.maps.get_mut(usize::from(r.volume)) {
            map.insert(r.at, place);
        }
        // with its header: zeroes have nothing else, and must not look like nothing to do (found by `sim`, scenario `replica`, seed 556)
        self.bytes += r.size();
    }
}

impl State {
    fn discard(&mut self, layer: Layer) {
        self.garbage.extend(layer.maps);
        self.switches += 1;
    }

    fn clear_own(&mut self) {
        let volumes = self.own.maps.len();
        let own = std::mem::replace(&mut self.own, Layer::new(volumes));
        self.discard(own);
    }

    /// The open epoch ends with a record of this kind; `end` is behind it.
    pub(super) fn seal(&mut self, kind: Kind, ends: (Epoch, Digest, History), end: u64, volumes: usize) {
        if let Some(open) = self.layers.back_mut() {
            open.sealed = Some(ends);
            (open.marked, open.ready) = (kind == Kind::Mark, false);
            open.end = end;
        }
        self.layers.push_back(Layer::new(volumes));
    }

    pub(super) fn unseal(&mut self, epoch: Epoch) {
        for l in
            self.layers.iter_mut().filter(|l| !l.committed && l.sealed.as_ref().is_some_and(|s| s.0 == epoch))
        {
            (l.sealed, l.ready) = (None, false);
        }
    }

    /// The switch: own writes go, layers up to `epoch` are committed content now.
    pub(super) fn commit(&mut self, epoch: Epoch, engine: Engine) {
        let is_it = |l: &Layer| l.sealed.as_ref().is_some_and(|s| s.0 == epoch);
        self.clear_own();
        let Some(at) = self.layers.iter().position(is_it) else { return };
        self.lens = self.lens_once_committed(at);
        if let Some((_, digest, history)) = self.layers.get(at).and_then(|l| l.sealed.clone()) {
            self.digest = digest;
            self.history = history;
            self.touched = super::first::Touched::default();
        }
        match engine {
            Engine::Redo => self.layers.iter_mut().take(at + 1).for_each(|l| l.committed = true),
            // forgotten behind the reader's back, unless the checkpoint before it is kept
            Engine::Undo => self.retained.extend(self.layers.drain(..=at)),
        }
        self.switches += 1;
    }

    /// A new session. Redo: undecided layers are void. Undo: what they preserved still stands between the disk and the checkpoint.
    pub(super) fn reset(&mut self, engine: Engine, volumes: usize) {
        self.session += 1;
        match engine {
            Engine::Undo if self.history.now().is_none() => self.forget_first(volumes),
            Engine::Redo => {
                while self.layers.back().is_some_and(|l| !l.committed) {
                    if let Some(l) = self.layers.pop_back() {
                        self.garbage.extend(l.maps);
                    }
                }
                self.layers.push_back(Layer::new(volumes));
            }
            Engine::Undo => self.layers.iter_mut().for_each(|l| {
                (l.sealed, l.ready) = (None, false);
                l.lens.clear();
            }),
        }
    }

    pub(super) fn promote(
        &mut self,
        generation: Generation,
        keep_own: bool,
        at: Epoch,
        engine: Engine,
        volumes: usize,
    ) {
        self.reset(engine, volumes);
        self.rewind(engine, at);
        if !keep_own {
            self.clear_own();
        }
        self.switches += 1;
        self.history.promote(generation, at);
        self.highest = self.highest.max(generation);
        self.role = Role::Promoted;
    }
}

impl Store {
    /// Makes a new store in an empty file. The image that the disks hold is one without history, or comes from `history`.
    ///
    /// # Errors
    /// A size that is too small; of the file.
    pub async fn create(file: &Rc<dyn env::File>, new: &NewStore, history: History) -> Result<()> {
        if new.size < MIN_SIZE {
            return Err(BlockError::invalid(format!("a replication store has at least {MIN_SIZE} bytes")));
        }
        let anchor = Anchor {
            sequence: 0,
            incarnation: 0,
            ring: (new.size - RING_START) / record::ALIGN * record::ALIGN,
            tail: 0,
            floor: 0,
            role: role_number(Role::Secondary),
            engine: u64::from(new.engine == Engine::Undo),
            group: new.group.0,
            highest: history.generation(),
            history,
            retain: 0,
            oldest: Epoch(0),
            lens: Vec::new(),
        };
        Log::create(file, &anchor).await
    }

    /// Whether a store was ever made in `file`, or it holds something else: a crash can leave one that was begun, and is none yet.
    ///
    /// # Errors
    /// Of the file.
    pub async fn is_made(file: &Rc<dyn env::File>) -> Result<bool> {
        Log::is_made(file).await
    }

    /// Opens a store: the disks' image is a committed checkpoint afterwards, whatever happened before.
    ///
    /// # Errors
    /// A file that is no store; of the file.
    pub async fn open(env: &Env, file: Rc<dyn env::File>, volumes: Vec<Rc<dyn Volume>>) -> Result<Rc<Store>> {
        let count = volumes.len();
        let mut records = Vec::new();
        let each = |h: &record::Header, end: u64, place: u64, payload: &block::Data| {
            let small = !matches!(h.kind, Kind::Change | Kind::Preimage | Kind::Own);
            let kept = if small { payload.clone() } else { block::Data::zeroes(payload.len()) };
            let r = Record { kind: h.kind, volume: h.volume, at: h.at, number: h.number, payload: kept };
            records.push((r, end, place));
        };
        let log = Log::open(file, each, planted(Bug::EmptiedOnRestart)).await?;
        let anchor = log.anchor();
        let engine = if anchor.engine == 1 { Engine::Undo } else { Engine::Redo };
        let disks: Vec<u64> = volumes.iter().map(|v| v.len()).collect();
        // nobody has ever opened it, or nobody who knew of other lengths
        let lens = if anchor.lens.len() == count { anchor.lens.clone() } else { disks };
        let mut state = State {
            role: role_of(anchor.role),
            highest: anchor.highest,
            history: anchor.history.clone(),
            lens: lens.clone(),
            digest: Digest::default(),
            layers: [Layer::new(count)].into(),
            own: Layer::new(count),
            merging: None,
            base: anchor.history.clone(),
            base_lens: lens.clone(),
            retained: Default::default(),
            retain: anchor.retain,
            oldest: anchor.oldest,
            deciding: Vec::new(),
            session: 0,
            switches: 0,
            needless: None,
            garbage: Vec::new(),
            touched: super::first::Touched::default(),
            past: None,
        };
        for (r, lsn, place) in &records {
            state.replay(r, lsn + r.size(), *place, engine, count);
        }
        if !planted(Bug::LostCountsAsStored) {
            state.forget_not_stored();
        }
        let direct = Cell::new(state.role == Role::Done);
        let store = Store {
            env: env.clone(),
            log,
            engine,
            group: GroupId(anchor.group),
            volumes,
            state: RefCell::new(state),
            intake: Semaphore::new(1),
            applying: Semaphore::new(1),
            stopping: Cell::new(false),
            preserved: Cell::new(0),
            hardening: Semaphore::new(1),
            to_harden: Notify::new(),
            unflushed: Cell::new(0),
            work: Notify::new(),
            direct,
            held: RefCell::default(),
            given_up: Cell::new(None),
        };
        // the new incarnation is durable before its first record
        store.log.write_anchor(|a| a.lens = lens).await?;
        Ok(Rc::new(store))
    }
}

impl State {
    fn replay(&mut self, r: &Record, end: u64, place: u64, engine: Engine, volumes: usize) {
        match r.kind {
            Kind::Change | Kind::Preimage => {
                if let Some(open) = self.layers.back_mut() {
                    open.add(r, place);
                }
            }
            Kind::Own if self.is_own_now(r.number) => self.own.add(r, place),
            // acknowledged while the decision behind which it stands was under way
            Kind::Own => {}
            Kind::Prepare | Kind::Mark => {
                if let Some((history, digest)) = record::parse_history(&r.payload.contiguous()) {
                    self.seal(r.kind, (Epoch(r.number), digest, history), end, volumes);
                }
                if r.kind == Kind::Prepare {
                    self.stored(Epoch(r.number));
                }
            }
            Kind::Stored => self.stored(Epoch(r.number)),
            Kind::Abort => self.unseal(Epoch(r.number)),
            Kind::Commit => self.commit(Epoch(r.number), engine),
            Kind::Reset => {
                self.highest = self.highest.max(Generation(r.number));
                self.reset(engine, volumes);
            }
            Kind::Intent => {
                let payload = r.payload.contiguous();
                let keep = payload.first().is_some_and(|b| *b != 0);
                // without a number: at the newest
                let at = payload.get(1..9).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
                let at = at.map_or(self.history.epoch(), Epoch);
                self.promote(Generation(r.number), keep, at, engine, volumes);
            }
            Kind::Resize => {
                if let Some(open) = self.layers.back_mut() {
                    open.lens.insert(r.volume, r.number);
                }
            }
            Kind::Pad => {}
        }
    }

    /// What the disks were to hold of an epoch that had ended may have gone with the power, and no flush from now on brings it back.
    fn forget_not_stored(&mut self) {
        for l in self.layers.iter_mut().filter(|l| l.waits()) {
            l.sealed = None;
        }
    }

    /// Frees up to `n` ranges of layers that are gone; whether any are left.
    pub(super) fn free_some(&mut self, n: usize) -> bool {
        if let Some(last) = self.garbage.last_mut()
            && !RangeMap::free_some(last, n)
        {
            self.garbage.pop();
        }
        !self.garbage.is_empty()
    }
}

pub(super) const fn role_number(role: Role) -> u64 {
    match role {
        Role::Secondary => 0,
        Role::Promoted => 1,
        Role::Done => 2,
    }
}

const fn role_of(n: u64) -> Role {
    match n {
        0 => Role::Secondary,
        1 => Role::Promoted,
        _ => Role::Done,
    }
}
