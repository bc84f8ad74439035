//! One run: the production driver over a simulated disk, a workload, and everything recorded.

use crate::history::{Ask, History};
use crate::proto::Backing;
use crate::record::{Entry, RecordedFile, Recorder};
use bitmap::{BitmapList, DirtyBitmap};
use block::{Data, Prealloc, ReqFlags, Result, Span};
use env::{Env, Executor, OpenMode};
use graph::{Node, Role};
use qcow2::create::Options;
use qcow2::storage::{Memory, now};
use qcow2::testing::FileNode;
use qcow2::testing::file::edge_onto;
use qcow2::{Options as Driver, Qcow2};
use sim::{Host, Image, Machine, Net, NetProfile, Profile, Rng, SimBackend, Value, stamped, values_of};
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

const SECTOR: u64 = 512;
/// Turns of the loop that a run may take; a run that spins for ever ends as a failure, not as a hang.
const MAX_STEPS: u64 = 2_000_000;

/// What kind of image, and how it is opened.
#[derive(Clone, Debug)]
pub struct Setup {
    /// For messages.
    pub name: String,
    /// How it is created.
    pub create: Options,
    /// Whether there is a layer below.
    pub backing: bool,
    /// Bytes of the L2 cache, small to have slices written back early.
    pub l2_cache: Option<u64>,
    /// Whether it keeps a bitmap of all that the guest changed.
    pub bitmap: bool,
}

impl Setup {
    /// The layer below: every sector stamped with its own write.
    pub fn backing_bytes(&self) -> Vec<u8> {
        if self.backing { stamped(BACKING_STAMP, 0, self.create.size / SECTOR).to_vec() } else { Vec::new() }
    }

    /// What each sector of a new image holds.
    pub fn fresh_value(&self) -> Value {
        if self.backing { Value::Write(BACKING_STAMP) } else { Value::Zero }
    }

    /// A new, empty image of this kind, with what its sectors hold.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn fresh(&self) -> Result<(Files, Vec<Value>)> {
        let (image, data) = (Memory::default(), Memory::default());
        now(qcow2::create::create(&image, self.create.data_file.is_some().then_some(&data), &self.create))?;
        let values = vec![self.fresh_value(); (self.create.size / SECTOR) as usize];
        Ok((Files { image: image.into_bytes(), data: data.into_bytes() }, values))
    }
}

/// The stamp of the layer below.
pub const BACKING_STAMP: u32 = 1;
/// The bitmap that a [`Setup`] keeps, and its granularity: bytes a bit.
pub const BITMAP: (&str, u64) = ("changes", 4096);
/// The first stamp for guests.
pub const FIRST_STAMP: u32 = 2;

/// The bytes of an image and its data file.
#[derive(Clone, Default)]
pub struct Files {
    /// The image.
    pub image: Vec<u8>,
    /// The external data file.
    pub data: Vec<u8>,
}

/// One request of a workload.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What.
    pub ask: Ask,
    /// Sectors.
    pub sectors: Range<u64>,
}

/// Requests that are made at once; the next step begins when all are answered.
pub type Step = Vec<Request>;

/// What a run left.
pub struct Recording {
    /// The files before.
    pub base: Files,
    /// What was written since.
    pub entries: Vec<Entry>,
    /// What was asked.
    pub history: History,
    /// Barriers issued, all files together, those of snapshots left out.
    pub barriers: u64,
    /// Flushes asked for.
    pub flushes: u64,
}

/// Opens the image as the daemon does, carries `steps` out, and closes it if `close`.
///
/// # Errors
/// A sentence, if the driver fails where it must not.
pub fn run(
    setup: &Setup,
    base: Files,
    history: History,
    steps: Vec<Step>,
    close: bool,
    seed: u64,
) -> std::result::Result<Recording, String> {
    let machine = Machine::new(seed);
    machine.limit_steps(MAX_STEPS);
    let net = Net::new(&machine, NetProfile::calm());
    let mut rng = Rng::new(seed);
    let mut profile = Profile::calm();
    profile.inline = *rng.choose(&[0.0, 0.5, 1.0]);
    profile.can_zero = rng.chance(0.8);
    profile.can_discard = rng.chance(0.8);
    let host = Host::new("lab", &machine, &net, profile);
    host.install("image", Image::from_bytes(&base.image));
    host.install("data", Image::from_bytes(&base.data));
    let executor = Executor::new(SimBackend::root(&host));
    let env = executor.env();
    let log = Rc::new(Recorder::default());
    let history = Rc::new(history);
    let flushes = steps.iter().flatten().filter(|r| r.ask == Ask::Flush).count() as u64;
    let work = work(env, setup.clone(), log.clone(), history.clone(), steps, close);
    let done = executor.try_run(work);
    drop(executor);
    match done {
        Ok(Ok(())) => (),
        Ok(Err(e)) => return Err(format!("the driver failed: {e}\n{}", history.describe())),
        Err(_) => return Err(format!("the driver hangs\n{}", history.describe())),
    }
    let history = Rc::try_unwrap(history).map_err(|_| "the driver's tasks outlive it".to_owned())?;
    Ok(Recording { base, barriers: log.barriers(), entries: log.take(), history, flushes })
}

async fn work(
    env: Env,
    setup: Setup,
    log: Rc<Recorder>,
    history: Rc<History>,
    steps: Vec<Step>,
    close: bool,
) -> Result<()> {
    let (mut node, mut marks) = open(&env, &setup, &log).await?;
    if let Some(list) = &marks
        && !renew_bitmap(&node, list, setup.fresh_value()).await?
    {
        // A bitmap is in the image once it was closed; that costs no guest's flush anything.
        log.uncounted(true);
        node.close().await?;
        drop((node, marks));
        (node, marks) = open(&env, &setup, &log).await?;
        log.uncounted(false);
    }
    let marks = marks.and_then(|list| list.borrow().first().cloned());
    for step in steps {
        let mut running = Vec::new();
        for request in step {
            if let Ask::Resize(_) | Ask::Take | Ask::Drop(_) = request.ask {
                if setup.create.version < 3
                    && matches!(request.ask, Ask::Resize(_))
                    && !node.snapshots().is_empty()
                {
                    // refused: the format cannot say how long the disk was when a snapshot was taken
                    continue;
                }
                log.uncounted(!matches!(request.ask, Ask::Resize(_)));
                let done = perform(&node, marks.as_ref(), &log, &history, request).await;
                log.uncounted(false);
                done?;
                continue;
            }
            let (node, marks, log, history) = (node.clone(), marks.clone(), log.clone(), history.clone());
            let result = Rc::new(std::cell::RefCell::new(Ok(())));
            let out = result.clone();
            let task = env.spawn("guest", async move {
                let r = perform(&node, marks.as_ref(), &log, &history, request).await;
                *out.borrow_mut() = r;
            });
            running.push((task, result));
        }
        for (task, result) in running {
            task.join().await;
            result.replace(Ok(()))?;
        }
    }
    if close {
        let (n, _) = history.begin(Ask::Flush, 0..0, log.len());
        node.close().await?;
        history.end(n, log.len());
    }
    Ok(())
}

/// Gives the image the bitmap if it has none that is complete; whether it had one. What a new image does not hold is marked in a
/// new bitmap.
async fn renew_bitmap(node: &Rc<Qcow2>, list: &BitmapList, fresh: Value) -> Result<bool> {
    let there = list.borrow().first().cloned();
    if there.as_ref().is_some_and(|b| !b.inconsistent()) {
        return Ok(true);
    }
    if there.is_some() {
        node.forget_bitmap(BITMAP.0).await?;
        list.take();
    }
    node.check_bitmap(BITMAP.0, BITMAP.1)?;
    let new = DirtyBitmap::new(Some(BITMAP.0.to_owned()), node.len(), BITMAP.1)?;
    new.set_persistent(true);
    let bytes = node.read(Span::new(0, node.len())).await?.to_vec();
    for (sector, value) in (0..).zip(values_of(&bytes, 0)) {
        if value != fresh {
            new.bits_mut().set(Span::new(sector * SECTOR, SECTOR));
        }
    }
    list.borrow_mut().push(Rc::new(new));
    Ok(false)
}

type Opened = (Rc<Qcow2>, Option<BitmapList>);

async fn open(env: &Env, setup: &Setup, log: &Rc<Recorder>) -> Result<Opened> {
    let mode = OpenMode { write: true, ..OpenMode::default() };
    let mut edges = Vec::new();
    for (i, name) in ["image", "data"].iter().enumerate() {
        let file = env.open(Path::new(name), mode).await?;
        let recorded = Rc::new(RecordedFile::new(file, log.clone(), i));
        let role = if i == 0 { Role::Primary } else { Role::Data };
        edges.push(edge_onto(env, FileNode::new(recorded), true, role).await?);
    }
    let data = edges.pop().filter(|_| setup.create.data_file.is_some());
    let file = edges.remove(0);
    let options = Driver { writable: true, l2_cache_size: setup.l2_cache, ..Driver::default() };
    let node = Qcow2::open(env.clone(), file, data, options).await?;
    if setup.backing {
        let backing = Backing(Data::from(setup.backing_bytes()));
        node.set_backing(Some(edge_onto(env, Rc::new(backing), false, Role::Backing).await?));
    }
    let list = setup.bitmap.then(BitmapList::default);
    if let Some(list) = &list {
        node.share_bitmaps(list);
    }
    Ok((node, list))
}

async fn perform(
    node: &Rc<Qcow2>,
    marks: Option<&Rc<DirtyBitmap>>,
    log: &Recorder,
    history: &History,
    r: Request,
) -> Result<()> {
    let now = node.len() / SECTOR;
    let sectors = match r.ask {
        Ask::Resize(n) => n.min(now)..now,
        Ask::Flush | Ask::Take | Ask::Drop(_) => 0..0,
        _ => r.sectors.start.min(now)..r.sectors.end.min(now),
    };
    if sectors.is_empty() && matches!(r.ask, Ask::Write | Ask::WritePacked | Ask::Zero { .. } | Ask::Discard)
    {
        return Ok(());
    }
    let (number, stamp) = history.begin(r.ask, sectors.clone(), log.len());
    let at = Span::between(sectors.start * SECTOR, sectors.end * SECTOR);
    let data = || stamped(stamp, sectors.start, sectors.end - sectors.start);
    if let Some(marks) = marks.filter(|_| !at.is_empty()) {
        // as the graph does for every change of a node
        marks.record(at);
    }
    match r.ask {
        Ask::Write => node.write(at, data(), ReqFlags::NONE).await?,
        Ask::WritePacked => node.write(at, data(), ReqFlags { compressed: true, ..ReqFlags::NONE }).await?,
        Ask::Zero { unmap } => node.zero(at, ReqFlags { may_unmap: unmap, ..ReqFlags::NONE }).await?,
        Ask::Discard => node.discard(at).await?,
        Ask::Resize(n) => node.resize(n * SECTOR, Prealloc::Off).await?,
        Ask::Flush => node.flush().await?,
        Ask::Take => {
            let name = format!("s{stamp}");
            let bytes = node.read(Span::new(0, node.len())).await?.to_vec();
            history.taking(&name, values_of(&bytes, 0));
            node.take_snapshot(&name, (stamp, 0), 0).await?;
            history.took(&name, log.len());
        }
        Ask::Drop(any) => {
            let all = node.snapshots();
            if !all.is_empty() {
                let index = (any % all.len() as u64) as usize;
                history.dropping(&all[index].name, log.len());
                node.delete_snapshot(index).await?;
            }
        }
    }
    history.end(number, log.len());
    check_read(node, at, stamp, r.ask).await
}

/// What was just written is read back while the image is open (of requests that ran alone this is certain; of those that
/// overlapped only that it is somebody's).
async fn check_read(node: &Rc<Qcow2>, at: Span, _stamp: u32, ask: Ask) -> Result<()> {
    let there = at.intersect(&Span::new(0, node.len()));
    if there.is_empty() || ask == Ask::Discard {
        return Ok(());
    }
    let bytes = node.read(there).await?.to_vec();
    match values_of(&bytes, there.start / SECTOR).iter().position(|v| *v == Value::Garbage) {
        None => Ok(()),
        Some(i) => Err(block::BlockError::corrupt(format!(
            "sector {} reads as nothing that anybody wrote, right after {ask:?}",
            there.start / SECTOR + i as u64
        ))),
    }
}
