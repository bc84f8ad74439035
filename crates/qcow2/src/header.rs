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

use crate::types::{
    Geometry, HostOffset, MAX_CLUSTER_BITS, MAX_HOST_OFFSET, MIN_CLUSTER_BITS, MIN_SUBCLUSTER_BITS,
};
use block::{BlockError, Result};
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
/// in the extension [`EXT_KEPT`]. Whoever does not know the bit clears it before the first change (specification, "autoclear
/// features"); so do we where we do not keep them. The topmost bit, which is the last that the format would use.
pub const AUTOCLEAR_KEPT: u64 = 1 << 63;
/// Our extension ("lbkB"): a number of 16 bytes.
const EXT_KEPT: u32 = u32::from_be_bytes(*b"lbkB");

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_CRYPTO: u32 = 0x0537_be77;
const EXT_DATA_FILE: u32 = 0x4441_5441;

/// The feature name table written into new images: (kind, bit, name).
const FEATURES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];
const FEATURE_ENTRY: usize = 48;

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

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
struct RawBitmaps {
    count: U32,
    reserved: U32,
    directory_len: U64,
    directory_offset: U64,
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

/// Place of the persistent bitmaps' directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BitmapDirectory {
    /// Number of bitmaps.
    pub count: u32,
    /// Bytes of the directory.
    pub len: u64,
    /// Where it starts.
    pub at: HostOffset,
}

/// One header extension. The order in the header is kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Extension {
    /// Name of the backing file's format.
    BackingFormat(String),
    /// Names of feature bits, as stored (48 bytes each).
    FeatureNames(Vec<u8>),
    /// Name of the external data file.
    DataFile(String),
    /// Place of the bitmap directory, as stored (24 bytes). Valid only with [`AUTOCLEAR_BITMAPS`].
    Bitmaps(Vec<u8>),
    /// Place of the LUKS header.
    Crypto {
        /// Where it starts.
        at: HostOffset,
        /// Its bytes.
        len: u64,
    },
    /// Something else: (type, data).
    Unknown(u32, Vec<u8>),
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

    /// The backing format's name.
    pub fn backing_format(&self) -> Option<&str> {
        self.extensions.iter().find_map(|e| match e {
            Extension::BackingFormat(f) => Some(f.as_str()),
            _ => None,
        })
    }

    /// Sets both backing strings (`None`: no backing file, no format).
    pub fn set_backing(&mut self, name: Option<&str>, format: Option<&str>) {
        self.backing = name.filter(|n| !n.is_empty()).map(str::to_owned);
        let at = self.extensions.iter().position(|e| matches!(e, Extension::BackingFormat(_)));
        self.extensions.retain(|e| !matches!(e, Extension::BackingFormat(_)));
        if let (Some(f), true) = (format.filter(|f| !f.is_empty()), self.backing.is_some()) {
            self.extensions.insert(at.unwrap_or(0), Extension::BackingFormat(f.to_owned()));
        }
    }

    /// The external data file's name.
    pub fn data_file(&self) -> Option<&str> {
        self.extensions.iter().find_map(|e| match e {
            Extension::DataFile(f) => Some(f.as_str()),
            _ => None,
        })
    }

    /// The bitmap directory, if there is one and it is up to date.
    ///
    /// # Errors
    /// If its extension is malformed.
    pub fn bitmaps(&self) -> Result<Option<BitmapDirectory>> {
        let found = self.extensions.iter().find_map(|e| match e {
            Extension::Bitmaps(b) => Some(b),
            _ => None,
        });
        let (Some(bytes), true) = (found, self.autoclear & AUTOCLEAR_BITMAPS != 0) else { return Ok(None) };
        let bad = |text: String| Err(BlockError::invalid(text));
        let Ok(b) = RawBitmaps::read_from_bytes(bytes) else {
            return bad(format!("bitmaps_ext: Invalid extension length ({})", bytes.len()));
        };
        let (count, len, at) = (b.count.get(), b.directory_len.get(), b.directory_offset.get());
        if b.reserved.get() != 0 {
            return bad(format!("bitmaps_ext: Reserved field is not zero ({:#x})", b.reserved.get()));
        }
        if count > MAX_BITMAPS {
            return bad(format!(
                "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
            ));
        }
        if count == 0 {
            return bad("found bitmaps extension with zero bitmaps".to_owned());
        }
        if at == 0 || self.geometry.in_cluster(at) != 0 || at > MAX_HOST_OFFSET {
            return bad(format!("bitmaps_ext: invalid bitmap directory offset ({at:#x})"));
        }
        if len > MAX_BITMAP_DIRECTORY {
            return bad(format!(
                "bitmaps_ext: bitmap directory size ({len}) exceeds the maximum supported size ({MAX_BITMAP_DIRECTORY})"
            ));
        }
        if len == 0 {
            return bad("Requested bitmap directory size is zero".to_owned());
        }
        Ok(Some(BitmapDirectory { count, len, at: HostOffset(at) }))
    }

    /// The number that [`AUTOCLEAR_KEPT`] vouches for.
    pub fn kept_number(&self) -> Option<[u8; 16]> {
        let found = self.extensions.iter().find_map(|e| match e {
            Extension::Unknown(EXT_KEPT, data) => data.as_slice().try_into().ok(),
            _ => None,
        });
        found.filter(|_| self.autoclear & AUTOCLEAR_KEPT != 0)
    }

    /// Sets the number, and the bit that vouches for it.
    pub(crate) fn set_kept_number(&mut self, number: [u8; 16]) {
        self.extensions.retain(|e| !matches!(e, Extension::Unknown(EXT_KEPT, _)));
        self.extensions.push(Extension::Unknown(EXT_KEPT, number.to_vec()));
        self.autoclear |= AUTOCLEAR_KEPT;
    }

    /// Sets or removes the bitmap directory, and the autoclear bit that says it is up to date.
    pub fn set_bitmaps(&mut self, directory: Option<BitmapDirectory>) {
        self.extensions.retain(|e| !matches!(e, Extension::Bitmaps(_)));
        self.autoclear &= !AUTOCLEAR_BITMAPS;
        if let Some(d) = directory {
            let raw = RawBitmaps {
                count: U32::new(d.count),
                reserved: U32::ZERO,
                directory_len: U64::new(d.len),
                directory_offset: U64::new(d.at.0),
            };
            self.extensions.push(Extension::Bitmaps(raw.as_bytes().to_vec()));
            self.autoclear |= AUTOCLEAR_BITMAPS;
        }
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

/// The feature name table of a new image.
pub fn feature_names() -> Extension {
    let mut table = vec![0; FEATURES.len() * FEATURE_ENTRY];
    for (entry, (kind, bit, name)) in table.chunks_exact_mut(FEATURE_ENTRY).zip(FEATURES) {
        entry[0] = kind;
        entry[1] = bit;
        entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
    }
    Extension::FeatureNames(table)
}

/// Where the extensions end: at the backing file name, or the end of the cluster.
fn backing_bounds(raw: &Raw, cluster_size: u64) -> Result<u64> {
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

fn parse_backing(raw: &Raw, first: &[u8]) -> Result<Option<String>> {
    let (at, len) = (raw.backing_offset.get() as usize, raw.backing_len.get() as usize);
    if at == 0 || len == 0 {
        return Ok(None);
    }
    let Some(name) = first.get(at..).and_then(|b| b.get(..len)) else {
        return Err(BlockError::invalid(format!("the file ends inside the backing file name (at {at:#x})")));
    };
    Ok(Some(text(name, "backing file name")?).filter(|n| !n.is_empty()))
}

/// A name in the header: up to the first NUL, and text.
fn text(bytes: &[u8], what: &str) -> Result<String> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8(bytes[..end].to_vec()).map_err(|e| {
        BlockError::invalid(format!("the {what} is not UTF-8 (at byte {})", e.utf8_error().valid_up_to()))
    })
}

fn parse_extensions(first: &[u8], start: usize, end: u64) -> Result<Vec<Extension>> {
    let mut out = Vec::new();
    let mut at = start;
    let end = end as usize;
    while at < end {
        let word =
            |at: usize| first.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes);
        let (kind, len) = (word(at), word(at + 4) as usize);
        if kind == EXT_END {
            break;
        }
        at += 8;
        let data = (at <= end && len <= end - at).then(|| first.get(at..at + len)).flatten();
        let Some(data) = data else {
            return Err(BlockError::invalid(format!(
                "Header extension too large (type {kind:#010x}, length {len}, at {:#x})",
                at - 8
            )));
        };
        out.push(match kind {
            EXT_BACKING_FORMAT if len > MAX_BACKING_FORMAT => {
                return Err(BlockError::invalid(format!(
                    "ERROR: ext_backing_format: len={len} too large (>=16)"
                )));
            }
            EXT_BACKING_FORMAT => Extension::BackingFormat(text(data, "backing format")?),
            EXT_FEATURE_NAMES => Extension::FeatureNames(data.to_vec()),
            EXT_DATA_FILE => Extension::DataFile(text(data, "data file name")?),
            EXT_BITMAPS => Extension::Bitmaps(data.to_vec()),
            EXT_CRYPTO => match <[U64; 2]>::read_from_bytes(data) {
                Ok([at, len]) => Extension::Crypto { at: HostOffset(at.get()), len: len.get() },
                Err(_) => {
                    return Err(BlockError::invalid(format!("CRYPTO header extension size {len} is not 16")));
                }
            },
            _ => Extension::Unknown(kind, data.to_vec()),
        });
        // Padded to 8 bytes, the last one perhaps not (the bounds above are what counts).
        at += len.next_multiple_of(8);
    }
    Ok(out)
}

/// Lets the fields of an encoded header say where the backing name is.
pub(crate) fn set_backing_place(front: &mut [u8], at: u64, len: u32) {
    front[8..16].copy_from_slice(&at.to_be_bytes());
    front[16..20].copy_from_slice(&len.to_be_bytes());
}

/// Where the backing name of an encoded header is; of none, nothing at 0.
pub(crate) fn backing_place(first: &[u8]) -> std::ops::Range<usize> {
    let mut raw = Raw::new_zeroed();
    let n = first.len().min(size_of::<Raw>());
    raw.as_mut_bytes()[..n].copy_from_slice(&first[..n]);
    // Without a place there is no name, whatever its length is said to be; and none goes on behind the header's cluster.
    let at = usize::try_from(raw.backing_offset.get()).unwrap_or(0).min(first.len());
    let len = if at == 0 { 0 } else { raw.backing_len.get() as usize };
    at..at.saturating_add(len).min(first.len())
}

/// Where the extensions of an encoded, valid header end, with their end mark.
pub(crate) fn extensions_end(first: &[u8], header: &Header) -> usize {
    let place = backing_place(first);
    let limit = if place.start == 0 { first.len() } else { place.start.min(first.len()) };
    let mut at = header.header_length as usize;
    while at + 8 <= limit {
        let word = |at: usize| u32::from_be_bytes([first[at], first[at + 1], first[at + 2], first[at + 3]]);
        let (kind, len) = (word(at), word(at + 4) as usize);
        at += 8;
        if kind == EXT_END {
            break;
        }
        at = at.saturating_add(len.next_multiple_of(8));
    }
    at.min(limit)
}

fn encode_extension(e: &Extension, out: &mut Vec<u8>) -> Result<()> {
    let mut put = |kind: u32, data: &[u8]| {
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(8), 0);
    };
    match e {
        Extension::BackingFormat(f) if f.len() > MAX_BACKING_FORMAT => {
            return Err(BlockError::invalid(format!(
                "the backing format's name is too long ({} bytes)",
                f.len()
            )));
        }
        Extension::BackingFormat(f) => put(EXT_BACKING_FORMAT, f.as_bytes()),
        Extension::FeatureNames(t) => put(EXT_FEATURE_NAMES, t),
        Extension::DataFile(f) => put(EXT_DATA_FILE, f.as_bytes()),
        Extension::Bitmaps(b) => put(EXT_BITMAPS, b),
        Extension::Crypto { at, len } => put(EXT_CRYPTO, [U64::new(at.0), U64::new(*len)].as_bytes()),
        Extension::Unknown(kind, data) => put(*kind, data),
    }
    Ok(())
}

/// Checks the feature words and the layout they say.
fn check_features(raw: &Raw, extensions: &[Extension]) -> Result<Geometry> {
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
fn check_sizes(raw: &Raw, g: &Geometry) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header {
            geometry: Geometry::new(3, 16, 4, false, false).unwrap(),
            size: 64 << 20,
            backing: Some("base.raw".into()),
            crypt: Crypt::None,
            l1_size: 1,
            l1_offset: HostOffset(0x30000),
            refcount_table_offset: HostOffset(0x10000),
            refcount_table_clusters: 1,
            snapshot_count: 0,
            snapshots_offset: HostOffset(0),
            incompatible: 0,
            compatible: COMPAT_LAZY_REFCOUNTS | 1 << 40,
            autoclear: 0,
            compression: Compression::Zlib,
            extensions: vec![
                Extension::BackingFormat("raw".into()),
                Extension::Unknown(0x1234_5678, vec![1, 2, 3]),
                feature_names(),
            ],
            later_fields: vec![],
            header_length: V3_LEN,
        }
    }

    fn edit(at: usize, bytes: &[u8]) -> Result<Header> {
        let mut b = sample().encode().unwrap();
        b[at..at + bytes.len()].copy_from_slice(bytes);
        Header::parse(&b)
    }

    #[test]
    fn what_is_written_is_parsed_the_same() {
        let mut h = sample();
        assert_eq!(Header::parse(&h.encode().unwrap()).unwrap(), h);
        h.later_fields = vec![7; 16];
        h.header_length = V3_LEN + 16;
        h.set_backing(None, Some("raw"));
        h.set_bitmaps(Some(BitmapDirectory { count: 3, len: 100, at: HostOffset(0x70000) }));
        h.extensions.push(Extension::Crypto { at: HostOffset(5), len: 6 });
        let again = Header::parse(&h.encode().unwrap()).unwrap();
        assert_eq!(again, h);
        assert_eq!(again.backing_format(), None);
        assert_eq!(again.bitmaps().unwrap().unwrap().count, 3);
        let mut v2 = sample();
        v2.geometry = Geometry::new(2, 16, 4, false, false).unwrap();
        v2.header_length = V2_LEN;
        v2.compatible = 0;
        assert_eq!(Header::parse(&v2.encode().unwrap()).unwrap(), v2);
    }

    #[test]
    fn each_field_is_checked_with_the_reference_text() {
        let u32b = |n: u32| n.to_be_bytes().to_vec();
        let u64b = |n: u64| n.to_be_bytes().to_vec();
        let cases: Vec<(usize, Vec<u8>, &str)> = vec![
            (0, u32b(5), "Image is not in qcow2 format"),
            (4, u32b(4), "Unsupported qcow2 version 4"),
            (20, u32b(8), "Unsupported cluster size: 2^8"),
            (20, u32b(63), "Unsupported cluster size: 2^63"),
            (8, u64b(70_000), "Invalid backing file offset"),
            (16, u32b(1024), "Backing file name too long"),
            (8, u64b(65_530), "Backing file name too long"),
            (24, u64b(1 << 63), "Image is too big"),
            (24, u64b(1 << 33), "L1 table is too small"),
            (32, u32b(3), "Unsupported encryption method 3"),
            (36, u32b((4 << 20) + 1), "Active L1 table too large"),
            (40, u64b(0x30008), "Active L1 table offset invalid"),
            (40, u64b(0xffff_ffff_ffff_0000), "Active L1 table offset invalid"),
            (48, u64b(0x10200), "Reference count table offset invalid"),
            (56, u32b(0), "Image does not contain a reference count table"),
            (56, u32b(129), "Reference count table too large"),
            (60, u32b(65_537), "Snapshot table too large"),
            (64, u64b(0x123), "Snapshot table offset invalid"),
            (72, u64b(32), "Unsupported qcow2 feature(s): Unknown incompatible feature: 20"),
            (72, u64b(8), "qcow2: Compression type incompatible feature bit must not be set"),
            (104, vec![1], "qcow2: Compression type incompatible feature bit must be set"),
            (104, vec![2], "qcow2: unknown compression type: 2"),
            (88, u64b(2), "data-file-raw requires a data file"),
            (96, u32b(7), "Reference count entry width too large; may not exceed 64 bits"),
            (100, u32b(103), "qcow2 header too short"),
            (100, u32b(65_544), "qcow2 header exceeds cluster size"),
            (116, u32b(0x7fff_ffff), "Header extension too large"),
            (116, u32b(16), "ERROR: ext_backing_format: len=16 too large (>=16)"),
        ];
        for (at, bytes, text) in cases {
            let e = edit(at, &bytes).expect_err(text);
            assert!(e.message().starts_with(text), "{text}: {e}");
        }
        assert!(edit(36, &u32b(4 << 20)).is_ok(), "an L1 table of 32 MiB is allowed");
        assert!(edit(56, &u32b(128)).is_ok(), "a refcount table of 8 MiB is allowed");
    }

    #[test]
    fn unknown_features_are_named_from_the_image() {
        let mut h = sample();
        let mut table = vec![0; 48];
        table[1] = 5;
        table[2..8].copy_from_slice(b"sparks");
        h.extensions.push(Extension::FeatureNames(table));
        h.incompatible = 1 << 5 | 1 << 63;
        let e = Header::parse(&h.encode().unwrap()).unwrap_err();
        assert_eq!(
            e.message(),
            "Unsupported qcow2 feature(s): sparks, Unknown incompatible feature: 8000000000000000"
        );
    }

    #[test]
    fn any_prefix_and_any_byte_is_survived() {
        let good = sample().encode().unwrap();
        for n in 0..good.len() {
            let _ = Header::parse(&good[..n]);
        }
        for at in 0..good.len() {
            for v in [0, 1, 0x7f, 0x80, 0xff] {
                let mut b = good.clone();
                b[at] = v;
                if let Ok(h) = Header::parse(&b) {
                    // Accepted means it can be written and read again; a full cluster may not have room for that.
                    if let Ok(out) = h.encode() {
                        assert!(Header::parse(&out).unwrap() == h, "byte {at} = {v}");
                    }
                }
            }
        }
    }

    #[test]
    fn patches_are_what_encode_writes() {
        let mut h = sample();
        h.l1_size = 77;
        h.l1_offset = HostOffset(0x90000);
        h.refcount_table_offset = HostOffset(0xa0000);
        h.refcount_table_clusters = 2;
        h.size = 1 << 30;
        h.incompatible = INCOMPAT_DIRTY;
        let all = h.encode().unwrap();
        let same = |(at, b): (u64, &[u8])| assert_eq!(&all[at as usize..at as usize + b.len()], b, "at {at}");
        same((h.patch_l1().0, &h.patch_l1().1));
        same((h.patch_refcount_table().0, &h.patch_refcount_table().1));
        same((h.patch_size().0, &h.patch_size().1));
        same((h.patch_snapshots().0, &h.patch_snapshots().1));
        same((h.patch_features().0, &h.patch_features().1));
    }
}
