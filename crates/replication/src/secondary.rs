//! The secondary's decisions: whom to believe, what to keep, when an epoch may be committed. Pure: a frame or a result goes in, what
//! is to be done comes out.
//!
//! What must stay true:
//! * I7: a frame whose generation is older than the highest ever seen leads to no [`Output::Keep`]; the highest is durable
//!   before a session is welcomed.
//! * I6: what is kept of an open epoch is a gap-free prefix of the primary's sequence.
//! * C4: an epoch is prepared only if every change of it is there (sequence, count, digest) and none was refused.
//! * Nothing is decided here: without a COMMIT the secondary stays where it is.

use crate::bugs::{Bug, planted};
use crate::digest::Digest;
use crate::history::{History, Relation};
use crate::types::{Epoch, Generation, GroupId, Seq};
use crate::wire::{Ack, Body, Doubt, Frame, HandOver, Hello, Reject, VolumeInfo, Welcome};
use block::Span;
use std::collections::VecDeque;

/// Epochs that may be marked and undecided at once. Two keep the primary going while one is decided.
pub const MAX_SEALED: usize = 8;

/// A session, as numbered by whoever accepts connections.
pub type SessionId = u64;

/// What happens.
#[derive(Debug)]
pub enum Input<'a> {
    /// A frame arrived.
    Frame(SessionId, &'a Frame),
    /// What [`Output::Begin`] asked for is durable; so much may be sent.
    Begun {
        /// In this session.
        session: SessionId,
        /// Bytes.
        limit: u64,
        /// Where the disks may hold something else than the checkpoint.
        doubt: Doubt,
    },
    /// All changes handed out so far in the session are with the host.
    Kept {
        /// In this session.
        session: SessionId,
        /// Up to this one they are on stable storage as well, as far as that is known; zero if not.
        durable: Seq,
        /// Whether they are on the raw disk, too (the undo engine).
        applied: bool,
        /// Bytes that may be sent, from the session's start.
        limit: u64,
        /// How full the buffer is, in percent.
        fill: u8,
    },
    /// A change could not be kept.
    Refused {
        /// Of which volume.
        volume: u16,
        /// Where.
        offset: u64,
        /// Why.
        errno: i32,
        /// Why, in words.
        text: String,
    },
    /// [`Output::Prepare`] is done, or not.
    Prepared(Epoch, Result<(), String>),
    /// The decision is durable and visible.
    Decided(Epoch),
    /// The connection is gone.
    Gone(SessionId),
    /// This side takes over. The new generation is durable.
    Promoted(Generation, Epoch),
}

/// What is to be done, in this order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// Send it.
    Send(SessionId, Frame),
    /// End the session.
    Close(SessionId),
    /// Make it durable that this generation was seen, forget the open epoch, and say [`Input::Begun`].
    Begin {
        /// For this session.
        session: SessionId,
        /// Highest generation seen.
        generation: Generation,
        /// Lengths of the volumes from here on; the view has them with the next checkpoint.
        lens: Vec<u64>,
    },
    /// Keep the change of the frame that was just given.
    Keep,
    /// A volume has another length from here on. It can be so long durably before anything else is done; else say [`Input::Refused`].
    Resize(u16, u64),
    /// Make all that was kept so far durable, then say [`Input::Kept`]; more may come meanwhile, here and with the next two.
    Flush(SessionId),
    /// The open epoch ends: make it durable, and say [`Input::Prepared`]. If it is decided, this is where the image comes from.
    Prepare(Epoch, Digest, History),
    /// Record the decision durably, make it visible, and say [`Input::Decided`].
    Commit(Epoch),
    /// The epoch goes on as part of the next.
    Abort(Epoch),
    /// A primary of an older generation tried to write.
    Fenced(Generation),
    /// A checkpoint is refused, for this reason.
    Vetoed(Epoch, String),
    /// Both sides were promoted.
    SplitBrain(History),
    /// Answer with [`Body::Hash`]: what the range holds, with every change that was kept so far.
    Hash {
        /// In this session.
        session: SessionId,
        /// Of which volume.
        volume: u16,
        /// Where.
        at: Span,
    },
    /// The primary hands the group over at the checkpoint this side is at: promote, and say [`Input::Promoted`].
    TakeOver(Box<HandOver>),
}

struct Sealed {
    epoch: Epoch,
    digest: Digest,
    prepared: bool,
}

struct Session {
    id: SessionId,
    generation: Generation,
    history: History,
    volumes: Vec<VolumeInfo>,
    welcomed: bool,
    /// The last number seen; nothing before the first frame, which says where the session begins.
    last: Option<Seq>,
    /// The epoch that the next change belongs to.
    epoch: Epoch,
    open: Digest,
    poisoned: Option<String>,
    sealed: VecDeque<Sealed>,
    /// The newest epoch that was aborted with changes in it: they are behind the checkpoint until a later epoch is decided.
    aborted: Option<Epoch>,
    /// A checkpoint was decided in this session: what this side had missed before it is here.
    decided: bool,
}

/// See above.
pub struct Secondary {
    group: GroupId,
    volumes: Vec<VolumeInfo>,
    /// How long the disks are: a growth that was prepared may not have come about.
    disks: Vec<u64>,
    /// The disks may have other lengths than those of the first primary that comes: they were an owner's.
    any_length: bool,
    highest: Generation,
    history: History,
    promoted: bool,
    session: Option<Session>,
    /// Where the image comes from once an epoch of the last session is decided.
    agreed: Option<History>,
    committed_digest: Digest,
}

impl Secondary {
    /// A secondary whose image comes from `history`, that has seen `highest`.
    pub fn new(
        group: GroupId,
        volumes: Vec<VolumeInfo>,
        highest: Generation,
        history: History,
        promoted: bool,
    ) -> Secondary {
        let highest = highest.max(history.generation());
        Secondary {
            group,
            disks: volumes.iter().map(|v| v.len).collect(),
            volumes,
            any_length: false,
            highest,
            history,
            promoted,
            session: None,
            agreed: None,
            committed_digest: Digest::default(),
        }
    }

    /// Where the image of the primary comes from that is connected, or was last.
    pub fn agreed(&self) -> Option<&History> {
        self.agreed.as_ref()
    }

    /// The disks are so long.
    pub fn disks_are(&mut self, lens: Vec<u64>) {
        self.disks = lens;
    }

    /// The disks were an owner's, who may have gone on to other lengths.
    pub fn was_owner(&mut self) {
        self.any_length = true;
    }

    /// Where the image comes from.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// Highest generation seen.
    pub fn highest(&self) -> Generation {
        self.highest
    }

    /// The session that is welcomed now.
    pub fn session(&self) -> Option<SessionId> {
        self.session.as_ref().filter(|s| s.welcomed).map(|s| s.id)
    }

    /// An external manager decided here about an epoch that is prepared; the image comes from `history` then. To be followed by
    /// [`Input::Decided`].
    pub fn agree(&mut self, history: History) {
        self.agreed = Some(history);
    }

    /// The last change of the session, and bytes of the open epoch.
    pub fn received(&self) -> (Seq, u64) {
        self.session.as_ref().map_or((Seq(0), 0), |s| (s.last.unwrap_or_default(), s.open.bytes))
    }

    /// Why the open epoch cannot be committed, if so.
    pub fn poisoned(&self) -> Option<&str> {
        self.session.as_ref().and_then(|s| s.poisoned.as_deref())
    }

    /// Takes a step.
    pub fn step(&mut self, input: Input<'_>, out: &mut Vec<Output>) {
        match input {
            Input::Frame(id, frame) => self.frame(id, frame, out),
            Input::Begun { session, limit, doubt } => {
                let (generation, history) = (self.highest, self.history.clone());
                if let Some(s) = self.session.as_mut().filter(|s| s.id == session && !s.welcomed) {
                    s.welcomed = true;
                    let body = Body::Welcome(Box::new(Welcome { history, limit, doubt }));
                    out.push(Output::Send(session, Frame { generation, seq: Seq(0), epoch: Epoch(0), body }));
                }
            }
            Input::Kept { session, durable, applied, limit, fill } => {
                if let Some(s) = self.session.as_ref().filter(|s| s.id == session) {
                    let (none, last) = (Seq(0), s.last.unwrap_or_default());
                    let ack = Ack {
                        received: last,
                        written: last,
                        durable,
                        applied: if applied { last } else { none },
                        limit,
                        fill,
                    };
                    out.push(self.send(session, Epoch(0), Body::Ack(ack)));
                }
            }
            Input::Refused { volume, offset, errno, text } => {
                if let Some(s) = self.session.as_mut() {
                    if planted(Bug::RefusalForgotten) {
                        return;
                    }
                    s.poisoned.get_or_insert_with(|| format!("volume {volume} at offset {offset}: {text}"));
                    let id = s.id;
                    let errno = u32::try_from(errno).unwrap_or(0);
                    out.push(self.send(id, Epoch(0), Body::Nack { volume, offset, errno, text }));
                }
            }
            Input::Prepared(epoch, result) => self.prepared(epoch, result, out),
            Input::Decided(epoch) => self.decided(epoch, out),
            Input::Gone(id) => {
                if self.session.as_ref().is_some_and(|s| s.id == id) {
                    self.session = None;
                }
            }
            Input::Promoted(generation, at) => {
                self.promoted = true;
                self.highest = self.highest.max(generation);
                self.history = self.history.rewound(at);
                self.history.promote(generation, at);
                if let Some(s) = self.session.take() {
                    out.push(self.send(s.id, Epoch(0), Body::Fenced { by: self.highest }));
                    out.push(Output::Close(s.id));
                }
            }
        }
    }

    fn send(&self, to: SessionId, epoch: Epoch, body: Body) -> Output {
        Output::Send(to, Frame { generation: self.highest, seq: self.received().0, epoch, body })
    }

    fn frame(&mut self, id: SessionId, frame: &Frame, out: &mut Vec<Output>) {
        match &frame.body {
            Body::Hello(hello) => return self.hello(id, frame.generation, hello, out),
            Body::Ping { sent } => return out.push(self.send(id, Epoch(0), Body::Pong { sent: *sent })),
            Body::Pong { .. } => return,
            Body::Bye { .. } => {
                out.push(Output::Close(id));
                return self.step(Input::Gone(id), out);
            }
            _ => {}
        }
        // Before anything is touched: is this the one whose word counts?
        let old = frame.generation < self.highest || self.promoted;
        if old && !planted(Bug::NoGenerationCheck) {
            out.push(Output::Fenced(frame.generation));
            out.push(self.send(id, Epoch(0), Body::Fenced { by: self.highest }));
            out.push(Output::Close(id));
            return self.step(Input::Gone(id), out);
        }
        if planted(Bug::NoGenerationCheck) && frame.body.is_change() && self.session.is_none() {
            return out.push(Output::Keep);
        }
        let Some(s) = self.session.as_mut().filter(|s| s.id == id && s.welcomed) else {
            return out.push(Output::Close(id));
        };
        if frame.generation != s.generation && !planted(Bug::NoGenerationCheck) {
            return self.protocol_error(id, "generation changed inside a session", out);
        }
        match &frame.body {
            Body::Write { volume, offset, data, crc, catch_up, fua } => {
                let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
                self.change(id, frame, (*volume, *offset, len, *crc), *catch_up, out);
                if *fua {
                    out.push(Output::Flush(id));
                }
            }
            Body::Zero { volume, at, catch_up, .. } => {
                let len = u32::try_from(at.len).unwrap_or(u32::MAX);
                self.change(id, frame, (*volume, at.start, len, 0), *catch_up, out);
            }
            Body::Resize { volume, len } => self.resize(id, frame, *volume, *len, out),
            Body::Flush => {
                // The session begins; or a mark that is not for this side took this number.
                let passed = s.last.is_none_or(|l| frame.epoch > s.epoch && frame.seq == l.next());
                if passed {
                    (s.last, s.epoch) = (Some(frame.seq), frame.epoch);
                }
                out.push(Output::Flush(id));
            }
            Body::Mark { digest } => self.mark(id, frame, *digest, out),
            Body::Commit => self.commit(id, frame.epoch, out),
            Body::Abort => {
                if let Some(i) = s.sealed.iter().position(|x| x.epoch == frame.epoch)
                    && s.sealed.remove(i).is_some_and(|x| x.digest.count > 0)
                {
                    s.aborted = s.aborted.max(Some(frame.epoch));
                }
                out.push(Output::Abort(frame.epoch));
            }
            Body::HashReq { volume, at } => {
                let inside = s.volumes.get(usize::from(*volume)).is_some_and(|v| at.end() <= v.len);
                if !inside {
                    return self.protocol_error(id, "a hash of something outside the volumes", out);
                }
                out.push(Output::Hash { session: id, volume: *volume, at: *at });
            }
            Body::HandOver(hand) => {
                // Nothing may be lost: this must be the last checkpoint, with nothing behind it, and nothing still to come that was missed.
                let behind = s.open.count > 0 || s.aborted.is_some() || !s.sealed.is_empty();
                let all = s.decided && s.last == Some(frame.seq) && s.poisoned.is_none();
                let exact = all && !behind && frame.epoch == self.history.epoch();
                if exact || planted(Bug::HandOverUnchecked) {
                    return out.push(Output::TakeOver(hand.clone()));
                }
                let text = format!(
                    "this side is at checkpoint {} and change {}, which is not all there is",
                    self.history.epoch(),
                    s.last.unwrap_or_default()
                );
                out.push(self.send(id, frame.epoch, Body::Veto { text }));
            }
            _ => self.protocol_error(id, "a frame that only a secondary sends", out),
        }
    }

    fn protocol_error(&mut self, id: SessionId, why: &str, out: &mut Vec<Output>) {
        out.push(self.send(id, Epoch(0), Body::Bye { text: format!("protocol error: {why}") }));
        out.push(Output::Close(id));
        self.step(Input::Gone(id), out);
    }

    fn hello(&mut self, id: SessionId, generation: Generation, hello: &Hello, out: &mut Vec<Output>) {
        let refuse = if hello.group != self.group {
            Some((Reject::WrongGroup, format!("this is group {}", self.group)))
        } else if self.promoted
            && let Relation::SplitBrain(e) = hello.history.compare(&self.history)
        {
            // Both were promoted: which generation is higher says nothing about whose writes are wanted (L9).
            out.push(Output::SplitBrain(hello.history.clone()));
            Some((Reject::SplitBrain, format!("both sides were promoted after checkpoint {e}")))
        } else if generation < self.highest || generation < hello.history.generation() || self.promoted {
            out.push(Output::Fenced(generation));
            Some((Reject::Fenced(self.highest), format!("generation {} exists", self.highest)))
        } else if !self.fits(hello) {
            Some((Reject::Volumes, "the disks of the group are not the same on both sides".to_owned()))
        } else {
            match hello.history.compare(&self.history) {
                Relation::Same | Relation::Behind(_) | Relation::Fresh | Relation::Ahead(_) => None,
                Relation::Outdated(e) => {
                    Some((Reject::Fenced(self.highest), format!("promoted here after checkpoint {e}")))
                }
                Relation::SplitBrain(e) => {
                    out.push(Output::SplitBrain(hello.history.clone()));
                    Some((Reject::SplitBrain, format!("both sides were promoted after checkpoint {e}")))
                }
                Relation::Unrelated => {
                    Some((Reject::Unrelated, "the images have no common history".to_owned()))
                }
            }
        };
        if let Some((why, text)) = refuse {
            out.push(self.send(id, Epoch(0), Body::Reject { why, text }));
            return out.push(Output::Close(id));
        }
        // The same primary comes back before its old connection was seen to be dead, or a newer primary: either replaces it.
        if let Some(old) = self.session.take().filter(|s| s.id != id) {
            out.push(Output::Close(old.id));
        }
        self.highest = self.highest.max(generation);
        self.agreed = Some(hello.history.clone());
        self.session = Some(Session {
            id,
            generation,
            history: hello.history.clone(),
            volumes: hello.volumes.clone(),
            welcomed: false,
            last: None,
            epoch: Epoch(0),
            open: Digest::default(),
            poisoned: None,
            sealed: VecDeque::new(),
            aborted: None,
            decided: false,
        });
        let lens = hello.volumes.iter().map(|v| v.len).collect();
        out.push(Output::Begin { session: id, generation, lens });
    }

    /// Whether these can be the primary's disks. Disks that never were together have the same length, or somebody has made a mistake (T2);
    /// later ones follow the primary's.
    fn fits(&self, hello: &Hello) -> bool {
        // one that was let in before, with no checkpoint yet, as well: its primary may have grown since
        let known = self.highest > Generation(0) && !planted(Bug::LengthRefused);
        let together = self.history.now().is_some() || self.any_length || known;
        let (mine, theirs) = (self.volumes.iter().zip(&self.disks), &hello.volumes);
        theirs.len() == self.volumes.len()
            && (together || mine.zip(theirs).all(|((v, disk), p)| (v.len..=*disk).contains(&p.len)))
    }

    fn resize(&mut self, id: SessionId, frame: &Frame, volume: u16, len: u64, out: &mut Vec<Output>) {
        let Some(s) = self.session.as_mut() else { return };
        if s.last.map(Seq::next) != Some(frame.seq) && !planted(Bug::NoSequenceCheck) {
            return self.protocol_error(id, "a change of length out of sequence", out);
        }
        let Some(v) = s.volumes.get_mut(usize::from(volume)) else {
            return self.protocol_error(id, "a change of length of no volume", out);
        };
        v.len = len;
        s.last = Some(frame.seq);
        s.open.add(frame.seq, volume, len, 0, 0);
        if let Some(disk) = self.disks.get_mut(usize::from(volume)) {
            *disk = len.max(*disk);
        }
        out.push(Output::Resize(volume, len));
    }

    fn change(
        &mut self,
        id: SessionId,
        frame: &Frame,
        (volume, offset, len, crc): (u16, u64, u32, u32),
        catch_up: bool,
        out: &mut Vec<Output>,
    ) {
        let Some(s) = self.session.as_mut() else { return };
        let inside = s
            .volumes
            .get(usize::from(volume))
            .is_some_and(|v| offset.checked_add(u64::from(len)).is_some_and(|end| end <= v.len));
        let Some(last) = s.last else { return self.protocol_error(id, "a change before the start", out) };
        let expected = if catch_up { last } else { last.next() };
        if frame.seq != expected && !planted(Bug::NoSequenceCheck) {
            let why = format!("change {} came where {expected} was due", frame.seq);
            return self.protocol_error(id, &why, out);
        }
        if !inside {
            return self.protocol_error(id, "a change outside the volumes", out);
        }
        s.last = Some(last.max(frame.seq));
        s.open.add(frame.seq, volume, offset, len, crc);
        out.push(Output::Keep);
    }

    fn mark(&mut self, id: SessionId, frame: &Frame, digest: Digest, out: &mut Vec<Output>) {
        let Some(s) = self.session.as_mut() else { return };
        let newest = s.sealed.back().map_or(self.history.epoch(), |x| x.epoch);
        if s.last.map(Seq::next) != Some(frame.seq) && !planted(Bug::NoSequenceCheck) {
            return self.protocol_error(id, "a mark out of sequence", out);
        }
        if frame.epoch <= newest || s.sealed.len() >= MAX_SEALED {
            return self.protocol_error(id, "a mark of an epoch that cannot be next", out);
        }
        (s.last, s.epoch) = (Some(frame.seq), frame.epoch.next());
        let held = std::mem::take(&mut s.open);
        // The sequence check alone would not notice a defect that changes what was sent; neither may it hide behind the digest.
        let unequal = held != digest && !planted(Bug::NoDigestCheck) && !planted(Bug::NoSequenceCheck);
        let why = s.poisoned.clone().or_else(|| {
            unequal.then(|| format!("the epoch held here ({held}) is not the one that was sent ({digest})"))
        });
        if let Some(text) = why {
            // What is missing cannot be repaired inside the session: it stays poisoned until the primary begins anew.
            s.poisoned.get_or_insert(text.clone());
            out.push(Output::Vetoed(frame.epoch, text.clone()));
            return out.push(self.send(id, frame.epoch, Body::Veto { text }));
        }
        s.sealed.push_back(Sealed { epoch: frame.epoch, digest: held, prepared: false });
        let mut history = s.history.clone();
        history.advance(frame.epoch);
        out.push(Output::Prepare(frame.epoch, held, history));
    }

    fn prepared(&mut self, epoch: Epoch, result: Result<(), String>, out: &mut Vec<Output>) {
        let Some(s) = self.session.as_mut() else { return };
        let Some(sealed) = s.sealed.iter_mut().find(|x| x.epoch == epoch) else { return };
        let id = s.id;
        match result {
            Ok(()) => {
                sealed.prepared = true;
                out.push(self.send(id, epoch, Body::Prepared));
            }
            Err(text) => {
                s.sealed.retain(|x| x.epoch < epoch);
                s.poisoned.get_or_insert(text.clone());
                out.push(Output::Vetoed(epoch, text.clone()));
                out.push(self.send(id, epoch, Body::Veto { text }));
            }
        }
    }

    fn commit(&mut self, id: SessionId, epoch: Epoch, out: &mut Vec<Output>) {
        if epoch <= self.history.epoch() {
            // the answer was lost: the decision stands
            return out.push(self.send(id, epoch, Body::Committed { epoch_digest: self.committed_digest }));
        }
        let prepared =
            self.session.as_ref().is_some_and(|s| s.sealed.iter().any(|x| x.epoch == epoch && x.prepared));
        if !prepared {
            return self.protocol_error(id, "a decision about an epoch that is not prepared", out);
        }
        out.push(Output::Commit(epoch));
    }

    fn decided(&mut self, epoch: Epoch, out: &mut Vec<Output>) {
        if let Some(agreed) = &self.agreed {
            self.history = agreed.clone();
        }
        self.history.advance(epoch);
        let Some(s) = self.session.as_mut() else { return };
        s.decided = true;
        s.aborted = s.aborted.filter(|a| *a > epoch);
        // Deciding an epoch decides those before it that were aborted into it.
        while let Some(first) = s.sealed.front().filter(|x| x.epoch <= epoch) {
            self.committed_digest = first.digest;
            s.sealed.pop_front();
        }
        let id = s.id;
        out.push(self.send(id, epoch, Body::Committed { epoch_digest: self.committed_digest }));
    }
}
