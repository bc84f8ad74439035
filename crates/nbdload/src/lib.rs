//! What the load generators `nbdload` and `vhostload` and the do-nothing server `nbdideal` share: sockets and handshakes, what
//! blocks must contain, figures.
//!
//! All speak the transmission phase by hand, over flat buffers and blocking sockets, so that they do not measure the code
//! that they are made to measure, and are faster than any server worth measuring.
#![forbid(unsafe_code)]

pub mod content;
pub mod guest;
pub mod latency;
pub mod random;
pub mod report;
pub mod steering;

use nbd::{ClientHandshake, ClientWants, Inbox, Mode, Negotiated, Outbox};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

/// A connected socket of either kind.
pub enum Socket {
    /// In the file system.
    Unix(UnixStream),
    /// TCP.
    Tcp(TcpStream),
}

impl Read for Socket {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Socket::Unix(s) => s.read(to),
            Socket::Tcp(s) => s.read(to),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, from: &[u8]) -> std::io::Result<usize> {
        match self {
            Socket::Unix(s) => s.write(from),
            Socket::Tcp(s) => s.write(from),
        }
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Where the server is: a socket path, or `host:port`.
pub fn connect(unix: Option<&str>, tcp: Option<&str>) -> Result<Socket, String> {
    let text = |e: std::io::Error| e.to_string();
    match (unix, tcp) {
        (Some(path), None) => UnixStream::connect(path).map(Socket::Unix).map_err(|e| format!("{path}: {e}")),
        (None, Some(at)) => {
            let s = TcpStream::connect(at).map_err(|e| format!("{at}: {e}"))?;
            s.set_nodelay(true).map_err(text)?;
            Ok(Socket::Tcp(s))
        }
        _ => Err("give either --socket or --tcp".to_owned()),
    }
}

/// The parts of `nbd+unix:///EXPORT?socket=PATH` or `nbd://HOST:PORT/EXPORT`: socket path, TCP address, export.
pub fn parse_uri(uri: &str) -> Result<(Option<String>, Option<String>, String), String> {
    if let Some(rest) = uri.strip_prefix("nbd+unix:///") {
        let (export, path) = rest.split_once("?socket=").ok_or("a nbd+unix URI needs ?socket=PATH")?;
        return Ok((Some(path.to_owned()), None, export.to_owned()));
    }
    let rest = uri.strip_prefix("nbd://").ok_or_else(|| format!("not an NBD URI: {uri}"))?;
    let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
    let host = if host.contains(':') { host.to_owned() } else { format!("{host}:10809") };
    Ok((None, Some(host), export.to_owned()))
}

/// Shakes hands as a client.
pub fn enter(socket: &mut Socket, export: &str, mode: Mode) -> Result<Negotiated, String> {
    let wants = ClientWants { export: export.to_owned(), mode, contexts: Vec::new(), tls: false };
    let mut hand = ClientHandshake::new(wants).map_err(|e| e.to_string())?;
    let (mut inbox, mut out) = (Inbox::new(), Outbox::new());
    let mut buffer = [0; 4096];
    loop {
        let n = socket.read(&mut buffer).map_err(|e| e.to_string())?;
        if n == 0 {
            return Err("the server hung up during the handshake".to_owned());
        }
        inbox.push(bytes::Bytes::copy_from_slice(&buffer[..n]), usize::MAX);
        let done = hand.step(&mut inbox, &mut out).map_err(|e| e.to_string())?.entered();
        socket.write_all(&out.take().to_vec()).map_err(|e| e.to_string())?;
        if let Some(n) = done {
            return Ok(n);
        }
    }
}
