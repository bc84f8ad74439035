//! What a header may say: feature words, layout, sizes and places, each refused by its name.

use super::extension::{Extension, FEATURE_ENTRY, text};
use super::{
    AUTOCLEAR_RAW_DATA, INCOMPAT_COMPRESSION, INCOMPAT_DATA_FILE, INCOMPAT_EXTENDED_L2, INCOMPAT_KNOWN,
    MAX_BACKING_NAME, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS, Raw,
};
use crate::types::{Geometry, MAX_HOST_OFFSET, MIN_SUBCLUSTER_BITS};
use block::{BlockError, Result};

/// Where the extensions end: at the backing file name, or the end of the cluster.
pub(super) fn backing_bounds(raw: &Raw, cluster_size: u64) -> Result<u64> {
    let (at, len) = (raw.backing_offset.get(), raw.backing_len.get());
    if at == 0 {
        return Ok(cluster_size);
    }
    if at > cluster_size {
        return Err(BlockError::invalid(format!(
            "Invalid backing file offset (backing_file_offset {at:#x})"
        )));
    }
    if len > MAX_BACKING_NAME || u64::from(len) > cluster_size - at {
        return Err(BlockError::invalid(format!(
            "Backing file name too long (backing_file_size {len} at {at:#x})"
        )));
    }
    Ok(at)
}

pub(super) fn parse_backing(raw: &Raw, first: &[u8]) -> Result<Option<String>> {
    let (at, len) = (raw.backing_offset.get() as usize, raw.backing_len.get() as usize);
    if at == 0 || len == 0 {
        return Ok(None);
    }
    let Some(name) = first.get(at..).and_then(|b| b.get(..len)) else {
        return Err(BlockError::invalid(format!("the file ends inside the backing file name (at {at:#x})")));
    };
    Ok(Some(text(name, "backing file name")?).filter(|n| !n.is_empty()))
}

/// Checks the feature words and the layout they say.
pub(super) fn check_features(raw: &Raw, extensions: &[Extension]) -> Result<Geometry> {
    let incompatible = raw.incompatible.get();
    let unknown = incompatible & !INCOMPAT_KNOWN;
    if unknown != 0 {
        let names = unknown_features(unknown, extensions);
        return Err(BlockError::unsupported(format!("Unsupported qcow2 feature(s): {names}")));
    }
    let bad = |text: String| Err(BlockError::invalid(text));
    let order = raw.refcount_order.get();
    if order > 6 {
        return bad(format!(
            "Reference count entry width too large; may not exceed 64 bits (refcount_order {order})"
        ));
    }
    match (raw.compression, incompatible & INCOMPAT_COMPRESSION != 0) {
        (0, false) | (1, true) => (),
        (0, true) => {
            return bad("qcow2: Compression type incompatible feature bit must not be set".to_owned());
        }
        (1, false) => return bad("qcow2: Compression type incompatible feature bit must be set".to_owned()),
        (n, _) => return bad(format!("qcow2: unknown compression type: {n}")),
    }
    let data_file = incompatible & INCOMPAT_DATA_FILE != 0;
    if raw.autoclear.get() & AUTOCLEAR_RAW_DATA != 0 && !data_file {
        return bad("data-file-raw requires a data file".to_owned());
    }
    let (bits, extended) = (raw.cluster_bits.get(), incompatible & INCOMPAT_EXTENDED_L2 != 0);
    if extended && bits < MIN_SUBCLUSTER_BITS + 5 {
        return bad(format!("Unsupported subcluster size: {}", (1u64 << bits) / 32));
    }
    match Geometry::new(raw.version.get(), bits, order, extended, data_file) {
        Some(g) => Ok(g),
        None => bad(format!("impossible layout (cluster_bits {bits}, refcount_order {order})")),
    }
}

/// Names of unknown incompatible features: from the image's own table, the rest by their bits.
fn unknown_features(bits: u64, extensions: &[Extension]) -> String {
    let mut left = bits;
    let mut names = Vec::new();
    for e in extensions {
        let Extension::FeatureNames(table) = e else { continue };
        for entry in table.chunks_exact(FEATURE_ENTRY) {
            let bit = 1u64.checked_shl(u32::from(entry[1])).unwrap_or(0);
            if entry[0] == 0 && left & bit != 0 {
                let name = &entry[2..];
                let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
                names.push(String::from_utf8_lossy(&name[..end]).into_owned());
                left &= !bit;
            }
        }
    }
    if left != 0 {
        names.push(format!("Unknown incompatible feature: {left:x}"));
    }
    names.join(", ")
}

/// Checks sizes and places of the tables.
pub(super) fn check_sizes(raw: &Raw, g: &Geometry) -> Result<()> {
    let bad = |text: String| Err(BlockError::invalid(text));
    let place_ok = |at: u64, bytes: u64| {
        g.in_cluster(at) == 0 && at.checked_add(bytes).is_some_and(|end| end <= MAX_HOST_OFFSET)
    };
    let clusters = raw.refcount_table_clusters.get();
    if clusters == 0 {
        return bad("Image does not contain a reference count table (refcount_table_clusters 0)".to_owned());
    }
    let bytes = u64::from(clusters) * g.cluster_size();
    if bytes > MAX_REFCOUNT_TABLE_BYTES {
        return bad(format!("Reference count table too large (refcount_table_clusters {clusters})"));
    }
    let at = raw.refcount_table_offset.get();
    if !place_ok(at, bytes) {
        return bad(format!("Reference count table offset invalid (refcount_table_offset {at:#x})"));
    }
    let (count, at) = (raw.snapshot_count.get(), raw.snapshots_offset.get());
    if count > MAX_SNAPSHOTS {
        return bad(format!("Snapshot table too large (nb_snapshots {count})"));
    }
    if !place_ok(at, 0) {
        return bad(format!("Snapshot table offset invalid (snapshots_offset {at:#x})"));
    }
    let l1_size = raw.l1_size.get();
    if u64::from(l1_size) * 8 > MAX_L1_BYTES {
        return bad(format!("Active L1 table too large (l1_size {l1_size})"));
    }
    let size = raw.size.get();
    let needed = g.l1_entries_for(size);
    if needed > i32::MAX as u64 || size > i64::MAX as u64 {
        return bad(format!("Image is too big (size {size})"));
    }
    if u64::from(l1_size) < needed {
        return bad(format!("L1 table is too small (l1_size {l1_size}, size {size})"));
    }
    let at = raw.l1_offset.get();
    if !place_ok(at, u64::from(l1_size) * 8) {
        return bad(format!("Active L1 table offset invalid (l1_table_offset {at:#x})"));
    }
    Ok(())
}
