//! Signals as a stream of numbers (signalfd).

use super::op::Handle;
use super::sys::{again, check, owned};
use super::{Core, Os};
use crate::Env;
use block::{BlockError, Result};
use std::rc::Rc;

/// Hang-up of the terminal.
pub const SIGHUP: i32 = libc::SIGHUP;
/// Interrupt from the keyboard.
pub const SIGINT: i32 = libc::SIGINT;
/// Request to end.
pub const SIGTERM: i32 = libc::SIGTERM;
/// For the user.
pub const SIGUSR1: i32 = libc::SIGUSR1;

/// Signals that arrive from now on.
pub struct Signals {
    core: Rc<Core>,
    handle: Rc<Handle>,
}

/// Turns the given signals into a stream. Call it before any other thread is started (they inherit that the signals are
/// blocked; a thread from before would be ended by them).
///
/// # Errors
/// `Unsupported` in the simulator, `Invalid` for a number that is no signal.
pub fn signals(env: &Env, which: &[i32]) -> Result<Signals> {
    let os = env.backend().as_any().and_then(|a| a.downcast_ref::<Os>());
    let Some(os) = os else { return Err(BlockError::unsupported("no signals here")) };
    // SAFETY: sigset_t is plain data; sigemptyset then makes it valid.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid.
    unsafe { libc::sigemptyset(&raw mut set) };
    for s in which {
        // SAFETY: the pointer is valid; a wrong number is an error.
        check(i64::from(unsafe { libc::sigaddset(&raw mut set, *s) })).map_err(BlockError::from_errno)?;
    }
    // SAFETY: the set is valid, and the old one is not wanted.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if blocked != 0 {
        return Err(BlockError::from_errno(blocked));
    }
    // SAFETY: the set is valid.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    let fd = check(i64::from(fd)).map(owned).map_err(BlockError::from_errno)?;
    Ok(Signals { core: os.core.clone(), handle: Handle::new(fd) })
}

impl Signals {
    /// The number of the next signal.
    pub async fn next(&self) -> Result<i32> {
        loop {
            // SAFETY: plain data for which all zeroes is valid.
            let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
            let size = size_of::<libc::signalfd_siginfo>();
            let fd = self.handle.fd();
            // SAFETY: the pointer is valid for that many bytes.
            match again(|| unsafe { libc::read(fd, (&raw mut info).cast(), size) } as i64) {
                Ok(n) if n as usize == size => return Ok(info.ssi_signo as i32),
                Ok(_) | Err(libc::EAGAIN) => {
                    self.core.ready(&self.handle, libc::POLLIN).await.map_err(BlockError::from_errno)?;
                }
                Err(e) => return Err(BlockError::from_errno(e)),
            }
        }
    }
}
