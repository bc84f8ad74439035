//! A bounded cache of table slices.
//!
//! The unit is a *slice* of a table (4 KiB by default), not the whole table: a random write then costs 4 KiB of metadata,
//! not a cluster. One cache holds slices of L2 tables, another slices of refcount blocks; both are keyed by what the slice
//! *means* (which guest clusters, which host clusters), not by where it lies, so that a table may move.
//!
//! What must stay true: a slice that is dirty, or whose write is in flight, is never evicted (a reload would read what the
//! file held before); a lookup that hits allocates nothing and waits for nothing; eviction is by clock (second chance),
//! in an order that depends on nothing but the order of requests.

use std::collections::BTreeMap;

/// Front cache: recent hits by the low bits of their key, so that most lookups skip the tree.
const FRONT: usize = 64;
/// Fewest slices a cache holds, however small the configured size: enough that the slices one request touches do not
/// evict each other.
pub(crate) const MIN_SLICES: usize = 16;

struct Slot {
    key: u64,
    bytes: Vec<u8>,
    dirty: bool,
    writing: bool,
    used: bool,
}

/// See the module.
pub(crate) struct SliceCache {
    slots: Vec<Slot>,
    index: BTreeMap<u64, u32>,
    front: [(u64, u32); FRONT],
    dirty: Vec<u32>,
    hand: usize,
    capacity: usize,
}

/// A slice's place in its cache; valid until the next wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SlotId(u32);

/// A dirty slice as it was when it was taken for writing.
pub(crate) struct Taken {
    pub(crate) slot: SlotId,
    pub(crate) key: u64,
    pub(crate) bytes: Vec<u8>,
}

impl SliceCache {
    pub(crate) fn new(capacity: usize) -> SliceCache {
        SliceCache {
            slots: Vec::new(),
            index: BTreeMap::new(),
            front: [(u64::MAX, 0); FRONT],
            dirty: Vec::new(),
            hand: 0,
            capacity: capacity.max(MIN_SLICES),
        }
    }

    /// Holds so many slices from now on. If it has more, all go; unless some are dirty: then none goes but for one that comes, and it
    /// stays as large as it is.
    pub(crate) fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity.max(MIN_SLICES);
        if self.slots.len() > self.capacity && self.slots.iter().all(|s| !s.dirty && !s.writing) {
            self.clear();
        }
    }

    /// The slice, if it is here.
    pub(crate) fn get(&mut self, key: u64) -> Option<SlotId> {
        let line = key as usize % FRONT;
        let (k, i) = self.front[line];
        if k == key {
            self.slots[i as usize].used = true;
            return Some(SlotId(i));
        }
        let i = *self.index.get(&key)?;
        self.front[line] = (key, i);
        self.slots[i as usize].used = true;
        Some(SlotId(i))
    }

    pub(crate) fn bytes(&self, slot: SlotId) -> &[u8] {
        &self.slots[slot.0 as usize].bytes
    }

    /// The bytes, to be changed: the slice is dirty from now on.
    pub(crate) fn bytes_mut(&mut self, slot: SlotId) -> &mut [u8] {
        let s = &mut self.slots[slot.0 as usize];
        if !s.dirty {
            s.dirty = true;
            self.dirty.push(slot.0);
        }
        &mut s.bytes
    }

    /// Puts a loaded slice in. `false` (and nothing done) if every slot is dirty or being written; with `force` the cache
    /// then grows beyond its size.
    pub(crate) fn insert(&mut self, key: u64, bytes: Vec<u8>, force: bool) -> bool {
        if self.index.contains_key(&key) {
            return true;
        }
        let slot = Slot { key, bytes, dirty: false, writing: false, used: true };
        let i = if self.slots.len() < self.capacity {
            self.slots.push(slot);
            self.slots.len() - 1
        } else if let Some(i) = self.victim() {
            let old = std::mem::replace(&mut self.slots[i], slot);
            self.index.remove(&old.key);
            let line = &mut self.front[old.key as usize % FRONT];
            if line.0 == old.key {
                *line = (u64::MAX, 0);
            }
            i
        } else if force {
            self.slots.push(slot);
            self.slots.len() - 1
        } else {
            return false;
        };
        self.index.insert(key, i as u32);
        true
    }

    /// Whether [`SliceCache::insert`] would find room.
    pub(crate) fn has_room(&self) -> bool {
        self.slots.len() < self.capacity || self.slots.iter().any(|s| !s.dirty && !s.writing)
    }

    fn victim(&mut self) -> Option<usize> {
        let n = self.slots.len();
        for _ in 0..2 * n {
            let i = self.hand % n;
            self.hand = (i + 1) % n;
            let s = &mut self.slots[i];
            if s.dirty || s.writing {
                continue;
            }
            if !std::mem::take(&mut s.used) {
                return Some(i);
            }
        }
        None
    }

    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Whether so much is dirty that writing back should begin.
    pub(crate) fn is_crowded(&self) -> bool {
        self.dirty.len() * 2 > self.capacity
    }

    /// Takes a copy of all dirty slices, by key; they count as clean, but stay until [`SliceCache::written`].
    pub(crate) fn take_dirty(&mut self) -> Vec<Taken> {
        let mut out: Vec<Taken> = std::mem::take(&mut self.dirty)
            .into_iter()
            .map(|i| {
                let s = &mut self.slots[i as usize];
                s.dirty = false;
                s.writing = true;
                Taken { slot: SlotId(i), key: s.key, bytes: s.bytes.clone() }
            })
            .collect();
        out.sort_unstable_by_key(|t| t.key);
        out
    }

    /// The write of a taken slice has ended: well, or not (then it is dirty again).
    pub(crate) fn written(&mut self, slot: SlotId, well: bool) {
        let s = &mut self.slots[slot.0 as usize];
        s.writing = false;
        if !well && !s.dirty {
            s.dirty = true;
            self.dirty.push(slot.0);
        }
    }

    /// Forgets everything, dirty or not.
    pub(crate) fn clear(&mut self) {
        *self = SliceCache::new(self.capacity);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_and_writing_slices_stay() {
        let mut c = SliceCache::new(MIN_SLICES);
        for k in 0..MIN_SLICES as u64 {
            assert!(c.insert(k, vec![k as u8], false));
        }
        let s = c.get(3).unwrap();
        c.bytes_mut(s)[0] = 77;
        for k in 100..200 {
            assert!(c.insert(k, vec![0], false));
        }
        assert_eq!(c.bytes(c.index.get(&3).map(|i| SlotId(*i)).unwrap()), [77]);
        let taken = c.take_dirty();
        assert_eq!((taken.len(), taken[0].key, &taken[0].bytes[..]), (1, 3, &[77][..]));
        for k in 200..300 {
            assert!(c.insert(k, vec![0], false));
        }
        assert!(c.get(3).is_some(), "being written");
        c.written(taken[0].slot, true);
        for k in 300..400 {
            assert!(c.insert(k, vec![0], false));
        }
        assert!(c.get(3).is_none());
    }

    #[test]
    fn a_cache_that_is_to_hold_less_keeps_what_is_dirty() {
        let mut c = SliceCache::new(4 * MIN_SLICES);
        for k in 0..2 * MIN_SLICES as u64 {
            assert!(c.insert(k, vec![0], false));
        }
        let s = c.get(3).unwrap();
        c.bytes_mut(s)[0] = 77;
        c.set_capacity(1);
        assert!(c.get(3).is_some() && c.get(4).is_some());
        let taken = c.take_dirty();
        c.written(taken[0].slot, true);
        c.set_capacity(1);
        assert!(c.get(3).is_none());
        assert!((100..200).all(|k| c.insert(k, vec![0], false)), "one goes for each that comes");
    }

    #[test]
    fn a_cache_full_of_dirty_slices_says_so() {
        let mut c = SliceCache::new(1);
        for k in 0..MIN_SLICES as u64 {
            assert!(c.insert(k, vec![0], false));
            let s = c.get(k).unwrap();
            c.bytes_mut(s)[0] = 1;
        }
        assert!(!c.has_room());
        assert!(!c.insert(99, vec![0], false));
        assert!(c.insert(99, vec![0], true));
        let t = c.take_dirty();
        assert!(t.is_sorted_by_key(|t| t.key));
        t.iter().for_each(|t| c.written(t.slot, t.key != 5));
        assert_eq!(c.take_dirty().iter().map(|t| t.key).collect::<Vec<_>>(), [5]);
    }
}
