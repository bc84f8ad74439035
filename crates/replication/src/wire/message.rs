//! What frames say.

use crate::ack::AckLevel;
use crate::digest::Digest;
use crate::history::History;
use crate::primary::LinkPolicy;
use crate::types::{Epoch, Generation, GroupId, Seq};
use block::{Data, Span};

/// Disks in a group: more than any machine has, and few enough for a HELLO of one frame.
pub const MAX_VOLUMES: usize = 1024;
/// Longest sentence in a frame; longer ones are cut.
pub const MAX_TEXT: usize = 512;

/// A disk of the group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumeInfo {
    /// Length in bytes, of what users see; the disk beneath may be longer.
    pub len: u64,
}

/// The primary's first frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// The group.
    pub group: GroupId,
    /// Where the primary's image comes from.
    pub history: History,
    /// Its disks, in the group's order.
    pub volumes: Vec<VolumeInfo>,
}

/// The secondary's answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Welcome {
    /// Where its image comes from; the checkpoint it is at is the end of it.
    pub history: History,
    /// Bytes of frames with changes that it takes in this session so far (see [`Ack::limit`]).
    pub limit: u64,
    /// Where its disks may hold something else.
    pub doubt: Doubt,
}

/// Places in doubt that a WELCOME names; with more, everything is. 20 bytes each, beside the longest history, in one payload.
pub const MAX_DOUBT: usize = 40_000;

/// Where disks may hold something else than the history beside this says. Who brings them up to date sends these places as well.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Doubt {
    /// Disks that were an owner's until they were given up, or a secondary's that has more than the primary's path: where their image comes
    /// from, as far as it can have come. Apart from `places` they hold *each* checkpoint on this path from the second member on.
    pub former: Option<(History, Epoch)>,
    /// Volumes and ranges; nothing: everywhere.
    pub places: Option<Vec<(u16, Span)>>,
}

impl Doubt {
    /// None.
    pub const fn none() -> Doubt {
        Doubt { former: None, places: Some(Vec::new()) }
    }
}

/// What a primary gives to the secondary that takes its place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HandOver {
    /// What the former primary is called from now on: a peer.
    pub name: String,
    /// Where it listens: a path with a slash in front, or `host:port`.
    pub address: String,
    /// When a write is done.
    pub write_level: AckLevel,
    /// When a flush is done.
    pub flush_level: AckLevel,
    /// How many secondaries' word is needed.
    pub min_acks: u16,
    /// What writes do when too few are there.
    pub policy: LinkPolicy,
    /// Time between checkpoints in milliseconds; 0: on command.
    pub interval_ms: u64,
    /// After so many milliseconds without a word a peer is taken for dead.
    pub timeout_ms: u64,
}

/// Why a primary is not accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reject {
    /// Another group.
    WrongGroup,
    /// A higher generation was seen.
    Fenced(Generation),
    /// The images have nothing in common.
    Unrelated,
    /// Both were promoted.
    SplitBrain,
    /// Other disks.
    Volumes,
    /// Another primary is connected, or this side is not a secondary now.
    Busy,
}

/// How far the secondary has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ack {
    /// Changes received.
    pub received: Seq,
    /// Changes given to the host.
    pub written: Seq,
    /// Changes on stable storage.
    pub durable: Seq,
    /// Changes on the raw disk.
    pub applied: Seq,
    /// Bytes of frames with changes that it takes in this session, counted from its start.
    pub limit: u64,
    /// How full the buffer is, in percent.
    pub fill: u8,
}

/// The content of a frame.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // the fields are named as in the table of types
pub enum Body {
    Hello(Box<Hello>),
    Welcome(Box<Welcome>),
    Reject {
        why: Reject,
        text: String,
    },
    /// `crc` is that of the payload, so that it is computed once for log and wire.
    Write {
        volume: u16,
        offset: u64,
        data: Data,
        crc: u32,
        catch_up: bool,
        fua: bool,
    },
    Zero {
        volume: u16,
        at: Span,
        unmap: bool,
        catch_up: bool,
    },
    /// In the order of the changes, and counted as one.
    Resize {
        volume: u16,
        len: u64,
    },
    Flush,
    Ack(Ack),
    Nack {
        volume: u16,
        offset: u64,
        errno: u32,
        text: String,
    },
    Mark {
        digest: Digest,
    },
    Prepared,
    Veto {
        text: String,
    },
    Commit,
    Abort,
    Committed {
        epoch_digest: Digest,
    },
    Ping {
        sent: u64,
    },
    Pong {
        sent: u64,
    },
    Fenced {
        by: Generation,
    },
    Bye {
        text: String,
    },
    HandOver(Box<HandOver>),
    HashReq {
        volume: u16,
        at: Span,
    },
    Hash {
        volume: u16,
        at: Span,
        hash: u64,
    },
}

impl Body {
    /// Whether it changes a volume.
    pub const fn is_change(&self) -> bool {
        matches!(self, Body::Write { .. } | Body::Zero { .. })
    }

    /// Volume and range of a change.
    pub fn change(&self) -> Option<(u16, Span)> {
        match self {
            Body::Write { volume, offset, data, .. } => {
                Some((*volume, Span::new(*offset, data.len() as u64)))
            }
            Body::Zero { volume, at, .. } => Some((*volume, *at)),
            _ => None,
        }
    }
}
