//! `preallocate`: a file that grows gets more space than asked for at once, so that it grows seldom.
//!
//! What must stay true: users see the length they asked for; what was set aside beyond it is given back when the filter
//! closes or turns read-only; nobody else changes the file's length meanwhile (the filter shares neither writing nor resizing
//! while it may do both itself).

use super::filter_passes;
use block::{BlockError, ErrorKind, Io, Prealloc, Result};
use graph::{Demand, Edge, Node, Perms};
use std::cell::Cell;
use std::rc::Rc;

/// Options of `preallocate`, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreallocateOptions {
    /// Lengths of the file are multiples of this.
    pub align: u64,
    /// How much more than asked for.
    pub size: u64,
}

impl PreallocateOptions {
    /// # Errors
    /// Lengths that no file of sectors has.
    pub fn check(&self) -> Result<()> {
        if self.align > 0 && self.align.is_multiple_of(block::SECTOR) {
            return Ok(());
        }
        Err(BlockError::invalid("prealloc-align parameter of preallocate filter is not aligned to 512"))
    }
}

impl Default for PreallocateOptions {
    fn default() -> PreallocateOptions {
        PreallocateOptions { align: 1 << 20, size: 128 << 20 }
    }
}

/// The filter.
pub struct Preallocate {
    file: Rc<Edge>,
    options: Cell<PreallocateOptions>,
    /// The length that users see, once it is not that of the file.
    len: Cell<Option<u64>>,
}

impl Preallocate {
    /// A filter in front of the child of `file` (an edge of role `Filtered`, named `file`).
    pub fn open(file: Rc<Edge>, options: PreallocateOptions) -> Result<Rc<Preallocate>> {
        options.check()?;
        Ok(Rc::new(Preallocate { file, options: Cell::new(options), len: Cell::new(None) }))
    }

    /// How much is set aside now.
    pub fn options(&self) -> PreallocateOptions {
        self.options.get()
    }

    /// Sets aside so much from now on.
    pub fn set_options(&self, options: PreallocateOptions) {
        self.options.set(options);
    }

    async fn set_len(&self, len: u64, prealloc: Prealloc) -> Result<()> {
        if len <= self.file.len() {
            // Inside what was set aside; that reads as zero.
            if len >= self.seen() && prealloc == Prealloc::Off {
                self.len.set(Some(len));
                return Ok(());
            }
            self.file.resize(len, prealloc).await?;
            self.len.set(None);
            return Ok(());
        }
        let PreallocateOptions { align, size } = self.options.get();
        let target = len.checked_add(size).and_then(|l| l.checked_next_multiple_of(align));
        let ahead = match target {
            Some(target) if prealloc == Prealloc::Off => self.file.resize(target, Prealloc::Falloc).await,
            _ => Err(BlockError::new(ErrorKind::Unsupported, "space is set aside as asked for")),
        };
        match ahead {
            Ok(()) => self.len.set(Some(len)),
            // No space for more, or no way to set it aside: exactly what was asked for.
            Err(_) => {
                self.file.resize(len, prealloc).await?;
                self.len.set(None);
            }
        }
        Ok(())
    }

    fn seen(&self) -> u64 {
        self.len.get().unwrap_or_else(|| self.file.len())
    }

    /// Gives back what is beyond the length that users see.
    async fn give_back(&self) -> Result<()> {
        match self.len.take() {
            Some(len) if len < self.file.len() => self.file.resize(len, Prealloc::Off).await,
            _ => Ok(()),
        }
    }
}

impl Node for Preallocate {
    filter_passes!(file: limits, read, write, zero, discard, extents, flush, details);

    fn driver(&self) -> &'static str {
        "preallocate"
    }
    fn len(&self) -> u64 {
        self.seen()
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        vec![self.file.clone()]
    }
    fn wants(&self, _: &Edge, above: Demand, _: bool) -> Demand {
        let both = Perms::WRITE.with(Perms::RESIZE);
        if above.needs.has(both) {
            return Demand { needs: above.needs, shares: above.shares.without(both) };
        }
        // What is set aside is given back when the last user has gone.
        let needs = if self.len.get().is_some() { above.needs.with(Perms::RESIZE) } else { above.needs };
        Demand { needs, shares: above.shares }
    }

    fn resize(&self, len: u64, prealloc: Prealloc) -> Io<'_> {
        Box::pin(self.set_len(len, prealloc))
    }
    fn set_writable(&self, on: bool) -> Io<'_> {
        Box::pin(async move { if on { Ok(()) } else { self.give_back().await } })
    }
    fn close(&self) -> Io<'_> {
        Box::pin(self.give_back())
    }
    fn filtered(&self) -> Option<Rc<Edge>> {
        Some(self.file.clone())
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
