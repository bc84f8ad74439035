//! Recording: every change and barrier of the files of one image, in one log.
//!
//! One log for all files, because what a crash may leave of the data file depends on what was written to the image before.
//! What must stay true: an entry is appended when its caller sees it complete, so a barrier covers only what its caller
//! could know to be written before it was issued.

use block::{Data, Extent, Io, Span};
use env::{File, FileInfo, LockRange, Punch};
use sim::Effect;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// One entry of a [`Recorder`].
#[derive(Clone, Debug)]
pub struct Entry {
    /// Which file.
    pub file: usize,
    /// Length of the log when it was issued. For a barrier: what it covers (of its own file).
    pub issued_at: usize,
    /// The change, or `None` for a barrier.
    pub effect: Option<Effect>,
}

/// The log.
#[derive(Default)]
pub struct Recorder {
    entries: RefCell<Vec<Entry>>,
    barriers: Cell<u64>,
    uncounted: Cell<bool>,
}

impl Recorder {
    /// Entries so far.
    pub fn len(&self) -> usize {
        self.entries.borrow().len()
    }
    /// Whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Whether barriers are left out of the count from here on: those of a snapshot are no guest flush's price.
    pub fn uncounted(&self, yes: bool) {
        self.uncounted.set(yes);
    }
    /// Barriers so far, those left out of the count not among them.
    pub fn barriers(&self) -> u64 {
        self.barriers.get()
    }
    /// Takes the log.
    pub fn take(&self) -> Vec<Entry> {
        std::mem::take(&mut *self.entries.borrow_mut())
    }
    fn push(&self, file: usize, issued_at: usize, effect: Option<Effect>) {
        if effect.is_none() && !self.uncounted.get() {
            self.barriers.set(self.barriers.get() + 1);
        }
        self.entries.borrow_mut().push(Entry { file, issued_at, effect });
    }
}

/// A file whose changes are recorded.
pub struct RecordedFile {
    inner: Rc<dyn File>,
    log: Rc<Recorder>,
    file: usize,
}

impl RecordedFile {
    /// Records `inner` as file number `file`.
    pub fn new(inner: Rc<dyn File>, log: Rc<Recorder>, file: usize) -> RecordedFile {
        RecordedFile { inner, log, file }
    }

    async fn change(&self, effect: Effect, work: Io<'_>) -> block::Result<()> {
        let issued_at = self.log.len();
        work.await?;
        self.log.push(self.file, issued_at, Some(effect));
        Ok(())
    }
}

impl File for RecordedFile {
    fn read(&self, at: Span) -> Io<'_, Data> {
        self.inner.read(at)
    }
    fn write(&self, offset: u64, data: Data) -> Io<'_> {
        let effect = Effect::Write { offset, data: data.clone() };
        Box::pin(self.change(effect, self.inner.write(offset, data)))
    }
    fn barrier(&self) -> Io<'_> {
        Box::pin(async move {
            let issued_at = self.log.len();
            self.inner.barrier().await?;
            self.log.push(self.file, issued_at, None);
            Ok(())
        })
    }
    fn settle(&self) -> Io<'_> {
        self.inner.settle()
    }
    fn zero(&self, at: Span, how: Punch) -> Io<'_> {
        Box::pin(self.change(Effect::Zero { at, keep: how == Punch::Keep }, self.inner.zero(at, how)))
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(self.change(Effect::Zero { at, keep: false }, self.inner.discard(at)))
    }
    fn allocate(&self, at: Span) -> Io<'_> {
        Box::pin(self.change(Effect::Allocate(at), self.inner.allocate(at)))
    }
    fn set_len(&self, len: u64) -> Io<'_> {
        Box::pin(self.change(Effect::SetLen(len), self.inner.set_len(len)))
    }
    fn info(&self) -> Io<'_, FileInfo> {
        self.inner.info()
    }
    fn len_hint(&self) -> u64 {
        self.inner.len_hint()
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        self.inner.extents(at)
    }
    fn copy_to<'a>(&'a self, _at: Span, _to: &'a Rc<dyn File>, _to_offset: u64) -> Io<'a, u64> {
        // Not recorded, so not offered.
        Box::pin(async { Err(block::BlockError::from_errno(block::BlockError::ENOTSUP)) })
    }
    fn lock(&self, range: LockRange) -> Io<'_> {
        self.inner.lock(range)
    }
    fn unlock(&self, start: u64, len: u64) -> Io<'_> {
        self.inner.unlock(start, len)
    }
    fn can_lock(&self, range: LockRange) -> Io<'_, bool> {
        self.inner.can_lock(range)
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
