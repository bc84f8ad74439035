//! Storing persistent dirty bitmaps, and removing one.
//!
//! Everything new (bits, tables, a whole new directory) goes to free clusters first: bits, tables and directory, counts, barrier;
//! then the header names the new directory (one sector decides); barrier; then what the old directory named is given
//! back. What must stay true in every crash: the header names the old directory, whose entries are marked in use since the
//! image was opened for writing, or the new one, complete.

use crate::bitmaps::{
    ALL_ONES, AUTO, Entry, IN_USE, bits_bytes, encode_directory, table_entries, table_place,
};
use crate::core::Core;
use crate::header::BitmapDirectory;
use crate::overlap::Meta;
use crate::types::HostOffset;
use bitmap::{Bitmap, DirtyBitmap};
use block::{BlockError, Data, Result, Span};
use std::rc::Rc;

/// Clusters taken, as (first, number).
type Runs = Vec<(u64, u64)>;

impl Core {
    /// Brings all persistent bitmaps to the file, marked as good. No request is running.
    pub(crate) async fn store_bitmaps(self: &Rc<Self>) -> Result<()> {
        let bitmaps = self.bitmaps.persistent();
        let old = self.bitmaps.directory.borrow().clone();
        if self.corrupt.get() || !self.writable.get() || bitmaps.is_empty() && old.is_empty() {
            return Ok(());
        }
        let core = self.clone();
        let stored = self.detached("qcow2-bitmaps", async move { core.store_now(&bitmaps, &old).await });
        stored.await.map_err(|e| {
            e.context(format_args!("image '{}': persistent bitmaps could not be stored", self.name()))
        })
    }

    async fn store_now(self: &Rc<Self>, bitmaps: &[Rc<DirtyBitmap>], old: &[Entry]) -> Result<()> {
        let _turn = self.bitmaps.changing.turn(0).await;
        let mut runs = Runs::new();
        let (mut new, mut kept) = (Vec::new(), Vec::new());
        // As the reference: those that are there keep their order, new ones come behind them, newest first.
        let number = |b: &Rc<DirtyBitmap>| old.iter().position(|e| b.name() == Some(&e.name));
        let mut ordered: Vec<_> = bitmaps.iter().rev().collect();
        ordered.sort_by_key(|b| number(b).unwrap_or(old.len()));
        for b in ordered {
            let name = b.name().unwrap_or_default();
            let there = old.iter().find(|e| e.name == name);
            if b.inconsistent() {
                // What it had stays, marked as it is.
                new.extend(there.cloned());
                kept.extend(there.map(|e| e.table));
                continue;
            }
            match self.store_one(b, &mut runs).await {
                Ok(entry) => new.push(entry),
                Err(e) => {
                    runs.iter().for_each(|(first, n)| self.give_back(*first, *n));
                    return Err(e.context(format_args!("bitmap '{name}'")));
                }
            }
        }
        let gone: Vec<Entry> = old.iter().filter(|e| !kept.contains(&e.table)).cloned().collect();
        self.switch_directory(new, runs, &gone).await
    }

    /// Removes a bitmap from the file, durably.
    pub(crate) async fn forget_bitmap(self: &Rc<Self>, name: &str) -> Result<()> {
        if !self.bitmaps.directory.borrow().iter().any(|e| e.name == name) {
            return Ok(());
        }
        self.check_writable()?;
        let (core, name) = (self.clone(), name.to_owned());
        self.detached("qcow2-bitmaps", async move {
            let _turn = core.bitmaps.changing.turn(0).await;
            let all = core.bitmaps.directory.borrow().clone();
            let (gone, left) = all.into_iter().partition::<Vec<_>, _>(|e| e.name == name);
            core.switch_directory(left, Runs::new(), &gone).await
        })
        .await
    }

    /// The header names a directory of `new` from now on; `runs` were taken for it. What `gone` had is given back.
    async fn switch_directory(
        self: &Rc<Self>,
        new: Vec<Entry>,
        mut runs: Runs,
        gone: &[Entry],
    ) -> Result<()> {
        let old_place = self.header.borrow().bitmaps().ok().flatten();
        let mut freed = Runs::new();
        for e in gone {
            self.clusters_of(e, &mut freed).await;
        }
        let placed = self.place_directory(&new, &mut runs).await;
        let switched = match placed {
            Ok(place) => self.rewrite_header(move |h| h.set_bitmaps(place)).await,
            Err(e) => Err(e),
        };
        let now = self.header.borrow().bitmaps().ok().flatten();
        if now == old_place {
            // The file has the old directory still.
            if switched.is_err() {
                runs.iter().for_each(|(first, n)| self.give_back(*first, *n));
            }
            return switched;
        }
        *self.bitmaps.directory.borrow_mut() = new;
        if let Some(place) = now {
            self.note_meta(place.at, place.len, Meta::BitmapDirectory);
        }
        if let Some(old) = old_place {
            let first = self.geo.host_cluster(old.at).0;
            self.meta.borrow_mut().remove(first, Meta::BitmapDirectory);
            freed.push((first, self.geo.clusters_for(old.len)));
        }
        // Only behind the header's barrier.
        switched?;
        freed.iter().for_each(|(first, n)| self.free_clusters(*first, *n, false));
        Ok(())
    }

    /// Writes a directory to free space; it, what it names and all counts are durable after.
    async fn place_directory(
        self: &Rc<Self>,
        entries: &[Entry],
        runs: &mut Runs,
    ) -> Result<Option<BitmapDirectory>> {
        let place = match entries.is_empty() {
            true => None,
            false => {
                let bytes = encode_directory(entries);
                let len = bytes.len() as u64;
                let at = self.bitmap_space(bytes, runs).await?;
                Some(BitmapDirectory { count: entries.len() as u32, len, at })
            }
        };
        self.order.data_before_mapping();
        self.commit().await?;
        self.barriers().await?;
        Ok(place)
    }

    /// Writes `bytes` to adjoining free clusters.
    async fn bitmap_space(self: &Rc<Self>, mut bytes: Vec<u8>, runs: &mut Runs) -> Result<HostOffset> {
        let n = self.geo.clusters_for(bytes.len() as u64);
        let run = self.alloc_clusters(n).await?;
        let first = if run.n == n {
            run.first
        } else {
            self.give_back(run.first, run.n);
            self.adjoining(n).await?
        };
        runs.push((first, n));
        bytes.resize((n * self.geo.cluster_size()) as usize, 0);
        let at = self.host_start(first)?;
        self.file.write(at.0, Data::from(bytes)).await?;
        Ok(at)
    }

    /// Writes bits and table of a bitmap.
    async fn store_one(self: &Rc<Self>, bitmap: &DirtyBitmap, runs: &mut Runs) -> Result<Entry> {
        let bits = bitmap.bits().clone();
        let granularity_bits = bits.granularity().trailing_zeros() as u8;
        let entries = table_entries(&self.geo, bits.len(), granularity_bits);
        if bits_bytes(bits.len(), granularity_bits) > crate::bitmaps::MAX_BITS_BYTES {
            return Err(BlockError::invalid("too large to be stored"));
        }
        let table = self.store_bits(&bits, entries, runs).await?;
        let bytes = table.iter().flat_map(|raw| raw.to_be_bytes()).collect();
        let table = self.bitmap_space(bytes, runs).await?;
        // One that is still in use by a job lacks what its successor has.
        let in_use = if bitmap.frozen() { IN_USE } else { 0 };
        let auto = if bitmap.enabled() { AUTO } else { 0 };
        let name = bitmap.name().unwrap_or_default().to_owned();
        Ok(Entry { table, entries: entries as u32, flags: auto | in_use, granularity_bits, name })
    }

    async fn store_bits(self: &Rc<Self>, bits: &Bitmap, entries: u64, runs: &mut Runs) -> Result<Vec<u64>> {
        let cluster = self.geo.cluster_size();
        let per_entry = (cluster * 8).saturating_mul(bits.granularity());
        let mut table = vec![0; entries as usize];
        let mut from = 0;
        while let Some(dirty) = bits.next_dirty(from) {
            let i = dirty / per_entry;
            let end = (i + 1).saturating_mul(per_entry);
            let whole = end <= bits.len() && bits.next_clean(i * per_entry).is_none_or(|c| c >= end);
            table[i as usize] = if whole {
                ALL_ONES
            } else {
                let mut out = vec![0; cluster as usize];
                bits.export_bits(i * cluster, &mut out);
                self.bitmap_space(out, runs).await?.0
            };
            from = end;
        }
        Ok(table)
    }

    /// The clusters of a stored bitmap. One whose table cannot be read leaks.
    async fn clusters_of(&self, e: &Entry, out: &mut Runs) {
        let bits = self.geo.cluster_bits();
        out.push((e.table.0 >> bits, self.geo.clusters_for(u64::from(e.entries) * 8)));
        for raw in self.read_bitmap_table(e).await.unwrap_or_default() {
            if let Ok(Some(at)) = table_place(&self.geo, raw)
                && Span::new(at.0, self.geo.cluster_size()).end() <= self.file.len()
            {
                out.push((at.0 >> bits, 1));
            }
        }
    }
}
