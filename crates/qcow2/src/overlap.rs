//! What must never be written over, and what happens when it nearly was.
//!
//! A map of the host clusters that hold metadata, kept in memory. Space that the allocator finds free, and each place a guest's
//! write goes to, is looked up in it: an image whose tables contradict each other (bit rot, a bug, malice) then loses
//! no metadata. The image is marked corrupt in its header, the event is told once, and no further write is taken.

use crate::core::Core;
use crate::header::INCOMPAT_CORRUPT;
use crate::options::OverlapCheck;
use crate::types::HostOffset;
use block::{BlockError, Data, ErrorKind, Span};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Kinds of metadata.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Meta {
    Header,
    ActiveL1,
    ActiveL2,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    InactiveL1,
    BitmapDirectory,
}

impl Meta {
    /// As clients know it from BLOCK_IMAGE_CORRUPTED.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Meta::Header => "qcow2_header",
            Meta::ActiveL1 => "active L1 table",
            Meta::ActiveL2 => "active L2 table",
            Meta::RefcountTable => "refcount table",
            Meta::RefcountBlock => "refcount block",
            Meta::SnapshotTable => "snapshot table",
            Meta::InactiveL1 => "inactive L1 table",
            Meta::BitmapDirectory => "bitmap directory",
        }
    }

    fn checked(self, o: &OverlapCheck) -> bool {
        match self {
            Meta::Header => o.main_header,
            Meta::ActiveL1 => o.active_l1,
            Meta::ActiveL2 => o.active_l2,
            Meta::RefcountTable => o.refcount_table,
            Meta::RefcountBlock => o.refcount_block,
            Meta::SnapshotTable => o.snapshot_table,
            Meta::InactiveL1 => o.inactive_l1,
            Meta::BitmapDirectory => o.bitmap_directory,
        }
    }
}

/// Host clusters that hold metadata: first cluster → (number, kind). Ranges don't overlap; the first entered stays.
#[derive(Default)]
pub(crate) struct MetaMap(BTreeMap<u64, (u64, Meta)>);

impl MetaMap {
    /// Enters `n` clusters from `first` on. What is taken already stays what it is.
    pub(crate) fn insert(&mut self, first: u64, n: u64, kind: Meta) {
        if n > 0 && self.find(first, n).is_none() {
            self.0.insert(first, (n, kind));
        }
    }

    /// Takes the range that starts at `first` out.
    pub(crate) fn remove(&mut self, first: u64, kind: Meta) {
        if self.0.get(&first).is_some_and(|(_, k)| *k == kind) {
            self.0.remove(&first);
        }
    }

    /// What lies in the clusters `first..first + n`, if anything.
    pub(crate) fn find(&self, first: u64, n: u64) -> Option<Meta> {
        let end = first.saturating_add(n);
        let (start, (len, kind)) = self.0.range(..end).next_back()?;
        (start.saturating_add(*len) > first).then_some(*kind)
    }
}

/// An image was found to be corrupt (QMP event BLOCK_IMAGE_CORRUPTED).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// What was found.
    pub message: String,
    /// Where in the file, if the place is known.
    pub offset: Option<u64>,
    /// Bytes of the access that was prevented.
    pub size: Option<u64>,
    /// The image takes no more writes.
    pub fatal: bool,
}

impl Core {
    /// Refuses a write to `len` bytes at `at` of the file if metadata lies there.
    pub(crate) fn check_overlap(self: &Rc<Self>, at: HostOffset, len: u64) -> Result<(), BlockError> {
        let g = &self.geo;
        let first = g.host_cluster(at).0;
        let last = (at.0.saturating_add(len.max(1)) - 1) >> g.cluster_bits();
        let found = self.meta.borrow().find(first, last - first + 1);
        match found {
            Some(kind) if kind.checked(&self.opts.borrow().overlap_check) => {
                let text = format!("Preventing invalid write on metadata (overlaps with {})", kind.name());
                Err(self.found_corrupt(text, Some(at.0), Some(len)))
            }
            _ => Ok(()),
        }
    }

    /// Marks the image corrupt, tells it once, and gives the error for the request.
    pub(crate) fn found_corrupt(
        self: &Rc<Self>,
        message: String,
        offset: Option<u64>,
        size: Option<u64>,
    ) -> BlockError {
        let place = offset.map(|o| format!(" at offset {o:#x}")).unwrap_or_default();
        let error = BlockError::new(
            ErrorKind::Corrupt,
            format!("image '{}' is corrupt{place}: {message}", self.name()),
        );
        if self.corrupt.replace(true) {
            return error;
        }
        let fatal = self.writable.get();
        if fatal && self.geo.version() >= 3 {
            let core = self.clone();
            self.in_background("qcow2-mark-corrupt", async move {
                let (at, bytes) = {
                    let mut h = core.header.borrow_mut();
                    h.incompatible |= INCOMPAT_CORRUPT;
                    h.patch_features()
                };
                // If the mark cannot be written, the image still takes no more writes from us.
                if core.file.write(at, Data::copy_from(&bytes)).await.is_ok() {
                    let _unmarked_on_error = core.file.barrier().await;
                }
            });
        }
        let hook = self.on_corruption.borrow().clone();
        if let Some(hook) = hook {
            hook(&Corruption { message, offset, size, fatal });
        }
        error
    }

    /// Enters a table of `bytes` bytes at `at` into the map.
    pub(crate) fn note_meta(&self, at: HostOffset, bytes: u64, kind: Meta) {
        let at = Span::new(at.0, bytes).align_out(self.geo.cluster_size());
        let bits = self.geo.cluster_bits();
        self.meta.borrow_mut().insert(at.start >> bits, at.len >> bits, kind);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_at_their_borders() {
        let mut m = MetaMap::default();
        m.insert(0, 1, Meta::Header);
        m.insert(10, 4, Meta::ActiveL1);
        m.insert(12, 1, Meta::ActiveL2);
        assert_eq!(m.find(12, 1), Some(Meta::ActiveL1), "first come");
        assert_eq!(m.find(9, 1), None);
        assert_eq!(m.find(5, 6), Some(Meta::ActiveL1));
        assert_eq!(m.find(13, 100), Some(Meta::ActiveL1));
        assert_eq!(m.find(14, 100), None);
        m.remove(10, Meta::ActiveL2);
        assert!(m.find(10, 1).is_some());
        m.remove(10, Meta::ActiveL1);
        assert!(m.find(10, 1).is_none());
    }
}
