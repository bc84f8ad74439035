//! The failover: the secondary serves at once, and its overlays go down into the disk behind its back.
//!
//! What must stay true: before anything is merged, nobody who came through an export from before reaches the disk; what is
//! read never changes by the merge; a merge that fails can be tried again, and until then the overlays go on serving.

use super::start::disks;
use super::{Colo, FENCED, Outcome, Running, Site};
use crate::job::Job;
use crate::mirror;
use crate::{CommitArgs, CopyMode, Kind, State};
use block::{BlockError, ErrorKind, Result, Span};
use drivers::filters::replication::{Replication, ReplicationEvent, Stage};
use graph::{NodeCell, Plan, Step};
use std::rc::Rc;

/// Id of a merge; they have a registry of their own.
const MERGE: &str = "merge";

impl Colo {
    pub(super) async fn fail_over(self: &Rc<Self>, site: &Site) -> Outcome {
        let Some(node) = site.node() else { return Ok(()) };
        // Looked up where nothing runs here: after a crash the overlays are there.
        disks(node)?;
        let phase = |phase| node.tell(ReplicationEvent::Failover { phase, error: None });
        phase("started");
        if let Some(running) = self.running(site) {
            running.cbw.fence(BlockError::new(ErrorKind::Permission, FENCED));
            running.point.end();
            // whoever passed the fence before has ended
            drop(running.point.still().await);
            running.cbw.pin(false);
            running.hidden.exclude_copies(None);
            let plan = Plan::new().then(Step::Cover { node: running.secondary.clone(), filter: None });
            self.graph.apply(plan).await?;
            running.main.take();
            running.let_go(node);
        }
        node.clear_error();
        node.set_stage(Stage::Failover, "failover");
        phase("serving");
        let (colo, site) = (self.clone(), site.clone());
        self.env.spawn("failover", async move { colo.merge_down(&site).await });
        Ok(())
    }

    async fn merge_down(&self, site: &Site) {
        let Some(node) = site.node() else { return };
        match self.merge(site, node).await {
            Ok(()) => {
                self.running.borrow_mut().remove(&site.cell.id());
                self.graph.settle().await;
                node.tell(ReplicationEvent::Failover { phase: "completed", error: None });
                node.set_stage(Stage::Done, "failover completed");
            }
            Err(e) => {
                node.fail("failover", Span::new(0, 0), e.clone());
                node.tell(ReplicationEvent::Failover { phase: "failed", error: Some(e) });
                node.set_stage(Stage::FailoverFailed, "the overlays could not be merged");
            }
        }
    }

    /// Brings what is in the overlays down into the secondary disk, and lets the node stand on that.
    async fn merge(&self, site: &Site, node: &Replication) -> Result<()> {
        let running = self.running(site);
        let found = disks(node).map_err(|e| BlockError::invalid(e.to_string()))?;
        let (active, hidden, secondary) = (found.active, found.hidden, found.secondary);
        // An overlay that could not be emptied for a checkpoint means nothing.
        let top = match node.bypassed().map(|edge| edge.child()) {
            None => active,
            Some(from) if from.id() == hidden.id() => hidden.clone(),
            Some(_) => {
                if let Some(running) = running {
                    self.stand_on(node, &running).await?;
                }
                return Ok(());
            }
        };
        let between = if top.id() == hidden.id() { Vec::new() } else { vec![hidden] };
        self.commit(&top, &secondary, between).await?;
        if node.file().child().id() != secondary.id() {
            let plan = Plan::new().then(Step::Point { edge: node.file().clone(), to: secondary });
            self.graph.apply(plan).await?;
        }
        node.bypass(None);
        Ok(())
    }

    async fn commit(
        &self,
        top: &Rc<NodeCell>,
        base: &Rc<NodeCell>,
        between: Vec<Rc<NodeCell>>,
    ) -> Result<()> {
        let failed = |e: crate::JobError| BlockError::new(ErrorKind::Io, e.to_string());
        let args = CommitArgs { copy_mode: CopyMode::WriteBlocking, ..CommitArgs::new(MERGE, top.name()) };
        let mirror = args.as_mirror(top, base);
        let checked = mirror.check_commit(&self.graph, top.clone(), base.clone(), between).await?;
        let id = format!("{MERGE}-{}", top.id());
        let job = self.merges.create(&id, Kind::Commit, mirror.job_options()?, None).map_err(failed)?;
        let job: Rc<Job> = mirror::start_checked(&self.merges, &self.graph, mirror, checked, job, None)
            .await
            .map_err(failed)?;
        job.reached(State::Ready).await;
        if job.state() == State::Ready {
            self.merges.complete(&job).map_err(failed)?;
        }
        job.concluded().await;
        job.error().map_or(Ok(()), Err)
    }

    /// The node stands on the secondary disk itself; the overlays are nobody's any more.
    pub(super) async fn stand_on(&self, node: &Replication, running: &Running) -> Result<()> {
        let to = running.secondary.clone();
        let plan = Plan::new().then(Step::Point { edge: node.file().clone(), to });
        self.graph.apply(plan).await?;
        node.bypass(None);
        Ok(())
    }
}
