//! Event descriptors (eventfd) that a peer gave us: it rings one, we ring the other.
//!
//! What can happen: the peer gives a descriptor of another kind, or fills the counter (ringing then does nothing, as it is
//! rung already). What must stay true: neither waiting nor ringing ever blocks the thread.

use super::op::Handle;
use super::sys::again;
use super::{Core, Os};
use crate::Env;
use block::{BlockError, Result};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

/// One event descriptor.
pub struct EventFd {
    core: Rc<Core>,
    handle: Rc<Handle>,
}

impl EventFd {
    /// Takes over a descriptor. It is made non-blocking, also for the peer.
    ///
    /// # Errors
    /// `Unsupported` in the simulator.
    pub fn new(env: &Env, fd: OwnedFd) -> Result<EventFd> {
        let core = core_of(env)?;
        rustix::io::ioctl_fionbio(&fd, true).map_err(|e| BlockError::from_errno(e.raw_os_error()))?;
        Ok(EventFd { core, handle: Handle::new(fd) })
    }

    /// A new one of our own.
    pub fn create(env: &Env) -> Result<EventFd> {
        let fd = super::sys::eventfd().map_err(BlockError::from_errno)?;
        EventFd::new(env, fd)
    }

    /// Another descriptor of the same event, for a peer.
    pub fn share(&self) -> Result<OwnedFd> {
        Ok(self.handle.as_fd().try_clone_to_owned()?)
    }

    /// Whether it has rung since this was last asked.
    pub fn take(&self) -> Result<bool> {
        let mut count = 0u64;
        let fd = self.handle.as_fd().as_raw_fd();
        // SAFETY: the pointer is valid for 8 bytes.
        match again(|| unsafe { libc::read(fd, (&raw mut count).cast(), size_of::<u64>()) } as i64) {
            Ok(8) => Ok(true),
            Ok(_) => Err(BlockError::invalid("an event descriptor was closed or is none")),
            Err(libc::EAGAIN) => Ok(false),
            Err(e) => Err(BlockError::from_errno(e)),
        }
    }

    /// Waits until it rings.
    pub async fn wait(&self) -> Result<()> {
        while !self.take()? {
            self.core.ready(&self.handle, libc::POLLIN).await.map_err(BlockError::from_errno)?;
        }
        Ok(())
    }

    /// Rings it.
    pub fn ring(&self) {
        let one = 1u64.to_ne_bytes();
        let fd = self.handle.as_fd().as_raw_fd();
        // SAFETY: the pointer is valid for 8 bytes. A peer that gave a descriptor which cannot be written hears nothing.
        let _ = again(|| unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) } as i64);
    }
}

/// What this thread has of the operating system.
pub(super) fn core_of(env: &Env) -> Result<Rc<Core>> {
    let os = env.backend().as_any().and_then(|a| a.downcast_ref::<Os>());
    os.map(|os| os.core.clone()).ok_or_else(|| BlockError::unsupported("not in a simulation"))
}
