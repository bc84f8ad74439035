//! `file` and `host_device`: a disk is what a file or block device of the host holds.
//!
//! What can happen: the host refuses writing, a file system cannot punch holes, another process uses the image, the mode is
//! changed while the node is in use. What must stay true: image locks cover what the parents ask for at every moment; a range
//! that was to become zero reads as zero whatever the file system can; the length seen here is that of the file, also where
//! direct I/O works in whole blocks and the file ends inside one: what is past the end reads as zero, and a write of the
//! last block is cut back to the length the file had; a change whose request was dropped lands before the next one begins.

use crate::locks::ImageLocks;
use block::{BlockError, Data, ErrorKind, Extent, Io, Limits, Prealloc, ReqFlags, Result, Span};
use env::bugs::planted;
use env::{Env, Existing, File, FileInfo, FileKind, OpenMode, Punch};
use graph::{Demand, Edge, HostBytes, Node, NodeCell, NodeDetails};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Zeroes written in one go where the host has nothing better.
const ZERO_WRITE: u64 = 2 << 20;

/// Whether image locks are taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Locking {
    /// Where the host can.
    #[default]
    Auto,
    /// Always; an error where the host cannot.
    On,
    /// Never.
    Off,
}

/// How to open a file.
#[derive(Clone, Debug, Default)]
pub struct FileOptions {
    /// Path of the file or device.
    pub filename: String,
    /// `host_device` instead of `file`.
    pub device: bool,
    /// Not for writing.
    pub read_only: bool,
    /// Open read-only if writing is refused.
    pub auto_read_only: bool,
    /// `cache.direct`: past the page cache.
    pub direct: bool,
    /// `aio=threads`.
    pub threads: bool,
    /// See [`Locking`].
    pub locking: Locking,
}

/// What became of discards.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct DiscardStats {
    /// Requests that succeeded.
    pub done: u64,
    /// Requests that failed, also for lack of support.
    pub failed: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
}

/// An open file or device.
pub struct FileNode {
    env: Env,
    path: PathBuf,
    driver: &'static str,
    mode: Cell<OpenMode>,
    file: RefCell<Rc<dyn File>>,
    facts: FileInfo,
    locks: Option<ImageLocks>,
    len: Cell<u64>,
    discards: Cell<DiscardStats>,
    /// Why a flush failed with which the host may have dropped what was written.
    dropped: RefCell<Option<BlockError>>,
}

impl FileNode {
    /// Opens; also says whether the node ended up read-only.
    pub async fn open(env: &Env, options: &FileOptions) -> Result<(Rc<FileNode>, bool)> {
        let path = PathBuf::from(&options.filename);
        let mut mode = OpenMode {
            write: !options.read_only,
            direct: options.direct,
            existing: Existing::Open,
            threads: options.threads,
        };
        let named = |e: BlockError| e.context(format_args!("Could not open '{}'", options.filename));
        let file = match env.open(&path, mode).await {
            Err(e) if options.auto_read_only && mode.write && refused_writing(&e) => {
                mode.write = false;
                env.open(&path, mode).await.map_err(named)?
            }
            other => other.map_err(named)?,
        };
        let facts = file.info().await.map_err(named)?;
        check_kind(options, &facts)?;
        let locks = match options.locking {
            Locking::Off => None,
            Locking::On => Some(ImageLocks::default()),
            // A file system without locks (some network ones) says so at the first question.
            Locking::Auto => {
                let probe = env::LockRange { start: 100, len: 1, exclusive: false };
                file.can_lock(probe).await.is_ok().then(ImageLocks::default)
            }
        };
        let node = FileNode {
            env: env.clone(),
            path,
            driver: if options.device { "host_device" } else { "file" },
            mode: Cell::new(mode),
            len: Cell::new(facts.len),
            discards: Cell::default(),
            dropped: RefCell::default(),
            file: RefCell::new(file),
            facts,
            locks,
        };
        Ok((Rc::new(node), !mode.write))
    }

    /// Device and inode: the identity of the file, whatever it is called.
    pub fn identity(&self) -> (u64, u64) {
        (self.facts.device, self.facts.inode)
    }

    /// Path as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file as it is open now.
    pub fn file(&self) -> Rc<dyn File> {
        self.file.borrow().clone()
    }

    /// Once a flush has failed that may have cost what was written, all do: the next one would say that it is there.
    async fn barrier(&self) -> Result<()> {
        if let Some(e) = &*self.dropped.borrow() {
            return Err(e.clone());
        }
        let file = self.file();
        let done = file.barrier().await;
        if let Err(e) = &done
            && file.may_drop_unflushed()
        {
            self.dropped.borrow_mut().get_or_insert_with(|| e.clone());
        }
        done
    }

    async fn write_zeroes(&self, file: &Rc<dyn File>, at: Span) -> Result<()> {
        for now in at.pieces(ZERO_WRITE) {
            file.write(now.start, Data::zeroes(now.len as usize)).await?;
        }
        Ok(())
    }

    /// What became of discards.
    pub fn discard_stats(&self) -> DiscardStats {
        self.discards.get()
    }

    fn count_discard(&self, at: Span, done: &Result<()>) {
        let mut d = self.discards.get();
        if done.is_ok() {
            d.done += 1;
            d.bytes = d.bytes.saturating_add(at.len);
        } else {
            d.failed += 1;
        }
        self.discards.set(d);
    }

    async fn zero_now(&self, at: Span, flags: ReqFlags) -> Result<()> {
        let file = self.file();
        let unsupported = |e: &BlockError| e.kind() == ErrorKind::Unsupported;
        let how = if flags.may_unmap { Punch::Release } else { Punch::Keep };
        let mut done = file.zero(at, how).await;
        if how == Punch::Keep && done.as_ref().is_err_and(unsupported) && self.facts.kind == FileKind::Regular
        {
            // tmpfs cannot zero a range in place, but it can release it and take it again.
            done = file.zero(at, Punch::Release).await;
            if done.is_ok() {
                match file.allocate(at).await {
                    Err(e) if !unsupported(&e) => return Err(e),
                    _ => {}
                }
            }
        }
        match done {
            Err(e) if unsupported(&e) && !flags.no_fallback => self.write_zeroes(&file, at).await,
            other => other,
        }
    }

    async fn resize_now(&self, len: u64, prealloc: Prealloc) -> Result<()> {
        if self.facts.kind != FileKind::Regular {
            if len <= self.len.get() && prealloc == Prealloc::Off {
                return Ok(());
            }
            return Err(BlockError::unsupported("a device cannot be made longer here")
                .with_hint("grow the device itself, then open it again"));
        }
        let (file, old) = (self.file(), self.len.get());
        match prealloc {
            Prealloc::Metadata => {
                return Err(BlockError::unsupported("Unsupported preallocation mode 'metadata'"));
            }
            _ if len < old && prealloc != Prealloc::Off => {
                return Err(BlockError::unsupported("Preallocation can't be used for shrinking files"));
            }
            Prealloc::Off => file.set_len(len).await?,
            Prealloc::Falloc if len > old => file.allocate(Span::between(old, len)).await?,
            Prealloc::Full if len > old => {
                let written = self.write_zeroes(&file, Span::between(old, len)).await;
                if let Err(e) = written {
                    // What was added half-way is not left behind.
                    file.set_len(old).await?;
                    return Err(e);
                }
            }
            Prealloc::Falloc | Prealloc::Full => {}
        }
        self.len.set(len);
        Ok(())
    }

    async fn reopen(&self, writable: bool) -> Result<()> {
        let mode = OpenMode { write: writable, ..self.mode.get() };
        if mode.write == self.mode.get().write {
            return Ok(());
        }
        let named =
            |e: BlockError| e.context(format_args!("Could not reopen file '{}'", self.path.display()));
        let file = self.env.open(&self.path, mode).await.map_err(named)?;
        let facts = file.info().await.map_err(named)?;
        if (facts.device, facts.inode) != self.identity() {
            return Err(BlockError::new(
                ErrorKind::Busy,
                format!("'{}' is another file than the one that was opened", self.path.display()),
            ));
        }
        if let Some(locks) = &self.locks {
            locks.copy_to(&*file).await?;
        }
        let old = self.file.replace(file);
        self.mode.set(mode);
        old.settle().await?;
        match &self.locks {
            Some(locks) => locks.leave(&*old).await,
            None => Ok(()),
        }
    }
}

/// Waits for changes whose requests were dropped (a job was cancelled, a client went away while the disk was slow): what is
/// written after them must not be overwritten by them. Reads need not wait, for what they see is as if that came later.
async fn landed(file: &Rc<dyn File>) -> Result<()> {
    if file.may_still_change() && !planted("file: what was called off lands over what came later") {
        return file.settle().await;
    }
    Ok(())
}

fn refused_writing(e: &BlockError) -> bool {
    matches!(e.errno(), BlockError::EACCES | BlockError::EROFS | BlockError::EPERM)
}

fn check_kind(options: &FileOptions, facts: &FileInfo) -> Result<()> {
    let name = &options.filename;
    match (options.device, facts.kind) {
        (true, FileKind::Regular) => Err(BlockError::invalid(format!(
            "'host_device' driver requires '{name}' to be either a character or block device"
        ))),
        (false, FileKind::BlockDevice | FileKind::CharDevice) => {
            Err(BlockError::invalid(format!("'file' driver requires '{name}' to be a regular file"))
                .with_hint("use the driver host_device"))
        }
        _ => Ok(()),
    }
}

impl Node for FileNode {
    fn driver(&self) -> &'static str {
        self.driver
    }
    fn len(&self) -> u64 {
        self.len.get()
    }
    fn limits(&self) -> Limits {
        let align = if self.mode.get().direct { self.facts.alignment.max(1) } else { 1 };
        Limits {
            request_alignment: align,
            memory_alignment: align,
            efficient_zero: true,
            ..Limits::default()
        }
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        Vec::new()
    }
    fn wants(&self, _: &Edge, _: Demand, _: bool) -> Demand {
        Demand::NOTHING
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        let file = self.file();
        Box::pin(async move { file.read(at).await })
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        let file = self.file();
        Box::pin(async move {
            landed(&file).await?;
            file.write(at.start, data).await?;
            if at.end() > self.len.get() {
                // Only the padding of a direct write to the last, cut block ends there; its block is locked above.
                file.set_len(self.len.get()).await?;
            }
            if flags.fua { self.barrier().await } else { Ok(()) }
        })
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            landed(&self.file()).await?;
            self.zero_now(at, flags).await?;
            if flags.fua { self.barrier().await } else { Ok(()) }
        })
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(async move {
            landed(&self.file()).await?;
            let done = self.file().discard(at).await;
            self.count_discard(at, &done);
            match done {
                // A hint that the file system does not take is no error.
                Err(e) if e.kind() == ErrorKind::Unsupported => Ok(()),
                other => other,
            }
        })
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        let file = self.file();
        Box::pin(async move {
            let mut found = file.extents(at).await?;
            for e in &mut found {
                e.host = Some(e.span.start);
            }
            Ok(found)
        })
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(self.barrier())
    }
    fn resize(&self, len: u64, prealloc: Prealloc) -> Io<'_> {
        Box::pin(async move {
            landed(&self.file()).await?;
            self.resize_now(len, prealloc).await
        })
    }
    fn acquire(&self, above: Demand) -> Io<'_> {
        Box::pin(async move {
            match &self.locks {
                Some(locks) => {
                    locks.acquire(&self.env, &*self.file(), above, &self.path.display().to_string()).await
                }
                None => Ok(()),
            }
        })
    }
    fn release(&self, above: Demand) -> Io<'_> {
        Box::pin(async move {
            match &self.locks {
                Some(locks) => locks.release(&*self.file(), above).await,
                None => Ok(()),
            }
        })
    }
    fn set_writable(&self, writable: bool) -> Io<'_> {
        Box::pin(self.reopen(writable))
    }
    fn set_active(&self, on: bool) -> Io<'_> {
        let file = self.file();
        Box::pin(async move {
            if !on {
                return file.settle().await;
            }
            // somebody else may have changed it
            self.len.set(file.info().await?.len);
            Ok(())
        })
    }
    fn close(&self) -> Io<'_> {
        let file = self.file();
        Box::pin(async move { file.settle().await })
    }
    fn host_file(&self) -> Io<'_, Option<env::FileInfo>> {
        let file = self.file();
        Box::pin(async move { Ok(Some(file.info().await?)) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        let file = self.file();
        Box::pin(async move {
            let facts = file.info().await?;
            Ok(NodeDetails {
                filename: self.path.display().to_string(),
                actual_size: Some(facts.allocated),
                ..NodeDetails::default()
            })
        })
    }
    fn copy_to<'a>(&'a self, at: Span, to: &'a NodeCell, to_offset: u64) -> Io<'a, u64> {
        Box::pin(async move {
            to.write_from(to_offset, HostBytes { file: self.file(), at }).await?;
            Ok(at.len)
        })
    }
    fn write_from(&self, offset: u64, from: HostBytes) -> Io<'_> {
        let file = self.file();
        Box::pin(async move {
            landed(&file).await?;
            let mut done = 0;
            while done < from.at.len {
                let rest = from.slice(done, from.at.len - done);
                match rest.file.copy_to(rest.at, &file, offset + done).await? {
                    // its end: zeroes, which a reader gets there, are not there to be copied
                    0 => return Err(BlockError::from_errno(BlockError::EIO)),
                    n => done += n,
                }
            }
            Ok(())
        })
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Makes an empty file of `len` bytes (QMP `blockdev-create`, driver `file`). An existing file is truncated, unless somebody
/// uses it.
pub async fn create(env: &Env, filename: &str, len: u64, prealloc: Prealloc) -> Result<()> {
    let path = Path::new(filename);
    let named = |e: BlockError| e.context(format_args!("Could not create '{filename}'"));
    // Opened without truncation first: the lock tells whether that would destroy a disk in use.
    let mode = OpenMode { write: true, ..OpenMode::default() };
    if let Err(e) = env.open(path, mode).await {
        if e.errno() != BlockError::ENOENT {
            return Err(named(e));
        }
        env.open(path, OpenMode { existing: Existing::CreateNew, ..mode }).await.map_err(named)?;
    }
    let options = FileOptions { filename: filename.to_owned(), ..FileOptions::default() };
    let (node, _) = FileNode::open(env, &options).await?;
    let alone = Demand {
        needs: graph::Perms::WRITE.with(graph::Perms::RESIZE),
        shares: graph::Perms::ALL.without(graph::Perms::WRITE).without(graph::Perms::RESIZE),
    };
    node.acquire(alone).await?;
    node.resize_now(0, Prealloc::Off).await.map_err(named)?;
    let made = node.resize_now(len, prealloc).await.map_err(|e| named(e.context("Could not resize file")));
    node.release(Demand::NOTHING).await?;
    made
}
