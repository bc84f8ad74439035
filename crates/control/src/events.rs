//! Events: to every client that has negotiated, with the wall-clock time, some of them limited in rate.

use crate::record::{Record, Which};
use crate::session::Session;
use env::Env;
use qapi::{Map, Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// The window of rate-limited events: the first of a window is sent at once, of the others the last, at its end.
const WINDOW: Duration = Duration::from_secs(1);

/// Who gets events, and which wait for their window to end.
pub(crate) struct Events {
    env: Env,
    sessions: RefCell<Vec<Weak<Session>>>,
    /// Open windows, by event and key, with the last event in them that is not sent yet.
    windows: RefCell<BTreeMap<(String, String), Option<Value>>>,
    /// What has been told, for those who were not there.
    record: Record,
}

/// The member that tells streams of a rate-limited event apart (empty: there is one stream); `None`: no limit.
fn limited_by(name: &str) -> Option<&'static str> {
    match name {
        "QUORUM_REPORT_BAD" => Some("node-name"),
        "QUORUM_FAILURE" => Some(""),
        _ => None,
    }
}

impl Events {
    pub(crate) fn new(env: &Env) -> Rc<Events> {
        Rc::new(Events {
            env: env.clone(),
            sessions: RefCell::new(Vec::new()),
            windows: RefCell::new(BTreeMap::new()),
            record: Record::new(env.random()),
        })
    }

    /// What has happened: events as they were told, and finished jobs.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    /// A client that wants them from now on (it will get them once it has negotiated).
    pub(crate) fn subscribe(&self, session: &Rc<Session>) {
        let mut all = self.sessions.borrow_mut();
        all.retain(|s| s.strong_count() > 0);
        all.push(Rc::downgrade(session));
    }

    /// Emits an event. `data` is an object; an empty one is left out.
    pub(crate) fn emit(self: &Rc<Self>, name: &str, data: Value) {
        let now = self.env.wall();
        let mut event = Map::new();
        event.insert(
            "timestamp".into(),
            json!({"seconds": now.as_secs(), "microseconds": now.subsec_micros()}),
        );
        event.insert("event".into(), name.into());
        let key = limited_by(name).map(|k| data[k].as_str().unwrap_or_default().to_owned());
        if data.as_object().is_some_and(|d| !d.is_empty()) {
            event.insert("data".into(), data);
        }
        match key {
            None => self.send(Value::Object(event)),
            Some(key) => self.limit((name.to_owned(), key), Value::Object(event)),
        }
    }

    fn limit(self: &Rc<Self>, key: (String, String), event: Value) {
        if let Some(waiting) = self.windows.borrow_mut().get_mut(&key) {
            *waiting = Some(event);
            return;
        }
        self.windows.borrow_mut().insert(key.clone(), None);
        self.send(event);
        let (events, env) = (Rc::downgrade(self), self.env.clone());
        self.env.spawn("event window", async move {
            loop {
                env.sleep(WINDOW).await;
                let Some(events) = events.upgrade() else { return };
                let waiting = events.windows.borrow_mut().get_mut(&key).and_then(Option::take);
                match waiting {
                    Some(event) => events.send(event),
                    None => {
                        events.windows.borrow_mut().remove(&key);
                        return;
                    }
                }
            }
        });
    }

    fn send(&self, event: Value) {
        let (seq, event) = self.record.add(Which::Events, event);
        let sessions: Vec<_> = self.sessions.borrow().iter().filter_map(Weak::upgrade).collect();
        sessions.iter().for_each(|s| s.event(&event, seq));
    }
}
