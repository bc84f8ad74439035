//! Deleting the files of images that left a chain, if the user asked for that.
//!
//! What must stay true: a file goes only when nothing leads to it any more that we know of: the header that named it says
//! something else, durably; no node has it open; no other process holds an image lock on it. What is not deleted is said, with
//! the reason; each deletion is told. With a state directory the commit that records the changed chain names the files as well
//! ([`Body::leaving`](crate::Body::leaving)), so that a later life deletes what a crash left ([`Leaving::delete`]).

use crate::event::Event;
use crate::job::Job;
use crate::registry::Registry;
use block::{BlockError, ErrorKind, Result};
use drivers::file::{FileNode, FileOptions};
use env::bugs::planted;
use graph::{Demand, Graph, Node, NodeCell, Perms};
use std::cell::{OnceCell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::time::Duration;

/// Images that will have left, with their files.
pub(crate) struct Leavers {
    job: Weak<Job>,
    images: Vec<Leaver>,
    /// When the chain was without them, since 1970: until then they may change.
    left: OnceCell<Duration>,
}

struct Leaver {
    node: String,
    /// The path and identity of the file; none if it is not a file.
    file: Option<(PathBuf, (u64, u64))>,
}

/// A file that is to be deleted: what a later life of the daemon has to know to do it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leaving {
    /// The job that made it superfluous.
    pub job: String,
    /// The node that it was open as.
    pub node: String,
    /// Where it is.
    pub path: PathBuf,
    /// Device and inode of the file.
    pub identity: (u64, u64),
    /// When it was last known to be ours, since 1970.
    pub known: Duration,
}

impl Leaving {
    /// Deletes the file, if it is still the one and nobody uses it; whether it was there. For a later life than the one that wanted it.
    ///
    /// # Errors
    /// Why it is kept.
    pub async fn delete(&self, graph: &Graph) -> Result<bool> {
        match delete(graph, &self.path, self.identity, Some(self.known)).await {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            done => done.map(|()| {
                forget_durably(graph, &self.path);
                true
            }),
        }
    }

    /// Tells that it is deleted, or why not.
    pub fn tell(self, registry: &Registry, error: Option<String>) {
        let Leaving { job: id, node, path, .. } = self;
        registry.shared.tell(Event::Image { id, node, filename: path.display().to_string(), error });
    }
}

impl Leavers {
    /// What is known of `nodes` as long as they are there. Filters have no files.
    pub(crate) fn note(job: &Rc<Job>, nodes: &[Rc<NodeCell>]) -> Leavers {
        let images = nodes.iter().filter(|n| n.node().filtered().is_none()).map(|n| {
            let stored = n.node().primary().map(|e| e.child());
            let file = stored.as_ref().and_then(|c| c.node().as_any().downcast_ref::<FileNode>());
            Leaver {
                node: n.name().to_owned(),
                file: file.filter(|f| f.driver() == "file").map(|f| (f.path().to_path_buf(), f.identity())),
            }
        });
        Leavers { job: Rc::downgrade(job), images: images.collect(), left: OnceCell::new() }
    }

    /// Those that are files, for a later life. They have left the chain.
    pub(crate) fn leaving(leavers: &RefCell<Option<Rc<Leavers>>>) -> Vec<Leaving> {
        let Some(leavers) = leavers.borrow().clone() else { return Vec::new() };
        let Some(job) = leavers.job.upgrade() else { return Vec::new() };
        let known = *leavers.left.get_or_init(|| job.shared.env.wall());
        let (env, job) = (&job.shared.env, job.id());
        let files = leavers.images.iter().filter_map(|i| {
            let (path, identity) = i.file.clone()?;
            let path = env.absolute(&path);
            Some(Leaving { job: job.to_owned(), node: i.node.clone(), path, identity, known })
        });
        files.collect()
    }

    /// The defect that the crash enumeration has to find: the files go before what replaces them is durable.
    pub(crate) async fn delete_too_early(leavers: &RefCell<Option<Rc<Leavers>>>, graph: &Graph) {
        if planted("leavers: deleted before the new copy is durable") {
            for image in Self::leaving(leavers) {
                let _ = graph.env().remove(&image.path).await;
            }
        }
    }

    /// Deletes what nobody uses any more, and tells about each image. The graph has settled.
    pub(crate) async fn delete(&self, graph: &Graph) {
        // the nodes of what is deleted are gone from the records first, or a later life would look for their files
        let kept = graph.keep().await;
        for image in &self.images {
            let (filename, outcome) = match &image.file {
                None => (String::new(), Err(BlockError::unsupported("it is not stored in a file"))),
                Some((path, identity)) => {
                    let outcome = match &kept {
                        Ok(()) => delete(graph, path, *identity, None).await,
                        Err(e) => Err(e.clone()),
                    };
                    (path.display().to_string(), outcome)
                }
            };
            let Some(job) = self.job.upgrade() else { continue };
            if let (Ok(()), Some((path, _)), true) = (&outcome, &image.file, job.shared.is_kept()) {
                forget_durably(graph, path);
            }
            let (node, error) = (image.node.clone(), outcome.err().map(|e| e.message().to_owned()));
            job.shared.tell(Event::Image { id: job.id().to_owned(), node, filename, error });
        }
    }
}

/// A file changed so long after it was noted is somebody else's by now: numbers of inodes are used again. (Closing an image, which
/// comes after, may write to it.)
const GRACE: Duration = Duration::from_secs(90);

/// Before it is recorded no more that the file is to be deleted. If it fails, a power loss may bring the file back.
fn forget_durably(graph: &Graph, path: &Path) {
    let path = graph.env().absolute(path);
    let _ = path.parent().map(|directory| graph.env().sync_directory(directory));
}

/// With `known` the file is from an earlier life, which knew it as of then.
async fn delete(graph: &Graph, path: &Path, identity: (u64, u64), known: Option<Duration>) -> Result<()> {
    let user = graph
        .nodes()
        .into_iter()
        .find(|n| n.node().as_any().downcast_ref::<FileNode>().is_some_and(|f| f.identity() == identity));
    if let Some(user) = user {
        let message = format!("node '{}' still uses it", user.name());
        return Err(BlockError::new(ErrorKind::Busy, message));
    }
    let env = graph.env();
    let options = FileOptions { filename: path.display().to_string(), ..FileOptions::default() };
    let (file, _) = FileNode::open(env, &options).await?;
    let alone = Demand { needs: Perms::ALL, shares: Perms::NONE };
    let late = match known {
        Some(known) => {
            let modified = file.host_file().await?.map_or(0, |f| f.modified);
            modified > 0 && Duration::from_nanos(modified) > known.saturating_add(GRACE)
        }
        None => false,
    };
    let outcome = if late {
        Err(BlockError::new(ErrorKind::Busy, "it was changed after it had left the chain"))
    } else if file.identity() == identity {
        match file.acquire(alone).await {
            Ok(()) => env.remove(path).await,
            Err(e) => Err(e),
        }
    } else {
        Err(BlockError::new(ErrorKind::Busy, "another file has taken its place"))
    };
    // It is closed either way; a lock that stays would end with it.
    let _ = file.release(Demand::NOTHING).await;
    let _ = file.close().await;
    outcome
}
