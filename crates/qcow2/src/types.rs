//! Addresses, geometry and table entries of the qcow2 format.
//!
//! Four newtypes keep apart what an `u64` would mix up: a byte in the guest's disk and a byte in the image file, each
//! also counted in clusters. Conversions are methods of [`Geometry`] and checked. Entries of the L1, L2 and refcount
//! tables are decoded here and nowhere else; what a decoder refuses (reserved bits, unaligned or too high offsets) comes
//! back as an [`EntryFault`], so that the running driver can fail the request and the checker can count it.
//!
//! Source of the layout: the qcow2 specification in the QEMU documentation (`interop/qcow2`), an open document.

use std::fmt;

/// Smallest cluster: 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster: 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Smallest subcluster (extended L2): 512 bytes, so clusters are then at least 16 KiB.
pub const MIN_SUBCLUSTER_BITS: u32 = 9;
/// Subclusters in a cluster of an image with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;
/// Offsets in the image file have 56 bits (the upper 8 bits of an entry are flags).
pub const MAX_HOST_OFFSET: u64 = (1 << 56) - 1;
/// Largest guest disk in bytes: what a signed 64-bit byte count can address, less one maximal cluster so that rounding
/// up to clusters never overflows.
pub const MAX_GUEST_SIZE: u64 = (i64::MAX as u64) & !((1 << MAX_CLUSTER_BITS) - 1);

/// Bits 9 to 55 of a table entry: a host offset, aligned to a cluster.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: the refcount of what the entry points to is exactly 1.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: a compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry (version 3): reads as zeroes.
pub const ZERO: u64 = 1;

macro_rules! address {
    ($(#[$doc:meta] $name:ident;)*) => { $(
        #[$doc]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);
        impl $name {
            /// The number without its meaning.
            pub const fn get(self) -> u64 {
                self.0
            }
            /// `self + n`, or `None` where 64 bits do not hold it.
            pub const fn checked_add(self, n: u64) -> Option<$name> {
                match self.0.checked_add(n) {
                    Some(v) => Some($name(v)),
                    None => None,
                }
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    )* };
}
address! {
    /// A byte of the guest's disk.
    GuestOffset;
    /// A cluster of the guest's disk, by number.
    GuestCluster;
    /// A byte of the image file (or of the external data file).
    HostOffset;
    /// A cluster of the image file (or of the external data file), by number.
    HostCluster;
}

/// Everything about an image's layout that follows from four header fields. Small and `Copy`: hand it around by value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
    extended_l2: bool,
    data_file: bool,
    version: u32,
}

impl Geometry {
    /// The layout for clusters of `2^cluster_bits` bytes and refcounts of `2^refcount_order` bits; `None` outside the
    /// format's limits.
    pub const fn new(
        version: u32,
        cluster_bits: u32,
        refcount_order: u32,
        extended_l2: bool,
        data_file: bool,
    ) -> Option<Geometry> {
        let least = if extended_l2 { MIN_SUBCLUSTER_BITS + 5 } else { MIN_CLUSTER_BITS };
        if cluster_bits < least || cluster_bits > MAX_CLUSTER_BITS || refcount_order > 6 {
            return None;
        }
        if version != 2 && version != 3 || version == 2 && (refcount_order != 4 || extended_l2 || data_file) {
            return None;
        }
        Some(Geometry { cluster_bits, refcount_order, extended_l2, data_file, version })
    }

    /// log2 of the cluster size.
    pub const fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }
    /// Bytes in a cluster.
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }
    /// log2 of the refcount width in bits.
    pub const fn refcount_order(&self) -> u32 {
        self.refcount_order
    }
    /// Bits in a refcount.
    pub const fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }
    /// Largest refcount that fits.
    pub const fn refcount_max(&self) -> u64 {
        if self.refcount_order == 6 { u64::MAX } else { (1 << (1 << self.refcount_order)) - 1 }
    }
    /// Whether L2 entries are 128 bits with subcluster bitmaps.
    pub const fn extended_l2(&self) -> bool {
        self.extended_l2
    }
    /// Whether guest data is in an external data file (which is not refcounted).
    pub const fn data_file(&self) -> bool {
        self.data_file
    }
    /// Format version, 2 or 3.
    pub const fn version(&self) -> u32 {
        self.version
    }
    /// log2 of the smallest unit that is mapped by itself: a subcluster, or a cluster where there are none.
    pub const fn subcluster_bits(&self) -> u32 {
        if self.extended_l2 { self.cluster_bits - 5 } else { self.cluster_bits }
    }
    /// Bytes in a subcluster (a cluster where there are none).
    pub const fn subcluster_size(&self) -> u64 {
        1 << self.subcluster_bits()
    }
    /// Subclusters in a cluster (1 where there are none).
    pub const fn subclusters(&self) -> u32 {
        if self.extended_l2 { SUBCLUSTERS } else { 1 }
    }
    /// Bytes in an L2 entry.
    pub const fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }
    /// log2 of the number of entries in an L2 table.
    pub const fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }
    /// Entries in an L2 table (which is one cluster).
    pub const fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }
    /// Guest bytes that one L2 table maps.
    pub const fn l2_coverage(&self) -> u64 {
        1 << (self.l2_bits() + self.cluster_bits)
    }
    /// log2 of the number of refcounts in a refcount block (which is one cluster).
    pub const fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }
    /// Refcounts in a refcount block.
    pub const fn refcount_block_entries(&self) -> u64 {
        1 << self.refcount_block_bits()
    }

    /// The guest cluster of a guest byte.
    pub const fn guest_cluster(&self, at: GuestOffset) -> GuestCluster {
        GuestCluster(at.0 >> self.cluster_bits)
    }
    /// The host cluster of a host byte.
    pub const fn host_cluster(&self, at: HostOffset) -> HostCluster {
        HostCluster(at.0 >> self.cluster_bits)
    }
    /// The host cluster that starts at `at`, or `None` if `at` is inside one: no low bits are lost in silence.
    pub const fn host_cluster_exact(&self, at: HostOffset) -> Option<HostCluster> {
        if self.in_cluster(at.0) == 0 { Some(self.host_cluster(at)) } else { None }
    }
    /// First byte of a guest cluster, or `None` past 64 bits.
    pub const fn guest_start(&self, c: GuestCluster) -> Option<GuestOffset> {
        match c.0.checked_mul(self.cluster_size()) {
            Some(v) => Some(GuestOffset(v)),
            None => None,
        }
    }
    /// First byte of a host cluster, or `None` past what an entry can hold (56 bits).
    pub const fn host_start(&self, c: HostCluster) -> Option<HostOffset> {
        if c.0 <= MAX_HOST_OFFSET >> self.cluster_bits {
            Some(HostOffset(c.0 << self.cluster_bits))
        } else {
            None
        }
    }
    /// Offset of a byte inside its cluster.
    pub const fn in_cluster(&self, byte: u64) -> u64 {
        byte & (self.cluster_size() - 1)
    }
    /// Clusters needed for `bytes`.
    pub const fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }
    /// Index into the L1 table for a guest byte.
    pub const fn l1_index(&self, at: GuestOffset) -> u64 {
        at.0 >> (self.l2_bits() + self.cluster_bits)
    }
    /// Index into its L2 table for a guest byte.
    pub const fn l2_index(&self, at: GuestOffset) -> u64 {
        (at.0 >> self.cluster_bits) & (self.l2_entries() - 1)
    }
    /// Index of the subcluster in its cluster for a guest byte (0 where there are none).
    pub const fn subcluster_index(&self, at: GuestOffset) -> u32 {
        (self.in_cluster(at.0) >> self.subcluster_bits()) as u32
    }
    /// Entries that the L1 table needs for a disk of `size` bytes.
    pub const fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }
    /// Index into the refcount table for a host cluster.
    pub const fn refcount_table_index(&self, c: HostCluster) -> u64 {
        c.0 >> self.refcount_block_bits()
    }
    /// Index into its refcount block for a host cluster.
    pub const fn refcount_block_index(&self, c: HostCluster) -> u64 {
        c.0 & (self.refcount_block_entries() - 1)
    }

    /// Decodes an L1 entry: the L2 table's place, or `None` if there is none.
    pub fn l1_entry(&self, raw: u64) -> Result<Option<L1Entry>, EntryFault> {
        if raw & !(OFFSET_MASK | COPIED) != 0 {
            return Err(EntryFault::Reserved(raw & !(OFFSET_MASK | COPIED)));
        }
        let at = self.entry_offset(raw)?;
        Ok((at.0 != 0).then_some(L1Entry { l2: at, copied: raw & COPIED != 0 }))
    }

    /// Encodes an L1 entry.
    pub const fn encode_l1(&self, l2: HostOffset, copied: bool) -> u64 {
        (l2.0 & OFFSET_MASK) | if copied { COPIED } else { 0 }
    }

    /// Decodes an L2 entry; `bitmap` is its second half in images with extended entries, else ignored.
    pub fn l2_entry(&self, raw: u64, bitmap: u64) -> Result<L2Entry, EntryFault> {
        if raw & COMPRESSED != 0 {
            if raw & COPIED != 0 {
                return Err(EntryFault::Reserved(COPIED));
            }
            if self.extended_l2 && bitmap != 0 {
                return Err(EntryFault::Bitmap(SubclusterBitmap(bitmap)));
            }
            return Ok(L2Entry::Compressed(self.compressed(raw)));
        }
        let zero_bit = if self.extended_l2 || self.version < 3 { 0 } else { ZERO };
        let reserved = raw & !(OFFSET_MASK | COPIED | zero_bit);
        if reserved != 0 {
            return Err(EntryFault::Reserved(reserved));
        }
        let at = self.entry_offset(raw)?;
        // Offset 0 is the header, so it means "no place"; in an external data file it is a place, told by COPIED.
        let copied = raw & COPIED != 0;
        let host = (at.0 != 0 || self.data_file && copied).then_some(at);
        if self.extended_l2 {
            let bits = SubclusterBitmap(bitmap);
            if bits.allocated() & bits.zero() != 0 || host.is_none() && bits.allocated() != 0 {
                return Err(EntryFault::Bitmap(bits));
            }
            return Ok(match host {
                None if bits.zero() == 0 => L2Entry::Unallocated,
                _ => L2Entry::Subclusters { host, copied, bits },
            });
        }
        Ok(match (raw & zero_bit != 0, host) {
            (true, host) => L2Entry::Zero { host, copied },
            (false, Some(host)) => L2Entry::Data { host, copied },
            (false, None) => L2Entry::Unallocated,
        })
    }

    /// Encodes an L2 entry: (entry, bitmap); the bitmap is 0 and not stored where entries have 64 bits.
    pub fn encode_l2(&self, entry: L2Entry) -> (u64, u64) {
        let flag = |copied: bool| if copied { COPIED } else { 0 };
        let place = |host: Option<HostOffset>| host.map_or(0, |h| h.0 & OFFSET_MASK);
        match entry {
            L2Entry::Unallocated => (0, 0),
            L2Entry::Compressed(c) => (self.encode_compressed(c), 0),
            L2Entry::Subclusters { host, copied, bits } => (place(host) | flag(copied), bits.0),
            L2Entry::Zero { host, copied } if self.extended_l2 => {
                (place(host) | flag(copied), SubclusterBitmap::ALL_ZERO.0)
            }
            L2Entry::Zero { host, copied } => (place(host) | flag(copied) | ZERO, 0),
            L2Entry::Data { host, copied } => {
                let bits = if self.extended_l2 { SubclusterBitmap::ALL_ALLOCATED.0 } else { 0 };
                (place(Some(host)) | flag(copied), bits)
            }
        }
    }

    /// Decodes a refcount table entry: the place of a refcount block, or `None` if all its refcounts are 0.
    pub fn refcount_table_entry(&self, raw: u64) -> Result<Option<HostOffset>, EntryFault> {
        if raw & 0x1ff != 0 {
            return Err(EntryFault::Reserved(raw & 0x1ff));
        }
        if raw > MAX_HOST_OFFSET {
            return Err(EntryFault::TooHigh(HostOffset(raw)));
        }
        if self.in_cluster(raw) != 0 {
            return Err(EntryFault::Unaligned(HostOffset(raw)));
        }
        Ok((raw != 0).then_some(HostOffset(raw)))
    }

    /// Reads refcount number `index` of a block. `None` if the block is too short.
    pub fn refcount(&self, block: &[u8], index: usize) -> Option<u64> {
        let bits = self.refcount_bits() as usize;
        if bits < 8 {
            let per_byte = 8 / bits;
            let byte = *block.get(index / per_byte)?;
            return Some(u64::from(byte >> (index % per_byte * bits)) & self.refcount_max());
        }
        let n = bits / 8;
        let bytes = block.get(index.checked_mul(n)?..)?.get(..n)?;
        Some(bytes.iter().fold(0, |v, b| v << 8 | u64::from(*b)))
    }

    /// Writes refcount number `index` of a block. `false` if the block is too short or the value too wide.
    pub fn set_refcount(&self, block: &mut [u8], index: usize, value: u64) -> bool {
        if value > self.refcount_max() {
            return false;
        }
        let bits = self.refcount_bits() as usize;
        if bits < 8 {
            let per_byte = 8 / bits;
            let Some(byte) = block.get_mut(index / per_byte) else { return false };
            let shift = index % per_byte * bits;
            *byte = *byte & !((self.refcount_max() as u8) << shift) | (value as u8) << shift;
            return true;
        }
        let n = bits / 8;
        let Some(bytes) = index.checked_mul(n).and_then(|at| block.get_mut(at..)?.get_mut(..n)) else {
            return false;
        };
        bytes.copy_from_slice(&value.to_be_bytes()[8 - n..]);
        true
    }

    /// Bits of a compressed descriptor that hold the host offset.
    const fn compressed_offset_bits(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// Decodes a compressed cluster descriptor.
    pub const fn compressed(&self, raw: u64) -> Compressed {
        let offset_bits = self.compressed_offset_bits();
        let at = raw & ((1 << offset_bits) - 1);
        let sectors = ((raw & (COMPRESSED - 1)) >> offset_bits) + 1;
        Compressed { at: HostOffset(at), len: sectors * 512 - (at & 511) }
    }

    /// Encodes a compressed cluster descriptor for `len` bytes at `at`. The length is stored in 512-byte sectors that
    /// the data touches.
    pub const fn encode_compressed(&self, c: Compressed) -> u64 {
        let last = c.at.0 + if c.len == 0 { 0 } else { c.len - 1 };
        let more = (last >> 9) - (c.at.0 >> 9);
        COMPRESSED | more << self.compressed_offset_bits() | c.at.0
    }

    /// Whether a compressed cluster of `len` bytes at `at` can be described.
    pub const fn can_describe_compressed(&self, at: HostOffset, len: u64) -> bool {
        let offset_bits = self.compressed_offset_bits();
        let limit = if offset_bits > 56 { MAX_HOST_OFFSET } else { (1 << offset_bits) - 1 };
        if at.0 > limit || len == 0 || len > self.cluster_size() {
            return false;
        }
        ((at.0 + len - 1) >> 9) - (at.0 >> 9) < 1 << (self.cluster_bits - 8)
    }

    fn entry_offset(&self, raw: u64) -> Result<HostOffset, EntryFault> {
        let at = HostOffset(raw & OFFSET_MASK);
        if self.in_cluster(at.0) != 0 { Err(EntryFault::Unaligned(at)) } else { Ok(at) }
    }
}

/// A decoded L1 entry that points to a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct L1Entry {
    /// The L2 table's place.
    pub l2: HostOffset,
    /// The table's refcount is exactly 1: it may be changed in place.
    pub copied: bool,
}

/// A decoded L2 entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum L2Entry {
    /// Nothing here: the backing file decides.
    Unallocated,
    /// Reads as zeroes; perhaps a cluster is kept for it.
    Zero {
        /// The cluster kept, if any.
        host: Option<HostOffset>,
        /// Its refcount is exactly 1.
        copied: bool,
    },
    /// A cluster of data.
    Data {
        /// Where.
        host: HostOffset,
        /// Its refcount is exactly 1.
        copied: bool,
    },
    /// A compressed cluster.
    Compressed(Compressed),
    /// An extended entry: each subcluster has its own state. All of it data or zero is told this way, too.
    Subclusters {
        /// The cluster, if there is one. Without one no subcluster is allocated.
        host: Option<HostOffset>,
        /// Its refcount is exactly 1.
        copied: bool,
        /// What each subcluster is.
        bits: SubclusterBitmap,
    },
}

impl L2Entry {
    /// The host cluster that this entry holds a reference to (compressed data: see [`Compressed`]).
    pub const fn host(&self) -> Option<HostOffset> {
        match *self {
            L2Entry::Data { host, .. } => Some(host),
            L2Entry::Zero { host, .. } | L2Entry::Subclusters { host, .. } => host,
            L2Entry::Unallocated | L2Entry::Compressed(_) => None,
        }
    }
    /// The COPIED flag.
    pub const fn copied(&self) -> bool {
        match *self {
            L2Entry::Data { copied, .. }
            | L2Entry::Zero { copied, .. }
            | L2Entry::Subclusters { copied, .. } => copied,
            L2Entry::Unallocated | L2Entry::Compressed(_) => false,
        }
    }
}

/// Where a compressed cluster lies. Not aligned to anything; may share host clusters with others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Compressed {
    /// First byte.
    pub at: HostOffset,
    /// Bytes up to the end of the last 512-byte sector touched; the stream may be shorter.
    pub len: u64,
}

/// State of the 32 subclusters of an extended L2 entry: bit `i` of the lower half says "subcluster `i` is allocated",
/// bit `i` of the upper half "reads as zeroes". Both together are invalid.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct SubclusterBitmap(pub u64);

/// What one subcluster is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subcluster {
    /// The backing file decides.
    Unallocated,
    /// Data in the host cluster.
    Allocated,
    /// Reads as zeroes.
    Zero,
}

impl SubclusterBitmap {
    /// Every subcluster allocated.
    pub const ALL_ALLOCATED: SubclusterBitmap = SubclusterBitmap(0xffff_ffff);
    /// Every subcluster zero.
    pub const ALL_ZERO: SubclusterBitmap = SubclusterBitmap(0xffff_ffff << 32);

    /// The allocation half.
    pub const fn allocated(self) -> u32 {
        self.0 as u32
    }
    /// The zero half.
    pub const fn zero(self) -> u32 {
        (self.0 >> 32) as u32
    }
    /// From its halves.
    pub const fn of(allocated: u32, zero: u32) -> SubclusterBitmap {
        SubclusterBitmap(allocated as u64 | (zero as u64) << 32)
    }
    /// The state of subcluster `i` (below 32; higher numbers wrap).
    pub const fn get(self, i: u32) -> Subcluster {
        if self.0 >> (i & 31) & 1 != 0 {
            Subcluster::Allocated
        } else if self.0 >> ((i & 31) + 32) & 1 != 0 {
            Subcluster::Zero
        } else {
            Subcluster::Unallocated
        }
    }
    /// The same with subclusters `from..to` (within 0..=32) in `state`.
    #[must_use]
    pub const fn with(self, from: u32, to: u32, state: Subcluster) -> SubclusterBitmap {
        let mask = mask(from, to);
        let (a, z) = (self.allocated() & !mask, self.zero() & !mask);
        match state {
            Subcluster::Unallocated => SubclusterBitmap::of(a, z),
            Subcluster::Allocated => SubclusterBitmap::of(a | mask, z),
            Subcluster::Zero => SubclusterBitmap::of(a, z | mask),
        }
    }
    /// The state of subcluster `i` and how many from `i` on (within this cluster) share it.
    pub const fn run(self, i: u32) -> (Subcluster, u32) {
        let state = self.get(i);
        let mut end = i + 1;
        while end < SUBCLUSTERS && self.get(end) as u8 == state as u8 {
            end += 1;
        }
        (state, end - i)
    }
}

/// Bits `from..to` of 32.
const fn mask(from: u32, to: u32) -> u32 {
    let to = if to > 32 { 32 } else { to };
    if from >= to {
        return 0;
    }
    (((1u64 << to) - 1) & !((1u64 << from) - 1)) as u32
}

impl fmt::Debug for SubclusterBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "allocated {:08x} zero {:08x}", self.allocated(), self.zero())
    }
}

/// Why a table entry was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryFault {
    /// Reserved bits are set (which ones).
    Reserved(u64),
    /// The offset is not at a cluster boundary.
    Unaligned(HostOffset),
    /// The offset does not fit in 56 bits.
    TooHigh(HostOffset),
    /// The subcluster bitmap contradicts itself or the entry.
    Bitmap(SubclusterBitmap),
}

impl fmt::Display for EntryFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EntryFault::Reserved(bits) => write!(f, "reserved bits {bits:#x} are set"),
            EntryFault::Unaligned(at) => write!(f, "offset {at} is not aligned to a cluster"),
            EntryFault::TooHigh(at) => write!(f, "offset {at} does not fit in 56 bits"),
            EntryFault::Bitmap(bits) => write!(f, "invalid subcluster bitmap ({bits:?})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn g(bits: u32) -> Geometry {
        Geometry::new(3, bits, 4, false, false).unwrap()
    }

    #[test]
    fn geometry_follows_the_cluster_size() {
        let g = g(16);
        assert_eq!((g.l2_entries(), g.l2_coverage()), (8192, 512 << 20));
        assert_eq!(g.refcount_block_entries(), 32768);
        assert_eq!(g.l1_entries_for((512 << 20) + 1), 2);
        assert_eq!((g.l1_index(GuestOffset(512 << 20)), g.l2_index(GuestOffset(0x1_2345))), (1, 1));
        assert_eq!(g.host_cluster_exact(HostOffset(0x1_0001)), None);
        assert_eq!(g.host_start(HostCluster(1 << 40)), None);
        let x = Geometry::new(3, 16, 0, true, false).unwrap();
        assert_eq!((x.l2_entries(), x.subcluster_size()), (4096, 2048));
        assert_eq!(x.subcluster_index(GuestOffset(0x3_f801)), 31);
        assert_eq!(x.refcount_block_entries(), 1 << 19);
    }

    #[test]
    fn geometry_refuses_what_the_format_has_not() {
        for (v, c, r, x, d) in [
            (1, 16, 4, false, false),
            (3, 8, 4, false, false),
            (3, 22, 4, false, false),
            (3, 16, 7, false, false),
            (3, 13, 4, true, false),
            (2, 16, 3, false, false),
            (2, 16, 4, true, false),
            (2, 16, 4, false, true),
        ] {
            assert!(Geometry::new(v, c, r, x, d).is_none(), "{v} {c} {r} {x} {d}");
        }
    }

    #[test]
    fn l1_entries_are_checked() {
        let g = g(16);
        assert_eq!(g.l1_entry(0), Ok(None));
        let e = g.encode_l1(HostOffset(0x50000), true);
        assert_eq!(g.l1_entry(e), Ok(Some(L1Entry { l2: HostOffset(0x50000), copied: true })));
        assert_eq!(g.l1_entry(0x50200), Err(EntryFault::Unaligned(HostOffset(0x50200))));
        assert_eq!(g.l1_entry(0x50001), Err(EntryFault::Reserved(1)));
        assert_eq!(g.l1_entry(1 << 60), Err(EntryFault::Reserved(1 << 60)));
    }

    #[test]
    fn l2_entries_round_trip() {
        let plain = g(12);
        let host = HostOffset(0x7000);
        for e in [
            L2Entry::Unallocated,
            L2Entry::Zero { host: None, copied: false },
            L2Entry::Zero { host: Some(host), copied: true },
            L2Entry::Data { host, copied: true },
            L2Entry::Data { host, copied: false },
            L2Entry::Compressed(Compressed { at: HostOffset(0x7123), len: 512 * 3 - 0x123 }),
        ] {
            let (raw, bits) = plain.encode_l2(e);
            assert_eq!(bits, 0);
            assert_eq!(plain.l2_entry(raw, 0), Ok(e), "{e:?}");
        }
        let ext = Geometry::new(3, 16, 4, true, false).unwrap();
        let bits =
            SubclusterBitmap::default().with(3, 7, Subcluster::Allocated).with(31, 32, Subcluster::Zero);
        let e = L2Entry::Subclusters { host: Some(HostOffset(0x70000)), copied: true, bits };
        let (raw, b) = ext.encode_l2(e);
        assert_eq!(ext.l2_entry(raw, b), Ok(e));
        assert!(matches!(ext.l2_entry(raw, b | 1 << 35), Err(EntryFault::Bitmap(_))));
        assert!(matches!(ext.l2_entry(0, 1), Err(EntryFault::Bitmap(_))));
        assert_eq!(ext.l2_entry(raw | 1, b), Err(EntryFault::Reserved(1)));
        let v2 = Geometry::new(2, 16, 4, false, false).unwrap();
        assert_eq!(v2.l2_entry(1, 0), Err(EntryFault::Reserved(1)));
        let data_file = Geometry::new(3, 16, 4, false, true).unwrap();
        assert_eq!(data_file.l2_entry(COPIED, 0), Ok(L2Entry::Data { host: HostOffset(0), copied: true }));
        assert_eq!(data_file.l2_entry(0, 0), Ok(L2Entry::Unallocated));
    }

    #[test]
    fn compressed_descriptors_touch_whole_sectors() {
        for bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS {
            let g = g(bits);
            for (at, len) in [(0x1000u64, 1u64), (0x11ff, 2), (0x1001, 511), (0x1001, g.cluster_size())] {
                assert!(g.can_describe_compressed(HostOffset(at), len));
                let c = g.compressed(g.encode_compressed(Compressed { at: HostOffset(at), len }));
                assert_eq!(c.at.0, at);
                assert!(c.len >= len && c.len < len + 512, "{bits} {at} {len} {c:?}");
                assert_eq!((c.at.0 + c.len) % 512, 0);
            }
            assert!(!g.can_describe_compressed(HostOffset(0), g.cluster_size() + 1));
            assert!(!g.can_describe_compressed(HostOffset(u64::MAX), 1));
        }
    }

    #[test]
    fn refcounts_of_every_width() {
        for order in 0..=6 {
            let g = Geometry::new(3, 9, order, false, false).unwrap();
            let mut block = vec![0u8; 512];
            let n = g.refcount_block_entries() as usize;
            assert!(g.set_refcount(&mut block, n - 1, g.refcount_max()));
            assert!(g.set_refcount(&mut block, 1, 1));
            assert_eq!(g.refcount(&block, n - 1), Some(g.refcount_max()));
            assert_eq!(g.refcount(&block, 0), Some(0));
            assert_eq!(g.refcount(&block, 1), Some(1));
            assert_eq!(g.refcount(&block, n), None);
            assert!(!g.set_refcount(&mut block, n, 1));
            assert!(order == 6 || !g.set_refcount(&mut block, 0, g.refcount_max() + 1));
        }
        let g1 = Geometry::new(3, 9, 0, false, false).unwrap();
        let mut block = vec![0u8; 512];
        g1.set_refcount(&mut block, 3, 1);
        assert_eq!(block[0], 8, "the first refcount is in the lowest bits");
    }

    #[test]
    fn subcluster_runs() {
        let b = SubclusterBitmap::default().with(4, 8, Subcluster::Allocated).with(8, 32, Subcluster::Zero);
        assert_eq!(b.run(0), (Subcluster::Unallocated, 4));
        assert_eq!(b.run(5), (Subcluster::Allocated, 3));
        assert_eq!(b.run(9), (Subcluster::Zero, 23));
        assert_eq!(b.with(0, 32, Subcluster::Zero), SubclusterBitmap::ALL_ZERO);
    }
}
