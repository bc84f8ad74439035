//! The log: records one after the other in a ring inside one file, and two slots that say where it begins.
//!
//! What can happen: a crash at any point, writes that reach the medium in any order and in part, a full file. What must stay true:
//! * Records are written one append after the other, so that what a barrier covers is a prefix of the log; recovery takes the
//!   longest prefix of whole records.
//! * A record of an earlier opening that lies behind the end is never taken for a new one: each opening has an incarnation number,
//!   durable before its first record, and along the log incarnations never decrease.
//! * Space before the tail is used again only when the slot that names the new tail is durable and no reader is at it.

use super::record::{self, HEADER, Header, Kind, Record};
use crate::counts::Counts;
use crate::history::History;
use crate::types::{Epoch, Generation};
use crate::wire::MAX_VOLUMES;
use block::{BlockError, Data, ErrorKind, Result, Span};
use env::sync::{Notify, Permit, Semaphore};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Bytes of a slot: a full history (64 KiB) and more.
const SLOT: u64 = 128 * 1024;
/// Where the ring begins.
pub(crate) const RING_START: u64 = 2 * SLOT;
const SLOT_MAGIC: u64 = u64::from_le_bytes(*b"lbStore4");
/// Slots of the time before epochs ended in the log ahead of the disks' flush: the same, but their log has no such records.
const SLOT_MAGIC_3: u64 = u64::from_le_bytes(*b"lbStore3");
/// Slots of the time before disks were resized: without the lengths.
const SLOT_MAGIC_2: u64 = u64::from_le_bytes(*b"lbStore2");
/// Slots of the time before checkpoints were retained: without the two numbers before those as well.
const SLOT_MAGIC_1: u64 = u64::from_le_bytes(*b"lbStore1");
/// Bytes read at once when the log is read through: few at first, as most logs are short when they are opened, then more.
const READ_FIRST: u64 = 64 << 10;
const READ_AHEAD: u64 = 4 << 20;
/// How far behind the end of the log a record is looked for that proves damage: more than is ever written between two barriers.
const DAMAGE_SCAN: u64 = 256 << 20;

/// What a slot says: the state at the tail.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Anchor {
    pub(crate) sequence: u64,
    pub(crate) incarnation: u64,
    pub(crate) ring: u64,
    pub(crate) tail: u64,
    /// Records of earlier incarnations at the tail are leftovers. Without it a record that was lost behind a hole, and is reached
    /// again once the log has grown to its place, would count (seed 16 of tests/store.rs).
    pub(crate) floor: u64,
    /// [`super::Role`] and engine as numbers.
    pub(crate) role: u64,
    pub(crate) engine: u64,
    pub(crate) group: [u8; 16],
    pub(crate) highest: Generation,
    pub(crate) history: History,
    /// Checkpoints older than the newest that are kept.
    pub(crate) retain: u64,
    /// While any are kept: of those before this one parts may be overwritten on the disks.
    pub(crate) oldest: Epoch,
    /// Of the volumes, as users see them. Nothing: those of the disks.
    pub(crate) lens: Vec<u64>,
}

impl Anchor {
    fn encode(&self) -> Data {
        let mut b = Vec::new();
        for n in [
            SLOT_MAGIC,
            self.sequence,
            self.incarnation,
            self.ring,
            self.tail,
            self.floor,
            self.role,
            self.engine,
            self.highest.0,
        ] {
            b.extend_from_slice(&n.to_le_bytes());
        }
        b.extend_from_slice(&self.group);
        let history = record::history_bytes(&self.history, &crate::digest::Digest::default());
        b.extend_from_slice(&(history.len() as u64).to_le_bytes());
        b.extend_from_slice(&history);
        b.extend_from_slice(&self.retain.to_le_bytes());
        b.extend_from_slice(&self.oldest.0.to_le_bytes());
        b.extend_from_slice(&(self.lens.len() as u64).to_le_bytes());
        self.lens.iter().for_each(|len| b.extend_from_slice(&len.to_le_bytes()));
        b.extend_from_slice(&u64::from(crc32c::crc32c(&b)).to_le_bytes());
        Data::from(b)
    }

    fn parse(b: &[u8]) -> Option<Anchor> {
        let n64 = |at: usize| b.get(at..at + 8).and_then(|x| x.try_into().ok()).map(u64::from_le_bytes);
        let history_len = usize::try_from(n64(88)?).ok()?;
        let more = 96usize.checked_add(history_len)?;
        let volumes = || usize::try_from(n64(more + 16)?).ok().filter(|n| *n <= MAX_VOLUMES);
        let (volumes, end) = match n64(0)? {
            SLOT_MAGIC | SLOT_MAGIC_3 => (volumes()?, more.checked_add(24 + 8 * volumes()?)?),
            SLOT_MAGIC_2 => (0, more.checked_add(16)?),
            SLOT_MAGIC_1 => (0, more),
            _ => return None,
        };
        if u64::from(crc32c::crc32c(b.get(..end)?)) != n64(end)? {
            return None;
        }
        let (retain, oldest) = if end > more { (n64(more)?, n64(more + 8)?) } else { (0, 0) };
        Some(Anchor {
            retain,
            oldest: Epoch(oldest),
            lens: (0..volumes).map(|i| n64(more + 24 + 8 * i)).collect::<Option<_>>()?,
            sequence: n64(8)?,
            incarnation: n64(16)?,
            ring: n64(24)?,
            tail: n64(32)?,
            floor: n64(40)?,
            role: n64(48)?,
            engine: n64(56)?,
            highest: Generation(n64(64)?),
            group: b.get(72..88)?.try_into().ok()?,
            history: record::parse_history(b.get(96..more)?)?.0,
        })
    }
}

/// See above.
pub(crate) struct Log {
    file: Rc<dyn env::File>,
    anchor: RefCell<Anchor>,
    head: Cell<u64>,
    /// Everything before is on stable storage.
    durable: Cell<u64>,
    /// Readers, by the tail there was when they began.
    pins: Counts<u64>,
    /// One append at a time.
    turn: Semaphore,
    /// One slot at a time.
    slot: Semaphore,
    broken: RefCell<Option<BlockError>>,
    /// An append has begun and not ended.
    unsettled: Cell<bool>,
    /// Space was freed.
    pub(crate) freed: Notify,
}

impl Log {
    /// Makes a new log of `anchor.ring` bytes in `file`. If one was there, its records count as leftovers.
    ///
    /// A crash leaves the old one, or the new one, or a file that is none yet ([`Log::is_made`]): the length comes behind the slots,
    /// and of two old slots the older is overwritten first.
    pub(crate) async fn create(file: &Rc<dyn env::File>, anchor: &Anchor) -> Result<()> {
        let made = Log::is_made(file).await?;
        let old = if made { newest_anchor(file).await? } else { None };
        let before = old.as_ref().map_or(0, |a| a.incarnation);
        let newest = old.map_or(1, |a| a.sequence % 2);
        let len = RING_START + anchor.ring;
        if made && file.len_hint() < len {
            file.set_len(len).await?;
            file.barrier().await?;
        }
        for (sequence, slot) in [(0, 1 - newest), (1, newest)] {
            let (incarnation, floor) = (before, if before == 0 { 0 } else { before + 1 });
            // where the next is written follows from the number of the last
            let a = Anchor { sequence: sequence + (1 - newest), incarnation, floor, ..anchor.clone() };
            file.write(slot * SLOT, a.encode()).await?;
            file.barrier().await?;
        }
        file.set_len(len).await?;
        file.barrier().await
    }

    /// Whether a log was ever completely made in `file`, or it holds something else. If not, it is empty, or was begun.
    pub(crate) async fn is_made(file: &Rc<dyn env::File>) -> Result<bool> {
        let len = file.len_hint();
        if len > RING_START || env::bugs::planted("replication: a store half made is refused") {
            return Ok(true);
        }
        for slot in Span::new(0, len).pieces(SLOT) {
            let bytes = file.read(slot).await?;
            if !bytes.is_zero() && !bytes.contiguous().starts_with(&SLOT_MAGIC.to_le_bytes()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Opens a log: gives every whole record to `each`, in order, and begins a new incarnation.
    pub(crate) async fn open(
        file: Rc<dyn env::File>,
        mut each: impl FnMut(&Header, u64, u64, &Data),
        skip: bool,
    ) -> Result<Log> {
        let mut anchor = newest_anchor(&file)
            .await?
            .ok_or_else(|| BlockError::corrupt("this file is not a replication store (no whole header)"))?;
        if anchor.ring < HEADER
            || anchor.ring % record::ALIGN != 0
            || file.len_hint() < RING_START.saturating_add(anchor.ring)
        {
            return Err(BlockError::corrupt("the replication store is shorter than its header says"));
        }
        let mut end = anchor.tail;
        if !skip {
            let mut reader = Reader { file: &file, window: (0, Data::empty()), ahead: READ_FIRST };
            let mut incarnation = anchor.floor;
            while end - anchor.tail < anchor.ring
                && let Some((header, payload)) = reader.record(end, anchor.ring).await?
            {
                if header.incarnation < incarnation || header.incarnation > anchor.incarnation {
                    break;
                }
                incarnation = header.incarnation;
                let size = match header.kind {
                    Kind::Pad => anchor.ring - end % anchor.ring,
                    _ => record::size_of(header.payload_len),
                };
                each(&header, end, RING_START + end % anchor.ring + HEADER, &payload);
                end += size;
            }
            reader.check_damage(end, &anchor, incarnation).await?;
        }
        anchor.incarnation += 1;
        let log = Log {
            file,
            anchor: RefCell::new(anchor),
            head: Cell::new(end),
            durable: Cell::new(0),
            pins: Counts::default(),
            turn: Semaphore::new(1),
            slot: Semaphore::new(1),
            broken: RefCell::new(None),
            unsettled: Cell::new(false),
            freed: Notify::new(),
        };
        Ok(log)
    }

    pub(crate) fn anchor(&self) -> Anchor {
        self.anchor.borrow().clone()
    }

    /// Writes a slot: durable when done. The tail counts as moved only then.
    pub(crate) async fn write_anchor(&self, change: impl FnOnce(&mut Anchor)) -> Result<()> {
        let _turn = self.slot.acquire(1).await;
        self.check()?;
        let mut next = self.anchor();
        change(&mut next);
        next.sequence += 1;
        let at = next.sequence % 2 * SLOT;
        self.or_break(self.file.write(at, next.encode()).await)?;
        self.settle().await?;
        *self.anchor.borrow_mut() = next;
        self.freed.notify_all();
        Ok(())
    }

    /// As [`Log::write_anchor`], with the tail at `end`, which was the head in this incarnation.
    pub(crate) async fn cut_at(&self, end: u64, change: impl FnOnce(&mut Anchor)) -> Result<()> {
        self.write_anchor(|a| {
            (a.tail, a.floor) = (end, a.incarnation);
            change(a);
        })
        .await
    }

    /// A failed barrier or slot leaves nobody knowing what is on the medium: nothing is promised any more.
    fn or_break<T>(&self, r: Result<T>) -> Result<T> {
        if let Err(e) = &r {
            self.broken.borrow_mut().get_or_insert(e.clone().context("the replication store failed before"));
        }
        r
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.broken.borrow().clone().map_or(Ok(()), Err)
    }

    pub(crate) fn head(&self) -> u64 {
        self.head.get()
    }

    /// Everything before is on stable storage.
    pub(crate) fn durable(&self) -> u64 {
        self.durable.get()
    }

    pub(crate) fn ring(&self) -> u64 {
        self.anchor.borrow().ring
    }

    /// Bytes in use, counting what readers still hold.
    pub(crate) fn used(&self) -> u64 {
        let tail = self.anchor.borrow().tail;
        let pinned = self.pins.first(..).unwrap_or(tail);
        self.head.get() - tail.min(pinned)
    }

    /// Nothing at or after the present tail is overwritten until the pin is dropped.
    pub(crate) fn pin(&self) -> Pin<'_> {
        let tail = self.anchor.borrow().tail;
        self.pins.hold(tail);
        Pin { log: self, tail }
    }

    /// The right to append.
    pub(crate) async fn turn(&self) -> Permit<'_> {
        self.turn.acquire(1).await
    }

    /// Appends records (the caller has the [`Log::turn`]); gives where the payload of each lies in the file. `NoSpace`
    /// if they do not fit with `reserve` bytes left over; nothing is written then.
    pub(crate) async fn append(
        &self,
        _turn: &Permit<'_>,
        records: &[Record],
        reserve: u64,
    ) -> Result<Vec<u64>> {
        self.check()?;
        let (ring, incarnation) = (self.ring(), self.anchor.borrow().incarnation);
        let durable = self.durable.get();
        let mut lsn = self.head.get();
        let mut places = Vec::with_capacity(records.len());
        let mut writes: Vec<(u64, Data)> = vec![(lsn % ring, Data::empty())];
        for r in records {
            let left = ring - lsn % ring;
            if r.size() > left {
                if let Some((_, data)) = writes.last_mut() {
                    Record::control(Kind::Pad, 0, Vec::new()).encode(lsn, incarnation, durable, data);
                }
                lsn += left;
                writes.push((0, Data::empty()));
            }
            places.push(RING_START + lsn % ring + HEADER);
            if let Some((_, data)) = writes.last_mut() {
                r.encode(lsn, incarnation, durable, data);
            }
            lsn += r.size();
        }
        if self.used() + (lsn - self.head.get()) + reserve > ring {
            return Err(BlockError::new(ErrorKind::NoSpace, "the replication store is full"));
        }
        if self.unsettled.replace(true) {
            // An append was called off: it may still land, and must not land on this one.
            self.file.settle().await?;
        }
        let mut result = Ok(());
        for (at, data) in writes.into_iter().filter(|w| !w.1.is_empty()) {
            result = self.file.write(RING_START + at, data).await;
            if result.is_err() {
                break;
            }
        }
        self.unsettled.set(false);
        result?;
        self.head.set(lsn);
        Ok(places)
    }

    /// Everything appended before is durable.
    pub(crate) async fn barrier(&self) -> Result<()> {
        self.check()?;
        self.settle().await
    }

    async fn settle(&self) -> Result<()> {
        let head = self.head.get();
        self.or_break(self.file.barrier().await)?;
        self.durable.set(self.durable.get().max(head));
        Ok(())
    }

    /// Bytes of a payload.
    pub(crate) async fn read(&self, at: Span) -> Result<Data> {
        self.file.read(at).await
    }
}

/// What the newer of the whole slots says.
async fn newest_anchor(file: &Rc<dyn env::File>) -> Result<Option<Anchor>> {
    let mut best: Option<Anchor> = None;
    for slot in 0..2 {
        let bytes = file.read(Span::new(slot * SLOT, SLOT)).await?.contiguous();
        if let Some(a) = Anchor::parse(&bytes)
            && best.as_ref().is_none_or(|b| b.sequence < a.sequence)
        {
            best = Some(a);
        }
    }
    Ok(best)
}

/// See [`Log::pin`].
pub(crate) struct Pin<'a> {
    log: &'a Log,
    tail: u64,
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        if self.log.pins.release(self.tail) {
            self.log.freed.notify_all();
        }
    }
}

struct Reader<'a> {
    file: &'a Rc<dyn env::File>,
    window: (u64, Data),
    /// Bytes of the next window.
    ahead: u64,
}

impl Reader<'_> {
    async fn bytes(&mut self, at: Span) -> Result<Data> {
        let have = Span::new(self.window.0, self.window.1.len() as u64);
        if !have.contains(&at) {
            let len = self.file.len_hint().saturating_sub(at.start).min(self.ahead).max(at.len);
            self.ahead = (self.ahead * 2).min(READ_AHEAD);
            self.window = (at.start, self.file.read(Span::new(at.start, len)).await?);
        }
        let from = usize::try_from(at.start - self.window.0).unwrap_or(usize::MAX);
        Ok(self.window.1.slice(from, usize::try_from(at.len).unwrap_or(usize::MAX)))
    }

    /// The log ends at `end`, where no whole record is. If a later record says that this place was durable when it was written, what is
    /// there is no torn tail, but damage.
    async fn check_damage(&mut self, end: u64, anchor: &Anchor, incarnation: u64) -> Result<()> {
        let limit = (anchor.tail + anchor.ring).min(end.saturating_add(DAMAGE_SCAN));
        let mut at = end + record::ALIGN;
        while at < limit {
            let around = at - at % anchor.ring;
            let len = (anchor.ring - at % anchor.ring).min(limit - at);
            // a ring that was never gone around is a hole for the most part
            for e in self.file.extents(Span::new(RING_START + at % anchor.ring, len)).await? {
                let here = Span::new(around + (e.span.start - RING_START), e.span.len);
                for part in here.pieces(READ_AHEAD).filter(|_| e.kind != block::Kind::Zero) {
                    self.check_part(part, end, anchor, incarnation).await?;
                }
                at = here.end();
            }
        }
        Ok(())
    }

    /// Looks for records in `part` that say that the log was durable up to behind `end`.
    async fn check_part(&mut self, part: Span, end: u64, anchor: &Anchor, incarnation: u64) -> Result<()> {
        let place = |at: u64| RING_START + at % anchor.ring;
        let bytes = self.bytes(Span::new(place(part.start), part.len)).await?.contiguous();
        for (at, h) in (part.start..).step_by(HEADER as usize).zip(bytes.as_chunks::<{ HEADER as usize }>().0)
        {
            if let Some(h) = record::parse(h, at)
                && (incarnation..=anchor.incarnation).contains(&h.incarnation)
                && h.durable > end
            {
                return Err(BlockError::corrupt(format!(
                    "the replication store is damaged at offset {}: a record there was durable before the one at offset {} \
                     was written, and is not whole; what was committed after it is lost",
                    place(end),
                    place(at)
                )));
            }
        }
        Ok(())
    }

    /// The record at `lsn`, if a whole one is there.
    async fn record(&mut self, lsn: u64, ring: u64) -> Result<Option<(Header, Data)>> {
        let left = ring - lsn % ring;
        let at = RING_START + lsn % ring;
        let header = self.bytes(Span::new(at, HEADER)).await?.contiguous();
        let Some(h) = record::parse(&header, lsn) else { return Ok(None) };
        if record::size_of(h.payload_len) > left {
            return Ok(None);
        }
        let payload = self.bytes(Span::new(at + HEADER, h.payload_len)).await?;
        Ok((crate::wire::crc_of(&payload) == h.payload_crc).then_some((h, payload)))
    }
}
