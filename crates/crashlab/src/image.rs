//! A crash state in memory: flat bytes that are changed and changed back, and a reader of the guest's disk that shares
//! nothing with the driver but the decoding of entries.

use block::{BlockError, Result};
use qcow2::check::read_header;
use qcow2::header::{Compression, Header};
use qcow2::storage::now;
use qcow2::types::{Geometry, GuestOffset, L2Entry, Subcluster};
use sim::Effect;
use std::io::Read;

/// A file's bytes.
#[derive(Clone, Default)]
pub struct Flat(pub Vec<u8>);

/// What to do to take a change back.
pub struct Undo {
    at: usize,
    old: Vec<u8>,
    len: usize,
}

impl Flat {
    /// Carries out a change.
    pub fn apply(&mut self, effect: &Effect) -> Undo {
        let len = self.0.len();
        let (at, end, grow) = match effect {
            Effect::Write { offset, data } => (*offset as usize, *offset as usize + data.len(), true),
            Effect::Zero { at, .. } => (at.start as usize, (at.end() as usize).min(len), false),
            Effect::Allocate(at) => (len, at.end() as usize, true),
            Effect::SetLen(n) => (*n as usize, len, false),
        };
        let undo = Undo {
            at: at.min(len),
            old: self.0.get(at.min(len)..end.clamp(at.min(len), len)).unwrap_or_default().to_vec(),
            len,
        };
        if let Effect::SetLen(n) = effect {
            self.0.resize(*n as usize, 0);
        }
        if grow && self.0.len() < end {
            self.0.resize(end, 0);
        }
        match effect {
            Effect::Write { data, .. } => data.copy_to(&mut self.0[at..end]),
            Effect::Zero { .. } if at < end => self.0[at..end].fill(0),
            _ => (),
        }
        undo
    }

    /// Takes the last change back (in reverse order of their application).
    pub fn undo(&mut self, undo: &Undo) {
        self.0.resize(undo.len, 0);
        self.0[undo.at..undo.at + undo.old.len()].copy_from_slice(&undo.old);
    }
}

/// What a guest reads from an image (and its data file, and the layer below).
pub struct Guest<'a> {
    image: &'a [u8],
    data: &'a [u8],
    backing: &'a [u8],
    header: Header,
    g: Geometry,
}

/// Bytes of a sector.
pub const SECTOR: usize = 512;
static ZEROES: [u8; SECTOR] = [0; SECTOR];

impl<'a> Guest<'a> {
    /// Opens. `data` is the external data file's bytes, `backing` those of the layer below.
    ///
    /// # Errors
    /// If the header cannot be parsed.
    pub fn open(image: &'a [u8], data: &'a [u8], backing: &'a [u8]) -> Result<Guest<'a>> {
        let header = now(read_header(&image))?;
        Ok(Guest { image, data, backing, g: header.geometry, header })
    }

    /// Length of the disk.
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// Whether the header says that refcounts are stale.
    pub fn is_dirty(&self) -> bool {
        self.header.is_dirty()
    }

    /// Calls `each` with (sector, its bytes) for the sectors of `wanted` (in order) that are on the disk.
    ///
    /// # Errors
    /// If an entry cannot be right or a compressed cluster cannot be unpacked.
    pub fn sectors(&self, wanted: &[u64], mut each: impl FnMut(u64, &[u8])) -> Result<()> {
        let per_cluster = self.g.cluster_size() / SECTOR as u64;
        let mut i = 0;
        while i < wanted.len() {
            let cluster = wanted[i] / per_cluster;
            let end =
                wanted[i..].iter().position(|s| s / per_cluster != cluster).map_or(wanted.len(), |n| i + n);
            let here = &wanted[i..end];
            i = end;
            let (entry, unpacked) = self.entry(cluster)?;
            for &s in here.iter().filter(|s| (**s + 1) * SECTOR as u64 <= self.header.size) {
                let byte = s * SECTOR as u64;
                let within = self.g.in_cluster(byte);
                let from_host = |bytes: &'a [u8], at: u64| -> &'a [u8] {
                    let at = (at + within) as usize;
                    bytes.get(at..at + SECTOR).unwrap_or(&ZEROES)
                };
                let below = || self.backing.get(byte as usize..byte as usize + SECTOR).unwrap_or(&ZEROES);
                let data = if self.g.data_file() { self.data } else { self.image };
                let bytes = match entry {
                    L2Entry::Unallocated => below(),
                    L2Entry::Zero { .. } => &ZEROES,
                    L2Entry::Data { host, .. } => from_host(data, host.0),
                    L2Entry::Compressed(_) => &unpacked[within as usize..within as usize + SECTOR],
                    L2Entry::Subclusters { host, bits, .. } => {
                        match bits.get(self.g.subcluster_index(GuestOffset(byte))) {
                            Subcluster::Unallocated => below(),
                            Subcluster::Zero => &ZEROES,
                            Subcluster::Allocated => from_host(data, host.map_or(u64::MAX >> 1, |h| h.0)),
                        }
                    }
                };
                each(s, bytes);
            }
        }
        Ok(())
    }

    /// The internal snapshots: name, and what a guest would read there.
    pub fn snapshots(&self) -> Vec<(String, Guest<'a>)> {
        let mut at = self.header.snapshots_offset.0;
        let mut out = Vec::new();
        for _ in 0..self.header.snapshot_count {
            let lengths = self.word(at + 8);
            let (id, name, extra) =
                (lengths >> 16 & 0xffff, lengths & 0xffff, self.word(at + 32) & 0xffff_ffff);
            let start = (at + 40 + extra + id) as usize;
            let text = self.image.get(start..start + name as usize).unwrap_or_default();
            let mut header = self.header.clone();
            header.l1_offset.0 = self.word(at);
            header.l1_size = (lengths >> 32) as u32;
            header.size = self.word(at + 48);
            out.push((String::from_utf8_lossy(text).into_owned(), Guest { header, ..*self }));
            at += (40 + extra + id + name).next_multiple_of(8);
        }
        out
    }

    /// The bitmap of this name: none if the image does not have it, or says that it is not complete; else for each granule
    /// whether it is marked, and bytes a granule.
    ///
    /// # Errors
    /// If the header's extension is malformed.
    pub fn bitmap(&self, wanted: &str) -> Result<Option<(Vec<bool>, u64)>> {
        let Some(directory) = self.header.bitmaps()? else { return Ok(None) };
        let mut at = directory.at.0;
        for _ in 0..directory.count {
            let (table, sizes, kind) = (self.word(at), self.word(at + 8), self.word(at + 16));
            let (entries, flags) = (sizes >> 32, sizes & 0xffff_ffff);
            let (granularity, name_len, extra) =
                (1 << (kind >> 48 & 0xff), kind >> 32 & 0xffff, kind & 0xffff_ffff);
            let start = (at + 24 + extra) as usize;
            let name = self.image.get(start..start + name_len as usize).unwrap_or_default();
            if name == wanted.as_bytes() {
                return Ok((flags & 1 == 0).then(|| (self.bits(table, entries, granularity), granularity)));
            }
            at += (24 + extra + name_len).next_multiple_of(8);
        }
        Ok(None)
    }

    /// The bits of a bitmap, of all its clusters one after the other; bits that do not exist read as 0.
    fn bits(&self, table: u64, entries: u64, granularity: u64) -> Vec<bool> {
        let cluster = self.g.cluster_size();
        let bit = |n: u64| {
            let byte = n / 8;
            if byte / cluster >= entries {
                return false;
            }
            let entry = self.word(table + byte / cluster * 8);
            match entry & 0x00ff_ffff_ffff_fe00 {
                0 => entry & 1 != 0,
                host => {
                    let bits = self.image.get((host + byte % cluster) as usize).copied().unwrap_or(0);
                    bits >> (n % 8) & 1 != 0
                }
            }
        };
        (0..self.header.size.div_ceil(granularity)).map(bit).collect()
    }

    fn word(&self, at: u64) -> u64 {
        let at = at as usize;
        self.image.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
    }

    fn entry(&self, cluster: u64) -> Result<(L2Entry, Vec<u8>)> {
        let g = self.g;
        let at = GuestOffset(cluster << g.cluster_bits());
        let bad = |what: &str, fault: &dyn std::fmt::Display| {
            BlockError::corrupt(format!("{what} entry of guest cluster {cluster}: {fault}"))
        };
        if g.l1_index(at) >= u64::from(self.header.l1_size) {
            return Ok((L2Entry::Unallocated, Vec::new()));
        }
        let l1 =
            g.l1_entry(self.word(self.header.l1_offset.0 + g.l1_index(at) * 8)).map_err(|f| bad("L1", &f))?;
        let Some(l1) = l1 else { return Ok((L2Entry::Unallocated, Vec::new())) };
        let place = l1.l2.0 + g.l2_index(at) * g.l2_entry_size();
        let bits = if g.extended_l2() { self.word(place + 8) } else { 0 };
        let entry = g.l2_entry(self.word(place), bits).map_err(|f| bad("L2", &f))?;
        let L2Entry::Compressed(c) = entry else { return Ok((entry, Vec::new())) };
        let end = (c.at.0 + c.len).min(self.image.len() as u64) as usize;
        let packed = self.image.get(c.at.0 as usize..end).unwrap_or_default();
        let unpacked = unpack(packed, g.cluster_size() as usize, self.header.compression);
        Ok((entry, unpacked.map_err(|e| bad("compressed data of", &e))?))
    }
}

fn unpack(packed: &[u8], len: usize, how: Compression) -> std::io::Result<Vec<u8>> {
    let mut out = vec![0; len];
    match how {
        Compression::Zlib => flate2::read::DeflateDecoder::new(packed).read_exact(&mut out)?,
        Compression::Zstd => zstd::stream::read::Decoder::new(packed)?.single_frame().read_exact(&mut out)?,
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::{Data, Span};

    #[test]
    fn changes_are_taken_back() {
        let mut rng = sim::Rng::new(7);
        let mut flat = Flat(vec![3; 4000]);
        for _ in 0..500 {
            let before = flat.0.clone();
            let (at, len) = (rng.below(6000), 1 + rng.below(2000));
            let effects = [
                Effect::Write { offset: at, data: Data::from(vec![9; len as usize]) },
                Effect::Zero { at: Span::new(at, len), keep: false },
                Effect::Allocate(Span::new(at, len)),
                Effect::SetLen(at),
            ];
            let undos: Vec<Undo> = effects.iter().map(|e| flat.apply(e)).collect();
            undos.iter().rev().for_each(|u| flat.undo(u));
            assert!(flat.0 == before);
            flat.apply(rng.choose(&effects));
        }
    }
}
