//! What a job has still to do, kept so that it survives the daemon.
//!
//! A job that copies a disk has a set of granules that the target lacks. In memory it forgets a granule as soon as it begins to
//! copy it; after a crash that is too early. A [`JobSet`] keeps the durable version: a granule leaves it when it was copied *and*
//! the target was flushed after that, and the guest has not written to it since the copy began. Guests' writes enter it by
//! themselves (it is one of the node's bitmaps), protected by the log of regions.
//!
//! ```text
//! let set = log.add_set("mirror:job0", &what_to_copy).await?;
//! loop {
//!     set.started(piece);                    // before the source is read
//!     copy(piece).await?;
//!     set.copied(piece);                     // the target has it
//!     set.settle(target.flush()).await?;     // now and then
//! }
//! set.remove().await?;                       // the job has ended
//! ```
//!
//! After a restart [`DirtyLog::take_set`] gives the set back: what is in it is all that is still to be copied.
//!
//! What must stay true: a granule that the target may lack on its stable storage is in the file.

use crate::DirtyLog;
use crate::recover::FoundBitmap;
use bitmap::{Bitmap, BitmapList, DirtyBitmap};
use block::{BlockError, ErrorKind, Result, Span};
use env::bugs::planted;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;

/// The marks of one set, recording as bitmaps of the node.
pub(crate) struct Recorder {
    pub(crate) key: String,
    /// What the target may lack.
    pub(crate) left: Rc<DirtyBitmap>,
    /// What was written since its copy began.
    since: Rc<DirtyBitmap>,
    taken: Cell<bool>,
}

impl Recorder {
    fn new(list: &BitmapList, key: &str, bits: &Bitmap) -> Result<Rc<Recorder>> {
        let new = || DirtyBitmap::new(None, bits.len(), bits.granularity());
        let (left, since) = (Rc::new(new()?), Rc::new(new()?));
        left.bits_mut().merge(bits);
        left.hide();
        since.hide();
        list.borrow_mut().extend([left.clone(), since.clone()]);
        Ok(Rc::new(Recorder { key: key.to_owned(), left, since, taken: Cell::new(false) }))
    }

    /// One that was found in a file; records at once, whenever its job comes for it.
    pub(crate) fn found(list: &BitmapList, found: &FoundBitmap, len: u64) -> Result<Rc<Recorder>> {
        let mut bits = found.bits.clone();
        let before = bits.len();
        bits.resize(len)?;
        bits.set(Span::between(before, len));
        if found.inconsistent.is_some() {
            bits.set_all();
        }
        Recorder::new(list, &found.name, &bits)
    }

    /// Whether a job is at work on it.
    pub(crate) fn is_taken(&self) -> bool {
        self.taken.get()
    }

    pub(crate) fn resize(&self, len: u64) -> Result<()> {
        for b in [&self.left, &self.since].into_iter().filter(|b| b.bits().len() != len) {
            b.resize(len)?;
        }
        Ok(())
    }
}

/// See above.
pub struct JobSet {
    log: Rc<DirtyLog>,
    marks: Rc<Recorder>,
    /// Copied, and the target not flushed since.
    copied: RefCell<Bitmap>,
    /// Copied, and the target is being flushed.
    settling: RefCell<Option<Bitmap>>,
}

impl DirtyLog {
    /// Begins to keep a set of `bits`, durable when this is done. `key` is the job's, and no other's of this disk.
    ///
    /// # Errors
    /// There is one of that key; as [`DirtyLog::sync`].
    pub async fn add_set(self: &Rc<Self>, key: &str, bits: &Bitmap) -> Result<JobSet> {
        if self.sets.borrow().iter().any(|s| s.key == key) {
            return Err(BlockError::new(ErrorKind::Busy, format!("there is a set of marks '{key}' already")));
        }
        let marks = Recorder::new(&self.list, key, bits)?;
        self.sets.borrow_mut().push(marks.clone());
        let set = JobSet::new(self, marks)?;
        if let Err(e) = self.sync().await {
            let _the_first_is_told = set.remove().await;
            return Err(e);
        }
        Ok(set)
    }

    /// The set that was kept under `key` before the daemon ended, with what was written since; once.
    pub fn take_set(self: &Rc<Self>, key: &str) -> Option<JobSet> {
        let marks = self.sets.borrow().iter().find(|s| s.key == key && !s.taken.get()).cloned()?;
        JobSet::new(self, marks).ok()
    }

    /// Keys of all sets.
    pub fn set_keys(&self) -> Vec<String> {
        self.sets.borrow().iter().map(|s| s.key.clone()).collect()
    }
}

impl JobSet {
    fn new(log: &Rc<DirtyLog>, marks: Rc<Recorder>) -> Result<JobSet> {
        let (len, granularity) = (marks.left.bits().len(), marks.left.bits().granularity());
        let copied = RefCell::new(Bitmap::new(len, granularity)?);
        marks.taken.set(true);
        Ok(JobSet { log: log.clone(), marks, copied, settling: RefCell::new(None) })
    }

    /// What the target may lack.
    pub fn left(&self) -> Bitmap {
        self.marks.left.bits().clone()
    }

    /// `at` is going to be copied: from now on what is written there counts as not copied.
    pub fn started(&self, at: Span) {
        let at = at.align_out(self.copied.borrow().granularity());
        self.marks.since.bits_mut().clear(at);
        self.copied.borrow_mut().clear(at);
        if let Some(s) = self.settling.borrow_mut().as_mut() {
            s.clear(at);
        }
    }

    /// `at` was copied (or need not be). A granule of which only a part was copied stays.
    pub fn copied(&self, at: Span) {
        let mut copied = self.copied.borrow_mut();
        let (granularity, len) = (copied.granularity(), copied.len());
        let end = if at.end() >= len { len.next_multiple_of(granularity) } else { at.end() };
        copied.set(Span::between(at.start, end).align_in(granularity));
        drop(copied);
        if planted("dirtylog: cleared before the target's flush") {
            self.forget(&self.copied.borrow().clone());
        }
    }

    /// `at` differs from the target again, for another reason than a guest's write (that one is noticed).
    pub fn mark(&self, at: Span) {
        self.started(at);
        self.marks.left.bits_mut().set(at);
    }

    /// Flushes the target, then lets go durably of what was copied before.
    ///
    /// # Errors
    /// The flush's; the file's. Nothing is let go then, and it may be tried again.
    pub async fn settle(&self, flush: impl Future<Output = Result<()>>) -> Result<()> {
        if self.copied.borrow().is_empty() {
            return flush.await;
        }
        let before = self.copied.borrow_mut().take();
        *self.settling.borrow_mut() = Some(before);
        let flushed = flush.await;
        let Some(settled) = self.settling.take() else { return flushed };
        if let Err(e) = flushed {
            self.copied.borrow_mut().merge(&settled);
            return Err(e);
        }
        self.forget(&settled);
        self.log.harden(Span::default()).await
    }

    /// As [`JobSet::started`], [`JobSet::copied`] and [`JobSet::settle`] in one, for a job that knows at each instant what the target
    /// lacks: all but `unfinished`, which is as of now, is flushed and then let go, but what is written meanwhile. A guest's write
    /// that has ended and is not on the target is in `unfinished`.
    ///
    /// # Errors
    /// As [`JobSet::settle`].
    pub async fn checkpoint(
        &self,
        unfinished: &Bitmap,
        flush: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        self.marks.since.bits_mut().clear_all();
        self.let_go(unfinished, flush).await
    }

    /// The same for a job that copies the disk as of one instant: of what was written since the set was made, or taken, or counts as that
    /// ([`JobSet::counts_as_written`]), nothing is let go, whether it was copied before or not.
    ///
    /// # Errors
    /// As [`JobSet::settle`].
    pub async fn checkpoint_of_instant(
        &self,
        unfinished: &Bitmap,
        flush: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        if planted("backup: what was written since its copy is let go") {
            self.marks.since.bits_mut().clear_all();
        }
        self.let_go(unfinished, flush).await
    }

    /// What is in the set and not in `unfinished` may have been written by clients since the instant, in an earlier life: it was copied, or
    /// need not be, and yet the target does not have what the disk holds now.
    pub fn counts_as_written(&self, unfinished: &Bitmap) {
        if planted("backup: what was written in an earlier life is let go") {
            return;
        }
        let mut since = self.marks.since.bits_mut();
        since.merge(&self.marks.left.bits());
        let granularity = since.granularity();
        let whole = Span::new(0, unfinished.len());
        unfinished.areas(whole, 0).for_each(|a| since.clear(a.align_in(granularity)));
    }

    async fn let_go(&self, unfinished: &Bitmap, flush: impl Future<Output = Result<()>>) -> Result<()> {
        // What was copied before, as far as it is so still, is settled here. Of the rest nobody knows any more what was written since.
        self.copied.borrow_mut().clear_all();
        self.settling.take();
        let whole = Span::new(0, unfinished.len());
        if self.also(unfinished) {
            self.log.harden(whole).await?;
        }
        let mut settled = self.left();
        unfinished.areas(whole, 0).for_each(|a| settled.clear(a.align_out(settled.granularity())));
        if settled.is_empty() {
            return Ok(());
        }
        if planted("dirtylog: cleared before the target's flush") {
            self.forget(&settled);
        }
        flush.await?;
        self.forget(&settled);
        self.log.harden(Span::default()).await
    }

    /// Marks what `unfinished` has, durably with the next change of the file; whether anything was missing. For what differs from the
    /// target for another reason than a guest's write: a comparison that found a difference, a link that was lost.
    pub fn also(&self, unfinished: &Bitmap) -> bool {
        let whole = Span::new(0, unfinished.len());
        let missing = {
            let left = self.marks.left.bits();
            unfinished.areas(whole, 0).any(|a| left.next_clean(a.start).is_some_and(|c| c < a.end()))
        };
        if missing {
            self.marks.left.bits_mut().merge(unfinished);
        }
        missing
    }

    fn forget(&self, settled: &Bitmap) {
        let whole = Span::new(0, settled.len());
        let mut gone = settled.clone();
        self.marks.since.bits().areas(whole, 0).for_each(|a| gone.clear(a.align_out(settled.granularity())));
        let mut kept = self.log.kept.borrow_mut();
        let mut kept = kept.iter_mut().find(|k| Rc::ptr_eq(&k.bitmap, &self.marks.left));
        let mut left = self.marks.left.bits_mut();
        for a in gone.areas(whole, 0) {
            left.clear(a);
            if let Some(k) = kept.as_mut() {
                k.lost(a);
            }
        }
    }

    /// The job has ended: the set is given up, durably.
    ///
    /// # Errors
    /// As [`DirtyLog::sync`].
    pub async fn remove(&self) -> Result<()> {
        self.log.edited.set(true);
        let ours = |b: &Rc<DirtyBitmap>| Rc::ptr_eq(b, &self.marks.left) || Rc::ptr_eq(b, &self.marks.since);
        self.log.list.borrow_mut().retain(|b| !ours(b));
        self.log.sets.borrow_mut().retain(|s| !Rc::ptr_eq(s, &self.marks));
        self.log.sync().await
    }
}

impl Drop for JobSet {
    fn drop(&mut self) {
        // Whoever comes for it later finds what was not settled.
        self.marks.taken.set(false);
    }
}
