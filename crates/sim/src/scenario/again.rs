//! A daemon with a state directory that dies again and again, under guests, mirrors and snapshots.
//!
//! Each life begins with what the last one left: `Daemon::use_state` over the simulated disk, with the store's own writes and those of
//! the logs of changes in flight when the process was killed or the power failed. What is checked:
//! * the export is there as soon as it was acknowledged, and nothing is broken;
//! * what guests had flushed is on the disk that is exported now, whichever image that is by then;
//! * jobs are there again and come to their end; guest reads are linearizable in each life;
//! * mirrors go on where they were, over kills, power losses, quits and lost links, and what they have made is the disk: all of it
//!   is read after a pivot, and all of a copy of one instant is compared with the disk;
//! * in [`instants`], where most jobs are backups: what one has made is the disk as of the instant that it says, its start or a restart,
//!   whichever part of it an earlier life had copied.

use super::again_work::{Copying, Far, Instant, Stage};
use crate::boot::{Booted, nbd};
use crate::history::{Crash, History, Moment};
use crate::runner::Outcome;
use crate::{Guest, Habits, Manager, NbdDisk, Process, Profile, Refusal, Rng, World, read_all};
use ::nbd::Mode;
use env::{Env, TaskHandle};
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Everything a life begins or ends with must be done so soon, in virtual time.
const PATIENCE: Duration = Duration::from_secs(120);

/// One seed.
pub fn again(seed: u64, verbose: bool) -> Outcome {
    play(seed, verbose, false)
}

/// One seed of lives with backups.
pub fn instants(seed: u64, verbose: bool) -> Outcome {
    play(seed, verbose, true)
}

fn play(seed: u64, verbose: bool, backups: bool) -> Outcome {
    World::play(seed, verbose, move |w| async move {
        let (mut rng, (outside, process)) = (w.rng("plan"), w.start());
        let stage = Stage::drawn(&mut rng);
        w.machine().say(|| format!("{stage:?}"));
        let history = Rc::new(History::told_by(w.machine()));
        let lives = Lives {
            far: Far::new(&w, &outside),
            world: w,
            rng: RefCell::new(rng),
            stage,
            backups,
            history,
            outside,
            _outside: process,
            images: Cell::new(0),
            forms: RefCell::default(),
            exported: Cell::new(false),
            formats: Cell::new(false),
            job: RefCell::new(None),
            fast: Cell::new(false),
        };
        Rc::new(lives).go().await;
    })
}

pub(super) struct Lives {
    pub(super) world: World,
    rng: RefCell<Rng>,
    pub(super) stage: Stage,
    /// Most jobs are backups.
    pub(super) backups: bool,
    pub(super) history: Rc<History>,
    /// Where guests and manager live.
    pub(super) outside: Env,
    _outside: Process,
    /// The daemon that has the targets behind links.
    pub(super) far: Rc<Far>,
    /// Images made so far.
    pub(super) images: Cell<u32>,
    /// How nodes are stored.
    pub(super) forms: RefCell<BTreeMap<String, super::again_work::Form>>,
    /// The export was acknowledged.
    exported: Cell<bool>,
    /// Some image in use is a format, which keeps metadata back until a flush.
    pub(super) formats: Cell<bool>,
    /// The copy that was started last.
    pub(super) job: RefCell<Option<Copying>>,
    /// The last life: jobs are to end.
    pub(super) fast: Cell<bool>,
}

/// How a life ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Kill,
    PowerLoss,
    Quit,
}

impl Lives {
    pub(super) fn draw<T>(&self, f: impl FnOnce(&mut Rng) -> T) -> T {
        f(&mut self.rng.borrow_mut())
    }

    pub(super) fn bad(&self, what: impl Into<String>) {
        self.world.verdict().violation(what);
    }

    async fn go(self: Rc<Self>) {
        self.world.host().set_profile(self.draw(Profile::drawn_calm));
        self.world.host().let_names_be_lost();
        let lives = self.draw(|r| r.between(2, 5));
        let mut died = None;
        for life in 0..=lives {
            self.world.machine().say(|| format!("life {life}"));
            if self.stage.far && !self.far.is_up() && !self.far.start().await {
                return self.bad("the other daemon does not start");
            }
            let Some(daemon) = Booted::start_again(&self.world, Some(self.stage.geometry)).await else {
                return;
            };
            let begun = self.world.within(&self.outside, PATIENCE, "coming back", self.begin(&daemon, died));
            let Some(Ok(m)) = begun.await else {
                return self.bad(format!("life {life} does not begin"));
            };
            if self.world.verdict().is_bad() {
                return;
            }
            let guests: Vec<Guest> =
                (0..self.draw(|r| r.between(1, 2))).map(|n| self.start_guest(n as u32)).collect();
            if life == lives {
                return self.last(daemon, &m, &guests).await;
            }
            let busy = self.clone();
            let work = self.outside.spawn("manager", async move {
                // ends with the daemon
                let _ = busy.work(&m).await;
            });
            self.far.trouble(self.stage.far);
            let lasts = self.draw(|r| {
                // what a backup has copied is known to a later life after seconds
                let most = match self.backups {
                    true => *r.choose(&[200, 800, 4000, 4000, 12_000, 12_000]),
                    false => *r.choose(&[30, 200, 200, 800, 800, 4000, 12_000]),
                };
                r.duration(Duration::from_millis(1), Duration::from_millis(most))
            });
            self.outside.sleep(lasts).await;
            // what it has asked for goes on
            work.cancel();
            died = Some(self.crash(&daemon).await);
            guests.iter().for_each(Guest::abandon);
            self.far.calm().await;
            if self.world.verdict().is_bad() {
                return;
            }
            self.world.verdict().check("guests", self.history.check());
            self.world.count("lives", 1);
        }
    }

    /// Guests and jobs come to their end, and everything is given back.
    async fn last(&self, daemon: Booted, m: &Rc<Manager>, guests: &[Guest]) {
        self.fast.set(true);
        let ending = async {
            let finalizing = self.finalizing(m);
            for g in guests {
                g.stop().await;
            }
            finalizing.cancel();
            self.settle(m).await?;
            self.read_disk().await
        };
        let ended = self.world.within(&self.outside, PATIENCE, "the end", ending).await;
        if !matches!(ended, Some(Ok(()))) {
            return self.bad("the last life does not end");
        }
        self.world.verdict().check("guests", self.history.check());
        daemon.quit(&self.world, &self.outside).await;
        self.far.quit().await;
        Booted::all_have_quit(&self.world);
    }

    async fn crash(&self, daemon: &Booted) -> Crash {
        let end =
            self.draw(|r| *r.choose(&[End::Kill, End::Kill, End::PowerLoss, End::PowerLoss, End::Quit]));
        match end {
            End::PowerLoss => {
                self.world.count("power losses", 1);
                if self.draw(|r| r.chance(0.5)) {
                    self.far.power_loss_here(&daemon.process);
                } else {
                    // of both, as if they were on one machine
                    self.far.power_loss_everywhere(&daemon.process);
                }
                Crash::PowerLoss
            }
            End::Kill => {
                self.world.count("kills", 1);
                daemon.process.kill();
                if self.formats.get() { Crash::Kill } else { Crash::KillWriteThrough }
            }
            End::Quit => {
                self.world.count("quits", 1);
                daemon.quit(&self.world, &self.outside).await;
                Crash::KillWriteThrough
            }
        }
    }

    /// From a daemon that has come up to one that serves the disk, with all that was flushed on it.
    async fn begin(&self, daemon: &Booted, died: Option<Crash>) -> Result<Rc<Manager>, Refusal> {
        let m = daemon.manage(&self.world, &self.outside, &self.history).await?;
        let state = m.must("query-state", json!({})).await?;
        if state["broken"] != json!([]) {
            self.bad(format!("not all came back: {state}"));
        }
        let mut exports = m.must("query-block-exports", json!({})).await?;
        // one for a look at a copy that a crash cut short
        if exports.as_array().is_some_and(|e| e.iter().any(|e| e["id"] == "look")) {
            m.must("block-export-del", json!({"id": "look", "mode": "hard"})).await?;
            exports.as_array_mut().into_iter().for_each(|e| e.retain(|e| e["id"] != "look"));
        }
        if exports.as_array().is_some_and(Vec::is_empty) {
            if self.exported.get() {
                self.bad("the export did not come back");
            }
            self.set_up(&m).await?;
        }
        self.exported.set(true);
        if let Some(job) = self.job.borrow_mut().as_mut() {
            job.asked = None;
            job.instants.iter_mut().for_each(|i| i.freeze(&self.history));
        }
        let from = self.history.tick();
        self.see_resumed(&m, from).await?;
        if let Some(how) = died {
            let finalizing = self.finalizing(&m);
            let found = self.read(&History::new()).await;
            finalizing.cancel();
            let found = found?;
            self.world.verdict().check("after the crash", self.history.crash(&found, how));
            self.world.count("disks checked", 1);
        }
        Ok(m)
    }

    /// A job that is pending holds clients until it is finalized.
    fn finalizing(&self, m: &Rc<Manager>) -> TaskHandle {
        let (on, env) = (m.clone(), self.outside.clone());
        self.outside.spawn("finalizing", async move {
            while on.execute("query-jobs", json!({})).await.is_ok_and(|jobs| jobs != json!([])) {
                // refused by one that is not pending
                let _ = on.execute("job-finalize", json!({"id": "j"})).await;
                env.sleep(Duration::from_millis(20)).await;
            }
        })
    }

    /// What jobs say of how they go on; they came back at `from` or just before, when no guest was there yet.
    async fn see_resumed(&self, m: &Manager, from: Moment) -> Result<(), Refusal> {
        let jobs = m.must("query-jobs", json!({})).await?;
        let here = Instant::new(from, self.history.tick());
        for job in jobs.as_array().into_iter().flatten() {
            let told = job["resumed"].as_str().unwrap_or_default();
            let goes_on = told.starts_with("goes on");
            let what = match (job["type"] == "backup", goes_on) {
                (false, true) => "mirrors that go on",
                (true, true) => "backups that keep their instant",
                (true, false) if told.contains("nothing else") => "backups that copy what is lacking",
                (_, false) => "jobs begun anew",
            };
            self.world.count(what, 1);
        }
        let mut copying = self.job.borrow_mut();
        let Some(copying) = copying.as_mut().filter(|c| !c.instants.is_empty()) else { return Ok(()) };
        let told = jobs.as_array().and_then(|j| j.first()).map(|j| j["resumed"].as_str().unwrap_or_default());
        match told {
            Some(told) if told.contains("as of the restart") => copying.instants = vec![here],
            Some(_) => {}
            // it ended before anybody could ask, in this life or the last one
            None => copying.instants.push(here),
        }
        Ok(())
    }

    /// All of the disk, by a client of its own.
    pub(super) async fn read(&self, history: &History) -> Result<Vec<crate::Value>, Refusal> {
        let disk =
            NbdDisk::connect(&self.outside, &nbd(), "disk", Mode::Structured, self.world.verdict()).await;
        let disk = disk.map_err(|_| Refusal::Gone)?;
        let found = read_all(&*disk, history, u32::MAX).await.map_err(|_| Refusal::Gone);
        disk.disconnect();
        found
    }

    /// The same, to be judged with what guests have seen.
    pub(super) async fn read_disk(&self) -> Result<(), Refusal> {
        self.read(&self.history.clone()).await.map(drop)
    }

    /// What of the first commands a crash left undone.
    async fn set_up(&self, m: &Manager) -> Result<(), Refusal> {
        let node = self.add_first(m).await?;
        let server = json!({"addr": Booted::nbd_address(), "max-connections": 0});
        m.must("nbd-server-start", server).await?;
        let export = json!({"type": "nbd", "id": "e", "node-name": node, "name": "disk", "writable": true});
        m.must("block-export-add", export).await?;
        self.begin_first(m, &node).await
    }

    fn start_guest(&self, client: u32) -> Guest {
        let all = self.stage.sectors;
        // what was overwritten in one life is not in the next, now and then
        let sectors = if self.backups && self.draw(|r| r.chance(0.6)) { (all / 8).max(64) } else { all };
        let mut habits = self.draw(|r| Habits {
            requests: *r.choose(&[50, 150, 400]),
            breaks_allowed: true,
            ..Habits::drawn(r, client, sectors)
        });
        if self.backups {
            // for as long as a life may last
            habits.pause = Duration::from_millis(self.draw(|r| *r.choose(&[2, 10, 40])));
        }
        let dial = NbdDisk::dial(&self.outside, nbd(), "disk", Mode::Structured, self.world.verdict());
        let verdict = self.world.verdict().clone();
        Guest::start(&self.outside, habits, self.history.clone(), verdict, self.world.rng("guest"), dial)
    }
}

/// The node that guests write to now.
pub(super) async fn exported_node(m: &Manager) -> Result<String, Refusal> {
    let exports: Value = m.must("query-block-exports", json!({})).await?;
    let disk = exports.as_array().into_iter().flatten().find(|e| e["id"] == "e");
    Ok(disk.and_then(|e| e["node-name"].as_str()).unwrap_or_default().to_owned())
}
