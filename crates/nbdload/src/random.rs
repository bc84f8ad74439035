//! Which block comes next: numbers that a seed repeats, cheap enough not to be measured.

/// George Marsaglia's xorshift over 64 bits.
pub struct Random(u64);

impl Random {
    /// From this seed; 0, from which nothing would follow, counts as 1.
    pub fn new(seed: u64) -> Random {
        Random(seed.max(1))
    }

    /// The next number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0) * u128::from(n)) >> 64) as u64
    }

    /// Heads or tails, by the number that came last.
    pub fn coin(&self) -> bool {
        self.0 & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_its_numbers() {
        let mut r = Random::new(1);
        assert_eq!([r.below(1 << 32), r.below(1 << 32), r.below(10)], [0, 268_452_102, 6]);
        assert!(r.coin());
    }
}
