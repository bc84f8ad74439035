//! Bitmaps that survive: kill -9 under a client, a clean end, other programs in between. More of it: `tests/compat/dirty.py`.

use crate::common::{Daemon, Dir};
use crate::disk::tool;
use crate::wire::compare;
use serde_json::json;

#[test]
fn no_kill_makes_a_bitmap_short() {
    let seed = std::env::var("LIVEBLK_SEED").unwrap_or_else(|_| std::process::id().to_string());
    compare("dirty.py", &["--rounds".to_owned(), "3".to_owned(), "--seed".to_owned(), seed]);
}

#[test]
fn a_damaged_file_of_bitmaps_keeps_no_disk_from_being_opened() {
    let dir = Dir::new();
    tool(&dir, "qemu-img|create|-q|-f|raw|disk.raw|8M");
    let options = ["--state-dir", "state"];
    let node = json!({"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": "disk.raw"}});
    let bitmap = json!({"node": "n", "name": "b", "persistent": true});
    let daemon = Daemon::start(&dir, &options);
    let mut c = daemon.client();
    c.command("blockdev-add", node).unwrap();
    c.command("block-dirty-bitmap-add", bitmap.clone()).unwrap();
    drop(c);
    drop(daemon);
    let all: Vec<_> = std::fs::read_dir(dir.0.join("state")).unwrap().flatten().map(|e| e.path()).collect();
    let kept = all.iter().find(|p| p.to_string_lossy().contains("bitmaps-")).unwrap();
    let sound = std::fs::read(kept).unwrap();
    // the kernel may keep the socket of a killed process for a moment
    let start = || {
        let _not_there = std::fs::remove_file(dir.path("qmp.sock"));
        Daemon::start_saying(&dir, &options, std::fs::File::create(dir.path("said")).unwrap().into())
    };
    // a file without a header is what a daemon leaves that was killed when it had just made it
    let lives = [("cut to nothing", 0, 0u8), ("zeroes", sound.len(), 0), ("other bytes", sound.len(), 0xa5)];
    for (what, len, byte) in lives {
        std::fs::write(kept, vec![byte; len]).unwrap();
        let daemon = start();
        let mut c = daemon.client();
        let nodes = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
        let n = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "n").unwrap();
        assert!(n["dirty-bitmaps"].is_null(), "{what}: {n}");
        let said = std::fs::read_to_string(dir.path("said")).unwrap();
        assert_eq!(said.contains("is damaged"), byte != 0, "{what}: {said}");
        // and the next one is kept again
        c.command("block-dirty-bitmap-add", bitmap.clone()).unwrap();
        drop(c);
        drop(daemon);
        let daemon = start();
        let nodes = daemon.client().command("query-named-block-nodes", json!({"flat": true})).unwrap();
        let n = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "n").unwrap();
        assert_eq!(n["dirty-bitmaps"][0]["inconsistent"].as_bool(), None, "{what}: {n}");
        drop(daemon);
    }
}
