//! The NBD protocol without I/O, both roles, against a peer that says anything.
//!
//! What must stay true: the way a stream is cut into pieces changes nothing; what a server says is well-formed and bounded by what it
//! was asked; a client believes nothing outside of what it asked for, and waits for no more than that.

use crate::choice;
use ::nbd::proto::{MAX_PAYLOAD, OPTION_REPLY_MAGIC};
use ::nbd::{
    Agreed, Answer, Catalog, ClientHandshake, ClientStep, ClientWants, Expected, ExportFacts, HandshakeStep,
    Inbox, Mode, Outbox, Protection, Reply, ReplyParser, Request, RequestParser, ServerHandshake,
};
use block::Span;
use bytes::Bytes;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// The name by which the targets know their export.
pub(crate) const NAME: &str = "disk";
/// Pieces shorter than this are copied: between the lengths of the pieces that streams are cut into.
const COPY_BELOW: usize = 24;
/// More than a server says to any one option.
const MOST_A_REPLY: usize = 8192;

/// A server's only export, under [`NAME`] and as the default.
pub(crate) struct Shop(pub(crate) ExportFacts);

impl Shop {
    fn new() -> Shop {
        Shop(ExportFacts {
            size: 1 << 24,
            flags: 0x1ded,
            description: "hello".into(),
            block_sizes: (512, 4096, 32 << 20),
            contexts: vec![
                "base:allocation".into(),
                "qemu:allocation-depth".into(),
                "qemu:dirty-bitmap:b".into(),
            ],
        })
    }
}

impl Catalog for Shop {
    fn facts(&self, name: &str) -> Option<ExportFacts> {
        (name == NAME || name.is_empty()).then(|| self.0.clone())
    }
    fn list(&self, each: &mut dyn FnMut(&str, &str)) {
        each(NAME, &self.0.description);
        each("", &self.0.description);
    }
}

/// What came of a client's stream.
#[derive(PartialEq, Debug)]
struct Served {
    said: Vec<u8>,
    agreed: Option<Agreed>,
    requests: Vec<Request>,
    end: String,
}

/// A server's whole life with one client that sends `stream` in pieces of `cut` bytes.
fn serve(protection: Protection, stream: &[u8], cut: usize) -> Served {
    let (mut hand, mut inbox, mut out) = (ServerHandshake::with(protection), Inbox::new(), Outbox::new());
    let mut served = Served { said: Vec::new(), agreed: None, requests: Vec::new(), end: String::new() };
    let (shop, mut parser) = (Shop::new(), None);
    let mut pieces = stream.chunks(cut.max(1));
    loop {
        let wants_more = match &mut parser {
            None => match hand.step(&mut inbox, &mut out, &shop) {
                Ok(HandshakeStep::NeedBytes) => true,
                Ok(HandshakeStep::Handled) => false,
                Ok(HandshakeStep::Enter(agreed)) => {
                    parser = Some(RequestParser::new(agreed.mode));
                    served.agreed = Some(agreed);
                    false
                }
                Ok(end) => {
                    served.end = format!("{end:?}");
                    break;
                }
                Err(e) => {
                    served.end = e.to_string();
                    break;
                }
            },
            Some(p) => match p.next(&mut inbox) {
                Ok(None) => true,
                Ok(Some(r)) => {
                    assert!(r.payload.len() as u64 <= MAX_PAYLOAD, "a payload of {} bytes", r.payload.len());
                    served.requests.push(r);
                    false
                }
                Err(e) => {
                    served.end = e.to_string();
                    break;
                }
            },
        };
        served.said.extend(out.take().to_vec());
        if wants_more {
            let Some(piece) = pieces.next() else { break };
            inbox.push(Bytes::copy_from_slice(piece), COPY_BELOW);
        }
    }
    served.said.extend(out.take().to_vec());
    served
}

/// The option replies are whole, and none is longer than there is reason for; gives what follows them.
fn well_formed(mut said: &[u8]) -> &[u8] {
    const REPLY: [u8; 8] = OPTION_REPLY_MAGIC.to_be_bytes();
    while said.starts_with(&REPLY) {
        let len = u32::from_be_bytes([said[16], said[17], said[18], said[19]]) as usize;
        assert!(len <= MOST_A_REPLY, "an option reply of {len} bytes");
        said = said.get(20 + len..).unwrap_or_else(|| panic!("an option reply of {len} bytes is not whole"));
    }
    said
}

/// A server and any client.
pub(crate) fn server(bytes: &[u8]) {
    let Some((first, stream)) = choice(bytes) else { return };
    let protection = [Protection::None, Protection::Required, Protection::Begun][first % 3];
    let whole = serve(protection, stream, stream.len());
    let rest = well_formed(&whole.said);
    // what EXPORT_NAME is answered with has no header
    assert!(matches!(rest.len(), 0 | 10 | 134), "{} bytes behind the option replies", rest.len());
    assert!(rest.is_empty() || whole.agreed.is_some(), "{rest:?} where nothing was agreed on");
    if protection != Protection::Required {
        assert_eq!(whole, serve(protection, stream, first / 3 % 29 + 1), "cut into pieces");
    } else {
        // whether something was said in the clear behind STARTTLS depends on when it came: it counts for nothing in any case
        assert!(whole.agreed.is_none(), "an export without TLS");
    }
}

/// The requests of a client that are on their way.
struct Flying(RefCell<BTreeMap<u64, Answer>>);

impl Expected for Flying {
    fn lookup(&self, cookie: u64) -> Option<Answer> {
        self.0.borrow().get(&cookie).copied()
    }
}

/// A client's whole life with a server that sends `stream` in pieces of `cut` bytes: all it made of it, as text.
fn ask(mode: Mode, stream: &[u8], cut: usize) -> Vec<String> {
    let wants = ClientWants {
        export: NAME.into(),
        mode,
        contexts: vec!["base:allocation".into(), "qemu:dirty-bitmap:b".into()],
        tls: false,
    };
    let Ok(mut hand) = ClientHandshake::new(wants) else { panic!("a client cannot begin") };
    let (mut inbox, mut out, mut heard) = (Inbox::new(), Outbox::new(), Vec::new());
    let span = |start, len| Span::new(start, len);
    let flying = Flying(RefCell::new(BTreeMap::from([
        (1, Answer::Read(span(0, 65536))),
        (2, Answer::Status(span(0, 1 << 20))),
        (3, Answer::Plain),
        (4, Answer::Read(span(4096, 512))),
        (5, Answer::Status(span(1 << 40, 1 << 30))),
    ])));
    let mut parser: Option<ReplyParser> = None;
    let mut pieces = stream.chunks(cut.max(1));
    loop {
        let step = match &mut parser {
            None => hand.step(&mut inbox, &mut out).map(|step| match step {
                ClientStep::NeedBytes => None,
                ClientStep::StartTls => panic!("TLS that was not asked for"),
                ClientStep::Enter(n) => {
                    assert!(n.min_block.is_power_of_two() && n.min_block <= 65536, "{n:?}");
                    assert!(n.max_block >= n.min_block && n.size % u64::from(n.min_block) == 0, "{n:?}");
                    assert!(n.size <= i64::MAX as u64 && n.contexts.len() <= 2, "{n:?}");
                    parser = Some(ReplyParser::new(n.mode));
                    Some(format!("{n:?}"))
                }
            }),
            Some(p) => {
                assert!(p.wanted(&inbox) <= 2 << 20, "it waits for {} bytes", p.wanted(&inbox));
                p.next(&mut inbox, &flying).map(|r| {
                    r.map(|r| {
                        believe(&r, &flying);
                        format!("{r:?}")
                    })
                })
            }
        };
        match step {
            Ok(Some(event)) => heard.push(event),
            Ok(None) => {
                let Some(piece) = pieces.next() else { return heard };
                inbox.push(Bytes::copy_from_slice(piece), COPY_BELOW);
            }
            Err(e) => {
                heard.push(e.to_string());
                return heard;
            }
        }
    }
}

/// Every reply is one to something that was asked, and says nothing beyond it.
fn believe(reply: &Reply, flying: &Flying) {
    let (cookie, last) = match reply {
        Reply::Data { cookie, last, .. }
        | Reply::Hole { cookie, last, .. }
        | Reply::Status { cookie, last, .. }
        | Reply::Error { cookie, last, .. } => (*cookie, *last),
        Reply::Done { cookie } => (*cookie, true),
    };
    let Some(asked) = flying.lookup(cookie) else { panic!("{reply:?} to nothing that was asked") };
    match (reply, asked) {
        (Reply::Data { offset, data, .. }, Answer::Read(at)) => {
            let got = Span::checked(*offset, data.len() as u64);
            assert!(got.is_some_and(|got| at.contains(&got)), "{got:?} in {at}");
        }
        (Reply::Hole { hole, .. }, Answer::Read(at)) => assert!(at.contains(hole), "{hole} in {at}"),
        (Reply::Status { extents, .. }, Answer::Status(at)) => {
            assert!(extents.iter().all(|e| e.len > 0), "an empty extent");
            assert!(extents.iter().map(|e| e.len).sum::<u64>() <= at.len, "extents beyond {at}");
        }
        (Reply::Error { .. } | Reply::Done { .. }, _) => {}
        (reply, asked) => panic!("{reply:?} to {asked:?}"),
    }
    if last {
        flying.0.borrow_mut().remove(&cookie);
    }
}

/// A client and any server.
pub(crate) fn client(bytes: &[u8]) {
    let Some((first, stream)) = choice(bytes) else { return };
    let mode = [Mode::Simple, Mode::Structured, Mode::Extended][first % 3];
    let whole = ask(mode, stream, stream.len());
    assert_eq!(whole, ask(mode, stream, first / 3 % 29 + 1), "cut into pieces");
}
