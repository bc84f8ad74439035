//! A split ring: descriptors, and one ring of numbers each way. Layout: Virtual I/O Device specification 1.2, section 2.7.

use super::chain::{self, Chain};
use super::inflight::RingLog;
use super::lane::{Basis, Layout, Opened, Token};
use block::{BlockError, Result};
use env::os::shared::vm_memory::{Bytes, GuestAddress};
use env::os::shared::{GuestMemory, Piece};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};

/// The driver does not want to be told (flag of the available ring).
const NO_INTERRUPT: u16 = 1;
/// Bytes of the used ring beside its entries: flags, index, the event's index.
const USED_HEADER: u32 = 6;
/// Bytes of an entry.
const USED_ENTRY: u32 = 8;

/// A split ring.
pub(super) struct Split {
    queue: Queue,
    log: Option<RingLog>,
}

fn bad_layout(e: impl std::fmt::Display) -> BlockError {
    BlockError::invalid(format!("virtqueue: {e}"))
}

fn new_queue(memory: &GuestMemory, at: Layout, event_idx: bool) -> Result<Queue> {
    let mut queue = Queue::new(at.size).map_err(bad_layout)?;
    queue.try_set_desc_table_address(GuestAddress(at.descriptors)).map_err(bad_layout)?;
    queue.try_set_avail_ring_address(GuestAddress(at.available)).map_err(bad_layout)?;
    queue.try_set_used_ring_address(GuestAddress(at.used)).map_err(bad_layout)?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    if !queue.is_valid(memory.space()) {
        return Err(BlockError::invalid("virtqueue: a ring lies outside the guest's memory"));
    }
    Ok(queue)
}

impl Split {
    pub(super) fn start(memory: &GuestMemory, b: Basis) -> Result<(Split, VecDeque<Opened>)> {
        let mut queue = new_queue(memory, b.layout, b.event_idx)?;
        let used = queue.used_idx(memory.space(), Ordering::Acquire).map_err(bad_layout)?.0;
        queue.set_next_used(used);
        let base =
            u16::try_from(b.base).map_err(|_| BlockError::invalid("virtqueue: a bad ring position"))?;
        queue.set_next_avail(base);
        let Some(inflight) = b.log else { return Ok((Split { queue, log: None }, VecDeque::new())) };
        let (log, open) = RingLog::recover(&inflight, b.index, b.layout.size, used)?;
        // whatever was taken was answered, up to the used index, or is open: the front end may not know how many
        queue.set_next_avail(used.wrapping_add(open.len() as u16));
        let opened = |head| Opened { token: Token { head, ..Token::default() }, ..Opened::default() };
        Ok((Split { queue, log: Some(log) }, open.into_iter().map(opened).collect()))
    }

    pub(super) fn remap(&mut self, memory: &GuestMemory, at: Layout) -> Result<()> {
        let mut new = new_queue(memory, at, self.queue.event_idx_enabled())?;
        new.set_next_avail(self.queue.next_avail());
        new.set_next_used(self.queue.next_used());
        self.queue = new;
        Ok(())
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.queue.next_avail())
    }

    pub(super) fn take(&mut self, memory: &GuestMemory) -> Result<Option<Opened>, &'static str> {
        let mut available =
            self.queue.iter(memory.space()).map_err(|_| "the available ring's index jumped")?;
        let head = available.next().map(|c| c.head_index());
        Ok(head.map(|head| Opened { token: Token { head, ..Token::default() }, ..Opened::default() }))
    }

    pub(super) fn begin(
        &mut self,
        memory: &GuestMemory,
        token: Token,
    ) -> Result<(Token, Chain), &'static str> {
        let chain = chain::walk(memory, self.queue.desc_table(), self.queue.size(), token.head);
        if let Some(log) = &mut self.log {
            log.begin(token.head).map_err(|_| "a descriptor is past the end of the in-flight log")?;
        }
        Ok((token, chain?))
    }

    pub(super) fn answer(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Option<()> {
        if let Some(log) = &self.log {
            log.answer(head).ok()?;
        }
        self.queue.add_used(memory.space(), head, written).ok()?;
        match &self.log {
            Some(log) => log.answered(head, self.queue.next_used()).ok(),
            None => Some(()),
        }
    }

    pub(super) fn wants_call(&mut self, memory: &GuestMemory) -> bool {
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(memory.space()).unwrap_or(true);
        }
        let flags = memory.space().load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::SeqCst);
        flags.map_or(true, |f| u16::from_le(f) & NO_INTERRUPT == 0)
    }

    pub(super) fn ask_for_bell(&mut self, memory: &GuestMemory) -> Option<bool> {
        self.queue.enable_notification(memory.space()).ok()
    }

    pub(super) fn no_bell(&mut self, memory: &GuestMemory) {
        // what cannot be written now cannot be answered either, and that stops the queue
        let _ = self.queue.disable_notification(memory.space());
    }

    pub(super) fn log_is_broken(&self) -> bool {
        self.log.as_ref().is_some_and(RingLog::is_broken)
    }

    /// The used ring: its index and one entry, or where it says what it waits for.
    pub(super) fn written(&self, used: u64) -> Piece {
        Piece { at: used, len: USED_HEADER + USED_ENTRY * u32::from(self.queue.size()) }
    }
}
