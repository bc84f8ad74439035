//! The header of a frame, and writing one.

use super::body;
use super::message::Body;
use crate::types::{Epoch, Generation, Seq};
use block::Data;
use bytes::Bytes;

/// Bytes of a header.
pub const HEADER: usize = 64;
/// Longest payload; longer writes are split. One of them is what a receiver may have to hold for a single frame.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// First bytes of a frame.
pub(super) const MAGIC: u32 = u32::from_le_bytes(*b"lbR1");
/// Version of the layout of frames and of what is in them; both sides have the same. Place and width of it, and of the magic before it, never change.
/// 2: a WELCOME names the places in doubt. 3: RESIZE, and lengths in HELLO that a secondary follows. 4: HASH is of BLAKE3.
pub(super) const VERSION: u8 = 4;
/// A type that the receiver does not know is skipped if the frame has this flag; without it, it ends the session.
pub(super) const IGNORABLE: u16 = 0x8000;
/// The change is part of a catch-up: it has the place of the last change of the group and no number of its own.
pub(super) const CATCH_UP: u16 = 0x0001;
/// Of zeroes: give the space back.
pub(super) const UNMAP: u16 = 0x0002;
/// Acknowledge only when durable.
pub(super) const FUA: u16 = 0x0004;

macro_rules! kinds { ($($(#[$doc:meta])* $name:ident = $n:literal,)*) => {
    /// The type of a frame.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    #[repr(u8)]
    pub enum Kind { $($(#[$doc])* $name = $n,)* }
    impl Kind {
        pub(super) const fn from_wire(n: u8) -> Option<Kind> {
            match n { $($n => Some(Kind::$name),)* _ => None }
        }
    }
} }
kinds! {
    /// Primary: who I am, and where my image comes from.
    Hello = 1,
    /// Secondary: accepted; where my image comes from, how much I take.
    Welcome = 2,
    /// Secondary: refused.
    Reject = 3,
    /// Primary: bytes.
    Write = 4,
    /// Primary: zeroes.
    Zero = 5,
    /// Primary: say when everything up to here is durable.
    Flush = 6,
    /// Secondary: how far it has come.
    Ack = 7,
    /// Secondary: a change could not be kept; the open epoch will be vetoed.
    Nack = 8,
    /// Primary: an epoch ends here.
    Mark = 9,
    /// Secondary: the epoch is complete and durable.
    Prepared = 10,
    /// Secondary: the epoch must not be committed.
    Veto = 11,
    /// Primary: the decision.
    Commit = 12,
    /// Primary: the epoch goes on as part of the next.
    Abort = 13,
    /// Secondary: the decision is durable and visible.
    Committed = 14,
    /// Both: are you there?
    Ping = 15,
    /// Both: yes.
    Pong = 16,
    /// Secondary: a higher generation exists.
    Fenced = 17,
    /// Both: the end, on purpose.
    Bye = 18,
    /// Primary: take over here, at this checkpoint.
    HandOver = 19,
    /// Primary: what does this range hold, with every change up to here?
    HashReq = 20,
    /// Secondary: its hash.
    Hash = 21,
    /// Primary: a volume has another length from here on.
    Resize = 22,
}

/// A frame: the fixed fields and what it says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// Of the sender's view of the group.
    pub generation: Generation,
    /// Place in the group's order.
    pub seq: Seq,
    /// Which epoch it is about.
    pub epoch: Epoch,
    /// The rest.
    pub body: Body,
}

/// CRC32C of a rope.
pub fn crc_of(data: &Data) -> u32 {
    data.parts().iter().fold(0, |crc, p| crc32c::crc32c_append(crc, p))
}

/// The fields of a header that a body decides.
pub(super) struct Fields {
    pub(super) kind: Kind,
    pub(super) flags: u16,
    pub(super) volume: u16,
    pub(super) offset: u64,
    pub(super) len: u32,
    pub(super) payload: Data,
    /// If it was computed before.
    pub(super) payload_crc: Option<u32>,
}

impl Frame {
    /// The bytes to send: the header, and the payload shared, not copied.
    pub fn encode(&self) -> Data {
        let f = body::fields(&self.body);
        let mut h = [0u8; HEADER];
        h[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        h[4] = VERSION;
        h[5] = f.kind as u8;
        h[6..8].copy_from_slice(&f.flags.to_le_bytes());
        let payload_len = u32::try_from(f.payload.len()).unwrap_or(u32::MAX);
        h[12..16].copy_from_slice(&payload_len.to_le_bytes());
        let payload_crc = f.payload_crc.unwrap_or_else(|| crc_of(&f.payload));
        h[16..20].copy_from_slice(&payload_crc.to_le_bytes());
        h[20..28].copy_from_slice(&self.generation.0.to_le_bytes());
        h[28..36].copy_from_slice(&self.seq.0.to_le_bytes());
        h[36..44].copy_from_slice(&self.epoch.0.to_le_bytes());
        h[44..46].copy_from_slice(&f.volume.to_le_bytes());
        h[48..56].copy_from_slice(&f.offset.to_le_bytes());
        h[56..60].copy_from_slice(&f.len.to_le_bytes());
        let crc = crc32c::crc32c(&h);
        h[8..12].copy_from_slice(&crc.to_le_bytes());
        let mut out = Data::from(Bytes::copy_from_slice(&h));
        out.append(f.payload);
        out
    }

    /// Bytes that [`Frame::encode`] gives.
    pub fn wire_len(&self) -> u64 {
        HEADER as u64 + body::payload_len(&self.body)
    }
}
