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

/// Hash of a range's content, to compare two copies of it. Against defects, as above.
pub fn content_hash(data: &block::Data) -> u64 {
    let bytes = data.contiguous();
    let (words, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let all = words.iter().copied().chain([last]);
    all.fold(bytes.len() as u64, |h, w| mix(h ^ u64::from_le_bytes(w)))
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
