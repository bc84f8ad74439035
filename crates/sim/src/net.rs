//! Simulated sockets: names, listeners, and streams that deliver late, in pieces, or not at all.
//!
//! What can happen to bytes: they arrive after a delay drawn from the seed, cut anywhere into segments; a full buffer
//! holds the sender back; a connection is cut at any byte (both ends see a reset), or goes half-open (bytes vanish and
//! nobody is told); a connect is refused, also one that is cut under way. What must stay true: bytes that do arrive are in
//! order, once, and unchanged; after an orderly close all bytes sent before it arrive.

use crate::Rng;
use crate::host::ProcessState;
use crate::machine::Machine;
use block::{BlockError, Data, Io, Result};
use bytes::Bytes;
use env::sync::Notify;
use env::{Address, Credentials, Listener, Stream};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::pending;
use std::path::Path;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// Connections that wait for `accept`; more are refused.
const BACKLOG: usize = 128;
/// First port that a listener on port 0 gets.
const FIRST_PORT: u16 = 32768;

/// How the network behaves.
#[derive(Clone, Debug)]
pub struct NetProfile {
    /// Delay of a segment.
    pub latency: (Duration, Duration),
    /// Largest segment; each is drawn from 1 up to this.
    pub segment: usize,
    /// Bytes under way and unread at most, in one direction.
    pub buffer: usize,
    /// Chance that a connection is cut at a byte drawn from the first [`NetProfile::cut_within`].
    pub cut: f64,
    /// Where cuts come, in bytes of one direction.
    pub cut_within: u64,
    /// Chance that a cut is silent: the connection is half-open.
    pub half_open: f64,
    /// Chance that a connect is refused.
    pub refuse: f64,
    /// No fault from this time on.
    pub faults_end: Duration,
    /// Only connections to an address that ends so are cut or refused ("" for all).
    pub faults_at: String,
}

impl NetProfile {
    /// A network that loses nothing: 5 to 50 µs, large segments.
    pub fn calm() -> NetProfile {
        NetProfile {
            latency: (Duration::from_micros(5), Duration::from_micros(50)),
            segment: 1 << 18,
            buffer: 1 << 20,
            cut: 0.0,
            cut_within: 1 << 16,
            half_open: 0.0,
            refuse: 0.0,
            faults_end: Duration::MAX,
            faults_at: String::new(),
        }
    }

    /// Speed drawn from the seed, from a local socket to a trickle of single bytes; nothing is lost.
    pub fn drawn_calm(rng: &mut Rng) -> NetProfile {
        let mut p = NetProfile::calm();
        p.segment = *rng.choose(&[1 << 18, 1 << 18, 65536, 1448, 200]);
        p.buffer = *rng.choose(&[1 << 20, 1 << 18, 65536, 4096]);
        if rng.chance(0.2) {
            p.latency = (Duration::from_micros(50), Duration::from_millis(20));
        }
        p
    }

    /// As [`NetProfile::drawn_calm`], half of the seeds with cuts.
    pub fn drawn(rng: &mut Rng) -> NetProfile {
        let mut p = NetProfile::drawn_calm(rng);
        if rng.chance(0.5) {
            p.cut = *rng.choose(&[0.1, 0.5]);
            p.cut_within = *rng.choose(&[300, 1 << 14, 1 << 20]);
            p.half_open = *rng.choose(&[0.0, 0.3]);
            p.refuse = *rng.choose(&[0.0, 0.2]);
        }
        p
    }
}

/// Whose socket it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Owner {
    pub(crate) host: String,
    pub(crate) process: u32,
}

/// The network between all hosts of a run; clones are the same.
#[derive(Clone)]
pub struct Net(Rc<Inner>);

struct Inner {
    machine: Machine,
    profile: RefCell<NetProfile>,
    listeners: RefCell<BTreeMap<String, Rc<Listening>>>,
    connections: RefCell<BTreeMap<u64, Weak<Connection>>>,
    /// Connects under way: a cut meets them as well.
    dials: RefCell<Vec<Weak<Dial>>>,
    next: Cell<u64>,
    next_port: Cell<u16>,
}

/// A connect that has not arrived yet.
struct Dial {
    /// The listener's key.
    to: String,
    cut: Cell<bool>,
}

struct Listening {
    owner: Owner,
    backlog: RefCell<VecDeque<Rc<dyn Stream>>>,
    arrived: Notify,
    closed: Cell<bool>,
}

/// One direction of a connection.
struct Pipe {
    arrived: RefCell<VecDeque<Bytes>>,
    /// Bytes sent and not yet taken by the reader.
    held: Cell<usize>,
    sent: Cell<u64>,
    last_delivery: Cell<Duration>,
    cut_at: Option<u64>,
    silent: bool,
    /// The sender will send no more; true at once for it, `ended` tells the reader later.
    closed: Cell<bool>,
    ended: Cell<bool>,
    reader_gone: Cell<bool>,
    reset: Cell<bool>,
    data: Notify,
    room: Notify,
}

struct Connection {
    net: Net,
    id: u64,
    /// The listener's key.
    to: String,
    owners: [Owner; 2],
    /// `pipes[s]` carries what side `s` sends.
    pipes: [Pipe; 2],
}

impl Net {
    /// A network without connections.
    pub fn new(machine: &Machine, profile: NetProfile) -> Net {
        Net(Rc::new(Inner {
            machine: machine.clone(),
            profile: RefCell::new(profile),
            listeners: RefCell::default(),
            connections: RefCell::default(),
            dials: RefCell::default(),
            next: Cell::new(1),
            next_port: Cell::new(FIRST_PORT),
        }))
    }

    /// Changes how new connections behave.
    pub fn set_profile(&self, profile: NetProfile) {
        *self.0.profile.borrow_mut() = profile;
    }

    /// Resets every connection that exists now to an address that ends so; connects under way there are refused.
    pub fn cut(&self, at: &str) {
        for d in self.0.dials.borrow().iter().filter_map(Weak::upgrade).filter(|d| d.to.ends_with(at)) {
            d.cut.set(true);
        }
        self.each(|c| {
            if c.to.ends_with(at) {
                c.reset();
            }
        });
    }

    /// Connections with at least one end open.
    pub fn open_connections(&self) -> usize {
        self.0.connections.borrow().values().filter(|c| c.strong_count() > 0).count()
    }

    fn each(&self, f: impl Fn(&Connection)) {
        let all: Vec<Rc<Connection>> =
            self.0.connections.borrow().values().filter_map(Weak::upgrade).collect();
        all.iter().for_each(|c| f(c));
    }

    pub(crate) fn kill(&self, owner: &Owner) {
        self.each(|c| {
            for side in 0..2 {
                if c.owners[side] == *owner {
                    c.close(side);
                }
            }
        });
        let mine: Vec<Rc<Listening>> =
            self.0.listeners.borrow().values().filter(|l| l.owner == *owner).cloned().collect();
        mine.iter().for_each(|l| l.close());
    }

    /// Removes the name of a unix socket.
    pub(crate) fn unlink(&self, host: &str, path: &Path) -> bool {
        self.0.listeners.borrow_mut().remove(&unix_key(host, path)).is_some()
    }

    pub(crate) fn listen(&self, process: &Rc<ProcessState>, at: &Address) -> Result<Rc<dyn Listener>> {
        let owner = process.owner();
        let (key, address) = match at {
            Address::Unix(p) => (unix_key(&owner.host, p), at.clone()),
            Address::Tcp { host, port, family } => {
                let port = if *port == 0 { self.0.next_port.get() } else { *port };
                self.0.next_port.set(self.0.next_port.get().wrapping_add(1).max(FIRST_PORT));
                (tcp_key(&owner.host, host, port), Address::Tcp { host: host.clone(), port, family: *family })
            }
            Address::Fd(_) | Address::Stdio => {
                return Err(BlockError::unsupported(format!(
                    "{at}: a simulated process inherits no sockets"
                )));
            }
        };
        let mut listeners = self.0.listeners.borrow_mut();
        if listeners.get(&key).is_some_and(|l| !l.closed.get()) {
            return Err(BlockError::from_errno(BlockError::EADDRINUSE));
        }
        let listening = Rc::new(Listening {
            owner,
            backlog: RefCell::default(),
            arrived: Notify::new(),
            closed: Cell::new(false),
        });
        listeners.insert(key, listening.clone());
        Ok(Rc::new(SimListener { listening, address, process: process.clone() }))
    }

    pub(crate) async fn connect(&self, process: &Rc<ProcessState>, to: &Address) -> Result<Rc<dyn Stream>> {
        if process.is_dead() {
            return pending().await;
        }
        let machine = &self.0.machine;
        let mine = process.owner();
        let key = match to {
            Address::Unix(p) => unix_key(&mine.host, p),
            Address::Tcp { host, port, .. } => tcp_key(&mine.host, host, *port),
            Address::Fd(_) | Address::Stdio => {
                return Err(BlockError::unsupported(format!(
                    "{to}: a simulated process inherits no sockets"
                )));
            }
        };
        let profile = self.0.profile.borrow().clone();
        let faulty = machine.now() < profile.faults_end && key.ends_with(profile.faults_at.as_str());
        let (delay, refused) = machine
            .draw(|r| (r.duration(profile.latency.0, profile.latency.1), faulty && r.chance(profile.refuse)));
        let dial = Rc::new(Dial { to: key.clone(), cut: Cell::new(false) });
        {
            let mut dials = self.0.dials.borrow_mut();
            dials.retain(|d| d.strong_count() > 0);
            dials.push(Rc::downgrade(&dial));
        }
        crate::host::sleep(machine, delay).await;
        let refused = refused || dial.cut.get();
        drop(dial);
        let found = self.0.listeners.borrow().get(&key).cloned();
        let listening = match found {
            None if matches!(to, Address::Unix(_)) => return Err(BlockError::from_errno(BlockError::ENOENT)),
            Some(l) if !refused && !l.closed.get() && l.backlog.borrow().len() < BACKLOG => l,
            _ => return Err(BlockError::from_errno(BlockError::ECONNREFUSED)),
        };
        let id = self.0.next.get();
        self.0.next.set(id + 1);
        let pipes = machine.draw(|r| [Pipe::drawn(r, &profile, faulty), Pipe::drawn(r, &profile, faulty)]);
        let connection = Rc::new(Connection {
            net: self.clone(),
            id,
            to: key,
            owners: [mine, listening.owner.clone()],
            pipes,
        });
        machine.note("connect", id, 0);
        self.0.connections.borrow_mut().insert(id, Rc::downgrade(&connection));
        let (a, b) =
            (SimStream { connection: connection.clone(), side: 0 }, SimStream { connection, side: 1 });
        listening.backlog.borrow_mut().push_back(Rc::new(b));
        listening.arrived.notify_one();
        Ok(Rc::new(a))
    }
}

fn unix_key(host: &str, path: &Path) -> String {
    format!("unix {host} {}", path.display())
}

fn tcp_key(mine: &str, host: &str, port: u16) -> String {
    let own = matches!(host, "" | "0.0.0.0" | "::" | "localhost" | "127.0.0.1" | "::1");
    format!("tcp {} {port}", if own { mine } else { host })
}

impl Listening {
    fn close(&self) {
        self.closed.set(true);
        let waiting = std::mem::take(&mut *self.backlog.borrow_mut());
        drop(waiting);
        self.arrived.notify_all();
    }
}

struct SimListener {
    listening: Rc<Listening>,
    address: Address,
    process: Rc<ProcessState>,
}

impl Listener for SimListener {
    fn accept(&self) -> Io<'_, Rc<dyn Stream>> {
        Box::pin(async move {
            loop {
                let wait = self.listening.arrived.wait();
                if self.process.is_dead() {
                    return pending().await;
                }
                if let Some(s) = self.listening.backlog.borrow_mut().pop_front() {
                    return Ok(s);
                }
                wait.await;
            }
        })
    }

    fn address(&self) -> Address {
        self.address.clone()
    }
}

impl Drop for SimListener {
    fn drop(&mut self) {
        self.listening.close();
    }
}

impl Pipe {
    fn drawn(rng: &mut Rng, profile: &NetProfile, faulty: bool) -> Pipe {
        let cut = faulty && rng.chance(profile.cut);
        Pipe {
            arrived: RefCell::default(),
            held: Cell::new(0),
            sent: Cell::new(0),
            last_delivery: Cell::new(Duration::ZERO),
            cut_at: cut.then(|| rng.below(profile.cut_within)),
            silent: cut && rng.chance(profile.half_open),
            closed: Cell::new(false),
            ended: Cell::new(false),
            reader_gone: Cell::new(false),
            reset: Cell::new(false),
            data: Notify::new(),
            room: Notify::new(),
        }
    }

    fn is_cut(&self) -> bool {
        self.cut_at.is_some_and(|at| self.sent.get() >= at)
    }
}

impl Connection {
    fn machine(&self) -> &Machine {
        &self.net.0.machine
    }

    /// Side `side` closes both directions, in order: what it sent still arrives.
    fn close(&self, side: usize) {
        let (out, inward) = (&self.pipes[side], &self.pipes[1 - side]);
        inward.reader_gone.set(true);
        inward.ended.set(true);
        inward.data.notify_all();
        inward.room.notify_all();
        if out.closed.replace(true) {
            return;
        }
        out.room.notify_all();
        if out.silent && out.is_cut() {
            return;
        }
        let net = self.net.clone();
        let id = self.id;
        let at = self.delivery_time(side);
        let weak = self.net.0.connections.borrow().get(&id).cloned();
        net.0.machine.at(at, move || {
            if let Some(c) = weak.and_then(|w| w.upgrade()) {
                c.pipes[side].ended.set(true);
                c.pipes[side].data.notify_all();
                // and the other end's sends fail from now on
                c.pipes[1 - side].room.notify_all();
            }
        });
    }

    fn reset(&self) {
        self.machine().note("reset", self.id, 0);
        for p in &self.pipes {
            p.reset.set(true);
            p.data.notify_all();
            p.room.notify_all();
        }
    }

    /// When a segment sent now arrives: not before the one before it.
    fn delivery_time(&self, side: usize) -> Duration {
        let (low, high) = self.net.0.profile.borrow().latency;
        let pipe = &self.pipes[side];
        let at = (self.machine().now() + self.machine().draw(|r| r.duration(low, high)))
            .max(pipe.last_delivery.get());
        pipe.last_delivery.set(at);
        at
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.net.0.connections.borrow_mut().remove(&self.id);
    }
}

struct SimStream {
    connection: Rc<Connection>,
    side: usize,
}

impl SimStream {
    fn out(&self) -> &Pipe {
        &self.connection.pipes[self.side]
    }

    fn inward(&self) -> &Pipe {
        &self.connection.pipes[1 - self.side]
    }

    /// Sends what fits of the front of `data`.
    fn put(&self, data: &mut Data, room: usize) {
        let c = &self.connection;
        let out = self.out();
        let most = c.net.0.profile.borrow().segment;
        let n = c.machine().draw(|r| r.between(1, data.len().min(room).min(most) as u64)) as usize;
        // large segments most of the time, or a megabyte takes a million draws
        let n = if c.machine().draw(|r| r.chance(0.7)) { data.len().min(room).min(most) } else { n };
        let mut piece = data.split_to(n);
        let left = out.cut_at.map_or(u64::MAX, |at| at.saturating_sub(out.sent.get()));
        let cut = left < n as u64;
        if cut {
            piece = piece.slice(0, left as usize);
        }
        out.sent.set(out.sent.get() + n as u64);
        if !piece.is_empty() {
            out.held.set(out.held.get() + piece.len());
        }
        let (at, side, silent) = (c.delivery_time(self.side), self.side, out.silent);
        let weak = Rc::downgrade(c);
        c.machine().at(at, move || {
            let Some(c) = weak.upgrade() else { return };
            let pipe = &c.pipes[side];
            c.machine().note("deliver", c.id * 2 + side as u64, piece.len() as u64);
            pipe.arrived.borrow_mut().extend(piece.parts().iter().cloned());
            pipe.data.notify_all();
            if cut && !silent {
                c.reset();
            }
        });
    }
}

impl Stream for SimStream {
    fn recv(&self, max: usize) -> Io<'_, Bytes> {
        Box::pin(async move {
            let pipe = self.inward();
            loop {
                let wait = pipe.data.wait();
                if pipe.reset.get() {
                    return Err(BlockError::from_errno(BlockError::ECONNRESET));
                }
                if !pipe.reader_gone.get() {
                    let first = pipe.arrived.borrow_mut().pop_front();
                    if let Some(mut b) = first {
                        if b.len() > max {
                            let rest = b.split_off(max);
                            pipe.arrived.borrow_mut().push_front(rest);
                        }
                        pipe.held.set(pipe.held.get().saturating_sub(b.len()));
                        pipe.room.notify_all();
                        return Ok(b);
                    }
                }
                if pipe.ended.get() {
                    return Ok(Bytes::new());
                }
                wait.await;
            }
        })
    }

    fn send(&self, mut data: Data) -> Io<'_> {
        Box::pin(async move {
            let pipe = self.out();
            while !data.is_empty() {
                let wait = pipe.room.wait();
                if pipe.reset.get() {
                    return Err(BlockError::from_errno(BlockError::ECONNRESET));
                }
                if pipe.closed.get() || pipe.reader_gone.get() {
                    return Err(BlockError::from_errno(BlockError::EPIPE));
                }
                let most = self.connection.net.0.profile.borrow().buffer;
                let room = most.saturating_sub(pipe.held.get());
                if pipe.silent && pipe.is_cut() {
                    // a half-open connection takes what fits in its buffer and then nothing
                    if room == 0 {
                        wait.await;
                        continue;
                    }
                    let n = room.min(data.len());
                    pipe.held.set(pipe.held.get() + n);
                    drop(data.split_to(n));
                } else if room < data.len().min(most / 4) {
                    // as real stacks do: no byte at a time into a nearly full buffer
                    wait.await;
                } else {
                    self.put(&mut data, room);
                }
            }
            Ok(())
        })
    }

    fn shutdown(&self) {
        self.connection.close(self.side);
    }

    fn peer(&self) -> Option<Credentials> {
        Some(Credentials { pid: self.connection.owners[1 - self.side].process, uid: 0 })
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        self.connection.close(self.side);
    }
}
