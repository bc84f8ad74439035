//! The state machines brought to the outside: connections, disks, clocks.
//!
//! What can happen: peers that are slow, frozen, gone, or come back while their old connection is not known to be dead; a disk that
//! fails; a daemon that ends. What must stay true: no wait here has no end but the one the policy `suspend` asks for; frames
//! leave in the order in which the state machine gave their numbers; whatever a secondary is told to do is done in the order
//! in which it was told.

mod activity;
mod clone;
mod door;
mod former;
mod front;
mod group;
mod link;
mod primary;
mod secondary;
mod secure;

pub use activity::Activity;
pub use clone::CloneNode;
pub use former::Former;
pub(crate) use former::ranges;
pub use front::{Front, Mode};
pub use group::{Acting, Group, NewGroup, Remembered, SwitchedOver, Test};
pub use primary::{CheckpointDone, PeerFacts, Prepared, PrimaryGroup, Verdict, Verify};
pub use secondary::{Failover, SecondaryGroup, TakeOver};
pub use secure::{Accept, Connect, Secure};

use std::time::Duration;

/// A peer that says nothing for so long is taken for dead. Pings go out three times as often.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(6);
/// Bytes asked for in one receive.
const RECV: usize = 256 * 1024;

/// What a group tells its manager: the name of a QMP event, and its members.
pub type Tell = std::rc::Rc<dyn Fn(&'static str, Vec<(&'static str, Fact)>)>;

/// A member of an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Fact {
    /// A string.
    Text(String),
    /// A number.
    Number(u64),
}

impl From<String> for Fact {
    fn from(s: String) -> Fact {
        Fact::Text(s)
    }
}
impl From<&str> for Fact {
    fn from(s: &str) -> Fact {
        Fact::Text(s.to_owned())
    }
}
impl From<u64> for Fact {
    fn from(n: u64) -> Fact {
        Fact::Number(n)
    }
}
