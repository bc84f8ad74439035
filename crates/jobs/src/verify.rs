//! `block-verify`: whether two disks are equal, and how to find out while clients write to one of them.
//!
//! Phases: *comparing* (the filter is in; all that was chosen is compared at least once, what clients change again), *finishing*
//! (clients are held while the rest is compared, a moment), and the end, which changes nothing. With `repair` it is a mirror that begins
//! with nothing to copy: what differs and what clients change is copied to the target.
//!
//! What must stay true:
//! * It succeeds only if all that was chosen was equal at one instant, at which no request of a client was under way.
//! * The source is never written. The target is written only with `repair`, and nobody else writes it meanwhile: whoever wants
//!   to is refused, or was there before, then this job is.
//! * Clients are on the source before, during and after it.

use crate::JobError;
use crate::chain::{self, find_device};
use crate::event::{Kind, Progress};
use crate::job::{Body, Job, Options, rate_limit};
use crate::proving::Rest;
use crate::registry::Registry;
use crate::verify_args::{Verify, VerifyMode};
use block::{BlockError, Io, Result, Span};
use copy::{Control, CopyTap, Engine, Next, OnError, OnWrite, Policy, Proof, Report, Standing, Work, status};
use drivers::filters::mirror_top::MirrorTop;
use env::Env;
use graph::{Blocker, Demand, Edge, Graph, NodeCell, NodeOptions, Parent, Perms, Plan, Quiesced, Role, Step};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

const BUSY: &str = "block device is in use by block job: verify";
/// Unit of what is copied in a repair: as a mirror's by default.
const GRANULARITY: u64 = 64 << 10;
/// Bytes in flight: as much as a mirror by default.
const WINDOW: u64 = 16 << 20;
/// Bytes read at once of what a longer disk has behind the end of the other.
const TAIL_STEP: u64 = 1 << 20;

const CR_WU: Perms = Perms::CONSISTENT_READ.with(Perms::WRITE_UNCHANGED);
/// The source may be written by its users: the filter sees it.
const READING: Demand = Demand { needs: Perms::CONSISTENT_READ, shares: CR_WU.with(Perms::WRITE) };
/// The target may not.
const COMPARING: Demand = Demand { needs: Perms::CONSISTENT_READ, shares: CR_WU };
const REPAIRING: Demand = Demand { needs: Perms::CONSISTENT_READ.with(Perms::WRITE), shares: CR_WU };

/// Arguments of `block-verify`, as the client gave them.
#[derive(Clone, Debug)]
pub struct VerifyArgs {
    /// Job id.
    pub job_id: String,
    /// The disk that clients may write.
    pub device: String,
    /// The other one.
    pub target: String,
    /// How much, and what is done about differences.
    pub verify: Verify,
    /// Bytes per second, 0: no limit.
    pub speed: i64,
    /// On failing reads of the source.
    pub on_source_error: OnError,
    /// On failing requests to the target.
    pub on_target_error: OnError,
    /// Name of the filter node.
    pub filter_node_name: Option<String>,
    /// See [`Options`].
    pub auto_finalize: bool,
    /// See [`Options`].
    pub auto_dismiss: bool,
}

impl VerifyArgs {
    /// All of two disks, with all defaults.
    pub fn new(job_id: &str, device: &str, target: &str) -> VerifyArgs {
        VerifyArgs {
            job_id: job_id.to_owned(),
            device: device.to_owned(),
            target: target.to_owned(),
            verify: Verify::FULL,
            speed: 0,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            filter_node_name: None,
            auto_finalize: true,
            auto_dismiss: true,
        }
    }

    fn options(&self) -> Result<Options> {
        Ok(Options {
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            speed: rate_limit(self.speed)?,
            on_source_error: self.on_source_error,
            on_target_error: self.on_target_error,
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Comparing,
    Finishing,
    Over,
}

/// What makes a comparison one.
struct VerifyPolicy {
    work: Rc<Work>,
    repair: bool,
    phase: Cell<Phase>,
    rest: Rest,
    waiting: Cell<bool>,
}

impl VerifyPolicy {
    fn new(env: Env, work: Rc<Work>, repair: bool) -> Rc<VerifyPolicy> {
        let (phase, rest) = (Cell::new(Phase::Comparing), Rest::new(env, work.clone()));
        Rc::new(VerifyPolicy { work, repair, phase, rest, waiting: Cell::new(false) })
    }
}

impl Policy for VerifyPolicy {
    fn guest_write(&self, _: Span) -> OnWrite {
        match (self.phase.get(), self.repair) {
            (Phase::Over, _) => OnWrite::Pass,
            (_, false) => OnWrite::Compare,
            // whoever attached while clients are held: what was compared must stay equal
            (Phase::Finishing, true) => OnWrite::WriteBoth,
            (Phase::Comparing, true) => OnWrite::MarkDirty,
        }
    }

    fn pass_over(&self, s: Standing) -> Next {
        let Some(proof) = self.work.proof() else { return Next::Done };
        let once = proof.fresh_bytes() == 0 && proof.checks() == 0;
        let failed = proof.has_failed();
        let done = match self.phase.get() {
            Phase::Comparing if once && !failed => {
                if !self.waiting.replace(true) {
                    self.rest.begin();
                }
                s.clean && self.rest.is_short(s.stale)
            }
            // all differences are named before the job fails for them
            Phase::Comparing => once,
            Phase::Finishing => failed || (s.clean && s.proven),
            Phase::Over => true,
        };
        if done { Next::Done } else { Next::Again }
    }
}

/// A running comparison.
pub struct Comparison {
    graph: Rc<Graph>,
    source: Rc<NodeCell>,
    /// In front of the source, unless nobody can write it.
    filter: Option<(Rc<NodeCell>, Rc<MirrorTop>)>,
    work: Rc<Work>,
    policy: Rc<VerifyPolicy>,
    hold: RefCell<Option<Hold>>,
    quiet: RefCell<Option<Quiesced>>,
}

/// What the job has of the graph.
struct Hold {
    main: Option<Rc<Edge>>,
    source: Rc<Edge>,
    target: Rc<Edge>,
    _blockers: Vec<Blocker>,
}

/// Checks the arguments, puts the filter in, and starts the job. On an error nothing is left behind (but the job may have
/// been seen as created and gone).
pub async fn start(
    registry: &Registry,
    graph: &Rc<Graph>,
    args: VerifyArgs,
) -> std::result::Result<Rc<Job>, JobError> {
    if args.verify.mode == VerifyMode::Off {
        return Err(JobError::refused("'verify' must be 'sampled' or 'full'"));
    }
    args.verify.check()?;
    let source = find_device(graph, &args.device)?;
    let target = find_device(graph, &args.target)?;
    if source.id() == target.id() {
        return Err(JobError::refused("Can't compare a node with itself"));
    }
    if let Some(name) = &args.filter_node_name {
        graph.check_name(name)?;
    }
    source.check_not_blocked()?;
    target.check_not_blocked()?;
    let job = registry.create(&args.job_id, Kind::Verify, args.options()?, None)?;
    let built = build(graph, &args, source, &target, &job).await;
    registry.launch(job, built)
}

async fn build(
    graph: &Rc<Graph>,
    args: &VerifyArgs,
    source: Rc<NodeCell>,
    target: &Rc<NodeCell>,
    job: &Rc<Job>,
) -> Result<Rc<Comparison>> {
    let parent = || Parent::Job { kind: Kind::Verify.name(), id: args.job_id.clone() };
    let len = source.node().len().min(target.node().len());
    let work = Work::new(graph.env().clone(), len, GRANULARITY)?;
    let Some(rules) = args.verify.rules(graph.env()) else {
        return Err(BlockError::invalid("nothing is to be compared"));
    };
    work.set_proof(Rc::new(Proof::new(len, rules)?));
    let policy = VerifyPolicy::new(graph.env().clone(), work.clone(), rules.repair);
    // an image below others has no writers, and must have none
    let watched = graph::walk::is_root(&source);
    let on_source = if watched { READING } else { COMPARING };
    let from = graph.attach_exact(&source, "source", Role::Root, parent(), on_source).await?;
    let on_target = if rules.repair { REPAIRING } else { COMPARING };
    let to = graph.attach_exact(target, "target", Role::Root, parent(), on_target).await?;
    let mut blocked = vec![source.clone(), target.clone()];
    let (mut main, mut filter) = (None, None);
    if watched {
        let opening = Parent::Node(RefCell::default());
        let under = graph.attach_exact(&source, "backing", Role::Filtered, opening, Demand::NOTHING).await?;
        let top = MirrorTop::new(under);
        let options = NodeOptions {
            name: args.filter_node_name.clone(),
            discard: true,
            read_only: !source.is_writable(),
            ..NodeOptions::default()
        };
        let cell = graph.add(options, top.clone()).await?;
        main = Some(graph.attach_exact(&cell, "main node", Role::Root, parent(), READING).await?);
        top.set_tap(Some(CopyTap::new(work.clone(), to.clone(), policy.clone(), job.clone())));
        let plan = Plan::new()
            .then(Step::MoveParents { from: source.clone(), to: cell.clone(), except: vec![from.clone()] })
            .then(Step::Cover { node: source.clone(), filter: Some(cell.clone()) });
        graph.apply(plan).await?;
        blocked.push(cell.clone());
        filter = Some((cell, top));
    }
    let hold = Hold { main, source: from, target: to, _blockers: chain::block_all(&blocked, BUSY) };
    Ok(Rc::new(Comparison {
        graph: graph.clone(),
        source,
        filter,
        work,
        policy,
        hold: RefCell::new(Some(hold)),
        quiet: RefCell::new(None),
    }))
}

impl Comparison {
    async fn work_on(&self, job: &Rc<Job>) -> Result<()> {
        let (source, target, main) = match self.hold.borrow().as_ref() {
            Some(h) => (h.source.clone(), h.target.clone(), h.main.clone()),
            None => return Ok(()),
        };
        let control: Rc<Job> = job.clone();
        let policy = self.policy.clone();
        let mut engine =
            Engine::new(self.work.clone(), source.clone(), target.clone(), policy, control, WINDOW);
        if let Some((cell, _)) = &self.filter {
            engine.watch(cell.clone());
        }
        loop {
            self.policy.phase.set(Phase::Comparing);
            engine.run().await?;
            self.verdict()?;
            self.tail_is_zero(&source, &target).await?;
            if let Some((cell, _)) = &self.filter {
                let quiet = self.graph.quiesce(cell, main.as_slice()).await;
                *self.quiet.borrow_mut() = Some(quiet);
            }
            self.policy.phase.set(Phase::Finishing);
            engine.set_leave_on_pause(true);
            engine.run().await?;
            self.verdict()?;
            let proven = self.work.proof().is_none_or(|p| p.is_settled()) && self.work.in_sync();
            let flushed = proven && (!self.policy.repair || engine.flush_target().await?);
            if flushed && !job.pause_wanted() {
                // the instant: what clients write from here on is no concern of this job
                self.policy.phase.set(Phase::Over);
                self.quiet.take();
                return Ok(());
            }
            // told to rest: clients go on, and later the rest is compared again
            self.quiet.take();
            engine.set_leave_on_pause(false);
            env::sync::yield_now().await;
        }
    }

    /// Fails if the two were found to differ.
    fn verdict(&self) -> Result<()> {
        self.work.proof().map_or(Ok(()), |p| p.verdict())
    }

    /// What the longer of the two has behind the end of the other has to read as zero.
    async fn tail_is_zero(&self, source: &Edge, target: &Edge) -> Result<()> {
        let (longer, name) =
            if source.len() > target.len() { (source, "source") } else { (target, "target") };
        let mut left = Span::between(self.work.len(), longer.len());
        while !left.is_empty() {
            let found = status(longer, left).await?;
            let first = found.first().map(|e| (e.span.intersect(&left).len, e.kind != block::Kind::Data));
            let (run, zero) = first.filter(|f| f.0 > 0).unwrap_or((left.len, false));
            let (step, rest) = left.split_at(if zero { run } else { run.min(TAIL_STEP) });
            if !zero {
                let data = longer.read(step).await?;
                if let Some(at) = first_not_zero(&data) {
                    let (end, at) = (self.work.len(), step.start + at);
                    let why = format!(
                        "the {name} is longer than the other, which ends at {end}, and is not zero at offset {at}"
                    );
                    return Err(BlockError::new(block::ErrorKind::Io, why));
                }
            }
            left = rest;
            self.graph.env().yield_now().await;
        }
        Ok(())
    }

    /// The graph as it was before the job.
    fn plan_back(&self, cell: &Rc<NodeCell>) -> Plan {
        let except = self.hold.borrow().iter().filter_map(|h| h.main.clone()).collect();
        Plan::new()
            .then(Step::MoveParents { from: cell.clone(), to: self.source.clone(), except })
            .then(Step::Cover { node: self.source.clone(), filter: None })
    }
}

fn first_not_zero(data: &block::Data) -> Option<u64> {
    let mut before = 0;
    for part in data.parts() {
        if let Some(at) = part.iter().position(|b| *b != 0) {
            return Some(before + at as u64);
        }
        before += part.len() as u64;
    }
    None
}

impl Body for Comparison {
    fn run<'a>(&'a self, job: &'a Rc<Job>) -> Io<'a> {
        Box::pin(self.work_on(job))
    }

    fn finish(&self, success: bool) -> Pin<Box<dyn Future<Output = ()> + '_>> {
        Box::pin(async move {
            self.policy.phase.set(Phase::Over);
            self.work.give_up_target();
            self.quiet.take();
            if let Some((cell, top)) = &self.filter {
                top.set_tap(None);
                // Going back asks for nothing that was not granted before, so it is not refused.
                let _ = self.graph.apply(self.plan_back(cell)).await;
            }
            self.work.settled().await;
            let equal_len = self.hold.borrow().as_ref().is_some_and(|h| h.source.len() == h.target.len());
            if let Some(proof) = self.work.proof().filter(|_| success && equal_len) {
                // a helper thread that ends early costs the digest; that the two are equal is known without it
                let _ = proof.seal(self.graph.env()).await;
            }
            self.hold.take();
            self.graph.settle().await;
        })
    }

    fn progress(&self) -> Progress {
        let (passed, left) = self.work.proof().map_or((0, 0), |p| (p.passed(), p.fresh_bytes()));
        let current = self.work.done() + passed;
        Progress { total: current + self.work.remaining() + left, current }
    }

    fn verified(&self) -> Option<Report> {
        self.work.proof().map(|p| p.report())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
