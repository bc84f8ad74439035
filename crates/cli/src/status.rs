//! What a running daemon has: disks, exports, pairs, jobs.

use crate::watch::{facts, jobs, number, text};
use crate::{Outcome, pair};
use indicatif::HumanBytes;
use qmpclient::Client;
use serde_json::{Value, json};

pub(crate) fn run(client: &mut Client) -> Outcome {
    let version = client.execute("query-version", &json!({}))?;
    println!("daemon  {}", text(&version["package"]));
    let nodes = list(client.execute("query-named-block-nodes", &json!({"flat": true}))?);
    let exports = list(client.execute("query-block-exports", &json!({}))?);
    println!("disks   {}", if nodes.is_empty() { "none" } else { "" });
    for n in nodes.iter().rev().filter(|n| !text(&n["node-name"]).starts_with('#')) {
        let image = &n["image"];
        println!(
            "  {:<16} {:<10} {:>10} {}{}",
            text(&n["node-name"]),
            text(&n["drv"]),
            HumanBytes(number(&image["virtual-size"])).to_string(),
            if n["ro"] == true { "read-only " } else { "" },
            text(&image["filename"]),
        );
    }
    println!("exports {}", if exports.is_empty() { "none" } else { "" });
    for e in &exports {
        println!("  {:<16} {:<10} serves {}", text(&e["id"]), text(&e["type"]), text(&e["node-name"]));
    }
    let pairs = pair::all(client)?;
    println!("pairs   {}", if pairs.is_empty() { "none" } else { "" });
    pairs.iter().flat_map(pair::lines).for_each(|l| println!("  {l}"));
    let jobs = jobs(client)?;
    println!("jobs    {}", if jobs.is_empty() { "none" } else { "" });
    for j in &jobs {
        println!("  {:<16} {:<10} {}", text(&j["id"]), text(&j["type"]), facts(j));
    }
    let over = client.execute("query-job-log", &json!({"max": 0}))?;
    if let last @ 1.. = number(&over["newest"]) {
        println!("         {last} have ended so far: `liveblk log`");
    }
    Ok(())
}

fn list(v: Value) -> Vec<Value> {
    match v {
        Value::Array(a) => a,
        _ => Vec::new(),
    }
}
