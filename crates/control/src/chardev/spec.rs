//! What a character device is to be: from a `--chardev` argument or from JSON. What cannot be done is refused by name.

use super::shown;
use crate::address::{LegacyAddress, SocketAddress};
use crate::error::QmpError;
use crate::object::is_identifier;
use env::Address;
use qapi::{Map, Value, json, keyval};

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
    /// Keeps the last so many bytes that were written to it; `name` is one of the two that it goes by.
    Ring {
        name: &'static str,
        size: usize,
    },
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

/// What a `--chardev` parameter takes.
#[derive(Clone, Copy)]
enum Takes {
    Text,
    Flag,
    Number,
    Size,
}

/// The parameters of all kinds. As in QSD one that says nothing of the kind at hand is taken, if its value can be one.
fn parameter(name: &str) -> Option<Takes> {
    Some(match name {
        "backend" | "id" | "path" | "host" | "port" | "fd" | "tls-creds" | "tls-authz" | "logfile" => {
            Takes::Text
        }
        "server" | "wait" | "delay" | "nodelay" | "ipv4" | "ipv6" | "signal" | "logappend" | "tight"
        | "keep-alive" | "telnet" | "tn3270" | "websocket" | "mux" | "abstract" => Takes::Flag,
        "reconnect" | "reconnect-ms" | "to" => Takes::Number,
        "size" => Takes::Size,
        _ => return None,
    })
}

/// `a=x,b=y` as `--chardev` takes it: no nesting; `b` alone is `b=on`, `nob` is `b=off`; a comma in a value is doubled.
fn options(text: &str) -> Vec<(String, String)> {
    let mut out: Vec<(String, String)> = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let named = rest[end..].starts_with('=');
        if named || out.is_empty() {
            let (name, from) = if named { (&rest[..end], end + 1) } else { ("backend", 0) };
            let (value, after) = keyval::value_of(&rest[from..]);
            out.push((name.to_owned(), value));
            rest = after;
            continue;
        }
        let flag = &rest[..end];
        out.push(match flag.strip_prefix("no") {
            Some(name) => (name.to_owned(), "off".to_owned()),
            None => (flag.to_owned(), "on".to_owned()),
        });
        rest = rest[end..].strip_prefix(',').unwrap_or_default();
    }
    out
}

fn flag(name: &str, value: &str) -> Result<bool, QmpError> {
    keyval::flag(name, value).map_err(QmpError::generic)
}

/// A number of bytes, with the letter of a unit or without.
fn size(name: &str, value: &str) -> Result<i64, QmpError> {
    let end = value.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(value.len());
    let (digits, unit) = value.split_at(end);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => Some(0),
        "k" => Some(10),
        "m" => Some(20),
        "g" => Some(30),
        "t" => Some(40),
        _ => None,
    };
    match (digits.parse::<f64>(), shift) {
        // whole bytes, and no more of them than a ring can have
        (Ok(n), Some(shift)) if n.fract() == 0.0 || shift > 0 => Ok((n * f64::from(1 << shift)) as i64),
        _ => Err(QmpError::generic(format!("Parameter '{name}' expects a non-negative number below 2^64"))),
    }
}

const AUTHZ_WITHOUT_CREDS: &str = "'tls_authz' option requires 'tls_creds' option";
const WAIT_OF_CLIENT: &str = "'wait' option is incompatible with socket in client connect mode";

/// A ring of so many bytes.
fn ring(name: &str, size: Option<i64>) -> Result<Kind, QmpError> {
    let name = if name == "memory" { "memory" } else { "ringbuf" };
    let size = size.map_or(Ok(RING), u64::try_from).unwrap_or(0);
    if size > MAX_RING {
        return Err(QmpError::generic(format!("size of ringbuf chardev must be at most {MAX_RING}")));
    }
    match usize::try_from(size) {
        Ok(size) if size.is_power_of_two() => Ok(Kind::Ring { name, size }),
        _ => Err(QmpError::generic("size of ringbuf chardev must be power of two")),
    }
}

impl ChardevSpec {
    /// Reads a `--chardev` argument.
    pub fn parse(text: &str) -> Result<ChardevSpec, QmpError> {
        let all = options(text);
        // as in QSD the first `id` counts, and the last of everything else
        let get = |key: &str| all.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        let id = all.iter().find(|(k, _)| k == "id").map(|(_, v)| v.as_str());
        let fail = |desc: String| Err(QmpError::generic(desc));
        if id.is_some_and(|id| !is_identifier(id)) {
            return fail("Parameter 'id' expects an identifier".into());
        }
        let mut ring_size = None;
        for (key, value) in &all {
            match parameter(key) {
                None => return fail(format!("Invalid parameter '{key}'")),
                Some(Takes::Text) => {}
                Some(Takes::Flag) => flag(key, value).map(|_| ())?,
                Some(Takes::Number) if value.parse::<u64>().is_err() => {
                    return fail(format!("Parameter '{key}' expects a number"));
                }
                Some(Takes::Number) => {}
                Some(Takes::Size) => ring_size = Some(size(key, value)?),
            }
        }
        let Some(id) = id else { return fail("chardev: no id specified".into()) };
        let on = |key: &str, default: bool| get(key).map_or(Ok(default), |value| flag(key, value));
        for key in ["telnet", "tn3270", "websocket", "mux", "abstract"] {
            if on(key, false)? {
                return fail(format!("Parameter '{key}' is not supported by liveblkd"));
            }
        }
        for key in ["reconnect", "reconnect-ms", "logfile", "to"] {
            if get(key).is_some_and(|v| v != "0" || key == "logfile") {
                return fail(format!("Parameter '{key}' is not supported by liveblkd"));
            }
        }
        let kind = match get("backend") {
            Some("null") => Kind::Null,
            Some("stdio") => Kind::Stdio,
            Some("socket") => {
                let server = on("server", false)?;
                let address = match (get("path"), get("host"), get("fd"), get("port")) {
                    (Some(path), None, None, _) => json!({"type": "unix", "path": path}),
                    (None, None, fd, _) => json!({"type": "fd", "str": fd.unwrap_or_default()}),
                    (None, Some(host), None, Some(port)) => {
                        let mut tcp = json!({"type": "inet", "host": host, "port": port});
                        for family in ["ipv4", "ipv6"].into_iter().filter(|f| get(f).is_some()) {
                            tcp[family] = on(family, true)?.into();
                        }
                        tcp
                    }
                    (None, Some(_), None, None) => return fail("chardev: socket: no port given".into()),
                    _ => return fail("None or one of 'path', 'fd' or 'host' option required.".into()),
                };
                let address: SocketAddress =
                    qapi::from_value(address).map_err(|e| QmpError::generic(e.to_string()))?;
                if get("wait").is_some() && !server {
                    return fail(WAIT_OF_CLIENT.into());
                }
                let text = |key: &str| get(key).map(str::to_owned);
                let (tls_creds, tls_authz) = (text("tls-creds"), text("tls-authz"));
                if tls_authz.is_some() && tls_creds.is_none() {
                    return fail(AUTHZ_WITHOUT_CREDS.into());
                }
                let address = address.read()?;
                Kind::Socket(Socket { address, server, wait: on("wait", true)?, tls_creds, tls_authz })
            }
            Some(name @ ("ringbuf" | "memory")) => ring(name, ring_size)?,
            Some(other) => return fail(format!("'{other}' is not a valid char driver name")),
            None => return fail(format!("chardev: \"{id}\" missing backend")),
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
            name @ ("ringbuf" | "memory") => ring(name, data.get("size").and_then(Value::as_i64))?,
            "socket" => {
                let address = data.get("addr").cloned().unwrap_or_default();
                let address: LegacyAddress =
                    qapi::from_value(address).map_err(|e| QmpError::generic(e.to_string()))?;
                let server = flag("server").unwrap_or(true);
                if flag("wait").is_some() && !server {
                    return Err(QmpError::generic(WAIT_OF_CLIENT));
                }
                if data.contains_key("tls-authz") && !data.contains_key("tls-creds") {
                    return Err(QmpError::generic(AUTHZ_WITHOUT_CREDS));
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

    /// Whether it is the process's own input and output.
    pub fn is_stdio(&self) -> bool {
        self.kind == Kind::Stdio
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
        assert_eq!(ok("ringbuf,id=c,size=64").kind, Kind::Ring { name: "ringbuf", size: 64 });
        assert_eq!(ok("memory,id=c,size=1K").kind, Kind::Ring { name: "memory", size: 1024 });
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
            ("socket,id=c,path=q,fd=3", "None or one of 'path', 'fd' or 'host' option required."),
            ("socket,id=c,port=1", "Unable to parse FD number "),
            ("socket,id=c,host=::1,port=1,ipv4=off,ipv6=off", "Cannot disable IPv4 and IPv6 at same time"),
            ("socket,id=c,path=q,reconnect=x", "Parameter 'reconnect' expects a number"),
            ("socket,id=c,path=q,tls-authz=z", AUTHZ_WITHOUT_CREDS),
            ("null,bogus=1,id=1c", "Parameter 'id' expects an identifier"),
            ("null,id=c,,", "Parameter 'id' expects an identifier"),
            ("null,id=c,server,,x", "Invalid parameter ''"),
            ("null,id=c,nope", "Invalid parameter 'pe'"),
            ("id=c", "chardev: \"c\" missing backend"),
            ("ringbuf,id=c,size=1.7", "Parameter 'size' expects a non-negative number below 2^64"),
            (
                "socket,id=c,path=q,wait=on",
                "'wait' option is incompatible with socket in client connect mode",
            ),
        ] {
            assert_eq!(ChardevSpec::parse(text).unwrap_err().desc, want, "{text}");
        }
    }
}
