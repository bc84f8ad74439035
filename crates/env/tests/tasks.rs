//! The executor, its mailboxes and the waiting primitives, over the real backend.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;
use common::{MODES, run_in};
use env::Env;
use env::os::{IoMode, OsConfig, start};
use env::sync::{Notify, Queue, Semaphore, oneshot};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

fn each<F: Future<Output = ()> + 'static>(test: impl Fn(Env) -> F) {
    for io in MODES {
        run_in(OsConfig { io, ..OsConfig::default() }, &test);
    }
}

/// Says when it is dropped, and may do something then.
struct OnDrop<F: FnMut()>(F);
impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

fn poll_once<T>(f: std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
    f.poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn tasks_run_in_turn_and_end_when_cancelled() {
    each(|env| async move {
        let log = Rc::new(RefCell::new(Vec::new()));
        let spawn = |n: u32| {
            let (log, env2) = (log.clone(), env.clone());
            env.spawn("t", async move {
                for round in 0..3 {
                    log.borrow_mut().push((round, n));
                    env2.yield_now().await;
                }
            })
        };
        let (a, b) = (spawn(1), spawn(2));
        a.join().await;
        b.join().await;
        assert_eq!(*log.borrow(), [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]);
        assert!(a.is_done());

        let dropped = Rc::new(Cell::new(false));
        let (d, env2) = (dropped.clone(), env.clone());
        let waits = env.spawn("waits", async move {
            let _guard = OnDrop(move || d.set(true));
            env2.sleep(Duration::from_secs(1000)).await;
        });
        env.yield_now().await;
        assert!(!waits.is_done());
        waits.cancel();
        assert!(dropped.get() && waits.is_done());
        waits.join().await;
        waits.cancel();
    });
}

#[test]
fn a_task_may_cancel_itself_and_spawn_while_dropped() {
    each(|env| async move {
        let handle: Rc<RefCell<Option<env::TaskHandle>>> = Rc::default();
        let (mine, ran, env2) = (handle.clone(), Rc::new(Cell::new(0)), env.clone());
        let ran2 = ran.clone();
        let t = env.spawn("suicide", async move {
            let (env3, ran3) = (env2.clone(), ran2.clone());
            let _guard = OnDrop(move || {
                let ran4 = ran3.clone();
                env3.spawn("child", async move { ran4.set(ran4.get() + 10) });
            });
            mine.borrow().as_ref().unwrap().cancel();
            ran2.set(ran2.get() + 1);
            env2.yield_now().await;
            unreachable!("polled after it was cancelled");
        });
        *handle.borrow_mut() = Some(t);
        env.sleep(Duration::from_millis(1)).await;
        assert_eq!(ran.get(), 11);
        assert!(handle.borrow().as_ref().unwrap().is_done());
    });
}

#[test]
fn dropping_an_executor_drops_its_tasks_and_what_they_start_then() {
    for io in MODES {
        let drops = Rc::new(Cell::new(0));
        let executor = start(OsConfig { io, ..OsConfig::default() });
        let env = executor.env();
        let (d, env2) = (drops.clone(), env.clone());
        executor.run(async move {
            let env3 = env2.clone();
            env2.spawn("left", async move {
                let (d2, env4) = (d.clone(), env3.clone());
                let _guard = OnDrop(move || {
                    d2.set(d2.get() + 1);
                    let d3 = d2.clone();
                    let inner = OnDrop(move || d3.set(d3.get() + 100));
                    env4.spawn("late", async move {
                        let _inner = inner;
                        std::future::pending::<()>().await;
                    });
                });
                env3.sleep(Duration::from_secs(1000)).await;
            });
            env2.yield_now().await;
        });
        assert_eq!(executor.waiting(), ["left"]);
        drop(executor);
        assert_eq!(drops.get(), 101);
        drop(env);
    }
}

#[test]
fn tasks_left_runnable_go_on_in_the_next_run() {
    let executor = start(OsConfig::default());
    let env = executor.env();
    let n = Rc::new(Cell::new(0));
    let (n2, env2) = (n.clone(), env.clone());
    executor.run(async move {
        env2.clone().spawn("counts", async move {
            loop {
                n2.set(n2.get() + 1);
                env2.yield_now().await;
            }
        });
    });
    let before = n.get();
    executor.run(async move { env.sleep(Duration::from_millis(1)).await });
    assert!(n.get() > before + 10);
}

#[test]
fn a_panic_in_a_task_leaves_the_thread_usable() {
    let executor = start(OsConfig::default());
    let caught =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| executor.run(async { panic!("oh") })));
    assert!(caught.is_err());
    drop(executor);
    let executor = start(OsConfig::default());
    let env = executor.env();
    executor.run(async move { env.sleep(Duration::from_millis(1)).await });
}

#[test]
fn timers_fire_in_order_not_early_and_not_when_dropped() {
    each(|env| async move {
        let log = Rc::new(RefCell::new(Vec::new()));
        let begin = Instant::now();
        let tasks: Vec<_> = [30u64, 10, 20, 10]
            .into_iter()
            .enumerate()
            .map(|(i, ms)| {
                let (env2, log) = (env.clone(), log.clone());
                env.spawn("sleeper", async move {
                    env2.sleep(Duration::from_millis(ms)).await;
                    log.borrow_mut().push(i);
                })
            })
            .collect();
        assert!(env.timeout(Duration::from_millis(5), env.sleep(Duration::from_secs(100))).await.is_none());
        assert_eq!(env.timeout(Duration::from_secs(100), async { 7 }).await, Some(7));
        for t in tasks {
            t.join().await;
        }
        assert_eq!(*log.borrow(), [1, 3, 2, 0]);
        assert!(begin.elapsed() >= Duration::from_millis(29));
        let start = env.now();
        env.sleep(Duration::MAX).await_or_drop(&env).await;
        assert!(env.now() - start < Duration::from_secs(1));
        assert_ne!(env.random(), env.random());
        assert!(env.wall() > Duration::from_secs(1_700_000_000));
    });
}

trait AwaitOrDrop: Future<Output = ()> + Sized {
    /// Polls a timer that never fires, then drops it.
    async fn await_or_drop(self, env: &Env) {
        assert!(env.timeout(Duration::from_millis(2), self).await.is_none());
    }
}
impl<F: Future<Output = ()>> AwaitOrDrop for F {}

#[test]
fn letters_from_other_threads_wake_a_sleeping_loop() {
    each(letters);
    // with polling before sleeping
    let poll = Duration::from_micros(40);
    MODES.into_iter().for_each(|io| run_in(OsConfig { io, poll, ..OsConfig::default() }, letters));
}

async fn letters(env: Env) {
    const THREADS: usize = 4;
    const EACH: usize = 5000;
    let (sender, mailbox) = env.mailbox::<(usize, usize)>();
    let threads: Vec<_> = (0..THREADS)
        .map(|t| {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for i in 0..EACH {
                    sender.send((t, i)).unwrap();
                    if i % 97 == 0 {
                        // lets the reader go to sleep now and then
                        std::thread::sleep(Duration::from_micros(50));
                    }
                }
            })
        })
        .collect();
    drop(sender);
    let mut next = [0; THREADS];
    while let Some((t, i)) = mailbox.recv().await {
        assert_eq!(next[t], i);
        next[t] += 1;
    }
    assert_eq!(next, [EACH; THREADS]);
    threads.into_iter().for_each(|t| t.join().unwrap());
    let (sender, mailbox) = env.mailbox::<u8>();
    drop(mailbox);
    assert_eq!(sender.send(3), Err(3));
}

#[test]
fn one_letter_at_a_time_never_gets_lost() {
    // each letter answers the one before: a lost wake-up would hang
    for io in MODES {
        let (to_b, rounds) = (std::sync::mpsc::channel(), 3000);
        let (tx, rx) = to_b;
        let echo = std::thread::spawn(move || {
            run_in(OsConfig { io, ..OsConfig::default() }, move |env| async move {
                let (sender, mailbox) = env.mailbox::<(u32, env::MailboxSender<u32>)>();
                tx.send(sender).unwrap();
                while let Some((n, back)) = mailbox.recv().await {
                    back.send(n + 1).unwrap();
                }
            });
        });
        let sender = rx.recv().unwrap();
        drop(rx);
        run_in(OsConfig { io, ..OsConfig::default() }, move |env| async move {
            let (back, mailbox) = env.mailbox::<u32>();
            for n in 0..rounds {
                sender.send((n, back.clone())).ok().unwrap();
                assert_eq!(mailbox.recv().await, Some(n + 1));
            }
        });
        echo.join().unwrap();
    }
}

#[test]
fn offloaded_work_comes_back_also_when_it_panics() {
    each(|env| async move {
        let peak = Arc::new(AtomicUsize::new(0));
        let now = Arc::new(AtomicUsize::new(0));
        let jobs: Vec<_> = (0..200u64)
            .map(|i| {
                let (env2, peak, now) = (env.clone(), peak.clone(), now.clone());
                env.spawn("job", async move {
                    let got = env2
                        .offload(move || {
                            let n = now.fetch_add(1, Ordering::SeqCst) + 1;
                            peak.fetch_max(n, Ordering::SeqCst);
                            std::thread::sleep(Duration::from_micros(100));
                            now.fetch_sub(1, Ordering::SeqCst);
                            i * 2
                        })
                        .await;
                    assert_eq!(got.unwrap(), i * 2);
                })
            })
            .collect();
        for j in jobs {
            j.join().await;
        }
        let limit = std::thread::available_parallelism().unwrap().get();
        assert!(peak.load(Ordering::SeqCst) <= limit);
        let e = env.offload(|| panic!("in a helper")).await.unwrap_err();
        assert_eq!(e.kind(), block::ErrorKind::Cancelled);
        // dropped before it has run
        drop(env.offload(|| std::thread::sleep(Duration::from_millis(2))));
        assert!(env.timeout(Duration::from_micros(1), env.offload(|| ())).await.is_none_or(|r| r.is_ok()));
    });
}

#[test]
fn results_that_come_while_the_loop_wakes_are_not_forgotten() {
    each(|env| async move {
        let tasks: Vec<_> = (0..3)
            .map(|_| {
                let env2 = env.clone();
                env.spawn("hops", async move {
                    for _ in 0..4000 {
                        env2.offload(|| ()).await.unwrap();
                    }
                })
            })
            .collect();
        for t in tasks {
            t.join().await;
        }
    });
}

#[test]
fn a_semaphore_serves_in_order_and_survives_dropped_waiters() {
    let s = Semaphore::new(2);
    let big = s.try_acquire(2).unwrap();
    let mut first = pin!(s.acquire(2));
    assert!(poll_once(first.as_mut()).is_pending());
    {
        let mut gone = pin!(s.acquire(1));
        assert!(poll_once(gone.as_mut()).is_pending());
    }
    let mut small = pin!(s.acquire(1));
    assert!(poll_once(small.as_mut()).is_pending());
    drop(big);
    assert!(s.try_acquire(1).is_none(), "the slots are the first waiter's");
    assert!(poll_once(small.as_mut()).is_pending(), "not before the large one");
    let Poll::Ready(got) = poll_once(first.as_mut()) else { panic!("granted") };
    drop(got);
    let Poll::Ready(got) = poll_once(small.as_mut()) else { panic!("granted") };
    assert_eq!(s.available(), 1);
    let mut large = Box::pin(s.acquire(2));
    assert!(poll_once(large.as_mut()).is_pending());
    assert!(s.try_acquire(1).is_none(), "somebody waits");
    drop(large);
    got.forget();
    s.release(1);
    // a waiter that is dropped after it was granted gives its slots to the next
    let all = s.try_acquire(2).unwrap();
    let mut b = Box::pin(s.acquire(1));
    {
        let mut a = Box::pin(s.acquire(2));
        assert!(poll_once(a.as_mut()).is_pending());
        assert!(poll_once(b.as_mut()).is_pending());
        drop(all);
        assert!(poll_once(b.as_mut()).is_pending());
    }
    assert!(poll_once(b.as_mut()).is_ready());
    drop(b);
    assert_eq!(s.available(), 2);
}

#[test]
fn notify_queue_and_oneshot_lose_nothing() {
    let n = Notify::new();
    {
        let mut a = Box::pin(n.wait());
        let mut b = Box::pin(n.wait());
        assert!(poll_once(a.as_mut()).is_pending() && poll_once(b.as_mut()).is_pending());
        assert!(n.notify_one());
        drop(a); // fired, never seen: b's now
        assert!(poll_once(b.as_mut()).is_ready());
    }
    assert_eq!(n.waiting(), 0);
    drop(n.wait());
    assert!(!n.notify_one());

    let q = Queue::new();
    let mut pop = Box::pin(q.pop());
    assert!(poll_once(pop.as_mut()).is_pending());
    q.push(1);
    drop(pop);
    let mut pop = Box::pin(q.pop());
    assert_eq!(poll_once(pop.as_mut()), Poll::Ready(Some(1)));
    drop(pop);
    q.push(2);
    q.close();
    assert_eq!(poll_once(pin!(q.pop())), Poll::Ready(Some(2)));
    assert_eq!(poll_once(pin!(q.pop())), Poll::Ready(None));

    let (tx, rx) = oneshot::<u8>();
    let mut rx = Box::pin(rx);
    assert!(poll_once(rx.as_mut()).is_pending());
    tx.send(5);
    assert_eq!(poll_once(rx.as_mut()), Poll::Ready(Some(5)));
    let (tx, rx) = oneshot::<u8>();
    drop(tx);
    assert_eq!(poll_once(pin!(rx)), Poll::Ready(None));
}

#[test]
fn executors_give_their_descriptors_back() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let one = |io| {
        let executor = start(OsConfig { io, ..OsConfig::default() });
        let env = executor.env();
        executor.run(async move {
            let env2 = env.clone();
            // woken and not polled again
            env.spawn("left", async move { env2.sleep(Duration::ZERO).await });
            env.offload(|| ()).await.unwrap();
        });
    };
    MODES.into_iter().for_each(one);
    let before = count();
    for _ in 0..50 {
        MODES.into_iter().for_each(one);
    }
    // other tests of this process open and close descriptors meanwhile
    assert!(count() < before + 40, "{before} before, {} after", count());
}

#[test]
fn a_timer_for_the_end_of_time_does_not_keep_the_loop_busy() {
    for io in MODES {
        let executor = start(OsConfig { io, ..OsConfig::default() });
        let env = executor.env();
        executor.run(async move {
            let (sender, mailbox) = env.mailbox::<()>();
            env.spawn("for ever", env.sleep(Duration::MAX));
            let thread = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(60));
                sender.send(()).unwrap();
            });
            let before = thread_cpu();
            assert_eq!(mailbox.recv().await, Some(()));
            assert!(thread_cpu() - before < Duration::from_millis(20));
            thread.join().unwrap();
        });
    }
}

fn thread_cpu() -> Duration {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut ts) };
    Duration::new(ts.tv_sec as u64, ts.tv_nsec as u32)
}

#[test]
fn polling_before_sleeping_finds_completions_too() {
    run_in(
        OsConfig { io: IoMode::Uring, poll: Duration::from_micros(50), ..OsConfig::default() },
        |env| async move {
            for _ in 0..100 {
                env.offload(|| ()).await.unwrap();
                env.sleep(Duration::from_micros(10)).await;
            }
            env.sleep(Duration::from_millis(1)).await;
        },
    );
}

#[test]
fn next_turn_lets_what_is_ready_go_first() {
    each(|env| async move {
        let steps = Rc::new(Cell::new(0));
        let (seen, other) = (steps.clone(), env.clone());
        let task = env.spawn("in turns", async move {
            loop {
                seen.set(seen.get() + 1);
                other.next_turn().await;
            }
        });
        for _ in 0..50 {
            env.yield_now().await;
        }
        // 128 polls make a turn, 100 have been made
        assert!(steps.get() <= 2, "{} steps within one turn", steps.get());
        // and it goes on without anything happening outside
        for _ in 0..5 {
            env.next_turn().await;
        }
        assert!(steps.get() >= 5, "{} steps", steps.get());
        task.cancel();
    });
}
