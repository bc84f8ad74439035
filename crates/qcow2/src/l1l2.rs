//! The two levels of tables that say where guest clusters are.
//!
//! The L1 table is in memory as a whole. L2 tables are cached by slices, keyed by which guest clusters they map (so a
//! slice stays right when its table moves). An L2 table is changed in place only if its L1 entry says that nobody shares
//! it (COPIED); else a copy is made first.
//!
//! What must stay true: an L1 entry appears in memory only after the table it points to was written whole; who changes
//! an entry holds the guest cluster in the in-flight list or changes it without waiting in between.

use crate::cache::SlotId;
use crate::core::Core;
use crate::overlap::Meta;
use crate::types::{EntryFault, GuestCluster, HostOffset, L1Entry, L2Entry};
use block::{BlockError, Data, Result, Span};
use env::bugs::planted;
use graph::DebugEvent;
use std::collections::BTreeSet;
use std::rc::Rc;

/// Entries of a table in one 512-byte sector.
const PER_SECTOR: usize = 64;

/// The L1 table.
pub(crate) struct L1 {
    /// Where it is.
    pub(crate) at: HostOffset,
    /// Raw entries.
    pub(crate) entries: Vec<u64>,
    /// Sectors of it that the file does not have yet.
    pub(crate) dirty: BTreeSet<usize>,
}

impl L1 {
    pub(crate) fn set(&mut self, index: usize, raw: u64) {
        self.entries[index] = raw;
        self.dirty.insert(index / PER_SECTOR);
    }

    /// The bytes of a sector: (offset in the file, bytes).
    pub(crate) fn sector(&self, n: usize) -> (u64, Vec<u8>) {
        let from = n * PER_SECTOR;
        let to = (from + PER_SECTOR).min(self.entries.len());
        (self.at.0 + (n * 512) as u64, self.entries[from..to].iter().flat_map(|e| e.to_be_bytes()).collect())
    }
}

/// What is known of a guest cluster's slice without waiting.
pub(crate) enum Slice {
    /// There is no table: everything it would map is unallocated.
    NoTable,
    /// It is here.
    Here(SlotId),
    /// It has to be loaded, from there.
    Load(HostOffset),
}

impl Core {
    /// Entries in a slice, as a shift.
    fn slice_bits(&self) -> u32 {
        self.sizes.l2_slice.trailing_zeros() - self.geo.l2_entry_size().trailing_zeros()
    }

    /// Number of the slice that maps guest cluster `c`.
    pub(crate) fn slice_key(&self, c: u64) -> u64 {
        c >> self.slice_bits()
    }

    /// First guest cluster after the slice of `c`.
    pub(crate) fn slice_end(&self, c: u64) -> u64 {
        ((c >> self.slice_bits()) + 1) << self.slice_bits()
    }

    /// First guest cluster after the table of `c`.
    pub(crate) fn table_end(&self, c: u64) -> u64 {
        ((c >> self.geo.l2_bits()) + 1) << self.geo.l2_bits()
    }

    pub(crate) fn l1_entry(self: &Rc<Self>, index: u64) -> Result<Option<L1Entry>> {
        let raw = self.l1.borrow().entries.get(index as usize).copied().unwrap_or(0);
        if raw == 0 {
            return Ok(None);
        }
        self.geo.l1_entry(raw).map_err(|fault| self.bad_l1(index, fault))
    }

    fn bad_l1(self: &Rc<Self>, index: u64, fault: EntryFault) -> BlockError {
        self.found_corrupt(format!("L2 table offset: {fault} (L1 index: {index:#x})"), None, None)
    }

    /// Where slice `key` is in the file, given its table.
    fn slice_place(&self, key: u64, table: HostOffset) -> HostOffset {
        let per_table = self.geo.cluster_size() / self.sizes.l2_slice;
        HostOffset(table.0 + (key & (per_table - 1)) * self.sizes.l2_slice)
    }

    /// Where slice `key` is written to now.
    pub(crate) fn slice_target(&self, key: u64) -> Option<HostOffset> {
        let per_table = self.geo.cluster_size() / self.sizes.l2_slice;
        let raw = *self.l1.borrow().entries.get((key / per_table) as usize)?;
        let table = self.geo.l1_entry(raw).ok()??.l2;
        Some(self.slice_place(key, table))
    }

    /// The slice of guest cluster `c`, as far as it is known without waiting.
    pub(crate) fn slice(self: &Rc<Self>, c: u64) -> Result<Slice> {
        let key = self.slice_key(c);
        if let Some(slot) = self.l2.borrow_mut().get(key) {
            return Ok(Slice::Here(slot));
        }
        match self.l1_entry(c >> self.geo.l2_bits())? {
            None => Ok(Slice::NoTable),
            Some(e) => Ok(Slice::Load(self.slice_place(key, e.l2))),
        }
    }

    /// Loads the slice of guest cluster `c` from `from`, or waits while another request does. Look again after.
    pub(crate) async fn load_slice(self: &Rc<Self>, c: u64, from: HostOffset) -> Result<()> {
        let key = self.slice_key(c);
        let guard = match self.l2_loading.begin(key) {
            Ok(g) => g,
            Err(other) => {
                other.wait().await;
                return Ok(());
            }
        };
        let kind = self.meta.borrow().find(self.geo.host_cluster(from).0, 1);
        if kind != Some(Meta::ActiveL2) {
            let what = kind.map_or("nothing known", Meta::name);
            let index = c >> self.geo.l2_bits();
            let text = format!("L2 table offset {from} overlaps with {what} (L1 index: {index:#x})");
            return Err(self.found_corrupt(text, Some(from.0), None));
        }
        if !self.l2.borrow().has_room() {
            drop(guard);
            return self.commit().await;
        }
        self.file.tell(DebugEvent::L2Load);
        let data =
            self.file.read(Span::new(from.0, self.sizes.l2_slice)).await.map_err(|e| {
                e.context(format_args!("image '{}': reading an L2 table at {from}", self.name()))
            })?;
        // Nobody can have changed the slice meanwhile: for that it would have to be here. The room may be gone, though.
        let bytes = data.to_vec();
        if !self.l2.borrow_mut().insert(key, bytes, false) {
            drop(guard);
            return self.commit().await;
        }
        drop(guard);
        Ok(())
    }

    /// Waits until the slice of guest cluster `c` is here; `None` if there is no table.
    pub(crate) async fn loaded_slice(self: &Rc<Self>, c: u64) -> Result<Option<SlotId>> {
        loop {
            match self.slice(c)? {
                Slice::NoTable => return Ok(None),
                Slice::Here(slot) => return Ok(Some(slot)),
                Slice::Load(from) => self.load_slice(c, from).await?,
            }
        }
    }

    /// The slice of guest cluster `c`, in a table that may be changed, if that is so without waiting.
    pub(crate) fn writable_slice_now(self: &Rc<Self>, c: u64) -> Result<Option<SlotId>> {
        match self.l1_entry(c >> self.geo.l2_bits())? {
            Some(e) if e.copied => Ok(self.l2.borrow_mut().get(self.slice_key(c))),
            _ => Ok(None),
        }
    }

    /// The slice of guest cluster `c`, in a table that may be changed. Valid until the next wait.
    pub(crate) async fn writable_slice(self: &Rc<Self>, c: u64) -> Result<SlotId> {
        loop {
            if let Some(slot) = self.writable_slice_now(c)? {
                return Ok(slot);
            }
            let index = c >> self.geo.l2_bits();
            match self.l1_entry(index)? {
                Some(e) if e.copied => {
                    self.loaded_slice(c).await?;
                }
                _ => self.make_table(index).await?,
            }
        }
    }

    /// Gives L1 entry `index` a table of its own: new, or a copy of a shared one.
    async fn make_table(self: &Rc<Self>, index: u64) -> Result<()> {
        let core = self.clone();
        self.detached("qcow2-l2-table", async move {
            match core.table_making.begin(index) {
                Ok(_guard) => core.make_table_now(index).await,
                Err(other) => {
                    other.wait().await;
                    Ok(())
                }
            }
        })
        .await
    }

    async fn make_table_now(self: &Rc<Self>, index: u64) -> Result<()> {
        let old = self.l1_entry(index)?;
        if old.is_some_and(|e| e.copied) {
            return Ok(());
        }
        let cluster = self.geo.cluster_size();
        let content = match old {
            None => Data::zeroes(cluster as usize),
            Some(e) => {
                self.file.tell(DebugEvent::L2AllocCowRead);
                self.file.read(Span::new(e.l2.0, cluster)).await?
            }
        };
        let run = self.alloc_clusters(1).await?;
        let at = HostOffset(run.first << self.geo.cluster_bits());
        self.file.tell(DebugEvent::L2AllocWrite);
        if let Err(e) = self.file.write(at.0, content).await {
            self.give_back(run.first, 1);
            return Err(e.context(format_args!("image '{}': writing an L2 table at {at}", self.name())));
        }
        self.order.data_before_mapping();
        self.l1.borrow_mut().set(index as usize, self.geo.encode_l1(at, true));
        if let Some(e) = old {
            let c = self.geo.host_cluster(e.l2).0;
            self.meta.borrow_mut().remove(c, Meta::ActiveL2);
            self.free_clusters(c, 1, false);
        }
        self.note_meta(at, cluster, Meta::ActiveL2);
        Ok(())
    }

    /// The raw entry of guest cluster `c` in its slice: (entry, subcluster bitmap).
    pub(crate) fn raw_entry(&self, slot: SlotId, c: u64) -> (u64, u64) {
        let l2 = self.l2.borrow();
        let bytes = l2.bytes(slot);
        let size = self.geo.l2_entry_size() as usize;
        let at = (c & ((1 << self.slice_bits()) - 1)) as usize * size;
        let word =
            |at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
        (word(at), if size == 16 { word(at + 8) } else { 0 })
    }

    /// The entry of guest cluster `c` in its slice.
    pub(crate) fn entry(self: &Rc<Self>, slot: SlotId, c: u64) -> Result<L2Entry> {
        let (raw, bitmap) = self.raw_entry(slot, c);
        self.geo.l2_entry(raw, bitmap).map_err(|fault| self.bad_l2(c, fault))
    }

    fn bad_l2(self: &Rc<Self>, c: u64, fault: EntryFault) -> BlockError {
        let table = self.l1_entry(c >> self.geo.l2_bits()).ok().flatten().map_or(HostOffset(0), |e| e.l2);
        let index = c & (self.geo.l2_entries() - 1);
        let text = match fault {
            EntryFault::Unaligned(at) => {
                format!("Cluster allocation offset {at} unaligned (L2 offset: {table}, L2 index: {index:#x})")
            }
            other => format!("L2 entry: {other} (L2 offset: {table}, L2 index: {index:#x})"),
        };
        self.found_corrupt(text, None, None)
    }

    /// Changes the entry of guest cluster `c` in a slice that may be changed. No other place changes what is mapped but
    /// [`Core::load_tables`] and giving back empty tables.
    pub(crate) fn set_entry(&self, slot: SlotId, c: u64, entry: L2Entry) {
        let (raw, bitmap) = self.geo.encode_l2(entry);
        let mut l2 = self.l2.borrow_mut();
        let bytes = l2.bytes_mut(slot);
        let size = self.geo.l2_entry_size() as usize;
        let at = (c & ((1 << self.slice_bits()) - 1)) as usize * size;
        bytes[at..at + 8].copy_from_slice(&raw.to_be_bytes());
        if size == 16 {
            bytes[at + 8..at + 16].copy_from_slice(&bitmap.to_be_bytes());
        }
        drop(l2);
        if !planted("qcow2: shortcuts are not told of a mapping") {
            self.skippable.changed(Span::new(self.guest_start(c), self.geo.cluster_size()));
        }
    }

    /// First byte of a guest cluster (which is inside the disk, so it fits).
    pub(crate) fn guest_start(&self, c: u64) -> u64 {
        self.geo.guest_start(GuestCluster(c)).map_or(u64::MAX, |o| o.0)
    }
}
