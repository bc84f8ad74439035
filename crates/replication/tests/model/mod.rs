//! A group of one small disk, and how its owner is set up.

use block::Span;
use replication::ack::{AckLevel, Quorum};
use replication::dirty::GRANULE;
use replication::primary::{Config, LinkPolicy};
use replication::wire::{HandOver, VolumeInfo};

/// The longest that a disk becomes, in blocks.
pub(crate) const BLOCKS: usize = 5;

pub(crate) fn volumes(blocks: usize) -> Vec<VolumeInfo> {
    vec![VolumeInfo { len: blocks as u64 * GRANULE }]
}

pub(crate) fn config() -> Config {
    Config { write_level: AckLevel::RemoteDurable, quorum: Quorum::Any(1), ..Config::default() }
}

pub(crate) fn block(at: usize) -> Span {
    Span::new(at as u64 * GRANULE, GRANULE)
}

pub(crate) fn hand() -> HandOver {
    HandOver {
        name: "a".into(),
        address: "a:1".into(),
        write_level: AckLevel::Local,
        flush_level: AckLevel::RemoteDurable,
        min_acks: 1,
        policy: LinkPolicy::Degrade,
        interval_ms: 0,
        timeout_ms: 1000,
    }
}
