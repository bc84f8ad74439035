//! Persistent dirty bitmaps: how they lie in the file, and loading them.
//!
//! The header's extension names a directory, each entry of that a table, each entry of that a cluster of bits (or says that
//! all bits of that cluster are 0, or 1). While an image is open for writing each entry of the directory is marked
//! *in use*: what is in the file may lack changes. Bitmaps found so marked are *inconsistent*; they can be listed and
//! removed, no more.
//!
//! What can happen: a hostile directory. What must stay true then: memory is bounded by the file's length (each cluster counts
//! once, however often it is named) and a bitmap's share of that by [`MAX_BITS_BYTES`]; the error names the bitmap.

use crate::core::{Core, Loading};
use crate::header::{BitmapDirectory, MAX_BITMAPS};
use crate::types::{Geometry, HostOffset, MAX_HOST_OFFSET};
use bitmap::{Bitmap, BitmapList, DirtyBitmap, MAX_GRANULARITY, MIN_GRANULARITY};
use block::{BlockError, Data, Result, Span};
use graph::node::Fact;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

/// The entry's bitmap may lack changes.
pub(crate) const IN_USE: u32 = 1;
/// The bitmap records as soon as the image is open for writing.
pub(crate) const AUTO: u32 = 2;
/// The type of all bitmaps there are.
const DIRTY_TRACKING: u8 = 1;
/// Bytes of an entry before its extra data and name.
const FIXED: usize = 24;
/// Longest name in bytes.
const MAX_NAME: usize = 1023;
/// Most entries of a bitmap's table, as the reference allows.
const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// Most bytes of bits of a bitmap, as the reference allows.
pub(crate) const MAX_BITS_BYTES: u64 = 0x2000_0000;
/// Bits of a table entry that say where the cluster is.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
/// A table entry without a cluster, all of whose bits are 1.
pub(crate) const ALL_ONES: u64 = 1;

/// A bitmap as the directory in the file has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    pub(crate) table: HostOffset,
    pub(crate) entries: u32,
    pub(crate) flags: u32,
    pub(crate) granularity_bits: u8,
    pub(crate) name: String,
}

impl Entry {
    /// As queries show it (QMP: Qcow2BitmapInfo).
    pub(crate) fn fact(&self) -> Fact {
        let text = |s: &str| Fact::Text(s.to_owned());
        let flags = [(IN_USE, "in-use"), (AUTO, "auto")];
        let set = flags.iter().filter(|(bit, _)| self.flags & bit != 0);
        Fact::Record(vec![
            ("flags", Fact::List(set.map(|(_, name)| text(name)).collect())),
            ("name", text(&self.name)),
            ("granularity", Fact::Number(1 << self.granularity_bits)),
        ])
    }
}

/// The bitmaps of an open image.
#[derive(Default)]
pub(crate) struct Bitmaps {
    /// The node's bitmaps, persistent or not.
    list: RefCell<BitmapList>,
    /// What the directory in the file says.
    pub(crate) directory: RefCell<Vec<Entry>>,
    /// They have been loaded.
    loaded: Cell<bool>,
    /// Somebody changes the directory.
    pub(crate) changing: Loading,
}

impl Bitmaps {
    /// From now on the node's bitmaps are in `list`.
    pub(crate) fn share(&self, list: &BitmapList) {
        let before = self.list.replace(list.clone());
        if !Rc::ptr_eq(&before, list) {
            list.borrow_mut().append(&mut before.borrow_mut());
        }
    }

    /// Those that the image keeps.
    pub(crate) fn persistent(&self) -> Vec<Rc<DirtyBitmap>> {
        let list = self.list.borrow();
        let list = list.borrow();
        list.iter().filter(|b| b.persistent() && b.name().is_some()).cloned().collect()
    }

    /// Forgets those that the image keeps; they are in the file. The directory is known still.
    pub(crate) fn unload(&self) {
        let list = self.list.borrow();
        list.borrow_mut().retain(|b| !b.persistent());
        self.loaded.set(false);
    }

    /// Whether those that are stored can be changed.
    pub(crate) fn set_readonly(&self, on: bool) {
        self.persistent().iter().for_each(|b| b.set_readonly(on));
    }
}

fn be<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(there) = bytes.get(at..at + N) {
        out.copy_from_slice(there);
    }
    out
}

/// Bytes of bits of a bitmap of `len` bytes.
pub(crate) fn bits_bytes(len: u64, granularity_bits: u8) -> u64 {
    len.div_ceil(1 << granularity_bits).div_ceil(8)
}

/// Entries of the table of a bitmap of `len` bytes: at least one, since the format knows no empty tables.
pub(crate) fn table_entries(g: &Geometry, len: u64, granularity_bits: u8) -> u64 {
    g.clusters_for(bits_bytes(len, granularity_bits)).max(1)
}

/// Bytes of an entry in the directory.
pub(crate) fn entry_len(name: &str) -> u64 {
    (FIXED + name.len()).next_multiple_of(8) as u64
}

/// Takes a directory apart.
pub(crate) fn parse_directory(g: &Geometry, bytes: &[u8], count: u32) -> Result<Vec<Entry>> {
    let (mut out, mut at) = (Vec::new(), 0usize);
    let mut names = BTreeSet::new();
    for i in 0..count {
        let bad = |why: String| BlockError::invalid(format!("bitmap directory: entry {i}: {why}"));
        let Some(head) = bytes.get(at..at.saturating_add(FIXED)) else {
            return Err(bad("the directory ends before it".to_owned()));
        };
        let table = u64::from_be_bytes(be(head, 0));
        let entries = u32::from_be_bytes(be(head, 8));
        let flags = u32::from_be_bytes(be(head, 12));
        let (kind, granularity_bits) = (head[16], head[17]);
        let name_len = usize::from(u16::from_be_bytes(be(head, 18)));
        let extra = u32::from_be_bytes(be(head, 20));
        if extra != 0 {
            return Err(bad(format!("{extra} bytes of extra data, which are not supported")));
        }
        let Some(name) = bytes.get(at + FIXED..at + FIXED + name_len) else {
            return Err(bad(format!("the directory ends inside its name of {name_len} bytes")));
        };
        if !(1..=MAX_NAME).contains(&name_len) {
            return Err(bad(format!("a name of {name_len} bytes")));
        }
        let Ok(name) = std::str::from_utf8(name) else {
            return Err(bad("its name is not UTF-8".to_owned()));
        };
        let bad = |why: String| bad(format!("bitmap '{name}': {why}"));
        if kind != DIRTY_TRACKING || flags & !(IN_USE | AUTO) != 0 {
            return Err(bad(format!("unknown type ({kind}) or flags ({flags:#x})")));
        }
        let bits = MIN_GRANULARITY.trailing_zeros()..=MAX_GRANULARITY.trailing_zeros();
        if !bits.contains(&u32::from(granularity_bits)) {
            return Err(bad(format!("granularity 2^{granularity_bits} is not supported")));
        }
        let fits = table.checked_add(u64::from(entries) * 8).is_some_and(|end| end <= MAX_HOST_OFFSET);
        if table == 0 || g.in_cluster(table) != 0 || !fits {
            return Err(bad(format!("invalid table offset ({table:#x})")));
        }
        if entries == 0 || entries > MAX_TABLE_ENTRIES {
            return Err(bad(format!("invalid table size ({entries})")));
        }
        if !names.insert(name) {
            return Err(bad("there are two of that name".to_owned()));
        }
        out.push(Entry { table: HostOffset(table), entries, flags, granularity_bits, name: name.to_owned() });
        at += (FIXED + name_len).next_multiple_of(8);
    }
    if at != bytes.len() {
        return Err(BlockError::invalid(format!(
            "bitmap directory: {} bytes long, but its {count} entries have {at}",
            bytes.len()
        )));
    }
    Ok(out)
}

/// The bytes of a directory.
pub(crate) fn encode_directory(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for e in entries {
        out.extend_from_slice(&e.table.0.to_be_bytes());
        out.extend_from_slice(&e.entries.to_be_bytes());
        out.extend_from_slice(&e.flags.to_be_bytes());
        out.extend_from_slice(&[DIRTY_TRACKING, e.granularity_bits]);
        // names are at most MAX_NAME bytes
        out.extend_from_slice(&(e.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&0u32.to_be_bytes());
        out.extend_from_slice(e.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

/// Where the cluster of a table's entry is, if it has one.
pub(crate) fn table_place(g: &Geometry, raw: u64) -> Result<Option<HostOffset>> {
    let place = raw & PLACE;
    let odd = raw & !PLACE & !ALL_ONES != 0 || raw & ALL_ONES != 0 && place != 0;
    if odd || g.in_cluster(place) != 0 {
        return Err(BlockError::invalid(format!("table entry {raw:#x} is invalid")));
    }
    Ok((place != 0).then_some(HostOffset(place)))
}

impl Core {
    /// Reads the image's bitmaps into memory. They are read-only until the image is made writable.
    pub(crate) async fn load_bitmaps(self: &Rc<Self>) -> Result<()> {
        // An internal snapshot has another disk than the one they are of.
        if self.bitmaps.loaded.replace(true) || self.opts.borrow().snapshot.is_some() {
            return Ok(());
        }
        self.load_directory().await?;
        let entries = self.bitmaps.directory.borrow().clone();
        // Each cluster of the file can serve once.
        let mut budget = self.geo.clusters_for(self.file.len());
        for e in &entries {
            if self.bitmaps.list.borrow().borrow().iter().any(|b| b.name() == Some(&e.name)) {
                // made here while somebody else used the image
                let (image, name) = (self.name(), &e.name);
                let why = format!("image '{image}': it has a bitmap '{name}', and so has the node");
                return Err(BlockError::invalid(why));
            }
            let read = self.load_bitmap(e, &mut budget).await;
            let bits =
                read.map_err(|e2| e2.context(format_args!("image '{}': bitmap '{}'", self.name(), e.name)))?;
            let bitmap = DirtyBitmap::new(Some(e.name.clone()), bits.len(), bits.granularity())?;
            *bitmap.bits_mut() = bits;
            bitmap.set_persistent(true);
            bitmap.set_enabled(e.flags & AUTO != 0);
            bitmap.set_readonly(true);
            if e.flags & IN_USE != 0 {
                bitmap.set_inconsistent();
            }
            self.bitmaps.list.borrow().borrow_mut().push(Rc::new(bitmap));
        }
        Ok(())
    }

    /// Reads which bitmaps the image has.
    pub(crate) async fn load_directory(self: &Rc<Self>) -> Result<()> {
        let place = self.header.borrow().bitmaps()?;
        let entries = match place {
            Some(place) => self.read_directory(place).await?,
            None => Vec::new(),
        };
        *self.bitmaps.directory.borrow_mut() = entries;
        Ok(())
    }

    async fn read_directory(&self, place: BitmapDirectory) -> Result<Vec<Entry>> {
        let at = Span::new(place.at.0, place.len);
        let named = |e: BlockError| e.context(format_args!("image '{}'", self.name()));
        if at.end() > self.file.len().next_multiple_of(self.geo.cluster_size()) {
            let why = format!("bitmap directory at {at}: the file has {} bytes", self.file.len());
            return Err(named(BlockError::invalid(why)));
        }
        let bytes = self.file.read(at).await.map_err(named)?.contiguous();
        parse_directory(&self.geo, &bytes, place.count).map_err(named)
    }

    /// The bits of a bitmap; none if they may lack changes.
    async fn load_bitmap(&self, e: &Entry, budget: &mut u64) -> Result<Bitmap> {
        let len = self.size.get();
        let bytes = bits_bytes(len, e.granularity_bits);
        if bytes > MAX_BITS_BYTES {
            return Err(BlockError::invalid(format!("granularity 2^{} is too fine", e.granularity_bits)));
        }
        let mut bits = Bitmap::new(len, 1 << e.granularity_bits)?;
        if e.flags & IN_USE != 0 {
            return Ok(bits);
        }
        let wanted = table_entries(&self.geo, len, e.granularity_bits);
        if u64::from(e.entries) != wanted {
            let (have, g) = (e.entries, e.granularity_bits);
            return Err(BlockError::invalid(format!(
                "its table has {have} entries; a disk of {len} bytes at granularity 2^{g} needs {wanted}"
            )));
        }
        self.spend(budget, self.geo.clusters_for(wanted * 8))?;
        let table = self.read_bitmap_table(e).await?;
        let cluster = self.geo.cluster_size();
        for (i, raw) in (0u64..).zip(table) {
            let first = i * cluster;
            match table_place(&self.geo, raw)? {
                Some(at) => {
                    self.spend(budget, 1)?;
                    let data = self.file.read(Span::new(at.0, cluster)).await?.contiguous();
                    bits.import_bits(first, &data);
                    self.env.yield_now().await;
                }
                None if raw & ALL_ONES != 0 => {
                    let start = (first * 8) << e.granularity_bits;
                    let end = ((first + cluster) * 8).saturating_mul(1 << e.granularity_bits).min(len);
                    bits.set(Span::between(start.min(end), end));
                }
                None => {}
            }
        }
        Ok(bits)
    }

    fn spend(&self, budget: &mut u64, clusters: u64) -> Result<()> {
        match budget.checked_sub(clusters) {
            Some(left) => *budget = left,
            None => {
                let why = "the bitmaps have more clusters than the file: they overlap or lie behind its end";
                return Err(BlockError::invalid(why));
            }
        }
        Ok(())
    }

    /// The table of a bitmap, as stored.
    pub(crate) async fn read_bitmap_table(&self, e: &Entry) -> Result<Vec<u64>> {
        let at = Span::new(e.table.0, u64::from(e.entries) * 8);
        if at.end() > self.file.len().next_multiple_of(self.geo.cluster_size()) {
            let why = format!("its table at {at} is behind the end of the file ({} bytes)", self.file.len());
            return Err(BlockError::invalid(why));
        }
        let bytes = self.file.read(at).await?.contiguous();
        Ok(bytes.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect())
    }

    /// Before the first change of the image: what the file has may lack changes from now on. Durable after.
    pub(crate) async fn mark_bitmaps_in_use(self: &Rc<Self>) -> Result<()> {
        let Some(place) = self.header.borrow().bitmaps()? else {
            // A repair has given them up.
            if !self.bitmaps.directory.take().is_empty() {
                self.bitmaps.persistent().iter().for_each(|b| b.set_inconsistent());
            }
            return Ok(());
        };
        let mut marked = self.bitmaps.directory.borrow().clone();
        marked.iter_mut().for_each(|e| e.flags |= IN_USE);
        if marked != *self.bitmaps.directory.borrow() {
            // Nothing but flags changes, and no flags lie across sectors: any subset of the sectors is sound.
            self.file.write(place.at.0, Data::from(encode_directory(&marked))).await?;
            self.file.barrier().await?;
            *self.bitmaps.directory.borrow_mut() = marked;
        }
        Ok(())
    }

    /// Whether one more bitmap can be kept.
    pub(crate) fn check_bitmap(&self, name: &str, granularity: u64) -> Result<()> {
        if self.geo.version() < 3 {
            return Err(BlockError::invalid("Cannot store dirty bitmaps in qcow2 v2 files"));
        }
        if !self.active.get() {
            return Err(BlockError::invalid("Image is inactive"));
        }
        if !self.writable.get() {
            return Err(BlockError::invalid("Image is read-only"));
        }
        self.header
            .borrow()
            .check_room_for_bitmaps()
            .map_err(|e| e.context("No room in the image's header"))?;
        if name.len() > MAX_NAME {
            return Err(BlockError::invalid(format!("Name length exceeds maximum ({MAX_NAME} characters)")));
        }
        let kept = self.bitmaps.persistent();
        if kept.len() >= MAX_BITMAPS as usize {
            return Err(BlockError::invalid(format!("There are {MAX_BITMAPS} bitmaps in the image already")));
        }
        let names = kept.iter().filter_map(|b| b.name()).chain([name]);
        if names.map(entry_len).sum::<u64>() > crate::header::MAX_BITMAP_DIRECTORY {
            return Err(BlockError::invalid("No room in the bitmap directory"));
        }
        let bits = granularity.trailing_zeros() as u8;
        let len = self.size.get();
        let entries = table_entries(&self.geo, len, bits);
        if bits_bytes(len, bits) > MAX_BITS_BYTES || entries > u64::from(MAX_TABLE_ENTRIES) {
            return Err(BlockError::invalid(
                "Too much space will be occupied by the bitmap. Use larger granularity",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str) -> Entry {
        Entry {
            table: HostOffset(0x50000),
            entries: 1,
            flags: AUTO,
            granularity_bits: 16,
            name: name.to_owned(),
        }
    }

    #[test]
    fn a_directory_is_read_as_it_was_written() {
        let g = Geometry::new(3, 16, 4, false, false).expect("as usual");
        let all = [entry("a"), Entry { flags: IN_USE, granularity_bits: 31, ..entry("12345678") }];
        let bytes = encode_directory(&all);
        assert_eq!(bytes.len() as u64, entry_len("a") + entry_len("12345678"));
        assert_eq!(parse_directory(&g, &bytes, 2).expect("sound"), all);
        for cut in 0..bytes.len() {
            assert!(parse_directory(&g, &bytes[..cut], 2).is_err(), "cut at {cut}");
        }
        // Whatever bit is wrong: an error or another directory, never a panic.
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let _either = parse_directory(&g, &bytes, 2);
        }
        assert!(parse_directory(&g, &encode_directory(&[entry("a"), entry("a")]), 2).is_err());
        assert!(parse_directory(&g, &encode_directory(&[Entry { flags: 8, ..entry("a") }]), 1).is_err());
        assert!(
            parse_directory(&g, &encode_directory(&[Entry { granularity_bits: 8, ..entry("a") }]), 1)
                .is_err()
        );
    }

    #[test]
    fn tables_name_whole_clusters() {
        let g = Geometry::new(3, 16, 4, false, false).expect("as usual");
        assert_eq!(table_place(&g, 0).expect("clean"), None);
        assert_eq!(table_place(&g, ALL_ONES).expect("all ones"), None);
        assert_eq!(table_place(&g, 0x30000).expect("a cluster"), Some(HostOffset(0x30000)));
        for bad in [0x30001, 0x200, 2, 1 << 60] {
            assert!(table_place(&g, bad).is_err(), "{bad:#x}");
        }
    }
}
