//! Transactions and `create` jobs: waiting for one another, ending together, one failing all.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../copy/tests/world/mod.rs"]
mod world;

use block::{BlockError, Io};
use env::Env;
use jobs::{Body, Event, Group, Job, Kind, Options, Progress, Registry, Sink, State};
use std::any::Any;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

#[derive(Default)]
struct Log(RefCell<Vec<String>>);

impl Sink for Log {
    fn event(&self, event: Event) {
        self.0.borrow_mut().push(match event {
            Event::Status { id, state } => format!("{id} {state}"),
            Event::Pending { id, .. } => format!("{id} PENDING"),
            Event::Completed { id, error, .. } => format!("{id} COMPLETED {}", error.unwrap_or("ok".into())),
            Event::Cancelled { id, .. } => format!("{id} CANCELLED"),
            other => format!("{other:?}"),
        });
    }
}

/// Works for a while, then succeeds or fails; may fail when the graph is to change.
struct Nap {
    env: Env,
    ms: u64,
    fails: bool,
    prepare_fails: bool,
}

impl Body for Nap {
    fn run<'a>(&'a self, _: &'a Rc<Job>) -> Io<'a> {
        Box::pin(async {
            self.env.sleep(Duration::from_millis(self.ms)).await;
            if self.fails { Err(BlockError::from_errno(BlockError::EIO)) } else { Ok(()) }
        })
    }
    fn prepare(&self) -> Io<'_> {
        Box::pin(async { if self.prepare_fails { Err(BlockError::invalid("no")) } else { Ok(()) } })
    }
    fn progress(&self) -> Progress {
        Progress { total: 2, current: 1 }
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct World {
    env: Env,
    log: Rc<Log>,
    registry: Rc<Registry>,
}

impl World {
    fn nap(&self, id: &str, group: &Rc<Group>, manual: bool, nap: Nap) -> Rc<Job> {
        let options = Options { auto_finalize: !manual, auto_dismiss: false, ..Options::default() };
        let job = self.registry.create(id, Kind::Mirror, options, Some(group.clone())).unwrap();
        self.registry.start(&job, Rc::new(nap));
        job
    }
    fn well(&self, ms: u64) -> Nap {
        Nap { env: self.env.clone(), ms, fails: false, prepare_fails: false }
    }
}

fn simulate<F: Future<Output = ()> + 'static>(f: impl FnOnce(World) -> F + 'static) {
    world::simulate(1, move |env, _| {
        let log = Rc::new(Log::default());
        let registry = Registry::new(&env, log.clone());
        f(World { env, log, registry })
    });
}

#[test]
fn members_pass_waiting_and_pending_together() {
    simulate(|w| async move {
        let group = Group::new();
        let (a, b) = (w.nap("a", &group, true, w.well(5)), w.nap("b", &group, false, w.well(50)));
        a.reached(State::Waiting).await;
        assert_eq!(b.state(), State::Running);
        a.reached(State::Pending).await;
        assert_eq!(b.state(), State::Pending);
        w.env.sleep(Duration::from_secs(1)).await;
        assert_eq!(w.log.0.take()[6..], ["a pending", "b pending", "a PENDING"]);
        w.registry.finalize(&b).await.unwrap();
        assert_eq!(w.log.0.take(), ["a COMPLETED ok", "a concluded", "b COMPLETED ok", "b concluded"]);
        w.registry.dismiss(&a).unwrap();
        w.registry.dismiss(&b).unwrap();
        assert!(w.registry.list().is_empty());
    });
}

#[test]
fn one_failure_ends_all() {
    simulate(|w| async move {
        let group = Group::new();
        let done = w.nap("a", &group, false, w.well(5));
        let bad = w.nap("b", &group, false, Nap { fails: true, ..w.well(50) });
        let late = w.nap("c", &group, false, w.well(500_000));
        late.concluded().await;
        done.concluded().await;
        assert!(w.env.now() < Duration::from_secs(10));
        assert_eq!(bad.error().unwrap().message(), "Input/output error");
        for other in [&done, &late] {
            assert_eq!(other.error().unwrap().message(), "Operation canceled");
        }
        let said = w.log.0.take();
        for line in ["b COMPLETED Input/output error", "a CANCELLED", "c CANCELLED"] {
            assert!(said.iter().any(|s| s == line), "{said:?}");
        }
        assert!(!said.iter().any(|s| s.ends_with("pending")));
    });
}

#[test]
fn a_failing_graph_change_aborts_from_pending_and_cancel_of_a_waiting_member_cancels_all() {
    simulate(|w| async move {
        let group = Group::new();
        let a = w.nap("a", &group, false, Nap { prepare_fails: true, ..w.well(5) });
        a.concluded().await;
        assert_eq!(
            w.log.0.take()[2..],
            ["a waiting", "a pending", "a aborting", "a COMPLETED no", "a concluded"]
        );
        let group = Group::new();
        let (b, c) = (w.nap("b", &group, false, w.well(5)), w.nap("c", &group, false, w.well(500_000)));
        b.reached(State::Waiting).await;
        w.registry.cancel(&b).await.unwrap();
        assert_eq!(b.state(), State::Concluded);
        c.concluded().await;
        assert!(b.error().is_some() && c.error().is_some());
    });
}

#[test]
fn create_jobs_stay_until_dismissed_and_are_no_block_jobs() {
    simulate(|w| async move {
        let env = w.env.clone();
        let work = Box::pin(async move {
            env.sleep(Duration::from_millis(3)).await;
            Err(BlockError::invalid("Cluster size must be a power of two between 512 and 2048k"))
        });
        let job = jobs::create::start(&w.registry, "c1", Kind::Create, work).unwrap();
        assert_eq!(job.progress(), Progress { total: 1, current: 0 });
        job.concluded().await;
        assert_eq!(w.log.0.take(), ["c1 created", "c1 running", "c1 aborting", "c1 concluded"]);
        assert_eq!(job.progress(), Progress { total: 1, current: 1 });
        assert!(job.error().unwrap().message().starts_with("Cluster size"));
        assert_eq!(w.registry.find_block_job("c1").err().unwrap().to_string(), "Block job 'c1' not found");
        let again = jobs::create::start(&w.registry, "c1", Kind::Create, Box::pin(async { Ok(()) }));
        assert_eq!(again.err().unwrap().to_string(), "Job ID 'c1' already in use");
        w.registry.dismiss(&job).unwrap();
        let job = jobs::create::start(&w.registry, "c1", Kind::Create, Box::pin(async { Ok(()) })).unwrap();
        job.concluded().await;
        let said = w.log.0.take();
        assert_eq!(said[1..], ["c1 created", "c1 running", "c1 waiting", "c1 pending", "c1 concluded"]);
        w.registry.cancel_all().await;
        assert!(w.registry.list().is_empty());
    });
}
