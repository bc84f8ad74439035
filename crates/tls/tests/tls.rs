//! Handshakes and transfers over unix sockets, with certificates that openssl makes for the run.

#![allow(clippy::unwrap_used, reason = "tests")]

use block::{Data, ErrorKind};
use env::os::OsConfig;
use env::{Address, Env, Stream};
use std::cell::RefCell;
use std::future::Future;
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tls::{Credentials, Endpoint, X509Options};

/// The authorities "ours" and "other" with certificates for both ends, and directories that are wrong; removed at the end.
struct Pki(PathBuf);

impl Pki {
    fn make() -> Pki {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("liveblk-tls-{}-{n}", std::process::id()));
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pki.sh");
        let made = Command::new("sh").arg(script).arg(&dir).output().expect("sh");
        assert!(made.status.success(), "pki.sh: {}", String::from_utf8_lossy(&made.stderr));
        Pki(dir)
    }
}

impl Drop for Pki {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

thread_local! {
    /// Where the running test has its certificates.
    static DIR: RefCell<PathBuf> = const { RefCell::new(PathBuf::new()) };
}

fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Env) -> F + 'static) {
    let pki = Pki::make();
    DIR.set(pki.0.clone());
    let executor = env::os::start(OsConfig::default());
    let env = executor.env();
    let body = test(env.clone());
    executor.run(async move {
        assert!(env.timeout(Duration::from_secs(60), body).await.is_some(), "hangs");
    });
}

fn options(dir: &str, endpoint: Endpoint) -> X509Options {
    let dir = DIR.with_borrow(|d| d.join(dir));
    X509Options { dir, endpoint, verify_peer: true, sanity_check: true, password: None }
}

async fn pair(env: &Env) -> (Rc<dyn Stream>, Rc<dyn Stream>) {
    let path =
        std::env::temp_dir().join(format!("liveblk-tls-{}-{:x}.sock", std::process::id(), env.random()));
    let listener = env.listen(&Address::Unix(path.clone())).await.unwrap();
    let client = env.connect(&Address::Unix(path.clone())).await.unwrap();
    let server = listener.accept().await.unwrap();
    std::fs::remove_file(path).unwrap();
    (client, server)
}

type Ends = (block::Result<Rc<tls::TlsStream>>, block::Result<Rc<tls::TlsStream>>);

/// Both handshakes at once; what the client and what the server made of it.
async fn shake(env: &Env, client: &X509Options, server: &X509Options, host: Option<&str>) -> Ends {
    let client = Credentials::load(env, client).await.unwrap();
    let server = Credentials::load(env, server).await.unwrap();
    let (a, b) = pair(env).await;
    let (done, accepted) = env::sync::oneshot();
    env.spawn("server", async move { done.send(server.accept(b).await) });
    // A client of TLS 1.3 has ended its handshake before the server has judged it.
    let connected = client.connect(a, host).await;
    (connected, accepted.await.unwrap())
}

#[test]
fn bytes_go_both_ways_whatever_their_number() {
    run(|env| async move {
        let (c, s) = shake(
            &env,
            &options("ours", Endpoint::Client),
            &options("ours", Endpoint::Server),
            Some("localhost"),
        )
        .await;
        let (c, s) = (c.unwrap(), s.unwrap());
        assert_eq!(s.peer_name().as_deref(), Some("CN=client.example,O=Disks,C=GB"));
        for len in [1_usize, 4096, 16_384, 16_385, 262_144, 5 << 20] {
            let sent: Vec<u8> = (0..len).map(|i| (i * 7 + len) as u8).collect();
            // Two parts, so that a send is more than one piece of memory.
            let mut data = Data::copy_from(&sent[..len / 2]);
            data.append(Data::copy_from(&sent[len / 2..]));
            let (from, to, back) = (c.clone(), s.clone(), s.clone());
            env.spawn("sender", async move { from.send(data).await.unwrap() });
            let mut got = Vec::new();
            while got.len() < len {
                let piece = to.recv(100_000).await.unwrap();
                assert!(!piece.is_empty() && piece.len() <= 100_000);
                got.extend_from_slice(&piece);
            }
            assert!(got == sent, "{len} bytes arrived as others");
            back.send(Data::copy_from(b"yes")).await.unwrap();
            assert_eq!(&c.recv(2).await.unwrap()[..], b"ye");
            assert_eq!(&c.recv(2).await.unwrap()[..], b"s");
        }
        c.shutdown();
        assert!(s.recv(10).await.unwrap().is_empty());
    });
}

#[test]
fn nobody_gets_in_under_another_name_or_authority() {
    run(|env| async move {
        let (ours, other) = (options("ours", Endpoint::Client), options("other", Endpoint::Client));
        let server = options("ours", Endpoint::Server);
        let refused = |e: Ends, what: &str| {
            let e = e.0.err().unwrap_or_else(|| panic!("{what}: the client took it"));
            assert_eq!(e.kind(), ErrorKind::Permission, "{what}: {e}");
            e.message().to_owned()
        };
        let m = refused(shake(&env, &ours, &server, Some("elsewhere")).await, "another name");
        assert!(m.contains("elsewhere"), "{m}");
        // Names are compared last: a certificate that is wrong in both ways is not taken where no name is asked for.
        refused(shake(&env, &other, &server, None).await, "another authority, no name");
        refused(shake(&env, &other, &server, Some("elsewhere")).await, "another authority and name");
        assert!(shake(&env, &ours, &server, None).await.0.is_ok());
        assert!(shake(&env, &ours, &server, Some("127.0.0.1")).await.0.is_ok());
        let trusting = X509Options { verify_peer: false, ..other.clone() };
        // The client trusts anybody; the server does not.
        let (_, s) = shake(&env, &trusting, &server, None).await;
        assert!(s.is_err(), "a client of another authority got in");
        let open = X509Options { verify_peer: false, ..server.clone() };
        assert!(shake(&env, &trusting, &open, None).await.1.is_ok());
        // No certificate at all.
        let bare = options("bare", Endpoint::Client);
        assert!(shake(&env, &bare, &server, None).await.1.is_err());
        assert!(shake(&env, &bare, &open, Some("localhost")).await.1.is_ok());
    });
}

#[test]
fn a_common_name_counts_where_there_is_no_other() {
    run(|env| async move {
        let (client, server) = (options("ours", Endpoint::Client), options("cn", Endpoint::Server));
        assert!(shake(&env, &client, &server, Some("server.example")).await.0.is_ok());
        assert!(shake(&env, &client, &server, Some("other.example")).await.0.is_err());
        // "ours" has the same common name, and other names beside it.
        let named = options("ours", Endpoint::Server);
        assert!(shake(&env, &client, &named, Some("server.example")).await.0.is_err());
    });
}

#[test]
fn a_revoked_client_stays_out() {
    run(|env| async move {
        let (client, server) = (options("ours", Endpoint::Client), options("revoking", Endpoint::Server));
        assert!(shake(&env, &client, &server, None).await.1.is_err());
    });
}

#[test]
fn encrypted_keys_need_their_pass_phrase() {
    run(|env| async move {
        let locked = options("locked", Endpoint::Server);
        let load = |password: Option<&str>| {
            let o = X509Options { password: password.map(|p| p.as_bytes().to_vec()), ..locked.clone() };
            let env = env.clone();
            async move { Credentials::load(&env, &o).await.map(drop).map_err(|e| e.message().to_owned()) }
        };
        let e = load(None).await.unwrap_err();
        assert!(e.contains("server-key.pem") && e.contains("passwordid"), "{e}");
        assert!(load(Some("wrong")).await.unwrap_err().contains("cannot decrypt"));
        load(Some("sesame")).await.unwrap();
    });
}

#[test]
fn bad_files_are_named() {
    run(|env| async move {
        for (dir, endpoint, expected) in [
            ("nowhere", Endpoint::Client, "nowhere/ca-cert.pem: No such file or directory"),
            ("bare", Endpoint::Server, "bare/server-cert.pem: No such file or directory"),
            ("keyless", Endpoint::Server, "keyless/server-key.pem: No such file or directory"),
            ("junk", Endpoint::Server, "Unable to import server certificate"),
            ("mixed", Endpoint::Server, "The certificate and the given key do not match."),
            ("expired", Endpoint::Server, "The certificate has expired"),
            ("foreign", Endpoint::Server, "failed validation against the CA"),
            ("foreign", Endpoint::Client, "failed validation against the CA"),
        ] {
            let e = Credentials::load(&env, &options(dir, endpoint))
                .await
                .err()
                .unwrap_or_else(|| panic!("{dir}"));
            assert!(e.message().contains(expected), "{dir}: {e}");
        }
        let unchecked = X509Options { sanity_check: false, ..options("foreign", Endpoint::Server) };
        assert!(Credentials::load(&env, &unchecked).await.is_ok());
    });
}

#[test]
fn nonsense_and_silence_end_a_handshake() {
    run(|env| async move {
        let server = Credentials::load(&env, &options("ours", Endpoint::Server)).await.unwrap();
        let (a, b) = pair(&env).await;
        a.send(Data::copy_from(&[0x55; 64])).await.unwrap();
        assert!(server.accept(b).await.is_err());
        let (a, b) = pair(&env).await;
        drop(a);
        assert_eq!(server.accept(b).await.err().unwrap().kind(), ErrorKind::Disconnected);
        let (_a, b) = pair(&env).await;
        assert!(server.connect(b, None).await.err().unwrap().message().contains("client endpoint"));
    });
}

#[test]
fn a_changed_byte_is_noticed() {
    run(|env| async move {
        let server = Credentials::load(&env, &options("ours", Endpoint::Server)).await.unwrap();
        let client = Credentials::load(&env, &options("ours", Endpoint::Client)).await.unwrap();
        // client - (a, b) - a relay that changes a byte of the third piece - (c, d) - server
        let ((a, b), (c, d)) = (pair(&env).await, pair(&env).await);
        let back = (c.clone(), b.clone());
        env.spawn("back", async move {
            while let Ok(piece) = back.0.recv(1 << 16).await
                && !piece.is_empty()
                && back.1.send(piece.into()).await.is_ok()
            {}
        });
        let (say, told) = env::sync::oneshot();
        env.spawn("forth", async move {
            for _ in 0..2 {
                let piece = b.recv(1 << 16).await.unwrap();
                c.send(piece.into()).await.unwrap();
            }
            let mut piece = b.recv(1 << 16).await.unwrap().to_vec();
            *piece.last_mut().unwrap() ^= 1;
            c.send(piece.into()).await.unwrap();
            let () = told.await.unwrap_or(());
        });
        let (done, accepted) = env::sync::oneshot();
        env.spawn("server", async move { done.send(server.accept(d).await) });
        let client = client.connect(a, None).await.unwrap();
        let server = accepted.await.unwrap().unwrap();
        client.send(Data::copy_from(b"four thousand and one")).await.unwrap();
        let e = server.recv(100).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Disconnected, "{e}");
        say.send(());
    });
}
