//! Long chains and vast disks: what nobody allocated costs no time.

use super::{compare, header, job, served};
use crate::common::{Client, Daemon, Dir};
use crate::disk::{tool, until};
use crate::mirrors::{DISK, Writer};
use serde_json::{Value, json};

const CLUSTER: usize = 65536;

/// Images `000.qcow2` to number `layers - 1` of 16 MiB. Each but the first holds one cluster, filled with its number; they are one
/// image that QEMU made, with the name of the backing file and the place of the cluster changed.
fn long_chain(dir: &Dir, layers: usize) {
    tool(dir, "qemu-img|create|-q|-f|qcow2|000.qcow2|16M");
    tool(dir, "qemu-io|-f|qcow2|-c|write -P 1 0 16M|000.qcow2");
    tool(dir, "qemu-img|create|-q|-f|qcow2|-b|000.qcow2|-F|qcow2|template");
    tool(dir, "qemu-io|-f|qcow2|-c|write -P 2 0 64k|template");
    let template = std::fs::read(dir.path("template")).unwrap();
    let word = |at: usize| {
        (u64::from_be_bytes(template[at..at + 8].try_into().unwrap()) & !(0x1ff | 3 << 62)) as usize
    };
    let l2 = word(word(40));
    let (data, name) = (word(l2), template.windows(9).position(|w| w == b"000.qcow2").unwrap());
    for n in 1..layers {
        let mut image = template.clone();
        image[name..name + 3].copy_from_slice(format!("{:03}", n - 1).as_bytes());
        let place = l2 + 8 * (n * 7 % 256);
        image.copy_within(l2..l2 + 8, place);
        if place > l2 {
            image[l2..l2 + 8].fill(0);
        }
        image[data..data + CLUSTER].fill(n as u8);
        std::fs::write(dir.path(&format!("{n:03}.qcow2")), image).unwrap();
    }
    tool(dir, &format!("qemu-img|convert|-O|raw|{:03}.qcow2|model.raw", layers - 1));
}

/// The images as nodes `n0` and up, the last one served.
fn serve(dir: &Dir, files: &[String]) -> (Daemon, Client) {
    let mut nodes = Vec::new();
    for (n, file) in files.iter().enumerate() {
        let backing = if n > 0 { json!(format!("n{}", n - 1)) } else { Value::Null };
        let format = file.rsplit_once('.').unwrap().1;
        let mut node = json!({"driver": format, "node-name": format!("n{n}"), "read-only": n + 1 < files.len(),
            "file": {"driver": "file", "filename": file, "auto-read-only": true}});
        if format == "qcow2" {
            node["backing"] = backing;
        }
        nodes.push(node);
    }
    served(dir, &nodes)
}

fn run(c: &mut Client, command: &str, arguments: Value) {
    c.command(command, arguments).unwrap();
    until(c, "j", "concluded");
    assert_eq!(job(c).get("error"), None, "{command}");
    c.command("job-dismiss", json!({"id": "j"})).unwrap();
}

/// 100 of 200 layers go down in the middle of the chain, then all come up into one, under a client that writes throughout.
#[test]
fn two_hundred_layers() {
    let dir = Dir::new();
    long_chain(&dir, 200);
    let files: Vec<String> = (0..200).map(|n| format!("{n:03}.qcow2")).collect();
    let before: Vec<Vec<u8>> = files.iter().map(|f| std::fs::read(dir.path(f)).unwrap()).collect();
    let (mut daemon, mut c) = serve(&dir, &files);
    let writer = Writer::start(&dir, DISK, &["4", "300"]);
    let commit = json!({"job-id": "j", "device": "n199", "top-node": "n150", "base-node": "n50", "auto-dismiss": false});
    run(&mut c, "block-commit", commit);
    assert_eq!(header(&dir, "151.qcow2"), (json!("050.qcow2"), json!("qcow2")));
    run(&mut c, "block-stream", json!({"job-id": "j", "device": "n199", "auto-dismiss": false}));
    writer.stop();
    assert_eq!(header(&dir, "199.qcow2"), (Value::Null, Value::Null));
    compare(&dir, &mut daemon, &mut c, "199.qcow2", &["199.qcow2", "151.qcow2", "050.qcow2"]);
    // nobody wrote to any other
    for (n, file) in files.iter().enumerate().filter(|(n, _)| ![50, 151, 199].contains(n)) {
        assert!(std::fs::read(dir.path(file)).unwrap() == before[n], "{file} has changed");
    }
}

/// A disk of 16 TiB (1 TiB above a raw file) with a few MiB here and there: committed in the middle, then streamed.
#[test]
fn vast_and_sparse() {
    for base in ["qcow2", "raw"] {
        let (size, far) = if base == "qcow2" { ("16T", 15) } else { ("1T", 0) };
        let dir = Dir::new();
        tool(&dir, &format!("qemu-img|create|-q|-f|{base}|0.{base}|{size}"));
        tool(&dir, &format!("qemu-img|create|-q|-f|qcow2|-b|0.{base}|-F|{base}|1.qcow2"));
        tool(&dir, "qemu-img|create|-q|-f|qcow2|-b|1.qcow2|-F|qcow2|2.qcow2");
        let places: Vec<String> = (0..8).map(|i| format!("{}G", far * 1024 + i * 100 + 1)).collect();
        let mut fill = format!("qemu-io|-f|{base}|0.{base}");
        places.iter().step_by(2).for_each(|p| fill += &format!("|-c|write -P 9 {p} 2M"));
        tool(&dir, &fill);
        let mut fill = "qemu-io|-f|qcow2|1.qcow2".to_owned();
        places.iter().for_each(|p| fill += &format!("|-c|write -P 7 {p} 1M"));
        tool(&dir, &fill);
        let files = [format!("0.{base}"), "1.qcow2".to_owned(), "2.qcow2".to_owned()];
        let (mut daemon, mut c) = serve(&dir, &files);
        let commit = json!({"job-id": "j", "device": "n2", "top-node": "n1", "base-node": "n0", "auto-dismiss": false});
        run(&mut c, "block-commit", commit);
        run(&mut c, "block-stream", json!({"job-id": "j", "device": "n2", "auto-dismiss": false}));
        let mut check = "qemu-io|-f|raw".to_owned();
        for (i, p) in places.iter().enumerate() {
            check += &format!("|-c|read -P 7 {p} 1M");
            let gib: u64 = p.trim_end_matches('G').parse().unwrap();
            let behind = if i % 2 == 0 { 9 } else { 0 };
            check += &format!("|-c|read -P {behind} {}M 1M", gib * 1024 + 1);
        }
        tool(&dir, &format!("{check}|{DISK}"));
        c.command("quit", json!({})).unwrap();
        assert!(daemon.wait().success());
        tool(&dir, "qemu-img|check|-q|2.qcow2");
        let on_disk =
            std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(dir.path("2.qcow2")).unwrap()) * 512;
        assert!(on_disk < 64 << 20, "{on_disk} bytes on disk for 12 MiB of data");
    }
}
