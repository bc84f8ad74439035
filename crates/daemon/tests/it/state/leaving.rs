//! Images that a job was to delete and that a crash left: they wait as long as a node is missing whose images nobody knows.
//!
//! How such records come to be is what the simulator enumerates (`cargo xtask crash --steps`); here one is written by hand, into the store
//! of a daemon that was killed.

use super::{images, start, start_saying, tool};
use crate::common::{Daemon, Dir};
use serde_json::{Value, json};
use state::{Batch, Store};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{SystemTime, UNIX_EPOCH};

/// The image `name` was to be deleted when the daemon died.
fn was_to_go(dir: &Dir, name: &str) {
    tool(dir, "qemu-img", &["create", "-q", "-f", "qcow2", name, "4M"]);
    let path = dir.path(name);
    let facts = std::fs::metadata(&path).unwrap();
    let known = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let record = json!({
        "job": "j", "node-name": "gone", "filename": path,
        "device": facts.dev(), "inode": facts.ino(), "known": known,
    });
    let key = format!("{:x}.{:x}", facts.dev(), facts.ino());
    let at = PathBuf::from(dir.path("state"));
    let executor = env::os::start(env::os::OsConfig::default());
    let env = executor.env();
    executor.run(async move {
        let store = Store::open(&env, &at).await.unwrap();
        let mut batch = Batch::new();
        batch.put("leaving", &key, record.to_string().into_bytes());
        store.commit(batch).await.unwrap();
        store.close().await;
    });
}

/// What waits: (kind, why).
fn broken(daemon: &Daemon) -> Vec<(String, String)> {
    let state = daemon.client().command("query-state", json!({})).unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    state["broken"].as_array().unwrap().iter().map(|b| (text(&b["kind"]), text(&b["reason"]))).collect()
}

#[test]
fn what_a_crash_left_of_deletions_waits_for_nodes_that_are_missing() {
    let (leave, missing) = (["left.qcow2", "late.qcow2"], "mid.qcow2");
    for comes_back_by in ["state-retry", "a restart"] {
        let dir = Dir::new();
        images(&dir);
        let daemon = start(&dir, &[]);
        let mut c = daemon.client();
        let file = json!({"driver": "file", "filename": "top.qcow2"});
        c.command("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file})).unwrap();
        drop((c, daemon));
        leave.iter().for_each(|name| was_to_go(&dir, name));
        let there = |name: &str| Path::new(&dir.path(name)).exists();
        std::fs::rename(dir.path(missing), dir.path("away")).unwrap();
        // in each life until it has come back
        for life in 0..2 {
            let daemon = start_saying(&dir, &[], Stdio::null());
            let waits = broken(&daemon);
            let of = |kind: &str| waits.iter().filter(|b| b.0 == kind).collect::<Vec<_>>();
            assert!(!of("node").is_empty(), "{waits:?}");
            assert_eq!(of("deletion of image").len(), 2, "life {life}: {waits:?}");
            let why = |b: &&(String, String)| b.1.contains("is not there and may need it");
            assert!(of("deletion of image").iter().all(why), "{waits:?}");
            assert!(leave.into_iter().all(there), "life {life}");
            // a retry as long as it is missing changes nothing
            daemon.client().command("state-retry", json!({})).unwrap();
            assert!(leave.into_iter().all(there), "life {life}, after a retry");
        }
        let daemon = if comes_back_by == "state-retry" {
            let daemon = start_saying(&dir, &[], Stdio::null());
            let mut c = daemon.client();
            std::fs::rename(dir.path("away"), dir.path(missing)).unwrap();
            assert_eq!(c.command("state-retry", json!({})).unwrap()["broken"], json!([]));
            for _ in leave {
                let told = c.event("BLOCK_JOB_IMAGE_DELETED");
                assert_eq!((&told["device"], &told["deleted"]), (&json!("j"), &json!(true)), "{told}");
            }
            daemon
        } else {
            std::fs::rename(dir.path("away"), dir.path(missing)).unwrap();
            start(&dir, &[])
        };
        assert_eq!(broken(&daemon), [], "{comes_back_by}");
        assert!(!leave.into_iter().any(there), "{comes_back_by}");
        assert!(["top.qcow2", missing, "base.qcow2"].into_iter().all(there));
        drop(daemon);
        // and it is done with: another file of that name is nobody's business
        std::fs::write(dir.path(leave[0]), "new").unwrap();
        assert_eq!(broken(&start(&dir, &[])), []);
        assert!(there(leave[0]));
    }
}
