//! When a group may be handed over to a peer (X9), and what became of it.
//!
//! What must stay true: it is asked only if it has committed everything that was ever written; while it is not known whether it took
//! over, this side serves nobody: it says so itself, or it welcomes this side in another session, which it does only if it did not.

use super::{PeerState, Primary};
use crate::bugs::{Bug, planted};

/// Whether a peer can be asked to take over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Readiness {
    /// It is no copy.
    NotACopy,
    /// It lacks something that a checkpoint would give it.
    NeedsCheckpoint,
    /// A checkpoint is under way.
    Waits,
    /// Yes, at the newest checkpoint.
    Ready,
}

impl Primary {
    /// Whether `peer` can be asked to take over now. Nothing may be written from now on.
    pub fn readiness(&self, peer: usize) -> Readiness {
        let Some(p) = self.peers.get(peer) else { return Readiness::NotACopy };
        match p.state {
            PeerState::Running => {}
            // with a manager nobody else makes the checkpoint that it waits for
            PeerState::Synced if self.config.external_decision && self.marks.is_empty() => {
                return Readiness::NeedsCheckpoint;
            }
            PeerState::Synced => return Readiness::Waits,
            _ => return Readiness::NotACopy,
        }
        // a checkpoint may be under way; what came after its mark is in the next
        let behind = self.lacks(peer) || p.committed != Some(self.history.epoch());
        match (behind, self.wants_checkpoint()) {
            (false, _) if self.marks.is_empty() => Readiness::Ready,
            (true, true) => Readiness::NeedsCheckpoint,
            _ => Readiness::Waits,
        }
    }

    /// While a peer is asked to take over, and it is not known whether it has, no checkpoint is made: what a third side committed behind
    /// the one at which the group changes hands would be on no path of the new owner.
    pub fn hands_over(&mut self, yes: bool) {
        self.handing = yes;
    }

    /// Whether `peer`, which was asked, has not taken over and will not: `same_session` is whether it is connected as it was then.
    pub fn was_not_taken(&self, peer: usize, same_session: bool) -> bool {
        let welcomed = self.peers.get(peer).is_some_and(|p| p.state.gets_changes());
        !same_session && (welcomed || planted(Bug::HandOverResumes))
    }
}
