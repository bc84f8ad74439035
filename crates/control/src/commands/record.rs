//! What has happened: events missed, jobs that are over.

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::Reply;
use crate::record::Which;
use qapi::Value;
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[entry::<QueryEvents>(), entry::<QueryJobLog>()];

/// The events after number `since`, as they were told; with `max` 0 only which numbers there are.
#[derive(Deserialize)]
struct QueryEvents {
    since: Option<i64>,
    max: Option<i64>,
}

impl Command for QueryEvents {
    const NAME: &'static str = "query-events";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let record = daemon.events().record();
        Ok(Value::Object(record.query(Which::Events, self.since, self.max, |_| true)?))
    }
}

/// The jobs that ended after number `since`, those called `id` if that is given.
#[derive(Deserialize)]
struct QueryJobLog {
    since: Option<i64>,
    max: Option<i64>,
    id: Option<String>,
}

impl Command for QueryJobLog {
    const NAME: &'static str = "query-job-log";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let wanted = |job: &Value| self.id.as_ref().is_none_or(|id| job["id"] == id.as_str());
        let record = daemon.events().record();
        Ok(Value::Object(record.query(Which::Jobs, self.since, self.max, wanted)?))
    }
}
