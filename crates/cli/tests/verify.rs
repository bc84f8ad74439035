//! `liveblk verify`: of images in any format and of exports, by word and by exit status.

#![allow(clippy::unwrap_used)] // a test helper that fails fails the test

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let path = std::env::temp_dir().join(format!("liveblk-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Dir(path)
    }

    fn run(&self, program: &str, line: &str) -> Output {
        Command::new(program).args(line.split('|')).current_dir(&self.0).output().unwrap()
    }

    fn tool(&self, program: &str, line: &str) {
        let out = self.run(program, line);
        assert!(out.status.success(), "{program} {line}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// Exit status, what it printed last, what it complained of.
    fn liveblk(&self, line: &str) -> (bool, String, String) {
        let beside = Path::new(env!("CARGO_BIN_EXE_liveblk")).with_file_name("liveblkd");
        if !beside.exists() {
            let built = Command::new(env!("CARGO")).args(["build", "-q", "-p", "daemon", "--bins"]).status();
            assert!(built.unwrap().success() && beside.exists());
        }
        let out = self.run(env!("CARGO_BIN_EXE_liveblk"), line);
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        (out.status.success(), text(&out.stdout), text(&out.stderr))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn images_and_exports() {
    let dir = Dir::new("verify");
    dir.tool("qemu-img", "create|-q|-f|qcow2|a.qcow2|64M");
    dir.tool("qemu-io", "-f|qcow2|-c|write -P 9 0 5M|-c|write -P 7 63M 1000k|a.qcow2");
    dir.tool("qemu-img", "convert|-f|qcow2|-O|raw|a.qcow2|b.raw");
    dir.tool("qemu-img", "convert|-c|-f|qcow2|-O|qcow2|a.qcow2|c.qcow2");
    let (good, said, why) = dir.liveblk("verify|a.qcow2|b.raw");
    assert!(good, "{why}");
    let digest = said.lines().last().unwrap().to_owned();
    assert!(digest.starts_with("equal, digest lbd1:"), "{said}");
    let (good, said, _) = dir.liveblk("verify|c.qcow2|b.raw");
    assert!(good && said.ends_with(&format!("{digest}\n")), "{said}");
    // another server's export
    let mut server = Command::new("qemu-nbd")
        .args(["-r", "-t", "-f", "qcow2", "a.qcow2", "-k"])
        .arg(dir.0.join("nbd.sock"))
        .current_dir(&dir.0)
        .spawn()
        .unwrap();
    while std::os::unix::net::UnixStream::connect(dir.0.join("nbd.sock")).is_err() {
        assert_eq!(server.try_wait().unwrap(), None, "qemu-nbd ended");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let (good, said, why) = dir.liveblk("verify|c.qcow2|nbd+unix:///?socket=nbd.sock");
    assert!(good && said.ends_with(&format!("{digest}\n")), "{said}{why}");
    let _ = server.kill();
    let _ = server.wait();

    dir.tool("qemu-io", "-f|raw|-c|write -P 1 3M 1|-c|write -P 1 40M 1|b.raw");
    let (good, said, why) = dir.liveblk("verify|c.qcow2|b.raw");
    assert!(!good && why.contains("c.qcow2 and b.raw differ: 2 places, 2 bytes"), "{why}");
    for place in ["differ at offset 3145728, 1 bytes", "differ at offset 41943040, 1 bytes"] {
        assert!(said.contains(place), "{said}");
    }
    let (good, said, why) = dir.liveblk("verify|c.qcow2|b.raw|--repair");
    assert!(
        good && said.contains(&digest.replace("equal,", "equal (2 regions of 64 KiB repaired),")),
        "{said}{why}"
    );
    let (good, said, _) = dir.liveblk("verify|c.qcow2|b.raw|--sample|10|--seed|7");
    assert!(good && said.contains("equal in the sample") && said.contains("share 10 %, seed 7"), "{said}");
    let (good, _, why) = dir.liveblk("verify|c.qcow2|missing");
    assert!(!good && why.contains("missing"), "{why}");
}

#[test]
fn a_mirror_is_proven() {
    let dir = Dir::new("proven");
    dir.tool("qemu-img", "create|-q|-f|qcow2|a.qcow2|64M");
    dir.tool("qemu-io", "-f|qcow2|-c|write -P 9 0 5M|a.qcow2");
    let (good, said, why) = dir.liveblk("mirror|a.qcow2|b.qcow2");
    assert!(good && said.contains("b.qcow2 is a copy of a.qcow2\nproven equal, digest lbd1:"), "{said}{why}");
    let digest = said.lines().last().unwrap();
    let (good, said, why) = dir.liveblk("convert|a.qcow2|c.qcow2|-c");
    assert!(good && said.ends_with(&format!("c.qcow2 is a.qcow2 as qcow2\n{digest}\n")), "{said}{why}");
    let (good, said, why) = dir.liveblk("convert|a.qcow2|d.raw|-O|raw|--verify|off");
    assert!(good && !said.contains("digest"), "{said}{why}");
}
