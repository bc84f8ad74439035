//! The graph of a disk: nodes, the edges between them, and how it changes while requests run.
//!
//! What can happen: a client writes while a job copies, a filter is inserted, a node is replaced, an image is resized.
//! What must stay true:
//! * A [`Node`] holds [`Edge`]s, never nodes. Every request crosses an edge, and the edge is the checked border: bounds,
//!   alignment, permission, gate.
//! * A request holds a *pass* on each edge it is in. The graph changes only in [`Graph::apply`], which closes the gates
//!   of the touched edges, waits until no pass is out, swaps, and reopens. Nothing else is ever held while waiting
//!   but passes, range locks and window slots.
//! * A [`Plan`] is checked as a whole (permissions of the *result*, by a pure function) before anything is touched, and
//!   has no partial result.
//! * All of this is one thread's: no locks, no atomics, and no order that depends on hashing or addresses.
#![forbid(unsafe_code)]

mod active;
mod ahead;
pub mod bitmaps;
mod cell;
mod debug_event;
mod edge;
pub mod exclusion;
pub mod gate;
mod link;
pub mod node;
pub mod perm;
mod plan;
pub mod shape;
mod shortcut;
mod tree;
pub mod walk;
mod watch;

pub use ahead::{Admitted, WriteAhead};
pub use cell::{Blocker, Counters, DetectZeroes, NodeCell, NodeOptions};
pub use debug_event::DebugEvent;
pub use edge::{Edge, Parent, Role};
pub use link::{Link, LinkState, format_over_link, links_below};
pub use node::{CopyRecord, Fact, HostBytes, Node, NodeDetails, SnapshotDetails};
pub use perm::{Demand, Perms};
pub use plan::{Plan, Step};
pub use shortcut::{Shortcut, Skippable};
pub use tree::{Graph, Keeper, MAX_NODE_NAME, Quiesced, WeakGraph};
