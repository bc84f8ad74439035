//! The real world: io_uring where the kernel lets us, a thread pool and epoll where not.
//!
//! One [`Core`] belongs to one thread: its ring (or poller), its timers, its operations under way. Files and sockets do at
//! once what can be done without waiting, and hand the rest to the core as a [`op::Request`]. What the ring has no
//! operation for goes to helper threads, in both modes.

mod buffers;
mod copy;
mod epoll;
pub mod event;
mod fault;
mod file;
pub mod fuse;
pub mod messages;
mod net;
mod op;
mod open;
mod pool;
pub mod process;
mod range;
pub mod shared;
mod signal;
mod stream;
mod sys;
mod timer;
mod uring;
mod wake;

pub use signal::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, Signals, signals};

use crate::backend::{Backend, Turn};
use crate::handoff::lock;
use crate::{Address, Executor, File, Io, Listener, OpenMode, Stream};
use block::{BlockError, Result};
use op::{Handle, Memory, OnDrop, Op, Request, Slots};
use pool::{Lane, Pool, Returns, Work};
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How to do I/O.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoMode {
    /// io_uring if the kernel allows it, else threads. The environment variable `LIVEBLK_IO` (`uring` or `threads`) decides
    /// instead if it is set.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// Helper threads and epoll.
    Threads,
}

/// Settings of one thread's backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OsConfig {
    /// How to do I/O.
    pub io: IoMode,
    /// Entries of the submission queue. More operations than this may be under way; it is only how many one call submits.
    pub ring_entries: u32,
    /// How long to look for completions before going to sleep. Zero (the default): not at all. It trades processor time
    /// for latency and helps only with a processor to spare.
    pub poll: Duration,
}

impl Default for OsConfig {
    fn default() -> OsConfig {
        OsConfig { io: IoMode::Auto, ring_entries: 256, poll: Duration::ZERO }
    }
}

/// An executor for the current thread over the operating system.
///
/// # Panics
/// If the host refuses even an eventfd (no descriptors are left), or io_uring was demanded and is refused; see [`try_start`].
pub fn start(config: OsConfig) -> Executor {
    match try_start(config) {
        Ok(e) => e,
        Err(e) => panic!("cannot start the event loop: {e}"),
    }
}

/// Like [`start`], with the host's refusal as an error.
pub fn try_start(config: OsConfig) -> Result<Executor> {
    process::ignore_file_size_signal();
    Ok(Executor::new(Rc::new(Os { core: Core::new(config)? })))
}

enum Driver {
    Ring(Box<uring::Ring>),
    Poller(epoll::Poller),
}

/// What one thread has of the operating system.
pub(crate) struct Core {
    driver: Driver,
    slots: Slots,
    timers: Rc<timer::Timers>,
    bell: Arc<wake::Bell>,
    returns: Arc<Returns>,
    random: Cell<u64>,
    poll: Duration,
    /// Completions of one turn; kept for its memory.
    batch: RefCell<Vec<(usize, i32)>>,
}

impl Core {
    fn new(config: OsConfig) -> Result<Rc<Core>> {
        let bell = Arc::new(wake::Bell::new().map_err(BlockError::from_errno)?);
        let wanted = match (config.io, std::env::var("LIVEBLK_IO").as_deref()) {
            (IoMode::Auto, Ok("threads")) => IoMode::Threads,
            (IoMode::Auto, Ok("uring")) => IoMode::Uring,
            (mode, _) => mode,
        };
        let poller = || epoll::Poller::new(&bell).map(Driver::Poller).map_err(BlockError::from_errno);
        let ring =
            || uring::Ring::new(config.ring_entries.clamp(8, 4096), &bell).map(|r| Driver::Ring(Box::new(r)));
        let driver = match wanted {
            IoMode::Threads => poller()?,
            IoMode::Uring => ring().map_err(|e| BlockError::from(e).context("io_uring"))?,
            IoMode::Auto => match ring() {
                Ok(r) => r,
                Err(_) => poller()?,
            },
        };
        let timers = Rc::new(timer::Timers::default());
        timers.advance(sys::clock(libc::CLOCK_MONOTONIC));
        Ok(Rc::new(Core {
            driver,
            slots: Slots::default(),
            timers,
            returns: Arc::new(Returns::new(bell.clone())),
            bell,
            random: Cell::new(sys::seed()),
            poll: config.poll,
            batch: RefCell::new(Vec::new()),
        }))
    }

    /// Starts a file operation: in the ring, or on a helper thread where there is none, the ring lacks it, or `helpers` says so.
    fn submit(self: &Rc<Core>, ask: Ask<'_>) -> Op {
        let Ask { request, memory, handle, other, on_drop, helpers } = ask;
        let key = self.slots.insert(memory, Some(handle.clone()), other.cloned(), request.changes());
        match (&self.driver, request.entry()) {
            (Driver::Ring(ring), Some(entry)) if matches!(helpers, Helpers::IfNeeded) => {
                ring.push(entry, key)
            }
            _ => Pool::io().submit(key, Work::Request(request), &self.returns, helpers.lane()),
        }
        Op { core: self.clone(), key, on_drop, ended: false }
    }

    /// Waits until `fd` has one of `events` (poll(2)); the result is what it has.
    async fn ready(self: &Rc<Core>, handle: &Rc<Handle>, events: i16) -> Result<u32, i32> {
        let events = u32::from(events as u16);
        let key = self.slots.insert(Memory::None, Some(handle.clone()), None, false);
        let op = Op { core: self.clone(), key, on_drop: OnDrop::Cancel, ended: false };
        let request = Request::Poll { fd: handle.fd(), events };
        match (&self.driver, request.entry()) {
            (Driver::Ring(ring), Some(entry)) => ring.push(entry, key),
            (Driver::Poller(p), _) => {
                if let Some(result) = p.arm(handle.fd(), events, key) {
                    self.slots.complete(key, result);
                }
            }
            (Driver::Ring(_), None) => return Err(libc::EINVAL),
        }
        match op.await.0 {
            e if e < 0 => Err(-e),
            happened => Ok(happened as u32),
        }
    }

    fn cancel(&self, key: usize) {
        match &self.driver {
            Driver::Ring(ring) => ring.cancel(key),
            Driver::Poller(p) => {
                if p.disarm(key) {
                    self.slots.complete(key, -libc::ECANCELED);
                }
            }
        }
    }

    /// Runs `work` on a helper thread of `pool`. The handle stays open until it has ended.
    fn call(
        self: &Rc<Core>,
        pool: &'static Pool,
        handle: Option<&Rc<Handle>>,
        work: Box<dyn FnOnce() + Send>,
    ) -> Op {
        let key = self.slots.insert(Memory::None, handle.cloned(), None, false);
        pool.submit(key, Work::Call(work), &self.returns, None);
        Op { core: self.clone(), key, on_drop: OnDrop::Finish, ended: false }
    }

    /// The value of `work`, computed on a helper thread for blocking calls.
    async fn blocking<T: Send + 'static>(
        self: &Rc<Core>,
        handle: Option<&Rc<Handle>>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let out = Arc::new(Mutex::new(None));
        let slot = out.clone();
        let op = self.call(
            Pool::io(),
            handle,
            Box::new(move || {
                let value = work();
                *lock(&slot) = Some(value);
            }),
        );
        let (result, _) = op.await;
        let value = lock(&out).take();
        value.ok_or_else(|| BlockError::from_errno(if result < 0 { -result } else { BlockError::EIO }))
    }

    /// A random number (splitmix64).
    fn random(&self) -> u64 {
        let s = self.random.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.random.set(s);
        let mut z = s;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn tick(&self) -> bool {
        self.timers.advance(sys::clock(libc::CLOCK_MONOTONIC))
    }

    /// One look at the kernel; whether anything happened.
    fn collect(&self, wait: Option<Option<Duration>>) -> bool {
        let mut batch = std::mem::take(&mut *self.batch.borrow_mut());
        match &self.driver {
            Driver::Ring(ring) => ring.turn(wait, &mut batch),
            Driver::Poller(p) => p.turn(wait, &mut batch),
        }
        // before looking at what came back: a ring of the bell after that look must not be forgotten
        let rung = self.bell.awake();
        self.returns.collect(&mut batch);
        let any = rung || !batch.is_empty();
        for (key, result) in batch.drain(..) {
            self.slots.complete(key, result);
        }
        *self.batch.borrow_mut() = batch;
        any
    }

    fn turn(&self, wait: bool) {
        let fired = self.tick();
        if !wait || fired {
            self.collect(None);
            return;
        }
        if !self.poll.is_zero() && self.poll_for_a_while() {
            return;
        }
        if self.bell.may_sleep() {
            // what the kernel makes of times beyond its own type differs; waking once a day costs nothing
            let day = Duration::from_secs(24 * 3600);
            let limit = self.timers.deadline().map(|at| at.saturating_sub(self.timers.now()).min(day));
            self.collect(Some(limit));
        } else {
            self.collect(None);
        }
        self.tick();
    }

    /// Looks again and again until something completes or the time for that is over.
    fn poll_for_a_while(&self) -> bool {
        let until = self.timers.now() + self.poll;
        loop {
            if self.collect(None) || self.tick() {
                return true;
            }
            if self.timers.now() >= until {
                return false;
            }
            std::hint::spin_loop();
        }
    }
}

impl Drop for Core {
    /// The kernel and the helper threads must have done with all memory before it is freed. Requests to files end by
    /// themselves; those to sockets were cancelled when their futures were dropped.
    fn drop(&mut self) {
        const PATIENCE: Duration = Duration::from_secs(10);
        let end = sys::clock(libc::CLOCK_MONOTONIC) + PATIENCE;
        while self.slots.len() > 0 {
            self.collect(Some(Some(Duration::from_millis(1))));
            if sys::clock(libc::CLOCK_MONOTONIC) > end {
                // a dead disk: the memory must outlive the request
                self.slots.leak();
            }
        }
    }
}

/// A file operation to start; see [`Core::submit`].
struct Ask<'a> {
    request: Request,
    memory: Memory,
    handle: &'a Rc<Handle>,
    other: Option<&'a Rc<Handle>>,
    on_drop: OnDrop,
    helpers: Helpers<'a>,
}

/// Whether an operation goes to a helper thread.
#[derive(Clone, Copy)]
enum Helpers<'a> {
    /// Where the ring cannot do it.
    IfNeeded,
    Always,
    /// Always, among others of which only so many run at once.
    In(&'a Arc<Lane>),
}

impl<'a> Helpers<'a> {
    fn lane(self) -> Option<&'a Arc<Lane>> {
        match self {
            Helpers::In(lane) => Some(lane),
            Helpers::IfNeeded | Helpers::Always => None,
        }
    }
}

struct Os {
    core: Rc<Core>,
}

impl Backend for Os {
    fn now(&self) -> Duration {
        self.core.timers.now()
    }

    fn since_boot(&self) -> Duration {
        sys::clock(libc::CLOCK_BOOTTIME)
    }

    fn wall(&self) -> Duration {
        sys::clock(libc::CLOCK_REALTIME)
    }

    fn random(&self) -> u64 {
        self.core.random()
    }

    fn sleep_until(&self, at: Duration) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(self.core.timers.sleep_until(at))
    }

    fn open<'a>(&'a self, path: &'a Path, mode: OpenMode) -> Io<'a, Rc<dyn File>> {
        Box::pin(open::open(&self.core, path, mode))
    }

    fn remove<'a>(&'a self, path: &'a Path) -> Io<'a> {
        let path = path.to_owned();
        Box::pin(async move {
            self.core.blocking(None, move || std::fs::remove_file(path)).await?.map_err(BlockError::from)
        })
    }

    fn listen<'a>(&'a self, at: &'a Address) -> Io<'a, Rc<dyn Listener>> {
        Box::pin(net::listen(&self.core, at))
    }

    fn connect<'a>(&'a self, to: &'a Address) -> Io<'a, Rc<dyn Stream>> {
        Box::pin(net::connect(&self.core, to))
    }

    fn offload<'a>(&'a self, work: Box<dyn FnOnce() + Send>) -> Io<'a> {
        let op = self.core.call(Pool::cpu(), None, work);
        Box::pin(async move {
            match op.await.0 {
                e if e < 0 => Err(BlockError::from_errno(-e)),
                _ => Ok(()),
            }
        })
    }

    fn pick(&self, _ready: usize) -> usize {
        0
    }

    fn turn(&self, wait: bool) -> Turn {
        self.core.turn(wait);
        Turn::Progress
    }

    fn waker(&self) -> Arc<dyn Fn() + Send + Sync> {
        let bell = self.core.bell.clone();
        Arc::new(move || bell.ring())
    }

    fn sync_directory(&self, path: &Path) -> Result<()> {
        process::sync_directory(path)
    }

    fn boot_id(&self) -> Option<[u8; 16]> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let digits = std::str::from_utf8(&digits).ok()?;
        u128::from_str_radix(digits, 16).ok().filter(|id| *id != 0).map(u128::to_le_bytes)
    }

    fn absolute(&self, path: &Path) -> std::path::PathBuf {
        std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }
}
