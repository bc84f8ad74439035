//! External snapshots: a disk goes on in a new layer, and what it held until then stays as it is.
//!
//! Phases: the layer is there already, or its image is made and opened; the disk's node is flushed; one change of the graph
//! puts the layer above the node and moves all its users there; the node is closed for writing.
//!
//! What must stay true: users see the same bytes before and after, and no write of theirs reaches the node below any more.
//! Undone, the users are back on the node, which has missed nothing: they stood still meanwhile (see [`crate::txn`]).

use crate::JobError;
use crate::chain;
use crate::new_image::{self, Below};
use crate::txn::{Action, Doing};
use block::{BlockError, ErrorKind, Result};
use graph::{Demand, Edge, Graph, NodeCell, Parent, Plan, Role, Step, walk};
use open::{Common, Opener};
use std::cell::RefCell;
use std::rc::Rc;

/// A new image for a layer.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Its file.
    pub file: String,
    /// Its driver.
    pub format: String,
    /// The file is there already and is taken as it is.
    pub existing: bool,
    /// Name of its node.
    pub node_name: Option<String>,
}

/// The layer that goes on top.
#[derive(Clone, Debug)]
pub enum Overlay {
    /// A node (`blockdev-snapshot`).
    Node(String),
    /// An image of its own (`blockdev-snapshot-sync`).
    Image(NewImage),
}

/// A snapshot, as an action.
pub struct Snapshot {
    opener: Rc<Opener>,
    device: Option<String>,
    node: Option<String>,
    overlay: Overlay,
    done: RefCell<Option<Done>>,
}

/// What was changed.
struct Done {
    node: Rc<NodeCell>,
    overlay: Rc<NodeCell>,
    moved: Vec<Rc<Edge>>,
    /// Opened for this snapshot.
    ours: bool,
}

impl Snapshot {
    /// A snapshot of what `node` names.
    pub fn new(
        opener: &Rc<Opener>,
        device: Option<String>,
        node: Option<String>,
        overlay: Overlay,
    ) -> Rc<Snapshot> {
        Rc::new(Snapshot { opener: opener.clone(), device, node, overlay, done: RefCell::default() })
    }

    fn graph(&self) -> &Rc<Graph> {
        self.opener.graph()
    }

    fn find(&self) -> Result<Rc<NodeCell>> {
        let (device, node) = (self.device.as_deref(), self.node.as_deref());
        // a storage daemon has no guest's devices: that name is only shown
        node.and_then(|name| self.graph().find(name)).ok_or_else(|| {
            let (device, node) = (device.unwrap_or_default(), node.unwrap_or_default());
            let message = format!("Cannot find device='{device}' nor node-name='{node}'");
            BlockError::new(ErrorKind::NotFound, message)
        })
    }

    async fn take(&self) -> std::result::Result<Done, JobError> {
        let node = self.find()?;
        check_free(&node)?;
        if let Overlay::Image(image) = &self.overlay {
            // before there is a file that nobody wants
            self.graph().check_active(&node, "backing", image.node_name.as_deref())?;
        }
        flush(self.graph(), &node).await?;
        let (overlay, ours) = match &self.overlay {
            Overlay::Node(name) => (chain::find_device(self.graph(), name)?, false),
            Overlay::Image(image) => (self.make(&node, image).await?, true),
        };
        let put = match check_overlay(&overlay) {
            Ok(()) => self.put(&node, &overlay).await,
            Err(e) => Err(e),
        };
        match put {
            Ok(moved) => Ok(Done { node, overlay, moved, ours }),
            Err(e) => {
                if ours {
                    let _ = self.graph().remove(&overlay).await;
                }
                Err(e)
            }
        }
    }

    /// Makes and opens the image of the new layer.
    async fn make(
        &self,
        node: &Rc<NodeCell>,
        image: &NewImage,
    ) -> std::result::Result<Rc<NodeCell>, JobError> {
        if let Some(name) = &image.node_name {
            if self.graph().find(name).is_some() {
                return Err(JobError::refused("New overlay node-name already in use"));
            }
            self.graph().check_name(name)?;
        } else if self.node.is_some() {
            return Err(JobError::refused("New overlay node-name missing"));
        }
        if !image.existing {
            let len = node.node().len();
            new_image::create(&self.opener, &image.file, &image.format, len, Some(node)).await?;
        }
        let options = node.options();
        let common = Common {
            node_name: image.node_name.clone(),
            discard: Some(options.discard),
            direct: Some(options.cache_direct),
            no_flush: Some(options.cache_no_flush),
            ..Common::default()
        };
        new_image::open(&self.opener, &image.file, Some(&image.format), Below::Nothing, common).await
    }

    async fn put(
        &self,
        node: &Rc<NodeCell>,
        overlay: &Rc<NodeCell>,
    ) -> std::result::Result<Vec<Rc<Edge>>, JobError> {
        if walk::chain(overlay).iter().chain([overlay]).any(|n| n.id() == node.id()) {
            let message = format!(
                "Making '{}' a backing child of '{}' would create a cycle",
                node.name(),
                overlay.name()
            );
            return Err(JobError::refused(message));
        }
        if !overlay.node().supports_backing() {
            return Err(JobError::refused("The overlay does not support backing images"));
        }
        let parent = Parent::Node(RefCell::new(Some(overlay.name().to_owned())));
        let edge = self.graph().attach_exact(node, "backing", Role::Backing, parent, Demand::NOTHING).await?;
        let moved: Vec<Rc<Edge>> = node.parents().into_iter().filter(|e| e.id() != edge.id()).collect();
        let mut plan = Plan::new().then(Step::SetBacking { node: overlay.clone(), edge: Some(edge) });
        let point = |e: &Rc<Edge>| Step::Point { edge: e.clone(), to: overlay.clone() };
        plan.steps.extend(moved.iter().map(point));
        if node.is_writable() {
            // records have it read-only from then on, as it will be
            let (below, back) = (node.clone(), node.clone());
            plan = plan.then(Step::At {
                what: Rc::new(move || below.lend(true)),
                undo: Some(Rc::new(move || back.lend(false))),
            });
        }
        if let Overlay::Image(_) = &self.overlay {
            // it belongs to its users from then on; without any it goes
            let (users, back) = (overlay.clone(), overlay.clone());
            plan = plan.then(Step::At {
                what: Rc::new(move || users.set_monitor_owned(false)),
                undo: Some(Rc::new(move || back.set_monitor_owned(true))),
            });
        }
        // with the rest of the transaction
        self.graph().apply(plan.kept_later()).await?;
        Ok(moved)
    }

    async fn undo(&self, done: Done) {
        let Done { node, overlay, moved, ours } = done;
        let still = moved.iter().filter(|e| e.child().id() == overlay.id());
        let mut plan = Plan::new();
        plan.steps.extend(still.map(|e| Step::Point { edge: e.clone(), to: node.clone() }));
        plan.steps.push(Step::SetBacking { node: overlay.clone(), edge: None });
        node.lend(false);
        // Nothing was taken from the node that its users would need now, so they get it back.
        let _ = self.graph().apply(plan).await;
        drop(moved);
        if ours {
            let _ = self.graph().remove(&overlay).await;
        }
    }

    async fn keep(&self, done: Done) {
        let Done { node, overlay, moved, ours } = done;
        if node.is_writable() {
            // Where that fails (the last changes of its header cannot be written, say) it stays open for writing, with nobody
            // who may write.
            let _ = self.graph().apply(chain::turning(Plan::new(), std::slice::from_ref(&node), false)).await;
        }
        node.lend(false);
        drop(moved);
        if ours && overlay.parents().is_empty() {
            let _ = self.graph().remove(&overlay).await;
        }
    }
}

impl Action for Snapshot {
    fn nodes(&self) -> Vec<String> {
        let overlay = match &self.overlay {
            Overlay::Node(name) => Some(name.clone()),
            Overlay::Image(_) => None,
        };
        [self.node.clone(), overlay].into_iter().flatten().collect()
    }

    fn prepare(&self) -> Doing<'_, std::result::Result<(), JobError>> {
        Box::pin(async move {
            let done = self.take().await?;
            *self.done.borrow_mut() = Some(done);
            Ok(())
        })
    }

    fn commit(&self) -> Doing<'_> {
        Box::pin(async move {
            let done = self.done.take();
            if let Some(done) = done {
                self.keep(done).await;
            }
        })
    }

    fn abort(&self) -> Doing<'_> {
        Box::pin(async move {
            let done = self.done.take();
            if let Some(done) = done {
                self.undo(done).await;
            }
        })
    }
}

/// That no job and no overlay keeps the node where it is.
fn check_free(node: &Rc<NodeCell>) -> std::result::Result<(), JobError> {
    node.check_not_blocked()?;
    Ok(check_not_backing(node)?)
}

/// That no overlay needs the node below it.
///
/// # Errors
/// `Busy`, with the name of the overlay.
pub fn check_not_backing(node: &NodeCell) -> Result<()> {
    // the one that came last, as in QSD
    match node.parents().iter().rfind(|e| e.role() == Role::Backing) {
        None => Ok(()),
        Some(edge) => {
            let above = edge.parent_node().unwrap_or_default();
            let message = format!("Node '{}' is busy: node is used as backing hd of '{above}'", node.name());
            Err(BlockError::new(ErrorKind::Busy, message))
        }
    }
}

fn check_overlay(overlay: &Rc<NodeCell>) -> std::result::Result<(), JobError> {
    // a node above a format is no user: what that shows becomes the disk with its new layer
    let is_user = |e: &Rc<Edge>| !overlay.node().supports_backing() || !matches!(e.parent(), Parent::Node(_));
    if overlay.parents().iter().any(is_user) {
        return Err(JobError::refused("The overlay is already in use"));
    }
    check_free(overlay)?;
    if overlay.node().backing().is_some() {
        return Err(JobError::refused("The overlay already has a backing image"));
    }
    Ok(())
}

/// What was written to `node` before is on stable storage after.
async fn flush(graph: &Graph, node: &Rc<NodeCell>) -> Result<()> {
    let parent = Parent::Backend("snapshot".to_owned());
    let edge = graph.attach_exact(node, "root", Role::Root, parent, Demand::NOTHING).await?;
    edge.flush().await
}
