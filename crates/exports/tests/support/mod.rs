//! A plain node over one file, and a server with exports of it on a thread of its own.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, missing_docs)]

use block::{BlockError, Data, ErrorKind, Extent, Io, Kind, Limits, ReqFlags, Span};
use env::{File, OpenMode, Punch};
use exports::{DeleteMode, Export, ExportRegistry, NbdOptions, ServerOptions};
use graph::{Demand, Edge, Graph, Node, NodeCell, NodeDetails, NodeOptions, Parent, Role};
use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

type OnRead = Box<dyn Fn(Span)>;

/// One file, and knobs for trouble.
pub struct Plain {
    env: env::Env,
    file: Rc<dyn File>,
    len: Cell<u64>,
    backing: RefCell<Option<Rc<Edge>>>,
    /// Each request waits as long before it runs.
    pub delay: Cell<Duration>,
    /// Each request fails with this errno.
    pub fail: Cell<i32>,
    /// Each request ends as at the end of the daemon.
    pub ending: Cell<bool>,
    pub flushes: Cell<u64>,
    /// How the last zeroing was asked for.
    pub zeroed: Cell<ReqFlags>,
    /// Told of each read before it begins.
    pub on_read: RefCell<Option<OnRead>>,
}

impl Plain {
    pub async fn open(env: &env::Env, path: &Path) -> Rc<Plain> {
        let file = env.open(path, OpenMode { write: true, ..OpenMode::default() }).await.unwrap();
        let len = file.info().await.unwrap().len;
        Rc::new(Plain {
            env: env.clone(),
            file,
            len: Cell::new(len),
            backing: RefCell::default(),
            delay: Cell::default(),
            fail: Cell::default(),
            ending: Cell::default(),
            flushes: Cell::default(),
            zeroed: Cell::default(),
            on_read: RefCell::default(),
        })
    }

    async fn trouble(&self) -> block::Result<()> {
        if !self.delay.get().is_zero() {
            self.env.sleep(self.delay.get()).await;
        }
        if self.ending.get() {
            return Err(BlockError::new(ErrorKind::Ending, "the daemon ends"));
        }
        match self.fail.get() {
            0 => Ok(()),
            n => Err(BlockError::from_errno(n)),
        }
    }
}

impl Node for Plain {
    fn driver(&self) -> &'static str {
        "plain"
    }
    fn len(&self) -> u64 {
        self.len.get()
    }
    fn limits(&self) -> Limits {
        Limits { efficient_zero: true, ..Limits::default() }
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        self.backing.borrow().iter().cloned().collect()
    }
    fn wants(&self, _: &Edge, above: Demand, _: bool) -> Demand {
        above
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        if let Some(told) = &*self.on_read.borrow() {
            told(at);
        }
        if self.delay.get().is_zero() && self.fail.get() == 0 && !self.ending.get() {
            return self.file.read(at);
        }
        Box::pin(async move {
            self.trouble().await?;
            self.file.read(at).await
        })
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            self.trouble().await?;
            self.file.write(at.start, data).await?;
            if flags.fua { self.flush().await } else { Ok(()) }
        })
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        self.zeroed.set(flags);
        Box::pin(async move {
            self.trouble().await?;
            self.file.zero(at, if flags.may_unmap { Punch::Release } else { Punch::Keep }).await
        })
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(async move {
            self.trouble().await?;
            self.file.discard(at).await
        })
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move {
            self.trouble().await?;
            let below = self.backing.borrow().is_some();
            let mut v = self.file.extents(at).await?;
            if below {
                v.iter_mut().filter(|e| e.kind == Kind::Zero).for_each(|e| e.kind = Kind::Unallocated);
            }
            Ok(v)
        })
    }
    fn flush(&self) -> Io<'_> {
        self.flushes.set(self.flushes.get() + 1);
        Box::pin(async move {
            self.trouble().await?;
            self.file.barrier().await
        })
    }
    fn set_writable(&self, _: bool) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async { Ok(NodeDetails::default()) })
    }
    fn backing(&self) -> Option<Rc<Edge>> {
        self.backing.borrow().clone()
    }
    fn set_backing(&self, edge: Option<Rc<Edge>>) {
        *self.backing.borrow_mut() = edge;
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// A directory that goes away with its holder.
pub struct Dir(pub PathBuf);

impl Dir {
    pub fn new() -> Dir {
        static N: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = N.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let d = std::env::temp_dir().join(format!("liveblk-nbd-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&d).unwrap();
        Dir(d)
    }
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }
    /// A file with pseudo-random content.
    pub fn image(&self, name: &str, len: usize, seed: u64) -> Vec<u8> {
        let mut x = seed | 1;
        let v: Vec<u8> = std::iter::repeat_with(|| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x.to_le_bytes()
        })
        .flatten()
        .take(len)
        .collect();
        std::fs::write(self.path(name), &v).unwrap();
        v
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What runs on the server's thread.
pub struct Served {
    pub env: env::Env,
    pub graph: Rc<Graph>,
    pub registry: Rc<ExportRegistry>,
    pub node: Rc<Plain>,
    pub cell: Rc<NodeCell>,
    pub deleted: Rc<RefCell<Vec<String>>>,
}

pub async fn attach(graph: &Graph, cell: &Rc<NodeCell>, writable: bool) -> Rc<Edge> {
    let parent = Parent::Backend("export".into());
    graph.attach(cell, "root", Role::Root, parent, Export::demand(writable)).await.unwrap()
}

impl Served {
    /// Another user of the node.
    pub async fn edge(&self) -> Rc<Edge> {
        attach(&self.graph, &self.cell, true).await
    }
}

type Order = Box<dyn FnOnce(Rc<Served>) -> std::pin::Pin<Box<dyn Future<Output = ()>>> + Send>;

/// A server thread that takes orders.
pub struct Server {
    orders: Option<env::MailboxSender<Order>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

pub fn options(id: &str, name: &str) -> NbdOptions {
    NbdOptions { id: id.into(), name: name.into(), writable: true, ..NbdOptions::default() }
}

impl Server {
    /// Serves `image` as export `d` on `socket`.
    pub fn start(image: &Path, server: ServerOptions, export: NbdOptions) -> Server {
        let (ready, wait) = std::sync::mpsc::channel();
        let image = image.to_owned();
        let thread = std::thread::spawn(move || {
            let executor = env::os::start(env::os::OsConfig::default());
            let env = executor.env();
            executor.run(async move {
                let node = Plain::open(&env, &image).await;
                let deleted = Rc::new(RefCell::new(Vec::new()));
                let log = deleted.clone();
                let registry =
                    ExportRegistry::new(&env, move |id: &str| log.borrow_mut().push(id.to_owned()));
                // Field by field: TLS credentials, which are not wanted here, belong to one thread.
                let server = ServerOptions {
                    address: server.address,
                    max_connections: server.max_connections,
                    handshake_max_seconds: server.handshake_max_seconds,
                    tls: None,
                };
                registry.start_server(&server).await.unwrap();
                let graph = Graph::new(&env);
                let options = NodeOptions {
                    name: Some("node".into()),
                    discard: true,
                    monitor_owned: true,
                    ..NodeOptions::default()
                };
                let cell = graph.add(options, node.clone()).await.unwrap();
                let edge = attach(&graph, &cell, export.writable).await;
                registry.add_nbd(export, edge, true).unwrap();
                let (orders, inbox) = env.mailbox::<Order>();
                let served = Rc::new(Served { env: env.clone(), graph, registry, node, cell, deleted });
                ready.send(orders).unwrap();
                while let Some(order) = inbox.recv().await {
                    order(served.clone()).await;
                }
                served.registry.shut_down().await;
            });
        });
        Server { orders: Some(wait.recv().unwrap()), thread: Some(thread) }
    }

    /// Runs `what` on the server's thread and gives its result.
    pub fn call<T, F>(&self, what: impl FnOnce(Rc<Served>) -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (tx, rx) = std::sync::mpsc::channel();
        let order: Order = Box::new(move |s| {
            Box::pin(async move {
                tx.send(what(s).await).unwrap();
            })
        });
        self.orders.as_ref().unwrap().send(order).ok().unwrap();
        rx.recv().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.orders = None;
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

pub const HARD: DeleteMode = DeleteMode::Hard;
