//! `block-stream`: what the images below a disk hold comes up into it, then they leave the chain.
//!
//! Phases: the disk is opened for writing, if it is an image inside a chain, and the filter goes above it; what it does not
//! have itself, and the images above the base have, is copied into it under its users' requests; it is flushed; its header
//! names the base (or nothing), durably; one change of the graph puts it above the base.
//!
//! What must stay true:
//! * What the disk shows never changes but by its users: what is written is what its readers see there already, and no write
//!   of a user to the same bytes runs meanwhile (see [`copy::OnWrite::Exclude`]). Whoever attaches while the job runs goes
//!   through the filter.
//! * What the disk has itself is not copied over: that is asked for under the range lock, right before.
//! * With verification what the disk shows is recorded by its hash before a part of it is copied, and all that was copied is read again and
//!   compared with that, but for what users changed; then nothing may be left below that the disk shows.
//! * Graph and header agree, see [`crate::commit`].

use crate::JobError;
use crate::chain::{self, BackingName, ChainPolicy, Headers, Made, Turned};
use crate::event::{Kind, Progress};
use crate::job::{Body, Job};
use crate::leavers::{Leavers, Leaving};
use crate::outcome::Figures;
use crate::registry::Registry;
use crate::stream_args::{Checked, StreamArgs};
use block::{BlockError, ErrorKind, Io, Result};
use copy::{Control, CopyTap, Engine, Proof, Report, Work, first};
use drivers::filters::mirror_top::{MirrorTop, Purpose};
use env::bugs::planted;
use graph::{Blocker, Demand, Edge, Graph, NodeCell, NodeOptions, Parent, Perms, Plan, Role, Step, walk};
use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

const BUSY: &str = "block device is in use by block job: stream";

const CR_WU: Perms = Perms::CONSISTENT_READ.with(Perms::WRITE_UNCHANGED);
/// The disk may be written by its users.
const ACTIVE: Demand = Demand { needs: Perms::NONE, shares: CR_WU.with(Perms::WRITE) };
/// The images below may not.
const TAKEN: Demand = Demand { needs: Perms::NONE, shares: CR_WU };
const READING: Demand = Demand { needs: Perms::CONSISTENT_READ, shares: CR_WU.with(Perms::WRITE) };

/// A running stream.
pub struct Stream {
    graph: Rc<Graph>,
    args: StreamArgs,
    device: Rc<NodeCell>,
    image: Rc<NodeCell>,
    /// The lowest image that is taken in; none if there is nothing to take.
    bottom: Option<Rc<NodeCell>>,
    filter: Rc<NodeCell>,
    top: Rc<MirrorTop>,
    work: Rc<Work>,
    policy: Rc<ChainPolicy>,
    turned: Turned,
    /// The job's own users of the filter, until it is over.
    on_filter: RefCell<Vec<Rc<Edge>>>,
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

/// Checks the arguments, puts the filter in, and starts the job. On an error nothing is left behind (but the job may have
/// been seen as created and gone).
pub async fn start(
    registry: &Registry,
    graph: &Rc<Graph>,
    args: StreamArgs,
) -> std::result::Result<Rc<Job>, JobError> {
    let checked = args.check(graph).await?;
    let job = registry.create(&args.job_id, Kind::Stream, args.job_options(), None)?;
    let built = match args.check_speed() {
        Ok(()) => build(graph, args, checked, &job).await,
        Err(e) => Err(e),
    };
    registry.launch(job, built)
}

async fn build(graph: &Rc<Graph>, args: StreamArgs, checked: Checked, job: &Rc<Job>) -> Result<Rc<Stream>> {
    let Checked { device, image, between, base } = checked;
    let blockers = chain::block_all([&device, &image].into_iter().chain(&between), BUSY);
    let closed = chain::closed_to_writing(&image)?;
    let work = Work::new(graph.env().clone(), device.node().len(), granularity(&image, &between))?;
    if let Some(rules) = args.verify.rules(graph.env()) {
        work.set_proof(Rc::new(Proof::recording(work.len(), rules)?));
    }
    let of_job = || Parent::Job { kind: Kind::Stream.name(), id: args.job_id.clone() };
    let mut edges = vec![graph.attach_exact(&device, "active node", Role::Root, of_job(), ACTIVE).await?];
    for node in &between {
        edges.push(graph.attach_exact(node, "intermediate node", Role::Root, of_job(), TAKEN).await?);
    }
    let on_image = Parent::Node(RefCell::default());
    let on_image = graph.attach_exact(&device, "file", Role::Filtered, on_image, Demand::NOTHING).await?;
    let top = MirrorTop::with(on_image.clone(), Purpose::Stream);
    let read_only = !device.is_writable();
    // the filter writes through to the image, so that has to be open for it first
    let turned = Turned::default();
    turned.turn(graph, closed).await?;
    let options = NodeOptions {
        name: args.filter_node_name.clone(),
        discard: true,
        read_only,
        ..NodeOptions::default()
    };
    let filter = match graph.add(options, top.clone()).await {
        Ok(filter) => filter,
        Err(e) => {
            drop((top, on_image));
            turned.back(graph).await;
            return Err(e);
        }
    };
    let policy = ChainPolicy::new(base, true);
    let tap = CopyTap::new(work.clone(), on_image.clone(), policy.clone(), job.clone());
    top.set_tap(Some(tap));
    let made = async {
        let main = graph.attach_exact(&filter, "main node", Role::Root, of_job(), Demand::NOTHING).await?;
        let own = Parent::Backend(args.job_id.clone());
        let own = graph.attach_exact(&filter, "root", Role::Root, own, READING).await?;
        let mut except = edges.clone();
        except.push(on_image.clone());
        let plan = Plan::new()
            .then(Step::MoveParents { from: device.clone(), to: filter.clone(), except })
            .then(Step::Cover { node: device.clone(), filter: Some(filter.clone()) });
        graph.apply(plan).await?;
        Ok(vec![main, own])
    };
    let on_filter = match made.await {
        Ok(edges) => edges,
        Err(e) => {
            let _ = graph.remove(&filter).await;
            turned.back(graph).await;
            return Err(e);
        }
    };
    let leavers = args.delete_images.then(|| Rc::new(Leavers::note(job, &between)));
    Ok(Rc::new(Stream {
        leavers: RefCell::new(leavers),
        made: Made::default(),
        graph: graph.clone(),
        args,
        device,
        image,
        bottom: between.last().cloned(),
        filter,
        top,
        work,
        policy,
        turned,
        on_filter: RefCell::new(on_filter),
        hold: RefCell::new(Some(Hold { _edges: edges, _blockers: blockers })),
    }))
}

/// Whole clusters of the image: a part of one makes it fill the rest.
fn granularity(image: &Rc<NodeCell>, between: &[Rc<NodeCell>]) -> u64 {
    match image.node().limits().cluster_size {
        0 => chain::granularity(between),
        _ => chain::granularity(std::slice::from_ref(image)),
    }
}

impl Stream {
    async fn work_on(&self, job: &Rc<Job>) -> Result<()> {
        let Some(on_image) = self.filter.node().filtered().filter(|_| self.bottom.is_some()) else {
            return Ok(());
        };
        first::mark_above(&self.work, &on_image, self.policy.base.as_ref(), true).await?;
        let control: Rc<Job> = job.clone();
        let mut engine = Engine::new(
            self.work.clone(),
            on_image.clone(),
            on_image,
            self.policy.clone(),
            control,
            self.args.buffer(),
        );
        engine.set_chunk(chain::CHUNK);
        loop {
            engine.run().await?;
            self.work.pass_all();
            if let Some(error) = self.policy.left_out.borrow().clone() {
                return Err(error);
            }
            if !planted("stream: the header goes before the disk is flushed") {
                engine.flush_target().await?;
            }
            if !job.pause_wanted() {
                return self.prove(&mut engine).await;
            }
        }
    }

    /// What the disk shows of what was copied is what it showed before, but for what its users changed; and nothing is left that only
    /// the images below have.
    async fn prove(&self, engine: &mut Engine) -> Result<()> {
        let Some(proof) = self.work.proof() else { return Ok(()) };
        self.policy.proving.set(true);
        engine.run().await?;
        proof.verdict()?;
        if let Some(on_image) = self.filter.node().filtered() {
            first::mark_above(&self.work, &on_image, self.policy.base.as_ref(), true).await?;
        }
        match self.work.with_dirty(|d| d.next_dirty(0)) {
            None => Ok(()),
            Some(at) => {
                let why = format!("the images below still hold what the disk shows at offset {at}");
                Err(BlockError::new(ErrorKind::Io, why))
            }
        }
    }

    /// The graph without the filter.
    fn plan_back(&self) -> Plan {
        Plan::new()
            .then(Step::MoveParents {
                from: self.filter.clone(),
                to: self.device.clone(),
                except: self.on_filter.borrow().clone(),
            })
            .then(Step::Cover { node: self.device.clone(), filter: None })
    }

    async fn leave_chain(&self) -> Result<()> {
        // whatever is there by now; where nothing leaves, the header is written all the same, as it may be given another name
        let base = match &self.bottom {
            Some(bottom) => bottom.below(),
            None => self.image.node().backing().map(|e| e.child()),
        };
        if self.bottom.is_none() && base.is_none() {
            return self.graph.apply(self.plan_back().then(self.made.step())).await;
        }
        Leavers::delete_too_early(&self.leavers, &self.graph).await;
        let name = match &base {
            None => BackingName::NONE,
            Some(base) => {
                let named = walk::skip_filters(base);
                let file = self.args.backing_file.as_deref();
                BackingName::of(&named, file, self.args.backing_mask_protocol).await?
            }
        };
        let mut plan = self.plan_back();
        if self.bottom.is_some() {
            let edge = match &base {
                None => None,
                Some(base) => {
                    let parent = Parent::Node(RefCell::new(Some(self.image.name().to_owned())));
                    let attached =
                        self.graph.attach_exact(base, "backing", Role::Backing, parent, Demand::NOTHING);
                    Some(attached.await?)
                }
            };
            plan = plan.then(Step::SetBacking { node: self.image.clone(), edge });
        }
        let mut headers = Headers::new(&self.graph);
        headers.write(&self.image, &name).await?;
        let moved = self.graph.apply(plan.then(self.made.step())).await;
        if moved.is_err() {
            headers.put_back().await;
        }
        moved
    }
}

impl Body for Stream {
    fn run<'a>(&'a self, job: &'a Rc<Job>) -> Io<'a> {
        Box::pin(self.work_on(job))
    }

    fn prepare(&self) -> Io<'_> {
        Box::pin(self.leave_chain())
    }

    fn finish(&self, success: bool) -> Pin<Box<dyn Future<Output = ()> + '_>> {
        Box::pin(async move {
            self.policy.over.set(true);
            self.work.give_up_target();
            self.top.set_tap(None);
            if !success {
                // Going back asks for nothing that was not granted before, so it is not refused.
                let _ = self.graph.apply(self.plan_back()).await;
            }
            self.on_filter.take();
            // recorded until it is done
            let leavers = self.leavers.borrow().clone().filter(|_| success);
            if leavers.is_some() {
                // held no longer than now, so that they can go
                self.hold.take();
            }
            self.graph.settle().await;
            self.turned.back(&self.graph).await;
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
        match self.bottom {
            None => Progress::default(),
            Some(_) => {
                let (passed, left) = self.work.proof().map_or((0, 0), |p| (p.passed(), p.fresh_bytes()));
                Progress { total: self.work.len() + passed + left, current: self.work.passed() + passed }
            }
        }
    }

    fn figures(&self) -> Figures {
        Figures { nodes: vec![("target", self.image.name().to_owned())], ..Figures::of(&self.work) }
    }

    fn verified(&self) -> Option<Report> {
        self.work.proof().map(|p| p.report())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
