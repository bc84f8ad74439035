//! What commit and stream share: finding the parts of a chain, opening an image for writing and closing it again, and saying in
//! image headers what an image's backing file is.
//!
//! What must stay true: headers and graph agree at every moment that a crash could choose, or differ only in names of
//! images with the same content; what was turned read-write for a job is read-only again afterwards, whatever happened.

use crate::JobError;
use block::{BlockError, ErrorKind, Extent, Io, Kind, Prealloc, Result, Span};
use copy::{Fate, Next, OnWrite, Policy, Standing};
use env::bugs::planted;
use graph::{Blocker, Demand, Edge, Graph, NodeCell, Perms, Plan, Role, Step, walk};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Bytes of one request of commit and stream under a rate limit (as QSD).
pub(crate) const CHUNK: u64 = 512 << 10;
/// Bytes in flight of commit and stream, where the user says nothing.
pub(crate) const DEFAULT_BUFFER: u64 = 16 << 20;
/// Finest and coarsest unit of work: what is allocated in smaller pieces is looked at when it is copied.
const GRANULARITY: (u64, u64) = (4096, 1 << 20);

/// What an image that is committed lets others do: nobody may rely on it, since the base is inconsistent.
pub(crate) const COMMITTED: Demand =
    Demand { needs: Perms::NONE, shares: Perms::WRITE.with(Perms::WRITE_UNCHANGED) };

/// The node `name` (`device` of most commands).
pub(crate) fn find_device(graph: &Graph, name: &str) -> Result<Rc<NodeCell>> {
    graph.find(name).ok_or_else(|| {
        let message = format!("Cannot find device='{name}' nor node-name='{name}'");
        BlockError::new(ErrorKind::NotFound, message)
    })
}

/// A disk that nobody but users is above.
///
/// # Errors
/// `Need a root block node` of a node inside a chain.
pub(crate) fn check_root(cell: &Rc<NodeCell>) -> Result<()> {
    if walk::is_root(cell) { Ok(()) } else { Err(BlockError::invalid("Need a root block node")) }
}

/// The node `name`, where only node names are meant.
pub(crate) fn find_node(graph: &Graph, name: &str) -> Result<Rc<NodeCell>> {
    graph.find(name).ok_or_else(|| {
        let message = format!("Cannot find device='' nor node-name='{name}'");
        BlockError::new(ErrorKind::NotFound, message)
    })
}

/// The image in the chain below `top` whose file has this name, literally or relative to the image above it.
pub(crate) async fn find_file(top: &Rc<NodeCell>, file: &str, with_top: bool) -> Result<Rc<NodeCell>> {
    let wanted = std::path::Path::new(file);
    let mut above: Option<String> = None;
    for cell in walk::chain(top) {
        if cell.node().filtered().is_some() {
            continue;
        }
        let name = cell.node().details().await?.filename;
        let beside =
            above.as_deref().and_then(|a| std::path::Path::new(a).parent()).map(|dir| dir.join(wanted));
        let found = name == file || beside.is_some_and(|b| b == std::path::Path::new(&name));
        if found && (with_top || cell.id() != top.id()) {
            return Ok(cell);
        }
        above = Some(name);
    }
    Err(BlockError::new(ErrorKind::NotFound, format!("Can't find '{file}' in the backing chain")))
}

/// The nodes from `top` down to, not including, `base` (or to the end).
pub(crate) fn above(top: &Rc<NodeCell>, base: Option<&Rc<NodeCell>>) -> Vec<Rc<NodeCell>> {
    let mut nodes = walk::chain(top);
    if let Some(at) = base.and_then(|b| nodes.iter().position(|n| n.id() == b.id())) {
        nodes.truncate(at);
    }
    nodes
}

/// The unit of work for data of these layers.
pub(crate) fn granularity(layers: &[Rc<NodeCell>]) -> u64 {
    let finest = layers.iter().map(|n| n.node().limits().cluster_size).filter(|c| *c > 0).min();
    finest.unwrap_or(64 << 10).clamp(GRANULARITY.0, GRANULARITY.1).next_power_of_two()
}

/// Blocks all of `nodes`.
pub(crate) fn block_all<'a>(nodes: impl IntoIterator<Item = &'a Rc<NodeCell>>, reason: &str) -> Vec<Blocker> {
    nodes.into_iter().map(|n| n.block(reason)).collect()
}

/// What has to turn read-write for `cell` to take writes. A job may turn the image itself; what stores it only if whoever opened
/// it said so (`auto-read-only`) or said nothing.
pub(crate) fn closed_to_writing(cell: &Rc<NodeCell>) -> Result<Vec<Rc<NodeCell>>> {
    if cell.is_writable() {
        return Ok(Vec::new());
    }
    let mut closed = Vec::new();
    for edge in cell.node().edges() {
        let child = edge.child();
        if edge.role() == Role::Backing || child.is_writable() {
            continue;
        }
        let options = child.options();
        if !options.auto_read_only && !options.follows {
            return Err(BlockError::new(ErrorKind::ReadOnly, "Block node is read-only"));
        }
        closed.extend(closed_to_writing(&child)?);
    }
    closed.push(cell.clone());
    Ok(closed)
}

/// `plan` with a step for each of `nodes`.
pub(crate) fn turning(mut plan: Plan, nodes: &[Rc<NodeCell>], on: bool) -> Plan {
    plan.steps.extend(nodes.iter().map(|n| Step::Writable { node: n.clone(), on }));
    plan
}

/// Whether a job's change of the graph has been made: set at the very instant of it, as a step of its plan.
#[derive(Clone, Default)]
pub(crate) struct Made(Rc<Cell<bool>>);

impl Made {
    /// The step to put into the plan.
    pub(crate) fn step(&self) -> Step {
        let (set, back) = (self.0.clone(), self.0.clone());
        Step::At { what: Rc::new(move || set.set(true)), undo: Some(Rc::new(move || back.set(false))) }
    }

    pub(crate) fn is_so(&self) -> bool {
        self.0.get()
    }
}

/// Nodes that are turned read-write for a job. As long as they are, records have them as they were: a later life opens them so.
#[derive(Default)]
pub(crate) struct Turned(RefCell<Vec<Rc<NodeCell>>>);

impl Turned {
    /// Takes note of nodes that are about to be turned, whether that succeeds or not.
    pub(crate) fn note(&self, nodes: Vec<Rc<NodeCell>>) {
        nodes.iter().for_each(|n| n.lend(true));
        self.0.borrow_mut().extend(nodes);
    }

    /// Turns `nodes`. On an error none of those noted is turned any more.
    pub(crate) async fn turn(&self, graph: &Graph, nodes: Vec<Rc<NodeCell>>) -> Result<()> {
        if nodes.is_empty() {
            return Ok(());
        }
        let plan = turning(Plan::new(), &nodes, true);
        self.note(nodes);
        let done = graph.apply(plan).await;
        if done.is_err() {
            self.back(graph).await;
        }
        done
    }

    /// The step from which on they stay as they are.
    pub(crate) fn staying(&self) -> Step {
        let (nodes, back) = (self.0.borrow().clone(), self.0.borrow().clone());
        Step::At {
            what: Rc::new(move || nodes.iter().for_each(|n| n.lend(false))),
            undo: Some(Rc::new(move || back.iter().for_each(|n| n.lend(true)))),
        }
    }

    /// Back to read-only. Where that fails (the last changes cannot be written back, say) the node stays open for writing; there
    /// is nobody to tell, and nothing is lost by it.
    pub(crate) async fn back(&self, graph: &Graph) {
        // One after the other: an image writes to its file when it turns, so the file cannot be closed to it meanwhile.
        let nodes = self.0.take();
        for node in nodes.iter().rev() {
            let _ = graph.apply(turning(Plan::new(), std::slice::from_ref(node), false)).await;
        }
        // not one by one: who records meanwhile would have an image open for writing over a file that is not
        nodes.iter().for_each(|n| n.lend(false));
    }
}

/// What an image header says of the backing file: name and format.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct BackingName {
    pub(crate) name: Option<String>,
    pub(crate) format: Option<String>,
}

impl BackingName {
    /// No backing file.
    pub(crate) const NONE: BackingName = BackingName { name: None, format: None };

    /// What an overlay of `base` says. `file` is what the user wants it to say instead of the name; with `mask_protocol` a
    /// protocol node counts as `raw`.
    pub(crate) async fn of(
        base: &Rc<NodeCell>,
        file: Option<&str>,
        mask_protocol: bool,
    ) -> Result<BackingName> {
        let node = base.node();
        let protocol = node.primary().is_none();
        let format = if protocol && mask_protocol { "raw" } else { node.driver() };
        let name = match file {
            Some(f) => f.to_owned(),
            None => drivers::names::exact(base).await?,
        };
        Ok(BackingName { name: Some(name), format: Some(format.to_owned()) })
    }

    /// What the header of `cell` says now.
    async fn in_header(cell: &Rc<NodeCell>) -> Result<BackingName> {
        let details = cell.node().details().await?;
        Ok(BackingName { name: details.backing_filename, format: details.backing_format })
    }
}

/// Image headers that are being rewritten. What was rewritten can be put back until it is dropped.
pub(crate) struct Headers {
    graph: Rc<Graph>,
    done: Vec<(Rc<NodeCell>, BackingName)>,
}

impl Headers {
    pub(crate) fn new(graph: &Rc<Graph>) -> Headers {
        Headers { graph: graph.clone(), done: Vec::new() }
    }

    /// Lets the header of `image` say `new`, durably. After an error it says what it said, unless the image takes no writes
    /// at all any more; what both names stand for has the same content as long as the job is not over.
    pub(crate) async fn write(&mut self, image: &Rc<NodeCell>, new: &BackingName) -> Result<()> {
        let old = BackingName::in_header(image).await?;
        self.done.push((image.clone(), old));
        let written = put(&self.graph, image, new).await;
        if written.is_err() {
            self.put_back().await;
        }
        written
    }

    /// All headers say what they said before.
    pub(crate) async fn put_back(&mut self) {
        while let Some((image, old)) = self.done.pop() {
            // an image that takes no writes keeps the old name or the new one; see `write`
            let _ = put(&self.graph, &image, &old).await;
        }
    }
}

/// Rewrites one header, turning the image read-write for as long as that takes.
pub(crate) async fn put(graph: &Graph, image: &Rc<NodeCell>, to: &BackingName) -> Result<()> {
    let turned = Turned::default();
    turned.turn(graph, closed_to_writing(image)?).await?;
    let written = image.node().write_backing_name(to.name.as_deref(), to.format.as_deref()).await;
    turned.back(graph).await;
    written
}

/// `change-backing-file`: lets the header of the image `image`, in the chain of the disk `device`, say that its backing file is
/// `file` (nothing if that is empty). The format it says stays; so does the graph.
pub async fn change_backing_file(graph: &Graph, device: &str, image: &str, file: &str) -> Result<()> {
    let top = find_device(graph, device)?;
    check_root(&top)?;
    let image = find_node(graph, image)?;
    if walk::skip_filters(&image).node().backing().is_none() {
        return Err(BlockError::invalid(
            "not allowing backing file change on an image without a backing file",
        ));
    }
    image.check_not_blocked()?;
    if !walk::contains(&top, &image) {
        let message = format!("'{}' and image file are not in the same chain", top.name());
        return Err(BlockError::invalid(message));
    }
    let _blocked = image.block("its backing file's name is being changed");
    let old = BackingName::in_header(&image).await?;
    let name = Some(file).filter(|f| !f.is_empty()).map(str::to_owned);
    let new = if name.is_some() { BackingName { name, ..old.clone() } } else { BackingName::NONE };
    let put_new = put(graph, &image, &new).await;
    if let Err(e) = put_new {
        // whichever of the two it says now, it shall be the old one
        let _ = put(graph, &image, &old).await;
        return Err(e.context(format_args!("Could not change backing file to '{file}'")));
    }
    Ok(())
}

/// The images whose backing file `node` is, as far as they see it through filters: those whose headers name it.
pub(crate) fn overlays(graph: &Graph, node: &Rc<NodeCell>) -> Vec<Rc<NodeCell>> {
    let (mut found, mut todo): (Vec<Rc<NodeCell>>, _) = (Vec::new(), vec![node.clone()]);
    while let Some(cell) = todo.pop() {
        for edge in cell.parents() {
            let Some(parent) = edge.parent_node().and_then(|name| graph.find(&name)) else { continue };
            match edge.role() {
                Role::Backing if !found.iter().any(|f| f.id() == parent.id()) => found.push(parent),
                Role::Filtered => todo.push(parent),
                _ => {}
            }
        }
    }
    found
}

/// A commit that begins anew after a restart may have named `base` in the headers of the images over `source`, and come no further: they name
/// `source` again, since what is written from now on is there alone.
pub(crate) async fn name_again(graph: &Graph, source: &Rc<NodeCell>, base: &Rc<NodeCell>) -> Result<()> {
    let (now, then) = (BackingName::of(source, None, false).await?, drivers::names::exact(base).await?);
    for overlay in overlays(graph, source) {
        let details = overlay.node().details().await?;
        let said = details.backing_filename.map(|name| drivers::names::full_name(&details.filename, &name));
        if said.is_some_and(|name| name == then) {
            put(graph, &overlay, &now).await?;
        }
    }
    Ok(())
}

/// What the base, of which `target` is the job's user, holds behind the end of the top image, as far as the images over `filter` reach:
/// they see zeroes there, and must go on to.
pub(crate) fn hidden_tail(graph: &Graph, top: &Rc<NodeCell>, filter: &Rc<NodeCell>, target: &Edge) -> Span {
    let reach = overlays(graph, filter).iter().map(|o| o.node().len()).max().unwrap_or(0);
    let end = top.node().len();
    Span::between(end, target.len().min(reach).max(end))
}

/// Fails if somebody blocks one of `nodes`.
pub(crate) fn check_free(nodes: &[Rc<NodeCell>]) -> Result<(), JobError> {
    for node in nodes {
        node.check_not_blocked()?;
    }
    Ok(())
}

/// What the layers of `source` above `base` hold of `at`, all of it.
pub(crate) async fn held_above(source: &Edge, at: Span, base: &Rc<NodeCell>) -> Result<Vec<Extent>> {
    held(source, at, Some(base), 0).await
}

/// The same without the `skipped` topmost layers: what those have, and what nobody has, is `Unallocated`.
async fn held(source: &Edge, at: Span, base: Option<&Rc<NodeCell>>, skipped: u32) -> Result<Vec<Extent>> {
    let mut list = Vec::new();
    let mut left = at;
    while !left.is_empty() {
        let some = source.status_above(left, base).await?;
        let end = some.last().map_or(left.start, |e| e.span.end());
        if end <= left.start {
            return Err(BlockError::invalid(format!("no block status of {left}")));
        }
        for e in some {
            let kind = if e.depth > skipped { e.kind } else { Kind::Unallocated };
            Extent::push_merged(&mut list, Extent::new(e.span, kind));
        }
        left = Span::between(end, left.end());
    }
    Ok(list)
}

/// Makes the base as long as what goes into it; `target` is the job's user of it. It stays as long as it is if it is longer.
pub(crate) async fn grow(graph: &Graph, base: &Rc<NodeCell>, target: &Rc<Edge>, len: u64) -> Result<()> {
    if target.len() >= len {
        return Ok(());
    }
    let asked = target.demand();
    graph.ask(target, Demand { needs: asked.needs.with(Perms::RESIZE), ..asked }).await?;
    let grown = {
        let _quiet = graph.quiesce(base, std::slice::from_ref(target)).await;
        target.resize(len, Prealloc::Off).await
    };
    graph.ask(target, asked).await?;
    grown
}

/// Copies what layers of a chain hold between two of its nodes.
pub(crate) struct ChainPolicy {
    /// What lies below the layers that are copied.
    pub(crate) base: Option<Rc<NodeCell>>,
    /// Up into the top layer, under its users' requests (a stream), instead of down into the base.
    pub(crate) up: bool,
    /// The first error of what was left out.
    pub(crate) left_out: RefCell<Option<BlockError>>,
    /// The job is over.
    pub(crate) over: Cell<bool>,
    /// All is copied, and is compared.
    pub(crate) proving: Cell<bool>,
}

impl ChainPolicy {
    pub(crate) fn new(base: Option<Rc<NodeCell>>, up: bool) -> Rc<ChainPolicy> {
        Rc::new(ChainPolicy {
            base,
            up,
            left_out: RefCell::new(None),
            over: Cell::new(false),
            proving: Cell::new(false),
        })
    }
}

impl Policy for ChainPolicy {
    fn guest_write(&self, _: Span) -> OnWrite {
        let unguarded = self.up && planted("stream: users write where it copies");
        if self.over.get() || unguarded { OnWrite::Pass } else { OnWrite::Exclude }
    }

    fn look<'a>(&'a self, source: &'a Edge, at: Span) -> Option<Io<'a, Vec<Extent>>> {
        Some(Box::pin(held(source, at, self.base.as_ref(), u32::from(self.up))))
    }

    fn fate(&self, extent: &Extent) -> Fate {
        match extent.kind {
            Kind::Data => Fate::Copy,
            // without a base, what nobody allocated reads as zero in the end
            Kind::Zero if self.base.is_none() => Fate::Skip,
            Kind::Zero => Fate::Zero,
            Kind::Unallocated => Fate::Skip,
        }
    }

    fn unchanged(&self) -> bool {
        self.up
    }

    fn leaves_out(&self, _: Span, error: &BlockError) -> bool {
        if self.up {
            self.left_out.borrow_mut().get_or_insert_with(|| error.clone());
        }
        self.up
    }

    fn compares(&self) -> bool {
        self.proving.get()
    }

    fn pass_over(&self, standing: Standing) -> Next {
        if standing.clean && (standing.proven || !self.proving.get()) { Next::Done } else { Next::Again }
    }
}
