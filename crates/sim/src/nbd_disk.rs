//! A guest's disk behind an NBD connection: the client side of the protocol over a simulated stream.
//!
//! What must stay true: a reply that answers no request, or answers one twice, is a violation and not an error to get over;
//! a connection that breaks ends every request in flight with `Disconnected`, and what they did is unknown.

use crate::Verdict;
use crate::guest::{Dial, Disk};
use block::{BlockError, Data, ErrorKind, Io, Result, Span};
use env::sync::{Oneshot, OneshotSender, Queue, oneshot};
use env::{Address, Env, Stream, TaskHandle};
use nbd::proto::cmd_flag;
use nbd::{
    Answer, ClientHandshake, ClientWants, Cmd, Expected, Inbox, Mode, Negotiated, Outbox, ReadAssembly,
    Reply, ReplyParser, encode_request,
};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

const RECEIVE: usize = 1 << 16;
const COPY_BELOW: usize = 256;

struct Waiting {
    answer: Answer,
    read: Option<ReadAssembly>,
    error: Option<BlockError>,
    done: OneshotSender<Result<Data>>,
}

/// Requests in flight, by cookie.
#[derive(Default)]
struct Table(RefCell<BTreeMap<u64, Waiting>>);

impl Expected for Table {
    fn lookup(&self, cookie: u64) -> Option<Answer> {
        self.0.borrow().get(&cookie).map(|w| w.answer)
    }
}

/// One connection to one export.
pub struct NbdDisk {
    stream: Rc<dyn Stream>,
    agreed: Negotiated,
    table: Rc<Table>,
    next: Cell<u64>,
    out: Rc<Queue<Data>>,
    broken: Rc<Cell<bool>>,
    tasks: Vec<TaskHandle>,
}

impl NbdDisk {
    /// How a guest gets at the export, again and again: see [`NbdDisk::connect`].
    pub fn dial(env: &Env, at: Address, export: &str, mode: Mode, verdict: &Verdict) -> Dial {
        let (env, export, verdict) = (env.clone(), export.to_owned(), verdict.clone());
        Box::new(move || {
            let (env, at, export, verdict) = (env.clone(), at.clone(), export.clone(), verdict.clone());
            Box::pin(async move {
                let disk = NbdDisk::connect(&env, &at, &export, mode, &verdict).await?;
                Ok(disk as Rc<dyn Disk>)
            })
        })
    }

    /// Connects and agrees on the best framing up to `mode`.
    pub async fn connect(
        env: &Env,
        at: &Address,
        export: &str,
        mode: Mode,
        verdict: &Verdict,
    ) -> Result<Rc<NbdDisk>> {
        let stream = env.connect(at).await?;
        let wants = ClientWants { export: export.to_owned(), mode, contexts: Vec::new(), tls: false };
        let mut handshake = ClientHandshake::new(wants)?;
        let (mut inbox, mut out) = (Inbox::new(), Outbox::new());
        let agreed = loop {
            if let Some(agreed) = handshake.step(&mut inbox, &mut out)?.entered() {
                break agreed;
            }
            if !out.is_empty() {
                stream.send(out.take()).await?;
            }
            let piece = stream.recv(RECEIVE).await?;
            if piece.is_empty() {
                return Err(gone());
            }
            inbox.push(piece, COPY_BELOW);
        };
        if !out.is_empty() {
            stream.send(out.take()).await?;
        }
        let (table, queue, broken) =
            (Rc::new(Table::default()), Rc::new(Queue::<Data>::new()), Rc::new(Cell::new(false)));
        let mut parser = ReplyParser::new(agreed.mode);
        let (s, t, b, q, v) = (stream.clone(), table.clone(), broken.clone(), queue.clone(), verdict.clone());
        let receiving = env.spawn("guest receives", async move {
            if let Err(e) = receive(&*s, &mut parser, &mut inbox, &t).await
                && e.kind() == ErrorKind::Corrupt
            {
                v.violation(format!("NBD: {e}"));
            }
            b.set(true);
            q.close();
            s.shutdown();
            // dropping the senders tells everyone
            t.0.take();
        });
        let (s, q, b) = (stream.clone(), queue.clone(), broken.clone());
        let sending = env.spawn("guest sends", async move {
            while let Some(data) = q.pop().await {
                if s.send(data).await.is_err() {
                    b.set(true);
                    s.shutdown();
                    break;
                }
            }
        });
        let tasks = vec![receiving, sending];
        Ok(Rc::new(NbdDisk { stream, agreed, table, next: Cell::new(1), out: queue, broken, tasks }))
    }

    /// What the server said of the export.
    pub fn facts(&self) -> &Negotiated {
        &self.agreed
    }

    /// Says goodbye in order.
    pub fn disconnect(&self) {
        let mut out = Outbox::new();
        encode_request(&mut out, self.agreed.mode, Cmd::Disconnect, 0, 0, Span::default(), Data::empty());
        self.out.push(out.take());
        self.out.close();
    }

    fn ask(&self, cmd: Cmd, flags: u16, at: Span, payload: Data) -> Result<Oneshot<Result<Data>>> {
        if self.broken.get() {
            return Err(gone());
        }
        let cookie = self.next.get();
        self.next.set(cookie + 1);
        let (done, answer) = oneshot();
        let expected = if cmd == Cmd::Read { Answer::Read(at) } else { Answer::Plain };
        let read = (cmd == Cmd::Read).then(|| ReadAssembly::new(at));
        self.table.0.borrow_mut().insert(cookie, Waiting { answer: expected, read, error: None, done });
        let mut out = Outbox::new();
        encode_request(&mut out, self.agreed.mode, cmd, flags, cookie, at, payload);
        self.out.push(out.take());
        Ok(answer)
    }

    fn plain(&self, cmd: Cmd, flags: u16, at: Span, payload: Data) -> Io<'_> {
        Box::pin(async move {
            let answer = self.ask(cmd, flags, at, payload)?;
            answer.await.unwrap_or_else(|| Err(gone())).map(drop)
        })
    }
}

impl Drop for NbdDisk {
    fn drop(&mut self) {
        self.tasks.iter().for_each(TaskHandle::cancel);
        self.stream.shutdown();
    }
}

fn gone() -> BlockError {
    BlockError::new(ErrorKind::Disconnected, "the NBD connection is gone")
}

async fn receive(
    stream: &dyn Stream,
    parser: &mut ReplyParser,
    inbox: &mut Inbox,
    table: &Table,
) -> Result<()> {
    loop {
        while let Some(reply) = parser.next(inbox, table)? {
            take(table, reply)?;
        }
        let piece = stream.recv(RECEIVE).await?;
        if piece.is_empty() {
            return Ok(());
        }
        inbox.push(piece, COPY_BELOW);
    }
}

fn take(table: &Table, reply: Reply) -> Result<()> {
    let (cookie, last, error) = match reply {
        Reply::Data { cookie, offset, data, last } => {
            with_read(table, cookie, |r| r.data(offset, data))?;
            (cookie, last, None)
        }
        Reply::Hole { cookie, hole, last } => {
            with_read(table, cookie, |r| r.hole(hole))?;
            (cookie, last, None)
        }
        Reply::Status { cookie, last, .. } => (cookie, last, None),
        Reply::Error { cookie, error, last } => (cookie, last, Some(error)),
        Reply::Done { cookie } => (cookie, true, None),
    };
    let mut t = table.0.borrow_mut();
    if let Some(w) = t.get_mut(&cookie) {
        w.error = w.error.take().or(error);
    }
    if !last {
        return Ok(());
    }
    let Some(w) = t.remove(&cookie) else { return Ok(()) };
    drop(t);
    let result = match (w.error, w.read) {
        (Some(e), _) => Err(e),
        (None, Some(read)) => Ok(read.finish()?),
        (None, None) => Ok(Data::empty()),
    };
    w.done.send(result);
    Ok(())
}

fn with_read(table: &Table, cookie: u64, f: impl FnOnce(&mut ReadAssembly) -> Result<()>) -> Result<()> {
    match table.0.borrow_mut().get_mut(&cookie).and_then(|w| w.read.as_mut()) {
        Some(read) => f(read),
        None => Err(BlockError::corrupt("data for a request that is no read")),
    }
}

impl Disk for NbdDisk {
    fn sectors(&self) -> u64 {
        self.agreed.size / block::SECTOR
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move {
            let answer = self.ask(Cmd::Read, 0, at, Data::empty())?;
            answer.await.unwrap_or_else(|| Err(gone()))
        })
    }

    fn write(&self, offset: u64, data: Data, fua: bool) -> Io<'_> {
        let at = Span::new(offset, data.len() as u64);
        self.plain(Cmd::Write, if fua { cmd_flag::FUA } else { 0 }, at, data)
    }

    fn zero(&self, at: Span, may_unmap: bool) -> Io<'_> {
        self.plain(Cmd::WriteZeroes, if may_unmap { 0 } else { cmd_flag::NO_HOLE }, at, Data::empty())
    }

    fn discard(&self, at: Span) -> Io<'_> {
        self.plain(Cmd::Trim, 0, at, Data::empty())
    }

    fn flush(&self) -> Io<'_> {
        self.plain(Cmd::Flush, 0, Span::default(), Data::empty())
    }
}
