//! Exports, and the NBD server.

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::address::{LegacyAddress, SocketAddress};
use crate::error::{QmpError, Reply};
use block::BlockError;
use env::Address;
use exports::{
    AllowOther, DEFAULT_BLOCK_SIZE, DEFAULT_HANDSHAKE_SECONDS, DEFAULT_MAX_CONNECTIONS, DeleteMode, Export,
    ExportInfo, ExportedBitmap, FuseExportOptions, MAX_EXPORTED_BITMAPS, NbdOptions, ServerOptions,
    VhostUserBlkOptions,
};
use graph::{NodeCell, Parent, Role, bitmaps, walk};
use qapi::{Value, json};
use serde::Deserialize;
use std::path::PathBuf;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[
    entry::<NbdServerStart>(),
    entry::<NbdServerStop>(),
    entry::<NbdServerAdd>(),
    entry::<NbdServerRemove>(),
    entry::<BlockExportAdd>(),
    entry::<BlockExportDel>(),
    entry::<QueryBlockExports>(),
];

/// Starts the one NBD server.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct NbdServerStart {
    addr: LegacyAddress,
    max_connections: Option<u32>,
    handshake_max_seconds: Option<u32>,
    tls_creds: Option<String>,
    tls_authz: Option<String>,
}

impl Command for NbdServerStart {
    const NAME: &'static str = "nbd-server-start";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        if daemon.exports().server_address().is_some() {
            return Err(QmpError::generic("NBD server already running"));
        }
        let (address, last) = self.addr.read_range()?;
        let mut options = ServerOptions {
            address,
            max_connections: self.max_connections.unwrap_or(DEFAULT_MAX_CONNECTIONS),
            handshake_max_seconds: self.handshake_max_seconds.unwrap_or(DEFAULT_HANDSHAKE_SECONDS),
            tls: daemon.objects().server_tls(self.tls_creds.as_deref(), self.tls_authz)?,
        };
        loop {
            match (daemon.exports().start_server(&options).await, &mut options.address) {
                (Err(e), Address::Tcp { port, .. })
                    if e.errno() == BlockError::EADDRINUSE && last.is_some_and(|last| *port < last) =>
                {
                    *port += 1;
                }
                (started, _) => return Ok(started.map(|()| json!({}))?),
            }
        }
    }
}

/// Stops it: its exports and clients go.
#[derive(Deserialize)]
struct NbdServerStop {}

impl Command for NbdServerStop {
    const NAME: &'static str = "nbd-server-stop";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.exports().stop_server().await?;
        Ok(json!({}))
    }
}

/// A bitmap of the exported chain, or of a node.
#[derive(Deserialize)]
#[serde(untagged)]
enum BitmapOfNode {
    Here(String),
    There { node: String, name: String },
}

/// Kinds of exports.
#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "kebab-case")]
enum ExportType {
    Nbd,
    VhostUserBlk,
    Fuse,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "kebab-case")]
enum FuseAllowOther {
    Off,
    On,
    Auto,
}

impl From<FuseAllowOther> for AllowOther {
    fn from(a: FuseAllowOther) -> AllowOther {
        match a {
            FuseAllowOther::Off => AllowOther::Off,
            FuseAllowOther::On => AllowOther::On,
            FuseAllowOther::Auto => AllowOther::Auto,
        }
    }
}

/// Offers a node to clients.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockExportAdd {
    #[serde(rename = "type")]
    kind: ExportType,
    id: String,
    node_name: String,
    #[serde(default)]
    writable: bool,
    #[serde(default)]
    writethrough: bool,
    #[serde(default)]
    allow_inactive: bool,
    iothread: Option<String>,
    name: Option<String>,
    description: Option<String>,
    #[serde(default)]
    bitmaps: Vec<BitmapOfNode>,
    #[serde(default)]
    allocation_depth: bool,
    addr: Option<SocketAddress>,
    num_queues: Option<u16>,
    logical_block_size: Option<u64>,
    mountpoint: Option<PathBuf>,
    #[serde(default)]
    growable: bool,
    allow_other: Option<FuseAllowOther>,
}

impl Command for BlockExportAdd {
    const NAME: &'static str = "block-export-add";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.exports().check_id(&self.id)?;
        let cell = daemon.find_node(None, Some(&self.node_name))?;
        if let Some(id) = self.iothread.filter(|id| daemon.objects().find(id) != Some("iothread")) {
            return Err(QmpError::generic(format!("iothread \"{id}\" not found")));
        }
        if self.allow_inactive && !matches!(self.kind, ExportType::Nbd) {
            return Err(QmpError::generic("Export type does not support inactive exports"));
        }
        if let ExportType::Fuse = self.kind {
            let mountpoint =
                self.mountpoint.ok_or_else(|| QmpError::generic("Parameter 'mountpoint' is missing"))?;
            let options = FuseExportOptions {
                id: self.id,
                mountpoint,
                writable: self.writable,
                writethrough: self.writethrough,
                growable: self.growable,
                allow_other: self.allow_other.map(AllowOther::from).unwrap_or_default(),
            };
            return export_fuse(&daemon, &cell, options).await;
        }
        if let ExportType::VhostUserBlk = self.kind {
            let options = VhostUserBlkOptions {
                id: self.id,
                address: export_address(self.addr)?,
                writable: self.writable,
                writethrough: self.writethrough,
                num_queues: self.num_queues.unwrap_or(1),
                // what does not fit is refused like every wrong size; 0 stands for the default, as in QSD
                logical_block_size: match self.logical_block_size.unwrap_or(0) {
                    0 => DEFAULT_BLOCK_SIZE,
                    n => u32::try_from(n).unwrap_or(u32::MAX),
                },
            };
            return export_vhost_user_blk(&daemon, &cell, options).await;
        }
        let options = NbdOptions {
            id: self.id,
            name: self.name.unwrap_or(self.node_name),
            description: self.description.unwrap_or_default(),
            writable: self.writable,
            writethrough: self.writethrough,
            allocation_depth: self.allocation_depth,
        };
        export(&daemon, &cell, options, &self.bitmaps, self.allow_inactive).await
    }
}

/// Takes the bitmaps of an export into use. One given by name alone is looked for in the whole chain, from the top.
fn hold_bitmaps(
    daemon: &Daemon,
    cell: &Rc<NodeCell>,
    wanted: &[BitmapOfNode],
    writable: bool,
) -> Result<Vec<ExportedBitmap>, QmpError> {
    if wanted.len() > MAX_EXPORTED_BITMAPS {
        return Err(QmpError::generic(format!("An export has at most {MAX_EXPORTED_BITMAPS} bitmaps")));
    }
    let mut held: Vec<ExportedBitmap> = Vec::new();
    for w in wanted {
        let (node, bitmap) = match w {
            BitmapOfNode::Here(name) => {
                let with =
                    walk::chain(cell).into_iter().find_map(|c| Some((c.clone(), c.find_bitmap(name)?)));
                with.ok_or_else(|| QmpError::generic(format!("Bitmap '{name}' is not found")))?
            }
            BitmapOfNode::There { node, name } => {
                let found = daemon.graph().find(node);
                let node = found.ok_or_else(|| QmpError::generic(format!("Node '{node}' not found")))?;
                let bitmap = bitmaps::find_bitmap(&node, name)?;
                (node, bitmap)
            }
        };
        let name = bitmap.name().unwrap_or_default();
        if held.iter().any(|b| b.name() == name) {
            return Err(QmpError::generic(format!("Bitmap '{name}' is named twice")));
        }
        bitmaps::check_usable(&bitmap)?;
        if !writable && node.is_writable() && bitmap.enabled() {
            let why = format!("Enabled bitmap '{name}' incompatible with readonly export");
            return Err(QmpError::generic(why));
        }
        held.push(ExportedBitmap::hold(bitmap));
    }
    Ok(held)
}

/// Where a vhost-user-blk export listens. Of other kinds than unix sockets and descriptors the export itself says what is wrong.
fn export_address(addr: Option<SocketAddress>) -> Result<Address, QmpError> {
    match addr {
        Some(SocketAddress::Vsock {}) => Ok(Address::Stdio),
        Some(SocketAddress::Inet(_)) => Ok(Address::Stdio),
        Some(addr) => addr.read(),
        None => Err(QmpError::generic("Parameter 'addr' is missing")),
    }
}

async fn export_vhost_user_blk(daemon: &Daemon, cell: &Rc<NodeCell>, options: VhostUserBlkOptions) -> Reply {
    let writable = cell.is_writable() || cell.options().auto_read_only;
    daemon.exports().check_vhost_user_blk(&options, writable)?;
    daemon.graph().activate(cell).await?;
    let demand = VhostUserBlkOptions::demand(options.writable);
    let parent = Parent::Backend(options.id.clone());
    let edge = daemon.graph().attach(cell, "root", Role::Root, parent, demand).await?;
    daemon.exports().add_vhost_user_blk(options, edge, writable).await?;
    Ok(json!({}))
}

async fn export_fuse(daemon: &Daemon, cell: &Rc<NodeCell>, options: FuseExportOptions) -> Reply {
    let writable = cell.is_writable() || cell.options().auto_read_only;
    daemon.exports().check_fuse(&options, writable)?;
    daemon.graph().activate(cell).await?;
    let parent = Parent::Backend(options.id.clone());
    let edge = daemon.graph().attach(cell, "root", Role::Root, parent, options.demand()).await?;
    daemon.exports().add_fuse(options, edge, daemon.graph().clone(), writable).await?;
    Ok(json!({}))
}

async fn export(
    daemon: &Daemon,
    cell: &Rc<NodeCell>,
    options: NbdOptions,
    bitmaps: &[BitmapOfNode],
    allow_inactive: bool,
) -> Reply {
    let writable = cell.is_writable() || cell.options().auto_read_only;
    daemon.exports().check_common(&options.id, options.writable, writable)?;
    if !allow_inactive {
        // before bitmaps are looked for: those of the image come with it
        daemon.graph().activate(cell).await?;
    }
    let (demand, parent) = (Export::demand(options.writable), Parent::Backend(options.id.clone()));
    let edge = match allow_inactive {
        true => daemon.graph().attach_sleeping(cell, parent, demand).await?,
        false => daemon.graph().attach(cell, "root", Role::Root, parent, demand).await?,
    };
    let added = || {
        daemon.exports().check_nbd(&options, writable)?;
        let bitmaps = hold_bitmaps(daemon, cell, bitmaps, options.writable)?;
        Ok(daemon.exports().add_nbd_with(options, bitmaps, edge, writable)?)
    };
    let added = added();
    if added.is_err() {
        daemon.graph().settle().await;
    }
    added.map(|()| json!({}))
}

/// The older form of `block-export-add`.
#[derive(Deserialize)]
struct NbdServerAdd {
    device: String,
    name: Option<String>,
    description: Option<String>,
    #[serde(default)]
    writable: bool,
    bitmap: Option<String>,
}

impl Command for NbdServerAdd {
    const NAME: &'static str = "nbd-server-add";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let cell = daemon.find_node(Some(&self.device), Some(&self.device))?;
        let name = self.name.unwrap_or(self.device);
        let options = NbdOptions {
            id: name.clone(),
            name,
            description: self.description.unwrap_or_default(),
            // this form turns a read-only node into a read-only export without a word
            writable: self.writable && cell.is_writable(),
            writethrough: false,
            allocation_depth: false,
        };
        daemon.exports().check_id(&options.id)?;
        let bitmaps: Vec<_> = self.bitmap.into_iter().map(BitmapOfNode::Here).collect();
        export(&daemon, &cell, options, &bitmaps, false).await
    }
}

#[derive(Deserialize, Clone, Copy, Default)]
#[serde(rename_all = "kebab-case")]
enum RemoveMode {
    #[default]
    Safe,
    Hard,
}

impl From<RemoveMode> for DeleteMode {
    fn from(mode: RemoveMode) -> DeleteMode {
        match mode {
            RemoveMode::Safe => DeleteMode::Safe,
            RemoveMode::Hard => DeleteMode::Hard,
        }
    }
}

/// The older form of `block-export-del`.
#[derive(Deserialize)]
struct NbdServerRemove {
    name: String,
    #[serde(default)]
    mode: RemoveMode,
}

impl Command for NbdServerRemove {
    const NAME: &'static str = "nbd-server-remove";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        if daemon.exports().query().iter().any(|e| e.id == self.name && e.kind != "nbd") {
            return Err(QmpError::generic(format!("Block export '{}' is not an NBD export", self.name)));
        }
        daemon.exports().delete(&self.name, self.mode.into())?;
        Ok(json!({}))
    }
}

/// Begins to remove an export; `BLOCK_EXPORT_DELETED` tells the end.
#[derive(Deserialize)]
struct BlockExportDel {
    id: String,
    #[serde(default)]
    mode: RemoveMode,
}

impl Command for BlockExportDel {
    const NAME: &'static str = "block-export-del";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.exports().delete(&self.id, self.mode.into())?;
        Ok(json!({}))
    }
}

/// All exports, newest first.
#[derive(Deserialize)]
struct QueryBlockExports {}

impl Command for QueryBlockExports {
    const NAME: &'static str = "query-block-exports";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let one = |e: ExportInfo| json!({"id": e.id, "type": e.kind, "node-name": e.node_name, "shutting-down": e.shutting_down});
        Ok(daemon.exports().query().into_iter().map(one).collect::<Value>())
    }
}
