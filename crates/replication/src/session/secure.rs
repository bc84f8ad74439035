//! TLS between the sides of a group: who connects proves who it is, and so does who is connected to.
//!
//! How that is done is the owner's: it gives a way to turn a stream into a protected one. What must stay true: where a way is given, not one
//! byte is taken from or sent to a peer that did not go it, and nobody waits longer for it than for a dead peer.

use block::Io;
use env::Stream;
use std::fmt;
use std::rc::Rc;

/// Protects a new connection to the host of that name, or without one to whoever holds the right certificate.
pub type Connect = Rc<dyn Fn(Rc<dyn Stream>, Option<String>) -> Io<'static, Rc<dyn Stream>>>;
/// Protects a new connection from somebody.
pub type Accept = Rc<dyn Fn(Rc<dyn Stream>) -> Io<'static, Rc<dyn Stream>>>;

/// The ways of a group, and what its owner calls them.
#[derive(Clone, Default)]
pub struct Secure {
    /// For connections to secondaries.
    pub connect: Option<Connect>,
    /// For connections of primaries.
    pub accept: Option<Accept>,
    /// By which the owner finds them again: names and values.
    pub named: Vec<(&'static str, String)>,
}

impl fmt::Debug for Secure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secure").field("named", &self.named).finish_non_exhaustive()
    }
}
