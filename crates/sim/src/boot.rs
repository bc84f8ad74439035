//! The whole daemon as a process of a simulated host.
//!
//! It is made as `liveblkd` makes it from its command line: a character device, a monitor on it, and everything else by QMP.

use crate::history::History;
use crate::{Host, Manager, Process, Refusal, World};
use control::{ChardevSpec, Daemon, Geometry};
use env::{Address, Env};
use state::Store;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

const MONITOR: &str = "/monitor";
const NBD: &str = "/nbd";
/// Where a daemon keeps its state that does.
const STATE: &str = "/state";
/// The same of a second daemon.
const FAR_MONITOR: &str = "/far-monitor";
/// Also what a profile of the network names to cut the link between the two.
pub(crate) const FAR_NBD: &str = "/far-nbd";
/// How long a daemon may take to come up or to end once nothing fails any more.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon that runs.
pub struct Booted {
    /// Its process.
    pub process: Process,
    daemon: Rc<Daemon>,
    monitor: &'static str,
    /// It has the jobs of an earlier life.
    again: bool,
}

/// Where its NBD server listens, once started.
pub(crate) fn nbd() -> Address {
    Address::Unix(PathBuf::from(NBD))
}

impl Booted {
    /// Starts a daemon with a monitor.
    pub async fn start(world: &World) -> Option<Booted> {
        Booted::start_at(world, world.host(), MONITOR, None).await
    }

    /// Starts one on another host.
    pub async fn start_on(world: &World, host: &Host) -> Option<Booted> {
        Booted::start_at(world, host, MONITOR, None).await
    }

    /// Starts a daemon that keeps its state and its disks' changes, with what the last one that did kept. With `regions` disks are
    /// cut into those.
    pub async fn start_again(world: &World, regions: Option<Geometry>) -> Option<Booted> {
        Booted::start_at(world, world.host(), MONITOR, Some(regions)).await
    }

    /// Starts a second daemon beside it, for what is far away.
    pub async fn start_far(world: &World) -> Option<Booted> {
        Booted::start_at(world, world.host(), FAR_MONITOR, None).await
    }

    async fn start_at(
        world: &World,
        host: &Host,
        monitor: &'static str,
        state: Option<Option<Geometry>>,
    ) -> Option<Booted> {
        let (env, process) = host.start(world.executor());
        let daemon = Daemon::new(&env, "sim");
        world.owns(&daemon);
        let ready = async {
            if let Some(regions) = state {
                let store = Store::open(&env, Path::new(STATE)).await.map_err(|e| e.to_string())?;
                daemon.keep_bitmaps_in(Path::new(STATE));
                regions.into_iter().for_each(|r| daemon.set_log_geometry(r));
                daemon.use_state(store, &[]).await.map_err(|e| e.to_string())?;
            }
            let text = format!("socket,id=monitor,path={monitor},server=on,wait=off");
            let spec = ChardevSpec::parse(&text).map_err(|e| e.to_string())?;
            daemon.add_chardev(spec).await.map_err(|e| e.to_string())?;
            daemon.add_monitor("monitor", false).map_err(|e| e.to_string())?;
            daemon.open_monitors();
            Ok::<(), String>(())
        };
        match world.within(&env, PATIENCE, "starting the daemon", ready).await? {
            Ok(()) => Some(Booted { process, daemon, monitor, again: state.is_some() }),
            Err(e) => {
                world.verdict().violation(format!("the daemon does not start: {e}"));
                None
            }
        }
    }

    /// Connects a manager that runs as `env`.
    pub async fn manage(
        &self,
        world: &World,
        env: &Env,
        history: &Rc<History>,
    ) -> Result<Rc<Manager>, Refusal> {
        let at = Address::Unix(PathBuf::from(self.monitor));
        Manager::connect(env, &at, world.machine(), history, world.verdict(), self.again).await
    }

    /// Where its monitor listens, for who speaks QMP in another way than a [`Manager`].
    pub fn monitor_address() -> Address {
        Address::Unix(PathBuf::from(MONITOR))
    }

    /// Where its NBD server listens, once started.
    pub fn nbd_server() -> Address {
        nbd()
    }

    /// The `addr` of its NBD server for `nbd-server-start`.
    pub fn nbd_address() -> serde_json::Value {
        serde_json::json!({"type": "unix", "data": {"path": NBD}})
    }

    /// The same of the second daemon.
    pub fn far_address() -> serde_json::Value {
        serde_json::json!({"type": "unix", "data": {"path": FAR_NBD}})
    }

    /// The second daemon's server as a client names it in `blockdev-add`.
    pub fn far_server() -> serde_json::Value {
        serde_json::json!({"type": "unix", "path": FAR_NBD})
    }

    /// Ends the daemon in order, as on SIGTERM. Everything it held must be given back.
    pub async fn quit(&self, world: &World, watch: &Env) {
        let ending = async {
            self.daemon.shut_down().await;
            self.daemon.ended().await
        };
        match world.within(watch, PATIENCE, "the end of the daemon", ending).await {
            None => return,
            Some(Err(e)) => world.verdict().violation(format!("the daemon ended with an error: {e}")),
            Some(Ok(())) => {}
        }
        if self.process.open_files() > 0 {
            let (open, tasks) = (self.process.open_files(), self.process.waiting());
            world
                .verdict()
                .violation(format!("{open} files are open after the end; tasks that go on: {tasks:?}"));
        }
        self.process.kill();
    }

    /// When no daemon is left, no file is locked.
    pub fn all_have_quit(world: &World) {
        for path in world.host().list() {
            if world.host().locks_held(&path) > 0 {
                world.verdict().violation(format!("{path} is locked after the end"));
            }
        }
    }
}
