//! Objects that the user creates. So far only iothreads, and those only by name: see docs/compat.md.

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::Reply;
use qapi::{Map, Value, json};
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[entry::<ObjectAdd>(), entry::<ObjectDel>(), entry::<QomList>()];

/// Creates an object.
#[derive(Deserialize)]
struct ObjectAdd {
    #[serde(rename = "qom-type")]
    kind: String,
    id: String,
    #[serde(flatten)]
    properties: Map<String, Value>,
}

impl Command for ObjectAdd {
    const NAME: &'static str = "object-add";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.objects().add(&self.kind, &self.id, self.properties)?;
        Ok(json!({}))
    }
}

/// Removes an object.
#[derive(Deserialize)]
struct ObjectDel {
    id: String,
}

impl Command for ObjectDel {
    const NAME: &'static str = "object-del";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.objects().remove(&self.id)?;
        Ok(json!({}))
    }
}

/// What is at a path of the tree of objects.
#[derive(Deserialize)]
struct QomList {
    path: String,
}

impl Command for QomList {
    const NAME: &'static str = "qom-list";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.objects().list(&self.path)
    }
}
