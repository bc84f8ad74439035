//! `drive-backup` and `drive-mirror`: targets that the command makes and opens, and that go with the job.

use super::{DISK, Writer, pause, quit, until};
use crate::common::{Client, Dir};
use crate::disk::tool;
use crate::mirrors::{image, model, serve};
use serde_json::json;

fn nodes(c: &mut Client) -> usize {
    c.command("query-named-block-nodes", json!({"flat": true})).unwrap().as_array().unwrap().len()
}

/// A chain whose top layer is `src.qcow2`; another disk is there as `dst`, unused.
fn chain(dir: &Dir) -> (crate::common::Daemon, Client) {
    model(dir);
    tool(dir, "qemu-img|convert|-f|raw|-O|qcow2|model.raw|base.qcow2");
    tool(dir, "qemu-img|create|-q|-f|qcow2|-b|base.qcow2|-F|qcow2|src.qcow2");
    tool(dir, "qemu-io|-f|qcow2|-c|write -P 7 1M 300k|src.qcow2");
    tool(dir, "qemu-img|convert|-O|raw|src.qcow2|then.raw");
    tool(dir, "cp|then.raw|model.raw");
    tool(dir, "truncate|-s|8M|dst.raw");
    serve(dir, &image("qcow2", "src.qcow2"), &image("raw", "dst.raw"))
}

#[test]
fn backup_to_a_new_image() {
    for (sync, format) in [("full", "qcow2"), ("full", "raw"), ("top", "qcow2")] {
        let dir = Dir::new();
        let (mut daemon, mut c) = chain(&dir);
        let before = nodes(&mut c);
        let args =
            json!({"job-id": "b", "device": "src", "target": "new.img", "sync": sync, "format": format});
        c.command("drive-backup", args).unwrap();
        let writer = Writer::start(&dir, DISK, &[]);
        until(&mut c, "b", "BLOCK_JOB_COMPLETED");
        until(&mut c, "b", "null");
        writer.stop();
        assert_eq!(nodes(&mut c), before, "its node goes with the job");
        quit(&dir, &mut daemon, &mut c, ("qcow2", "src.qcow2"));
        // what the client wrote before the job began is none: it was started after
        tool(&dir, &format!("qemu-img|compare|-f|raw|-F|{format}|then.raw|new.img"));
        let info = tool(&dir, "qemu-img|info|new.img");
        assert_eq!(info.contains("backing file: base.qcow2"), sync == "top", "{info}");
    }
}

#[test]
fn mirror_to_a_new_image_and_on_there() {
    for sync in ["full", "top", "none"] {
        let dir = Dir::new();
        let (mut daemon, mut c) = chain(&dir);
        let args = json!({"job-id": "m", "device": "src", "target": "new.img", "sync": sync, "format": "qcow2",
            "node-name": "new"});
        let writer = Writer::start(&dir, DISK, &[]);
        c.command("drive-mirror", args).unwrap();
        until(&mut c, "m", "BLOCK_JOB_READY");
        c.command("job-complete", json!({"id": "m"})).unwrap();
        until(&mut c, "m", "BLOCK_JOB_COMPLETED");
        until(&mut c, "m", "null");
        assert_eq!(c.command("query-block-exports", json!({})).unwrap()[0]["node-name"], "new");
        pause(50);
        writer.stop();
        quit(&dir, &mut daemon, &mut c, ("qcow2", "new.img"));
        tool(&dir, "qemu-img|check|-q|new.img");
    }
}

#[test]
fn what_is_wrong_is_said_and_nothing_is_left() {
    let dir = Dir::new();
    let (mut daemon, mut c) = chain(&dir);
    let before = nodes(&mut c);
    let mut refused = |command: &str, more: serde_json::Value| {
        let mut args = json!({"job-id": "j", "device": "src", "target": "new.img", "sync": "full"});
        more.as_object().unwrap().iter().for_each(|(k, v)| args[k] = v.clone());
        let said = c.command(command, args).unwrap_err();
        assert_eq!(nodes(&mut c), before, "{said}");
        said
    };
    for command in ["drive-backup", "drive-mirror"] {
        assert_eq!(refused(command, json!({"job-id": ""})), "Invalid job ID ''");
        assert!(
            refused(command, json!({"target": "no/such/x", "mode": "existing"})).contains("No such file")
        );
        assert_eq!(refused(command, json!({"format": "vmdk"})), "Unknown file format 'vmdk'");
        assert!(refused(command, json!({"device": "nope"})).contains("Cannot find device='nope'"));
        tool(&dir, "truncate|-s|1M|small.raw");
        if command == "drive-backup" {
            let small = json!({"target": "small.raw", "mode": "existing", "format": "raw"});
            assert_eq!(refused(command, small), "Source and target image have different sizes");
        }
    }
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
}
