//! `throttle`: requests wait so that all disks of a group together stay within its limits.
//!
//! What can happen: requests of many members come at once, limits change while requests wait, a waiting request is
//! dropped, a member leaves, the graph wants a member quiet. What must stay true: members take turns, and requests of one
//! member and direction go in the order they came; nobody waits for anything but time; while somebody drains a member its
//! requests do not wait at all (they count all the same); nothing is kept of a request that was dropped.

use super::throttle_limits::{Buckets, Config, Direction};
use super::{Given, filter_basics, filter_passes};
use block::{Data, Io, ReqFlags, Span};
use env::Env;
use env::sync::{Notify, OneshotSender, oneshot, race};
use graph::{Edge, Node, NodeDetails};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// A request that waits.
struct Waiting {
    ticket: u64,
    bytes: u64,
    go: OneshotSender<()>,
}

/// A member's requests that wait, by direction, and how many drain it.
#[derive(Default)]
struct Member {
    waiting: [VecDeque<Waiting>; 2],
    drained: usize,
}

/// Disks that share limits.
pub struct ThrottleGroup {
    env: Env,
    buckets: RefCell<Buckets>,
    members: RefCell<BTreeMap<u64, Member>>,
    next: Cell<u64>,
    /// By direction: which member went last, and whether somebody lets requests go when it is time.
    last: [Cell<u64>; 2],
    pumping: [Cell<bool>; 2],
    changed: Notify,
}

fn index(direction: Direction) -> usize {
    match direction {
        Direction::Read => 0,
        Direction::Write => 1,
    }
}

impl ThrottleGroup {
    /// A group without members.
    pub fn new(env: &Env, config: Config) -> Rc<ThrottleGroup> {
        let group = ThrottleGroup {
            env: env.clone(),
            buckets: RefCell::default(),
            members: RefCell::default(),
            next: Cell::new(1),
            last: Default::default(),
            pumping: Default::default(),
            changed: Notify::new(),
        };
        group.configure(config);
        Rc::new(group)
    }

    /// Other limits from now on, also for who waits.
    pub fn configure(&self, config: Config) {
        self.buckets.borrow_mut().configure(config, self.env.now());
        self.changed.notify_all();
    }

    /// The limits.
    pub fn config(&self) -> Config {
        *self.buckets.borrow().config()
    }

    /// How many disks are in the group.
    pub fn members(&self) -> usize {
        self.members.borrow().len()
    }

    fn ticket(&self) -> u64 {
        let n = self.next.get();
        self.next.set(n + 1);
        n
    }

    /// Whether a request may go at once; if so it counts.
    fn goes_now(&self, member: u64, direction: Direction, bytes: u64) -> bool {
        let (members, mut buckets) = (self.members.borrow(), self.buckets.borrow_mut());
        let now = self.env.now();
        let drained = members.get(&member).is_some_and(|m| m.drained > 0);
        let first = || members.values().all(|m| m.waiting[index(direction)].is_empty());
        let goes = drained || (first() && buckets.wait(direction, now).is_zero());
        if goes {
            buckets.account(direction, bytes, now);
            self.last[index(direction)].set(member);
        }
        goes
    }

    /// Whose turn it is: members that are drained first, then the one after who went last.
    fn turn(&self, d: usize) -> Option<(u64, bool)> {
        let members = self.members.borrow();
        let waits = |m: &&(&u64, &Member)| !m.1.waiting[d].is_empty();
        let found = members.iter().filter(|m| m.1.drained > 0).find(|m| waits(&m)).map(|(id, _)| (*id, true));
        let after = members.range(self.last[d].get() + 1..).find(|m| waits(&m));
        found.or_else(|| after.or_else(|| members.iter().find(|m| waits(&m))).map(|(id, _)| (*id, false)))
    }

    /// Lets requests of one direction go, each at its time, until none waits.
    async fn pump(self: Rc<Self>, direction: Direction) {
        let d = index(direction);
        while let Some((member, drained)) = self.turn(d) {
            let now = self.env.now();
            let wait = self.buckets.borrow_mut().wait(direction, now);
            if !drained && !wait.is_zero() {
                let changed = self.changed.wait();
                let _ = race(self.env.sleep(wait), changed).await;
                continue;
            }
            let next = self.members.borrow_mut().get_mut(&member).and_then(|m| m.waiting[d].pop_front());
            if let Some(request) = next {
                self.buckets.borrow_mut().account(direction, request.bytes, now);
                self.last[d].set(member);
                request.go.send(());
            }
        }
        self.pumping[d].set(false);
    }
}

/// A disk's place in its group.
struct Seat {
    group: Rc<ThrottleGroup>,
    id: u64,
}

impl Seat {
    fn take(group: Rc<ThrottleGroup>) -> Rc<Seat> {
        let id = group.ticket();
        group.members.borrow_mut().insert(id, Member::default());
        Rc::new(Seat { group, id })
    }

    /// Waits until a request may go.
    async fn pass(&self, direction: Direction, bytes: u64) {
        if self.group.goes_now(self.id, direction, bytes) {
            return;
        }
        let (go, gone) = oneshot();
        let (ticket, d) = (self.group.ticket(), index(direction));
        if let Some(m) = self.group.members.borrow_mut().get_mut(&self.id) {
            m.waiting[d].push_back(Waiting { ticket, bytes, go });
        }
        // In place before it waits, so that it leaves nothing behind if it is dropped.
        let _place = Place { seat: self, ticket, d };
        if !self.group.pumping[d].replace(true) {
            self.group.env.spawn("throttle", self.group.clone().pump(direction));
        }
        // Nothing comes if the disk left the group meanwhile: then nothing limits it.
        let _ = gone.await;
    }

    fn drain(&self, more: bool) {
        if let Some(m) = self.group.members.borrow_mut().get_mut(&self.id) {
            m.drained = if more { m.drained + 1 } else { m.drained - 1 };
        }
        self.group.changed.notify_all();
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let left = self.group.members.borrow_mut().remove(&self.id);
        drop(left);
        self.group.changed.notify_all();
    }
}

/// A request's place in line.
struct Place<'a> {
    seat: &'a Seat,
    ticket: u64,
    d: usize,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut members = self.seat.group.members.borrow_mut();
        let Some(m) = members.get_mut(&self.seat.id) else { return };
        if let Some(at) = m.waiting[self.d].iter().position(|w| w.ticket == self.ticket) {
            let gone = m.waiting[self.d].remove(at);
            drop(members);
            drop(gone);
            self.seat.group.changed.notify_all();
        }
    }
}

/// While it lives, requests of a disk do not wait.
struct Drained(Rc<Seat>);

impl Drop for Drained {
    fn drop(&mut self) {
        self.0.drain(false);
    }
}

/// The filter.
pub struct Throttle {
    file: Rc<Edge>,
    seat: RefCell<(String, Rc<Seat>)>,
}

impl Throttle {
    /// A filter in front of the child of `file` (an edge of role `Filtered`, named `file`), in `group` of the name `name`.
    pub fn new(file: Rc<Edge>, name: &str, group: Rc<ThrottleGroup>) -> Rc<Throttle> {
        Rc::new(Throttle { file, seat: RefCell::new((name.to_owned(), Seat::take(group))) })
    }

    /// Changes the group. Called with the gates above closed, so nobody waits here.
    pub fn join(&self, name: &str, group: Rc<ThrottleGroup>) {
        let old = self.seat.replace((name.to_owned(), Seat::take(group)));
        drop(old);
    }

    async fn pass(&self, direction: Direction, bytes: u64) {
        let seat = self.seat.borrow().1.clone();
        seat.pass(direction, bytes).await;
    }
}

impl Node for Throttle {
    filter_basics!(file);
    filter_passes!(file: limits, wants, extents, flush, resize, close);

    fn driver(&self) -> &'static str {
        "throttle"
    }
    fn hurry(&self) -> Option<Box<dyn Any>> {
        let seat = self.seat.borrow().1.clone();
        seat.drain(true);
        Some(Box::new(Drained(seat)))
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move {
            self.pass(Direction::Read, at.len).await;
            self.file.read(at).await
        })
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            self.pass(Direction::Write, at.len).await;
            self.file.write(at.start, data, flags).await
        })
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            self.pass(Direction::Write, at.len).await;
            self.file.zero(at, flags).await
        })
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(async move {
            self.pass(Direction::Write, at.len).await;
            self.file.discard(at).await
        })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move {
            let group = format!("{:?}", self.seat.borrow().0);
            Given(vec![("throttle-group".to_owned(), group)]).details(self.driver(), &self.file).await
        })
    }
}
