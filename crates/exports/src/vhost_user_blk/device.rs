//! The disk as a guest sees it: its features, its configuration space, what may be done to it.
//!
//! What can happen: the disk grows while a guest uses it (the front end is told); a guest turns the write cache off (each
//! write is then durable before it is answered). What must stay true: the guest learns the length that requests are checked
//! against, rounded down to whole blocks.
//! Layout: Virtual I/O Device specification 1.2, section 5.2.

use super::request::MAX_RANGE_SECTORS;
use block::{BlockError, ErrorKind, ReqFlags, Result, Span};
use env::Env;
use env::os::shared::WriteLog;
use graph::{Demand, Edge, Perms};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Bytes of a sector, the unit of all addresses, whatever the logical block size.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the configuration space that have a meaning for us.
const CONFIG: usize = 60;
/// Where the write cache's switch is in it.
const CONFIG_WCE: u32 = 32;
/// Data segments of one request: as QSD announces, 128 descriptors less header and status.
const SEG_MAX: u32 = 126;

/// Feature bits of virtio and of its block device.
pub(super) mod feature {
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const CONFIG_WCE: u64 = 1 << 11;
    pub(crate) const MQ: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
    pub(crate) const LOG_ALL: u64 = 1 << 26;
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub(crate) const VERSION_1: u64 = 1 << 32;
    pub(crate) const RING_PACKED: u64 = 1 << 34;
}

/// What is asked of a vhost-user-blk export; names as in QMP's `block-export-add`.
#[derive(Clone, Debug)]
pub struct VhostUserBlkOptions {
    /// Export id.
    pub id: String,
    /// Where to listen: a unix socket.
    pub address: env::Address,
    /// Whether guests may write.
    pub writable: bool,
    /// Whether each write is made durable before it is acknowledged.
    pub writethrough: bool,
    /// Queues, at least one.
    pub num_queues: u16,
    /// Smallest unit of a request, in bytes: a power of two from 512 to [`MAX_BLOCK_SIZE`].
    pub logical_block_size: u32,
}

impl VhostUserBlkOptions {
    /// What such an export asks of its node. Others may resize the disk: the guest is told.
    pub fn demand(writable: bool) -> Demand {
        let write = if writable { Perms::WRITE } else { Perms::NONE };
        Demand { needs: Perms::CONSISTENT_READ.with(write), shares: Perms::ALL }
    }
}

/// Largest logical block size, as QSD's.
pub(super) const MAX_BLOCK_SIZE: u32 = 2 << 20;
/// The logical block size if the user does not say.
pub const DEFAULT_BLOCK_SIZE: u32 = 512;

/// The disk, for all its queues.
pub(super) struct Device {
    pub(super) env: Env,
    edge: Rc<Edge>,
    options: VhostUserBlkOptions,
    /// Whether the guest wants to flush by itself.
    write_cache: Cell<bool>,
    /// Which pages of the guest's memory we write to, while somebody wants to know.
    write_log: RefCell<Option<Rc<WriteLog>>>,
    logging: Cell<bool>,
}

impl Device {
    pub(super) fn new(env: &Env, options: VhostUserBlkOptions, edge: Rc<Edge>) -> Device {
        let write_cache = Cell::new(!options.writethrough);
        let (write_log, logging) = (RefCell::new(None), Cell::new(false));
        Device { env: env.clone(), edge, options, write_cache, write_log, logging }
    }

    /// From now on what is written to the guest's memory is marked there.
    pub(super) fn set_write_log(&self, log: Option<WriteLog>) {
        *self.write_log.borrow_mut() = log.map(Rc::new);
    }

    /// Whether anybody wants to know now.
    pub(super) fn set_logging(&self, on: bool) {
        self.logging.set(on);
    }

    /// `len` bytes of the guest's memory at `at` have been written.
    pub(super) fn mark_written(&self, at: u64, len: u64) {
        if self.logging.get()
            && let Some(log) = &*self.write_log.borrow()
        {
            log.mark(at, len);
        }
    }

    /// Whether something was written that could not be marked.
    pub(super) fn lost_marks(&self) -> bool {
        self.logging.get() && self.write_log.borrow().as_ref().is_some_and(|l| l.is_broken())
    }

    pub(super) fn edge(&self) -> &Rc<Edge> {
        &self.edge
    }

    pub(super) fn options(&self) -> &VhostUserBlkOptions {
        &self.options
    }

    /// Length in bytes as guests may use it: whole logical blocks.
    pub(super) fn len(&self) -> u64 {
        let unit = u64::from(self.options.logical_block_size);
        self.edge.len() / unit * unit
    }

    /// Feature bits that are offered.
    pub(super) fn features(&self) -> u64 {
        use feature::*;
        let common = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE | MQ | DISCARD | WRITE_ZEROES;
        let ring = INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES | VERSION_1 | RING_PACKED | LOG_ALL;
        common | ring | if self.options.writable { 0 } else { RO }
    }

    /// The configuration space from `offset` on, `len` bytes; zeroes past its end, where newer devices have more.
    pub(super) fn config(&self, offset: u32, len: u32) -> Vec<u8> {
        let mut all = Vec::with_capacity(CONFIG);
        let block = self.options.logical_block_size;
        all.extend((self.len() / SECTOR).to_le_bytes());
        all.extend(0u32.to_le_bytes()); // size_max: not offered
        all.extend(SEG_MAX.to_le_bytes());
        all.extend([0; 4]); // geometry: not offered
        all.extend(block.to_le_bytes());
        all.extend([0, 0]); // one physical block is one logical block, and the first is aligned
        all.extend(1u16.to_le_bytes()); // smallest and
        all.extend(1u32.to_le_bytes()); // best transfer in logical blocks
        all.push(u8::from(self.write_cache.get()));
        all.push(0);
        all.extend(self.options.num_queues.to_le_bytes());
        for _ in ["discard", "write zeroes"] {
            all.extend(MAX_RANGE_SECTORS.to_le_bytes());
            all.extend(1u32.to_le_bytes()); // ranges in one request
            if all.len() == 44 {
                all.extend((block / SECTOR as u32).to_le_bytes()); // alignment of discards
            }
        }
        all.extend([1, 0, 0, 0]); // writing zeroes may unmap
        debug_assert_eq!(all.len(), CONFIG);
        let (from, len) = (offset as usize, len as usize);
        let mut out: Vec<u8> = all.into_iter().skip(from).take(len).collect();
        out.resize(len, 0);
        out
    }

    /// A guest writes to the configuration space: only the write cache's switch may be.
    pub(super) fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<()> {
        match (offset, bytes) {
            (CONFIG_WCE, [on]) => {
                self.write_cache.set(*on != 0);
                Ok(())
            }
            _ => Err(BlockError::invalid("only the write cache can be configured")),
        }
    }

    /// The bytes of a request, if they are on the disk and whole blocks.
    pub(super) fn span(&self, sector: u64, len: u64) -> Result<Span> {
        let unit = u64::from(self.options.logical_block_size);
        let start = sector.checked_mul(SECTOR).ok_or_else(|| BlockError::from_errno(BlockError::EINVAL))?;
        let span = Span::checked(start, len).filter(|s| s.end() <= self.len() && s.is_aligned(unit));
        span.ok_or_else(|| BlockError::from_errno(BlockError::EINVAL))
    }

    pub(super) fn check_writable(&self) -> Result<()> {
        if self.options.writable {
            return Ok(());
        }
        Err(BlockError::new(ErrorKind::ReadOnly, "the export is read-only"))
    }

    pub(super) fn write_flags(&self) -> ReqFlags {
        let fua = self.options.writethrough || !self.write_cache.get();
        ReqFlags { fua, ..ReqFlags::NONE }
    }
}
