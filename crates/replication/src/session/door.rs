//! The door of a side that hands its group over, and has not heard whether the other took over.
//!
//! What can happen: the answer was lost with the connection, and who took over listens no more: it is a primary now, and comes to where
//! this side will listen as its secondary. What must stay true: nothing is taken from whoever comes; that there is a newer owner of this
//! very image is believed as a secondary believes it (a generation above its own, on a path through its checkpoint).

use super::secure::Accept;
use super::{DEFAULT_TIMEOUT, RECV};
use crate::history::{History, Relation};
use crate::types::{Epoch, Generation, GroupId, Seq};
use crate::wire::{Body, Decoder, Frame, Hello, Reject};
use block::{BlockError, Result};
use env::{Env, Listener, Stream};
use std::rc::Rc;
use std::time::Duration;

/// Before a failed accept is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Who stands at the door, and what of.
pub(super) struct Door {
    pub(super) env: Env,
    pub(super) listener: Rc<dyn Listener>,
    pub(super) accept: Option<Accept>,
    pub(super) group: GroupId,
    /// Where the image comes from that was handed over.
    pub(super) history: History,
}

impl Door {
    /// Waits for the new owner; its generation.
    pub(super) async fn new_owner(&self) -> Generation {
        loop {
            match self.listener.accept().await {
                // one after the other: who says nothing is not waited for longer than any
                Ok(stream) => match self.env.timeout(DEFAULT_TIMEOUT, self.meet(&stream)).await {
                    Some(Ok(Some(by))) => {
                        stream.shutdown();
                        return by;
                    }
                    _ => stream.shutdown(),
                },
                Err(_) => self.env.sleep(RETRY).await,
            }
        }
    }

    /// Hears who it is. Who is not the new owner may come again, when it is known what became of the group.
    async fn meet(&self, plain: &Rc<dyn Stream>) -> Result<Option<Generation>> {
        let stream = match &self.accept {
            Some(secure) => secure(plain.clone()).await?,
            None => plain.clone(),
        };
        let mut decoder = Decoder::new();
        let frame = loop {
            if let Some(frame) = decoder.next_frame()? {
                break frame;
            }
            let bytes = stream.recv(RECV).await?;
            if bytes.is_empty() {
                return Err(BlockError::invalid("it said nothing"));
            }
            decoder.push(bytes);
        };
        if let Body::Hello(hello) = &frame.body
            && self.owns(hello)
        {
            return Ok(Some(hello.history.generation()));
        }
        let text = "this side is handing its group over".to_owned();
        let body = Body::Reject { why: Reject::Busy, text };
        let generation = self.history.generation();
        stream.send(Frame { generation, seq: Seq(0), epoch: Epoch(0), body }.encode()).await?;
        Ok(None)
    }

    fn owns(&self, hello: &Hello) -> bool {
        hello.group == self.group
            && hello.history.generation() > self.history.generation()
            && matches!(hello.history.compare(&self.history), Relation::Same | Relation::Behind(_))
    }
}
