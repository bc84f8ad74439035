//! Where the bytes of a layer lie: ranges of a volume, each in the log or known to be zero.

use block::Span;
use std::collections::BTreeMap;

/// Where bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// In the log's file, from this offset on.
    Log(u64),
    /// Nowhere: they are zero.
    Zero,
    /// On the volume itself.
    Disk,
}

impl Place {
    fn shifted(self, by: u64) -> Place {
        match self {
            Place::Log(at) => Place::Log(at + by),
            other => other,
        }
    }
}

/// Ranges that do not overlap, by start.
#[derive(Default, Debug)]
pub(crate) struct RangeMap {
    map: BTreeMap<u64, (u64, Place)>,
}

impl RangeMap {
    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    /// `at` is now at `place`, whatever was there.
    pub(crate) fn insert(&mut self, at: Span, place: Place) {
        if at.is_empty() {
            return;
        }
        self.cut(at);
        self.map.insert(at.start, (at.len, place));
    }

    /// Takes `at` out.
    fn cut(&mut self, at: Span) {
        let before = self.map.range(..at.start).next_back().map(|(s, v)| (*s, *v));
        if let Some((start, (len, place))) = before
            && start + len > at.start
        {
            self.map.insert(start, (at.start - start, place));
            if start + len > at.end() {
                self.map.insert(at.end(), (start + len - at.end(), place.shifted(at.end() - start)));
            }
        }
        while let Some((start, (len, place))) =
            self.map.range(at.start..at.end()).next().map(|(s, v)| (*s, *v))
        {
            self.map.remove(&start);
            if start + len > at.end() {
                self.map.insert(at.end(), (start + len - at.end(), place.shifted(at.end() - start)));
            }
        }
    }

    /// Cuts `at` into pieces: those that this map has, and those that it has not.
    pub(crate) fn look_up(&self, at: Span, mut piece: impl FnMut(Span, Option<Place>)) {
        let mut from = at.start;
        let first = self.map.range(..=at.start).next_back().filter(|(s, (len, _))| **s + len > at.start);
        let first = first.map(|(s, v)| (*s, *v));
        let rest = self
            .map
            .range(at.start.saturating_add(1)..at.end().max(at.start.saturating_add(1)))
            .map(|(s, v)| (*s, *v));
        for (start, (len, place)) in first.into_iter().chain(rest) {
            let found = Span::new(start, len).intersect(&at);
            if found.start > from {
                piece(Span::between(from, found.start), None);
            }
            piece(found, Some(place.shifted(found.start - start)));
            from = found.end();
        }
        if from < at.end() {
            piece(Span::between(from, at.end()), None);
        }
    }

    /// All ranges.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Span, Place)> + '_ {
        self.map.iter().map(|(s, (len, p))| (Span::new(*s, *len), *p))
    }

    /// Up to `n` ranges that begin at `from` or behind it.
    pub(crate) fn some_from(&self, from: u64, n: usize) -> Vec<(Span, Place)> {
        self.map.range(from..).take(n).map(|(s, (len, p))| (Span::new(*s, *len), *p)).collect()
    }

    /// Frees up to `n` ranges; whether any are left.
    pub(crate) fn free_some(&mut self, n: usize) -> bool {
        (0..n).all(|_| self.map.pop_first().is_some())
    }
}

/// Looks `at` up in `maps`, the first that has a byte decides; what none has is on the disk.
pub(crate) fn resolve<'a>(maps: impl Iterator<Item = &'a RangeMap>, at: Span) -> Vec<(Span, Place)> {
    let mut pieces = vec![(at, Place::Disk)];
    for map in maps.filter(|m| !m.map.is_empty()) {
        if pieces.iter().all(|p| p.1 != Place::Disk) {
            break;
        }
        let mut next = Vec::with_capacity(pieces.len());
        for (span, place) in pieces {
            if place == Place::Disk {
                map.look_up(span, |s, p| next.push((s, p.unwrap_or(Place::Disk))));
            } else {
                next.push((span, place));
            }
        }
        pieces = next;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_an_array() {
        let mut x = 12345u64;
        let mut draw = move |n: u64| {
            x = crate::digest::mix(x);
            x % n
        };
        let (mut map, mut array) = (RangeMap::default(), [None; 64]);
        for i in 0..3000u64 {
            let at = Span::new(draw(60), 1 + draw(12));
            let at = at.intersect(&Span::new(0, 64));
            map.insert(at, Place::Log(i * 1000));
            (at.start..at.end()).for_each(|b| array[b as usize] = Some(i * 1000 + b - at.start));
            let look = Span::new(draw(60), 1 + draw(20)).intersect(&Span::new(0, 64));
            let mut next = look.start;
            map.look_up(look, |s, p| {
                assert_eq!(s.start, next);
                next = s.end();
                for b in s.start..s.end() {
                    let want = array[b as usize];
                    assert_eq!(p.map(|p| p.shifted(b - s.start)), want.map(Place::Log));
                }
            });
            assert_eq!(next, look.end());
        }
    }
}
