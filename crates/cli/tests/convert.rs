//! `liveblk convert`: what comes out is what went in, by QEMU's word, in every form; and what goes wrong is said.

#![allow(clippy::unwrap_used)] // a test helper that fails fails the test

mod common;

use common::Dir;

/// Bytes on the host.
fn allocated(dir: &Dir, file: &str) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(dir.0.join(file)).unwrap().blocks() * 512
}

/// A chain with data, zeroes and holes.
fn source(dir: &Dir) {
    dir.tool("qemu-img", "create|-q|-f|qcow2|base.qcow2|64M");
    dir.tool("qemu-io", "-f|qcow2|-c|write -P 9 0 5M|base.qcow2");
    dir.tool("qemu-img", "create|-q|-f|qcow2|-b|base.qcow2|-F|qcow2|s.qcow2|64M");
    dir.tool("qemu-io", "-f|qcow2|-c|write -P 3 3M 4M|-c|write -z 4M 1M|-c|write -P 7 63M 1000k|s.qcow2");
}

#[test]
fn all_forms_have_the_same_contents() {
    let dir = Dir::new("convert");
    source(&dir);
    for (from, to, options) in [
        ("s.qcow2", "o.raw", "-O|raw"),
        ("s.qcow2", "c.qcow2", "-c"),
        ("s.qcow2", "z.qcow2", "-c|-o|compression-type=zstd|-o|cluster_size=131072"),
        ("o.raw", "again.qcow2", "-f|raw|-o|lazy-refcounts=on"),
        ("z.qcow2", "back.raw", "-O|raw"),
    ] {
        let out = dir.liveblk(&format!("convert|{from}|{to}|{options}"));
        assert!(out.status.success(), "{to}: {}", String::from_utf8_lossy(&out.stderr));
        dir.tool("qemu-img", &format!("compare|-q|s.qcow2|{to}"));
        if to.ends_with("qcow2") {
            dir.tool("qemu-img", &format!("check|-q|{to}"));
        }
    }
    // 9 MiB are not zero; that they compress well shows, too
    assert!(allocated(&dir, "o.raw") < 12 << 20 && allocated(&dir, "back.raw") < 12 << 20);
    assert!(allocated(&dir, "c.qcow2") < 2 << 20);
    let info = dir.tool("qemu-img", "info|z.qcow2");
    assert!(info.contains("compression type: zstd") && info.contains("cluster_size: 131072"), "{info}");
}

#[test]
fn what_cannot_be_done_is_said() {
    let dir = Dir::new("convert-not");
    source(&dir);
    for (line, want) in [
        ("convert|s.qcow2|o.raw|-O|raw|-c", "cannot be compressed"),
        ("convert|nope|o.raw", "cannot open nope"),
        ("convert|s.qcow2|s.qcow2", "is the source itself"),
        ("convert|s.qcow2|o.qcow2|-o|cluster_size=1000", "Cluster size must be a power of two"),
        ("convert|s.qcow2|no/o.qcow2", "No such file or directory"),
        ("convert|s.qcow2|o.qcow2|-o|nonsense", "expected NAME=VALUE"),
    ] {
        let out = dir.liveblk(line);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains(want), "{line}: {said}");
    }
    dir.tool("qemu-img", "check|-q|s.qcow2");
}
