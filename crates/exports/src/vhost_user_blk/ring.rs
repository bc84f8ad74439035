//! One running queue: takes requests from the guest's ring, carries them out, answers.
//!
//! One task does everything for a queue. Requests that end at once (most do, when the page cache has the bytes) are answered
//! in the same turn, and the guest is told once for all of a turn, if it wants to be told at all. While there is work the
//! guest need not ring; when there is none the task looks for a little longer, as far as that has paid off lately, and then
//! waits for the bell.
//!
//! What can happen: the guest puts nonsense into its ring (the queue stops and says so on its error descriptor; others go on);
//! memory disappears (the connection ends); the front end stops the queue or changes its memory and bells while requests run.
//! What must stay true: a request, once begun, is never dropped half-way; it is answered exactly once, here or by a successor; memory that it uses
//! stays mapped until then.

use super::device::Device;
use super::lane::{Basis, Lane, Layout, Opened, Token};
use super::request::Request;
use block::{Io, Result};
use env::os::event::EventFd;
use env::os::shared::GuestMemory;
use env::sync::Notify;
use futures_util::stream::{FuturesUnordered, Stream as _};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

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
    lane: RefCell<Lane>,
    memory: RefCell<Rc<GuestMemory>>,
    bells: RefCell<Bells>,
    kick: Rc<EventFd>,
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

/// What a queue starts with.
pub(super) struct Start {
    /// Whether the ring is a packed one.
    pub(super) packed: bool,
    pub(super) basis: Basis,
    pub(super) memory: Rc<GuestMemory>,
    pub(super) kick: Rc<EventFd>,
    pub(super) bells: Bells,
    /// Guest address of the used ring, if writes to it are to be logged.
    pub(super) used_logged_at: Option<u64>,
    pub(super) lost_memory: Box<dyn Fn()>,
}

impl Ring {
    /// Starts a queue. If there is a log, requests that a daemon before us left open are carried out first.
    pub(super) fn start(device: &Rc<Device>, s: Start) -> Result<Rc<Ring>> {
        let index = usize::from(s.basis.index);
        let (lane, again) = Lane::start(&s.memory, s.packed, s.basis)?;
        let ring = Rc::new(Ring {
            device: device.clone(),
            index,
            lane: RefCell::new(lane),
            memory: RefCell::new(s.memory),
            bells: RefCell::new(s.bells),
            kick: s.kick,
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

    /// Waits until a stopped queue's requests have ended; where the guest and we are, as messages say it.
    pub(super) async fn ended(&self) -> u32 {
        while !self.ended.get() {
            self.end.wait().await;
        }
        self.lane.borrow().base()
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
        self.lane.borrow_mut().remap(memory, at)?;
        self.memory.replace(memory.clone());
        Ok(())
    }

    /// From now on writes to the used ring are logged as being at this guest address, or not at all.
    pub(super) fn log_used_at(&self, at: Option<u64>) {
        self.used_logged_at.set(at);
    }

    /// The ring has been written: answers, or when we want to be told.
    fn mark_used(&self) {
        if let Some(at) = self.used_logged_at.get() {
            let written = self.lane.borrow().written(at);
            written.iter().for_each(|p| self.device.mark_written(p.at, u64::from(p.len)));
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

    /// The next request, if there is one.
    fn next(&self, memory: &GuestMemory) -> Option<Opened> {
        let next = self.lane.borrow_mut().take(memory);
        next.unwrap_or_else(|why| {
            self.fail(why);
            None
        })
    }

    fn begin(&self, memory: &GuestMemory, opened: &Opened) -> Option<(Token, Request)> {
        let begun = self.lane.borrow_mut().begin(memory, opened);
        let parsed = begun.and_then(|(token, chain)| Ok((token, Request::parse(memory, chain)?)));
        parsed.map_err(|why| self.fail(why)).ok()
    }

    /// Nothing `written` at all: the request stays open, for a successor of this daemon.
    fn answer(&self, memory: &GuestMemory, token: Token, written: Option<u32>) {
        if let Some(written) = written
            && self.lane.borrow_mut().answer(memory, token, written).is_none()
        {
            self.fail("the used ring cannot be written");
        }
    }

    /// Tells the guest of answers, if it wants to know.
    fn call(&self, memory: &GuestMemory) {
        let wanted = self.lane.borrow_mut().wants_call(memory);
        if wanted && let Some(call) = &self.bells.borrow().call {
            call.ring();
        }
    }
}

/// A request under way.
struct Running {
    token: Token,
    cost: u64,
    work: Pin<Box<dyn Future<Output = Option<u32>>>>,
}

impl Future for Running {
    type Output = (Token, u64, Option<u32>);
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (token, cost) = (self.token, self.cost);
        self.work.as_mut().poll(cx).map(|written| (token, cost, written))
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
    again: VecDeque<Opened>,
    running: FuturesUnordered<Running>,
    cost: u64,
    answers: usize,
    looking: Looking,
    kick: Option<Io<'static>>,
    nudge: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

impl Pump {
    fn new(ring: Rc<Ring>, again: VecDeque<Opened>) -> Pump {
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
            if memory.is_broken() || self.ring.lane.borrow().log_is_broken() {
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
        while let Poll::Ready(Some((token, cost, written))) = Pin::new(&mut self.running).poll_next(cx) {
            self.cost -= cost;
            self.answers += 1;
            self.ring.answer(memory, token, written);
        }
    }

    fn may_take(&self) -> bool {
        !self.ring.stop.get() && self.ring.broken.get().is_none() && self.cost < BUDGET
    }

    /// Begins what the guest has put into the ring; how many requests.
    fn take(&mut self, memory: &Rc<GuestMemory>, cx: &mut Context<'_>) -> usize {
        let mut taken = 0;
        while taken < REQUESTS_PER_TURN && self.may_take() {
            let next = self.again.pop_front().or_else(|| self.ring.next(memory));
            let Some(opened) = next else { break };
            taken += 1;
            let Some((token, request)) = self.ring.begin(memory, &opened) else { break };
            self.start(memory, token, request, cx);
        }
        if taken > 0 {
            self.looking.found(self.ring.device.env.now());
        }
        taken
    }

    fn start(&mut self, memory: &Rc<GuestMemory>, token: Token, request: Request, cx: &mut Context<'_>) {
        let cost = request.cost() + REQUEST_COST;
        let (device, mapped) = (self.ring.device.clone(), memory.clone());
        let mut work: Pin<Box<dyn Future<Output = Option<u32>>>> =
            Box::pin(async move { request.run(&device, &mapped).await });
        match work.as_mut().poll(cx) {
            Poll::Ready(written) => {
                self.answers += 1;
                self.ring.answer(memory, token, written);
            }
            Poll::Pending => {
                self.cost += cost;
                self.running.push(Running { token, cost, work });
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
        let more = self.ring.lane.borrow_mut().ask_for_bell(memory);
        self.ring.mark_used();
        match more {
            Some(true) => return true,
            Some(false) => {}
            None => {
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
                self.ring.lane.borrow_mut().no_bell(memory);
                if rung.is_err() {
                    self.ring.fail("the queue's bell is no event descriptor");
                }
                rung.is_ok()
            }
        }
    }
}
