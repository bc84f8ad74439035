//! What waits for stable storage does so beside the line: a flush that was asked for, an epoch that ended, a decision (C7).
//!
//! What can happen: more frames, another session, a promotion, a manager's decision while the store flushes. What must stay true: what
//! came of it is told in the line, and in its order; a session begins, and this side takes over, only when no decision is under way.

use super::SecondaryGroup;
use crate::Seq;
use crate::digest::Digest;
use crate::secondary::{Input, Output, SessionId};
use crate::store::{Hardened, Role};
use crate::types::Epoch;
use block::{BlockError, ErrorKind, Result};
use std::rc::Rc;

/// What came of one flush of the store, and for whom it was.
pub(super) struct Pass {
    session: Option<SessionId>,
    asked: Option<(SessionId, Seq)>,
    done: Hardened,
}

impl SecondaryGroup {
    /// Whatever the session has received is to be on stable storage.
    pub(super) fn ask_flush(&self, session: SessionId) {
        let upto = self.core.borrow().received().0;
        self.asked.set(Some((session, upto)));
        self.store.to_harden.notify_all();
    }

    /// Flushes the store whenever that was asked for or is time, until the group is stopped.
    pub(super) async fn keep_hardening(self: Rc<Self>) {
        loop {
            let more = self.store.to_harden.wait();
            if self.asked.get().is_none() && !self.store.wants_hardening() {
                if self.stopped.get() {
                    return;
                }
                more.await;
                continue;
            }
            drop(more);
            self.harden().await;
            let _turn = self.line.acquire(1).await;
            self.tell_hardened().await;
        }
    }

    async fn harden(&self) {
        let (asked, lens) = (self.asked.take(), self.store.lens());
        let session = self.core.borrow().session();
        let done = self.store.harden().await;
        self.passes.borrow_mut().push_back(Pass { session, asked, done });
        self.tell_lengths(&lens);
        self.passed.notify_all();
    }

    /// Waits until no decision is under way, and what they gave is told. The caller has the line.
    pub(super) async fn decisions_end(self: &Rc<Self>) {
        // not by waiting for the one who does so usually: that one may wait for the line
        while self.store.is_deciding() {
            self.harden().await;
        }
        self.tell_hardened().await;
    }

    /// The caller has the line, and everything that was received is kept.
    async fn tell_hardened(self: &Rc<Self>) {
        loop {
            let Some(Pass { session, asked, done }) = self.passes.borrow_mut().pop_front() else { return };
            for (epoch, shown) in done.decided {
                Box::pin(self.decided(epoch, shown)).await;
            }
            let nobody_knows = done.prepared.is_empty();
            let same = self.core.borrow().session() == session;
            for (epoch, ready) in done.prepared.into_iter().filter(|_| same) {
                let ready = ready.map_err(|e| e.to_string());
                Box::pin(self.step(Input::Prepared(epoch, ready))).await;
            }
            match done.kept {
                Ok(()) => {
                    if let Some((session, durable)) = asked {
                        Box::pin(self.kept(session, durable)).await;
                    }
                }
                Err(e) if asked.is_some() || nobody_knows => {
                    let text = format!("flush: {e}");
                    let refused = Input::Refused { volume: 0, offset: 0, errno: e.errno(), text };
                    Box::pin(self.step(refused)).await;
                }
                Err(_) => {}
            }
        }
    }

    /// An epoch is decided. The caller has the line.
    async fn decided(self: &Rc<Self>, epoch: Epoch, shown: Result<Digest>) {
        match shown {
            Ok(digest) => {
                self.committed.set(Some(self.env.now()));
                if self.former.take().is_some() {
                    // from here on its history tells
                    self.owners.take();
                    let _ = self.env.remove(&self.record).await;
                }
                self.step(Input::Decided(epoch)).await;
                let session = self.core.borrow().session();
                if let Some(session) = session {
                    // where checkpoints are kept, a change has come as far as it will
                    self.kept(session, Seq(0)).await;
                }
                (self.tell)(
                    "REPLICATION_CHECKPOINT",
                    vec![
                        ("epoch", epoch.0.into()),
                        ("bytes", digest.bytes.into()),
                        ("digest", digest.to_string().into()),
                    ],
                );
            }
            Err(e) => self.not_decided(epoch, &e).await,
        }
    }

    /// What was decided is known after the next start. The caller has the line.
    pub(super) async fn not_decided(self: &Rc<Self>, epoch: Epoch, e: &BlockError) {
        *self.last_error.borrow_mut() = Some(format!("commit of {epoch}: {e}"));
        let sessions: Vec<SessionId> = self.connections.borrow().keys().copied().collect();
        for id in sessions {
            self.carry_out(Output::Close(id)).await;
        }
    }

    /// Epochs that are prepared here and not decided.
    pub fn prepared(&self) -> Vec<Epoch> {
        self.store.prepared().into_iter().map(|p| p.0).collect()
    }

    /// An external manager decides here that a prepared epoch is committed, whether the primary is there or not. Repeating it changes
    /// nothing.
    ///
    /// # Errors
    /// It is not prepared; this side has taken over; of the store.
    pub async fn decide(self: &Rc<Self>, epoch: Epoch) -> Result<()> {
        {
            let _turn = self.line.acquire(1).await;
            self.decisions_end().await;
            if self.store.role() == Role::Secondary && self.history().epoch() == epoch {
                return Ok(());
            }
            let prepared = self.store.prepared().into_iter().find(|p| p.0 == epoch);
            let Some((_, history)) = prepared.filter(|_| self.store.role() == Role::Secondary) else {
                return Err(BlockError::new(
                    ErrorKind::Busy,
                    format!("checkpoint {epoch} is not prepared here"),
                ));
            };
            self.core.borrow_mut().agree(history);
            self.store.decide(epoch).await?;
        }
        loop {
            let passed = self.passed.wait();
            if !self.store.is_deciding() {
                return self.store.is_whole();
            }
            passed.await;
        }
    }
}
