//! The image header: parsing with every field checked, and writing.
//!
//! What must stay true: [`Header::parse`] accepts nothing that later code would have to doubt (offsets aligned, tables
//! within their limits, the L1 table large enough for the disk); whatever it accepted, [`Header::encode`] writes
//! back so that parsing gives the same again, with extensions and header fields that this program does not know kept as they
//! were. Where the reference daemon has a text for a refusal, the sentence starts with that text (clients match on it) and
//! the field and its value follow in parentheses.
//!
//! All fields that change while an image is in use lie in its first 104 bytes, thus in one 512-byte sector: the `patch_*`
//! functions give the few bytes to write, so that a torn write cannot mix old and new.

mod extension;
mod patch;
mod valid;

pub use extension::{BitmapDirectory, Extension, feature_names};
pub(crate) use extension::{backing_place, extensions_end, set_backing_place};

use crate::types::{Geometry, HostOffset, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
use block::{BlockError, Result};
use extension::{encode_extension, parse_extensions};
use valid::{backing_bounds, check_features, check_sizes, parse_backing};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// First four bytes of an image.
pub const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
/// Bytes to read before anything is known of an image: all fields of today's longest header.
pub const PROBE_LEN: u64 = 112;
/// Bytes of a version 2 header.
pub const V2_LEN: u32 = 72;
/// Bytes of the shortest version 3 header.
pub const V3_MIN_LEN: u32 = 104;
/// Bytes of the version 3 header that is written for new images.
pub const V3_LEN: u32 = 112;
/// Largest L1 table: 32 MiB, as the reference allows (memory is taken for it on opening).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table: 8 MiB, likewise.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65_536;
/// Longest backing file name.
pub const MAX_BACKING_NAME: u32 = 1023;
/// Longest backing format name (the reference's buffer is 16 bytes with a terminator).
pub const MAX_BACKING_FORMAT: usize = 15;
/// Most persistent bitmaps.
pub const MAX_BITMAPS: u32 = 65_535;
/// Largest bitmap directory: as many bitmaps with entries of at most 1024 bytes.
pub const MAX_BITMAP_DIRECTORY: u64 = MAX_BITMAPS as u64 * 1024;

/// Incompatible: refcounts may be stale (lazy refcounts, not closed).
pub const INCOMPAT_DIRTY: u64 = 1;
/// Incompatible: metadata was found broken; only for reading until repaired.
pub const INCOMPAT_CORRUPT: u64 = 1 << 1;
/// Incompatible: guest data is in an external file.
pub const INCOMPAT_DATA_FILE: u64 = 1 << 2;
/// Incompatible: a compression type other than zlib.
pub const INCOMPAT_COMPRESSION: u64 = 1 << 3;
/// Incompatible: extended L2 entries.
pub const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
const INCOMPAT_KNOWN: u64 = (1 << 5) - 1;
/// Compatible: refcounts may be updated lazily.
pub const COMPAT_LAZY_REFCOUNTS: u64 = 1;
/// Autoclear: the bitmaps extension is up to date.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear: the external data file read as a raw image gives the guest's disk.
pub const AUTOCLEAR_RAW_DATA: u64 = 2;
const AUTOCLEAR_KNOWN: u64 = 3;
/// Autoclear, ours: nobody but a liveblk that keeps the bitmaps elsewhere, too, has written to the image since it had the number
/// in the extension `lbkB`. Whoever does not know the bit clears it before the first change (specification, "autoclear
/// features"); so do we where we do not keep them. The topmost bit, which is the last that the format would use.
pub const AUTOCLEAR_KEPT: u64 = 1 << 63;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
struct Raw {
    magic: U32,
    version: U32,
    backing_offset: U64,
    backing_len: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    snapshot_count: U32,
    snapshots_offset: U64,
    incompatible: U64,
    compatible: U64,
    autoclear: U64,
    refcount_order: U32,
    header_length: U32,
    compression: u8,
    padding: [u8; 7],
}

/// How guest data is encrypted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crypt {
    /// Not at all.
    None,
    /// The old AES-CBC.
    Aes,
    /// LUKS; its header is elsewhere in the file.
    Luks,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Compression {
    /// Raw deflate.
    #[default]
    Zlib,
    /// Zstandard frames.
    Zstd,
}

impl Compression {
    /// The QMP name.
    pub const fn name(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// A parsed header. Offsets and sizes are as checked by [`Header::parse`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// Layout: version, cluster size, refcount width, L2 entry width, external data.
    pub geometry: Geometry,
    /// Length of the guest's disk in bytes, as stored (the reference cuts it to whole 512-byte sectors).
    pub size: u64,
    /// Backing file name, as stored.
    pub backing: Option<String>,
    /// Encryption.
    pub crypt: Crypt,
    /// Entries in the active L1 table.
    pub l1_size: u32,
    /// Where the active L1 table starts.
    pub l1_offset: HostOffset,
    /// Where the refcount table starts.
    pub refcount_table_offset: HostOffset,
    /// Its length in clusters.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub snapshot_count: u32,
    /// Where the snapshot table starts.
    pub snapshots_offset: HostOffset,
    /// Incompatible feature bits; all known.
    pub incompatible: u64,
    /// Compatible feature bits; may have unknown ones.
    pub compatible: u64,
    /// Autoclear feature bits; may have unknown ones, which a writer must clear.
    pub autoclear: u64,
    /// Compression type.
    pub compression: Compression,
    /// Extensions.
    pub extensions: Vec<Extension>,
    /// Bytes of header fields after those known here (between 112 and the header's own length), kept as they are.
    pub later_fields: Vec<u8>,
    /// Length of the header's fields in bytes.
    pub header_length: u32,
}

/// How many bytes of the file [`Header::parse`] wants: one cluster. `first` is the start of the file, at least
/// [`PROBE_LEN`] bytes where the file has them.
///
/// # Errors
/// If this is no qcow2 image or the cluster size is out of bounds.
pub fn first_cluster_len(first: &[u8]) -> Result<u64> {
    let word =
        |at: usize| first.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes);
    if word(0) != MAGIC {
        return Err(BlockError::invalid("Image is not in qcow2 format"));
    }
    let version = word(4);
    if version != 2 && version != 3 {
        return Err(BlockError::unsupported(format!("Unsupported qcow2 version {version}")));
    }
    let bits = word(20);
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
        return Err(BlockError::invalid(format!("Unsupported cluster size: 2^{bits}")));
    }
    Ok(1 << bits)
}

impl Header {
    /// Parses the first cluster of a file (less of it if the file is shorter; the rest counts as zeroes).
    ///
    /// # Errors
    /// The first thing that is wrong, with the field's name and value.
    pub fn parse(first: &[u8]) -> Result<Header> {
        let cluster_size = first_cluster_len(first)?;
        let first = &first[..first.len().min(cluster_size as usize)];
        let mut raw = Raw::new_zeroed();
        let n = first.len().min(size_of::<Raw>());
        raw.as_mut_bytes()[..n].copy_from_slice(&first[..n]);
        let version = raw.version.get();
        let least = if version == 2 { V2_LEN } else { V3_MIN_LEN };
        if (first.len() as u64) < u64::from(least) {
            return Err(BlockError::invalid(format!(
                "qcow2 header too short (the file has {} bytes)",
                first.len()
            )));
        }
        if version == 2 {
            raw.as_mut_bytes()[V2_LEN as usize..].fill(0);
            raw.refcount_order = U32::new(4);
            raw.header_length = U32::new(V2_LEN);
        }
        let header_length = raw.header_length.get();
        if header_length < least {
            return Err(BlockError::invalid(format!(
                "qcow2 header too short (header_length {header_length})"
            )));
        }
        if u64::from(header_length) > cluster_size {
            return Err(BlockError::invalid(format!(
                "qcow2 header exceeds cluster size (header_length {header_length})"
            )));
        }
        if header_length <= V3_MIN_LEN {
            raw.compression = 0;
        }
        let extensions_end = backing_bounds(&raw, cluster_size)?;
        let extensions = parse_extensions(first, header_length as usize, extensions_end)?;
        let geometry = check_features(&raw, &extensions)?;
        check_sizes(&raw, &geometry)?;
        let crypt = match raw.crypt_method.get() {
            0 => Crypt::None,
            1 => Crypt::Aes,
            2 => Crypt::Luks,
            n => return Err(BlockError::unsupported(format!("Unsupported encryption method {n}"))),
        };
        let mut later = first
            .get(V3_LEN as usize..(header_length as usize).min(first.len()))
            .unwrap_or_default()
            .to_vec();
        later.resize((header_length as usize).saturating_sub(V3_LEN as usize), 0);
        let header = Header {
            geometry,
            size: raw.size.get(),
            backing: parse_backing(&raw, first)?,
            crypt,
            l1_size: raw.l1_size.get(),
            l1_offset: HostOffset(raw.l1_offset.get()),
            refcount_table_offset: HostOffset(raw.refcount_table_offset.get()),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            snapshot_count: raw.snapshot_count.get(),
            snapshots_offset: HostOffset(raw.snapshots_offset.get()),
            incompatible: raw.incompatible.get(),
            compatible: raw.compatible.get(),
            autoclear: raw.autoclear.get(),
            compression: if raw.compression == 1 { Compression::Zstd } else { Compression::Zlib },
            extensions,
            later_fields: later,
            header_length,
        };
        header.bitmaps()?;
        Ok(header)
    }

    /// The header as it is to stand at the start of the file: fields, extensions, backing name. Shorter than a cluster;
    /// whoever rewrites a whole header fills the rest of the cluster with zeroes.
    ///
    /// # Errors
    /// If it does not fit in a cluster or a name is too long.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut out = self.encode_front()?;
        if let Some(name) = self.backing_name()? {
            let at = out.len() as u64;
            set_backing_place(&mut out, at, name.len() as u32);
            out.extend_from_slice(name.as_bytes());
        }
        if out.len() as u64 > self.geometry.cluster_size() {
            return Err(self.too_long(out.len()));
        }
        Ok(out)
    }

    /// Fails if a bitmap directory could not be named beside everything else: found out before there is something to store.
    pub(crate) fn check_room_for_bitmaps(&self) -> Result<()> {
        let mut with = self.clone();
        with.set_bitmaps(Some(BitmapDirectory {
            count: 1,
            len: 8,
            at: HostOffset(self.geometry.cluster_size()),
        }));
        if with.encode().is_ok() {
            return Ok(());
        }
        // the names of features are left out where there is no room for them
        with.extensions.retain(|e| !matches!(e, Extension::FeatureNames(_)));
        with.encode().map(|_| ())
    }

    /// The error for a header of `len` bytes.
    pub(crate) fn too_long(&self, len: usize) -> BlockError {
        let text = format!("the header needs {len} bytes, a cluster has {}", self.geometry.cluster_size());
        BlockError::new(block::ErrorKind::NoSpace, text)
    }

    /// The backing name, if it is one that a header can have.
    pub(crate) fn backing_name(&self) -> Result<Option<&str>> {
        let name = self.backing.as_deref().filter(|n| !n.is_empty());
        match name {
            Some(n) if n.len() > MAX_BACKING_NAME as usize => {
                Err(BlockError::invalid(format!("Backing file name too long ({} bytes)", n.len())))
            }
            name => Ok(name),
        }
    }

    /// Fields and extensions up to their end mark, without a backing name and its place.
    pub(crate) fn encode_front(&self) -> Result<Vec<u8>> {
        let g = &self.geometry;
        let mut raw = Raw::new_zeroed();
        raw.magic.set(MAGIC);
        raw.version.set(g.version());
        raw.cluster_bits.set(g.cluster_bits());
        raw.size.set(self.size);
        raw.crypt_method.set(self.crypt as u32);
        raw.l1_size.set(self.l1_size);
        raw.l1_offset.set(self.l1_offset.0);
        raw.refcount_table_offset.set(self.refcount_table_offset.0);
        raw.refcount_table_clusters.set(self.refcount_table_clusters);
        raw.snapshot_count.set(self.snapshot_count);
        raw.snapshots_offset.set(self.snapshots_offset.0);
        raw.incompatible.set(self.incompatible);
        raw.compatible.set(self.compatible);
        raw.autoclear.set(self.autoclear);
        raw.refcount_order.set(g.refcount_order());
        raw.header_length.set(self.header_length);
        raw.compression = self.compression as u8;
        let mut out = raw.as_bytes().to_vec();
        out.extend_from_slice(&self.later_fields);
        out.resize(self.header_length as usize, 0);
        for e in &self.extensions {
            encode_extension(e, &mut out)?;
        }
        out.extend_from_slice(&[0; 8]);
        Ok(out)
    }

    /// Autoclear bits that a program must clear before it changes the image, because it does not know what they promise.
    pub fn unknown_autoclear(&self) -> u64 {
        self.autoclear & !AUTOCLEAR_KNOWN
    }

    /// Whether the disk's refcounts may be stale (needs repair before writing, unless it stays open in lazy mode).
    pub fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPAT_DIRTY != 0
    }

    /// Whether the image is marked corrupt.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & INCOMPAT_CORRUPT != 0
    }

    /// Whether refcounts may be written late.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & COMPAT_LAZY_REFCOUNTS != 0
    }

    /// Whether the external data file is also a raw image of the disk.
    pub fn raw_data(&self) -> bool {
        self.autoclear & AUTOCLEAR_RAW_DATA != 0
    }

    /// Refuses images whose data this program cannot decrypt.
    ///
    /// # Errors
    /// `Unsupported`, naming the method.
    pub fn refuse_encryption(&self) -> Result<()> {
        let name = match self.crypt {
            Crypt::None => return Ok(()),
            Crypt::Aes => "aes",
            Crypt::Luks => "luks",
        };
        Err(BlockError::unsupported(format!("the image is encrypted ('{name}'), which is not supported")))
    }
}

#[cfg(test)]
mod tests;
