//! Children that a running quorum gains and loses (`x-blockdev-change`).
//!
//! What can happen: the parent is no quorum, the child is missing, in use, or of another length. What must stay true: no
//! request is inside the quorum while its children change, and on an error nothing has changed.

use crate::{Child, DriverSpec, FilterSpec, Opener};
use block::{BlockError, ErrorKind, Result};
use drivers::filters::quorum::Quorum;
use graph::{Demand, Edge, NodeCell, Parent, Plan, Role, Step};
use std::cell::RefCell;
use std::rc::Rc;

impl Opener {
    /// Gives the quorum `parent` one more child.
    ///
    /// # Errors
    /// No quorum, or one that cannot grow; a child that somebody uses, that is above `parent`, or whose permissions do not fit.
    pub async fn add_child(&self, parent: &Rc<NodeCell>, child: &Rc<NodeCell>) -> Result<()> {
        let Some(quorum) = parent.node().as_any().downcast_ref::<Quorum>() else {
            let message = format!("The node {} does not support adding a child", parent.name());
            return Err(BlockError::unsupported(message));
        };
        if !child.parents().is_empty() {
            let message = format!("The node {} already has a parent", child.name());
            return Err(BlockError::new(ErrorKind::Busy, message));
        }
        let name = quorum.next_child(child.node().len())?;
        crate::reopen::no_cycle(parent, child, &name)?;
        let above = Parent::Node(RefCell::new(Some(parent.name().to_owned())));
        let edge = self.graph.attach_exact(child, &name, Role::Other, above, Demand::NOTHING).await?;
        let mut edges = parent.node().edges();
        edges.push(edge);
        self.change_children(parent, edges).await
    }

    /// Takes the child behind the edge called `name` from the quorum `parent`.
    ///
    /// # Errors
    /// No quorum, no such child, a job that works on it, or too few children left.
    pub async fn remove_child(&self, parent: &Rc<NodeCell>, name: &str) -> Result<()> {
        let Some(edge) = parent.node().edges().into_iter().find(|e| e.name() == name) else {
            let message = format!("Node '{}' does not have child '{name}'", parent.name());
            return Err(BlockError::new(ErrorKind::NotFound, message));
        };
        let Some(quorum) = parent.node().as_any().downcast_ref::<Quorum>() else {
            let message = format!("The node {} does not support removing a child", parent.name());
            return Err(BlockError::unsupported(message));
        };
        let left = quorum.without(name)?.unwrap_or_default();
        edge.child().check_not_blocked()?;
        drop(edge);
        self.change_children(parent, left).await
    }

    async fn change_children(&self, parent: &Rc<NodeCell>, edges: Vec<Rc<Edge>>) -> Result<()> {
        let names = edges.iter().map(|e| Child::Reference(e.child().name().to_owned())).collect();
        self.graph.apply(Plan::new().then(Step::SetChildren { node: parent.clone(), edges })).await?;
        // A later description of the node is compared with what it is now.
        if let Some(given) = self.given.borrow_mut().get_mut(&parent.id())
            && let DriverSpec::Filter(spec) = &mut given.spec.driver
            && let FilterSpec::Quorum { children, .. } = spec.as_mut()
        {
            *children = names;
        }
        Ok(())
    }
}
