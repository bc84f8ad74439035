//! `raw`: the bytes of the node below, or a window of them (`offset`, `size`).

use crate::filters::description;
use block::{BlockError, Data, Extent, Io, Limits, Prealloc, ReqFlags, Span};
use graph::{DebugEvent, Demand, Edge, HostBytes, Node, NodeCell, NodeDetails, Perms};
use std::any::Any;
use std::cell::Cell;
use std::rc::Rc;

/// A raw disk.
pub struct RawNode {
    file: Rc<Edge>,
    offset: Cell<u64>,
    size: Cell<Option<u64>>,
}

impl RawNode {
    /// A window of `size` bytes (default: to the end) at `offset` of the child behind `file`.
    pub fn open(file: Rc<Edge>, offset: u64, size: Option<u64>) -> block::Result<Rc<RawNode>> {
        check_window(file.len(), offset, size)?;
        Ok(Rc::new(RawNode { file, offset: Cell::new(offset), size: Cell::new(size) }))
    }

    /// Moves the window. Nobody may use the node meanwhile, and the window must fit the file ([`check_window`]).
    pub fn set_window(&self, offset: u64, size: Option<u64>) {
        self.offset.set(offset);
        self.size.set(size);
    }

    /// `offset` and `size` as they are.
    pub fn get_window(&self) -> (u64, Option<u64>) {
        (self.offset.get(), self.size.get())
    }

    fn window(&self) -> bool {
        self.offset.get() > 0 || self.size.get().is_some()
    }
}

/// That a file of `len` bytes is long enough for a window.
pub fn check_window(len: u64, offset: u64, size: Option<u64>) -> block::Result<()> {
    if offset > len {
        return Err(BlockError::invalid(format!(
            "Offset ({offset}) cannot be greater than size of the containing file ({len})"
        )));
    }
    if size.is_some_and(|s| s > len - offset) {
        return Err(BlockError::invalid(format!(
            "The sum of offset ({offset}) and size ({}) has to be smaller or equal to the  actual size of the \
             containing file ({len})",
            size.unwrap_or_default()
        )));
    }
    Ok(())
}

/// Where the window of a raw disk begins in the node below; 0 for other nodes.
pub fn offset_of(node: &dyn Node) -> u64 {
    node.as_any().downcast_ref::<RawNode>().map_or(0, |raw| raw.offset.get())
}

impl Node for RawNode {
    fn driver(&self) -> &'static str {
        "raw"
    }
    fn len(&self) -> u64 {
        self.size.get().unwrap_or_else(|| self.file.len().saturating_sub(self.offset.get()))
    }
    fn limits(&self) -> Limits {
        // Unaligned requests are reshaped below, by the edge to the file: here every byte can be addressed.
        Limits { request_alignment: 1, ..self.file.limits() }
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        vec![self.file.clone()]
    }
    fn wants(&self, _: &Edge, above: Demand, _: bool) -> Demand {
        if !self.window() {
            return above;
        }
        // Other windows of the same file may be resized away under us.
        Demand { needs: above.needs, shares: above.shares.without(Perms::RESIZE) }
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        self.file.announce(DebugEvent::ReadAio);
        Box::pin(self.file.read(at.shifted(self.offset.get())))
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        self.file.announce(DebugEvent::WriteAio);
        Box::pin(self.file.write(at.start + self.offset.get(), data, flags))
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(self.file.zero(at.shifted(self.offset.get()), flags))
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(self.file.discard(at.shifted(self.offset.get())))
    }
    fn leaf_hashes(&self, at: Span) -> Io<'_, Option<Vec<[u8; 32]>>> {
        Box::pin(
            async move { if self.offset.get() == 0 { self.file.leaf_hashes(at).await } else { Ok(None) } },
        )
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move {
            let inside = at.shifted(self.offset.get());
            // what lies behind a filter, or in layers below, is part of these bytes too
            let mut found: Vec<Extent> = match self.file.child().below() {
                None => self.file.extents(inside).await?,
                Some(_) => {
                    let chain = self.file.status(inside).await?;
                    chain.into_iter().map(|e| Extent::new(e.span, e.kind)).collect()
                }
            };
            for e in &mut found {
                e.span.start -= self.offset.get();
            }
            Ok(found)
        })
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(self.file.flush())
    }
    fn resize(&self, len: u64, prealloc: Prealloc) -> Io<'_> {
        Box::pin(async move {
            if self.size.get().is_some() {
                return Err(BlockError::unsupported("Cannot resize fixed-size raw disks"));
            }
            let whole = len
                .checked_add(self.offset.get())
                .ok_or_else(|| BlockError::invalid("Disk size too large for the chosen offset"))?;
            self.file.resize(whole, prealloc).await
        })
    }
    fn set_active(&self, _: bool) -> Io<'_> {
        Box::pin(async { check_window(self.file.len(), self.offset.get(), self.size.get()) })
    }
    fn set_writable(&self, _: bool) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move {
            let file = self.file.child();
            let below = file.node().details().await?;
            // opening that name would open the file alone
            let has_name =
                matches!(file.node().driver(), "blkdebug" | "blkverify") || file.node().primary().is_none();
            let filename = if !self.window() && has_name && !below.filename.starts_with("json:") {
                below.filename
            } else {
                let offset = if self.window() {
                    format!("\"offset\": {}, ", self.offset.get())
                } else {
                    String::new()
                };
                let size = self.size.get().map(|s| format!("\"size\": {s}, ")).unwrap_or_default();
                format!("json:{{\"driver\": \"raw\", {offset}{size}\"file\": {}}}", description(&file).await?)
            };
            Ok(NodeDetails {
                filename,
                actual_size: below.actual_size,
                cluster_size: below.cluster_size,
                ..NodeDetails::default()
            })
        })
    }
    fn primary(&self) -> Option<Rc<Edge>> {
        Some(self.file.clone())
    }
    fn copy_to<'a>(&'a self, at: Span, to: &'a NodeCell, to_offset: u64) -> Io<'a, u64> {
        Box::pin(self.file.copy_onto(at.shifted(self.offset.get()), to, to_offset))
    }
    fn write_from(&self, offset: u64, from: HostBytes) -> Io<'_> {
        Box::pin(self.file.write_from(offset + self.offset.get(), from))
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}
