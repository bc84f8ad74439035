//! Refcounts of host clusters while the image is in use.
//!
//! The refcount table is in memory as a whole; refcount blocks are cached by slices, keyed by which host clusters they
//! count. A refcount changes in memory at once; `order` says when the file sees it.
//!
//! What must stay true: a refcount block is written whole, with its own refcount in it, before the table points to it in
//! memory; a refcount in memory is never lower than what the mappings that could be in the file need (decrements
//! come here only after the barrier behind the change that freed the cluster).

use crate::cache::SlotId;
use crate::core::Core;
use crate::header::MAX_REFCOUNT_TABLE_BYTES;
use crate::overlap::Meta;
use crate::types::{HostCluster, HostOffset};
use block::{BlockError, Data, Result, Span};
use graph::DebugEvent;
use std::collections::BTreeSet;
use std::rc::Rc;

/// Key under which making a refcount block (or a larger table) excludes itself: there is one allocator.
const MAKING: u64 = u64::MAX;

/// The refcount table.
pub(crate) struct RefTable {
    /// Where it is.
    pub(crate) at: HostOffset,
    /// Raw entries.
    pub(crate) entries: Vec<u64>,
    /// Sectors of it that the file does not have yet.
    pub(crate) dirty: BTreeSet<usize>,
}

impl RefTable {
    /// The bytes of a sector: (offset in the file, bytes).
    pub(crate) fn sector(&self, n: usize) -> (u64, Vec<u8>) {
        let from = n * 64;
        let to = (from + 64).min(self.entries.len());
        (self.at.0 + (n * 512) as u64, self.entries[from..to].iter().flat_map(|e| e.to_be_bytes()).collect())
    }
}

/// What is known of the refcounts around a host cluster without waiting.
pub(crate) enum Counts {
    /// The slice is here.
    Here(SlotId),
    /// It has to be loaded.
    Load,
    /// No block counts this cluster: it is free, as are all the others of that block.
    NoBlock,
}

impl Core {
    /// Refcounts in a slice, as a shift.
    fn rb_bits(&self) -> u32 {
        self.sizes.rb_slice.trailing_zeros() + 3 - self.geo.refcount_order()
    }

    /// First host cluster after the slice of `c`.
    pub(crate) fn rb_end(&self, c: u64) -> u64 {
        ((c >> self.rb_bits()) + 1) << self.rb_bits()
    }

    fn rb_index(&self, c: u64) -> usize {
        (c & ((1 << self.rb_bits()) - 1)) as usize
    }

    /// Where the slice with refcounts of slice number `key` is in the file.
    pub(crate) fn rb_target(&self, key: u64) -> Option<HostOffset> {
        let per_block = self.geo.cluster_size() / self.sizes.rb_slice;
        let raw = *self.rt.borrow().entries.get((key / per_block) as usize)?;
        let block = self.geo.refcount_table_entry(raw).ok()??;
        Some(HostOffset(block.0 + (key % per_block) * self.sizes.rb_slice))
    }

    pub(crate) fn counts(self: &Rc<Self>, c: u64) -> Result<Counts> {
        let key = c >> self.rb_bits();
        if let Some(slot) = self.rb.borrow_mut().get(key) {
            return Ok(Counts::Here(slot));
        }
        let index = self.geo.refcount_table_index(HostCluster(c));
        let raw = self.rt.borrow().entries.get(index as usize).copied().unwrap_or(0);
        match self.geo.refcount_table_entry(raw) {
            Ok(None) => Ok(Counts::NoBlock),
            Ok(Some(_)) => Ok(Counts::Load),
            Err(fault) => {
                let text = format!("Refblock offset: {fault} (reftable index: {index:#x})");
                Err(self.found_corrupt(text, None, None))
            }
        }
    }

    /// Loads the refcounts around host cluster `c`. With `force` the cache may grow beyond its size: for the writer of
    /// the cache itself, who must not wait for itself.
    pub(crate) async fn load_counts(self: &Rc<Self>, c: u64, force: bool) -> Result<()> {
        let key = c >> self.rb_bits();
        let guard = match self.rb_loading.begin(key) {
            Ok(g) => g,
            Err(other) if !force => {
                other.wait().await;
                return Ok(());
            }
            // The other loader may wait for a commit, and this is one: load it beside.
            Err(_) => return self.read_counts(key, true).await.map(|_| ()),
        };
        if !force && !self.rb.borrow().has_room() {
            drop(guard);
            return self.commit().await;
        }
        if !self.read_counts(key, force).await? {
            drop(guard);
            return self.commit().await;
        }
        Ok(())
    }

    async fn read_counts(self: &Rc<Self>, key: u64, force: bool) -> Result<bool> {
        let Some(at) = self.rb_target(key) else { return Ok(true) };
        self.file.tell(DebugEvent::RefblockLoad);
        let data = self
            .file
            .read(Span::new(at.0, self.sizes.rb_slice))
            .await
            .map_err(|e| e.context(format_args!("image '{}': reading refcounts at {at}", self.name())))?;
        // If it came in by another way meanwhile, that one stays.
        Ok(self.rb.borrow_mut().insert(key, data.to_vec(), force))
    }

    pub(crate) fn refcount(&self, slot: SlotId, c: u64) -> u64 {
        self.geo.refcount(self.rb.borrow().bytes(slot), self.rb_index(c)).unwrap_or(0)
    }

    /// Sets a refcount; `false` if it does not fit.
    pub(crate) fn set_refcount(&self, slot: SlotId, c: u64, value: u64) -> bool {
        value <= self.geo.refcount_max()
            && self.geo.set_refcount(self.rb.borrow_mut().bytes_mut(slot), self.rb_index(c), value)
    }

    /// The first run of free clusters in this slice, from `c` on: (first, number), at most `want`.
    pub(crate) fn free_run(&self, slot: SlotId, c: u64, want: u64) -> Option<(u64, u64)> {
        let rb = self.rb.borrow();
        let bytes = rb.bytes(slot);
        let end = self.rb_end(c);
        let is_free = |c: u64| self.geo.refcount(bytes, self.rb_index(c)) == Some(0);
        let first = (c..end).find(|c| is_free(*c))?;
        let n = (first..end.min(first.saturating_add(want))).take_while(|c| is_free(*c)).count();
        Some((first, n as u64))
    }

    /// Makes the refcount block that counts host cluster `c`.
    pub(crate) async fn make_block(self: &Rc<Self>, c: u64) -> Result<()> {
        let core = self.clone();
        self.detached("qcow2-refcount-block", async move {
            let guard = core.rb_loading.begin(MAKING);
            match guard {
                Ok(_guard) => core.make_block_now(c).await,
                Err(other) => {
                    other.wait().await;
                    Ok(())
                }
            }
        })
        .await
    }

    async fn make_block_now(self: &Rc<Self>, c: u64) -> Result<()> {
        if !matches!(self.counts(c)?, Counts::NoBlock) {
            return Ok(());
        }
        let index = self.geo.refcount_table_index(HostCluster(c));
        if index as usize >= self.rt.borrow().entries.len() {
            return self.grow_table().await;
        }
        // All clusters of this block are free: the block takes the first one that the search has come to.
        let at = self.host_start(c)?;
        self.check_overlap(at, self.geo.cluster_size())?;
        let mut block = vec![0; self.geo.cluster_size() as usize];
        let own = self.geo.refcount_block_index(HostCluster(c)) as usize;
        self.geo.set_refcount(&mut block, own, 1);
        self.space.touched(c + 1);
        self.file.tell(DebugEvent::RefblockAlloc);
        self.file.tell(DebugEvent::RefblockAllocWrite);
        self.file.write(at.0, block.into()).await.map_err(|e| {
            e.context(format_args!("image '{}': writing a refcount block at {at}", self.name()))
        })?;
        self.space.took(c, 1);
        self.order.data_before_mapping();
        let mut rt = self.rt.borrow_mut();
        rt.entries[index as usize] = at.0;
        rt.dirty.insert(index as usize / 64);
        drop(rt);
        self.note_meta(at, self.geo.cluster_size(), Meta::RefcountBlock);
        Ok(())
    }

    /// A larger refcount table, behind everything that the present one can count. New blocks for it, the table itself,
    /// barrier, header, barrier; then the old table is free.
    pub(crate) async fn grow_table(self: &Rc<Self>) -> Result<()> {
        let g = self.geo;
        let (cluster, per_block) = (g.cluster_size(), g.refcount_block_entries());
        let (old_at, mut entries) = {
            let rt = self.rt.borrow();
            (rt.at, rt.entries.clone())
        };
        let old_clusters = entries.len() as u64 * 8 / cluster;
        let first_block = entries.len() as u64;
        let start = first_block * per_block;
        // Blocks count themselves and the table; the table has entries for the blocks.
        let (mut blocks, mut table) = (1, (old_clusters * 3).div_ceil(2).max(old_clusters + 1));
        loop {
            let b = (blocks + table).div_ceil(per_block);
            let t = table.max(((first_block + b) * 8).div_ceil(cluster));
            if (b, t) == (blocks, table) {
                break;
            }
            (blocks, table) = (b, t);
        }
        if table * cluster > MAX_REFCOUNT_TABLE_BYTES {
            return Err(BlockError::from_errno(BlockError::EFBIG).with_message(format!(
                "image '{}': the refcount table would exceed {MAX_REFCOUNT_TABLE_BYTES} bytes",
                self.name()
            )));
        }
        let at = self.host_start(start)?;
        self.check_overlap(at, (blocks + table) * cluster)?;
        self.host_start(start + blocks + table)?;
        let mut content = vec![0u8; (blocks * cluster) as usize];
        for i in 0..blocks + table {
            let block = &mut content[(i / per_block * cluster) as usize..][..cluster as usize];
            g.set_refcount(block, (i % per_block) as usize, 1);
        }
        entries.resize((table * cluster / 8) as usize, 0);
        for b in 0..blocks {
            entries[(first_block + b) as usize] = at.0 + b * cluster;
        }
        let mut data = Data::from(content);
        data.append(Data::from(entries.iter().flat_map(|e| e.to_be_bytes()).collect::<Vec<u8>>()));
        let table_at = HostOffset(at.0 + blocks * cluster);
        self.space.touched(start + blocks + table);
        self.file.tell(DebugEvent::ReftableGrow);
        self.file.tell(DebugEvent::RefblockAllocWriteBlocks);
        self.file.tell(DebugEvent::RefblockAllocWriteTable);
        self.file.write(at.0, data).await?;
        self.file.barrier().await?;
        self.file.tell(DebugEvent::RefblockAllocSwitchTable);
        // Blocks that were made meanwhile? None: making excludes itself. Entries are only added by making.
        let (before, old, new) = {
            let mut h = self.header.borrow_mut();
            let before = (h.refcount_table_offset, h.refcount_table_clusters);
            let old = h.patch_refcount_table();
            h.refcount_table_offset = table_at;
            h.refcount_table_clusters = table as u32;
            (before, old, h.patch_refcount_table())
        };
        if let Err(e) = self.point_header(new, old).await {
            // What was written for the new table is nobody's: only its own blocks counted it.
            let mut h = self.header.borrow_mut();
            (h.refcount_table_offset, h.refcount_table_clusters) = before;
            return Err(e);
        }
        {
            let mut rt = self.rt.borrow_mut();
            rt.at = table_at;
            rt.entries = entries;
            rt.dirty.clear();
        }
        self.space.took(start, blocks + table);
        self.meta.borrow_mut().remove(g.host_cluster(old_at).0, Meta::RefcountTable);
        self.note_meta(table_at, table * cluster, Meta::RefcountTable);
        for b in 0..blocks {
            self.note_meta(HostOffset(at.0 + b * cluster), cluster, Meta::RefcountBlock);
        }
        self.free_clusters(g.host_cluster(old_at).0, old_clusters, false);
        Ok(())
    }

    /// First byte of host cluster `c`.
    pub(crate) fn host_start(&self, c: u64) -> Result<HostOffset> {
        self.geo.host_start(HostCluster(c)).ok_or_else(|| {
            BlockError::from_errno(BlockError::EFBIG)
                .with_message(format!("image '{}': no room below 2^56 bytes", self.name()))
        })
    }
}
