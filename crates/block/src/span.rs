//! Pieces of a disk. Two loose `u64` never travel together: an offset with a length is a [`Span`].

use std::fmt;

/// A byte range `[start, start + len)`. `start + len` never exceeds `u64::MAX`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// Number of bytes; may be 0.
    pub len: u64,
}

impl Span {
    /// A span, or `None` if its end would not fit in 64 bits.
    pub const fn checked(start: u64, len: u64) -> Option<Span> {
        match start.checked_add(len) {
            Some(_) => Some(Span { start, len }),
            None => None,
        }
    }

    /// A span whose bounds the caller has already checked. An end that does not fit is cut at `u64::MAX`.
    pub const fn new(start: u64, len: u64) -> Span {
        let room = u64::MAX - start;
        Span { start, len: if len > room { room } else { len } }
    }

    /// The span from `start` up to, not including, `end`; empty if `end <= start`.
    pub const fn between(start: u64, end: u64) -> Span {
        Span { start, len: end.saturating_sub(start) }
    }

    /// First byte after the span.
    pub const fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Whether the span has no bytes.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the two spans share at least one byte.
    pub const fn overlaps(&self, other: &Span) -> bool {
        self.start < other.end() && other.start < self.end() && self.len > 0 && other.len > 0
    }

    /// Whether every byte of `other` is in `self`.
    pub const fn contains(&self, other: &Span) -> bool {
        other.start >= self.start && other.end() <= self.end()
    }

    /// Whether the byte at `offset` is in the span.
    pub const fn contains_offset(&self, offset: u64) -> bool {
        offset >= self.start && offset < self.end()
    }

    /// The common part; empty (at some offset) if there is none.
    pub fn intersect(&self, other: &Span) -> Span {
        let start = self.start.max(other.start);
        Span::between(start, self.end().min(other.end()))
    }

    /// The smallest span with both ends at multiples of `unit` (a power of two) that contains this one. The end is
    /// cut at the last multiple that fits.
    pub const fn align_out(&self, unit: u64) -> Span {
        let start = self.start & !(unit - 1);
        let end = match self.end().checked_add(unit - 1) {
            Some(e) => e & !(unit - 1),
            None => !(unit - 1),
        };
        Span::between(start, end)
    }

    /// The largest span with both ends at multiples of `unit` (a power of two) inside this one; maybe empty.
    pub const fn align_in(&self, unit: u64) -> Span {
        let start = match self.start.checked_add(unit - 1) {
            Some(s) => s & !(unit - 1),
            None => return Span { start: self.start, len: 0 },
        };
        Span::between(start, self.end() & !(unit - 1))
    }

    /// Whether both ends are multiples of `unit` (a power of two).
    pub const fn is_aligned(&self, unit: u64) -> bool {
        (self.start | self.len) & (unit - 1) == 0
    }

    /// The first `len` bytes and the rest. `len` past the end gives the whole and an empty rest.
    pub fn split_at(&self, len: u64) -> (Span, Span) {
        let len = len.min(self.len);
        (Span { start: self.start, len }, Span { start: self.start + len, len: self.len - len })
    }

    /// The span in pieces of `most` bytes (more than 0) from its start; the last may be shorter.
    pub fn pieces(&self, most: u64) -> impl Iterator<Item = Span> + use<> {
        let mut left = *self;
        std::iter::from_fn(move || {
            let (piece, rest) = left.split_at(most);
            left = rest;
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// The span moved so that it starts `by` bytes later.
    pub const fn shifted(&self, by: u64) -> Span {
        Span::new(self.start + by, self.len)
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}+{:#x}]", self.start, self.len)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "offset {} length {}", self.start, self.len)
    }
}

/// What one layer knows of a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Bytes are stored in this layer.
    Data,
    /// This layer says the range reads as zeroes (with or without space behind it).
    Zero,
    /// This layer says nothing: the layer below decides, or zeroes if there is none.
    Unallocated,
}

/// One run of equal kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Where, in the coordinates of the node that was asked.
    pub span: Span,
    /// What is there.
    pub kind: Kind,
    /// For data stored plainly: the offset of its first byte in the protocol node below.
    pub host: Option<u64>,
    /// For data: it is stored compressed or otherwise packed.
    pub packed: bool,
}

impl Extent {
    /// An extent without a host offset.
    pub const fn new(span: Span, kind: Kind) -> Extent {
        Extent { span, kind, host: None, packed: false }
    }

    /// Appends `next` to a list, joined to the last element where both say the same and touch.
    pub fn push_merged(list: &mut Vec<Extent>, next: Extent) {
        if next.span.is_empty() {
            return;
        }
        if let Some(last) = list.last_mut() {
            let contiguous = match (last.host, next.host) {
                (Some(a), Some(b)) => a + last.span.len == b,
                (None, None) => true,
                _ => false,
            };
            if last.kind == next.kind
                && last.packed == next.packed
                && last.span.end() == next.span.start
                && contiguous
            {
                last.span.len += next.span.len;
                return;
            }
        }
        list.push(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_span_once() {
        let cut = |at: Span, most| at.pieces(most).map(|s| (s.start, s.len)).collect::<Vec<_>>();
        assert_eq!(cut(Span::new(10, 100), 60), [(10, 60), (70, 40)]);
        assert_eq!(cut(Span::new(0, 100), 50), [(0, 50), (50, 50)]);
        assert_eq!(cut(Span::new(10, 0), 50), []);
    }

    #[test]
    fn alignment_at_the_borders() {
        let s = Span::new(100, 1000);
        assert_eq!(s.align_out(512), Span::between(0, 1536));
        assert_eq!(s.align_in(512), Span::between(512, 1024));
        assert!(Span::new(1, 100).align_in(512).is_empty());
        assert_eq!(Span::checked(u64::MAX, 1), None);
        assert_eq!(Span::new(u64::MAX - 1, 10).end(), u64::MAX);
    }

    #[test]
    fn overlap_needs_a_common_byte() {
        assert!(!Span::new(0, 10).overlaps(&Span::new(10, 5)));
        assert!(Span::new(0, 11).overlaps(&Span::new(10, 5)));
        assert!(!Span::new(5, 0).overlaps(&Span::new(0, 10)));
    }

    #[test]
    fn extents_join_only_when_contiguous_on_the_host() {
        let mut v = Vec::new();
        let data = |s: u64, h: u64| Extent { host: Some(h), ..Extent::new(Span::new(s, 10), Kind::Data) };
        Extent::push_merged(&mut v, data(0, 100));
        Extent::push_merged(&mut v, data(10, 110));
        Extent::push_merged(&mut v, data(20, 500));
        assert_eq!(v.len(), 2);
    }
}
