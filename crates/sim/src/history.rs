//! Everything guests did and saw, and whether one disk could have answered so.
//!
//! Each sector is a register with unique values (see [`crate::stamp`]), so linearizability is decided by sorting instead of
//! searching (Gibbons and Korach, "Testing shared memories", 1997): all operations on one value form a zone from the
//! first end to the last start among them; a history is linearizable exactly when no two zones that run forward overlap and
//! no backward zone lies inside a forward one. Zeroes are not unique: a read of zero must have one zeroing write, discard or
//! the initial zero that nothing certainly replaced before the read began.
//!
//! What must stay true: no false alarm (a failed or unanswered write may have happened, at any time from its start on;
//! a discard may have done nothing), and the rules after a crash: what a completed flush covers is there, unless
//! something later replaced it.

use crate::machine::Machine;
use crate::stamp::Value;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// A moment: a counter that goes up with each start and end of an operation.
pub type Moment = u64;
const NEVER: Moment = u64::MAX;

/// What was asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum What {
    /// Stamped data; the operation's own number is in the stamp.
    Write,
    /// Zeroes.
    Zero,
    /// Not needed any more: stays, or reads as zero.
    Discard,
    /// The values that came back.
    Read(Vec<Value>),
    /// A flush.
    Flush,
}

/// One operation.
#[derive(Clone, Debug)]
pub struct Record {
    /// Who.
    pub client: u32,
    /// What.
    pub what: What,
    /// Sectors.
    pub sectors: Range<u64>,
    /// When it was asked.
    pub start: Moment,
    /// When it was answered with success; `None`: not yet, never, or with an error.
    pub end: Option<Moment>,
}

/// A disk's history between two crashes.
#[derive(Clone, Default)]
pub struct History {
    clock: Cell<Moment>,
    /// All operations since the beginning; numbers are never reused.
    records: RefCell<Vec<Record>>,
    /// Where the present epoch begins in `records`.
    epoch: Cell<usize>,
    /// What each sector held then; absent: zero.
    initial: RefCell<BTreeMap<u64, Value>>,
    /// After a kill: what else a power loss may bring back as long as nothing was flushed since.
    older: RefCell<BTreeMap<u64, BTreeSet<Value>>>,
    /// Whose trace tells of each operation.
    machine: Option<Machine>,
}

/// How an epoch ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crash {
    /// The host lost its power: only what was flushed is sure to be there, and what is there is durable.
    PowerLoss,
    /// The daemon was killed and held things that only a flush writes (metadata of a format).
    Kill,
    /// The daemon was killed, but everything it had answered was in the hands of the host (a raw image).
    KillWriteThrough,
}

/// Operations on one sector in one epoch.
#[derive(Default)]
struct Sector {
    /// (number, start, end): writes of data.
    writes: Vec<(u32, Moment, Moment)>,
    /// (start, end, certain): zeroes; a discard is not certain.
    zeroes: Vec<(Moment, Moment, bool)>,
    reads: Vec<(Value, Moment, Moment, u32)>,
}

/// A value's operations.
struct Zone {
    value: Value,
    first_end: Moment,
    last_start: Moment,
}

impl History {
    /// As [`History::new`], and `machine`'s trace tells of each operation.
    pub fn told_by(machine: &Machine) -> History {
        History { machine: Some(machine.clone()), ..History::default() }
    }

    fn say(&self, line: impl FnOnce() -> String) {
        if let Some(machine) = &self.machine {
            machine.say(line);
        }
    }

    /// Nothing has happened; every sector reads as zero.
    pub fn new() -> History {
        let h = History::default();
        h.clock.set(1);
        h
    }

    /// The present moment; later calls give later moments.
    pub fn tick(&self) -> Moment {
        self.clock.set(self.clock.get() + 1);
        self.clock.get()
    }

    /// An operation begins; its number (which a write puts in its stamp).
    pub fn begin(&self, client: u32, what: What, sectors: Range<u64>) -> u32 {
        let start = self.tick();
        let mut records = self.records.borrow_mut();
        let n = records.len();
        self.say(|| format!("client {client}: #{n} {what:?} {sectors:?} at {start}"));
        records.push(Record { client, what, sectors, start, end: None });
        n as u32
    }

    /// The operation was answered with success.
    pub fn end(&self, number: u32) {
        let now = self.tick();
        self.say(|| format!("#{number} ended at {now}"));
        self.records.borrow_mut()[number as usize].end = Some(now);
    }

    /// A read was answered.
    pub fn end_read(&self, number: u32, values: Vec<Value>) {
        let now = self.tick();
        self.say(|| format!("#{number} ended at {now}: {values:?}"));
        let mut records = self.records.borrow_mut();
        let r = &mut records[number as usize];
        r.end = Some(now);
        r.what = What::Read(values);
    }

    /// How many operations there were.
    pub fn len(&self) -> usize {
        self.records.borrow().len()
    }

    /// Whether nothing was asked yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many operations ended well.
    pub fn answered(&self) -> usize {
        self.records.borrow().iter().filter(|r| r.end.is_some()).count()
    }

    /// One operation.
    pub fn record(&self, number: u32) -> Record {
        self.records.borrow()[number as usize].clone()
    }

    /// Whether zeroes may be in the sector because of something that had not ended at `moment`.
    pub fn zeroed_since(&self, sector: u64, moment: Moment) -> bool {
        self.records.borrow().iter().any(|r| {
            matches!(r.what, What::Zero | What::Discard)
                && r.sectors.contains(&sector)
                && r.end.is_none_or(|end| end > moment)
        })
    }

    /// Looks for an answer in the present epoch that no disk could have given; the first one found.
    pub fn check(&self) -> Result<(), String> {
        for (number, sector) in self.by_sector() {
            self.check_sector(number, &sector)?;
        }
        Ok(())
    }

    fn by_sector(&self) -> BTreeMap<u64, Sector> {
        let records = self.records.borrow();
        let mut out: BTreeMap<u64, Sector> = BTreeMap::new();
        for (number, r) in records.iter().enumerate().skip(self.epoch.get()) {
            let end = r.end.unwrap_or(NEVER);
            for s in r.sectors.clone() {
                let sector = out.entry(s).or_default();
                match &r.what {
                    What::Write => sector.writes.push((number as u32, r.start, end)),
                    What::Zero => sector.zeroes.push((r.start, end, r.end.is_some())),
                    What::Discard => sector.zeroes.push((r.start, end, false)),
                    What::Read(values) => {
                        // a read that failed has no values
                        if let (Some(e), Some(v)) = (r.end, values.get((s - r.sectors.start) as usize)) {
                            sector.reads.push((*v, r.start, e, number as u32));
                        }
                    }
                    What::Flush => {}
                }
            }
        }
        out
    }

    fn initial_of(&self, sector: u64) -> Value {
        self.initial.borrow().get(&sector).copied().unwrap_or(Value::Zero)
    }

    fn check_sector(&self, number: u64, s: &Sector) -> Result<(), String> {
        let initial = self.initial_of(number);
        let describe = |read: u32| {
            let r = &self.records.borrow()[read as usize];
            format!("sector {number}: read #{read} of client {} [{}..{:?}]", r.client, r.start, r.end)
        };
        let mut writes: BTreeMap<Value, (Moment, Moment)> =
            s.writes.iter().map(|(n, start, end)| (Value::Write(*n), (*start, *end))).collect();
        if initial != Value::Zero {
            writes.insert(initial, (0, 0));
        }
        let mut zones: BTreeMap<Value, Zone> = writes
            .iter()
            .map(|(v, (start, end))| (*v, Zone { value: *v, first_end: *end, last_start: *start }))
            .collect();
        for (value, start, end, read) in &s.reads {
            match value {
                Value::Garbage => return Err(format!("{} returned bytes nobody wrote", describe(*read))),
                Value::Zero => {}
                Value::Write(w) => {
                    let Some((began, _)) = writes.get(value) else {
                        return Err(format!(
                            "{} returned write #{w}, which was never asked for here",
                            describe(*read)
                        ));
                    };
                    if end < began {
                        return Err(format!("{} returned write #{w} before it began", describe(*read)));
                    }
                    if let Some(z) = zones.get_mut(value) {
                        z.first_end = z.first_end.min(*end);
                        z.last_start = z.last_start.max(*start);
                    }
                }
            }
        }
        check_zones(number, &zones, &s.zeroes)?;
        for (value, start, end, read) in &s.reads {
            if *value == Value::Zero && !self.zero_is_possible(s, &zones, initial, *start, *end) {
                return Err(format!("{} returned zeroes that had been overwritten", describe(*read)));
            }
        }
        Ok(())
    }

    fn zero_is_possible(
        &self,
        s: &Sector,
        zones: &BTreeMap<Value, Zone>,
        initial: Value,
        start: Moment,
        end: Moment,
    ) -> bool {
        let replaced = |zeroed: Moment| {
            zones.values().any(|z| {
                let began = match z.value {
                    Value::Write(n) => s.writes.iter().find(|w| w.0 == n).map_or(0, |w| w.1),
                    _ => 0,
                };
                zeroed < began && z.first_end < start
            })
        };
        (initial == Value::Zero && !replaced(0))
            || s.zeroes.iter().any(|(z_start, z_end, _)| *z_start < end && !replaced(*z_end))
    }

    /// The disk crashed and `found` is what it holds now. Checks the epoch, and that `found` is allowed: in each sector a
    /// write that began, and that no write which is sure to be there certainly came after. A new epoch begins with
    /// `found`.
    pub fn crash(&self, found: &[Value], how: Crash) -> Result<(), String> {
        let older = self.judge_crash(found, how)?;
        *self.older.borrow_mut() = older;
        *self.initial.borrow_mut() = (0..).zip(found.iter().copied()).collect();
        self.epoch.set(self.len());
        Ok(())
    }

    /// As [`History::crash`], but the epoch goes on: what is there was only looked at.
    pub fn crash_peek(&self, found: &[Value], how: Crash) -> Result<(), String> {
        self.judge_crash(found, how).map(drop)
    }

    /// The disk was taken back to `found`, an earlier instant of it that was judged already. Checks the epoch; a new one begins with
    /// `found`, which is durable.
    pub fn go_back_to(&self, found: &[Value]) -> Result<(), String> {
        self.check()?;
        self.older.borrow_mut().clear();
        *self.initial.borrow_mut() = (0..).zip(found.iter().copied()).collect();
        self.epoch.set(self.len());
        Ok(())
    }

    fn judge_crash(&self, found: &[Value], how: Crash) -> Result<BTreeMap<u64, BTreeSet<Value>>, String> {
        self.check()?;
        let sectors = self.by_sector();
        let last_flush = self.last_flush_start();
        let sure = if how == Crash::KillWriteThrough { NEVER } else { last_flush };
        let empty = Sector::default();
        let mut older = BTreeMap::new();
        for (number, value) in (0..).zip(found) {
            let s = sectors.get(&number).unwrap_or(&empty);
            if !self.survivors(number, s, sure).contains(value) {
                return Err(format!(
                    "sector {number}: after the crash ({how:?}) it holds {value:?}; sure to be there: {:?}; written: {:?}; before: {:?}, \
                     or {:?}; sure before {sure}",
                    s.writes.iter().filter(|w| w.2 < sure).map(|w| w.0).collect::<Vec<_>>(),
                    s.writes,
                    self.initial_of(number),
                    self.older.borrow().get(&number)
                ));
            }
            if how != Crash::PowerLoss {
                older.insert(number, self.survivors(number, s, last_flush));
            }
        }
        Ok(older)
    }

    /// The start of the last flush that was answered with success: every write answered before it is durable.
    fn last_flush_start(&self) -> Moment {
        let records = self.records.borrow();
        let flushes = records[self.epoch.get()..].iter().filter(|r| r.what == What::Flush && r.end.is_some());
        flushes.map(|r| r.start).max().unwrap_or(0)
    }

    /// What a sector may hold after a crash, if all that ended before `sure` is sure to be there.
    fn survivors(&self, number: u64, s: &Sector, sure: Moment) -> BTreeSet<Value> {
        let mut possible: Vec<(Value, Moment)> =
            s.writes.iter().map(|(n, _, end)| (Value::Write(*n), *end)).collect();
        possible.extend(s.zeroes.iter().map(|(_, end, _)| (Value::Zero, *end)));
        possible.push((self.initial_of(number), 0));
        let certain = s.zeroes.iter().filter(|z| z.2).map(|(start, end, _)| (*start, *end));
        let there: Vec<Moment> = s
            .writes
            .iter()
            .map(|(_, start, end)| (*start, *end))
            .chain(certain)
            .filter(|(_, end)| *end < sure)
            .map(|(start, _)| start)
            .collect();
        let mut values: BTreeSet<Value> = possible
            .into_iter()
            .filter(|(_, end)| !there.iter().any(|start| end < start))
            .map(|(value, _)| value)
            .collect();
        // nothing was flushed since the kill before: the time before it may come back
        if sure == 0
            && let Some(older) = self.older.borrow().get(&number)
        {
            values.extend(older);
        }
        values
    }

    /// Whether `found` (all of a copy that is kept in step, now) has everything that was answered before `moment`, or something
    /// newer.
    pub fn has_all_since(&self, found: &[Value], moment: Moment) -> Result<(), String> {
        let sectors = self.by_sector();
        let empty = Sector::default();
        for (number, value) in (0..).zip(found) {
            let s = sectors.get(&number).unwrap_or(&empty);
            if !self.survivors(number, s, moment).contains(value) {
                return Err(format!(
                    "sector {number} holds {value:?}; answered by {moment}: {:?}",
                    s.writes.iter().filter(|w| w.2 < moment).map(|w| w.0).collect::<Vec<_>>()
                ));
            }
        }
        Ok(())
    }

    /// Whether `values` (of the whole disk, from sector 0) can be the disk at one instant between `from` and `to`: each
    /// sector gives the instants at which it can have held its value; all of them and the two limits must meet.
    pub fn one_instant(&self, values: &[Value], from: Moment, to: Moment) -> Result<(), String> {
        let sectors = self.by_sector();
        let empty = Sector::default();
        let (mut low, mut low_sector) = (from, None);
        let (mut high, mut high_sector) = (to, None);
        for (number, value) in (0..).zip(values) {
            let s = sectors.get(&number).unwrap_or(&empty);
            let (first, last) = self.possible_instants(number, s, *value)?;
            if first > low {
                (low, low_sector) = (first, Some(number));
            }
            if last < high {
                (high, high_sector) = (last, Some(number));
            }
        }
        if low <= high {
            return Ok(());
        }
        Err(format!(
            "no one instant: sector {low_sector:?} holds {:?}, which was not there before {low}; sector {high_sector:?} holds \
             {:?}, which was replaced by {high} (limits {from}..{to})",
            low_sector.and_then(|s| values.get(s as usize)),
            high_sector.and_then(|s| values.get(s as usize)),
        ))
    }

    /// The earliest and the latest instant at which the sector can have held the value.
    fn possible_instants(&self, number: u64, s: &Sector, value: Value) -> Result<(Moment, Moment), String> {
        let mut sources: Vec<(Moment, Moment)> = Vec::new();
        match value {
            Value::Garbage => return Err(format!("sector {number} holds bytes nobody wrote")),
            Value::Zero => sources.extend(s.zeroes.iter().map(|z| (z.0, z.1))),
            Value::Write(n) => sources.extend(s.writes.iter().filter(|w| w.0 == n).map(|w| (w.1, w.2))),
        }
        if self.initial_of(number) == value {
            sources.push((0, 0));
        }
        let certain =
            s.writes.iter().map(|w| (w.1, w.2)).chain(s.zeroes.iter().filter(|z| z.2).map(|z| (z.0, z.1)));
        let certain: Vec<(Moment, Moment)> = certain.filter(|c| c.1 != NEVER).collect();
        let spans = sources.iter().map(|(start, end)| {
            let replaced = certain.iter().filter(|c| *end < c.0).map(|c| c.1).min().unwrap_or(NEVER);
            (*start, replaced)
        });
        // several sources of zero: their union, from the first to the last (wider than the truth, never narrower)
        spans
            .reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))
            .ok_or_else(|| format!("sector {number} holds {value:?}, which nobody wrote there"))
    }
}

fn check_zones(
    number: u64,
    zones: &BTreeMap<Value, Zone>,
    zeroes: &[(Moment, Moment, bool)],
) -> Result<(), String> {
    let mut forward: Vec<&Zone> = zones.values().filter(|z| z.first_end < z.last_start).collect();
    forward.sort_by_key(|z| z.first_end);
    for pair in forward.windows(2) {
        if pair[1].first_end < pair[0].last_start {
            return Err(format!(
                "sector {number}: reads disagree on the order of {:?} and {:?}",
                pair[0].value, pair[1].value
            ));
        }
    }
    for f in forward {
        let inside = |start: Moment, end: Moment| f.first_end < start && end < f.last_start;
        if let Some(z) =
            zones.values().find(|z| z.first_end >= z.last_start && inside(z.last_start, z.first_end))
        {
            return Err(format!(
                "sector {number}: {:?} was read after {:?} had certainly replaced it",
                f.value, z.value
            ));
        }
        if zeroes.iter().any(|(start, end, certain)| *certain && inside(*start, *end)) {
            return Err(format!(
                "sector {number}: {:?} was read after zeroes had certainly replaced it",
                f.value
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    const SECTORS: u64 = 4;

    /// Operations in flight in a made-up history.
    struct Flying {
        number: u32,
        done: bool,
        what: What,
        sectors: Range<u64>,
        seen: Vec<Value>,
    }

    /// A history of an atomic disk: each operation happens at one instant between its start and end. Also gives the disk.
    fn correct(rng: &mut Rng, steps: usize) -> (History, Vec<Value>) {
        let h = History::new();
        let mut disk = vec![Value::Zero; SECTORS as usize];
        let mut flying: Vec<Flying> = Vec::new();
        for _ in 0..steps {
            match rng.below(3) {
                0 if flying.len() < 4 => {
                    let first = rng.below(SECTORS);
                    let sectors = first..rng.between(first + 1, SECTORS);
                    let what = match rng.below(8) {
                        0..=2 => What::Write,
                        3 => What::Zero,
                        4 => What::Flush,
                        _ => What::Read(Vec::new()),
                    };
                    let number = h.begin(1, what.clone(), sectors.clone());
                    flying.push(Flying { number, done: false, what, sectors, seen: Vec::new() });
                }
                1 if !flying.is_empty() => {
                    let i = rng.index(flying.len());
                    act(&mut flying[i], &mut disk);
                }
                _ if !flying.is_empty() => {
                    let i = rng.index(flying.len());
                    act(&mut flying[i], &mut disk);
                    let f = flying.swap_remove(i);
                    match f.what {
                        What::Read(_) => h.end_read(f.number, f.seen),
                        // some answers are lost
                        _ if rng.chance(0.1) => {}
                        _ => h.end(f.number),
                    }
                }
                _ => {}
            }
        }
        (h, disk)
    }

    fn act(f: &mut Flying, disk: &mut [Value]) {
        if std::mem::replace(&mut f.done, true) {
            return;
        }
        let range = f.sectors.start as usize..f.sectors.end as usize;
        match f.what {
            What::Write => disk[range].fill(Value::Write(f.number)),
            What::Zero => disk[range].fill(Value::Zero),
            What::Read(_) => f.seen = disk[range].to_vec(),
            _ => {}
        }
    }

    #[test]
    fn an_atomic_disk_raises_no_alarm() {
        for seed in 0..2000 {
            let (h, disk) = correct(&mut Rng::new(seed), 300);
            h.check().unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            let now = h.tick();
            h.one_instant(&disk, now, now).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            h.crash(&disk, Crash::KillWriteThrough).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        }
    }

    /// Each wrong history is a correct one with one answer changed so that no disk could have given it.
    #[test]
    fn a_thousand_wrong_histories_are_found() {
        let mut found = 0;
        for seed in 0.. {
            let rng = &mut Rng::new(seed);
            let (h, _) = correct(rng, 200);
            let Some((what, sector)) = spoil(&h, rng) else { continue };
            assert!(h.check().is_err(), "seed {seed}: {what} of sector {sector} not found");
            found += 1;
            if found == 1000 {
                break;
            }
        }
    }

    /// Changes one read of `h`; `None` if this history has no read to spoil in the drawn way.
    fn spoil(h: &History, rng: &mut Rng) -> Option<(&'static str, u64)> {
        let records = h.records.borrow().clone();
        let reads: Vec<usize> = (0..records.len())
            .filter(|i| matches!(&records[*i].what, What::Read(v) if !v.is_empty()))
            .collect();
        let read = *reads.get(rng.index(reads.len().max(1)))?;
        let sector = rng.between(records[read].sectors.start, records[read].sectors.end - 1);
        let writes: Vec<usize> = (0..records.len())
            .filter(|i| records[*i].what == What::Write && records[*i].sectors.contains(&sector))
            .collect();
        let start = records[read].start;
        let end = records[read].end?;
        // the last write that certainly ended before the read, and one that certainly ended before that
        let before: Vec<usize> =
            writes.iter().copied().filter(|w| records[*w].end.is_some_and(|e| e < start)).collect();
        let stale = before.iter().find_map(|new| {
            let old = before.iter().find(|old| records[**old].end < Some(records[*new].start))?;
            Some(*old as u32)
        });
        let (what, value) = match rng.below(5) {
            0 => ("stale value", Value::Write(stale?)),
            1 => {
                let later = writes.iter().find(|w| records[**w].start > end)?;
                ("value from the future", Value::Write(*later as u32))
            }
            2 => {
                let never = records.len() as u32 + 5;
                ("invented value", Value::Write(never))
            }
            3 => ("garbage", Value::Garbage),
            _ => {
                let zeroed = (0..records.len()).any(|i| {
                    records[i].what == What::Zero
                        && records[i].sectors.contains(&sector)
                        && records[i].start < end
                });
                if zeroed || before.is_empty() {
                    return None;
                }
                ("lost write", Value::Zero)
            }
        };
        if let What::Read(values) = &mut h.records.borrow_mut()[read].what {
            values[(sector - records[read].sectors.start) as usize] = value;
        }
        Some((what, sector))
    }

    #[test]
    fn two_readers_must_agree_on_the_order() {
        let h = History::new();
        // two writes in flight together; one reader sees 0 then 1, the other 1 then 0
        let (a, b) = (h.begin(1, What::Write, 0..1), h.begin(2, What::Write, 0..1));
        for order in [[a, b], [b, a]] {
            for w in order {
                let r = h.begin(3, What::Read(Vec::new()), 0..1);
                h.end_read(r, vec![Value::Write(w)]);
            }
        }
        assert!(h.check().unwrap_err().contains("order"));
    }

    #[test]
    fn after_a_crash_what_was_flushed_is_there_or_replaced() {
        let history = || {
            let h = History::new();
            let old = h.begin(1, What::Write, 0..2);
            h.end(old);
            let kept = h.begin(1, What::Write, 0..1);
            h.end(kept);
            let f = h.begin(1, What::Flush, 0..0);
            h.end(f);
            let loose = h.begin(1, What::Write, 0..1);
            h.end(loose);
            let unanswered = h.begin(1, What::Write, 1..2);
            (h, old, kept, loose, unanswered)
        };
        let (_, old, kept, loose, unanswered) = history();
        let ok = |a, b| history().0.crash(&[Value::Write(a), Value::Write(b)], Crash::PowerLoss);
        assert!(ok(kept, old).is_ok());
        assert!(ok(loose, unanswered).is_ok());
        assert!(ok(old, old).is_err(), "replaced by a flushed write");
        assert!(
            history().0.crash(&[Value::Zero, Value::Write(old)], Crash::Kill).is_err(),
            "flushed data lost"
        );
        let raw = history().0.crash(&[Value::Write(kept), Value::Write(old)], Crash::KillWriteThrough);
        assert!(raw.is_err(), "a kill alone loses no answered write");
        let (h, ..) = history();
        h.crash(&[Value::Write(kept), Value::Write(old)], Crash::PowerLoss).unwrap();
        let r = h.begin(1, What::Read(Vec::new()), 0..1);
        h.end_read(r, vec![Value::Write(loose)]);
        assert!(h.check().is_err(), "the lost write does not come back");
    }

    #[test]
    fn a_kill_makes_nothing_durable() {
        let history = || {
            let h = History::new();
            let w = h.begin(1, What::Write, 0..1);
            h.end(w);
            h.crash(&[Value::Write(w)], Crash::KillWriteThrough).unwrap();
            h
        };
        assert!(history().crash(&[Value::Zero], Crash::PowerLoss).is_ok(), "it was never flushed");
        let h = history();
        let f = h.begin(1, What::Flush, 0..0);
        h.end(f);
        assert!(h.crash(&[Value::Zero], Crash::PowerLoss).is_err(), "flushed by the next life");
    }

    #[test]
    fn one_instant_sees_a_copy_made_at_two_times() {
        let h = History::new();
        let first = h.begin(1, What::Write, 0..2);
        h.end(first);
        let from = h.tick();
        let a = h.begin(1, What::Write, 0..1);
        h.end(a);
        let b = h.begin(1, What::Write, 1..2);
        h.end(b);
        let to = h.tick();
        let v = |x, y| [Value::Write(x), Value::Write(y)];
        assert!(h.one_instant(&v(first, first), from, to).is_ok());
        assert!(h.one_instant(&v(a, first), from, to).is_ok());
        assert!(h.one_instant(&v(a, b), from, to).is_ok());
        assert!(h.one_instant(&v(first, b), from, to).is_err(), "b without a was never there");
        assert!(h.one_instant(&v(first, first), to, to).is_err());
    }
}
