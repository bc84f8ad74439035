//! Deleting the files of images that left a chain, if the user asked for that.
//!
//! What must stay true: a file goes only when nothing leads to it any more that we know of: the header that named it says
//! something else, durably; no node has it open; no other process holds an image lock on it. What is not deleted is said, with
//! the reason; each deletion is told.

use crate::event::Event;
use crate::job::Job;
use block::{BlockError, ErrorKind, Result};
use drivers::file::{FileNode, FileOptions};
use env::bugs::planted;
use graph::{Demand, Graph, Node, NodeCell, Perms};
use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::{Rc, Weak};

/// Images that will have left, with their files.
pub(crate) struct Leavers {
    job: Weak<Job>,
    images: Vec<Leaver>,
}

struct Leaver {
    node: String,
    /// The path and identity of the file; none if it is not a file.
    file: Option<(PathBuf, (u64, u64))>,
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
        Leavers { job: Rc::downgrade(job), images: images.collect() }
    }

    /// The defect that the crash enumeration has to find: the files go before what replaces them is durable.
    pub(crate) async fn delete_too_early(leavers: &RefCell<Option<Leavers>>, graph: &Graph) {
        if !planted("leavers: deleted before the new copy is durable") {
            return;
        }
        let files = |l: &Leavers| l.images.iter().filter_map(|i| i.file.clone()).collect::<Vec<_>>();
        let files = leavers.borrow().as_ref().map(files).unwrap_or_default();
        for (path, _) in files {
            let _ = graph.env().remove(&path).await;
        }
    }

    /// Deletes what nobody uses any more, and tells about each image. The graph has settled.
    pub(crate) async fn delete(self, graph: &Graph) {
        for image in self.images {
            let (filename, outcome) = match &image.file {
                None => (String::new(), Err(BlockError::unsupported("it is not stored in a file"))),
                Some((path, identity)) => (path.display().to_string(), delete(graph, path, *identity).await),
            };
            let Some(job) = self.job.upgrade() else { continue };
            let error = outcome.err().map(|e| e.message().to_owned());
            job.shared.tell(Event::Image { id: job.id().to_owned(), node: image.node, filename, error });
        }
    }
}

async fn delete(graph: &Graph, path: &std::path::Path, identity: (u64, u64)) -> Result<()> {
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
    let outcome = if file.identity() == identity {
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
