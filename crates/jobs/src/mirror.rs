//! `blockdev-mirror`: copies a disk to a target while a client writes, and pivots the client to the target.
//!
//! Phases: *preparing* (the filter is in, all writes are marked dirty, what is to be copied is found out, the target is
//! zeroed where that is cheap), *copying* (until clean once, then the target is flushed: READY), *following* (until told
//! to complete or cancel), *finishing* (the client's requests are held, the rest is copied, compared and flushed), and the end.
//! With verification there is one more before READY: *proving* (all is compared once, while clients write).
//!
//! What must stay true:
//! * READY is told once, when nothing was dirty or in flight and the target was flushed.
//! * Completion is one change of the graph, after a moment at which source and target are equal; requests held since
//!   then go to the target. Every other end leaves the client on the source, untouched.
//! * A soft cancel leaves the target as of one instant: no request is split by it.
//! * Whoever attaches to the source while the job runs goes through the filter.
//! * A target that is an image below the source (a commit) is opened for writing; it stays so only if it takes the source's place.
//!   Nothing relies on the images between meanwhile. Where images lie over the source, their headers name the target, durably, once
//!   it durably holds everything, and the graph follows the headers.
//! * A target that hangs holds up neither a cancel nor, after it, the client. (Before: a synchronous write waits for
//!   the target as long as the target takes. That is what it promises.)

use crate::JobError;
use crate::chain::{self, BackingName, Headers, Made, Turned};
use crate::event::{Kind, Progress};
use crate::job::{Body, Job};
use crate::kept_work::KeptWork;
use crate::leavers::{Leavers, Leaving};
use crate::mirror_args::{Checked, CopyMode, MirrorArgs, Sync};
use crate::mirror_bitmap::MirrorBitmap;
use crate::mirror_policy::{MirrorPolicy, Phase, Wish};
use crate::outcome::Figures;
use crate::registry::Registry;
use block::{BlockError, ErrorKind, Io, Result, Span};
use copy::bugs::{Bug, planted};
use copy::{Control, CopyTap, Engine, Links, Outlook, Proof, Report, Work, first};
use drivers::filters::mirror_top::{MirrorTop, Purpose};
use env::bugs::planted as named;
use graph::{Blocker, Demand, Edge, Graph, NodeCell, NodeOptions, Parent, Perms, Plan, Quiesced, Role, Step};
use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

/// What a target below its source is asked for: it becomes its parents' disk without another change.
const WRITING_BELOW: Demand = Demand {
    needs: Perms::WRITE,
    shares: Perms::CONSISTENT_READ.with(Perms::WRITE).with(Perms::WRITE_UNCHANGED),
};

/// What is told of a mirror that was to go on.
const CHANGED: &str =
    "started again after a restart: the target is not as it was left, and everything is copied again";

/// The longest that completion waits for what was written while it was pending to be compared.
const PENDING_PROOF: Duration = Duration::from_secs(5);

/// A running mirror.
pub struct Mirror {
    graph: Rc<Graph>,
    args: MirrorArgs,
    source: Rc<NodeCell>,
    target: Rc<NodeCell>,
    replaces: Option<Rc<NodeCell>>,
    filter: Rc<NodeCell>,
    top: Rc<MirrorTop>,
    work: Rc<Work>,
    policy: Rc<MirrorPolicy>,
    hold: RefCell<Option<Hold>>,
    /// The client is held here from completion to the end.
    quiet: RefCell<Option<Quiesced>>,
    buffer: u64,
    bitmap: Option<Rc<MirrorBitmap>>,
    /// Keeps for a later life what is still to be copied.
    kept: Option<Rc<KeptWork>>,
    /// By an earlier life of the daemon.
    begun_before: bool,
    /// Whether the target is an image below the source, and what was turned read-write for that.
    below: Option<Turned>,
    /// Images over the source that were turned read-write for their headers to be written.
    overlays: Turned,
    /// Whose files are to go when the target has taken their place.
    leavers: RefCell<Option<Rc<Leavers>>>,
    /// The client is on the target, or was left on the source for good.
    made: Made,
}

/// What the job has of the graph.
struct Hold {
    main: Rc<Edge>,
    source: Rc<Edge>,
    target: Rc<Edge>,
    others: Vec<Rc<Edge>>,
    _blockers: Vec<Blocker>,
}

/// Checks the arguments, puts the filter in, and starts the job. On an error nothing is left behind (but the job may have
/// been seen as created and gone).
pub async fn start(
    registry: &Registry,
    graph: &Rc<Graph>,
    args: MirrorArgs,
) -> std::result::Result<Rc<Job>, JobError> {
    let checked = args.check(graph).await?;
    let job = registry.create(&args.job_id, Kind::Mirror, args.job_options()?, None)?;
    start_checked(registry, graph, args, checked, job, None).await
}

/// Starts what was checked as a job that exists.
pub(crate) async fn start_checked(
    registry: &Registry,
    graph: &Rc<Graph>,
    args: MirrorArgs,
    checked: Checked,
    job: Rc<Job>,
    leavers: Option<Rc<Leavers>>,
) -> std::result::Result<Rc<Job>, JobError> {
    let built = build(registry, graph, args, checked, &job).await;
    registry.launch(job, built.inspect(|body| *body.leavers.borrow_mut() = leavers))
}

async fn build(
    registry: &Registry,
    graph: &Rc<Graph>,
    args: MirrorArgs,
    checked: Checked,
    job: &Rc<Job>,
) -> Result<Rc<Mirror>> {
    let Checked { source, target, replaces, granularity, buffer, bitmap, below } = checked;
    // With a bitmap the bitmap says what is to be copied, in a later life as well; of a commit what is allocated does.
    let home = registry.bitmap_home().filter(|_| bitmap.is_none() && below.is_none());
    let kept = KeptWork::find(home, graph, &source, &target, (Kind::Mirror, &args.job_id)).await?;
    let begun_before = registry.bitmap_home().is_some_and(|h| h.is_resuming());
    if begun_before && below.is_some() {
        chain::name_again(graph, &source, &target).await?;
    }
    let busy = format!("block device is in use by block job: {}", job.kind().name());
    let parent = || Parent::Job { kind: job.kind().name(), id: args.job_id.clone() };
    let cr_w_wu = Perms::CONSISTENT_READ.with(Perms::WRITE).with(Perms::WRITE_UNCHANGED);
    let reading = Demand { needs: Perms::CONSISTENT_READ, shares: cr_w_wu };
    let writing = Demand { needs: Perms::WRITE, shares: Perms::WRITE_UNCHANGED };
    let mut others = Vec::new();
    let mut plan = Plan::new();
    let mut blocked = vec![source.clone(), target.clone()];
    blocked.extend(replaces.clone());
    let (source_edge, target_edge) = match &below {
        None => (
            graph.attach_exact(&source, "source", Role::Root, parent(), reading).await?,
            graph.attach_exact(&target, "target", Role::Root, parent(), writing).await?,
        ),
        Some(below) => {
            let shared = Demand { needs: Perms::NONE, shares: cr_w_wu };
            let from = graph.attach_exact(&source, "source", Role::Root, parent(), shared).await?;
            others.push(graph.attach_exact(&target, "target", Role::Root, parent(), Demand::NOTHING).await?);
            for node in &below.between {
                let edge = graph
                    .attach_exact(node, "intermediate node", Role::Root, parent(), Demand::NOTHING)
                    .await?;
                plan = plan.then(Step::Ask { edge: edge.clone(), demand: chain::COMMITTED });
                others.push(edge);
            }
            let own = Parent::Backend(args.job_id.clone());
            let to = graph.attach_exact(&target, "root", Role::Root, own, Demand::NOTHING).await?;
            plan = chain::turning(plan, &below.closed, true)
                .then(Step::Ask { edge: to.clone(), demand: WRITING_BELOW });
            blocked.extend(below.between.clone());
            (from, to)
        }
    };

    let under = graph
        .attach_exact(&source, "backing", Role::Filtered, Parent::Node(RefCell::default()), Demand::NOTHING)
        .await?;
    let purpose = if below.is_some() { Purpose::Commit } else { Purpose::Mirror };
    let top = MirrorTop::with(under, purpose);
    let options = NodeOptions {
        name: args.filter_node_name.clone(),
        discard: true,
        read_only: !source.is_writable(),
        ..NodeOptions::default()
    };
    let filter = graph.add(options, top.clone()).await?;
    let main = graph.attach_exact(&filter, "main node", Role::Root, parent(), reading).await?;

    let work = Work::new(graph.env().clone(), source.node().len(), granularity)?;
    if let Some(rules) = args.verify.rules(graph.env()) {
        work.set_proof(Rc::new(Proof::new(work.len(), rules)?));
    }
    // A target that is only complete together with an image it does not have yet takes whole clusters.
    let complete = below.is_some() || (args.sync == Sync::Full && bitmap.is_none());
    if complete && target_edge.limits().request_alignment <= Work::PART {
        work.keep_parts();
    }
    let to_target = graph::links_below(&target, false);
    work.depend_on(to_target.clone())?;
    let rule = args.on_link_loss;
    let links = rule.map(|rule| Links::new(graph.env(), rule, to_target, graph::links_below(&source, true)));
    job.set_links(links.clone());
    let policy = Rc::new(MirrorPolicy::new(
        work.clone(),
        args.copy_mode,
        args.convergence,
        args.converge_after,
        below.is_some().then(|| target.clone()),
        links,
        job,
    ));
    let tap = CopyTap::new(work.clone(), target_edge.clone(), policy.clone(), job.clone());
    top.set_tap(Some(tap));
    let plan = plan
        .then(Step::MoveParents {
            from: source.clone(),
            to: filter.clone(),
            except: vec![source_edge.clone()],
        })
        .then(Step::Cover { node: source.clone(), filter: Some(filter.clone()) });
    let bitmap = bitmap.map(|(bitmap, mode)| MirrorBitmap::new(&source, bitmap, mode));
    let begun = bitmap.clone();
    let plan =
        plan.then(Step::At { what: Rc::new(move || begun.iter().for_each(|b| b.begin())), undo: None });
    let below = below.map(|b| {
        let turned = Turned::default();
        turned.note(b.closed);
        turned
    });
    if let Err(e) = graph.apply(plan).await {
        bitmap.iter().for_each(|b| b.give_back());
        if let Some(turned) = below {
            turned.back(graph).await;
        }
        return Err(e);
    }
    blocked.push(filter.clone());
    let blockers = chain::block_all(&blocked, &busy);
    let hold = Hold { main, source: source_edge, target: target_edge, others, _blockers: blockers };
    Ok(Rc::new(Mirror {
        graph: graph.clone(),
        args,
        source,
        target,
        replaces,
        filter,
        top,
        work,
        policy,
        hold: RefCell::new(Some(hold)),
        quiet: RefCell::new(None),
        buffer,
        bitmap,
        kept,
        begun_before,
        below,
        overlays: Turned::default(),
        leavers: RefCell::new(None),
        made: Made::default(),
    }))
}

impl Mirror {
    /// Clean now, nothing in flight, and every later write is synchronous.
    pub fn actively_synced(&self) -> bool {
        let synchronous = self.policy.mode() != CopyMode::Background && !self.policy.is_cut_off();
        self.policy.is_following() && synchronous && self.work.in_sync()
    }

    /// How client writes reach the target now.
    pub fn copy_mode(&self) -> CopyMode {
        self.policy.mode()
    }

    /// `block-job-change`: takes effect with the next request.
    pub fn set_copy_mode(&self, mode: CopyMode) {
        self.policy.set_mode(mode);
    }

    /// Rates, remaining bytes, time to sync or the reason why not.
    pub fn outlook(&self, job: &Job) -> Outlook {
        let now = self.graph.env().now();
        self.work.meter().outlook(now, self.work.remaining(), job.speed(), job.is_paused())
    }

    /// Limit that the throttling policy has put on client writes, in bytes per second; 0 for none.
    pub fn guest_limit(&self) -> u64 {
        self.work.guest_limit()
    }

    /// Whether client requests are held (from completion to finalize).
    pub fn is_frozen(&self) -> bool {
        self.quiet.borrow().is_some()
    }

    /// Whether it goes on where an earlier life of the daemon was.
    pub fn is_resumed(&self) -> bool {
        self.kept.as_ref().is_some_and(|k| k.is_resumed())
    }

    /// The arguments it was started with.
    pub fn args(&self) -> &MirrorArgs {
        &self.args
    }

    /// What is shared between the copy and the client's requests.
    pub fn work(&self) -> &Rc<Work> {
        &self.work
    }

    async fn prepare_work(&self, source: &Edge, target: &Edge) -> Result<()> {
        let whole = Span::new(0, self.work.len());
        if self.below.is_some() {
            return first::mark_above(&self.work, source, Some(&self.target), false).await;
        }
        if let Some(bitmap) = &self.bitmap {
            return self.prepare_marked(bitmap, source).await;
        }
        match self.args.sync {
            Sync::Full => {
                let efficient = target.limits().efficient_zero && self.target.options().discard;
                let mut zero = self.args.target_is_zero || first::reads_as_zero(&self.work, target).await?;
                if !zero && efficient {
                    // where zeroing fails, copying will show what is wrong, under the error policy
                    zero = first::zero_target(&self.work, target).await.is_ok();
                }
                if zero {
                    self.work.assume_target_zero()?;
                }
                if zero && efficient {
                    first::mark_data(&self.work, source).await?;
                } else {
                    self.work.mark(whole);
                }
            }
            Sync::Top => first::mark_top(&self.work, source).await?,
            // what was written since is not known
            Sync::None if self.begun_before => self.work.mark(whole),
            Sync::None | Sync::Incremental | Sync::Bitmap => {}
        }
        Ok(())
    }

    /// Of what the sync mode says, what the bitmap marked. Nothing is known of the rest of the target.
    async fn prepare_marked(&self, bitmap: &MirrorBitmap, source: &Edge) -> Result<()> {
        let take = |at: Span| {
            self.work.mark(at);
            bitmap.takes(at);
        };
        let whole = Span::new(0, self.work.len());
        let Some(marked) = bitmap.rest() else { return Ok(()) };
        match self.args.sync {
            Sync::Full | Sync::Incremental | Sync::Bitmap => marked.areas(whole, 0).for_each(take),
            Sync::Top => {
                for area in marked.areas(whole, 0) {
                    first::each_of_top(&self.work, source, area, |at| {
                        // whole granules: what the top layer holds of one decides
                        take(at.align_out(bitmap.granularity()).intersect(&area));
                    })
                    .await?;
                }
            }
            Sync::None => {}
        }
        Ok(())
    }

    async fn work_on(&self, job: &Rc<Job>) -> Result<()> {
        let (source, target) = match self.hold.borrow().as_ref() {
            Some(h) => (h.source.clone(), h.target.clone()),
            None => return Ok(()),
        };
        if self.below.is_some() {
            chain::grow(&self.graph, &self.target, &target, source.len()).await?;
        } else if source.len() != target.len() {
            return Err(BlockError::invalid("Source and target image have different sizes"));
        }
        let control: Rc<Job> = job.clone();
        let mut engine = Engine::new(
            self.work.clone(),
            source.clone(),
            target.clone(),
            self.policy.clone(),
            control,
            self.buffer,
        );
        if self.begun_before && !graph::links_below(&self.target, false).is_empty() {
            // what an earlier life had sent and was not answered lands before anything that is sent now
            self.graph.env().sleep(copy::SETTLE).await;
        }
        if !self.take_up(job, &mut engine, &source, &target).await? {
            while let Err(e) = self.prepare_work(&source, &target).await {
                engine.bridge(e).await?;
            }
        }
        if let Some(kept) = &self.kept {
            kept.begin(&self.work, &source, &target).await;
        }
        self.policy.enter(Phase::Copying);
        loop {
            engine.run().await?;
            self.zero_tail(&mut engine, &target).await?;
            // not certain, or told to rest meanwhile: the next run does, and what came to be dirty is copied
            if engine.flush_target().await? && !job.pause_wanted() {
                break;
            }
        }
        self.prove(job, &mut engine).await?;
        job.set_ready();
        self.policy.enter(Phase::Following);
        loop {
            engine.run().await?;
            self.verdict()?;
            if self.finish_copy(job, &mut engine, &target).await? {
                return Ok(());
            }
            // told to rest while finishing: the client goes on, and later all is done again
            self.quiet.take();
            engine.set_leave_on_pause(false);
            self.policy.enter(Phase::Following);
            // whatever sent us back here has to happen outside: never spin
            env::sync::yield_now().await;
        }
    }

    /// Goes on with what an earlier life left, if anything can be believed of that.
    async fn take_up(&self, job: &Job, engine: &mut Engine, source: &Edge, target: &Edge) -> Result<bool> {
        let Some(kept) = self.kept.as_ref().filter(|k| k.is_resumed()) else { return Ok(false) };
        // of the others nobody knows what the target holds where nothing was copied to
        let equal = self.args.sync == Sync::Full;
        let taken = loop {
            match kept.take_up(&self.work, source, target, equal).await {
                Ok(taken) => break taken,
                Err(e) => engine.bridge(e).await?,
            }
        };
        if !taken {
            job.note_resumed(CHANGED);
        }
        Ok(taken)
    }

    /// Compares all of the two once, where that is asked for, while what clients write goes on being copied.
    async fn prove(&self, job: &Job, engine: &mut Engine) -> Result<()> {
        if self.work.proof().is_none() {
            return Ok(());
        }
        self.policy.enter(Phase::Proving);
        loop {
            engine.run().await?;
            self.verdict()?;
            if engine.flush_target().await? && !job.pause_wanted() {
                return Ok(());
            }
        }
    }

    /// Fails if source and target were found to differ and that was not repaired.
    fn verdict(&self) -> Result<()> {
        self.work.proof().map_or(Ok(()), |p| p.verdict())
    }

    /// Compares what was written by somebody who attached while the job was pending and clients were held.
    async fn prove_rest(&self) -> Result<()> {
        let Some(proof) = self.work.proof().filter(|p| !p.is_settled()) else { return Ok(()) };
        let hold = self.hold.borrow().as_ref().map(|h| (h.source.clone(), h.target.clone()));
        let (Some((source, target)), Some(job)) = (hold, self.policy.job()) else { return Ok(()) };
        let mut engine =
            Engine::new(self.work.clone(), source, target, self.policy.clone(), job, self.buffer);
        engine.set_leave_on_pause(true);
        let compared = self.graph.env().timeout(PENDING_PROOF, engine.run()).await;
        drop(engine);
        compared.unwrap_or(Ok(()))?;
        self.verdict()?;
        if !proof.is_settled() {
            let why = "source and target were still being written when they were compared for the last time";
            return Err(BlockError::new(ErrorKind::Io, why));
        }
        Ok(())
    }

    /// Holds the client, copies, compares and flushes the rest. Whether source and target are equal now.
    async fn finish_copy(&self, job: &Job, engine: &mut Engine, target: &Edge) -> Result<bool> {
        if !planted(Bug::NoDrain) {
            let main = self.hold.borrow().as_ref().map(|h| h.main.clone());
            let quiet = self.graph.quiesce(&self.filter, main.as_slice()).await;
            *self.quiet.borrow_mut() = Some(quiet);
        }
        self.policy.enter(Phase::Finishing);
        engine.set_leave_on_pause(true);
        engine.run().await?;
        self.verdict()?;
        let proven = self.work.proof().is_none_or(|p| p.is_settled()) || planted(Bug::UnprovenEnd);
        let equal = self.work.in_sync() && proven;
        if !equal && !planted(Bug::NoDrain) {
            return Ok(false);
        }
        if self.policy.wish() == Wish::Pivot {
            // with what else a link may have lost
            self.zero_tail(engine, target).await?;
        }
        let flushed =
            named("mirror: the pivot goes before the target is flushed") || engine.flush_target().await?;
        if !flushed || job.pause_wanted() {
            return Ok(false);
        }
        self.bitmap.iter().for_each(|b| b.equal());
        if self.policy.wish() == Wish::Stop {
            // the instant: from here on the client's writes are its own
            self.keep_all();
            self.top.set_tap(None);
            self.policy.enter(Phase::Over);
            self.quiet.take();
        }
        Ok(true)
    }

    /// What images over the source do not see of a longer base they do not see afterwards.
    async fn zero_tail(&self, engine: &mut Engine, target: &Edge) -> Result<()> {
        if self.below.is_none() {
            return Ok(());
        }
        let tail = chain::hidden_tail(&self.graph, &self.source, &self.filter, target);
        if tail.is_empty() { Ok(()) } else { engine.zero_target(tail).await }
    }

    /// The headers of the images over the source name the target. They stay open for writing: what is read through them is held now, so
    /// they cannot be closed before the end.
    async fn name_target(&self) -> Result<Headers> {
        let mut headers = Headers::new(&self.graph);
        let overlays = match self.below {
            Some(_) => chain::overlays(&self.graph, &self.filter),
            None => Vec::new(),
        };
        if overlays.is_empty() {
            return Ok(headers);
        }
        let name = BackingName::of(&self.target, None, self.args.backing_mask_protocol).await?;
        // all of them before any header: one that cannot be opened must not leave another that names the target
        for overlay in &overlays {
            self.overlays.turn(&self.graph, chain::closed_to_writing(overlay)?).await?;
        }
        for overlay in &overlays {
            headers.write(overlay, &name).await?;
        }
        Ok(headers)
    }

    /// What clients write from now on is not in `work`, only in what is kept: nothing is let go there any more.
    fn keep_all(&self) {
        self.kept.iter().for_each(|k| k.keep_all());
    }

    /// The graph as it was before the job.
    fn plan_back(&self) -> Plan {
        let (mut except, mut plan) = (Vec::new(), Plan::new());
        if let Some(h) = self.hold.borrow().as_ref() {
            except.push(h.main.clone());
            // images between source and target are again what their users may rely on
            for edge in &h.others {
                plan = plan.then(Step::Ask { edge: edge.clone(), demand: Demand::NOTHING });
            }
        }
        plan.then(Step::MoveParents { from: self.filter.clone(), to: self.source.clone(), except })
            .then(Step::Cover { node: self.source.clone(), filter: None })
    }

    /// All parents of the source (or of the node it replaces) onto the target.
    fn plan_pivot(&self) -> Plan {
        let (main, source, target) = match self.hold.borrow().as_ref() {
            Some(h) => (h.main.clone(), h.source.clone(), h.target.clone()),
            None => return Plan::new(),
        };
        let mut plan = Plan::new().then(Step::Ask { edge: target, demand: Demand::NOTHING });
        if let Some(replaced) = &self.replaces
            && replaced.id() != self.source.id()
        {
            plan.steps.extend(self.plan_back().steps);
            return plan.then(Step::MoveParents {
                from: replaced.clone(),
                to: self.target.clone(),
                except: vec![source],
            });
        }
        let mut stay = vec![source];
        stay.extend(self.top_edge());
        plan.then(Step::MoveParents {
            from: self.filter.clone(),
            to: self.target.clone(),
            except: vec![main],
        })
        .then(Step::MoveParents { from: self.source.clone(), to: self.target.clone(), except: stay })
        .then(Step::Cover { node: self.source.clone(), filter: None })
    }

    fn top_edge(&self) -> Option<Rc<Edge>> {
        self.filter.node().filtered()
    }
}

impl Body for Mirror {
    fn run<'a>(&'a self, job: &'a Rc<Job>) -> Io<'a> {
        Box::pin(self.work_on(job))
    }

    fn prepare(&self) -> Io<'_> {
        Box::pin(async move {
            if self.policy.wish() == Wish::Stop && !planted(Bug::CancelCompletes) {
                return self.graph.apply(self.plan_back().then(self.made.step())).await;
            }
            if !self.work.in_sync() && !planted(Bug::NoDrain) {
                // somebody attached while the client was held, wrote, and the target failed
                return Err(BlockError::new(ErrorKind::Io, "the target failed while the job was pending"));
            }
            self.prove_rest().await?;
            Leavers::delete_too_early(&self.leavers, &self.graph).await;
            self.policy.release_links();
            let mut plan = self.plan_pivot().then(self.made.step());
            plan.steps.extend(self.below.as_ref().map(Turned::staying));
            if self.args.source_below {
                let parent = Parent::Node(RefCell::new(Some(self.target.name().to_owned())));
                let (source, below) = (&self.source, Role::Backing);
                let edge = self.graph.attach_exact(source, "backing", below, parent, Demand::NOTHING).await?;
                plan.steps.insert(0, Step::SetBacking { node: self.target.clone(), edge: Some(edge) });
            }
            let mut headers = self.name_target().await?;
            let moved = self.graph.apply(plan).await;
            if moved.is_err() {
                headers.put_back().await;
            }
            moved
        })
    }

    fn finish(&self, success: bool) -> Pin<Box<dyn Future<Output = ()> + '_>> {
        Box::pin(async move {
            self.keep_all();
            self.policy.enter(Phase::Over);
            self.work.give_up_target();
            // Without a record of later writes the bitmap keeps all it has, which is more.
            let _kept = self.bitmap.as_ref().filter(|_| !success).map(|b| b.failing());
            self.top.set_tap(None);
            self.quiet.take();
            if !success {
                self.work.doubt_all();
                // Going back asks for nothing that was not granted before, so it is not refused.
                let _ = self.graph.apply(self.plan_back()).await;
                self.work.settled().await;
            }
            self.bitmap.iter().for_each(|b| b.end(success, &self.work));
            if let Some(proof) = self.work.proof().filter(|_| success) {
                // a helper thread that ends early costs the digest; that the two are equal is known without it
                let _ = proof.seal(self.graph.env()).await;
            }
            if let Some(kept) = &self.kept {
                kept.end(&self.work).await;
            }
            self.hold.take();
            self.overlays.back(&self.graph).await;
            self.graph.settle().await;
            let pivoted = success && self.policy.wish() == Wish::Pivot;
            if let Some(turned) = self.below.as_ref().filter(|_| !pivoted) {
                turned.back(&self.graph).await;
            }
            // recorded until it is done
            let leavers = self.leavers.borrow().clone().filter(|_| pivoted);
            if let Some(leavers) = leavers {
                leavers.delete(&self.graph).await;
            }
            self.leavers.take();
        })
    }

    fn is_completing(&self) -> bool {
        self.policy.wish() == Wish::Pivot
    }

    fn has_changed(&self) -> bool {
        self.made.is_so()
    }

    fn leaving(&self) -> Vec<Leaving> {
        let pivoted = self.made.is_so() && self.policy.wish() == Wish::Pivot;
        if pivoted { Leavers::leaving(&self.leavers) } else { Vec::new() }
    }

    fn progress(&self) -> Progress {
        let (passed, left) = self.work.proof().map_or((0, 0), |p| (p.passed(), p.fresh_bytes()));
        let current = self.work.done() + passed;
        Progress { total: current + self.work.remaining() + left, current }
    }

    fn verified(&self) -> Option<Report> {
        self.work.proof().map(|p| p.report())
    }

    fn figures(&self) -> Figures {
        let end = if self.below.is_some() { "base" } else { "target" };
        Figures {
            nodes: vec![("source", self.args.device.clone()), (end, self.args.target.clone())],
            ..Figures::of(&self.work)
        }
    }

    fn complete(&self, _: &Job) -> Result<()> {
        self.policy.ask(Wish::Pivot);
        Ok(())
    }

    fn soft_cancel(&self) -> bool {
        self.policy.ask(Wish::Stop);
        true
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The mirror that `job` is, if it is one and not over.
pub fn with<R>(job: &Job, look: impl FnOnce(&Mirror) -> R) -> Option<R> {
    let body = job.body()?;
    body.as_any().downcast_ref::<Mirror>().map(look)
}

/// `block-job-change`: another copy mode, in either direction.
pub fn change(job: &Job, mode: CopyMode) -> std::result::Result<(), JobError> {
    job.accept(crate::Verb::Change)?;
    with(job, |m| m.set_copy_mode(mode))
        .ok_or_else(|| JobError::refused("Job type does not support change"))?;
    job.nudge();
    Ok(())
}
