//! `raw`: the bytes of the node below, or a window of them (`offset`, `size`).

use block::{BlockError, Data, Extent, Io, Limits, Prealloc, ReqFlags, Span};
use graph::{DebugEvent, Demand, Edge, HostBytes, Node, NodeCell, NodeDetails, Perms};
use std::any::Any;
use std::rc::Rc;

/// A raw disk.
pub struct RawNode {
    file: Rc<Edge>,
    offset: u64,
    size: Option<u64>,
}

impl RawNode {
    /// A window of `size` bytes (default: to the end) at `offset` of the child behind `file`.
    pub fn open(file: Rc<Edge>, offset: u64, size: Option<u64>) -> block::Result<Rc<RawNode>> {
        let node = RawNode { file, offset, size };
        node.check_window()?;
        Ok(Rc::new(node))
    }

    /// That the file is long enough.
    fn check_window(&self) -> block::Result<()> {
        let (len, offset, size) = (self.file.len(), self.offset, self.size);
        if offset > len {
            return Err(BlockError::invalid(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({len})"
            )));
        }
        if size.is_some_and(|s| s > len - offset) {
            return Err(BlockError::invalid(format!(
                "The sum of offset ({offset}) and size ({}) has to be smaller or equal to the actual size of the \
                 containing file ({len})",
                size.unwrap_or_default()
            )));
        }
        Ok(())
    }

    fn window(&self) -> bool {
        self.offset > 0 || self.size.is_some()
    }
}

/// Where the window of a raw disk begins in the node below; 0 for other nodes.
pub fn offset_of(node: &dyn Node) -> u64 {
    node.as_any().downcast_ref::<RawNode>().map_or(0, |raw| raw.offset)
}

impl Node for RawNode {
    fn driver(&self) -> &'static str {
        "raw"
    }
    fn len(&self) -> u64 {
        self.size.unwrap_or_else(|| self.file.len().saturating_sub(self.offset))
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
        Box::pin(self.file.read(at.shifted(self.offset)))
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        self.file.announce(DebugEvent::WriteAio);
        Box::pin(self.file.write(at.start + self.offset, data, flags))
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(self.file.zero(at.shifted(self.offset), flags))
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(self.file.discard(at.shifted(self.offset)))
    }
    fn leaf_hashes(&self, at: Span) -> Io<'_, Option<Vec<[u8; 32]>>> {
        Box::pin(async move { if self.offset == 0 { self.file.leaf_hashes(at).await } else { Ok(None) } })
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move {
            let inside = at.shifted(self.offset);
            // what lies behind a filter, or in layers below, is part of these bytes too
            let mut found: Vec<Extent> = match self.file.child().below() {
                None => self.file.extents(inside).await?,
                Some(_) => {
                    let chain = self.file.status(inside).await?;
                    chain.into_iter().map(|e| Extent::new(e.span, e.kind)).collect()
                }
            };
            for e in &mut found {
                e.span.start -= self.offset;
            }
            Ok(found)
        })
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(self.file.flush())
    }
    fn resize(&self, len: u64, prealloc: Prealloc) -> Io<'_> {
        Box::pin(async move {
            if self.size.is_some() {
                return Err(BlockError::unsupported("Cannot resize fixed-size raw disks"));
            }
            let whole = len
                .checked_add(self.offset)
                .ok_or_else(|| BlockError::invalid("Disk size too large for the chosen offset"))?;
            self.file.resize(whole, prealloc).await
        })
    }
    fn set_active(&self, _: bool) -> Io<'_> {
        Box::pin(async { self.check_window() })
    }
    fn set_writable(&self, _: bool) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move {
            let below = self.file.child().node().details().await?;
            let nested = below.filename.strip_prefix("json:");
            let filename = if self.window() {
                let size = self.size.map(|s| format!(", \"size\": {s}")).unwrap_or_default();
                let file = match nested {
                    Some(file) => file.to_owned(),
                    None => format!("{{\"driver\": \"file\", \"filename\": {:?}}}", below.filename),
                };
                format!("json:{{\"driver\": \"raw\", \"offset\": {}{size}, \"file\": {file}}}", self.offset)
            } else if let Some(file) = nested {
                format!("json:{{\"driver\": \"raw\", \"file\": {file}}}")
            } else {
                below.filename.clone()
            };
            Ok(NodeDetails { filename, actual_size: below.actual_size, ..NodeDetails::default() })
        })
    }
    fn primary(&self) -> Option<Rc<Edge>> {
        Some(self.file.clone())
    }
    fn copy_to<'a>(&'a self, at: Span, to: &'a NodeCell, to_offset: u64) -> Io<'a, u64> {
        Box::pin(self.file.copy_onto(at.shifted(self.offset), to, to_offset))
    }
    fn write_from(&self, offset: u64, from: HostBytes) -> Io<'_> {
        Box::pin(self.file.write_from(offset + self.offset, from))
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}
