//! Rates: how fast the copy goes, how fast the guest dirties, and whether the two will meet.

use std::cell::Cell;
use std::time::Duration;

/// Length of a sample. Rates are smoothed over about four samples.
const SAMPLE: Duration = Duration::from_millis(500);
/// Weight of a new sample in the running average.
const WEIGHT: f64 = 0.25;

/// Counts bytes and turns them into rates.
pub struct Meter {
    copied: Cell<u64>,
    dirtied: Cell<u64>,
    sample_start: Cell<Duration>,
    sampled: Cell<(u64, u64)>,
    rates: Cell<Option<(f64, f64)>>,
}

/// What is known about convergence.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Outlook {
    /// Bytes per second copied by the background copy and by synchronous writes.
    pub copy_rate: u64,
    /// Bytes per second that the guest makes dirty.
    pub dirty_rate: u64,
    /// Bytes still to be copied.
    pub remaining: u64,
    /// Time until in sync at these rates, if it will be.
    pub time_to_sync: Option<Duration>,
    /// Why it will not be, if it will not.
    pub obstacle: Option<Obstacle>,
}

/// Why a copy does not converge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Obstacle {
    /// The guest dirties at least as fast as is copied.
    DirtyRate,
    /// The same, and it is the rate limit that holds the copy back.
    SpeedLimit,
    /// The job is paused.
    Paused,
    /// Nothing has been copied for a while although there is work: the target or source does not answer.
    Stalled,
}

impl Meter {
    pub(crate) fn new(now: Duration) -> Meter {
        Meter {
            copied: Cell::new(0),
            dirtied: Cell::new(0),
            sample_start: Cell::new(now),
            sampled: Cell::new((0, 0)),
            rates: Cell::new(None),
        }
    }

    pub(crate) fn copied(&self, bytes: u64) {
        self.copied.set(self.copied.get() + bytes);
    }

    pub(crate) fn dirtied(&self, bytes: u64) {
        self.dirtied.set(self.dirtied.get() + bytes);
    }

    /// Clean bytes that guests have made dirty, in all.
    pub fn dirtied_so_far(&self) -> u64 {
        self.dirtied.get()
    }

    /// Takes a sample if it is time.
    pub fn tick(&self, now: Duration) {
        let passed = now.saturating_sub(self.sample_start.get());
        if passed < SAMPLE {
            return;
        }
        let (c, d) = self.sampled.get();
        let secs = passed.as_secs_f64();
        let new = ((self.copied.get() - c) as f64 / secs, (self.dirtied.get() - d) as f64 / secs);
        // an old sample that was long ago counts for nothing
        let weight = if passed > 8 * SAMPLE { 1.0 } else { WEIGHT };
        let mix = |old: f64, new: f64| old + (new - old) * weight;
        self.rates.set(Some(self.rates.get().map_or(new, |(a, b)| (mix(a, new.0), mix(b, new.1)))));
        self.sampled.set((self.copied.get(), self.dirtied.get()));
        self.sample_start.set(now);
    }

    /// What will become of `remaining` bytes. `limited` says that a rate limit holds the copy back.
    pub fn outlook(&self, now: Duration, remaining: u64, speed: u64, paused: bool) -> Outlook {
        self.tick(now);
        let so_far = || {
            let secs = now.saturating_sub(self.sample_start.get()).as_secs_f64().max(0.001);
            (self.copied.get() as f64 / secs, self.dirtied.get() as f64 / secs)
        };
        let (copy, dirty) = self.rates.get().unwrap_or_else(so_far);
        let net = copy - dirty;
        let (time_to_sync, obstacle) = if remaining == 0 {
            (Some(Duration::ZERO), None)
        } else if paused {
            (None, Some(Obstacle::Paused))
        } else if self.rates.get().is_none() && net <= copy * 0.01 {
            // Too early to say: the first sample is not complete.
            (None, None)
        } else if copy < 1.0 {
            (None, Some(Obstacle::Stalled))
        } else if net <= copy * 0.01 {
            let limited = speed > 0 && copy >= speed as f64 * 0.8;
            (None, Some(if limited { Obstacle::SpeedLimit } else { Obstacle::DirtyRate }))
        } else {
            (Some(Duration::from_secs_f64((remaining as f64 / net).min(1e9))), None)
        };
        Outlook { copy_rate: copy as u64, dirty_rate: dirty as u64, remaining, time_to_sync, obstacle }
    }
}

impl Obstacle {
    /// A sentence for a human.
    pub const fn text(self) -> &'static str {
        match self {
            Obstacle::DirtyRate => {
                "the client dirties the disk at least as fast as it is copied; use copy-mode write-blocking or a convergence policy"
            }
            Obstacle::SpeedLimit => {
                "the speed limit is below the rate at which the client dirties the disk; raise it"
            }
            Obstacle::Paused => "the job is paused; resume it",
            Obstacle::Stalled => "nothing has been copied for a while; look at the target and the source",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outlook_says_whether_and_why_not() {
        let s = Duration::from_secs;
        let m = Meter::new(s(0));
        let early = m.outlook(Duration::from_millis(10), 800, 0, false);
        assert_eq!((early.time_to_sync, early.obstacle), (None, None));
        for t in 1..20 {
            m.copied(100);
            m.dirtied(20);
            m.tick(s(t));
        }
        let o = m.outlook(s(20), 800, 0, false);
        assert_eq!((o.copy_rate, o.dirty_rate), (75, 15)); // the last second brought nothing: a quarter less
        assert_eq!(o.time_to_sync.map(|d| d.as_secs()), Some(13));
        assert_eq!(m.outlook(s(20), 800, 0, true).obstacle, Some(Obstacle::Paused));
        assert_eq!(m.outlook(s(20), 0, 0, false).time_to_sync, Some(s(0)));
        for t in 21..60 {
            m.copied(100);
            m.dirtied(100);
            m.tick(s(t));
        }
        assert_eq!(m.outlook(s(59), 800, 0, false).obstacle, Some(Obstacle::DirtyRate));
        assert_eq!(m.outlook(s(59), 800, 110, false).obstacle, Some(Obstacle::SpeedLimit));
        for t in 60..100 {
            m.tick(s(t));
        }
        assert_eq!(m.outlook(s(100), 8, 0, false).obstacle, Some(Obstacle::Stalled));
    }
}
