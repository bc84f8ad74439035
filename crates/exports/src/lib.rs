//! Exports: nodes offered to clients outside: over NBD, to virtual machines over vhost-user-blk, to programs as a file (FUSE).
//!
//! The [`ExportRegistry`] knows all exports and the one NBD server of the process; `control` turns QMP commands into calls
//! of it. Everything runs on the home thread of the disks. What must stay true: an export holds its node by an edge like
//! any other user, so the graph may change under running clients; no byte of a client makes this crate panic.
#![forbid(unsafe_code)]

mod export;
mod fuse;
mod nbd_server;
mod registry;
mod vhost_user_blk;

pub use export::{Export, ExportInfo, ExportedBitmap, MAX_EXPORTED_BITMAPS, NbdOptions};
pub use fuse::{AllowOther, FuseExportOptions};
pub use nbd_server::{
    Authorize, DEFAULT_HANDSHAKE_SECONDS, DEFAULT_MAX_CONNECTIONS, ServerOptions, ServerTls,
};
pub use registry::{DeleteMode, ExportRegistry};
#[cfg(feature = "testing")]
pub use vhost_user_blk::testing;
pub use vhost_user_blk::{DEFAULT_BLOCK_SIZE, VhostUserBlkOptions};
