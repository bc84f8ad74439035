//! The commands, one struct each: its arguments as QMP names them, and what it does.
//!
//! Before a command runs, its arguments have passed the schema ([`qapi::Schema::check_json`]); what is left to it is what the
//! schema cannot say, and calling the part of the daemon that does the work.

mod backup;
pub(crate) mod bitmap;
mod chain;
mod chardev;
mod colo;
mod create;
mod drive;
mod export;
mod job;
mod mirror;
mod node;
mod object;
mod protocol;
mod query;
mod record;
mod reopen;
pub(crate) mod replication;
mod replication_checkpoints;
pub(crate) mod replication_fencing;
mod snapshot;
mod state;
mod transaction;
mod verify;

use crate::Daemon;
use crate::error::{QmpError, Reply};
use qapi::{Map, Value};
use serde::de::DeserializeOwned;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

/// A command: its arguments, and what it does.
pub(crate) trait Command: DeserializeOwned + 'static {
    /// Its name on the wire.
    const NAME: &'static str;
    /// Executes it.
    fn run(self, daemon: Rc<Daemon>) -> impl Future<Output = Reply>;
}

type Running = Pin<Box<dyn Future<Output = Reply>>>;

/// A row of the table of commands.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) name: &'static str,
    pub(crate) run: fn(Rc<Daemon>, Map<String, Value>) -> Running,
}

const fn entry<C: Command>() -> Entry {
    Entry {
        name: C::NAME,
        run: |daemon, arguments| {
            Box::pin(async move {
                // The schema has accepted them; a failure here is a command that disagrees with its schema.
                let command: C = qapi::from_value(Value::Object(arguments))
                    .map_err(|e| QmpError::generic(e.to_string()))?;
                command.run(daemon).await
            })
        },
    }
}

/// Every command, by family.
pub(crate) const TABLE: &[&[Entry]] = &[
    protocol::COMMANDS,
    bitmap::COMMANDS,
    chardev::COMMANDS,
    node::COMMANDS,
    create::COMMANDS,
    query::COMMANDS,
    record::COMMANDS,
    export::COMMANDS,
    mirror::COMMANDS,
    backup::COMMANDS,
    drive::COMMANDS,
    chain::COMMANDS,
    job::COMMANDS,
    object::COMMANDS,
    reopen::COMMANDS,
    replication::COMMANDS,
    replication_checkpoints::COMMANDS,
    colo::COMMANDS,
    snapshot::COMMANDS,
    state::COMMANDS,
    transaction::COMMANDS,
    verify::COMMANDS,
];

/// Every event that may be emitted.
pub(crate) const EVENTS: &[&str] = &[
    "BLOCK_EXPORT_DELETED",
    "BLOCK_IMAGE_CORRUPTED",
    "BLOCK_JOB_CANCELLED",
    "BLOCK_JOB_COMPLETED",
    "BLOCK_JOB_ERROR",
    "BLOCK_JOB_IMAGE_DELETED",
    "BLOCK_JOB_LINK_LOST",
    "BLOCK_JOB_LINK_RESTORED",
    "BLOCK_JOB_MISMATCH",
    "BLOCK_JOB_PENDING",
    "BLOCK_JOB_READY",
    "BLOCK_WRITE_THRESHOLD",
    "COLO_EXIT",
    "JOB_STATUS_CHANGE",
    "QUORUM_FAILURE",
    "QUORUM_REPORT_BAD",
    "REPLICATION_BUFFER_THRESHOLD",
    "REPLICATION_CHECKPOINT",
    "REPLICATION_CHECKPOINT_VETO",
    "REPLICATION_CHECKPOINT_WANTED",
    "REPLICATION_DEGRADED",
    "REPLICATION_ERROR",
    "REPLICATION_FAILOVER",
    "REPLICATION_FENCED",
    "REPLICATION_PREPARED",
    "REPLICATION_RESTORED",
    "REPLICATION_SPLIT_BRAIN",
    "REPLICATION_STATE_CHANGE",
    "REPLICATION_TEST_ENDED",
    "REPLICATION_VERIFY",
];
