//! One request: is it allowed, and carrying it out.

use super::session::Session;
use block::{BlockError, Data, ErrorKind, ReqFlags, Result, Span};
use env::bugs::planted;
use nbd::proto::{MAX_PAYLOAD, cmd_flag, wire_error};
use nbd::{Cmd, Mode, Request, StatusExtent, error_to_wire};

/// Piece in which `CACHE` reads ahead: large enough to be quick, small enough not to need much memory.
const CACHE_PIECE: u64 = 1 << 20;

/// How a request went.
pub(super) enum Outcome {
    /// Done, nothing to tell.
    Ok,
    /// Bytes of a read, and whether they must be sent as one chunk.
    Data(Data, bool),
    /// Extents for each context.
    Status(Vec<(u32, Vec<StatusExtent>)>),
    /// A wire error with a sentence.
    Failed(u32, String),
    /// Nothing may be said.
    Withheld,
}

/// A request that was found in order.
pub(super) struct Checked {
    pub(super) cmd: Cmd,
    flags: u16,
    span: Span,
    payload: Data,
    contexts: Vec<u32>,
}

fn invalid<T>(why: String) -> Result<T, (u32, String)> {
    Err((wire_error::INVAL, why))
}

/// Everything that can be said against a request without doing it.
pub(super) fn check(s: &Session, r: Request) -> Result<Checked, (u32, String)> {
    let Some(cmd) = Cmd::from_wire(r.command) else {
        return invalid(format!("unknown command {}", r.command));
    };
    if r.bad_payload {
        return invalid(format!("malformed payload of command {}", cmd.name()));
    }
    let allowed = allowed_flags(cmd, s.mode());
    if r.flags & !allowed != 0 {
        return invalid(format!("flags {:#x} are not valid for command {}", r.flags & !allowed, cmd.name()));
    }
    if cmd == Cmd::Flush || cmd == Cmd::Disconnect {
        return Ok(Checked {
            cmd,
            flags: r.flags,
            span: Span::new(0, 0),
            payload: r.payload,
            contexts: Vec::new(),
        });
    }
    let writes = matches!(cmd, Cmd::Write | Cmd::WriteZeroes | Cmd::Trim);
    if writes && !s.export().writable() {
        return Err((wire_error::PERM, "the export is read-only".to_owned()));
    }
    if cmd == Cmd::Read && r.len > MAX_PAYLOAD {
        return invalid(format!("read of {} bytes is longer than {MAX_PAYLOAD}", r.len));
    }
    let size = s.export().size();
    let Some(span) = Span::checked(r.offset, r.len).filter(|span| span.end() <= size) else {
        let full = matches!(cmd, Cmd::Write | Cmd::WriteZeroes);
        let wire = if full { wire_error::NOSPC } else { wire_error::INVAL };
        let why = format!("{} of {} bytes at {} is past the end at {size}", cmd.name(), r.len, r.offset);
        return Err((wire, why));
    };
    let contexts = if cmd == Cmd::BlockStatus { status_contexts(s, &r)? } else { Vec::new() };
    Ok(Checked { cmd, flags: r.flags, span, payload: r.payload, contexts })
}

fn allowed_flags(cmd: Cmd, mode: Mode) -> u16 {
    let payload = if mode == Mode::Extended { cmd_flag::PAYLOAD_LEN } else { 0 };
    let df = if mode == Mode::Simple { 0 } else { cmd_flag::DF };
    cmd_flag::FUA
        | match cmd {
            Cmd::Read => df,
            Cmd::Write => payload,
            Cmd::WriteZeroes => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
            Cmd::BlockStatus => cmd_flag::REQ_ONE | payload,
            Cmd::Disconnect | Cmd::Flush | Cmd::Trim | Cmd::Cache => 0,
        }
}

/// The contexts that a block status request is about: all that were agreed on, or those of them that it names.
fn status_contexts(s: &Session, r: &Request) -> Result<Vec<u32>, (u32, String)> {
    let agreed = s.contexts();
    if agreed.is_empty() {
        return invalid("block status without a metadata context".to_owned());
    }
    if r.len == 0 {
        return invalid("block status needs a length".to_owned());
    }
    match &r.contexts {
        None => Ok(agreed.to_vec()),
        Some(ids) => {
            let known = |id: &u32| agreed.contains(id);
            let twice = (1..ids.len()).any(|i| ids[..i.min(agreed.len())].contains(&ids[i]));
            if ids.is_empty() || ids.len() > agreed.len() || twice || !ids.iter().all(known) {
                return invalid("block status for contexts that were not agreed on".to_owned());
            }
            Ok(ids.clone())
        }
    }
}

/// Carries a request out. Runs to its end also when the client is gone.
pub(super) async fn run(s: &Session, c: Checked) -> Outcome {
    match execute(s, c).await {
        Ok(o) => o,
        Err(e) if e.kind() == ErrorKind::Ending => Outcome::Withheld,
        Err(e) => Outcome::Failed(error_to_wire(&e), e.message().to_owned()),
    }
}

async fn execute(s: &Session, c: Checked) -> Result<Outcome> {
    let edge = s.export().edge();
    let fua = c.flags & cmd_flag::FUA != 0;
    let write_flags = ReqFlags { fua: fua || s.export().writethrough(), ..ReqFlags::NONE };
    if c.cmd != Cmd::Read {
        edge.check_active()?;
    }
    let changes = matches!(c.cmd, Cmd::Write | Cmd::WriteZeroes | Cmd::Trim) && !c.span.is_empty();
    let changes = changes && !planted("nbd: overlapping writes side by side");
    let _turn = if changes { Some(s.export().changing.lock(c.span, true).await) } else { None };
    match c.cmd {
        Cmd::Read => {
            if fua {
                // What is read must be on stable storage by then.
                edge.flush().await?;
            }
            let data = if c.span.is_empty() { Data::empty() } else { edge.read(c.span).await? };
            return Ok(Outcome::Data(data, c.flags & cmd_flag::DF != 0));
        }
        Cmd::BlockStatus => {
            let one = c.flags & cmd_flag::REQ_ONE != 0;
            return super::status::query(s, c.span, &c.contexts, one).await.map(Outcome::Status);
        }
        Cmd::Write if c.span.is_empty() => {}
        Cmd::Write => edge.write(c.span.start, c.payload, write_flags).await?,
        Cmd::WriteZeroes if c.span.is_empty() => {}
        Cmd::WriteZeroes => {
            let may_unmap = c.flags & cmd_flag::NO_HOLE == 0;
            let no_fallback = c.flags & cmd_flag::FAST_ZERO != 0;
            edge.zero(c.span, ReqFlags { may_unmap, no_fallback, ..write_flags }).await.map_err(|e| {
                if e.kind() == ErrorKind::Unsupported { e.with_errno(BlockError::ENOTSUP) } else { e }
            })?;
        }
        Cmd::Trim => {
            if !c.span.is_empty() {
                edge.discard(c.span).await?;
            }
            if write_flags.fua {
                edge.flush().await?;
            }
        }
        Cmd::Flush if planted("nbd: flush answered before older writes") => {}
        Cmd::Flush => edge.flush().await?,
        Cmd::Cache => {
            for piece in c.span.split_at(MAX_PAYLOAD).0.pieces(CACHE_PIECE) {
                drop(edge.read(piece).await?);
            }
        }
        Cmd::Disconnect => {}
    }
    Ok(Outcome::Ok)
}
