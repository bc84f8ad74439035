//! Checkpoints about which an external manager decides: prepare, then commit or abort (the calls of the original design).
//!
//! What can happen: a secondary vetoes or is gone, the manager dies or comes too late. What must stay true: without the manager's word
//! nothing is committed; an epoch that is given up loses nothing, it goes on in the next (C8); none is undecided for ever.

use super::{CheckpointDone, PrimaryGroup};
use crate::primary::{Input, MarkState, Primary};
use crate::types::{Epoch, Seq};
use block::{BlockError, ErrorKind, Result};
use std::rc::Rc;
use std::time::Duration;

/// An epoch that all secondaries hold completely and durably.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Its number.
    pub epoch: Epoch,
    /// The mark's place in the order of the changes.
    pub seq: Seq,
    /// Bytes of its changes.
    pub bytes: u64,
    /// From the mark to the last answer.
    pub duration: Duration,
}

impl PrimaryGroup {
    /// Ends an epoch and waits until all secondaries are prepared to commit it. If nobody decides within `decide`, it is given up.
    ///
    /// # Errors
    /// Nobody is there, a secondary refuses, or `timeout` passes: then the epoch goes on in the next.
    pub async fn prepare(self: &Rc<Self>, timeout: Duration, decide: Duration) -> Result<Prepared> {
        let began = self.env.now();
        let bytes = self.look(Primary::sent_since_mark);
        let epoch = self.mark(true).await?;
        let seq = self.look(Primary::last);
        let wait = async {
            loop {
                let progress = self.progress.wait();
                match self.look(|c| c.mark_state(epoch)) {
                    MarkState::Marked => progress.await,
                    MarkState::Prepared | MarkState::Decided => return Ok(()),
                    // one who was very quick
                    MarkState::Gone if self.look(|c| c.history().epoch() >= epoch) => return Ok(()),
                    MarkState::Gone => return Err(self.refusal(epoch)),
                }
            }
        };
        let Some(outcome) = self.env.timeout(timeout, wait).await else {
            let why = format!("checkpoint {epoch} was not prepared in time");
            self.step(Input::Decide(epoch, Err(why.clone())));
            return Err(BlockError::new(ErrorKind::Io, why));
        };
        outcome?;
        let group = self.clone();
        self.env.spawn("replication decision", async move { group.give_up_after(epoch, decide).await });
        Ok(Prepared { epoch, seq, bytes, duration: self.env.now().saturating_sub(began) })
    }

    async fn give_up_after(self: &Rc<Self>, epoch: Epoch, decide: Duration) {
        let due = self.env.now().saturating_add(decide);
        loop {
            let progress = self.progress.wait();
            if self.stopped.get() || self.look(|c| c.mark_state(epoch)) != MarkState::Prepared {
                return;
            }
            let left = due.saturating_sub(self.env.now());
            if left.is_zero() {
                let why = format!("nobody decided about it within {} ms", decide.as_millis());
                return self.step(Input::Decide(epoch, Err(why)));
            }
            self.env.timeout(left, progress).await;
        }
    }

    /// The manager says that a prepared epoch is to be committed. Repeating it changes nothing.
    ///
    /// # Errors
    /// It is not prepared, or one before it is undecided; or it was decided, and is not known to be committed anywhere.
    pub async fn commit(self: &Rc<Self>, epoch: Epoch, timeout: Duration) -> Result<CheckpointDone> {
        let began = self.env.now();
        if let Some((last, digest)) = self.look(Primary::last_checkpoint).filter(|l| l.0 == epoch) {
            return Ok(CheckpointDone { epoch: last, digest, duration: Duration::ZERO });
        }
        if let Some(why) = self.look(|c| c.cannot_decide(epoch, true)) {
            return Err(BlockError::new(ErrorKind::Busy, why));
        }
        self.step(Input::Decide(epoch, Ok(())));
        self.until_committed(epoch, began, timeout).await
    }

    /// The manager says that a prepared epoch is not to be committed: it goes on in the next.
    ///
    /// # Errors
    /// No decision about it is waited for.
    pub fn abort(self: &Rc<Self>, epoch: Epoch) -> Result<()> {
        if let Some(why) = self.look(|c| c.cannot_decide(epoch, false)) {
            return Err(BlockError::new(ErrorKind::Busy, why));
        }
        self.step(Input::Decide(epoch, Err("aborted by the manager".to_owned())));
        Ok(())
    }
}
