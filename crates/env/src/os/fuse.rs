//! A file that this process provides: a FUSE mount over a regular file, and the kernel's requests to it.
//!
//! Whose protocol it is that passes through here is not looked at (`exports::fuse` does that); this file mounts, receives
//! and sends. Mounting is a system call where that is allowed, and the program `fusermount3` elsewhere, as libfuse does it.
//!
//! What can happen: an earlier process died and left its mount, which answers nothing any more (it is taken away); somebody
//! unmounts (the end of the requests); the kernel takes back a request before it was answered (the answer is dropped). What
//! must stay true: neither receiving nor sending blocks the thread; a mount ends with the object, unless the process dies.

use super::buffers::Buf;
use super::event::core_of;
use super::op::Handle;
use super::pool::Pool;
use super::sys::{again, check, owned};
use super::{Core, process, sys};
use crate::Env;
use block::{BlockError, Data, Result};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;

/// Bytes of a request that lie apart from the rest: header and arguments of a write, so that the bytes to write begin where
/// a buffer does.
pub const FUSE_HEAD: usize = 80;
/// Up to this many bytes are copied out of the receive buffer; a longer payload takes it along.
const COPIED: usize = 64 << 10;
/// Most pieces of an answer in one call (IOV_MAX, less the header).
const MAX_PIECES: usize = 1023;

/// How to mount.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FuseOptions {
    /// Whether other users than ours get at the file, as far as its permissions let them.
    pub allow_other: bool,
    /// Longest read that the kernel shall ask for, and longest write, in bytes.
    pub max_transfer: usize,
}

/// One request of the kernel.
#[derive(Debug)]
pub struct FuseRequest {
    head: [u8; FUSE_HEAD],
    head_len: usize,
    rest: Bytes,
}

impl FuseRequest {
    /// `N` bytes from byte `at` on; `None` past the end.
    pub fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        let mut out = [0; N];
        for (i, to) in out.iter_mut().enumerate() {
            let at = at.checked_add(i)?;
            *to = match at.checked_sub(FUSE_HEAD) {
                Some(behind) => *self.rest.get(behind)?,
                None => *self.head[..self.head_len].get(at)?,
            };
        }
        Some(out)
    }

    /// What stands behind the first [`FUSE_HEAD`] bytes.
    pub fn rest(&self) -> &Bytes {
        &self.rest
    }
}

/// What a look for a request found.
#[derive(Debug)]
pub enum FuseReceived {
    /// This.
    Request(FuseRequest),
    /// None, now.
    Nothing,
    /// There will be none: the file is mounted no more.
    Gone,
}

/// A mounted file.
pub struct FuseMount {
    core: Rc<Core>,
    handle: Rc<Handle>,
    at: PathBuf,
    by_helper: bool,
    mounted: Cell<bool>,
    max_transfer: usize,
    spare: RefCell<Option<Buf>>,
}

impl FuseMount {
    /// Mounts over the regular file `at`.
    ///
    /// # Errors
    /// It is no regular file, or we may not mount. `Unsupported` in the simulator.
    pub async fn new(env: &Env, at: &Path, options: FuseOptions) -> Result<FuseMount> {
        let core = core_of(env)?;
        let (shown, path) = (at.to_owned(), env.absolute(at));
        let target = path.clone();
        // names may be on slow file systems, and the helper is a process to wait for
        let (fd, by_helper) = core.blocking(None, move || mount(&target, &shown, options)).await??;
        rustix::io::ioctl_fionbio(&fd, true).map_err(|e| BlockError::from_errno(e.raw_os_error()))?;
        Ok(FuseMount {
            core,
            handle: Handle::new(fd),
            at: path,
            by_helper,
            mounted: Cell::new(true),
            max_transfer: options.max_transfer,
            spare: RefCell::new(None),
        })
    }

    /// The file that is covered, as an absolute path.
    pub fn at(&self) -> &Path {
        &self.at
    }

    /// The next request, if there is one.
    pub fn try_recv(&self) -> Result<FuseReceived> {
        let mut head = [0; FUSE_HEAD];
        // the kernel wants room for the longest write, whatever comes
        let kept = self.spare.take();
        let mut buf = match kept {
            Some(b) => b,
            None => Buf::take(self.max_transfer)?,
        };
        let pieces = [
            libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: FUSE_HEAD },
            libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: self.max_transfer },
        ];
        let fd = self.handle.fd();
        let n = loop {
            // SAFETY: both pieces are valid for their lengths; the buffer was taken with room for so many bytes.
            match again(|| unsafe { libc::readv(fd, pieces.as_ptr(), 2) } as i64) {
                Ok(n) => break n as usize,
                // a request that was taken back while it was read
                Err(libc::ENOENT) => {}
                Err(e) => {
                    *self.spare.borrow_mut() = Some(buf);
                    return match e {
                        libc::EAGAIN => Ok(FuseReceived::Nothing),
                        libc::ENODEV | libc::ECONNABORTED => Ok(FuseReceived::Gone),
                        e => Err(BlockError::from_errno(e)),
                    };
                }
            }
        };
        let behind = n.saturating_sub(FUSE_HEAD);
        // SAFETY: the kernel has written so many bytes to the second piece.
        unsafe { buf.advance(behind) };
        let rest = if behind <= COPIED {
            let rest = copied(buf.as_ref())?;
            buf.clear();
            *self.spare.borrow_mut() = Some(buf);
            rest
        } else {
            buf.into_bytes()
        };
        Ok(FuseReceived::Request(FuseRequest { head, head_len: n.min(FUSE_HEAD), rest }))
    }

    /// Waits until there may be a request.
    pub async fn ready(&self) -> Result<()> {
        self.core.ready(&self.handle, libc::POLLIN).await.map(drop).map_err(BlockError::from_errno)
    }

    /// Sends an answer: `head` and, behind it, `data`. One to a request that was taken back goes nowhere.
    pub fn send(&self, head: &[u8], data: &Data) {
        let whole;
        let mut pieces = smallvec::SmallVec::<[libc::iovec; 4]>::new();
        let mut add =
            |b: &[u8]| pieces.push(libc::iovec { iov_base: b.as_ptr().cast_mut().cast(), iov_len: b.len() });
        add(head);
        if data.parts().len() > MAX_PIECES {
            whole = data.contiguous();
            add(&whole);
        } else {
            data.parts().iter().for_each(|p| add(p));
        }
        let fd = self.handle.fd();
        // SAFETY: the pieces are borrowed until after the call, which only reads them.
        let _ = again(|| unsafe { libc::writev(fd, pieces.as_ptr(), pieces.len() as i32) } as i64);
    }

    /// Takes the file away from its place; who has it open meets the end of the connection. Nothing the second time.
    pub fn unmount(&self) {
        if !self.mounted.replace(false) {
            return;
        }
        if !self.by_helper {
            let _ = detach(&self.at);
            return;
        }
        // it is no loss that nobody waits for it: what ends the connection is that the descriptor goes
        let at = self.at.clone();
        drop(self.core.call(Pool::io(), None, Box::new(move || drop(helper_detach(&at)))));
    }

    /// It is unmounted already, by somebody else.
    pub fn lost(&self) {
        self.mounted.set(false);
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// The program that mounts for users who may not.
const HELPER: &str = "fusermount3";

fn copied(bytes: &[u8]) -> Result<Bytes> {
    if bytes.is_empty() {
        return Ok(Bytes::new());
    }
    let mut own = Buf::take(bytes.len())?;
    own.append(bytes);
    Ok(own.into_bytes())
}

fn c_string(text: &OsStr) -> Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| BlockError::invalid("a path has a zero byte in it"))
}

/// Unmounts at once for those who come, later for those who are there.
fn detach(at: &Path) -> Result<()> {
    let name = c_string(at.as_os_str())?;
    // SAFETY: a valid C string.
    check(i64::from(unsafe { libc::umount2(name.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) }))
        .map(drop)
        .map_err(BlockError::from_errno)
}

fn mode_of(at: &Path) -> Result<u32> {
    rustix::fs::stat(at).map(|st| st.st_mode).map_err(|e| BlockError::from_errno(e.raw_os_error()))
}

/// The mounted connection, and whether the helper made it.
fn mount(at: &Path, shown: &Path, o: FuseOptions) -> Result<(OwnedFd, bool)> {
    let mut mode = mode_of(at);
    if mode.as_ref().is_err_and(|e| e.errno() == libc::ENOTCONN) {
        // what a process that died has left
        let gone = detach(at).or_else(|_| helper_detach(at));
        mode = gone.and_then(|()| mode_of(at));
    }
    let mode = mode.map_err(|e| {
        let why = e.to_string();
        BlockError::from_errno(e.errno()).with_message(format!("Failed to stat '{}': {why}", shown.display()))
    })?;
    if mode & libc::S_IFMT != libc::S_IFREG {
        return Err(BlockError::invalid(format!("'{}' is not a regular file", shown.display())));
    }
    let e = match mount_now(at, o) {
        Ok(fd) => return Ok((fd, false)),
        Err(e) => e,
    };
    let mut why = e.to_string();
    if [libc::EPERM, libc::EACCES].contains(&e.errno()) {
        match helper_mount(at, o) {
            Ok(fd) => return Ok((fd, true)),
            Err(None) => why.push_str(&format!(" (and there is no {HELPER})")),
            Err(Some(text)) => why = text,
        }
    }
    let message = format!("Failed to mount FUSE file at '{}': {why}", shown.display());
    Err(BlockError::from_errno(e.errno()).with_message(message))
}

fn mount_now(at: &Path, o: FuseOptions) -> Result<OwnedFd> {
    // SAFETY: a valid C string.
    let fd =
        again(|| i64::from(unsafe { libc::open(c"/dev/fuse".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) }));
    let fd = fd.map(owned).map_err(BlockError::from_errno)?;
    let (user, group) = (process::user(), process::group());
    let other = if o.allow_other { ",allow_other" } else { "" };
    let options = format!(
        "fd={},rootmode={:o},user_id={user},group_id={group},default_permissions,max_read={}{other}",
        fd.as_raw_fd(),
        libc::S_IFREG,
        o.max_transfer
    );
    let (name, options) = (c_string(at.as_os_str())?, c_string(OsStr::new(&options))?);
    let (source, kind) = (c"liveblkd".as_ptr(), c"fuse".as_ptr());
    let flags = libc::MS_NOSUID | libc::MS_NODEV;
    // SAFETY: all are valid C strings.
    let done = unsafe { libc::mount(source, name.as_ptr(), kind, flags, options.as_ptr().cast()) };
    sys::check(i64::from(done)).map_err(BlockError::from_errno)?;
    Ok(fd)
}

/// The connection, from the helper. The error: what it said; none if it is not there.
fn helper_mount(at: &Path, o: FuseOptions) -> std::result::Result<OwnedFd, Option<String>> {
    use rustix::net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
        recvmsg, socketpair,
    };
    let text = |e: rustix::io::Errno| Some(e.to_string());
    let (ours, its) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(text)?;
    let other = if o.allow_other { ",allow_other" } else { "" };
    let options = format!("fsname=liveblkd,default_permissions,max_read={}{other}", o.max_transfer);
    // it sends the descriptor over the socket whose number this variable says: its standard input
    let mut helper = Command::new(HELPER);
    helper.args(["-o", &options, "--"]).arg(at).env("_FUSE_COMMFD", "0").stdin(Stdio::from(its));
    let out = match helper.stdout(Stdio::null()).stderr(Stdio::piped()).output() {
        Ok(out) => out,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(None),
        Err(e) => return Err(Some(e.to_string())),
    };
    if !out.status.success() {
        return Err(Some(String::from_utf8_lossy(&out.stderr).trim().to_owned()));
    }
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let (mut beside, mut byte) = (RecvAncillaryBuffer::new(&mut space), [0; 1]);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    recvmsg(ours.as_fd(), &mut [std::io::IoSliceMut::new(&mut byte)], &mut beside, flags).map_err(text)?;
    let found = beside.drain().find_map(|m| match m {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    found.ok_or_else(|| Some(format!("{HELPER} gave no descriptor")))
}

fn helper_detach(at: &Path) -> Result<()> {
    let status = Command::new(HELPER).args(["-u", "-q", "-z", "--"]).arg(at).stdin(Stdio::null()).status()?;
    if status.success() { Ok(()) } else { Err(BlockError::from_errno(libc::ENOTCONN)) }
}
