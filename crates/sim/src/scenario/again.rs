//! A daemon with a state directory that dies again and again, under guests, mirrors and snapshots.
//!
//! Each life begins with what the last one left: `Daemon::use_state` over the simulated disk, with the store's own writes in
//! flight when the process was killed or the power failed. What is checked:
//! * the export is there as soon as it was acknowledged, and nothing is broken;
//! * what guests had flushed is on the disk that is exported now, whichever image that is by then;
//! * jobs are there again and come to their end; guest reads are linearizable in each life.

use crate::boot::{Booted, nbd};
use crate::history::{Crash, History};
use crate::runner::Outcome;
use crate::{Disk, Guest, Habits, Image, Manager, NbdDisk, Process, Profile, Refusal, Rng, World, read_all};
use block::SECTOR;
use env::Env;
use nbd::Mode;
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Everything a life begins or ends with must be done so soon, in virtual time.
const PATIENCE: Duration = Duration::from_secs(120);

/// One seed.
pub fn again(seed: u64, verbose: bool) -> Outcome {
    World::play(seed, verbose, |w| async move {
        let (mut rng, (outside, process)) = (w.rng("plan"), w.start());
        let sectors = *rng.choose(&[64, 512, 2048]);
        let lives = Lives {
            world: w,
            rng: RefCell::new(rng),
            sectors,
            history: Rc::new(History::new()),
            outside,
            _outside: process,
            images: Cell::new(0),
            exported: Cell::new(false),
            formats: Cell::new(false),
        };
        Rc::new(lives).go().await;
    })
}

struct Lives {
    world: World,
    rng: RefCell<Rng>,
    sectors: u64,
    history: Rc<History>,
    /// Where guests and manager live.
    outside: Env,
    _outside: Process,
    /// Images made so far.
    images: Cell<u32>,
    /// The export was acknowledged.
    exported: Cell<bool>,
    /// Some image in use is a format, which keeps metadata back until a flush.
    formats: Cell<bool>,
}

impl Lives {
    fn draw<T>(&self, f: impl FnOnce(&mut Rng) -> T) -> T {
        f(&mut self.rng.borrow_mut())
    }

    fn bad(&self, what: impl Into<String>) {
        self.world.verdict().violation(what);
    }

    async fn go(self: Rc<Self>) {
        self.world.host().set_profile(self.draw(Profile::drawn_calm));
        let lives = self.draw(|r| r.between(2, 5));
        let mut died = None;
        for life in 0..=lives {
            self.world.machine().say(|| format!("life {life}"));
            let Some(daemon) = Booted::start_again(&self.world).await else { return };
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
                let ending = async {
                    for g in &guests {
                        g.stop().await;
                    }
                    self.settle(&m).await
                };
                if !matches!(
                    self.world.within(&self.outside, PATIENCE, "the end", ending).await,
                    Some(Ok(()))
                ) {
                    return self.bad("the last life does not end");
                }
                self.world.verdict().check("guests", self.history.check());
                drop(m);
                daemon.quit(&self.world, &self.outside).await;
                return Booted::all_have_quit(&self.world);
            }
            let busy = self.clone();
            let work = self.outside.spawn("manager", async move {
                // ends with the daemon
                let _ = busy.work(&m).await;
            });
            let lasts = self.draw(|r| {
                let most = *r.choose(&[
                    Duration::from_millis(30),
                    Duration::from_millis(200),
                    Duration::from_millis(800),
                ]);
                r.duration(Duration::from_millis(1), most)
            });
            self.outside.sleep(lasts).await;
            died = Some(self.crash(&daemon));
            work.cancel();
            guests.iter().for_each(Guest::abandon);
            self.world.verdict().check("guests", self.history.check());
            self.world.count("lives", 1);
        }
    }

    fn crash(&self, daemon: &Booted) -> Crash {
        if self.draw(|r| r.chance(0.5)) {
            self.world.count("power losses", 1);
            self.world.host().power_loss(&[&daemon.process]);
            return Crash::PowerLoss;
        }
        self.world.count("kills", 1);
        daemon.process.kill();
        if self.formats.get() { Crash::Kill } else { Crash::KillWriteThrough }
    }

    /// From a daemon that has come up to one that serves the disk, with all that was flushed on it.
    async fn begin(&self, daemon: &Booted, died: Option<Crash>) -> Result<Rc<Manager>, Refusal> {
        let m = daemon.manage(&self.world, &self.outside, &self.history).await?;
        let state = m.must("query-state", json!({})).await?;
        if state["broken"] != json!([]) {
            self.bad(format!("not all came back: {state}"));
        }
        let exports = m.must("query-block-exports", json!({})).await?;
        if exports.as_array().is_some_and(Vec::is_empty) {
            if self.exported.get() {
                self.bad("the export did not come back");
            }
            self.set_up(&m).await?;
        }
        self.exported.set(true);
        if let Some(how) = died {
            let disk =
                NbdDisk::connect(&self.outside, &nbd(), "disk", Mode::Structured, self.world.verdict()).await;
            let disk = disk.map_err(|_| Refusal::Gone)?;
            let history = History::new();
            let found = read_all(&*disk, &history, u32::MAX).await.map_err(|_| Refusal::Gone)?;
            self.world.verdict().check("after the crash", self.history.crash(&found, how));
            self.world.count("disks checked", 1);
        }
        Ok(m)
    }

    /// What of the first commands a crash left undone.
    async fn set_up(&self, m: &Manager) -> Result<(), Refusal> {
        let nodes = m.must("query-named-block-nodes", json!({})).await?;
        let node = match nodes[0]["node-name"].as_str() {
            Some(there) => there.to_owned(),
            None => self.add_image(m).await?,
        };
        // one that is there already says so
        let server = json!({"addr": Booted::nbd_address(), "max-connections": 0});
        let _ = m.execute("nbd-server-start", server).await?;
        let export = json!({"type": "nbd", "id": "e", "node-name": node, "name": "disk", "writable": true});
        m.must("block-export-add", export).await.map(drop)
    }

    /// An image of zeroes as node `dN`.
    async fn add_image(&self, m: &Manager) -> Result<String, Refusal> {
        let n = self.images.get() + 1;
        let (file, node) = (format!("/d{n}.img"), format!("d{n}"));
        // not named again, whether or not it comes to be
        self.images.set(n);
        self.world.host().install(&file, Image::from_bytes(&vec![0; (self.sectors * SECTOR) as usize]));
        m.must("blockdev-add", json!({"driver": "file", "node-name": node, "filename": file})).await?;
        Ok(node)
    }

    fn start_guest(&self, client: u32) -> Guest {
        let habits = self.draw(|r| Habits {
            requests: 150,
            breaks_allowed: true,
            ..Habits::drawn(r, client, self.sectors)
        });
        let (env, verdict) = (self.outside.clone(), self.world.verdict().clone());
        let dial = Box::new(move || {
            let (env, verdict) = (env.clone(), verdict.clone());
            Box::pin(async move {
                let d = NbdDisk::connect(&env, &nbd(), "disk", Mode::Structured, &verdict).await?;
                Ok(d as Rc<dyn Disk>)
            }) as _
        });
        let verdict = self.world.verdict().clone();
        Guest::start(&self.outside, habits, self.history.clone(), verdict, self.world.rng("guest"), dial)
    }

    /// Mirrors and snapshots, one after another.
    async fn work(&self, m: &Manager) -> Result<(), Refusal> {
        loop {
            self.settle(m).await?;
            let pause = self.draw(|r| r.duration(Duration::ZERO, Duration::from_millis(80)));
            self.outside.sleep(pause).await;
            let device = exported_node(m).await?;
            if self.draw(|r| r.chance(0.3)) {
                // not named again, whether or not it came to be
                let n = self.images.replace(self.images.get() + 1) + 1;
                self.formats.set(true);
                let a = json!({"node-name": device, "snapshot-file": format!("/s{n}.qcow2"),
                    "snapshot-node-name": format!("s{n}")});
                m.must("blockdev-snapshot-sync", a).await?;
                self.world.count("snapshots", 1);
            } else {
                let target = self.add_image(m).await?;
                let a = json!({"job-id": "j", "device": device, "target": target, "sync": "full"});
                m.must("blockdev-mirror", a).await?;
            }
        }
    }

    /// Brings jobs to their end.
    async fn settle(&self, m: &Manager) -> Result<(), Refusal> {
        loop {
            let jobs = m.must("query-jobs", json!({})).await?;
            let Some(job) = jobs.as_array().and_then(|j| j.first()) else { return Ok(()) };
            if job.get("resumed").is_some() {
                self.world.count("jobs resumed", 1);
            }
            if job.get("error").is_some() {
                self.bad(format!("a job failed: {job}"));
            }
            if job["status"] == "ready" && m.execute("job-complete", json!({"id": "j"})).await.is_ok() {
                self.world.count("pivots", 1);
            }
            self.outside.sleep(Duration::from_millis(3)).await;
        }
    }
}

async fn exported_node(m: &Manager) -> Result<Value, Refusal> {
    Ok(m.must("query-block-exports", json!({})).await?[0]["node-name"].clone())
}
