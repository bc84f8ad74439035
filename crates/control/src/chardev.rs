//! Character devices: where monitors find their clients. One client at a time on each.
//!
//! What can happen: clients come, go and come again; a second one waits in the listen queue; the device is opened by one
//! monitor only. What must stay true: a unix socket that was made here is removed at the end.

use crate::error::QmpError;
use crate::object::is_identifier;
use block::BlockError;
use env::{Address, Env, Listener, Stream};
use qapi::{Value, json};
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// The kinds there are.
pub(crate) const KINDS: &[&str] = &["null", "socket", "stdio"];
/// Devices at a time: far above any use.
const MAX_CHARDEVS: usize = 256;
/// Pause after a failed accept (no descriptors left): long enough not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a `--chardev` argument says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChardevSpec {
    id: String,
    kind: Kind,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Kind {
    Null,
    Stdio,
    Socket { address: Address, server: bool, wait: bool },
}

enum Backend {
    Null,
    Listening(Rc<dyn Listener>),
    Connected,
}

struct Chardev {
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

/// `a=x,b=y` as `--chardev` takes it: no nesting; `b` alone is `b=on`, `nob` is `b=off`.
fn options(text: &str) -> Vec<(String, String)> {
    let mut fields = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, fields.last_mut()) {
            (',', Some(last)) if chars.peek() == Some(&',') => {
                chars.next();
                last.push(',');
            }
            (',', _) => fields.push(String::new()),
            (c, Some(last)) => last.push(c),
            (_, None) => {}
        }
    }
    let mut out = Vec::new();
    for (i, field) in fields.into_iter().enumerate().filter(|(_, f)| !f.is_empty()) {
        out.push(match field.split_once('=') {
            Some((k, v)) => (k.to_owned(), v.to_owned()),
            None if i == 0 => ("backend".to_owned(), field),
            None => match field.strip_prefix("no") {
                Some(k) if matches!(k, "wait" | "server" | "delay" | "telnet") => {
                    (k.to_owned(), "off".into())
                }
                _ => (field, "on".to_owned()),
            },
        });
    }
    out
}

impl ChardevSpec {
    /// Reads a `--chardev` argument.
    pub fn parse(text: &str) -> Result<ChardevSpec, QmpError> {
        let all = options(text);
        let get = |key: &str| all.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        let fail = |desc: String| Err(QmpError::generic(desc));
        let on = |key: &str, default: bool| match get(key) {
            None => Ok(default),
            Some("on" | "yes" | "true" | "y") => Ok(true),
            Some("off" | "no" | "false" | "n") => Ok(false),
            Some(_) => Err(QmpError::generic(format!("Parameter '{key}' expects 'on' or 'off'"))),
        };
        for (key, value) in &all {
            match key.as_str() {
                "backend" | "id" | "path" | "host" | "port" | "fd" | "server" | "wait" => {}
                "nodelay" | "delay" | "ipv4" | "ipv6" | "signal" | "logappend" | "tight" | "keep-alive" => {}
                "telnet" | "tn3270" | "websocket" | "mux" | "abstract" => {
                    if on(key, false)? {
                        return fail(format!("Parameter '{key}' is not supported by liveblkd"));
                    }
                }
                "reconnect" | "reconnect-ms" if value == "0" => {}
                "reconnect" | "reconnect-ms" | "tls-creds" | "tls-authz" | "logfile" | "to" => {
                    return fail(format!("Parameter '{key}' is not supported by liveblkd"));
                }
                _ => return fail(format!("Invalid parameter '{key}'")),
            }
        }
        let Some(id) = get("id") else { return fail("chardev: no id specified".into()) };
        if !is_identifier(id) {
            return fail("Parameter 'id' expects an identifier".into());
        }
        let kind = match get("backend") {
            Some("null") => Kind::Null,
            Some("stdio") => Kind::Stdio,
            Some("socket") => {
                let server = on("server", false)?;
                let address = match (get("path"), get("host"), get("fd"), get("port")) {
                    (Some(path), None, None, _) => Address::Unix(path.into()),
                    (None, None, Some(fd), _) => match fd.parse() {
                        Ok(n) if n >= 0 => Address::Fd(n),
                        _ => return fail(format!("Unable to parse FD number {fd}")),
                    },
                    (None, host, None, Some(port)) => {
                        let host = host.unwrap_or("localhost").to_owned();
                        match port.parse() {
                            Ok(port) => Address::Tcp { host, port },
                            Err(_) => return fail(format!("chardev: socket: bad port '{port}'")),
                        }
                    }
                    (None, Some(_), None, None) => return fail("chardev: socket: no port given".into()),
                    (None, None, None, None) => {
                        return fail("chardev: socket: one of 'path', 'host' and 'fd' is needed".into());
                    }
                    _ => return fail("chardev: socket: 'path', 'host' and 'fd' exclude one another".into()),
                };
                if get("wait").is_some() && !server {
                    return fail("'wait' option is incompatible with socket in client connect mode".into());
                }
                Kind::Socket { address, server, wait: on("wait", true)? }
            }
            Some(other) => return fail(format!("'{other}' is not a valid char driver name")),
            None => return fail("chardev: \"id\" has no backend".into()),
        };
        Ok(ChardevSpec { id: id.to_owned(), kind })
    }

    /// Whether making it waits for a client; then the address, to tell people.
    pub fn waits_at(&self) -> Option<String> {
        match &self.kind {
            Kind::Socket { address, server: true, wait: true } => Some(shown(address, true)),
            _ => None,
        }
    }
}

fn shown(address: &Address, server: bool) -> String {
    let what = match address {
        Address::Unix(p) => format!("unix:{}", p.display()),
        Address::Tcp { host, port } => format!("tcp:{host}:{port}"),
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
        Address::Tcp { host, port } if what == "bind socket" => {
            e.context(format!("Failed to bind socket to {host}:{port}"))
        }
        address => e.context(format!("Failed to {what} '{address}'")),
    })
}

impl Chardevs {
    /// Makes a device. A socket that is to wait for its client does so.
    pub(crate) async fn add(&self, env: &Env, spec: ChardevSpec) -> Result<(), QmpError> {
        if self.find(&spec.id).is_some() {
            return Err(QmpError::generic(format!("Chardev with id '{}' already exists", spec.id)));
        }
        if self.0.borrow().len() >= MAX_CHARDEVS {
            return Err(QmpError::generic(format!("there are {MAX_CHARDEVS} chardevs already")));
        }
        let (mut first, mut path) = (None, None);
        let (name, backend) = match spec.kind {
            Kind::Null => ("null".to_owned(), Backend::Null),
            Kind::Stdio => {
                first =
                    Some(env.connect(&Address::Stdio).await.map_err(|e| failed("open", &Address::Stdio, e))?);
                ("stdio".to_owned(), Backend::Connected)
            }
            Kind::Socket { address, server: false, .. } => {
                first = Some(env.connect(&address).await.map_err(|e| failed("connect to", &address, e))?);
                (shown(&address, false), Backend::Connected)
            }
            Kind::Socket { address, server: true, wait } => {
                let listener = env.listen(&address).await.map_err(|e| failed("bind socket", &address, e))?;
                if let Address::Unix(p) = &address {
                    // the working directory may change before the end
                    path = std::path::absolute(p).ok();
                }
                if wait {
                    first = Some(listener.accept().await.map_err(|e| failed("accept on", &address, e))?);
                }
                (shown(&listener.address(), true), Backend::Listening(listener))
            }
        };
        self.0.borrow_mut().push(Rc::new(Chardev {
            id: spec.id,
            name,
            backend,
            connected: Cell::new(first.is_some()),
            first: RefCell::new(first),
            used: Cell::new(false),
            path,
        }));
        Ok(())
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
            let offline = matches!(c.backend, Backend::Listening(_)) && !c.connected.get();
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
        let Backend::Listening(listener) = &self.0.backend else { return None };
        loop {
            match listener.accept().await {
                Ok(stream) => {
                    self.0.connected.set(true);
                    return Some(stream);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let ok = |text: &str| ChardevSpec::parse(text).unwrap();
        let unix = |server, wait| Kind::Socket { address: Address::Unix("a,b".into()), server, wait };
        assert_eq!(ok("socket,id=c,path=a,,b,server=on,wait=off").kind, unix(true, false));
        assert_eq!(ok("socket,id=c,path=a,,b,server,nowait").kind, unix(true, false));
        assert_eq!(ok("socket,id=c,path=a,,b").kind, unix(false, true));
        assert_eq!(ok("backend=stdio,id=c,signal=off").kind, Kind::Stdio);
        for (text, want) in [
            ("foo,id=c", "'foo' is not a valid char driver name"),
            ("socket,path=x", "chardev: no id specified"),
            ("null,id=1c", "Parameter 'id' expects an identifier"),
            ("socket,id=c,path=q,bogus=1", "Invalid parameter 'bogus'"),
            ("socket,id=c,path=q,server=x", "Parameter 'server' expects 'on' or 'off'"),
            ("socket,id=c,host=127.0.0.1,server=on", "chardev: socket: no port given"),
            ("socket,id=c,path=q,reconnect=1", "Parameter 'reconnect' is not supported by liveblkd"),
            ("socket,id=c,path=q,telnet=on", "Parameter 'telnet' is not supported by liveblkd"),
            ("socket,id=c,path=q,fd=3", "chardev: socket: 'path', 'host' and 'fd' exclude one another"),
            (
                "socket,id=c,path=q,wait=on",
                "'wait' option is incompatible with socket in client connect mode",
            ),
        ] {
            assert_eq!(ChardevSpec::parse(text).unwrap_err().desc, want, "{text}");
        }
    }
}
