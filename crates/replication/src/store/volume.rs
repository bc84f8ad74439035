//! A disk of the group, as the store sees it.

use block::{Data, Io, Prealloc, ReqFlags, Span};
use graph::Edge;
use std::rc::Rc;

/// A disk that is replicated.
#[allow(clippy::len_without_is_empty)]
pub trait Volume {
    /// Length in bytes.
    fn len(&self) -> u64;
    /// Reads exactly `at`.
    fn read(&self, at: Span) -> Io<'_, Data>;
    /// Writes.
    fn write(&self, offset: u64, data: Data) -> Io<'_>;
    /// Makes `at` read as zero.
    fn zero(&self, at: Span) -> Io<'_>;
    /// Gives it another length; what is new reads as zero.
    fn resize(&self, len: u64) -> Io<'_>;
    /// Everything completed before is on stable storage after.
    fn flush(&self) -> Io<'_>;
}

/// A node of the graph.
pub struct EdgeVolume(pub Rc<Edge>);

impl Volume for EdgeVolume {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(self.0.read(at))
    }
    fn write(&self, offset: u64, data: Data) -> Io<'_> {
        Box::pin(self.0.write(offset, data, ReqFlags::NONE))
    }
    fn zero(&self, at: Span) -> Io<'_> {
        Box::pin(self.0.zero(at, ReqFlags { may_unmap: true, ..ReqFlags::NONE }))
    }
    fn resize(&self, len: u64) -> Io<'_> {
        Box::pin(self.0.resize(len, Prealloc::Off))
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(self.0.flush())
    }
}

/// A file, for tests of the store without a graph.
pub struct FileVolume(pub Rc<dyn env::File>);

impl Volume for FileVolume {
    fn len(&self) -> u64 {
        self.0.len_hint()
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        self.0.read(at)
    }
    fn write(&self, offset: u64, data: Data) -> Io<'_> {
        self.0.write(offset, data)
    }
    fn zero(&self, at: Span) -> Io<'_> {
        self.0.write(at.start, Data::zeroes(usize::try_from(at.len).unwrap_or(usize::MAX)))
    }
    fn resize(&self, len: u64) -> Io<'_> {
        self.0.set_len(len)
    }
    fn flush(&self) -> Io<'_> {
        self.0.barrier()
    }
}
