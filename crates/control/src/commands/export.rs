//! The NBD server and its exports.

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::address::LegacyAddress;
use crate::error::{QmpError, Reply};
use exports::{
    DEFAULT_HANDSHAKE_SECONDS, DEFAULT_MAX_CONNECTIONS, DeleteMode, Export, ExportInfo, NbdOptions,
    ServerOptions,
};
use graph::{NodeCell, Parent, Role};
use qapi::{Value, json};
use serde::Deserialize;
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
        let options = ServerOptions {
            address: self.addr.read()?,
            max_connections: self.max_connections.unwrap_or(DEFAULT_MAX_CONNECTIONS),
            handshake_max_seconds: self.handshake_max_seconds.unwrap_or(DEFAULT_HANDSHAKE_SECONDS),
            tls: daemon.objects().server_tls(self.tls_creds.as_deref(), self.tls_authz)?,
        };
        daemon.exports().start_server(&options).await?;
        Ok(json!({}))
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

/// Offers a node to clients.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockExportAdd {
    id: String,
    node_name: String,
    #[serde(default)]
    writable: bool,
    #[serde(default)]
    writethrough: bool,
    iothread: Option<String>,
    name: Option<String>,
    description: Option<String>,
    bitmaps: Option<Vec<Value>>,
    #[serde(default)]
    allocation_depth: bool,
}

impl Command for BlockExportAdd {
    const NAME: &'static str = "block-export-add";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.exports().check_id(&self.id)?;
        let cell = daemon.find_node(None, Some(&self.node_name))?;
        if let Some(id) = self.iothread.filter(|id| daemon.objects().find(id).is_none()) {
            return Err(QmpError::generic(format!("iothread \"{id}\" not found")));
        }
        if let Some(first) = self.bitmaps.iter().flatten().next() {
            let name = first.as_str().or(first["name"].as_str()).unwrap_or_default();
            return Err(QmpError::generic(match cell.find_bitmap(name) {
                None => format!("Bitmap '{name}' is not found"),
                Some(_) => "Parameter 'bitmaps' is not supported by liveblkd yet".to_owned(),
            }));
        }
        let options = NbdOptions {
            id: self.id,
            name: self.name.unwrap_or(self.node_name),
            description: self.description.unwrap_or_default(),
            writable: self.writable,
            writethrough: self.writethrough,
            allocation_depth: self.allocation_depth,
        };
        export(&daemon, &cell, options).await
    }
}

async fn export(daemon: &Daemon, cell: &Rc<NodeCell>, options: NbdOptions) -> Reply {
    let writable = cell.is_writable() || cell.options().auto_read_only;
    daemon.exports().check_nbd(&options, writable)?;
    let (demand, parent) = (Export::demand(options.writable), Parent::Backend(options.id.clone()));
    let edge = daemon.graph().attach(cell, "root", Role::Root, parent, demand).await?;
    // while it waited, another monitor may have taken the id, or the server may have gone: checked once more
    daemon.exports().add_nbd(options, edge, writable)?;
    Ok(json!({}))
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
        if let Some(name) = self.bitmap {
            return Err(QmpError::generic(match cell.find_bitmap(&name) {
                None => format!("Bitmap '{name}' is not found"),
                Some(_) => "Parameter 'bitmap' is not supported by liveblkd yet".to_owned(),
            }));
        }
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
        export(&daemon, &cell, options).await
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
