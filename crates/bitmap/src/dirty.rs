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
    readonly: Cell<bool>,
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
            readonly: Cell::new(false),
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
        self.bits.borrow_mut()
    }

    /// Follows the node to a new length.
    pub fn resize(&self, len: u64) -> Result<()> {
        self.bits.borrow_mut().resize(len)
    }

    /// Whether changes are recorded.
    pub fn enabled(&self) -> bool {
        self.enabled.get()
    }

    /// Starts or stops recording.
    pub fn set_enabled(&self, on: bool) {
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

    /// While frozen it keeps its bits as they are: a successor records in its place. It still counts as enabled.
    pub fn set_frozen(&self, on: bool) {
        self.frozen.set(on);
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
        self.persistent.set(on);
    }

    /// Whether it was found in-use in an image, so that it may lack changes: nothing but removal is allowed.
    pub fn inconsistent(&self) -> bool {
        self.inconsistent.get()
    }

    /// Marks it as one that may lack changes.
    pub fn set_inconsistent(&self) {
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
