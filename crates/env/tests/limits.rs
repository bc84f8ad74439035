//! Limits of the process: file size and descriptors. One test, in a binary of its own: the limits hold for the whole process.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;
use block::{BlockError, Data, Span};
use common::{Dir, MODES, pattern, run_in};
use env::os::OsConfig;
use env::{Address, Existing, OpenMode};
use std::rc::Rc;
use std::time::Duration;

#[allow(clippy::useless_conversion, reason = "the type of the resource differs between C libraries")]
fn set_limit(resource: libc::__rlimit_resource_t, value: u64) -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is valid for both calls.
    unsafe {
        assert_eq!(libc::getrlimit(resource, &raw mut limit), 0);
        let old = std::mem::replace(&mut limit.rlim_cur, value);
        assert_eq!(libc::setrlimit(resource, &raw const limit), 0);
        old
    }
}

#[test]
fn limits_are_errors_and_pass() {
    for io in MODES {
        for base in ["/dev/shm", "/var/tmp"] {
            let dir = Dir::new(base);
            run_in(OsConfig { io, ..OsConfig::default() }, |env| file_size(env, dir));
        }
        let dir = Dir::new("/dev/shm");
        run_in(OsConfig { io, ..OsConfig::default() }, |env| descriptors(env, dir));
    }
}

async fn file_size(env: env::Env, dir: Dir) {
    let create = OpenMode { write: true, existing: Existing::CreateTruncate, ..OpenMode::default() };
    let f = env.open(&dir.path("f"), create).await.unwrap();
    let old = set_limit(libc::RLIMIT_FSIZE, 1 << 20);
    for len in [64 << 10, 4 << 20] {
        // the first part fits: a short write, then the error
        let e = f.write((1 << 20) - 1000, Data::from(pattern(0, len))).await.unwrap_err();
        assert_eq!(e.errno(), BlockError::EFBIG);
    }
    assert_eq!(f.read(Span::new((1 << 20) - 1000, 1000)).await.unwrap().to_vec(), pattern(0, 1000));
    set_limit(libc::RLIMIT_FSIZE, old);
    f.write(1 << 20, Data::from(pattern(0, 4 << 20))).await.unwrap();
}

async fn descriptors(env: env::Env, dir: Dir) {
    let listener = env.listen(&Address::Unix(dir.path("s"))).await.unwrap();
    let clients: Vec<_> =
        (0..5).map(|_| std::os::unix::net::UnixStream::connect(dir.path("s")).unwrap()).collect();
    let used = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    let old = set_limit(libc::RLIMIT_NOFILE, used);
    let accepted = Rc::new(std::cell::Cell::new(0));
    let n = accepted.clone();
    let task = env.spawn("accept", async move {
        for _ in 0..5 {
            std::mem::forget(listener.accept().await.unwrap());
            n.set(n.get() + 1);
        }
    });
    let before = cpu();
    env.sleep(Duration::from_millis(150)).await;
    assert!(accepted.get() < 5);
    assert!(cpu() - before < Duration::from_millis(50), "it spins");
    let e = env.open(&dir.path("s"), OpenMode::default()).await.err().unwrap();
    assert!([BlockError::EMFILE, BlockError::ENXIO].contains(&e.errno()), "{e:?}");
    set_limit(libc::RLIMIT_NOFILE, old);
    task.join().await;
    drop(clients);
}

fn cpu() -> Duration {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut ts) };
    Duration::new(ts.tv_sec as u64, ts.tv_nsec as u32)
}
