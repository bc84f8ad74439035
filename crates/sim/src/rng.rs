//! The one source of chance in a simulated run: xoshiro256** (Blackman and Vigna, public domain), seeded by splitmix64.
//!
//! What must stay true: the same seed and the same calls give the same numbers on every machine, for ever; a failing
//! seed in `regressions/` is worth nothing otherwise. Independent parts of a run (world, guest, faults) take a stream
//! of their own with [`Rng::fork`], so that a draw more in one does not shift the others.

use std::time::Duration;

/// A stream of pseudo-random numbers.
#[derive(Clone, Debug)]
pub struct Rng {
    state: [u64; 4],
    /// What the next draws give, last first.
    told: Vec<u16>,
}

fn splitmix(x: &mut u64) -> u64 {
    *x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *x;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Rng {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Rng {
        let mut x = seed;
        Rng { state: std::array::from_fn(|_| splitmix(&mut x)), told: Vec::new() }
    }

    /// A stream whose first draws somebody else decides, two bytes each, so that a fuzzer steers what is made by chance; then
    /// the stream of seed 0.
    pub fn told(draws: &[u8]) -> Rng {
        let told = draws.chunks(2).map(|c| u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]));
        Rng { told: told.rev().collect(), ..Rng::new(0) }
    }

    /// A stream of its own, named so that two forks of one parent differ.
    #[must_use]
    pub fn fork(&mut self, name: &str) -> Rng {
        let salt = name.bytes().fold(0u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        Rng::new(self.draw() ^ salt)
    }

    /// 64 random bits.
    pub fn draw(&mut self) -> u64 {
        if let Some(told) = self.told.pop() {
            return u64::from(told) * 0x0001_0001_0001_0001;
        }
        let s = &mut self.state;
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A number in `0..n`; 0 for `n == 0`. (The bias of the multiplication is below 2^-32 for the `n` used here.)
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.draw()) * u128::from(n)) >> 64) as u64
    }

    /// A number in `low..=high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below((high - low).saturating_add(1))
    }

    /// An index into something of length `n`.
    pub fn index(&mut self, n: usize) -> usize {
        self.below(n as u64) as usize
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        p > 0.0 && ((self.draw() >> 11) as f64) < p * (1u64 << 53) as f64
    }

    /// One of `choices`, which is not empty.
    pub fn choose<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.index(choices.len())]
    }

    /// A duration whose binary logarithm is about evenly spread over `low..=high`: most are short, a few very long, as
    /// with disks. Integers only, so that no floating-point library decides what a seed means.
    pub fn duration(&mut self, low: Duration, high: Duration) -> Duration {
        let low = (low.as_nanos() as u64).max(1);
        let high = (high.as_nanos() as u64).max(low);
        let octave = self.between(u64::from(low.ilog2()), u64::from(high.ilog2())) as u32;
        let base = 1u64 << octave;
        Duration::from_nanos(base.saturating_add(self.below(base)).clamp(low, high))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_means_the_same_for_ever() {
        let mut r = Rng::new(1);
        let first: Vec<u64> = (0..3).map(|_| r.draw()).collect();
        // the reference implementation's numbers for state = splitmix64(1)
        assert_eq!(first, [0xb3f2_af6d_0fc7_10c5, 0x853b_5596_4736_4cea, 0x92f8_9756_082a_4514]);
        let mut again = Rng::new(1);
        assert_eq!(again.draw(), first[0]);
    }

    #[test]
    fn what_is_told_comes_first() {
        let mut r = Rng::told(&[0xff, 0xff, 0x80, 0, 7]);
        assert_eq!((r.below(10), r.below(10), r.draw() >> 48), (9, 5, 0x0700));
        assert_eq!(r.draw(), Rng::new(0).draw());
    }

    #[test]
    fn draws_stay_in_range_and_reach_both_ends() {
        let mut r = Rng::new(7);
        let mut seen = [false; 5];
        for _ in 0..200 {
            seen[r.index(5)] = true;
            let d = r.duration(Duration::from_micros(1), Duration::from_secs(60));
            assert!(d >= Duration::from_micros(1) && d <= Duration::from_secs(60), "{d:?}");
        }
        assert_eq!(seen, [true; 5]);
        assert!(!r.chance(0.0));
        assert!(r.chance(1.0));
    }
}
