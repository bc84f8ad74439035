//! Entering an export: the pure handshake of the crate `nbd`, fed from a stream, in bounded time.

use super::ClientTls;
use block::{BlockError, ErrorKind, Result};
use env::{Env, Stream};
use nbd::{ClientHandshake, ClientStep, ClientWants, Inbox, Negotiated, Outbox};
use std::rc::Rc;
use std::time::Duration;

/// A server that takes longer for its handshake is not there: no disk hangs on opening it.
const LIMIT: Duration = Duration::from_secs(30);
/// Bytes taken in one receive.
const RECEIVE: usize = 16 << 10;

/// Shakes hands over `stream`; the stream to go on with (under TLS, if that is wanted) and what was agreed. What came after the handshake is left in `inbox`.
pub(super) async fn enter(
    env: &Env,
    stream: Rc<dyn Stream>,
    tls: Option<&ClientTls>,
    inbox: &mut Inbox,
    wants: ClientWants,
) -> Result<(Rc<dyn Stream>, Negotiated)> {
    let shaking = Box::pin(shake(stream, tls, inbox, wants));
    match env.timeout(LIMIT, shaking).await {
        Some(result) => result,
        None => {
            let message = format!("NBD server did not finish its handshake in {} seconds", LIMIT.as_secs());
            Err(BlockError::new(ErrorKind::Disconnected, message).with_errno(BlockError::ETIMEDOUT))
        }
    }
}

async fn shake(
    mut stream: Rc<dyn Stream>,
    tls: Option<&ClientTls>,
    inbox: &mut Inbox,
    wants: ClientWants,
) -> Result<(Rc<dyn Stream>, Negotiated)> {
    let (mut hand, mut out) = (ClientHandshake::new(wants)?, Outbox::new());
    let mut first = true;
    loop {
        let step = hand.step(inbox, &mut out)?;
        if !out.is_empty() {
            stream.send(out.take()).await?;
        }
        match (step, tls) {
            (ClientStep::Enter(negotiated), _) => return Ok((stream, negotiated)),
            (ClientStep::StartTls, Some(tls)) => {
                stream = tls.credentials.connect(stream, tls.hostname.as_deref()).await?;
                continue;
            }
            _ => {}
        }
        let piece = stream.recv(RECEIVE).await?;
        if piece.is_empty() {
            let what = if first { "initial magic" } else { "option reply" };
            let message = format!("Failed to read {what}: Unexpected end-of-file before all data were read");
            return Err(BlockError::new(ErrorKind::Disconnected, message));
        }
        first = false;
        inbox.push(piece, usize::MAX);
    }
}
