//! What the guest asked for, and what a sector may hold after a crash.
//!
//! A sector may read as any version that is not certainly replaced: a version is replaced if another one began after it had
//! ended and was answered before the last flush that was answered began. Discards may or may not have an effect. Shrinking
//! drops what is behind the end.

use sim::Value;
use std::cell::{Cell, RefCell};
use std::ops::Range;

/// What was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask {
    /// Stamped data.
    Write,
    /// Stamped data, stored compressed.
    WritePacked,
    /// Zeroes; the space may go.
    Zero {
        /// Give the space back.
        unmap: bool,
    },
    /// Not needed any more.
    Discard,
    /// A new length, in sectors.
    Resize(u64),
    /// Everything answered before is to survive.
    Flush,
    /// An internal snapshot; its name is that of its stamp.
    Take,
    /// One of the internal snapshots is deleted.
    Drop(u64),
}

/// An internal snapshot that was asked for.
#[derive(Clone, Debug)]
pub struct Taken {
    /// Its name.
    pub name: String,
    /// What the disk held.
    pub values: Vec<Value>,
    /// The entries of the log between which it must be there: from its answer to the beginning of its deletion.
    since: usize,
    until: usize,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Asked {
    /// What.
    pub ask: Ask,
    /// Sectors (for a resize: those cut off).
    pub sectors: Range<u64>,
    start: u64,
    end: u64,
    start_entry: usize,
    end_entry: usize,
    value: Value,
}

const NEVER: u64 = u64::MAX;

/// All requests of one run.
#[derive(Default)]
pub struct History {
    asked: RefCell<Vec<Asked>>,
    clock: Cell<u64>,
    next_stamp: Cell<u32>,
    /// What each sector held before; absent: zero.
    initial: RefCell<Vec<Value>>,
    initial_size: Cell<u64>,
    taken: RefCell<Vec<Taken>>,
}

impl History {
    /// A disk that holds `initial` (one value a sector). Stamps begin at `first_stamp`.
    pub fn new(initial: Vec<Value>, first_stamp: u32) -> History {
        let h = History::default();
        h.initial_size.set(initial.len() as u64);
        *h.initial.borrow_mut() = initial;
        h.next_stamp.set(first_stamp);
        h
    }

    /// Snapshots that may be there from the beginning.
    pub fn know(&self, before: Vec<Taken>) {
        let forget = |t| Taken { since: usize::MAX, ..t };
        self.taken.borrow_mut().extend(before.into_iter().map(forget));
    }

    /// A snapshot of `values` is being taken.
    pub fn taking(&self, name: &str, values: Vec<Value>) {
        let taken = Taken { name: name.to_owned(), values, since: usize::MAX, until: usize::MAX };
        self.taken.borrow_mut().push(taken);
    }

    /// The snapshot was taken when the log had `entry` entries.
    pub fn took(&self, name: &str, entry: usize) {
        self.taken.borrow_mut().iter_mut().filter(|t| t.name == name).for_each(|t| t.since = entry);
    }

    /// The snapshot is being deleted when the log has `entry` entries.
    pub fn dropping(&self, name: &str, entry: usize) {
        self.taken.borrow_mut().iter_mut().filter(|t| t.name == name).for_each(|t| t.until = entry);
    }

    /// All snapshots there ever were.
    pub fn taken(&self) -> Vec<Taken> {
        self.taken.borrow().clone()
    }

    fn tick(&self) -> u64 {
        self.clock.set(self.clock.get() + 1);
        self.clock.get()
    }

    /// A request begins when the log has `entry` entries: (number, stamp for its data).
    pub fn begin(&self, ask: Ask, sectors: Range<u64>, entry: usize) -> (usize, u32) {
        let stamp = self.next_stamp.get();
        self.next_stamp.set(stamp + 1);
        let value = match ask {
            Ask::Write | Ask::WritePacked => Value::Write(stamp),
            _ => Value::Zero,
        };
        let start = self.tick();
        let mut asked = self.asked.borrow_mut();
        asked.push(Asked {
            ask,
            sectors,
            start,
            end: NEVER,
            start_entry: entry,
            end_entry: usize::MAX,
            value,
        });
        (asked.len() - 1, stamp)
    }

    /// The request was answered with success when the log had `entry` entries.
    pub fn end(&self, number: usize, entry: usize) {
        let now = self.tick();
        let mut asked = self.asked.borrow_mut();
        asked[number].end = now;
        asked[number].end_entry = entry;
    }

    /// Stamps from here on are free.
    pub fn next_stamp(&self) -> u32 {
        self.next_stamp.get()
    }

    /// The sectors that any request touched, in order, and one in sixteen of the others.
    pub fn interesting(&self) -> Vec<u64> {
        let mut all: Vec<u64> = (0..self.initial_size.get()).step_by(16).collect();
        for a in self.asked.borrow().iter() {
            all.extend(a.sectors.clone());
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    /// What may be found after a crash behind `entry` entries.
    pub fn legal_at(&self, entry: usize, sectors: &[u64]) -> Legal {
        let asked = self.asked.borrow();
        let begun: Vec<&Asked> = asked.iter().filter(|a| a.start_entry <= entry).collect();
        let flushed = begun
            .iter()
            .filter(|a| a.ask == Ask::Flush && a.end != NEVER && a.end_entry <= entry)
            .map(|a| a.start)
            .max()
            .unwrap_or(0);
        let changes: Vec<&&Asked> = begun.iter().filter(|a| !a.sectors.is_empty()).collect();
        let initial = self.initial.borrow();
        let values = sectors
            .iter()
            .map(|s| {
                let here = || changes.iter().filter(|a| a.sectors.contains(s));
                let durable = here()
                    .filter(|a| a.end < flushed && a.ask != Ask::Discard)
                    .map(|a| a.start)
                    .max()
                    .unwrap_or(0);
                let mut legal: Vec<Value> = here().filter(|a| a.end >= durable).map(|a| a.value).collect();
                if durable == 0 {
                    legal.push(initial.get(*s as usize).copied().unwrap_or(Value::Zero));
                }
                legal.sort_unstable();
                legal.dedup();
                legal
            })
            .collect();
        let resizes = || {
            begun.iter().filter_map(|a| match a.ask {
                Ask::Resize(n) => Some((n, a.start, a.end)),
                _ => None,
            })
        };
        let durable = resizes().filter(|r| r.2 < flushed).map(|r| r.1).max().unwrap_or(0);
        let mut sizes: Vec<u64> = resizes().filter(|r| r.2 >= durable).map(|r| r.0).collect();
        if durable == 0 {
            sizes.push(self.initial_size.get());
        }
        let taken = self.taken.borrow();
        let snapshots = taken.iter().map(|t| (t.clone(), t.since <= entry && entry < t.until)).collect();
        Legal { values, sizes, snapshots }
    }

    /// All requests, one a line.
    pub fn describe(&self) -> String {
        let asked = self.asked.borrow();
        let lines = asked.iter().enumerate().map(|(i, a)| {
            let end = if a.end == NEVER { "-".to_owned() } else { a.end_entry.to_string() };
            format!("  #{i} {:?} {:?} sectors {:?} log {}..{end}\n", a.ask, a.value, a.sectors, a.start_entry)
        });
        lines.collect()
    }
}

/// What may be found.
pub struct Legal {
    /// For each sector asked about, its possible values.
    pub values: Vec<Vec<Value>>,
    /// Possible lengths of the disk in sectors.
    pub sizes: Vec<u64>,
    /// The snapshots that may be there, and whether each must.
    pub snapshots: Vec<(Taken, bool)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_flush_makes_versions_certain() {
        let h = History::new(vec![Value::Zero; 8], 1);
        let (a, _) = h.begin(Ask::Write, 0..2, 0);
        h.end(a, 1);
        let (b, _) = h.begin(Ask::Write, 1..3, 1);
        h.end(b, 2);
        let values = |at| h.legal_at(at, &[0, 1, 2]).values;
        assert_eq!(values(2)[1], [Value::Zero, Value::Write(1), Value::Write(2)]);
        let (f, _) = h.begin(Ask::Flush, 0..0, 2);
        assert_eq!(values(2)[0], [Value::Zero, Value::Write(1)]);
        h.end(f, 3);
        assert_eq!(values(3), [vec![Value::Write(1)], vec![Value::Write(2)], vec![Value::Write(2)]]);
        assert_eq!(values(2)[0], [Value::Zero, Value::Write(1)], "a crash before the flush was answered");
        let (d, _) = h.begin(Ask::Discard, 0..1, 3);
        h.end(d, 3);
        assert_eq!(values(3)[0], [Value::Zero, Value::Write(1)]);
    }
}
