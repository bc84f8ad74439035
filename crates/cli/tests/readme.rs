//! README's section on replication, typed as it stands there: every line after a `$`, in two shells that stay, and what is said has the
//! shape that README shows. Only the ports are others, as those of README may be in use.

#![allow(clippy::unwrap_used)] // a test helper that fails fails the test

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

const README: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md");
const SECTION: &str = "## Keep a second copy that can take over";
/// A line that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A line that is typed, and what is shown to come of it.
struct Typed {
    line: String,
    shown: Vec<String>,
}

/// What the section types, in order.
fn script(readme: &str) -> Vec<Typed> {
    let from = readme.find(SECTION).expect("README has the section") + SECTION.len();
    let section = &readme[from..];
    let section = &section[..section.find("\n## ").unwrap_or(section.len())];
    let mut all: Vec<Typed> = Vec::new();
    let mut inside = false;
    for line in section.lines() {
        if line.starts_with("```") {
            inside = !inside;
        } else if let Some(typed) = line.strip_prefix("$ ").filter(|_| inside) {
            all.push(Typed { line: typed.to_owned(), shown: Vec::new() });
        } else if inside && let Some(last) = all.last_mut() {
            last.shown.push(line.to_owned());
        }
    }
    all
}

/// Words alone: numbers, and what depends on the moment, are left out.
fn shape(line: &str) -> String {
    let units = ["KiB", "MiB", "GiB", "ms", "s", "B"];
    let word = |w: &str| {
        let bare = w.trim_matches(|c: char| !c.is_alphanumeric());
        !w.chars().any(|c| c.is_ascii_digit()) && !units.contains(&bare)
    };
    line.split_whitespace().filter(|w| word(w)).collect::<Vec<_>>().join(" ")
}

/// A shell that stays, as a user's does.
struct Shell {
    child: Child,
    to: ChildStdin,
    from: Receiver<String>,
}

impl Shell {
    fn new(dir: &Path, path: &str) -> Shell {
        let mut child = Command::new("sh")
            .current_dir(dir)
            .env("PATH", path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let to = child.stdin.take().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (sender, from) = channel();
        std::thread::spawn(move || out.lines().map_while(Result::ok).all(|l| sender.send(l).is_ok()));
        Shell { child, to, from }
    }

    /// Types a line and gives what is said until it has ended; with `&` at its end, until the first line is said.
    fn types(&mut self, line: &str) -> Vec<String> {
        const END: &str = "-- ended with";
        let stays = line.ends_with('&');
        writeln!(self.to, "{line}").unwrap();
        if !stays {
            writeln!(self.to, "echo \"{END} $?\"").unwrap();
        }
        let mut said = Vec::new();
        loop {
            let next =
                self.from.recv_timeout(PATIENCE).unwrap_or_else(|e| panic!("{line}: {e} after {said:?}"));
            if let Some(status) = next.strip_prefix(END) {
                assert_eq!(status.trim(), "0", "{line}: {said:?}");
                return said;
            }
            said.push(next);
            if stays {
                return said;
            }
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The daemons of the directory end with it.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        for side in ["a", "b"] {
            if let Ok(pid) = std::fs::read_to_string(self.0.join(format!("{side}.qmp.pid"))) {
                let _ = Command::new("sh").args(["-c", "kill -9 $0 2>/dev/null", pid.trim()]).status();
            }
        }
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The ports of README, each replaced by one that is free now.
fn ports(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for part in text.split("127.0.0.1:").skip(1) {
        let port: String = part.chars().take_while(char::is_ascii_digit).collect();
        found.entry(port).or_insert_with(|| {
            let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            free.local_addr().unwrap().port().to_string()
        });
    }
    found
}

#[test]
fn what_readme_shows_is_what_comes_of_typing_it() {
    common::daemon();
    let dir = std::env::temp_dir().join(format!("liveblk-readme-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let place = Place(dir);
    let tests = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/replication");
    std::fs::copy(Path::new(tests).join("ledger.py"), place.0.join("ledger.py")).unwrap();
    let programs = Path::new(env!("CARGO_BIN_EXE_liveblk")).parent().unwrap().display().to_string();
    let path = format!("{programs}:{}", std::env::var("PATH").unwrap());
    let script = script(&std::fs::read_to_string(README).unwrap());
    assert!(script.len() >= 8, "the section types its commands after a $");
    let lines: Vec<&str> = script.iter().map(|t| t.line.as_str()).collect();
    let ports = ports(&lines.join("\n"));
    let mut shells = [Shell::new(&place.0, &path), Shell::new(&place.0, &path)];
    let (mut acknowledged, mut kept) = (0, 0);
    for typed in &script {
        let mut line = typed.line.clone();
        ports.iter().for_each(|(shown, free)| line = line.replace(&format!(":{shown}"), &format!(":{free}")));
        if line.starts_with("liveblk failover") {
            // whoever types this has seen that the primary is gone
            while !shells[1].types("liveblk status --socket b.qmp").join("\n").contains("WAITING") {}
        }
        // the primary's shell and the secondary's
        let shell = usize::from(line.contains("b.qmp") || line.contains("b.nbd"));
        let said = shells[shell].types(&line);
        println!("$ {line}\n{}", said.join("\n"));
        let mut shapes: Vec<String> = said.iter().map(|l| shape(l)).collect();
        if line.starts_with("kill") {
            // the application of the same shell tells that its disk is gone
            let told = said.iter().find(|l| l.contains("acknowledged")).cloned();
            let last = told.unwrap_or_else(|| shells[shell].from.recv_timeout(PATIENCE).unwrap());
            println!("{last}");
            acknowledged = number(&last, "; ");
            shapes.push(shape(&last));
        }
        // What is said while things come about depends on the moment; what is said at the end does not.
        for shown in typed.shown.iter().filter(|l| !passing(l)) {
            assert!(shapes.contains(&shape(shown)), "{line}: README shows {shown:?}, said was {said:?}");
        }
        if line.starts_with("liveblk failover") {
            assert!(said.iter().any(|l| l.contains("serves checkpoint")), "{said:?}");
        }
        if line.contains("ledger.py check") {
            kept = number(&said.join("\n"), "entry ");
        }
        if line.ends_with('&') {
            // the disk is under load for a while: until some checkpoints have been made of it
            let begin = std::time::Instant::now();
            while begin.elapsed() < PATIENCE {
                let now = shells[1].types("liveblk status --socket b.qmp | grep '^  pair'").join("\n");
                if now.contains("checkpoint ") && number(&now, "checkpoint ") >= 4 {
                    break;
                }
            }
        }
    }
    assert!(kept > 0 && kept <= acknowledged + 1, "{kept} entries of {acknowledged}");
}

/// Whether a line is one of those that show how something comes about.
fn passing(line: &str) -> bool {
    ["ALONE", "connecting", "WAITING", "would lose", "nothing to lose"].iter().any(|w| line.contains(w))
}

fn number(text: &str, word: &str) -> u64 {
    let rest = &text[text.find(word).unwrap_or_else(|| panic!("no {word:?} in {text}")) + word.len()..];
    rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}
