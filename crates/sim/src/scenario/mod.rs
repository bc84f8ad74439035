//! What is played in a simulated world, and watched.

pub mod again;
mod again_work;
pub mod chain;
pub mod live;
pub mod nth;
mod nth_filters;
mod nth_stacks;
mod nth_table;
pub mod plan;
pub mod replica;
pub mod steps;
mod steps_table;
pub mod storage;

use crate::runner::Scenario;

/// All scenarios, by the names that regressions are kept under.
pub const SCENARIOS: [(&str, Scenario); 15] = [
    ("storage", storage::honest),
    ("serve", live::served),
    ("live", live::whole_daemon),
    ("link", live::link),
    ("chain", chain::chain),
    ("remote", chain::remote),
    ("slow", chain::slow),
    ("elsewhere", chain::elsewhere),
    ("again", again::again),
    ("instants", again::instants),
    ("nth", nth::case),
    ("replica", replica::replica),
    ("turns", replica::turns),
    ("brief", replica::brief),
    ("steps", steps::case),
];

/// The scenario of that name.
pub fn find(name: &str) -> Option<(&'static str, Scenario)> {
    SCENARIOS.into_iter().find(|s| s.0 == name)
}
