//! The disk as a file: what each request of the kernel does to it.
//!
//! What can happen: reads past the end (short, as of any file); writes past the end (the disk grows if the export is
//! growable; else they end there, and one that begins there finds no space); a truncation that others forbid; times, mode and
//! owner are set, which are kept here and not in the image. What must stay true: a read-only export changes nothing of the
//! disk; closing a file and fsync come back only when everything is durable.

use super::FuseExportOptions;
use super::protocol::{self, Attributes, Request, attr, op};
use block::{BlockError, Data, Prealloc, ReqFlags, Result, SECTOR, Span};
use env::Env;
use graph::{Edge, Graph};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

/// Longest read or write that the kernel may ask for: 256 pages, its own limit unless an administrator raises it.
pub(super) const MAX_TRANSFER: u32 = 1 << 20;
/// Most of the disk that one step of a search for data or holes looks at.
const SEEK_STEP: u64 = 1 << 40;

const S_IFREG: u32 = 0o100_000;
const O_ACCMODE: u32 = 3;
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;
const KEEP_SIZE: u32 = 1;
const PUNCH_HOLE: u32 = 2;
const ZERO_RANGE: u32 = 16;

/// What goes back to the kernel.
pub(super) enum Answer {
    /// Nothing, not even a header: the request has no answer.
    None,
    /// Bytes behind the header.
    Bytes(Vec<u8>),
    /// The disk's bytes.
    Data(Data),
}

/// The disk, for all requests.
pub(super) struct DiskFile {
    edge: Rc<Edge>,
    graph: Rc<Graph>,
    options: FuseExportOptions,
    attributes: Cell<Attributes>,
    /// Whoever changes the length does it alone.
    growing: env::sync::Semaphore,
}

fn error(errno: i32) -> BlockError {
    BlockError::from_errno(errno)
}

impl DiskFile {
    pub(super) fn new(env: &Env, options: FuseExportOptions, edge: Rc<Edge>, graph: Rc<Graph>) -> DiskFile {
        let now = env.wall();
        let attributes = Cell::new(Attributes {
            len: 0,
            allocated: 0,
            accessed: now,
            modified: now,
            changed: now,
            mode: S_IFREG | if options.writable { 0o600 } else { 0o400 },
            uid: env::os::process::user(),
            gid: env::os::process::group(),
            // what programs should read and write at a time
            block: 64 << 10,
        });
        DiskFile { edge, graph, options, attributes, growing: env::sync::Semaphore::new(1) }
    }

    pub(super) fn edge(&self) -> &Rc<Edge> {
        &self.edge
    }

    pub(super) fn options(&self) -> &FuseExportOptions {
        &self.options
    }

    /// Carries out a request.
    pub(super) async fn execute(&self, env: &Env, r: &Request) -> Result<Answer> {
        match r.kind() {
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT => return Ok(Answer::None),
            op::INIT => return protocol::init(r, MAX_TRANSFER).map(Answer::Bytes),
            op::STATFS => return Ok(Answer::Bytes(protocol::statfs(self.edge.len()))),
            op::DESTROY => return Ok(Answer::Bytes(Vec::new())),
            _ if r.node() != protocol::ROOT => return Err(error(BlockError::ENOENT)),
            _ => {}
        }
        match r.kind() {
            op::GETATTR => self.attributes().await,
            op::SETATTR => self.set_attributes(env, r).await,
            op::OPEN => {
                if r.u32(0)? & O_ACCMODE != 0 {
                    self.check_writable()?;
                }
                Ok(Answer::Bytes(protocol::opened()))
            }
            op::READ => self.read(r.u64(8)?, r.u32(16)?).await,
            op::WRITE => self.write(r.u64(8)?, r.u32(16)?, r.payload()).await,
            op::RELEASE => Ok(Answer::Bytes(Vec::new())),
            op::FSYNC | op::FLUSH => {
                if self.options.writable {
                    self.edge.flush().await?;
                }
                Ok(Answer::Bytes(Vec::new()))
            }
            op::FALLOCATE => self.allocate(r.u64(8)?, r.u64(16)?, r.u32(24)?).await,
            op::LSEEK => self.seek(r.u64(8)?, r.u32(16)?).await,
            // the kernel does not ask again
            _ => Err(error(BlockError::ENOSYS)),
        }
    }

    async fn attributes(&self) -> Result<Answer> {
        let details = self.edge.child().node().details().await;
        let len = self.edge.len();
        let allocated = details.ok().and_then(|d| d.actual_size).unwrap_or(len);
        let now = Attributes { len, allocated, ..self.attributes.get() };
        Ok(Answer::Bytes(now.encode()))
    }

    async fn set_attributes(&self, env: &Env, r: &Request) -> Result<Answer> {
        let valid = r.u32(0)?;
        let mut a = self.attributes.get();
        if valid & attr::MODE != 0 {
            let mode = r.u32(68)? & 0o7777;
            if !self.options.writable && mode & 0o222 != 0 {
                return Err(error(BlockError::EROFS));
            }
            a.mode = S_IFREG | mode;
        }
        if valid & attr::UID != 0 {
            a.uid = r.u32(76)?;
        }
        if valid & attr::GID != 0 {
            a.gid = r.u32(80)?;
        }
        if valid & attr::SIZE != 0 {
            self.check_writable()?;
            self.change_len(r.u64(16)?, |_| true).await?;
        }
        let time = |now: u32, seconds: usize, nanos: usize| -> Result<Duration> {
            if valid & now != 0 {
                return Ok(env.wall());
            }
            Ok(Duration::new(r.u64(seconds)?, r.u32(nanos)?.min(999_999_999)))
        };
        if valid & attr::ATIME != 0 {
            a.accessed = time(attr::ATIME_NOW, 32, 56)?;
        }
        if valid & attr::MTIME != 0 {
            a.modified = time(attr::MTIME_NOW, 40, 60)?;
        }
        a.changed = env.wall();
        self.attributes.set(a);
        self.attributes().await
    }

    fn check_writable(&self) -> Result<()> {
        if self.options.writable { Ok(()) } else { Err(error(BlockError::EROFS)) }
    }

    /// Makes the disk `len` bytes long, rounded up to sectors, if `wanted(its length)` holds when it is our turn.
    async fn change_len(&self, len: u64, wanted: impl Fn(u64) -> bool) -> Result<()> {
        let _turn = self.growing.acquire(1).await;
        let len = len.checked_next_multiple_of(SECTOR).filter(|l| i64::try_from(*l).is_ok());
        let len = len.ok_or_else(|| error(BlockError::EFBIG))?;
        if self.edge.len() == len || !wanted(self.edge.len()) {
            return Ok(());
        }
        let cell = self.edge.child();
        self.graph.resize::<BlockError>(&cell, len, Prealloc::Off, |_| Ok(())).await
    }

    async fn read(&self, offset: u64, size: u32) -> Result<Answer> {
        let size = u64::from(size.min(MAX_TRANSFER));
        let size = size.min(self.edge.len().saturating_sub(offset));
        if size == 0 {
            return Ok(Answer::Data(Data::empty()));
        }
        self.edge.read(Span::new(offset, size)).await.map(Answer::Data)
    }

    fn write_flags(&self) -> ReqFlags {
        ReqFlags { fua: self.options.writethrough, ..ReqFlags::NONE }
    }

    /// So much of a range as there is space for, after the disk was grown if that may be.
    async fn room(&self, offset: u64, len: u64) -> Result<Span> {
        let end = offset.checked_add(len).ok_or_else(|| error(BlockError::EFBIG))?;
        if end > self.edge.len() && self.options.growable {
            self.change_len(end, |now| now < end).await?;
        }
        let len = len.min(self.edge.len().saturating_sub(offset));
        Ok(Span::new(offset, len))
    }

    async fn write(&self, offset: u64, size: u32, data: Data) -> Result<Answer> {
        self.check_writable()?;
        if data.len() != size as usize {
            return Err(error(BlockError::EINVAL));
        }
        let at = self.room(offset, u64::from(size)).await?;
        if at.is_empty() && size > 0 {
            return Err(error(BlockError::ENOSPC));
        }
        self.edge.write(at.start, data.slice(0, at.len as usize), self.write_flags()).await?;
        let mut out = (at.len as u32).to_ne_bytes().to_vec();
        out.extend([0; 4]);
        Ok(Answer::Bytes(out))
    }

    async fn allocate(&self, offset: u64, len: u64, mode: u32) -> Result<Answer> {
        self.check_writable()?;
        let at = match mode & !KEEP_SIZE {
            ZERO_RANGE if mode & KEEP_SIZE == 0 => {
                let at = self.room(offset, len).await?;
                if at.len < len {
                    return Err(error(BlockError::ENOSPC));
                }
                at
            }
            // as of any file, what lies past the end is no matter
            ZERO_RANGE | PUNCH_HOLE => Span::new(offset, len.min(self.edge.len().saturating_sub(offset))),
            _ => return Err(error(BlockError::ENOTSUP)),
        };
        if !at.is_empty() {
            let may_unmap = mode & PUNCH_HOLE != 0;
            self.edge.zero(at, ReqFlags { may_unmap, ..self.write_flags() }).await?;
        }
        Ok(Answer::Bytes(Vec::new()))
    }

    async fn seek(&self, offset: u64, whence: u32) -> Result<Answer> {
        let data = match whence {
            SEEK_DATA => true,
            SEEK_HOLE => false,
            _ => return Err(error(BlockError::EINVAL)),
        };
        let (mut at, len) = (offset, self.edge.len());
        if at >= len {
            return Err(error(BlockError::ENXIO));
        }
        while at < len {
            let runs = self.edge.status(Span::new(at, (len - at).min(SEEK_STEP))).await?;
            if let Some(run) = runs.iter().find(|r| r.reads_zero() != data) {
                return Ok(Answer::Bytes(run.span.start.max(offset).to_ne_bytes().to_vec()));
            }
            let end = runs.last().map_or(at, |r| r.span.end());
            if end <= at {
                return Err(error(BlockError::EIO));
            }
            at = end;
        }
        // behind the last byte there is a hole, and no data
        if data { Err(error(BlockError::ENXIO)) } else { Ok(Answer::Bytes(len.to_ne_bytes().to_vec())) }
    }
}
