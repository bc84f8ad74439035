//! The `nbd` driver against servers that lie, stop in the middle, come back as something else, or carry out late.

#![allow(clippy::unwrap_used)]

use block::{BlockError, Data, Kind, ReqFlags, Span};
use bytes::Bytes;
use drivers::nbd_client::{NbdClient, NbdOptions};
use env::{Address, Env};
use graph::Node;
use nbd::proto::{Cmd, STRUCTURED_REPLY_MAGIC, flag};
use nbd::{
    Catalog, ExportFacts, HandshakeStep, Inbox, Mode, Outbox, ReplyWriter, Request, RequestParser,
    ServerHandshake, StatusExtent,
};
use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

const SIZE: u64 = 1 << 20;

#[derive(Clone)]
struct Shop {
    facts: ExportFacts,
    best: Mode,
}
impl Catalog for Shop {
    fn facts(&self, _: &str) -> Option<ExportFacts> {
        Some(self.facts.clone())
    }
    fn list(&self, _: &mut dyn FnMut(&str, &str)) {}
}

fn facts() -> ExportFacts {
    ExportFacts {
        size: SIZE,
        flags: 0x1ded & !flag::CAN_MULTI_CONN,
        description: String::new(),
        block_sizes: (1, 4096, 32 << 20),
        contexts: vec!["base:allocation".into()],
    }
}

/// What a server does with a request: bytes to send, and whether to hang up after.
type Evil = dyn Fn(u32, &Request, Mode) -> (Vec<u8>, bool) + Send + Sync;

/// A server whose sins are scripted; a thread for each connection.
struct Liar {
    path: PathBuf,
    connections: Arc<AtomicU32>,
    stop: Arc<AtomicBool>,
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = UnixStream::connect(&self.path);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Sends at most `left` more bytes in all, then fails.
struct Limited {
    socket: UnixStream,
    left: u64,
}
impl Limited {
    fn send(&mut self, bytes: &[u8]) -> Option<()> {
        let n = self.left.min(bytes.len() as u64) as usize;
        self.left -= n as u64;
        self.socket.write_all(&bytes[..n]).ok()?;
        (n == bytes.len()).then_some(())
    }
}

fn good(r: &Request, mode: Mode) -> Vec<u8> {
    let (w, mut o) = (ReplyWriter::new(mode), Outbox::new());
    match Cmd::from_wire(r.command) {
        Some(Cmd::Read) => {
            let data: Vec<u8> = (r.offset..r.offset + r.len).map(|i| (i % 251) as u8).collect();
            w.read(&mut o, r.cookie, r.offset, data.into(), false);
        }
        Some(Cmd::BlockStatus) => {
            let half = r.len / 2;
            let list = [StatusExtent { len: half, flags: 0 }, StatusExtent { len: r.len - half, flags: 3 }];
            w.status(&mut o, r.cookie, r.offset, &[(0, list.to_vec())]);
        }
        _ => w.ok(&mut o, r.cookie, r.offset),
    }
    o.take().to_vec()
}

fn serve(socket: UnixStream, number: u32, shop: &Shop, evil: &Evil, limit: u64) -> Option<()> {
    let mut to = Limited { socket: socket.try_clone().ok()?, left: limit };
    let mut from = socket;
    let (mut hand, mut inbox, mut out) = (ServerHandshake::new(), Inbox::new(), Outbox::new());
    ServerHandshake::greeting(&mut out);
    let mut buffer = [0; 65536];
    let agreed = loop {
        let refuse =
            |inbox: &mut Inbox| inbox.peek::<12>().is_some_and(|b| b[..8] == *b"IHAVEOPT" && b[11] == 11);
        if shop.best < Mode::Extended && refuse(&mut inbox) {
            inbox.skip(16);
            let head = [
                &0x0003_e889_0455_65a9_u64.to_be_bytes()[..],
                &11u32.to_be_bytes(),
                &0x8000_0001u32.to_be_bytes(),
                &[0; 4],
            ];
            out.put(&head.concat());
        }
        let step = hand.step(&mut inbox, &mut out, shop).ok()?;
        to.send(&out.take().to_vec())?;
        match step {
            HandshakeStep::NeedBytes => {
                let n = from.read(&mut buffer).ok().filter(|n| *n > 0)?;
                inbox.push(Bytes::copy_from_slice(&buffer[..n]), usize::MAX);
            }
            HandshakeStep::Handled => {}
            HandshakeStep::Enter(a) => break a,
            HandshakeStep::Ended | HandshakeStep::StartTls => return None,
        }
    };
    let mut parser = RequestParser::new(agreed.mode);
    loop {
        while let Some(r) = parser.next(&mut inbox).ok()? {
            if r.command == Cmd::Disconnect as u16 {
                return None;
            }
            let (bytes, hang_up) = evil(number, &r, agreed.mode);
            to.send(&bytes)?;
            if hang_up {
                return None;
            }
        }
        let n = from.read(&mut buffer).ok().filter(|n| *n > 0)?;
        inbox.push(Bytes::copy_from_slice(&buffer[..n]), usize::MAX);
    }
}

fn liar(shop: impl Fn(u32) -> Shop + Send + 'static, evil: Box<Evil>, limit: Arc<AtomicU64>) -> Liar {
    static N: AtomicU32 = AtomicU32::new(0);
    let name = format!("liveblk-liar-{}-{}", std::process::id(), N.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let (connections, stop) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
    let (count, end, evil) = (connections.clone(), stop.clone(), Arc::new(evil));
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            if end.load(Ordering::Relaxed) {
                break;
            }
            let number = count.fetch_add(1, Ordering::Relaxed);
            let (shop, evil, limit) = (shop(number), evil.clone(), limit.load(Ordering::Relaxed));
            std::thread::spawn(move || serve(socket, number, &shop, &**evil, limit));
        }
    });
    Liar { path, connections, stop }
}

fn unlimited() -> Arc<AtomicU64> {
    Arc::new(AtomicU64::new(u64::MAX))
}

fn structured(_: u32) -> Shop {
    Shop { facts: facts(), best: Mode::Structured }
}

fn with<T: 'static, F: Future<Output = T> + 'static>(f: impl FnOnce(Env) -> F) -> T {
    let e = env::os::start(env::os::OsConfig::default());
    let env = e.env();
    let limit = env.clone();
    let work = Box::pin(f(env));
    e.run(async move { limit.timeout(Duration::from_secs(60), work).await.expect("hangs") })
}

fn at(path: &std::path::Path) -> NbdOptions {
    NbdOptions::new(Address::Unix(path.to_owned()), "d")
}

fn chunk(kind: u16, flags: u16, cookie: u64, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let mut v = STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
    v.extend(flags.to_be_bytes());
    v.extend(kind.to_be_bytes());
    v.extend(cookie.to_be_bytes());
    v.extend((body.len() as u32).to_be_bytes());
    v.extend(body);
    v
}

fn be(n: u64) -> [u8; 8] {
    n.to_be_bytes()
}

/// What the message must contain, the request that is answered so on the first connection, and how.
type Crime = (&'static str, Cmd, fn(&Request) -> Vec<u8>);

fn crimes() -> Vec<Crime> {
    use Cmd::{BlockStatus, Read, Write};
    let ext: fn(&Request) -> Vec<u8> = |r| good(r, Mode::Extended);
    vec![
        ("not in flight", Read, |r| chunk(1, 1, r.cookie ^ 1, &[&be(r.offset), &[0; 512]])),
        ("not in flight", Read, |r| chunk(1, 1, r.cookie ^ (1 << 40), &[&be(r.offset), &[0; 512]])),
        ("starts with", Read, |_| vec![0xaa; 64]),
        ("starts with", Read, ext),
        ("simple reply to a read", Read, |r| good(r, Mode::Simple)),
        ("data at", Read, |r| chunk(1, 1, r.cookie, &[&be(r.offset + 1), &vec![0; r.len as usize]])),
        ("type 0x1,", Read, |r| chunk(1, 1, r.cookie, &[&be(r.offset), &vec![0; r.len as usize + 1]])),
        ("type 0x1,", Read, |r| chunk(1, 1, r.cookie, &[&be(r.offset)])),
        ("sent 512 bytes for", Read, |r| chunk(1, 1, r.cookie, &[&be(r.offset), &[0; 512]])),
        ("twice", Read, |r| {
            let c = |f| chunk(1, f, r.cookie, &[&be(r.offset), &[0; 512]]);
            [c(0), c(1)].concat()
        }),
        ("sent 0 bytes for", Read, |r| chunk(0, 1, r.cookie, &[])),
        ("type 0x0,", Read, |r| chunk(0, 0, r.cookie, &[])),
        ("type 0x3,", Read, |r| chunk(3, 1, r.cookie, &[&[0; 8]])),
        ("a hole at", Read, |r| chunk(2, 1, r.cookie, &[&be(r.offset), &[0; 4]])),
        ("a hole at", Read, |r| chunk(2, 1, r.cookie, &[&be(r.offset), &[0xff; 4]])),
        ("a hole at", Read, |r| chunk(2, 1, r.cookie, &[&be(u64::MAX), &[0, 0, 2, 0]])),
        ("type 0x2,", Read, |r| chunk(2, 1, r.cookie, &[&be(r.offset), &[0, 0, 2, 0, 0]])),
        ("type 0x5,", Read, |r| chunk(5, 1, r.cookie, &[&[0; 12]])),
        ("too many pieces", Read, |r| {
            (0..100).flat_map(|i| chunk(1, 0, r.cookie, &[&be(r.offset + i), &[0]])).collect()
        }),
        ("without an error", Read, |r| chunk(0x8001, 1, r.cookie, &[&[0; 6]])),
        ("inside a field", Read, |r| chunk(0x8001, 1, r.cookie, &[&[0, 0, 0, 5, 0xff, 0xff]])),
        ("type 0x8001,", Read, |r| chunk(0x8001, 1, r.cookie, &[&[1; 5000]])),
        ("type 0x1,", Write, |r| chunk(1, 1, r.cookie, &[&be(r.offset), &[0; 512]])),
        ("type 0x5,", Write, |r| chunk(5, 1, r.cookie, &[&[0; 12]])),
        ("not in flight", Write, |r| [good(r, Mode::Structured), good(r, Mode::Structured)].concat()),
        ("simple reply to a block status", BlockStatus, |r| {
            good(&Request { command: 3, ..r.clone() }, Mode::Simple)
        }),
        ("length 0", BlockStatus, |r| chunk(5, 1, r.cookie, &[&[0; 12]])),
        ("past the end", BlockStatus, |r| {
            chunk(5, 1, r.cookie, &[&[0; 4], &[0x7f, 0, 0, 0, 0, 0, 0, 0], &[0, 0, 0, 1, 0, 0, 0, 0]])
        }),
        ("out of turn", BlockStatus, |r| chunk(5, 1, r.cookie, &[&[0, 0, 0, 9], &[0, 0, 2, 0, 0, 0, 0, 0]])),
        ("out of turn", BlockStatus, |r| {
            let c = |f| chunk(5, f, r.cookie, &[&[0; 4], &[0, 0, 2, 0, 0, 0, 0, 0]]);
            [c(0), c(1)].concat()
        }),
        ("no extents", BlockStatus, |r| chunk(0, 1, r.cookie, &[])),
        ("type 0x6,", BlockStatus, |r| chunk(6, 1, r.cookie, &[&[0; 24]])),
        ("type 0x5,", BlockStatus, |r| chunk(5, 1, r.cookie, &[&[0; 15]])),
    ]
}

async fn ask(c: &NbdClient, cmd: Cmd) -> block::Result<()> {
    let span = Span::new(4096, 4096);
    match cmd {
        Cmd::Read => {
            let got = c.read(span).await?.to_vec();
            assert!(got.iter().zip(4096u64..).all(|(b, i)| *b == (i % 251) as u8), "wrong bytes");
        }
        Cmd::Write => c.write(span, Data::zeroes(4096), ReqFlags::NONE).await?,
        _ => {
            let kinds: Vec<_> = c.extents(span).await?.into_iter().map(|e| (e.kind, e.span.len)).collect();
            assert_eq!(kinds, [(Kind::Data, 2048), (Kind::Zero, 2048)]);
        }
    }
    Ok(())
}

#[test]
fn each_crime_is_an_error_that_names_it_and_the_next_connection_works() {
    for (what, cmd, crime) in crimes() {
        let evil = move |number: u32, r: &Request, mode: Mode| {
            let guilty = number == 0 && r.command == cmd as u16;
            (if guilty { crime(r) } else { good(r, mode) }, false)
        };
        let server = liar(structured, Box::new(evil), unlimited());
        let path = server.path.clone();
        with(move |env| async move {
            let c = NbdClient::open(&env, at(&path)).await.unwrap();
            let begin = env.now();
            // the reply may be followed by one too many: then it is the next request that fails
            let first = ask(&c, cmd).await;
            let e = match first {
                Err(e) => e,
                Ok(()) => ask(&c, Cmd::Read).await.expect_err(what),
            };
            assert!(e.message().contains(what), "{what}: {e}");
            assert!(env.now() - begin < Duration::from_secs(1));
            let end = env.now() + Duration::from_secs(5);
            // some crimes leave the connection usable: then the crime goes on, and that is all right
            while let Err(e) = ask(&c, Cmd::Read).await {
                assert!(env.now() < end, "{what}: never again: {e}");
                if e.message().contains(what) && cmd == Cmd::Read {
                    break;
                }
                env.sleep(Duration::from_millis(5)).await;
            }
            c.close().await.unwrap();
        });
    }
}

#[test]
fn a_broken_protocol_is_not_waited_out() {
    let evil = |_: u32, r: &Request, _: Mode| (chunk(3, 1, r.cookie, &[]), false);
    let server = liar(structured, Box::new(evil), unlimited());
    let path = server.path.clone();
    with(move |env| async move {
        let mut o = at(&path);
        o.reconnect_delay = 30;
        let c = NbdClient::open(&env, o).await.unwrap();
        let begin = env.now();
        assert!(ask(&c, Cmd::Read).await.unwrap_err().message().contains("type 0x3,"));
        assert!(env.now() - begin < Duration::from_secs(1));
    });
}

#[test]
fn a_session_cut_at_every_byte_is_an_error_or_right() {
    for best in [Mode::Structured, Mode::Extended] {
        let limit = unlimited();
        let server = liar(
            move |_| Shop { facts: facts(), best },
            Box::new(|_, r, mode| (good(r, mode), false)),
            limit.clone(),
        );
        let path = server.path.clone();
        with(move |env| async move {
            let succeeded = Cell::new(0);
            let total = if best == Mode::Structured { 4600u64 } else { 4700 };
            // the payload of the read is not cut at each of its bytes
            let cuts = (0..420).chain((420..total).step_by(37)).chain(total - 120..total + 200);
            for cut in cuts {
                limit.store(cut, Ordering::Relaxed);
                let Ok(c) = NbdClient::open(&env, at(&path)).await else { continue };
                for cmd in [Cmd::Write, Cmd::Read, Cmd::BlockStatus] {
                    match ask(&c, cmd).await {
                        Ok(()) => succeeded.set(succeeded.get() + 1),
                        Err(e) => assert_eq!(e.errno(), BlockError::EIO, "{e}"),
                    }
                }
            }
            assert!(succeeded.get() > 3, "the last cuts are behind the end");
        });
    }
}

#[test]
fn a_server_that_comes_back_with_another_disk_is_refused() {
    let changes: [fn(&mut ExportFacts); 4] = [
        |f| f.size *= 2,
        |f| f.flags |= flag::READ_ONLY,
        |f| f.flags &= !flag::SEND_FLUSH,
        |f| f.block_sizes.0 = 4096,
    ];
    for change in changes {
        let shop = move |number: u32| {
            let mut s = structured(number);
            if number > 0 {
                change(&mut s.facts);
            }
            s
        };
        let server = liar(shop, Box::new(|n, r, mode| (good(r, mode), n == 0)), unlimited());
        let (path, connections) = (server.path.clone(), server.connections.clone());
        with(move |env| async move {
            let mut o = at(&path);
            o.reconnect_delay = 1;
            let c = NbdClient::open(&env, o).await.unwrap();
            ask(&c, Cmd::Read).await.unwrap();
            let e = ask(&c, Cmd::Write).await.unwrap_err();
            assert_eq!(e.errno(), BlockError::EIO);
            let tried = connections.load(Ordering::Relaxed);
            assert!((2..12).contains(&tried), "{tried} connections in one second");
        });
    }
}

#[test]
fn a_server_that_always_hangs_up_ends_the_request_in_time() {
    let server = liar(structured, Box::new(|_, _, _| (Vec::new(), true)), unlimited());
    let (path, connections) = (server.path.clone(), server.connections.clone());
    with(move |env| async move {
        let mut o = at(&path);
        o.reconnect_delay = 1;
        let c = NbdClient::open(&env, o).await.unwrap();
        let begin = env.now();
        assert_eq!(ask(&c, Cmd::Read).await.unwrap_err().errno(), BlockError::EIO);
        let took = env.now() - begin;
        assert!(took > Duration::from_millis(900) && took < Duration::from_millis(2000), "{took:?}");
        assert!(connections.load(Ordering::Relaxed) < 20, "no storm of connections");
    });
}

#[test]
fn requests_that_the_server_lacks_are_done_another_way() {
    let seen: Arc<std::sync::Mutex<Vec<(u16, u16, u64)>>> = Arc::default();
    let log = seen.clone();
    let shop = |_| {
        let mut f = facts();
        f.flags = flag::HAS_FLAGS | flag::SEND_FLUSH;
        Shop { facts: f, best: Mode::Simple }
    };
    let evil = move |_: u32, r: &Request, mode: Mode| {
        log.lock().unwrap().push((r.command, r.flags, r.len));
        (good(r, mode), false)
    };
    let server = liar(shop, Box::new(evil), unlimited());
    let path = server.path.clone();
    with(move |env| async move {
        let c: Rc<NbdClient> = NbdClient::open(&env, at(&path)).await.unwrap();
        let span = Span::new(0, 4096);
        c.write(span, Data::zeroes(4096), ReqFlags { fua: true, ..ReqFlags::NONE }).await.unwrap();
        c.zero(span, ReqFlags { may_unmap: true, ..ReqFlags::NONE }).await.unwrap();
        c.discard(span).await.unwrap();
        let e = c.zero(span, ReqFlags { no_fallback: true, ..ReqFlags::NONE }).await.unwrap_err();
        assert_eq!(e.errno(), BlockError::ENOTSUP);
        assert!(!c.limits().efficient_zero);
        c.flush().await.unwrap();
    });
    let (w, f) = (Cmd::Write as u16, Cmd::Flush as u16);
    assert_eq!(*seen.lock().unwrap(), [(w, 0, 4096), (f, 0, 0), (w, 0, 4096), (f, 0, 0)]);
}

/// A read that has not come by then waits behind the changes on their own connection.
const ALONE: Duration = Duration::from_secs(1);

/// A server whose first changes are slow: they are carried out when somebody reads.
#[derive(Default)]
struct Slow {
    state: Mutex<Late>,
    changed: Condvar,
}

#[derive(Default)]
struct Late {
    disk: Vec<u8>,
    taken: usize,
    held: Vec<Request>,
    read: bool,
    /// There was no other connection to read on: the client had not got it yet.
    alone: bool,
}

impl Late {
    fn carry_out(&mut self, r: &Request) {
        let bytes = if r.command == Cmd::Write as u16 { r.payload.to_vec() } else { vec![0; r.len as usize] };
        self.disk[r.offset as usize..][..bytes.len()].copy_from_slice(&bytes);
    }

    /// Carries out and answers all that is held back.
    fn land(&mut self, mode: Mode) -> Vec<u8> {
        let held = std::mem::take(&mut self.held);
        held.iter().flat_map(|r| (self.carry_out(r), good(r, mode)).1).collect()
    }
}

impl Slow {
    /// The first `hold` changes wait for a read; with `other` for one on another connection, after which it is they that
    /// come first.
    fn evil(self: &Arc<Slow>, hold: usize, other: bool) -> Box<Evil> {
        let me = self.clone();
        me.state.lock().unwrap().disk = vec![9; SIZE as usize];
        Box::new(move |_, r, mode| {
            let mut now = me.state.lock().unwrap();
            if !Cmd::from_wire(r.command).is_some_and(Cmd::changes) {
                now.read = true;
                me.changed.notify_all();
                let mut out = if other { Vec::new() } else { now.land(mode) };
                let now = me.changed.wait_while(now, |now| !now.held.is_empty()).unwrap();
                let mut o = Outbox::new();
                let data = now.disk[r.offset as usize..][..r.len as usize].to_vec();
                ReplyWriter::new(mode).read(&mut o, r.cookie, r.offset, data.into(), false);
                out.extend(o.take().to_vec());
                return (out, false);
            }
            now.taken += 1;
            if now.taken > hold {
                now.carry_out(r);
                return (good(r, mode), false);
            }
            now.held.push(r.clone());
            if !other || now.taken < hold {
                return (Vec::new(), false);
            }
            let (mut now, waited) = me.changed.wait_timeout_while(now, ALONE, |now| !now.read).unwrap();
            now.alone = waited.timed_out();
            let out = now.land(mode);
            me.changed.notify_all();
            (out, false)
        })
    }

    async fn holds(&self, env: &Env, count: usize) {
        while self.state.lock().unwrap().held.len() < count {
            env.sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Runs `doing` until the server holds `count` changes back, then calls it off.
async fn call_off(env: &Env, slow: &Slow, count: usize, doing: impl Future<Output = block::Result<()>>) {
    assert!(
        env::sync::race(doing, slow.holds(env, count)).await.is_none(),
        "the server did not hold it back"
    );
}

/// Writes while somebody reads; what is on the disk then.
async fn write_and_see(env: &Env, c: &Rc<NbdClient>, at: Span, byte: u8) -> u8 {
    let (writer, data) = (c.clone(), vec![byte; at.len as usize]);
    let write = env.spawn("write", async move {
        writer.write(at, Data::from(data), ReqFlags::NONE).await.unwrap();
    });
    env.yield_now().await;
    c.read(at).await.unwrap();
    write.join().await;
    let now = c.read(at).await.unwrap().to_vec();
    assert!(now.iter().all(|b| *b == now[0]));
    now[0]
}

#[test]
fn what_was_called_off_does_not_land_over_what_came_later() {
    let span = Span::new(4096, 4096);
    for cmd in [Cmd::Write, Cmd::WriteZeroes, Cmd::Trim] {
        let slow = Arc::new(Slow::default());
        let server = liar(structured, slow.evil(1, false), unlimited());
        let path = server.path.clone();
        with(move |env| async move {
            let c = NbdClient::open(&env, at(&path)).await.unwrap();
            let first = match cmd {
                Cmd::Write => c.write(span, Data::from(vec![1; 4096]), ReqFlags::NONE),
                Cmd::WriteZeroes => c.zero(span, ReqFlags::NONE),
                _ => c.discard(span),
            };
            call_off(&env, &slow, 1, first).await;
            assert_eq!(write_and_see(&env, &c, span, 2).await, 2, "{cmd:?}");
            c.close().await.unwrap();
        });
    }
}

#[test]
fn nor_on_another_connection() {
    // so many that the next request takes another connection
    const MANY: usize = 16;
    let span = Span::new(4096, 4096);
    let shop = |number| {
        let mut s = structured(number);
        s.facts.flags |= flag::CAN_MULTI_CONN;
        s
    };
    // where the other connection was not there in time the server tells, and it is tried again
    let tried = (0..20).any(|_| {
        let slow = Arc::new(Slow::default());
        let server = liar(shop, slow.evil(MANY, true), unlimited());
        let (path, connections, seen) = (server.path.clone(), server.connections.clone(), slow.clone());
        with(move |env| async move {
            let c = NbdClient::open(&env, NbdOptions { connections: 2, ..at(&path) }).await.unwrap();
            while connections.load(Ordering::Relaxed) < 2 {
                env.sleep(Duration::from_millis(1)).await;
            }
            let writes = (0..MANY).map(|_| c.write(span, Data::from(vec![1; 4096]), ReqFlags::NONE));
            let all = async {
                futures_util::future::join_all(writes)
                    .await
                    .into_iter()
                    .collect::<block::Result<Vec<()>>>()
                    .map(drop)
            };
            call_off(&env, &slow, MANY, all).await;
            assert_eq!(write_and_see(&env, &c, span, 2).await, 2);
            c.close().await.unwrap();
        });
        !seen.state.lock().unwrap().alone
    });
    assert!(tried, "never a second connection in time");
}

#[test]
fn a_disk_is_given_up_when_what_was_called_off_has_landed() {
    let span = Span::new(4096, 4096);
    for how in ["close", "read-only", "inactive"] {
        let slow = Arc::new(Slow::default());
        let server = liar(structured, slow.evil(1, false), unlimited());
        let path = server.path.clone();
        with(move |env| async move {
            let c = NbdClient::open(&env, at(&path)).await.unwrap();
            call_off(&env, &slow, 1, c.write(span, Data::from(vec![1; 4096]), ReqFlags::NONE)).await;
            let (giving, seen) = (c.clone(), slow.clone());
            let given = env.spawn("give up", async move {
                match how {
                    "close" => giving.close().await.unwrap(),
                    "read-only" => giving.set_writable(false).await.unwrap(),
                    _ => giving.set_active(false).await.unwrap(),
                }
                assert_eq!(seen.state.lock().unwrap().disk[4096], 1, "{how}");
            });
            env.yield_now().await;
            c.read(span).await.unwrap();
            given.join().await;
        });
    }
}

#[test]
fn a_lost_link_keeps_nobody_waiting_for_what_was_called_off() {
    let span = Span::new(4096, 4096);
    let slow = Arc::new(Slow::default());
    let hold = slow.evil(1, false);
    let evil = move |n: u32, r: &Request, mode: Mode| {
        let (bytes, _) = hold(n, r, mode);
        (if n == 0 { Vec::new() } else { bytes }, n == 0 && r.command == Cmd::Read as u16)
    };
    let server = liar(structured, Box::new(evil), unlimited());
    let path = server.path.clone();
    with(move |env| async move {
        let c = NbdClient::open(&env, NbdOptions { reconnect_delay: 30, ..at(&path) }).await.unwrap();
        call_off(&env, &slow, 1, c.write(span, Data::from(vec![1; 4096]), ReqFlags::NONE)).await;
        assert_eq!(write_and_see(&env, &c, span, 2).await, 2);
        c.close().await.unwrap();
    });
}
