//! Replies of a server.

use crate::outbox::{Fields, Outbox};
use crate::proto::{
    EXTENDED_REPLY_MAGIC, MAX_STRING, Mode, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk,
};
use block::{Data, is_zero};

/// Pieces in which a read is looked through for zeroes: small enough to find the holes of usual file systems and
/// clusters, long enough that a chunk header costs nothing.
const ZERO_PIECE: usize = 64 * 1024;

/// One run of equal status.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StatusExtent {
    /// Bytes.
    pub len: u64,
    /// What the context says of them.
    pub flags: u64,
}

/// Writes replies in the form that a connection agreed on.
#[derive(Clone, Copy)]
pub struct ReplyWriter {
    mode: Mode,
}

impl ReplyWriter {
    /// For a connection that agreed on `mode`.
    pub fn new(mode: Mode) -> ReplyWriter {
        ReplyWriter { mode }
    }

    fn chunk(&self, out: &mut Outbox, cookie: u64, offset: u64, kind: u16, last: bool, len: usize) {
        let flags = if last { chunk::DONE } else { 0 };
        if self.mode == Mode::Extended {
            let f = Fields::<32>::new().u32(EXTENDED_REPLY_MAGIC).u16(flags).u16(kind).u64(cookie);
            out.put(&f.u64(offset).u64(len as u64).bytes);
        } else {
            let f = Fields::<20>::new().u32(STRUCTURED_REPLY_MAGIC).u16(flags).u16(kind).u64(cookie);
            out.put(&f.u32(len as u32).bytes);
        }
    }

    fn simple(out: &mut Outbox, cookie: u64, error: u32) {
        out.put(&Fields::<16>::new().u32(SIMPLE_REPLY_MAGIC).u32(error).u64(cookie).bytes);
    }

    /// A request that is no read went well.
    pub fn ok(&self, out: &mut Outbox, cookie: u64, offset: u64) {
        match self.mode {
            Mode::Simple | Mode::Structured => Self::simple(out, cookie, 0),
            Mode::Extended => self.chunk(out, cookie, offset, chunk::NONE, true, 0),
        }
    }

    /// A request failed. `message` is cut to what the protocol allows.
    pub fn error(&self, out: &mut Outbox, cookie: u64, offset: u64, wire: u32, message: &str) {
        if self.mode == Mode::Simple {
            return Self::simple(out, cookie, wire);
        }
        let cut = message.floor_char_boundary(message.len().min(MAX_STRING));
        self.chunk(out, cookie, offset, chunk::ERROR, true, 6 + cut);
        out.put(&Fields::<6>::new().u32(wire).u16(cut as u16).bytes);
        out.put(&message.as_bytes()[..cut]);
    }

    /// The bytes of a read at `offset`. Without `whole` (the client did not say "don't fragment"), runs of zeroes are
    /// sent as holes where replies are structured.
    pub fn read(&self, out: &mut Outbox, cookie: u64, offset: u64, data: Data, whole: bool) {
        if self.mode == Mode::Simple {
            Self::simple(out, cookie, 0);
            return out.append(data);
        }
        if data.is_empty() {
            return self.chunk(out, cookie, offset, chunk::NONE, true, 0);
        }
        if whole {
            return self.data(out, cookie, offset, offset, data, true);
        }
        let mut at = offset;
        for (zero, run, last) in Runs::new(data) {
            let len = run.len() as u64;
            if zero {
                self.chunk(out, cookie, offset, chunk::OFFSET_HOLE, last, 12);
                out.put(&Fields::<12>::new().u64(at).u32(len as u32).bytes);
            } else {
                self.data(out, cookie, offset, at, run, last);
            }
            at += len;
        }
    }

    fn data(&self, out: &mut Outbox, cookie: u64, request: u64, at: u64, data: Data, last: bool) {
        self.chunk(out, cookie, request, chunk::OFFSET_DATA, last, 8 + data.len());
        out.put(&at.to_be_bytes());
        out.append(data);
    }

    /// One chunk for each context of a block status request; `contexts` is not empty.
    pub fn status(&self, out: &mut Outbox, cookie: u64, offset: u64, contexts: &[(u32, Vec<StatusExtent>)]) {
        for (i, (id, extents)) in contexts.iter().enumerate() {
            let last = i + 1 == contexts.len();
            if self.mode == Mode::Extended {
                self.chunk(out, cookie, offset, chunk::BLOCK_STATUS_EXT, last, 8 + 16 * extents.len());
                out.put(&Fields::<8>::new().u32(*id).u32(extents.len() as u32).bytes);
                extents.iter().for_each(|e| out.put(&Fields::<16>::new().u64(e.len).u64(e.flags).bytes));
            } else {
                self.chunk(out, cookie, offset, chunk::BLOCK_STATUS, last, 4 + 8 * extents.len());
                out.put(&id.to_be_bytes());
                for e in extents {
                    // a request of the compact form asks for less than 4 GiB, so nothing longer is answered
                    let len = e.len.min(u64::from(u32::MAX)) as u32;
                    out.put(&Fields::<8>::new().u32(len).u32(e.flags as u32).bytes);
                }
            }
        }
    }
}

/// Cuts a rope into runs that are all zero or not, without copying.
struct Runs {
    left: Data,
    /// The kind and length of the run that starts `left`, as far as it is known.
    ahead: Option<(bool, usize)>,
}

impl Runs {
    fn new(left: Data) -> Runs {
        Runs { left, ahead: None }
    }
}

impl Iterator for Runs {
    type Item = (bool, Data, bool);

    fn next(&mut self) -> Option<(bool, Data, bool)> {
        if self.left.is_empty() {
            return None;
        }
        let (mut kind, mut len) = self.ahead.take().map_or((None, 0), |(k, n)| (Some(k), n));
        let mut skip = len;
        'parts: for part in self.left.parts() {
            if skip >= part.len() {
                skip -= part.len();
                continue;
            }
            for piece in part[std::mem::take(&mut skip)..].chunks(ZERO_PIECE) {
                let zero = is_zero(piece);
                if *kind.get_or_insert(zero) != zero {
                    self.ahead = Some((zero, piece.len()));
                    break 'parts;
                }
                len += piece.len();
            }
        }
        let run =
            if len == self.left.len() { std::mem::take(&mut self.left) } else { self.left.split_to(len) };
        Some((kind.unwrap_or(false), run, self.left.is_empty()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(d: Data) -> Vec<(bool, usize, bool)> {
        Runs::new(d).map(|(z, d, l)| (z, d.len(), l)).collect()
    }

    #[test]
    fn runs_of_zeroes_are_found_across_parts() {
        let k64 = 64 * 1024;
        let mut d = Data::copy_from(&vec![1; k64]);
        d.append(Data::zeroes(3 * k64));
        d.append(Data::copy_from(&vec![0; k64]));
        d.append(Data::copy_from(&[0, 0, 9]));
        assert_eq!(runs(d), [(false, k64, false), (true, 4 * k64, false), (false, 3, true)]);
        assert_eq!(runs(Data::zeroes(5)), [(true, 5, true)]);
        assert_eq!(runs(Data::copy_from(b"x")), [(false, 1, true)]);
    }

    #[test]
    fn a_read_with_a_hole_is_two_chunks_but_one_when_whole() {
        let mut data = Data::zeroes(4096);
        data.append(Data::copy_from(b"z"));
        let w = ReplyWriter::new(Mode::Structured);
        let mut o = Outbox::new();
        w.read(&mut o, 5, 1000, data.clone(), false);
        assert_eq!(o.take().len(), 20 + 12 + 20 + 8 + 1);
        w.read(&mut o, 5, 1000, data.clone(), true);
        assert_eq!(o.take().len(), 20 + 8 + 4097);
        ReplyWriter::new(Mode::Simple).read(&mut o, 5, 1000, data, false);
        assert_eq!(o.take().len(), 16 + 4097);
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let mut o = Outbox::new();
        ReplyWriter::new(Mode::Structured).error(&mut o, 1, 0, 5, &"é".repeat(4000));
        assert_eq!(o.len(), 20 + 6 + 4096);
    }
}
