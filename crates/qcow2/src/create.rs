//! Creation of images, with every option of `blockdev-create` for qcow2 (encryption is refused by name).
//!
//! An image is laid out at once: header, refcount table, refcount blocks, L1 table, and with preallocation the L2 tables
//! and the data clusters, all with refcount 1. What must stay true: until the last step the file has no valid header, so an
//! interrupted creation leaves something that no program takes for an image; the header is written after a barrier, and made
//! durable by another.

use crate::header::{
    AUTOCLEAR_RAW_DATA, COMPAT_LAZY_REFCOUNTS, Compression, Crypt, Extension, Header, INCOMPAT_COMPRESSION,
    INCOMPAT_DATA_FILE, INCOMPAT_EXTENDED_L2, MAX_BACKING_NAME, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES,
    V2_LEN, V3_LEN, feature_names,
};
use crate::storage::Storage;
use crate::types::{
    Geometry, HostOffset, L2Entry, MAX_CLUSTER_BITS, MAX_HOST_OFFSET, MIN_CLUSTER_BITS, SubclusterBitmap,
};
use block::{BlockError, ErrorKind, Prealloc, Result};

/// Cluster size where none is given: 64 KiB.
pub const DEFAULT_CLUSTER_SIZE: u64 = 64 * 1024;
/// Least cluster size with extended L2 entries.
const MIN_EXTENDED_CLUSTER: u64 = 16 * 1024;
/// Largest length of a node in the reference.
const MAX_LENGTH: u64 = 0x7fff_ffff_c000_0000;
/// Table bytes gathered before they are written.
const BATCH: usize = 1 << 20;

/// What to create. Names and meaning as in QMP's BlockdevCreateOptionsQcow2.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Length of the disk in bytes.
    pub size: u64,
    /// 2 or 3 (`v2`, `v3`).
    pub version: u32,
    /// Name of the backing file, as it is to stand in the header.
    pub backing_file: Option<String>,
    /// Its format.
    pub backing_fmt: Option<String>,
    /// Name of the external data file, as it is to stand in the header (the file itself is handed to [`create`]).
    pub data_file: Option<String>,
    /// The data file is to be a raw image by itself.
    pub data_file_raw: bool,
    /// Format of the encryption asked for; always refused.
    pub encrypt: Option<String>,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// What to set aside.
    pub preallocation: Prealloc,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Width of refcounts in bits.
    pub refcount_bits: u64,
    /// How compressed clusters are compressed.
    pub compression_type: Compression,
    /// L2 entries with subclusters.
    pub extended_l2: bool,
}

impl Options {
    /// The defaults for a disk of `size` bytes.
    pub fn new(size: u64) -> Options {
        Options {
            size,
            version: 3,
            backing_file: None,
            backing_fmt: None,
            data_file: None,
            data_file_raw: false,
            encrypt: None,
            cluster_size: DEFAULT_CLUSTER_SIZE,
            preallocation: Prealloc::Off,
            lazy_refcounts: false,
            refcount_bits: 16,
            compression_type: Compression::Zlib,
            extended_l2: false,
        }
    }

    /// Checks everything that does not depend on the files, in the reference's order and words.
    ///
    /// # Errors
    /// `Invalid` or `Unsupported`, with the sentence a QMP client sees in the job.
    pub fn validate(&self) -> Result<Geometry> {
        let bad = |text: &str| Err(BlockError::invalid(text));
        let has_backing = self.backing_file.as_deref().is_some_and(|b| !b.is_empty());
        if !self.size.is_multiple_of(512) {
            return bad("Image size must be a multiple of 512 bytes");
        }
        let sizes = 1u64 << MIN_CLUSTER_BITS..=1 << MAX_CLUSTER_BITS;
        if !sizes.contains(&self.cluster_size) || !self.cluster_size.is_power_of_two() {
            return bad("Cluster size must be a power of two between 512 and 2048k");
        }
        if self.extended_l2 {
            if self.version < 3 {
                return bad(
                    "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
                );
            }
            if self.cluster_size < MIN_EXTENDED_CLUSTER {
                return bad(
                    "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
                );
            }
        }
        if has_backing && self.preallocation != Prealloc::Off && !self.extended_l2 {
            return bad(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            );
        }
        if self.backing_fmt.is_some() && self.backing_file.is_none() {
            return bad("Backing format cannot be used without backing file");
        }
        if let Some(format) = &self.encrypt {
            let text =
                format!("encrypt.format '{format}' is not supported: this daemon does not encrypt images");
            return Err(BlockError::unsupported(text));
        }
        if self.version < 3 && self.lazy_refcounts {
            return bad(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            );
        }
        if self.refcount_bits > 64 || !self.refcount_bits.is_power_of_two() {
            return bad("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if self.version < 3 && self.refcount_bits != 16 {
            return bad(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
            );
        }
        if self.data_file_raw && self.data_file.is_none() {
            return bad("data-file-raw requires data-file");
        }
        if self.data_file_raw && has_backing {
            return bad("Backing file and data-file-raw cannot be used at the same time");
        }
        if self.data_file.is_some() && self.version < 3 {
            return bad(
                "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            );
        }
        if self.compression_type != Compression::Zlib && self.version < 3 {
            return bad(
                "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            );
        }
        if self.size > MAX_LENGTH {
            let text = format!("Could not resize image: offset({}) exceeds maximum({MAX_LENGTH})", self.size);
            return Err(BlockError::from_errno(BlockError::EFBIG).with_message(text));
        }
        let bits = self.cluster_size.trailing_zeros();
        let order = self.refcount_bits.trailing_zeros();
        let data_file = self.data_file.is_some();
        let g = match Geometry::new(self.version, bits, order, self.extended_l2, data_file) {
            Some(g) => g,
            None => return Err(BlockError::invalid(format!("version {} is not supported", self.version))),
        };
        if g.l1_entries_for(self.size) * 8 > MAX_L1_BYTES {
            let text = "Could not resize image: Failed to grow the L1 table: File too large";
            return Err(BlockError::from_errno(BlockError::EFBIG).with_message(text));
        }
        if let Some(name) = self.backing_file.as_deref().filter(|n| n.len() > MAX_BACKING_NAME as usize) {
            return Err(self.cannot_assign(name, BlockError::EINVAL));
        }
        Ok(g)
    }

    fn cannot_assign(&self, name: &str, errno: i32) -> BlockError {
        let format = self.backing_fmt.as_deref().unwrap_or("(null)");
        let reason = block::strerror(errno);
        let text = format!("Could not assign backing file '{name}' with format '{format}': {reason}");
        BlockError::from_errno(errno).with_message(text)
    }

    /// What is set aside: a raw data file needs every guest cluster mapped from the start.
    fn effective_preallocation(&self) -> Prealloc {
        match self.preallocation {
            Prealloc::Off if self.data_file_raw => Prealloc::Metadata,
            p => p,
        }
    }
}

/// Where everything of a new image lies, in clusters.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Layout {
    table: u64,
    table_len: u64,
    blocks_len: u64,
    l1: u64,
    l1_len: u64,
    l1_entries: u64,
    l2: u64,
    l2_len: u64,
    data: u64,
    data_len: u64,
    total: u64,
}

fn lay_out(g: &Geometry, size: u64, prealloc: Prealloc) -> Result<Layout> {
    let l1_entries = g.l1_entries_for(size);
    let l1_len = g.clusters_for(l1_entries * 8);
    let (l2_len, data_len) = match prealloc {
        Prealloc::Off => (0, 0),
        _ => (l1_entries, if g.data_file() { 0 } else { g.clusters_for(size) }),
    };
    let fixed = 1 + l1_len + l2_len + data_len;
    // The refcount blocks count themselves and the table: add until they suffice.
    let (mut table_len, mut blocks_len) = (1, 1);
    loop {
        let total = fixed + table_len + blocks_len;
        let blocks = total.div_ceil(g.refcount_block_entries());
        let table = g.clusters_for(blocks * 8);
        if blocks <= blocks_len && table <= table_len {
            break;
        }
        (blocks_len, table_len) = (blocks.max(blocks_len), table.max(table_len));
    }
    let total = fixed + table_len + blocks_len;
    let too_large = table_len * g.cluster_size() > MAX_REFCOUNT_TABLE_BYTES;
    if too_large || total > MAX_HOST_OFFSET >> g.cluster_bits() {
        let text = "Could not resize image: the preallocated image would be too large for its refcount table";
        return Err(BlockError::from_errno(BlockError::EFBIG).with_message(text));
    }
    let l1 = 1 + table_len + blocks_len;
    let l2 = l1 + l1_len;
    let data = l2 + l2_len;
    Ok(Layout { table: 1, table_len, blocks_len, l1, l1_len, l1_entries, l2, l2_len, data, data_len, total })
}

/// Writes a new, empty image over whatever `file` holds. `data` is the external data file, if the options name one; it is
/// only made longer.
///
/// # Errors
/// As [`Options::validate`], or the storage's.
pub async fn create<S: Storage, D: Storage>(file: &S, data: Option<&D>, options: &Options) -> Result<()> {
    let g = options.validate()?;
    let prealloc = options.effective_preallocation();
    let layout = lay_out(&g, options.size, prealloc)?;
    let header = encode_header(options, &g, &layout)?;
    let cluster = |n: u64| n << g.cluster_bits();
    // What somebody set aside for the image stays, unless the image's own clusters would show what was there before.
    let roomy = prealloc == Prealloc::Off && file.len() > cluster(layout.total);
    let kept = roomy
        || match file.resize(0, Prealloc::Off).await {
            // a device keeps its length
            Err(e) if e.kind() == ErrorKind::Unsupported => true,
            other => other.map(|()| false)?,
        };
    if kept {
        // no old header may survive at its start
        file.write(0, &vec![0; g.cluster_size() as usize]).await?;
        file.barrier().await?;
    }
    // Metadata is this format's own: to the files below it means nothing.
    let below = if prealloc == Prealloc::Metadata { Prealloc::Off } else { prealloc };
    let for_file = if g.data_file() { Prealloc::Off } else { below };
    if !kept || file.len() < cluster(layout.total) {
        let context = "Could not resize image: Failed to resize underlying file";
        file.resize(cluster(layout.total), for_file).await.map_err(|e| e.context(context))?;
    }
    write_refcounts(file, &g, &layout).await?;
    write_mappings(file, &g, &layout, options).await?;
    if let Some(data) = data
        && data.len() < options.size
    {
        let context = "Could not resize image: Failed to resize data file";
        data.resize(options.size, below).await.map_err(|e| e.context(context))?;
        data.barrier().await?;
    }
    file.barrier().await?;
    let mut first = header;
    first.resize(g.cluster_size() as usize, 0);
    file.write(0, &first).await?;
    file.barrier().await
}

fn encode_header(options: &Options, g: &Geometry, layout: &Layout) -> Result<Vec<u8>> {
    let mut extensions = Vec::new();
    let backing = options.backing_file.clone().filter(|b| !b.is_empty());
    if let (Some(f), Some(_)) = (&options.backing_fmt, &backing) {
        extensions.push(Extension::BackingFormat(f.clone()));
    }
    if let Some(name) = options.data_file.as_ref().filter(|n| !n.is_empty()) {
        extensions.push(Extension::DataFile(name.clone()));
    }
    let bit = |on: bool, bit: u64| if on { bit } else { 0 };
    let mut header = Header {
        geometry: *g,
        size: options.size,
        backing,
        crypt: Crypt::None,
        l1_size: layout.l1_entries as u32,
        l1_offset: HostOffset(if layout.l1_entries == 0 { 0 } else { layout.l1 << g.cluster_bits() }),
        refcount_table_offset: HostOffset(layout.table << g.cluster_bits()),
        refcount_table_clusters: layout.table_len as u32,
        snapshot_count: 0,
        snapshots_offset: HostOffset(0),
        incompatible: bit(g.data_file(), INCOMPAT_DATA_FILE)
            | bit(options.compression_type != Compression::Zlib, INCOMPAT_COMPRESSION)
            | bit(g.extended_l2(), INCOMPAT_EXTENDED_L2),
        compatible: bit(options.lazy_refcounts, COMPAT_LAZY_REFCOUNTS),
        autoclear: bit(options.data_file_raw, AUTOCLEAR_RAW_DATA),
        compression: options.compression_type,
        extensions,
        later_fields: Vec::new(),
        header_length: if g.version() < 3 { V2_LEN } else { V3_LEN },
    };
    if g.version() >= 3 {
        header.extensions.push(feature_names());
    }
    if let Ok(bytes) = header.encode() {
        return Ok(bytes);
    }
    // The names of features are a courtesy; with 512-byte clusters a backing file name may need their room.
    header.extensions.retain(|e| !matches!(e, Extension::FeatureNames(_)));
    header.encode().map_err(|e| match (&options.backing_file, e.kind()) {
        (Some(name), ErrorKind::NoSpace) => options.cannot_assign(name, BlockError::ENOSPC),
        _ => e,
    })
}

/// Gathers what is written one after the other.
struct Run<'a, S> {
    file: &'a S,
    at: u64,
    bytes: Vec<u8>,
}

impl<S: Storage> Run<'_, S> {
    async fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() >= BATCH { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<()> {
        if !self.bytes.is_empty() {
            self.file.write(self.at, &self.bytes).await?;
            self.at += self.bytes.len() as u64;
            self.bytes.clear();
        }
        Ok(())
    }
}

async fn write_refcounts<S: Storage>(file: &S, g: &Geometry, layout: &Layout) -> Result<()> {
    let cluster = |n: u64| n << g.cluster_bits();
    let mut run = Run { file, at: cluster(layout.table), bytes: Vec::new() };
    let mut table = vec![0; cluster(layout.table_len) as usize];
    for (i, entry) in table.as_chunks_mut::<8>().0.iter_mut().take(layout.blocks_len as usize).enumerate() {
        *entry = cluster(layout.table + layout.table_len + i as u64).to_be_bytes();
    }
    run.put(&table).await?;
    let mut full = vec![0; g.cluster_size() as usize];
    (0..g.refcount_block_entries() as usize).for_each(|i| {
        g.set_refcount(&mut full, i, 1);
    });
    for i in 0..layout.blocks_len {
        let counted = layout.total.saturating_sub(i << g.refcount_block_bits());
        if counted >= g.refcount_block_entries() {
            run.put(&full).await?;
            continue;
        }
        let mut block = vec![0; g.cluster_size() as usize];
        (0..counted as usize).for_each(|i| {
            g.set_refcount(&mut block, i, 1);
        });
        run.put(&block).await?;
    }
    run.flush().await
}

/// The L1 table and, with preallocation, the L2 tables.
async fn write_mappings<S: Storage>(
    file: &S,
    g: &Geometry,
    layout: &Layout,
    options: &Options,
) -> Result<()> {
    let cluster = |n: u64| n << g.cluster_bits();
    let mut l1 = vec![0; cluster(layout.l1_len) as usize];
    for (i, entry) in l1.as_chunks_mut::<8>().0.iter_mut().take(layout.l2_len as usize).enumerate() {
        *entry = g.encode_l1(HostOffset(cluster(layout.l2 + i as u64)), true).to_be_bytes();
    }
    let mut run = Run { file, at: cluster(layout.l1), bytes: Vec::new() };
    run.put(&l1).await?;
    let clusters = g.clusters_for(options.size);
    let mut table = Vec::with_capacity(g.cluster_size() as usize);
    for i in 0..layout.l2_len {
        table.clear();
        let first = i << g.l2_bits();
        for n in first..clusters.min(first + g.l2_entries()) {
            // In a data file every guest cluster has its own place.
            let host = HostOffset(cluster(if g.data_file() { n } else { layout.data + n }));
            let entry = if g.extended_l2() && !options.data_file_raw {
                // Space is there, but nothing is stored: a backing file stays visible.
                L2Entry::Subclusters { host: Some(host), copied: true, bits: SubclusterBitmap::default() }
            } else {
                L2Entry::Data { host, copied: true }
            };
            let (raw, bits) = g.encode_l2(entry);
            table.extend_from_slice(&raw.to_be_bytes());
            if g.extended_l2() {
                table.extend_from_slice(&bits.to_be_bytes());
            }
        }
        table.resize(g.cluster_size() as usize, 0);
        run.put(&table).await?;
    }
    run.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_cover_themselves() {
        for bits in [9, 12, 16, 21] {
            for order in 0..=6 {
                let g = Geometry::new(3, bits, order, false, false).unwrap();
                for size in [0, 512, 1 << 20, 5 << 30] {
                    for prealloc in [Prealloc::Off, Prealloc::Metadata] {
                        let Ok(l) = lay_out(&g, size, prealloc) else {
                            assert!(bits == 9 && size > 1 << 30, "{bits} {order} {size}");
                            continue;
                        };
                        assert!(l.blocks_len * g.refcount_block_entries() >= l.total);
                        assert!(l.table_len * g.cluster_size() >= l.blocks_len * 8);
                        assert_eq!(l.data + l.data_len, l.total);
                    }
                }
            }
        }
    }

    #[test]
    fn wrong_options_are_refused_in_the_reference_words() {
        let o = || Options::new(1 << 20);
        let v2 = || Options { version: 2, ..o() };
        let backing = || Options { backing_file: Some("b".into()), backing_fmt: Some("raw".into()), ..o() };
        let cases = [
            (Options::new(1000), "Image size must be a multiple of 512 bytes"),
            (
                Options { cluster_size: 256, ..o() },
                "Cluster size must be a power of two between 512 and 2048k",
            ),
            (
                Options { cluster_size: 4 << 20, ..o() },
                "Cluster size must be a power of two between 512 and 2048k",
            ),
            (
                Options { cluster_size: 12345, ..o() },
                "Cluster size must be a power of two between 512 and 2048k",
            ),
            (
                Options { refcount_bits: 3, ..o() },
                "Refcount width must be a power of two and may not exceed 64 bits",
            ),
            (
                Options { refcount_bits: 128, ..o() },
                "Refcount width must be a power of two and may not exceed 64 bits",
            ),
            (
                Options { refcount_bits: 8, ..v2() },
                "Different refcount widths than 16 bits require compatibility",
            ),
            (
                Options { lazy_refcounts: true, ..v2() },
                "Lazy refcounts only supported with compatibility level 1.1",
            ),
            (
                Options { extended_l2: true, ..v2() },
                "Extended L2 entries are only supported with compatibility level",
            ),
            (
                Options { extended_l2: true, cluster_size: 8192, ..o() },
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ),
            (
                Options { compression_type: Compression::Zstd, ..v2() },
                "Non-zlib compression type is only supported",
            ),
            (
                Options { backing_fmt: Some("raw".into()), ..o() },
                "Backing format cannot be used without backing file",
            ),
            (Options { data_file_raw: true, ..o() }, "data-file-raw requires data-file"),
            (
                Options { data_file: Some("d".into()), ..v2() },
                "External data files are only supported with compat",
            ),
            (
                Options { data_file: Some("d".into()), data_file_raw: true, ..backing() },
                "Backing file and data-file-raw cannot be used at the same time",
            ),
            (
                Options { preallocation: Prealloc::Metadata, ..backing() },
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            ),
            (Options { encrypt: Some("luks".into()), ..o() }, "encrypt.format 'luks' is not supported"),
            (Options::new(1 << 62), "Could not resize image: Failed to grow the L1 table: File too large"),
            (
                Options::new((1 << 63) - 512),
                "Could not resize image: offset(9223372036854775296) exceeds maximum(9223372035781033984)",
            ),
            (
                Options { backing_file: Some("x".repeat(1024)), ..backing() },
                &format!(
                    "Could not assign backing file '{}' with format 'raw': Invalid argument",
                    "x".repeat(1024)
                ),
            ),
        ];
        for (options, text) in cases {
            let e = options.validate().expect_err(text);
            assert!(e.message().starts_with(text), "{text}\n{e}");
        }
        assert!(Options::new(128 << 40).validate().is_ok());
        assert!(Options { cluster_size: 2 << 20, ..Options::new(1 << 57) }.validate().is_ok());
    }
}
