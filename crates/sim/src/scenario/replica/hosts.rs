//! The hosts of a group: how their daemons are started, and told who they are.

use super::turns::FAR;
use super::{PATIENCE, Run, STORE, Wishes};
use crate::boot::{Booted, nbd};
use crate::history::History;
use crate::{Host, Manager, NbdDisk, Process, Profile, Refusal, Value, World, values_of};
use block::{BlockError, SECTOR, Span};
use env::Env;
use nbd::Mode;
use serde_json::{Value as Json, json};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// A host of the group.
pub(super) struct Site {
    pub(super) name: &'static str,
    pub(super) host: Host,
    /// Where its users and its manager run.
    pub(super) outside: Env,
    pub(super) _users: Process,
    pub(super) engine: &'static str,
    pub(super) wishes: Wishes,
    pub(super) running: RefCell<Option<(Booted, Rc<Manager>)>>,
    /// The highest checkpoint it has shown.
    pub(super) seen: Cell<u64>,
}

impl Site {
    pub(super) fn manager(&self) -> Result<Rc<Manager>, Refusal> {
        self.running.borrow().as_ref().map(|r| r.1.clone()).ok_or(Refusal::Gone)
    }

    pub(super) fn stop(&self, power: bool) {
        let Some((daemon, manager)) = self.running.take() else { return };
        if power {
            self.host.power_loss(&[&daemon.process]);
        } else {
            daemon.process.kill();
        }
        drop(manager);
    }

    pub(super) async fn disk(&self, world: &World) -> Result<Rc<NbdDisk>, BlockError> {
        NbdDisk::connect(&self.outside, &nbd(), "f", Mode::Structured, world.verdict()).await
    }

    pub(super) fn address(&self) -> Json {
        json!({"type": "inet", "host": self.name, "port": "7000"})
    }

    /// What is on the disk itself.
    pub(super) fn raw(&self) -> Vec<Value> {
        let image = self.host.image("/disk").unwrap_or_default();
        values_of(&image.read(self.wishes.area()), 0)
    }

    /// Of the disk itself.
    pub(super) fn length(&self) -> u64 {
        self.host.image("/disk").map_or(0, |i| i.len())
    }

    /// Of the disk itself, from `from` to `end`.
    pub(super) fn tail(&self, from: u64, end: u64) -> Vec<u8> {
        self.host.image("/disk").map_or_else(Vec::new, |i| i.read(Span::between(from, end)))
    }

    /// The disk's length, as its users see it.
    pub(super) async fn shown(&self, world: &World) -> Result<u64, Refusal> {
        let disk = self.disk(world).await.map_err(|_| Refusal::Gone)?;
        let len = disk.facts().size;
        disk.disconnect();
        Ok(len)
    }

    /// Of the disk itself, where guests never write.
    pub(super) fn far(&self) -> Vec<Value> {
        let image = self.host.image("/disk").unwrap_or_default();
        values_of(&image.read(Span::new(FAR, 8 * SECTOR)), FAR / SECTOR)
    }

    pub(super) async fn info(&self) -> Result<Json, Refusal> {
        let all = self.manager()?.execute("query-replication", json!({"group": "g"})).await?;
        Ok(all[0].clone())
    }
}

impl Run {
    /// Starts the daemon of a site and gives it its role. While things fail it may take several goes; one more where its disk was too slow.
    pub(super) async fn bring_up(&self, site: &Site, primary: bool) -> Result<(), Refusal> {
        let mut last = Refusal::Gone;
        for number in 0..200 {
            if number > 0 {
                site.stop(false);
                self.pause(Duration::from_millis(500)).await;
            }
            let began = self.env().now();
            match self.try_to_bring_up(site, primary).await {
                Ok(()) => return Ok(()),
                Err(e) => last = e,
            }
            let now = self.env().now();
            let too_slow = number == 0 && now >= began + PATIENCE;
            if now >= self.calm_at.get() + PATIENCE && !too_slow {
                break;
            }
        }
        Err(last)
    }

    /// A daemon with a group that has no role yet.
    pub(super) async fn boot(&self, site: &Site) -> Result<Rc<Manager>, Refusal> {
        let booted = Box::pin(Booted::start_on(&self.world, &site.host)).await.ok_or(Refusal::Gone)?;
        let m = booted.manage(&self.world, &site.outside, &Rc::new(History::new())).await?;
        *site.running.borrow_mut() = Some((booted, m.clone()));
        let file = json!({"driver": "file", "node-name": "d", "filename": "/disk"});
        m.execute("blockdev-add", file).await?;
        let mut group = json!({"id": "g", "engine": site.engine, "volumes": [{"node-name": "d", "front": "f"}],
            "store": {"path": "/store", "size": STORE}});
        if self.wishes.retain > 0 {
            group["retain"] = json!(self.wishes.retain);
        }
        m.execute("replication-group-add", group).await?;
        Ok(m)
    }

    /// A primary that knows no secondary.
    pub(super) async fn serve_alone(&self, site: &Site) -> Result<(), Refusal> {
        let m = self.boot(site).await?;
        m.execute("replication-start", json!({"group": "g", "role": "primary"})).await?;
        self.serve(&m).await
    }

    pub(super) async fn try_to_bring_up(&self, site: &Site, primary: bool) -> Result<(), Refusal> {
        let going = self.bring_up_once(site, primary);
        let Some(done) = self.env().timeout(PATIENCE, going).await else {
            // a disk hangs that much, or takes a minute for each of some requests
            site.host.clear_faults();
            site.host.set_profile(Profile::calm());
            site.host.release_hung();
            return Err(Refusal::Gone);
        };
        done
    }

    pub(super) async fn bring_up_once(&self, site: &Site, primary: bool) -> Result<(), Refusal> {
        let m = self.boot(site).await?;
        if primary {
            for peer in self.sites.iter().filter(|p| p.name != site.name) {
                self.know(&m, peer).await?;
            }
            self.lead(&m, Some(site)).await?;
        } else {
            let start = json!({"group": "g", "role": "secondary", "listen": site.address()});
            m.execute("replication-start", start).await?;
        }
        self.serve(&m).await
    }

    /// Others find it at the place of `site`; else where it listens as a secondary, if it does.
    pub(super) async fn lead(&self, m: &Manager, site: Option<&Site>) -> Result<(), Refusal> {
        let mut start = json!({"group": "g", "role": "primary", "write-level": self.level, "on-link-loss": self.policy,
            "checkpoint-interval-ms": self.interval, "timeout-ms": 3000});
        if self.wishes.external {
            start["decision"] = json!("external");
        }
        if let Some(site) = site {
            start["listen"] = site.address();
        }
        m.execute("replication-start", start).await.map(drop)
    }

    pub(super) async fn serve(&self, m: &Manager) -> Result<(), Refusal> {
        m.execute("nbd-server-start", json!({"addr": Booted::nbd_address()})).await?;
        self.export(m).await
    }

    pub(super) async fn export(&self, m: &Manager) -> Result<(), Refusal> {
        let export = json!({"type": "nbd", "id": "e", "node-name": "f", "name": "f", "writable": true});
        m.execute("block-export-add", export).await.map(drop)
    }

    pub(super) async fn know(&self, m: &Manager, peer: &Site) -> Result<(), Refusal> {
        let arguments = json!({"group": "g", "peer": peer.name, "addr": peer.address()});
        m.execute("replication-peer-add", arguments).await.map(drop)
    }
}
