//! How the file looks. Pure: bytes in, facts out.
//!
//! | offset | what |
//! |---|---|
//! | 0 | header, slot 0, two copies of [`HEADER_COPY`] bytes each |
//! | 1 MiB | header, slot 1, likewise |
//! | 2 MiB | record of hot regions, slot 0, two copies of [`HOT_COPY`] bytes each; then slot 1 |
//! | [`AREAS`] | the areas of bitmaps, two for each |
//!
//! The header and the record are written into their slots by turns, with a rising sequence number; the newest whole one counts.
//! A torn write leaves both copies of a slot in doubt, and the one before is still right; damage of one sector leaves the
//! other copy. An area is sectors of 512 bytes, each with its own checksum, so that a torn write of several never makes an old
//! sector unreadable. A sector belongs to its bitmap's *generation*, a random number that the header names: sectors of other
//! generations count as clean. So a new header changes a whole bitmap at once. All numbers are little endian.

use block::{BlockError, Result, Span};

/// Bytes of one copy of a header.
pub(crate) const HEADER_COPY: u64 = 512 << 10;
/// Bytes of one copy of a record of hot regions.
pub(crate) const HOT_COPY: u64 = 4096;
const HOT_AT: u64 = 4 * HEADER_COPY;
/// Where areas begin.
pub(crate) const AREAS: u64 = 4 << 20;
/// Bytes of a sector of an area.
pub(crate) const SECTOR: u64 = 512;
/// Bytes of a sector before its bits: checksum, bitmap, generation.
const SECTOR_HEAD: usize = 16;
/// Bytes of bits in a sector.
pub(crate) const SECTOR_BITS: u64 = SECTOR - SECTOR_HEAD as u64;
/// Granules of a sector.
pub(crate) const GRANULES: u64 = SECTOR_BITS * 8;
/// Most bitmaps of one file: with the longest names and reasons their table fits into [`HEADER_COPY`].
pub const MAX_KEPT: usize = 200;
/// Most bytes of identity and of witness each: paths and a few numbers.
pub const MAX_IDENTITY: usize = 8192;
/// Longest name of a bitmap in bytes (as in qcow2's specification), and longest reason that is kept.
pub(crate) const MAX_NAME: usize = 1023;
/// Most hot regions that a record can name.
pub(crate) const MAX_HOT: usize = 448;

/// The sequence number of the first record of a file.
pub(crate) const FIRST_RECORD: u64 = 1;

const HEADER_MAGIC: u64 = u64::from_le_bytes(*b"lbDirty1");
const HOT_MAGIC: u64 = u64::from_le_bytes(*b"lbDirtyH");
/// Bytes of a header before its variable part, and of an entry before its name.
const HEADER_FIXED: usize = 80;
const ENTRY_FIXED: usize = 40;

/// Whose a bitmap is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// A user's: marks go by a new generation only.
    User,
    /// A job's: marks may go one by one.
    Job,
}

/// A bitmap as the header has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) id: u32,
    pub(crate) generation: u64,
    /// The first of its two areas.
    pub(crate) area: u64,
    /// The second one counts.
    pub(crate) second: bool,
    pub(crate) granularity: u64,
    pub(crate) enabled: bool,
    /// It may lack changes, for this reason.
    pub(crate) inconsistent: Option<String>,
}

/// What a header says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub(crate) sequence: u64,
    /// Records of other openings do not count.
    pub(crate) opening: u64,
    /// Closed in order: bitmaps are exact.
    pub(crate) clean: bool,
    /// Bytes of the disk.
    pub(crate) len: u64,
    /// Bytes of a region.
    pub(crate) region: u64,
    pub(crate) next_id: u32,
    /// Seconds since 1970 when it was written.
    pub(crate) wall: u64,
    pub(crate) identity: Vec<u8>,
    pub(crate) witness: Vec<u8>,
    pub(crate) entries: Vec<Entry>,
}

/// Sectors of an area for so many bytes of disk.
pub(crate) fn sectors_for(len: u64, granularity: u64) -> u64 {
    len.div_ceil(granularity).div_ceil(GRANULES).max(1)
}

/// Where the copies of a header's slot are.
pub(crate) fn header_slot(slot: u64) -> [u64; 2] {
    let at = slot % 2 * 2 * HEADER_COPY;
    [at, at + HEADER_COPY]
}

/// Where a slot of hot regions is; the second copy follows the first.
pub(crate) fn hot_slot(slot: u64) -> u64 {
    HOT_AT + slot % 2 * 2 * HOT_COPY
}

/// All slots of hot regions.
pub(crate) const HOT_SPAN: Span = Span { start: HOT_AT, len: 4 * HOT_COPY };

fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let sum = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    bytes
}

fn le64(b: &[u8], at: usize) -> Option<u64> {
    b.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_le_bytes)
}

fn le32(b: &[u8], at: usize) -> Option<u32> {
    b.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

fn le16(b: &[u8], at: usize) -> Option<usize> {
    b.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_le_bytes).map(usize::from)
}

/// The whole of `b` up to `total` bytes, if its checksum behind them is right.
fn sealed(b: &[u8], total: usize) -> Option<&[u8]> {
    let body = b.get(..total)?;
    (crc32c::crc32c(body) == le32(b, total)?).then_some(body)
}

/// Cuts at a character's border.
fn cut(s: &str, most: usize) -> &str {
    let mut end = s.len().min(most);
    while !s.is_char_boundary(end) {
        end -= 1;
    }
    &s[..end]
}

impl Header {
    /// The bytes of one copy.
    ///
    /// # Errors
    /// What does not fit, by name.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        if self.entries.len() > MAX_KEPT {
            return Err(BlockError::invalid(format!(
                "more than {MAX_KEPT} bitmaps of a disk cannot be kept"
            )));
        }
        if self.identity.len().max(self.witness.len()) > MAX_IDENTITY {
            return Err(BlockError::invalid(format!(
                "what identifies the disk is longer than {MAX_IDENTITY} bytes"
            )));
        }
        let mut b = vec![0; HEADER_FIXED];
        let mut put = |at: usize, v: u64| b[at..at + 8].copy_from_slice(&v.to_le_bytes());
        put(0, HEADER_MAGIC);
        put(16, self.sequence);
        put(24, self.opening);
        put(32, u64::from(self.clean));
        put(40, self.len);
        put(48, self.region);
        put(56, self.wall);
        put(64, u64::from(self.next_id) | (self.entries.len() as u64) << 32);
        put(72, self.identity.len() as u64 | (self.witness.len() as u64) << 32);
        b.extend_from_slice(&self.identity);
        b.extend_from_slice(&self.witness);
        for e in &self.entries {
            if e.name.len() > MAX_NAME {
                return Err(BlockError::invalid(format!("bitmap name too long: {}", e.name)));
            }
            let why = cut(e.inconsistent.as_deref().unwrap_or_default(), MAX_NAME);
            for v in [e.generation, e.area, e.granularity] {
                b.extend_from_slice(&v.to_le_bytes());
            }
            b.extend_from_slice(&e.id.to_le_bytes());
            let flags = [e.kind == Kind::Job, e.second, e.enabled, e.inconsistent.is_some()];
            let flags = flags.iter().enumerate().fold(0u32, |all, (i, on)| all | u32::from(*on) << i);
            b.extend_from_slice(&flags.to_le_bytes());
            // both are at most MAX_NAME
            b.extend_from_slice(&(e.name.len() as u16).to_le_bytes());
            b.extend_from_slice(&(why.len() as u16).to_le_bytes());
            b.extend_from_slice(&[0; 4]);
            b.extend_from_slice(e.name.as_bytes());
            b.extend_from_slice(why.as_bytes());
        }
        let total = b.len() as u64;
        b[8..16].copy_from_slice(&total.to_le_bytes());
        Ok(seal(b))
    }

    /// How long the copy is that begins with `b`, by its own words.
    pub(crate) fn bytes(b: &[u8]) -> Option<u64> {
        if le64(b, 0)? == HEADER_MAGIC { le64(b, 8)?.checked_add(4) } else { None }
    }

    /// A copy taken apart, if it is whole and makes sense.
    pub(crate) fn parse(b: &[u8]) -> Option<Header> {
        if le64(b, 0)? != HEADER_MAGIC {
            return None;
        }
        let total = usize::try_from(le64(b, 8)?).ok().filter(|t| *t >= HEADER_FIXED)?;
        let b = sealed(b, total)?;
        let (ids, lens) = (le64(b, 64)?, le64(b, 72)?);
        let half = |v: u64| ((v & 0xffff_ffff) as usize, (v >> 32) as usize);
        let ((next_id, count), (identity, witness)) = (half(ids), half(lens));
        let mut at = HEADER_FIXED;
        let mut take = |n: usize| {
            let part = b.get(at..at.checked_add(n)?)?;
            at += n;
            Some(part)
        };
        let identity = take(identity)?.to_vec();
        let witness = take(witness)?.to_vec();
        let len = le64(b, 40)?;
        let mut entries = Vec::new();
        for _ in 0..count {
            let head = take(ENTRY_FIXED)?;
            let flags = le32(head, 28)?;
            let name = std::str::from_utf8(take(le16(head, 32)?)?).ok()?.to_owned();
            let why = String::from_utf8_lossy(take(le16(head, 34)?)?).into_owned();
            let flag = |i: u32| flags >> i & 1 == 1;
            let entry = Entry {
                name,
                kind: if flag(0) { Kind::Job } else { Kind::User },
                id: le32(head, 24)?,
                generation: le64(head, 0)?,
                area: le64(head, 8)?,
                second: flag(1),
                granularity: le64(head, 16)?,
                enabled: flag(2),
                inconsistent: flag(3).then_some(why),
            };
            let g = entry.granularity;
            let sound = g.is_power_of_two()
                && (bitmap::MIN_GRANULARITY..=bitmap::MAX_GRANULARITY).contains(&g)
                && entry.area >= AREAS
                && entry.area.checked_add(2 * SECTOR * sectors_for(len, g))?.checked_add(1).is_some();
            if !sound {
                return None;
            }
            entries.push(entry);
        }
        Some(Header {
            sequence: le64(b, 16)?,
            opening: le64(b, 24)?,
            clean: le64(b, 32)? != 0,
            len,
            region: le64(b, 48).filter(|r| r.is_power_of_two())?,
            wall: le64(b, 56)?,
            next_id: next_id as u32,
            identity,
            witness,
            entries,
        })
    }
}

impl Entry {
    /// Where the area is that counts (or the other one).
    pub(crate) fn place(&self, len: u64, second: bool) -> Span {
        let bytes = sectors_for(len, self.granularity) * SECTOR;
        Span::new(self.area + if second { bytes } else { 0 }, bytes)
    }

    /// Where both areas are.
    pub(crate) fn places(&self, len: u64) -> Span {
        Span::new(self.area, 2 * sectors_for(len, self.granularity) * SECTOR)
    }
}

/// A record of hot regions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Hot {
    pub(crate) sequence: u64,
    pub(crate) opening: u64,
    pub(crate) wall: u64,
    pub(crate) regions: Vec<u64>,
}

impl Hot {
    /// The bytes of a slot: two copies.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut b = Vec::with_capacity(2 * HOT_COPY as usize);
        let words = [HOT_MAGIC, self.sequence, self.opening, self.wall, self.regions.len() as u64];
        words.iter().chain(&self.regions).for_each(|w| b.extend_from_slice(&w.to_le_bytes()));
        let mut b = seal(b);
        b.resize(HOT_COPY as usize, 0);
        b.extend_from_within(..);
        b
    }

    fn parse(b: &[u8]) -> Option<Hot> {
        let n = usize::try_from(le64(b, 32)?).ok().filter(|n| *n <= MAX_HOT)?;
        let b = sealed(b, 40 + 8 * n)?;
        if le64(b, 0)? != HOT_MAGIC {
            return None;
        }
        let regions = (0..n).map(|i| le64(b, 40 + 8 * i)).collect::<Option<_>>()?;
        Some(Hot { sequence: le64(b, 8)?, opening: le64(b, 16)?, wall: le64(b, 24)?, regions })
    }

    /// The highest number of a whole record of any opening; 0 without one.
    pub(crate) fn last_sequence(all: &[u8]) -> u64 {
        all.chunks_exact(HOT_COPY as usize).filter_map(Hot::parse).map(|h| h.sequence).max().unwrap_or(0)
    }

    /// The newest whole record of `opening` among all slots, and the slot that it is in.
    pub(crate) fn newest(all: &[u8], opening: u64) -> Option<(Hot, u64)> {
        let copies = all.chunks_exact(HOT_COPY as usize).zip(0u64..);
        let whole = copies.filter_map(|(b, i)| Some((Hot::parse(b)?, i / 2)));
        whole.filter(|(h, _)| h.opening == opening).max_by_key(|(h, _)| h.sequence)
    }
}

/// A sector of an area.
pub(crate) enum Sector<'a> {
    /// Bits of the generation asked for.
    Bits(&'a [u8]),
    /// Of another generation: clean.
    Other,
    /// Not what was written here.
    Damaged,
}

/// The bytes of sector `index` of a bitmap; `bits` are [`SECTOR_BITS`] bytes.
pub(crate) fn encode_sector(id: u32, generation: u64, index: u64, bits: &[u8]) -> Vec<u8> {
    let mut b = vec![0; SECTOR as usize];
    b[4..8].copy_from_slice(&id.to_le_bytes());
    b[8..16].copy_from_slice(&generation.to_le_bytes());
    b[SECTOR_HEAD..].copy_from_slice(bits);
    let sum = crc32c::crc32c_append(crc32c::crc32c(&index.to_le_bytes()), &b[4..]);
    b[..4].copy_from_slice(&sum.to_le_bytes());
    b
}

/// Takes sector `index` of a bitmap apart.
pub(crate) fn parse_sector(b: &[u8], id: u32, generation: u64, index: u64) -> Sector<'_> {
    let sum = |b: &[u8]| crc32c::crc32c_append(crc32c::crc32c(&index.to_le_bytes()), b);
    match (b.get(4..SECTOR as usize), le32(b, 0)) {
        (Some(body), Some(want)) if sum(body) == want && le32(b, 4) == Some(id) => {
            if le64(b, 8) == Some(generation) { Sector::Bits(&b[SECTOR_HEAD..]) } else { Sector::Other }
        }
        _ => Sector::Damaged,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let entry = |name: &str, area| Entry {
            name: name.to_owned(),
            kind: Kind::User,
            id: 7,
            generation: 0x1234_5678_9abc,
            area,
            second: true,
            granularity: 65536,
            enabled: true,
            inconsistent: None,
        };
        let bad = Some("said so".to_owned());
        Header {
            sequence: 3,
            opening: 99,
            clean: false,
            len: 10 << 30,
            region: 4 << 20,
            next_id: 8,
            wall: 1_700_000_000,
            identity: b"raw:/tmp/x".to_vec(),
            witness: vec![1, 2, 3],
            entries: vec![
                entry("a", AREAS),
                Entry { kind: Kind::Job, inconsistent: bad, ..entry("bitmap äöü", AREAS + (1 << 20)) },
            ],
        }
    }

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        let h = header();
        let bytes = h.encode().expect("fits");
        assert_eq!(Header::parse(&bytes), Some(h));
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Header::parse(&bytes), None, "bit {bit}");
        }
        let hot = Hot { sequence: 5, opening: 9, wall: 1, regions: (0..MAX_HOT as u64).collect() };
        let slot = hot.encode();
        assert_eq!(slot.len() as u64, 2 * HOT_COPY);
        let mut all = vec![0; HOT_SPAN.len as usize];
        all[..slot.len()].copy_from_slice(&slot);
        assert_eq!(Hot::newest(&all, 9), Some((hot.clone(), 0)));
        assert_eq!(Hot::newest(&all, 8), None);
        all[100] ^= 1;
        assert_eq!(Hot::newest(&all, 9), Some((hot, 0)), "the other copy");
        all[HOT_COPY as usize + 100] ^= 1;
        assert_eq!(Hot::newest(&all, 9), None);
    }

    #[test]
    fn a_sector_knows_its_place_and_generation() {
        let bits = vec![0xa5; SECTOR_BITS as usize];
        let b = encode_sector(3, 4, 5, &bits);
        assert!(matches!(parse_sector(&b, 3, 4, 5), Sector::Bits(got) if got == bits));
        assert!(matches!(parse_sector(&b, 3, 9, 5), Sector::Other));
        assert!(matches!(parse_sector(&b, 3, 4, 6), Sector::Damaged), "misplaced");
        assert!(matches!(parse_sector(&b, 2, 4, 5), Sector::Damaged), "somebody else's");
        assert!(matches!(parse_sector(&vec![0; 512], 3, 4, 5), Sector::Damaged), "never written");
    }
}
