//! `liveblk failover`: the secondary takes over.
//!
//! What must stay true: a primary that is alive is not robbed of its disk by accident; the command may be repeated.

use crate::watch::{number, text};
use crate::{Outcome, SocketArgs, pair};
use clap::Args;
use qmpclient::Client;
use serde_json::{Value, json};
use std::time::Duration;

/// Between looks at a merge.
const EVERY: Duration = Duration::from_millis(50);

#[derive(Args)]
pub(crate) struct FailoverArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// The pair's name
    #[arg(default_value = pair::NAMELESS)]
    group: String,
    /// Serve the checkpoint alone, without what was written on this side since
    #[arg(long)]
    discard_own_writes: bool,
    /// Go back to this checkpoint, if it is kept (`liveblk replicate --keep`); what was written on this side since goes
    #[arg(long, value_name = "NUMBER")]
    checkpoint: Option<u64>,
    /// Take over although the primary is connected, or its arbiter does not allow it (what it wrote since the last checkpoint is lost)
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: &FailoverArgs) -> Outcome {
    let mut client = Client::connect(&args.socket.socket)?;
    let Some(before) = pair::find(&mut client, &args.group)? else {
        return Err(format!("there is no pair named {}\n  `liveblk status` lists them", args.group));
    };
    if before["role"] != "secondary" {
        return Err(format!(
            "{} is a {} here: only a secondary takes over",
            args.group,
            text(&before["role"])
        ));
    }
    if before["state"] == "running" && !args.force {
        return Err(format!(
            "the primary of {} is alive and connected\n  To take over although what it wrote since checkpoint {} would be lost: --force",
            args.group, before["committed-epoch"]
        ));
    }
    let mut wanted = json!({"group": args.group});
    if args.discard_own_writes {
        wanted["own-writes"] = json!("discard");
    }
    if let Some(epoch) = args.checkpoint {
        wanted["epoch"] = json!(epoch);
    }
    if args.force {
        // what comes after this checkpoint is given up
        wanted["force"] = json!(true);
        wanted["acknowledge-loss"] = before["committed-epoch"].clone();
    }
    let done = take_over(&mut client, &wanted)?;
    let age = done.get("age-ms").and_then(Value::as_u64);
    let age = age.map(|ms| format!(", {} old", pair::time(ms))).unwrap_or_default();
    println!(
        "{} serves checkpoint {}{age} here, for reading and writing, {} after the command",
        args.group,
        done["epoch"],
        pair::tenths_of_ms(number(&done["duration-us"]))
    );
    merged(&mut client, &args.group)
}

/// Takes over, as soon as the lease of the other side is over if it has one that it does not renew.
fn take_over(client: &mut Client, wanted: &Value) -> Outcome<Value> {
    let mut before = u64::MAX;
    loop {
        match client.execute("replication-failover", wanted) {
            Err(e) => match lease(&e) {
                // a side that renews it lives
                Some((holder, left)) if left < before => {
                    if before == u64::MAX {
                        println!("waiting for the lease of {holder} to end, {} at most", pair::time(left));
                    }
                    before = left;
                    // what is left is known to the second
                    std::thread::sleep(Duration::from_millis(left.min(1100)));
                }
                _ => return Err(e),
            },
            done => return done,
        }
    }
}

/// Who owns the group for another so many milliseconds, if that is why somebody may not take over.
fn lease(refused: &str) -> Option<(&str, u64)> {
    let (holder, rest) = refused.split_once(" owns the group by its lease for another ")?;
    let (left, _) = rest.split_once(" ms")?;
    Some((holder.rsplit(' ').next()?, left.parse().ok()?))
}

/// Waits for the end of the merge, which goes on behind the service.
fn merged(client: &mut Client, group: &str) -> Outcome {
    loop {
        let now = pair::find(client, group)?.unwrap_or_default();
        match now["stage"].as_str() {
            Some("failover") => std::thread::sleep(EVERY),
            Some("done") => {
                println!(
                    "the disk alone holds everything now; to protect it again: liveblk replicate DISK --to ADDR"
                );
                return Ok(());
            }
            _ => {
                let why = now.get("last-error").map(text).unwrap_or_default();
                return Err(format!(
                    "the merge failed: {why}\n  Service goes on. When that is mended: liveblk failover {group}"
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::lease;

    #[test]
    fn who_has_the_lease_is_read_from_the_refusal() {
        let said = "Replication group 'g': host-3 owns the group by its lease for another 8000 ms. To take over nevertheless";
        assert_eq!(lease(said), Some(("host-3", 8000)));
        assert_eq!(lease("the primary has acknowledged writes"), None);
    }
}
