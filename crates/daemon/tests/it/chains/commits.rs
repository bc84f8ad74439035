//! Commits of images below the active one.

use super::{compare, header, images, job, serve};
use crate::common::{Client, Daemon, Dir};
use crate::disk::{tool, until};
use crate::mirrors::{DISK, Writer};
use serde_json::{Value, json};

fn commit(c: &mut Client, more: &Value) -> Result<Value, String> {
    let mut a = json!({"job-id": "j", "device": "n3", "top-node": "n2", "base-node": "n0"});
    for (k, v) in more.as_object().unwrap() {
        a[k] = v.clone();
    }
    c.command("block-commit", a)
}

/// An overlay made meanwhile would be told the name, and nobody could open it afterwards.
#[test]
fn no_name_tells_of_what_only_a_job_can_make() {
    let dir = Dir::new();
    images(&dir, 4);
    // so that the name of the top has to say what is below it
    tool(&dir, "qemu-img|rebase|-u|-f|qcow2|-b||3.qcow2");
    let (_daemon, mut c) = serve(&dir, 4);
    commit(&mut c, &json!({"speed": 1})).unwrap();
    let nodes = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
    let nodes = nodes.as_array().unwrap();
    assert!(nodes.iter().any(|n| n["drv"] == "commit_top"));
    let top = nodes.iter().find(|n| n["node-name"] == "n3").unwrap()["file"].as_str().unwrap();
    assert!(top.starts_with("json:") && top.contains("2.qcow2") && !top.contains("commit_top"), "{top}");
    c.command("block-job-cancel", json!({"device": "j"})).unwrap();
    until(&mut c, "j", "null");
}

/// Two images go down under a writing client, slowly at first; the chain is shorter, the header says so, the base is read-only.
#[test]
fn in_the_middle_of_a_chain_in_use() {
    let dir = Dir::new();
    images(&dir, 4);
    let (mut daemon, mut c) = serve(&dir, 4);
    let writer = Writer::start(&dir, DISK, &["4", "400"]);
    commit(&mut c, &json!({"speed": 1 << 20})).unwrap();
    assert_eq!(job(&mut c)["len"], 8 << 20);
    c.command("job-pause", json!({"id": "j"})).unwrap();
    until(&mut c, "j", "paused");
    c.command("job-resume", json!({"id": "j"})).unwrap();
    c.command("block-job-set-speed", json!({"device": "j", "speed": 0})).unwrap();
    until(&mut c, "j", "null");
    writer.stop();
    assert_eq!(header(&dir, "3.qcow2"), (json!("0.qcow2"), json!("qcow2")));
    let nodes = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
    assert!(!nodes.as_array().unwrap().iter().any(|n| n["drv"] == "commit_top"));
    for node in ["n2", "n1"] {
        c.command("blockdev-del", json!({"node-name": node})).unwrap();
    }
    // nobody may write to the base any more
    let error = c.command("block_resize", json!({"node-name": "n0", "size": 16 << 20})).unwrap_err();
    assert!(error.contains("backing hd of 'n3'"), "{error}");
    compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "0.qcow2"]);
}

/// Cancelled half-way: the chain is what it was, in the graph and in the headers.
#[test]
fn cancelled_changes_nothing_to_be_seen() {
    let dir = Dir::new();
    images(&dir, 4);
    let (mut daemon, mut c) = serve(&dir, 4);
    let writer = Writer::start(&dir, DISK, &["4", "400"]);
    commit(&mut c, &json!({"speed": 1 << 20})).unwrap();
    assert!(job(&mut c)["offset"].as_u64().unwrap() < 8 << 20);
    c.command("job-cancel", json!({"id": "j"})).unwrap();
    until(&mut c, "j", "null");
    writer.stop();
    assert_eq!(header(&dir, "3.qcow2"), (json!("2.qcow2"), json!("qcow2")));
    tool(&dir, "qemu-img|compare|-U|-f|raw|-F|qcow2|model.raw|3.qcow2");
    compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "2.qcow2", "1.qcow2", "0.qcow2"]);
}

/// The files of images that left are deleted where nobody uses them any more, and every one is told; the others are kept.
#[test]
fn files_of_images_that_left() {
    for (command, kept) in [("block-commit", "n1"), ("block-stream", "n1")] {
        let dir = Dir::new();
        images(&dir, 4);
        // opened as the headers say, but for one image that the user names
        let file =
            |n: usize| json!({"driver": "file", "filename": format!("{n}.qcow2"), "auto-read-only": true});
        let middle = json!({"driver": "qcow2", "node-name": kept, "file": file(1), "read-only": true});
        let upper = json!({"driver": "qcow2", "file": file(2), "backing": kept, "read-only": true});
        let top = json!({"driver": "qcow2", "node-name": "n3", "file": file(3), "backing": upper});
        let export = "nbd,id=e0,node-name=n3,name=disk,writable=on";
        let server = "addr.type=unix,addr.path=nbd.sock";
        let (middle, top) = (middle.to_string(), top.to_string());
        let words = ["--blockdev", &middle, "--blockdev", &top, "--nbd-server", server, "--export", export];
        let mut daemon = Daemon::start(&dir, &words);
        let mut c = daemon.client();
        let writer = Writer::start(&dir, DISK, &["4", "400"]);
        let arguments = if command == "block-commit" {
            json!({"job-id": "j", "device": "n3", "top": "2.qcow2", "base": "0.qcow2", "delete-images": true})
        } else {
            json!({"job-id": "j", "device": "n3", "base": "0.qcow2", "delete-images": true})
        };
        c.command(command, arguments).unwrap();
        until(&mut c, "j", "waiting");
        let mut told = Vec::new();
        loop {
            let e = c.events.pop().unwrap_or_else(|| c.read().unwrap());
            if e["event"] == "BLOCK_JOB_IMAGE_DELETED" {
                let d = &e["data"];
                told.push((d["filename"].as_str().unwrap().to_owned(), d["deleted"] == true));
            } else if e["data"]["status"] == "null" {
                break;
            }
        }
        told.sort();
        assert_eq!(told, [("1.qcow2".to_owned(), false), ("2.qcow2".to_owned(), true)], "{command}");
        assert!(dir.0.join("1.qcow2").exists() && !dir.0.join("2.qcow2").exists());
        writer.stop();
        compare(&dir, &mut daemon, &mut c, "3.qcow2", &["3.qcow2", "1.qcow2", "0.qcow2"]);
    }
}
