//! Commands about the connection and the daemon itself.

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::Reply;
use qapi::json;
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[
    entry::<QmpCapabilities>(),
    entry::<QueryVersion>(),
    entry::<QueryCommands>(),
    entry::<QueryQmpSchema>(),
    entry::<Quit>(),
];

/// Ends the negotiation. The session does that itself: it is about the session, not about the daemon.
#[derive(Deserialize)]
struct QmpCapabilities {}

impl Command for QmpCapabilities {
    const NAME: &'static str = "qmp_capabilities";
    async fn run(self, _: Rc<Daemon>) -> Reply {
        Ok(json!({}))
    }
}

/// Which version of the interface this is: that of the reference, with our own name and version as package.
#[derive(Deserialize)]
struct QueryVersion {}

impl Command for QueryVersion {
    const NAME: &'static str = "query-version";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        Ok(daemon.version())
    }
}

/// The names of all commands.
#[derive(Deserialize)]
struct QueryCommands {}

impl Command for QueryCommands {
    const NAME: &'static str = "query-commands";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        Ok(daemon.command_names().map(|name| json!({"name": name})).collect())
    }
}

/// Everything about the interface, for programs that ask before they use.
#[derive(Deserialize)]
struct QueryQmpSchema {}

impl Command for QueryQmpSchema {
    const NAME: &'static str = "query-qmp-schema";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        Ok(daemon.schema().answer().clone())
    }
}

/// Ends the daemon: exports closed, jobs cancelled, nodes closed; the events of all that come before the reply.
#[derive(Deserialize)]
struct Quit {}

impl Command for Quit {
    const NAME: &'static str = "quit";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.shut_down().await;
        Ok(json!({}))
    }
}
