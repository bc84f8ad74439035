//! A primary's record on a file that fails: whatever write is torn, and however often, the record before it can still be read.
#![allow(missing_docs, clippy::unwrap_used)]

use block::{BlockError, Span};
use env::{Existing, OpenMode};
use replication::history::History;
use replication::session::Activity;
use replication::{Generation, GroupId};
use sim::{Fault, Op, Rule, World};
use std::path::Path;

/// Length of the disk, and of the ranges written to it: enough of them that a slot has several sectors.
const LEN: u64 = 1 << 40;
const MARKED: u64 = 200;

/// Where write number `n` goes; no two are neighbours.
fn place(n: u64) -> Span {
    Span::new(n << 24, 4096)
}

#[test]
fn a_torn_slot_leaves_the_one_before_it_however_often_it_is_tried_again() {
    for seed in 1..30 {
        let outcome = World::play(seed, false, |w| async move {
            let (env, _process) = w.start();
            let mode = OpenMode { write: true, existing: Existing::CreateNew, ..OpenMode::default() };
            let file = env.open(Path::new("/record"), mode).await.unwrap();
            let group = GroupId::of_name("g");
            let record =
                Activity::create(file.clone(), group, &[LEN], History::begin(Generation(1)), Some(&[]))
                    .await
                    .unwrap();
            for n in 0..MARKED {
                record.cover(0, place(n)).await.unwrap();
            }
            for n in 0..4 {
                w.host().fault(Rule::once("/record", Op::Write, Fault::Torn(BlockError::EIO)));
                assert!(record.cover(0, place(MARKED + n)).await.is_err());
            }
            let read = Activity::open(file, group, &[LEN]).await.unwrap().expect("one slot is whole");
            for n in 0..MARKED {
                assert!(read.covers(0, place(n)), "write {n} is forgotten");
            }
        });
        assert_eq!(outcome.violation, None, "seed {seed}");
    }
}
