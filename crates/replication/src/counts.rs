//! How many hold each of some keys.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::RangeBounds;

/// Keys that are held, each by somebody.
pub(crate) struct Counts<K>(RefCell<BTreeMap<K, usize>>);

impl<K> Default for Counts<K> {
    fn default() -> Counts<K> {
        Counts(RefCell::default())
    }
}

impl<K: Ord + Copy> Counts<K> {
    /// One more holds `key`.
    pub(crate) fn hold(&self, key: K) {
        *self.0.borrow_mut().entry(key).or_default() += 1;
    }

    /// One that held `key` does no longer. `true`: nobody does now.
    pub(crate) fn release(&self, key: K) -> bool {
        let mut counts = self.0.borrow_mut();
        let Some(n) = counts.get_mut(&key) else { return false };
        *n -= 1;
        let last = *n == 0;
        if last {
            counts.remove(&key);
        }
        last
    }

    /// The lowest key in `range` that is held.
    pub(crate) fn first(&self, range: impl RangeBounds<K>) -> Option<K> {
        self.0.borrow().range(range).next().map(|(k, _)| *k)
    }
}
