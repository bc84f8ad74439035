//! What is still to be copied: granules, and of those that were copied and then changed by guests only the parts that were.
//!
//! A granule is what is accounted for, locked and found; a guest's request is often much smaller, and a copy of the whole
//! granule for it costs many times what the guest did. What must stay true: a dirty granule without parts is to be copied as a
//! whole; one with parts differs from the target nowhere else; a clean granule has no parts.

use crate::bugs::{Bug, planted};
use bitmap::Bitmap;
use block::Span;
use smallvec::SmallVec;
use std::ops::Deref;

/// Unit of parts in bytes: what guests mostly write, and what any disk takes.
pub(crate) const PART: u64 = 4096;
/// A granule has this many parts at least, or parts are not worth it.
const PARTS_LEAST: u64 = 4;
/// A granule with more than one piece for so many of its bytes is copied as a whole: each piece costs two requests.
const BYTES_PER_PIECE: u64 = 8192;
/// And one with more than this, however large it is: they are all in flight together.
const PIECES_MOST: u64 = 32;

/// Dirty granules, and parts of them. Derefs to the granules.
pub(crate) struct Dirty {
    granules: Bitmap,
    parts: Option<Bitmap>,
}

/// Dirty granules that are copied in one way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ToCopy {
    /// The granules.
    pub(crate) at: Span,
    /// What of them; nothing here: all.
    pub(crate) parts: SmallVec<[Span; 2]>,
}

impl ToCopy {
    /// Bytes to be copied.
    pub(crate) fn bytes(&self) -> u64 {
        if self.parts.is_empty() { self.at.len } else { self.parts.iter().map(|p| p.len).sum() }
    }
}

impl Deref for Dirty {
    type Target = Bitmap;
    fn deref(&self) -> &Bitmap {
        &self.granules
    }
}

impl Dirty {
    pub(crate) fn new(granules: Bitmap) -> Dirty {
        Dirty { granules, parts: None }
    }

    /// From now on remembers parts, if granules are large enough, and the disk is not too large for a bit for each.
    pub(crate) fn keep_parts(&mut self) {
        if self.granularity() >= PARTS_LEAST * PART {
            self.parts = Bitmap::new(self.len(), PART).ok();
        }
    }

    /// Every granule that `at` touches is to be copied as a whole.
    pub(crate) fn set(&mut self, at: Span) {
        self.granules.set(at);
        if let Some(parts) = &mut self.parts {
            parts.clear(self.granules.granules_around(at));
        }
    }

    /// A guest changed `at`. Bytes that have to be copied because of that; what is changed once more before it is copied counts again.
    pub(crate) fn set_changed(&mut self, at: Span) -> u64 {
        let at = at.intersect(&Span::new(0, self.len()));
        if self.parts.is_none() || at.is_empty() {
            let before = self.count();
            self.granules.set(at);
            return self.count() - before;
        }
        let first = self.granules_around(Span::new(at.start, 1));
        let last = self.granules_around(Span::new(at.end() - 1, 1));
        if first == last {
            return self.set_inside(first, at);
        }
        let inner = Span::between(first.end(), last.start);
        let before = self.count();
        self.set(inner);
        let more = self.count() - before;
        more + self.set_inside(first, at.intersect(&first)) + self.set_inside(last, at.intersect(&last))
    }

    /// The same of a part of one granule, or all of it.
    fn set_inside(&mut self, granule: Span, part: Span) -> u64 {
        let dirty = self.granules.get(granule.start);
        if part == granule {
            self.set(granule);
            return if dirty { 0 } else { granule.len };
        }
        self.granules.set(granule);
        let Some(parts) = &mut self.parts else { return 0 };
        let whole = dirty && parts.next_area(granule, 0).is_none();
        if whole || (dirty && planted(Bug::PartForgotten)) {
            return 0;
        }
        parts.set(part);
        let most = (granule.len / BYTES_PER_PIECE).min(PIECES_MOST);
        let (mut pieces, mut bytes) = (0, 0);
        for piece in parts.areas(granule, 0) {
            pieces += 1;
            bytes += piece.len;
            if pieces > most || bytes > granule.len / 2 {
                parts.clear(granule);
                return granule.len;
            }
        }
        part.align_out(PART).len
    }

    /// Granules wholly inside `at` need not be copied; those that it only touches stay as they are.
    pub(crate) fn clear(&mut self, at: Span) {
        self.granules.clear(at);
        if let Some(parts) = &mut self.parts {
            parts.clear(self.granules.granules_within(at));
        }
    }

    /// All is to be copied.
    pub(crate) fn set_all(&mut self) {
        self.set(Span::new(0, self.len()));
    }

    /// Nothing is to be copied.
    pub(crate) fn clear_all(&mut self) {
        self.granules.clear_all();
        if let Some(parts) = &mut self.parts {
            parts.clear_all();
        }
    }

    /// What is dirty in `other` is to be copied as well, in whole granules; so is then what was dirty.
    pub(crate) fn merge(&mut self, other: &Bitmap) {
        self.granules.merge(other);
        if let Some(parts) = &mut self.parts {
            parts.clear_all();
        }
    }

    /// How the dirty granules of `at` are copied, in their order.
    pub(crate) fn to_copy(&self, at: Span) -> SmallVec<[ToCopy; 1]> {
        let mut found: SmallVec<[ToCopy; 1]> = SmallVec::new();
        for area in self.areas(at, 0) {
            let mut left = area;
            while let Some((granule, parts)) = self.next_in_parts(left) {
                let before = Span::between(left.start, granule.start);
                if !before.is_empty() {
                    found.push(ToCopy { at: before, parts: SmallVec::new() });
                }
                found.push(ToCopy { at: granule, parts });
                left = Span::between(granule.end(), left.end());
            }
            if !left.is_empty() {
                found.push(ToCopy { at: left, parts: SmallVec::new() });
            }
        }
        found
    }

    /// The first granule of `area`, which is dirty, of which only parts are copied.
    fn next_in_parts(&self, area: Span) -> Option<(Span, SmallVec<[Span; 2]>)> {
        let parts = self.parts.as_ref()?;
        let first = parts.next_area(area, 0)?;
        let granule = self.granules_around(Span::new(first.start, 1));
        Some((granule, parts.areas(granule, 0).collect()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const G: u64 = 65536;

    fn made(len: u64) -> Dirty {
        let mut d = Dirty::new(Bitmap::new(len, G).unwrap());
        d.keep_parts();
        d
    }

    /// Start and length of granules, and of their parts.
    type Told = (u64, u64, Vec<(u64, u64)>);

    fn told(d: &Dirty) -> Vec<Told> {
        let spans = |p: &Span| (p.start, p.len);
        d.to_copy(Span::new(0, d.len()))
            .iter()
            .map(|t| (t.at.start, t.at.len, t.parts.iter().map(spans).collect()))
            .collect()
    }

    #[test]
    fn what_a_guest_changes_in_a_copied_granule_is_all_that_is_copied() {
        let mut d = made(8 * G + 1000);
        assert_eq!(d.set_changed(Span::new(G + 5000, 100)), PART);
        assert_eq!(told(&d), [(G, G, vec![(G + 4096, 4096)])]);
        assert_eq!(d.dirty_bytes(), G, "granules are what is counted");
        assert_eq!(d.set_changed(Span::new(G + 5000, 4000)), 2 * PART);
        assert_eq!(told(&d), [(G, G, vec![(G + 4096, 8192)])]);
        // over three granules: the one in the middle as a whole
        assert_eq!(d.set_changed(Span::new(3 * G - 1, G + 2)), PART + G + PART);
        assert_eq!(
            told(&d)[1..],
            [(2 * G, G, vec![(3 * G - 4096, 4096)]), (3 * G, G, vec![]), (4 * G, G, vec![(4 * G, 4096)])]
        );
        d.set_changed(Span::new(8 * G + 10, 20));
        assert_eq!(told(&d).last().unwrap(), &(8 * G, 1000, vec![]), "nothing gained in so short a granule");
        d.clear(Span::new(0, d.len()));
        assert_eq!(told(&d), []);
        d.set(Span::new(G, 1));
        assert_eq!(told(&d), [(G, G, vec![])], "no parts are left behind");
    }

    #[test]
    fn a_granule_that_is_to_be_copied_as_a_whole_stays_so() {
        let mut d = made(8 * G);
        d.set(Span::new(0, 3 * G));
        assert_eq!(d.set_changed(Span::new(G, 4096)), 0);
        assert_eq!(told(&d), [(0, 3 * G, vec![])]);
        d.set_changed(Span::new(5 * G, 4096));
        d.set(Span::new(5 * G + 9000, 1));
        assert_eq!(told(&d)[1..], [(5 * G, G, vec![])]);
        d.clear(Span::new(5 * G, G - 1));
        assert!(d.get(5 * G), "not all of it");
        d.clear_all();
        d.set_changed(Span::new(5 * G, 4096));
        let mut other = Bitmap::new(8 * G, G).unwrap();
        other.set(Span::new(5 * G, 1));
        d.merge(&other);
        assert_eq!(told(&d), [(5 * G, G, vec![])]);
        d.clear(Span::new(4 * G, 2 * G));
        for i in 0..G / BYTES_PER_PIECE {
            assert_eq!(d.set_changed(Span::new(5 * G + 2 * i * PART, 1)), PART);
            assert_eq!(told(&d)[0].2.len() as u64, i + 1);
        }
        assert_eq!(d.set_changed(Span::new(6 * G - 1, 1)), G, "all of it has to be copied now");
        assert_eq!(told(&d), [(5 * G, G, vec![])], "more than is worth it");
        assert_eq!(d.set_changed(Span::new(5 * G, 1)), 0);
    }

    #[test]
    fn small_granules_have_no_parts() {
        let mut d = Dirty::new(Bitmap::new(8 * G, 8192).unwrap());
        d.keep_parts();
        assert_eq!(d.set_changed(Span::new(0, 100)), 8192);
        assert_eq!(told(&d), [(0, 8192, vec![])]);
    }
}
