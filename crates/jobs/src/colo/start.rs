//! The start: what has to be so, and how the copy-before-write filter comes in.

use super::{Colo, Outcome, Running, Site};
use crate::JobError;
use crate::chain;
use block::{Kind, Result, Span};
use copy::{KeepRules, OnSaveError, PointInTime, Work, top_layer};
use drivers::filters::copy_before_write::CopyBeforeWrite;
use drivers::filters::replication::{Replication, Side, Stage};
use graph::exclusion::Exclusion;
use graph::{Demand, Edge, NodeCell, NodeOptions, Parent, Plan, Role, Step};
use std::cell::RefCell;
use std::rc::Rc;

/// Who holds nodes for replication, in errors about nodes in use.
const JOB: &str = "replication";

/// Units of copying: from what a file system writes at least to what memory holds for each copy in flight.
const UNITS: (u64, u64) = (4 << 10, 64 << 20);

/// The three disks of a secondary, top first.
pub(super) struct Disks {
    pub(super) active: Rc<NodeCell>,
    pub(super) hidden: Rc<NodeCell>,
    pub(super) secondary: Rc<NodeCell>,
    below_active: Rc<Edge>,
}

/// The disks that a secondary's node stands on.
pub(super) fn disks(node: &Replication) -> Outcome<Disks> {
    let missing = |who: &str| JobError::refused(format!("{who} disk doesn't have backing file"));
    let active = node.file().child();
    let below_active = active.node().backing().ok_or_else(|| missing("Active"))?;
    let hidden = below_active.child();
    let secondary = hidden.node().backing().ok_or_else(|| missing("Hidden"))?.child();
    Ok(Disks { active, hidden, secondary, below_active })
}

/// Whether `node` is `top` or somewhere below it.
fn is_below(top: &Rc<NodeCell>, node: &Rc<NodeCell>) -> bool {
    top.id() == node.id() || top.node().edges().iter().any(|e| is_below(&e.child(), node))
}

/// Whether an image holds nothing of its own.
async fn is_empty(of: &Rc<Edge>) -> Result<bool> {
    let mut left = Span::new(0, of.len());
    while !left.is_empty() {
        let found = top_layer(of, left).await?;
        if found.iter().any(|e| e.kind != Kind::Unallocated) {
            return Ok(false);
        }
        let end = found.last().map_or(left.end(), |e| e.span.end());
        left = Span::between(end.max(left.start + 1).min(left.end()), left.end());
    }
    Ok(true)
}

impl Colo {
    /// Starts one node; `false` where there is nothing to do any more.
    pub(super) async fn start_one(&self, site: &Site, side: Side) -> Outcome<bool> {
        let Some(node) = site.node() else { return Ok(false) };
        match node.stage() {
            Stage::None => {}
            Stage::Failover | Stage::Done => return Ok(false),
            Stage::Running | Stage::FailoverFailed => {
                return Err(JobError::refused("Block replication is running or done"));
            }
        }
        let number = |side| i32::from(side == Side::Secondary);
        if node.options().side != side {
            return Err(JobError::refused(format!(
                "The parameter mode's value is invalid, needs {}, but got {}",
                number(node.options().side),
                number(side)
            )));
        }
        if side == Side::Secondary {
            let disks = self.check(site, node).await?;
            let running = self.insert(site, node, disks).await?;
            self.running.borrow_mut().insert(site.cell.id(), Rc::new(running));
        }
        node.clear_error();
        node.set_stage(Stage::Running, "started");
        Ok(true)
    }

    async fn check(&self, site: &Site, node: &Replication) -> Outcome<Disks> {
        let refused = |why: &str| Err(JobError::refused(why.to_owned()));
        let disks = disks(node)?;
        let used = |e: &Rc<Edge>| matches!(e.parent(), Parent::Backend(_));
        if !disks.secondary.parents().iter().any(used) {
            return refused("The secondary disk doesn't have block backend");
        }
        let len = disks.secondary.node().len();
        if disks.active.node().len() != len || disks.hidden.node().len() != len {
            return refused("Active disk, hidden disk, secondary disk's length are not the same");
        }
        if disks.active.node().driver() != "qcow2" || disks.hidden.node().driver() != "qcow2" {
            return refused("Active disk or hidden disk doesn't support make_empty");
        }
        let top = node.options().top.as_deref().and_then(|id| self.graph.find(id));
        if !top.is_some_and(|top| top.id() != site.cell.id() && is_below(&top, &site.cell)) {
            return refused("No top_bs or it is invalid");
        }
        if !disks.active.is_writable() {
            return refused("The active disk is read-only");
        }
        if !is_empty(&disks.below_active).await? {
            return Err(JobError::refused(format!(
                "The hidden disk '{}' holds what an interrupted replication kept: the secondary disk is between two \
                 checkpoints. Bring it up to date and use a new hidden disk",
                disks.hidden.name()
            )));
        }
        Ok(disks)
    }

    /// Empties the overlays, and puts the filter in front of the secondary disk.
    async fn insert(&self, site: &Site, node: &Replication, disks: Disks) -> Outcome<Running> {
        let Disks { active, hidden, secondary, .. } = disks;
        let (graph, name) = (&self.graph, site.cell.name());
        let closed = chain::closed_to_writing(&hidden)?;
        graph.apply(chain::turning(Plan::new(), &closed, true)).await?;
        active.node().make_empty().await?;
        hidden.node().make_empty().await?;

        let own = || Parent::Node(RefCell::new(Some(name.to_owned())));
        let to_hidden =
            graph.attach_exact(&hidden, "hidden disk", Role::Other, own(), Demand::NOTHING).await?;
        let to_secondary =
            graph.attach_exact(&secondary, "secondary disk", Role::Other, own(), Demand::NOTHING).await?;
        let opening = || Parent::Node(RefCell::default());
        let file = graph.attach_exact(&secondary, "file", Role::Filtered, opening(), Demand::NOTHING).await?;
        let target = graph.attach_exact(&hidden, "target", Role::Other, opening(), Demand::NOTHING).await?;
        let cbw = CopyBeforeWrite::new(file.clone(), target.clone());
        let options = NodeOptions { discard: true, ..NodeOptions::default() };
        let filter = graph.add(options, cbw.clone()).await?;
        let made: Result<_> = async {
            let parent = Parent::Job { kind: crate::event::Kind::Backup.name(), id: JOB.to_owned() };
            let main = graph.attach_exact(&filter, "main node", Role::Root, parent, Demand::NOTHING).await?;
            let unit = hidden.node().limits().cluster_size.clamp(UNITS.0, UNITS.1);
            let work = Work::new(graph.env().clone(), secondary.node().len(), unit)?;
            let rules = KeepRules {
                on_error: OnSaveError::RefuseAll,
                durable: node.options().durable,
                ..KeepRules::default()
            };
            let point = PointInTime::new(work, file, target, rules);
            let readers = Exclusion::new(unit);
            point.exclude(Some(readers.clone()));
            hidden.exclude_copies(Some(readers));
            cbw.set_keeper(Some(point.clone()));
            let begun = point.clone();
            let at: Rc<dyn Fn()> = Rc::new(move || begun.begin_all());
            let stay = vec![to_secondary.clone()];
            let plan = Plan::new()
                .then(Step::MoveParents { from: secondary.clone(), to: filter.clone(), except: stay })
                .then(Step::Cover { node: secondary.clone(), filter: Some(filter.clone()) })
                .then(Step::At { what: at, undo: None });
            graph.apply(plan).await?;
            Ok((main, point))
        }
        .await;
        match made {
            Ok((main, point)) => {
                node.set_below(vec![to_hidden.clone(), to_secondary.clone()]);
                cbw.pin(true);
                let busy = format!("node is used as backing hd of '{}'", hidden.name());
                let blockers = vec![secondary.block(&busy), filter.block(&busy)];
                if let Err(e) = graph.ask(&main, Demand::NOTHING).await {
                    node.set_below(Vec::new());
                    self.remove_filter(&secondary, &hidden, &filter, &cbw).await;
                    return Err(e.into());
                }
                Ok(Running {
                    active,
                    hidden,
                    secondary,
                    filter,
                    cbw,
                    point,
                    main: RefCell::new(Some(main)),
                    to_hidden: RefCell::new(Some(to_hidden)),
                    to_secondary: RefCell::new(Some(to_secondary)),
                    _blockers: blockers,
                })
            }
            Err(e) => {
                hidden.exclude_copies(None);
                drop((to_hidden, to_secondary));
                graph.settle().await;
                // where nobody ever used it, nobody else takes it away
                let _ = graph.remove(&filter).await;
                Err(e.into())
            }
        }
    }

    /// Everybody is back on the secondary disk itself, changes pass.
    pub(super) async fn remove_filter(
        &self,
        secondary: &Rc<NodeCell>,
        hidden: &Rc<NodeCell>,
        filter: &Rc<NodeCell>,
        cbw: &Rc<CopyBeforeWrite>,
    ) {
        cbw.pin(false);
        let plan = Plan::new()
            .then(Step::MoveParents { from: filter.clone(), to: secondary.clone(), except: Vec::new() })
            .then(Step::Cover { node: secondary.clone(), filter: None });
        // Going back asks for nothing that was not granted before, so it is not refused.
        let _ = self.graph.apply(plan).await;
        cbw.set_keeper(None);
        hidden.exclude_copies(None);
        self.graph.settle().await;
    }

    /// A start of several failed at another: this one was never started.
    pub(super) async fn take_back(&self, site: &Site) {
        let Some(node) = site.node() else { return };
        node.set_stage(Stage::None, "another disk could not be started");
        let Some(running) = self.running.borrow_mut().remove(&site.cell.id()) else { return };
        running.let_go(node);
        running.point.end();
        running.main.take();
        let Running { secondary, hidden, filter, cbw, .. } = &*running;
        self.remove_filter(secondary, hidden, filter, cbw).await;
    }
}
