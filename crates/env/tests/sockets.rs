//! Sockets of the real backend, in both modes.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;
use block::{BlockError, Data, ErrorKind, Span};
use bytes::Bytes;
use common::{Dir, MODES, pattern, run_in};
use env::os::OsConfig;
use env::{Address, Env, Listener, OpenMode, Stream};
use std::cell::Cell;
use std::future::Future;
use std::io::{Read, Write};
use std::os::fd::IntoRawFd;
use std::rc::Rc;
use std::time::Duration;

fn each<F: Future<Output = ()> + 'static>(test: impl Fn(Env, Rc<Dir>) -> F) {
    for io in MODES {
        let dir = Rc::new(Dir::new("/dev/shm"));
        run_in(OsConfig { io, ..OsConfig::default() }, |env| test(env, dir));
    }
}

async fn pair(env: &Env, at: &Address) -> (Rc<dyn Listener>, Rc<dyn Stream>, Rc<dyn Stream>) {
    let listener = env.listen(at).await.unwrap();
    let address = listener.address();
    let a = env.connect(&address).await.unwrap();
    let b = listener.accept().await.unwrap();
    (listener, a, b)
}

async fn recv_all(s: &Rc<dyn Stream>, len: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < len {
        let b = s.recv(len - all.len()).await.unwrap();
        assert!(!b.is_empty(), "ended after {} of {len}", all.len());
        all.extend_from_slice(&b);
    }
    all
}

#[test]
fn both_kinds_carry_bytes_both_ways() {
    each(|env, dir| async move {
        let tcp = |host: &str| Address::tcp(host, 0);
        for at in [Address::Unix(dir.path("s")), tcp("127.0.0.1"), tcp("localhost"), tcp("[::1]")] {
            let (listener, a, b) = pair(&env, &at).await;
            if let Address::Tcp { port, .. } = listener.address() {
                assert_ne!(port, 0);
            }
            a.send(Data::copy_from(b"hello")).await.unwrap();
            assert_eq!(&b.recv(100).await.unwrap()[..], b"hello");
            b.send(Data::copy_from(b"back")).await.unwrap();
            assert_eq!(&a.recv(2).await.unwrap()[..], b"ba");
            assert_eq!(&a.recv(100).await.unwrap()[..], b"ck");
            match at {
                Address::Unix(_) => assert_eq!(b.peer().unwrap().pid, std::process::id()),
                _ => assert_eq!(b.peer(), None),
            }
            drop(a);
            assert!(b.recv(100).await.unwrap().is_empty(), "the end of the stream");
            let gone = b.send(Data::zeroes(10 << 20)).await.unwrap_err();
            assert_eq!(gone.kind(), ErrorKind::Disconnected);
        }
    });
}

#[test]
fn a_large_send_waits_for_a_slow_reader() {
    each(|env, dir| async move {
        let (_l, a, b) = pair(&env, &Address::Unix(dir.path("s"))).await;
        let data = pattern(5, 20 << 20);
        let rope: Data = data.chunks(100_001).map(Data::copy_from).collect();
        let sent = Rc::new(Cell::new(false));
        let done = sent.clone();
        let task = env.spawn("send", async move {
            a.send(rope).await.unwrap();
            done.set(true);
        });
        env.sleep(Duration::from_millis(20)).await;
        assert!(!sent.get());
        assert_eq!(recv_all(&b, data.len()).await, data);
        task.join().await;
    });
}

/// Unix and TCP; a reader who is slower than a helper thread waits; what is past the end reads as zero.
#[test]
fn bytes_of_a_file_are_sent_from_where_they_lie() {
    each(|env, dir| async move {
        let content = pattern(9, (5 << 20) + 77);
        std::fs::write(dir.path("f"), &content).unwrap();
        let file = env.open(&dir.path("f"), OpenMode::default()).await.unwrap();
        for at in [Address::Unix(dir.path("s")), Address::tcp("127.0.0.1", 0)] {
            let (_l, a, b) = pair(&env, &at).await;
            assert!(a.sends_from(&file));
            let (from, out) = (file.clone(), a.clone());
            let task = env.spawn("send", async move {
                out.send(Data::copy_from(b"head")).await.unwrap();
                out.send_file(&from, Span::new(3, 6 << 20)).await.unwrap().unwrap();
                out.send(Data::copy_from(b"tail")).await.unwrap();
            });
            env.sleep(Duration::from_millis(60)).await;
            assert!(!task.is_done());
            let mut want = b"head".to_vec();
            want.extend_from_slice(&content[3..]);
            want.resize(4 + (6 << 20), 0);
            want.extend_from_slice(b"tail");
            assert!(recv_all(&b, want.len()).await == want);
            task.join().await;
        }
    });
}

#[test]
fn a_file_that_cannot_be_read_is_told_of_and_the_stream_goes_on() {
    each(|env, dir| async move {
        // nothing is mapped at the bottom of this process's memory: reading there is an I/O error
        let file = env.open("/proc/self/mem".as_ref(), OpenMode::default()).await.unwrap();
        let (_l, a, b) = pair(&env, &Address::Unix(dir.path("s"))).await;
        let e = a.send_file(&file, Span::new(0, 100_000)).await.unwrap().unwrap_err();
        assert!(e.errno() == BlockError::EIO || e.kind() == ErrorKind::Unsupported, "{e}");
        a.send(Data::copy_from(b"tail")).await.unwrap();
        let all = recv_all(&b, 100_004).await;
        assert!(all[..100_000].iter().all(|x| *x == 0) && all.ends_with(b"tail"));
    });
}

#[test]
fn a_peer_that_goes_away_ends_the_sending_of_a_file() {
    each(|env, dir| async move {
        std::fs::write(dir.path("f"), pattern(1, 4 << 20)).unwrap();
        let file = env.open(&dir.path("f"), OpenMode::default()).await.unwrap();
        for gone in [true, false] {
            let (_l, a, b) = pair(&env, &Address::Unix(dir.path("s"))).await;
            let (from, out) = (file.clone(), a.clone());
            let task = env.spawn("send", async move {
                let e = out.send_file(&from, Span::new(0, 4 << 20)).await.unwrap_err();
                assert_eq!(e.kind(), ErrorKind::Disconnected);
            });
            env.sleep(Duration::from_millis(40)).await;
            assert!(!task.is_done());
            if gone {
                drop(b)
            } else {
                a.shutdown()
            }
            task.join().await;
        }
        file.settle().await.unwrap();
    });
}

#[test]
fn a_dropped_receive_loses_nothing() {
    each(|env, dir| async move {
        let (_l, a, b) = pair(&env, &Address::Unix(dir.path("s"))).await;
        for i in 0..50u8 {
            assert!(env.timeout(Duration::from_micros(200), b.recv(10)).await.is_none());
            a.send(Data::copy_from(&[i, i])).await.unwrap();
            // dropped unpolled, and dropped when the bytes may have arrived already
            drop(b.recv(10));
            if let Some(got) = env.timeout(Duration::ZERO, b.recv(10)).await {
                assert_eq!(got.unwrap()[..], [i, i]);
            } else {
                assert_eq!(recv_all(&b, 2).await, [i, i]);
            }
        }
    });
}

#[test]
fn shutdown_ends_waiting_operations() {
    each(|env, dir| async move {
        let (_l, a, b) = pair(&env, &Address::Unix(dir.path("s"))).await;
        let (reader, writer) = (b.clone(), b.clone());
        let reading = env.spawn("recv", async move { assert!(reader.recv(10).await.unwrap().is_empty()) });
        let writing = env.spawn("send", async move {
            let e = writer.send(Data::zeroes(10 << 20)).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Disconnected);
        });
        env.sleep(Duration::from_millis(10)).await;
        assert!(!reading.is_done() && !writing.is_done());
        b.shutdown();
        reading.join().await;
        writing.join().await;
        assert!(b.recv(10).await.unwrap().is_empty());
        drop(a);
    });
}

#[test]
fn a_stale_socket_is_replaced_a_live_one_is_not() {
    each(|env, dir| async move {
        let at = Address::Unix(dir.path("s"));
        let first = env.listen(&at).await.unwrap();
        let e = env.listen(&at).await.err().unwrap();
        assert_eq!(e.errno(), BlockError::EADDRINUSE);
        // who has just been killed may still be going
        let leaving = env.clone();
        let task = env.spawn("leaves", async move {
            leaving.sleep(Duration::from_millis(60)).await;
            drop(first);
        });
        drop(env.listen(&at).await.unwrap());
        task.join().await;
        assert!(dir.path("s").exists());
        assert_eq!(env.connect(&at).await.err().unwrap().errno(), BlockError::ECONNREFUSED);
        drop(env.listen(&at).await.unwrap());
        std::fs::remove_file(dir.path("s")).unwrap();
        std::fs::write(dir.path("s"), "precious").unwrap();
        assert_eq!(env.listen(&at).await.err().unwrap().errno(), BlockError::EADDRINUSE);
        assert_eq!(std::fs::read(dir.path("s")).unwrap(), b"precious");
        let long = Address::Unix(dir.path(&"x".repeat(120)));
        assert_eq!(env.listen(&long).await.err().unwrap().errno(), BlockError::ENAMETOOLONG);
        let none = Address::Unix(dir.path("none"));
        assert_eq!(env.connect(&none).await.err().unwrap().kind(), ErrorKind::NotFound);
        let name = Address::tcp("no.such.host.invalid", 1);
        assert_eq!(env.connect(&name).await.err().unwrap().kind(), ErrorKind::NotFound);
    });
}

#[test]
fn what_is_dropped_while_it_waits_is_closed_at_once() {
    each(|env, dir| async move {
        let tcp = Address::tcp("127.0.0.1", 0);
        for at in [Address::Unix(dir.path("s")), tcp] {
            let listener = env.listen(&at).await.unwrap();
            let address = listener.address();
            let task = env.spawn("accept", async move {
                let s = listener.accept().await.unwrap();
                assert!(s.recv(1).await.is_err() || std::future::pending::<bool>().await);
            });
            env.sleep(Duration::from_millis(1)).await;
            task.cancel();
            // no turn of the loop in between
            let again = env.listen(&address).await.unwrap();
            let mut peer = match &address {
                Address::Unix(p) => Peer::Unix(std::os::unix::net::UnixStream::connect(p).unwrap()),
                Address::Tcp { port, .. } => {
                    Peer::Tcp(std::net::TcpStream::connect(("127.0.0.1", *port)).unwrap())
                }
                _ => unreachable!(),
            };
            let s = again.accept().await.unwrap();
            assert!(env.timeout(Duration::from_millis(1), s.recv(1)).await.is_none());
            drop(s);
            assert_eq!(peer.read(), 0, "the end, with the receive still under way");
        }
    });
}

enum Peer {
    Unix(std::os::unix::net::UnixStream),
    Tcp(std::net::TcpStream),
}

impl Peer {
    fn read(&mut self) -> usize {
        let mut b = [0];
        match self {
            Peer::Unix(s) => {
                s.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                s.read(&mut b).unwrap()
            }
            Peer::Tcp(s) => {
                s.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                s.read(&mut b).unwrap()
            }
        }
    }
}

#[test]
fn inherited_descriptors_become_streams_and_listeners() {
    each(|env, dir| async move {
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let s = env.connect(&Address::Fd(theirs.into_raw_fd())).await.unwrap();
        ours.write_all(b"in").unwrap();
        assert_eq!(&s.recv(10).await.unwrap()[..], b"in");
        s.send(Data::copy_from(b"out")).await.unwrap();
        let mut got = [0; 3];
        ours.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"out");
        let l = std::os::unix::net::UnixListener::bind(dir.path("l")).unwrap();
        let l = env.listen(&Address::Fd(l.into_raw_fd())).await.unwrap();
        let c = env.connect(&Address::Unix(dir.path("l"))).await.unwrap();
        let d = l.accept().await.unwrap();
        c.send(Data::copy_from(b"x")).await.unwrap();
        assert_eq!(&d.recv(1).await.unwrap()[..], b"x");
        let e = env.connect(&Address::Fd(987_654)).await.err().unwrap();
        assert_eq!(e.errno(), BlockError::EBADF);
    });
}

#[test]
fn a_pipe_is_a_stream_and_can_be_shut_down() {
    each(|env, _dir| async move {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let s = env.connect(&Address::Fd(reader.into_raw_fd())).await.unwrap();
        writer.write_all(b"line\nmore").unwrap();
        assert_eq!(&s.recv(5).await.unwrap()[..], b"line\n");
        assert_eq!(&s.recv(100).await.unwrap()[..], b"more");
        let again = s.clone();
        let waiting = env.spawn("recv", async move { assert!(again.recv(10).await.unwrap().is_empty()) });
        env.sleep(Duration::from_millis(5)).await;
        assert!(!waiting.is_done());
        s.shutdown();
        waiting.join().await;
    });
}

#[test]
fn parts_that_are_kept_stay_as_they_were() {
    each(|env, dir| async move {
        let (_l, a, b) = pair(&env, &Address::Unix(dir.path("s"))).await;
        let mut kept: Vec<(u64, Bytes)> = Vec::new();
        for i in 0..400u64 {
            a.send(Data::from(pattern(i, 5000))).await.unwrap();
            let mut left = 5000;
            while left > 0 {
                let part = b.recv(left).await.unwrap();
                let at = i + (5000 - left) as u64;
                left -= part.len();
                if i % 3 == 0 {
                    kept.push((at, part));
                }
            }
        }
        for (at, part) in kept {
            assert_eq!(part, pattern(at, part.len()));
        }
    });
}

#[test]
fn many_connections_at_once() {
    each(|env, dir| async move {
        let listener = env.listen(&Address::Unix(dir.path("s"))).await.unwrap();
        let (echo, at) = (env.clone(), listener.address());
        let server = env.spawn("accept", async move {
            loop {
                let s = listener.accept().await.unwrap();
                echo.spawn("echo", async move {
                    loop {
                        let b = s.recv(1 << 20).await.unwrap();
                        if b.is_empty() {
                            return;
                        }
                        s.send(Data::from(b)).await.unwrap();
                    }
                });
            }
        });
        let clients: Vec<_> = (0..300u64)
            .map(|i| {
                let (env, at) = (env.clone(), at.clone());
                env.clone().spawn("client", async move {
                    let c = env.connect(&at).await.unwrap();
                    for round in 0..5 {
                        let data = pattern(i * 7 + round, 3000);
                        c.send(Data::from(data.clone())).await.unwrap();
                        assert_eq!(recv_all(&c, data.len()).await, data);
                    }
                })
            })
            .collect();
        for c in clients {
            c.join().await;
        }
        server.cancel();
    });
}
