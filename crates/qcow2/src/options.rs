//! How an image is opened: what QSD's `blockdev-add` knows for driver `qcow2`.

use crate::header::Header;
use crate::types::Geometry;

/// Default for the largest L2 cache: 32 MiB map 256 GiB of disk at 64 KiB clusters.
pub const L2_CACHE_MAX: u64 = 32 << 20;
/// Default size of a cache's unit: a random write costs so much metadata.
pub const L2_SLICE: u64 = 4096;

/// Which metadata is protected against being overwritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OverlapCheck {
    /// The header.
    pub main_header: bool,
    /// The active L1 table.
    pub active_l1: bool,
    /// Active L2 tables.
    pub active_l2: bool,
    /// The refcount table.
    pub refcount_table: bool,
    /// Refcount blocks.
    pub refcount_block: bool,
    /// The snapshot table.
    pub snapshot_table: bool,
    /// L1 tables of snapshots.
    pub inactive_l1: bool,
    /// The bitmap directory.
    pub bitmap_directory: bool,
}

impl OverlapCheck {
    /// QEMU's `none`.
    pub const NONE: OverlapCheck = OverlapCheck {
        main_header: false,
        active_l1: false,
        active_l2: false,
        refcount_table: false,
        refcount_block: false,
        snapshot_table: false,
        inactive_l1: false,
        bitmap_directory: false,
    };
    /// QEMU's `constant`: what does not move.
    pub const CONSTANT: OverlapCheck = OverlapCheck {
        main_header: true,
        active_l1: true,
        refcount_table: true,
        snapshot_table: true,
        bitmap_directory: true,
        ..OverlapCheck::NONE
    };
    /// QEMU's `cached`, the default: everything whose place is known in memory.
    pub const CACHED: OverlapCheck =
        OverlapCheck { active_l2: true, refcount_block: true, inactive_l1: true, ..OverlapCheck::CONSTANT };
}

/// Who keeps the image's bitmaps elsewhere, too, so that they survive a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keeper {
    /// The number under which it kept them before.
    pub old: Option<[u8; 16]>,
    /// The number to be used if the image does not vouch for that one. Never used before.
    pub new: [u8; 16],
}

/// Options of an open image.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Open for writing.
    pub writable: bool,
    /// Who keeps the bitmaps elsewhere, too.
    pub keeper: Option<Keeper>,
    /// Somebody else may be using the image: nothing is written, and nothing kept, until it is activated.
    pub inactive: bool,
    /// Bytes of both caches together (`cache-size`).
    pub cache_size: Option<u64>,
    /// Bytes of the L2 cache (`l2-cache-size`).
    pub l2_cache_size: Option<u64>,
    /// Bytes of a cache's unit (`l2-cache-entry-size`): a power of two, 512 to the cluster size.
    pub l2_cache_entry_size: Option<u64>,
    /// Bytes of the refcount cache (`refcount-cache-size`).
    pub refcount_cache_size: Option<u64>,
    /// Overrides the image's own mark (`lazy-refcounts`).
    pub lazy_refcounts: Option<bool>,
    /// Pass guest discards to the file (`pass-discard-request`).
    pub pass_discard_request: bool,
    /// Pass to the file what is freed for other reasons (`pass-discard-other`).
    pub pass_discard_other: bool,
    /// Pass to the file what is freed by deleting a snapshot (`pass-discard-snapshot`).
    pub pass_discard_snapshot: bool,
    /// Show the disk as it was at the internal snapshot of that id or name. Read-only.
    pub snapshot: Option<String>,
    /// Keep the cluster of what the guest discards (`discard-no-unref`).
    pub discard_no_unref: bool,
    /// What to protect (`overlap-check`).
    pub overlap_check: OverlapCheck,
    /// Node name for messages; the file's name where empty.
    pub node_name: String,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            writable: true,
            keeper: None,
            inactive: false,
            cache_size: None,
            l2_cache_size: None,
            l2_cache_entry_size: None,
            refcount_cache_size: None,
            lazy_refcounts: None,
            pass_discard_request: true,
            pass_discard_other: false,
            pass_discard_snapshot: true,
            snapshot: None,
            discard_no_unref: false,
            overlap_check: OverlapCheck::CACHED,
            node_name: String::new(),
        }
    }
}

/// Sizes of the caches as they follow from options and image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CacheSizes {
    /// Bytes of a slice of an L2 table.
    pub(crate) l2_slice: u64,
    /// Slices of L2 tables.
    pub(crate) l2_slices: usize,
    /// Bytes of a slice of a refcount block.
    pub(crate) rb_slice: u64,
    /// Slices of refcount blocks.
    pub(crate) rb_slices: usize,
}

impl Options {
    /// These with what can be said anew of an open image, as `new` has it.
    pub(crate) fn with_run_time(&self, new: &Options) -> Options {
        Options {
            writable: self.writable,
            keeper: self.keeper,
            inactive: self.inactive,
            snapshot: self.snapshot.clone(),
            node_name: self.node_name.clone(),
            ..new.clone()
        }
    }

    /// Whether an image with this header can be open so.
    ///
    /// # Errors
    /// A sentence, if it is too old.
    pub(crate) fn check(&self, header: &Header) -> block::Result<()> {
        if self.lazy_refcounts.unwrap_or(header.lazy_refcounts()) && header.geometry.version() < 3 {
            return Err(block::BlockError::invalid(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
            ));
        }
        if self.discard_no_unref && header.geometry.version() < 3 {
            return Err(block::BlockError::invalid(
                "discard-no-unref is only supported since qcow2 version 3",
            ));
        }
        Ok(())
    }

    /// Sizes of the caches for a disk of `size` bytes.
    ///
    /// # Errors
    /// A sentence, if the options contradict each other.
    pub(crate) fn caches(&self, g: &Geometry, size: u64) -> block::Result<CacheSizes> {
        let cluster = g.cluster_size();
        let l2_slice = self.l2_cache_entry_size.unwrap_or(L2_SLICE.min(cluster));
        if !l2_slice.is_power_of_two() || l2_slice < 512 || l2_slice > cluster {
            return Err(block::BlockError::invalid(format!(
                "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
            )));
        }
        if let Some(all) = self.cache_size {
            let set =
                [(self.l2_cache_size, "l2-cache-size"), (self.refcount_cache_size, "refcount-cache-size")];
            for (v, name) in set {
                if v.is_some_and(|v| v > all) {
                    return Err(block::BlockError::invalid(format!("{name} may not exceed cache-size")));
                }
            }
            if let (Some(a), Some(b)) = (self.l2_cache_size, self.refcount_cache_size)
                && a.checked_add(b) != Some(all)
            {
                return Err(block::BlockError::invalid(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
                ));
            }
        }
        // What maps the whole disk is enough.
        let full = size.div_ceil(cluster).saturating_mul(g.l2_entry_size()).next_multiple_of(l2_slice);
        let rb_slice = L2_SLICE.min(cluster);
        let rb_least = 4 * cluster;
        let (l2, rb) = match (self.cache_size, self.l2_cache_size, self.refcount_cache_size) {
            (_, Some(l2), Some(rb)) => (l2, rb),
            (Some(all), Some(l2), None) => (l2, all - l2),
            (Some(all), None, Some(rb)) => (all - rb, rb),
            (Some(all), None, None) => {
                let l2 = full.min(all.saturating_sub(rb_least));
                (l2, all - l2)
            }
            (None, Some(l2), None) => (l2, rb_least.max(L2_CACHE_MAX / 32)),
            (None, None, Some(rb)) => (full.min(L2_CACHE_MAX), rb),
            (None, None, None) => (full.min(L2_CACHE_MAX), rb_least.max(L2_CACHE_MAX / 32)),
        };
        let count = |bytes: u64, slice: u64| usize::try_from(bytes / slice).unwrap_or(usize::MAX / 2);
        Ok(CacheSizes {
            l2_slice,
            l2_slices: count(l2.min(full), l2_slice),
            rb_slice,
            rb_slices: count(rb, rb_slice),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_cover_the_disk_up_to_32_mib() {
        let g = Geometry::new(3, 16, 4, false, false).unwrap();
        let c = Options::default().caches(&g, 1 << 30).unwrap();
        assert_eq!((c.l2_slice, c.l2_slices), (4096, 32));
        let c = Options::default().caches(&g, 1 << 50).unwrap();
        assert_eq!(c.l2_slices, 8192);
        let o = Options { l2_cache_entry_size: Some(256), ..Options::default() };
        assert!(o.caches(&g, 1 << 30).is_err());
        let o = Options { cache_size: Some(1), l2_cache_size: Some(2), ..Options::default() };
        assert!(o.caches(&g, 1 << 30).unwrap_err().message().contains("may not exceed"));
    }
}
