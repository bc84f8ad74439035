//! Continuous replication: `replication-*` and `query-replication` (liveblk's own; reference/replication.md section 3).

use super::replication_fencing::{self, FencingArg};
use super::{Command, Entry, entry};
use crate::Daemon;
use crate::address::SocketAddress;
use crate::error::{QmpError, Reply};
use crate::jobinfo::millis;
use block::{BlockError, ErrorKind};
use drivers::filters::replication::Stage;
use env::Stream;
use qapi::{Map, Value, json};
use replication::Epoch;
use replication::ack::{AckLevel, Quorum};
use replication::primary::{Config, LinkPolicy, Primary};
use replication::session::{
    Accept, Acting, Connect, DEFAULT_TIMEOUT, Fact, Group, NewGroup, PrimaryGroup, SecondaryGroup, Secure,
    TakeOver,
};
use replication::store::{Engine, MAX_RETAIN};
use serde::Deserialize;
use std::rc::Rc;
use std::time::Duration;

pub(super) const COMMANDS: &[Entry] = &[
    entry::<GroupAdd>(),
    entry::<GroupRemove>(),
    entry::<PeerAdd>(),
    entry::<PeerRemove>(),
    entry::<Set>(),
    entry::<Start>(),
    entry::<Checkpoint>(),
    entry::<Failover>(),
    entry::<Switchover>(),
    entry::<Verify>(),
    entry::<Resolve>(),
    entry::<Stop>(),
    entry::<Query>(),
];

/// Bytes of a store where nothing else is said.
const DEFAULT_SIZE: u64 = 1 << 30;
/// How long a checkpoint command waits where nothing else is said.
const CHECKPOINT_MS: u64 = 60_000;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct VolumeArg {
    node_name: String,
    front: Option<String>,
}

#[derive(Deserialize)]
struct StoreArg {
    path: String,
    size: Option<u64>,
}

/// Makes a group of disks that are replicated together.
#[derive(Deserialize)]
struct GroupAdd {
    id: String,
    volumes: Vec<VolumeArg>,
    store: StoreArg,
    engine: Option<String>,
    retain: Option<u64>,
    tls: Option<TlsArg>,
    fencing: Option<FencingArg>,
}

/// TLS between the sides: credentials by their names.
#[derive(Deserialize, Default)]
pub(crate) struct TlsArg {
    connect: Option<String>,
    hostname: Option<String>,
    listen: Option<String>,
    authz: Option<String>,
}

impl TlsArg {
    /// The ways that the names stand for.
    ///
    /// # Errors
    /// There are no such credentials, or they are for the other end.
    pub(crate) fn secure(self, daemon: &Daemon) -> Result<Secure, QmpError> {
        let named = [
            ("connect", &self.connect),
            ("hostname", &self.hostname),
            ("listen", &self.listen),
            ("authz", &self.authz),
        ];
        let named = named.into_iter().filter_map(|(key, v)| Some((key, v.clone()?))).collect();
        let objects = daemon.objects();
        let connect = match &self.connect {
            None => None,
            Some(id) => Some(client_tls(daemon, id, self.hostname)?),
        };
        let accept = objects.server_tls(self.listen.as_deref(), self.authz)?.map(|server| -> Accept {
            Rc::new(move |stream| {
                let server = server.clone();
                Box::pin(async move {
                    let why = "somebody without the right certificate tried to connect";
                    server.protect(stream).await.ok_or_else(|| BlockError::new(ErrorKind::Io, why))
                })
            })
        });
        Ok(Secure { connect, accept, named })
    }
}

/// Connects with the credentials `id`; what is connected to has a certificate for `fixed`, or for its host's name.
///
/// # Errors
/// There are no such credentials, or they are for the other end.
pub(super) fn client_tls(daemon: &Daemon, id: &str, fixed: Option<String>) -> Result<Connect, QmpError> {
    let credentials = daemon.objects().tls(id, tls::Endpoint::Client)?;
    Ok(Rc::new(move |stream, host| {
        let (credentials, host) = (credentials.clone(), fixed.clone().or(host));
        Box::pin(async move {
            let protected = credentials.connect(stream, host.as_deref()).await?;
            Ok(protected as Rc<dyn Stream>)
        })
    }))
}

impl Command for GroupAdd {
    const NAME: &'static str = "replication-group-add";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        if daemon.replication().borrow().contains_key(&self.id) {
            return Err(QmpError::generic(format!("Replication group '{}' already exists", self.id)));
        }
        let front = |v: VolumeArg| {
            let name = v.front.unwrap_or_else(|| format!("{}-{}", self.id, v.node_name));
            (v.node_name, name)
        };
        let retain = self.retain.unwrap_or(0);
        if retain > MAX_RETAIN {
            return Err(QmpError::generic(format!("Parameter 'retain' expects 0 to {MAX_RETAIN}")));
        }
        let fencing = self.fencing.unwrap_or_default();
        let new = NewGroup {
            id: self.id.clone(),
            retain,
            secure: self.tls.unwrap_or_default().secure(&daemon)?,
            volumes: self.volumes.into_iter().map(front).collect(),
            store: self.store.path.into(),
            size: self.store.size.unwrap_or(DEFAULT_SIZE),
            manual_fencing: fencing.by_hand(),
            fencing: fencing.arbiter(&daemon, &self.id)?,
            engine: if self.engine.as_deref() == Some("undo") { Engine::Undo } else { Engine::Redo },
        };
        let names: Vec<String> = new.volumes.iter().map(|v| v.1.clone()).collect();
        daemon.add_group(new).await?;
        Ok(json!({"fronts": names}))
    }
}

impl Daemon {
    /// Makes a group, whose events are this daemon's. What they change is recorded as well.
    ///
    /// # Errors
    /// As [`Group::add`].
    pub(crate) async fn add_group(self: &Rc<Self>, new: NewGroup) -> Result<Rc<Group>, QmpError> {
        let (events, id, daemon) = (self.events().clone(), new.id.clone(), Rc::downgrade(self));
        let tell = Rc::new(move |name: &'static str, facts: Vec<(&'static str, Fact)>| {
            let mut data = Map::new();
            data.insert("group".into(), json!(id));
            for (key, fact) in facts {
                let value = match fact {
                    Fact::Text(t) => json!(t),
                    Fact::Number(n) => json!(n),
                };
                data.insert(key.into(), value);
            }
            events.emit(name, Value::Object(data));
            let changes = matches!(name, "REPLICATION_STATE_CHANGE" | "REPLICATION_FENCED");
            let daemon = daemon.upgrade().filter(|d| changes && d.recorder().is_some());
            if let Some(daemon) = daemon {
                daemon.env().clone().spawn("replication recorded", async move {
                    let Some(recorder) = daemon.recorder() else { return };
                    if let Err(e) = recorder.record().await {
                        daemon.tell_trouble(&format!("a role in replication has changed and {e}"));
                    }
                });
            }
        });
        let id = new.id.clone();
        let group = Group::add(self.graph(), new, tell).await?;
        self.replication().borrow_mut().insert(id, group.clone());
        Ok(group)
    }
}

pub(crate) fn group(daemon: &Daemon, id: &str) -> Result<Rc<Group>, QmpError> {
    let found = daemon.replication().borrow().get(id).cloned();
    found.ok_or_else(|| QmpError::generic(format!("Replication group '{id}' not found")))
}

/// The group of that name as what it is now: a primary, or the error.
pub(super) fn acting_primary(daemon: &Daemon, id: &str) -> Result<Rc<PrimaryGroup>, QmpError> {
    match group(daemon, id)?.acting() {
        Acting::Primary(primary) => Ok(primary),
        Acting::Unprotected | Acting::Secondary(_) => {
            Err(QmpError::generic(format!("Replication group '{id}' is not a primary")))
        }
    }
}

/// Removes a group that has no role.
#[derive(Deserialize)]
struct GroupRemove {
    id: String,
}

impl Command for GroupRemove {
    const NAME: &'static str = "replication-group-remove";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        group(&daemon, &self.id)?.remove().await?;
        daemon.replication().borrow_mut().remove(&self.id);
        Ok(json!({}))
    }
}

/// Adds a secondary to forward to.
#[derive(Deserialize)]
struct PeerAdd {
    group: String,
    peer: String,
    addr: SocketAddress,
}

impl Command for PeerAdd {
    const NAME: &'static str = "replication-peer-add";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        group(&daemon, &self.group)?.add_peer(&self.peer, self.addr.read()?)?;
        Ok(json!({}))
    }
}

/// Removes a secondary from those to forward to.
#[derive(Deserialize)]
struct PeerRemove {
    group: String,
    peer: String,
}

impl Command for PeerRemove {
    const NAME: &'static str = "replication-peer-remove";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        group(&daemon, &self.group)?.remove_peer(&self.peer)?;
        Ok(json!({}))
    }
}

/// Changes settings of a primary while it runs; what is not named stays.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Set {
    group: String,
    write_level: Option<String>,
    flush_level: Option<String>,
    min_acks: Option<u64>,
    on_link_loss: Option<String>,
    timeout_ms: Option<u64>,
    checkpoint_interval_ms: Option<u64>,
    decision: Option<String>,
}

impl Command for Set {
    const NAME: &'static str = "replication-set";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let primary = acting_primary(&daemon, &self.group)?;
        let timeout = timeout(self.timeout_ms)?;
        let every = interval(self.checkpoint_interval_ms)?;
        let now = primary.look(|c| c.config().clone());
        let config = Config {
            write_level: level(self.write_level.as_deref(), now.write_level)?,
            flush_level: level(self.flush_level.as_deref(), now.flush_level)?,
            quorum: self.min_acks.map_or(now.quorum, min_acks),
            policy: policy(self.on_link_loss.as_deref(), now.policy),
            external_decision: external(self.decision.as_deref(), now.external_decision),
        };
        if self.timeout_ms.is_some() {
            primary.set_timeout(timeout);
        }
        if self.checkpoint_interval_ms.is_some() {
            primary.set_interval(every);
        }
        let seq = primary.configure(config);
        Ok(json!({"seq": seq.0}))
    }
}

fn level(name: Option<&str>, otherwise: AckLevel) -> Result<AckLevel, QmpError> {
    let Some(name) = name else { return Ok(otherwise) };
    AckLevel::from_name(name)
        .ok_or_else(|| QmpError::generic(format!("'{name}' is no level of acknowledgement")))
}

fn min_acks(n: u64) -> Quorum {
    Quorum::Any(usize::try_from(n).unwrap_or(usize::MAX))
}

fn policy(name: Option<&str>, otherwise: LinkPolicy) -> LinkPolicy {
    // the schema lets no other name through
    name.and_then(LinkPolicy::from_name).unwrap_or(otherwise)
}

fn external(decision: Option<&str>, otherwise: bool) -> bool {
    decision.map_or(otherwise, |d| d == "external")
}

fn timeout(ms: Option<u64>) -> Result<Duration, QmpError> {
    let timeout = ms.map_or(DEFAULT_TIMEOUT, Duration::from_millis);
    if timeout < Duration::from_millis(10) {
        return Err(QmpError::generic("Parameter 'timeout-ms' expects at least 10"));
    }
    Ok(timeout)
}

/// Gives a group its role.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Start {
    group: String,
    role: String,
    listen: Option<SocketAddress>,
    demote: Option<bool>,
    write_level: Option<String>,
    flush_level: Option<String>,
    min_acks: Option<u64>,
    on_link_loss: Option<String>,
    timeout_ms: Option<u64>,
    checkpoint_interval_ms: Option<u64>,
    decision: Option<String>,
}

impl Start {
    fn config(&self) -> Result<Config, QmpError> {
        let defaults = Config::default();
        Ok(Config {
            write_level: level(self.write_level.as_deref(), defaults.write_level)?,
            flush_level: level(self.flush_level.as_deref(), defaults.flush_level)?,
            quorum: min_acks(self.min_acks.unwrap_or(1)),
            policy: policy(self.on_link_loss.as_deref(), defaults.policy),
            external_decision: external(self.decision.as_deref(), false),
        })
    }
}

/// Time between checkpoints; 0: none by the clock.
fn interval(ms: Option<u64>) -> Result<Option<Duration>, QmpError> {
    match ms {
        None | Some(0) => Ok(None),
        Some(ms @ 10..=86_400_000) => Ok(Some(Duration::from_millis(ms))),
        Some(_) => Err(QmpError::generic(
            "Parameter 'checkpoint-interval-ms' expects 0, or 10 to 86400000 (one day)",
        )),
    }
}

impl Command for Start {
    const NAME: &'static str = "replication-start";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let group = group(&daemon, &self.group)?;
        if self.role == "primary" {
            let timeout = timeout(self.timeout_ms)?;
            let (config, every) = (self.config()?, interval(self.checkpoint_interval_ms)?);
            let listen = self.listen.map(|l| l.read()).transpose()?;
            group.start_primary(config, timeout, listen.as_ref()).await?;
            if let Acting::Primary(primary) = group.acting() {
                primary.set_interval(every);
            }
            return Ok(match group.listening() {
                Some(address) => json!({"address": address.to_string()}),
                None => json!({}),
            });
        }
        let demote = self.demote.unwrap_or(false);
        let Some(listen) = self.listen else {
            return Err(QmpError::generic("Parameter 'listen' is missing"));
        };
        let address = group.start_secondary(&listen.read()?, demote).await?;
        Ok(json!({"address": address.to_string()}))
    }
}

/// Makes a checkpoint on all secondaries.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Checkpoint {
    group: String,
    timeout_ms: Option<u64>,
}

impl Command for Checkpoint {
    const NAME: &'static str = "replication-checkpoint";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let primary = acting_primary(&daemon, &self.group)?;
        if primary.look(|c| c.config().external_decision) {
            return Err(QmpError::generic(format!(
                "Checkpoints of replication group '{}' are decided from outside: use replication-prepare-checkpoint and replication-commit",
                self.group
            )));
        }
        let timeout = Duration::from_millis(self.timeout_ms.unwrap_or(CHECKPOINT_MS));
        let done = primary.checkpoint(timeout).await?;
        Ok(json!({
            "epoch": done.epoch.0,
            "digest": done.digest.to_string(),
            "bytes": done.digest.bytes,
            "duration-us": micros(done.duration),
        }))
    }
}

pub(super) fn micros(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

/// Lets a secondary take over.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Failover {
    group: String,
    own_writes: Option<String>,
    fenced: Option<bool>,
    epoch: Option<u64>,
    force: Option<bool>,
    acknowledge_loss: Option<u64>,
}

impl Command for Failover {
    const NAME: &'static str = "replication-failover";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let group = group(&daemon, &self.group)?;
        let Acting::Secondary(secondary) = group.acting() else {
            return Err(QmpError::generic(format!("Replication group '{}' is not a secondary", self.group)));
        };
        let first = secondary.stage() == Stage::Running;
        if group.settings().manual_fencing && first && self.fenced != Some(true) {
            return Err(QmpError::generic(format!(
                "Replication group '{}' is fenced by hand: see to it that its primary cannot write any more, and give 'fenced': true",
                self.group
            )));
        }
        let at = self.epoch.map(Epoch);
        let newest = at.is_none_or(|e| e == secondary.history().epoch());
        if first && !newest && self.own_writes.as_deref() == Some("keep") {
            return Err(QmpError::generic(
                "What was written on this side stands on the newest checkpoint: it cannot be kept with an older one",
            ));
        }
        let force = self.force.unwrap_or(false);
        let loses = secondary.history().epoch().0;
        if force && first && self.acknowledge_loss != Some(loses) {
            return Err(QmpError::generic(format!(
                "What was written since checkpoint {loses} is lost by force: give 'acknowledge-loss': {loses}"
            )));
        }
        let keep_own = self.own_writes.as_deref() != Some("discard");
        let done = secondary.failover(&TakeOver { keep_own, at, force }).await?;
        if let Some(other) = at.filter(|e| *e != done.epoch) {
            return Err(QmpError::generic(format!(
                "Replication group '{}' has failed over to checkpoint {} already, not to {other}",
                self.group, done.epoch
            )));
        }
        let mut record = json!({
            "epoch": done.epoch.0,
            "generation": done.generation.0,
            "stage": secondary.stage().name(),
            "duration-us": micros(done.duration),
        });
        if let Some(age) = done.age {
            record["age-ms"] = json!(millis(age));
        }
        Ok(record)
    }
}

/// Changes sides without loss.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Switchover {
    group: String,
    to: String,
    listen: SocketAddress,
    advertise: Option<String>,
    timeout_ms: Option<u64>,
}

impl Command for Switchover {
    const NAME: &'static str = "replication-switchover";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let group = group(&daemon, &self.group)?;
        let limit = Duration::from_millis(self.timeout_ms.unwrap_or(CHECKPOINT_MS));
        let done = group.switch_over(&self.to, &self.listen.read()?, self.advertise, limit).await?;
        Ok(json!({
            "epoch": done.epoch.0,
            "generation": done.generation.0,
            "duration-us": micros(done.duration),
            "address": done.address.to_string(),
        }))
    }
}

/// Compares a secondary with this side, while both go on.
#[derive(Deserialize)]
struct Verify {
    group: String,
    peer: String,
    repair: Option<String>,
}

impl Command for Verify {
    const NAME: &'static str = "replication-verify";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let primary = acting_primary(&daemon, &self.group)?;
        primary.verify(&self.peer, self.repair.as_deref() == Some("resync"))?;
        Ok(json!({}))
    }
}

/// After a split brain: whose writes are given up.
#[derive(Deserialize)]
struct Resolve {
    group: String,
    victim: String,
    listen: Option<SocketAddress>,
}

impl Command for Resolve {
    const NAME: &'static str = "replication-resolve";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let group = group(&daemon, &self.group)?;
        if self.victim == "local" {
            let Some(listen) = self.listen else {
                return Err(QmpError::generic("Parameter 'listen' is missing"));
            };
            let address = group.give_up(&listen.read()?).await?;
            return Ok(json!({"address": address.to_string()}));
        }
        match acting_primary(&daemon, &self.group)?.retry_peer(&self.victim) {
            true => Ok(json!({})),
            false => Err(QmpError::generic(format!("No peer '{}' has refused", self.victim))),
        }
    }
}

/// Gives the role up.
#[derive(Deserialize)]
struct Stop {
    group: String,
}

impl Command for Stop {
    const NAME: &'static str = "replication-stop";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        group(&daemon, &self.group)?.stop().await?;
        Ok(json!({}))
    }
}

/// What groups do.
#[derive(Deserialize)]
struct Query {
    group: Option<String>,
}

impl Command for Query {
    const NAME: &'static str = "query-replication";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let all: Vec<(String, Rc<Group>)> = match self.group {
            Some(id) => vec![(id.clone(), group(&daemon, &id)?)],
            None => daemon.replication().borrow().iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
        };
        Ok(Value::Array(all.iter().map(|(id, group)| describe(id, group)).collect()))
    }
}

fn describe(id: &str, group: &Group) -> Value {
    let mut out = Map::new();
    out.insert("id".into(), json!(id));
    match group.acting() {
        Acting::Unprotected => {
            out.insert("role".into(), json!("unprotected"));
            out.insert("stage".into(), json!("none"));
        }
        Acting::Primary(p) => primary(&p, &mut out),
        Acting::Secondary(s) => {
            secondary(&s, &mut out);
            let test = |t: &(String, Epoch)| json!({"node-name": t.0, "epoch": t.1.0});
            out.insert("tests".into(), group.tests().iter().map(test).collect());
        }
    }
    if let Some(lease) = group.lease() {
        replication_fencing::describe(lease, &mut out);
    }
    if let Some(why) = group.closed() {
        out.insert("state".into(), json!("closed"));
        out.insert("last-error".into(), json!(why));
    }
    let secure = &group.settings().secure;
    out.insert("tls".into(), json!(secure.connect.is_some() || secure.accept.is_some()));
    let volume = |v: &(String, String)| json!({"node-name": v.0, "front": v.1});
    out.insert("volumes".into(), group.settings().volumes.iter().map(volume).collect());
    if let Some(address) = group.listening() {
        out.insert("listen".into(), json!(address.to_string()));
    }
    Value::Object(out)
}

fn numbers(epochs: &[Epoch]) -> Value {
    epochs.iter().map(|e| json!(e.0)).collect()
}

fn primary(p: &PrimaryGroup, out: &mut Map<String, Value>) {
    let mut put = |key: &str, value: Value| {
        out.insert(key.into(), value);
    };
    put("role", json!("primary"));
    put("stage", json!(if p.look(Primary::fenced).is_some() { "done" } else { "running" }));
    let state = p.look(|c| match (c.fenced(), c.degraded(), c.config().policy) {
        (Some(_), ..) => "fenced",
        _ if p.is_uncertain() => "connecting",
        (None, false, _) => "running",
        (None, true, LinkPolicy::Degrade) => "degraded",
        (None, true, _) => "suspended",
    });
    put("state", json!(state));
    p.look(|c| {
        put("generation", json!(c.history().generation().0));
        put("open-epoch", json!(c.open_epoch().0));
        put("committed-epoch", json!(c.history().epoch().0));
        put("sent-data-size", json!(c.sent_since_mark()));
    });
    p.look(|c| {
        put("decision", json!(if c.config().external_decision { "external" } else { "auto" }));
        put("undecided", numbers(&c.undecided()));
    });
    put("checkpoint-interval-ms", json!(p.interval().map_or(0, millis)));
    let facts = p.peer_facts();
    let peers: Vec<Value> = p.look(|c| {
        let one = |(i, peer): (usize, &replication::primary::Peer)| {
            let mut one = json!({
                "state": peer.state.name(),
                "sent-seq": c.last().0,
                "received-seq": peer.progress.received.0,
                "durable-seq": peer.progress.durable.0,
                "committed-epoch": peer.committed.map_or(0, |e| e.0),
                "dirty-bytes": c.dirty_bytes(i),
                "buffer-fill": peer.fill,
            });
            // What a failover to it would lose now is what it has not committed.
            one["rpo-bytes"] = one["dirty-bytes"].clone();
            if let Some(f) = facts.get(i) {
                one["name"] = json!(f.name);
                one["addr"] = json!(f.address);
                one["rpo-ms"] = json!(millis(f.behind));
                one["resync-bytes"] = json!(f.caught_up);
                one["in-flight-bytes"] = json!(f.queued);
                if let Some(rtt) = f.rtt {
                    one["last-rtt-us"] = json!(micros(rtt));
                }
            }
            one
        };
        let present = |p: &(usize, _)| facts.get(p.0).is_none_or(|f| !f.removed);
        c.peers().iter().enumerate().filter(present).map(one).collect()
    });
    put("peers", Value::Array(peers));
    if let Some(v) = p.verified() {
        let mut verify = json!({
            "peer": v.peer, "verdict": v.verdict.name(), "done": v.done, "total": v.total, "mismatched": v.mismatched,
        });
        if let Some((volume, offset)) = v.first {
            verify["volume"] = json!(volume);
            verify["offset"] = json!(offset);
        }
        if let Some(e) = v.error {
            verify["error"] = json!(e);
        }
        put("last-verify", verify);
    }
    if let Some(e) = p.last_error() {
        put("last-error", json!(e));
    }
}

fn secondary(s: &SecondaryGroup, out: &mut Map<String, Value>) {
    let mut put = |key: &str, value: Value| {
        out.insert(key.into(), value);
    };
    put("role", json!("secondary"));
    put("stage", json!(s.stage().name()));
    let state = match (s.stage(), s.is_connected()) {
        (Stage::Running, true) => "running",
        (Stage::Running, false) => "detached",
        (stage, _) => stage.name(),
    };
    put("state", json!(state));
    put("generation", json!(s.generation().0));
    put("committed-epoch", json!(s.history().epoch().0));
    put("checkpoints", numbers(&s.checkpoints()));
    put("undecided", numbers(&s.prepared()));
    if let Some(age) = s.age() {
        put("checkpoint-age-ms", json!(millis(age)));
    }
    let (seq, bytes) = s.received();
    put("received-seq", json!(seq.0));
    put("open-bytes", json!(bytes));
    let u = s.usage();
    put("engine", json!(if s.engine() == Engine::Undo { "undo" } else { "redo" }));
    put(
        "buffer",
        json!({"size": u.size, "used": u.used, "own": u.own, "pending": u.pending, "open": u.open}),
    );
    if let Some(f) = s.last_failover() {
        put(
            "last-failover",
            json!({"epoch": f.epoch.0, "generation": f.generation.0, "rto-us": micros(f.duration)}),
        );
    }
    if let Some(e) = s.last_error() {
        put("last-error", json!(e));
    }
}
