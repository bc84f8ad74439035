//! The harness on trial: an honest disk raises no alarm, every lying one does.
#![allow(clippy::unwrap_used)] // a test says by panicking

use sim::runner::{Options, run};
use sim::scenario::storage::{LIES, honest, lying};

#[test]
fn an_honest_disk_is_believed() {
    let report = run(honest, 0..600, &Options { jobs: 2, twice_every: 10, ..Options::default() });
    println!("{report}");
    assert!(report.failures.is_empty(), "{:#?}", report.failures);
    assert!(report.counts["lives cut short"] > 50);
    assert!(report.counts["faults"] > 50);
}

#[test]
fn every_lie_is_found() {
    for lie in LIES {
        let found = (0..1000).find(|seed| lying(lie, *seed).violation.is_some());
        println!("{lie:?}: seed {found:?}: {:?}", found.and_then(|s| lying(lie, s).violation));
        assert!(found.is_some(), "{lie:?} was not found within 1,000 seeds");
    }
}
