//! Character devices: where monitors find their clients. One client at a time on each.
//!
//! What can happen: clients come, go and come again; a second one waits in the listen queue; the device is opened by one
//! monitor only. What must stay true: a unix socket that was made here is removed at the end.

mod ring;
mod spec;

use crate::error::QmpError;
use crate::object::Objects;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use block::BlockError;
use env::{Address, Env, Listener, Stream};
use exports::ServerTls;
use qapi::{Value, json};
use ring::Ring;
pub use spec::ChardevSpec;
use spec::{Kind, Socket};
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// The kinds there are.
pub(crate) const KINDS: &[&str] = &["memory", "null", "ringbuf", "socket", "stdio"];
/// Devices at a time: far above any use.
const MAX_CHARDEVS: usize = 256;
/// Pause after a failed accept (no descriptors left): long enough not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a client may take for its TLS handshake; others wait meanwhile.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

enum Backend {
    Null,
    Listening(Rc<dyn Listener>, Option<ServerTls>),
    Connected,
    Ring(RefCell<Ring>),
}

pub(crate) struct Chardev {
    id: String,
    name: String,
    backend: Backend,
    /// A connection made at start that no monitor has taken yet.
    first: RefCell<Option<Rc<dyn Stream>>>,
    used: Cell<bool>,
    connected: Cell<bool>,
    /// The socket file to remove at the end.
    path: Option<PathBuf>,
}

/// All of them, in the order they were made.
#[derive(Default)]
pub(crate) struct Chardevs(RefCell<Vec<Rc<Chardev>>>);

fn shown(address: &Address, server: bool) -> String {
    let what = match address {
        Address::Unix(p) => format!("unix:{}", p.display()),
        Address::Tcp { host, port, .. } => format!("tcp:{host}:{port}"),
        Address::Fd(n) => format!("fd:{n}"),
        Address::Stdio => "stdio".to_owned(),
    };
    if server { format!("{what},server=on") } else { what }
}

fn failed(what: &str, address: &Address, e: BlockError) -> QmpError {
    QmpError::from(match address {
        Address::Unix(p) if what == "bind socket" => {
            e.context(format!("Failed to bind socket to {}", p.display()))
        }
        Address::Tcp { host, port, .. } if what == "bind socket" => {
            e.context(format!("Failed to bind socket to {host}:{port}"))
        }
        address => e.context(format!("Failed to {what} '{address}'")),
    })
}

/// The stream to talk to a new client, under TLS where that is wanted; `None` if it may not enter.
async fn admit(env: &Env, stream: Rc<dyn Stream>, tls: Option<&ServerTls>) -> Option<Rc<dyn Stream>> {
    let Some(tls) = tls else { return Some(stream) };
    env.timeout(HANDSHAKE_LIMIT, Box::pin(tls.protect(stream))).await.flatten()
}

/// Makes what a device needs.
async fn make(env: &Env, objects: &Rc<Objects>, spec: ChardevSpec) -> Result<Chardev, QmpError> {
    let (mut first, mut path) = (None, None);
    let (name, backend) = match spec.kind {
        Kind::Null => ("null".to_owned(), Backend::Null),
        Kind::Ring { name, size } => (name.to_owned(), Backend::Ring(RefCell::new(Ring::new(size)))),
        Kind::Stdio => {
            let at = Address::Stdio;
            first = Some(env.connect(&at).await.map_err(|e| failed("open", &at, e))?);
            ("stdio".to_owned(), Backend::Connected)
        }
        Kind::Socket(s) if s.server => {
            let tls = objects.server_tls(s.tls_creds.as_deref(), s.tls_authz.clone())?;
            let listener = env.listen(&s.address).await.map_err(|e| failed("bind socket", &s.address, e))?;
            if let Address::Unix(p) = &s.address {
                // the working directory may change before the end
                path = std::path::absolute(p).ok();
            }
            while s.wait && first.is_none() {
                let client = listener.accept().await.map_err(|e| failed("accept on", &s.address, e))?;
                first = admit(env, client, tls.as_ref()).await;
            }
            (shown(&listener.address(), true), Backend::Listening(listener, tls))
        }
        Kind::Socket(s) => {
            first = Some(connect(env, objects, &s).await?);
            (shown(&s.address, false), Backend::Connected)
        }
    };
    Ok(Chardev {
        id: spec.id,
        name,
        backend,
        connected: Cell::new(first.is_some()),
        first: RefCell::new(first),
        used: Cell::new(false),
        path,
    })
}

async fn connect(env: &Env, objects: &Rc<Objects>, s: &Socket) -> Result<Rc<dyn Stream>, QmpError> {
    let credentials = match &s.tls_creds {
        Some(id) => Some(objects.tls(id, tls::Endpoint::Client)?),
        None => None,
    };
    let stream = env.connect(&s.address).await.map_err(|e| failed("connect to", &s.address, e))?;
    let Some(credentials) = credentials else { return Ok(stream) };
    let host = match &s.address {
        Address::Tcp { host, .. } => Some(host.as_str()),
        _ => None,
    };
    let shaking = Box::pin(credentials.connect(stream, host));
    match env.timeout(HANDSHAKE_LIMIT, shaking).await {
        Some(stream) => Ok(stream?),
        None => Err(QmpError::generic(format!("TLS handshake with '{}' takes too long", s.address))),
    }
}

impl Chardevs {
    /// Makes a device. A socket that is to wait for its client does so.
    pub(crate) async fn add(
        &self,
        env: &Env,
        objects: &Rc<Objects>,
        spec: ChardevSpec,
    ) -> Result<(), QmpError> {
        self.check_room(&spec.id)?;
        let device = make(env, objects, spec).await?;
        // Somebody may have been quicker while this one waited.
        self.check_room(&device.id)?;
        self.0.borrow_mut().push(Rc::new(device));
        Ok(())
    }

    /// Whether one may come by this name.
    pub(crate) fn check_room(&self, id: &str) -> Result<(), QmpError> {
        if self.find(id).is_some() {
            return Err(QmpError::generic(format!("Chardev with id '{id}' already exists")));
        }
        if self.0.borrow().len() >= MAX_CHARDEVS {
            return Err(QmpError::generic(format!("there are {MAX_CHARDEVS} chardevs already")));
        }
        Ok(())
    }

    /// The device `id`, if it is there and nobody uses it.
    pub(crate) fn unused(&self, id: &str) -> Result<Rc<Chardev>, QmpError> {
        match self.find(id) {
            None => Err(QmpError::generic(format!("Chardev '{id}' does not exist"))),
            Some(c) if c.used.get() => {
                Err(QmpError::generic("Chardev user does not support chardev hotswap"))
            }
            Some(c) => Ok(c),
        }
    }

    /// Makes a device anew as something else; nobody must be using it.
    pub(crate) async fn change(
        &self,
        env: &Env,
        objects: &Rc<Objects>,
        spec: ChardevSpec,
        failed: impl Fn(QmpError) -> QmpError,
    ) -> Result<(), QmpError> {
        self.unused(&spec.id)?;
        let device = make(env, objects, spec).await.map_err(failed)?;
        let old = self.unused(&device.id)?;
        let device = Rc::new(device);
        if let Some(place) = self.0.borrow_mut().iter_mut().find(|c| Rc::ptr_eq(c, &old)) {
            *place = device.clone();
        }
        // The new one may listen at the same place.
        if let Some(p) = old.path.as_ref().filter(|p| device.path.as_ref() != Some(p)) {
            let _ = env.remove(p).await;
        }
        Ok(())
    }

    /// Removes a device that nobody is using.
    pub(crate) async fn remove(&self, env: &Env, id: &str) -> Result<(), QmpError> {
        let found = self.existing(id)?;
        if found.used.get() {
            return Err(QmpError::generic(format!("Chardev '{id}' is busy")));
        }
        self.0.borrow_mut().retain(|c| !Rc::ptr_eq(c, &found));
        if let Some(p) = &found.path {
            let _ = env.remove(p).await;
        }
        Ok(())
    }

    /// Fails if there is no such device.
    pub(crate) fn existing(&self, id: &str) -> Result<Rc<Chardev>, QmpError> {
        self.find(id).ok_or_else(|| QmpError::generic(format!("Chardev '{id}' not found")))
    }

    /// Runs `what` on a ring.
    fn on_ring<T>(&self, id: &str, what: impl FnOnce(&mut Ring) -> T) -> Result<T, QmpError> {
        let found = self.find(id).ok_or_else(|| QmpError::generic(format!("Device '{id}' not found")))?;
        match &found.backend {
            Backend::Ring(ring) => Ok(what(&mut ring.borrow_mut())),
            _ => Err(QmpError::generic(format!("{id} is not a ringbuf device"))),
        }
    }

    /// `ringbuf-write`.
    pub(crate) fn ring_write(&self, id: &str, data: &str, base64: bool) -> Result<(), QmpError> {
        self.on_ring(id, |_| ())?;
        let bytes = if base64 {
            STANDARD.decode(data).map_err(|_| QmpError::generic("Base64 data contains invalid characters"))?
        } else {
            data.as_bytes().to_vec()
        };
        self.on_ring(id, |ring| ring.write(&bytes))
    }

    /// `ringbuf-read`: at most `size` bytes, which are gone then. As text it ends at a NUL, as QSD's does.
    pub(crate) fn ring_read(&self, id: &str, size: i64, base64: bool) -> Result<String, QmpError> {
        self.on_ring(id, |_| ())?;
        let size = usize::try_from(size).unwrap_or(0);
        if size == 0 {
            return Err(QmpError::generic("size must be greater than zero"));
        }
        let bytes = self.on_ring(id, |ring| ring.read(size))?;
        if base64 {
            return Ok(STANDARD.encode(bytes));
        }
        let text = bytes.split(|b| *b == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    fn find(&self, id: &str) -> Option<Rc<Chardev>> {
        self.0.borrow().iter().find(|c| c.id == id).cloned()
    }

    pub(crate) fn check(&self, id: &str) -> Result<(), QmpError> {
        self.find(id).map(|_| ()).ok_or_else(|| QmpError::generic(format!("chardev \"{id}\" not found")))
    }

    /// Takes a device for a monitor.
    pub(crate) fn take(&self, id: &str) -> Result<Taken, QmpError> {
        self.check(id)?;
        let Some(found) = self.find(id) else { return Err(QmpError::generic("chardev is gone")) };
        if found.used.replace(true) {
            return Err(QmpError::generic(format!("chardev '{id}' is already in use")));
        }
        Ok(Taken(found))
    }

    /// `query-chardev`, newest first.
    pub(crate) fn query(&self) -> Value {
        let one = |c: &Rc<Chardev>| {
            let offline = matches!(c.backend, Backend::Listening(..)) && !c.connected.get();
            let prefix = if offline { "disconnected:" } else { "" };
            json!({"label": c.id, "filename": format!("{prefix}{}", c.name), "frontend-open": c.used.get()})
        };
        self.0.borrow().iter().rev().map(one).collect()
    }

    /// Removes the socket files, for the end.
    pub(crate) async fn clean_up(&self, env: &Env) {
        let paths: Vec<_> = self.0.borrow().iter().filter_map(|c| c.path.clone()).collect();
        for p in paths {
            // somebody may have removed it already
            let _ = env.remove(&p).await;
        }
    }
}

/// A device in a monitor's hands.
pub(crate) struct Taken(Rc<Chardev>);

impl Taken {
    /// The next client; `None` if there will be none.
    pub(crate) async fn client(&self, env: &Env) -> Option<Rc<dyn Stream>> {
        let first = self.0.first.borrow_mut().take();
        if first.is_some() {
            return first;
        }
        let Backend::Listening(listener, tls) = &self.0.backend else { return None };
        loop {
            match listener.accept().await {
                Ok(stream) => {
                    if let Some(stream) = admit(env, stream, tls.as_ref()).await {
                        self.0.connected.set(true);
                        return Some(stream);
                    }
                }
                Err(_) => env.sleep(ACCEPT_PAUSE).await,
            }
        }
    }

    /// The client has left.
    pub(crate) fn left(&self) {
        self.0.connected.set(false);
    }
}
