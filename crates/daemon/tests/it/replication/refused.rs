//! What is refused, and how clearly.

use super::*;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

/// The first bytes of a frame of another version of the protocol.
fn other_version() -> Vec<u8> {
    let mut frame = vec![0; 64];
    frame[..4].copy_from_slice(b"lbR1");
    frame[4] = 77;
    frame
}

/// Two daemons of different versions do not understand each other: each says so, and names both.
#[test]
fn a_peer_of_another_version_is_named() {
    let mut p = Host::new("redo", 1);
    let path = p.dir.path("other.sock");
    let other = UnixListener::bind(&path).unwrap();
    p.c.command("replication-peer-add", json!({"group": "g", "peer": "other", "addr": unix(&path)})).unwrap();
    p.c.command("replication-start", json!({"group": "g", "role": "primary"})).unwrap();
    let (mut session, _) = other.accept().unwrap();
    let mut hello = [0; 64];
    session.read_exact(&mut hello).unwrap();
    assert_eq!(&hello[..4], b"lbR1");
    let ours = format!("this side version {}", hello[4]);
    session.write_all(&other_version()).unwrap();
    let names_both = |text: &str| text.contains("speaks version 77") && text.contains(&ours);
    until(|| p.info()["last-error"].as_str().is_some_and(names_both));
    // the guest goes on alone
    p.io(0, "write -P 1 0 64k").unwrap();

    let mut s = Host::new("redo", 1);
    s.secondary();
    let mut session = UnixStream::connect(s.dir.path("repl.sock")).unwrap();
    session.write_all(&other_version()).unwrap();
    let mut answer = Vec::new();
    session.read_to_end(&mut answer).unwrap();
    assert!(names_both(&String::from_utf8_lossy(&answer)), "the other side is told as well");
    let info = s.info();
    assert!(info["last-error"].as_str().is_some_and(names_both), "{info}");
}

/// Two callers of one secondary would each end the other's session, for ever.
#[test]
fn a_place_is_one_peers() {
    let mut p = Host::new("redo", 1);
    let mut add = |name: &str, place: &str| {
        let peer = json!({"group": "g", "peer": name, "addr": unix(place)});
        p.c.command("replication-peer-add", peer)
    };
    add("a", "/one").unwrap();
    let refused = add("b", "/one").unwrap_err();
    assert!(refused.contains("has a peer 'a' at /one already"), "{refused}");
    let refused = add("a", "/two").unwrap_err();
    assert!(refused.contains("has a peer 'a' already"), "{refused}");
    add("b", "/two").unwrap();
}
