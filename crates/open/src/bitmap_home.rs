//! Bitmaps that survive crashes: which file keeps those of which disk, and whether what is found in it may be believed.
//!
//! With a state directory each node that has persistent bitmaps (or a job's marks) gets a file there ([`dirtylog::DirtyLog`]),
//! found again by the node's driver and file name. What can happen: the daemon was killed, and before it came back somebody else
//! wrote to the disk, or put another one in its place. What must stay true: a bitmap that may lack changes is inconsistent,
//! with the reason; nothing that is found keeps a disk from being opened.
//!
//! What proves that nobody else wrote:
//! * qcow2: the header's number (`qcow2::header::AUTOCLEAR_KEPT`): whoever opens the image for writing and does not know the
//!   bit has to clear it. And the file, as below, against copies put back.
//! * Files: device, inode, length; after a clean end exactly the time of the last change; after a crash that it was not changed later
//!   than [`GRACE`] after the last record. A write by somebody else in that time is not noticed.
//! * Devices and NBD: the length. That nobody else writes is for the user to see to.

use crate::{Inherited, Opener};
use bitmap::DirtyBitmap;
use block::{BlockError, ErrorKind, Io, Result, Span};
use dirtylog::{DirtyLog, Found, Geometry, Pass, Settings};
use env::{Env, Existing, FileKind, OpenMode};
use graph::{Admitted, Graph, NodeCell, WriteAhead};
use qcow2::Qcow2;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::time::Duration;

/// A record is written at least every [`dirtylog::BEAT`] while somebody writes; the rest is for a busy machine.
pub(crate) const GRACE: Duration = Duration::from_secs(90);

/// Told of what became of bitmaps that were found: a sentence for people.
pub type BitmapsHook = Rc<dyn Fn(&str)>;

/// The directory that keeps bitmaps.
pub struct BitmapHome {
    env: Env,
    dir: PathBuf,
    tell: BitmapsHook,
    resuming: Cell<bool>,
    resting: Cell<bool>,
    geometry: Cell<Option<Geometry>>,
    deserted: Cell<bool>,
    /// When anything was last recorded of nodes whose bitmaps were found, by their numbers.
    recorded: RefCell<BTreeMap<u64, Duration>>,
    /// Files as they were when the first node that uses them was opened, while an earlier life is being restored: to open an image
    /// may change it.
    seen: RefCell<BTreeMap<(u64, u64), Witness>>,
}

/// What is known of a disk's file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Witness {
    device: u64,
    inode: u64,
    len: u64,
    modified: u64,
}

impl Witness {
    pub(crate) async fn of(cell: &NodeCell) -> Witness {
        // Without facts nothing is proven.
        match cell.node().host_file().await {
            Ok(Some(i)) if i.kind == FileKind::Regular => {
                Witness { device: i.device, inode: i.inode, len: i.len, modified: i.modified }
            }
            _ => Witness::default(),
        }
    }

    /// Whether both are of one file.
    pub(crate) fn is_same_file(self, other: Witness) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// When the file was last changed, since 1970.
    pub(crate) fn modified(self) -> Duration {
        Duration::from_nanos(self.modified)
    }

    pub(crate) fn encode(self) -> Vec<u8> {
        [self.device, self.inode, self.len, self.modified].iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    pub(crate) fn parse(b: &[u8]) -> Witness {
        let words: Vec<u64> = b.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).collect();
        match words[..] {
            [device, inode, len, modified] => Witness { device, inode, len, modified },
            _ => Witness::default(),
        }
    }
}

/// What identifies a disk: the number in a qcow2 image (or zeroes), then driver and file name.
fn identity(number: Option<[u8; 16]>, name: &str) -> Vec<u8> {
    let mut out = number.unwrap_or_default().to_vec();
    out.extend_from_slice(name.as_bytes());
    out
}

fn number_of(identity: &[u8]) -> Option<[u8; 16]> {
    identity.first_chunk::<16>().copied().filter(|n| *n != [0; 16])
}

impl BitmapHome {
    /// While an earlier life is being restored jobs that are started find what they had still to do.
    pub fn set_resuming(&self, on: bool) {
        self.resuming.set(on);
        self.seen.borrow_mut().clear();
    }

    /// See [`BitmapHome::set_resuming`].
    pub fn is_resuming(&self) -> bool {
        self.resuming.get()
    }

    /// Disks that are opened from now on are cut into regions like this, whatever their length: for tests, whose disks are small.
    pub fn set_geometry(&self, geometry: Geometry) {
        self.geometry.set(Some(geometry));
    }

    /// The daemon ends: what jobs have still to do stays, for a later life.
    pub fn rest(&self) {
        self.resting.set(true);
    }

    /// See [`BitmapHome::rest`].
    pub fn is_resting(&self) -> bool {
        self.resting.get()
    }

    /// After [`BitmapHome::rest`]: no client writes any more, nor will one.
    pub fn desert(&self) {
        self.deserted.set(true);
    }

    /// See [`BitmapHome::desert`].
    pub fn is_deserted(&self) -> bool {
        self.deserted.get()
    }

    /// What is known of the file of `cell`, as it was before anybody opened it here.
    pub(crate) async fn first_seen(&self, cell: &NodeCell) -> Witness {
        let now = Witness::of(cell).await;
        self.seen.borrow().get(&(now.device, now.inode)).copied().unwrap_or(now)
    }

    /// Whether the file of `other` has not been changed since what is kept of `cell` was last recorded, as far as its time tells: for
    /// what `cell` keeps of both. As for bitmaps, a change within [`GRACE`] is not noticed, nor one of a device or behind a link.
    pub async fn is_as_left(&self, cell: &NodeCell, other: &NodeCell) -> bool {
        let Some(recorded) = self.recorded.borrow().get(&cell.id()).copied() else { return false };
        self.first_seen(other).await.modified() <= recorded.saturating_add(GRACE)
    }

    pub(crate) fn env(&self) -> &Env {
        &self.env
    }

    /// Where it is written down how far the job `id` has come with an instant.
    pub(crate) fn instant_path(&self, id: &str) -> PathBuf {
        self.file_of("instant", id)
    }

    /// Makes durable which files there are.
    pub(crate) fn sync(&self) -> Result<()> {
        self.env.sync_directory(&self.dir)
    }

    pub(crate) fn say_trouble(&self, what: &str) {
        (self.tell)(what);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.file_of("bitmaps", name)
    }

    /// The file that keeps `kind` of `name`, which may be longer than a file's name.
    fn file_of(&self, kind: &str, name: &str) -> PathBuf {
        let (a, b) = (crc32c::crc32c(name.as_bytes()), crc32c::crc32c_append(!0, name.as_bytes()));
        self.dir.join(format!("{kind}-{a:08x}{b:08x}-{}", name.len()))
    }

    /// What the disk in `filename` is called here: the same in a later life with another working directory.
    fn named(&self, driver: &str, filename: &str) -> String {
        let path = Path::new(filename);
        let relative = !filename.starts_with("json:") && !filename.starts_with("nbd") && path.is_relative();
        let full = if relative { self.env.absolute(path) } else { path.to_owned() };
        format!("{driver}:{}", full.display())
    }

    /// What the disk of a node is called here.
    pub(crate) async fn disk_name(&self, cell: &NodeCell) -> Result<String> {
        let node = cell.node();
        let name = self.named(node.driver(), &node.details().await?.filename);
        // a window of a file is another disk than the whole
        Ok(match drivers::raw::offset_of(&**node) {
            0 => name,
            offset => format!("{name}+{offset}"),
        })
    }

    async fn read(&self, name: &str) -> Result<Option<(Rc<dyn env::File>, Option<Found>)>> {
        let mode = OpenMode { write: true, ..OpenMode::default() };
        let file = match self.env.open(&self.path(name), mode).await {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e.context(format_args!("the bitmaps of {name}"))),
        };
        let found = dirtylog::read(&file).await?;
        // a name that gives the same path by chance
        let other = found.as_ref().is_some_and(|f| f.identity.get(16..) != Some(name.as_bytes()));
        if other {
            return Err(BlockError::invalid(format!(
                "'{}' keeps the bitmaps of another disk than {name}",
                self.path(name).display()
            )));
        }
        Ok(Some((file, found)))
    }

    /// Before the image `filename` in `file` is opened for writing: the numbers by which it may vouch for what is kept. It is asked
    /// for none if the file says already that somebody wrote to it.
    async fn before(&self, filename: &str, file: &NodeCell) -> qcow2::Keeper {
        let old = match self.read(&self.named("qcow2", filename)).await {
            Ok(Some((_, Some(found)))) if doubt_of_file(file, &found).await.is_none() => {
                number_of(&found.identity)
            }
            _ => None,
        };
        let mut new = [0; 16];
        new[..8].copy_from_slice(&self.env.random().to_le_bytes());
        new[8..].copy_from_slice(&(self.env.random() | 1).to_le_bytes());
        qcow2::Keeper { old, new }
    }

    /// A node has been opened, and nobody uses it yet: gives it the bitmaps that were kept for it. What fails is told, and keeps
    /// nobody from using the disk.
    pub(crate) async fn opened(self: &Rc<Self>, cell: &Rc<NodeCell>) {
        if let Err(e) = self.adopt(cell).await {
            for b in cell.bitmaps().iter().filter(|b| b.inconsistent() && b.why_inconsistent().is_empty()) {
                b.set_reason(e.message());
            }
            self.say_trouble(&format!("node '{}': bitmaps that were kept cannot be used: {e}", cell.name()));
        }
    }

    async fn adopt(self: &Rc<Self>, cell: &Rc<NodeCell>) -> Result<()> {
        let name = self.disk_name(cell).await?;
        let there = self.read(&name).await?;
        let image = cell.node().as_any().downcast_ref::<Qcow2>();
        if image.is_some() && !cell.is_writable() {
            // Nobody changes it, and its bitmaps are as they are in it.
            return Ok(());
        }
        let persistent = cell.bitmaps().iter().any(|b| b.persistent());
        let Some((file, found)) = there else {
            return if persistent { self.begin(cell, &name, None).await.map(drop) } else { Ok(()) };
        };
        let Some(mut found) = found else {
            let unused = dirtylog::is_unused(&file).await?;
            if !unused {
                let why = "the file of its bitmaps is damaged: they are lost";
                cell.bitmaps().iter().filter(|b| b.inconsistent()).for_each(|b| b.set_reason(why));
                self.say_trouble(&format!("node '{}': {why}", cell.name()));
            }
            return if persistent {
                self.begin(cell, &name, Some((file, None))).await.map(drop)
            } else if unused {
                drop(file);
                self.env.remove(&self.path(&name)).await
            } else {
                Ok(())
            };
        };
        self.recorded.borrow_mut().insert(cell.id(), Duration::from_secs(found.wall));
        let doubt = match image {
            Some(image) if image.vouched() => None,
            Some(_) => Some("another program may have written to the image since".to_owned()),
            None if found.clean && found.len != cell.node().len() => {
                Some(format!("the disk had {} bytes and has {}", found.len, cell.node().len()))
            }
            None => doubt_of_file(cell, &found).await,
        };
        let missed = doubt.is_some() && (image.is_none() || found.bitmaps.iter().any(|b| b.job));
        let missed = missed || doubt.is_some() && cell.bitmaps().iter().any(|b| b.inconsistent());
        match image {
            Some(_) => {
                restore_stored(cell, &found, doubt.as_deref());
                if doubt.is_none() {
                    // made since the image was opened, so that it never got there
                    restore_ours(cell, &found, None)?;
                }
            }
            None => restore_ours(cell, &found, doubt.as_deref())?,
        }
        if let Some(why) = &doubt {
            found.bitmaps.iter_mut().for_each(|b| b.inconsistent = Some(why.clone()));
        }
        if missed || doubt.is_none() {
            self.say(cell, &found, doubt.as_deref());
        }
        let used = found.bitmaps.iter().any(|b| b.job) || cell.bitmaps().iter().any(|b| b.persistent());
        if !used {
            drop(file);
            return self.env.remove(&self.path(&name)).await;
        }
        self.begin(cell, &name, Some((file, Some(found)))).await.map(drop)
    }

    fn say(&self, cell: &NodeCell, found: &Found, doubt: Option<&str>) {
        let node = cell.name();
        found.damage.iter().for_each(|d| self.say_trouble(&format!("node '{node}': {d}")));
        if let Some(why) = doubt {
            self.say_trouble(&format!("node '{node}': what is kept of its bitmaps is not used: {why}"));
        } else if !found.clean {
            let mib = found.doubt().div_ceil(1 << 20);
            self.say_trouble(&format!(
                "node '{node}' was not closed: its bitmaps are complete; {mib} MiB that were being written count as changed"
            ));
        }
    }

    /// Begins a log for `cell`; nobody writes to it now.
    async fn begin(
        self: &Rc<Self>,
        cell: &Rc<NodeCell>,
        name: &str,
        there: Option<(Rc<dyn env::File>, Option<Found>)>,
    ) -> Result<Rc<DirtyLog>> {
        let (file, found) = match there {
            Some(there) => there,
            None => {
                let mode = OpenMode { write: true, existing: Existing::CreateNew, ..OpenMode::default() };
                let file = self.env.open(&self.path(name), mode).await?;
                self.env.sync_directory(&self.dir)?;
                (file, None)
            }
        };
        let number = cell.node().as_any().downcast_ref::<Qcow2>().and_then(Qcow2::kept_number);
        let settings = Settings {
            len: cell.node().len(),
            identity: identity(number, name),
            witness: Witness::of(cell).await.encode(),
            geometry: self.geometry.get(),
        };
        let log = DirtyLog::begin(&self.env, file, settings, cell.bitmap_list(), found).await?;
        cell.set_write_ahead(Some(Rc::new(Kept {
            log: log.clone(),
            cell: Rc::downgrade(cell),
            path: RefCell::new(Some(self.path(name))),
            env: self.env.clone(),
        })));
        Ok(log)
    }

    /// The log of `cell`, begun now if there is none: for the first bitmap that is to be kept, or a job's marks.
    ///
    /// # Errors
    /// The file cannot be made; a node that is not writable.
    pub async fn log(self: &Rc<Self>, graph: &Graph, cell: &Rc<NodeCell>) -> Result<Rc<DirtyLog>> {
        if let Some(log) = log_of(cell) {
            return Ok(log);
        }
        if !cell.is_writable() || !cell.is_active() {
            return Err(BlockError::invalid(format!(
                "Node '{}' is not writable: its bitmaps cannot be kept",
                cell.name()
            )));
        }
        let name = self.disk_name(cell).await?;
        // Writes that began before are waited for: the log would not know them.
        let _still = graph.quiesce(cell, &[]).await;
        if let Some(log) = log_of(cell) {
            return Ok(log);
        }
        // What is in the file is of a disk that was here before, and of nobody's concern now: it had no bitmaps when it was
        // opened.
        let there = self.read(&name).await?.map(|(file, mut found)| {
            found.iter_mut().for_each(|f| f.bitmaps.clear());
            (file, found)
        });
        self.begin(cell, &name, there).await
    }
}

/// Why the file of `cell` may have been written to by somebody else since `found` was, if it may.
async fn doubt_of_file(cell: &NodeCell, found: &Found) -> Option<String> {
    let (then, now) = (Witness::parse(&found.witness), Witness::of(cell).await);
    if then == Witness::default() || now == Witness::default() {
        return (then != now).then(|| "it is another file or device".to_owned());
    }
    if (then.device, then.inode) != (now.device, now.inode) {
        return Some("it is another file than the one whose bitmaps were kept".to_owned());
    }
    if then.modified == 0 || now.modified == 0 {
        return None;
    }
    let late = match found.clean {
        true => now.modified != then.modified,
        false => Duration::from_nanos(now.modified) > Duration::from_secs(found.wall).saturating_add(GRACE),
    };
    late.then(|| "the file was changed after its bitmaps were last kept".to_owned())
}

/// The log that stands before the writes of `cell`, if any.
pub fn log_of(cell: &NodeCell) -> Option<Rc<DirtyLog>> {
    let ahead = cell.write_ahead()?;
    ahead.as_any().downcast_ref::<Kept>().map(|k| k.log.clone())
}

/// Bitmaps that the image keeps, but marked as in use: what was kept here makes them whole.
fn restore_stored(cell: &NodeCell, found: &Found, doubt: Option<&str>) {
    for b in cell.bitmaps().iter().filter(|b| b.persistent() && b.inconsistent()) {
        let kept = found.bitmaps.iter().find(|f| !f.job && b.name() == Some(&f.name));
        let granularity = b.bits().granularity();
        match (kept, doubt) {
            (_, Some(why)) => b.set_reason(why),
            (None, None) => b.set_reason("it was not kept in the state directory"),
            (Some(f), None) if f.inconsistent.is_some() || f.bits.granularity() != granularity => {
                b.set_reason(f.inconsistent.as_deref().unwrap_or("another bitmap of its name was kept"));
            }
            (Some(f), None) => {
                b.bits_mut().merge(&f.bits);
                cover_growth(b, f.bits.len());
                b.set_consistent();
                b.set_enabled(f.enabled);
            }
        }
    }
}

/// Bitmaps that nobody keeps but us.
fn restore_ours(cell: &NodeCell, found: &Found, doubt: Option<&str>) -> Result<()> {
    for f in found.bitmaps.iter().filter(|f| !f.job && cell.find_bitmap(&f.name).is_none()) {
        let b = DirtyBitmap::new(Some(f.name.clone()), cell.node().len(), f.bits.granularity())?;
        b.bits_mut().merge(&f.bits);
        cover_growth(&b, f.bits.len());
        b.set_persistent(true);
        b.set_enabled(f.enabled);
        if let Some(why) = f.inconsistent.as_deref().or(doubt) {
            b.set_inconsistent();
            b.set_reason(why);
        }
        cell.add_bitmap(Rc::new(b));
    }
    Ok(())
}

/// The disk grew while it was being closed, or behind our back: what was added counts as changed.
fn cover_growth(b: &DirtyBitmap, kept: u64) {
    let len = b.bits().len();
    b.bits_mut().set(Span::between(kept, len));
}

/// The log of a node, as the graph sees it.
struct Kept {
    log: Rc<DirtyLog>,
    cell: Weak<NodeCell>,
    path: RefCell<Option<PathBuf>>,
    env: Env,
}

impl WriteAhead for Kept {
    fn try_enter(&self, at: Span) -> Option<Admitted> {
        self.log.try_enter(at).map(|p| Admitted(p.0))
    }
    fn enter(&self, at: Span) -> Io<'_, Admitted> {
        Box::pin(async move {
            let entered = self.log.enter(at).await;
            entered
                .map(|p| Admitted(p.0))
                .map_err(|e| e.context("what is to be changed could not be recorded"))
        })
    }
    fn leave(&self, by: Admitted) {
        self.log.leave(Pass(by.0));
    }
    fn sync(&self) -> Io<'_> {
        Box::pin(self.log.sync())
    }
    fn resize(&self, len: u64) -> Io<'_> {
        Box::pin(self.log.resize(len))
    }
    fn close(&self) -> Io<'_> {
        Box::pin(async move {
            let witness = match self.cell.upgrade() {
                Some(cell) => Witness::of(&cell).await,
                None => Witness::default(),
            };
            self.log.close(witness.encode()).await?;
            let unused = if self.log.is_empty() { self.path.borrow_mut().take() } else { None };
            match unused {
                // nothing is kept any more
                Some(path) => self.env.remove(&path).await,
                None => Ok(()),
            }
        })
    }
    fn reopen(&self) -> Io<'_> {
        Box::pin(self.log.reopen())
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

impl Opener {
    /// From now on bitmaps of nodes that are opened are kept in `dir`, which `tell` hears of.
    pub fn keep_bitmaps_in(&self, dir: &Path, tell: BitmapsHook) {
        let home = BitmapHome {
            env: self.graph.env().clone(),
            dir: dir.to_owned(),
            tell,
            resuming: Cell::new(false),
            resting: Cell::new(false),
            geometry: Cell::new(None),
            deserted: Cell::new(false),
            recorded: RefCell::default(),
            seen: RefCell::default(),
        };
        *self.home.borrow_mut() = Some(Rc::new(home));
    }

    /// The directory that keeps bitmaps, if there is one.
    pub fn bitmap_home(&self) -> Option<Rc<BitmapHome>> {
        self.home.borrow().clone()
    }

    /// The log of `cell` for what is to survive a crash, begun now if there is none; `None` without a state directory.
    ///
    /// # Errors
    /// It cannot be begun.
    pub async fn bitmap_log(&self, cell: &Rc<NodeCell>) -> Result<Option<Rc<DirtyLog>>> {
        match self.bitmap_home() {
            Some(home) => home.log(&self.graph, cell).await.map(Some),
            None => Ok(None),
        }
    }

    /// Before the qcow2 image `filename` is opened for writing.
    pub(crate) async fn keeper(
        &self,
        filename: &str,
        file: &NodeCell,
        now: &Inherited,
    ) -> Option<qcow2::Keeper> {
        let home = self.bitmap_home().filter(|_| !now.inactive && !now.read_only)?;
        Some(home.before(filename, file).await)
    }

    /// A node has been opened.
    pub(crate) async fn kept_bitmaps(&self, cell: &Rc<NodeCell>) {
        let Some(home) = self.bitmap_home() else { return };
        if home.is_resuming() {
            let now = Witness::of(cell).await;
            home.seen.borrow_mut().entry((now.device, now.inode)).or_insert(now);
        }
        if cell.is_active() {
            home.opened(cell).await;
        }
    }
}
