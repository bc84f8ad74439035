//! Looking at secondaries without touching them: a failover tried on a clone, and a comparison, after which what rotted is mended.

use super::hosts::Site;
use super::{PATIENCE, Run, SECOND_LIFE};
use crate::boot::nbd;
use crate::guest::Disk;
use crate::{NbdDisk, Refusal, Value, stamped, values_of};
use block::SECTOR;
use nbd::Mode;
use serde_json::json;
use std::rc::Rc;
use std::time::Duration;

impl Run {
    // ---- looking without touching

    /// A failover is tried on a clone while replication goes on.
    pub(super) async fn trial(self: &Rc<Self>) -> Result<(), Refusal> {
        let site = self.follower();
        let m = site.manager()?;
        let mut test = json!({"group": "g", "node-name": "t"});
        let kept = site.info().await?["checkpoints"].as_array().cloned().unwrap_or_default();
        if !kept.is_empty() && self.draw(|r| r.chance(0.5)) {
            test["epoch"] = kept[self.draw(|r| r.index(kept.len()))].clone();
        }
        let epoch = match m.execute("replication-test-failover", test).await {
            Ok(made) => made["epoch"].as_u64().unwrap_or(0),
            Err(Refusal::Error(_)) => return Ok(()),
            Err(e) => return Err(e),
        };
        let export = json!({"type": "nbd", "id": "t", "node-name": "t", "name": "t", "writable": true});
        m.must("block-export-add", export).await?;
        let disk = NbdDisk::connect(&site.outside, &nbd(), "t", Mode::Structured, self.world.verdict()).await;
        let Ok(disk) = disk else { return Ok(()) };
        let all = self.wishes.area();
        let mut expected = Vec::new();
        for round in 0..3 {
            let Ok(data) = disk.read(all).await else {
                // it held too much of the store
                self.world.count("clones that were given up", 1);
                break;
            };
            let values = values_of(&data.contiguous(), 0);
            if round == 0 {
                if epoch > self.before.get() {
                    self.is_checkpoint(&values, epoch, "a clone");
                }
                self.world.count("clones checked", 1);
                expected = values;
            } else if values != expected {
                self.bad(format!("the clone of checkpoint {epoch} on {} changed", site.name));
            }
            let (at, len) = self.draw(|r| (r.below(self.wishes.sectors - 40), r.between(1, 40)));
            let number = SECOND_LIFE + 3 + round;
            if disk.write(at * SECTOR, stamped(number, at, len), false).await.is_ok() {
                expected[at as usize..(at + len) as usize].fill(Value::Write(number));
            } else {
                break;
            }
            self.checkpoint().await?;
            self.look(site).await;
        }
        disk.disconnect();
        m.must("block-export-del", json!({"id": "t", "mode": "hard"})).await?;
        let ended = async {
            while m.execute("blockdev-del", json!({"node-name": "t"})).await.is_err() {
                self.env().sleep(Duration::from_millis(20)).await;
            }
        };
        self.world.within(self.env(), PATIENCE, "the end of a clone", ended).await;
        if let Some(left) = site.host.list().iter().find(|f| f.contains(".test-")) {
            self.bad(format!("{left} is left on {}", site.name));
        }
        Ok(())
    }

    /// The sides are compared; something may have rotted.
    pub(super) async fn compared(self: &Rc<Self>) -> Result<(), Refusal> {
        self.settled().await?;
        let site = self.follower();
        // where checkpoints are kept, what is read may be in the store
        let mut rots = self.wishes.retain == 0 && self.draw(|r| r.chance(0.5));
        if rots {
            self.stop_guests().await;
            self.all_alike().await?;
            let at = self.draw(|r| r.below(self.wishes.area().len));
            site.stop(false);
            site.host.rot("/disk", at, 3);
            self.bring_up(site, false).await?;
            self.in_sync(self.primary(), self.sites.len() - 1).await?;
            // what the store still holds heals it when it is applied again
            self.settle(site).await;
            rots = site.raw() != self.primary().raw();
            self.world.count("disks that rotted", u64::from(rots));
        }
        let verdict = self.verdict_on(site, rots).await?;
        match (rots, verdict.as_str()) {
            (false, "identical") | (true, "repaired") => self.world.count("verifications", 1),
            // a secondary that failed in the middle
            (_, "failed") => {}
            _ => self.bad(format!("a verification of {} says {verdict}; it rotted: {rots}", site.name)),
        }
        if self.guests.borrow().is_empty() {
            // what was found is sent again
            self.in_sync(self.primary(), self.sites.len() - 1).await?;
            self.all_alike().await?;
            self.start_guests();
        }
        Ok(())
    }

    pub(super) async fn verdict_on(&self, site: &Site, repair: bool) -> Result<String, Refusal> {
        let m = self.primary().manager()?;
        let name = self.peer_of(&self.primary().info().await?, site).map(|p| p["name"].clone());
        let mut verify = json!({"group": "g", "peer": name});
        if repair {
            verify["repair"] = json!("resync");
        }
        m.must("replication-verify", verify).await?;
        let ended = async {
            loop {
                let verdict = self.primary().info().await?["last-verify"]["verdict"].clone();
                if verdict != "running" {
                    return Ok(verdict.as_str().unwrap_or_default().to_owned());
                }
                self.env().sleep(Duration::from_millis(10)).await;
            }
        };
        let told = self.world.within(self.env(), PATIENCE, "a verification", ended).await;
        told.unwrap_or(Err(Refusal::Gone))
    }
}
