//! Mirrors that prove that their target equals their source: under a client, with bytes that somebody else changes in the target.

use super::{DISK, MODES, SIZE, Writer, compare, image, job, mirror, model, pause, raw_pair, serve, verb};
use crate::common::{Client, Dir};
use crate::disk::{tool, until};
use serde_json::{Value, json};
use std::io::{Read, Seek, SeekFrom, Write};

/// Changes one byte of an image behind everybody's back.
pub(crate) fn flip(dir: &Dir, file: &str, at: u64) {
    let mut f = std::fs::File::options().read(true).write(true).open(dir.path(file)).unwrap();
    let mut byte = [0];
    f.seek(SeekFrom::Start(at)).unwrap();
    f.read_exact(&mut byte).unwrap();
    f.seek(SeekFrom::Start(at)).unwrap();
    f.write_all(&[byte[0] ^ 0x80]).unwrap();
}

/// The digest of a raw image, straight from the definition in docs/digest.md.
pub(crate) fn digest(dir: &Dir, file: &str) -> String {
    let disk = std::fs::read(dir.path(file)).unwrap();
    let mut level: Vec<[u8; 32]> = disk.chunks(65536).map(|c| blake3::hash(c).into()).collect();
    while level.len() > 1 {
        level = level.chunks(16).map(|c| blake3::hash(&c.concat()).into()).collect();
    }
    let all = [b"liveblk disk 1\n".to_vec(), (disk.len() as u64).to_le_bytes().to_vec(), level.concat()];
    format!("lbd1:{}", blake3::hash(&all.concat()))
}

/// The data of the first event `name` that comes.
pub(crate) fn event(c: &mut Client, name: &str) -> Value {
    loop {
        if let Some(at) = c.events.iter().position(|e| e["event"] == name) {
            return c.events.remove(at)["data"].clone();
        }
        let next = c.read().expect("an event");
        c.events.push(next);
    }
}

fn wait_for_report(c: &mut Client, fits: impl Fn(&Value) -> bool) {
    while !fits(&job(c)["verify"]) {
        pause(5);
    }
}

#[test]
fn proven_equal_under_a_writing_client_in_all_modes() {
    for mode in MODES {
        let dir = Dir::new();
        let (mut daemon, mut c) = raw_pair(&dir);
        let writer = Writer::start(&dir, DISK, &["4", "2000"]);
        mirror(&mut c, &json!({"copy-mode": mode, "verify": "full", "auto-dismiss": false})).unwrap();
        until(&mut c, "m", "BLOCK_JOB_READY");
        let ready = job(&mut c);
        assert_eq!(ready["verify"]["mismatches"], 0, "{mode}: {ready}");
        assert!(ready["verify"].get("digest").is_none(), "{ready}");
        pause(100);
        verb(&mut c, "job-complete", "id").unwrap();
        let done = event(&mut c, "BLOCK_JOB_COMPLETED");
        assert!(done.get("error").is_none(), "{done}");
        let proof = &done["verify"];
        assert_eq!((&proof["mode"], &proof["verified-bytes"]), (&json!("full"), &json!(SIZE)), "{done}");
        // the digest is that of the moment of the pivot: the source has stayed as it was then
        assert_eq!(proof["digest"], digest(&dir, "src.raw"), "{mode}");
        until(&mut c, "m", "concluded");
        assert_eq!(c.command("query-jobs", json!({})).unwrap()[0]["verify"], *proof);
        verb(&mut c, "job-dismiss", "id").unwrap();
        writer.stop();
        compare(&dir, &mut daemon, &mut c, "raw", "dst.raw");
    }
}

/// After the copying and before the comparison: named, and the client stays where it is; or repaired.
#[test]
fn a_byte_flipped_after_copying_is_found() {
    for repair in [false, true] {
        let dir = Dir::new();
        let (mut daemon, mut c) = raw_pair(&dir);
        let slow = json!({"speed": 8 << 20, "verify": "full", "verify-repair": repair});
        mirror(&mut c, &slow).unwrap();
        wait_for_report(&mut c, |v| v["verified-bytes"].as_u64() > Some(0));
        let at = SIZE as u64 - 5;
        flip(&dir, "dst.raw", at);
        let named = event(&mut c, "BLOCK_JOB_MISMATCH");
        let last = &named["changed-last"];
        let said = json!({"device": "m", "offset": at, "length": 1, "changed-last": last, "repair": repair});
        assert_eq!(named, said);
        assert!(last == "target", "{named}");
        if repair {
            until(&mut c, "m", "BLOCK_JOB_READY");
            verb(&mut c, "job-complete", "id").unwrap();
        }
        let done = event(&mut c, "BLOCK_JOB_COMPLETED");
        let exports = c.command("query-block-exports", json!({})).unwrap();
        let proof = &done["verify"];
        assert_eq!(proof["mismatches"], 1);
        if repair {
            assert_eq!((done.get("error"), &proof["repaired"]), (None, &json!(1)), "{done}");
            assert_eq!(
                (&exports[0]["node-name"], &proof["digest"]),
                (&json!("dst"), &json!(digest(&dir, "dst.raw")))
            );
            compare(&dir, &mut daemon, &mut c, "raw", "dst.raw");
        } else {
            let why = format!("target differs from source: 1 place, the first at offset {at} (1 bytes)");
            assert_eq!((&done["error"], proof.get("digest")), (&json!(why), None), "{done}");
            assert_eq!(exports[0]["node-name"], "src");
            compare(&dir, &mut daemon, &mut c, "raw", "src.raw");
        }
    }
}

/// Nothing is copied: somebody else has made the target, and QEMU has changed it since. In data, in a hole, at either end.
#[test]
fn a_target_that_others_made_is_adopted_only_if_it_is_equal() {
    for (format, at) in
        [("raw", 0), ("raw", 3 << 20), ("qcow2", 70_000), ("qcow2", 3 << 20), ("qcow2", 0x7f_ffff)]
    {
        let dir = Dir::new();
        model(&dir);
        tool(&dir, "cp|model.raw|src.raw");
        // compressed, where that is possible
        let packed = if format == "qcow2" { "-c|" } else { "" };
        tool(&dir, &format!("qemu-img|convert|-f|raw|-O|{format}|{packed}model.raw|dst.{format}"));
        let dst = format!("dst.{format}");
        let adopt = json!({"sync": "none", "verify": "full"});
        for flipped in [false, true] {
            if flipped {
                tool(&dir, &format!("qemu-io|-f|{format}|-c|write -P 251 {at} 1|{dst}"));
            }
            let (mut daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &image(format, &dst));
            mirror(&mut c, &adopt).unwrap();
            if flipped {
                let named = event(&mut c, "BLOCK_JOB_MISMATCH");
                assert_eq!((&named["offset"], &named["length"]), (&json!(at), &json!(1)), "{named}");
                assert_eq!(named["changed-last"], "unknown");
            } else {
                until(&mut c, "m", "BLOCK_JOB_READY");
                verb(&mut c, "job-complete", "id").unwrap();
            }
            let done = event(&mut c, "BLOCK_JOB_COMPLETED");
            assert_eq!(done.get("error").is_some(), flipped, "{done}");
            if !flipped {
                assert_eq!(done["verify"]["digest"], digest(&dir, "model.raw"));
            }
            c.command("quit", json!({})).unwrap();
            assert!(daemon.wait().success());
        }
    }
}

/// A client that writes all over the disk as fast as it can, faster than it can be compared under a rate limit: it is slowed, and the
/// job completes.
#[test]
fn completion_comes_about_under_a_client_that_never_rests() {
    let dir = Dir::new();
    let (mut daemon, mut c) = raw_pair(&dir);
    mirror(&mut c, &json!({"copy-mode": "write-blocking", "verify": "full"})).unwrap();
    until(&mut c, "m", "BLOCK_JOB_READY");
    let writer = Writer::start(&dir, DISK, &["16"]);
    pause(100);
    verb(&mut c, "job-complete", "id").unwrap();
    let done = event(&mut c, "BLOCK_JOB_COMPLETED");
    assert_eq!((done.get("error"), &done["verify"]["digest"]), (None, &json!(digest(&dir, "src.raw"))));
    writer.stop();
    compare(&dir, &mut daemon, &mut c, "raw", "dst.raw");
}

#[test]
fn a_sample_says_what_it_is() {
    let dir = Dir::new();
    let (mut daemon, mut c) = raw_pair(&dir);
    mirror(&mut c, &json!({"verify": "sampled", "verify-share": 10, "verify-seed": 5})).unwrap();
    until(&mut c, "m", "BLOCK_JOB_READY");
    verb(&mut c, "job-complete", "id").unwrap();
    let proof = event(&mut c, "BLOCK_JOB_COMPLETED")["verify"].clone();
    assert_eq!((&proof["mode"], &proof["share"], &proof["seed"]), (&json!("sampled"), &json!(10), &json!(5)));
    let verified = proof["verified-bytes"].as_u64().unwrap();
    assert!((13 << 16..=14 << 16).contains(&verified), "{verified} of 128 units");
    assert!(proof.get("digest").is_none());
    for (more, why) in [
        (json!({"verify-repair": true}), "'verify-repair' needs 'verify' to be 'sampled' or 'full'"),
        (
            json!({"verify": "full", "verify-seed": 1}),
            "'verify-share' and 'verify-seed' need 'verify' to be 'sampled'",
        ),
        (
            json!({"verify": "sampled", "verify-share": 0}),
            "Parameter 'verify-share' expects a value in range [1, 100]",
        ),
    ] {
        assert_eq!(mirror(&mut c, &more), Err(why.to_owned()));
    }
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
}
