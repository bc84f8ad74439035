//! Connected streams: sockets, and standard input and output.
//!
//! What can happen: a receive whose future is dropped while the kernel is at work (the operation stays with the stream, and the next
//! receive finishes it: no byte is lost); a peer that sends more than was asked for (kept for the next receive); a peer that
//! reads slowly (the rest of a send waits for room); a shutdown while others wait (they end). Receives go into one chunk after
//! the other, so that neighbouring requests share memory; a chunk is used again when nobody holds a part of it.

use super::file::OsFile;
use super::net::from_rustix;
use super::op::{Handle, Memory, OnDrop, Op, Request};
use super::sys::{again, check};
use super::{Ask, Core, Driver, Helpers};
use crate::sync::{Notify, race};
use crate::{Credentials, File, Stream};
use block::{BlockError, Data, Io, Result, Span};
use bytes::{BufMut, Bytes, BytesMut};
use rustix::net::sockopt::{self, Timeout};
use smallvec::SmallVec;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

/// Memory that receives share: dozens of small requests, and a little more than the default buffer of a unix socket.
const CHUNK: usize = 256 * 1024;
/// A receive with less room than this starts a new chunk.
const MIN_ROOM: usize = 32 * 1024;
/// Bytes written to a pipe that poll says is writable: it has room for this much (PIPE_BUF), so the write does not wait.
const PIPE_ROOM: usize = 4096;

struct Incoming {
    /// Received and not yet handed out; behind it the room for more. Empty while the kernel has it.
    chunk: BytesMut,
    /// A receive in the ring.
    op: Option<Op>,
    /// More is probably there already: the last receive filled its room.
    more: bool,
}

/// Most bytes of a file that a helper thread sends in one go.
const FILE_STEP: u64 = 1 << 20;
/// How long a helper thread waits for room in a socket; then the ring waits, and the thread is free.
const SEND_WAIT: Duration = Duration::from_millis(20);

/// A connected socket.
pub(super) struct Socket {
    core: Rc<Core>,
    handle: Rc<Handle>,
    incoming: RefCell<Incoming>,
    closed: Cell<bool>,
    /// Sends that wait end after [`SEND_WAIT`].
    patience_set: Cell<bool>,
}

fn new_incoming() -> RefCell<Incoming> {
    RefCell::new(Incoming { chunk: BytesMut::new(), op: None, more: false })
}

fn make_room(chunk: &mut BytesMut) -> (*mut u8, usize) {
    if chunk.capacity() - chunk.len() < MIN_ROOM {
        // takes the old memory again if nobody else holds a part of it
        chunk.reserve(CHUNK - chunk.len().min(CHUNK - MIN_ROOM));
    }
    let room = chunk.spare_capacity_mut();
    (room.as_mut_ptr().cast(), room.len().min(CHUNK))
}

fn hand_out(chunk: &mut BytesMut, max: usize) -> Bytes {
    let n = chunk.len().min(max);
    chunk.split_to(n).freeze()
}

impl Socket {
    pub(super) fn stream(core: &Rc<Core>, handle: Rc<Handle>) -> Rc<dyn Stream> {
        Rc::new(Socket {
            core: core.clone(),
            handle,
            incoming: new_incoming(),
            closed: Cell::new(false),
            patience_set: Cell::new(false),
        })
    }

    /// Receives what is there without waiting: the number of bytes, or an errno.
    fn receive_now(&self) -> Result<usize, i32> {
        let mut incoming = self.incoming.borrow_mut();
        let (ptr, room) = make_room(&mut incoming.chunk);
        let fd = self.handle.fd();
        // SAFETY: the room is memory of the chunk, which nobody else uses.
        let n = again(|| unsafe { libc::recv(fd, ptr.cast(), room, libc::MSG_DONTWAIT) } as i64)? as usize;
        // SAFETY: the kernel has written that many bytes there.
        unsafe { incoming.chunk.advance_mut(n) };
        incoming.more = n == room;
        Ok(n)
    }

    /// Starts a receive in the ring, if there is a ring.
    fn receive_in_ring(&self) -> bool {
        if !matches!(self.core.driver, Driver::Ring(_)) {
            return false;
        }
        let mut incoming = self.incoming.borrow_mut();
        let (ptr, room) = make_room(&mut incoming.chunk);
        let chunk = std::mem::take(&mut incoming.chunk);
        incoming.op = Some(self.core.submit(Ask {
            request: Request::Receive { fd: self.handle.fd(), ptr, len: room as u32 },
            memory: Memory::Chunk(chunk),
            handle: &self.handle,
            other: None,
            on_drop: OnDrop::Cancel,
            helpers: Helpers::IfNeeded,
        }));
        true
    }

    /// Waits for the receive in the ring, if there is one, and takes its memory back.
    async fn finish_receive(&self) -> Option<i32> {
        let (result, memory) = poll_fn(|cx| match &mut self.incoming.borrow_mut().op {
            None => Poll::Ready(None),
            Some(op) => Pin::new(op).poll(cx).map(Some),
        })
        .await?;
        let mut incoming = self.incoming.borrow_mut();
        incoming.op = None;
        if let Memory::Chunk(chunk) = memory {
            incoming.chunk = chunk;
        }
        if result > 0 {
            incoming.more = result as usize == incoming.chunk.capacity() - incoming.chunk.len();
            // SAFETY: the kernel has written that many bytes into the spare room.
            unsafe { incoming.chunk.advance_mut(result as usize) };
        }
        Some(result)
    }

    async fn receive(&self, max: usize) -> Result<Bytes> {
        if max == 0 {
            return Err(BlockError::invalid("receive of no bytes"));
        }
        loop {
            let mut ended = false;
            match self.finish_receive().await {
                None => {}
                Some(0) => ended = true,
                Some(n) if n > 0 => {}
                Some(e) if matches!(-e, libc::EINTR | libc::EAGAIN) => {}
                Some(_) if self.closed.get() => ended = true,
                Some(e) => return Err(BlockError::from_errno(-e)),
            }
            let try_now = {
                let mut incoming = self.incoming.borrow_mut();
                if !incoming.chunk.is_empty() {
                    return Ok(hand_out(&mut incoming.chunk, max));
                }
                if ended || self.closed.get() {
                    return Ok(Bytes::new());
                }
                incoming.more
            };
            if !try_now && self.receive_in_ring() {
                continue;
            }
            match self.receive_now() {
                Ok(0) => return Ok(Bytes::new()),
                Ok(_) => {}
                Err(libc::EAGAIN) => {
                    self.incoming.borrow_mut().more = false;
                    if !matches!(self.core.driver, Driver::Ring(_)) {
                        self.core.ready(&self.handle, libc::POLLIN).await.map_err(BlockError::from_errno)?;
                    }
                }
                Err(_) if self.closed.get() => return Ok(Bytes::new()),
                Err(e) => return Err(BlockError::from_errno(e)),
            }
        }
    }

    async fn send_all(&self, data: Data) -> Result<()> {
        let mut done = 0;
        while done < data.len() {
            if self.closed.get() {
                return Err(BlockError::from_errno(libc::EPIPE));
            }
            match self.send_now(&data, done) {
                Ok(n) => done += n,
                Err(libc::EAGAIN) => {
                    self.core.ready(&self.handle, libc::POLLOUT).await.map_err(BlockError::from_errno)?;
                }
                Err(e) => return Err(BlockError::from_errno(e)),
            }
        }
        Ok(())
    }

    /// Limits how long a send without `MSG_DONTWAIT` waits: only those of helper threads are without.
    fn limit_patience(&self) -> Result<()> {
        if self.patience_set.replace(true) {
            return Ok(());
        }
        sockopt::set_socket_timeout(self.handle.as_fd(), Timeout::Send, Some(SEND_WAIT)).map_err(from_rustix)
    }

    async fn send_from(&self, file: &OsFile, at: Span) -> Result<Result<()>> {
        self.limit_patience()?;
        let mut left = at;
        while !left.is_empty() {
            if self.closed.get() {
                return Err(BlockError::from_errno(libc::EPIPE));
            }
            let request = Request::SendFile {
                from: file.handle.fd(),
                offset: left.start,
                len: left.len.min(FILE_STEP) as u32,
                to: self.handle.fd(),
            };
            let (result, _) = self
                .core
                .submit(Ask {
                    request,
                    memory: Memory::None,
                    handle: &self.handle,
                    other: Some(&file.handle),
                    on_drop: OnDrop::Finish,
                    helpers: Helpers::Always,
                })
                .await;
            match result {
                n if n > 0 => left = left.split_at(n as u64).1,
                // the file has ended: what is past its end reads as zero
                0 => return self.send_all(Data::zeroes(left.len as usize)).await.map(Ok),
                e => match -e {
                    libc::EAGAIN => {
                        self.core.ready(&self.handle, libc::POLLOUT).await.map_err(BlockError::from_errno)?;
                    }
                    e @ (libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN | libc::ETIMEDOUT) => {
                        return Err(BlockError::from_errno(e));
                    }
                    e => {
                        self.send_all(Data::zeroes(left.len as usize)).await?;
                        // these say that the file is none that can be sent from
                        let unable =
                            matches!(e, libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP | libc::ESPIPE);
                        return Ok(Err(BlockError::from_errno(if unable { libc::EOPNOTSUPP } else { e })));
                    }
                },
            }
        }
        Ok(Ok(()))
    }

    fn send_now(&self, data: &Data, done: usize) -> Result<usize, i32> {
        let mut list: SmallVec<[libc::iovec; 16]> = SmallVec::new();
        super::file::pieces(data, done, |p| list.push(p));
        // SAFETY: msghdr is plain data for which all zeroes is valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = list.as_mut_ptr();
        message.msg_iovlen = list.len();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message refers to `list`, whose pieces are memory of `data`, which nobody writes to.
        again(|| unsafe { libc::sendmsg(self.handle.fd(), &raw const message, flags) } as i64)
            .map(|n| n as usize)
    }
}

impl Drop for Socket {
    /// A receive that is under way holds the descriptor until it has been called off; the peer shall not wait for that.
    fn drop(&mut self) {
        if self.incoming.get_mut().op.is_some() {
            self.shutdown();
        }
    }
}

impl Stream for Socket {
    fn recv(&self, max: usize) -> Io<'_, Bytes> {
        Box::pin(self.receive(max))
    }

    fn send(&self, data: Data) -> Io<'_> {
        Box::pin(self.send_all(data))
    }

    fn sends_from(&self, file: &Rc<dyn File>) -> bool {
        file.as_any().is::<OsFile>()
    }

    fn send_file<'a>(&'a self, file: &'a Rc<dyn File>, at: Span) -> Io<'a, Result<()>> {
        Box::pin(async move {
            match file.as_any().downcast_ref::<OsFile>() {
                Some(file) => self.send_from(file, at).await,
                None => Err(BlockError::unsupported("sending from a file of another backend")),
            }
        })
    }

    fn shutdown(&self) {
        if !self.closed.replace(true) {
            // SAFETY: no pointers. An error means that the peer was faster.
            unsafe { libc::shutdown(self.handle.fd(), libc::SHUT_RDWR) };
        }
    }

    fn peer(&self) -> Option<Credentials> {
        let mut who = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        let fd = self.handle.fd();
        // SAFETY: the pointers are valid for the call, and `len` is the size of `who`.
        check(i64::from(unsafe {
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut who).cast(), &raw mut len)
        }))
        .ok()?;
        // TCP sockets answer with nobody
        (who.pid > 0).then_some(Credentials { pid: who.pid as u32, uid: who.uid })
    }
}

/// Two descriptors that are no sockets: standard input and output, a pipe, a terminal.
pub(super) struct Pipe {
    core: Rc<Core>,
    input: Rc<Handle>,
    output: Rc<Handle>,
    incoming: RefCell<Incoming>,
    closed: Cell<bool>,
    closing: Notify,
}

impl Pipe {
    pub(super) fn stream(core: &Rc<Core>, input: Rc<Handle>, output: Rc<Handle>) -> Rc<dyn Stream> {
        Rc::new(Pipe {
            core: core.clone(),
            input,
            output,
            incoming: new_incoming(),
            closed: Cell::new(false),
            closing: Notify::new(),
        })
    }

    /// Waits for an event or the shutdown; `false`: it was the shutdown.
    async fn ready(&self, handle: &Rc<Handle>, events: i16) -> Result<bool> {
        if self.closed.get() {
            return Ok(false);
        }
        match race(self.core.ready(handle, events), self.closing.wait()).await {
            None => Ok(false),
            // a file: always ready
            Some(Ok(_) | Err(libc::EOPNOTSUPP | libc::EPERM)) => Ok(true),
            Some(Err(e)) => Err(BlockError::from_errno(e)),
        }
    }

    async fn receive(&self, max: usize) -> Result<Bytes> {
        if max == 0 {
            return Err(BlockError::invalid("receive of no bytes"));
        }
        loop {
            if !self.incoming.borrow().chunk.is_empty() {
                return Ok(hand_out(&mut self.incoming.borrow_mut().chunk, max));
            }
            if !self.ready(&self.input, libc::POLLIN).await? {
                return Ok(Bytes::new());
            }
            let mut incoming = self.incoming.borrow_mut();
            let (ptr, room) = make_room(&mut incoming.chunk);
            let fd = self.input.fd();
            // SAFETY: the room is memory of the chunk, which nobody else uses.
            match check(unsafe { libc::read(fd, ptr.cast(), room) } as i64) {
                Ok(0) => return Ok(Bytes::new()),
                // SAFETY: the kernel has written that many bytes there.
                Ok(n) => unsafe { incoming.chunk.advance_mut(n as usize) },
                Err(libc::EAGAIN | libc::EINTR) => {}
                // a terminal or pseudo-terminal whose other end is gone
                Err(libc::EIO) => return Ok(Bytes::new()),
                Err(e) => return Err(BlockError::from_errno(e)),
            }
        }
    }

    async fn send_all(&self, data: Data) -> Result<()> {
        for part in data.parts() {
            let mut rest: &[u8] = part;
            while !rest.is_empty() {
                if !self.ready(&self.output, libc::POLLOUT).await? {
                    return Err(BlockError::from_errno(libc::EPIPE));
                }
                let n = rest.len().min(PIPE_ROOM);
                // SAFETY: the pointer is valid for `n` bytes.
                match check(unsafe { libc::write(self.output.fd(), rest.as_ptr().cast(), n) } as i64) {
                    Ok(n) => rest = &rest[n as usize..],
                    Err(libc::EAGAIN | libc::EINTR) => {}
                    Err(e) => return Err(BlockError::from_errno(e)),
                }
            }
        }
        Ok(())
    }
}

impl Stream for Pipe {
    fn recv(&self, max: usize) -> Io<'_, Bytes> {
        Box::pin(self.receive(max))
    }

    fn send(&self, data: Data) -> Io<'_> {
        Box::pin(self.send_all(data))
    }

    fn shutdown(&self) {
        self.closed.set(true);
        self.closing.notify_all();
    }

    fn peer(&self) -> Option<Credentials> {
        None
    }
}
