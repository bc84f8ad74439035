//! The client's half of the handshake.
//!
//! Asks for the best framing it may, then for metadata contexts, then for the export; falls back step by step where the
//! server is older (extended, structured, simple; `GO`, `EXPORT_NAME`; oldstyle). The server is not trusted: each
//! length is checked before it is awaited, and what it says of the export must make sense.

use crate::inbox::Inbox;
use crate::options::{Checked, Fields};
use crate::outbox::{self, Outbox};
use crate::proto::{
    MAGIC, MAX_OPTION, MAX_OPTION_REPLIES, MAX_STRING, Mode, OLDSTYLE_MAGIC, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, flag, handshake, info, opt, rep,
};
use block::{BlockError, ErrorKind, Result};

/// Largest "smallest request" that is accepted: QEMU accepts the same.
const MAX_MINIMUM_BLOCK: u32 = 64 << 10;

/// What to ask a server for.
#[derive(Clone, Debug, Default)]
pub struct ClientWants {
    /// Name of the export; empty for the server's default.
    pub export: String,
    /// The best framing to ask for.
    pub mode: Mode,
    /// Metadata contexts to ask for.
    pub contexts: Vec<String>,
    /// Whether the connection must be protected.
    pub tls: bool,
}

/// What [`ClientHandshake::step`] came to.
#[derive(Clone, Debug, PartialEq)]
pub enum ClientStep {
    /// More bytes are needed, after what is in the outbox has been sent.
    NeedBytes,
    /// TLS begins with the next byte; then the handshake goes on under it, with a step before any byte has come.
    StartTls,
    /// The transmission phase begins.
    Enter(Negotiated),
}

impl ClientStep {
    /// What was agreed on, if the transmission phase begins.
    pub fn entered(self) -> Option<Negotiated> {
        match self {
            ClientStep::Enter(negotiated) => Some(negotiated),
            _ => None,
        }
    }
}

/// What was agreed on.
#[derive(Clone, Debug, PartialEq)]
pub struct Negotiated {
    /// Length of the export in bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// Framing.
    pub mode: Mode,
    /// Smallest request and alignment (power of two).
    pub min_block: u32,
    /// Preferred request size, 0 if the server does not say.
    pub preferred_block: u32,
    /// Largest request.
    pub max_block: u32,
    /// Ids and names of metadata contexts that the server has of those asked for.
    pub contexts: Vec<(u32, String)>,
    /// The server's text about the export; may be empty.
    pub description: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Greeting,
    /// The server has agreed to TLS.
    TlsAgreed,
    /// TLS has begun; nothing has been said under it.
    TlsBegun,
    /// Waiting for the replies to an option.
    Option(u32),
    /// Waiting for size, flags and perhaps padding after `EXPORT_NAME`.
    ExportName,
    Done,
}

/// A handshake in progress.
pub struct ClientHandshake {
    wants: ClientWants,
    state: State,
    no_zeroes: bool,
    replies: u32,
    got_export: bool,
    result: Negotiated,
}

fn broken<T>(what: impl std::fmt::Display) -> Result<T> {
    Err(BlockError::corrupt(format!("NBD server broke the protocol: {what}")))
}

fn send(out: &mut Outbox, option: u32, data: &[u8]) {
    let f = outbox::Fields::<16>::new().u64(OPTION_MAGIC).u32(option);
    out.put(&f.u32(data.len() as u32).bytes);
    out.put(data);
}

fn put_string(to: &mut Vec<u8>, s: &str) {
    to.extend_from_slice(&(s.len() as u32).to_be_bytes());
    to.extend_from_slice(s.as_bytes());
}

impl ClientHandshake {
    /// A handshake before its first byte. Refuses names that the protocol cannot carry.
    pub fn new(wants: ClientWants) -> Result<ClientHandshake> {
        for s in std::iter::once(&wants.export).chain(&wants.contexts) {
            if s.len() > MAX_STRING {
                return Err(BlockError::invalid(format!(
                    "export name too long to send to server: {} bytes",
                    s.len()
                )));
            }
        }
        let result = Negotiated {
            size: 0,
            flags: 0,
            mode: Mode::Simple,
            min_block: 1,
            preferred_block: 0,
            max_block: crate::proto::MAX_PAYLOAD as u32,
            contexts: Vec::new(),
            description: String::new(),
        };
        Ok(ClientHandshake {
            wants,
            state: State::Greeting,
            no_zeroes: false,
            replies: 0,
            got_export: false,
            result,
        })
    }

    /// Goes as far as the bytes in `inbox` allow.
    pub fn step(&mut self, inbox: &mut Inbox, out: &mut Outbox) -> Result<ClientStep> {
        loop {
            let moved = match self.state {
                State::Greeting => self.greeting(inbox, out)?,
                State::Option(o) => self.option_reply(o, inbox, out)?,
                State::ExportName => self.export_name(inbox)?,
                State::TlsAgreed if !inbox.is_empty() => {
                    // It came in the clear and would be taken for protected.
                    return broken("it did not wait for TLS to begin");
                }
                State::TlsAgreed => {
                    self.state = State::TlsBegun;
                    return Ok(ClientStep::StartTls);
                }
                State::TlsBegun => {
                    self.ask_mode(self.wants.mode, out);
                    true
                }
                State::Done => return self.checked().map(ClientStep::Enter),
            };
            if !moved {
                return Ok(ClientStep::NeedBytes);
            }
        }
    }

    fn greeting(&mut self, inbox: &mut Inbox, out: &mut Outbox) -> Result<bool> {
        if let Some(m) = inbox.peek::<8>().map(u64::from_be_bytes)
            && m != MAGIC
        {
            let e = BlockError::corrupt(format!("Bad initial magic received: {m:#018x}"));
            return Err(e.with_errno(BlockError::EINVAL).with_hint("This is not an NBD server"));
        }
        let Some(b) = inbox.peek::<16>() else { return Ok(false) };
        let mut f = Fields::new(&b[8..]);
        match f.u64() {
            Ok(OPTION_MAGIC) => {}
            Ok(OLDSTYLE_MAGIC) => return self.oldstyle(inbox),
            other => return broken(format_args!("its greeting goes on with {other:x?}")),
        }
        let Some(b) = inbox.take_array::<18>() else { return Ok(false) };
        let theirs = u32::from(u16::from_be_bytes([b[16], b[17]]));
        let ours = theirs & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.no_zeroes = ours & handshake::NO_ZEROES != 0;
        out.put(&ours.to_be_bytes());
        if self.wants.tls {
            if ours & handshake::FIXED_NEWSTYLE == 0 {
                return Err(no_tls());
            }
            self.ask(opt::STARTTLS, &[], out);
        } else if ours & handshake::FIXED_NEWSTYLE == 0 {
            self.wants.mode = Mode::Simple;
            self.ask_export_name(out);
        } else {
            self.ask_mode(self.wants.mode, out);
        }
        Ok(true)
    }

    /// A server from before options: size, 32 bits of flags, 124 zeroes, and there is only one export.
    fn oldstyle(&mut self, inbox: &mut Inbox) -> Result<bool> {
        if self.wants.tls {
            return Err(no_tls());
        }
        let Some(b) = inbox.take_array::<152>() else { return Ok(false) };
        if !self.wants.export.is_empty() {
            return Err(BlockError::invalid(
                "NBD server uses the oldstyle handshake, which has no export names; leave the export name empty",
            ));
        }
        let mut f = Fields::new(&b[16..28]);
        if let (Ok(size), Ok(flags)) = (f.u64(), f.u32()) {
            (self.result.size, self.result.flags) = (size, flags as u16);
        }
        self.state = State::Done;
        Ok(true)
    }

    fn ask(&mut self, option: u32, data: &[u8], out: &mut Outbox) {
        send(out, option, data);
        self.replies = 0;
        self.state = State::Option(option);
    }

    fn ask_mode(&mut self, mode: Mode, out: &mut Outbox) {
        match mode {
            Mode::Extended => self.ask(opt::EXTENDED_HEADERS, &[], out),
            Mode::Structured => self.ask(opt::STRUCTURED_REPLY, &[], out),
            Mode::Simple => self.ask_contexts(out),
        }
    }

    fn ask_contexts(&mut self, out: &mut Outbox) {
        if self.result.mode == Mode::Simple || self.wants.contexts.is_empty() {
            return self.ask_go(out);
        }
        let mut data = Vec::new();
        put_string(&mut data, &self.wants.export);
        data.extend_from_slice(&(self.wants.contexts.len() as u32).to_be_bytes());
        self.wants.contexts.iter().for_each(|c| put_string(&mut data, c));
        self.ask(opt::SET_META_CONTEXT, &data, out);
    }

    fn ask_go(&mut self, out: &mut Outbox) {
        let mut data = Vec::new();
        put_string(&mut data, &self.wants.export);
        data.extend_from_slice(&1u16.to_be_bytes());
        data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
        self.ask(opt::GO, &data, out);
    }

    fn ask_export_name(&mut self, out: &mut Outbox) {
        send(out, opt::EXPORT_NAME, self.wants.export.as_bytes());
        self.state = State::ExportName;
    }

    fn export_name(&mut self, inbox: &mut Inbox) -> Result<bool> {
        let b = if self.no_zeroes {
            inbox.take_array::<10>()
        } else {
            inbox.take_array::<134>().and_then(|b| b.first_chunk().copied())
        };
        let Some(b) = b else { return Ok(false) };
        let mut f = Fields::new(&b);
        if let (Ok(size), Ok(flags)) = (f.u64(), f.u16()) {
            (self.result.size, self.result.flags) = (size, flags);
        }
        self.state = State::Done;
        Ok(true)
    }

    fn option_reply(&mut self, option: u32, inbox: &mut Inbox, out: &mut Outbox) -> Result<bool> {
        let Some(b) = inbox.peek::<20>() else { return Ok(false) };
        let mut f = Fields::new(&b);
        let (Ok(magic), Ok(to), Ok(kind), Ok(len)) = (f.u64(), f.u32(), f.u32(), f.u32()) else {
            return Ok(false);
        };
        if magic != OPTION_REPLY_MAGIC || to != option {
            return broken(format_args!(
                "reply magic {magic:#x} to option {to}, expected one to option {option}"
            ));
        }
        if len > MAX_OPTION {
            return broken(format_args!("an option reply of {len} bytes"));
        }
        if inbox.len() < 20 + len as usize {
            return Ok(false);
        }
        inbox.skip(20);
        let data = inbox.take(len as usize).unwrap_or_default().contiguous();
        self.replies += 1;
        if self.replies > MAX_OPTION_REPLIES {
            return broken("too many replies to one option");
        }
        if kind & rep::ERROR != 0 {
            return self.refused(option, kind, &String::from_utf8_lossy(&data), out).map(|()| true);
        }
        match (option, kind) {
            (opt::STARTTLS, rep::ACK) => self.state = State::TlsAgreed,
            (opt::EXTENDED_HEADERS, rep::ACK) => {
                self.result.mode = Mode::Extended;
                self.ask_contexts(out);
            }
            (opt::STRUCTURED_REPLY, rep::ACK) => {
                self.result.mode = Mode::Structured;
                self.ask_contexts(out);
            }
            (opt::SET_META_CONTEXT, rep::META_CONTEXT) => self.context(&data).or_else(broken)?,
            (opt::SET_META_CONTEXT, rep::ACK) => self.ask_go(out),
            (opt::GO, rep::INFO) => self.info(&data).or_else(broken)?,
            (opt::GO, rep::ACK) if self.got_export => self.state = State::Done,
            (opt::GO, rep::ACK) => return broken("export entered without telling its size"),
            _ => return broken(format_args!("reply type {kind} to option '{}'", opt::name(option))),
        }
        Ok(true)
    }

    fn refused(&mut self, option: u32, kind: u32, text: &str, out: &mut Outbox) -> Result<()> {
        let fatal = matches!(kind, rep::ERR_TLS_REQD | rep::ERR_SHUTDOWN | rep::ERR_POLICY);
        match option {
            opt::EXTENDED_HEADERS if !fatal => self.ask_mode(Mode::Structured, out),
            opt::STRUCTURED_REPLY if !fatal => self.ask_contexts(out),
            opt::SET_META_CONTEXT if !fatal => {
                self.result.contexts.clear();
                self.ask_go(out);
            }
            opt::GO if kind == rep::ERR_UNSUP => {
                // Entering by name cannot carry contexts that were set for `GO` any worse: they stay set.
                self.ask_export_name(out);
            }
            _ => return Err(refusal(option, kind, text, &self.wants.export)),
        }
        Ok(())
    }

    fn context(&mut self, data: &[u8]) -> Checked<()> {
        let mut f = Fields::new(data);
        let id = f.u32()?;
        let name = crate::options::text(f.rest(), "metadata context")?;
        if !self.wants.contexts.iter().any(|c| c == name) {
            return Err(format!("metadata context '{name}' was not asked for"));
        }
        if self.result.contexts.iter().any(|(i, n)| *i == id || n == name) {
            return Err(format!("metadata context '{name}' told twice"));
        }
        self.result.contexts.push((id, name.to_owned()));
        Ok(())
    }

    fn info(&mut self, data: &[u8]) -> Checked<()> {
        let mut f = Fields::new(data);
        match f.u16()? {
            info::EXPORT => {
                (self.result.size, self.result.flags) = (f.u64()?, f.u16()?);
                self.got_export = true;
                f.end()
            }
            info::BLOCK_SIZE => {
                (self.result.min_block, self.result.preferred_block, self.result.max_block) =
                    (f.u32()?, f.u32()?, f.u32()?);
                f.end()
            }
            info::DESCRIPTION => {
                self.result.description = crate::options::text(f.rest(), "description")?.to_owned();
                Ok(())
            }
            _ => Ok(()), // information we did not ask for and do not know
        }
    }

    fn checked(&self) -> Result<Negotiated> {
        let mut r = self.result.clone();
        let (min, preferred, max) = (r.min_block, r.preferred_block, r.max_block);
        if !min.is_power_of_two() || min > MAX_MINIMUM_BLOCK {
            return broken(format_args!(
                "minimum block size {min} is not a power of two up to {MAX_MINIMUM_BLOCK}"
            ));
        }
        if preferred != 0 && (!preferred.is_power_of_two() || preferred < min) {
            return broken(format_args!("preferred block size {preferred} with a minimum of {min}"));
        }
        if max < min || (max != u32::MAX && !max.is_multiple_of(min)) {
            return broken(format_args!("maximum block size {max} with a minimum of {min}"));
        }
        if r.size > i64::MAX as u64 {
            return broken(format_args!("export size {} is too large", r.size));
        }
        if !r.size.is_multiple_of(u64::from(min)) {
            return broken(format_args!(
                "export size {} is not a multiple of its minimum block size {min}",
                r.size
            ));
        }
        if r.flags & flag::HAS_FLAGS == 0 {
            r.flags = 0;
        }
        Ok(r)
    }
}

fn no_tls() -> BlockError {
    BlockError::new(ErrorKind::Permission, "Server does not support STARTTLS")
}

fn refusal(option: u32, kind: u32, text: &str, export: &str) -> BlockError {
    if kind == rep::ERR_UNKNOWN && option == opt::GO {
        let e = BlockError::new(ErrorKind::NotFound, "Requested export not available");
        return e.with_hint(format!(
            "The NBD server has no export named '{export}'; list them with nbdinfo --list"
        ));
    }
    let (why, error) = match kind {
        rep::ERR_UNSUP => ("is not supported by the server", ErrorKind::Unsupported),
        rep::ERR_POLICY => ("is denied by the server", ErrorKind::Permission),
        rep::ERR_INVALID => ("was found invalid by the server", ErrorKind::Invalid),
        rep::ERR_PLATFORM => ("is not available on the server's platform", ErrorKind::Unsupported),
        rep::ERR_TLS_REQD => ("needs TLS, says the server", ErrorKind::Permission),
        rep::ERR_UNKNOWN => ("names an export that the server does not have", ErrorKind::NotFound),
        rep::ERR_SHUTDOWN => ("came while the server shuts down", ErrorKind::Disconnected),
        rep::ERR_BLOCK_SIZE_REQD => ("needs block sizes, says the server", ErrorKind::Unsupported),
        rep::ERR_TOO_BIG => ("is too long for the server", ErrorKind::Invalid),
        _ => ("was refused by the server", ErrorKind::Invalid),
    };
    let said = if text.is_empty() { String::new() } else { format!(" (it says: {text})") };
    let message = format!("NBD option {option} ({}) for export '{export}' {why}{said}", opt::name(option));
    BlockError::new(error, message)
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
