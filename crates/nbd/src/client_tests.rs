//! The client's handshake against our server's, against older servers, and against liars.

use super::*;
use crate::Protection;
use crate::server::{Catalog, ExportFacts, HandshakeStep, ServerHandshake};
use proptest::prelude::*;

struct One(ExportFacts);
impl Catalog for One {
    fn facts(&self, name: &str) -> Option<ExportFacts> {
        (name == "disk").then(|| self.0.clone())
    }
    fn list(&self, _: &mut dyn FnMut(&str, &str)) {}
}

fn facts() -> ExportFacts {
    ExportFacts {
        size: 1 << 20,
        flags: 0x1ded,
        description: "text".into(),
        block_sizes: (512, 4096, 1 << 20),
        contexts: vec!["x:y".into(), "base:allocation".into()],
    }
}

fn wants(mode: Mode) -> ClientWants {
    ClientWants {
        export: "disk".into(),
        mode,
        contexts: vec!["base:allocation".into(), "none:such".into()],
        tls: false,
    }
}

fn feed(
    c: &mut ClientHandshake,
    inbox: &mut Inbox,
    bytes: &[u8],
    cut: usize,
    out: &mut Outbox,
) -> Result<Option<Negotiated>> {
    let mut last = c.step(inbox, out)?;
    for piece in bytes.chunks(cut) {
        inbox.push(bytes::Bytes::copy_from_slice(piece), 8);
        last = c.step(inbox, out)?;
    }
    Ok(last.entered())
}

fn meet(mode: Mode, cut: usize, f: ExportFacts, export: &str) -> Result<Negotiated> {
    let catalog = One(f);
    let mut w = wants(mode);
    w.export = export.into();
    let (mut c, mut s) = (ClientHandshake::new(w)?, ServerHandshake::new());
    let (mut cin, mut sin, mut cout, mut sout) = (Inbox::new(), Inbox::new(), Outbox::new(), Outbox::new());
    ServerHandshake::greeting(&mut sout);
    loop {
        if let Some(n) = feed(&mut c, &mut cin, &sout.take().to_vec(), cut, &mut cout)? {
            return Ok(n);
        }
        let to_server = cout.take().contiguous();
        assert!(!to_server.is_empty(), "both wait");
        sin.push(to_server, 0);
        while let HandshakeStep::Handled = s.step(&mut sin, &mut sout, &catalog)? {}
    }
}

proptest! {
    #[test]
    fn client_and_server_agree(cut in 1usize..100, mode in 0usize..3) {
        let mode = [Mode::Simple, Mode::Structured, Mode::Extended][mode];
        let n = meet(mode, cut, facts(), "disk").unwrap();
        prop_assert_eq!(n.mode, mode);
        prop_assert_eq!((n.size, n.min_block, n.preferred_block, n.max_block), (1 << 20, 512, 4096, 1 << 20));
        prop_assert_eq!(n.description, "text");
        prop_assert_eq!(n.contexts, if mode == Mode::Simple { vec![] } else { vec![(1, "base:allocation".into())] });
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), option in 5u32..12, kind in 0u32..12) {
        let (mut c, mut i, mut o) = (ClientHandshake::new(wants(Mode::Extended)).unwrap(), Inbox::new(), Outbox::new());
        let mut s = [&MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &[0, 3]].concat();
        let len = (bytes.len() as u32).to_be_bytes();
        let kind = if kind > 4 { rep::ERROR | (kind - 4) } else { kind };
        for o in [opt::EXTENDED_HEADERS, option, opt::GO] {
            s.extend(reply(o, kind, &bytes));
        }
        s.extend(len);
        let _ = feed(&mut c, &mut i, &s, 13, &mut o);
    }
}

#[test]
fn an_unknown_export_says_which() {
    let e = meet(Mode::Extended, 9, facts(), "other").unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound);
    assert_eq!(e.message(), "Requested export not available");
    assert!(e.hint().unwrap().contains("'other'"));
}

#[test]
fn senseless_exports_are_refused() {
    for (change, text) in [
        ((|f: &mut ExportFacts| f.size = u64::MAX) as fn(&mut ExportFacts), "too large"),
        (|f| f.size = 513, "multiple"),
        (|f| f.block_sizes.0 = 3, "power of two"),
        (|f| f.block_sizes.0 = 1 << 20, "power of two"),
        (|f| f.block_sizes.1 = 5000, "preferred"),
        (|f| f.block_sizes.2 = 256, "maximum"),
    ] {
        let mut f = facts();
        change(&mut f);
        let e = meet(Mode::Structured, 50, f, "disk").unwrap_err();
        assert!(e.message().contains(text), "{text}: {e}");
    }
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    [
        &OPTION_REPLY_MAGIC.to_be_bytes()[..],
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &(data.len() as u32).to_be_bytes(),
        data,
    ]
    .concat()
}

fn greeting(flags: u16) -> Vec<u8> {
    [&MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &flags.to_be_bytes()].concat()
}

fn script(stream: &[u8], export: &str) -> Result<Option<Negotiated>> {
    let mut w = wants(Mode::Extended);
    w.export = export.into();
    let (mut i, mut o) = (Inbox::new(), Outbox::new());
    feed(&mut ClientHandshake::new(w)?, &mut i, stream, 17, &mut o)
}

#[test]
fn older_servers_are_met_where_they_stand() {
    // no extended headers, no structured replies, no GO: by export name
    let s = [
        greeting(3),
        reply(opt::EXTENDED_HEADERS, rep::ERR_UNSUP, b""),
        reply(opt::STRUCTURED_REPLY, rep::ERR_UNSUP, b""),
        reply(opt::GO, rep::ERR_UNSUP, b""),
        (1u64 << 20).to_be_bytes().to_vec(),
        vec![0, 0x6d],
    ]
    .concat();
    let n = script(&s, "disk").unwrap().unwrap();
    assert_eq!((n.size, n.flags, n.mode), (1 << 20, 0x6d, Mode::Simple));
    // newstyle that is not fixed: padding
    let s = [greeting(0), (1u64 << 20).to_be_bytes().to_vec(), vec![0, 1], vec![0; 124]].concat();
    assert_eq!(script(&s, "disk").unwrap().unwrap().flags, 1);
    // oldstyle
    let s = [
        &MAGIC.to_be_bytes()[..],
        &OLDSTYLE_MAGIC.to_be_bytes(),
        &512u64.to_be_bytes(),
        &[0, 0, 0, 5],
        &[0; 124],
    ]
    .concat();
    let n = script(&s, "").unwrap().unwrap();
    assert_eq!((n.size, n.flags), (512, 5));
    assert!(script(&s, "disk").is_err(), "oldstyle has no names");
}

#[test]
fn liars_are_named() {
    let ack = reply(opt::EXTENDED_HEADERS, rep::ACK, b"");
    let meta = |id: u32, n: &str| {
        reply(opt::SET_META_CONTEXT, rep::META_CONTEXT, &[&id.to_be_bytes()[..], n.as_bytes()].concat())
    };
    for (text, tail) in [
        ("reply magic", b"garbagegarbagegarbagegarbage".to_vec()),
        ("not asked for", [ack.clone(), meta(1, "qemu:x")].concat()),
        ("told twice", [ack.clone(), meta(1, "base:allocation"), meta(1, "none:such")].concat()),
        ("option reply of", [&reply(opt::EXTENDED_HEADERS, rep::ACK, b"")[..16], &[0xff; 8]].concat()),
        ("expected one to option 11", reply(opt::GO, rep::ACK, b"")),
        (
            "without telling its size",
            [ack.clone(), reply(opt::SET_META_CONTEXT, rep::ACK, b""), reply(opt::GO, rep::ACK, b"")]
                .concat(),
        ),
        ("needs TLS", reply(opt::EXTENDED_HEADERS, rep::ERR_TLS_REQD, b"tls please")),
        (
            "too many replies",
            [
                ack,
                reply(opt::SET_META_CONTEXT, rep::ACK, b""),
                reply(opt::GO, rep::INFO, b"\0\x09").repeat(5000),
            ]
            .concat(),
        ),
    ] {
        match script(&[greeting(3), tail].concat(), "disk") {
            Err(e) => assert!(e.message().contains(text), "{text}: {e}"),
            Ok(r) => panic!("{text}: {r:?}"),
        }
    }
    assert!(
        script(b"SSH-2.0-OpenSSH", "disk")
            .unwrap_err()
            .message()
            .contains("Bad initial magic received: 0x5353482d322e302d")
    );
}

/// Both sides with TLS wanted as told, nothing encrypted: in which order steps come is what is looked at.
fn meet_protected(client: bool, server: Protection) -> Result<Vec<&'static str>> {
    let catalog = One(facts());
    let mut c = ClientHandshake::new(ClientWants { tls: client, ..wants(Mode::Extended) })?;
    let mut s = ServerHandshake::with(server);
    let (mut cin, mut sin, mut cout, mut sout) = (Inbox::new(), Inbox::new(), Outbox::new(), Outbox::new());
    let mut seen = Vec::new();
    ServerHandshake::greeting(&mut sout);
    loop {
        cin.push(sout.take().contiguous(), 0);
        loop {
            match c.step(&mut cin, &mut cout)? {
                ClientStep::NeedBytes => break,
                ClientStep::StartTls => {
                    assert!(cout.is_empty(), "something would be said in the clear");
                    seen.push("client begins");
                }
                ClientStep::Enter(_) => return Ok(seen),
            }
        }
        sin.push(cout.take().contiguous(), 0);
        loop {
            match s.step(&mut sin, &mut sout, &catalog)? {
                HandshakeStep::Handled => {}
                HandshakeStep::StartTls => seen.push("server begins"),
                _ => break,
            }
        }
    }
}

#[test]
fn tls_begins_when_both_want_it_and_before_anything_is_told() {
    assert_eq!(meet_protected(true, Protection::Required).unwrap(), ["server begins", "client begins"]);
    assert!(meet_protected(false, Protection::None).unwrap().is_empty());
    let e = meet_protected(true, Protection::None).unwrap_err();
    assert!(e.kind() == ErrorKind::Permission && e.message().contains("starttls"), "{e}");
    let e = meet_protected(false, Protection::Required).unwrap_err();
    assert!(e.kind() == ErrorKind::Permission && e.message().contains("TLS"), "{e}");
}

#[test]
fn what_comes_in_the_clear_behind_the_agreement_is_refused() {
    let secret = [greeting(3), reply(opt::STARTTLS, rep::ACK, b""), reply(opt::GO, rep::ACK, b"")].concat();
    let protected = || ClientHandshake::new(ClientWants { tls: true, ..wants(Mode::Extended) }).unwrap();
    for cut in [secret.len(), 38 + 1, 7] {
        let (mut c, mut inbox, mut out) = (protected(), Inbox::new(), Outbox::new());
        inbox.push(bytes::Bytes::copy_from_slice(&secret[..cut]), 0);
        let first = c.step(&mut inbox, &mut out);
        if cut > 38 {
            assert!(first.unwrap_err().message().contains("did not wait"));
        }
    }
    // A server that knows no options, or is from before them, cannot protect.
    for stream in [greeting(0), [MAGIC.to_be_bytes(), OLDSTYLE_MAGIC.to_be_bytes()].concat()] {
        let (mut c, mut inbox, mut out) = (protected(), Inbox::new(), Outbox::new());
        inbox.push(stream.into(), 0);
        assert_eq!(c.step(&mut inbox, &mut out).unwrap_err().message(), "Server does not support STARTTLS");
    }
}
