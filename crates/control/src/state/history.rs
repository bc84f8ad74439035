//! The record of events and finished jobs ([`crate::record`]), written down: a manager reads what it missed across a restart.
//!
//! What can happen: thousands of events in a moment, a crash at any. What must stay true: nobody waits for this writing but the
//! end of the daemon; a number is given once, in all lives (a block of them is reserved, durably, before it is used up; the
//! rest of a block is lost with a crash); what is no longer kept is deleted here, too.

use crate::record::{Record, Which};
use ::state::{Batch, Store, Tables};
use block::Result;
use env::Env;
use env::sync::Notify;
use qapi::Value;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

/// Name of the numbering, and how far numbers may have been given.
const OWN: &str = "record";
/// The tables of the record.
pub(super) const TABLES: [&str; 3] = ["events", "finished", OWN];
/// Entries are gathered for so long before they are written together.
const GATHER: Duration = Duration::from_millis(100);
/// Numbers reserved at once: more than are given while a commit takes.
const RESERVE: u64 = 1 << 16;

fn table(which: Which) -> &'static str {
    match which {
        Which::Events => TABLES[0],
        Which::Jobs => TABLES[1],
    }
}

/// Sorts as the number does.
fn key(seq: u64) -> String {
    format!("{seq:020}")
}

/// What is not written yet.
pub(crate) struct History {
    store: Rc<Store>,
    waiting: RefCell<Batch>,
    wake: Notify,
    /// Reserved, of events and of jobs.
    reserved: [Cell<u64>; 2],
    /// Those that are written, or will be. (Between the lives of a daemon that was killed lie tens of thousands of numbers that nobody has.)
    written: [RefCell<VecDeque<u64>>; 2],
}

impl History {
    /// Takes over what `tables` hold of an earlier life, and writes down what comes.
    pub(super) fn begin(env: &Env, record: &Record, store: &Rc<Store>, tables: &Tables) -> Rc<History> {
        let own = |key: &str| {
            let bytes = tables.get(OWN)?.get(key)?;
            String::from_utf8(bytes.clone()).ok()
        };
        let name = own("name").unwrap_or_else(|| record.name());
        let history = Rc::new(History {
            store: store.clone(),
            waiting: RefCell::default(),
            wake: Notify::new(),
            reserved: Default::default(),
            written: Default::default(),
        });
        history.waiting.borrow_mut().put(OWN, "name", name.clone().into_bytes());
        for which in [Which::Events, Which::Jobs] {
            let rows = tables.get(table(which)).into_iter().flatten();
            let entries: Vec<(u64, Value)> = rows
                .filter_map(|(key, bytes)| {
                    let value = qapi::json::parse_one(std::str::from_utf8(bytes).ok()?).ok()?;
                    Some((key.parse().ok()?, value))
                })
                .collect();
            *history.written[which as usize].borrow_mut() = entries.iter().map(|e| e.0).collect();
            let given = own(table(which)).and_then(|n| n.parse().ok()).unwrap_or(0);
            record.restore(&name, which, entries, given);
            history.reserve(which, record.newest(which));
        }
        let told = history.clone();
        record.on_entry(Rc::new(move |which, seq, oldest, text| told.add(which, seq, oldest, text)));
        let writer = history.clone();
        let clock = env.clone();
        env.spawn("record writer", async move {
            loop {
                let woken = writer.wake.wait();
                if writer.waiting.borrow().is_empty() {
                    woken.await;
                }
                clock.sleep(GATHER).await;
                // told while this life lasts, whether or not it can be written
                let _ = writer.write().await;
            }
        });
        history
    }

    /// Numbers up to some way beyond `newest` may be given from now on.
    fn reserve(&self, which: Which, newest: u64) {
        let reserved = &self.reserved[which as usize];
        if newest + RESERVE / 2 >= reserved.get() {
            reserved.set(newest + RESERVE);
            self.promise(which, newest + RESERVE);
        }
    }

    fn promise(&self, which: Which, given: u64) {
        self.waiting.borrow_mut().put(OWN, table(which), given.to_string().into_bytes());
    }

    fn add(&self, which: Which, seq: u64, oldest: u64, text: &str) {
        {
            let mut waiting = self.waiting.borrow_mut();
            waiting.put(table(which), &key(seq), text.as_bytes().to_vec());
            let mut written = self.written[which as usize].borrow_mut();
            while let Some(gone) = written.pop_front_if(|number| *number < oldest) {
                waiting.delete(table(which), &key(gone));
            }
            written.push_back(seq);
        }
        self.reserve(which, seq);
        self.wake.notify_all();
    }

    /// Writes what waits.
    ///
    /// # Errors
    /// The store's. What was not written is lost with this life.
    pub(super) async fn write(&self) -> Result<()> {
        let batch = self.waiting.take();
        if batch.is_empty() { Ok(()) } else { self.store.commit(batch).await }
    }

    /// The end, in order: all is written, and no number is lost.
    pub(crate) async fn finish(&self, record: &Record) {
        for which in [Which::Events, Which::Jobs] {
            self.promise(which, record.newest(which));
        }
        // the end goes on without
        let _ = self.write().await;
    }
}
