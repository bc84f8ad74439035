//! The sessions of a primary: connecting, again and again; sending; hearing.
//!
//! What can happen: a peer that is gone, frozen, or slow. What must stay true: no wait is longer than the time-out; frames
//! leave in the order in which they were queued.

use super::super::RECV;
use super::super::link::Outgoing;
use super::{Peer, PrimaryGroup};
use crate::Seq;
use crate::ack::AckLevel;
use crate::primary::{Input, PeerState};
use crate::wire::{Body, Decoder};
use block::{BlockError, Result};
use env::sync::race;
use env::{Address, Stream};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

/// Between attempts to connect: doubled from the first to the last.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Ends a session from here, for this reason. `anew`: the next one begins at once.
fn end(peer: &Peer, session: &Outgoing, why: String, anew: bool) {
    peer.anew.set(anew);
    session.give_up(why);
    if let Some(stream) = peer.stream.borrow().as_ref() {
        stream.shutdown();
    }
}

/// A level that somebody waits for, and how far a peer is on the way to it.
type Owed = (AckLevel, (Seq, Seq, usize));

impl PrimaryGroup {
    pub(super) async fn keep_connected(self: &Rc<Self>, number: usize, peer: &Rc<Peer>) {
        let mut pause = BACKOFF.0;
        while !self.stopped.get() && self.look(|c| c.peers().get(number).is_some_and(|p| !p.state.is_final()))
        {
            let why = match self.env.timeout(self.timeout.get(), self.reach(&peer.address)).await {
                Some(Ok(stream)) => {
                    pause = BACKOFF.0;
                    let (why, given_up) = self.talk(number, peer, &stream).await;
                    stream.shutdown();
                    if given_up {
                        // it is there, and has to do something before it can take more
                        pause = self.timeout.get().max(BACKOFF.1);
                    }
                    why
                }
                failed => {
                    peer.anew.set(false);
                    let why = failed.and_then(Result::err).map(|e| e.to_string());
                    why.unwrap_or_else(|| "connecting took too long".to_owned())
                }
            };
            *peer.session.borrow_mut() = None;
            *peer.stream.borrow_mut() = None;
            *self.last_error.borrow_mut() = Some(format!("{}: {why}", peer.name));
            self.step(Input::Disconnected(number, why));
            self.was_asked(number, false);
            self.progress.notify_all();
            let stop = self.stop.wait();
            if self.stopped.get() {
                return;
            }
            race(self.env.sleep(pause), stop).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// A connection, protected if that is wanted.
    async fn reach(&self, address: &Address) -> Result<Rc<dyn Stream>> {
        let stream = self.env.connect(address).await?;
        let secure = self.secure.borrow().clone();
        let Some(secure) = secure else { return Ok(stream) };
        let host = match address {
            Address::Tcp { host, .. } => Some(host.clone()),
            _ => None,
        };
        secure(stream, host).await.map_err(|e| e.context("TLS"))
    }

    /// Waits until no more than `most` bytes are queued for a peer, for as long as it takes anything within the time-out. A session in
    /// which it does not is given up: its store is full, and only it knows for how long (F-1, L1).
    pub(super) async fn until_queued(&self, number: usize, session: &Outgoing, most: u64) {
        let (mut sent, mut since) = (session.sent(), self.env.now());
        loop {
            let (drained, progress) = (session.drained.wait(), self.progress.wait());
            if session.queued() <= most || session.is_closing() {
                return;
            }
            let limit = self.timeout.get();
            if session.sent() != sent {
                (sent, since) = (session.sent(), self.env.now());
            } else if self.env.now() >= since + limit {
                return self.takes_nothing(number, session);
            }
            let left = (since + limit).saturating_sub(self.env.now());
            self.env.timeout(left, race(drained, progress)).await;
        }
    }

    fn takes_nothing(&self, number: usize, session: &Outgoing) {
        let (operation, why) = match self.is_copy(number) {
            true => ("forward", "its replication store is full, and no checkpoint makes room"),
            false => {
                ("catch-up", "what it missed does not fit into its replication store beside its checkpoint")
            }
        };
        self.give_up(number, session, operation, format!("the secondary takes nothing more: {why}"));
    }

    fn give_up(&self, number: usize, session: &Outgoing, operation: &str, why: String) {
        let peers = self.peers.borrow();
        let Some(peer) = peers.get(number) else { return };
        (self.tell)(
            "REPLICATION_ERROR",
            vec![
                ("peer", peer.name.as_str().into()),
                ("operation", operation.into()),
                ("offset", 0.into()),
                ("reason", why.as_str().into()),
            ],
        );
        end(peer, session, why, false);
    }

    /// What a full store does not take is not waited for any longer: in another session what the peer lacks is sent as it is then, each
    /// place once, and the store has room again for all that no checkpoint has taken.
    fn begin_anew(&self, number: usize, session: &Outgoing) {
        let peers = self.peers.borrow();
        let Some(peer) = peers.get(number) else { return };
        let why = "its replication store is full; it begins anew, for the group is to be handed over";
        end(peer, session, why.to_owned(), true);
    }

    /// How long a full store of that peer may hold it up, if less than anybody else waits for it. One that is catching up has been sent what
    /// it lacks as it is: that does not fit, and would not the next time.
    fn patience(&self, number: usize) -> Option<Duration> {
        self.hurry.get().filter(|_| self.is_copy(number))
    }

    /// Whether it has nothing to catch up with.
    pub(super) fn is_copy(&self, number: usize) -> bool {
        self.look(|c| c.peers().get(number).is_some_and(|p| p.state == PeerState::Running))
    }

    /// One session, to its end; why it ended, and whether it was given up here.
    async fn talk(
        self: &Rc<Self>,
        number: usize,
        peer: &Rc<Peer>,
        stream: &Rc<dyn Stream>,
    ) -> (String, bool) {
        let session = Rc::new(Outgoing::default());
        *peer.session.borrow_mut() = Some(session.clone());
        *peer.stream.borrow_mut() = Some(stream.clone());
        self.step(Input::Connected(number));
        let why = RefCell::new(String::new());
        let sending = async {
            let result = self.send_all(number, &session, stream).await;
            why.borrow_mut().push_str(&result.err().map_or_else(|| "closed".to_owned(), |e| e.to_string()));
        };
        let receiving = async {
            let result = self.receive_all(number, peer, stream).await;
            *why.borrow_mut() =
                result.err().map_or_else(|| "the peer closed the connection".to_owned(), |e| e.to_string());
        };
        race(receiving, sending).await;
        match session.given_up() {
            Some(reason) => (reason, !peer.anew.get()),
            None => {
                peer.anew.set(false);
                (why.take(), false)
            }
        }
    }

    /// What users wait for from a peer, and how far that is: for each level, of the request that waits for the least.
    fn owed(&self, number: usize) -> Vec<Owed> {
        let of = |level: &AckLevel| {
            let (_, seq) = self.waits.first((*level, Seq(0))..=(*level, Seq(u64::MAX)))?;
            Some((*level, self.look(|c| c.owes(number, seq, *level))?))
        };
        AckLevel::ALL.iter().filter_map(of).collect()
    }

    async fn send_all(&self, number: usize, session: &Rc<Outgoing>, stream: &Rc<dyn Stream>) -> Result<()> {
        let beat = self.timeout.get() / 3;
        let mut next_ping = self.env.now() + beat;
        let (mut sent, mut since) = (session.sent(), self.env.now());
        let mut stuck: Vec<(Owed, Duration)> = Vec::new();
        loop {
            let wake = session.wake.wait();
            let limit = self.look(|c| c.peers().get(number).map_or(0, |p| p.limit));
            let data = session.take(limit);
            if !data.is_empty() {
                let sent = self.env.timeout(self.timeout.get(), stream.send(data)).await;
                sent.unwrap_or_else(|| Err(BlockError::from_errno(BlockError::ETIMEDOUT)))?;
                continue;
            }
            if session.is_closing() {
                return Ok(());
            }
            // Somebody waits for what a peer does not take, however alive that is (L1).
            let (held_up, waited_for) = (session.is_held_up(limit), self.progress.waiting() > 0);
            let patience = self.patience(number).filter(|_| held_up);
            if !held_up || session.sent() != sent {
                (sent, since) = (session.sent(), self.env.now());
            } else if patience.is_some_and(|p| self.env.now() >= since + p) {
                self.begin_anew(number, session);
                return Ok(());
            } else if waited_for
                && self.env.now() >= since + self.timeout.get()
                && !env::bugs::planted("replication: guests wait for a store that is full")
            {
                self.takes_nothing(number, session);
                return Ok(());
            }
            // Or for what it has, with room for more, and does not get further with: its disk hangs, while it answers.
            let now = self.env.now();
            let before = |o: &Owed| stuck.iter().find(|s| s.0 == *o).map_or(now, |s| s.1);
            stuck = self.owed(number).into_iter().map(|o| (o, before(&o))).collect();
            if let Some(((level, _), _)) = stuck.iter().find(|s| now >= s.1 + self.timeout.get())
                && !held_up
                && !env::bugs::planted("replication: guests wait for a disk that hangs")
            {
                let why = format!("the secondary gets nothing further to level '{}'", level.name());
                self.give_up(number, session, "acknowledge", why);
                return Ok(());
            }
            if self.env.now() >= next_ping {
                let sent = u64::try_from(self.env.now().as_micros()).unwrap_or(u64::MAX);
                session.push_urgent(&self.look(|c| c.frame(c.last(), c.open_epoch(), Body::Ping { sent })));
                next_ping = self.env.now() + beat;
                continue;
            }
            let due = patience.map_or(next_ping, |p| next_ping.min(since + p));
            self.env.timeout(due.saturating_sub(self.env.now()), wake).await;
        }
    }

    async fn receive_all(self: &Rc<Self>, number: usize, peer: &Peer, stream: &Rc<dyn Stream>) -> Result<()> {
        let mut decoder = Decoder::new();
        loop {
            let got = self.env.timeout(self.timeout.get(), stream.recv(RECV)).await;
            let bytes = got.unwrap_or_else(|| Err(BlockError::from_errno(BlockError::ETIMEDOUT)))?;
            if bytes.is_empty() {
                return Ok(());
            }
            decoder.push(bytes);
            while let Some(frame) = decoder.next_frame()? {
                if let Body::Pong { sent } = &frame.body {
                    let sent = Duration::from_micros(*sent);
                    peer.rtt.set(Some(self.env.now().saturating_sub(sent)));
                }
                if let Body::Hash { volume, at, hash } = &frame.body {
                    peer.hashes.push((*volume, *at, *hash));
                }
                self.step(Input::Frame(number, &frame));
                self.was_asked(number, true);
            }
            // an acknowledgement may have given credit
            if let Some(s) = self.session(number) {
                s.wake.notify_all();
            }
        }
    }
}
