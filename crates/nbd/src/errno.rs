//! Errors on the wire and errors of the block layer.

use crate::proto::wire_error::*;
use block::BlockError;

/// The wire number for an error. What the protocol has no number for is an I/O error.
pub fn error_to_wire(e: &BlockError) -> u32 {
    match e.errno() {
        BlockError::EPERM | BlockError::EROFS | BlockError::EACCES => PERM,
        BlockError::EIO => IO,
        BlockError::ENOMEM => NOMEM,
        BlockError::ENOSPC | BlockError::EDQUOT | BlockError::EFBIG => NOSPC,
        BlockError::EOVERFLOW => OVERFLOW,
        BlockError::ENOTSUP | BlockError::ENOSYS => NOTSUP,
        BlockError::ESHUTDOWN => SHUTDOWN,
        BlockError::EINVAL => INVAL,
        // A backend that is gone, hangs or breaks its protocol is an I/O error to the client, not its own mistake.
        _ => IO,
    }
}

/// The error for a wire number; `message` is the server's text, if it sent one.
pub fn error_from_wire(wire: u32, message: &str) -> BlockError {
    let errno = match wire {
        PERM => BlockError::EPERM,
        IO => BlockError::EIO,
        NOMEM => BlockError::ENOMEM,
        NOSPC => BlockError::ENOSPC,
        OVERFLOW => BlockError::EOVERFLOW,
        NOTSUP => BlockError::ENOTSUP,
        SHUTDOWN => BlockError::ESHUTDOWN,
        // numbers outside the protocol: servers must not send them, clients take them for EINVAL
        _ => BlockError::EINVAL,
    };
    let e = BlockError::from_errno(errno);
    if message.is_empty() { e } else { e.context(format_args!("NBD server says '{message}'")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wire_error_survives_the_round_trip() {
        for w in [PERM, IO, NOMEM, INVAL, NOSPC, OVERFLOW, NOTSUP, SHUTDOWN] {
            assert_eq!(error_to_wire(&error_from_wire(w, "")), w);
        }
        assert_eq!(error_from_wire(9999, "").errno(), BlockError::EINVAL);
    }

    #[test]
    fn host_errors_become_their_nearest() {
        let wire = |n| error_to_wire(&BlockError::from_errno(n));
        assert_eq!(wire(BlockError::EROFS), PERM);
        assert_eq!(wire(BlockError::EDQUOT), NOSPC);
        assert_eq!(wire(BlockError::EFBIG), NOSPC);
        assert_eq!(wire(BlockError::ETIMEDOUT), IO);
        assert_eq!(wire(BlockError::ENOTCONN), IO);
    }
}
