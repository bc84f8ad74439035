//! Hosts that take turns: between times of crashes, bad links and bad disks the group changes sides as planned and unplanned, the former
//! owner follows, two are promoted at once, older checkpoints are gone back to and looked at on clones, and the sides are compared.
//!
//! What is checked beyond what [`super`] does:
//! * X9, I5: a planned change of sides loses nothing that was answered, also when either host or the link dies in the middle; one side
//!   serves writers afterwards, the other is at exactly that checkpoint and is sent nothing;
//! * L8: a former owner is sent what either side wrote since they parted, never the whole disk; until that is committed it shows nothing (I1);
//! * L9, I7: what an old primary writes after a failover is nowhere else; two that were promoted refuse one another until a command says whose
//!   writes go;
//! * I7: a primary that was succeeded while it was down, and is started as primary again, serves nobody where it can hear of its successor,
//!   and is fenced as soon as either reaches the other, whichever of the two knows the other;
//! * X8: a failover to a checkpoint that was kept is that checkpoint; clones are checkpoints, while replication goes on;
//! * a verification finds nothing where nothing rotted, and what did;
//! * a manager that decides about checkpoints, and dies between two calls, comes back or does not, blocks nobody and loses nothing;
//! * I9: a store never takes more than it was given.

use super::hosts::Site;
use super::{PATIENCE, Run, STORE, Wishes};
use crate::runner::Outcome;
use crate::{NetProfile, Refusal, World};
use serde_json::{Value as Json, json};
use std::rc::Rc;
use std::time::Duration;

/// Of this many bytes guests use the first [`super::SECTORS`]: a copy of the whole disk is told from one of what differs.
pub(super) const DISK: u64 = 12 << 20;
/// Where only an owner writes that was left behind.
pub(super) const FAR: u64 = 8 << 20;
/// Where a killed owner wrote is known in pieces of 4 MiB; guests stay within one of them, and one that is left behind writes to another.
pub(super) const MOST_RESENT: u64 = 8 << 20;
/// A planned change of sides may take so long.
pub(super) const SWITCHOVER_MS: u64 = 5000;
/// At least and at most.
pub(super) type Length = (Duration, Duration);
/// How long things fail before a turn.
pub(super) const TROUBLE: Length = (Duration::from_millis(50), Duration::from_millis(900));
/// Between two things that happen in times of trouble, at most.
pub(super) const PACE: Duration = Duration::from_millis(200);
/// What a manager that dies leaves undecided is given up after this.
const DECIDE_MS: u64 = 400;

/// One seed.
pub fn turns(seed: u64, verbose: bool) -> Outcome {
    World::play(seed, verbose, |w| async move {
        let mut rng = w.rng("plan");
        let (retain, external) = (*rng.choose(&[0, 2, 5]), rng.chance(0.25));
        let wishes = Wishes { disk: DISK, retain, external, ..Wishes::NONE };
        let run = Rc::new(Run::new(w, rng, wishes, seed));
        if let Err(e) = run.take_turns().await
            && !run.world.verdict().is_bad()
        {
            run.bad(format!("the run broke off: {e}"));
        }
    })
}

impl Run {
    async fn take_turns(self: &Rc<Self>) -> Result<(), Refusal> {
        for s in self.followers() {
            self.bring_up(s, false).await?;
        }
        self.bring_up(self.primary(), true).await?;
        self.start_guests();
        for _ in 0..self.draw(|r| r.between(1, 4)) {
            self.trouble(TROUBLE, PACE).await?;
            self.turn().await?;
            if self.world.verdict().is_bad() {
                return Ok(());
            }
        }
        self.end_alike().await
    }

    /// One change of sides, or one look at a side.
    pub(super) async fn turn(self: &Rc<Self>) -> Result<(), Refusal> {
        match self.draw(|r| r.below(100)) {
            _ if self.world.verdict().is_bad() => return Ok(()),
            0..30 => self.switchover().await?,
            30..60 => self.failover_and_back().await?,
            60..72 if self.sites.len() == 3 => self.two_are_promoted().await?,
            60..80 => self.trial().await?,
            _ => self.compared().await?,
        }
        self.world.count("turns", 1);
        Ok(())
    }

    /// In the end everybody is in sync and all disks are alike.
    pub(super) async fn end_alike(self: &Rc<Self>) -> Result<(), Refusal> {
        self.settled().await?;
        self.stop_guests().await;
        self.all_alike().await?;
        self.world.verdict().check("history", self.history.check());
        Ok(())
    }

    pub(super) fn followers(&self) -> Vec<&Site> {
        let lead = self.lead.get();
        self.sites.iter().enumerate().filter(|s| s.0 != lead).map(|s| s.1).collect()
    }

    pub(super) fn number_of(&self, site: &Site) -> usize {
        self.sites.iter().position(|s| s.name == site.name).unwrap_or(0)
    }

    // ---- times of trouble

    /// Things fail, but not the primary's disk, for a while; checkpoints, crashes and looks meanwhile.
    pub(super) async fn trouble(self: &Rc<Self>, length: Length, pace: Duration) -> Result<(), Refusal> {
        self.let_things_fail(length.0, length.1);
        while self.troubled() && !self.world.verdict().is_bad() {
            self.pause(pace).await;
            self.something().await?;
        }
        self.calm();
        self.world.net().set_profile(NetProfile::calm());
        Ok(())
    }

    /// Nothing fails any more; who lost a barrier is started anew, and everybody gets in sync.
    pub(super) async fn settled(self: &Rc<Self>) -> Result<(), Refusal> {
        self.calm();
        self.world.net().set_profile(NetProfile::calm());
        self.world.net().cut(" 7000");
        for s in self.followers() {
            s.stop(false);
            self.bring_up(s, false).await?;
        }
        self.in_sync(self.primary(), self.sites.len() - 1).await
    }

    pub(super) async fn stop_guests(&self) {
        let guests = self.guests.take();
        let all = async {
            for g in &guests {
                g.stop().await;
            }
        };
        // what they wait for may need checkpoints, which nobody but a manager makes
        let managed = async {
            while self.wishes.external && self.managed_checkpoint().await.is_ok() {
                self.env().sleep(Duration::from_millis(100)).await;
            }
            std::future::pending().await
        };
        let stopping = env::sync::race(all, managed);
        self.world.within(self.env(), PATIENCE, "guest requests", stopping).await;
    }

    pub(super) async fn all_alike(self: &Rc<Self>) -> Result<(), Refusal> {
        // one whose store was full when the guests stopped is given up, and comes back
        self.in_sync(self.primary(), self.sites.len() - 1).await?;
        self.alike(self.primary(), &self.followers()).await?;
        for s in self.followers().into_iter().filter(|_| self.wishes.retain == 0) {
            if s.far() != self.primary().far() {
                self.bad(format!(
                    "L8: what only {} had written, or was written while it was away, is not what {} has",
                    s.name,
                    self.primary().name
                ));
            }
        }
        Ok(())
    }

    /// Numbers of checkpoints so far are of another history: what they were is not looked up any more.
    pub(super) async fn new_history(&self) -> Result<(), Refusal> {
        let mut last = self.before.get();
        for s in &self.sites {
            last = last.max(s.seen.get());
            if let Ok(info) = s.info().await {
                for key in ["committed-epoch", "open-epoch"] {
                    last = last.max(info[key].as_u64().unwrap_or(0));
                }
            }
        }
        self.before.set(last);
        self.made.borrow_mut().clear();
        Ok(())
    }

    // ---- checkpoints about which a manager decides

    /// As an external manager makes one: prepare, and then decide, here or at a secondary; or it dies in between.
    pub(super) async fn managed_checkpoint(&self) -> Result<(), Refusal> {
        let from = self.history.tick();
        let m = self.primary().manager()?;
        let prepare = json!({"group": "g", "timeout-ms": 1500, "decide-within-ms": DECIDE_MS});
        let epoch = match m.execute("replication-prepare-checkpoint", prepare).await {
            Ok(done) => done["epoch"].as_u64().unwrap_or(0),
            Err(Refusal::Error(_)) => {
                self.world.count("checkpoints not prepared", 1);
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        self.made.borrow_mut().insert(epoch, (from, self.history.tick()));
        for s in self.followers() {
            // one of a path that was left may have the same number
            if self.committed(s).await == Some(epoch) && epoch > self.before.get() {
                self.bad(format!("{} committed checkpoint {epoch} without the manager's word", s.name));
            }
        }
        match self.draw(|r| r.below(100)) {
            0..15 => {
                let abort = m.execute("replication-abort", json!({"group": "g", "epoch": epoch})).await;
                if abort.is_ok() {
                    self.world.count("checkpoints aborted", 1);
                }
                self.gone(&abort)
            }
            15..30 => {
                // it never comes back: others must not wait for it
                self.world.count("managers that died", 1);
                Ok(())
            }
            n => {
                if n < 55 {
                    // it dies, comes back, and asks what it was about
                    self.world.count("managers that came back", 1);
                    self.pause(Duration::from_millis(DECIDE_MS)).await;
                }
                self.decide().await
            }
        }
    }

    /// Commits all that is undecided, in its order.
    pub(super) async fn decide(&self) -> Result<(), Refusal> {
        let undecided = self.primary().info().await?["undecided"].as_array().cloned().unwrap_or_default();
        for epoch in undecided {
            let commit = json!({"group": "g", "epoch": epoch, "timeout-ms": 1500});
            // a secondary may hold the word of a manager as well as the primary
            let at = if self.draw(|r| r.chance(0.2)) { self.follower() } else { self.primary() };
            let Ok(m) = at.manager() else { continue };
            let done = m.execute("replication-commit", commit).await;
            if done.is_ok() {
                self.world.count("checkpoints decided by a manager", 1);
            }
            if at.name == self.primary().name {
                self.gone(&done)?;
            }
        }
        Ok(())
    }

    /// A refusal is as good as success here; a daemon that is gone is not.
    pub(super) fn gone(&self, result: &Result<Json, Refusal>) -> Result<(), Refusal> {
        match result {
            Err(Refusal::Gone) => Err(Refusal::Gone),
            _ => Ok(()),
        }
    }

    /// I9: the store of a secondary holds no more than it may.
    pub(super) fn within_bounds(&self, site: &Site, info: &Json) {
        if let Some(used) = info["buffer"]["used"].as_u64()
            && used > STORE
        {
            self.bad(format!("I9: the store of {} uses {used} of {STORE} bytes", site.name));
        }
    }
}
