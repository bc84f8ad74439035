//! The NBD protocol without I/O: bytes in, bytes out, both roles.
//!
//! A connection has two phases. In the *handshake* client and server exchange options ([`ServerHandshake`],
//! [`ClientHandshake`]); in the *transmission* requests flow one way ([`RequestParser`], [`encode_request`]) and
//! replies the other ([`ReplyWriter`], [`ReplyParser`]). All of these take bytes from an [`Inbox`], whatever pieces they
//! arrived in, and put bytes into an [`Outbox`], ready to be sent as one gathered rope.
//!
//! What must stay true:
//! * No byte that a peer sends makes this crate panic, loop, or hold more memory than the limits in [`proto`] allow.
//!   Every length is checked before anything of that length is waited for.
//! * How a byte stream is cut into pieces never changes what comes out.
//! * Payload is never copied: it stays a slice of the buffer it was received in (tiny pieces excepted, see [`Inbox`]).
//!
//! Source of the format: the NBD protocol, `proto.md` in the NetworkBlockDevice project.
#![forbid(unsafe_code)]

mod assembly;
mod client;
mod errno;
mod inbox;
pub mod leaf;
mod options;
mod outbox;
pub mod proto;
mod reply_parser;
mod reply_writer;
mod request;
mod server;

pub use assembly::ReadAssembly;
pub use client::{ClientHandshake, ClientStep, ClientWants, Negotiated};
pub use errno::{error_from_wire, error_to_wire};
pub use inbox::Inbox;
pub use outbox::Outbox;
pub use proto::{Cmd, Mode};
pub use reply_parser::{Answer, Expected, Reply, ReplyParser};
pub use reply_writer::{ReplyWriter, StatusExtent};
pub use request::{ParseError, Request, RequestParser, encode_announced, encode_request};
pub use server::{Agreed, Catalog, ExportFacts, HandshakeStep, Protection, ServerHandshake};
