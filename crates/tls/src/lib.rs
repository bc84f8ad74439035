//! TLS over the streams of `env`, for NBD in both roles: certificates from a directory as QEMU lays it out, the handshake,
//! and a [`TlsStream`] that is used like any other stream.
//!
//! The protocol and its cryptography are `rustls` with `ring`. What is here: loading and checking what the user
//! configured ([`Credentials`]), who the peer has to be ([`verify`]), and moving bytes between the library and a stream
//! without blocking ([`stream`]).
//!
//! What must stay true: a peer that does not prove who it is gets nothing and gives nothing; a missing or unreadable file
//! is an error when the credentials are made, not when the first client comes; what came in the clear before the handshake
//! is never taken for something the peer said under protection (the callers see to that: they begin with an empty inbox).
#![forbid(unsafe_code)]

mod credentials;
pub mod stream;
pub mod verify;

pub use credentials::{Credentials, Endpoint, X509Options};
pub use stream::TlsStream;
