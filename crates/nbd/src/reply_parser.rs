//! Replies as a client reads them.
//!
//! The server is not trusted: a chunk is checked against the request that it claims to answer before any of its payload
//! is awaited, so that no more memory is taken on the server's word than we asked for ourselves.

use crate::errno::error_from_wire;
use crate::inbox::Inbox;
use crate::options::Fields;
use crate::proto::{
    EXTENDED_REPLY_MAGIC, MAX_STATUS_EXTENTS_ACCEPTED, MAX_STRING, Mode, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, chunk,
};
use crate::reply_writer::StatusExtent;
use block::{BlockError, Data, Result, Span};

/// What a request in flight is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// A read of this span.
    Read(Span),
    /// A block status of this span.
    Status(Span),
    /// Anything else: answered by success or error only.
    Plain,
}

/// The client's table of requests in flight.
pub trait Expected {
    /// The request with this cookie, if it is in flight.
    fn lookup(&self, cookie: u64) -> Option<Answer>;
}

/// One step of an answer. With `last`, nothing more will come for the cookie.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub enum Reply {
    /// Bytes of a read.
    Data { cookie: u64, offset: u64, data: Data, last: bool },
    /// Zeroes of a read.
    Hole { cookie: u64, hole: Span, last: bool },
    /// Extents from the start of the span that was asked for, cut at its end, none of them empty.
    Status { cookie: u64, context: u32, extents: Vec<StatusExtent>, last: bool },
    /// The request failed.
    Error { cookie: u64, error: BlockError, last: bool },
    /// The request is done, without (further) content.
    Done { cookie: u64 },
}

#[derive(Clone, Copy)]
struct Header {
    kind: u16,
    flags: u16,
    cookie: u64,
    len: u64,
    answer: Answer,
}

#[derive(Clone, Copy)]
enum Pending {
    SimpleData { cookie: u64, span: Span },
    Chunk(Header),
}

/// Finds replies in received bytes.
pub struct ReplyParser {
    mode: Mode,
    pending: Option<Pending>,
}

fn bad<T>(what: impl std::fmt::Display) -> Result<T> {
    Err(BlockError::corrupt(format!("NBD server broke the protocol: {what}")))
}

impl ReplyParser {
    /// For a connection that agreed on `mode`.
    pub fn new(mode: Mode) -> ReplyParser {
        ReplyParser { mode, pending: None }
    }

    /// Bytes that the reply now being received still lacks, as far as that is known: a hint for the next receive.
    pub fn wanted(&self, inbox: &Inbox) -> usize {
        let want = match self.pending {
            Some(Pending::SimpleData { span, .. }) => span.len,
            Some(Pending::Chunk(h)) => h.len,
            None => 0,
        };
        (want as usize).saturating_sub(inbox.len())
    }

    /// The next complete reply, or `None` until more bytes are there. After an error the connection is useless.
    pub fn next(&mut self, inbox: &mut Inbox, expected: &dyn Expected) -> Result<Option<Reply>> {
        if self.pending.is_none() {
            match self.header(inbox, expected)? {
                Some(Ok(reply)) => return Ok(Some(reply)),
                Some(Err(pending)) => self.pending = Some(pending),
                None => return Ok(None),
            }
        }
        let Some(pending) = self.pending else { return Ok(None) };
        let want = match pending {
            Pending::SimpleData { span, .. } => span.len,
            Pending::Chunk(h) => h.len,
        };
        let Some(payload) = inbox.take(want as usize) else { return Ok(None) };
        self.pending = None;
        match pending {
            Pending::SimpleData { cookie, span } => {
                Ok(Some(Reply::Data { cookie, offset: span.start, data: payload, last: true }))
            }
            Pending::Chunk(h) => content(h, payload).map(Some),
        }
    }

    /// A reply that is complete with its header (`Ok`), or what to wait for (`Err`).
    fn header(&self, inbox: &mut Inbox, expected: &dyn Expected) -> Result<Option<Result<Reply, Pending>>> {
        let Some(magic) = inbox.peek::<4>().map(u32::from_be_bytes) else { return Ok(None) };
        match magic {
            SIMPLE_REPLY_MAGIC if self.mode != Mode::Extended => {
                let Some(b) = inbox.take_array::<16>() else { return Ok(None) };
                self.simple(&b, expected).map(Some)
            }
            STRUCTURED_REPLY_MAGIC if self.mode == Mode::Structured => {
                let Some(b) = inbox.take_array::<20>() else { return Ok(None) };
                chunk_header(&b, false, expected).map(|h| Some(Err(Pending::Chunk(h))))
            }
            EXTENDED_REPLY_MAGIC if self.mode == Mode::Extended => {
                let Some(b) = inbox.take_array::<32>() else { return Ok(None) };
                chunk_header(&b, true, expected).map(|h| Some(Err(Pending::Chunk(h))))
            }
            other => bad(format_args!("a reply starts with {other:#010x}")),
        }
    }

    fn simple(&self, b: &[u8; 16], expected: &dyn Expected) -> Result<Result<Reply, Pending>> {
        let mut f = Fields::new(&b[4..]);
        let (Ok(error), Ok(cookie)) = (f.u32(), f.u64()) else { return bad("short reply") };
        let Some(answer) = expected.lookup(cookie) else {
            return bad(format_args!("a reply to request {cookie:#x}, which is not in flight"));
        };
        if error != 0 {
            return Ok(Ok(Reply::Error { cookie, error: error_from_wire(error, ""), last: true }));
        }
        match answer {
            Answer::Plain => Ok(Ok(Reply::Done { cookie })),
            Answer::Read(span) if self.mode == Mode::Simple => Ok(Err(Pending::SimpleData { cookie, span })),
            Answer::Read(_) => bad("a simple reply to a read, where replies are structured"),
            Answer::Status(_) => bad("a simple reply to a block status request"),
        }
    }
}

fn chunk_header(b: &[u8], extended: bool, expected: &dyn Expected) -> Result<Header> {
    let mut f = Fields::new(&b[4..]);
    let mut read = || -> Result<(u16, u16, u64, u64), String> {
        let (flags, kind, cookie) = (f.u16()?, f.u16()?, f.u64()?);
        let len = if extended {
            f.u64()?; // the request's offset once more: nothing depends on it
            f.u64()?
        } else {
            u64::from(f.u32()?)
        };
        Ok((flags, kind, cookie, len))
    };
    let Ok((flags, kind, cookie, len)) = read() else { return bad("short chunk") };
    let Some(answer) = expected.lookup(cookie) else {
        return bad(format_args!("a chunk for request {cookie:#x}, which is not in flight"));
    };
    let allowed = match (kind, answer) {
        (chunk::NONE, _) => len == 0 && flags & chunk::DONE != 0,
        (chunk::OFFSET_DATA, Answer::Read(span)) => len > 8 && len - 8 <= span.len,
        (chunk::OFFSET_HOLE, Answer::Read(_)) => len == 12,
        (chunk::BLOCK_STATUS, Answer::Status(_)) => {
            !extended && len >= 12 && (len - 4).is_multiple_of(8) && len / 8 <= MAX_STATUS_EXTENTS_ACCEPTED
        }
        (chunk::BLOCK_STATUS_EXT, Answer::Status(_)) => {
            extended && len >= 24 && (len - 8).is_multiple_of(16) && len / 16 <= MAX_STATUS_EXTENTS_ACCEPTED
        }
        (k, _) if k & chunk::ERROR_BIT != 0 => len >= 6 && len <= 6 + MAX_STRING as u64 + 8,
        _ => false,
    };
    if !allowed {
        return bad(format_args!(
            "a chunk of type {kind:#x}, flags {flags:#x}, length {len} in answer to {answer:?}"
        ));
    }
    Ok(Header { kind, flags, cookie, len, answer })
}

fn content(h: Header, mut payload: Data) -> Result<Reply> {
    let (cookie, last) = (h.cookie, h.flags & chunk::DONE != 0);
    if h.kind == chunk::OFFSET_DATA {
        let head = payload.split_to(8).contiguous();
        let offset = head.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let inside = Span::checked(offset, payload.len() as u64)
            .is_some_and(|s| matches!(h.answer, Answer::Read(r) if r.contains(&s)));
        if !inside {
            return bad(format_args!("data at {offset} in answer to {:?}", h.answer));
        }
        return Ok(Reply::Data { cookie, offset, data: payload, last });
    }
    let bytes = payload.contiguous();
    let parsed =
        match (h.kind, h.answer) {
            (chunk::NONE, _) => Ok(Reply::Done { cookie }),
            (chunk::OFFSET_HOLE, Answer::Read(span)) => {
                hole(&bytes, span).map(|hole| Reply::Hole { cookie, hole, last })
            }
            (chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT, Answer::Status(span)) => {
                status(&bytes, span, h.kind == chunk::BLOCK_STATUS_EXT)
                    .map(|(context, extents)| Reply::Status { cookie, context, extents, last })
            }
            _ => error(&bytes).map(|error| Reply::Error { cookie, error, last }),
        };
    parsed.or_else(bad)
}

fn hole(bytes: &[u8], read: Span) -> Result<Span, String> {
    let mut f = Fields::new(bytes);
    let (offset, len) = (f.u64()?, u64::from(f.u32()?));
    Span::checked(offset, len)
        .filter(|s| len > 0 && read.contains(s))
        .ok_or_else(|| format!("a hole at {offset} of {len} bytes in the read of {read}"))
}

fn status(bytes: &[u8], asked: Span, extended: bool) -> Result<(u32, Vec<StatusExtent>), String> {
    let mut f = Fields::new(bytes);
    let context = f.u32()?;
    let n = if extended {
        let (count, there) = (f.u32()?, (bytes.len() - 8) / 16);
        if count as usize != there {
            return Err(format!("a block status chunk says {count} extents and has {there}"));
        }
        there
    } else {
        (bytes.len() - 4) / 8
    };
    let (mut extents, mut left) = (Vec::with_capacity(n), asked.len);
    for i in 0..n {
        let (len, flags) =
            if extended { (f.u64()?, f.u64()?) } else { (u64::from(f.u32()?), u64::from(f.u32()?)) };
        if len == 0 {
            return Err("an extent of length 0".to_owned());
        }
        // Only the last extent may reach past what was asked for.
        if left == 0 || (len > left && i + 1 < n) {
            return Err(format!("extents past the end of {asked}"));
        }
        extents.push(StatusExtent { len: len.min(left), flags });
        left -= len.min(left);
    }
    Ok((context, extents))
}

fn error(bytes: &[u8]) -> Result<BlockError, String> {
    let mut f = Fields::new(bytes);
    let (wire, n) = (f.u32()?, f.u16()?);
    if wire == 0 {
        return Err("an error chunk without an error".to_owned());
    }
    Ok(error_from_wire(wire, &String::from_utf8_lossy(f.bytes(usize::from(n))?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assembly::ReadAssembly;
    use crate::outbox::Outbox;
    use crate::reply_writer::ReplyWriter;
    use proptest::prelude::*;

    struct Table(Vec<(u64, Answer)>);
    impl Expected for Table {
        fn lookup(&self, cookie: u64) -> Option<Answer> {
            self.0.iter().find(|(c, _)| *c == cookie).map(|(_, a)| *a)
        }
    }

    fn parse(mode: Mode, stream: &[u8], cut: &[usize], t: &Table) -> (Vec<Reply>, Option<BlockError>) {
        let (mut inbox, mut p, mut out, mut at) = (Inbox::new(), ReplyParser::new(mode), vec![], 0);
        let mut cut = cut.iter().cycle();
        while at < stream.len() {
            let n = cut.next().map_or(1, |n| *n).min(stream.len() - at);
            inbox.push(bytes::Bytes::copy_from_slice(&stream[at..at + n]), 16);
            at += n;
            loop {
                match p.next(&mut inbox, t) {
                    Ok(Some(r)) => out.push(r),
                    Ok(None) => break,
                    Err(e) => return (out, Some(e)),
                }
            }
        }
        (out, None)
    }

    fn table() -> Table {
        let s = Span::new(1000, 200_000);
        Table(vec![(1, Answer::Read(s)), (2, Answer::Plain), (3, Answer::Status(s)), (4, Answer::Read(s))])
    }

    proptest! {
        #[test]
        fn what_our_server_writes_our_client_reads(
            cut in prop::collection::vec(1usize..5000, 1..10),
            mode in 0..3,
            zero_pieces in prop::collection::vec(any::<bool>(), 1..4),
        ) {
            let mode = [Mode::Simple, Mode::Structured, Mode::Extended][mode as usize];
            let mut data: Data =
                zero_pieces.iter().map(|z| if *z { Data::zeroes(65536) } else { vec![3; 65536].into() }).collect();
            data = data.slice(0, data.len().min(200_000));
            let span = Span::new(1000, data.len() as u64);
            let t = Table(vec![(1, Answer::Read(span)), (2, Answer::Plain), (3, Answer::Status(span)), (4, Answer::Read(span))]);
            let (w, mut o) = (ReplyWriter::new(mode), Outbox::new());
            let ext = vec![StatusExtent { len: 500, flags: 3 }, StatusExtent { len: 100, flags: 0 }];
            w.read(&mut o, 1, 1000, data.clone(), false);
            w.ok(&mut o, 2, 0);
            if mode != Mode::Simple { w.status(&mut o, 3, 1000, &[(7, ext.clone()), (8, ext.clone())]); }
            w.error(&mut o, 4, 1000, 28, "full");
            let (replies, err) = parse(mode, &o.take().to_vec(), &cut, &t);
            prop_assert!(err.is_none(), "{:?}", err);
            let mut read = ReadAssembly::new(span);
            let (mut contexts, mut done, mut failed) = (vec![], 0, 0);
            for r in replies {
                match r {
                    Reply::Data { cookie: 1, offset, data, .. } => read.data(offset, data).unwrap(),
                    Reply::Hole { cookie: 1, hole, .. } => read.hole(hole).unwrap(),
                    Reply::Status { cookie: 3, context, extents, .. } => {
                        prop_assert_eq!(&extents, &ext);
                        contexts.push(context);
                    }
                    Reply::Error { cookie: 4, error, last } => {
                        prop_assert!(last && error.errno() == BlockError::ENOSPC);
                        failed += 1;
                    }
                    Reply::Done { cookie: 2 } => done += 1,
                    other => prop_assert!(false, "{:?}", other),
                }
            }
            prop_assert_eq!((done, failed), (1, 1));
            prop_assert_eq!(contexts, if mode == Mode::Simple { vec![] } else { vec![7, 8] });
            prop_assert_eq!(read.finish().unwrap(), data);
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0usize..12, cookie in 1u64..6) {
            // a plausible header, so that the fuzz gets past it
            let kinds = [0u16, 1, 2, 5, 6, 0x8001, 0x8002, 0x8003, 3, 4, 7, 1];
            for (mode, magic) in [(Mode::Simple, SIMPLE_REPLY_MAGIC), (Mode::Structured, STRUCTURED_REPLY_MAGIC), (Mode::Extended, EXTENDED_REPLY_MAGIC)] {
                let mut b = bytes.clone();
                parse(mode, &b, &[9], &table());
                if b.len() >= 32 {
                    b[..4].copy_from_slice(&magic.to_be_bytes());
                    b[6..8].copy_from_slice(&kinds[kind].to_be_bytes());
                    b[8..16].copy_from_slice(&cookie.to_be_bytes());
                    b[16..18].fill(0);
                    b[24..31].fill(0);
                    parse(mode, &b, &[13], &table());
                }
            }
        }
    }

    fn chunk_bytes(kind: u16, flags: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
        [
            &STRUCTURED_REPLY_MAGIC.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            &cookie.to_be_bytes(),
            &(body.len() as u32).to_be_bytes(),
            body,
        ]
        .concat()
    }

    #[test]
    fn misbehaviour_of_a_server_is_named() {
        let be = |v: u64| v.to_be_bytes().to_vec();
        let e = |len: u32, flags: u32| [len.to_be_bytes(), flags.to_be_bytes()].concat();
        let cases: Vec<(&str, Vec<u8>)> = vec![
            ("not in flight", chunk_bytes(1, 1, 99, &[0; 20])),
            ("type 0x1,", chunk_bytes(1, 1, 2, &[0; 20])),
            ("data at 0", chunk_bytes(1, 1, 1, &[0; 20])),
            ("data at 18446744073709551615", chunk_bytes(1, 1, 1, &[0xff; 20])),
            ("type 0x1,", chunk_bytes(1, 1, 1, &vec![0; 200_009])),
            ("type 0x0,", chunk_bytes(0, 0, 2, &[])),
            ("a hole at 1000 of 0", chunk_bytes(2, 1, 1, &[be(1000), vec![0; 4]].concat())),
            ("a hole at 1000 of 4294967295", chunk_bytes(2, 1, 1, &[be(1000), vec![0xff; 4]].concat())),
            ("extent of length 0", chunk_bytes(5, 1, 3, &[vec![0; 4], e(0, 0)].concat())),
            ("past the end", chunk_bytes(5, 1, 3, &[vec![0; 4], e(200_000, 0), e(1, 0)].concat())),
            ("past the end", chunk_bytes(5, 1, 3, &[vec![0; 4], e(200_001, 0), e(1, 0)].concat())),
            ("type 0x5,", chunk_bytes(5, 1, 3, &[0; 13])),
            ("without an error", chunk_bytes(0x8001, 1, 2, &[0; 6])),
            ("inside a field", chunk_bytes(0x8001, 1, 2, &[0, 0, 0, 5, 0, 9])),
            ("starts with", b"garbage!".to_vec()),
            ("simple reply to a read", [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &[0; 4], &be(1)].concat()),
        ];
        for (text, stream) in cases {
            let (_, err) = parse(Mode::Structured, &stream, &[1000], &table());
            let err = err.unwrap_or_else(|| panic!("{text}: accepted"));
            assert!(err.message().contains(text), "{text}: {err}");
        }
    }

    #[test]
    fn the_last_extent_may_reach_further() {
        let body = [vec![0; 4], vec![0, 0, 0, 9, 0, 0, 0, 3], vec![0xff; 4], vec![0; 4]].concat();
        let (r, err) = parse(Mode::Structured, &chunk_bytes(5, 1, 3, &body), &[1000], &table());
        assert!(err.is_none());
        let Reply::Status { extents, .. } = &r[0] else { panic!("{r:?}") };
        assert_eq!(extents[1].len, 200_000 - 9);
    }
}
