//! What every layer of a disk is.

use crate::perm::Demand;
use crate::{DebugEvent, Edge, NodeCell, Skippable};
use bitmap::BitmapList;
use block::{Data, Extent, Io, Limits, Prealloc, ReqFlags, Result, Span};
use std::rc::Rc;

/// Facts about a node for `query-named-block-nodes` and `query-block`-like output. Plain data; `control` makes JSON of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeDetails {
    /// The name as QMP shows it: a path, or a `json:{…}` or `nbd+unix:///…` pseudo name.
    pub filename: String,
    /// Bytes allocated on the host, if known.
    pub actual_size: Option<u64>,
    /// Cluster size in bytes, if there are clusters.
    pub cluster_size: Option<u64>,
    /// The backing file string in the image header.
    pub backing_filename: Option<String>,
    /// The backing format string in the image header.
    pub backing_format: Option<String>,
    /// The image's dirty flag (lazy refcounts, not closed).
    pub dirty_flag: Option<bool>,
    /// Whether the image can hold compressed clusters that exist now.
    pub compressed: Option<bool>,
    /// Format-specific facts as (QMP name, value), in QSD's order; empty where QSD has none.
    pub specific: Vec<(&'static str, Fact)>,
    /// Internal snapshots, oldest first.
    pub snapshots: Vec<SnapshotDetails>,
    /// Records of what is still to be copied (and what was), kept by a job's filter.
    pub records: Vec<CopyRecord>,
}

/// An internal snapshot of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotDetails {
    /// Id.
    pub id: String,
    /// Name.
    pub name: String,
    /// When it was taken: seconds since 1970, nanoseconds.
    pub date: (u32, u32),
    /// The guest's clock then, in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of machine state in it.
    pub vm_state_size: u64,
    /// Instructions executed then, if that was counted.
    pub icount: Option<u64>,
}

/// What a job's filter has marked for copying. QMP shows it as a bitmap without name of the filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyRecord {
    /// Bytes a mark stands for.
    pub granularity: u64,
    /// Bytes marked.
    pub dirty: u64,
}

/// A value in [`NodeDetails::specific`].
#[derive(Clone, Debug, PartialEq)]
pub enum Fact {
    /// A string.
    Text(String),
    /// A whole number.
    Number(u64),
    /// A flag.
    Flag(bool),
    /// Several.
    List(Vec<Fact>),
    /// Several by name.
    Record(Vec<(&'static str, Fact)>),
}

/// Bytes that lie in a file of the host.
#[derive(Clone)]
pub struct HostBytes {
    /// The file.
    pub file: Rc<dyn env::File>,
    /// Where in it.
    pub at: Span,
}

impl HostBytes {
    /// `len` of the bytes from number `from` on.
    pub fn slice(&self, from: u64, len: u64) -> HostBytes {
        HostBytes { file: self.file.clone(), at: Span::new(self.at.start + from, len) }
    }
}

/// A layer of a disk: protocol, format or filter. Lives on its disk's home thread.
///
/// The edge above has already checked: the span is inside `len()` (for writes, too), aligned to
/// `limits().request_alignment`, not longer than `limits().max_transfer`, the node is writable if it is a write, and the
/// data is as long as the span. Requests run concurrently; a driver that needs order makes it itself.
#[allow(clippy::len_without_is_empty)] // a disk of length 0 is legal and nobody asks
pub trait Node: 'static {
    /// The driver name as in QMP (`qcow2`, `file`, `mirror_top`).
    fn driver(&self) -> &'static str;
    /// Virtual length in bytes.
    fn len(&self) -> u64;
    /// Limits of a request. May change only while the gates above are closed.
    fn limits(&self) -> Limits;
    /// All edges to children, in a fixed order.
    fn edges(&self) -> Vec<Rc<Edge>>;
    /// What this node asks of the child behind `edge` when its own parents together ask `above` of it, and `writable`
    /// says whether the node is read-write. Pure.
    fn wants(&self, edge: &Edge, above: Demand, writable: bool) -> Demand;

    /// Reads exactly `at`.
    fn read(&self, at: Span) -> Io<'_, Data>;
    /// Writes `data` at `at`.
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_>;
    /// Makes `at` read as zero. With `flags.no_fallback` it fails with `Unsupported` rather than write zeroes.
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_>;
    /// The bytes are not needed any more. May do nothing.
    fn discard(&self, at: Span) -> Io<'_>;
    /// What this layer (not those below) says of `at`, covering it exactly from its start; it may stop early after a
    /// bounded number of extents, but not at once. Filters report [`block::Kind::Unallocated`] for everything and are
    /// walked through.
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>>;
    /// Everything completed before is on stable storage after, children included.
    fn flush(&self) -> Io<'_>;

    /// Changes the length. Called with the gates above closed to other requests.
    fn resize(&self, len: u64, prealloc: Prealloc) -> Io<'_> {
        let _ = (len, prealloc);
        let name = self.driver();
        Box::pin(async move {
            Err(block::BlockError::unsupported(format!(
                "Image format driver '{name}' does not support resize"
            )))
        })
    }
    /// Takes whatever the host needs for the demands `above` of all parents together (image locks), keeping what is
    /// held for the present ones. Fails where another process is in the way. Called before the graph changes.
    fn acquire(&self, above: Demand) -> Io<'_> {
        let _ = above;
        Box::pin(async { Ok(()) })
    }
    /// Gives back what [`Node::acquire`] took beyond the needs of `above`.
    fn release(&self, above: Demand) -> Io<'_> {
        let _ = above;
        Box::pin(async { Ok(()) })
    }
    /// Turns the node read-write or read-only (image header marks, host file mode). Called while no write is running.
    fn set_writable(&self, writable: bool) -> Io<'_>;
    /// Gives the image up to somebody else (`on` is false: everything is written back, nothing that was read is kept), or takes
    /// it back as it is now. Called with the gates above closed. On an error it is as it was.
    fn set_active(&self, on: bool) -> Io<'_> {
        let _ = on;
        Box::pin(async { Ok(()) })
    }
    /// Writes back what is cached and marks the image clean; the last call before the node is dropped. Called with
    /// the gates above closed.
    fn close(&self) -> Io<'_>;
    /// The file of the host in which this node's bytes are, if they are in one: for those who have to know it again.
    fn host_file(&self) -> Io<'_, Option<env::FileInfo>> {
        let below = self.primary();
        Box::pin(async move {
            match below {
                Some(edge) => edge.child().node().host_file().await,
                None => Ok(None),
            }
        })
    }
    /// Facts for queries.
    fn details(&self) -> Io<'_, NodeDetails>;

    /// For a copy-on-write format: the edge to the layer below (what it does not hold is read from there).
    fn backing(&self) -> Option<Rc<Edge>> {
        None
    }
    /// Whether this driver can have a layer below ([`Node::set_backing`]).
    fn supports_backing(&self) -> bool {
        false
    }
    /// For a copy-on-write format that tells of its changes: reads from above may pass it over where it has nothing, without asking it.
    /// Such reads are not in its counters.
    fn skippable(&self) -> Option<&Skippable> {
        None
    }
    /// Whether [`Node::debug_event`] does anything, here or below.
    fn hears_events(&self) -> bool {
        false
    }
    /// For a filter: the edge whose child it is in front of.
    fn filtered(&self) -> Option<Rc<Edge>> {
        None
    }
    /// The edge to the node that stores this one's metadata (a format's file).
    fn primary(&self) -> Option<Rc<Edge>> {
        self.filtered()
    }
    /// Takes another layer below (or none). Only [`Graph::apply`](crate::Graph::apply) calls it, gates closed.
    fn set_backing(&self, edge: Option<Rc<Edge>>) {
        let _ = edge;
    }
    /// Takes other children, all of them edges of role `Other`; for a driver of which all children are equal. Only
    /// [`Graph::apply`](crate::Graph::apply) calls it, gates closed.
    fn set_children(&self, edges: Vec<Rc<Edge>>) {
        let _ = edges;
    }
    /// Rewrites the backing file name and format in the image header, durably.
    fn write_backing_name<'a>(&'a self, name: Option<&'a str>, format: Option<&'a str>) -> Io<'a> {
        let _ = (name, format);
        let driver = self.driver();
        Box::pin(async move {
            Err(block::BlockError::unsupported(format!(
                "driver '{driver}' does not support a backing file name"
            )))
        })
    }
    /// From now on the node's bitmaps are in `list`. A format that keeps bitmaps in the image adds them to it, and stores
    /// those that are persistent when it is closed or turned read-only.
    fn share_bitmaps(&self, list: &BitmapList) {
        let _ = list;
    }
    /// Whether the image can keep a bitmap of this name and granularity, beside those it has.
    fn check_bitmap(&self, name: &str, granularity: u64) -> Result<()> {
        let _ = (name, granularity);
        Err(block::BlockError::unsupported("Operation not supported"))
    }
    /// Removes a bitmap from the image, durably, if it is kept there.
    fn forget_bitmap<'a>(&'a self, name: &'a str) -> Io<'a> {
        let _ = name;
        Box::pin(async { Ok(()) })
    }
    /// Drops everything this layer holds, so that it reads as the layer below.
    fn make_empty(&self) -> Io<'_> {
        let driver = self.driver();
        Box::pin(async move {
            Err(block::BlockError::unsupported(format!("driver '{driver}' cannot be emptied")))
        })
    }
    /// The BLAKE3 hashes of the leaves (64 KiB each; the last of the disk may be shorter) that `at` consists of, where whoever holds
    /// the bytes tells them without giving the bytes; nothing elsewhere.
    fn leaf_hashes(&self, at: Span) -> Io<'_, Option<Vec<[u8; 32]>>> {
        let _ = at;
        Box::pin(async { Ok(None) })
    }
    /// Brings `at` to `to` without the bytes passing through here: finds the file they lie in and hands that to
    /// [`NodeCell::write_from`]. Gives the bytes copied from the start of `at`, perhaps fewer than asked; 0 where they lie
    /// in no file (zeroes, compressed data) or in too many places. `Unsupported` where that is so of the whole node.
    fn copy_to<'a>(&'a self, at: Span, to: &'a NodeCell, to_offset: u64) -> Io<'a, u64> {
        let _ = (at, to, to_offset);
        Box::pin(async { Err(block::BlockError::unsupported("no copy offload")) })
    }
    /// A parent (or the common part of this node) is about to take the step `event`; only a driver for tests cares. Must
    /// not wait.
    fn debug_event(&self, event: DebugEvent) {
        let _ = event;
    }
    /// As [`Node::write`] of `from`'s length at `offset`, with bytes that lie in a file of the host and stay there meanwhile.
    /// `Unsupported` where it cannot; nothing has changed then that the guest sees.
    fn write_from(&self, offset: u64, from: HostBytes) -> Io<'_> {
        let _ = (offset, from);
        Box::pin(async { Err(block::BlockError::unsupported("no copy offload")) })
    }
    /// Until the returned value is dropped, requests that wait for nothing but time go on at once: somebody waits for them.
    fn hurry(&self) -> Option<Box<dyn std::any::Any>> {
        None
    }
    /// For a node whose bytes a peer holds: the link to it.
    fn link(&self) -> Option<Rc<dyn crate::Link>> {
        None
    }
    /// For downcasts between cooperating drivers and jobs.
    fn as_any(&self) -> &dyn std::any::Any;
}
