//! `copy-before-write`: keeps what a disk contained at one instant while clients go on writing to it.
//!
//! The node decides nothing about what is copied: a [`Keeper`] does (from the crate `copy`; this layer does not know it).
//! What must stay true: a change reaches the disk only while the keeper says that the old bytes are kept, and inside the
//! keeper's gate, so that whoever closes that gate knows that no change is on its way.

use super::{filter_basics, filter_passes};
use block::{BlockError, Data, Extent, Io, Prealloc, ReqFlags, Result, Span};
use graph::gate::{Gate, Pass};
use graph::{CopyRecord, Demand, Edge, Node, NodeDetails, Perms};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Keeps what a disk contained at one instant: changes wait for [`Keeper::save`], readers of the instant read through it.
pub trait Keeper {
    /// Requests that change the disk are inside while they run.
    fn gate(&self) -> &Gate;
    /// Whether the old bytes of `at` need not be copied any more: they are on the target, or nobody wants them.
    fn is_kept(&self, at: Span) -> bool;
    /// Copies the old bytes of `at` that are not kept yet. An error is the answer to the client's request.
    fn save(&self, at: Span) -> Io<'_>;
    /// Reads what the disk contained at the instant.
    fn read(&self, at: Span) -> Io<'_, Data>;
    /// What the disk contained at the instant, from the start of `at`, perhaps not to its end.
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>>;
    /// Nobody will read `at` any more: it need not be kept, and its space is given back.
    fn release(&self, at: Span) -> Io<'_>;
    /// For queries.
    fn records(&self) -> Vec<CopyRecord>;
}

/// The filter.
pub struct CopyBeforeWrite {
    file: Rc<Edge>,
    target: Rc<Edge>,
    keeper: RefCell<Option<Rc<dyn Keeper>>>,
    /// Whether nobody else may write to the disk even while nobody uses this filter.
    pinned: Cell<bool>,
    /// Whether what has been copied is discarded in the disk, which is then written to.
    discards: Cell<bool>,
    /// Why nothing passes any more, if so.
    fence: RefCell<Option<BlockError>>,
}

impl CopyBeforeWrite {
    /// A filter above the child of `file` (role `Filtered`), which has old bytes copied to the child of `target`. Without a
    /// keeper everything passes.
    pub fn new(file: Rc<Edge>, target: Rc<Edge>) -> Rc<CopyBeforeWrite> {
        let (keeper, pinned, discards) = (RefCell::new(None), Cell::new(false), Cell::new(false));
        let fence = RefCell::new(None);
        Rc::new(CopyBeforeWrite { file, target, keeper, pinned, discards, fence })
    }

    /// Lets `keeper` see the changes that come from now on; `None` lets them pass.
    pub fn set_keeper(&self, keeper: Option<Rc<dyn Keeper>>) {
        let old = self.keeper.replace(keeper);
        drop(old);
    }

    /// Keeps other writers away from the disk whether or not somebody uses this filter. Takes effect with the next change
    /// of the graph.
    pub fn pin(&self, on: bool) {
        self.pinned.set(on);
    }

    /// What has been copied will be discarded in the disk. Takes effect with the next change of the graph.
    pub fn discard_source(&self, on: bool) {
        self.discards.set(on);
    }

    /// From now on every request fails with `why`: those who come this way have lost the disk to another owner. The filter asks
    /// nothing of the disk any more from the next change of the graph on.
    pub fn fence(&self, why: BlockError) {
        self.fence.borrow_mut().get_or_insert(why);
    }

    fn check_fence(&self) -> Result<()> {
        self.fence.borrow().clone().map_or(Ok(()), Err)
    }

    /// The edge to the disk.
    pub fn file(&self) -> &Rc<Edge> {
        &self.file
    }

    /// The edge to where old bytes go.
    pub fn target(&self) -> &Rc<Edge> {
        &self.target
    }

    /// Who keeps the instant.
    pub fn keeper(&self) -> Option<Rc<dyn Keeper>> {
        self.keeper.borrow().clone()
    }
}

/// Lets a change of `at` begin: its old bytes are kept. It has ended when the pass is dropped.
async fn begin<'a>(of: &CopyBeforeWrite, keeper: &'a dyn Keeper, at: Span) -> Result<Pass<'a>> {
    loop {
        let pass = keeper.gate().enter().await;
        of.check_fence()?;
        if keeper.is_kept(at) {
            return Ok(pass);
        }
        // not while inside: whoever empties the record must not wait for a copy that waits for space
        drop(pass);
        keeper.save(at).await?;
    }
}

impl Node for CopyBeforeWrite {
    filter_basics!(file, [file, target], file);
    filter_passes!(file: limits, extents);

    fn driver(&self) -> &'static str {
        "copy-before-write"
    }
    fn wants(&self, edge: &Edge, above: Demand, _: bool) -> Demand {
        let others = Perms::CONSISTENT_READ.with(Perms::WRITE_UNCHANGED);
        if self.fence.borrow().is_some() {
            return Demand::NOTHING;
        }
        if edge.id() == self.target.id() {
            return Demand { needs: Perms::WRITE, shares: others.with(Perms::WRITE) };
        }
        if above == Demand::NOTHING && !self.pinned.get() {
            return above;
        }
        // what others write would not be kept
        let own = if self.discards.get() {
            Perms::CONSISTENT_READ.with(Perms::WRITE)
        } else {
            Perms::CONSISTENT_READ
        };
        Demand { needs: above.needs.with(own), shares: above.shares.common(others) }
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move {
            self.check_fence()?;
            self.file.read(at).await
        })
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        match self.keeper().filter(|_| !flags.unchanged) {
            None => Box::pin(async move {
                self.check_fence()?;
                self.file.write(at.start, data, flags).await
            }),
            Some(keeper) => Box::pin(async move {
                let _pass = begin(self, &*keeper, at).await?;
                self.file.write(at.start, data, flags).await
            }),
        }
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        match self.keeper().filter(|_| !flags.unchanged) {
            None => Box::pin(async move {
                self.check_fence()?;
                self.file.zero(at, flags).await
            }),
            Some(keeper) => Box::pin(async move {
                let _pass = begin(self, &*keeper, at).await?;
                self.file.zero(at, flags).await
            }),
        }
    }
    fn discard(&self, at: Span) -> Io<'_> {
        // where the disk ignores it nothing changes
        match self.keeper().filter(|_| self.file.child().options().discard) {
            None => Box::pin(async move {
                self.check_fence()?;
                self.file.discard(at).await
            }),
            Some(keeper) => Box::pin(async move {
                let _pass = begin(self, &*keeper, at).await?;
                self.file.discard(at).await
            }),
        }
    }
    fn flush(&self) -> Io<'_> {
        if let Err(e) = self.check_fence() {
            return Box::pin(async { Err(e) });
        }
        Box::pin(self.file.flush())
    }
    fn resize(&self, _: u64, _: Prealloc) -> Io<'_> {
        Box::pin(async {
            let why = "a disk cannot be resized while what it contained is kept by copy-before-write";
            Err(BlockError::new(block::ErrorKind::Busy, why))
        })
    }
    fn close(&self) -> Io<'_> {
        self.set_keeper(None);
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move {
            let details = self.file.child().node().details().await?;
            let records = self.keeper().map(|k| k.records()).unwrap_or_default();
            Ok(NodeDetails { records, specific: Vec::new(), ..details })
        })
    }
}
