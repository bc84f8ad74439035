//! A secondary's disk as of a checkpoint, to try a failover without one: readable and writable, while replication goes on.
//!
//! What is written goes to a scratch file beside the store, which has no name any more once it is open: a crash leaves nothing of it. What
//! must stay true: nothing that is written here reaches the store or the disks; a read gives the checkpoint with what was written here
//! over it, or an error (the checkpoint had to be given up, the test has ended), and never anything newer.

use crate::store::Hold;
use crate::store::map::{Place, RangeMap, resolve};
use crate::types::{Epoch, GroupId};
use block::{BlockError, Data, ErrorKind, Extent, Io, Kind, Limits, ReqFlags, Result, Span};
use env::{Env, Existing, File, OpenMode};
use graph::{Demand, Edge, Node, NodeDetails};
use std::any::Any;
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

/// Ranges that may be written apart from one another: about 100 bytes of memory each.
const MAX_RANGES: usize = 1_000_000;

struct Open {
    hold: Rc<Hold>,
    scratch: Rc<dyn File>,
    /// What was written here; in the scratch file it lies where it lies on the disk.
    written: RefCell<RangeMap>,
}

/// See above.
pub struct CloneNode {
    group: GroupId,
    volume: u16,
    len: u64,
    epoch: Epoch,
    open: RefCell<Option<Rc<Open>>>,
}

impl CloneNode {
    /// Volume number `volume` of what is held. The scratch file is made at `scratch`, and unlinked.
    ///
    /// # Errors
    /// Of the scratch file.
    pub async fn make(env: &Env, hold: Rc<Hold>, volume: u16, scratch: &Path) -> Result<Rc<CloneNode>> {
        let len = hold.lens().get(usize::from(volume)).copied().unwrap_or(0);
        let mode = OpenMode { write: true, existing: Existing::CreateTruncate, ..OpenMode::default() };
        let file = env.open(scratch, mode).await.map_err(|e| e.context(scratch.display()))?;
        env.remove(scratch).await.map_err(|e| e.context(scratch.display()))?;
        file.set_len(len).await.map_err(|e| e.context(scratch.display()))?;
        let (epoch, group) = (hold.epoch(), hold.group());
        let open = Open { hold, scratch: file, written: RefCell::default() };
        Ok(Rc::new(CloneNode { group, volume, len, epoch, open: RefCell::new(Some(Rc::new(open))) }))
    }

    /// Of which group.
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// The checkpoint, while the test goes on.
    pub fn epoch(&self) -> Option<Epoch> {
        self.open.borrow().is_some().then_some(self.epoch)
    }

    /// The test is over: what was written is gone, the checkpoint is not held any more, requests fail from now on.
    pub fn end(&self) {
        self.open.take();
    }

    fn open(&self) -> Result<Rc<Open>> {
        let ended = || BlockError::new(ErrorKind::Io, "the test of the failover has ended");
        self.open.borrow().clone().ok_or_else(ended)
    }

    /// `at` was written, or is zero.
    fn note(open: &Open, at: Span, place: Place) -> Result<()> {
        let mut written = open.written.borrow_mut();
        if written.len() >= MAX_RANGES {
            return Err(BlockError::new(ErrorKind::NoSpace, "too many places are written in this clone"));
        }
        written.insert(at, place);
        Ok(())
    }
}

impl Node for CloneNode {
    fn driver(&self) -> &'static str {
        "replicated-clone"
    }
    fn len(&self) -> u64 {
        self.len
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        Vec::new()
    }
    fn wants(&self, _: &Edge, _: Demand, _: bool) -> Demand {
        Demand::NOTHING
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move {
            let open = self.open()?;
            let pieces = resolve([&*open.written.borrow()].into_iter(), at);
            let mut data = Data::empty();
            for (span, place) in pieces {
                data.append(match place {
                    Place::Log(from) => open.scratch.read(Span::new(from, span.len)).await?,
                    Place::Zero => Data::zeroes(usize::try_from(span.len).unwrap_or(usize::MAX)),
                    Place::Disk => open.hold.read(self.volume, span).await?,
                });
            }
            Ok(data)
        })
    }
    fn write(&self, at: Span, data: Data, _: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            let open = self.open()?;
            open.scratch.write(at.start, data).await?;
            CloneNode::note(&open, at, Place::Log(at.start))
        })
    }
    fn zero(&self, at: Span, _: ReqFlags) -> Io<'_> {
        Box::pin(async move { CloneNode::note(&*self.open()?, at, Place::Zero) })
    }
    /// What is discarded reads as before.
    fn discard(&self, _: Span) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move { Ok(vec![Extent::new(at, Kind::Data)]) })
    }
    /// Nothing of this is to survive.
    fn flush(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn set_writable(&self, _: bool) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> Io<'_> {
        self.end();
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async { Ok(NodeDetails::default()) })
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}
