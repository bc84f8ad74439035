//! What the daemon shows of its nodes.

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::Reply;
use crate::info;
use graph::{Edge, NodeCell, Parent};
use qapi::{Map, Value, json};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[
    entry::<QueryNamedBlockNodes>(),
    entry::<QueryBlock>(),
    entry::<QueryBlockstats>(),
    entry::<XDebugQueryBlockGraph>(),
];

/// All nodes, newest first.
#[derive(Deserialize)]
struct QueryNamedBlockNodes {
    #[serde(default)]
    flat: bool,
}

impl Command for QueryNamedBlockNodes {
    const NAME: &'static str = "query-named-block-nodes";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let mut out = Vec::new();
        for cell in daemon.graph().nodes().iter().rev() {
            out.push(info::node(cell, self.flat).await?);
        }
        Ok(Value::Array(out))
    }
}

/// Guest devices: a storage daemon has none.
#[derive(Deserialize)]
struct QueryBlock {}

impl Command for QueryBlock {
    const NAME: &'static str = "query-block";
    async fn run(self, _: Rc<Daemon>) -> Reply {
        Ok(json!([]))
    }
}

/// Counters: of guest devices (none), or of all nodes.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct QueryBlockstats {
    #[serde(default)]
    query_nodes: bool,
}

impl Command for QueryBlockstats {
    const NAME: &'static str = "query-blockstats";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        if !self.query_nodes {
            return Ok(json!([]));
        }
        Ok(daemon.graph().nodes().iter().map(info::stats).collect())
    }
}

/// Nodes, their users, and what those may do: for people who look for a conflict.
#[derive(Deserialize)]
struct XDebugQueryBlockGraph {}

impl Command for XDebugQueryBlockGraph {
    const NAME: &'static str = "x-debug-query-block-graph";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        Ok(GraphPicture::of(&daemon.graph().nodes()))
    }
}

/// The answer of `x-debug-query-block-graph` while it grows.
#[derive(Default)]
struct GraphPicture {
    nodes: Vec<Value>,
    edges: Vec<Value>,
    by_name: BTreeMap<String, usize>,
}

impl GraphPicture {
    fn of(cells: &[Rc<NodeCell>]) -> Value {
        let mut picture = GraphPicture::default();
        for cell in cells.iter().rev() {
            let id = picture.node(cell.name(), "block-driver");
            picture.by_name.insert(cell.name().to_owned(), id);
        }
        let mut jobs = BTreeMap::new();
        for cell in cells.iter().rev() {
            for edge in cell.parents() {
                let parent = match edge.parent() {
                    Parent::Node(name) => {
                        name.borrow().as_ref().and_then(|n| picture.by_name.get(n).copied())
                    }
                    Parent::Job { id, .. } => {
                        let known = jobs.get(id).copied();
                        let at = known.unwrap_or_else(|| picture.node(id, "block-job"));
                        jobs.insert(id.clone(), at);
                        Some(at)
                    }
                    Parent::Backend(_) => Some(picture.node("", "block-backend")),
                };
                // an edge of a node that is being opened has no parent yet
                if let (Some(parent), Some(child)) = (parent, picture.by_name.get(cell.name()).copied()) {
                    picture.edge(&edge, parent, child);
                }
            }
        }
        json!({"edges": picture.edges, "nodes": picture.nodes})
    }

    fn node(&mut self, name: &str, kind: &str) -> usize {
        let id = self.nodes.len() + 1;
        self.nodes.push(json!({"name": name, "type": kind, "id": id}));
        id
    }

    fn edge(&mut self, edge: &Edge, parent: usize, child: usize) {
        let names = |p: graph::Perms| {
            let mut names: Vec<_> = p.names().collect();
            names.reverse();
            json!(names)
        };
        let mut out = Map::new();
        out.insert("name".into(), edge.name().into());
        out.insert("parent".into(), parent.into());
        out.insert("shared-perm".into(), names(edge.demand().shares));
        out.insert("perm".into(), names(edge.demand().needs));
        out.insert("child".into(), child.into());
        self.edges.push(Value::Object(out));
    }
}
