//! The header's extensions: what stands between its fields and the backing file's name.
//!
//! What must stay true: those that this program does not know are kept as they were, in their order.

use super::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_KEPT, Header, MAX_BACKING_FORMAT, MAX_BITMAP_DIRECTORY, MAX_BITMAPS, Raw,
};
use crate::types::{HostOffset, MAX_HOST_OFFSET};
use block::{BlockError, Result};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

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
/// Bytes of an entry of the feature name table.
pub(super) const FEATURE_ENTRY: usize = 48;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
struct RawBitmaps {
    count: U32,
    reserved: U32,
    directory_len: U64,
    directory_offset: U64,
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

impl Header {
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

/// A name in the header: up to the first NUL, and text.
pub(super) fn text(bytes: &[u8], what: &str) -> Result<String> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8(bytes[..end].to_vec()).map_err(|e| {
        BlockError::invalid(format!("the {what} is not UTF-8 (at byte {})", e.utf8_error().valid_up_to()))
    })
}

pub(super) fn parse_extensions(first: &[u8], start: usize, end: u64) -> Result<Vec<Extension>> {
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

pub(super) fn encode_extension(e: &Extension, out: &mut Vec<u8>) -> Result<()> {
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
