//! Socket addresses as QMP writes them, in the flat form and in the older form with `data`.

use crate::error::QmpError;
use env::{Address, Family};
use serde::Deserialize;

/// `SocketAddress`: `{"type": "unix", "path": …}`.
#[derive(Deserialize, Clone, Debug)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub(crate) enum SocketAddress {
    /// TCP.
    Inet(Inet),
    /// A unix socket.
    Unix(Unix),
    /// Not supported.
    Vsock {},
    /// An inherited descriptor.
    Fd(Fd),
}

/// `SocketAddressLegacy`: `{"type": "unix", "data": {"path": …}}`.
#[derive(Deserialize, Clone, Debug)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub(crate) enum LegacyAddress {
    /// TCP.
    Inet(Inet),
    /// A unix socket.
    Unix(Unix),
    /// Not supported.
    Vsock {},
    /// An inherited descriptor.
    Fd(Fd),
}

/// TCP. `keep-alive` is not read: it is on for all connections.
#[derive(Deserialize, Clone, Debug)]
pub(crate) struct Inet {
    host: String,
    port: String,
    /// The last port to be tried for listening.
    to: Option<u16>,
    numeric: Option<bool>,
    ipv4: Option<bool>,
    ipv6: Option<bool>,
    mptcp: Option<bool>,
}

impl Inet {
    fn family(&self) -> Result<Family, QmpError> {
        match (self.ipv4, self.ipv6) {
            (Some(false), Some(false)) => Err(QmpError::generic("Cannot disable IPv4 and IPv6 at same time")),
            (None, None) | (Some(true), Some(true)) => Ok(Family::Any),
            (Some(true), _) | (_, Some(false)) => Ok(Family::V4),
            (_, Some(true)) | (Some(false), _) => Ok(Family::V6),
        }
    }

    fn read(self) -> Result<Address, QmpError> {
        if self.mptcp == Some(true) {
            return refuse("Parameter 'mptcp'");
        }
        let family = self.family()?;
        let Inet { host, port, .. } = self;
        let unresolved =
            |why: &str| Err(QmpError::generic(format!("address resolution failed for {host}:{port}: {why}")));
        let is_address = host.trim_matches(['[', ']']).parse::<core::net::IpAddr>().is_ok();
        if self.numeric == Some(true) && !is_address && !host.is_empty() {
            return unresolved("Name or service not known");
        }
        // none is any, as for the resolver
        let number = if port.is_empty() { Ok(0) } else { port.parse() };
        match number {
            Ok(port) => Ok(Address::Tcp { host, port, family }),
            Err(_) => unresolved("Servname not supported for ai_socktype"),
        }
    }
}

/// What a socket's name may have with its end: the size of `sun_path`.
const MAX_UNIX_PATH: usize = 108;

fn refuse<T>(what: &str) -> Result<T, QmpError> {
    Err(QmpError::generic(format!("{what} is not supported by liveblkd")))
}

/// A unix socket.
#[derive(Deserialize, Clone, Debug)]
pub(crate) struct Unix {
    path: String,
    #[serde(rename = "abstract")]
    abstract_name: Option<bool>,
}

/// A descriptor, by number.
#[derive(Deserialize, Clone, Debug)]
pub(crate) struct Fd {
    #[serde(rename = "str")]
    number: String,
}

impl LegacyAddress {
    /// Where to listen: one address, or TCP ports up to the last one that may be tried.
    pub(crate) fn read_range(mut self) -> Result<(Address, Option<u16>), QmpError> {
        let last = match &mut self {
            LegacyAddress::Inet(a) => a.to.take(),
            _ => None,
        };
        Ok((self.read()?, last))
    }

    /// As the environment wants it.
    pub(crate) fn read(self) -> Result<Address, QmpError> {
        match self {
            LegacyAddress::Inet(a) => SocketAddress::Inet(a),
            LegacyAddress::Unix(a) => SocketAddress::Unix(a),
            LegacyAddress::Vsock {} => SocketAddress::Vsock {},
            LegacyAddress::Fd(a) => SocketAddress::Fd(a),
        }
        .read()
    }
}

impl SocketAddress {
    /// Where to connect: the last port for listening means nothing.
    pub(crate) fn read_to_connect(mut self) -> Result<Address, QmpError> {
        if let SocketAddress::Inet(a) = &mut self {
            a.to = None;
        }
        self.read()
    }

    /// As the environment wants it.
    pub(crate) fn read(self) -> Result<Address, QmpError> {
        match self {
            SocketAddress::Vsock {} => refuse("Socket address type 'vsock'"),
            SocketAddress::Unix(Unix { abstract_name: Some(true), .. }) => refuse("Parameter 'abstract'"),
            SocketAddress::Unix(a) if a.path.len() >= MAX_UNIX_PATH => {
                Err(QmpError::generic(format!("UNIX socket path '{}' is too long", a.path)))
            }
            SocketAddress::Unix(a) => Ok(Address::Unix(a.path.into())),
            SocketAddress::Inet(Inet { to: Some(_), .. }) => refuse("Parameter 'to'"),
            SocketAddress::Inet(a) => a.read(),
            SocketAddress::Fd(a) => match a.number.parse() {
                Ok(n) if n >= 0 => Ok(Address::Fd(n)),
                _ => Err(QmpError::generic(format!("Unable to parse FD number {}", a.number))),
            },
        }
    }
}
