//! A bitmap as a node carries it: shared between the graph, which records writes, and whoever reads it.

use crate::Bitmap;
use block::{Result, Span};
use std::cell::{Cell, Ref, RefCell, RefMut};
use std::rc::Rc;

/// The bitmaps of a node, oldest first: shared between the graph, which lets them record, and a driver that stores them.
pub type BitmapList = Rc<RefCell<Vec<Rc<DirtyBitmap>>>>;

/// A dirty bitmap of a node. The graph calls [`DirtyBitmap::record`] for each write, zero request and discard *before*
/// the request is acknowledged (failed requests included: they may have changed something).
pub struct DirtyBitmap {
    name: Option<String>,
    bits: RefCell<Bitmap>,
    enabled: Cell<bool>,
    busy: Cell<bool>,
    frozen: Cell<bool>,
    persistent: Cell<bool>,
    inconsistent: Cell<bool>,
    why: RefCell<String>,
    hidden: Cell<bool>,
    readonly: Cell<bool>,
    /// Records in its place while it is frozen.
    successor: RefCell<Option<Rc<DirtyBitmap>>>,
    /// Changes other than by recording.
    edits: Cell<u64>,
    on_edit: RefCell<Option<Rc<dyn Fn()>>>,
}

impl DirtyBitmap {
    /// A clean, enabled bitmap; `name` is `None` for those that belong to a job.
    pub fn new(name: Option<String>, len: u64, granularity: u64) -> Result<DirtyBitmap> {
        Ok(DirtyBitmap {
            name,
            bits: RefCell::new(Bitmap::new(len, granularity)?),
            enabled: Cell::new(true),
            busy: Cell::new(false),
            frozen: Cell::new(false),
            persistent: Cell::new(false),
            inconsistent: Cell::new(false),
            why: RefCell::default(),
            hidden: Cell::new(false),
            readonly: Cell::new(false),
            successor: RefCell::new(None),
            edits: Cell::new(0),
            on_edit: RefCell::new(None),
        })
    }

    /// The user's name for it.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Notes a change of `at`, if enabled.
    pub fn record(&self, at: Span) {
        if self.enabled.get() && !self.frozen.get() {
            self.bits.borrow_mut().set(at);
        }
    }

    /// The bits, to look at. Never keep this across an await.
    pub fn bits(&self) -> Ref<'_, Bitmap> {
        self.bits.borrow()
    }

    /// The bits, to change, whether enabled or not. Never keep this across an await.
    pub fn bits_mut(&self) -> RefMut<'_, Bitmap> {
        self.edited();
        self.bits.borrow_mut()
    }

    /// Follows the node to a new length.
    pub fn resize(&self, len: u64) -> Result<()> {
        self.edited();
        self.bits.borrow_mut().resize(len)
    }

    /// Whether changes are recorded.
    pub fn enabled(&self) -> bool {
        self.enabled.get()
    }

    /// Starts or stops recording.
    pub fn set_enabled(&self, on: bool) {
        self.edited();
        self.enabled.set(on);
    }

    /// Whether a job or an export uses it, so that nobody else may change or remove it.
    pub fn busy(&self) -> bool {
        self.busy.get()
    }

    /// Takes it into use, or gives it back.
    pub fn set_busy(&self, busy: bool) {
        self.busy.set(busy);
    }

    /// From now on it keeps its bits as they are: `successor` records in its place. It still counts as enabled.
    pub fn freeze(&self, successor: Rc<DirtyBitmap>) {
        self.edited();
        self.frozen.set(true);
        *self.successor.borrow_mut() = Some(successor);
    }

    /// It records by itself again.
    pub fn thaw(&self) {
        self.edited();
        self.frozen.set(false);
        *self.successor.borrow_mut() = None;
    }

    /// Nobody is shown it: it is not of a job's own making, but of what keeps bitmaps.
    pub fn hide(&self) {
        self.hidden.set(true);
    }

    /// See [`DirtyBitmap::hide`].
    pub fn hidden(&self) -> bool {
        self.hidden.get()
    }

    /// What records in its place while it is frozen: what changed is in its bits or in that one's.
    pub fn successor(&self) -> Option<Rc<DirtyBitmap>> {
        self.successor.borrow().clone()
    }

    /// How often it was changed other than by recording: bits by hand, length, whether it records.
    pub fn edits(&self) -> u64 {
        self.edits.get()
    }

    /// `hook` is called just before each such change; it must not look at the bits.
    pub fn on_edit(&self, hook: Option<Rc<dyn Fn()>>) {
        *self.on_edit.borrow_mut() = hook;
    }

    fn edited(&self) {
        self.edits.set(self.edits.get() + 1);
        if let Some(hook) = &*self.on_edit.borrow() {
            hook();
        }
    }

    /// Whether its bits stay as they are while a successor records.
    pub fn frozen(&self) -> bool {
        self.frozen.get()
    }

    /// Whether it is stored in the image when the node is closed.
    pub fn persistent(&self) -> bool {
        self.persistent.get()
    }

    /// Sets whether it is stored.
    pub fn set_persistent(&self, on: bool) {
        self.edited();
        self.persistent.set(on);
    }

    /// Whether it was found in-use in an image, so that it may lack changes: nothing but removal is allowed.
    pub fn inconsistent(&self) -> bool {
        self.inconsistent.get()
    }

    /// Why it may lack changes, if that is known; empty otherwise.
    pub fn why_inconsistent(&self) -> String {
        self.why.borrow().clone()
    }

    /// Somebody knows what it lacked: it can be used again. Whether it records is for the caller to say.
    pub fn set_consistent(&self) {
        self.edited();
        self.inconsistent.set(false);
        self.why.borrow_mut().clear();
    }

    /// Says why it may lack changes.
    pub fn set_reason(&self, why: &str) {
        why.clone_into(&mut self.why.borrow_mut());
    }

    /// Marks it as one that may lack changes.
    pub fn set_inconsistent(&self) {
        self.edited();
        self.inconsistent.set(true);
        self.enabled.set(false);
    }

    /// Whether it lives in an image that cannot be written.
    pub fn readonly(&self) -> bool {
        self.readonly.get()
    }

    /// Sets whether its image cannot be written.
    pub fn set_readonly(&self, on: bool) {
        self.readonly.set(on);
    }
}

impl std::fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {:?}", self.name.as_deref().unwrap_or("(unnamed)"), self.bits.borrow())
    }
}
