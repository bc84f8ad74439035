//! The QMP control protocol: sessions, dispatch, commands, events.
//!
//! What can happen: several clients send commands at once, clients vanish, the daemon is told to end. What must stay true:
//! this crate checks arguments and calls; graph, jobs and exports do the work and decide. One command is one struct under
//! `commands/`. The whole daemon is a [`Daemon`] value over an [`env::Env`], so the simulator runs it as it is.
#![forbid(unsafe_code)]

mod address;
mod blkcolo;
mod blockdev;
mod blockdev_backup;
mod blockdev_filters;
mod chardev;
mod colo;
mod commands;
mod daemon;
mod error;
mod events;
mod info;
mod jobinfo;
mod object;
mod outbox;
mod record;
mod session;
mod state;

pub use chardev::ChardevSpec;
pub use daemon::Daemon;
pub use error::{Class, QmpError, Reply};
pub use object::object_types;
pub use open::Geometry;
pub use state::StartOption;
