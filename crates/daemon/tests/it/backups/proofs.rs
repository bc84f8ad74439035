//! Backups that prove that their target holds what the disk held at the instant, while a client changes the disk.

use super::{backup, job, quit, raw_pair};
use crate::common::Dir;
use crate::disk::{tool, until};
use crate::mirrors::proofs::{digest, event, flip};
use crate::mirrors::{DISK, Writer, image, model, pause, serve};
use serde_json::{Value, json};

/// The digest is that of the disk as it was when the job began, whatever the client wrote since; raw, qcow2, compressed, with a buffer.
#[test]
fn the_instant_is_proven_while_the_client_goes_on() {
    for (format, more) in [
        ("raw", json!({})),
        ("qcow2", json!({})),
        ("qcow2", json!({"compress": true})),
        ("raw", json!({"buffer": "buf"})),
    ] {
        let dir = Dir::new();
        model(&dir);
        tool(&dir, "cp|model.raw|src.raw");
        tool(&dir, "cp|model.raw|then.raw");
        tool(&dir, &format!("qemu-img|create|-q|-f|{format}|dst.{format}|8M"));
        tool(&dir, "qemu-img|create|-q|-f|qcow2|buf.qcow2|8M");
        let (mut daemon, mut c) =
            serve(&dir, &image("raw", "src.raw"), &image(format, &format!("dst.{format}")));
        let mut buffer = image("qcow2", "buf.qcow2");
        buffer["node-name"] = json!("buf");
        c.command("blockdev-add", buffer).unwrap();
        // no client before: the instant is the model
        let mut arguments = more.clone();
        (arguments["verify"], arguments["speed"], arguments["auto-dismiss"]) =
            (json!("full"), json!(16 << 20), json!(false));
        backup(&mut c, &arguments).unwrap();
        let writer = Writer::start(&dir, DISK, &["4", "1000"]);
        let done = event(&mut c, "BLOCK_JOB_COMPLETED");
        assert_eq!(done.get("error"), None, "{done}");
        let proof = &done["verify"];
        assert_eq!(proof["digest"], digest(&dir, "then.raw"), "{format} {more}");
        assert_eq!((&proof["mismatches"], &proof["verified-bytes"]), (&json!(0), &json!(8 << 20)));
        until(&mut c, "b", "concluded");
        c.command("job-dismiss", json!({"id": "b"})).unwrap();
        writer.stop();
        quit(&dir, &mut daemon, &mut c, ("raw", "src.raw"));
        tool(&dir, &format!("qemu-img|compare|-f|raw|-F|{format}|then.raw|dst.{format}"));
    }
}

/// Where the disk still holds what it held then, the place is known to the byte and can be mended; where the client has changed it,
/// the unit is named, and nothing can be done.
#[test]
fn a_flipped_byte_is_found_and_mended_where_the_source_still_has_it() {
    for (changed, repair) in [(false, false), (false, true), (true, true)] {
        let dir = Dir::new();
        let (mut daemon, mut c) = raw_pair(&dir);
        let slow = json!({"verify": "full", "verify-repair": repair, "speed": 8 << 20});
        backup(&mut c, &slow).unwrap();
        while job(&mut c)["verify"]["verified-bytes"].as_u64() == Some(0) {
            pause(5);
        }
        let at = (7 << 20) + 77;
        if changed {
            tool(&dir, &format!("qemu-io|-f|raw|-c|write -P 99 7M 4k|{DISK}"));
        }
        flip(&dir, "dst.raw", at);
        let named = event(&mut c, "BLOCK_JOB_MISMATCH");
        let place: (Value, Value) =
            if changed { (json!(7 << 20), json!(65536)) } else { (json!(at), json!(1)) };
        assert_eq!((named["offset"].clone(), named["length"].clone()), place, "{named}");
        assert_eq!(named["repair"], repair && !changed);
        let done = event(&mut c, "BLOCK_JOB_COMPLETED");
        let good = repair && !changed;
        assert_eq!(done.get("error").is_none(), good, "{done}");
        assert_eq!(done["verify"].get("digest").is_some(), good);
        until(&mut c, "b", "null");
        c.command("quit", json!({})).unwrap();
        assert!(daemon.wait().success());
        if good {
            tool(&dir, "qemu-img|compare|-f|raw|-F|raw|then.raw|dst.raw");
        }
    }
}

#[test]
fn what_is_not_copied_cannot_be_verified() {
    let dir = Dir::new();
    let (mut daemon, mut c) = raw_pair(&dir);
    let refused = backup(&mut c, &json!({"sync": "none", "verify": "full"}));
    assert_eq!(refused, Err("sync mode 'none' copies nothing that could be verified".to_owned()));
    quit(&dir, &mut daemon, &mut c, ("raw", "src.raw"));
}
