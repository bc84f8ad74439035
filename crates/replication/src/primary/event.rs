//! What goes into the primary's state machine, and what comes out.

use super::{Config, PeerState};
use crate::digest::Digest;
use crate::types::{Epoch, Generation, Seq};
use crate::wire::Frame;
use bitmap::Bitmap;

/// What happens.
#[derive(Debug)]
pub enum Input<'a> {
    /// There is a connection to a peer.
    Connected(usize),
    /// The connection is gone.
    Disconnected(usize, String),
    /// A peer sent this.
    Frame(usize, &'a Frame),
    /// Everything that a syncing peer missed has been sent.
    SyncDone(usize),
    /// A checkpoint is wanted.
    Mark {
        /// An external manager decides about it.
        external: bool,
    },
    /// An external manager decides about an epoch ([`Primary::cannot_decide`](super::Primary::cannot_decide) says whether it may): to
    /// commit it, or to let it go on in the next, for this reason.
    Decide(Epoch, Result<(), String>),
    /// Other settings.
    Configure(Config),
    /// A peer is none any more.
    Remove(usize),
    /// A peer that refused may be tried again.
    Retry(usize),
    /// Before a restart this side was fenced by that generation.
    Fence(Generation),
}

/// What is to be done, in this order.
#[derive(Debug)]
pub enum Output {
    /// Send it, after what was given before.
    Send(usize, Frame),
    /// End the connection. Whoever reconnects does so later.
    Close(usize),
    /// Send the peer these granules of each volume as catch-up, then say [`Input::SyncDone`].
    Sync(usize, Vec<Bitmap>),
    /// Acknowledgements have come: look again at what waits.
    Progress,
    /// A checkpoint would be useful now.
    WantCheckpoint,
    /// Every peer has committed: what was written up to here need not be remembered.
    Clean(Epoch),
    /// Tell the manager.
    Event(Event),
}

/// What a manager wants to know.
#[derive(Clone, PartialEq, Debug)]
#[allow(missing_docs)] // the fields say it
pub enum Event {
    PeerState {
        peer: usize,
        old: PeerState,
        new: PeerState,
        reason: String,
    },
    /// Fewer copies than asked for, from this change on.
    Degraded {
        since: Seq,
        dirty_bytes: u64,
    },
    Restored {
        since: Seq,
    },
    Prepared {
        epoch: Epoch,
    },
    Checkpoint {
        epoch: Epoch,
        digest: Digest,
    },
    /// Without a peer: an external manager.
    Veto {
        epoch: Option<Epoch>,
        peer: Option<usize>,
        reason: String,
    },
    Fenced {
        by: Generation,
    },
    /// An owner that was left behind came, and was told so.
    LeftBehind {
        generation: Generation,
    },
    /// Without a peer: one that came by itself.
    SplitBrain {
        peer: Option<usize>,
    },
    BufferThreshold {
        peer: usize,
        fill: u8,
    },
}

/// Whether a change is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Yes.
    Done,
    /// Not yet.
    Wait,
    /// Never: the policy is `io-error`, or this side is fenced.
    Fail,
}
