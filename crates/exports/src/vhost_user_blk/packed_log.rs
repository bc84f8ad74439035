//! The log of a packed ring's requests that have been taken and not answered. As the guest's descriptors are overwritten by answers to
//! other requests, it holds a copy of them.
//!
//! What can happen, and what must stay true: as in `inflight`. Free entries are a list; the entries of a request are linked in
//! its order. Each change of the list is prepared beside the old head of the list, and counts when the old head follows.
//!
//! Layout and protocol: vhost-user specification, "Inflight I/O tracking", packed virtqueue.

use super::inflight::InflightLog;
use super::lane::{Descriptor, List};
use super::packed::{Position, is_used};
use block::{BlockError, Result};
use env::os::shared::vm_memory::AtomicAccess;
use std::rc::Rc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

/// Bytes before the entries of one queue, and of an entry.
pub(super) const HEADER: usize = 32;
pub(super) const ENTRY: usize = 32;
const VERSION: u16 = 1;

mod at {
    pub(super) const VERSION: usize = 8;
    pub(super) const COUNT: usize = 10;
    pub(super) const FREE: usize = 12;
    pub(super) const OLD_FREE: usize = 14;
    pub(super) const USED: usize = 16;
    pub(super) const OLD_USED: usize = 18;
    pub(super) const LAP: usize = 20;
    pub(super) const OLD_LAP: usize = 21;
    // in an entry
    pub(super) const MARK: usize = 0;
    pub(super) const NEXT: usize = 2;
    pub(super) const LAST: usize = 4;
    pub(super) const NUM: usize = 6;
    pub(super) const COUNTER: usize = 8;
    pub(super) const ID: usize = 16;
    pub(super) const FLAGS: usize = 18;
    pub(super) const LEN: usize = 20;
    pub(super) const ADDR: usize = 24;
}

/// The log of one packed queue.
pub(super) struct PackedLog {
    log: Rc<InflightLog>,
    base: usize,
    entries: u16,
    counter: u64,
}

/// A request that is in the log: its place there, and its descriptors.
pub(super) type Open = (u16, List);

fn nonsense() -> BlockError {
    BlockError::invalid("the in-flight log of a packed queue is damaged")
}

impl PackedLog {
    /// Takes up queue `index` of `size` descriptors: the log, where the next answer goes, and the requests to carry out
    /// again, in order. `flags_at` looks at a descriptor of the ring. A new log begins at `used`.
    pub(super) fn recover(
        log: &Rc<InflightLog>,
        index: u16,
        size: u16,
        used: Position,
        flags_at: impl Fn(u16) -> u16,
    ) -> Result<(PackedLog, Position, Vec<Open>)> {
        let base = log.part(index, size, true)?;
        let mut ring = PackedLog { log: log.clone(), base, entries: size, counter: 0 };
        if ring.get::<u16>(at::VERSION)? != VERSION {
            ring.make(used)?;
            return Ok((ring, used, Vec::new()));
        }
        // an answer was under way: either it can be seen, or it was not given
        let (old, new) = (ring.position(at::OLD_USED, at::OLD_LAP)?, ring.position(at::USED, at::LAP)?);
        let seen = old != new && is_used(flags_at(old.index), old.lap);
        if seen {
            ring.settle()?;
        } else {
            ring.put(at::FREE, ring.get::<u16>(at::OLD_FREE)?)?;
            ring.put_position(at::USED, at::LAP, old)?;
        }
        let used = if seen { new } else { old };
        fence(SeqCst);
        let mut free = ring.get::<u16>(at::FREE)?;
        for _ in 0..size {
            if free >= size {
                break;
            }
            ring.put(ring.entry(free) + at::MARK, 0u8)?;
            free = ring.get(ring.entry(free) + at::NEXT)?;
        }
        let open = ring.open()?;
        ring.counter = open.last().map_or(0, |(c, ..)| c.wrapping_add(1));
        Ok((ring, used, open.into_iter().map(|(_, slot, list)| (slot, list)).collect()))
    }

    fn make(&self, used: Position) -> Result<()> {
        for n in 0..self.entries {
            self.put(self.entry(n) + at::MARK, 0u8)?;
            self.put(self.entry(n) + at::NEXT, n + 1)?;
        }
        self.put(at::COUNT, self.entries)?;
        self.put(at::FREE, 0u16)?;
        self.put(at::OLD_FREE, 0u16)?;
        self.put_position(at::USED, at::LAP, used)?;
        self.put_position(at::OLD_USED, at::OLD_LAP, used)?;
        self.log.store(self.base + at::VERSION, VERSION, Release)
    }

    /// What is marked, by its counter.
    fn open(&self) -> Result<Vec<(u64, u16, List)>> {
        let mut open = Vec::new();
        let mut all = 0u32;
        for slot in 0..self.entries {
            if self.get::<u8>(self.entry(slot) + at::MARK)? != 1 {
                continue;
            }
            let num: u16 = self.get(self.entry(slot) + at::NUM)?;
            all += u32::from(num);
            if num == 0 || all > u32::from(self.entries) {
                return Err(nonsense());
            }
            let (mut list, mut n) = (List::new(), slot);
            for _ in 0..num {
                let entry = self.checked(n)?;
                list.push(Descriptor {
                    at: self.get(entry + at::ADDR)?,
                    len: self.get(entry + at::LEN)?,
                    id: self.get(entry + at::ID)?,
                    flags: self.get(entry + at::FLAGS)?,
                });
                n = self.get(entry + at::NEXT)?;
            }
            open.push((self.get::<u64>(self.entry(slot) + at::COUNTER)?, slot, list));
        }
        open.sort_by_key(|(counter, slot, _)| (*counter, *slot));
        Ok(open)
    }

    /// A request is about to begin; its place in the log.
    pub(super) fn begin(&mut self, list: &[Descriptor]) -> Result<u16> {
        let slot: u16 = self.get(at::FREE)?;
        let (mut free, mut last) = (slot, slot);
        for d in list {
            let entry = self.checked(free)?;
            self.put(entry + at::ADDR, d.at)?;
            self.put(entry + at::LEN, d.len)?;
            self.put(entry + at::ID, d.id)?;
            self.put(entry + at::FLAGS, d.flags)?;
            last = free;
            free = self.get(entry + at::NEXT)?;
        }
        let head = self.checked(slot)?;
        self.put(head + at::LAST, last)?;
        self.put(head + at::NUM, list.len() as u16)?;
        self.put(head + at::COUNTER, self.counter)?;
        self.counter = self.counter.wrapping_add(1);
        self.log.store(self.base + head + at::MARK, 1u8, Release)?;
        self.put(at::FREE, free)?;
        self.log.store(self.base + at::OLD_FREE, free, Release)?;
        Ok(slot)
    }

    /// A request's answer is about to be seen; the next one goes to `after`.
    pub(super) fn answer(&mut self, slot: u16, after: Position) -> Result<()> {
        let last = self.checked(self.get(self.checked(slot)? + at::LAST)?)?;
        self.put(last + at::NEXT, self.get::<u16>(at::FREE)?)?;
        self.put(at::FREE, slot)?;
        self.put_position(at::USED, at::LAP, after)?;
        fence(SeqCst);
        Ok(())
    }

    /// It can be seen.
    pub(super) fn answered(&mut self, slot: u16) -> Result<()> {
        self.log.store(self.base + self.checked(slot)? + at::MARK, 0u8, Release)?;
        self.settle()
    }

    /// What was prepared counts.
    fn settle(&self) -> Result<()> {
        self.log.store(self.base + at::OLD_FREE, self.get::<u16>(at::FREE)?, Release)?;
        let used = self.position(at::USED, at::LAP)?;
        self.put_position(at::OLD_USED, at::OLD_LAP, used)
    }

    fn position(&self, index: usize, lap: usize) -> Result<Position> {
        let (index, lap) = (self.get::<u16>(index)?, self.get::<u8>(lap)?);
        if index >= self.entries { Err(nonsense()) } else { Ok(Position { index, lap: lap != 0 }) }
    }

    fn put_position(&self, index: usize, lap: usize, to: Position) -> Result<()> {
        self.put(index, to.index)?;
        self.log.store(self.base + lap, u8::from(to.lap), Release)
    }

    /// Where an entry begins, from the queue's part on.
    fn entry(&self, n: u16) -> usize {
        HEADER + ENTRY * usize::from(n)
    }

    fn checked(&self, n: u16) -> Result<usize> {
        if n < self.entries { Ok(self.entry(n)) } else { Err(nonsense()) }
    }

    fn get<T: AtomicAccess>(&self, offset: usize) -> Result<T> {
        self.log.load(self.base + offset, Acquire)
    }

    fn put<T: AtomicAccess>(&self, offset: usize, value: T) -> Result<()> {
        self.log.store(self.base + offset, value, Relaxed)
    }

    /// Whether its memory was taken away.
    pub(super) fn is_broken(&self) -> bool {
        self.log.is_broken()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use env::os::shared;
    use std::os::fd::OwnedFd;

    const START: Position = Position { index: 0, lap: true };

    fn log(file: &OwnedFd) -> Rc<InflightLog> {
        let file = shared::again(file).unwrap();
        InflightLog::open(file, 0, InflightLog::len(2, 8, true), 2, 8, true).unwrap()
    }

    fn list(id: u16, n: u64) -> List {
        (0..n).map(|i| Descriptor { at: u64::from(id) * 100 + i, len: 7, id, flags: 1 }).collect()
    }

    fn ids(open: &[Open]) -> Vec<(u16, usize)> {
        open.iter().map(|(_, l)| (l[0].id, l.len())).collect()
    }

    #[test]
    fn what_was_not_answered_is_carried_out_again_with_its_descriptors() {
        let file = shared::anonymous_file("log", InflightLog::len(2, 8, true)).unwrap();
        let recover = |flags: u16| PackedLog::recover(&log(&file), 1, 8, START, |_| flags).unwrap();
        let (mut ring, used, open) = recover(0);
        assert!(open.is_empty() && used == START);
        let slots: Vec<u16> =
            [(5, 2), (2, 3), (7, 1)].map(|(id, n)| ring.begin(&list(id, n)).unwrap()).to_vec();
        assert_eq!(slots, [0, 2, 5]);
        let after = START.after(3, 8);
        ring.answer(slots[1], after).unwrap();
        ring.answered(slots[1]).unwrap();
        let (mut ring, used, open) = recover(0);
        assert_eq!((used, ids(&open)), (after, vec![(5, 2), (7, 1)]));
        assert_eq!(open[0].1[1].at, 501);
        // killed when the answer was prepared and not seen, then when it was seen and not noted
        ring.answer(slots[2], after.after(1, 8)).unwrap();
        let (mut ring, used, open) = recover(0);
        assert_eq!((used, ids(&open)), (after, vec![(5, 2), (7, 1)]));
        ring.answer(slots[2], after.after(1, 8)).unwrap();
        let (mut ring, used, open) = recover(0x8080);
        assert_eq!((used, ids(&open)), (after.after(1, 8), vec![(5, 2)]));
        // all that is free is found again
        let all: Vec<u16> = (10..16).map(|id| ring.begin(&list(id, 1)).unwrap()).collect();
        assert!(ring.begin(&list(9, 1)).is_err());
        let (mut ring, _, open) = recover(0);
        assert_eq!(ids(&open), [(5, 2), (10, 1), (11, 1), (12, 1), (13, 1), (14, 1), (15, 1)]);
        for slot in all.into_iter().chain([slots[0]]) {
            ring.answer(slot, START).unwrap();
            ring.answered(slot).unwrap();
        }
        let (mut ring, _, open) = recover(0);
        assert!(open.is_empty());
        assert_eq!(ring.begin(&list(1, 8)).unwrap(), slots[0]);
        // the other queue is another one
        assert!(PackedLog::recover(&log(&file), 0, 8, START, |_| 0).unwrap().2.is_empty());
    }

    #[test]
    fn a_log_of_nonsense_does_no_harm() {
        let file = shared::anonymous_file("log", InflightLog::len(2, 8, true)).unwrap();
        let len = InflightLog::len(2, 8, true);
        let map = shared::SharedMap::new(shared::again(&file).unwrap(), 0, len).unwrap();
        for fill in [0u8, 1, 2, 7, 0x7f, 0xff] {
            for i in 0..map.len() {
                map.store(i, fill, Relaxed).unwrap();
            }
            map.store(at::VERSION, VERSION, Relaxed).unwrap();
            let Ok((mut ring, _, open)) = PackedLog::recover(&log(&file), 0, 8, START, |_| 0x8080) else {
                continue;
            };
            assert!(open.iter().map(|(_, l)| l.len()).sum::<usize>() <= 8);
            let _ = ring.begin(&list(1, 3)).and_then(|slot| ring.answer(slot, START));
            assert!(ring.answer(8, START).is_err());
        }
        assert!(PackedLog::recover(&log(&file), 2, 8, START, |_| 0).is_err());
        assert!(PackedLog::recover(&log(&file), 0, 16, START, |_| 0).is_err());
    }
}
