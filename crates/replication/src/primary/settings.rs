//! What is set for a group; may change at any time.

use crate::ack::{AckLevel, Quorum};

/// What happens to the guest when too few peers are in service.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LinkPolicy {
    /// Go on alone, say so first, remember what is dirty.
    #[default]
    Degrade,
    /// Changes wait; reads are served.
    Suspend,
    /// Changes fail.
    IoError,
}

impl LinkPolicy {
    /// All, in the order of their numbers on the wire.
    pub const ALL: [LinkPolicy; 3] = [LinkPolicy::Degrade, LinkPolicy::Suspend, LinkPolicy::IoError];

    /// As in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            LinkPolicy::Degrade => "degrade",
            LinkPolicy::Suspend => "suspend",
            LinkPolicy::IoError => "io-error",
        }
    }

    /// From QMP.
    pub fn from_name(name: &str) -> Option<LinkPolicy> {
        LinkPolicy::ALL.into_iter().find(|l| l.name() == name)
    }
}

/// What is set for a group; may change at any time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// When a write is done.
    pub write_level: AckLevel,
    /// When a flush (and a write with FUA) is done.
    pub flush_level: AckLevel,
    /// Whose word is needed.
    pub quorum: Quorum,
    /// When too few are there.
    pub policy: LinkPolicy,
    /// Checkpoints are an external manager's: none is made without its word, and it decides about those that are prepared.
    pub external_decision: bool,
}

impl Default for Config {
    /// Rule A1: a write has left this machine, a flush is durable on both.
    fn default() -> Config {
        Config {
            write_level: AckLevel::RemoteReceived,
            flush_level: AckLevel::RemoteDurable,
            quorum: Quorum::Any(1),
            policy: LinkPolicy::Degrade,
            external_decision: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::LinkPolicy;

    #[test]
    fn names_go_both_ways() {
        LinkPolicy::ALL.into_iter().for_each(|p| assert_eq!(LinkPolicy::from_name(p.name()), Some(p)));
    }
}
