//! Bytes received and not yet understood.
//!
//! What must stay true: the memory held is at most about twice the bytes in the inbox, however small the pieces are in
//! which a peer sends them. A received piece is a slice of a pooled buffer and keeps all of that alive; therefore pieces
//! shorter than the caller's threshold are copied into one growing buffer, and only long ones are kept as they are.

use block::Data;
use bytes::{Buf, Bytes, BytesMut};
use std::collections::VecDeque;

/// A queue of bytes in pieces.
#[derive(Default)]
pub struct Inbox {
    chunks: VecDeque<Bytes>,
    /// Copied small pieces, after all of `chunks`.
    tail: BytesMut,
    len: usize,
}

impl Inbox {
    /// No bytes.
    pub fn new() -> Inbox {
        Inbox::default()
    }

    /// Bytes in the inbox.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds what was received. Shorter than `copy_below` bytes: by copy.
    pub fn push(&mut self, piece: Bytes, copy_below: usize) {
        self.len += piece.len();
        if piece.len() < copy_below {
            self.tail.extend_from_slice(&piece);
        } else {
            self.seal();
            self.chunks.push_back(piece);
        }
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.chunks.push_back(self.tail.split().freeze());
        }
    }

    /// Copies the first `N` bytes without taking them; `None` if there are fewer.
    pub fn peek<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.len < N {
            return None;
        }
        self.seal();
        let mut out = [0; N];
        if let Some(whole) = self.chunks.front().and_then(|c| c.get(..N)) {
            out.copy_from_slice(whole);
            return Some(out);
        }
        let mut at = 0;
        for c in &self.chunks {
            let n = c.len().min(N - at);
            out[at..at + n].copy_from_slice(&c[..n]);
            at += n;
            if at == N {
                break;
            }
        }
        Some(out)
    }

    /// Takes the first `N` bytes; `None` (and nothing taken) if there are fewer.
    pub fn take_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let out = self.peek()?;
        self.skip(N);
        Some(out)
    }

    /// Drops up to `n` bytes; the number dropped.
    pub fn skip(&mut self, n: usize) -> usize {
        let n = n.min(self.len);
        self.seal();
        self.len -= n;
        let mut left = n;
        while left > 0 {
            let Some(front) = self.chunks.front_mut() else { break };
            let step = left.min(front.len());
            left -= step;
            if step == front.len() {
                self.chunks.pop_front();
            } else {
                front.advance(step);
            }
        }
        n
    }

    /// Takes the first `n` bytes, not copied; `None` (and nothing taken) if there are fewer.
    pub fn take(&mut self, n: usize) -> Option<Data> {
        if self.len < n {
            return None;
        }
        self.seal();
        self.len -= n;
        let mut out = Data::empty();
        let mut left = n;
        while left > 0 {
            let Some(front) = self.chunks.front_mut() else { break };
            if left >= front.len() {
                left -= front.len();
                if let Some(whole) = self.chunks.pop_front() {
                    out.push(whole);
                }
            } else {
                out.push(front.split_to(left));
                left = 0;
            }
        }
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_out_in_order_whether_copied_or_not() {
        let mut b = Inbox::new();
        for (i, size) in [1usize, 2, 10, 3, 20, 1].into_iter().enumerate() {
            b.push(vec![i as u8; size].into(), 5);
        }
        assert_eq!(b.len(), 37);
        assert_eq!(b.peek::<4>(), Some([0, 1, 1, 2]));
        assert_eq!(b.take(14).unwrap().to_vec(), [&[0, 1, 1][..], &[2; 10], &[3]].concat());
        assert!(b.take(24).is_none());
        assert_eq!(b.skip(100), 23);
        assert!(b.is_empty());
    }

    #[test]
    fn single_bytes_do_not_keep_their_buffers() {
        let mut b = Inbox::new();
        for i in 0..100_000u32 {
            b.push(vec![i as u8].into(), 1024);
        }
        assert!(b.take_array::<100>().is_some());
        assert_eq!(b.chunks.len(), 1);
    }

    #[test]
    fn long_pieces_are_not_copied() {
        let piece = Bytes::from(vec![7; 4096]);
        let at = piece.as_ptr();
        let mut b = Inbox::new();
        b.push(piece, 1024);
        assert_eq!(b.take(4096).unwrap().parts()[0].as_ptr(), at);
    }
}
