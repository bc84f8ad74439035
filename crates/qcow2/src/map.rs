//! Where guest bytes are: mapping, reading, and what is told of allocation.
//!
//! A read looks its whole span up first and then reads all places at once. What must stay true: places looked up stay valid
//! while the request's ticket is out (freed clusters are not reused before, see `inflight`); zeroes cost no memory and no
//! I/O; neighbouring places become one request.

use crate::core::Core;
use crate::l1l2::Slice;
use crate::types::{Compressed, GuestOffset, HostOffset, L2Entry, Subcluster};
use block::{Data, Extent, Kind, Result, Span};
use graph::{DebugEvent, NodeCell};
use smallvec::SmallVec;
use std::rc::Rc;

/// Most extents that one [`Core::extents`] gives, and about how many slices it looks at: bounds one request's time and
/// memory; the caller asks again for the rest.
const MAX_EXTENTS: usize = 1024;
const MAX_EXTENT_SLICES: u64 = 256;
/// Places read at a time by one request. More are taken up as the first ones end, so that a request that meets nothing
/// but single clusters does not keep thousands of requests in flight.
const READS_AT_ONCE: usize = 32;
/// How often a request is read again at the most: a client that zeroes and writes what it reads gets some of both.
const READ_AGAIN: usize = 16;

/// Smaller pieces than this are not copied from file to file on a helper thread: a request of many of them is better read
/// all at once and written in one go.
const LEAST_COPY: u64 = 128 << 10;

/// Where bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// In the file with guest data, from there on.
    At(HostOffset),
    /// They are zeroes.
    Zero,
    /// The layer below has them; zeroes if there is none.
    Below,
    /// In this compressed cluster.
    Packed(Compressed),
}

/// A piece of the guest's disk in one place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Piece {
    pub(crate) span: Span,
    pub(crate) place: Place,
}

/// The places of a request; one is the usual case.
pub(crate) type Pieces = SmallVec<[Piece; 2]>;

fn push(list: &mut Pieces, next: Piece) {
    if next.span.is_empty() {
        return;
    }
    if let Some(last) = list.last_mut() {
        let goes_on = match (last.place, next.place) {
            (Place::At(a), Place::At(b)) => a.0 + last.span.len == b.0,
            (Place::Zero, Place::Zero) | (Place::Below, Place::Below) => true,
            _ => false,
        };
        if goes_on {
            last.span.len += next.span.len;
            return;
        }
    }
    list.push(next);
}

impl Core {
    /// Appends the places of `at`, or of a part of it from its start, as far as that goes without waiting. Gives the
    /// first byte that is not covered.
    fn map_now(self: &Rc<Self>, at: Span, out: &mut Pieces) -> Result<(u64, Option<HostOffset>)> {
        let bits = self.geo.cluster_bits();
        let mut pos = at.start;
        while pos < at.end() {
            let c = pos >> bits;
            let slot = match self.slice(c)? {
                Slice::Here(slot) => slot,
                Slice::NoTable => {
                    let end = at.end().min(self.guest_start(self.table_end(c)));
                    push(out, Piece { span: Span::between(pos, end), place: Place::Below });
                    pos = end;
                    continue;
                }
                Slice::Load(from) => return Ok((pos, Some(from))),
            };
            let stop = at.end().min(self.guest_start(self.slice_end(c)));
            while pos < stop {
                let c = pos >> bits;
                let end = stop.min(self.guest_start(c + 1));
                let (raw, bitmap) = self.raw_entry(slot, c);
                if raw | bitmap == 0 {
                    push(out, Piece { span: Span::between(pos, end), place: Place::Below });
                } else {
                    let entry = self.entry(slot, c)?;
                    self.push_entry(entry, Span::between(pos, end), out);
                }
                pos = end;
            }
        }
        Ok((pos, None))
    }

    /// Appends the places of `at`, which is inside one guest cluster with this entry.
    fn push_entry(&self, entry: L2Entry, at: Span, out: &mut Pieces) {
        let inside = self.geo.in_cluster(at.start);
        let place = match entry {
            L2Entry::Unallocated => Place::Below,
            L2Entry::Zero { .. } => Place::Zero,
            L2Entry::Data { host, .. } => Place::At(HostOffset(host.0 + inside)),
            L2Entry::Compressed(c) => Place::Packed(c),
            L2Entry::Subclusters { host, bits, .. } => {
                let sub_bits = self.geo.subcluster_bits();
                let mut pos = at.start;
                while pos < at.end() {
                    let i = self.geo.subcluster_index(GuestOffset(pos));
                    let (state, n) = bits.run(i);
                    let cluster_start = pos - self.geo.in_cluster(pos);
                    let end = at.end().min(cluster_start + (u64::from(i + n) << sub_bits));
                    let place = match (state, host) {
                        (Subcluster::Allocated, Some(h)) => {
                            Place::At(HostOffset(h.0 + self.geo.in_cluster(pos)))
                        }
                        (Subcluster::Zero, _) => Place::Zero,
                        _ => Place::Below,
                    };
                    push(out, Piece { span: Span::between(pos, end), place });
                    pos = end;
                }
                return;
            }
        };
        push(out, Piece { span: at, place });
    }

    /// The places of all of `at`.
    pub(crate) async fn map(self: &Rc<Self>, at: Span) -> Result<Pieces> {
        let mut out = Pieces::new();
        let mut pos = at.start;
        loop {
            let (next, load) = self.map_now(Span::between(pos, at.end()), &mut out)?;
            match load {
                None => return Ok(out),
                Some(from) => self.load_slice(next >> self.geo.cluster_bits(), from).await?,
            }
            pos = next;
        }
    }

    /// Reads `at`, which is inside the disk.
    ///
    /// What is zeroed meanwhile and keeps its place may be written to there before that is said in the table: bytes that nobody
    /// else can see yet. So where something kept its place, and these places are others now, it is read again.
    pub(crate) async fn read(self: &Rc<Self>, at: Span) -> Result<Data> {
        let _ticket = self.epochs.enter();
        let mut kept = self.kept_places.get();
        let mut pieces = Pieces::new();
        let (_, load) = self.map_now(at, &mut pieces)?;
        if load.is_some() {
            pieces = self.map(at).await?;
        }
        let mut data = self.read_pieces(&pieces).await?;
        for _ in 0..READ_AGAIN {
            if self.kept_places.get() == kept {
                break;
            }
            kept = self.kept_places.get();
            let now = self.map(at).await?;
            if now == pieces {
                break;
            }
            pieces = now;
            data = self.read_pieces(&pieces).await?;
        }
        Ok(data)
    }

    async fn read_pieces(self: &Rc<Self>, pieces: &[Piece]) -> Result<Data> {
        match pieces {
            [one] => self.read_piece(*one).await,
            many => {
                let mut out = Data::empty();
                for some in many.chunks(READS_AT_ONCE) {
                    let reads = some.iter().map(|p| self.read_piece(*p));
                    for part in futures_util::future::join_all(reads).await {
                        out.append(part?);
                    }
                }
                Ok(out)
            }
        }
    }

    /// Has what is at the start of `at` copied to `to` from where it lies; how many bytes, 0 if it lies in small pieces,
    /// packed, or nowhere.
    pub(crate) async fn copy_to(self: &Rc<Self>, at: Span, to: &NodeCell, to_offset: u64) -> Result<u64> {
        let _ticket = self.epochs.enter();
        let pieces = self.map(at).await?;
        let Some(first) = pieces.first().filter(|p| p.span.len >= LEAST_COPY.min(at.len)) else {
            return Ok(0);
        };
        match first.place {
            Place::At(host) => {
                self.data().edge().copy_onto(Span::new(host.0, first.span.len), to, to_offset).await
            }
            Place::Below => {
                let Some(below) = self.backing.borrow().clone() else { return Ok(0) };
                let there = first.span.intersect(&Span::new(0, below.len()));
                if there.is_empty() { Ok(0) } else { below.copy_onto(there, to, to_offset).await }
            }
            Place::Zero | Place::Packed(_) => Ok(0),
        }
    }

    async fn read_piece(self: &Rc<Self>, p: Piece) -> Result<Data> {
        match p.place {
            Place::Zero => Ok(Data::zeroes(p.span.len as usize)),
            Place::At(host) => {
                self.file.tell(DebugEvent::ReadAio);
                self.data().read(Span::new(host.0, p.span.len)).await
            }
            Place::Below => self.read_below(p.span).await,
            Place::Packed(c) => self.read_packed(c, p.span).await,
        }
    }

    async fn read_below(&self, at: Span) -> Result<Data> {
        let below = self.backing.borrow().clone();
        let Some(below) = below.filter(|b| at.start < b.len()) else {
            return Ok(Data::zeroes(at.len as usize));
        };
        self.file.tell(DebugEvent::ReadBackingAio);
        self.shortcut.read(&below, at).await
    }

    /// Whether all of `at` reads as zeroes by what the tables say, without reading data.
    pub(crate) async fn is_mapped_zero(self: &Rc<Self>, at: Span) -> Result<bool> {
        if at.is_empty() {
            return Ok(true);
        }
        let pieces = self.map(at).await?;
        let below_ends = self.backing.borrow().as_ref().map_or(0, |b| b.len());
        Ok(pieces.iter().all(|p| match p.place {
            Place::Zero => true,
            Place::Below => p.span.start >= below_ends,
            Place::At(_) | Place::Packed(_) => false,
        }))
    }

    /// What this layer says of `at`.
    pub(crate) async fn extents(self: &Rc<Self>, at: Span) -> Result<Vec<Extent>> {
        let _ticket = self.epochs.enter();
        let mut out = Vec::new();
        let mut pos = at.start;
        let mut slices = 0;
        while pos < at.end() && out.len() < MAX_EXTENTS && slices < MAX_EXTENT_SLICES {
            let c = pos >> self.geo.cluster_bits();
            // A table that does not exist costs nothing, however much it would map.
            let end = match self.loaded_slice(c).await? {
                Some(_) => self.guest_start(self.slice_end(c)),
                None => self.guest_start(self.table_end(c)),
            };
            let mut pieces = Pieces::new();
            let (next, _) = self.map_now(Span::between(pos, end.min(at.end())), &mut pieces)?;
            for p in pieces {
                let (kind, host, packed) = match p.place {
                    Place::At(h) => (Kind::Data, Some(h.0), false),
                    Place::Zero => (Kind::Zero, None, false),
                    Place::Below => (Kind::Unallocated, None, false),
                    Place::Packed(_) => (Kind::Data, None, true),
                };
                Extent::push_merged(&mut out, Extent { span: p.span, kind, host, packed });
            }
            pos = next;
            slices += 1;
        }
        Ok(out)
    }
}
