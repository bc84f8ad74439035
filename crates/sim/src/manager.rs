//! A manager: a client that speaks QMP bytes over a simulated socket, and watches what the daemon tells it.
//!
//! What must stay true of the daemon, and is checked here as it happens: each command gets one reply, in order, with its id;
//! a job's states follow the table (reference/qmp-semantics.md 3.1, 3.5); a job that concludes was reported completed or
//! cancelled exactly once before; READY comes once, right after the state ready.

use crate::Verdict;
use crate::history::{History, Moment};
use block::Data;
use env::sync::{Notify, OneshotSender, oneshot};
use env::{Address, Env, Stream, TaskHandle};
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

/// Commands whose jobs are no block jobs.
const PLAIN: [&str; 5] =
    ["blockdev-create", "x-blockdev-amend", "snapshot-save", "snapshot-load", "snapshot-delete"];
const RECEIVE: usize = 1 << 16;

/// Why a command did not succeed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// The daemon said no: its sentence.
    Error(String),
    /// The connection is gone; the command may have run.
    Gone,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refusal::Error(e) => write!(f, "{e}"),
            Refusal::Gone => write!(f, "the monitor is gone"),
        }
    }
}

/// What a job has shown so far.
#[derive(Clone, Default, Debug)]
pub struct JobSeen {
    /// Its state; empty before the first event.
    pub status: String,
    /// BLOCK_JOB_READY was seen.
    pub ready: bool,
    /// BLOCK_JOB_COMPLETED was seen, with its `error` if it had one.
    pub completed: Option<Option<String>>,
    /// The digest in it.
    pub digest: Option<String>,
    /// BLOCK_JOB_MISMATCH events.
    pub mismatches: u64,
    /// BLOCK_JOB_CANCELLED was seen.
    pub cancelled: bool,
    /// BLOCK_JOB_PENDING was seen.
    pub pending: bool,
    /// BLOCK_JOB_ERROR events.
    pub errors: u64,
    /// When it was completed or cancelled.
    pub ended_at: Moment,
    /// It was there before the manager.
    found: bool,
}

/// A monitor connection, negotiated.
pub struct Manager {
    stream: Rc<dyn Stream>,
    state: Rc<State>,
    next_id: Cell<u64>,
    reader: TaskHandle,
    sending: env::sync::Semaphore,
}

struct State {
    verdict: Verdict,
    history: Rc<History>,
    waiting: RefCell<VecDeque<(u64, OneshotSender<Value>)>>,
    jobs: RefCell<BTreeMap<String, JobSeen>>,
    /// Jobs that are no block jobs: they have no BLOCK_JOB events.
    plain: RefCell<BTreeSet<String>>,
    changed: Notify,
    gone: Cell<bool>,
    say: crate::Machine,
    late: bool,
}

impl Manager {
    /// Connects and negotiates. With `late` there may be jobs already, of whose states so far nothing is known.
    pub async fn connect(
        env: &Env,
        at: &Address,
        machine: &crate::Machine,
        history: &Rc<History>,
        verdict: &Verdict,
        late: bool,
    ) -> Result<Rc<Manager>, Refusal> {
        let stream = env.connect(at).await.map_err(|_| Refusal::Gone)?;
        let state = Rc::new(State {
            verdict: verdict.clone(),
            history: history.clone(),
            waiting: RefCell::default(),
            jobs: RefCell::default(),
            plain: RefCell::default(),
            changed: Notify::new(),
            gone: Cell::new(false),
            say: machine.clone(),
            late,
        });
        let (s, st) = (stream.clone(), state.clone());
        let reader = env.spawn("manager reads", async move {
            st.read(&*s).await;
            st.gone.set(true);
            st.waiting.take();
            st.changed.notify_all();
        });
        let manager = Rc::new(Manager {
            stream,
            state,
            next_id: Cell::new(1),
            reader,
            sending: env::sync::Semaphore::new(1),
        });
        manager.execute("qmp_capabilities", json!({})).await?;
        Ok(manager)
    }

    /// Runs a command; its reply.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, Refusal> {
        if self.state.gone.get() {
            return Err(Refusal::Gone);
        }
        if PLAIN.contains(&command)
            && let Some(job) = arguments["job-id"].as_str()
        {
            self.state.plain.borrow_mut().insert(job.to_owned());
        }
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        let line = json!({"execute": command, "arguments": arguments, "id": id}).to_string() + "\n";
        self.state.say.say(|| format!("-> {}", line.trim()));
        let (sender, reply) = oneshot();
        {
            let _turn = self.sending.acquire(1).await;
            self.state.waiting.borrow_mut().push_back((id, sender));
            self.stream.send(Data::from(line.into_bytes())).await.map_err(|_| Refusal::Gone)?;
        }
        let reply = reply.await.ok_or(Refusal::Gone)?;
        match (reply.get("return"), reply.get("error")) {
            (Some(value), None) => Ok(value.clone()),
            (None, Some(e)) => {
                Err(Refusal::Error(e["desc"].as_str().unwrap_or("an error without a sentence").to_owned()))
            }
            _ => {
                self.state.verdict.violation(format!("QMP: neither return nor error: {reply}"));
                Err(Refusal::Gone)
            }
        }
    }

    /// Runs a command that must succeed.
    pub async fn must(&self, command: &str, arguments: Value) -> Result<Value, Refusal> {
        let result = self.execute(command, arguments.clone()).await;
        if let Err(Refusal::Error(e)) = &result {
            self.state.verdict.violation(format!("{command} {arguments} was refused: {e}"));
        }
        result
    }

    /// What the job has shown.
    pub fn job(&self, id: &str) -> JobSeen {
        self.state.jobs.borrow().get(id).cloned().unwrap_or_default()
    }

    /// Waits until the job satisfies `wanted`, or the monitor is gone.
    pub async fn wait_job(&self, id: &str, wanted: impl Fn(&JobSeen) -> bool) -> Result<JobSeen, Refusal> {
        loop {
            let changed = self.state.changed.wait();
            let seen = self.job(id);
            if wanted(&seen) {
                return Ok(seen);
            }
            if self.state.gone.get() {
                return Err(Refusal::Gone);
            }
            changed.await;
        }
    }

    /// Whether the connection is gone.
    pub fn is_gone(&self) -> bool {
        self.state.gone.get()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.reader.cancel();
        self.stream.shutdown();
    }
}

impl State {
    async fn read(&self, stream: &dyn Stream) {
        let mut text = Vec::new();
        while let Ok(piece) = stream.recv(RECEIVE).await {
            if piece.is_empty() {
                return;
            }
            text.extend_from_slice(&piece);
            while let Some(end) = text.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                match serde_json::from_slice::<Value>(&line) {
                    Ok(message) => self.take(message),
                    Err(e) => {
                        self.verdict.violation(format!("QMP: {e}: {}", String::from_utf8_lossy(&line)));
                        return;
                    }
                }
            }
        }
    }

    fn take(&self, message: Value) {
        self.say.say(|| format!("<- {message}"));
        if message.get("QMP").is_some() {
            return;
        }
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            self.event(name, &message["data"]);
            self.changed.notify_all();
            return;
        }
        let id = message.get("id").and_then(Value::as_u64);
        let first = self.waiting.borrow_mut().pop_front();
        match first {
            Some((expected, sender)) if id == Some(expected) => sender.send(message),
            Some((expected, _)) => {
                self.verdict.violation(format!("QMP: a reply to {id:?} where {expected} is due: {message}"));
            }
            None => self.verdict.violation(format!("QMP: a reply that nobody asked for: {message}")),
        }
    }

    fn event(&self, name: &str, data: &Value) {
        let id = |key: &str| data[key].as_str().unwrap_or_default().to_owned();
        let mut jobs = self.jobs.borrow_mut();
        let bad = |what: String| self.verdict.violation(format!("events: {what}"));
        match name {
            "JOB_STATUS_CHANGE" => {
                let (id, status) = (id("id"), id("status"));
                let job = jobs.entry(id.clone()).or_default();
                job.found |= self.late && job.status.is_empty() && status != "created";
                if !(may_follow(&job.status, &status) || job.found && job.status.is_empty()) {
                    bad(format!("job {id} went from '{}' to '{status}'", job.status));
                }
                let plain = self.plain.borrow().contains(&id);
                if status == "concluded" && !plain && !job.found && job.completed.is_none() && !job.cancelled
                {
                    bad(format!("job {id} concluded without BLOCK_JOB_COMPLETED or BLOCK_JOB_CANCELLED"));
                }
                if job.status == "null" {
                    *job = JobSeen::default();
                }
                job.status = status;
            }
            "BLOCK_JOB_READY" => {
                let id = id("device");
                let job = jobs.entry(id.clone()).or_default();
                if std::mem::replace(&mut job.ready, true) || job.status != "ready" {
                    bad(format!("BLOCK_JOB_READY of job {id} in state '{}', or twice", job.status));
                }
            }
            "BLOCK_JOB_PENDING" => jobs.entry(id("id")).or_default().pending = true,
            "BLOCK_JOB_ERROR" => jobs.entry(id("device")).or_default().errors += 1,
            "BLOCK_JOB_MISMATCH" => jobs.entry(id("device")).or_default().mismatches += 1,
            "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" => {
                let id = id("device");
                let job = jobs.entry(id.clone()).or_default();
                if job.completed.is_some() || job.cancelled {
                    bad(format!("job {id} ended twice"));
                }
                if name == "BLOCK_JOB_CANCELLED" {
                    job.cancelled = true;
                } else {
                    job.completed = Some(data["error"].as_str().map(str::to_owned));
                    job.digest = data["verify"]["digest"].as_str().map(str::to_owned);
                }
                job.ended_at = self.history.tick();
            }
            _ => {}
        }
    }
}

/// The drawing of qmp-semantics 3.1, for jobs that become ready.
fn may_follow(from: &str, to: &str) -> bool {
    match from {
        "" | "null" => to == "created",
        "created" => matches!(to, "running" | "paused" | "aborting" | "null"),
        "running" => matches!(to, "paused" | "ready" | "aborting" | "waiting"),
        "paused" => to == "running",
        "ready" => matches!(to, "standby" | "waiting" | "aborting"),
        "standby" => to == "ready",
        "waiting" => matches!(to, "pending" | "aborting"),
        "pending" => matches!(to, "concluded" | "aborting"),
        "aborting" => to == "concluded",
        "concluded" => to == "null",
        _ => false,
    }
}
