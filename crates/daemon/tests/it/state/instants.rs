//! Backups of a daemon that is killed while clients write: the target is the disk as of the start all the same, or it is said that it is
//! not.

use super::jobs::{killed, reaches, served};
use super::{start, start_saying, tool};
use crate::common::{Client, Daemon, Dir, until};
use serde_json::{Value, json};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

const URI: &str = "nbd+unix:///disk?socket=nbd.sock";
/// What a backup brings before the first kill.
const SLOW: u64 = 1 << 16;

fn instant_files(dir: &Dir) -> Vec<std::path::PathBuf> {
    let all = std::fs::read_dir(dir.path("state")).unwrap().map(|e| e.unwrap().path());
    all.filter(|p| p.file_name().unwrap().to_string_lossy().starts_with("instant-")).collect()
}

/// Waits until a backup's instant would outlive a kill.
pub(super) fn until_kept(dir: &Dir) {
    until(|| {
        instant_files(dir).iter().any(|f| {
            let mut magic = [0; 8];
            let read = std::fs::File::open(f).and_then(|f| f.read_exact_at(&mut magic, 0));
            read.is_ok() && &magic == b"lbInst_1"
        })
    });
}

fn write(dir: &Dir, pattern: u8, at: &str) {
    tool(dir, "qemu-io", &["-f", "raw", "-c", &format!("write -P {pattern} {at}"), URI]);
}

fn backup(c: &mut Client, more: &[(&str, Value)]) {
    let mut arguments = json!({"job-id": "j", "device": "src", "target": "dst", "sync": "full", "speed": SLOW,
        "auto-dismiss": false});
    more.iter().for_each(|(key, value)| arguments[*key] = value.clone());
    c.command("blockdev-backup", arguments).unwrap();
}

fn told(c: &mut Client) -> String {
    c.command("query-jobs", json!({})).unwrap()[0]["resumed"].as_str().unwrap_or_default().to_owned()
}

/// Lets the backup run to its end; how it went on, as the log of jobs has it.
fn to_the_end(c: &mut Client) -> String {
    c.command("block-job-set-speed", json!({"device": "j", "speed": 0})).unwrap();
    let end = reaches(c, "concluded");
    assert_eq!(end.get("error"), None, "{end}");
    c.command("job-dismiss", json!({"id": "j"})).unwrap();
    let log = c.command("query-job-log", json!({})).unwrap();
    let entry = log["jobs"].as_array().unwrap().last().unwrap().clone();
    assert_eq!((&entry["id"], &entry["outcome"]), (&json!("j"), &json!("completed")), "{entry}");
    entry["resumed"].as_str().unwrap_or_default().to_owned()
}

fn quit(mut daemon: Daemon) {
    daemon.client().command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
}

#[test]
fn the_target_is_the_disk_as_of_the_start_whatever_is_overwritten_and_however_often_it_is_killed() {
    for sync in ["full", "none"] {
        let dir = Dir::new();
        let mut daemon = served(&dir);
        std::fs::copy(dir.path("src.raw"), dir.path("then.raw")).unwrap();
        let mut c = daemon.client();
        backup(&mut c, &[("sync", json!(sync))]);
        until_kept(&dir);
        // not copied yet, copied perhaps, beyond what holds data
        for at in ["5M 64k", "0 4k", "7M 4k"] {
            write(&dir, 9, at);
        }
        for (i, at) in ["3M 128k", "5M 4k", "2000k 300k"].into_iter().enumerate() {
            drop(c);
            if i == 1 {
                quit(daemon);
                daemon = start(&dir, &[]);
            } else {
                daemon = killed(&dir, daemon);
            }
            c = daemon.client();
            assert!(told(&mut c).contains("as of its start"), "{}", told(&mut c));
            write(&dir, 10 + i as u8, at);
        }
        if sync == "full" {
            assert!(to_the_end(&mut c).contains("as of its start"));
            tool(&dir, "qemu-img", &["compare", "-U", "-f", "raw", "-F", "raw", "then.raw", "dst.raw"]);
        } else {
            // what was overwritten is on the target as it was
            let check = [
                "read -P 7 5M 64k",
                "read -P 7 0 4k",
                "read -P 0 7M 4k",
                "read -P 7 3M 128k",
                "read -P 7 2000k 300k",
            ];
            check
                .iter()
                .for_each(|c| drop(tool(&dir, "qemu-io", &["-r", "-U", "-f", "raw", "-c", c, "dst.raw"])));
            c.command("job-cancel", json!({"id": "j"})).unwrap();
            reaches(&mut c, "concluded");
        }
        assert_eq!(instant_files(&dir), Vec::<std::path::PathBuf>::new());
        tool(&dir, "qemu-io", &["-f", "raw", "-c", "read -P 9 0 4k", "-c", "read -P 11 5M 4k", URI]);
    }
}

/// It is cancelled before its clients are, and has nothing left to keep from them.
#[test]
fn a_backup_that_waits_for_its_manager_keeps_its_instant_over_an_end_under_load() {
    let dir = Dir::new();
    let daemon = served(&dir);
    std::fs::copy(dir.path("src.raw"), dir.path("then.raw")).unwrap();
    let mut c = daemon.client();
    backup(&mut c, &[("speed", json!(0)), ("auto-finalize", json!(false))]);
    reaches(&mut c, "pending");
    drop(c);
    // writes until the daemon goes
    let work = "i=0; while qemu-io -f raw -c \"write -P $((i % 250 + 1)) 2M 4M\" $0 >> said 2>&1; do i=$((i + 1)); echo >> rounds; done";
    let mut client = Command::new("sh").args(["-c", work, URI]).current_dir(&dir.0).spawn().unwrap();
    until(|| std::fs::read_to_string(dir.path("rounds")).is_ok_and(|r| r.len() > 2));
    quit(daemon);
    assert!(client.wait().unwrap().success());
    let daemon = start(&dir, &[]);
    let mut c = daemon.client();
    reaches(&mut c, "pending");
    assert!(told(&mut c).contains("as of its start"), "{}", told(&mut c));
    write(&dir, 251, "0 4k");
    c.command("job-finalize", json!({"id": "j"})).unwrap();
    reaches(&mut c, "concluded");
    tool(&dir, "qemu-img", &["compare", "-U", "-f", "raw", "-F", "raw", "then.raw", "dst.raw"]);
}

#[test]
fn an_image_that_keeps_records_in_memory_outlives_a_clean_end_only() {
    let dir = Dir::new();
    let daemon = served(&dir);
    std::fs::copy(dir.path("src.raw"), dir.path("then.raw")).unwrap();
    tool(&dir, "qemu-img", &["create", "-q", "-f", "qcow2", "image.qcow2", "8M"]);
    let mut c = daemon.client();
    let file = json!({"driver": "file", "filename": dir.path("image.qcow2")});
    c.command("blockdev-add", json!({"driver": "qcow2", "node-name": "image", "file": file})).unwrap();
    backup(&mut c, &[("target", json!("image"))]);
    write(&dir, 9, "5M 64k");
    drop(c);
    quit(daemon);
    let daemon = start(&dir, &[]);
    let mut c = daemon.client();
    assert!(told(&mut c).contains("as of its start"), "{}", told(&mut c));
    write(&dir, 10, "3M 64k");
    drop(c);
    quit(daemon);
    let daemon = start(&dir, &[]);
    let mut c = daemon.client();
    assert!(to_the_end(&mut c).contains("as of its start"));
    tool(&dir, "qemu-img", &["compare", "-U", "-f", "raw", "-F", "qcow2", "then.raw", "image.qcow2"]);
    // killed: it is another instant, which is said
    backup(&mut c, &[("target", json!("image"))]);
    write(&dir, 11, "1M 64k");
    drop((c, daemon));
    let mut daemon = start_saying(&dir, &[], Stdio::piped());
    let mut c = daemon.client();
    assert!(told(&mut c).contains("as of the restart"), "{}", told(&mut c));
    assert!(to_the_end(&mut c).contains("as of the restart"));
    tool(&dir, "qemu-img", &["compare", "-U", "-f", "raw", "-F", "qcow2", "src.raw", "image.qcow2"]);
    daemon.child.kill().unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(daemon.child.stderr.as_mut().unwrap(), &mut text).unwrap();
    assert!(
        text.contains("job 'j' was started again after a restart: it is the disk as of the restart"),
        "{text}"
    );
}

#[test]
fn a_backup_whose_instant_is_lost_copies_only_what_the_target_lacks() {
    let dir = Dir::new();
    let mut daemon = served(&dir);
    tool(&dir, "qemu-img", &["create", "-q", "-f", "qcow2", "image.qcow2", "8M"]);
    let mut c = daemon.client();
    let file = json!({"driver": "file", "filename": dir.path("image.qcow2")});
    c.command("blockdev-add", json!({"driver": "qcow2", "node-name": "image", "file": file})).unwrap();
    backup(&mut c, &[("target", json!("image")), ("speed", json!(0)), ("auto-finalize", json!(false))]);
    reaches(&mut c, "pending");
    // what has been copied is known only once the target was flushed, which nobody waits for here
    let mut copied = Vec::new();
    while copied.last().is_none_or(|c| *c > 1 << 20) {
        assert!(copied.len() < 20, "in each life it copied {copied:?} bytes");
        // the target has the old bytes
        write(&dir, 20 + copied.len() as u8, "5M 64k");
        std::thread::sleep(std::time::Duration::from_millis(700 * copied.len() as u64));
        drop(c);
        daemon = killed(&dir, daemon);
        c = daemon.client();
        assert!(told(&mut c).contains("as of the restart"), "{}", told(&mut c));
        let pending = reaches(&mut c, "pending");
        copied.push(pending["current-progress"].as_u64().unwrap());
    }
    assert!(told(&mut c).contains("nothing else"), "{}", told(&mut c));
    // of the place that was written to the target had the old bytes
    assert!(copied.last().is_some_and(|c| *c > 0), "{copied:?}");
    write(&dir, 11, "1M 64k");
    c.command("job-finalize", json!({"id": "j"})).unwrap();
    reaches(&mut c, "concluded");
    write(&dir, 7, "1M 64k");
    tool(&dir, "qemu-img", &["compare", "-U", "-f", "raw", "-F", "qcow2", "src.raw", "image.qcow2"]);
}

/// What it has copied is nowhere else: the copy is not overwritten with what its source holds now.
#[test]
fn a_backup_that_discards_its_source_is_not_started_again() {
    let dir = Dir::new();
    let daemon = served(&dir);
    let mut c = daemon.client();
    backup(&mut c, &[("discard-source", json!(true))]);
    until(|| c.command("query-jobs", json!({})).unwrap()[0]["current-progress"].as_u64() > Some(0));
    drop(c);
    let mut daemon = killed(&dir, daemon);
    for _ in 0..2 {
        let mut c = daemon.client();
        let end = reaches(&mut c, "concluded");
        assert!(end["error"].as_str().is_some_and(|e| e.contains("with discard-source")), "{end}");
        drop(c);
        daemon = killed(&dir, daemon);
    }
    tool(&dir, "qemu-io", &["-r", "-U", "-f", "raw", "-c", "read -P 7 0 64k", "dst.raw"]);
    let mut c = daemon.client();
    c.command("job-dismiss", json!({"id": "j"})).unwrap();
    drop(c);
    daemon = killed(&dir, daemon);
    let mut c = daemon.client();
    assert_eq!(c.command("query-jobs", json!({})).unwrap(), json!([]));
}

#[test]
fn an_instant_is_not_believed_if_somebody_else_may_have_written_or_the_host_was_started_anew() {
    for what in ["another file", "another start"] {
        let dir = Dir::new();
        let daemon = served(&dir);
        let mut c = daemon.client();
        backup(&mut c, &[]);
        until_kept(&dir);
        drop((c, daemon));
        if what == "another file" {
            std::fs::copy(dir.path("dst.raw"), dir.path("copy.raw")).unwrap();
            std::fs::rename(dir.path("copy.raw"), dir.path("dst.raw")).unwrap();
        } else {
            // the number of the host's start, with the checksum that goes with it
            let path = &instant_files(&dir)[0];
            let mut head = std::fs::read(path).unwrap();
            head[40] ^= 1;
            let end = 128 + usize::try_from(u64::from_le_bytes(head[120..128].try_into().unwrap())).unwrap();
            let sum = crc32c::crc32c(&head[..end]);
            head[end..end + 4].copy_from_slice(&sum.to_le_bytes());
            std::fs::File::options().write(true).open(path).unwrap().write_all_at(&head, 0).unwrap();
        }
        let daemon = start_saying(&dir, &[], Stdio::null());
        let mut c = daemon.client();
        assert!(told(&mut c).contains("as of the restart"), "{what}: {}", told(&mut c));
    }
}

#[test]
fn a_snapshot_whose_instant_is_lost_is_not_read() {
    let dir = Dir::new();
    let daemon = served(&dir);
    let mut c = daemon.client();
    // nobody may write beside the filter
    c.command("block-export-del", json!({"id": "e"})).unwrap();
    c.event("BLOCK_EXPORT_DELETED");
    let cbw = json!({"driver": "copy-before-write", "node-name": "cbw", "file": "src", "target": "dst"});
    c.command("blockdev-add", cbw).unwrap();
    c.command("blockdev-add", json!({"driver": "snapshot-access", "node-name": "then", "file": "cbw"}))
        .unwrap();
    for (node, writable) in [("then", false), ("cbw", true)] {
        let export =
            json!({"type": "nbd", "id": node, "node-name": node, "name": node, "writable": writable});
        c.command("block-export-add", export).unwrap();
    }
    let io = |export: &str, command: &str| {
        let uri = format!("nbd+unix:///{export}?socket=nbd.sock");
        // the snapshot is not for writing
        let mode = if export == "then" { "-r" } else { "-dunmap" };
        let arguments = [mode, "-f", "raw", "-c", command, &uri];
        Command::new("qemu-io").args(arguments).current_dir(&dir.0).output().unwrap()
    };
    assert!(io("cbw", "write -P 9 1M 64k").status.success());
    assert!(io("then", "read -P 7 1M 64k").status.success());
    drop((c, daemon));
    let mut daemon = start_saying(&dir, &[], Stdio::piped());
    drop(daemon.client());
    let read = io("then", "read -P 7 2M 64k");
    assert!(!read.status.success(), "{}", String::from_utf8_lossy(&read.stdout));
    assert!(io("cbw", "write -P 10 2M 64k").status.success(), "clients go on");
    daemon.child.kill().unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(daemon.child.stderr.as_mut().unwrap(), &mut text).unwrap();
    assert!(text.contains("node 'cbw': its snapshot is lost: the daemon was restarted"), "{text}");
}
