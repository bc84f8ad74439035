//! What a guest's write brings: bytes, or the file that holds them.
//!
//! What must stay true: bytes in a file are good only as long as the request that brought them is there (then nobody gives
//! their place to others); work that may outlive the request takes them into memory first.

use block::{Data, Result};
use graph::HostBytes;

/// The bytes of a write.
pub(crate) enum Payload {
    /// Themselves.
    Bytes(Data),
    /// Where they lie.
    Host(HostBytes),
}

impl Payload {
    /// How many.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Payload::Bytes(d) => d.len() as u64,
            Payload::Host(h) => h.at.len,
        }
    }

    /// `len` of them from number `from` on.
    pub(crate) fn slice(&self, from: u64, len: u64) -> Payload {
        match self {
            Payload::Bytes(d) => Payload::Bytes(d.slice(from as usize, len as usize)),
            Payload::Host(h) => Payload::Host(h.slice(from, len)),
        }
    }

    /// In memory.
    pub(crate) async fn bytes(self) -> Result<Data> {
        match self {
            Payload::Bytes(d) => Ok(d),
            Payload::Host(h) => h.file.read(h.at).await,
        }
    }
}
