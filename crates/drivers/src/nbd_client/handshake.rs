//! Entering an export: the pure handshake of the crate `nbd`, fed from a stream, in bounded time.

use block::{BlockError, ErrorKind, Result};
use env::{Env, Stream};
use nbd::{ClientHandshake, ClientWants, Inbox, Negotiated, Outbox};
use std::time::Duration;

/// A server that takes longer for its handshake is not there: no disk hangs on opening it.
const LIMIT: Duration = Duration::from_secs(30);
/// Bytes taken in one receive.
const RECEIVE: usize = 16 << 10;

/// Shakes hands over `stream`. What came after the handshake is left in `inbox`.
pub(super) async fn enter(
    env: &Env,
    stream: &dyn Stream,
    inbox: &mut Inbox,
    wants: ClientWants,
) -> Result<Negotiated> {
    let shaking = Box::pin(shake(stream, inbox, wants));
    match env.timeout(LIMIT, shaking).await {
        Some(result) => result,
        None => {
            let message = format!("NBD server did not finish its handshake in {} seconds", LIMIT.as_secs());
            Err(BlockError::new(ErrorKind::Disconnected, message).with_errno(BlockError::ETIMEDOUT))
        }
    }
}

async fn shake(stream: &dyn Stream, inbox: &mut Inbox, wants: ClientWants) -> Result<Negotiated> {
    let (mut hand, mut out) = (ClientHandshake::new(wants)?, Outbox::new());
    let mut first = true;
    loop {
        let piece = stream.recv(RECEIVE).await?;
        if piece.is_empty() {
            let what = if first { "initial magic" } else { "option reply" };
            let message = format!("Failed to read {what}: Unexpected end-of-file before all data were read");
            return Err(BlockError::new(ErrorKind::Disconnected, message));
        }
        first = false;
        inbox.push(piece, usize::MAX);
        let done = hand.step(inbox, &mut out)?;
        if !out.is_empty() {
            stream.send(out.take()).await?;
        }
        if let Some(negotiated) = done {
            return Ok(negotiated);
        }
    }
}
