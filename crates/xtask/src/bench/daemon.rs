//! A daemon under measurement: started with one command line on either side, its processor time read from /proc.

use super::Side;
use crate::shell::{self, Outcome};
use qmpclient::Client;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(super) struct Daemon {
    child: Child,
    ready: PathBuf,
}

/// How often a reference that does not answer its first command is started anew.
const TRIES: u32 = 3;

impl Daemon {
    /// Starts with `arguments`, and a monitor on `DIR/qmp-SIDE.sock`.
    pub(super) fn start(side: Side, dir: &std::path::Path, arguments: &[String]) -> Outcome<Daemon> {
        Daemon::start_with(side, dir, arguments, false)
    }

    /// The same; with `threads` as where io_uring is forbidden. (The reference uses threads unless it is told otherwise.)
    pub(super) fn start_with(
        side: Side,
        dir: &std::path::Path,
        arguments: &[String],
        threads: bool,
    ) -> Outcome<Daemon> {
        let qmp = dir.join(format!("qmp-{side:?}.sock"));
        let _ = std::fs::remove_file(&qmp);
        let mut command = Command::new(side.program());
        command.args(arguments).envs(threads.then_some(("LIVEBLK_IO", "threads")));
        command
            .args(["--chardev", &format!("socket,id=q,path={},server=on,wait=off", qmp.display())])
            .args(["--monitor", "chardev=q"]);
        Daemon::run(side, command, qmp)
    }

    /// Starts the server that does nothing, listening on `socket`; it has no monitor.
    pub(super) fn start_ideal(socket: &str, size: u64) -> Outcome<Daemon> {
        let _ = std::fs::remove_file(socket);
        Daemon::run(Side::Nothing, Daemon::ideal(socket, size), PathBuf::from(socket))
    }

    /// The command that starts the server that does nothing.
    pub(super) fn ideal(socket: &str, size: u64) -> Command {
        let mut command = Command::new(Side::Nothing.program());
        command.args(["--socket", socket, "--size", &size.to_string()]);
        command
    }

    /// Starts a server and waits until the socket `ready` is there.
    pub(super) fn run(side: Side, mut command: Command, ready: PathBuf) -> Outcome<Daemon> {
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .map_err(|e| format!("cannot start {}: {e}", side.program().display()))?;
        let mut daemon = Daemon { child, ready };
        qmpclient::until_listening(&mut daemon.child, &daemon.ready).map_err(|e| format!("{side:?}: {e}"))?;
        Ok(daemon)
    }

    /// Waits until it also listens at another socket.
    pub(super) fn until_listening(&mut self, socket: &str) -> Outcome {
        qmpclient::until_listening(&mut self.child, socket.as_ref())
    }

    /// As [`Daemon::start`], with a client of its monitor. About one of 1,500 starts of qemu-storage-daemon 10.0.2 greets and then
    /// answers nothing for ever (all its threads sleep): it gets another chance. liveblkd gets none.
    pub(super) fn with_client(
        side: Side,
        dir: &std::path::Path,
        arguments: &[String],
    ) -> Outcome<(Daemon, Client)> {
        let mut tries = TRIES;
        loop {
            let daemon = Daemon::start(side, dir, arguments)?;
            tries -= 1;
            match Client::connect(&daemon.ready) {
                Ok(client) => return Ok((daemon, client)),
                Err(_) if side == Side::Qsd && tries > 0 => {}
                Err(e) => return Err(format!("{side:?}: {e}")),
            }
        }
    }

    /// Its process.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Seconds of processor time used so far (all threads, user and system). In nanoseconds for the threads that live, where the
    /// kernel tells; threads that ended count by the process's ticks only, so the larger of the two is right.
    pub(super) fn cpu(&self) -> f64 {
        self.cpu_of_threads().max(self.cpu_by_ticks())
    }

    fn cpu_of_threads(&self) -> f64 {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{}/task", self.child.id())) else { return 0.0 };
        let of = |t: std::fs::DirEntry| std::fs::read_to_string(t.path().join("schedstat")).ok();
        let nanoseconds = tasks
            .flatten()
            .filter_map(of)
            .filter_map(|s| s.split(' ').next()?.parse::<f64>().ok())
            .sum::<f64>();
        nanoseconds / 1e9
    }

    fn cpu_by_ticks(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        // After the command name in parentheses: state is field 3; utime and stime are 14 and 15, in ticks of 10 ms.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
        (ticks(11) + ticks(12)) / 100.0
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = shell::kill(self.child.id()).status();
        let begin = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if begin.elapsed() > Duration::from_secs(10) {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
