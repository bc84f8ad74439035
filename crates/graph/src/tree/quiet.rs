//! Keeping requests out for a while.

use super::Graph;
use crate::cell::NodeCell;
use crate::edge::{Edge, Parent};
use crate::gate::Closed;
use std::collections::BTreeSet;
use std::rc::Rc;

impl Graph {
    /// Keeps the requests of all users above `cells` out, through whatever layers they come, and waits until those under way
    /// have ended; they go on when the value is dropped. Until then the contents of all of `cells` stand still together, and
    /// the graph may still be changed. Nodes between are not kept out: what the caller attaches above them has to get through,
    /// to flush an image whose file is one of `cells`, for example. Who attaches meanwhile is not kept out: the caller sees to
    /// it that nobody does.
    pub async fn freeze(&self, cells: &[Rc<NodeCell>]) -> Quiesced {
        let _turn = self.changing.acquire(1).await;
        let (mut seen, mut edges) = (BTreeSet::new(), Vec::new());
        cells.iter().for_each(|c| self.collect_above(c, &mut seen, &mut edges));
        let mut gates = Vec::with_capacity(edges.len());
        for edge in edges {
            gates.push(Closed::close(edge).await);
        }
        Quiesced { gates }
    }

    /// All edges of users above `cell` that are not in yet, those of a node always before those of what is below it.
    fn collect_above(&self, cell: &Rc<NodeCell>, seen: &mut BTreeSet<u64>, edges: &mut Vec<Rc<Edge>>) {
        if !seen.insert(cell.id()) {
            return;
        }
        let parents = cell.parents();
        for above in parents.iter().filter_map(|e| e.parent_node()).filter_map(|name| self.find(&name)) {
            self.collect_above(&above, seen, edges);
        }
        edges.extend(parents.into_iter().filter(|e| !matches!(e.parent(), Parent::Node(_))));
    }

    /// Keeps all requests of `cell`'s parents out and waits until those inside have ended; they go on when the value is
    /// dropped. Parents that attach meanwhile are not kept out: attach to a covered node instead.
    pub async fn quiesce(&self, cell: &Rc<NodeCell>, except: &[Rc<Edge>]) -> Quiesced {
        let mut gates = Vec::new();
        for edge in cell.parents() {
            if !except.iter().any(|e| e.id() == edge.id()) {
                gates.push(Closed::close(edge).await);
            }
        }
        Quiesced { gates }
    }
}

/// Closed gates; see [`Graph::quiesce`].
pub struct Quiesced {
    gates: Vec<Closed<Edge>>,
}

impl Quiesced {
    /// How many edges are kept quiet.
    pub fn edges(&self) -> usize {
        self.gates.len()
    }
}
