//! One connection to a server: many requests in flight, each answered in any order.
//!
//! Two tasks belong to a link. The writer sends all requests that were made since its last send, gathered; the reader
//! gives answers to whoever waits. What is written from a file of the host goes from there to the socket without passing
//! through here, in its turn. What can happen: the server goes away or breaks the protocol (then every request in
//! flight fails as *lost*, and the link is over); a caller stops waiting (its answer is still read, then dropped; who wants
//! to change something waits for it, see [`Adrift`]).
//! What must stay true: a cookie is not used again while the server may still answer it; nothing the server sends makes
//! us hold more than what was asked for.

use super::adrift::Adrift;
use super::{ClientTls, handshake};
use block::{BlockError, Data, ErrorKind, Result, Span};
use env::sync::{Notify, OneshotSender, Semaphore, oneshot};
use env::{Address, Env, File, Stream};
use graph::HostBytes;
use nbd::{
    Answer, ClientWants, Cmd, Expected, Inbox, Mode, Negotiated, Outbox, ReadAssembly, Reply, ReplyParser,
    StatusExtent, encode_announced, encode_request,
};
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

/// Requests in flight on one link. Servers of others take 16 or 64 at a time; more only waits in the socket.
const WINDOW: usize = 64;
/// Bytes taken in one receive.
const RECEIVE: usize = 256 << 10;
/// Pieces of a receive shorter than this are copied rather than kept.
const COPY_BELOW: usize = 512;

/// Why a call failed.
pub(super) enum Failure {
    /// The link is gone; the request may or may not have been done.
    Lost(BlockError),
    /// The server says no, or cannot be trusted with this request.
    Refused(BlockError),
}

/// What a call brought.
pub(super) enum Outcome {
    /// Success without content.
    Done,
    /// The bytes of a read.
    Data(Data),
    /// The extents of a block status, from the start of its span.
    Status(Vec<StatusExtent>),
}

/// What is sent behind a request.
#[derive(Clone)]
pub(super) enum Payload {
    /// Bytes, for most requests none.
    Data(Data),
    /// Bytes of a file of the host, which the host sends.
    Host(HostBytes),
}

impl Payload {
    pub(super) fn none() -> Payload {
        Payload::Data(Data::empty())
    }
}

/// Bytes to be sent that lie in a file, with what has to be sent before them.
struct Hosted {
    before: Data,
    from: HostBytes,
    cookie: u64,
}

enum Content {
    Plain,
    Read(ReadAssembly),
    Status(Option<Vec<StatusExtent>>),
}

struct Flight {
    generation: u32,
    /// A flush: the server's disk may take its time.
    flush: bool,
    /// A change for which nobody waits any more.
    adrift: bool,
    answer: Answer,
    content: Content,
    error: Option<BlockError>,
    done: OneshotSender<Result<Outcome, Failure>>,
}

#[derive(Default)]
struct Table {
    flights: Slab<Flight>,
    generation: u32,
}

fn index_of(cookie: u64) -> usize {
    (cookie & 0xffff_ffff) as usize
}

impl Expected for Table {
    fn lookup(&self, cookie: u64) -> Option<Answer> {
        let f = self.flights.get(index_of(cookie))?;
        (u64::from(f.generation) == cookie >> 32).then_some(f.answer)
    }
}

/// What all connections of a pool count together.
#[derive(Clone, Default)]
pub(super) struct Shared {
    /// See [`graph::Link::losses`].
    pub(super) losses: Rc<Cell<u64>>,
    pub(super) adrift: Rc<Adrift>,
}

/// A change that is waited for. Dropped before it is answered, it was called off.
struct Awaited<'a> {
    link: &'a Link,
    cookie: u64,
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        let mut table = self.link.table.borrow_mut();
        let flight = table.flights.get_mut(index_of(self.cookie));
        if let Some(f) = flight.filter(|f| u64::from(f.generation) == self.cookie >> 32) {
            f.adrift = true;
            self.link.adrift.add();
        }
    }
}

/// A connection in its transmission phase.
pub(super) struct Link {
    env: Env,
    /// Losses of all connections of the pool.
    losses: Rc<Cell<u64>>,
    /// Changes of all connections of the pool that were called off.
    adrift: Rc<Adrift>,
    /// When the server was last heard of, or the first of the requests that wait was made.
    heard: Cell<Duration>,
    stream: Rc<dyn Stream>,
    negotiated: Negotiated,
    table: RefCell<Table>,
    /// Sent first, one after the other; then `out`.
    hosted: RefCell<VecDeque<Hosted>>,
    out: RefCell<Outbox>,
    queued: Notify,
    window: Semaphore,
    broken: RefCell<Option<BlockError>>,
    over: Notify,
    /// The server has answered at least once.
    proved: Cell<bool>,
}

impl Link {
    /// Connects, shakes hands and starts the two tasks.
    pub(super) async fn connect(
        env: &Env,
        to: &Address,
        tls: Option<&ClientTls>,
        wants: ClientWants,
        shared: &Shared,
    ) -> Result<Rc<Link>> {
        let stream = env.connect(to).await.map_err(|e| {
            let said = e.message().to_owned();
            e.with_message(format!("Failed to connect to '{to}': {said}"))
        })?;
        let mut inbox = Inbox::new();
        let (stream, negotiated) = handshake::enter(env, stream, tls, &mut inbox, wants).await?;
        let link = Rc::new(Link {
            env: env.clone(),
            losses: shared.losses.clone(),
            adrift: shared.adrift.clone(),
            heard: Cell::new(env.now()),
            stream,
            negotiated,
            table: RefCell::default(),
            hosted: RefCell::default(),
            out: RefCell::default(),
            queued: Notify::new(),
            window: Semaphore::new(WINDOW),
            broken: RefCell::new(None),
            over: Notify::new(),
            proved: Cell::new(false),
        });
        let (reader, writer) = (link.clone(), link.clone());
        env.spawn("nbd client reader", async move { reader.read_replies(inbox).await });
        env.spawn("nbd client writer", async move { writer.write_requests().await });
        Ok(link)
    }

    pub(super) fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// Whether requests can be made.
    pub(super) fn is_up(&self) -> bool {
        self.broken.borrow().is_none()
    }

    /// Why the link is over, if it is.
    pub(super) fn over_because(&self) -> Option<BlockError> {
        self.broken.borrow().clone()
    }

    /// Requests in flight or waiting for a place.
    pub(super) fn load(&self) -> usize {
        self.table.borrow().flights.len()
    }

    /// Since when requests have been waiting without a sign of life.
    pub(super) fn silent_since(&self) -> Option<Duration> {
        (self.load() > 0).then(|| self.heard.get())
    }

    /// Whether nothing waits but flushes.
    pub(super) fn only_flushes(&self) -> bool {
        self.table.borrow().flights.iter().all(|(_, f)| f.flush)
    }

    /// Whether the server has ever answered a request here.
    pub(super) fn has_answered(&self) -> bool {
        self.proved.get()
    }

    /// Waits until the link is over.
    pub(super) async fn over(&self) {
        while self.is_up() {
            self.over.wait().await;
        }
    }

    fn mode(&self) -> Mode {
        self.negotiated.mode
    }

    /// Makes a request and waits for its answer.
    pub(super) async fn call(
        &self,
        cmd: Cmd,
        flags: u16,
        span: Span,
        payload: Payload,
    ) -> Result<Outcome, Failure> {
        // The place is given back when the server has answered, even if nobody waits by then.
        self.window.acquire(1).await.forget();
        if let Some(e) = &*self.broken.borrow() {
            self.window.release(1);
            return Err(Failure::Lost(e.clone()));
        }
        let (answer, content) = match cmd {
            Cmd::Read => (Answer::Read(span), Content::Read(ReadAssembly::new(span))),
            Cmd::BlockStatus => (Answer::Status(span), Content::Status(None)),
            _ => (Answer::Plain, Content::Plain),
        };
        let (done, answered) = oneshot();
        let cookie = {
            let mut table = self.table.borrow_mut();
            if table.flights.is_empty() {
                self.heard.set(self.env.now());
            }
            table.generation = table.generation.wrapping_add(1);
            let generation = table.generation;
            let flush = cmd == Cmd::Flush;
            let flight = Flight { generation, flush, adrift: false, answer, content, error: None, done };
            let index = table.flights.insert(flight);
            u64::from(generation) << 32 | index as u64
        };
        {
            let mut out = self.out.borrow_mut();
            match payload {
                Payload::Data(data) => {
                    encode_request(&mut out, self.mode(), cmd, flags, cookie, span, data);
                }
                Payload::Host(from) => {
                    encode_announced(&mut out, self.mode(), cmd, flags, cookie, span);
                    self.hosted.borrow_mut().push_back(Hosted { before: out.take(), from, cookie });
                }
            }
        }
        self.queued.notify_one();
        let awaited = cmd.changes().then(|| Awaited { link: self, cookie });
        let answer = answered.await;
        // it holds nothing
        std::mem::forget(awaited);
        match answer {
            Some(r) => r,
            None => Err(Failure::Lost(lost("connection closed"))),
        }
    }

    /// Says good-bye and hangs up.
    pub(super) async fn leave(&self) {
        let mut bye = Outbox::new();
        encode_request(&mut bye, self.mode(), Cmd::Disconnect, 0, 0, Span::new(0, 0), Data::empty());
        if self.is_up() && self.idle() && self.load() == 0 {
            let _ = self.stream.send(bye.take()).await;
        }
        self.fail(&lost("connection closed"));
    }

    /// Ends the link: everything in flight is lost.
    pub(super) fn fail(&self, why: &BlockError) {
        if self.broken.borrow().is_some() {
            return;
        }
        *self.broken.borrow_mut() = Some(why.clone());
        // before anybody hears of it: see `graph::Link`
        self.losses.set(self.losses.get() + 1);
        let flights = std::mem::take(&mut self.table.borrow_mut().flights);
        for (_, f) in flights {
            self.window.release(1);
            if f.adrift {
                self.adrift.remove();
            }
            f.done.send(Err(Failure::Lost(why.clone())));
        }
        self.hosted.borrow_mut().clear();
        self.out.borrow_mut().take();
        self.stream.shutdown();
        self.queued.notify_all();
        self.over.notify_all();
    }

    async fn write_requests(&self) {
        while self.is_up() {
            let hosted = self.hosted.borrow_mut().pop_front();
            let sent = if let Some(next) = hosted {
                self.send_hosted(next).await
            } else {
                let data = self.out.borrow_mut().take();
                if data.is_empty() {
                    self.queued.wait().await;
                    continue;
                }
                self.stream.send(data).await
            };
            if let Err(e) = sent {
                self.fail(&lost(e.message()));
            }
        }
    }

    /// The request is refused here if the file could not be read: the server got zeroes for it, and says that all is well.
    async fn send_hosted(&self, next: Hosted) -> Result<()> {
        self.stream.send(next.before).await?;
        let Err(e) = self.stream.send_file(&next.from.file, next.from.at).await? else { return Ok(()) };
        let mut table = self.table.borrow_mut();
        if let Some(flight) = table.flights.get_mut(index_of(next.cookie)) {
            flight.error.get_or_insert(e);
        }
        Ok(())
    }

    /// Whether nothing waits to be sent.
    fn idle(&self) -> bool {
        self.out.borrow().is_empty() && self.hosted.borrow().is_empty()
    }

    /// Whether a payload may lie in this file.
    pub(super) fn sends_from(&self, file: &Rc<dyn File>) -> bool {
        self.stream.sends_from(file)
    }

    async fn read_replies(&self, mut inbox: Inbox) {
        let mut parser = ReplyParser::new(self.mode());
        loop {
            if let Err(e) = self.take_replies(&mut parser, &mut inbox) {
                return self.fail(&e);
            }
            let max = RECEIVE.max(parser.wanted(&inbox));
            match self.stream.recv(max).await {
                Ok(piece) if !piece.is_empty() => {
                    self.heard.set(self.env.now());
                    inbox.push(piece, COPY_BELOW);
                }
                Ok(_) => return self.fail(&lost("the server hung up")),
                Err(e) => return self.fail(&lost(e.message())),
            }
        }
    }

    fn take_replies(&self, parser: &mut ReplyParser, inbox: &mut Inbox) -> Result<()> {
        loop {
            let reply = parser.next(inbox, &*self.table.borrow())?;
            match reply {
                Some(reply) => self.apply(reply)?,
                None => return Ok(()),
            }
        }
    }

    fn apply(&self, reply: Reply) -> Result<()> {
        self.proved.set(true);
        let (cookie, last) = match &reply {
            Reply::Data { cookie, last, .. }
            | Reply::Hole { cookie, last, .. }
            | Reply::Status { cookie, last, .. }
            | Reply::Error { cookie, last, .. } => (*cookie, *last),
            Reply::Done { cookie } => (*cookie, true),
        };
        let mut table = self.table.borrow_mut();
        let Some(flight) = table.flights.get_mut(index_of(cookie)) else {
            return Err(BlockError::corrupt("NBD server broke the protocol: a reply to nothing"));
        };
        flight.take(reply, &self.negotiated)?;
        if !last {
            return Ok(());
        }
        let flight = table.flights.remove(index_of(cookie));
        drop(table);
        self.window.release(1);
        if flight.adrift {
            self.adrift.remove();
        }
        flight.finish();
        Ok(())
    }
}

impl Flight {
    fn take(&mut self, reply: Reply, negotiated: &Negotiated) -> Result<()> {
        match (reply, &mut self.content) {
            (Reply::Data { offset, data, .. }, Content::Read(read)) => read.data(offset, data),
            (Reply::Hole { hole, .. }, Content::Read(read)) => read.hole(hole),
            (Reply::Status { context, extents, .. }, Content::Status(status)) => {
                if status.is_some() || !negotiated.contexts.iter().any(|(id, _)| *id == context) {
                    let what = format!("block status of context {context} out of turn");
                    return Err(BlockError::corrupt(format!("NBD server broke the protocol: {what}")));
                }
                *status = Some(extents);
                Ok(())
            }
            (Reply::Error { error, .. }, _) => {
                self.error.get_or_insert(error);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn finish(self) {
        let outcome = match (self.error, self.content) {
            (Some(e), _) => Err(e),
            (None, Content::Plain) => Ok(Outcome::Done),
            (None, Content::Read(read)) => read.finish().map(Outcome::Data),
            (None, Content::Status(Some(s))) => Ok(Outcome::Status(s)),
            (None, Content::Status(None)) => Err(BlockError::corrupt("NBD server sent no extents")),
        };
        self.done.send(outcome.map_err(Failure::Refused));
    }
}

pub(super) fn lost(why: &str) -> BlockError {
    BlockError::new(ErrorKind::Disconnected, format!("Connection to NBD server lost: {why}"))
}
