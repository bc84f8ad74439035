//! A record of the log: 64 bytes that say what it is, and a payload.
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 4 | magic `lbL1` |
//! | 4 | 1 | kind |
//! | 6 | 2 | volume |
//! | 8 | 4 | CRC32C of the header with this field zero |
//! | 12 | 4 | payload length |
//! | 16 | 4 | CRC32C of the payload |
//! | 20 | 4 | how far before this record the log was not yet durable when it was written, in units of 64 bytes |
//! | 24 | 8 | place in the log (grows for ever; its remainder by the ring's size is the place in the file) |
//! | 32 | 8 | incarnation: how often the log has been opened |
//! | 40 | 8 | offset in the volume |
//! | 48 | 8 | length in the volume |
//! | 56 | 8 | epoch or generation; of an own write, one more than the checkpoint that it lies over |

use crate::digest::Digest;
use crate::history::History;
use crate::types::{Epoch, Generation};
use block::{Data, Span};
use bytes::Bytes;

/// Bytes of a record's header.
pub(crate) const HEADER: u64 = 64;
const MAGIC: u32 = u32::from_le_bytes(*b"lbL1");
/// Records begin at multiples of this, as does the ring end: a header always fits in what is left of the ring.
pub(crate) const ALIGN: u64 = 64;

/// What a record says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Redo: the primary's change.
    Change = 1,
    /// Undo: what was there before.
    Preimage = 2,
    /// The secondary's own write.
    Own = 3,
    /// The open epoch ends here; payload: history after it, digest.
    Prepare = 4,
    /// The epoch goes on in the next.
    Abort = 5,
    /// The epoch is decided.
    Commit = 6,
    /// A new session: what is not decided is void (redo) or not labelled any more (undo).
    Reset = 7,
    /// This side takes over.
    Intent = 8,
    /// Nothing until the end of the ring.
    Pad = 9,
    /// A volume has another length (the number) from here on.
    Resize = 10,
    /// As Prepare, where changes may be on the disks before they are decided: until Stored it may not be decided.
    Mark = 11,
    /// The disks hold all of the epoch.
    Stored = 12,
}

impl Kind {
    fn from_byte(b: u8) -> Option<Kind> {
        use Kind::*;
        [Change, Preimage, Own, Prepare, Abort, Commit, Reset, Intent, Pad, Resize, Mark, Stored]
            .into_iter()
            .find(|k| *k as u8 == b)
    }
}

/// A record.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) kind: Kind,
    pub(crate) volume: u16,
    pub(crate) at: Span,
    pub(crate) number: u64,
    /// Empty with a range: zeroes.
    pub(crate) payload: Data,
}

impl Record {
    pub(crate) fn control(kind: Kind, number: u64, payload: Vec<u8>) -> Record {
        Record { kind, volume: 0, at: Span::default(), number, payload: Data::from(payload) }
    }

    /// Bytes it takes in the log.
    pub(crate) fn size(&self) -> u64 {
        size_of(self.payload.len() as u64)
    }

    /// `durable`: everything before that place of the log was on stable storage before this record was written.
    pub(crate) fn encode(&self, lsn: u64, incarnation: u64, durable: u64, out: &mut Data) {
        let mut h = [0u8; HEADER as usize];
        h[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        h[4] = self.kind as u8;
        h[6..8].copy_from_slice(&self.volume.to_le_bytes());
        let len = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        h[12..16].copy_from_slice(&len.to_le_bytes());
        h[16..20].copy_from_slice(&crate::wire::crc_of(&self.payload).to_le_bytes());
        let open = u32::try_from(lsn.saturating_sub(durable).div_ceil(ALIGN)).unwrap_or(u32::MAX);
        h[20..24].copy_from_slice(&open.to_le_bytes());
        h[24..32].copy_from_slice(&lsn.to_le_bytes());
        h[32..40].copy_from_slice(&incarnation.to_le_bytes());
        h[40..48].copy_from_slice(&self.at.start.to_le_bytes());
        h[48..56].copy_from_slice(&self.at.len.to_le_bytes());
        h[56..64].copy_from_slice(&self.number.to_le_bytes());
        let crc = crc32c::crc32c(&h);
        h[8..12].copy_from_slice(&crc.to_le_bytes());
        out.push(Bytes::copy_from_slice(&h));
        out.append(self.payload.clone());
        let pad = self.size() - HEADER - self.payload.len() as u64;
        out.append(Data::zeroes(pad as usize));
    }
}

/// Bytes that a record with such a payload takes.
pub(crate) const fn size_of(payload: u64) -> u64 {
    (HEADER + payload).next_multiple_of(ALIGN)
}

/// A header that was read and is whole.
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) volume: u16,
    pub(crate) payload_len: u64,
    pub(crate) payload_crc: u32,
    pub(crate) incarnation: u64,
    pub(crate) at: Span,
    pub(crate) number: u64,
    /// Everything before this place was durable before the record was written.
    pub(crate) durable: u64,
}

/// The header at place `lsn`, if there is one.
pub(crate) fn parse(bytes: &[u8], lsn: u64) -> Option<Header> {
    if !bytes.starts_with(&MAGIC.to_le_bytes()) {
        return None;
    }
    let h: [u8; HEADER as usize] = bytes.try_into().ok()?;
    let n64 = |at: usize| h.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let n32 = |at: usize| h.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let mut plain = h;
    plain[8..12].fill(0);
    if crc32c::crc32c(&plain) != n32(8)? || n64(24)? != lsn {
        return None;
    }
    Some(Header {
        kind: Kind::from_byte(h[4])?,
        volume: u16::from_le_bytes([h[6], h[7]]),
        payload_len: u64::from(n32(12)?),
        payload_crc: n32(16)?,
        incarnation: n64(32)?,
        at: Span::checked(n64(40)?, n64(48)?)?,
        number: n64(56)?,
        durable: lsn.saturating_sub(u64::from(n32(20)?) * ALIGN),
    })
}

/// Numbers to bytes, for small payloads.
pub(crate) fn history_bytes(h: &History, digest: &Digest) -> Vec<u8> {
    let mut out = Vec::new();
    let mut put = |n: u64| out.extend_from_slice(&n.to_le_bytes());
    [digest.count, digest.bytes, digest.sum, h.past().len() as u64, u64::from(h.now().is_some())]
        .into_iter()
        .for_each(&mut put);
    h.past().iter().copied().chain(h.now()).for_each(|(g, e)| {
        put(g.0);
        put(e.0);
    });
    out
}

/// The opposite of [`history_bytes`].
pub(crate) fn parse_history(bytes: &[u8]) -> Option<(History, Digest)> {
    let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|c| u64::from_le_bytes(*c)).collect();
    let [count, sum_bytes, sum, past, now, rest @ ..] = words.as_slice() else { return None };
    let mut pairs = rest.as_chunks::<2>().0.iter().map(|p| (Generation(p[0]), Epoch(p[1])));
    let past = usize::try_from(*past).ok().filter(|n| *n <= crate::history::MAX_HISTORY)?;
    let past: Vec<_> = pairs.by_ref().take(past).collect();
    let now = if *now != 0 { Some(pairs.next()?) } else { None };
    Some((History::from_parts(past, now)?, Digest { count: *count, bytes: *sum_bytes, sum: *sum }))
}
