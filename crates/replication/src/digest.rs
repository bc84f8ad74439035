//! The digest of an epoch: a sum of keyed hashes of its changes, independent of their order.
//!
//! A secondary proves with it that it holds exactly the changes of an epoch, without reading them again. It guards against
//! defects and lost frames, not against an enemy: who may write is decided by TLS and the generation.

use crate::types::Seq;

/// Hashes one word: the finalizer of splitmix64 (Steele, Lea, Flood 2014), a bijection.
pub(crate) const fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Hash of a range's content, to compare two copies of it: the first eight bytes of its BLAKE3 (little-endian), which takes all lanes of
/// the processor. Guests wait while the home thread is at it.
pub fn content_hash(data: &block::Data) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for part in data.parts() {
        hasher.update(part);
    }
    hasher.finalize().as_bytes().first_chunk().map_or(0, |first| u64::from_le_bytes(*first))
}

/// Count, bytes and sum of hashes of the changes of an epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Digest {
    /// Changes.
    pub count: u64,
    /// Bytes covered by them.
    pub bytes: u64,
    /// The sum.
    pub sum: u64,
}

impl Digest {
    /// Adds a change.
    pub fn add(&mut self, seq: Seq, volume: u16, offset: u64, len: u32, payload_crc: u32) {
        self.count = self.count.saturating_add(1);
        self.bytes = self.bytes.saturating_add(u64::from(len));
        let mut h = mix(seq.0 ^ 0x6c69_7665_626c_6b00);
        h = mix(h ^ offset);
        h = mix(h ^ (u64::from(len) << 32 | u64::from(payload_crc)));
        self.sum = self.sum.wrapping_add(mix(h ^ u64::from(volume)));
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}-{:x}-{:016x}", self.count, self.bytes, self.sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both sides may have the same bytes in other pieces. The value is that of the specification's test vectors (input length 3: bytes 0, 1, 2).
    #[test]
    fn the_pieces_of_a_content_do_not_matter_and_its_bytes_do() {
        let whole = block::Data::from(vec![0, 1, 2]);
        let mut pieces = block::Data::from(vec![0]);
        pieces.append(block::Data::from(vec![1, 2]));
        assert_eq!(content_hash(&whole).to_le_bytes(), [0xe1, 0xbe, 0x4d, 0x7a, 0x8a, 0xb5, 0x56, 0x0a]);
        assert_eq!(content_hash(&whole), content_hash(&pieces));
        assert_ne!(content_hash(&whole), content_hash(&block::Data::from(vec![0, 1, 3])));
        assert_ne!(content_hash(&block::Data::zeroes(512)), content_hash(&block::Data::zeroes(1024)));
    }

    #[test]
    fn order_does_not_matter_and_each_field_does() {
        let item = |seq, volume, offset, len, crc| {
            let mut d = Digest::default();
            d.add(Seq(seq), volume, offset, len, crc);
            d
        };
        let (mut ab, mut ba) = (Digest::default(), Digest::default());
        ab.add(Seq(1), 0, 0, 512, 7);
        ab.add(Seq(2), 0, 512, 512, 8);
        ba.add(Seq(2), 0, 512, 512, 8);
        ba.add(Seq(1), 0, 0, 512, 7);
        assert_eq!(ab, ba);
        let base = item(1, 2, 3, 4, 5);
        for other in [
            item(2, 2, 3, 4, 5),
            item(1, 3, 3, 4, 5),
            item(1, 2, 4, 4, 5),
            item(1, 2, 3, 5, 5),
            item(1, 2, 3, 4, 6),
        ] {
            assert_ne!(base.sum, other.sum);
        }
    }
}
