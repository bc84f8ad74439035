//! Processors that do not go to sleep while something is measured.
//!
//! In a virtual machine a processor with nothing to do is given back to the host, and to wake it again costs tens of microseconds
//! (measured: 50 instead of 8), more than most of what is measured here; on a bare machine it is the idle states. So each gets a
//! task that runs only while nothing else wants to (`SCHED_IDLE`), and tells the processor so, as another may share its core. What
//! must stay true: any other task comes first at once; the tasks end with this process, however it ends; they are of its session, as
//! scheduling is first by session (`sched_autogroup`).

use crate::shell::Outcome;
use std::io::Read;
use std::process::{Child, Command, Stdio};

/// The argument that makes this program such a task.
const TASK: &str = "--be-awake";

/// The tasks; they end when this is dropped.
pub(super) struct Processors(Vec<Child>);

impl Processors {
    pub(super) fn keep() -> Outcome<Processors> {
        let fail = |e: std::io::Error| format!("--awake: {e}");
        let count = std::thread::available_parallelism().map_err(fail)?;
        let program = std::env::current_exe().map_err(fail)?;
        let mut kept = Processors(Vec::new());
        for _ in 0..count.get() {
            let task = Command::new("chrt")
                .args(["--idle", "0"])
                .arg(&program)
                .args(["bench", TASK])
                // whose other end goes with this process
                .stdin(Stdio::piped())
                .spawn()
                .map_err(|e| format!("--awake: cannot run chrt (util-linux): {e}"))?;
            kept.0.push(task);
        }
        Ok(kept)
    }
}

impl Drop for Processors {
    fn drop(&mut self) {
        for task in &mut self.0 {
            let _ = task.kill();
            let _ = task.wait();
        }
    }
}

/// Whether this process is to be such a task; then it has been one to its end.
pub(super) fn was_task(args: &[String]) -> bool {
    if args != [TASK] {
        return false;
    }
    std::thread::spawn(|| {
        loop {
            std::hint::spin_loop();
        }
    });
    // until the other end is gone
    let _ = std::io::stdin().read(&mut [0]);
    true
}
