//! Whether a secondary holds what this side holds: hashes of both, piece by piece, while guests write.
//!
//! What must stay true: a question stands in the order of the changes, and is asked under the lock of its range, so both sides
//! look at the same instant of it; there are no false alarms. What differs is told, and sent again if that was asked for.

use super::PrimaryGroup;
use super::catch_up::current;
use crate::digest::content_hash;
use crate::primary::PeerState;
use crate::wire::Body;
use block::{BlockError, Data, ErrorKind, Result, Span};
use copy::Owner;
use std::collections::VecDeque;
use std::rc::Rc;

/// Bytes of one question.
const PIECE: u64 = 256 << 10;
/// Questions on the way at once: enough for a network's round trip, and little memory on either side.
const AHEAD: usize = 8;

/// How a verification stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It goes on.
    Running,
    /// Both hold the same.
    Identical,
    /// They do not.
    Different,
    /// They did not; what differed was sent again.
    Repaired,
    /// It could not be ended.
    Failed,
}

impl Verdict {
    /// As in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            Verdict::Running => "running",
            Verdict::Identical => "identical",
            Verdict::Different => "different",
            Verdict::Repaired => "repaired",
            Verdict::Failed => "failed",
        }
    }
}

/// The last verification.
#[derive(Clone, Debug)]
pub struct Verify {
    /// Of this peer.
    pub peer: String,
    /// How it stands.
    pub verdict: Verdict,
    /// Bytes compared.
    pub done: u64,
    /// Bytes to compare.
    pub total: u64,
    /// Bytes in pieces that differ.
    pub mismatched: u64,
    /// The first of them: volume and offset.
    pub first: Option<(u16, u64)>,
    /// Why it failed.
    pub error: Option<String>,
}

impl PrimaryGroup {
    /// The last verification, or the one that goes on.
    pub fn verified(&self) -> Option<Verify> {
        self.verified.borrow().clone()
    }

    /// Begins to compare everything with what peer `name` holds; with `repair`, sends what differs again.
    ///
    /// # Errors
    /// No such peer, or it is no copy; a verification goes on.
    pub fn verify(self: &Rc<Self>, name: &str, repair: bool) -> Result<()> {
        let number = self
            .peer_number(name)
            .ok_or_else(|| BlockError::new(ErrorKind::NotFound, format!("there is no peer '{name}'")))?;
        let busy = |why: &str| Err(BlockError::new(ErrorKind::Busy, why));
        if self.verified().is_some_and(|v| v.verdict == Verdict::Running) {
            return busy("a verification is running");
        }
        if !self.look(|c| c.peers().get(number).is_some_and(|p| p.state == PeerState::Running)) {
            return busy("that secondary is not in sync");
        }
        *self.verified.borrow_mut() = Some(Verify {
            peer: name.to_owned(),
            verdict: Verdict::Running,
            done: 0,
            total: self.disks.iter().map(|d| d.len()).sum(),
            mismatched: 0,
            first: None,
            error: None,
        });
        let group = self.clone();
        self.env.spawn("replication verify", async move {
            let result = group.compare_all(number, repair).await;
            let told = {
                let mut verified = group.verified.borrow_mut();
                let Some(v) = verified.as_mut() else { return };
                v.verdict = match (&result, v.mismatched, repair) {
                    (Err(_), ..) => Verdict::Failed,
                    (Ok(()), 0, _) => Verdict::Identical,
                    (Ok(()), _, true) => Verdict::Repaired,
                    (Ok(()), _, false) => Verdict::Different,
                };
                v.error = result.err().map(|e| e.to_string());
                vec![
                    ("peer", v.peer.clone().into()),
                    ("verdict", v.verdict.name().into()),
                    ("mismatched", v.mismatched.into()),
                ]
            };
            (group.tell)("REPLICATION_VERIFY", told);
        });
        Ok(())
    }

    async fn compare_all(self: &Rc<Self>, number: usize, repair: bool) -> Result<()> {
        let gone = || BlockError::new(ErrorKind::Io, "the secondary went away");
        let peer = self.peers.borrow().get(number).cloned().ok_or_else(gone)?;
        let session = self.session(number).ok_or_else(gone)?;
        while peer.hashes.try_pop().is_some() {}
        let mut asked: VecDeque<(u16, Span, u64)> = VecDeque::new();
        for (volume, disk) in self.disks.iter().enumerate() {
            let volume = u16::try_from(volume).unwrap_or(u16::MAX);
            let mut left = Span::new(0, disk.len());
            while !left.is_empty() {
                let (at, rest) = left.split_at(PIECE);
                left = rest;
                let Some(locks) = self.locks.get(usize::from(volume)) else { break };
                let mut ticket = locks.request(at, Owner::Copy { bulk: true });
                ticket.held().await;
                let data = current(disk, at).await?;
                let zeroes = || Data::zeroes(usize::try_from(at.len).unwrap_or(usize::MAX));
                let hash = content_hash(&data.unwrap_or_else(zeroes));
                let same = self.session(number).is_some_and(|s| Rc::ptr_eq(&s, &session));
                if !same || session.is_closing() || self.stopped.get() {
                    return Err(gone());
                }
                session.push(&self.look(|c| c.frame(c.last(), c.open_epoch(), Body::HashReq { volume, at })));
                drop(ticket);
                asked.push_back((volume, at, hash));
                if asked.len() >= AHEAD {
                    self.answer(&peer, &mut asked, repair).await?;
                }
                self.env.yield_now().await;
            }
        }
        while !asked.is_empty() {
            self.answer(&peer, &mut asked, repair).await?;
        }
        Ok(())
    }

    /// Takes the next answer and compares it.
    async fn answer(
        self: &Rc<Self>,
        peer: &super::Peer,
        asked: &mut VecDeque<(u16, Span, u64)>,
        repair: bool,
    ) -> Result<()> {
        let Some((volume, at, hash)) = asked.pop_front() else { return Ok(()) };
        let got = self.env.timeout(self.timeout.get(), peer.hashes.pop()).await.flatten();
        let Some((v, a, theirs)) = got else {
            return Err(BlockError::new(ErrorKind::Io, "the secondary does not answer"));
        };
        if (v, a) != (volume, at) {
            return Err(BlockError::corrupt("the secondary answered something else"));
        }
        let differs = theirs != hash && !env::bugs::planted("replication: a verification finds nothing");
        if let Some(state) = self.verified.borrow_mut().as_mut() {
            state.done += at.len;
            if differs {
                state.mismatched += at.len;
                state.first.get_or_insert((volume, at.start));
            }
        }
        if differs && repair { self.send_again(volume, at).await } else { Ok(()) }
    }

    /// As if it had been written here once more.
    async fn send_again(self: &Rc<Self>, volume: u16, at: Span) -> Result<()> {
        let (Ok(disk), Some(locks)) = (self.disk(volume), self.locks.get(usize::from(volume))) else {
            return Ok(());
        };
        let mut ticket = locks.request(at, Owner::Copy { bulk: true });
        ticket.held().await;
        let data = disk.read(at).await?;
        loop {
            self.activity.cover(volume, at).await?;
            // no wait between this look and the number
            if self.activity.covers(volume, at) {
                return self.admit(volume, at, Some(&data)).map(drop);
            }
        }
    }
}
