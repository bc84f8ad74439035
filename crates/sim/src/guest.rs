//! Guests: tasks that write stamped sectors, read them back, and put everything on record.
//!
//! What must stay true: each request is in the [`History`] before it is sent and answered there only after it was answered; a
//! request that failed or was cut off stays open for ever (it may have happened). With [`Habits::errors_allowed`] unset, an
//! error is a violation: a guest must not notice faults of somebody else's disk.

use crate::history::{History, What};
use crate::stamp::{stamped, values_of};
use crate::{Rng, Verdict};
use block::{Data, ErrorKind, Io, Result, SECTOR, Span};
use env::Env;
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

/// A disk as a guest sees it.
pub trait Disk {
    /// Length in sectors.
    fn sectors(&self) -> u64;
    /// Reads.
    fn read(&self, at: Span) -> Io<'_, Data>;
    /// Writes; with `fua` it is durable when it is done.
    fn write(&self, offset: u64, data: Data, fua: bool) -> Io<'_>;
    /// Zeroes, perhaps giving the space back.
    fn zero(&self, at: Span, may_unmap: bool) -> Io<'_>;
    /// Does not need the bytes any more.
    fn discard(&self, at: Span) -> Io<'_>;
    /// Makes what was answered durable.
    fn flush(&self) -> Io<'_>;
}

/// How to get at the disk, at first and after a connection broke.
pub type Dial = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Rc<dyn Disk>>>>>>;

/// What a guest does.
#[derive(Clone, Debug)]
pub struct Habits {
    /// Its number in the history.
    pub client: u32,
    /// Requests in flight at most.
    pub depth: usize,
    /// Requests until it is done; it may be told to stop before.
    pub requests: u64,
    /// Sectors of the disk that it uses.
    pub area: Range<u64>,
    /// Sectors of one request at most.
    pub longest: u64,
    /// Out of 100: how many requests are reads; flushes; zeroes; discards. The rest are writes.
    pub reads: u64,
    /// See [`Habits::reads`].
    pub flushes: u64,
    /// See [`Habits::reads`].
    pub zeroes: u64,
    /// See [`Habits::reads`].
    pub discards: u64,
    /// Pause between two requests of one worker, at most.
    pub pause: Duration,
    /// Errors may happen (its own disk has faults).
    pub errors_allowed: bool,
    /// The connection may break.
    pub breaks_allowed: bool,
}

impl Habits {
    /// Drawn from the seed, for a disk of `sectors`.
    pub fn drawn(rng: &mut Rng, client: u32, sectors: u64) -> Habits {
        // some hammer a small area, so that everything overlaps
        let small = (sectors / 16).max(8).min(sectors);
        let start = rng.below(sectors - small + 1);
        let area = if rng.chance(0.4) { start..start + small } else { 0..sectors };
        Habits {
            client,
            depth: *rng.choose(&[1, 2, 4, 8]),
            requests: *rng.choose(&[30, 80, 150]),
            area,
            longest: *rng.choose(&[1, 8, 40, 200]),
            reads: *rng.choose(&[10, 40, 70]),
            flushes: *rng.choose(&[0, 5, 15]),
            zeroes: *rng.choose(&[0, 5, 10]),
            discards: *rng.choose(&[0, 0, 5]),
            pause: *rng.choose(&[Duration::ZERO, Duration::from_micros(200), Duration::from_millis(20)]),
            errors_allowed: false,
            breaks_allowed: false,
        }
    }
}

/// A running guest.
pub struct Guest {
    shared: Rc<Shared>,
    workers: Vec<env::TaskHandle>,
}

struct Shared {
    env: Env,
    habits: Habits,
    history: Rc<History>,
    verdict: Verdict,
    dial: Dial,
    disk: RefCell<Option<Rc<dyn Disk>>>,
    dialing: env::sync::Semaphore,
    rng: RefCell<Rng>,
    left: Cell<u64>,
    stopped: Cell<bool>,
    errors: Cell<u64>,
    errors_allowed: Cell<bool>,
    /// Called after each answered write with its number and sectors.
    on_write: RefCell<Option<OnWrite>>,
}

type OnWrite = Box<dyn Fn(u32, Range<u64>)>;

impl Guest {
    /// Starts `habits.depth` workers.
    pub fn start(
        env: &Env,
        habits: Habits,
        history: Rc<History>,
        verdict: Verdict,
        rng: Rng,
        dial: Dial,
    ) -> Guest {
        let depth = habits.depth;
        let shared = Rc::new(Shared {
            env: env.clone(),
            left: Cell::new(habits.requests),
            errors_allowed: Cell::new(habits.errors_allowed),
            habits,
            history,
            verdict,
            dial,
            disk: RefCell::new(None),
            dialing: env::sync::Semaphore::new(1),
            rng: RefCell::new(rng),
            stopped: Cell::new(false),
            errors: Cell::new(0),
            on_write: RefCell::new(None),
        });
        let workers = (0..depth)
            .map(|_| {
                let s = shared.clone();
                env.spawn("guest", async move { s.work().await })
            })
            .collect();
        Guest { shared, workers }
    }

    /// Has `f` called after each answered write, before anything else can happen.
    pub fn on_write(&self, f: impl Fn(u32, Range<u64>) + 'static) {
        *self.shared.on_write.borrow_mut() = Some(Box::new(f));
    }

    /// From now on errors may happen.
    pub fn allow_errors(&self) {
        self.shared.errors_allowed.set(true);
    }

    /// No new requests; ends when those in flight are answered.
    pub async fn stop(&self) {
        self.shared.stopped.set(true);
        self.join().await;
    }

    /// Ends when all requests are done.
    pub async fn join(&self) {
        for w in &self.workers {
            w.join().await;
        }
        self.shared.disk.take();
    }

    /// Drops the guest where it is; its requests stay unanswered.
    pub fn abandon(&self) {
        self.workers.iter().for_each(env::TaskHandle::cancel);
        self.shared.disk.take();
    }

    /// Errors it met.
    pub fn errors(&self) -> u64 {
        self.shared.errors.get()
    }

    /// Whether it has done all it wanted.
    pub fn is_done(&self) -> bool {
        self.workers.iter().all(env::TaskHandle::is_done)
    }
}

/// One request, before it is in the history.
enum Wish {
    Read(Range<u64>),
    Write(Range<u64>, bool),
    Zero(Range<u64>, bool),
    Discard(Range<u64>),
    Flush,
}

impl Shared {
    async fn work(&self) {
        while self.left.get() > 0 && !self.stopped.get() && !self.verdict.is_bad() {
            self.left.set(self.left.get() - 1);
            let Some(disk) = self.disk().await else { return };
            let (wish, pause) = {
                let mut rng = self.rng.borrow_mut();
                let most = self.habits.pause;
                let pause = if most.is_zero() { most } else { rng.duration(Duration::from_micros(1), most) };
                (self.wish(&mut rng), pause)
            };
            if let Err(e) = self.request(&*disk, wish).await {
                self.failed(&disk, &e);
            }
            if !pause.is_zero() {
                self.env.sleep(pause).await;
            }
        }
    }

    fn failed(&self, disk: &Rc<dyn Disk>, e: &block::BlockError) {
        self.errors.set(self.errors.get() + 1);
        if e.kind() == ErrorKind::Disconnected {
            let mut current = self.disk.borrow_mut();
            if current.as_ref().is_some_and(|c| Rc::ptr_eq(c, disk)) {
                current.take();
            }
            if !self.habits.breaks_allowed && !self.stopped.get() {
                self.verdict.violation(format!("guest {}: connection lost: {e}", self.habits.client));
            }
        } else if !self.errors_allowed.get() {
            self.verdict.violation(format!("guest {}: {e:?}, but its disk is sound", self.habits.client));
        }
    }

    /// The disk, connecting if need be. Gives up after a minute.
    async fn disk(&self) -> Option<Rc<dyn Disk>> {
        let _turn = self.dialing.acquire(1).await;
        for _ in 0..60 {
            if let Some(d) = &*self.disk.borrow() {
                return Some(d.clone());
            }
            if self.stopped.get() {
                return None;
            }
            match (self.dial)().await {
                Ok(d) => {
                    *self.disk.borrow_mut() = Some(d);
                    continue;
                }
                Err(e) if !self.habits.breaks_allowed && !self.stopped.get() => {
                    self.verdict.violation(format!("guest {}: cannot connect: {e}", self.habits.client));
                    return None;
                }
                Err(_) => self.env.sleep(Duration::from_secs(1)).await,
            }
        }
        None
    }

    fn wish(&self, rng: &mut Rng) -> Wish {
        let h = &self.habits;
        let start = rng.between(h.area.start, h.area.end - 1);
        let len = rng.between(1, h.longest.min(h.area.end - start));
        let at = start..start + len;
        let mut n = rng.below(100);
        for (share, kind) in [(h.reads, 0), (h.flushes, 1), (h.zeroes, 2), (h.discards, 3), (100, 4)] {
            if n < share {
                return match kind {
                    0 => Wish::Read(at),
                    1 => Wish::Flush,
                    2 => Wish::Zero(at, rng.chance(0.5)),
                    3 => Wish::Discard(at),
                    _ => Wish::Write(at, rng.chance(0.05)),
                };
            }
            n -= share;
        }
        Wish::Flush
    }

    async fn request(&self, disk: &dyn Disk, wish: Wish) -> Result<()> {
        let (h, c) = (&self.history, self.habits.client);
        let span = |r: &Range<u64>| Span::between(r.start * SECTOR, r.end * SECTOR);
        match wish {
            Wish::Read(at) => {
                let n = h.begin(c, What::Read(Vec::new()), at.clone());
                let data = disk.read(span(&at)).await?;
                if data.len() as u64 != span(&at).len {
                    self.verdict.violation(format!("read of {at:?} gave {} bytes", data.len()));
                    return Ok(());
                }
                h.end_read(n, values_of(&data.contiguous(), at.start));
            }
            Wish::Write(at, fua) => {
                let n = h.begin(c, What::Write, at.clone());
                disk.write(at.start * SECTOR, stamped(n, at.start, at.end - at.start), fua).await?;
                h.end(n);
                if let Some(f) = &*self.on_write.borrow() {
                    f(n, at);
                }
            }
            Wish::Zero(at, unmap) => {
                let n = h.begin(c, What::Zero, at.clone());
                disk.zero(span(&at), unmap).await?;
                h.end(n);
            }
            Wish::Discard(at) => {
                let n = h.begin(c, What::Discard, at.clone());
                disk.discard(span(&at)).await?;
                h.end(n);
            }
            Wish::Flush => {
                let n = h.begin(c, What::Flush, 0..0);
                disk.flush().await?;
                h.end(n);
            }
        }
        Ok(())
    }
}

/// Reads the whole disk, on record; the values.
pub async fn read_all(disk: &dyn Disk, history: &History, client: u32) -> Result<Vec<crate::Value>> {
    const STEP: u64 = 256;
    let mut all = Vec::new();
    let total = disk.sectors();
    while (all.len() as u64) < total {
        let at = all.len() as u64..(all.len() as u64 + STEP).min(total);
        let n = history.begin(client, What::Read(Vec::new()), at.clone());
        let data = disk.read(Span::between(at.start * SECTOR, at.end * SECTOR)).await?;
        let values = values_of(&data.contiguous(), at.start);
        history.end_read(n, values.clone());
        all.extend(values);
    }
    Ok(all)
}
