//! What stands before the writes of a node so that a crash cannot make its bitmaps lack them.
//!
//! What must stay true: between [`WriteAhead::enter`] and [`WriteAhead::leave`] a crash leaves the write marked; the
//! write is in the node's bitmaps before `leave`. A node without it pays nothing.

use block::{Io, Span};

/// Leave to write, as [`WriteAhead`] gave it; its number is for that to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Admitted(pub u32);

/// A log of regions that are being written to, and the bitmaps of one node that it keeps.
pub trait WriteAhead: 'static {
    /// Begins a write to `at`, if it need not wait.
    fn try_enter(&self, at: Span) -> Option<Admitted>;
    /// Begins a write to `at`: waits until a crash would leave it marked.
    fn enter(&self, at: Span) -> Io<'_, Admitted>;
    /// The write has ended, one way or another.
    fn leave(&self, by: Admitted);
    /// Makes durable which bitmaps the node has, what is in them and whether they record.
    fn sync(&self) -> Io<'_>;
    /// The node has `len` bytes from now on. No write is under way.
    fn resize(&self, len: u64) -> Io<'_>;
    /// The node is going to be closed, or given up to somebody else: no write is under way. The bitmaps are exact after.
    fn close(&self) -> Io<'_>;
    /// The node was closed, or given up, and is used again after all. No write is under way.
    fn reopen(&self) -> Io<'_>;
    /// For whoever made it.
    fn as_any(&self) -> &dyn std::any::Any;
}
