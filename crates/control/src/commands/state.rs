//! What of earlier lives of the daemon is kept, and what of it could not be made again (`--state-dir`; not in QSD).

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::Reply;
use qapi::{Value, json};
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[entry::<QueryState>(), entry::<StateRetry>()];

fn show(daemon: &Daemon) -> Value {
    let Some(recorder) = daemon.recorder() else { return json!({"enabled": false, "broken": []}) };
    let broken: Vec<Value> =
        recorder.broken().iter().map(|b| json!({"kind": b.kind(), "name": b.key, "reason": b.why})).collect();
    let store = recorder.store();
    let directory = store.directory().to_string_lossy();
    json!({"enabled": true, "directory": directory, "commits": store.number(), "broken": broken})
}

/// Where the state is kept, and what of it could not be made again.
#[derive(Deserialize)]
struct QueryState {}

impl Command for QueryState {
    const NAME: &'static str = "query-state";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        Ok(show(&daemon))
    }
}

/// Tries once more to make what could not be made again.
#[derive(Deserialize)]
struct StateRetry {}

impl Command for StateRetry {
    const NAME: &'static str = "state-retry";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.retry_state().await;
        Ok(show(&daemon))
    }
}
