//! Following every reference of an image.

use super::Report;
use super::refs::{DISK_ONE, OVERLAP, Refs, SEEN_COPIED, SEEN_SHARED, Use};
use crate::header::{Crypt, Extension, Header, MAX_L1_BYTES};
use crate::storage::Storage;
use crate::types::{COMPRESSED, COPIED, EntryFault, Geometry, HostOffset, L2Entry};
use block::{Result, Span};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of snapshots' L1 tables read in all: tables used by several snapshots are read once, so a sound image has no more
/// of them than it has bytes; a hostile one would make the check read for hours.
const MAX_SNAPSHOT_L1_BYTES: u64 = 1 << 30;
/// Largest snapshot table (the reference's limit: 65536 entries of 1 KiB).
const MAX_SNAPSHOT_TABLE: u64 = 65_536 * 1024;
/// Bits 9 to 55.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An L1 table: where, how many entries.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct L1Place {
    pub(super) at: u64,
    pub(super) entries: u32,
}

/// How a table of guest mappings is used.
#[derive(Clone, Copy, Default)]
pub(super) struct L2Use {
    /// References in all.
    pub(super) times: u64,
    /// Of these, some are from the active L1 table.
    pub(super) active: bool,
}

/// All that the walk found.
pub(super) struct Walk<'s, S> {
    pub(super) storage: &'s S,
    pub(super) header: Header,
    pub(super) g: Geometry,
    pub(super) report: Report,
    pub(super) refs: Refs,
    /// Every L1 table once; the active one first.
    pub(super) l1s: Vec<L1Place>,
    /// Every L2 table once, in the order found.
    pub(super) l2s: Vec<(HostOffset, L2Use)>,
    /// Refcount blocks that can be used, by table index.
    pub(super) blocks: BTreeMap<u64, HostOffset>,
    /// The refcount structures cannot be mended in place.
    pub(super) rebuild: bool,
    /// Some reference could not be followed, so what lies behind it looks leaked.
    pub(super) lost: bool,
    /// (cluster, refcount in the image, references).
    pub(super) wrong: Vec<(u64, u64, u64)>,
    /// The bitmaps' directory, tables or clusters cannot be right.
    pub(super) bitmaps_bad: bool,
    /// Snapshots whose entry in the table could be read.
    pub(super) snapshots_read: u32,
    /// Clusters counted for the refcount structures themselves, one entry a reference.
    pub(super) structures: Vec<u64>,
    file_len: u64,
}

/// Walks the whole image.
pub(super) async fn inspect<S: Storage>(storage: &S) -> Result<Walk<'_, S>> {
    let header = super::read_header(storage).await?;
    let g = header.geometry;
    let mut w = Walk {
        storage,
        g,
        report: Report { total_clusters: g.clusters_for(header.size), ..Report::default() },
        refs: Refs::default(),
        l1s: Vec::new(),
        l2s: Vec::new(),
        blocks: BTreeMap::new(),
        rebuild: false,
        lost: false,
        wrong: Vec::new(),
        bitmaps_bad: false,
        snapshots_read: 0,
        structures: Vec::new(),
        // The reference counts whole sectors.
        file_len: storage.len().next_multiple_of(512),
        header,
    };
    w.add_span(Use::Header, 0, g.cluster_size(), 1);
    w.tables().await?;
    let before = w.report.corruptions + w.report.check_errors;
    w.bitmaps().await;
    w.bitmaps_bad = w.report.corruptions + w.report.check_errors > before;
    w.luks();
    w.refcount_structures().await;
    w.compare().await;
    Ok(w)
}

impl<S: Storage> Walk<'_, S> {
    /// Counts the clusters that `[at, at + len)` touches. `false` if the span does not lie in the file.
    fn add_span(&mut self, what: Use, at: u64, len: u64, times: u64) -> bool {
        if len == 0 {
            return true;
        }
        // The file may end inside the last cluster; the reference lets a whole cluster be missing, and so do we: a cluster
        // whose data never was written reads as zeroes.
        let fits =
            at.checked_add(len).is_some_and(|end| end.saturating_sub(self.file_len) <= self.g.cluster_size());
        if !fits {
            self.report.corrupt(format_args!("{what:?} at {at:#x}+{len:#x} lies past the end of the file"));
            return false;
        }
        for cluster in at >> self.g.cluster_bits()..=(at + len - 1) >> self.g.cluster_bits() {
            self.refs.add(cluster, times, what);
            if matches!(what, Use::RefcountTable | Use::RefcountBlock) {
                self.structures.push(cluster);
            }
        }
        true
    }

    async fn load(&mut self, what: Use, at: u64, len: u64) -> Option<Cow<'_, [u8]>> {
        match self.storage.read(Span::new(at, len)).await {
            Ok(b) => Some(b),
            Err(e) => {
                self.report.unreadable(format_args!("{what:?} at {at:#x}+{len:#x}: {e}"));
                self.lost = true;
                None
            }
        }
    }

    /// The active L1 table, the snapshots' and all L2 tables.
    async fn tables(&mut self) -> Result<()> {
        let active = L1Place { at: self.header.l1_offset.0, entries: self.header.l1_size };
        let mut order = Vec::new();
        let mut uses = BTreeMap::<u64, L2Use>::new();
        self.l1(active, 1, true, &mut order, &mut uses).await;
        let mut budget = MAX_SNAPSHOT_L1_BYTES;
        for (place, times) in self.snapshots().await {
            let bytes = u64::from(place.entries) * 8;
            if bytes > budget {
                self.report.unreadable(format_args!(
                    "the snapshots' L1 tables have more than {MAX_SNAPSHOT_L1_BYTES} bytes"
                ));
                self.lost = true;
                break;
            }
            budget -= bytes;
            self.l1(place, times, false, &mut order, &mut uses).await;
        }
        for at in order {
            let Some(&used) = uses.get(&at) else { continue };
            self.l2s.push((HostOffset(at), used));
            self.l2(HostOffset(at), used).await;
        }
        Ok(())
    }

    async fn l1(
        &mut self,
        place: L1Place,
        times: u64,
        active: bool,
        order: &mut Vec<u64>,
        uses: &mut BTreeMap<u64, L2Use>,
    ) {
        let what = if active { Use::L1 } else { Use::Snapshots };
        self.l1s.push(place);
        let len = u64::from(place.entries) * 8;
        if self.g.in_cluster(place.at) != 0 {
            self.report.corrupt(format_args!("an L1 table starts at {:#x}, inside a cluster", place.at));
            self.lost = true;
            return;
        }
        if !self.add_span(what, place.at, len, times) {
            self.lost = true;
            return;
        }
        let (g, file_len) = (self.g, self.file_len);
        let Some(table) = self.load(what, place.at, len).await else { return };
        let entries: Vec<u64> = words(&table).filter(|e| *e != 0).collect();
        drop(table);
        for raw in entries {
            match g.l1_entry(raw) {
                Err(EntryFault::Reserved(bits)) => {
                    self.report.corrupt(format_args!("L1 entry {raw:#x}: reserved bits {bits:#x} are set"));
                }
                Err(fault) => self.report.corrupt(format_args!("L1 entry {raw:#x}: {fault}")),
                Ok(_) => (),
            }
            let at = raw & OFFSET;
            if at == 0 {
                if raw == COPIED {
                    self.report.corrupt(format_args!("L1 entry {raw:#x}: COPIED is set, without a table"));
                }
                continue;
            }
            if g.in_cluster(at) != 0 {
                self.lost = true;
                continue;
            }
            let seen = uses.contains_key(&at);
            if at.saturating_add(g.cluster_size()).saturating_sub(file_len) > g.cluster_size() {
                self.report
                    .corrupt(format_args!("L1 entry {raw:#x}: the L2 table lies past the end of the file"));
                self.lost = true;
                continue;
            }
            let used = uses.entry(at).or_default();
            used.times += times;
            used.active |= active;
            if !seen {
                order.push(at);
            }
            if active {
                let flag = if raw & COPIED != 0 { SEEN_COPIED } else { SEEN_SHARED };
                self.refs.flag(at >> g.cluster_bits(), flag);
            }
        }
    }

    async fn l2(&mut self, at: HostOffset, used: L2Use) {
        let g = self.g;
        self.refs.add(at.0 >> g.cluster_bits(), used.times, Use::L2);
        let Some(table) = self.load(Use::L2, at.0, g.cluster_size()).await else { return };
        let step = if g.extended_l2() { 2 } else { 1 };
        let entries: Vec<(u64, u64)> = {
            let all = words(&table);
            if step == 1 {
                all.filter(|e| *e != 0).map(|e| (e, 0)).collect()
            } else {
                let flat: Vec<u64> = all.collect();
                flat.chunks_exact(2).map(|c| (c[0], c[1])).filter(|c| *c != (0, 0)).collect()
            }
        };
        drop(table);
        let mut next = None;
        for (raw, bits) in entries {
            self.l2_entry(raw, bits, used, &mut next);
        }
    }

    fn l2_entry(&mut self, raw: u64, bits: u64, used: L2Use, next: &mut Option<u64>) {
        let g = self.g;
        let decoded = g.l2_entry(raw, bits);
        if let Err(fault) = &decoded {
            self.report.corrupt(format_args!("L2 entry {raw:#x}: {fault}"));
        }
        if raw & COMPRESSED != 0 {
            if g.data_file() {
                self.report
                    .corrupt(format_args!("L2 entry {raw:#x}: compressed, in an image with a data file"));
                return;
            }
            if used.active {
                self.report.compressed_clusters += 1;
                self.report.allocated_clusters += 1;
                // Compressed clusters follow nothing by their nature.
                self.report.fragmented_clusters += 1;
            }
            let c = g.compressed(raw);
            let start = c.at.0 & !511;
            self.add_span(Use::Data, start, c.at.0 + c.len - start, used.times);
            return;
        }
        let at = raw & OFFSET;
        let has_place = at != 0
            || matches!(decoded, Ok(L2Entry::Data { .. } | L2Entry::Subclusters { host: Some(_), .. }));
        if !has_place {
            return;
        }
        if used.active {
            self.report.allocated_clusters += 1;
            if next.is_some_and(|n| n != at) {
                self.report.fragmented_clusters += 1;
            }
            *next = Some(at + g.cluster_size());
        }
        if g.data_file() {
            if used.active && raw & COPIED == 0 {
                self.report.corrupt(format_args!(
                    "L2 entry {raw:#x}: COPIED is not set, in an image with a data file"
                ));
            }
            return;
        }
        if self.add_span(Use::Data, at, g.cluster_size(), used.times) && used.active && g.in_cluster(at) == 0
        {
            let flag = if raw & COPIED != 0 { SEEN_COPIED } else { SEEN_SHARED };
            self.refs.flag(at >> g.cluster_bits(), flag);
        }
    }

    /// The snapshot table: the L1 tables in it, each once with the number of its users.
    async fn snapshots(&mut self) -> Vec<(L1Place, u64)> {
        let mut out: BTreeMap<L1Place, u64> = BTreeMap::new();
        let (count, start) = (self.header.snapshot_count, self.header.snapshots_offset.0);
        let mut at = start;
        for i in 0..count {
            let Some(head) = self.load(Use::Snapshots, at, 40).await else { break };
            let (l1, entries) = (be64(&head, 0), be32(&head, 8));
            let names = u64::from(be16(&head, 12)) + u64::from(be16(&head, 14));
            let len = (40 + u64::from(be32(&head, 36)) + names).next_multiple_of(8);
            drop(head);
            at += len;
            if at - start > MAX_SNAPSHOT_TABLE || at > self.file_len {
                self.report.corrupt(format_args!(
                    "snapshot {i}: the snapshot table is too long or past the end of the file"
                ));
                self.lost = true;
                break;
            }
            self.snapshots_read = i + 1;
            if u64::from(entries) * 8 > MAX_L1_BYTES {
                self.report
                    .corrupt(format_args!("snapshot {i}: an L1 table of {entries} entries is too large"));
                self.lost = true;
                continue;
            }
            *out.entry(L1Place { at: l1, entries }).or_insert(0) += 1;
        }
        if count > 0 && at > start {
            self.add_span(Use::Snapshots, start, at - start, 1);
        }
        out.into_iter().collect()
    }

    /// The bitmap directory, the bitmaps' tables and their clusters.
    async fn bitmaps(&mut self) {
        let directory = match self.header.bitmaps() {
            Ok(Some(d)) => d,
            Ok(None) => return,
            Err(e) => return self.report.corrupt(format_args!("{e}")),
        };
        if !self.add_span(Use::Bitmaps, directory.at.0, directory.len, 1) {
            return;
        }
        let Some(bytes) = self.load(Use::Bitmaps, directory.at.0, directory.len).await else { return };
        let bytes = bytes.into_owned();
        let mut at = 0;
        let mut tables = BTreeSet::new();
        for i in 0..directory.count {
            let Some(head) = bytes.get(at..at + 24) else {
                return self.report.corrupt(format_args!("bitmap {i}: the directory ends before it"));
            };
            let (table, entries) = (be64(head, 0), be32(head, 8));
            at += (24 + be32(head, 20) as usize + usize::from(be16(head, 18))).next_multiple_of(8);
            // As many entries as a bitmap of the largest disk at the finest granularity would need, in the reference.
            if table == 0 || self.g.in_cluster(table) != 0 || u64::from(entries) * 8 > MAX_L1_BYTES * 8 {
                self.report.corrupt(format_args!(
                    "bitmap {i}: its table ({table:#x}, {entries} entries) is invalid"
                ));
                continue;
            }
            if !self.add_span(Use::Bitmaps, table, u64::from(entries) * 8, 1) || !tables.insert(table) {
                continue;
            }
            let Some(entries) = self.load(Use::Bitmaps, table, u64::from(entries) * 8).await else {
                continue;
            };
            let entries: Vec<u64> = words(&entries).filter(|e| *e > 1).collect();
            for raw in entries {
                let place = raw & OFFSET;
                if raw & !OFFSET & !1 != 0 || raw & 1 != 0 && place != 0 || self.g.in_cluster(place) != 0 {
                    self.report.corrupt(format_args!("bitmap {i}: table entry {raw:#x} is invalid"));
                } else {
                    self.add_span(Use::Bitmaps, place, self.g.cluster_size(), 1);
                }
            }
        }
    }

    /// The LUKS header's clusters.
    fn luks(&mut self) {
        if self.header.crypt != Crypt::Luks {
            return;
        }
        let place = self.header.extensions.iter().find_map(|e| match e {
            Extension::Crypto { at, len } => Some((at.0, *len)),
            _ => None,
        });
        // Sixteen key slots with their stripes stay far below this.
        const MAX_LUKS_HEADER: u64 = 16 << 20;
        match place {
            Some((at, len)) if len <= MAX_LUKS_HEADER => {
                self.add_span(Use::Header, at, len, 1);
            }
            Some((at, len)) => {
                self.report.corrupt(format_args!("a LUKS header of {len} bytes at {at:#x} is too long"))
            }
            None => (),
        }
    }

    /// The refcount table and its blocks.
    async fn refcount_structures(&mut self) {
        let g = self.g;
        let at = self.header.refcount_table_offset.0;
        let len = u64::from(self.header.refcount_table_clusters) * g.cluster_size();
        if !self.add_span(Use::RefcountTable, at, len, 1) {
            self.rebuild = true;
            return;
        }
        let Some(table) = self.load(Use::RefcountTable, at, len).await else {
            self.rebuild = true;
            return;
        };
        let entries: Vec<(u64, u64)> =
            words(&table).enumerate().filter(|(_, e)| *e != 0).map(|(i, e)| (i as u64, e)).collect();
        drop(table);
        for &(i, raw) in &entries {
            match g.refcount_table_entry(raw) {
                Ok(Some(block)) => {
                    if self.add_span(Use::RefcountBlock, block.0, g.cluster_size(), 1) {
                        self.blocks.insert(i, block);
                    } else {
                        self.rebuild = true;
                    }
                }
                Ok(None) => (),
                Err(fault) => {
                    self.report.corrupt(format_args!("refcount table entry {i}: {fault}"));
                    self.rebuild = true;
                }
            }
        }
        // A block in two places (or lying on something else) cannot count for both.
        let mut seen = BTreeSet::new();
        let mut twice = Vec::new();
        for (&i, &block) in &self.blocks {
            if !seen.insert(block) {
                twice.push(i);
            }
            if self.refs.cell(block.0 >> g.cluster_bits()).has(OVERLAP) {
                self.rebuild = true;
            }
        }
        for i in twice {
            self.report.corrupt(format_args!("refcount table entry {i}: its block is another entry's, too"));
            self.blocks.remove(&i);
        }
    }

    /// Compares refcounts with references.
    async fn compare(&mut self) {
        let g = self.g;
        let clusters = g.clusters_for(self.file_len).max(self.refs.highest() + 1);
        let covered = |c: u64| c >> g.refcount_block_bits();
        let mut indexes: BTreeSet<u64> =
            self.blocks.keys().copied().filter(|i| *i <= covered(clusters - 1)).collect();
        for chunk in self.refs.chunk_numbers() {
            let first = chunk * super::refs::CHUNK;
            let last = (first + super::refs::CHUNK - 1).min(clusters - 1);
            indexes.extend(covered(first)..=covered(last));
        }
        let mut end = 0;
        for index in indexes {
            let first = index << g.refcount_block_bits();
            let count = g.refcount_block_entries().min(clusters - first);
            let block = self.blocks.get(&index).copied();
            let loaded = match block {
                Some(at) => match self.storage.read(Span::new(at.0, g.cluster_size())).await {
                    Ok(b) => b,
                    Err(e) => {
                        self.report.unreadable(format_args!("refcount block at {at}: {e}"));
                        self.rebuild = true;
                        continue;
                    }
                },
                None => Cow::Borrowed(&[][..]),
            };
            if loaded.iter().all(|b| *b == 0) && !self.refs.any_near(first, first + count) {
                continue;
            }
            for i in 0..count {
                let disk = g.refcount(&loaded, i as usize).unwrap_or(0);
                let cluster = first + i;
                let found = self.refs.get(cluster);
                if disk != 0 || found != 0 {
                    end = end.max(cluster + 1);
                    self.judge(cluster, disk, found, block.is_some());
                }
            }
        }
        self.report.image_end_offset = end << g.cluster_bits();
    }

    fn judge(&mut self, cluster: u64, disk: u64, found: u64, has_block: bool) {
        let offset = cluster << self.g.cluster_bits();
        if disk == 1 {
            self.refs.flag(cluster, DISK_ONE);
        }
        if disk > found {
            self.report
                .leak(format_args!("cluster {cluster} at {offset:#x}: refcount {disk}, references {found}"));
        } else if disk < found {
            self.report.corrupt(format_args!(
                "cluster {cluster} at {offset:#x}: refcount {disk}, references {found}"
            ));
            self.rebuild |= !has_block || found > self.g.refcount_max();
        }
        if disk != found {
            self.wrong.push((cluster, disk, found));
        }
        let cell = self.refs.cell(cluster);
        if cell.has(OVERLAP) && disk >= found {
            self.report
                .corrupt(format_args!("cluster {cluster} at {offset:#x}: metadata lies on something else"));
        }
        self.bitmaps_bad |= cell.has(OVERLAP) && cell.used_for(Use::Bitmaps);
        if cell.has(OVERLAP) && (cell.used_for(Use::RefcountTable) || cell.used_for(Use::RefcountBlock)) {
            // Refcounts can be counted anew, elsewhere; what lies on them cannot.
            self.rebuild = true;
        }
        let lies = if disk == 1 { SEEN_SHARED } else { SEEN_COPIED };
        if cell.has(lies) {
            self.report.idle_flags += u64::from(found == 1);
            let flag = if disk == 1 { "is not" } else { "is" };
            self.report.corrupt(format_args!(
                "cluster {cluster} at {offset:#x}: COPIED {flag} set, with refcount {disk}"
            ));
        }
    }
}

/// Big-endian 64-bit words.
pub(super) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b))
}

fn be64(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}
fn be32(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}
fn be16(b: &[u8], at: usize) -> u16 {
    b.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_be_bytes)
}
