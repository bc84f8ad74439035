//! Changes of sides: planned, unplanned with the way back, and two sides that were promoted.
//!
//! What can happen and what is checked: see [`super::turns`]. What must stay true here: guests never use a side of which nobody knows yet
//! whether it is the owner, so that what they are told is the owner's word.

use super::hosts::Site;
use super::turns::{DISK, FAR, MOST_RESENT, PACE, SWITCHOVER_MS, TROUBLE};
use super::{PATIENCE, Run, SECOND_LIFE};
use crate::guest::Disk;
use crate::history::Crash;
use crate::{Guest, Manager, NbdDisk, NetProfile, Refusal, Value, stamped, values_of};
use block::{SECTOR, Span};
use serde_json::{Value as Json, json};
use std::rc::Rc;
use std::time::Duration;

impl Run {
    // ---- a planned change of sides

    pub(super) async fn switchover(self: &Rc<Self>) -> Result<(), Refusal> {
        self.settled().await?;
        let (old, to) = (self.primary(), self.follower());
        self.guests.borrow().iter().for_each(Guest::allow_errors);
        let m = old.manager()?;
        if self.wishes.external {
            // who wants to change sides has the last checkpoint made
            m.must("replication-set", json!({"group": "g", "decision": "auto"})).await?;
        }
        let disturbed = self.draw(|r| r.chance(0.5)).then(|| self.disturb(old, to));
        let name = self.peer_of(&old.info().await?, to).map(|p| p["name"].clone());
        let switch = json!({"group": "g", "to": name, "listen": old.address(), "timeout-ms": SWITCHOVER_MS});
        let done = self
            .world
            .within(
                self.env(),
                PATIENCE,
                "the answer to a switchover",
                m.execute("replication-switchover", switch),
            )
            .await
            .unwrap_or(Err(Refusal::Gone));
        drop(m);
        let calm = disturbed.is_none();
        let power = match disturbed {
            Some(task) => task.await.unwrap_or(false),
            None => {
                if let Err(e) = &done {
                    self.bad(format!("nothing failed, but the switchover did: {e}"));
                }
                false
            }
        };
        self.calm();
        self.world.net().set_profile(NetProfile::calm());
        let new = self.who_leads(old, to).await?;
        // what waited for the outcome is answered, one way or the other
        self.stop_guests().await;
        let taken = new.name == to.name;
        self.world.count(if taken { "switchovers" } else { "switchovers that did not happen" }, 1);
        let found = self.read_all(new).await?;
        // what was answered is there; only a host that went on alone can have lost its power
        let how = if power && !taken { Crash::PowerLoss } else { Crash::KillWriteThrough };
        self.world.verdict().check("X9: after a switchover", self.history.crash(&found, how));
        if taken {
            self.lead.set(self.number_of(to));
            old.seen.set(0);
        }
        if let (true, true, Ok(done)) = (taken, calm, &done) {
            self.exactly_there(old, &found, done["epoch"].as_u64().unwrap_or(0)).await?;
        }
        self.new_history().await?;
        self.regroup(old, to).await?;
        if let (true, Ok(_)) = (taken, &done) {
            let sent = self.resent(to, old).await?;
            if sent != 0 {
                self.bad(format!("X9: {sent} bytes were sent to {} after a switchover", old.name));
            }
        }
        self.start_guests();
        Ok(())
    }

    /// After a switchover that was answered: the former primary is a secondary at that checkpoint, and its users cannot write.
    pub(super) async fn exactly_there(&self, old: &Site, found: &[Value], epoch: u64) -> Result<(), Refusal> {
        let info = match old.info().await {
            Ok(info) => info,
            Err(_) => return Ok(()), // it was killed since
        };
        // the new primary may have made the next one already
        if info["role"] != "secondary" || info["committed-epoch"].as_u64().is_none_or(|e| e < epoch) {
            self.bad(format!("X9: after the switchover at {epoch} {} is {info}", old.name));
            return Ok(());
        }
        let Ok(disk) = old.disk(&self.world).await else { return Ok(()) };
        if disk.write(0, stamped(SECOND_LIFE, 0, 1), false).await.is_ok() {
            self.bad(format!("X9: {} takes writes after it was handed over", old.name));
        }
        let data = disk.read(self.wishes.area()).await;
        disk.disconnect();
        if let Ok(data) = data
            && values_of(&data.contiguous(), 0) != found
        {
            self.bad(format!("X9: {} does not show what the new primary does", old.name));
        }
        Ok(())
    }

    /// Something fails at some moment of the switchover. Whether the old primary lost its power.
    pub(super) fn disturb(self: &Rc<Self>, old: &Site, to: &Site) -> env::sync::Oneshot<bool> {
        let (run, old, to) = (self.clone(), self.number_of(old), self.number_of(to));
        let (sender, done) = env::sync::oneshot();
        self.env().spawn("disturbance", async move {
            run.pause(Duration::from_millis(run.draw(|r| *r.choose(&[2, 8, 30, 120])))).await;
            let power = run.draw(|r| r.chance(0.5));
            let mut lost = false;
            match run.draw(|r| r.below(4)) {
                0 => run.world.net().cut(" 7000"),
                1 => run.sites[to].stop(power),
                2 => {
                    run.guests.take().iter().for_each(Guest::abandon);
                    run.sites[old].stop(power);
                    lost = power;
                }
                _ => {
                    let until = run.env().now() + Duration::from_secs(7);
                    run.world.net().set_profile(run.nobody_is_reached(until));
                    run.world.net().cut(" 7000");
                    run.env().sleep(Duration::from_secs(7)).await;
                }
            }
            run.world.count("switchovers disturbed", 1);
            sender.send(lost);
        });
        done
    }

    /// Both sides of a switchover are up again in the role that they had, or got; who is the primary now.
    pub(super) async fn who_leads<'a>(
        self: &'a Rc<Self>,
        old: &'a Site,
        to: &'a Site,
    ) -> Result<&'a Site, Refusal> {
        if to.running.borrow().is_none() {
            // one that has taken over completely does not follow any more
            if let Err(e) = self.try_to_bring_up(to, false).await {
                to.stop(false);
                if !matches!(&e, Refusal::Error(e) if e.contains("demote")) {
                    return Err(e);
                }
                self.bring_up(to, true).await?;
            }
        }
        if old.running.borrow().is_none()
            && let Err(e) = self.try_to_bring_up(old, true).await
        {
            // it had become a secondary
            old.stop(false);
            if !matches!(&e, Refusal::Error(e) if e.contains("fail over first")) {
                return Err(e);
            }
            self.bring_up(old, false).await?;
        }
        let clear = async {
            loop {
                let (o, t) = (old.info().await?, to.info().await?);
                let follows = t["role"] == "secondary" && t["stage"] == "running";
                if !follows {
                    return Ok(to);
                }
                if self.peer_of(&o, to).is_some_and(|p| p["state"] == "running") {
                    return Ok(old);
                }
                if self.wishes.external && o["decision"] == "external" {
                    self.managed_checkpoint().await?;
                }
                self.env().sleep(Duration::from_millis(50)).await;
            }
        };
        let who = self.world.within(self.env(), PATIENCE, "knowing who took over", clear).await;
        who.unwrap_or(Err(Refusal::Gone))
    }

    /// The new primary knows everybody, and everybody follows it.
    pub(super) async fn regroup(self: &Rc<Self>, old: &Site, to: &Site) -> Result<(), Refusal> {
        let leads = self.primary();
        if leads.name == to.name {
            self.takes_its_place(old, to).await?;
        }
        let m = leads.manager()?;
        let decision = if self.wishes.external { "external" } else { "auto" };
        m.must("replication-set", json!({"group": "g", "decision": decision})).await?;
        self.in_sync(leads, self.sites.len() - 1).await
    }

    pub(super) async fn takes_its_place(self: &Rc<Self>, old: &Site, to: &Site) -> Result<(), Refusal> {
        self.until_merged(to).await;
        let (limit, step) = (Duration::from_secs(10), Duration::from_millis(50));
        // by itself, where nothing crashed
        let until = self.env().now() + limit;
        while self.env().now() < until {
            let (o, t) = (old.info().await?, to.info().await?);
            if o["role"] == "secondary" && t["role"] == "primary" {
                break;
            }
            self.env().sleep(step).await;
        }
        if to.info().await?["role"] == "secondary" {
            self.begin_to_lead(to).await?;
        }
        if old.info().await?["role"] == "primary" {
            self.follow_again(old, false).await?;
        }
        let m = to.manager()?;
        for s in self.followers() {
            // it knows the former primary by where that listens
            let knows = self.peer_of(&to.info().await?, s).is_some();
            if !knows {
                self.acquaint(&m, s).await?;
            }
        }
        Ok(())
    }

    pub(super) fn peer_of(&self, info: &Json, site: &Site) -> Option<Json> {
        let address = format!("{}:7000", site.name);
        let peers = info["peers"].as_array()?;
        peers.iter().find(|p| p["addr"].as_str() == Some(address.as_str())).cloned()
    }

    /// Bytes that were sent to `of` because it had missed them.
    pub(super) async fn resent(&self, by: &Site, of: &Site) -> Result<u64, Refusal> {
        let peer = self.peer_of(&by.info().await?, of);
        Ok(peer.and_then(|p| p["resync-bytes"].as_u64()).unwrap_or(u64::MAX))
    }

    // ---- an unplanned one, and the way back

    pub(super) async fn failover_and_back(self: &Rc<Self>) -> Result<(), Refusal> {
        let (old, new) = (self.primary(), self.follower());
        let alive = self.draw(|r| r.chance(0.5));
        if alive {
            self.cut_off(old).await;
        } else {
            self.guests.take().iter().for_each(Guest::abandon);
            old.stop(self.draw(|r| r.chance(0.5)));
        }
        let Some(newest) = self.promote(new).await? else {
            // it never was a copy: the old one goes on
            self.world.net().set_profile(NetProfile::calm());
            old.stop(false);
            self.bring_up(old, true).await?;
            let found = self.read_all(old).await?;
            self.world.verdict().check("no failover", self.history.go_back_to(&found));
            self.new_history().await?;
            self.settled().await?;
            self.start_guests();
            return Ok(());
        };
        self.lead.set(self.number_of(new));
        // its users go on at once, while it merges
        self.start_guests();
        self.pause(Duration::from_millis(50)).await;
        self.until_merged(new).await;
        self.world.net().set_profile(NetProfile::calm());
        self.world.net().cut(" 7000");
        if alive && self.draw(|r| r.chance(0.7)) {
            self.fenced(old, new).await?;
        }
        // who lost a barrier stays as it is until it is started anew
        for s in self.followers().into_iter().filter(|s| s.name != old.name) {
            s.stop(false);
            self.bring_up(s, false).await?;
        }
        self.begin_to_lead(new).await?;
        self.others_follow(new, old).await?;
        if !alive && self.draw_aside(|r| r.chance(0.5)) {
            self.comes_back(old, new).await?;
        }
        self.follow_again(old, self.draw(|r| r.chance(0.4))).await?;
        if self.draw(|r| r.chance(0.4)) {
            // also while it is sent what it missed
            self.trouble(TROUBLE, PACE).await?;
            self.settled().await?;
        } else {
            self.in_sync(new, self.sites.len() - 1).await?;
            let sent = self.resent(new, old).await?;
            self.world.count("former owners that follow", 1);
            // where the disk has grown nobody but its owner writes
            let most = MOST_RESENT + if old.length() > DISK { 4 << 20 } else { 0 };
            if newest && sent > most {
                self.bad(format!(
                    "L8: {sent} of {DISK} bytes were sent to {}, which was the owner",
                    old.name
                ));
            }
        }
        self.look(old).await;
        Ok(())
    }

    /// The old primary is alive where nobody reaches it, and its users write on.
    pub(super) async fn cut_off(&self, old: &Site) {
        self.world.net().set_profile(self.nobody_is_reached(Duration::MAX));
        self.world.net().cut(" 7000");
        self.guests.borrow().iter().for_each(Guest::allow_errors);
        self.pause(Duration::from_millis(200)).await;
        self.guests.take().iter().for_each(Guest::abandon);
        self.scribble(old, SECOND_LIFE).await;
    }

    /// Writes that must be nowhere else. They need not succeed; whether one did.
    pub(super) async fn scribble(&self, site: &Site, number: u32) -> bool {
        let Ok(disk) = site.disk(&self.world).await else { return false };
        let done = self.scribble_on(&disk, number).await;
        disk.disconnect();
        done
    }

    async fn scribble_on(&self, disk: &NbdDisk, number: u32) -> bool {
        let (at, len) = self.draw(|r| (r.below(self.wishes.sectors - 40), r.between(1, 40)));
        let write = disk.write(at * SECTOR, stamped(number, at, len), false);
        let done = matches!(self.env().timeout(Duration::from_secs(5), write).await, Some(Ok(())));
        if done {
            self.world.count("writes of who was left behind", 1);
        }
        // where nobody else ever writes: only what it says itself of its disk brings this back
        if number == SECOND_LIFE {
            let far = disk.write(FAR, stamped(number, FAR / SECTOR, 8), false);
            self.env().timeout(Duration::from_secs(5), far).await;
        }
        done
    }

    /// Promotes a secondary at a checkpoint, and checks that it is that. `None`: it has none. Whether it is the newest.
    pub(super) async fn promote(self: &Rc<Self>, new: &Site) -> Result<Option<bool>, Refusal> {
        self.calm();
        if new.running.borrow().is_none() || self.draw(|r| r.chance(0.2)) {
            new.stop(false);
            self.bring_up(new, false).await?;
        }
        let at = self.committed(new).await.unwrap_or(0);
        let mut command = json!({"group": "g"});
        let mut kept = new.info().await?["checkpoints"].as_array().cloned().unwrap_or_default();
        kept.retain(|e| e.as_u64().is_some_and(|e| e > self.before.get()));
        if kept.len() > 1 && self.draw(|r| r.chance(0.4)) {
            command["epoch"] = kept[self.draw(|r| r.index(kept.len()))].clone();
        }
        let mut again = false;
        let done = loop {
            match new.manager()?.execute("replication-failover", command.clone()).await {
                Ok(done) => break done,
                Err(Refusal::Error(e)) if at == 0 && e.contains("never been synchronized") => {
                    return Ok(None);
                }
                // another came meanwhile, and the oldest had to go
                Err(Refusal::Error(e)) if command["epoch"].is_u64() && e.contains("is not kept here") => {
                    command = json!({"group": "g"});
                }
                // a disk that failed at the wrong moment; started anew it can
                Err(Refusal::Error(_)) if !again => {
                    again = true;
                    new.stop(false);
                    self.bring_up(new, false).await?;
                }
                Err(e) => return Err(e),
            }
        };
        self.world.count("failovers", 1);
        let epoch = done["epoch"].as_u64().unwrap_or(0);
        if command["epoch"].is_u64() {
            self.world.count("failovers to kept checkpoints", 1);
            if command["epoch"] != epoch {
                self.bad(format!("X8: promoted at {epoch}, not at {}", command["epoch"]));
            }
        } else if epoch < at {
            self.bad(format!("I4: promoted at checkpoint {epoch}, it was at {at}"));
        }
        let found = self.read_all(new).await?;
        if epoch > self.before.get() {
            self.is_checkpoint(&found, epoch, "the promoted disk");
        }
        self.world.verdict().check("before the failover", self.history.go_back_to(&found));
        self.new_history().await?;
        self.sites.iter().for_each(|s| s.seen.set(0));
        Ok(Some(epoch >= at))
    }

    pub(super) async fn until_merged(&self, new: &Site) {
        let merged = async {
            while new.info().await.is_ok_and(|i| i["role"] == "secondary" && i["stage"] != "done") {
                self.env().sleep(Duration::from_millis(10)).await;
            }
        };
        self.world.within(self.env(), PATIENCE, "the merge", merged).await;
    }

    /// The old primary meets the promoted one: nobody can write there any more.
    pub(super) async fn fenced(&self, old: &Site, new: &Site) -> Result<(), Refusal> {
        let fenced = async {
            while old.info().await.is_ok_and(|i| i["state"] != "fenced") {
                self.env().sleep(Duration::from_millis(50)).await;
            }
        };
        self.world.within(self.env(), PATIENCE, "fencing the old primary", fenced).await;
        self.world.count("old primaries fenced", 1);
        let Ok(disk) = old.disk(&self.world).await else { return Ok(()) };
        let write = disk.write(0, stamped(SECOND_LIFE + 1, 0, 1), false).await;
        disk.disconnect();
        if write.is_ok() {
            self.bad(format!("F2: {} takes writes although {} was promoted", old.name, new.name));
        }
        Ok(())
    }

    /// One that was a primary before may know it still, by this name or by where it listens.
    pub(super) async fn acquaint(&self, m: &Manager, peer: &Site) -> Result<(), Refusal> {
        match self.know(m, peer).await {
            Err(Refusal::Error(e)) if e.contains("already") => Ok(()),
            other => other,
        }
    }

    /// A promoted host is the primary of all others from now on.
    pub(super) async fn begin_to_lead(&self, new: &Site) -> Result<(), Refusal> {
        let m = new.manager()?;
        for s in self.sites.iter().filter(|s| s.name != new.name) {
            self.acquaint(&m, s).await?;
        }
        self.lead(&m, None).await
    }

    /// Everybody but the former owner has heard of the promoted one. Until then the former owner may have reached them as soon as the link was
    /// back, and made checkpoints with them, which they show until they have caught up.
    async fn others_follow(&self, new: &Site, old: &Site) -> Result<(), Refusal> {
        let others: Vec<&Site> = self.followers().into_iter().filter(|s| s.name != old.name).collect();
        if others.is_empty() {
            return Ok(());
        }
        let heard = async {
            loop {
                let info = new.info().await?;
                let away = |s: &&Site| {
                    let state = self.peer_of(&info, s).map(|p| p["state"].clone());
                    state.is_none_or(|s| s == "disconnected" || s == "connecting")
                };
                if !others.iter().any(away) {
                    return self.new_history().await;
                }
                self.env().sleep(Duration::from_millis(10)).await;
            }
        };
        let heard = self.world.within(self.env(), PATIENCE, "hearing of the promoted one", heard).await;
        heard.unwrap_or(Err(Refusal::Gone))
    }

    /// The old primary, which was down, is started as primary again, by somebody who does not know that it was succeeded.
    pub(super) async fn comes_back(self: &Rc<Self>, old: &Site, new: &Site) -> Result<(), Refusal> {
        let (away, knows) = self.draw_aside(|r| (r.chance(0.4), r.chance(0.6)));
        if away {
            self.world.net().set_profile(self.nobody_is_reached(Duration::MAX));
            self.world.net().cut(" 7000");
        }
        let m = self.boot(old).await?;
        for peer in self.sites.iter().filter(|p| knows && p.name != old.name) {
            self.know(&m, peer).await?;
        }
        self.serve(&m).await?;
        // somebody uses it from its first moment on
        let user = old.disk(&self.world).await.map_err(|_| Refusal::Gone)?;
        self.lead(&m, Some(old)).await?;
        let served = self.scribble_on(&user, SECOND_LIFE).await;
        user.disconnect();
        if served && knows && !away {
            self.bad(format!("F2: {} serves beside {}, which it could have asked", old.name, new.name));
        }
        self.world.net().set_profile(NetProfile::calm());
        self.world.count("former primaries that come back as primary", 1);
        self.fenced(old, new).await?;
        if self.draw_aside(|r| r.chance(0.3)) {
            // and stays it, where it can ask nobody
            old.stop(self.draw_aside(|r| r.chance(0.5)));
            let m = self.boot(old).await?;
            self.lead(&m, None).await?;
            self.serve(&m).await?;
            self.fenced(old, new).await?;
        }
        Ok(())
    }

    /// Links to the places where hosts of the group listen cannot be made.
    pub(super) fn nobody_is_reached(&self, until: Duration) -> NetProfile {
        let mut away = NetProfile::calm();
        (away.faults_at, away.refuse, away.faults_end) = (" 7000".to_owned(), 1.0, until);
        away
    }

    /// A former owner becomes a secondary: as it is, or after a crash. It is not one by mistake.
    pub(super) async fn follow_again(&self, old: &Site, crash: bool) -> Result<(), Refusal> {
        if crash {
            old.stop(self.draw(|r| r.chance(0.5)));
        }
        if old.running.borrow().is_none() {
            let m = self.boot(old).await?;
            self.serve(&m).await?;
        }
        let m = old.manager()?;
        let start = json!({"group": "g", "role": "secondary", "listen": old.address()});
        match m.execute("replication-start", start.clone()).await {
            Ok(_) => self.bad(format!("{} gave its disk up without being told to", old.name)),
            Err(Refusal::Error(_)) => {}
            Err(e) => return Err(e),
        }
        if self.draw(|r| r.chance(0.5)) {
            let give_up = json!({"group": "g", "victim": "local", "listen": old.address()});
            m.must("replication-resolve", give_up).await?;
        } else {
            let mut demote = start;
            demote["demote"] = json!(true);
            m.must("replication-start", demote).await?;
        }
        old.seen.set(0);
        // what it holds is no checkpoint
        if self.committed(old).await == Some(0)
            && let Ok(disk) = old.disk(&self.world).await
        {
            let read = disk.read(Span::new(0, SECTOR)).await;
            disk.disconnect();
            if read.is_ok() && self.committed(old).await == Some(0) {
                self.bad(format!("I1: {} shows a disk that is no checkpoint", old.name));
            }
        }
        Ok(())
    }

    // ---- two that were promoted

    pub(super) async fn two_are_promoted(self: &Rc<Self>) -> Result<(), Refusal> {
        self.settled().await?;
        let old = self.primary();
        self.guests.take().iter().for_each(Guest::abandon);
        old.stop(self.draw(|r| r.chance(0.5)));
        let others = self.followers();
        let (a, b) =
            if self.draw(|r| r.chance(0.5)) { (others[0], others[1]) } else { (others[1], others[0]) };
        let b_at = self.committed(b).await.unwrap_or(0);
        b.manager()?.must("replication-failover", json!({"group": "g"})).await?;
        self.until_merged(b).await;
        self.scribble(b, SECOND_LIFE + 2).await;
        let Some(_) = self.promote(a).await? else { return Ok(()) };
        self.lead.set(self.number_of(a));
        self.start_guests();
        self.until_merged(a).await;
        let m = a.manager()?;
        self.acquaint(&m, b).await?;
        self.lead(&m, None).await?;
        let refused = async {
            while a.info().await.is_ok_and(|i| i["peers"][0]["state"] != "refused") {
                self.env().sleep(Duration::from_millis(20)).await;
            }
        };
        self.world.within(self.env(), PATIENCE, "refusing another owner", refused).await;
        if a.info().await?["state"] == "fenced" {
            self.bad(format!("L9: {} was stopped by {}, promoted at {b_at} like itself", a.name, b.name));
        }
        self.world.count("split brains", 1);
        // somebody decides
        self.follow_again(b, self.draw(|r| r.chance(0.3))).await?;
        // one that handed the group over to this side once is called by where it listens
        let victim = self.peer_of(&a.info().await?, b).map(|p| p["name"].clone());
        m.must("replication-resolve", json!({"group": "g", "victim": victim})).await?;
        self.follow_again(old, false).await?;
        self.acquaint(&m, old).await?;
        self.in_sync(a, 2).await?;
        self.look(b).await;
        Ok(())
    }
}
