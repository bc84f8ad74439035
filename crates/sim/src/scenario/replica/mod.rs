//! Two or three hosts that replicate a disk: guests on the primary, a manager that makes checkpoints, hosts that are killed, lose their
//! power, have slow or failing or hanging disks, links that are cut or swallow bytes, clocks that jump; at the end a failover, or peace.
//!
//! What is checked (reference/replication.md 1.2):
//! * I1, I2: what a secondary shows is the primary's disk at one instant, between the moments at which its checkpoint was asked for and
//!   made; also while it catches up, after crashes, and during a failover;
//! * I4: a secondary's checkpoint never goes back; I3: what was promoted is the last one, and then a disk like any other;
//! * I7, F2: nothing of the old primary reaches a promoted disk; the old primary is fenced when it meets it;
//! * I8: after everything, also after crashes of the primary, all disks are alike;
//! * D5: a disk that grows does so on all sides or on none, is never shorter than what its users see, and a promoted one is as long as its
//!   checkpoint;
//! * liveness: once nothing fails any more, everybody is in sync, a checkpoint succeeds, and guests are answered.

#[cfg(test)]
mod beside;
mod brief;
mod changes;
mod hosts;
mod looks;
mod quiet;
#[cfg(test)]
mod room;
mod turns;

pub use brief::brief;
pub use turns::turns;

use crate::boot::nbd;
use crate::guest::Disk;
use crate::history::{Crash, History, Moment};
use crate::runner::Outcome;
use crate::{
    Fault, Guest, Habits, Host, Image, NbdDisk, NetProfile, Op, Profile, Refusal, Rng, Rule, Value, World,
    stamped, values_of,
};
use block::{BlockError, SECTOR, Span};
use env::Env;
use hosts::Site;
use nbd::Mode;
use serde_json::json;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Everything must have come about so long after the last fault, in virtual time.
const PATIENCE: Duration = Duration::from_secs(90);
/// Guests use so many, the first of a disk.
const SECTORS: u64 = 512;
const STORE: u64 = 8 << 20;
/// The first number of stamps on a promoted disk: no guest of the first primary gets there.
const SECOND_LIFE: u32 = 1 << 30;
const NAMES: [&str; 3] = ["alpha", "beta", "gamma"];

/// One seed.
pub fn replica(seed: u64, verbose: bool) -> Outcome {
    World::play(seed, verbose, |w| async move {
        let rng = w.rng("plan");
        let run = Rc::new(Run::new(w, rng, Wishes::NONE, seed));
        if let Err(e) = run.go().await
            && !run.world.verdict().is_bad()
        {
            run.bad(format!("the run broke off: {e}"));
        }
    })
}

/// What is asked of a group beyond the ordinary.
#[derive(Clone, Copy)]
struct Wishes {
    /// Bytes of the disk.
    disk: u64,
    /// Guests use so many of it, the first.
    sectors: u64,
    /// Checkpoints kept beside the newest.
    retain: u64,
    /// A manager owns the decision about checkpoints.
    external: bool,
}

impl Wishes {
    const NONE: Wishes = Wishes { disk: SECTORS * SECTOR, sectors: SECTORS, retain: 0, external: false };

    /// Where guests write.
    fn area(&self) -> Span {
        Span::new(0, self.sectors * SECTOR)
    }
}

struct Run {
    world: World,
    rng: RefCell<Rng>,
    /// For what came to the scenario later, so that older seeds stay what they were.
    aside: RefCell<Rng>,
    sites: Vec<Site>,
    /// Which of them is the primary.
    lead: Cell<usize>,
    /// What is asked of the group beyond the ordinary.
    wishes: Wishes,
    history: Rc<History>,
    guests: RefCell<Vec<Guest>>,
    /// Checkpoints of which is known when they were asked for and when they were made.
    made: RefCell<BTreeMap<u64, (Moment, Moment)>>,
    /// Checkpoints up to this one are older than the last crash of the primary, and of another history.
    before: Cell<u64>,
    /// The longest that the disk may be for all that an owner was told.
    told: Cell<u64>,
    level: &'static str,
    policy: &'static str,
    interval: u64,
    /// Failures end here.
    calm_at: Cell<Duration>,
}

#[cfg(test)]
impl Run {
    /// A pair or three that are in sync, with the engine redo, this level and policy, and no checkpoints by the clock.
    async fn with_redo(
        w: World,
        wishes: Wishes,
        seed: u64,
        (level, policy): (&'static str, &'static str),
    ) -> Rc<Run> {
        let rng = w.rng("plan");
        let mut run = Run::new(w, rng, wishes, seed);
        (run.level, run.policy, run.interval) = (level, policy, 0);
        run.sites.iter_mut().for_each(|s| s.engine = "redo");
        let run = Rc::new(run);
        for s in run.followers() {
            run.bring_up(s, false).await.unwrap();
        }
        run.bring_up(run.primary(), true).await.unwrap();
        run.in_sync(run.primary(), run.sites.len() - 1).await.unwrap();
        run
    }
}

impl Run {
    fn new(world: World, mut rng: Rng, wishes: Wishes, seed: u64) -> Run {
        let count = *rng.choose(&[2, 2, 3]);
        let site = |(n, name): (usize, &&'static str)| {
            let host = if n == 0 {
                world.host().clone()
            } else {
                Host::new(name, world.machine(), world.net(), Profile::calm())
            };
            host.install("/disk", Image::of_len(wishes.disk));
            let (outside, users) = host.start(world.executor());
            Site {
                name,
                host,
                outside,
                _users: users,
                engine: "redo",
                wishes,
                running: RefCell::default(),
                seen: Cell::new(0),
            }
        };
        let mut sites: Vec<Site> = NAMES[..count].iter().enumerate().map(site).collect();
        for s in &mut sites {
            s.engine = *rng.choose(&["redo", "undo"]);
        }
        // the first host has the world's name; the others are called as they are addressed
        sites[0].name = "host";
        let levels =
            ["local", "queued", "remote-received", "remote-written", "remote-durable", "remote-applied"];
        let history = Rc::new(History::told_by(world.machine()));
        Run {
            level: levels[rng.index(levels.len())],
            policy: if rng.chance(0.7) { "degrade" } else { "suspend" },
            interval: *rng.choose(&[0, 0, 20, 200]),
            calm_at: Cell::new(Duration::MAX),
            world,
            rng: RefCell::new(rng),
            aside: RefCell::new(Rng::new(!seed)),
            sites,
            lead: Cell::new(0),
            wishes,
            history,
            guests: RefCell::default(),
            made: RefCell::default(),
            before: Cell::new(0),
            told: Cell::new(wishes.disk),
        }
    }

    fn draw<T>(&self, f: impl FnOnce(&mut Rng) -> T) -> T {
        f(&mut self.rng.borrow_mut())
    }

    fn draw_aside<T>(&self, f: impl FnOnce(&mut Rng) -> T) -> T {
        f(&mut self.aside.borrow_mut())
    }

    fn bad(&self, what: impl Into<String>) {
        self.world.verdict().violation(what.into());
    }

    fn env(&self) -> &Env {
        &self.sites[0].outside
    }

    fn primary(&self) -> &Site {
        &self.sites[self.lead.get()]
    }

    /// One of the others.
    fn follower(&self) -> &Site {
        let n = self.draw(|r| r.index(self.sites.len() - 1));
        &self.sites[if n < self.lead.get() { n } else { n + 1 }]
    }

    async fn pause(&self, most: Duration) {
        let time = self.draw(|r| r.duration(Duration::from_millis(1), most));
        self.env().sleep(time).await;
    }

    fn troubled(&self) -> bool {
        self.env().now() < self.calm_at.get()
    }

    fn start_guests(&self) {
        let primary = self.primary();
        let count = self.draw(|r| r.between(1, 2));
        for n in 0..count {
            let habits = self.draw(|r| Habits {
                requests: 500,
                pause: *r.choose(&[
                    Duration::from_millis(2),
                    Duration::from_millis(10),
                    Duration::from_millis(40),
                ]),
                ..Habits::drawn(r, n as u32, self.wishes.sectors)
            });
            let dial = NbdDisk::dial(&primary.outside, nbd(), "f", Mode::Structured, self.world.verdict());
            let verdict = self.world.verdict().clone();
            let guest = Guest::start(
                &primary.outside,
                habits,
                self.history.clone(),
                verdict,
                self.world.rng("guest"),
                dial,
            );
            self.guests.borrow_mut().push(guest);
        }
    }

    // ---- the run

    async fn go(self: &Rc<Self>) -> Result<(), Refusal> {
        self.let_things_fail(Duration::from_millis(200), Duration::from_secs(3));
        let first = self.draw(|r| r.chance(0.3));
        if first {
            self.bring_up(&self.sites[0], true).await?;
        }
        for s in &self.sites[1..] {
            self.bring_up(s, false).await?;
        }
        if !first {
            self.bring_up(&self.sites[0], true).await?;
        }
        self.start_guests();
        while self.troubled() && !self.world.verdict().is_bad() {
            self.pause(Duration::from_millis(200)).await;
            self.something().await?;
        }
        if self.world.verdict().is_bad() {
            return Ok(());
        }
        if self.draw(|r| r.chance(0.6)) {
            // whatever state they are in
            self.failover().await
        } else {
            self.peace().await
        }
    }

    /// From now on, for so long, things fail, but not the primary's disk.
    fn let_things_fail(&self, least: Duration, most: Duration) {
        let length = self.draw(|r| r.duration(least, most));
        self.calm_at.set(self.env().now() + length);
        for s in &self.sites {
            let mut p = self.draw(Profile::drawn_calm);
            if s.name != self.primary().name {
                p = self.draw(Profile::drawn);
                p.faults_end = self.calm_at.get();
            }
            s.host.set_profile(p);
        }
        let mut net = self.draw(NetProfile::drawn);
        net.faults_at = " 7000".to_owned();
        net.faults_end = self.calm_at.get();
        self.world.net().set_profile(net);
    }

    /// One thing that happens to the group.
    async fn something(self: &Rc<Self>) -> Result<(), Refusal> {
        let site = self.follower();
        match self.draw(|r| r.below(100)) {
            0..35 => self.checkpoint().await?,
            35..65 => self.look(site).await,
            65..72 => {
                self.world.net().cut(" 7000");
                self.world.count("links cut", 1);
            }
            72..84 => {
                let power = self.draw(|r| r.chance(0.5));
                self.world.count(if power { "power losses" } else { "kills" }, 1);
                site.stop(power);
                self.pause(Duration::from_millis(800)).await;
                self.bring_up(site, false).await?;
                self.look(site).await;
            }
            84..88 => {
                let errno = self.draw(|r| *r.choose(&[BlockError::EIO, BlockError::ENOSPC]));
                let path = self.draw(|r| *r.choose(&["/store", "/disk"]));
                let op = self.draw(|r| *r.choose(&[Op::Write, Op::Barrier, Op::Read]));
                site.host.fault(Rule::once(path, op, Fault::Errno(errno)));
                self.world.count("disk errors", 1);
            }
            88..92 => {
                let flushes = self.draw_aside(|r| r.chance(0.5));
                site.host.fault(match flushes {
                    true => Rule::always("", Op::Barrier, Fault::Hang),
                    false => Rule::once("", Op::Write, Fault::Hang),
                });
                self.world.count("disks that hang", 1);
                self.pause(Duration::from_millis(2500)).await;
                if flushes && self.policy == "degrade" {
                    self.is_answered().await;
                }
                site.host.clear_faults();
                site.host.release_hung();
            }
            92..95 => {
                let by = self.draw(|r| r.duration(Duration::from_secs(1), Duration::from_secs(100_000)));
                let wall = self.world.machine().wall();
                let to = if self.draw(|r| r.chance(0.5)) { wall + by } else { wall.saturating_sub(by) };
                self.world.machine().jump_wall(to);
                self.world.count("clock jumps", 1);
            }
            _ => self.primary_dies().await?,
        }
        if self.draw_aside(|r| r.chance(0.08)) {
            self.grow().await?;
        }
        Ok(())
    }

    /// L1: whatever a secondary's disk does, nobody waits for it for ever who need not.
    async fn is_answered(&self) {
        let Ok(disk) = self.primary().disk(&self.world).await else { return };
        // each of them may be believed alive for the time-out
        let most = Duration::from_secs(5 * self.sites.len() as u64);
        if self.env().timeout(most, disk.flush()).await.is_none() {
            self.bad("L1: a flush waits for a secondary whose disk hangs");
        }
        disk.disconnect();
        self.world.count("flushes while a disk hangs", 1);
    }

    /// The disk becomes longer, by command, which may be refused while things fail; its owner writes there.
    async fn grow(self: &Rc<Self>) -> Result<(), Refusal> {
        let (primary, more) = (self.primary(), self.draw_aside(|r| r.between(1, 16)) * 4096);
        let before = primary.length();
        let resize = json!({"node-name": "f", "size": before + more});
        // no NBD server may have it meanwhile: its clients would not be told
        let m = primary.manager()?;
        self.guests.take().iter().for_each(Guest::abandon);
        m.must("block-export-del", json!({"id": "e", "mode": "hard"})).await?;
        let patience = self.env().now() + Duration::from_secs(10);
        let done = loop {
            match m.execute("block_resize", resize.clone()).await {
                // a request that waits for secondaries, or for a checkpoint, keeps the server
                Err(Refusal::Error(e)) if e.contains("Permission conflict") => {
                    if self.env().now() > patience {
                        self.world.count("growths given up", 1);
                        return self.primary_dies().await;
                    }
                    self.env().sleep(Duration::from_millis(10)).await;
                }
                done => break done,
            }
        };
        if !matches!(done, Err(Refusal::Error(_))) {
            self.told.set(self.told.get().max(before + more));
        }
        self.export(&m).await?;
        self.start_guests();
        match done {
            Err(Refusal::Error(_)) => {
                self.world.count("growths refused", 1);
                if primary.length() != before {
                    self.bad("D5: the disk has grown, and the command failed");
                }
                return Ok(());
            }
            done => drop(done?),
        }
        self.world.count("disks that grew", 1);
        for s in self.sites.iter().filter(|s| s.length() < before + more) {
            self.bad(format!("D5: the disk of {} has not grown", s.name));
        }
        let Ok(disk) = primary.disk(&self.world).await else { return Ok(()) };
        let tail = stamped(SECOND_LIFE + 9, before / SECTOR, more / SECTOR);
        let written = disk.write(before, tail, false);
        match self.env().timeout(Duration::from_secs(20), written).await {
            Some(Err(e)) if self.policy == "degrade" => {
                self.bad(format!("D5: writing behind the former end: {e}"));
            }
            _ => {}
        }
        disk.disconnect();
        Ok(())
    }

    /// A checkpoint by command; it may fail while things fail.
    async fn checkpoint(&self) -> Result<(), Refusal> {
        if self.wishes.external {
            return self.managed_checkpoint().await;
        }
        let from = self.history.tick();
        let m = self.primary().manager()?;
        match m.execute("replication-checkpoint", json!({"group": "g", "timeout-ms": 1500})).await {
            Ok(done) => {
                self.world.count("checkpoints", 1);
                let epoch = done["epoch"].as_u64().unwrap_or(0);
                self.made.borrow_mut().insert(epoch, (from, self.history.tick()));
                Ok(())
            }
            Err(Refusal::Error(_)) => {
                self.world.count("checkpoints refused", 1);
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// Between which moments the mark of a checkpoint was made: marks are in the order of their numbers.
    fn bounds(&self, epoch: u64) -> (Moment, Moment) {
        let made = self.made.borrow();
        let from = made.range(..=epoch).next_back().map_or(0, |(_, m)| m.0);
        let to = made.range(epoch..).next().map_or_else(|| self.history.tick(), |(_, m)| m.1);
        (from, to)
    }

    /// Reads all of a secondary's view, which must be the checkpoint it says it is at.
    async fn look(&self, site: &Site) {
        let Some(before) = self.committed(site).await else { return };
        let Ok(disk) = site.disk(&self.world).await else { return };
        if disk.facts().size > self.told.get() {
            self.bad(format!("D5: {} shows a length that a growth had which was refused", site.name));
        }
        let data = disk.read(self.wishes.area()).await;
        disk.disconnect();
        let Some(after) = self.committed(site).await else { return };
        let Ok(data) = data else { return };
        if before != after || before == 0 || before <= self.before.get() {
            return;
        }
        self.world.count("views checked", 1);
        self.is_checkpoint(&values_of(&data.contiguous(), 0), before, site.name);
    }

    fn is_checkpoint(&self, values: &[Value], epoch: u64, what: &str) {
        let (from, to) = self.bounds(epoch);
        self.world.verdict().check(
            "I1",
            self.history
                .one_instant(values, from, to)
                .map_err(|e| format!("{what} at checkpoint {epoch}: {e}")),
        );
    }

    /// The checkpoint of a secondary, which never goes back.
    async fn committed(&self, site: &Site) -> Option<u64> {
        let info = site.info().await.ok()?;
        let epoch = info["committed-epoch"].as_u64()?;
        self.within_bounds(site, &info);
        if epoch < site.seen.get() {
            self.bad(format!("I4: {} went back from checkpoint {} to {epoch}", site.name, site.seen.get()));
        }
        site.seen.set(epoch);
        Some(epoch)
    }

    /// The primary's host dies and comes back; its guests find what they flushed, and the secondaries what it then has.
    async fn primary_dies(self: &Rc<Self>) -> Result<(), Refusal> {
        let primary = self.primary();
        let mut power = self.draw(|r| r.chance(0.5));
        // where there is room for places that are forgotten apart from one another
        if self.wishes.disk > turns::FAR && self.draw_aside(|r| r.chance(0.5)) {
            power |= self.quiet().await?;
        }
        self.world.count(if power { "power losses of the primary" } else { "kills of the primary" }, 1);
        let length = primary.length();
        primary.stop(power);
        if primary.length() < length {
            self.bad(format!("D5: a power loss made the disk of {} shorter", primary.name));
        }
        for g in self.guests.take() {
            g.abandon();
        }
        self.bring_up(primary, true).await?;
        let Ok(disk) = primary.disk(&self.world).await else { return Err(Refusal::Gone) };
        let data = disk.read(self.wishes.area()).await;
        disk.disconnect();
        let Ok(data) = data else { return Err(Refusal::Gone) };
        let how = if power { Crash::PowerLoss } else { Crash::KillWriteThrough };
        let found = values_of(&data.contiguous(), 0);
        self.world.verdict().check("the primary after a crash", self.history.crash(&found, how));
        // The numbers of checkpoints go on above all that may have been used.
        let open = primary.info().await?["open-epoch"].as_u64().unwrap_or(0);
        // A secondary may be at a higher one still, of before a failover.
        self.before.set(self.before.get().max(open.saturating_sub(1)));
        self.made.borrow_mut().clear();
        self.start_guests();
        Ok(())
    }

    // ---- ends

    fn calm(&self) {
        for s in &self.sites {
            s.host.clear_faults();
            // also the disks that take a minute for some requests
            s.host.set_profile(Profile::calm());
            s.host.release_hung();
        }
    }

    /// Nothing fails any more: everybody gets in sync, and all disks are alike in the end.
    async fn peace(self: &Rc<Self>) -> Result<(), Refusal> {
        self.calm();
        self.world.net().set_profile(NetProfile::calm());
        self.world.net().cut(" 7000");
        // who lost a barrier stays as it is until it is started anew
        for s in &self.sites[1..] {
            s.stop(false);
            self.bring_up(s, false).await?;
        }
        self.in_sync(&self.sites[0], self.sites.len() - 1).await?;
        let guests = self.guests.take();
        let stopping = async {
            for g in &guests {
                g.stop().await;
            }
        };
        self.world.within(self.env(), PATIENCE, "guest requests", stopping).await;
        self.alike(&self.sites[0], &self.sites[1..].iter().collect::<Vec<_>>()).await?;
        self.world.verdict().check("history", self.history.check());
        self.world.count("ends in peace", 1);
        Ok(())
    }

    /// Waits until `primary` counts so many secondaries as copies.
    async fn in_sync(&self, primary: &Site, count: usize) -> Result<(), Refusal> {
        let waiting = async {
            loop {
                if self.copies(&primary.info().await?) >= count {
                    return Ok(());
                }
                if self.wishes.external {
                    self.managed_checkpoint().await?;
                }
                self.env().sleep(Duration::from_millis(50)).await;
            }
        };
        self.world
            .within(self.env(), PATIENCE, "getting in sync", waiting)
            .await
            .unwrap_or(Err(Refusal::Gone))
    }

    /// How many secondaries a primary counts as copies.
    fn copies(&self, info: &serde_json::Value) -> usize {
        let peers = info["peers"].as_array();
        peers.map_or(0, |all| all.iter().filter(|p| p["state"] == "running").count())
    }

    /// After a checkpoint all disks hold the same.
    async fn alike(&self, primary: &Site, others: &[&Site]) -> Result<(), Refusal> {
        self.last_checkpoint(primary, others.len()).await?;
        for s in others {
            if self.wishes.retain > 0 {
                // their disks stay behind: their users see it
                let view = self.read_all(s).await?;
                self.same(primary, &view, "what a secondary shows").await?;
                continue;
            }
            self.settle(s).await;
            let (here, there) = (primary.raw(), s.raw());
            if let Some(at) = (0..here.len()).find(|i| here[*i] != there[*i]) {
                self.bad(format!(
                    "I8: sector {at} holds {:?} on {} and {:?} on {} ({})",
                    here[at], primary.name, there[at], s.name, s.engine
                ));
            }
            let lengths = (primary.length(), s.length());
            let tail = |s: &Site| s.tail(self.wishes.disk, lengths.0);
            if lengths.1 < lengths.0 || tail(primary) != tail(s) {
                self.bad(format!(
                    "D5: what has grown is not the same on {} and {}: {lengths:?}",
                    primary.name, s.name
                ));
            }
            self.world.count("disks compared", 1);
        }
        Ok(())
    }

    /// A checkpoint that must come about, on all secondaries. One may fail, or lack one of them, because a store had become full; what was
    /// given up is in sync again then, and nothing more is written.
    async fn last_checkpoint(&self, primary: &Site, count: usize) -> Result<(), Refusal> {
        let m = primary.manager()?;
        let command = json!({"group": "g"});
        if self.wishes.external {
            m.must("replication-set", json!({"group": "g", "decision": "auto"})).await?;
        }
        let done = m.execute("replication-checkpoint", command.clone()).await;
        if done.is_err() || self.copies(&primary.info().await?) < count {
            self.world.count("last checkpoints that failed", 1);
            self.in_sync(primary, count).await?;
            m.must("replication-checkpoint", command).await?;
        }
        if self.wishes.external {
            m.must("replication-set", json!({"group": "g", "decision": "external"})).await?;
        }
        Ok(())
    }

    /// Waits until a secondary's disk holds what it committed.
    async fn settle(&self, site: &Site) {
        let settled = async {
            while site.info().await.is_ok_and(|i| i["buffer"]["pending"] != 0) {
                self.env().sleep(Duration::from_millis(10)).await;
            }
        };
        self.world.within(self.env(), PATIENCE, "applying", settled).await;
    }

    /// The primary is gone, or cut off; a secondary takes over.
    async fn failover(self: &Rc<Self>) -> Result<(), Refusal> {
        let alive = self.draw(|r| r.chance(0.4));
        let n = 1 + self.draw(|r| r.index(self.sites.len() - 1));
        let (old, new) = (&self.sites[0], &self.sites[n]);
        if alive {
            // its guests may write on; they learn of it when the link is back
            self.guests.borrow().iter().for_each(Guest::allow_errors);
            self.world.net().set_profile(self.nobody_is_reached(Duration::MAX));
            self.world.net().cut(" 7000");
        } else {
            old.stop(self.draw(|r| r.chance(0.5)));
            self.guests.borrow().iter().for_each(Guest::abandon);
        }
        if new.running.borrow().is_none() || self.draw(|r| r.chance(0.2)) {
            new.stop(false);
            self.calm();
            self.bring_up(new, false).await?;
        }
        self.calm();
        let at = self.committed(new).await.unwrap_or(0);
        let done = match new.manager()?.execute("replication-failover", json!({"group": "g"})).await {
            Ok(done) => done,
            Err(Refusal::Error(e)) if at == 0 && e.contains("never been synchronized") => return Ok(()),
            // a disk that failed at the wrong moment; started anew it can
            Err(Refusal::Error(_)) => {
                new.stop(false);
                self.bring_up(new, false).await?;
                new.manager()?.must("replication-failover", json!({"group": "g"})).await?
            }
            Err(e) => return Err(e),
        };
        self.world.count("failovers", 1);
        let epoch = done["epoch"].as_u64().unwrap_or(0);
        if epoch < at {
            self.bad(format!("I4: promoted at checkpoint {epoch}, it was at {at}"));
        }
        let mut now = self.read_all(new).await?;
        if epoch > self.before.get() {
            self.is_checkpoint(&now, epoch, "the promoted disk");
        }
        let listens = self.second_life(new, &mut now).await?;
        if alive && listens {
            self.reunion(old, new, &now).await?;
        }
        if self.sites.len() == 3 && !self.world.verdict().is_bad() {
            self.third(old, new).await?;
        }
        Ok(())
    }

    async fn read_all(&self, site: &Site) -> Result<Vec<Value>, Refusal> {
        let disk = site.disk(&self.world).await.map_err(|_| Refusal::Gone)?;
        let data =
            disk.read(self.wishes.area()).await.map_err(|e| Refusal::Error(format!("reading: {e}")))?;
        disk.disconnect();
        Ok(values_of(&data.contiguous(), 0))
    }

    /// The promoted disk is used, killed while it merges, and used again: what was flushed is there.
    /// Whether it can still be reached by the old primary.
    async fn second_life(&self, site: &Site, now: &mut [Value]) -> Result<bool, Refusal> {
        let (mut number, mut listens) = (SECOND_LIFE, true);
        for life in 0..2 {
            let disk = site.disk(&self.world).await.map_err(|_| Refusal::Gone)?;
            for _ in 0..self.draw(|r| r.between(1, 20)) {
                let (at, len) = self.draw(|r| {
                    let len = r.between(1, 40);
                    (r.below(self.wishes.sectors - len), len)
                });
                number += 1;
                disk.write(at * SECTOR, stamped(number, at, len), false)
                    .await
                    .map_err(|e| Refusal::Error(format!("writing to the promoted disk: {e}")))?;
                now[at as usize..(at + len) as usize].fill(Value::Write(number));
            }
            disk.flush().await.map_err(|e| Refusal::Error(format!("flushing the promoted disk: {e}")))?;
            disk.disconnect();
            if life == 0 && self.draw(|r| r.chance(0.5)) {
                site.stop(self.draw(|r| r.chance(0.5)));
                self.world.count("crashes while merging", 1);
                // a merge that had ended leaves a disk of its own, others go on with theirs
                if let Err(Refusal::Error(e)) = self.try_to_bring_up(site, false).await {
                    if !e.contains("demote") {
                        return Err(Refusal::Error(e));
                    }
                    site.stop(false);
                    self.world.count("crashes after merging", 1);
                    self.serve_alone(site).await?;
                    listens = false;
                }
            }
            self.same(site, now, "after the failover").await?;
        }
        let merged = async {
            while site.info().await.is_ok_and(|i| i["role"] == "secondary" && i["stage"] != "done") {
                self.env().sleep(Duration::from_millis(10)).await;
            }
        };
        self.world.within(self.env(), PATIENCE, "the merge", merged).await;
        if site.raw() != *now {
            self.bad("I3: the merged disk is not what its users see");
        }
        if site.length() != site.shown(&self.world).await? {
            self.bad("D5: the merged disk is longer than what its users see");
        }
        self.same(site, now, "after the merge").await?;
        Ok(listens)
    }

    async fn same(&self, site: &Site, now: &[Value], when: &str) -> Result<(), Refusal> {
        let found = self.read_all(site).await?;
        if let Some(at) = (0..now.len()).find(|i| found.get(*i) != now.get(*i)) {
            self.bad(format!(
                "{when}: sector {at} of {} holds {:?}, not {:?}",
                site.name,
                found.get(at),
                now[at]
            ));
        }
        Ok(())
    }

    /// The link to the old primary comes back.
    async fn reunion(&self, old: &Site, new: &Site, now: &[Value]) -> Result<(), Refusal> {
        self.world.net().set_profile(NetProfile::calm());
        let fenced = async {
            while old.info().await.is_ok_and(|i| i["state"] != "fenced") {
                self.env().sleep(Duration::from_millis(50)).await;
            }
        };
        self.world.within(self.env(), PATIENCE, "fencing the old primary", fenced).await;
        let guests = self.guests.take();
        let stopping = async {
            for g in &guests {
                g.stop().await;
            }
        };
        self.world.within(self.env(), PATIENCE, "guest requests of the old primary", stopping).await;
        self.world.count("old primaries fenced", 1);
        self.same(new, now, "after the old primary came back").await
    }

    /// The third host follows the new primary.
    async fn third(&self, old: &Site, new: &Site) -> Result<(), Refusal> {
        self.guests.take().iter().for_each(Guest::abandon);
        old.stop(false);
        let Some(other) = self.sites[1..].iter().find(|s| s.name != new.name) else { return Ok(()) };
        self.world.net().set_profile(NetProfile::calm());
        other.stop(false);
        self.bring_up(other, false).await?;
        let m = new.manager()?;
        self.know(&m, other).await?;
        if new.info().await?["role"] == "secondary" {
            m.must("replication-start", json!({"group": "g", "role": "primary"})).await?;
        }
        self.in_sync(new, 1).await?;
        self.world.count("third hosts that follow", 1);
        self.alike(new, &[other]).await
    }
}
