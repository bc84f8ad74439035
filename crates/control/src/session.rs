//! One client of a monitor: greeting, negotiation, commands in order, replies and events.
//!
//! What can happen: commands arrive faster than they run (eight wait, then reading stops); a client leaves while its
//! command runs (the command goes on, its reply is dropped); input is broken (an error reply, and the session goes on).
//! What must stay true: replies come in the order of the commands, each with its `id`; nothing but `qmp_capabilities` runs
//! before negotiation; no event is sent before it.

use crate::Daemon;
use crate::error::{Class, QmpError, Reply};
use crate::outbox::Outbox;
use crate::record::numbered;
use env::sync::{Queue, Semaphore, race};
use env::{Stream, TaskHandle};
use qapi::json::Parser;
use qapi::{Map, Value, json, print};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

/// Commands of one client that may wait; then its input is left unread. As QSD.
const QUEUE: usize = 8;
/// Bytes taken in one receive.
const RECEIVE: usize = 64 << 10;
/// How long a client that has ended its input may wait for the rest of its replies before the next client is let in.
const FAREWELL: Duration = Duration::from_secs(5);

/// A client's state, as its tasks and the event bus share it.
pub(crate) struct Session {
    outbox: Outbox,
    stream: Rc<dyn Stream>,
    pretty: bool,
    negotiated: Cell<bool>,
    oob: Cell<bool>,
    /// Events are sent with their numbers (capability `event-seq`).
    event_seq: Cell<bool>,
    /// Input that waits to be executed, and what bounds it.
    inbox: Queue<Result<Value, String>>,
    room: Semaphore,
    /// The daemon ends: read no further.
    ending: env::sync::Notify,
}

impl Session {
    /// Serves a client until it leaves or the daemon ends.
    pub(crate) async fn serve(daemon: &Rc<Daemon>, stream: Rc<dyn Stream>, pretty: bool) {
        let session = Rc::new(Session {
            outbox: Outbox::default(),
            stream,
            pretty,
            negotiated: Cell::new(false),
            oob: Cell::new(false),
            event_seq: Cell::new(false),
            inbox: Queue::new(),
            room: Semaphore::new(QUEUE),
            ending: env::sync::Notify::new(),
        });
        daemon.events().subscribe(&session);
        let ended = daemon.join(&session);
        let greeting = json!({"QMP": {"version": daemon.version(), "capabilities": ["oob"]}});
        session.outbox.reply(session.text(&greeting)).await;
        let sending = session.spawn_sender(daemon);
        let working = session.spawn_worker(daemon);
        if !daemon.has_ended() {
            race(session.read(daemon), session.ending.wait()).await;
        }
        session.inbox.close();
        if race(working.join(), daemon.env().sleep(FAREWELL)).await.is_some() {
            session.outbox.close();
            race(sending.join(), daemon.env().sleep(FAREWELL)).await;
        }
        session.outbox.close();
        session.stream.shutdown();
        drop(ended);
    }

    fn spawn_sender(self: &Rc<Self>, daemon: &Rc<Daemon>) -> TaskHandle {
        let session = self.clone();
        daemon.env().spawn("monitor output", async move {
            session.outbox.send_all(&*session.stream).await;
        })
    }

    fn spawn_worker(self: &Rc<Self>, daemon: &Rc<Daemon>) -> TaskHandle {
        let (session, daemon) = (self.clone(), daemon.clone());
        daemon.env().clone().spawn("monitor commands", async move {
            while let Some(input) = session.inbox.pop().await {
                session.room.release(1);
                let message = session.answer(&daemon, input).await;
                if !session.outbox.reply(session.text(&message)).await || daemon.has_ended() {
                    break;
                }
            }
        })
    }

    async fn read(&self, daemon: &Rc<Daemon>) {
        let mut parser = Parser::new();
        loop {
            let bytes = match self.stream.recv(RECEIVE).await {
                Ok(b) if !b.is_empty() => b,
                _ => return,
            };
            let mut found = Vec::new();
            parser.feed(&bytes, |v| found.push(v));
            for input in found {
                if self.oob.get() && input.as_ref().is_ok_and(|v| v.get("exec-oob").is_some()) {
                    // past the commands that wait; none of ours may run there, so the answer is at hand
                    let message = self.answer(daemon, input).await;
                    self.outbox.reply(self.text(&message)).await;
                    continue;
                }
                self.room.acquire(1).await.forget();
                self.inbox.push(input);
            }
        }
    }

    /// The daemon ends: what is under way is answered, nothing more is read.
    pub(crate) fn end(&self) {
        self.ending.notify_all();
    }

    /// Sends an event, unless it is too early. A client that has left too much unread is cut off.
    pub(crate) fn event(&self, event: &Value, seq: u64) {
        if !self.negotiated.get() {
            return;
        }
        let text = if self.event_seq.get() { self.text(&numbered(event, seq)) } else { self.text(event) };
        if !self.outbox.event(text) {
            self.outbox.close();
            self.stream.shutdown();
        }
    }

    fn text(&self, message: &Value) -> Vec<u8> {
        let mut out = String::new();
        print::print(message, self.pretty, &mut out);
        out.push_str("\r\n");
        out.into_bytes()
    }

    async fn answer(&self, daemon: &Rc<Daemon>, input: Result<Value, String>) -> Value {
        let (id, reply) = match input {
            Err(e) => (None, Err(QmpError::generic(e))),
            Ok(Value::Object(mut request)) => {
                let id = request.shift_remove("id");
                (id, self.run(daemon, request).await)
            }
            Ok(_) => (None, Err(QmpError::generic("QMP input must be a JSON object"))),
        };
        let mut message = Map::new();
        match reply {
            Ok(value) => {
                message.insert("return".into(), value);
                message.extend(id.map(|id| ("id".to_owned(), id)));
            }
            Err(e) => {
                message.extend(id.map(|id| ("id".to_owned(), id)));
                message.insert("error".into(), e.to_json());
            }
        }
        Value::Object(message)
    }

    async fn run(&self, daemon: &Rc<Daemon>, request: Map<String, Value>) -> Reply {
        let call = Call::read(request, self.oob.get())?;
        let known = daemon.knows(&call.name);
        if !self.negotiated.get() {
            if call.name != "qmp_capabilities" {
                let desc = "Expecting capabilities negotiation with 'qmp_capabilities'";
                return Err(QmpError::of(Class::CommandNotFound, desc));
            }
        } else if call.name == "qmp_capabilities" && !call.oob {
            let checked = daemon.schema().check_json("qmp_capabilities", call.arguments);
            checked.map_err(QmpError::generic)?;
            let desc = "Capabilities negotiation is already complete, command ignored";
            return Err(QmpError::of(Class::CommandNotFound, desc));
        }
        if !known {
            let desc = format!("The command {} has not been found", call.name);
            return Err(QmpError::of(Class::CommandNotFound, desc));
        }
        if call.oob {
            return Err(QmpError::generic(format!("The command {} does not support OOB", call.name)));
        }
        if call.name == "qmp_capabilities" {
            return self.negotiate(daemon, call.arguments);
        }
        daemon.execute(&call.name, call.arguments).await
    }

    fn negotiate(&self, daemon: &Rc<Daemon>, arguments: Map<String, Value>) -> Reply {
        let checked = daemon.schema().check_json("qmp_capabilities", arguments).map_err(QmpError::generic)?;
        let enable = checked.get("enable").and_then(Value::as_array);
        let wants = |name: &str| enable.is_some_and(|e| e.iter().any(|v| v == name));
        self.oob.set(wants("oob"));
        // not in the greeting, which is QSD's: who wants it knows from the schema
        self.event_seq.set(wants("event-seq"));
        self.negotiated.set(true);
        Ok(json!({}))
    }
}

/// A command as it was sent.
struct Call {
    name: String,
    arguments: Map<String, Value>,
    oob: bool,
}

impl Call {
    fn read(request: Map<String, Value>, oob_allowed: bool) -> Result<Call, QmpError> {
        let mut call: Option<(String, bool)> = None;
        let mut arguments = Map::new();
        for (key, value) in request {
            let member = |what: &str| QmpError::generic(format!("QMP input member '{key}' {what}"));
            match (key.as_str(), value) {
                ("exec-oob", _) if !oob_allowed => return Err(member("is unexpected")),
                ("execute" | "exec-oob", Value::String(name)) => {
                    if call.is_some() {
                        let desc = "QMP input member 'exec-oob' clashes with 'execute'";
                        return Err(QmpError::generic(desc));
                    }
                    call = Some((name, key == "exec-oob"));
                }
                ("execute" | "exec-oob", _) => return Err(member("must be a string")),
                ("arguments", Value::Object(map)) => arguments = map,
                ("arguments", _) => return Err(member("must be an object")),
                _ => return Err(member("is unexpected")),
            }
        }
        match call {
            Some((name, oob)) => Ok(Call { name, arguments, oob }),
            None => Err(QmpError::generic("QMP input lacks member 'execute'")),
        }
    }
}
