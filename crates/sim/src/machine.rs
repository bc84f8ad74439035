//! The machinery of a run: virtual time, what will happen when, chance, and the trace.
//!
//! What can happen: nothing by itself. Time stands still while tasks run (but for a microsecond a turn, so that a busy
//! loop cannot hold back timers for ever) and jumps to the next event when all of them wait. What must stay true: a run
//! is a function of its seed; everything that was drawn or done goes into one hash, so that two runs of one seed can be
//! compared; a run has a bound in steps, so that one that never ends is found and not waited for.

use crate::Rng;
use env::Turn;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// What a busy turn takes.
const BUSY_TURN: Duration = Duration::from_micros(1);
/// Turns in a row without anybody waiting, after which the run is taken to spin.
const MAX_BUSY: u64 = 20_000;
/// Wall-clock time at the start: 2026-01-01 UTC, no special day.
const WALL_START: Duration = Duration::from_secs(1_767_225_600);

/// When an event is due; unique, ordered by time and then by when it was set.
pub(crate) type EventKey = (Duration, u64);
type Action = Box<dyn FnOnce()>;

/// The clockwork that all simulated hosts of one run share.
#[derive(Clone)]
pub struct Machine(Rc<Inner>);

struct Inner {
    seed: u64,
    rng: RefCell<Rng>,
    now: Cell<Duration>,
    wall: Cell<Duration>,
    events: RefCell<BTreeMap<EventKey, Action>>,
    next: Cell<u64>,
    hash: Cell<u64>,
    steps: Cell<u64>,
    max_steps: Cell<u64>,
    busy: Cell<u64>,
    trace: RefCell<Option<Vec<String>>>,
    pick_random: Cell<bool>,
}

impl Machine {
    /// A machine at time zero.
    pub fn new(seed: u64) -> Machine {
        let mut rng = Rng::new(seed);
        let pick_random = rng.chance(0.9);
        Machine(Rc::new(Inner {
            seed,
            rng: RefCell::new(rng),
            // not zero: code that subtracts from "now" must work, code that takes zero for "never" must not
            now: Cell::new(Duration::from_secs(1000)),
            wall: Cell::new(WALL_START),
            events: RefCell::default(),
            next: Cell::new(0),
            hash: Cell::new(0xcbf2_9ce4_8422_2325),
            steps: Cell::new(0),
            max_steps: Cell::new(u64::MAX),
            busy: Cell::new(0),
            trace: RefCell::new(None),
            pick_random: Cell::new(pick_random),
        }))
    }

    /// The run is over: what was due later goes, and with it all that it held, which holds this.
    pub(crate) fn forget_events(&self) {
        loop {
            let events = self.0.events.take();
            if events.is_empty() {
                return;
            }
        }
    }

    /// The seed of this run.
    pub fn seed(&self) -> u64 {
        self.0.seed
    }

    /// Virtual monotonic time.
    pub fn now(&self) -> Duration {
        self.0.now.get()
    }

    /// Virtual wall-clock time.
    pub fn wall(&self) -> Duration {
        self.0.wall.get() + self.0.now.get()
    }

    /// Sets the wall clock forward or back, as an administrator or NTP does.
    pub fn jump_wall(&self, to: Duration) {
        self.note("clock jump", to.as_secs(), 0);
        self.0.wall.set(to.saturating_sub(self.0.now.get()));
    }

    /// Draws from the run's stream.
    pub fn draw<T>(&self, f: impl FnOnce(&mut Rng) -> T) -> T {
        f(&mut self.0.rng.borrow_mut())
    }

    /// A stream of its own for one part of the world.
    pub fn fork(&self, name: &str) -> Rng {
        self.0.rng.borrow_mut().fork(name)
    }

    /// Keeps a line of text for each thing that happens, for `--seed S -v`.
    pub fn keep_trace(&self) {
        *self.0.trace.borrow_mut() = Some(Vec::new());
    }

    /// The lines kept so far.
    pub fn take_trace(&self) -> Vec<String> {
        self.0.trace.borrow_mut().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Whether lines are kept.
    pub fn is_traced(&self) -> bool {
        self.0.trace.borrow().is_some()
    }

    /// A hash of all that has happened.
    pub fn hash(&self) -> u64 {
        self.0.hash.get()
    }

    /// Turns of the loop so far.
    pub fn steps(&self) -> u64 {
        self.0.steps.get()
    }

    /// The run may take so many turns; one more is a panic that names the seed (a run that spins for ever).
    pub fn limit_steps(&self, max: u64) {
        self.0.max_steps.set(max);
    }

    /// Adds something that happened to the hash and, if kept, to the trace.
    pub fn note(&self, what: &'static str, a: u64, b: u64) {
        let mut h = self.0.hash.get();
        for x in [what.len() as u64 ^ what.bytes().fold(0, hash_byte), a, b] {
            h = (h ^ x).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
        }
        h ^= self.now().as_nanos() as u64;
        self.0.hash.set(h);
        if self.is_traced() {
            self.say(|| format!("{what} {a} {b}"));
        }
    }

    /// Adds a line to the trace, if lines are kept. The hash does not see it.
    pub fn say(&self, line: impl FnOnce() -> String) {
        if let Some(lines) = self.0.trace.borrow_mut().as_mut() {
            let t = self.0.now.get() - Duration::from_secs(1000);
            lines.push(format!("{:>14.6} {}", t.as_secs_f64(), line()));
        }
    }

    /// Has `action` done at time `at` (not before now).
    pub(crate) fn at(&self, at: Duration, action: impl FnOnce() + 'static) -> EventKey {
        let n = self.0.next.get();
        self.0.next.set(n + 1);
        let key = (at.max(self.now()), n);
        self.0.events.borrow_mut().insert(key, Box::new(action));
        key
    }

    /// Takes an event back.
    pub(crate) fn cancel(&self, key: EventKey) {
        let action = self.0.events.borrow_mut().remove(&key);
        drop(action);
    }

    pub(crate) fn pick(&self, ready: usize) -> usize {
        if !self.0.pick_random.get() {
            return 0;
        }
        let n = self.draw(|r| r.index(ready));
        self.note("pick", n as u64, ready as u64);
        n
    }

    pub(crate) fn turn(&self, wait: bool) -> Turn {
        let step = self.0.steps.get() + 1;
        self.0.steps.set(step);
        assert!(step <= self.0.max_steps.get(), "seed {}: still busy after {step} steps", self.seed());
        if wait {
            self.0.busy.set(0);
        } else {
            // more than a hundred polls each: whoever never waits is found in a second, not in minutes
            let busy = self.0.busy.get() + 1;
            self.0.busy.set(busy);
            assert!(busy <= MAX_BUSY, "seed {}: never waits any more, {busy} turns long", self.seed());
            self.0.now.set(self.now() + BUSY_TURN);
        }
        let due = {
            let mut events = self.0.events.borrow_mut();
            match events.first_key_value() {
                None if wait => return Turn::Stuck,
                None => return Turn::Progress,
                Some((key, _)) if !wait && key.0 > self.now() => return Turn::Progress,
                Some(_) => events.pop_first(),
            }
        };
        if let Some(((at, _), action)) = due {
            self.0.now.set(self.now().max(at));
            action();
        }
        Turn::Progress
    }
}

fn hash_byte(h: u64, byte: u8) -> u64 {
    h.wrapping_mul(31).wrapping_add(u64::from(byte))
}
