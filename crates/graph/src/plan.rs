//! A change of the graph as data: it can be printed, checked as a whole, and refused as a whole.

use crate::cell::{NodeCell, NodeOptions};
use crate::edge::Edge;
use crate::perm::Demand;
use std::rc::Rc;

/// One step of a [`Plan`].
#[derive(Clone)]
pub enum Step {
    /// Points an edge at another node.
    Point {
        /// The edge.
        edge: Rc<Edge>,
        /// Its new child.
        to: Rc<NodeCell>,
    },
    /// Points all edges onto `from` at `to`, but those in `except` and those of `to` itself and of nodes below `to`.
    MoveParents {
        /// The node that loses its parents.
        from: Rc<NodeCell>,
        /// The node that gets them.
        to: Rc<NodeCell>,
        /// Edges that stay.
        except: Vec<Rc<Edge>>,
    },
    /// Gives a copy-on-write format another layer below, or none. The edge is made by [`crate::Graph::attach_exact`].
    SetBacking {
        /// The format.
        node: Rc<NodeCell>,
        /// The edge it gets.
        edge: Option<Rc<Edge>>,
    },
    /// Gives a node that has any number of equal children ([`crate::Node::set_children`]) others. New edges are made by
    /// [`crate::Graph::attach_exact`].
    SetChildren {
        /// The node.
        node: Rc<NodeCell>,
        /// All its edges from now on.
        edges: Vec<Rc<Edge>>,
    },
    /// Turns a node read-write or read-only.
    Writable {
        /// The node.
        node: Rc<NodeCell>,
        /// Whether writes are possible afterwards.
        on: bool,
    },
    /// Gives a node's image up to somebody else, or takes it back ([`crate::Node::set_active`]).
    Active {
        /// The node.
        node: Rc<NodeCell>,
        /// Whether it is active afterwards.
        on: bool,
    },
    /// Gives a node other options of those that every node has. Its name, its owner, and whether it is writable now stay.
    Options {
        /// The node.
        node: Rc<NodeCell>,
        /// Its options from now on.
        options: NodeOptions,
    },
    /// Changes what an edge held by a job or export asks for.
    Ask {
        /// The edge.
        edge: Rc<Edge>,
        /// Its new demand.
        demand: Demand,
    },
    /// From now on whoever attaches to `node` by name gets `filter` (or the node itself again).
    Cover {
        /// The node.
        node: Rc<NodeCell>,
        /// The filter in front of it.
        filter: Option<Rc<NodeCell>>,
    },
    /// Calls `what` at the moment of the swap: nobody is inside the edges that the plan moves. It must not wait or fail.
    At {
        /// What is to happen at that instant.
        what: Rc<dyn Fn()>,
        /// What takes it back; without it the plan cannot be taken back any more.
        undo: Option<Rc<dyn Fn()>>,
    },
}

/// Steps that happen together or not at all.
#[derive(Clone, Default)]
pub struct Plan {
    /// In order; later ones see the effect of earlier ones.
    pub steps: Vec<Step>,
    /// See [`Plan::kept_later`].
    pub(crate) kept_later: bool,
}

impl Plan {
    /// Nothing to do.
    pub fn new() -> Plan {
        Plan::default()
    }

    /// The plan as a part of something larger, whose author keeps all users still until [`crate::Graph::keep`] has made the whole
    /// durable: the part alone is not written down.
    #[must_use]
    pub fn kept_later(mut self) -> Plan {
        self.kept_later = true;
        self
    }

    /// The plan with one more step.
    #[must_use]
    pub fn then(mut self, step: Step) -> Plan {
        self.steps.push(step);
        self
    }
}

impl std::fmt::Debug for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Step::Point { edge, to } => write!(f, "point {}#{} at {}", edge.name(), edge.id(), to.name()),
            Step::MoveParents { from, to, .. } => {
                write!(f, "move parents of {} to {}", from.name(), to.name())
            }
            Step::SetBacking { node, edge } => {
                let child = edge.as_ref().map(|e| e.child().name().to_owned());
                write!(f, "backing of {} becomes {child:?}", node.name())
            }
            Step::SetChildren { node, edges } => {
                let names: Vec<String> = edges.iter().map(|e| e.child().name().to_owned()).collect();
                write!(f, "children of {} become {names:?}", node.name())
            }
            Step::Writable { node, on } => write!(f, "{} writable: {on}", node.name()),
            Step::Active { node, on } => write!(f, "{} active: {on}", node.name()),
            Step::Options { node, options } => write!(f, "{} gets {options:?}", node.name()),
            Step::Ask { edge, demand } => write!(f, "{}#{} asks {demand:?}", edge.name(), edge.id()),
            Step::Cover { node, filter } => {
                write!(f, "{} covered by {:?}", node.name(), filter.as_ref().map(|c| c.name().to_owned()))
            }
            Step::At { .. } => write!(f, "an instant is taken"),
        }
    }
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.steps).finish()
    }
}
