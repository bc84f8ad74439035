//! Character devices: what monitors talk through, and rings.

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::chardev::{ChardevSpec, KINDS};
use crate::error::{QmpError, Reply};
use qapi::{Map, Value, json};
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[
    entry::<QueryChardev>(),
    entry::<QueryChardevBackends>(),
    entry::<ChardevAdd>(),
    entry::<ChardevChange>(),
    entry::<ChardevRemove>(),
    entry::<ChardevSendBreak>(),
    entry::<RingbufWrite>(),
    entry::<RingbufRead>(),
];

/// The character devices.
#[derive(Deserialize)]
struct QueryChardev {}

impl Command for QueryChardev {
    const NAME: &'static str = "query-chardev";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        Ok(daemon.chardevs().query())
    }
}

/// The kinds of character devices.
#[derive(Deserialize)]
struct QueryChardevBackends {}

impl Command for QueryChardevBackends {
    const NAME: &'static str = "query-chardev-backends";
    async fn run(self, _: Rc<Daemon>) -> Reply {
        Ok(KINDS.iter().map(|name| json!({"name": name})).collect::<Value>())
    }
}

fn named(id: &str) -> impl Fn(QmpError) -> QmpError + '_ {
    move |e| {
        if e.desc.starts_with("Chardev with id") {
            return e;
        }
        QmpError { desc: format!("Failed to add chardev '{id}': {}", e.desc), ..e }
    }
}

/// Makes a device.
#[derive(Deserialize)]
struct ChardevAdd {
    id: String,
    backend: Map<String, Value>,
}

impl Command for ChardevAdd {
    const NAME: &'static str = "chardev-add";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.chardevs().check_room(&self.id)?;
        let spec = ChardevSpec::from_backend(&self.id, &self.backend).map_err(named(&self.id))?;
        daemon.add_chardev(spec).await.map_err(named(&self.id))?;
        Ok(json!({}))
    }
}

/// Makes a device that nobody uses anew, as something else.
#[derive(Deserialize)]
struct ChardevChange {
    id: String,
    backend: Map<String, Value>,
}

impl Command for ChardevChange {
    const NAME: &'static str = "chardev-change";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.chardevs().unused(&self.id)?;
        let spec = ChardevSpec::from_backend(&self.id, &self.backend).map_err(named(&self.id))?;
        daemon.chardevs().change(daemon.env(), daemon.objects(), spec, named(&self.id)).await?;
        Ok(json!({}))
    }
}

/// Removes a device.
#[derive(Deserialize)]
struct ChardevRemove {
    id: String,
}

impl Command for ChardevRemove {
    const NAME: &'static str = "chardev-remove";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.chardevs().remove(daemon.env(), &self.id).await?;
        Ok(json!({}))
    }
}

/// A break is a state of serial lines, of which there are none: as in QSD, nothing happens to other devices.
#[derive(Deserialize)]
struct ChardevSendBreak {
    id: String,
}

impl Command for ChardevSendBreak {
    const NAME: &'static str = "chardev-send-break";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        daemon.chardevs().existing(&self.id)?;
        Ok(json!({}))
    }
}

/// Writes to a ring.
#[derive(Deserialize)]
struct RingbufWrite {
    device: String,
    data: String,
    format: Option<String>,
}

impl Command for RingbufWrite {
    const NAME: &'static str = "ringbuf-write";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let base64 = self.format.as_deref() == Some("base64");
        daemon.chardevs().ring_write(&self.device, &self.data, base64)?;
        Ok(json!({}))
    }
}

/// Reads from a ring.
#[derive(Deserialize)]
struct RingbufRead {
    device: String,
    size: i64,
    format: Option<String>,
}

impl Command for RingbufRead {
    const NAME: &'static str = "ringbuf-read";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let base64 = self.format.as_deref() == Some("base64");
        Ok(json!(daemon.chardevs().ring_read(&self.device, self.size, base64)?))
    }
}
