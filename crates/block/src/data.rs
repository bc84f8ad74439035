//! The bytes of a request: an immutable rope of shared slices.
//!
//! A rope, because one read may come from several places (two clusters, a hole, a backing file) and one write may have
//! arrived in several receives: neither needs a copy to become one piece. Holes are parts of one static zero page, so
//! they cost no memory. Parts are reference counted; whoever gave the memory gets it back when the last part is dropped.

use bytes::Bytes;
use smallvec::SmallVec;

/// Bytes in one part of a rope of zeroes.
pub const ZERO_PART: usize = 64 * 1024;
static ZEROES: [u8; ZERO_PART] = [0; ZERO_PART];

/// Immutable bytes in one or more parts. Empty parts are never stored.
#[derive(Clone, Default)]
pub struct Data {
    parts: SmallVec<[Bytes; 1]>,
    len: usize,
}

impl Data {
    /// No bytes.
    pub fn empty() -> Data {
        Data::default()
    }

    /// `len` zero bytes, without memory of their own.
    pub fn zeroes(len: usize) -> Data {
        let mut d = Data::default();
        let mut left = len;
        while left > 0 {
            let n = left.min(ZERO_PART);
            d.parts.push(Bytes::from_static(&ZEROES[..n]));
            left -= n;
        }
        d.len = len;
        d
    }

    /// A copy of `bytes`.
    pub fn copy_from(bytes: &[u8]) -> Data {
        Data::from(Bytes::copy_from_slice(bytes))
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The parts, in order.
    pub fn parts(&self) -> &[Bytes] {
        &self.parts
    }

    /// Appends one part.
    pub fn push(&mut self, part: Bytes) {
        if !part.is_empty() {
            self.len += part.len();
            self.parts.push(part);
        }
    }

    /// Appends another rope; no bytes are copied.
    pub fn append(&mut self, other: Data) {
        self.len += other.len;
        self.parts.extend(other.parts);
    }

    /// The bytes `[from, from + len)`, shared, not copied.
    ///
    /// # Panics
    /// If the range is not inside the rope (a caller's defect, never input).
    pub fn slice(&self, from: usize, len: usize) -> Data {
        assert!(
            from.checked_add(len).is_some_and(|end| end <= self.len),
            "slice {from}+{len} of {}",
            self.len
        );
        let mut out = Data::default();
        let (mut skip, mut left) = (from, len);
        for p in &self.parts {
            if left == 0 {
                break;
            }
            if skip >= p.len() {
                skip -= p.len();
                continue;
            }
            let n = left.min(p.len() - skip);
            out.push(p.slice(skip..skip + n));
            skip = 0;
            left -= n;
        }
        out
    }

    /// Takes the first `len` bytes out of the rope.
    pub fn split_to(&mut self, len: usize) -> Data {
        let head = self.slice(0, len);
        *self = self.slice(len, self.len - len);
        head
    }

    /// Whether every byte is zero.
    pub fn is_zero(&self) -> bool {
        self.parts.iter().all(|p| is_zero(p))
    }

    /// Copies all bytes to `to`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_to(&self, to: &mut [u8]) {
        assert_eq!(to.len(), self.len);
        let mut at = 0;
        for p in &self.parts {
            to[at..at + p.len()].copy_from_slice(p);
            at += p.len();
        }
    }

    /// All bytes as one slice, copied only if there are several parts.
    pub fn contiguous(&self) -> Bytes {
        match self.parts.as_slice() {
            [] => Bytes::new(),
            [one] => one.clone(),
            _ => self.to_vec().into(),
        }
    }

    /// All bytes, copied.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut v = Vec::with_capacity(self.len);
        self.parts.iter().for_each(|p| v.extend_from_slice(p));
        v
    }
}

impl From<Bytes> for Data {
    fn from(b: Bytes) -> Data {
        let mut d = Data::default();
        d.push(b);
        d
    }
}

impl From<Vec<u8>> for Data {
    fn from(v: Vec<u8>) -> Data {
        Data::from(Bytes::from(v))
    }
}

impl FromIterator<Data> for Data {
    fn from_iter<I: IntoIterator<Item = Data>>(iter: I) -> Data {
        let mut d = Data::default();
        iter.into_iter().for_each(|x| d.append(x));
        d
    }
}

impl PartialEq for Data {
    fn eq(&self, other: &Data) -> bool {
        self.len == other.len
            && self.parts.iter().flat_map(|p| p.iter()).eq(other.parts.iter().flat_map(|p| p.iter()))
    }
}
impl Eq for Data {}

impl std::fmt::Debug for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Data({} bytes in {} parts)", self.len, self.parts.len())
    }
}

/// Whether all of `bytes` is zero. Looks at both ends first, since most data shows itself there; then compares in
/// pieces that the compiler turns into vector instructions.
pub fn is_zero(bytes: &[u8]) -> bool {
    if let (Some(a), Some(b)) = (bytes.first(), bytes.last())
        && (*a | *b) != 0
    {
        return false;
    }
    let (chunks, rest) = bytes.as_chunks::<128>();
    chunks.iter().all(|c| c.iter().fold(0u8, |acc, b| acc | b) == 0) && rest.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rope_slices_across_parts_without_copy() {
        let mut d = Data::copy_from(b"abc");
        d.append(Data::copy_from(b"defg"));
        d.append(Data::zeroes(3));
        assert_eq!(d.len(), 10);
        assert_eq!(d.slice(2, 3).to_vec(), b"cde");
        assert_eq!(d.slice(6, 4).to_vec(), b"g\0\0\0");
        assert_eq!(d.split_to(4).to_vec(), b"abcd");
        assert_eq!(d.to_vec(), b"efg\0\0\0");
        assert_eq!(d.parts()[0].as_ptr(), d.slice(0, 1).parts()[0].as_ptr());
    }

    #[test]
    fn zero_test_sees_every_position() {
        for n in [0usize, 1, 127, 128, 129, 400] {
            assert!(is_zero(&vec![0; n]));
            for at in 0..n {
                let mut v = vec![0; n];
                v[at] = 1;
                assert!(!is_zero(&v), "{at} of {n}");
            }
        }
        assert!(Data::zeroes(3 * ZERO_PART + 5).is_zero());
    }
}
