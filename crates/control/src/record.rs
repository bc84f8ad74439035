//! What has happened: the last events and the last finished jobs, numbered, for managers that were not there.
//!
//! What can happen: a manager loses its connection and asks for what it missed; it asks for more than is kept (the gap is told,
//! never passed over); the numbering begins anew with a daemon that keeps no state (then the record has another name). What must
//! stay true: an event has its number before anybody is sent it, numbers grow, without holes but for the last
//! moments before a crash, and what is kept is bounded in count and
//! in bytes. Nothing here waits: whoever writes the record down ([`Record::on_entry`]) does that later, in batches.

use crate::error::QmpError;
use qapi::{Map, Value, json};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

/// Events that are kept: hours of ordinary jobs, each of which tells about ten.
const MAX_EVENTS: usize = 10_000;
/// Bytes of events that are kept: each has about 150.
const MAX_EVENT_BYTES: usize = 4 << 20;
/// Finished jobs that are kept.
const MAX_JOBS: usize = 1000;
/// Bytes of finished jobs that are kept: each has about 500.
const MAX_JOB_BYTES: usize = 2 << 20;
/// Entries in one reply, unless fewer are asked for.
const MAX_REPLY: usize = 1000;

/// Which of the two records an entry is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Which {
    /// Events.
    Events,
    /// Finished jobs.
    Jobs,
}

struct Entry {
    seq: u64,
    /// What it takes.
    bytes: usize,
    value: Rc<Value>,
}

/// One record: entries in order, the oldest of which go when there are too many.
struct Ring {
    entries: VecDeque<Entry>,
    /// The number of the newest entry; 0: there never was one.
    newest: u64,
    bytes: usize,
    most: usize,
    most_bytes: usize,
}

impl Ring {
    fn new(most: usize, most_bytes: usize) -> Ring {
        Ring { entries: VecDeque::new(), newest: 0, bytes: 0, most, most_bytes }
    }

    /// The number of the oldest entry that is kept; of the next one, if none is.
    fn oldest(&self) -> u64 {
        self.entries.front().map_or(self.newest + 1, |e| e.seq)
    }

    fn push(&mut self, bytes: usize, value: Rc<Value>) -> u64 {
        self.newest += 1;
        self.bytes += bytes;
        self.entries.push_back(Entry { seq: self.newest, bytes, value });
        while self.entries.len() > self.most || (self.bytes > self.most_bytes && self.entries.len() > 1) {
            if let Some(gone) = self.entries.pop_front() {
                self.bytes -= gone.bytes;
            }
        }
        self.newest
    }

    /// The entries after number `since`.
    fn after(&self, since: u64) -> impl Iterator<Item = &Entry> {
        self.entries.iter().skip(self.entries.partition_point(|e| e.seq <= since))
    }
}

type OnEntry = Rc<dyn Fn(Which, u64, u64, &Rc<str>)>;

/// Both records of a daemon.
pub(crate) struct Record {
    /// Tells this numbering from others.
    name: RefCell<String>,
    events: RefCell<Ring>,
    jobs: RefCell<Ring>,
    on_entry: RefCell<Option<OnEntry>>,
}

impl Record {
    /// An empty one; `random` makes its name.
    pub(crate) fn new(random: u64) -> Record {
        Record {
            name: RefCell::new(format!("{random:016x}")),
            events: RefCell::new(Ring::new(MAX_EVENTS, MAX_EVENT_BYTES)),
            jobs: RefCell::new(Ring::new(MAX_JOBS, MAX_JOB_BYTES)),
            on_entry: RefCell::default(),
        }
    }

    fn ring(&self, which: Which) -> &RefCell<Ring> {
        match which {
            Which::Events => &self.events,
            Which::Jobs => &self.jobs,
        }
    }

    /// Adds an entry; its number.
    pub(crate) fn add(&self, which: Which, value: Value) -> (u64, Rc<Value>) {
        let (text, value): (Rc<str>, _) = (value.to_string().into(), Rc::new(value));
        let (number, oldest) = {
            let mut ring = self.ring(which).borrow_mut();
            (ring.push(text.len(), value.clone()), ring.oldest())
        };
        let told = self.on_entry.borrow().clone();
        if let Some(told) = told {
            told(which, number, oldest, &text);
        }
        (number, value)
    }

    /// What happened after number `since` (all that is kept, if it is missing), at most `most` entries.
    ///
    /// # Errors
    /// There is no entry `since` yet: the number is one of another record.
    pub(crate) fn query(
        &self,
        which: Which,
        since: Option<i64>,
        most: Option<i64>,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Map<String, Value>, QmpError> {
        let number = |name: &str, value: i64| {
            u64::try_from(value)
                .map_err(|_| QmpError::generic(format!("Parameter '{name}' expects a non-negative value")))
        };
        let ring = self.ring(which).borrow();
        let (oldest, newest) = (ring.oldest(), ring.newest);
        let since = since.map(|s| number("since", s)).transpose()?;
        if let Some(since) = since.filter(|s| *s > newest) {
            return Err(QmpError::generic(format!(
                "There is no number {since} yet, the newest is {newest}: the numbers began anew (record '{}')",
                self.name.borrow()
            )));
        }
        let most = most.map(|m| number("max", m)).transpose()?;
        let most = most.map_or(MAX_REPLY, |m| usize::try_from(m).unwrap_or(usize::MAX).min(MAX_REPLY));
        let from = since.unwrap_or(oldest - 1);
        let missed = (oldest - 1).saturating_sub(from);
        let found = ring.after(from).filter(|e| wanted(&e.value)).take(most);
        let entries: Vec<Value> = found.map(|e| numbered(&e.value, e.seq)).collect();
        let name = match which {
            Which::Events => "events",
            Which::Jobs => "jobs",
        };
        let mut out = Map::new();
        out.insert("record".into(), json!(*self.name.borrow()));
        out.insert("oldest".into(), json!(oldest));
        out.insert("newest".into(), json!(newest));
        out.insert("missed".into(), json!(missed));
        out.insert(name.into(), Value::Array(entries));
        Ok(out)
    }

    /// From now on `told` gets every entry: its number, that of the oldest one kept, and its text.
    pub(crate) fn on_entry(&self, told: OnEntry) {
        *self.on_entry.borrow_mut() = Some(told);
    }

    /// The name of this numbering.
    pub(crate) fn name(&self) -> String {
        self.name.borrow().clone()
    }

    /// The newest number.
    pub(crate) fn newest(&self, which: Which) -> u64 {
        self.ring(which).borrow().newest
    }

    /// Takes over what an earlier life of the daemon has written down: the name, the entries of `which` by number, and the
    /// number up to which it may have given some. What has happened since this life began comes after that, with new
    /// numbers: nobody has seen the old ones.
    pub(crate) fn restore(&self, name: &str, which: Which, entries: Vec<(u64, Value)>, given: u64) {
        name.clone_into(&mut self.name.borrow_mut());
        let mut ring = self.ring(which).borrow_mut();
        let since = std::mem::take(&mut ring.entries);
        ring.bytes = 0;
        for (seq, value) in entries {
            ring.newest = seq.saturating_sub(1);
            ring.push(value.to_string().len(), Rc::new(value));
        }
        ring.newest = ring.newest.max(given);
        for Entry { bytes, value, .. } in since {
            ring.push(bytes, value);
        }
    }
}

/// `value` with its number.
pub(crate) fn numbered(value: &Value, seq: u64) -> Value {
    let mut out = Map::new();
    out.insert("seq".into(), json!(seq));
    if let Some(members) = value.as_object() {
        out.extend(members.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record::new(7)
    }

    fn numbers(out: &Map<String, Value>) -> Vec<u64> {
        out["events"].as_array().unwrap().iter().map(|e| e["seq"].as_u64().unwrap()).collect()
    }

    fn ask(r: &Record, since: Option<i64>, most: Option<i64>) -> Map<String, Value> {
        r.query(Which::Events, since, most, |_| true).unwrap()
    }

    #[test]
    fn numbers_have_no_holes_and_a_gap_is_told() {
        let r = record();
        assert_eq!(ask(&r, None, None)["newest"], 0);
        assert_eq!(ask(&r, Some(0), None)["missed"], 0);
        for n in 1..=MAX_EVENTS as u64 + 5 {
            assert_eq!(r.add(Which::Events, json!({"event": "X"})).0, n);
        }
        let out = ask(&r, Some(2), None);
        assert_eq!((&out["oldest"], &out["missed"]), (&json!(6), &json!(3)), "3, 4 and 5 are gone");
        assert_eq!(numbers(&out), (6..6 + MAX_REPLY as u64).collect::<Vec<_>>());
        assert_eq!(numbers(&ask(&r, Some(MAX_EVENTS as i64 + 3), None)), [10_004, 10_005]);
        assert_eq!(numbers(&ask(&r, Some(7), Some(2))), [8, 9]);
        assert_eq!(numbers(&ask(&r, Some(MAX_EVENTS as i64 + 5), None)), [0; 0]);
        let future = r.query(Which::Events, Some(MAX_EVENTS as i64 + 6), None, |_| true);
        assert!(future.is_err());
        assert!(r.query(Which::Events, Some(-1), None, |_| true).is_err());
    }

    #[test]
    fn bytes_are_bounded_too() {
        let r = record();
        let long = json!({"data": "x".repeat(1 << 20)});
        for _ in 0..9 {
            r.add(Which::Events, long.clone());
        }
        let out = ask(&r, None, None);
        assert_eq!((&out["oldest"], &out["newest"]), (&json!(7), &json!(9)));
        r.add(Which::Jobs, json!({"id": "y".repeat(5 << 20)}));
        assert_eq!(r.query(Which::Jobs, None, None, |_| true).unwrap()["oldest"], 1, "one is always kept");
    }

    #[test]
    fn numbers_go_on_after_a_restart() {
        let r = record();
        r.add(Which::Events, json!({"event": "NEW"}));
        let old = [39, 40].map(|n| (n, json!({"event": "OLD"})));
        r.restore("abc", Which::Events, old.to_vec(), 100);
        let out = ask(&r, Some(30), None);
        assert_eq!(
            (numbers(&out), &out["missed"], &out["record"]),
            (vec![39, 40, 101], &json!(8), &json!("abc"))
        );
        assert_eq!((&out["events"][0]["event"], &out["events"][2]["event"]), (&json!("OLD"), &json!("NEW")));
        assert_eq!(
            numbers(&ask(&r, Some(70), None)),
            [101],
            "a number given in the last moments before a crash"
        );
    }
}
