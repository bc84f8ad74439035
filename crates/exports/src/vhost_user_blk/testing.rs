//! What fuzzers do to a guest's rings: any memory, any log, and all that can be taken from them.

use super::inflight::InflightLog;
use super::lane::{Basis, Lane, Layout, Opened};
use super::request::Request;
use block::Result;
use env::os::shared::vm_memory::{Bytes, GuestAddress};
use env::os::shared::{GuestMemory, Region, anonymous_file, duplicate};
use std::os::fd::{AsFd, OwnedFd};

/// Guest addresses of the two regions; there is a gap between them.
const REGIONS: [u64; 2] = [0x1000, 0x20000];
const REGION: u64 = 16 << 10;
/// Bytes of the log: of the longest queue here.
const LOG: u64 = 8 << 10;
/// Longest queue: its table fills less than a region.
const LONGEST: u16 = 128;

/// A guest's memory and a log of requests in flight, to be filled again and again.
pub struct Rings {
    memory: GuestMemory,
    log: OwnedFd,
    writer: env::os::shared::SharedMap,
}

/// How rings lie, and what is in them.
#[derive(Clone, Copy, Debug)]
pub struct Trial<'a> {
    /// A packed ring.
    pub packed: bool,
    /// Who wants to be told is said by position.
    pub event_idx: bool,
    /// Descriptors of the ring.
    pub size: u16,
    /// Where guest and daemon are.
    pub base: u32,
    /// The memory's first bytes: the table, and what follows it.
    pub memory: &'a [u8],
    /// The log, if there is one.
    pub log: Option<&'a [u8]>,
}

impl Rings {
    /// Memory and log of zeroes.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> Result<Rings> {
        let region = |guest| {
            let file = anonymous_file("liveblk-fuzz-guest", REGION)?;
            Ok(Region { guest, len: REGION, user: guest, offset: 0, file })
        };
        let memory = GuestMemory::map(REGIONS.into_iter().map(region).collect::<Result<_>>()?)?;
        let log = anonymous_file("liveblk-fuzz-log", LOG)?;
        let writer = env::os::shared::SharedMap::new(duplicate(log.as_fd())?, 0, LOG)?;
        Ok(Rings { memory, log, writer })
    }

    /// Fills all and takes every request there is: each once, each in the guest's memory, each answered.
    ///
    /// # Errors
    /// What must not be, as a sentence.
    pub fn attempt(&self, t: &Trial<'_>) -> std::result::Result<u32, String> {
        let m = &self.memory;
        let zeroes = [0u8; REGION as usize];
        for (n, region) in REGIONS.into_iter().enumerate() {
            let mut bytes = zeroes;
            let from = t.memory.chunks(REGION as usize).nth(n).unwrap_or_default();
            bytes[..from.len()].copy_from_slice(from);
            m.space().write_slice(&bytes, GuestAddress(region)).map_err(|e| e.to_string())?;
        }
        let log = match t.log {
            None => None,
            Some(bytes) => {
                for at in 0..LOG as usize {
                    let byte = bytes.get(at).copied().unwrap_or(0);
                    self.writer
                        .store(at, byte, std::sync::atomic::Ordering::Relaxed)
                        .map_err(|e| e.to_string())?;
                }
                let file = duplicate(self.log.as_fd()).map_err(|e| e.to_string())?;
                Some(InflightLog::open(file, 0, LOG, 1, LONGEST, t.packed).map_err(|e| e.to_string())?)
            }
        };
        let size = t.size.min(LONGEST);
        let table = REGIONS[0];
        let available = (table + 16 * u64::from(size)).next_multiple_of(4);
        let layout = Layout { size, descriptors: table, available, used: REGIONS[1] };
        let basis = Basis { layout, base: t.base, event_idx: t.event_idx, log, index: 0 };
        let Ok((mut lane, open)) = Lane::start(m, t.packed, basis) else { return Ok(0) };
        if open.len() > usize::from(size) {
            return Err(format!("{} requests are left of a ring of {size}", open.len()));
        }
        let mut done = 0;
        for opened in open {
            done += self.one(&mut lane, &opened)?;
        }
        // what was left may be in the ring once more
        let most = 2 * u32::from(size);
        while let Ok(Some(opened)) = lane.take(m) {
            done += self.one(&mut lane, &opened)?;
            if done > most {
                return Err(format!("{done} requests came out of a ring of {size}"));
            }
            lane.wants_call(m);
        }
        lane.ask_for_bell(m);
        lane.no_bell(m);
        if lane.written(REGIONS[1]).iter().any(|p| p.len > 0 && !m.has(*p)) {
            return Err("it writes outside of the guest's memory".to_owned());
        }
        Ok(done)
    }

    /// One request: its buffers are memory, and it is answered.
    fn one(&self, lane: &mut Lane, opened: &Opened) -> std::result::Result<u32, String> {
        let m = &self.memory;
        // what the guest did wrong stops its queue
        let Ok((token, chain)) = lane.begin(m, opened) else { return Ok(1) };
        let all = || chain.readable.iter().chain(&chain.writable);
        if let Some(p) = all().find(|p| !m.has(**p)) {
            return Err(format!("{p:?} is no memory of the guest"));
        }
        let total: u64 = all().map(|p| u64::from(p.len)).sum();
        if total != chain.readable_len + chain.writable_len {
            return Err(format!(
                "{total} bytes in pieces are {} and {}",
                chain.readable_len, chain.writable_len
            ));
        }
        let written = chain.writable_len as u32;
        if let Ok(request) = Request::parse(m, chain)
            && request.cost() > super::request::PIECE
        {
            return Err(format!("a request holds {} bytes", request.cost()));
        }
        let _used_ring_may_be_nowhere = lane.answer(m, token, written);
        Ok(1)
    }
}
