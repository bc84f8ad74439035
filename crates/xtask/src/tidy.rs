//! House rules that no compiler knows. A line may be excused by the comment `tidy: allow(RULE) because …` on it or above.

use crate::shell::{self, Outcome, fail};
use std::path::{Path, PathBuf};

/// A source file longer than this has become hard to hold in the head (DESIGN: around 300-600; this is the ratchet).
const MAX_LINES: usize = 1000;

struct Rule {
    name: &'static str,
    /// Text that must not stand in a line of code.
    words: &'static [&'static str],
    /// Crates (folder names) in which it may.
    except: &'static [&'static str],
    why: &'static str,
}

const RULES: &[Rule] = &[
    Rule {
        name: "outside",
        words: &[
            "std::fs",
            "std::net",
            "std::thread",
            "std::time::Instant",
            "std::time::SystemTime",
            "std::os::unix::net",
        ],
        except: &["env", "xtask", "cli", "qmpclient", "nbdload", "crashlab", "sim", "fuzzing"],
        why: "the outside is reached through `env` alone, or the simulator does not see it",
    },
    Rule {
        name: "hash-order",
        words: &["HashMap", "HashSet"],
        except: &["xtask", "cli", "qmpclient", "nbdload"],
        why: "iteration order must not depend on hashing, or a seed does not repeat a run",
    },
    Rule {
        name: "marker",
        words: &["TODO", "FIXME", "XXX"],
        except: &["xtask"],
        why: "finish it or write a decision record",
    },
];

pub(crate) fn run() -> Outcome {
    let mut wrong = Vec::new();
    let crates = shell::root().join("crates");
    let mut files = Vec::new();
    collect(&crates, &mut files);
    for file in &files {
        check(file, &crates, &mut wrong);
    }
    if wrong.is_empty() {
        println!("tidy: {} source files", files.len());
        return Ok(());
    }
    fail(format!("{} findings:\n  {}", wrong.len(), wrong.join("\n  ")))
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let mut paths: Vec<_> = entries.flatten().map(|e| e.path()).collect();
    paths.sort();
    for p in paths {
        if p.is_dir() {
            collect(&p, files);
        } else if p.extension().is_some_and(|e| e == "rs") {
            files.push(p);
        }
    }
}

fn check(file: &Path, crates: &Path, wrong: &mut Vec<String>) {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let relative = file.strip_prefix(crates).unwrap_or(file);
    let shown = relative.display();
    let crate_name = relative.iter().next().map(|c| c.to_string_lossy().into_owned()).unwrap_or_default();
    let is_test = relative
        .iter()
        .any(|part| part == "tests" || part == "testing" || part == "examples" || part == "benches");
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() > MAX_LINES {
        wrong.push(format!(
            "{shown}: {} lines; split it along what it knows (at most {MAX_LINES})",
            lines.len()
        ));
    }
    if !lines.iter().take(5).any(|l| l.starts_with("//!")) {
        wrong.push(format!("{shown}: begins without `//!` saying what can happen and what must stay true"));
    }
    let is_root = relative.ends_with("src/lib.rs") || relative.ends_with("src/main.rs");
    if is_root && crate_name != "env" && !text.contains("#![forbid(unsafe_code)]") {
        wrong.push(format!("{shown}: `#![forbid(unsafe_code)]` is missing; only `env` may go without"));
    }
    if is_test {
        return;
    }
    let code_end = lines.iter().position(|l| l.trim() == "#[cfg(test)]").unwrap_or(lines.len());
    for (i, line) in lines.iter().enumerate().take(code_end) {
        let code = line.split("//").next().unwrap_or_default();
        for rule in RULES.iter().filter(|r| !r.except.contains(&crate_name.as_str())) {
            let looked_at = if rule.name == "marker" { line } else { code };
            let excuse = format!("tidy: allow({})", rule.name);
            let excused = line.contains(&excuse) || (i > 0 && lines[i - 1].contains(&excuse));
            if let Some(word) = rule.words.iter().find(|w| looked_at.contains(**w))
                && !excused
            {
                wrong.push(format!("{shown}:{}: `{word}`: {}", i + 1, rule.why));
            }
        }
    }
}
