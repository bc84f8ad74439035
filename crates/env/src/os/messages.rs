//! Unix sockets that carry descriptors beside bytes.
//!
//! What can happen: a peer sends more descriptors than one receive takes (the kernel closes the surplus, and
//! [`MessageSocket::recv`] says so with an error), sends slowly, or goes away. What must stay true: a descriptor that was
//! received is owned by somebody or closed; nothing here blocks the thread.

use super::Core;
use super::event::core_of;
use super::net::{self, Listening, from_rustix};
use super::op::Handle;
use crate::{Address, Env};
use block::{BlockError, Result};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown,
};
use std::cell::Cell;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;

/// Most descriptors in one message: what vhost-user sends at most, and some more. The kernel's own limit is 253.
pub const MAX_DESCRIPTORS: usize = 64;

/// A connected unix socket.
pub struct MessageSocket {
    core: Rc<Core>,
    handle: Rc<Handle>,
    closed: Cell<bool>,
}

impl MessageSocket {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// `Unsupported` in the simulator.
    pub fn new(env: &Env, fd: OwnedFd) -> Result<MessageSocket> {
        Ok(MessageSocket::with(core_of(env)?, fd))
    }

    fn with(core: Rc<Core>, fd: OwnedFd) -> MessageSocket {
        MessageSocket { core, handle: Handle::new(fd), closed: Cell::new(false) }
    }

    /// Up to `buf.len()` bytes, at least one, and the descriptors that came with them; 0 at the end of the stream.
    pub async fn recv(&self, buf: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Result<usize> {
        loop {
            if self.closed.get() {
                return Ok(0);
            }
            match self.recv_now(buf, descriptors) {
                Ok(n) => return Ok(n),
                Err(Errno::AGAIN) => {
                    self.core.ready(&self.handle, libc::POLLIN).await.map_err(BlockError::from_errno)?;
                }
                Err(Errno::INTR) => {}
                Err(_) if self.closed.get() => return Ok(0),
                Err(e) => return Err(from_rustix(e)),
            }
        }
    }

    fn recv_now(&self, buf: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(self.handle.as_fd(), &mut [IoSliceMut::new(buf)], &mut beside, flags)?;
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                descriptors.extend(fds);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) {
            return Err(Errno::TOOBIG);
        }
        Ok(got.bytes)
    }

    /// Sends all of `bytes`, the descriptors with the first of them.
    pub async fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            if self.closed.get() {
                return Err(from_rustix(Errno::PIPE));
            }
            let with = if done == 0 { descriptors } else { &[] };
            match self.send_now(&bytes[done..], with) {
                Ok(n) => done += n,
                Err(Errno::AGAIN) => {
                    self.core.ready(&self.handle, libc::POLLOUT).await.map_err(BlockError::from_errno)?;
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(from_rustix(e)),
            }
        }
        Ok(())
    }

    fn send_now(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(Errno::TOOBIG);
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        rustix::net::sendmsg(self.handle.as_fd(), &[IoSlice::new(bytes)], &mut beside, flags)
    }

    /// Ends both directions: a pending `recv` gives the end of the stream.
    pub fn shutdown(&self) {
        if !self.closed.replace(true) {
            // an error means that the peer was faster
            let _ = rustix::net::shutdown(self.handle.as_fd(), Shutdown::Both);
        }
    }
}

/// A listening unix socket.
pub struct MessageListener(Listening);

impl MessageListener {
    /// Listens as [`Env::listen`] does.
    ///
    /// # Errors
    /// `Unsupported` in the simulator.
    pub async fn listen(env: &Env, at: &Address) -> Result<MessageListener> {
        Ok(MessageListener(net::listen_here(&core_of(env)?, at).await?))
    }

    /// The next connection.
    pub async fn accept(&self) -> Result<MessageSocket> {
        let (core, fd) = self.0.next_descriptor().await?;
        Ok(MessageSocket::with(core, fd))
    }
}
