//! The only door to the outside: clock, randomness, tasks, files, sockets, helper threads.
//!
//! Two things stand behind the door. The *real* one ([`os`]) is io_uring with a thread-pool fallback; the other is the
//! crate `sim`, in which the same production code runs against a virtual disk, network and clock, repeatable from a
//! seed. Everything above this crate gets an [`Env`] and reaches the world through it alone.
//!
//! What must stay true:
//! * One [`Env`] belongs to one thread (its *home thread*); nothing here is `Send` but [`Mailbox`] senders and wakers.
//! * Buffers are owned by the operation: a dropped future never frees memory that the kernel may still touch.
//! * A write whose future was dropped may still land; [`File::settle`] waits until all such writes have.
//! * No function runs the event loop from inside a task; only [`Executor::run`] does.
//! * With the simulator below, a run depends on nothing but its seed: no real clock, no addresses, no hashing order.

mod backend;
pub mod bugs;
mod executor;
mod file;
mod handoff;
mod net;
pub mod os;
pub mod sync;

/// What [`handoff`] is made of.
mod threads {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
    pub(crate) use std::sync::{Mutex, MutexGuard};
}

pub use backend::{Backend, Turn};
pub use executor::{Executor, Mailbox, MailboxSender, Stuck, TaskGroup, TaskHandle};
pub use file::{Existing, File, FileInfo, FileKind, LockRange, OpenMode, Punch};
pub use net::{Address, Credentials, Family, Listener, Stream};

pub use block::Io;
use block::Result;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// A thread's handle to the outside. Cheap to clone (two `Rc`).
#[derive(Clone)]
pub struct Env {
    backend: Rc<dyn Backend>,
    tasks: executor::Spawner,
}

impl Env {
    pub(crate) fn new(backend: Rc<dyn Backend>, tasks: executor::Spawner) -> Env {
        Env { backend, tasks }
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Monotonic time since some fixed instant. Read once per loop turn, so cheap; fine enough for rates and time-outs.
    pub fn now(&self) -> Duration {
        self.backend.now()
    }

    /// Time since the boot of the host, also while it slept; read at each call. For what must not go on after this process was stopped.
    pub fn since_boot(&self) -> Duration {
        self.backend.since_boot()
    }

    /// Wall-clock time since 1970-01-01 UTC.
    pub fn wall(&self) -> Duration {
        self.backend.wall()
    }

    /// A random number, not for secrets.
    pub fn random(&self) -> u64 {
        self.backend.random()
    }

    /// Completes once [`Env::now`] has advanced by at least `d`.
    pub fn sleep(&self, d: Duration) -> impl Future<Output = ()> + 'static {
        self.backend.sleep_until(self.backend.now().saturating_add(d))
    }

    /// `fut`, or `None` once `d` has passed. The future is dropped then.
    pub async fn timeout<T>(&self, d: Duration, fut: impl Future<Output = T>) -> Option<T> {
        sync::race(fut, self.sleep(d)).await
    }

    /// Starts a task on this thread. Dropping the handle lets the task run on.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + 'static) -> TaskHandle {
        self.tasks.spawn(name, Box::pin(task))
    }

    /// A queue into this thread, to be fed from any thread.
    pub fn mailbox<T: Send + 'static>(&self) -> (MailboxSender<T>, Mailbox<T>) {
        self.tasks.mailbox()
    }

    /// Whether other tasks of this thread could run now.
    pub fn others_are_ready(&self) -> bool {
        executor::any_ready()
    }

    /// Lets other ready tasks run once.
    pub fn yield_now(&self) -> impl Future<Output = ()> + 'static {
        sync::yield_now()
    }

    /// Lets what has completed outside be taken in, and the tasks that it wakes go first. Other than with
    /// [`Env::yield_now`], no number of tasks that do this one after the other keeps requests waiting.
    pub fn next_turn(&self) -> impl Future<Output = ()> + 'static {
        self.tasks.next_turn()
    }

    /// Opens or creates a file or block device.
    pub fn open<'a>(&'a self, path: &'a Path, mode: OpenMode) -> Io<'a, Rc<dyn File>> {
        self.backend.open(path, mode)
    }

    /// Removes a name. Fails with `NotFound` if there is none.
    pub fn remove<'a>(&'a self, path: &'a Path) -> Io<'a> {
        self.backend.remove(path)
    }

    /// Makes durable which names the directory `path` has. Waits in place: for what is done seldom.
    ///
    /// # Errors
    /// The host's, with the path.
    pub fn sync_directory(&self, path: &Path) -> Result<()> {
        self.backend.sync_directory(path)
    }

    /// A name for the same file that does not depend on the working directory as it is now.
    pub fn absolute(&self, path: &Path) -> PathBuf {
        self.backend.absolute(path)
    }

    /// A number that another start of the host has another of, if the host says: what was given to the host's page cache before
    /// is there as long as it is the same. Asked seldom.
    pub fn boot_id(&self) -> Option<[u8; 16]> {
        self.backend.boot_id()
    }

    /// Starts listening. A stale unix socket file in the way is replaced. Port 0 picks one; see [`Listener::address`].
    pub fn listen<'a>(&'a self, at: &'a Address) -> Io<'a, Rc<dyn Listener>> {
        self.backend.listen(at)
    }

    /// Connects to a peer.
    pub fn connect<'a>(&'a self, to: &'a Address) -> Io<'a, Rc<dyn Stream>> {
        self.backend.connect(to)
    }

    /// Runs processor-heavy work (compression, hashing) on a helper thread and gives its result. Work of less than
    /// about 20 µs is better done in place: the hop costs that much. In the simulator it runs in place.
    pub async fn offload<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let slot = std::sync::Arc::new(std::sync::Mutex::new(None));
        let out = slot.clone();
        self.backend
            .offload(Box::new(move || {
                let value = work();
                *out.lock().unwrap_or_else(|e| e.into_inner()) = Some(value);
            }))
            .await?;
        let value = slot.lock().unwrap_or_else(|e| e.into_inner()).take();
        value.ok_or_else(|| block::BlockError::new(block::ErrorKind::Cancelled, "helper thread ended early"))
    }

    /// Whether this is the simulator (for messages only; behaviour must not depend on it).
    pub fn is_simulated(&self) -> bool {
        self.backend.is_simulated()
    }
}
