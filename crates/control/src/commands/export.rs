//! The NBD server and its exports.

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::address::LegacyAddress;
use crate::error::{QmpError, Reply};
use exports::{DEFAULT_HANDSHAKE_SECONDS, DEFAULT_MAX_CONNECTIONS, DeleteMode, ExportInfo, ServerOptions};
use qapi::{Value, json};
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[
    entry::<NbdServerStart>(),
    entry::<NbdServerStop>(),
    entry::<NbdServerRemove>(),
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
            tls_creds: self.tls_creds,
            tls_authz: self.tls_authz,
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
