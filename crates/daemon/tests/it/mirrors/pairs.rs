//! Every pair of source and target in every copy mode, completed while the client writes.

use super::{DISK, MODES, SIZE, Server, Writer, compare, image, mirror, model, pause, serve, verb};
use crate::common::Dir;
use crate::disk::{tool, until};
use serde_json::{Value, json};

/// Mirrors, pivots under load, lets the client go on, and compares `file` with what the client wrote.
fn moved(dir: &Dir, src: &Value, dst: &Value, sync: &str, mode: &str, (format, file): (&str, &str)) {
    let (mut daemon, mut c) = serve(dir, src, dst);
    let writer = Writer::start(dir, DISK, &[]);
    mirror(&mut c, &json!({"copy-mode": mode, "sync": sync})).unwrap();
    until(&mut c, "m", "BLOCK_JOB_READY");
    pause(100);
    verb(&mut c, "job-complete", "id").unwrap();
    until(&mut c, "m", "BLOCK_JOB_COMPLETED");
    until(&mut c, "m", "null");
    assert_eq!(c.command("query-block-exports", json!({})).unwrap()[0]["node-name"], "dst");
    pause(150);
    let said = writer.stop();
    assert!(said["ops"].as_u64().unwrap() > 100, "{said}");
    compare(dir, &mut daemon, &mut c, format, file);
}

fn convert(dir: &Dir) {
    model(dir);
    tool(dir, "qemu-img|convert|-f|raw|-O|qcow2|model.raw|src.qcow2");
}

#[test]
fn raw_to_raw() {
    for mode in MODES {
        let dir = Dir::new();
        model(&dir);
        tool(&dir, "cp|model.raw|src.raw");
        std::fs::write(dir.path("dst.raw"), vec![0xee; SIZE]).unwrap(); // what was there before must go
        moved(&dir, &image("raw", "src.raw"), &image("raw", "dst.raw"), "full", mode, ("raw", "dst.raw"));
    }
}

#[test]
fn qcow2_to_raw() {
    for mode in MODES {
        let dir = Dir::new();
        convert(&dir);
        tool(&dir, "truncate|-s|8M|dst.raw");
        moved(&dir, &image("qcow2", "src.qcow2"), &image("raw", "dst.raw"), "full", mode, ("raw", "dst.raw"));
    }
}

#[test]
fn qcow2_with_backing_to_qcow2() {
    for mode in MODES {
        let dir = Dir::new();
        model(&dir);
        tool(&dir, "qemu-img|convert|-f|raw|-O|qcow2|model.raw|base.qcow2");
        tool(&dir, "qemu-img|create|-q|-f|qcow2|-b|base.qcow2|-F|qcow2|src.qcow2");
        tool(&dir, "qemu-img|create|-q|-f|qcow2|-o|cluster_size=4k|dst.qcow2|8M");
        let (src, dst) = (image("qcow2", "src.qcow2"), image("qcow2", "dst.qcow2"));
        moved(&dir, &src, &dst, "full", mode, ("qcow2", "dst.qcow2"));
    }
}

/// The target has the backing of the source: only the top layer is copied.
#[test]
fn top_layer_to_overlay() {
    for mode in MODES {
        let dir = Dir::new();
        model(&dir);
        tool(&dir, "qemu-img|convert|-f|raw|-O|qcow2|model.raw|base.qcow2");
        tool(&dir, "qemu-img|create|-q|-f|qcow2|-b|base.qcow2|-F|qcow2|src.qcow2");
        tool(&dir, "qemu-img|create|-q|-f|qcow2|-b|base.qcow2|-F|qcow2|dst.qcow2");
        let (src, dst) = (image("qcow2", "src.qcow2"), image("qcow2", "dst.qcow2"));
        moved(&dir, &src, &dst, "top", mode, ("qcow2", "dst.qcow2"));
    }
}

/// `none`: the target already is equal, only what comes is copied.
#[test]
fn nothing_but_what_comes() {
    for mode in MODES {
        let dir = Dir::new();
        convert(&dir);
        tool(&dir, "qemu-img|convert|-f|raw|-O|qcow2|model.raw|dst.qcow2");
        let (src, dst) = (image("qcow2", "src.qcow2"), image("qcow2", "dst.qcow2"));
        let (mut daemon, mut c) = serve(&dir, &src, &dst);
        mirror(&mut c, &json!({"copy-mode": mode, "sync": "none"})).unwrap();
        until(&mut c, "m", "BLOCK_JOB_READY");
        let writer = Writer::start(&dir, DISK, &[]);
        pause(150);
        verb(&mut c, "job-complete", "id").unwrap();
        until(&mut c, "m", "null");
        writer.stop();
        compare(&dir, &mut daemon, &mut c, "qcow2", "dst.qcow2");
    }
}

#[test]
fn to_qemu_nbd() {
    for mode in MODES {
        let dir = Dir::new();
        convert(&dir);
        tool(&dir, "qemu-img|create|-q|-f|qcow2|dst.qcow2|8M");
        let line = format!("qemu-nbd|-t|-f|qcow2|--discard=unmap|-k|{}|dst.qcow2", dir.path("peer.sock"));
        let server = Server::start(&dir, &line, "peer.sock");
        let dst = json!({"driver": "raw", "discard": "unmap", "file":
            {"driver": "nbd", "discard": "unmap", "server": {"type": "unix", "path": "peer.sock"}}});
        let (mut daemon, mut c) = serve(&dir, &image("qcow2", "src.qcow2"), &dst);
        let writer = Writer::start(&dir, DISK, &[]);
        mirror(&mut c, &json!({"copy-mode": mode})).unwrap();
        until(&mut c, "m", "BLOCK_JOB_READY");
        verb(&mut c, "job-complete", "id").unwrap();
        until(&mut c, "m", "null");
        pause(100);
        writer.stop();
        c.command("quit", json!({})).unwrap();
        assert!(daemon.wait().success());
        server.signal("TERM");
        let mut server = server;
        assert!(server.0.wait().unwrap().success());
        tool(&dir, "qemu-img|compare|-f|raw|-F|qcow2|model.raw|dst.qcow2");
        tool(&dir, "qemu-img|check|-q|dst.qcow2");
    }
}

#[test]
fn to_a_second_liveblkd() {
    for mode in MODES {
        let (dir, there) = (Dir::new(), Dir::new());
        convert(&dir);
        tool(&there, "qemu-img|create|-q|-f|qcow2|dst.qcow2|8M");
        let mut peer = crate::common::Daemon::start(
            &there,
            &[
                "--blockdev",
                "driver=qcow2,node-name=d,discard=unmap,file.driver=file,file.filename=dst.qcow2",
                "--nbd-server",
                "addr.type=unix,addr.path=peer.sock",
                "--export",
                "nbd,id=e,node-name=d,name=t,writable=on",
            ],
        );
        let mut peer_client = peer.client();
        let dst = json!({"driver": "nbd", "discard": "unmap", "export": "t",
            "server": {"type": "unix", "path": there.path("peer.sock")}});
        let (mut daemon, mut c) = serve(&dir, &image("qcow2", "src.qcow2"), &dst);
        let writer = Writer::start(&dir, DISK, &[]);
        mirror(&mut c, &json!({"copy-mode": mode})).unwrap();
        until(&mut c, "m", "BLOCK_JOB_READY");
        verb(&mut c, "job-complete", "id").unwrap();
        until(&mut c, "m", "null");
        pause(100);
        writer.stop();
        c.command("quit", json!({})).unwrap();
        assert!(daemon.wait().success());
        peer_client.command("quit", json!({})).unwrap();
        assert!(peer.wait().success());
        let file = there.path("dst.qcow2");
        tool(&dir, &format!("qemu-img|compare|-f|raw|-F|qcow2|model.raw|{file}"));
        tool(&dir, &format!("qemu-img|check|-q|{file}"));
    }
}
