//! Mirrors in a real graph, over disks in memory, under the simulator's clock: events, ends, errors, arguments.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../copy/tests/world/mod.rs"]
mod world;

use block::{BlockError, Data, ReqFlags};
use copy::OnError;
use env::Env;
use graph::{Demand, Edge, Graph, NodeOptions, Parent, Perms, Role};
use jobs::{Convergence, CopyMode, Event, Job, JobError, MirrorArgs, Registry, Sink, State, Sync, mirror};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use world::Mem;

#[derive(Default)]
struct Log(RefCell<Vec<String>>);

impl Sink for Log {
    fn event(&self, event: Event) {
        self.0.borrow_mut().push(match event {
            Event::Status { state, .. } => state.name().to_owned(),
            Event::Ready { progress, .. } => format!("READY {}/{}", progress.current, progress.total),
            Event::Pending { .. } => "PENDING".into(),
            Event::Completed { error, .. } => format!("COMPLETED {}", error.unwrap_or("ok".into())),
            Event::Cancelled { .. } => "CANCELLED".into(),
            Event::Error { side, action, .. } => format!("ERROR {side:?} {action:?}"),
            _ => "other".into(),
        });
    }
}

impl Log {
    fn take(&self) -> Vec<String> {
        self.0.take()
    }
}

struct World {
    env: Env,
    graph: Rc<Graph>,
    registry: Rc<Registry>,
    log: Rc<Log>,
    source: Rc<Mem>,
    target: Rc<Mem>,
    /// What an export holds.
    client: Rc<Edge>,
}

const LEN: u64 = 256 * 1024;

fn simulate<F: Future<Output = ()> + 'static>(seed: u64, f: impl FnOnce(Rc<World>) -> F + 'static) {
    simulate_len(seed, LEN, LEN, f);
}

fn simulate_len<F: Future<Output = ()> + 'static>(
    seed: u64,
    source_len: u64,
    target_len: u64,
    f: impl FnOnce(Rc<World>) -> F + 'static,
) {
    world::simulate(seed, move |env, _| async move {
        let w = make(&env, source_len, target_len).await;
        f(w).await;
    });
}

async fn make(env: &Env, source_len: u64, target_len: u64) -> Rc<World> {
    let graph = Graph::new(env);
    let (source, target) = (Mem::new(env, source_len), Mem::new(env, target_len));
    for b in 0..source_len / 8192 {
        source.put(b * 8192, &[(b % 250) as u8 + 1; 4096], true);
    }
    for (name, node) in [("src", source.clone()), ("dst", target.clone())] {
        let options = NodeOptions {
            name: Some(name.into()),
            discard: true,
            monitor_owned: true,
            ..NodeOptions::default()
        };
        graph.add(options, node).await.unwrap();
    }
    let client = client(&graph, "src").await;
    let log = Rc::new(Log::default());
    let registry = Registry::new(env, log.clone());
    Rc::new(World { env: env.clone(), graph, registry, log, source, target, client })
}

/// What an export does to get at a node.
async fn client(graph: &Graph, node: &str) -> Rc<Edge> {
    let needs = Perms::CONSISTENT_READ.with(Perms::WRITE);
    let shares = needs.with(Perms::WRITE_UNCHANGED);
    let cell = graph.find(node).unwrap();
    let parent = Parent::Backend("export".into());
    graph.attach(&cell, "root", Role::Root, parent, Demand { needs, shares }).await.unwrap()
}

impl World {
    async fn mirror(&self, change: impl FnOnce(&mut MirrorArgs)) -> Result<Rc<Job>, JobError> {
        let mut args = MirrorArgs::new("m0", "src", "dst");
        change(&mut args);
        mirror::start(&self.registry, &self.graph, args).await
    }

    fn equal(&self) -> bool {
        *self.source.bytes.borrow() == *self.target.bytes.borrow()
    }

    /// Whether nothing is left of a job.
    async fn assert_gone(&self) {
        self.env.sleep(Duration::from_millis(1)).await;
        assert!(self.registry.list().is_empty());
        let names: Vec<String> = self.graph.nodes().iter().map(|n| n.name().to_owned()).collect();
        assert_eq!(names, ["src", "dst"]);
        for n in self.graph.nodes() {
            n.check_not_blocked().unwrap();
            assert!(n.cover().is_none());
        }
        let edges: usize = self.graph.nodes().iter().map(|n| n.parents().len()).sum();
        assert_eq!(edges, 1, "only the client holds an edge");
        assert_eq!((self.source.busy.get(), self.target.busy.get()), (0, 0));
    }

    async fn write(&self, at: u64, len: u64, fill: u8) -> block::Result<()> {
        self.client.write(at, Data::from(vec![fill; len as usize]), ReqFlags::NONE).await
    }
}

#[test]
fn completes_and_pivots() {
    simulate(1, |w| async move {
        let job = w.mirror(|_| {}).await.unwrap();
        assert_eq!(w.client.child().node().driver(), "mirror_top");
        assert_eq!(w.log.take(), ["created", "running"]);
        job.reached(State::Ready).await;
        assert_eq!(w.log.take(), ["ready", "READY 262144/262144"]);
        assert!(w.equal() && w.target.flushes.get() == 1);
        w.write(100, 5000, 0xaa).await.unwrap();
        assert!(job.progress().total > LEN);
        w.registry.complete(&job).unwrap();
        job.concluded().await;
        assert_eq!(w.log.take(), ["waiting", "pending", "COMPLETED ok", "concluded", "null"]);
        assert!(w.equal());
        assert_eq!(w.client.child().name(), "dst");
        w.write(0, 10, 0xbb).await.unwrap();
        assert!(!w.equal() && w.target.bytes.borrow()[0] == 0xbb);
        drop(job);
        w.assert_gone().await;
    });
}

#[test]
fn a_ready_mirror_cancelled_softly_leaves_a_copy_and_the_client() {
    simulate(2, |w| async move {
        let job = w.mirror(|a| a.auto_finalize = false).await.unwrap();
        job.reached(State::Ready).await;
        w.write(4096, 70_000, 0xaa).await.unwrap();
        w.registry.cancel_softly(&job).await.unwrap();
        job.reached(State::Pending).await;
        assert!(w.equal());
        // not frozen: the copy is of the past already
        w.write(4096, 70_000, 0xcc).await.unwrap();
        assert!(!w.equal());
        w.registry.finalize(&job).await.unwrap();
        let said = w.log.take();
        assert_eq!(said[4..], ["waiting", "pending", "PENDING", "COMPLETED ok", "concluded", "null"]);
        assert_eq!(w.client.child().name(), "src");
        drop(job);
        w.assert_gone().await;
    });
}

#[test]
fn hard_cancel_in_every_state_leaves_the_source_as_it_was() {
    for (seed, mode) in [(3, CopyMode::Background), (4, CopyMode::WriteBlocking)] {
        for state in [State::Running, State::Paused, State::Ready, State::Standby, State::Pending] {
            simulate(seed, move |w| async move {
                let job = w
                    .mirror(|a| {
                        a.auto_finalize = false;
                        a.copy_mode = mode;
                    })
                    .await
                    .unwrap();
                if state == State::Paused {
                    w.registry.pause(&job).unwrap();
                } else if state != State::Running {
                    job.reached(State::Ready).await;
                }
                match state {
                    State::Standby => w.registry.pause(&job).unwrap(),
                    State::Pending => w.registry.complete(&job).unwrap(),
                    _ => {}
                }
                job.reached(state).await;
                w.log.take();
                if matches!(state, State::Paused | State::Standby) {
                    let refused = w.registry.cancel_softly(&job).await.unwrap_err();
                    assert_eq!(refused.to_string(), "The block job for device 'm0' is currently paused");
                }
                w.registry.cancel(&job).await.unwrap();
                job.concluded().await;
                let said = w.log.take();
                let woken = state.woken().map(State::name);
                let want = ["aborting", "CANCELLED", "concluded", "null"];
                assert_eq!(said, woken.into_iter().chain(want).collect::<Vec<_>>(), "{state}");
                assert_eq!(job.error().unwrap().message(), "Operation canceled");
                assert_eq!(w.client.child().name(), "src");
                w.write(0, 4096, 1).await.unwrap();
                drop(job);
                w.assert_gone().await;
            });
        }
    }
}

#[test]
fn while_pending_the_client_is_held_and_goes_on_at_the_target() {
    simulate(5, |w| async move {
        let job = w.mirror(|a| a.auto_finalize = false).await.unwrap();
        job.reached(State::Ready).await;
        w.registry.complete(&job).unwrap();
        job.reached(State::Pending).await;
        assert!(mirror::with(&job, |m| m.is_frozen()).unwrap());
        let client = w.clone();
        let task = w.env.spawn("client", async move { client.write(0, 4096, 0x77).await.unwrap() });
        w.env.sleep(Duration::from_secs(5)).await;
        assert!(!task.is_done() && w.equal());
        // a client that comes now, by the source's name: its writes must not be lost either
        let late = client_of(&w).await;
        late.write(8192, Data::from(vec![0x55; 512]), ReqFlags::NONE).await.unwrap();
        assert!(w.equal());
        w.registry.finalize(&job).await.unwrap();
        task.join().await;
        assert_eq!((late.child().name(), w.client.child().name()), ("dst", "dst"));
        assert_eq!(w.target.bytes.borrow()[0], 0x77);
        assert_eq!(w.target.bytes.borrow()[8192], 0x55);
        assert_eq!(job.state(), State::Null);
    });
}

async fn client_of(w: &World) -> Rc<Edge> {
    client(&w.graph, "src").await
}

#[test]
fn a_client_that_attaches_during_the_job_is_mirrored() {
    simulate(6, |w| async move {
        let job = w.mirror(|a| a.copy_mode = CopyMode::WriteBlocking).await.unwrap();
        let late = client_of(&w).await;
        job.reached(State::Ready).await;
        late.write(9000, Data::from(vec![0x5a; 3000]), ReqFlags::NONE).await.unwrap();
        assert!(w.equal() && mirror::with(&job, |m| m.actively_synced()).unwrap());
        w.registry.complete(&job).unwrap();
        job.concluded().await;
        assert_eq!((late.child().name(), w.client.child().name()), ("dst", "dst"));
    });
}

#[test]
fn every_error_policy_on_either_side() {
    for on_source in [true, false] {
        for policy in [OnError::Report, OnError::Ignore, OnError::Enospc, OnError::Stop] {
            for errno in [BlockError::EIO, BlockError::ENOSPC] {
                simulate(7, move |w| async move {
                    for b in 0..LEN / 4096 {
                        w.source.put(b * 4096, &[5; 4096], true);
                    }
                    let rule = if on_source { &w.source.fail_reads } else { &w.target.fail_writes };
                    rule.set((1, errno));
                    let job = w
                        .mirror(|a| {
                            a.auto_dismiss = false;
                            a.on_source_error = if on_source { policy } else { OnError::Report };
                            a.on_target_error = if on_source { OnError::Report } else { policy };
                        })
                        .await
                        .unwrap();
                    let side = if on_source { "Source" } else { "Target" };
                    let full = errno == BlockError::ENOSPC;
                    let action = match policy {
                        OnError::Ignore => "Ignore",
                        OnError::Stop => "Stop",
                        OnError::Enospc if full => "Stop",
                        _ => "Report",
                    };
                    match action {
                        "Report" => job.concluded().await,
                        "Stop" => job.reached(State::Paused).await,
                        _ => w.env.sleep(Duration::from_millis(300)).await,
                    }
                    let said = w.log.take();
                    assert!(said.contains(&format!("ERROR {side} {action}")), "{said:?}");
                    let errors = said.iter().filter(|s| s.starts_with("ERROR")).count();
                    match action {
                        "Report" => {
                            let text = BlockError::from_errno(errno).message().to_owned();
                            assert_eq!(
                                said[said.len() - 3..],
                                ["aborting".to_owned(), format!("COMPLETED {text}"), "concluded".to_owned()]
                            );
                            assert_eq!(job.error().unwrap().message(), text);
                            w.registry.dismiss(&job).unwrap();
                        }
                        "Stop" => {
                            let status = format!("{:?}", job.io_status());
                            assert_eq!(status, if full { "NoSpace" } else { "Failed" });
                            assert_eq!(
                                w.registry.pause(&job).unwrap_err().to_string(),
                                "Job is already paused"
                            );
                            // again the same error: the same again
                            w.registry.resume(&job).unwrap();
                            job.reached(State::Paused).await;
                            assert!(w.log.take().iter().any(|s| s.starts_with("ERROR")));
                            rule_of(&w, on_source).set((0, 0));
                            w.registry.resume(&job).unwrap();
                        }
                        _ => {
                            assert!((2..60).contains(&errors), "{errors} tries in 300 ms");
                            rule_of(&w, on_source).set((0, 0));
                        }
                    }
                    if action != "Report" {
                        job.reached(State::Ready).await;
                        assert!(w.equal());
                        w.registry.cancel(&job).await.unwrap();
                        job.concluded().await;
                        w.registry.dismiss(&job).unwrap();
                    }
                    assert_eq!(w.client.child().name(), "src");
                    drop(job);
                    w.assert_gone().await;
                });
            }
        }
    }
}

fn rule_of(w: &World, on_source: bool) -> &std::cell::Cell<(u64, i32)> {
    if on_source { &w.source.fail_reads } else { &w.target.fail_writes }
}

#[test]
fn a_failing_flush_stops_before_ready_and_while_finishing() {
    simulate(8, |w| async move {
        w.target.fail_flush.set((1, BlockError::EIO));
        let job = w.mirror(|a| a.on_target_error = OnError::Stop).await.unwrap();
        job.reached(State::Paused).await;
        assert_eq!(w.log.take(), ["created", "running", "ERROR Target Stop", "paused"]);
        w.target.fail_flush.set((0, 0));
        w.registry.resume(&job).unwrap();
        job.reached(State::Ready).await;
        w.target.fail_flush.set((1, BlockError::EIO));
        w.registry.complete(&job).unwrap();
        job.reached(State::Standby).await;
        // the client is not kept frozen while the job rests
        w.write(0, 4096, 3).await.unwrap();
        w.target.fail_flush.set((0, 0));
        w.registry.resume(&job).unwrap();
        job.concluded().await;
        assert_eq!(w.client.child().name(), "dst");
        assert_eq!(w.target.bytes.borrow()[0], 3);
    });
}

#[test]
fn active_write_errors_never_reach_the_client() {
    simulate(9, |w| async move {
        let job = w
            .mirror(|a| {
                a.copy_mode = CopyMode::WriteBlocking;
                a.on_target_error = OnError::Stop;
            })
            .await
            .unwrap();
        job.reached(State::Ready).await;
        w.target.fail_writes.set((1, BlockError::ENOSPC));
        w.write(0, 4096, 9).await.unwrap();
        assert!(!mirror::with(&job, |m| m.actively_synced()).unwrap());
        job.reached(State::Standby).await;
        w.target.fail_writes.set((0, 0));
        w.write(65536, 4096, 9).await.unwrap(); // during standby active copying goes on
        assert_eq!(w.target.bytes.borrow()[65536], 9);
        w.registry.complete(&job).unwrap();
        w.env.sleep(Duration::from_secs(1)).await;
        assert_eq!(job.state(), State::Standby);
        w.registry.resume(&job).unwrap();
        job.concluded().await;
        assert!(w.equal());
        assert_eq!(w.client.child().name(), "dst");
    });
}

#[test]
fn a_hanging_target_does_not_hang_cancel() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        simulate(10, move |w| async move {
            let job = w.mirror(|a| a.copy_mode = mode).await.unwrap();
            job.reached(State::Ready).await;
            w.target.hang.set(true);
            let client = w.clone();
            let task = w.env.spawn("client", async move { client.write(0, 4096, 0x11).await.unwrap() });
            w.env.sleep(Duration::from_secs(2)).await;
            assert_eq!(task.is_done(), mode == CopyMode::Background);
            w.registry.pause(&job).ok();
            w.registry.cancel(&job).await.unwrap();
            w.env.timeout(Duration::from_secs(1), job.concluded()).await.unwrap();
            w.env.timeout(Duration::from_secs(1), task.join()).await.unwrap();
            assert_eq!(w.client.child().name(), "src");
            w.write(0, 512, 0x22).await.unwrap();
        });
    }
}

#[test]
fn sizes_differ_and_zero_length() {
    simulate_len(11, LEN, LEN / 2, |w| async move {
        let job = w.mirror(|_| {}).await.unwrap();
        job.concluded().await;
        assert_eq!(
            w.log.take(),
            [
                "created",
                "running",
                "aborting",
                "COMPLETED Source and target image have different sizes",
                "concluded",
                "null"
            ]
        );
        drop(job);
        w.assert_gone().await;
    });
    simulate_len(12, 0, 0, |w| async move {
        let job = w.mirror(|_| {}).await.unwrap();
        job.reached(State::Ready).await;
        assert_eq!(w.log.take()[2..], ["ready", "READY 0/0"]);
        w.registry.complete(&job).unwrap();
        job.concluded().await;
        assert_eq!(w.client.child().name(), "dst");
    });
}

#[test]
fn sync_none_and_mode_changes_in_every_direction() {
    simulate(13, |w| async move {
        let job = w.mirror(|a| a.sync = Sync::None).await.unwrap();
        job.reached(State::Ready).await;
        assert_eq!(w.log.take()[3], "READY 0/0");
        let modes = [CopyMode::Background, CopyMode::WriteBlocking, CopyMode::ReadWriteBlocking];
        for (i, from) in modes.into_iter().enumerate() {
            for to in modes {
                mirror::change(&job, from).unwrap();
                mirror::change(&job, to).unwrap();
                w.write(i as u64 * 4096, 4096, 0x40).await.unwrap();
                while job.progress().current < job.progress().total {
                    w.env.sleep(Duration::from_millis(1)).await;
                }
                let synced = mirror::with(&job, |m| m.actively_synced()).unwrap();
                assert_eq!(synced, to != CopyMode::Background);
                assert_eq!(w.target.bytes.borrow()[i * 4096], 0x40);
            }
        }
        w.registry.pause(&job).unwrap();
        mirror::change(&job, CopyMode::WriteBlocking).unwrap();
        w.registry.cancel(&job).await.unwrap();
        job.concluded().await;
        let refused = mirror::change(&job, CopyMode::Background).unwrap_err().to_string();
        assert_eq!(refused, "Job 'm0' in state 'null' cannot accept command verb 'change'");
    });
}

#[test]
fn verbs_are_refused_by_the_table() {
    simulate(14, |w| async move {
        let job = w.mirror(|a| a.auto_dismiss = false).await.unwrap();
        let say = |r: Result<(), JobError>| r.unwrap_err().to_string();
        let verb = |state: &str, verb: &str| {
            format!("Job 'm0' in state '{state}' cannot accept command verb '{verb}'")
        };
        assert_eq!(say(w.registry.complete(&job)), verb("running", "complete"));
        assert_eq!(say(w.registry.resume(&job)), "Can't resume a job that was not paused");
        job.reached(State::Ready).await;
        assert_eq!(say(w.registry.dismiss(&job)), verb("ready", "dismiss"));
        assert_eq!(say(w.registry.set_speed(&job, -1)), "Parameter 'speed' expects a non-negative value");
        w.registry.pause(&job).unwrap();
        assert_eq!(job.state(), State::Standby, "an idle job rests at once");
        assert_eq!(say(w.registry.pause(&job)), "Job is already paused");
        w.registry.resume(&job).unwrap();
        assert_eq!(job.state(), State::Ready);
        w.registry.complete(&job).unwrap();
        job.concluded().await;
        assert_eq!(say(w.registry.pause(&job)), verb("concluded", "pause"));
        assert_eq!(say(w.registry.set_speed(&job, 0)), verb("concluded", "set-speed"));
        assert_eq!(say(w.registry.cancel(&job).await), verb("concluded", "cancel"));
        assert_eq!(say(w.registry.finalize(&job).await), verb("concluded", "finalize"));
        assert_eq!(say(w.registry.resume(&job)), "Can't resume a job that was not paused");
        w.registry.dismiss(&job).unwrap();
        assert_eq!(w.registry.find("m0").err().unwrap().to_string(), "Job not found");
        let gone = w.registry.find_block_job("m0").err().unwrap();
        assert!(matches!(gone, JobError::NotActive(_)));
        assert_eq!(gone.to_string(), "Block job 'm0' not found");
    });
}

#[test]
fn arguments_are_checked() {
    simulate(15, |w| async move {
        type Change = fn(&mut MirrorArgs);
        let cases: [(Change, &str); 14] = [
            (|a| a.job_id = "".into(), "Invalid job ID ''"),
            (|a| a.job_id = "1x".into(), "Invalid job ID '1x'"),
            (|a| a.device = "nope".into(), "Cannot find device='nope' nor node-name='nope'"),
            (|a| a.target = "nope".into(), "Cannot find device='nope' nor node-name='nope'"),
            (|a| a.target = "src".into(), "Can't mirror node into itself"),
            (|a| a.granularity = 256, "Parameter 'granularity' expects a value in range [512B, 64MB]"),
            (|a| a.granularity = 1 << 27, "Parameter 'granularity' expects a value in range [512B, 64MB]"),
            (|a| a.granularity = 3000, "Parameter 'granularity' expects a power of 2"),
            (|a| a.buf_size = -1, "Invalid parameter 'buf-size'"),
            (|a| a.speed = -1, "Parameter 'speed' expects a non-negative value"),
            (|a| a.sync = Sync::Incremental, "Must provide a valid bitmap name for 'incremental' sync mode"),
            (|a| a.filter_node_name = Some("bad name".into()), "Invalid node-name: 'bad name'"),
            (|a| a.filter_node_name = Some("src".into()), "Duplicate nodes with node-name='src'"),
            (|a| a.replaces = Some("nope".into()), "Failed to find node with node-name='nope'"),
        ];
        for (change, want) in cases {
            assert_eq!(w.mirror(change).await.err().unwrap().to_string(), want);
        }
        let refused = w.mirror(|a| a.replaces = Some("dst".into())).await.err().unwrap().to_string();
        assert!(
            refused.starts_with("Cannot replace 'dst' by a node mirrored from 'src', because"),
            "{refused}"
        );
        w.assert_gone().await;
        // a target in use
        let user = client(&w.graph, "dst").await;
        let refused = w.mirror(|_| {}).await.err().unwrap().to_string();
        assert!(refused.starts_with("Permission conflict on node 'dst'"), "{refused}");
        drop(user);
        w.log.take();
        w.assert_gone().await;
        let job = w.mirror(|a| a.filter_node_name = Some("filter".into())).await.unwrap();
        assert!(w.graph.find("filter").is_some());
        let mut again = MirrorArgs::new("m1", "src", "dst");
        let refused = mirror::start(&w.registry, &w.graph, again.clone()).await.err().unwrap();
        assert_eq!(refused.to_string(), "Need a root block node");
        again.device = "filter".into();
        let refused = mirror::start(&w.registry, &w.graph, again.clone()).await.err().unwrap();
        assert_eq!(refused.to_string(), "Need a root block node");
        let refused = w.mirror(|_| {}).await.err().unwrap();
        assert!(!refused.to_string().is_empty());
        w.registry.cancel_all().await;
        drop(job);
        w.assert_gone().await;
    });
}

#[test]
fn a_convergence_policy_gets_a_busy_disk_in_sync() {
    for policy in [Convergence::None, Convergence::SwitchCopyMode, Convergence::ThrottleGuest] {
        simulate_len(16, 4 << 20, 4 << 20, move |w| async move {
            w.target.slow_us.set(3000);
            let job = w
                .mirror(|a| {
                    a.convergence = policy;
                    a.converge_after = Duration::from_secs(2);
                    a.granularity = 4096;
                    a.speed = 2 << 20;
                })
                .await
                .unwrap();
            let client = w.clone();
            let task = w.env.spawn("client", async move {
                for i in 0u64.. {
                    let at = i.wrapping_mul(0x9e37_79b9) % 1000 * 4096;
                    client.write(at, 4096, i as u8).await.unwrap();
                }
            });
            let ready = w.env.timeout(Duration::from_secs(20), job.reached(State::Ready)).await;
            assert_eq!(ready.is_some(), policy != Convergence::None, "{policy:?}");
            let outlook = mirror::with(&job, |m| m.outlook(&job)).unwrap();
            assert!(outlook.copy_rate > 0);
            if policy == Convergence::None {
                assert!(outlook.obstacle.is_some() && outlook.dirty_rate > 0, "{outlook:?}");
            }
            task.cancel();
            w.registry.cancel_all().await;
        });
    }
}

/// Where each write goes to both sides, the host copies beside a client that is busy; else clients go first.
#[test]
fn the_host_copies_beside_a_client_that_writes_to_both_sides() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking, CopyMode::ReadWriteBlocking] {
        simulate_len(17, 16 << 20, 16 << 20, move |w| async move {
            w.source.put(0, &vec![7; 16 << 20], true);
            w.source.can_copy.set(true);
            let client = w.clone();
            let task = w.env.spawn("client", async move {
                for i in 0u64.. {
                    let at = i.wrapping_mul(0x9e37_79b9) % 4096 * 4096;
                    client.write(at, 4096, i as u8).await.unwrap();
                }
            });
            let job = w.mirror(|a| a.copy_mode = mode).await.unwrap();
            // until the engine knows that somebody is there
            w.env.sleep(Duration::from_millis(5)).await;
            let before = w.source.host_copied.get();
            job.reached(State::Ready).await;
            let beside = w.source.host_copied.get() - before;
            assert_eq!(beside > 1 << 20, mode != CopyMode::Background, "{mode:?}: {beside}");
            task.cancel();
            w.registry.complete(&job).unwrap();
            job.concluded().await;
            assert!(w.equal());
        });
    }
}
