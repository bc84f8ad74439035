//! The daemon as records, from which [`super::restore`] makes it again.
//!
//! What must stay true: a record says all that is needed, whatever else is there or gone; a daemon that was restored is
//! described by the same records. Nodes have their children by name, as they are now; what jobs put in front of nodes for as
//! long as they run is looked through.

use super::{Recorder, Said};
use crate::Daemon;
use ::state::Tables;
use drivers::file::Locking;
use env::{Address, Family};
use graph::{DetectZeroes, Edge, NodeCell, Parent};
use open::{Description, DriverSpec, NodeSpec};
use qapi::{Map, Value, json};
use replication::session::CloneNode;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;

/// Members of a description that name children.
const CHILDREN: [&str; 9] =
    ["file", "backing", "data-file", "image", "log", "raw", "test", "target", "children"];

type Rows = BTreeMap<String, Vec<u8>>;

fn row(rows: &mut Rows, key: &str, value: &Value) {
    rows.insert(key.to_owned(), value.to_string().into_bytes());
}

impl Recorder {
    /// All that is to be recorded.
    pub(super) fn describe(&self, daemon: &Daemon) -> Tables {
        let mut out = Tables::new();
        let objects = out.entry("objects".to_owned()).or_default();
        for (order, (id, kind, properties)) in daemon.objects().described().into_iter().enumerate() {
            row(objects, &id, &json!({"order": order, "qom-type": kind, "properties": properties}));
        }
        out.insert("nodes".to_owned(), self.describe_nodes(daemon));
        out.insert("groups".to_owned(), self.describe_groups(daemon));
        let server = out.entry("server".to_owned()).or_default();
        if daemon.exports().server_address().is_some()
            && let Some(said) = &*self.server.borrow()
        {
            row(server, "nbd", &command(said, 0));
        }
        out.insert("exports".to_owned(), self.describe_exports(daemon));
        out.insert("jobs".to_owned(), self.describe_jobs(daemon));
        out.insert("leaving".to_owned(), self.describe_leaving(daemon));
        let options = out.entry("options".to_owned()).or_default();
        for (key, last) in &*self.options.borrow() {
            row(options, key, &json!({"last": last}));
        }
        for broken in &*self.broken.borrow() {
            let table = out.entry(broken.table.to_owned()).or_default();
            table.entry(broken.key.clone()).or_insert_with(|| broken.record.clone());
        }
        out
    }

    fn describe_nodes(&self, daemon: &Daemon) -> Rows {
        let mut rows = Rows::new();
        let described: Vec<_> = daemon
            .graph()
            .nodes()
            .into_iter()
            .filter_map(|cell| daemon.opener().description(&cell).map(|d| (cell, d)))
            .collect();
        let used = self.used(daemon);
        for (order, (cell, description)) in described.iter().enumerate() {
            if !used.contains(&cell.id()) {
                continue;
            }
            let mut record = Map::new();
            record.insert("order".into(), json!(order));
            record.insert("options".into(), Value::Object(options(cell, description)));
            record.insert("children".into(), Value::Object(children(daemon, cell)));
            let i = &description.inherits;
            record.insert("owned".into(), json!(i.monitor_owned));
            record.insert(
                "inherits".into(),
                json!({"read-only": i.read_only, "auto-read-only": i.auto_read_only, "cache.direct": i.direct,
                    "cache.no-flush": i.no_flush, "discard": i.discard, "force-share": i.force_share}),
            );
            if cell.write_threshold() > 0 {
                record.insert("write-threshold".into(), json!(cell.write_threshold()));
            }
            row(&mut rows, cell.name(), &Value::Object(record));
        }
        rows
    }

    /// Numbers of the nodes that somebody owns or uses, and of those below them. The others are about to go, belong to a node
    /// that is still being opened and may never come to be, or are held by a job alone that a later life does not have: one
    /// that has done its work, or whose command is not done. Nobody could get rid of them in that life.
    fn used(&self, daemon: &Daemon) -> BTreeSet<u64> {
        let jobs = daemon.jobs().list();
        let over = |id: &str| jobs.iter().any(|j| j.id() == id && j.body().is_some_and(|b| b.has_changed()));
        let outside = |edge: &Rc<Edge>| match edge.parent() {
            Parent::Node(_) => false,
            Parent::Job { id, .. } => self.jobs.borrow().contains_key(id) && !over(id),
            Parent::Backend(_) => true,
        };
        let mut left: Vec<Rc<NodeCell>> = daemon.graph().nodes();
        let owned = |cell: &NodeCell| cell.is_monitor_owned() && !cell.is_tentative();
        left.retain(|cell| owned(cell) || cell.parents().iter().any(outside));
        let mut used = BTreeSet::new();
        while let Some(cell) = left.pop() {
            if used.insert(cell.id()) {
                left.extend(cell.node().edges().iter().map(|edge| edge.child()));
            }
        }
        used
    }

    fn describe_exports(&self, daemon: &Daemon) -> Rows {
        let mut rows = Rows::new();
        let said = self.exports.borrow();
        let here: Vec<_> = daemon.exports().query().into_iter().rev().collect();
        for (order, export) in here.iter().enumerate() {
            let Some(said) = said.get(&export.id).filter(|_| !export.shutting_down) else { continue };
            let mut said = said.clone();
            let node = daemon.graph().find(&export.node_name).map(|c| through_jobs(daemon, &c));
            if node.as_ref().is_some_and(|c| c.node().as_any().is::<CloneNode>()) {
                continue; // what it shows does not survive either
            }
            let node = node.map_or_else(|| export.node_name.clone(), |c| c.name().to_owned());
            if said.command == "nbd-server-add" {
                // without a name it has that of its node, which may be another by now
                said.arguments.insert("name".into(), json!(export.id));
                said.arguments.insert("device".into(), json!(node));
            } else {
                let named = said.arguments.get("name").cloned();
                let name = named.or_else(|| said.arguments.get("node-name").cloned()).unwrap_or_default();
                if export.kind == "nbd" {
                    said.arguments.insert("name".into(), name);
                }
                said.arguments.insert("node-name".into(), json!(node));
            }
            row(&mut rows, &export.id, &command(&said, order));
        }
        rows
    }
}

fn command(said: &Said, order: usize) -> Value {
    json!({"order": order, "command": said.command, "arguments": said.arguments})
}

/// The node itself, or what is behind the filters of jobs in front of it.
pub(super) fn through_jobs(daemon: &Daemon, cell: &Rc<NodeCell>) -> Rc<NodeCell> {
    let mut cell = cell.clone();
    while daemon.opener().description(&cell).is_none() {
        let Some(edge) = cell.node().filtered() else { break };
        cell = edge.child();
    }
    cell
}

/// The node's own options, as `blockdev-add` has them, without children.
fn options(cell: &NodeCell, description: &Description) -> Map<String, Value> {
    let spec = &description.spec;
    let mut out = match &spec.common.given.0 {
        Some(given) => (**given).clone(),
        None => written(spec),
    };
    out.retain(|key, _| !CHILDREN.contains(&key.as_str()));
    out.insert("node-name".into(), json!(cell.name()));
    if description.turned {
        let read_only = json!(description.inherits.read_only);
        out.entry("read-only").and_modify(|v| *v = read_only);
    }
    match (cell.is_active(), out.contains_key("active")) {
        (false, _) => drop(out.insert("active".into(), json!(false))),
        (true, true) => drop(out.insert("active".into(), json!(true))),
        (true, false) => {}
    }
    if let Some(place) = &description.place {
        match &spec.driver {
            DriverSpec::Nbd(_) => {
                if let Some(Value::Object(server)) = out.get_mut("server") {
                    server.insert("path".into(), json!(place));
                }
            }
            _ => drop(out.insert("filename".into(), json!(place))),
        }
    }
    out
}

/// Options of a node that no user described: what images name, and what jobs open.
fn written(spec: &NodeSpec) -> Map<String, Value> {
    let mut out = Map::new();
    let mut set = |key: &str, value: Value| drop(out.insert(key.to_owned(), value));
    match &spec.driver {
        DriverSpec::File(f) | DriverSpec::HostDevice(f) => {
            let device = matches!(&spec.driver, DriverSpec::HostDevice(_));
            set("driver", json!(if device { "host_device" } else { "file" }));
            set("filename", json!(f.filename));
            match f.locking {
                Locking::Auto => {}
                Locking::On => set("locking", json!("on")),
                Locking::Off => set("locking", json!("off")),
            }
            if f.threads {
                set("aio", json!("threads"));
            }
            if f.native {
                set("aio", json!("native"));
            }
        }
        DriverSpec::Raw { offset, size, .. } => {
            set("driver", json!("raw"));
            if *offset > 0 {
                set("offset", json!(offset));
            }
            if let Some(size) = size {
                set("size", json!(size));
            }
        }
        DriverSpec::Nbd(nbd) => {
            set("driver", json!("nbd"));
            set("server", address(&nbd.options.server));
            set("export", json!(nbd.options.export));
            set("reconnect-delay", json!(nbd.options.reconnect_delay));
            set("open-timeout", json!(nbd.options.open_timeout));
        }
        // images that other images name, and those that commands make: their options are the defaults
        _ => set("driver", json!("qcow2")),
    }
    let c = &spec.common;
    if let Some(on) = c.read_only {
        set("read-only", json!(on));
    }
    if let Some(on) = c.auto_read_only {
        set("auto-read-only", json!(on));
    }
    if let Some(unmap) = c.discard {
        set("discard", json!(if unmap { "unmap" } else { "ignore" }));
    }
    match c.detect_zeroes {
        DetectZeroes::Off => {}
        DetectZeroes::On => set("detect-zeroes", json!("on")),
        DetectZeroes::Unmap => set("detect-zeroes", json!("unmap")),
    }
    if c.force_share {
        set("force-share", json!(true));
    }
    let cache: Map<String, Value> = [("direct", c.direct), ("no-flush", c.no_flush)]
        .into_iter()
        .filter_map(|(key, on)| Some((key.to_owned(), json!(on?))))
        .collect();
    if !cache.is_empty() {
        set("cache", Value::Object(cache));
    }
    out
}

pub(super) fn address(at: &Address) -> Value {
    match at {
        Address::Tcp { host, port, family } => {
            let mut inet = json!({"type": "inet", "host": host, "port": port.to_string()});
            match family {
                Family::Any => {}
                Family::V4 => inet["ipv4"] = json!(true),
                Family::V6 => inet["ipv6"] = json!(true),
            }
            inet
        }
        Address::Unix(path) => json!({"type": "unix", "path": path.to_string_lossy()}),
        Address::Fd(n) => json!({"type": "fd", "str": n.to_string()}),
        _ => Value::Null,
    }
}

/// The names of the node's children, as members of its description.
fn children(daemon: &Daemon, cell: &Rc<NodeCell>) -> Map<String, Value> {
    let mut out = Map::new();
    let mut several = Vec::new();
    for edge in cell.node().edges() {
        let name = json!(through_jobs(daemon, &edge.child()).name());
        match edge.name() {
            key if key.starts_with("children.") => several.push(name),
            key => drop(out.insert(key.to_owned(), name)),
        }
    }
    if !several.is_empty() {
        out.insert("children".into(), Value::Array(several));
    }
    // whatever the header says
    if cell.node().driver() == "qcow2" && !out.contains_key("backing") {
        out.insert("backing".into(), Value::Null);
    }
    out
}

/// Lets file names in arguments of commands say the same whatever the working directory of the next life is.
pub(super) fn make_absolute(daemon: &Daemon, arguments: &mut Map<String, Value>) {
    let env = daemon.env();
    for (key, value) in arguments {
        match value {
            Value::String(path)
                if matches!(key.as_str(), "path" | "dir" | "filename" | "mountpoint") && !path.is_empty() =>
            {
                *path = env.absolute(Path::new(path.as_str())).to_string_lossy().into_owned();
            }
            Value::Object(map) if matches!(key.as_str(), "addr" | "data") => make_absolute(daemon, map),
            _ => {}
        }
    }
}
