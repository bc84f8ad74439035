//! Internal snapshots: further L1 tables that share L2 tables and clusters with the active one.
//!
//! What is shared has a refcount above 1 and no COPIED flag, so whoever writes makes a copy first (`write`, `l1l2`). Taking
//! a snapshot raises all counts and clears all flags; deleting one lowers them and sets flags again where one user is left.
//! In between, counts and flags in the file do not fit together, so the image is marked dirty for as long (version 3; what a crash
//! leaves is put right when it is opened again; docs/durability.md says why nothing is endangered without the mark, either).
//!
//! What must stay true: no request runs meanwhile, nor any commit but ours, so that everything is in the file; a change that
//! fails before the header names the new table is undone. What is kept in memory follows each step without being read again,
//! so that no failed I/O leaves the two apart. Flags that could not be brought in line with the counts are *due*: that is
//! harmless to guests (a write makes a copy too many, or goes where no snapshot looks), it is tried again whenever the
//! metadata is settled, and until it is done the image stays marked.

use crate::core::Core;
use crate::header::{Header, INCOMPAT_DIRTY, MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::overlap::Meta;
use crate::types::{COPIED, HostOffset, L2Entry, MAX_HOST_OFFSET};
use block::{BlockError, Data, Result, Span};
use graph::SnapshotDetails;
use std::rc::Rc;

/// Bytes of the fixed part of an entry of the snapshot table.
const FIXED: u64 = 40;
/// Most bytes of further data in an entry (the reference's limit); today's programs write 24.
const MAX_EXTRA: u64 = 1024;
/// Largest snapshot table (the reference's limit): bounds memory when an image is opened.
const MAX_TABLE: u64 = 64 << 20;
/// Longest name in bytes (the reference cuts what is longer).
pub const MAX_NAME: usize = 255;
/// Value of `icount` for "not recorded".
const NO_ICOUNT: u64 = u64::MAX;

/// An entry of the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Id: a number in decimal, where we give it.
    pub id: String,
    /// Name.
    pub name: String,
    /// When it was taken, in seconds since 1970 and nanoseconds.
    pub date: (u32, u32),
    /// The guest's clock then, in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of machine state kept behind the end of the disk.
    pub vm_state_size: u64,
    /// Bytes of the disk then.
    pub disk_size: u64,
    /// Instructions executed, if that was counted.
    pub icount: Option<u64>,
    l1: HostOffset,
    l1_entries: u32,
    /// What followed the fields we know in the entry: kept as it is.
    unknown: Vec<u8>,
}

/// Where in the file the snapshots' table is, and what it says.
#[derive(Default)]
pub(crate) struct Snapshots {
    pub(crate) list: Vec<Snapshot>,
    /// Bytes of the table.
    len: u64,
    /// Why the table could not be read to its end.
    damage: Option<String>,
}

fn be(bytes: &[u8], from: usize, n: usize) -> u64 {
    bytes[from..from + n].iter().fold(0, |v, b| v << 8 | u64::from(*b))
}

impl Snapshot {
    fn decode(fixed: &[u8], rest: &[u8], disk_size: u64) -> Snapshot {
        let (extra, id, name) =
            (be(fixed, 36, 4) as usize, be(fixed, 12, 2) as usize, be(fixed, 14, 2) as usize);
        let has = |end: usize| extra >= end;
        let text = |from: usize, n: usize| String::from_utf8_lossy(&rest[from..from + n]).into_owned();
        Snapshot {
            id: text(extra, id),
            name: text(extra + id, name),
            date: (be(fixed, 16, 4) as u32, be(fixed, 20, 4) as u32),
            vm_clock: be(fixed, 24, 8),
            vm_state_size: if has(8) { be(rest, 0, 8) } else { be(fixed, 32, 4) },
            disk_size: if has(16) { be(rest, 8, 8) } else { disk_size },
            icount: if has(24) { Some(be(rest, 16, 8)).filter(|n| *n != NO_ICOUNT) } else { None },
            l1: HostOffset(be(fixed, 0, 8)),
            l1_entries: be(fixed, 8, 4) as u32,
            unknown: rest[24.min(extra)..extra].to_vec(),
        }
    }

    /// For queries.
    pub fn details(&self) -> SnapshotDetails {
        SnapshotDetails {
            id: self.id.clone(),
            name: self.name.clone(),
            date: self.date,
            vm_clock: self.vm_clock,
            vm_state_size: self.vm_state_size,
            icount: self.icount,
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.l1.0.to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend((self.id.len() as u16).to_be_bytes());
        out.extend((self.name.len() as u16).to_be_bytes());
        out.extend(self.date.0.to_be_bytes());
        out.extend(self.date.1.to_be_bytes());
        out.extend(self.vm_clock.to_be_bytes());
        out.extend(u32::try_from(self.vm_state_size).unwrap_or(u32::MAX).to_be_bytes());
        out.extend((24 + self.unknown.len() as u32).to_be_bytes());
        out.extend(self.vm_state_size.to_be_bytes());
        out.extend(self.disk_size.to_be_bytes());
        out.extend(self.icount.unwrap_or(NO_ICOUNT).to_be_bytes());
        out.extend(&self.unknown);
        out.extend(self.id.as_bytes());
        out.extend(self.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

fn encode(list: &[Snapshot]) -> Vec<u8> {
    let mut out = Vec::new();
    list.iter().for_each(|s| s.encode(&mut out));
    out
}

/// Adds to or takes from a refcount.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Up,
    Down,
}

/// A walk over everything that an L1 table reaches.
struct Counting {
    way: Way,
    /// References still to be changed.
    left: u64,
    /// References changed.
    done: u64,
    /// Clusters that nobody uses any more, since the last table.
    gone: Vec<u64>,
}

impl Core {
    /// Reads the snapshot table, and enters it and the snapshots' L1 tables into the overlap map. What makes no sense ends it:
    /// that is the checker's business; until then snapshots are neither taken nor deleted.
    pub(crate) async fn load_snapshots(&self, h: &Header) -> Result<()> {
        let mut found = Snapshots::default();
        let start = h.snapshots_offset.0;
        for i in 0..h.snapshot_count {
            match self.load_snapshot(start, found.len, h.size).await? {
                Ok((s, len)) => {
                    self.note_meta(s.l1, u64::from(s.l1_entries) * 8, Meta::InactiveL1);
                    found.list.push(s);
                    found.len += len;
                }
                Err(what) => {
                    found.damage = Some(format!("snapshot {i}: {what}"));
                    break;
                }
            }
        }
        if found.len > 0 {
            self.note_meta(HostOffset(start), found.len, Meta::SnapshotTable);
        }
        *self.snapshots.borrow_mut() = found;
        Ok(())
    }

    /// The entry at `at` in the table at `start`, and its length; or what is wrong with it.
    async fn load_snapshot(
        &self,
        start: u64,
        at: u64,
        disk_size: u64,
    ) -> Result<std::result::Result<(Snapshot, u64), &'static str>> {
        let place = start.saturating_add(at);
        let past = |len: u64| place.saturating_add(len) > self.file.len();
        if past(FIXED) {
            return Ok(Err("its entry is past the end of the file"));
        }
        let fixed = self.file.read(Span::new(place, FIXED)).await?.to_vec();
        let (extra, names) = (be(&fixed, 36, 4), be(&fixed, 12, 2) + be(&fixed, 14, 2));
        let len = (FIXED + extra + names).next_multiple_of(8);
        if extra > MAX_EXTRA {
            return Ok(Err("too much extra data"));
        }
        if at + len > MAX_TABLE {
            return Ok(Err("the snapshot table is too large"));
        }
        if past(FIXED + extra + names) {
            return Ok(Err("its entry is past the end of the file"));
        }
        let rest = self.file.read(Span::new(place + FIXED, extra + names)).await?.to_vec();
        let s = Snapshot::decode(&fixed, &rest, disk_size);
        let l1_bytes = u64::from(s.l1_entries) * 8;
        let outside = s.l1.0.checked_add(l1_bytes).is_none_or(|end| end > MAX_HOST_OFFSET);
        if l1_bytes > MAX_L1_BYTES || outside || self.geo.in_cluster(s.l1.0) != 0 {
            return Ok(Err("its L1 table is too large or badly placed"));
        }
        Ok(Ok((s, len)))
    }

    /// The L1 table of a snapshot.
    pub(crate) async fn snapshot_l1(&self, s: &Snapshot) -> Result<Vec<u64>> {
        let data = self.file.read(Span::new(s.l1.0, u64::from(s.l1_entries) * 8)).await?.contiguous();
        Ok(data.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect())
    }

    /// That snapshots can be taken and deleted.
    fn check_snapshots(&self) -> Result<()> {
        self.check_writable()?;
        if self.data_file.is_some() {
            return Err(BlockError::unsupported(format!(
                "image '{}' has an external data file: it can have no internal snapshots",
                self.name()
            )));
        }
        match &self.snapshots.borrow().damage {
            None => Ok(()),
            Some(what) => Err(BlockError::corrupt(format!(
                "image '{}': the snapshot table is damaged ({what}); repair the image first",
                self.name()
            ))),
        }
    }

    /// Takes a snapshot. No request is running.
    pub(crate) async fn take_snapshot(
        self: &Rc<Self>,
        name: &str,
        date: (u32, u32),
        vm_clock: u64,
    ) -> Result<()> {
        self.check_snapshots()?;
        if name.len() > MAX_NAME {
            return Err(BlockError::invalid(format!("A snapshot's name has at most {MAX_NAME} bytes")));
        }
        let list = self.snapshots.borrow().list.clone();
        if list.len() as u64 >= u64::from(MAX_SNAPSHOTS) {
            return Err(BlockError::from_errno(BlockError::EFBIG)
                .with_message(format!("image '{}' has {MAX_SNAPSHOTS} snapshots already", self.name())));
        }
        let highest = list.iter().filter_map(|s| s.id.parse::<u64>().ok()).max().unwrap_or(0);
        let new = Snapshot {
            id: highest.saturating_add(1).to_string(),
            name: name.to_owned(),
            date,
            vm_clock,
            vm_state_size: 0,
            disk_size: self.size.get(),
            icount: None,
            l1: HostOffset(0),
            l1_entries: self.l1.borrow().entries.len() as u32,
            unknown: Vec::new(),
        };
        self.changing_snapshots("qcow2-snapshot", move |core| {
            Box::pin(async move { core.take_now(list, new).await })
        })
        .await
    }

    /// Deletes the snapshot number `index` of the list. No request is running.
    pub(crate) async fn delete_snapshot(self: &Rc<Self>, index: usize) -> Result<Snapshot> {
        self.check_snapshots()?;
        let mut list = self.snapshots.borrow().list.clone();
        if index >= list.len() {
            return Err(BlockError::invalid(format!(
                "image '{}' has no snapshot number {index}",
                self.name()
            )));
        }
        let gone = list.remove(index);
        let old = gone.clone();
        self.changing_snapshots("qcow2-snapshot", move |core| {
            Box::pin(async move { core.delete_now(list, &old).await })
        })
        .await?;
        Ok(gone)
    }

    /// Runs `change` with everything in the file and the image marked dirty, to its end even if the caller goes.
    async fn changing_snapshots(
        self: &Rc<Self>,
        name: &'static str,
        change: impl FnOnce(Rc<Core>) -> block::Io<'static> + 'static,
    ) -> Result<()> {
        self.settle_all().await?;
        let core = self.clone();
        self.detached(name, async move {
            core.mark_changing().await?;
            let done = change(core.clone()).await;
            core.space.close_packed_data();
            // The image stays marked if that fails, and closing it tries again.
            let _marked = core.settle_metadata().await;
            core.order.set_lazy(core.wants_lazy());
            done
        })
        .await
    }

    async fn mark_changing(self: &Rc<Self>) -> Result<()> {
        if self.geo.version() < 3 {
            return Ok(());
        }
        self.header.borrow_mut().incompatible |= INCOMPAT_DIRTY;
        let marked = self.write_features().await;
        if marked.is_err() {
            self.header.borrow_mut().incompatible &= !INCOMPAT_DIRTY;
        }
        marked
    }

    async fn take_now(self: &Rc<Self>, list: Vec<Snapshot>, mut new: Snapshot) -> Result<()> {
        let l1 = self.l1.borrow().entries.clone();
        let (counted, raised) = self.count(&l1, Way::Up, u64::MAX).await;
        let made = match raised {
            Ok(()) => self.take_counted(list, &mut new, &l1).await,
            failed => failed,
        };
        if made.is_err() && !self.corrupt.get() {
            // The tables name the old snapshots only: the new counts go, and the flags come back.
            // What fails here is a count too high, or a flag that is due.
            let (_, lowered) = self.count(&l1, Way::Down, counted).await;
            if lowered.is_ok() {
                let _due = self.flags_before_counts().await;
            }
        }
        made
    }

    /// The rest of taking a snapshot, once everything it shares is counted.
    async fn take_counted(
        self: &Rc<Self>,
        mut list: Vec<Snapshot>,
        new: &mut Snapshot,
        l1: &[u64],
    ) -> Result<()> {
        let shared: Vec<u8> = l1.iter().flat_map(|raw| (raw & !COPIED).to_be_bytes()).collect();
        let (l1_at, l1_clusters) = self.place(shared).await?;
        new.l1 = l1_at;
        list.push(new.clone());
        let placed = self.place(encode(&list)).await;
        let done = match &placed {
            Ok((at, _)) => self.name_table(list, *at, true).await,
            Err(e) => Err(e.clone()),
        };
        if done.is_ok() {
            self.note_meta(l1_at, l1.len() as u64 * 8, Meta::InactiveL1);
        }
        if done.is_err() && !self.corrupt.get() {
            self.free_clusters(self.geo.host_cluster(l1_at).0, l1_clusters, false);
            if let Ok((at, n)) = placed {
                self.free_clusters(self.geo.host_cluster(at).0, n, false);
            }
        }
        done
    }

    async fn delete_now(self: &Rc<Self>, list: Vec<Snapshot>, gone: &Snapshot) -> Result<()> {
        let l1 = self.snapshot_l1(gone).await?;
        let (at, clusters) = self.place(encode(&list)).await?;
        if let Err(e) = self.name_table(list, at, false).await {
            if !self.corrupt.get() {
                self.free_clusters(self.geo.host_cluster(at).0, clusters, false);
            }
            return Err(e);
        }
        // The snapshot is deleted. From here on a failure leaks space, no more: to tell of it as of a failed deletion would have
        // the client try again what is done.
        let (_, lowered) = self.count(&l1, Way::Down, u64::MAX).await;
        let (first, clusters) =
            (self.geo.host_cluster(gone.l1).0, self.geo.clusters_for(l1.len() as u64 * 8));
        self.meta.borrow_mut().remove(first, Meta::InactiveL1);
        self.free_clusters(first, clusters, false);
        match lowered {
            Err(e) if self.corrupt.get() => Err(e),
            _ => {
                let _due = self.flags_before_counts().await;
                Ok(())
            }
        }
    }

    /// Lowered counts go to the file behind the flags that follow from them: a flag whose count is still too high is a leak, a
    /// count of one without its flag would be taken for damage.
    async fn flags_before_counts(self: &Rc<Self>) -> Result<()> {
        self.set_flags().await?;
        self.commit().await
    }

    /// Space for `bytes` and them in it: where, and how many clusters. Nothing for nothing.
    async fn place(self: &Rc<Self>, bytes: Vec<u8>) -> Result<(HostOffset, u64)> {
        let n = self.geo.clusters_for(bytes.len() as u64);
        if n == 0 {
            return Ok((HostOffset(0), 0));
        }
        let first = self.adjoining(n).await?;
        let at = self.host_start(first)?;
        match self.file.write(at.0, bytes.into()).await {
            Ok(()) => Ok((at, n)),
            Err(e) => {
                self.give_back(first, n);
                Err(e)
            }
        }
    }

    /// Counts and tables are durable; then the flags of the active tables are, if they change; then the header names the table at
    /// `at`, which holds `list`. What it named before is given back.
    async fn name_table(self: &Rc<Self>, list: Vec<Snapshot>, at: HostOffset, flags: bool) -> Result<()> {
        self.order.data_before_mapping();
        self.commit().await?;
        self.barriers().await?;
        if flags {
            self.set_flags().await?;
        }
        let (old_count, old_at, before, after) = {
            let mut h = self.header.borrow_mut();
            let (count_now, at_now, before) = (h.snapshot_count, h.snapshots_offset, h.patch_snapshots());
            h.snapshot_count = list.len() as u32;
            h.snapshots_offset = at;
            (count_now, at_now, before, h.patch_snapshots())
        };
        if let Err(e) = self.point_header(after, before).await {
            let mut h = self.header.borrow_mut();
            h.snapshot_count = old_count;
            h.snapshots_offset = old_at;
            return Err(e);
        }
        let len = encode(&list).len() as u64;
        let old = self.snapshots.replace(Snapshots { list, len, damage: None });
        let first = self.geo.host_cluster(old_at).0;
        self.meta.borrow_mut().remove(first, Meta::SnapshotTable);
        self.free_clusters(first, self.geo.clusters_for(old.len), false);
        self.note_meta(at, len, Meta::SnapshotTable);
        Ok(())
    }

    /// Everything that an L1 table reaches gets one reference more or less, but at most `limit` references: how many it were.
    async fn count(self: &Rc<Self>, l1: &[u64], way: Way, limit: u64) -> (u64, Result<()>) {
        let mut counting = Counting { way, left: limit, done: 0, gone: Vec::new() };
        let result = self.count_all(l1, &mut counting).await;
        (counting.done, result)
    }

    async fn count_all(self: &Rc<Self>, l1: &[u64], counting: &mut Counting) -> Result<()> {
        let bits = self.geo.cluster_bits();
        for (index, raw) in l1.iter().enumerate() {
            let Some(table) = self.decode_l1(index, *raw)? else { continue };
            if counting.left == 0 {
                break;
            }
            let bytes = self.read_table(table).await?;
            self.one_reference(self.geo.host_cluster(table).0, counting).await?;
            for i in 0..self.geo.l2_entries() {
                let clusters = match self.decode_l2(&bytes, i)? {
                    L2Entry::Compressed(c) => c.at.0 >> bits..((c.at.0 + c.len - 1) >> bits) + 1,
                    entry => match entry.host() {
                        Some(host) => host.0 >> bits..(host.0 >> bits) + 1,
                        None => continue,
                    },
                };
                for c in clusters {
                    self.one_reference(c, counting).await?;
                }
            }
            self.discard_gone(std::mem::take(&mut counting.gone)).await;
            if self.rb.borrow().is_crowded() {
                match counting.way {
                    Way::Up => self.commit().await?,
                    Way::Down => self.flags_before_counts().await?,
                }
            }
        }
        Ok(())
    }

    async fn one_reference(self: &Rc<Self>, c: u64, counting: &mut Counting) -> Result<()> {
        if counting.left == 0 {
            return Ok(());
        }
        let slot = self.loaded_counts(c).await?;
        let Some((slot, n)) = slot.map(|s| (s, self.refcount(s, c))).filter(|(_, n)| *n > 0) else {
            let text = format!("refcount of a cluster in use was 0 (cluster {c:#x})");
            return Err(self.found_corrupt(text, Some(c << self.geo.cluster_bits()), None));
        };
        match counting.way {
            Way::Up if n == self.geo.refcount_max() => {
                return Err(BlockError::invalid(format!(
                    "image '{}': a cluster has {n} users, and refcounts of {} bits count no more",
                    self.name(),
                    self.geo.refcount_bits()
                )));
            }
            Way::Up => {
                self.set_refcount(slot, c, n + 1);
            }
            Way::Down => {
                self.drop_reference(slot, c, n);
                if n == 1 {
                    counting.gone.push(c);
                }
            }
        }
        self.flags_due.set(true);
        counting.left -= 1;
        counting.done += 1;
        Ok(())
    }

    /// Gives clusters that nobody uses any more back to the host. Nobody looks for space meanwhile.
    async fn discard_gone(&self, mut gone: Vec<u64>) {
        if !self.opts.borrow().pass_discard_snapshot {
            return;
        }
        gone.sort_unstable();
        let bits = self.geo.cluster_bits();
        for run in gone.chunk_by(|a, b| a + 1 == *b) {
            // A host that cannot discard keeps the space; that is all.
            let _kept_on_error =
                self.file.discard(Span::new(run[0] << bits, (run.len() as u64) << bits)).await;
        }
    }

    fn decode_l1(self: &Rc<Self>, index: usize, raw: u64) -> Result<Option<HostOffset>> {
        match self.geo.l1_entry(raw) {
            Ok(e) => Ok(e.map(|e| e.l2)),
            Err(fault) => {
                let text = format!("L2 table offset: {fault} (L1 index: {index:#x})");
                Err(self.found_corrupt(text, None, None))
            }
        }
    }

    fn decode_l2(self: &Rc<Self>, table: &[u8], index: u64) -> Result<L2Entry> {
        let at = (index * self.geo.l2_entry_size()) as usize;
        let bitmap = if self.geo.extended_l2() { be(table, at + 8, 8) } else { 0 };
        self.geo.l2_entry(be(table, at, 8), bitmap).map_err(|fault| {
            self.found_corrupt(format!("L2 entry: {fault} (L2 index: {index:#x})"), None, None)
        })
    }

    async fn read_table(&self, at: HostOffset) -> Result<Vec<u8>> {
        let data = self.file.read(Span::new(at.0, self.geo.cluster_size())).await;
        let named =
            |e: BlockError| e.context(format_args!("image '{}': reading an L2 table at {at}", self.name()));
        Ok(data.map_err(named)?.to_vec())
    }

    /// Brings the flags in line that an earlier change of snapshots could not. No request is running, no change is only cached.
    pub(crate) async fn set_due_flags(self: &Rc<Self>) -> Result<()> {
        if self.flags_due.get() { self.set_flags().await } else { Ok(()) }
    }

    /// Brings the COPIED flags of the active tables in line with the counts, in the file, durably.
    async fn set_flags(self: &Rc<Self>) -> Result<()> {
        let size = self.geo.l2_entry_size() as usize;
        // a write of the L1 table that failed may have changed it in part
        let mut changed = self.flags_due.replace(true);
        // what is cached of the tables has the old flags; nothing there is dirty
        self.l2.borrow_mut().clear();
        let mut l1 = self.l1.borrow().entries.clone();
        for (index, slot) in l1.iter_mut().enumerate() {
            let Some(table) = self.decode_l1(index, *slot)? else { continue };
            let mut bytes = self.read_table(table).await?;
            let mut dirty = false;
            for i in 0..self.geo.l2_entries() {
                let entry = self.decode_l2(&bytes, i)?;
                let Some(host) = entry.host() else { continue };
                let alone = self.is_alone(host).await?;
                if alone != entry.copied() {
                    // the flag is the first bit
                    bytes[i as usize * size] ^= 0x80;
                    dirty = true;
                }
            }
            if dirty {
                self.file.write(table.0, Data::from(bytes)).await?;
            }
            let raw = self.geo.encode_l1(table, self.is_alone(table).await?);
            changed |= raw != *slot;
            *slot = raw;
        }
        if changed {
            let bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
            let at = self.l1.borrow().at;
            self.file.write(at.0, bytes.into()).await?;
            self.l1.borrow_mut().entries = l1;
        }
        self.file.barrier().await?;
        self.flags_due.set(false);
        Ok(())
    }

    async fn is_alone(self: &Rc<Self>, at: HostOffset) -> Result<bool> {
        let c = self.geo.host_cluster(at).0;
        let slot = self.loaded_counts(c).await?;
        Ok(slot.is_some_and(|s| self.refcount(s, c) == 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_as_they_were_written() {
        let s = Snapshot {
            id: "17".into(),
            name: "before the update".into(),
            date: (1_700_000_000, 5),
            vm_clock: 1 << 40,
            vm_state_size: 1 << 33,
            disk_size: 1 << 45,
            icount: Some(3),
            l1: HostOffset(0x30000),
            l1_entries: 7,
            unknown: vec![1, 2, 3, 4, 5, 6, 7, 8],
        };
        let bytes = encode(&[s.clone(), Snapshot { icount: None, ..s.clone() }]);
        assert_eq!(bytes.len() % 16, 0);
        let (one, two) = bytes.split_at(bytes.len() / 2);
        assert_eq!(Snapshot::decode(&one[..40], &one[40..], 0), s);
        assert_eq!(Snapshot::decode(&two[..40], &two[40..], 0).icount, None);
        // an entry without further data, as version 2 has it
        let mut old = one[..40].to_vec();
        old[36..40].copy_from_slice(&[0; 4]);
        let read = Snapshot::decode(&old, &one[40 + 32..], 99);
        assert_eq!((read.disk_size, read.vm_state_size, read.id.as_str()), (99, u64::from(u32::MAX), "17"));
    }
}
