//! What one request of a guest consists of: its descriptor chain, read once and checked.
//!
//! What can happen: everything, since a guest may write anything into its rings: chains that loop, indices past the table,
//! tables inside tables, buffers outside its memory, buffers to read behind buffers to write. What must stay true: each
//! descriptor is read once, and what is returned was checked; a walk ends after [`MAX_SEGMENTS`] steps.
//! Layout: Virtual I/O Device specification 1.2, sections 2.7 and 2.8.

use super::{lane, packed};
use env::os::shared::vm_memory::{Bytes, GuestAddress};
use env::os::shared::{GuestMemory, Piece};
use smallvec::SmallVec;
use virtio_queue::desc::split::Descriptor;

/// Most buffers of one request. We announce 126 data segments; drivers that ignore that are bounded by their queue, and
/// this keeps a table of 65,535 entries from holding up the thread.
pub(super) const MAX_SEGMENTS: usize = 1024;

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

/// Buffers in the order of the chain.
pub(super) type Pieces = SmallVec<[Piece; 4]>;

/// A request's buffers.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// What the guest wrote for us.
    pub(super) readable: Pieces,
    /// Where the guest wants our answer.
    pub(super) writable: Pieces,
    /// Bytes of those.
    pub(super) readable_len: u64,
    /// Bytes of those.
    pub(super) writable_len: u64,
}

/// Reads the chain that begins at descriptor `head` of the table of `size` entries at guest address `table`. The error says
/// what is wrong with it.
pub(super) fn walk(memory: &GuestMemory, table: u64, size: u16, head: u16) -> Result<Chain, &'static str> {
    let mut chain = Chain::default();
    let (mut table, mut size, mut index, mut inside) = (table, u32::from(size), u32::from(head), false);
    for _ in 0..=MAX_SEGMENTS {
        if index >= size {
            return Err("a descriptor index is past the end of its table");
        }
        let at = table.checked_add(u64::from(index) * DESCRIPTOR).ok_or("a descriptor table wraps around")?;
        let d: Descriptor = memory
            .space()
            .read_obj(GuestAddress(at))
            .map_err(|_| "a descriptor lies outside the guest's memory")?;
        if d.refers_to_indirect_table() {
            if inside || d.has_next() {
                return Err("an indirect descriptor stands where none may be");
            }
            if d.len() == 0 || !u64::from(d.len()).is_multiple_of(DESCRIPTOR) {
                return Err("an indirect table has a bad length");
            }
            (table, size, index, inside) = (d.addr().0, d.len() / DESCRIPTOR as u32, 0, true);
            continue;
        }
        chain.add(memory, Piece { at: d.addr().0, len: d.len() }, d.is_write_only())?;
        if !d.has_next() {
            return Ok(chain);
        }
        index = u32::from(d.next());
    }
    Err("a descriptor chain has too many buffers or is a loop")
}

/// The buffers of a packed ring's request, which consists of these descriptors, read already. In a table that one of them
/// names all entries count, one after the other. The error says what is wrong.
pub(super) fn of_list(memory: &GuestMemory, list: &[lane::Descriptor]) -> Result<Chain, &'static str> {
    let mut chain = Chain::default();
    let add = |chain: &mut Chain, d: &lane::Descriptor| {
        chain.add(memory, Piece { at: d.at, len: d.len }, d.flags & packed::WRITE != 0)
    };
    for d in list {
        if d.flags & packed::INDIRECT == 0 {
            add(&mut chain, d)?;
            continue;
        }
        if list.len() > 1 {
            return Err("an indirect descriptor stands where none may be");
        }
        if d.len == 0 || !u64::from(d.len).is_multiple_of(DESCRIPTOR) {
            return Err("an indirect table has a bad length");
        }
        let entries = u64::from(d.len) / DESCRIPTOR;
        if entries > MAX_SEGMENTS as u64 {
            return Err("a descriptor chain has too many buffers or is a loop");
        }
        for n in 0..entries {
            let at = d.at.checked_add(n * DESCRIPTOR).ok_or("a descriptor table wraps around")?;
            let entry = packed::read(memory, at)?;
            if entry.flags & packed::INDIRECT != 0 {
                return Err("an indirect descriptor stands where none may be");
            }
            add(&mut chain, &entry)?;
        }
    }
    Ok(chain)
}

impl Chain {
    fn add(&mut self, memory: &GuestMemory, piece: Piece, is_write_only: bool) -> Result<(), &'static str> {
        if piece.len == 0 {
            return Err("a buffer is empty");
        }
        if !memory.has(piece) {
            return Err("a buffer lies outside the guest's memory");
        }
        let (list, total) = if is_write_only {
            (&mut self.writable, &mut self.writable_len)
        } else if self.writable.is_empty() {
            (&mut self.readable, &mut self.readable_len)
        } else {
            return Err("a buffer to read stands behind one to write");
        };
        list.push(piece);
        *total += u64::from(piece.len);
        if *total > u64::from(u32::MAX) {
            return Err("a request is longer than 4 GiB");
        }
        Ok(())
    }
}
