//! Runs a test in every mode and on every kind of file system.
#![allow(dead_code, clippy::unwrap_used, reason = "tests; not every file uses all of it")]

use env::Env;
use env::os::{IoMode, OsConfig, start};
use std::future::Future;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A directory that is removed at the end.
pub(crate) struct Dir(PathBuf);

impl Dir {
    pub(crate) fn new(base: &str) -> Dir {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let p = PathBuf::from(base).join(format!("liveblk-env-{}-{n}", std::process::id()));
        std::fs::create_dir(&p).unwrap();
        Dir(p)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) const MODES: [IoMode; 2] = [IoMode::Uring, IoMode::Threads];

/// Runs `test` in one mode; it must end within a time that only a hang exceeds.
pub(crate) fn run_in<F: Future<Output = ()> + 'static>(config: OsConfig, test: impl FnOnce(Env) -> F) {
    let executor = start(config);
    let env = executor.env();
    let body = test(env.clone());
    executor.run(async move {
        let ended = env.timeout(Duration::from_secs(30), body).await;
        assert!(ended.is_some(), "hangs in {config:?}");
    });
}

/// Runs `test` in each mode on tmpfs and on a disk.
pub(crate) fn each<F: Future<Output = ()> + 'static>(test: impl Fn(Env, Rc<Dir>) -> F) {
    for base in ["/dev/shm", "/var/tmp"] {
        for io in MODES {
            let dir = Rc::new(Dir::new(base));
            run_in(OsConfig { io, ..OsConfig::default() }, |env| test(env, dir));
        }
    }
}

/// Bytes that tell where they belong.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| ((seed + i).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}
