//! Replication groups as records, and made again from them.
//!
//! A group comes back before anything is served, in the role it had: a primary goes on from what it remembers durably of its own, a
//! secondary at its checkpoint, where it was found before. What must stay true: a disk of a group is served by its group or not at
//! all; a group that cannot be given its role again serves nothing until it can, or until it is removed.

use super::Recorder;
use super::describe::address;
use super::restore::Record;
use crate::Daemon;
use crate::address::SocketAddress;
use crate::commands::replication::TlsArg;
use crate::commands::replication_fencing::FencingArg;
use crate::error::QmpError;
use crate::jobinfo::millis;
use env::Address;
use qapi::{Map, Value, json};
use replication::Generation;
use replication::ack::{AckLevel, Quorum};
use replication::primary::{Config, LinkPolicy, Primary};
use replication::session::{Acting, Group, NewGroup};
use replication::store::Engine;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

impl Recorder {
    pub(super) fn describe_groups(&self, daemon: &Daemon) -> BTreeMap<String, Vec<u8>> {
        let groups = daemon.replication().borrow();
        // one that could not be given its role stays recorded as it was
        let whole = groups.iter().filter(|(_, g)| g.closed().is_none());
        whole.map(|(id, g)| (id.clone(), describe(daemon, g).to_string().into_bytes())).collect()
    }
}

fn describe(daemon: &Daemon, group: &Group) -> Value {
    let new = group.settings();
    let volume = |v: &(String, String)| json!({"node-name": v.0, "front": v.1});
    let peer = |p: &(String, Address)| json!({"peer": p.0, "addr": absolute(daemon, &p.1)});
    let store = daemon.env().absolute(&new.store);
    let mut out = json!({
        "volumes": new.volumes.iter().map(volume).collect::<Vec<_>>(),
        "store": store.to_string_lossy(), "size": new.size, "retain": new.retain,
        "undo": new.engine == Engine::Undo, "fenced-by-hand": new.manual_fencing,
        "arbiter": new.fencing.as_ref().map(|f| f.named.clone()),
        "tls": new.secure.named.iter().map(|(key, v)| ((*key).to_owned(), json!(v))).collect::<Map<_, _>>(),
        "peers": group.peers().iter().map(peer).collect::<Vec<_>>(),
    });
    if daemon.blkcolo().borrow().contains(&new.id) {
        let front = new.volumes.first().and_then(|v| group.front_of(&v.1));
        out["blkcolo"] = json!({"owned": front.is_some_and(|f| f.is_monitor_owned())});
    }
    match group.acting() {
        Acting::Unprotected => {}
        Acting::Primary(p) => {
            let c = p.look(|c| c.config().clone());
            out["primary"] = json!({
                "write-level": c.write_level.name(), "flush-level": c.flush_level.name(), "min-acks": c.quorum.needed(),
                "on-link-loss": c.policy.name(), "external": c.external_decision,
                "timeout-ms": millis(p.timeout()), "interval-ms": p.interval().map_or(0, millis),
                "fenced": p.look(Primary::fenced).map_or(0, |g| g.0),
                "listen": group.listening().map(|a| absolute(daemon, &a)),
            });
        }
        Acting::Secondary(s) => {
            let listen = group.listening().map(|a| absolute(daemon, &a)).unwrap_or_default();
            out["secondary"] = json!({"listen": listen, "refuses-own": s.refuses_own()});
        }
    }
    out
}

fn absolute(daemon: &Daemon, at: &Address) -> Value {
    match at {
        Address::Unix(path) => address(&Address::Unix(daemon.env().absolute(Path::new(path)))),
        other => address(other),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Saved {
    volumes: Vec<SavedVolume>,
    store: String,
    size: u64,
    retain: u64,
    undo: bool,
    fenced_by_hand: bool,
    /// A text of JSON: what `replication-group-add` was told.
    arbiter: Option<String>,
    tls: TlsArg,
    peers: Vec<SavedPeer>,
    blkcolo: Option<SavedNode>,
    primary: Option<SavedPrimary>,
    secondary: Option<SavedSecondary>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SavedVolume {
    node_name: String,
    front: String,
}

/// Of a group that ends with its node.
#[derive(Deserialize)]
struct SavedNode {
    owned: bool,
}

#[derive(Deserialize)]
struct SavedPeer {
    peer: String,
    addr: SocketAddress,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SavedPrimary {
    write_level: String,
    flush_level: String,
    min_acks: usize,
    on_link_loss: String,
    external: bool,
    timeout_ms: u64,
    interval_ms: u64,
    fenced: u64,
    listen: Option<SocketAddress>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SavedSecondary {
    listen: SocketAddress,
    refuses_own: Option<String>,
}

/// The disks of a record, whatever else is in it.
pub(super) fn disks(record: &Map<String, Value>) -> Vec<String> {
    let volumes = record.get("volumes").and_then(Value::as_array);
    let name = |v: &Value| v.get("node-name").and_then(Value::as_str).map(str::to_owned);
    volumes.into_iter().flatten().filter_map(name).collect()
}

impl Daemon {
    /// Makes a group again, in its role.
    pub(super) async fn restore_group(self: &Rc<Self>, record: &Record) -> Result<(), QmpError> {
        let damaged = |e: String| QmpError::generic(format!("its record is damaged: {e}"));
        let saved = Saved::deserialize(record.value()).map_err(|e| damaged(e.to_string()))?;
        let known = self.replication().borrow().get(record.key()).cloned();
        let group = match known {
            // an earlier attempt came so far
            Some(group) => group,
            None => {
                let fencing = match &saved.arbiter {
                    Some(text) => {
                        let arg: FencingArg =
                            serde_json::from_str(text).map_err(|e| damaged(e.to_string()))?;
                        arg.arbiter(self, record.key())?
                    }
                    None => None,
                };
                let new = NewGroup {
                    id: record.key().to_owned(),
                    volumes: saved.volumes.into_iter().map(|v| (v.node_name, v.front)).collect(),
                    store: saved.store.into(),
                    size: saved.size,
                    engine: if saved.undo { Engine::Undo } else { Engine::Redo },
                    retain: saved.retain,
                    manual_fencing: saved.fenced_by_hand,
                    fencing,
                    secure: saved.tls.secure(self)?,
                };
                let group = self.add_group(new).await?;
                group.close_with(Some("the replication group has not its role again yet"));
                for p in saved.peers {
                    group.add_peer(&p.peer, p.addr.read()?)?;
                }
                if let Some(node) = saved.blkcolo {
                    self.bind_to_node(record.key(), &group);
                    let front = group.settings().volumes.first().and_then(|v| group.front_of(&v.1));
                    front.iter().for_each(|f| f.set_monitor_owned(node.owned));
                }
                group
            }
        };
        let outcome = match (saved.primary, saved.secondary) {
            (Some(p), _) => self.begin_primary(&group, p).await,
            (None, Some(s)) => self.begin_secondary(&group, s).await,
            (None, None) => Ok(()),
        };
        match &outcome {
            Ok(()) => group.close_with(None),
            Err(e) => {
                let why = format!(
                    "the replication group '{}' could not be given its role again: {}",
                    record.key(),
                    e.desc
                );
                group.close_with(Some(&why));
            }
        }
        outcome
    }

    async fn begin_secondary(self: &Rc<Self>, group: &Rc<Group>, s: SavedSecondary) -> Result<(), QmpError> {
        let listen = s.listen.read()?;
        self.while_held(async || group.resume_secondary(&listen).await.map_err(QmpError::from)).await?;
        if let (Acting::Secondary(secondary), Some(why)) = (group.acting(), s.refuses_own) {
            secondary.refuse_own_writes(&why);
        }
        Ok(())
    }

    async fn begin_primary(self: &Rc<Self>, group: &Rc<Group>, p: SavedPrimary) -> Result<(), QmpError> {
        let level = |name: &str| {
            AckLevel::from_name(name)
                .ok_or_else(|| QmpError::generic(format!("its record names the level '{name}'")))
        };
        let policy = LinkPolicy::from_name(&p.on_link_loss).unwrap_or_default();
        let config = Config {
            write_level: level(&p.write_level)?,
            flush_level: level(&p.flush_level)?,
            quorum: Quorum::Any(p.min_acks),
            policy,
            external_decision: p.external,
        };
        let (timeout, listen) = (Duration::from_millis(p.timeout_ms.max(10)), p.listen);
        let listen = listen.map(|l| l.read()).transpose()?;
        let begin = async || {
            group.start_primary(config.clone(), timeout, listen.as_ref()).await.map_err(QmpError::from)
        };
        self.while_held(begin).await?;
        if let Acting::Primary(primary) = group.acting() {
            primary.set_interval(Some(p.interval_ms).filter(|ms| *ms > 0).map(Duration::from_millis));
            if p.fenced > 0 {
                primary.fence(Generation(p.fenced));
            }
        }
        Ok(())
    }
}
