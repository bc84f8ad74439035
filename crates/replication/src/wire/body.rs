//! The payload of each type of frame.

use super::frame::{CATCH_UP, FUA, Fields, Kind, UNMAP, crc_of};
use super::message::{
    Ack, Body, Doubt, HandOver, Hello, MAX_DOUBT, MAX_TEXT, MAX_VOLUMES, Reject, VolumeInfo, Welcome,
};
use crate::ack::AckLevel;
use crate::digest::Digest;
use crate::history::{History, MAX_HISTORY};
use crate::primary::LinkPolicy;
use crate::types::{Epoch, Generation, GroupId, Seq};
use block::{BlockError, Data, Result, Span};

/// Longest range of a frame without bytes. Zeroes of any length cost a secondary one record.
pub(super) const MAX_ZERO: u32 = 1 << 30;

struct Writer(Vec<u8>);

impl Writer {
    fn new() -> Writer {
        Writer(Vec::new())
    }
    fn bytes(mut self, b: &[u8]) -> Writer {
        self.0.extend_from_slice(b);
        self
    }
    fn n16(self, n: usize) -> Writer {
        self.bytes(&u16::try_from(n).unwrap_or(u16::MAX).to_le_bytes())
    }
    fn n32(self, n: u32) -> Writer {
        self.bytes(&n.to_le_bytes())
    }
    fn n64(self, n: u64) -> Writer {
        self.bytes(&n.to_le_bytes())
    }
    fn history(mut self, h: &History) -> Writer {
        self = self.n16(h.past().len()).bytes(&[u8::from(h.now().is_some())]);
        for (g, e) in h.past().iter().copied().chain(h.now()) {
            self = self.n64(g.0).n64(e.0);
        }
        self
    }
    fn doubt(mut self, d: &Doubt) -> Writer {
        self = self.bytes(&[u8::from(d.former.is_some())]);
        if let Some((history, since)) = &d.former {
            self = self.history(history).n64(since.0);
        }
        let Some(places) = d.places.as_ref().filter(|p| p.len() <= MAX_DOUBT) else {
            return self.n32(u32::MAX);
        };
        self = self.n32(u32::try_from(places.len()).unwrap_or(u32::MAX));
        for (volume, at) in places {
            self = self.n16(usize::from(*volume)).n64(at.start).n64(at.len);
        }
        self
    }
    fn text(self, t: &str) -> Writer {
        let mut end = t.len().min(MAX_TEXT);
        while !t.is_char_boundary(end) {
            end -= 1;
        }
        self.n16(end).bytes(&t.as_bytes()[..end])
    }
    fn digest(self, d: &Digest) -> Writer {
        self.n64(d.count).n64(d.bytes).n64(d.sum)
    }
}

/// Takes numbers from the front of a payload; an error names what was cut short.
pub(super) struct Reader<'a> {
    left: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        match self.left.split_at_checked(n) {
            Some((head, rest)) => {
                self.left = rest;
                Ok(head)
            }
            None => Err(BlockError::corrupt(format!("replication peer: {} frame is too short", self.what))),
        }
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }
    fn n8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }
    fn n16(&mut self) -> Result<usize> {
        Ok(usize::from(u16::from_le_bytes(self.array()?)))
    }
    fn n32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    fn n64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    fn wrong(&self, why: &str) -> BlockError {
        BlockError::corrupt(format!("replication peer: {} frame: {why}", self.what))
    }
    fn history(&mut self) -> Result<History> {
        let (count, has_now) = (self.n16()?, self.n8()?);
        if count > MAX_HISTORY {
            return Err(self.wrong("history is too long"));
        }
        let mut pair = || Ok::<_, BlockError>((Generation(self.n64()?), Epoch(self.n64()?)));
        let mut past = Vec::new();
        for _ in 0..count {
            past.push(pair()?);
        }
        let now = if has_now != 0 { Some(pair()?) } else { None };
        History::from_parts(past, now).ok_or_else(|| self.wrong("history is out of order"))
    }
    fn doubt(&mut self) -> Result<Doubt> {
        let former = if self.n8()? != 0 { Some((self.history()?, Epoch(self.n64()?))) } else { None };
        let count = match self.n32()? {
            u32::MAX => return Ok(Doubt { former, places: None }),
            n => usize::try_from(n).ok().filter(|n| *n <= MAX_DOUBT),
        };
        let count = count.ok_or_else(|| self.wrong("too many places"))?;
        let mut places = Vec::new();
        for _ in 0..count {
            let volume = u16::from_le_bytes(self.array()?);
            let at = Span::checked(self.n64()?, self.n64()?);
            places.push((volume, at.ok_or_else(|| self.wrong("a range wraps around"))?));
        }
        Ok(Doubt { former, places: Some(places) })
    }
    fn text(&mut self) -> Result<String> {
        let len = self.n16()?;
        if len > MAX_TEXT {
            return Err(self.wrong("text is too long"));
        }
        let bytes = self.take(len)?;
        // what a peer says goes into logs and messages: no control characters
        Ok(String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
    }
    fn digest(&mut self) -> Result<Digest> {
        Ok(Digest { count: self.n64()?, bytes: self.n64()?, sum: self.n64()? })
    }
    fn end(&self) -> Result<()> {
        if self.left.is_empty() { Ok(()) } else { Err(self.wrong("bytes are left over")) }
    }
}

fn reject_parts(why: Reject) -> (u8, u64) {
    match why {
        Reject::WrongGroup => (1, 0),
        Reject::Fenced(g) => (2, g.0),
        Reject::Unrelated => (3, 0),
        Reject::SplitBrain => (4, 0),
        Reject::Volumes => (5, 0),
        Reject::Busy => (6, 0),
    }
}

/// Bytes of the payload, without making it where it is long.
pub(super) fn payload_len(body: &Body) -> u64 {
    match body {
        Body::Write { data, .. } => data.len() as u64,
        Body::Zero { .. } | Body::Resize { .. } | Body::Flush => 0,
        other => fields(other).payload.len() as u64,
    }
}

/// Header fields and payload of `body`.
pub(super) fn fields(body: &Body) -> Fields {
    let plain = |kind, w: Writer| Fields {
        kind,
        flags: 0,
        volume: 0,
        offset: 0,
        len: 0,
        payload: Data::from(w.0),
        payload_crc: None,
    };
    let none = |kind| plain(kind, Writer::new());
    match body {
        Body::Hello(h) => {
            let mut w = Writer::new().bytes(&h.group.0).history(&h.history).n16(h.volumes.len());
            for v in &h.volumes {
                w = w.n64(v.len);
            }
            plain(Kind::Hello, w)
        }
        Body::Welcome(x) => {
            plain(Kind::Welcome, Writer::new().history(&x.history).n64(x.limit).doubt(&x.doubt))
        }
        Body::Reject { why, text } => {
            let (code, generation) = reject_parts(*why);
            plain(Kind::Reject, Writer::new().bytes(&[code]).n64(generation).text(text))
        }
        Body::Write { volume, offset, data, crc, catch_up, fua } => Fields {
            kind: Kind::Write,
            flags: if *catch_up { CATCH_UP } else { 0 } | if *fua { FUA } else { 0 },
            volume: *volume,
            offset: *offset,
            len: u32::try_from(data.len()).unwrap_or(u32::MAX),
            payload: data.clone(),
            payload_crc: Some(*crc),
        },
        Body::Zero { volume, at, unmap, catch_up } => Fields {
            kind: Kind::Zero,
            flags: if *catch_up { CATCH_UP } else { 0 } | if *unmap { UNMAP } else { 0 },
            volume: *volume,
            offset: at.start,
            len: u32::try_from(at.len).unwrap_or(u32::MAX),
            payload: Data::empty(),
            payload_crc: Some(0),
        },
        Body::Resize { volume, len } => Fields { volume: *volume, offset: *len, ..none(Kind::Resize) },
        Body::Flush => none(Kind::Flush),
        Body::Ack(a) => {
            let w = Writer::new().n64(a.received.0).n64(a.written.0).n64(a.durable.0).n64(a.applied.0);
            plain(Kind::Ack, w.n64(a.limit).bytes(&[a.fill]))
        }
        Body::Nack { volume, offset, errno, text } => {
            let f = plain(Kind::Nack, Writer::new().n32(*errno).text(text));
            Fields { volume: *volume, offset: *offset, ..f }
        }
        Body::Mark { digest } => plain(Kind::Mark, Writer::new().digest(digest)),
        Body::Prepared => none(Kind::Prepared),
        Body::Veto { text } => plain(Kind::Veto, Writer::new().text(text)),
        Body::Commit => none(Kind::Commit),
        Body::Abort => none(Kind::Abort),
        Body::Committed { epoch_digest } => plain(Kind::Committed, Writer::new().digest(epoch_digest)),
        Body::Ping { sent } => plain(Kind::Ping, Writer::new().n64(*sent)),
        Body::Pong { sent } => plain(Kind::Pong, Writer::new().n64(*sent)),
        Body::Fenced { by } => plain(Kind::Fenced, Writer::new().n64(by.0)),
        Body::Bye { text } => plain(Kind::Bye, Writer::new().text(text)),
        Body::HashReq { volume, at } => {
            let len = u32::try_from(at.len).unwrap_or(u32::MAX);
            Fields { volume: *volume, offset: at.start, len, ..none(Kind::HashReq) }
        }
        Body::Hash { volume, at, hash } => {
            let len = u32::try_from(at.len).unwrap_or(u32::MAX);
            let f = plain(Kind::Hash, Writer::new().n64(*hash));
            Fields { volume: *volume, offset: at.start, len, ..f }
        }
        Body::HandOver(h) => {
            let number = |l: AckLevel| AckLevel::ALL.iter().position(|x| *x == l).unwrap_or_default() as u8;
            let policy = LinkPolicy::ALL.iter().position(|x| *x == h.policy).unwrap_or_default() as u8;
            let w = Writer::new().bytes(&[number(h.write_level), number(h.flush_level), policy]);
            let w = w.n16(usize::from(h.min_acks)).n64(h.interval_ms).n64(h.timeout_ms);
            plain(Kind::HandOver, w.text(&h.name).text(&h.address))
        }
    }
}

/// Makes a body of checked header fields and a payload whose checksum was right.
pub(super) fn parse(f: &Fields) -> Result<Body> {
    let bytes = if f.kind == Kind::Write { Default::default() } else { f.payload.contiguous() };
    let mut r = Reader { left: &bytes, what: kind_name(f.kind) };
    let body = match f.kind {
        Kind::Write => {
            if f.payload.is_empty() || f.payload.len() as u64 != u64::from(f.len) {
                return Err(r.wrong("its length is not that of its payload"));
            }
            if f.offset.checked_add(u64::from(f.len)).is_none() {
                return Err(r.wrong("the range wraps around"));
            }
            Body::Write {
                volume: f.volume,
                offset: f.offset,
                crc: f.payload_crc.unwrap_or_else(|| crc_of(&f.payload)),
                data: f.payload.clone(),
                catch_up: f.flags & CATCH_UP != 0,
                fua: f.flags & FUA != 0,
            }
        }
        Kind::Zero => {
            let at =
                Span::checked(f.offset, u64::from(f.len)).ok_or_else(|| r.wrong("the range wraps around"))?;
            if f.len == 0 || f.len > MAX_ZERO {
                return Err(r.wrong("bad length"));
            }
            Body::Zero {
                volume: f.volume,
                at,
                unmap: f.flags & UNMAP != 0,
                catch_up: f.flags & CATCH_UP != 0,
            }
        }
        Kind::Hello => {
            let (group, history, count) = (GroupId(r.array()?), r.history()?, r.n16()?);
            if count > MAX_VOLUMES {
                return Err(r.wrong("too many volumes"));
            }
            let mut volumes = Vec::new();
            for _ in 0..count {
                volumes.push(VolumeInfo { len: r.n64()? });
            }
            Body::Hello(Box::new(Hello { group, history, volumes }))
        }
        Kind::Welcome => {
            let (history, limit) = (r.history()?, r.n64()?);
            Body::Welcome(Box::new(Welcome { history, limit, doubt: r.doubt()? }))
        }
        Kind::Reject => {
            let (code, generation) = (r.n8()?, Generation(r.n64()?));
            let why = match code {
                1 => Reject::WrongGroup,
                2 => Reject::Fenced(generation),
                3 => Reject::Unrelated,
                4 => Reject::SplitBrain,
                5 => Reject::Volumes,
                6 => Reject::Busy,
                _ => return Err(r.wrong("unknown reason")),
            };
            Body::Reject { why, text: r.text()? }
        }
        Kind::Resize => Body::Resize { volume: f.volume, len: f.offset },
        Kind::Flush => Body::Flush,
        Kind::Ack => Body::Ack(Ack {
            received: Seq(r.n64()?),
            written: Seq(r.n64()?),
            durable: Seq(r.n64()?),
            applied: Seq(r.n64()?),
            limit: r.n64()?,
            fill: r.n8()?,
        }),
        Kind::Nack => Body::Nack { volume: f.volume, offset: f.offset, errno: r.n32()?, text: r.text()? },
        Kind::Mark => Body::Mark { digest: r.digest()? },
        Kind::Prepared => Body::Prepared,
        Kind::Veto => Body::Veto { text: r.text()? },
        Kind::Commit => Body::Commit,
        Kind::Abort => Body::Abort,
        Kind::Committed => Body::Committed { epoch_digest: r.digest()? },
        Kind::Ping => Body::Ping { sent: r.n64()? },
        Kind::Pong => Body::Pong { sent: r.n64()? },
        Kind::Fenced => Body::Fenced { by: Generation(r.n64()?) },
        Kind::Bye => Body::Bye { text: r.text()? },
        Kind::HashReq | Kind::Hash => {
            let at = Span::checked(f.offset, u64::from(f.len));
            // what is asked for is read at once
            let at = at.filter(|at| !at.is_empty() && at.len <= super::MAX_PAYLOAD as u64);
            let at = at.ok_or_else(|| r.wrong("bad range"))?;
            match f.kind {
                Kind::HashReq => Body::HashReq { volume: f.volume, at },
                _ => Body::Hash { volume: f.volume, at, hash: r.n64()? },
            }
        }
        Kind::HandOver => {
            let level = |n: u8| AckLevel::ALL.get(usize::from(n)).copied();
            let (write, flush, policy) = (level(r.n8()?), level(r.n8()?), r.n8()?);
            let (Some(write_level), Some(flush_level), Some(policy)) =
                (write, flush, LinkPolicy::ALL.get(usize::from(policy)).copied())
            else {
                return Err(r.wrong("unknown setting"));
            };
            let min_acks = u16::try_from(r.n16()?).unwrap_or(u16::MAX);
            let (interval_ms, timeout_ms) = (r.n64()?, r.n64()?);
            let (name, address) = (r.text()?, r.text()?);
            Body::HandOver(Box::new(HandOver {
                name,
                address,
                write_level,
                flush_level,
                min_acks,
                policy,
                interval_ms,
                timeout_ms,
            }))
        }
    };
    r.end()?;
    Ok(body)
}

/// For messages.
pub(super) const fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Hello => "HELLO",
        Kind::Welcome => "WELCOME",
        Kind::Reject => "REJECT",
        Kind::Write => "WRITE",
        Kind::Zero => "ZERO",
        Kind::Resize => "RESIZE",
        Kind::Flush => "FLUSH",
        Kind::Ack => "ACK",
        Kind::Nack => "NACK",
        Kind::Mark => "MARK",
        Kind::Prepared => "PREPARED",
        Kind::Veto => "VETO",
        Kind::Commit => "COMMIT",
        Kind::Abort => "ABORT",
        Kind::Committed => "COMMITTED",
        Kind::Ping => "PING",
        Kind::Pong => "PONG",
        Kind::Fenced => "FENCED",
        Kind::Bye => "BYE",
        Kind::HandOver => "HANDOVER",
        Kind::HashReq => "HASHREQ",
        Kind::Hash => "HASH",
    }
}
