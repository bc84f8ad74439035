//! The FUSE export: a disk as a file of the host, for all programs that read and write files.
//!
//! The kernel's requests (`protocol`) come over a device that is read without blocking on the disk's home thread; what each
//! does is in `file`. Requests run side by side; what ends at once is answered at once. Requests enter the graph through the
//! export's edge, so jobs may put other nodes under it meanwhile.
//!
//! What can happen: the export is deleted while programs have the file open (their next call fails, as with QSD); somebody
//! unmounts the file (the export ends); a program is killed while it waits (its request goes on, the answer goes nowhere).
//! What must stay true: each request is answered once; the edge is held until the last request has ended; the mount goes with the export.

mod file;
mod protocol;

use crate::export::ExportInfo;
use block::{BlockError, Result};
use env::os::fuse::{FuseMount, FuseOptions, FuseReceived};
use env::sync::Notify;
use env::{Env, TaskHandle};
use file::{Answer, DiskFile, MAX_TRANSFER};
use futures_util::stream::{FuturesUnordered, Stream as _};
use graph::gate::Gated;
use graph::{Demand, Edge, Graph, Perms};
use protocol::Request;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

/// Bytes of buffers that the requests of one export may hold: sixteen of the longest.
const BUDGET: u64 = 16 << 20;
/// What a request counts beside its bytes.
const REQUEST_COST: u64 = 4096;
/// Requests taken before other tasks of this thread get their turn.
const REQUESTS_PER_TURN: usize = 64;

/// Whether other users may use the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AllowOther {
    /// Only the user that the daemon runs as.
    #[default]
    Off,
    /// All that the file's permissions let.
    On,
    /// As `On` if the host allows that, else as `Off`.
    Auto,
}

/// What is asked of a FUSE export; names as in QMP's `block-export-add`.
#[derive(Clone, Debug)]
pub struct FuseExportOptions {
    /// Export id.
    pub id: String,
    /// The regular file that is covered.
    pub mountpoint: PathBuf,
    /// Whether the disk may be written.
    pub writable: bool,
    /// Whether each write is made durable before it is acknowledged.
    pub writethrough: bool,
    /// Whether writes past the end make the disk longer.
    pub growable: bool,
    /// Who gets at the file.
    pub allow_other: AllowOther,
}

impl FuseExportOptions {
    /// What such an export asks of its node. Others may resize the disk; so do we if it is growable.
    pub fn demand(&self) -> Demand {
        let write = if self.writable { Perms::WRITE } else { Perms::NONE };
        let resize = if self.growable { Perms::RESIZE } else { Perms::NONE };
        Demand { needs: Perms::CONSISTENT_READ.with(write).with(resize), shares: Perms::ALL }
    }
}

/// A node offered as a file.
pub(crate) struct Fuse {
    env: Env,
    disk: DiskFile,
    mount: FuseMount,
    serving: RefCell<Option<TaskHandle>>,
    /// Requests under way.
    running: Cell<usize>,
    shutting_down: Cell<bool>,
    nudge: Notify,
    idle: Notify,
}

impl Fuse {
    /// Mounts and serves. `gone` is called with this export's id when somebody has unmounted the file.
    pub(crate) async fn start(
        env: &Env,
        options: FuseExportOptions,
        edge: Rc<Edge>,
        graph: Rc<Graph>,
        gone: Box<dyn FnOnce(&str)>,
    ) -> Result<Rc<Fuse>> {
        let with = |allow_other| FuseOptions { allow_other, max_transfer: MAX_TRANSFER as usize };
        let at = &options.mountpoint;
        let mount = match options.allow_other {
            AllowOther::Off => FuseMount::new(env, at, with(false)).await?,
            AllowOther::On => FuseMount::new(env, at, with(true)).await?,
            AllowOther::Auto => match FuseMount::new(env, at, with(true)).await {
                Ok(m) => m,
                Err(_) => FuseMount::new(env, at, with(false)).await?,
            },
        };
        let export = Rc::new(Fuse {
            env: env.clone(),
            disk: DiskFile::new(env, options, edge, graph),
            mount,
            serving: RefCell::new(None),
            running: Cell::new(0),
            shutting_down: Cell::new(false),
            nudge: Notify::new(),
            idle: Notify::new(),
        });
        let task = env.spawn("FUSE export", serve(export.clone(), gone));
        *export.serving.borrow_mut() = Some(task);
        Ok(export)
    }

    pub(crate) fn id(&self) -> &str {
        &self.disk.options().id
    }

    /// The file that is covered, as an absolute path.
    pub(crate) fn mountpoint(&self) -> &Path {
        self.mount.at()
    }

    pub(crate) fn info(&self) -> ExportInfo {
        ExportInfo {
            id: self.id().to_owned(),
            kind: "fuse",
            node_name: self.disk.edge().child().name().to_owned(),
            shutting_down: self.shutting_down.get(),
        }
    }

    pub(crate) fn is_shutting_down(&self) -> bool {
        self.shutting_down.get()
    }

    /// Requests under way, once no more come.
    pub(crate) fn busy(&self) -> usize {
        self.running.get()
    }

    /// Unmounts; nothing more is taken.
    pub(crate) fn close(&self) {
        if self.shutting_down.replace(true) {
            return;
        }
        self.mount.unmount();
        self.nudge.notify_all();
        // nothing is under way: the task, and what it holds, goes at once
        if self.running.get() == 0
            && let Some(task) = self.serving.take()
        {
            task.cancel();
        }
    }

    /// Waits until the last request has ended. None of them waits for its turn in a throttle meanwhile.
    pub(crate) async fn drained(&self) {
        let _hurried = self.disk.edge().hurry();
        while self.running.get() > 0 {
            self.idle.wait().await;
        }
    }

    /// Carries out one request and answers it.
    async fn run(self: Rc<Fuse>, r: Request, cost: u64) -> u64 {
        match self.disk.execute(&self.env, &r).await {
            Ok(Answer::None) => {}
            Ok(Answer::Bytes(b)) => {
                self.mount.send(&protocol::answer(r.unique(), 0, &b, 0), &block::Data::empty());
            }
            Ok(Answer::Data(d)) => self.mount.send(&protocol::answer(r.unique(), 0, &[], d.len()), &d),
            Err(e) => {
                let errno = if e.errno() == 0 { BlockError::EIO } else { e.errno() };
                self.mount.send(&protocol::answer(r.unique(), errno, &[], 0), &block::Data::empty());
            }
        }
        cost
    }
}

type Work = Pin<Box<dyn Future<Output = u64>>>;

/// The kernel's requests on their way.
struct Pump {
    export: Rc<Fuse>,
    running: FuturesUnordered<Work>,
    cost: u64,
    ready: Option<Pin<Box<dyn Future<Output = Result<()>>>>>,
    nudge: Option<Pin<Box<dyn Future<Output = ()>>>>,
    /// The file is mounted no more.
    gone: bool,
}

impl Pump {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            while let Poll::Ready(Some(cost)) = Pin::new(&mut self.running).poll_next(cx) {
                self.ended(cost);
            }
            if self.gone || self.export.shutting_down.get() {
                return if self.running.is_empty() { Poll::Ready(()) } else { Poll::Pending };
            }
            let taken = self.take(cx);
            if self.gone {
                continue;
            }
            if taken == REQUESTS_PER_TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if !self.rest(cx) {
                return Poll::Pending;
            }
        }
    }

    fn ended(&mut self, cost: u64) {
        self.cost -= cost;
        self.export.running.set(self.running.len());
    }

    /// Begins what the kernel has; how many requests.
    fn take(&mut self, cx: &mut Context<'_>) -> usize {
        let mut taken = 0;
        while taken < REQUESTS_PER_TURN && self.cost < BUDGET {
            let request = match self.export.mount.try_recv() {
                Ok(FuseReceived::Request(r)) => r,
                Ok(FuseReceived::Nothing) => break,
                Ok(FuseReceived::Gone) | Err(_) => {
                    self.gone = true;
                    break;
                }
            };
            taken += 1;
            let Some(request) = Request::new(request) else { continue };
            let cost = request.cost() + REQUEST_COST;
            let mut work: Work = Box::pin(self.export.clone().run(request, cost));
            if work.as_mut().poll(cx).is_pending() {
                self.cost += cost;
                self.running.push(work);
                self.export.running.set(self.running.len());
            }
        }
        taken
    }

    /// Nothing is there: waits. `true`: there may be something again.
    fn rest(&mut self, cx: &mut Context<'_>) -> bool {
        let nudge = self.nudge.get_or_insert_with(|| {
            let export = self.export.clone();
            Box::pin(async move { export.nudge.wait().await })
        });
        if nudge.as_mut().poll(cx).is_ready() {
            self.nudge = None;
            return true;
        }
        if self.cost >= BUDGET {
            return false;
        }
        let ready = self.ready.get_or_insert_with(|| {
            let export = self.export.clone();
            Box::pin(async move { export.mount.ready().await })
        });
        if ready.as_mut().poll(cx).is_ready() {
            self.ready = None;
            return true;
        }
        false
    }
}

async fn serve(export: Rc<Fuse>, gone: Box<dyn FnOnce(&str)>) {
    let mut pump = Pump {
        export: export.clone(),
        running: FuturesUnordered::new(),
        cost: 0,
        ready: None,
        nudge: None,
        gone: false,
    };
    std::future::poll_fn(|cx| pump.poll(cx)).await;
    let unmounted = pump.gone;
    drop(pump);
    export.running.set(0);
    export.serving.take();
    let lost = unmounted && !export.shutting_down.replace(true);
    if lost {
        export.mount.lost();
    }
    let id = export.id().to_owned();
    export.idle.notify_all();
    // who hears of the end may take the node, so our hold on it goes first
    drop(export);
    if lost {
        gone(&id);
    }
}
