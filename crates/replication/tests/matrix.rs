//! The crash matrix of the specification (reference/replication.md 1.14), row by row. Where a row says that a host crashes in the middle of
//! something, that something is carried out once for each of its I/Os, with the power failing at that I/O: nothing after it
//! happens, and of what was not durable any part survives.
//!
//! A row about a lease service is tried as far as there is one: what a secondary does between a grant and its intent.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use block::{BlockError, Data, Span};
use common::{commit, prepare};
use env::{Env, Existing, OpenMode};
use replication::ack::{AckLevel, Quorum};
use replication::bugs::{Bug, plant};
use replication::dirty::{Dirty, GRANULE};
use replication::history::History;
use replication::primary::{Config, Input, Output, Primary, Standing};
use replication::session::Activity;
use replication::store::{Change, Engine, FileVolume, NewStore, Role, Store, Volume};
use replication::wire::VolumeInfo;
use replication::{Epoch, Generation, GroupId};
use sim::{Fault, Host, Image, Op, Rule, World};
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

const VOLUMES: usize = 2;
const GRANULES: usize = 8;
/// More I/Os than any step here has.
const MOST: u64 = 200;
/// Draws of what survives a power loss, at each I/O.
const DRAWS: u64 = 3;

/// A byte for each granule of each volume.
type View = [[u8; GRANULES]; VOLUMES];
type Going<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// The state in which each row begins: checkpoint 1 holds ones, an own write of nines that was flushed lies over its last granule, and the
/// primary has written twos to the first four granules since.
const CHECKPOINT_1: View = [[1, 1, 1, 1, 1, 1, 1, 9]; VOLUMES];
const CHECKPOINT_2: View = [[2, 2, 2, 2, 1, 1, 1, 1]; VOLUMES];

fn group() -> GroupId {
    GroupId::of_name("g")
}

fn history(epoch: u64) -> History {
    let mut h = History::begin(Generation(1));
    h.advance(Epoch(epoch));
    h
}

fn change(volume: usize, granule: usize, fill: u8) -> Change {
    let at = Span::new(granule as u64 * GRANULE, GRANULE);
    Change { volume: volume as u16, at, data: Data::from(vec![fill; GRANULE as usize]) }
}

fn all(fill: u8, granules: std::ops::Range<usize>) -> Vec<Change> {
    (0..VOLUMES).flat_map(|v| granules.clone().map(move |g| change(v, g, fill))).collect()
}

async fn open(env: &Env) -> Rc<Store> {
    let mode = OpenMode { write: true, ..OpenMode::default() };
    let mut volumes: Vec<Rc<dyn Volume>> = Vec::new();
    for v in 0..VOLUMES {
        volumes.push(Rc::new(FileVolume(env.open(Path::new(&format!("/disk{v}")), mode).await.unwrap())));
    }
    let file = env.open(Path::new("/store"), mode).await.unwrap();
    Store::open(env, file, volumes).await.unwrap()
}

async fn seen(store: &Store) -> View {
    let mut out = View::default();
    for (v, granules) in out.iter_mut().enumerate() {
        for (g, b) in granules.iter_mut().enumerate() {
            let data = store.read(v as u16, Span::new(g as u64 * GRANULE, GRANULE)).await.unwrap().to_vec();
            assert!(data.iter().all(|x| *x == data[0]), "granule {g} of {v} is torn");
            *b = data[0];
        }
    }
    out
}

fn raw(host: &Host) -> View {
    let mut out = View::default();
    for (v, granules) in out.iter_mut().enumerate() {
        let image = host.image(&format!("/disk{v}")).unwrap();
        for (g, b) in granules.iter_mut().enumerate() {
            *b = image.read(Span::new(g as u64 * GRANULE, 1))[0];
        }
    }
    out
}

/// Runs `step` until it ends or its I/O number `at` comes, at which the world stands still; whether it ended.
async fn until_io(w: &World, at: u64, step: Going<'_>) -> bool {
    w.host().fault(Rule { path: String::new(), op: None, skip: at, times: u64::MAX, fault: Fault::Hang });
    let (env, _watch) = w.start();
    env.timeout(Duration::from_secs(5), step).await.is_some()
}

/// What is to be carried out in the middle of which the host crashes.
type Step = for<'a> fn(&'a Rc<Store>) -> Going<'a>;
/// What must be afterwards, told whether the step had ended.
type Check = for<'a> fn(&'a World, &'a Rc<Store>, bool) -> Going<'a>;

/// One row about a secondary: `first` without a crash, `step` with one at each of its I/Os, `check` after the restart.
fn secondary_row(engine: Engine, first: Step, step: Step, check: Check) -> u64 {
    for at in 0..MOST {
        let ended = Rc::new(Cell::new(false));
        for draw in 0..DRAWS {
            let told = ended.clone();
            let outcome = World::play(at * DRAWS + draw, false, |w| async move {
                (0..VOLUMES).for_each(|v| {
                    let zeroes = vec![0; GRANULES * GRANULE as usize];
                    w.host().install(&format!("/disk{v}"), Image::from_bytes(&zeroes));
                });
                w.host().install("/store", Image::from_bytes(&[]));
                let (env, process) = w.start();
                let file = env
                    .open(Path::new("/store"), OpenMode { write: true, ..OpenMode::default() })
                    .await
                    .unwrap();
                let new = NewStore { group: group(), engine, size: replication::store::MIN_SIZE };
                Store::create(&file, &new, History::none()).await.unwrap();
                let store = open(&env).await;
                store.begin(Generation(1), &[]).await.unwrap();
                store.keep(&all(1, 0..GRANULES)).await.unwrap();
                prepare(&store, Epoch(1), history(1)).await.unwrap();
                commit(&store, Epoch(1)).await.unwrap();
                store.tidy().await.unwrap();
                for v in 0..VOLUMES {
                    let nines = Data::from(vec![9; GRANULE as usize]);
                    store.own_write(v as u16, change(v, GRANULES - 1, 9).at, nines).await.unwrap();
                }
                store.own_flush().await.unwrap();
                first(&store).await;
                let done = until_io(&w, at, step(&store)).await;
                told.set(done);
                drop(store);
                w.host().power_loss(&[&process]);
                w.host().clear_faults();
                let (env, _process) = w.start();
                check(&w, &open(&env).await, done).await;
            });
            assert_eq!(outcome.violation, None, "{engine:?}, crash at I/O {at}, draw {draw}");
        }
        if ended.get() {
            return at;
        }
    }
    panic!("{engine:?}: the step never ends");
}

fn nothing(_: &Rc<Store>) -> Going<'_> {
    Box::pin(async {})
}

fn write_twos(store: &Rc<Store>) -> Going<'_> {
    Box::pin(async {
        for c in all(2, 0..4) {
            store.keep(&[c]).await.unwrap();
        }
        store.harden().await.kept.unwrap();
    })
}

fn get_prepared(store: &Rc<Store>) -> Going<'_> {
    Box::pin(async { prepare(store, Epoch(2), history(2)).await.unwrap() })
}

fn write_and_get_prepared(store: &Rc<Store>) -> Going<'_> {
    Box::pin(async {
        write_twos(store).await;
        get_prepared(store).await;
    })
}

fn decide(store: &Rc<Store>) -> Going<'_> {
    Box::pin(async { commit(store, Epoch(2)).await.unwrap() })
}

fn write_and_decide(store: &Rc<Store>) -> Going<'_> {
    Box::pin(async {
        write_and_get_prepared(store).await;
        decide(store).await;
    })
}

fn tidy(store: &Rc<Store>) -> Going<'_> {
    Box::pin(async { store.tidy().await.unwrap() })
}

fn promote(store: &Rc<Store>) -> Going<'_> {
    Box::pin(async { store.promote(Generation(2), true).await.unwrap() })
}

fn write_and_promote(store: &Rc<Store>) -> Going<'_> {
    Box::pin(async {
        write_twos(store).await;
        promote(store).await;
    })
}

fn merge(store: &Rc<Store>) -> Going<'_> {
    Box::pin(async { store.merge().await.unwrap() })
}

/// A new session after the crash brings the whole image and the same epoch: it becomes the checkpoint.
async fn delivered_again(store: &Store) {
    store.begin(Generation(1), &[]).await.unwrap();
    store.keep(&all(1, 4..GRANULES)).await.unwrap();
    store.keep(&all(2, 0..4)).await.unwrap();
    prepare(store, Epoch(2), history(2)).await.unwrap();
    commit(store, Epoch(2)).await.unwrap();
    assert_eq!(seen(store).await, CHECKPOINT_2);
}

fn same_checkpoint<'a>(_: &'a World, store: &'a Rc<Store>, _: bool) -> Going<'a> {
    Box::pin(async {
        assert_eq!(store.history().epoch(), Epoch(1));
        assert_eq!(seen(store).await, CHECKPOINT_1);
        delivered_again(store).await;
    })
}

fn decided_or_not<'a>(_: &'a World, store: &'a Rc<Store>, done: bool) -> Going<'a> {
    Box::pin(async move {
        let c = store.history().epoch().0;
        assert!(c == 2 || (c == 1 && !done), "at checkpoint {c}, decided: {done}");
        assert_eq!(seen(store).await, if c == 2 { CHECKPOINT_2 } else { CHECKPOINT_1 });
        // the decision, or its acknowledgement, comes again
        delivered_again(store).await;
    })
}

fn applied_again<'a>(w: &'a World, store: &'a Rc<Store>, _: bool) -> Going<'a> {
    Box::pin(async {
        assert_eq!((store.history().epoch(), seen(store).await), (Epoch(2), CHECKPOINT_2));
        store.tidy().await.unwrap();
        assert_eq!((seen(store).await, raw(w.host())), (CHECKPOINT_2, CHECKPOINT_2));
    })
}

fn merged_again<'a>(w: &'a World, store: &'a Rc<Store>, _: bool) -> Going<'a> {
    Box::pin(async {
        assert!(store.role() != Role::Secondary && store.highest() == Generation(2));
        assert_eq!(seen(store).await, CHECKPOINT_1);
        assert!(store.begin(Generation(1), &[]).await.is_err(), "the old generation is let in");
        store.merge().await.unwrap();
        assert_eq!((seen(store).await, raw(w.host())), (CHECKPOINT_1, CHECKPOINT_1));
    })
}

fn promoted_or_not<'a>(_: &'a World, store: &'a Rc<Store>, done: bool) -> Going<'a> {
    Box::pin(async move {
        assert_eq!(seen(store).await, CHECKPOINT_1);
        assert!(!done || store.role() == Role::Promoted);
        if store.role() == Role::Secondary {
            delivered_again(store).await;
        }
    })
}

/// Before the intent there is only the new record of activity, which is another file.
fn not_promoted<'a>(_: &'a World, store: &'a Rc<Store>, _: bool) -> Going<'a> {
    Box::pin(async {
        assert_eq!((store.role(), store.highest()), (Role::Secondary, Generation(1)));
        assert_eq!(seen(store).await, CHECKPOINT_1);
        delivered_again(store).await;
    })
}

// ---- the primary

/// A primary's disk with its record of activity; what happens to it is written down as it happens.
struct Primarily {
    activity: Rc<Activity>,
    disk: Rc<dyn env::File>,
    sent: RefCell<u64>,
}

const LEN: u64 = 64 << 20;

async fn primarily(env: &Env, new: bool) -> Primarily {
    let existing = if new { Existing::CreateTruncate } else { Existing::Open };
    let mode = OpenMode { write: true, existing, ..OpenMode::default() };
    let disk = env.open(Path::new("/p"), OpenMode { write: true, ..OpenMode::default() }).await.unwrap();
    if new {
        disk.set_len(LEN).await.unwrap();
        disk.barrier().await.unwrap();
    }
    let file = env.open(Path::new("/record"), mode).await.unwrap();
    let activity = if new {
        Activity::create(file, group(), &[LEN], history(1), Some(&[])).await.unwrap()
    } else {
        Activity::open(file, group(), &[LEN]).await.unwrap().expect("one slot is whole")
    };
    Primarily { activity, disk, sent: RefCell::new(1) }
}

impl Primarily {
    async fn write(&self, n: u64) {
        let at = Span::new(n * (5 << 20), 512);
        self.activity.cover(0, at).await.unwrap();
        self.disk.write(at.start, Data::from(vec![7; 512])).await.unwrap();
    }

    /// As `session/primary/checkpoints.rs` does: a number is reserved before its mark is sent.
    async fn mark(&self) {
        let epoch = *self.sent.borrow() + 1;
        if epoch > self.activity.used().0 {
            self.activity.reserve(Epoch(epoch + 1)).await.unwrap();
        }
        *self.sent.borrow_mut() = epoch;
    }
}

/// A primary that writes and makes marks, and crashes at each of its I/Os, with a secondary beside it that crashes with it or not.
fn primary_row(both: bool) {
    for at in 0..MOST {
        let ended = Rc::new(Cell::new(false));
        for draw in 0..DRAWS {
            let told = ended.clone();
            let outcome = World::play(at * DRAWS + draw, false, |w| async move {
                w.host().install("/p", Image::from_bytes(&[]));
                let (env, process) = w.start();
                let p = Rc::new(primarily(&env, true).await);
                let going = p.clone();
                let done = until_io(
                    &w,
                    at,
                    Box::pin(async move {
                        for n in 0..4 {
                            going.write(2 * n).await;
                            going.mark().await;
                            going.write(2 * n + 1).await;
                        }
                        going.disk.barrier().await.unwrap();
                    }),
                )
                .await;
                told.set(done);
                let sent = *p.sent.borrow();
                if both {
                    w.host().power_loss(&[&process]);
                } else {
                    process.kill();
                }
                w.host().clear_faults();
                let (env, _process) = w.start();
                let p = primarily(&env, false).await;
                // I8: whatever differs from the checkpoint is marked
                for n in 0..8 {
                    let at = Span::new(n * (5 << 20), 512);
                    let there = p.disk.read(at).await.unwrap().to_vec();
                    assert!(there[0] == 0 || p.activity.covers(0, at), "write {n} is forgotten");
                    assert!(!done || there[0] == 7);
                }
                // no number is used twice, and what was marked is still owed
                let mut dirty = Dirty::new(vec![LEN], p.activity.floor());
                for (v, span) in p.activity.marks() {
                    dirty.mark(p.activity.used().next(), v, span).unwrap();
                }
                let volumes = vec![VolumeInfo { len: LEN }];
                let core = Primary::new(
                    group(),
                    volumes,
                    p.activity.history(),
                    p.activity.used(),
                    dirty,
                    Config::default(),
                );
                assert!(core.open_epoch().0 > sent, "epoch {} is used again", core.open_epoch());
                assert_eq!(core.history().epoch(), Epoch(1), "what was not acknowledged is not committed");
                let owed = core.dirty_since(Epoch(1)).unwrap().unwrap();
                for n in 0..8 {
                    let at = n * (5 << 20);
                    assert!(p.disk.read(Span::new(at, 512)).await.unwrap().is_zero() || owed[0].get(at));
                }
            });
            assert_eq!(outcome.violation, None, "crash at I/O {at}, draw {draw}");
        }
        if ended.get() {
            assert!(at > 10, "the primary must have done something");
            return;
        }
    }
    panic!("the primary never ends");
}

/// A peer goes in the middle of a write that waits for it: the write is done only with the word that says so.
fn degrading() {
    let config =
        Config { write_level: AckLevel::RemoteReceived, quorum: Quorum::Any(1), ..Config::default() };
    let dirty = Dirty::new(vec![LEN], Epoch(0));
    let mut core = Primary::new(
        group(),
        vec![VolumeInfo { len: LEN }],
        History::begin(Generation(1)),
        Epoch(8),
        dirty,
        config.clone(),
    );
    let peer = core.add_peer();
    let mut out = Vec::new();
    core.step(Input::Configure(config), &mut out).unwrap();
    let told = |out: &[Output]| {
        out.iter().any(|o| matches!(o, Output::Event(replication::primary::Event::Degraded { .. })))
    };
    let before = told(&out) || core.degraded();
    let (seq, _) = core.admit(0, Span::new(0, 4096), 0).unwrap();
    out.clear();
    core.step(Input::Connected(peer), &mut out).unwrap();
    core.step(Input::Disconnected(peer, "gone".into()), &mut out).unwrap();
    let done = core.standing(seq, AckLevel::RemoteReceived) == Standing::Done;
    assert!(done && (before || told(&out)), "done alone, and nobody was told");
}

/// Whatever write of the store's metadata is torn, the copy before it counts.
fn torn_metadata(engine: Engine) {
    for at in 0..MOST {
        let ended = Rc::new(Cell::new(false));
        let told = ended.clone();
        let outcome = World::play(at, false, |w| async move {
            (0..VOLUMES).for_each(|v| {
                w.host()
                    .install(&format!("/disk{v}"), Image::from_bytes(&vec![0; GRANULES * GRANULE as usize]));
            });
            w.host().install("/store", Image::from_bytes(&[]));
            let (env, process) = w.start();
            let file =
                env.open(Path::new("/store"), OpenMode { write: true, ..OpenMode::default() }).await.unwrap();
            let new = NewStore { group: group(), engine, size: replication::store::MIN_SIZE };
            Store::create(&file, &new, History::none()).await.unwrap();
            let store = open(&env).await;
            let rule = Rule {
                path: "/store".into(),
                op: Some(Op::Write),
                skip: at,
                times: u64::MAX,
                fault: Fault::Torn(BlockError::EIO),
            };
            w.host().fault(rule);
            let mut acknowledged = 0;
            // a generation of its own for each, so that the slots are written often
            let mut all_well = true;
            for n in 1..5u64 {
                let going = async {
                    store.begin(Generation(1), &[]).await?;
                    store.keep(&all(n as u8, 0..GRANULES)).await?;
                    prepare(&store, Epoch(n), history(n)).await?;
                    commit(&store, Epoch(n)).await?;
                    acknowledged = n;
                    store.tidy().await
                };
                if going.await.is_err() {
                    all_well = false;
                    break;
                }
            }
            told.set(all_well);
            drop(store);
            w.host().power_loss(&[&process]);
            w.host().clear_faults();
            let (env, _process) = w.start();
            let store = open(&env).await;
            let c = store.history().epoch().0;
            assert!(c == acknowledged || c == acknowledged + 1, "at {c}, acknowledged {acknowledged}");
            if c > 0 {
                assert_eq!(seen(&store).await, [[c as u8; GRANULES]; VOLUMES]);
            }
        });
        assert_eq!(outcome.violation, None, "{engine:?}, torn write {at}");
        if ended.get() {
            assert!(at > 10, "there are slots and records to be torn");
            return;
        }
    }
    panic!("the writes never end");
}

/// The power fails while a store is made, in an empty file or over a store that was given up: afterwards there is the old one, the new one,
/// or one that is known not to be made; and what is no store is not taken for that.
#[test]
fn a_store_that_was_not_completely_made_is_made_again() {
    for again in [false, true] {
        for at in 0..MOST {
            let ended = Rc::new(Cell::new(false));
            for draw in 0..DRAWS {
                let told = ended.clone();
                let outcome = World::play(at * DRAWS + draw, false, |w| async move {
                    for name in ["/disk0", "/disk1", "/store"] {
                        w.host().install(name, Image::from_bytes(&[]));
                    }
                    let (env, process) = w.start();
                    let mode = OpenMode { write: true, ..OpenMode::default() };
                    let file = env.open(Path::new("/store"), mode).await.unwrap();
                    let size = replication::store::MIN_SIZE;
                    let new = NewStore { group: group(), engine: Engine::Redo, size };
                    if again {
                        Store::create(&file, &new, history(7)).await.unwrap();
                        // moves the slots on
                        drop(open(&env).await);
                    }
                    let larger = NewStore { size: 2 * size, ..new };
                    let step = async { Store::create(&file, &larger, history(9)).await.unwrap() };
                    let done = until_io(&w, at, Box::pin(step)).await;
                    told.set(done);
                    w.host().power_loss(&[&process]);
                    w.host().clear_faults();
                    let (env, _process) = w.start();
                    let file = env.open(Path::new("/store"), mode).await.unwrap();
                    if !Store::is_made(&file).await.unwrap() {
                        assert!(!done && !again);
                        Store::create(&file, &larger, history(9)).await.unwrap();
                    }
                    let epoch = open(&env).await.history().epoch();
                    assert!(epoch == Epoch(9) || again && !done && epoch == Epoch(7), "{epoch}");
                });
                assert_eq!(outcome.violation, None, "again: {again}, crash at I/O {at}, draw {draw}");
            }
            if ended.get() {
                assert!(at > 4);
                break;
            }
        }
    }
    let outcome = World::play(1, false, |w| async move {
        w.host().install("/store", Image::from_bytes(b"somebody's notes"));
        let (env, _process) = w.start();
        let file = env.open(Path::new("/store"), OpenMode::default()).await.unwrap();
        assert!(Store::is_made(&file).await.unwrap(), "it would be overwritten");
    });
    assert_eq!(outcome.violation, None);
}

fn both_engines(first: Step, step: Step, check: Check) {
    for engine in [Engine::Redo, Engine::Undo] {
        let ios = secondary_row(engine, first, step, check);
        println!("  {engine:?}: a crash at each of {ios} I/Os");
    }
}

#[test]
fn the_crash_matrix_row_by_row() {
    let rows: [(&str, fn()); 11] = [
        ("S, mid-epoch", || both_engines(nothing, write_twos, same_checkpoint)),
        ("S, after PREPARED, before decision", || both_engines(write_twos, get_prepared, same_checkpoint)),
        ("S, decision durable, before ack", || both_engines(write_and_get_prepared, decide, decided_or_not)),
        ("S, during drop/trim/apply", || both_engines(write_and_decide, tidy, applied_again)),
        ("S, after failover intent, mid-merge", || both_engines(write_and_promote, merge, merged_again)),
        ("S, between lease grant and intent", || {
            both_engines(write_twos, nothing, not_promoted);
            both_engines(write_twos, promote, promoted_or_not);
        }),
        ("P, any time", || primary_row(false)),
        ("P, after sending marker, before recording closed epoch", || primary_row(true)),
        ("P, mid-degrade decision", degrading),
        ("both, power loss", || {
            primary_row(true);
            both_engines(nothing, write_and_decide, decided_or_not);
        }),
        ("torn write of any metadata block", || {
            torn_metadata(Engine::Redo);
            torn_metadata(Engine::Undo);
        }),
    ];
    for (name, row) in rows {
        println!("{name}");
        row();
    }
}

/// The test of the test: without the rule that a row is about, the row fails.
#[test]
fn a_row_fails_without_its_rule() {
    let rows: [(Bug, fn()); 6] = [
        (Bug::PreimageNotDurable, || both_engines(nothing, write_twos, same_checkpoint)),
        (Bug::EmptiedOnRestart, || both_engines(nothing, write_twos, same_checkpoint)),
        (Bug::CommitNotDurable, || both_engines(write_and_get_prepared, decide, decided_or_not)),
        (Bug::DataNotFlushedBeforeTrim, || both_engines(write_and_decide, tidy, applied_again)),
        (Bug::MergeNotFlushed, || both_engines(write_and_promote, merge, merged_again)),
        (Bug::IntentNotDurable, || both_engines(write_twos, promote, promoted_or_not)),
    ];
    for (bug, row) in rows {
        plant(Some(bug));
        let ended = std::panic::catch_unwind(row);
        plant(None);
        assert!(ended.is_err(), "{bug:?} was not noticed");
    }
}
