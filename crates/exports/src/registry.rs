//! All exports of the process, and the NBD server they are reached through.
//!
//! What can happen: exports are added and deleted while clients use them; the server is started and stopped; a deletion
//! waits for requests that hang, while everything else goes on. What must stay true: an id is free again exactly when
//! `deleted` was called for it; a name is free as soon as its export was told to go.

use crate::export::{Export, ExportInfo, ExportedBitmap, NbdOptions};
use crate::fuse::{Fuse, FuseExportOptions};
use crate::nbd_server::{NbdServer, ServerOptions};
use crate::vhost_user_blk::{self, VhostUserBlk, VhostUserBlkOptions};
use block::{BlockError, ErrorKind, Result};
use env::sync::Notify;
use env::{Address, Env};
use graph::{Edge, Graph};
use nbd::proto::MAX_STRING;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// How to delete an export.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DeleteMode {
    /// Only without clients.
    #[default]
    Safe,
    /// Clients are cut off.
    Hard,
}

/// An export of any kind.
#[derive(Clone)]
enum AnyExport {
    Nbd(Rc<Export>),
    VhostUserBlk(Rc<VhostUserBlk>),
    Fuse(Rc<Fuse>),
}

/// The same question to an export of any kind.
macro_rules! ask {
    ($export:expr, $e:ident => $answer:expr) => {
        match $export {
            AnyExport::Nbd($e) => $answer,
            AnyExport::VhostUserBlk($e) => $answer,
            AnyExport::Fuse($e) => $answer,
        }
    };
}

impl AnyExport {
    fn id(&self) -> &str {
        ask!(self, e => e.id())
    }
    fn info(&self) -> ExportInfo {
        ask!(self, e => e.info())
    }
    /// Clients that a deletion must wait for.
    fn clients(&self) -> usize {
        match self {
            AnyExport::Nbd(e) => e.clients(),
            AnyExport::VhostUserBlk(e) => e.clients(),
            AnyExport::Fuse(e) => e.busy(),
        }
    }
    /// Whether it must not be deleted without force. That a file is open is no reason, as in QSD.
    fn in_use(&self) -> bool {
        self.clients() > 0 && !matches!(self, AnyExport::Fuse(_))
    }
    fn is_shutting_down(&self) -> bool {
        ask!(self, e => e.is_shutting_down())
    }
    fn close(&self) {
        ask!(self, e => e.close());
    }
    async fn drained(&self) {
        ask!(self, e => e.drained().await);
    }
    fn nbd(&self) -> Option<&Rc<Export>> {
        match self {
            AnyExport::Nbd(e) => Some(e),
            AnyExport::VhostUserBlk(_) | AnyExport::Fuse(_) => None,
        }
    }
}

/// The exports by themselves, as the NBD server sees them.
pub(crate) struct Exports {
    /// Oldest first.
    all: RefCell<Vec<AnyExport>>,
    multi_conn: Cell<bool>,
    /// Clients that come wait: exports that they may want are about to be made.
    holding: Cell<bool>,
    let_in: Notify,
}

impl Exports {
    /// The export that clients reach by `name`.
    pub(crate) fn find(&self, name: &str) -> Option<Rc<Export>> {
        let all = self.all.borrow();
        all.iter()
            .filter_map(AnyExport::nbd)
            .find(|e| !e.is_shutting_down() && e.options().name == name)
            .cloned()
    }
    pub(crate) fn each(&self, mut f: impl FnMut(&Export)) {
        let all = self.all.borrow();
        all.iter().filter_map(AnyExport::nbd).filter(|e| !e.is_shutting_down()).for_each(|e| f(e));
    }
    /// Ends when clients may be served.
    pub(crate) async fn open(&self) {
        while self.holding.get() {
            self.let_in.wait().await;
        }
    }
    pub(crate) fn multi_conn(&self) -> bool {
        self.multi_conn.get()
    }
    fn by_id(&self, id: &str) -> Option<AnyExport> {
        self.all.borrow().iter().find(|e| e.id() == id).cloned()
    }
}

/// Exports and the server.
pub struct ExportRegistry {
    env: Env,
    exports: Rc<Exports>,
    server: RefCell<Option<NbdServer>>,
    /// A server is being started or stopped.
    busy: Cell<bool>,
    deleted: Rc<dyn Fn(&str)>,
}

impl ExportRegistry {
    /// No exports, no server. `deleted` is called with an export's id when it is gone (QMP's `BLOCK_EXPORT_DELETED`);
    /// the export's edge has been dropped by then.
    pub fn new(env: &Env, deleted: impl Fn(&str) + 'static) -> Rc<ExportRegistry> {
        Rc::new(ExportRegistry {
            env: env.clone(),
            exports: Rc::new(Exports {
                all: RefCell::new(Vec::new()),
                multi_conn: Cell::new(true),
                holding: Cell::new(false),
                let_in: Notify::new(),
            }),
            server: RefCell::new(None),
            busy: Cell::new(false),
            deleted: Rc::new(deleted),
        })
    }

    /// Starts the server; there can be one.
    pub async fn start_server(&self, options: &ServerOptions) -> Result<()> {
        if self.server.borrow().is_some() || self.busy.replace(true) {
            return Err(BlockError::new(ErrorKind::Busy, "NBD server already running"));
        }
        let started = NbdServer::start(&self.env, options, &self.exports).await;
        self.busy.set(false);
        let server = started?;
        self.exports.multi_conn.set(server.multi_conn());
        *self.server.borrow_mut() = Some(server);
        Ok(())
    }

    /// Lets NBD clients that connect wait, until they are let in: those that come back after a restart find the exports that
    /// they had, or learn that they are gone, but not that they are not there yet.
    pub fn hold_clients(&self, hold: bool) {
        self.exports.holding.set(hold);
        if !hold {
            self.exports.let_in.notify_all();
        }
    }

    /// Where the server listens, with the port that was picked.
    pub fn server_address(&self) -> Option<Address> {
        self.server.borrow().as_ref().map(NbdServer::address)
    }

    /// Clients connected now, in any phase.
    pub fn connections(&self) -> usize {
        self.server.borrow().as_ref().map_or(0, NbdServer::clients)
    }

    /// Stops the server: every NBD export is deleted, newest first, and every client cut off.
    pub async fn stop_server(&self) -> Result<()> {
        let Some(server) = self.server.borrow_mut().take() else {
            return Err(BlockError::invalid("NBD server not running"));
        };
        self.busy.set(true);
        let all: Vec<_> =
            self.exports.all.borrow().iter().rev().filter(|e| e.nbd().is_some()).cloned().collect();
        all.iter().for_each(AnyExport::close);
        server.stop().await;
        for e in all {
            finish(&self.exports, e, &self.deleted).await;
        }
        self.busy.set(false);
        Ok(())
    }

    /// What can be said against a new export before its node is looked for.
    pub fn check_id(&self, id: &str) -> Result<()> {
        let mut chars = id.chars();
        let first = chars.next().is_some_and(|c| c.is_ascii_alphabetic());
        if !first || !chars.all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)) {
            return Err(BlockError::invalid("Invalid block export id"));
        }
        if self.exports.by_id(id).is_some() {
            let message = format!("Block export id '{id}' is already in use");
            return Err(BlockError::new(ErrorKind::Busy, message));
        }
        Ok(())
    }

    /// What can be said against a new export of any kind when its node is known.
    pub fn check_common(&self, id: &str, wanted: bool, node_writable: bool) -> Result<()> {
        self.check_id(id)?;
        if wanted && !node_writable {
            return Err(BlockError::new(ErrorKind::ReadOnly, "Cannot export read-only node as writable"));
        }
        Ok(())
    }

    /// What can be said against a new vhost-user-blk export when its node is known.
    pub fn check_vhost_user_blk(&self, o: &VhostUserBlkOptions, node_writable: bool) -> Result<()> {
        self.check_common(&o.id, o.writable, node_writable)?;
        vhost_user_blk::check(o)
    }

    /// Offers the node behind `edge` (held with [`VhostUserBlkOptions::demand`]) to virtual machines. Checks as
    /// [`ExportRegistry::check_vhost_user_blk`].
    pub async fn add_vhost_user_blk(
        &self,
        options: VhostUserBlkOptions,
        edge: Rc<Edge>,
        node_writable: bool,
    ) -> Result<()> {
        self.check_vhost_user_blk(&options, node_writable)?;
        let id = options.id.clone();
        let export = VhostUserBlk::start(&self.env, options, edge).await?;
        // while it began to listen, another monitor may have taken the id
        if let Err(e) = self.check_id(&id) {
            export.close();
            return Err(e);
        }
        self.exports.all.borrow_mut().push(AnyExport::VhostUserBlk(export));
        Ok(())
    }

    /// What can be said against a new FUSE export when its node is known.
    pub fn check_fuse(&self, o: &FuseExportOptions, node_writable: bool) -> Result<()> {
        self.check_common(&o.id, o.writable, node_writable)?;
        let at = self.env.absolute(&o.mountpoint);
        let taken = |e: &AnyExport| matches!(e, AnyExport::Fuse(f) if f.mountpoint() == at);
        if self.exports.all.borrow().iter().any(taken) {
            let message = format!("There already is a FUSE export on '{}'", o.mountpoint.display());
            return Err(BlockError::new(ErrorKind::Busy, message));
        }
        Ok(())
    }

    /// Offers the node behind `edge` (held with [`FuseExportOptions::demand`]) as a file. Checks as [`ExportRegistry::check_fuse`].
    pub async fn add_fuse(
        self: &Rc<Self>,
        options: FuseExportOptions,
        edge: Rc<Edge>,
        graph: Rc<Graph>,
        node_writable: bool,
    ) -> Result<()> {
        self.check_fuse(&options, node_writable)?;
        let here = Rc::downgrade(self);
        let gone = Box::new(move |id: &str| {
            let Some(registry) = here.upgrade() else { return };
            if let Some(export) = registry.exports.by_id(id) {
                remove(&registry.exports, export, &*registry.deleted);
            }
        });
        let export = Fuse::start(&self.env, options.clone(), edge, graph, gone).await?;
        // while it was mounted, another monitor may have taken the id or the place
        if let Err(e) = self.check_fuse(&options, node_writable) {
            export.close();
            return Err(e);
        }
        self.exports.all.borrow_mut().push(AnyExport::Fuse(export));
        Ok(())
    }

    /// Tells clients whose disk has another length than they know.
    pub fn tell_lengths(&self) {
        for e in self.exports.all.borrow().iter() {
            if let AnyExport::VhostUserBlk(e) = e {
                e.tell_length();
            }
        }
    }

    /// What can be said against a new NBD export when its node is known.
    pub fn check_nbd(&self, o: &NbdOptions, node_writable: bool) -> Result<()> {
        self.check_common(&o.id, o.writable, node_writable)?;
        if self.server.borrow().is_none() {
            return Err(BlockError::invalid("NBD server not running"));
        }
        for (what, text) in [("export name", &o.name), ("description", &o.description)] {
            if text.len() > MAX_STRING {
                return Err(BlockError::invalid(format!("{what} '{text}' too long")));
            }
        }
        if self.exports.find(&o.name).is_some() {
            let message = format!("NBD server already has export named '{}'", o.name);
            return Err(BlockError::new(ErrorKind::Busy, message));
        }
        Ok(())
    }

    /// Offers the node behind `edge` (held with [`Export::demand`]) over NBD. Checks as [`ExportRegistry::check_nbd`].
    pub fn add_nbd(&self, options: NbdOptions, edge: Rc<Edge>, node_writable: bool) -> Result<()> {
        self.add_nbd_with(options, Vec::new(), edge, node_writable)
    }

    /// The same, with bitmaps as contexts `qemu:dirty-bitmap:NAME`; they are busy as long as the export is there.
    pub fn add_nbd_with(
        &self,
        options: NbdOptions,
        bitmaps: Vec<ExportedBitmap>,
        edge: Rc<Edge>,
        node_writable: bool,
    ) -> Result<()> {
        self.check_nbd(&options, node_writable)?;
        self.exports.all.borrow_mut().push(AnyExport::Nbd(Export::new(options, bitmaps, edge)));
        Ok(())
    }

    /// All exports, newest first.
    pub fn query(&self) -> Vec<ExportInfo> {
        self.exports.all.borrow().iter().rev().map(|e| e.info()).collect()
    }

    /// Begins to delete an export. Without clients it is gone when this returns; else when `deleted` is called.
    pub fn delete(&self, id: &str, mode: DeleteMode) -> Result<()> {
        let Some(export) = self.exports.by_id(id) else {
            return Err(BlockError::new(ErrorKind::NotFound, format!("Export '{id}' is not found")));
        };
        if export.is_shutting_down() {
            return Err(BlockError::new(ErrorKind::Busy, format!("Export '{id}' is already shutting down")));
        }
        if mode == DeleteMode::Safe && export.in_use() {
            let hint = "Use mode='hard' to force client disconnect";
            return Err(
                BlockError::new(ErrorKind::Busy, format!("export '{id}' still in use")).with_hint(hint)
            );
        }
        export.close();
        if export.clients() == 0 {
            remove(&self.exports, export, &*self.deleted);
        } else {
            let (exports, deleted) = (self.exports.clone(), self.deleted.clone());
            self.env.spawn("export end", async move { finish(&exports, export, &deleted).await });
        }
        Ok(())
    }

    /// Deletes all exports and stops the server, for the end of the process.
    pub async fn shut_down(&self) {
        let _ = self.stop_server().await;
        let left: Vec<_> = self.exports.all.borrow().iter().rev().cloned().collect();
        for e in left {
            e.close();
            finish(&self.exports, e, &self.deleted).await;
        }
    }
}

async fn finish(exports: &Exports, export: AnyExport, deleted: &Rc<dyn Fn(&str)>) {
    export.drained().await;
    remove(exports, export, &**deleted);
}

fn remove(exports: &Exports, export: AnyExport, deleted: &dyn Fn(&str)) {
    let id = export.id().to_owned();
    let before = exports.all.borrow().len();
    // an id is not used again before this, so it says which
    exports.all.borrow_mut().retain(|e| e.id() != id);
    if exports.all.borrow().len() < before {
        // The edge first: whoever hears of the deletion may use the node.
        drop(export);
        deleted(&id);
    }
}
