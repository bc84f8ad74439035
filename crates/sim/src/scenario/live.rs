//! The whole daemon: guests on an NBD export, a mirror beneath them, a manager that meddles, faults, and an end of any kind.
//!
//! Everything goes through bytes on sockets, as in life. What is checked, besides what [`Manager`] and [`Guest`] check as
//! they go (reference/reliability.md 7.1):
//! * guest reads are linearizable, through job, pivot and late exports; a guest never sees faults of the target;
//! * while actively synced, every answered write is on the target;
//! * after completion the target is the disk; after a soft cancel the target is the disk at one instant in between;
//! * flushed data survives kill and power loss; images check clean (leaks only after a crash);
//! * once nothing fails any more everything ends, and everything is given back.

use super::plan::{End, Plan, Store, Trouble, check_qcow2};
use crate::boot::{Booted, FAR_NBD, nbd};
use crate::history::{Crash, History, Moment, What};
use crate::runner::Outcome;
use crate::{
    Disk, Fault, Guest, Habits, JobSeen, Manager, NbdDisk, NetProfile, Op, Process, Profile, Refusal, Rng,
    Rule, Value, World, read_all, values_of,
};
use block::{BlockError, Data, SECTOR, Span};
use copy::digest::{Leaves, unit_for, unit_hash};
use env::Env;
use nbd::Mode;
use serde_json::json;
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

/// Everything must have ended so long after the last fault, in virtual time.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest a fault lasts.
const TROUBLE: Duration = Duration::from_secs(4);

/// One seed, with a mirror.
pub fn whole_daemon(seed: u64, verbose: bool) -> Outcome {
    play(seed, verbose, |_| {})
}

/// One seed, with a mirror to another daemon over a link that is cut, or whose other end is killed or loses its power, and
/// that the job waits for.
pub fn link(seed: u64, verbose: bool) -> Outcome {
    play(seed, verbose, |plan| {
        let chance = plan.end_after.subsec_nanos();
        plan.target = Store::Nbd;
        plan.link_loss = true;
        plan.far_power = !chance.is_multiple_of(3);
        plan.trouble = if chance.is_multiple_of(5) { Trouble::Link } else { Trouble::Restart };
        plan.net.cut = 0.0;
        if plan.sync == "top" {
            plan.sync = "full";
        }
        plan.end = match plan.end {
            End::SoftCancel | End::HardCancel => plan.end,
            _ if plan.sync == "none" => End::SoftCancel,
            _ => End::Complete,
        };
    })
}

/// One seed of the daemon serving a disk, without a job.
pub fn served(seed: u64, verbose: bool) -> Outcome {
    play(seed, verbose, |plan| {
        plan.mirror = false;
        if !matches!(plan.end, End::Kill | End::PowerLoss | End::Quit) {
            plan.end = End::Quit;
        }
    })
}

fn play(seed: u64, verbose: bool, change: fn(&mut Plan)) -> Outcome {
    World::play(seed, verbose, move |w| async move {
        let mut rng = w.rng("plan");
        let mut plan = Plan::drawn(&mut rng);
        change(&mut plan);
        w.machine().say(|| format!("{plan:#?}"));
        let run = Run::new(w, plan, rng);
        Rc::new(run).go().await;
    })
}

struct Run {
    world: World,
    plan: Plan,
    rng: RefCell<Rng>,
    history: Rc<History>,
    /// Where guests and manager live: a process that is never killed.
    outside: Env,
    _outside: Process,
    /// The daemon that has an NBD target; also while it is still being told to export it.
    far: RefCell<Option<Rc<Booted>>>,
    guests: RefCell<Vec<Guest>>,
    /// Actively synced was seen, and nothing since may have ended that.
    synced: Cell<bool>,
    /// The copy mode; nobody knows while it is being switched.
    mode: Cell<Option<&'static str>>,
    /// The moment after the job's command was answered.
    job_began: Cell<Moment>,
    /// The moment before the cancel was sent.
    asked_at: Cell<Moment>,
    asked: Cell<bool>,
    /// The job is being told to complete.
    asking: Cell<bool>,
    /// How often the other daemon lost its power.
    far_losses: Cell<u64>,
    /// How often the link to it was lost, and when at last.
    link_lost: Cell<(u64, Duration)>,
    /// An export of the source is being added: the guest's disk must not change until it is.
    adding: Cell<bool>,
    /// Some guest discards: a discard that leaves data behind is compared by copying, and ends actively synced.
    discards: Cell<bool>,
}

impl Run {
    fn new(world: World, plan: Plan, rng: Rng) -> Run {
        let (outside, process) = world.start();
        let history = Rc::new(History::told_by(world.machine()));
        Run {
            world,
            mode: Cell::new(Some(plan.copy_mode)),
            plan,
            rng: RefCell::new(rng),
            history,
            outside,
            _outside: process,
            far: RefCell::default(),
            guests: RefCell::default(),
            synced: Cell::new(false),
            job_began: Cell::new(0),
            asked_at: Cell::new(0),
            asked: Cell::new(false),
            asking: Cell::new(false),
            far_losses: Cell::new(0),
            link_lost: Cell::default(),
            adding: Cell::new(false),
            discards: Cell::new(false),
        }
    }

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

    async fn go(self: Rc<Self>) {
        let host = self.world.host();
        self.draw(|r| self.plan.install(host, &self.history, r));
        host.set_profile(self.plan.profile.clone());
        let mut net = self.plan.net.clone();
        net.faults_end = self.outside.now() + TROUBLE;
        // guests lose their connections; the manager keeps its
        net.faults_at = "/nbd".to_owned();
        self.world.net().set_profile(net);
        let Some(daemon) = Booted::start(&self.world).await else { return };
        if self.plan.target == Store::Nbd && !self.start_far().await {
            return;
        }
        let (life, alive) = (self.clone(), self.live(&daemon));
        let limit = PATIENCE + TROUBLE * 10;
        let ended = self.world.within(&life.outside, limit, "the run", alive).await;
        if self.world.verdict().is_bad() {
            return;
        }
        let Some(ended) = ended else { return };
        self.history_is_good();
        self.finish(daemon, ended).await;
        self.world.count("operations", self.history.len() as u64);
        self.world.count("answered", self.history.answered() as u64);
        self.world.count("faults", self.world.host().faults());
    }

    /// Starts the daemon that exports the target. Whether it runs.
    async fn start_far(&self) -> bool {
        let Some(far) = Booted::start_far(&self.world).await else { return false };
        let far = Rc::new(far);
        // At once: the run may end before it is ready, and whoever ends it must know of this daemon (seeds 364, 2309).
        *self.far.borrow_mut() = Some(far.clone());
        let ready = async {
            let m = far.manage(&self.world, &self.outside, &self.history).await?;
            let node =
                json!({"driver": "file", "node-name": "far", "filename": "/target.img", "discard": "unmap"});
            m.must("blockdev-add", node).await?;
            m.must("nbd-server-start", json!({"addr": Booted::far_address(), "max-connections": 0})).await?;
            let export =
                json!({"type": "nbd", "id": "e", "node-name": "far", "name": "far", "writable": true});
            m.must("block-export-add", export).await.map(drop)
        };
        let ready = self.world.within(&self.outside, PATIENCE, "starting the other daemon", ready).await;
        matches!(ready, Some(Ok(())))
    }

    fn history_is_good(&self) {
        self.world.verdict().check("guests", self.history.check());
    }

    /// From the first command to the end of the job (or to the moment of the crash).
    async fn live(self: &Rc<Self>, daemon: &Booted) -> Ended {
        match self.live_or_gone(daemon).await {
            Ok(ended) => ended,
            Err(Refusal::Gone) => {
                self.bad("the monitor's connection broke");
                Ended::Crash
            }
            Err(Refusal::Error(_)) => Ended::Crash,
        }
    }

    async fn live_or_gone(self: &Rc<Self>, daemon: &Booted) -> Result<Ended, Refusal> {
        let m = daemon.manage(&self.world, &self.outside, &self.history).await?;
        m.must("blockdev-add", self.plan.node("source", self.plan.source)).await?;
        m.must("blockdev-add", self.plan.node("target", self.plan.target)).await?;
        let server = json!({"addr": Booted::nbd_address(), "max-connections": 0});
        m.must("nbd-server-start", server).await?;
        m.must("block-export-add", export("e0", "disk")).await?;
        for n in 0..self.plan.guests {
            self.start_guest(n, "disk");
        }
        self.pause(Duration::from_millis(100)).await;
        if self.plan.mirror {
            m.must("blockdev-mirror", self.plan.mirror()).await?;
            self.job_began.set(self.history.tick());
            self.world.count("jobs", 1);
        }
        let trouble = self.clone();
        let trouble = self.outside.spawn("trouble", async move { trouble.trouble().await });
        let (meddler, on) = (self.clone(), m.clone());
        let meddler = self.outside.spawn("meddler", async move {
            // a refusal is as good as a success, a broken connection is somebody else's finding
            let _ = meddler.meddle(&on).await;
        });
        if matches!(self.plan.end, End::Kill | End::PowerLoss | End::Quit) {
            self.outside.sleep(self.plan.end_after).await;
            trouble.cancel();
            meddler.cancel();
            return Ok(Ended::Crash);
        }
        let seen = self.drive(&m, &daemon.process).await?;
        meddler.cancel();
        self.judge(&seen);
        trouble.join().await;
        self.after_the_job(&m).await?;
        Ok(Ended::Job(seen))
    }

    fn start_guest(self: &Rc<Self>, client: u32, name: &'static str) {
        let habits = self.draw(|r| Habits {
            requests: *r.choose(&[60, 200, 400]),
            errors_allowed: self.plan.trouble == Trouble::Source,
            breaks_allowed: self.plan.trouble == Trouble::Network
                || matches!(self.plan.end, End::Kill | End::PowerLoss | End::Quit),
            ..Habits::drawn(r, client, self.plan.sectors)
        });
        self.discards.set(self.discards.get() || habits.discards > 0 && self.plan.unmap);
        let mode = self.draw(|r| *r.choose(&[Mode::Simple, Mode::Structured, Mode::Extended]));
        let dial = NbdDisk::dial(&self.outside, nbd(), name, mode, self.world.verdict());
        let rng = self.world.rng("guest");
        let verdict = self.world.verdict().clone();
        let guest = Guest::start(&self.outside, habits, self.history.clone(), verdict, rng, dial);
        let run = Rc::downgrade(self);
        guest.on_write(move |n, at| {
            if let Some(run) = run.upgrade() {
                run.answered(n, at);
            }
        });
        self.guests.borrow_mut().push(guest);
    }

    /// A write was answered: while actively synced, a raw target has it, or something not older.
    fn answered(&self, n: u32, at: Range<u64>) {
        self.world.machine().say(|| format!("answered write #{n} of {at:?}"));
        if !self.synced.get() || self.discards.get() || self.plan.target.holds_metadata() {
            return;
        }
        let mine = self.history.record(n);
        if self.plan.sync == "none" && mine.start < self.job_began.get() {
            return;
        }
        self.world.count("synced writes checked", 1);
        let Some(image) = self.world.host().image("/target.img") else { return };
        let bytes = image.read(Span::between(at.start * SECTOR, at.end * SECTOR));
        for (value, sector) in values_of(&bytes, at.start).into_iter().zip(at) {
            let newer = match value {
                Value::Write(w) => w == n || self.history.record(w).end.is_none_or(|end| end > mine.start),
                Value::Zero => self.history.zeroed_since(sector, mine.start),
                Value::Garbage => false,
            };
            if !newer {
                self.bad(format!(
                    "actively synced, but write #{n} was answered while sector {sector} of the target holds {value:?}"
                ));
            }
        }
    }

    /// Faults come, and go.
    async fn trouble(&self) {
        self.pause(Duration::from_secs(1)).await;
        let host = self.world.host();
        let path = if self.plan.trouble == Trouble::Source { "/source.img" } else { "/target.img" };
        if self.plan.trouble == Trouble::TargetHangs {
            self.draw(|r| {
                let ops = [Op::Write, Op::Read, Op::Barrier, Op::Zero];
                for _ in 0..r.between(1, 3) {
                    host.fault(Rule { skip: r.below(20), ..Rule::once(path, *r.choose(&ops), Fault::Hang) });
                }
            });
        }
        if matches!(self.plan.trouble, Trouble::Target | Trouble::Source) {
            self.draw(|r| {
                for _ in 0..r.between(1, 4) {
                    let op = *r.choose(&[
                        Op::Read,
                        Op::Write,
                        Op::Write,
                        Op::Zero,
                        Op::Discard,
                        Op::Barrier,
                        Op::Extents,
                    ]);
                    let errno = *r.choose(&[BlockError::EIO, BlockError::ENOSPC, BlockError::EDQUOT]);
                    let fault = if r.chance(0.3) { Fault::Torn(errno) } else { Fault::Errno(errno) };
                    let times = *r.choose(&[1, 1, 3, 1000]);
                    host.fault(Rule { skip: r.below(30), times, ..Rule::once(path, op, fault) });
                }
            });
        }
        match self.plan.trouble {
            Trouble::Link => {
                for _ in 0..self.draw(|r| r.between(1, 4)) {
                    self.world.count("links cut", 1);
                    self.world.net().cut(FAR_NBD);
                    self.link_is_lost();
                    self.pause(Duration::from_millis(300)).await;
                }
            }
            Trouble::Restart => {
                let far = self.far.take();
                // once the guest may be on the target, what it wrote and did not flush may not go behind its back
                let power = self.plan.far_power && !self.asked.get() && !self.asking.get();
                for f in far.iter() {
                    match power {
                        true => self.world.host().power_loss_at("/target.img", &f.process),
                        false => f.process.kill(),
                    }
                }
                self.far_losses.set(self.far_losses.get() + u64::from(power));
                self.link_is_lost();
                self.world.count(if power { "far power losses" } else { "restarts" }, 1);
                self.pause(Duration::from_millis(300)).await;
                self.start_far().await;
            }
            _ => {}
        }
        let lasts = self.draw(|r| r.duration(Duration::from_millis(1), TROUBLE));
        self.outside.sleep(lasts).await;
        host.clear_faults();
        host.release_hung();
    }

    /// Verbs at random points; what they are answered does not matter, what they do is checked elsewhere.
    async fn meddle(self: &Rc<Self>, m: &Rc<Manager>) -> Result<(), Refusal> {
        if self.plan.late_export {
            self.pause(Duration::from_millis(200)).await;
            let over = |j: JobSeen| matches!(j.status.as_str(), "waiting" | "pending" | "concluded" | "null");
            // by then the disk may have moved to the target
            if !self.asked.get() && !over(m.job("job")) {
                self.adding.set(true);
                if m.execute("block-export-add", export("e1", "late")).await.is_ok() {
                    self.world.count("late exports", 1);
                    self.start_guest(100, "late");
                }
                self.adding.set(false);
            }
        }
        if let Some(mode) = self.plan.switch_mode.filter(|_| !self.plan.switch_when_ready) {
            self.pause(Duration::from_millis(500)).await;
            self.change_mode(m, mode).await;
        }
        for _ in 0..self.plan.meddling {
            self.pause(Duration::from_millis(100)).await;
            let verb = self.draw(|r| r.below(7));
            let _ = match verb {
                0 | 1 => m.execute("job-pause", json!({"id": "job"})).await,
                2 | 3 => m.execute("job-resume", json!({"id": "job"})).await,
                4 => {
                    let speed = self.draw(|r| *r.choose(&[0u64, 1, 100_000, 1 << 30]));
                    m.execute("block-job-set-speed", json!({"device": "job", "speed": speed})).await
                }
                5 => m.execute("query-block-jobs", json!({})).await,
                _ => m.execute("query-jobs", json!({})).await,
            };
        }
        // a crawl would outlast the run's patience
        let _ = m.execute("block-job-set-speed", json!({"device": "job", "speed": 0})).await;
        Ok(())
    }

    async fn change_mode(&self, m: &Manager, mode: &'static str) {
        self.synced.set(false);
        self.mode.set(None);
        let arguments = json!({"id": "job", "type": "mirror", "copy-mode": mode});
        if m.execute("block-job-change", arguments).await.is_ok() {
            self.world.count("mode switches", 1);
            self.mode.set(Some(mode));
        }
    }

    /// Takes the job to its end as the plan says.
    async fn drive(&self, m: &Manager, daemon: &Process) -> Result<JobSeen, Refusal> {
        let began = self.outside.now();
        loop {
            self.check_window(daemon);
            let seen = m.job("job");
            let id = json!({"id": "job"});
            match seen.status.as_str() {
                "null" => return Ok(seen),
                "concluded" if self.plan.manual_dismiss => {
                    self.pause(Duration::from_millis(20)).await;
                    m.must("job-dismiss", id).await?;
                }
                "pending" if self.plan.manual_finalize => {
                    self.pause(Duration::from_millis(50)).await;
                    let _ = m.execute("job-finalize", id).await;
                }
                "paused" | "standby" if self.draw(|r| r.chance(0.3)) => {
                    let _ = m.execute("job-resume", id).await;
                }
                "ready" if !self.asked.get() && !self.adding.get() => self.when_ready(m).await,
                _ => {}
            }
            let early = self.plan.end == End::HardCancel && self.outside.now() >= began + self.plan.end_after;
            if early && !self.asked.replace(true) {
                self.synced.set(false);
                let _ = m.execute("job-cancel", json!({"id": "job"})).await;
            }
            self.pause(Duration::from_millis(30)).await;
        }
    }

    async fn when_ready(&self, m: &Manager) {
        self.world.count("ready", 1);
        if let Some(mode) = self.plan.switch_mode.filter(|_| self.plan.switch_when_ready)
            && self.mode.get() == Some(self.plan.copy_mode)
        {
            // there and back again: each time slow writes of the mode before are under way for a while
            let both = [mode, self.plan.copy_mode];
            for mode in both.into_iter().cycle().take(self.draw(|r| r.between(1, 7)) as usize) {
                self.change_mode(m, mode).await;
                for _ in 0..if mode == "background" { 1 } else { 8 } {
                    self.look_whether_synced(m).await;
                    self.pause(Duration::from_millis(3)).await;
                }
            }
        }
        for _ in 0..self.draw(|r| r.below(6)) {
            self.pause(Duration::from_millis(40)).await;
            self.look_whether_synced(m).await;
        }
        if self.adding.get() {
            return;
        }
        match self.plan.end {
            End::Complete => {
                // from now on the target is the disk: what is checked is what the guest reads
                self.synced.set(false);
                if self.plan.trouble == Trouble::Target || self.loses_link() {
                    self.guests.borrow().iter().for_each(Guest::allow_errors);
                }
                self.asked.set(true);
                self.asking.set(true);
                self.asked.set(m.execute("block-job-complete", json!({"device": "job"})).await.is_ok());
            }
            End::SoftCancel => {
                self.synced.set(false);
                self.asked_at.set(self.history.tick());
                self.asked.set(true);
                let sent = m.execute("block-job-cancel", json!({"device": "job"})).await;
                self.asked.set(sent.is_ok());
            }
            _ => {}
        }
    }

    async fn look_whether_synced(&self, m: &Manager) {
        let blocking = |mode| matches!(mode, Some("write-blocking" | "read-write-blocking"));
        if !blocking(self.mode.get()) || self.asked.get() {
            return;
        }
        let (asked_at, losses) = (self.history.tick(), self.link_lost.get().0);
        if !self.link_has_held(losses) {
            return;
        }
        if let Ok(jobs) = m.execute("query-block-jobs", json!({})).await
            && jobs[0]["actively-synced"] == true
            && blocking(self.mode.get())
            && !self.asked.get()
            && self.link_has_held(losses)
        {
            self.world.count("actively synced", 1);
            if !self.synced.get() {
                self.target_has_all(asked_at);
            }
            // A request that fails on either side leaves a part dirty, and that ends it, until it is copied.
            let fails = matches!(self.plan.trouble, Trouble::Source | Trouble::Target)
                || self.loses_link()
                || self.plan.bridges_in_job();
            self.synced.set(!fails);
        }
    }

    /// The link to the other daemon is gone: what that had not flushed is in doubt, also if nobody is told, and copied again.
    fn link_is_lost(&self) {
        self.link_lost.set((self.link_lost.get().0 + 1, self.outside.now()));
        self.synced.set(false);
    }

    /// Whether nothing has been lost since `losses` were counted, and the daemon knows of all of those.
    fn link_has_held(&self, losses: u64) -> bool {
        let (count, at) = self.link_lost.get();
        count == losses && self.outside.now() >= at + Duration::from_millis(1)
    }

    /// Whether requests to the target may fail because the other daemon is not there for a while.
    fn loses_link(&self) -> bool {
        matches!(self.plan.trouble, Trouble::Link | Trouble::Restart) && !self.plan.bridges()
    }

    /// Actively synced was reported for a moment after `asked_at`: all that was answered before is on the target. (What is
    /// answered after is looked at as it happens, in [`Run::answered`].)
    fn target_has_all(&self, asked_at: Moment) {
        if self.plan.target.holds_metadata() || self.plan.sync != "full" {
            return;
        }
        let Some(image) = self.world.host().image("/target.img") else { return };
        let found = values_of(&image.read(Span::new(0, self.plan.bytes())), 0);
        self.world.count("synced targets checked", 1);
        self.world.verdict().check("actively synced", self.history.has_all_since(&found, asked_at));
    }

    /// The window of the copy holds: what is in flight (memory, and what a guest's request has to wait for) has a bound.
    fn check_window(&self, daemon: &Process) {
        let copies = daemon.tasks_named("copy");
        if copies > copy::MAX_IN_FLIGHT as usize {
            self.bad(format!("{copies} copies are in flight, more than {}", copy::MAX_IN_FLIGHT));
        }
    }

    /// The job is over: was that an end it may have had?
    fn judge(&self, seen: &JobSeen) {
        let expected_fault = matches!(self.plan.trouble, Trouble::Target | Trouble::Source)
            && self.world.host().faults() > 0
            || (self.loses_link() && !self.plan.link_loss);
        match &seen.completed {
            Some(None) if self.far_losses.get() > 0 => {
                self.world.count("completed after far power losses", 1)
            }
            Some(None) => self.world.count(
                match self.plan.end {
                    End::Complete => "completed",
                    _ => "cancelled softly",
                },
                1,
            ),
            Some(Some(error)) => {
                self.world.count("failed", 1);
                if !expected_fault {
                    self.bad(format!("the job failed although nothing else did: {error}"));
                }
            }
            None => self.world.count("cancelled", 1),
        }
        if seen.mismatches > 0 {
            self.bad("source and target were said to differ, which they never did");
        }
        if seen.cancelled && self.plan.end != End::HardCancel {
            self.bad("the job was cancelled, but nobody asked for that");
        }
    }

    /// Guests go on for a while on what is the disk now; then everything is taken down through QMP.
    async fn after_the_job(&self, m: &Manager) -> Result<(), Refusal> {
        self.pause(Duration::from_millis(50)).await;
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
        self.world.net().set_profile(NetProfile::calm());
        let last = async || {
            let d = NbdDisk::connect(&self.outside, &nbd(), "disk", Mode::Structured, self.world.verdict())
                .await?;
            read_all(&*d, &self.history, u32::MAX).await?;
            let n = self.history.begin(u32::MAX, What::Flush, 0..0);
            d.flush().await?;
            self.history.end(n);
            d.disconnect();
            Ok::<(), BlockError>(())
        };
        let last = async {
            // a link that was lost comes back in a while
            let mut tries = if self.loses_link() { 30 } else { 1 };
            loop {
                tries -= 1;
                match last().await {
                    Err(_) if tries > 0 => self.outside.sleep(Duration::from_secs(1)).await,
                    done => return done,
                }
            }
        };
        if let Some(Err(e)) = self.world.within(&self.outside, PATIENCE, "the last read", last).await {
            self.bad(format!("the last read of everything: {e:?}"));
        }
        if self.plan.late_export {
            let _ = m.execute("block-export-del", json!({"id": "e1", "mode": "hard"})).await;
        }
        m.must("block-export-del", json!({"id": "e0", "mode": "hard"})).await?;
        let left = m.must("query-jobs", json!({})).await?;
        if left != json!([]) {
            self.bad(format!("jobs are left: {left}"));
        }
        for node in ["source", "target"] {
            self.delete(m, node).await?;
        }
        Ok(())
    }

    /// Exports go a moment after their command was answered; then nothing may hold the node any more.
    async fn delete(&self, m: &Manager, node: &str) -> Result<(), Refusal> {
        let mut refused = String::new();
        for _ in 0..100 {
            match m.execute("blockdev-del", json!({"node-name": node})).await {
                Ok(_) => return Ok(()),
                Err(Refusal::Error(e)) => refused = e,
                Err(Refusal::Gone) => return Err(Refusal::Gone),
            }
            self.outside.sleep(Duration::from_millis(100)).await;
        }
        self.bad(format!("node {node} is still held after everything ended: {refused}"));
        Ok(())
    }

    /// The daemon ends (or crashes), and what it leaves is looked at.
    async fn finish(&self, daemon: Booted, ended: Ended) {
        let host = self.world.host();
        let how = match self.plan.end {
            End::Kill => {
                self.world.count("kills", 1);
                daemon.process.kill();
                Crash::Kill
            }
            End::PowerLoss => {
                self.world.count("power losses", 1);
                let far = self.far.take();
                let all: Vec<&Process> = far.iter().map(|f| &f.process).chain([&daemon.process]).collect();
                host.power_loss(&all);
                Crash::PowerLoss
            }
            _ => {
                host.clear_faults();
                host.release_hung();
                daemon.quit(&self.world, &self.outside).await;
                Crash::KillWriteThrough
            }
        };
        self.guests.borrow().iter().for_each(Guest::abandon);
        let far = self.far.take();
        if let Some(far) = far {
            host.clear_faults();
            host.release_hung();
            far.quit(&self.world, &self.outside).await;
        }
        Booted::all_have_quit(&self.world);
        host.clear_faults();
        host.set_profile(Profile { inline: 1.0, ..Profile::calm() });
        self.world.net().set_profile(NetProfile::calm());
        self.check_images(how != Crash::KillWriteThrough || self.plan.trouble == Trouble::Source);
        let completed = matches!(&ended, Ended::Job(j) if j.completed == Some(None));
        let pivoted = completed && self.plan.end == End::Complete;
        let (name, store) = if pivoted { ("target", self.plan.target) } else { ("source", self.plan.source) };
        if let Some(found) = self.read_at_rest(name, store).await {
            let how =
                if how == Crash::Kill && !store.holds_metadata() { Crash::KillWriteThrough } else { how };
            self.world.verdict().check(&format!("{name} at rest"), self.history.crash_peek(&found, how));
        }
        if let (true, Ended::Job(seen)) = (completed, &ended) {
            self.check_proof(
                seen,
                if pivoted { ("source", self.plan.source) } else { ("target", self.plan.target) },
            );
        }
        if completed && self.plan.end == End::SoftCancel && self.plan.sync != "none" {
            self.check_instant(&ended).await;
        }
        if completed && !self.world.verdict().is_bad() {
            // what the last flush covered is there without power, too
            host.power_loss(&[]);
            if let Some(found) = self.read_at_rest(name, store).await {
                let result = self.history.crash(&found, Crash::PowerLoss);
                self.world.verdict().check(&format!("{name} after power loss"), result);
            }
        }
    }

    /// A job with full verification tells the digest of the instant at which the two were equal: of what nobody wrote after it.
    fn check_proof(&self, seen: &JobSeen, (name, store): (&str, Store)) {
        if self.plan.verify.is_none_or(|v| v.0 != "full") {
            return;
        }
        let Some(told) = &seen.digest else {
            return self.bad("the job completed with full verification, but without a digest");
        };
        let image = self.world.host().image(&format!("/{name}.img")).filter(|_| !store.holds_metadata());
        let Some(image) = image else { return };
        self.world.count("digests checked", 1);
        let len = self.plan.bytes();
        let (unit, mut leaves) = (unit_for(len), Leaves::new(len));
        for at in Span::new(0, len).pieces(unit) {
            leaves.set(at.start, unit_hash(&Data::from(image.read(at)), unit));
        }
        if leaves.digest().to_string() != *told {
            self.bad(format!("the digest told is not that of {name} at that instant"));
        }
    }

    async fn check_instant(&self, ended: &Ended) {
        let Ended::Job(seen) = ended else { return };
        if let Some(found) = self.read_at_rest("target", self.plan.target).await {
            let result = self.history.one_instant(&found, self.asked_at.get(), seen.ended_at);
            self.world.verdict().check("target after a soft cancel", result);
        }
    }

    fn check_images(&self, leaks_allowed: bool) {
        for (name, store) in [("source", self.plan.source), ("target", self.plan.target)] {
            let image = self.world.host().image(&format!("/{name}.img"));
            if let (true, Some(image)) = (store.holds_metadata(), image) {
                self.world.count("images checked", 1);
                let leaks_allowed = leaks_allowed || (name == "target" && self.plan.trouble != Trouble::None);
                self.world.verdict().check(&format!("/{name}.img"), check_qcow2(&image, leaks_allowed));
            }
        }
    }

    /// The values of an image, through a daemon of its own.
    async fn read_at_rest(&self, name: &str, store: Store) -> Option<Vec<Value>> {
        if self.world.verdict().is_bad() {
            return None;
        }
        if !store.holds_metadata() {
            let image = self.world.host().image(&format!("/{name}.img"))?;
            return Some(values_of(&image.read(Span::new(0, self.plan.bytes())), 0));
        }
        let daemon = Booted::start(&self.world).await?;
        let values = async {
            let m = daemon.manage(&self.world, &self.outside, &self.history).await?;
            m.must("blockdev-add", self.plan.node(name, store)).await?;
            m.must("nbd-server-start", json!({"addr": Booted::nbd_address()})).await?;
            let export = json!({"type": "nbd", "id": "e", "node-name": name, "name": "disk"});
            m.must("block-export-add", export).await?;
            let d = NbdDisk::connect(&self.outside, &nbd(), "disk", Mode::Structured, self.world.verdict())
                .await
                .map_err(|e| Refusal::Error(e.to_string()))?;
            read_all(&*d, &History::new(), 0).await.map_err(|e| Refusal::Error(e.to_string()))
        };
        match self.world.within(&self.outside, PATIENCE, "reading an image at rest", values).await? {
            Ok(values) => {
                daemon.quit(&self.world, &self.outside).await;
                Booted::all_have_quit(&self.world);
                Some(values)
            }
            Err(e) => {
                self.bad(format!("{name} cannot be read after the end: {e}"));
                None
            }
        }
    }
}

enum Ended {
    /// The job came to its end.
    Job(JobSeen),
    /// The run is to crash (or quit) now.
    Crash,
}

fn export(id: &str, name: &str) -> serde_json::Value {
    json!({"type": "nbd", "id": id, "node-name": "source", "name": name, "writable": true})
}
