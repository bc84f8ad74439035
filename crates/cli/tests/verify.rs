//! `liveblk verify`: of images in any format and of exports, by word and by exit status.

#![allow(clippy::unwrap_used)] // a test helper that fails fails the test

mod common;

use common::Dir;
use std::process::Command;

/// Whether it ended well, what it printed, what it complained of.
fn liveblk(dir: &Dir, line: &str) -> (bool, String, String) {
    let out = dir.liveblk(line);
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (out.status.success(), text(&out.stdout), text(&out.stderr))
}

#[test]
fn images_and_exports() {
    let dir = Dir::new("verify");
    dir.tool("qemu-img", "create|-q|-f|qcow2|a.qcow2|64M");
    dir.tool("qemu-io", "-f|qcow2|-c|write -P 9 0 5M|-c|write -P 7 63M 1000k|a.qcow2");
    dir.tool("qemu-img", "convert|-f|qcow2|-O|raw|a.qcow2|b.raw");
    dir.tool("qemu-img", "convert|-c|-f|qcow2|-O|qcow2|a.qcow2|c.qcow2");
    let (good, said, why) = liveblk(&dir, "verify|a.qcow2|b.raw");
    assert!(good, "{why}");
    let digest = said.lines().last().unwrap().to_owned();
    assert!(digest.starts_with("equal, digest lbd1:"), "{said}");
    let (good, said, _) = liveblk(&dir, "verify|c.qcow2|b.raw");
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
    let (good, said, why) = liveblk(&dir, "verify|c.qcow2|nbd+unix:///?socket=nbd.sock");
    assert!(good && said.ends_with(&format!("{digest}\n")), "{said}{why}");
    let _ = server.kill();
    let _ = server.wait();

    dir.tool("qemu-io", "-f|raw|-c|write -P 1 3M 1|-c|write -P 1 40M 1|b.raw");
    let (good, said, why) = liveblk(&dir, "verify|c.qcow2|b.raw");
    assert!(!good && why.contains("c.qcow2 and b.raw differ: 2 places, 2 bytes"), "{why}");
    for place in ["differ at offset 3145728, 1 bytes", "differ at offset 41943040, 1 bytes"] {
        assert!(said.contains(place), "{said}");
    }
    let (good, said, why) = liveblk(&dir, "verify|c.qcow2|b.raw|--repair");
    assert!(
        good && said.contains(&digest.replace("equal,", "equal (2 regions of 64 KiB repaired),")),
        "{said}{why}"
    );
    let (good, said, _) = liveblk(&dir, "verify|c.qcow2|b.raw|--sample|10|--seed|7");
    assert!(good && said.contains("equal in the sample") && said.contains("share 10 %, seed 7"), "{said}");
    let (good, _, why) = liveblk(&dir, "verify|c.qcow2|missing");
    assert!(!good && why.contains("missing"), "{why}");
}

#[test]
fn a_mirror_is_proven() {
    let dir = Dir::new("proven");
    dir.tool("qemu-img", "create|-q|-f|qcow2|a.qcow2|64M");
    dir.tool("qemu-io", "-f|qcow2|-c|write -P 9 0 5M|a.qcow2");
    let (good, said, why) = liveblk(&dir, "mirror|a.qcow2|b.qcow2");
    assert!(good && said.contains("b.qcow2 is a copy of a.qcow2\nproven equal, digest lbd1:"), "{said}{why}");
    let digest = said.lines().last().unwrap();
    let (good, said, why) = liveblk(&dir, "convert|a.qcow2|c.qcow2|-c");
    assert!(good && said.ends_with(&format!("c.qcow2 is a.qcow2 as qcow2\n{digest}\n")), "{said}{why}");
    let (good, said, why) = liveblk(&dir, "convert|a.qcow2|d.raw|-O|raw|--verify|off");
    assert!(good && !said.contains("digest"), "{said}{why}");
}
