//! liveblkd from the outside: the built program, real sockets, real peers.

mod cmdline;
mod common;
mod wire;
