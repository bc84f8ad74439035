//! Bytes that the offline tools (create, check, repair) work on: a node of the graph, an open file, or memory.
//!
//! The tools are `async` and generic over [`Storage`], so one implementation serves the daemon (where every access waits) and
//! the crash tests (where an image is a vector and nothing ever waits: see [`now`]).

use block::{BlockError, ErrorKind, Prealloc, Result, Span};
use graph::Edge;
use std::borrow::Cow;
use std::cell::RefCell;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Random access to an image file.
pub trait Storage {
    /// Length in bytes, now.
    fn len(&self) -> u64;
    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Reads exactly `at`; what lies past the end reads as zeroes.
    fn read(&self, at: Span) -> impl Future<Output = Result<Cow<'_, [u8]>>>;
    /// Writes, growing the storage as needed.
    fn write(&self, at: u64, bytes: &[u8]) -> impl Future<Output = Result<()>>;
    /// Everything written before is on stable storage after.
    fn barrier(&self) -> impl Future<Output = Result<()>>;
    /// Sets the length; what is added reads as zeroes and is set aside as `prealloc` says.
    fn resize(&self, len: u64, prealloc: Prealloc) -> impl Future<Output = Result<()>>;
}

/// A node, through its edge.
impl Storage for Rc<Edge> {
    fn len(&self) -> u64 {
        Edge::len(self)
    }

    async fn read(&self, at: Span) -> Result<Cow<'_, [u8]>> {
        let there = at.intersect(&Span::new(0, Edge::len(self)));
        let mut bytes = if there.is_empty() { Vec::new() } else { Edge::read(self, there).await?.to_vec() };
        bytes.resize(usize::try_from(at.len).map_err(|_| too_long(at))?, 0);
        Ok(Cow::Owned(bytes))
    }

    async fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let end = Span::new(at, bytes.len() as u64).end();
        if end > Edge::len(self) {
            Edge::resize(self, end, Prealloc::Off).await?;
        }
        Edge::write(self, at, block::Data::copy_from(bytes), block::ReqFlags::NONE).await
    }

    async fn barrier(&self) -> Result<()> {
        Edge::flush(self).await
    }

    async fn resize(&self, len: u64, prealloc: Prealloc) -> Result<()> {
        Edge::resize(self, len, prealloc).await
    }
}

/// An open file of the host (or of the simulator).
impl Storage for Rc<dyn env::File> {
    fn len(&self) -> u64 {
        self.len_hint()
    }

    async fn read(&self, at: Span) -> Result<Cow<'_, [u8]>> {
        Ok(Cow::Owned(env::File::read(&**self, at).await?.to_vec()))
    }

    async fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        env::File::write(&**self, at, block::Data::copy_from(bytes)).await
    }

    async fn barrier(&self) -> Result<()> {
        env::File::barrier(&**self).await
    }

    async fn resize(&self, len: u64, prealloc: Prealloc) -> Result<()> {
        let old = self.len_hint();
        self.set_len(len).await?;
        match prealloc {
            Prealloc::Off | Prealloc::Metadata => Ok(()),
            Prealloc::Falloc => self.allocate(Span::between(old, len)).await,
            Prealloc::Full => write_zeroes(self, Span::between(old, len)).await,
        }
    }
}

/// Bytes written at a time where zeroes are really written.
const ZERO_CHUNK: u64 = 1 << 20;

async fn write_zeroes(file: &Rc<dyn env::File>, at: Span) -> Result<()> {
    for now in at.pieces(ZERO_CHUNK) {
        env::File::write(&**file, now.start, block::Data::zeroes(now.len as usize)).await?;
    }
    Ok(())
}

fn too_long(at: Span) -> BlockError {
    BlockError::new(ErrorKind::OutOfRange, format!("cannot read {at} at once"))
}

/// An image in memory. Never waits.
#[derive(Default)]
pub struct Memory {
    bytes: RefCell<Vec<u8>>,
    barriers: std::cell::Cell<u64>,
}

impl Memory {
    /// Takes the bytes of an image.
    pub fn new(bytes: Vec<u8>) -> Memory {
        Memory { bytes: RefCell::new(bytes), barriers: Default::default() }
    }
    /// Gives the bytes back.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes.into_inner()
    }
    /// How often [`Storage::barrier`] was called.
    pub fn barriers(&self) -> u64 {
        self.barriers.get()
    }
}

impl Storage for Memory {
    fn len(&self) -> u64 {
        self.bytes.borrow().len() as u64
    }

    async fn read(&self, at: Span) -> Result<Cow<'_, [u8]>> {
        Ok(Cow::Owned((&self.bytes.borrow()[..]).slice(at)?.into_owned()))
    }

    async fn write(&self, at: u64, data: &[u8]) -> Result<()> {
        let mut bytes = self.bytes.borrow_mut();
        let start = usize::try_from(at).map_err(|_| too_long(Span::new(at, 0)))?;
        let end = start + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(data);
        Ok(())
    }

    async fn barrier(&self) -> Result<()> {
        self.barriers.set(self.barriers.get() + 1);
        Ok(())
    }

    async fn resize(&self, len: u64, _prealloc: Prealloc) -> Result<()> {
        let len = usize::try_from(len).map_err(|_| too_long(Span::new(len, 0)))?;
        self.bytes.borrow_mut().resize(len, 0);
        Ok(())
    }
}

/// A borrowed image, only for reading: what the crash tests check thousands of times a second.
impl Storage for &[u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    async fn read(&self, at: Span) -> Result<Cow<'_, [u8]>> {
        self.slice(at)
    }

    async fn write(&self, _at: u64, _bytes: &[u8]) -> Result<()> {
        Err(BlockError::new(ErrorKind::ReadOnly, "these bytes are only for reading"))
    }

    async fn barrier(&self) -> Result<()> {
        Ok(())
    }

    async fn resize(&self, _len: u64, _prealloc: Prealloc) -> Result<()> {
        Err(BlockError::new(ErrorKind::ReadOnly, "these bytes are only for reading"))
    }
}

trait SliceAt {
    fn slice(&self, at: Span) -> Result<Cow<'_, [u8]>>;
}

impl SliceAt for &[u8] {
    fn slice(&self, at: Span) -> Result<Cow<'_, [u8]>> {
        let len = usize::try_from(at.len).map_err(|_| too_long(at))?;
        let start = usize::try_from(at.start).map_or(<[u8]>::len(self), |s| s.min(<[u8]>::len(self)));
        let there = &self[start..];
        if there.len() >= len {
            return Ok(Cow::Borrowed(&there[..len]));
        }
        let mut out = there.to_vec();
        out.resize(len, 0);
        Ok(Cow::Owned(out))
    }
}

/// The result of work that never waits because its storage is memory.
///
/// # Errors
/// `Io` if it did wait (its storage was not memory: a caller's defect).
pub fn now<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut cx = Context::from_waker(Waker::noop());
    match pin!(work).poll(&mut cx) {
        Poll::Ready(r) => r,
        Poll::Pending => Err(BlockError::new(ErrorKind::Io, "work on memory had to wait")),
    }
}
