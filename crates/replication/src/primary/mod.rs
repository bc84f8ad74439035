//! The primary's decisions: what is forwarded to whom, when a change is done, when a checkpoint is decided, what is still owed to each
//! peer. Pure: an event goes in, what is to be done comes out.
//!
//! What must stay true:
//! * O1: one number per change of the group, given when it is admitted; a mark takes one too, so it splits the order exactly (O5).
//! * I8: a granule is dirty from before it is written until *every* peer said that it committed an epoch that has it.
//! * I10: [`Event::Degraded`] comes out before the first change is done with fewer copies than asked for.
//! * An epoch number is never used twice in a generation, across crashes of the primary too: numbers are reserved durably before
//!   they are used ([`Primary::reserve`]), and a restarted primary begins after all that were reserved. (With numbers from
//!   memory, a peer's "committed 7" could be another 7 than the one in the dirty sets: seed 775 of tests/core.rs found it.)
//! * A decision is made once: [`Send`](Output::Send) of COMMIT after every peer that takes part is prepared (C4), and where an
//!   external manager owns it, after that said so.
//! * The peers' dead and slow ones never stop the others; no wait here has no end but the policy `suspend`.

mod event;
mod hand_over;
mod marks;
mod owners;
mod peer;
mod settings;

pub use event::{Event, Input, Output, Standing};
pub use hand_over::Readiness;
pub use marks::MarkState;
pub use peer::{Peer, PeerState};
pub use settings::{Config, LinkPolicy};

use crate::ack::{AckLevel, Progress};
use crate::bugs::{Bug, planted};
use crate::digest::Digest;
use crate::dirty::Dirty;
use crate::history::{History, Relation};
use crate::types::{Epoch, Generation, GroupId, Seq};
use crate::wire::{Body, Doubt, Frame, Hello, Reject, VolumeInfo, Welcome};
use bitmap::Bitmap;
use block::{Result, Span};
use marks::Pending;
use std::collections::VecDeque;

/// Marks sent and not decided at once (pipelining): as many as a secondary takes.
pub const MAX_MARKS: usize = crate::secondary::MAX_SEALED;

const NOT_RESERVED: &str = "no epoch is reserved";

/// A peer's buffer asks for a checkpoint from this fill on (F-1), in percent.
pub const SOFT_FILL: u8 = 70;

/// See above.
pub struct Primary {
    group: GroupId,
    volumes: Vec<VolumeInfo>,
    history: History,
    config: Config,
    open: Epoch,
    reserved: Epoch,
    last: Seq,
    open_digest: Digest,
    peers: Vec<Peer>,
    dirty: Dirty,
    marks: VecDeque<Pending>,
    degraded: bool,
    fenced: Option<Generation>,
    /// A peer was asked to take over, and nobody knows whether it has.
    handing: bool,
    /// How many disks may have another length in a moment.
    resizing: usize,
    last_checkpoint: Option<(Epoch, Digest)>,
}

impl Primary {
    /// The primary of a group, whose image comes from `history`. `dirty` covers what was written since its floor. Epochs up to
    /// `used` have had a use before.
    pub fn new(
        group: GroupId,
        volumes: Vec<VolumeInfo>,
        history: History,
        used: Epoch,
        dirty: Dirty,
        config: Config,
    ) -> Primary {
        let used = used.max(history.epoch());
        Primary {
            group,
            volumes,
            history,
            config,
            open: used.next(),
            reserved: used,
            last: Seq(0),
            open_digest: Digest::default(),
            peers: Vec::new(),
            dirty,
            marks: VecDeque::new(),
            degraded: false,
            fenced: None,
            handing: false,
            resizing: 0,
            last_checkpoint: None,
        }
    }

    /// It is durable that epochs up to `upto` may have been used.
    pub fn reserve(&mut self, upto: Epoch) {
        self.reserved = self.reserved.max(upto);
    }

    /// The last epoch that is reserved.
    pub fn reserved(&self) -> Epoch {
        self.reserved
    }

    /// Another secondary; its number.
    pub fn add_peer(&mut self) -> usize {
        self.peers.push(Peer {
            state: PeerState::Down,
            progress: Progress::default(),
            limit: 0,
            fill: 0,
            committed: None,
            due: Seq(0),
            open: Digest::default(),
        });
        self.peers.len() - 1
    }

    /// The peers.
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// Where the image comes from.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// The epoch that is written now.
    pub fn open_epoch(&self) -> Epoch {
        self.open
    }

    /// The last number given.
    pub fn last(&self) -> Seq {
        self.last
    }

    /// Bytes of changes since the last mark.
    pub fn sent_since_mark(&self) -> u64 {
        self.open_digest.bytes
    }

    /// The settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Who fenced this side, if somebody did. It never serves again.
    pub fn fenced(&self) -> Option<Generation> {
        self.fenced
    }

    /// Whether there are fewer copies than asked for.
    pub fn degraded(&self) -> bool {
        self.degraded
    }

    /// The newest checkpoint that all parties committed.
    pub fn last_checkpoint(&self) -> Option<(Epoch, Digest)> {
        self.last_checkpoint
    }

    /// Whether a marked epoch is undecided, or not acknowledged by all.
    pub fn is_pending(&self, epoch: Epoch) -> bool {
        self.marks.iter().any(|m| m.epoch == epoch)
    }

    /// Bytes written since the newest checkpoint of a peer.
    pub fn dirty_bytes(&self, peer: usize) -> u64 {
        let c = self.peers.get(peer).and_then(|p| p.committed).unwrap_or(self.dirty.floor());
        self.dirty.bytes_since(c)
    }

    /// Whether anything was written since the newest checkpoint of a peer.
    pub fn lacks(&self, peer: usize) -> bool {
        self.dirty.any_since(self.peers.get(peer).and_then(|p| p.committed).unwrap_or(self.dirty.floor()))
    }

    /// Everything written since then is known.
    pub fn dirty_floor(&self) -> Epoch {
        self.dirty.floor()
    }

    /// Everything written since checkpoint `c`; see [`Dirty::since`].
    ///
    /// # Errors
    /// A volume that is too long for a bitmap.
    pub fn dirty_since(&self, c: Epoch) -> Result<Option<Vec<Bitmap>>> {
        self.dirty.since(c)
    }

    /// Why a checkpoint cannot be made now, if so.
    pub fn cannot_mark(&self) -> Option<&'static str> {
        if self.fenced.is_some() {
            return Some("this side is fenced: another primary was promoted");
        }
        if self.handing {
            return Some("the group is being handed over");
        }
        if self.resizing > 0 && !planted(Bug::MarkedWhileResizing) {
            return Some("a disk is being resized");
        }
        if self.open > self.reserved {
            return Some(NOT_RESERVED);
        }
        if self.marks.len() >= MAX_MARKS {
            return Some("too many checkpoints are undecided");
        }
        let ready = |p: &Peer| matches!(p.state, PeerState::Running | PeerState::Synced);
        (!self.peers.iter().any(ready)).then_some("no secondary is connected and synchronized")
    }

    /// Whether a checkpoint can be made and would give a secondary something that it lacks.
    pub fn wants_checkpoint(&self) -> bool {
        let ready = |p: &Peer| matches!(p.state, PeerState::Running | PeerState::Synced);
        self.marks.is_empty()
            && self.cannot_mark().is_none_or(|why| why == NOT_RESERVED)
            && self.peers.iter().enumerate().any(|(i, p)| ready(p) && self.lacks(i))
    }

    /// A frame to a peer.
    pub fn frame(&self, seq: Seq, epoch: Epoch, body: Body) -> Frame {
        Frame { generation: self.history.generation(), seq, epoch, body }
    }

    /// Admits a change: marks it dirty and gives it its number. The caller sends it to every peer that
    /// [gets changes](PeerState::gets_changes), in this order, before it admits another.
    ///
    /// # Errors
    /// A volume that is too long for a bitmap.
    pub fn admit(&mut self, volume: u16, at: Span, payload_crc: u32) -> Result<(Seq, Epoch)> {
        self.dirty.mark(self.open, volume, at)?;
        self.last = self.last.next();
        let len = u32::try_from(at.len).unwrap_or(u32::MAX);
        self.open_digest.add(self.last, volume, at.start, len, payload_crc);
        for p in self.peers.iter_mut().filter(|p| p.state.gets_changes()) {
            p.open.add(self.last, volume, at.start, len, payload_crc);
            p.progress.queued = self.last;
        }
        Ok((self.last, self.open))
    }

    /// Admits another length of a volume, as [`Primary::admit`] does a change.
    ///
    /// # Errors
    /// A volume that is too long for a bitmap.
    pub fn admit_resize(&mut self, volume: u16, len: u64) -> Result<Frame> {
        self.dirty.resize(self.open, volume, len)?;
        self.resizing += 1;
        if let Some(v) = self.volumes.get_mut(usize::from(volume)) {
            v.len = len;
        }
        self.last = self.last.next();
        self.open_digest.add(self.last, volume, len, 0, 0);
        for p in self.peers.iter_mut().filter(|p| p.state.gets_changes()) {
            p.open.add(self.last, volume, len, 0, 0);
            p.progress.queued = self.last;
        }
        Ok(self.frame(self.last, self.open, Body::Resize { volume, len }))
    }

    /// It is known whether a disk has the length that was admitted. Until then no checkpoint is made: one side could commit a length that its
    /// owner is told it has not.
    pub fn resize_ends(&mut self) {
        self.resizing = self.resizing.saturating_sub(1);
    }

    /// The disk here has not got the length that was admitted: it stays as it was, and whoever is told so at the next beginning follows.
    pub fn not_resized(&mut self, volume: u16, len: u64) {
        if let Some(v) = self.volumes.get_mut(usize::from(volume)) {
            v.len = len;
        }
    }

    /// Whether every secondary has come so far, durably.
    ///
    /// # Errors
    /// The first of them that gets no changes.
    pub fn all_have(&self, seq: Seq) -> std::result::Result<bool, usize> {
        let present = || self.peers.iter().enumerate().filter(|p| p.1.state != PeerState::Removed);
        match present().find(|p| !p.1.state.gets_changes()) {
            Some((away, _)) => Err(away),
            None => Ok(present().all(|p| p.1.progress.durable >= seq)),
        }
    }

    /// A change with the same number as the last one, for one peer that is being synchronized. `false`: not now.
    pub fn admit_catch_up(&mut self, peer: usize, volume: u16, at: Span, payload_crc: u32) -> bool {
        let (last, len) = (self.last, u32::try_from(at.len).unwrap_or(u32::MAX));
        let Some(p) = self.peers.get_mut(peer).filter(|p| p.state == PeerState::Syncing) else {
            return false;
        };
        p.open.add(last, volume, at.start, len, payload_crc);
        true
    }

    /// `at` was written here in a way that nobody knows the result of (a failed write): it is dirty.
    ///
    /// # Errors
    /// A volume that is too long for a bitmap.
    pub fn unsure(&mut self, volume: u16, at: Span) -> Result<()> {
        self.dirty.mark(self.open, volume, at)
    }

    /// Whether what was admitted up to `seq` is done at `level`.
    pub fn standing(&self, seq: Seq, level: AckLevel) -> Standing {
        if self.fenced.is_some() {
            return Standing::Fail;
        }
        if matches!(level, AckLevel::Local | AckLevel::Checkpoint) || self.no_peers() {
            return Standing::Done;
        }
        let at = |p: usize| self.peers.get(p).filter(|p| p.counts()).map(|p| p.progress.at(level));
        match self.config.quorum.reached(at, self.peers.len()) {
            Some(reached) if reached >= seq => Standing::Done,
            Some(_) => Standing::Wait,
            None => match self.config.policy {
                LinkPolicy::Degrade => Standing::Done,
                LinkPolicy::Suspend => Standing::Wait,
                LinkPolicy::IoError => Standing::Fail,
            },
        }
    }

    /// How far a peer is on the way of change `seq` to `level`, for somebody who waits for that; nothing if it is not up to this peer. One that
    /// gets no further can be alive: its disk is what is stuck.
    pub fn owes(&self, peer: usize, seq: Seq, level: AckLevel) -> Option<(Seq, Seq, usize)> {
        let p = self.peers.get(peer).filter(|p| p.counts())?;
        let at = p.progress.at(level);
        if at >= seq {
            return None;
        }
        let mut steps = 0;
        if level == AckLevel::RemoteApplied && p.progress.written >= seq && p.due < seq {
            // it can be brought to the disk only behind a checkpoint, as far as that is for this peer to make
            let m = self.marks.iter().find(|m| m.seq >= seq)?;
            let prepared = m.parties.iter().find(|x| x.0 == peer)?.1;
            if prepared && !m.decided {
                return None;
            }
            steps = usize::from(prepared);
        }
        Some((at, p.due, steps))
    }

    /// Takes a step.
    ///
    /// # Errors
    /// A volume that is too long for a bitmap.
    pub fn step(&mut self, input: Input<'_>, out: &mut Vec<Output>) -> Result<()> {
        match input {
            Input::Connected(peer) if self.peers.get(peer).is_none_or(|p| p.state.is_final()) => {
                out.push(Output::Close(peer));
            }
            Input::Connected(peer) => {
                let hello =
                    Hello { group: self.group, history: self.history.clone(), volumes: self.volumes.clone() };
                self.set_state(peer, PeerState::Connecting, "connected", out);
                out.push(Output::Send(peer, self.frame(Seq(0), self.open, Body::Hello(Box::new(hello)))));
            }
            Input::Disconnected(peer, why) => self.down(peer, &why, out),
            Input::Frame(peer, frame) => return self.peer_says(peer, frame, out),
            Input::SyncDone(peer) => {
                if self.peers.get(peer).is_some_and(|p| p.state == PeerState::Syncing) {
                    self.set_state(peer, PeerState::Synced, "everything missed was sent", out);
                    out.push(Output::WantCheckpoint);
                }
            }
            Input::Mark { external } => self.mark(external, out),
            Input::Decide(epoch, decision) => self.decide_by_hand(epoch, decision, out),
            Input::Fence(by) => self.fence(by, out),
            Input::Retry(peer) => {
                if self.peers.get(peer).is_some_and(|p| p.state == PeerState::Refused) {
                    self.set_state(peer, PeerState::Down, "to be tried again", out);
                }
            }
            Input::Remove(peer) => {
                self.down(peer, "removed", out);
                self.set_state(peer, PeerState::Removed, "removed", out);
                self.clean(out);
                out.push(Output::Progress);
            }
            Input::Configure(config) => {
                self.config = config;
                self.judge(out);
                out.push(Output::Progress);
            }
        }
        Ok(())
    }

    fn set_state(&mut self, peer: usize, new: PeerState, reason: &str, out: &mut Vec<Output>) {
        let Some(p) = self.peers.get_mut(peer) else { return };
        let old = std::mem::replace(&mut p.state, new);
        if old != new {
            out.push(Output::Event(Event::PeerState { peer, old, new, reason: reason.to_owned() }));
            self.judge(out);
            out.push(Output::Progress);
        }
    }

    /// Says so if there are fewer copies than asked for, or enough again.
    fn judge(&mut self, out: &mut Vec<Output>) {
        let (peers, possible) = (&self.peers, self.enough());
        if possible == self.degraded && !self.no_peers() {
            self.degraded = !possible;
            out.push(Output::Event(if possible {
                Event::Restored { since: self.last.next() }
            } else {
                let worst = (0..peers.len()).map(|p| self.dirty_bytes(p)).max();
                Event::Degraded { since: self.last.next(), dirty_bytes: worst.unwrap_or(0) }
            }));
        }
    }

    fn down(&mut self, peer: usize, why: &str, out: &mut Vec<Output>) {
        let Some(p) = self.peers.get_mut(peer) else { return };
        p.progress = Progress::default();
        p.open = Digest::default();
        (p.limit, p.due) = (0, Seq(0));
        let new = if p.state.is_final() { p.state } else { PeerState::Down };
        self.set_state(peer, new, why, out);
        self.leaves_marks(peer, why, out);
    }

    fn peer_says(&mut self, peer: usize, frame: &Frame, out: &mut Vec<Output>) -> Result<()> {
        if self.peers.get(peer).is_none_or(|p| matches!(p.state, PeerState::Down | PeerState::Removed)) {
            return Ok(());
        }
        match &frame.body {
            Body::Welcome(w) => return self.welcome(peer, w, out),
            Body::Reject { why, text } => {
                match why {
                    Reject::Fenced(by) => self.fence(*by, out),
                    Reject::SplitBrain => {
                        out.push(Output::Event(Event::SplitBrain { peer: Some(peer) }));
                    }
                    _ => {}
                }
                if *why != Reject::Busy {
                    self.set_state(peer, PeerState::Refused, text, out);
                }
                out.push(Output::Close(peer));
            }
            Body::Fenced { by } => {
                self.fence(*by, out);
                out.push(Output::Close(peer));
            }
            Body::Ack(a) => {
                let last = self.last;
                let Some(p) = self.peers.get_mut(peer) else { return Ok(()) };
                p.progress.raise(a.received.min(last), a.written, a.durable, a.applied);
                p.limit = p.limit.max(a.limit);
                if a.fill >= SOFT_FILL && p.fill < SOFT_FILL {
                    out.push(Output::Event(Event::BufferThreshold { peer, fill: a.fill }));
                    out.push(Output::WantCheckpoint);
                }
                p.fill = a.fill;
                out.push(Output::Progress);
            }
            Body::Nack { text, .. } => self.refuses(peer, None, text, out),
            Body::Veto { text } => self.refuses(peer, Some(frame.epoch), text, out),
            Body::Prepared => {
                for m in self.marks.iter_mut().filter(|m| m.epoch == frame.epoch) {
                    m.parties.iter_mut().filter(|p| p.0 == peer).for_each(|p| p.1 = true);
                }
                self.advance_marks(out);
            }
            Body::Committed { .. } => self.committed(peer, frame.epoch, out),
            Body::Ping { sent } => {
                out.push(Output::Send(peer, self.frame(self.last, self.open, Body::Pong { sent: *sent })));
            }
            Body::Pong { .. } | Body::Hash { .. } => {}
            Body::Bye { text } => {
                self.down(peer, text, out);
                out.push(Output::Close(peer));
            }
            _ => {
                self.down(peer, "protocol error: a frame that only a primary sends", out);
                out.push(Output::Close(peer));
            }
        }
        Ok(())
    }

    /// What a peer holds of the open epoch is not what was sent: it begins anew, from its checkpoint.
    fn refuses(&mut self, peer: usize, epoch: Option<Epoch>, why: &str, out: &mut Vec<Output>) {
        out.push(Output::Event(Event::Veto { epoch, peer: Some(peer), reason: why.to_owned() }));
        self.down(peer, why, out);
        out.push(Output::Close(peer));
    }

    fn fence(&mut self, by: Generation, out: &mut Vec<Output>) {
        if by > self.history.generation() && self.fenced.is_none() {
            self.fenced = Some(by);
            out.push(Output::Event(Event::Fenced { by }));
            out.push(Output::Progress);
        }
    }

    /// The newest checkpoint that disks given up by a former owner hold, or those of a secondary that goes back, apart from the places that it
    /// names.
    fn holds_still(&self, doubt: &Doubt) -> Option<Epoch> {
        let (theirs, since) = doubt.former.as_ref()?;
        let fork = match self.history.compare(theirs) {
            Relation::Same => theirs.epoch(),
            Relation::Behind(c) | Relation::Ahead(c) | Relation::Outdated(c) | Relation::SplitBrain(c) => c,
            Relation::Fresh | Relation::Unrelated => return None,
        };
        (*since <= fork).then_some(fork)
    }

    fn welcome(&mut self, peer: usize, w: &Welcome, out: &mut Vec<Output>) -> Result<()> {
        let (theirs, limit) = (&w.history, w.limit);
        if self.peers.get(peer).is_none_or(|p| p.state != PeerState::Connecting) {
            return Ok(());
        }
        // Only this side makes epochs of its generation: what a peer has of them was made here, before a restart.
        if theirs.generation() == self.history.generation() && theirs.past() == self.history.past() {
            if theirs.epoch() >= self.open {
                self.set_state(peer, PeerState::Refused, "it claims a checkpoint that was never made", out);
                out.push(Output::Close(peer));
                return Ok(());
            }
            self.history.advance(theirs.epoch());
        } else if self.open <= theirs.epoch() {
            // A peer that was ahead on an older path: it gets everything, and its checkpoint number never goes back (I4).
            self.open = theirs.epoch().next();
        }
        let from = match self.history.compare(theirs) {
            Relation::Same => Some(theirs.epoch()),
            Relation::Behind(c) => Some(c),
            Relation::Fresh | Relation::Ahead(_) => None,
            Relation::Outdated(_) | Relation::SplitBrain(_) | Relation::Unrelated => {
                self.set_state(peer, PeerState::Refused, "the images' histories do not fit", out);
                out.push(Output::Close(peer));
                return Ok(());
            }
        };
        let mut known = match from.or_else(|| self.holds_still(&w.doubt)) {
            Some(c) => self.dirty.since(c)?,
            None => None,
        };
        match (&mut known, &w.doubt.places) {
            _ if planted(Bug::DoubtForgotten) => {}
            (Some(known), Some(places)) => {
                for (volume, at) in places {
                    let i = usize::from(*volume);
                    // its disk may be longer, and the sets as well, where a growth did not come about
                    if let (Some(bits), Some(v)) = (known.get_mut(i), self.volumes.get(i)) {
                        bits.set(at.intersect(&Span::new(0, v.len)));
                    }
                }
            }
            (known, None) => *known = None,
            (None, _) => {}
        }
        let work = match known {
            Some(work) => work,
            None => {
                let all = self.volumes.iter().map(|v| Bitmap::new(v.len, crate::dirty::GRANULE));
                let mut all = all.collect::<Result<Vec<_>>>()?;
                all.iter_mut().for_each(Bitmap::set_all);
                all
            }
        };
        let last = self.last;
        if let Some(p) = self.peers.get_mut(peer) {
            p.limit = limit;
            p.committed = from;
            p.open = Digest::default();
            p.progress = Progress { queued: last, ..Progress::default() };
        }
        // A session counts from where the group is: its first frame says so.
        out.push(Output::Send(peer, self.frame(last, self.open, Body::Flush)));
        self.set_state(peer, PeerState::Syncing, "accepted", out);
        out.push(Output::Sync(peer, work));
        Ok(())
    }

    fn committed(&mut self, peer: usize, epoch: Epoch, out: &mut Vec<Output>) {
        let Some(p) = self.peers.get_mut(peer) else { return };
        if epoch >= self.open {
            return; // of an epoch that was never marked
        }
        p.committed = Some(p.committed.map_or(epoch, |c| c.max(epoch)));
        if let Some(m) = self.marks.iter().find(|m| m.epoch == epoch) {
            p.due = m.seq;
        }
        if p.state == PeerState::Synced {
            self.set_state(peer, PeerState::Running, "the catch-up is committed", out);
        }
        self.history.advance(epoch);
        self.decided_elsewhere(epoch);
        for m in self.marks.iter_mut().filter(|m| m.epoch <= epoch) {
            m.committed.push(peer);
        }
        self.clean(out);
        self.advance_marks(out);
    }

    /// Forgets what every peer has.
    fn clean(&mut self, out: &mut Vec<Output>) {
        let present = self.peers.iter().filter(|p| p.state != PeerState::Removed);
        if let Some(all) = present.map(|p| p.committed).min().flatten()
            && all > self.dirty.floor()
        {
            if !planted(Bug::DirtyClearedOnSend) {
                self.dirty.drop_through(all);
            }
            out.push(Output::Clean(all));
        }
    }

    /// Whether changes are done here alone: with no peer, or with fewer than were asked for.
    pub fn alone(&self) -> bool {
        self.no_peers() || !self.enough()
    }

    fn enough(&self) -> bool {
        let peers = &self.peers;
        self.config.quorum.possible(|p| peers.get(p).is_some_and(Peer::counts), peers.len())
    }

    /// Whether there is nobody to replicate to.
    fn no_peers(&self) -> bool {
        self.peers.iter().all(|p| p.state == PeerState::Removed)
    }
}
