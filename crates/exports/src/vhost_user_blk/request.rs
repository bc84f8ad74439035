//! One request of a guest: what it asks, whether it may, and carrying it out.
//!
//! What can happen: requests past the end, on a read-only disk, of an unknown kind, too short to be any; a disk that fails.
//! All of these are answered with a status. What must stay true: a status byte is written exactly once and after the data;
//! memory held per request is bounded by [`PIECE`], however long it is; a request runs to its end once it has begun.
//! Layout: Virtual I/O Device specification 1.2, section 5.2.6.

use super::chain::Chain;
use super::device::{Device, SECTOR};
use block::{BlockError, Data, ErrorKind, ReqFlags, Result};
use env::os::shared::{GuestMemory, Piece};

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// Bytes before the data: kind, reserved, sector.
const HEADER: u64 = 16;
/// Bytes of one range to discard or make zero: sector, count, flags.
const RANGE: u64 = 16;
/// The range may become unallocated.
const RANGE_UNMAP: u32 = 1;
/// Bytes of the disk's name that a guest asks for.
const ID_BYTES: usize = 20;
/// What the disk calls itself, as in QSD.
const ID: &[u8] = b"vhost_user_blk";
/// Longer requests are carried out piece by piece: one buffer of the pool.
pub(super) const PIECE: u64 = 4 << 20;
/// Most sectors to discard or make zero in one request, as QSD announces.
pub(super) const MAX_RANGE_SECTORS: u32 = 32_768;

/// A request that was understood.
pub(super) struct Request {
    chain: Chain,
    what: What,
    /// Where the status goes.
    status: Piece,
}

enum What {
    Read(u64),
    Write(u64),
    Flush,
    Id,
    Discard,
    Zero,
    Unknown,
}

impl Request {
    /// What `chain` asks. The error: it has no header, or no place for a status.
    pub(super) fn parse(memory: &GuestMemory, chain: Chain) -> Result<Request, &'static str> {
        if chain.readable_len < HEADER {
            return Err("a request has no header");
        }
        let last = chain.writable.last().ok_or("a request has no place for its status")?;
        let status = Piece { at: last.at + u64::from(last.len) - 1, len: 1 };
        let mut header = [0; HEADER as usize];
        let bytes =
            memory.gather(&chain.readable, 0, HEADER as usize).map_err(|_| "a request's header is gone")?;
        bytes.copy_to(&mut header);
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap_or_default());
        let [a, b, c, d, ..] = header;
        let what = match u32::from_le_bytes([a, b, c, d]) {
            T_IN => What::Read(sector),
            T_OUT => What::Write(sector),
            T_FLUSH => What::Flush,
            T_GET_ID => What::Id,
            T_DISCARD => What::Discard,
            T_WRITE_ZEROES => What::Zero,
            _ => What::Unknown,
        };
        Ok(Request { chain, what, status })
    }

    /// Bytes of memory it will hold at a time.
    pub(super) fn cost(&self) -> u64 {
        let data = match self.what {
            What::Read(_) => self.chain.writable_len,
            What::Write(_) => self.chain.readable_len,
            _ => 0,
        };
        data.min(PIECE)
    }

    /// Carries it out and writes the status; how many bytes were written to the guest's memory. `None`: the daemon ends before it can say how
    /// this went, and the guest is not to hear of it: it is in the log of requests in flight, and is carried out again by the successor.
    pub(super) async fn run(self, device: &Device, memory: &GuestMemory) -> Option<u32> {
        let (status, written) = match self.execute(device, memory).await {
            Ok(n) => (S_OK, n),
            Err(e) if e.kind() == ErrorKind::Unsupported => (S_UNSUPP, 0),
            Err(e) if e.kind() == ErrorKind::Ending => return None,
            Err(_) => (S_IOERR, 0),
        };
        // the memory was checked; if it has been taken away since, the ring finds out
        let _ = memory.scatter(&[self.status], 0, &Data::copy_from(&[status]));
        // also a read that failed may have written a part; the status is in the last of these
        self.chain.writable.iter().for_each(|p| device.mark_written(p.at, u64::from(p.len)));
        Some(written + 1)
    }

    async fn execute(&self, device: &Device, memory: &GuestMemory) -> Result<u32> {
        let c = &self.chain;
        match self.what {
            What::Read(sector) => {
                let span = device.span(sector, c.writable_len - 1)?;
                for piece in span.pieces(PIECE) {
                    let data = device.edge().read(piece).await?;
                    memory.scatter(&c.writable, piece.start - span.start, &data)?;
                }
                Ok(span.len as u32)
            }
            What::Write(sector) => {
                device.check_writable()?;
                let span = device.span(sector, c.readable_len - HEADER)?;
                let flags = device.write_flags();
                for piece in span.pieces(PIECE) {
                    let from = HEADER + (piece.start - span.start);
                    let data = memory.gather(&c.readable, from, piece.len as usize)?;
                    device.edge().write(piece.start, data, flags).await?;
                }
                Ok(0)
            }
            What::Flush => device.edge().flush().await.map(|()| 0),
            What::Id => {
                let mut id = [0; ID_BYTES];
                id[..ID.len()].copy_from_slice(ID);
                let n = (c.writable_len - 1).min(ID_BYTES as u64) as usize;
                memory.scatter(&c.writable, 0, &Data::copy_from(&id[..n]))?;
                Ok(n as u32)
            }
            What::Discard | What::Zero => self.ranges(device, memory).await.map(|()| 0),
            What::Unknown => Err(BlockError::unsupported("unknown request")),
        }
    }

    /// Discards or makes zero the one range that the request has (we announce one).
    async fn ranges(&self, device: &Device, memory: &GuestMemory) -> Result<()> {
        device.check_writable()?;
        if self.chain.readable_len != HEADER + RANGE {
            return Err(BlockError::unsupported("a request to discard has one range"));
        }
        let mut bytes = [0; RANGE as usize];
        memory.gather(&self.chain.readable, HEADER, RANGE as usize)?.copy_to(&mut bytes);
        let sector = u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default());
        let count = u32::from_le_bytes(bytes[8..12].try_into().unwrap_or_default());
        let flags = u32::from_le_bytes(bytes[12..].try_into().unwrap_or_default());
        let zero = matches!(self.what, What::Zero);
        let known = if zero { RANGE_UNMAP } else { 0 };
        if flags & !known != 0 {
            return Err(BlockError::unsupported("unknown flags of a range"));
        }
        if count > MAX_RANGE_SECTORS {
            return Err(BlockError::invalid("a range is longer than announced"));
        }
        let span = device.span(sector, u64::from(count) * SECTOR)?;
        if span.is_empty() {
            return Ok(());
        }
        let write_flags = device.write_flags();
        if zero {
            let flags = ReqFlags { may_unmap: flags & RANGE_UNMAP != 0, ..write_flags };
            return device.edge().zero(span, flags).await;
        }
        device.edge().discard(span).await?;
        if write_flags.fua { device.edge().flush().await } else { Ok(()) }
    }
}
