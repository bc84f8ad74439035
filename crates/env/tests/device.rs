//! A real block device: a loop device over a file. Needs root, so it runs only when asked: `cargo test -p env -- --ignored`.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;
use block::{Data, Kind, Span};
use common::{Dir, MODES, pattern, run_in};
use env::os::OsConfig;
use env::{FileKind, OpenMode, Punch};
use std::path::{Path, PathBuf};
use std::process::Command;

const LEN: u64 = 16 << 20;

struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path) -> Loop {
        std::fs::File::create(file).unwrap().set_len(LEN).unwrap();
        let out = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        Loop(PathBuf::from(String::from_utf8(out.stdout).unwrap().trim()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
#[ignore = "needs root and a loop device"]
fn a_block_device_reads_writes_zeroes_and_discards() {
    for io in MODES {
        for direct in [false, true] {
            let dir = Dir::new("/var/tmp");
            let device = Loop::over(&dir.path("disk"));
            let path = device.0.clone();
            run_in(OsConfig { io, ..OsConfig::default() }, |env| async move {
                let f =
                    env.open(&path, OpenMode { write: true, direct, ..OpenMode::default() }).await.unwrap();
                let info = f.info().await.unwrap();
                assert_eq!((info.kind, info.len, f.len_hint()), (FileKind::BlockDevice, LEN, LEN));
                assert!(!direct || info.alignment >= 512);
                let data = Data::from(pattern(1, 1 << 20));
                f.write(LEN - (1 << 20), data.clone()).await.unwrap();
                assert_eq!(f.read(Span::new(LEN - (1 << 20), 1 << 20)).await.unwrap(), data);
                assert!(f.read(Span::new(LEN, 4096)).await.unwrap().is_zero(), "past the end");
                assert!(f.write(LEN, Data::zeroes(4096)).await.is_err());
                f.write(0, data.clone()).await.unwrap();
                f.zero(Span::new(0, 65536), Punch::Release).await.unwrap();
                f.zero(Span::new(131_072, 65536), Punch::Keep).await.unwrap();
                f.barrier().await.unwrap();
                let back = f.read(Span::new(0, 262_144)).await.unwrap();
                assert!(back.slice(0, 65536).is_zero() && back.slice(131_072, 65536).is_zero());
                assert_eq!(back.slice(65536, 65536), data.slice(65536, 65536));
                f.discard(Span::new(524_288, 65536)).await.unwrap();
                let e = f.extents(Span::new(0, LEN + 512)).await.unwrap();
                assert_eq!((e[0].span.len, e[0].kind, e[1].kind), (LEN, Kind::Data, Kind::Zero));
                assert!(f.set_len(0).await.is_err());
            });
        }
    }
}
