//! Running other programs, and saying so.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What a chore ends with: nothing, or a sentence.
pub(crate) type Outcome<T = ()> = Result<T, String>;

pub(crate) fn fail<T>(message: impl Into<String>) -> Outcome<T> {
    Err(message.into())
}

/// The top of the checkout.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).map(Path::to_path_buf).unwrap_or_default()
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Runs a command with the terminal as its own; an error if it cannot start or does not succeed.
pub(crate) fn run(command: &mut Command) -> Outcome {
    let shown = show(command);
    eprintln!("+ {shown}");
    match command.status() {
        Ok(s) if s.success() => Ok(()),
        Ok(s) => fail(format!("`{shown}` ended with {s}")),
        Err(e) => fail(format!("`{shown}` could not be started: {e}")),
    }
}

/// Runs a command and gives its standard output.
pub(crate) fn output(command: &mut Command) -> Outcome<String> {
    let shown = show(command);
    match command.output() {
        Ok(o) if o.status.success() => Ok(String::from_utf8_lossy(&o.stdout).into_owned()),
        Ok(o) => {
            fail(format!("`{shown}` ended with {}: {}", o.status, String::from_utf8_lossy(&o.stderr).trim()))
        }
        Err(e) => fail(format!("`{shown}` could not be started: {e}")),
    }
}

/// Asks a process to end. By the shell, which has this built in: a small installation has no program named `kill`.
pub(crate) fn kill(process: u32) -> Command {
    let mut c = Command::new("sh");
    c.args(["-c", "kill \"$0\"", &process.to_string()]);
    c
}

/// Runs cargo in the checkout.
pub(crate) fn cargo(args: &[&str]) -> Outcome {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    run(Command::new(cargo).args(args).current_dir(root()))
}

fn show(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().rsplit('/').next().unwrap_or_default().to_owned();
    for a in command.get_args() {
        line.push(' ');
        line.push_str(&a.to_string_lossy());
    }
    line
}

/// Whether a program is on the PATH.
pub(crate) fn have(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}
