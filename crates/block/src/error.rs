//! One error type: what kind, the errno a client sees, a sentence for a human, and the cause below.

use std::fmt;

/// Shorthand for results of block operations.
pub type Result<T, E = BlockError> = std::result::Result<T, E>;

/// What callers may want to match on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// The storage below reported an error (the errno says which).
    Io,
    /// No space is left below (ENOSPC, EDQUOT).
    NoSpace,
    /// A write to something that is read-only, or a missing permission on an edge.
    ReadOnly,
    /// The host refused access.
    Permission,
    /// A file, node, export or bitmap that does not exist.
    NotFound,
    /// Something with that name or lock exists already, or it is in use.
    Busy,
    /// Arguments or options that make no sense.
    Invalid,
    /// A request outside the disk.
    OutOfRange,
    /// Not implemented by this driver, file system or peer.
    Unsupported,
    /// Metadata of an image, or bytes of a peer, that break their specification.
    Corrupt,
    /// The peer went away.
    Disconnected,
    /// The operation was called off.
    Cancelled,
    /// The daemon ends before it can say anything: a client that comes to its successor is to ask again there.
    Ending,
}

/// An error with its context. Cheap to move (one pointer).
#[derive(Clone)]
pub struct BlockError(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: Kind,
    errno: i32,
    message: String,
    hint: Option<String>,
}

// Linux errno values (asm-generic); kept here so that pure crates need no libc.
macro_rules! errnos { ($($name:ident = $n:literal, $text:literal;)*) => {
    impl BlockError { $(#[doc = concat!("Linux errno: ", $text)] pub const $name: i32 = $n;)* }
    /// The C library's text for an errno, as QMP clients know it from a job's `error` member.
    pub fn strerror(errno: i32) -> String {
        match errno { $($n => $text.to_owned(),)* n => format!("Unknown error {n}") }
    }
} }
errnos! {
    EPERM = 1, "Operation not permitted";
    ENOENT = 2, "No such file or directory";
    EINTR = 4, "Interrupted system call";
    EIO = 5, "Input/output error";
    ENXIO = 6, "No such device or address";
    EBADF = 9, "Bad file descriptor";
    EAGAIN = 11, "Resource temporarily unavailable";
    ENOMEM = 12, "Cannot allocate memory";
    EACCES = 13, "Permission denied";
    EBUSY = 16, "Device or resource busy";
    EEXIST = 17, "File exists";
    ENODEV = 19, "No such device";
    ENOTDIR = 20, "Not a directory";
    EISDIR = 21, "Is a directory";
    EINVAL = 22, "Invalid argument";
    EMFILE = 24, "Too many open files";
    ENOTTY = 25, "Inappropriate ioctl for device";
    EFBIG = 27, "File too large";
    ENOSPC = 28, "No space left on device";
    EROFS = 30, "Read-only file system";
    EPIPE = 32, "Broken pipe";
    ERANGE = 34, "Numerical result out of range";
    ENAMETOOLONG = 36, "File name too long";
    ENOSYS = 38, "Function not implemented";
    ELOOP = 40, "Too many levels of symbolic links";
    EPROTO = 71, "Protocol error";
    EOVERFLOW = 75, "Value too large for defined data type";
    EMSGSIZE = 90, "Message too long";
    ENOTSUP = 95, "Operation not supported";
    EADDRINUSE = 98, "Address already in use";
    EADDRNOTAVAIL = 99, "Cannot assign requested address";
    ENETUNREACH = 101, "Network is unreachable";
    ECONNRESET = 104, "Connection reset by peer";
    ENOTCONN = 107, "Transport endpoint is not connected";
    ESHUTDOWN = 108, "Cannot send after transport endpoint shutdown";
    ETIMEDOUT = 110, "Connection timed out";
    ECONNREFUSED = 111, "Connection refused";
    EHOSTUNREACH = 113, "No route to host";
    EDQUOT = 122, "Disk quota exceeded";
    ENOMEDIUM = 123, "No medium found";
    ECANCELED = 125, "Operation canceled";
}

impl BlockError {
    /// An error of `kind` with the errno that fits it and a sentence saying what was wrong and where.
    pub fn new(kind: Kind, message: impl Into<String>) -> BlockError {
        let errno = match kind {
            Kind::Io => Self::EIO,
            Kind::NoSpace => Self::ENOSPC,
            Kind::ReadOnly => Self::EPERM,
            Kind::Permission => Self::EACCES,
            Kind::NotFound => Self::ENOENT,
            Kind::Busy => Self::EBUSY,
            Kind::Invalid | Kind::OutOfRange => Self::EINVAL,
            Kind::Unsupported => Self::ENOTSUP,
            Kind::Corrupt => Self::EIO,
            Kind::Disconnected => Self::ENOTCONN,
            Kind::Cancelled => Self::ECANCELED,
            Kind::Ending => Self::ESHUTDOWN,
        };
        BlockError(Box::new(Inner { kind, errno, message: message.into(), hint: None }))
    }

    /// An error from the host. The message is the C library's text until [`BlockError::context`] adds to it.
    pub fn from_errno(errno: i32) -> BlockError {
        let kind = match errno {
            Self::ENOSPC | Self::EDQUOT => Kind::NoSpace,
            Self::EROFS => Kind::ReadOnly,
            Self::EPERM | Self::EACCES => Kind::Permission,
            Self::ENOENT => Kind::NotFound,
            Self::EBUSY | Self::EEXIST | Self::EADDRINUSE => Kind::Busy,
            Self::EINVAL => Kind::Invalid,
            Self::ENOTSUP | Self::ENOSYS => Kind::Unsupported,
            Self::ECANCELED => Kind::Cancelled,
            Self::EPIPE | Self::ECONNRESET | Self::ENOTCONN | Self::ESHUTDOWN | Self::ECONNREFUSED => {
                Kind::Disconnected
            }
            _ => Kind::Io,
        };
        BlockError(Box::new(Inner { kind, errno, message: strerror(errno), hint: None }))
    }

    /// Bad arguments.
    pub fn invalid(message: impl Into<String>) -> BlockError {
        Self::new(Kind::Invalid, message)
    }

    /// Metadata or wire bytes that break their specification.
    pub fn corrupt(message: impl Into<String>) -> BlockError {
        Self::new(Kind::Corrupt, message)
    }

    /// Something this driver or peer cannot do.
    pub fn unsupported(message: impl Into<String>) -> BlockError {
        Self::new(Kind::Unsupported, message)
    }

    /// The same error with `what: ` before its sentence.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> BlockError {
        self.0.message = format!("{what}: {}", self.0.message);
        self
    }

    /// The same error with another sentence (kind and errno stay).
    #[must_use]
    pub fn with_message(mut self, message: impl Into<String>) -> BlockError {
        self.0.message = message.into();
        self
    }

    /// The same error shown to clients as `errno`.
    #[must_use]
    pub fn with_errno(mut self, errno: i32) -> BlockError {
        self.0.errno = errno;
        self
    }

    /// The same error with a sentence that says what to do next.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> BlockError {
        self.0.hint = Some(hint.into());
        self
    }

    /// What kind of error.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The Linux errno a client or guest is shown.
    pub fn errno(&self) -> i32 {
        self.0.errno
    }

    /// The sentence.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// What to do next, if known.
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}(errno {}): {}", self.0.kind, self.0.errno, self.0.message)
    }
}

impl std::error::Error for BlockError {}

impl From<std::io::Error> for BlockError {
    fn from(e: std::io::Error) -> BlockError {
        match e.raw_os_error() {
            Some(n) => BlockError::from_errno(n),
            None => BlockError::new(Kind::Io, e.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_keeps_kind_and_errno() {
        let e = BlockError::from_errno(BlockError::ENOSPC).context("write at 0");
        assert_eq!(e.kind(), Kind::NoSpace);
        assert_eq!(e.errno(), 28);
        assert_eq!(e.to_string(), "write at 0: No space left on device");
    }
}
