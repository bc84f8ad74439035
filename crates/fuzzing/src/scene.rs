//! Scenes in the simulated world: nodes, jobs, bitmaps, exports, transactions, clients and failing disks from a small set of names,
//! so that they meet (as `tests/compat/wander.py` does beside QSD, which has the answers; here the fuzzer looks for new ways through).
//!
//! What must stay true: every command is answered; jobs go from state to state as they may (`sim::Manager`); the daemon ends in order,
//! whatever goes on, and gives everything back; no image is corrupt then.

use crate::daemon::{LEN, empty_qcow2, stamped_disk};
use crate::judge;
use ::nbd::Mode;
use block::{BlockError, SECTOR, Span};
use qcow2::check::{Fix, check};
use qcow2::storage::now;
use serde_json::{Value, json};
use sim::{Booted, Disk, Fault, History, Manager, NbdDisk, Op, Refusal, Rng, Rule, World, stamped};
use std::rc::Rc;
use std::time::Duration;

/// No command takes longer, in virtual time: what hangs goes on before.
const PATIENCE: Duration = Duration::from_secs(300);
/// So long things happen between two steps, at most.
const PAUSE: Duration = Duration::from_millis(500);
const STEPS: (u64, u64) = (4, 24);
const QCOW2: [(&str, Option<&str>); 5] =
    [("b", None), ("m", Some("b")), ("t", Some("m")), ("x", None), ("y", None)];
const RAW: [&str; 2] = ["r", "d"];
const NODES: [&str; 13] = ["t", "m", "b", "x", "y", "r", "d", "n", "g", "tf", "s1", "flt", "nope"];
const JOBS: [&str; 2] = ["j", "k"];
const BITMAPS: [&str; 2] = ["bm", "bn"];

/// Who decides.
struct Scene {
    rng: Rng,
}

impl Scene {
    fn maybe(&mut self, chance: f64) -> bool {
        self.rng.chance(chance)
    }

    fn one(&mut self, of: &[&'static str]) -> &'static str {
        of[self.rng.index(of.len())]
    }

    fn node(&mut self) -> &'static str {
        self.one(&NODES)
    }

    /// Adds `key` with one of `values`, sometimes.
    fn some(&mut self, to: &mut Value, chance: f64, key: &str, values: &[Value]) {
        if self.maybe(chance) {
            to[key] = self.rng.choose(values).clone();
        }
    }

    fn common(&mut self, to: &mut Value) {
        self.some(to, 0.1, "read-only", &[json!(true), json!(false)]);
        self.some(to, 0.05, "auto-read-only", &[json!(true)]);
        self.some(to, 0.1, "discard", &[json!("unmap"), json!("ignore")]);
        self.some(to, 0.1, "detect-zeroes", &[json!("on"), json!("unmap"), json!("off")]);
    }

    /// Arguments of `blockdev-add`.
    fn add(&mut self) -> Value {
        let file = |name: &str, path: &str| json!({"driver": "file", "node-name": format!("{name}f"), "filename": path});
        let mut node = match self.rng.below(8) {
            0..=3 => {
                let (name, below) = *self.rng.choose(&QCOW2);
                let mut node = json!({"driver": "qcow2", "node-name": name, "file": file(name, &format!("/{name}.qcow2"))});
                match below {
                    Some(below) if self.maybe(0.9) => node["backing"] = json!(below),
                    _ if self.maybe(0.5) => node["backing"] = Value::Null,
                    _ => {}
                }
                node
            }
            4 => {
                let name = self.one(&RAW);
                let mut node =
                    json!({"driver": "raw", "node-name": name, "file": file(name, &format!("/{name}.raw"))});
                self.some(&mut node, 0.2, "size", &[json!(65536), json!(LEN / 2)]);
                self.some(&mut node, 0.2, "offset", &[json!(65536)]);
                node
            }
            5 => json!({"driver": "null-co", "node-name": "n", "size": LEN, "read-zeroes": true}),
            6 => {
                let driver = self.one(&["raw", "compress", "preallocate", "copy-on-read"]);
                json!({"driver": driver, "node-name": "g", "file": self.node()})
            }
            _ => {
                json!({"driver": "copy-before-write", "node-name": "g", "file": self.node(), "target": self.node()})
            }
        };
        self.common(&mut node);
        node
    }

    fn job_options(&mut self) -> Value {
        let mut job = json!({"job-id": self.one(&JOBS)});
        let yes_no = [json!(true), json!(false)];
        self.some(&mut job, 0.3, "auto-finalize", &yes_no);
        self.some(&mut job, 0.3, "auto-dismiss", &yes_no);
        self.some(&mut job, 0.2, "speed", &[json!(0), json!(1 << 20)]);
        self.some(&mut job, 0.2, "filter-node-name", &[json!("flt"), json!("t")]);
        job
    }

    fn job(&mut self) -> (&'static str, Value) {
        let mut job = self.job_options();
        let on_error = ["stop", "report", "ignore", "enospc"].map(|v| json!(v));
        match self.rng.below(5) {
            0 => {
                job["device"] = json!(self.node());
                job["target"] = json!(self.node());
                job["sync"] = json!(self.one(&["full", "top", "none"]));
                self.some(&mut job, 0.3, "copy-mode", &[json!("background"), json!("write-blocking")]);
                self.some(&mut job, 0.2, "granularity", &[json!(4096), json!(512), json!(65536)]);
                self.some(&mut job, 0.2, "replaces", &[json!("t"), json!("m"), json!("flt")]);
                self.some(&mut job, 0.3, "on-source-error", &on_error);
                self.some(&mut job, 0.3, "on-target-error", &on_error);
                self.some(&mut job, 0.2, "verify", &[json!("full"), json!("written")]);
                ("blockdev-mirror", job)
            }
            1 => {
                job["device"] = json!(self.node());
                self.some(&mut job, 0.5, "top-node", &[json!("m"), json!("t"), json!("b")]);
                self.some(&mut job, 0.5, "base-node", &[json!("b"), json!("m")]);
                self.some(&mut job, 0.3, "on-error", &on_error);
                ("block-commit", job)
            }
            2 => {
                job["device"] = json!(self.node());
                self.some(&mut job, 0.4, "base-node", &[json!("b"), json!("m")]);
                self.some(&mut job, 0.2, "bottom", &[json!("m"), json!("t")]);
                self.some(&mut job, 0.3, "on-error", &on_error);
                ("block-stream", job)
            }
            3 => {
                job["device"] = json!(self.node());
                job["target"] = json!(self.node());
                self.backup(&mut job);
                ("blockdev-backup", job)
            }
            _ => {
                job["device"] = json!(self.node());
                job["target"] = json!(self.one(&["/new1", "/new2"]));
                job["format"] = json!(self.one(&["qcow2", "raw"]));
                job["sync"] = json!(self.one(&["full", "top", "none"]));
                (self.one(&["drive-mirror", "drive-backup"]), job)
            }
        }
    }

    fn backup(&mut self, job: &mut Value) {
        let sync = self.one(&["full", "top", "none", "incremental", "bitmap"]);
        job["sync"] = json!(sync);
        if sync == "bitmap" || sync == "incremental" || self.maybe(0.1) {
            job["bitmap"] = json!(self.one(&BITMAPS));
            job["bitmap-mode"] = json!(self.one(&["on-success", "never", "always"]));
        }
        self.some(job, 0.1, "compress", &[json!(true)]);
        self.some(job, 0.2, "on-target-error", &["stop", "report", "ignore"].map(|v| json!(v)));
    }

    fn verb(&mut self) -> (&'static str, Value) {
        let job = self.one(&JOBS);
        let id = json!({"id": job});
        let device = json!({"device": job});
        match self.rng.below(12) {
            0 => ("job-pause", id),
            1 => ("job-resume", id),
            2 | 3 => ("job-complete", id),
            4 => ("job-cancel", id),
            5 => ("job-finalize", id),
            6 => ("job-dismiss", id),
            7 => ("block-job-pause", device),
            8 => ("block-job-resume", device),
            9 => ("block-job-cancel", json!({"device": job, "force": self.maybe(0.3)})),
            10 => ("block-job-set-speed", json!({"device": job, "speed": 1 << 20})),
            _ => ("block-job-change", json!({"id": job, "type": "mirror", "copy-mode": "write-blocking"})),
        }
    }

    fn bitmap(&mut self) -> (&'static str, Value) {
        let mut data = json!({"node": self.node(), "name": self.one(&BITMAPS)});
        match self.rng.below(7) {
            0..=1 => {
                self.some(&mut data, 0.4, "persistent", &[json!(true)]);
                self.some(&mut data, 0.3, "granularity", &[json!(4096), json!(512)]);
                self.some(&mut data, 0.2, "disabled", &[json!(true)]);
                ("block-dirty-bitmap-add", data)
            }
            2 => ("block-dirty-bitmap-remove", data),
            3 => ("block-dirty-bitmap-clear", data),
            4 => ("block-dirty-bitmap-enable", data),
            5 => ("block-dirty-bitmap-disable", data),
            _ => {
                let from = json!({"node": self.node(), "name": self.one(&BITMAPS)});
                let bitmaps = json!([self.one(&BITMAPS), from]);
                let merge = json!({"node": data["node"], "target": data["name"], "bitmaps": bitmaps});
                ("block-dirty-bitmap-merge", merge)
            }
        }
    }

    fn transaction(&mut self) -> Value {
        let mut actions = Vec::new();
        for _ in 0..self.rng.between(1, 3) {
            let (kind, data) = match self.rng.below(5) {
                0..=1 => self.bitmap(),
                2 => ("blockdev-snapshot", json!({"node": self.node(), "overlay": self.node()})),
                3 => {
                    let mut job = self.job_options();
                    job["device"] = json!(self.node());
                    job["target"] = json!(self.node());
                    self.backup(&mut job);
                    ("blockdev-backup", job)
                }
                _ => ("abort", json!({})),
            };
            actions.push(json!({"type": kind, "data": data}));
        }
        let mode = self.one(&["individual", "grouped"]);
        json!({"actions": actions, "properties": {"completion-mode": mode}})
    }

    /// The next command.
    fn command(&mut self) -> (&'static str, Value) {
        match self.rng.below(24) {
            0..=4 => ("blockdev-add", self.add()),
            5..=8 => self.job(),
            9..=12 => self.verb(),
            13..=14 => self.bitmap(),
            15 => ("transaction", self.transaction()),
            16 => ("blockdev-snapshot", json!({"node": self.node(), "overlay": self.node()})),
            17 => ("blockdev-del", json!({"node-name": self.node()})),
            18 => {
                let mut export = json!({
                    "type": "nbd", "id": self.one(&["e", "e2"]), "node-name": self.node(), "name": self.one(&["e", "e2"]), "writable": true
                });
                self.some(&mut export, 0.2, "bitmaps", &[json!(["bm"]), json!(["bn"])]);
                ("block-export-add", export)
            }
            19 => (
                "block-export-del",
                json!({"id": self.one(&["e", "e2"]), "mode": self.one(&["hard", "safe"])}),
            ),
            20 => {
                let name = self.one(&["t", "m", "b", "x"]);
                let mut node = json!({"driver": "qcow2", "node-name": name, "file": format!("{name}f")});
                let layers = [json!("b"), json!("m"), Value::Null, json!("x"), json!("t")];
                self.some(&mut node, 0.7, "backing", &layers);
                self.common(&mut node);
                ("blockdev-reopen", json!({"options": [node]}))
            }
            21 => (
                "block_resize",
                json!({"node-name": self.node(), "size": *self.rng.choose(&[LEN, 2 * LEN, LEN / 2, 1000])}),
            ),
            22 => {
                let file = self.one(&["/b.qcow2", "else", ""]);
                let arguments = json!({"device": self.one(&["t", "m"]), "image-node-name": self.node(), "backing-file": file});
                ("change-backing-file", arguments)
            }
            _ => match self.rng.below(5) {
                0 => ("blockdev-set-active", json!({"node-name": self.node(), "active": self.maybe(0.4)})),
                1 => (
                    "blockdev-snapshot-internal-sync",
                    json!({"device": self.node(), "name": self.one(&["i", "k"])}),
                ),
                2 => {
                    let name = self.one(&["i", "k"]);
                    ("blockdev-snapshot-delete-internal-sync", json!({"device": self.node(), "name": name}))
                }
                3 => {
                    let arguments = json!({
                        "node-name": self.node(), "snapshot-file": "/s1.qcow2", "snapshot-node-name": "s1", "format": "qcow2"
                    });
                    ("blockdev-snapshot-sync", arguments)
                }
                _ => ("nbd-server-stop", json!({})),
            },
        }
    }

    /// Somebody reads and writes.
    async fn client(&mut self, w: &World, outside: &env::Env) {
        let at = Span::new(self.rng.below(LEN / 4096 - 16) * 4096, *self.rng.choose(&[512, 4096, 65536]));
        let (name, what) = (self.one(&["e", "e2"]), self.rng.below(5));
        let number = 100 + self.rng.below(100) as u32;
        let Ok(d) =
            NbdDisk::connect(outside, &Booted::nbd_server(), name, Mode::Structured, w.verdict()).await
        else {
            return;
        };
        let asked = async {
            match what {
                0 => drop(d.read(at).await?),
                1 | 2 => {
                    d.write(at.start, stamped(number, at.start / SECTOR, at.len / SECTOR), false).await?
                }
                3 => d.zero(at, true).await?,
                _ => d.discard(at).await?,
            }
            d.flush().await
        };
        let _an_answer_or_not = outside.timeout(PAUSE, asked).await;
        d.disconnect();
    }

    /// The next request, or one soon, fails.
    fn fault(&mut self, w: &World) {
        let path = self.one(&["", "/t.qcow2", "/m.qcow2", "/b.qcow2", "/x.qcow2", "/y.qcow2"]);
        let op = *self.rng.choose(&[None, Some(Op::Write), Some(Op::Read), Some(Op::Barrier)]);
        let fault = *self.rng.choose(&[
            Fault::Errno(BlockError::EIO),
            Fault::Errno(BlockError::ENOSPC),
            Fault::Torn(BlockError::EIO),
            Fault::Hang,
        ]);
        let (skip, times) = (self.rng.below(12), self.rng.between(1, 4));
        w.host().fault(Rule { path: path.to_owned(), op, skip, times, fault });
    }

    async fn play(&mut self, w: &World, outside: &env::Env, m: &Manager) -> Result<(), Refusal> {
        let steps = self.rng.between(STEPS.0, STEPS.1);
        for (name, below) in QCOW2.into_iter().take(self.rng.below(6) as usize) {
            let path = format!("/{name}.qcow2");
            let file = json!({"driver": "file", "node-name": format!("{name}f"), "filename": path});
            m.must(
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": name, "file": file, "backing": below}),
            )
            .await?;
        }
        m.must("nbd-server-start", json!({"addr": Booted::nbd_address()})).await?;
        if self.maybe(0.7) {
            let export = json!({"type": "nbd", "id": "e", "node-name": "t", "name": "e", "writable": true});
            let _no_such_node = m.execute("block-export-add", export).await;
        }
        for _ in 0..steps {
            match self.rng.below(10) {
                0..=6 => {
                    let (command, arguments) = self.command();
                    let answer = m.execute(command, arguments);
                    match outside.timeout(PATIENCE, answer).await {
                        Some(Err(Refusal::Gone)) => return Err(Refusal::Gone),
                        Some(_) => {}
                        None => {
                            // what hangs in a disk is let go before anybody is blamed
                            w.host().clear_faults();
                            w.host().release_hung();
                        }
                    }
                }
                7 => self.client(w, outside).await,
                8 => self.fault(w),
                _ => {
                    let low = Duration::from_micros(10);
                    let pause = self.rng.duration(low, PAUSE);
                    outside.sleep(pause).await;
                }
            }
        }
        w.host().clear_faults();
        w.host().release_hung();
        m.must("query-jobs", json!({})).await?;
        m.must("query-named-block-nodes", json!({})).await.map(drop)
    }
}

/// One scene.
pub(crate) fn scene(bytes: &[u8]) {
    let mut scene = Scene { rng: Rng::told(bytes) };
    judge(World::play(1, false, |w| async move {
        for (name, below) in QCOW2 {
            let below = below.map(|b| format!("/{b}.qcow2"));
            w.host().install(&format!("/{name}.qcow2"), empty_qcow2(below.as_deref()));
        }
        for (number, name) in (1..).zip(RAW) {
            w.host().install(&format!("/{name}.raw"), stamped_disk(number));
        }
        let Some(daemon) = Booted::start(&w).await else { return };
        let (outside, _process) = w.start();
        let played = async {
            let m = daemon.manage(&w, &outside, &Rc::new(History::new())).await?;
            scene.play(&w, &outside, &m).await
        };
        if let Some(Err(e)) = w.within(&outside, PATIENCE * 30, "the scene", played).await {
            w.verdict().violation(format!("{e}"));
        }
        w.host().clear_faults();
        w.host().release_hung();
        daemon.quit(&w, &outside).await;
        Booted::all_have_quit(&w);
        for path in w.host().list() {
            let bytes = w.host().image(&path).unwrap_or_default().to_vec();
            if bytes.starts_with(b"QFI\xfb") {
                match now(check(&&bytes[..], Fix::Nothing)) {
                    Ok(report) if report.corruptions == 0 => {}
                    Ok(report) => w.verdict().violation(format!("{path}: {:?}", report.messages)),
                    Err(e) => w.verdict().violation(format!("{path}: {e}")),
                }
            }
        }
    }));
}
