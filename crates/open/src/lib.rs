//! From options to nodes: which driver opens what, what is opened because an image names it, and making new images.
//!
//! What can happen: any part of a tree fails to open after others did; a chain of backing files loops or never ends; two
//! names lead to one file. What must stay true: opening is all or nothing; a loop is found by the identity of files, as
//! soon as one is met for the second time; what an image names goes through a gate that can refuse.
#![forbid(unsafe_code)]

mod again;
mod bitmap_home;
mod blkcolo;
mod children;
pub mod create;
mod filters;
mod implicit;
mod keep;
mod kept_instant;
mod reopen;
mod spec;

pub use again::{Description, Inherits};
pub use bitmap_home::{BitmapHome, BitmapsHook, log_of};
pub use blkcolo::{BlkcoloAddress, BlkcoloHook, BlkcoloSpec, Replicating, named, read_port};
pub use dirtylog::Geometry;
pub use filters::{FilterSpec, ThrottleHook};
pub use implicit::{DefaultGate, ImplicitOpenGate, MAX_CHAIN};
pub use kept_instant::KeptInstant;
pub use spec::{
    AsGiven, Backing, Child, Common, CopyBeforeWriteSpec, DriverSpec, FileSpec, NbdSpec, NodeSpec, Qcow2Spec,
};

use block::{BlockError, ErrorKind, Result, Span};
use drivers::file::{FileNode, FileOptions};
use drivers::filters::quorum::QuorumHook;
use drivers::filters::replication::ReplicationHook;
use drivers::filters::snapshot_access::SnapshotAccess;
use drivers::nbd_client::{ClientTls, NbdClient};
use drivers::null::NullNode;
use drivers::raw::RawNode;
use graph::{Demand, Edge, Graph, Node, NodeCell, NodeOptions, Parent, Perms, Role, walk};
use qcow2::Qcow2;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Called when an image is found to be corrupt: node name, and what was found.
pub type CorruptionHook = Rc<dyn Fn(&str, &qcow2::Corruption)>;

/// Finds a client's TLS credentials by the id that the user gave them.
pub type CredentialsHook = Rc<dyn Fn(&str) -> Result<Rc<tls::Credentials>>>;

/// Opens nodes in one graph.
pub struct Opener {
    graph: Rc<Graph>,
    gate: Rc<dyn ImplicitOpenGate>,
    on_corruption: RefCell<Option<CorruptionHook>>,
    credentials: RefCell<Option<CredentialsHook>>,
    throttle: RefCell<Option<ThrottleHook>>,
    on_quorum: RefCell<Option<QuorumHook>>,
    on_replication: RefCell<Option<ReplicationHook>>,
    blkcolo: RefCell<Option<BlkcoloHook>>,
    home: RefCell<Option<Rc<BitmapHome>>>,
    /// How nodes were described, by id.
    given: RefCell<BTreeMap<u64, reopen::Given>>,
}

/// What a node takes over from its parent.
#[derive(Clone, Copy)]
struct Inherited {
    read_only: bool,
    auto_read_only: bool,
    direct: bool,
    no_flush: bool,
    discard: bool,
    force_share: bool,
    monitor_owned: bool,
    /// It was there in an earlier life of the daemon.
    again: bool,
    inactive: bool,
    /// What its `file` takes over of that: as in QSD, only what the node itself has from its parent.
    file_inactive: bool,
}

impl Inherited {
    /// What a node with these options has if its parent (or nobody) gives it `self`.
    fn with(self, c: &Common) -> Inherited {
        Inherited {
            read_only: c.read_only.unwrap_or(self.read_only),
            auto_read_only: c.auto_read_only.unwrap_or(self.auto_read_only),
            direct: c.direct.unwrap_or(self.direct),
            no_flush: c.no_flush.unwrap_or(self.no_flush),
            discard: c.discard.unwrap_or(self.discard),
            force_share: c.force_share || self.force_share,
            monitor_owned: self.monitor_owned,
            again: self.again,
            inactive: c.active.map_or(self.inactive, |active| !active),
            file_inactive: self.inactive && c.active != Some(true),
        }
    }

    /// What its `file` takes over.
    fn to_file(self) -> Inherited {
        Inherited { inactive: self.file_inactive, ..self }
    }
}

/// Files on the way from the top of a chain: identity, and layers so far.
#[derive(Clone, Default)]
struct Trail {
    files: Vec<(u64, u64)>,
    layers: usize,
}

type Opening<'a> = std::pin::Pin<Box<dyn Future<Output = Result<Rc<NodeCell>>> + 'a>>;

impl Opener {
    /// An opener with QSD's rule for what images name.
    pub fn new(graph: &Rc<Graph>) -> Rc<Opener> {
        Opener::with_gate(graph, Rc::new(DefaultGate))
    }

    /// An opener with another rule for what images name.
    pub fn with_gate(graph: &Rc<Graph>, gate: Rc<dyn ImplicitOpenGate>) -> Rc<Opener> {
        Rc::new(Opener {
            graph: graph.clone(),
            gate,
            on_corruption: RefCell::default(),
            credentials: RefCell::default(),
            throttle: RefCell::default(),
            on_quorum: RefCell::default(),
            on_replication: RefCell::default(),
            blkcolo: RefCell::default(),
            home: RefCell::default(),
            given: RefCell::default(),
        })
    }

    /// The graph that nodes are put into.
    pub fn graph(&self) -> &Rc<Graph> {
        &self.graph
    }

    /// `hook` is told of corrupt images that are opened from now on.
    pub fn on_corruption(&self, hook: CorruptionHook) {
        *self.on_corruption.borrow_mut() = Some(hook);
    }

    /// `hook` is told of what happens in quorums that are opened from now on.
    pub fn on_quorum(&self, hook: QuorumHook) {
        *self.on_quorum.borrow_mut() = Some(hook);
    }

    /// `hook` is told of what happens in replication nodes that are opened from now on.
    pub fn on_replication(&self, hook: ReplicationHook) {
        *self.on_replication.borrow_mut() = Some(hook);
    }

    /// `hook` gives the throttle groups that users name.
    pub fn find_throttle_groups(&self, hook: ThrottleHook) {
        *self.throttle.borrow_mut() = Some(hook);
    }

    /// `hook` gives the TLS credentials that users name.
    pub fn find_credentials(&self, hook: CredentialsHook) {
        *self.credentials.borrow_mut() = Some(hook);
    }

    /// Opens a node for the monitor, with all it needs. On an error nothing is left behind.
    pub async fn open(&self, spec: &NodeSpec) -> Result<Rc<NodeCell>> {
        let top = Inherited {
            read_only: false,
            auto_read_only: false,
            direct: false,
            no_flush: false,
            discard: false,
            force_share: false,
            monitor_owned: true,
            again: false,
            inactive: false,
            file_inactive: false,
        };
        let opened = self.node(spec, top, &Trail::default()).await;
        if opened.is_err() {
            self.graph.settle().await;
        }
        opened
    }

    fn node<'a>(&'a self, spec: &'a NodeSpec, from: Inherited, trail: &'a Trail) -> Opening<'a> {
        Box::pin(async move {
            let c = &spec.common;
            self.check_file(spec, from.again)?;
            if !from.again {
                zeroes_may_unmap(spec, from.with(c))?;
            }
            self.check_name(spec, from.again)?;
            if let DriverSpec::Blkcolo(blkcolo) = &spec.driver {
                return self.blkcolo(spec, blkcolo, from, trail).await;
            }
            let mut now = from.with(c);
            let may_turn = now.auto_read_only && !now.read_only;
            if c.force_share && !now.read_only {
                return Err(BlockError::invalid("force-share=on can only be used with read-only images"));
            }
            let name = c.node_name.clone().unwrap_or_else(|| self.graph.invent_name());
            let node = self.driver(&spec.driver, &mut now, &name, trail).await?;
            let options = NodeOptions {
                name: Some(name),
                read_only: now.read_only,
                auto_read_only: now.auto_read_only,
                follows: c.read_only.is_none() && !now.monitor_owned,
                may_turn,
                detect_zeroes: c.detect_zeroes,
                discard: now.discard,
                monitor_owned: now.monitor_owned,
                force_share: now.force_share,
                cache_direct: now.direct,
                cache_no_flush: now.no_flush,
                inactive: now.inactive,
            };
            match self.graph.add(options, node.clone()).await {
                Ok(cell) => {
                    self.remember(&cell, spec, from);
                    self.kept_bitmaps(&cell).await;
                    Ok(cell)
                }
                Err(e) => {
                    // The first error is the one that matters.
                    let _ = node.close().await;
                    Err(e)
                }
            }
        })
    }

    /// Whether a new node's file can be called as it is described, or is there: what is wrong with it is told before what is
    /// wrong with the node, as it is opened before it.
    fn check_file(&self, spec: &NodeSpec, again: bool) -> Result<()> {
        match spec.driver.file() {
            Some(Child::Inline(file)) => {
                self.check_file(file, again)?;
                self.check_name(file, again)
            }
            Some(Child::Reference(name)) => self.find(name).map(drop),
            None => Ok(()),
        }
    }

    /// Whether a new node can be called as it is described.
    fn check_name(&self, spec: &NodeSpec, again: bool) -> Result<()> {
        match &spec.common.node_name {
            Some(name) if again => self.graph.check_old_name(name),
            Some(name) => self.graph.check_name(name),
            None => Ok(()),
        }
    }

    async fn driver(
        &self,
        driver: &DriverSpec,
        now: &mut Inherited,
        name: &str,
        trail: &Trail,
    ) -> Result<Rc<dyn Node>> {
        let env = self.graph.env();
        match driver {
            DriverSpec::File(f) => Ok(self.file(f, false, now).await?),
            DriverSpec::HostDevice(f) => Ok(self.file(f, true, now).await?),
            DriverSpec::NullCo(options) => Ok(NullNode::open(env, options.clone())),
            DriverSpec::Raw { file, offset, size } => {
                let child = self.child(file, now.to_file(), trail).await?;
                let edge = self.hold(&child, "file", Role::Primary, name, Demand::NOTHING).await?;
                Ok(RawNode::open(edge, *offset, *size)?)
            }
            DriverSpec::Filter(spec) => self.filter(spec, *now, name, trail).await,
            // made with its cell, in `node`
            DriverSpec::Blkcolo(_) => Err(BlockError::unsupported("a replicated disk is not made so")),
            DriverSpec::CopyBeforeWrite(spec) => Ok(self.copy_before_write(spec, *now, name, trail).await?),
            DriverSpec::SnapshotAccess { file } => {
                let child = self.child(file, now.to_file(), trail).await?;
                Ok(SnapshotAccess::new(self.hold(&child, "file", Role::Other, name, Demand::NOTHING).await?))
            }
            DriverSpec::Qcow2(spec) => Ok(self.qcow2(spec, now, name, trail).await?),
            DriverSpec::Nbd(spec) => {
                let mut options = spec.options.clone();
                options.tls = self.client_tls(spec)?;
                options.read_only = now.read_only;
                options.auto_read_only = now.auto_read_only;
                let client = NbdClient::open(env, options).await?;
                now.read_only |= client.is_read_only();
                Ok(client)
            }
        }
    }

    fn client_tls(&self, spec: &NbdSpec) -> Result<Option<ClientTls>> {
        let Some(id) = &spec.tls_creds else { return Ok(None) };
        let find = self.credentials.borrow().clone();
        let find = find.ok_or_else(|| BlockError::invalid(format!("No TLS credentials with id '{id}'")))?;
        let hostname = spec.tls_hostname.clone().or_else(|| match &spec.options.server {
            env::Address::Tcp { host, .. } => Some(host.trim_matches(['[', ']']).to_owned()),
            _ => None,
        });
        Ok(Some(ClientTls { credentials: find(id)?, hostname }))
    }

    async fn file(&self, spec: &FileSpec, device: bool, now: &mut Inherited) -> Result<Rc<FileNode>> {
        if device && spec.filename.is_empty() {
            return Err(BlockError::invalid("The 'host_device' block driver requires a file name"));
        }
        if spec.native && !now.direct {
            return Err(BlockError::invalid(
                "aio=native was specified, but it requires cache.direct=on, which was not specified.",
            ));
        }
        let options = FileOptions {
            filename: spec.filename.clone(),
            device,
            read_only: now.read_only,
            auto_read_only: now.auto_read_only,
            direct: now.direct,
            threads: spec.threads,
            locking: spec.locking,
        };
        let (node, read_only) = FileNode::open(self.graph.env(), &options).await?;
        now.read_only = read_only;
        Ok(node)
    }

    /// A child for `parent`: opened with what it inherits, or found by name.
    async fn child(&self, child: &Child, parent: Inherited, trail: &Trail) -> Result<Rc<NodeCell>> {
        match child {
            Child::Reference(name) => self.find(name),
            Child::Inline(spec) => {
                // Formats send flushes and discards with care, so what is below them may take both.
                let from = Inherited { discard: true, monitor_owned: false, ..parent };
                self.node(spec, from, trail).await
            }
        }
    }

    fn find(&self, name: &str) -> Result<Rc<NodeCell>> {
        self.graph.find(name).ok_or_else(|| {
            let message = format!("Cannot find device='{name}' nor node-name='{name}'");
            BlockError::new(ErrorKind::NotFound, message)
        })
    }

    /// The trail one image further down. In a loop `child` is closed again if it was opened for this parent: nobody holds
    /// it yet, so nobody else would.
    async fn pass(&self, trail: &Trail, child: &Rc<NodeCell>) -> Result<Trail> {
        let next = trail.with(child);
        if next.is_err() && !child.is_monitor_owned() && child.parents().is_empty() {
            // The loop is the error that matters.
            let _ = self.graph.remove(child).await;
        }
        next
    }

    async fn hold(
        &self,
        child: &Rc<NodeCell>,
        edge: &str,
        role: Role,
        parent: &str,
        demand: Demand,
    ) -> Result<Rc<Edge>> {
        let parent = Parent::Node(RefCell::new(Some(parent.to_owned())));
        self.graph.attach(child, edge, role, parent, demand).await
    }

    async fn qcow2(
        &self,
        spec: &Qcow2Spec,
        now: &mut Inherited,
        name: &str,
        trail: &Trail,
    ) -> Result<Rc<Qcow2>> {
        let child = self.child(&spec.file, now.to_file(), trail).await?;
        let trail = self.pass(trail, &child).await?;
        let file = self.hold(&child, "file", Role::Primary, name, storing(now)).await?;
        // What the header names is relative to the file, whatever stands in front of it.
        let image = walk::skip_filters(&child).node().details().await?.filename;
        let header = qcow2::check::read_header(&file).await?;
        let data_file = if header.geometry.data_file() {
            Some(self.data_file(spec, &header, &image, *now, name, &trail).await?)
        } else if spec.data_file.is_some() {
            return Err(BlockError::invalid(
                "'data-file' can only be set for images with an external data file",
            ));
        } else {
            None
        };
        let options = qcow2::Options {
            writable: !now.read_only,
            inactive: now.inactive,
            node_name: name.to_owned(),
            keeper: self.keeper(&image, &child, now).await,
            ..spec.options.clone()
        };
        let node = Qcow2::open(self.graph.env().clone(), file, data_file, options).await?;
        if let Some(hook) = self.on_corruption.borrow().clone() {
            let name = name.to_owned();
            node.on_corruption(move |found| hook(&name, found));
        }
        match self.attach_backing(&node, spec, &image, now, name, &trail).await {
            Ok(()) => Ok(node),
            Err(e) => {
                // The first error is the one that matters.
                let _ = node.close().await;
                Err(e)
            }
        }
    }

    /// Opens or finds the layer below and gives it to `node`.
    async fn attach_backing(
        &self,
        node: &Rc<Qcow2>,
        spec: &Qcow2Spec,
        image: &str,
        now: &Inherited,
        name: &str,
        trail: &Trail,
    ) -> Result<()> {
        let backing = match &spec.backing {
            Backing::None => None,
            Backing::Child(Child::Reference(name)) => {
                Some(self.find(name).map_err(|e| e.context("Could not open backing file"))?)
            }
            Backing::Child(Child::Inline(inner)) => {
                let opened = self.node(inner, below(now), trail).await;
                Some(opened.map_err(|e| e.context("Could not open backing file"))?)
            }
            Backing::Implicit => match node.backing_name() {
                (None, _) => None,
                (Some(file), format) => {
                    let opened = self.implicit(image, &file, format.as_deref(), now, trail).await;
                    Some(opened.map_err(|e| e.context("Could not open backing file"))?)
                }
            },
        };
        if let Some(backing) = backing {
            let edge = self.hold(&backing, "backing", Role::Backing, name, Demand::NOTHING).await?;
            node.set_backing(Some(edge));
        }
        Ok(())
    }

    async fn data_file(
        &self,
        spec: &Qcow2Spec,
        header: &qcow2::header::Header,
        image: &str,
        now: Inherited,
        name: &str,
        trail: &Trail,
    ) -> Result<Rc<Edge>> {
        let child = match &spec.data_file {
            Some(child) => self.child(child, now, trail).await?,
            None => {
                let Some(file) = data_file_name(header) else {
                    return Err(BlockError::invalid("'data-file' is required for this image"));
                };
                let protocol = self.gate.protocol(image, file)?;
                let from = Inherited { discard: true, monitor_owned: false, ..now };
                self.node(&protocol, from, trail).await?
            }
        };
        self.pass(trail, &child).await?;
        self.hold(&child, "data-file", Role::Data, name, storing(&now)).await
    }

    /// Opens what the header of `image` names as its backing file.
    async fn implicit(
        &self,
        image: &str,
        file: &str,
        format: Option<&str>,
        now: &Inherited,
        trail: &Trail,
    ) -> Result<Rc<NodeCell>> {
        if trail.layers >= MAX_CHAIN {
            return Err(BlockError::invalid(format!(
                "the backing chain has more than {MAX_CHAIN} layers at '{file}'"
            )));
        }
        let protocol = self.gate.protocol(image, file)?;
        let from = below(now);
        if matches!(format, Some("file" | "host_device" | "nbd")) {
            return self.node(&protocol, from, trail).await;
        }
        let cell = self.node(&protocol, Inherited { discard: true, ..from }, trail).await?;
        // Held while its format is found out, so that an error on the way closes it.
        let found = self.hold(&cell, "file", Role::Primary, "", reading()).await?;
        let format = match format {
            Some(f) => f.to_owned(),
            None => probe(&found).await?.to_owned(),
        };
        let child = Child::Reference(cell.name().to_owned());
        let driver = match format.as_str() {
            "raw" => DriverSpec::Raw { file: child, offset: 0, size: None },
            "qcow2" => DriverSpec::Qcow2(Box::new(Qcow2Spec {
                file: child,
                data_file: None,
                backing: Backing::Implicit,
                options: qcow2::Options::default(),
            })),
            other => return Err(BlockError::unsupported(format!("Unknown driver '{other}'"))),
        };
        let spec = NodeSpec { common: Common::default(), driver };
        let opened = self.node(&spec, from, trail).await;
        drop(found);
        opened
    }
}

impl Trail {
    /// The trail one image further down; an error if its file was passed already.
    fn with(&self, cell: &Rc<NodeCell>) -> Result<Trail> {
        let mut next = self.clone();
        next.layers += 1;
        if let Some(file) = cell.node().as_any().downcast_ref::<FileNode>() {
            let identity = file.identity();
            if self.files.contains(&identity) {
                return Err(BlockError::new(
                    ErrorKind::Corrupt,
                    format!("the chain of images loops: '{}' is already part of it", file.path().display()),
                )
                .with_errno(BlockError::ELOOP));
            }
            next.files.push(identity);
        }
        Ok(next)
    }
}

impl Opener {
    /// The format of the image in the file that `protocol` would open; only for reading.
    pub async fn probe_format(&self, protocol: &NodeSpec) -> Result<&'static str> {
        // a replicated disk is begun once, and then it is served
        let protocol = match &protocol.driver {
            DriverSpec::Blkcolo(BlkcoloSpec { file: Child::Inline(disk), .. }) => disk,
            _ => protocol,
        };
        let file = self.open(&protocol.clone().read_only(true)).await?;
        let found = match self.hold(&file, "file", Role::Primary, "", reading()).await {
            Ok(held) => probe(&held).await,
            Err(e) => Err(e),
        };
        // the answer, or why there is none, is what matters
        let _ = self.graph.remove(&file).await;
        found
    }
}

/// What a format asks of its file.
fn storing(now: &Inherited) -> Demand {
    if now.inactive {
        return reading();
    }
    let write = Perms::WRITE.with(Perms::RESIZE);
    let needs = if now.read_only { Perms::CONSISTENT_READ } else { Perms::CONSISTENT_READ.with(write) };
    let shares =
        if now.force_share { Perms::ALL } else { Perms::CONSISTENT_READ.with(Perms::WRITE_UNCHANGED) };
    Demand { needs, shares }
}

/// Zeroes can be found and unmapped only where unmapping is allowed.
fn zeroes_may_unmap(spec: &NodeSpec, now: Inherited) -> Result<()> {
    if spec.common.detect_zeroes == graph::DetectZeroes::Unmap && !now.discard {
        return Err(BlockError::invalid(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ));
    }
    Ok(())
}

fn reading() -> Demand {
    Demand { needs: Perms::CONSISTENT_READ, shares: Perms::ALL }
}

/// What a backing node takes over: read-only, whatever is above.
fn below(now: &Inherited) -> Inherited {
    Inherited { read_only: true, auto_read_only: false, discard: false, monitor_owned: false, ..*now }
}

/// The format of an image whose header names none; only for reading.
async fn probe(file: &Rc<Edge>) -> Result<&'static str> {
    let len = file.len().min(4);
    let magic = file.read(Span::new(0, len)).await?.to_vec();
    Ok(if magic == b"QFI\xfb" { "qcow2" } else { "raw" })
}

/// The external data file as the header names it.
fn data_file_name(header: &qcow2::header::Header) -> Option<&str> {
    header.extensions.iter().find_map(|e| match e {
        qcow2::header::Extension::DataFile(name) => Some(name.as_str()),
        _ => None,
    })
}
