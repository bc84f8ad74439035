//! New options and other children for nodes that are there (`blockdev-reopen`).
//!
//! What can happen: any of several nodes refuses, its new child is missing, or the image cannot turn. What must stay true: the
//! whole list takes effect at one instant, or nothing of it does. A description is complete: what it leaves out is as it would be
//! had the node just been opened so.

use crate::{
    Backing, Child, Common, DriverSpec, FileSpec, FilterSpec, Inherited, NodeSpec, Opener, Qcow2Spec,
    zeroes_may_unmap,
};
use block::{BlockError, ErrorKind, Result};
use drivers::filters::preallocate::{Preallocate, PreallocateOptions};
use drivers::filters::throttle::Throttle;
use drivers::raw::{RawNode, check_window};
use graph::{Demand, Edge, NodeCell, NodeOptions, Parent, Plan, Role, Step};
use qcow2::Qcow2;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;

/// How a node was described when it was opened, or last changed.
#[derive(Clone)]
pub(crate) struct Given {
    pub(crate) spec: NodeSpec,
    pub(crate) from: Inherited,
    /// Where it is on the host, whatever the working directory; none for nodes that are not.
    pub(crate) place: Option<String>,
}

/// What a node gives those below it that were described inside it.
#[derive(Clone, Copy)]
struct Above<'a> {
    gives: Inherited,
    /// Its new description.
    said: &'a Common,
}

impl Above<'_> {
    /// What reaches a child that is only named: what the description does not say stays with the child as it is.
    fn onto(self, child: &NodeCell) -> Inherited {
        let (is, said) = (child.options(), self.said);
        let mut gives = self.gives;
        if said.read_only.is_none() {
            gives.read_only = is.read_only;
        }
        if said.auto_read_only.is_none() {
            gives.auto_read_only = is.auto_read_only;
        }
        if said.no_flush.is_none() {
            gives.no_flush = is.cache_no_flush;
        }
        gives
    }
}

/// What is to become of all nodes of a list.
#[derive(Default)]
struct Change {
    plan: Plan,
    given: Vec<(u64, Given)>,
}

impl Opener {
    /// Remembers how `cell` was opened; forgets nodes that are gone.
    pub(crate) fn remember(&self, cell: &NodeCell, spec: &NodeSpec, from: Inherited) {
        let mut all = self.given.borrow_mut();
        if all.len() > 2 * self.graph.nodes().len() {
            let here: Vec<u64> = self.graph.nodes().iter().map(|c| c.id()).collect();
            all.retain(|id, _| here.contains(id));
        }
        let place = self.place(spec);
        all.insert(cell.id(), Given { spec: spec.clone(), from, place });
    }

    /// Gives nodes, found by their names, what `specs` say, together or not at all.
    ///
    /// # Errors
    /// A node that is not there or has no name; options that cannot change (named); children that are missing or whose use would
    /// make a cycle or break permissions; chains that a job works on.
    pub async fn reopen(&self, specs: &[NodeSpec]) -> Result<()> {
        let mut change = Change::default();
        for spec in specs {
            let Some(name) = &spec.common.node_name else {
                return Err(BlockError::invalid("node-name not specified"));
            };
            let Some(cell) = self.graph.find(name) else {
                let message = format!("Failed to find node with node-name='{name}'");
                return Err(BlockError::new(ErrorKind::NotFound, message));
            };
            let from = self.given(&cell)?.from;
            self.describe(&cell, spec, from, &mut change).await?;
        }
        self.graph.apply(change.plan).await?;
        self.given.borrow_mut().extend(change.given);
        Ok(())
    }

    fn place(&self, spec: &NodeSpec) -> Option<String> {
        let path = match &spec.driver {
            DriverSpec::File(f) | DriverSpec::HostDevice(f) => Path::new(&f.filename),
            DriverSpec::Nbd(nbd) => match &nbd.options.server {
                env::Address::Unix(path) => path.as_path(),
                _ => return None,
            },
            _ => return None,
        };
        Some(self.graph.env().absolute(path).to_string_lossy().into_owned())
    }

    fn given(&self, cell: &NodeCell) -> Result<Given> {
        let given = self.given.borrow().get(&cell.id()).cloned();
        given.ok_or_else(|| {
            BlockError::unsupported(format!("Node '{}' is a job's filter: it has no options", cell.name()))
        })
    }

    fn describe<'a>(
        &'a self,
        cell: &'a Rc<NodeCell>,
        spec: &'a NodeSpec,
        from: Inherited,
        change: &'a mut Change,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<()>> + 'a>> {
        Box::pin(async move {
            let old = self.given(cell)?;
            let mut spec = spec.clone();
            // this one does not fall back to its default
            spec.common.discard = spec.common.discard.or(old.spec.common.discard);
            let spec = &spec;
            let now = from.with(&spec.common);
            zeroes_may_unmap(spec, now)?;
            if let DriverSpec::Qcow2(q) = &spec.driver
                && matches!(q.backing, Backing::Implicit)
                && has_backing(cell).await?
            {
                return Err(BlockError::invalid(format!("backing is missing for '{}'", cell.name())));
            }
            fixed(cell, &old, spec)?;
            let was = old.from.with(&old.spec.common);
            same("cache.direct", was.direct, now.direct)?;
            same("force-share", was.force_share, now.force_share)?;
            self.children(cell, spec, now, change).await?;
            if !cell.is_active() || now.inactive {
                return Err(cannot_reset("active"));
            }
            set(cell, spec, now, &mut change.plan);
            change.given.push((cell.id(), Given { spec: spec.clone(), from, place: self.place(spec) }));
            Ok(())
        })
    }

    async fn children(
        &self,
        cell: &Rc<NodeCell>,
        spec: &NodeSpec,
        now: Inherited,
        change: &mut Change,
    ) -> Result<()> {
        let above = Above { gives: now, said: &spec.common };
        match &spec.driver {
            DriverSpec::Raw { file, offset, size } => {
                self.main_child(cell, file, above, change).await?;
                self.window(cell, file, *offset, *size, &mut change.plan)
            }
            DriverSpec::Filter(filter) => match filter.as_ref() {
                FilterSpec::Throttle { file, group } => {
                    self.other_group(cell, group, &mut change.plan)?;
                    self.main_child(cell, file, above, change).await
                }
                FilterSpec::Preallocate { file, options } => {
                    options.check()?;
                    if let Some(edge) = cell.node().filtered()
                        && self.other_child(cell, &edge, "file", file, above, change).await?.is_some()
                    {
                        // what was set aside in that one would stay there
                        return Err(cannot_change("file"));
                    }
                    set_aside(cell, *options, &mut change.plan);
                    Ok(())
                }
                _ => Ok(()),
            },
            DriverSpec::Qcow2(q) => {
                self.backing(cell, &q.backing, above, change).await?;
                self.main_child(cell, &q.file, above, change).await?;
                self.data_file_stays(cell, q)?;
                format_options(cell, &q.options, &mut change.plan)
            }
            _ => Ok(()),
        }
    }

    /// Shows another part of the file. Users would find other bytes where theirs were, so there must be none.
    fn window(
        &self,
        cell: &Rc<NodeCell>,
        file: &Child,
        offset: u64,
        size: Option<u64>,
        plan: &mut Plan,
    ) -> Result<()> {
        let node = cell.node();
        let (Some(raw), Some(edge)) = (node.as_any().downcast_ref::<RawNode>(), node.primary()) else {
            return Ok(());
        };
        let was = raw.get_window();
        let file = match file {
            Child::Reference(name) => self.find_child(name)?,
            Child::Inline(_) => edge.child(),
        };
        check_window(file.node().len(), offset, size)?;
        if was == (offset, size) {
            return Ok(());
        }
        let in_use = |why: &str| {
            let message = format!("Node '{}' is busy: {why}", cell.name());
            Err(BlockError::new(ErrorKind::Busy, message))
        };
        if !cell.parents().is_empty() {
            return in_use("its offset and size can be changed while nobody uses it");
        }
        if !cell.bitmaps().is_empty() {
            return in_use("it has dirty bitmaps");
        }
        let window = [(offset, size), was];
        change(cell, window, |raw: &RawNode, (offset, size)| raw.set_window(*offset, *size), plan);
        Ok(())
    }

    /// Lets a throttled disk join another group, when the rest of the list takes effect.
    fn other_group(&self, cell: &Rc<NodeCell>, name: &str, plan: &mut Plan) -> Result<()> {
        let group = self.throttle_group(name)?;
        let (cell, name) = (cell.clone(), name.to_owned());
        let join = move || {
            if let Some(throttle) = cell.node().as_any().downcast_ref::<Throttle>() {
                throttle.join(&name, group.clone());
            }
        };
        plan.steps.push(Step::At { what: Rc::new(join), undo: None });
        Ok(())
    }

    /// `file` of a format or filter.
    async fn main_child(
        &self,
        cell: &Rc<NodeCell>,
        file: &Child,
        above: Above<'_>,
        change: &mut Change,
    ) -> Result<()> {
        let Some(edge) = cell.node().primary() else { return Ok(()) };
        let gives = Inherited { discard: true, monitor_owned: false, ..above.gives };
        let above = Above { gives, ..above };
        if let Some(to) = self.other_child(cell, &edge, "file", file, above, change).await? {
            change.plan.steps.push(Step::Point { edge, to });
        }
        Ok(())
    }

    fn data_file_stays(&self, cell: &Rc<NodeCell>, q: &Qcow2Spec) -> Result<()> {
        let edge = cell.node().edges().into_iter().find(|e| e.role() == Role::Data);
        let stays = match (&q.data_file, edge) {
            (None, _) => true,
            (Some(Child::Reference(name)), Some(edge)) => edge.child().name() == name,
            (Some(Child::Inline(spec)), Some(edge)) => match self.given(&edge.child()) {
                Ok(old) => fixed(&edge.child(), &old, spec).is_ok(),
                Err(_) => false,
            },
            (Some(_), None) => false,
        };
        same("data-file", true, stays)
    }

    async fn backing(
        &self,
        cell: &Rc<NodeCell>,
        backing: &Backing,
        above: Above<'_>,
        change: &mut Change,
    ) -> Result<()> {
        let edge = cell.node().backing();
        let to = match (backing, &edge) {
            (Backing::Implicit, _) | (Backing::None, None) => return Ok(()),
            (Backing::None, Some(_)) => None,
            (Backing::Child(child), Some(edge)) => {
                let above = Above { gives: crate::below(&above.gives), ..above };
                match self.other_child(cell, edge, "backing", child, above, change).await? {
                    Some(to) => Some(to),
                    None => return Ok(()),
                }
            }
            (Backing::Child(Child::Reference(name)), None) => {
                let to = self.find_child(name)?;
                no_cycle(cell, &to, "backing")?;
                Some(to)
            }
            (Backing::Child(Child::Inline(_)), None) => return Err(cannot_change("backing")),
        };
        if let Some(edge) = &edge
            && self.given(&edge.child()).is_err()
        {
            let message = format!("Cannot replace implicit backing child of {}", cell.name());
            return Err(BlockError::new(ErrorKind::Busy, message));
        }
        cell.check_not_blocked()?;
        let edge = match to {
            Some(to) => {
                let parent = Parent::Node(RefCell::new(Some(cell.name().to_owned())));
                Some(self.graph.attach(&to, "backing", Role::Backing, parent, Demand::NOTHING).await?)
            }
            None => None,
        };
        change.plan.steps.push(Step::SetBacking { node: cell.clone(), edge });
        Ok(())
    }

    /// The node that `child` means if that is another one than `edge` leads to.
    async fn other_child(
        &self,
        cell: &Rc<NodeCell>,
        edge: &Rc<Edge>,
        key: &str,
        child: &Child,
        above: Above<'_>,
        change: &mut Change,
    ) -> Result<Option<Rc<NodeCell>>> {
        let now = edge.child();
        match child {
            Child::Reference(name) if name == now.name() => {
                if !now.is_monitor_owned()
                    && let Ok(old) = self.given(&now)
                {
                    set(&now, &old.spec, above.onto(&now).with(&old.spec.common), &mut change.plan);
                }
                Ok(None)
            }
            Child::Reference(name) if name == self.behind_jobs(&now).name() => Ok(None),
            Child::Reference(name) => {
                let to = self.find_child(name)?;
                no_cycle(cell, &to, key)?;
                if key != "backing" {
                    cell.check_not_blocked()?;
                }
                Ok(Some(to))
            }
            Child::Inline(spec) => {
                let whose = self.given(&now).ok().filter(|_| !now.is_monitor_owned());
                if whose.is_none_or(|old| driver(&old.spec) != driver(spec)) {
                    return Err(cannot_change(&format!("{key}.driver")));
                }
                if spec.common.node_name.as_deref().is_some_and(|n| n != now.name()) {
                    return Err(cannot_change("node-name"));
                }
                self.describe(&now, spec, above.gives, change).await?;
                Ok(None)
            }
        }
    }

    /// The first node from `cell` on that a user described.
    fn behind_jobs(&self, cell: &Rc<NodeCell>) -> Rc<NodeCell> {
        let mut at = cell.clone();
        while self.given(&at).is_err()
            && let Some(edge) = at.node().filtered()
        {
            at = edge.child();
        }
        at
    }

    fn find_child(&self, name: &str) -> Result<Rc<NodeCell>> {
        self.graph.find(name).ok_or_else(|| {
            let message = format!("Cannot find device='' nor node-name='{name}'");
            BlockError::new(ErrorKind::NotFound, message)
        })
    }
}

/// The steps by which `cell` gets what every driver has.
fn set(cell: &Rc<NodeCell>, spec: &NodeSpec, now: Inherited, plan: &mut Plan) {
    let may_turn = now.auto_read_only && !now.read_only;
    let on = !now.read_only;
    // Where it may turn by itself, it does when somebody wants to write.
    if cell.is_writable() != on && !(on && may_turn) {
        plan.steps.push(Step::Writable { node: cell.clone(), on });
    }
    let options = NodeOptions {
        name: None,
        read_only: now.read_only,
        auto_read_only: now.auto_read_only,
        may_turn,
        follows: spec.common.read_only.is_none() && !cell.is_monitor_owned(),
        detect_zeroes: spec.common.detect_zeroes,
        discard: now.discard,
        monitor_owned: cell.is_monitor_owned(),
        force_share: now.force_share,
        cache_direct: now.direct,
        cache_no_flush: now.no_flush,
        inactive: false,
    };
    plan.steps.push(Step::Options { node: cell.clone(), options });
}

/// Gives a node of driver `N` other settings when the rest of the list takes effect, and those that it has back if that fails.
fn change<N: 'static, S: 'static>(cell: &Rc<NodeCell>, [new, was]: [S; 2], set: fn(&N, &S), plan: &mut Plan) {
    let to = |settings: S| -> Rc<dyn Fn()> {
        let cell = cell.clone();
        Rc::new(move || {
            if let Some(node) = cell.node().as_any().downcast_ref() {
                set(node, &settings);
            }
        })
    };
    plan.steps.push(Step::At { what: to(new), undo: Some(to(was)) });
}

/// Lets a filter set aside another amount.
fn set_aside(cell: &Rc<NodeCell>, new: PreallocateOptions, plan: &mut Plan) {
    let node = cell.node();
    let Some(filter) = node.as_any().downcast_ref::<Preallocate>() else { return };
    change(cell, [new, filter.options()], |f: &Preallocate, o| f.set_options(*o), plan);
}

/// Gives an image other run-time options.
fn format_options(cell: &Rc<NodeCell>, new: &qcow2::Options, plan: &mut Plan) -> Result<()> {
    let node = cell.node();
    let Some(image) = node.as_any().downcast_ref::<Qcow2>() else { return Ok(()) };
    image.check_options(new)?;
    change(cell, [new.clone(), image.options()], Qcow2::set_options, plan);
    Ok(())
}

async fn has_backing(cell: &NodeCell) -> Result<bool> {
    let node = cell.node();
    Ok(node.backing().is_some() || node.details().await?.backing_filename.is_some())
}

pub(crate) fn no_cycle(cell: &Rc<NodeCell>, to: &Rc<NodeCell>, key: &str) -> Result<()> {
    if !reaches(to, cell) {
        return Ok(());
    }
    let (to, cell) = (to.name(), cell.name());
    Err(BlockError::invalid(format!("Making '{to}' a {key} child of '{cell}' would create a cycle")))
}

/// Whether `cell` is `top` or below it, on whatever way.
fn reaches(top: &Rc<NodeCell>, cell: &NodeCell) -> bool {
    let (mut seen, mut todo) = (BTreeSet::new(), vec![top.clone()]);
    while let Some(node) = todo.pop() {
        if node.id() == cell.id() {
            return true;
        }
        if seen.insert(node.id()) {
            todo.extend(node.node().edges().iter().map(|e| e.child()));
        }
    }
    false
}

fn cannot_change(option: &str) -> BlockError {
    BlockError::invalid(format!("Cannot change the option '{option}'"))
}

fn cannot_reset(option: &str) -> BlockError {
    BlockError::invalid(format!("Option '{option}' cannot be reset to its default value"))
}

fn same<T: PartialEq + Copy>(option: &str, was: T, now: T) -> Result<()> {
    if was == now { Ok(()) } else { Err(cannot_change(option)) }
}

fn driver(spec: &NodeSpec) -> std::mem::Discriminant<DriverSpec> {
    std::mem::discriminant(&spec.driver)
}

/// Fails if `spec` differs from the old description in something that an open node cannot change.
fn fixed(cell: &NodeCell, old: &Given, spec: &NodeSpec) -> Result<()> {
    if let Some(option) = left_out(&old.spec, spec) {
        return Err(cannot_reset(&option));
    }
    same("driver", driver(&old.spec), driver(spec))?;
    match (&old.spec.driver, &spec.driver) {
        (DriverSpec::File(a), DriverSpec::File(b))
        | (DriverSpec::HostDevice(a), DriverSpec::HostDevice(b)) => fixed_file(a, b),
        (DriverSpec::Raw { .. }, DriverSpec::Raw { .. }) => Ok(()),
        (DriverSpec::Qcow2(_), DriverSpec::Qcow2(_)) => Ok(()),
        (DriverSpec::Filter(a), DriverSpec::Filter(b))
            if matches!(
                (a.as_ref(), b.as_ref()),
                (FilterSpec::Throttle { .. }, FilterSpec::Throttle { .. })
                    | (FilterSpec::Preallocate { .. }, FilterSpec::Preallocate { .. })
            ) =>
        {
            Ok(())
        }
        (a, b) if format!("{a:?}") == format!("{b:?}") => Ok(()),
        _ if never_reopened(&spec.driver) => {
            let (driver, name) = (cell.node().driver(), cell.name());
            let message =
                format!("Block format '{driver}' used by node '{name}' does not support reopening files");
            Err(BlockError::unsupported(message))
        }
        _ => Err(match differing(&old.spec, spec) {
            Some(option) => cannot_change(&option),
            None => BlockError::unsupported("The options of this driver cannot be changed"),
        }),
    }
}

/// Whether QSD reopens no node of this driver. Here such a node can be described as it is, with other options of those that
/// all drivers take.
fn never_reopened(driver: &DriverSpec) -> bool {
    match driver {
        DriverSpec::CopyBeforeWrite(_) | DriverSpec::SnapshotAccess { .. } => true,
        DriverSpec::Filter(filter) => {
            !matches!(filter.as_ref(), FilterSpec::Throttle { .. } | FilterSpec::Blkdebug { .. })
        }
        _ => false,
    }
}

/// Options that every driver takes.
const COMMON: [&str; 7] =
    ["node-name", "read-only", "auto-read-only", "discard", "detect-zeroes", "cache", "active"];

/// The first option of the driver's own that two descriptions have differently.
fn differing(old: &NodeSpec, new: &NodeSpec) -> Option<String> {
    let (a, b) = (old.common.given.0.as_ref()?, new.common.given.0.as_ref()?);
    a.keys().chain(b.keys()).find(|k| !COMMON.contains(&k.as_str()) && a.get(*k) != b.get(*k)).cloned()
}

/// The first of the node's own options that the new description does not have, where it has no default to go back to.
fn left_out(old: &NodeSpec, new: &NodeSpec) -> Option<String> {
    match &old.driver {
        DriverSpec::Qcow2(_) | DriverSpec::Raw { .. } => return None,
        DriverSpec::Filter(f) if !matches!(f.as_ref(), FilterSpec::Preallocate { .. }) => return None,
        _ => {}
    }
    let (a, b) = (old.common.given.0.as_ref()?, new.common.given.0.as_ref()?);
    a.keys().find(|k| !COMMON.contains(&k.as_str()) && !b.contains_key(*k)).cloned()
}

fn fixed_file(a: &FileSpec, b: &FileSpec) -> Result<()> {
    same("filename", &a.filename, &b.filename)?;
    same("aio", (a.threads, a.native), (b.threads, b.native))?;
    same("locking", a.locking, b.locking)
}
