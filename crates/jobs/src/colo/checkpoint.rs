//! The checkpoint of all disks of a secondary together.
//!
//! Steps: (1) refused if a forwarded write was refused anywhere: the disks are not what the primary's are; (2) users of the
//! secondary wait; (3) own writes are dropped, disk by disk; (4) forwarded writes wait; (5) what the hidden disks hold loses its
//! meaning, all at one instant, and they are emptied.
//!
//! What must stay true: a failure before (5) leaves all disks at the last checkpoint, the broken one readable past its active
//! disk; after it all are at the new one, the broken one readable past its hidden disk, and nothing more is received there.

use super::{Colo, Outcome, Running, Site, about};
use crate::JobError;
use block::Span;
use drivers::filters::replication::{Replication, ReplicationEvent, Side, Stage};
use graph::gate::{Gate, Gated};
use std::rc::Rc;

/// A node's gate, held by whoever stops its users.
struct Front(Site);

impl Gated for Front {
    fn gate(&self) -> &Gate {
        match self.0.node() {
            Some(node) => node.gate(),
            // sites are made of replication nodes alone
            None => unreachable!("not a replication node"),
        }
    }
}

impl Colo {
    /// Takes a checkpoint of all disks that are secondaries, or of none. A primary has nothing to do, but fails if something
    /// could not be forwarded since the last.
    pub async fn checkpoint(self: &Rc<Self>) -> Outcome {
        let _turn = self.turn.acquire(1).await;
        self.take().await
    }

    async fn take(&self) -> Outcome {
        let mut taking: Vec<(Site, Rc<Running>)> = Vec::new();
        for site in self.sites() {
            let Some(node) = site.node() else { continue };
            match (node.options().side, node.stage()) {
                (Side::Secondary, Stage::None) => {
                    return Err(JobError::refused("Backup job was cancelled unexpectedly"));
                }
                (_, Stage::Running) => {}
                _ => continue,
            }
            let refusing = self.running(&site).and_then(|r| r.point.refusing());
            if let Some(why) = node.error().or(refusing) {
                let reason = format!("the secondary's disk is not what the primary's is: {why}");
                node.tell(ReplicationEvent::Veto { reason: reason.clone() });
                return Err(JobError::refused(format!(
                    "Node '{}': checkpoint refused: {reason}",
                    site.cell.name()
                )));
            }
            taking.extend(self.running(&site).map(|r| (site.clone(), r)));
        }
        self.take_all(&taking).await
    }

    async fn take_all(&self, taking: &[(Site, Rc<Running>)]) -> Outcome {
        let mut fronts = Vec::new();
        for (site, _) in taking {
            fronts.push(graph::gate::Closed::close(Rc::new(Front(site.clone()))).await);
        }
        for (site, running) in taking {
            let Some(node) = site.node() else { continue };
            if let Err(e) = running.active.node().make_empty().await {
                node.bypass(running.to_hidden.borrow().clone());
                return Err(self.broken(
                    node,
                    site,
                    "the active disk cannot be emptied; the last checkpoint stays",
                    &e,
                ));
            }
        }
        let mut stills = Vec::new();
        for (_, running) in taking {
            stills.push(running.point.still().await);
        }
        // A write that was refused while the steps before ran.
        if let Some((site, why)) = taking.iter().find_map(|(s, r)| Some((s, r.point.refusing()?))) {
            return Err(about(&site.cell, "checkpoint refused", &why));
        }
        let mut outcome = Ok(());
        for (site, running) in taking {
            let Some(node) = site.node() else { continue };
            // Reads go past the hidden disk from here on: it is neither full nor empty.
            node.bypass(running.to_secondary.borrow().clone());
        }
        stills.iter().for_each(copy::Still::begin_anew);
        for (site, running) in taking {
            let Some(node) = site.node() else { continue };
            match running.hidden.node().make_empty().await {
                Ok(()) => node.bypass(None),
                Err(e) => {
                    running.point.refuse(e.clone());
                    let what = "the checkpoint was taken, but the hidden disk cannot be emptied; nothing more is received";
                    outcome = outcome.and(Err(self.broken(node, site, what, &e)));
                }
            }
        }
        drop((stills, fronts));
        outcome
    }

    fn broken(&self, node: &Replication, site: &Site, what: &str, why: &block::BlockError) -> JobError {
        node.fail("checkpoint", Span::new(0, 0), why.clone().context(what));
        about(&site.cell, what, why)
    }
}

impl Colo {
    /// Ends replication of one secondary without taking over: what its own user wrote is dropped, what the primary wrote stays.
    pub(super) async fn stop_plainly(&self, site: &Site) -> Outcome {
        let (Some(node), Some(running)) = (site.node(), self.running(site)) else { return Ok(()) };
        if let Some(why) = node.error().or(running.point.refusing()) {
            return Err(about(
                &site.cell,
                "the secondary's disk is between two checkpoints; fail over instead",
                &why,
            ));
        }
        self.take_all(&[(site.clone(), running.clone())]).await?;
        self.running.borrow_mut().remove(&site.cell.id());
        running.point.end();
        running.main.take();
        self.remove_filter(&running.secondary, &running.hidden, &running.filter, &running.cbw).await;
        running.let_go(node);
        self.stand_on(node, &running).await?;
        node.set_stage(Stage::Done, "stopped");
        Ok(())
    }
}
