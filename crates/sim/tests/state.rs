//! The state store on disks that fail and crash: after each life it holds what was acknowledged, whole batches only, in order;
//! what was refused is not there (or was found to be there before it was refused). Lives end at random, and one script at each of
//! its moments.
#![allow(clippy::unwrap_used)] // a test says by panicking

use env::sync::race;
use env::{Env, OpenMode};
use sim::runner::{Options, Outcome, run};
use sim::{Fault, Keep, Op, Profile, Rule, World};
use state::{Batch, Store, Tables};
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

const TABLES: [&str; 3] = ["a", "b", "c"];

/// What the store may hold: states that differ in commits of which nobody was told how they ended.
struct Model {
    possible: Vec<Tables>,
    /// Asked for and not answered, in order.
    open: Vec<Batch>,
    acknowledged: u64,
}

fn applied(tables: &Tables, batch: &Batch) -> Tables {
    let mut out = tables.clone();
    for table in batch.cleared() {
        out.remove(table);
    }
    for ((table, key), value) in batch.changes() {
        let rows = out.entry(table.clone()).or_default();
        match value {
            Some(v) => drop(rows.insert(key.clone(), v.clone())),
            None => drop(rows.remove(key)),
        }
    }
    out.retain(|_, rows| !rows.is_empty());
    out
}

impl Model {
    fn new() -> Rc<RefCell<Model>> {
        Rc::new(RefCell::new(Model { possible: vec![Tables::new()], open: Vec::new(), acknowledged: 0 }))
    }

    fn acknowledge(&mut self, batch: &Batch) {
        self.possible.iter_mut().for_each(|t| *t = applied(t, batch));
        self.acknowledged += 1;
    }

    fn refuse(&mut self, batch: &Batch) {
        let with: Vec<Tables> = self.possible.iter().map(|t| applied(t, batch)).collect();
        for t in with {
            if !self.possible.contains(&t) {
                self.possible.push(t);
            }
        }
        assert!(self.possible.len() < 4096, "too much is unknown");
    }

    /// After a crash: of what was not answered any beginning.
    fn crash(&mut self) {
        let open = std::mem::take(&mut self.open);
        let mut all = self.possible.clone();
        let mut now = self.possible.clone();
        for batch in &open {
            now.iter_mut().for_each(|t| *t = applied(t, batch));
            all.extend(now.clone());
        }
        self.possible = all;
    }
}

fn draw_batch(world: &World, rng: &RefCell<sim::Rng>) -> Batch {
    let mut rng = rng.borrow_mut();
    let mut batch = Batch::new();
    if rng.chance(0.03) {
        batch.clear(TABLES[rng.index(3)]);
    }
    for _ in 0..=rng.below(4) {
        let (table, key) = (*rng.choose(&TABLES), format!("key{}", rng.below(8)));
        let size = *rng.choose(&[1usize, 30, 600, 5000, 70_000]);
        let byte = rng.draw() as u8;
        match rng.chance(0.25) {
            true => batch.delete(table, &key),
            false => batch.put(table, &key, vec![byte; size]),
        }
    }
    world.count("batches", 1);
    batch
}

fn answered(world: &World, m: &mut Model, batches: &[Batch], outcomes: &[block::Result<()>]) {
    m.open.clear();
    for (batch, outcome) in batches.iter().zip(outcomes) {
        match outcome {
            Ok(()) => m.acknowledge(batch),
            Err(_) => {
                world.count("refused", 1);
                m.refuse(batch);
            }
        }
    }
}

/// A commit, or several at once.
async fn write_once(world: &World, store: &Store, model: &RefCell<Model>, rng: &RefCell<sim::Rng>) {
    let n = if rng.borrow_mut().chance(0.2) { 3 } else { 1 };
    let batches: Vec<Batch> = (0..n).map(|_| draw_batch(world, rng)).collect();
    model.borrow_mut().open = batches.clone();
    // asked for in order: each task's first step comes before the next task is started
    let asked: Vec<_> = batches.iter().map(|b| Box::pin(store.commit(b.clone()))).collect();
    let outcomes = futures_util::future::join_all(asked).await;
    answered(world, &mut model.borrow_mut(), &batches, &outcomes);
}

/// One writer.
async fn write(
    world: World,
    env: Env,
    store: Rc<Store>,
    model: Rc<RefCell<Model>>,
    rng: Rc<RefCell<sim::Rng>>,
) {
    loop {
        write_once(&world, &store, &model, &rng).await;
        let pause = rng.borrow_mut().duration(Duration::ZERO, Duration::from_millis(3));
        env.sleep(pause).await;
    }
}

/// Whether the store holds what it may. It is known what that is then.
fn holds(world: &World, store: &Store, model: &RefCell<Model>, life: u32) -> bool {
    let found = store.read(&TABLES).map(|mut t| {
        t.retain(|_, rows| !rows.is_empty());
        t
    });
    let mut m = model.borrow_mut();
    let violation = match found {
        Ok(found) if m.possible.contains(&found) => {
            m.possible = vec![found];
            return true;
        }
        Ok(found) => {
            let sizes: Vec<_> = found.iter().map(|(t, r)| (t.clone(), r.len())).collect();
            let (n, commits) = (m.possible.len(), m.acknowledged);
            format!("the store holds {sizes:?}, which is none of {n} possible states after {commits} commits")
        }
        Err(e) => format!("the store cannot be read: {e}"),
    };
    world.verdict().violation(format!("life {life}: {violation}"));
    false
}

async fn lives(world: World) {
    let rng = Rc::new(RefCell::new(world.rng("store")));
    let profile = Profile::drawn(&mut rng.borrow_mut());
    world.host().set_profile(profile.clone());
    let model = Model::new();
    let (watch, _root) = world.start();
    for life in 0..6 {
        if life == 5 {
            world.host().set_profile(Profile::calm());
        }
        let (env, process) = world.start();
        let opened = Rc::new(RefCell::new(None));
        let (slot, open_env) = (opened.clone(), env.clone());
        let opening = env.spawn("open", async move {
            let outcome = Store::open(&open_env, Path::new("/state")).await;
            *slot.borrow_mut() = Some(outcome);
        });
        // some lives end before the store is open
        let patience = if rng.borrow_mut().chance(0.2) && life < 5 { 4 } else { 60_000 };
        watch.timeout(Duration::from_millis(patience), opening.join()).await;
        let store = match opened.borrow_mut().take() {
            Some(Ok(store)) => store,
            Some(Err(e)) if profile.errors.iter().all(|e| *e == 0.0) || life == 5 => {
                world.verdict().violation(format!("the store does not open: {e}"));
                return;
            }
            _ => {
                world.count("openings cut short", 1);
                crash(&world, &process, &rng);
                continue;
            }
        };
        if !holds(&world, &store, &model, life) {
            return;
        }
        if life == 5 {
            store.close().await;
            if process.open_files() > 0 {
                world.verdict().violation("the store is open after its end");
            }
            return;
        }
        env.spawn("writer", write(world.clone(), env.clone(), store, model.clone(), rng.clone()));
        let for_long = rng.borrow_mut().duration(Duration::ZERO, Duration::from_millis(400));
        watch.sleep(for_long).await;
        crash(&world, &process, &rng);
        model.borrow_mut().crash();
        world.count("commits", model.borrow().acknowledged);
    }
}

fn crash(world: &World, process: &sim::Process, rng: &RefCell<sim::Rng>) {
    match rng.borrow_mut().chance(0.5) {
        true => process.kill(),
        false => world.host().power_loss(&[process]),
    }
}

fn scenario(seed: u64, verbose: bool) -> Outcome {
    World::play(seed, verbose, lives)
}

#[test]
fn what_was_acknowledged_survives_and_nothing_else() {
    let seeds: u64 = std::env::var("SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(150);
    let first: u64 = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let report =
        run(scenario, first..first + seeds, &Options { jobs: 2, twice_every: 10, ..Options::default() });
    println!("{report}");
    assert!(report.failures.is_empty(), "{:#?}", report.failures);
    if seeds >= 100 {
        assert!(report.counts["commits"] > 500 && report.counts["refused"] > 5);
        assert!(report.counts["openings cut short"] > 5);
    }
}

/// Each crash point of the script is tried with each of these; `None` is a kill. Of what is drawn, several.
const HOW: [Option<Keep>; 6] =
    [None, Some(Keep::Nothing), Some(Keep::All), Some(Keep::Drawn), Some(Keep::Drawn), Some(Keep::Drawn)];

/// One life of the script: the store is opened (the first makes it), written to, and closed.
async fn script(world: World, env: Env, model: Rc<RefCell<Model>>, life: u32) {
    let rng = RefCell::new(world.rng(&format!("life {life}")));
    let store = match Store::open(&env, Path::new("/state")).await {
        Ok(store) => store,
        Err(e) => return world.verdict().violation(format!("life {life}: the store does not open: {e}")),
    };
    if !holds(&world, &store, &model, life) {
        return;
    }
    for _ in 0..12 {
        write_once(&world, &store, &model, &rng).await;
    }
    store.close().await;
}

/// The script crashes at its moment `at`; the next life, which finds what is left, soon after its own beginning; the third does not.
/// How many moments the first had.
fn crash_at(at: Option<u64>, kind: usize) -> (Outcome, u64) {
    let had = Rc::new(Cell::new(0));
    let tell = had.clone();
    let outcome = World::play(1, false, move |world| async move {
        let host = world.host().clone();
        host.let_names_be_lost();
        let (model, (_watch, _root)) = (Model::new(), world.start());
        for life in 0..3 {
            let (env, process) = world.start();
            let begin = host.moments();
            let until = match (life, at) {
                (0, Some(at)) => begin + at + 1,
                // while it is opened, mostly, and mended
                (1, Some(at)) => begin + 1 + at % 40,
                _ => u64::MAX,
            };
            let playing = env.spawn("script", script(world.clone(), env.clone(), model.clone(), life));
            let ended = race(playing.join(), host.reach(until)).await.is_some();
            if life == 0 {
                tell.set(host.moments() - begin);
                if ended && at.is_some() {
                    world.verdict().violation("the moment of the crash never came");
                }
            }
            // kinds that draw draw something else each
            (0..kind).for_each(|_| {
                world.machine().draw(sim::Rng::draw);
            });
            match HOW[kind] {
                None => process.kill(),
                Some(keep) => host.power_loss_keeping(&[&process], keep),
            }
            model.borrow_mut().crash();
        }
        world.count("commits", model.borrow().acknowledged);
    });
    (outcome, had.get())
}

fn crash_of(case: u64) -> Outcome {
    let (at, kind) = (case / HOW.len() as u64, (case % HOW.len() as u64) as usize);
    let mut outcome = crash_at(Some(at), kind).0;
    outcome.violation = outcome.violation.map(|v| format!("crash at moment {at} ({:?}): {v}", HOW[kind]));
    outcome
}

#[test]
fn a_crash_at_every_moment_leaves_whole_batches_in_order() {
    let (outcome, moments) = crash_at(None, 0);
    assert_eq!(outcome.violation, None);
    assert!(moments > 100, "{moments}");
    let cases = moments * HOW.len() as u64;
    let report = run(|case, _| crash_of(case), 0..cases, &Options { jobs: 2, ..Options::default() });
    println!("{moments} moments: {report}");
    assert!(report.failures.is_empty(), "{:#?}", report.failures);
}

/// Plays `body` with a store that has one record.
fn with_store<F: Future<Output = ()> + 'static>(body: impl FnOnce(World, Env, Rc<Store>) -> F + 'static) {
    let outcome = World::play(1, false, |world| async move {
        let (env, _process) = world.start();
        let store = Store::open(&env, Path::new("/state")).await.unwrap();
        let mut batch = Batch::new();
        batch.put("a", "key", b"value".to_vec());
        store.commit(batch).await.unwrap();
        body(world.clone(), env, store).await;
    });
    assert_eq!(outcome.violation, None);
}

fn batch(key: &str) -> Batch {
    let mut batch = Batch::new();
    batch.put("a", key, vec![7; 100_000]);
    batch
}

#[test]
fn a_full_disk_is_an_error_and_no_more() {
    with_store(|world, _, store| async move {
        world.host().fault(Rule::always("state.redb", Op::Write, Fault::Errno(28)));
        let e = store.commit(batch("new")).await.unwrap_err();
        assert!(e.to_string().contains("/state/state.redb"), "{e}");
        assert_eq!(e.errno(), 28, "{e}");
        world.host().clear_faults();
        store.commit(batch("newer")).await.unwrap();
        let rows = store.read(&["a"]).unwrap()["a"].keys().cloned().collect::<Vec<_>>();
        assert_eq!(rows, ["key", "newer"]);
    });
}

#[test]
fn a_directory_has_one_user() {
    with_store(|world, _, store| async move {
        let (other, _process) = world.start();
        let e = Store::open(&other, Path::new("/state")).await.err().unwrap();
        assert_eq!(e.message(), "another daemon uses the state directory '/state'");
        store.close().await;
        Store::open(&other, Path::new("/state")).await.unwrap();
    });
}

#[test]
fn a_damaged_store_is_an_error_that_names_it() {
    for (at, what) in [(0u64, "beginning"), (5000, "middle"), (64, "header")] {
        with_store(move |world, env, store| async move {
            store.close().await;
            for i in 0..4096 {
                world.host().rot("/state/state.redb", at + i, 3);
            }
            let found = Store::open(&env, Path::new("/state")).await;
            let Err(e) = found else {
                // what is not used any more may be damaged
                let tables = found.unwrap().read(&["a"]).unwrap();
                let value = tables.get("a").and_then(|t| t.get("key"));
                assert_eq!(value.map(Vec::as_slice), Some(&b"value"[..]), "{what}");
                return;
            };
            assert!(
                e.to_string().contains("/state/state.redb") && e.to_string().contains("damaged"),
                "{what}: {e}"
            );
        });
    }
}

#[test]
fn a_store_that_is_gone_or_newer_is_not_begun_anew() {
    with_store(|_, env, store| async move {
        store.close().await;
        let mode = OpenMode { write: true, ..OpenMode::default() };
        let file = env.open(Path::new("/state/format"), mode).await.unwrap();
        file.write(0, block::Data::copy_from(b"liveblk state 2\n")).await.unwrap();
        let e = Store::open(&env, Path::new("/state")).await.err().unwrap();
        assert!(e.to_string().contains("format 2 is not known"), "{e}");
        file.write(0, block::Data::copy_from(b"liveblk state 1\n")).await.unwrap();
        env.remove(Path::new("/state/state.redb")).await.unwrap();
        let e = Store::open(&env, Path::new("/state")).await.err().unwrap();
        assert!(e.to_string().contains("damaged"), "{e}");
        // and the other way round: the store without the file that says what it is
    });
    with_store(|_, env, store| async move {
        store.close().await;
        env.remove(Path::new("/state/format")).await.unwrap();
        let store = Store::open(&env, Path::new("/state")).await.unwrap();
        assert_eq!(store.read(&["a"]).unwrap()["a"]["key"], b"value");
    });
}
