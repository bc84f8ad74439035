//! The daemon's state, and its end.

use crate::chardev::{ChardevSpec, Chardevs};
use crate::commands::{EVENTS, Entry, TABLE};
use crate::error::{Class, QmpError, Reply};
use crate::events::Events;
use crate::jobinfo::JobEvents;
use crate::object::Objects;
use crate::session::Session;
use crate::state::{Recorder, only_asks};
use block::BlockError;
use env::sync::{Notify, Semaphore};
use env::{Env, Stream};
use exports::ExportRegistry;
use graph::{Graph, NodeCell};
use jobs::Registry;
use open::Opener;
use qapi::{Map, Schema, Value, json};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::Duration;

/// Commands that run at the same time, of all clients together: never met, since a client's own run one after another.
const TURNS: usize = 1 << 20;

/// How long the end waits for commands under way. They take milliseconds, but one that opens a node of a server that does
/// not answer may wait for ever, and must not keep the daemon.
const LAST_COMMANDS: Duration = Duration::from_secs(2);

/// How many turns a command takes: a transaction (or what is one) runs alone, so that nobody attaches to the nodes it holds
/// still; what cannot attach anybody runs at any time.
fn turns(command: &str) -> usize {
    let beside = ["query-", "job-", "block-job-", "qom-"];
    match command {
        "transaction"
        | "blockdev-snapshot"
        | "blockdev-snapshot-sync"
        | "blockdev-snapshot-internal-sync" => TURNS,
        "quit" => 0,
        other => usize::from(!beside.iter().any(|p| other.starts_with(p))),
    }
}

/// Takes a sentence for people.
type Tell = Rc<dyn Fn(&str)>;

/// How far the end has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Running,
    Ending,
    Ended,
}

fn corrupted(node: &str, c: &qcow2::Corruption) -> Value {
    let mut data = Map::new();
    data.insert("device".into(), json!(""));
    data.insert("node-name".into(), json!(node));
    data.insert("msg".into(), json!(c.message));
    data.extend(c.offset.map(|n| ("offset".to_owned(), json!(n))));
    data.extend(c.size.map(|n| ("size".to_owned(), json!(n))));
    data.insert("fatal".into(), json!(c.fatal));
    Value::Object(data)
}

/// Everything of one daemon. Lives on one thread; all that is held here is reached through `Rc`.
pub struct Daemon {
    env: Env,
    package: String,
    schema: &'static Schema,
    commands: BTreeMap<&'static str, Entry>,
    events: Rc<Events>,
    graph: Rc<Graph>,
    opener: Rc<Opener>,
    jobs: Rc<Registry>,
    exports: Rc<ExportRegistry>,
    colo: Rc<jobs::colo::Colo>,
    objects: Rc<Objects>,
    chardevs: Chardevs,
    replication: RefCell<BTreeMap<String, Rc<replication::session::Group>>>,
    /// Those groups that end with their node.
    blkcolo: RefCell<BTreeSet<String>>,
    /// A transaction takes all of them, other commands one.
    turns: Semaphore,
    sessions: RefCell<Vec<Rc<Session>>>,
    session_left: Notify,
    /// What could not be written back at the end.
    trouble: RefCell<Option<QmpError>>,
    /// Told of what went wrong after a command had done what it was asked.
    on_trouble: RefCell<Option<Tell>>,
    open: Cell<bool>,
    opened: Notify,
    phase: Cell<Phase>,
    phase_changed: Notify,
    /// Which side of a replication it was that ended last.
    last_side: Cell<&'static str>,
    /// Writes down what this daemon is, if a later life is to know.
    recorder: Rc<RefCell<Option<Rc<Recorder>>>>,
}

/// All commands.
fn entries() -> impl Iterator<Item = &'static Entry> {
    TABLE.iter().flat_map(|family| family.iter())
}

/// Their schema. It never changes, so it is taken apart once, also where one process has many daemons (the simulator).
fn schema() -> &'static Schema {
    static SCHEMA: OnceLock<Schema> = OnceLock::new();
    SCHEMA.get_or_init(|| {
        let names: Vec<&str> = entries().map(|e| e.name).collect();
        Schema::new(&names, EVENTS)
    })
}

/// A session's place in the list; leaves it when dropped.
pub(crate) struct Seat {
    daemon: Rc<Daemon>,
    session: Rc<Session>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.daemon.sessions.borrow_mut().retain(|s| !Rc::ptr_eq(s, &self.session));
        self.daemon.session_left.notify_all();
    }
}

impl Daemon {
    /// A daemon without nodes, exports, jobs or monitors. `package` is what it calls itself to clients.
    pub fn new(env: &Env, package: &str) -> Rc<Daemon> {
        let events = Events::new(env);
        let graph = Graph::new(env);
        let opener = Opener::new(&graph);
        let told = events.clone();
        opener.on_corruption(Rc::new(move |node, c| told.emit("BLOCK_IMAGE_CORRUPTED", corrupted(node, c))));
        let objects = Rc::<Objects>::default();
        let named = objects.clone();
        opener.find_credentials(Rc::new(move |id| {
            named.tls(id, tls::Endpoint::Client).map_err(|e| BlockError::invalid(e.desc))
        }));
        let told = events.clone();
        opener.on_quorum(Rc::new(move |event| {
            let (name, data) = crate::blockdev_filters::quorum_event(event);
            told.emit(name, data);
        }));
        let told = events.clone();
        opener.on_replication(Rc::new(move |node, event| {
            for (name, data) in crate::colo::events(node, &event) {
                told.emit(name, data);
            }
        }));
        let named = objects.clone();
        let recorder: Rc<RefCell<Option<Rc<Recorder>>>> = Rc::default();
        opener.find_throttle_groups(Rc::new(move |id| named.throttle_group(id)));
        let exports = ExportRegistry::new(env, {
            let (events, recorder, env) = (events.clone(), recorder.clone(), env.clone());
            move |id| {
                let data = json!({"id": id});
                let recorder = recorder.borrow().clone().filter(|r| !r.is_resting());
                let Some(recorder) = recorder else { return events.emit("BLOCK_EXPORT_DELETED", data) };
                let events = events.clone();
                env.spawn("export deleted", async move {
                    // whoever hears of it must not find it there again after a crash; a failure is told by the next command
                    let _ = recorder.record().await;
                    events.emit("BLOCK_EXPORT_DELETED", data);
                });
            }
        });
        let told = Rc::downgrade(&exports);
        graph.set_watcher(Rc::new(move || {
            if let Some(exports) = told.upgrade() {
                exports.tell_lengths();
            }
        }));
        let daemon = Rc::new(Daemon {
            env: env.clone(),
            package: package.to_owned(),
            schema: schema(),
            commands: entries().map(|e| (e.name, *e)).collect(),
            opener,
            colo: jobs::colo::Colo::new(env, &graph),
            graph,
            jobs: Registry::new(env, Rc::new(JobEvents(events.clone()))),
            exports,
            events,
            objects,
            chardevs: Chardevs::default(),
            replication: RefCell::default(),
            blkcolo: RefCell::default(),
            turns: Semaphore::new(TURNS),
            sessions: RefCell::new(Vec::new()),
            session_left: Notify::new(),
            trouble: RefCell::new(None),
            on_trouble: RefCell::new(None),
            open: Cell::new(false),
            opened: Notify::new(),
            phase: Cell::new(Phase::Running),
            phase_changed: Notify::new(),
            last_side: Cell::new("none"),
            recorder,
        });
        daemon.replicate_disks();
        daemon
    }

    /// The daemon's door to the outside.
    pub fn env(&self) -> &Env {
        &self.env
    }

    /// Commands, types, and what checks arguments.
    pub fn schema(&self) -> &Schema {
        self.schema
    }

    pub(crate) fn events(&self) -> &Rc<Events> {
        &self.events
    }
    /// Bitmaps of nodes that are opened from now on are kept in `dir`, so that they survive a crash.
    pub fn keep_bitmaps_in(self: &Rc<Self>, dir: &Path) {
        let me = Rc::downgrade(self);
        let tell = move |text: &str| {
            if let Some(daemon) = me.upgrade() {
                daemon.tell_trouble(text);
            }
        };
        self.opener.keep_bitmaps_in(dir, Rc::new(tell));
        self.jobs.set_bitmap_home(self.opener.bitmap_home());
    }

    /// After [`Daemon::keep_bitmaps_in`]: the regions of the log of changes, for tests on small disks.
    pub fn set_log_geometry(&self, geometry: open::Geometry) {
        self.opener.bitmap_home().iter().for_each(|h| h.set_geometry(geometry));
    }

    pub(crate) fn opener(&self) -> &Rc<Opener> {
        &self.opener
    }
    pub(crate) fn jobs(&self) -> &Rc<Registry> {
        &self.jobs
    }
    pub(crate) fn replication(&self) -> &RefCell<BTreeMap<String, Rc<replication::session::Group>>> {
        &self.replication
    }

    pub(crate) fn blkcolo(&self) -> &RefCell<BTreeSet<String>> {
        &self.blkcolo
    }

    /// Replication as this side has ended because the other was lost.
    pub(crate) fn exited(&self, side: &'static str) {
        self.last_side.set(side);
    }
    pub(crate) fn last_side(&self) -> &'static str {
        self.last_side.get()
    }
    pub(crate) fn colo(&self) -> &Rc<jobs::colo::Colo> {
        &self.colo
    }
    /// The nodes.
    pub fn graph(&self) -> &Rc<Graph> {
        &self.graph
    }

    /// The node that a command means. Devices are nodes: a storage daemon has no guest devices.
    pub(crate) fn find_node(
        &self,
        device: Option<&str>,
        node: Option<&str>,
    ) -> Result<Rc<NodeCell>, QmpError> {
        let found = device.and_then(|d| self.graph.find(d)).or_else(|| node.and_then(|n| self.graph.find(n)));
        found.ok_or_else(|| {
            let (device, node) = (device.unwrap_or_default(), node.unwrap_or_default());
            QmpError::generic(format!("Cannot find device='{device}' nor node-name='{node}'"))
        })
    }

    pub(crate) fn recorder(&self) -> Option<Rc<Recorder>> {
        self.recorder.borrow().clone()
    }
    pub(crate) fn set_recorder(&self, recorder: Rc<Recorder>) {
        *self.recorder.borrow_mut() = Some(recorder);
    }

    pub(crate) fn exports(&self) -> &Rc<ExportRegistry> {
        &self.exports
    }
    pub(crate) fn objects(&self) -> &Rc<Objects> {
        &self.objects
    }
    pub(crate) fn chardevs(&self) -> &Chardevs {
        &self.chardevs
    }
    pub(crate) fn knows(&self, command: &str) -> bool {
        self.commands.contains_key(command)
    }
    pub(crate) fn command_names(&self) -> impl Iterator<Item = &'static str> {
        self.commands.keys().copied()
    }

    /// `query-version`: clients look at the numbers to know which interface they have, which is the reference's.
    pub(crate) fn version(&self) -> Value {
        json!({"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": self.package})
    }

    /// Runs a command with JSON arguments that nothing has looked at yet.
    pub async fn execute(self: &Rc<Self>, command: &str, arguments: Map<String, Value>) -> Reply {
        let checked = self.schema.check_json(command, arguments).map_err(QmpError::generic)?;
        self.run(command, checked).await
    }

    /// Runs a command with arguments that have passed the schema (of the command, or of the command-line option that
    /// stands for it).
    pub async fn run(self: &Rc<Self>, command: &str, checked: Map<String, Value>) -> Reply {
        let Some(entry) = self.commands.get(command) else {
            let desc = format!("The command {command} has not been found");
            return Err(QmpError::of(Class::CommandNotFound, desc));
        };
        self.check_running(command)?;
        let _turn = match turns(command) {
            0 => None,
            n => Some(self.turns.acquire(n).await),
        };
        // the end may have come while it waited
        self.check_running(command)?;
        let recorder = self.recorder().filter(|_| !only_asks(command));
        let Some(recorder) = recorder else { return (entry.run)(self.clone(), checked).await };
        if recorder.forget(command, &checked) {
            recorder.record().await?;
            return Ok(json!({}));
        }
        let reply = (entry.run)(self.clone(), checked.clone()).await?;
        self.record_command(&recorder, command, &checked).await?;
        Ok(reply)
    }

    /// Runs a command with arguments that have passed the schema, as part of what the daemon is made again from.
    pub(crate) async fn unrecorded(self: &Rc<Self>, command: &str, checked: Map<String, Value>) -> Reply {
        match self.commands.get(command) {
            Some(entry) => (entry.run)(self.clone(), checked).await,
            None => {
                let desc = format!("The command {command} has not been found");
                Err(QmpError::of(Class::CommandNotFound, desc))
            }
        }
    }

    fn check_running(&self, command: &str) -> Result<(), QmpError> {
        if self.phase.get() != Phase::Running && command != "quit" {
            return Err(QmpError::generic("The daemon is ending"));
        }
        Ok(())
    }

    /// Makes a character device.
    pub async fn add_chardev(&self, spec: ChardevSpec) -> Result<(), QmpError> {
        self.chardevs.add(&self.env, &self.objects, spec).await
    }

    /// Whether there is a character device of that name.
    pub fn check_chardev(&self, id: &str) -> Result<(), QmpError> {
        self.chardevs.check(id)
    }

    /// Starts a monitor on a character device: from [`Daemon::open_monitors`] on, its clients are served one after another,
    /// until the daemon ends.
    pub fn add_monitor(self: &Rc<Self>, chardev: &str, pretty: bool) -> Result<(), QmpError> {
        let device = self.chardevs.take(chardev)?;
        let daemon = self.clone();
        self.env.spawn("monitor", async move {
            while !daemon.open.get() {
                daemon.opened.wait().await;
            }
            while let Some(stream) = device.client(&daemon.env).await {
                daemon.session(stream, pretty).await;
                device.left();
                if daemon.has_ended() {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Everything that the command line asks for is there: from now on monitors serve their clients, which therefore find
    /// all nodes and exports.
    pub fn open_monitors(&self) {
        self.open.set(true);
        self.opened.notify_all();
    }

    /// Serves one QMP client until it leaves or the daemon ends.
    pub async fn session(self: &Rc<Self>, stream: Rc<dyn Stream>, pretty: bool) {
        Session::serve(self, stream, pretty).await;
    }

    pub(crate) fn join(self: &Rc<Self>, session: &Rc<Session>) -> Seat {
        self.sessions.borrow_mut().push(session.clone());
        Seat { daemon: self.clone(), session: session.clone() }
    }

    /// Lets commands under way end, closes exports, cancels jobs and closes nodes, in that order; what happens is told by
    /// events. Done once: a second caller waits for the first.
    pub async fn shut_down(&self) {
        if self.phase.get() == Phase::Running {
            self.phase.set(Phase::Ending);
            // One that opens a node, or starts a job, would leave it behind our back (simulation seed serve 2180).
            let _no_more = self.env.timeout(LAST_COMMANDS, self.turns.acquire(TURNS)).await;
            // From then on nothing is written down: what clients write must not go to an image that only this life knows.
            let _none_pivots = self.env.timeout(LAST_COMMANDS, self.jobs.finalized()).await;
            let recorder = self.recorder();
            recorder.iter().for_each(|r| r.rest());
            self.opener.bitmap_home().iter().for_each(|h| h.rest());
            // Those hold clients' requests, which the end of their exports waits for.
            self.jobs.cancel_resting().await;
            self.replication.borrow().values().for_each(|g| g.let_go());
            self.exports.shut_down().await;
            self.opener.bitmap_home().iter().for_each(|h| h.desert());
            self.jobs.cancel_all().await;
            self.replication.borrow().values().for_each(|g| g.shut_down());
            self.colo.shut_down().await;
            if let Err(e) = self.graph.close_all().await {
                *self.trouble.borrow_mut() = Some(e.into());
            }
            if let Some(recorder) = recorder {
                if let Some(history) = recorder.history() {
                    history.finish(self.events.record()).await;
                }
                recorder.store().close().await;
            }
            self.phase.set(Phase::Ended);
            self.phase_changed.notify_all();
        }
        while self.phase.get() != Phase::Ended {
            self.phase_changed.wait().await;
        }
    }

    /// Takes apart what holds itself, for a process that was killed and whose memory nobody takes back: the simulator's. Nothing of it
    /// runs any more.
    pub fn dissolve(&self) {
        self.sessions.take();
        self.replication.take();
        self.jobs.dissolve();
        self.recorder.take();
        self.graph.dissolve();
    }

    /// Has `tell` called with a sentence for people when something went wrong that no command's answer can say, since the
    /// command did what it was asked.
    pub fn on_trouble(&self, tell: impl Fn(&str) + 'static) {
        *self.on_trouble.borrow_mut() = Some(Rc::new(tell));
    }

    pub(crate) fn tell_trouble(&self, what: &str) {
        let tell = self.on_trouble.borrow().clone();
        if let Some(tell) = tell {
            tell(what);
        }
    }

    /// Completes when [`Daemon::shut_down`] is done.
    pub async fn has_shut_down(&self) {
        while !self.has_ended() {
            self.phase_changed.wait().await;
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.phase.get() == Phase::Ended
    }

    /// Waits until [`Daemon::shut_down`] is done, lets every client have what was still to be sent to it, and removes
    /// what was made in the file system. The last thing before the process ends.
    ///
    /// # Errors
    /// The first thing that could not be written back when the nodes were closed.
    pub async fn ended(&self) -> Result<(), QmpError> {
        self.has_shut_down().await;
        self.sessions.borrow().iter().for_each(|s| s.end());
        while !self.sessions.borrow().is_empty() {
            self.session_left.wait().await;
        }
        self.chardevs.clean_up(&self.env).await;
        self.trouble.take().map_or(Ok(()), Err)
    }
}
