//! What an acknowledgement means, and whose are needed.

use crate::types::Seq;

/// How far a change must have come before the guest is told that it is done (reference/replication.md 1.5). A level includes those
/// before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum AckLevel {
    /// On the local disk; nothing remote.
    Local,
    /// Accepted in the bounded send queue (DRBD A).
    Queued,
    /// In the peer's memory (DRBD B).
    RemoteReceived,
    /// The peer's write call returned (what an NBD reply means).
    RemoteWritten,
    /// Flushed at the peer (DRBD C).
    RemoteDurable,
    /// Visible on the peer's raw disk.
    RemoteApplied,
    /// Local; whoever holds back the machine's output releases it when the epoch is committed (Remus).
    Checkpoint,
}

impl AckLevel {
    /// All, weakest first.
    pub const ALL: [AckLevel; 7] = [
        AckLevel::Local,
        AckLevel::Queued,
        AckLevel::RemoteReceived,
        AckLevel::RemoteWritten,
        AckLevel::RemoteDurable,
        AckLevel::RemoteApplied,
        AckLevel::Checkpoint,
    ];

    /// As in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            AckLevel::Local => "local",
            AckLevel::Queued => "queued",
            AckLevel::RemoteReceived => "remote-received",
            AckLevel::RemoteWritten => "remote-written",
            AckLevel::RemoteDurable => "remote-durable",
            AckLevel::RemoteApplied => "remote-applied",
            AckLevel::Checkpoint => "checkpoint",
        }
    }

    /// From QMP.
    pub fn from_name(name: &str) -> Option<AckLevel> {
        AckLevel::ALL.into_iter().find(|l| l.name() == name)
    }

    /// Whether a peer has to say something before a change is done.
    pub const fn is_remote(self) -> bool {
        matches!(
            self,
            AckLevel::RemoteReceived
                | AckLevel::RemoteWritten
                | AckLevel::RemoteDurable
                | AckLevel::RemoteApplied
        )
    }
}

/// How far a peer has come: every change up to the number given. Each is at most the one before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Put into the send queue.
    pub queued: Seq,
    /// Received.
    pub received: Seq,
    /// Given to the host, perhaps in its cache.
    pub written: Seq,
    /// On stable storage.
    pub durable: Seq,
    /// On the raw disk.
    pub applied: Seq,
}

impl Progress {
    /// The last change that has come as far as `level` demands.
    pub const fn at(&self, level: AckLevel) -> Seq {
        match level {
            AckLevel::Local | AckLevel::Checkpoint => Seq(u64::MAX),
            AckLevel::Queued => self.queued,
            AckLevel::RemoteReceived => self.received,
            AckLevel::RemoteWritten => self.written,
            AckLevel::RemoteDurable => self.durable,
            AckLevel::RemoteApplied => self.applied,
        }
    }

    /// Takes over what a peer said. Nothing goes back, and nothing was reached before what it depends on.
    pub fn raise(&mut self, received: Seq, written: Seq, durable: Seq, applied: Seq) {
        self.received = self.received.max(received.min(self.queued));
        self.written = self.written.max(written.min(self.received));
        self.durable = self.durable.max(durable.min(self.written));
        self.applied = self.applied.max(applied.min(self.written));
    }
}

/// Which peers must have acknowledged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Quorum {
    /// Any so many of them.
    Any(usize),
    /// The first so many of this list (indices of peers) that are in service.
    First(usize, Vec<usize>),
}

impl Quorum {
    /// How many are needed.
    pub const fn needed(&self) -> usize {
        match self {
            Quorum::Any(k) | Quorum::First(k, _) => *k,
        }
    }

    /// Whether enough are in service at all.
    pub fn possible(&self, in_service: impl Fn(usize) -> bool, peers: usize) -> bool {
        match self {
            Quorum::Any(k) => (0..peers).filter(|p| in_service(*p)).count() >= *k,
            Quorum::First(k, order) => order.iter().filter(|p| **p < peers && in_service(**p)).count() >= *k,
        }
    }

    /// The last change that enough peers have acknowledged; `reached(p)` is `None` for peers out of service. `None`: not enough peers
    /// are in service.
    pub fn reached(&self, reached: impl Fn(usize) -> Option<Seq>, peers: usize) -> Option<Seq> {
        match self {
            Quorum::Any(0) | Quorum::First(0, _) => Some(Seq(u64::MAX)),
            Quorum::Any(k) => {
                let mut all: Vec<Seq> = (0..peers).filter_map(&reached).collect();
                all.sort_unstable();
                all.len().checked_sub(*k).and_then(|i| all.get(i).copied())
            }
            Quorum::First(k, order) => {
                let chosen: Vec<Seq> =
                    order.iter().filter(|p| **p < peers).filter_map(|p| reached(*p)).take(*k).collect();
                if chosen.len() < *k { None } else { chosen.into_iter().min() }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_k_is_the_kth_best_and_first_k_is_the_worst_of_the_chosen() {
        let at = [Some(Seq(10)), None, Some(Seq(7)), Some(Seq(3))];
        let of = |p: usize| at[p];
        assert_eq!(Quorum::Any(1).reached(of, 4), Some(Seq(10)));
        assert_eq!(Quorum::Any(2).reached(of, 4), Some(Seq(7)));
        assert_eq!(Quorum::Any(3).reached(of, 4), Some(Seq(3)));
        assert_eq!(Quorum::Any(4).reached(of, 4), None);
        assert_eq!(Quorum::Any(0).reached(of, 4), Some(Seq(u64::MAX)));
        // peer 1 is away: the next of the list stands in for it
        assert_eq!(Quorum::First(2, vec![1, 3, 0, 2]).reached(of, 4), Some(Seq(3)));
        assert_eq!(Quorum::First(1, vec![2, 0]).reached(of, 4), Some(Seq(7)));
        assert_eq!(Quorum::First(2, vec![1, 2]).reached(of, 4), None);
        assert!(!Quorum::First(2, vec![1, 2]).possible(|p| at[p].is_some(), 4));
    }

    #[test]
    fn a_peer_cannot_claim_what_was_never_sent() {
        let mut p = Progress { queued: Seq(5), ..Progress::default() };
        p.raise(Seq(9), Seq(9), Seq(4), Seq(9));
        assert_eq!(
            p,
            Progress { queued: Seq(5), received: Seq(5), written: Seq(5), durable: Seq(4), applied: Seq(5) }
        );
        p.raise(Seq(1), Seq(1), Seq(1), Seq(1));
        assert_eq!(p.durable, Seq(4), "an acknowledgement is never taken back");
    }

    #[test]
    fn names_go_both_ways() {
        AckLevel::ALL.into_iter().for_each(|l| assert_eq!(AckLevel::from_name(l.name()), Some(l)));
    }
}
