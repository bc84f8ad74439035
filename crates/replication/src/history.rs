//! Where an image comes from, and how two images relate.
//!
//! An image is the end of a path: generation g1 wrote epochs up to e1, from there generation g2 up to e2, and so on. The
//! rule that nothing is ever inferred from anything else is the point of this file: two images are equal, one is an ancestor
//! of the other, or they have diverged, and the paths alone say which. What must stay true: generations along a path
//! increase strictly, epochs do not decrease; only a promotion begins a generation, and it takes one that nobody had.

use crate::types::{Epoch, Generation};

/// Promotions kept in a history. One promotion a day fills it in eleven years; the oldest is forgotten then, and an image as
/// old as that is copied in full.
pub const MAX_HISTORY: usize = 4096;

/// A path: generations that ended, and the present one. Never empty once [`History::begin`] made it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct History {
    /// Generation and the epoch at which it ended, oldest first.
    past: Vec<(Generation, Epoch)>,
    /// The generation that wrote last, and the newest checkpoint. Nothing: an image that was never in a group.
    now: Option<(Generation, Epoch)>,
}

/// How the image of a secondary relates to that of a primary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Relation {
    /// Equal: nothing to do.
    Same,
    /// The secondary is behind on the primary's own path: forward what was written since its checkpoint.
    Behind(Epoch),
    /// The secondary has no history: everything is to be sent (or a digest must prove that it need not).
    Fresh,
    /// The secondary committed more of a generation than the primary's path has of it (the primary's path left that generation
    /// at this epoch, to be promoted from a peer that had less). Nobody wrote there: it goes back and is sent everything.
    Ahead(Epoch),
    /// The other side has been promoted past this primary, from its checkpoint given here: this primary is outdated.
    Outdated(Epoch),
    /// Both were promoted, from a common ancestor at this epoch: nobody may decide that but a human.
    SplitBrain(Epoch),
    /// No common ancestor.
    Unrelated,
}

impl History {
    /// The path of a new group: `generation` begins at an image that counts as checkpoint 0.
    pub fn begin(generation: Generation) -> History {
        History { past: Vec::new(), now: Some((generation, Epoch(0))) }
    }

    /// An image without a history.
    pub fn none() -> History {
        History::default()
    }

    /// From its parts; `None` if they break the rules above.
    pub fn from_parts(past: Vec<(Generation, Epoch)>, now: Option<(Generation, Epoch)>) -> Option<History> {
        let all: Vec<_> = past.iter().copied().chain(now).collect();
        let ordered = all.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1);
        let complete = now.is_some() || past.is_empty();
        (ordered && complete && past.len() <= MAX_HISTORY).then_some(History { past, now })
    }

    /// Generations that ended, with the epoch at which each did.
    pub fn past(&self) -> &[(Generation, Epoch)] {
        &self.past
    }

    /// The present generation and the newest checkpoint.
    pub fn now(&self) -> Option<(Generation, Epoch)> {
        self.now
    }

    /// The newest checkpoint; 0 without a history.
    pub fn epoch(&self) -> Epoch {
        self.now.map_or(Epoch(0), |n| n.1)
    }

    /// The generation that wrote last; 0 without a history.
    pub fn generation(&self) -> Generation {
        self.now.map_or(Generation(0), |n| n.0)
    }

    /// The image is now checkpoint `epoch` of the present generation. Older numbers change nothing.
    pub fn advance(&mut self, epoch: Epoch) {
        if let Some(now) = &mut self.now {
            now.1 = now.1.max(epoch);
        }
    }

    /// `generation` takes over at checkpoint `at` (not newer than the present one).
    pub fn promote(&mut self, generation: Generation, at: Epoch) {
        if let Some((g, e)) = self.now
            && g < generation
        {
            self.past.push((g, at.min(e)));
            if self.past.len() > MAX_HISTORY {
                self.past.remove(0);
            }
            self.now = Some((generation, at.min(e)));
        }
    }

    /// The path to checkpoint `at`, which lies on this one: the first generation that reached it.
    #[must_use]
    pub fn rewound(&self, at: Epoch) -> History {
        let mut back = self.clone();
        if at >= self.epoch() {
            return back;
        }
        while back.past.last().is_some_and(|p| p.1 >= at) {
            back.now = back.past.pop();
        }
        if let Some(now) = &mut back.now {
            now.1 = now.1.min(at);
        }
        back
    }

    /// The epochs that each generation of the path wrote: (generation, after epoch, up to epoch).
    fn segments(&self) -> impl Iterator<Item = (Generation, Epoch, Epoch)> + '_ {
        let mut from = Epoch(0);
        self.past.iter().copied().chain(self.now).map(move |(g, to)| {
            let segment = (g, from, to);
            from = to;
            segment
        })
    }

    /// The last epoch up to which both paths are the same, if the two have a beginning in common.
    fn fork(&self, other: &History) -> Option<Epoch> {
        let mut common = None;
        for (a, b) in self.segments().zip(other.segments()) {
            if a.0 != b.0 || a.1 != b.1 {
                break;
            }
            common = Some(a.2.min(b.2));
            if a.2 != b.2 {
                break;
            }
        }
        common
    }

    /// How the image of `secondary` relates to this primary's.
    pub fn compare(&self, secondary: &History) -> Relation {
        if secondary.now.is_none() {
            return Relation::Fresh;
        }
        let Some(fork) = self.fork(secondary) else { return Relation::Unrelated };
        // Which of the two has something behind the fork: a generation of its own, or more epochs of a common one.
        let own_generation = |a: &History, b: &History| !b.segments().any(|s| s.0 == a.generation());
        let (mine, theirs) = (own_generation(self, secondary), own_generation(secondary, self));
        if env::bugs::planted("replication: histories are not compared") {
            return Relation::Behind(fork);
        }
        match (mine, theirs) {
            (true, true) => Relation::SplitBrain(fork),
            (false, true) => Relation::Outdated(fork),
            _ if secondary.epoch() > fork => Relation::Ahead(fork),
            _ if self.epoch() == fork && self.generation() == secondary.generation() => Relation::Same,
            _ => Relation::Behind(fork),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// What really happened: an image is the set of (generation, epoch) that were written into it, and the generations that
    /// were promoted on the way.
    #[derive(Clone)]
    struct Truth {
        wrote: BTreeSet<(u64, u64)>,
        owners: BTreeSet<u64>,
        claimed: History,
    }

    /// Every image that a group of hosts can make in `steps` steps: each step commits an epoch or promotes. A generation number is
    /// never given twice, so each promotion takes the next of a counter that the whole tree shares; here it is the
    /// path itself, written as digits, which is unique and increasing along every path.
    fn images(steps: u32) -> Vec<Truth> {
        let root = Truth {
            wrote: BTreeSet::new(),
            owners: BTreeSet::from([1]),
            claimed: History::begin(Generation(1)),
        };
        let mut all = vec![(root, 1u64)];
        let mut from = 0;
        for _ in 0..steps {
            let to = all.len();
            for i in from..to {
                let (image, path) = all[i].clone();
                let (g, e) = image.claimed.now().unwrap_or_default();
                let mut more = image.clone();
                more.claimed.advance(e.next());
                more.wrote.insert((g.0, e.0 + 1));
                all.push((more, path * 4));
                for twin in [1, 2] {
                    let mut promoted = image.clone();
                    let g = path * 4 + twin;
                    promoted.claimed.promote(Generation(g), e);
                    promoted.owners.insert(g);
                    all.push((promoted, path * 4 + twin));
                }
            }
            from = to;
        }
        all.into_iter().map(|(t, _)| t).collect()
    }

    #[test]
    fn every_pair_of_histories_agrees_with_what_really_happened() {
        let all = images(4);
        let mut seen = BTreeSet::new();
        for p in &all {
            for s in &all {
                let (mine, theirs) =
                    (p.wrote.difference(&s.wrote).count(), s.wrote.difference(&p.wrote).count());
                let owned = (p.owners.is_subset(&s.owners), s.owners.is_subset(&p.owners));
                let relation = p.claimed.compare(&s.claimed);
                seen.insert(format!("{relation:?}").split('(').next().unwrap_or_default().to_owned());
                let expected = match (owned, mine, theirs) {
                    ((false, false), ..) => "SplitBrain",
                    ((true, false), ..) => "Outdated",
                    (_, _, t) if t > 0 => "Ahead",
                    ((true, true), 0, 0) => "Same",
                    _ => "Behind",
                };
                assert!(
                    format!("{relation:?}").starts_with(expected),
                    "{:?} against {:?}: {relation:?}, should be {expected}",
                    p.claimed,
                    s.claimed
                );
                // The epoch given is that of the common ancestor: all common epochs, and no more.
                if let Relation::Behind(e)
                | Relation::Ahead(e)
                | Relation::Outdated(e)
                | Relation::SplitBrain(e) = relation
                {
                    let common = p.wrote.intersection(&s.wrote).count() as u64;
                    assert_eq!(e.0, common, "{:?} against {:?}", p.claimed, s.claimed);
                }
            }
        }
        assert_eq!(seen.len(), 5, "{seen:?}");
        assert_eq!(all[0].claimed.compare(&History::none()), Relation::Fresh);
        assert_eq!(all[0].claimed.compare(&History::begin(Generation(77))), Relation::Unrelated);
    }

    #[test]
    fn a_path_is_rewound_to_any_checkpoint_on_it() {
        let (g, e) = (Generation, Epoch);
        let mut path = History::begin(g(1));
        path.advance(e(3));
        let mut all = vec![path.clone()];
        path.promote(g(2), e(3));
        path.advance(e(5));
        all.push(path.clone());
        path.promote(g(4), e(4));
        path.advance(e(9));
        assert_eq!(path.rewound(e(9)), path);
        assert_eq!(path.rewound(e(7)).now(), Some((g(4), e(7))));
        assert_eq!(path.rewound(e(3)), all[0]);
        let mut four = all[1].clone();
        four = four.rewound(e(4));
        assert_eq!((four.past(), four.now()), (&[(g(1), e(3))][..], Some((g(2), e(4)))));
        assert_eq!(path.rewound(e(4)), four);
        assert_eq!(path.rewound(e(1)).now(), Some((g(1), e(1))));
        assert_eq!(path.compare(&path.rewound(e(4))), Relation::Behind(e(4)));
    }

    #[test]
    fn parts_that_break_the_rules_are_refused() {
        let (g, e) = (Generation, Epoch);
        assert!(History::from_parts(vec![(g(2), e(1))], Some((g(1), e(1)))).is_none());
        assert!(History::from_parts(vec![(g(1), e(5))], Some((g(2), e(4)))).is_none());
        assert!(History::from_parts(vec![(g(1), e(5))], None).is_none());
        assert!(History::from_parts(vec![(g(1), e(5))], Some((g(2), e(5)))).is_some());
    }
}
