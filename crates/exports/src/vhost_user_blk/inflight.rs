//! The log of requests that have been taken and not answered, in memory that the front end keeps while we are dead.
//!
//! What can happen: the daemon is killed between any two stores, and another one finds the log as it is; the front end gives
//! a log of nonsense (then at most some requests are carried out that the guest did not ask for now; the chains are checked
//! like all others). What must stay true: a request is in the log from before it begins until after its answer can be
//! seen, so that the next daemon carries out exactly what was not answered, in the order it was taken.
//!
//! Layout and protocol: vhost-user specification, "Inflight I/O tracking", split virtqueue; for packed ones `packed_log`.

use super::packed_log;
use block::{BlockError, Result};
use env::os::shared::SharedMap;
use env::os::shared::vm_memory::AtomicAccess;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{Ordering, fence};

/// Bytes before the entries of one queue: features, version, number of entries, last batch, used index.
const HEADER: usize = 16;
/// Bytes of an entry: mark, padding, link, counter.
const ENTRY: usize = 16;
/// Each queue's part begins on a cache line.
const ALIGN: usize = 64;
const VERSION: u16 = 1;

mod at {
    pub(super) const VERSION: usize = 8;
    pub(super) const COUNT: usize = 10;
    pub(super) const LAST_BATCH: usize = 12;
    pub(super) const USED: usize = 14;
    // in an entry
    pub(super) const MARK: usize = 0;
    pub(super) const LINK: usize = 6;
    pub(super) const COUNTER: usize = 8;
}

fn stride(queue_size: u16, packed: bool) -> usize {
    let (header, entry) = if packed { (packed_log::HEADER, packed_log::ENTRY) } else { (HEADER, ENTRY) };
    (header + entry * usize::from(queue_size)).next_multiple_of(ALIGN)
}

/// The log of all queues.
pub(super) struct InflightLog {
    map: SharedMap,
    queues: u16,
    queue_size: u16,
    /// Its queues are packed ones.
    packed: bool,
}

impl InflightLog {
    /// Bytes of a log.
    pub(super) fn len(queues: u16, queue_size: u16, packed: bool) -> u64 {
        (stride(queue_size, packed) * usize::from(queues)) as u64
    }

    /// The log that the front end has kept, or a new one of zeroes.
    pub(super) fn open(
        file: OwnedFd,
        offset: u64,
        len: u64,
        queues: u16,
        queue_size: u16,
        packed: bool,
    ) -> Result<Rc<InflightLog>> {
        if queues == 0 || queue_size == 0 || len < InflightLog::len(queues, queue_size, packed) {
            return Err(BlockError::invalid("the in-flight log is too short for its queues"));
        }
        let map = SharedMap::new(file, offset, len)?;
        Ok(Rc::new(InflightLog { map, queues, queue_size, packed }))
    }

    /// Where the part of queue `index` of `size` descriptors begins.
    pub(super) fn part(&self, index: u16, size: u16, packed: bool) -> Result<usize> {
        if packed != self.packed {
            return Err(BlockError::invalid("the in-flight log is for rings of the other kind"));
        }
        if index >= self.queues || size > self.queue_size {
            return Err(BlockError::invalid(format!(
                "queue {index} of {size} descriptors is not in the in-flight log of {} queues of {}",
                self.queues, self.queue_size
            )));
        }
        Ok(usize::from(index) * stride(self.queue_size, packed))
    }

    pub(super) fn load<T: AtomicAccess>(&self, offset: usize, order: Ordering) -> Result<T> {
        self.map.load(offset, order)
    }

    pub(super) fn store<T: AtomicAccess>(&self, offset: usize, value: T, order: Ordering) -> Result<()> {
        self.map.store(offset, value, order)
    }

    /// Whether its memory was taken away.
    pub(super) fn is_broken(&self) -> bool {
        self.map.is_broken()
    }
}

/// The log of one queue.
pub(super) struct RingLog {
    log: Rc<InflightLog>,
    base: usize,
    entries: u16,
    counter: u64,
}

impl RingLog {
    /// Takes up queue `index` of `size` descriptors, whose used index in the guest's memory is `used`: the log, and the
    /// requests to carry out again, in order.
    pub(super) fn recover(
        log: &Rc<InflightLog>,
        index: u16,
        size: u16,
        used: u16,
    ) -> Result<(RingLog, Vec<u16>)> {
        let base = log.part(index, size, false)?;
        let mut ring = RingLog { log: log.clone(), base, entries: size, counter: 0 };
        let mut open: Vec<(u64, u16)> = Vec::new();
        if ring.log.map.load::<u16>(base + at::VERSION, Acquire)? != VERSION {
            for head in 0..size {
                ring.mark(head, 0)?;
            }
            ring.log.map.store(base + at::COUNT, size, Relaxed)?;
            ring.log.map.store(base + at::USED, used, Relaxed)?;
            ring.log.map.store(base + at::VERSION, VERSION, Release)?;
            return Ok((ring, Vec::new()));
        }
        // answered, and killed before that was noted: the used index had gone on already
        let known = ring.log.map.load::<u16>(base + at::USED, Acquire)?;
        let mut head = ring.log.map.load::<u16>(base + at::LAST_BATCH, Relaxed)?;
        for _ in 0..used.wrapping_sub(known).min(size) {
            if head >= size {
                break;
            }
            ring.mark(head, 0)?;
            head = ring.log.map.load(ring.entry(head) + at::LINK, Relaxed)?;
        }
        fence(SeqCst);
        ring.log.map.store(base + at::USED, used, Release)?;
        for head in 0..size {
            if ring.log.map.load::<u8>(ring.entry(head) + at::MARK, Acquire)? == 1 {
                let counter = ring.log.map.load::<u64>(ring.entry(head) + at::COUNTER, Relaxed)?;
                open.push((counter, head));
            }
        }
        open.sort_unstable();
        ring.counter = open.last().map_or(0, |(c, _)| c.wrapping_add(1));
        Ok((ring, open.into_iter().map(|(_, head)| head).collect()))
    }

    fn entry(&self, head: u16) -> usize {
        self.base + HEADER + ENTRY * usize::from(head)
    }

    fn mark(&self, head: u16, value: u8) -> Result<()> {
        self.log.map.store(self.entry(head) + at::MARK, value, Release)
    }

    /// A request is about to begin.
    pub(super) fn begin(&mut self, head: u16) -> Result<()> {
        self.check(head)?;
        self.log.map.store(self.entry(head) + at::COUNTER, self.counter, Relaxed)?;
        self.counter = self.counter.wrapping_add(1);
        self.mark(head, 1)
    }

    /// A request's answer is about to be seen.
    pub(super) fn answer(&self, head: u16) -> Result<()> {
        self.check(head)?;
        let last = self.log.map.load::<u16>(self.base + at::LAST_BATCH, Relaxed)?;
        self.log.map.store(self.entry(head) + at::LINK, last, Relaxed)?;
        self.log.map.store(self.base + at::LAST_BATCH, head, Release)
    }

    /// It can be seen: the used index in the guest's memory is `used`.
    pub(super) fn answered(&self, head: u16, used: u16) -> Result<()> {
        self.mark(head, 0)?;
        self.log.map.store(self.base + at::USED, used, Release)
    }

    /// Whether its memory was taken away.
    pub(super) fn is_broken(&self) -> bool {
        self.log.map.is_broken()
    }

    fn check(&self, head: u16) -> Result<()> {
        if head < self.entries {
            return Ok(());
        }
        Err(BlockError::invalid("a descriptor is past the end of the in-flight log"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use env::os::shared;

    fn log(file: &OwnedFd) -> Rc<InflightLog> {
        let file = shared::again(file).unwrap();
        InflightLog::open(file, 0, InflightLog::len(2, 8, false), 2, 8, false).unwrap()
    }

    #[test]
    fn what_was_not_answered_is_carried_out_again_in_order() {
        let file = shared::anonymous_file("log", InflightLog::len(2, 8, false)).unwrap();
        let (mut ring, open) = RingLog::recover(&log(&file), 1, 8, 0).unwrap();
        assert!(open.is_empty());
        for head in [5, 2, 7, 0] {
            ring.begin(head).unwrap();
        }
        ring.answer(2).unwrap();
        ring.answered(2, 1).unwrap();
        drop(ring);
        let (ring, open) = RingLog::recover(&log(&file), 1, 8, 1).unwrap();
        assert_eq!(open, [5, 7, 0]);
        // killed between the used index and the note of it
        ring.answer(7).unwrap();
        let (mut ring, open) = RingLog::recover(&log(&file), 1, 8, 2).unwrap();
        assert_eq!(open, [5, 0]);
        ring.begin(3).unwrap();
        // killed before the used index went on
        ring.answer(5).unwrap();
        let (_, open) = RingLog::recover(&log(&file), 1, 8, 2).unwrap();
        assert_eq!(open, [5, 0, 3]);
        // the other queue is another one
        assert!(RingLog::recover(&log(&file), 0, 8, 0).unwrap().1.is_empty());
    }

    #[test]
    fn a_log_of_nonsense_does_no_harm() {
        let file = shared::anonymous_file("log", InflightLog::len(2, 8, false)).unwrap();
        let map = SharedMap::new(shared::again(&file).unwrap(), 0, InflightLog::len(2, 8, false)).unwrap();
        for fill in [0u8, 1, 0x7f, 0xff] {
            for i in 0..map.len() {
                map.store(i, fill, Relaxed).unwrap();
            }
            map.store(at::VERSION, VERSION, Relaxed).unwrap();
            let (mut ring, open) = RingLog::recover(&log(&file), 0, 8, 77).unwrap();
            assert!(open.len() <= 8);
            assert!(ring.begin(8).is_err() && ring.answer(9).is_err());
            ring.begin(7).unwrap();
        }
        assert!(RingLog::recover(&log(&file), 2, 8, 0).is_err());
        assert!(RingLog::recover(&log(&file), 0, 16, 0).is_err());
        let short = InflightLog::open(shared::again(&file).unwrap(), 0, 100, 2, 8, false);
        assert!(short.is_err());
        let past = InflightLog::open(
            shared::again(&file).unwrap(),
            4096,
            InflightLog::len(2, 8, false),
            2,
            8,
            false,
        );
        assert!(past.is_err());
    }
}
