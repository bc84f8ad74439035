//! Zeroing and discarding.
//!
//! Whole clusters (or subclusters) are zeroed by a flag in their entry, and their space is given back if the caller allows it;
//! parts are written, unless they read as zeroes anyway. What must stay true: a change of an entry waits for
//! allocating writes of that cluster, and is then done in one step without waiting; a zeroed area reads as zeroes whatever
//! layer comes below later (so an entry is set even if there is nothing below now); discarded clusters read as zeroes, too.

use crate::cache::SlotId;
use crate::core::Core;
use crate::l1l2::Slice;
use crate::types::{GuestOffset, L2Entry, Subcluster, SubclusterBitmap};
use block::{BlockError, Data, ReqFlags, Result, Span};
use std::rc::Rc;

/// What becomes of whole units.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Erase {
    /// They read as zeroes; their space is given back if `unmap`.
    Zero { unmap: bool },
    /// The guest does not need them: they read as zeroes, nothing is done for what does already.
    Discard { unmap: bool },
    /// They read as the layer below.
    Forget,
}

impl Core {
    /// Makes `at` read as zeroes.
    pub(crate) async fn zero(self: &Rc<Self>, at: Span, flags: ReqFlags) -> Result<()> {
        self.check_writable()?;
        let _ticket = self.epochs.enter();
        let unit = self.geo.subcluster_size();
        // The last unit counts as whole where the disk ends in it.
        let to_end = at.end() == self.size.get();
        let grown = if to_end { Span::between(at.start, at.end().next_multiple_of(unit)) } else { at };
        let whole = grown.align_in(unit);
        if whole.is_empty() {
            return self.zero_part(at, flags).await;
        }
        let (head, tail) = (Span::between(at.start, whole.start), Span::between(whole.end(), at.end()));
        self.zero_part(head, flags).await?;
        self.zero_part(tail, flags).await?;
        if self.geo.version() < 3 {
            return self.zero_old(whole.intersect(&Span::new(0, self.size.get())), flags).await;
        }
        if let Some(raw) = self.raw_data_file() {
            let there = whole.intersect(&Span::new(0, raw.len()));
            if !there.is_empty() {
                raw.zero(there, flags).await?;
            }
        }
        self.erase(whole, Erase::Zero { unmap: flags.may_unmap }).await
    }

    /// The external data file, if it is to be readable as a raw image by itself.
    fn raw_data_file(&self) -> Option<Rc<crate::child::Child>> {
        let raw = self.header.borrow().autoclear & crate::header::AUTOCLEAR_RAW_DATA != 0;
        self.data_file.clone().filter(|_| raw)
    }

    /// Less than a unit: write, unless it is zero by what the tables say.
    async fn zero_part(self: &Rc<Self>, at: Span, flags: ReqFlags) -> Result<()> {
        if at.is_empty() {
            return Ok(());
        }
        let bits = self.geo.cluster_bits();
        self.inflight.wait(at.start >> bits, ((at.end() - 1) >> bits) + 1).await;
        // The whole unit may be zero already: then its flag is enough, and stays so whatever comes below.
        let unit = at.align_out(self.geo.subcluster_size());
        let visible = unit.intersect(&Span::new(0, self.size.get()));
        if self.geo.version() >= 3 && self.data_file.is_none() && self.is_mapped_zero(visible).await? {
            // Looked up and changed in one step: no write can have come in between.
            return self.zero_if_zero(unit).await;
        }
        self.write_zeroes(at, flags).await
    }

    /// Sets the zero flag of units that read as zeroes by their entries; if a write came in between, of none.
    async fn zero_if_zero(self: &Rc<Self>, unit: Span) -> Result<()> {
        let bits = self.geo.cluster_bits();
        let mut pos = unit.start;
        while pos < unit.end() {
            let c = pos >> bits;
            let part = Span::between(pos, unit.end().min(self.guest_start(c + 1)));
            loop {
                let slot = self.writable_slice(c).await?;
                if let Some(other) = self.inflight.conflict(c, c + 1) {
                    other.wait().await;
                    continue;
                }
                let entry = self.entry(slot, c)?;
                if let Some(new) = self.zeroed(entry, part, false) {
                    let has_data = match entry {
                        L2Entry::Unallocated | L2Entry::Zero { .. } => false,
                        L2Entry::Subclusters { bits, .. } => {
                            let (from, to) = self.sub_range(part);
                            (from..to).any(|i| bits.get(i) == Subcluster::Allocated)
                        }
                        _ => true,
                    };
                    if !has_data {
                        self.set_entry(slot, c, new);
                    }
                }
                break;
            }
            pos = part.end();
        }
        self.order.crowded_check(self);
        Ok(())
    }

    async fn write_zeroes(self: &Rc<Self>, at: Span, flags: ReqFlags) -> Result<()> {
        if flags.no_fallback {
            return Err(BlockError::unsupported(format!(
                "image '{}': zeroing {at} would need writing",
                self.name()
            )));
        }
        self.write(at, Data::zeroes(at.len as usize)).await
    }

    /// Version 2 has no zero flag: without a layer below unmapping is zeroing; else zeroes are written.
    async fn zero_old(self: &Rc<Self>, at: Span, flags: ReqFlags) -> Result<()> {
        let cluster = self.geo.cluster_size();
        if self.no_backing() && flags.may_unmap {
            let whole = Span::between(at.start, at.end().next_multiple_of(cluster));
            return self.erase(whole, Erase::Zero { unmap: true }).await;
        }
        let mut pos = at.start;
        while pos < at.end() {
            let end = at.end().min((pos & !(cluster - 1)) + cluster);
            let span = Span::between(pos, end);
            if !self.is_mapped_zero(span).await? {
                self.write_zeroes(span, flags).await?;
            }
            pos = end;
        }
        Ok(())
    }

    /// Treats whole units. Ends may be behind the end of the disk.
    async fn erase(self: &Rc<Self>, at: Span, how: Erase) -> Result<()> {
        let bits = self.geo.cluster_bits();
        let mut pos = at.start;
        while pos < at.end() {
            let c = pos >> bits;
            if self.nothing_to_erase(c, how)? {
                pos = self.guest_start(self.table_end(c));
                continue;
            }
            let slot = self.writable_slice(c).await?;
            if let Some(other) = self.inflight.conflict(c, c + 1) {
                other.wait().await;
                continue;
            }
            // No waiting in here: entries of one slice, one after the other.
            let stop = at.end().min(self.guest_start(self.slice_end(c)));
            let mut unsaid = None;
            while pos < stop && unsaid.is_none() {
                let c = pos >> bits;
                if self.inflight.conflict(c, c + 1).is_some() {
                    break;
                }
                let part = Span::between(pos, stop.min(self.guest_start(c + 1)));
                if !self.erase_one(slot, c, part, how)? {
                    unsaid = Some(part);
                }
                pos = part.end();
            }
            if let (Some(part), Erase::Zero { .. }) = (unsaid, how) {
                let part = part.intersect(&Span::new(0, self.size.get()));
                self.write(part, Data::zeroes(part.len as usize)).await?;
            }
            self.order.crowded_check(self);
        }
        Ok(())
    }

    /// Whether there is no table for cluster `c`, and none is needed.
    fn nothing_to_erase(self: &Rc<Self>, c: u64, how: Erase) -> Result<bool> {
        let needless = match how {
            Erase::Zero { .. } => self.no_backing() && self.geo.version() < 3,
            Erase::Discard { .. } => self.no_backing(),
            Erase::Forget => true,
        };
        Ok(needless && matches!(self.slice(c)?, Slice::NoTable))
    }

    /// Treats one unit; `false` if its entry cannot say that (part of a compressed cluster).
    fn erase_one(self: &Rc<Self>, slot: SlotId, c: u64, part: Span, how: Erase) -> Result<bool> {
        let old = self.entry(slot, c)?;
        let new = match how {
            Erase::Discard { .. } if self.no_backing() && matches!(old, L2Entry::Unallocated) => {
                return Ok(true);
            }
            Erase::Forget => L2Entry::Unallocated,
            _ if self.geo.version() < 3 => L2Entry::Unallocated,
            Erase::Zero { unmap } | Erase::Discard { unmap } => match self.zeroed(old, part, unmap) {
                Some(new) => new,
                None => return Ok(false),
            },
        };
        if new != old {
            self.set_entry(slot, c, new);
            if new.host() != old.host() || matches!(old, L2Entry::Compressed(_)) {
                self.free_entry(old, matches!(how, Erase::Discard { .. }));
            } else {
                self.kept_places.set(self.kept_places.get() + 1);
            }
        }
        Ok(true)
    }

    /// Drops what this layer holds in `at` (whole clusters; the end may be behind the end of the disk).
    pub(crate) async fn forget(self: &Rc<Self>, at: Span) -> Result<()> {
        self.check_writable()?;
        let _ticket = self.epochs.enter();
        self.erase(at, Erase::Forget).await
    }

    fn sub_range(&self, part: Span) -> (u32, u32) {
        (
            self.geo.subcluster_index(GuestOffset(part.start)),
            self.geo.subcluster_index(GuestOffset(part.end() - 1)) + 1,
        )
    }

    /// The entry with `part` (whole units) zeroed; `None` where that cannot be said: part of a compressed cluster.
    fn zeroed(&self, old: L2Entry, part: Span, unmap: bool) -> Option<L2Entry> {
        let all = part.len == self.geo.cluster_size();
        let keep = |host, copied| if unmap { (None, false) } else { (host, copied) };
        if !self.geo.extended_l2() {
            return Some(match old {
                L2Entry::Data { host, copied } => {
                    let (host, copied) = keep(Some(host), copied);
                    L2Entry::Zero { host, copied }
                }
                L2Entry::Zero { host, copied } => {
                    let (host, copied) = keep(host, copied);
                    L2Entry::Zero { host, copied }
                }
                _ => L2Entry::Zero { host: None, copied: false },
            });
        }
        let (host, copied, bits) = match old {
            L2Entry::Subclusters { host, copied, bits } => (host, copied, bits),
            L2Entry::Compressed(_) if !all => return None,
            _ => (None, false, SubclusterBitmap::default()),
        };
        let (from, to) = self.sub_range(part);
        let bits = bits.with(from, to, Subcluster::Zero);
        let (host, copied) = if bits.allocated() == 0 && all { keep(host, copied) } else { (host, copied) };
        Some(L2Entry::Subclusters { host, copied, bits })
    }

    /// Whole clusters of `at` are not needed any more. They read as zeroes (with an old version and a layer below nothing
    /// happens, since that could not be said).
    pub(crate) async fn discard(self: &Rc<Self>, at: Span) -> Result<()> {
        self.check_writable()?;
        if self.geo.version() < 3 && !self.no_backing() {
            return Ok(());
        }
        let _ticket = self.epochs.enter();
        let unit = self.geo.subcluster_size();
        let to_end = at.end() == self.size.get();
        let grown = if to_end { Span::between(at.start, at.end().next_multiple_of(unit)) } else { at };
        let whole = grown.align_in(unit);
        if whole.is_empty() {
            return Ok(());
        }
        if let Some(raw) = self.raw_data_file() {
            // Its bytes are the disk's: they have to read as zeroes there, too.
            raw.zero(whole, ReqFlags { may_unmap: true, ..ReqFlags::NONE }).await?;
        } else if let Some(data) = self.data_file.as_ref().filter(|_| self.opts.borrow().pass_discard_request)
        {
            self.erase(whole, Erase::Discard { unmap: true }).await?;
            // A host that cannot discard keeps the space; that is all.
            let _kept_on_error = data.discard(whole).await;
            return Ok(());
        }
        let unmap = !self.opts.borrow().discard_no_unref;
        self.erase(whole, Erase::Discard { unmap }).await
    }
}
