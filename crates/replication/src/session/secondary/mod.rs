//! The secondary's side of a group: takes connections, does what the state machine says, serves the view, takes over.
//!
//! What must stay true: frames and their consequences are worked off one after the other, over all connections; a promotion stands in
//! the same line, so nothing of an older generation is under way when it is done (I7, X3). Stable storage is waited for beside it.

mod hardening;
mod promotion;

pub use promotion::{Failover, TakeOver};

use super::activity::Activity;
use super::former::{Former, doubt};
use super::secure::Accept;
use super::{DEFAULT_TIMEOUT, RECV, Tell};
use crate::history::{History, Relation};
use crate::lease::Lease;
use crate::secondary::{Input, Output, Secondary, SessionId};
use crate::store::{Change, Engine, Hold, Role, Store, Usage};
use crate::types::{Epoch, Generation, Seq};
use crate::wire::{Body, Decoder, Doubt, Frame, HandOver, VolumeInfo};
use block::{BlockError, Data, Result, Span};
use drivers::filters::replication::Stage;
use env::sync::{Notify, Queue, Semaphore, race};
use env::{Env, Listener, Stream};
use hardening::Pass;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// A connection that says nothing for so long is closed.
const SILENCE: Duration = Duration::from_secs(30);
/// Connections at once: the primary's, one that it has given up, and a few that do not belong here.
const MAX_CONNECTIONS: usize = 8;
/// Before a failed background pass is tried again.
const RETRY: Duration = Duration::from_secs(1);

struct Connection {
    out: Queue<Data>,
    closing: Cell<bool>,
    stream: Rc<dyn Stream>,
    /// Bytes of changes received.
    received: Cell<u64>,
}

/// See above.
pub struct SecondaryGroup {
    env: Env,
    store: Rc<Store>,
    core: RefCell<Secondary>,
    connections: RefCell<BTreeMap<SessionId, Rc<Connection>>>,
    next: Cell<SessionId>,
    /// One thing at a time.
    line: Semaphore,
    /// A session that wants what it has sent, up to this number, on stable storage.
    asked: Cell<Option<(SessionId, Seq)>>,
    /// What became durable, and is not told in the line yet.
    passes: RefCell<VecDeque<Pass>>,
    passed: Notify,
    stopped: Cell<bool>,
    stop: Notify,
    listening: Cell<bool>,
    /// Where, as others are told.
    place: RefCell<Option<String>>,
    secure: RefCell<Option<Accept>>,
    lease: RefCell<Option<Rc<Lease>>>,
    /// Connections that have not proved yet who they are.
    entering: Cell<usize>,
    stage: Cell<Stage>,
    last_error: RefCell<Option<String>>,
    failover: RefCell<Option<Failover>>,
    /// When the last checkpoint was committed.
    committed: Cell<Option<Duration>>,
    merged: Notify,
    /// Where a promoted side remembers what was written since.
    record: PathBuf,
    activity: RefCell<Option<Rc<Activity>>>,
    /// Own writes fail with this.
    refuses_own: RefCell<Option<String>>,
    /// Until the first checkpoint: what the disks were.
    former: RefCell<Option<Former>>,
    /// The record of that owner: places are in it before they are overwritten, so that it stays true across crashes.
    owners: RefCell<Option<Rc<Activity>>>,
    /// Called when what users see has another length.
    resized: RefCell<Option<Rc<dyn Fn()>>>,
    /// What the primary gave when it handed the group over to this side.
    handed: RefCell<Option<HandOver>>,
    tell: Tell,
}

impl SecondaryGroup {
    /// Over an open store. [`SecondaryGroup::serve`] lets primaries in. After a promotion, the file `record` remembers what was written.
    pub fn new(env: &Env, store: Rc<Store>, record: PathBuf, tell: Tell) -> Rc<SecondaryGroup> {
        let volumes = store.lens().into_iter().map(|len| VolumeInfo { len }).collect();
        let promoted = store.role() != Role::Secondary;
        let mut core = Secondary::new(store.group(), volumes, store.highest(), store.history(), promoted);
        core.disks_are(store.disk_lens());
        let group = Rc::new(SecondaryGroup {
            env: env.clone(),
            core: RefCell::new(core),
            connections: RefCell::default(),
            next: Cell::new(1),
            line: Semaphore::new(1),
            asked: Cell::new(None),
            passes: RefCell::default(),
            passed: Notify::new(),
            stopped: Cell::new(false),
            stop: Notify::new(),
            listening: Cell::new(false),
            place: RefCell::default(),
            secure: RefCell::default(),
            lease: RefCell::default(),
            entering: Cell::new(0),
            stage: Cell::new(match store.role() {
                Role::Secondary => Stage::Running,
                Role::Promoted => Stage::Failover,
                Role::Done => Stage::Done,
            }),
            last_error: RefCell::default(),
            failover: RefCell::default(),
            committed: Cell::new(None),
            merged: Notify::new(),
            record,
            activity: RefCell::default(),
            refuses_own: RefCell::default(),
            former: RefCell::default(),
            owners: RefCell::default(),
            resized: RefCell::default(),
            handed: RefCell::default(),
            tell,
            store,
        });
        let tidy = group.clone();
        group.env.spawn("replication store", async move { tidy.background().await });
        let hardening = group.clone();
        group.env.spawn("replication flush", async move { hardening.keep_hardening().await });
        group
    }

    /// Takes connections until the group is stopped.
    pub fn serve(self: &Rc<Self>, listener: Rc<dyn Listener>) {
        let group = self.clone();
        self.listening.set(true);
        *self.place.borrow_mut() = Some(listener.address().to_string());
        self.env.spawn("replication listener", async move {
            group.accept_all(listener).await;
            // whoever waits to listen at the same place
            group.listening.set(false);
            group.stop.notify_all();
        });
    }

    async fn accept_all(self: &Rc<Self>, listener: Rc<dyn Listener>) {
        let group = self;
        loop {
            let stop = group.stop.wait();
            if group.stopped.get() {
                return;
            }
            match race(listener.accept(), stop).await {
                // for whoever listens here next
                Some(Ok(stream)) if group.stopped.get() => stream.shutdown(),
                Some(Ok(stream))
                    if group.connections.borrow().len() + group.entering.get() < MAX_CONNECTIONS =>
                {
                    group.enters(stream);
                }
                Some(Ok(stream)) => stream.shutdown(),
                Some(Err(e)) => {
                    *group.last_error.borrow_mut() = Some(format!("accepting a primary: {e}"));
                    group.env.sleep(RETRY).await;
                }
                None => return,
            }
        }
    }

    /// No more connections, and others may listen where this did.
    pub async fn stop_listening(&self) {
        self.stop();
        loop {
            let changed = self.stop.wait();
            if !self.listening.get() {
                return;
            }
            changed.await;
        }
    }

    /// No more connections.
    pub fn stop(&self) {
        self.stopped.set(true);
        self.stop.notify_all();
        self.merged.notify_all();
        self.store.work.notify_all();
        self.store.to_harden.notify_all();
        self.connections.borrow().values().for_each(|c| c.stream.shutdown());
    }

    // ---- what users ask for

    /// Where the image comes from.
    pub fn history(&self) -> History {
        self.store.history()
    }

    /// Length of a volume, as users see it.
    pub fn len(&self, volume: u16) -> u64 {
        self.store.lens().get(usize::from(volume)).copied().unwrap_or(0)
    }

    /// From now on `told` is called when what users see has another length.
    pub fn when_resized(&self, told: Rc<dyn Fn()>) {
        *self.resized.borrow_mut() = Some(told);
    }

    /// What users see may have had other lengths.
    pub(super) fn tell_lengths(&self, before: &[u64]) {
        let told = self.resized.borrow().clone().filter(|_| self.store.lens() != before);
        told.into_iter().for_each(|told| told());
    }

    /// QEMU's stage.
    pub fn stage(&self) -> Stage {
        self.stage.get()
    }

    /// Whether a primary is connected.
    pub fn is_connected(&self) -> bool {
        self.core.borrow().session().is_some()
    }

    /// Highest generation seen.
    pub fn generation(&self) -> Generation {
        self.core.borrow().highest()
    }

    /// The last change received in the session, and bytes of the open epoch.
    pub fn received(&self) -> (Seq, u64) {
        self.core.borrow().received()
    }

    /// Figures of the store.
    pub fn usage(&self) -> Usage {
        self.store.usage()
    }

    /// The checkpoints that can be failed over to, oldest first.
    pub fn checkpoints(&self) -> Vec<Epoch> {
        match self.store.role() {
            Role::Secondary => self.store.checkpoints(),
            Role::Promoted | Role::Done => Vec::new(),
        }
    }

    /// Keeps a checkpoint readable; see [`Store::hold`].
    ///
    /// # Errors
    /// There is no such checkpoint here; this side has taken over.
    pub fn hold(&self, epoch: Option<Epoch>) -> Result<Hold> {
        self.store.hold(epoch)
    }

    /// The engine.
    pub fn engine(&self) -> Engine {
        self.store.engine()
    }

    /// The last thing that went wrong.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.borrow().clone()
    }

    /// The last failover.
    pub fn last_failover(&self) -> Option<Failover> {
        self.failover.borrow().clone()
    }

    /// How long ago the last checkpoint was committed, if that was in this process.
    pub fn age(&self) -> Option<Duration> {
        self.committed.get().map(|at| self.env.now().saturating_sub(at))
    }

    /// Own writes fail from now on: who still writes here has not noticed that the group was handed over.
    pub fn refuse_own_writes(&self, why: &str) {
        *self.refuses_own.borrow_mut() = Some(why.to_owned());
    }

    /// The disks were an owner's, and hold no checkpoint of another yet; what the owner's record was, if it can be read. To be said
    /// before anybody is let in.
    pub fn follows(&self, former: Former, record: Option<Rc<Activity>>) {
        self.core.borrow_mut().was_owner();
        *self.former.borrow_mut() = Some(former);
        *self.owners.borrow_mut() = record;
    }

    /// Why own writes fail, if they do.
    pub fn refuses_own(&self) -> Option<String> {
        self.refuses_own.borrow().clone()
    }

    /// What a promoted side remembers of what was written since.
    pub fn activity(&self) -> Option<Rc<Activity>> {
        self.activity.borrow().clone()
    }

    /// Reads the view.
    ///
    /// # Errors
    /// Of the store or a disk; nothing was ever committed here.
    pub async fn read(&self, volume: u16, at: Span) -> Result<Data> {
        self.synchronized()?;
        self.store.read(volume, at).await
    }

    /// A write of this side's user; without data, zeroes.
    ///
    /// # Errors
    /// As [`SecondaryGroup::read`]; `NoSpace`.
    pub async fn write(&self, volume: u16, at: Span, data: Data, fua: bool) -> Result<()> {
        self.synchronized()?;
        if let Some(why) = self.refuses_own.borrow().as_ref() {
            return Err(BlockError::new(block::ErrorKind::Io, why.clone()));
        }
        let activity = self.activity.borrow().clone();
        if let Some(activity) = activity {
            activity.cover(volume, at).await?;
        }
        self.store.own_write(volume, at, data).await?;
        if fua { self.store.own_flush().await } else { Ok(()) }
    }

    /// Flushes this side's own writes.
    ///
    /// # Errors
    /// Of the store or a disk.
    pub async fn flush(&self) -> Result<()> {
        self.store.own_flush().await
    }

    /// Before the first checkpoint there is nothing that could be shown: the disks hold what they held before.
    fn synchronized(&self) -> Result<()> {
        let shown = env::bugs::planted("replication: a disk is shown before its first checkpoint");
        if shown || self.core.borrow().history().now().is_some() {
            return Ok(());
        }
        Err(BlockError::new(
            block::ErrorKind::Io,
            "this secondary has never been synchronized with a primary",
        ))
    }

    // ---- connections

    /// An arbiter's word is needed to take over.
    pub fn owned_by(&self, lease: Option<Rc<Lease>>) {
        *self.lease.borrow_mut() = lease;
    }

    /// Connections that begin from now on are protected so, or not.
    pub fn protect(&self, accept: Option<Accept>) {
        *self.secure.borrow_mut() = accept;
    }

    /// Lets a connection in, after it has proved who it is if that is wanted.
    fn enters(self: &Rc<Self>, stream: Rc<dyn Stream>) {
        let Some(secure) = self.secure.borrow().clone() else { return self.connected(stream) };
        self.entering.set(self.entering.get() + 1);
        let group = self.clone();
        self.env.spawn("replication entry", async move {
            let plain = stream.clone();
            match group.env.timeout(DEFAULT_TIMEOUT, secure(stream)).await {
                Some(Ok(stream)) if !group.stopped.get() => group.connected(stream),
                Some(Err(e)) => {
                    *group.last_error.borrow_mut() = Some(format!("TLS: {e}"));
                    plain.shutdown();
                }
                _ => plain.shutdown(),
            }
            group.entering.set(group.entering.get() - 1);
        });
    }

    fn connected(self: &Rc<Self>, stream: Rc<dyn Stream>) {
        let id = self.next.get();
        self.next.set(id + 1);
        let connection = Rc::new(Connection {
            out: Queue::new(),
            closing: Cell::new(false),
            stream,
            received: Cell::new(0),
        });
        self.connections.borrow_mut().insert(id, connection.clone());
        let (sender, env) = (connection.clone(), self.env.clone());
        self.env.spawn("replication answers", async move {
            while let Some(mut data) = sender.out.pop().await {
                while let Some(more) = sender.out.try_pop() {
                    data.append(more);
                }
                let sent = env.timeout(DEFAULT_TIMEOUT, sender.stream.send(data)).await;
                if !matches!(sent, Some(Ok(()))) {
                    break;
                }
            }
            sender.stream.shutdown();
        });
        let group = self.clone();
        self.env.spawn("replication session", async move {
            if let Err(e) = group.listen_to(id, &connection).await {
                *group.last_error.borrow_mut() = Some(e.to_string());
                let text = e.to_string();
                let frame = Frame {
                    generation: group.generation(),
                    seq: Seq(0),
                    epoch: Epoch(0),
                    body: Body::Bye { text },
                };
                connection.out.push(frame.encode());
            }
            connection.out.close();
            group.connections.borrow_mut().remove(&id);
            let was = group.core.borrow().session() == Some(id);
            let _turn = group.line.acquire(1).await;
            group.step(Input::Gone(id)).await;
            if was {
                group.state("connected", "detached");
            }
        });
    }

    fn state(&self, old: &str, new: &str) {
        (self.tell)(
            "REPLICATION_STATE_CHANGE",
            vec![("old", old.into()), ("new", new.into()), ("reason", "".into())],
        );
    }

    async fn listen_to(self: &Rc<Self>, id: SessionId, connection: &Rc<Connection>) -> Result<()> {
        let mut decoder = Decoder::new();
        while !connection.closing.get() {
            let got = self.env.timeout(SILENCE, connection.stream.recv(RECV)).await;
            let bytes = got.unwrap_or_else(|| Err(BlockError::from_errno(BlockError::ETIMEDOUT)))?;
            if bytes.is_empty() {
                return Ok(());
            }
            decoder.push(bytes);
            let mut frames = Vec::new();
            while let Some(frame) = decoder.next_frame()? {
                frames.push(frame);
            }
            if frames.is_empty() {
                continue;
            }
            let _turn = self.line.acquire(1).await;
            self.take(id, connection, &frames).await;
        }
        Ok(())
    }

    /// Works off the frames of one receive; changes next to one another are kept together.
    async fn take(self: &Rc<Self>, id: SessionId, connection: &Rc<Connection>, frames: &[Frame]) {
        let mut pending: Vec<Change> = Vec::new();
        let mut any = false;
        for frame in frames {
            if connection.closing.get() {
                break;
            }
            if matches!(frame.body, Body::Hello(_)) {
                // the session stands on what was decided before it
                self.keep(&mut pending).await;
                self.decisions_end().await;
            }
            let mut out = Vec::new();
            self.core.borrow_mut().step(Input::Frame(id, frame), &mut out);
            for o in out {
                if o == Output::Keep {
                    any = true;
                    connection.received.set(connection.received.get() + frame.wire_len());
                    pending.extend(change_of(frame));
                } else {
                    self.keep(&mut pending).await;
                    self.carry_out(o).await;
                }
            }
        }
        self.keep(&mut pending).await;
        if any {
            self.kept(id, Seq(0)).await;
        }
    }

    async fn keep(self: &Rc<Self>, pending: &mut Vec<Change>) {
        let changes = std::mem::take(pending);
        let Some(first) = changes.first() else { return };
        if let Err(e) = self.keep_all(&changes).await {
            let (volume, offset) = (first.volume, first.at.start);
            *self.last_error.borrow_mut() = Some(e.to_string());
            (self.tell)(
                "REPLICATION_ERROR",
                vec![
                    ("operation", "keep".into()),
                    ("volume", u64::from(volume).into()),
                    ("offset", offset.into()),
                    ("reason", e.to_string().into()),
                ],
            );
            self.step(Input::Refused { volume, offset, errno: e.errno(), text: e.to_string() }).await;
        }
    }

    async fn keep_all(&self, changes: &[Change]) -> Result<()> {
        let owners = self.owners.borrow().clone();
        if let Some(record) = owners {
            for c in changes {
                record.grow(c.volume, c.at.end())?;
                record.cover(c.volume, c.at).await?;
            }
        }
        self.store.keep(changes).await
    }

    /// `durable`: up to which number that is known; zero if not.
    async fn kept(self: &Rc<Self>, session: SessionId, durable: Seq) {
        let received = self.connections.borrow().get(&session).map(|c| c.received.get());
        let Some(received) = received else { return };
        let fill = self.store.fill();
        let limit = received + self.store.room();
        let applied = self.store.is_applied();
        self.step(Input::Kept { session, durable, applied, limit, fill }).await;
    }

    /// Gives the state machine an input and does what it says. The caller has the line.
    async fn step(self: &Rc<Self>, input: Input<'_>) {
        let mut out = Vec::new();
        self.core.borrow_mut().step(input, &mut out);
        for o in out {
            Box::pin(self.carry_out(o)).await;
        }
    }

    /// Where this image differs from the newest checkpoint that it has in common with the primary's, if it has more.
    fn goes_back(&self) -> Option<Former> {
        let history = self.store.history();
        let primary = self.core.borrow().agreed().cloned()?;
        let Relation::Ahead(since) = primary.compare(&history) else { return None };
        let places = self.store.changed_since(since)?;
        Some(Former { history, since, places })
    }

    async fn carry_out(self: &Rc<Self>, output: Output) {
        match output {
            Output::Send(id, frame) => {
                if let Some(c) = self.connections.borrow().get(&id) {
                    c.out.push(frame.encode());
                }
            }
            Output::Close(id) => {
                if let Some(c) = self.connections.borrow().get(&id) {
                    c.closing.set(true);
                    c.out.close();
                }
            }
            Output::Begin { session, generation, lens } => match self.store.begin(generation, &lens).await {
                Ok(()) => {
                    self.state("detached", "connected");
                    let limit = self.store.room();
                    let former = self.former.borrow().clone();
                    let was = former.clone().or_else(|| self.goes_back());
                    let left = self.store.left_on_disk();
                    let everywhere = Doubt { former: None, places: None };
                    let doubt = doubt(&self.store.disk_lens(), was.as_ref(), &left).unwrap_or(everywhere);
                    if former.is_some() && self.owners.borrow().is_none() {
                        // what comes now overwrites the disks in places that the record does not name
                        let _ = self.env.remove(&self.record).await;
                    }
                    Box::pin(self.step(Input::Begun { session, limit, doubt })).await;
                }
                Err(e) => {
                    *self.last_error.borrow_mut() = Some(e.to_string());
                    Box::pin(self.carry_out(Output::Close(session))).await;
                }
            },
            Output::Keep => {}
            Output::Resize(volume, len) => {
                if let Err(e) = self.store.resize(volume, len).await {
                    *self.last_error.borrow_mut() = Some(format!("resizing volume {volume}: {e}"));
                    let text = format!("it cannot have {len} bytes: {e}");
                    let refused = Input::Refused { volume, offset: len, errno: e.errno(), text };
                    Box::pin(self.step(refused)).await;
                }
            }
            Output::Flush(session) => self.ask_flush(session),
            Output::Prepare(epoch, digest, history) => {
                if let Err(e) = self.store.seal(epoch, digest, history).await {
                    Box::pin(self.step(Input::Prepared(epoch, Err(e.to_string())))).await;
                }
            }
            Output::Commit(epoch) => {
                if let Err(e) = self.store.decide(epoch).await {
                    Box::pin(self.not_decided(epoch, &e)).await;
                }
            }
            Output::Abort(epoch) => {
                if let Err(e) = self.store.abort(epoch).await {
                    *self.last_error.borrow_mut() = Some(e.to_string());
                }
            }
            Output::Fenced(by) => {
                let generation = self.core.borrow().highest();
                (self.tell)(
                    "REPLICATION_FENCED",
                    vec![("generation", generation.0.into()), ("by", by.0.into())],
                );
            }
            Output::Vetoed(epoch, reason) => {
                *self.last_error.borrow_mut() = Some(reason.clone());
                (self.tell)(
                    "REPLICATION_CHECKPOINT_VETO",
                    vec![("epoch", epoch.0.into()), ("reason", reason.into())],
                );
            }
            Output::Hash { session, volume, at } => match self.store.read_kept(volume, at).await {
                Ok(data) => {
                    let hash = crate::digest::content_hash(&data);
                    let body = Body::Hash { volume, at, hash };
                    let seq = self.core.borrow().received().0;
                    let frame = Frame { generation: self.generation(), seq, epoch: Epoch(0), body };
                    Box::pin(self.carry_out(Output::Send(session, frame))).await;
                }
                Err(e) => {
                    let text = format!("reading to verify: {e}");
                    let refused = Input::Refused { volume, offset: at.start, errno: e.errno(), text };
                    Box::pin(self.step(refused)).await;
                }
            },
            Output::TakeOver(hand) => {
                let began = self.env.now();
                match Box::pin(self.promote(&TakeOver::at_newest(), began)).await {
                    Ok(_) => {
                        *self.handed.borrow_mut() = Some(*hand);
                        self.start_merge();
                    }
                    Err(e) => {
                        *self.last_error.borrow_mut() = Some(format!("taking over: {e}"));
                        // who asked keeps its users out until it knows: it comes again, and a welcome says that it was not taken
                        self.connections.borrow().values().for_each(|c| c.stream.shutdown());
                    }
                }
            }
            Output::SplitBrain(_) => (self.tell)("REPLICATION_SPLIT_BRAIN", Vec::new()),
        }
    }

    /// Applies what is committed, frees what is not needed, gives the primary the space.
    async fn background(self: Rc<Self>) {
        while !self.stopped.get() {
            let work = self.store.work.wait();
            match self.store.tidy().await {
                Ok(()) => {}
                Err(e) => {
                    *self.last_error.borrow_mut() = Some(format!("bringing a checkpoint to the disk: {e}"));
                    self.env.sleep(RETRY).await;
                    self.store.work.notify_all();
                    continue;
                }
            }
            let session = self.core.borrow().session();
            if let Some(id) = session {
                let _turn = self.line.acquire(1).await;
                self.kept(id, Seq(0)).await;
            }
            work.await;
        }
    }
}

fn change_of(frame: &Frame) -> Option<Change> {
    match &frame.body {
        Body::Write { volume, offset, data, .. } => {
            Some(Change { volume: *volume, at: Span::new(*offset, data.len() as u64), data: data.clone() })
        }
        Body::Zero { volume, at, .. } => Some(Change { volume: *volume, at: *at, data: Data::empty() }),
        _ => None,
    }
}
