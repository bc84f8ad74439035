//! The store: opening, committing, and what follows an error.
//!
//! What can happen: the directory is used by another daemon, or by one that was killed a moment ago; the file is damaged,
//! or was never finished; a write fails because the disk is full or broken. What must stay true:
//! * A commit that answered success is durable, whole; one that answered an error is not there, unless even finding out
//!   failed (then it may be, whole; the next commit that succeeds says what is).
//! * Commits take effect in the order in which they were asked for. Those that come while one is written are written
//!   together.
//! * Nothing is acknowledged before the file `format` is durable; so a directory without it holds nothing, and one with it
//!   holds a store, or is damaged.
//! * A commit whose future is dropped is carried out all the same.

use crate::batch::{Batch, Tables};
use crate::image::{Call, Image, MAX_STORE};
use block::{BlockError, Data, ErrorKind, Result, Span};
use env::sync::{Notify, OneshotSender, Queue, oneshot};
use env::{Env, Existing, File, LockRange, OpenMode};
use redb::{Builder, Database, ReadableDatabase, ReadableTable, TableDefinition};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// Name of the database in the directory.
pub const STORE_FILE: &str = "state.redb";
/// Name of the file that says that the directory holds a store, and in which format.
pub const FORMAT_FILE: &str = "format";
/// What it says. The number changes when older daemons would misread what newer ones write.
const FORMAT: &str = "liveblk state 1\n";
/// Its beginning, whatever the number.
const FORMAT_NAME: &str = "liveblk state ";
/// How long the lock of a daemon that was killed may outlive it (its ring is taken down after it), and some more.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// How often a lock is tried meanwhile.
const LOCK_STEP: Duration = Duration::from_millis(20);
/// Largest record. The largest real ones are descriptions of nodes, some kilobytes.
const MAX_RECORD: usize = 16 << 20;
/// Memory the database may use beside the copy of its file, which is its cache already.
const CACHE: usize = 1 << 20;
/// How files begin that the database wrote.
const MAGIC: &[u8] = b"redb";
/// The table of the store itself, with the number of the last commit.
const OWN_TABLE: &str = "liveblk";
const NUMBER: &str = "number";

/// A commit that waits.
struct Asked {
    batch: Batch,
    answer: OneshotSender<Result<()>>,
}

/// An open store.
pub struct Store {
    env: Env,
    dir: PathBuf,
    path: PathBuf,
    file: RefCell<Option<Rc<dyn File>>>,
    /// `None` after an error, until the file has been read again.
    database: RefCell<Option<Database>>,
    image: RefCell<Image>,
    /// Of the last commit.
    number: Cell<u64>,
    queue: Queue<Asked>,
    closed: Cell<bool>,
    done: Notify,
    served: Cell<bool>,
}

fn table(name: &str) -> TableDefinition<'_, &'static str, &'static [u8]> {
    TableDefinition::new(name)
}

impl Store {
    /// Opens the store in `dir`, which is there and nobody else's; a directory without one gets one.
    ///
    /// # Errors
    /// Another daemon uses the directory; the store is damaged, or of a newer format; the host's.
    pub async fn open(env: &Env, dir: &Path) -> Result<Rc<Store>> {
        let path = dir.join(STORE_FILE);
        let known = known_format(env, dir).await?;
        let file = open_or_create(env, &path, known).await.map_err(|e| named(e, &path))?;
        lock(env, &*file, dir).await?;
        let store = Rc::new(Store {
            env: env.clone(),
            dir: dir.to_owned(),
            path,
            file: RefCell::new(Some(file)),
            database: RefCell::default(),
            image: RefCell::default(),
            number: Cell::new(0),
            queue: Queue::new(),
            closed: Cell::new(false),
            done: Notify::new(),
            served: Cell::new(false),
        });
        match known {
            true => store.load().await?,
            // Either an earlier start did not come to its end, and nothing was ever recorded here; or the file that says so
            // was lost, and then there is something.
            false => match store.load().await {
                Ok(()) if store.number() > 0 => store.write_format().await?,
                _ => store.begin().await?,
            },
        }
        let serving = store.clone();
        env.spawn("state store", async move { serving.serve().await });
        Ok(store)
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.dir
    }

    /// How many commits there have been, in all lives.
    pub fn number(&self) -> u64 {
        self.number.get()
    }

    /// All records of these tables.
    ///
    /// # Errors
    /// The store had an error and has not been read again.
    pub fn read(&self, tables: &[&str]) -> Result<Tables> {
        let held = self.database.borrow();
        let Some(database) = &*held else {
            return Err(named(BlockError::new(ErrorKind::Io, "an earlier write failed"), &self.path));
        };
        let read = || {
            let reading = database.begin_read().map_err(redb::Error::from)?;
            let mut out = Tables::new();
            for name in tables {
                let rows = match reading.open_table(table(name)) {
                    Ok(rows) => rows,
                    Err(redb::TableError::TableDoesNotExist(_)) => continue,
                    Err(e) => return Err(e.into()),
                };
                let mut all = BTreeMap::new();
                for row in rows.iter()? {
                    let (key, value) = row?;
                    all.insert(key.value().to_owned(), value.value().to_vec());
                }
                out.insert((*name).to_owned(), all);
            }
            Ok::<Tables, redb::Error>(out)
        };
        self.caught(read)
    }

    /// Makes `batch` durable.
    ///
    /// # Errors
    /// The host's (for example no space): nothing of the batch is there. The store may be used again when the cause is gone.
    pub async fn commit(&self, batch: Batch) -> Result<()> {
        for ((table, key), value) in batch.changes() {
            if value.as_ref().is_some_and(|v| v.len() > MAX_RECORD) {
                let what = format!("record '{key}' of table '{table}' is larger than {MAX_RECORD} bytes");
                return Err(BlockError::invalid(what));
            }
        }
        if self.closed.get() {
            return Err(BlockError::new(ErrorKind::Cancelled, "the state store is closed"));
        }
        let (answer, outcome) = oneshot();
        self.queue.push(Asked { batch, answer });
        let lost = || BlockError::new(ErrorKind::Cancelled, "the state store has ended");
        outcome.await.unwrap_or_else(|| Err(lost()))
    }

    /// Ends the store: what was asked for is written, then the file is closed and another daemon may use it.
    pub async fn close(&self) {
        if !self.closed.replace(true) {
            self.queue.close();
        }
        while !self.served.get() {
            self.done.wait().await;
        }
        *self.database.borrow_mut() = None;
        let file = self.file.borrow_mut().take();
        if let Some(file) = file {
            // Nobody is left who could be told; what was committed is durable.
            let _ = file.settle().await;
        }
    }

    async fn serve(&self) {
        while let Some(first) = self.queue.pop().await {
            let mut group = vec![first];
            while let Some(next) = self.queue.try_pop() {
                group.push(next);
            }
            let outcome = self.write(&group).await;
            group.into_iter().for_each(|a| a.answer.send(outcome.clone()));
        }
        self.served.set(true);
        self.done.notify_all();
    }

    async fn write(&self, group: &[Asked]) -> Result<()> {
        if self.database.borrow().is_none() {
            self.load().await?;
        }
        let number = self.number.get() + 1;
        if let Err(e) = self.change(group, number) {
            *self.database.borrow_mut() = None;
            return Err(e);
        }
        let Err(e) = self.carry_out().await else {
            self.number.set(number);
            return Ok(());
        };
        // What the disk has of it only the disk knows.
        *self.database.borrow_mut() = None;
        match self.load().await {
            Ok(()) if self.number.get() == number => Ok(()),
            _ => Err(named(e, &self.path)),
        }
    }

    /// The changes, in memory.
    fn change(&self, group: &[Asked], number: u64) -> Result<()> {
        let held = self.database.borrow();
        let Some(database) = &*held else { return Err(BlockError::from_errno(BlockError::EIO)) };
        self.caught(|| {
            let mut writing = database.begin_write().map_err(redb::Error::from)?;
            // With one barrier only, a commit that rotted looks like one that a crash tore, and would be dropped silently.
            writing.set_two_phase_commit(true);
            for batch in group.iter().map(|a| &a.batch) {
                for name in batch.cleared() {
                    writing.delete_table(table(name))?;
                }
                for ((name, key), value) in batch.changes() {
                    let mut rows = writing.open_table(table(name))?;
                    match value {
                        Some(value) => rows.insert(key.as_str(), value.as_slice())?.map(|_| ()),
                        None => rows.remove(key.as_str())?.map(|_| ()),
                    };
                }
            }
            writing.open_table(table(OWN_TABLE))?.insert(NUMBER, number.to_le_bytes().as_slice())?;
            writing.commit()?;
            Ok::<(), redb::Error>(())
        })
    }

    /// Does to the file what the database did to its copy.
    async fn carry_out(&self) -> Result<()> {
        let calls = self.image.borrow().take_calls();
        self.carry_out_these(calls).await
    }

    async fn carry_out_these(&self, calls: Vec<Call>) -> Result<()> {
        let file = self.file.borrow().clone();
        let file = file.ok_or_else(|| BlockError::new(ErrorKind::Cancelled, "the state store is closed"))?;
        for call in calls {
            match call {
                Call::Write(offset, bytes) => file.write(offset, Data::from(bytes)).await?,
                Call::SetLen(len) => file.set_len(len).await?,
                Call::Sync => file.barrier().await?,
            }
        }
        Ok(())
    }

    /// A new store, in place of what an earlier start may have left half made.
    async fn begin(&self) -> Result<()> {
        self.attach(Vec::new())?;
        let mut calls = vec![Call::SetLen(0)];
        calls.extend(self.image.borrow().take_calls());
        calls.push(Call::Sync);
        self.carry_out_these(calls).await.map_err(|e| named(e, &self.path))?;
        self.number.set(0);
        self.write_format().await
    }

    async fn write_format(&self) -> Result<()> {
        let format = self.dir.join(FORMAT_FILE);
        let mode = OpenMode { write: true, existing: Existing::CreateTruncate, ..OpenMode::default() };
        let write = async {
            let file = self.env.open(&format, mode).await?;
            file.write(0, Data::copy_from(FORMAT.as_bytes())).await?;
            file.barrier().await
        };
        write.await.map_err(|e| named(e, &format))
    }

    /// Reads the file, lets the database mend what a crash left, and makes sure that what was read is on the disk: after an
    /// error the host may show what it could not write.
    async fn load(&self) -> Result<()> {
        let file = self.file.borrow().clone();
        let file = file.ok_or_else(|| BlockError::new(ErrorKind::Cancelled, "the state store is closed"))?;
        let loaded = async {
            let len = file.info().await?.len;
            if len > MAX_STORE {
                return Err(damaged("it is too large"));
            }
            let bytes = file.read(Span::new(0, len)).await?.to_vec();
            if !bytes.starts_with(MAGIC) {
                return Err(damaged("it is not a state store, or its beginning is lost"));
            }
            self.attach(bytes)?;
            let number = self.read(&[OWN_TABLE])?;
            let number =
                number.get(OWN_TABLE).and_then(|t| t.get(NUMBER)).map(|v| <[u8; 8]>::try_from(&v[..]));
            match number {
                None => self.number.set(0),
                Some(Ok(n)) => self.number.set(u64::from_le_bytes(n)),
                Some(Err(_)) => return Err(damaged("its number is none")),
            }
            self.carry_out().await?;
            let whole = self.image.borrow().whole();
            self.carry_out_these(whole).await
        };
        let outcome = loaded.await.map_err(|e| named(e, &self.path));
        if outcome.is_err() {
            *self.database.borrow_mut() = None;
        }
        outcome
    }

    /// Starts the database on these bytes.
    fn attach(&self, bytes: Vec<u8>) -> Result<()> {
        let image = Image::new(bytes);
        let backend = image.clone();
        let database = self.caught(|| {
            let mut builder = Builder::new();
            builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
            builder.create_with_backend(backend)
        })?;
        *self.database.borrow_mut() = Some(database);
        *self.image.borrow_mut() = image;
        Ok(())
    }

    /// The result of a call of the database. A panic in it is what bytes that nobody wrote lead to.
    fn caught<T, E: std::fmt::Display>(&self, call: impl FnOnce() -> std::result::Result<T, E>) -> Result<T> {
        match catch_unwind(AssertUnwindSafe(call)) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(e)) => Err(damaged(&e.to_string())),
            Err(_) => Err(damaged("what it holds contradicts itself")),
        }
    }
}

fn damaged(why: &str) -> BlockError {
    BlockError::corrupt(format!("the state store is damaged: {why}"))
}

fn named(e: BlockError, path: &Path) -> BlockError {
    e.context(format!("state store '{}'", path.display()))
}

async fn open_or_create(env: &Env, path: &Path, known: bool) -> Result<Rc<dyn File>> {
    let mode = |existing| OpenMode { write: true, existing, ..OpenMode::default() };
    match env.open(path, mode(Existing::Open)).await {
        Err(e) if e.errno() == BlockError::ENOENT && known => return Err(damaged("it is missing")),
        Err(e) if e.errno() == BlockError::ENOENT => {}
        other => return other,
    }
    match env.open(path, mode(Existing::CreateNew)).await {
        // another daemon was quicker; its lock says so
        Err(e) if e.errno() == BlockError::EEXIST => env.open(path, mode(Existing::Open)).await,
        other => other,
    }
}

async fn lock(env: &Env, file: &dyn File, dir: &Path) -> Result<()> {
    let until = env.now() + LOCK_PATIENCE;
    loop {
        match file.lock(LockRange { start: 0, len: 1, exclusive: true }).await {
            Err(e) if e.kind() == ErrorKind::Busy && env.now() < until => env.sleep(LOCK_STEP).await,
            Err(e) if e.kind() == ErrorKind::Busy => {
                let what = format!("another daemon uses the state directory '{}'", dir.display());
                return Err(BlockError::new(ErrorKind::Busy, what).with_errno(e.errno()));
            }
            other => return other.map_err(|e| named(e, &dir.join(STORE_FILE))),
        }
    }
}

/// Whether the directory holds a store of our format.
async fn known_format(env: &Env, dir: &Path) -> Result<bool> {
    let path = dir.join(FORMAT_FILE);
    let file = match env.open(&path, OpenMode::default()).await {
        Ok(file) => file,
        Err(e) if e.errno() == BlockError::ENOENT => return Ok(false),
        Err(e) => return Err(named(e, &path)),
    };
    let read = async {
        let len = file.info().await?.len.min(64);
        Ok::<_, BlockError>(file.read(Span::new(0, len)).await?.to_vec())
    };
    let bytes = read.await.map_err(|e| named(e, &path))?;
    if bytes == FORMAT.as_bytes() {
        return Ok(true);
    }
    // a crash while it was written: nothing had been acknowledged
    if FORMAT.as_bytes().starts_with(&bytes) || block::is_zero(&bytes) {
        return Ok(false);
    }
    let text = String::from_utf8_lossy(&bytes);
    let why = match text.strip_prefix(FORMAT_NAME) {
        Some(n) => format!("format {} is not known to this version", n.trim_end()),
        None => "it is damaged".to_owned(),
    };
    Err(named(BlockError::corrupt(why), &path))
}
