//! An NBD server of somebody else, as a process of a simulated host: it promises what the protocol promises and nothing more.
//!
//! Ours gives changes that overlap the order in which they came; QEMU's and others do not, and neither does this one: each
//! request is a task of its own, and some changes take long. What must stay true: a flush covers what was answered before it
//! came; a request that was taken is carried out, also when its client is gone.

use crate::{Process, Rng, World};
use block::{BlockError, Data, ErrorKind, Result, Span};
use env::sync::Queue;
use env::{Address, Env, File, OpenMode, Punch, Stream};
use nbd::proto::{Cmd, MAX_PAYLOAD, cmd_flag, flag};
use nbd::{
    Agreed, Catalog, ExportFacts, HandshakeStep, Inbox, Outbox, ReplyWriter, Request, RequestParser,
    ServerHandshake, error_to_wire,
};
use serde_json::{Value as Json, json};
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

const AT: &str = "/elsewhere";
/// Bytes taken in one receive.
const RECEIVE: usize = 1 << 16;
/// How many changes take long, and how long at most.
const SLOW: (f64, Duration) = (0.1, Duration::from_millis(150));

/// The server, with one disk.
pub(crate) struct Elsewhere {
    /// Its process.
    pub(crate) process: Process,
    path: String,
}

struct Shop {
    name: String,
    size: u64,
}

impl Catalog for Shop {
    fn facts(&self, name: &str) -> Option<ExportFacts> {
        let able = flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES;
        (name == self.name).then(|| ExportFacts {
            size: self.size,
            flags: flag::HAS_FLAGS | flag::CAN_MULTI_CONN | able,
            block_sizes: (1, 4096, MAX_PAYLOAD as u32),
            ..ExportFacts::default()
        })
    }
    fn list(&self, each: &mut dyn FnMut(&str, &str)) {
        each(&self.name, "");
    }
}

/// What all connections share.
struct Disk {
    env: Env,
    file: Rc<dyn File>,
    shop: Shop,
    rng: RefCell<Rng>,
}

impl Elsewhere {
    /// Serves the file `path` of the world's host, under its name without the slash.
    pub(crate) async fn start(world: &World, path: &str) -> Option<Elsewhere> {
        let (env, process) = world.start();
        let opened = async {
            let mode = OpenMode { write: true, ..OpenMode::default() };
            let file = env.open(Path::new(path), mode).await?;
            let listener = env.listen(&Address::Unix(PathBuf::from(AT))).await?;
            Ok::<_, BlockError>((file, listener))
        };
        let (file, listener) = match opened.await {
            Ok(both) => both,
            Err(e) => {
                world.verdict().violation(format!("the server elsewhere does not start: {e}"));
                return None;
            }
        };
        let shop = Shop { name: path.trim_start_matches('/').to_owned(), size: file.len_hint() };
        let rng = RefCell::new(world.rng("elsewhere"));
        let disk = Rc::new(Disk { env: env.clone(), file, shop, rng });
        env.spawn("elsewhere accepts", async move {
            while let Ok(stream) = listener.accept().await {
                let serving = disk.clone();
                disk.env.spawn("elsewhere serves", async move {
                    // whatever ends a connection, the client notices
                    let _ended = serving.serve(&stream).await;
                    stream.shutdown();
                });
            }
        });
        Some(Elsewhere { process, path: path.to_owned() })
    }

    /// The file with its disk.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Its disk in `blockdev-add`.
    pub(crate) fn disk(&self) -> Json {
        let name = self.path.trim_start_matches('/');
        json!({
            "driver": "nbd", "server": {"type": "unix", "path": AT}, "export": name, "reconnect-delay": 30,
        })
    }

    /// The name by which an image finds its disk.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///{}?socket={AT}", self.path.trim_start_matches('/'))
    }
}

impl Disk {
    async fn serve(self: &Rc<Disk>, stream: &Rc<dyn Stream>) -> Result<()> {
        let mut inbox = Inbox::new();
        let Some(agreed) = self.greet(&**stream, &mut inbox).await? else { return Ok(()) };
        let replies = Rc::new(Queue::<Data>::new());
        let (queue, out) = (replies.clone(), stream.clone());
        self.env.spawn("elsewhere replies", async move {
            while let Some(data) = queue.pop().await {
                if out.send(data).await.is_err() {
                    break;
                }
            }
        });
        let mut parser = RequestParser::new(agreed.mode);
        let ended = loop {
            while let Ok(Some(r)) = parser.next(&mut inbox) {
                if r.command == Cmd::Disconnect as u16 {
                    replies.close();
                    return Ok(());
                }
                let (disk, replies, w) = (self.clone(), replies.clone(), ReplyWriter::new(agreed.mode));
                self.env.spawn("elsewhere works", async move {
                    let mut out = Outbox::new();
                    let done = disk.carry_out(&r).await;
                    match done {
                        Ok(Some(data)) => w.read(&mut out, r.cookie, r.offset, data, false),
                        Ok(None) => w.ok(&mut out, r.cookie, r.offset),
                        Err(e) => w.error(&mut out, r.cookie, r.offset, error_to_wire(&e), e.message()),
                    }
                    replies.push(out.take());
                });
            }
            match stream.recv(RECEIVE).await {
                Ok(piece) if !piece.is_empty() => inbox.push(piece, usize::MAX),
                Ok(_) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        replies.close();
        ended
    }

    async fn greet(&self, stream: &dyn Stream, inbox: &mut Inbox) -> Result<Option<Agreed>> {
        let (mut hand, mut out) = (ServerHandshake::new(), Outbox::new());
        ServerHandshake::greeting(&mut out);
        loop {
            let step = hand.step(inbox, &mut out, &self.shop)?;
            if !out.is_empty() {
                stream.send(out.take()).await?;
            }
            match step {
                HandshakeStep::Enter(agreed) => return Ok(Some(agreed)),
                HandshakeStep::Ended | HandshakeStep::StartTls => return Ok(None),
                HandshakeStep::Handled => {}
                HandshakeStep::NeedBytes => {
                    let piece = stream.recv(RECEIVE).await?;
                    if piece.is_empty() {
                        return Ok(None);
                    }
                    inbox.push(piece, usize::MAX);
                }
            }
        }
    }

    async fn carry_out(&self, r: &Request) -> Result<Option<Data>> {
        let at = Span::new(r.offset, r.len);
        let Some(cmd) = Cmd::from_wire(r.command).filter(|_| r.len <= self.shop.size) else {
            return Err(BlockError::invalid("no such request"));
        };
        if r.offset > self.shop.size - r.len {
            return Err(BlockError::invalid("past the end"));
        }
        let pause = {
            let mut rng = self.rng.borrow_mut();
            let slow = cmd.changes() && rng.chance(SLOW.0);
            slow.then(|| rng.duration(Duration::from_millis(1), SLOW.1))
        };
        if let Some(pause) = pause {
            self.env.sleep(pause).await;
        }
        match cmd {
            Cmd::Read => return self.file.read(at).await.map(Some),
            Cmd::Write => self.file.write(r.offset, r.payload.clone()).await?,
            Cmd::WriteZeroes | Cmd::Trim => {
                let how = if r.flags & cmd_flag::NO_HOLE != 0 { Punch::Keep } else { Punch::Release };
                match self.file.zero(at, how).await {
                    Err(e) if e.kind() == ErrorKind::Unsupported => {
                        self.file.write(r.offset, Data::zeroes(r.len as usize)).await?;
                    }
                    done => done?,
                }
            }
            Cmd::Flush => self.file.barrier().await?,
            Cmd::Disconnect | Cmd::Cache | Cmd::BlockStatus => {
                return Err(BlockError::unsupported("not here"));
            }
        }
        if cmd.changes() && r.flags & cmd_flag::FUA != 0 {
            self.file.barrier().await?;
        }
        Ok(None)
    }
}
