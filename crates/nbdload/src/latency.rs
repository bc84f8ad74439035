//! Latencies in a histogram of about 1 % resolution, without a sample list that grows.

/// Steps per power of two.
const STEPS: u64 = 64;

/// Counts of latencies in nanoseconds.
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { counts: vec![0; (64 * STEPS) as usize], total: 0 }
    }
}

fn slot(ns: u64) -> usize {
    let ns = ns.max(STEPS);
    let power = u64::from(ns.ilog2());
    let shift = power - u64::from(STEPS.ilog2());
    (power * STEPS + ((ns >> shift) - STEPS)) as usize
}

fn value(slot: usize) -> u64 {
    let (power, step) = (slot as u64 / STEPS, slot as u64 % STEPS);
    (STEPS + step) << (power - u64::from(STEPS.ilog2()))
}

impl Histogram {
    /// Counts one.
    pub fn add(&mut self, ns: u64) {
        self.counts[slot(ns)] += 1;
        self.total += 1;
    }

    /// Adds another histogram.
    pub fn merge(&mut self, other: &Histogram) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
        self.total += other.total;
    }

    /// How many were counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The latency in microseconds that a share `q` of all did not exceed.
    pub fn quantile_us(&self, q: f64) -> f64 {
        let wanted = (self.total as f64 * q).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (i, n) in self.counts.iter().enumerate() {
            seen += n;
            if *n > 0 && seen >= wanted {
                return value(i) as f64 / 1000.0;
            }
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_two_percent() {
        let mut h = Histogram::default();
        (1..=100_000u64).for_each(|n| h.add(n * 10));
        for q in [0.5, 0.99, 0.999] {
            let want = 1000.0 * q;
            let got = h.quantile_us(q);
            assert!((got - want).abs() / want < 0.02, "{q}: {got} for {want}");
        }
        h.add(0);
        h.add(u64::MAX);
        assert_eq!(h.total(), 100_002);
    }
}
