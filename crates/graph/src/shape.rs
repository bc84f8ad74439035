//! The graph as plain data, as it is or as a plan would make it, and the check of its permissions. Pure.
//!
//! What must stay true: for each node, what one parent needs every other parent shares; a node that somebody writes to is
//! writable; there is no cycle. Demands run from the top down: what a node asks of its children depends on what all of
//! its own parents together ask of it.

use crate::perm::{Demand, Perms};
use block::{BlockError, ErrorKind, Result};

/// Permissions of which each needs a writable node.
pub(crate) const WRITING: Perms = Perms::WRITE.with(Perms::WRITE_UNCHANGED);

/// A node.
#[derive(Clone, Debug)]
pub struct ShapeNode {
    /// Node name.
    pub name: String,
    /// Whether writes are possible (after the change).
    pub writable: bool,
    /// Whether they are possible before it.
    pub was_writable: bool,
    /// Whether it turns writable by itself when somebody wants to write (`auto-read-only`).
    pub may_turn: bool,
}

/// An edge onto a node.
#[derive(Clone, Debug)]
pub struct ShapeEdge {
    /// Name (`file`, `backing`, `root` …).
    pub name: String,
    /// Index of the parent node, if the parent is a node of the graph.
    pub parent: Option<usize>,
    /// The parent in messages: `node 'a'`, `an unnamed block device`.
    pub label: String,
    /// Index of the child.
    pub child: usize,
    /// What it asks for. For edges of nodes this is computed.
    pub demand: Demand,
}

/// Nodes and edges, both oldest first.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// The nodes.
    pub nodes: Vec<ShapeNode>,
    /// The edges.
    pub edges: Vec<ShapeEdge>,
}

/// What [`Shape::resolve`] found.
#[derive(Debug, Default)]
pub struct Resolved {
    /// For each node, what its parents together ask.
    pub above: Vec<Demand>,
    /// Node indices, every parent before its children.
    pub order: Vec<usize>,
    /// Nodes that have to turn writable, because somebody wants to write and they may.
    pub turning: Vec<usize>,
}

impl Shape {
    /// Computes the demands of all edges of nodes with `wants(edge, above, writable)`, and checks the result.
    pub fn resolve(&mut self, wants: impl Fn(usize, Demand, bool) -> Demand) -> Result<Resolved> {
        let mut incoming = vec![Vec::new(); self.nodes.len()];
        self.edges.iter().enumerate().for_each(|(i, e)| incoming[e.child].push(i));
        let outgoing = self.outgoing();
        let order = self.top_down(&outgoing)?;
        let mut above = vec![Demand::NOTHING; self.nodes.len()];
        let mut turning = Vec::new();
        for &n in &order {
            above[n] = incoming[n].iter().fold(Demand::NOTHING, |all, &e| all.and(self.edges[e].demand));
            self.check_shared(n, &incoming[n])?;
            if !self.nodes[n].writable && !above[n].needs.common(WRITING).is_empty() {
                self.check_may_turn(n)?;
                self.nodes[n].writable = true;
                turning.push(n);
            }
            for &e in &outgoing[n] {
                self.edges[e].demand = wants(e, above[n], self.nodes[n].writable);
            }
        }
        Ok(Resolved { above, order, turning })
    }

    /// Node indices, every parent before its children; an error if there is a cycle.
    pub fn order(&self) -> Result<Vec<usize>> {
        self.top_down(&self.outgoing())
    }

    /// For each node, the edges it holds.
    fn outgoing(&self) -> Vec<Vec<usize>> {
        let mut outgoing = vec![Vec::new(); self.nodes.len()];
        for (i, e) in self.edges.iter().enumerate() {
            if let Some(p) = e.parent {
                outgoing[p].push(i);
            }
        }
        outgoing
    }

    /// Every parent before its children; an error if there is a cycle.
    fn top_down(&self, outgoing: &[Vec<usize>]) -> Result<Vec<usize>> {
        let mut waiting: Vec<usize> = vec![0; self.nodes.len()];
        self.edges.iter().filter(|e| e.parent.is_some()).for_each(|e| waiting[e.child] += 1);
        let mut order: Vec<usize> = (0..self.nodes.len()).filter(|&n| waiting[n] == 0).collect();
        let mut at = 0;
        while let Some(&n) = order.get(at) {
            at += 1;
            for child in outgoing[n].iter().map(|&e| self.edges[e].child) {
                waiting[child] -= 1;
                if waiting[child] == 0 {
                    order.push(child);
                }
            }
        }
        if order.len() == self.nodes.len() {
            return Ok(order);
        }
        let looped = waiting.iter().position(|w| *w > 0).map_or("", |n| self.nodes[n].name.as_str());
        Err(BlockError::invalid(format!("node '{looped}' would become part of a cycle")))
    }

    fn check_shared(&self, node: usize, incoming: &[usize]) -> Result<()> {
        // Newest first, as QSD finds conflicts.
        for &a in incoming.iter().rev() {
            for &b in incoming.iter().rev().filter(|&&b| b != a) {
                let refused = self.edges[b].demand.needs.without(self.edges[a].demand.shares);
                if !refused.is_empty() {
                    return Err(self.conflict(node, refused, b, a));
                }
            }
        }
        Ok(())
    }

    fn check_may_turn(&self, node: usize) -> Result<()> {
        let node = &self.nodes[node];
        let message = match (node.may_turn, node.was_writable) {
            (true, _) => return Ok(()),
            (_, true) => format!("Read-only block node '{}' cannot support read-write users", node.name),
            (_, false) => "Block node is read-only".to_owned(),
        };
        Err(BlockError::new(ErrorKind::ReadOnly, message))
    }

    fn conflict(&self, node: usize, perms: Perms, needer: usize, refuser: usize) -> BlockError {
        let name = &self.nodes[node].name;
        let list: Vec<String> = perms.names().map(|p| p.replace('-', " ")).collect();
        let user = |e: usize| {
            format!("{} (uses node '{name}' as '{}' child)", self.edges[e].label, self.edges[e].name)
        };
        BlockError::new(
            ErrorKind::Busy,
            format!(
                "Permission conflict on node '{name}': permissions '{}' are both required by {} and unshared by {}.",
                list.join(", "),
                user(needer),
                user(refuser)
            ),
        )
        .with_errno(BlockError::EPERM)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CR: Perms = Perms::CONSISTENT_READ;
    const W: Perms = Perms::WRITE;

    fn node(name: &str, writable: bool) -> ShapeNode {
        ShapeNode { name: name.to_owned(), writable, was_writable: writable, may_turn: false }
    }
    fn edge(parent: Option<usize>, child: usize, needs: Perms, shares: Perms) -> ShapeEdge {
        let label = parent.map_or("an unnamed block device".to_owned(), |p| format!("node 'n{p}'"));
        ShapeEdge { name: "root".to_owned(), parent, label, child, demand: Demand { needs, shares } }
    }

    #[test]
    fn a_conflict_names_both_sides_as_qsd_does() {
        let mut s = Shape {
            nodes: vec![node("d", true)],
            edges: vec![edge(None, 0, W, Perms::WRITE_UNCHANGED), edge(None, 0, CR.with(W), Perms::ALL)],
        };
        let e = s.resolve(|_, _, _| Demand::NOTHING).expect_err("the first does not share");
        assert_eq!(
            e.message(),
            "Permission conflict on node 'd': permissions 'consistent read, write' are both required by an unnamed \
             block device (uses node 'd' as 'root' child) and unshared by an unnamed block device (uses node 'd' as \
             'root' child)."
        );
    }

    #[test]
    fn demands_run_down_and_meet_at_the_bottom() {
        // 0 over 1, and a writer on 0; whoever reads 1 beside it must share writes
        let shape = |shares: Perms| Shape {
            nodes: vec![node("fmt", true), node("file", true)],
            edges: vec![
                edge(None, 0, CR.with(W), Perms::ALL),
                edge(Some(0), 1, CR, CR),
                edge(None, 1, CR, shares),
            ],
        };
        let wants = |_: usize, above: Demand, _: bool| Demand { needs: above.needs, shares: CR };
        let found = shape(Perms::ALL).resolve(wants).expect("the reader shares everything");
        assert_eq!(found.order, [0, 1]);
        assert_eq!(found.above[1].needs, CR.with(W));
        shape(CR).resolve(wants).expect_err("the reader does not share writes");
    }

    #[test]
    fn writers_need_a_writable_node() {
        let mut s = Shape { nodes: vec![node("d", false)], edges: vec![edge(None, 0, W, Perms::ALL)] };
        assert_eq!(s.resolve(|_, d, _| d).expect_err("read-only").message(), "Block node is read-only");
    }

    #[test]
    fn nodes_turn_writable_only_where_they_may() {
        // 0 over 1; what 0 asks for follows from whether it turned
        let shape = |may_turn: bool, was_writable: bool| Shape {
            nodes: vec![ShapeNode { may_turn, was_writable, ..node("fmt", false) }, node("file", true)],
            edges: vec![edge(None, 0, CR.with(W), Perms::ALL), edge(Some(0), 1, CR, CR)],
        };
        let wants = |_: usize, _: Demand, writable: bool| Demand {
            needs: if writable { CR.with(W) } else { CR },
            shares: CR,
        };
        let found = shape(true, false).resolve(wants).expect("it may");
        assert_eq!((found.turning, found.above[1].needs), (vec![0], CR.with(W)));
        let refused = |was| shape(false, was).resolve(wants).expect_err("it may not").message().to_owned();
        assert_eq!(refused(false), "Block node is read-only");
        assert_eq!(refused(true), "Read-only block node 'fmt' cannot support read-write users");
    }

    #[test]
    fn cycles_are_refused() {
        let mut s = Shape {
            nodes: vec![node("a", true), node("b", true)],
            edges: vec![edge(Some(0), 1, CR, Perms::ALL), edge(Some(1), 0, CR, Perms::ALL)],
        };
        s.resolve(|_, d, _| d).expect_err("a loop");
    }
}
