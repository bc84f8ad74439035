//! Which crate may import which: only downwards, never sideways (DESIGN section 2), checked from `cargo metadata`.

use crate::shell::{self, Outcome, fail};
use serde_json::Value;
use std::process::Command;

/// Crate and layer. Development crates (no number in DESIGN) may use anything and be used by tests only.
const LAYERS: &[(&str, u32)] = &[
    // `block` is nouns without I/O; `env` speaks in them, so it stands one step lower than in DESIGN's drawing
    // (docs/decisions/0001-block-below-env.md).
    ("block", 0),
    // std and serde_json only; for the human's command and for chores
    ("qmpclient", 0),
    ("env", 1),
    ("bitmap", 1),
    ("nbd", 1),
    ("qapi", 1),
    ("tls", 2),
    ("state", 2),
    ("dirtylog", 2),
    ("graph", 2),
    ("qcow2", 3),
    ("drivers", 3),
    ("copy", 4),
    // above `copy`: a copy-before-write filter that a user adds is a filter and who decides what it copies
    ("open", 5),
    ("jobs", 6),
    ("exports", 6),
    ("replication", 6),
    ("control", 7),
    ("daemon", 8),
    ("cli", 8),
];

pub(crate) fn run() -> Outcome {
    let text = shell::output(
        Command::new("cargo")
            .args(["metadata", "--format-version=1", "--no-deps"])
            .current_dir(shell::root()),
    )?;
    let metadata: Value = serde_json::from_str(&text).map_err(|e| format!("cargo metadata: {e}"))?;
    let layer = |name: &str| LAYERS.iter().find(|(n, _)| *n == name).map(|(_, l)| *l);
    let mut wrong = Vec::new();
    let empty = Vec::new();
    for package in metadata["packages"].as_array().unwrap_or(&empty) {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(mine) = layer(name) else { continue };
        for dep in package["dependencies"].as_array().unwrap_or(&empty) {
            // tests may reach for anything
            if dep["kind"].as_str() == Some("dev") || dep["path"].is_null() {
                continue;
            }
            let other = dep["name"].as_str().unwrap_or_default();
            match layer(other) {
                Some(theirs) if theirs < mine => {}
                Some(theirs) => wrong.push(format!("{name} [{mine}] imports {other} [{theirs}]")),
                None => wrong.push(format!("{name} [{mine}] imports the development crate {other}")),
            }
        }
    }
    if wrong.is_empty() {
        println!("layers: {} crates import only downwards", LAYERS.len());
        return Ok(());
    }
    fail(format!("imports against the layers:\n  {}", wrong.join("\n  ")))
}
