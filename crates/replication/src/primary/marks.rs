//! Checkpoints under way: marked, prepared, decided, committed by all.
//!
//! What must stay true: a decision is made once, in the order of the epochs, after every peer that takes part is prepared (C4), or an external
//! manager says so; a peer that leaves before the decision takes its part with it, and with too few left the epoch goes on in the next.

use super::peer::Peer;
use super::{Event, Output, PeerState, Primary};
use crate::bugs::{Bug, planted};
use crate::digest::Digest;
use crate::types::{Epoch, Seq};
use crate::wire::{Body, Frame};

pub(super) struct Pending {
    pub(super) epoch: Epoch,
    pub(super) digest: Digest,
    /// Peers that got the mark and are still there, and whether each is prepared.
    pub(super) parties: Vec<(usize, bool)>,
    pub(super) decided: bool,
    pub(super) announced: bool,
    pub(super) committed: Vec<usize>,
}

impl Primary {
    pub(super) fn mark(&mut self, out: &mut Vec<Output>) {
        if self.cannot_mark().is_some() {
            return;
        }
        let takes_part = |p: &Peer| matches!(p.state, PeerState::Running | PeerState::Synced);
        let epoch = self.open;
        self.last = self.last.next();
        self.open = epoch.next();
        let mut parties = Vec::new();
        for i in 0..self.peers.len() {
            let (last, generation) = (self.last, self.history.generation());
            let Some(p) = self.peers.get_mut(i) else { continue };
            if takes_part(p) {
                let digest = std::mem::take(&mut p.open);
                parties.push((i, false));
                p.progress.queued = last;
                out.push(Output::Send(
                    i,
                    Frame { generation, seq: last, epoch, body: Body::Mark { digest } },
                ));
            }
        }
        if planted(Bug::DirtyClearedOnSend) {
            self.dirty.drop_through(epoch);
        }
        let digest = std::mem::take(&mut self.open_digest);
        self.marks.push_back(Pending {
            epoch,
            digest,
            parties,
            decided: false,
            announced: false,
            committed: Vec::new(),
        });
    }

    pub(super) fn advance_marks(&mut self, out: &mut Vec<Output>) {
        let (last, external) = (self.last, self.config.external_decision);
        let mut decide = Vec::new();
        for m in self.marks.iter_mut().filter(|m| !m.decided) {
            if !m.parties.iter().all(|p| p.1) {
                break; // in order: deciding an epoch decides those before it
            }
            if external {
                if !std::mem::replace(&mut m.announced, true) {
                    out.push(Output::Event(Event::Prepared { epoch: m.epoch }));
                }
                break;
            }
            m.decided = true;
            decide.push((m.epoch, m.parties.clone()));
        }
        for (epoch, parties) in decide {
            self.send_commit(epoch, &parties, last, out);
        }
        self.finish_marks(out);
    }

    pub(super) fn send_commit(
        &mut self,
        epoch: Epoch,
        parties: &[(usize, bool)],
        last: Seq,
        out: &mut Vec<Output>,
    ) {
        self.history.advance(epoch);
        for (p, _) in parties {
            out.push(Output::Send(*p, self.frame(last, epoch, Body::Commit)));
        }
    }

    pub(super) fn decide_by_hand(&mut self, epoch: Epoch, commit: bool, out: &mut Vec<Output>) {
        let last = self.last;
        let Some(i) = self.marks.iter().position(|m| m.epoch == epoch && !m.decided) else { return };
        if commit && self.marks[i].parties.iter().all(|p| p.1) {
            self.marks[i].decided = true;
            let parties = self.marks[i].parties.clone();
            self.send_commit(epoch, &parties, last, out);
        } else if !commit && let Some(m) = self.marks.remove(i) {
            for (p, _) in m.parties {
                out.push(Output::Send(p, self.frame(last, epoch, Body::Abort)));
            }
        }
    }

    pub(super) fn finish_marks(&mut self, out: &mut Vec<Output>) {
        while let Some(m) = self.marks.front() {
            let all = m.decided && m.parties.iter().all(|p| m.committed.contains(&p.0));
            if !all {
                return;
            }
            let Some(m) = self.marks.pop_front() else { return };
            self.last_checkpoint = Some((m.epoch, m.digest));
            out.push(Output::Event(Event::Checkpoint { epoch: m.epoch, digest: m.digest }));
            out.push(Output::Progress);
        }
    }

    /// A peer takes no further part in the marks under way.
    pub(super) fn leaves_marks(&mut self, peer: usize, why: &str, out: &mut Vec<Output>) {
        for m in &mut self.marks {
            m.parties.retain(|p| p.0 != peer);
        }
        // Nobody is left, or too few: the epoch goes on in the next.
        let needed = self.config.quorum.needed().max(1);
        let mut aborted = Vec::new();
        self.marks.retain(|m| {
            let enough = if m.decided { !m.parties.is_empty() } else { m.parties.len() >= needed };
            if !enough && !m.decided {
                aborted.push((m.epoch, m.parties.iter().map(|p| p.0).collect::<Vec<_>>()));
            }
            enough
        });
        for (epoch, parties) in aborted {
            out.push(Output::Event(Event::Veto { epoch: Some(epoch), peer, reason: why.to_owned() }));
            for p in parties {
                out.push(Output::Send(p, self.frame(self.last, epoch, Body::Abort)));
            }
            if self.peers.iter().any(|p| p.state == PeerState::Synced) {
                out.push(Output::WantCheckpoint);
            }
        }
        self.advance_marks(out);
    }
}
