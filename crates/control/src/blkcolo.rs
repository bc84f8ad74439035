//! Driver `blkcolo`: a node that is a replicated disk, with a replication group of its own behind it (docs/decisions/0037).
//!
//! The group is made by the commands that make any group, so all `replication-*` commands know it. What must stay true: a node that
//! could not be given its role is not there, and nothing of its group; when the node goes, the group goes with it, and gives nothing up.

use crate::Daemon;
use crate::blockdev::{COMMON, Fields, child};
use crate::error::QmpError;
use block::{BlockError, ErrorKind};
use drivers::filters::replication::Stage;
use env::Address;
use graph::NodeCell;
use open::{BlkcoloAddress, BlkcoloSpec, DriverSpec};
use qapi::{Map, Value, json};
use replication::session::{Acting, Group, Remembered};
use std::rc::{Rc, Weak};

/// What goes on to `replication-group-add` as it is.
const OF_GROUP: [&str; 4] = ["engine", "retain", "tls", "fencing"];
/// What goes on to `replication-start` as it is, of a primary.
const OF_PRIMARY: [&str; 6] =
    ["write-level", "flush-level", "min-acks", "on-link-loss", "timeout-ms", "checkpoint-interval-ms"];

/// The node that the options describe.
pub(crate) fn driver(f: &Fields<'_>, depth: usize) -> Result<DriverSpec, QmpError> {
    let own = |key: &&String| !COMMON.contains(&key.as_str()) && !matches!(key.as_str(), "file" | "filename");
    let mut options: Map<String, Value> =
        f.0.keys().filter(own).map(|k| (k.clone(), f.0[k].clone())).collect();
    let Some(name) = f.text("filename") else {
        let missing = ["file", "host", "port"].into_iter().find(|key| !f.0.contains_key(*key));
        if let Some(key) = missing {
            let why = format!("Parameter '{key}' is missing (or 'filename', blkcolo:HOST:PORT:/PATH)");
            return Err(QmpError::generic(why));
        }
        place(&Fields(&options))?;
        return Ok(DriverSpec::Blkcolo(BlkcoloSpec {
            file: child(f, "file", depth)?,
            options: Rc::new(options),
        }));
    };
    if let Some(key) = ["file", "host", "port"].into_iter().find(|key| f.0.contains_key(*key)) {
        return Err(QmpError::generic(format!(
            "Parameter 'filename' says what '{key}' says: give one of them"
        )));
    }
    let DriverSpec::Blkcolo(named) = BlkcoloAddress::parse(name)?.node().driver else {
        return Err(QmpError::generic("a blkcolo address is another driver's"));
    };
    options.extend((*named.options).clone());
    Ok(DriverSpec::Blkcolo(BlkcoloSpec { options: Rc::new(options), ..named }))
}

/// Where the secondary listens and its primary finds it, and the same for people.
fn place(f: &Fields<'_>) -> Result<(Address, String), QmpError> {
    let (host, port) = (f.string("host"), f.string("port"));
    let Some(number) = open::read_port(&port) else {
        return Err(QmpError::generic(format!(
            "Parameter 'port' expects a number from 1 to 65535, not '{port}'"
        )));
    };
    let host = host.trim_matches(['[', ']']);
    if host.is_empty() {
        return Err(QmpError::generic("Parameter 'host' is empty"));
    }
    let shown = if host.contains(':') { format!("[{host}]:{number}") } else { format!("{host}:{number}") };
    Ok((Address::tcp(host, number), shown))
}

/// The name of the group behind the node: the same on both sides. A node that nobody named differs from side to side.
pub(crate) fn group_id(options: &Map<String, Value>, node: Option<&str>) -> String {
    let f = Fields(options);
    match (f.text("group"), node) {
        (Some(id), _) => id.to_owned(),
        (None, Some(node)) => node.to_owned(),
        (None, None) => place(&f).map(|p| p.1).unwrap_or_default(),
    }
}

/// Where the group keeps what it must, if nobody said: beside the image.
async fn beside(disk: &NodeCell) -> Result<String, QmpError> {
    let file = disk.node().details().await?.filename;
    if file.is_empty() || file.contains(':') {
        let why =
            format!("Node '{}' is not in a file: give the place of its store ('store.path')", disk.name());
        return Err(QmpError::generic(why));
    }
    Ok(format!("{file}.replica"))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// `blockdev-add` has less to say than the commands.
fn explained(e: QmpError) -> QmpError {
    if !e.desc.contains("'demote'") {
        return e;
    }
    let more = "replication-start has that, when the node was added with 'mode': 'auto'";
    QmpError { desc: format!("{} ({more})", e.desc), ..e }
}

impl Daemon {
    /// Has disks replicated that are opened as `blkcolo`.
    pub(crate) fn replicate_disks(self: &Rc<Self>) {
        let daemon = Rc::downgrade(self);
        self.opener().replicate_with(Rc::new(move |disk, name, options| {
            let daemon: Weak<Daemon> = daemon.clone();
            Box::pin(async move {
                let daemon =
                    daemon.upgrade().ok_or_else(|| BlockError::unsupported("The daemon is ending"))?;
                let shown = daemon.replicate(&disk, &name, &options).await;
                shown.map_err(|e| BlockError::new(ErrorKind::Invalid, e.desc))
            })
        }));
    }

    /// Makes `name` the node that shows `disk`, in a group of its own that has its role.
    async fn replicate(
        self: &Rc<Self>,
        disk: &Rc<NodeCell>,
        name: &str,
        options: &Map<String, Value>,
    ) -> Result<Rc<NodeCell>, QmpError> {
        let id = group_id(options, Some(name).filter(|n| !n.starts_with('#')));
        let mut store = object(options.get("store").cloned().unwrap_or_default());
        if !store.contains_key("path") {
            store.insert("path".into(), json!(beside(disk).await?));
        }
        let volumes = json!([{"node-name": disk.name(), "front": name}]);
        let mut new = object(json!({"id": id, "volumes": volumes, "store": store}));
        take(options, &OF_GROUP, &mut new);
        self.unrecorded("replication-group-add", new).await?;
        let group = crate::commands::replication::group(self, &id)?;
        if let Err(e) = self.begin_blkcolo(&id, &group, options).await {
            // it has no role: nothing keeps it
            let _ = group.remove().await;
            self.replication().borrow_mut().remove(&id);
            return Err(explained(e));
        }
        self.bind_to_node(&id, &group);
        group.front_of(name).ok_or_else(|| QmpError::generic(format!("Node '{name}' vanished")))
    }

    async fn begin_blkcolo(
        self: &Rc<Self>,
        id: &str,
        group: &Group,
        options: &Map<String, Value>,
    ) -> Result<(), QmpError> {
        let f = Fields(options);
        let (at, shown) = place(&f)?;
        let (secondary, find_other) = match f.text("mode") {
            Some("primary") => (false, true),
            Some("secondary") => (true, true),
            _ => match group.remembered().await? {
                Remembered::Secondary => (true, true),
                // where its own secondary was to be found once, it finds none
                Remembered::Primary => (false, !self.is_here(&at, &shown).await?),
                Remembered::Nothing => (self.is_here(&at, &shown).await?, true),
            },
        };
        let addr = json!({"type": "inet", "host": f.string("host"), "port": f.string("port")});
        if secondary {
            let start = json!({"group": id, "role": "secondary", "listen": addr});
            return self.unrecorded("replication-start", object(start)).await.map(drop);
        }
        if find_other {
            let peer = json!({"group": id, "peer": shown, "addr": addr});
            self.unrecorded("replication-peer-add", object(peer)).await?;
        }
        let mut start = object(json!({"group": id, "role": "primary"}));
        take(options, &OF_PRIMARY, &mut start);
        self.unrecorded("replication-start", start).await.map(drop)
    }

    /// T9: whether an address is one of this host's.
    async fn is_here(&self, at: &Address, shown: &str) -> Result<bool, QmpError> {
        match self.env().listen(at).await {
            Ok(_) => Ok(true),
            Err(e) if e.errno() == BlockError::EADDRNOTAVAIL => Ok(false),
            Err(e) => Err(QmpError::generic(format!(
                "Whether {shown} is an address of this host cannot be found out: {e} (give 'mode' 'primary' or 'secondary')"
            ))),
        }
    }

    /// From now on the group ends when its node does.
    pub(crate) fn bind_to_node(self: &Rc<Self>, id: &str, group: &Group) {
        self.blkcolo().borrow_mut().insert(id.to_owned());
        let (daemon, id) = (Rc::downgrade(self), id.to_owned());
        let end: Rc<dyn Fn()> = Rc::new(move || {
            let Some(daemon) = daemon.upgrade() else { return };
            daemon.blkcolo().borrow_mut().remove(&id);
            let group = daemon.replication().borrow_mut().remove(&id);
            group.iter().for_each(|g| g.shut_down());
        });
        group.when_closed(&end);
    }

    /// The group that shows a disk as the node `cell`, and its name.
    pub(crate) fn group_shown_by(&self, cell: &Rc<NodeCell>) -> Option<(String, Rc<Group>)> {
        let shows = |g: &Group| g.front_of(cell.name()).is_some_and(|front| Rc::ptr_eq(&front, cell));
        let groups = self.replication().borrow();
        groups.iter().find(|(_, g)| shows(g)).map(|(id, g)| (id.clone(), g.clone()))
    }

    /// Before `blockdev-del` of a node of a group, which must be one that ends with it: a disk that goes with it is found as it was left when it is
    /// added again. One that others may use from then on is no part of the replication any more.
    pub(crate) async fn check_may_end(&self, id: &str, group: &Group) -> Result<(), QmpError> {
        if !self.blkcolo().borrow().contains(id) {
            return Err(QmpError::generic(format!(
                "The node is in use by replication group '{id}' (replication-group-remove removes it)"
            )));
        }
        if let Acting::Secondary(s) = group.acting()
            && !matches!(s.stage(), Stage::Running | Stage::Done)
        {
            return Err(QmpError::generic(format!(
                "Replication group '{id}' is merging ({})",
                s.stage().name()
            )));
        }
        let disks = group.settings().volumes.iter().filter_map(|v| self.graph().find(&v.0));
        let stays = disks.into_iter().any(|d| d.is_monitor_owned() || d.parents().len() > 1);
        match group.acting() {
            Acting::Unprotected => Ok(()),
            _ if !stays => Ok(()),
            _ => Ok(group.stop().await?),
        }
    }
}

/// Those of the options that are there, as they are.
fn take(options: &Map<String, Value>, keys: &[&str], into: &mut Map<String, Value>) {
    for key in keys {
        into.extend(options.get(*key).map(|v| ((*key).to_owned(), v.clone())));
    }
}
