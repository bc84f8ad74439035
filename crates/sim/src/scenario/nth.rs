//! Every single I/O fails once: a script is played without a fault and its I/Os are counted, then once more for each of them
//! and each kind of failure.
//!
//! What must stay true, whichever I/O fails and however: each command is answered and each job ends with its events (see
//! [`Manager`](crate::Manager)); the disk reads as before the script, or as after it; the same again then succeeds; the daemon
//! ends in order and gives everything back; no image is corrupt, and the disk reads the same for the next daemon. A seed is
//! one case, so that each can be repeated and kept like any other.

use super::plan::{check_qcow2, empty_qcow2};
use super::{nth_filters, nth_table};
use crate::boot::{Booted, nbd};
use crate::history::History;
use crate::runner::Outcome;
use crate::{
    Disk, Effect, Fault, Image, Manager, NbdDisk, Refusal, Rule, Value, World, read_all, stamped, values_of,
};
use ::nbd::Mode;
use block::{BlockError, SECTOR, Span};
use env::Env;
use serde_json::{Value as Json, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Sectors of the disks: small, since each I/O of a script is a run of its own.
pub(crate) const SECTORS: u64 = 640;
/// Everything must have ended so long after a fault, in virtual time.
const PATIENCE: Duration = Duration::from_secs(60);
/// A job whose I/O hangs is cancelled after this.
const HANGS: Duration = Duration::from_secs(2);
/// Seeds are dealt out to so many scripts, of which some are still to come, so that a seed stays the same case for ever.
const SLOTS: u64 = 100;
const _: () = assert!(scripts() as u64 <= SLOTS);

/// How many scripts there are.
const fn scripts() -> usize {
    nth_table::SCRIPTS.len() + nth_filters::SCRIPTS.len()
}

/// One of them. The order is that of the seeds.
fn script(number: usize) -> Option<&'static Script> {
    let more = || nth_filters::SCRIPTS.get(number - nth_table::SCRIPTS.len());
    nth_table::SCRIPTS.get(number).or_else(more)
}

/// The seed of all plays: what differs between two is the fault alone.
const SEED: u64 = 1;

/// How a request fails.
const KINDS: [Kind; 4] = [
    Kind { name: "EIO", fault: Fault::Errno(BlockError::EIO) },
    Kind { name: "ENOSPC", fault: Fault::Errno(BlockError::ENOSPC) },
    Kind { name: "short", fault: Fault::Torn(BlockError::EIO) },
    Kind { name: "hang", fault: Fault::Hang },
];

#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    fault: Fault,
}

/// One image of a script.
#[derive(Clone, Copy)]
pub(crate) struct Layer {
    /// Its node; its file is `/NAME.img`.
    pub(crate) name: &'static str,
    /// Cluster size; 0: a raw image.
    pub(crate) cluster: u64,
    /// The layer below.
    pub(crate) over: Option<&'static str>,
    /// Runs of sectors written in this layer.
    pub(crate) written: &'static [(u64, u64)],
    /// Whether it is opened before the script begins.
    pub(crate) open: bool,
}

/// A step of a script.
pub(crate) enum Step {
    /// A command that has its answer at once.
    Do(&'static str, fn() -> Json),
    /// A command that starts the job `job`: its usual arguments, those of this step; then how it is brought to its end.
    Job(&'static str, fn() -> Json, fn() -> Json, Finish),
    /// The guest writes to so many sectors from there on what they hold already, and flushes.
    Rewrite(u64, u64),
}

/// `all` and `more`, which has the last word.
pub(crate) fn with(mut all: Json, more: Json) -> Json {
    if let (Json::Object(all), Json::Object(more)) = (&mut all, more) {
        all.extend(more);
    }
    all
}

/// How a job is brought to its end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    /// It ends by itself.
    Itself,
    /// `job-complete` when it is ready.
    Complete,
    /// `block-job-cancel` when it is ready.
    Stop,
    /// `block-job-cancel` as soon as it runs: it would never end.
    Cancel,
    /// `job-finalize` when it is pending, `job-dismiss` when it has concluded.
    ByHand,
    /// [`Finish::Complete`], then [`Finish::ByHand`].
    CompleteByHand,
}

/// The images that a script finds.
pub(crate) struct Stack {
    /// From the lowest up.
    pub(crate) layers: &'static [Layer],
    /// The node that the guest has.
    pub(crate) disk: &'static str,
}

/// What is tried.
pub(crate) struct Script {
    /// For people.
    pub(crate) name: &'static str,
    /// What it is tried on.
    pub(crate) on: &'static Stack,
    /// What is done under faults.
    pub(crate) steps: &'static [Step],
}

/// The images of a script before it begins, and what the guest's disk reads as.
#[derive(Clone)]
struct Prepared {
    images: Vec<(String, Image)>,
    disk: Vec<Value>,
    /// I/Os of the script when none fails.
    ios: u64,
}

thread_local! {
    static PREPARED: RefCell<BTreeMap<usize, Rc<Prepared>>> = const { RefCell::new(BTreeMap::new()) };
}

/// How many cases there are: seeds from here on do nothing.
pub fn cases() -> u64 {
    let most = (0..scripts()).filter_map(|s| prepared(s).ok()).map(|p| p.ios).max().unwrap_or(0);
    most * SLOTS * KINDS.len() as u64
}

/// One case: `seed` says which script, which kind of failure, and which I/O.
pub fn case(seed: u64, verbose: bool) -> Outcome {
    let (number, rest) = ((seed % SLOTS) as usize, seed / SLOTS);
    let Some(script) = script(number) else { return Outcome::default() };
    let (kind, nth) = (KINDS[(rest % KINDS.len() as u64) as usize], rest / KINDS.len() as u64);
    let prepared = match prepared(number) {
        Ok(p) => p,
        Err(e) => return Outcome::bad(format!("{}, without a fault: {e}", script.name)),
    };
    if nth >= prepared.ios {
        return Outcome::default();
    }
    let mut outcome = World::play(SEED, verbose, |w| async move {
        let play = Play::new(w, script, prepared);
        play.world.count(kind.name, 1);
        play.go(Some((nth, kind))).await;
    });
    outcome.violation =
        outcome.violation.map(|v| format!("{}, I/O {nth} fails ({}): {v}", script.name, kind.name));
    outcome
}

/// Makes the images, and plays the script once without a fault.
fn prepared(number: usize) -> Result<Rc<Prepared>, String> {
    if let Some(p) = PREPARED.with_borrow(|p| p.get(&number).cloned()) {
        return Ok(p);
    }
    let s = script(number).ok_or("no such script")?;
    let (images, disk) = write_layers(s)?;
    let (ios, first) = (Rc::new(RefCell::new(0)), Rc::new(Prepared { images, disk, ios: 0 }));
    let (out, from) = (ios.clone(), first.clone());
    let outcome = World::play(SEED, false, |w| async move {
        *out.borrow_mut() = Play::new(w, s, from).go(None).await;
    });
    if let Some(v) = outcome.violation {
        return Err(v);
    }
    let all = Rc::new(Prepared { ios: *ios.borrow(), ..(*first).clone() });
    PREPARED.with_borrow_mut(|p| p.insert(number, all.clone()));
    Ok(all)
}

pub(crate) type Written = (Vec<(String, Image)>, Vec<Value>);

/// Writes each layer through a daemon of its own kind; gives the images and what the disk reads as.
pub(crate) fn write_layers(script: &'static Script) -> Result<Written, String> {
    let out = Rc::new(RefCell::new((Vec::new(), Vec::new())));
    let result = out.clone();
    let outcome = World::play(SEED, false, |w| async move {
        let (outside, _process) = w.start();
        let mut number = 1;
        for layer in script.on.layers {
            let path = format!("/{}.img", layer.name);
            let bytes = SECTORS * SECTOR;
            let below = layer.over.map(|o| format!("/{o}.img"));
            if layer.cluster == 0 {
                let mut image = Image::from_bytes(&vec![0; bytes as usize]);
                for (start, n) in layer.written {
                    image.apply(&Effect::Write { offset: start * SECTOR, data: stamped(number, *start, *n) });
                    number += 1;
                }
                w.host().install(&path, image);
                continue;
            }
            let below_is_raw = script.on.layers.iter().any(|l| Some(l.name) == layer.over && l.cluster == 0);
            w.host().install(&path, empty_qcow2(bytes, layer.cluster, below.as_deref(), below_is_raw));
            let Some(daemon) = Booted::start(&w).await else { return };
            let node =
                json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": path}});
            if let Some(d) = opened(&w, &daemon, &outside, node).await {
                for (start, n) in layer.written {
                    if let Err(e) = d.write(start * SECTOR, stamped(number, *start, *n), false).await {
                        w.verdict().violation(format!("preparing {path}: {e}"));
                    }
                    number += 1;
                }
                if layer.name == script.on.disk {
                    result.borrow_mut().1 = all_of(&w, &*d).await;
                }
                d.disconnect();
            }
            daemon.quit(&w, &outside).await;
        }
        if let Some(l) = script.on.layers.iter().find(|l| l.name == script.on.disk && l.cluster == 0) {
            let image = w.host().image(&format!("/{}.img", l.name)).unwrap_or_default();
            result.borrow_mut().1 = values_of(&image.to_vec(), 0);
        }
        let host = w.host();
        result.borrow_mut().0 =
            host.list().into_iter().filter_map(|p| host.image(&p).map(|i| (p, i))).collect();
    });
    match outcome.violation {
        Some(v) => Err(v),
        None => Ok(out.take()),
    }
}

/// Adds a node, exports it, connects.
pub(crate) async fn opened(w: &World, daemon: &Booted, outside: &Env, node: Json) -> Option<Rc<NbdDisk>> {
    let ready = async {
        let m = daemon.manage(w, outside, &Rc::new(History::new())).await?;
        let name = node["node-name"].clone();
        m.must("blockdev-add", node).await?;
        m.must("nbd-server-start", json!({"addr": Booted::nbd_address()})).await?;
        let export = json!({"type": "nbd", "id": "e", "node-name": name, "name": "disk", "writable": true});
        m.must("block-export-add", export).await
    };
    match w.within(outside, PATIENCE, "opening an image at rest", ready).await? {
        Ok(_) => connect(w, outside).await,
        Err(e) => {
            w.verdict().violation(format!("an image at rest: {e}"));
            None
        }
    }
}

pub(crate) async fn connect(w: &World, outside: &Env) -> Option<Rc<NbdDisk>> {
    match NbdDisk::connect(outside, &nbd(), "disk", Mode::Structured, w.verdict()).await {
        Ok(d) => Some(d),
        Err(e) => {
            w.verdict().violation(format!("connecting: {e}"));
            None
        }
    }
}

pub(crate) async fn all_of(w: &World, disk: &dyn Disk) -> Vec<Value> {
    match read_all(disk, &History::new(), 0).await {
        Ok(values) => values,
        Err(e) => {
            w.verdict().violation(format!("reading the disk: {e:?}"));
            Vec::new()
        }
    }
}

/// How a script ended.
enum Ended {
    Well,
    /// Refused, or the job failed: why.
    Badly(String),
}

/// One run.
struct Play {
    world: World,
    script: &'static Script,
    prepared: Rc<Prepared>,
    outside: Env,
    _process: crate::Process,
}

impl Play {
    fn new(world: World, script: &'static Script, prepared: Rc<Prepared>) -> Play {
        for (path, image) in &prepared.images {
            world.host().install(path, image.clone());
        }
        let (outside, process) = world.start();
        Play { world, script, prepared, outside, _process: process }
    }

    fn bad(&self, what: impl Into<String>) {
        self.world.verdict().violation(what);
    }

    /// The number of I/Os of the script.
    async fn go(&self, fails: Option<(u64, Kind)>) -> u64 {
        let Some(daemon) = Booted::start(&self.world).await else { return 0 };
        let host = self.world.host();
        let mut ios = 0;
        let scene = async {
            let m = daemon.manage(&self.world, &self.outside, &Rc::new(History::new())).await?;
            self.open(&m).await?;
            let before = host.requests();
            if let Some((nth, kind)) = fails {
                host.fault(Rule { path: String::new(), op: None, skip: nth, times: 1, fault: kind.fault });
            }
            let (ended, step) = self.play(&m, 0).await?;
            ios = host.requests() - before;
            if fails.is_some() && host.faults() == 0 {
                self.bad("the I/O that was to fail never came: the same script did something else");
            }
            host.clear_faults();
            host.release_hung();
            self.after(&m, ended, step, fails.is_some()).await?;
            self.look(&m).await
        };
        let limit = PATIENCE * 4;
        let file = match self.world.within(&self.outside, limit, "the script", scene).await {
            Some(Ok(file)) => file,
            Some(Err(e)) => {
                self.bad(format!("the script: {e}"));
                return ios;
            }
            None => return ios,
        };
        daemon.quit(&self.world, &self.outside).await;
        Booted::all_have_quit(&self.world);
        self.at_rest(file).await;
        ios
    }

    /// Opens what is open before the script, and exports the disk.
    async fn open(&self, m: &Manager) -> Result<(), Refusal> {
        for l in self.script.on.layers.iter().filter(|l| l.open) {
            m.must("blockdev-add", node(l, self.script.on)).await?;
        }
        m.must("nbd-server-start", json!({"addr": Booted::nbd_address()})).await?;
        let export = json!({
            "type": "nbd", "id": "e0", "node-name": self.script.on.disk, "name": "disk", "writable": true
        });
        m.must("block-export-add", export).await.map(drop)
    }

    /// The steps from the given one on; how it ended, and at which step.
    async fn play(&self, m: &Manager, from: usize) -> Result<(Ended, usize), Refusal> {
        for (n, step) in self.script.steps.iter().enumerate().skip(from) {
            let ended = match step {
                Step::Do(command, arguments) => match self.patiently(m, command, arguments()).await {
                    Ok(_) => Ended::Well,
                    Err(Refusal::Error(e)) => Ended::Badly(e),
                    Err(Refusal::Gone) => return Err(Refusal::Gone),
                },
                Step::Job(command, usual, more, finish) => {
                    self.job(m, command, with(usual(), more()), *finish).await?
                }
                Step::Rewrite(start, n) => self.rewrite(*start, *n).await,
            };
            if let Ended::Badly(_) = ended {
                return Ok((ended, n));
            }
        }
        Ok((Ended::Well, self.script.steps.len()))
    }

    /// Something that cannot be called off: what hangs in it goes on after a while.
    async fn released<T>(&self, done: impl Future<Output = T>) -> T {
        let (host, outside) = (self.world.host().clone(), self.outside.clone());
        let release = self.outside.spawn("release", async move {
            outside.sleep(HANGS).await;
            host.release_hung();
        });
        let answer = done.await;
        release.cancel();
        answer
    }

    /// A command.
    async fn patiently(&self, m: &Manager, command: &str, arguments: Json) -> Result<Json, Refusal> {
        self.released(m.execute(command, arguments)).await
    }

    /// The same bytes once more: whatever becomes of it, the disk reads the same.
    async fn rewrite(&self, start: u64, sectors: u64) -> Ended {
        let Some(d) = connect(&self.world, &self.outside).await else {
            return Ended::Badly("no connection".to_owned());
        };
        let at = Span::new(start * SECTOR, sectors * SECTOR);
        let again = async {
            let bytes = d.read(at).await?;
            d.write(at.start, bytes, false).await?;
            d.flush().await
        };
        let done = self.released(again).await;
        d.disconnect();
        done.map_or_else(|e| Ended::Badly(e.to_string()), |()| Ended::Well)
    }

    async fn job(
        &self,
        m: &Manager,
        command: &str,
        arguments: Json,
        finish: Finish,
    ) -> Result<Ended, Refusal> {
        let id = || json!({"id": "job"});
        let by_hand = matches!(finish, Finish::ByHand | Finish::CompleteByHand);
        let of_group = arguments["properties"]["completion-mode"] == "grouped";
        let began = self.outside.now();
        match self.patiently(m, command, arguments).await {
            Ok(_) => {}
            Err(Refusal::Error(e)) => return Ok(Ended::Badly(e)),
            Err(Refusal::Gone) => return Err(Refusal::Gone),
        }
        let (mut asked, mut cancelled, mut error) = (false, false, None);
        loop {
            let seen = m.job("job");
            match seen.status.as_str() {
                "running" if finish == Finish::Cancel && !asked => {
                    // refused if it is over, which it can only be by an error
                    asked = self.patiently(m, "block-job-cancel", json!({"device": "job"})).await.is_ok();
                }
                "ready" if !asked && !matches!(finish, Finish::Itself | Finish::ByHand) => {
                    asked = true;
                    let _refused_if_over = match finish {
                        Finish::Stop => self.patiently(m, "block-job-cancel", json!({"device": "job"})).await,
                        _ => self.patiently(m, "job-complete", id()).await,
                    };
                }
                // stopped by an error, which is over: it goes on
                "paused" | "standby" => {
                    let _refused_if_over = m.execute("job-resume", id()).await;
                }
                "pending" if by_hand => {
                    let _refused_if_over = self.patiently(m, "job-finalize", id()).await;
                }
                "concluded" if by_hand => {
                    // a failed job-prepare is told here alone
                    let jobs = m.must("query-jobs", json!({})).await?;
                    error = jobs[0]["error"].as_str().map(str::to_owned);
                    m.must("job-dismiss", id()).await?;
                }
                "null" => {
                    self.all_are_over(m).await?;
                    return Ok(match (seen.completed, seen.cancelled) {
                        (Some(None), false) if error.is_none() => Ended::Well,
                        (Some(Some(e)), false) if e.is_empty() => {
                            self.bad("the job failed without saying why");
                            Ended::Badly(e)
                        }
                        (Some(e), false) => Ended::Badly(e.or(error).unwrap_or_default()),
                        (None, true) if finish == Finish::Cancel && asked => Ended::Well,
                        // its partner failed
                        (None, true) if of_group => Ended::Badly("cancelled".to_owned()),
                        // no block job: only query-jobs told
                        (None, false) if by_hand => error.map_or(Ended::Well, Ended::Badly),
                        (None, true) if cancelled || error.is_some() => Ended::Badly("cancelled".to_owned()),
                        (completed, by) => {
                            self.bad(format!(
                                "the job ended with {completed:?}, cancelled {by}, error {error:?}"
                            ));
                            Ended::Badly(String::new())
                        }
                    });
                }
                _ => {}
            }
            if !cancelled && self.world.host().hung() > 0 && self.outside.now() > began + HANGS {
                cancelled = true;
                let _refused_if_over = m.execute("job-cancel", id()).await;
                self.outside.sleep(HANGS).await;
                if !matches!(m.job("job").status.as_str(), "null" | "concluded") {
                    self.world.count("cancels that waited for what hung", 1);
                }
                self.world.host().release_hung();
            }
            self.outside.sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits for the other jobs of the same transaction, which end on their own.
    async fn all_are_over(&self, m: &Manager) -> Result<(), Refusal> {
        while m.must("query-jobs", json!({})).await? != json!([]) {
            self.outside.sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// After the fault: what failed succeeds when it is done again.
    async fn after(&self, m: &Manager, ended: Ended, step: usize, failed: bool) -> Result<(), Refusal> {
        match ended {
            Ended::Well if failed => self.world.count("went well in spite of it", 1),
            Ended::Well => {}
            Ended::Badly(e) if !failed => self.bad(format!("it failed: {e}")),
            Ended::Badly(e) => {
                self.world.count("failed, and done again", 1);
                self.world.machine().say(|| format!("failed: {e}"));
                self.same_as_before("after the failure").await;
                if let Ended::Badly(again) = self.play(m, step).await?.0 {
                    self.bad(format!("failed with '{e}'; again, without a fault: {again}"));
                }
            }
        }
        self.same_as_before("at the end").await;
        Ok(())
    }

    async fn same_as_before(&self, when: &str) {
        if self.world.verdict().is_bad() {
            return;
        }
        let Some(d) = connect(&self.world, &self.outside).await else { return };
        self.compare(&all_of(&self.world, &*d).await, when);
        d.disconnect();
    }

    fn compare(&self, found: &[Value], when: &str) {
        let differ = self.prepared.disk.iter().zip(found).position(|(a, b)| a != b);
        match differ {
            Some(n) => self.bad(format!(
                "{when}: sector {n} of the disk reads {:?} instead of {:?}",
                found[n], self.prepared.disk[n]
            )),
            None if found.len() != self.prepared.disk.len() => {
                self.bad(format!("{when}: the disk has {} sectors", found.len()));
            }
            None => {}
        }
    }

    /// Which image is the guest's disk now: format and file.
    async fn look(&self, m: &Manager) -> Result<(String, String), Refusal> {
        let exports = m.must("query-block-exports", json!({})).await?;
        let name = exports[0]["node-name"].as_str().unwrap_or_default().to_owned();
        let nodes = m.must("query-named-block-nodes", json!({})).await?;
        let of = |key: &str| {
            let all = nodes.as_array().into_iter().flatten();
            let node = all.into_iter().find(|n| n["node-name"] == name.as_str());
            node.and_then(|n| n[key].as_str()).unwrap_or_default().to_owned()
        };
        Ok((of("drv"), of("file")))
    }

    /// What the daemon left behind.
    async fn at_rest(&self, (driver, file): (String, String)) {
        let host = self.world.host();
        for path in host.list() {
            let image = host.image(&path).unwrap_or_default();
            if image.read(Span::new(0, 4)) == b"QFI\xfb" {
                self.world.verdict().check(&path, check_qcow2(&image, true));
                if check_qcow2(&image, false).is_err() {
                    self.world.count("images with leaks", 1);
                }
            }
        }
        if self.world.verdict().is_bad() {
            return;
        }
        let Some(daemon) = Booted::start(&self.world).await else { return };
        let node = json!({"driver": driver, "node-name": "n", "file": {"driver": "file", "filename": file}});
        if let Some(d) = opened(&self.world, &daemon, &self.outside, node).await {
            self.compare(&all_of(&self.world, &*d).await, "at rest");
            d.disconnect();
        }
        daemon.quit(&self.world, &self.outside).await;
    }
}

/// `blockdev-add` arguments of a layer. What lies below and is not open is opened as the header names it.
pub(crate) fn node(l: &Layer, stack: &Stack) -> Json {
    let file = json!({
        "driver": "file", "node-name": format!("{}-file", l.name), "filename": format!("/{}.img", l.name)
    });
    if l.cluster == 0 {
        return json!({"driver": "raw", "node-name": l.name, "file": file});
    }
    let mut node = json!({"driver": "qcow2", "node-name": l.name, "file": file});
    if l.over.is_none_or(|o| stack.layers.iter().any(|below| below.name == o && below.open)) {
        node["backing"] = json!(l.over);
    }
    node
}
