//! A ring: the last bytes that were written, up to its size.

use std::collections::VecDeque;

pub(super) struct Ring {
    bytes: VecDeque<u8>,
    size: usize,
}

impl Ring {
    pub(super) fn new(size: usize) -> Ring {
        Ring { bytes: VecDeque::new(), size }
    }

    /// Adds bytes; the oldest go where there is no room.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        let kept = &bytes[bytes.len().saturating_sub(self.size)..];
        let over = (self.bytes.len() + kept.len()).saturating_sub(self.size);
        self.bytes.drain(..over);
        self.bytes.extend(kept);
    }

    /// Takes the oldest bytes, at most `max`.
    pub(super) fn read(&mut self, max: usize) -> Vec<u8> {
        self.bytes.drain(..max.min(self.bytes.len())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_stay() {
        let mut r = Ring::new(4);
        r.write(b"ab");
        r.write(b"cde");
        assert_eq!(r.read(3), b"bcd");
        r.write(b"0123456789");
        assert_eq!(r.read(100), b"6789");
        assert!(r.read(1).is_empty());
    }
}
