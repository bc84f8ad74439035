//! A planned change of sides (X9), both ends of it: the primary becomes a secondary, and the secondary a primary.
//!
//! What can happen: the other side refuses, or is gone in the middle; a crash of either. What must stay true: no acknowledged write is
//! lost, and at no time do both sides serve writers; the former primary is a secondary at exactly the checkpoint at which
//! it handed over, so that nothing has to be copied.

use super::{Acting, Group, address_of, refused};
use crate::ack::Quorum;
use crate::primary::Config;
use crate::session::primary::Hurry;
use crate::session::{PrimaryGroup, SecondaryGroup};
use crate::types::{Epoch, Generation};
use crate::wire::HandOver;
use block::{BlockError, ErrorKind, Result};
use env::sync::Queue;
use env::{Address, Listener, TaskHandle};
use graph::Quiesced;
use std::rc::Rc;
use std::time::Duration;

/// What writers on the former primary are told.
const HANDED_OVER: &str = "this side was handed over: the disk is written to on the other one";

/// What a change of sides gave.
#[derive(Clone, Debug)]
pub struct SwitchedOver {
    /// The checkpoint at which it happened.
    pub epoch: Epoch,
    /// The new primary's generation.
    pub generation: Generation,
    /// How long requests were kept out.
    pub duration: Duration,
    /// Where this side listens now.
    pub address: Address,
}

impl Group {
    /// Makes peer `to` the primary and this side its secondary, which listens at `listen`, where the other side finds it at
    /// `advertise`. Requests of this side's users wait meanwhile; writes fail afterwards.
    ///
    /// # Errors
    /// This side is no primary, `to` is no copy, or it refuses: all is as before. `limit` passes: before the other side was asked, all
    /// is as before; afterwards requests wait until it is known whether it took over.
    pub async fn switch_over(
        self: &Rc<Self>,
        to: &str,
        listen: &Address,
        advertise: Option<String>,
        limit: Duration,
    ) -> Result<SwitchedOver> {
        let Acting::Primary(primary) = self.acting() else {
            return Err(refused(format!("Replication group '{}' is not a primary", self.new.id)));
        };
        let peer = primary.peer_number(to).ok_or_else(|| {
            BlockError::new(ErrorKind::NotFound, format!("group '{}' has no peer '{to}'", self.new.id))
        })?;
        let env = self.graph.env().clone();
        let began = env.now();
        let hurry = primary.hurry(peer, limit)?;
        // before anything is given up
        let listener = self.listen(listen).await?;
        let still = env.timeout(limit, self.graph.freeze(&self.cells())).await;
        let still = still.ok_or_else(|| refused("requests under way do not end"))?;
        let config = primary.look(|c| c.config().clone());
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let address = advertise.unwrap_or_else(|| listener.address().to_string());
        let hand = HandOver {
            name: address.clone(),
            address,
            write_level: config.write_level,
            flush_level: config.flush_level,
            min_acks: u16::try_from(config.quorum.needed()).unwrap_or(u16::MAX),
            policy: config.policy,
            interval_ms: primary.interval().map_or(0, millis),
            timeout_ms: millis(primary.timeout()),
        };
        let answer = Rc::new(Queue::new());
        let (group, told) = (self.clone(), answer.clone());
        env.spawn("replication switchover", async move {
            let done = group.give(&primary, peer, hand, listener, still, (limit, hurry)).await;
            told.push(done);
        });
        let late =
            || refused("the other side has not said yet whether it took over; requests wait until it does");
        let (epoch, generation, address) =
            env.timeout(limit, answer.pop()).await.flatten().unwrap_or_else(|| Err(late()))?;
        let duration = env.now().saturating_sub(began);
        Ok(SwitchedOver { epoch, generation, duration, address })
    }

    async fn give(
        self: &Rc<Self>,
        primary: &Rc<PrimaryGroup>,
        peer: usize,
        hand: HandOver,
        listener: Rc<dyn Listener>,
        still: Quiesced,
        (limit, hurry): (Duration, Hurry),
    ) -> Result<(Epoch, Generation, Address)> {
        // whoever took over comes to where this side will listen
        let elsewhere = !self.is_porch(&listener);
        let door = elsewhere.then(|| primary.stand_at(self.door(&listener)));
        let generation = primary.hand_over(peer, hand, limit, hurry).await.inspect_err(|_| {
            door.iter().for_each(TaskHandle::cancel);
        })?;
        let history = primary.look(|c| c.history().clone());
        primary.stop();
        // The disks are this checkpoint, flushed. A crash before the store says so leaves a primary that was overtaken.
        let store = self.new_store(history.clone()).await?;
        let env = self.graph.env();
        let _ = env.remove(&self.record_path()).await;
        let secondary = SecondaryGroup::new(env, store, self.record_path(), self.tell.clone());
        secondary.protect(self.new.secure.accept.clone());
        secondary.refuse_own_writes(HANDED_OVER);
        let address = listener.address();
        self.peers.borrow_mut().clear();
        self.follow(&secondary, listener).await;
        drop(still);
        Ok((history.epoch(), generation, address))
    }

    /// This side was told to take over, and has: it goes on as the primary, with the former one as its peer.
    pub(super) async fn take_place(self: &Rc<Self>, hand: HandOver) {
        let config = Config {
            write_level: hand.write_level,
            flush_level: hand.flush_level,
            quorum: Quorum::Any(usize::from(hand.min_acks)),
            policy: hand.policy,
            external_decision: false,
        };
        let begun = async {
            *self.peers.borrow_mut() = vec![(hand.name.clone(), address_of(&hand.address)?)];
            self.start_primary(config, Duration::from_millis(hand.timeout_ms.max(10)), None).await
        };
        let begun = begun.await;
        if let (Ok(()), Acting::Primary(primary)) = (&begun, self.acting()) {
            let every = Some(hand.interval_ms).filter(|ms| *ms > 0);
            primary.set_interval(every.map(Duration::from_millis));
            (self.tell)(
                "REPLICATION_STATE_CHANGE",
                vec![
                    ("old", "secondary".into()),
                    ("new", "primary".into()),
                    ("reason", "handed over".into()),
                ],
            );
        }
        if let Err(e) = begun {
            (self.tell)(
                "REPLICATION_ERROR",
                vec![
                    ("operation", "hand-over".into()),
                    ("offset", 0.into()),
                    (
                        "reason",
                        format!("the former primary at {} is not followed by: {e}", hand.address).into(),
                    ),
                ],
            );
        }
    }
}
