//! `drive-mirror` and `drive-backup`: the jobs of the same kind, with a target that the command makes (or finds as a file) and
//! opens. The job's end is the end of the node, unless the disk's users have moved onto it.
//!
//! What must stay true: if the job does not come to be, no node is left behind (a file that was made stays, as with any tool
//! that makes images).

use crate::JobError;
use crate::backup::{self, Created};
use crate::backup_args::BackupArgs;
use crate::chain;
use crate::job::Job;
use crate::mirror;
use crate::mirror_args::{MirrorArgs, Sync};
use crate::new_image::{self, Below};
use crate::registry::{Group, Registry};
use crate::txn::{Action, Doing};
use graph::{DetectZeroes, NodeCell, walk};
use open::{Common, Opener};
use std::cell::RefCell;
use std::rc::Rc;

type Started<T> = std::result::Result<T, JobError>;

/// The target of such a command.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its file.
    pub file: String,
    /// Its format; as the source, or found out, where missing.
    pub format: Option<String>,
    /// The file is there already and is taken as it is.
    pub existing: bool,
    /// Name of its node.
    pub node_name: Option<String>,
    /// Zeroes take no space on it.
    pub unmap: bool,
}

/// What is copied, after what there is: without a layer below the top one there is all to copy.
fn settle(sync: Sync, source: &Rc<NodeCell>) -> (Sync, Option<Rc<NodeCell>>) {
    let below = walk::skip_filters(source).node().backing().map(|e| e.child());
    match (sync, below) {
        (Sync::Top, None) => (Sync::Full, None),
        (Sync::Top, below) => (Sync::Top, below),
        (Sync::None, _) => (Sync::None, Some(source.clone())),
        (sync, _) => (sync, None),
    }
}

impl Target {
    /// Makes it, if it is not there, and opens it over `below`; for a backup over the source itself, too (`none`), and such that
    /// zeroes that are copied take no space.
    async fn open(
        &self,
        opener: &Rc<Opener>,
        source: &Rc<NodeCell>,
        (sync, below): (Sync, Option<Rc<NodeCell>>),
        backup: bool,
    ) -> Started<Rc<NodeCell>> {
        let format = match (&self.format, self.existing) {
            (Some(format), _) => Some(format.clone()),
            (None, true) => None,
            (None, false) => Some(walk::skip_filters(source).node().driver().to_owned()),
        };
        if let Some(name) = &self.node_name {
            opener.graph().check_name(name)?;
        }
        if let (false, Some(format)) = (self.existing, &format) {
            new_image::create(opener, &self.file, format, source.node().len(), below.as_ref()).await?;
        }
        let options = source.options();
        let common = Common {
            node_name: self.node_name.clone(),
            discard: Some(self.unmap),
            detect_zeroes: if self.unmap && backup { DetectZeroes::Unmap } else { DetectZeroes::Off },
            direct: Some(options.cache_direct),
            no_flush: Some(options.cache_no_flush),
            read_only: Some(false),
            ..Common::default()
        };
        let below = match below {
            // what is there already may be over another image, yesterday's backup for example
            _ if self.existing && sync != Sync::None => Below::Header,
            Some(node) if sync != Sync::None || backup => Below::Node(node),
            _ => Below::Nothing,
        };
        new_image::open(opener, &self.file, format.as_deref(), below, common).await
    }
}

/// The job has the node now, or it goes.
async fn hand_over<T>(opener: &Rc<Opener>, target: &Rc<NodeCell>, made: Started<T>) -> Started<T> {
    target.set_monitor_owned(false);
    if made.is_err() && target.parents().is_empty() {
        // the first error is the one that matters
        let _ = opener.graph().remove(target).await;
    }
    made
}

/// `drive-mirror`. The target of `args` is not looked at.
pub async fn mirror(
    registry: &Registry,
    opener: &Rc<Opener>,
    args: MirrorArgs,
    target: &Target,
) -> Started<Rc<Job>> {
    let graph = opener.graph();
    let source = chain::find_device(graph, &args.device)?;
    chain::check_root(&source)?;
    source.check_not_blocked()?;
    let (sync, below) = settle(args.sync, &source);
    if args.replaces.is_some() && target.node_name.is_none() {
        let why = "a node-name must be provided when replacing a named node of the graph";
        return Err(JobError::refused(why));
    }
    let cell = target.open(opener, &source, (sync, below), false).await?;
    // it cannot be below from the start: what a job replaces is used by nobody but its users
    let source_below = sync == Sync::None && cell.node().supports_backing();
    let args = MirrorArgs { sync, target: cell.name().to_owned(), source_below, ..args };
    let made = mirror::start(registry, graph, args).await;
    hand_over(opener, &cell, made).await
}

/// A backup as an action of a transaction, and by itself. With a [`Target`] it is `drive-backup`.
pub struct BackupAction {
    registry: Rc<Registry>,
    opener: Rc<Opener>,
    args: BackupArgs,
    target: Option<Target>,
    group: Option<Rc<Group>>,
    created: RefCell<Option<Created>>,
}

impl BackupAction {
    /// A backup whose job belongs to `group`.
    pub fn new(
        registry: &Rc<Registry>,
        opener: &Rc<Opener>,
        args: BackupArgs,
        target: Option<Target>,
        group: Option<Rc<Group>>,
    ) -> Rc<BackupAction> {
        let (registry, opener) = (registry.clone(), opener.clone());
        Rc::new(BackupAction { registry, opener, args, target, group, created: RefCell::default() })
    }

    async fn create(&self) -> Started<Created> {
        let graph = self.opener.graph();
        let Some(target) = &self.target else {
            return backup::create(&self.registry, graph, self.args.clone(), self.group.clone()).await;
        };
        let source = chain::find_device(graph, &self.args.device)?;
        source.check_not_blocked()?;
        let (sync, below) = settle(self.args.sync, &source);
        let cell = target.open(&self.opener, &source, (sync, below), true).await?;
        let args = BackupArgs { sync, target: cell.name().to_owned(), ..self.args.clone() };
        let made = backup::create(&self.registry, graph, args, self.group.clone()).await;
        hand_over(&self.opener, &cell, made).await
    }
}

impl Action for BackupAction {
    fn nodes(&self) -> Vec<String> {
        vec![self.args.device.clone()]
    }

    fn prepare(&self) -> Doing<'_, Started<()>> {
        Box::pin(async move {
            let created = self.create().await?;
            *self.created.borrow_mut() = Some(created);
            Ok(())
        })
    }

    fn commit(&self) -> Doing<'_> {
        Box::pin(async move {
            if let Some(created) = self.created.take() {
                created.start(&self.registry);
            }
        })
    }

    fn abort(&self) -> Doing<'_> {
        Box::pin(async move {
            let created = self.created.take();
            if let Some(created) = created {
                created.undo(&self.registry).await;
            }
        })
    }
}
