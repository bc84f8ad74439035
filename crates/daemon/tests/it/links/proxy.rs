//! A TCP proxy in front of a peer's socket that can be told to drop connections, swallow bytes, or be slow.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

/// What the proxy does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Mood {
    Pass,
    /// Connections are ended, and new ones ended at once.
    Drop,
    /// Connections stay, and nothing passes.
    Freeze,
    /// Each piece takes 20 ms.
    Delay,
}

/// A proxy; it ends with the test.
pub(super) struct Proxy {
    pub(super) port: u16,
    mood: Arc<AtomicU8>,
}

const LOOK: Duration = Duration::from_millis(5);

impl Proxy {
    /// One in front of the unix socket `to`.
    pub(super) fn start(to: &Path) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, mood, to) =
            (listener.local_addr().unwrap().port(), Arc::new(AtomicU8::new(0)), to.to_owned());
        let shared = mood.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                connect(client, &to, &shared);
            }
        });
        Proxy { port, mood }
    }

    pub(super) fn set(&self, mood: Mood) {
        self.mood.store(mood as u8, Ordering::SeqCst);
    }
}

fn connect(client: TcpStream, to: &PathBuf, mood: &Arc<AtomicU8>) {
    if mood.load(Ordering::SeqCst) == Mood::Drop as u8 {
        return;
    }
    let Ok(server) = UnixStream::connect(to) else { return };
    client.set_read_timeout(Some(LOOK)).unwrap();
    server.set_read_timeout(Some(LOOK)).unwrap();
    let (c, s) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    let (there, back) = (mood.clone(), mood.clone());
    std::thread::spawn(move || {
        pump(client, &s, &there);
        let _ = s.shutdown(Shutdown::Both);
    });
    std::thread::spawn(move || {
        pump(server, &c, &back);
        let _ = c.shutdown(Shutdown::Both);
    });
}

/// Until either side ends, or the proxy is told to drop.
fn pump(mut from: impl Read, mut to: impl Write, mood: &AtomicU8) {
    let mut piece = vec![0; 65536];
    loop {
        let now = mood.load(Ordering::SeqCst);
        if now == Mood::Drop as u8 {
            return;
        }
        if now == Mood::Freeze as u8 {
            std::thread::sleep(LOOK);
            continue;
        }
        match from.read(&mut piece) {
            Ok(0) => return,
            Ok(n) => {
                if now == Mood::Delay as u8 {
                    std::thread::sleep(Duration::from_millis(20));
                }
                if to.write_all(&piece[..n]).is_err() {
                    return;
                }
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}
