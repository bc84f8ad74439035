//! What a run of the whole daemon is going to do: everything drawn from the seed before it starts, so that a failing seed
//! can be read.

use crate::boot::Booted;
use crate::history::{History, What};
use crate::{Host, Image, NetProfile, Profile, Rng, stamped};
use block::SECTOR;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

/// How an image is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Store {
    /// `raw` over `file`.
    Raw,
    /// `file` alone.
    File,
    /// `qcow2` with this cluster size, without a backing file.
    Qcow2(u64),
    /// `qcow2` over a raw base.
    Overlay(u64),
    /// An export of another daemon, which has it as `file`. Only a target.
    Nbd,
}

impl Store {
    /// Whether only a flush makes what was answered safe from a kill.
    pub fn holds_metadata(self) -> bool {
        matches!(self, Store::Qcow2(_) | Store::Overlay(_))
    }
}

/// How the job is meant to end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// `block-job-complete` after READY: the guest goes to the target.
    Complete,
    /// `block-job-cancel` after READY: the target is a copy of one instant.
    SoftCancel,
    /// `block-job-cancel force` or `job-cancel`, at any time.
    HardCancel,
    /// The daemon is killed at any time.
    Kill,
    /// The host loses its power at any time.
    PowerLoss,
    /// The daemon is told to end while the job runs.
    Quit,
}

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// Nothing.
    None,
    /// Errors of the target's file.
    Target,
    /// Errors of the source's file.
    Source,
    /// Requests to the target hang for a while.
    TargetHangs,
    /// Guests' connections are cut.
    Network,
    /// The connections to the other daemon are cut.
    Link,
    /// The other daemon is killed and starts again.
    Restart,
}

/// One run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Sectors of the disk.
    pub sectors: u64,
    /// The disk that is copied.
    pub source: Store,
    /// What it is copied to.
    pub target: Store,
    /// Whether there is a job at all.
    pub mirror: bool,
    /// How many guests at once.
    pub guests: u32,
    /// `sync`.
    pub sync: &'static str,
    /// `copy-mode`.
    pub copy_mode: &'static str,
    /// Switch to another mode while it runs.
    pub switch_mode: Option<&'static str>,
    /// Not at any time, but once the job is ready: then writes of the old mode are still under way.
    pub switch_when_ready: bool,
    /// `granularity`; 0: default.
    pub granularity: u64,
    /// `buf-size`; 0: default.
    pub buf_size: u64,
    /// `speed`.
    pub speed: u64,
    /// `on-source-error`.
    pub on_source_error: &'static str,
    /// `on-target-error`.
    pub on_target_error: &'static str,
    /// Finalize by hand.
    pub manual_finalize: bool,
    /// Dismiss by hand.
    pub manual_dismiss: bool,
    /// Verbs at random while it runs.
    pub meddling: u64,
    /// An export added to the source while the job runs, with guests on it.
    pub late_export: bool,
    /// The end.
    pub end: End,
    /// The faults.
    pub trouble: Trouble,
    /// Time before the end is brought about (for ends that do not wait for READY).
    pub end_after: Duration,
    /// The disk.
    pub profile: Profile,
    /// The network.
    pub net: NetProfile,
    /// `discard=unmap` on the nodes.
    pub unmap: bool,
    /// `reconnect-delay` of the NBD client, in seconds.
    pub reconnect: u64,
    /// `verify`, with `verify-repair`.
    pub verify: Option<(&'static str, bool)>,
    /// `on-link-loss`: the job waits for the other daemon.
    pub link_loss: bool,
    /// The other daemon is not only killed: where it is the power fails, and what it had not flushed may be lost.
    pub far_power: bool,
}

impl Plan {
    /// Drawn.
    pub fn drawn(rng: &mut Rng) -> Plan {
        let store = |r: &mut Rng| match r.below(6) {
            0 | 1 => Store::Raw,
            2 => Store::File,
            3 => Store::Overlay(*r.choose(&[4096, 65536])),
            _ => Store::Qcow2(*r.choose(&[512, 4096, 65536])),
        };
        let trouble = *rng.choose(&[
            Trouble::None,
            Trouble::None,
            Trouble::None,
            Trouble::Target,
            Trouble::Source,
            Trouble::TargetHangs,
            Trouble::Network,
        ]);
        let policies = ["report", "ignore", "enospc", "stop"];
        let (source, target) = (store(rng), store(rng));
        let target = if rng.chance(0.2) { Store::Nbd } else { target };
        let sync = match source {
            // top needs a backing image to say anything else than full, and none leaves the target without the old data
            Store::Overlay(_) => *rng.choose(&["full", "full", "top"]),
            _ => *rng.choose(&["full", "full", "full", "none"]),
        };
        let modes = ["background", "write-blocking", "read-write-blocking"];
        let copy_mode = *rng.choose(&[modes[0], modes[1], modes[1], modes[2]]);
        let other_mode = *rng.choose(&modes.map(|m| if m == copy_mode { modes[1] } else { m }));
        let trouble = match target {
            Store::Nbd if sync != "top" && rng.chance(0.6) => *rng.choose(&[Trouble::Link, Trouble::Restart]),
            _ => trouble,
        };
        let mut net = NetProfile::drawn_calm(rng);
        if trouble == Trouble::Network {
            net.cut = 0.5;
            net.cut_within = *rng.choose(&[2000, 1 << 16, 1 << 20]);
        }
        let mut plan = Plan {
            sectors: *rng.choose(&[64, 640, 2048, 4096]),
            source,
            // a target over the source's base is what "top" is for; "full" would leave it no use for the base
            target: match target {
                _ if sync == "top" => Store::Overlay(65536),
                Store::Overlay(c) => Store::Qcow2(c),
                other => other,
            },
            mirror: true,
            guests: rng.between(1, 3) as u32,
            sync,
            copy_mode,
            switch_mode: rng.chance(0.4).then_some(other_mode),
            switch_when_ready: rng.chance(0.6),
            granularity: *rng.choose(&[0, 0, 512, 4096, 16384, 65536]),
            buf_size: *rng.choose(&[0, 0, 65536, 1 << 20]),
            speed: *rng.choose(&[0, 0, 0, 1 << 20, 16 << 20]),
            on_source_error: policies[rng.index(policies.len())],
            on_target_error: policies[rng.index(policies.len())],
            manual_finalize: rng.chance(0.25),
            manual_dismiss: rng.chance(0.25),
            meddling: *rng.choose(&[0, 0, 2, 6]),
            late_export: rng.chance(0.3),
            end: *rng.choose(&[
                // without the old data the target is of no use to the guest
                if sync == "none" { End::SoftCancel } else { End::Complete },
                if sync == "none" { End::SoftCancel } else { End::Complete },
                if sync == "none" { End::HardCancel } else { End::Complete },
                End::SoftCancel,
                End::SoftCancel,
                End::HardCancel,
                End::Kill,
                End::PowerLoss,
                End::Quit,
            ]),
            trouble,
            end_after: rng.duration(Duration::from_micros(500), Duration::from_secs(1)),
            profile: Profile::drawn_calm(rng),
            net,
            unmap: rng.chance(0.5),
            reconnect: *rng.choose(&[0, 1, 30, 30]),
            verify: None,
            link_loss: false,
            far_power: false,
        };
        if plan.target == Store::Nbd {
            plan.link_loss = rng.chance(0.6);
            plan.far_power = rng.chance(0.6);
        }
        if plan.trouble == Trouble::Restart && matches!(plan.end, End::Kill | End::PowerLoss | End::Quit) {
            // one crash at a time
            plan.trouble = Trouble::Link;
        }
        // from a stream of its own: seeds that once failed go on meaning what they meant
        let mut own = rng.clone().fork("proof");
        // of what is not copied nobody says that it is equal
        if plan.sync != "none" && own.chance(0.5) {
            plan.verify = Some((*own.choose(&["full", "full", "sampled"]), own.chance(0.3)));
        }
        plan
    }

    /// Whether a link that is lost comes back before anybody is told.
    pub fn bridges(&self) -> bool {
        self.reconnect >= 30
    }

    /// Whether the job may see the link to the other daemon go and come back.
    pub fn bridges_in_job(&self) -> bool {
        self.link_loss && matches!(self.trouble, Trouble::Link | Trouble::Restart)
    }

    /// Bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }

    /// Puts the images on the host. What the base of an overlay (or a raw source) holds is on record as written before.
    pub fn install(&self, host: &Host, history: &History, rng: &mut Rng) {
        let mut base = Image::from_bytes(&vec![0; self.bytes() as usize]);
        if !matches!(self.source, Store::Qcow2(_)) {
            for _ in 0..rng.below(6) {
                let start = rng.below(self.sectors);
                let end = rng.between(start + 1, self.sectors.min(start + 300));
                let n = history.begin(u32::MAX - 1, What::Write, start..end);
                base.apply(&crate::Effect::Write {
                    offset: start * SECTOR,
                    data: stamped(n, start, end - start),
                });
                history.end(n);
            }
            let n = history.begin(u32::MAX - 1, What::Flush, 0..0);
            history.end(n);
        }
        for (name, store) in [("source", self.source), ("target", self.target)] {
            let path = format!("/{name}.img");
            match store {
                Store::Raw | Store::File if name == "source" => host.install(&path, base.clone()),
                // what is in the target before must not be there after a full copy: bytes nobody wrote
                Store::Raw | Store::File | Store::Nbd if self.sync == "full" && rng.chance(0.4) => {
                    host.install(&path, Image::from_bytes(&vec![0x77; self.bytes() as usize]));
                }
                Store::Raw | Store::File | Store::Nbd => {
                    host.install(&path, Image::from_bytes(&vec![0; self.bytes() as usize]));
                }
                Store::Qcow2(cluster) => host.install(&path, empty_qcow2(self.bytes(), cluster, None, false)),
                Store::Overlay(cluster) => {
                    host.install("/base.img", base.clone());
                    host.install(&path, empty_qcow2(self.bytes(), cluster, Some("/base.img"), true));
                }
            }
        }
    }

    /// `blockdev-add` arguments for one of the two images.
    pub fn node(&self, name: &str, store: Store) -> Value {
        let discard = if self.unmap { "unmap" } else { "ignore" };
        let file = json!({"driver": "file", "filename": format!("/{name}.img"), "discard": discard});
        match store {
            Store::File => {
                let mut file = file;
                file["node-name"] = json!(name);
                file
            }
            Store::Nbd => json!({
                "driver": "nbd", "node-name": name, "server": Booted::far_server(), "export": "far",
                "reconnect-delay": self.reconnect, "discard": discard,
            }),
            Store::Raw => json!({"driver": "raw", "node-name": name, "file": file, "discard": discard}),
            Store::Qcow2(_) => {
                json!({"driver": "qcow2", "node-name": name, "file": file, "discard": discard, "backing": null})
            }
            Store::Overlay(_) => json!({
                "driver": "qcow2", "node-name": name, "file": file, "discard": discard,
                "backing": {"driver": "raw", "read-only": true, "file": {"driver": "file", "filename": "/base.img", "read-only": true}},
            }),
        }
    }

    /// `blockdev-mirror` arguments.
    pub fn mirror(&self) -> Value {
        let mut v = json!({
            "job-id": "job", "device": "source", "target": "target", "sync": self.sync, "copy-mode": self.copy_mode,
            "on-source-error": self.on_source_error, "on-target-error": self.on_target_error,
            "auto-finalize": !self.manual_finalize, "auto-dismiss": !self.manual_dismiss,
        });
        for (key, n) in
            [("granularity", self.granularity), ("buf-size", self.buf_size), ("speed", self.speed)]
        {
            if n > 0 {
                v[key] = json!(n);
            }
        }
        if let Some((verify, repair)) = self.verify {
            v["verify"] = json!(verify);
            v["verify-repair"] = json!(repair);
        }
        if self.link_loss {
            v["on-link-loss"] = json!({"wait": 600, "no-progress": 2});
        }
        v
    }
}

/// Bytes, cluster size, what is below, whether that is raw.
type Wanted = (u64, u64, Option<String>, bool);

thread_local! {
    /// Empty images, since each seed needs some and making one costs more than a run's I/O.
    static EMPTY: RefCell<BTreeMap<Wanted, Image>> = const { RefCell::new(BTreeMap::new()) };
}

/// An image of `bytes` with nothing in it, over `backing` (`raw`, or else qcow2) if there is one.
pub(crate) fn empty_qcow2(bytes: u64, cluster: u64, backing: Option<&str>, raw: bool) -> Image {
    let key = (bytes, cluster, backing.map(str::to_owned), raw);
    if let Some(image) = EMPTY.with_borrow(|e| e.get(&key).cloned()) {
        return image;
    }
    let mut options = qcow2::create::Options::new(bytes);
    options.cluster_size = cluster;
    if let Some(b) = backing {
        options.backing_file = Some(b.to_owned());
        options.backing_fmt = Some(if raw { "raw" } else { "qcow2" }.to_owned());
    }
    let memory = qcow2::storage::Memory::new(Vec::new());
    let made = qcow2::storage::now(qcow2::create::create(&memory, None::<&qcow2::storage::Memory>, &options));
    assert!(made.is_ok(), "an empty image: {made:?}");
    let image = Image::from_bytes(&memory.into_bytes());
    EMPTY.with_borrow_mut(|e| e.insert(key, image.clone()));
    image
}

/// `qemu-img check`, but ours, on an image at rest: no corruption; leaks only after a crash.
pub fn check_qcow2(image: &Image, leaks_allowed: bool) -> Result<(), String> {
    let memory = qcow2::storage::Memory::new(image.to_vec());
    let report = qcow2::storage::now(qcow2::check::check(&memory, qcow2::check::Fix::Nothing))
        .map_err(|e| format!("check: {e:?}"))?;
    if report.corruptions > 0 || report.check_errors > 0 || (report.leaks > 0 && !leaks_allowed) {
        return Err(format!(
            "check: {} corruptions, {} leaks, {} errors: {:?}",
            report.corruptions, report.leaks, report.check_errors, report.messages
        ));
    }
    Ok(())
}
