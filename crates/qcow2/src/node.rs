//! An open image as a node of the graph.

use crate::bitmaps::Entry;
use crate::core::{Core, OnCorruption};
use crate::header::Header;
use crate::options::Options;
use crate::overlap::Corruption;
use crate::payload::Payload;
use crate::snapshot::Snapshot;
use bitmap::BitmapList;
use block::{BlockError, Data, ErrorKind, Extent, Io, Limits, ReqFlags, Result, Span};
use env::Env;
use graph::node::Fact;
use graph::{Demand, Edge, HostBytes, Node, NodeCell, NodeDetails, Perms, Role, Skippable};
use std::rc::Rc;

/// An open qcow2 image.
pub struct Qcow2 {
    core: Rc<Core>,
}

impl Qcow2 {
    /// Opens the image in `file`. `data_file` is there exactly if the image keeps its data in an external file. The
    /// layer below, if any, is set by [`Node::set_backing`].
    ///
    /// # Errors
    /// If this is no image of this format, uses a feature that is not known (named), is encrypted, marked corrupt (for
    /// writing), or its tables cannot be read.
    pub async fn open(
        env: Env,
        file: Rc<Edge>,
        data_file: Option<Rc<Edge>>,
        options: Options,
    ) -> Result<Rc<Qcow2>> {
        let core = crate::open::open(env, file, data_file, options).await?;
        Ok(Rc::new(Qcow2 { core }))
    }

    /// `hook` is called once, when the image is found to be corrupt (QMP event BLOCK_IMAGE_CORRUPTED). Within the call no
    /// request can be made.
    pub fn on_corruption(&self, hook: impl Fn(&Corruption) + 'static) {
        let hook: OnCorruption = Rc::new(hook);
        *self.core.on_corruption.borrow_mut() = Some(hook);
    }

    /// Whether the image vouched, when it was opened, for the number that was given as [`crate::Keeper::old`]: nobody else has
    /// written to it since.
    pub fn vouched(&self) -> bool {
        self.core.vouched.get()
    }

    /// The number under which its bitmaps may be kept elsewhere; `None` if the image cannot vouch for any.
    pub fn kept_number(&self) -> Option<[u8; 16]> {
        self.core.kept_number.get()
    }

    /// The backing file name and format in the header.
    pub fn backing_name(&self) -> (Option<String>, Option<String>) {
        let h = self.core.header.borrow();
        (h.backing.clone(), h.backing_format().map(str::to_owned))
    }

    /// The internal snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.core.snapshots.borrow().list.clone()
    }

    /// Takes an internal snapshot; `date` is now in seconds since 1970 and nanoseconds, `vm_clock` the guest's clock in
    /// nanoseconds. The caller keeps all requests out meanwhile.
    ///
    /// # Errors
    /// Read-only or corrupt images, those with an external data file, refcounts that cannot count one user more, the file's.
    /// Nothing has changed then.
    pub async fn take_snapshot(&self, name: &str, date: (u32, u32), vm_clock: u64) -> Result<()> {
        self.core.take_snapshot(name, date, vm_clock).await
    }

    /// Deletes the internal snapshot number `index` of [`Qcow2::snapshots`], and gives it. The caller keeps all requests out
    /// meanwhile.
    ///
    /// # Errors
    /// As [`Qcow2::take_snapshot`]; after an error of the file the snapshot may be gone without its space.
    pub async fn delete_snapshot(&self, index: usize) -> Result<Snapshot> {
        self.core.delete_snapshot(index).await
    }

    /// The options that it is open with.
    pub fn options(&self) -> Options {
        self.core.opts.borrow().clone()
    }

    /// Whether it could be open with the run-time options of `new`: caches, lazy refcounts, what discards do, what is protected.
    ///
    /// # Errors
    /// A sentence, if they contradict each other or the image.
    pub fn check_options(&self, new: &Options) -> Result<()> {
        self.core.check_options(new)
    }

    /// Takes those. The units of its caches stay what they are.
    pub fn set_options(&self, new: &Options) {
        self.core.set_options(new);
    }

    /// Barriers issued on the image file so far.
    pub fn barriers(&self) -> u64 {
        self.core.file.barriers()
    }

    async fn write_data(&self, at: Span, data: Data, flags: ReqFlags) -> Result<()> {
        if at.is_empty() {
            return Ok(());
        }
        if flags.compressed {
            self.core.write_compressed(at, data).await?;
        } else {
            self.core.write(at, data).await?;
        }
        if flags.fua { self.core.flush().await } else { Ok(()) }
    }
}

impl Node for Qcow2 {
    fn driver(&self) -> &'static str {
        "qcow2"
    }

    fn len(&self) -> u64 {
        self.core.size.get()
    }

    fn limits(&self) -> Limits {
        Limits {
            cluster_size: self.core.geo.cluster_size(),
            memory_alignment: self.core.data().edge().limits().memory_alignment,
            efficient_zero: self.core.geo.version() >= 3,
            ..Limits::default()
        }
    }

    fn edges(&self) -> Vec<Rc<Edge>> {
        let mut out = vec![self.core.file.edge().clone()];
        out.extend(self.core.data_file.as_ref().map(|d| d.edge().clone()));
        out.extend(self.core.backing.borrow().clone());
        out
    }

    fn wants(&self, edge: &Edge, above: Demand, writable: bool) -> Demand {
        if edge.role() == Role::Backing {
            // Only read from; it may change under us exactly if those above can take that.
            let changing = Perms::WRITE.with(Perms::RESIZE);
            let extra = if above.shares.has(Perms::WRITE) { changing } else { Perms::NONE };
            return Demand {
                needs: above.needs.common(Perms::CONSISTENT_READ),
                shares: Perms::CONSISTENT_READ.with(Perms::WRITE_UNCHANGED).with(extra),
            };
        }
        // Metadata is read and written whatever those above do, and nobody else may change the file.
        let own = if writable { Perms::WRITE.with(Perms::RESIZE) } else { Perms::NONE };
        Demand {
            needs: above.needs.with(Perms::CONSISTENT_READ).with(own),
            shares: above.shares.without(Perms::WRITE.with(Perms::RESIZE)),
        }
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        if at.is_empty() {
            return Box::pin(async { Ok(Data::empty()) });
        }
        Box::pin(self.core.read(at))
    }

    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        Box::pin(self.write_data(at, data, flags))
    }

    fn copy_to<'a>(&'a self, at: Span, to: &'a NodeCell, to_offset: u64) -> Io<'a, u64> {
        Box::pin(
            async move { if at.is_empty() { Ok(0) } else { self.core.copy_to(at, to, to_offset).await } },
        )
    }

    fn write_from(&self, offset: u64, from: HostBytes) -> Io<'_> {
        let at = Span::new(offset, from.at.len);
        Box::pin(async move {
            if at.is_empty() { Ok(()) } else { self.core.write_payload(at, Payload::Host(from)).await }
        })
    }

    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            if !at.is_empty() {
                self.core.zero(at, flags).await?;
            }
            if flags.fua { self.core.flush().await } else { Ok(()) }
        })
    }

    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(async move { if at.is_empty() { Ok(()) } else { self.core.discard(at).await } })
    }

    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(self.core.extents(at))
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(self.core.flush())
    }

    fn resize(&self, len: u64, prealloc: block::Prealloc) -> Io<'_> {
        Box::pin(self.core.resize(len, prealloc))
    }

    fn set_active(&self, on: bool) -> Io<'_> {
        Box::pin(async move {
            match (self.core.active.get(), on) {
                (false, true) => self.core.activate().await,
                (true, false) => self.core.inactivate().await,
                _ => Ok(()),
            }
        })
    }

    fn set_writable(&self, writable: bool) -> Io<'_> {
        Box::pin(async move {
            if !self.core.active.get() {
                self.core.wants_writable.set(writable);
                return Ok(());
            }
            let done = match (self.core.writable.get(), writable) {
                (false, true) => self.core.make_writable().await,
                (true, false) => self.core.make_read_only().await,
                _ => Ok(()),
            };
            if done.is_ok() {
                self.core.wants_writable.set(writable);
            }
            done
        })
    }

    fn close(&self) -> Io<'_> {
        Box::pin(async move {
            self.core.background.idle().await;
            let stored = self.core.store_bitmaps().await;
            self.core.settle_all().await.and(stored)
        })
    }

    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move {
            let below = self.core.file.edge().child().node().details().await?;
            let h = self.core.header.borrow();
            let v3 = self.core.geo.version() >= 3;
            let text = |s: &str| Fact::Text(s.to_owned());
            let mut specific = vec![
                ("compat", text(if v3 { "1.1" } else { "0.10" })),
                ("compression-type", text(h.compression.name())),
            ];
            if v3 {
                specific.push(("lazy-refcounts", Fact::Flag(h.lazy_refcounts())));
            }
            specific.push(("refcount-bits", Fact::Number(u64::from(self.core.geo.refcount_bits()))));
            if v3 {
                specific.push(("corrupt", Fact::Flag(h.is_corrupt())));
                specific.push(("extended-l2", Fact::Flag(self.core.geo.extended_l2())));
            }
            let kept = self.core.bitmaps.directory.borrow();
            if !kept.is_empty() {
                specific.push(("bitmaps", Fact::List(kept.iter().map(Entry::fact).collect())));
            }
            if let Some(name) = h.data_file() {
                let raw = h.autoclear & crate::header::AUTOCLEAR_RAW_DATA != 0;
                specific.push(("data-file", text(name)));
                specific.push(("data-file-raw", Fact::Flag(raw)));
            }
            Ok(NodeDetails {
                filename: match below.filename.strip_prefix("json:") {
                    // a file that only its options describe: they do not say what is in it
                    Some(file) => format!("json:{{\"driver\": \"qcow2\", \"file\": {file}}}"),
                    None => below.filename,
                },
                actual_size: below.actual_size,
                cluster_size: Some(self.core.geo.cluster_size()),
                backing_filename: h.backing.clone(),
                backing_format: h.backing_format().map(str::to_owned),
                dirty_flag: Some(h.is_dirty()),
                compressed: None,
                specific,
                records: Vec::new(),
                snapshots: self.core.snapshots.borrow().list.iter().map(Snapshot::details).collect(),
            })
        })
    }

    fn backing(&self) -> Option<Rc<Edge>> {
        self.core.backing.borrow().clone()
    }

    fn supports_backing(&self) -> bool {
        true
    }

    fn skippable(&self) -> Option<&Skippable> {
        // a test that wants to hear of steps hears of all
        (!self.core.file.edge().child().node().hears_events()).then_some(&self.core.skippable)
    }

    fn primary(&self) -> Option<Rc<Edge>> {
        Some(self.core.file.edge().clone())
    }

    fn set_backing(&self, edge: Option<Rc<Edge>>) {
        *self.core.backing.borrow_mut() = edge;
    }

    fn write_backing_name<'a>(&'a self, name: Option<&'a str>, format: Option<&'a str>) -> Io<'a> {
        let (name, format) = (name.map(str::to_owned), format.map(str::to_owned));
        let core = self.core.clone();
        Box::pin(async move {
            if !core.active.get() {
                let message = format!("image '{}' is inactive", core.name());
                return Err(BlockError::new(ErrorKind::Permission, message).with_errno(BlockError::EPERM));
            }
            let rewriting = core.clone();
            let change = move |h: &mut Header| h.set_backing(name.as_deref(), format.as_deref());
            if !core.bitmaps.persistent().is_empty() {
                // those that are stored when the image is closed need their place beside the new name
                let mut after = core.header.borrow().clone();
                change(&mut after);
                after.check_room_for_bitmaps()?;
            }
            core.detached("qcow2-header", async move { rewriting.rewrite_header(change).await }).await
        })
    }

    fn share_bitmaps(&self, list: &BitmapList) {
        self.core.bitmaps.share(list);
    }

    fn check_bitmap(&self, name: &str, granularity: u64) -> Result<()> {
        self.core.check_bitmap(name, granularity)
    }

    fn forget_bitmap<'a>(&'a self, name: &'a str) -> Io<'a> {
        Box::pin(self.core.forget_bitmap(name))
    }

    fn make_empty(&self) -> Io<'_> {
        Box::pin(async move {
            let all = Span::new(0, self.len().next_multiple_of(self.core.geo.cluster_size()));
            self.core.forget(all).await?;
            self.core.commit().await
        })
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
