//! Changing the length of an open image.
//!
//! No request runs meanwhile (the gates above are closed); commits may. What must stay true in every crash:
//! * Growing: everything the new length needs (a larger L1 table, zeroes where old data or the layer below would show,
//!   preallocated clusters) is durable before the length in the header changes. A larger L1 table is a new one: it is written and
//!   counted, barrier, then the header points to it, barrier, then the old one is given back.
//! * Shrinking: the length in the header changes first, durably; then what is mapped behind it is given back. If that
//!   is cut off, mappings are left behind the end: growing forgets them before it uses that part.

use crate::core::Core;
use crate::header::MAX_L1_BYTES;
use crate::overlap::Meta;
use crate::refcount::Counts;
use crate::types::{GuestOffset, HostCluster, HostOffset, L2Entry, SubclusterBitmap};
use block::{BlockError, Data, ErrorKind, Prealloc, ReqFlags, Result, Span};
use graph::DebugEvent;
use std::rc::Rc;

/// Largest length of a node in the reference.
const MAX_LENGTH: u64 = 0x7fff_ffff_c000_0000;
/// Tries to find adjoining free clusters behind the end of the file; each starts behind what was in the way.
const MAX_TRIES: usize = 64;

impl Core {
    /// Sets the length of the disk.
    pub(crate) async fn resize(self: &Rc<Self>, len: u64, prealloc: Prealloc) -> Result<()> {
        self.check_writable()?;
        let old = self.size.get();
        if len > MAX_LENGTH {
            let text = format!("offset({len}) exceeds maximum({MAX_LENGTH})");
            return Err(BlockError::from_errno(BlockError::EFBIG).with_message(text));
        }
        if !len.is_multiple_of(512) {
            return Err(BlockError::invalid("The new size must be a multiple of 512"));
        }
        if self.geo.version() < 3 && self.header.borrow().snapshot_count > 0 {
            return Err(BlockError::unsupported("Can't resize a v2 image which has snapshots"));
        }
        if len < old && prealloc != Prealloc::Off {
            return Err(BlockError::unsupported("Preallocation can only be used for growing images"));
        }
        match len.cmp(&old) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Less => self.shrink(len).await,
            std::cmp::Ordering::Greater => self.grow(old, len, prealloc).await,
        }
    }

    async fn grow(self: &Rc<Self>, old: u64, len: u64, prealloc: Prealloc) -> Result<()> {
        let needed = self.geo.l1_entries_for(len);
        if needed * 8 > MAX_L1_BYTES {
            let text = "Failed to grow the L1 table: File too large";
            return Err(BlockError::from_errno(BlockError::EFBIG).with_message(text));
        }
        self.forget_behind(old).await?;
        self.commit().await?;
        if needed > self.l1.borrow().entries.len() as u64 {
            self.grow_l1(needed).await?;
        }
        self.set_size(len);
        let filled = self.fill(old, len, prealloc).await;
        let done = match filled {
            Ok(()) => self.commit().await,
            Err(e) => Err(e),
        };
        if let Err(e) = done {
            self.set_size(old);
            return Err(e);
        }
        self.write_size(old, len).await
    }

    async fn shrink(self: &Rc<Self>, len: u64) -> Result<()> {
        let old = self.size.get();
        self.commit().await?;
        self.write_size(old, len).await?;
        self.set_size(len);
        self.forget_behind(len).await?;
        self.commit().await?;
        self.drop_tables_behind(len)?;
        self.commit().await?;
        match self.raw_data() {
            Some(data) => data.set_len(len).await,
            None => Ok(()),
        }
    }

    /// Brings the length to the header, durably.
    async fn write_size(self: &Rc<Self>, old: u64, len: u64) -> Result<()> {
        let (at, bytes) = {
            let mut h = self.header.borrow_mut();
            h.size = len;
            h.patch_size()
        };
        let turn = self.heading.turn(0).await;
        let mut written = self.file.write(at, Data::copy_from(&bytes)).await;
        if written.is_ok() {
            written = self.file.barrier().await;
        }
        drop(turn);
        if let Err(e) = written {
            // The file may have either length; both are right with what is mapped now.
            self.header.borrow_mut().size = old;
            self.set_size(old);
            return Err(e.context("Failed to update the image size"));
        }
        Ok(())
    }

    /// Forgets what is mapped in whole clusters behind `end`.
    async fn forget_behind(self: &Rc<Self>, end: u64) -> Result<()> {
        let first = end.next_multiple_of(self.geo.cluster_size());
        let mapped = self.l1.borrow().entries.len() as u64 * self.geo.l2_coverage();
        if first >= mapped {
            return Ok(());
        }
        self.forget(Span::between(first, mapped)).await
    }

    /// Gives back the (empty) tables that map only what is behind `end`.
    fn drop_tables_behind(self: &Rc<Self>, end: u64) -> Result<()> {
        let entries = self.l1.borrow().entries.len() as u64;
        for index in self.geo.l1_entries_for(end)..entries {
            let Some(e) = self.l1_entry(index)? else { continue };
            let c = self.geo.host_cluster(e.l2).0;
            self.l1.borrow_mut().set(index as usize, 0);
            self.meta.borrow_mut().remove(c, Meta::ActiveL2);
            self.free_clusters(c, 1, false);
        }
        Ok(())
    }

    /// The external data file, if it is to be a raw image by itself.
    fn raw_data(&self) -> Option<Rc<crate::child::Child>> {
        let raw = self.header.borrow().raw_data();
        self.data_file.clone().filter(|_| raw)
    }

    /// Makes `[old, len)` read as zeroes, and sets space aside.
    async fn fill(self: &Rc<Self>, old: u64, len: u64, prealloc: Prealloc) -> Result<()> {
        let cluster = self.geo.cluster_size();
        let may_unmap = ReqFlags { may_unmap: true, ..ReqFlags::NONE };
        // What a shrink left in the last cluster, or copying from below put there.
        let tail = Span::between(old, old.next_multiple_of(cluster).min(len));
        if !tail.is_empty() && self.may_hold_data(tail).await? {
            self.zero(tail, may_unmap).await?;
        }
        let below = self.backing.borrow().as_ref().map_or(0, |b| b.len());
        let shown = Span::between(tail.end().max(old), below.min(len));
        if !shown.is_empty() {
            self.zero(shown, ReqFlags::NONE).await?;
        }
        let prealloc = match (prealloc, self.raw_data()) {
            (Prealloc::Off, Some(_)) => Prealloc::Metadata,
            (p, _) => p,
        };
        if let Some(data) = self.data_file.as_ref().filter(|d| prealloc != Prealloc::Off && d.len() < len) {
            data.set_len(len).await?;
        }
        if prealloc == Prealloc::Off { Ok(()) } else { self.preallocate(old, len, prealloc).await }
    }

    /// Whether the cluster that `at` lies in may show anything but zeroes there.
    async fn may_hold_data(self: &Rc<Self>, at: Span) -> Result<bool> {
        if !self.no_backing() {
            return Ok(true);
        }
        let c = self.geo.guest_cluster(GuestOffset(at.start)).0;
        Ok(match self.loaded_slice(c).await? {
            None => false,
            Some(slot) => !matches!(self.entry(slot, c)?, L2Entry::Unallocated | L2Entry::Zero { .. }),
        })
    }

    /// Gives every cluster of `[old, len)` that has none a place that reads as zeroes.
    async fn preallocate(self: &Rc<Self>, old: u64, len: u64, prealloc: Prealloc) -> Result<()> {
        let bits = self.geo.cluster_bits();
        let end = self.geo.clusters_for(len);
        let mut c = old >> bits;
        while c < end {
            let slot = self.writable_slice(c).await?;
            if self.entry(slot, c)?.host().is_some() {
                c += 1;
                continue;
            }
            let was_zero = !matches!(self.entry(slot, c)?, L2Entry::Unallocated);
            if self.data_file.is_some() {
                let at = Span::new(c << bits, 1 << bits);
                self.set_space(at, prealloc).await?;
                let slot = self.writable_slice(c).await?;
                self.set_preallocated(slot, c, HostOffset(c << bits), was_zero);
                c += 1;
                continue;
            }
            let run = self.alloc_clusters((end - c).min(self.slice_end(c) - c)).await?;
            let at = Span::new(run.first << bits, run.n << bits);
            self.file.grow(at.end()).await?;
            if !run.virgin || prealloc != Prealloc::Metadata {
                self.set_space(at, prealloc).await?;
            }
            self.order.data_before_mapping();
            let mut used = 0;
            while used < run.n {
                let slot = self.writable_slice(c).await?;
                if self.entry(slot, c)?.host().is_some() {
                    break;
                }
                let host = self.host_start(run.first + used)?;
                self.set_preallocated(slot, c, host, was_zero);
                (used, c) = (used + 1, c + 1);
            }
            self.give_back(run.first + used, run.n - used);
            self.order.crowded_check(self);
        }
        Ok(())
    }

    /// Zeroes a place, and makes the host keep room for it if asked to.
    async fn set_space(&self, at: Span, prealloc: Prealloc) -> Result<()> {
        let file = self.data();
        match prealloc {
            Prealloc::Full => file.write(at.start, Data::zeroes(at.len as usize)).await,
            Prealloc::Falloc => file.zero(at, ReqFlags::NONE).await,
            Prealloc::Off | Prealloc::Metadata => {
                file.zero(at, ReqFlags { may_unmap: true, ..ReqFlags::NONE }).await
            }
        }
    }

    fn set_preallocated(&self, slot: crate::cache::SlotId, c: u64, host: HostOffset, was_zero: bool) {
        let entry = match (self.geo.extended_l2(), was_zero) {
            (false, false) => L2Entry::Data { host, copied: true },
            (false, true) => L2Entry::Zero { host: Some(host), copied: true },
            (true, _) => {
                let zero = was_zero || !self.no_backing();
                let bits = if zero { SubclusterBitmap::ALL_ZERO } else { SubclusterBitmap::default() };
                L2Entry::Subclusters { host: Some(host), copied: true, bits }
            }
        };
        self.set_entry(slot, c, entry);
    }

    /// An L1 table of `needed` entries. Everything else is in the file already.
    async fn grow_l1(self: &Rc<Self>, needed: u64) -> Result<()> {
        let (old_at, mut entries) = {
            let l1 = self.l1.borrow();
            (l1.at, l1.entries.clone())
        };
        let old_bytes = entries.len() as u64 * 8;
        let room = self.geo.clusters_for(old_bytes) * self.geo.cluster_size();
        entries.resize(needed as usize, 0);
        let (at, moved) = if needed * 8 <= room {
            // There is room behind the table in its own cluster; what is there now is nobody's.
            self.file.write(old_at.0 + old_bytes, Data::zeroes((needed * 8 - old_bytes) as usize)).await?;
            (old_at, None)
        } else {
            let n = self.geo.clusters_for(needed * 8);
            self.file.tell(DebugEvent::L1GrowAllocTable);
            let first = self.adjoining(n).await?;
            let at = self.host_start(first)?;
            let mut bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
            bytes.resize((n * self.geo.cluster_size()) as usize, 0);
            self.file.tell(DebugEvent::L1GrowWriteTable);
            if let Err(e) = self.file.write(at.0, bytes.into()).await {
                self.give_back(first, n);
                return Err(e.context("Failed to grow the L1 table"));
            }
            (at, Some((first, n)))
        };
        // Refcounts and the table are durable before the header says so.
        self.commit().await?;
        self.barriers().await?;
        self.file.tell(DebugEvent::L1GrowActivateTable);
        let (old_size, old, new) = {
            let mut h = self.header.borrow_mut();
            let (old_size, old) = (h.l1_size, h.patch_l1());
            h.l1_offset = at;
            h.l1_size = needed as u32;
            (old_size, old, h.patch_l1())
        };
        if let Err(e) = self.point_header(new, old).await {
            let mut h = self.header.borrow_mut();
            (h.l1_offset, h.l1_size) = (old_at, old_size);
            drop(h);
            if let Some((first, n)) = moved.filter(|_| !self.corrupt.get()) {
                self.give_back(first, n);
            }
            return Err(e);
        }
        {
            let mut l1 = self.l1.borrow_mut();
            l1.at = at;
            l1.entries = entries;
            l1.dirty.clear();
        }
        if moved.is_some() {
            let n = self.geo.clusters_for(old_bytes);
            let first = self.geo.host_cluster(old_at).0;
            if n > 0 {
                self.meta.borrow_mut().remove(first, Meta::ActiveL1);
                self.free_clusters(first, n, false);
            }
            self.note_meta(at, needed * 8, Meta::ActiveL1);
        }
        Ok(())
    }

    /// Takes `n` adjoining clusters, wherever refcount blocks come to lie.
    pub(crate) async fn adjoining(self: &Rc<Self>, n: u64) -> Result<u64> {
        if n == 1 {
            return Ok(self.alloc_clusters(1).await?.first);
        }
        let per_block = self.geo.refcount_block_entries();
        let mut start = self.space.end();
        for _ in 0..MAX_TRIES {
            // Room for the blocks that may have to be made on the way, and for the blocks that count those.
            let blocks = n.div_ceil(per_block) + 1;
            start = start.max(self.space.end() + 2 * blocks + 2);
            for index in start / per_block..=(start + n - 1) / per_block {
                self.ensure_block(index).await?;
            }
            if self.space.end() > start {
                start = self.space.end();
                continue;
            }
            match self.take_range(start, n).await? {
                None => return Ok(start),
                Some(in_the_way) => start = in_the_way + 1,
            }
        }
        Err(BlockError::new(ErrorKind::NoSpace, format!("no {n} adjoining free clusters in the image file")))
    }

    /// Makes the refcount block number `index`, in some other place than the clusters it counts.
    async fn ensure_block(self: &Rc<Self>, index: u64) -> Result<()> {
        loop {
            let first = index * self.geo.refcount_block_entries();
            match self.counts(first)? {
                Counts::Here(_) => return Ok(()),
                Counts::Load => self.load_counts(first, false).await?,
                Counts::NoBlock => {
                    if index as usize >= self.rt.borrow().entries.len() {
                        self.grow_table().await?;
                        continue;
                    }
                    let run = self.alloc_clusters(1).await?;
                    let at = self.host_start(run.first)?;
                    self.file.write(at.0, Data::zeroes(self.geo.cluster_size() as usize)).await?;
                    // Other blocks count themselves; this one is counted elsewhere, durably before the table names it.
                    self.commit().await?;
                    if !matches!(self.counts(first)?, Counts::NoBlock) {
                        self.give_back(run.first, 1);
                        continue;
                    }
                    let mut rt = self.rt.borrow_mut();
                    rt.entries[index as usize] = at.0;
                    rt.dirty.insert(index as usize / 64);
                    drop(rt);
                    self.note_meta(at, self.geo.cluster_size(), Meta::RefcountBlock);
                }
            }
        }
    }

    /// Takes the clusters from `start` on if all are free; else one that is not.
    async fn take_range(self: &Rc<Self>, start: u64, n: u64) -> Result<Option<u64>> {
        for c in start..start + n {
            loop {
                match self.counts(c)? {
                    Counts::Here(slot) if self.refcount(slot, c) > 0 => {
                        self.give_back(start, c - start);
                        return Ok(Some(c));
                    }
                    Counts::Here(slot) => {
                        self.set_refcount(slot, c, 1);
                        break;
                    }
                    Counts::Load => self.load_counts(c, false).await?,
                    Counts::NoBlock => {
                        self.ensure_block(self.geo.refcount_table_index(HostCluster(c))).await?;
                    }
                }
            }
        }
        self.space.took(start, n);
        Ok(None)
    }
}
