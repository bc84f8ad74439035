//! What the target contains: the disk at the start, whatever the client does, in each format and with each option.

use super::{DISK, Writer, backup, hurry, image, model, pause, quit, raw_pair, serve, until};
use crate::common::Dir;
use crate::disk::tool;
use serde_json::{Value, json};

/// Backs `src` up while a client that begins after the start writes, trims and zeroes; `then.raw` is what it was.
fn kept(dir: &Dir, src: &Value, dst: &Value, more: &Value, ends: [(&str, &str); 2]) {
    let [source, target] = ends;
    let (mut daemon, mut c) = serve(dir, src, dst);
    backup(&mut c, &with(more, &json!({"speed": 1 << 20}))).unwrap();
    let writer = Writer::start(dir, DISK, &[]);
    pause(200);
    hurry(&mut c);
    until(&mut c, "b", "BLOCK_JOB_COMPLETED");
    until(&mut c, "b", "null");
    pause(50);
    let said = writer.stop();
    assert!(said["ops"].as_u64().unwrap() > 100, "{said}");
    assert_eq!(c.command("query-block-exports", json!({})).unwrap()[0]["node-name"], "src");
    quit(dir, &mut daemon, &mut c, source);
    tool(dir, &format!("qemu-img|compare|-f|raw|-F|{}|then.raw|{}", target.0, target.1));
    for (_, file) in ends.iter().filter(|e| e.0 == "qcow2") {
        tool(dir, &format!("qemu-img|check|-q|{file}"));
    }
}

fn with(a: &Value, b: &Value) -> Value {
    let mut all = a.clone();
    b.as_object().unwrap().iter().for_each(|(k, v)| all[k] = v.clone());
    all
}

#[test]
fn raw_to_raw() {
    let dir = Dir::new();
    model(&dir);
    tool(&dir, "cp|model.raw|src.raw");
    tool(&dir, "cp|model.raw|then.raw");
    std::fs::write(dir.path("dst.raw"), vec![0xee; 8 << 20]).unwrap(); // what was there before must go
    let ends = [("raw", "src.raw"), ("raw", "dst.raw")];
    kept(&dir, &image("raw", "src.raw"), &image("raw", "dst.raw"), &json!({}), ends);
}

fn qcow2(dir: &Dir, options: &str) {
    model(dir);
    tool(dir, "cp|model.raw|then.raw");
    tool(dir, "qemu-img|convert|-f|raw|-O|qcow2|model.raw|base.qcow2");
    tool(dir, "qemu-img|create|-q|-f|qcow2|-b|base.qcow2|-F|qcow2|src.qcow2");
    tool(dir, &format!("qemu-img|create|-q|-f|qcow2|-o|{options}|dst.qcow2|8M"));
}

#[test]
fn chain_to_small_clusters() {
    let dir = Dir::new();
    qcow2(&dir, "cluster_size=4k");
    let ends = [("qcow2", "src.qcow2"), ("qcow2", "dst.qcow2")];
    kept(&dir, &image("qcow2", "src.qcow2"), &image("qcow2", "dst.qcow2"), &json!({}), ends);
}

#[test]
fn chain_to_compressed_clusters() {
    for options in ["cluster_size=64k", "cluster_size=128k,compression_type=zstd"] {
        let dir = Dir::new();
        qcow2(&dir, options);
        let ends = [("qcow2", "src.qcow2"), ("qcow2", "dst.qcow2")];
        let more = json!({"compress": true, "x-perf": {"max-workers": 3, "max-chunk": 131072}});
        kept(&dir, &image("qcow2", "src.qcow2"), &image("qcow2", "dst.qcow2"), &more, ends);
        let map = tool(&dir, "qemu-img|map|--output=json|dst.qcow2");
        assert!(map.contains("\"compressed\": true"), "{map}");
    }
}

/// Old bytes go to a fast image first, and from there and from the disk to the target.
#[test]
fn through_a_buffer() {
    for (full, size) in [("wait", 1 << 20), ("wait", 0), ("break-guest-write", 0)] {
        let dir = Dir::new();
        qcow2(&dir, "cluster_size=64k");
        tool(&dir, "qemu-img|create|-q|-f|qcow2|buf.qcow2|8M");
        let (mut daemon, mut c) = serve(&dir, &image("qcow2", "src.qcow2"), &image("qcow2", "dst.qcow2"));
        let mut buf = image("qcow2", "buf.qcow2");
        buf["node-name"] = json!("buf");
        c.command("blockdev-add", buf).unwrap();
        let more = json!({"speed": 4 << 20, "buffer": "buf", "on-buffer-full": full, "buffer-size": size});
        backup(&mut c, &more).unwrap();
        let writer = Writer::start(&dir, DISK, &[]);
        pause(300);
        shows_buffer(&mut c);
        hurry(&mut c);
        until(&mut c, "b", "BLOCK_JOB_COMPLETED");
        until(&mut c, "b", "null");
        writer.stop();
        c.command("blockdev-del", json!({"node-name": "buf"})).unwrap();
        quit(&dir, &mut daemon, &mut c, ("qcow2", "src.qcow2"));
        tool(&dir, "qemu-img|compare|-f|raw|-F|qcow2|then.raw|dst.qcow2");
        // it shrank as it drained: nothing of the disk is left in it
        let map: Value = serde_json::from_str(&tool(&dir, "qemu-img|map|--output=json|buf.qcow2")).unwrap();
        let left = map.as_array().unwrap().iter().filter(|e| e["data"] == true).count();
        assert_eq!(left, 0, "{map}");
    }
}

fn shows_buffer(c: &mut crate::common::Client) {
    let jobs = c.command("query-block-jobs", json!({})).unwrap();
    assert!(jobs[0].is_null() || jobs[0]["buffered"].as_u64().is_some(), "{jobs}");
}

/// The instant is one: blocks numbered one after another show the state after one of the writes, and none after it.
#[test]
fn one_instant_of_a_running_client() {
    let dir = Dir::new();
    let (mut daemon, mut c) = raw_pair(&dir);
    let before = std::fs::read(dir.path("src.raw")).unwrap();
    let writer = Writer::start(&dir, DISK, &["1", "0", "sequence"]);
    while std::fs::read(dir.path("src.raw")).unwrap() == before {
        pause(20);
    }
    backup(&mut c, &json!({})).unwrap();
    until(&mut c, "b", "BLOCK_JOB_COMPLETED");
    until(&mut c, "b", "null");
    pause(50);
    writer.stop();
    quit(&dir, &mut daemon, &mut c, ("raw", "src.raw"));
    let (now, then) =
        (std::fs::read(dir.path("dst.raw")).unwrap(), std::fs::read(dir.path("then.raw")).unwrap());
    let number = |bytes: &[u8], block: usize| {
        u64::from_le_bytes(bytes[block * 4096..block * 4096 + 8].try_into().unwrap())
    };
    let blocks = now.len() / 4096;
    let written: Vec<u64> = (0..blocks)
        .filter(|b| now[b * 4096..][..4096] != then[b * 4096..][..4096])
        .map(|b| number(&now, b))
        .collect();
    let last = written.iter().copied().max().unwrap_or(0);
    assert!(last > 0, "the client had written before the start");
    for block in 0..blocks {
        let want = (1..=last).rev().find(|n| *n as usize % blocks == block);
        match want {
            Some(n) => assert_eq!(number(&now, block), n, "block {block}; the last write was {last}"),
            None => assert_eq!(now[block * 4096..][..4096], then[block * 4096..][..4096], "block {block}"),
        }
    }
}

/// Only the top layer; the target has the backing of the source.
#[test]
fn top_layer_to_overlay() {
    let dir = Dir::new();
    model(&dir);
    tool(&dir, "qemu-img|convert|-f|raw|-O|qcow2|model.raw|base.qcow2");
    tool(&dir, "qemu-img|create|-q|-f|qcow2|-b|base.qcow2|-F|qcow2|src.qcow2");
    tool(&dir, "qemu-io|-f|qcow2|-c|write -P 7 1M 300k|-c|write -z 4M 64k|src.qcow2");
    tool(&dir, "qemu-img|convert|-O|raw|src.qcow2|then.raw");
    tool(&dir, "cp|then.raw|model.raw");
    tool(&dir, "qemu-img|create|-q|-f|qcow2|-b|base.qcow2|-F|qcow2|dst.qcow2");
    let ends = [("qcow2", "src.qcow2"), ("qcow2", "dst.qcow2")];
    let (src, dst) = (image("qcow2", "src.qcow2"), image("qcow2", "dst.qcow2"));
    kept(&dir, &src, &dst, &json!({"sync": "top"}), ends);
    let map: Value = serde_json::from_str(&tool(&dir, "qemu-img|map|--output=json|dst.qcow2")).unwrap();
    let own: u64 = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|e| e["depth"] == 0)
        .map(|e| e["length"].as_u64().unwrap())
        .sum();
    assert_eq!(own, 6 * 65536, "five clusters of data and one of zeroes: {map}");
}
