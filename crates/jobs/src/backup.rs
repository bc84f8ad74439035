//! `blockdev-backup`: copies a disk as of one instant to a target while clients go on writing.
//!
//! The instant is when the filter comes in: then no request is inside the disk, and the bitmap, if there is one, begins
//! anew. From then on old bytes go to the target before they are overwritten, and the engine brings the rest. With a
//! *buffer* old bytes go there instead, which is fast, and the engine drains buffer and source to the target, which may be
//! slow; what has drained is released from the buffer.
//!
//! What must stay true:
//! * The target of a successful backup is the source as of the instant (or its parts that were asked for).
//! * However the job ends, clients are back on the source, and the bitmap is as the table in [`crate::backup_bitmap`] says.
//! * With verification, what was read of the source is recorded by its hash when it is copied, and all of the target is read and
//!   compared with that before the job succeeds: the source has gone on meanwhile.
//! * With a state directory the instant outlives the daemon where that can be proven (`open/src/kept_instant.rs`), and is else the
//!   instant of the restart, which is said.
//! * Clients are never held: neither at the end nor while the job is pending.
//! * Two backups of one disk stack: each keeps its own instant.

use crate::JobError;
use crate::backup_args::{BackupArgs, Checked, OnBufferFull};
use crate::backup_bitmap::BitmapUse;
use crate::event::{Kind, Progress};
use crate::job::{Body, Job};
use crate::kept_work::KeptWork;
use crate::mirror_args::Sync;
use crate::outcome::Figures;
use crate::registry::{Group, Registry};
use bitmap::Bitmap;
use block::{BlockError, ErrorKind, Io, Result};
use copy::{
    Control, Engine, KeepRules, Links, Next, OnSaveError, OnWrite, PointInTime, Policy, Proof, Report,
    Standing, Work, first,
};
use drivers::filters::copy_before_write::CopyBeforeWrite;
use drivers::filters::snapshot_access::SnapshotAccess;
use graph::{Blocker, Demand, Edge, Graph, NodeCell, NodeOptions, Parent, Perms, Plan, Role, Step};
use open::{BitmapHome, KeptInstant};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

const BUSY: &str = "block device is in use by block job: backup";
/// Bytes in flight: as much as a mirror by default.
const WINDOW: u64 = 16 << 20;

/// What the engine of a buffered backup asks of the node that shows what is kept: reading, and releasing by discards.
const DRAINING: Demand = Demand {
    needs: Perms::CONSISTENT_READ.with(Perms::WRITE),
    shares: Perms::CONSISTENT_READ.with(Perms::WRITE).with(Perms::WRITE_UNCHANGED),
};

/// A backup.
pub struct Backup {
    graph: Rc<Graph>,
    args: BackupArgs,
    sync: Sync,
    filter: Rc<NodeCell>,
    node: Rc<CopyBeforeWrite>,
    point: Rc<PointInTime>,
    /// What the engine has to bring to the target.
    work: Rc<Work>,
    bitmap: Option<BitmapUse>,
    /// What of the instant outlives the daemon.
    kept: Option<Rc<KeptInstant>>,
    /// What is still to be copied if the instant does not.
    lacking: Option<Rc<KeptWork>>,
    /// The instant is the restart, and only what the target lacked is copied.
    moved: bool,
    hold: RefCell<Option<Hold>>,
    workers: u32,
    chunk: u64,
}

/// What the job has of the graph.
struct Hold {
    main: Rc<Edge>,
    _target: Rc<Edge>,
    /// Where the engine reads and writes.
    from: Rc<Edge>,
    to: Rc<Edge>,
    _blockers: Vec<Blocker>,
}

/// A backup whose instant is taken and that does not run yet: the members of a transaction are all created before the first
/// one starts.
pub struct Created {
    job: Rc<Job>,
    body: Rc<Backup>,
}

impl Created {
    /// The job.
    pub fn job(&self) -> &Rc<Job> {
        &self.job
    }

    /// Lets it run.
    pub fn start(self, registry: &Registry) -> Rc<Job> {
        registry.start(&self.job, self.body);
        self.job
    }

    /// Everything is as before it was created; the job is seen to have been given up.
    pub async fn undo(self, registry: &Registry) {
        registry.give_up(&self.job, self.body).await;
    }
}

/// Checks the arguments, takes the instant and makes the job, as a member of `group` if one is given. On an error nothing
/// is left behind (but the job may have been seen as created and gone).
pub async fn create(
    registry: &Registry,
    graph: &Rc<Graph>,
    args: BackupArgs,
    group: Option<Rc<Group>>,
) -> std::result::Result<Created, JobError> {
    let checked = args.check(graph).await?;
    let home = registry.bitmap_home().filter(|_| args.keeps_instant(checked.sync));
    let body = build(graph, args, checked, home).await.map_err(|e| e.context("Could not create node"))?;
    let job = match registry.create(&body.args.job_id, Kind::Backup, body.args.job_options(), group) {
        Ok(job) => job,
        Err(e) => {
            body.finish(false).await;
            return Err(e);
        }
    };
    if let Err(e) = body.args.check_speed() {
        body.finish(false).await;
        registry.discard(&job);
        return Err(e.into());
    }
    Ok(Created { job, body })
}

/// Whoever is outermost in front of `node`: the filter of another backup, or the node itself.
fn outermost(node: &Rc<NodeCell>) -> Rc<NodeCell> {
    let mut at = node.clone();
    while let Some(filter) = at.cover() {
        at = filter;
    }
    at
}

async fn build(
    graph: &Rc<Graph>,
    args: BackupArgs,
    checked: Checked,
    home: Option<Rc<BitmapHome>>,
) -> Result<Rc<Backup>> {
    let Checked { source, target, buffer, bitmap, sync, cluster, chunk, workers } = checked;
    let below = outermost(&source);
    let keeping = buffer.as_ref().unwrap_or(&target);
    let kept_home = home.clone();
    let opening = || Parent::Node(RefCell::default());
    let job = || Parent::Job { kind: Kind::Backup.name(), id: args.job_id.clone() };
    let file = graph.attach_exact(&below, "file", Role::Filtered, opening(), Demand::NOTHING).await?;
    let kept = graph.attach_exact(keeping, "target", Role::Other, opening(), Demand::NOTHING).await?;
    let node = CopyBeforeWrite::new(file.clone(), kept.clone());
    node.discard_source(args.discard_source);
    let options = NodeOptions {
        name: args.filter_node_name.clone(),
        discard: true,
        read_only: !below.is_writable(),
        ..NodeOptions::default()
    };
    let filter = graph.add(options, node.clone()).await?;
    let made = async {
        let main = graph.attach_exact(&filter, "main node", Role::Root, job(), Demand::NOTHING).await?;
        let held = graph.attach_exact(&target, "target", Role::Root, job(), Demand::NOTHING).await?;
        let len = below.node().len();
        let point_work = Work::new(graph.env().clone(), len, cluster)?;
        let point = PointInTime::new(point_work.clone(), file.clone(), kept.clone(), rules(&args));
        if sync == Sync::Top {
            point.top_only();
        }
        let instant_kept = match home {
            Some(home) => KeptInstant::find(home, &file, &kept, &args.job_id, &point_work).await,
            None => None,
        };
        if let Some(ledger) = instant_kept.clone().filter(|k| k.is_live()) {
            point.written_down_by(ledger);
        }
        let left = instant_kept.as_ref().and_then(|k| k.take_left());
        let lacking = match sync {
            Sync::Full => {
                KeptWork::find(kept_home, graph, &source, &target, (Kind::Backup, &args.job_id)).await?
            }
            _ => None,
        };
        let mut moved = false;
        if let Some(lacking) = &lacking {
            let believed = lacking.before_instant(&point_work, &file, &kept, left.as_ref()).await;
            moved = believed && left.is_none();
        }
        let (from, to, work) = match &buffer {
            None => (file.clone(), kept.clone(), point_work),
            Some(_) => {
                let work = Work::new(graph.env().clone(), len, cluster)?;
                point.drained_by(&work);
                let (from, to) = drain(graph, &filter, &target, &args).await?;
                (from, to, work)
            }
        };
        if let Some(rules) = args.verify.rules(graph.env()) {
            work.set_proof(Rc::new(Proof::recording(len, rules)?));
        }
        let bitmap = bitmap.map(|(bitmap, mode)| BitmapUse::new(&source, bitmap, mode)).transpose()?;
        // Without the rule the peer is trusted with what it has answered: not all of that can be copied again, and whether
        // a lost link is worth a failed backup is the user's to say.
        if args.on_link_loss.is_some() {
            work.depend_on(graph::links_below(&target, false))?;
        }
        node.set_keeper(Some(point.clone()));
        let begin = match (left, &lacking) {
            (Some(left), _) => Begin::GoesOn(left),
            (None, Some(lacking)) if moved => Begin::Lacking(lacking.clone()),
            (None, _) => Begin::Anew,
        };
        let instant = instant(&point, &work, sync, bitmap.as_ref(), begin);
        let stay = below.parents().into_iter().filter(|e| matches!(e.parent(), Parent::Job { .. })).collect();
        let mut plan = Plan::new()
            .then(Step::MoveParents { from: below.clone(), to: filter.clone(), except: stay })
            .then(Step::Cover { node: below.clone(), filter: Some(filter.clone()) })
            .then(Step::At { what: instant, undo: None });
        if buffer.is_some() {
            plan = plan.then(Step::Ask { edge: from.clone(), demand: DRAINING });
        }
        if let Err(e) = graph.apply(plan).await {
            bitmap.iter().for_each(BitmapUse::give_back);
            return Err(e);
        }
        instant_kept.iter().for_each(|k| k.begin());
        lacking.iter().for_each(|l| l.begin_instant(&work, &file, &kept));
        // Writers have gone through the filter since; now nobody may come beside it, even while there are none.
        node.pin(true);
        if graph.ask(&main, Demand::NOTHING).await.is_err() {
            node.pin(false);
        }
        let nodes = [Some(&target), Some(&filter), buffer.as_ref()];
        let blockers = nodes.into_iter().flatten().map(|n| n.block(BUSY)).collect();
        let hold = Hold { main, _target: held, from, to, _blockers: blockers };
        Ok((point, work, bitmap, instant_kept, (lacking, moved), hold))
    };
    match made.await {
        Ok((point, work, bitmap, kept, (lacking, moved), hold)) => Ok(Rc::new(Backup {
            graph: graph.clone(),
            args,
            sync,
            filter,
            node,
            point,
            work,
            bitmap,
            kept,
            lacking,
            moved,
            hold: RefCell::new(Some(hold)),
            workers,
            chunk,
        })),
        Err(e) => {
            drop((file, kept));
            graph.settle().await;
            // where nobody ever used it, nobody else takes it away
            let _ = graph.remove(&filter).await;
            Err(e)
        }
    }
}

/// How old bytes are kept.
fn rules(args: &BackupArgs) -> KeepRules {
    let plain = KeepRules {
        on_error: args.on_cbw_error,
        compressed: args.compress,
        discard_source: args.discard_source,
        ..KeepRules::default()
    };
    if args.buffer.is_none() {
        return plain;
    }
    let (on_error, wait_when_full) = match args.on_buffer_full {
        OnBufferFull::Wait => (args.on_cbw_error, true),
        OnBufferFull::BreakBackup => (OnSaveError::LoseInstant, false),
        OnBufferFull::BreakGuestWrite => (OnSaveError::FailChange, false),
    };
    KeepRules { on_error, wait_when_full, most: args.buffer_size, compressed: false, ..plain }
}

/// What an earlier life has to do with the instant.
enum Begin {
    /// It took it, and the target lacks so much.
    GoesOn(Bitmap),
    /// Its own is lost; of the disk as it is now the target lacks this.
    Lacking(Rc<KeptWork>),
    /// Nothing.
    Anew,
}

/// What happens when nobody is inside the disk: the work of the job is what it is now, and the bitmap begins anew.
fn instant(
    point: &Rc<PointInTime>,
    work: &Rc<Work>,
    sync: Sync,
    bitmap: Option<&BitmapUse>,
    begin: Begin,
) -> Rc<dyn Fn()> {
    let (point, work, bitmap) = (point.clone(), work.clone(), bitmap.cloned());
    Rc::new(move || {
        match &begin {
            Begin::GoesOn(left) => return point.go_on(left),
            Begin::Lacking(lacking) => return point.begin(&lacking.lacking(point.work())),
            Begin::Anew => {}
        }
        let bits = bitmap.as_ref().map(BitmapUse::begin);
        match bits.filter(|_| sync == Sync::Bitmap) {
            Some(bits) => point.begin(&bits),
            None => point.begin_all(),
        }
        if !Rc::ptr_eq(point.work(), &work) {
            work.begin(&point.wanted());
        }
    })
}

/// Edges for the engine of a buffered backup: from what the filter keeps, onto the target.
async fn drain(
    graph: &Rc<Graph>,
    filter: &Rc<NodeCell>,
    target: &Rc<NodeCell>,
    args: &BackupArgs,
) -> Result<(Rc<Edge>, Rc<Edge>)> {
    let opening = Parent::Node(RefCell::default());
    let edge = graph.attach_exact(filter, "file", Role::Other, opening, Demand::NOTHING).await?;
    let options = NodeOptions { discard: true, ..NodeOptions::default() };
    let view = graph.add(options, SnapshotAccess::new(edge)).await?;
    let job = || Parent::Job { kind: Kind::Backup.name(), id: args.job_id.clone() };
    // nothing is asked before the filter is where clients' writes go through it
    let from = graph.attach_exact(&view, "source", Role::Root, job(), Demand::NOTHING).await?;
    let demand = Demand { needs: Perms::WRITE, shares: DRAINING.shares };
    let to = graph.attach_exact(target, "root", Role::Root, job(), demand).await?;
    Ok((from, to))
}

/// All that is dirty is copied once.
struct BackupPolicy {
    point: Rc<PointInTime>,
    /// All is copied, and is compared with what was recorded of it.
    proving: Cell<bool>,
    work: Rc<Work>,
    compressed: bool,
    discard_source: bool,
}

impl Policy for BackupPolicy {
    fn guest_write(&self, _: block::Span) -> OnWrite {
        // what clients do is seen by the filter that keeps the instant
        OnWrite::Pass
    }
    fn compressed(&self) -> bool {
        self.compressed
    }
    fn discard_source(&self) -> bool {
        self.discard_source
    }
    fn compares(&self) -> bool {
        self.proving.get()
    }
    fn pass_over(&self, standing: Standing) -> Next {
        if let Some(at) = self.work.gone() {
            self.point.lose(BlockError::new(
                ErrorKind::Disconnected,
                format!("the link to the target was lost before it had flushed what was at {at}, which the disk does not hold any more"),
            ));
        }
        let done = standing.clean && (standing.proven || !self.proving.get());
        if done || self.point.lost().is_some() { Next::Done } else { Next::Again }
    }
}

impl Backup {
    async fn work_on(&self, job: &Rc<Job>) -> Result<()> {
        let (from, to) = match self.hold.borrow().as_ref() {
            Some(h) => (h.from.clone(), h.to.clone()),
            None => return Ok(()),
        };
        if self.sync == Sync::None {
            return self.keep_only(job).await;
        }
        if let Some(rule) = self.args.on_link_loss {
            let to_source = graph::links_below(&self.node.file().child(), true);
            let to_target = graph::links_below(&to.child(), false);
            job.set_links(Some(Links::new(self.graph.env(), rule, to_target, to_source)));
        }
        let policy = Rc::new(BackupPolicy {
            point: self.point.clone(),
            proving: Cell::new(false),
            work: self.work.clone(),
            compressed: self.args.compress,
            discard_source: self.args.discard_source || self.is_buffered(),
        });
        let control: Rc<Job> = job.clone();
        let mut engine = Engine::new(self.work.clone(), from, to.clone(), policy.clone(), control, WINDOW);
        engine.set_most(self.workers, self.chunk);
        engine.watch(self.filter.clone());
        while let Err(e) = self.prepare_work(&to).await {
            engine.bridge(e).await?;
        }
        let mut copied = self.copy(&mut engine).await;
        if copied.is_ok() && self.work.proof().is_some() {
            policy.proving.set(true);
            copied = self.copy(&mut engine).await;
        }
        match self.point.lost() {
            Some(why) => Err(why),
            None => copied.and_then(|()| self.work.proof().map_or(Ok(()), |p| p.verdict())),
        }
    }

    async fn prepare_work(&self, target: &Edge) -> Result<()> {
        if self.sync == Sync::Top {
            self.point.release_lower_layers().await?;
            if self.is_buffered() {
                self.work.begin(&self.point.wanted());
            }
        }
        let fresh = !self.is_resumed() && !self.moved;
        if fresh && self.sync == Sync::Full && first::reads_as_zero(&self.work, target).await? {
            self.work.assume_target_zero()?;
        }
        Ok(())
    }

    async fn copy(&self, engine: &mut Engine) -> Result<()> {
        loop {
            engine.run().await?;
            // what was lost while it was flushed has to be copied again
            if self.point.lost().is_some() || engine.flush_target().await? {
                return Ok(());
            }
        }
    }

    /// Nothing is copied but what clients overwrite; only a cancel ends that, or the loss of the instant.
    async fn keep_only(&self, job: &Rc<Job>) -> Result<()> {
        job.set_idle(true);
        loop {
            let changed = job.changed().wait();
            let lost = self.work.woken();
            if let Some(why) = self.point.lost() {
                return Err(why);
            }
            if job.pause_wanted() {
                drop(changed);
                job.park().await;
                continue;
            }
            env::sync::race(changed, lost).await;
        }
    }

    fn is_buffered(&self) -> bool {
        self.args.buffer.is_some()
    }

    /// Whether it goes on with the instant that it took in an earlier life of the daemon.
    pub fn is_resumed(&self) -> bool {
        self.kept.as_ref().is_some_and(|k| k.is_resumed())
    }

    /// Whether the instant is the restart, and of an earlier life's copy what the target has is not copied again.
    pub fn has_moved(&self) -> bool {
        self.moved
    }

    /// Name of the node that it copies to.
    pub fn target(&self) -> &str {
        &self.args.target
    }

    /// Bytes in the buffer of a buffered backup that have not drained yet.
    pub fn buffered(&self) -> Option<u64> {
        self.is_buffered().then(|| self.point.held())
    }

    /// The instant that it keeps.
    pub fn point(&self) -> &Rc<PointInTime> {
        &self.point
    }

    /// The graph without the filter.
    fn plan_back(&self) -> Plan {
        let below = self.node.file().child();
        let except = self.hold.borrow().as_ref().map(|h| h.main.clone()).into_iter().collect();
        Plan::new()
            .then(Step::MoveParents { from: self.filter.clone(), to: below.clone(), except })
            .then(Step::Cover { node: below, filter: self.filter.cover() })
    }
}

impl Body for Backup {
    fn run<'a>(&'a self, job: &'a Rc<Job>) -> Io<'a> {
        Box::pin(self.work_on(job))
    }

    fn prepare(&self) -> Io<'_> {
        Box::pin(async move {
            match self.point.lost() {
                Some(why) => Err(why),
                None => Ok(()),
            }
        })
    }

    fn finish(&self, success: bool) -> Pin<Box<dyn Future<Output = ()> + '_>> {
        Box::pin(async move {
            // At the end of the daemon a job that has done its work ends before its clients do (it may hold their requests), one that
            // works ends after them.
            let outlives = self.point.lost().is_none() && self.kept.as_ref().is_some_and(|k| k.outlives());
            let complete = self.kept.as_ref().is_some_and(|k| k.is_complete());
            if let Some(kept) = self.kept.as_ref().filter(|_| !outlives) {
                kept.end(false).await;
            }
            if outlives && !complete {
                // a change must not pass unseen
                self.point.rest();
            } else {
                self.point.end();
            }
            if let Some(lacking) = &self.lacking {
                lacking.keep_all();
            }
            self.node.pin(false);
            // Going back asks for nothing that was not granted before, so it is not refused.
            let _ = self.graph.apply(self.plan_back()).await;
            self.hold.take();
            self.work.settled().await;
            if let Some(kept) = self.kept.as_ref().filter(|_| outlives) {
                kept.end(true).await;
            }
            if !success {
                self.work.doubt_all();
            }
            if let Some(lacking) = &self.lacking {
                lacking.end(&self.work).await;
            }
            if let Some(bitmap) = &self.bitmap {
                bitmap.end(success, &self.work);
            }
            if let Some(proof) = self.work.proof().filter(|_| success) {
                // a helper thread that ends early costs the digest; that the two are equal is known without it
                let _ = proof.seal(self.graph.env()).await;
            }
            self.graph.settle().await;
        })
    }

    fn progress(&self) -> Progress {
        let (passed, left) = self.work.proof().map_or((0, 0), |p| (p.passed(), p.fresh_bytes()));
        let current = self.work.done() + passed;
        if self.sync == Sync::None {
            return Progress { total: self.work.len(), current };
        }
        Progress { total: current + self.work.remaining() + left, current }
    }

    fn verified(&self) -> Option<Report> {
        self.work.proof().map(|p| p.report())
    }

    fn figures(&self) -> Figures {
        let buffer = self.args.buffer.clone().map(|b| ("buffer", b));
        let both = [("source", self.args.device.clone()), ("target", self.args.target.clone())];
        Figures { nodes: both.into_iter().chain(buffer).collect(), ..Figures::of(&self.work) }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The backup that `job` is, if it is one and not over.
pub fn with<R>(job: &Job, look: impl FnOnce(&Backup) -> R) -> Option<R> {
    let body = job.body()?;
    body.as_any().downcast_ref::<Backup>().map(look)
}
