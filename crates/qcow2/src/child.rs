//! The files below: reading past the end, growing, and knowing whether a barrier is needed.
//!
//! What must stay true: a barrier is issued only if a write completed since the last one began, and never skipped if one did
//! or may have: the first one is for what a process that was killed may have left in the host's cache, which its guests were told is
//! written and now flush through us (the mark is set when a write *completes*, so that a write in flight during a barrier counts for the next); a file only
//! grows here, and a growth that was begun is carried through even if the request that asked for it is dropped (a late
//! `ftruncate` to a shorter length would cut off data).

use crate::core::Background;
use block::{BlockError, Data, ErrorKind, Prealloc, ReqFlags, Result, Span};
use env::Env;
use env::bugs::planted;
use env::sync::{Notify, oneshot};
use graph::{DebugEvent, Edge, HostBytes};
use std::cell::Cell;
use std::rc::Rc;

/// Least growth of a file: one `ftruncate` per MiB costs nothing, and the file ends where it is closed.
const GROW_MIN: u64 = 1 << 20;
/// Largest growth at once.
const GROW_MAX: u64 = 64 << 20;

/// A file below the format.
pub(crate) struct Child {
    edge: Rc<Edge>,
    env: Env,
    background: Rc<Background>,
    dirty: Cell<bool>,
    barriers: Cell<u64>,
    growing: Cell<bool>,
    grown: Notify,
    slack: Cell<bool>,
}

impl Child {
    pub(crate) fn new(env: Env, edge: Rc<Edge>, background: Rc<Background>) -> Rc<Child> {
        Rc::new(Child {
            edge,
            env,
            background,
            dirty: Cell::new(!planted("qcow2: what a killed process wrote is not flushed")),
            barriers: Cell::new(0),
            growing: Cell::new(false),
            grown: Notify::new(),
            slack: Cell::new(false),
        })
    }

    pub(crate) fn edge(&self) -> &Rc<Edge> {
        &self.edge
    }

    pub(crate) fn len(&self) -> u64 {
        self.edge.len()
    }

    /// Barriers issued so far.
    pub(crate) fn barriers(&self) -> u64 {
        self.barriers.get()
    }

    /// Tells the node below of a step, for tests that interrupt it.
    pub(crate) fn tell(&self, event: DebugEvent) {
        self.edge.announce(event);
    }

    /// Reads `at`; what lies past the end reads as zeroes.
    pub(crate) async fn read(&self, at: Span) -> Result<Data> {
        let len = self.edge.len();
        if at.end() <= len {
            return self.edge.read(at).await;
        }
        let there = at.intersect(&Span::new(0, len));
        let mut data = if there.is_empty() { Data::empty() } else { self.edge.read(there).await? };
        data.append(Data::zeroes((at.len - data.len() as u64) as usize));
        Ok(data)
    }

    /// Writes, growing the file if need be.
    pub(crate) async fn write(self: &Rc<Self>, at: u64, data: Data) -> Result<()> {
        let end = Span::new(at, data.len() as u64).end();
        if end > self.edge.len() {
            self.grow(end).await?;
        }
        let r = self.edge.write(at, data, ReqFlags::NONE).await;
        self.dirty.set(true);
        r
    }

    /// Writes bytes that lie in a file of the host, growing this one if need be.
    pub(crate) async fn write_from(self: &Rc<Self>, at: u64, from: HostBytes) -> Result<()> {
        let end = Span::new(at, from.at.len).end();
        if end > self.edge.len() {
            self.grow(end).await?;
        }
        let r = self.edge.write_from(at, from).await;
        self.dirty.set(true);
        r
    }

    /// Makes `at` read as zero; what lies past the end does already.
    pub(crate) async fn zero(&self, at: Span, flags: ReqFlags) -> Result<()> {
        let there = at.intersect(&Span::new(0, self.edge.len()));
        if there.is_empty() {
            return Ok(());
        }
        let r = self.edge.zero(there, flags).await;
        self.dirty.set(true);
        r
    }

    /// Gives space back.
    pub(crate) async fn discard(&self, at: Span) -> Result<()> {
        let there = at.intersect(&Span::new(0, self.edge.len()));
        if there.is_empty() { Ok(()) } else { self.edge.discard(there).await }
    }

    /// Whether a write completed since the last barrier began.
    pub(crate) fn is_dirty(&self) -> bool {
        self.dirty.get()
    }

    /// A barrier, if one is needed.
    pub(crate) async fn barrier(&self) -> Result<()> {
        if !self.dirty.replace(false) {
            return Ok(());
        }
        self.barriers.set(self.barriers.get() + 1);
        let r = self.edge.flush().await;
        if r.is_err() {
            self.dirty.set(true);
        }
        r
    }

    /// Grows the file to at least `end`.
    pub(crate) async fn grow(self: &Rc<Self>, end: u64) -> Result<()> {
        while self.edge.len() < end {
            if self.growing.get() {
                self.grown.wait().await;
                continue;
            }
            self.growing.set(true);
            let (tx, rx) = oneshot();
            let me = self.clone();
            self.background.spawn(&self.env, "qcow2-grow", async move {
                let r = me.grow_now(end).await;
                me.growing.set(false);
                me.grown.notify_all();
                tx.send(r);
            });
            match rx.await {
                Some(r) => r?,
                None => return Err(BlockError::new(ErrorKind::Cancelled, "growing the file was called off")),
            }
        }
        Ok(())
    }

    /// Cuts off what was grown in advance behind `end`.
    pub(crate) async fn trim(&self, end: u64) -> Result<()> {
        if self.slack.get() && self.edge.len() > end {
            self.set_len(end).await?;
            self.slack.set(false);
        }
        Ok(())
    }

    async fn grow_now(&self, end: u64) -> Result<()> {
        let step = (self.edge.len() / 8).clamp(GROW_MIN, GROW_MAX);
        self.slack.set(true);
        let target = end.checked_add(step).map_or(end, |e| e & !(GROW_MIN - 1)).max(end);
        let r = self.set_len(target).await;
        if r.is_err() && target > end { self.set_len(end).await } else { r }
    }

    /// Sets the length.
    pub(crate) async fn set_len(&self, len: u64) -> Result<()> {
        let r = self.edge.resize(len, Prealloc::Off).await;
        self.dirty.set(true);
        r.map_err(|e| {
            // A file that cannot grow (a device, an export) is simply full.
            if e.kind() == ErrorKind::Unsupported { BlockError::from_errno(BlockError::ENOSPC) } else { e }
        })
    }
}
