//! A crash at every point of operations that change chains: a script is played by a daemon with a state directory and its moments
//! (beginnings of requests, removals of files) are counted; then once more for each of them and each kind of crash.
//!
//! What must stay true, wherever it crashes and whatever of the unflushed writes, whole or torn, and of new and removed names
//! survives: a daemon that starts on what is left has all that is recorded (no file of it was deleted or is damaged), and the
//! disk reads as it always did (these operations change none of it); so does the image that the records name as the disk when
//! it is opened by what its header says, before that daemon has mended anything, and what lies over it and holds nothing of its
//! own. Headers and records agree, or the job is there again that makes them agree, and says so. In the end what was
//! acknowledged is done: the disk is stored as after a run without a crash, no image is corrupt, none is left that was to be
//! deleted, and the disk reads the same by headers alone. A seed is one case.

use super::nth::{Finish, Layer, Script, Stack, Step, Written, all_of, connect, node, opened, write_layers};
use super::plan::check_qcow2;
use super::steps_table::SCRIPTS;
use crate::boot::Booted;
use crate::history::History;
use crate::runner::Outcome;
use crate::{Image, Keep, Manager, Refusal, Rng, Value, World};
use block::Span;
use env::Env;
use env::sync::race;
use serde_json::{Value as Json, json};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Everything must have ended so long after a crash, in virtual time.
const PATIENCE: Duration = Duration::from_secs(60);
/// Seeds are dealt out to so many scripts, of which some are still to come.
const SLOTS: u64 = 40;
const _: () = assert!(SCRIPTS.len() as u64 <= SLOTS);
/// One case of so many is a fair share: prime, so that scripts, moments and kinds of crash all take turns.
pub const STRIDE: u64 = 149;
/// The seed of all plays: what differs between two is the crash alone.
const SEED: u64 = 1;

/// How it crashes.
#[derive(Clone, Copy, Debug)]
enum How {
    /// The process alone: what it had in flight lands, or not, or in part.
    Kill,
    Power(Keep),
}

/// Each crash point is tried with each of these; of what is drawn, several.
const HOW: [How; 7] = [
    How::Kill,
    How::Kill,
    How::Power(Keep::Nothing),
    How::Power(Keep::All),
    How::Power(Keep::Drawn),
    How::Power(Keep::Drawn),
    How::Power(Keep::Drawn),
];

/// How the disk is stored: the files from the disk's own downwards.
type Chain = Vec<String>;

/// How the disk is stored, and all that is open: driver and file of each node, and whether it is read-only.
#[derive(Clone, Default, PartialEq, Debug)]
struct Stored {
    chain: Chain,
    nodes: Vec<String>,
}

/// What a daemon shows.
struct Seen {
    /// The guest's disk.
    disk: Disk,
    stored: Stored,
    /// Whether the headers say the same.
    agree: Result<(), String>,
}

/// A script before it begins, and after it.
#[derive(Clone, Default)]
struct Prepared {
    images: Vec<(String, Image)>,
    disk: Vec<Value>,
    moments: u64,
    before: Stored,
    after: Stored,
    /// Names there are afterwards.
    files: Vec<String>,
}

thread_local! {
    static PREPARED: RefCell<BTreeMap<usize, Rc<Prepared>>> = const { RefCell::new(BTreeMap::new()) };
}

/// How many cases there are: seeds from here on do nothing.
pub fn cases() -> u64 {
    let most = (0..SCRIPTS.len()).filter_map(|s| prepared(s).ok()).map(|p| p.moments).max().unwrap_or(0);
    most * SLOTS * HOW.len() as u64
}

/// For each script its name and how many cases it has.
pub fn table() -> Vec<(&'static str, u64)> {
    let cases = |s| prepared(s).map_or(0, |p| p.moments * HOW.len() as u64);
    SCRIPTS.iter().enumerate().map(|(n, s)| (s.name, cases(n))).collect()
}

/// One case: `seed` says which script, how it crashes, and when.
pub fn case(seed: u64, verbose: bool) -> Outcome {
    let (script, rest) = ((seed % SLOTS) as usize, seed / SLOTS);
    let Some(s) = SCRIPTS.get(script) else { return Outcome::default() };
    let (kind, moment) = (rest % HOW.len() as u64, rest / HOW.len() as u64);
    let prepared = match prepared(script) {
        Ok(p) => p,
        Err(e) => return Outcome::bad(format!("{}, without a crash: {e}", s.name)),
    };
    if moment >= prepared.moments {
        return Outcome::default();
    }
    let how = HOW[kind as usize];
    let left = Rc::new(RefCell::new(None));
    let (out, p) = (left.clone(), prepared.clone());
    let mut outcome = World::play(SEED, verbose, |w| async move {
        let play = Play::new(w, s, p, out);
        play.crash(moment, how, kind).await;
    });
    let found = left.take();
    let (images, disks) = found.unwrap_or_default();
    for disk in disks {
        if outcome.violation.is_some() {
            break;
        }
        let (images, prepared) = (images.clone(), prepared.clone());
        let second =
            World::play(SEED, verbose, |w| async move { by_headers(&w, images, &disk, &prepared).await });
        outcome.violation = second.violation.map(|v| format!("by headers, as the crash left them: {v}"));
        outcome.trace.extend(second.trace);
        outcome.hash ^= second.hash.rotate_left(1);
    }
    outcome.violation =
        outcome.violation.map(|v| format!("{}, crash at {moment} of its moments ({how:?}): {v}", s.name));
    outcome
}

/// Makes the images, and plays the script once without a crash.
fn prepared(script: usize) -> Result<Rc<Prepared>, String> {
    if let Some(p) = PREPARED.with_borrow(|p| p.get(&script).cloned()) {
        return Ok(p);
    }
    let s = &SCRIPTS[script];
    let (images, disk): Written = write_layers(s)?;
    let first = Rc::new(Prepared { images, disk, ..Prepared::default() });
    let result = Rc::new(RefCell::new(Prepared::default()));
    let (out, from) = (result.clone(), first.clone());
    let outcome = World::play(SEED, false, |w| async move {
        let after = Play::new(w, s, from, Rc::default()).whole().await;
        *out.borrow_mut() = after;
    });
    if let Some(v) = outcome.violation {
        return Err(v);
    }
    let after = result.take();
    let all = Rc::new(Prepared { images: first.images.clone(), disk: first.disk.clone(), ..after });
    PREPARED.with_borrow_mut(|p| p.insert(script, all.clone()));
    Ok(all)
}

/// What a crash left: all files, which one is the disk by the records, and what lies over it.
type Left = (Vec<(String, Image)>, Vec<Disk>);

/// The file of an image that is called `name`: where headers say another chain than the daemon has, the name says both.
fn own_file(name: &str) -> String {
    let said = name.strip_prefix("json:").and_then(|text| serde_json::from_str::<Json>(text).ok());
    said.and_then(|said| said["file"]["filename"].as_str().map(str::to_owned))
        .unwrap_or_else(|| name.to_owned())
}

/// An image that reads as the guest's disk: that disk itself, or what lies over it and holds nothing of its own.
#[derive(Clone, Default, Debug)]
struct Disk {
    driver: String,
    file: String,
}

fn text(v: &Json) -> String {
    v.as_str().unwrap_or_default().to_owned()
}

/// Whether the header of an image (as `query-named-block-nodes` describes it) names what is below it.
fn header_agrees(image: &Json) -> Result<(), String> {
    let (said, is) = (text(&image["backing-filename"]), text(&image["backing-image"]["filename"]));
    if said == is {
        Ok(())
    } else {
        Err(format!("{} says '{said}', and '{is}' is below it", text(&image["filename"])))
    }
}

/// Images over the disk of `stack` which hold nothing of their own: they read as it does.
fn over(stack: &Stack) -> impl Iterator<Item = Disk> {
    let alike = |l: &&Layer| l.open && l.written.is_empty() && l.over == Some(stack.disk);
    let image = |l: &Layer| Disk { driver: "qcow2".into(), file: format!("/{}.img", l.name) };
    stack.layers.iter().filter(alike).map(image)
}

/// How many images a script makes.
fn snapshots(script: &Script) -> usize {
    script.steps.iter().filter(|s| matches!(s, Step::Do("blockdev-snapshot-sync", _))).count()
}

/// Whether a script deletes images: of those that leave the chain, the ones that nobody opened by themselves.
fn deletes(script: &Script) -> bool {
    let asks = |step: &Step| match step {
        Step::Job(_, usual, more, _) => super::nth::with(usual(), more())["delete-images"] == true,
        _ => false,
    };
    script.steps.iter().any(asks) && (snapshots(script) > 0 || script.on.layers.iter().any(|l| !l.open))
}

/// Opens the disk by its header alone, in a world without records.
async fn by_headers(w: &World, images: Vec<(String, Image)>, disk: &Disk, prepared: &Prepared) {
    for (path, image) in images {
        w.host().install(&path, image);
    }
    let (outside, _process) = w.start();
    let Some(daemon) = Booted::start(w).await else { return };
    // read-only: nothing is repaired
    let node = json!({"driver": disk.driver, "node-name": "n", "read-only": true,
        "file": {"driver": "file", "read-only": true, "filename": disk.file}});
    let ready = async {
        let m = daemon.manage(w, &outside, &Rc::new(History::new())).await?;
        m.must("blockdev-add", node).await?;
        m.must("nbd-server-start", json!({"addr": Booted::nbd_address()})).await?;
        m.must("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "n", "name": "disk"})).await
    };
    match w.within(&outside, PATIENCE, "opening the disk", ready).await {
        Some(Ok(_)) => {}
        Some(Err(e)) => return w.verdict().violation(format!("{disk:?} does not open: {e}")),
        None => return,
    }
    if let Some(d) = connect(w, &outside).await {
        compare(w, prepared, &all_of(w, &*d).await, "the disk");
        d.disconnect();
    }
    daemon.quit(w, &outside).await;
}

fn compare(w: &World, prepared: &Prepared, found: &[Value], when: &str) {
    if w.verdict().is_bad() {
        return;
    }
    let differ = prepared.disk.iter().zip(found).position(|(a, b)| a != b);
    match differ {
        Some(n) => w
            .verdict()
            .violation(format!("{when}: sector {n} reads {:?} instead of {:?}", found[n], prepared.disk[n])),
        None if found.len() != prepared.disk.len() => {
            w.verdict().violation(format!("{when}: the disk has {} sectors", found.len()));
        }
        None => {}
    }
}

/// One run.
struct Play {
    world: World,
    script: &'static Script,
    prepared: Rc<Prepared>,
    outside: Env,
    _process: crate::Process,
    /// Steps that were answered.
    answered: Cell<usize>,
    left: Rc<RefCell<Option<Left>>>,
}

impl Play {
    fn new(
        world: World,
        script: &'static Script,
        prepared: Rc<Prepared>,
        left: Rc<RefCell<Option<Left>>>,
    ) -> Play {
        world.host().let_names_be_lost();
        for (path, image) in &prepared.images {
            world.host().install(path, image.clone());
        }
        let (outside, process) = world.start();
        Play { world, script, prepared, outside, _process: process, answered: Cell::new(0), left }
    }

    fn bad(&self, what: impl Into<String>) {
        self.world.verdict().violation(what);
    }

    /// A daemon with the script's images, and what it shows.
    async fn opened(&self) -> Option<(Booted, Rc<Manager>, Stored)> {
        let daemon = Booted::start_again(&self.world, None).await?;
        let open = async {
            let m = daemon.manage(&self.world, &self.outside, &Rc::new(History::new())).await?;
            for l in self.script.on.layers.iter().filter(|l| l.open) {
                m.must("blockdev-add", node(l, self.script.on)).await?;
            }
            m.must("nbd-server-start", json!({"addr": Booted::nbd_address(), "max-connections": 0})).await?;
            let export = json!({
                "type": "nbd", "id": "e0", "node-name": self.script.on.disk, "name": "disk", "writable": true
            });
            m.must("block-export-add", export).await?;
            let seen = self.look(&m).await?;
            Ok::<_, Refusal>((m, seen.stored))
        };
        match self.world.within(&self.outside, PATIENCE, "opening the images", open).await? {
            Ok((m, stored)) => Some((daemon, m, stored)),
            Err(e) => {
                self.bad(format!("opening the images: {e}"));
                None
            }
        }
    }

    /// Without a crash.
    async fn whole(&self) -> Prepared {
        let Some((daemon, m, before)) = self.opened().await else { return Prepared::default() };
        let begin = self.world.host().moments();
        let ended = self.world.within(&self.outside, PATIENCE * 2, "the script", self.steps(&m)).await;
        if !matches!(ended, Some(Ok(()))) {
            self.bad("the script fails");
            return Prepared::default();
        }
        let moments = self.world.host().moments() - begin;
        let after = self.end(daemon, &m).await.unwrap_or_default();
        let files = self.world.host().list();
        let images = files.iter().filter(|f| f.ends_with(".img")).count();
        if deletes(self.script) && images >= self.prepared.images.len() + snapshots(self.script) {
            self.bad("nothing was deleted");
        }
        Prepared { moments, before, after, files, ..Prepared::default() }
    }

    async fn steps(&self, m: &Manager) -> Result<(), Refusal> {
        for step in self.script.steps {
            match step {
                Step::Do(command, arguments) => {
                    m.must(command, arguments()).await?;
                    self.answered.set(self.answered.get() + 1);
                }
                Step::Job(command, usual, more, finish) => {
                    m.must(command, super::nth::with(usual(), more())).await?;
                    self.answered.set(self.answered.get() + 1);
                    self.settle(m, *finish != Finish::Stop).await?;
                }
                Step::Rewrite(..) => {}
            }
        }
        Ok(())
    }

    /// Brings jobs to their end.
    async fn settle(&self, m: &Manager, pivot: bool) -> Result<(), Refusal> {
        loop {
            let jobs = m.must("query-jobs", json!({})).await?;
            let Some(job) = jobs.as_array().and_then(|j| j.first()) else { return Ok(()) };
            if job.get("error").is_some() {
                self.bad(format!("a job failed: {job}"));
                return Ok(());
            }
            let id = json!({"id": "job"});
            // each may be refused by a job that has gone on meanwhile
            match job["status"].as_str().unwrap_or_default() {
                "ready" if pivot => drop(m.execute("job-complete", id).await),
                "ready" => drop(m.execute("block-job-cancel", json!({"device": "job"})).await),
                "pending" => drop(m.execute("job-finalize", id).await),
                "concluded" => drop(m.execute("job-dismiss", id).await),
                _ => {}
            }
            self.outside.sleep(Duration::from_millis(1)).await;
        }
    }

    async fn crash(&self, moment: u64, how: How, kind: u64) {
        let Some((daemon, m, _)) = self.opened().await else { return };
        let host = self.world.host();
        let at = host.moments() + moment + 1;
        let crashed = race(self.steps(&m), host.reach(at)).await;
        if crashed.is_some() {
            return self.bad("the moment of the crash never came: the same script did something else");
        }
        drop(m);
        // kinds that draw draw something else each
        (0..kind).for_each(|_| {
            self.world.machine().draw(Rng::draw);
        });
        match how {
            How::Kill => daemon.process.kill(),
            How::Power(keep) => host.power_loss_keeping(&[&daemon.process], keep),
        }
        self.world.count(if matches!(how, How::Kill) { "kills" } else { "power losses" }, 1);
        let left: Vec<(String, Image)> =
            host.list().into_iter().filter_map(|p| host.image(&p).map(|i| (p, i))).collect();
        let Some(daemon) = Booted::start_again(&self.world, None).await else { return };
        let back =
            self.world.within(&self.outside, PATIENCE, "coming back", self.come_back(&daemon, left)).await;
        let m = match back {
            Some(Ok(m)) => m,
            Some(Err(e)) => return self.bad(format!("coming back: {e}")),
            None => return,
        };
        let settled = self.world.within(&self.outside, PATIENCE, "the job", self.settle(&m, true)).await;
        if !matches!(settled, Some(Ok(()))) {
            return self.bad("what was begun does not end");
        }
        let Some(stored) = self.end(daemon, &m).await else { return };
        let (before, after) = (&self.prepared.before, &self.prepared.after);
        let done = stored.chain == after.chain;
        if done && stored != *after {
            self.bad(format!("it is done, and there are {:?}, not {:?}", stored.nodes, after.nodes));
        }
        // with several steps the first may have been done, which shows in the chain or not
        if !done && self.script.steps.len() == 1 && stored != *before {
            self.bad(format!("it was never begun, and there are {:?}, not {:?}", stored.nodes, before.nodes));
        }
        self.world.count(if done { "done in the end" } else { "never begun" }, 1);
        if self.answered.get() == self.script.steps.len() && !done {
            self.bad(format!(
                "it was answered, and in the end the disk is {:?}, not {:?}",
                stored.chain, after.chain
            ));
        }
        let more = host.list().into_iter().find(|f| f.ends_with(".img") && !self.prepared.files.contains(f));
        // one that was made for a snapshot and never taken into use is not meant
        let begun = self.answered.get() > 0 || self.script.steps.len() == 1;
        if let Some(more) = more.filter(|_| done && begun) {
            self.bad(format!("it is done, and {more} is left, which was to be deleted"));
        }
    }

    /// A daemon on what the crash left.
    async fn come_back(&self, daemon: &Booted, left: Vec<(String, Image)>) -> Result<Rc<Manager>, Refusal> {
        let m = daemon.manage(&self.world, &self.outside, &Rc::new(History::new())).await?;
        let state = m.must("query-state", json!({})).await?;
        if state["broken"] != json!([]) {
            self.bad(format!("not all came back: {state}"));
            return Ok(m);
        }
        let jobs = m.must("query-jobs", json!({})).await?;
        let resumed = jobs.as_array().is_some_and(|j| j.iter().any(|j| j.get("resumed").is_some()));
        if jobs != json!([]) {
            self.world.count("jobs that are there again", 1);
            if !resumed && jobs[0]["status"] != "concluded" {
                self.bad(format!("a job is there again and does not say so: {jobs}"));
            }
        }
        let Seen { disk, stored, agree } = self.look(&m).await?;
        if let (Err(why), false) = (&agree, resumed) {
            self.bad(format!("{why}, and no job mends that; the disk is {:?}", stored.chain));
        }
        if agree.is_err() {
            self.world.count("headers ahead of the records", 1);
        }
        let disks = [disk].into_iter().chain(over(self.script.on)).collect();
        *self.left.borrow_mut() = Some((left, disks));
        if jobs == json!([]) {
            // a job that is pending holds clients until it is finalized
            self.read("after the restart").await;
        }
        Ok(m)
    }

    async fn read(&self, when: &str) {
        let Some(d) = connect(&self.world, &self.outside).await else { return };
        compare(&self.world, &self.prepared, &all_of(&self.world, &*d).await, when);
        d.disconnect();
    }

    /// Which image is the disk, the files of its chain, and whether its headers say the same.
    async fn look(&self, m: &Manager) -> Result<Seen, Refusal> {
        let exports = m.must("query-block-exports", json!({})).await?;
        let name = exports[0]["node-name"].as_str().unwrap_or_default().to_owned();
        let nodes = m.must("query-named-block-nodes", json!({})).await?;
        let found = nodes.as_array().into_iter().flatten().find(|n| n["node-name"] == name.as_str());
        // while a job runs its filter is what the export has
        let mut node = found.cloned().unwrap_or_default();
        let (mut chain, mut agree) = (Vec::new(), Ok(()));
        let filters = ["mirror_top", "commit_top", "copy-on-read"];
        while filters.contains(&node["drv"].as_str().unwrap_or_default()) {
            let below = text(&node["image"]["filename"]);
            let all = nodes.as_array().into_iter().flatten();
            let mut same = all.filter(|n| {
                n["file"] == below.as_str()
                    && ["qcow2", "raw"].contains(&n["drv"].as_str().unwrap_or_default())
            });
            node = same.next().cloned().unwrap_or_default();
        }
        let disk = Disk { driver: text(&node["drv"]), file: own_file(&text(&node["file"])) };
        let mut image = &node["image"];
        while !image.is_null() {
            chain.push(text(&image["filename"]));
            agree = agree.and(header_agrees(image));
            image = &image["backing-image"];
        }
        for above in over(self.script.on) {
            let mut all = nodes.as_array().into_iter().flatten();
            let node = all.find(|n| n["drv"] == "qcow2" && own_file(&text(&n["file"])) == above.file);
            agree = agree.and(node.map_or(Ok(()), |n| header_agrees(&n["image"])));
        }
        let all = nodes.as_array().into_iter().flatten();
        let mut nodes: Vec<String> =
            all.map(|n| format!("{} {} {}", n["drv"], own_file(&text(&n["file"])), n["ro"])).collect();
        nodes.sort_unstable();
        Ok(Seen { disk, stored: Stored { chain, nodes }, agree })
    }

    /// All has ended: how the disk is stored. What is left is good, by headers alone.
    async fn end(&self, daemon: Booted, m: &Manager) -> Option<Stored> {
        self.read("at the end").await;
        let looked = self.world.within(&self.outside, PATIENCE, "looking", self.look(m)).await?;
        let Ok(Seen { disk, stored, agree }) = looked else {
            self.bad("the disk cannot be looked at");
            return None;
        };
        self.world.verdict().check("at the end", agree);
        daemon.quit(&self.world, &self.outside).await;
        Booted::all_have_quit(&self.world);
        let host = self.world.host();
        for path in host.list() {
            let image = host.image(&path).unwrap_or_default();
            if image.read(Span::new(0, 4)) == b"QFI\xfb" {
                self.world.verdict().check(&path, check_qcow2(&image, true));
            }
        }
        if self.world.verdict().is_bad() {
            return None;
        }
        for disk in [disk].into_iter().chain(over(self.script.on)) {
            let daemon = Booted::start(&self.world).await?;
            let node = json!({"driver": disk.driver, "node-name": "n", "file": {"driver": "file", "filename": disk.file}});
            if let Some(d) = opened(&self.world, &daemon, &self.outside, node).await {
                let found = all_of(&self.world, &*d).await;
                compare(&self.world, &self.prepared, &found, &format!("{} at rest", disk.file));
                d.disconnect();
            }
            daemon.quit(&self.world, &self.outside).await;
        }
        (!self.world.verdict().is_bad()).then_some(stored)
    }
}
