//! The server's half of the handshake.
//!
//! A client may send any option in any order and number until it aborts or enters an export. What must stay true:
//! nothing longer than [`MAX_OPTION`] is kept, each call handles one option (so the caller sends what it produced
//! before the next), and nothing is agreed that the client did not ask for.

use crate::inbox::Inbox;
use crate::options::{Checked, Fields, text};
use crate::outbox::{self, Outbox};
use crate::proto::{
    MAGIC, MAX_INFO_REQUESTS, MAX_OPTION, MAX_PAYLOAD, Mode, OPTION_MAGIC, OPTION_REPLY_MAGIC, flag,
    handshake, info, opt, rep,
};
use block::{BlockError, ErrorKind, Result};

/// What a client is told of an export.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExportFacts {
    /// Length in bytes.
    pub size: u64,
    /// Transmission flags, as for extended mode; what another mode cannot have is taken out here.
    pub flags: u16,
    /// Text for humans; may be empty.
    pub description: String,
    /// Smallest, preferred and largest request in bytes.
    pub block_sizes: (u32, u32, u32),
    /// Names of the metadata contexts; the index is the context's id.
    pub contexts: Vec<String>,
}

/// The exports that a client may see.
pub trait Catalog {
    /// The export with this name.
    fn facts(&self, name: &str) -> Option<ExportFacts>;
    /// Calls `each` with name and description of every export.
    fn list(&self, each: &mut dyn FnMut(&str, &str));
}

/// What client and server have agreed on when transmission begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Agreed {
    /// Name of the export.
    pub export: String,
    /// Framing of requests and replies.
    pub mode: Mode,
    /// Ids of the metadata contexts that block status reports.
    pub contexts: Vec<u32>,
}

/// What [`ServerHandshake::step`] did.
#[derive(Clone, Debug, PartialEq)]
pub enum HandshakeStep {
    /// Nothing: more bytes are needed.
    NeedBytes,
    /// One message was handled; call again.
    Handled,
    /// Transmission begins with the next byte.
    Enter(Agreed),
    /// What is in the outbox is sent in the clear; then TLS begins, and the handshake goes on under it.
    StartTls,
    /// The client said good-bye.
    Ended,
}

/// Whether and how the server protects connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Protection {
    /// Everything in the clear; `STARTTLS` is refused.
    #[default]
    None,
    /// Nothing is told or done before TLS has begun (FORCEDTLS of the specification).
    Required,
    /// TLS has begun.
    Begun,
}

enum State {
    ClientFlags,
    Options,
    /// An option too long to keep is passed over.
    Skipping {
        option: u32,
        left: u64,
    },
}

/// A handshake in progress.
pub struct ServerHandshake {
    state: State,
    fixed: bool,
    no_zeroes: bool,
    mode: Mode,
    protection: Protection,
    /// The last successful `SET_META_CONTEXT`: export name and context ids.
    selected: Option<(String, Vec<u32>)>,
}

impl Default for ServerHandshake {
    fn default() -> ServerHandshake {
        ServerHandshake::new()
    }
}

fn reply(out: &mut Outbox, option: u32, kind: u32, data: &[&[u8]]) {
    let len: usize = data.iter().map(|d| d.len()).sum();
    let f = outbox::Fields::<20>::new().u64(OPTION_REPLY_MAGIC).u32(option).u32(kind);
    out.put(&f.u32(len as u32).bytes);
    data.iter().for_each(|d| out.put(d));
}

fn refuse(out: &mut Outbox, option: u32, kind: u32, why: &str) -> HandshakeStep {
    reply(out, option, kind, &[why.as_bytes()]);
    HandshakeStep::Handled
}

fn broken<T>(what: impl std::fmt::Display) -> Result<T> {
    Err(BlockError::corrupt(format!("NBD client broke the protocol: {what}")))
}

impl ServerHandshake {
    /// A handshake in the clear, before its first byte.
    pub fn new() -> ServerHandshake {
        ServerHandshake::with(Protection::None)
    }

    /// A handshake before its first byte.
    pub fn with(protection: Protection) -> ServerHandshake {
        ServerHandshake {
            state: State::ClientFlags,
            fixed: false,
            no_zeroes: false,
            mode: Mode::Simple,
            protection,
            selected: None,
        }
    }

    /// What a server sends first.
    pub fn greeting(out: &mut Outbox) {
        let flags = (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES) as u16;
        out.put(&outbox::Fields::<18>::new().u64(MAGIC).u64(OPTION_MAGIC).u16(flags).bytes);
    }

    /// Handles at most one message from `inbox`. An error means: hang up, after sending what is in `out`.
    pub fn step(
        &mut self,
        inbox: &mut Inbox,
        out: &mut Outbox,
        catalog: &dyn Catalog,
    ) -> Result<HandshakeStep> {
        match self.state {
            State::ClientFlags => self.client_flags(inbox),
            State::Skipping { option, left } => {
                let now = inbox.skip(usize::try_from(left).unwrap_or(usize::MAX)) as u64;
                if now < left {
                    self.state = State::Skipping { option, left: left - now };
                    return Ok(HandshakeStep::NeedBytes);
                }
                self.state = State::Options;
                Ok(refuse(out, option, rep::ERR_TOO_BIG, "option is too long"))
            }
            State::Options => self.option_header(inbox, out, catalog),
        }
    }

    fn client_flags(&mut self, inbox: &mut Inbox) -> Result<HandshakeStep> {
        let Some(flags) = inbox.take_array::<4>().map(u32::from_be_bytes) else {
            return Ok(HandshakeStep::NeedBytes);
        };
        let unknown = flags & !(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        if unknown != 0 {
            return broken(format!("unknown client flags {unknown:#x}"));
        }
        self.fixed = flags & handshake::FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & handshake::NO_ZEROES != 0;
        self.state = State::Options;
        Ok(HandshakeStep::Handled)
    }

    fn option_header(
        &mut self,
        inbox: &mut Inbox,
        out: &mut Outbox,
        c: &dyn Catalog,
    ) -> Result<HandshakeStep> {
        if let Some(magic) = inbox.peek::<8>().map(u64::from_be_bytes)
            && magic != OPTION_MAGIC
        {
            return broken(format!("an option starts with {magic:#018x}"));
        }
        let Some(head) = inbox.peek::<16>() else { return Ok(HandshakeStep::NeedBytes) };
        let option = u32::from_be_bytes([head[8], head[9], head[10], head[11]]);
        let len = u32::from_be_bytes([head[12], head[13], head[14], head[15]]);
        if !self.fixed && option != opt::EXPORT_NAME {
            return broken(format!("option {option} ({}) without fixed newstyle", opt::name(option)));
        }
        if u64::from(len) > MAX_PAYLOAD || (option == opt::EXPORT_NAME && len > MAX_OPTION) {
            return broken(format!("option {option} ({}) of {len} bytes", opt::name(option)));
        }
        if len > MAX_OPTION {
            inbox.skip(16);
            self.state = State::Skipping { option, left: u64::from(len) };
            return Ok(HandshakeStep::Handled);
        }
        if inbox.len() < 16 + len as usize {
            return Ok(HandshakeStep::NeedBytes);
        }
        inbox.skip(16);
        let data = inbox.take(len as usize).unwrap_or_default().contiguous();
        self.option(option, &data, inbox, out, c)
    }

    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        inbox: &Inbox,
        out: &mut Outbox,
        c: &dyn Catalog,
    ) -> Result<HandshakeStep> {
        let bare =
            matches!(option, opt::LIST | opt::STARTTLS | opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS);
        if bare && !data.is_empty() {
            let why = format!("option '{}' takes no data", opt::name(option));
            return Ok(refuse(out, option, rep::ERR_INVALID, &why));
        }
        if self.protection == Protection::Required && !matches!(option, opt::STARTTLS | opt::ABORT) {
            let why = format!("option {option} ({}) before TLS has begun", opt::name(option));
            return if option == opt::EXPORT_NAME {
                // This option has no error reply: hanging up is the answer.
                Err(BlockError::new(ErrorKind::Permission, why))
            } else {
                Ok(refuse(out, option, rep::ERR_TLS_REQD, &format!("{why}: this server requires TLS")))
            };
        }
        Ok(match option {
            opt::EXPORT_NAME => return self.export_name(data, out, c),
            opt::ABORT => {
                reply(out, option, rep::ACK, &[]);
                HandshakeStep::Ended
            }
            opt::LIST => {
                c.list(&mut |name, description| {
                    let len = (name.len() as u32).to_be_bytes();
                    reply(out, option, rep::SERVER, &[&len, name.as_bytes(), description.as_bytes()]);
                });
                reply(out, option, rep::ACK, &[]);
                HandshakeStep::Handled
            }
            opt::STARTTLS => match self.protection {
                Protection::None => refuse(out, option, rep::ERR_POLICY, "TLS not configured"),
                Protection::Begun => refuse(out, option, rep::ERR_INVALID, "TLS has begun already"),
                // What the client sent behind it came in the clear and would be taken for protected.
                Protection::Required if !inbox.is_empty() => {
                    return broken("it did not wait for TLS to begin");
                }
                Protection::Required => {
                    reply(out, option, rep::ACK, &[]);
                    self.protection = Protection::Begun;
                    HandshakeStep::StartTls
                }
            },
            opt::INFO | opt::GO => self.go(option, data, out, c),
            opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS => self.raise_mode(option, out),
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta_context(option, data, out, c),
            _ => refuse(out, option, rep::ERR_UNSUP, &format!("option {option} is not supported")),
        })
    }

    fn raise_mode(&mut self, option: u32, out: &mut Outbox) -> HandshakeStep {
        let to = if option == opt::EXTENDED_HEADERS { Mode::Extended } else { Mode::Structured };
        if self.mode == Mode::Extended && to == Mode::Structured {
            return refuse(out, option, rep::ERR_EXT_HEADER_REQD, "extended headers are already negotiated");
        }
        if self.mode == to {
            let why = format!("{} is already negotiated", opt::name(option));
            return refuse(out, option, rep::ERR_INVALID, &why);
        }
        self.mode = to;
        reply(out, option, rep::ACK, &[]);
        HandshakeStep::Handled
    }

    fn flags(&self, facts: &ExportFacts) -> u16 {
        let mut flags = facts.flags | flag::HAS_FLAGS;
        if self.mode < Mode::Structured {
            flags &= !flag::SEND_DF;
        }
        if self.mode < Mode::Extended {
            flags &= !flag::BLOCK_STATUS_PAYLOAD;
        }
        flags
    }

    fn agreed(&mut self, name: &str) -> HandshakeStep {
        let contexts = match self.selected.take() {
            Some((export, ids)) if export == name => ids,
            _ => Vec::new(),
        };
        HandshakeStep::Enter(Agreed { export: name.to_owned(), mode: self.mode, contexts })
    }

    fn export_name(&mut self, data: &[u8], out: &mut Outbox, c: &dyn Catalog) -> Result<HandshakeStep> {
        let name = match text(data, "export name") {
            Ok(name) => name,
            Err(why) => return broken(why),
        };
        let Some(facts) = c.facts(name) else {
            // This option has no error reply: hanging up is the answer.
            return Err(BlockError::new(ErrorKind::NotFound, format!("export '{name}' not present")));
        };
        out.put(&outbox::Fields::<10>::new().u64(facts.size).u16(self.flags(&facts)).bytes);
        if !self.no_zeroes {
            out.put(&[0; 124]);
        }
        Ok(self.agreed(name))
    }

    fn go(&mut self, option: u32, data: &[u8], out: &mut Outbox, c: &dyn Catalog) -> HandshakeStep {
        let (name, wants) = match parse_go(data) {
            Ok(x) => x,
            Err(why) => {
                let why = format!("option '{}': {why}", opt::name(option));
                return refuse(out, option, rep::ERR_INVALID, &why);
            }
        };
        let Some(facts) = c.facts(name) else { return unknown(out, option, name) };
        if wants.contains(&info::NAME) {
            reply(out, option, rep::INFO, &[&info::NAME.to_be_bytes(), name.as_bytes()]);
        }
        if !facts.description.is_empty() {
            let text = facts.description.as_bytes();
            reply(out, option, rep::INFO, &[&info::DESCRIPTION.to_be_bytes(), text]);
        }
        let (min, preferred, max) = facts.block_sizes;
        // Who does not ask may not know what a minimum is; the edge below takes any request.
        let min = if wants.contains(&info::BLOCK_SIZE) { min } else { 1 };
        let sizes = outbox::Fields::<14>::new().u16(info::BLOCK_SIZE).u32(min).u32(preferred).u32(max);
        reply(out, option, rep::INFO, &[&sizes.bytes]);
        let export = outbox::Fields::<12>::new().u16(info::EXPORT).u64(facts.size).u16(self.flags(&facts));
        reply(out, option, rep::INFO, &[&export.bytes]);
        reply(out, option, rep::ACK, &[]);
        if option == opt::GO { self.agreed(name) } else { HandshakeStep::Handled }
    }

    fn meta_context(&mut self, option: u32, data: &[u8], out: &mut Outbox, c: &dyn Catalog) -> HandshakeStep {
        let set = option == opt::SET_META_CONTEXT;
        if set {
            self.selected = None;
            if self.mode < Mode::Structured {
                let why = "metadata contexts need structured replies";
                return refuse(out, option, rep::ERR_INVALID, why);
            }
        }
        let mut f = Fields::new(data);
        let name = match f.string("export name") {
            Ok(n) => n,
            Err(why) => return refuse(out, option, rep::ERR_INVALID, &why),
        };
        let Some(facts) = c.facts(name) else { return unknown(out, option, name) };
        let chosen = match parse_queries(&mut f, set, &facts.contexts) {
            Ok(ids) => ids,
            Err(why) => return refuse(out, option, rep::ERR_INVALID, &why),
        };
        for id in &chosen {
            let told = if set { *id } else { 0 };
            let context = facts.contexts[*id as usize].as_bytes();
            reply(out, option, rep::META_CONTEXT, &[&told.to_be_bytes(), context]);
        }
        reply(out, option, rep::ACK, &[]);
        if set {
            self.selected = Some((name.to_owned(), chosen));
        }
        HandshakeStep::Handled
    }
}

fn unknown(out: &mut Outbox, option: u32, name: &str) -> HandshakeStep {
    // The name is the client's own: no longer than a string may be.
    refuse(out, option, rep::ERR_UNKNOWN, &format!("export '{name}' not present"))
}

fn parse_go(data: &[u8]) -> Checked<(&str, Vec<u16>)> {
    let mut f = Fields::new(data);
    let name = f.string("export name")?;
    let n = usize::from(f.u16()?);
    let mut wants = Vec::new();
    for _ in 0..n {
        let w = f.u16()?;
        if wants.len() < MAX_INFO_REQUESTS {
            wants.push(w);
        }
    }
    f.end()?;
    Ok((name, wants))
}

/// The ids that the queries select, in the order of the contexts.
fn parse_queries(f: &mut Fields, set: bool, contexts: &[String]) -> Checked<Vec<u32>> {
    let n = f.u32()?;
    // Who asks for nothing in particular lists what the reference has; ours is told to who asks for it.
    let mut chosen: Vec<bool> =
        contexts.iter().map(|c| n == 0 && !set && c != crate::leaf::CONTEXT).collect();
    for _ in 0..n {
        let query = f.string("metadata context")?;
        for (is, context) in chosen.iter_mut().zip(contexts) {
            // To list, a namespace stands for all in it; to set, a context must be named whole.
            let namespace = !set && query.ends_with(':') && context.starts_with(query);
            *is |= namespace || query == context;
        }
    }
    f.end()?;
    Ok((0u32..).zip(chosen).filter(|(_, is)| *is).map(|(id, _)| id).collect())
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
