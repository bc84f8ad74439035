//! Listening, accepting, connecting.
//!
//! What can happen: a socket file is in the way (replaced if nobody listens on it; in use otherwise); no descriptors are left
//! when somebody connects (accepting pauses and tries again); a peer gives up before it is accepted (skipped); the queue of a
//! unix listener is full (connecting tries again).

use super::Core;
use super::op::Handle;
use super::stream::{Pipe, Socket};
use super::sys::{again, check, owned};
use crate::{Address, Family, Listener, Stream};
use block::{BlockError, ErrorKind, Io, Result};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// Connections that may wait to be accepted; the kernel cuts it at net.core.somaxconn.
const BACKLOG: i32 = 1024;
/// How long an address may still be in use by who has gone, and how often that is looked at.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_STEP: Duration = Duration::from_millis(20);
/// Pause when there are no descriptors or memory for a connection: it waits in the backlog meanwhile.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// Bytes that may wait in a unix socket for the peer: a piece of a copy, so that it is handed over in one call rather than by turns
/// with a peer that makes room bit by bit.
const SEND_BUFFER: usize = 1 << 20;
/// Pause before trying again to connect to a unix listener whose backlog is full.
const FULL_PAUSE: Duration = Duration::from_millis(5);

pub(super) fn from_rustix(e: rustix::io::Errno) -> BlockError {
    BlockError::from_errno(e.raw_os_error())
}

fn new_socket(family: AddressFamily) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(family, SocketType::STREAM, flags, None).map_err(from_rustix)
}

fn set_nonblocking(fd: RawFd, on: bool) -> Result<()> {
    let mut value = i32::from(on);
    // SAFETY: FIONBIO reads an int from the pointer.
    check(i64::from(unsafe { libc::ioctl(fd, libc::FIONBIO, &raw mut value) }))
        .map(|_| ())
        .map_err(BlockError::from_errno)
}

/// Takes over a descriptor that was inherited. It must be open.
fn inherited(fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: no pointers. It is checked to be open, and not inherited further from now on.
    check(i64::from(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }))
        .map_err(|e| BlockError::from_errno(e).context(format!("descriptor {fd}")))?;
    Ok(owned(i64::from(fd)))
}

fn duplicate(fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    check(i64::from(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) }))
        .map(owned)
        .map_err(BlockError::from_errno)
}

/// Addresses of a host: an address itself, or a name that the host's resolver knows (asked on a helper thread).
async fn resolve(
    core: &Rc<Core>,
    (host, port): (&str, u16),
    family: Family,
    to_listen: bool,
) -> Result<Vec<SocketAddr>> {
    let mut found = resolve_all(core, host, port, to_listen).await?;
    found.retain(|a| family.has(a.ip()));
    if found.is_empty() {
        return Err(unresolved(host, port, "Address family for hostname not supported"));
    }
    Ok(found)
}

fn unresolved(host: &str, port: u16, why: &str) -> BlockError {
    BlockError::new(ErrorKind::NotFound, format!("address resolution failed for {host}:{port}: {why}"))
}

async fn resolve_all(core: &Rc<Core>, host: &str, port: u16, to_listen: bool) -> Result<Vec<SocketAddr>> {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    if bare.is_empty() {
        let (six, four) = if to_listen {
            (Ipv6Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED)
        } else {
            (Ipv6Addr::LOCALHOST, Ipv4Addr::LOCALHOST)
        };
        return Ok(vec![SocketAddr::new(six.into(), port), SocketAddr::new(four.into(), port)]);
    }
    let name = bare.to_owned();
    let found =
        core.blocking(None, move || (name.as_str(), port).to_socket_addrs().map(|a| a.collect())).await?;
    match found {
        Ok(list) => {
            let list: Vec<SocketAddr> = list;
            if list.is_empty() { Err(unresolved(host, port, "no address")) } else { Ok(list) }
        }
        // the standard library puts words of its own before those of the resolver
        Err(e) => {
            let said = e.to_string();
            let why = said.strip_prefix("failed to lookup address information: ").unwrap_or(&said);
            Err(unresolved(host, port, why))
        }
    }
}

/// See [`crate::Env::listen`].
pub(super) async fn listen(core: &Rc<Core>, at: &Address) -> Result<Rc<dyn Listener>> {
    Ok(Rc::new(listen_here(core, at).await?))
}

/// The same, for who wants descriptors rather than streams.
///
/// The sockets of a process that was killed go only when the kernel has ended what was under way in its ring, which can be
/// after its successor has started. So an address in use is tried again for a while.
pub(super) async fn listen_here(core: &Rc<Core>, at: &Address) -> Result<Listening> {
    let end = core.timers.now() + LINGER;
    loop {
        match listen_once(core, at).await {
            Err(e) if e.errno() == libc::EADDRINUSE && may_go(at) && core.timers.now() < end => {
                core.timers.sleep_until(core.timers.now() + LINGER_STEP).await;
            }
            done => return done,
        }
    }
}

/// Whether what uses the address may be a socket: anything else of that name stays.
fn may_go(at: &Address) -> bool {
    use std::os::unix::fs::FileTypeExt;
    match at {
        Address::Unix(path) => std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()),
        _ => true,
    }
}

async fn listen_once(core: &Rc<Core>, at: &Address) -> Result<Listening> {
    let (fd, address, tcp) = match at {
        Address::Unix(path) => (listen_unix(core, path).await?, at.clone(), false),
        Address::Tcp { host, port, family } => {
            let mut failure = BlockError::from_errno(libc::EADDRNOTAVAIL);
            let mut found = None;
            for a in resolve(core, (host, *port), *family, true).await? {
                match listen_tcp(&a) {
                    Ok((fd, port)) => {
                        found = Some((fd, Address::Tcp { host: host.clone(), port, family: *family }, true));
                        break;
                    }
                    Err(e) => failure = e,
                }
            }
            found.ok_or(failure)?
        }
        Address::Fd(n) => {
            let fd = inherited(*n)?;
            if !sockopt::socket_acceptconn(&fd).map_err(from_rustix)? {
                return Err(BlockError::invalid(format!("descriptor {n} is not a listening socket")));
            }
            set_nonblocking(fd.as_raw_fd(), true)?;
            let tcp = is_tcp(&fd);
            (fd, at.clone(), tcp)
        }
        Address::Stdio => return Err(BlockError::invalid("cannot listen on standard input")),
    };
    Ok(Listening { core: core.clone(), handle: Handle::new(fd), address, tcp })
}

async fn listen_unix(core: &Rc<Core>, path: &Path) -> Result<OwnedFd> {
    let address = SocketAddrUnix::new(path).map_err(from_rustix)?;
    let fd = new_socket(AddressFamily::UNIX)?;
    let mut bound = rustix::net::bind(&fd, &address);
    if bound == Err(rustix::io::Errno::ADDRINUSE) && is_stale(path, &address) {
        let path = path.to_owned();
        // somebody else may have removed it just now
        let _ = core.blocking(None, move || std::fs::remove_file(path)).await?;
        bound = rustix::net::bind(&fd, &address);
    }
    bound.map_err(from_rustix)?;
    rustix::net::listen(&fd, BACKLOG).map_err(from_rustix)?;
    Ok(fd)
}

/// Whether `path` is a socket that nobody listens on.
fn is_stale(path: &Path, address: &SocketAddrUnix) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    let refused = new_socket(AddressFamily::UNIX)
        .is_ok_and(|s| rustix::net::connect(&s, address) == Err(rustix::io::Errno::CONNREFUSED));
    is_socket && refused
}

fn listen_tcp(at: &SocketAddr) -> Result<(OwnedFd, u16)> {
    let fd = new_socket(if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 })?;
    sockopt::set_socket_reuseaddr(&fd, true).map_err(from_rustix)?;
    rustix::net::bind(&fd, at).map_err(from_rustix)?;
    rustix::net::listen(&fd, BACKLOG).map_err(from_rustix)?;
    let got = rustix::net::getsockname(&fd).map_err(from_rustix)?;
    let got = SocketAddr::try_from(got).map_err(from_rustix)?;
    Ok((fd, got.port()))
}

fn is_tcp(fd: &OwnedFd) -> bool {
    matches!(sockopt::socket_domain(fd), Ok(AddressFamily::INET | AddressFamily::INET6))
}

/// See [`crate::Env::connect`].
pub(super) async fn connect(core: &Rc<Core>, to: &Address) -> Result<Rc<dyn Stream>> {
    match to {
        Address::Unix(path) => {
            let address = SocketAddrUnix::new(path).map_err(from_rustix)?;
            loop {
                let fd = new_socket(AddressFamily::UNIX)?;
                match rustix::net::connect(&fd, &address) {
                    Ok(()) => {
                        // a wish; the system has a limit of its own
                        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&fd, SEND_BUFFER);
                        return connected(core, fd, false);
                    }
                    Err(rustix::io::Errno::AGAIN) => {
                        drop(fd);
                        let at = core.timers.now() + FULL_PAUSE;
                        core.timers.sleep_until(at).await;
                    }
                    Err(e) => return Err(from_rustix(e)),
                }
            }
        }
        Address::Tcp { host, port, family } => {
            let mut failure = BlockError::from_errno(libc::EADDRNOTAVAIL);
            for a in resolve(core, (host, *port), *family, false).await? {
                match connect_tcp(core, &a).await {
                    Ok(stream) => return Ok(stream),
                    Err(e) => failure = e,
                }
            }
            Err(failure)
        }
        Address::Fd(n) => {
            let fd = inherited(*n)?;
            if sockopt::socket_type(&fd).is_ok() {
                let tcp = is_tcp(&fd);
                return connected(core, fd, tcp);
            }
            let handle = Handle::new(fd);
            Ok(Pipe::stream(core, handle.clone(), handle))
        }
        Address::Stdio => {
            let (input, output) = (duplicate(0)?, duplicate(1)?);
            Ok(Pipe::stream(core, Handle::new(input), Handle::new(output)))
        }
    }
}

async fn connect_tcp(core: &Rc<Core>, to: &SocketAddr) -> Result<Rc<dyn Stream>> {
    let fd = new_socket(if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 })?;
    let first = rustix::net::connect(&fd, to);
    match first {
        Ok(()) => connected(core, fd, true),
        Err(rustix::io::Errno::INPROGRESS) => {
            let handle = Handle::new(fd);
            core.ready(&handle, libc::POLLOUT).await.map_err(BlockError::from_errno)?;
            sockopt::socket_error(handle.as_fd()).map_err(from_rustix)?.map_err(from_rustix)?;
            finish(core, handle, true)
        }
        Err(e) => Err(from_rustix(e)),
    }
}

fn connected(core: &Rc<Core>, fd: OwnedFd, tcp: bool) -> Result<Rc<dyn Stream>> {
    finish(core, Handle::new(fd), tcp)
}

fn finish(core: &Rc<Core>, handle: Rc<Handle>, tcp: bool) -> Result<Rc<dyn Stream>> {
    // the ring would take O_NONBLOCK as "fail rather than wait"
    set_nonblocking(handle.fd(), false)?;
    if tcp {
        // requests and replies are written whole: waiting for more only adds delay
        let _ = sockopt::set_tcp_nodelay(handle.as_fd(), true);
        // a peer that vanished without a word is noticed some day
        let _ = sockopt::set_socket_keepalive(handle.as_fd(), true);
    }
    Ok(Socket::stream(core, handle))
}

/// A listening socket.
pub(super) struct Listening {
    core: Rc<Core>,
    handle: Rc<Handle>,
    address: Address,
    tcp: bool,
}

impl Listening {
    async fn next(&self) -> Result<Rc<dyn Stream>> {
        let (core, fd) = self.next_descriptor().await?;
        connected(&core, fd, self.tcp)
    }

    /// The next connection's descriptor, and the thread's side of it.
    pub(super) async fn next_descriptor(&self) -> Result<(Rc<Core>, OwnedFd)> {
        loop {
            let fd = self.handle.fd();
            let null = std::ptr::null_mut();
            // SAFETY: null means that the peer's address is not wanted.
            match again(|| i64::from(unsafe { libc::accept4(fd, null, null.cast(), libc::SOCK_CLOEXEC) })) {
                Ok(fd) => return Ok((self.core.clone(), owned(fd))),
                Err(libc::EAGAIN) => {
                    self.core.ready(&self.handle, libc::POLLIN).await.map_err(BlockError::from_errno)?;
                }
                Err(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                    let at = self.core.timers.now() + EXHAUSTED_PAUSE;
                    self.core.timers.sleep_until(at).await;
                }
                Err(e @ (libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP | libc::EFAULT)) => {
                    return Err(BlockError::from_errno(e));
                }
                // errors of the connection that was about to be accepted (accept(2)): the next one may be well
                Err(_) => {}
            }
        }
    }
}

impl Drop for Listening {
    /// An accept that was called off holds the descriptor until the next loop turn; nobody shall connect meanwhile.
    fn drop(&mut self) {
        if !matches!(self.address, Address::Fd(_)) {
            // SAFETY: no pointers.
            unsafe { libc::shutdown(self.handle.fd(), libc::SHUT_RDWR) };
        }
    }
}

impl Listener for Listening {
    fn accept(&self) -> Io<'_, Rc<dyn Stream>> {
        Box::pin(self.next())
    }

    fn address(&self) -> Address {
        self.address.clone()
    }
}
