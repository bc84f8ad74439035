//! One running queue: takes requests from the guest's ring, carries them out, answers.
//!
//! One task does everything for a queue. Requests that end at once (most do, when the page cache has the bytes) are answered
//! in the same turn, and the guest is told once for all of a turn, if it wants to be told at all. While there is work the
//! guest need not ring; when there is none the task looks for a little longer, as far as that has paid off lately, and then
//! waits for the bell.
//!
//! What can happen: the guest puts nonsense into its ring (the queue stops and says so on its error descriptor; others go on);
//! memory disappears (the connection ends); the front end stops the queue or changes its memory and bells while requests run.
//! What must stay true: a request, once begun, is never dropped half-way; it is answered exactly once; memory that it uses
//! stays mapped until then.

use super::chain;
use super::device::Device;
use super::inflight::{InflightLog, RingLog};
use super::request::Request;
use block::{BlockError, Io, Result};
use env::os::event::EventFd;
use env::os::shared::GuestMemory;
use env::os::shared::vm_memory::{Bytes, GuestAddress};
use env::sync::Notify;
use futures_util::stream::{FuturesUnordered, Stream as _};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;
use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};

/// Bytes of buffers that one queue may hold: four of the longest pieces, or thousands of small requests.
const BUDGET: u64 = 16 << 20;
/// What a request counts beside its bytes: its future, its bookkeeping.
const REQUEST_COST: u64 = 4096;
/// Requests taken before other tasks of this thread get their turn.
const REQUESTS_PER_TURN: usize = 64;
/// Longest time to look for requests before waiting for the bell. About what a wait and a wake-up cost both sides, so that
/// looking in vain costs no more than twice what waiting at once would have.
const MAX_POLL: Duration = Duration::from_micros(16);
/// Where looking begins once it might have paid off.
const MIN_POLL: Duration = Duration::from_micros(4);
/// The driver does not want to be told (flag of the available ring).
const NO_INTERRUPT: u16 = 1;

/// Bytes of the used ring beside its entries: flags, index, the event's index.
const USED_HEADER: u64 = 6;
/// Bytes of an entry.
const USED_ENTRY: u64 = 8;

/// Where a ring lies: guest addresses and size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Layout {
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// What the front end may change while the queue runs.
pub(super) struct Bells {
    /// Rung for the guest.
    pub(super) call: Option<Rc<EventFd>>,
    /// Rung when the queue has stopped by itself.
    pub(super) error: Option<Rc<EventFd>>,
}

/// A running queue, shared by its task and the session.
pub(super) struct Ring {
    device: Rc<Device>,
    index: usize,
    queue: RefCell<Queue>,
    memory: RefCell<Rc<GuestMemory>>,
    bells: RefCell<Bells>,
    kick: Rc<EventFd>,
    log: RefCell<Option<RingLog>>,
    /// Where the used ring counts as written, if that is to be known.
    used_logged_at: Cell<Option<u64>>,
    stop: Cell<bool>,
    /// What the guest did wrong; nothing is taken from it any more.
    broken: Cell<Option<&'static str>>,
    /// Called when memory turns out to be gone.
    lost_memory: Box<dyn Fn()>,
    nudge: Notify,
    ended: Cell<bool>,
    end: Notify,
}

fn bad_layout(e: impl std::fmt::Display) -> BlockError {
    BlockError::invalid(format!("virtqueue: {e}"))
}

fn new_queue(memory: &GuestMemory, at: Layout, event_idx: bool) -> Result<Queue> {
    let mut queue = Queue::new(at.size).map_err(bad_layout)?;
    queue.try_set_desc_table_address(GuestAddress(at.descriptors)).map_err(bad_layout)?;
    queue.try_set_avail_ring_address(GuestAddress(at.available)).map_err(bad_layout)?;
    queue.try_set_used_ring_address(GuestAddress(at.used)).map_err(bad_layout)?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    if !queue.is_valid(memory.space()) {
        return Err(BlockError::invalid("virtqueue: a ring lies outside the guest's memory"));
    }
    Ok(queue)
}

/// What a queue starts with.
pub(super) struct Start {
    pub(super) layout: Layout,
    /// Position of the next request in the available ring.
    pub(super) base: u16,
    pub(super) event_idx: bool,
    pub(super) memory: Rc<GuestMemory>,
    pub(super) kick: Rc<EventFd>,
    /// Its number, for messages.
    pub(super) index: usize,
    pub(super) bells: Bells,
    pub(super) log: Option<Rc<InflightLog>>,
    /// Guest address of the used ring, if writes to it are to be logged.
    pub(super) used_logged_at: Option<u64>,
    pub(super) lost_memory: Box<dyn Fn()>,
}

impl Ring {
    /// Starts a queue. If there is a log, requests that a daemon before us left open are carried out first.
    pub(super) fn start(device: &Rc<Device>, s: Start) -> Result<Rc<Ring>> {
        let mut queue = new_queue(&s.memory, s.layout, s.event_idx)?;
        let used = queue.used_idx(s.memory.space(), Ordering::Acquire).map_err(bad_layout)?.0;
        queue.set_next_used(used);
        queue.set_next_avail(s.base);
        let mut again = VecDeque::new();
        let mut log = None;
        if let Some(inflight) = s.log {
            let (ring, open) = RingLog::recover(&inflight, s.index as u16, s.layout.size, used)?;
            // whatever was taken was answered, up to the used index, or is open: the front end may not know how many
            queue.set_next_avail(used.wrapping_add(open.len() as u16));
            again.extend(open);
            log = Some(ring);
        }
        let ring = Rc::new(Ring {
            device: device.clone(),
            index: s.index,
            queue: RefCell::new(queue),
            memory: RefCell::new(s.memory),
            bells: RefCell::new(s.bells),
            kick: s.kick,
            log: RefCell::new(log),
            used_logged_at: Cell::new(s.used_logged_at),
            stop: Cell::new(false),
            broken: Cell::new(None),
            lost_memory: s.lost_memory,
            nudge: Notify::new(),
            ended: Cell::new(false),
            end: Notify::new(),
        });
        let task = ring.clone();
        device.env.spawn("vhost-user-blk queue", async move {
            let mut pump = Pump::new(task.clone(), again);
            std::future::poll_fn(|cx| pump.poll(cx)).await;
            drop(pump);
            task.ended.set(true);
            task.end.notify_all();
        });
        Ok(ring)
    }

    /// Takes nothing more from the guest; requests under way go on.
    pub(super) fn stop(&self) {
        self.stop.set(true);
        self.nudge.notify_all();
    }

    /// Waits until a stopped queue's requests have ended; the position of the next request in the available ring.
    pub(super) async fn ended(&self) -> u16 {
        while !self.ended.get() {
            self.end.wait().await;
        }
        self.queue.borrow().next_avail()
    }

    /// Changes what is rung from now on.
    pub(super) fn change_bells(&self, change: impl FnOnce(&mut Bells)) {
        change(&mut self.bells.borrow_mut());
        // a call that the old bell did not take
        if let Some(call) = &self.bells.borrow().call {
            call.ring();
        }
    }

    /// From now on the guest's memory is `memory`, and the ring lies there.
    pub(super) fn remap(&self, memory: &Rc<GuestMemory>, at: Layout) -> Result<()> {
        let mut queue = self.queue.borrow_mut();
        let mut new = new_queue(memory, at, queue.event_idx_enabled())?;
        new.set_next_avail(queue.next_avail());
        new.set_next_used(queue.next_used());
        *queue = new;
        self.memory.replace(memory.clone());
        Ok(())
    }

    /// From now on writes to the used ring are logged as being at this guest address, or not at all.
    pub(super) fn log_used_at(&self, at: Option<u64>) {
        self.used_logged_at.set(at);
    }

    /// The used ring has been written. What of it: its index and one entry, or where it says what it waits for.
    fn mark_used(&self) {
        if let Some(at) = self.used_logged_at.get() {
            self.device.mark_written(at, USED_HEADER + USED_ENTRY * u64::from(self.queue.borrow().size()));
        }
    }

    fn fail(&self, why: &'static str) {
        if self.broken.replace(Some(why)).is_none() {
            eprintln!("liveblkd: export '{}': queue {} stopped: {why}", self.device.options().id, self.index);
            if let Some(error) = &self.bells.borrow().error {
                error.ring();
            }
        }
    }

    /// The next request's number, if there is one.
    fn take_head(&self, memory: &GuestMemory) -> Option<u16> {
        let mut queue = self.queue.borrow_mut();
        let Ok(mut available) = queue.iter(memory.space()) else {
            self.fail("the available ring's index jumped");
            return None;
        };
        available.next().map(|c| c.head_index())
    }

    fn begin(&self, memory: &GuestMemory, head: u16) -> Option<Request> {
        let (table, size) = {
            let queue = self.queue.borrow();
            (queue.desc_table(), queue.size())
        };
        let parsed = chain::walk(memory, table, size, head).and_then(|c| Request::parse(memory, c));
        if self.log.borrow_mut().as_mut().is_some_and(|log| log.begin(head).is_err()) {
            self.fail("a descriptor is past the end of the in-flight log");
            return None;
        }
        parsed.map_err(|why| self.fail(why)).ok()
    }

    fn answer(&self, memory: &GuestMemory, head: u16, written: u32) {
        let log = self.log.borrow();
        let mut queue = self.queue.borrow_mut();
        let noted = log.as_ref().is_none_or(|l| l.answer(head).is_ok());
        let told = noted && queue.add_used(memory.space(), head, written).is_ok();
        let noted = told && log.as_ref().is_none_or(|l| l.answered(head, queue.next_used()).is_ok());
        if !noted {
            self.fail("the used ring cannot be written");
        }
    }

    /// Tells the guest of answers, if it wants to know.
    fn call(&self, memory: &GuestMemory) {
        let mut queue = self.queue.borrow_mut();
        let wanted = if queue.event_idx_enabled() {
            queue.needs_notification(memory.space()).unwrap_or(true)
        } else {
            let flags = memory.space().load::<u16>(GuestAddress(queue.avail_ring()), Ordering::SeqCst);
            flags.map_or(true, |f| u16::from_le(f) & NO_INTERRUPT == 0)
        };
        if wanted && let Some(call) = &self.bells.borrow().call {
            call.ring();
        }
    }
}

/// A request under way.
struct Running {
    head: u16,
    cost: u64,
    work: Pin<Box<dyn Future<Output = u32>>>,
}

impl Future for Running {
    type Output = (u16, u64, u32);
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (head, cost) = (self.head, self.cost);
        self.work.as_mut().poll(cx).map(|written| (head, cost, written))
    }
}

/// How long to look before waiting for the bell.
#[derive(Default)]
struct Looking {
    window: Duration,
    since: Option<Duration>,
    waited_from: Option<Duration>,
}

impl Looking {
    /// Whether to look again rather than wait.
    fn goes_on(&mut self, now: Duration) -> bool {
        let since = *self.since.get_or_insert(now);
        now.saturating_sub(since) < self.window
    }

    /// There was something.
    fn found(&mut self, now: Duration) {
        self.since = None;
        if let Some(from) = self.waited_from.take() {
            // had it been worth to look a little longer?
            self.window = if now.saturating_sub(from) <= MAX_POLL {
                (self.window * 2).clamp(MIN_POLL, MAX_POLL)
            } else {
                self.window / 2
            };
            if self.window < MIN_POLL {
                self.window = Duration::ZERO;
            }
        }
    }

    fn waits(&mut self, now: Duration) {
        self.waited_from.get_or_insert(now);
    }
}

struct Pump {
    ring: Rc<Ring>,
    /// Requests that another daemon left open.
    again: VecDeque<u16>,
    running: FuturesUnordered<Running>,
    cost: u64,
    answers: usize,
    looking: Looking,
    kick: Option<Io<'static>>,
    nudge: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

impl Pump {
    fn new(ring: Rc<Ring>, again: VecDeque<u16>) -> Pump {
        Pump {
            ring,
            again,
            running: FuturesUnordered::new(),
            cost: 0,
            answers: 0,
            looking: Looking::default(),
            kick: None,
            nudge: None,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let memory = self.ring.memory.borrow().clone();
            self.collect(&memory, cx);
            let taken = self.take(&memory, cx);
            if self.answers > 0 {
                self.answers = 0;
                self.ring.mark_used();
                self.ring.call(&memory);
            }
            if memory.is_broken() || self.ring.log.borrow().as_ref().is_some_and(RingLog::is_broken) {
                self.ring.fail("the guest's memory was taken away");
                (self.ring.lost_memory)();
            }
            if self.ring.device.lost_marks() {
                self.ring.fail("the log of written memory is too short or was taken away");
                (self.ring.lost_memory)();
            }
            if self.ring.stop.get() {
                return if self.running.is_empty() { Poll::Ready(()) } else { Poll::Pending };
            }
            if taken == REQUESTS_PER_TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if !self.rest(&memory, cx) {
                return Poll::Pending;
            }
        }
    }

    /// Answers what has ended.
    fn collect(&mut self, memory: &GuestMemory, cx: &mut Context<'_>) {
        while let Poll::Ready(Some((head, cost, written))) = Pin::new(&mut self.running).poll_next(cx) {
            self.cost -= cost;
            self.answers += 1;
            self.ring.answer(memory, head, written);
        }
    }

    fn may_take(&self) -> bool {
        !self.ring.stop.get() && self.ring.broken.get().is_none() && self.cost < BUDGET
    }

    /// Begins what the guest has put into the ring; how many requests.
    fn take(&mut self, memory: &Rc<GuestMemory>, cx: &mut Context<'_>) -> usize {
        let mut taken = 0;
        while taken < REQUESTS_PER_TURN && self.may_take() {
            let next = self.again.pop_front().or_else(|| self.ring.take_head(memory));
            let Some(head) = next else { break };
            taken += 1;
            let Some(request) = self.ring.begin(memory, head) else { break };
            self.start(memory, head, request, cx);
        }
        if taken > 0 {
            self.looking.found(self.ring.device.env.now());
        }
        taken
    }

    fn start(&mut self, memory: &Rc<GuestMemory>, head: u16, request: Request, cx: &mut Context<'_>) {
        let cost = request.cost() + REQUEST_COST;
        let (device, mapped) = (self.ring.device.clone(), memory.clone());
        let mut work: Pin<Box<dyn Future<Output = u32>>> =
            Box::pin(async move { request.run(&device, &mapped).await });
        match work.as_mut().poll(cx) {
            Poll::Ready(written) => {
                self.answers += 1;
                self.ring.answer(memory, head, written);
            }
            Poll::Pending => {
                self.cost += cost;
                self.running.push(Running { head, cost, work });
            }
        }
    }

    /// Nothing is there: looks a little longer or waits. `true`: there may be something again.
    fn rest(&mut self, memory: &GuestMemory, cx: &mut Context<'_>) -> bool {
        // something to wait for that is no request: the session's word
        loop {
            let nudge = self.nudge.get_or_insert_with(|| {
                let ring = self.ring.clone();
                Box::pin(async move { ring.nudge.wait().await })
            });
            if nudge.as_mut().poll(cx).is_pending() {
                break;
            }
            self.nudge = None;
            if self.ring.stop.get() {
                return true;
            }
        }
        if !self.may_take() {
            return false;
        }
        let now = self.ring.device.env.now();
        if self.looking.goes_on(now) {
            cx.waker().wake_by_ref();
            return false;
        }
        let more = self.ring.queue.borrow_mut().enable_notification(memory.space());
        self.ring.mark_used();
        match more {
            Ok(true) => return true,
            Ok(false) => {}
            Err(_) => {
                self.ring.fail("the used ring cannot be written");
                return false;
            }
        }
        self.looking.waits(now);
        let ring = self.ring.clone();
        let kick = self.kick.get_or_insert_with(|| Box::pin(async move { ring.kick.wait().await }));
        match kick.as_mut().poll(cx) {
            Poll::Pending => false,
            Poll::Ready(rung) => {
                self.kick = None;
                // back to looking at the ring, with the bell still on: it is turned off where the driver honours that
                let _ = self.ring.queue.borrow_mut().disable_notification(memory.space());
                if rung.is_err() {
                    self.ring.fail("the queue's bell is no event descriptor");
                }
                rung.is_ok()
            }
        }
    }
}
