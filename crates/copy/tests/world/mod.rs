//! Two disks in memory that take their time, fail and hang as told, under the simulator's clock.
#![allow(missing_docs, clippy::unwrap_used, unreachable_pub, dead_code)]

mod clock;
#[allow(unused_imports)]
pub use clock::{Rng, simulate};

use block::{BlockError, Data, Extent, Io, Kind, Limits, ReqFlags, Span};
use copy::digest::DiskDigest;
use copy::{Action, Control, Mismatch, Next, OnError, OnWrite, Policy, Side, Standing};
use env::Env;
use env::sync::Notify;
use graph::{Demand, Edge, Graph, Node, NodeCell, NodeDetails, NodeOptions, Parent, Perms, Role};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

/// A disk of bytes. Requests take random times and happen in pieces, so that overlap shows.
pub struct Mem {
    pub env: Env,
    pub bytes: RefCell<Vec<u8>>,
    /// Which 4 KiB blocks hold data.
    pub data: RefCell<Vec<bool>>,
    /// One request in so many fails with this errno (0: none).
    pub fail_reads: Cell<(u64, i32)>,
    pub fail_writes: Cell<(u64, i32)>,
    pub fail_flush: Cell<(u64, i32)>,
    /// Requests that write hang for ever.
    pub hang: Cell<bool>,
    /// Discards do nothing.
    pub ignore_discard: bool,
    pub efficient_zero: bool,
    pub slow_us: Cell<u64>,
    pub written: Cell<u64>,
    pub read_bytes: Cell<u64>,
    pub flushes: Cell<u64>,
    /// Whether the host can copy from here to another of these disks by itself, and the bytes that it has.
    pub can_copy: Cell<bool>,
    pub host_copied: Cell<u64>,
    /// Writes (and zeroes) in flight.
    pub busy: Cell<u32>,
}

pub const BLOCK: u64 = 4096;

impl Mem {
    pub fn new(env: &Env, len: u64) -> Rc<Mem> {
        Rc::new(Mem {
            env: env.clone(),
            bytes: RefCell::new(vec![0; len as usize]),
            data: RefCell::new(vec![false; len.div_ceil(BLOCK) as usize]),
            fail_reads: Cell::new((0, 0)),
            fail_writes: Cell::new((0, 0)),
            fail_flush: Cell::new((0, 0)),
            hang: Cell::new(false),
            ignore_discard: env.random().is_multiple_of(2),
            efficient_zero: false,
            slow_us: Cell::new(200),
            written: Cell::new(0),
            read_bytes: Cell::new(0),
            flushes: Cell::new(0),
            can_copy: Cell::new(false),
            host_copied: Cell::new(0),
            busy: Cell::new(0),
        })
    }

    async fn pass_time(&self) {
        let most = self.slow_us.get();
        if most > 0 {
            self.env.sleep(Duration::from_micros(self.env.random() % most)).await;
        }
    }

    fn draw(&self, rule: &Cell<(u64, i32)>) -> block::Result<()> {
        let (one_in, errno) = rule.get();
        if one_in > 0 && self.env.random().is_multiple_of(one_in) {
            return Err(BlockError::from_errno(errno));
        }
        Ok(())
    }

    pub fn put(&self, at: u64, bytes: &[u8], data: bool) {
        let at = at as usize;
        self.bytes.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        let span = Span::new(at as u64, bytes.len() as u64);
        let blocks = if data { span.align_out(BLOCK) } else { span.align_in(BLOCK) };
        for b in blocks.start / BLOCK..blocks.end() / BLOCK {
            if let Some(d) = self.data.borrow_mut().get_mut(b as usize) {
                *d = data;
            }
        }
    }

    /// In two steps, so that a reader in between sees half of it. A failing one may do half.
    async fn change(&self, at: Span, bytes: Vec<u8>, data: bool) -> block::Result<()> {
        self.busy.set(self.busy.get() + 1);
        struct Leave<'a>(&'a Mem);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.busy.set(self.0.busy.get() - 1);
            }
        }
        let _leave = Leave(self);
        self.pass_time().await;
        if self.hang.get() {
            std::future::pending::<()>().await;
        }
        let half = bytes.len() / 2;
        let verdict = self.draw(&self.fail_writes);
        if verdict.is_err() && self.env.random().is_multiple_of(2) {
            verdict?;
            return Ok(());
        }
        self.put(at.start, &bytes[..half], data);
        self.pass_time().await;
        verdict?;
        self.put(at.start + half as u64, &bytes[half..], data);
        self.written.set(self.written.get() + at.len);
        self.pass_time().await;
        Ok(())
    }
}

impl Node for Mem {
    fn driver(&self) -> &'static str {
        "mem"
    }
    fn len(&self) -> u64 {
        self.bytes.borrow().len() as u64
    }
    fn limits(&self) -> Limits {
        Limits { efficient_zero: self.efficient_zero, ..Limits::default() }
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        Vec::new()
    }
    fn wants(&self, _: &Edge, above: Demand, _: bool) -> Demand {
        above
    }
    fn copy_to<'a>(&'a self, at: Span, to: &'a NodeCell, to_offset: u64) -> Io<'a, u64> {
        Box::pin(async move {
            let Some(to) = to.node().as_any().downcast_ref::<Mem>().filter(|_| self.can_copy.get()) else {
                return Err(BlockError::unsupported("no copy offload"));
            };
            let data = self.read(at).await?;
            to.change(Span::new(to_offset, at.len), data.to_vec(), true).await?;
            self.host_copied.set(self.host_copied.get() + at.len);
            Ok(at.len)
        })
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move {
            self.pass_time().await;
            self.draw(&self.fail_reads)?;
            self.read_bytes.set(self.read_bytes.get() + at.len);
            let mut out = Vec::new();
            let half = at.len / 2;
            for part in [Span::new(at.start, half), Span::between(at.start + half, at.end())] {
                let (a, b) = (part.start as usize, part.end() as usize);
                out.extend_from_slice(&self.bytes.borrow()[a..b]);
                self.pass_time().await;
            }
            Ok(Data::from(out))
        })
    }
    fn write(&self, at: Span, data: Data, _: ReqFlags) -> Io<'_> {
        Box::pin(async move { self.change(at, data.to_vec(), true).await })
    }
    fn zero(&self, at: Span, _: ReqFlags) -> Io<'_> {
        Box::pin(async move { self.change(at, vec![0; at.len as usize], false).await })
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(async move {
            if self.ignore_discard {
                return Ok(());
            }
            let inner = at.align_in(BLOCK);
            if inner.is_empty() {
                return Ok(());
            }
            self.change(inner, vec![0; inner.len as usize], false).await
        })
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move {
            self.pass_time().await;
            let mut list = Vec::new();
            for b in at.start / BLOCK..at.end().div_ceil(BLOCK) {
                let kind = if self.data.borrow()[b as usize] { Kind::Data } else { Kind::Zero };
                let span = Span::new(b * BLOCK, BLOCK).intersect(&at);
                Extent::push_merged(&mut list, Extent::new(span, kind));
                if list.len() > 7 {
                    break;
                }
            }
            Ok(list)
        })
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            self.pass_time().await;
            self.draw(&self.fail_flush)?;
            self.flushes.set(self.flushes.get() + 1);
            Ok(())
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
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// A node in a graph, and an edge onto it that may do anything and lets others do anything.
pub async fn edge(graph: &Graph, name: &str, node: Rc<dyn Node>) -> Rc<Edge> {
    let cell = match graph.find(name) {
        Some(cell) => cell,
        None => {
            let options = NodeOptions { name: Some(name.into()), discard: true, ..NodeOptions::default() };
            graph.add(options, node).await.unwrap()
        }
    };
    let demand = Demand { needs: Perms::CONSISTENT_READ.with(Perms::WRITE), shares: Perms::ALL };
    graph
        .attach_exact(&cell, "test", Role::Root, Parent::Job { kind: "mirror", id: "test".into() }, demand)
        .await
        .unwrap()
}

/// Steers an engine as a job would.
pub struct Desk {
    pub on_source: Cell<OnError>,
    pub on_target: Cell<OnError>,
    pub paused: Cell<bool>,
    pub parked: Cell<bool>,
    pub speed: Cell<u64>,
    pub changed: Notify,
    pub errors: RefCell<Vec<(Side, Action, i32)>>,
    pub idle: Cell<bool>,
    pub mismatches: RefCell<Vec<Mismatch>>,
}

impl Desk {
    pub fn new() -> Rc<Desk> {
        Rc::new(Desk {
            on_source: Cell::new(OnError::Report),
            on_target: Cell::new(OnError::Report),
            paused: Cell::new(false),
            parked: Cell::new(false),
            speed: Cell::new(0),
            changed: Notify::new(),
            errors: RefCell::default(),
            idle: Cell::new(false),
            mismatches: RefCell::default(),
        })
    }
    pub fn pause(&self, on: bool) {
        self.paused.set(on);
        self.changed.notify_all();
    }
}

impl Control for Desk {
    fn pause_wanted(&self) -> bool {
        self.paused.get()
    }
    fn park(&self) -> Pin<Box<dyn Future<Output = ()> + '_>> {
        Box::pin(async {
            self.parked.set(true);
            loop {
                let again = self.changed.wait();
                if !self.paused.get() {
                    break;
                }
                again.await;
            }
            self.parked.set(false);
        })
    }
    fn speed(&self) -> u64 {
        self.speed.get()
    }
    fn failed(&self, side: Side, error: &BlockError) -> Action {
        let rule = if side == Side::Source { self.on_source.get() } else { self.on_target.get() };
        let action = rule.action(error);
        self.errors.borrow_mut().push((side, action, error.errno()));
        if action == Action::Stop {
            self.paused.set(true);
            self.changed.notify_all();
        }
        action
    }
    fn mismatch(&self, found: &Mismatch) {
        self.mismatches.borrow_mut().push(*found);
    }
    fn changed(&self) -> &Notify {
        &self.changed
    }
    fn set_idle(&self, idle: bool) {
        self.idle.set(idle);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Background,
    WriteBlocking,
    ReadWriteBlocking,
}

/// A mirror's policy: until clean, or follow until told.
pub struct Follow {
    pub mode: Cell<Mode>,
    pub until_clean: Cell<bool>,
    pub stop: Cell<bool>,
    /// Whether source and target are compared now.
    pub compares: Cell<bool>,
}

impl Follow {
    pub fn new(mode: Mode) -> Rc<Follow> {
        Rc::new(Follow {
            mode: Cell::new(mode),
            until_clean: Cell::new(true),
            stop: Cell::new(false),
            compares: Cell::new(true),
        })
    }
}

impl Policy for Follow {
    fn guest_write(&self, _: Span) -> OnWrite {
        match self.mode.get() {
            Mode::Background => OnWrite::MarkDirty,
            _ => OnWrite::WriteBoth,
        }
    }
    fn copy_reads(&self) -> bool {
        self.mode.get() == Mode::ReadWriteBlocking
    }
    fn compares(&self) -> bool {
        self.compares.get()
    }
    fn pass_over(&self, s: Standing) -> Next {
        let proven = s.proven || !self.compares.get();
        if self.stop.get() || (self.until_clean.get() && s.clean && proven) {
            Next::Done
        } else {
            Next::Again
        }
    }
}

/// The digest of a disk with these bytes, straight from the definition in docs/digest.md.
pub fn digest_of(disk: &[u8]) -> DiskDigest {
    let mut level: Vec<[u8; 32]> = disk.chunks(65536).map(|c| blake3::hash(c).into()).collect();
    while level.len() > 1 {
        level = level.chunks(16).map(|c| blake3::hash(&c.concat()).into()).collect();
    }
    let all = [b"liveblk disk 1\n".to_vec(), (disk.len() as u64).to_le_bytes().to_vec(), level.concat()];
    DiskDigest(blake3::hash(&all.concat()).into())
}
