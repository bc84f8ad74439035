//! A disk of 16 TiB with little in it: mirrored, backed up and committed while its client writes, in the time of its data. A walk over
//! what is not there, by cluster or by table, does not end within the limit of `Client`; a target that was filled is seen by its blocks.
//!
//! `cargo xtask vast` measures the same with 1 GiB of data; `tests/vast.py` does so of qemu-storage-daemon, too.

use crate::common::{Client, Daemon, Dir};
use crate::disk::{tool, until};
use crate::mirrors::{DISK, image, serve};
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt;

/// (format, bytes of the disk): a file of ext4 is shorter than 16 TiB.
const DISKS: [(&str, &str); 2] = [("qcow2", "16T"), ("raw", "16383G")];
/// Places with 1 MiB of data each, so far apart, in GiB.
const PLACES: u64 = 64;
const APART: u64 = 255;
/// What a target with 64 MiB of data may take at most, in bytes.
const MOST: u64 = 96 << 20;

fn create(dir: &Dir, (format, size): (&str, &str), name: &str) {
    tool(dir, &format!("qemu-img|create|-q|-f|{format}|{name}|{size}"));
}

/// Fills the places of `name`, from 1 MiB times `shift` behind each on.
fn fill(dir: &Dir, format: &str, name: &str, shift: u64) {
    let write = |i: u64| format!("|-c|write -q -P {} {}M 1M", i + shift * 100 + 1, i * APART * 1024 + shift);
    let writes: String = (0..PLACES).map(write).collect();
    tool(dir, &format!("qemu-io|-f|{format}{writes}|{name}"));
}

/// What the client writes meanwhile: into data, and where nothing was, at the disk's far end.
const MEANWHILE: &str = "|-c|write -P 0xaa 64k 100k|-c|write -z 261121M 128k|-c|write -P 0xbb 16382G 50k";

fn client_writes(dir: &Dir) {
    tool(dir, &format!("qemu-io|-f|raw{MEANWHILE}|{DISK}"));
}

fn quit(mut daemon: Daemon, mut c: Client) {
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
}

/// `file` shows what `oracle` does, is sound, and takes no more than its data.
fn equal(dir: &Dir, format: &str, oracle: &str, file: &str) {
    tool(dir, &format!("qemu-img|compare|-f|qcow2|-F|{format}|{oracle}|{file}"));
    if format == "qcow2" {
        tool(dir, &format!("qemu-img|check|-q|{file}"));
    }
    let taken = std::fs::metadata(dir.path(file)).unwrap().blocks() * 512;
    assert!(taken < MOST, "{file}: {taken} bytes on disk");
}

/// Runs job "j" until it rests, with the client's writes while it runs.
fn job(dir: &Dir, c: &mut Client, command: &str, mut arguments: Value) {
    arguments["job-id"] = json!("j");
    arguments["auto-dismiss"] = json!(false);
    c.command(command, arguments).unwrap();
    client_writes(dir);
    if command != "blockdev-backup" {
        until(c, "j", "BLOCK_JOB_READY");
        c.command("job-complete", json!({"id": "j"})).unwrap();
    }
    until(c, "j", "concluded");
    let jobs = c.command("query-jobs", json!({})).unwrap();
    assert_eq!(jobs[0].get("error"), None, "{jobs}");
    c.command("job-dismiss", json!({"id": "j"})).unwrap();
}

#[test]
fn mirrored() {
    for disk @ (format, _) in DISKS {
        for mode in ["background", "write-blocking"] {
            let dir = Dir::new();
            create(&dir, disk, "src");
            create(&dir, disk, "dst");
            fill(&dir, format, "src", 0);
            tool(&dir, &format!("qemu-img|convert|-f|{format}|-O|qcow2|src|oracle"));
            let (daemon, mut c) = serve(&dir, &image(format, "src"), &image(format, "dst"));
            let arguments = json!({"device": "src", "target": "dst", "sync": "full", "copy-mode": mode});
            job(&dir, &mut c, "blockdev-mirror", arguments);
            quit(daemon, c);
            tool(&dir, &format!("qemu-io|-f|qcow2{MEANWHILE}|oracle"));
            equal(&dir, format, "oracle", "dst");
        }
    }
}

#[test]
fn backed_up() {
    for disk @ (format, _) in DISKS {
        let dir = Dir::new();
        create(&dir, disk, "src");
        create(&dir, disk, "dst");
        fill(&dir, format, "src", 0);
        tool(&dir, &format!("qemu-img|convert|-f|{format}|-O|qcow2|src|oracle"));
        let (daemon, mut c) = serve(&dir, &image(format, "src"), &image(format, "dst"));
        job(&dir, &mut c, "blockdev-backup", json!({"device": "src", "target": "dst", "sync": "full"}));
        quit(daemon, c);
        equal(&dir, format, "oracle", "dst");
    }
}

/// What lies in the active layer goes down into a base of either format that holds something elsewhere.
#[test]
fn committed() {
    for disk @ (format, _) in DISKS {
        let dir = Dir::new();
        create(&dir, disk, "base");
        fill(&dir, format, "base", 1);
        tool(&dir, &format!("qemu-img|create|-q|-f|qcow2|-b|base|-F|{format}|top"));
        fill(&dir, "qcow2", "top", 0);
        tool(&dir, "qemu-img|convert|-f|qcow2|-O|qcow2|top|oracle");
        let mut base = image(format, "base");
        base["node-name"] = json!("base");
        let mut top = image("qcow2", "top");
        top["node-name"] = json!("top");
        top["backing"] = json!("base");
        let (base, top) = (base.to_string(), top.to_string());
        let (server, export) =
            ("addr.type=unix,addr.path=nbd.sock", "nbd,id=e0,node-name=top,name=disk,writable=on");
        let words = ["--blockdev", &base, "--blockdev", &top, "--nbd-server", server, "--export", export];
        let daemon = Daemon::start(&dir, &words);
        let mut c = daemon.client();
        job(&dir, &mut c, "block-commit", json!({"device": "top"}));
        quit(daemon, c);
        tool(&dir, &format!("qemu-io|-f|qcow2{MEANWHILE}|oracle"));
        tool(&dir, &format!("qemu-img|compare|-f|qcow2|-F|{format}|oracle|base"));
        if format == "qcow2" {
            tool(&dir, "qemu-img|check|-q|base");
        }
    }
}
