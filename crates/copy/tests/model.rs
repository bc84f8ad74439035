//! The engine and the tap against byte arrays, under random guests, errors, pauses and mode switches. Each run is a
//! function of its seed: `SEED=n cargo test -p copy --test model` repeats one.
#![allow(missing_docs, clippy::unwrap_used)]

mod world;

use bitmap::DirtyBitmap;
use block::{BlockError, Data, Io, ReqFlags, Span};
use copy::{CopyTap, Engine, OnError, Proof, ProofRules, Work, first};
use drivers::filters::mirror_top::MirrorTop;
use env::Env;
use env::sync::Notify;
use graph::{Admitted, Graph, Node, WriteAhead};
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;
use world::{Desk, Follow, Mem, Mode, Rng, digest_of, edge, simulate};

struct World {
    _graph: Rc<Graph>,
    env: Env,
    source: Rc<Mem>,
    target: Rc<Mem>,
    top: Rc<MirrorTop>,
    work: Rc<Work>,
    desk: Rc<Desk>,
    policy: Rc<Follow>,
    engine: RefCell<Option<Engine>>,
    /// Guest changes in flight.
    flying: RefCell<Vec<(u64, Span)>>,
    quit: Cell<bool>,
    guests: Cell<u32>,
    ready: Cell<bool>,
}

async fn world(env: &Env, rng: &mut Rng, mode: Mode) -> Rc<World> {
    let graph = Graph::new(env);
    let len = rng.between(1, 160) * 4096 + *rng.choose(&[0, 512, 1000]);
    let granularity = *rng.choose(&[512, 4096, 16384, 65536]);
    let (source, target) = (Mem::new(env, len), Mem::new(env, len));
    for b in 0..len / 4096 {
        if rng.chance(0.6) {
            source.put(b * 4096, &[(b % 251 + 1) as u8; 4096], true);
        }
    }
    let work = Work::new(env.clone(), len, granularity).unwrap();
    if rng.chance(0.5) {
        for b in 0..len / 4096 {
            target.put(b * 4096, &[0xee; 4096], true);
        }
    } else if rng.chance(0.7) {
        work.assume_target_zero().unwrap();
    }
    if !len.is_multiple_of(4096) && rng.chance(0.5) {
        source.put(len - len % 4096, &vec![7; (len % 4096) as usize], true);
    }
    if rng.chance(0.5) {
        let rules = ProofRules { repair: rng.chance(0.5), ..ProofRules::default() };
        work.set_proof(Rc::new(Proof::new(len, rules).unwrap()));
    }
    if rng.chance(0.7) {
        work.keep_parts();
    }
    let top = MirrorTop::new(edge(&graph, "source", source.clone()).await);
    let (desk, policy) = (Desk::new(), Follow::new(mode));
    let target_edge = edge(&graph, "target", target.clone()).await;
    let tap = CopyTap::new(work.clone(), target_edge.clone(), policy.clone(), desk.clone());
    top.set_tap(Some(tap));
    let buffer = *rng.choose(&[0, 65536, 1 << 20, 16 << 20]);
    let source_edge = edge(&graph, "source", source.clone()).await;
    let engine = Engine::new(work.clone(), source_edge, target_edge, policy.clone(), desk.clone(), buffer);
    Rc::new(World {
        _graph: graph,
        env: env.clone(),
        source,
        target,
        top,
        work,
        desk,
        policy,
        engine: RefCell::new(Some(engine)),
        flying: RefCell::default(),
        quit: Cell::new(false),
        guests: Cell::new(0),
        ready: Cell::new(false),
    })
}

impl World {
    /// In sync: outside of changes that are still in flight, the target has what the source has.
    fn assert_acknowledged_is_there(&self, at: Span) {
        let (source, target) = (self.source.bytes.borrow(), self.target.bytes.borrow());
        let differ = source.chunks(512).zip(target.chunks(512)).enumerate().filter(|(_, (s, t))| s != t);
        for (i, (s, t)) in differ {
            for (n, _) in s.iter().zip(t.iter()).enumerate().filter(|(_, (s, t))| s != t) {
                let byte = (i * 512 + n) as u64;
                let changing = self.flying.borrow().iter().any(|(_, f)| f.contains_offset(byte));
                assert!(changing, "in sync at the end of {at}, but the target lacks byte {byte}");
            }
        }
    }
}

/// One client: requests of all kinds, any alignment, and the oracle of synchronous writes at each acknowledgement.
async fn guest(w: Rc<World>, mut rng: Rng, id: u64) {
    w.guests.set(w.guests.get() + 1);
    let len = w.source.len();
    let hot = rng.below(len);
    let mut n = 0;
    while !w.quit.get() {
        n += 1;
        let start = if rng.chance(0.4) { hot.saturating_sub(rng.below(9000)) } else { rng.below(len) };
        let most = *rng.choose(&[512, 4096, 20_000, 150_000]);
        let at = Span::new(start, rng.between(1, most).min(len - start));
        if at.is_empty() {
            continue;
        }
        if rng.chance(0.25) {
            let _ = w.top.read(at).await;
        } else {
            let key = id << 32 | n;
            w.flying.borrow_mut().push((key, at));
            let result = match rng.below(6) {
                0 => w.top.zero(at, ReqFlags { may_unmap: true, ..ReqFlags::NONE }).await,
                1 => w.top.discard(at).await,
                _ => {
                    let fill = rng.draw() as u8;
                    w.top.write(at, Data::from(vec![fill; at.len as usize]), ReqFlags::NONE).await
                }
            };
            w.flying.borrow_mut().retain(|(k, _)| *k != key);
            if result.is_ok() && w.policy.mode.get() != Mode::Background && w.work.in_sync() {
                w.assert_acknowledged_is_there(at);
            }
        }
        if w.flying.borrow().is_empty() && w.work.in_sync() {
            assert!(*w.source.bytes.borrow() == *w.target.bytes.borrow(), "quiet and in sync, but not equal");
        }
        if rng.chance(0.7) {
            w.env.sleep(Duration::from_micros(rng.below(3000))).await;
        }
    }
    w.guests.set(w.guests.get() - 1);
}

/// Whoever operates the job: pauses, speeds, modes, errors, and resumes what stopped.
async fn operator(w: Rc<World>, mut rng: Rng, faults: bool) {
    let errors = |rng: &mut Rng| {
        let rate = if faults && rng.chance(0.5) { rng.between(3, 30) } else { 0 };
        (rate, *rng.choose(&[BlockError::EIO, BlockError::ENOSPC]))
    };
    while !w.quit.get() {
        w.env.sleep(Duration::from_micros(rng.between(100, 6000))).await;
        match rng.below(9) {
            0 => w.desk.pause(true),
            1 | 2 => w.desk.pause(false),
            3 => w.policy.mode.set(*rng.choose(&[
                Mode::Background,
                Mode::WriteBlocking,
                Mode::ReadWriteBlocking,
            ])),
            4 => w.source.fail_reads.set(errors(&mut rng)),
            5 => w.target.fail_writes.set(errors(&mut rng)),
            6 => {
                w.desk.on_target.set(*rng.choose(&[OnError::Ignore, OnError::Stop]));
                w.desk.on_source.set(*rng.choose(&[OnError::Ignore, OnError::Stop]));
            }
            7 => w.source.fail_writes.set(errors(&mut rng)),
            _ => w.desk.speed.set(*rng.choose(&[0, 0, 1 << 20, 64 << 20])),
        }
        w.desk.changed.notify_all();
    }
    [&w.source, &w.target].iter().for_each(|m| {
        m.fail_reads.set((0, 0));
        m.fail_writes.set((0, 0));
    });
    // a request that is in flight may have met its error already, and nobody is left to resume
    w.desk.on_target.set(OnError::Ignore);
    w.desk.on_source.set(OnError::Ignore);
    w.desk.speed.set(0);
    w.desk.pause(false);
}

async fn mirror(env: Env, mut rng: Rng) {
    let mode = *rng.choose(&[Mode::Background, Mode::WriteBlocking, Mode::ReadWriteBlocking]);
    let w = world(&env, &mut rng, mode).await;
    w.desk.on_source.set(OnError::Ignore);
    w.desk.on_target.set(OnError::Ignore);
    w.work.mark(Span::new(0, w.source.len()));
    for id in 0..rng.below(4) {
        env.spawn("guest", guest(w.clone(), rng.fork("guest"), id));
    }
    let faults = rng.chance(0.6);
    let operator = env.spawn("operator", operator(w.clone(), rng.fork("operator"), faults));
    let (quit, after) = (w.clone(), Duration::from_millis(rng.between(1, 60)));
    env.spawn("end", async move {
        quit.env.sleep(after).await;
        quit.quit.set(true);
    });
    let mut engine = w.engine.take().unwrap();
    engine.run().await.unwrap();
    assert_eq!(w.work.copies_in_flight(), 0, "in sync with copies in flight");
    engine.flush_target().await.unwrap();
    w.ready.set(true);
    // follow the guest until it stops, then bring the rest over while nothing changes
    w.policy.until_clean.set(false);
    let stop = w.clone();
    env.spawn("stop", async move {
        while !stop.quit.get() || stop.guests.get() > 0 {
            stop.env.sleep(Duration::from_micros(500)).await;
        }
        stop.policy.stop.set(true);
        stop.desk.changed.notify_all();
    });
    engine.run().await.unwrap();
    operator.join().await;
    w.desk.pause(false);
    w.policy.stop.set(false);
    w.policy.until_clean.set(true);
    engine.run().await.unwrap();
    assert!(w.work.in_sync());
    assert!(*w.source.bytes.borrow() == *w.target.bytes.borrow(), "target differs at the end");
    assert_eq!(w.work.remaining(), 0);
    drop(engine);
    assert_eq!((w.source.busy.get(), w.target.busy.get()), (0, 0));
    let Some(proof) = w.work.proof() else { return };
    assert_eq!(*w.desk.mismatches.borrow(), [], "a difference was seen that never was one");
    assert!(proof.is_settled() && proof.fresh_bytes() == 0);
    proof.seal(&env).await.unwrap();
    let digest = proof.report().digest.unwrap();
    assert_eq!(digest, digest_of(&w.source.bytes.borrow()), "the digest is not that of the disk");
}

fn seeds(default: u64) -> std::ops::Range<u64> {
    match std::env::var("SEED").ok().and_then(|s| s.parse().ok()) {
        Some(one) => one..one + 1,
        None => 0..std::env::var("SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(default),
    }
}

fn holds(seed: u64) -> Result<(), String> {
    let hook = std::panic::take_hook();
    let said = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let to = said.clone();
    std::panic::set_hook(Box::new(move |p| *to.lock().unwrap() = p.to_string()));
    let outcome = catch_unwind(AssertUnwindSafe(|| simulate(seed, mirror)));
    std::panic::set_hook(hook);
    outcome.map_err(|_| format!("SEED={seed}: {}", said.lock().unwrap()))
}

#[test]
fn target_equals_source_whatever_happens() {
    for seed in seeds(400) {
        if let Err(why) = holds(seed) {
            panic!("{why}");
        }
    }
}

/// The test of the test: each planted bug is found within so many seeds.
#[cfg(feature = "planted-bugs")]
#[test]
fn planted_bugs_are_found() {
    use copy::bugs::{Bug, plant};
    let mut missed = Vec::new();
    for bug in Bug::ALL.into_iter().filter(|b| {
        std::env::var("BUG")
            .map_or(!matches!(b, Bug::CancelCompletes | Bug::NoDrain | Bug::UnprovenEnd), |n| {
                format!("{b:?}") == n
            })
    }) {
        plant(Some(bug));
        let found = (0..1000).find_map(|seed| holds(seed).err());
        plant(None);
        match found {
            Some(why) => println!("{bug:?}: {}", why.lines().collect::<Vec<_>>().join(" ")),
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}

#[test]
fn a_hanging_target_does_not_hold_the_guest_once_called_off() {
    simulate(1, |env, mut rng| async move {
        let w = world(&env, &mut rng, Mode::WriteBlocking).await;
        w.work.mark(Span::new(0, w.source.len()));
        w.target.hang.set(true);
        let mut engine = w.engine.take().unwrap();
        // the copy hangs; a guest's write waits for it, as synchronous writes promise
        assert!(env.timeout(Duration::from_secs(5), engine.run()).await.is_none());
        assert!(w.work.copies_in_flight() > 0);
        let (g, done) = (w.clone(), Rc::new(Cell::new(false)));
        let said = done.clone();
        let whole = Span::new(0, w.source.len());
        env.spawn("guest", async move {
            g.top.write(whole, Data::from(vec![9; whole.len as usize]), ReqFlags::NONE).await.unwrap();
            said.set(true);
        });
        env.sleep(Duration::from_secs(5)).await;
        drop(engine);
        w.work.give_up_target();
        env.sleep(Duration::from_secs(1)).await;
        assert!(done.get(), "the guest still waits for a target that was given up");
        assert!(w.source.bytes.borrow().iter().all(|b| *b == 9));
        assert_eq!(w.work.copies_in_flight(), 0);
        assert!(w.work.dirty_bytes() > 0, "what was called off is dirty again");
    });
}

/// A log of changes whose record takes until it is told to go on.
#[derive(Default)]
struct SlowLog {
    recorded: Cell<bool>,
    told: Notify,
}

impl WriteAhead for SlowLog {
    fn try_enter(&self, _: Span) -> Option<Admitted> {
        self.recorded.get().then_some(Admitted(0))
    }
    fn enter(&self, _: Span) -> Io<'_, Admitted> {
        Box::pin(async move {
            while !self.recorded.get() {
                self.told.wait().await;
            }
            Ok(Admitted(0))
        })
    }
    fn leave(&self, _: Admitted) {}
    fn sync(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn resize(&self, _: u64) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn reopen(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Else a crash would leave a target that has what the source lacks, and no mark of it.
#[test]
fn a_synchronous_write_reaches_the_target_only_when_a_crash_would_leave_it_marked() {
    simulate(7, |env, mut rng| async move {
        let w = world(&env, &mut rng, Mode::WriteBlocking).await;
        let source = w.top.filtered().unwrap().child();
        let (log, marks) =
            (Rc::new(SlowLog::default()), DirtyBitmap::new(None, w.source.len(), 4096).unwrap());
        let marks = Rc::new(marks);
        source.add_bitmap(marks.clone());
        source.set_write_ahead(Some(log.clone()));
        for disk in [&w.source, &w.target] {
            disk.hang.set(true);
        }
        let g = w.clone();
        env.spawn("guest", async move {
            g.top.write(Span::new(4096, 4096), Data::from(vec![9; 4096]), ReqFlags::NONE).await.unwrap();
        });
        env.sleep(Duration::from_secs(5)).await;
        assert_eq!(
            (w.source.busy.get(), w.target.busy.get()),
            (0, 0),
            "nothing is written before the record is made"
        );
        log.recorded.set(true);
        log.told.notify_all();
        env.sleep(Duration::from_secs(5)).await;
        assert_eq!((w.source.busy.get(), w.target.busy.get()), (1, 1));
        assert!(
            marks.bits().get(4096),
            "marked before either has it: the region may leave the record only after that"
        );
    });
}

#[test]
fn reported_errors_end_the_run_and_leave_the_range_dirty() {
    for (target, errno) in [(true, BlockError::EIO), (false, BlockError::EIO), (true, BlockError::ENOSPC)] {
        simulate(3, move |env, mut rng| async move {
            let w = world(&env, &mut rng, Mode::Background).await;
            for b in 0..w.source.len() / 4096 {
                w.source.put(b * 4096, &[5; 4096], true);
            }
            w.work.mark(Span::new(0, w.source.len()));
            let rule = if target { &w.target.fail_writes } else { &w.source.fail_reads };
            rule.set((1, errno));
            let mut engine = w.engine.take().unwrap();
            let error = engine.run().await.unwrap_err();
            assert_eq!(error.errno(), errno);
            assert_eq!(w.work.copies_in_flight(), 0);
            assert_eq!(w.work.remaining(), w.work.dirty_bytes());
            assert_eq!((w.work.remaining(), w.work.done()), (w.source.len(), 0));
            // stop, then resume: the failed range is tried again
            w.desk.on_target.set(OnError::Enospc);
            w.desk.on_source.set(OnError::Stop);
            if errno == BlockError::ENOSPC || !target {
                let (desk, source, t) = (w.desk.clone(), w.source.clone(), w.target.clone());
                env.spawn("resume", async move {
                    while !desk.parked.get() {
                        desk.parked.get();
                        source.env.sleep(Duration::from_millis(1)).await;
                    }
                    source.fail_reads.set((0, 0));
                    t.fail_writes.set((0, 0));
                    desk.pause(false);
                });
                engine.run().await.unwrap();
                assert_eq!(*w.source.bytes.borrow(), *w.target.bytes.borrow());
                assert_eq!(w.work.done(), w.source.len());
            }
        });
    }
}

#[test]
fn speed_is_kept_and_changes_at_once() {
    simulate(5, |env, _| async move {
        let len = 4 << 20;
        let (source, target) = (Mem::new(&env, len), Mem::new(&env, len));
        (0..len / 4096).for_each(|b| source.put(b * 4096, &[1; 4096], true));
        let work = Work::new(env.clone(), len, 65536).unwrap();
        work.mark(Span::new(0, len));
        let (desk, policy) = (Desk::new(), Follow::new(Mode::Background));
        desk.speed.set(1 << 20);
        let graph = Graph::new(&env);
        let (s, t) = (edge(&graph, "s", source.clone()).await, edge(&graph, "t", target.clone()).await);
        let mut engine = Engine::new(work.clone(), s, t, policy, desk.clone(), 16 << 20);
        let begun = env.now();
        assert!(env.timeout(Duration::from_secs(2), engine.run()).await.is_none());
        let done = work.done();
        assert!((1 << 20..=(5 << 20) / 2).contains(&done), "{done} bytes in 2 s at 1 MiB/s");
        desk.speed.set(0);
        desk.changed.notify_all();
        engine.run().await.unwrap();
        let took = env.now() - begun;
        assert!(took < Duration::from_millis(2500), "{took:?}");
        assert_eq!(*source.bytes.borrow(), *target.bytes.borrow());
    });
}

#[test]
fn no_more_is_copied_than_whoever_makes_it_durable_allows() {
    simulate(8, |env, _| async move {
        let (len, piece) = (4 << 20, 65536);
        let (source, target) = (Mem::new(&env, len), Mem::new(&env, len));
        (0..len / 4096).for_each(|b| source.put(b * 4096, &[1; 4096], true));
        let work = Work::new(env.clone(), len, piece).unwrap();
        work.mark(Span::new(0, len));
        let (desk, policy) = (Desk::new(), Follow::new(Mode::Background));
        let graph = Graph::new(&env);
        let (s, t) = (edge(&graph, "s", source.clone()).await, edge(&graph, "t", target.clone()).await);
        // more than a piece at a time is not in flight
        let mut engine = Engine::new(work.clone(), s, t, policy, desk.clone(), piece);
        for ceiling in [1 << 20, 3 << 20] {
            work.set_ceiling(ceiling);
            let told = work.clone();
            let held = env.spawn("held", async move { told.held_up().await });
            assert!(env.timeout(Duration::from_secs(60), engine.run()).await.is_none());
            assert!((ceiling..ceiling + piece).contains(&work.done()), "{} of {ceiling}", work.done());
            assert!(held.is_done(), "nobody was told");
        }
        let raise = work.clone();
        let later = env.clone();
        env.spawn("raise", async move {
            later.sleep(Duration::from_secs(1)).await;
            raise.set_ceiling(u64::MAX);
        });
        let begun = env.now();
        engine.run().await.unwrap();
        assert!(env.now() - begun < Duration::from_secs(5), "it is noticed at once");
        assert_eq!(*source.bytes.borrow(), *target.bytes.borrow());
    });
}

#[test]
fn of_a_granule_that_was_copied_only_what_a_guest_changed_is_copied_again() {
    simulate(9, |env, _| async move {
        let len = 1 << 20;
        let (source, target) = (Mem::new(&env, len), Mem::new(&env, len));
        (0..len / 4096).for_each(|b| source.put(b * 4096, &[1; 4096], true));
        let work = Work::new(env.clone(), len, 65536).unwrap();
        work.keep_parts();
        work.mark(Span::new(0, len));
        let (desk, policy) = (Desk::new(), Follow::new(Mode::Background));
        let graph = Graph::new(&env);
        let top = MirrorTop::new(edge(&graph, "s", source.clone()).await);
        let (s, t) = (edge(&graph, "s", source.clone()).await, edge(&graph, "t", target.clone()).await);
        let tap = CopyTap::new(work.clone(), t.clone(), policy.clone(), desk.clone());
        top.set_tap(Some(tap));
        let mut engine = Engine::new(work.clone(), s, t, policy, desk.clone(), 16 << 20);
        engine.run().await.unwrap();
        let mut again = target.written.get();
        for (at, bytes, copied) in [(70_000, 100, 4096), (131_000, 5000, 12_288), (0, 65536, 65536)] {
            let data = Data::from(vec![2; bytes]);
            top.write(Span::new(at, bytes as u64), data, ReqFlags::NONE).await.unwrap();
            assert_eq!(work.dirty_bytes() % 65536, 0, "granules are what is counted");
            engine.run().await.unwrap();
            again += copied;
            assert_eq!(target.written.get(), again, "{bytes} bytes at {at}");
        }
        assert_eq!(*source.bytes.borrow(), *target.bytes.borrow());
    });
}

/// A write that began before the mirror wrote to both sides ends while the source is asked what a discard left there.
#[test]
fn a_write_that_ends_during_a_discard_stays_marked() {
    for seed in 0..200 {
        simulate(seed, |env, mut rng| async move {
            let w = world(&env, &mut rng, Mode::Background).await;
            let len = w.source.len();
            w.work.mark(Span::new(0, len));
            let mut engine = w.engine.take().unwrap();
            engine.run().await.unwrap();
            // where it reads as zero, so that the target is to follow
            let zeroes: Vec<u64> = (0..len / 4096).filter(|b| !w.source.data.borrow()[*b as usize]).collect();
            let Some(block) = zeroes.get(rng.below(zeroes.len() as u64) as usize) else { return };
            let (writer, at) = (w.clone(), Span::new(block * 4096, 1));
            let writing = env.spawn("writer", async move {
                writer.top.write(at, Data::from(vec![0xaa]), ReqFlags::NONE).await.unwrap();
            });
            env.sleep(Duration::from_micros(rng.below(400))).await;
            w.policy.mode.set(Mode::WriteBlocking);
            w.top.discard(Span::new(0, len)).await.unwrap();
            writing.join().await;
            engine.run().await.unwrap();
            assert!(*w.source.bytes.borrow() == *w.target.bytes.borrow(), "seed {seed}: {at:?}");
        });
    }
}

#[test]
fn zero_length_and_nothing_to_do() {
    simulate(6, |env, _| async move {
        let (source, target) = (Mem::new(&env, 0), Mem::new(&env, 0));
        let work = Work::new(env.clone(), 0, 65536).unwrap();
        work.mark(Span::new(0, 0));
        let graph = Graph::new(&env);
        let (s, t) = (edge(&graph, "s", source).await, edge(&graph, "t", target).await);
        let (desk, policy) = (Desk::new(), Follow::new(Mode::Background));
        let mut engine = Engine::new(work.clone(), s, t, policy, desk, 0);
        engine.run().await.unwrap();
        assert_eq!((work.done(), work.remaining()), (0, 0));
    });
}

#[test]
fn only_data_is_copied_to_a_target_that_reads_as_zero() {
    simulate(7, |env, _| async move {
        let len = 3 << 20;
        let (source, target) = (Mem::new(&env, len), Mem::new(&env, len));
        (0..20).for_each(|b| source.put(b * 8192, &[b as u8 + 1; 4096], true));
        let work = Work::new(env.clone(), len, 4096).unwrap();
        let graph = Graph::new(&env);
        let (s, t) = (edge(&graph, "s", source.clone()).await, edge(&graph, "t", target.clone()).await);
        assert!(first::reads_as_zero(&work, &t).await.unwrap());
        assert!(!first::reads_as_zero(&work, &s).await.unwrap());
        work.assume_target_zero().unwrap();
        first::mark_data(&work, &s).await.unwrap();
        assert_eq!(work.remaining(), 20 * 4096);
        // zeroes where zeroes are known to be cost nothing
        work.mark(Span::new(1 << 20, 1 << 20));
        let (desk, policy) = (Desk::new(), Follow::new(Mode::Background));
        let mut engine = Engine::new(work.clone(), s.clone(), t.clone(), policy, desk, 1 << 20);
        engine.run().await.unwrap();
        assert_eq!(target.written.get(), 20 * 4096);
        assert_eq!(target.data.borrow().iter().filter(|d| **d).count(), 20);
        let v = copy::verify(&env, &s, &t, |_| {}).await.unwrap();
        assert_eq!((v.first_difference, v.compared), (None, 20 * 4096));
        target.put(8192 + 77, &[0xff], true);
        let v = copy::verify(&env, &s, &t, |_| {}).await.unwrap();
        assert_eq!(v.first_difference, Some(8192 + 77));
    });
}

#[test]
fn what_a_guest_reads_is_on_the_target() {
    simulate(8, |env, mut rng| async move {
        let w = world(&env, &mut rng, Mode::ReadWriteBlocking).await;
        w.work.mark(Span::new(0, w.source.len()));
        let g = w.work.granularity();
        let at = Span::new(g / 2, 3 * g).intersect(&Span::new(0, w.source.len()));
        w.top.read(at).await.unwrap();
        let inner = at.align_in(g);
        let (a, b) = (inner.start as usize, inner.end() as usize);
        assert_eq!(w.source.bytes.borrow()[a..b], w.target.bytes.borrow()[a..b]);
        assert_eq!(w.work.remaining(), w.source.len() - inner.len);
        // a failing target costs the reader nothing
        w.target.fail_writes.set((1, BlockError::EIO));
        w.desk.on_target.set(OnError::Ignore);
        assert!(w.top.read(Span::new(0, w.source.len())).await.is_ok());
        assert_eq!(w.work.remaining(), w.source.len() - inner.len);
    });
}

/// Copies that never wait for anything: a guest's request that comes meanwhile finds the thread free after one of them.
#[test]
fn what_comes_from_outside_waits_for_one_copy_at_the_most() {
    simulate(9, |env, _| async move {
        let len = 8 << 20;
        let (source, target) = (Mem::new(&env, len), Mem::new(&env, len));
        source.slow_us.set(0);
        target.slow_us.set(0);
        (0..len / 4096).for_each(|b| source.put(b * 4096, &[1; 4096], true));
        let work = Work::new(env.clone(), len, 65536).unwrap();
        work.mark(Span::new(0, len));
        let graph = Graph::new(&env);
        let (s, t) = (edge(&graph, "s", source.clone()).await, edge(&graph, "t", target.clone()).await);
        let (desk, policy) = (Desk::new(), Follow::new(Mode::Background));
        let mut engine = Engine::new(work.clone(), s, t, policy, desk, 16 << 20);
        let copy = env.spawn("engine", async move { engine.run().await.unwrap() });
        let mut most = 0;
        while !copy.is_done() {
            let before = target.written.get();
            env.next_turn().await;
            most = most.max(target.written.get() - before);
        }
        assert_eq!(*source.bytes.borrow(), *target.bytes.borrow());
        // one that ends in the turn after the one it began in, and the next
        assert!(most <= 1 << 20, "{most} bytes within one turn");
    });
}
