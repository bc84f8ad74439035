//! The server and the registry by themselves: limits, hostile clients, deletion.

#![allow(clippy::unwrap_used)]

mod support;

use block::{Data, ReqFlags, Span};
use env::Address;
use exports::{DeleteMode, ServerOptions};
use nbd::proto::{MAX_PAYLOAD, cmd_flag, opt};
use nbd::{ClientHandshake, ClientWants, Cmd, Inbox, Mode, Negotiated, Outbox, encode_request};
use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::{Dir, HARD, Server, options};

const SIZE: usize = 1 << 20;

fn at(dir: &Dir) -> ServerOptions {
    ServerOptions::at(Address::Unix(dir.path("s")))
}

fn start(dir: &Dir, o: ServerOptions) -> Server {
    dir.image("disk", SIZE, 5);
    Server::start(&dir.path("disk"), o, options("e", "d"))
}

fn connect(dir: &Dir) -> UnixStream {
    let s = UnixStream::connect(dir.path("s")).unwrap();
    s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    s
}

fn greeted(s: &mut UnixStream) -> bool {
    s.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let ok = s.read_exact(&mut [0; 18]).is_ok();
    s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    ok
}

/// Shakes hands; also all bytes that were sent.
fn enter(s: &mut UnixStream, mode: Mode) -> (Negotiated, Vec<u8>) {
    let wants =
        ClientWants { export: "d".into(), mode, contexts: vec!["base:allocation".into()], tls: false };
    let mut hand = ClientHandshake::new(wants).unwrap();
    let (mut inbox, mut out, mut sent) = (Inbox::new(), Outbox::new(), Vec::new());
    let mut buffer = [0; 4096];
    loop {
        let n = s.read(&mut buffer).unwrap();
        assert!(n > 0, "hung up in the handshake");
        inbox.push(bytes::Bytes::copy_from_slice(&buffer[..n]), usize::MAX);
        let done = hand.step(&mut inbox, &mut out).unwrap().entered();
        let bytes = out.take().to_vec();
        s.write_all(&bytes).unwrap();
        sent.extend(bytes);
        if let Some(n) = done {
            return (n, sent);
        }
    }
}

fn request(mode: Mode, cmd: Cmd, cookie: u64, span: Span, payload: Data) -> Vec<u8> {
    flagged(mode, cmd, 0, cookie, span, payload)
}

fn flagged(mode: Mode, cmd: Cmd, flags: u16, cookie: u64, span: Span, payload: Data) -> Vec<u8> {
    let mut o = Outbox::new();
    encode_request(&mut o, mode, cmd, flags, cookie, span, payload);
    o.take().to_vec()
}

fn works(dir: &Dir) {
    let mut s = connect(dir);
    enter(&mut s, Mode::Simple);
    s.write_all(&request(Mode::Simple, Cmd::Read, 9, Span::new(0, 512), Data::empty())).unwrap();
    s.read_exact(&mut [0; 16 + 512]).unwrap();
}

fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn flags_are_those_of_qsd() {
    for (writable, mode, flags) in [
        (true, Mode::Extended, 0x1ded),
        (true, Mode::Structured, 0x0ded),
        (true, Mode::Simple, 0x0d6d),
        (false, Mode::Extended, 0x158f),
    ] {
        let dir = Dir::new();
        dir.image("disk", SIZE, 5);
        let mut o = options("e", "d");
        o.writable = writable;
        let _server = Server::start(&dir.path("disk"), at(&dir), o);
        assert_eq!(enter(&mut connect(&dir), mode).0.flags, flags, "{mode:?}");
    }
    let dir = Dir::new();
    let _server = start(&dir, ServerOptions { max_connections: 1, ..at(&dir) });
    assert_eq!(enter(&mut connect(&dir), Mode::Extended).0.flags, 0x1ded & !0x100, "no multi-conn for one");
}

#[test]
fn clients_beyond_the_limit_wait_for_a_place() {
    let dir = Dir::new();
    let _server = start(&dir, ServerOptions { max_connections: 3, ..at(&dir) });
    let mut inside: Vec<_> = (0..3).map(|_| connect(&dir)).collect();
    assert!(inside.iter_mut().all(greeted));
    let mut fourth = connect(&dir);
    assert!(!greeted(&mut fourth));
    inside.pop();
    fourth.read_exact(&mut [0; 18]).unwrap();
}

#[test]
fn two_hundred_clients_and_as_many_silent_ones() {
    let dir = Dir::new();
    let server = start(&dir, ServerOptions { max_connections: 0, ..at(&dir) });
    let silent: Vec<_> = (0..200).map(|_| connect(&dir)).collect();
    let mut all: Vec<_> = (0..200).map(|_| connect(&dir)).collect();
    for (i, s) in all.iter_mut().enumerate() {
        let mode = [Mode::Simple, Mode::Structured, Mode::Extended][i % 3];
        enter(s, mode);
        s.write_all(&request(
            mode,
            Cmd::Write,
            i as u64,
            Span::new(i as u64 * 512, 512),
            vec![i as u8; 512].into(),
        ))
        .unwrap();
    }
    for (i, s) in all.iter_mut().enumerate() {
        let reply = if i % 3 == 2 { 32 } else { 16 };
        s.read_exact(&mut vec![0; reply]).unwrap();
    }
    assert_eq!(server.call(|s| async move { s.registry.connections() }), 400);
    drop((silent, all));
    eventually("clients that left are forgotten", || {
        server.call(|s| async move { s.registry.connections() }) == 0
    });
    drop(server);
    let disk = std::fs::read(dir.path("disk")).unwrap();
    assert!((0..200).all(|i| disk[i * 512..(i + 1) * 512] == [i as u8; 512]));
}

#[test]
fn who_says_nothing_is_sent_away() {
    let dir = Dir::new();
    let _server = start(&dir, ServerOptions { handshake_max_seconds: 1, ..at(&dir) });
    let begin = Instant::now();
    let mut slow = connect(&dir);
    slow.read_exact(&mut [0; 18]).unwrap();
    slow.write_all(&[0, 0, 0, 3]).unwrap();
    let mut entered = connect(&dir);
    enter(&mut entered, Mode::Simple);
    assert_eq!(slow.read(&mut [0; 1]).unwrap(), 0, "hung up");
    assert!(begin.elapsed() > Duration::from_millis(900));
    // who is inside has no limit
    std::thread::sleep(Duration::from_millis(200));
    entered.write_all(&request(Mode::Simple, Cmd::Flush, 1, Span::new(0, 0), Data::empty())).unwrap();
    entered.read_exact(&mut [0; 16]).unwrap();
}

fn session(mode: Mode) -> Vec<u8> {
    let r = |cmd, cookie, start, len, payload: Vec<u8>| {
        request(mode, cmd, cookie, Span::new(start, len), payload.into())
    };
    [
        r(Cmd::Write, 1, 0, 1000, vec![7; 1000]),
        r(Cmd::Read, 2, 0, 70_000, vec![]),
        r(Cmd::WriteZeroes, 3, 4096, 4096, vec![]),
        r(Cmd::Trim, 4, 8192, 4096, vec![]),
        if mode == Mode::Simple { vec![] } else { r(Cmd::BlockStatus, 5, 0, 65536, vec![]) },
        r(Cmd::Cache, 6, 0, 65536, vec![]),
        r(Cmd::Flush, 7, 0, 0, vec![]),
        r(Cmd::Disconnect, 8, 0, 0, vec![]),
    ]
    .concat()
}

#[test]
fn a_session_may_be_cut_at_every_byte() {
    let dir = Dir::new();
    let server = start(&dir, ServerOptions { max_connections: 0, ..at(&dir) });
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let shake = enter(&mut connect(&dir), mode).1;
        let whole = [shake, session(mode)].concat();
        for cut in 0..whole.len() {
            let mut s = connect(&dir);
            // everything at once, whether the server has asked or not
            s.write_all(&whole[..cut]).unwrap();
        }
        works(&dir);
    }
    eventually("all are gone", || server.call(|s| async move { s.registry.connections() }) == 0);
}

#[test]
fn requests_that_have_begun_end_when_their_client_is_gone() {
    let dir = Dir::new();
    let server = start(&dir, at(&dir));
    server.call(|s| async move { s.node.delay.set(Duration::from_millis(150)) });
    let mut s = connect(&dir);
    enter(&mut s, Mode::Simple);
    for i in 0..50u64 {
        s.write_all(&request(Mode::Simple, Cmd::Write, i, Span::new(i * 512, 512), vec![9; 512].into()))
            .unwrap();
    }
    std::thread::sleep(Duration::from_millis(50));
    drop(s);
    eventually("the client's task ends", || server.call(|s| async move { s.registry.connections() }) == 0);
    let disk = std::fs::read(dir.path("disk")).unwrap();
    assert!(disk[..50 * 512].iter().all(|b| *b == 9), "all that was sent was done");
}

/// What is to be asked again of the next daemon has no answer from this one, not even an error: the connection ends.
#[test]
fn what_a_daemon_ends_before_has_no_answer() {
    let dir = Dir::new();
    let server = start(&dir, at(&dir));
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let mut s = connect(&dir);
        enter(&mut s, mode);
        server.call(|s| async move { s.node.ending.set(true) });
        s.write_all(&request(mode, Cmd::Write, 1, Span::new(0, 512), vec![9; 512].into())).unwrap();
        assert_eq!(s.read(&mut [0; 64]).unwrap(), 0, "{mode:?}");
        server.call(|s| async move { s.node.ending.set(false) });
        works(&dir);
    }
}

/// Bytes of replies that a client who asks for sixteen sectors at once has when the last of them is read. With `busy` the server's
/// thread has something else to do.
fn replied_before_the_last(busy: bool) -> usize {
    const SECTOR: u64 = 512;
    let dir = Dir::new();
    let server = start(&dir, at(&dir));
    let mut s = connect(&dir);
    enter(&mut s, Mode::Simple);
    let (tell, told) = std::sync::mpsc::channel();
    let mut client = s.try_clone().unwrap();
    server.call(move |served| async move {
        let env = served.env.clone();
        let received = move |at: Span| match at.start / SECTOR {
            0 if busy => drop(env.spawn("something else", async {})),
            15 => {
                client.set_nonblocking(true).unwrap();
                let early = client.read(&mut [0; 16384]).unwrap_or(0);
                client.set_nonblocking(false).unwrap();
                tell.send(early).unwrap();
            }
            _ => {}
        };
        let received = RefCell::new(received);
        *served.node.on_read.borrow_mut() = Some(Box::new(move |at| received.borrow_mut()(at)));
    });
    let asked = |n| request(Mode::Simple, Cmd::Read, n, Span::new(n * SECTOR, SECTOR), Data::empty());
    s.write_all(&(0..16).flat_map(asked).collect::<Vec<u8>>()).unwrap();
    let early = told.recv().unwrap();
    s.read_exact(&mut vec![0; 16 * (16 + SECTOR as usize) - early]).unwrap();
    early
}

#[test]
fn half_of_many_replies_go_out_before_the_rest_is_done() {
    assert_eq!(replied_before_the_last(false), 8 * (16 + 512));
}

#[test]
fn replies_go_out_together_where_there_is_more_to_do() {
    assert_eq!(replied_before_the_last(true), 0);
}

#[test]
fn a_client_that_does_not_read_is_not_read_from() {
    let dir = Dir::new();
    let server = start(&dir, at(&dir));
    let mut s = connect(&dir);
    enter(&mut s, Mode::Simple);
    s.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let read = request(Mode::Simple, Cmd::Read, 1, Span::new(0, SIZE as u64), Data::empty());
    let mut taken = 0;
    // 4 GiB of replies asked for; the server takes only as many requests as fit its budget and the socket's buffer
    while taken < 4096 * read.len() {
        match s.write(&read.repeat(64)) {
            Ok(n) => taken += n,
            Err(_) => break,
        }
    }
    works(&dir);
    let rss = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = rss.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(pages * 4096 < 400 << 20, "{} MiB resident", (pages * 4096) >> 20);
    drop(s);
    eventually("gone", || server.call(|s| async move { s.registry.connections() }) == 0);
}

#[test]
fn nonsense_ends_only_its_own_connection() {
    let dir = Dir::new();
    let _server = start(&dir, at(&dir));
    let mut victim = connect(&dir);
    enter(&mut victim, Mode::Simple);
    let too_long = request(Mode::Simple, Cmd::Write, 77, Span::new(0, MAX_PAYLOAD + 1), Data::empty());
    for (bytes, answered) in [(vec![0xff; 28], false), (too_long, true)] {
        let mut s = connect(&dir);
        enter(&mut s, Mode::Simple);
        s.write_all(&bytes).unwrap();
        let mut rest = Vec::new();
        s.read_to_end(&mut rest).unwrap();
        assert_eq!(rest.len(), if answered { 16 } else { 0 });
        if answered {
            assert_eq!(rest[7], 22);
        }
    }
    let mut s = connect(&dir);
    s.read_exact(&mut [0; 18]).unwrap();
    s.write_all(&[&[0, 0, 0, 3][..], b"IHAVEOPT", &opt::LIST.to_be_bytes(), &[0xff; 4]].concat()).unwrap();
    assert_eq!(s.read(&mut [0; 1]).unwrap_or(0), 0);
    victim.write_all(&request(Mode::Simple, Cmd::Flush, 1, Span::new(0, 0), Data::empty())).unwrap();
    victim.read_exact(&mut [0; 16]).unwrap();
}

#[test]
fn deletion_safe_and_hard() {
    let dir = Dir::new();
    let server = start(&dir, at(&dir));
    let mut s = connect(&dir);
    enter(&mut s, Mode::Simple);
    server.call(|s| async move {
        let e = s.registry.delete("e", DeleteMode::Safe).unwrap_err();
        assert_eq!(e.message(), "export 'e' still in use");
        let e = s.registry.delete("x", HARD).unwrap_err();
        assert_eq!(e.message(), "Export 'x' is not found");
        s.registry.add_nbd(options("e2", "other"), s.edge().await, true).unwrap();
        for (id, name, message) in [
            ("e", "z", "Block export id 'e' is already in use"),
            ("0", "z", "Invalid block export id"),
            ("e3", "d", "NBD server already has export named 'd'"),
        ] {
            let e = s.registry.add_nbd(options(id, name), s.edge().await, true).unwrap_err();
            assert_eq!(e.message(), message);
        }
        let e = s.registry.add_nbd(options("e3", &"x".repeat(4097)), s.edge().await, true).unwrap_err();
        assert!(e.message().ends_with("x' too long"));
        let e = s.registry.add_nbd(options("e3", "z"), s.edge().await, false).unwrap_err();
        assert_eq!(e.message(), "Cannot export read-only node as writable");
        let ids: Vec<_> = s.registry.query().into_iter().map(|i| (i.id, i.node_name)).collect();
        assert_eq!(ids, [("e2".into(), "node".to_owned()), ("e".into(), "node".to_owned())], "newest first");
        s.node.delay.set(Duration::from_millis(300));
    });
    s.write_all(&request(Mode::Simple, Cmd::Write, 1, Span::new(0, 512), vec![3; 512].into())).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    server.call(|s| async move {
        s.registry.delete("e", HARD).unwrap();
        assert!(s.deleted.borrow().is_empty(), "a request still runs");
        assert!(s.registry.query()[1].shutting_down);
        assert!(
            s.registry.add_nbd(options("e", "d"), s.edge().await, true).is_err(),
            "the id is still taken"
        );
    });
    assert_eq!(s.read(&mut [0; 64]).unwrap_or(0), 0, "cut off");
    eventually("the export is gone", || server.call(|s| async move { *s.deleted.borrow() == ["e"] }));
    assert_eq!(std::fs::read(dir.path("disk")).unwrap()[..512], [3; 512], "and its last write was done");
    server.call(|s| async move {
        s.node.delay.set(Duration::ZERO);
        s.registry.add_nbd(options("e", "d"), s.edge().await, true).unwrap();
    });
    works(&dir);
    server.call(|s| async move {
        s.registry.stop_server().await.unwrap();
        assert_eq!(*s.deleted.borrow(), ["e", "e", "e2"], "newest first");
        assert!(s.registry.query().is_empty());
        assert_eq!(s.registry.stop_server().await.unwrap_err().message(), "NBD server not running");
        let e = s.registry.add_nbd(options("e", "d"), s.edge().await, true).unwrap_err();
        assert_eq!(e.message(), "NBD server not running");
    });
}

#[test]
fn a_write_through_export_flushes_each_write() {
    let dir = Dir::new();
    dir.image("disk", SIZE, 5);
    let mut o = options("e", "d");
    o.writethrough = true;
    let server = Server::start(&dir.path("disk"), at(&dir), o);
    let mut s = connect(&dir);
    enter(&mut s, Mode::Simple);
    for (i, cmd) in [Cmd::Write, Cmd::Trim].into_iter().enumerate() {
        let payload = if cmd == Cmd::Write { vec![1; 512] } else { vec![] };
        s.write_all(&request(Mode::Simple, cmd, 1, Span::new(0, 512), payload.into())).unwrap();
        s.read_exact(&mut [0; 16]).unwrap();
        assert_eq!(server.call(|s| async move { s.node.flushes.get() }), i as u64 + 1);
    }
}

#[test]
fn flags_of_write_zeroes_reach_the_disk() {
    let dir = Dir::new();
    let server = start(&dir, at(&dir));
    let mut s = connect(&dir);
    enter(&mut s, Mode::Simple);
    let plain = ReqFlags { may_unmap: true, ..ReqFlags::NONE };
    for (flags, want) in [
        (0, plain),
        (cmd_flag::NO_HOLE, ReqFlags::NONE),
        (cmd_flag::FUA, ReqFlags { fua: true, ..plain }),
        (cmd_flag::FAST_ZERO, ReqFlags { no_fallback: true, ..plain }),
    ] {
        s.write_all(&flagged(Mode::Simple, Cmd::WriteZeroes, flags, 1, Span::new(0, 4096), Data::empty()))
            .unwrap();
        s.read_exact(&mut [0; 16]).unwrap();
        assert_eq!(server.call(|s| async move { s.node.zeroed.get() }), want, "{flags:#x}");
    }
}

#[test]
fn a_greedy_client_leaves_room_for_others() {
    let dir = Dir::new();
    let _server = start(&dir, at(&dir));
    let stop = AtomicBool::new(false);
    /// Ends the greedy ones also when an assertion fails.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        for _ in 0..2 {
            scope.spawn(|| {
                let mut s = connect(&dir);
                enter(&mut s, Mode::Simple);
                let many = request(Mode::Simple, Cmd::Read, 1, Span::new(0, 65536), Data::empty()).repeat(64);
                let mut replies = vec![0; 64 * (16 + 65536)];
                while !stop.load(Ordering::Relaxed) {
                    if s.write_all(&many).and_then(|()| s.read_exact(&mut replies)).is_err() {
                        break;
                    }
                }
            });
        }
        let mut s = connect(&dir);
        enter(&mut s, Mode::Simple);
        let mut waits: Vec<_> = (0..50)
            .map(|_| {
                let begin = Instant::now();
                s.write_all(&request(Mode::Simple, Cmd::Read, 1, Span::new(0, 512), Data::empty())).unwrap();
                s.read_exact(&mut [0; 16 + 512]).unwrap();
                begin.elapsed()
            })
            .collect();
        waits.sort();
        assert!(waits[25] < Duration::from_millis(100), "median wait {:?}", waits[25]);
    });
}

#[test]
fn a_server_that_cannot_listen_says_so_as_qsd() {
    let dir = Dir::new();
    let server = start(&dir, at(&dir));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    server.call(move |s| async move {
        s.registry.stop_server().await.unwrap();
        for (address, message) in [
            (
                Address::Unix("/nonexistent/x".into()),
                "Failed to bind socket to /nonexistent/x: No such file or directory",
            ),
            (Address::tcp("127.0.0.1", port), "Failed to find an available port: Address already in use"),
        ] {
            let e = s.registry.start_server(&ServerOptions::at(address)).await.unwrap_err();
            assert_eq!(e.message(), message);
        }
        assert_eq!(s.registry.server_address(), None);
    });
}
