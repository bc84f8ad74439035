//! What a character device is to be: from a `--chardev` argument or from JSON. What cannot be done is refused by name.

use super::shown;
use crate::address::LegacyAddress;
use crate::error::QmpError;
use crate::object::is_identifier;
use env::Address;
use qapi::{Map, Value};

/// What a `--chardev` argument says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChardevSpec {
    pub(super) id: String,
    pub(super) kind: Kind,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Null,
    Stdio,
    Socket(Socket),
    /// Keeps the last so many bytes that were written to it.
    Ring(usize),
}

/// A socket, either end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Socket {
    pub(super) address: Address,
    pub(super) server: bool,
    /// Making the device waits for its first client.
    pub(super) wait: bool,
    pub(super) tls_creds: Option<String>,
    pub(super) tls_authz: Option<String>,
}

/// Bytes that a ring keeps if the user does not say: what QSD keeps.
const RING: u64 = 64 << 10;
/// Most bytes that a ring keeps.
const MAX_RING: u64 = 64 << 20;

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

const WAIT_OF_CLIENT: &str = "'wait' option is incompatible with socket in client connect mode";

/// The size of a ring, in bytes.
fn ring(size: Option<i64>) -> Result<usize, QmpError> {
    let size = size.map_or(Ok(RING), u64::try_from).unwrap_or(0);
    if size > MAX_RING {
        return Err(QmpError::generic(format!("size of ringbuf chardev must be at most {MAX_RING}")));
    }
    match usize::try_from(size) {
        Ok(n) if n.is_power_of_two() => Ok(n),
        _ => Err(QmpError::generic("size of ringbuf chardev must be power of two")),
    }
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
                "tls-creds" | "tls-authz" | "size" => {}
                "reconnect" | "reconnect-ms" | "logfile" | "to" => {
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
                            Ok(port) => Address::tcp(&host, port),
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
                    return fail(WAIT_OF_CLIENT.into());
                }
                let text = |key: &str| get(key).map(str::to_owned);
                let (tls_creds, tls_authz) = (text("tls-creds"), text("tls-authz"));
                Kind::Socket(Socket { address, server, wait: on("wait", true)?, tls_creds, tls_authz })
            }
            Some("ringbuf" | "memory") => match get("size").map(str::parse) {
                None => Kind::Ring(ring(None)?),
                Some(Ok(size)) => Kind::Ring(ring(Some(size))?),
                Some(Err(_)) => return fail("Parameter 'size' expects a size".into()),
            },
            Some(other) => return fail(format!("'{other}' is not a valid char driver name")),
            None => return fail("chardev: \"id\" has no backend".into()),
        };
        Ok(ChardevSpec { id: id.to_owned(), kind })
    }

    /// From a `ChardevBackend` that fits the schema.
    pub(crate) fn from_backend(id: &str, backend: &Map<String, Value>) -> Result<ChardevSpec, QmpError> {
        let empty = Map::new();
        let data = backend.get("data").and_then(Value::as_object).unwrap_or(&empty);
        let flag = |key: &str| data.get(key).and_then(Value::as_bool);
        let text = |key: &str| data.get(key).and_then(Value::as_str).map(str::to_owned);
        let refuse =
            |key: &str| Err(QmpError::generic(format!("Parameter '{key}' is not supported by liveblkd")));
        for key in ["telnet", "tn3270", "websocket"] {
            if flag(key) == Some(true) {
                return refuse(key);
            }
        }
        for key in ["reconnect", "reconnect-ms"] {
            if data.get(key).and_then(Value::as_i64).is_some_and(|n| n != 0) {
                return refuse(key);
            }
        }
        if data.contains_key("logfile") {
            return refuse("logfile");
        }
        let kind = match backend.get("type").and_then(Value::as_str).unwrap_or_default() {
            "null" => Kind::Null,
            "stdio" => Kind::Stdio,
            "ringbuf" | "memory" => Kind::Ring(ring(data.get("size").and_then(Value::as_i64))?),
            "socket" => {
                let address = data.get("addr").cloned().unwrap_or_default();
                let address: LegacyAddress =
                    qapi::from_value(address).map_err(|e| QmpError::generic(e.to_string()))?;
                let server = flag("server").unwrap_or(true);
                if flag("wait").is_some() && !server {
                    return Err(QmpError::generic(WAIT_OF_CLIENT));
                }
                if data.contains_key("tls-authz") && !data.contains_key("tls-creds") {
                    return Err(QmpError::generic("'tls_authz' option requires 'tls_creds' option"));
                }
                Kind::Socket(Socket {
                    address: address.read()?,
                    server,
                    // other than on the command line: who adds one by command would wait for the reply
                    wait: flag("wait").unwrap_or(false),
                    tls_creds: text("tls-creds"),
                    tls_authz: text("tls-authz"),
                })
            }
            other => return Err(QmpError::generic(format!("'{other}' is not a valid char driver name"))),
        };
        Ok(ChardevSpec { id: id.to_owned(), kind })
    }

    /// Whether making it waits for a client; then the address, to tell people.
    pub fn waits_at(&self) -> Option<String> {
        match &self.kind {
            Kind::Socket(Socket { address, server: true, wait: true, .. }) => Some(shown(address, true)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let ok = |text: &str| ChardevSpec::parse(text).unwrap();
        let unix = |server, wait| {
            let address = Address::Unix("a,b".into());
            Kind::Socket(Socket { address, server, wait, tls_creds: None, tls_authz: None })
        };
        assert_eq!(ok("socket,id=c,path=a,,b,server=on,wait=off").kind, unix(true, false));
        assert_eq!(ok("socket,id=c,path=a,,b,server,nowait").kind, unix(true, false));
        assert_eq!(ok("socket,id=c,path=a,,b").kind, unix(false, true));
        assert_eq!(ok("backend=stdio,id=c,signal=off").kind, Kind::Stdio);
        assert_eq!(ok("ringbuf,id=c,size=64").kind, Kind::Ring(64));
        for (text, want) in [
            ("ringbuf,id=c,size=0", "size of ringbuf chardev must be power of two"),
            ("ringbuf,id=c,size=100000000000", "size of ringbuf chardev must be at most 67108864"),
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
