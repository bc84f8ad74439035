//! The primary's side of a group: the guest's changes, the sessions with the secondaries, checkpoints.
//!
//! What must stay true: a change is durably marked, gets its number and is queued for every peer before it is written here, under a
//! lock of its range: so overlapping changes have one order everywhere (O2), and the bytes sent are those written (O6). A
//! guest waits only for what its level of acknowledgement asks for, and never longer than a dead peer is believed alive.

mod catch_up;
mod checkpoints;
mod connection;
mod external;
mod hand_over;
mod owners;
mod resize;
mod verify;

pub use external::Prepared;
pub(in crate::session) use hand_over::Hurry;
pub use verify::{Verdict, Verify};

use super::Tell;
use super::activity::Activity;
use super::former::{Former, ranges};
use super::link::{MAX_QUEUED, Outgoing};
use super::secure::Connect;
use crate::ack::AckLevel;
use crate::counts::Counts;
use crate::digest::Digest;
use crate::dirty::Dirty;
use crate::history::History;
use crate::lease::Lease;
use crate::primary::{Config, Event, Input, Output, PeerState, Primary, Standing};
use crate::types::{Epoch, Generation, GroupId, Seq};
use crate::wire::{Body, MAX_PAYLOAD, VolumeInfo, crc_of};
use block::{BlockError, Data, ErrorKind, ReqFlags, Result, Span};
use copy::{Owner, RangeLocks};
use env::sync::{Notify, Queue};
use env::{Address, Env, Stream};
use graph::Edge;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Longest range of zeroes in a frame.
const ZERO_PIECE: u64 = 1 << 30;
/// Reasons of failed checkpoints that are remembered.
const MAX_FAILED: usize = 64;

/// A checkpoint that all parties committed.
#[derive(Clone, Debug)]
pub struct CheckpointDone {
    /// Its number.
    pub epoch: Epoch,
    /// What was in the epoch.
    pub digest: Digest,
    /// From the mark to the last answer.
    pub duration: Duration,
}

/// A peer as a manager sees it.
#[derive(Clone, Debug)]
pub struct PeerFacts {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub address: String,
    /// There and back, of the last ping that was answered.
    pub rtt: Option<Duration>,
    /// Age of the oldest change that a failover to it would lose; zero if none.
    pub behind: Duration,
    /// Bytes that wait to be sent.
    pub queued: u64,
    /// Bytes sent in the present session because the peer had missed them.
    pub caught_up: u64,
    /// It is no peer any more.
    pub removed: bool,
}

struct Peer {
    name: String,
    address: Address,
    session: RefCell<Option<Rc<Outgoing>>>,
    stream: RefCell<Option<Rc<dyn Stream>>>,
    /// Of the last ping that was answered.
    rtt: Cell<Option<Duration>>,
    /// Somebody tries to reach it, again and again.
    called: Cell<bool>,
    /// It has said whether it knows a newer owner, or could not be reached.
    asked: Cell<bool>,
    /// Its session was ended so that the next one sends what it lacks as that is then; since, nothing has gone wrong.
    anew: Cell<bool>,
    /// Not a peer any more; its number stays.
    removed: Cell<bool>,
    /// Bytes of what was sent in the present session because it had been missed.
    caught_up: Cell<u64>,
    /// Answers to questions about its content.
    hashes: Queue<(u16, Span, u64)>,
}

/// See above.
pub struct PrimaryGroup {
    env: Env,
    core: RefCell<Primary>,
    disks: Vec<Rc<Edge>>,
    locks: Vec<Rc<RangeLocks>>,
    peers: RefCell<Vec<Rc<Peer>>>,
    activity: Rc<Activity>,
    progress: Notify,
    /// What requests of users wait for, and how many do.
    waits: Counts<(AckLevel, Seq)>,
    failed: RefCell<BTreeMap<Epoch, String>>,
    /// When epochs were marked, newest last; what is older was marked before this began.
    marked: RefCell<BTreeMap<Epoch, Duration>>,
    began: Duration,
    /// Between checkpoints by the clock, if they are wanted.
    interval: Cell<Option<Duration>>,
    retimed: Notify,
    /// A checkpoint is under way for changes that wait to be on a peer's disk.
    asking: Cell<bool>,
    /// The epoch for whose end a manager was asked on behalf of such changes.
    wanted: Cell<Epoch>,
    verified: RefCell<Option<Verify>>,
    secure: RefCell<Option<Connect>>,
    lease: RefCell<Option<Rc<Lease>>>,
    last_error: RefCell<Option<String>>,
    timeout: Cell<Duration>,
    /// The group is to be handed over: so long a full store may hold a session up.
    hurry: Cell<Option<Duration>>,
    /// Users wait: it may have been succeeded, and its peers have not said yet.
    uncertain: Cell<bool>,
    /// Nobody waits any longer for secondaries that are not there.
    ending: Cell<bool>,
    stopped: Cell<bool>,
    stop: Notify,
    tell: Tell,
}

fn volume_index(volume: u16) -> usize {
    usize::from(volume)
}

impl PrimaryGroup {
    /// Begins as primary of `group` over `disks`, with what `activity` remembers.
    ///
    /// # Errors
    /// Volumes that are too long.
    pub fn new(
        env: &Env,
        group: GroupId,
        disks: Vec<Rc<Edge>>,
        activity: Rc<Activity>,
        config: Config,
        timeout: Duration,
        tell: Tell,
    ) -> Result<Rc<PrimaryGroup>> {
        let volumes: Vec<VolumeInfo> = disks.iter().map(|d| VolumeInfo { len: d.len() }).collect();
        let mut dirty = Dirty::new(volumes.iter().map(|v| v.len).collect(), activity.floor());
        // What was written before a crash is newer than every epoch that was ever used.
        let since = activity.used().next();
        for (volume, at) in activity.marks() {
            dirty.mark(since, volume, at)?;
        }
        let core = Primary::new(group, volumes, activity.history(), activity.used(), dirty, config);
        let group = Rc::new(PrimaryGroup {
            env: env.clone(),
            core: RefCell::new(core),
            locks: disks.iter().map(|_| RangeLocks::new()).collect(),
            disks,
            peers: RefCell::default(),
            activity,
            progress: Notify::new(),
            waits: Counts::default(),
            failed: RefCell::default(),
            marked: RefCell::default(),
            began: env.now(),
            interval: Cell::new(None),
            retimed: Notify::new(),
            asking: Cell::new(false),
            wanted: Cell::new(Epoch(0)),
            verified: RefCell::default(),
            secure: RefCell::default(),
            lease: RefCell::default(),
            last_error: RefCell::default(),
            timeout: Cell::new(timeout),
            hurry: Cell::new(None),
            uncertain: Cell::new(false),
            ending: Cell::new(false),
            stopped: Cell::new(false),
            stop: Notify::new(),
            tell,
        });
        let clock = group.clone();
        env.spawn("replication clock", async move { clock.by_the_clock().await });
        Ok(group)
    }

    /// Looks at the state machine.
    pub fn look<T>(&self, f: impl FnOnce(&Primary) -> T) -> T {
        f(&self.core.borrow())
    }

    /// What is known of the peers beyond the state machine, in their order.
    pub fn peer_facts(&self) -> Vec<PeerFacts> {
        let facts = |(i, p): (usize, &Rc<Peer>)| PeerFacts {
            name: p.name.clone(),
            address: p.address.to_string(),
            rtt: p.rtt.get(),
            behind: self.behind(i),
            caught_up: p.caught_up.get(),
            removed: p.removed.get(),
            queued: p.session.borrow().as_ref().map_or(0, |s| s.queued()),
        };
        self.peers.borrow().iter().enumerate().map(facts).collect()
    }

    /// The last thing that went wrong.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.borrow().clone()
    }

    /// How long a silent peer is believed alive.
    pub fn timeout(&self) -> Duration {
        self.timeout.get()
    }

    /// Adds a secondary and keeps trying to reach it.
    pub fn add_peer(self: &Rc<Self>, name: &str, address: Address) {
        let number = self.core.borrow_mut().add_peer();
        let peer = Rc::new(Peer {
            name: name.to_owned(),
            address,
            session: RefCell::default(),
            stream: RefCell::default(),
            rtt: Cell::new(None),
            called: Cell::new(false),
            asked: Cell::new(false),
            anew: Cell::new(false),
            removed: Cell::new(false),
            caught_up: Cell::new(0),
            hashes: Queue::new(),
        });
        self.peers.borrow_mut().push(peer.clone());
        let config = self.look(|c| c.config().clone());
        self.configure(config);
        self.connect(number, peer);
    }

    /// One caller for each peer: of two, each would end the other's session, for a secondary believes the newest. The one that was
    /// refused just now goes on by itself.
    fn connect(self: &Rc<Self>, number: usize, peer: Rc<Peer>) {
        if peer.called.replace(true) && !env::bugs::planted("replication: two call one peer") {
            return;
        }
        let group = self.clone();
        self.env.spawn("replication peer", async move {
            group.keep_connected(number, &peer).await;
            peer.called.set(false);
        });
    }

    /// Tries a peer again that refused. Whether there is one.
    pub fn retry_peer(self: &Rc<Self>, name: &str) -> bool {
        let Some(number) = self.peer_number(name) else { return false };
        let refused = |c: &Primary| c.peers().get(number).is_some_and(|p| p.state == PeerState::Refused);
        let peer = self.peers.borrow().get(number).cloned();
        match peer {
            Some(peer) if self.look(refused) => {
                self.step(Input::Retry(number));
                self.connect(number, peer);
                true
            }
            _ => false,
        }
    }

    /// Nothing is sent to that peer any more, nobody waits for it, and what it misses is not remembered for it. Whether there was one.
    pub fn remove_peer(self: &Rc<Self>, name: &str) -> bool {
        let Some(number) = self.peer_number(name) else { return false };
        let Some(peer) = self.peers.borrow().get(number).cloned() else { return false };
        peer.removed.set(true);
        if let Some(session) = peer.session.borrow().as_ref() {
            let text = "this secondary was removed from the group".to_owned();
            session.push_urgent(&self.look(|c| c.frame(c.last(), c.open_epoch(), Body::Bye { text })));
            session.close();
        }
        self.step(Input::Remove(number));
        self.leaves_behind();
        self.progress.notify_all();
        true
    }

    /// Other settings, from the next change on; its number.
    pub fn configure(self: &Rc<Self>, config: Config) -> Seq {
        self.step(Input::Configure(config));
        self.look(|c| c.last().next())
    }

    /// A peer that says nothing for so long is taken for dead from now on.
    pub fn set_timeout(&self, timeout: Duration) {
        self.timeout.set(timeout);
    }

    /// Sessions that begin from now on are protected so, or not.
    pub fn protect(&self, connect: Option<Connect>) {
        *self.secure.borrow_mut() = connect;
    }

    /// An arbiter knows this side as the owner, and is told who may not take over.
    pub fn owned_by(&self, lease: Option<Rc<Lease>>) {
        *self.lease.borrow_mut() = lease;
    }

    /// Nothing more is answered before the arbiter knows that nobody takes over who did not commit the open epoch: somebody lacks what is
    /// written from now on. (The open one: who is gone may have committed every epoch that was marked.)
    fn leaves_behind(&self) {
        if let Some(lease) = &*self.lease.borrow() {
            lease.need(self.look(Primary::open_epoch));
        }
    }

    /// Another was promoted before a restart of this side: it serves nobody.
    pub fn fence(self: &Rc<Self>, by: Generation) {
        self.step(Input::Fence(by));
    }

    /// What these disks are to one who is to overwrite them. Nothing may be written from now on.
    ///
    /// # Errors
    /// A volume that is too long for a bitmap.
    pub fn former(&self) -> Result<Option<Former>> {
        self.look(|c| {
            let mut history = c.history().clone();
            history.advance(c.open_epoch());
            let since = c.dirty_floor();
            let places = c.dirty_since(since)?.map(|bits| ranges(&bits));
            Ok(places.map(|places| Former { history, since, places }))
        })
    }

    /// Requests that wait for secondaries fail from now on.
    pub(in crate::session) fn let_go(&self) {
        self.ending.set(true);
        self.progress.notify_all();
    }

    /// Ends all sessions; the disks go on unprotected.
    pub fn stop(self: &Rc<Self>) {
        self.stopped.set(true);
        for peer in self.peers.borrow().iter() {
            if let Some(session) = peer.session.borrow().as_ref() {
                let text = "replication was stopped".to_owned();
                session.push_urgent(&self.look(|c| c.frame(c.last(), c.open_epoch(), Body::Bye { text })));
                session.close();
            }
        }
        self.stop.notify_all();
        self.progress.notify_all();
    }

    fn step(self: &Rc<Self>, input: Input<'_>) {
        let mut out = Vec::new();
        let result = self.core.borrow_mut().step(input, &mut out);
        if let Err(e) = result {
            *self.last_error.borrow_mut() = Some(e.to_string());
        }
        out.into_iter().for_each(|o| self.carry_out(o));
    }

    fn session(&self, peer: usize) -> Option<Rc<Outgoing>> {
        self.peers.borrow().get(peer).and_then(|p| p.session.borrow().clone())
    }

    fn carry_out(self: &Rc<Self>, output: Output) {
        match output {
            Output::Send(peer, frame) => {
                if let Some(s) = self.session(peer) {
                    s.push(&frame);
                }
            }
            Output::Close(peer) => {
                if let Some(s) = self.session(peer) {
                    s.close();
                }
            }
            Output::Sync(peer, work) => {
                let (group, session) = (self.clone(), self.session(peer));
                if let Some(p) = self.peers.borrow().get(peer) {
                    p.caught_up.set(0);
                }
                self.env.spawn("replication sync", async move {
                    if let Some(session) = session {
                        group.sync(peer, session, work).await;
                    }
                });
            }
            Output::Progress => self.progress.notify_all(),
            Output::WantCheckpoint if self.look(|c| c.config().external_decision) => {
                (self.tell)("REPLICATION_CHECKPOINT_WANTED", Vec::new());
            }
            Output::WantCheckpoint => {
                let group = self.clone();
                self.env.spawn("replication checkpoint", async move {
                    // its failure is told by events
                    let _ = group.checkpoint(Duration::MAX).await;
                });
            }
            Output::Clean(epoch) => {
                let (group, history) = (self.clone(), self.look(|c| c.history().clone()));
                self.env.spawn("replication clean", async move { group.clean(epoch, history).await });
            }
            Output::Event(event) => self.report(event),
        }
    }

    /// All peers have committed `epoch`. What was written up to it is forgotten only once it is on stable storage here as well: what a
    /// power loss takes from this disk alone must count as different (I8). A write that is still under way here can have been committed
    /// everywhere else, and no flush is for it before it has ended: its mark stays until the next time.
    async fn clean(&self, epoch: Epoch, history: History) {
        let under_way = self.under_way();
        for disk in &self.disks {
            if !env::bugs::planted("replication: forgotten without a flush here")
                && disk.flush().await.is_err()
            {
                return;
            }
        }
        if let Ok(Some(mut dirty)) = self.look(|c| c.dirty_since(epoch))
            && epoch >= self.activity.floor()
        {
            for (volume, at) in under_way {
                if let Some(bits) = dirty.get_mut(volume) {
                    bits.set(at);
                }
            }
            self.activity.clean(epoch, &dirty, history);
        }
    }

    /// Where guests' writes have not ended here: volume and range.
    fn under_way(&self) -> Vec<(usize, Span)> {
        let mut all = Vec::new();
        if env::bugs::planted("replication: what is under way counts as written") {
            return all;
        }
        for (volume, locks) in self.locks.iter().enumerate() {
            locks.each_held(|at, owner| {
                if owner == Owner::Guest {
                    all.push((volume, at));
                }
            });
        }
        all
    }

    fn report(self: &Rc<Self>, event: Event) {
        let name = |p: usize| self.peers.borrow().get(p).map_or_else(String::new, |p| p.name.clone());
        let tell = &self.tell;
        match event {
            Event::PeerState { peer, old, new, reason } => {
                if matches!(new, PeerState::Down | PeerState::Refused) {
                    if old.gets_changes() && self.lease.borrow().is_some() {
                        self.leaves_behind();
                        // with this the others may take over again
                        self.carry_out(Output::WantCheckpoint);
                    }
                    *self.last_error.borrow_mut() = Some(format!("{}: {reason}", name(peer)));
                }
                tell(
                    "REPLICATION_STATE_CHANGE",
                    vec![
                        ("peer", name(peer).into()),
                        ("old", old.name().into()),
                        ("new", new.name().into()),
                        ("reason", reason.into()),
                    ],
                );
            }
            Event::Degraded { since, dirty_bytes } => tell(
                "REPLICATION_DEGRADED",
                vec![("since-seq", since.0.into()), ("dirty-bytes", dirty_bytes.into())],
            ),
            Event::Restored { since } => tell("REPLICATION_RESTORED", vec![("since-seq", since.0.into())]),
            Event::Prepared { epoch } => tell("REPLICATION_PREPARED", vec![("epoch", epoch.0.into())]),
            Event::Checkpoint { epoch, digest } => tell(
                "REPLICATION_CHECKPOINT",
                vec![
                    ("epoch", epoch.0.into()),
                    ("bytes", digest.bytes.into()),
                    ("digest", digest.to_string().into()),
                ],
            ),
            Event::Veto { epoch, peer, reason } => {
                let mut facts = vec![("reason", reason.clone().into())];
                if let Some(peer) = peer {
                    facts.insert(0, ("peer", name(peer).into()));
                }
                if let Some(e) = epoch {
                    facts.insert(0, ("epoch", e.0.into()));
                    let mut failed = self.failed.borrow_mut();
                    failed.insert(e, reason);
                    if failed.len() > MAX_FAILED {
                        failed.pop_first();
                    }
                }
                tell("REPLICATION_CHECKPOINT_VETO", facts);
            }
            Event::Fenced { by } => {
                self.stays_fenced(by);
                tell("REPLICATION_FENCED", vec![("generation", by.0.into())]);
            }
            Event::LeftBehind { generation } => {
                let mine = self.look(|c| c.history().generation());
                tell("REPLICATION_FENCED", vec![("generation", mine.0.into()), ("by", generation.0.into())]);
            }
            Event::SplitBrain { peer } => {
                let peer = peer.map(|p| ("peer", name(p).into()));
                tell("REPLICATION_SPLIT_BRAIN", peer.into_iter().collect());
            }
            Event::BufferThreshold { peer, fill } => tell(
                "REPLICATION_BUFFER_THRESHOLD",
                vec![("peer", name(peer).into()), ("fill", u64::from(fill).into())],
            ),
        }
    }

    // ---- the guest

    /// Reads are local. A fenced primary serves nobody: another one may have written since.
    ///
    /// # Errors
    /// Of the disk; `Io` when fenced.
    pub async fn read(&self, volume: u16, at: Span) -> Result<Data> {
        self.may_serve().await?;
        self.disk(volume)?.read(at).await
    }

    fn unfenced(&self) -> Result<()> {
        match self.look(Primary::fenced) {
            None => Ok(()),
            Some(by) => Err(BlockError::new(
                ErrorKind::Io,
                format!("this side is fenced: generation {by} was promoted elsewhere"),
            )),
        }
    }

    fn disk(&self, volume: u16) -> Result<&Rc<Edge>> {
        self.disks.get(volume_index(volume)).ok_or_else(|| BlockError::invalid("no such volume in the group"))
    }

    /// A guest's write; without data, zeroes.
    ///
    /// # Errors
    /// Of the local disk; of the link under the policy `io-error`; when fenced.
    pub async fn write(
        self: &Rc<Self>,
        volume: u16,
        at: Span,
        data: Option<Data>,
        flags: ReqFlags,
    ) -> Result<()> {
        if at.is_empty() {
            return Ok(());
        }
        self.may_serve().await?;
        let disk = self.disk(volume)?;
        let Some(locks) = self.locks.get(volume_index(volume)) else { return Ok(()) };
        let mut ticket = locks.request(at, Owner::Guest);
        ticket.held().await;
        let seq = loop {
            self.unfenced()?;
            self.room().await;
            self.activity.cover(volume, at).await?;
            // no wait between this look and the number
            if self.activity.covers(volume, at) {
                break self.admit(volume, at, data.as_ref())?;
            }
        };
        let local = match data {
            Some(data) => disk.write(at.start, data, flags).await,
            None => disk.zero(at, ReqFlags { no_fallback: false, ..flags }).await,
        };
        drop(ticket);
        if let Err(e) = local {
            // Nobody knows what is on this disk now: what the peers have may differ. They begin again from their checkpoint.
            self.core.borrow_mut().unsure(volume, at)?;
            self.break_sessions(&format!("a write here failed: {e}"));
            return Err(e);
        }
        let level = self.look(|c| if flags.fua { c.config().flush_level } else { c.config().write_level });
        if level == AckLevel::RemoteDurable {
            self.ask_durable();
        }
        self.done(seq, level).await
    }

    /// Everything completed before is on stable storage here and where the flush level asks for.
    ///
    /// # Errors
    /// As [`PrimaryGroup::write`].
    pub async fn flush(self: &Rc<Self>, volume: u16) -> Result<()> {
        self.may_serve().await?;
        let (seq, level) = self.look(|c| (c.last(), c.config().flush_level));
        if level.is_remote() {
            self.ask_durable();
        }
        self.disk(volume)?.flush().await?;
        self.done(seq, level).await
    }

    fn ask_durable(&self) {
        let flush = self.look(|c| c.frame(c.last(), c.open_epoch(), Body::Flush));
        self.each_session(|s| s.push(&flush));
    }

    fn each_session(&self, f: impl Fn(&Outgoing)) {
        let states: Vec<bool> = self.look(|c| c.peers().iter().map(|p| p.state.gets_changes()).collect());
        for (peer, gets) in self.peers.borrow().iter().zip(states) {
            if gets && let Some(s) = peer.session.borrow().as_ref() {
                f(s);
            }
        }
    }

    /// Waits while too much is queued for a peer. A peer that takes nothing is dropped after the time-out, which ends the wait.
    async fn room(&self) {
        loop {
            let full = {
                let peers = self.peers.borrow();
                let mut sessions =
                    peers.iter().enumerate().filter_map(|(i, p)| Some((i, p.session.borrow().clone()?)));
                sessions.find(|(_, s)| s.queued() > MAX_QUEUED && !s.is_closing())
            };
            let Some((number, session)) = full else { return };
            self.until_queued(number, &session, MAX_QUEUED).await;
        }
    }

    /// Gives the change its numbers and queues it: no wait in here.
    fn admit(&self, volume: u16, at: Span, data: Option<&Data>) -> Result<Seq> {
        let most = if data.is_some() { MAX_PAYLOAD as u64 } else { ZERO_PIECE };
        let mut last = Seq(0);
        for piece in at.pieces(most) {
            let part = data.map(|d| d.slice((piece.start - at.start) as usize, piece.len as usize));
            let crc = part.as_ref().map_or(0, crc_of);
            let (seq, epoch) = self.core.borrow_mut().admit(volume, piece, crc)?;
            let frame = self.look(|c| c.frame(seq, epoch, change(volume, piece, part, crc, false)));
            self.each_session(|s| s.push(&frame));
            last = seq;
        }
        Ok(last)
    }

    async fn done(self: &Rc<Self>, seq: Seq, level: AckLevel) -> Result<()> {
        let mut told = None;
        loop {
            let progress = self.progress.wait();
            if self.stopped.get() {
                return Ok(());
            }
            match self.look(|c| c.standing(seq, level)) {
                Standing::Done => {
                    if self.lease.borrow().is_some() && self.look(Primary::alone) {
                        self.leaves_behind();
                    }
                    return Ok(());
                }
                Standing::Wait if self.ending.get() => {
                    let why = "the daemon ends before enough secondaries have this";
                    return Err(BlockError::new(ErrorKind::Ending, why));
                }
                Standing::Wait => {
                    told.get_or_insert_with(|| Waits::new(self, seq, level));
                    if level == AckLevel::RemoteApplied {
                        self.ask_applied(seq);
                    }
                    progress.await;
                }
                Standing::Fail => {
                    self.unfenced()?;
                    let why = "too few secondaries are connected and the policy is io-error";
                    return Err(BlockError::new(ErrorKind::Io, why));
                }
            }
        }
    }

    /// Under the engine redo a change reaches the peer's disk behind a checkpoint: one is made if a change that got there waits for that.
    fn ask_applied(self: &Rc<Self>, seq: Seq) {
        let only_applied = |c: &Primary| {
            c.wants_checkpoint()
                && c.peers().iter().any(|p| p.progress.written >= seq && p.progress.applied < seq)
        };
        if self.asking.get() || !self.look(only_applied) {
            return;
        }
        if self.look(|c| c.config().external_decision) {
            let open = self.look(Primary::open_epoch);
            if self.wanted.replace(open) != open {
                self.carry_out(Output::WantCheckpoint);
            }
            return;
        }
        self.asking.set(true);
        let group = self.clone();
        self.env.spawn("replication checkpoint", async move {
            // its failure is told by events
            let _ = group.checkpoint(Duration::MAX).await;
            group.asking.set(false);
            group.progress.notify_all();
        });
    }

    fn break_sessions(self: &Rc<Self>, why: &str) {
        *self.last_error.borrow_mut() = Some(why.to_owned());
        for peer in self.peers.borrow().iter() {
            if let Some(s) = peer.stream.borrow().as_ref() {
                s.shutdown();
            }
        }
    }
}

/// A request that waits for secondaries.
struct Waits<'a> {
    group: &'a PrimaryGroup,
    what: (AckLevel, Seq),
}

impl<'a> Waits<'a> {
    fn new(group: &'a PrimaryGroup, seq: Seq, level: AckLevel) -> Waits<'a> {
        let what = (level, seq);
        group.waits.hold(what);
        Waits { group, what }
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.group.waits.release(self.what);
    }
}

fn change(volume: u16, at: Span, data: Option<Data>, crc: u32, catch_up: bool) -> Body {
    match data {
        Some(data) => Body::Write { volume, offset: at.start, data, crc, catch_up, fua: false },
        None => Body::Zero { volume, at, unmap: true, catch_up },
    }
}
