//! Shortcuts down a chain: a read goes at once to the layer that has its bytes, however many layers above have nothing there.
//!
//! A node with a layer below asks its [`Shortcut`] for what it does not hold itself. That remembers, for each granule of the disk, a
//! *depth*: no layer above it has anything in the granule. The read goes to the layer at that depth, which looks again in its own
//! tables (where in a file bytes lie is never remembered here) and goes further down by itself where it has nothing.
//!
//! What can happen: layers that are passed over are written to, lengthened, emptied, taken out of the chain, looked at by others,
//! while reads pass them; what is remembered is asked for by several requests at a time, and thrown out while they wait.
//! What must stay true:
//! * A remembered depth is never too large. A layer tells its [`Skippable`] of a change in the instant that makes it visible,
//!   before any other request can see it, and the depth of the granule becomes that layer's, if it was more. That a layer lost
//!   something is not told: the layer finds that out when it is asked. So depths only fall, and answers that took time are merged in any order.
//! * Answers are merged only into what is remembered still (a page that was thrown out heard of no change since).
//! * A read on a shortcut is counted as inside every edge above the layer where it is, and inside no other ([`Crowd`]): whoever closes one of these
//!   gates waits for it, and whoever closes one below does not. It never waits at a gate: it enters only while all gates are open.
//! * What was found out about the graph holds until one of the gates is closed; nothing else changes edges.
//! * Edges are not held: a layer that left the chain goes.

use crate::cell::NodeCell;
use crate::edge::Edge;
use crate::gate::Crowd;
use block::{Data, Kind, Result, Span};
use smallvec::SmallVec;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

/// Granules of a page, which is learned as a whole: one slice of tables of usual size.
const PER_PAGE: u64 = 512;
/// Most pages of one shortcut, 1 KiB each: with clusters of 64 KiB they cover 256 GiB, as much as the tables that are kept by default.
const MAX_PAGES: u64 = 8192;
/// Most layers of one shortcut: depths are 16 bits wide. The last one begins another.
const MAX_DEPTH: usize = u16::MAX as usize - 1;
/// Layers asked before others get their turn.
const ASKS_AT_ONCE: u32 = 64;
/// Granule where layers do not say what their unit is.
const GRANULE: u64 = 64 << 10;
/// Smallest unit of a layer.
const MIN_GRANULE: u64 = 512;
/// Parts of one read that are under way together.
const PARTS_AT_ONCE: usize = 32;
/// No layer that was asked has anything there.
const NOWHERE: u16 = u16::MAX;

/// What a node that may be passed over keeps: who does.
#[derive(Default)]
pub struct Skippable {
    by: RefCell<Vec<(Weak<Map>, u16)>>,
    any: Cell<bool>,
}

impl Skippable {
    /// The layer has something in `at`, or may have. To be called in the instant in which requests can see it. Costs nothing
    /// while nobody passes the layer over.
    #[inline]
    pub fn changed(&self, at: Span) {
        if self.any.get() {
            self.tell(|map, depth| map.found(at, depth));
        }
    }

    /// Anything may have changed.
    pub fn changed_all(&self) {
        if self.any.get() {
            self.tell(|map, _| map.forget());
        }
    }

    fn tell(&self, what: impl Fn(&Map, u16)) {
        let mut by = self.by.borrow_mut();
        by.retain(|(map, depth)| map.upgrade().map(|map| what(&map, *depth)).is_some());
        self.any.set(!by.is_empty());
    }

    fn add(&self, map: &Rc<Map>, depth: u16) {
        let mut by = self.by.borrow_mut();
        // now and then, so that many chains over one image do not look at all others each
        if by.len().is_power_of_two() {
            by.retain(|(map, _)| map.strong_count() > 0);
        }
        by.push((Rc::downgrade(map), depth));
        self.any.set(true);
    }
}

/// What is known of a page.
struct Page {
    /// How many layers were asked, plus one: the depth of the next.
    asked: Cell<u16>,
    /// The least depth at which there is something, of the layers that were asked.
    first: Box<[Cell<u16>]>,
}

impl Page {
    fn new() -> Rc<Page> {
        Rc::new(Page { asked: Cell::new(1), first: vec![Cell::new(NOWHERE); PER_PAGE as usize].into() })
    }

    /// Where to look for granule `g` of the page.
    fn depth(&self, g: u64) -> u16 {
        self.first[g as usize].get().min(self.asked.get())
    }

    /// Whether nothing more can be found out of granule `g` with `layers` layers.
    fn is_decided(&self, g: u64, layers: u16) -> bool {
        self.asked.get() >= layers || self.first[g as usize].get() < self.asked.get()
    }

    fn lower(&self, g: u64, depth: u16) {
        let first = &self.first[g as usize];
        first.set(first.get().min(depth));
    }
}

/// A part of a read and the layer that it goes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Part {
    span: Span,
    depth: u16,
}

/// A page and its number.
type Slot = Option<(u64, Rc<Page>)>;

/// Depths of granules.
struct Map {
    granule_bits: u32,
    /// Depth of the lowest layer, which is never asked: what nobody above has is read from it.
    layers: u16,
    /// By the low bits of their number; a page takes the place of another.
    pages: RefCell<Vec<Slot>>,
    slots: usize,
}

impl Map {
    fn new(len: u64, granule: u64, layers: u16) -> Rc<Map> {
        let granule_bits = granule.max(MIN_GRANULE).next_power_of_two().trailing_zeros();
        let pages = len.div_ceil(PER_PAGE << granule_bits).clamp(1, MAX_PAGES);
        let slots = pages.next_power_of_two() as usize;
        Rc::new(Map { granule_bits, layers, pages: RefCell::default(), slots })
    }

    fn page_of(&self, granule: u64) -> u64 {
        granule / PER_PAGE
    }

    /// Bytes of page `number`.
    fn span_of(&self, number: u64) -> Span {
        let bytes = PER_PAGE << self.granule_bits;
        Span::new(number * bytes, bytes)
    }

    fn get(&self, number: u64) -> Option<Rc<Page>> {
        match self.pages.borrow().get(number as usize & (self.slots - 1)) {
            Some(Some((n, page))) if *n == number => Some(page.clone()),
            _ => None,
        }
    }

    fn get_or_make(&self, number: u64) -> Rc<Page> {
        if let Some(page) = self.get(number) {
            return page;
        }
        let mut pages = self.pages.borrow_mut();
        if pages.is_empty() {
            pages.resize(self.slots, None);
        }
        let page = Page::new();
        pages[number as usize & (self.slots - 1)] = Some((number, page.clone()));
        page
    }

    fn holds(&self, number: u64, page: &Rc<Page>) -> bool {
        self.get(number).is_some_and(|p| Rc::ptr_eq(&p, page))
    }

    /// Numbers of the granules of `at`, from the first to the last.
    fn granules(&self, at: Span) -> (u64, u64) {
        (at.start >> self.granule_bits, (at.end() - 1) >> self.granule_bits)
    }

    /// The parts of `at`, which is not empty, and whether all of them are decided.
    fn find(&self, at: Span, parts: &mut SmallVec<[Part; 2]>) -> bool {
        let (from, to) = self.granules(at);
        let mut decided = true;
        let mut page: Option<(u64, Option<Rc<Page>>)> = None;
        for granule in from..=to {
            let number = self.page_of(granule);
            let page = match &page {
                Some((n, page)) if *n == number => page,
                _ => &page.insert((number, self.get(number))).1,
            };
            let g = granule % PER_PAGE;
            let depth = page.as_ref().map_or(1, |p| p.depth(g));
            decided &= page.as_ref().is_some_and(|p| p.is_decided(g, self.layers));
            let span = at.intersect(&Span::new(granule << self.granule_bits, 1 << self.granule_bits));
            match parts.last_mut() {
                Some(last) if last.depth == depth => last.span.len += span.len,
                _ => parts.push(Part { span, depth }),
            }
        }
        decided
    }

    /// The layer at `depth` has something in `at`.
    fn found(&self, at: Span, depth: u16) {
        if at.is_empty() {
            return;
        }
        let (from, to) = self.granules(at);
        for number in self.page_of(from)..=self.page_of(to) {
            // A layer that was not asked yet will be.
            let Some(page) = self.get(number).filter(|p| depth <= p.asked.get()) else { continue };
            self.lower(&page, number, at, depth);
        }
    }

    /// Lowers the depths of the granules that `at` touches in a page.
    fn lower(&self, page: &Page, number: u64, at: Span, depth: u16) {
        let part = at.intersect(&self.span_of(number));
        if part.is_empty() {
            return;
        }
        let (from, to) = self.granules(part);
        (from..=to).for_each(|g| page.lower(g % PER_PAGE, depth));
    }

    fn forget(&self) {
        self.pages.borrow_mut().clear();
    }

    /// What of a page nobody has yet, as one span from the first to the last such byte.
    fn open_part(&self, page: &Page, number: u64) -> Span {
        let open = |g: &u64| page.first[*g as usize].get() == NOWHERE;
        let start = self.span_of(number).start;
        match ((0..PER_PAGE).find(open), (0..PER_PAGE).rev().find(open)) {
            (Some(a), Some(b)) => {
                Span::between(start + (a << self.granule_bits), start + ((b + 1) << self.granule_bits))
            }
            _ => Span::new(start, 0),
        }
    }
}

/// A chain as it was when its gates were last open.
struct Way {
    /// From the top down; the layer at depth `n` is the child of number `n - 1`.
    edges: Vec<Weak<Edge>>,
    crowd: Rc<Crowd>,
    /// Nothing where there is no layer to pass over.
    map: Option<Rc<Map>>,
}

impl Way {
    fn find_out(below: &Rc<Edge>) -> Option<Rc<Way>> {
        let mut edges = vec![below.clone()];
        let mut granule: Option<u64> = None;
        let mut edge = below.clone();
        loop {
            if edge.is_shut() {
                return None;
            }
            let cell = edge.child();
            let passable =
                edges.len() < MAX_DEPTH && cell.readers().is_none() && cell.node().skippable().is_some();
            let Some(next) = passable.then(|| cell.node().backing()).flatten() else { break };
            let unit = cell.node().limits().cluster_size;
            let unit = if unit == 0 { GRANULE } else { unit };
            granule = Some(granule.map_or(unit, |g| g.min(unit)));
            edges.push(next.clone());
            edge = next;
        }
        let crowd = Crowd::new(edges.len());
        edges.iter().enumerate().for_each(|(i, e)| e.carry(&crowd, i + 1));
        let map = granule.map(|granule| {
            let map = Map::new(below.len(), granule, edges.len() as u16);
            for (i, edge) in edges.iter().enumerate().take(edges.len() - 1) {
                let cell = edge.child();
                if let Some(layer) = cell.node().skippable() {
                    layer.add(&map, (i + 1) as u16);
                }
            }
            map
        });
        Some(Rc::new(Way { edges: edges.iter().map(Rc::downgrade).collect(), crowd, map }))
    }

    fn is_over(&self, below: &Rc<Edge>) -> bool {
        !self.crowd.is_open()
            || !self.edges.first().is_some_and(|e| std::ptr::eq(e.as_ptr(), Rc::as_ptr(below)))
    }

    fn child(&self, depth: u16) -> Option<Rc<NodeCell>> {
        Some(self.edges.get(usize::from(depth) - 1)?.upgrade()?.child())
    }

    /// Asks layers about the pages of `at` until it is known where to look, or something changes. What layers fail with is
    /// left to the read itself.
    async fn learn(&self, map: &Map, at: Span) {
        let (from, to) = map.granules(at);
        let mut asks = 0u32;
        for number in map.page_of(from)..=map.page_of(to) {
            let page = map.get_or_make(number);
            let (a, b) = map.granules(at.intersect(&map.span_of(number)));
            while (a..=b).any(|g| !page.is_decided(g % PER_PAGE, map.layers)) {
                let depth = page.asked.get();
                if !self.ask(map, number, &page, depth).await || !map.holds(number, &page) {
                    return;
                }
                page.asked.set(page.asked.get().max(depth + 1));
                asks += 1;
                if asks.is_multiple_of(ASKS_AT_ONCE) {
                    env::sync::yield_now().await;
                    if !map.holds(number, &page) {
                        return;
                    }
                }
            }
        }
    }

    /// Merges what the layer at `depth` says of a page into it. `false` if that could not be found out.
    async fn ask(&self, map: &Map, number: u64, page: &Page, depth: u16) -> bool {
        let Some(_inside) = self.crowd.enter(depth) else { return false };
        let Some(cell) = self.child(depth) else { return false };
        let open = map.open_part(page, number);
        let len = cell.node().len();
        // What lies behind the end of a layer reads as zeroes, whatever is below.
        map.lower(page, number, Span::between(len.max(open.start), len.max(open.end())), depth);
        let mut pos = open.start;
        let end = open.end().min(len);
        while pos < end {
            let Ok(found) = cell.extents(Span::between(pos, end)).await else { return false };
            let Some(last) = found.last().map(|e| e.span.end()).filter(|last| *last > pos) else {
                return false;
            };
            found
                .iter()
                .filter(|e| e.kind != Kind::Unallocated)
                .for_each(|e| map.lower(page, number, e.span, depth));
            pos = last;
        }
        true
    }

    /// Reads a part from its layer. The caller is in the crowd there.
    async fn read(&self, part: Part) -> Result<Option<Data>> {
        let Some(cell) = self.child(part.depth) else { return Ok(None) };
        cell.read_filled(part.span).await.map(Some)
    }
}

/// What a node keeps that reads from a layer below.
#[derive(Default)]
pub struct Shortcut {
    way: RefCell<Option<Rc<Way>>>,
}

impl Shortcut {
    /// Reads `at` through `below`, or past layers that have nothing there. What lies behind the end of a layer reads as zeroes.
    ///
    /// # Errors
    /// As [`Edge::read`].
    pub async fn read(&self, below: &Rc<Edge>, at: Span) -> Result<Data> {
        let way = self.way(below);
        let Some((way, map)) =
            way.as_ref().and_then(|w| Some((w, w.map.as_ref()?))).filter(|_| !at.is_empty())
        else {
            return below.read_filled(at).await;
        };
        let mut parts = SmallVec::new();
        if !map.find(at, &mut parts) {
            Box::pin(way.learn(map, at)).await;
            parts.clear();
            map.find(at, &mut parts);
        }
        let read = match parts.as_slice() {
            [one] => match way.crowd.enter(one.depth) {
                Some(_inside) => way.read(*one).await?,
                None => None,
            },
            many => Box::pin(read_parts(way, many)).await?,
        };
        match read {
            Some(data) => Ok(data),
            None => below.read_filled(at).await,
        }
    }

    fn way(&self, below: &Rc<Edge>) -> Option<Rc<Way>> {
        let mut way = self.way.borrow_mut();
        if way.as_ref().is_none_or(|w| w.is_over(below)) {
            *way = Way::find_out(below);
        }
        way.clone()
    }
}

/// Nothing if the way is over.
async fn read_parts(way: &Way, parts: &[Part]) -> Result<Option<Data>> {
    let mut inside = Vec::with_capacity(parts.len());
    for part in parts {
        let Some(place) = way.crowd.enter(part.depth) else { return Ok(None) };
        inside.push(place);
    }
    let mut all = Data::empty();
    for some in parts.chunks(PARTS_AT_ONCE) {
        for part in futures_util::future::join_all(some.iter().map(|p| way.read(*p))).await {
            let Some(data) = part? else { return Ok(None) };
            all.append(data);
        }
    }
    Ok(Some(all))
}
