//! `liveblk switchover`, typed on the primary: the sides change roles, and nothing is lost.

use crate::replicate::{absolute, address};
use crate::watch::{number, text};
use crate::{Outcome, SocketArgs, pair};
use clap::Args;
use qmpclient::Client;
use serde_json::json;

#[derive(Args)]
pub(crate) struct SwitchoverArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// The pair's name
    #[arg(default_value = pair::NAMELESS)]
    group: String,
    /// Where this side listens afterwards, as secondary: HOST:PORT or a path
    #[arg(long, value_name = "ADDR")]
    listen: String,
    /// What the other side calls that address, if it is another
    #[arg(long, value_name = "ADDR")]
    advertise: Option<String>,
    /// Which secondary takes over, if there are several
    #[arg(long, value_name = "ADDR")]
    to: Option<String>,
}

pub(crate) fn run(args: &SwitchoverArgs) -> Outcome {
    let mut client = Client::connect(&args.socket.socket)?;
    let Some(before) = pair::find(&mut client, &args.group)? else {
        return Err(format!("there is no pair named {}\n  `liveblk status` lists them", args.group));
    };
    if before["role"] != "primary" {
        return Err(format!("{} is a {} here: type this on the primary", args.group, text(&before["role"])));
    }
    let to = match (&args.to, pair::peers(&before)) {
        (Some(to), _) => to.clone(),
        (None, [one]) => text(&one["name"]),
        (None, _) => {
            return Err("there are several secondaries\n  Say which takes over: --to ADDR".to_owned());
        }
    };
    let advertise = match &args.advertise {
        Some(a) if a.contains('/') => Some(absolute(a)?),
        a => a.clone(),
    };
    let mut command = json!({"group": args.group, "to": to, "listen": address(&args.listen)?});
    if let Some(a) = advertise {
        command["advertise"] = json!(a);
    }
    let done = client.execute("replication-switchover", &command)?;
    println!(
        "{} is served at {to} since checkpoint {}; requests waited {}; nothing was lost",
        args.group,
        done["epoch"],
        pair::tenths_of_ms(number(&done["duration-us"]))
    );
    println!("this side follows it, at {}; writes here fail", text(&done["address"]));
    Ok(())
}
