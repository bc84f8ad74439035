//! What the daemon of [`again`](super::again) is told to do: images of all kinds, mirrors in all modes and backups between them,
//! snapshots; and the daemon behind links, which has its own accidents.

use super::again::{Lives, exported_node};
use super::plan::empty_qcow2;
use crate::boot::{Booted, FAR_NBD};
use crate::history::{History, Moment, What};
use crate::{
    Effect, Image, Manager, NbdDisk, Process, Refusal, Rng, Value, World, read_all, stamped, values_of,
};
use ::nbd::Mode;
use block::{SECTOR, Span};
use control::Geometry;
use env::{Env, TaskHandle};
use serde_json::{Value as Json, json};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Longest time between two accidents of the daemon behind links.
const CALM: Duration = Duration::from_millis(600);
/// How often it is looked what jobs do, at first and later.
const LOOK: Duration = Duration::from_millis(3);
const LOOK_LATER: Duration = Duration::from_millis(60);
/// What lies below overlays.
const BASE: &str = "/base.img";

/// How an image is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Form {
    /// `file` alone.
    File,
    /// `raw` over `file`.
    Raw,
    /// `qcow2` with this cluster size.
    Qcow2(u64),
    /// The same over [`BASE`].
    Overlay(u64),
    /// An export of the other daemon.
    Far,
    /// On top of what was the disk.
    Layer,
}

/// What is drawn for a seed.
#[derive(Clone, Debug)]
pub(super) struct Stage {
    pub(super) sectors: u64,
    pub(super) geometry: Geometry,
    /// There is another daemon.
    pub(super) far: bool,
    /// `discard=unmap` on the nodes.
    unmap: bool,
    first: Form,
    /// A mirror that copies only what is written runs from the first write on.
    from_nothing: bool,
}

impl Stage {
    pub(super) fn drawn(r: &mut Rng) -> Stage {
        let sectors = *r.choose(&[64, 512, 2048]);
        let region = *r.choose(&[4096, 16384, 65536]);
        // few, so that they come and go all the time
        let most = r.between(1, 8) as usize;
        Stage {
            sectors,
            geometry: Geometry { region, most, limit: most + r.between(0, 8) as usize },
            far: r.chance(0.35),
            unmap: r.chance(0.5),
            first: *r.choose(&[
                Form::File,
                Form::Raw,
                Form::Qcow2(512),
                Form::Qcow2(4096),
                Form::Overlay(4096),
            ]),
            from_nothing: r.chance(0.15),
        }
    }

    fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }
}

/// A mirror or a backup that was started.
#[derive(Clone)]
pub(super) struct Copying {
    target: String,
    /// To be ended by a pivot; else as a copy of one instant.
    pivots: bool,
    /// When it was told to end as a copy.
    pub(super) asked: Option<Moment>,
    /// Of a backup: it is the disk as of one of these.
    pub(super) instants: Vec<Instant>,
}

/// Some time in which the instant of a backup was.
#[derive(Clone)]
pub(super) struct Instant {
    /// What had happened to the disk by the end of the life it was in; that life goes on if there is none yet.
    history: Option<Rc<History>>,
    from: Moment,
    to: Moment,
}

impl Instant {
    pub(super) fn new(from: Moment, to: Moment) -> Instant {
        Instant { history: None, from, to }
    }

    /// The life that it was in has ended, and another history begins.
    pub(super) fn freeze(&mut self, history: &History) {
        self.history.get_or_insert_with(|| Rc::new(history.clone()));
    }
}

impl Lives {
    /// The disk.
    pub(super) async fn add_first(&self, m: &Manager) -> Result<String, Refusal> {
        let form = self.stage.first;
        if matches!(form, Form::Overlay(_)) {
            self.install_base();
        }
        self.add_image(m, form, false).await
    }

    /// What is to run before any guest has written.
    pub(super) async fn begin_first(&self, m: &Manager, node: &str) -> Result<(), Refusal> {
        if !self.stage.from_nothing || matches!(self.stage.first, Form::Overlay(_)) {
            return Ok(());
        }
        self.mirror(m, node, "none").await
    }

    /// Data that nobody writes again is there before all else.
    fn install_base(&self) {
        let mut base = Image::from_bytes(&vec![0; self.stage.bytes() as usize]);
        for _ in 0..self.draw(|r| r.between(1, 5)) {
            let (start, end) = self.draw(|r| {
                let start = r.below(self.stage.sectors);
                (start, r.between(start + 1, self.stage.sectors.min(start + 300)))
            });
            let n = self.history.begin(u32::MAX - 1, What::Write, start..end);
            base.apply(&Effect::Write { offset: start * SECTOR, data: stamped(n, start, end - start) });
            self.history.end(n);
        }
        let n = self.history.begin(u32::MAX - 1, What::Flush, 0..0);
        self.history.end(n);
        self.world.host().install(BASE, base);
    }

    /// A new image as node `dN`; with `old` there may be something in it.
    async fn add_image(&self, m: &Manager, form: Form, old: bool) -> Result<String, Refusal> {
        let n = self.images.get() + 1;
        // not named again, whether or not it comes to be
        self.images.set(n);
        let name = format!("d{n}");
        let path = if form == Form::Far { format!("/far{n}.img") } else { format!("/{name}.img") };
        let bytes = self.stage.bytes();
        let byte = if old && self.draw(|r| r.chance(0.4)) { 0x77 } else { 0 };
        let image = match form {
            Form::Qcow2(cluster) => empty_qcow2(bytes, cluster, None, false),
            Form::Overlay(cluster) => empty_qcow2(bytes, cluster, Some(BASE), true),
            _ => Image::from_bytes(&vec![byte; bytes as usize]),
        };
        if matches!(form, Form::Qcow2(_) | Form::Overlay(_)) {
            self.formats.set(true);
        }
        self.world.host().install(&path, image);
        self.forms.borrow_mut().insert(name.clone(), form);
        let discard = if self.stage.unmap { "unmap" } else { "ignore" };
        let file = json!({"driver": "file", "filename": path, "discard": discard});
        let mut node = match form {
            Form::File => file,
            Form::Raw => json!({"driver": "raw", "file": file}),
            Form::Overlay(_) => json!({"driver": "qcow2", "file": file, "backing": {
                "driver": "raw", "read-only": true, "file": {"driver": "file", "filename": BASE, "read-only": true},
            }}),
            Form::Far => {
                self.far.add(&name, &path).await;
                json!({"driver": "nbd", "server": Booted::far_server(), "export": name, "reconnect-delay": 5})
            }
            Form::Qcow2(_) | Form::Layer => json!({"driver": "qcow2", "file": file, "backing": null}),
        };
        node["node-name"] = json!(name);
        node["discard"] = json!(discard);
        // a link that was just cut is there again soon
        for _ in 0..if form == Form::Far { 200 } else { 0 } {
            match m.execute("blockdev-add", node.clone()).await {
                Err(Refusal::Error(_)) => self.outside.sleep(Duration::from_millis(50)).await,
                done => return done.map(|_| name),
            }
        }
        m.must("blockdev-add", node).await?;
        Ok(name)
    }

    /// Mirrors and snapshots, one after another.
    pub(super) async fn work(&self, m: &Manager) -> Result<(), Refusal> {
        loop {
            self.settle(m).await?;
            let pause = self.draw(|r| r.duration(Duration::ZERO, Duration::from_millis(80)));
            self.outside.sleep(pause).await;
            let device = exported_node(m).await?;
            if self.draw(|r| r.chance(0.2)) {
                self.snapshot(m, &device).await?;
            } else if self.backups && self.draw(|r| r.chance(0.8)) {
                self.backup(m, &device).await?;
            } else {
                let top = matches!(self.forms.borrow().get(&device), Some(Form::Overlay(_)));
                let sync = if top && self.draw(|r| r.chance(0.6)) { "top" } else { "full" };
                self.mirror(m, &device, sync).await?;
            }
        }
    }

    async fn snapshot(&self, m: &Manager, device: &str) -> Result<(), Refusal> {
        // not named again, whether or not it came to be
        let n = self.images.replace(self.images.get() + 1) + 1;
        self.formats.set(true);
        self.forms.borrow_mut().insert(format!("s{n}"), Form::Layer);
        let a = json!({"node-name": device, "snapshot-file": format!("/s{n}.qcow2"),
            "snapshot-node-name": format!("s{n}")});
        m.must("blockdev-snapshot-sync", a).await?;
        self.world.count("snapshots", 1);
        Ok(())
    }

    async fn mirror(&self, m: &Manager, device: &str, sync: &str) -> Result<(), Refusal> {
        let far = self.stage.far && sync != "top";
        let forms =
            [Form::File, Form::Raw, Form::Raw, Form::Qcow2(512), Form::Qcow2(4096), Form::Qcow2(65536)];
        let form = self.draw(|r| match sync {
            "top" => Form::Overlay(*r.choose(&[4096, 65536])),
            _ if far && r.chance(0.6) => Form::Far,
            _ => *r.choose(&forms),
        });
        let target = self.add_image(m, form, sync == "full").await?;
        let modes = ["background", "write-blocking", "write-blocking", "read-write-blocking"];
        let (mode, verify) =
            self.draw(|r| (*r.choose(&modes), *r.choose(&["off", "off", "sampled", "full"])));
        let verify = if sync == "none" { "off" } else { verify };
        let (granularity, speed) =
            self.draw(|r| (*r.choose(&[0, 512, 4096, 16384]), *r.choose(&[0, 0, 60_000, 1 << 20])));
        let by_hand = self.draw(|r| r.chance(0.15));
        let mut a = json!({"job-id": "j", "device": device, "target": target, "sync": sync, "copy-mode": mode,
            "verify": verify, "speed": speed, "auto-finalize": !by_hand});
        if granularity > 0 {
            a["granularity"] = json!(granularity);
        }
        if form == Form::Far {
            a["on-link-loss"] = json!({"wait": 600, "no-progress": 2});
        }
        // the guest's disk stays here; and a copy of what was written since the beginning is checked as one
        let pivots = form != Form::Far && sync != "none" && self.draw(|r| r.chance(0.6));
        *self.job.borrow_mut() = Some(Copying { target, pivots, asked: None, instants: Vec::new() });
        m.must("blockdev-mirror", a).await?;
        self.world.count("mirrors", 1);
        Ok(())
    }

    async fn backup(&self, m: &Manager, device: &str) -> Result<(), Refusal> {
        let forms = [
            Form::File,
            Form::Raw,
            Form::Qcow2(512),
            Form::Qcow2(4096),
            Form::Qcow2(4096),
            Form::Qcow2(65536),
        ];
        let far = self.stage.far;
        let form = self.draw(|r| if far && r.chance(0.6) { Form::Far } else { *r.choose(&forms) });
        let target = self.add_image(m, form, true).await?;
        let (speed, verify, by_hand) = self.draw(|r| {
            let speed = *r.choose(&[0, 20_000, 60_000, 300_000]);
            (speed, *r.choose(&["off", "off", "off", "full"]), r.chance(0.3))
        });
        let mut a = json!({"job-id": "j", "device": device, "target": target, "sync": "full", "verify": verify,
            "speed": speed, "auto-finalize": !by_hand});
        if form == Form::Far {
            a["on-link-loss"] = json!({"wait": 600, "no-progress": 2});
            // while the link is down either the client's write or the backup has to fail
            a["on-cbw-error"] = json!("break-snapshot");
        }
        let begun = Instant::new(self.history.tick(), Moment::MAX);
        *self.job.borrow_mut() = Some(Copying { target, pivots: false, asked: None, instants: vec![begun] });
        m.must("blockdev-backup", a).await?;
        let now = self.history.tick();
        self.job.borrow_mut().iter_mut().flat_map(|j| &mut j.instants).for_each(|i| i.to = now);
        self.world.count("backups", 1);
        Ok(())
    }

    /// Brings jobs to their end.
    pub(super) async fn settle(&self, m: &Manager) -> Result<(), Refusal> {
        let mut wait = LOOK;
        loop {
            let jobs = m.must("query-jobs", json!({})).await?;
            let Some(job) = jobs.as_array().and_then(|j| j.first()) else { break };
            if job.get("error").is_some() && !self.may_break(job) {
                self.bad(format!("a job failed: {job}"));
            }
            if job["resumed"].as_str().is_some_and(|how| how.contains("as it was left")) {
                self.bad(format!("nobody but the daemon has written to the target: {job}"));
            }
            match job["status"].as_str().unwrap_or_default() {
                "ready" => self.when_ready(m).await?,
                // clients write on after the instant of a copy, however long that is
                "pending" if !self.fast.get() && self.is_a_copy() && self.draw(|r| r.chance(0.95)) => {}
                "pending" => {
                    // refused if it goes on by itself
                    let _ = m.execute("job-finalize", json!({"id": "j"})).await;
                }
                "running" if self.fast.get() => {
                    let _ = m.execute("block-job-set-speed", json!({"device": "j", "speed": 0})).await;
                }
                "running" if self.draw(|r| r.chance(0.02)) => {
                    let _ = m.execute("job-pause", json!({"id": "j"})).await;
                }
                "paused" | "standby" => {
                    let _ = m.execute("job-resume", json!({"id": "j"})).await;
                }
                _ => {}
            }
            self.outside.sleep(wait).await;
            wait = (wait * 2).min(LOOK_LATER);
        }
        let ended = self.job.take();
        match ended {
            Some(job) if exported_node(m).await? == job.target => {
                self.world.count("pivots", 1);
                self.read_disk().await
            }
            Some(job) if !job.instants.is_empty() => self.check_backup(m, &job).await,
            Some(job) => self.check_copy(m, &job).await,
            None => Ok(()),
        }
    }

    /// Whether the job is a backup that gave way to a client's write when the link was down, or whose target may have lost what a client
    /// has overwritten since.
    fn may_break(&self, job: &Json) -> bool {
        let copying = self.job.borrow();
        let form = copying.as_ref().and_then(|c| self.forms.borrow().get(&c.target).copied());
        let reasons = ["copying old data before a write", "before it had flushed what was at"];
        form == Some(Form::Far)
            && job["error"].as_str().is_some_and(|e| reasons.iter().any(|r| e.contains(r)))
    }

    /// Whether the mirror is to end as a copy of one instant.
    fn is_a_copy(&self) -> bool {
        self.job.borrow().as_ref().is_some_and(|job| !job.pivots)
    }

    async fn when_ready(&self, m: &Manager) -> Result<(), Refusal> {
        let Some(job) = self.job.borrow().clone() else { return Ok(()) };
        // some follow for a while
        if !self.fast.get() && self.draw(|r| r.chance(0.7)) {
            return Ok(());
        }
        if job.pivots {
            // refused if it has been told before
            let _ = m.execute("job-complete", json!({"id": "j"})).await;
            return Ok(());
        }
        if job.asked.is_some() {
            return Ok(());
        }
        let now = self.history.tick();
        if m.execute("block-job-cancel", json!({"device": "j"})).await.is_ok()
            && let Some(job) = self.job.borrow_mut().as_mut()
        {
            job.asked = Some(now);
        }
        Ok(())
    }

    /// A mirror that was told so has made a copy of one instant.
    async fn check_copy(&self, m: &Manager, job: &Copying) -> Result<(), Refusal> {
        let seen = m.job("j");
        let (Some(asked), Some(None)) = (job.asked, &seen.completed) else { return Ok(()) };
        let Some(found) = self.read_copy(m, job).await? else { return Ok(()) };
        self.world.count("copies checked", 1);
        let judged = self.history.one_instant(&found, asked, seen.ended_at);
        self.world.verdict().check(&format!("copy in {}", job.target), judged);
        Ok(())
    }

    /// A backup is the disk as of its instant, if the last moments of the job log were not lost with a life.
    async fn check_backup(&self, m: &Manager, job: &Copying) -> Result<(), Refusal> {
        let log = m.must("query-job-log", json!({"id": "j"})).await?;
        let is_its =
            |e: &&Json| e["nodes"].as_array().is_some_and(|n| n.iter().any(|n| n["node-name"] == job.target));
        let entry = log["jobs"].as_array().into_iter().flatten().rfind(is_its);
        let Some(entry) = entry.filter(|e| e["outcome"] == "completed") else {
            self.world.count("backups of which nothing is known", 1);
            return Ok(());
        };
        let Some(found) = self.read_copy(m, job).await? else { return Ok(()) };
        self.world.count("backups checked", 1);
        let judge =
            |i: &Instant| i.history.as_deref().unwrap_or(&self.history).one_instant(&found, i.from, i.to);
        let judged: Vec<_> = job.instants.iter().map(judge).collect();
        if judged.iter().all(Result::is_err) {
            let why: Vec<String> = judged.into_iter().filter_map(Result::err).collect();
            self.bad(format!("backup in {}: {entry}: {}", job.target, why.join("; ")));
        }
        Ok(())
    }

    /// What a target holds, if it is there.
    async fn read_copy(&self, m: &Manager, job: &Copying) -> Result<Option<Vec<Value>>, Refusal> {
        let form = self.forms.borrow().get(&job.target).copied();
        let path = match form {
            Some(Form::Far) => format!("/{}.img", job.target.replacen('d', "far", 1)),
            _ => format!("/{}.img", job.target),
        };
        let found = match form {
            Some(Form::Far | Form::File | Form::Raw) => {
                let Some(image) = self.world.host().image(&path) else { return Ok(None) };
                values_of(&image.read(Span::new(0, self.stage.bytes())), 0)
            }
            _ => self.read_node(m, &job.target).await?,
        };
        Ok(Some(found))
    }

    async fn read_node(&self, m: &Manager, node: &str) -> Result<Vec<Value>, Refusal> {
        m.must("block-export-add", json!({"type": "nbd", "id": "look", "node-name": node, "name": "look"}))
            .await?;
        let at = crate::boot::nbd();
        let disk = NbdDisk::connect(&self.outside, &at, "look", Mode::Structured, self.world.verdict()).await;
        let disk = disk.map_err(|_| Refusal::Gone)?;
        let found = read_all(&*disk, &History::new(), 0).await.map_err(|_| Refusal::Gone)?;
        disk.disconnect();
        m.must("block-export-del", json!({"id": "look", "mode": "hard"})).await?;
        // a moment after its command was answered
        while m.must("query-block-exports", json!({})).await?.as_array().is_some_and(|e| e.len() > 1) {
            self.outside.sleep(Duration::from_millis(1)).await;
        }
        Ok(found)
    }
}

/// The daemon behind links, with images that are exported under their nodes' names, and its accidents.
pub(super) struct Far {
    world: World,
    outside: Env,
    rng: RefCell<Rng>,
    daemon: RefCell<Option<Rc<Booted>>>,
    images: RefCell<Vec<(String, String)>>,
    troubled: Cell<bool>,
    task: RefCell<Option<TaskHandle>>,
    /// One start or addition at a time.
    turn: env::sync::Semaphore,
}

impl Far {
    pub(super) fn new(world: &World, outside: &Env) -> Rc<Far> {
        Rc::new(Far {
            world: world.clone(),
            outside: outside.clone(),
            rng: RefCell::new(world.rng("far")),
            daemon: RefCell::new(None),
            images: RefCell::default(),
            troubled: Cell::new(false),
            task: RefCell::new(None),
            turn: env::sync::Semaphore::new(1),
        })
    }

    pub(super) fn is_up(&self) -> bool {
        self.daemon.borrow().as_ref().is_some_and(|d| !d.process.is_dead())
    }

    /// Starts it with all its images. Whether it runs.
    pub(super) async fn start(&self) -> bool {
        let _turn = self.turn.acquire(1).await;
        let Some(daemon) = Booted::start_far(&self.world).await else { return false };
        let images = self.images.borrow().clone();
        let ready = async {
            let m = daemon.manage(&self.world, &self.outside, &Rc::new(History::new())).await?;
            m.must("nbd-server-start", json!({"addr": Booted::far_address(), "max-connections": 0})).await?;
            for (name, path) in &images {
                open(&m, name, path).await?;
            }
            Ok::<_, Refusal>(())
        };
        let ready = ready.await.is_ok();
        *self.daemon.borrow_mut() = Some(Rc::new(daemon));
        ready
    }

    /// One image more.
    async fn add(&self, name: &str, path: &str) {
        let _turn = self.turn.acquire(1).await;
        self.images.borrow_mut().push((name.to_owned(), path.to_owned()));
        // not taken: whoever waits for this may go away
        let Some(daemon) = self.daemon.borrow().clone() else { return };
        // killed meanwhile, it has the image when it starts again
        if let Ok(m) = daemon.manage(&self.world, &self.outside, &Rc::new(History::new())).await {
            let _ = open(&m, name, path).await;
        }
    }

    /// From now on links are cut, and the daemon is killed or loses its power and comes back, until [`Far::calm`].
    pub(super) fn trouble(self: &Rc<Self>, on: bool) {
        if !on || self.rng.borrow_mut().chance(0.3) {
            return;
        }
        self.troubled.set(true);
        let me = self.clone();
        let task = self.outside.spawn("far trouble", async move {
            while me.troubled.get() {
                let wait = me.rng.borrow_mut().duration(Duration::from_millis(1), CALM);
                me.outside.sleep(wait).await;
                if me.troubled.get() {
                    me.accident().await;
                }
            }
        });
        *self.task.borrow_mut() = Some(task);
    }

    async fn accident(&self) {
        let kind = self.rng.borrow_mut().below(4);
        if kind < 2 {
            self.world.count("links cut", 1);
            return self.world.net().cut(FAR_NBD);
        }
        {
            let _turn = self.turn.acquire(1).await;
            let Some(daemon) = self.daemon.take() else { return };
            self.world.count(if kind == 2 { "far kills" } else { "far power losses" }, 1);
            match kind {
                2 => daemon.process.kill(),
                _ => self
                    .images
                    .borrow()
                    .iter()
                    .for_each(|(_, p)| self.world.host().power_loss_at(p, &daemon.process)),
            }
            daemon.process.kill();
        }
        let away = self.rng.borrow_mut().duration(Duration::from_millis(1), CALM);
        self.outside.sleep(away).await;
        if !self.start().await {
            self.world.verdict().violation("the other daemon does not start again");
        }
    }

    /// No accidents any more; it is there.
    pub(super) async fn calm(&self) {
        self.troubled.set(false);
        let task = self.task.take();
        if let Some(task) = task {
            task.join().await;
        }
    }

    /// The power fails where `process` is, and not where this one is.
    pub(super) fn power_loss_here(&self, process: &Process) {
        let host = self.world.host();
        let far = self.images.borrow();
        for path in host.list().iter().filter(|p| !far.iter().any(|(_, f)| f == *p)) {
            host.power_loss_at(path, process);
        }
        process.kill();
    }

    /// The power fails on both machines.
    pub(super) fn power_loss_everywhere(&self, process: &Process) {
        let far = self.daemon.take();
        let all: Vec<&Process> = far.iter().map(|f| &f.process).chain([process]).collect();
        self.world.host().power_loss(&all);
    }

    pub(super) async fn quit(&self) {
        let daemon = self.daemon.take();
        if let Some(daemon) = daemon {
            daemon.quit(&self.world, &self.outside).await;
        }
    }
}

async fn open(m: &Manager, name: &str, path: &str) -> Result<(), Refusal> {
    let node: Json = json!({"driver": "file", "node-name": name, "filename": path, "discard": "unmap"});
    m.must("blockdev-add", node).await?;
    m.must(
        "block-export-add",
        json!({"type": "nbd", "id": name, "node-name": name, "name": name, "writable": true}),
    )
    .await
    .map(drop)
}
