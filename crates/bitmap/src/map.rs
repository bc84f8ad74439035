//! The bitmap of one disk: bytes outside, granules inside.

use crate::tree::{Chunk, Inner, Part};
use block::{BlockError, Result, Span};

/// Smallest granularity: a sector.
pub const MIN_GRANULARITY: u64 = 512;
/// Largest granularity (2 GiB): the largest that a qcow2 image can store.
pub const MAX_GRANULARITY: u64 = 1 << 31;
/// Most granules in a bitmap: 4 EiB at 64 KiB. Bounds the memory of the topmost level (32 MiB at the limit).
pub const MAX_GRANULES: u64 = 1 << 46;

/// 2^24 granules: 1 TiB at 64 KiB.
type Group = Inner<Inner<Chunk>>;

#[derive(Clone)]
enum Slot {
    Clean,
    Dirty,
    Mixed(Box<Group>),
}

impl Slot {
    fn count(&self) -> u64 {
        match self {
            Slot::Clean => 0,
            Slot::Dirty => Group::BITS,
            Slot::Mixed(g) => g.count(),
        }
    }
}

/// Which granules of `[0, len)` are dirty. `Clone` takes a snapshot (cost: what is mixed).
#[derive(Clone)]
pub struct Bitmap {
    len: u64,
    shift: u32,
    granules: u64,
    count: u64,
    slots: Vec<Slot>,
}

impl Bitmap {
    /// A clean bitmap for `len` bytes. `granularity` is a power of two from [`MIN_GRANULARITY`] to
    /// [`MAX_GRANULARITY`]; the error says what is wrong with it, or that there would be too many granules.
    pub fn new(len: u64, granularity: u64) -> Result<Bitmap> {
        if !granularity.is_power_of_two() {
            return Err(BlockError::invalid(format!("granularity {granularity} is not a power of two")));
        }
        if !(MIN_GRANULARITY..=MAX_GRANULARITY).contains(&granularity) {
            return Err(BlockError::invalid(format!(
                "granularity {granularity} is not between {MIN_GRANULARITY} and {MAX_GRANULARITY}"
            )));
        }
        let mut b =
            Bitmap { len: 0, shift: granularity.trailing_zeros(), granules: 0, count: 0, slots: Vec::new() };
        b.resize(len)?;
        Ok(b)
    }

    /// Bytes of the disk.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Bytes per bit.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// Whether nothing is dirty.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Dirty bytes, in whole granules (the last one of a disk counts whole even if the disk ends inside it), as QMP
    /// shows it.
    pub fn count(&self) -> u64 {
        self.count << self.shift
    }

    /// Dirty bytes that exist: as [`Bitmap::count`], less what the last granule has past the end.
    pub fn dirty_bytes(&self) -> u64 {
        let excess = (self.granules << self.shift) - self.len;
        if excess > 0 && self.get(self.len - 1) { self.count() - excess } else { self.count() }
    }

    /// Whether the granule that holds the byte at `offset` is dirty. Past the end: no.
    pub fn get(&self, offset: u64) -> bool {
        let g = offset >> self.shift;
        g < self.granules && self.next(g, true) == Some(g)
    }

    /// Bytes of `at` that are dirty.
    pub fn count_in(&self, at: Span) -> u64 {
        let at = at.intersect(&Span::new(0, self.len));
        if at.is_empty() {
            return 0;
        }
        let (lo, hi) = (at.start >> self.shift, ((at.end() - 1) >> self.shift) + 1);
        let part = |i: u64| {
            let base = i * Group::BITS;
            let (l, h) = (lo.max(base) - base, hi.min(base + Group::BITS) - base);
            match &self.slots[i as usize] {
                Slot::Clean => 0,
                Slot::Dirty => h - l,
                Slot::Mixed(g) => g.count_in(l, h),
            }
        };
        let granules: u64 = (lo / Group::BITS..hi.div_ceil(Group::BITS)).map(part).sum();
        let outside = |first: bool| {
            let (edge, cut) = if first {
                (at.start, at.start & (self.granularity() - 1))
            } else {
                (at.end() - 1, (hi << self.shift) - at.end())
            };
            if cut > 0 && self.get(edge) { cut } else { 0 }
        };
        (granules << self.shift) - outside(true) - outside(false)
    }

    /// Marks every granule that `at` touches. What is past the end is left out.
    pub fn set(&mut self, at: Span) {
        let at = at.intersect(&Span::new(0, self.len));
        if !at.is_empty() {
            self.assign(at.start >> self.shift, ((at.end() - 1) >> self.shift) + 1, true);
        }
    }

    /// Clears every granule that lies *wholly* in `at` (a last granule cut by the disk's end counts as whole when
    /// `at` reaches the end); a granule only touched stays as it is.
    pub fn clear(&mut self, at: Span) {
        let at = self.granules_within(at);
        if !at.is_empty() {
            self.assign(at.start >> self.shift, ((at.end() - 1) >> self.shift) + 1, false);
        }
    }

    /// The granules that lie wholly in `at`; a last one that is cut by the disk's end counts as whole where `at` reaches the end.
    pub fn granules_within(&self, at: Span) -> Span {
        let at = at.intersect(&Span::new(0, self.len));
        let g = self.granularity();
        let end = if at.end() == self.len { self.len } else { at.end() & !(g - 1) };
        Span::between(at.start.next_multiple_of(g).min(end), end)
    }

    /// The granules that `at` touches, up to the disk's end.
    pub fn granules_around(&self, at: Span) -> Span {
        at.align_out(self.granularity()).intersect(&Span::new(0, self.len))
    }

    /// Marks the whole disk.
    pub fn set_all(&mut self) {
        self.set(Span::new(0, self.len));
    }

    /// Clears the whole disk.
    pub fn clear_all(&mut self) {
        self.slots.iter_mut().for_each(|s| *s = Slot::Clean);
        self.count = 0;
    }

    /// Offset of the first dirty byte at or after `from` (in a granule that begins before `from`: `from` itself).
    pub fn next_dirty(&self, from: u64) -> Option<u64> {
        self.next_byte(from, true)
    }

    /// Offset of the first clean byte at or after `from`.
    pub fn next_clean(&self, from: u64) -> Option<u64> {
        self.next_byte(from, false)
    }

    fn next_byte(&self, from: u64, on: bool) -> Option<u64> {
        if from >= self.len {
            return None;
        }
        let g = self.next(from >> self.shift, on)?;
        Some((g << self.shift).max(from))
    }

    /// The first dirty run inside `within`, cut to `max` bytes (0: not cut).
    pub fn next_area(&self, within: Span, max: u64) -> Option<Span> {
        let within = within.intersect(&Span::new(0, self.len));
        let start = self.next_dirty(within.start)?;
        if start >= within.end() {
            return None;
        }
        let end = self.next_clean(start).unwrap_or(self.len).min(within.end());
        let len = end - start;
        Some(Span::new(start, if max == 0 { len } else { len.min(max) }))
    }

    /// The first byte of `within` that is dirty here and not in `other`, which has the same granularity (and is clean past its end).
    pub fn next_beyond(&self, other: &Bitmap, within: Span) -> Option<u64> {
        debug_assert_eq!(self.shift, other.shift);
        let within = within.intersect(&Span::new(0, self.len));
        if within.is_empty() {
            return None;
        }
        let last = (within.end() - 1) >> self.shift;
        let mut at = within.start >> self.shift;
        while let Some(g) = self.next(at, true).filter(|g| *g <= last) {
            let beyond = self.bits_from(g) & !other.bits_from(g);
            if beyond != 0 {
                let g = g + u64::from(beyond.trailing_zeros());
                return (g <= last).then_some((g << self.shift).max(within.start));
            }
            at = g + 64;
        }
        None
    }

    /// The dirty runs inside `within`, in order, each cut to `max` bytes (0: not cut).
    pub fn areas(&self, within: Span, max: u64) -> Areas<'_> {
        Areas { map: self, left: within, max }
    }

    /// Marks what `other` marks. Granularities may differ: a coarser one here rounds outwards. What `other` has past
    /// this bitmap's end is left out.
    pub fn merge(&mut self, other: &Bitmap) {
        if self.shift != other.shift || self.granules < other.granules {
            let whole = Span::new(0, self.len);
            other.areas(whole, 0).for_each(|a| self.set(a));
            return;
        }
        for (i, theirs) in other.slots.iter().enumerate() {
            match (theirs, &mut self.slots[i]) {
                (Slot::Clean, _) | (_, Slot::Dirty) => {}
                (Slot::Dirty, _) => {
                    self.assign(i as u64 * Group::BITS, (i as u64 + 1) * Group::BITS, true);
                }
                (Slot::Mixed(t), ours) => {
                    let before = ours.count();
                    if let Slot::Mixed(o) = ours {
                        o.merge(t);
                        if o.count() == Group::BITS {
                            *ours = Slot::Dirty;
                        }
                    } else {
                        *ours = Slot::Mixed(t.clone());
                    }
                    self.count = self.count - before + ours.count();
                }
            }
        }
    }

    /// Follows the disk to a new length: what is cut off is forgotten, what is added is clean.
    pub fn resize(&mut self, len: u64) -> Result<()> {
        let granules = len.div_ceil(self.granularity());
        if granules > MAX_GRANULES {
            return Err(BlockError::invalid(format!(
                "a bitmap of granularity {} cannot cover {len} bytes (more than 2^{} granules)",
                self.granularity(),
                MAX_GRANULES.trailing_zeros()
            )));
        }
        if granules < self.granules {
            self.assign(granules, self.granules, false);
        }
        let slots = usize::try_from(granules.div_ceil(Group::BITS))
            .map_err(|_| BlockError::invalid("bitmap too large for this host"))?;
        self.slots.resize(slots, Slot::Clean);
        self.granules = granules;
        self.len = len;
        Ok(())
    }

    /// Takes all that is dirty, leaving this bitmap clean: the way to begin a pass at one instant.
    #[must_use]
    pub fn take(&mut self) -> Bitmap {
        let clean = Bitmap { count: 0, slots: vec![Slot::Clean; self.slots.len()], len: self.len, ..*self };
        std::mem::replace(self, clean)
    }

    /// The bits of granules `[8 * first_byte, ...)` as bytes, least significant bit first: the form in which qcow2
    /// stores a bitmap. Bits past the end are 0.
    pub fn export_bits(&self, first_byte: u64, out: &mut [u8]) {
        out.fill(0);
        let (lo, hi) = (first_byte * 8, (first_byte + out.len() as u64) * 8);
        let mut at = lo;
        while let Some(found) = self.next(at, true).filter(|g| *g < hi) {
            // the eight bytes of `out` that it is in
            let place = (found - lo) / 64;
            let rest = &mut out[place as usize * 8..];
            let n = rest.len().min(8);
            rest[..n].copy_from_slice(&self.bits_from(lo + place * 64).to_le_bytes()[..n]);
            at = lo + (place + 1) * 64;
        }
    }

    /// Sets the granules whose bits are set in `bytes`, which begin with granule `8 * first_byte`. Bits past the end
    /// are left out (an image may hold anything there).
    pub fn import_bits(&mut self, first_byte: u64, bytes: &[u8]) {
        for (place, b) in (first_byte * 8..self.granules).step_by(64).zip(bytes.chunks(8)) {
            let mut word = [0; 8];
            word[..b.len()].copy_from_slice(b);
            let left = self.granules - place;
            let there = if left < 64 { (1 << left) - 1 } else { !0 };
            let new = u64::from_le_bytes(word) & there & !self.bits_from(place);
            if new != 0 {
                self.add_bits_from(place, new);
            }
        }
    }

    /// The 64 bits from granule `g` on. Past the end: 0.
    fn bits_from(&self, g: u64) -> u64 {
        match g % 64 {
            0 => self.word(g / 64),
            n => self.word(g / 64) >> n | self.word(g / 64 + 1) << (64 - n),
        }
    }

    /// Sets what `bits` has of the 64 from granule `g` on; none of them is past the end.
    fn add_bits_from(&mut self, g: u64, bits: u64) {
        let n = g % 64;
        self.add_word(g / 64, bits << n);
        if n > 0 && bits >> (64 - n) != 0 {
            self.add_word(g / 64 + 1, bits >> (64 - n));
        }
    }

    fn word(&self, i: u64) -> u64 {
        match self.slots.get((i / (Group::BITS / 64)) as usize) {
            None | Some(Slot::Clean) => 0,
            Some(Slot::Dirty) => !0,
            Some(Slot::Mixed(g)) => g.word(i % (Group::BITS / 64)),
        }
    }

    fn add_word(&mut self, i: u64, word: u64) {
        let words = Group::BITS / 64;
        self.change(i / words, true, |g| g.add_word(i % words, word));
    }

    fn assign(&mut self, lo: u64, hi: u64, on: bool) {
        for i in lo / Group::BITS..hi.div_ceil(Group::BITS) {
            let base = i * Group::BITS;
            let (l, h) = (lo.max(base) - base, hi.min(base + Group::BITS) - base);
            if l == 0 && h == Group::BITS {
                let slot = &mut self.slots[i as usize];
                let before = slot.count();
                *slot = if on { Slot::Dirty } else { Slot::Clean };
                self.count = self.count - before + slot.count();
            } else {
                self.change(i, on, |g| g.assign(l, h, on));
            }
        }
    }

    /// Lets `change` give bits of slot `i` the value `on`, if any has the other one, then keeps the group only if it is mixed.
    fn change(&mut self, i: u64, on: bool, change: impl FnOnce(&mut Group)) {
        let slot = &mut self.slots[i as usize];
        let before = slot.count();
        match (&mut *slot, on) {
            (Slot::Clean, false) | (Slot::Dirty, true) => return,
            (Slot::Mixed(g), _) => change(g),
            (_, _) => {
                let mut g = Box::new(Group::uniform(!on));
                change(&mut g);
                *slot = Slot::Mixed(g);
            }
        }
        match slot.count() {
            0 => *slot = Slot::Clean,
            Group::BITS => *slot = Slot::Dirty,
            _ => {}
        }
        self.count = self.count - before + slot.count();
    }

    /// First granule at or after `from` with the value `on`.
    fn next(&self, from: u64, on: bool) -> Option<u64> {
        let mut i = from / Group::BITS;
        let mut inside = from % Group::BITS;
        while let Some(slot) = self.slots.get(i as usize) {
            let found = match slot {
                Slot::Clean => (!on).then_some(inside),
                Slot::Dirty => on.then_some(inside),
                Slot::Mixed(g) => g.next(inside, on),
            };
            if let Some(n) = found {
                let g = i * Group::BITS + n;
                return (g < self.granules).then_some(g);
            }
            i += 1;
            inside = 0;
        }
        None
    }
}

impl std::fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bitmap({} of {} bytes dirty, granularity {})", self.count(), self.len, self.granularity())
    }
}

/// Dirty runs in order; see [`Bitmap::areas`].
pub struct Areas<'a> {
    map: &'a Bitmap,
    left: Span,
    max: u64,
}

impl Iterator for Areas<'_> {
    type Item = Span;
    fn next(&mut self) -> Option<Span> {
        let a = self.map.next_area(self.left, self.max)?;
        self.left = Span::between(a.end(), self.left.end());
        Some(a)
    }
}
