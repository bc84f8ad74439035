//! The bytes of a simulated file, and what changes them.
//!
//! An [`Image`] is a sparse map of 4 KiB blocks, shared until changed, so that a copy (a crash state, the durable twin of
//! a cache) costs a few reference counts. An [`Effect`] is one change as a disk sees it. What must stay true: an effect
//! touches only its own span (and the length); applied to part of its sectors it leaves the other sectors alone: 512
//! bytes are written whole or not at all.

use block::{Data, Extent, Kind, SECTOR, Span};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Bytes of one block: the unit of allocation, as on most file systems.
pub const BLOCK: u64 = 4096;
/// Extents that one question to the file system answers at most (a bound as a real driver has one).
pub const MAX_EXTENTS: usize = 64;

#[derive(Clone)]
enum Block {
    /// Space is there, and it reads as zero (an unwritten extent).
    Unwritten,
    Bytes(Rc<[u8; BLOCK as usize]>),
}

/// The content of a file: length, bytes, and which blocks are allocated.
#[derive(Clone, Default)]
pub struct Image {
    len: u64,
    blocks: BTreeMap<u64, Block>,
}

/// One change of a file.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Bytes at an offset; grows the file to their end.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Data,
    },
    /// Reads as zero afterwards, up to the end of the file.
    Zero {
        /// Where.
        at: Span,
        /// The space stays allocated.
        keep: bool,
    },
    /// Space reserved; grows the file to the end of the span.
    Allocate(Span),
    /// The length set: cut, or grown by a hole.
    SetLen(u64),
}

impl Effect {
    /// The bytes that may change (for a change of length: nothing, it is not torn).
    pub fn span(&self) -> Span {
        match self {
            Effect::Write { offset, data } => Span::new(*offset, data.len() as u64),
            Effect::Zero { at, .. } | Effect::Allocate(at) => *at,
            Effect::SetLen(_) => Span::default(),
        }
    }

    /// How many sectors it touches.
    pub fn sectors(&self) -> u64 {
        self.span().align_out(SECTOR).len / SECTOR
    }

    /// The parts of this effect, each inside one sector run for which `keep` (sector number within the effect) is true.
    /// A change of length is kept by sector 0.
    pub fn torn(&self, keep: impl Fn(u64) -> bool) -> Vec<Effect> {
        let all = self.span().align_out(SECTOR);
        if all.is_empty() {
            return if keep(0) { vec![self.clone()] } else { Vec::new() };
        }
        let mut parts = Vec::new();
        let mut run: Option<Span> = None;
        for i in 0..=all.len / SECTOR {
            let sector = Span::new(all.start + i * SECTOR, SECTOR);
            if i < all.len / SECTOR && keep(i) {
                run = Some(run.map_or(sector, |r| Span::between(r.start, sector.end())));
            } else if let Some(r) = run.take() {
                parts.push(self.part(&r.intersect(&self.span())));
            }
        }
        parts
    }

    fn part(&self, at: &Span) -> Effect {
        match self {
            Effect::Write { offset, data } => Effect::Write {
                offset: at.start,
                data: data.slice((at.start - offset) as usize, at.len as usize),
            },
            Effect::Zero { keep, .. } => Effect::Zero { at: *at, keep: *keep },
            Effect::Allocate(_) => Effect::Allocate(*at),
            Effect::SetLen(len) => Effect::SetLen(*len),
        }
    }
}

impl Image {
    /// An empty file.
    pub fn new() -> Image {
        Image::default()
    }

    /// A file of `bytes`; blocks of zeroes become holes.
    pub fn from_bytes(bytes: &[u8]) -> Image {
        let mut image = Image { len: bytes.len() as u64, blocks: BTreeMap::new() };
        for (i, chunk) in bytes.chunks(BLOCK as usize).enumerate() {
            if !block::is_zero(chunk) {
                let mut b = [0; BLOCK as usize];
                b[..chunk.len()].copy_from_slice(chunk);
                image.blocks.insert(i as u64, Block::Bytes(Rc::new(b)));
            }
        }
        image
    }

    /// A hole of so many bytes.
    pub fn of_len(len: u64) -> Image {
        Image { len, blocks: BTreeMap::new() }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the file has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of allocated blocks.
    pub fn allocated(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK
    }

    /// The bytes of `at`; zero past the end.
    pub fn read(&self, at: Span) -> Vec<u8> {
        let mut out = vec![0; at.len as usize];
        let (first, end) = (at.start / BLOCK, at.end().div_ceil(BLOCK));
        for (n, b) in self.blocks.range(first..end) {
            if let Block::Bytes(bytes) = b {
                let here = Span::new(n * BLOCK, BLOCK).intersect(&at).intersect(&Span::new(0, self.len));
                if !here.is_empty() {
                    let (from, to) = ((here.start - n * BLOCK) as usize, (here.start - at.start) as usize);
                    out[to..to + here.len as usize].copy_from_slice(&bytes[from..from + here.len as usize]);
                }
            }
        }
        out
    }

    /// All bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.read(Span::new(0, self.len))
    }

    /// Carries out one change.
    pub fn apply(&mut self, effect: &Effect) {
        match effect {
            Effect::Write { offset, data } => {
                let mut at = *offset;
                for part in data.parts() {
                    self.put(at, part);
                    at += part.len() as u64;
                }
                self.len = self.len.max(at);
            }
            Effect::Zero { at, keep } => {
                let at = at.intersect(&Span::new(0, self.len));
                self.clear(at, *keep);
            }
            Effect::Allocate(at) => {
                for n in at.start / BLOCK..at.end().div_ceil(BLOCK) {
                    self.blocks.entry(n).or_insert(Block::Unwritten);
                }
                self.len = self.len.max(at.end());
            }
            Effect::SetLen(len) => {
                if *len < self.len {
                    // what is cut off must read as zero if the file grows again
                    let tail = Span::between(*len, self.len.next_multiple_of(BLOCK));
                    self.clear(tail, false);
                }
                self.len = *len;
            }
        }
    }

    /// Inverts one bit (bit rot). Nothing happens in a hole.
    pub fn flip(&mut self, offset: u64, bit: u8) {
        if let Some(Block::Bytes(b)) = self.blocks.get_mut(&(offset / BLOCK)) {
            Rc::make_mut(b)[(offset % BLOCK) as usize] ^= 1 << (bit & 7);
        }
    }

    fn bytes_of(&mut self, n: u64) -> &mut [u8; BLOCK as usize] {
        let b = self.blocks.entry(n).or_insert(Block::Unwritten);
        if let Block::Unwritten = b {
            *b = Block::Bytes(Rc::new([0; BLOCK as usize]));
        }
        match b {
            Block::Bytes(bytes) => Rc::make_mut(bytes),
            Block::Unwritten => unreachable!("replaced above"),
        }
    }

    fn put(&mut self, mut at: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let within = (at % BLOCK) as usize;
            let n = bytes.len().min(BLOCK as usize - within);
            self.bytes_of(at / BLOCK)[within..within + n].copy_from_slice(&bytes[..n]);
            at += n as u64;
            bytes = &bytes[n..];
        }
    }

    fn clear(&mut self, at: Span, keep: bool) {
        if at.is_empty() {
            return;
        }
        let whole = at.align_in(BLOCK);
        // A span ending at the end of the file takes its last block whole.
        let whole = if at.end() == self.len {
            Span::between(at.start.next_multiple_of(BLOCK), at.end().next_multiple_of(BLOCK))
        } else {
            whole
        };
        let range = at.start / BLOCK..at.end().div_ceil(BLOCK);
        // A hole of terabytes has few blocks to clear.
        let there: Vec<u64> =
            if keep { range.collect() } else { self.blocks.range(range).map(|(n, _)| *n).collect() };
        for n in there {
            let b = Span::new(n * BLOCK, BLOCK);
            if whole.contains(&b) {
                if keep {
                    self.blocks.insert(n, Block::Unwritten);
                } else {
                    self.blocks.remove(&n);
                }
            } else if matches!(self.blocks.get(&n), Some(Block::Bytes(_))) {
                let part = b.intersect(&at);
                let from = (part.start - b.start) as usize;
                self.bytes_of(n)[from..from + part.len as usize].fill(0);
            } else if keep {
                self.blocks.insert(n, Block::Unwritten);
            }
        }
    }

    /// Data and holes of `at`, from its start, at most [`MAX_EXTENTS`]. Unwritten space is a hole, as SEEK_HOLE says.
    pub fn extents(&self, at: Span) -> Vec<Extent> {
        let mut out = Vec::new();
        let mut pos = at.start;
        while pos < at.end() && out.len() < MAX_EXTENTS {
            let b = Span::new(pos / BLOCK * BLOCK, BLOCK).intersect(&Span::between(pos, at.end()));
            let is_data = pos < self.len && matches!(self.blocks.get(&(pos / BLOCK)), Some(Block::Bytes(_)));
            let mut e = Extent::new(b, if is_data { Kind::Data } else { Kind::Zero });
            if is_data {
                e.host = Some(b.start);
                Extent::push_merged(&mut out, e);
                pos = b.end();
            } else {
                // to the next block that holds bytes, in one step
                let next = self.blocks.range(pos / BLOCK..).find(|(_, b)| matches!(b, Block::Bytes(_)));
                let end = match next {
                    Some((n, _)) if n * BLOCK < self.len && n * BLOCK > pos => (n * BLOCK).min(at.end()),
                    _ => at.end(),
                };
                Extent::push_merged(&mut out, Extent::new(Span::between(pos, end), Kind::Zero));
                pos = end;
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    /// The image against a plain byte array, by random changes.
    #[test]
    fn behaves_as_a_byte_array() {
        let mut rng = Rng::new(3);
        let (mut image, mut model) = (Image::new(), Vec::<u8>::new());
        for step in 0..3000 {
            let at = Span::new(rng.below(40_000), 1 + rng.below(9000));
            let effect = match rng.below(6) {
                0..=2 => Effect::Write {
                    offset: at.start,
                    data: Data::from(vec![(step % 255) as u8 + 1; at.len as usize]),
                },
                3 => Effect::Zero { at, keep: rng.chance(0.5) },
                4 => Effect::Allocate(at),
                _ => Effect::SetLen(at.start),
            };
            image.apply(&effect);
            match &effect {
                Effect::Write { offset, data } => {
                    model.resize(model.len().max(at.end() as usize), 0);
                    data.copy_to(&mut model[*offset as usize..at.end() as usize]);
                }
                Effect::Zero { at, .. } => {
                    let n = model.len();
                    model[(at.start as usize).min(n)..(at.end() as usize).min(n)].fill(0);
                }
                Effect::Allocate(at) => model.resize(model.len().max(at.end() as usize), 0),
                Effect::SetLen(len) => model.resize(*len as usize, 0),
            }
            assert_eq!(image.len(), model.len() as u64);
            assert_eq!(image.to_vec(), model, "step {step} {effect:?}");
            let whole = Span::new(0, 60_000);
            let extents = image.extents(whole);
            let mut pos = 0;
            for e in &extents {
                assert_eq!(e.span.start, pos);
                pos = e.span.end();
                assert!(e.kind == Kind::Data || block::is_zero(&image.read(e.span)), "{e:?}");
            }
            assert_eq!(pos, whole.end());
        }
    }

    #[test]
    fn tearing_keeps_whole_sectors() {
        let w = Effect::Write { offset: 500, data: Data::from(vec![7; 1100]) };
        assert_eq!(w.sectors(), 4);
        let mut image = Image::new();
        w.torn(|i| i % 2 == 0).iter().for_each(|e| image.apply(e));
        let b = image.read(Span::new(0, 2048));
        assert_eq!(b.iter().filter(|x| **x == 7).count(), 12 + 512);
        assert!(b[512..1024].iter().all(|x| *x == 0));
        assert_eq!(Effect::SetLen(9).torn(|_| false).len(), 0);
    }
}
