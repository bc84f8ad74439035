//! From received bytes to frames.

use super::body;
use super::frame::{Fields, Frame, HEADER, IGNORABLE, Kind, MAGIC, MAX_PAYLOAD, VERSION, crc_of};
use crate::types::{Epoch, Generation, Seq};
use block::{BlockError, Result};
use bytes::Bytes;
use nbd::Inbox;

/// Received pieces shorter than this are copied together: a piece that is kept keeps all of its receive buffer.
const COPY_BELOW: usize = 2048;

/// Received bytes that are not yet a frame.
#[derive(Default)]
pub struct Decoder {
    waiting: Inbox,
    /// The header that was understood, until its payload is there.
    header: Option<[u8; HEADER]>,
    broken: bool,
}

fn at<const N: usize>(h: &[u8; HEADER], from: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&h[from..from + N]);
    out
}

fn wrong(what: impl Into<String>) -> BlockError {
    BlockError::corrupt(format!("replication peer: {}", what.into()))
}

impl Decoder {
    /// Nothing received.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Adds what was received.
    pub fn push(&mut self, bytes: Bytes) {
        self.waiting.push(bytes, COPY_BELOW);
    }

    /// Bytes held.
    pub fn len(&self) -> usize {
        self.waiting.len() + if self.header.is_some() { HEADER } else { 0 }
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next frame, if it is complete. After an error every further call fails: the stream has no frame borders any more.
    pub fn next_frame(&mut self) -> Result<Option<Frame>> {
        if self.broken {
            return Err(wrong("the stream broke before"));
        }
        loop {
            match self.try_next() {
                Ok(Step::Frame(f)) => return Ok(Some(f)),
                Ok(Step::Skipped) => {}
                Ok(Step::Wait) => return Ok(None),
                Err(e) => {
                    self.broken = true;
                    return Err(e);
                }
            }
        }
    }

    fn try_next(&mut self) -> Result<Step> {
        let h = match self.header {
            Some(h) => h,
            None => {
                let Some(h) = self.waiting.take_array::<HEADER>() else { return Ok(Step::Wait) };
                check_header(&h)?;
                self.header = Some(h);
                h
            }
        };
        let len = u32::from_le_bytes(at(&h, 12)) as usize;
        let Some(payload) = self.waiting.take(len) else { return Ok(Step::Wait) };
        self.header = None;
        let payload_crc = u32::from_le_bytes(at(&h, 16));
        if crc_of(&payload) != payload_crc {
            return Err(wrong(format!("wrong checksum of the payload of a frame of type {}", h[5])));
        }
        let flags = u16::from_le_bytes(at(&h, 6));
        let Some(kind) = Kind::from_wire(h[5]) else {
            if flags & IGNORABLE != 0 {
                return Ok(Step::Skipped);
            }
            return Err(wrong(format!("unknown frame of type {}", h[5])));
        };
        let body = body::parse(&Fields {
            kind,
            flags,
            volume: u16::from_le_bytes(at(&h, 44)),
            offset: u64::from_le_bytes(at(&h, 48)),
            len: u32::from_le_bytes(at(&h, 56)),
            payload,
            payload_crc: Some(payload_crc),
        })?;
        Ok(Step::Frame(Frame {
            generation: Generation(u64::from_le_bytes(at(&h, 20))),
            seq: Seq(u64::from_le_bytes(at(&h, 28))),
            epoch: Epoch(u64::from_le_bytes(at(&h, 36))),
            body,
        }))
    }
}

enum Step {
    Frame(Frame),
    Skipped,
    Wait,
}

/// Magic, version, checksum and the bound of the payload: all before a byte of the payload is waited for.
fn check_header(h: &[u8; HEADER]) -> Result<()> {
    if u32::from_le_bytes(at(h, 0)) != MAGIC {
        return Err(wrong("not a replication stream (wrong magic)"));
    }
    if h[4] != VERSION {
        return Err(wrong(format!(
            "it speaks version {} of the replication protocol, this side version {VERSION}: both sides need the same",
            h[4]
        )));
    }
    let mut plain = *h;
    plain[8..12].fill(0);
    if crc32c::crc32c(&plain) != u32::from_le_bytes(at(h, 8)) {
        return Err(wrong("wrong checksum of a header"));
    }
    let len = u32::from_le_bytes(at(h, 12)) as usize;
    if len > MAX_PAYLOAD {
        return Err(wrong(format!("a payload of {len} bytes is longer than {MAX_PAYLOAD}")));
    }
    Ok(())
}
