//! What goes wrong on a simulated disk: by probabilities drawn from the seed, or by rules that name one request.
//!
//! What must stay true: a profile drawn for a seed may be entirely calm (bugs that need no fault must not hide behind
//! faults); after [`Profile::faults_end`] nothing fails, so that "everything ends" can be demanded from then on.

use crate::Rng;
use block::BlockError;
use std::time::Duration;

/// Kinds of requests to a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Op {
    /// Opening or creating.
    Open,
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Zeroing, either way.
    Zero,
    /// Discarding.
    Discard,
    /// Reserving space.
    Allocate,
    /// Setting the length.
    SetLen,
    /// fdatasync.
    Barrier,
    /// Asking for data and holes.
    Extents,
    /// Copying inside the host.
    Copy,
}

/// All kinds, in the order of [`Profile::errors`].
pub const OPS: [Op; 10] = [
    Op::Open,
    Op::Read,
    Op::Write,
    Op::Zero,
    Op::Discard,
    Op::Allocate,
    Op::SetLen,
    Op::Barrier,
    Op::Extents,
    Op::Copy,
];

/// What is done to a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It fails with this errno and changes nothing.
    Errno(i32),
    /// A write, zero or discard reaches only some of its sectors and fails with this errno.
    Torn(i32),
    /// It takes so much longer.
    Delay(Duration),
    /// It never ends, until [`crate::Host::release_hung`].
    Hang,
    /// A read gives one wrong bit.
    Rot,
}

/// A fault for chosen requests.
#[derive(Clone, Debug)]
pub struct Rule {
    /// The end of the file's name ("" for every file).
    pub path: String,
    /// Which kind of request, or any.
    pub op: Option<Op>,
    /// So many matching requests pass first.
    pub skip: u64,
    /// So many are hit after that.
    pub times: u64,
    /// What happens to them.
    pub fault: Fault,
}

impl Rule {
    /// Hits the next matching request, once.
    pub fn once(path: &str, op: Op, fault: Fault) -> Rule {
        Rule { path: path.to_owned(), op: Some(op), skip: 0, times: 1, fault }
    }

    /// Hits every matching request from now on.
    pub fn always(path: &str, op: Op, fault: Fault) -> Rule {
        Rule { path: path.to_owned(), op: Some(op), skip: 0, times: u64::MAX, fault }
    }

    fn hits(&mut self, path: &str, op: Op) -> bool {
        if self.times == 0 || self.op.is_some_and(|o| o != op) || !path.ends_with(self.path.as_str()) {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.times -= 1;
        true
    }
}

/// How a host's disk behaves.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Chance that a request is done at once (page cache), without waiting.
    pub inline: f64,
    /// Usual latency.
    pub latency: (Duration, Duration),
    /// Chance of an unusual latency, up to [`Profile::slow_latency`].
    pub slow: f64,
    /// The longest of all.
    pub slow_latency: Duration,
    /// Chance of an error, by kind of request as in [`OPS`].
    pub errors: [f64; OPS.len()],
    /// Chance that an error of a write leaves part of it on disk.
    pub torn: f64,
    /// Chance that an error is ENOSPC or EDQUOT where space is needed.
    pub no_space: f64,
    /// Chance of a request that never ends.
    pub hang: f64,
    /// Chance that a write lands in two pieces at different times.
    pub split: f64,
    /// Whether zeroing without writing works here.
    pub can_zero: bool,
    /// Whether discards do anything.
    pub can_discard: bool,
    /// Whether copying inside the host works here.
    pub can_copy: bool,
    /// No fault by chance from this (virtual) time on; rules still count.
    pub faults_end: Duration,
}

impl Profile {
    /// Nothing fails; requests take 10 µs to 2 ms.
    pub fn calm() -> Profile {
        Profile {
            inline: 0.0,
            latency: (Duration::from_micros(10), Duration::from_millis(2)),
            slow: 0.0,
            slow_latency: Duration::from_millis(100),
            errors: [0.0; OPS.len()],
            torn: 0.0,
            no_space: 0.0,
            hang: 0.0,
            split: 0.0,
            can_zero: true,
            can_discard: true,
            can_copy: true,
            faults_end: Duration::MAX,
        }
    }

    /// Speed and abilities drawn from the seed, without faults.
    pub fn drawn_calm(rng: &mut Rng) -> Profile {
        let mut p = Profile::calm();
        p.inline = *rng.choose(&[0.0, 0.0, 0.3, 0.8, 1.0]);
        p.latency = *rng.choose(&[
            (Duration::from_micros(1), Duration::from_micros(50)),
            (Duration::from_micros(20), Duration::from_millis(1)),
            (Duration::from_micros(50), Duration::from_millis(50)),
        ]);
        p.slow = *rng.choose(&[0.0, 0.0, 0.01, 0.05]);
        p.split = *rng.choose(&[0.0, 0.0, 0.2]);
        p.can_zero = rng.chance(0.8);
        p.can_discard = rng.chance(0.8);
        p.can_copy = rng.chance(0.5);
        p
    }

    /// Everything drawn from the seed; about a third of the seeds stay calm.
    pub fn drawn(rng: &mut Rng) -> Profile {
        let mut p = Profile::drawn_calm(rng);
        if rng.chance(0.35) {
            return p;
        }
        let rate = *rng.choose(&[0.0005, 0.002, 0.01]);
        for e in &mut p.errors {
            if rng.chance(0.5) {
                *e = rate;
            }
        }
        p.torn = *rng.choose(&[0.0, 0.5, 1.0]);
        p.no_space = *rng.choose(&[0.0, 0.3, 1.0]);
        if rng.chance(0.2) {
            p.slow_latency = Duration::from_secs(60);
        }
        p
    }

    /// The usual time of a request.
    pub(crate) fn draw_latency(&self, rng: &mut Rng) -> Duration {
        let (low, high) = self.latency;
        if rng.chance(self.slow) { rng.duration(high, self.slow_latency) } else { rng.duration(low, high) }
    }

    pub(crate) fn draw_fault(&self, rng: &mut Rng, op: Op, now: Duration) -> Option<Fault> {
        if now >= self.faults_end {
            return None;
        }
        if self.hang > 0.0 && rng.chance(self.hang) {
            return Some(Fault::Hang);
        }
        if !rng.chance(self.errors[op as usize]) {
            return None;
        }
        let needs_space =
            matches!(op, Op::Write | Op::Zero | Op::Allocate | Op::SetLen | Op::Copy | Op::Open);
        let errno = if needs_space && rng.chance(self.no_space) {
            *rng.choose(&[BlockError::ENOSPC, BlockError::EDQUOT])
        } else {
            BlockError::EIO
        };
        let changes = matches!(op, Op::Write | Op::Zero | Op::Discard);
        Some(if changes && rng.chance(self.torn) { Fault::Torn(errno) } else { Fault::Errno(errno) })
    }
}

/// The rules of a host, in force beside its profile.
#[derive(Default)]
pub(crate) struct Rules(Vec<Rule>);

impl Rules {
    pub(crate) fn add(&mut self, rule: Rule) {
        self.0.push(rule);
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// The first rule that hits decides; the others do not count this request.
    pub(crate) fn check(&mut self, path: &str, op: Op) -> Option<Fault> {
        self.0.iter_mut().find_map(|r| r.hits(path, op).then_some(r.fault))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_skips_then_hits_then_is_used_up() {
        let mut rules = Rules::default();
        rules.add(Rule {
            path: "b.img".into(),
            op: Some(Op::Write),
            skip: 1,
            times: 2,
            fault: Fault::Errno(5),
        });
        let mut hits = |p, o| rules.check(p, o).is_some();
        assert!(!hits("/a.img", Op::Write));
        assert!(!hits("/b.img", Op::Read));
        assert!(!hits("/b.img", Op::Write));
        assert!(hits("/b.img", Op::Write));
        assert!(hits("/b.img", Op::Write));
        assert!(!hits("/b.img", Op::Write));
    }

    #[test]
    fn some_seeds_are_calm_and_some_are_not() {
        let calm =
            (0..200).filter(|s| Profile::drawn(&mut Rng::new(*s)).errors.iter().all(|e| *e == 0.0)).count();
        assert!((20..180).contains(&calm), "{calm} of 200");
    }
}
