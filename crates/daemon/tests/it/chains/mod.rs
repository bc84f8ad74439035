//! Commit and stream of the built daemon under a client that knows what its disk must contain (`mirrors/writer.py`), compared by
//! QEMU's own tools: the disk as the chain shows it is what the client wrote, during the job, after it, and from the image
//! headers alone.

mod actives;
mod commits;
mod failures;
mod interleavings;
mod large;
mod streams;
mod written;

use crate::common::{Client, Daemon, Dir};
use crate::disk::tool;
use serde_json::{Value, json};

/// Bytes of most disks here.
const SIZE: &str = "8M";

/// Images `0.qcow2` (the lowest) to `N-1.qcow2`, each with data and zeroes of its own, and `model.raw` with what the top one shows.
fn images(dir: &Dir, layers: usize) {
    for n in 0..layers {
        let below = if n > 0 { format!("|-b|{}.qcow2|-F|qcow2", n - 1) } else { String::new() };
        tool(dir, &format!("qemu-img|create|-q|-f|qcow2{below}|{n}.qcow2|{SIZE}"));
        let at = n * 512 + 64;
        let (a, b) = (format!("write -P {} {at}k 1M", n + 1), format!("write -z {}k 192k", at + 1152));
        tool(dir, &format!("qemu-io|-f|qcow2|-c|{a}|-c|{b}|{n}.qcow2"));
    }
    tool(dir, &format!("qemu-img|convert|-O|raw|{}.qcow2|model.raw", layers - 1));
}

/// The chain as nodes `n0` to the top one, which is served as "disk"; all but the top one read-only.
fn serve(dir: &Dir, layers: usize) -> (Daemon, Client) {
    let mut nodes = Vec::new();
    for n in 0..layers {
        let backing = if n > 0 { json!(format!("n{}", n - 1)) } else { Value::Null };
        let mut node = json!({"driver": "qcow2", "node-name": format!("n{n}"), "backing": backing, "discard": "unmap",
            "file": {"driver": "file", "filename": format!("{n}.qcow2"), "auto-read-only": true, "discard": "unmap"}});
        if n + 1 < layers {
            node["read-only"] = json!(true);
            node["auto-read-only"] = json!(true);
        }
        nodes.push(node);
    }
    served(dir, &nodes)
}

/// A daemon with these nodes, the last of them served as "disk".
fn served(dir: &Dir, nodes: &[Value]) -> (Daemon, Client) {
    let top = nodes.last().unwrap()["node-name"].as_str().unwrap();
    let export = format!("nbd,id=e0,node-name={top},name=disk,writable=on");
    let nodes: Vec<String> = nodes.iter().map(Value::to_string).collect();
    let mut words = vec!["--nbd-server", "addr.type=unix,addr.path=nbd.sock"];
    words.extend(nodes.iter().flat_map(|node| ["--blockdev", node]));
    words.extend(["--export", &export]);
    let daemon = Daemon::start(dir, &words);
    let client = daemon.client();
    (daemon, client)
}

/// Ends the daemon and says whether `file` shows what the client wrote; all `files` are sound.
fn compare(dir: &Dir, daemon: &mut Daemon, c: &mut Client, file: &str, files: &[&str]) {
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
    tool(dir, &format!("qemu-img|compare|-f|raw|-F|qcow2|model.raw|{file}"));
    for f in files {
        tool(dir, &format!("qemu-img|check|-q|{f}"));
    }
}

/// What the header of `file` says of its backing file.
fn header(dir: &Dir, file: &str) -> (Value, Value) {
    let info: Value =
        serde_json::from_str(&tool(dir, &format!("qemu-img|info|-U|--output=json|{file}"))).unwrap();
    (info["backing-filename"].clone(), info["backing-filename-format"].clone())
}

fn job(c: &mut Client) -> Value {
    c.command("query-block-jobs", json!({})).unwrap()[0].clone()
}

/// Whether somebody could write to an image: what QSD calls its being read-only does not tell.
fn is_open_for_writing(c: &mut Client, node: &str) -> bool {
    let graph = c.command("x-debug-query-block-graph", json!({})).unwrap();
    let node = graph["nodes"].as_array().unwrap().iter().find(|n| n["name"] == node).unwrap()["id"].clone();
    let edges = graph["edges"].as_array().unwrap();
    let file = edges.iter().find(|e| e["parent"] == node && e["name"] == "file").unwrap();
    file["perm"].as_array().unwrap().contains(&json!("write"))
}

/// Images of 8 MiB, of 2 MiB over it, and of 6 MiB over that, and `model.raw` with what the top one shows.
fn shorter_in_the_middle(dir: &Dir) {
    tool(dir, "qemu-img|create|-q|-f|qcow2|0.qcow2|8M");
    tool(dir, "qemu-io|-f|qcow2|-c|write -P 1 0 8M|0.qcow2");
    tool(dir, "qemu-img|create|-q|-f|qcow2|-b|0.qcow2|-F|qcow2|1.qcow2|2M");
    tool(dir, "qemu-io|-f|qcow2|-c|write -P 2 1M 64k|1.qcow2");
    tool(dir, "qemu-img|create|-q|-f|qcow2|-b|1.qcow2|-F|qcow2|2.qcow2|6M");
    tool(dir, "qemu-img|convert|-O|raw|2.qcow2|model.raw");
}
