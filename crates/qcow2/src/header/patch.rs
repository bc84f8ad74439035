//! The few bytes to write when fields change in an image in use: each patch lies within one 512-byte sector.

use super::Header;
use crate::types::HostOffset;

impl Header {
    /// (offset, bytes) that move the active L1 table: its length and its place together.
    pub fn patch_l1(&self) -> (u64, [u8; 12]) {
        (36, size_and_place(self.l1_size, self.l1_offset))
    }

    /// (offset, bytes) that move the refcount table: its place and its length together.
    pub fn patch_refcount_table(&self) -> (u64, [u8; 12]) {
        let mut b = [0; 12];
        b[..8].copy_from_slice(&self.refcount_table_offset.0.to_be_bytes());
        b[8..].copy_from_slice(&self.refcount_table_clusters.to_be_bytes());
        (48, b)
    }

    /// (offset, bytes) that change the disk's length.
    pub fn patch_size(&self) -> (u64, [u8; 8]) {
        (24, self.size.to_be_bytes())
    }

    /// (offset, bytes) that change the number and place of snapshots together.
    pub fn patch_snapshots(&self) -> (u64, [u8; 12]) {
        (60, size_and_place(self.snapshot_count, self.snapshots_offset))
    }

    /// (offset, bytes) of all three feature words (version 3 only; version 2 has none).
    pub fn patch_features(&self) -> (u64, [u8; 24]) {
        let mut b = [0; 24];
        b[..8].copy_from_slice(&self.incompatible.to_be_bytes());
        b[8..16].copy_from_slice(&self.compatible.to_be_bytes());
        b[16..].copy_from_slice(&self.autoclear.to_be_bytes());
        (72, b)
    }
}

fn size_and_place(n: u32, at: HostOffset) -> [u8; 12] {
    let mut b = [0; 12];
    b[..4].copy_from_slice(&n.to_be_bytes());
    b[4..].copy_from_slice(&at.0.to_be_bytes());
    b
}
