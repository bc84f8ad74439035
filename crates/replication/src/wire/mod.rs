//! The native wire between two daemons: frames of 64 bytes and a payload, bytes in and bytes out, no I/O here.
//!
//! What can happen: a peer sends anything at all. What must stay true: no length is believed before its bound and the header's
//! checksum were checked; nothing is allocated for bytes that have not arrived; whatever is wrong ends the session with a sentence
//! that says what. The layout is reference/replication.md 2.2, all numbers little-endian:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 4 | magic `lbR1` |
//! | 4 | 1 | version, 3 |
//! | 5 | 1 | type |
//! | 6 | 2 | flags |
//! | 8 | 4 | CRC32C of the header with this field zero |
//! | 12 | 4 | payload length |
//! | 16 | 4 | CRC32C of the payload |
//! | 20 | 8 | generation |
//! | 28 | 8 | sequence |
//! | 36 | 8 | epoch |
//! | 44 | 2 | volume |
//! | 46 | 2 | reserved, 0 |
//! | 48 | 8 | offset |
//! | 56 | 4 | length of the range in the volume |
//! | 60 | 4 | reserved, 0 |

mod body;
mod decoder;
mod frame;
mod message;

pub use decoder::Decoder;
pub use frame::{Frame, HEADER, Kind, MAX_PAYLOAD, crc_of};
pub use message::{
    Ack, Body, Doubt, HandOver, Hello, MAX_DOUBT, MAX_TEXT, MAX_VOLUMES, Reject, VolumeInfo, Welcome,
};
