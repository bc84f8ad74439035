//! A chain of images under guests: snapshots, commits, streams and backups one after the other, meddled with, called off, with
//! faults, and an end of any kind.
//!
//! What is checked, besides what [`Manager`] and [`Guest`](crate::Guest) check as they go:
//! * guest reads are linearizable throughout: no job here ever changes what the guest reads, however it ends;
//! * a backup is the disk at one instant while its command ran; an incremental one on top of it is that again: its bitmap has
//!   every change since it was added;
//! * flushed data survives kill and power loss while any of this runs; the chain as its headers tell it is the disk;
//! * all that also where the base is a disk that an NBD server of somebody else holds ([`elsewhere`]);
//! * images check clean (leaks only after a crash or a fault); everything is given back.

use super::nth::{all_of, connect, opened};
use super::plan::{check_qcow2, empty_qcow2};
use crate::boot::{Booted, FAR_NBD, nbd};
use crate::elsewhere::Elsewhere;
use crate::history::{Crash, History, What};
use crate::runner::Outcome;
use crate::{
    Disk, Effect, Fault, Guest, Habits, Image, Manager, NbdDisk, Op, Profile, Refusal, Rng, Rule, World,
    stamped, values_of,
};
use ::nbd::Mode;
use block::{BlockError, SECTOR, Span};
use env::Env;
use serde_json::{Value as Json, json};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Everything must have ended so long after the last fault, in virtual time.
const PATIENCE: Duration = Duration::from_secs(60);

/// How the run is meant to end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Quit,
    Kill,
    PowerLoss,
}

/// What is done to the chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Deed {
    Snapshot,
    SnapshotSync,
    CommitBelow,
    CommitActive,
    Stream,
    StreamBelow,
    BackupFull,
    BackupIncremental,
}

#[derive(Debug)]
struct Plan {
    sectors: u64,
    clusters: [u64; 3],
    guests: u32,
    deeds: Vec<Deed>,
    faults: bool,
    end: End,
    place: Place,
}

/// Where the images are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// Files of the host.
    Here,
    /// The same, and some of its requests take long.
    Slow,
    /// Another daemon has what is backed up.
    FarBackups,
    /// An NBD server of somebody else has the base, and some of its requests take long.
    FarBase,
}

impl Plan {
    fn drawn(rng: &mut Rng) -> Plan {
        use Deed::*;
        let all = [
            Snapshot,
            SnapshotSync,
            CommitBelow,
            CommitBelow,
            CommitActive,
            CommitActive,
            Stream,
            StreamBelow,
            BackupFull,
            BackupFull,
            BackupIncremental,
            BackupIncremental,
        ];
        let mut deeds = vec![Snapshot; rng.between(1, 3) as usize];
        deeds.extend((0..rng.between(1, 6)).map(|_| *rng.choose(&all)));
        Plan {
            sectors: *rng.choose(&[64, 640, 2048]),
            clusters: [512, 4096, 65536].map(|c| if rng.chance(0.5) { c } else { 4096 }),
            guests: rng.between(1, 2) as u32,
            deeds,
            faults: rng.chance(0.3),
            end: *rng.choose(&[End::Quit, End::Quit, End::Kill, End::PowerLoss]),
            place: Place::Here,
        }
    }

    fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }
}

/// One layer that is open now.
#[derive(Clone)]
struct Layer {
    node: String,
    path: String,
    raw: bool,
    /// Added by the manager, who has to delete it (what `blockdev-snapshot-sync` makes goes by itself).
    owned: bool,
}

/// A backup that an incremental one can go on top of.
#[derive(Clone)]
struct Kept {
    /// Where the bitmap is.
    of: String,
    path: String,
}

struct Run {
    world: World,
    plan: Plan,
    rng: RefCell<Rng>,
    history: Rc<History>,
    outside: Env,
    _outside: crate::Process,
    guests: RefCell<Vec<Guest>>,
    /// From the base up.
    chain: RefCell<Vec<Layer>>,
    kept: RefCell<Option<Kept>>,
    names: Cell<u32>,
    /// A command that changes which image is the guest's is under way: no moment for a crash.
    moving: Cell<bool>,
    done: Cell<bool>,
    /// The daemon that has what is backed up, if that is not here.
    far: RefCell<Option<(Booted, Rc<Manager>)>>,
    /// `reconnect-delay` of the link to it, in seconds.
    reconnect: Cell<u64>,
    /// The server that has the base, if that is not here.
    base: RefCell<Option<Elsewhere>>,
    /// Backups wait for the link (`on-link-loss`).
    waits: Cell<bool>,
    /// The link was cut while the job that runs was to be told.
    told_of_cut: Cell<bool>,
}

/// One seed.
pub fn chain(seed: u64, verbose: bool) -> Outcome {
    played(seed, verbose, Place::Here)
}

/// One seed, with backups that go to another daemon, over a link that is cut now and then.
pub fn remote(seed: u64, verbose: bool) -> Outcome {
    played(seed, verbose, Place::FarBackups)
}

/// One seed, with the base on an NBD server that carries out requests in any order, and some of them late.
pub fn elsewhere(seed: u64, verbose: bool) -> Outcome {
    played(seed, verbose, Place::FarBase)
}

/// One seed, on a disk whose requests take long now and then.
pub fn slow(seed: u64, verbose: bool) -> Outcome {
    played(seed, verbose, Place::Slow)
}

fn played(seed: u64, verbose: bool, place: Place) -> Outcome {
    World::play(seed, verbose, |w| async move {
        let mut rng = w.rng("plan");
        let mut plan = Plan::drawn(&mut rng);
        plan.place = place;
        match place {
            Place::Here => {}
            Place::FarBackups => plan.deeds.extend([Deed::BackupFull, Deed::BackupIncremental]),
            // commits that are called off, others after them, and guests who write where both did
            Place::Slow | Place::FarBase => {
                plan.deeds.extend([Deed::CommitActive, Deed::CommitActive, Deed::Snapshot].repeat(3));
            }
        }
        w.host().set_profile(Profile::drawn_calm(&mut rng));
        if place == Place::Slow {
            w.host().adjust(|p| (p.inline, p.slow, p.slow_latency) = (0.0, 0.1, Duration::from_millis(150)));
        }
        w.machine().say(|| format!("{plan:#?}"));
        let (outside, process) = w.start();
        let history = Rc::new(History::told_by(w.machine()));
        let run = Run {
            world: w,
            plan,
            rng: RefCell::new(rng),
            history,
            outside,
            _outside: process,
            guests: RefCell::default(),
            chain: RefCell::default(),
            kept: RefCell::default(),
            names: Cell::new(0),
            moving: Cell::new(false),
            done: Cell::new(false),
            far: RefCell::default(),
            reconnect: Cell::new(0),
            base: RefCell::default(),
            waits: Cell::new(false),
            told_of_cut: Cell::new(false),
        };
        Rc::new(run).go().await;
    })
}

impl Run {
    fn draw<T>(&self, f: impl FnOnce(&mut Rng) -> T) -> T {
        f(&mut self.rng.borrow_mut())
    }

    fn bad(&self, what: impl Into<String>) {
        self.world.verdict().violation(what);
    }

    async fn pause(&self, most: Duration) {
        let d = self.draw(|r| r.duration(Duration::from_micros(10), most));
        self.outside.sleep(d).await;
    }

    /// A new name: of a node, and of a file.
    fn name(&self) -> (String, String) {
        self.names.set(self.names.get() + 1);
        let n = self.names.get();
        (format!("n{n}"), format!("/n{n}.img"))
    }

    fn top(&self) -> Layer {
        let chain = self.chain.borrow();
        chain.last().cloned().unwrap_or(Layer {
            node: String::new(),
            path: String::new(),
            raw: true,
            owned: true,
        })
    }

    async fn go(self: Rc<Self>) {
        let Some(daemon) = Booted::start(&self.world).await else { return };
        // On the heap: the whole run's state is large for a stack.
        let life = Box::pin(self.live(&daemon));
        match self.world.within(&self.outside, PATIENCE * 5, "the run", life).await {
            Some(Ok(())) => {}
            Some(Err(e)) => self.bad(format!("the run: {e}")),
            None => return,
        }
        if self.world.verdict().is_bad() {
            return;
        }
        self.world.verdict().check("guests", self.history.check());
        self.finish(daemon).await;
        self.world.count("operations", self.history.len() as u64);
        self.world.count("faults", self.world.host().faults());
    }

    async fn live(self: &Rc<Self>, daemon: &Booted) -> Result<(), Refusal> {
        let m = daemon.manage(&self.world, &self.outside, &self.history).await?;
        self.open_base(&m).await?;
        m.must("nbd-server-start", json!({"addr": Booted::nbd_address(), "max-connections": 0})).await?;
        let export = json!({
            "type": "nbd", "id": "e0", "node-name": self.top().node, "name": "disk", "writable": true
        });
        m.must("block-export-add", export).await?;
        if self.plan.place == Place::FarBackups {
            self.start_far().await?;
        }
        for n in 0..self.plan.guests {
            self.start_guest(n);
        }
        let (run, on) = (self.clone(), m.clone());
        let deeds = self.outside.spawn("deeds", async move {
            if let Err(e) = run.deeds(&on).await {
                run.bad(format!("the deeds: {e}"));
            }
            run.done.set(true);
        });
        if self.plan.end == End::Quit {
            deeds.join().await;
            return self.take_down(&m).await;
        }
        let after = self.draw(|r| r.duration(Duration::from_millis(1), Duration::from_secs(1)));
        self.outside.sleep(after).await;
        while self.moving.get() && !self.done.get() {
            self.outside.sleep(Duration::from_micros(50)).await;
        }
        deeds.cancel();
        Ok(())
    }

    /// The other daemon, and how patient the link to it is: losses are bridged, or told at once.
    async fn start_far(&self) -> Result<(), Refusal> {
        let Some(far) = Booted::start_far(&self.world).await else { return Err(Refusal::Gone) };
        let m = far.manage(&self.world, &self.outside, &self.history).await?;
        m.must("nbd-server-start", json!({"addr": Booted::far_address(), "max-connections": 0})).await?;
        *self.far.borrow_mut() = Some((far, m));
        self.reconnect.set(self.draw(|r| *r.choose(&[0, 30])));
        self.waits.set(self.draw(|r| r.chance(0.5)));
        Ok(())
    }

    /// The node a backup goes to: the file itself, or what the other daemon exports of it (under its path, for good).
    async fn open_target(&self, m: &Manager, node: &str, path: &str, new: bool) -> Result<(), Refusal> {
        let far = self.far.borrow().as_ref().map(|(_, m)| m.clone());
        let Some(far) = far else {
            let raw = json!({"driver": "raw", "node-name": node, "file": file(path)});
            return m.must("blockdev-add", raw).await.map(drop);
        };
        if new {
            let raw = json!({"driver": "file", "node-name": node, "filename": path});
            far.must("blockdev-add", raw).await?;
            let export =
                json!({"type": "nbd", "id": node, "node-name": node, "name": path, "writable": true});
            far.must("block-export-add", export).await?;
        }
        let client = json!({
            "driver": "nbd", "node-name": node, "server": Booted::far_server(), "export": path,
            "reconnect-delay": self.reconnect.get(),
        });
        m.must("blockdev-add", client).await.map(drop)
    }

    async fn open_base(&self, m: &Manager) -> Result<(), Refusal> {
        let (node, path) = self.name();
        let mut base = Image::from_bytes(&vec![0; self.plan.bytes() as usize]);
        for _ in 0..self.draw(|r| r.below(4)) {
            let (start, end) = self.draw(|r| {
                let start = r.below(self.plan.sectors);
                (start, r.between(start + 1, self.plan.sectors.min(start + 300)))
            });
            let n = self.history.begin(u32::MAX - 1, What::Write, start..end);
            base.apply(&Effect::Write { offset: start * SECTOR, data: stamped(n, start, end - start) });
            self.history.end(n);
        }
        let n = self.history.begin(u32::MAX - 1, What::Flush, 0..0);
        self.history.end(n);
        self.world.host().install(&path, base);
        let (path, mut options) = if self.plan.place == Place::FarBase {
            let Some(server) = Elsewhere::start(&self.world, &path).await else { return Err(Refusal::Gone) };
            let it = (server.uri(), server.disk());
            *self.base.borrow_mut() = Some(server);
            it
        } else {
            (path.clone(), json!({"driver": "raw", "file": file(&path)}))
        };
        options["node-name"] = json!(node);
        m.must("blockdev-add", options).await?;
        self.chain.borrow_mut().push(Layer { node, path, raw: true, owned: true });
        Ok(())
    }

    fn start_guest(self: &Rc<Self>, client: u32) {
        let habits = self.draw(|r| Habits {
            requests: *r.choose(&[60, 200, 600]),
            // what a lost link keeps from being copied fails the write that would have destroyed it
            errors_allowed: self.plan.faults
                || (self.plan.place == Place::FarBackups && (self.reconnect.get() == 0 || self.waits.get())),
            breaks_allowed: self.plan.end != End::Quit,
            ..Habits::drawn(r, client, self.plan.sectors)
        });
        let dial = NbdDisk::dial(&self.outside, nbd(), "disk", Mode::Extended, self.world.verdict());
        let (rng, verdict) = (self.world.rng("guest"), self.world.verdict().clone());
        let guest = Guest::start(&self.outside, habits, self.history.clone(), verdict, rng, dial);
        self.guests.borrow_mut().push(guest);
    }

    async fn deeds(&self, m: &Manager) -> Result<(), Refusal> {
        for deed in &self.plan.deeds {
            self.pause(Duration::from_millis(60)).await;
            self.world.machine().say(|| format!("{deed:?}"));
            match deed {
                Deed::Snapshot | Deed::SnapshotSync => self.snapshot(m, *deed == Deed::SnapshotSync).await?,
                Deed::CommitBelow => self.commit_below(m).await?,
                Deed::CommitActive => self.commit_active(m).await?,
                Deed::Stream => {
                    let top = self.chain.borrow().len() - 1;
                    self.stream(m, top).await?;
                }
                Deed::StreamBelow => {
                    let len = self.chain.borrow().len();
                    if len > 2 {
                        let at = self.draw(|r| r.between(1, len as u64 - 2)) as usize;
                        self.stream(m, at).await?;
                    }
                }
                Deed::BackupFull => self.backup(m, false).await?,
                Deed::BackupIncremental => {
                    for _ in 0..self.draw(|r| r.between(2, 4)) {
                        self.backup(m, true).await?;
                        self.pause(Duration::from_millis(30)).await;
                    }
                }
            }
            self.world.host().clear_faults();
            if self.world.verdict().is_bad() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Some requests fail from now on, perhaps.
    fn trouble(&self) {
        if !self.plan.faults || self.draw(|r| r.chance(0.4)) {
            return;
        }
        let files = self.world.host().list();
        self.draw(|r| {
            for _ in 0..r.between(1, 3) {
                let op = *r.choose(&[
                    Op::Read,
                    Op::Write,
                    Op::Write,
                    Op::Zero,
                    Op::Barrier,
                    Op::Extents,
                    Op::SetLen,
                ]);
                let errno = *r.choose(&[BlockError::EIO, BlockError::ENOSPC]);
                let fault = if r.chance(0.3) { Fault::Torn(errno) } else { Fault::Errno(errno) };
                let path = r.choose(&files).clone();
                self.world.host().fault(Rule {
                    skip: r.below(20),
                    times: *r.choose(&[1, 1, 3]),
                    path,
                    op: Some(op),
                    fault,
                });
            }
        });
    }

    /// A command that moves the guest to another image, or a job's end that does: not to be cut by a crash, since only its
    /// answer says which image is the guest's.
    async fn snapshot(&self, m: &Manager, sync: bool) -> Result<(), Refusal> {
        let (top, (node, path)) = (self.top(), self.name());
        let cluster = self.draw(|r| *r.choose(&self.plan.clusters));
        self.moving.set(true);
        let done = if sync {
            let arguments = json!({
                "node-name": top.node, "snapshot-file": path, "snapshot-node-name": node, "format": "qcow2"
            });
            self.trouble();
            m.execute("blockdev-snapshot-sync", arguments).await
        } else {
            self.world
                .host()
                .install(&path, empty_qcow2(self.plan.bytes(), cluster, Some(&top.path), top.raw));
            let overlay = json!({"driver": "qcow2", "node-name": node, "file": file(&path), "backing": null});
            m.must("blockdev-add", overlay).await?;
            self.trouble();
            let done = m.execute("blockdev-snapshot", json!({"node": top.node, "overlay": node})).await;
            if done.is_err() {
                self.world.host().clear_faults();
                self.delete(m, &node).await?;
            }
            done
        };
        match done {
            Ok(_) => {
                self.world.count("snapshots", 1);
                self.chain.borrow_mut().push(Layer { node, path, raw: false, owned: !sync });
                self.kept.take();
            }
            Err(Refusal::Error(e)) if self.world.host().faults() == 0 => {
                self.bad(format!("no snapshot: {e}"))
            }
            Err(Refusal::Error(_)) => {}
            Err(Refusal::Gone) => return Err(Refusal::Gone),
        }
        self.moving.set(false);
        Ok(())
    }

    async fn commit_below(&self, m: &Manager) -> Result<(), Refusal> {
        let chain = self.chain.borrow().clone();
        if chain.len() < 3 {
            return Ok(());
        }
        let top = self.draw(|r| r.between(1, chain.len() as u64 - 2)) as usize;
        let base = self.draw(|r| r.below(top as u64)) as usize;
        let arguments = json!({
            "job-id": "job", "device": self.top().node, "top-node": chain[top].node, "base-node": chain[base].node,
            "on-error": self.draw(|r| *r.choose(&["report", "ignore", "stop", "enospc"])),
            "speed": self.draw(|r| *r.choose(&[0u64, 0, 1 << 20])),
        });
        if self.job(m, "block-commit", arguments, false).await? {
            self.world.count("commits below", 1);
            self.shrink(m, base + 1, top + 1).await?;
        }
        Ok(())
    }

    async fn commit_active(&self, m: &Manager) -> Result<(), Refusal> {
        let chain = self.chain.borrow().clone();
        if chain.len() < 2 {
            return Ok(());
        }
        let base = self.draw(|r| r.below(chain.len() as u64 - 1)) as usize;
        let arguments = json!({
            "job-id": "job", "device": self.top().node, "base-node": chain[base].node,
            "on-error": self.draw(|r| *r.choose(&["report", "ignore", "stop", "enospc"])),
        });
        if self.job(m, "block-commit", arguments, true).await? {
            self.world.count("commits of the active image", 1);
            self.kept.take();
            self.shrink(m, base + 1, chain.len()).await?;
        }
        self.moving.set(false);
        Ok(())
    }

    async fn stream(&self, m: &Manager, at: usize) -> Result<(), Refusal> {
        let chain = self.chain.borrow().clone();
        if at == 0 {
            return Ok(());
        }
        let base = self.draw(|r| r.below(at as u64 + 1)) as usize;
        let mut arguments = json!({
            "job-id": "job", "device": chain[at].node,
            "on-error": self.draw(|r| *r.choose(&["report", "ignore", "stop", "enospc"])),
            "speed": self.draw(|r| *r.choose(&[0u64, 0, 1 << 20])),
        });
        // the layer `base` stays, or none at all
        if base < at {
            arguments["base-node"] = json!(chain[base].node);
        }
        if self.job(m, "block-stream", arguments, false).await? {
            self.world.count("streams", 1);
            let from = if base < at { base + 1 } else { 0 };
            self.shrink(m, from, at).await?;
        }
        Ok(())
    }

    /// The layers `from..to` are no part of the chain any more.
    async fn shrink(&self, m: &Manager, from: usize, to: usize) -> Result<(), Refusal> {
        let gone: Vec<Layer> = self.chain.borrow_mut().drain(from..to).collect();
        for l in gone.iter().rev().filter(|l| l.owned) {
            self.delete(m, &l.node).await?;
        }
        Ok(())
    }

    async fn backup(&self, m: &Manager, incremental: bool) -> Result<(), Refusal> {
        let top = self.top();
        let kept = self.kept.borrow().clone().filter(|k| incremental && k.of == top.node);
        let (node, new) = self.name();
        let path = kept.as_ref().map_or(new, |k| k.path.clone());
        if kept.is_none() {
            self.world.host().install(&path, Image::from_bytes(&vec![0; self.plan.bytes() as usize]));
            if incremental {
                let bitmap = json!({
                    "node": top.node, "name": path, "granularity": self.draw(|r| *r.choose(&[512, 4096, 65536]))
                });
                m.must("block-dirty-bitmap-add", bitmap).await?;
            }
        }
        self.open_target(m, &node, &path, kept.is_none()).await?;
        let mut arguments = json!({
            "job-id": "job", "device": top.node, "target": node, "sync": "full",
            "on-source-error": self.draw(|r| *r.choose(&["report", "ignore", "stop"])),
            "on-target-error": self.draw(|r| *r.choose(&["report", "ignore", "stop"])),
            "speed": self.draw(|r| *r.choose(&[0u64, 0, 1 << 20])),
        });
        if self.waits.get() {
            arguments["on-link-loss"] = json!({"wait": 600, "no-progress": 2});
        }
        if kept.is_some() {
            arguments["sync"] = json!("incremental");
            arguments["bitmap"] = json!(path);
        }
        let from = self.history.tick();
        let to = Rc::new(Cell::new(0));
        let well = self.job_at(m, "blockdev-backup", arguments, false, Some(&to)).await?;
        self.world.host().clear_faults();
        self.delete(m, &node).await?;
        if well {
            self.world.count(if kept.is_some() { "incremental backups" } else { "full backups" }, 1);
            let image = self.world.host().image(&path).unwrap_or_default();
            let found = values_of(&image.read(Span::new(0, self.plan.bytes())), 0);
            let result = self.history.one_instant(&found, from, to.get());
            self.world.verdict().check(if kept.is_some() { "incremental backup" } else { "backup" }, result);
        }
        if incremental && kept.is_none() {
            // a failed one leaves nothing that an incremental one could go on top of
            *self.kept.borrow_mut() = well.then_some(Kept { of: top.node, path });
        }
        Ok(())
    }

    async fn job(
        &self,
        m: &Manager,
        command: &str,
        arguments: Json,
        complete: bool,
    ) -> Result<bool, Refusal> {
        self.job_at(m, command, arguments, complete, None).await
    }

    /// Runs a job, meddling; whether it ended well (as a completion, if it is one to be completed). `started` gets the moment
    /// at which its command was answered.
    async fn job_at(
        &self,
        m: &Manager,
        command: &str,
        arguments: Json,
        complete: bool,
        started: Option<&Rc<Cell<u64>>>,
    ) -> Result<bool, Refusal> {
        let id = || json!({"id": "job"});
        self.trouble();
        match m.execute(command, arguments.clone()).await {
            Ok(_) => {}
            Err(Refusal::Error(e)) if self.world.host().faults() == 0 => {
                self.bad(format!("{command} {arguments} was refused: {e}"));
                return Ok(false);
            }
            Err(Refusal::Error(_)) => return Ok(false),
            Err(Refusal::Gone) => return Err(Refusal::Gone),
        }
        started.iter().for_each(|s| s.set(self.history.tick()));
        self.world.count("jobs", 1);
        self.told_of_cut.set(false);
        let calm_after = self.outside.now() + Duration::from_secs(4);
        let (mut cancelled, mut asked, mut soft) = (false, false, false);
        loop {
            let seen = m.job("job");
            if self.outside.now() > calm_after {
                self.world.host().clear_faults();
                let _refused_if_over =
                    m.execute("block-job-set-speed", json!({"device": "job", "speed": 0})).await;
            }
            match seen.status.as_str() {
                "null" => {
                    return Ok(match seen.completed {
                        Some(None) => !soft,
                        Some(Some(e)) => {
                            self.world.count("failed", 1);
                            if self.world.host().faults() == 0 && !self.told_of_cut.get() {
                                self.bad(format!(
                                    "{command} {arguments} failed although nothing else did: {e}"
                                ));
                            }
                            false
                        }
                        None => {
                            self.world.count("cancelled", 1);
                            if !cancelled {
                                self.bad("the job was cancelled, but nobody asked for that");
                            }
                            false
                        }
                    });
                }
                "ready" if complete && !asked => {
                    self.pause(Duration::from_millis(30)).await;
                    // from here on it may move the guest
                    self.moving.set(true);
                    soft = self.draw(|r| r.chance(0.2));
                    let verb = if soft { "block-job-cancel" } else { "block-job-complete" };
                    asked = m.execute(verb, json!({"device": "job"})).await.is_ok();
                    soft = soft && asked;
                }
                "paused" | "standby" => {
                    let _refused_if_over = m.execute("job-resume", id()).await;
                }
                _ => {}
            }
            let _whatever = match self.draw(|r| r.below(30)) {
                0 => m.execute("job-pause", id()).await,
                1 if !asked => {
                    cancelled = m.execute("job-cancel", id()).await.is_ok() || cancelled;
                    Ok(Json::Null)
                }
                2 => {
                    let speed = self.draw(|r| *r.choose(&[0u64, 100_000, 1 << 30]));
                    m.execute("block-job-set-speed", json!({"device": "job", "speed": speed})).await
                }
                3 => m.execute("query-block-jobs", json!({})).await,
                4 if self.plan.place == Place::FarBackups => {
                    self.world.net().cut(FAR_NBD);
                    self.world.count("links cut", 1);
                    // who waits may still find that what was lost is nowhere any more
                    self.told_of_cut.set(self.reconnect.get() == 0 || self.waits.get());
                    self.world.count("cut while waiting", u64::from(self.waits.get()));
                    Ok(Json::Null)
                }
                _ => Ok(Json::Null),
            };
            self.pause(Duration::from_millis(10)).await;
        }
    }

    async fn delete(&self, m: &Manager, node: &str) -> Result<(), Refusal> {
        let arguments = json!({"node-name": node});
        match m.execute("blockdev-del", arguments).await {
            // what cannot be written back is told; the node is gone
            Err(Refusal::Error(e)) if self.world.host().faults() == 0 => {
                self.bad(format!("{node} is not gone: {e}"))
            }
            Err(Refusal::Gone) => return Err(Refusal::Gone),
            _ => {}
        }
        Ok(())
    }

    /// The guests end; the whole disk is read once more; all is taken down.
    async fn take_down(&self, m: &Manager) -> Result<(), Refusal> {
        self.world.host().clear_faults();
        let guests = std::mem::take(&mut *self.guests.borrow_mut());
        let stopping = async {
            for g in &guests {
                g.stop().await;
            }
        };
        self.world.within(&self.outside, PATIENCE, "guest requests", stopping).await;
        if self.world.verdict().is_bad() {
            return Ok(());
        }
        if let Some(d) = connect(&self.world, &self.outside).await {
            if let Err(e) = crate::read_all(&*d, &self.history, u32::MAX).await {
                self.bad(format!("the last read of everything: {e:?}"));
            }
            let n = self.history.begin(u32::MAX, What::Flush, 0..0);
            match d.flush().await {
                Ok(()) => self.history.end(n),
                Err(e) => self.bad(format!("the last flush: {e:?}")),
            }
            d.disconnect();
        }
        let left = m.must("query-jobs", json!({})).await?;
        if left != json!([]) {
            self.bad(format!("jobs are left: {left}"));
        }
        Ok(())
    }

    /// The daemon ends (or crashes), and what it leaves is looked at.
    async fn finish(&self, daemon: Booted) {
        let host = self.world.host();
        let far = self.far.take().map(|(far, _)| far);
        let base = self.base.take();
        let how = match self.plan.end {
            End::Kill => {
                self.world.count("kills", 1);
                daemon.process.kill();
                far.iter().for_each(|f| f.process.kill());
                base.iter().for_each(|b| b.process.kill());
                Crash::Kill
            }
            End::PowerLoss => {
                self.world.count("power losses", 1);
                let daemons = far.iter().chain([&daemon]).map(|b| &b.process);
                let all: Vec<&crate::Process> = daemons.chain(base.iter().map(|b| &b.process)).collect();
                host.power_loss(&all);
                Crash::PowerLoss
            }
            End::Quit => {
                daemon.quit(&self.world, &self.outside).await;
                if let Some(far) = far {
                    far.quit(&self.world, &self.outside).await;
                }
                base.iter().for_each(|b| b.process.kill());
                Crash::KillWriteThrough
            }
        };
        self.guests.borrow().iter().for_each(Guest::abandon);
        host.clear_faults();
        host.set_profile(Profile { inline: 1.0, ..Profile::calm() });
        Booted::all_have_quit(&self.world);
        let crashed = how != Crash::KillWriteThrough;
        for l in self.chain.borrow().iter().filter(|l| !l.raw) {
            let image = host.image(&l.path).unwrap_or_default();
            self.world.count("images checked", 1);
            self.world.verdict().check(&l.path, check_qcow2(&image, crashed || host.faults() > 0));
        }
        if self.world.verdict().is_bad() {
            return;
        }
        let Some(daemon) = Booted::start(&self.world).await else { return };
        let top = self.top();
        let driver = if top.raw { "raw" } else { "qcow2" };
        let mut node = json!({"driver": driver, "file": file(&top.path)});
        let mut again = None;
        if let Some(before) = base {
            again = Elsewhere::start(&self.world, before.path()).await;
            node = again.iter().filter(|_| top.raw).map(Elsewhere::disk).next().unwrap_or(node);
        }
        node["node-name"] = json!("n");
        if let Some(d) = opened(&self.world, &daemon, &self.outside, node).await {
            let found = all_of(&self.world, &*d).await;
            d.disconnect();
            self.world.verdict().check("the chain at rest", self.history.crash_peek(&found, how));
        }
        daemon.quit(&self.world, &self.outside).await;
        again.iter().for_each(|b| b.process.kill());
    }
}

fn file(path: &str) -> Json {
    json!({"driver": "file", "filename": path})
}
