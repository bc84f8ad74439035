//! The executor: one per thread, tasks that never leave it.
//!
//! What can happen: a task is woken by another task (the usual case: one push on a thread-local queue), by a completion
//! that [`Backend::turn`] collects, or from another thread (mutex-protected queue, then [`Backend::waker`]). What must
//! stay true: a task is queued at most once; a task that ended or was cancelled is never polled again; every future is
//! dropped on this thread, outside of any borrow of the executor's own tables (its destructor may spawn or wake).

use crate::Env;
use crate::backend::{Backend, Turn};
use crate::handoff::{Handoff, Put, lock};
use crate::sync::Notify;
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Polls between two looks at the backend: completions and submissions are batched over at most so many task polls, so
/// that a flood of ready tasks delays I/O by tens of microseconds at the most.
const POLLS_PER_TURN: usize = 128;

thread_local! {
    /// Which executor runs on this thread now (0: none).
    static HERE: Cell<u64> = const { Cell::new(0) };
    static READY: RefCell<VecDeque<Arc<TaskWaker>>> = const { RefCell::new(VecDeque::new()) };
}
static NEXT_EXECUTOR: AtomicU64 = AtomicU64::new(1);

struct Remote {
    executor: u64,
    /// Woken elsewhere. Closed when the executor is gone: keeping its wakers would keep the queue itself alive for ever.
    woken: Handoff<Arc<TaskWaker>>,
    signal: Arc<dyn Fn() + Send + Sync>,
}

/// Whether a task waits for its turn on this thread; the one that asks does not count.
pub(crate) fn any_ready() -> bool {
    READY.with_borrow(|r| !r.is_empty())
}

struct TaskWaker {
    index: usize,
    generation: u64,
    queued: AtomicBool,
    remote: Arc<Remote>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.enqueue();
        }
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.clone().enqueue();
        }
    }
}

impl TaskWaker {
    fn enqueue(self: Arc<Self>) {
        if HERE.get() == self.remote.executor {
            READY.with_borrow_mut(|r| r.push_back(self));
            return;
        }
        let remote = self.remote.clone();
        if remote.woken.put(self) == Put::First {
            (remote.signal)();
        }
    }
}

struct Slot {
    generation: u64,
    group: u32,
    /// `None` while the task is being polled.
    task: Option<Task>,
    state: Rc<TaskState>,
}

struct TaskState {
    name: &'static str,
    done: Cell<bool>,
    cancelled: Cell<bool>,
    ended: Notify,
}

pub(crate) struct Tasks {
    slots: RefCell<Slab<Slot>>,
    generation: Cell<u64>,
    /// Which groups have been ended (index: group); no task starts in those.
    ended_groups: RefCell<Vec<bool>>,
    remote: Arc<Remote>,
    /// Looks at the backend so far, and who waits for the next one.
    turns: Cell<u64>,
    after_turn: RefCell<Vec<Waker>>,
}

/// Starts tasks; part of every [`Env`].
#[derive(Clone)]
pub(crate) struct Spawner {
    tasks: Rc<Tasks>,
    group: u32,
}

impl Spawner {
    pub(crate) fn spawn(&self, name: &'static str, task: Task) -> TaskHandle {
        let tasks = &self.tasks;
        let generation = tasks.generation.get();
        tasks.generation.set(generation + 1);
        let state = Rc::new(TaskState {
            name,
            done: Cell::new(false),
            cancelled: Cell::new(false),
            ended: Notify::new(),
        });
        if tasks.ended_groups.borrow().get(self.group as usize).is_some_and(|ended| *ended) {
            drop(task);
            state.done.set(true);
            return TaskHandle { tasks: Rc::downgrade(tasks), index: usize::MAX, generation, state };
        }
        let waker = {
            let mut slots = tasks.slots.borrow_mut();
            let entry = slots.vacant_entry();
            let index = entry.key();
            let queued = AtomicBool::new(false);
            let waker = Arc::new(TaskWaker { index, generation, queued, remote: tasks.remote.clone() });
            entry.insert(Slot { generation, group: self.group, task: Some(task), state: state.clone() });
            waker
        };
        let index = waker.index;
        waker.wake();
        TaskHandle { tasks: Rc::downgrade(tasks), index, generation, state }
    }

    /// Ends after the executor's next look at the backend: what completed meanwhile is ahead in the queue.
    pub(crate) fn next_turn(&self) -> impl Future<Output = ()> + 'static {
        let tasks = self.tasks.clone();
        let begun = tasks.turns.get();
        poll_fn(move |cx| {
            if tasks.turns.get() != begun {
                return Poll::Ready(());
            }
            tasks.after_turn.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
    }

    pub(crate) fn mailbox<T: Send + 'static>(&self) -> (MailboxSender<T>, Mailbox<T>) {
        let shared =
            Arc::new(Mutex::new(Post { letters: VecDeque::new(), reader: None, senders: 1, closed: false }));
        (MailboxSender { shared: shared.clone() }, Mailbox { shared })
    }
}

/// A running task.
pub struct TaskHandle {
    tasks: Weak<Tasks>,
    index: usize,
    generation: u64,
    state: Rc<TaskState>,
}

impl TaskHandle {
    /// Whether the task has ended (or was cancelled).
    pub fn is_done(&self) -> bool {
        self.state.done.get()
    }

    /// The name it was started with.
    pub fn name(&self) -> &'static str {
        self.state.name
    }

    /// Waits until the task has ended.
    pub async fn join(&self) {
        while !self.state.done.get() {
            self.state.ended.wait().await;
        }
    }

    /// Drops the task's future: at once, or right after the current poll when a task cancels itself.
    pub fn cancel(&self) {
        self.state.cancelled.set(true);
        if let Some(tasks) = self.tasks.upgrade() {
            tasks.end(self.index, self.generation, false);
        }
    }
}

/// All tasks that were started through one [`Executor::env_over`].
pub struct TaskGroup {
    tasks: Weak<Tasks>,
    group: u32,
}

impl TaskGroup {
    /// Drops every task of the group where it waits, in the order of their slots; a task that ends its own group is
    /// dropped after its current poll. What the group starts afterwards is dropped at once.
    pub fn end(&self) {
        let Some(tasks) = self.tasks.upgrade() else { return };
        tasks.ended_groups.borrow_mut()[self.group as usize] = true;
        let members: Vec<(usize, u64, Rc<TaskState>)> = {
            let slots = tasks.slots.borrow();
            let mine = slots.iter().filter(|(_, s)| s.group == self.group);
            mine.map(|(i, s)| (i, s.generation, s.state.clone())).collect()
        };
        for (index, generation, state) in members {
            state.cancelled.set(true);
            tasks.end(index, generation, false);
        }
    }

    /// Names of tasks of the group that have not ended.
    pub fn waiting(&self) -> Vec<&'static str> {
        let Some(tasks) = self.tasks.upgrade() else { return Vec::new() };
        let slots = tasks.slots.borrow();
        slots.iter().filter(|(_, s)| s.group == self.group).map(|(_, s)| s.state.name).collect()
    }
}

impl Tasks {
    /// Removes a task; with `polled` the caller holds its future and drops it itself.
    fn end(&self, index: usize, generation: u64, polled: bool) {
        let removed = {
            let mut slots = self.slots.borrow_mut();
            match slots.get(index) {
                Some(s) if s.generation == generation && (polled || s.task.is_some()) => {
                    Some(slots.remove(index))
                }
                _ => None,
            }
        };
        if let Some(slot) = removed {
            let state = slot.state.clone();
            drop(slot);
            state.done.set(true);
            state.ended.notify_all();
        }
    }

    fn poll(&self, waker: Arc<TaskWaker>) {
        waker.queued.store(false, Ordering::Release);
        let (index, generation) = (waker.index, waker.generation);
        let taken = {
            let mut slots = self.slots.borrow_mut();
            match slots.get_mut(index) {
                Some(s) if s.generation == generation => s.task.take(),
                _ => None,
            }
        };
        let Some(mut task) = taken else { return };
        let waker = Waker::from(waker);
        let ended = task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        if !ended {
            let mut slots = self.slots.borrow_mut();
            if let Some(s) = slots.get_mut(index)
                && !s.state.cancelled.get()
            {
                s.task = Some(task);
                return;
            }
        }
        drop(task);
        self.end(index, generation, true);
    }
}

/// The loop of one thread.
pub struct Executor {
    backend: Rc<dyn Backend>,
    tasks: Rc<Tasks>,
    id: u64,
}

/// The run can never end: nothing is in flight and nobody can wake it. Only the simulator finds out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stuck {
    /// Names of the tasks that still wait.
    pub waiting: Vec<&'static str>,
}

impl Executor {
    /// An executor over `backend`, for the current thread.
    pub fn new(backend: Rc<dyn Backend>) -> Executor {
        let id = NEXT_EXECUTOR.fetch_add(1, Ordering::Relaxed);
        let remote = Arc::new(Remote { executor: id, woken: Handoff::new(), signal: backend.waker() });
        let tasks = Rc::new(Tasks {
            slots: RefCell::new(Slab::new()),
            generation: Cell::new(1),
            ended_groups: RefCell::new(vec![false]),
            remote,
            turns: Cell::new(0),
            after_turn: RefCell::default(),
        });
        Executor { backend, tasks, id }
    }

    /// The handle for code that runs here.
    pub fn env(&self) -> Env {
        Env::new(self.backend.clone(), Spawner { tasks: self.tasks.clone(), group: 0 })
    }

    /// A handle over another backend, whose tasks form a group of their own that can be ended at once: how the
    /// simulator runs several processes, each with its own files and sockets, on one executor, and kills them.
    pub fn env_over(&self, backend: Rc<dyn Backend>) -> (Env, TaskGroup) {
        let group = {
            let mut groups = self.tasks.ended_groups.borrow_mut();
            groups.push(false);
            (groups.len() - 1) as u32
        };
        let env = Env::new(backend, Spawner { tasks: self.tasks.clone(), group });
        (env, TaskGroup { tasks: Rc::downgrade(&self.tasks), group })
    }

    /// Runs until `main` ends, and gives its result. Other tasks may remain; they go on in the next `run`, and are
    /// dropped with the executor.
    ///
    /// # Panics
    /// If the simulator finds the run stuck; see [`Executor::try_run`].
    pub fn run<T: 'static>(&self, main: impl Future<Output = T> + 'static) -> T {
        match self.try_run(main) {
            Ok(v) => v,
            Err(stuck) => panic!("nothing can happen any more; waiting: {:?}", stuck.waiting),
        }
    }

    /// Like [`Executor::run`], but says so when nothing can happen any more.
    pub fn try_run<T: 'static>(&self, main: impl Future<Output = T> + 'static) -> Result<T, Stuck> {
        let _here =
            Entered { remote: &self.tasks.remote, before: HERE.replace(self.id), outer: READY.take() };
        let result = Rc::new(RefCell::new(None));
        let out = result.clone();
        // tasks woken while no executor ran here are in the remote queue
        Spawner { tasks: self.tasks.clone(), group: 0 }.spawn(
            "main",
            Box::pin(async move {
                let value = main.await;
                *out.borrow_mut() = Some(value);
            }),
        );
        loop {
            if let Some(v) = result.borrow_mut().take() {
                return Ok(v);
            }
            if !self.turn(&result) {
                return Err(Stuck { waiting: self.waiting() });
            }
        }
    }

    /// Names of tasks that have not ended.
    pub fn waiting(&self) -> Vec<&'static str> {
        self.tasks.slots.borrow().iter().map(|(_, s)| s.state.name).collect()
    }

    fn turn<T>(&self, result: &RefCell<Option<T>>) -> bool {
        let mut left = POLLS_PER_TURN;
        while left > 0 {
            self.take_remote();
            let ready = READY.with_borrow(|r| r.len());
            if ready == 0 {
                break;
            }
            let pick = if ready == 1 { 0 } else { self.backend.pick(ready).min(ready - 1) };
            let next = READY.with_borrow_mut(|r| if pick == 0 { r.pop_front() } else { r.remove(pick) });
            if let Some(waker) = next {
                self.tasks.poll(waker);
            }
            if result.borrow().is_some() {
                return true;
            }
            left -= 1;
        }
        let waited_for = !self.tasks.after_turn.borrow().is_empty();
        let nothing = READY.with_borrow(|r| r.is_empty()) && !self.tasks.remote.woken.any();
        let turned = self.backend.turn(nothing && !waited_for);
        self.tasks.turns.set(self.tasks.turns.get() + 1);
        if waited_for {
            let wakers = std::mem::take(&mut *self.tasks.after_turn.borrow_mut());
            wakers.into_iter().for_each(Waker::wake);
        }
        turned == Turn::Progress || READY.with_borrow(|r| !r.is_empty())
    }

    fn take_remote(&self) {
        READY.with_borrow_mut(|r| self.tasks.remote.woken.take(r));
    }
}

/// This thread runs an executor; ends also by a panic in a task.
struct Entered<'a> {
    remote: &'a Remote,
    before: u64,
    outer: VecDeque<Arc<TaskWaker>>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        HERE.set(self.before);
        // what is still runnable stays so for the next run
        let left = READY.replace(std::mem::take(&mut self.outer));
        for waker in left {
            let _this_thread_needs_no_bell = self.remote.woken.put(waker);
        }
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        // A dropped future may spawn or wake; repeat until nothing is left.
        while !self.tasks.slots.borrow().is_empty() {
            let slots = std::mem::take(&mut *self.tasks.slots.borrow_mut());
            drop(slots);
        }
        drop(self.tasks.remote.woken.close());
    }
}

struct Post<T> {
    letters: VecDeque<T>,
    reader: Option<Waker>,
    senders: usize,
    closed: bool,
}

/// The sending end of a mailbox; any thread.
pub struct MailboxSender<T> {
    shared: Arc<Mutex<Post<T>>>,
}

impl<T> Clone for MailboxSender<T> {
    fn clone(&self) -> Self {
        lock(&self.shared).senders += 1;
        MailboxSender { shared: self.shared.clone() }
    }
}

impl<T> Drop for MailboxSender<T> {
    fn drop(&mut self) {
        let reader = {
            let mut b = lock(&self.shared);
            b.senders -= 1;
            if b.senders == 0 { b.reader.take() } else { None }
        };
        if let Some(w) = reader {
            w.wake();
        }
    }
}

impl<T> MailboxSender<T> {
    /// Adds a letter. Gives it back if the mailbox is gone.
    pub fn send(&self, letter: T) -> Result<(), T> {
        let reader = {
            let mut b = lock(&self.shared);
            if b.closed {
                return Err(letter);
            }
            b.letters.push_back(letter);
            b.reader.take()
        };
        if let Some(w) = reader {
            w.wake();
        }
        Ok(())
    }
}

/// The receiving end of a mailbox; one thread.
pub struct Mailbox<T> {
    shared: Arc<Mutex<Post<T>>>,
}

impl<T> Mailbox<T> {
    /// The next letter, or `None` when all senders are gone.
    pub async fn recv(&self) -> Option<T> {
        poll_fn(|cx| {
            let mut b = lock(&self.shared);
            match b.letters.pop_front() {
                Some(l) => Poll::Ready(Some(l)),
                None if b.senders == 0 => Poll::Ready(None),
                None => {
                    b.reader = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

impl<T> Drop for Mailbox<T> {
    fn drop(&mut self) {
        let mut b = lock(&self.shared);
        b.closed = true;
        b.letters.clear();
    }
}
