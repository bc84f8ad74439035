//! The state of an open image, shared by everything in this crate that runs while a guest uses it.
//!
//! One thread's: interior mutability by `Cell` and `RefCell`, and no borrow is ever held across a wait. What each part
//! knows and must keep true is told in its own file: `l1l2` (where the tables are), `map` (what they say), `write`, `zero`,
//! `compress` (requests), `alloc` and `refcount` (space), `order` (what reaches the file when), `overlap` (what must
//! never be written over).

use crate::alloc::Space;
use crate::bitmaps::Bitmaps;
use crate::cache::SliceCache;
use crate::child::Child;
use crate::header::Header;
use crate::inflight::{Epochs, InFlight};
use crate::l1l2::L1;
use crate::options::{CacheSizes, Options};
use crate::order::Order;
use crate::overlap::{Corruption, MetaMap};
use crate::refcount::RefTable;
use crate::snapshot::Snapshots;
use crate::types::{Compressed, Geometry};
use block::{BlockError, ErrorKind, Result};
use bytes::Bytes;
use env::Env;
use env::bugs::planted;
use env::sync::{Notify, oneshot};
use graph::{Edge, Shortcut, Skippable};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;

/// Called when the image is found to be corrupt.
pub type OnCorruption = Rc<dyn Fn(&Corruption)>;

/// An open image.
pub(crate) struct Core {
    pub(crate) env: Env,
    pub(crate) file: Rc<Child>,
    pub(crate) data_file: Option<Rc<Child>>,
    pub(crate) backing: RefCell<Option<Rc<Edge>>>,
    /// Past layers below that have nothing.
    pub(crate) shortcut: Shortcut,
    /// Who passes this layer over: told in the instant in which a mapping appears here.
    pub(crate) skippable: Skippable,
    pub(crate) geo: Geometry,
    pub(crate) header: RefCell<Header>,
    /// Bytes of the guest's disk.
    pub(crate) size: Cell<u64>,
    /// What changes while the image is open is what [`Options::with_run_time`] says.
    pub(crate) opts: RefCell<Options>,
    pub(crate) sizes: CacheSizes,
    pub(crate) writable: Cell<bool>,
    /// The header's number proves that nobody else has written to the image; as of its opening.
    pub(crate) vouched: Cell<bool>,
    /// The number under which the bitmaps are kept elsewhere, if the header has it.
    pub(crate) kept_number: Cell<Option<[u8; 16]>>,
    /// The header is to have a new number before the first change.
    pub(crate) vouch_due: Cell<bool>,
    /// The image is ours. While it is not, nothing is written.
    pub(crate) active: Cell<bool>,
    /// To be writable when it is active.
    pub(crate) wants_writable: Cell<bool>,
    pub(crate) l1: RefCell<L1>,
    pub(crate) l2: RefCell<SliceCache>,
    pub(crate) l2_loading: Loading,
    pub(crate) table_making: Loading,
    pub(crate) rt: RefCell<RefTable>,
    pub(crate) rb: RefCell<SliceCache>,
    pub(crate) rb_loading: Loading,
    pub(crate) space: Space,
    /// The last cluster that was unpacked: small reads one after the other unpack it once. Dropped when compressed data is
    /// written, since only that could put another stream in the same place.
    pub(crate) unpacked: RefCell<Option<(Compressed, Bytes)>>,
    pub(crate) inflight: Rc<InFlight>,
    pub(crate) epochs: Epochs,
    /// How often something was zeroed that kept its place.
    pub(crate) kept_places: Cell<u64>,
    pub(crate) order: Order,
    pub(crate) meta: RefCell<MetaMap>,
    pub(crate) snapshots: RefCell<Snapshots>,
    /// Flags of the active tables may not fit the counts (`snapshot`).
    pub(crate) flags_due: Cell<bool>,
    pub(crate) bitmaps: Bitmaps,
    pub(crate) corrupt: Cell<bool>,
    /// Work that goes on without its requests.
    pub(crate) background: Rc<Background>,
    pub(crate) on_corruption: RefCell<Option<OnCorruption>>,
    /// Something in the header's first sector is being written.
    pub(crate) heading: Loading,
}

impl Core {
    /// The name by which errors call the image.
    pub(crate) fn name(&self) -> String {
        match self.opts.borrow().node_name.as_str() {
            "" => self.file.edge().child().name().to_owned(),
            name => name.to_owned(),
        }
    }

    /// The disk has `len` bytes from now on.
    pub(crate) fn set_size(&self, len: u64) {
        self.size.set(len);
        if !planted("qcow2: shortcuts are not told of a new length") {
            self.skippable.changed_all();
        }
    }

    /// Where guest data is.
    pub(crate) fn data(&self) -> &Rc<Child> {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    /// Whether unallocated clusters read as zeroes because there is no layer below.
    pub(crate) fn no_backing(&self) -> bool {
        self.backing.borrow().is_none()
    }

    /// Refuses what changes the image if it is read-only or corrupt.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.corrupt.get() {
            return Err(BlockError::from_errno(BlockError::ENOMEDIUM)
                .with_message(format!("image '{}' is corrupt; it takes no more writes", self.name())));
        }
        if !self.writable.get() {
            return Err(BlockError::new(
                ErrorKind::ReadOnly,
                format!("image '{}' is open read-only", self.name()),
            ));
        }
        Ok(())
    }

    /// Runs `work` to its end, even if the caller is dropped while waiting for it.
    pub(crate) async fn detached<T: 'static>(
        &self,
        name: &'static str,
        work: impl Future<Output = Result<T>> + 'static,
    ) -> Result<T> {
        let (tx, rx) = oneshot();
        self.in_background(name, async move { tx.send(work.await) });
        match rx.await {
            Some(r) => r,
            None => Err(BlockError::new(ErrorKind::Cancelled, format!("{name} was called off"))),
        }
    }

    /// Starts `work` as a task of its own that closing waits for.
    pub(crate) fn in_background(&self, name: &'static str, work: impl Future<Output = ()> + 'static) {
        self.background.spawn(&self.env, name, work);
    }
}

/// Tasks that outlive the requests they were begun for. Each holds the image and changes it (a table that was made is
/// entered, a cluster that was taken is given back), so closing waits until the last has ended.
#[derive(Default)]
pub(crate) struct Background {
    running: Cell<usize>,
    ended: Notify,
}

impl Background {
    pub(crate) fn spawn(
        self: &Rc<Self>,
        env: &Env,
        name: &'static str,
        work: impl Future<Output = ()> + 'static,
    ) {
        self.running.set(self.running.get() + 1);
        let running = Running(self.clone());
        env.spawn(name, async move {
            work.await;
            drop(running);
        });
    }

    /// Waits until none is left.
    pub(crate) async fn idle(&self) {
        while self.running.get() > 0 {
            self.ended.wait().await;
        }
    }
}

struct Running(Rc<Background>);

impl Drop for Running {
    fn drop(&mut self) {
        let left = self.0.running.get() - 1;
        self.0.running.set(left);
        if left == 0 {
            self.0.ended.notify_all();
        }
    }
}

/// Things that are being loaded or made, each by one request; others wait for it.
#[derive(Default)]
pub(crate) struct Loading {
    keys: RefCell<Vec<(u64, Rc<Notify>)>>,
}

impl Loading {
    /// Becomes the one who does it, or gets what to wait for (look again after).
    pub(crate) fn begin(&self, key: u64) -> Result<LoadGuard<'_>, Rc<Notify>> {
        let mut keys = self.keys.borrow_mut();
        if let Some((_, n)) = keys.iter().find(|(k, _)| *k == key) {
            return Err(n.clone());
        }
        keys.push((key, Rc::new(Notify::new())));
        Ok(LoadGuard { of: self, key })
    }

    /// Becomes the one who does it, after whoever does it now.
    pub(crate) async fn turn(&self, key: u64) -> LoadGuard<'_> {
        loop {
            match self.begin(key) {
                Ok(guard) => return guard,
                Err(n) => n.wait().await,
            }
        }
    }
}

/// Given back when dropped; wakes those who wait.
pub(crate) struct LoadGuard<'a> {
    of: &'a Loading,
    key: u64,
}

impl Drop for LoadGuard<'_> {
    fn drop(&mut self) {
        let mut keys = self.of.keys.borrow_mut();
        if let Some(i) = keys.iter().position(|(k, _)| *k == self.key) {
            let (_, n) = keys.swap_remove(i);
            drop(keys);
            n.notify_all();
        }
    }
}
