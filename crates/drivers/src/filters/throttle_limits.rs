//! Leaky buckets: how long a request has to wait so that a stream of requests stays within limits. Pure.
//!
//! Each limit is a bucket. A request pours in its bytes (or its operations), and the bucket leaks at the rate that is allowed.
//! A request may go if the bucket, before it pours, holds no more than its size: a tenth of a second's worth without a burst,
//! else all that a burst may be. A burst that lasts longer than a second has a second bucket, that leaks at the burst's
//! rate. What must stay true: over a long time no more goes through than rate times time plus one burst, whatever the pattern.
//! The algorithm is that of QEMU's docs/throttle.txt.

use block::{BlockError, Result};
use std::time::Duration;

/// Largest rate, burst and size, as QMP has it.
pub const MAX_VALUE: i64 = 1_000_000_000_000_000;

/// What a burst-free bucket holds, in parts of a second of its rate.
const SLACK: f64 = 10.0;

/// One limit. All in bytes (or operations) per second; 0 is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limit {
    /// Rate in the long run.
    pub avg: i64,
    /// Rate in a burst.
    pub max: i64,
    /// Seconds a burst may last.
    pub length: i64,
}

impl Default for Limit {
    fn default() -> Limit {
        Limit { avg: 0, max: 0, length: 1 }
    }
}

/// What is limited.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// Reads.
    Read,
    /// Writes, zeroes, discards.
    Write,
}

/// Names of the limits in QMP, in the order of [`Config::limits`].
pub const NAMES: [&str; 6] = ["bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write"];

/// All limits of a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Config {
    /// By kind, as in [`NAMES`].
    pub limits: [Limit; 6],
    /// A request counts as one operation for each so many bytes; 0: as one.
    pub iops_size: i64,
}

impl Config {
    /// Fails if the limits contradict each other.
    pub fn check(&self) -> Result<()> {
        let refuse = |what: &str| Err(BlockError::invalid(what));
        let set = |v: &dyn Fn(&Limit) -> i64, total: usize| {
            let of = |i: usize| v(&self.limits[i]) != 0;
            of(total) && (of(total + 1) || of(total + 2))
        };
        if [0, 3].iter().any(|t| set(&|l| l.avg, *t) || set(&|l| l.max, *t)) {
            return refuse("bps/iops/max total values and read/write values cannot be used at the same time");
        }
        if self.iops_size != 0 && self.limits[3..].iter().all(|l| l.avg == 0) {
            return refuse("iops size requires an iops value to be set");
        }
        for l in &self.limits {
            if !(0..=MAX_VALUE).contains(&l.avg) || !(0..=MAX_VALUE).contains(&l.max) {
                return Err(BlockError::invalid(format!(
                    "bps/iops/max values must be within [0, {MAX_VALUE}]"
                )));
            }
            if l.length == 0 {
                return refuse("the burst length cannot be 0");
            }
            if l.length > 1 && l.max == 0 {
                return refuse("burst length set without burst rate");
            }
            if l.max != 0 && l.length > MAX_VALUE / l.max {
                return refuse("burst length too high for this burst rate");
            }
            if l.max != 0 && l.avg == 0 {
                return refuse("bps_max/iops_max require corresponding bps/iops values");
            }
            if l.max != 0 && l.max < l.avg {
                return refuse("bps_max/iops_max cannot be lower than bps/iops");
            }
        }
        Ok(())
    }
}

/// The buckets of [`Config::limits`] that a direction fills.
fn filled_by(direction: Direction) -> [usize; 4] {
    match direction {
        Direction::Read => [0, 1, 3, 4],
        Direction::Write => [0, 2, 3, 5],
    }
}

#[derive(Clone, Copy, Default)]
struct Bucket {
    level: f64,
    burst: f64,
}

/// The state of all buckets of a group.
#[derive(Default)]
pub struct Buckets {
    config: Config,
    buckets: [Bucket; 6],
    leaked: Duration,
}

impl Buckets {
    /// Other limits from now on; what was used up is forgotten.
    pub fn configure(&mut self, config: Config, now: Duration) {
        *self = Buckets { config, buckets: Default::default(), leaked: now };
    }

    /// The limits.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How long the next request of this direction has to wait.
    pub fn wait(&mut self, direction: Direction, now: Duration) -> Duration {
        self.leak(now);
        let waits = filled_by(direction).map(|i| self.buckets[i].wait(&self.config.limits[i]));
        let seconds = waits.into_iter().fold(0.0, f64::max);
        // A limit of 1 byte a second and a request of many bytes: a year is as good as never.
        Duration::from_secs_f64(seconds.min(31_536_000.0))
    }

    /// A request of so many bytes goes.
    pub fn account(&mut self, direction: Direction, bytes: u64, now: Duration) {
        self.leak(now);
        let size = self.config.iops_size;
        let operations = if size > 0 && bytes > size as u64 { bytes as f64 / size as f64 } else { 1.0 };
        for i in filled_by(direction) {
            let amount = if i < 3 { bytes as f64 } else { operations };
            self.buckets[i].level += amount;
            if self.config.limits[i].length > 1 {
                self.buckets[i].burst += amount;
            }
        }
    }

    fn leak(&mut self, now: Duration) {
        let seconds = now.saturating_sub(self.leaked).as_secs_f64();
        self.leaked = now;
        for (bucket, limit) in self.buckets.iter_mut().zip(&self.config.limits) {
            bucket.level = (bucket.level - limit.avg as f64 * seconds).max(0.0);
            bucket.burst = (bucket.burst - limit.max as f64 * seconds).max(0.0);
        }
    }
}

impl Bucket {
    /// Seconds until a request may go.
    fn wait(&self, limit: &Limit) -> f64 {
        if limit.avg == 0 {
            return 0.0;
        }
        let (avg, max) = (limit.avg as f64, limit.max as f64);
        if limit.max == 0 {
            return (self.level - avg / SLACK).max(0.0) / avg;
        }
        let long = (self.level - max * limit.length as f64).max(0.0) / avg;
        if long > 0.0 || limit.length <= 1 {
            return long;
        }
        (self.burst - max / SLACK).max(0.0) / max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bps(avg: i64, max: i64, length: i64) -> Config {
        let mut c = Config::default();
        c.limits[0] = Limit { avg, max, length };
        c
    }

    /// Bytes that go in so many seconds if requests of 1000 bytes come as fast as they may.
    fn goes(config: Config, seconds: u64) -> u64 {
        config.check().expect("good limits");
        let (mut b, mut now, mut bytes) = (Buckets::default(), Duration::from_secs(7), 0);
        b.configure(config, now);
        let end = now + Duration::from_secs(seconds);
        loop {
            now += b.wait(Direction::Write, now);
            if now >= end {
                return bytes;
            }
            b.account(Direction::Write, 1000, now);
            bytes += 1000;
        }
    }

    #[test]
    fn the_rate_holds_in_the_long_run_and_bursts_are_what_they_may_be() {
        let near = |got: u64, want: u64| {
            assert!(got >= want && got <= want + want / 50 + 2000, "{got}, not about {want}");
        };
        near(goes(bps(100_000, 0, 1), 100), 10_000_000 + 10_000);
        // one second's burst at once
        near(goes(bps(100_000, 500_000, 1), 1), 600_000);
        // a burst of five seconds at its rate, and then the average
        near(goes(bps(100_000, 500_000, 5), 4), 2_000_000 + 50_000);
        near(goes(bps(100_000, 500_000, 5), 100), 2_500_000 + 10_000_000);
    }

    #[test]
    fn large_requests_count_as_several_operations() {
        let mut c = Config { iops_size: 4096, ..Config::default() };
        c.limits[3].avg = 10;
        let mut b = Buckets::default();
        b.configure(c, Duration::ZERO);
        b.account(Direction::Read, 512, Duration::ZERO);
        assert_eq!(b.wait(Direction::Read, Duration::ZERO), Duration::ZERO);
        b.account(Direction::Read, 8192, Duration::ZERO);
        assert_eq!(b.wait(Direction::Read, Duration::ZERO), Duration::from_millis(200));
    }

    #[test]
    fn reads_do_not_fill_what_limits_writes() {
        let mut c = Config::default();
        c.limits[2].avg = 1000;
        let mut b = Buckets::default();
        b.configure(c, Duration::ZERO);
        b.account(Direction::Read, 1 << 20, Duration::ZERO);
        assert!(b.wait(Direction::Write, Duration::ZERO).is_zero());
        b.account(Direction::Write, 1100, Duration::ZERO);
        assert!(b.wait(Direction::Read, Duration::ZERO).is_zero());
        assert_eq!(b.wait(Direction::Write, Duration::ZERO), Duration::from_secs(1));
    }

    #[test]
    fn contradictions_are_refused() {
        let e = |c: Config| c.check().expect_err("a contradiction").message().to_owned();
        let mut c = bps(5, 0, 1);
        c.limits[1].avg = 5;
        assert!(e(c).contains("cannot be used at the same time"));
        assert!(e(bps(5, 4, 1)).contains("cannot be lower"));
        assert!(e(bps(0, 4, 1)).contains("require corresponding"));
        assert!(e(bps(5, 0, 2)).contains("without burst rate"));
        assert!(e(bps(5, 0, 0)).contains("cannot be 0"));
        assert!(e(bps(-5, 0, 1)).contains("must be within"));
        assert!(e(bps(1000, MAX_VALUE, 4_000_000_000)).contains("too high"));
    }
}
