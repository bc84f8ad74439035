//! A planned change of sides, the primary's part: nothing is written any more, the secondary commits the last checkpoint and is told
//! to take over (X9).
//!
//! What can happen: the secondary's store is full of what stands before the last mark, so that it never hears of that; it refuses, or is gone
//! before its answer came. What must stay true: once the request has left,
//! this side serves nobody until it knows whether it was heard: the secondary says that it took over (here or, where it is a primary already
//! and listens no more, at this side's door), or welcomes this side in a new session, which it does only if it did not.

use super::PrimaryGroup;
use crate::primary::{Output, PeerState, Primary, Readiness};
use crate::session::link::Outgoing;
use crate::types::Generation;
use crate::wire::{Body, HandOver};
use block::{BlockError, ErrorKind, Result};
use std::rc::Rc;
use std::time::Duration;

/// A full store is waited for no longer than this part of the time that a change of sides may take: a session that begins anew needs some, too.
const HELD_UP: u32 = 4;

/// While it is there sessions that full stores hold up begin anew.
pub(in crate::session) struct Hurry(Rc<PrimaryGroup>);

impl Drop for Hurry {
    fn drop(&mut self) {
        self.0.hurry.set(None);
    }
}

fn busy(why: impl Into<String>) -> BlockError {
    BlockError::new(ErrorKind::Busy, why)
}

impl PrimaryGroup {
    /// The number of the peer of that name.
    pub fn peer_number(&self, name: &str) -> Option<usize> {
        self.peers.borrow().iter().position(|p| p.name == name && !p.removed.get())
    }

    /// Peer number `peer` is to take over, which may take as long as `limit`: full stores are not waited for as long as else. To be asked
    /// before users' requests are kept out: some of them may wait for such a store.
    ///
    /// # Errors
    /// The peer is no copy.
    pub(in crate::session) fn hurry(self: &Rc<Self>, peer: usize, limit: Duration) -> Result<Hurry> {
        if !self.is_copy(peer) {
            return Err(busy("that secondary is not in sync"));
        }
        if !env::bugs::planted("replication: a full store keeps the group from being handed over") {
            self.hurry.set(Some((limit / HELD_UP).min(self.timeout.get() / 3)));
        }
        self.each_session(|s| s.wake.notify_all());
        Ok(Hurry(self.clone()))
    }

    /// Hands the group over to peer number `peer`; its new generation. Who took over may also come to a door of this side and say so. The
    /// caller keeps all requests of users out, before and for as long as this takes: without end if the peer is gone after it was asked.
    ///
    /// # Errors
    /// The peer is gone, or refuses; of a disk; a checkpoint fails. This side is the primary still.
    pub(in crate::session) async fn hand_over(
        self: &Rc<Self>,
        peer: usize,
        hand: HandOver,
        limit: Duration,
        hurry: Hurry,
    ) -> Result<Generation> {
        self.unfenced()?;
        for disk in &self.disks {
            disk.flush().await?;
        }
        let begun = self.env.now();
        let session = loop {
            let progress = self.progress.wait();
            let left = limit.saturating_sub(self.env.now().saturating_sub(begun));
            match self.look(|c| c.readiness(peer)) {
                Readiness::Ready => match self.session(peer) {
                    Some(session) => break session,
                    None => return Err(busy("the secondary is gone")),
                },
                Readiness::NotACopy if !self.begins_anew(peer) => return Err(self.not_committed()),
                _ if left.is_zero() => return Err(self.not_committed()),
                Readiness::NeedsCheckpoint => {
                    if let Err(e) = self.checkpoint(left).await
                        && self.look(|c| c.readiness(peer)) != Readiness::NotACopy
                    {
                        return Err(e);
                    }
                }
                Readiness::NotACopy | Readiness::Waits => {
                    self.env.timeout(left, progress).await;
                }
            }
        };
        drop(hurry);
        let lease = self.lease.borrow().clone();
        if let Some(lease) = &lease {
            // it can take over only what nobody owns
            lease.release(false).await;
        }
        let body = Body::HandOver(Box::new(hand));
        // others do not get checkpoints that the new owner knows nothing of
        self.core.borrow_mut().hands_over(true);
        session.push(&self.look(|c| c.frame(c.last(), c.history().epoch(), body)));
        let done = self.was_taken(peer, &session).await;
        if done.is_err() {
            if let Some(lease) = lease {
                lease.insist(self.look(|c| c.history().generation()));
            }
            self.core.borrow_mut().hands_over(false);
            // a catch-up may have ended meanwhile, and waits to be committed
            if self.look(|c| c.peers().iter().any(|p| p.state == PeerState::Synced)) {
                self.carry_out(Output::WantCheckpoint);
            }
        }
        done
    }

    fn begins_anew(&self, peer: usize) -> bool {
        self.peers.borrow().get(peer).is_some_and(|p| p.anew.get())
    }

    fn not_committed(&self) -> BlockError {
        let why = self.last_error().map_or_else(String::new, |e| format!(": {e}"));
        busy(format!("the last checkpoint was not committed{why}"))
    }

    /// Whether the peer took over that was asked in `session`.
    async fn was_taken(&self, peer: usize, session: &Rc<Outgoing>) -> Result<Generation> {
        loop {
            let progress = self.progress.wait();
            if let Some(by) = self.look(Primary::fenced) {
                return Ok(by);
            }
            let same = self.session(peer).is_some_and(|s| Rc::ptr_eq(&s, session));
            if self.stopped.get() || self.look(|c| c.was_not_taken(peer, same)) {
                let why = self.last_error().unwrap_or_default();
                return Err(busy(format!("the secondary did not take over: {why}")));
            }
            progress.await;
        }
    }
}
