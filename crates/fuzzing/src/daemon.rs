//! The whole daemon in the simulated world, and somebody who talks to it: a monitor's bytes, an NBD client's, an NBD server's.
//!
//! What must stay true, whatever is said: everything that was asked on a monitor is answered; others are served as before; the daemon
//! ends in order and gives everything back.

use crate::nbd::{NAME, Shop};
use crate::{choice, judge};
use ::nbd::proto::{OPTION_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, flag, rep};
use ::nbd::{
    ClientHandshake, ClientStep, ClientWants, ExportFacts, HandshakeStep, Inbox, Mode, Outbox, ReplyWriter,
    RequestParser, ServerHandshake,
};
use block::{Data, SECTOR, Span};
use env::{Address, Env, Stream};
use qapi::json::Parser;
use serde_json::{Value, json};
use sim::{Booted, Disk, History, Image, Manager, NbdDisk, Refusal, World, stamped};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// Bytes of the disks: few, since every input makes them anew.
pub(crate) const LEN: u64 = 256 << 10;
/// A server that says nothing hangs up when its client has waited for so long.
const SILENCE: Duration = Duration::from_secs(20);
/// Everything that was asked is answered within this, in virtual time.
const PATIENCE: Duration = Duration::from_secs(600);
/// When nothing came for so long, nothing comes any more.
const QUIET: Duration = Duration::from_secs(1);
/// Bytes received at once.
const RECEIVE: usize = 65536;
/// Where servers listen that are not ours.
const FAR: &str = "/far";

thread_local! {
    static EMPTY: RefCell<BTreeMap<Option<String>, Image>> = const { RefCell::new(BTreeMap::new()) };
}

/// A new qcow2 image.
pub(crate) fn empty_qcow2(backing: Option<&str>) -> Image {
    EMPTY.with_borrow_mut(|known| {
        known.entry(backing.map(str::to_owned)).or_insert_with(|| make_empty_qcow2(backing)).clone()
    })
}

fn make_empty_qcow2(backing: Option<&str>) -> Image {
    let options = qcow2::create::Options {
        cluster_size: 4096,
        backing_file: backing.map(str::to_owned),
        backing_fmt: backing.map(|_| "qcow2".to_owned()),
        ..qcow2::create::Options::new(LEN)
    };
    let memory = qcow2::storage::Memory::default();
    let made = qcow2::storage::now(qcow2::create::create(&memory, None::<&qcow2::storage::Memory>, &options));
    assert!(made.is_ok(), "an empty image: {made:?}");
    Image::from_bytes(&memory.into_bytes())
}

/// A raw disk whose sectors hold the stamp of that number.
pub(crate) fn stamped_disk(number: u32) -> Image {
    Image::from_bytes(&stamped(number, 0, LEN / SECTOR).to_vec())
}

/// What a target does with a daemon and a manager, which is negotiated.
async fn with_daemon(w: World, body: impl AsyncFnOnce(&World, &Env, Rc<Manager>) -> Result<(), Refusal>) {
    w.host().install("/a.raw", stamped_disk(7));
    w.host().install("/q.qcow2", empty_qcow2(None));
    let Some(daemon) = Booted::start(&w).await else { return };
    let (outside, _process) = w.start();
    let scene = async {
        let m = daemon.manage(&w, &outside, &Rc::new(History::new())).await?;
        body(&w, &outside, m).await
    };
    if let Some(Err(e)) = w.within(&outside, PATIENCE, "it all", scene).await {
        w.verdict().violation(format!("{e}"));
    }
    daemon.quit(&w, &outside).await;
    Booted::all_have_quit(&w);
}

/// Lines received on a monitor.
struct Heard {
    text: Vec<u8>,
    replies: usize,
}

impl Heard {
    /// Receives until there were `wanted` replies, or nothing came for a while, or the peer is gone.
    async fn listen(&mut self, w: &World, env: &Env, stream: &dyn Stream, wanted: usize) -> bool {
        while self.replies < wanted {
            let piece = match env.timeout(PATIENCE, stream.recv(RECEIVE)).await {
                Some(Ok(piece)) if !piece.is_empty() => piece,
                _ => return false,
            };
            self.text.extend_from_slice(&piece);
            while let Some(end) = self.text.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.text.drain(..=end).collect();
                match serde_json::from_slice::<Value>(&line) {
                    Ok(v) if v.get("return").is_some() || v.get("error").is_some() => self.replies += 1,
                    Ok(v) if v.get("event").is_some() || v.get("QMP").is_some() => {}
                    Ok(v) => w.verdict().violation(format!("a monitor says {v}")),
                    Err(e) => w.verdict().violation(format!("{e}: {}", String::from_utf8_lossy(&line))),
                }
            }
        }
        true
    }
}

/// Any bytes on a monitor.
pub(crate) fn monitor(bytes: &[u8]) {
    let bytes = bytes.to_vec();
    let mut asked = 1;
    Parser::new().feed(&bytes, |_| asked += 1);
    // its name in a string also counts: then less is asked of the daemon
    let ends = bytes.windows(4).any(|w| w == b"quit") || bytes.windows(2).any(|w| w == b"\\u");
    judge(World::play(1, false, |w| async move {
        with_daemon(w, async |w, outside, m| {
            m.must("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "/q.qcow2"}))
                .await?;
            m.must("blockdev-add", json!({"driver": "qcow2", "node-name": "q", "file": "f"})).await?;
            // one at a time is heard
            drop(m);
            let stream = outside.connect(&Booted::monitor_address()).await.map_err(|_| Refusal::Gone)?;
            let _gone_if_it_quit =
                stream.send(Data::from(b"{\"execute\":\"qmp_capabilities\"}\n".to_vec())).await;
            let _gone_if_it_quit = stream.send(Data::from(bytes)).await;
            let mut heard = Heard { text: Vec::new(), replies: 0 };
            let all = heard.listen(w, outside, &*stream, asked).await;
            if !all && !ends {
                w.verdict().violation(format!("{} of {asked} were answered", heard.replies));
            }
            stream.shutdown();
            Ok(())
        })
        .await;
    }));
}

/// What a client of ours says to come to the transmission phase of `export`.
fn introduction(mode: Mode, export: &str) -> Vec<u8> {
    let contexts = vec!["base:allocation".into()];
    let wants = ClientWants { export: export.to_owned(), mode, contexts, tls: false };
    let Ok(mut client) = ClientHandshake::new(wants) else { panic!("a client cannot begin") };
    let (mut server, shop) = (ServerHandshake::new(), far());
    let (mut heard, mut asked, mut says, mut answers) =
        (Inbox::new(), Inbox::new(), Outbox::new(), Outbox::new());
    let mut said = Vec::new();
    ServerHandshake::greeting(&mut answers);
    loop {
        heard.push(answers.take().contiguous(), 0);
        let step = client.step(&mut heard, &mut says);
        let bytes = says.take().contiguous();
        said.extend_from_slice(&bytes);
        match step {
            Ok(ClientStep::NeedBytes) => asked.push(bytes, 0),
            Ok(_) => return said,
            Err(e) => panic!("our own server: {e}"),
        }
        while let Ok(HandshakeStep::Handled) = server.step(&mut asked, &mut answers, &shop) {}
        // the last word is the server's, in the reply to GO
        assert!(!answers.is_empty(), "both wait");
    }
}

/// Any bytes from an NBD client, while another is served.
pub(crate) fn export(bytes: &[u8]) {
    let Some((first, rest)) = choice(bytes) else { return };
    let mut said = match first & 3 {
        0 => Vec::new(),
        n => introduction([Mode::Simple, Mode::Structured, Mode::Extended][n - 1], NAME),
    };
    let cut = [usize::MAX, 1000, 61, 28][first >> 2 & 3];
    said.extend_from_slice(rest);
    judge(World::play(1, false, |w| async move {
        with_daemon(w, async |w, outside, m| {
            let file =
                |name: &str, path: &str| json!({"driver": "file", "node-name": name, "filename": path});
            m.must("blockdev-add", json!({"driver": "raw", "node-name": "a", "file": file("af", "/a.raw")}))
                .await?;
            m.must(
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": "q", "file": file("qf", "/q.qcow2")}),
            )
            .await?;
            m.must("nbd-server-start", json!({"addr": Booted::nbd_address()})).await?;
            for (id, node) in [("e0", "a"), ("e1", "q")] {
                let name = if node == "a" { "witness" } else { NAME };
                let export =
                    json!({"type": "nbd", "id": id, "node-name": node, "name": name, "writable": true});
                m.must("block-export-add", export).await?;
            }
            let Ok(witness) =
                NbdDisk::connect(outside, &Booted::nbd_server(), "witness", Mode::Structured, w.verdict())
                    .await
            else {
                return Err(Refusal::Gone);
            };
            let stream = outside.connect(&Booted::nbd_server()).await.map_err(|_| Refusal::Gone)?;
            for piece in said.chunks(cut) {
                // it may have hung up already
                if stream.send(Data::from(piece.to_vec())).await.is_err() {
                    break;
                }
                while let Some(Ok(got)) =
                    outside.timeout(Duration::from_millis(1), stream.recv(RECEIVE)).await
                {
                    if got.is_empty() {
                        break;
                    }
                }
            }
            while let Some(Ok(got)) = outside.timeout(QUIET, stream.recv(RECEIVE)).await {
                if got.is_empty() {
                    break;
                }
            }
            match witness.read(Span::new(4096, 65536)).await {
                Ok(read) if read.to_vec() == stamped(7, 8, 128).to_vec() => {}
                Ok(_) => w.verdict().violation("another client reads something else"),
                Err(e) => w.verdict().violation(format!("another client: {e}")),
            }
            stream.shutdown();
            witness.disconnect();
            Ok(())
        })
        .await;
    }));
}

/// A disk of [`LEN`] bytes, as a plain server has it.
fn far() -> Shop {
    Shop(ExportFacts {
        size: LEN,
        flags: flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_WRITE_ZEROES
            | flag::SEND_TRIM,
        description: String::new(),
        block_sizes: (1, 4096, 32 << 20),
        contexts: vec!["base:allocation".into()],
    })
}

/// The bytes that decide what a server does, taken one after the other.
struct Moves(std::vec::IntoIter<u8>);

impl Moves {
    fn next(&mut self) -> u8 {
        self.0.next().unwrap_or(0)
    }
    fn take(&mut self, n: usize) -> Vec<u8> {
        self.0.by_ref().take(n).collect()
    }
}

/// A server that does to each message of its client as `moves` say: what is right, an error, any bytes, silence, the end.
async fn misbehave(env: &Env, stream: Rc<dyn Stream>, mut moves: Moves) {
    let (mut hand, mut inbox, mut out) = (ServerHandshake::new(), Inbox::new(), Outbox::new());
    ServerHandshake::greeting(&mut out);
    let shop = far();
    let mut phase: Option<(RequestParser, ReplyWriter, Mode)> = None;
    loop {
        if !out.is_empty() && stream.send(out.take()).await.is_err() {
            return;
        }
        let idle = match &mut phase {
            None => match hand.step(&mut inbox, &mut out, &shop) {
                Ok(HandshakeStep::NeedBytes) => true,
                Ok(HandshakeStep::Handled) => {
                    match moves.next() % 8 {
                        6 => {
                            out.take();
                            let n = moves.next();
                            out.put(&moves.take(usize::from(n)));
                        }
                        7 => {
                            // a refusal of whatever it was
                            out.take();
                            let kind = rep::ERROR | u32::from(moves.next() % 12);
                            let option = u32::from(moves.next() % 12);
                            out.put(&OPTION_REPLY_MAGIC.to_be_bytes());
                            [option, kind, 0].iter().for_each(|n| out.put(&n.to_be_bytes()));
                        }
                        _ => {}
                    }
                    false
                }
                Ok(HandshakeStep::Enter(agreed)) => {
                    let mode = agreed.mode;
                    phase = Some((RequestParser::new(mode), ReplyWriter::new(mode), mode));
                    false
                }
                Ok(_) | Err(_) => return,
            },
            Some((parser, writer, mode)) => match parser.next(&mut inbox) {
                Err(_) => return,
                Ok(None) => true,
                Ok(Some(r)) => {
                    let cookie = if moves.next() & 7 == 7 { u64::from(moves.next()) } else { r.cookie };
                    match moves.next() % 10 {
                        6 => writer.error(&mut out, cookie, r.offset, u32::from(moves.next()), "no"),
                        7 => {
                            // a chunk, or a simple reply, of any kind
                            let (kind, flags, n) = (moves.next(), moves.next(), moves.next());
                            let body = moves.take(usize::from(n));
                            match mode {
                                Mode::Simple => {
                                    out.put(&SIMPLE_REPLY_MAGIC.to_be_bytes());
                                    out.put(&u32::from(kind).to_be_bytes());
                                    out.put(&cookie.to_be_bytes());
                                }
                                _ => {
                                    out.put(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
                                    out.put(&u16::from(flags).to_be_bytes());
                                    let kind = u16::from(kind & 15) | u16::from(kind & 16) << 11;
                                    out.put(&kind.to_be_bytes());
                                    out.put(&cookie.to_be_bytes());
                                    out.put(&(body.len() as u32).to_be_bytes());
                                }
                            }
                            out.put(&body);
                        }
                        8 => {}
                        9 => return,
                        _ => match ::nbd::Cmd::from_wire(r.command) {
                            Some(::nbd::Cmd::Read) => {
                                let data = Data::zeroes(r.len as usize);
                                writer.read(&mut out, cookie, r.offset, data, true);
                            }
                            Some(::nbd::Cmd::BlockStatus) => {
                                let extent = ::nbd::StatusExtent { len: r.len.max(1), flags: 0 };
                                writer.status(&mut out, cookie, r.offset, &[(0, vec![extent])]);
                            }
                            Some(::nbd::Cmd::Disconnect) => return,
                            _ => writer.ok(&mut out, cookie, r.offset),
                        },
                    }
                    false
                }
            },
        };
        if idle && out.is_empty() {
            match env.timeout(SILENCE, stream.recv(RECEIVE)).await {
                Some(Ok(piece)) if !piece.is_empty() => inbox.push(piece, 64),
                _ => return,
            }
        }
    }
}

/// Any NBD server below a disk: requests fail or succeed, all end.
pub(crate) fn far_server(bytes: &[u8]) {
    let Some((first, rest)) = choice(bytes) else { return };
    let rest = rest.to_vec();
    judge(World::play(1, false, |w| async move {
        with_daemon(w, async |w, outside, m| {
            let at = Address::Unix(PathBuf::from(FAR));
            let listener = outside.listen(&at).await.map_err(|_| Refusal::Gone)?;
            let env = outside.clone();
            let serving = outside.spawn("far", async move {
                let mut moves = Moves(rest.into_iter());
                // connections one after the other: what decides is used up in the order of what comes
                while let Ok(stream) = listener.accept().await {
                    let left = std::mem::replace(&mut moves, Moves(Vec::new().into_iter()));
                    misbehave(&env, stream, left).await;
                }
            });
            let node = json!({
                "driver": "nbd", "node-name": "n", "export": NAME, "server": {"type": "unix", "path": FAR},
                "open-timeout": first & 1, "reconnect-delay": first >> 1 & 3
            });
            let Ok(_) = m.execute("blockdev-add", node).await else {
                serving.cancel();
                return Ok(());
            };
            m.must("nbd-server-start", json!({"addr": Booted::nbd_address()})).await?;
            let export = json!({"type": "nbd", "id": "e", "node-name": "n", "name": "d", "writable": true});
            if m.execute("block-export-add", export).await.is_ok()
                && let Ok(d) =
                    NbdDisk::connect(outside, &Booted::nbd_server(), "d", Mode::Structured, w.verdict()).await
            {
                for n in 0..3u64 {
                    let at = Span::new(n * 65536, 8192);
                    let _may_fail = d.read(at).await;
                    let _may_fail = d.write(at.start, Data::zeroes(4096), false).await;
                    let _may_fail = d.flush().await;
                }
                d.disconnect();
            }
            let disk = json!({"driver": "file", "node-name": "a", "filename": "/a.raw"});
            m.must("blockdev-add", disk).await?;
            let job = json!({"job-id": "j", "device": "a", "target": "n", "sync": "full"});
            if m.execute("blockdev-mirror", job).await.is_ok() {
                let ready = m.wait_job("j", |j| matches!(j.status.as_str(), "ready" | "null"));
                let _still_running = outside.timeout(QUIET * 60, ready).await;
                let _refused_if_over = m.execute("job-cancel", json!({"id": "j"})).await;
                m.wait_job("j", |j| j.status == "null").await?;
            }
            serving.cancel();
            Ok(())
        })
        .await;
    }));
}
