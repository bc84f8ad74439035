//! Repair: references first, then refcounts, then COPIED flags, then the marks in the header.

use super::refs::{OVERLAP, Use};
use super::walk::{Walk, inspect, words};
use super::{Fix, Report};
use crate::header::{
    AUTOCLEAR_BITMAPS, INCOMPAT_CORRUPT, INCOMPAT_DIRTY, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES,
};
use crate::storage::Storage;
use crate::types::{COMPRESSED, COPIED, EntryFault, HostCluster, HostOffset};
use block::{BlockError, ErrorKind, Result, Span};
use std::collections::{BTreeMap, BTreeSet};

/// Bits 9 to 55 of an entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Repairs an image and says what was and what is.
pub(super) async fn repair<S: Storage>(storage: &S, fix: Fix) -> Result<Report> {
    let first = inspect(storage).await?;
    let before = first.report.clone();
    let mut walk = first;
    if fix == Fix::All && before.corruptions > 0 {
        if mend_header(&mut walk).await? {
            storage.barrier().await?;
            walk = inspect(storage).await?;
        }
        if mend_entries(&walk).await? {
            storage.barrier().await?;
        }
        walk = inspect(storage).await?;
    }
    if fix == Fix::All && walk.rebuild {
        rebuild_refcounts(&walk).await?;
    } else if fix == Fix::All || !walk.lost && walk.report.check_errors == 0 {
        write_refcounts(&walk, fix).await?;
    }
    // Where only leaks were, a count that went down to one makes its flag wrong, and setting that endangers nothing.
    let only_leaks = before.corruptions == 0 && before.check_errors == 0 && before.leaks > 0;
    if fix == Fix::All || only_leaks {
        storage.barrier().await?;
        walk = inspect(storage).await?;
        if mend_copied(&walk).await? {
            storage.barrier().await?;
        }
    }
    let mut after = inspect(storage).await?;
    if after.report.corruptions == 0 && after.report.check_errors == 0 {
        let marks = INCOMPAT_DIRTY | INCOMPAT_CORRUPT;
        if after.header.incompatible & marks != 0 {
            storage.barrier().await?;
            after.header.incompatible &= !marks;
            let (at, bytes) = after.header.patch_features();
            storage.write(at, &bytes).await?;
        }
    }
    storage.barrier().await?;
    let mut report = after.report;
    report.corruptions_fixed = before.corruptions.saturating_sub(report.corruptions);
    report.leaks_fixed = before.leaks.saturating_sub(report.leaks);
    let mut messages = before.messages;
    messages.truncate(super::MAX_MESSAGES.saturating_sub(report.messages.len()));
    messages.append(&mut report.messages);
    report.messages = messages;
    Ok(report)
}

/// Bitmaps that cannot be right are marked as not up to date (that is what the mark is for; nothing but a full copy is
/// lost with them); a snapshot table that cannot be read to its end, ends where it can.
async fn mend_header<S: Storage>(w: &mut Walk<'_, S>) -> Result<bool> {
    let mut wrote = false;
    // An L1 table that was cut off reads as zeroes where it is not; the file is made long enough to hold it, lest something
    // else comes to lie there.
    let end = w.header.l1_offset.0 + u64::from(w.header.l1_size) * 8;
    if end > w.storage.len() && end - w.storage.len() <= MAX_L1_BYTES {
        let end = end.next_multiple_of(w.g.cluster_size());
        w.storage.resize(end, block::Prealloc::Off).await?;
        wrote = true;
    }
    if w.bitmaps_bad && w.g.version() >= 3 {
        w.header.autoclear &= !AUTOCLEAR_BITMAPS;
        let (at, bytes) = w.header.patch_features();
        w.storage.write(at, &bytes).await?;
        wrote = true;
    }
    if w.snapshots_read < w.header.snapshot_count && w.report.check_errors == 0 {
        w.header.snapshot_count = w.snapshots_read;
        let (at, bytes) = w.header.patch_snapshots();
        w.storage.write(at, &bytes).await?;
        wrote = true;
    }
    Ok(wrote)
}

/// Rewrites L1 and L2 entries that cannot be right: reserved bits are cleared, places that cannot be used are dropped
/// (reading there was an error before).
async fn mend_entries<S: Storage>(w: &Walk<'_, S>) -> Result<bool> {
    let g = w.g;
    let mut wrote = false;
    let usable = |at: u64, len: u64| {
        g.in_cluster(at) == 0
            && at.checked_add(len).is_some_and(|end| end.saturating_sub(w.storage.len()) <= g.cluster_size())
    };
    let on_metadata = |at: u64, own: Use| {
        let cell = w.refs.cell(at >> g.cluster_bits());
        // What lies on refcounts stays (they are counted anew elsewhere), and so does data that lies on snapshots: nobody
        // knows which of the two is right, and the active disk is not to suffer. A table there is none: it would be written.
        let others: &[Use] = match own {
            Use::L2 => &[Use::Header, Use::L1, Use::Snapshots, Use::Bitmaps],
            _ => &[Use::Header, Use::L1, Use::L2],
        };
        cell.has(OVERLAP) && others.iter().any(|u| *u != own && cell.used_for(*u))
    };
    for place in &w.l1s {
        let len = u64::from(place.entries) * 8;
        if !usable(place.at, len) {
            continue;
        }
        let table = w.storage.read(Span::new(place.at, len)).await?.into_owned();
        for (i, raw) in words(&table).enumerate() {
            let mut new = raw & (OFFSET | COPIED);
            let at = raw & OFFSET;
            if at == 0 || !usable(at, g.cluster_size()) || on_metadata(at, Use::L2) {
                new = 0;
            }
            if new != raw {
                w.storage.write(place.at + i as u64 * 8, &new.to_be_bytes()).await?;
                wrote = true;
            }
        }
    }
    for (at, _) in &w.l2s {
        if on_metadata(at.0, Use::L2) {
            continue;
        }
        let mut table = w.storage.read(Span::new(at.0, g.cluster_size())).await?.into_owned();
        let size = g.l2_entry_size() as usize;
        let mut changed = false;
        for entry in table.chunks_exact_mut(size) {
            let mut it = words(entry);
            let old = (it.next().unwrap_or(0), it.next().unwrap_or(0));
            drop(it);
            let new = mended_l2(w, old, &usable, &on_metadata);
            if new != old {
                entry[..8].copy_from_slice(&new.0.to_be_bytes());
                if size == 16 {
                    entry[8..].copy_from_slice(&new.1.to_be_bytes());
                }
                changed = true;
            }
        }
        if changed {
            w.storage.write(at.0, &table).await?;
            wrote = true;
        }
    }
    Ok(wrote)
}

fn mended_l2<S: Storage>(
    w: &Walk<'_, S>,
    (raw, bits): (u64, u64),
    usable: &impl Fn(u64, u64) -> bool,
    on_metadata: &impl Fn(u64, Use) -> bool,
) -> (u64, u64) {
    let g = w.g;
    if raw & COMPRESSED != 0 {
        let c = g.compressed(raw);
        let end = c.at.0 + c.len;
        let first = c.at.0 >> g.cluster_bits();
        let overlaps =
            (first..=(end - 1) >> g.cluster_bits()).any(|n| on_metadata(n << g.cluster_bits(), Use::Data));
        if g.data_file() || overlaps || end.saturating_sub(w.storage.len()) > g.cluster_size() {
            return (0, 0);
        }
        return (raw & !COPIED, 0);
    }
    let mut raw = raw;
    let mut bits = bits;
    if let Err(EntryFault::Reserved(reserved)) = g.l2_entry(raw, bits) {
        raw &= !reserved;
    }
    let at = raw & OFFSET;
    if at != 0 && !g.data_file() && (!usable(at, g.cluster_size()) || on_metadata(at, Use::Data))
        || g.in_cluster(at) != 0
    {
        return (0, 0);
    }
    if g.data_file() && at != 0 {
        raw |= COPIED;
    }
    if let Err(EntryFault::Bitmap(b)) = g.l2_entry(raw, bits) {
        // Both allocated and zero: what was written last is unknown; allocated data is not thrown away.
        let allocated =
            if raw & OFFSET == 0 && !(g.data_file() && raw & COPIED != 0) { 0 } else { b.allocated() };
        bits = u64::from(allocated) | u64::from(b.zero() & !allocated) << 32;
    }
    (raw, bits)
}

/// Sets refcounts that differ from what was found: lower ones always, higher ones with [`Fix::All`].
async fn write_refcounts<S: Storage>(w: &Walk<'_, S>, fix: Fix) -> Result<()> {
    let g = w.g;
    let mut by_block: BTreeMap<u64, Vec<(usize, u64)>> = BTreeMap::new();
    for &(cluster, disk, found) in &w.wrong {
        let c = HostCluster(cluster);
        if disk > found || fix == Fix::All {
            let at = (g.refcount_block_index(c) as usize, found);
            by_block.entry(g.refcount_table_index(c)).or_default().push(at);
        }
    }
    for (index, values) in by_block {
        let Some(&at) = w.blocks.get(&index) else { continue };
        let mut block = w.storage.read(Span::new(at.0, g.cluster_size())).await?.into_owned();
        for (i, value) in values {
            // A count too wide for the field stays wrong; the rebuild is for that case no help either.
            g.set_refcount(&mut block, i, value);
        }
        w.storage.write(at.0, &block).await?;
    }
    Ok(())
}

/// Writes a new refcount table and blocks behind everything in use, then lets the header point there.
async fn rebuild_refcounts<S: Storage>(w: &Walk<'_, S>) -> Result<()> {
    let g = w.g;
    // References without the old structures.
    let mut old: BTreeMap<u64, u64> = BTreeMap::new();
    for cluster in &w.structures {
        *old.entry(*cluster).or_insert(0) += 1;
    }
    let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
    for chunk in w.refs.chunk_numbers() {
        let first = chunk * super::refs::CHUNK;
        for cluster in first..first + super::refs::CHUNK {
            let n = w.refs.get(cluster).saturating_sub(old.get(&cluster).copied().unwrap_or(0));
            if n > g.refcount_max() {
                let text = format!(
                    "cluster {cluster} has {n} references, more than {} bits hold",
                    g.refcount_bits()
                );
                return Err(BlockError::new(ErrorKind::Unsupported, text));
            }
            if n > 0 {
                counts.insert(cluster, n);
            }
        }
    }
    let start = g.clusters_for(w.storage.len()).max(counts.keys().next_back().map_or(0, |c| c + 1));
    // The new structures count themselves: add blocks until none is missing.
    let mut needed: BTreeSet<u64> = counts.keys().map(|c| g.refcount_table_index(HostCluster(*c))).collect();
    let table_clusters = loop {
        let top = needed.last().copied().unwrap_or(0);
        let table = g.clusters_for((top + 1) * 8).max(1);
        let end = start + table + needed.len() as u64;
        let more: BTreeSet<u64> = (start..end).map(|c| g.refcount_table_index(HostCluster(c))).collect();
        if more.is_subset(&needed) {
            break table;
        }
        needed.extend(more);
    };
    if table_clusters * g.cluster_size() > MAX_REFCOUNT_TABLE_BYTES {
        return Err(BlockError::new(ErrorKind::Unsupported, "the new refcount table would be too large"));
    }
    for c in start..start + table_clusters + needed.len() as u64 {
        counts.insert(c, 1);
    }
    let mut table = vec![0u8; (table_clusters * g.cluster_size()) as usize];
    for (n, index) in needed.iter().enumerate() {
        let at = (start + table_clusters + n as u64) << g.cluster_bits();
        let mut block = vec![0u8; g.cluster_size() as usize];
        let first = index << g.refcount_block_bits();
        for (c, count) in counts.range(first..first + g.refcount_block_entries()) {
            g.set_refcount(&mut block, (c - first) as usize, *count);
        }
        w.storage.write(at, &block).await?;
        table[*index as usize * 8..][..8].copy_from_slice(&at.to_be_bytes());
    }
    let at = start << g.cluster_bits();
    w.storage.write(at, &table).await?;
    w.storage.barrier().await?;
    let mut header = w.header.clone();
    header.refcount_table_offset = HostOffset(at);
    header.refcount_table_clusters = table_clusters as u32;
    let (at, bytes) = header.patch_refcount_table();
    w.storage.write(at, &bytes).await
}

/// Sets the COPIED flags of the active tables: set exactly where the refcount is 1.
async fn mend_copied<S: Storage>(w: &Walk<'_, S>) -> Result<bool> {
    let g = w.g;
    let mut wrote = false;
    let right = |raw: u64| {
        let at = raw & OFFSET;
        let one = w.refs.cell(at >> g.cluster_bits()).has(super::refs::DISK_ONE);
        if one { raw | COPIED } else { raw & !COPIED }
    };
    if let Some(place) = w.l1s.first() {
        let table = w.storage.read(Span::new(place.at, u64::from(place.entries) * 8)).await?.into_owned();
        for (i, raw) in words(&table).enumerate() {
            if raw & OFFSET != 0 && right(raw) != raw {
                w.storage.write(place.at + i as u64 * 8, &right(raw).to_be_bytes()).await?;
                wrote = true;
            }
        }
    }
    if g.data_file() {
        return Ok(wrote);
    }
    for (at, _) in w.l2s.iter().filter(|(_, used)| used.active) {
        let mut table = w.storage.read(Span::new(at.0, g.cluster_size())).await?.into_owned();
        let mut changed = false;
        for entry in table.chunks_exact_mut(g.l2_entry_size() as usize) {
            let raw = words(entry).next().unwrap_or(0);
            if raw & COMPRESSED == 0 && raw & OFFSET != 0 && right(raw) != raw {
                entry[..8].copy_from_slice(&right(raw).to_be_bytes());
                changed = true;
            }
        }
        if changed {
            w.storage.write(at.0, &table).await?;
            wrote = true;
        }
    }
    Ok(wrote)
}
