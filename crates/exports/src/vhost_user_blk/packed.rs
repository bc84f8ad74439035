//! A packed ring: one ring of descriptors, which the driver makes available and we mark as used, each lap with the other value
//! of two flags. Layout: Virtual I/O Device specification 1.2, section 2.8.
//!
//! What can happen: the guest marks as available whatever it likes, more than there is room for, chains as long as the ring. What
//! must stay true: each descriptor is read once, after its chain's first one was seen to be available; never more
//! descriptors are taken than the ring has; an answer's flags are written after the rest of it.

use super::chain::MAX_SEGMENTS;
use super::lane::{Basis, Descriptor, Layout, List, Opened, Token};
use super::packed_log::PackedLog;
use block::{BlockError, Result};
use env::os::shared::vm_memory::{Bytes, GuestAddress};
use env::os::shared::{GuestMemory, Piece};
use std::collections::VecDeque;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

/// Bytes of a descriptor; where its parts are.
const DESCRIPTOR: u64 = 16;
const LEN: u64 = 8;
const ID: u64 = 12;
const FLAGS: u64 = 14;

/// Flags of a descriptor.
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;
const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// When somebody wants to be told: always, never, at one descriptor.
const TELL: u16 = 0;
const TELL_NOT: u16 = 1;
const TELL_AT: u16 = 2;
/// Bytes of the structure that says so: a position, and one of these.
const EVENT: u32 = 4;

/// A place in the ring, and whether the lap is an odd one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Position {
    pub(super) index: u16,
    pub(super) lap: bool,
}

impl Position {
    /// As it is written down: the lap is the highest bit.
    pub(super) fn from_bits(bits: u16, size: u16) -> Result<Position> {
        let index = bits & 0x7fff;
        if index >= size {
            return Err(BlockError::invalid(format!("virtqueue: position {index} in a ring of {size}")));
        }
        Ok(Position { index, lap: bits >> 15 == 1 })
    }

    fn bits(self) -> u16 {
        self.index | u16::from(self.lap) << 15
    }

    /// `count` (at most `size`) further.
    pub(super) fn after(self, count: u16, size: u16) -> Position {
        let next = u32::from(self.index) + u32::from(count);
        let around = next >= u32::from(size);
        let index = if around { next - u32::from(size) } else { next };
        Position { index: index as u16, lap: self.lap != around }
    }

    /// In two laps.
    fn absolute(self, size: u16) -> u32 {
        u32::from(self.index) + if self.lap { 0 } else { u32::from(size) }
    }
}

/// Whether descriptors with these flags were used in this lap.
pub(super) fn is_used(flags: u16, lap: bool) -> bool {
    (flags & AVAILABLE != 0) == lap && (flags & USED != 0) == lap
}

/// A packed ring.
pub(super) struct Packed {
    at: Layout,
    event_idx: bool,
    /// What is taken next, and answered next.
    available: Position,
    used: Position,
    /// Descriptors taken and not answered.
    out: u32,
    /// Descriptors used since the guest was asked whether it wants to know.
    since_asked: u32,
    log: Option<PackedLog>,
}

fn check(memory: &GuestMemory, at: Layout) -> Result<()> {
    let table = Piece { at: at.descriptors, len: DESCRIPTOR as u32 * u32::from(at.size) };
    let inside = [table, Piece { at: at.available, len: EVENT }, Piece { at: at.used, len: EVENT }];
    let aligned = at.descriptors.is_multiple_of(16) && (at.available | at.used).is_multiple_of(4);
    if at.size == 0 || at.size > 1 << 15 || !aligned || !inside.iter().all(|p| memory.has(*p)) {
        return Err(BlockError::invalid(
            "virtqueue: a ring lies outside the guest's memory or is misaligned",
        ));
    }
    Ok(())
}

impl Packed {
    pub(super) fn start(memory: &GuestMemory, b: Basis) -> Result<(Packed, VecDeque<Opened>)> {
        check(memory, b.layout)?;
        let size = b.layout.size;
        let mut ring = Packed {
            at: b.layout,
            event_idx: b.event_idx,
            available: Position::from_bits(b.base as u16, size)?,
            used: Position::from_bits((b.base >> 16) as u16, size)?,
            out: 0,
            since_asked: 0,
            log: None,
        };
        let mut again = VecDeque::new();
        if let Some(inflight) = b.log {
            let flags_at = |index: u16| {
                let at = b.layout.descriptors + DESCRIPTOR * u64::from(index) + FLAGS;
                memory.space().load::<u16>(GuestAddress(at), Acquire).map_or(0, u16::from_le)
            };
            let (log, used, open) = PackedLog::recover(&inflight, b.index, size, ring.used, flags_at)?;
            // whatever was taken was answered, up to there, or is open: the front end may not know how much
            (ring.used, ring.available) = (used, used);
            for (slot, list) in open {
                let count = list.len() as u16;
                ring.available = ring.available.after(count, size);
                ring.out += u32::from(count);
                let head = list.last().map_or(0, |d| d.id);
                again.push_back(Opened { token: Token { head, count, slot }, list, logged: true });
            }
            ring.log = Some(log);
        }
        Ok((ring, again))
    }

    pub(super) fn remap(&mut self, memory: &GuestMemory, at: Layout) -> Result<()> {
        check(memory, at)?;
        self.at = at;
        Ok(())
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.available.bits()) | u32::from(self.used.bits()) << 16
    }

    fn place(&self, index: u16) -> u64 {
        self.at.descriptors + DESCRIPTOR * u64::from(index)
    }

    fn is_available(&self, memory: &GuestMemory) -> bool {
        let at = GuestAddress(self.place(self.available.index) + FLAGS);
        // memory that is gone reads as zeroes, and is found out otherwise
        let flags = memory.space().load::<u16>(at, Acquire).map_or(0, u16::from_le);
        let lap = self.available.lap;
        (flags & AVAILABLE != 0) == lap && (flags & USED != 0) != lap
    }

    pub(super) fn take(&mut self, memory: &GuestMemory) -> Result<Option<Opened>, &'static str> {
        if !self.is_available(memory) {
            return Ok(None);
        }
        let (mut list, mut next) = (List::new(), self.available);
        loop {
            if self.out as usize + list.len() >= usize::from(self.at.size) {
                return Err("more descriptors are available than the ring has");
            }
            if list.len() > MAX_SEGMENTS {
                return Err("a descriptor chain has too many buffers or is a loop");
            }
            let d = read(memory, self.place(next.index))?;
            list.push(d);
            next = next.after(1, self.at.size);
            if d.flags & NEXT == 0 {
                let count = list.len() as u16;
                self.available = next;
                self.out += u32::from(count);
                return Ok(Some(Opened { token: Token { head: d.id, count, slot: 0 }, list, logged: false }));
            }
        }
    }

    pub(super) fn begin(&mut self, opened: &Opened) -> Result<Token, &'static str> {
        let mut token = opened.token;
        if let Some(log) = self.log.as_mut().filter(|_| !opened.logged) {
            token.slot =
                log.begin(&opened.list).map_err(|_| "the in-flight log has no room for a request")?;
        }
        Ok(token)
    }

    pub(super) fn answer(&mut self, memory: &GuestMemory, t: Token, written: u32) -> Option<()> {
        let after = self.used.after(t.count, self.at.size);
        if let Some(log) = &mut self.log {
            log.answer(t.slot, after).ok()?;
        }
        let (at, lap) = (self.place(self.used.index), self.used.lap);
        let flags = if lap { AVAILABLE | USED } else { 0 } | if written > 0 { WRITE } else { 0 };
        let space = memory.space();
        space.store(t.head.to_le(), GuestAddress(at + ID), Relaxed).ok()?;
        space.store(written.to_le(), GuestAddress(at + LEN), Relaxed).ok()?;
        space.store(flags.to_le(), GuestAddress(at + FLAGS), Release).ok()?;
        self.used = after;
        self.out = self.out.saturating_sub(u32::from(t.count));
        self.since_asked = self.since_asked.saturating_add(u32::from(t.count));
        match &mut self.log {
            Some(log) => log.answered(t.slot).ok(),
            None => Some(()),
        }
    }

    pub(super) fn wants_call(&mut self, memory: &GuestMemory) -> bool {
        // the answers are seen before we look whether anybody wants to know of them
        fence(SeqCst);
        let since = std::mem::take(&mut self.since_asked);
        let load = |at| memory.space().load::<u16>(GuestAddress(at), Acquire).map_or(0, u16::from_le);
        match load(self.at.available + 2) & 3 {
            TELL_NOT => false,
            TELL_AT if self.event_idx => {
                let Ok(event) = Position::from_bits(load(self.at.available), self.at.size) else {
                    return true;
                };
                let laps = 2 * u32::from(self.at.size);
                let behind = self.used.absolute(self.at.size) + laps - 1 - event.absolute(self.at.size);
                behind % laps < since
            }
            _ => true,
        }
    }

    fn tell_us(&self, memory: &GuestMemory, when: u16) -> Option<()> {
        memory.space().store(when.to_le(), GuestAddress(self.at.used + 2), Release).ok()
    }

    pub(super) fn ask_for_bell(&mut self, memory: &GuestMemory) -> Option<bool> {
        if self.event_idx {
            let bits = self.available.bits().to_le();
            memory.space().store(bits, GuestAddress(self.at.used), Relaxed).ok()?;
            self.tell_us(memory, TELL_AT)?;
        } else {
            self.tell_us(memory, TELL)?;
        }
        // and only then once more whether there is something
        fence(SeqCst);
        Some(self.is_available(memory))
    }

    pub(super) fn no_bell(&mut self, memory: &GuestMemory) {
        // what cannot be written now cannot be answered either, and that stops the queue
        let _ = self.tell_us(memory, TELL_NOT);
    }

    pub(super) fn log_is_broken(&self) -> bool {
        self.log.as_ref().is_some_and(PackedLog::is_broken)
    }

    /// The descriptors, and where we say when we want to be told.
    pub(super) fn written(&self) -> [Piece; 2] {
        let table = DESCRIPTOR as u32 * u32::from(self.at.size);
        [Piece { at: self.at.descriptors, len: table }, Piece { at: self.at.used, len: EVENT }]
    }
}

/// Reads a descriptor, once.
pub(super) fn read(memory: &GuestMemory, at: u64) -> Result<Descriptor, &'static str> {
    let d: virtio_queue::desc::packed::Descriptor = memory
        .space()
        .read_obj(GuestAddress(at))
        .map_err(|_| "a descriptor lies outside the guest's memory")?;
    Ok(Descriptor { at: d.addr().0, len: d.len(), id: d.id(), flags: d.flags() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_go_around_and_change_their_lap() {
        let p = Position::from_bits(0x8000 | 6, 8).unwrap();
        assert_eq!(p.after(1, 8), Position { index: 7, lap: true });
        assert_eq!(p.after(2, 8), Position { index: 0, lap: false });
        assert_eq!(p.after(8, 8), Position { index: 6, lap: false });
        assert_eq!(p.after(8, 8).after(8, 8), p);
        assert_eq!(Position::from_bits(p.bits(), 8).unwrap(), p);
        assert!(Position::from_bits(8, 8).is_err());
        assert!(is_used(AVAILABLE | USED | WRITE, true) && !is_used(AVAILABLE, true));
        assert!(is_used(WRITE, false) && !is_used(USED, false));
    }
}
