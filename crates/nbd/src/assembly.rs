//! Putting the chunks of one read together.
//!
//! A server may send a read in any number of chunks in any order, but each byte exactly once. What must stay true: a
//! read is only complete when every byte was covered, no byte is covered twice, and the number of pieces is bounded by
//! the length that we asked for.

use block::{BlockError, Data, Result, Span};
use std::collections::BTreeMap;

/// A server that sends pieces shorter than this on average is refused.
const SMALLEST_PIECE: u64 = 512;
/// Pieces that any read may have.
const SPARE_PIECES: u64 = 16;

/// The pieces of one read so far.
pub struct ReadAssembly {
    span: Span,
    covered: u64,
    pieces: BTreeMap<u64, Data>,
}

impl ReadAssembly {
    /// A read of `span` of which nothing has arrived.
    pub fn new(span: Span) -> ReadAssembly {
        ReadAssembly { span, covered: 0, pieces: BTreeMap::new() }
    }

    /// Adds bytes at `offset` (in the export).
    pub fn data(&mut self, offset: u64, data: Data) -> Result<()> {
        let piece = Span::checked(offset, data.len() as u64)
            .filter(|p| self.span.contains(p) && !p.is_empty())
            .ok_or_else(|| {
                BlockError::corrupt(format!("NBD server sent data outside the read of {}", self.span))
            })?;
        let before = self.pieces.range(..piece.end()).next_back();
        if before.is_some_and(|(at, d)| at + d.len() as u64 > piece.start) {
            return Err(BlockError::corrupt(format!("NBD server sent {piece} twice in one read")));
        }
        if self.pieces.len() as u64 > self.span.len / SMALLEST_PIECE + SPARE_PIECES {
            return Err(BlockError::corrupt(format!(
                "NBD server cut the read of {} into too many pieces",
                self.span
            )));
        }
        self.covered += piece.len;
        self.pieces.insert(offset, data);
        Ok(())
    }

    /// Adds a hole.
    pub fn hole(&mut self, hole: Span) -> Result<()> {
        if !self.span.contains(&hole) {
            return Err(BlockError::corrupt(format!(
                "NBD server sent a hole outside the read of {}",
                self.span
            )));
        }
        self.data(hole.start, Data::zeroes(hole.len as usize))
    }

    /// The bytes, if all are there.
    pub fn finish(self) -> Result<Data> {
        if self.covered != self.span.len {
            return Err(BlockError::corrupt(format!(
                "NBD server sent {} bytes for the read of {}",
                self.covered, self.span
            )));
        }
        Ok(self.pieces.into_values().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_in_any_order_give_the_bytes() {
        let mut a = ReadAssembly::new(Span::new(100, 10));
        a.data(105, Data::copy_from(b"fghij")).unwrap();
        a.hole(Span::new(102, 3)).unwrap();
        a.data(100, Data::copy_from(b"ab")).unwrap();
        assert_eq!(a.finish().unwrap().to_vec(), b"ab\0\0\0fghij");
    }

    #[test]
    fn overlaps_gaps_and_strays_are_refused() {
        let mut a = ReadAssembly::new(Span::new(100, 10));
        a.data(102, Data::zeroes(3)).unwrap();
        for (at, n) in
            [(102, 3), (101, 2), (104, 1), (100, 10), (103, 1), (99, 1), (109, 2), (u64::MAX, 5), (105, 0)]
        {
            assert!(a.data(at, Data::zeroes(n)).is_err(), "{at}+{n}");
        }
        assert!(a.hole(Span::new(0, 1 << 60)).is_err());
        assert!(a.finish().is_err());
    }

    #[test]
    fn crumbs_are_refused() {
        let mut a = ReadAssembly::new(Span::new(0, 4096));
        let refused = (0..4096).find(|i| a.data(*i, Data::zeroes(1)).is_err());
        assert_eq!(refused, Some(25));
    }
}
