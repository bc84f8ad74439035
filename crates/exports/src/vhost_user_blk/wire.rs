//! Messages of the vhost-user protocol on a socket: a header of twelve bytes, a body, descriptors beside them.
//!
//! What can happen: a peer sends a header that promises too much, ends in the middle, or gives descriptors nobody wants
//! (closed with the message). What must stay true: a message costs at most [`MAX_MSG_SIZE`] bytes before it was looked at.

use block::{BlockError, Result};
use env::os::messages::MessageSocket;
use env::os::shared::vm_memory::ByteValued;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vhost::vhost_user::message::{MAX_MSG_SIZE, VhostUserHeaderFlag};

const HEADER: usize = 12;
/// Version 1 of the protocol, in the lowest bits of the flags.
const VERSION: u32 = 1;

/// A message that was received.
pub(super) struct Message {
    /// The request's number.
    pub(super) request: u32,
    flags: u32,
    pub(super) body: Vec<u8>,
    pub(super) descriptors: Vec<OwnedFd>,
}

impl Message {
    /// The next one; `None` at the end of the stream.
    pub(super) async fn receive(socket: &MessageSocket) -> Result<Option<Message>> {
        let (mut header, mut descriptors) = ([0; HEADER], Vec::new());
        if !fill(socket, &mut header, &mut descriptors).await? {
            return Ok(None);
        }
        let word = |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
        let (request, flags, len) = (word(0), word(4), word(8) as usize);
        if flags & VhostUserHeaderFlag::VERSION.bits() != VERSION || len > MAX_MSG_SIZE {
            return Err(BlockError::invalid(format!(
                "vhost-user message {request} has flags {flags:#x} and length {len}"
            )));
        }
        let mut body = vec![0; len];
        if len > 0 && !fill(socket, &mut body, &mut descriptors).await? {
            return Ok(None);
        }
        Ok(Some(Message { request, flags, body, descriptors }))
    }

    /// Whether the sender waits for an answer to a message that has none of its own.
    pub(super) fn wants_ack(&self) -> bool {
        self.flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0
    }

    /// A value at byte `at` of the body.
    pub(super) fn value<T: ByteValued + Default>(&self, at: usize) -> Result<T> {
        let mut value = T::default();
        let len = value.as_slice().len();
        let bytes = self.body.get(at..).and_then(|rest| rest.get(..len));
        let bytes = bytes.ok_or_else(|| self.refuse("is too short"))?;
        value.as_mut_slice().copy_from_slice(bytes);
        Ok(value)
    }

    /// The only descriptor.
    pub(super) fn descriptor(&mut self) -> Result<OwnedFd> {
        if self.descriptors.len() > 1 {
            return Err(self.refuse("has too many descriptors"));
        }
        self.descriptors.pop().ok_or_else(|| self.refuse("has no descriptor"))
    }

    /// An error about this message.
    pub(super) fn refuse(&self, what: &str) -> BlockError {
        BlockError::invalid(format!("vhost-user message {} {what}", self.request))
    }
}

/// Receives exactly as many bytes as `buf` has; `false`: the stream ended.
async fn fill(socket: &MessageSocket, buf: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Result<bool> {
    let mut have = 0;
    while have < buf.len() {
        match socket.recv(&mut buf[have..], descriptors).await? {
            0 => return Ok(false),
            n => have += n,
        }
    }
    Ok(true)
}

/// Answers message `request`, or with `reply` false sends a message of our own.
pub(super) async fn send(
    socket: &MessageSocket,
    request: u32,
    reply: bool,
    body: &[u8],
    descriptor: Option<&OwnedFd>,
) -> Result<()> {
    let flags = VERSION | if reply { VhostUserHeaderFlag::REPLY.bits() } else { 0 };
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    for word in [request, flags, body.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(body);
    let with: Vec<BorrowedFd<'_>> = descriptor.iter().map(|d| d.as_fd()).collect();
    socket.send(&bytes, &with).await
}
