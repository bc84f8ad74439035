//! What was kept gets on stable storage while more is kept (C7): for a flush that was asked for, an epoch that ended, a decision, and now
//! and then in between, so that none of these finds much to do.
//!
//! What can happen: a crash, a disk that fails, more changes and another session while a flush is under way. What must stay true:
//! * An epoch may be decided once all of it is on stable storage. Where its changes may be on the disks before, the record STORED says
//!   so behind the disks' flush; else its own record does, which stands behind all of it in the log.
//! * A decision is visible once its record is on stable storage, and in the order of the records.
//! * What this side's owner writes in between belongs to the view before the decision: it carries that view's number and goes with it,
//!   also when the log is read after a crash (C6).

use super::record::{self, Kind, Record};
use super::{Layer, Role, State, Store};
use crate::bugs::{Bug, planted};
use crate::digest::Digest;
use crate::history::History;
use crate::types::Epoch;
use block::{BlockError, Result};

/// Bytes that may be kept before a flush begins although nobody has asked for one; less in a small store. What is left for the end of an
/// epoch is about as much as comes while that flush runs.
const LAG: u64 = 32 << 20;

/// What came of [`Store::harden`].
#[derive(Debug)]
pub struct Hardened {
    /// Whether everything is on stable storage that was kept before it began.
    pub kept: Result<()>,
    /// Epochs that had ended, and whether they may be decided now.
    pub prepared: Vec<(Epoch, Result<()>)>,
    /// Epochs that were decided, and what was in them: they are what is shown now. With an error that is known only after the next start.
    pub decided: Vec<(Epoch, Result<Digest>)>,
}

impl Layer {
    fn ends(&self, epoch: Epoch) -> bool {
        self.sealed.as_ref().is_some_and(|s| s.0 == epoch)
    }

    pub(super) fn waits(&self) -> bool {
        self.sealed.is_some() && !self.ready && !self.committed
    }
}

impl State {
    /// What is on stable storage is all of this epoch.
    pub(super) fn stored(&mut self, epoch: Epoch) {
        self.layers.iter_mut().filter(|l| l.ends(epoch)).for_each(|l| l.ready = true);
    }

    /// The number that an own write carries now; none has zero.
    pub(super) fn own_number(&self) -> u64 {
        self.history.epoch().0.saturating_add(1)
    }

    /// Whether an own write with that number is of the present view; one without, of earlier versions, is.
    pub(super) fn is_own_now(&self, number: u64) -> bool {
        let now = number == 0 || number >= self.own_number() || self.role != Role::Secondary;
        now || planted(Bug::OwnOutlivesDecision)
    }
}

impl Store {
    /// The open epoch ends here. `history` is where the image comes from once it is decided, which it may be when [`Store::harden`] says so.
    ///
    /// # Errors
    /// Of the log; the epoch must not be decided then.
    pub async fn seal(&self, epoch: Epoch, digest: Digest, history: History) -> Result<()> {
        let payload = record::history_bytes(&history, &digest);
        let kind = if self.is_written_through() { Kind::Mark } else { Kind::Prepare };
        let turn = self.log.turn().await;
        self.still_secondary()?;
        self.log.append(&turn, &[Record::control(kind, epoch.0, payload)], 0).await?;
        let end = self.log.head();
        self.state.borrow_mut().seal(kind, (epoch, digest, history), end, self.volumes.len());
        drop(turn);
        self.to_harden.notify_all();
        Ok(())
    }

    /// An epoch that is prepared is decided, and those before it: [`Store::harden`] says when that is durable and visible. Repeating it changes
    /// nothing.
    ///
    /// # Errors
    /// It is not prepared; of the log.
    pub async fn decide(&self, epoch: Epoch) -> Result<()> {
        let turn = self.log.turn().await;
        self.still_secondary()?;
        if self.state.borrow().deciding.iter().any(|d| *d >= epoch) {
            return Ok(());
        }
        if !self.prepared().iter().any(|p| p.0 == epoch) {
            return Err(BlockError::invalid(format!("epoch {epoch} is not prepared")));
        }
        self.log.append(&turn, &[Record::control(Kind::Commit, epoch.0, Vec::new())], 0).await?;
        self.state.borrow_mut().deciding.push(epoch);
        drop(turn);
        self.to_harden.notify_all();
        Ok(())
    }

    /// Whether a decision is recorded and not visible yet. Meanwhile no session may begin, and this side may not take over.
    pub fn is_deciding(&self) -> bool {
        !self.state.borrow().deciding.is_empty()
    }

    /// Why nothing can be recorded any more, if so.
    ///
    /// # Errors
    /// That.
    pub fn is_whole(&self) -> Result<()> {
        self.log.check()
    }

    /// Whether there is anything for [`Store::harden`] that nobody has to ask for.
    pub fn wants_hardening(&self) -> bool {
        let s = self.state.borrow();
        self.log.check().is_ok()
            && (!s.deciding.is_empty() || s.layers.iter().any(Layer::waits) || self.lags_behind())
    }

    /// Whether so much was kept since the last flush began that it is time for the next.
    pub(super) fn lags_behind(&self) -> bool {
        let most = LAG.min(self.log.ring() / 8);
        self.log.head() - self.log.durable() > most || self.unflushed.get() > most
    }

    /// Brings to stable storage what was kept and recorded before it began, while more comes.
    pub async fn harden(&self) -> Hardened {
        let _one = self.hardening.acquire(1).await;
        let (session, ended, deciding) = {
            let s = self.state.borrow();
            let ended = s.layers.iter().filter(|l| l.waits());
            let ended: Vec<_> = ended.filter_map(|l| l.sealed.as_ref().map(|x| (x.0, l.marked))).collect();
            (s.session, ended, s.deciding.clone())
        };
        // one that was marked before the first checkpoint was visible may be left
        let through = self.is_written_through() || ended.iter().any(|e| e.1);
        self.unflushed.set(0);
        let mut logged = Ok(());
        if planted(Bug::StoredTooEarly) {
            logged = self.record_stored(session, &ended).await;
        }
        let on_disk = match through && !planted(Bug::DataNotFlushedBeforeCommit) {
            true => self.flush_volumes().await,
            false => Ok(()),
        };
        if through && on_disk.is_ok() && logged.is_ok() {
            logged = self.record_stored(session, &ended).await;
        }
        if logged.is_ok() && (deciding.is_empty() || !planted(Bug::CommitNotDurable)) {
            logged = self.log.barrier().await;
        }
        // own writes of the view before are in the index, all of them, when that goes
        let _turn = self.log.turn().await;
        let mut s = self.state.borrow_mut();
        let s = &mut *s;
        let deciding = if planted(Bug::LateCountsAsFlushed) { s.deciding.clone() } else { deciding };
        s.deciding.retain(|e| !deciding.contains(e));
        let mut decided = Vec::new();
        for epoch in deciding {
            let shown = logged.clone().map(|()| {
                s.commit(epoch, self.engine);
                s.digest
            });
            decided.push((epoch, shown));
        }
        let kept = on_disk.and(logged);
        let mut prepared = Vec::new();
        // another session may have an epoch of that number
        let same = s.session == session;
        for (epoch, _) in ended.into_iter().filter(|_| same) {
            match kept {
                Ok(()) => s.stored(epoch),
                // a later flush may succeed without what this one was for
                Err(_) => s.unseal(epoch),
            }
            prepared.push((epoch, kept.clone()));
        }
        if !decided.is_empty() {
            self.work.notify_all();
        }
        Hardened { kept, prepared, decided }
    }

    /// The disks hold all of these epochs.
    async fn record_stored(&self, session: u64, ended: &[(Epoch, bool)]) -> Result<()> {
        let stored = |e: &(Epoch, bool)| Record::control(Kind::Stored, e.0.0, Vec::new());
        let records: Vec<Record> = ended.iter().filter(|e| e.1).map(stored).collect();
        if records.is_empty() {
            return Ok(());
        }
        let turn = self.log.turn().await;
        let still = {
            let s = self.state.borrow();
            s.session == session && s.role == Role::Secondary
        };
        if !still {
            return Ok(());
        }
        self.log.append(&turn, &records, 0).await.map(drop)
    }
}
