//! Filters and drivers for tests: what to open, and how their children are held.

use crate::{Child, Inherited, Opener, Trail};
use block::{BlockError, ErrorKind, Result};
use drivers::filters::compress::Compress;
use drivers::filters::copy_on_read::CopyOnRead;
use drivers::filters::preallocate::{Preallocate, PreallocateOptions};
use drivers::filters::quorum::{Quorum, QuorumEvent, QuorumOptions};
use drivers::filters::replication::{Replication, ReplicationEvent, ReplicationOptions};
use drivers::filters::throttle::{Throttle, ThrottleGroup};
use drivers::testing::blkdebug::{Blkdebug, BlkdebugOptions};
use drivers::testing::blklogwrites::{BlkLogWrites, LogOptions};
use drivers::testing::blkverify::Blkverify;
use graph::{Demand, Edge, Node, NodeCell, Role, walk};
use std::rc::Rc;

/// Finds a throttle group by the id that the user gave it.
pub type ThrottleHook = Rc<dyn Fn(&str) -> Option<Rc<ThrottleGroup>>>;

/// A filter, or a driver for tests, with its options.
#[derive(Clone, Debug)]
pub enum FilterSpec {
    /// Errors by rules.
    Blkdebug {
        /// Which node it is in front of.
        image: Child,
        /// What it does.
        options: BlkdebugOptions,
    },
    /// What is done is logged.
    BlkLogWrites {
        /// Which node it is in front of.
        file: Child,
        /// Where the log is.
        log: Child,
        /// How it is written.
        options: LogOptions,
    },
    /// Two disks are compared.
    Blkverify {
        /// The one that is trusted.
        raw: Child,
        /// The one under test.
        test: Child,
    },
    /// What is written is compressed.
    Compress {
        /// Which node it is in front of.
        file: Child,
    },
    /// What is read comes up into the image.
    CopyOnRead {
        /// Which node it is in front of.
        file: Child,
        /// The lowest node from which is copied.
        bottom: Option<String>,
    },
    /// Files grow more than asked for.
    Preallocate {
        /// Which node it is in front of.
        file: Child,
        /// How much.
        options: PreallocateOptions,
    },
    /// Several children that vote.
    Quorum {
        /// The children.
        children: Vec<Child>,
        /// How they vote.
        options: QuorumOptions,
    },
    /// One side of a replicated disk.
    Replication {
        /// Where the other side is, or the overlay.
        file: Child,
        /// Which side.
        options: ReplicationOptions,
    },
    /// Requests wait.
    Throttle {
        /// Which node it is in front of.
        file: Child,
        /// Id of the group.
        group: String,
    },
}

impl FilterSpec {
    /// The child called `file`.
    pub(crate) fn file(&self) -> Option<&Child> {
        match self {
            FilterSpec::BlkLogWrites { file, .. }
            | FilterSpec::Compress { file }
            | FilterSpec::CopyOnRead { file, .. }
            | FilterSpec::Preallocate { file, .. }
            | FilterSpec::Replication { file, .. }
            | FilterSpec::Throttle { file, .. } => Some(file),
            FilterSpec::Blkdebug { .. } | FilterSpec::Blkverify { .. } | FilterSpec::Quorum { .. } => None,
        }
    }
}

impl Opener {
    pub(crate) async fn filter(
        &self,
        spec: &FilterSpec,
        now: Inherited,
        name: &str,
        trail: &Trail,
    ) -> Result<Rc<dyn Node>> {
        let env = self.graph().env();
        match spec {
            FilterSpec::Blkdebug { image, options } => {
                let image = self.filtered(image, "image", now, name, trail).await?;
                Ok(Blkdebug::open(env, image, options.clone()).await?)
            }
            FilterSpec::BlkLogWrites { file, log, options } => {
                options.check()?;
                let file = self.filtered(file, "file", now, name, trail).await?;
                let log = self.child(log, now, trail).await?;
                let log = self.hold(&log, "log", Role::Other, name, Demand::NOTHING).await?;
                Ok(BlkLogWrites::open(file, log, options.clone()).await?)
            }
            FilterSpec::Blkverify { raw, test } => {
                let raw = self.filtered(raw, "raw", now, name, trail).await?;
                let test = self.child(test, now, trail).await?;
                let test = self.hold(&test, "test", Role::Other, name, Demand::NOTHING).await?;
                Ok(Blkverify::new(raw, test))
            }
            FilterSpec::Compress { file } => {
                Ok(Compress::open(self.filtered(file, "file", now, name, trail).await?)?)
            }
            FilterSpec::CopyOnRead { file, bottom } => {
                let file = self.filtered(file, "file", now, name, trail).await?;
                let bottom = bottom.as_deref().map(|b| self.bottom(&file, b)).transpose()?;
                Ok(CopyOnRead::new(file, bottom.as_ref()))
            }
            FilterSpec::Preallocate { file, options } => {
                Ok(Preallocate::open(self.filtered(file, "file", now, name, trail).await?, *options)?)
            }
            FilterSpec::Quorum { children, options } => {
                self.quorum(children, options.clone(), now, name, trail).await
            }
            FilterSpec::Replication { file, options } => {
                options.check()?;
                let child = self.child(file, now.to_file(), trail).await?;
                let file = self.hold(&child, "file", Role::Primary, name, Demand::NOTHING).await?;
                let told = self.on_replication.borrow().clone();
                let hook = told.unwrap_or_else(|| Rc::new(|_: &str, _: ReplicationEvent| ()));
                Ok(Replication::open(env, name, file, options.clone(), hook)?)
            }
            FilterSpec::Throttle { file, group: id } => {
                let group = self.throttle_group(id)?;
                Ok(Throttle::new(self.filtered(file, "file", now, name, trail).await?, id, group))
            }
        }
    }

    async fn quorum(
        &self,
        children: &[Child],
        options: QuorumOptions,
        now: Inherited,
        name: &str,
        trail: &Trail,
    ) -> Result<Rc<dyn Node>> {
        options.check(children.len())?;
        let mut edges = Vec::new();
        for (i, child) in children.iter().enumerate() {
            let child = self.child(child, now, trail).await?;
            edges
                .push(self.hold(&child, &format!("children.{i}"), Role::Other, name, Demand::NOTHING).await?);
        }
        let told = self.on_quorum.borrow().clone();
        let hook = told.unwrap_or_else(|| Rc::new(|_: QuorumEvent| ()));
        Ok(Quorum::open(name, edges, options, hook)?)
    }

    /// The throttle group of this id.
    pub fn throttle_group(&self, id: &str) -> Result<Rc<ThrottleGroup>> {
        let found = self.throttle.borrow().as_ref().and_then(|find| find(id));
        found.ok_or_else(|| {
            BlockError::new(ErrorKind::NotFound, format!("Throttle group '{id}' does not exist"))
        })
    }

    /// The node that bounds copying on read.
    fn bottom(&self, file: &Rc<Edge>, name: &str) -> Result<Rc<NodeCell>> {
        let found = self.graph().find(name);
        let bottom = found
            .ok_or_else(|| BlockError::new(ErrorKind::NotFound, format!("Bottom node '{name}' not found")))?;
        if bottom.node().filtered().is_some() {
            return Err(BlockError::invalid(format!("Bottom node '{name}' is a filter")));
        }
        if !walk::contains(&file.child(), &bottom) {
            return Err(BlockError::invalid(format!("Bottom node '{name}' is not in the backing chain")));
        }
        Ok(bottom)
    }

    /// The child of a filter, behind the edge called `edge`.
    async fn filtered(
        &self,
        child: &Child,
        edge: &str,
        parent: Inherited,
        name: &str,
        trail: &Trail,
    ) -> Result<Rc<Edge>> {
        let parent = if edge == "file" { parent.to_file() } else { parent };
        let child = self.child(child, parent, trail).await?;
        self.hold(&child, edge, Role::Filtered, name, Demand::NOTHING).await
    }
}
