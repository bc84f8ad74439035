//! Socket addresses as QMP writes them, in the flat form and in the older form with `data`.

use crate::error::QmpError;
use env::Address;
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

/// TCP.
#[derive(Deserialize, Clone, Debug)]
pub(crate) struct Inet {
    host: String,
    port: String,
    to: Option<u16>,
    mptcp: Option<bool>,
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
    /// As the environment wants it.
    pub(crate) fn read(self) -> Result<Address, QmpError> {
        let refuse = |what: &str| Err(QmpError::generic(format!("{what} is not supported by liveblkd")));
        match self {
            SocketAddress::Vsock {} => refuse("Socket address type 'vsock'"),
            SocketAddress::Unix(Unix { abstract_name: Some(true), .. }) => refuse("Parameter 'abstract'"),
            SocketAddress::Inet(Inet { to: Some(_), .. }) => refuse("Parameter 'to'"),
            SocketAddress::Inet(Inet { mptcp: Some(true), .. }) => refuse("Parameter 'mptcp'"),
            SocketAddress::Unix(a) => Ok(Address::Unix(a.path.into())),
            SocketAddress::Inet(Inet { host, port, .. }) => match port.parse() {
                Ok(port) => Ok(Address::Tcp { host, port }),
                Err(_) => Err(QmpError::generic(format!(
                    "address resolution failed for {host}:{port}: Servname not supported for ai_socktype"
                ))),
            },
            SocketAddress::Fd(a) => match a.number.parse() {
                Ok(n) if n >= 0 => Ok(Address::Fd(n)),
                _ => Err(QmpError::generic(format!("File descriptor '{}' is no number", a.number))),
            },
        }
    }
}
