//! What each block must contain: what this client last wrote there, or what it read there before.

/// What is known of one connection's blocks.
pub struct Expected {
    /// 0: nothing; odd: written with this stamp; even: the fingerprint of what was read.
    tags: Vec<u64>,
    writes: u64,
    salt: u64,
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w))
}

fn fingerprint(bytes: &[u8]) -> u64 {
    let sum =
        words(bytes).fold(0x9e37_79b9u64, |h, w| (h.rotate_left(5) ^ w).wrapping_mul(0x517c_c1b7_2722_0a95));
    (mix(sum) & !1).max(2)
}

impl Expected {
    /// Nothing known of `blocks` blocks; `salt` tells runs and connections apart.
    pub fn new(blocks: u64, salt: u64) -> Expected {
        Expected { tags: vec![0; blocks as usize], writes: 0, salt }
    }

    /// Fills `to` with a new stamp for a block, which is what the block must contain from now on.
    pub fn stamp(&mut self, block: u64, to: &mut [u8]) {
        self.writes += 1;
        let tag = mix(self.salt ^ block.rotate_left(32) ^ self.writes) | 1;
        self.tags[block as usize] = tag;
        for (i, w) in to.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *w = tag.wrapping_add(i as u64).to_le_bytes();
        }
    }

    /// The blocks that were written.
    pub fn written(&self) -> Vec<u64> {
        (0u64..).zip(&self.tags).filter(|(_, tag)| **tag & 1 == 1).map(|(block, _)| block).collect()
    }

    /// Whether a block was read as it must be.
    pub fn check(&mut self, block: u64, bytes: &[u8]) -> bool {
        match &mut self.tags[block as usize] {
            unknown @ 0 => {
                *unknown = fingerprint(bytes);
                true
            }
            tag if *tag & 1 == 1 => {
                let tag = *tag;
                words(bytes).zip(0u64..).all(|(w, i)| w == tag.wrapping_add(i))
            }
            tag => *tag == fingerprint(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_bit_is_seen() {
        let mut e = Expected::new(4, 7);
        let mut b = vec![0u8; 4096];
        e.stamp(2, &mut b);
        assert!(e.check(2, &b));
        assert_eq!(e.written(), [2]);
        let old = b.clone();
        e.stamp(2, &mut b);
        assert!(e.check(2, &b) && !e.check(2, &old));
        b[4000] ^= 1;
        assert!(!e.check(2, &b));
        assert!(e.check(3, &old) && e.check(3, &old) && !e.check(3, &b));
    }
}
