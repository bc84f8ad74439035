//! `block-commit` of images below the active one: what they hold goes down into the base, then they leave the chain. (A commit
//! of the active image, or of one below it that somebody writes to, is a [`mirror`](crate::mirror) to an image below.)
//!
//! Phases: the base is opened for writing, the filter goes between the overlay and the top image, and the images that are
//! committed promise nothing to anybody any more; the base grows, if it must; what is allocated above it is copied; the base is
//! flushed; the overlay's header names the base, durably; one change of the graph lets the overlay use the base.
//!
//! What must stay true:
//! * What the overlay shows never changes: the base is written only where an image above hides it.
//! * The header names the base only when the base durably holds everything; the graph follows the header. Where the header
//!   cannot be written both stay as they were, and the job fails.
//! * With verification all that the top image shows is read from the base alone and compared, before any header is touched.
//! * The base is read-only again in the end, whatever happened, if it was before.

use crate::JobError;
use crate::chain::{self, BackingName, ChainPolicy, Headers, Made, Turned};
use crate::commit_args::{Checked, CommitArgs};
use crate::event::{Kind, Progress};
use crate::job::{Body, Job};
use crate::leavers::{Leavers, Leaving};
use crate::mirror;
use crate::outcome::Figures;
use crate::registry::Registry;
use block::{Io, Result, Span};
use copy::{Engine, Proof, Report, Work, first};
use drivers::filters::commit_top::CommitTop;
use env::bugs::planted;
use graph::{Blocker, Demand, Edge, Graph, NodeCell, NodeOptions, Parent, Perms, Plan, Role, Step, walk};
use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

const BUSY: &str = "block device is in use by block job: commit";

/// What the base is asked for while it is written.
const WRITING: Demand = Demand {
    needs: Perms::CONSISTENT_READ.with(Perms::WRITE),
    shares: Perms::CONSISTENT_READ.with(Perms::WRITE_UNCHANGED),
};
/// A running commit of images below the active one.
pub struct Commit {
    graph: Rc<Graph>,
    args: CommitArgs,
    device: Rc<NodeCell>,
    top: Rc<NodeCell>,
    base: Rc<NodeCell>,
    filter: Rc<NodeCell>,
    work: Rc<Work>,
    policy: Rc<ChainPolicy>,
    turned: Turned,
    /// The job's own user of the top, for as long as it copies.
    source: RefCell<Option<Rc<Edge>>>,
    /// The job's own user of the base. It stays while the chain changes: without a user that writes, the base's file would be
    /// closed to writing under a base that is still open for it.
    target: RefCell<Option<Rc<Edge>>>,
    hold: RefCell<Option<Hold>>,
    /// Whose files are to go when they have left.
    leavers: RefCell<Option<Rc<Leavers>>>,
    made: Made,
}

/// What the job has of the graph, until it is dismissed.
struct Hold {
    _edges: Vec<Rc<Edge>>,
    _blockers: Vec<Blocker>,
}

/// Checks the arguments, puts the filter in, and starts the job: one that becomes ready if somebody may write to `top`. On
/// an error nothing is left behind (but the job may have been seen as created and gone).
pub async fn start(
    registry: &Registry,
    graph: &Rc<Graph>,
    args: CommitArgs,
) -> std::result::Result<Rc<Job>, JobError> {
    let checked = args.check(graph).await?;
    if let Some(source) = checked.source {
        let mirror = args.as_mirror(&source, &checked.base);
        let mut gone = vec![walk::skip_filters(&source)];
        let checked = mirror.check_commit(graph, source, checked.base, checked.between).await?;
        let job = registry.create(&args.job_id, Kind::Commit, mirror.job_options()?, None)?;
        gone.extend(checked.below.iter().flat_map(|b| b.between.clone()));
        let leavers = args.delete_images.then(|| Rc::new(Leavers::note(&job, &gone)));
        return mirror::start_checked(registry, graph, mirror, checked, job, leavers).await;
    }
    let job = registry.create(&args.job_id, Kind::Commit, args.job_options(), None)?;
    let built = match args.check_speed() {
        Ok(()) => build(graph, args, checked, &job).await,
        Err(e) => Err(e),
    };
    registry.launch(job, built)
}

async fn build(graph: &Rc<Graph>, args: CommitArgs, checked: Checked, of: &Rc<Job>) -> Result<Rc<Commit>> {
    let Checked { device, top, base, between, .. } = checked;
    let blockers = chain::block_all([&device, &base].into_iter().chain(&between), BUSY);
    let closed = chain::closed_to_writing(&base)?;
    let job = || Parent::Job { kind: Kind::Commit.name(), id: args.job_id.clone() };
    let own = || Parent::Backend(args.job_id.clone());

    let below = Parent::Node(RefCell::default());
    let below = graph.attach_exact(&top, "backing", Role::Filtered, below, Demand::NOTHING).await?;
    let options =
        NodeOptions { name: args.filter_node_name.clone(), read_only: true, ..NodeOptions::default() };
    let filter = graph.add(options, CommitTop::new(below)).await?;
    let turned = Turned::default();
    let made = async {
        let mut edges =
            vec![graph.attach_exact(&device, "main node", Role::Root, job(), Demand::NOTHING).await?];
        let mut plan = chain::turning(Plan::new(), &closed, true);
        for node in &between {
            let edge =
                graph.attach_exact(node, "intermediate node", Role::Root, job(), Demand::NOTHING).await?;
            plan = plan.then(Step::Ask { edge: edge.clone(), demand: chain::COMMITTED });
            edges.push(edge);
        }
        edges.push(graph.attach_exact(&base, "base", Role::Root, job(), Demand::NOTHING).await?);
        let source = graph.attach_exact(&top, "root", Role::Root, own(), Demand::NOTHING).await?;
        let target = graph.attach_exact(&base, "root", Role::Root, own(), Demand::NOTHING).await?;
        let mut stay = edges.clone();
        stay.push(source.clone());
        plan = plan.then(Step::Ask { edge: target.clone(), demand: WRITING }).then(Step::MoveParents {
            from: top.clone(),
            to: filter.clone(),
            except: stay,
        });
        let work = Work::new(graph.env().clone(), top.node().len(), chain::granularity(&between))?;
        if let Some(rules) = args.verify.rules(graph.env()) {
            work.set_proof(Rc::new(Proof::new(work.len(), rules)?));
        }
        turned.note(closed);
        graph.apply(plan).await?;
        Ok((edges, source, target, work))
    };
    let (edges, source, target, work) = match made.await {
        Ok(made) => made,
        Err(e) => {
            // never used by anybody, so nobody else takes it away
            let _ = graph.remove(&filter).await;
            turned.back(graph).await;
            return Err(e);
        }
    };
    let leavers = args.delete_images.then(|| Rc::new(Leavers::note(of, &between)));
    Ok(Rc::new(Commit {
        leavers: RefCell::new(leavers),
        made: Made::default(),
        graph: graph.clone(),
        policy: ChainPolicy::new(Some(base.clone()), false),
        args,
        device,
        top,
        base,
        filter,
        work,
        turned,
        source: RefCell::new(Some(source)),
        target: RefCell::new(Some(target)),
        hold: RefCell::new(Some(Hold { _edges: edges, _blockers: blockers })),
    }))
}

impl Commit {
    async fn work_on(&self, job: &Rc<Job>) -> Result<()> {
        let (source, target) = (self.source.borrow().clone(), self.target.borrow().clone());
        let (Some(source), Some(target)) = (source, target) else { return Ok(()) };
        let tail = chain::hidden_tail(&self.graph, &self.top, &self.filter, &target);
        self.work.depend_on(graph::links_below(&self.base, false))?;
        chain::grow(&self.graph, &self.base, &target, self.top.node().len()).await?;
        first::mark_above(&self.work, &source, Some(&self.base), false).await?;
        let control: Rc<Job> = job.clone();
        let mut engine = Engine::new(
            self.work.clone(),
            source,
            target.clone(),
            self.policy.clone(),
            control,
            self.args.buffer(),
        );
        engine.set_chunk(chain::CHUNK);
        engine.watch(self.device.clone());
        self.copy(&mut engine, tail).await?;
        if let Some(proof) = self.work.proof() {
            // what the top image shows is what the base shows now: nobody writes either
            self.policy.proving.set(true);
            engine.run().await?;
            proof.verdict()?;
            if proof.report().repaired > 0 {
                self.copy(&mut engine, tail).await?;
            }
        }
        Ok(())
    }

    async fn copy(&self, engine: &mut Engine, tail: Span) -> Result<()> {
        loop {
            engine.run().await?;
            self.work.pass_all();
            if !tail.is_empty() {
                engine.zero_target(tail).await?;
            }
            // a base behind a link that was lost meanwhile gets once more what it had not flushed
            if planted("commit: the header goes before the base is flushed") || engine.flush_target().await? {
                return Ok(());
            }
        }
    }

    async fn leave_chain(&self) -> Result<()> {
        Leavers::delete_too_early(&self.leavers, &self.graph).await;
        // nobody copies any more; an image that the job still read from would be recorded as in use, and a later life would keep it
        self.source.take();
        let name =
            BackingName::of(&self.base, self.args.backing_file.as_deref(), self.args.backing_mask_protocol)
                .await?;
        let mut headers = Headers::new(&self.graph);
        for overlay in chain::overlays(&self.graph, &self.filter) {
            headers.write(&overlay, &name).await?;
        }
        let plan = Plan::new().then(Step::MoveParents {
            from: self.filter.clone(),
            to: self.base.clone(),
            except: Vec::new(),
        });
        let moved = self.graph.apply(plan.then(self.made.step())).await;
        if moved.is_err() {
            headers.put_back().await;
        }
        moved
    }
}

impl Body for Commit {
    fn run<'a>(&'a self, job: &'a Rc<Job>) -> Io<'a> {
        Box::pin(self.work_on(job))
    }

    fn prepare(&self) -> Io<'_> {
        Box::pin(self.leave_chain())
    }

    fn finish(&self, success: bool) -> Pin<Box<dyn Future<Output = ()> + '_>> {
        Box::pin(async move {
            if !success {
                self.hold.take();
                let back =
                    Step::MoveParents { from: self.filter.clone(), to: self.top.clone(), except: Vec::new() };
                // Going back asks for nothing that was not granted before, so it is not refused.
                let _ = self.graph.apply(Plan::new().then(back)).await;
            }
            self.source.take();
            self.target.take();
            if let Some(proof) = self.work.proof().filter(|_| success) {
                // a helper thread that ends early costs the digest; that the two are equal is known without it
                let _ = proof.seal(self.graph.env()).await;
            }
            self.turned.back(&self.graph).await;
            // recorded until it is done
            let leavers = self.leavers.borrow().clone().filter(|_| success);
            if leavers.is_some() {
                // held no longer than now, so that they can go
                self.hold.take();
            }
            self.graph.settle().await;
            if let Some(leavers) = leavers {
                leavers.delete(&self.graph).await;
            }
            self.leavers.take();
        })
    }

    fn has_changed(&self) -> bool {
        self.made.is_so()
    }

    fn leaving(&self) -> Vec<Leaving> {
        if self.made.is_so() { Leavers::leaving(&self.leavers) } else { Vec::new() }
    }

    fn keep(&self) -> Option<Box<dyn Any>> {
        self.hold.take().map(|h| Box::new(h) as Box<dyn Any>)
    }

    fn progress(&self) -> Progress {
        let (passed, left) = self.work.proof().map_or((0, 0), |p| (p.passed(), p.fresh_bytes()));
        Progress { total: self.work.len() + passed + left, current: self.work.passed() + passed }
    }

    fn verified(&self) -> Option<Report> {
        self.work.proof().map(|p| p.report())
    }

    fn figures(&self) -> Figures {
        Figures {
            nodes: vec![("source", self.top.name().to_owned()), ("base", self.base.name().to_owned())],
            ..Figures::of(&self.work)
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
