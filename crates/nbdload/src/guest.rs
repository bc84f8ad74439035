//! A guest and its machine monitor in one: memory that the daemon maps too, a virtqueue in it, and the vhost-user connection.
//!
//! It does what Linux's driver does: one descriptor in the ring for each request, which points to a table of its buffers; the
//! event index, so that bells are rung only where somebody waits. What must stay true: a descriptor is complete before the
//! index that shows it is stored; between "nothing there" and going to sleep the ring is looked at once more.
//! Layout: Virtual I/O Device specification 1.3, sections 2.7 and 5.2; vhost-user specification.

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::{self, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Where the guest has its memory.
const GUEST: u64 = 0x10_0000;
/// Where the machine monitor says that it has mapped it.
const USER: u64 = 0x7000_0000_0000;

/// Feature bits.
mod feature {
    pub(super) const INDIRECT: u64 = 1 << 28;
    pub(super) const EVENT_IDX: u64 = 1 << 29;
    pub(super) const PROTOCOL: u64 = 1 << 30;
    pub(super) const VERSION_1: u64 = 1 << 32;
    /// The protocol's own: GET_CONFIG.
    pub(super) const CONFIG: u64 = 1 << 9;
}

/// Messages.
mod message {
    pub(super) const GET_FEATURES: u32 = 1;
    pub(super) const SET_FEATURES: u32 = 2;
    pub(super) const SET_OWNER: u32 = 3;
    pub(super) const SET_MEM_TABLE: u32 = 5;
    pub(super) const SET_VRING_NUM: u32 = 8;
    pub(super) const SET_VRING_ADDR: u32 = 9;
    pub(super) const SET_VRING_BASE: u32 = 10;
    pub(super) const SET_VRING_KICK: u32 = 12;
    pub(super) const SET_VRING_CALL: u32 = 13;
    pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(super) const SET_VRING_ENABLE: u32 = 18;
    pub(super) const GET_CONFIG: u32 = 24;
}

const WRITE: u16 = 2;
const NEXT: u16 = 1;
const TABLE: u16 = 4;
/// Bytes of a request's header, of a descriptor.
const HEADER: usize = 16;
const DESCRIPTOR: usize = 16;
const BLK_IN: u32 = 0;
const BLK_OUT: u32 = 1;

fn text(what: &str) -> impl Fn(rustix::io::Errno) -> String + '_ {
    move |e| format!("{what}: {e}")
}

/// The guest's memory.
struct Memory {
    map: MmapRegion,
    file: OwnedFd,
}

impl Memory {
    fn new(len: usize) -> Result<Memory, String> {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).map_err(text("memfd"))?;
        ftruncate(&file, len as u64).map_err(text("memfd"))?;
        let twin = file.try_clone().map_err(|e| e.to_string())?;
        let map = MmapRegion::from_file(FileOffset::new(twin.into(), 0), len).map_err(|e| e.to_string())?;
        Ok(Memory { map, file })
    }

    // all offsets are this file's own, inside and aligned
    fn load(&self, at: usize, order: Ordering) -> u16 {
        self.map.as_volatile_slice().load::<u16>(at, order).unwrap_or_default()
    }
    fn store(&self, at: usize, value: u16, order: Ordering) {
        let _ = self.map.as_volatile_slice().store(value, at, order);
    }
    fn write(&self, at: usize, bytes: &[u8]) {
        let _ = self.map.as_volatile_slice().write_slice(bytes, at);
    }
    fn read(&self, at: usize, bytes: &mut [u8]) {
        let _ = self.map.as_volatile_slice().read_slice(bytes, at);
    }
}

/// The connection to a back end.
struct Front(UnixStream);

impl Front {
    fn send(&mut self, request: u32, body: &[u8], with: Option<BorrowedFd<'_>>) -> Result<(), String> {
        let mut bytes = Vec::with_capacity(12 + body.len());
        for word in [request, 1, body.len() as u32] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(body);
        let fds: Vec<_> = with.into_iter().collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            beside.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let sent = sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut beside, SendFlags::NOSIGNAL);
        let n = sent.map_err(text("send"))?;
        self.0.write_all(&bytes[n..]).map_err(|e| e.to_string())
    }

    fn ask(&mut self, request: u32, body: &[u8]) -> Result<Vec<u8>, String> {
        self.send(request, body, None)?;
        let mut header = [0; 12];
        let hung_up = |e: std::io::Error| format!("the back end hung up at message {request}: {e}");
        self.0.read_exact(&mut header).map_err(hung_up)?;
        let len = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        let mut body = vec![0; len.min(4096) as usize];
        self.0.read_exact(&mut body).map_err(hung_up)?;
        Ok(body)
    }

    fn number(&mut self, request: u32) -> Result<u64, String> {
        let body = self.ask(request, &[])?;
        body.first_chunk().map(|b| u64::from_le_bytes(*b)).ok_or_else(|| "short answer".to_owned())
    }
}

/// Numbers one after the other, little-endian.
fn body(words: &[u32], longs: &[u64]) -> Vec<u8> {
    let mut out: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    out.extend(longs.iter().flat_map(|l| l.to_le_bytes()));
    out
}

/// A guest with one queue; requests have numbers from 0 to `depth` less one, and a buffer each.
pub struct Guest {
    // the connection lives as long as the guest
    _front: Front,
    memory: Memory,
    kick: OwnedFd,
    call: OwnedFd,
    /// Length of the disk in bytes.
    len: u64,
    bs: usize,
    size: u16,
    ring: Ring,
    /// First byte of the requests' own memory.
    requests: usize,
    stride: usize,
}

/// Where the parts of a split ring are, as offsets in the memory, and how far the driver is.
struct Ring {
    descriptors: usize,
    available: usize,
    used: usize,
    next: u16,
    /// What of `next` the other side has been shown.
    shown: u16,
    seen: u16,
}

impl Guest {
    /// Connects to the back end at `socket`, and sets up a queue for `depth` requests of `bs` bytes.
    ///
    /// # Errors
    /// What the back end cannot do, or did not answer.
    pub fn connect(socket: &str, depth: usize, bs: usize) -> Result<Guest, String> {
        let size = u16::try_from(depth.next_power_of_two().max(4)).map_err(|_| "too deep")?;
        let ring = Ring::at(usize::from(size));
        let requests = (ring.used + 6 + 8 * usize::from(size)).next_multiple_of(4096);
        // a page for header, table and status, and whole pages of data, as guests have them
        let stride = 4096 + bs.next_multiple_of(4096);
        let memory = Memory::new(requests + stride * depth)?;
        let stream = UnixStream::connect(socket).map_err(|e| format!("{socket}: {e}"))?;
        let mut front = Front(stream);
        let event = || eventfd(0, EventfdFlags::CLOEXEC).map_err(text("eventfd"));
        let (kick, call) = (event()?, event()?);
        let len = front.set_up(&memory, size, &ring, &kick, &call)?;
        let guest = Guest { _front: front, memory, kick, call, len, bs, size, ring, requests, stride };
        (0..depth).for_each(|i| guest.write_table(i));
        Ok(guest)
    }

    /// Length of the disk in bytes.
    pub fn disk_len(&self) -> u64 {
        self.len
    }

    /// Where request `i` has its header; the table is behind it, the data on the next page.
    fn at(&self, i: usize) -> usize {
        self.requests + i * self.stride
    }

    fn status_at(&self, i: usize) -> usize {
        self.at(i) + 1024
    }

    fn table_at(&self, i: usize) -> usize {
        self.at(i) + 512
    }

    fn data_at(&self, i: usize) -> usize {
        self.at(i) + 4096
    }

    /// The descriptor in the ring for request `i`, which always points to its table.
    fn write_table(&self, i: usize) {
        let at = self.ring.descriptors + DESCRIPTOR * i;
        self.describe(at, self.table_at(i), 3 * DESCRIPTOR, TABLE, 0);
    }

    fn describe(&self, at: usize, address: usize, len: usize, flags: u16, next: u16) {
        let mut d = [0; DESCRIPTOR];
        d[..8].copy_from_slice(&(GUEST + address as u64).to_le_bytes());
        d[8..12].copy_from_slice(&(len as u32).to_le_bytes());
        d[12..14].copy_from_slice(&flags.to_le_bytes());
        d[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write(at, &d);
    }

    /// Puts request `i` into the ring: a write of `data`, or a read.
    pub fn submit(&mut self, i: usize, offset: u64, data: Option<&[u8]>) {
        let mut header = [0; HEADER];
        let kind = if data.is_some() { BLK_OUT } else { BLK_IN };
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&(offset / 512).to_le_bytes());
        self.memory.write(self.at(i), &header);
        self.memory.write(self.status_at(i), &[0xff]);
        let (table, flags) = (self.table_at(i), if data.is_some() { NEXT } else { NEXT | WRITE });
        self.describe(table, self.at(i), HEADER, NEXT, 1);
        self.describe(table + DESCRIPTOR, self.data_at(i), self.bs, flags, 2);
        self.describe(table + 2 * DESCRIPTOR, self.status_at(i), 1, WRITE, 0);
        if let Some(data) = data {
            self.memory.write(self.data_at(i), data);
        }
        let slot = self.ring.available + 4 + 2 * usize::from(self.ring.next % self.size);
        self.memory.store(slot, i as u16, Relaxed);
        self.ring.next = self.ring.next.wrapping_add(1);
    }

    /// Shows the back end what was submitted, and rings for it if it wants that.
    ///
    /// # Errors
    /// The bell is broken.
    pub fn publish(&mut self) -> Result<(), String> {
        let old = std::mem::replace(&mut self.ring.shown, self.ring.next);
        if old == self.ring.next {
            return Ok(());
        }
        self.memory.store(self.ring.available + 2, self.ring.next, Release);
        fence(SeqCst);
        let event = self.memory.load(self.ring.used + 4 + 8 * usize::from(self.size), Relaxed);
        // the specification's rule: was the index that they wait for passed just now?
        if self.ring.next.wrapping_sub(event).wrapping_sub(1) < self.ring.next.wrapping_sub(old) {
            rustix::io::write(&self.kick, &1u64.to_ne_bytes()).map_err(text("kick"))?;
        }
        Ok(())
    }

    /// The next request that has ended, if there is one.
    ///
    /// # Errors
    /// It failed, or was none of ours.
    pub fn ended(&mut self) -> Result<Option<usize>, String> {
        if self.memory.load(self.ring.used + 2, Acquire) == self.ring.seen {
            return Ok(None);
        }
        let at = self.ring.used + 4 + 8 * usize::from(self.ring.seen % self.size);
        let i = usize::from(self.memory.load(at, Relaxed));
        self.ring.seen = self.ring.seen.wrapping_add(1);
        if i >= usize::from(self.size) || self.status_at(i) >= self.memory.map.size() {
            return Err(format!("an answer to request {i}, which there is not"));
        }
        let mut status = [0];
        self.memory.read(self.status_at(i), &mut status);
        if status == [0] { Ok(Some(i)) } else { Err(format!("request {i} failed with status {}", status[0])) }
    }

    /// What request `i` read.
    pub fn data(&self, i: usize, to: &mut [u8]) {
        self.memory.read(self.data_at(i), to);
    }

    /// Sleeps until there is an answer, as a guest's processor does until its interrupt.
    ///
    /// # Errors
    /// None came for half a minute.
    pub fn sleep(&mut self) -> Result<(), String> {
        self.memory.store(self.ring.available + 4 + 2 * usize::from(self.size), self.ring.seen, Relaxed);
        fence(SeqCst);
        if self.memory.load(self.ring.used + 2, Acquire) != self.ring.seen {
            return Ok(());
        }
        let limit = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
        let mut wanted = [PollFd::new(&self.call, PollFlags::IN)];
        if poll(&mut wanted, Some(&limit)).map_err(text("poll"))? == 0 {
            return Err("no answer for 30 s".to_owned());
        }
        // the back end made it non-blocking; that somebody else took the count is no harm
        let _ = rustix::io::read(&self.call, &mut [0; 8]);
        Ok(())
    }
}

impl Ring {
    fn at(size: usize) -> Ring {
        let available = DESCRIPTOR * size;
        // on a line of its own: it is what the other side writes
        let used = (available + 6 + 2 * size).next_multiple_of(64);
        Ring { descriptors: 0, available, used, next: 0, shown: 0, seen: 0 }
    }
}

impl Front {
    /// Says all that a back end must know; the length of the disk.
    fn set_up(
        &mut self,
        memory: &Memory,
        size: u16,
        ring: &Ring,
        kick: &OwnedFd,
        call: &OwnedFd,
    ) -> Result<u64, String> {
        use message::*;
        let wanted = feature::INDIRECT | feature::EVENT_IDX | feature::PROTOCOL | feature::VERSION_1;
        let offered = self.number(GET_FEATURES)?;
        if offered & wanted != wanted || self.number(GET_PROTOCOL_FEATURES)? & feature::CONFIG == 0 {
            return Err(format!("the back end offers only features {offered:#x}"));
        }
        self.send(SET_PROTOCOL_FEATURES, &feature::CONFIG.to_le_bytes(), None)?;
        self.send(SET_OWNER, &[], None)?;
        let mut config = body(&[0, 60, 0], &[]);
        config.resize(12 + 60, 0);
        let config = self.ask(GET_CONFIG, &config)?;
        let sectors = config.get(12..20).and_then(|b| b.first_chunk()).map(|b| u64::from_le_bytes(*b));
        self.send(SET_FEATURES, &wanted.to_le_bytes(), None)?;
        let len = memory.map.size() as u64;
        self.send(SET_MEM_TABLE, &body(&[1, 0], &[GUEST, len, USER, 0]), Some(memory.file.as_fd()))?;
        self.send(SET_VRING_NUM, &body(&[0, u32::from(size)], &[]), None)?;
        self.send(SET_VRING_BASE, &body(&[0, 0], &[]), None)?;
        let user = |at: usize| USER + at as u64;
        let places = [user(ring.descriptors), user(ring.used), user(ring.available), 0];
        self.send(SET_VRING_ADDR, &body(&[0, 0], &places), None)?;
        self.send(SET_VRING_CALL, &body(&[], &[0]), Some(call.as_fd()))?;
        self.send(SET_VRING_KICK, &body(&[], &[0]), Some(kick.as_fd()))?;
        self.send(SET_VRING_ENABLE, &body(&[0, 1], &[]), None)?;
        sectors.map(|s| s * 512).ok_or_else(|| "the back end gives no configuration".to_owned())
    }
}
