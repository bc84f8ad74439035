//! Nodes described so that another process can make the same again, and made from such a description.
//!
//! A description has its children by name and what it inherited in full, since the parents that it had when it was opened may
//! be gone. What must stay true: a node that was made from its description is described by the same.

use crate::{Backing, DriverSpec, Inherited, NodeSpec, Opener};
use block::Result;
use graph::NodeCell;
use std::rc::Rc;

/// What a node took over from the parent for which it was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Inherits {
    /// `read-only`.
    pub read_only: bool,
    /// `auto-read-only`.
    pub auto_read_only: bool,
    /// `cache.direct`.
    pub direct: bool,
    /// `cache.no-flush`.
    pub no_flush: bool,
    /// `discard=unmap`.
    pub discard: bool,
    /// `force-share`.
    pub force_share: bool,
    /// The monitor added it, not a parent.
    pub monitor_owned: bool,
}

impl From<Inherited> for Inherits {
    fn from(i: Inherited) -> Inherits {
        Inherits {
            read_only: i.read_only,
            auto_read_only: i.auto_read_only,
            direct: i.direct,
            no_flush: i.no_flush,
            discard: i.discard,
            force_share: i.force_share,
            monitor_owned: i.monitor_owned,
        }
    }
}

/// How a node that is there can be made again.
pub struct Description {
    /// How it was described, with the children that it had then.
    pub spec: NodeSpec,
    /// What it took over, and whether it can be written now.
    pub inherits: Inherits,
    /// Its file or socket, whatever the working directory.
    pub place: Option<String>,
    /// Whether it is read-only or not for another reason than its description: a job or the chain it came to be part of.
    pub turned: bool,
}

impl Opener {
    /// How `cell` can be made again; `None` for what jobs put into the graph for themselves.
    pub fn description(&self, cell: &NodeCell) -> Option<Description> {
        let given = self.given.borrow().get(&cell.id()).cloned()?;
        let expected = !given.from.with(&given.spec.common).read_only;
        let mut inherits = Inherits::from(given.from);
        inherits.monitor_owned = cell.is_monitor_owned();
        let writable = cell.is_writable() && !cell.has_turned() && !cell.is_lent();
        // what could not be opened for writing is tried again
        let turned = writable != expected && (writable || !cell.options().auto_read_only);
        if turned {
            inherits.read_only = !writable;
        }
        Some(Description { spec: given.spec, inherits, place: given.place, turned })
    }

    /// Makes a node as it was. Its children are there, and `spec` names them.
    ///
    /// # Errors
    /// As [`Opener::open`].
    pub async fn again(&self, spec: &NodeSpec, inherits: Inherits) -> Result<Rc<NodeCell>> {
        let from = Inherited {
            read_only: inherits.read_only,
            auto_read_only: inherits.auto_read_only,
            direct: inherits.direct,
            no_flush: inherits.no_flush,
            discard: inherits.discard,
            force_share: inherits.force_share,
            monitor_owned: inherits.monitor_owned,
            again: true,
            inactive: false,
            file_inactive: false,
        };
        debug_assert!(!implies_others(spec), "a description names all children");
        let opened = self.node(spec, from, &crate::Trail::default()).await;
        if opened.is_err() {
            self.graph.settle().await;
        }
        opened
    }
}

fn implies_others(spec: &NodeSpec) -> bool {
    matches!(&spec.driver, DriverSpec::Qcow2(q) if matches!(q.backing, Backing::Implicit))
}
