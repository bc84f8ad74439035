//! Opening an image, and turning it read-write and back.
//!
//! What must stay true: nothing of a hostile image takes more memory than its two tables of bounded size; an image this
//! program cannot keep right (encryption, unknown incompatible features) is refused by name; before the first change of an image
//! everything in it that says "this is up to date" and that we do not keep up to date is durably cleared.

use crate::alloc::Space;
use crate::bitmaps::Bitmaps;
use crate::cache::SliceCache;
use crate::check::{Fix, check, read_header};
use crate::child::Child;
use crate::core::{Background, Core, Loading};
use crate::header::{Crypt, Header};
use crate::l1l2::L1;
use crate::options::Options;
use crate::overlap::{Meta, MetaMap};
use crate::refcount::RefTable;
use crate::snapshot::Snapshot;
use crate::types::HostOffset;
use block::{BlockError, ErrorKind, Result, Span};
use env::Env;
use graph::Edge;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

/// Reads `n` big-endian words at `at`.
async fn read_words(file: &Child, at: HostOffset, n: u64) -> Result<Vec<u64>> {
    let data = file.read(Span::new(at.0, n * 8)).await?.contiguous();
    Ok(data.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect())
}

/// Opens an image; see [`crate::Qcow2::open`].
pub(crate) async fn open(
    env: Env,
    file: Rc<Edge>,
    data_file: Option<Rc<Edge>>,
    opts: Options,
) -> Result<Rc<Core>> {
    let header = read_header(&file).await?;
    check_usable(&header, data_file.is_some())?;
    let geo = header.geometry;
    // A disk is whole sectors; a stored length that is not is cut, as the reference does.
    let size = header.size & !511;
    opts.check(&header)?;
    let sizes = opts.caches(&geo, size)?;
    let (writable, active) = (opts.writable, !opts.inactive);
    let background = Rc::new(Background::default());
    let child = Child::new(env.clone(), file, background.clone());
    let file_clusters = geo.clusters_for(child.len());
    let core = Rc::new(Core {
        data_file: data_file.map(|d| Child::new(env.clone(), d, background.clone())),
        env,
        file: child,
        backing: RefCell::new(None),
        geo,
        header: RefCell::new(header),
        size: Cell::new(size),
        shortcut: Default::default(),
        skippable: Default::default(),
        opts: RefCell::new(opts),
        sizes,
        writable: Cell::new(false),
        vouched: Cell::new(false),
        kept_number: Cell::new(None),
        vouch_due: Cell::new(false),
        active: Cell::new(active),
        wants_writable: Cell::new(writable),
        l1: RefCell::new(L1 { at: HostOffset(0), entries: Vec::new(), dirty: BTreeSet::new() }),
        l2: RefCell::new(SliceCache::new(sizes.l2_slices)),
        l2_loading: Default::default(),
        table_making: Default::default(),
        rt: RefCell::new(RefTable { at: HostOffset(0), entries: Vec::new(), dirty: BTreeSet::new() }),
        rb: RefCell::new(SliceCache::new(sizes.rb_slices)),
        rb_loading: Default::default(),
        space: Space::new(file_clusters),
        unpacked: RefCell::new(None),
        inflight: Default::default(),
        epochs: Default::default(),
        kept_places: Cell::new(0),
        order: Default::default(),
        meta: RefCell::new(MetaMap::default()),
        bitmaps: Bitmaps::default(),
        corrupt: Cell::new(false),
        background,
        snapshots: Default::default(),
        flags_due: Cell::new(false),
        on_corruption: RefCell::new(None),
        heading: Loading::default(),
    });
    core.load_tables().await?;
    core.check_vouched();
    if active {
        core.load_bitmaps().await?;
        if writable {
            core.make_writable().await?;
        }
    } else {
        core.load_directory().await?;
    }
    Ok(core)
}

fn check_usable(h: &Header, has_data_file: bool) -> Result<()> {
    match h.crypt {
        Crypt::None => (),
        Crypt::Aes => {
            return Err(BlockError::unsupported("Encryption method 'aes' of the image is not supported"));
        }
        Crypt::Luks => {
            return Err(BlockError::unsupported("Encryption method 'luks' of the image is not supported"));
        }
    }
    match (h.geometry.data_file(), has_data_file) {
        (true, false) => Err(BlockError::invalid("'data-file' is required for this image")),
        (false, true) => {
            Err(BlockError::invalid("'data-file' can only be set for images with an external data file"))
        }
        _ => Ok(()),
    }
}

impl Core {
    /// Reads the header's tables and enters all metadata into the overlap map. Caches are empty after.
    pub(crate) async fn load_tables(self: &Rc<Self>) -> Result<()> {
        let h = self.header.borrow().clone();
        let cluster = self.geo.cluster_size();
        self.l2.borrow_mut().clear();
        self.rb.borrow_mut().clear();
        let rt_bytes = u64::from(h.refcount_table_clusters) * cluster;
        let rt = read_words(&self.file, h.refcount_table_offset, rt_bytes / 8).await?;
        *self.meta.borrow_mut() = MetaMap::default();
        self.load_snapshots(&h).await?;
        let shown = self.opts.borrow().snapshot.clone();
        let l1 = match &shown {
            None => read_words(&self.file, h.l1_offset, u64::from(h.l1_size)).await?,
            Some(name) => self.show_snapshot(name).await?,
        };
        self.note_meta(HostOffset(0), 1, Meta::Header);
        self.note_meta(h.l1_offset, u64::from(h.l1_size) * 8, Meta::ActiveL1);
        self.note_meta(h.refcount_table_offset, rt_bytes, Meta::RefcountTable);
        for at in rt.iter().filter_map(|raw| self.geo.refcount_table_entry(*raw).ok().flatten()) {
            self.note_meta(at, cluster, Meta::RefcountBlock);
        }
        if let Ok(Some(d)) = h.bitmaps() {
            self.note_meta(d.at, d.len, Meta::BitmapDirectory);
        }
        for e in l1.iter().filter_map(|raw| self.geo.l1_entry(*raw).ok().flatten()) {
            self.note_meta(e.l2, cluster, Meta::ActiveL2);
        }
        *self.l1.borrow_mut() = L1 { at: h.l1_offset, entries: l1, dirty: BTreeSet::new() };
        self.skippable.changed_all();
        *self.rt.borrow_mut() = RefTable { at: h.refcount_table_offset, entries: rt, dirty: BTreeSet::new() };
        Ok(())
    }

    /// Takes the image back: what somebody else made of it is read anew. On an error it stays inactive.
    pub(crate) async fn activate(self: &Rc<Self>) -> Result<()> {
        let done = self.read_anew().await;
        if done.is_err() {
            self.active.set(false);
            self.forget_cached();
        }
        done.map_err(|e| e.context("Could not reopen qcow2 layer"))
    }

    async fn read_anew(self: &Rc<Self>) -> Result<()> {
        self.forget_cached();
        let header = read_header(self.file.edge()).await?;
        check_usable(&header, self.data_file.is_some())?;
        if header.geometry != self.geo {
            let why =
                "it is another image: its version, cluster size, or width of refcounts is not what it was";
            return Err(BlockError::invalid(why));
        }
        self.set_size(header.size & !511);
        *self.header.borrow_mut() = header;
        // Who used it meanwhile may have cleared the bit, and what is kept elsewhere is older than that.
        self.vouched
            .set(self.header.borrow().kept_number().is_some_and(|n| self.kept_number.get() == Some(n)));
        self.load_tables().await?;
        self.load_bitmaps().await?;
        self.active.set(true);
        if self.wants_writable.get() { self.make_writable().await } else { Ok(()) }
    }

    /// Gives the image up: everything is in the file, and nothing that was read is kept. No request is running.
    pub(crate) async fn inactivate(self: &Rc<Self>) -> Result<()> {
        self.background.idle().await;
        if self.writable.get() {
            self.make_read_only().await?;
        }
        self.active.set(false);
        self.forget_cached();
        Ok(())
    }

    /// Tables that are cached can be read again, and so can the bitmaps that the image keeps.
    fn forget_cached(&self) {
        self.l2.borrow_mut().clear();
        self.rb.borrow_mut().clear();
        self.unpacked.take();
        self.bitmaps.unload();
    }

    /// Makes the image ready to be changed.
    pub(crate) async fn make_writable(self: &Rc<Self>) -> Result<()> {
        if self.header.borrow().is_corrupt() {
            return Err(BlockError::new(
                ErrorKind::Permission,
                "qcow2: Image is corrupt; cannot be opened read/write",
            ));
        }
        if self.header.borrow().is_dirty() {
            self.repair_dirty().await?;
        }
        let stale = {
            let mut h = self.header.borrow_mut();
            let ours = if self.vouched.get() { crate::header::AUTOCLEAR_KEPT } else { 0 };
            let stale = h.unknown_autoclear() & !ours;
            h.autoclear &= !stale;
            stale
        };
        if stale != 0 {
            self.write_features().await?;
        }
        self.order.set_lazy(self.wants_lazy());
        self.space.reset(self.geo.clusters_for(self.file.len()));
        self.vouch().await?;
        self.mark_bitmaps_in_use().await?;
        self.bitmaps.set_readonly(false);
        self.writable.set(true);
        Ok(())
    }

    /// Whether the number in the header is that of who keeps the bitmaps elsewhere, too.
    pub(crate) fn check_vouched(&self) {
        let Some(keeper) = self.opts.borrow().keeper else { return };
        let vouched = keeper.old.is_some() && self.header.borrow().kept_number() == keeper.old;
        self.vouched.set(vouched);
        self.kept_number.set(keeper.old.filter(|_| vouched));
        self.vouch_due.set(!vouched && self.geo.version() >= 3);
    }

    /// Before the first change after opening: from now on the header says that the bitmaps are kept elsewhere, too, under a new
    /// number. Once: whoever keeps them has to know it before it is used again.
    async fn vouch(self: &Rc<Self>) -> Result<()> {
        let Some(number) = self.opts.borrow().keeper.map(|k| k.new).filter(|_| self.vouch_due.replace(false))
        else {
            return Ok(());
        };
        self.writable.set(true);
        let done = self.rewrite_header(move |h| h.set_kept_number(number)).await;
        self.writable.set(false);
        match done {
            // a header without room for it: nobody will believe what is kept elsewhere
            Err(e) if e.kind() == ErrorKind::NoSpace => Ok(()),
            Err(e) => Err(e),
            Ok(()) => {
                self.kept_number.set(Some(number));
                Ok(())
            }
        }
    }

    /// Whether refcounts may be behind while the image is in use.
    pub(crate) fn wants_lazy(&self) -> bool {
        self.opts.borrow().lazy_refcounts.unwrap_or(self.header.borrow().lazy_refcounts())
    }

    /// Takes the run-time options of `new`, which [`Core::check_options`] found to be right. The caches keep their units: what is in
    /// them is in use.
    pub(crate) fn set_options(&self, new: &Options) {
        self.opts.replace_with(|o| o.with_run_time(new));
        if let Ok(sizes) = new.caches(&self.geo, self.size.get()) {
            let l2_bytes = (sizes.l2_slices as u64).saturating_mul(sizes.l2_slice);
            let l2_slices = usize::try_from(l2_bytes / self.sizes.l2_slice).unwrap_or(usize::MAX / 2);
            self.l2.borrow_mut().set_capacity(l2_slices);
            self.rb.borrow_mut().set_capacity(sizes.rb_slices);
        }
        if self.writable.get() {
            self.order.set_lazy(self.wants_lazy());
        }
    }

    /// Whether the image can be open with the run-time options of `new`.
    pub(crate) fn check_options(&self, new: &Options) -> Result<()> {
        new.check(&self.header.borrow())?;
        new.caches(&self.geo, self.size.get()).map(|_| ())
    }

    /// The L1 table of the snapshot of that id or name, whose disk this is from now on.
    async fn show_snapshot(&self, name: &str) -> Result<Vec<u64>> {
        let found = {
            let all = self.snapshots.borrow();
            let by = |f: fn(&Snapshot) -> &str| all.list.iter().find(|s| f(s) == name).cloned();
            by(|s| &s.id).or_else(|| by(|s| &s.name))
        };
        let writable = self.opts.borrow().writable;
        let Some(s) = found.filter(|_| !writable) else {
            return Err(BlockError::invalid(match writable {
                true => "An internal snapshot can only be opened read-only".to_owned(),
                false => format!("image '{}' has no snapshot '{name}'", self.name()),
            }));
        };
        self.set_size(s.disk_size & !511);
        self.snapshot_l1(&s).await
    }

    /// The image was not closed and its refcounts are stale: counts them anew.
    async fn repair_dirty(self: &Rc<Self>) -> Result<()> {
        let report = check(self.file.edge(), Fix::All).await?;
        if !report.is_clean() {
            return Err(BlockError::corrupt(format!(
                "image '{}' was not closed, and could not be repaired",
                self.name()
            )));
        }
        let header = read_header(self.file.edge()).await?;
        let still_dirty = header.is_dirty();
        *self.header.borrow_mut() = header;
        self.load_tables().await?;
        if still_dirty {
            self.header.borrow_mut().incompatible &= !crate::header::INCOMPAT_DIRTY;
            self.write_features().await?;
        }
        Ok(())
    }

    /// Everything is in the file, and the image takes no writes any more.
    pub(crate) async fn make_read_only(self: &Rc<Self>) -> Result<()> {
        self.settle_all().await?;
        self.store_bitmaps().await?;
        if let Err(e) = self.settle_all().await {
            // It stays writable, so what was just stored may lack changes again.
            if self.mark_bitmaps_in_use().await.is_err() {
                self.writable.set(false);
            }
            return Err(e);
        }
        self.bitmaps.set_readonly(true);
        self.writable.set(false);
        Ok(())
    }
}
