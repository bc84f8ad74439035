//! One export: a node offered to clients under a name.
//!
//! What can happen: clients come and go, the graph puts another node under the export's edge, the export is deleted
//! while clients use it. What must stay true: the edge is held until the last request of the last client has ended.

use bitmap::{Bitmap, DirtyBitmap};
use env::sync::{Notify, RangeLocks};
use graph::gate::Gated;
use graph::{Demand, Edge, Perms};
use std::cell::{Cell, Ref, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

/// What is asked of an NBD export; names as in QMP's `block-export-add`.
#[derive(Clone, Debug, Default)]
pub struct NbdOptions {
    /// Export id.
    pub id: String,
    /// Name that clients ask for.
    pub name: String,
    /// Text for clients; may be empty.
    pub description: String,
    /// Whether clients may write.
    pub writable: bool,
    /// Whether each write is made durable before it is acknowledged.
    pub writethrough: bool,
    /// Whether the context `qemu:allocation-depth` is offered.
    pub allocation_depth: bool,
}

/// Bitmaps of one export: as QEMU, which clients negotiate with by name, one after the other.
pub const MAX_EXPORTED_BITMAPS: usize = 65_535;

/// A bitmap in use by an export.
#[derive(Clone)]
pub struct ExportedBitmap(Rc<Held>);

struct Held(Rc<DirtyBitmap>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.set_busy(false);
    }
}

impl ExportedBitmap {
    /// Takes `bitmap` into use until the last clone of this is dropped. It must not be in use.
    pub fn hold(bitmap: Rc<DirtyBitmap>) -> ExportedBitmap {
        bitmap.set_busy(true);
        ExportedBitmap(Rc::new(Held(bitmap)))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.0.0.name().unwrap_or_default()
    }

    pub(crate) fn bits(&self) -> Ref<'_, Bitmap> {
        self.0.0.bits()
    }
}

impl fmt::Debug for ExportedBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What an export shows of itself in queries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Export id.
    pub id: String,
    /// Kind of export (`nbd`, `vhost-user-blk`).
    pub kind: &'static str,
    /// Name of the node that is exported now.
    pub node_name: String,
    /// Whether it has been told to go.
    pub shutting_down: bool,
}

/// A node offered over NBD.
pub struct Export {
    options: NbdOptions,
    bitmaps: Vec<ExportedBitmap>,
    edge: Rc<Edge>,
    shutting_down: Cell<bool>,
    clients: RefCell<BTreeMap<u64, Rc<dyn env::Stream>>>,
    next_client: Cell<u64>,
    pub(crate) idle: Notify,
    /// What clients are changing. A client whose connection was lost sends a write again on another, while the first may
    /// still be on its way to the disk: the second waits for it, or the first could land after a third, newer one.
    pub(crate) changing: RangeLocks,
}

/// A client's hold on an export.
pub(crate) struct Attendance {
    export: Rc<Export>,
    key: u64,
}

impl Drop for Attendance {
    fn drop(&mut self) {
        self.export.clients.borrow_mut().remove(&self.key);
        if self.export.clients.borrow().is_empty() {
            self.export.idle.notify_all();
        }
    }
}

impl Export {
    /// What an NBD export asks of its node. It keeps others from resizing the disk: a client has been told its length.
    pub fn demand(writable: bool) -> Demand {
        let write = if writable { Perms::WRITE } else { Perms::NONE };
        let shares = Perms::CONSISTENT_READ.with(Perms::WRITE).with(Perms::WRITE_UNCHANGED);
        Demand { needs: Perms::CONSISTENT_READ.with(write), shares }
    }

    pub(crate) fn new(options: NbdOptions, bitmaps: Vec<ExportedBitmap>, edge: Rc<Edge>) -> Rc<Export> {
        Rc::new(Export {
            options,
            bitmaps,
            edge,
            shutting_down: Cell::new(false),
            clients: RefCell::new(BTreeMap::new()),
            next_client: Cell::new(0),
            idle: Notify::new(),
            changing: RangeLocks::new(),
        })
    }

    pub(crate) fn id(&self) -> &str {
        &self.options.id
    }
    pub(crate) fn options(&self) -> &NbdOptions {
        &self.options
    }
    /// Bitmaps offered as contexts.
    pub(crate) fn bitmaps(&self) -> &[ExportedBitmap] {
        &self.bitmaps
    }
    pub(crate) fn edge(&self) -> &Rc<Edge> {
        &self.edge
    }
    pub(crate) fn writable(&self) -> bool {
        self.options.writable
    }
    pub(crate) fn writethrough(&self) -> bool {
        self.options.writethrough
    }
    /// Length now, in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.edge.len()
    }
    pub(crate) fn is_shutting_down(&self) -> bool {
        self.shutting_down.get()
    }

    pub(crate) fn info(&self) -> ExportInfo {
        ExportInfo {
            id: self.options.id.clone(),
            kind: "nbd",
            node_name: self.edge.child().name().to_owned(),
            shutting_down: self.shutting_down.get(),
        }
    }

    /// Clients in their transmission phase.
    pub fn clients(&self) -> usize {
        self.clients.borrow().len()
    }

    pub(crate) fn attend(self: &Rc<Export>, stream: Rc<dyn env::Stream>) -> Attendance {
        let key = self.next_client.get();
        self.next_client.set(key + 1);
        self.clients.borrow_mut().insert(key, stream);
        Attendance { export: self.clone(), key }
    }

    /// From now on no client may come; those that are here are cut off.
    pub(crate) fn close(&self) {
        self.shutting_down.set(true);
        let streams: Vec<_> = self.clients.borrow().values().cloned().collect();
        streams.iter().for_each(|s| s.shutdown());
    }

    /// Waits until the last client's requests have ended. None of them waits for its turn in a throttle meanwhile.
    pub(crate) async fn drained(&self) {
        let _hurried = self.edge.hurry();
        while self.clients() > 0 {
            self.idle.wait().await;
        }
    }
}
