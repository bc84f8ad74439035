//! A reader through an overlay, and writers whose old bytes are copied into it first, in every order in which their steps can
//! come: the reader never gets new bytes in place of old ones, and nobody waits for ever.
//!
//! The race of the original discussion: the reader finds nothing in the overlay; before it reads the disk, old bytes are copied
//! and overwritten.
#![allow(clippy::unwrap_used)] // a test that cannot set itself up shall panic

use block::Span;
use graph::exclusion::Exclusion;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

const GRANULE: u64 = 4096;

/// A disk of some granules, each one number, with an overlay.
struct World {
    disk: RefCell<Vec<u8>>,
    overlay: RefCell<Vec<Option<u8>>>,
    exclusion: Rc<Exclusion>,
    excluded: bool,
    wrong: Cell<bool>,
}

/// Where a step of I/O ends: the scheduler decides who goes on.
async fn step() {
    let mut first = true;
    std::future::poll_fn(move |_| if std::mem::take(&mut first) { Poll::Pending } else { Poll::Ready(()) })
        .await;
}

fn span(from: u64, granules: u64) -> Span {
    Span::new(from * GRANULE, granules * GRANULE)
}

async fn read(w: Rc<World>, from: u64, granules: u64) {
    let _inside = if w.excluded { Some(w.exclusion.begin_read(span(from, granules)).await) } else { None };
    for g in from as usize..(from + granules) as usize {
        step().await;
        let held = w.overlay.borrow()[g];
        step().await;
        // old content is 0
        let got = held.unwrap_or_else(|| w.disk.borrow()[g]);
        w.wrong.set(w.wrong.get() | (got != 0));
    }
}

async fn write(w: Rc<World>, from: u64, granules: u64, new: u8) {
    let range = from as usize..(from + granules) as usize;
    {
        let _alone = if w.excluded { Some(w.exclusion.begin_copy(span(from, granules)).await) } else { None };
        for g in range.clone() {
            if w.overlay.borrow()[g].is_none() {
                step().await;
                let old = w.disk.borrow()[g];
                step().await;
                w.overlay.borrow_mut()[g] = Some(old);
            }
        }
    }
    step().await;
    for g in range {
        w.disk.borrow_mut()[g] = new;
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Runs the tasks in the order that `choices` says, then first come first served; who could have gone on at each step, and
/// whether somebody read what is wrong. Panics where nobody can go on.
fn run(make: &dyn Fn(&Rc<World>) -> Vec<Task>, choices: &[usize], excluded: bool) -> (Vec<usize>, bool) {
    let w = Rc::new(World {
        disk: RefCell::new(vec![0; 4]),
        overlay: RefCell::new(vec![None; 4]),
        exclusion: Exclusion::new(GRANULE),
        excluded,
        wrong: Cell::new(false),
    });
    let mut tasks: Vec<Option<Task>> = make(&w).into_iter().map(Some).collect();
    let (mut taken, mut idle) = (Vec::new(), 0);
    while tasks.iter().any(Option::is_some) {
        let live: Vec<usize> = (0..tasks.len()).filter(|i| tasks[*i].is_some()).collect();
        let choice = choices.get(taken.len()).copied().unwrap_or(taken.len() % live.len());
        taken.push(live.len());
        let task = live[choice % live.len()];
        let ready = tasks[task].as_mut().unwrap().as_mut().poll(&mut Context::from_waker(Waker::noop()));
        idle += 1;
        if ready.is_ready() {
            tasks[task] = None;
            idle = 0;
        }
        // no task takes more than a few dozen steps
        assert!(idle < 400, "nobody ends: a deadlock after {choices:?}");
    }
    assert_eq!(w.exclusion.claims(), 0, "somebody left something behind");
    (taken, w.wrong.get())
}

/// All orders of the first `depth` steps.
fn all(make: &dyn Fn(&Rc<World>) -> Vec<Task>, depth: usize, excluded: bool) -> (usize, usize) {
    let (mut runs, mut wrong) = (0, 0);
    let mut choices: Vec<usize> = vec![0; depth];
    loop {
        let (width, bad) = run(make, &choices, excluded);
        runs += 1;
        wrong += usize::from(bad);
        // the next order, as a number counts up
        let Some(at) = (0..depth.min(width.len())).rev().find(|i| choices[*i] + 1 < width[*i]) else {
            return (runs, wrong);
        };
        choices[at] += 1;
        choices[at + 1..].fill(0);
    }
}

fn one_of_each(w: &Rc<World>) -> Vec<Task> {
    vec![Box::pin(read(w.clone(), 0, 1)), Box::pin(write(w.clone(), 0, 1, 7))]
}

fn crossing(w: &Rc<World>) -> Vec<Task> {
    vec![
        Box::pin(read(w.clone(), 0, 2)),
        Box::pin(write(w.clone(), 1, 2, 7)),
        Box::pin(read(w.clone(), 2, 1)),
        Box::pin(write(w.clone(), 0, 1, 9)),
    ]
}

#[test]
fn a_reader_never_gets_new_bytes_in_place_of_old() {
    let (runs, wrong) = all(&one_of_each, 12, true);
    assert!(runs > 50, "{runs}");
    assert_eq!(wrong, 0);
    let (_, wrong) = all(&one_of_each, 12, false);
    assert!(wrong > 0, "without the exclusion the race is there, or this test shows nothing");
}

#[test]
fn crossing_readers_and_copies_never_wait_for_each_other() {
    let (runs, wrong) = all(&crossing, 8, true);
    assert!(runs > 10_000, "{runs}");
    assert_eq!(wrong, 0);
}
