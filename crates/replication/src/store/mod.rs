//! The secondary's store: a log file beside the disks, so that the disks' image is always a committed checkpoint.
//!
//! Two engines with the same views ([`Engine`]). *Redo*: the primary's changes go to the log and the disk stays at the checkpoint; after the
//! decision they are written to the disk behind the reader's back. *Undo*: they go to the disk at once, what they overwrite goes
//! to the log first. Own writes go to the log in both.
//!
//! What a byte reads as: own write, else (redo) the newest committed layer that has it, (undo) the oldest undecided layer that has
//! it, else the disk. What must stay true:
//! * I1: committed content = the checkpoint in [`Store::history`], at every instant and after any crash. The orders that make it
//!   so stand in docs/durability.md, and each is removed once in tests/store.rs.
//! * The index says where bytes are before the place they were at is overwritten; a reader that read the disk looks again
//!   afterwards and begins anew if the index changed. So no reader waits for a writer and no writer for a reader (S1, S3).
//! * The switch at a commit is O(1): layers change their state, what they held is freed later, piece by piece.
//! * Before the first checkpoint there is nothing to preserve: what comes goes to the disks (`first.rs`).
//! * Lengths change with checkpoints (`lengths.rs`); the disks are never shorter than what is shown of them.
//! * Older checkpoints that are kept are layers that wait: redo brings them to the disk later, undo forgets what they overwrote later.

mod apply;
mod first;
mod harden;
mod lengths;
mod log;
pub(crate) mod map;
mod past;
mod record;
mod recover;
mod retain;
mod volume;

pub use harden::Hardened;
pub(crate) use record::{history_bytes, parse_history};
pub use retain::{Hold, MAX_RETAIN};
pub use volume::{EdgeVolume, FileVolume, Volume};

use crate::bugs::{Bug, planted};
use crate::digest::Digest;
use crate::dirty::Dirty;
use crate::history::History;
use crate::types::{Epoch, Generation, GroupId};
use block::{BlockError, Data, ErrorKind, Result, Span};
use env::Env;
use env::sync::Notify;
use first::Touched;
use log::Log;
use map::{Place, RangeMap, resolve};
use record::{Kind, Record};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

/// Granule of preserved content in bytes (B7).
pub const GRANULE: u64 = 4096;
/// Smallest store: four times what is kept back for control records.
pub const MIN_SIZE: u64 = 8 << 20;
/// Kept back for control records, so that an epoch can always be decided: thousands of them, and one longest record for the end
/// of the ring.
const RESERVE: u64 = 2 << 20;
/// Bytes copied between log and disk in one piece.
const PIECE: u64 = 1 << 20;
/// Ranges in the index over all layers: about 100 bytes each, so 200 MB.
const MAX_RANGES: usize = 2_000_000;
/// How long an own write waits for space before it fails (F-2).
const OWN_WAIT: Duration = Duration::from_secs(5);

/// How changes of the primary are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Engine {
    /// To the log; the disk stays behind.
    #[default]
    Redo,
    /// To the disk; old content to the log.
    Undo,
}

/// What the store's owner is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Replicating.
    Secondary,
    /// Took over; the merge is not done.
    Promoted,
    /// Took over and merged: the disk is the image.
    Done,
}

/// A change of the primary.
#[derive(Clone, Debug)]
pub struct Change {
    /// Which volume.
    pub volume: u16,
    /// Where.
    pub at: Span,
    /// The bytes; empty for zeroes.
    pub data: Data,
}

/// Settings of a new store.
#[derive(Clone, Debug)]
pub struct NewStore {
    /// Of which group.
    pub group: GroupId,
    /// Engine.
    pub engine: Engine,
    /// Bytes of the file, at least [`MIN_SIZE`].
    pub size: u64,
}

/// Figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of the log.
    pub size: u64,
    /// Of them in use.
    pub used: u64,
    /// Of them by own writes.
    pub own: u64,
    /// By committed changes that are not yet on the disk (redo), or by what committed changes overwrote (undo): zero only if there are none.
    pub pending: u64,
    /// By undecided changes (redo) or preserved content (undo).
    pub open: u64,
}

#[derive(Default)]
struct Layer {
    /// The epoch that ends here, if it was marked and not aborted.
    sealed: Option<(Epoch, Digest, History)>,
    /// It ended while changes went to the disks before they were decided.
    marked: bool,
    /// All of it is on stable storage: it may be decided.
    ready: bool,
    committed: bool,
    maps: Vec<RangeMap>,
    /// Volumes that have another length from this epoch on.
    lens: BTreeMap<u16, u64>,
    bytes: u64,
    /// The log after the record that ended it.
    end: u64,
}

impl Layer {
    fn is_empty(&self) -> bool {
        self.maps.iter().all(|m| m.len() == 0)
    }

    fn new(volumes: usize) -> Layer {
        Layer { maps: (0..volumes).map(|_| RangeMap::default()).collect(), ..Layer::default() }
    }
}

struct State {
    role: Role,
    highest: Generation,
    history: History,
    /// Lengths of the volumes at the checkpoint.
    lens: Vec<u64>,
    digest: Digest,
    /// Oldest first; the last is open.
    layers: VecDeque<Layer>,
    own: Layer,
    /// Own writes that a merge is bringing to the disk.
    merging: Option<Layer>,
    /// Decided epochs whose record is not known to be on stable storage.
    deciding: Vec<Epoch>,
    /// Grows with every session.
    session: u64,
    /// Grows with every change of the views that is not an addition.
    switches: u64,
    /// Where the image comes from before the first of the layers that are committed: redo, what the disks hold at least.
    base: History,
    /// The lengths there.
    base_lens: Vec<u64>,
    /// Undo: what committed epochs overwrote, oldest first, for as long as the checkpoint before them is kept.
    retained: VecDeque<Layer>,
    /// Checkpoints older than the newest that are to be kept.
    retain: u64,
    /// Redo: no older one can be had.
    oldest: Epoch,
    /// Undo: up to where the log is not needed any more, and history and lengths there.
    needless: Option<(u64, History, Vec<u64>)>,
    garbage: Vec<RangeMap>,
    /// Where committed epochs that have left the index changed the image; nothing before the first one does.
    past: Option<Dirty>,
    /// Before the first checkpoint: where the primary's changes went to the disks.
    touched: Touched,
}

/// Whose content is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum View {
    /// The checkpoint with this side's own writes over it.
    Owner,
    /// The primary's, as far as it has come.
    Kept,
    /// A checkpoint that is held.
    At(Epoch),
}

/// See above.
pub struct Store {
    env: Env,
    log: Log,
    engine: Engine,
    group: GroupId,
    volumes: Vec<Rc<dyn Volume>>,
    state: RefCell<State>,
    /// One intake of changes, session start or promotion at a time: a change that is being kept ends before this side takes over.
    intake: env::sync::Semaphore,
    /// One background pass or merge at a time.
    applying: env::sync::Semaphore,
    /// A promotion waits for the background pass, which gives up.
    stopping: Cell<bool>,
    /// Undo: where the log ended after the last old content.
    preserved: Cell<u64>,
    /// One flush of everything at a time.
    hardening: env::sync::Semaphore,
    /// Something for [`Store::harden`] to do.
    pub(crate) to_harden: Notify,
    /// Bytes of changes that went to the disks since the last flush of them began.
    unflushed: Cell<u64>,
    /// Something for the background to do.
    pub(crate) work: Notify,
    /// Reads and writes that go straight to the disk: they may, once the merge is done.
    direct: Cell<bool>,
    /// Checkpoints that somebody looks at, and how many do.
    held: RefCell<BTreeMap<Epoch, usize>>,
    /// What was held before this checkpoint had to be given up.
    given_up: Cell<Option<Epoch>>,
}

impl Store {
    /// The engine.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// The group.
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// Where the image comes from; its end is the committed checkpoint.
    pub fn history(&self) -> History {
        self.state.borrow().history.clone()
    }

    /// Digest of the last committed epoch, since this process began.
    pub fn digest(&self) -> Digest {
        self.state.borrow().digest
    }

    /// Highest generation seen.
    pub fn highest(&self) -> Generation {
        self.state.borrow().highest
    }

    /// What it is.
    pub fn role(&self) -> Role {
        self.state.borrow().role
    }

    /// Figures.
    pub fn usage(&self) -> Usage {
        let s = self.state.borrow();
        let sum = |committed| s.layers.iter().filter(|l| l.committed == committed).map(|l| l.bytes).sum();
        let own = s.own.bytes + s.merging.as_ref().map_or(0, |m| m.bytes);
        let kept: u64 = s.retained.iter().map(|l| l.bytes).sum();
        Usage {
            size: self.log.ring(),
            used: self.log.used(),
            own,
            pending: sum(true) + kept,
            open: sum(false),
        }
    }

    /// Bytes of the log that changes may take in all: the rest is for control records and own writes.
    fn for_changes(&self) -> u64 {
        self.log.ring().saturating_sub(RESERVE + self.log.ring() / 4)
    }

    fn ranges(&self) -> usize {
        let s = self.state.borrow();
        s.layers.iter().chain(&s.retained).flat_map(|l| &l.maps).map(RangeMap::len).sum()
    }

    /// Bytes of changes that fit now.
    pub fn room(&self) -> u64 {
        let free = self.for_changes().saturating_sub(self.log.used());
        if self.ranges() >= MAX_RANGES {
            return 0;
        }
        match self.engine {
            Engine::Redo => free,
            // small changes preserve whole granules
            Engine::Undo => free / 2,
        }
    }

    /// Whether every change that was kept is on the disks themselves, or in a checkpoint that is to stay beside them.
    pub fn is_applied(&self) -> bool {
        let s = self.state.borrow();
        let stays = s.retain > 0 || !self.held.borrow().is_empty();
        let done = |l: &Layer| l.is_empty() || (l.committed && stays);
        self.engine == Engine::Undo || s.layers.iter().all(done)
    }

    /// How much is used up of what [`Store::room`] is the rest of, in percent. Of the whole log it would not do: a small one would be out of
    /// room before it counts as full enough for a checkpoint, which alone makes room (found by tests/replication).
    pub fn fill(&self) -> u8 {
        let bytes = self.log.used().saturating_mul(100) / self.for_changes().max(1);
        let ranges = self.ranges() as u64 * 100 / MAX_RANGES as u64;
        u8::try_from(bytes.max(ranges).min(100)).unwrap_or(100)
    }

    /// A new session begins: the generation is durable, what was open and undecided is void. The volumes have these lengths from here on;
    /// none: the same ones. Not while [`Store::is_deciding`].
    ///
    /// # Errors
    /// Of the log; a disk that does not become so long.
    pub async fn begin(&self, generation: Generation, lens: &[u64]) -> Result<()> {
        let _one = self.intake.acquire(1).await;
        if generation > self.highest() {
            self.log.write_anchor(|a| a.highest = generation).await?;
            self.state.borrow_mut().highest = generation;
        }
        let turn = self.log.turn().await;
        self.still_secondary()?;
        self.log.append(&turn, &[Record::control(Kind::Reset, generation.0, Vec::new())], 0).await?;
        let idle = {
            let mut s = self.state.borrow_mut();
            s.reset(self.engine, self.volumes.len());
            let nothing_open = self.engine == Engine::Redo || s.layers.iter().all(Layer::is_empty);
            let nothing_kept = s.retained.is_empty() && !s.layers.iter().any(|l| l.committed);
            nothing_open && nothing_kept && s.own.is_empty()
        };
        if idle {
            // Sessions that broke off before their first checkpoint must not fill the log.
            let (head, history, lens) = (self.log.head(), self.history(), self.lens());
            self.log.cut_at(head, |a| (a.history, a.lens) = (history, lens)).await?;
        }
        drop(turn);
        let now = self.lens();
        for (volume, (len, _)) in lens.iter().zip(now).enumerate().filter(|(_, (len, now))| *len != now) {
            self.resize_next(u16::try_from(volume).unwrap_or(u16::MAX), *len).await?;
        }
        Ok(())
    }

    /// Keeps changes of the primary, in this order, in the open epoch.
    ///
    /// # Errors
    /// Of the log or a disk; the open epoch must not be decided then.
    pub async fn keep(&self, changes: &[Change]) -> Result<()> {
        let _one = self.intake.acquire(1).await;
        self.still_secondary()?;
        self.keep_next(changes).await
    }

    async fn keep_next(&self, changes: &[Change]) -> Result<()> {
        self.touch(changes)?;
        let kept = match self.engine {
            _ if self.state.borrow().is_blank() => self.to_disk(changes).await,
            Engine::Redo => self.keep_redo(changes).await,
            Engine::Undo => self.keep_undo(changes).await,
        };
        if self.is_tight() {
            // older checkpoints make room
            self.work.notify_all();
        }
        if kept.is_ok() && self.lags_behind() {
            self.to_harden.notify_all();
        }
        kept
    }

    fn still_secondary(&self) -> Result<()> {
        if self.role() == Role::Secondary {
            return Ok(());
        }
        Err(BlockError::new(ErrorKind::Busy, "this side has taken over"))
    }

    async fn keep_redo(&self, changes: &[Change]) -> Result<()> {
        let records: Vec<Record> = changes
            .iter()
            .map(|c| Record {
                kind: Kind::Change,
                volume: c.volume,
                at: c.at,
                number: 0,
                payload: c.data.clone(),
            })
            .collect();
        self.log_open(&records).await
    }

    /// Records with bytes of the open epoch: into the log and its index.
    async fn log_open(&self, records: &[Record]) -> Result<()> {
        let turn = self.log.turn().await;
        let places = self.log.append(&turn, records, RESERVE).await?;
        let mut s = self.state.borrow_mut();
        let Some(open) = s.layers.back_mut() else { return Ok(()) };
        for (r, place) in records.iter().zip(places) {
            open.add(r, place);
        }
        Ok(())
    }

    async fn keep_undo(&self, changes: &[Change]) -> Result<()> {
        // B1: whatever this epoch has not preserved yet, in whole granules; each once, also within these changes.
        let mut missing: Vec<(u16, Span)> = Vec::new();
        {
            let s = self.state.borrow();
            let Some(open) = s.layers.back() else { return Ok(()) };
            let mut planned: Vec<RangeMap> = self.volumes.iter().map(|_| RangeMap::default()).collect();
            for c in changes {
                let i = usize::from(c.volume);
                let (Some(map), Some(planned), Some(v)) =
                    (open.maps.get(i), planned.get_mut(i), self.volumes.get(i))
                else {
                    continue;
                };
                let end = v.len().min(s.reach(i));
                let whole = c.at.align_out(GRANULE).intersect(&Span::new(0, end));
                let holes = resolve([map, &*planned].into_iter(), whole);
                for (span, _) in holes.into_iter().filter(|p| p.1 == Place::Disk) {
                    planned.insert(span, Place::Zero);
                    missing.push((c.volume, span));
                }
            }
        }
        self.preserve(&missing).await?;
        // Also what an earlier call preserved that failed before this: it is in the index, and may not be on the medium (found by `sim`,
        // scenario `replica`, seed 1187).
        if self.preserved.get() > self.log.durable() && !planted(Bug::PreimageNotDurable) {
            self.log.barrier().await?;
        }
        self.to_disk(changes).await
    }

    async fn to_disk(&self, changes: &[Change]) -> Result<()> {
        for c in changes {
            let Some(v) = self.volumes.get(usize::from(c.volume)) else { continue };
            if c.data.is_empty() {
                v.zero(c.at).await?
            } else {
                v.write(c.at.start, c.data.clone()).await?
            }
            self.unflushed.set(self.unflushed.get().saturating_add(c.at.len));
        }
        Ok(())
    }

    /// Old content to the log and into the index; it is not durable yet.
    async fn preserve(&self, missing: &[(u16, Span)]) -> Result<()> {
        for group in missing.chunks(64) {
            let mut records = Vec::with_capacity(group.len());
            for (volume, span) in group {
                let Some(v) = self.volumes.get(usize::from(*volume)) else { continue };
                for piece in span.pieces(PIECE) {
                    let old = v.read(piece).await?;
                    let payload = if old.is_zero() { Data::empty() } else { old };
                    records.push(Record {
                        kind: Kind::Preimage,
                        volume: *volume,
                        at: piece,
                        number: 0,
                        payload,
                    });
                }
            }
            self.log_open(&records).await?;
            self.preserved.set(self.log.head());
        }
        Ok(())
    }

    /// Where the disks hold something else than the checkpoint, until the changes kept there are decided: (volume, range).
    pub fn left_on_disk(&self) -> Vec<(u16, Span)> {
        let s = self.state.borrow();
        let mut all = s.touched.ranges();
        if self.engine == Engine::Undo {
            all.extend(kept_by(&s.layers));
        }
        all
    }

    /// What this side's owner has written since the checkpoint and the disk does not hold yet: (volume, range).
    pub fn own_ranges(&self) -> Vec<(u16, Span)> {
        let s = self.state.borrow();
        kept_by([&s.own].into_iter().chain(&s.merging))
    }

    /// Whether what was kept may be on the disks before it is decided.
    fn is_written_through(&self) -> bool {
        self.engine == Engine::Undo || self.state.borrow().history.now().is_none()
    }

    /// Epochs that are prepared and not decided, with where the image comes from if they are.
    pub fn prepared(&self) -> Vec<(Epoch, History)> {
        let s = self.state.borrow();
        let open = s.layers.iter().filter(|l| l.ready && !l.committed);
        open.filter_map(|l| l.sealed.as_ref().map(|x| (x.0, x.2.clone()))).collect()
    }

    /// The epoch goes on as part of the next.
    ///
    /// # Errors
    /// It is decided, by itself or with a later one; of the log.
    pub async fn abort(&self, epoch: Epoch) -> Result<()> {
        let turn = self.log.turn().await;
        self.still_secondary()?;
        if self.state.borrow().deciding.iter().any(|d| *d >= epoch) {
            return Err(BlockError::new(ErrorKind::Busy, format!("epoch {epoch} is decided")));
        }
        self.log.append(&turn, &[Record::control(Kind::Abort, epoch.0, Vec::new())], 0).await?;
        self.state.borrow_mut().unseal(epoch);
        Ok(())
    }

    /// What the owner of this side reads.
    ///
    /// # Errors
    /// Of the log or a disk.
    pub async fn read(&self, volume: u16, at: Span) -> Result<Data> {
        self.read_as(volume, at, View::Owner).await
    }

    /// What the primary's image is with every change that was kept so far, decided or not.
    ///
    /// # Errors
    /// Of the log or a disk.
    pub async fn read_kept(&self, volume: u16, at: Span) -> Result<Data> {
        self.read_as(volume, at, View::Kept).await
    }

    async fn read_as(&self, volume: u16, at: Span, view: View) -> Result<Data> {
        let v = self.volume(volume)?;
        loop {
            let _pin = self.log.pin();
            let (pieces, switches) = self.look(volume, at, view);
            let mut data = Data::empty();
            for (span, place) in &pieces {
                data.append(match place {
                    Place::Log(from) => self.log.read(Span::new(*from, span.len)).await?,
                    Place::Zero => Data::zeroes(usize::try_from(span.len).unwrap_or(usize::MAX)),
                    Place::Disk => v.read(*span).await?,
                });
            }
            let mut on_disk = pieces.iter().filter(|p| p.1 == Place::Disk).peekable();
            self.still_held(view)?;
            if on_disk.peek().is_none() || self.direct.get() || planted(Bug::NoRecheck) {
                return Ok(data);
            }
            // The disk may have changed under the read; then the index did, first.
            let same =
                on_disk.all(|(span, _)| self.look(volume, *span, view).0.iter().all(|p| p.1 == Place::Disk));
            if same && self.state.borrow().switches == switches {
                return Ok(data);
            }
        }
    }

    fn volume(&self, volume: u16) -> Result<Rc<dyn Volume>> {
        let v = self.volumes.get(usize::from(volume)).cloned();
        v.ok_or_else(|| BlockError::invalid(format!("there is no volume {volume} in the group")))
    }

    /// Where the bytes of `at` are now.
    fn look(&self, volume: u16, at: Span, view: View) -> (Vec<(Span, Place)>, u64) {
        let (s, i) = (self.state.borrow(), usize::from(volume));
        if view == View::Kept {
            let layers: &[&Layer] = &match self.engine {
                Engine::Redo => s.layers.iter().rev().collect::<Vec<_>>(),
                Engine::Undo => Vec::new(),
            };
            return (resolve(layers.iter().filter_map(|l| l.maps.get(i)), at), s.switches);
        }
        if let View::At(epoch) = view {
            return (s.resolve_at(self.engine, i, at, epoch), s.switches);
        }
        let own = [Some(&s.own), s.merging.as_ref()].into_iter().flatten().filter_map(|l| l.maps.get(i));
        let pieces = match self.engine {
            Engine::Redo => {
                let committed = s.layers.iter().rev().filter(|l| l.committed).filter_map(|l| l.maps.get(i));
                resolve(own.chain(committed), at)
            }
            Engine::Undo => resolve(own.chain(s.layers.iter().filter_map(|l| l.maps.get(i))), at),
        };
        (pieces, s.switches)
    }

    /// A write of this side's owner; empty `data` means zeroes. It vanishes with the next checkpoint, unless this side takes over
    /// first.
    ///
    /// # Errors
    /// Of the log; `NoSpace` if its part of the store stays full.
    pub async fn own_write(&self, volume: u16, at: Span, data: Data) -> Result<()> {
        let v = self.volume(volume)?;
        let wait_until = self.env.now() + OWN_WAIT;
        loop {
            let freed = self.log.freed.wait();
            let turn = self.log.turn().await;
            if self.direct.get() {
                drop(turn);
                return if data.is_empty() { v.zero(at).await } else { v.write(at.start, data).await };
            }
            let mut records = Vec::new();
            let number = self.state.borrow().own_number();
            for piece in at.pieces(crate::wire::MAX_PAYLOAD as u64) {
                let from = usize::try_from(piece.start - at.start).unwrap_or(usize::MAX);
                let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
                let payload = if data.is_empty() { Data::empty() } else { data.slice(from, len) };
                records.push(Record { kind: Kind::Own, volume, at: piece, number, payload });
            }
            let used = self.usage();
            let need: u64 = records.iter().map(Record::size).sum();
            // A quarter of the store is for own writes while the primary writes, all of it after a promotion.
            let fits = self.role() == Role::Promoted || used.own + need <= used.size / 4;
            let appended = if fits {
                self.log.append(&turn, &records, RESERVE).await
            } else {
                Err(BlockError::new(
                    ErrorKind::NoSpace,
                    "the part of the replication store for own writes is full",
                ))
            };
            match appended {
                Ok(places) => {
                    let mut s = self.state.borrow_mut();
                    for (r, place) in records.iter().zip(places) {
                        s.own.add(r, place);
                    }
                    return Ok(());
                }
                Err(e) if e.kind() == ErrorKind::NoSpace && self.env.now() < wait_until => {
                    drop(turn);
                    self.work.notify_all();
                    let left = wait_until.saturating_sub(self.env.now());
                    self.env.timeout(left, freed).await;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Own writes completed before survive a crash, for as long as they live.
    ///
    /// # Errors
    /// Of the log.
    pub async fn own_flush(&self) -> Result<()> {
        if self.direct.get() {
            return self.flush_volumes().await;
        }
        if planted(Bug::OwnNotFlushed) {
            return Ok(());
        }
        self.log.barrier().await
    }
}

/// Where `layers` hold something: (volume, range).
fn kept_by<'a>(layers: impl IntoIterator<Item = &'a Layer>) -> Vec<(u16, Span)> {
    let of = |(v, map): (usize, &'a RangeMap)| {
        let v = u16::try_from(v).unwrap_or(u16::MAX);
        map.iter().map(move |(span, _)| (v, span))
    };
    layers.into_iter().flat_map(|l| l.maps.iter().enumerate().flat_map(of)).collect()
}
