//! Backups of the built daemon under a client that writes throughout: the target is what the disk contained when the job
//! began, the disk is what the client wrote. Seeds are printed; LIVEBLK_SEED sets one.

mod bitmaps;
mod buffered;
mod drives;
mod ends;
mod fleecing;
mod instants;
mod proofs;

use crate::common::{Client, Daemon, Dir};
use crate::disk::{tool, until};
use crate::mirrors::{DISK, Writer, image, model, pause, serve};
use serde_json::{Value, json};

/// Starts job "b" from `src` to `dst`; `more` are further arguments.
fn backup(c: &mut Client, more: &Value) -> Result<Value, String> {
    let mut a = json!({"job-id": "b", "device": "src", "target": "dst", "sync": "full"});
    for (k, v) in more.as_object().unwrap() {
        a[k] = v.clone();
    }
    c.command("blockdev-backup", a)
}

fn job(c: &mut Client) -> Value {
    c.command("query-block-jobs", json!({})).unwrap()[0].clone()
}

/// Lets the job run as fast as it can, if the client has not made it copy everything already.
fn hurry(c: &mut Client) {
    let _ = c.command("block-job-set-speed", json!({"device": "b", "speed": 0}));
}

/// Raw images `src.raw`, `dst.raw` and `then.raw`, which is what the disk contains at the start.
fn raw_pair(dir: &Dir) -> (Daemon, Client) {
    model(dir);
    tool(dir, "cp|model.raw|src.raw");
    tool(dir, "cp|model.raw|then.raw");
    tool(dir, "truncate|-s|8M|dst.raw");
    serve(dir, &image("raw", "src.raw"), &image("raw", "dst.raw"))
}

/// Ends the daemon; the source is what the client wrote.
fn quit(dir: &Dir, daemon: &mut Daemon, c: &mut Client, (format, file): (&str, &str)) {
    c.command("quit", json!({})).unwrap();
    assert!(daemon.wait().success());
    tool(dir, &format!("qemu-img|compare|-f|raw|-F|{format}|model.raw|{file}"));
}
