//! A secondary, as the primary sees it.

use crate::ack::Progress;
use crate::bugs::{Bug, planted};
use crate::digest::Digest;
use crate::types::{Epoch, Seq};

/// State of a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeerState {
    /// No connection.
    Down,
    /// HELLO is sent.
    Connecting,
    /// Gets what it missed, inside one open epoch.
    Syncing,
    /// Has everything of the open epoch; becomes a copy when that is committed.
    Synced,
    /// A copy.
    Running,
    /// Refused; only a human can go on.
    Refused,
    /// Not a peer any more.
    Removed,
}

impl PeerState {
    /// Whether changes are forwarded to it.
    pub const fn gets_changes(self) -> bool {
        matches!(self, PeerState::Syncing | PeerState::Synced | PeerState::Running)
    }

    /// Whether nobody tries to connect any more.
    pub const fn is_final(self) -> bool {
        matches!(self, PeerState::Refused | PeerState::Removed)
    }

    /// As in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            PeerState::Removed => "removed",
            PeerState::Down => "disconnected",
            PeerState::Connecting => "connecting",
            PeerState::Syncing => "syncing",
            PeerState::Synced => "synced",
            PeerState::Running => "running",
            PeerState::Refused => "refused",
        }
    }
}

/// A secondary, as the primary sees it.
pub struct Peer {
    /// State.
    pub state: PeerState,
    /// How far it has come.
    pub progress: Progress,
    /// Bytes of changes that it takes in this session, from its start.
    pub limit: u64,
    /// How full its buffer is, in percent.
    pub fill: u8,
    /// Newest checkpoint that it committed, if it ever said so.
    pub committed: Option<Epoch>,
    /// The number of its mark, if that was in this session.
    pub(super) due: Seq,
    /// What was sent of the open epoch.
    pub(super) open: Digest,
}

impl Peer {
    pub(super) fn counts(&self) -> bool {
        self.state == PeerState::Running
            || (planted(Bug::SyncingCounts) && matches!(self.state, PeerState::Syncing | PeerState::Synced))
    }
}
