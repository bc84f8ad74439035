//! What a primary must not forget in a crash: which parts of its disks may differ from some secondary's checkpoint, which epoch numbers
//! may have been used, where its image comes from, who has fenced it, and where another owner finds it.
//!
//! A file of two slots, written in turn. What must stay true (I8): an extent is durably marked before the first write to it since all
//! peers committed; a slot that was torn leaves the one before it.

use crate::digest::Digest;
use crate::history::History;
use crate::types::{Epoch, Generation, GroupId};
use crate::wire::MAX_TEXT;
use bitmap::Bitmap;
use block::{BlockError, Data, Result, Span};
use env::sync::Semaphore;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Bytes that one mark stands for. A crash of the primary costs sending so much for each place written to.
pub(crate) const EXTENT: u64 = 4 << 20;
const SLOT: u64 = 1 << 20;
const MAGIC: u64 = u64::from_le_bytes(*b"lbActiv2");
/// Slots of the time before a primary listened: without the last parts.
const MAGIC_1: u64 = u64::from_le_bytes(*b"lbActiv1");
/// Runs of marks in a slot; beyond that everything counts as marked.
const MAX_RUNS: usize = 40_000;

struct Slot {
    sequence: u64,
    group: GroupId,
    floor: Epoch,
    used: Epoch,
    history: History,
    /// `None`: everything.
    runs: Option<Vec<(u64, Span)>>,
    /// 0: nobody.
    fenced: Generation,
    place: String,
}

impl Slot {
    fn encode(&self) -> Data {
        let mut words = vec![MAGIC, self.sequence, self.floor.0, self.used.0];
        words.extend(self.group.0.as_chunks::<8>().0.iter().map(|c| u64::from_le_bytes(*c)));
        let history = crate::store::history_bytes(&self.history, &Digest::default());
        words.push(history.len() as u64 / 8);
        words.extend(history.as_chunks::<8>().0.iter().map(|c| u64::from_le_bytes(*c)));
        match &self.runs {
            None => words.push(u64::MAX),
            Some(runs) => {
                words.push(runs.len() as u64);
                runs.iter().for_each(|(v, s)| words.extend([*v, s.start, s.len]));
            }
        }
        words.extend([self.fenced.0, self.place.len() as u64]);
        let mut place = self.place.clone().into_bytes();
        place.resize(place.len().next_multiple_of(8), 0);
        words.extend(place.as_chunks::<8>().0.iter().map(|c| u64::from_le_bytes(*c)));
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.extend_from_slice(&u64::from(crc32c::crc32c(&bytes)).to_le_bytes());
        Data::from(bytes)
    }

    fn parse(bytes: &[u8]) -> Option<Slot> {
        // most of a slot is not used: only what is asked for is read
        let words = bytes.as_chunks::<8>().0;
        let word = |n: usize| words.get(n).map(|w| u64::from_le_bytes(*w));
        let history_words = usize::try_from(word(6)?).ok()?;
        let runs_at = 7usize.checked_add(history_words)?;
        let count = word(runs_at)?;
        let n = if count == u64::MAX { 0 } else { usize::try_from(count).ok().filter(|n| *n <= MAX_RUNS)? };
        let runs_end = runs_at + 1 + 3 * n;
        let (place_len, end) = match word(0)? {
            MAGIC_1 => (0, runs_end),
            MAGIC => {
                let len = usize::try_from(word(runs_end + 1)?).ok().filter(|n| *n <= MAX_TEXT)?;
                (len, runs_end + 2 + len.div_ceil(8))
            }
            _ => return None,
        };
        if u64::from(crc32c::crc32c(bytes.get(..end * 8)?)) != word(end)? {
            return None;
        }
        let mut group = [0; 16];
        group.copy_from_slice(bytes.get(32..48)?);
        let place = bytes.get((runs_end + 2) * 8..).and_then(|b| b.get(..place_len)).unwrap_or_default();
        let runs = words.get(runs_at + 1..runs_end)?.as_chunks::<3>().0.iter();
        let run = |[v, start, len]: [u64; 3]| Some((v, Span::checked(start, len)?));
        let runs: Option<Vec<_>> = runs.map(|r| run(r.map(u64::from_le_bytes))).collect();
        Some(Slot {
            sequence: word(1)?,
            group: GroupId(group),
            floor: Epoch(word(2)?),
            used: Epoch(word(3)?),
            history: crate::store::parse_history(bytes.get(56..runs_at * 8)?)?.0,
            runs: if count == u64::MAX { None } else { Some(runs?) },
            fenced: Generation(if end > runs_end { word(runs_end)? } else { 0 }),
            place: String::from_utf8_lossy(place).into_owned(),
        })
    }
}

/// See above.
pub struct Activity {
    file: Rc<dyn env::File>,
    group: GroupId,
    marked: RefCell<Vec<Bitmap>>,
    durable: RefCell<Vec<Bitmap>>,
    floor: Cell<Epoch>,
    used: Cell<Epoch>,
    history: RefCell<History>,
    fenced: Cell<Generation>,
    place: RefCell<String>,
    sequence: Cell<u64>,
    turn: Semaphore,
}

fn empty(lens: &[u64]) -> Result<Vec<Bitmap>> {
    lens.iter().map(|len| Bitmap::new(*len, EXTENT)).collect()
}

impl Activity {
    /// A new record: of what was written since `history`, only `marks` is known; without marks, nothing is.
    ///
    /// # Errors
    /// Of the file; volumes that are too long.
    pub async fn create(
        file: Rc<dyn env::File>,
        group: GroupId,
        lens: &[u64],
        history: History,
        marks: Option<&[(u16, Span)]>,
    ) -> Result<Rc<Activity>> {
        let mut marked = empty(lens)?;
        match marks {
            None => marked.iter_mut().for_each(Bitmap::set_all),
            Some(marks) => {
                for (v, span) in marks {
                    if let Some(b) = marked.get_mut(usize::from(*v)) {
                        b.set(*span);
                    }
                }
            }
        }
        let a = Activity {
            file,
            group,
            marked: RefCell::new(marked),
            durable: RefCell::new(empty(lens)?),
            floor: Cell::new(history.epoch()),
            used: Cell::new(history.epoch()),
            history: RefCell::new(history),
            fenced: Cell::new(Generation(0)),
            place: RefCell::default(),
            sequence: Cell::new(0),
            turn: Semaphore::new(1),
        };
        a.persist().await?;
        a.persist().await?;
        Ok(Rc::new(a))
    }

    /// Reads the record back; nothing if the file has none.
    ///
    /// # Errors
    /// Of the file; a record of another group.
    pub async fn open(file: Rc<dyn env::File>, group: GroupId, lens: &[u64]) -> Result<Option<Rc<Activity>>> {
        let mut best: Option<Slot> = None;
        for slot in 0..2 {
            let bytes = file.read(Span::new(slot * SLOT, SLOT)).await?.contiguous();
            if let Some(s) = Slot::parse(&bytes)
                && best.as_ref().is_none_or(|b| b.sequence < s.sequence)
            {
                best = Some(s);
            }
        }
        let Some(slot) = best else { return Ok(None) };
        if slot.group != group {
            return Err(BlockError::invalid(format!(
                "the file is the record of group {}, not {group}",
                slot.group
            )));
        }
        let mut marked = empty(lens)?;
        match &slot.runs {
            None => marked.iter_mut().for_each(Bitmap::set_all),
            Some(runs) => {
                for (v, span) in runs {
                    if let Some(b) = usize::try_from(*v).ok().and_then(|v| marked.get_mut(v)) {
                        b.set(span.intersect(&Span::new(0, b.len())));
                    }
                }
            }
        }
        Ok(Some(Rc::new(Activity {
            file,
            group,
            durable: RefCell::new(marked.clone()),
            marked: RefCell::new(marked),
            floor: Cell::new(slot.floor),
            used: Cell::new(slot.used),
            history: RefCell::new(slot.history),
            fenced: Cell::new(slot.fenced),
            place: RefCell::new(slot.place),
            sequence: Cell::new(slot.sequence),
            turn: Semaphore::new(1),
        })))
    }

    /// Checkpoints before this one are not covered.
    pub fn floor(&self) -> Epoch {
        self.floor.get()
    }

    /// Epochs up to this one may have been used.
    pub fn used(&self) -> Epoch {
        self.used.get()
    }

    /// Where the image came from when this was last written.
    pub fn history(&self) -> History {
        self.history.borrow().clone()
    }

    /// Who has fenced this owner, if anybody has.
    pub fn fenced(&self) -> Option<Generation> {
        Some(self.fenced.get()).filter(|g| g.0 > 0)
    }

    /// This owner was fenced, and stays it across restarts.
    ///
    /// # Errors
    /// Of the file.
    pub async fn fence(&self, by: Generation) -> Result<()> {
        self.fenced.set(by);
        self.persist().await
    }

    /// Where another owner finds this one, if it listens.
    pub fn place(&self) -> Option<String> {
        Some(self.place.borrow().clone()).filter(|p| !p.is_empty())
    }

    /// It listens there from now on.
    ///
    /// # Errors
    /// Of the file.
    pub async fn found_at(&self, place: &str) -> Result<()> {
        if place.len() > MAX_TEXT || *self.place.borrow() == place {
            return Ok(());
        }
        place.clone_into(&mut self.place.borrow_mut());
        self.persist().await
    }

    /// What may differ: (volume, range).
    pub fn marks(&self) -> Vec<(u16, Span)> {
        let marked = self.marked.borrow();
        let all = marked.iter().enumerate();
        all.flat_map(|(v, b)| {
            let v = u16::try_from(v).unwrap_or(u16::MAX);
            b.areas(Span::new(0, b.len()), 0).map(move |s| (v, s))
        })
        .collect()
    }

    /// Whether a crash would not make `at` forgotten.
    pub fn covers(&self, volume: u16, at: Span) -> bool {
        let durable = self.durable.borrow();
        let Some(b) = durable.get(usize::from(volume)) else { return false };
        let mut from = at.start - at.start % EXTENT;
        while from < at.end() {
            if !b.get(from) {
                return false;
            }
            from += EXTENT;
        }
        true
    }

    /// A volume has become longer. What is new there is not marked.
    ///
    /// # Errors
    /// A volume that is too long for a bitmap.
    pub fn grow(&self, volume: u16, len: u64) -> Result<()> {
        for all in [&self.marked, &self.durable] {
            if let Some(b) = all.borrow_mut().get_mut(usize::from(volume)).filter(|b| b.len() < len) {
                b.resize(len)?;
            }
        }
        Ok(())
    }

    /// Marks `at` durably.
    ///
    /// # Errors
    /// Of the file.
    pub async fn cover(&self, volume: u16, at: Span) -> Result<()> {
        while !self.covers(volume, at) {
            if let Some(b) = self.marked.borrow_mut().get_mut(usize::from(volume)) {
                b.set(at);
            }
            self.persist().await?;
        }
        Ok(())
    }

    /// All peers have committed `epoch`; `dirty` is what was written since. Written down with the next mark.
    pub fn clean(&self, epoch: Epoch, dirty: &[Bitmap], history: History) {
        let (mut marked, mut durable) = (self.marked.borrow_mut(), self.durable.borrow_mut());
        for ((m, d), dirty) in marked.iter_mut().zip(durable.iter_mut()).zip(dirty) {
            m.clear_all();
            dirty.areas(Span::new(0, dirty.len()), 0).for_each(|s| m.set(s));
            // what is not marked any more is not in the next slot either
            let kept: Vec<Span> = d.areas(Span::new(0, d.len()), EXTENT).filter(|s| m.get(s.start)).collect();
            d.clear_all();
            kept.into_iter().for_each(|s| d.set(s));
        }
        self.floor.set(epoch);
        *self.history.borrow_mut() = history;
    }

    /// Epochs up to `epoch` may be used from now on.
    ///
    /// # Errors
    /// Of the file.
    pub async fn reserve(&self, epoch: Epoch) -> Result<()> {
        self.used.set(self.used.get().max(epoch));
        self.persist().await
    }

    async fn persist(&self) -> Result<()> {
        let _turn = self.turn.acquire(1).await;
        let snapshot: Vec<Bitmap> = self.marked.borrow().clone();
        let mut runs = Vec::new();
        for (v, b) in snapshot.iter().enumerate() {
            runs.extend(
                b.areas(Span::new(0, b.len()), 0)
                    .map(|s| (v as u64, s))
                    .take(MAX_RUNS + 1 - runs.len().min(MAX_RUNS)),
            );
        }
        let sequence = self.sequence.get() + 1;
        let slot = Slot {
            sequence,
            group: self.group,
            floor: self.floor.get(),
            used: self.used.get(),
            history: self.history(),
            fenced: self.fenced.get(),
            place: self.place.borrow().clone(),
            runs: (runs.len() <= MAX_RUNS).then_some(runs),
        };
        self.file.write(sequence % 2 * SLOT, slot.encode()).await?;
        self.file.barrier().await?;
        // Only now: what failed is tried again in the same slot, and never where the last whole one is.
        self.sequence.set(sequence);
        // A mark that was taken away meanwhile must not come back as durable: it is not in the next slot.
        let marked = self.marked.borrow();
        for ((d, s), m) in self.durable.borrow_mut().iter_mut().zip(&snapshot).zip(marked.iter()) {
            s.areas(Span::new(0, s.len()), EXTENT).filter(|a| m.get(a.start)).for_each(|a| d.set(a));
        }
        Ok(())
    }
}
