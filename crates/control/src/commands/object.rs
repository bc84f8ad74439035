//! Objects that the user creates.

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::Reply;
use crate::object::{list_properties, list_types};
use qapi::{Map, Value, json};
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[
    entry::<ObjectAdd>(),
    entry::<ObjectDel>(),
    entry::<QomList>(),
    entry::<QomGet>(),
    entry::<QomSet>(),
    entry::<QomListTypes>(),
    entry::<QomListProperties>(),
];

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
        daemon.objects().add(daemon.env(), &self.kind, &self.id, self.properties).await?;
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

/// A property of an object.
#[derive(Deserialize)]
struct QomGet {
    path: String,
    property: String,
}

impl Command for QomGet {
    const NAME: &'static str = "qom-get";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.objects().get(&self.path, &self.property)
    }
}

/// Changes a property of an object.
#[derive(Deserialize)]
struct QomSet {
    path: String,
    property: String,
    value: Value,
}

impl Command for QomSet {
    const NAME: &'static str = "qom-set";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.objects().set(daemon.env(), &self.path, &self.property, self.value).await
    }
}

/// The types of objects.
#[derive(Deserialize)]
struct QomListTypes {
    implements: Option<String>,
    #[serde(rename = "abstract", default)]
    with_abstract: bool,
}

impl Command for QomListTypes {
    const NAME: &'static str = "qom-list-types";
    async fn run(self, _: Rc<Daemon>) -> Reply {
        Ok(list_types(self.implements.as_deref(), self.with_abstract))
    }
}

/// The properties of a type.
#[derive(Deserialize)]
struct QomListProperties {
    typename: String,
}

impl Command for QomListProperties {
    const NAME: &'static str = "qom-list-properties";
    async fn run(self, _: Rc<Daemon>) -> Reply {
        list_properties(&self.typename)
    }
}
