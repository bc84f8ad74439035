//! Hosts and the processes on them.
//!
//! A [`Host`] has a disk that outlives its processes. A [`Process`] is what production code runs in: an
//! [`env::Backend`] of its own, so that the machinery knows whose files, locks and sockets are whose. What must stay
//! true: a killed process does nothing any more (its requests never end, its late calls have no effect), its sockets
//! are seen closed or reset by its peers, its locks are free, and its changes in flight land wholly, partly or not.

use crate::faults::{Profile, Rule, Rules};
use crate::file::SimFile;
use crate::image::Image;
use crate::inode::Inode;
use crate::log::Log;
use crate::machine::Machine;
use crate::net::{Net, Owner};
use block::{BlockError, Io};
use env::sync::Notify;
use env::{
    Address, Backend, Env, Executor, Existing, File, FileKind, Listener, OpenMode, Stream, TaskGroup, Turn,
};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::{Future, pending};
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

/// One simulated machine with a disk; clones are the same host.
#[derive(Clone)]
pub struct Host(pub(crate) Rc<HostInner>);

pub(crate) struct HostInner {
    pub(crate) name: String,
    pub(crate) machine: Machine,
    pub(crate) net: Net,
    names: RefCell<BTreeMap<String, Rc<Inode>>>,
    next_inode: Cell<u64>,
    next_process: Cell<u32>,
    next_handle: Cell<u64>,
    pub(crate) profile: RefCell<Profile>,
    rules: RefCell<Rules>,
    /// Hung requests: what to do when they are let go.
    hung: RefCell<Vec<Box<dyn FnOnce()>>>,
    requests: Cell<u64>,
    faults: Cell<u64>,
    /// Names that a power loss may take away again, and those that it may bring back.
    fresh: RefCell<BTreeSet<String>>,
    removed: RefCell<BTreeMap<String, Rc<Inode>>>,
    names_are_lost: Cell<bool>,
    moments: Cell<u64>,
    /// The moment that somebody waits for.
    awaited: Cell<u64>,
    come: Notify,
}

/// What a power loss leaves of what was not made durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    /// Nothing.
    Nothing,
    /// All that had landed.
    All,
    /// Any of it, torn here and there: drawn.
    Drawn,
}

impl Host {
    /// A host with an empty disk. All hosts of a run share `machine` and `net`.
    pub fn new(name: &str, machine: &Machine, net: &Net, profile: Profile) -> Host {
        Host(Rc::new(HostInner {
            name: name.to_owned(),
            machine: machine.clone(),
            net: net.clone(),
            names: RefCell::default(),
            next_inode: Cell::new(1),
            next_process: Cell::new(1),
            next_handle: Cell::new(1),
            profile: RefCell::new(profile),
            rules: RefCell::default(),
            hung: RefCell::default(),
            requests: Cell::new(0),
            faults: Cell::new(0),
            fresh: RefCell::default(),
            removed: RefCell::default(),
            names_are_lost: Cell::new(false),
            moments: Cell::new(0),
            awaited: Cell::new(u64::MAX),
            come: Notify::new(),
        }))
    }

    /// Puts a file on the disk, durable, in place of what has that name.
    pub fn install(&self, path: &str, image: Image) {
        self.install_as(path, FileKind::Regular, image);
    }

    /// Puts a block device (its length is the image's) or another kind of file there.
    pub fn install_as(&self, path: &str, kind: FileKind, image: Image) {
        let inode = Rc::new(Inode::new(self.number(), kind, image));
        self.0.fresh.borrow_mut().remove(path);
        self.0.removed.borrow_mut().remove(path);
        self.0.names.borrow_mut().insert(path.to_owned(), inode);
    }

    fn number(&self) -> u64 {
        let n = self.0.next_inode.get();
        self.0.next_inode.set(n + 1);
        n
    }

    fn inode(&self, path: &str) -> Option<Rc<Inode>> {
        self.0.names.borrow().get(path).cloned()
    }

    /// What readers of the file see now; `None` if there is none.
    pub fn image(&self, path: &str) -> Option<Image> {
        self.inode(path).map(|i| i.with_cache(Image::clone))
    }

    /// What of the file would certainly survive a power loss now.
    pub fn durable_image(&self, path: &str) -> Option<Image> {
        self.inode(path).map(|i| i.durable())
    }

    /// The names on the disk.
    pub fn list(&self) -> Vec<String> {
        self.0.names.borrow().keys().cloned().collect()
    }

    /// Takes all of the file for durable, and records every change from now on.
    pub fn record(&self, path: &str) {
        if let Some(i) = self.inode(path) {
            i.record();
        }
    }

    /// What was recorded since [`Host::record`] (or since the last power loss).
    pub fn log(&self, path: &str) -> Option<Log> {
        self.inode(path).and_then(|i| i.log())
    }

    /// Byte-range locks held on the file, by all its openers.
    pub fn locks_held(&self, path: &str) -> usize {
        self.inode(path).map_or(0, |i| i.locks_held())
    }

    /// Adds a fault for chosen requests.
    pub fn fault(&self, rule: Rule) {
        self.0.rules.borrow_mut().add(rule);
    }

    /// Takes all rules away.
    pub fn clear_faults(&self) {
        self.0.rules.borrow_mut().clear();
    }

    /// Changes how the disk behaves from now on.
    pub fn set_profile(&self, profile: Profile) {
        *self.0.profile.borrow_mut() = profile;
    }

    /// Changes how the disk behaves, in part.
    pub fn adjust(&self, f: impl FnOnce(&mut Profile)) {
        f(&mut self.0.profile.borrow_mut());
    }

    /// Lets requests that hang go on: they end as if nothing had happened, in the order in which they began.
    pub fn release_hung(&self) {
        let hung = std::mem::take(&mut *self.0.hung.borrow_mut());
        self.0.machine.note("release hung", hung.len() as u64, 0);
        hung.into_iter().for_each(|f| f());
    }

    /// How many requests hang.
    pub fn hung(&self) -> usize {
        self.0.hung.borrow().len()
    }

    /// Requests to files so far: what "fail the Nth request" counts.
    pub fn requests(&self) -> u64 {
        self.0.requests.get()
    }

    /// How many requests met a fault so far.
    pub fn faults(&self) -> u64 {
        self.0.faults.get()
    }

    /// Inverts one bit of the file, on the medium and in the cache.
    pub fn rot(&self, path: &str, offset: u64, bit: u8) {
        if let Some(i) = self.inode(path) {
            let mut image = i.with_cache(Image::clone);
            image.flip(offset, bit);
            self.install_as(path, i.kind, image);
        }
    }

    /// Starts a process on this host: the [`Env`] for its code, and the handle to kill it.
    pub fn start(&self, executor: &Executor) -> (Env, Process) {
        let id = self.0.next_process.get();
        self.0.next_process.set(id + 1);
        let state = Rc::new(ProcessState {
            id,
            host: self.clone(),
            dead: Cell::new(false),
            handles: RefCell::default(),
        });
        let (env, group) = executor.env_over(Rc::new(SimBackend { process: state.clone() }));
        self.0.machine.note("start process", u64::from(id), 0);
        (env, Process { state, group })
    }

    /// The power fails: every process in `processes` (all that run on this host) ends, and of what was not made durable
    /// any subset survives. The disk is as it would be found after the reboot.
    pub fn power_loss(&self, processes: &[&Process]) {
        self.power_loss_keeping(processes, Keep::Drawn);
    }

    /// The same, and `keep` says which subset.
    pub fn power_loss_keeping(&self, processes: &[&Process], keep: Keep) {
        self.0.machine.note("power loss", processes.len() as u64, 0);
        self.drop_hung();
        let inodes: Vec<Rc<Inode>> = self.0.names.borrow().values().cloned().collect();
        for i in inodes {
            self.0.machine.draw(|r| i.power_loss(r, keep));
        }
        if self.0.names_are_lost.get() {
            self.lose_names(keep);
        }
        for p in processes {
            p.end(true);
        }
    }

    /// The power fails where the file `path` is kept, and nowhere else: `process` ends, and of what was not made durable in the
    /// file any subset survives. As if the two were on a host of their own.
    pub fn power_loss_at(&self, path: &str, process: &Process) {
        self.0.machine.note("power loss elsewhere", 0, 0);
        if let Some(inode) = self.inode(path) {
            self.0.machine.draw(|r| inode.power_loss(r, Keep::Drawn));
        }
        process.end(true);
    }

    /// From now on a power loss may take new names away, and bring removed ones back.
    pub fn let_names_be_lost(&self) {
        self.0.names_are_lost.set(true);
    }

    /// Of files that were made or removed since their directory was made durable (or the new file itself, which all usual file
    /// systems count as that) nobody knows.
    fn lose_names(&self, keep: Keep) {
        let lost = |_: &str| match keep {
            Keep::Nothing => true,
            Keep::All => false,
            Keep::Drawn => self.0.machine.draw(|r| r.chance(0.5)),
        };
        let (fresh, removed) = (self.0.fresh.take(), self.0.removed.take());
        let mut names = self.0.names.borrow_mut();
        for name in fresh.into_iter().filter(|n| lost(n)) {
            names.remove(&name);
        }
        for (name, inode) in removed.into_iter().filter(|(n, _)| lost(n)) {
            names.entry(name).or_insert(inode);
        }
    }

    /// The names of a file are durable, or all names in a directory.
    pub(crate) fn names_are_durable(&self, which: impl Fn(&str, &Inode) -> bool) {
        let names = self.0.names.borrow();
        self.0.fresh.borrow_mut().retain(|n| !names.get(n).is_some_and(|i| which(n, i)));
        self.0.removed.borrow_mut().retain(|n, i| !which(n, i));
    }

    /// Moments so far: beginnings of requests and removals of files, at each of which a crash is another one.
    pub fn moments(&self) -> u64 {
        self.0.moments.get()
    }

    /// Ends when there have been so many [`Host::moments`].
    pub async fn reach(&self, moment: u64) {
        self.0.awaited.set(moment);
        loop {
            let come = self.0.come.wait();
            if self.0.moments.get() >= moment {
                return;
            }
            come.await;
        }
    }

    fn count_moment(&self) {
        self.0.moments.set(self.0.moments.get() + 1);
        if self.0.moments.get() == self.0.awaited.get() {
            self.0.come.notify_all();
        }
    }

    fn drop_hung(&self) {
        let hung = std::mem::take(&mut *self.0.hung.borrow_mut());
        drop(hung);
    }

    /// The run is over: the disk is empty. What a killed process leaves in memory may hold this for ever.
    pub(crate) fn forget(&self) {
        self.drop_hung();
        self.0.names.take();
        self.0.removed.take();
    }

    pub(crate) fn hang(&self, go_on: impl FnOnce() + 'static) {
        self.0.hung.borrow_mut().push(Box::new(go_on));
    }

    pub(crate) fn count_fault(&self) {
        self.0.faults.set(self.0.faults.get() + 1);
    }

    pub(crate) fn count_request(&self) {
        self.count_moment();
        self.0.requests.set(self.0.requests.get() + 1);
    }

    pub(crate) fn check_rules(&self, path: &str, op: crate::Op) -> Option<crate::Fault> {
        self.0.rules.borrow_mut().check(path, op)
    }
}

pub(crate) struct ProcessState {
    pub(crate) id: u32,
    pub(crate) host: Host,
    dead: Cell<bool>,
    /// Open files, by handle.
    pub(crate) handles: RefCell<BTreeMap<u64, Rc<Inode>>>,
}

impl ProcessState {
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.get()
    }

    pub(crate) fn owner(&self) -> Owner {
        Owner { host: self.host.0.name.clone(), process: self.id }
    }
}

/// A running process.
pub struct Process {
    state: Rc<ProcessState>,
    group: TaskGroup,
}

impl Process {
    /// SIGKILL: ends at once, wherever its tasks are.
    pub fn kill(&self) {
        self.state.host.0.machine.note("kill process", u64::from(self.state.id), 0);
        self.end(false);
    }

    /// Whether it was killed.
    pub fn is_dead(&self) -> bool {
        self.state.is_dead()
    }

    /// Names of its tasks that have not ended.
    pub fn waiting(&self) -> Vec<&'static str> {
        self.group.waiting()
    }

    /// How many of its tasks with this name have not ended.
    pub fn tasks_named(&self, name: &str) -> usize {
        self.group.waiting().iter().filter(|n| **n == name).count()
    }

    /// Files it has open.
    pub fn open_files(&self) -> usize {
        self.state.handles.borrow().len()
    }

    fn end(&self, power_loss: bool) {
        if self.state.dead.replace(true) {
            return;
        }
        let host = &self.state.host;
        let handles = std::mem::take(&mut *self.state.handles.borrow_mut());
        if !power_loss {
            let ids: Vec<u64> = handles.keys().copied().collect();
            // also files whose name is gone
            let named: Vec<Rc<Inode>> = host.0.names.borrow().values().cloned().collect();
            let mut all: BTreeMap<u64, Rc<Inode>> = named.into_iter().map(|i| (i.number, i)).collect();
            all.extend(handles.values().map(|i| (i.number, i.clone())));
            for inode in all.values() {
                host.0.machine.draw(|r| inode.kill(self.state.id, &ids, r));
            }
        }
        host.0.net.kill(&self.state.owner());
        self.group.end();
    }
}

/// The door to the simulated world, one for each process; and one for the executor, whose process is nobody's.
pub struct SimBackend {
    process: Rc<ProcessState>,
}

impl SimBackend {
    /// The backend of an executor itself: time, chance and order of tasks. Its files are `host`'s.
    pub fn root(host: &Host) -> Rc<SimBackend> {
        Rc::new(SimBackend {
            process: Rc::new(ProcessState {
                id: 0,
                host: host.clone(),
                dead: Cell::new(false),
                handles: RefCell::default(),
            }),
        })
    }

    fn machine(&self) -> &Machine {
        &self.process.host.0.machine
    }

    async fn open_file(&self, path: &Path, mode: OpenMode) -> block::Result<Rc<dyn File>> {
        let host = self.process.host.clone();
        let name = path.to_string_lossy().into_owned();
        crate::file::pass(&self.process, &name, crate::Op::Open).await?;
        let existing = host.inode(&name);
        let inode = match (existing, mode.existing) {
            (None, Existing::Open) => return Err(BlockError::from_errno(BlockError::ENOENT)),
            (Some(_), Existing::CreateNew) => return Err(BlockError::from_errno(BlockError::EEXIST)),
            (Some(i), Existing::Open) => i,
            (Some(i), Existing::CreateTruncate) => {
                let id = i.issue(self.process.id, crate::Effect::SetLen(0));
                i.land(id);
                i
            }
            (None, _) => {
                host.install(&name, Image::new());
                host.0.fresh.borrow_mut().insert(name.clone());
                match host.inode(&name) {
                    Some(i) => i,
                    None => return Err(BlockError::from_errno(BlockError::ENOENT)),
                }
            }
        };
        let handle = host.0.next_handle.get();
        host.0.next_handle.set(handle + 1);
        self.process.handles.borrow_mut().insert(handle, inode.clone());
        Ok(Rc::new(SimFile::new(self.process.clone(), inode, name, handle, mode)))
    }
}

/// Dropped while it waits, it takes its timer back.
struct Sleep {
    machine: Machine,
    at: Duration,
    key: Option<(Duration, u64)>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<()> {
        if let Some(key) = self.key.take() {
            self.machine.cancel(key);
        }
        if self.machine.now() >= self.at {
            return std::task::Poll::Ready(());
        }
        let waker = cx.waker().clone();
        self.key = Some(self.machine.at(self.at, move || waker.wake()));
        std::task::Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            self.machine.cancel(key);
        }
    }
}

impl Backend for SimBackend {
    fn now(&self) -> Duration {
        self.machine().now()
    }

    fn wall(&self) -> Duration {
        self.machine().wall()
    }

    fn random(&self) -> u64 {
        self.machine().draw(crate::Rng::draw)
    }

    fn sleep_until(&self, at: Duration) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(Sleep { machine: self.machine().clone(), at, key: None })
    }

    fn open<'a>(&'a self, path: &'a Path, mode: OpenMode) -> Io<'a, Rc<dyn File>> {
        Box::pin(self.open_file(path, mode))
    }

    fn remove<'a>(&'a self, path: &'a Path) -> Io<'a> {
        Box::pin(async move {
            if self.process.is_dead() {
                return pending().await;
            }
            let name = path.to_string_lossy().into_owned();
            let host = &self.process.host.0;
            self.process.host.count_moment();
            let inode = host.names.borrow_mut().remove(&name);
            if let Some(inode) = inode {
                // one that was never durable does not come back
                if !host.fresh.borrow_mut().remove(&name) {
                    host.removed.borrow_mut().insert(name, inode);
                }
                return Ok(());
            }
            let found = host.net.unlink(&host.name, path);
            if found { Ok(()) } else { Err(BlockError::from_errno(BlockError::ENOENT)) }
        })
    }

    fn sync_directory(&self, path: &Path) -> block::Result<()> {
        if !self.process.is_dead() {
            self.process.host.names_are_durable(|name, _| Path::new(name).parent() == Some(path));
        }
        Ok(())
    }

    fn listen<'a>(&'a self, at: &'a Address) -> Io<'a, Rc<dyn Listener>> {
        Box::pin(async move { self.process.host.0.net.listen(&self.process, at) })
    }

    fn connect<'a>(&'a self, to: &'a Address) -> Io<'a, Rc<dyn Stream>> {
        Box::pin(async move { self.process.host.0.net.connect(&self.process, to).await })
    }

    fn offload<'a>(&'a self, work: Box<dyn FnOnce() + Send>) -> Io<'a> {
        Box::pin(async move {
            if self.process.is_dead() {
                return pending().await;
            }
            let (low, high) = (Duration::from_micros(5), Duration::from_millis(1));
            let machine = self.machine();
            let delay = machine.draw(|r| r.duration(low, high));
            sleep(machine, delay).await;
            work();
            Ok(())
        })
    }

    fn pick(&self, ready: usize) -> usize {
        self.machine().pick(ready)
    }

    fn turn(&self, wait: bool) -> Turn {
        self.machine().turn(wait)
    }

    fn waker(&self) -> std::sync::Arc<dyn Fn() + Send + Sync> {
        // nobody else is there: whatever wakes does so from inside a turn
        std::sync::Arc::new(|| {})
    }

    fn is_simulated(&self) -> bool {
        true
    }
}

/// Completes after `d` of virtual time.
pub(crate) fn sleep(machine: &Machine, d: Duration) -> impl Future<Output = ()> + use<> {
    Sleep { machine: machine.clone(), at: machine.now() + d, key: None }
}
