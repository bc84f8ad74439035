//! A node in its place: name, options that every driver has, parents, dirty bitmaps, blockers; and what is done to each
//! request before and after the driver sees it.
//!
//! What must stay true: the driver sees only requests inside its limits; an unaligned write excludes every other write to
//! the blocks it modifies; a change is in every enabled bitmap before it is acknowledged, also if it failed or its
//! future was dropped.

use crate::ahead::{Admitted, WriteAhead};
use crate::exclusion::Exclusion;
use crate::tree::Reaper;
use crate::{DebugEvent, Edge, HostBytes, Node};
use bitmap::{BitmapList, DirtyBitmap};
use block::{BlockError, Data, ErrorKind, Extent, Prealloc, ReqFlags, Result, Span};
use env::sync::RangeLocks;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

/// What to do with written zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DetectZeroes {
    /// Nothing.
    #[default]
    Off,
    /// Store them as zeroes, not as data.
    On,
    /// The same, and give the space back (needs `discard=unmap`).
    Unmap,
}

/// Options that every node has.
#[derive(Clone, Debug, Default)]
pub struct NodeOptions {
    /// Node name; invented where missing.
    pub name: Option<String>,
    /// Not for writing.
    pub read_only: bool,
    /// The option `auto-read-only`: opened read-only where writing is refused.
    pub auto_read_only: bool,
    /// Opened for its parent, read-only or not as that is: turns with it.
    pub follows: bool,
    /// Turns read-write by itself when somebody wants to write, and back when nobody does: `auto-read-only` without
    /// `read-only`.
    pub may_turn: bool,
    /// See [`DetectZeroes`].
    pub detect_zeroes: DetectZeroes,
    /// Discards are passed to the driver (`discard=unmap`).
    pub discard: bool,
    /// Added by the monitor: stays until it is removed by name.
    pub monitor_owned: bool,
    /// Tolerates other users of the same image, whatever they do.
    pub force_share: bool,
    /// `cache.direct`, for queries.
    pub cache_direct: bool,
    /// `cache.no-flush`: flushes end here.
    pub cache_no_flush: bool,
    /// Opened inactive (`active=off`).
    pub inactive: bool,
}

/// Counters of one node, since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads done, and their bytes.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes done (data and zeroes).
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Highest byte written, plus one.
    pub highest_written: u64,
}

/// A node with all that the graph knows of it.
pub struct NodeCell {
    name: String,
    id: u64,
    node: Rc<dyn Node>,
    options: RefCell<NodeOptions>,
    writable: Cell<bool>,
    /// Writable, and nothing stands before writes.
    plain: Cell<bool>,
    ahead: RefCell<Option<Rc<dyn WriteAhead>>>,
    /// Turned by itself; see [`NodeOptions::may_turn`].
    turned: Cell<bool>,
    /// See [`NodeCell::lend`].
    lent: Cell<bool>,
    active: Cell<bool>,
    monitor_owned: Cell<bool>,
    tentative: Cell<bool>,
    pub(crate) parents: RefCell<Vec<Weak<Edge>>>,
    bitmaps: BitmapList,
    blockers: RefCell<Vec<(u64, String)>>,
    next_blocker: Cell<u64>,
    covered_by: RefCell<Option<Weak<NodeCell>>>,
    ranges: RangeLocks,
    counters: Cell<Counters>,
    /// How many writes there had been when the last flush began that succeeded.
    flushed: Cell<u64>,
    write_threshold: Cell<u64>,
    threshold_hit: RefCell<Option<ThresholdHook>>,
    /// Keeps copies of old bytes into this node away from those who read it.
    readers: RefCell<Option<Rc<Exclusion>>>,
    reaper: Weak<Reaper>,
}

/// Called once with (bytes beyond, threshold) when a write reaches beyond the threshold.
type ThresholdHook = Rc<dyn Fn(u64, u64)>;

/// Keeps a node from being changed by others; dropping it lifts the block.
pub struct Blocker {
    cell: Weak<NodeCell>,
    key: u64,
}

impl Drop for Blocker {
    fn drop(&mut self) {
        if let Some(cell) = self.cell.upgrade() {
            cell.blockers.borrow_mut().retain(|(k, _)| *k != self.key);
        }
    }
}

/// A write that [`WriteAhead`] let go; tells it of the end.
struct Inside {
    log: Rc<dyn WriteAhead>,
    by: Admitted,
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.log.leave(self.by);
    }
}

/// Marks a span in all bitmaps when it goes out of scope: at the end, on failure, and when a future is dropped.
struct Change<'a> {
    cell: &'a NodeCell,
    span: Span,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.cell.bitmaps.borrow().iter().for_each(|b| b.record(self.span));
    }
}

impl NodeCell {
    pub(crate) fn new(
        id: u64,
        name: String,
        node: Rc<dyn Node>,
        options: NodeOptions,
        reaper: Weak<Reaper>,
    ) -> NodeCell {
        let bitmaps = BitmapList::default();
        node.share_bitmaps(&bitmaps);
        NodeCell {
            name,
            id,
            node,
            writable: Cell::new(!options.read_only),
            plain: Cell::new(!options.read_only),
            ahead: RefCell::new(None),
            turned: Cell::new(false),
            lent: Cell::new(false),
            active: Cell::new(!options.inactive),
            monitor_owned: Cell::new(options.monitor_owned),
            tentative: Cell::new(false),
            options: RefCell::new(options),
            parents: RefCell::default(),
            bitmaps,
            blockers: RefCell::default(),
            next_blocker: Cell::new(0),
            covered_by: RefCell::new(None),
            ranges: RangeLocks::new(),
            counters: Cell::default(),
            flushed: Cell::new(0),
            write_threshold: Cell::new(0),
            threshold_hit: RefCell::new(None),
            readers: RefCell::new(None),
            reaper,
        }
    }

    /// Node name, unique in the graph (`#blockNNN` where the daemon invented it).
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A number that no other node of the graph has or had; grows with time.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The driver.
    pub fn node(&self) -> &Rc<dyn Node> {
        &self.node
    }

    /// Options as they are now.
    pub fn options(&self) -> NodeOptions {
        self.options.borrow().clone()
    }

    /// Whether writes are possible now.
    pub fn is_writable(&self) -> bool {
        self.writable.get()
    }

    pub(crate) fn set_writable(&self, on: bool) {
        self.writable.set(on);
        self.plain.set(on && self.ahead.borrow().is_none());
        self.options.borrow_mut().read_only = !on;
    }

    /// Whether the node is active. While it is not, somebody else may be using its image: nothing writes to it, and what was
    /// read from it is not kept.
    pub fn is_active(&self) -> bool {
        self.active.get()
    }

    /// Gives the image up, or takes it back as it is now. Called with the gates above closed.
    pub(crate) async fn set_active(&self, on: bool) -> Result<()> {
        let len = self.node.len();
        let log = self.write_ahead();
        if let (Some(log), false) = (&log, on) {
            // What is in the image, or here, is exact before somebody else changes it.
            log.close().await?;
        }
        let done = self.node.set_active(on).await;
        if let (Some(log), true) = (&log, on || done.is_err()) {
            log.reopen().await?;
        }
        done?;
        self.active.set(on);
        if self.node.len() != len {
            for bitmap in self.bitmaps() {
                bitmap.resize(self.node.len())?;
            }
        }
        Ok(())
    }

    /// Whether the node turned read-write by itself, for those who write to it now.
    pub fn has_turned(&self) -> bool {
        self.turned.get()
    }

    /// The node is writable for the time being: for a job that will turn it back, or until a snapshot has turned it. Whoever
    /// describes it does so as if it were read-only.
    pub fn lend(&self, lent: bool) {
        self.lent.set(lent);
    }

    /// See [`NodeCell::lend`].
    pub fn is_lent(&self) -> bool {
        self.lent.get()
    }

    /// Whether it turns read-write by itself for those who want to write to it.
    pub fn may_turn(&self) -> bool {
        self.options.borrow().may_turn
    }

    pub(crate) fn set_turned(&self, turned: bool) {
        self.turned.set(turned);
    }

    pub(crate) fn set_options(&self, new: &NodeOptions) {
        let mut now = self.options.borrow_mut();
        let (name, read_only) = (now.name.take(), now.read_only);
        *now = NodeOptions { name, read_only, monitor_owned: now.monitor_owned, ..new.clone() };
    }

    /// Whether the node stays until the monitor removes it.
    pub fn is_monitor_owned(&self) -> bool {
        self.monitor_owned.get()
    }

    /// The monitor takes or gives up the node, which is tentative no more.
    pub fn set_monitor_owned(&self, owned: bool) {
        self.monitor_owned.set(owned);
        self.tentative.set(false);
    }

    /// The node is part of a command that is not done: until [`set_monitor_owned`](Self::set_monitor_owned) it is the monitor's only
    /// so that it stays, and not recorded for its sake.
    pub fn set_tentative(&self) {
        self.tentative.set(true);
    }

    /// See [`set_tentative`](Self::set_tentative).
    pub fn is_tentative(&self) -> bool {
        self.tentative.get()
    }

    /// Edges onto this node, oldest first.
    pub fn parents(&self) -> Vec<Rc<Edge>> {
        self.parents.borrow().iter().filter_map(Weak::upgrade).collect()
    }

    pub(crate) fn lost_parent(&self) {
        self.parents.borrow_mut().retain(|p| p.strong_count() > 0);
        if let Some(reaper) = self.reaper.upgrade() {
            reaper.look_at(self.id);
        }
    }

    /// The job's filter in front of this node, if any: whoever attaches by this node's name gets the filter, so that no
    /// write passes a running job by.
    pub fn cover(&self) -> Option<Rc<NodeCell>> {
        self.covered_by.borrow().as_ref().and_then(Weak::upgrade)
    }

    pub(crate) fn set_cover(&self, filter: Option<&Rc<NodeCell>>) {
        *self.covered_by.borrow_mut() = filter.map(Rc::downgrade);
    }

    /// Keeps other operations away, with QSD's sentence: `block device is in use by block job: mirror`.
    pub fn block(self: &Rc<Self>, reason: &str) -> Blocker {
        let key = self.next_blocker.get();
        self.next_blocker.set(key + 1);
        self.blockers.borrow_mut().push((key, reason.to_owned()));
        Blocker { cell: Rc::downgrade(self), key }
    }

    /// Fails with `Node 'N' is busy: REASON` if somebody blocks the node.
    pub fn check_not_blocked(&self) -> Result<()> {
        match self.blockers.borrow().first() {
            None => Ok(()),
            Some((_, reason)) => {
                Err(BlockError::new(ErrorKind::Busy, format!("Node '{}' is busy: {reason}", self.name)))
            }
        }
    }

    /// Bitmaps of this node, oldest first.
    pub fn bitmaps(&self) -> Vec<Rc<DirtyBitmap>> {
        self.bitmaps.borrow().clone()
    }

    /// The bitmap called `name`.
    pub fn find_bitmap(&self, name: &str) -> Option<Rc<DirtyBitmap>> {
        self.bitmaps.borrow().iter().find(|b| b.name() == Some(name)).cloned()
    }

    /// Adds a bitmap; from now on it records.
    pub fn add_bitmap(&self, bitmap: Rc<DirtyBitmap>) {
        self.bitmaps.borrow_mut().push(bitmap);
    }

    /// Takes a bitmap away.
    pub fn remove_bitmap(&self, bitmap: &Rc<DirtyBitmap>) {
        self.bitmaps.borrow_mut().retain(|b| !Rc::ptr_eq(b, bitmap));
    }

    /// The list of the bitmaps, shared with whoever keeps them.
    pub fn bitmap_list(&self) -> BitmapList {
        self.bitmaps.clone()
    }

    /// What stands before writes, so that bitmaps survive a crash.
    pub fn write_ahead(&self) -> Option<Rc<dyn WriteAhead>> {
        self.ahead.borrow().clone()
    }

    /// From now on `log` stands before writes (or nothing does). No write is under way.
    pub fn set_write_ahead(&self, log: Option<Rc<dyn WriteAhead>>) {
        self.plain.set(self.writable.get() && log.is_none());
        *self.ahead.borrow_mut() = log;
    }

    /// Makes durable what was just done to bitmaps, where something keeps them that can.
    ///
    /// # Errors
    /// It could not be written. In memory it stands.
    pub async fn sync_bitmaps(&self) -> Result<()> {
        match self.write_ahead() {
            Some(log) => log.sync().await,
            None => Ok(()),
        }
    }

    /// Lets a write to `at` begin if it need not wait.
    fn go_now(&self, at: Span) -> Option<Inside> {
        let log = if self.writable.get() { self.write_ahead()? } else { return None };
        let by = log.try_enter(at)?;
        Some(Inside { log, by })
    }

    /// Waits until a crash could not make a write to `at` forgotten.
    async fn go_ahead(&self, at: Span) -> Result<Option<Inside>> {
        if let Some(inside) = self.go_now(at) {
            return Ok(Some(inside));
        }
        self.check_writable()?;
        let Some(log) = self.write_ahead() else { return Ok(None) };
        let by = log.enter(at).await?;
        Ok(Some(Inside { log, by }))
    }

    /// `at` is going to change, and something that must stay equal to this node may change first: after this a crash leaves it marked
    /// in the bitmaps that survive one, until a later request settles that. Costs nothing where nothing is kept.
    ///
    /// # Errors
    /// The record could not be made. Nothing is to be changed then.
    pub async fn expect_change(&self, at: Span) -> Result<()> {
        if self.plain.get() {
            return Ok(());
        }
        let _inside = self.go_ahead(at).await?;
        drop(Change { cell: self, span: at });
        Ok(())
    }

    /// Counters since the node was opened.
    pub fn counters(&self) -> Counters {
        self.counters.get()
    }

    /// The write threshold in bytes; 0 is off.
    pub fn write_threshold(&self) -> u64 {
        self.write_threshold.get()
    }

    /// Calls `hit(bytes beyond, threshold)` once, at the first write that reaches beyond `bytes`; 0 turns it off.
    pub fn set_write_threshold(&self, bytes: u64, hit: impl Fn(u64, u64) + 'static) {
        self.write_threshold.set(bytes);
        *self.threshold_hit.borrow_mut() = (bytes > 0).then(|| Rc::new(hit) as ThresholdHook);
    }

    /// The layer below: what a filter is in front of, else the backing node.
    pub fn below(&self) -> Option<Rc<NodeCell>> {
        self.node.filtered().or_else(|| self.node.backing()).map(|e| e.child())
    }

    /// From now on reads of this node are inside `exclusion`, which keeps copies of old bytes into the node away meanwhile.
    pub fn exclude_copies(&self, exclusion: Option<Rc<Exclusion>>) {
        *self.readers.borrow_mut() = exclusion;
        // Nobody passes it over any more, or somebody may again.
        self.parents().iter().for_each(|edge| edge.disperse());
    }

    /// See [`NodeCell::exclude_copies`].
    pub(crate) fn readers(&self) -> Option<Rc<Exclusion>> {
        self.readers.borrow().clone()
    }

    pub(crate) async fn read(&self, at: Span) -> Result<Data> {
        let readers = self.readers();
        let _inside = match &readers {
            None => None,
            Some(readers) => Some(readers.begin_read(at).await),
        };
        let limits = self.node.limits();
        let data = if at.is_aligned(limits.request_alignment) && within(at.len, limits.max_transfer) {
            self.node.read(at).await?
        } else {
            self.read_reshaped(at, limits.request_alignment, limits.max_transfer).await?
        };
        let mut c = self.counters.get();
        c.reads += 1;
        c.read_bytes += at.len;
        self.counters.set(c);
        Ok(data)
    }

    /// As [`NodeCell::read`]; what lies behind the end reads as zeroes.
    pub(crate) async fn read_filled(&self, at: Span) -> Result<Data> {
        let len = self.node.len();
        if at.end() <= len {
            return self.read(at).await;
        }
        let there = at.intersect(&Span::new(0, len));
        let mut data = if there.is_empty() { Data::empty() } else { self.read(there).await? };
        data.append(Data::zeroes((at.len - there.len) as usize));
        Ok(data)
    }

    /// Reads whole blocks in pieces the driver takes, and cuts.
    async fn read_reshaped(&self, at: Span, align: u64, max: u64) -> Result<Data> {
        let outer = at.align_out(align);
        let mut data = Data::empty();
        let mut left = outer;
        while !left.is_empty() {
            let (now, rest) = left.split_at(piece(max, align, left.len));
            data.append(self.node.read(now).await?);
            left = rest;
        }
        Ok(data.slice((at.start - outer.start) as usize, at.len as usize))
    }

    pub(crate) async fn write(&self, offset: u64, data: Data, flags: ReqFlags) -> Result<()> {
        let plain = self.plain.get() || flags.unchanged && self.writable.get();
        let _inside = if plain {
            None
        } else {
            let at = Span::new(offset, data.len() as u64);
            match self.go_now(at) {
                Some(inside) => Some(inside),
                // Apart, so that it costs those nothing who need not wait.
                None => Box::pin(self.go_ahead(at)).await?,
            }
        };
        self.write_now(offset, data, flags).await
    }

    async fn write_now(&self, offset: u64, data: Data, flags: ReqFlags) -> Result<()> {
        let at = Span::new(offset, data.len() as u64);
        let _change = (!flags.unchanged).then(|| Change { cell: self, span: at });
        self.count_write(at);
        let (detect, discard) = {
            let o = self.options.borrow();
            (o.detect_zeroes, o.discard)
        };
        if detect != DetectZeroes::Off && !flags.compressed && data.is_zero() {
            let may_unmap = detect == DetectZeroes::Unmap && discard;
            return self.zero_reshaped(at, ReqFlags { may_unmap, ..flags }).await;
        }
        let limits = self.node.limits();
        let align = limits.request_alignment;
        if align == 1 && within(at.len, limits.max_transfer) {
            return self.node.write(at, data, flags).await;
        }
        self.write_reshaped(at, data, flags, align, limits.max_transfer).await
    }

    async fn write_reshaped(
        &self,
        at: Span,
        data: Data,
        flags: ReqFlags,
        align: u64,
        max: u64,
    ) -> Result<()> {
        let aligned = at.is_aligned(align) || flags.compressed;
        let outer = if aligned { at } else { at.align_out(align) };
        let _lock = self.ranges.lock(outer, !aligned).await;
        let data = if aligned { data } else { self.filled(at, outer, data).await? };
        let mut left = outer;
        while !left.is_empty() {
            let (now, rest) = left.split_at(piece(max, align, left.len));
            let part = data.slice((now.start - outer.start) as usize, now.len as usize);
            self.node.write(now, part, flags).await?;
            left = rest;
        }
        Ok(())
    }

    /// `data` with what is around it in its blocks.
    async fn filled(&self, at: Span, outer: Span, data: Data) -> Result<Data> {
        let mut whole = Data::empty();
        let (head, tail) = (Span::between(outer.start, at.start), Span::between(at.end(), outer.end()));
        if !head.is_empty() {
            self.node.debug_event(DebugEvent::PwritevRmwHead);
            whole.append(self.read_reshaped(head, self.node.limits().request_alignment, 0).await?);
            self.node.debug_event(DebugEvent::PwritevRmwAfterHead);
        }
        whole.append(data);
        if !tail.is_empty() {
            self.node.debug_event(DebugEvent::PwritevRmwTail);
            whole.append(self.read_reshaped(tail, self.node.limits().request_alignment, 0).await?);
            self.node.debug_event(DebugEvent::PwritevRmwAfterTail);
        }
        Ok(whole)
    }

    pub(crate) async fn zero(&self, at: Span, flags: ReqFlags) -> Result<()> {
        let plain = self.plain.get() || flags.unchanged && self.writable.get();
        let _inside = if plain { None } else { self.go_ahead(at).await? };
        let _change = (!flags.unchanged).then(|| Change { cell: self, span: at });
        self.count_write(at);
        let may_unmap = flags.may_unmap && self.options.borrow().discard;
        self.zero_reshaped(at, ReqFlags { may_unmap, ..flags }).await
    }

    async fn zero_reshaped(&self, at: Span, flags: ReqFlags) -> Result<()> {
        let limits = self.node.limits();
        let align = limits.request_alignment;
        if align == 1 {
            return self.node.zero(at, flags).await;
        }
        let inner = at.align_in(align);
        if inner.is_empty() {
            return self
                .write_reshaped(at, Data::zeroes(at.len as usize), flags, align, limits.max_transfer)
                .await;
        }
        let (head, tail) = (Span::between(at.start, inner.start), Span::between(inner.end(), at.end()));
        for edge in [head, tail].into_iter().filter(|s| !s.is_empty()) {
            let zeroes = Data::zeroes(edge.len as usize);
            self.write_reshaped(edge, zeroes, flags, align, limits.max_transfer).await?;
        }
        let _lock = self.ranges.lock(inner, false).await;
        self.node.zero(inner, flags).await
    }

    pub(crate) async fn discard(&self, at: Span) -> Result<()> {
        if !self.options.borrow().discard {
            // nothing changes, so no bitmap marks it
            return Ok(());
        }
        let _inside = if self.plain.get() { None } else { self.go_ahead(at).await? };
        let _change = Change { cell: self, span: at };
        let inner = at.align_in(self.node.limits().request_alignment);
        if inner.is_empty() {
            return Ok(());
        }
        let _lock = self.ranges.lock(inner, false).await;
        self.node.discard(inner).await
    }

    pub(crate) async fn extents(&self, at: Span) -> Result<Vec<Extent>> {
        if at.is_empty() {
            return Ok(Vec::new());
        }
        self.node.extents(at).await
    }

    pub(crate) async fn flush(&self) -> Result<()> {
        let below = self.node.primary();
        let tell = |event| below.iter().for_each(|edge| edge.announce(event));
        tell(DebugEvent::FlushToOs);
        if self.options.borrow().cache_no_flush {
            return Ok(());
        }
        let written = self.counters.get().writes;
        if written != self.flushed.get() {
            tell(DebugEvent::FlushToDisk);
        }
        self.node.flush().await?;
        self.flushed.set(written);
        Ok(())
    }

    pub(crate) async fn resize(&self, len: u64, prealloc: Prealloc) -> Result<()> {
        self.check_writable().map_err(|e| e.with_message("Image is read-only"))?;
        self.node.resize(len, prealloc).await?;
        self.follow_length().await
    }

    /// Bitmaps have the node's length again.
    pub(crate) async fn follow_length(&self) -> Result<()> {
        for bitmap in self.bitmaps() {
            bitmap.resize(self.node.len())?;
        }
        match self.write_ahead() {
            Some(log) => log.resize(self.node.len()).await,
            None => Ok(()),
        }
    }

    pub(crate) async fn copy_to(&self, at: Span, to: &NodeCell, to_offset: u64) -> Result<u64> {
        if !at.is_aligned(self.node.limits().request_alignment) {
            return Err(BlockError::unsupported("copy offload of unaligned ranges"));
        }
        // The reader would be inside the exclusion while somebody else's write goes on, and that may wait for a copy.
        if self.readers.borrow().is_some() {
            return Err(BlockError::unsupported("copy offload from where old bytes are saved to"));
        }
        let copied = self.node.copy_to(at, to, to_offset).await?;
        let mut c = self.counters.get();
        c.reads += 1;
        c.read_bytes += copied;
        self.counters.set(c);
        Ok(copied)
    }

    /// Writes bytes that lie in a file of the host; for drivers that carry out [`Node::copy_to`], which are inside an edge to
    /// this node. `Unsupported` where the bytes have to be seen.
    pub async fn write_from(&self, offset: u64, from: HostBytes) -> Result<()> {
        self.check_writable()?;
        let at = Span::new(offset, from.at.len);
        let limits = self.node.limits();
        let plain = at.is_aligned(limits.request_alignment) && within(at.len, limits.max_transfer);
        if !plain || self.options.borrow().detect_zeroes != DetectZeroes::Off {
            return Err(BlockError::unsupported("no copy offload to this node"));
        }
        let _inside = if self.plain.get() { None } else { self.go_ahead(at).await? };
        let _change = Change { cell: self, span: at };
        let _lock = self.ranges.lock(at, false).await;
        self.count_write(at);
        self.node.write_from(offset, from).await
    }

    fn check_writable(&self) -> Result<()> {
        if self.writable.get() {
            return Ok(());
        }
        Err(BlockError::new(ErrorKind::ReadOnly, format!("Node '{}' is read-only", self.name)))
    }

    fn count_write(&self, at: Span) {
        let mut c = self.counters.get();
        c.writes += 1;
        c.written_bytes += at.len;
        c.highest_written = c.highest_written.max(at.end());
        self.counters.set(c);
        let threshold = self.write_threshold.get();
        if threshold > 0 && at.end() > threshold {
            self.write_threshold.set(0);
            if let Some(hit) = self.threshold_hit.take() {
                hit(at.end() - threshold, threshold);
            }
        }
    }
}

fn within(len: u64, max: u64) -> bool {
    max == 0 || len <= max
}

/// The next piece of `left` bytes that a driver with this maximum takes.
fn piece(max: u64, align: u64, left: u64) -> u64 {
    if max == 0 { left } else { left.min((max & !(align - 1)).max(align)) }
}

impl std::fmt::Debug for NodeCell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "node {} ({})", self.name, self.node.driver())
    }
}
