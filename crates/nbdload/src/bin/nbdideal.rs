//! `nbdideal`: an NBD server without a disk. It shakes hands, answers every read with zeroes and everything else with
//! success, at once, all requests of a receive with one send. What a client can reach against it is the limit.

use clap::Parser;
use nbd::proto::{
    EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
    chunk, flag,
};
use nbd::{Catalog, Cmd, ExportFacts, HandshakeStep, Inbox, Mode, Outbox, ServerHandshake};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "A do-nothing NBD server")]
struct Options {
    /// Unix socket to listen on (replaced if there)
    #[arg(long)]
    socket: String,
    /// Size of the export in bytes
    #[arg(long, default_value_t = 1 << 30)]
    size: u64,
}

struct Any(u64);

impl Catalog for Any {
    fn facts(&self, _: &str) -> Option<ExportFacts> {
        Some(ExportFacts {
            size: self.0,
            flags: flag::HAS_FLAGS | flag::SEND_FLUSH | flag::CAN_MULTI_CONN,
            description: String::new(),
            block_sizes: (1, 4096, 32 << 20),
            contexts: Vec::new(),
        })
    }
    fn list(&self, each: &mut dyn FnMut(&str, &str)) {
        each("", "");
    }
}

fn main() -> ExitCode {
    let o = Options::parse();
    let _ = std::fs::remove_file(&o.socket);
    let listener = match UnixListener::bind(&o.socket) {
        Ok(l) => l,
        Err(e) => {
            eprintln!("nbdideal: {}: {e}", o.socket);
            return ExitCode::FAILURE;
        }
    };
    for client in listener.incoming().flatten() {
        let size = o.size;
        std::thread::spawn(move || serve(client, size));
    }
    ExitCode::SUCCESS
}

/// Shakes hands: how client and server talk from here on, and the bytes that came after.
fn enter(s: &mut UnixStream, size: u64) -> std::io::Result<Option<(Mode, Vec<u8>)>> {
    let (mut hand, mut inbox, mut out) = (ServerHandshake::new(), Inbox::new(), Outbox::new());
    ServerHandshake::greeting(&mut out);
    let mut buffer = [0; 4096];
    loop {
        match hand.step(&mut inbox, &mut out, &Any(size)) {
            Ok(HandshakeStep::NeedBytes) => {
                s.write_all(&out.take().to_vec())?;
                let n = s.read(&mut buffer)?;
                if n == 0 {
                    return Ok(None);
                }
                inbox.push(bytes::Bytes::copy_from_slice(&buffer[..n]), usize::MAX);
            }
            Ok(HandshakeStep::Handled) => {}
            Ok(HandshakeStep::Enter(a)) => {
                s.write_all(&out.take().to_vec())?;
                let rest = inbox.take(inbox.len()).unwrap_or_default().to_vec();
                return Ok(Some((a.mode, rest)));
            }
            _ => return Ok(None),
        }
    }
}

/// What the server needs of a request: its header's length, its type, its cookie, where it begins and how long it is.
struct Request {
    kind: u8,
    cookie: [u8; 8],
    offset: [u8; 8],
    len: usize,
}

fn header_len(mode: Mode) -> usize {
    if mode == Mode::Extended { 32 } else { 28 }
}

/// Reads one header; `None` ends the connection (it is none, or asks for that).
fn parse(mode: Mode, h: &[u8]) -> Option<Request> {
    let extended = mode == Mode::Extended;
    let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
    let eight = |at: usize| <[u8; 8]>::try_from(&h[at..at + 8]).ok();
    let len = if extended {
        u64::from_be_bytes(eight(24)?) as usize
    } else {
        u32::from_be_bytes([h[24], h[25], h[26], h[27]]) as usize
    };
    let r = Request { kind: h[7], cookie: eight(8)?, offset: eight(16)?, len };
    (h[..4] == magic.to_be_bytes() && r.kind != Cmd::Disconnect as u8).then_some(r)
}

/// The answer: success, with zeroes for a read (as a hole, where the mode has one).
fn answer(mode: Mode, r: &Request, out: &mut Vec<u8>) {
    if mode == Mode::Simple {
        out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&r.cookie);
        if r.kind == Cmd::Read as u8 {
            out.resize(out.len() + r.len, 0);
        }
        return;
    }
    let hole = r.kind == Cmd::Read as u8;
    let payload: u64 = if hole { 12 } else { 0 };
    let kind = if hole { chunk::OFFSET_HOLE } else { chunk::NONE };
    let magic = if mode == Mode::Extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
    out.extend_from_slice(&magic.to_be_bytes());
    out.extend_from_slice(&chunk::DONE.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&r.cookie);
    if mode == Mode::Extended {
        out.extend_from_slice(&r.offset);
        out.extend_from_slice(&payload.to_be_bytes());
    } else {
        out.extend_from_slice(&(payload as u32).to_be_bytes());
    }
    if hole {
        out.extend_from_slice(&r.offset);
        out.extend_from_slice(&(r.len as u32).to_be_bytes());
    }
}

fn serve(mut s: UnixStream, size: u64) -> std::io::Result<()> {
    let Some((mode, rest)) = enter(&mut s, size)? else { return Ok(()) };
    let header = header_len(mode);
    let mut input = vec![0; 1 << 20];
    input[..rest.len()].copy_from_slice(&rest);
    let (mut filled, mut skip, mut out) = (rest.len(), 0, Vec::with_capacity(1 << 20));
    loop {
        let mut at = skip.min(filled);
        skip -= at;
        while skip == 0 && filled - at >= header {
            let Some(r) = parse(mode, &input[at..at + header]) else { return Ok(()) };
            at += header;
            if r.kind == Cmd::Write as u8 {
                let here = r.len.min(filled - at);
                at += here;
                skip = r.len - here;
            }
            answer(mode, &r, &mut out);
        }
        input.copy_within(at..filled, 0);
        filled -= at;
        if !out.is_empty() {
            s.write_all(&out)?;
            out.clear();
        }
        let n = s.read(&mut input[filled..])?;
        if n == 0 {
            return Ok(());
        }
        filled += n;
    }
}
