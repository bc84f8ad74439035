//! The reference's tools as peers, and a small random generator.
#![allow(dead_code)] // each test binary uses its own part

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A directory that is removed at the end.
pub(crate) struct TempDir(pub PathBuf);

impl TempDir {
    pub(crate) fn new(name: &str) -> TempDir {
        let base =
            if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
        let dir = base.join(format!("liveblk-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        TempDir(dir)
    }
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn run(dir: &Path, program: &str, args: &[&str]) -> Output {
    Command::new(program).current_dir(dir).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"))
}

/// Runs and expects success.
pub(crate) fn ok(dir: &Path, program: &str, args: &[&str]) {
    let out = run(dir, program, args);
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(out.status.success(), "{program} {args:?}: {}{}", text(&out.stdout), text(&out.stderr));
}

/// What `qemu-img check` says.
#[derive(Debug, PartialEq, Clone, Default)]
pub(crate) struct Verdict {
    /// Exit status: 0 clean, 1 could not check, 2 corrupt, 3 leaks.
    pub status: i32,
    pub corruptions: u64,
    pub leaks: u64,
    pub check_errors: u64,
    pub allocated: u64,
    pub fragmented: u64,
    pub compressed: u64,
    pub end: u64,
    pub stderr: String,
}

pub(crate) fn qemu_check(dir: &Path, file: &str) -> Verdict {
    let out = run(dir, "qemu-img", &["check", "-f", "qcow2", "--output", "json", file]);
    let j: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
    let n = |k: &str| j[k].as_u64().unwrap_or(0);
    Verdict {
        status: out.status.code().unwrap_or(-1),
        corruptions: n("corruptions"),
        leaks: n("leaks"),
        check_errors: n("check-errors"),
        allocated: n("allocated-clusters"),
        fragmented: n("fragmented-clusters"),
        compressed: n("compressed-clusters"),
        end: n("image-end-offset"),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

/// xorshift64*: repeatable, good enough to pick fields.
pub(crate) struct Rng(pub u64);

impl Rng {
    /// From `LIVEBLK_SEED`, or fixed; printed by the caller.
    pub(crate) fn from_env(default: u64) -> Rng {
        let seed = std::env::var("LIVEBLK_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(default);
        println!("seed {seed} (set LIVEBLK_SEED to change)");
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n.max(1)
    }
    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}
