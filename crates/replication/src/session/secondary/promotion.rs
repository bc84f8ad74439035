//! A secondary takes over: by command, or because its primary hands the group over.
//!
//! What can happen: a crash between any two steps, a merge that fails, own writes while all of this goes on. What must stay true: once
//! this side is promoted, every range that is written is durably in the record of activity first, so that a secondary that
//! was at the same checkpoint can be brought up to date later, and is never taken for being so.

use super::SecondaryGroup;
use crate::lease::Claim;
use crate::secondary::Input;
use crate::session::Fact;
use crate::session::activity::Activity;
use crate::store::Role;
use crate::types::{Epoch, Generation};
use crate::wire::HandOver;
use block::Result;
use drivers::filters::replication::Stage;
use env::{Existing, OpenMode};
use std::rc::Rc;
use std::time::Duration;

/// What a failover gave (X5).
#[derive(Clone, Debug)]
pub struct Failover {
    /// The checkpoint that is served.
    pub epoch: Epoch,
    /// The new generation.
    pub generation: Generation,
    /// From the command until requests were served.
    pub duration: Duration,
    /// How long ago the checkpoint was committed here, if that was in this process.
    pub age: Option<Duration>,
}

/// How a secondary is to take over.
#[derive(Clone, Copy, Debug)]
pub struct TakeOver {
    /// What was written on this side since the checkpoint stays.
    pub keep_own: bool,
    /// An older checkpoint than the newest.
    pub at: Option<Epoch>,
    /// Somebody has said that what this side lacks may be lost, and that another owner is to lose the group.
    pub force: bool,
}

impl TakeOver {
    /// As is usual.
    pub const fn at_newest() -> TakeOver {
        TakeOver { keep_own: true, at: None, force: false }
    }
}

impl SecondaryGroup {
    /// Takes over (X1-X3, X7), at the newest checkpoint or an older one that is kept (X8; own writes stood on the newest, so they go):
    /// durable, served, and no older generation accepted when done; the merge follows in the background. After a failed merge, tries
    /// that again.
    ///
    /// # Errors
    /// Never synchronized; no such checkpoint; of the store; the arbiter does not grant the group, or does not answer.
    pub async fn failover(self: &Rc<Self>, how: &TakeOver) -> Result<Failover> {
        let began = self.env.now();
        let _turn = self.line.acquire(1).await;
        if self.store.role() == Role::Secondary {
            self.promote(how, began).await?;
        }
        if matches!(self.stage.get(), Stage::Failover | Stage::FailoverFailed)
            && self.store.role() == Role::Promoted
        {
            self.start_merge();
        }
        let known = self.failover.borrow().clone();
        // promoted by an earlier process
        let old = || Failover {
            epoch: self.store.history().past().last().map_or(Epoch(0), |p| p.1),
            generation: self.store.highest(),
            duration: Duration::ZERO,
            age: None,
        };
        Ok(known.unwrap_or_else(old))
    }

    /// The caller has the line.
    pub(super) async fn promote(self: &Rc<Self>, how: &TakeOver, began: Duration) -> Result<Failover> {
        self.decisions_end().await;
        self.synchronized()?;
        let epoch = self.store.choose(how.at)?;
        let keep_own = how.keep_own && epoch == self.store.history().epoch();
        let lease = self.lease.borrow().clone();
        let granted = match &lease {
            Some(lease) => {
                let history = self.store.history();
                let from =
                    Claim { generation: history.generation(), epoch: history.epoch(), force: how.force };
                lease.claim(&from).await?
            }
            None => Generation(0),
        };
        let done = self.promote_as(granted, epoch, keep_own, began).await;
        if let Some(lease) = lease {
            match &done {
                Ok(done) => lease.own(done.generation).await,
                // nothing was promised
                Err(_) => lease.release(false).await,
            }
        }
        done
    }

    /// As a generation above all that were seen, here and by the arbiter.
    async fn promote_as(
        self: &Rc<Self>,
        granted: Generation,
        epoch: Epoch,
        keep_own: bool,
        began: Duration,
    ) -> Result<Failover> {
        // Higher than all seen, and not what another secondary promoted at the same time takes: then both are told apart as a
        // split brain when they meet, instead of being taken for one.
        let highest = self.core.borrow().highest().max(self.store.highest()).max(granted).0;
        let generation = Generation(((highest >> 16) + 1) << 16 | (self.env.random() & 0xffff));
        let mut history = self.store.history_at(epoch);
        history.promote(generation, epoch);
        // The record is there before the promotion is: a record without one is known by its generation, and dropped.
        let own = if keep_own { self.store.own_ranges() } else { Vec::new() };
        let mode = OpenMode { write: true, existing: Existing::CreateTruncate, ..OpenMode::default() };
        let file = self.env.open(&self.record, mode).await?;
        let (before, lens) = (self.store.lens(), self.store.lens_at(epoch));
        let activity = Activity::create(file, self.store.group(), &lens, history, Some(&own)).await?;
        let place = self.place.borrow().clone();
        if let Some(place) = place {
            // a later process that begins as primary is found there
            activity.found_at(&place).await?;
        }
        *self.activity.borrow_mut() = Some(activity);
        if let Err(e) = self.store.promote_at(generation, keep_own, Some(epoch)).await {
            self.activity.take();
            return Err(e);
        }
        self.tell_lengths(&before);
        // own writes that came meanwhile
        self.cover_own().await?;
        // A former owner that handed over, and is one again.
        if !env::bugs::planted("replication: who handed over never writes again") {
            self.refuses_own.take();
        }
        self.stage.set(Stage::Failover);
        let duration = self.env.now().saturating_sub(began);
        let done = Failover { epoch, generation, duration, age: self.age() };
        *self.failover.borrow_mut() = Some(done.clone());
        self.step(Input::Promoted(generation, epoch)).await;
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.say("serving", epoch, Some(("duration-us", micros.into())));
        Ok(done)
    }

    async fn cover_own(&self) -> Result<()> {
        let activity = self.activity();
        if let Some(activity) = activity {
            for (volume, span) in self.store.own_ranges() {
                activity.cover(volume, span).await?;
            }
        }
        Ok(())
    }

    /// What an earlier process remembered; without it everything counts as written since the promotion.
    ///
    /// # Errors
    /// Of the record's file.
    pub async fn resume_promoted(self: &Rc<Self>, known: Option<Rc<Activity>>) -> Result<()> {
        let history = self.store.history();
        let known = known.filter(|a| a.history().generation() == history.generation());
        let activity = match known {
            Some(known) => known,
            None => {
                let mode =
                    OpenMode { write: true, existing: Existing::CreateTruncate, ..OpenMode::default() };
                let file = self.env.open(&self.record, mode).await?;
                Activity::create(file, self.store.group(), &self.store.lens(), history, None).await?
            }
        };
        *self.activity.borrow_mut() = Some(activity);
        self.cover_own().await?;
        if self.store.role() == Role::Promoted {
            self.start_merge();
        }
        Ok(())
    }

    /// Merges in the background what a failover, perhaps of an earlier process, left to merge.
    pub(super) fn start_merge(self: &Rc<Self>) {
        let group = self.clone();
        self.stage.set(Stage::Failover);
        self.env.spawn("replication merge", async move {
            let epoch = group.store.history().epoch();
            match group.store.merge().await {
                Ok(()) => {
                    group.stage.set(Stage::Done);
                    group.say("completed", epoch, None);
                }
                Err(e) => {
                    group.stage.set(Stage::FailoverFailed);
                    *group.last_error.borrow_mut() = Some(format!("merge: {e}"));
                    group.say("failed", epoch, Some(("reason", e.to_string().into())));
                }
            }
            group.merged.notify_all();
        });
    }

    fn say(&self, phase: &str, epoch: Epoch, more: Option<(&'static str, Fact)>) {
        let mut facts = vec![("phase", phase.into()), ("epoch", epoch.0.into())];
        facts.extend(more);
        (self.tell)("REPLICATION_FAILOVER", facts);
    }

    /// Waits until the primary has handed the group over and everything is merged; `None` when the group is stopped before.
    pub async fn handed_over(&self) -> Option<HandOver> {
        loop {
            let merged = self.merged.wait();
            if self.stopped.get() {
                return None;
            }
            if self.stage.get() == Stage::Done
                && let Some(hand) = self.handed.take()
            {
                return Some(hand);
            }
            merged.await;
        }
    }
}
