//! The NBD server of the process: listens, shakes hands, hands clients to their exports.
//!
//! What can happen: clients that connect and say nothing, or one byte in ten seconds (the handshake has a time limit);
//! more clients than allowed (the surplus waits in the listen queue, as in QSD); no descriptors left (accepting pauses
//! and goes on); the server is stopped while clients are anywhere. What must stay true: a client costs no more than one
//! option's memory until it has entered an export, and stopping ends every client's task.

mod request;
mod session;
mod status;

use crate::export::Export;
use crate::registry::Exports;
use block::{BlockError, Result};
use env::sync::{Notify, Semaphore};
use env::{Address, Env, Listener, Stream, TaskHandle};
use nbd::proto::flag;
use nbd::{Agreed, Catalog, ExportFacts, HandshakeStep, Inbox, Outbox, Protection, ServerHandshake};
use session::Session;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

/// Clients at a time if the user does not say: what QSD takes.
pub const DEFAULT_MAX_CONNECTIONS: u32 = 100;
/// Seconds for the handshake if the user does not say: what QSD takes.
pub const DEFAULT_HANDSHAKE_SECONDS: u32 = 10;
/// Pause after a failed accept (no descriptors, no memory): long enough not to spin, short enough not to be noticed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Bytes taken in one receive of a handshake.
const HANDSHAKE_RECEIVE: usize = 16 << 10;

/// How to run the server; names as in QMP's `nbd-server-start`.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where to listen.
    pub address: Address,
    /// Clients at a time; 0: any number.
    pub max_connections: u32,
    /// Seconds that a client may take for its handshake; 0: for ever.
    pub handshake_max_seconds: u32,
    /// How connections are protected; `None`: everything in the clear.
    pub tls: Option<ServerTls>,
}

/// Asked of each client that has proved who it is, by its distinguished name: whether it may enter.
pub type Authorize = Rc<dyn Fn(&str) -> bool>;

/// TLS for every client, before anything else is said.
#[derive(Clone)]
pub struct ServerTls {
    /// Our certificate, and whom we trust.
    pub credentials: Rc<tls::Credentials>,
    /// Who of those may enter; `None`: all.
    pub authorize: Option<Authorize>,
}

impl ServerTls {
    /// The stream under TLS, if the peer is one that may enter.
    pub async fn protect(&self, stream: Rc<dyn Stream>) -> Option<Rc<dyn Stream>> {
        let stream = self.credentials.accept(stream).await.ok()?;
        let allowed = match &self.authorize {
            Some(may) => stream.peer_name().is_some_and(|name| may(&name)),
            None => true,
        };
        allowed.then_some(stream as Rc<dyn Stream>)
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").field("authorize", &self.authorize.is_some()).finish_non_exhaustive()
    }
}

impl ServerOptions {
    /// At `address`, everything else as by default.
    pub fn at(address: Address) -> ServerOptions {
        ServerOptions {
            address,
            max_connections: DEFAULT_MAX_CONNECTIONS,
            handshake_max_seconds: DEFAULT_HANDSHAKE_SECONDS,
            tls: None,
        }
    }
}

/// What holds for every client's handshake.
struct Terms {
    limit: Duration,
    tls: Option<ServerTls>,
}

struct Clients {
    streams: RefCell<BTreeMap<u64, Rc<dyn Stream>>>,
    slots: Option<Semaphore>,
    none_left: Notify,
}

/// A running server.
pub(crate) struct NbdServer {
    env: Env,
    listener: Rc<dyn Listener>,
    accepting: TaskHandle,
    clients: Rc<Clients>,
    multi_conn: bool,
}

impl NbdServer {
    pub(crate) async fn start(env: &Env, o: &ServerOptions, exports: &Rc<Exports>) -> Result<NbdServer> {
        let listener = env.listen(&o.address).await.map_err(|e| listen_error(&o.address, e))?;
        let slots = (o.max_connections > 0).then(|| Semaphore::new(o.max_connections as usize));
        let clients =
            Rc::new(Clients { streams: RefCell::new(BTreeMap::new()), slots, none_left: Notify::new() });
        let limit = Duration::from_secs(u64::from(o.handshake_max_seconds));
        let terms = Rc::new(Terms { limit, tls: o.tls.clone() });
        let task = accept(env.clone(), listener.clone(), clients.clone(), exports.clone(), terms);
        let accepting = env.spawn("nbd accept", task);
        Ok(NbdServer { env: env.clone(), listener, accepting, clients, multi_conn: o.max_connections != 1 })
    }

    pub(crate) fn multi_conn(&self) -> bool {
        self.multi_conn
    }

    pub(crate) fn address(&self) -> Address {
        self.listener.address()
    }

    pub(crate) fn clients(&self) -> usize {
        self.clients.streams.borrow().len()
    }

    /// Stops listening and cuts all clients off; done when their tasks have ended.
    pub(crate) async fn stop(self) {
        self.accepting.cancel();
        if let Address::Unix(path) = self.listener.address() {
            // gone already: somebody else has tidied up
            let _ = self.env.remove(&path).await;
        }
        drop(self.listener);
        let streams: Vec<_> = self.clients.streams.borrow().values().cloned().collect();
        streams.iter().for_each(|s| s.shutdown());
        drop(streams);
        while !self.clients.streams.borrow().is_empty() {
            self.clients.none_left.wait().await;
        }
    }
}

/// The host's refusal in QSD's words, which management software looks for.
pub(crate) fn listen_error(at: &Address, e: BlockError) -> BlockError {
    let said = e.message().to_owned();
    match at {
        Address::Unix(path) => e.with_message(format!("Failed to bind socket to {}: {said}", path.display())),
        Address::Tcp { .. } if !said.starts_with("address resolution failed") => {
            e.with_message(format!("Failed to find an available port: {said}"))
        }
        _ => e,
    }
}

/// A connection's place among the clients; given back when the task ends, however it ends.
struct Seat {
    clients: Rc<Clients>,
    key: u64,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.clients.streams.borrow_mut().remove(&self.key);
        if let Some(s) = &self.clients.slots {
            s.release(1);
        }
        if self.clients.streams.borrow().is_empty() {
            self.clients.none_left.notify_all();
        }
    }
}

async fn accept(
    env: Env,
    listener: Rc<dyn Listener>,
    clients: Rc<Clients>,
    exports: Rc<Exports>,
    terms: Rc<Terms>,
) {
    let mut next = 0;
    loop {
        let slot = match &clients.slots {
            Some(s) => Some(s.acquire(1).await),
            None => None,
        };
        let stream = match listener.accept().await {
            Ok(s) => s,
            Err(_) => {
                drop(slot);
                env.sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Some(permit) = slot {
            permit.forget();
        }
        clients.streams.borrow_mut().insert(next, stream.clone());
        let seat = Seat { clients: clients.clone(), key: next };
        next += 1;
        let (timer, exports, terms) = (env.clone(), exports.clone(), terms.clone());
        env.spawn("nbd client", async move {
            let seat = seat;
            client(&timer, stream, &exports, &terms).await;
            drop(seat);
        });
    }
}

async fn client(env: &Env, stream: Rc<dyn Stream>, exports: &Rc<Exports>, terms: &Terms) {
    exports.open().await;
    let mut inbox = Inbox::new();
    let (limit, tls) = (terms.limit, terms.tls.as_ref());
    let shaking = Box::pin(handshake(stream, tls, &mut inbox, exports));
    let entered = if limit.is_zero() { shaking.await } else { env.timeout(limit, shaking).await.flatten() };
    let Some(Entered { stream, agreed, export, farewell }) = entered else { return };
    let attendance = export.attend(stream.clone());
    // The client may begin as soon as it has this, so the export knows of it before.
    if stream.send(farewell).await.is_ok() {
        session::serve(Session::new(env.clone(), export, agreed), &*stream, inbox).await;
    }
    drop(attendance);
}

/// What a client has come to.
struct Entered {
    /// Its connection, under TLS if that was agreed.
    stream: Rc<dyn Stream>,
    agreed: Agreed,
    export: Rc<Export>,
    /// The last bytes of the handshake, not yet sent.
    farewell: block::Data,
}

/// Brings a client into an export. `None`: it left, or had to.
async fn handshake(
    mut stream: Rc<dyn Stream>,
    tls: Option<&ServerTls>,
    inbox: &mut Inbox,
    exports: &Rc<Exports>,
) -> Option<Entered> {
    let protection = if tls.is_some() { Protection::Required } else { Protection::None };
    let (mut state, mut out) = (ServerHandshake::with(protection), Outbox::new());
    ServerHandshake::greeting(&mut out);
    loop {
        let step = state.step(inbox, &mut out, &**exports);
        if let Ok(HandshakeStep::Enter(agreed)) = step {
            let export = exports.find(&agreed.export)?;
            return Some(Entered { stream, agreed, export, farewell: out.take() });
        }
        if !out.is_empty() {
            // Before the next option is looked at: a client that asks and does not read gets no second answer.
            stream.send(out.take()).await.ok()?;
        }
        match step {
            Ok(HandshakeStep::NeedBytes) => {
                let piece = stream.recv(HANDSHAKE_RECEIVE).await.ok()?;
                if piece.is_empty() {
                    return None;
                }
                inbox.push(piece, usize::MAX);
            }
            Ok(HandshakeStep::Handled) => {}
            Ok(HandshakeStep::StartTls) => stream = tls?.protect(stream).await?,
            Ok(HandshakeStep::Ended | HandshakeStep::Enter(_)) | Err(_) => return None,
        }
    }
}

impl Catalog for Exports {
    fn facts(&self, name: &str) -> Option<ExportFacts> {
        let export = self.find(name)?;
        let o = export.options();
        let write_flags = flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        let mut flags = flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_DF
            | flag::SEND_CACHE
            | flag::BLOCK_STATUS_PAYLOAD;
        flags |= if o.writable { write_flags } else { flag::READ_ONLY };
        if self.multi_conn() {
            flags |= flag::CAN_MULTI_CONN;
        }
        Some(ExportFacts {
            size: export.size(),
            flags,
            description: o.description.clone(),
            block_sizes: status::block_sizes(&export.edge().limits()),
            contexts: status::contexts(&export),
        })
    }

    fn list(&self, each: &mut dyn FnMut(&str, &str)) {
        self.each(|e| each(&e.options().name, &e.options().description));
    }
}
