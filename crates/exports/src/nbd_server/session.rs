//! One client's transmission phase.
//!
//! One task does everything for a client: it receives, starts all requests that a receive brought, collects replies and
//! sends them. A request that ends at once (most do, when the page cache has the bytes) is answered in the same batch;
//! the others are polled here as they wake. Replies are sent together, one gathered send for all that is there; where this thread has
//! nothing else to do, in two halves: the client works on the first while the second is made, and neither side goes to sleep.
//!
//! What can happen: a client sends faster than the disk or reads slower than we answer (then we stop receiving: the
//! byte budget bounds what one client can make us hold); it sends nonsense (an error reply, or the connection ends); it
//! goes away in the middle of anything (requests that have begun run to their end, their replies are dropped).
//! Where the daemon ends before it can say how a request went, the connection ends without a word of it, and a client that connects
//! again asks again.
//! What must stay true: every request gets exactly one reply or the connection ends; a request, once begun, is never
//! dropped half-way; no client starves the others of this thread.

use super::request::{self, Outcome};
use crate::export::Export;
use block::Io;
use bytes::Bytes;
use env::bugs::planted;
use env::{Env, Stream};
use futures_util::stream::{FuturesUnordered, Stream as _};
use nbd::proto::{MAX_PAYLOAD, wire_error};
use nbd::{Agreed, Cmd, Inbox, Mode, Outbox, ParseError, ReplyWriter, Request, RequestParser};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

/// Bytes that one client may have in flight: payloads it sent and replies it has not taken. One longest request, or
/// thousands of small ones.
const BUDGET: u64 = MAX_PAYLOAD + (64 << 10);
/// What a request counts beside its bytes: its future, its bookkeeping, its share of a receive buffer.
const REQUEST_COST: u64 = 4096;
/// Most bytes taken in one receive.
const RECEIVE: usize = 256 << 10;
/// Pieces of a receive shorter than this are copied rather than kept.
const COPY_BELOW: usize = 512;
/// Replies that are worth a send of their own before the rest of what a receive brought is done: enough to keep a client busy for as
/// long as a wake-up takes.
const EARLY: usize = 4;
/// Receives handled before other tasks of this thread get their turn.
const RECEIVES_PER_TURN: usize = 4;

/// What all requests of one client share.
pub(super) struct Session {
    env: Env,
    export: Rc<Export>,
    mode: Mode,
    contexts: Vec<u32>,
}

impl Session {
    pub(super) fn new(env: Env, export: Rc<Export>, agreed: Agreed) -> Rc<Session> {
        Rc::new(Session { env, export, mode: agreed.mode, contexts: agreed.contexts })
    }
    pub(super) fn env(&self) -> &Env {
        &self.env
    }
    pub(super) fn export(&self) -> &Rc<Export> {
        &self.export
    }
    pub(super) fn mode(&self) -> Mode {
        self.mode
    }
    pub(super) fn contexts(&self) -> &[u32] {
        &self.contexts
    }
}

/// A request under way, and where its reply goes.
struct Running {
    cookie: u64,
    offset: u64,
    cost: u64,
    work: Pin<Box<dyn Future<Output = Outcome>>>,
}

impl Future for Running {
    type Output = (u64, u64, u64, Outcome);
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (cookie, offset, cost) = (self.cookie, self.offset, self.cost);
        self.work.as_mut().poll(cx).map(|o| (cookie, offset, cost, o))
    }
}

struct Pump<'a> {
    session: Rc<Session>,
    stream: &'a dyn Stream,
    parser: RequestParser,
    writer: ReplyWriter,
    inbox: Inbox,
    /// Parsed, but the budget had no room.
    held: Option<(Request, u64)>,
    running: FuturesUnordered<Running>,
    running_cost: u64,
    out: Outbox,
    /// Replies in `out`.
    answers: usize,
    receiving: Option<Io<'a, Bytes>>,
    sending: Option<Io<'a>>,
    sending_len: u64,
    /// Nothing more is taken from the client.
    closing: bool,
    /// Nothing more can be sent to the client.
    dead: bool,
}

fn cost_of(r: &Request) -> u64 {
    let answer = if r.command == Cmd::Read as u16 { r.len.min(MAX_PAYLOAD) } else { 0 };
    answer + r.payload.len() as u64 + REQUEST_COST
}

/// Serves a client until it goes away or is sent away, and all its requests have ended.
pub(super) async fn serve(session: Rc<Session>, stream: &dyn Stream, inbox: Inbox) {
    let mode = session.mode();
    let mut pump = Pump {
        session,
        stream,
        parser: RequestParser::new(mode),
        writer: ReplyWriter::new(mode),
        inbox,
        held: None,
        running: FuturesUnordered::new(),
        running_cost: 0,
        out: Outbox::new(),
        answers: 0,
        receiving: None,
        sending: None,
        sending_len: 0,
        closing: false,
        dead: false,
    };
    std::future::poll_fn(|cx| pump.poll(cx)).await;
}

impl Pump<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut receives = 0;
        loop {
            self.collect(cx);
            self.start_requests(cx);
            self.send(cx);
            if self.closing {
                let sent = self.dead || (self.sending.is_none() && self.out.is_empty());
                return if self.running.is_empty() && sent { Poll::Ready(()) } else { Poll::Pending };
            }
            if receives == RECEIVES_PER_TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            receives += 1;
            if !self.receive(cx) {
                return Poll::Pending;
            }
        }
    }

    /// Answers what has ended.
    fn collect(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(Some((cookie, offset, cost, outcome))) =
            Pin::new(&mut self.running).poll_next(cx)
        {
            self.running_cost -= cost;
            self.answer(cookie, offset, outcome);
        }
    }

    fn answer(&mut self, cookie: u64, offset: u64, outcome: Outcome) {
        if matches!(outcome, Outcome::Withheld) {
            self.closing = true;
        }
        if self.dead {
            return;
        }
        let mut cookie = cookie;
        if planted("nbd: reply to the wrong request") {
            // the answer goes to a request that still runs
            cookie = self.running.iter().next().map_or(cookie, |r| r.cookie);
        }
        self.answers += 1;
        let (w, out) = (self.writer, &mut self.out);
        match outcome {
            Outcome::Ok => w.ok(out, cookie, offset),
            Outcome::Data(data, whole) => w.read(out, cookie, offset, data, whole),
            Outcome::Status(contexts) => w.status(out, cookie, offset, &contexts),
            Outcome::Failed(wire, why) => w.error(out, cookie, offset, wire, &why),
            Outcome::Withheld => {}
        }
    }

    /// Whether something of this cost may begin. What is alone always may.
    fn has_room(&self, cost: u64) -> bool {
        let held = self.running_cost + self.out.len() as u64 + self.sending_len;
        held == 0 || held + cost <= BUDGET
    }

    fn start_requests(&mut self, cx: &mut Context<'_>) {
        let mut half = self.inbox.len() / 2;
        while !self.closing {
            let (request, cost) = match self.held.take() {
                Some(held) => held,
                None => match self.parser.next(&mut self.inbox) {
                    Ok(Some(r)) => {
                        let cost = cost_of(&r);
                        (r, cost)
                    }
                    Ok(None) => return,
                    Err(e) => return self.lose_track(e),
                },
            };
            if !self.has_room(cost) {
                self.held = Some((request, cost));
                return;
            }
            self.start(request, cost, cx);
            if self.inbox.len() <= half && self.answers >= EARLY && !self.inbox.is_empty() {
                // once for each receive
                half = 0;
                if !self.session.env.others_are_ready() {
                    self.send(cx);
                }
            }
        }
    }

    fn start(&mut self, request: Request, cost: u64, cx: &mut Context<'_>) {
        let (cookie, offset) = (request.cookie, request.offset);
        if request.command == Cmd::Disconnect as u16 {
            self.closing = true;
            return;
        }
        let checked = match request::check(&self.session, request) {
            Ok(c) => c,
            Err((wire, why)) => return self.answer(cookie, offset, Outcome::Failed(wire, why)),
        };
        let session = self.session.clone();
        let mut work: Pin<Box<dyn Future<Output = Outcome>>> =
            Box::pin(async move { request::run(&session, checked).await });
        match work.as_mut().poll(cx) {
            Poll::Ready(outcome) => self.answer(cookie, offset, outcome),
            Poll::Pending => {
                self.running_cost += cost;
                self.running.push(Running { cookie, offset, cost, work });
            }
        }
    }

    /// The stream of requests cannot be followed any further.
    fn lose_track(&mut self, e: ParseError) {
        if let ParseError::PayloadTooLong { cookie, .. } = e {
            self.answer(cookie, 0, Outcome::Failed(wire_error::INVAL, e.to_string()));
        }
        self.closing = true;
    }

    fn send(&mut self, cx: &mut Context<'_>) {
        loop {
            if let Some(sending) = &mut self.sending {
                match sending.as_mut().poll(cx) {
                    Poll::Pending => return,
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(_)) => self.dead = true,
                }
                self.sending = None;
                self.sending_len = 0;
            }
            if self.dead {
                // The peer is gone: what has begun ends, and nothing more is taken.
                self.closing = true;
                self.out.take();
                return;
            }
            if self.out.is_empty() {
                return;
            }
            let data = self.out.take();
            self.answers = 0;
            self.sending_len = data.len() as u64;
            self.sending = Some(self.stream.send(data));
        }
    }

    /// Takes what has arrived; `false` if that has to wait (for the peer or for room).
    fn receive(&mut self, cx: &mut Context<'_>) -> bool {
        if let Some((_, cost)) = &self.held {
            // Sending may just have made room.
            return self.has_room(*cost);
        }
        let payload = self.parser.payload_wanted();
        let missing = payload.saturating_sub(self.inbox.len() as u64);
        if !self.has_room(payload + REQUEST_COST) {
            return false;
        }
        let stream = self.stream;
        let max = RECEIVE.max(usize::try_from(missing).unwrap_or(RECEIVE));
        let receiving = self.receiving.get_or_insert_with(|| stream.recv(max));
        match receiving.as_mut().poll(cx) {
            Poll::Pending => false,
            Poll::Ready(r) => {
                self.receiving = None;
                match r {
                    Ok(piece) if !piece.is_empty() => self.inbox.push(piece, COPY_BELOW),
                    _ => self.closing = true,
                }
                true
            }
        }
    }
}
