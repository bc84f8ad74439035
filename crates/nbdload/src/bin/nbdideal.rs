//! `nbdideal`: an NBD server without a disk. It shakes hands, answers every read with zeroes and everything else with
//! success, at once, all requests of a receive with one send. What a client can reach against it is the limit.

use clap::Parser;
use nbd::proto::{REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, flag};
use nbd::{Catalog, ExportFacts, HandshakeStep, Inbox, Mode, Outbox, ServerHandshake};
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

/// Shakes hands: the bytes that came after, if the client entered with simple replies.
fn enter(s: &mut UnixStream, size: u64) -> std::io::Result<Option<Vec<u8>>> {
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
                return Ok((a.mode == Mode::Simple).then_some(rest));
            }
            _ => return Ok(None),
        }
    }
}

fn serve(mut s: UnixStream, size: u64) -> std::io::Result<()> {
    let Some(rest) = enter(&mut s, size)? else { return Ok(()) };
    let mut input = vec![0; 1 << 20];
    input[..rest.len()].copy_from_slice(&rest);
    let (mut filled, mut skip, mut out) = (rest.len(), 0, Vec::with_capacity(1 << 20));
    loop {
        let mut at = skip.min(filled);
        skip -= at;
        while skip == 0 && filled - at >= 28 {
            let r = &input[at..at + 28];
            if r[..4] != REQUEST_MAGIC.to_be_bytes() || r[7] == 2 {
                return Ok(());
            }
            let len = u32::from_be_bytes([r[24], r[25], r[26], r[27]]) as usize;
            out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
            out.extend_from_slice(&[0; 4]);
            out.extend_from_slice(&r[8..16]);
            at += 28;
            match r[7] {
                0 => out.resize(out.len() + len, 0),
                1 => {
                    let here = len.min(filled - at);
                    at += here;
                    skip = len - here;
                }
                _ => {}
            }
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
