//! `block-verify`: two disks are compared while a client writes to one; bytes are flipped by QEMU.

use crate::common::{Client, Daemon, Dir};
use crate::disk::{tool, until};
use crate::mirrors::proofs::{digest, event, flip};
use crate::mirrors::{DISK, Writer, image, model, serve};
use serde_json::{Value, json};

/// A disk that is served, and a copy of it in another format.
fn pair(dir: &Dir, format: &str, flipped: &[u64]) -> (Daemon, Client) {
    model(dir);
    tool(dir, "cp|model.raw|src.raw");
    tool(dir, &format!("qemu-img|convert|-f|raw|-O|{format}|model.raw|dst"));
    for at in flipped {
        tool(dir, &format!("qemu-io|-f|{format}|-c|write -P 251 {at} 1|dst"));
    }
    serve(dir, &image("raw", "src.raw"), &image(format, "dst"))
}

fn verify(c: &mut Client, more: &Value) -> Result<Value, String> {
    let mut a = json!({"job-id": "v", "device": "src", "target": "dst"});
    for (k, v) in more.as_object().unwrap() {
        a[k] = v.clone();
    }
    c.command("block-verify", a)
}

fn end(mut daemon: Daemon, mut c: Client) {
    until(&mut c, "v", "null");
    let nodes = c.command("query-named-block-nodes", json!({"flat": true})).unwrap();
    assert!(!nodes.to_string().contains("mirror_top"), "the filter stays");
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
}

#[test]
fn equal_disks_have_one_digest_whatever_they_are_stored_as() {
    for format in ["raw", "qcow2"] {
        let dir = Dir::new();
        let (daemon, mut c) = pair(&dir, format, &[]);
        verify(&mut c, &json!({})).unwrap();
        let done = event(&mut c, "BLOCK_JOB_COMPLETED");
        assert_eq!((&done["type"], done.get("error")), (&json!("verify"), None), "{done}");
        assert_eq!(done["verify"]["digest"], digest(&dir, "model.raw"), "{format}");
        assert_eq!((&done["len"], &done["offset"]), (&json!(8 << 20), &json!(8 << 20)));
        end(daemon, c);
    }
}

#[test]
fn what_differs_is_named_and_mended_if_asked() {
    let places = [0, 70_000, 3 << 20, (8 << 20) - 1];
    for repair in ["none", "target"] {
        let dir = Dir::new();
        let (daemon, mut c) = pair(&dir, "qcow2", &places);
        verify(&mut c, &json!({"repair": repair})).unwrap();
        let mut named: Vec<u64> =
            places.iter().map(|_| event(&mut c, "BLOCK_JOB_MISMATCH")["offset"].as_u64().unwrap()).collect();
        named.sort_unstable();
        assert_eq!(named, places);
        let done = event(&mut c, "BLOCK_JOB_COMPLETED");
        let proof = &done["verify"];
        assert_eq!((&proof["mismatches"], &proof["mismatched-bytes"]), (&json!(4), &json!(4)), "{done}");
        if repair == "target" {
            assert_eq!((done.get("error"), &proof["repaired"]), (None, &json!(4)));
            assert_eq!(proof["digest"], digest(&dir, "model.raw"));
            end(daemon, c);
            tool(&dir, "qemu-img|compare|-f|raw|-F|qcow2|model.raw|dst");
        } else {
            let why = "target differs from source: 4 places, the first at offset 0 (1 bytes)";
            assert_eq!((&done["error"], proof.get("digest")), (&json!(why), None));
            end(daemon, c);
        }
    }
}

/// The client's writes go to the source alone: without repair they are differences, of which the source changed last; with it the
/// target follows, and is equal at the end.
#[test]
fn a_client_writes_meanwhile() {
    let dir = Dir::new();
    let (daemon, mut c) = pair(&dir, "raw", &[]);
    verify(&mut c, &json!({"speed": 4 << 20})).unwrap();
    until(&mut c, "v", "running");
    tool(&dir, &format!("qemu-io|-f|raw|-c|write -P 1 7M 64k|-c|write -P 1 0 1k|{DISK}"));
    c.command("block-job-set-speed", json!({"device": "v", "speed": 0})).unwrap();
    let mut named: Vec<(u64, Value)> = Vec::new();
    for _ in 0..2 {
        let e = event(&mut c, "BLOCK_JOB_MISMATCH");
        named.push((e["offset"].as_u64().unwrap() >> 20, e["changed-last"].clone()));
    }
    named.sort_by_key(|n| n.0);
    assert_eq!(named, [(0, json!("source")), (7, json!("source"))]);
    assert!(event(&mut c, "BLOCK_JOB_COMPLETED").get("error").is_some());
    end(daemon, c);

    let dir = Dir::new();
    let (daemon, mut c) = pair(&dir, "raw", &[5 << 20]);
    let writer = Writer::start(&dir, DISK, &["4", "1000"]);
    verify(&mut c, &json!({"repair": "target", "auto-dismiss": false})).unwrap();
    let done = event(&mut c, "BLOCK_JOB_COMPLETED");
    assert_eq!(done.get("error"), None, "{done}");
    // the instant at which the two were equal is over for the source, not for the target
    assert_eq!(done["verify"]["digest"], digest(&dir, "dst"));
    until(&mut c, "v", "concluded");
    c.command("job-dismiss", json!({"id": "v"})).unwrap();
    writer.stop();
    end(daemon, c);
    tool(&dir, "qemu-img|compare|-f|raw|-F|raw|model.raw|src.raw");
}

#[test]
fn the_usual_verbs_and_what_is_refused() {
    let dir = Dir::new();
    let (daemon, mut c) = pair(&dir, "raw", &[]);
    for (more, why) in [
        (json!({"target": "src"}), "Can't compare a node with itself"),
        (json!({"mode": "off"}), "'verify' must be 'sampled' or 'full'"),
        (json!({"share": 3}), "'verify-share' and 'verify-seed' need 'verify' to be 'sampled'"),
        (json!({"target": "no"}), "Cannot find device='no' nor node-name='no'"),
    ] {
        assert_eq!(verify(&mut c, &more), Err(why.to_owned()));
    }
    // somebody writes the target: no statement would hold
    c.command("block-export-add", json!({"type": "nbd", "id": "e1", "node-name": "dst", "writable": true}))
        .unwrap();
    let refused = verify(&mut c, &json!({})).unwrap_err();
    assert!(refused.contains("write"), "{refused}");
    c.command("block-export-del", json!({"id": "e1", "mode": "hard"})).unwrap();
    until(&mut c, "e1", "BLOCK_EXPORT_DELETED");
    c.events.clear();
    verify(&mut c, &json!({"speed": 1 << 20, "mode": "sampled", "share": 50, "seed": 3})).unwrap();
    until(&mut c, "v", "running");
    c.command("job-pause", json!({"id": "v"})).unwrap();
    until(&mut c, "v", "paused");
    c.command("job-resume", json!({"id": "v"})).unwrap();
    let job = c.command("query-jobs", json!({})).unwrap()[0].clone();
    assert_eq!((&job["type"], &job["verify"]["share"]), (&json!("verify"), &json!(50)), "{job}");
    c.command("job-cancel", json!({"id": "v"})).unwrap();
    until(&mut c, "v", "BLOCK_JOB_CANCELLED");
    end(daemon, c);
}

/// One is longer: equal only if it is zero there, and then without a digest, which depends on the length.
#[test]
fn of_different_lengths() {
    for other in [None, Some(8 << 20), Some((12 << 20) - 1)] {
        let dir = Dir::new();
        model(&dir);
        tool(&dir, "cp|model.raw|src.raw");
        tool(&dir, "cp|model.raw|dst");
        tool(&dir, "truncate|-s|12M|dst");
        if let Some(at) = other {
            flip(&dir, "dst", at);
        }
        let (daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &image("raw", "dst"));
        verify(&mut c, &json!({})).unwrap();
        let done = event(&mut c, "BLOCK_JOB_COMPLETED");
        let why = other.map(|at: u64| {
            json!(format!(
                "the target is longer than the other, which ends at 8388608, and is not zero at offset {at}"
            ))
        });
        assert_eq!((done.get("error"), done["verify"].get("digest")), (why.as_ref(), None));
        end(daemon, c);
    }
}

/// Bytes that went through a socket between two daemons, both ways.
struct Counted {
    bytes: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

impl Counted {
    /// Listens at `at` and passes everything to and from `to`.
    fn start(dir: &Dir, at: &str, to: &str) -> Counted {
        use std::os::unix::net::{UnixListener, UnixStream};
        let listener = UnixListener::bind(dir.0.join(at)).unwrap();
        let (to, bytes) = (dir.0.join(to), std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0)));
        let counted = Counted { bytes: bytes.clone() };
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let far = UnixStream::connect(&to).unwrap();
                let other = (far.try_clone().unwrap(), near.try_clone().unwrap());
                for (mut from, mut onto) in [(near, far), other] {
                    let bytes = bytes.clone();
                    std::thread::spawn(move || {
                        use std::io::{Read, Write};
                        let mut piece = vec![0; 1 << 16];
                        while let Ok(n @ 1..) = from.read(&mut piece) {
                            bytes.fetch_add(n as u64, std::sync::atomic::Ordering::Relaxed);
                            if onto.write_all(&piece[..n]).is_err() {
                                break;
                            }
                        }
                        let _ = onto.shutdown(std::net::Shutdown::Both);
                    });
                }
            }
        });
        counted
    }

    fn take(&self) -> u64 {
        self.bytes.swap(0, std::sync::atomic::Ordering::Relaxed)
    }
}

/// The target is on another liveblkd: its hashes cross the link, not its bytes; on a server of others its bytes do, and the job says so.
#[test]
fn only_hashes_cross_the_link_to_another_liveblkd() {
    for (ours, flipped) in [(true, None), (true, Some(5 << 20)), (false, None), (false, Some((8 << 20) - 1))]
    {
        let (dir, away) = (Dir::new(), Dir::new());
        model(&dir);
        tool(&dir, "cp|model.raw|src.raw");
        tool(&dir, &format!("cp|model.raw|{}", away.path("far.raw")));
        if let Some(at) = flipped {
            flip(&away, "far.raw", at);
        }
        let far = if ours {
            Some(Daemon::start(
                &away,
                &[
                    "--blockdev",
                    "driver=file,node-name=far,filename=far.raw",
                    "--nbd-server",
                    "addr.type=unix,addr.path=far.sock",
                    "--export",
                    "nbd,id=e,node-name=far,name=far,writable=on",
                ],
            ))
        } else {
            None
        };
        let _other = (!ours).then(|| {
            crate::mirrors::Server::start(
                &away,
                &format!("qemu-nbd|-t|-e|9|-x|far|-k|{}|-f|raw|far.raw", away.path("far.sock")),
                "far.sock",
            )
        });
        while std::os::unix::net::UnixStream::connect(away.0.join("far.sock")).is_err() {
            crate::mirrors::pause(5);
        }
        let counted = Counted::start(&away, "between.sock", "far.sock");
        let server = json!({"type": "unix", "path": away.path("between.sock")});
        let nbd = json!({"driver": "raw", "file": {"driver": "nbd", "server": server, "export": "far"}});
        let (daemon, mut c) = serve(&dir, &image("raw", "src.raw"), &nbd);
        counted.take();
        verify(&mut c, &json!({})).unwrap();
        if let Some(at) = flipped {
            let named = event(&mut c, "BLOCK_JOB_MISMATCH");
            assert_eq!((&named["offset"], &named["length"]), (&json!(at), &json!(1)));
        }
        let done = event(&mut c, "BLOCK_JOB_COMPLETED");
        assert_eq!(done.get("error").is_some(), flipped.is_some(), "{done}");
        assert_eq!(done["verify"]["target-read"], if ours { "hashes" } else { "bytes" });
        if flipped.is_none() {
            assert_eq!(done["verify"]["digest"], digest(&dir, "model.raw"));
        }
        let crossed = counted.take();
        // 128 hashes, and where they differ one region of 64 KiB; else the 6 MiB that are no hole
        assert_eq!(crossed < 128 << 10, ours, "{crossed} bytes crossed the link");
        end(daemon, c);
        drop(far);
    }
}
