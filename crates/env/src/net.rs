//! Sockets.

use crate::File;
use block::{BlockError, Data, Io, Result, Span};
use bytes::Bytes;
use std::fmt;
use std::path::PathBuf;
use std::rc::Rc;

/// Kinds of addresses of a host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Family {
    /// IPv4 and IPv6.
    #[default]
    Any,
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
}

impl Family {
    /// Whether an address is of this kind.
    pub fn has(self, ip: std::net::IpAddr) -> bool {
        match self {
            Family::Any => true,
            Family::V4 => ip.is_ipv4(),
            Family::V6 => ip.is_ipv6(),
        }
    }
}

/// Where to listen or connect.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// A unix socket in the file system.
    Unix(PathBuf),
    /// TCP. Names are resolved by the host's resolver, on a helper thread.
    Tcp {
        /// Host name or address.
        host: String,
        /// Port number; 0 to listen means "pick one".
        port: u16,
        /// Which of the host's addresses.
        family: Family,
    },
    /// An already open socket, named by its descriptor number (inherited). Listening or connected as the use asks.
    Fd(i32),
    /// Standard input and output as one stream (for `--chardev stdio`).
    Stdio,
}

impl Address {
    /// TCP, any kind of address.
    pub fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.to_owned(), port, family: Family::Any }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(p) => write!(f, "{}", p.display()),
            Address::Tcp { host, port, .. } => write!(f, "{host}:{port}"),
            Address::Fd(n) => write!(f, "fd {n}"),
            Address::Stdio => f.write_str("stdio"),
        }
    }
}

/// Who is at the other end of a unix socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Credentials {
    /// Process id.
    pub pid: u32,
    /// User id.
    pub uid: u32,
}

/// A listening socket. Dropping the last `Rc` closes it (a unix socket file stays; the owner removes it).
pub trait Listener: 'static {
    /// The next connection.
    fn accept(&self) -> Io<'_, Rc<dyn Stream>>;
    /// The address in use, with the port that was picked.
    fn address(&self) -> Address;
}

/// A connected stream. Dropping the last `Rc` closes it.
pub trait Stream: 'static {
    /// Up to `max` bytes, as many as are there, at least one; empty at the end of the stream. One receive at a time.
    /// The bytes are a slice of a pooled buffer: what holds a part of it holds all of it.
    fn recv(&self, max: usize) -> Io<'_, Bytes>;
    /// Sends all of `data` (gathered, no copy). One send at a time; callers queue.
    fn send(&self, data: Data) -> Io<'_>;
    /// Whether [`Stream::send_file`] works from this file.
    fn sends_from(&self, file: &Rc<dyn File>) -> bool {
        let _ = file;
        false
    }
    /// Sends as many bytes as `at` has, those of `file`, without bringing them into this process. One send at a time.
    ///
    /// The peer has been promised that many: if the file cannot be read, or ends, zeroes are sent for the rest, and the
    /// inner result tells. The outer one is the stream's.
    fn send_file<'a>(&'a self, file: &'a Rc<dyn File>, at: Span) -> Io<'a, Result<()>> {
        let _ = (file, at);
        Box::pin(async { Err(BlockError::unsupported("sending from a file")) })
    }
    /// Ends both directions: a pending `recv` gives the end of the stream, a pending `send` fails.
    fn shutdown(&self);
    /// Who the peer is, for unix sockets.
    fn peer(&self) -> Option<Credentials>;
}
