//! What a daemon does to its own process: detach, pid file, limits.
//!
//! What must stay true: [`daemonize`] runs before any thread or executor exists (after `fork` only the calling thread goes on).

use super::sys::{again, check, owned};
use block::{BlockError, ErrorKind, Result};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A file-size limit (RLIMIT_FSIZE) shall be an error of the write, not the end of the process.
pub(super) fn ignore_file_size_signal() {
    // SAFETY: ignoring a signal installs no code.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// This process's number.
pub fn id() -> u32 {
    std::process::id()
}

/// The user that files of ours belong to.
pub fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// The group that files of ours belong to.
pub fn group() -> u32 {
    rustix::process::getegid().as_raw()
}

/// Sets the permissions that new files do not get, and returns the old ones.
pub fn umask(mask: u32) -> u32 {
    // SAFETY: no pointers; cannot fail.
    unsafe { libc::umask(mask as libc::mode_t) }
}

/// Raises the limit of open descriptors as far as allowed; the limit now.
pub fn raise_descriptor_limit() -> Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is valid.
    check(i64::from(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }))
        .map_err(BlockError::from_errno)?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the pointer is valid.
    check(i64::from(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }))
        .map_err(BlockError::from_errno)?;
    Ok(limit.rlim_cur)
}

/// A whole small file (a password, a certificate, a configuration): an error if it is larger than `limit` bytes.
pub fn read_file(path: &Path, limit: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        return Err(BlockError::invalid(format!("'{}' is larger than {limit} bytes", path.display())));
    }
    Ok(bytes)
}

/// Removes a file.
pub fn remove_file(path: &Path) -> Result<()> {
    Ok(std::fs::remove_file(path)?)
}

/// Makes the directory `path`, if it is not there, and lets nobody but us look into it.
///
/// # Errors
/// The host's, with the path.
pub fn private_directory(path: &Path) -> Result<()> {
    let made = || -> std::io::Result<()> {
        match std::fs::DirBuilder::new().mode(0o700).create(path) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
            Ok(()) => {
                if let Some(above) = std::path::absolute(path)?.parent() {
                    File::open(above)?.sync_all()?;
                }
            }
        }
        let directory = File::open(path)?;
        let facts = directory.metadata()?;
        if !facts.is_dir() {
            return Err(std::io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        if facts.mode() & 0o777 != 0o700 {
            directory.set_permissions(std::fs::Permissions::from_mode(0o700))?;
        }
        Ok(())
    };
    made().map_err(|e| BlockError::from(e).context(format!("directory '{}'", path.display())))
}

/// Makes durable which names the directory `path` has.
///
/// # Errors
/// The host's, with the path.
pub fn sync_directory(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|d| d.sync_all());
    synced.map_err(|e| BlockError::from(e).context(format!("directory '{}'", path.display())))
}

/// The child's end of [`daemonize`]: the parent waits until it hears from here.
pub struct Detached {
    parent: OwnedFd,
}

/// Goes into the background: two forks, a new session. The original process waits for
/// [`Detached::ready`] and then exits with status 0, or with 1 if the daemon ends first. Returns in the daemon.
///
/// # Errors
/// The host's refusal to fork; `Busy` if this process has other threads already.
pub fn daemonize() -> Result<Detached> {
    if std::fs::read_dir("/proc/self/task").is_ok_and(|d| d.count() > 1) {
        return Err(BlockError::new(ErrorKind::Busy, "cannot go into the background: threads are running"));
    }
    let mut ends = [0i32; 2];
    // SAFETY: the pointer is valid for two ints.
    check(i64::from(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }))
        .map_err(BlockError::from_errno)?;
    let (wait, tell) = (owned(i64::from(ends[0])), owned(i64::from(ends[1])));
    if fork()? {
        drop(tell);
        let mut status = [1u8];
        // SAFETY: the buffer is valid for one byte.
        let n = again(|| unsafe { libc::read(wait.as_raw_fd(), status.as_mut_ptr().cast(), 1) } as i64);
        let code = if n == Ok(1) { i32::from(status[0]) } else { 1 };
        // SAFETY: ends the process at once, without the destructors that are the daemon's business now.
        unsafe { libc::_exit(code) }
    }
    drop(wait);
    // SAFETY: no pointers. Cannot fail in a child that leads no group.
    unsafe { libc::setsid() };
    if fork()? {
        // SAFETY: as above.
        unsafe { libc::_exit(0) }
    }
    Ok(Detached { parent: tell })
}

/// `true` in the parent.
fn fork() -> Result<bool> {
    // SAFETY: the caller has checked that there is one thread only, so that the child may run any code.
    let pid = check(i64::from(unsafe { libc::fork() })).map_err(BlockError::from_errno)?;
    Ok(pid > 0)
}

impl Detached {
    /// All is set up (paths given relative to the working directory have been used): goes to the root directory, gives up
    /// the terminal, and lets the original process exit with success.
    pub fn ready(self) -> Result<()> {
        std::env::set_current_dir("/")?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        for fd in 0..3 {
            // SAFETY: no pointers; both descriptors are open.
            check(i64::from(unsafe { libc::dup2(null.as_raw_fd(), fd) })).map_err(BlockError::from_errno)?;
        }
        let ok = [0u8];
        // SAFETY: the buffer is valid for one byte. If the parent is gone, nobody needs to know.
        let _ = again(|| unsafe { libc::write(self.parent.as_raw_fd(), ok.as_ptr().cast(), 1) } as i64);
        Ok(())
    }
}

/// A file with this process's number, locked as long as this exists and removed after.
pub struct PidFile {
    path: PathBuf,
    file: File,
}

impl PidFile {
    /// Writes the file. `Busy` if another process holds it.
    pub fn create(path: &Path) -> Result<PidFile> {
        let path = std::path::absolute(path)?;
        loop {
            let mut file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o644)
                .open(&path)?;
            lock_whole(&file)?;
            // whoever held the lock before us may have removed the file just now
            let ours = file.metadata()?.ino();
            if !std::fs::metadata(&path).is_ok_and(|m| m.ino() == ours) {
                continue;
            }
            file.set_len(0)?;
            file.write_all(format!("{}\n", id()).as_bytes())?;
            return Ok(PidFile { path, file });
        }
    }
}

/// A traditional lock, so that other programs see who has it; it belongs to the process.
fn lock_whole(file: &File) -> Result<()> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the pointer is valid for the call.
    match again(|| i64::from(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const lock) })) {
        Ok(_) => Ok(()),
        Err(libc::EAGAIN | libc::EACCES) => {
            Err(BlockError::new(ErrorKind::Busy, "another process holds it").with_errno(libc::EAGAIN))
        }
        Err(e) => Err(BlockError::from_errno(e)),
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let ours = self.file.metadata().map(|m| m.ino()).ok();
        if ours.is_some() && std::fs::metadata(&self.path).map(|m| m.ino()).ok() == ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
