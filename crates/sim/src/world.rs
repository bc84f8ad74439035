//! One run: a machine, a network, a host, an executor, and a body that plays a scenario in it.
//!
//! What must stay true: whatever way the body ends (done, stuck, panicked), the run gives an [`Outcome`]; after a panic
//! nothing of the run is dropped (a destructor's second panic would end the program), it is leaked instead.

use crate::runner::Outcome;
use crate::{Host, Machine, Net, NetProfile, Profile, Rng, SimBackend, Verdict};
use control::Daemon;
use env::Executor;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::time::Duration;

/// Turns of the loop after which a run is taken to spin for ever; the longest honest ones take some 200,000.
const MAX_STEPS: u64 = 2_000_000;

/// Counts daemons of which something is in memory after the run: a long run of many seeds would fill it.
pub const HELD: &str = "daemons that are held after the end";

/// What a scenario plays in; clones are the same world.
#[derive(Clone)]
pub struct World(Rc<Inner>);

struct Inner {
    machine: Machine,
    net: Net,
    host: Host,
    executor: Executor,
    verdict: Verdict,
    counts: RefCell<BTreeMap<&'static str, u64>>,
    /// Daemons of this run, which may hold themselves when they were killed.
    daemons: RefCell<Vec<Rc<Daemon>>>,
}

impl World {
    /// A daemon whose memory is given back at the end of the run, however it ends.
    pub(crate) fn owns(&self, daemon: &Rc<Daemon>) {
        self.0.daemons.borrow_mut().push(daemon.clone());
    }

    /// The time and chance of this run.
    pub fn machine(&self) -> &Machine {
        &self.0.machine
    }

    /// The network.
    pub fn net(&self) -> &Net {
        &self.0.net
    }

    /// The (first) host.
    pub fn host(&self) -> &Host {
        &self.0.host
    }

    /// The executor, to start processes with.
    pub fn executor(&self) -> &Executor {
        &self.0.executor
    }

    /// Where violations go.
    pub fn verdict(&self) -> &Verdict {
        &self.0.verdict
    }

    /// A stream of chance of its own.
    pub fn rng(&self, name: &str) -> Rng {
        self.0.machine.fork(name)
    }

    /// Starts a process on the host.
    pub fn start(&self) -> (env::Env, crate::Process) {
        self.0.host.start(&self.0.executor)
    }

    /// Counts something for the report.
    pub fn count(&self, what: &'static str, n: u64) {
        *self.0.counts.borrow_mut().entry(what).or_default() += n;
    }

    /// Plays `body` in a new world made from `seed`. Calm at first: the body sets the profiles.
    pub fn play<F: Future<Output = ()> + 'static>(
        seed: u64,
        verbose: bool,
        body: impl FnOnce(World) -> F,
    ) -> Outcome {
        let machine = Machine::new(seed);
        machine.limit_steps(MAX_STEPS);
        if verbose {
            machine.keep_trace();
        }
        let net = Net::new(&machine, NetProfile::calm());
        let host = Host::new("host", &machine, &net, Profile::calm());
        let executor = Executor::new(SimBackend::root(&host));
        let world = World(Rc::new(Inner {
            machine: machine.clone(),
            net,
            host,
            executor,
            verdict: Verdict::new(),
            counts: RefCell::default(),
            daemons: RefCell::default(),
        }));
        let began = machine.now();
        let main = body(world.clone());
        let ran = catch_unwind(AssertUnwindSafe(|| world.executor().try_run(main)));
        let verdict = world.verdict().clone();
        match ran {
            Ok(Ok(())) => {}
            Ok(Err(stuck)) => verdict
                .violation(format!("stuck: nothing can happen any more; waiting tasks: {:?}", stuck.waiting)),
            Err(payload) => {
                if verbose {
                    machine.take_trace().iter().for_each(|l| println!("{l}"));
                }
                std::mem::forget(world);
                resume_unwind(payload);
            }
        }
        let mut outcome = Outcome {
            violation: verdict.result().err(),
            hash: machine.hash(),
            simulated: machine.now().saturating_sub(began),
            counts: world.0.counts.take(),
            trace: machine.take_trace(),
        };
        machine.forget_events();
        world.host().forget();
        let daemons = world.0.daemons.take();
        daemons.iter().for_each(|d| d.dissolve());
        let graphs: Vec<_> = daemons.iter().map(|d| Rc::downgrade(d.graph())).collect();
        drop((daemons, world));
        let held = graphs.iter().filter(|g| g.strong_count() > 0).count();
        if held > 0 {
            outcome.counts.insert(HELD, held as u64);
        }
        outcome
    }

    /// Runs `future`, but no longer than `limit` of virtual time; too long is a violation ("what" did not end).
    pub async fn within<T>(
        &self,
        env: &env::Env,
        limit: Duration,
        what: &str,
        future: impl Future<Output = T>,
    ) -> Option<T> {
        let done = env.timeout(limit, future).await;
        if done.is_none() {
            self.verdict().violation(format!("{what} did not end within {} s", limit.as_secs()));
        }
        done
    }
}
