//! The server's handshake, message by message.

use super::*;
use proptest::prelude::*;

pub(crate) struct Shop;
impl Catalog for Shop {
    fn facts(&self, name: &str) -> Option<ExportFacts> {
        (name == "a" || name.is_empty()).then(|| ExportFacts {
            size: 1 << 24,
            flags: 0x1ded,
            description: "hello".into(),
            block_sizes: (512, 4096, 32 << 20),
            contexts: vec![
                "base:allocation".into(),
                "qemu:allocation-depth".into(),
                "qemu:dirty-bitmap:b".into(),
                crate::leaf::CONTEXT.into(),
            ],
        })
    }
    fn list(&self, each: &mut dyn FnMut(&str, &str)) {
        each("a", "hello");
        each("", "");
    }
}

fn option(o: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &o.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}
fn string(s: &str) -> Vec<u8> {
    [&(s.len() as u32).to_be_bytes()[..], s.as_bytes()].concat()
}
fn go(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut v = [string(name), (infos.len() as u16).to_be_bytes().to_vec()].concat();
    infos.iter().for_each(|i| v.extend(i.to_be_bytes()));
    v
}
fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut v = [string(name), (queries.len() as u32).to_be_bytes().to_vec()].concat();
    queries.iter().for_each(|q| v.extend(string(q)));
    v
}

/// Runs a stream, cut as told; the bytes sent and how it ended.
fn run(stream: &[u8], cuts: &[usize]) -> (Vec<u8>, Result<HandshakeStep>) {
    run_with(Protection::None, stream, cuts)
}

fn run_with(p: Protection, stream: &[u8], cuts: &[usize]) -> (Vec<u8>, Result<HandshakeStep>) {
    let (mut h, mut inbox, mut out) = (ServerHandshake::with(p), Inbox::new(), Outbox::new());
    let (mut at, mut cuts) = (0, cuts.iter().cycle());
    loop {
        match h.step(&mut inbox, &mut out, &Shop) {
            Ok(HandshakeStep::NeedBytes) if at < stream.len() => {
                let n = cuts.next().map_or(1, |n| *n).min(stream.len() - at);
                inbox.push(bytes::Bytes::copy_from_slice(&stream[at..at + n]), 32);
                at += n;
            }
            Ok(HandshakeStep::Handled) => {}
            end => return (out.take().to_vec(), end),
        }
    }
}

/// (option, reply type, data) of each option reply.
fn replies(mut b: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut v = vec![];
    while b.len() >= 20 {
        let u = |i: usize| u32::from_be_bytes(b[i..i + 4].try_into().unwrap());
        let (o, t, n) = (u(8), u(12), u(16) as usize);
        v.push((o, t, b[20..20 + n].to_vec()));
        b = &b[20 + n..];
    }
    assert!(b.is_empty());
    v
}

fn flags(n: u32) -> Vec<u8> {
    n.to_be_bytes().to_vec()
}

#[test]
fn info_and_go_tell_what_is_asked() {
    let s = [flags(3), option(opt::INFO, &go("a", &[1, 3])), option(opt::GO, &go("", &[]))].concat();
    let (out, end) = run(&s, &[1000]);
    let r = replies(&out);
    let kinds: Vec<_> = r.iter().map(|(o, t, d)| (*o, *t, d.get(1).copied())).collect();
    assert_eq!(
        kinds,
        [
            (6, rep::INFO, Some(1)),
            (6, rep::INFO, Some(2)),
            (6, rep::INFO, Some(3)),
            (6, rep::INFO, Some(0)),
            (6, rep::ACK, None),
            (7, rep::INFO, Some(2)),
            (7, rep::INFO, Some(3)),
            (7, rep::INFO, Some(0)),
            (7, rep::ACK, None)
        ]
    );
    assert_eq!(r[2].2[2..6], 512u32.to_be_bytes(), "asked for: the true minimum");
    assert_eq!(r[6].2[2..6], 1u32.to_be_bytes(), "not asked for: any");
    // as QSD 10.0.2 answers a client without structured replies
    assert_eq!(r[3].2[10..], [0x0d, 0x6d]);
    assert_eq!(
        end.unwrap(),
        HandshakeStep::Enter(Agreed { export: String::new(), mode: Mode::Simple, contexts: vec![] })
    );
}

#[test]
fn modes_rise_but_do_not_fall() {
    let s = [
        flags(3),
        option(opt::SET_META_CONTEXT, &meta("a", &["base:allocation"])),
        option(opt::STRUCTURED_REPLY, b""),
        option(opt::STRUCTURED_REPLY, b""),
        option(opt::EXTENDED_HEADERS, b"x"),
        option(opt::EXTENDED_HEADERS, b""),
        option(opt::EXTENDED_HEADERS, b""),
        option(opt::STRUCTURED_REPLY, b""),
        option(opt::GO, &go("a", &[])),
    ]
    .concat();
    let (out, end) = run(&s, &[7]);
    let kinds: Vec<_> = replies(&out).iter().map(|r| r.1).collect();
    let e = [
        rep::ERR_INVALID,
        rep::ACK,
        rep::ERR_INVALID,
        rep::ERR_INVALID,
        rep::ACK,
        rep::ERR_INVALID,
        rep::ERR_EXT_HEADER_REQD,
    ];
    assert_eq!(kinds[..7], e);
    assert!(matches!(end.unwrap(), HandshakeStep::Enter(a) if a.mode == Mode::Extended));
}

#[test]
fn contexts_are_listed_by_namespace_and_set_by_name() {
    let list = |q: &[&str]| {
        let s = [flags(3), option(opt::LIST_META_CONTEXT, &meta("a", q))].concat();
        replies(&run(&s, &[99]).0).len() - 1
    };
    assert_eq!(list(&[]), 3);
    assert_eq!(list(&["liveblk:"]), 1, "not among all, but there");
    assert_eq!(list(&["base:"]), 1);
    assert_eq!(list(&["qemu:"]), 2);
    assert_eq!(list(&["qemu:dirty-bitmap:", "qemu:"]), 2);
    assert_eq!(list(&["qemu", "x:y", ""]), 0);

    let set = |name: &str, q: &[&str], then: &str| {
        let s = [
            flags(3),
            option(opt::STRUCTURED_REPLY, b""),
            option(opt::SET_META_CONTEXT, &meta(name, q)),
            option(opt::GO, &go(then, &[])),
        ]
        .concat();
        match run(&s, &[99]).1.unwrap() {
            HandshakeStep::Enter(a) => a.contexts,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        set("a", &["qemu:dirty-bitmap:b", "base:allocation", "base:allocation", "no:no"], "a"),
        [0, 2]
    );
    assert_eq!(set("a", &["base:"], "a"), [0u32; 0]);
    assert_eq!(set("", &["base:allocation"], "a"), [0u32; 0], "chosen for another export");
    assert_eq!(set("nope", &["base:allocation"], "a"), [0u32; 0]);
}

#[test]
fn nonsense_is_refused_and_the_handshake_goes_on() {
    let long = vec![b'x'; 70_000];
    let too_long_name = [&5000u32.to_be_bytes()[..], &[b'x'; 5000], &[0, 0]].concat();
    let cases: Vec<(Vec<u8>, u32)> = vec![
        (option(99, b"abc"), rep::ERR_UNSUP),
        (option(opt::LIST, b"x"), rep::ERR_INVALID),
        (option(opt::STARTTLS, b""), rep::ERR_POLICY),
        (option(opt::INFO, &go("nope", &[])), rep::ERR_UNKNOWN),
        (option(opt::INFO, b"\0\0"), rep::ERR_INVALID),
        (option(opt::INFO, &too_long_name), rep::ERR_INVALID),
        (option(opt::INFO, &[go("a", &[1]), vec![0]].concat()), rep::ERR_INVALID),
        (option(opt::GO, &go("a\0", &[])), rep::ERR_INVALID),
        (option(opt::GO, &[&[0, 0, 0, 1, 0xff], &[0u8, 0][..]].concat()), rep::ERR_INVALID),
        (option(opt::GO, &long), rep::ERR_TOO_BIG),
        (option(opt::LIST_META_CONTEXT, &[string("a"), vec![0xff; 4]].concat()), rep::ERR_INVALID),
    ];
    for (bytes, want) in cases {
        let s = [flags(3), bytes, option(opt::LIST, b""), option(opt::ABORT, b"")].concat();
        let (out, end) = run(&s, &[333]);
        let r = replies(&out);
        assert_eq!(r[0].1, want);
        assert_eq!(r[1..4].iter().map(|r| r.1).collect::<Vec<_>>(), [rep::SERVER, rep::SERVER, rep::ACK]);
        assert_eq!(end.unwrap(), HandshakeStep::Ended);
    }
}

#[test]
fn what_cannot_be_followed_ends_the_connection() {
    for s in [
        flags(0x10),
        [flags(3), b"IHAVEOPX".to_vec()].concat(),
        [flags(0), option(opt::LIST, b"")].concat(),
        [flags(3), b"IHAVEOPT".to_vec(), vec![0, 0, 0, 3, 0xff, 0xff, 0xff, 0xff]].concat(),
        [flags(3), option(opt::EXPORT_NAME, b"nope")].concat(),
        [flags(3), option(opt::EXPORT_NAME, b"\xff")].concat(),
    ] {
        assert!(run(&s, &[5]).1.is_err());
    }
}

#[test]
fn export_name_pads_for_old_clients() {
    assert_eq!(run(&[flags(0), option(opt::EXPORT_NAME, b"a")].concat(), &[3]).0.len(), 10 + 124);
    assert_eq!(run(&[flags(3), option(opt::EXPORT_NAME, b"a")].concat(), &[3]).0.len(), 10);
}

fn session() -> Vec<u8> {
    [
        flags(3),
        option(opt::LIST, b""),
        option(opt::STRUCTURED_REPLY, b""),
        option(opt::GO, &[7; 66_000]),
        option(opt::LIST_META_CONTEXT, &meta("a", &[])),
        option(opt::SET_META_CONTEXT, &meta("a", &["base:allocation"])),
        option(opt::INFO, &go("a", &[0, 1, 2, 3])),
        option(opt::GO, &go("a", &[3])),
    ]
    .concat()
}

proptest! {
    #[test]
    fn any_split_gives_the_same_session(cuts in prop::collection::vec(1usize..40_000, 1..12)) {
        let (whole, e1) = run(&session(), &[1 << 20]);
        let (cut, e2) = run(&session(), &cuts);
        prop_assert_eq!(whole, cut);
        prop_assert_eq!(e1.unwrap(), e2.unwrap());
    }

    #[test]
    fn changed_bytes_never_panic(at in prop::collection::vec((0usize..400, any::<u8>()), 1..6)) {
        let mut s = [flags(3), option(opt::STRUCTURED_REPLY, b""), option(opt::SET_META_CONTEXT, &meta("a", &["base:allocation", "x"])), option(opt::GO, &go("a", &[3, 1]))].concat();
        for (i, b) in at {
            let i = i % s.len();
            s[i] = b;
        }
        let (out, _) = run(&s, &[11]);
        prop_assert!(out.len() < 10_000);
    }
}

#[test]
fn a_server_that_requires_tls_tells_nothing_before() {
    for option in [
        opt::LIST,
        opt::STRUCTURED_REPLY,
        opt::EXTENDED_HEADERS,
        opt::INFO,
        opt::GO,
        opt::SET_META_CONTEXT,
        99,
    ] {
        let s = [flags(3), self::option(option, b""), self::option(opt::ABORT, b"")].concat();
        let (out, end) = run_with(Protection::Required, &s, &[100]);
        let r = replies(&out);
        assert_eq!(
            r.iter().map(|r| r.1).collect::<Vec<_>>(),
            [rep::ERR_TLS_REQD, rep::ACK],
            "option {option}"
        );
        assert_eq!(end.unwrap(), HandshakeStep::Ended);
    }
    let s = [flags(3), option(opt::EXPORT_NAME, b"a")].concat();
    let (out, end) = run_with(Protection::Required, &s, &[100]);
    assert!(out.is_empty() && end.is_err());
    // Said in the clear behind the request for TLS, and received with it.
    let s = [flags(3), option(opt::STARTTLS, b""), option(opt::LIST, b"")].concat();
    let (out, end) = run_with(Protection::Required, &s, &[100]);
    assert!(out.is_empty() && end.unwrap_err().message().contains("did not wait"));
    let (out, end) = run_with(Protection::Required, &s, &[20]);
    assert_eq!(replies(&out).iter().map(|r| r.1).collect::<Vec<_>>(), [rep::ACK]);
    assert_eq!(end.unwrap(), HandshakeStep::StartTls);
    let s = [flags(3), option(opt::STARTTLS, b""), option(opt::ABORT, b"")].concat();
    let (out, _) = run_with(Protection::Begun, &s, &[100]);
    assert_eq!(replies(&out).iter().map(|r| r.1).collect::<Vec<_>>(), [rep::ERR_INVALID, rep::ACK]);
}
