//! The graph as plain data, as it is or as a plan would make it, and the check of its permissions. Pure.
//!
//! What must stay true: for each node, what one parent needs every other parent shares; a node that somebody writes to is
//! writable; there is no cycle. Demands run from the top down: what a node asks of its children depends on what all of
//! its own parents together ask of it. An inactive node (somebody else may be using its image) asks for nothing but reading,
//! nobody may change it, and active nodes are never above it.

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
    /// Whether it is active (after the change).
    pub active: bool,
    /// It tolerates other users of its children, whatever those above it say.
    pub force_share: bool,
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
    /// The name of the parent if that is a node, in the graph or being opened.
    pub above: Option<String>,
    /// Its demand does not count while the child is inactive.
    pub sleeps: bool,
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
            self.put_to_sleep(n, &incoming[n]);
            above[n] = incoming[n].iter().fold(Demand::NOTHING, |all, &e| all.and(self.edges[e].demand));
            self.check_active(n, &incoming[n])?;
            self.check_shared(n, &incoming[n])?;
            let forced = self.nodes[n].force_share;
            if !self.nodes[n].writable && !above[n].needs.common(WRITING).is_empty() {
                self.check_may_turn(n)?;
                self.nodes[n].writable = true;
                turning.push(n);
            }
            for &e in &outgoing[n] {
                let wanted = wants(e, above[n], self.nodes[n].writable);
                let wanted = if self.nodes[n].active { wanted } else { wanted.inactive() };
                let shares = if forced { Perms::ALL } else { wanted.shares };
                self.edges[e].demand = Demand { shares, ..wanted };
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

    /// Those that allow it ask for nothing of an inactive node.
    fn put_to_sleep(&mut self, node: usize, incoming: &[usize]) {
        if !self.nodes[node].active {
            for &e in incoming {
                let edge = &mut self.edges[e];
                edge.demand = if edge.sleeps { Demand::NOTHING } else { edge.demand };
            }
        }
    }

    /// That nobody active is above an inactive node, and nobody changes it.
    fn check_active(&self, node: usize, incoming: &[usize]) -> Result<()> {
        if self.nodes[node].active {
            return Ok(());
        }
        for edge in incoming.iter().rev().map(|&e| &self.edges[e]) {
            let refused = edge.demand.needs.common(WRITING.with(Perms::RESIZE));
            let by = match (edge.parent, &edge.above) {
                (Some(p), _) if self.nodes[p].active => Some(&self.nodes[p].name),
                (None, Some(opening)) if !refused.is_empty() => Some(opening),
                _ => None,
            };
            let message = match by {
                Some(above) => return Err(inactive_child(&self.nodes[node].name, &edge.name, above)),
                None if refused.is_empty() => continue,
                None => {
                    let names: Vec<&str> = refused.names().collect();
                    format!("Permission '{}' unavailable on inactive node", names.join(", "))
                }
            };
            return Err(BlockError::new(ErrorKind::Permission, message).with_errno(BlockError::EPERM));
        }
        Ok(())
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

/// That an inactive node cannot be below an active one.
pub(crate) fn inactive_child(name: &str, edge: &str, above: &str) -> BlockError {
    let message = format!("Inactive '{name}' can't be a {edge} child of active '{above}'");
    BlockError::new(ErrorKind::Permission, message).with_errno(BlockError::EPERM)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CR: Perms = Perms::CONSISTENT_READ;
    const W: Perms = Perms::WRITE;

    fn node(name: &str, writable: bool) -> ShapeNode {
        ShapeNode {
            name: name.to_owned(),
            writable,
            was_writable: writable,
            may_turn: false,
            active: true,
            force_share: false,
        }
    }
    fn edge(parent: Option<usize>, child: usize, needs: Perms, shares: Perms) -> ShapeEdge {
        let label = parent.map_or("an unnamed block device".to_owned(), |p| format!("node 'n{p}'"));
        ShapeEdge {
            name: "root".to_owned(),
            parent,
            label,
            above: parent.map(|p| format!("n{p}")),
            sleeps: false,
            child,
            demand: Demand { needs, shares },
        }
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
    fn a_node_that_is_to_share_does_whatever_those_above_say() {
        let mut s = Shape {
            nodes: vec![ShapeNode { force_share: true, ..node("fmt", false) }, node("file", false)],
            edges: vec![edge(None, 0, CR, CR), edge(Some(0), 1, CR, CR)],
        };
        let found = s.resolve(|_, above, _| Demand { needs: CR, shares: above.shares.without(W) });
        assert_eq!(found.expect("readers").above[1].shares, Perms::ALL);
    }

    #[test]
    fn nobody_changes_an_inactive_node_and_nobody_active_is_above_it() {
        // 0 over 1; a user on 0
        let shape = |active: [bool; 2], needs: Perms, sleeps: bool| Shape {
            nodes: active
                .into_iter()
                .zip(["fmt", "file"])
                .map(|(a, n)| ShapeNode { active: a, ..node(n, true) })
                .collect(),
            edges: vec![ShapeEdge { sleeps, ..edge(None, 0, needs, CR) }, edge(Some(0), 1, CR, CR)],
        };
        let wants = |_: usize, _: Demand, _: bool| Demand { needs: CR.with(W), shares: CR };
        let refused = |s: Shape| {
            let mut s = s;
            s.resolve(wants).expect_err("refused").message().to_owned()
        };
        assert_eq!(
            refused(shape([true, false], CR, false)),
            "Inactive 'file' can't be a root child of active 'fmt'"
        );
        assert_eq!(
            refused(shape([false, false], CR.with(W), false)),
            "Permission 'write' unavailable on inactive node"
        );
        for file in [true, false] {
            let mut quiet = shape([false, file], CR.with(W), true);
            let found = quiet.resolve(wants).expect("it sleeps");
            assert_eq!(found.above[0], Demand::NOTHING);
            assert_eq!(found.above[1], Demand { needs: CR, shares: Perms::ALL });
        }
        assert_eq!(
            shape([true, true], CR.with(W), true).resolve(wants).expect("awake").above[0].needs,
            CR.with(W)
        );
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
