//! `blklogwrites`: what is done to a disk is also written to a log, in the format of Linux's dm-log-writes
//! (Documentation/admin-guide/device-mapper/log-writes.rst), so that the disk can be replayed to any instant.
//!
//! What can happen: a write, a flush or the log itself fails. What must stay true: an entry is in the log only once what it
//! tells of was done, and before it is acknowledged; what stands before a flush was done before that flush began; the
//! superblock counts only entries that are whole.
//!
//! The log: one sector with the superblock (magic, version, number of entries, sector size), then entries of one sector each
//! (place, length, flags), the data of a write behind its entry. All numbers are little-endian, places in sectors of the log.

use crate::filters::{Given, filter_basics, filter_passes};
use block::{BlockError, Data, ErrorKind, Io, Limits, Prealloc, ReqFlags, Result, Span};
use env::sync::RangeLocks;
use graph::{Demand, Edge, Node, NodeDetails, Perms};
use std::cell::Cell;
use std::rc::Rc;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
/// Flush, force unit access, discard, mark.
const KNOWN_FLAGS: u64 = 15;
/// Bytes of the superblock and of an entry that are in use.
const HEAD: usize = 32;
/// Where the sectors of a log end: it is kept in 32 bits and padded in memory.
const SECTOR_LIMIT: u64 = 1 << 24;
/// After how many entries the superblock is written where the user does not say.
const DEFAULT_INTERVAL: u64 = 4096;
/// Entries read before others get their turn.
const ENTRIES_AT_ONCE: u64 = 64;

/// Options of `blklogwrites`.
#[derive(Clone, Debug, Default)]
pub struct LogOptions {
    /// Bytes of a sector of the log; 512 where missing.
    pub sector_size: Option<u64>,
    /// Goes on behind what is in the log.
    pub append: bool,
    /// Entries between superblocks; 4096 where missing.
    pub interval: Option<u64>,
    /// As the client said it.
    pub given: Given,
}

/// The filter.
pub struct BlkLogWrites {
    file: Rc<Edge>,
    log: Rc<Edge>,
    options: LogOptions,
    sector: u64,
    interval: u64,
    /// The next free sector of the log.
    next: Cell<u64>,
    entries: Cell<u64>,
    /// Something was done since the last flush.
    unflushed: Cell<bool>,
    /// Entries are written one after the other.
    turn: RangeLocks,
}

/// The whole log.
const ALL: Span = Span { start: 0, len: u64::MAX };

fn number(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

impl LogOptions {
    /// Fails if the options contradict each other.
    pub fn check(&self) -> Result<()> {
        if self.append && self.sector_size.is_some() {
            return Err(BlockError::invalid("log-append and log-sector-size are mutually exclusive"));
        }
        if self.interval == Some(0) {
            return Err(BlockError::invalid("Invalid log superblock update interval 0"));
        }
        self.sector_size.map_or(Ok(()), check_sector)
    }
}

fn check_sector(size: u64) -> Result<()> {
    if size.is_power_of_two() && (block::SECTOR..SECTOR_LIMIT).contains(&size) {
        return Ok(());
    }
    Err(BlockError::invalid(format!("Invalid log sector size {size}")))
}

impl BlkLogWrites {
    /// A filter in front of the child of `file` (an edge of role `Filtered`), its log behind `log` (`Other`).
    ///
    /// # Errors
    /// Options that contradict each other; with `append` a log that is none or is damaged.
    pub async fn open(file: Rc<Edge>, log: Rc<Edge>, options: LogOptions) -> Result<Rc<BlkLogWrites>> {
        options.check()?;
        let (sector, next, entries) = match options.append {
            true => read_log(&log).await?,
            false => (options.sector_size.unwrap_or(block::SECTOR), 1, 0),
        };
        Ok(Rc::new(BlkLogWrites {
            file,
            log,
            sector,
            interval: options.interval.unwrap_or(DEFAULT_INTERVAL),
            options,
            next: Cell::new(next),
            entries: Cell::new(entries),
            unflushed: Cell::new(false),
            turn: RangeLocks::new(),
        }))
    }

    /// `numbers` at the start of a sector.
    fn head(&self, numbers: [u64; 4]) -> Data {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        let mut head = Data::copy_from(&bytes);
        head.append(Data::zeroes(self.sector as usize - HEAD));
        head
    }

    /// Appends an entry, with what was written if it is one that has data. The caller has its turn.
    async fn append(&self, at: Span, flags: u64, data: Option<Data>) -> Result<()> {
        let unit = self.sector;
        let mut bytes = self.head([at.start / unit, at.len / unit, flags, 0]);
        if let Some(data) = data {
            bytes.append(data);
        }
        let sectors = bytes.len() as u64 / unit;
        let place = self.next.get().checked_mul(unit).filter(|p| p.checked_add(bytes.len() as u64).is_some());
        let place = place.ok_or_else(|| BlockError::from_errno(BlockError::EFBIG))?;
        let end = place + bytes.len() as u64;
        if self.log.len() < end {
            self.log.resize(end, Prealloc::Off).await?;
        }
        self.log.write(place, bytes, ReqFlags::NONE).await?;
        self.next.set(self.next.get() + sectors);
        self.entries.set(self.entries.get() + 1);
        if flags & FLUSH != 0 || self.entries.get().is_multiple_of(self.interval) {
            let head = self.head([MAGIC, VERSION, self.entries.get(), unit]);
            self.log.write(0, head, ReqFlags::NONE).await?;
        }
        Ok(())
    }

    /// Tells of what was done at `at`.
    async fn done(&self, at: Span, flags: u64, data: Option<Data>, fua: bool) -> Result<()> {
        {
            let _turn = self.turn.lock(ALL, true).await;
            self.append(at, flags, data).await?;
            self.unflushed.set(true);
        }
        if fua { self.flush_logged().await } else { Ok(()) }
    }

    async fn flush_logged(&self) -> Result<()> {
        // Nothing is logged while the flush runs: what stands before its entry was done before it began.
        let _turn = self.turn.lock(ALL, true).await;
        self.file.flush().await?;
        if self.unflushed.replace(false) {
            let logged = self.append(Span::new(0, 0), FLUSH, None).await;
            logged.inspect_err(|_| self.unflushed.set(true))?;
        }
        self.log.flush().await
    }
}

/// What a log says: its sector size, the first sector behind its entries, and their number.
async fn read_log(log: &Rc<Edge>) -> Result<(u64, u64, u64)> {
    if log.len() < block::SECTOR {
        let why = BlockError::from_errno(BlockError::EIO);
        return Err(why.context("Could not read log superblock"));
    }
    let head = log.read(Span::new(0, block::SECTOR)).await?.to_vec();
    let refuse = |what: String| Err(BlockError::new(ErrorKind::Corrupt, what).with_errno(BlockError::EINVAL));
    if number(&head, 0) != MAGIC {
        return refuse("Invalid log superblock magic".to_owned());
    }
    if number(&head, 8) != VERSION {
        return refuse(format!("Unsupported log version {}", number(&head, 8)));
    }
    // The sector size has 32 bits; what is behind it is padding.
    let (count, sector) = (number(&head, 16), number(&head, 24) & u64::from(u32::MAX));
    check_sector(sector)?;
    let mut next = 1u64;
    for i in 0..count {
        let place = next.checked_mul(sector).filter(|p| *p < log.len() && log.len() - *p >= HEAD as u64);
        let Some(place) = place else {
            return refuse(format!("Log entry {i} of {count} is outside the log"));
        };
        let entry = log.read(Span::new(place, HEAD as u64)).await?.to_vec();
        let (sectors, flags) = (number(&entry, 8), number(&entry, 16));
        if flags & !KNOWN_FLAGS != 0 {
            return refuse(format!("Invalid flags {flags} in log entry {i}"));
        }
        let data = if flags & DISCARD != 0 { 0 } else { sectors };
        next = match next.checked_add(1).and_then(|n| n.checked_add(data)) {
            Some(next) => next,
            None => return refuse(format!("Log entry {i} of {count} is outside the log")),
        };
        if i % ENTRIES_AT_ONCE == 0 {
            env::sync::yield_now().await;
        }
    }
    Ok((sector, next, count))
}

impl Node for BlkLogWrites {
    filter_basics!(file, [file, log], file);
    filter_passes!(file: read, extents);

    fn driver(&self) -> &'static str {
        "blklogwrites"
    }
    fn limits(&self) -> Limits {
        let below = self.file.limits();
        Limits { request_alignment: below.request_alignment.max(self.sector), ..below }
    }
    fn wants(&self, edge: &Edge, above: Demand, writable: bool) -> Demand {
        if edge.id() == self.file.id() {
            return above;
        }
        let writing = if writable { Perms::WRITE.with(Perms::RESIZE) } else { Perms::NONE };
        let shares = Perms::CONSISTENT_READ.with(Perms::WRITE_UNCHANGED);
        Demand { needs: Perms::CONSISTENT_READ.with(writing), shares }
    }

    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            let now = ReqFlags { fua: false, ..flags };
            self.file.write(at.start, data.clone(), now).await?;
            self.done(at, 0, Some(data), flags.fua).await
        })
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            self.file.zero(at, ReqFlags { fua: false, ..flags }).await?;
            self.done(at, 0, Some(Data::zeroes(at.len as usize)), flags.fua).await
        })
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(async move {
            self.file.discard(at).await?;
            self.done(at, DISCARD, None, false).await
        })
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(self.flush_logged())
    }
    fn resize(&self, len: u64, prealloc: Prealloc) -> Io<'_> {
        Box::pin(async move {
            self.file.resize(len, prealloc).await?;
            self.unflushed.set(true);
            Ok(())
        })
    }
    fn close(&self) -> Io<'_> {
        Box::pin(async move { if self.unflushed.get() { self.flush_logged().await } else { Ok(()) } })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move {
            let below = self.file.child().node().details().await?;
            let filename = self.options.given.filename(self.driver(), &[&self.file, &self.log]).await?;
            Ok(NodeDetails { filename, actual_size: below.actual_size, ..NodeDetails::default() })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contradictions_are_refused() {
        let of = |sector_size, append, interval| {
            let o = LogOptions { sector_size, append, interval, given: Given::default() };
            o.check().map_err(|e| e.message().to_owned())
        };
        assert_eq!(of(Some(4096), false, Some(2)), Ok(()));
        assert_eq!(of(None, true, None), Ok(()));
        assert!(of(Some(4096), true, None).is_err_and(|e| e.contains("mutually exclusive")));
        assert!(of(None, true, Some(0)).is_err_and(|e| e.contains("update interval 0")));
        for size in [0, 100, 256, 1 << 24] {
            assert!(of(Some(size), false, None).is_err_and(|e| e.ends_with(&format!("sector size {size}"))));
        }
    }
}
