//! What tests of `liveblk` share: a directory to work in, and a daemon beside the command.
#![allow(dead_code)] // each test binary uses its own part

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A directory that goes with its test. Lines are split at `|`.
pub(crate) struct Dir(pub(crate) PathBuf);

impl Dir {
    pub(crate) fn new(name: &str) -> Dir {
        let path = std::env::temp_dir().join(format!("liveblk-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Dir(path)
    }

    pub(crate) fn run(&self, program: &str, line: &str) -> Output {
        Command::new(program).args(line.split('|')).current_dir(&self.0).output().unwrap()
    }

    /// What it says; it must succeed.
    pub(crate) fn tool(&self, program: &str, line: &str) -> String {
        let out = self.run(program, line);
        assert!(out.status.success(), "{program} {line}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    pub(crate) fn liveblk(&self, line: &str) -> Output {
        daemon();
        self.run(env!("CARGO_BIN_EXE_liveblk"), line)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The command starts the liveblkd beside it, which tests of this package alone do not build.
pub(crate) fn daemon() {
    let beside = Path::new(env!("CARGO_BIN_EXE_liveblk")).with_file_name("liveblkd");
    if !beside.exists() {
        let built = Command::new(env!("CARGO")).args(["build", "-q", "-p", "daemon", "--bins"]).status();
        assert!(built.unwrap().success() && beside.exists());
    }
}
