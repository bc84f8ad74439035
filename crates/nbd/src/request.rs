//! Requests: parsed by a server, encoded by a client.

use crate::inbox::Inbox;
use crate::outbox::{Fields, Outbox};
use crate::proto::{
    Cmd, EXTENDED_REQUEST_MAGIC, MAX_PAYLOAD, MAX_STATUS_EXTENTS, Mode, REQUEST_MAGIC, cmd_flag,
};
use block::{Data, Span};

/// One request as the client sent it. Only framing has been checked: flags, command and span may be nonsense.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Command number; see [`Cmd::from_wire`].
    pub command: u16,
    /// Command flags.
    pub flags: u16,
    /// The client's name for the request.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Number of bytes asked for (not of the payload, where the two differ).
    pub len: u64,
    /// Bytes to write.
    pub payload: Data,
    /// A block status request that names the contexts it wants.
    pub contexts: Option<Vec<u32>>,
    /// The payload itself was malformed; the request is to be answered with "invalid".
    pub bad_payload: bool,
}

/// Why a stream of requests cannot be followed any further.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ParseError {
    /// The bytes are not a request.
    BadMagic(u32),
    /// A payload longer than [`MAX_PAYLOAD`] is announced: answer "invalid" to `cookie`, then hang up.
    PayloadTooLong {
        /// The request's cookie.
        cookie: u64,
        /// The length it claims.
        len: u64,
    },
}

impl std::fmt::Display for ParseError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ParseError::BadMagic(m) => write!(f, "a request starts with {m:#010x}"),
            ParseError::PayloadTooLong { len, .. } => {
                write!(f, "a payload of {len} bytes is longer than {MAX_PAYLOAD}")
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Header {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    len: u64,
}

impl Header {
    /// Bytes of payload that follow.
    fn payload(&self, mode: Mode) -> u64 {
        let announced = mode == Mode::Extended && self.flags & cmd_flag::PAYLOAD_LEN != 0;
        if self.command == Cmd::Write as u16 || announced { self.len } else { 0 }
    }
}

/// Finds requests in received bytes.
pub struct RequestParser {
    mode: Mode,
    header: Option<Header>,
}

impl RequestParser {
    /// For a connection that agreed on `mode`.
    pub fn new(mode: Mode) -> RequestParser {
        RequestParser { mode, header: None }
    }

    /// Payload bytes of the request whose header is known and whose payload is still incomplete, 0 if there is none.
    pub fn payload_wanted(&self) -> u64 {
        self.header.map_or(0, |h| h.payload(self.mode))
    }

    /// The next complete request, or `None` until more bytes are there.
    pub fn next(&mut self, inbox: &mut Inbox) -> Result<Option<Request>, ParseError> {
        let header = match self.header.take() {
            Some(h) => h,
            None => match self.header(inbox)? {
                Some(h) => h,
                None => return Ok(None),
            },
        };
        let want = header.payload(self.mode);
        if want > MAX_PAYLOAD {
            return Err(ParseError::PayloadTooLong { cookie: header.cookie, len: want });
        }
        let payload = if want == 0 {
            Data::empty()
        } else {
            match inbox.take(want as usize) {
                Some(p) => p,
                None => {
                    self.header = Some(header);
                    return Ok(None);
                }
            }
        };
        Ok(Some(self.finish(header, payload)))
    }

    fn header(&self, inbox: &mut Inbox) -> Result<Option<Header>, ParseError> {
        // The magic is looked at as soon as it is there, so that a wrong peer is told off at once.
        let Some(magic) = inbox.peek::<4>().map(u32::from_be_bytes) else { return Ok(None) };
        let u16_at = |b: &[u8], i: usize| u16::from_be_bytes([b[i], b[i + 1]]);
        let u64_at = |b: &[u8], i: usize| {
            u64::from_be_bytes([b[i], b[i + 1], b[i + 2], b[i + 3], b[i + 4], b[i + 5], b[i + 6], b[i + 7]])
        };
        if self.mode == Mode::Extended {
            if magic != EXTENDED_REQUEST_MAGIC {
                return Err(ParseError::BadMagic(magic));
            }
            return Ok(inbox.take_array::<32>().map(|b| Header {
                flags: u16_at(&b, 4),
                command: u16_at(&b, 6),
                cookie: u64_at(&b, 8),
                offset: u64_at(&b, 16),
                len: u64_at(&b, 24),
            }));
        }
        if magic != REQUEST_MAGIC {
            return Err(ParseError::BadMagic(magic));
        }
        Ok(inbox.take_array::<28>().map(|b| Header {
            flags: u16_at(&b, 4),
            command: u16_at(&b, 6),
            cookie: u64_at(&b, 8),
            offset: u64_at(&b, 16),
            len: u64::from(u32::from_be_bytes([b[24], b[25], b[26], b[27]])),
        }))
    }

    fn finish(&self, h: Header, payload: Data) -> Request {
        let mut r = Request {
            command: h.command,
            flags: h.flags,
            cookie: h.cookie,
            offset: h.offset,
            len: h.len,
            payload,
            contexts: None,
            bad_payload: false,
        };
        let announced = self.mode == Mode::Extended && h.flags & cmd_flag::PAYLOAD_LEN != 0;
        if !announced || h.command == Cmd::Write as u16 {
            return r;
        }
        // Announced payload of something that is no write: only a block status has a use for it.
        let p = std::mem::take(&mut r.payload);
        let ids = p.len().saturating_sub(8) / 4;
        if h.command != Cmd::BlockStatus as u16
            || p.len() < 8
            || !(p.len() - 8).is_multiple_of(4)
            || ids > MAX_STATUS_EXTENTS
        {
            r.bad_payload = true;
            return r;
        }
        let p = p.contiguous();
        let (len, ids) = p.split_at(8);
        r.len = len.iter().fold(0, |n, b| n << 8 | u64::from(*b));
        r.contexts = Some(ids.as_chunks::<4>().0.iter().map(|b| u32::from_be_bytes(*b)).collect());
        r
    }
}

/// Appends a request. `at` is what the command is about; with a payload its length must be the payload's.
/// In the compact forms its length must fit in 32 bits; the caller splits what does not.
pub fn encode_request(
    out: &mut Outbox,
    mode: Mode,
    cmd: Cmd,
    flags: u16,
    cookie: u64,
    at: Span,
    payload: Data,
) {
    debug_assert!(payload.is_empty() || payload.len() as u64 == at.len);
    if payload.is_empty() {
        return encode_header(out, mode, cmd, flags, cookie, at);
    }
    encode_announced(out, mode, cmd, flags, cookie, at);
    out.append(payload);
}

/// As [`encode_request`], of a request whose payload of `at`'s length is sent behind it by other means.
pub fn encode_announced(out: &mut Outbox, mode: Mode, cmd: Cmd, flags: u16, cookie: u64, at: Span) {
    let extended = mode == Mode::Extended;
    let flags = if extended { flags | cmd_flag::PAYLOAD_LEN } else { flags };
    encode_header(out, mode, cmd, flags, cookie, at);
}

fn encode_header(out: &mut Outbox, mode: Mode, cmd: Cmd, flags: u16, cookie: u64, at: Span) {
    if mode == Mode::Extended {
        let f = Fields::<32>::new().u32(EXTENDED_REQUEST_MAGIC).u16(flags).u16(cmd as u16);
        out.put(&f.u64(cookie).u64(at.start).u64(at.len).bytes);
    } else {
        debug_assert!(at.len <= u64::from(u32::MAX));
        let f = Fields::<28>::new().u32(REQUEST_MAGIC).u16(flags).u16(cmd as u16);
        out.put(&f.u64(cookie).u64(at.start).u32(at.len as u32).bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn arbitrary_request() -> impl Strategy<Value = (Cmd, u16, u64, u64, u32, Vec<u8>)> {
        (
            0u16..8,
            any::<u16>(),
            any::<u64>(),
            any::<u64>(),
            any::<u32>(),
            prop::collection::vec(any::<u8>(), 1..300),
        )
            .prop_map(|(c, f, k, o, l, p)| {
                let cmd = Cmd::from_wire(c).unwrap();
                let f = f & !cmd_flag::PAYLOAD_LEN;
                if cmd == Cmd::Write { (cmd, f, k, o, p.len() as u32, p) } else { (cmd, f, k, o, l, vec![]) }
            })
    }

    fn parse(
        mode: Mode,
        stream: &[u8],
        cuts: &[usize],
        copy_below: usize,
    ) -> (Vec<Request>, Option<ParseError>) {
        let (mut inbox, mut parser, mut out) = (Inbox::new(), RequestParser::new(mode), Vec::new());
        let mut at = 0;
        let mut cuts = cuts.iter().copied().cycle();
        while at < stream.len() {
            let n = cuts.next().unwrap_or(1).max(1).min(stream.len() - at);
            inbox.push(bytes::Bytes::copy_from_slice(&stream[at..at + n]), copy_below);
            at += n;
            loop {
                match parser.next(&mut inbox) {
                    Ok(Some(r)) => out.push(r),
                    Ok(None) => break,
                    Err(e) => return (out, Some(e)),
                }
            }
        }
        (out, None)
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_requests(
            reqs in prop::collection::vec(arbitrary_request(), 1..12),
            cuts in prop::collection::vec(1usize..80, 1..20),
            extended: bool,
            copy_below in 0usize..64,
        ) {
            let mode = if extended { Mode::Extended } else { Mode::Structured };
            let mut out = Outbox::new();
            for (c, f, k, o, l, p) in &reqs {
                encode_request(&mut out, mode, *c, *f, *k, Span::new(*o, u64::from(*l)), p.clone().into());
            }
            let stream = out.take().to_vec();
            let (got, err) = parse(mode, &stream, &cuts, copy_below);
            prop_assert_eq!(err, None);
            prop_assert_eq!(got.len(), reqs.len());
            for (g, (c, f, k, o, l, p)) in got.iter().zip(&reqs) {
                prop_assert_eq!(g.command, *c as u16);
                prop_assert_eq!(g.flags & !cmd_flag::PAYLOAD_LEN, *f);
                prop_assert_eq!((g.cookie, g.offset, g.len), (*k, *o, u64::from(*l)));
                prop_assert_eq!(&g.payload.to_vec(), p);
            }
        }

        #[test]
        fn random_bytes_are_an_error_or_nothing(bytes in prop::collection::vec(any::<u8>(), 0..400), magic: bool) {
            for mode in [Mode::Simple, Mode::Extended] {
                let mut b = bytes.clone();
                if magic && b.len() > 4 {
                    let m = if mode == Mode::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
                    b[..4].copy_from_slice(&m.to_be_bytes());
                }
                parse(mode, &b, &[7], 16);
            }
        }
    }

    #[test]
    fn a_payload_beyond_the_limit_is_refused_before_it_is_awaited() {
        let mut out = Outbox::new();
        encode_request(
            &mut out,
            Mode::Simple,
            Cmd::Write,
            0,
            9,
            Span::new(0, MAX_PAYLOAD + 1),
            Data::empty(),
        );
        let (got, err) = parse(Mode::Simple, &out.take().to_vec(), &[100], 0);
        assert!(got.is_empty());
        assert_eq!(err, Some(ParseError::PayloadTooLong { cookie: 9, len: MAX_PAYLOAD + 1 }));
    }

    #[test]
    fn block_status_may_name_its_contexts() {
        let body = [&77u64.to_be_bytes()[..], &3u32.to_be_bytes(), &1u32.to_be_bytes()].concat();
        let mut out = Outbox::new();
        encode_request(&mut out, Mode::Extended, Cmd::BlockStatus, 0, 1, Span::new(5, 16), body.into());
        let (got, _) = parse(Mode::Extended, &out.take().to_vec(), &[5], 0);
        assert_eq!((got[0].offset, got[0].len, got[0].bad_payload), (5, 77, false));
        assert_eq!(got[0].contexts, Some(vec![3, 1]));

        encode_request(&mut out, Mode::Extended, Cmd::Trim, 0, 1, Span::new(5, 3), vec![1, 2, 3].into());
        encode_request(&mut out, Mode::Extended, Cmd::Flush, 0, 2, Span::new(0, 0), Data::empty());
        let (got, _) = parse(Mode::Extended, &out.take().to_vec(), &[5], 0);
        assert!(got[0].bad_payload, "a trim has no payload");
        assert_eq!(got[1].cookie, 2, "and the stream goes on after it");
    }
}
