//! liveblkd from the outside: the built program, real sockets, real peers.
#![allow(clippy::unwrap_used)] // a test that cannot set itself up shall panic

mod backups;
mod bitmaps;
mod blkcolo;
mod chains;
mod cmdline;
mod colo;
mod common;
mod differential;
mod dirty;
mod disk;
mod etcd;
mod fuse;
mod hostile;
mod links;
mod migration;
mod mirrors;
mod record;
mod replication;
mod snapshots;
mod state;
mod tls;
mod vast;
mod verify;
mod vhost;
mod wire;
