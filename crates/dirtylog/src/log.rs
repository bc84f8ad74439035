//! The log of one disk: who may write now, who waits, and the parts that turns work on.
//!
//! What can happen: writers come, wait, go away while waiting; bitmaps change meanwhile. What must stay true: whoever has a
//! [`Pass`] for a span writes where a record, or durable marks in all bitmaps, say "may be changed", until the pass is given back.

use crate::job_set::Recorder;
use crate::kept::Kept;
use crate::layout::{FIRST_RECORD, Header, Kind};
use crate::recover::Found;
use crate::regions::{Geometry, Marks, Regions, geometry_for};
use bitmap::{BitmapList, DirtyBitmap};
use block::{BlockError, ErrorKind, Result, Span};
use env::Env;
use env::bugs::planted;
use env::sync::{Notify, Semaphore};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};

/// What a log is made with.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Bytes of the disk.
    pub len: u64,
    /// What identifies the disk; given back by [`crate::read`].
    pub identity: Vec<u8>,
    /// What is known of its state now; given back likewise.
    pub witness: Vec<u8>,
    /// Regions; as [`geometry_for`] says if `None`.
    pub geometry: Option<Geometry>,
}

/// Leave to write; to be given back with [`DirtyLog::leave`]. Its number is the log's matter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pass(pub u32);

/// Figures since the log was begun.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Figures {
    /// Writes that waited for a record.
    pub waited: u64,
    /// Records written.
    pub records: u64,
    /// Barriers.
    pub barriers: u64,
    /// Bytes that a crash now would put in doubt.
    pub in_doubt: u64,
}

/// One who waits to write.
pub(crate) struct Ticket {
    pub(crate) at: Span,
    pub(crate) answer: RefCell<Option<Result<Pass>>>,
    /// Nobody waits for the answer any more.
    pub(crate) gone: Cell<bool>,
}

/// The bitmaps of one disk that survive crashes. Lives on the disk's home thread.
pub struct DirtyLog {
    pub(crate) env: Env,
    pub(crate) file: Rc<dyn env::File>,
    /// The node's bitmaps.
    pub(crate) list: BitmapList,
    pub(crate) kept: RefCell<Vec<Kept>>,
    pub(crate) sets: RefCell<Vec<Rc<Recorder>>>,
    pub(crate) regions: RefCell<Regions>,
    pub(crate) waiting: RefCell<VecDeque<Rc<Ticket>>>,
    /// Somebody's answer is there.
    pub(crate) answered: Notify,
    /// One turn, or change by a user, at a time.
    pub(crate) turn: Semaphore,
    pub(crate) pumping: Cell<bool>,
    pub(crate) header: RefCell<Header>,
    /// Slot of the next header.
    pub(crate) header_slot: Cell<u64>,
    /// A header was written, and nobody knows which one the file has.
    pub(crate) uncertain: Cell<bool>,
    /// Areas that a header in the file may name, beside those of `kept`.
    pub(crate) ghosts: RefCell<Vec<Span>>,
    /// Slot and number of the next record.
    pub(crate) hot_slot: Cell<u64>,
    pub(crate) hot_sequence: Cell<u64>,
    /// All regions are being written to and somebody waits for another: nobody overtakes until one is free.
    pub(crate) crowded: Cell<bool>,
    /// A bitmap was changed by hand.
    pub(crate) edited: Cell<bool>,
    /// Marks may have gone, and with them the reason why so many regions are hot.
    pub(crate) shrunk: Cell<bool>,
    pub(crate) closed: Cell<bool>,
    pub(crate) beating: Cell<bool>,
    pub(crate) turns: Cell<u64>,
    pub(crate) figures: Cell<Figures>,
    pub(crate) me: Weak<DirtyLog>,
}

impl DirtyLog {
    /// Takes `file` (empty, or with what [`crate::read`] found in it) for the bitmaps in `list` that are called persistent, and the
    /// job sets that were found, which record from now on. Nobody writes to the disk meanwhile. All is durable after.
    ///
    /// # Errors
    /// The file's; what does not fit.
    pub async fn begin(
        env: &Env,
        file: Rc<dyn env::File>,
        settings: Settings,
        list: BitmapList,
        found: Option<Found>,
    ) -> Result<Rc<DirtyLog>> {
        let geometry = settings.geometry.unwrap_or_else(|| geometry_for(settings.len));
        let old = found.as_ref().map(|f| &f.header);
        let header = Header {
            sequence: old.map_or(0, |h| h.sequence),
            opening: env.random(),
            clean: false,
            len: settings.len,
            region: geometry.region,
            next_id: old.map_or(1, |h| h.next_id),
            wall: env.wall().as_secs(),
            identity: settings.identity,
            witness: settings.witness,
            entries: Vec::new(),
        };
        let ghosts = old.map_or_else(Vec::new, |h| h.entries.iter().map(|e| e.places(h.len)).collect());
        let log = Rc::new_cyclic(|me| DirtyLog {
            env: env.clone(),
            file,
            list,
            kept: RefCell::default(),
            sets: RefCell::default(),
            regions: RefCell::new(Regions::new(geometry)),
            waiting: RefCell::default(),
            answered: Notify::new(),
            turn: Semaphore::new(1),
            pumping: Cell::new(false),
            header: RefCell::new(header),
            header_slot: Cell::new(found.as_ref().map_or(0, |f| f.header_slot + 1)),
            uncertain: Cell::new(true),
            ghosts: RefCell::new(ghosts),
            hot_slot: Cell::new(found.as_ref().map_or(0, |f| f.hot_slot + 1)),
            hot_sequence: Cell::new(found.as_ref().map_or(FIRST_RECORD, |f| f.hot_sequence + 1)),
            crowded: Cell::new(false),
            edited: Cell::new(false),
            shrunk: Cell::new(false),
            closed: Cell::new(false),
            beating: Cell::new(false),
            turns: Cell::new(0),
            figures: Cell::default(),
            me: me.clone(),
        });
        for b in found.into_iter().flat_map(|f| f.bitmaps).filter(|b| b.job) {
            log.sets.borrow_mut().push(Recorder::found(&log.list, &b, settings.len)?);
        }
        let _turn = log.turn.acquire(1).await;
        // The record first: the header that names this opening must find one.
        log.write_record(Default::default()).await?;
        log.sync_now(None).await?;
        drop(_turn);
        log.beat();
        Ok(log)
    }

    /// Begins a write to `at`, if it need not wait. To be given back with [`DirtyLog::leave`].
    pub fn try_enter(&self, at: Span) -> Option<Pass> {
        if self.crowded.get() { None } else { self.admit(at) }
    }

    pub(crate) fn admit(&self, at: Span) -> Option<Pass> {
        if let Some(n) = self.regions.borrow_mut().enter_hot(at) {
            return Some(Pass(n));
        }
        // While a change by a user is on its way to the file, the state before it has to be right, too: a bitmap that
        // does not record any more relies on hot regions until then.
        let settled = !self.uncertain.get() && !self.edited.get();
        if settled && self.kept.borrow().iter().all(|k| k.covers(at)) {
            return Some(Pass(self.regions.borrow_mut().enter_marked(at)));
        }
        None
    }

    /// Begins a write to `at`; waits until a crash could not make it forgotten. To be given back with [`DirtyLog::leave`].
    ///
    /// # Errors
    /// The record could not be written. Nothing is to be given back then.
    pub async fn enter(&self, at: Span) -> Result<Pass> {
        if let Some(pass) = self.try_enter(at) {
            return Ok(pass);
        }
        if self.closed.get() {
            return Err(BlockError::new(ErrorKind::Cancelled, "the log of changes is closed"));
        }
        self.count(|f| f.waited += 1);
        let ticket = Rc::new(Ticket { at, answer: RefCell::new(None), gone: Cell::new(false) });
        self.waiting.borrow_mut().push_back(ticket.clone());
        let waiting = Waiting { log: self, ticket };
        self.kick();
        loop {
            let wait = self.answered.wait();
            if let Some(answer) = waiting.ticket.answer.borrow_mut().take() {
                return answer;
            }
            wait.await;
        }
    }

    /// A write has ended, one way or another; its marks are in the bitmaps.
    pub fn leave(&self, pass: Pass) {
        self.regions.borrow_mut().land(pass.0);
        if !self.waiting.borrow().is_empty() {
            self.kick();
        }
    }

    /// Figures so far.
    pub fn figures(&self) -> Figures {
        let r = self.regions.borrow();
        Figures { in_doubt: r.count() as u64 * r.geometry().region, ..self.figures.get() }
    }

    /// The hot regions, for those who check what a crash may add.
    pub fn hot_regions(&self) -> Vec<Span> {
        let r = self.regions.borrow();
        r.hot().map(|n| r.span(n)).collect()
    }

    /// Whether anything is kept: a log without bitmaps need not stand before writes.
    pub fn is_empty(&self) -> bool {
        self.kept.borrow().is_empty() && self.sets.borrow().is_empty()
    }

    pub(crate) fn count(&self, change: impl FnOnce(&mut Figures)) {
        let mut f = self.figures.get();
        change(&mut f);
        self.figures.set(f);
    }

    /// What is to be kept now.
    pub(crate) fn wanted(&self) -> Vec<(String, Kind, Rc<DirtyBitmap>)> {
        let list = self.list.borrow();
        let users = list.iter().filter(|b| b.persistent());
        let users = users.filter_map(|b| Some((b.name()?.to_owned(), Kind::User, b.clone())));
        let sets = self.sets.borrow();
        users.chain(sets.iter().map(|s| (s.key.clone(), Kind::Job, s.left.clone()))).collect()
    }

    /// There is something to do: it is done soon.
    pub(crate) fn kick(&self) {
        if !self.pumping.replace(true)
            && let Some(me) = self.me.upgrade()
        {
            self.env.spawn("dirtylog", async move { me.pump().await });
        }
    }

    /// Called when a bitmap is changed by hand.
    pub(crate) fn watch(&self, bitmap: &DirtyBitmap) {
        let me = self.me.clone();
        bitmap.on_edit(Some(Rc::new(move || {
            if let Some(log) = me.upgrade() {
                log.edited.set(true);
                log.kick();
            }
        })));
    }

    pub(crate) async fn barrier(&self) -> Result<()> {
        self.count(|f| f.barriers += 1);
        self.file.barrier().await
    }
}

/// What is durable of the bitmaps that are kept.
pub(crate) struct Durable<'a>(pub(crate) &'a [Kept]);

impl Marks for Durable<'_> {
    fn clean(&self, at: Span) -> bool {
        planted("dirtylog: a region leaves too early") || self.0.iter().all(|k| k.is_clean(at))
    }
    fn open(&self, at: Span) -> u64 {
        self.0.iter().map(|k| k.open(at)).max().unwrap_or(0)
    }
}

impl Durable<'_> {
    /// Bytes that may be in doubt beside the base: no bitmap becomes more than twice as large by a crash. What a job has still
    /// to do shall not double.
    pub(crate) fn extra(&self) -> u64 {
        let recording = || self.0.iter().filter(|k| k.bitmap.enabled());
        if recording().any(|k| k.entry.kind == Kind::Job) {
            return 0;
        }
        recording().map(|k| k.durable.count()).min().unwrap_or(0)
    }
}

struct Waiting<'a> {
    log: &'a DirtyLog,
    ticket: Rc<Ticket>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.ticket.gone.set(true);
        if let Some(Ok(pass)) = self.ticket.answer.borrow_mut().take() {
            self.log.leave(pass);
        } else if self.log.crowded.get() {
            self.log.kick();
        }
    }
}
