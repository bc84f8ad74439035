//! One run: the production log over a simulated disk, and a record of all that was asked and when.
//!
//! What must stay true: what is remembered of a change by a user is the content at its one instant, and between which entries
//! of the recording it was under way; of a write, when it was asked for, sent and done.

use super::check::Files;
use crate::record::{Entry, RecordedFile, Recorder};
use bitmap::{Bitmap, BitmapList, DirtyBitmap};
use block::{Result, Span};
use dirtylog::{DirtyLog, Geometry, JobSet, Settings};
use env::{Env, Executor, File, OpenMode};
use sim::{Host, Image, Machine, Net, NetProfile, Profile, Rng, SimBackend, stamped};
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// Bytes of the disk: a bitmap of sectors needs two sectors of an area.
pub const LEN: u64 = 9 << 18;
/// Regions of the disk: few, so that they leave, and more once much is marked.
pub const GEOMETRY: Geometry = Geometry { region: 64 << 10, most: 8, limit: 12 };
/// Bytes a mark of the job's set stands for.
const SET_GRANULE: u64 = 64 << 10;
/// The job's key.
pub const SET: &str = "job";
const SECTOR: u64 = 512;
const MAX_STEPS: u64 = 2_000_000;
/// Names that bitmaps have.
pub const NAMES: [&str; 3] = ["a", "b", "c"];

/// A guest's write.
#[derive(Clone, Debug)]
pub struct Write {
    /// Its number, in the sectors it wrote.
    pub stamp: u32,
    /// Where.
    pub at: Span,
    /// Entries when it was asked for.
    pub asked: usize,
    /// Moment at which its marks were made; `u64::MAX` if they were not.
    pub done: u64,
}

/// What a bitmap is from one instant on.
#[derive(Clone, Debug)]
pub struct Version {
    /// The instant.
    pub moment: u64,
    /// Entries at the instant, and when it was durable (`usize::MAX` if that was not seen).
    pub began: usize,
    /// See `began`.
    pub ended: usize,
    /// Its content at the instant and whether it records; `None` if there is none of that name.
    pub content: Option<(Bitmap, bool)>,
}

/// What happened.
pub struct Run {
    /// The files before.
    pub base: Files,
    /// All changes since.
    pub entries: Vec<Entry>,
    /// Writes by number.
    pub writes: Vec<Write>,
    /// For each of [`NAMES`], then the job's set.
    pub versions: Vec<Vec<Version>>,
    /// The log was closed after so many entries, and nothing happened since.
    pub closed: Option<usize>,
    /// First stamp of this run.
    pub first_stamp: u32,
}

struct World {
    env: Env,
    rec: Rc<Recorder>,
    disk: Rc<dyn File>,
    target: Rc<dyn File>,
    log: Rc<DirtyLog>,
    list: BitmapList,
    writes: RefCell<Vec<Write>>,
    versions: RefCell<Vec<Vec<Version>>>,
    moment: Cell<u64>,
    first_stamp: u32,
    successor: RefCell<Option<(Rc<DirtyBitmap>, Rc<DirtyBitmap>)>>,
    set: RefCell<Option<JobSet>>,
    /// What the job has to copy, as it knows it in memory.
    dirty: RefCell<Option<Rc<DirtyBitmap>>>,
}

/// Runs a random history over `base`.
///
/// # Errors
/// A sentence, if the log fails where it must not.
pub fn run(base: &Files, rng: &mut Rng) -> std::result::Result<Run, String> {
    let seed = rng.draw();
    let machine = Machine::new(seed);
    machine.limit_steps(MAX_STEPS);
    let net = Net::new(&machine, NetProfile::calm());
    let mut profile = Profile::calm();
    profile.inline = *rng.choose(&[0.0, 0.5, 1.0]);
    let host = Host::new("lab", &machine, &net, profile);
    for (name, bytes) in ["disk", "log", "target"].iter().zip(&base.bytes) {
        host.install(name, Image::from_bytes(bytes));
    }
    let executor = Executor::new(SimBackend::root(&host));
    let env = executor.env();
    let rec = Rc::new(Recorder::default());
    let out = Rc::new(RefCell::new(None));
    let (close, steps, fork) = (rng.chance(0.3), rng.between(3, 25), rng.draw());
    let work = work(env, rec.clone(), base.next_stamp, steps, close, Rng::new(fork), out.clone());
    let done = executor.try_run(work);
    drop(executor);
    match done {
        Ok(Ok(())) => {}
        Ok(Err(e)) => return Err(format!("the log failed: {e}")),
        Err(_) => return Err("the log hangs".to_owned()),
    }
    let (writes, versions, closed) = out.take().ok_or("no result")?;
    Ok(Run {
        base: base.clone(),
        entries: rec.take(),
        writes,
        versions,
        closed,
        first_stamp: base.next_stamp,
    })
}

/// A bitmap of the node that nobody keeps.
fn working(list: &BitmapList, bits: &Bitmap) -> Result<Rc<DirtyBitmap>> {
    let new = Rc::new(DirtyBitmap::new(None, bits.len(), bits.granularity())?);
    new.bits_mut().merge(bits);
    list.borrow_mut().push(new.clone());
    Ok(new)
}

type Outcome = (Vec<Write>, Vec<Vec<Version>>, Option<usize>);

async fn work(
    env: Env,
    rec: Rc<Recorder>,
    first_stamp: u32,
    steps: u64,
    close: bool,
    mut rng: Rng,
    out: Rc<RefCell<Option<Outcome>>>,
) -> Result<()> {
    let w = Rc::new(World::open(env, rec, first_stamp).await?);
    for _ in 0..steps {
        let mut running = Vec::new();
        let failed = Rc::new(RefCell::new(Ok(())));
        for _ in 0..rng.between(1, 8) {
            let (w, failed, seed) = (w.clone(), failed.clone(), rng.draw());
            running.push(w.env.clone().spawn("guest", async move {
                let done = w.guest(Rng::new(seed)).await;
                if let Err(e) = done {
                    *failed.borrow_mut() = Err(e);
                }
            }));
        }
        if rng.chance(0.5) {
            w.user(&mut rng).await?;
        }
        if rng.chance(0.4) {
            w.job(&mut rng).await?;
        }
        if rng.chance(0.05) {
            w.env.sleep(Duration::from_secs(12)).await;
        }
        for task in running {
            task.join().await;
        }
        failed.replace(Ok(()))?;
    }
    let mut closed = None;
    if close {
        if let Some((b, s)) = w.successor.take() {
            w.thaw(&b, &s, false).await?;
        }
        w.log.close(b"later".to_vec()).await?;
        closed = Some(w.rec.len());
    }
    w.set.take();
    *out.borrow_mut() = Some((w.writes.borrow().clone(), w.versions.borrow().clone(), closed));
    Ok(())
}

impl World {
    async fn open(env: Env, rec: Rc<Recorder>, first_stamp: u32) -> Result<World> {
        let mode = OpenMode { write: true, ..OpenMode::default() };
        let mut files: Vec<Rc<dyn File>> = Vec::new();
        for (i, name) in ["disk", "log", "target"].iter().enumerate() {
            let file = env.open(Path::new(name), mode).await?;
            files.push(Rc::new(RecordedFile::new(file, rec.clone(), i)));
        }
        let (target, file, disk) = (files.remove(2), files.remove(1), files.remove(0));
        let found = dirtylog::read(&file).await?;
        let list = BitmapList::default();
        let mut versions = vec![Vec::new(); NAMES.len() + 1];
        let first = |content| Version { moment: 0, began: 0, ended: 0, content };
        for f in found.iter().flat_map(|f| &f.bitmaps) {
            let slot = NAMES.iter().position(|n| *n == f.name).unwrap_or(NAMES.len());
            versions[slot].push(first(Some((f.bits.clone(), f.enabled))));
            if !f.job {
                let b = DirtyBitmap::new(Some(f.name.clone()), LEN, f.bits.granularity())?;
                b.bits_mut().merge(&f.bits);
                b.set_enabled(f.enabled);
                b.set_persistent(true);
                list.borrow_mut().push(Rc::new(b));
            }
        }
        versions.iter_mut().filter(|v| v.is_empty()).for_each(|v| v.push(first(None)));
        let settings = Settings {
            len: LEN,
            identity: b"disk".to_vec(),
            witness: b"now".to_vec(),
            geometry: Some(GEOMETRY),
        };
        let log = DirtyLog::begin(&env, file, settings, list.clone(), found).await?;
        let set = log.take_set(SET);
        let dirty = set.as_ref().map(|s| working(&list, &s.left())).transpose()?;
        let (set, dirty) = (RefCell::new(set), RefCell::new(dirty));
        Ok(World {
            env,
            rec,
            disk,
            target,
            log,
            list,
            writes: RefCell::default(),
            versions: RefCell::new(versions),
            moment: Cell::new(1),
            first_stamp,
            successor: RefCell::new(None),
            set,
            dirty,
        })
    }

    fn tick(&self) -> u64 {
        self.moment.set(self.moment.get() + 1);
        self.moment.get()
    }

    async fn guest(&self, mut rng: Rng) -> Result<()> {
        if rng.chance(0.15) {
            return self.disk.barrier().await;
        }
        let total = LEN / SECTOR;
        let len = match rng.below(20) {
            0 => rng.between(1, total / 3),
            1..4 => rng.between(1, 150),
            _ => rng.between(1, 8),
        };
        // mostly in few places, so that regions are hit again
        let place = if rng.chance(0.7) { rng.below(12) * 384 + rng.below(16) } else { rng.below(total) };
        let first = place.min(total - len);
        let at = Span::new(first * SECTOR, len * SECTOR);
        let number = self.writes.borrow().len();
        let stamp = self.first_stamp + number as u32;
        self.writes.borrow_mut().push(Write { stamp, at, asked: self.rec.len(), done: u64::MAX });
        let pass = self.log.enter(at).await?;
        let written = self.disk.write(at.start, stamped(stamp, first, len)).await;
        // as the graph does: marked before it is answered, and only then given back
        self.list.borrow().iter().for_each(|b| b.record(at));
        self.writes.borrow_mut()[number].done = self.tick();
        self.log.leave(pass);
        written
    }

    fn named(&self, name: &str) -> Option<Rc<DirtyBitmap>> {
        self.list.borrow().iter().find(|b| b.name() == Some(name)).cloned()
    }

    /// Something has just been done to a bitmap in memory: remembers it, and makes it durable.
    async fn changed(&self, slots: &[usize]) -> Result<()> {
        let (moment, began) = (self.tick(), self.rec.len());
        let mut made = Vec::new();
        for slot in slots {
            let content = match NAMES.get(*slot) {
                Some(name) => self.named(name).map(|b| {
                    let mut bits = b.bits().clone();
                    b.successor().iter().for_each(|s| bits.merge(&s.bits()));
                    (bits, b.enabled())
                }),
                None => self.set.borrow().as_ref().map(|s| (s.left(), true)),
            };
            let version = Version { moment, began, ended: usize::MAX, content };
            let mut all = self.versions.borrow_mut();
            made.push((*slot, all[*slot].len()));
            all[*slot].push(version);
        }
        self.log.sync().await?;
        for (slot, i) in made {
            self.versions.borrow_mut()[slot][i].ended = self.rec.len();
        }
        Ok(())
    }

    async fn user(&self, rng: &mut Rng) -> Result<()> {
        let slot = rng.index(NAMES.len());
        let bitmap = self.named(NAMES[slot]);
        let frozen = self.successor.borrow().clone();
        if let Some((b, s)) = &frozen
            && rng.chance(0.4)
        {
            self.successor.take();
            return self.thaw(b, s, rng.chance(0.6)).await;
        }
        let Some(b) = bitmap else {
            let granularity = *rng.choose(&[512, 4096, 65536]);
            let new = DirtyBitmap::new(Some(NAMES[slot].to_owned()), LEN, granularity)?;
            new.set_persistent(true);
            new.set_enabled(rng.chance(0.8));
            self.list.borrow_mut().push(Rc::new(new));
            return self.changed(&[slot]).await;
        };
        if frozen.is_some_and(|(f, _)| Rc::ptr_eq(&f, &b)) {
            return Ok(());
        }
        match rng.below(6) {
            0 => {
                // as the graph does: nobody is to keep it, then it goes
                b.set_persistent(false);
                self.list.borrow_mut().retain(|x| !Rc::ptr_eq(x, &b));
            }
            1 | 2 => drop(b.bits_mut().take()),
            3 => b.set_enabled(!b.enabled()),
            4 => {
                // two at once: one takes what the other has, and that is cleared
                let other = rng.index(NAMES.len());
                let Some(o) = self.named(NAMES[other]).filter(|o| !Rc::ptr_eq(o, &b) && !o.frozen()) else {
                    return Ok(());
                };
                b.bits_mut().merge(&o.bits());
                drop(o.bits_mut().take());
                return self.changed(&[slot, other]).await;
            }
            _ if self.successor.borrow().is_none() => {
                let s = Rc::new(DirtyBitmap::new(None, LEN, b.bits().granularity())?);
                s.set_enabled(b.enabled());
                b.freeze(s.clone());
                self.list.borrow_mut().push(s.clone());
                *self.successor.borrow_mut() = Some((b, s));
            }
            _ => return Ok(()),
        }
        self.changed(&[slot]).await
    }

    /// The end of a backup with a bitmap.
    async fn thaw(&self, b: &Rc<DirtyBitmap>, s: &Rc<DirtyBitmap>, success: bool) -> Result<()> {
        self.list.borrow_mut().retain(|x| !Rc::ptr_eq(x, s));
        if success {
            b.bits_mut().clear_all();
        }
        b.bits_mut().merge(&s.bits());
        b.thaw();
        let slot = NAMES.iter().position(|n| b.name() == Some(n)).unwrap_or_default();
        self.changed(&[slot]).await
    }

    /// A job that copies the disk to the target, a piece now and then.
    async fn job(&self, rng: &mut Rng) -> Result<()> {
        let set = self.set.take();
        let Some(set) = set else {
            let mut all = Bitmap::new(LEN, SET_GRANULE)?;
            all.set_all();
            let moment = self.tick();
            let began = self.rec.len();
            let slot = NAMES.len();
            let version = Version { moment, began, ended: usize::MAX, content: Some((all.clone(), true)) };
            let i = self.versions.borrow().get(slot).map_or(0, Vec::len);
            self.versions.borrow_mut()[slot].push(version);
            *self.dirty.borrow_mut() = Some(working(&self.list, &all)?);
            let set = self.log.add_set(SET, &all).await?;
            self.versions.borrow_mut()[slot][i].ended = self.rec.len();
            *self.set.borrow_mut() = Some(set);
            return Ok(());
        };
        if rng.chance(0.03) {
            let (moment, began) = (self.tick(), self.rec.len());
            self.versions.borrow_mut()[NAMES.len()].push(Version {
                moment,
                began,
                ended: usize::MAX,
                content: None,
            });
            set.remove().await?;
            drop(set);
            let dirty = self.dirty.take();
            self.list.borrow_mut().retain(|b| !dirty.iter().any(|d| Rc::ptr_eq(b, d)));
            if let Some(v) = self.versions.borrow_mut()[NAMES.len()].last_mut() {
                v.ended = self.rec.len();
            }
            return Ok(());
        }
        for _ in 0..rng.between(1, 6) {
            let from = rng.below(LEN);
            let left = set.left();
            let at = left.next_area(Span::between(from, LEN), SET_GRANULE);
            let Some(at) = at.or_else(|| left.next_area(Span::new(0, LEN), SET_GRANULE)) else { break };
            let at = at.align_out(SET_GRANULE);
            set.started(at);
            self.dirty.borrow().iter().for_each(|d| d.bits_mut().clear(at));
            let data = self.disk.read(at).await?;
            self.target.write(at.start, data).await?;
            set.copied(at);
        }
        if rng.chance(0.6) {
            // what was read from the disk's cache must not vanish from it after the target has it
            let flush = async {
                self.disk.barrier().await?;
                self.target.barrier().await
            };
            let dirty = self.dirty.borrow().as_ref().map(|d| d.bits().clone());
            match dirty.filter(|_| rng.chance(0.5)) {
                Some(dirty) => set.checkpoint(&dirty, flush).await?,
                None => set.settle(flush).await?,
            }
        }
        *self.set.borrow_mut() = Some(set);
        Ok(())
    }
}
