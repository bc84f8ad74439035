//! A daemon of our own, for work on files that nobody serves. It ends when this value is dropped.

use crate::Outcome;
use qmpclient::Client;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

pub(crate) struct OwnDaemon {
    child: Child,
    dir: PathBuf,
    socket: PathBuf,
}

impl OwnDaemon {
    /// Starts `liveblkd` (beside this program, or on the PATH) with a QMP socket in a private directory.
    pub(crate) fn start() -> Outcome<OwnDaemon> {
        let dir = std::env::temp_dir().join(format!("liveblk-{}", std::process::id()));
        std::fs::create_dir(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
        let socket = dir.join("qmp.sock");
        let program = program();
        let child = Command::new(&program)
            .arg("--chardev")
            .arg(format!("socket,id=cli,path={},server=on,wait=off", socket.display()))
            .args(["--monitor", "chardev=cli"])
            .stdin(Stdio::null())
            .spawn()
            .map_err(|e| {
                format!(
                    "cannot start {}: {e}\n  Build it with: cargo build --release --workspace",
                    program.display()
                )
            })?;
        let mut daemon = OwnDaemon { child, dir, socket };
        qmpclient::until_listening(&mut daemon.child, &daemon.socket)
            .map_err(|e| format!("{}: {e}", program.display()))?;
        Ok(daemon)
    }

    /// A connection to it.
    pub(crate) fn client(&self) -> Outcome<Client> {
        Client::connect(&self.socket)
    }

    /// Lets it write everything back and end.
    pub(crate) fn quit(mut self, client: &mut Client) -> Outcome {
        client.execute("quit", &json!({}))?;
        self.child.wait().map_err(|e| format!("waiting for the daemon: {e}"))?;
        Ok(())
    }
}

impl Drop for OwnDaemon {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            // On an error path there is nothing left worth writing back.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// `liveblkd`, beside this program or on the PATH.
pub(crate) fn program() -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("liveblkd")));
    match beside {
        Some(p) if p.is_file() => p,
        _ => Path::new("liveblkd").to_path_buf(),
    }
}
