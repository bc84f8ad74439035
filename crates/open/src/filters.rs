//! Filters and drivers for tests: what to open, and how their children are held.

use crate::{Child, Inherited, Opener, Trail};
use block::Result;
use drivers::testing::blkdebug::{Blkdebug, BlkdebugOptions};
use graph::{Demand, Edge, Node, Role};
use std::rc::Rc;

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
        }
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
        let child = self.child(child, parent, trail).await?;
        self.hold(&child, edge, Role::Filtered, name, Demand::NOTHING).await
    }
}
