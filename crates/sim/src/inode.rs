//! A file on a simulated disk: what its readers see, what would survive, and what is on its way.
//!
//! A change is *issued* (in flight), *lands* (readers see it; it is in the volatile cache) and becomes *durable* when a
//! barrier that was issued after it landed completes. What must stay true:
//! * Power loss keeps of the landed and not yet durable changes any subset, each possibly torn, and of those in flight as well.
//! * A process kill keeps all that landed, and of its changes in flight a drawn part.
//! * A change whose future was dropped still lands, unless it was never issued (first poll).

use crate::Rng;
use crate::host::Keep;
use crate::image::{Effect, Image};
use crate::log::{Entry, Log, tear};
use env::{FileKind, LockRange};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};

/// A change that was issued and has not landed.
struct InFlight {
    process: u32,
    issued_at: usize,
    /// What of it has not landed yet.
    left: Vec<Effect>,
}

/// A byte-range lock of one open file.
struct Held {
    handle: u64,
    start: u64,
    end: u64,
    exclusive: bool,
}

/// One file, whatever its names.
pub(crate) struct Inode {
    pub(crate) number: u64,
    pub(crate) kind: FileKind,
    state: RefCell<State>,
    next_change: Cell<u64>,
}

struct State {
    cache: Image,
    durable: Image,
    /// Landed, not durable, in order of landing; the first has number `first_pending`.
    pending: VecDeque<Effect>,
    first_pending: u64,
    in_flight: BTreeMap<u64, InFlight>,
    locks: Vec<Held>,
    log: Option<Log>,
}

/// A point in the order of landings: what a barrier issued now will cover.
#[derive(Clone, Copy)]
pub(crate) struct BarrierPoint {
    number: u64,
    log_len: usize,
}

impl Inode {
    pub(crate) fn new(number: u64, kind: FileKind, image: Image) -> Inode {
        Inode {
            number,
            kind,
            state: RefCell::new(State {
                durable: image.clone(),
                cache: image,
                pending: VecDeque::new(),
                first_pending: 0,
                in_flight: BTreeMap::new(),
                locks: Vec::new(),
                log: None,
            }),
            next_change: Cell::new(1),
        }
    }

    /// Looks at what readers see.
    pub(crate) fn with_cache<T>(&self, f: impl FnOnce(&Image) -> T) -> T {
        f(&self.state.borrow().cache)
    }

    /// A copy of what would certainly survive now.
    pub(crate) fn durable(&self) -> Image {
        self.state.borrow().durable.clone()
    }

    pub(crate) fn record(&self) {
        let mut s = self.state.borrow_mut();
        s.durable = s.cache.clone();
        s.first_pending += s.pending.len() as u64;
        s.pending.clear();
        s.log = Some(Log { base: s.durable.clone(), entries: Vec::new() });
    }

    pub(crate) fn log(&self) -> Option<Log> {
        self.state.borrow().log.clone()
    }

    /// A change begins; its number.
    pub(crate) fn issue(&self, process: u32, effect: Effect) -> u64 {
        let id = self.next_change.get();
        self.next_change.set(id + 1);
        let mut s = self.state.borrow_mut();
        let issued_at = s.log.as_ref().map_or(0, |l| l.entries.len());
        s.in_flight.insert(id, InFlight { process, issued_at, left: vec![effect] });
        id
    }

    /// The change lands whole. False if it is not in flight any more (its process was killed, the power failed).
    pub(crate) fn land(&self, id: u64) -> bool {
        let Some(f) = self.state.borrow_mut().in_flight.remove(&id) else { return false };
        for part in f.left {
            self.state.borrow_mut().commit(part, f.issued_at);
        }
        true
    }

    /// Part of the change lands now; the rest stays in flight.
    pub(crate) fn land_part(&self, id: u64, rng: &mut Rng) {
        let mut s = self.state.borrow_mut();
        let Some(f) = s.in_flight.get_mut(&id) else { return };
        let issued_at = f.issued_at;
        let mut landing = Vec::new();
        for effect in std::mem::take(&mut f.left) {
            let (now, later) = tear(&effect, rng);
            landing.extend(now);
            f.left.extend(later);
        }
        for part in landing {
            s.commit(part, issued_at);
        }
    }

    /// The change ends without (all of) its effect: nothing of it lands, or with `torn` a drawn part.
    pub(crate) fn fail(&self, id: u64, torn: bool, rng: &mut Rng) -> bool {
        if torn {
            self.land_part(id, rng);
        }
        self.state.borrow_mut().in_flight.remove(&id).is_some()
    }

    pub(crate) fn barrier_point(&self) -> BarrierPoint {
        let s = self.state.borrow();
        BarrierPoint {
            number: s.first_pending + s.pending.len() as u64,
            log_len: s.log.as_ref().map_or(0, |l| l.entries.len()),
        }
    }

    /// The barrier issued at `point` is complete.
    pub(crate) fn make_durable(&self, point: BarrierPoint) {
        let mut s = self.state.borrow_mut();
        while s.first_pending < point.number
            && let Some(effect) = s.pending.pop_front()
        {
            s.durable.apply(&effect);
            s.first_pending += 1;
        }
        if let Some(log) = &mut s.log {
            log.entries.push(Entry::Barrier { covers: point.log_len });
        }
    }

    /// The process is dead: what it had in flight lands wholly, partly or not at all, and its locks are free.
    pub(crate) fn kill(&self, process: u32, handles: &[u64], rng: &mut Rng) {
        let ids: Vec<u64> = {
            let s = self.state.borrow();
            s.in_flight.iter().filter(|(_, f)| f.process == process).map(|(id, _)| *id).collect()
        };
        for id in ids {
            match rng.below(3) {
                0 => {
                    self.land(id);
                }
                n => {
                    self.fail(id, n == 1, rng);
                }
            }
        }
        self.state.borrow_mut().locks.retain(|l| !handles.contains(&l.handle));
    }

    /// The power is gone and back.
    pub(crate) fn power_loss(&self, rng: &mut Rng, keep: Keep) {
        let mut s = self.state.borrow_mut();
        let in_flight = std::mem::take(&mut s.in_flight);
        let pending = std::mem::take(&mut s.pending);
        s.first_pending += pending.len() as u64;
        // Some losses keep nearly all, some nearly nothing.
        let keep = match keep {
            Keep::Drawn => *rng.choose(&[0.0, 0.1, 0.5, 0.9, 1.0]),
            Keep::Nothing => -1.0,
            Keep::All => 2.0,
        };
        for effect in pending.iter().chain(in_flight.values().flat_map(|f| &f.left)) {
            let mut image = std::mem::take(&mut s.durable);
            if rng.chance(keep) {
                image.apply(effect);
            } else if keep >= 0.0 && rng.chance(0.2) {
                tear(effect, rng).0.iter().for_each(|e| image.apply(e));
            }
            s.durable = image;
        }
        s.cache = s.durable.clone();
        s.locks.clear();
        if s.log.is_some() {
            s.log = Some(Log { base: s.durable.clone(), entries: Vec::new() });
        }
    }

    /// Whether `handle` could take the range.
    pub(crate) fn lock_is_free(&self, handle: u64, range: LockRange) -> bool {
        let end = range.start.saturating_add(range.len);
        !self.state.borrow().locks.iter().any(|l| {
            l.handle != handle && l.start < end && range.start < l.end && (l.exclusive || range.exclusive)
        })
    }

    pub(crate) fn lock(&self, handle: u64, range: LockRange) -> bool {
        if !self.lock_is_free(handle, range) {
            return false;
        }
        self.unlock(handle, range.start, range.len);
        let end = range.start.saturating_add(range.len);
        let held = Held { handle, start: range.start, end, exclusive: range.exclusive };
        self.state.borrow_mut().locks.push(held);
        true
    }

    pub(crate) fn unlock(&self, handle: u64, start: u64, len: u64) {
        let end = start.saturating_add(len);
        let mut s = self.state.borrow_mut();
        let mut left = Vec::new();
        for l in s.locks.drain(..) {
            if l.handle != handle || l.end <= start || l.start >= end {
                left.push(l);
                continue;
            }
            if l.start < start {
                left.push(Held { end: start, ..l });
            }
            if l.end > end {
                left.push(Held { start: end, ..l });
            }
        }
        s.locks = left;
    }

    pub(crate) fn unlock_all(&self, handle: u64) {
        self.state.borrow_mut().locks.retain(|l| l.handle != handle);
    }

    /// How many locks are held, by all.
    pub(crate) fn locks_held(&self) -> usize {
        self.state.borrow().locks.len()
    }
}

impl State {
    fn commit(&mut self, effect: Effect, issued_at: usize) {
        self.cache.apply(&effect);
        if let Some(log) = &mut self.log {
            log.entries.push(Entry::Change { issued_at, effect: effect.clone() });
        }
        self.pending.push_back(effect);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::{Data, Span};

    fn write(offset: u64, byte: u8) -> Effect {
        Effect::Write { offset, data: Data::from(vec![byte; 512]) }
    }

    fn sector(i: &Image, n: u64) -> u8 {
        i.read(Span::new(n * 512, 512))[0]
    }

    #[test]
    fn only_what_landed_before_the_barrier_was_issued_is_durable() {
        let f = Inode::new(1, FileKind::Regular, Image::new());
        let (a, b) = (f.issue(1, write(0, 1)), f.issue(1, write(512, 2)));
        f.land(a);
        let point = f.barrier_point();
        f.land(b);
        f.make_durable(point);
        assert_eq!((sector(&f.durable(), 0), sector(&f.durable(), 1)), (1, 0));
        assert_eq!(f.with_cache(|c| sector(c, 1)), 2);
    }

    #[test]
    fn power_loss_keeps_any_subset_and_a_kill_keeps_what_landed() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..400 {
            let f = Inode::new(1, FileKind::Regular, Image::new());
            let (a, b) = (f.issue(1, write(0, 1)), f.issue(1, write(512, 2)));
            f.land(a);
            f.kill(1, &[], &mut Rng::new(seed));
            assert_eq!(f.with_cache(|c| sector(c, 0)), 1, "landed before the kill");
            assert!(!f.land(b), "nobody is there to land it");
            f.power_loss(&mut Rng::new(seed), Keep::Drawn);
            seen.insert(f.with_cache(|c| (sector(c, 0), sector(c, 1))));
        }
        assert_eq!(seen.len(), 4, "{seen:?}");
    }

    #[test]
    fn locks_belong_to_open_files() {
        let f = Inode::new(1, FileKind::Regular, Image::new());
        let range = |start, len, exclusive| LockRange { start, len, exclusive };
        assert!(f.lock(1, range(100, 10, false)));
        assert!(f.lock(2, range(105, 10, false)));
        assert!(!f.lock(2, range(105, 10, true)), "shared by 1 up to 110");
        f.unlock(1, 105, 5);
        assert!(f.lock(2, range(105, 10, true)));
        assert!(!f.lock_is_free(1, range(0, 1000, false)));
        f.unlock_all(2);
        assert!(f.lock(3, range(105, 10, true)));
        assert_eq!(f.locks_held(), 2);
    }
}
