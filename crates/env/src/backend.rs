//! What stands behind [`Env`](crate::Env): one implementation for the operating system, one for the simulator.

use crate::{Address, File, Io, Listener, OpenMode, Stream};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

/// What [`Backend::turn`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// Something may have become ready (also: nothing did, but the executor asked not to wait).
    Progress,
    /// Nothing is in flight, no timer is set and nobody can wake this thread: it would wait for ever. The real
    /// backend never says this (another thread may always wake it); the simulator says it when a run is stuck.
    Stuck,
}

/// The world below an executor. Object-safe; used by one thread.
pub trait Backend: 'static {
    /// See [`Env::now`](crate::Env::now).
    fn now(&self) -> Duration;
    /// See [`Env::since_boot`](crate::Env::since_boot).
    fn since_boot(&self) -> Duration {
        self.now()
    }
    /// See [`Env::wall`](crate::Env::wall).
    fn wall(&self) -> Duration;
    /// See [`Env::random`](crate::Env::random).
    fn random(&self) -> u64;
    /// Completes when [`Backend::now`] has reached `at`.
    fn sleep_until(&self, at: Duration) -> Pin<Box<dyn Future<Output = ()>>>;
    /// See [`Env::open`](crate::Env::open).
    fn open<'a>(&'a self, path: &'a Path, mode: OpenMode) -> Io<'a, Rc<dyn File>>;
    /// See [`Env::remove`](crate::Env::remove).
    fn remove<'a>(&'a self, path: &'a Path) -> Io<'a>;
    /// See [`Env::listen`](crate::Env::listen).
    fn listen<'a>(&'a self, at: &'a Address) -> Io<'a, Rc<dyn Listener>>;
    /// See [`Env::connect`](crate::Env::connect).
    fn connect<'a>(&'a self, to: &'a Address) -> Io<'a, Rc<dyn Stream>>;
    /// Runs `work` elsewhere; completes after it ran.
    fn offload<'a>(&'a self, work: Box<dyn FnOnce() + Send>) -> Io<'a>;
    /// Which of `ready` runnable tasks (in the order they became ready) to poll next. The real backend says 0; the
    /// simulator draws, so that every order that could happen is tried.
    fn pick(&self, ready: usize) -> usize;
    /// Submits what is queued and collects what is done. With `wait` nothing is runnable: sleeps until a completion,
    /// a timer or a wake-up from another thread. Without, it only looks, and is called about once per batch of polls.
    fn turn(&self, wait: bool) -> Turn;
    /// A handle with which any thread ends a waiting [`Backend::turn`].
    fn waker(&self) -> std::sync::Arc<dyn Fn() + Send + Sync>;
    /// The backend itself, for functions that exist in one kind of world only (signals).
    fn as_any(&self) -> Option<&dyn std::any::Any> {
        None
    }
    /// See [`Env::sync_directory`](crate::Env::sync_directory). A backend without directories has nothing to do.
    fn sync_directory(&self, path: &Path) -> block::Result<()> {
        let _ = path;
        Ok(())
    }
    /// See [`Env::absolute`](crate::Env::absolute).
    fn absolute(&self, path: &Path) -> PathBuf {
        path.to_owned()
    }
    /// See [`Env::boot_id`](crate::Env::boot_id).
    fn boot_id(&self) -> Option<[u8; 16]> {
        None
    }
    /// See [`Env::is_simulated`](crate::Env::is_simulated).
    fn is_simulated(&self) -> bool {
        false
    }
}
