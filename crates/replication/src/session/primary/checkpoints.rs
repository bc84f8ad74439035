//! When a primary makes a checkpoint, and how long it waits for one.
//!
//! What must stay true: an epoch's number is durably reserved before its mark is sent; a checkpoint that is asked for either is committed on
//! all secondaries that take part, or fails with the reason that one of them gave. The clock asks only for what there is to commit.

use super::{CheckpointDone, PrimaryGroup};
use crate::primary::{Input, Primary};
use crate::types::Epoch;
use block::{BlockError, ErrorKind, Result};
use env::sync::race;
use std::rc::Rc;
use std::time::Duration;

/// Epoch numbers reserved at a time: one small write for so many checkpoints.
const RESERVE: u64 = 256;
/// Marks whose time is remembered: more than can be undecided or kept as dirty sets.
const MAX_MARKED: usize = 1024;

impl PrimaryGroup {
    /// Checkpoints by the clock from now on, or none.
    pub fn set_interval(&self, every: Option<Duration>) {
        self.interval.set(every);
        self.retimed.notify_all();
    }

    /// Between checkpoints by the clock.
    pub fn interval(&self) -> Option<Duration> {
        self.interval.get()
    }

    /// One checkpoint per interval, if there is anything that a secondary lacks (C9).
    pub(super) async fn by_the_clock(self: Rc<Self>) {
        let mut due = self.env.now();
        loop {
            let (retimed, stop) = (self.retimed.wait(), self.stop.wait());
            if self.stopped.get() {
                return;
            }
            let other = async {
                race(retimed, stop).await;
            };
            let Some(every) = self.interval.get() else {
                other.await;
                due = self.env.now();
                continue;
            };
            // A checkpoint that takes longer than the interval does not make two come at once.
            due = (due + every).max(self.env.now());
            if race(self.env.sleep(due.saturating_sub(self.env.now())), other).await.is_none() {
                due = self.env.now();
                continue;
            }
            if self.look(|c| c.wants_checkpoint() && !c.config().external_decision) {
                // its failure is told by events
                let _ = self.checkpoint(Duration::MAX).await;
            }
        }
    }

    /// How old the oldest change is that peer number `peer` has not committed, at most: since the mark of its checkpoint.
    pub(super) fn behind(&self, peer: usize) -> Duration {
        let (lacks, committed) =
            self.look(|c| (c.lacks(peer), c.peers().get(peer).and_then(|p| p.committed)));
        if !lacks {
            return Duration::ZERO;
        }
        let marked = committed.and_then(|e| self.marked.borrow().get(&e).copied());
        self.env.now().saturating_sub(marked.unwrap_or(self.began))
    }

    /// Makes a checkpoint on all secondaries that are up to date.
    ///
    /// # Errors
    /// Nobody is there, a secondary refuses, or `timeout` passes (the checkpoint may still come).
    pub async fn checkpoint(self: &Rc<Self>, timeout: Duration) -> Result<CheckpointDone> {
        let began = self.env.now();
        let epoch = self.mark(false).await?;
        self.until_committed(epoch, began, timeout).await
    }

    /// Ends the open epoch; its number.
    pub(super) async fn mark(self: &Rc<Self>, external: bool) -> Result<Epoch> {
        let (open, reserved) = self.look(|c| (c.open_epoch(), c.reserved()));
        if open.0 + RESERVE / 2 > reserved.0 {
            let upto = Epoch(open.0 + RESERVE);
            self.activity.reserve(upto).await?;
            self.core.borrow_mut().reserve(upto);
        }
        if let Some(why) = self.look(Primary::cannot_mark) {
            return Err(BlockError::new(ErrorKind::Busy, why));
        }
        let epoch = self.look(Primary::open_epoch);
        {
            let mut marked = self.marked.borrow_mut();
            marked.insert(epoch, self.env.now());
            if marked.len() > MAX_MARKED {
                marked.pop_first();
            }
        }
        self.step(Input::Mark { external });
        Ok(epoch)
    }

    /// Why an epoch that was marked is gone.
    pub(super) fn refusal(&self, epoch: Epoch) -> BlockError {
        let why = self.failed.borrow().get(&epoch).cloned();
        let why = why.unwrap_or_else(|| "the secondaries are gone".to_owned());
        BlockError::new(ErrorKind::Io, format!("checkpoint {epoch} was refused: {why}"))
    }

    /// Waits until all parties have committed.
    pub(super) async fn until_committed(
        self: &Rc<Self>,
        epoch: Epoch,
        began: Duration,
        timeout: Duration,
    ) -> Result<CheckpointDone> {
        let wait = async {
            loop {
                let progress = self.progress.wait();
                match self.look(|c| (c.last_checkpoint().filter(|l| l.0 >= epoch), c.is_pending(epoch))) {
                    (Some((_, digest)), _) => {
                        return Ok(CheckpointDone { epoch, digest, duration: self.env.now() - began });
                    }
                    (None, false) => return Err(self.refusal(epoch)),
                    (None, true) => progress.await,
                }
            }
        };
        let late = || BlockError::new(ErrorKind::Io, format!("checkpoint {epoch} is not decided yet"));
        self.env.timeout(timeout, wait).await.unwrap_or_else(|| Err(late()))
    }
}
