//! Checkpoints under way: marked, prepared, decided, committed by all.
//!
//! What must stay true: a decision is made once, in the order of the epochs, after every peer that takes part is prepared (C4), or, where an
//! external manager owns it, when that says so then; a peer that leaves before the decision takes its part with it, and with too few
//! left the epoch goes on in the next. A decision that a manager made at a secondary stands: this side follows it. A peer that is catching up
//! takes no part, and goes on: it is told that the mark took a number.

use super::peer::Peer;
use super::{Event, Output, PeerState, Primary};
use crate::bugs::{Bug, planted};
use crate::digest::Digest;
use crate::types::{Epoch, Seq};
use crate::wire::{Body, Frame};

pub(super) struct Pending {
    pub(super) epoch: Epoch,
    pub(super) seq: Seq,
    pub(super) digest: Digest,
    /// Peers that got the mark and are still there, and whether each is prepared.
    pub(super) parties: Vec<(usize, bool)>,
    /// A manager decides about it.
    pub(super) external: bool,
    /// The manager has: it is to be committed.
    pub(super) wanted: bool,
    pub(super) decided: bool,
    pub(super) announced: bool,
    pub(super) committed: Vec<usize>,
}

impl Pending {
    fn is_prepared(&self) -> bool {
        self.parties.iter().all(|p| p.1)
    }
}

/// How far an epoch is that was marked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MarkState {
    /// Not every secondary is prepared.
    Marked,
    /// All are; it is not decided.
    Prepared,
    /// It is decided; not all have said that they committed it.
    Decided,
    /// None of these: committed by all, given up, or never marked.
    Gone,
}

impl Primary {
    /// How far a checkpoint is.
    pub fn mark_state(&self, epoch: Epoch) -> MarkState {
        match self.marks.iter().find(|m| m.epoch == epoch) {
            None => MarkState::Gone,
            Some(m) if m.decided => MarkState::Decided,
            Some(m) if m.is_prepared() => MarkState::Prepared,
            Some(_) => MarkState::Marked,
        }
    }

    /// Epochs that are prepared and wait for a manager's decision.
    pub fn undecided(&self) -> Vec<Epoch> {
        let waits = |m: &&Pending| m.external && !m.wanted && !m.decided && m.is_prepared();
        self.marks.iter().filter(waits).map(|m| m.epoch).collect()
    }

    /// Why a manager cannot decide about `epoch` so, if it cannot.
    pub fn cannot_decide(&self, epoch: Epoch, commit: bool) -> Option<String> {
        let Some(m) = self.marks.iter().find(|m| m.epoch == epoch && !m.decided && !m.wanted) else {
            return Some(format!("no checkpoint {epoch} waits for a decision"));
        };
        if !m.external {
            return Some(format!("checkpoint {epoch} was not prepared for a decision from outside"));
        }
        if !commit {
            return None;
        }
        if !m.is_prepared() {
            return Some(format!("checkpoint {epoch} is not prepared by all secondaries yet"));
        }
        let older = self.marks.iter().find(|o| o.epoch < epoch && !o.decided);
        older.map(|o| format!("checkpoint {} before it is not decided", o.epoch))
    }

    pub(super) fn mark(&mut self, external: bool, out: &mut Vec<Output>) {
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
            let passed = self.frame(last, self.open, Body::Flush);
            let Some(p) = self.peers.get_mut(i) else { continue };
            if takes_part(p) {
                let digest = std::mem::take(&mut p.open);
                parties.push((i, false));
                p.progress.queued = last;
                out.push(Output::Send(
                    i,
                    Frame { generation, seq: last, epoch, body: Body::Mark { digest } },
                ));
            } else if p.state == PeerState::Syncing {
                // its epoch goes on; the number is not missing
                p.progress.queued = last;
                out.push(Output::Send(i, passed));
            }
        }
        if planted(Bug::DirtyClearedOnSend) {
            self.dirty.drop_through(epoch);
        }
        let digest = std::mem::take(&mut self.open_digest);
        self.marks.push_back(Pending {
            epoch,
            seq: self.last,
            digest,
            parties,
            external,
            wanted: false,
            decided: false,
            announced: false,
            committed: Vec::new(),
        });
    }

    pub(super) fn advance_marks(&mut self, out: &mut Vec<Output>) {
        let last = self.last;
        let mut decide = Vec::new();
        let mut in_order = true; // deciding an epoch decides those before it
        for m in self.marks.iter_mut().filter(|m| !m.decided) {
            if !m.is_prepared() {
                break;
            }
            if m.external
                && !m.wanted
                && !env::bugs::planted("replication: committed without the manager's word")
            {
                if !std::mem::replace(&mut m.announced, true) {
                    out.push(Output::Event(Event::Prepared { epoch: m.epoch }));
                    out.push(Output::Progress);
                }
                in_order = false;
            } else if in_order {
                m.decided = true;
                decide.push((m.epoch, m.parties.clone()));
            }
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

    pub(super) fn decide_by_hand(
        &mut self,
        epoch: Epoch,
        decision: Result<(), String>,
        out: &mut Vec<Output>,
    ) {
        if self.cannot_decide(epoch, decision.is_ok()).is_some() {
            return;
        }
        let Some(i) = self.marks.iter().position(|m| m.epoch == epoch) else { return };
        match decision {
            Ok(()) => self.marks[i].wanted = true,
            Err(reason) => {
                let last = self.last;
                for (p, _) in self.marks.remove(i).map(|m| m.parties).unwrap_or_default() {
                    out.push(Output::Send(p, self.frame(last, epoch, Body::Abort)));
                }
                out.push(Output::Event(Event::Veto { epoch: Some(epoch), peer: None, reason }));
                out.push(Output::Progress);
            }
        }
        self.advance_marks(out);
    }

    /// A secondary has committed `epoch`, and with it those before. Where that was not decided here, a manager did so there.
    pub(super) fn decided_elsewhere(&mut self, epoch: Epoch) {
        self.marks.iter_mut().filter(|m| m.epoch <= epoch && m.external).for_each(|m| m.wanted = true);
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
            if !enough {
                aborted.push((m.epoch, m.decided, m.parties.iter().map(|p| p.0).collect::<Vec<_>>()));
            }
            enough
        });
        for (epoch, decided, parties) in aborted {
            let reason = match decided {
                false => why.to_owned(),
                true => format!("{why}; it was decided, and is not known to be committed anywhere"),
            };
            out.push(Output::Event(Event::Veto { epoch: Some(epoch), peer: Some(peer), reason }));
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
