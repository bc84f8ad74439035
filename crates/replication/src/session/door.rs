//! The door of a primary: where another owner of the group finds it, whichever of the two calls the other.
//!
//! What can happen: a primary comes back that was succeeded while it was down, and knows nobody who would tell it; the side that was asked to
//! take over has, and its answer was lost with the connection; somebody comes who does not belong here. What must stay true: nothing is
//! taken from whoever comes; that it is a newer owner of this image is believed as a secondary believes it, by the paths alone.

use super::primary::PrimaryGroup;
use super::secure::Accept;
use super::{DEFAULT_TIMEOUT, RECV};
use crate::types::{Epoch, Seq};
use crate::wire::{Body, Decoder, Frame};
use block::{BlockError, Result};
use env::{Env, Listener, Stream};
use std::rc::Rc;
use std::time::Duration;

/// Before a failed accept is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Where it is, and who is let in.
#[derive(Clone)]
pub(super) struct Door {
    pub(super) env: Env,
    pub(super) listener: Rc<dyn Listener>,
    pub(super) accept: Option<Accept>,
}

impl Door {
    /// Meets whoever comes, for as long as it is polled.
    pub(super) async fn keep(&self, owner: &Rc<PrimaryGroup>) {
        loop {
            match self.listener.accept().await {
                // one after the other: who says nothing is not waited for longer than any
                Ok(stream) => {
                    let met = self.env.timeout(DEFAULT_TIMEOUT, self.meet(owner, &stream)).await;
                    if let Some(Err(e)) = met {
                        owner.note(format!("somebody at the door: {e}"));
                    }
                    stream.shutdown();
                }
                Err(_) => self.env.sleep(RETRY).await,
            }
        }
    }

    /// Hears who it is, and says which of the two is left behind.
    async fn meet(&self, owner: &Rc<PrimaryGroup>, plain: &Rc<dyn Stream>) -> Result<()> {
        let stream = match &self.accept {
            Some(secure) => secure(plain.clone()).await?,
            None => plain.clone(),
        };
        let mut decoder = Decoder::new();
        let frame = loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => break frame,
                Ok(None) => {}
                // perhaps of another version: it is told so
                Err(e) => {
                    self.say(owner, &*stream, Body::Bye { text: e.to_string() }).await?;
                    return Err(e);
                }
            }
            let bytes = stream.recv(RECV).await?;
            if bytes.is_empty() {
                return Err(BlockError::invalid("it said nothing"));
            }
            decoder.push(bytes);
        };
        let Body::Hello(hello) = &frame.body else {
            return Err(BlockError::invalid("it did not say who it is"));
        };
        let (why, text) = owner.meet(hello);
        self.say(owner, &*stream, Body::Reject { why, text }).await
    }

    async fn say(&self, owner: &PrimaryGroup, stream: &dyn Stream, body: Body) -> Result<()> {
        let generation = owner.look(|c| c.history().generation());
        stream.send(Frame { generation, seq: Seq(0), epoch: Epoch(0), body }.encode()).await
    }
}
