//! What a file says after a clean end, a crash, or damage.
//!
//! What must stay true: a bitmap that is said to be usable lacks nothing; damage costs precision, with a reason, and is
//! never an error that keeps a disk from being opened.

use crate::layout::{
    Entry, FIRST_RECORD, GRANULES, HEADER_COPY, HOT_SPAN, Header, Hot, Kind, SECTOR, SECTOR_BITS, Sector,
    header_slot, parse_sector,
};
use bitmap::Bitmap;
use block::{Result, Span};
use std::rc::Rc;

/// Bytes of an area that are read at once.
const CHUNK: u64 = 1 << 20;
/// Bytes of a header that are read first; most have no more.
const HEADER_START: u64 = 4096;

/// A bitmap that was found.
pub struct FoundBitmap {
    /// The user's name for it, or the job's key.
    pub name: String,
    /// A job's; else a user's.
    pub job: bool,
    /// It records.
    pub enabled: bool,
    /// Why it may lack changes, if it may.
    pub inconsistent: Option<String>,
    /// Its marks.
    pub bits: Bitmap,
}

/// What was found in a file.
pub struct Found {
    /// What identifies the disk, as it was given.
    pub identity: Vec<u8>,
    /// What was known of the disk at the end, or at the last change of the header.
    pub witness: Vec<u8>,
    /// It was closed in order: nothing is in doubt.
    pub clean: bool,
    /// Seconds since 1970 when anything was last recorded.
    pub wall: u64,
    /// Bytes of the disk.
    pub len: u64,
    /// What a crash put in doubt: the regions that were being written. All of it is marked.
    pub in_doubt: Vec<Span>,
    /// What was damaged, and how that was made good.
    pub damage: Vec<String>,
    /// The bitmaps.
    pub bitmaps: Vec<FoundBitmap>,
    pub(crate) header: Header,
    pub(crate) header_slot: u64,
    pub(crate) hot_sequence: u64,
    pub(crate) hot_slot: u64,
}

impl Found {
    /// Bytes in doubt.
    pub fn doubt(&self) -> u64 {
        self.in_doubt.iter().map(|s| s.len).sum()
    }
}

/// Reads what is in `file`; `None` if there is no whole header.
///
/// # Errors
/// The file's.
pub async fn read(file: &Rc<dyn env::File>) -> Result<Option<Found>> {
    let mut best: Option<(Header, u64)> = None;
    for slot in 0..2 {
        for at in header_slot(slot) {
            let first = file.read(Span::new(at, HEADER_START)).await?.contiguous();
            let bytes = match Header::bytes(&first) {
                Some(n) if n <= HEADER_START => first,
                Some(n) if n <= HEADER_COPY => file.read(Span::new(at, n)).await?.contiguous(),
                _ => continue,
            };
            if let Some(h) = Header::parse(&bytes)
                && best.as_ref().is_none_or(|(b, _)| b.sequence < h.sequence)
            {
                best = Some((h, slot));
            }
        }
    }
    let Some((header, header_slot)) = best else { return Ok(None) };
    let hot = Hot::newest(&file.read(HOT_SPAN).await?.contiguous(), header.opening);
    let whole = Span::new(0, header.len);
    let mut found = Found {
        identity: header.identity.clone(),
        witness: header.witness.clone(),
        clean: header.clean,
        wall: hot.as_ref().map_or(header.wall, |(h, _)| h.wall.max(header.wall)),
        len: header.len,
        in_doubt: Vec::new(),
        damage: Vec::new(),
        bitmaps: Vec::new(),
        header_slot,
        hot_sequence: hot.as_ref().map_or(0, |(h, _)| h.sequence),
        hot_slot: hot.as_ref().map_or(0, |(_, slot)| *slot),
        header,
    };
    if !found.clean {
        match hot {
            Some((hot, _)) => {
                let span = |n: &u64| Span::new(n.saturating_mul(found.header.region), found.header.region);
                let regions = hot.regions.iter().map(span).map(|s| s.intersect(&whole));
                found.in_doubt = regions.filter(|s| !s.is_empty()).collect();
            }
            None => {
                found
                    .damage
                    .push("the record of regions is damaged: everything counts as changed".to_owned());
                found.in_doubt = vec![whole];
            }
        }
    }
    for e in found.header.entries.clone() {
        let bits = read_bits(file, &e, found.header.len, &mut found.damage).await?;
        let Some(mut bits) = bits else { continue };
        if e.enabled && e.inconsistent.is_none() {
            found.in_doubt.iter().for_each(|s| bits.set(*s));
        }
        found.bitmaps.push(FoundBitmap {
            name: e.name,
            job: e.kind == Kind::Job,
            enabled: e.enabled,
            inconsistent: e.inconsistent,
            bits,
        });
    }
    Ok(Some(found))
}

/// Whether nothing was kept in `file` yet, in which [`read`] found nothing: whoever made it was killed before its first header. (With
/// that goes at most the first record; later ones tell of a header that is gone.)
///
/// # Errors
/// The file's.
pub async fn is_unused(file: &Rc<dyn env::File>) -> Result<bool> {
    for at in (0..2).flat_map(header_slot) {
        let first = file.read(Span::new(at, HEADER_START)).await?.contiguous();
        if first.iter().any(|b| *b != 0) {
            return Ok(false);
        }
    }
    Ok(Hot::last_sequence(&file.read(HOT_SPAN).await?.contiguous()) <= FIRST_RECORD)
}

async fn read_bits(
    file: &Rc<dyn env::File>,
    e: &Entry,
    len: u64,
    damage: &mut Vec<String>,
) -> Result<Option<Bitmap>> {
    let Ok(mut bits) = Bitmap::new(len, e.granularity) else {
        damage.push(format!("bitmap '{}': a length or granularity that no bitmap has", e.name));
        return Ok(None);
    };
    let mut bad = 0u64;
    let place = e.place(len, e.second);
    for piece in place.pieces(CHUNK) {
        if piece.start >= file.len_hint() {
            // an end that was cut off is read once, not for as long as the header says
            bad += (place.end() - piece.start) / SECTOR;
            let first = (piece.start - place.start) / SECTOR;
            let start = (first * GRANULES).saturating_mul(e.granularity).min(len);
            bits.set(Span::between(start, len));
            break;
        }
        let bytes = file.read(piece).await?.contiguous();
        for (b, i) in bytes.chunks_exact(SECTOR as usize).zip((piece.start - place.start) / SECTOR..) {
            match parse_sector(b, e.id, e.generation, i) {
                Sector::Bits(found) => bits.import_bits(i * SECTOR_BITS, found),
                Sector::Other => {}
                Sector::Damaged => {
                    bad += 1;
                    let start = (i * GRANULES).saturating_mul(e.granularity).min(len);
                    bits.set(Span::new(start, GRANULES.saturating_mul(e.granularity)));
                }
            }
        }
    }
    if bad > 0 {
        damage.push(format!(
            "bitmap '{}': {bad} damaged sectors: all they stand for counts as changed",
            e.name
        ));
    }
    Ok(Some(bits))
}
