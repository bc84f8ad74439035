//! A world with nothing in it but time and chance: virtual time jumps to the next timer when all tasks wait, and the next
//! task is drawn. A run is a function of its seed. (The crate `sim` has the whole world; this much is enough here, and
//! does not depend on the daemon.)

use block::{BlockError, Io};
use env::{Address, Backend, Env, Executor, File, Listener, OpenMode, Stream, Turn};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

/// Turns after which a run counts as endless.
const MAX_TURNS: u64 = 300_000;

type Key = (Duration, u64);
type Timers = Rc<RefCell<BTreeMap<Key, Option<Waker>>>>;

pub struct Clock {
    now: Cell<Duration>,
    state: Cell<u64>,
    turns: Cell<u64>,
    timers: Timers,
    next: Cell<u64>,
}

impl Clock {
    fn draw(&self) -> u64 {
        // splitmix64
        let s = self.state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.state.set(s);
        let z = (s ^ (s >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

fn no<'a, T: 'a>() -> Io<'a, T> {
    Box::pin(async { Err(BlockError::unsupported("nothing of the kind here")) })
}

impl Backend for Clock {
    fn now(&self) -> Duration {
        self.now.get()
    }
    fn wall(&self) -> Duration {
        self.now.get()
    }
    fn random(&self) -> u64 {
        self.draw()
    }
    fn sleep_until(&self, at: Duration) -> Pin<Box<dyn Future<Output = ()>>> {
        let id = self.next.get();
        self.next.set(id + 1);
        let key = (at.max(self.now.get() + Duration::from_nanos(1)), id);
        let timers = self.timers.clone();
        timers.borrow_mut().insert(key, None);
        struct Gone(Timers, Key);
        impl Drop for Gone {
            fn drop(&mut self) {
                self.0.borrow_mut().remove(&self.1);
            }
        }
        let gone = Gone(timers, key);
        Box::pin(std::future::poll_fn(move |cx| match gone.0.borrow_mut().get_mut(&gone.1) {
            Some(w) => {
                *w = Some(cx.waker().clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        }))
    }
    fn open<'a>(&'a self, _: &'a Path, _: OpenMode) -> Io<'a, Rc<dyn File>> {
        no()
    }
    fn remove<'a>(&'a self, _: &'a Path) -> Io<'a> {
        no()
    }
    fn listen<'a>(&'a self, _: &'a Address) -> Io<'a, Rc<dyn Listener>> {
        no()
    }
    fn connect<'a>(&'a self, _: &'a Address) -> Io<'a, Rc<dyn Stream>> {
        no()
    }
    fn offload<'a>(&'a self, work: Box<dyn FnOnce() + Send>) -> Io<'a> {
        work();
        Box::pin(async { Ok(()) })
    }
    fn pick(&self, ready: usize) -> usize {
        (self.draw() % ready.max(1) as u64) as usize
    }
    fn turn(&self, wait: bool) -> Turn {
        self.turns.set(self.turns.get() + 1);
        assert!(self.turns.get() < MAX_TURNS, "endless: still busy after {MAX_TURNS} turns");
        // a busy loop does not hold back time for ever
        self.now.set(self.now.get() + Duration::from_micros(1));
        let first = self.timers.borrow().keys().next().copied();
        match first {
            None if wait => return Turn::Stuck,
            Some((at, _)) if wait => self.now.set(self.now.get().max(at)),
            _ => {}
        }
        let mut woken = Vec::new();
        {
            let mut timers = self.timers.borrow_mut();
            while let Some(entry) = timers.first_entry() {
                if entry.key().0 > self.now.get() {
                    break;
                }
                woken.extend(entry.remove());
            }
        }
        woken.into_iter().for_each(Waker::wake);
        Turn::Progress
    }
    fn waker(&self) -> Arc<dyn Fn() + Send + Sync> {
        Arc::new(|| {})
    }
    fn is_simulated(&self) -> bool {
        true
    }
}

/// Runs a world from its seed.
pub fn simulate<T: 'static, F: Future<Output = T> + 'static>(seed: u64, f: impl FnOnce(Env, Rng) -> F) -> T {
    let clock = Rc::new(Clock {
        now: Cell::new(Duration::from_secs(1)),
        state: Cell::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d)),
        turns: Cell::new(0),
        timers: Rc::default(),
        next: Cell::new(0),
    });
    let executor = Executor::new(clock.clone());
    let rng = Rng(clock.draw());
    executor.run(f(executor.env(), rng))
}

/// Chance for a test's own choices.
pub struct Rng(u64);

impl Rng {
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 ^ (self.0 >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 7
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.draw() % n.max(1)
    }
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }
    pub fn chance(&mut self, p: f64) -> bool {
        (self.below(1_000_000) as f64) < p * 1e6
    }
    pub fn choose<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
    pub fn fork(&mut self, _: &str) -> Rng {
        Rng(self.draw())
    }
}
